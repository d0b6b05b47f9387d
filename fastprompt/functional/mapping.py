"""From source classes to target classes.

A label map has one of three forms, each for one map or, with a `map_id` for every sample, for N:

    identity     None                             class t reads source t
    one-to-one   index int64 [T] or [N, T]        class t reads source index[t]
    segmented    `Segments`, see `segments`       class t reads a list of sources and reduces them
    matrix       float [S, T] or [N, S, T]        class t reads a weighted sum of all sources

`match_labels` and `bayesian_matrix` make maps from what `count_labels_` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import _runtime
from fastprompt.functional.checks import bad, check_labels, check_range, looks_at_values, one_of, path_of, same_device, tell
from fastprompt.ops import mapping as ops
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import COUNT_UNIT, Labels, Segments

__all__ = ["COUNT_UNIT", "Labels", "Segments"]

REDUCTIONS = ("mean", "sum", "max", "first", "logsumexp", "weighted", "top-k mean")
_REFUSED = (IndexError, RuntimeError, TypeError, ValueError, AttributeError)
_LINEAR = ("mean", "sum", "weighted", "first")


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
            if (out := ops.quick(scores, labels, reduce, of, k)) is not None:
                if _runtime.watch is not None:
                    _tell("map_labels", impl, "cpu", scores, labels)
                return out
        except _REFUSED:
            pass  # what follows says why
    if map_id is prior is None and type(labels) is Tensor and of == "logits" and labels.dtype == torch.int64:
        return _gather(scores, labels, reduce, k, impl)
    reduce, path = _check_map(scores, labels, reduce, map_id, of, k, prior, impl)
    if _runtime.watch is not None:
        _tell("map_labels", impl, path, scores, labels, reduce)
    if path == "cpu":
        try:
            out = ops.map_cpu(scores, labels, reduce, map_id, of, k, prior)
        except (IndexError, RuntimeError):
            _explain(scores, labels)
            raise
        return out if of == "probabilities" else out.to(scores.dtype)
    if path != "torch" and _has_kernel(labels, reduce):
        return ops.by_kernels(scores, labels, map_id, prior, ops.Flags((), reduce, k, of == "probabilities"))
    return reference.map_labels(scores, labels, reduce=reduce, map_id=map_id, of=of, k=k, prior=prior)


def _gather(logits: Tensor, index: Tensor, reduce: str | None, k: int | None, impl: str) -> Tensor:
    """The one-to-one map of logits: one launch forward, one backward."""
    _check_scores(logits)
    _check_reduce(index, reduce, "logits", k)
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
    if fast and reduction in ops.REDUCTIONS:
        try:
            if target.dtype is torch.int64 and (out := ops.quick(scores, labels, reduce, of, k, True)) is not None:
                if _runtime.watch is not None:
                    _tell("mapped_cross_entropy", impl, "cpu", scores, labels)
                return ops.cross_entropy(out, target, None, ops.REDUCTIONS[reduction], ignore_index, label_smoothing)
        except _REFUSED:
            pass  # what follows says why
    reduce, path = _check_map(scores, labels, reduce, map_id, of, k, prior, impl)
    if _runtime.watch is not None:
        _tell("mapped_cross_entropy", impl, path, scores, labels, reduce)
    renormalize = renormalize or of == "logits"
    _check_loss(scores, _classes(scores, labels), target, weight, label_smoothing, focal, reduction)
    if path == "cpu":
        if focal or not renormalize:
            check_range("target", target, _classes(scores, labels), ignored=ignore_index)
        try:
            loss = ops.Loss(target, weight, label_smoothing, ignore_index, focal, reduction, renormalize)
            return ops.map_cpu(scores, labels, reduce, map_id, of, k, prior, loss)
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


# ---- Heads ----


class LabelColumns(NamedTuple):
    """The columns of a head that a label map reads, gathered once, and the map on them. `label_columns` makes it."""

    weight: Tensor  # [K, d]
    bias: Tensor | None  # [K]
    labels: Labels | tuple[Segments, Segments] | None  # on the K columns; None: column k is class k
    head: tuple[Tensor, Tensor | None]  # the whole head, for full=True


def fold(
    labels: Labels, weight: Tensor, bias: Tensor | None = None, *, reduce: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """The head whose logits are the mapped logits: F.linear(x, *fold(labels, weight, bias)) = map_labels(F.linear(x, ...)).

    For maps that are linear in the logits: an index, a matrix, and `Segments` with reduce "mean", "sum", "weighted" or
    "first". Summed in float32 (float64 for float64) and rounded once.

    Args:
        labels: one map (not N).
        weight: [S, d], floating point. bias: [S] or None.

    Returns:
        weight [T, d] and bias [T] or None, in their dtypes; differentiable.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise bad("weight", "a floating point [S, d]", _what(weight))
    if _check_reduce(labels, reduce, "logits", None) not in _LINEAR and isinstance(labels, Segments):
        raise bad("reduce", "one of " + ", ".join(_LINEAR) + ", which are linear in the logits", repr(reduce))
    _check_bias(weight, bias)
    return (
        map_labels(weight.T, labels, reduce=reduce).T.contiguous(),
        None if bias is None else map_labels(bias[None], labels, reduce=reduce)[0],
    )


