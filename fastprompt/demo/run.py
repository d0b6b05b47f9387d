"""The demo: a frozen model of printed characters is reprogrammed to read handwritten digits.

The digits stand in the middle of the model's canvas, a border around them is trained, and each
digit is read as one of the characters. Settings were chosen on the validation part; accuracy is
shown on the test part, beside two baselines that say what the task is worth.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastprompt.nn import LabelMap, PaddedPrompt
from fastprompt.reprogram import Reprogrammed
from fastprompt.training import evaluate, fit, refresh

from . import pictures, source
from .digits import load_digits

DIGIT_SIZE = 20
LEARNING_RATE = 0.1
EPOCHS = 8
REFRESH_EVERY = 2  # epochs between two matches of the iterative map: the prompt needs time to follow
BATCH = 64
PENALTY = {"pixels": 10.0, "probe": 1.0}  # C of the logistic regressions

TITLES = {
    "pixels": "logistic regression on raw pixels",
    "probe": "linear probe on the frozen features",
    "random": "random map, trained prompt",
    "untrained": "frequent map (FLM), untrained prompt",
    "frequent": "frequent map (FLM), trained prompt",
    "iterative": "iterative map (ILM), trained prompt",
}

Part = tuple[Tensor, Tensor]


def run(
    out_dir: str | Path,
    seeds: int = 3,
    device: str | torch.device | None = None,
    quick: bool = False,
) -> dict[str, list[float]]:
    """Runs the demo, prints what comes out, writes pictures and a checkpoint.

    Args:
        out_dir: folder for prompt.png, label_map.png, accuracy.png and checkpoint/.
        seeds: how many seeds to train with; a seed sets the random map and the order of the data.
        device: where to run; default is CUDA where there is a GPU.
        quick: one epoch instead of eight, to see that everything works.

    Returns:
        Test accuracy in percent for each key of TITLES, one number a seed where seeds matter.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: seeds is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures.require_matplotlib()  # now, not after a minute of training
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = {name: (x.to(device), y.to(device)) for name, (x, y) in load_digits().items()}
    model = source.load_source().to(device)
    counts = ", ".join(f"{len(y)} {name}" for name, (_, y) in data.items())
    print(f"frozen model: {len(model.class_names)} classes of printed letters, no digits; on {device}")
    print(f"task: handwritten digits, {counts}")

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        accuracy = baselines(model, data)
        untrained = reprogram(model, "frequent", seed=0)
        refresh(untrained, data["train"])
        accuracy["untrained"] = [100 * evaluate(untrained, data["test"])]
        trained, curves, reached = train_all(model, data, seeds, 1 if quick else EPOCHS)
    accuracy |= reached
    _print_accuracy(accuracy)
    _print_labels(model, trained["frequent"], trained["iterative"])
    _print_speed(throughput(trained["iterative"], data["train"]))

    trained["iterative"].save_pretrained(out / "checkpoint")
    again = Reprogrammed.from_pretrained(out / "checkpoint", source.load_source()).to(device)
    kept, loaded = accuracy["iterative"][0], 100 * evaluate(again, data["test"])
    print(f"\ncheckpoint: {kept:.2f} % before, {loaded:.2f} % after loading it again")
    pictures.draw_prompt(trained["iterative"], data["test"][0], out / "prompt.png")
    pictures.draw_labels(model, trained["frequent"], trained["iterative"], data["train"], out / "label_map.png")
    pictures.draw_curves(curves, accuracy, TITLES, out / "accuracy.png")
    print(f"written to {out}: prompt.png, label_map.png, accuracy.png, checkpoint/")
    return accuracy


def reprogram(model: source.SourceModel, method: str, seed: int) -> Reprogrammed:
    """The frozen model with an untrained border and a `LabelMap`: uint8 [B, 1, 8, 8] -> [B, 10]."""
    every = REFRESH_EVERY if method == "iterative" else None
    return bordered(model, LabelMap(len(model.class_names), 10, method=method, seed=seed, refresh_every=every))


def bordered(model: source.SourceModel, outputs: nn.Module) -> Reprogrammed:
    """The frozen model with an untrained border and any output alignment."""
    # A tanh starts at zero, so training starts from the plain digit on black. A sigmoid would start
    # from a grey frame, which no printed character has, and the frequent map would suffer for it.
    prompt = PaddedPrompt(
        canvas=source.IMAGE_SIZE,
        image_size=DIGIT_SIZE,
        channels=1,
        mean=source.MEAN,
        std=source.STD,
        squash="tanh",
    )
    return Reprogrammed(model, inputs=prompt, outputs=outputs).to(model.position.device)


