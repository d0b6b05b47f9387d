"""Operators of the mapping family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own gather does, and NumPy counts; with impl="triton"
the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fastprompt import _runtime
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import Labels, Segments
from fastprompt.tuning.mapping import Tile, pick, pick_segments

if _runtime.HAS_TRITON:
    from fastprompt.kernels.mapping import backward as kernel_backward
    from fastprompt.kernels.mapping import count as kernel_count
    from fastprompt.kernels.mapping import forward as kernel_forward
    from fastprompt.kernels.mapping import segments as kernel_segments
    from fastprompt.kernels.mapping import segments_backward as kernel_segments_backward

aten = torch.ops.aten
cross_entropy: Any = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls

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
    state = (scores.shape[1], _version(index))
    known = _inverted.get(index)
    if known is None or known[0] != state:
        known = _inverted[index] = (state, _invert(index, scores.shape[1]))
    return known[1]


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
    return _invert(torch.arange(classes, device=device), classes)


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
        labels, classes = target.numpy(), counts.shape[1]
        known = (labels >= 0) & (labels < classes)
        logits = logits.detach().float()
        amount: Any = 1
        if k is None:
            # NumPy's arg-max has the same rules as PyTorch's and is several times faster on a core.
            cells = (logits.numpy().argmax(1) * classes + labels)[known]
        else:
            rows = max(1, _CACHED // logits.shape[1])
            at, share = (torch.cat(part) for part in zip(*(_shares(x, k) for x in logits.split(rows)), strict=True))
            cells = (at.numpy() * classes + labels[:, None])[known]
            amount = share.numpy()[known]
        np.add.at(counts.view(-1).numpy(), cells, amount)


_CACHED = 1 << 18  # scores that stay in the cache while their softmax and their largest are taken
_FEW_LARGEST = 12  # arg-maxima, each as fast as memory, beat a selection


def _shares(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The places of the k largest of every row, the first of equals, and their softmax in fixed point."""
    p = x.softmax(1)
    if k <= _FEW_LARGEST:
        found, left, rows = np.empty((len(x), k), np.int64), x.numpy().copy(), np.arange(len(x))
        gone = np.empty((len(x), k), bool)
        for j in range(k):
            found[:, j] = left.argmax(1)
            at = rows, found[:, j]
            gone[:, j] = left[at] == -np.inf  # taken before, or a share of 0
            left[at] = -np.inf
        places = torch.from_numpy(found)
        share = p.gather(1, places).masked_fill_(torch.from_numpy(gone), 0.0)
    else:
        values, places = x.topk(k, 1)
        # Rows in which torch.topk had a choice that it does not promise to make in the same way
        tied = np.flatnonzero(np.count_nonzero(x.numpy() >= values[:, -1:].numpy(), axis=1) != k)
        if len(tied):
            places[tied] = x[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        share = p.gather(1, places)
    return places, (share.double() * reference.COUNT_UNIT).nan_to_num_(0.0).round_().long()


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
            raise RuntimeError(_NO_SECOND.format("map_labels"))
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
            raise RuntimeError(_NO_SECOND.format("mapped_cross_entropy" if ctx.flags.loss else "map_labels"))
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


# ---- Segments on a CPU: gathers there and back, no scatter where no two classes share a source ----


class Plan(NamedTuple):
    """What the CPU looks up in a map, made once. With N maps the tensors have a first axis of N, without rounds and entry."""

    table: Tensor  # int64 [T * longest]: the entries' sources; short classes are filled up with their first
    filled: Tensor | None  # bool [T, longest]: where they were; None: all classes have the same size
    first: Tensor  # int64 [T]
    size: Tensor  # float32 [T]
    shortest: int
    rounds: tuple[Tensor, ...]  # int64 [S] each: the class that reads a source first, second, ...; T where there is none
    entry: Tensor | None  # int64 [S], where no source is read twice: the place in the table, T * longest where there is none
    matrix: Tensor | None  # of a map that `_has_matrix`, float32: the mean as a product, [T, S] where it `_is_dense`, or [T, M]


_plans: dict[int, tuple[Any, Any, Plan]] = {}  # id of members -> (weak reference to them, what they were, plan)
_MOST_ROUNDS = 4  # classes that share a source: more of them are added one by one


def plan_of(seg: Segments) -> Plan:
    """The plan of a map, known by its tensors and their version."""
    members, starts = seg.members, seg.starts
    state = id(starts), seg.num_source, seg.num_classes, seg.num_maps, _version(members), _version(starts)
    key = id(members)
    known = _plans.get(key)
    if known is None or known[0]() is not members or known[1] != state:
        held = weakref.ref(members, lambda _: _plans.pop(key, None))
        known = _plans[key] = (held, state, _make_plan(seg))
    return known[2]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@torch.inference_mode(False)
def _make_plan(seg: Segments) -> Plan:
    maps, classes, longest, sources = seg.num_maps, seg.num_classes, seg.longest, seg.num_source
    size = seg.starts.diff().view(maps, classes)
    start = seg.starts[:-1].view(maps, classes, 1)
    filled = torch.arange(longest) >= size[..., None]
    entry = torch.where(filled, start, start + torch.arange(longest))  # [N, T, longest], into the members
    table = seg.members[entry].view(maps, -1)
    shortest = int(size.min())
    if maps > 1:
        return Plan(
            table, filled if shortest < longest else None, seg.members[start[..., 0]], size.float(), shortest, (), None, None
        )
    rounds: list[Tensor] = []
    degree = seg.readers.diff()
    if seg.busiest <= _MOST_ROUNDS:
        ordered = F.pad(seg.owner[seg.order], (0, 1))
        for r in range(seg.busiest):
            rounds.append(torch.where(degree > r, ordered[(seg.readers[:-1] + r).clamp(max=len(ordered) - 1)], classes))
    place = None
    if seg.busiest == 1:
        place = torch.full((sources,), classes * longest)
        place[table[0]] = torch.arange(classes * longest)
        place[seg.members[seg.starts[:-1]]] = torch.arange(classes) * longest  # and not where the class was filled up
    matrix = None
    if _has_matrix(seg):
        matrix = torch.zeros(classes, sources if _is_dense(seg) else len(seg.members))
        matrix[seg.owner, seg.members if _is_dense(seg) else torch.arange(len(seg.members))] = 1 / size[0].float()[seg.owner]
    return Plan(
        table[0], filled[0] if shortest < longest else None, seg.members[seg.starts[:-1]], size[0].float(), shortest,
        tuple(rounds), place, matrix,
    )  # fmt: skip


def _plain(
    values: Tensor, labels: Labels, reduce: str, map_id: Tensor | None, k: int | None, prior: Tensor | None, logarithms: bool
) -> Tensor:  # fmt: skip
    return reference.reduce_values(values if prior is None else values - prior, labels, reduce, map_id, k, logarithms)


class Loss(NamedTuple):
    """The arguments of a cross-entropy."""

    target: Tensor
    weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    focal: float
    reduction: str
    renormalize: bool


def map_cpu(
    scores: Tensor, labels: Labels | None, reduce: str, map_id: Tensor | None, of: str, k: int | None, prior: Tensor | None,
    loss: Loss | None = None,
) -> Tensor:  # fmt: skip
    """`reference.map_labels` of at most 32 bits in float32, or `reference.mapped_cross_entropy`, differentiable."""
    logarithms = of == "probabilities"
    if prior is not None:
        prior = (prior.log() if logarithms else prior).float()
    # A loss that divides by the sum over the classes has no use for the sum over the sources.
    relative = logarithms and loss is not None and loss.renormalize and (labels is None or not _is_matrix(labels))
    if logarithms and not relative:
        scores = scores.float().log_softmax(1)
    if isinstance(labels, Segments):
        if labels.num_maps == 1:
            map_id = None
        if labels.longest == 1 and reduce != "weighted":
            reduce = "first"
        elif k is not None and k >= labels.longest:
            reduce = "mean"
        if reduce != "first":
            return _map_segments_cpu(scores, labels, reduce, map_id, k, prior, logarithms, relative, loss)
        labels = plan_of(labels).first if labels.longest else labels.members
    if labels is None:
        out = scores.float()
    elif labels.is_floating_point():
        out = scores.float()
        if logarithms or map_id is not None or torch.is_autocast_enabled("cpu"):
            out = _plain(out, labels, reduce, map_id, k, prior, logarithms)
        else:
            out = (out if prior is None else out - prior) @ labels.float()
        prior = None
    elif map_id is None:
        out = scores.index_select(1, labels).float()
    else:
        labels = labels[map_id]
        out = scores.gather(1, labels).float()
    if prior is not None:
        out = out - (prior if labels is None else prior[labels])
    return out if loss is None else _cross_entropy_cpu(out + _spoiled(scores) if relative else out, loss)


def _is_matrix(labels: Labels) -> bool:
    return isinstance(labels, Tensor) and labels.is_floating_point()


def _spoiled(scores: Tensor) -> Tensor:
    """0 for every row, NaN for those that have no softmax: [B, 1]."""
    top = scores.detach().amax(1, keepdim=True).float()
    return top - top


_FEW = 1 << 17  # entries of all samples up to which PyTorch's own graph costs less than a Python function's call


def _map_segments_cpu(
    scores: Tensor, seg: Segments, reduce: str, map_id: Tensor | None, k: int | None, prior: Tensor | None,
    logarithms: bool, relative: bool, loss: Loss | None,
) -> Tensor:  # fmt: skip
    learned = reduce == "weighted" and seg.weights is not None and seg.weights.requires_grad
    if learned or not seg.longest or (reduce == "top-k mean" and plan_of(seg).shortest < (k or 0)):
        out = _plain(scores.float(), seg, reduce, map_id, k, prior, logarithms)
        return out if loss is None else _cross_entropy_cpu(out + _spoiled(scores) if relative else out, loss)
    given = (scores, seg, map_id, prior, reduce, k, logarithms, relative)
    graph = scores.requires_grad and torch.is_grad_enabled()
    entries = len(scores) * seg.num_classes * seg.longest
    # Where classes read few of the sources, PyTorch's zeros and additions beat a gather of every source's class.
    sparse = reduce != "max" and (map_id is not None or 2 * len(seg.members) < seg.num_source)
    exponential = reduce == "logsumexp" or (logarithms and reduce != "max")
    if not graph or reduce == "top-k mean" or (not exponential and (entries < _FEW or sparse)):
        out, _ = _forward_cpu(*given, graph)
        return out if loss is None else _cross_entropy_cpu(out, loss)
    if loss is None or not loss.renormalize or loss.focal or loss.label_smoothing:
        out = MapSegments.apply(*given, None)
        return out if loss is None else _cross_entropy_cpu(out, loss)
    return MapSegments.apply(*given, loss)


def quick(
    scores: Tensor, labels: Labels | None, reduce: str | None, of: str, k: int | None, relative: bool = False
) -> Tensor | None:  # fmt: skip
    """The common maps of float32 scores on a CPU by a few of PyTorch's operators; None: `map_cpu` has to do it.

    It looks at what PyTorch would take and should not; what PyTorch refuses is for the caller to explain. `relative`:
    probabilities up to a constant for every row.
    """
    shape = scores.shape
    if scores.dtype is not torch.float32 or not scores.is_cpu or len(shape) != 2 or torch.compiler.is_compiling():
        return None
    if type(labels) is Segments:
        if labels.num_source != shape[1] or labels.num_maps != 1 or not labels.members.is_cpu:
            return None
        return _quick_segments(scores, labels, shape[0], reduce or "mean", of, k, relative)
    if reduce is k is None and of == "logits" and type(labels) is Tensor and shape[1] and labels.is_cpu:
        if labels.dtype is torch.int64:
            return scores.index_select(1, labels) if labels.dim() == 1 else None
        if labels.dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
            if _is_narrow(shape[0], labels.shape[-1]):
                out = labels.t().mm(scores.t()).t()
                return out if relative else out.contiguous()
            return scores.mm(labels)
    return None


def _is_narrow(batch: int, classes: int) -> bool:
    """Whether a product is best made transposed: up to three times as fast where the batch is the longer side."""
    return classes <= 16 <= batch


def _quick_segments(
    scores: Tensor, seg: Segments, batch: int, reduce: str, of: str, k: int | None, relative: bool
) -> Tensor | None:  # fmt: skip
    members, classes, longest = seg.members, seg.num_classes, seg.longest
    count = members.shape[0]
    entries = batch * count
    if not entries or (k is not None) != (reduce == "top-k mean"):
        return None
    graph = scores.requires_grad and torch.is_grad_enabled()
    uniform = count == classes * longest
    many = entries >= _FEW
    if of == "logits" and reduce == "mean" and (graph or many or not uniform) and _has_matrix(seg):
        narrow = many and _is_narrow(batch, classes) and seg.num_source * classes <= (32 if graph else 16) * count
        if narrow or (entries < 4 * _FEW and (graph or not uniform)):
            read, matrix = scores if _is_dense(seg) else scores.index_select(1, members), plan_of(seg).matrix
            if not torch.is_autocast_enabled("cpu"):
                out = matrix.mm(read.t()).t() if narrow else F.linear(read, matrix)  # type: ignore[union-attr]
                if _all_finite(out):  # not inf * 0
                    return out if relative or not narrow else out.contiguous()
    if not uniform:
        return None
    if k is not None:
        return _top_mean(scores.index_select(1, members).view(-1, longest), k, batch) if of == "logits" and k < longest else None
    if graph and many:
        return None
    if of == "logits":
        if reduce not in ("mean", "sum", "max"):
            return None
        read = scores.index_select(1, members)
        if reduce == "max" and not graph:
            return read.view(batch, classes, longest).amax(-1)
        return _uniform(read, classes, longest, reduce)[0]
    if of != "probabilities" or reduce not in ("mean", "sum"):
        return None
    x = (scores if relative else scores.log_softmax(1)).index_select(1, members)
    if not _all_finite(scores if relative else x):
        return None
    if relative:
        x = x - x.detach().amax(1, keepdim=True)
    out = x.view(batch, classes, longest).logsumexp(-1)
    return out if relative or reduce == "sum" else out - math.log(longest)


def _top_mean(x: Tensor, k: int, batch: int) -> Tensor | None:
    """The mean of every row's k largest, by NumPy's partition; None where that leaves a choice, or not all is finite."""
    if k < 1 or not _all_finite(x) or torch.is_autocast_enabled("cpu"):
        return None
    place = x.shape[1] - k
    rest = x.detach() < torch.from_numpy(np.partition(x.detach().numpy(), place, axis=1)[:, place, None])
    if np.count_nonzero(rest.numpy()) != place * len(x):
        return None
    return torch.mv(x.masked_fill(rest, 0), _column(x.shape[1], 1 / k)).view(batch, -1)


def _all_finite(x: Tensor) -> bool:
    return math.isfinite(x.detach().sum().item())


def _is_dense(seg: Segments) -> bool:
    """Whether a product with the scores costs less than to read the entries and to add up their gradients."""
    return seg.num_source * seg.num_classes <= 32 * seg.members.shape[0]


def _has_matrix(seg: Segments) -> bool:
    """Whether a mean is best a product, at least of the entries where classes have many sizes."""
    return seg.num_maps == 1 and (
        _is_dense(seg) or (seg.num_classes <= 256 and seg.members.shape[0] < seg.num_classes * seg.longest)
    )


def _uniform(x: Tensor, classes: int, longest: int, reduce: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The entries [B, T * longest] of classes of one size to [B, T], and what `_backward_cpu` needs."""
    if reduce == "max":
        out, at = x.view(-1, classes, longest).max(-1)
        return out, (at,)
    if torch.is_autocast_enabled("cpu"):
        x = x.view(-1, classes, longest)
        return (x.mean(-1) if reduce == "mean" else x.sum(-1)), ()
    column = _column(longest, 1 / longest if reduce == "mean" else 1.0)
    return torch.mv(x.view(-1, longest), column).view(-1, classes), ()


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept from an evaluation is used in training
def _column(longest: int, value: float) -> Tensor:
    return torch.full((longest,), value)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """x.index_select(1, index)."""
    size = len(x) * len(index) * x.element_size()
    if size < _runtime.LARGE or (x.requires_grad and torch.is_grad_enabled()):
        return x.index_select(1, index)
    return torch.index_select(x, 1, index, out=_runtime.in_huge_pages(x.new_empty(len(x), len(index))))


def _zeros(like: Tensor, count: int) -> Tensor:
    """[B, count]."""
    if len(like) * count * like.element_size() < _runtime.LARGE:
        return like.new_zeros(len(like), count)
    return _runtime.in_huge_pages(like.new_empty(len(like), count)).zero_()


def _forward_cpu(
    scores: Tensor, seg: Segments, map_id: Tensor | None, prior: Tensor | None, reduce: str, k: int | None,
    logarithms: bool, relative: bool, graph: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The mapped scores [B, T] in float32, and what `_backward_cpu` needs.

    `relative`: up to a constant for every row. `graph`: PyTorch differentiates it, unless it is exponential.
    """
    linear = not logarithms and reduce in ("mean", "sum", "weighted")
    batch, classes, longest = len(scores), seg.num_classes, seg.longest
    plain = map_id is prior is None and not relative and len(seg.members) == classes * longest
    if plain and (reduce == "max" or (linear and reduce != "weighted")):
        return _uniform(_columns(scores, seg.members).float(), classes, longest, reduce)
    plan = plan_of(seg)
    ragged = linear and plan.filled is not None and map_id is None and not graph
    read = seg.members if ragged else plan.table if map_id is None else plan.table[map_id]
    x = (_columns(scores, read) if map_id is None else scores.gather(1, read)).float()
    if prior is not None:
        x = x - prior[read]
    if relative:
        x = x - (x.detach().amax(1, keepdim=True) + _spoiled(scores))
    if ragged:
        if reduce == "weighted":
            assert seg.weights is not None
            x = x * seg.weights.float()
        if reduce == "mean" and plan.matrix is not None and len(plan.matrix[0]) == x.shape[1]:
            if _all_finite(out := F.linear(x, plan.matrix)):  # not inf * 0
                return out, ()
        out = torch.from_numpy(np.add.reduceat(x.numpy(), seg.starts[:-1].numpy(), axis=1))
        return (out.div_(plan.size) if reduce == "mean" else out), ()
    x = x.view(batch, classes, longest)
    size = plan.size if map_id is None else plan.size[map_id]
    filled = plan.filled if plan.filled is None or map_id is None else plan.filled[map_id]
    weights = _table_weights(seg, plan, map_id) if reduce == "weighted" else None
    if linear:
        if filled is not None:
            x = x.masked_fill(filled, 0)
        if weights is not None:
            x = x * weights
        if reduce != "mean":
            return x.sum(-1), ()
        return (x.mean(-1) if filled is None else x.sum(-1).div_(size)), ()
    if reduce == "max":  # a class is filled up with its first source, which never beats itself
        out, at = x.max(-1)
        return out, (at,)
    if filled is not None:
        x = x.masked_fill(filled, -torch.inf)
    if reduce == "top-k mean":
        assert k is not None
        x = _largest(x, k, graph)
        return (reference.log_sum_exp(x) - math.log(k) if logarithms else x.mean(-1)), ()
    if weights is not None:
        x = x + weights.log()
    out = x.logsumexp(-1)
    return (out - size.log() if reduce == "mean" else out), (x, out)


def _largest(x: Tensor, k: int, graph: bool) -> Tensor:
    """The k largest along the last axis; the first of equals have the gradient, which torch.topk leaves open."""
    if not graph:
        return x.topk(k, -1).values
    values = x.topk(k + 1, -1).values
    if bool((values[..., k - 1] == values[..., k]).any()):
        values = x.sort(dim=-1, descending=True, stable=True).values
    return values[..., :k]


def _table_weights(seg: Segments, plan: Plan, map_id: Tensor | None) -> Tensor:
    """The entries' weights, 0 where a class was filled up: [T, longest], or [B, T, longest] with map_id."""
    assert seg.weights is not None
    shape = (seg.num_maps, seg.num_classes, 1)
    place = torch.arange(seg.longest)
    size = plan.size.view(shape)
    weights = seg.weights.float()[torch.where(place < size, seg.starts[:-1].view(shape) + place, 0)]
    weights = torch.where(place < size, weights, 0)
    return weights[0] if map_id is None else weights[map_id]


def _backward_cpu(
    g: Tensor, seg: Segments, map_id: Tensor | None, saved: tuple[Tensor, ...], dtype: torch.dtype, reduce: str
) -> Tensor:  # fmt: skip
    """d scores [B, S] in their dtype, summed in float32."""
    plan = plan_of(seg)
    batch, classes, longest = len(g), seg.num_classes, seg.longest
    size = plan.size if map_id is None else plan.size[map_id]
    if saved == ():
        if reduce == "mean":
            g = g / (longest if plan.filled is None else size)
        weighted = reduce == "weighted"
        if map_id is None and plan.rounds:
            g = F.pad(g if len(plan.rounds) > 1 or weighted else g.to(dtype), (0, 1))
            d = _columns(g, plan.rounds[0])
            if weighted:
                d = d * _source_weights(seg, 0)
            for r, reader in enumerate(plan.rounds[1:], 1):
                more = g.index_select(1, reader)
                d = d + (more * _source_weights(seg, r) if weighted else more)
            return d.to(dtype)
        if map_id is None:
            each = g.index_select(1, seg.owner)
            if weighted:
                assert seg.weights is not None
                each = each * seg.weights.float()
            return _zeros(g, seg.num_source).index_add_(1, seg.members, each).to(dtype)
        each = g[..., None].expand(batch, classes, longest)
        if weighted:
            each = each * _table_weights(seg, plan, map_id)
    else:
        if reduce == "max":
            (at,) = saved
            place = at + torch.arange(0, classes * longest, longest)
            read = plan.table[place] if map_id is None else plan.table[map_id].gather(1, place)
            return _zeros(g, seg.num_source).scatter_add_(1, read, g).to(dtype)
        x, out = saved
        out = out.masked_fill(out == -torch.inf, 0)[..., None]
        each = (x - out).exp_().mul_(g[..., None])
    if map_id is None and plan.entry is not None:
        return _columns(F.pad(each.reshape(batch, classes * longest), (0, 1)), plan.entry).to(dtype)
    if plan.filled is not None:
        each = each.masked_fill(plan.filled if map_id is None else plan.filled[map_id], 0)
    d, each = _zeros(g, seg.num_source), each.reshape(batch, classes * longest)
    return (d.index_add_(1, plan.table, each) if map_id is None else d.scatter_add_(1, plan.table[map_id], each)).to(dtype)


def _source_weights(seg: Segments, r: int) -> Tensor:
    """The weight of the r-th entry that reads each source, 0 where there is none: [S]."""
    assert seg.weights is not None
    at = seg.readers[:-1] + r
    ordered = F.pad(seg.weights.float()[seg.order], (0, 1))
    return torch.where(at < seg.readers[1:], ordered[at.clamp(max=len(ordered) - 1)], 0)


class MapSegments(torch.autograd.Function):
    """A segmented map on a CPU, in float32, or its cross-entropy, with a gradient for the scores."""

    @staticmethod
    def forward(ctx, scores, seg, map_id, prior, reduce, k, logarithms, relative, loss):  # type: ignore[no-untyped-def]
        out, saved = _forward_cpu(scores, seg, map_id, prior, reduce, k, logarithms, relative, False)
        ctx.given = seg, scores.dtype, reduce
        ctx.loss = None
        if loss is not None:
            log_p = out.log_softmax(1)
            weight = loss.weight if loss.weight is None else loss.weight.float()
            ctx.loss = weight, REDUCTIONS[loss.reduction], loss.ignore_index
            out, divisor = aten.nll_loss_forward(log_p, loss.target, *ctx.loss)
            saved = (loss.target, divisor, log_p, *saved)
        ctx.save_for_backward(map_id, *saved)
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND.format("map_labels" if ctx.loss is None else "mapped_cross_entropy"))
        seg, *given = ctx.given
        map_id, *saved = ctx.saved_tensors
        if ctx.loss is not None:
            target, divisor, log_p, *saved = saved
            g = aten.nll_loss_backward(g, log_p, target, *ctx.loss, divisor)
            g = aten._log_softmax_backward_data(g, log_p, 1, torch.float32)
        return _backward_cpu(g, seg, map_id, tuple(saved), *given), *[None] * 8


def _cross_entropy_cpu(mapped: Tensor, loss: Loss) -> Tensor:
    """The loss of the mapped scores; PyTorch's own where it has it."""
    if loss.renormalize and not loss.focal:
        weight = loss.weight if loss.weight is None else loss.weight.to(mapped.dtype)
        return F.cross_entropy(mapped, loss.target, weight, None, loss.ignore_index, None, loss.reduction, loss.label_smoothing)
    target, weight, smoothing, ignored, focal, reduction, renormalize = loss
    losses, weights = reference.cross_entropies(
        mapped, target, weight=weight, label_smoothing=smoothing, ignore_index=ignored, focal=focal, renormalize=renormalize
    )
    return reference.total(losses, weights, reduction)


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NO_SECOND = 'fastprompt.functional.{} has no second derivative: call backward without create_graph=True, or use impl="torch"'


# ---- Matching: on the host, once an epoch ----


def match_labels(counts: Tensor) -> Tensor:
    """What `reference.match_labels` gives, bit for bit, from a sort of the cells that matter.

    Striking a row and a column never changes the order of the other cells, so walking once through all cells by falling
    count, then by position, meets the same maxima. First the cells that are not below every class's largest, which are few
    and mostly enough; then the same for the classes still open, with a bound that falls faster. Only those cells leave a GPU.
    """
    sources, targets = counts.shape
    if counts.is_cpu and counts.numel() * targets <= _FEW_CELLS:
        return _match_few(counts.numpy().copy())
    index, free, columns = np.full(targets, -1, dtype=np.int64), np.ones(sources, dtype=bool), np.arange(targets)
    rest, low, turn = counts, 2, 0
    while low > 1 and len(columns):
        top = _largest_of_columns(rest)
        if turn == 0 and (top < 0).any():
            raise ValueError(f"counts: expected no negative numbers, got {int(counts.min())}")
        low = max(1, int(top.min(where=top > 0, initial=top.max())) >> 2 * turn)
        _walk(rest, columns, low, index, free)
        columns = np.flatnonzero(index < 0)
        if counts.is_cpu:
            rest = torch.from_numpy(counts.numpy().take(columns, 1))
        else:
            rest = counts.index_select(1, torch.from_numpy(columns).to(counts.device))
        rest[torch.from_numpy(index[index >= 0]).to(counts.device)] = 0
        turn += 1
    # Only zeros are left: the first one is the lowest free source with the lowest open target.
    index[columns] = np.flatnonzero(free)[: len(columns)]
    return torch.from_numpy(index).to(counts.device)


_FEW_CELLS = 1 << 18  # cells that all maxima together look at


def _match_few(left: np.ndarray) -> Tensor:
    """`reference.match_labels`, where that costs less than to sort."""
    targets = left.shape[1]
    if left.size and (low := left.min()) < 0:
        raise ValueError(f"counts: expected no negative numbers, got {low}")
    index = np.empty(targets, dtype=np.int64)
    for _ in range(targets):
        source, target = divmod(int(left.argmax()), targets)
        index[target], left[source], left[:, target] = source, -1, -1
    return torch.from_numpy(index)


def _largest_of_columns(counts: Tensor) -> np.ndarray:
    """The largest of every column, or a negative number that stands in it."""
    if not counts.is_cpu:
        low, top = torch.stack(counts.aminmax(dim=0)).cpu().numpy()
        return np.where(low < 0, low, top)
    sources, targets = counts.shape
    rows = max(1, 1024 // targets)  # short ones are read several at a time
    whole = sources - sources % rows
    cells = counts.numpy().view(np.uint64)  # read as unsigned numbers, negative ones are the largest
    top = cells[:whole].reshape(-1, rows * targets).max(0, initial=0).reshape(rows, targets).max(0)
    return np.maximum(top, cells[whole:].max(0, initial=0)).view(np.int64)


def _walk(counts: Tensor, columns: np.ndarray, low: int, index: np.ndarray, free: np.ndarray) -> None:
    """Gives free sources to open targets by the cells from `low` on, the largest first; counts [S, columns]."""
    flat = counts.reshape(-1)
    if flat.is_cpu:
        cells = np.flatnonzero(flat.numpy() >= low)  # NumPy's comparison and search are the fastest on a CPU
        values = flat.numpy()[cells]
    else:
        found = (flat >= low).nonzero()[:, 0]
        cells, values = found.cpu().numpy(), flat[found].cpu().numpy()
    fall = values.max(initial=0) - values
    if len(fall) and fall.max() < 1 << 16:
        fall = fall.astype(np.uint16)  # NumPy sorts them by their digits
    cells = cells[np.argsort(fall, kind="stable")]
    start, step, left = 0, 4 * len(columns), len(columns)
    while start < len(cells) and left:
        source, place = np.divmod(cells[start : start + step], len(columns))
        target = columns[place]
        alive = free[source] & (index[target] < 0)
        given: set[int] = set()
        taken: dict[int, int] = {}
        for s, t in zip(source[alive].tolist(), target[alive].tolist(), strict=True):  # the few that are left
            if s not in given and t not in taken:
                given.add(s)
                taken[t] = s
        index[list(taken)], free[list(given)] = list(taken.values()), False
        start, step, left = start + step, 4 * step, left - len(taken)


def match_optimally(counts: Tensor) -> Tensor:
    """The one-to-one map with the largest sum of counts (Hungarian method)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RuntimeError("optimal=True needs SciPy: pip install scipy") from None
    source, target = linear_sum_assignment(counts.cpu().numpy(), maximize=True)
    index = np.empty(counts.shape[1], dtype=np.int64)
    index[target] = source
    return torch.from_numpy(index).to(counts.device)


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
