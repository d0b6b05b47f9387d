"""How often each source class is predicted for each target class, added up where the logits are.

    counts[s, t] += number of samples b with argmax(logits[b]) = s and target[b] = t

logits [B, S] float, any strides; target [B] int64; counts [S, T] int64. The arg-max is torch.argmax's: the first index
wins a tie, NaN is larger than everything. A sample whose target is not a class is not counted.

Bytes: read the logits once; one 8-byte atomic a sample. The atomics add integers, so their order changes nothing: the
counts are exact and the same every time. FLOPs: two comparisons an element; bound by bytes.
"""

import math

import triton
import triton.language as tl


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


def count_labels_(counts, logits, target, launch):
    """Adds to `counts`, which is contiguous."""
    batch, sources = logits.shape
    stride_b, stride_s = logits.stride()
    if batch:
        count_labels_kernel[(triton.cdiv(batch, launch.ROWS),)](
            logits, target, counts, batch, counts.shape[1], stride_b, stride_s, target.stride(0),
            SOURCES=sources, VECTOR=math.gcd(stride_b, 16) if stride_s == 1 else 1,
            ROWS=launch.ROWS, COLUMNS=launch.COLUMNS, num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
