"""Who sees whom: the device functions that the forward and the backward kernels share.

The columns of a query are virtually concatenated: first the rows of its sample's prefixes, then the own keys that any query
of the tile sees. Only row pointers choose between the two, so one loop with wide loads serves both. The rows of a tile are
queries x the heads that read the same key head: row r is query r // GROUP, head r % GROUP.

SHARE says whose prefix it is: "none", "batch" (one for all), "sample" (prefix b), "index" (prefix index[b]), "stack"
(prefixes index[b, 0], index[b, 1], ... side by side).
"""

import triton
import triton.language as tl

from .._shared import tanh

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(starts_ptr, b, size):
    """(first row, rows) of sequence b: all rows of sample b, or what lies between two starts of a packed tensor."""
    if starts_ptr is None:
        return b * 0, size
    else:
        start = tl.load(starts_ptr + b)
        return start, (tl.load(starts_ptr + b + 1) - start).to(tl.int32)


@triton.jit
def sample_prefix(index_ptr, prefix_lengths_ptr, b, prefixes, prefix_rows, stack, SHARE: tl.constexpr):
    """(prefix number, prefix columns, is the index in range?) of sample b. A sample with a wrong index has no columns."""
    n = b * 0
    known = b >= 0
    columns = prefix_rows
    if SHARE == "sample":
        n = b
    elif SHARE == "index":
        n = tl.load(index_ptr + b)
        known = (n >= -1) & (n < prefixes)
    elif SHARE == "stack":
        columns = prefix_rows * stack
        for m in range(stack):
            i = tl.load(index_ptr + b * stack + m)
            known = known & (i >= -1) & (i < prefixes)
    if SHARE == "none":
        columns = prefix_rows * 0
    elif SHARE != "stack":
        there = known & (n >= 0)
        if prefix_lengths_ptr is not None:
            length = tl.load(prefix_lengths_ptr + n, mask=there, other=0)
            columns = tl.maximum(tl.minimum(length, prefix_rows), 0).to(tl.int32)
        columns = tl.where(there, columns, 0)
    return n, tl.where(known, columns, 0), known


@triton.jit
def own_keys(
    lengths_ptr, b, first, last, queries, keys, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """The keys [low, high) that queries first .. last may see."""
    low = first * 0
    high = keys + low
    ahead = keys - queries
    if CAUSAL:
        high = tl.minimum(high, last + ahead + 1)
    elif WINDOWED:
        high = tl.minimum(high, last + ahead + window)
    if WINDOWED:
        low = tl.maximum(low, first + ahead - window + 1)
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b), keys).to(tl.int32)
        if LEFT:
            low = tl.maximum(low, keys - length)
        else:
            high = tl.minimum(high, length)
    return low, tl.maximum(high, low)


@triton.jit
def seeing_queries(first, last, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The queries [low, high) that may see any of the own keys first .. last."""
    low = first * 0
    high = queries + low
    ahead = keys - queries
    if CAUSAL:
        low = tl.maximum(low, first - ahead)
    elif WINDOWED:
        low = tl.maximum(low, first - ahead - window + 1)
    if WINDOWED:
        high = tl.minimum(high, last - ahead + window)
    return low, tl.maximum(high, low)


@triton.jit
def is_seen(query, key, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether causality and the window let a query see an own key. The last query lines up with the last key."""
    ahead = key - query - (keys - queries)
    seen = ahead == ahead
    if CAUSAL:
        seen = seen & (ahead <= 0)
    elif WINDOWED:
        seen = seen & (ahead < window)
    if WINDOWED:
        seen = seen & (ahead > -window)
    return seen


@triton.jit
def column_rows(
    k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, index_ptr, prefix_lengths_ptr, key_mask_ptr,
    column, end, b, n, prefix_columns, low, prefixes, prefix_rows, stack,
    stride_ks, stride_vs, stride_pkn, stride_pkr, stride_pvn, stride_pvr, stride_ms,
    SHARE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(prefix?, own key, there?, pointers to the rows of k, of v) of some columns. What is not there must not be read."""
    prefix = column < prefix_columns
    key = column - prefix_columns + low
    there = column < end
    k_row = k_ptr + key.to(tl.int64) * stride_ks
    v_row = v_ptr + key.to(tl.int64) * stride_vs
    if key_mask_ptr is not None:
        allowed = tl.load(key_mask_ptr + key.to(tl.int64) * stride_ms, mask=there & (column >= prefix_columns), other=1)
        there = there & (allowed != 0)
    if SHARE != "none":
        row = column
        if SHARE == "stack":
            row = column % prefix_rows
            n = tl.load(index_ptr + b * stack + column // prefix_rows, mask=there & prefix, other=-1)
            chosen = (n >= 0) & (n < prefixes)
            if prefix_lengths_ptr is not None:
                chosen = chosen & (row < tl.load(prefix_lengths_ptr + n, mask=chosen, other=0))
            there = there & (chosen | (column >= prefix_columns))
        row = row.to(tl.int64)
        k_row = tl.where(prefix, prefix_k_ptr + n * stride_pkn + row * stride_pkr, k_row)
        v_row = tl.where(prefix, prefix_v_ptr + n * stride_pvn + row * stride_pvr, v_row)
        if ALIGNED:
            # A choice between two pointers forgets that both are multiples of 16 bytes, and with it every wide load.
            k_row = tl.multiple_of(k_row, 16)
            v_row = tl.multiple_of(v_row, 16)
    return prefix, key, there, k_row, v_row


@triton.jit
def logits(product, scale, softcap, SOFTCAP: tl.constexpr):
    """log2(e) * score for the product of a query and a (gated) key."""
    if SOFTCAP:
        return tanh(product * (scale / softcap)) * (softcap * LOG2E)
    else:
        return product * (scale * LOG2E)


@triton.jit
def logits_slope(logit, softcap, SOFTCAP: tl.constexpr):
    """d score / d (scale * product), from what `logits` gave."""
    if SOFTCAP:
        y = logit / (softcap * LOG2E)
        return 1.0 - y * y
    else:
        return logit * 0.0 + 1.0
