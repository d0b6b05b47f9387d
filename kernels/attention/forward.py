"""Attention over [prefix | own keys] in one pass, with nothing concatenated.

    out = softmax(scale * q [prefix_k | k]^T) [prefix_v | v]        lse = log(sum of the exponentials), natural

q [B, H, T, D]; k, v [B, Hkv, S, D]; prefix_k, prefix_v [N, Hkv, P, D]; out [B, H, T, D]; lse [B, H, T] float32. Packed
sequences are [1, heads, rows, D] with their starts. Running maximum and sum are float32; a row that sees nothing is 0, its
lse -inf. A sample with an index out of range is NaN.

Bytes: q, k, v, out once and the prefix once (it stays in the L2 cache while the batch reads it): 134 + 67 + 134 MB and 4 MB
at B=8, H=32, Hkv=8, T=S=2048, D=128, P=128, bf16. FLOPs: 4 D for every pair of a query and a column it sees, 309 G there
when causal. Few queries read long keys: those are split over programs, and the parts merged by their lse.
"""

import torch
import triton
import triton.language as tl

from .._shared import dot, rounded
from .tile import LN2, column_rows, is_seen, logits, own_keys, sample_prefix, sequence

SIZES = ["heads", "queries", "keys", "prefixes", "prefix_rows", "stack", "window", "tiles", "splits"]


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, index_ptr, prefix_lengths_ptr, lengths_ptr, key_mask_ptr,
    starts_q_ptr, starts_k_ptr, gate_ptr, out_ptr, lse_ptr,
    heads, queries, keys, prefixes, prefix_rows, stack, window, tiles, splits,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkn, stride_pkh, stride_pkr, stride_pvn, stride_pvh, stride_pvr, stride_mb, stride_ms, stride_gb, stride_gh,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_os, stride_ls,
    scale, softcap,
    SHARE: tl.constexpr, ALIGNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS queries x heads of one key head, over one of `splits` shares of the columns."""
    split = tl.program_id(0) % splits
    pid = tl.program_id(0) // splits
    outer = pid // tiles
    b = (outer // heads).to(tl.int64)
    head = (outer % heads).to(tl.int64)
    start_q, queries = sequence(starts_q_ptr, b, queries)
    start_k, keys = sequence(starts_k_ptr, b, keys)
    # The last queries of a causal tile see most: they start first.
    first_row = (tiles - 1 - pid % tiles) * ROWS
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    live = row < queries * GROUP
    t = row // GROUP
    at = t.to(tl.int64) + start_q
    h = head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    q_row = q_ptr + b * stride_qb + h * stride_qh + at * stride_qt
    q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    gate = tl.full([ROWS], 1.0, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + b * stride_gb + h * stride_gh).to(tl.float32)

    n, prefix_columns, known = sample_prefix(index_ptr, prefix_lengths_ptr, b, prefixes, prefix_rows, stack, SHARE)
    last = tl.minimum((first_row + ROWS - 1) // GROUP, queries - 1)
    low, high = own_keys(lengths_ptr, b, first_row // GROUP, last, queries, keys, window, CAUSAL, WINDOWED, LEFT)
    end = prefix_columns + high - low
    share = tl.cdiv(tl.cdiv(end, splits), COLUMNS) * COLUMNS
    begin = split * share
    end = tl.minimum(end, begin + share)
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

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for c in range(begin, end, COLUMNS):
        column = c + tl.arange(0, COLUMNS)
        prefix, key, there, k_row, v_row = column_rows(
            k_base, v_base, prefix_k_base, prefix_v_base, index_ptr, prefix_lengths_ptr, key_mask_base,
            column, end, b, n, prefix_columns, low, prefixes, prefix_rows, stack,
            stride_ks, stride_vs, stride_pkn, stride_pkr, stride_pvn, stride_pvr, stride_ms, SHARE, ALIGNED,
        )  # fmt: skip
        wanted = there[:, None] & (d < D)[None, :]
        k = tl.load(k_row[:, None] + d[None, :], mask=wanted, other=0.0)
        product = dot(q, tl.trans(k), None)
        factor = tl.where(prefix[None, :], gate[:, None], 1.0)
        if gate_ptr is not None:
            product *= factor
        seen = there[None, :] & live[:, None]
        if CAUSAL or WINDOWED:
            seen = seen & (prefix[None, :] | is_seen(t[:, None], key[None, :], queries, keys, window, CAUSAL, WINDOWED))
        logit = tl.where(seen, logits(product, scale, softcap, SOFTCAP), float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logit - floor[:, None])
        shrink = tl.exp2(top - floor)
        total = total * shrink + tl.sum(weight, 1)
        top = higher
        if gate_ptr is not None:
            weight *= factor
        v = tl.load(v_row[:, None] + d[None, :], mask=wanted, other=0.0)
        out = dot(rounded(weight, v.dtype), v, out * shrink[:, None])

    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    out = tl.where(known, out, float("nan"))
    lse = tl.where(known, lse, float("nan"))
    part = split.to(tl.int64)
    out_row = out_ptr + part * stride_os + b * stride_ob + h * stride_oh + at * stride_ot
    out = rounded(out, out_ptr.dtype.element_ty)
    tl.store(out_row[:, None] + d[None, :], out, mask=live[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + part * stride_ls + b * stride_lb + h * stride_lh + at, lse, mask=live)


@triton.jit(do_not_specialize=["parts", "rows", "batch", "queries"])
def attention_merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, parts, rows, batch, queries, stride_ob, stride_oh, stride_ot, stride_lb, stride_lh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One softmax over the columns of all parts: out = sum_p exp(lse_p - lse) out_p, in the order of the parts.

    parts [parts, H, B, T, D] and their lse [parts, H, B, T] in float32, contiguous; rows = H * B * T.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (d < D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    at = row
    for _ in range(parts):
        part_lse = tl.load(part_lse_ptr + at, mask=live, other=float("-inf"))
        part = tl.load(parts_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        higher = tl.maximum(top, part_lse)
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(part_lse - floor)
        shrink = tl.exp(top - floor)
        total = total * shrink + weight
        out = out * shrink[:, None] + part * weight[:, None]
        top = higher
        at += rows
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    t = row % queries
    b = row // queries % batch
    h = row // queries // batch
    out_row = out_ptr + b * stride_ob + h * stride_oh + t * stride_ot
    tl.store(out_row[:, None] + d[None, :], rounded(out / total[:, None], out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(empty, float("-inf"), top + tl.log(total))
    tl.store(lse_ptr + b * stride_lb + h * stride_lh + t, lse, mask=live)


def dense_rows(t):
    """t, or a copy of it when the elements of a row do not lie side by side."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def strides(t, packed=False):
    """The first three strides of t [B, heads, rows, D]; sequences of a packed tensor share its only sample."""
    return (0, 0, 0) if t is None else (0 if packed else t.stride(0), t.stride(1), t.stride(2))


