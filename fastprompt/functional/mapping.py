"""From source classes to target classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.functional.checks import bad, check_labels, check_range, path_of, same_device
from fastprompt.ops import mapping as ops
from fastprompt.reference import mapping as reference


def map_labels(logits: Tensor, index: Tensor, *, impl: str = "auto") -> Tensor:
    """Target t reads source index[t]: out[b, t] = logits[b, index[t]]. One launch forward, one backward.

    The one-to-one label maps of ILM-VP (Chen et al. 2023, arXiv 2211.11635); `match_labels` and `nn.LabelMap` make them. A
    source that several targets read is allowed: its gradient is their sum, in the order of t.

    Args:
        logits: [B, S], floating point, any strides. NaN in, NaN out.
        index: int64 [T], values from 0 to S - 1. On a GPU a value out of range makes its column NaN and has no gradient
            (FASTPROMPT_CHECK=1 raises instead).
        impl: see the module.

    Returns:
        [B, T] in the dtype of the logits, with and without autocast: values are moved, not computed. The gradient is dense
        and the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came.
        RuntimeError: a second derivative of the kernels is asked for (impl="torch" has one).
    """
    _check_logits(logits)
    check_labels("index", index, None)
    same_device(logits, index=index)
    path = path_of(impl, logits)
    if path == "auto" and logits.device.type == "cpu":
        try:
            return logits.index_select(1, index)  # the best there is on a CPU, backward too
        except (IndexError, RuntimeError):  # it looks at the index itself, without saying which argument is wrong
            check_range("index", index, logits.shape[1])
            raise
    check_range("index", index, logits.shape[1])
    if path == "torch":
        return reference.map_labels(logits, index)
    return ops.MapLabels.apply(logits, index, logits.requires_grad and torch.is_grad_enabled())


@torch.no_grad()
def count_labels_(counts: Tensor, logits: Tensor, target: Tensor, *, impl: str = "auto") -> Tensor:
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
        impl: see the module.

    Raises:
        ValueError, TypeError: what was expected and what came; `counts` is unchanged.
    """
    _check_logits(logits)
    _check_counts(counts)
    if not counts.is_contiguous():
        raise bad("counts", "a contiguous tensor", f"strides {list(counts.stride())}")
    if counts.shape[0] != logits.shape[1]:
        raise bad("counts", f"one row a source, {logits.shape[1]}", f"{counts.shape[0]} rows")
    check_labels("target", target, logits.shape[0])
    same_device(logits, counts=counts, target=target)
    check_range("target", target, counts.shape[1], ignored=-100)
    path = path_of(impl, logits)
    if path == "torch":
        return reference.count_labels_(counts, logits, target)
    ops.count_labels_(counts, logits, target, path)
    return counts


def match_labels(counts: Tensor) -> Tensor:
    """The greedy one-to-one map of FLM and ILM (Chen et al. 2023, arXiv 2211.11635) from counts [S, T]: index [T].

    The same bits as "T times: take the largest cell of the flattened matrix, the first of equals; give that source to
    that target; strike its row and its column", by one sort of the cells that are not zero. A class that was never seen,
    or whose sources are all taken, gets a free source: the lowest source for the lowest class. Runs on the host, once a
    refresh; of counts on a GPU only the cells that are not zero are copied.

    Args:
        counts: int64 [S, T], not negative.

    Returns:
        int64 [T] on the device of the counts; no source twice.

    Raises:
        ValueError: more targets than sources, or a negative count. TypeError: another dtype.
    """
    _check_counts(counts)
    if counts.shape[1] > counts.shape[0]:
        raise bad("counts", "at least as many sources as targets, for a one-to-one map", f"[S, T] {list(counts.shape)}")
    return ops.match_labels(counts)


def _check_logits(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating point dtype, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise bad("logits", "[B, S] with at least one source class", list(logits.shape))


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected int64, got {counts.dtype}")
    if counts.dim() != 2:
        raise bad("counts", "[S, T]", list(counts.shape))
