"""From source classes to target classes.

A label map has one of three forms, each for one map or, with a `map_id` for every sample, for N:

    identity     None                             class t reads source t
    one-to-one   index int64 [T] or [N, T]        class t reads source index[t]
    segmented    `Segments`, see `segments`       class t reads a list of sources and reduces them
    matrix       float [S, T] or [N, S, T]        class t reads a weighted sum of all sources

`fastprompt.functional.mapping_counts` makes maps, `fastprompt.functional.mapping_heads` applies them within a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.functional.checks import bad, check_labels, check_range, one_of, path_of, same_device, tell
from fastprompt.ops import mapping as ops
from fastprompt.ops import mapping_cpu as cpu
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import Labels, Segments

__all__ = ["Labels", "Segments"]

REDUCTIONS = ("mean", "sum", "max", "first", "logsumexp", "weighted", "top-k mean")
_REFUSED = (IndexError, RuntimeError, TypeError, ValueError, AttributeError)


# ---- Segments ----


def segments(
    classes: Sequence[Sequence[int]] | Tensor | tuple[Tensor, Tensor], num_source: int, *,
    weights: Sequence[Sequence[float]] | Tensor | None = None,
) -> Segments:  # fmt: skip
    """A map in which every class reads a list of sources, checked once, on the host; `.to(device)` moves it.

    Args:
        classes: the sources of every class: a list of lists, an int64 tensor [T, m], or (members [M], starts [T + 1]), where
            class t reads members[starts[t] : starts[t + 1]]. No list is empty or names a source twice; two classes may
            read the same source.
        num_source: S; sources are 0 to S - 1.
        weights: one a source that is read, in the shape of `classes` (or a tensor [M]), for reduce="weighted". A tensor that
            requires a gradient gets one.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    if num_source < 1:
        raise bad("num_source", "at least 1", num_source)
    members: Tensor
    starts: Tensor
    if isinstance(classes, Tensor):
        if classes.dim() != 2:
            raise bad("classes", "[T, m]", list(classes.shape))
        members = classes.reshape(-1)
        starts = torch.arange(len(classes) + 1, device=classes.device) * classes.shape[1]
    elif isinstance(classes, tuple) and len(classes) == 2 and all(isinstance(part, Tensor) for part in classes):
        members, starts = classes  # type: ignore[assignment]
    else:
        rows: list[list[int]] = [list(row) for row in classes]  # type: ignore[arg-type]
        members = torch.tensor([source for row in rows for source in row] or [], dtype=torch.int64)
        starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    for name, part in (("members", members), ("starts", starts)):
        if part.dtype != torch.int64:
            raise TypeError(f"classes: expected int64 {name}, got {part.dtype}")
        if part.dim() != 1 or part.device != members.device:
            raise bad("classes", f"{name} [n], on one device", f"{list(part.shape)} on {part.device}")
    if not len(starts) or starts[0] != 0 or starts[-1] != len(members):
        raise bad(
            "classes", f"starts from 0 to {len(members)}, the number of members", starts[[0, -1]].tolist() if len(starts) else []
        )
    sizes = starts.diff()
    if len(sizes) and int(sizes.min()) < 1:
        raise bad("classes", "at least one source for every class", f"none for class {int(sizes.argmin())}")
    if len(members):
        low, high = torch.stack(torch.aminmax(members)).tolist()
        if low < 0 or high >= num_source:
            wrong = members[(members < 0) | (members >= num_source)]
            raise bad("classes", f"sources from 0 to {num_source - 1}", wrong[:8].tolist())
        row = torch.repeat_interleave(torch.arange(len(sizes), device=members.device), sizes)
        cells = (row * num_source + members).sort().values
        twice = cells[1:][cells.diff() == 0]
        if len(twice):
            t, s = divmod(int(twice[0]), num_source)
            raise bad("classes", "no source twice in a class", f"source {s} twice in class {t}")
    if weights is not None:
        weights = _flat_weights(weights, sizes)
        if not weights.is_floating_point():
            raise TypeError(f"weights: expected a floating point dtype, got {weights.dtype}")
        same_device(members, weights=weights)
    return reference.segments(members.contiguous(), starts.contiguous(), num_source, 1, weights)


