"""Label maps against what a user would run instead.

Rivals: `eager`, the loops and the indexing of the public repositories, written from their formulas; `compile` of it where it
is traceable; `plain`, the best plain PyTorch found.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.suite import Case, Form, Inputs
from fastprompt import functional
from fastprompt.reference import mapping as reference


def mapped_loss(batch: int, sources: int, targets: int, dtype: torch.dtype) -> list[Case]:
    """Cross-entropy of logits[:, index], and its gradient for all logits."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        return {
            "logits": torch.randn((batch, sources), **make).to(dtype).requires_grad_(),
            "index": torch.randperm(sources, **make)[:targets],
            "y": torch.randint(targets, (batch,), **make),
            "g": torch.ones((), device=device, dtype=dtype),
        }

    forms: dict[str, Form] = {
        "fastprompt": lambda i: F.cross_entropy(functional.map_labels(i["logits"], i["index"]), i["y"]),
        "eager": lambda i: F.cross_entropy(i["logits"][:, i["index"]], i["y"]),
        "plain": lambda i: F.cross_entropy(i["logits"].index_select(1, i["index"]), i["y"]),
    }
    read, written = batch * targets * dtype.itemsize, batch * sources * dtype.itemsize
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    case = partial(
        Case, family="mapping", name="map + cross-entropy", shape=f"B={batch} S={sources} T={targets}", dtype=dtype,
        inputs=inputs, forms=forms, formula=forms["eager"], wrt=("logits",), tolerance=tolerance, best=("eager", "plain"),
    )  # fmt: skip
    return [case(mode="forward", bytes=read), case(mode="both", bytes=2 * read + written)]


def counted(samples: int, sources: int, targets: int, dtype: torch.dtype) -> Case:
    """How often source s was predicted for target t, over an epoch."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        return {
            "logits": torch.randn((samples, sources), **make).to(dtype),
            "target": torch.randint(targets, (samples,), **make),
        }

    def ours(i: Inputs) -> Tensor:
        counts = torch.zeros((sources, targets), dtype=torch.int64, device=i["logits"].device)
        return functional.count_labels_(counts, i["logits"], i["target"])

    def loops(i: Inputs) -> Tensor:
        hot = F.one_hot(i["logits"].argmax(1), sources)
        return torch.stack([hot[i["target"] == t].sum(0) for t in range(targets)], 1)

    def bincount(i: Inputs) -> Tensor:
        cells = i["logits"].argmax(1) * targets + i["target"]
        return torch.bincount(cells, minlength=sources * targets).view(sources, targets)

    return Case(
        family="mapping", name="count", shape=f"N={samples} S={sources} T={targets}", mode="forward", dtype=dtype,
        inputs=inputs, forms={"fastprompt": ours, "loops": loops, "plain": bincount}, formula=bincount, wrt=(),
        bytes=samples * (sources * dtype.itemsize + 8) + 8 * sources * targets,
    )  # fmt: skip


def matched(samples: int, sources: int, targets: int) -> Case:
    """The greedy one-to-one map of those counts, bit for bit."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        cells = torch.rand((2, samples), generator=generator, device=device).square()  # some classes are frequent
        flat = (cells[0] * sources).long() * targets + (cells[1] * targets).long()
        return {"counts": torch.bincount(flat, minlength=sources * targets).view(sources, targets)}

    def repeated(i: Inputs) -> Tensor:
        return reference.match_labels(i["counts"])

    return Case(
        family="mapping", name="match", shape=f"S={sources} T={targets}", mode="forward", dtype=torch.int64, inputs=inputs,
        forms={"fastprompt": lambda i: functional.match_labels(i["counts"]), "repeated argmax": repeated}, formula=repeated,
        wrt=(), bytes=8 * sources * targets, best=("repeated argmax",),
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family mapping` runs."""
    sizes = [(256, 1000, 10), (256, 1000, 100), (32, 1000, 10), (4096, 1000, 100), (256, 32157, 397)]
    made = [case for size in sizes for case in mapped_loss(*size, dtype)]
    made.append(counted(50_000, 1000, 10, dtype))
    if dtype == torch.float32 or device.type == "cuda":
        made += [matched(50_000, 8100, 100), matched(16_000, 32157, 397)]
    return made