def label_columns(
    labels: Labels | tuple[Segments, Segments], weight: Tensor, bias: Tensor | None = None, *, tokens: str = "first"
) -> LabelColumns:
    """The K columns of a head [V, d] that a label map reads. Made once for a frozen head, for `label_head`.

    Args:
        labels: index [T], `Segments` over V, or the pair (words, classes) of `Segments` for words of several tokens: tokens
            of every word, words of every class.
        weight: [V, d], floating point. bias: [V] or None.
        tokens: of a pair, the score of a word: its "first" token's, the "mean" or the "max" of its tokens'. First and mean
            fold into one column a word, exactly.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    one_of("tokens", tokens, ("first", "mean", "max"))
    if weight.dim() != 2 or not weight.is_floating_point():
        raise bad("weight", "a floating point [V, d]", _what(weight))
    _check_bias(weight, bias)
    head = (weight, bias)
    if isinstance(labels, Tensor):
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise bad("labels", "Segments, a pair of them or an index int64 [T]", _what(labels))
        same_device(weight, labels=labels)
        check_range("labels", labels, len(weight))
        return LabelColumns(*_rows(labels, *head), None, head)
    if isinstance(labels, Segments):
        columns, inner = _used(labels, len(weight))
        return LabelColumns(*_rows(columns, *head), inner, head)
    words, classes = labels
    if classes.num_source != words.num_classes or words.num_maps != 1:
        raise bad("labels", f"classes over {words.num_classes} words", f"over {classes.num_source}")
    if tokens == "first":
        return LabelColumns(*_rows(words.members[words.starts[:-1]], *head), classes, head)
    if tokens == "mean":
        columns, inner = _used(words, len(weight))
        return LabelColumns(*fold(inner, *_rows(columns, *head), reduce="mean"), classes, head)
    columns, inner = _used(words, len(weight))
    return LabelColumns(*_rows(columns, *head), (inner, classes), head)


def _rows(columns: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.index_select(0, columns), None if bias is None else bias.index_select(0, columns)


def _used(labels: Segments, vocabulary: int) -> tuple[Tensor, Segments]:
    """The distinct sources of a map, rising, and the map on them."""
    if labels.num_source != vocabulary:
        raise bad("labels", f"a map of {vocabulary} sources, the rows of the head", labels.num_source)
    columns, members = labels.members.unique(return_inverse=True)
    inner = reference.segments(members, labels.starts, max(len(columns), 1), labels.num_maps, labels.weights)
    return columns, inner


def label_head(
    hidden: Tensor, weight: Tensor | LabelColumns, bias: Tensor | None = None,
    labels: Labels | tuple[Segments, Segments] | None = None, *, rows: Tensor | None = None,
    target: Tensor | None = None, reduce: str | None = None, tokens: str = "first", full: bool = False,
    of: str = "logits", k: int | None = None, prior: Tensor | None = None, map_id: Tensor | None = None,
    renormalize: bool = True, class_weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = -100, focal: float = 0.0, reduction: str = "mean", impl: str = "auto",
) -> Tensor:  # fmt: skip
    """A classifier or vocabulary head that computes the label columns of the selected rows and nothing else.

        scores = hidden[rows] @ weight[columns].T + bias[columns]
        out = map_labels(scores, labels, ...), or with a target mapped_cross_entropy(scores, labels, target, ...)

    The same numbers as the whole head, then the index; what is not read is not computed. Verbalizers: Schick & Schuetze
    2021 (PET, arXiv 2001.07676), Hu et al. 2022 (KPT, arXiv 2108.02035).

    Args:
        hidden: [B, d], [B, T, d] with rows [B], or [M, d] with rows [R].
        weight, bias, labels: the head [V, d], [V] and a map of V sources, see `label_columns`; or in their place what
            `label_columns` has made, once for a frozen head.
        rows: int64; negative positions count from the end. On a GPU a row out of range is NaN (FASTPROMPT_CHECK=1 raises).
        target: int64, one a selected row: return the loss.
        tokens: see `label_columns`; not with `LabelColumns`.
        full: scores are log-probabilities over the whole vocabulary, exact, from a pass over the head in chunks: nothing
            of size rows x V is ever held, in the backward either.
        prior: [K], one a column (one a word where `labels` is a pair).
        class_weight: the `weight` of `mapped_cross_entropy`. The rest: see `map_labels` and `mapped_cross_entropy`.

    Returns:
        [R, T] or the loss. Gradients: hidden, and weight and bias where they require one.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    if isinstance(weight, LabelColumns):
        columns = weight
        if bias is not None or labels is not None:
            raise bad("weight", "either LabelColumns or weight, bias and labels", "both")
    else:
        if labels is None:
            raise bad("labels", "an index, Segments or a pair of them", None)
        columns = label_columns(labels, weight, bias, tokens=tokens)
    hidden = _select(hidden, rows, columns.weight)
    scores = F.linear(hidden, columns.weight, columns.bias)
    given: dict[str, Any] = {"reduce": reduce, "of": of, "k": k, "prior": prior, "map_id": map_id, "impl": impl}
    if full:
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide) - ops.log_partition(hidden, *columns.head)[:, None].to(wide)
    inner = columns.labels
    if isinstance(inner, tuple) and not isinstance(inner, Segments):
        scores, inner = map_labels(scores, inner[0], reduce="max", impl=impl), inner[1]
    loss: dict[str, Any] = {
        "renormalize": renormalize, "weight": class_weight, "label_smoothing": label_smoothing,
        "ignore_index": ignore_index, "focal": focal, "reduction": reduction,
    }  # fmt: skip
    if full and of == "probabilities":
        return _full_probabilities(scores, inner, target, given, loss)
    if target is None:
        return map_labels(scores, inner, **given)
    return mapped_cross_entropy(scores, inner, target, **given, **loss)