def _flat_weights(weights: Any, sizes: Tensor) -> Tensor:
    if isinstance(weights, Tensor):
        flat = weights.reshape(-1)
    else:
        rows = [[float(w) for w in row] for row in weights]
        if [len(row) for row in rows] != sizes.tolist():
            raise bad("weights", f"the lengths of the classes, {sizes.tolist()[:8]}", [len(row) for row in rows][:8])
        flat = torch.tensor([w for row in rows for w in row], device=sizes.device)
    if len(flat) != int(sizes.sum()):
        raise bad("weights", f"{int(sizes.sum())} values, one a source that is read", len(flat))
    return flat


def stack_maps(maps: Sequence[Labels]) -> Labels:
    """N maps of one form and one shape as one map, to be chosen from by a `map_id` for every sample."""
    if not maps:
        raise bad("maps", "at least one map", "none")
    tensors = [m for m in maps if isinstance(m, Tensor)]
    parts = [m for m in maps if isinstance(m, Segments)]
    if tensors:
        shapes = {(tuple(m.shape), m.dtype) for m in tensors}
        if parts or len(shapes) > 1:
            raise bad("maps", "maps of one form, shape and dtype", sorted(map(str, shapes)) + ["Segments"] * len(parts))
        return torch.stack(tensors)
    sizes = {(m.num_source, m.num_classes, m.weights is None) for m in parts}
    if len(sizes) > 1 or any(m.num_maps != 1 for m in parts):
        raise bad("maps", "single maps with the same sources and classes, all or none with weights", [m[:2] for m in sizes])
    first = parts[0]
    offset, starts = 0, [first.starts[:1]]
    for part in parts:
        starts.append(part.starts[1:] + offset)
        offset += len(part.members)
    weights = None if first.weights is None else torch.cat([m.weights for m in parts if m.weights is not None])
    members = torch.cat([m.members for m in parts])
    return reference.segments(members, torch.cat(starts), first.num_source, len(parts), weights)


# ---- Applying ----


