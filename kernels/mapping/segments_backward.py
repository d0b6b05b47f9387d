"""The gradient of a segmented label map, with or without its loss: dense, every element written once by its source.

    G[b, t] = g[b, t], or with a loss g[b] / divisor * slope[b, t]                  what arrives at z[b, t]
    d scores[b, s] = sum over the entries of source s, in their order, of G[b, class] * c,  and 0 where there are none
    c: logits        mean, top-k mean 1 / entries   sum, first, max 1   weighted w   logsumexp exp(x[b, s] - z[b, class])
       probabilities (the same, but 1 / entries and w) * exp(x[b, s] - z[b, class]) and, unless the loss has divided by the
                     sum over the classes, less softmax(scores)[b, s] * sum over t of G[b, t]

x, z and the saved tensors as in segments.py. g [B, T] or [B] (stride 0 for a mean or a sum): any strides. Only what was
taken by first, max and top-k mean gets something; a sum of exponentials without mass (z = -inf) gives nothing. `order` and
`readers` say who reads a source: no memset, no scatter, no sort, no atomic; the same bits every time.

A row is NaN where its map_id is not a map or its target not a class.

Bytes: write B * S, read 4 B T from the cache for every tile of sources, and of probabilities, logsumexp and top-k mean the
scores once more. At B=65536, S=1000 in 10 classes, bf16: 131 MB + 2.6 MB. FLOPs: 1 to 4 an element and an exponential.
"""

import torch
import triton
import triton.language as tl

from .._shared import rounded
from .segments import after, log_prior, map_of, simplest, vector_of