def aligned(*tensors):
    """Whether every row of every tensor begins at a multiple of 16 bytes."""
    given = [t for t in tensors if t is not None]
    return all(t.data_ptr() % 16 == 0 and all(step * t.element_size() % 16 == 0 for step in t.stride()[:3]) for t in given)


def share_of(prefix_k, index, batch):
    """(SHARE, prefixes side by side) of a call."""
    if prefix_k is None or not prefix_k.shape[2] or (index is not None and not index.shape[1]):
        return "none", 0
    if index is not None:
        return ("stack" if index.shape[1] > 1 else "index"), index.shape[1]
    return ("batch" if prefix_k.shape[0] == 1 else "sample"), 1


def operands(
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate,
    max_q, max_k, causal, window, left, softcap,
):  # fmt: skip
    """(pointers, sizes, strides, flags) that every kernel takes: q, k, v and all that says who sees whom."""
    packed = starts_q is not None
    batch = starts_q.shape[0] - 1 if packed else q.shape[0]
    share, stack = share_of(prefix_k, index, batch)
    if share == "none":
        prefix_k = prefix_v = index = prefix_lengths = gate = None
    q, k, v, prefix_k, prefix_v = (dense_rows(t) for t in (q, k, v, prefix_k, prefix_v))
    index, prefix_lengths, lengths, starts_q, starts_k = (
        None if t is None else t.contiguous() for t in (index, prefix_lengths, lengths, starts_q, starts_k)
    )
    mask_strides = gate_strides = (0, 0)
    if key_mask is not None:
        key_mask, mask_strides = key_mask.view(torch.uint8), key_mask.stride()
    if gate is not None:
        gate_strides = tuple(0 if size == 1 else step for size, step in zip(gate.shape, gate.stride(), strict=True))
    prefixes, _, prefix_rows, _ = (0, 0, 0, 0) if prefix_k is None else prefix_k.shape
    pointers = (
        q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate,
    )  # fmt: skip
    # A window wider than all there is would overflow sums of 32 bits.
    sizes = (k.shape[1], max_q, max_k, prefixes, prefix_rows, stack, min(window, max_q + max_k))
    steps = (
        *strides(q, packed), *strides(k, packed), *strides(v, packed), *strides(prefix_k), *strides(prefix_v),
        *mask_strides, *gate_strides,
    )  # fmt: skip
    width = q.shape[3]
    flags = {
        "SHARE": share, "ALIGNED": aligned(k, v, prefix_k, prefix_v),
        "CAUSAL": causal, "WINDOWED": window > 0, "LEFT": left, "SOFTCAP": softcap > 0,
        "GROUP": q.shape[1] // k.shape[1], "D": width, "BLOCK_D": max(16, triton.next_power_of_2(width)),
    }  # fmt: skip
    return pointers, sizes, steps, flags


