"""Making label maps from what source classes a model predicts for the samples of each target class."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.functional.checks import bad, check_labels, check_range, path_of, same_device, tell
from fastprompt.functional.mapping import check_scores
from fastprompt.ops import mapping as ops
from fastprompt.ops import mapping_counts as host
from fastprompt.reference import mapping as reference
from fastprompt.reference.mapping import COUNT_UNIT

__all__ = ["COUNT_UNIT"]


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
    check_scores(logits, "logits")
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
    return host.match_optimally(counts) if optimal else host.match_labels(counts)


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


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected int64, got {counts.dtype}")
    if counts.dim() != 2:
        raise bad("counts", "[S, T]", list(counts.shape))
