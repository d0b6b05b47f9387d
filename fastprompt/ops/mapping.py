"""Operators of the mapping family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own gather does, and NumPy counts; with impl="triton"
the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastprompt import _runtime
from fastprompt.ops.mapping_counts import count_on_host
from fastprompt.ops.mapping_cpu import NO_SECOND, version_of
from fastprompt.reference.mapping import Labels, Segments
from fastprompt.tuning.mapping import Tile, pick, pick_segments

if _runtime.HAS_TRITON:
    from fastprompt.kernels.mapping import backward as kernel_backward
    from fastprompt.kernels.mapping import count as kernel_count
    from fastprompt.kernels.mapping import forward as kernel_forward
    from fastprompt.kernels.mapping import segments as kernel_segments
    from fastprompt.kernels.mapping import segments_backward as kernel_segments_backward

_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("map_labels(Tensor logits, Tensor index, bool differentiable) -> (Tensor, Tensor)")
_library.define("map_labels_gradient(Tensor g, Tensor index, Tensor readers, SymInt sources) -> Tensor")
_library.define("count_labels_(Tensor(a!) counts, Tensor logits, Tensor target, int? k, str impl) -> ()")
_FLAGS = (
    "int[] sizes, str reduce, int? k, bool probabilities, bool loss, str reduction, bool renormalize, float smoothing, "
    "float focal, int ignore_index"
)
_library.define(
    "map_segments(Tensor scores, Tensor[] map, Tensor? weights, Tensor? map_id, Tensor? prior, Tensor? target, "
    f"Tensor? weight, bool differentiable, {_FLAGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "map_segments_gradient(Tensor g, Tensor scores, Tensor[] map, Tensor? weights, Tensor? map_id, Tensor? prior, "
    f"Tensor? target, Tensor[] saved, {_FLAGS}) -> Tensor"
)

# ---- Triton ----


def _forward_triton(logits: Tensor, index: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    readers = _empty_readers(logits, differentiable)
    launch = pick("forward", index.shape[0], _runtime.arch(logits.device))
    return kernel_forward.map_labels(logits, index.contiguous(), readers, launch), readers


def _gradient_triton(g: Tensor, index: Tensor, readers: Tensor, sources: int) -> Tensor:
    launch = pick("gradient", sources, _runtime.arch(g.device))
    return kernel_backward.map_labels_gradient(g, index.contiguous(), readers, sources, launch)


def _count_triton(counts: Tensor, logits: Tensor, target: Tensor, k: int | None, impl: str) -> None:
    launch = pick("count" if k is None else "count largest", logits.shape[1], _runtime.arch(logits.device))
    kernel_count.count_labels_(counts, logits, target, launch, k)


class Flags(NamedTuple):
    """What a launch over segments is told, in the order of the schemas."""

    sizes: tuple[int, ...]  # of `Segments`, from num_source to busiest; () for an index or identity
    reduce: str
    k: int | None
    probabilities: bool
    loss: bool = False
    reduction: str = "none"
    renormalize: bool = True
    smoothing: float = 0.0
    focal: float = 0.0
    ignore_index: int = -100


_inverted = WeakIdKeyDictionary()  # index -> (sources, version, segments)


def _segments_of(parts: list[Tensor], weights: Tensor | None, sizes: tuple[int, ...], scores: Tensor) -> Segments:
    """`Segments` from its tensors, from an index (found again as long as it does not change) or from nothing: identity."""
    if not parts:
        return _identity(scores.shape[1], scores.device)
    if len(parts) > 1:
        return Segments(*parts, weights, *sizes)  # type: ignore[arg-type, call-arg]
    index = parts[0]
    state = (scores.shape[1], version_of(index))
    known = _inverted.get(index)
    if known is not None and known[0] == state:
        return known[1]
    made = _invert(index, scores.shape[1])
    if not (index.is_cuda and torch.cuda.is_current_stream_capturing()):  # else it is the graph's, and empty until a replay
        _inverted[index] = (state, made)
    return made


def _invert(index: Tensor, sources: int) -> Segments:
    """An index [T] or [N, T] as segments, without a sync: readers that no source has are left out, out of range is kept."""
    maps, classes = (1, *index.shape)[-2:]
    members = index.reshape(-1)
    count = torch.arange(max(maps * max(sources, classes), 1) + 1, device=index.device)
    row = count[: maps * classes] // max(classes, 1)
    key = torch.where((members >= 0) & (members < sources), row * sources + members, maps * sources)
    key, order = key.sort(stable=True)
    readers = torch.searchsorted(key, count[: maps * sources + 1])
    owner = count[: maps * classes] % max(classes, 1)
    return Segments(members, count[: maps * classes + 1], order, readers, owner, None, sources, classes, maps, 1, min(classes, 2))


@lru_cache(maxsize=64)
def _identity(classes: int, device: torch.device) -> Segments:
    # From the host, which waits for the copies: kept for all streams, and a graph that is captured cannot make it its own.
    return _invert(torch.arange(classes), classes).to(device)


def _segments_triton(scores, parts, weights, map_id, prior, target, weight, differentiable, *flags):  # type: ignore[no-untyped-def]
    f = Flags(*flags)
    seg = _segments_of(parts, weights, f.sizes, scores)
    launch = _pick_segments("forward", scores, seg.num_classes, seg.longest, f)
    return kernel_segments.reduce_segments(
        scores, seg, map_id, prior, target, weight, differentiable=differentiable, launch=launch, **_kernel_flags(f)
    )


def _segments_gradient_triton(g, scores, parts, weights, map_id, prior, target, saved, *flags):  # type: ignore[no-untyped-def]
    f = Flags(*flags)
    seg = _segments_of(parts, weights, f.sizes, scores)
    launch = _pick_segments("gradient", scores, seg.num_classes, seg.longest, f)
    given = _kernel_flags(f)
    for name in ("reduction", "smoothing", "focal"):
        given.pop(name)
    return kernel_segments_backward.reduce_segments_gradient(
        g, scores, seg, map_id, prior, target, *saved, launch=launch, **given
    )


def _kernel_flags(f: Flags) -> dict[str, Any]:
    return {name: value for name, value in f._asdict().items() if name != "sizes"}


def _pick_segments(kernel: str, scores: Tensor, classes: int, longest: int, f: Flags, batch: int | None = None) -> Tile:
    return pick_segments(
        kernel, batch=scores.shape[0] if batch is None else batch, sources=scores.shape[1], classes=classes,
        longest=1 if f.reduce == "first" else longest, probabilities=f.probabilities, loss=f.loss,
        arch=_runtime.arch(scores.device),
    )  # fmt: skip


# ---- CPU ----


def _count_cpu(counts: Tensor, logits: Tensor, target: Tensor, k: int | None, impl: str) -> None:
    if impl == "triton":
        _count_triton(counts, logits, target, k, impl)
    elif len(logits):
        count_on_host(counts, logits, target, k)


# ---- Registration ----


def _empty_readers(logits: Tensor, differentiable: bool) -> Tensor:
    """Room for the inverted map, where there will be a backward."""
    return torch.empty((2, logits.shape[1] if differentiable else 0), dtype=torch.int32, device=logits.device)


def _forward_fake(logits: Tensor, index: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty((logits.shape[0], index.shape[0])), _empty_readers(logits, differentiable)


def _gradient_fake(g: Tensor, index: Tensor, readers: Tensor, sources: int) -> Tensor:
    return g.new_empty((g.shape[0], sources))


def _count_fake(counts: Tensor, logits: Tensor, target: Tensor, k: int | None, impl: str) -> None:
    return None


def _segments_fake(scores, parts, weights, map_id, prior, target, weight, differentiable, *flags):  # type: ignore[no-untyped-def]
    f = Flags(*flags)
    classes, longest = (f.sizes[1], f.sizes[3]) if f.sizes else ((parts[0] if parts else scores).shape[-1], 1)
    reduce = "sum" if longest == 1 and f.reduce != "weighted" else f.reduce
    alone = classes <= _pick_segments("forward", scores, int(classes), longest, f, batch=1).CLASSES
    needs_z = differentiable and (reduce == "logsumexp" or (f.probabilities and reduce not in ("first", "max")))
    value_dtype = torch.float32 if f.probabilities else scores.dtype
    batch = scores.shape[0]

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scores.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        empty(not f.loss, batch, classes, dtype=value_dtype),
        empty(f.loss, *((batch,) if f.reduction == "none" else ())),
        empty(f.loss and f.reduction == "mean"),
        empty(differentiable and f.probabilities, batch, 2),
        empty((f.loss and (needs_z or not alone)) or (needs_z and value_dtype != torch.float32), batch, classes),
        empty(differentiable and reduce in ("max", "top-k mean"), batch, classes, dtype=torch.int32),
        empty(differentiable and f.loss, batch, classes),
    )


def _segments_gradient_fake(g, scores, *rest):  # type: ignore[no-untyped-def]
    return scores.new_empty(scores.shape)


for _name, _triton, _cpu, _fake in (
    ("map_labels", _forward_triton, _forward_triton, _forward_fake),
    ("map_labels_gradient", _gradient_triton, _gradient_triton, _gradient_fake),
    ("map_segments", _segments_triton, _segments_triton, _segments_fake),
    ("map_segments_gradient", _segments_gradient_triton, _segments_gradient_triton, _segments_gradient_fake),
    ("count_labels_", _count_triton, _count_cpu, _count_fake),
):
    _library.impl(_name, _runtime.on_its_device(_triton), "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _fake, lib=_library)

_forward = torch.ops.fastprompt.map_labels.default
_gradient = torch.ops.fastprompt.map_labels_gradient.default
_segments = torch.ops.fastprompt.map_segments.default
_segments_gradient = torch.ops.fastprompt.map_segments_gradient.default
count_labels_ = torch.ops.fastprompt.count_labels_.default


class MapLabels(torch.autograd.Function):
    """`map_labels` by the kernels, with a gradient for the logits."""

    @staticmethod
    def forward(ctx, logits, index, differentiable):  # type: ignore[no-untyped-def]
        out, readers = _forward(logits, index, differentiable)
        ctx.save_for_backward(index, readers)
        ctx.sources = logits.shape[1]
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND.format("map_labels"))
        index, readers = ctx.saved_tensors
        return _gradient(g, index, readers, ctx.sources), None, None


class ReduceSegments(torch.autograd.Function):
    """A map, or its loss, by the kernels over segments, with a gradient for the scores."""

    @staticmethod
    def forward(ctx, scores, differentiable, weights, map_id, prior, target, weight, flags, *parts):  # type: ignore[no-untyped-def]
        out, losses, *saved = _segments(scores, list(parts), weights, map_id, prior, target, weight, differentiable, *flags)
        if differentiable:
            ctx.save_for_backward(scores, weights, map_id, prior, target, out, *saved, *parts)
            ctx.flags = flags
        return losses if flags.loss else out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND.format("mapped_cross_entropy" if ctx.flags.loss else "map_labels"))
        scores, weights, map_id, prior, target, *rest = ctx.saved_tensors
        d = _segments_gradient(g, scores, rest[6:], weights, map_id, prior, target, rest[:6], *ctx.flags)
        return d, *[None] * (7 + len(rest[6:]))


def by_kernels(
    scores: Tensor, labels: Labels | None, map_id: Tensor | None, prior: Tensor | None, flags: Flags,
    target: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A map, or its loss, in the kernels: identity, an index or `Segments` with weights that are constant."""
    weights, parts = None, () if labels is None else (labels,)
    if isinstance(labels, Segments):
        weights = labels.weights if flags.reduce == "weighted" else None
        parts, flags = labels[:5], flags._replace(sizes=labels[6:])  # type: ignore[assignment]
    differentiable = scores.requires_grad and torch.is_grad_enabled()
    return ReduceSegments.apply(scores, differentiable, weights, map_id, prior, target, weight, flags, *parts)


