"""Applying a label map on a CPU, in float32, and its cross-entropy: a few of PyTorch's operators, each the fastest found.

`quick` has the common calls with the least host cost, `map_cpu` all of them.
"""

from __future__ import annotations

import math
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import _runtime
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import Labels, Segments

aten = torch.ops.aten
cross_entropy: Any = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NO_SECOND = 'fastprompt.functional.{} has no second derivative: call backward without create_graph=True, or use impl="torch"'

# ---- What is looked up: gathers there and back, no scatter where no two classes share a source ----


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
    state = id(starts), seg.num_source, seg.num_classes, seg.num_maps, version_of(members), version_of(starts)
    key = id(members)
    known = _plans.get(key)
    if known is None or known[0]() is not members or known[1] != state:
        held = weakref.ref(members, lambda _: _plans.pop(key, None))
        known = _plans[key] = (held, state, _make_plan(seg))
    return known[2]


def version_of(t: Tensor) -> int:
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


# ---- The calls ----


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


# ---- The common calls ----


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
                out = matrix.mm(read.t()).t() if narrow else F.linear(read, matrix)  # type: ignore[union-attr, arg-type]
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
    count, classes = seg.members.shape[0], seg.num_classes
    ragged = count < classes * seg.longest and classes <= 256 and count * classes <= 1 << 22
    return seg.num_maps == 1 and (ragged or _is_dense(seg))


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


# ---- Segments, forward and backward ----


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
        product = reduce == "mean" and plan.matrix is not None and not _is_dense(seg)  # a matrix of the entries, as x is
        if product and _all_finite(out := F.linear(x, plan.matrix)):  # type: ignore[arg-type]  # not inf * 0
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
            raise RuntimeError(NO_SECOND.format("map_labels" if ctx.loss is None else "mapped_cross_entropy"))
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
