"""What modules of several families share: the constructor's arguments as data, printing, sizes, starts from a vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.functional.checks import bad


class Described(nn.Module):
    """A module that holds its constructor's arguments under their names."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them; given tensors are in the state."""
        held = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if hasattr(self, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}

    def extra_repr(self) -> str:
        shown = inspect.signature(type(self)).parameters
        parts = [f"{name}={value}" for name, value in self.config().items() if value != shown[name].default]
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return ", ".join([*parts, f"trainable={trainable:,}"])


_SHOWN = 40  # rows in a picture


class Drawn:
    """A label map that shows itself, from `dense()`: float [S, T], what each class reads of each source."""

    def dense(self) -> Tensor:
        raise NotImplementedError

    def plot(self, source_names: Sequence[str] | None = None, target_names: Sequence[str] | None = None, ax: Any = None) -> Any:
        """A heat map of `dense()`: a row a source that is read (at most 40, the strongest of every class), a column a class.

        Args:
            source_names, target_names: one a source, one a class; default are their numbers.
            ax: matplotlib Axes to draw in; default is a new figure.

        Returns:
            the Axes.

        Raises:
            ImportError: matplotlib is missing. ValueError: another number of names.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError('plot needs matplotlib: pip install "fastprompt[plot]"') from error
        matrix = self.dense().cpu().float()
        sources, classes = matrix.shape
        for argument, names, count in (("source_names", source_names, sources), ("target_names", target_names, classes)):
            if names is not None and len(names) != count:
                raise bad(argument, f"{count} names", len(names))
        rank = matrix.abs().argsort(dim=0, descending=True, stable=True).argsort(0)  # of a source among those of a class
        best = torch.where(matrix != 0, rank, sources).amin(1)
        rows = best.argsort(stable=True)[: min(_SHOWN, int((best < sources).sum()))]
        rows = rows[matrix[rows].abs().argmax(1).argsort(stable=True)]  # the sources of class 0 first: a diagonal to the eye
        if ax is None:
            _, ax = pyplot.subplots(figsize=(2 + 0.3 * classes, 2 + 0.22 * len(rows)), layout="constrained")
        shown = matrix[rows]
        limit = float(shown.abs().max()) if shown.numel() else 1.0
        signed = bool((shown < 0).any())
        image = ax.imshow(
            shown.numpy(), aspect="auto", cmap="coolwarm" if signed else "viridis", vmin=-limit if signed else 0, vmax=limit
        )
        ax.set_xticks(range(classes), list(target_names or map(str, range(classes))), rotation=90)
        ax.set_yticks(range(len(rows)), [source_names[i] if source_names else str(i) for i in rows.tolist()])
        ax.set(xlabel="target class", ylabel="source")
        ax.figure.colorbar(image, ax=ax, label="weight")
        return ax


def check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise bad(name, "at least 1", size)


def check_vocabulary(vocabulary: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """Ids of rows of an embedding matrix, as int64 [K] on the CPU."""
    if vocabulary.dim() != 2:
        raise bad("vocabulary", "an embedding matrix [V, width]", list(vocabulary.shape))
    rows = torch.as_tensor(ids, dtype=torch.int64, device="cpu").flatten()
    if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(vocabulary):
        raise bad("ids", f"at least one, each from 0 to {len(vocabulary) - 1}", rows.tolist()[:8])
    return rows


def from_words(vocabulary: Tensor, length: int, ids: Sequence[int] | Tensor | None, prompts: int, seed: int) -> Tensor:
    """Rows of an embedding matrix to start prompts from: a text's, repeated or cut, [P, width], or random ones [N, P, width]."""
    check_sizes(length=length, prompts=prompts)
    if ids is None:
        ids = torch.randint(len(vocabulary), (prompts, length), generator=torch.Generator().manual_seed(seed))
        rows = check_vocabulary(vocabulary, ids).view(prompts, length)
    else:
        rows = check_vocabulary(vocabulary, ids)
        rows = rows.repeat(-(-length // len(rows)))[:length]
    return vocabulary.detach()[rows.to(vocabulary.device)]


Folded = tuple[list[Any], list[Tensor], tuple[Tensor, Tensor | None]]


@torch.inference_mode(False)  # what is kept must serve training too
@torch.no_grad()
def folded(outputs: Any, layer: Any, kept: Folded | None) -> Folded:
    """A head with a map inside (last of the three); made again when something that it is made of has changed or moved."""
    made_of = [t for t in (layer.weight, layer.bias, *outputs.buffers()) if t is not None]
    known = not any(t.is_inference() for t in made_of)  # those do not tell when they change
    stamps = [(t.data_ptr(), t.dtype, t.device, t._version if known else 0) for t in made_of]
    if kept is None or not known or kept[0] != stamps:
        # An alias of each is kept, so that its address cannot be another tensor's by now.
        kept = stamps, [t.detach() for t in made_of], outputs.fold(layer.weight, layer.bias)
    return kept
