"""Label maps, label-only heads, counts and matching against what a user would run instead.

Rivals: `loops` and `eager`, the loops and the indexing of the public repositories, written from their formulas; `compile` of
`eager`; `plain`, the best plain PyTorch found; `matmul`, a dense matrix made before; `full head`, every column, then the index.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import functional
from fastprompt.reference import mapping as reference

from .suite import Case, Form, Inputs


def loss_case(
    name: str, shape: str, inputs: Callable[[torch.Generator, torch.device], Inputs], forms: dict[str, Form], formula: Form,
    dtype: torch.dtype, read: int, written: int, best: tuple[str, ...], wrt: str = "logits", flops: int = 0,
) -> list[Case]:  # fmt: skip
    """A loss, forward and as a training step runs it."""
    case = partial(
        Case, family="mapping", name=name, shape=shape, dtype=dtype, inputs=inputs, forms=forms, formula=formula, wrt=(wrt,),
        tolerance=2e-5 if dtype == torch.float32 else 2e-2, best=best,
    )  # fmt: skip
    return [
        case(mode="forward", bytes=read, flops=flops),
        case(mode="both", bytes=2 * read + written, flops=2 * flops),
    ]


def mapped_loss(batch: int, sources: int, targets: int, dtype: torch.dtype) -> list[Case]:
    """Cross-entropy of logits[:, index], and its gradient for all logits."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        return {
            **logits_of(batch, sources, targets, dtype, generator, device),
            "index": torch.randperm(sources, generator=generator, device=device)[:targets],
        }

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.mapped_cross_entropy(i["logits"], i["index"], i["y"]),
        "eager": lambda i: F.cross_entropy(wide(i["logits"][:, i["index"]]), i["y"]),
        "plain": lambda i: F.cross_entropy(wide(i["logits"].index_select(1, i["index"])), i["y"]),
    }
    return loss_case(
        "map + cross-entropy", f"B={batch} S={sources} T={targets}", inputs, forms, forms["eager"], dtype,
        batch * targets * dtype.itemsize, batch * sources * dtype.itemsize, ("eager", "plain"),
    )  # fmt: skip


