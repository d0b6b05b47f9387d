"""The gradient of the soft tokens: the sum of all gradient rows that read one. The vocabulary is frozen and gets none.

    d soft[n, j] = scale * sum of g[b, t] over the samples b that read prompt n and the t with ids[b, t] = -1 - j

g [B, T, d] float, any strides; d soft [N, P, d] contiguous; 0 for a slot from lengths[n] on.

First, where each slot stands in each sample: found [2, B, P] int32, its first and last place (T and -1: nowhere). Then a
program owns COLUMNS of one soft token and adds the first places of SAMPLES samples at a time: where every sample holds
its prompt at the same places, that is a strided sum. Further places of one sample are added tile by tile. Sums are float32,
in an order that depends on the shapes alone; long batches are cut into chunks, whose partial sums are added in their order.

Bytes: read the rows of g that belong to soft tokens once, write N * P * d once; the ids once for every COLUMNS slots, and
8 bytes a sample and slot. FLOPs: an addition an element.
"""

import torch
import triton
import triton.language as tl

from .._shared import rounded


@triton.jit(do_not_specialize=["batch", "length", "slots"])
def locate_slots_kernel(
    ids_ptr, found_ptr,
    batch, length, slots,
    stride_ids_b, stride_ids_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS slots of one sample, ROWS of its ids at a time."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(slots, COLUMNS)
    b = pid // tiles
    slot = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    first = tl.full([ROWS, COLUMNS], length, tl.int32)
    last = tl.full([ROWS, COLUMNS], -1, tl.int32)
    for start in range(0, length, ROWS):
        t = start + tl.arange(0, ROWS)[:, None]
        token = tl.load(ids_ptr + b * stride_ids_b + t.to(tl.int64) * stride_ids_t, mask=t < length, other=0)
        reads = token == -1 - slot
        first = tl.minimum(first, tl.where(reads, t, length))
        last = tl.maximum(last, tl.where(reads, t, -1))
    at = found_ptr + b * slots + slot
    tl.store(at, tl.min(first, axis=0)[None, :], mask=slot < slots)
    tl.store(at + batch.to(tl.int64) * slots, tl.max(last, axis=0)[None, :], mask=slot < slots)


@triton.jit(do_not_specialize=["batch", "length", "prompts", "slots", "chunk"])
def soft_gradient_kernel(
    g_ptr, ids_ptr, found_ptr, index_ptr, lengths_ptr, out_ptr,
    batch, length, prompts, slots, chunk,
    stride_gb, stride_gt, stride_gd, stride_ids_b, stride_ids_t, stride_index, stride_lengths,
    scale,
    OWN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one soft token, summed over `chunk` samples."""
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    fits = column < WIDTH
    soft = pid // tiles  # chunk after chunk, all soft tokens
    token = soft % (prompts.to(tl.int64) * slots)
    n = token // slots
    slot = token % slots
    if OWN:
        begin = n
        end = n + 1
    else:
        begin = soft // (prompts.to(tl.int64) * slots) * chunk
        end = tl.minimum(begin + chunk, batch)
    if lengths_ptr is not None:
        end = tl.where(slot < tl.load(lengths_ptr + n * stride_lengths), end, begin)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    row = tl.arange(0, ROWS)
    for start in range(begin, end, ROWS):
        b = start + row.to(tl.int64)
        mine = b < end
        if index_ptr is not None:
            mine = mine & (tl.load(index_ptr + b * stride_index, mask=mine, other=-1) == n)
        first = tl.load(found_ptr + b * slots + slot, mask=mine, other=length)
        last = tl.load(found_ptr + (batch + b) * slots + slot, mask=mine, other=-1)
        at = g_ptr + b * stride_gb + first.to(tl.int64) * stride_gt
        reads = (first <= last)[:, None] & fits
        total += tl.load(at[:, None] + column * stride_gd, mask=reads, other=0.0).to(tl.float32)
        if tl.max(last - first) > 0:
            for i in range(0, ROWS):
                after = tl.sum(tl.where(row == i, first, 0)) + 1
                stop = tl.sum(tl.where(row == i, last, 0)) + 1
                for again in range(after, stop, ROWS):
                    t = (again + row).to(tl.int64)
                    held = tl.load(ids_ptr + (start + i) * stride_ids_b + t * stride_ids_t, mask=t < stop, other=0)
                    at = g_ptr + (start + i) * stride_gb + t * stride_gt
                    reads = (held == -1 - slot)[:, None] & fits
                    total += tl.load(at[:, None] + column * stride_gd, mask=reads, other=0.0).to(tl.float32)
    value = tl.sum(total, axis=0)[None, :] * scale
    tl.store(out_ptr + soft * WIDTH + column, rounded(value, out_ptr.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["count", "chunks"])
def soft_gradient_sum_kernel(partial_ptr, out_ptr, count, chunks, scale, COLUMNS: tl.constexpr):
    """The chunks' partial sums [chunks, count], added in their order."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    row = partial_ptr
    for _ in range(0, chunks):
        total += tl.load(row + at, mask=at < count, other=0.0)
        row += count
    tl.store(out_ptr + at, rounded(total * scale, out_ptr.dtype.element_ty), mask=at < count)


def soft_gradient(g, ids, index, lengths, prompts, slots, scale, dtype, launches):
    """d soft [N, P, d] in a dtype; `launches` are those of locating, adding and adding the chunks."""
    locate, add, add_chunks = launches
    batch, length, width = g.shape
    out = torch.empty((prompts, slots, width), dtype=dtype, device=g.device)
    if not out.numel():
        return out
    found = torch.empty((2, batch, slots), dtype=torch.int32, device=g.device)
    if batch:
        locate_slots_kernel[(batch * triton.cdiv(slots, locate.COLUMNS),)](
            ids, found, batch, length, slots, *ids.stride(),
            ROWS=locate.ROWS, COLUMNS=locate.COLUMNS, num_warps=locate.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    own = index is None and prompts > 1
    programs = prompts * slots * triton.cdiv(width, add.COLUMNS)
    chunks = 1 if own else add.chunks(batch, programs)
    partial = out if chunks == 1 else torch.empty((chunks, *out.shape), dtype=torch.float32, device=g.device)
    soft_gradient_kernel[(programs * chunks,)](
        g, ids, found, index, lengths, partial,
        batch, length, prompts, slots, triton.cdiv(batch, chunks),
        *g.stride(), *ids.stride(),
        0 if index is None else index.stride(0), 0 if lengths is None else lengths.stride(0),
        scale if chunks == 1 else 1.0,
        OWN=own, WIDTH=width, ROWS=add.ROWS, COLUMNS=add.COLUMNS, num_warps=add.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    if chunks > 1:
        soft_gradient_sum_kernel[(triton.cdiv(out.numel(), add_chunks.COLUMNS),)](
            partial, out, out.numel(), chunks, scale,
            COLUMNS=add_chunks.COLUMNS, num_warps=add_chunks.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