# ---- The whole vocabulary, in chunks ----

_CHUNK = 1 << 22  # scores held at a time: 16 MB


class LogPartition(torch.autograd.Function):
    """log(sum over v of exp(hidden @ weight[v] + bias[v])), [R]; the backward computes every chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):  # type: ignore[no-untyped-def]
        out = None
        for _, scores in _chunks(hidden, weight, bias):
            part = scores.logsumexp(1)
            out = part if out is None else torch.logaddexp(out, part)
        ctx.save_for_backward(hidden, weight, bias, out)
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.label_head has no second derivative here: call backward without create_graph=True"
            )
        hidden, weight, bias, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need[0] else None
        d_weight = torch.empty_like(weight) if need[1] else None
        d_bias = torch.empty_like(bias) if need[2] else None
        for part, scores in _chunks(hidden, weight, bias):
            share = (scores - lse[:, None]).exp_().mul_(g[:, None])
            if d_bias is not None:
                d_bias[part] = share.sum(0)
            share = share.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += share @ weight[part]
            if d_weight is not None:
                d_weight[part] = share.T @ hidden
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The head's scores in float32 (float64), some columns at a time."""
    step = max(256, _CHUNK // max(len(hidden), 1))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        yield part, torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part]).to(wide)


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.log_partition` without a tensor of the size of rows times vocabulary."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return LogPartition.apply(hidden, weight, bias)