@triton.jit
def reading(
    order_ptr, owner_ptr, starts_ptr, weights_ptr, entry_at, reads, n, classes, k,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """(class, place in it, factor) of the entries order[entry_at]; a factor of 0 for what is never taken."""
    entry = tl.load(order_ptr + entry_at, mask=reads, other=0)
    t = tl.load(owner_ptr + entry, mask=reads, other=0).to(tl.int32)
    first = tl.load(starts_ptr + n * classes + t, mask=reads, other=0)
    place = (entry - first).to(tl.int32)
    factor = tl.where(reads, 1.0, 0.0)
    if REDUCE == "mean" or REDUCE == "top-k mean":
        size = (tl.load(starts_ptr + n * classes + t + 1, mask=reads, other=1) - first).to(tl.int32)
        factor = factor / (tl.minimum(size, k) if REDUCE == "top-k mean" else size).to(tl.float32)
    elif REDUCE == "weighted":
        factor *= tl.load(weights_ptr + entry, mask=reads, other=0.0).to(tl.float32)
    elif REDUCE == "first":
        factor = tl.where(place == 0, factor, 0.0)
    return t, first, place, factor


@triton.jit
def arriving(g_ptr, slope_ptr, scale, b, t, wanted, classes, stride_gb, stride_gt):
    """G at (b, t); with a loss `scale` is g[b] / divisor."""
    if slope_ptr is None:
        return tl.load(g_ptr + b * stride_gb + t.to(tl.int64) * stride_gt, mask=wanted, other=0.0).to(tl.float32)
    else:
        return scale * tl.load(slope_ptr + b * classes + t, mask=wanted, other=0.0)


@triton.jit
def coefficient(
    row, members_ptr, prior_ptr, z_ptr, picked_ptr, b, t, first, place, factor, x, m, logsum, wanted, classes,
    stride_s, stride_prior, SOURCES: tl.constexpr, REDUCE: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """c of an entry in a row."""
    c = factor
    if REDUCE == "max" or REDUCE == "top-k mean":
        last = tl.load(picked_ptr + b * classes + t, mask=wanted, other=-1)
        if REDUCE == "max":
            taken = place == last
        else:
            s = tl.load(members_ptr + first + last, mask=wanted, other=0)
            known = wanted & (s >= 0) & (s < SOURCES)
            last_x = tl.load(row + s * stride_s, mask=known, other=0.0).to(tl.float32)
            if PROBABILITIES:
                last_x = (last_x - m) - logsum
            if prior_ptr is not None:
                last_x -= log_prior(prior_ptr, s, known, stride_prior, PROBABILITIES)
            last_x = tl.where(known, last_x, float("nan"))
            taken = after(x, place, last_x, last) == 0
        c = tl.where(taken, c, 0.0)
    if REDUCE == "logsumexp" or (PROBABILITIES and REDUCE != "max" and REDUCE != "first"):
        z = tl.load(z_ptr + b * classes + t, mask=wanted, other=0.0)
        c = tl.where((z == float("-inf")) | (c == 0.0), 0.0, c * tl.exp(x - z))
    return c


@triton.jit(do_not_specialize=["batch", "k", "turns"])
def reduce_segments_gradient_kernel(
    g_ptr, slope_ptr, divisor_ptr, scores_ptr, members_ptr, starts_ptr, order_ptr, readers_ptr, owner_ptr, weights_ptr,
    map_ptr, prior_ptr, target_ptr, z_ptr, picked_ptr, source_sum_ptr, out_ptr,
    batch, classes, maps, k, turns,
    stride_gb, stride_gt, stride_b, stride_s, stride_map, stride_prior, stride_target,
    ignore_index,
    SOURCES: tl.constexpr, VECTOR: tl.constexpr, REDUCE: tl.constexpr, PROBABILITIES: tl.constexpr, FREE: tl.constexpr,
    ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """`turns` times ROWS samples and COLUMNS sources. ONCE: no source has two entries. FREE: the classes' sum is not 1."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(SOURCES, COLUMNS)
    s = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = s < SOURCES
    NEEDS_X: tl.constexpr = PROBABILITIES or REDUCE == "logsumexp" or REDUCE == "top-k mean"
    # With one map for all samples, who reads a source is looked up once for all rows.
    SHARED: tl.constexpr = map_ptr is None
    n = tl.zeros([1, 1], tl.int64)
    begin = tl.load(readers_ptr + n * SOURCES + s, mask=inside, other=0)
    count = (tl.load(readers_ptr + n * SOURCES + s + 1, mask=inside, other=0) - begin).to(tl.int32)
    t, first, place, factor = reading(order_ptr, owner_ptr, starts_ptr, weights_ptr, begin, count > 0, n, classes, k, REDUCE)
    shift = tl.zeros([1, COLUMNS], tl.float32)
    if NEEDS_X and prior_ptr is not None:
        shift = log_prior(prior_ptr, s, inside, stride_prior, PROBABILITIES)
    for turn in range(0, turns):
        b = ((pid // tiles * turns + turn) * ROWS + tl.arange(0, ROWS))[:, None]
        live = b < batch
        row = scores_ptr + b * stride_b
        known = live
        if not SHARED:
            n, known = map_of(map_ptr, b, live, maps, stride_map)
            begin = tl.load(readers_ptr + n * SOURCES + s, mask=live & inside, other=0)
            count = (tl.load(readers_ptr + n * SOURCES + s + 1, mask=live & inside, other=0) - begin).to(tl.int32)
            t, first, place, factor = reading(
                order_ptr, owner_ptr, starts_ptr, weights_ptr, begin, count > 0, n, classes, k, REDUCE
            )
        scale = tl.full([ROWS, 1], 1.0, tl.float32)
        if slope_ptr is not None:
            scale = tl.load(g_ptr + b * stride_gb, mask=live, other=0.0).to(tl.float32)
            if divisor_ptr is not None:
                divisor = tl.load(divisor_ptr)
                scale = tl.where(divisor == 0.0, 0.0, scale / divisor)
            y = tl.load(target_ptr + b * stride_target, mask=live, other=ignore_index)
            known = known & (((y >= 0) & (y < classes)) | (y == ignore_index))
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        m = tl.zeros([ROWS, 1], tl.float32)
        logsum = tl.zeros([ROWS, 1], tl.float32)
        if NEEDS_X:
            offset = b * stride_b + s * stride_s
            if VECTOR > 1:
                offset = tl.max_contiguous(tl.multiple_of(offset, [1, VECTOR]), [1, VECTOR])  # by stride_b
            x = tl.load(scores_ptr + offset, mask=live & inside, other=0.0).to(tl.float32)
        if PROBABILITIES:
            m = tl.load(source_sum_ptr + b * 2, mask=live, other=0.0)
            logsum = tl.load(source_sum_ptr + b * 2 + 1, mask=live, other=0.0)
            x = (x - m) - logsum
        d = tl.zeros([ROWS, COLUMNS], tl.float32)
        if FREE:
            for start in range(0, classes, CLASSES):
                column = (start + tl.arange(0, CLASSES))[None, :]
                wanted = live & (column < classes)
                G = arriving(g_ptr, slope_ptr, scale, b, column, wanted, classes, stride_gb, stride_gt)
                if REDUCE != "max" and REDUCE != "first":
                    z = tl.load(z_ptr + b * classes + column, mask=wanted, other=0.0)
                    G = tl.where(z == float("-inf"), 0.0, G)
                d -= tl.sum(G, axis=1)[:, None]
            d *= tl.exp(x)
        x -= shift

        wanted = live & (count > 0)
        c = coefficient(
            row, members_ptr, prior_ptr, z_ptr, picked_ptr, b, t, first, place, factor, x, m, logsum, wanted, classes,
            stride_s, stride_prior, SOURCES, REDUCE, PROBABILITIES,
        )  # fmt: skip
        G = arriving(g_ptr, slope_ptr, scale, b, t, wanted, classes, stride_gb, stride_gt)
        d += tl.where(c == 0.0, 0.0, G * c)
        if not ONCE:
            for j in range(1, tl.max(count)):
                reads = j < count
                t_j, first_j, place_j, factor_j = reading(
                    order_ptr, owner_ptr, starts_ptr, weights_ptr, begin + j, reads, n, classes, k, REDUCE
                )
                wanted = live & reads
                c = coefficient(
                    row, members_ptr, prior_ptr, z_ptr, picked_ptr, b, t_j, first_j, place_j, factor_j, x, m, logsum, wanted,
                    classes, stride_s, stride_prior, SOURCES, REDUCE, PROBABILITIES,
                )  # fmt: skip
                G = arriving(g_ptr, slope_ptr, scale, b, t_j, wanted, classes, stride_gb, stride_gt)
                d += tl.where(c == 0.0, 0.0, G * c)
        d = tl.where(known, d, float("nan"))
        tl.store(out_ptr + b * SOURCES + s, rounded(d, out_ptr.dtype.element_ty), mask=live & inside)


def reduce_segments_gradient(
    g, scores, seg, map_id, prior, target, out, divisor, source_sum, kept, picked, slope, *, reduce, k=None,
    probabilities=False, loss=False, renormalize=True, ignore_index=-100, launch,
):  # fmt: skip
    """d scores [B, S] in the scores' dtype, from what `reduce_segments` returned. g: [B, T], or [B] or [] with a loss."""
    batch, sources = scores.shape
    reduce, k = simplest(reduce, seg, k)
    d = torch.empty((batch, sources), dtype=scores.dtype, device=scores.device)
    strides = g.stride() if not loss else (g.stride(0) if g.dim() else 0, 0)
    if d.numel():
        programs = triton.cdiv(batch, launch.ROWS * launch.turns) * triton.cdiv(sources, launch.COLUMNS)
        reduce_segments_gradient_kernel[(programs,)](
            g, slope if loss else None, None if divisor.dim() else divisor, scores, seg.members, seg.starts, seg.order,
            seg.readers, seg.owner, seg.weights if reduce == "weighted" else None, map_id, prior, target if loss else None,
            kept if kept.numel() else out, picked, source_sum, d,
            batch, seg.num_classes, seg.num_maps, k, launch.turns, *strides, *scores.stride(),
            *(t.stride(0) if t is not None else 0 for t in (map_id, prior, target)), ignore_index,
            SOURCES=sources, VECTOR=vector_of(scores), REDUCE=reduce, PROBABILITIES=probabilities,
            FREE=probabilities and not (loss and renormalize),
            ONCE=seg.busiest == 1, ROWS=launch.ROWS, COLUMNS=launch.COLUMNS, CLASSES=launch.CLASSES,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return d