def logits_of(
    batch: int, sources: int, targets: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Inputs:
    make: dict[str, Any] = {"generator": generator, "device": device}
    return {
        "logits": torch.randn((batch, sources), **make).to(dtype).requires_grad_(),
        "y": torch.randint(targets, (batch,), **make),
        "g": torch.ones((), device=device),
    }


def wide(x: Tensor) -> Tensor:
    """float32, and float64 as it is: forms are formulas too."""
    return x if x.dtype == torch.float64 else x.float()


def many_to_one(batch: int, sources: int, targets: int, each: int, reduce: str, dtype: torch.dtype) -> list[Case]:
    """Cross-entropy of a reduction over `each` sources a class; each=0: classes of all sizes from 1 to 2 S / 3 T."""
    ragged = not each
    sizes = [each] * targets if each else [1 + t % max(1, 2 * sources // (3 * targets)) for t in range(targets)]

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        members = torch.randperm(sources, generator=generator, device=device)[: sum(sizes)]
        lists = [part.tolist() for part in members.split(sizes)]
        matrix = torch.zeros(sources, targets, device=device)
        for t, part in enumerate(members.split(sizes)):
            matrix[part, t] = 1 / len(part)
        return {
            **logits_of(batch, sources, targets, dtype, generator, device),
            "map": functional.segments(lists, sources).to(device), "lists": lists, "members": members, "matrix": matrix,
            "table": None if ragged else members.view(targets, each),
        }  # fmt: skip

    def ours(i: Inputs) -> Tensor:
        if reduce == "probabilities":
            return functional.mapped_cross_entropy(i["logits"], i["map"], i["y"], of="probabilities")
        if reduce == "top-3 mean":
            return functional.mapped_cross_entropy(i["logits"], i["map"], i["y"], reduce="top-k mean", k=3)
        return functional.mapped_cross_entropy(i["logits"], i["map"], i["y"], reduce=reduce)

    def last(found: Tensor) -> Tensor:
        if reduce == "top-3 mean":
            return found.topk(3, -1).values.mean(-1)
        return found.max(-1).values if reduce == "max" else found.mean(-1)

    def loops(i: Inputs) -> Tensor:
        values = i["logits"].softmax(1) if reduce == "probabilities" else i["logits"]
        mapped = torch.stack([last(values[:, part]) for part in i["lists"]], 1)
        return F.cross_entropy(mapped.log() if reduce == "probabilities" else mapped, i["y"])

    def eager(i: Inputs) -> Tensor:
        values = wide(i["logits"])
        if reduce == "probabilities":
            return F.nll_loss((q := values.softmax(1)[:, i["table"]].mean(-1)).log() - q.sum(1, keepdim=True).log(), i["y"])
        found = values[:, i["table"]]
        if reduce == "top-3 mean":
            return F.cross_entropy(found.sort(-1, descending=True).values[..., :3].mean(-1), i["y"])
        return F.cross_entropy(last(found), i["y"])

    def plain(i: Inputs) -> Tensor:
        values = i["logits"]
        if reduce == "probabilities":
            values = wide(values).log_softmax(1)
        found = wide(values.index_select(1, i["members"]).view(batch, targets, each))
        return F.cross_entropy(found.logsumexp(-1) if reduce == "probabilities" else last(found), i["y"])

    def matmul(i: Inputs) -> Tensor:
        return F.cross_entropy(wide(i["logits"]) @ i["matrix"], i["y"])

    forms: dict[str, Form] = {"fastprompt": ours, "loops": loops}
    if not ragged:
        forms |= {"eager": eager, "plain": plain}
    if reduce == "mean":
        forms["matmul"] = matmul
    case = loss_case(
        f"many-to-one {reduce} + cross-entropy", f"B={batch} S={sources} T={targets} m={each or 'ragged'}", inputs, forms,
        loops, dtype, batch * (sources if reduce == "probabilities" else sum(sizes)) * dtype.itemsize,
        batch * sources * dtype.itemsize, tuple(name for name in ("eager", "plain", "matmul") if name in forms),
    )  # fmt: skip
    return case


def by_matrix(batch: int, sources: int, targets: int, dtype: torch.dtype) -> list[Case]:
    """Cross-entropy of logits @ matrix, as BLM has it."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        matrix = torch.rand((sources, targets), generator=generator, device=device)
        return {**logits_of(batch, sources, targets, dtype, generator, device), "matrix": matrix / matrix.sum(0)}

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.mapped_cross_entropy(i["logits"], i["matrix"], i["y"]),
        "eager": lambda i: F.cross_entropy(wide(i["logits"]) @ i["matrix"], i["y"]),
    }
    return loss_case(
        "matrix + cross-entropy", f"B={batch} S={sources} T={targets}", inputs, forms, forms["eager"], dtype,
        batch * sources * dtype.itemsize + 4 * sources * targets, batch * sources * dtype.itemsize, ("eager",),
        flops=2 * batch * sources * targets,
    )  # fmt: skip


def label_head(batch: int, vocabulary: int, width: int, columns: int, dtype: torch.dtype) -> list[Case]:
    """Cross-entropy of a few columns of a vocabulary head, and its gradient for the hidden states."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        weight = (torch.randn((vocabulary, width), **make) / width**0.5).to(dtype)
        ids = torch.randperm(vocabulary, **make)[:columns]
        return {
            "hidden": torch.randn((batch, width), **make).to(dtype).requires_grad_(), "weight": weight, "ids": ids,
            "columns": functional.label_columns(ids, weight), "y": torch.randint(columns, (batch,), **make),
            "g": torch.ones((), device=device),
        }  # fmt: skip

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.label_head(i["hidden"], i["columns"], target=i["y"]),
        "full head": lambda i: F.cross_entropy(wide(F.linear(i["hidden"], i["weight"])[:, i["ids"]]), i["y"]),
        "eager": lambda i: F.cross_entropy(wide(F.linear(i["hidden"], i["weight"][i["ids"]])), i["y"]),
    }
    size = dtype.itemsize
    return loss_case(
        "label head + cross-entropy", f"B={batch} V={vocabulary} d={width} K={columns}", inputs, forms,
        forms["eager"], dtype,
        (batch + columns) * width * size, batch * width * size, ("eager",), wrt="hidden", flops=2 * batch * width * columns,
    )  # fmt: skip


def counted(samples: int, sources: int, targets: int, dtype: torch.dtype, k: int | None = None) -> Case:
    """How often source s was predicted for target t, over an epoch; with k, by the k largest probabilities (BLM+)."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        return {
            "logits": torch.randn((samples, sources), **make).to(dtype),
            "target": torch.randint(targets, (samples,), **make),
        }

    def ours(i: Inputs) -> Tensor:
        counts = torch.zeros((sources, targets), dtype=torch.int64, device=i["logits"].device)
        functional.count_labels_(counts, i["logits"], i["target"], k=k)
        return counts if k is None else counts / functional.COUNT_UNIT

    def kept(i: Inputs) -> Tensor:
        values, at = i["logits"].softmax(1).topk(k or 1, 1)
        return torch.zeros_like(i["logits"]).scatter_(1, at, values)

    def loops(i: Inputs) -> Tensor:
        if k is not None:
            rows = kept(i)
            return torch.stack([rows[i["target"] == t].sum(0) for t in range(targets)], 1)
        hot = F.one_hot(i["logits"].argmax(1), sources)
        return torch.stack([hot[i["target"] == t].sum(0) for t in range(targets)], 1)

    def bincount(i: Inputs) -> Tensor:
        if k is not None:
            values, at = i["logits"].softmax(1).topk(k, 1)
            cells = at * targets + i["target"][:, None]
            counts = torch.zeros(sources * targets, device=at.device, dtype=values.dtype)
            return counts.index_add_(0, cells.flatten(), values.flatten()).view(sources, targets)
        cells = i["logits"].argmax(1) * targets + i["target"]
        return torch.bincount(cells, minlength=sources * targets).view(sources, targets)

    return Case(
        family="mapping", name="count" if k is None else "count top-k", tolerance=0 if k is None else 1e-4,
        shape=f"N={samples} S={sources} T={targets}", mode="forward", dtype=dtype,
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
    """What `python -m benchmarks --family mapping` runs: goals C4, C6, C7, C8; on a GPU 13 to 16 and larger shapes too."""
    gpu = device.type == "cuda"
    sizes = [(256, 1000, 10), (256, 1000, 100), (32, 1000, 10), (4096, 1000, 100), (256, 32157, 397)]
    made = [case for size in sizes + [(65536, 1000, 10)] * gpu for case in mapped_loss(*size, dtype)]
    groups = [(32, 1000, 10, 10), (32, 1000, 10, 100), (256, 1000, 100, 10), (256, 8100, 100, 3), (64, 32157, 397, 81)]
    groups += [(4096, 1000, 10, 100), (32, 1000, 10, 0), (256, 8100, 100, 0), *[(65536, 1000, 10, 100)] * gpu]
    made += [case for size in groups for case in many_to_one(*size, "mean", dtype)]
    for reduce, size in (
        ("probabilities", (256, 1000, 10, 6)), ("max", (32, 1000, 10, 10)), ("max", (256, 8100, 100, 20)),
        ("top-3 mean", (64, 940, 47, 20)), ("top-3 mean", (64, 7940, 397, 20)),
    ):  # fmt: skip
        made += many_to_one(*size, reduce, dtype)
    made += [case for size in ((32, 1000, 10), (256, 1000, 100), (256, 8100, 100)) for case in by_matrix(*size, dtype)]
    made += label_head(64, 50257, 1024, 32, dtype)
    if gpu:
        for head in ((64, 128256, 4096, 32), (16384, 128256, 4096, 32), (16384, 128256, 4096, 1000)):
            made += label_head(*head, dtype)
    made += [counted(50_000, 1000, 10, dtype), counted(15_880, 8100, 397, dtype, k=3)]
    if dtype == torch.float32 or gpu:
        made += [matched(50_000, 8100, 100), matched(16_000, 32157, 397)]
    return made


# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "map + cross-entropy": lambda dtype, B=256, S=1000, T=10: mapped_loss(B, S, T, dtype),
    "many-to-one mean": lambda dtype, B=256, S=1000, T=10, m=10: many_to_one(B, S, T, m, "mean", dtype),
    "many-to-one max": lambda dtype, B=256, S=1000, T=10, m=10: many_to_one(B, S, T, m, "max", dtype),
    "many-to-one probabilities": lambda dtype, B=256, S=1000, T=10, m=10: many_to_one(B, S, T, m, "probabilities", dtype),
    "matrix + cross-entropy": lambda dtype, B=256, S=1000, T=10: by_matrix(B, S, T, dtype),
    "label head + cross-entropy": lambda dtype, B=64, V=50_257, d=1024, K=32: label_head(B, V, d, K, dtype),
    "count": lambda dtype, N=50_000, S=1000, T=10: [counted(N, S, T, dtype)],
    "count top-k": lambda dtype, N=15_880, S=8100, T=397, k=3: [counted(N, S, T, dtype, k=k)],
    "match": lambda dtype, N=50_000, S=8100, T=100: [matched(N, S, T)],
}


def host_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The calls that a training loop makes, on inputs so small that only the host's work counts."""
    labels = functional.segments([[t, t + 10] for t in range(10)], 20).to(device)
    logits, y = torch.randn(8, 20, device=device).requires_grad_(), torch.arange(8, device=device)
    plain, index = logits.detach(), labels.members[:10]
    columns = functional.label_columns(torch.arange(4, device=device), torch.randn(30, 20, device=device))
    counts = torch.zeros((20, 10), dtype=torch.int64, device=device)

    def step(form: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(functional.mapped_cross_entropy(logits, form, y), logits)

    return {
        "map_labels, index": lambda: functional.map_labels(plain, index),
        "map_labels, segments": lambda: functional.map_labels(plain, labels),
        "mapped_cross_entropy, index": lambda: functional.mapped_cross_entropy(plain, index, y),
        "mapped_cross_entropy+backward, index": step(index),
        "mapped_cross_entropy+backward, segments": step(labels),
        "label_head": lambda: functional.label_head(plain, columns, target=y % 4),
        "count_labels_": lambda: functional.count_labels_(counts, plain, y),
    }