def map_labels(
    scores: Tensor, labels: Labels | None, *, reduce: str | None = None, map_id: Tensor | None = None, of: str = "logits",
    k: int | None = None, prior: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Target scores from source scores: out[b, t] = reduce over the sources s of class t of v[b, s].

        of="logits"         v = scores - prior                      out in the dtype of the scores
        of="probabilities"  v = softmax(scores) / prior             out = log(reduce v), in float32 (float64)

    One-to-one: Chen et al. 2023 (ILM-VP, arXiv 2211.11635). Several sources a class: Tsai et al. 2020 (BAR, arXiv
    2007.08714), Tsao et al. 2024 (AutoVP, arXiv 2310.08381). Matrix: Cai et al. 2024 (BLM, arXiv 2410.24018). Top-k of a
    class's attributes: Cai et al. 2025 (AttrVR, arXiv 2501.13982). Prior: Zhao et al. 2021 (arXiv 2102.09690). A source
    that several classes read is allowed: its gradient is their sum, in a fixed order.

    Args:
        scores: [B, S], floating point, any strides. NaN in, NaN out.
        labels: None, int64 [T] or [N, T], `Segments`, or a floating point matrix [S, T] or [N, S, T]. A matrix and the weights of
            `Segments` get a gradient if they require one. On a GPU an index out of range makes its column NaN and has no
            gradient (FASTPROMPT_CHECK=1 raises instead).
        reduce: of `Segments`: "mean" (default), "sum", "max" (the first of equals has the gradient), "first",
            "logsumexp" (of logits only), "weighted" (sum of weights * v; weights not negative for probabilities) or
            "top-k mean" (of the k largest of the class, of all where it has fewer).
        map_id: int64 [B], which of the N maps a sample uses. On a GPU the row of a value out of range is NaN.
        of: what the map reads. Probabilities never round to 0: their sums are log-sum-exps. A class without any mass is
            -inf. With a matrix, mass below e^-700 of the sample's largest probability is none.
        k: of reduce="top-k mean".
        prior: [S], floating point, constant: subtracted from logits (give log p there), or divides probabilities (positive).
        impl: see the module `fastprompt.functional`.

    Returns:
        [B, T], with and without autocast. Computed in float32 (float64 for float64); a one-to-one map of logits without a
        prior only moves values. The gradient is dense and the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came.
        RuntimeError: a second derivative of the kernels is asked for (impl="torch" has one).
    """
    if map_id is prior is None and impl == "auto":
        try:
            if (out := cpu.quick(scores, labels, reduce, of, k)) is not None:
                if _runtime.watch is not None:
                    _tell("map_labels", impl, "cpu", scores, labels)
                return out
        except _REFUSED:
            pass  # what follows says why
    if map_id is prior is None and type(labels) is Tensor and of == "logits" and labels.dtype == torch.int64:
        return _gather(scores, labels, reduce, k, impl)
    reduce, path = check_map(scores, labels, reduce, map_id, of, k, prior, impl)
    if _runtime.watch is not None:
        _tell("map_labels", impl, path, scores, labels, reduce)
    if path == "cpu":
        try:
            out = cpu.map_cpu(scores, labels, reduce, map_id, of, k, prior)
        except (IndexError, RuntimeError):
            _explain(scores, labels)
            raise
        return out if of == "probabilities" else out.to(scores.dtype)
    if path != "torch" and _has_kernel(labels, reduce):
        return ops.by_kernels(scores, labels, map_id, prior, ops.Flags((), reduce, k, of == "probabilities"))
    return reference.map_labels(scores, labels, reduce=reduce, map_id=map_id, of=of, k=k, prior=prior)


def _gather(logits: Tensor, index: Tensor, reduce: str | None, k: int | None, impl: str) -> Tensor:
    """The one-to-one map of logits: one launch forward, one backward."""
    check_scores(logits)
    check_reduce(index, reduce, "logits", k)
    check_labels("labels", index, None)
    same_device(logits, labels=index)
    path = path_of(impl, logits)
    if _runtime.watch is not None:
        _tell("map_labels", impl, path, logits, index)
    if path == "auto" and logits.device.type == "cpu":
        try:
            return logits.index_select(1, index)  # the best there is on a CPU, backward too
        except (IndexError, RuntimeError):  # it looks at the index itself, without saying which argument is wrong
            check_range("labels", index, logits.shape[1])
            raise
    check_range("labels", index, logits.shape[1])
    if path == "torch":
        return reference.map_labels(logits, index)
    return ops.MapLabels.apply(logits, index, logits.requires_grad and torch.is_grad_enabled())


def mapped_cross_entropy(
    scores: Tensor, labels: Labels | None, target: Tensor, *, reduce: str | None = None, map_id: Tensor | None = None,
    of: str = "logits", k: int | None = None, prior: Tensor | None = None, renormalize: bool = True,
    weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100, focal: float = 0.0,
    reduction: str = "mean", impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The cross-entropy of `map_labels(scores, labels, ...)`, with the mapped scores in float32 and never rounded.

        p = softmax(mapped)
        loss[b] = ((1 - label_smoothing) w[y] (-log p[y]) + label_smoothing / T  sum_c w[c] (-log p[c])) (1 - p[y])^focal

    weight, label_smoothing, ignore_index and reduction are those of torch.nn.functional.cross_entropy: "mean" divides by
    the sum of w[y] over the samples that are not ignored (all ignored: NaN; reduction="sum": 0). Focal loss: Lin et al. 2017
    (arXiv 1708.02002), as in BAR (Tsai et al. 2020, arXiv 2007.08714).

    Args:
        scores, labels, reduce, map_id, of, k, prior: see `map_labels`.
        target: int64 [B], 0 to T - 1 or ignore_index. On a GPU a sample with another value has the loss and the gradient NaN.
        renormalize: of="probabilities" only. True divides a class's probability by the sum over the classes (Yang et al.
            2021, Voice2Series, arXiv 2106.09296); False takes it as it is (BAR).
        weight: float [T], constant.
        focal: 0 or more.

    Returns:
        float32 (float64 for float64 scores): a scalar, or [B] with reduction="none". Gradients: as in `map_labels`.

    Raises:
        ValueError, TypeError: what was expected and what came.
        RuntimeError: a second derivative of the fused paths is asked for (impl="torch" has one).
    """
    fast = map_id is prior is weight is None and impl == "auto" and renormalize and not focal and 0 <= label_smoothing <= 1
    if fast and reduction in cpu.REDUCTIONS:
        try:
            if target.dtype is torch.int64 and (out := cpu.quick(scores, labels, reduce, of, k, True)) is not None:
                if _runtime.watch is not None:
                    _tell("mapped_cross_entropy", impl, "cpu", scores, labels)
                return cpu.cross_entropy(out, target, None, cpu.REDUCTIONS[reduction], ignore_index, label_smoothing)
        except _REFUSED:
            pass  # what follows says why
    reduce, path = check_map(scores, labels, reduce, map_id, of, k, prior, impl)
    if _runtime.watch is not None:
        _tell("mapped_cross_entropy", impl, path, scores, labels, reduce)
    renormalize = renormalize or of == "logits"
    check_loss(scores, _classes(scores, labels), target, weight, label_smoothing, focal, reduction)
    if path == "cpu":
        if focal or not renormalize:
            check_range("target", target, _classes(scores, labels), ignored=ignore_index)
        try:
            loss = cpu.Loss(target, weight, label_smoothing, ignore_index, focal, reduction, renormalize)
            return cpu.map_cpu(scores, labels, reduce, map_id, of, k, prior, loss)
        except (IndexError, RuntimeError):  # PyTorch looks at the values itself, without saying which argument is wrong
            _explain(scores, labels)
            check_range("target", target, _classes(scores, labels), ignored=ignore_index)
            raise
    check_range("target", target, _classes(scores, labels), ignored=ignore_index)
    if path != "torch":
        flags = ops.Flags(
            (), reduce, k, of == "probabilities", True, reduction, renormalize, label_smoothing, focal, ignore_index
        )
        if not _has_kernel(labels, reduce):  # the map by PyTorch, the loss by the kernels
            scores = reference.map_labels(scores.float(), labels, reduce=reduce, map_id=map_id, of=of, k=k, prior=prior)
            labels, map_id, prior, flags = None, None, None, flags._replace(reduce="first", probabilities=False)
        return ops.by_kernels(scores, labels, map_id, prior, flags, target, weight)
    return reference.mapped_cross_entropy(
        scores, labels, target, reduce=reduce, map_id=map_id, of=of, k=k, prior=prior, renormalize=renormalize,
        weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, focal=focal, reduction=reduction,
    )  # fmt: skip


# ---- Checks ----


def what(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _classes(scores: Tensor, labels: Labels | None) -> int:
    if labels is None:
        return scores.shape[1]
    return labels.num_classes if isinstance(labels, Segments) else labels.shape[-1]


def check_scores(scores: Tensor, name: str = "scores") -> None:
    if not scores.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {scores.dtype}")
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise bad(name, "[B, S] with at least one source class", list(scores.shape))


def check_reduce(labels: Labels | None, reduce: str | None, of: str, k: int | None) -> str:
    if not isinstance(labels, Segments):
        if reduce is not None:
            raise bad("reduce", "None, as the map is not Segments", repr(reduce))
        reduce = "first"
    else:
        reduce = one_of("reduce", reduce or "mean", REDUCTIONS)
    if of != "logits":
        one_of("of", of, ("logits", "probabilities"))
        if reduce == "logsumexp":
            raise bad("reduce", 'a reduction of probabilities ("sum" is what logsumexp is of logits)', repr(reduce))
    if (k is not None) != (reduce == "top-k mean") or (k is not None and k < 1):
        raise bad("k", 'at least 1 with reduce="top-k mean", and only there', k)
    return reduce


def check_map(
    scores: Tensor, labels: Labels | None, reduce: str | None, map_id: Tensor | None, of: str, k: int | None,
    prior: Tensor | None, impl: str,
) -> tuple[str, str]:  # fmt: skip
    """The reduction, and the path. `Segments` were checked when they were made: their values are never looked at again."""
    check_scores(scores)
    reduce = check_reduce(labels, reduce, of, k)
    sources = scores.shape[1]
    if isinstance(labels, Segments):
        maps: int | None = labels.num_maps
        if labels.num_source != sources:
            raise bad("labels", f"a map of {sources} sources, as the scores have", f"one of {labels.num_source}")
        if reduce == "weighted" and labels.weights is None:
            raise bad("labels", 'Segments with weights, for reduce="weighted"', "none")
        same_device(scores, labels=labels.members)
        if maps == 1 and map_id is None:
            maps = None
    elif isinstance(labels, Tensor):
        wide = labels.is_floating_point()
        if not wide and labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64 or a floating point matrix, got {labels.dtype}")
        if labels.dim() - wide not in (1, 2):
            raise bad("labels", "[S, T] or [N, S, T]" if wide else "[T] or [N, T]", list(labels.shape))
        if wide and labels.shape[-2] != sources:
            raise bad("labels", f"a matrix with a row for each of {sources} sources", list(labels.shape))
        same_device(scores, labels=labels)
        maps = labels.shape[0] if labels.dim() - wide == 2 else None
    elif labels is None:
        maps = None
    else:
        raise TypeError(f"labels: expected an int64 index, Segments or a matrix, got {type(labels).__name__}")
    if (maps is None) != (map_id is None):
        raise bad("map_id", "int64 [B], where there are several maps and only there", None if map_id is None else "one")
    if map_id is not None:
        check_labels("map_id", map_id, scores.shape[0])
        same_device(scores, map_id=map_id)
        assert maps is not None
        check_range("map_id", map_id, maps)
    if prior is not None:
        if prior.shape != (sources,) or not prior.is_floating_point():
            raise bad("prior", f"a floating point [{sources}], one a source", what(prior))
        if prior.requires_grad:
            raise bad("prior", "a constant", "one that requires a gradient")
        same_device(scores, prior=prior)
    path = path_of(impl, scores)
    if path == "auto" and scores.is_cpu:
        path = "torch" if torch.compiler.is_compiling() else "cpu"
    if path != "cpu":
        _explain(scores, labels)
    return reduce, path


def _tell(op: str, impl: str, path: str, scores: Tensor, labels: Labels | None, reduce: str | None = None) -> None:
    form, why = "identity", ""
    if isinstance(labels, Segments):
        form = f"segments ({reduce or 'mean'})"
    elif labels is not None:
        form = "a matrix product" if labels.is_floating_point() else "one source a class"
    if path == "auto" and not _has_kernel(labels, reduce or "first"):
        path, why = "torch", "matrix products and trained weights are PyTorch's"
    moved = scores.nbytes + (0 if op == "mapped_cross_entropy" else scores.shape[0] * _classes(scores, labels) * scores.itemsize)
    given = labels if isinstance(labels, Tensor) else None
    tell(op, impl, path, scores, given, how=form, why=why, moved=moved)


def _has_kernel(labels: Labels | None, reduce: str) -> bool:
    """A matrix product, and the gradient of weights, are PyTorch's."""
    if isinstance(labels, Segments):
        return reduce != "weighted" or labels.weights is None or not labels.weights.requires_grad
    return labels is None or not labels.is_floating_point()


def _explain(scores: Tensor, labels: Labels | None) -> None:
    """Raises if an index is out of range, where values are looked at."""
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        check_range("labels", labels.flatten(), scores.shape[1])


def check_loss(
    scores: Tensor, classes: int, target: Tensor, weight: Tensor | None, label_smoothing: float, focal: float, reduction: str
) -> None:  # fmt: skip
    check_labels("target", target, scores.shape[0])
    same_device(scores, target=target, weight=weight)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if not 0 <= label_smoothing <= 1:
        raise bad("label_smoothing", "0 to 1", label_smoothing)
    if not focal >= 0:
        raise bad("focal", "0 or more", focal)
    if weight is not None:
        if weight.shape != (classes,) or not weight.is_floating_point():
            raise bad("weight", f"a floating point [{classes}], one a class", what(weight))
        if weight.requires_grad:
            raise bad("weight", "a constant", "one that requires a gradient")
