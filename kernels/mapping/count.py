"""How often each source class is predicted for each target class, added up where the logits are.

    counts[s, t] += number of samples b with argmax(logits[b]) = s and target[b] = t
    counts[s, t] += sum of round(2^40 softmax(logits[b])[s]) over the samples b with target[b] = t and s one of their k largest

logits [B, S] float, any strides; target [B] int64; counts [S, T] int64. The arg-max is torch.argmax's: the first index
wins a tie, NaN is larger than everything; the k largest go by the same order. A sample whose target is not a class is not
counted, nor with k one that has no softmax (NaN, +inf, nothing but -inf).

Bytes: read the logits once (with k and rows that do not fit in a tile, k + 1 times, from the cache); an 8-byte atomic for
each that counts. The atomics add integers, so their order changes nothing: the counts are the same every time. FLOPs: two
comparisons an element, with k an exponential and about 5 k comparisons; bound by bytes for small k.
"""

import triton
import triton.language as tl

from .segments import after, extended, log1p, row_sum, vector_of


@triton.jit(do_not_specialize=["batch"])
def count_labels_kernel(
    logits_ptr, target_ptr, counts_ptr,
    batch, targets,
    stride_b, stride_s, stride_target,
    SOURCES: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS samples: each lane keeps the best of every COLUMNS-th source, and the lanes are compared at the end."""
    b = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    at = tl.zeros([ROWS, COLUMNS], tl.int32) + lane
    for start in range(0, SOURCES, COLUMNS):
        s = start + lane
        offset = b * stride_b + s.to(tl.int64) * stride_s
        if VECTOR > 1:
            offset = tl.max_contiguous(tl.multiple_of(offset, [1, VECTOR]), [1, VECTOR])  # by stride_b
        value = tl.load(logits_ptr + offset, mask=(b < batch) & (s < SOURCES), other=float("-inf")).to(tl.float32)
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        at = tl.where(better, s, at)
    nan = best != best
    has_nan = tl.max(nan.to(tl.int32), axis=1)[:, None] > 0
    top = tl.max(tl.where(nan, float("-inf"), best), axis=1)[:, None]
    # Padding lanes hold -inf and the largest positions, so a row of -inf still gives 0.
    source = tl.min(tl.where(tl.where(has_nan, nan, best == top), at, SOURCES), axis=1)[:, None]
    target = tl.load(target_ptr + b * stride_target, mask=b < batch, other=-1)
    known = (target >= 0) & (target < targets)
    one = tl.full([ROWS, 1], 1, tl.int64)
    tl.atomic_add(counts_ptr + source.to(tl.int64) * targets + target, one, mask=known, sem="relaxed")


@triton.jit
def best_of(x, s, best, at):
    """(best, at) [ROWS, 1] or the largest of x at s [ROWS, COLUMNS], the first of equals; at < 0: none. x is not NaN."""
    top = tl.max(x, axis=1)[:, None]
    top_at = tl.min(tl.where(x == top, s, 2147483647), axis=1)[:, None]
    better = (top_at < 2147483647) & ((at < 0) | (top > best))
    return tl.where(better, top, best), tl.where(better, top_at, at)


@triton.jit(do_not_specialize=["batch", "k"])
def count_largest_kernel(
    logits_ptr, target_ptr, counts_ptr,
    batch, targets, k,
    stride_b, stride_s, stride_target,
    SOURCES: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS samples: k times the largest that comes behind the last one. A row that fits in a tile is read once."""
    b = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    live = b < batch
    lane = tl.arange(0, COLUMNS)[None, :]
    ONCE: tl.constexpr = SOURCES <= COLUMNS
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ONCE:
        offset = b * stride_b + lane.to(tl.int64) * stride_s
        if VECTOR > 1:
            offset = tl.max_contiguous(tl.multiple_of(offset, [1, VECTOR]), [1, VECTOR])  # by stride_b
        x = tl.load(logits_ptr + offset, mask=live & (lane < SOURCES), other=float("-inf")).to(tl.float32)
        m = tl.full([ROWS, 1], float("-inf"), tl.float32)
        m, rest = extended(m, tl.full([ROWS, 1], -1.0, tl.float32), x)
        logsum = tl.where(m == float("inf"), float("nan"), log1p(rest))
    else:
        m, logsum = row_sum(logits_ptr, b, live, stride_b, stride_s, SOURCES, VECTOR, ROWS, COLUMNS)
    target = tl.load(target_ptr + b * stride_target, mask=live, other=-1)
    known = (target >= 0) & (target < targets)
    last = tl.full([ROWS, 1], float("inf"), tl.float32)
    last_at = tl.full([ROWS, 1], -1, tl.int32)
    for _ in range(0, k):
        best = tl.full([ROWS, 1], float("-inf"), tl.float32)
        at = tl.full([ROWS, 1], -1, tl.int32)
        if ONCE:
            left = after(x, lane, last, last_at) & (lane < SOURCES)
            best, at = best_of(tl.where(left, x, float("-inf")), tl.where(left, lane, 2147483647), best, at)
        else:
            for start in range(0, SOURCES, COLUMNS):
                s = start + lane
                offset = b * stride_b + s.to(tl.int64) * stride_s
                if VECTOR > 1:
                    offset = tl.max_contiguous(tl.multiple_of(offset, [1, VECTOR]), [1, VECTOR])
                x = tl.load(logits_ptr + offset, mask=live & (s < SOURCES), other=float("-inf")).to(tl.float32)
                left = after(x, s, last, last_at) & (s < SOURCES)
                best, at = best_of(tl.where(left, x, float("-inf")), tl.where(left, s, 2147483647), best, at)
        last = best
        last_at = at
        # To the nearest integer, halves to the even one, in float32: scaling by 2^40 changes no digit.
        amount = tl.exp((best - m) - logsum) * 1099511627776.0
        whole = tl.floor(amount)
        half = amount - whole
        units = whole.to(tl.int64)
        units += ((half > 0.5) | ((half == 0.5) & (units % 2 == 1))).to(tl.int64)
        counted = known & (amount == amount) & (at >= 0)
        tl.atomic_add(counts_ptr + at.to(tl.int64) * targets + target, units, mask=counted, sem="relaxed")


def count_labels_(counts, logits, target, launch, k=None):
    """Adds to `counts`, which is contiguous: the arg-max or, with k, the softmax of the k largest."""
    batch, sources = logits.shape
    if not batch:
        return
    kernel, chosen = (count_labels_kernel, ()) if k is None else (count_largest_kernel, (k,))
    kernel[(triton.cdiv(batch, launch.ROWS),)](
        logits, target, counts, batch, counts.shape[1], *chosen, *logits.stride(), target.stride(0),
        SOURCES=sources, VECTOR=vector_of(logits), ROWS=launch.ROWS, COLUMNS=launch.COLUMNS,
        num_warps=launch.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
