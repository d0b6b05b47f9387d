"""The demo's output alignments side by side: the same frozen model, prompt, data and training, another map."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastprompt.nn import BayesianMap, LabelMap, LinearMap
from fastprompt.training import evaluate, fit, refresh

from . import pictures, source
from .digits import load_digits
from .run import BATCH, EPOCHS, LEARNING_RATE, REFRESH_EVERY, bordered

# name: (what it is, the map of S sources for a seed). The training is the demo's for all; none was tuned for its map.
ALIGNMENTS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "random": ("random (RLM)", lambda s, seed: LabelMap(s, 10, "random", seed=seed)),
    "first": ("the first 10 classes (AR)", lambda s, seed: LabelMap(s, 10, "first")),
    "frequent": ("frequent (FLM)", lambda s, seed: LabelMap(s, 10, "frequent", seed=seed)),
    "iterative": ("iterative (ILM)", lambda s, seed: LabelMap(s, 10, seed=seed, refresh_every=REFRESH_EVERY)),
    "optimal": (
        "iterative, optimal matching",
        lambda s, seed: LabelMap(s, 10, seed=seed, refresh_every=REFRESH_EVERY, matching="optimal"),
    ),
    "many-to-one": (
        "iterative, 5 sources a class",
        lambda s, seed: LabelMap(s, 10, seed=seed, refresh_every=REFRESH_EVERY, sources_per_class=5),
    ),
    "blm": ("Bayesian (BLM)", lambda s, seed: BayesianMap(s, 10)),
    "blm+": ("Bayesian, top-k (BLM+)", lambda s, seed: BayesianMap(s, 10, top=0.15)),
    "linear": ("linear, trained", lambda s, seed: LinearMap(s, 10)),
}


def compare(
    out_dir: str | Path, names: Sequence[str], seeds: int = 3, device: str | torch.device | None = None, quick: bool = False
) -> dict[str, dict[str, Any]]:
    """Trains the prompt with each alignment and prints a table: accuracy and cost.

    Args:
        out_dir: folder for alignment-NAME.png, the map of the first seed.
        names: of ALIGNMENTS; "all" is all of them.
        seeds, device, quick: see `fastprompt.demo.run.run`.

    Returns:
        By name: "accuracy", test accuracy in percent of each seed; "epoch", median seconds an epoch, refreshes included;
        "refresh", median seconds of one refresh (None where there is none); "trained", how many parameters.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
        ValueError: an unknown name, or seeds is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if unknown := sorted(set(names) - {*ALIGNMENTS, "all"}):
        raise ValueError(f"alignment: expected all or some of {', '.join(ALIGNMENTS)}, got {', '.join(unknown)}")
    chosen = [name for name in ALIGNMENTS if name in names or "all" in names]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures.require_matplotlib()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = {name: (x.to(device), y.to(device)) for name, (x, y) in load_digits().items()}
    model = source.load_source().to(device)
    figures: dict[str, dict[str, list[float]]] = {name: {"accuracy": [], "epoch": [], "refresh": []} for name in chosen}
    trained: dict[str, int] = {}
    bar = tqdm(total=len(chosen) * seeds, unit="run")
    for seed in range(seeds):
        for name in chosen:  # in turns: a machine that is busy for a while is so for all
            bar.set_description(f"{name}, seed {seed}")
            labels: Any = ALIGNMENTS[name][1](len(model.class_names), seed)
            module, own = bordered(model, labels), figures[name]
            with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
                rows = fit(
                    module, data["train"], epochs=1 if quick else EPOCHS, lr=LEARNING_RATE, batch_size=BATCH, seed=seed,
                    progress=False,
                )  # fmt: skip
                own["accuracy"].append(100 * evaluate(module, data["test"]))
            bar.set_postfix_str(f"{name} {own['accuracy'][-1]:.2f} %")
            own["epoch"] += [row["seconds"] for row in rows]
            if getattr(labels, "refresh_every", None) is not None:
                again = copy.deepcopy(module)
                start = time.perf_counter()
                refresh(again, data["train"])
                own["refresh"].append(time.perf_counter() - start)
            if seed == 0:
                trained[name] = sum(parameter.numel() for parameter in module.trainable_parameters())
                pictures.draw_map(model, labels, ALIGNMENTS[name][0], out / f"alignment-{name}.png")
            bar.update()
    bar.close()
    table: dict[str, dict[str, Any]] = {
        name: {
            "accuracy": own["accuracy"],
            "epoch": statistics.median(own["epoch"]),
            "refresh": statistics.median(own["refresh"]) if own["refresh"] else None,
            "trained": trained[name],
        }
        for name, own in figures.items()
    }
    _print(table, len(model.class_names), device)
    print(f"written to {out}: " + ", ".join(f"alignment-{name}.png" for name in chosen))
    return table


def _print(table: dict[str, dict[str, Any]], sources: int, device: torch.device) -> None:
    print(f"\n{sources} printed characters -> 10 handwritten digits, trained prompt; on {device}")
    print(f"  {'alignment':30}{'test accuracy in %':>26}{'s / epoch':>12}{'s / refresh':>13}{'trained':>10}")
    for name, row in table.items():
        accuracy = row["accuracy"]
        spread = f"{min(accuracy):.2f} to {max(accuracy):.2f}" if len(accuracy) > 1 else ""
        cost = "-" if row["refresh"] is None else f"{row['refresh']:.2f}"
        print(
            f"  {ALIGNMENTS[name][0]:30}{statistics.fmean(accuracy):8.2f}{spread:>18}{row['epoch']:12.2f}{cost:>13}"
            f"{row['trained']:10,}"
        )
    print("  accuracy: mean over seeds, lowest to highest; seconds: medians, an epoch with its refreshes")