def attend(pointers, sizes, steps, flags, out, lse, to, batch, splits, scale, softcap, tile):
    """Launches the kernel. to: the strides of sample, head and query in out, of sample and head in lse, of a share in both."""
    heads, queries = sizes[:2]
    tiles = triton.cdiv(queries * flags["GROUP"], tile.ROWS)
    if batch * heads * tiles:
        attention_forward_kernel[(batch * heads * tiles * splits,)](
            *pointers, out, lse, *sizes, tiles, splits, *steps, *to, float(scale), float(softcap), **flags,
            ROWS=tile.ROWS, COLUMNS=tile.COLUMNS, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def attention_forward(
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
    *, max_q, max_k, scale, causal, window, left, softcap, launch,
):  # fmt: skip
    """Fills out [B, H, T, D] and lse [B, H, T]. max_q, max_k: the longest sequence (T and S when nothing is packed).

    With launch.splits the columns are shared out, with launch.apart the prefix is read by the queries of the whole batch at
    once, as those of one sample, and its columns are shared out: both for few queries, and the parts are merged.
    """
    packed = starts_q is not None
    filled = dense_rows(out)
    apart = launch.apart if index is None and not packed and share_of(prefix_k, index, q.shape[0])[0] == "batch" else 0
    apart = 0 if gate is not None and gate.shape[0] > 1 else apart
    parts = apart + (1 if packed else launch.splits)
    own = operands(
        q, k, v, None if apart else prefix_k, None if apart else prefix_v, index, None if apart else prefix_lengths, lengths,
        key_mask, starts_q, starts_k, gate, max_q, max_k, causal, window, left, softcap,
    )  # fmt: skip
    batch, heads, queries, width = q.shape
    sequences = starts_q.shape[0] - 1 if packed else batch
    if parts == 1 or not q.numel():
        to = (*strides(filled, packed), *strides(lse, packed)[:2], 0, 0)
        attend(*own, filled, lse, to, sequences, 1, scale, softcap, launch.query)
    else:
        part = torch.empty((parts, heads, batch, queries, width), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((parts, heads, batch, queries), dtype=torch.float32, device=q.device)
        size = batch * queries  # rows of a head in one part, sample by sample
        if apart:
            prefix = operands(
                q.transpose(0, 1).reshape(1, heads, size, width), k[:1, :, :0], v[:1, :, :0], prefix_k, prefix_v, None,
                prefix_lengths, None, None, None, None, gate, size, 0, False, 0, False, softcap,
            )  # fmt: skip
            to = (0, size * width, width, 0, size, heads * size * width, heads * size)
            attend(*prefix, part[:apart], part_lse[:apart], to, 1, apart, scale, softcap, launch.query)
        to = (queries * width, size * width, width, queries, size, heads * size * width, heads * size)
        attend(*own, part[apart:], part_lse[apart:], to, batch, launch.splits, scale, softcap, launch.query)
        block = 16
        attention_merge_kernel[(triton.cdiv(lse.numel(), block),)](
            part, part_lse, filled, lse, parts, lse.numel(), batch, queries, *strides(filled), *strides(lse)[:2],
            D=width, BLOCK_D=max(16, triton.next_power_of_2(width)), ROWS=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if filled is not out:
        out.copy_(filled)
