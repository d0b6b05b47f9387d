"""Gradients of attention over [prefix | own keys], each computed only when it is needed.

    w = exp(score - lse)        delta = sum(out * g) - g_lse        e = w * (g [prefix_v | v]^T - delta)
    dq = scale * e [prefix_k | k]        d[prefix_k | k] = scale * e^T q        d[prefix_v | v] = w^T g

With a gate, the prefix's keys and values count `gate` times in all of these, and d gate[b, h] = sum over the prefix columns
of scale * e * (q k^T) + w * (g v^T). The products are computed again from q, k and lse; nothing of size T x S is kept.

Three kernels walk over the same tiles: queries (dq, d gate), own keys, and rows of the prefix. A prefix row is seen by every
query of every sample that uses it, B * T * H / Hkv of them, so those are split into chunks: a program per chunk writes float32
partials [splits, k and v, N, Hkv, P, D], a last kernel adds them in order. No atomics: the same bits every time.

Bytes beside the forward's: g and out once more, two float32 a query (lse, delta), and 8 bytes an element of the prefix and
chunk. FLOPs: 10 D for every pair of a query and a column it sees, 709 G (prefix 32) at the shape of forward.py.
"""

import torch
import triton
import triton.language as tl

from .._shared import dot, rounded
from .forward import SIZES, dense_rows, operands, strides
from .tile import (
    LOG2E,
    column_rows,
    is_seen,
    logits,
    logits_slope,
    own_keys,
    sample_prefix,
    seeing_queries,
    sequence,
)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "heads", "queries"])
def attention_delta_kernel(
    g_ptr, g_lse_ptr, out_ptr, delta_ptr,
    rows, heads, queries,
    stride_gb, stride_gh, stride_gt, stride_jb, stride_jh, stride_jt, stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] = sum(out * g) - g_lse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    b, h, t = row // queries // heads, row // queries % heads, row % queries
    d = tl.arange(0, BLOCK_D)
    wanted = live[:, None] & (d < D)[None, :]
    g_row = g_ptr + b * stride_gb + h * stride_gh + t * stride_gt
    out_row = out_ptr + b * stride_ob + h * stride_oh + t * stride_ot
    g = tl.load(g_row[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
    out = tl.load(out_row[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32)
    delta = tl.sum(g * out, 1)
    if g_lse_ptr is not None:
        delta -= tl.load(g_lse_ptr + b * stride_jb + h * stride_jh + t * stride_jt, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=live)


@triton.jit(do_not_specialize=SIZES)
def attention_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, index_ptr, prefix_lengths_ptr, lengths_ptr, key_mask_ptr,
    starts_q_ptr, starts_k_ptr, gate_ptr, g_ptr, lse_ptr, delta_ptr, dq_ptr, dgate_ptr,
    heads, queries, keys, prefixes, prefix_rows, stack, window, tiles,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkn, stride_pkh, stride_pkr, stride_pvn, stride_pvh, stride_pvr, stride_mb, stride_ms, stride_gateb, stride_gateh,
    stride_gb, stride_gh, stride_gt, stride_lb, stride_lh, stride_db, stride_dh, stride_dt,
    scale, softcap,
    SHARE: tl.constexpr, ALIGNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of ROWS queries x heads of one key head, and the tile's part of d gate [B, tiles, H]."""
    pid = tl.program_id(0)
    outer = pid // tiles
    b = (outer // heads).to(tl.int64)
    head = (outer % heads).to(tl.int64)
    start_q, queries = sequence(starts_q_ptr, b, queries)
    start_k, keys = sequence(starts_k_ptr, b, keys)
    tile = tiles - 1 - pid % tiles
    first_row = tile * ROWS
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    live = row < queries * GROUP
    t = row // GROUP
    at = t.to(tl.int64) + start_q
    h = head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < D)[None, :]
    q_row = q_ptr + b * stride_qb + h * stride_qh + at * stride_qt
    g_row = g_ptr + b * stride_gb + h * stride_gh + at * stride_gt
    q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)
    g = tl.load(g_row[:, None] + d[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0)
    gate = tl.full([ROWS], 1.0, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + b * stride_gateb + h * stride_gateh).to(tl.float32)

    n, prefix_columns, known = sample_prefix(index_ptr, prefix_lengths_ptr, b, prefixes, prefix_rows, stack, SHARE)
    last = tl.minimum((first_row + ROWS - 1) // GROUP, queries - 1)
    low, high = own_keys(lengths_ptr, b, first_row // GROUP, last, queries, keys, window, CAUSAL, WINDOWED, LEFT)
    end = prefix_columns + high - low
    if dq_ptr is None:
        end = prefix_columns
    k_base = k_ptr + b * stride_kb + head * stride_kh + start_k * stride_ks
    v_base = v_ptr + b * stride_vb + head * stride_vh + start_k * stride_vs
    prefix_k_base = prefix_k_ptr
    prefix_v_base = prefix_v_ptr
    if SHARE != "none":
        prefix_k_base += head * stride_pkh
        prefix_v_base += head * stride_pvh
    key_mask_base = key_mask_ptr
    if key_mask_ptr is not None:
        key_mask_base += b * stride_mb

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dgate = tl.zeros([ROWS], tl.float32)
    for c in range(0, end, COLUMNS):
        column = c + tl.arange(0, COLUMNS)
        prefix, key, there, k_row, v_row = column_rows(
            k_base, v_base, prefix_k_base, prefix_v_base, index_ptr, prefix_lengths_ptr, key_mask_base,
            column, end, b, n, prefix_columns, low, prefixes, prefix_rows, stack,
            stride_ks, stride_vs, stride_pkn, stride_pkr, stride_pvn, stride_pvr, stride_ms, SHARE, ALIGNED,
        )  # fmt: skip
        wanted = there[:, None] & (d < D)[None, :]
        k = tl.load(k_row[:, None] + d[None, :], mask=wanted, other=0.0)
        v = tl.load(v_row[:, None] + d[None, :], mask=wanted, other=0.0)
        product = dot(q, tl.trans(k), None)
        arriving = dot(g, tl.trans(v), None)
        factor = tl.where(prefix[None, :], gate[:, None], 1.0)
        seen = there[None, :] & live[:, None]
        if CAUSAL or WINDOWED:
            seen = seen & (prefix[None, :] | is_seen(t[:, None], key[None, :], queries, keys, window, CAUSAL, WINDOWED))
        if gate_ptr is None:
            logit = logits(product, scale, softcap, SOFTCAP)
            weight = tl.exp2(logit - lse[:, None])
            e = tl.where(seen, weight * (arriving - delta[:, None]) * logits_slope(logit, softcap, SOFTCAP), 0.0)
        else:
            logit = logits(product * factor, scale, softcap, SOFTCAP)
            weight = tl.exp2(logit - lse[:, None])
            e = weight * (arriving * factor - delta[:, None]) * logits_slope(logit, softcap, SOFTCAP)
            e = tl.where(seen, e, 0.0)
            if dgate_ptr is not None:
                dgate += tl.sum(tl.where(seen & prefix[None, :], scale * e * product + weight * arriving, 0.0), 1)
            e *= factor
        if dq_ptr is not None:
            dq = dot(rounded(e, k.dtype), k, dq)

    if dq_ptr is not None:
        dq = rounded(tl.where(known, dq * scale, float("nan")), dq_ptr.dtype.element_ty)
        dq_row = dq_ptr + b * stride_db + h * stride_dh + at * stride_dt
        tl.store(dq_row[:, None] + d[None, :], dq, mask=inside)
    if dgate_ptr is not None:
        dgate = tl.where(known, dgate, float("nan"))
        to = dgate_ptr + ((b * tiles + tile) * heads + head) * GROUP
        for member in range(GROUP):
            tl.store(to + member, tl.sum(tl.where(live & (row % GROUP == member), dgate, 0.0)))


@triton.jit(do_not_specialize=SIZES)
def attention_own_gradient_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, key_mask_ptr, starts_q_ptr, starts_k_ptr, g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, queries, keys, window, tiles,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_ms,
    stride_gb, stride_gh, stride_gt, stride_lb, stride_lh,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    scale, softcap,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of COLUMNS own keys of one key head: a walk over the queries and heads that see them."""
    pid = tl.program_id(0)
    outer = pid // tiles
    b = (outer // heads).to(tl.int64)
    head = (outer % heads).to(tl.int64)
    start_q, queries = sequence(starts_q_ptr, b, queries)
    start_k, keys = sequence(starts_k_ptr, b, keys)
    first = pid % tiles * COLUMNS
    if first >= keys:
        return
    key = first + tl.arange(0, COLUMNS)
    low, high = own_keys(lengths_ptr, b, 0, queries - 1, queries, keys, window, CAUSAL, WINDOWED, LEFT)
    there = (key >= low) & (key < high)
    at_key = key.to(tl.int64) + start_k
    if key_mask_ptr is not None:
        there = there & (tl.load(key_mask_ptr + b * stride_mb + at_key * stride_ms, mask=there, other=0) != 0)
    d = tl.arange(0, BLOCK_D)
    wanted = there[:, None] & (d < D)[None, :]
    k_row = k_ptr + b * stride_kb + head * stride_kh + at_key * stride_ks
    v_row = v_ptr + b * stride_vb + head * stride_vh + at_key * stride_vs
    k = tl.load(k_row[:, None] + d[None, :], mask=wanted, other=0.0)
    v = tl.load(v_row[:, None] + d[None, :], mask=wanted, other=0.0)

    last = tl.minimum(first + COLUMNS, high) - 1
    from_query, to_query = seeing_queries(tl.maximum(first, low), last, queries, keys, window, CAUSAL, WINDOWED)
    # No key of the tile is there: nothing to walk over.
    to_query = tl.where((last < first) | (first + COLUMNS <= low), from_query, to_query)
    dk = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    for r in range(from_query * GROUP, to_query * GROUP, ROWS):
        row = r + tl.arange(0, ROWS)
        live = row < to_query * GROUP
        t = row // GROUP
        at = t.to(tl.int64) + start_q
        h = head * GROUP + row % GROUP
        inside = live[:, None] & (d < D)[None, :]
        q_row = q_ptr + b * stride_qb + h * stride_qh + at * stride_qt
        g_row = g_ptr + b * stride_gb + h * stride_gh + at * stride_gt
        q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)
        g = tl.load(g_row[:, None] + d[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0)
        seen = there[:, None] & live[None, :]
        if CAUSAL or WINDOWED:
            seen = seen & is_seen(t[None, :], key[:, None], queries, keys, window, CAUSAL, WINDOWED)
        logit = logits(dot(k, tl.trans(q), None), scale, softcap, SOFTCAP)
        weight = tl.where(seen, tl.exp2(logit - lse[None, :]), 0.0)
        dv = dot(rounded(weight, g.dtype), g, dv)
        arriving = dot(v, tl.trans(g), None)
        e = tl.where(seen, weight * (arriving - delta[None, :]) * logits_slope(logit, softcap, SOFTCAP), 0.0)
        dk = dot(rounded(e, q.dtype), q, dk)

    # 0 * NaN is NaN: a key that is not there gets 0 whatever the queries hold.
    dk = tl.where(there[:, None], dk * scale, 0.0)
    dv = tl.where(there[:, None], dv, 0.0)
    to = (key < keys)[:, None] & (d < D)[None, :]
    dk_row = dk_ptr + b * stride_dkb + head * stride_dkh + at_key * stride_dks
    dv_row = dv_ptr + b * stride_dvb + head * stride_dvh + at_key * stride_dvs
    tl.store(dk_row[:, None] + d[None, :], rounded(dk, dk_ptr.dtype.element_ty), mask=to)
    tl.store(dv_row[:, None] + d[None, :], rounded(dv, dv_ptr.dtype.element_ty), mask=to)


@triton.jit(do_not_specialize=["batch", "heads", "queries", "prefixes", "prefix_rows", "stack", "tiles", "splits"])
def attention_prefix_gradient_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, pairs_ptr, first_ptr, prefix_lengths_ptr, starts_q_ptr, gate_ptr,
    g_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    batch, heads, queries, prefixes, prefix_rows, stack, tiles, splits,
    stride_qb, stride_qh, stride_qt, stride_pkn, stride_pkh, stride_pkr, stride_pvn, stride_pvh, stride_pvr,
    stride_gateb, stride_gateh, stride_gb, stride_gh, stride_gt, stride_lb, stride_lh,
    scale, softcap,
    USERS: tl.constexpr, SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk, dv [splits, N, Hkv, P, D]: what one chunk of the queries adds to COLUMNS rows of one prefix and key head.

    USERS of prefix n: "fold", the queries of all samples as one long list; "all" samples, one after the other; "sample" n;
    "index", the samples pairs[first[n] : first[n + 1]] // stack.
    """
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    n = (pid // tiles // heads % prefixes).to(tl.int64)
    split = (pid // tiles // heads // prefixes).to(tl.int64)
    prefix_row = pid % tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = prefix_row < prefix_rows
    if prefix_lengths_ptr is not None:
        there = there & (prefix_row < tl.load(prefix_lengths_ptr + n))
    d = tl.arange(0, BLOCK_D)
    wanted = there[:, None] & (d < D)[None, :]
    k_row = prefix_k_ptr + n * stride_pkn + head * stride_pkh + prefix_row.to(tl.int64) * stride_pkr
    v_row = prefix_v_ptr + n * stride_pvn + head * stride_pvh + prefix_row.to(tl.int64) * stride_pvr
    k = tl.load(k_row[:, None] + d[None, :], mask=wanted, other=0.0)
    v = tl.load(v_row[:, None] + d[None, :], mask=wanted, other=0.0)

    from_pair = n * 0
    if USERS == "fold":
        steps = tl.cdiv(batch * queries * GROUP, ROWS)
        items = steps
    else:
        steps = tl.cdiv(queries * GROUP, ROWS)
        items = steps
        if USERS == "all":
            items = steps * batch
        elif USERS == "index":
            from_pair = tl.load(first_ptr + n)
            items = steps * (tl.load(first_ptr + n + 1) - from_pair).to(tl.int32)
    chunk = tl.cdiv(items, splits)
    begin = (split * chunk).to(tl.int32)
    dk = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    for item in range(begin, tl.minimum(begin + chunk, items)):
        row = item % steps * ROWS + tl.arange(0, ROWS)
        if USERS == "fold":
            b = (row // (queries * GROUP)).to(tl.int64)
            live = b < batch
            at = (row // GROUP % queries).to(tl.int64)
        else:
            b = n
            if USERS == "all":
                b = (item // steps).to(tl.int64)
            elif USERS == "index":
                b = tl.load(pairs_ptr + from_pair + item // steps) // stack
            start_q, rows = sequence(starts_q_ptr, b, queries)
            live = row < rows * GROUP
            at = (row // GROUP).to(tl.int64) + start_q
        h = head * GROUP + row % GROUP
        inside = live[:, None] & (d < D)[None, :]
        q_row = q_ptr + b * stride_qb + h * stride_qh + at * stride_qt
        g_row = g_ptr + b * stride_gb + h * stride_gh + at * stride_gt
        q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)
        g = tl.load(g_row[:, None] + d[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + b * stride_lb + h * stride_lh + at, mask=live, other=0.0)
        seen = there[:, None] & live[None, :]
        product = dot(k, tl.trans(q), None)
        arriving = dot(v, tl.trans(g), None)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + b * stride_gateb + h * stride_gateh, mask=live, other=0.0).to(tl.float32)[None, :]
            product *= gate
            arriving *= gate
        logit = logits(product, scale, softcap, SOFTCAP)
        weight = tl.where(seen, tl.exp2(logit - lse[None, :]), 0.0)
        e = tl.where(seen, weight * (arriving - delta[None, :]) * logits_slope(logit, softcap, SOFTCAP), 0.0)
        if gate_ptr is not None:
            weight *= gate
            e *= gate
        dv = dot(rounded(weight, g.dtype), g, dv)
        dk = dot(rounded(e, q.dtype), q, dk)

    dk = tl.where(there[:, None], dk * scale, 0.0)
    dv = tl.where(there[:, None], dv, 0.0)
    to = (prefix_row < prefix_rows)[:, None] & (d < D)[None, :]
    place = (((split * prefixes + n) * heads + head) * prefix_rows + prefix_row)[:, None] * D + d[None, :]
    tl.store(dk_ptr + place, rounded(dk, dk_ptr.dtype.element_ty), mask=to)
    tl.store(dv_ptr + place, rounded(dv, dv_ptr.dtype.element_ty), mask=to)


@triton.jit(do_not_specialize=["size", "splits"])
def attention_prefix_sum_kernel(dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, size, splits, BLOCK: tl.constexpr):
    """dk = dk_parts[0] + dk_parts[1] + ..., in this order, and dv likewise."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    dk = tl.zeros([BLOCK], tl.float32)
    dv = tl.zeros([BLOCK], tl.float32)
    at = e
    for _ in range(splits):
        dk += tl.load(dk_parts_ptr + at, mask=inside, other=0.0)
        dv += tl.load(dv_parts_ptr + at, mask=inside, other=0.0)
        at += size
    tl.store(dk_ptr + e, rounded(dk, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + e, rounded(dv, dv_ptr.dtype.element_ty), mask=inside)


def users_of(index, prefixes):
    """(pairs, first): the entries of index [B, M] by the prefix that they name; those of prefix n begin at pairs[first[n]].

    A sample with a number out of range is left out as a whole. Nothing waits for the device.
    """
    wrong = ((index < -1) | (index >= prefixes)).any(1, keepdim=True)
    named = torch.where(wrong | (index < 0), prefixes, index).flatten()
    in_order, pairs = named.sort(stable=True)
    return pairs, torch.searchsorted(in_order, torch.arange(prefixes + 1, device=index.device))


def prefix_gradient(
    q, prefix_k, prefix_v, index, prefix_lengths, starts_q, gate, g, lse, delta,
    gate_strides, batch, max_q, scale, softcap, flags, launch,
):  # fmt: skip
    """(d prefix_k, d prefix_v) [N, Hkv, P, D], summed over the queries of all samples that use the prefix."""
    prefixes, heads, prefix_rows, width = prefix_k.shape
    packed = starts_q is not None
    pairs = first = None
    stack = 1
    if index is not None:
        users, stack = "index", index.shape[1]
        pairs, first = users_of(index, prefixes)
    elif flags["SHARE"] == "sample":
        users = "sample"
    elif packed and gate_strides[0]:
        users = "all"
    else:
        users = "fold"
        if packed:  # every query sees the prefix: it does not matter where a sequence ends
            batch, max_q, packed, starts_q = 1, q.shape[2], False, None
    tile = launch.prefix
    tiles = triton.cdiv(prefix_rows, tile.COLUMNS)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (prefix_k, prefix_v))
    splits = launch.splits
    parts = (dk, dv)
    if splits > 1:
        parts = tuple(torch.empty((splits, *dk.shape), dtype=torch.float32, device=q.device) for _ in parts)
    if dk.numel():
        attention_prefix_gradient_kernel[(tiles * heads * prefixes * splits,)](
            q, prefix_k, prefix_v, pairs, first, prefix_lengths, starts_q, gate, g, lse, delta, *parts,
            batch, heads, max_q, prefixes, prefix_rows, stack, tiles, splits,
            *strides(q, packed), *strides(prefix_k), *strides(prefix_v), *gate_strides, *strides(g, packed),
            *strides(lse, packed)[:2], scale, softcap,
            USERS=users, SOFTCAP=flags["SOFTCAP"], GROUP=flags["GROUP"], D=width, BLOCK_D=flags["BLOCK_D"],
            ROWS=tile.ROWS, COLUMNS=tile.COLUMNS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            block = 256
            attention_prefix_sum_kernel[(triton.cdiv(dk.numel(), block),)](
                *parts, dk, dv, dk.numel(), splits, BLOCK=block, num_warps=4, enable_fp_fusion=True
            )
    return dk, dv


def empty_rows(t):
    """A tensor for the gradient of t: in t's layout when its rows are dense."""
    return torch.empty_like(t) if t.stride(-1) == 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def attention_backward(
    g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
    *, needs, max_q, max_k, scale, causal, window, left, softcap, launch,
):  # fmt: skip
    """(dq, dk, dv, d prefix_k, d prefix_v, d gate), None where `needs` (q, own, prefix, gate) says so.

    g [B, H, T, D] and g_lse [B, H, T] (or None) in any layout; out and lse are what the forward gave.
    """
    need_q, need_own, need_prefix, need_gate = needs
    packed = starts_q is not None
    batch = starts_q.shape[0] - 1 if packed else q.shape[0]
    scale, softcap = float(scale), float(softcap)
    pointers, sizes, steps, flags = operands(
        q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate,
        max_q, max_k, causal, window, left, softcap,
    )  # fmt: skip
    (
        q_rows, k_rows, v_rows, prefix_k_rows, prefix_v_rows, chosen, limits, valid, mask, begins_q, begins_k, factor,
    ) = pointers  # fmt: skip
    g, out, lse = dense_rows(g), dense_rows(out), lse.contiguous()
    heads, width = k.shape[1], q.shape[3]
    dq = dk = dv = dprefix_k = dprefix_v = dgate = None

    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    rows = max(1, 4096 // flags["BLOCK_D"])
    if delta.numel():
        attention_delta_kernel[(triton.cdiv(delta.numel(), rows),)](
            g, g_lse, out, delta, delta.numel(), q.shape[1], q.shape[2],
            *strides(g), *strides(g_lse), *strides(out), D=width, BLOCK_D=flags["BLOCK_D"], ROWS=rows,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    seen_by = (*strides(g, packed), *strides(lse, packed)[:2])

    with_gate = need_gate and factor is not None
    if need_q or with_gate:
        tile = launch.query
        tiles = triton.cdiv(max_q * flags["GROUP"], tile.ROWS)
        dq = empty_rows(q) if need_q else None
        parts = torch.zeros((batch, tiles, q.shape[1]), device=q.device) if with_gate else None
        if batch * heads * tiles:
            attention_query_gradient_kernel[(batch * heads * tiles,)](
                *pointers, g, lse, delta, dq, parts, *sizes, tiles, *steps, *seen_by, *strides(dq, packed), scale, softcap,
                **flags, ROWS=tile.ROWS, COLUMNS=tile.COLUMNS,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
        if parts is not None:
            summed = parts.sum(1)
            dgate = summed.sum_to_size(gate.shape).to(gate.dtype)
    if need_gate and dgate is None:
        dgate = torch.zeros_like(gate)

    if need_own:
        tile = launch.own
        tiles = triton.cdiv(max_k, tile.COLUMNS)
        dk, dv = empty_rows(k), empty_rows(v)
        own = {name: flags[name] for name in ("CAUSAL", "WINDOWED", "LEFT", "SOFTCAP", "GROUP", "D", "BLOCK_D")}
        if batch * heads * tiles:
            attention_own_gradient_kernel[(batch * heads * tiles,)](
                q_rows, k_rows, v_rows, valid, mask, begins_q, begins_k, g, lse, delta, dk, dv,
                heads, max_q, max_k, sizes[-1], tiles,
                *steps[:9], *steps[15:17], *seen_by, *strides(dk, packed), *strides(dv, packed), scale, softcap,
                **own, ROWS=tile.ROWS, COLUMNS=tile.COLUMNS,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip

    if need_prefix and prefix_k_rows is not None:
        dprefix_k, dprefix_v = prefix_gradient(
            q_rows, prefix_k_rows, prefix_v_rows, chosen, limits, begins_q, factor, g, lse, delta,
            steps[17:], batch, max_q, scale, softcap, flags, launch,
        )  # fmt: skip
    elif need_prefix:
        dprefix_k, dprefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    return dq, dk, dv, dprefix_k, dprefix_v, dgate