def train_all(
    model: source.SourceModel,
    data: dict[str, Part],
    seeds: int,
    epochs: int,
) -> tuple[dict[str, Reprogrammed], dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """Trains with each map and seed.

    Returns, by the map's method, the model and the rows of `fit` of the first seed, and the test
    accuracy in percent of every seed.
    """
    methods = ("random", "frequent", "iterative")
    trained: dict[str, Reprogrammed] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    accuracy: dict[str, list[float]] = {method: [] for method in methods}
    bar = tqdm(total=len(methods) * seeds, unit="run")
    for method in methods:
        for seed in range(seeds):
            bar.set_description(f"{method} map, seed {seed}")
            reprogrammed = reprogram(model, method, seed)
            rows = fit(
                reprogrammed,
                data["train"],
                data["validation"] if seed == 0 else None,  # only the curves need it
                epochs=epochs,
                lr=LEARNING_RATE,
                batch_size=BATCH,
                seed=seed,
                progress=False,
            )
            accuracy[method].append(100 * evaluate(reprogrammed, data["test"]))
            if seed == 0:
                trained[method], curves[method] = reprogrammed, rows
            bar.update()
    bar.close()
    return trained, curves, accuracy


def baselines(model: source.SourceModel, data: dict[str, Part]) -> dict[str, list[float]]:
    """Test accuracy in percent of logistic regression on raw pixels and on the frozen features."""
    from sklearn.linear_model import LogisticRegression

    prompt: Any = reprogram(model, "random", seed=0).inputs  # untrained, it is only the padding

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model.features(prompt(x))

    result = {}
    for name, read in (("pixels", lambda x: x.flatten(1) / 255), ("probe", features)):
        inputs = {part: read(data[part][0]).cpu().numpy() for part in ("train", "test")}
        regression = LogisticRegression(C=PENALTY[name], max_iter=2000)
        regression.fit(inputs["train"], data["train"][1].cpu().numpy())
        result[name] = [100 * regression.score(inputs["test"], data["test"][1].cpu().numpy())]
    return result


def throughput(reprogrammed: Reprogrammed, part: Part, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Median milliseconds a batch, measured in turns: {"inference", "training"} -> {who: time}.

    "plain PyTorch" is the same step written with PyTorch's own functions. "frozen model" is the
    bare model on an input that is ready: forward, and for training backward to that input.
    """
    reprogrammed = copy.deepcopy(reprogrammed)
    model, x, y = reprogrammed.model, part[0][:BATCH], part[1][:BATCH]
    labels: Any = reprogrammed.outputs
    before = (source.IMAGE_SIZE - DIGIT_SIZE + 1) // 2
    after = source.IMAGE_SIZE - DIGIT_SIZE - before
    delta = torch.zeros(1, 1, 32, 32, device=x.device, requires_grad=True)
    border = F.pad(torch.zeros(DIGIT_SIZE, DIGIT_SIZE, device=x.device), [before, after] * 2, value=1.0)
    ready = torch.zeros(len(x), 1, 32, 32, device=x.device, requires_grad=True)

    def plain(images: Tensor) -> Tensor:
        size = (DIGIT_SIZE, DIGIT_SIZE)
        images = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
        images = F.pad(images, [before, after] * 2) + torch.tanh(delta) * border
        return model((images - source.MEAN) / source.STD)[:, labels.index]

    def step(forward: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(parameters, LEARNING_RATE) if parameters else None

        def call() -> None:
            F.cross_entropy(forward(), y).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return call

    forwards: dict[str, Callable[[], Tensor]] = {
        "fastprompt": lambda: reprogrammed(x),
        "plain PyTorch": lambda: plain(x),
        "frozen model": lambda: model(ready),
    }
    trained: dict[str, list[Tensor]] = {
        "fastprompt": [*reprogrammed.trainable_parameters()],
        "plain PyTorch": [delta],
    }
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "inference": {who: torch.no_grad()(forward) for who, forward in forwards.items()},
        "training": {who: step(forward, trained.get(who, [])) for who, forward in forwards.items()},
    }
    times: dict[str, dict[str, float]] = {}
    for kind, contenders in calls.items():
        seconds: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(rounds):
            for who, call in contenders.items():
                _synchronize(x.device)
                start = time.perf_counter()
                call()
                _synchronize(x.device)
                seconds[who].append(time.perf_counter() - start)
        times[kind] = {who: 1000 * statistics.median(each) for who, each in seconds.items()}
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print_accuracy(accuracy: dict[str, list[float]]) -> None:
    print("\ntest accuracy in %, mean over seeds (each seed)")
    for key, title in TITLES.items():
        each = " ".join(f"{value:.2f}" for value in accuracy[key])
        several = f"  ({each})" if len(accuracy[key]) > 1 else ""
        print(f"  {title:38}{statistics.fmean(accuracy[key]):6.2f}{several}")


def _print_labels(model: source.SourceModel, frequent: Reprogrammed, iterative: Reprogrammed) -> None:
    print("\neach digit is read as (first seed)")
    print(f"     {'FLM, before training':44}ILM, after training")
    pairs = zip(pictures.read_as(model, frequent), pictures.read_as(model, iterative), strict=True)
    for digit, ((first, first_name), (last, last_name)) in enumerate(pairs):
        print(f"  {digit}  {first} {first_name:42}{last} {last_name}")


def _print_speed(times: dict[str, dict[str, float]]) -> None:
    print(f"\nspeed, batches of {BATCH}, median of interleaved runs")
    for kind, each in times.items():
        frozen = each["frozen model"]
        for who, value in each.items():
            print(
                f"  {kind:10} {who:14} {value:8.2f} ms  {1000 * BATCH / value:8.0f} images/s"
                f"  {value / frozen:5.2f} x frozen model"
            )