def _full_probabilities(
    scores: Tensor, labels: Labels | None, target: Tensor | None, given: dict[str, Any], loss: dict[str, Any]
) -> Tensor:
    """Scores that are log-probabilities already: no softmax over the columns comes in between."""
    reduce, _ = _check_map(scores, labels, **given)
    prior = given["prior"]
    values = scores if prior is None else scores - prior.to(scores.dtype).log()
    mapped = reference.reduce_values(values, labels, reduce, given["map_id"], given["k"], True)
    if target is None:
        return mapped
    reduction = loss.pop("reduction")
    _check_loss(scores, mapped.shape[1], target, loss["weight"], loss["label_smoothing"], loss["focal"], reduction)
    check_range("target", target, mapped.shape[1], ignored=loss["ignore_index"])
    return reference.total(*reference.cross_entropies(mapped, target, **loss), reduction)


def _select(hidden: Tensor, rows: Tensor | None, weight: Tensor) -> Tensor:
    """The selected rows of the hidden states, [R, d]."""
    if not hidden.is_floating_point() or hidden.dim() not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise bad("hidden", f"a floating point [B, d] or [B, T, d] with d = {weight.shape[1]}", _what(hidden))
    same_device(hidden, weight=weight, rows=rows)
    if rows is None:
        if hidden.dim() == 3:
            raise bad("rows", "int64 [B], the position of every sample of a hidden [B, T, d]", None)
        return hidden
    check_labels("rows", rows, hidden.shape[0] if hidden.dim() == 3 else None)
    length = hidden.shape[-2]
    if looks_at_values(rows):
        wrong = rows[(rows < -length) | (rows >= length)]
        if len(wrong):
            raise bad("rows", f"positions from {-length} to {length - 1}", wrong[:8].tolist())
    at = torch.where(rows < 0, rows + length, rows)
    known = (at >= 0) & (at < length)
    at = torch.where(known, at, 0)
    if hidden.dim() == 3:
        hidden, at = hidden.flatten(0, 1), at + length * torch.arange(len(rows), device=rows.device)
    chosen = hidden.index_select(0, at)
    return chosen if looks_at_values(rows) else torch.where(known[:, None], chosen, torch.nan)


