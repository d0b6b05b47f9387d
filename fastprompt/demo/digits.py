"""The target data of the demo: scikit-learn's 1797 handwritten digits of 8x8 pixels, split once."""

import torch

TRAIN, VALIDATION = 600, 400  # the rest, 797 images, is the test part
SEED = 0


def load_digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The digits, split with a fixed seed and stratified by class.

    Returns "train", "validation" and "test" -> (images uint8 [N, 1, 8, 8], labels int64 [N]). Ink
    is bright on black, as in the source data.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('the handwritten digits come with scikit-learn: pip install "fastprompt[demo]"') from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    split = {"train_size": TRAIN + VALIDATION, "random_state": SEED}
    rest, test = train_test_split(range(len(labels)), stratify=labels, **split)
    train, validation = train_test_split(rest, train_size=TRAIN, stratify=labels[rest], random_state=SEED)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: (images[index], labels[index]) for name, index in parts.items()}
