"""Heads that compute the label columns of the selected rows and nothing else, and maps folded into a head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt.functional.checks import bad, check_labels, check_range, looks_at_values, one_of, same_device
from fastprompt.functional.mapping import check_loss, check_map, check_reduce, map_labels, mapped_cross_entropy, what
from fastprompt.ops import mapping as ops
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import Labels, Segments

_LINEAR = ("mean", "sum", "weighted", "first")


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
        raise bad("weight", "a floating point [S, d]", what(weight))
    if check_reduce(labels, reduce, "logits", None) not in _LINEAR and isinstance(labels, Segments):
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
        raise bad("weight", "a floating point [V, d]", what(weight))
    _check_bias(weight, bias)
    head = (weight, bias)
    if isinstance(labels, Tensor):
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise bad("labels", "Segments, a pair of them or an index int64 [T]", what(labels))
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
    hidden = select_rows(hidden, rows, columns.weight)
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
    reduce, _ = check_map(scores, labels, **given)
    prior = given["prior"]
    values = scores if prior is None else scores - prior.to(scores.dtype).log()
    mapped = reference.reduce_values(values, labels, reduce, given["map_id"], given["k"], True)
    if target is None:
        return mapped
    reduction = loss.pop("reduction")
    check_loss(scores, mapped.shape[1], target, loss["weight"], loss["label_smoothing"], loss["focal"], reduction)
    check_range("target", target, mapped.shape[1], ignored=loss["ignore_index"])
    return reference.total(*reference.cross_entropies(mapped, target, **loss), reduction)


def select_rows(hidden: Tensor, rows: Tensor | None, weight: Tensor) -> Tensor:
    """The rows of the hidden states that `label_head` reads, [R, d]: `hidden` and `rows` as there, weight [V, d]."""
    if not hidden.is_floating_point() or hidden.dim() not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise bad("hidden", f"a floating point [B, d] or [B, T, d] with d = {weight.shape[1]}", what(hidden))
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


def _check_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise bad("bias", f"a floating point [{len(weight)}], one a row of the weight", what(bias))