# ---- Making maps ----


@torch.no_grad()
def count_labels_(counts: Tensor, logits: Tensor, target: Tensor, *, k: int | None = None, impl: str = "auto") -> Tensor:
    """Adds to counts[s, t] the samples b with argmax(logits[b]) = s and target[b] = t. Changes `counts`, and returns it.

    The arg-max and the sum are one pass where the logits are: nothing is kept and nothing goes to the host. The arg-max is
    torch.argmax's: the first index wins a tie, and NaN is larger than everything. Integers are added, so the counts are
    exact and do not depend on the order or on how the samples are cut into batches. No gradient.

    Args:
        counts: int64 [S, T], contiguous.
        logits: [B, S], floating point, any strides.
        target: int64 [B], values from 0 to T - 1, or -100 (PyTorch's ignore_index) for a sample that is not counted. On a
            GPU, and under torch.compile, a sample with any other value is not counted either (on a GPU FASTPROMPT_CHECK=1
            raises instead).
        k: BLM+ (Cai et al. 2024, arXiv 2410.24018): the k largest logits count, the first of equals, each by its softmax
            probability over all S, rounded to a multiple of 1 / COUNT_UNIT, which is what 1 means in the counts: give
            `bayesian_matrix` unit=COUNT_UNIT. A cell holds 2^23 samples. A sample without a softmax (NaN, +inf, nothing but
            -inf) counts nothing.
        impl: see the module `fastprompt.functional`.

    Raises:
        ValueError, TypeError: what was expected and what came; `counts` is unchanged.
    """
    _check_scores(logits, "logits")
    _check_counts(counts)
    if not counts.is_contiguous():
        raise bad("counts", "a contiguous tensor", f"strides {list(counts.stride())}")
    if counts.shape[0] != logits.shape[1]:
        raise bad("counts", f"one row a source, {logits.shape[1]}", f"{counts.shape[0]} rows")
    if k is not None and not 1 <= k <= logits.shape[1]:
        raise bad("k", f"1 to {logits.shape[1]}, the number of sources", k)
    check_labels("target", target, logits.shape[0])
    same_device(logits, counts=counts, target=target)
    check_range("target", target, counts.shape[1], ignored=-100)
    path = path_of(impl, logits)
    if _runtime.watch is not None:
        tell("count_labels_", impl, path, logits, target, how="counted by NumPy", moved=logits.nbytes)
    if path == "torch":
        return reference.count_labels_(counts, logits, target, k)
    ops.count_labels_(counts, logits, target, k, path)
    return counts


def match_labels(counts: Tensor, *, optimal: bool = False) -> Tensor:
    """The greedy one-to-one map of FLM and ILM (Chen et al. 2023, arXiv 2211.11635) from counts [S, T]: index [T].

    The same bits as "T times: take the largest cell of the flattened matrix, the first of equals; give that source to
    that target; strike its row and its column", by one sort of the cells that are not zero. A class that was never seen,
    or whose sources are all taken, gets a free source: the lowest source for the lowest class. Runs on the host, once a
    refresh; of counts on a GPU only the cells that are not zero are copied.

    Args:
        counts: int64 [S, T], not negative.
        optimal: the map with the largest sum of counts instead, by scipy.optimize.linear_sum_assignment.

    Returns:
        int64 [T] on the device of the counts; no source twice.

    Raises:
        ValueError: more targets than sources, or a negative count. TypeError: another dtype.
        RuntimeError: optimal=True without SciPy.
    """
    _check_counts(counts)
    if counts.shape[1] > counts.shape[0]:
        raise bad("counts", "at least as many sources as targets, for a one-to-one map", f"[S, T] {list(counts.shape)}")
    return ops.match_optimally(counts) if optimal else ops.match_labels(counts)


def bayesian_matrix(counts: Tensor, smoothing: float = 1.0, unit: int = 1) -> Tensor:
    """The matrix of BLM and BLM+ (Cai et al. 2024, arXiv 2410.24018) from counts [S, T]: float32 [S, T].

        P[s, t] = N[s, t] / (sum over t of N[s, t] + smoothing),   every column of P then divided by its sum

    A source that was never predicted has a row of zeros, with smoothing=0 as well. A class that was never counted reads all
    sources alike: its column is 1 / S. Computed in float64 and rounded once.

    Args:
        counts: int64 [S, T], not negative. smoothing: 0 or more.
        unit: what a sample counts: 1, or COUNT_UNIT for counts made with k.
    """
    _check_counts(counts)
    if not smoothing >= 0:
        raise bad("smoothing", "0 or more", smoothing)
    if unit < 1:
        raise bad("unit", "at least 1", unit)
    return reference.bayesian_matrix(counts, smoothing, unit)


# ---- Checks ----


def _what(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _classes(scores: Tensor, labels: Labels | None) -> int:
    if labels is None:
        return scores.shape[1]
    return labels.num_classes if isinstance(labels, Segments) else labels.shape[-1]


def _check_scores(scores: Tensor, name: str = "scores") -> None:
    if not scores.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {scores.dtype}")
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise bad(name, "[B, S] with at least one source class", list(scores.shape))


def _check_reduce(labels: Labels | None, reduce: str | None, of: str, k: int | None) -> str:
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


def _check_map(
    scores: Tensor, labels: Labels | None, reduce: str | None, map_id: Tensor | None, of: str, k: int | None,
    prior: Tensor | None, impl: str,
) -> tuple[str, str]:  # fmt: skip
    """The reduction, and the path. `Segments` were checked when they were made: their values are never looked at again."""
    _check_scores(scores)
    reduce = _check_reduce(labels, reduce, of, k)
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
            raise bad("prior", f"a floating point [{sources}], one a source", _what(prior))
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


def _check_loss(
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
            raise bad("weight", f"a floating point [{classes}], one a class", _what(weight))
        if weight.requires_grad:
            raise bad("weight", "a constant", "one that requires a gradient")


def _check_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise bad("bias", f"a floating point [{len(weight)}], one a row of the weight", _what(bias))


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected int64, got {counts.dtype}")
    if counts.dim() != 2:
        raise bad("counts", "[S, T]", list(counts.shape))
