"""Segmented label maps, and the cross-entropy of what they give: classes that read lists of sources, in one launch.

    x[b, s] = scores[b, s] - prior[s]                                                of logits
    x[b, s] = scores[b, s] - log sum over all u of exp(scores[b, u]) - log prior[s]   of probabilities: log(p / prior)
    z[b, t] = the reduction of x[b, s] over the sources s of class t; of probabilities log(reduction of exp(x)), through
              the largest x of the class. NaN where a member is not a source, and in rows whose map_id is not a map.
    loss[b] = cross-entropy of softmax(z[b]) (of z[b] itself as log-probabilities without RENORMALIZE) and target[b]

scores [B, S] float, any strides; the map as in reference/mapping.py (members, starts: int64, contiguous); map_id and target
int64 [B], prior [S], class weight [T]: any strides. z [B, T] in the scores' dtype, float32 of probabilities or with a loss.

The loss is PyTorch's: with w the class weights and e the smoothing, C = (1 - e) w_y (-log q_y) + e / T sum_t w_t (-log q_t),
and, with focal = gamma, C (1 - q_y)^gamma. The sum of the exponentials is kept without its largest term, which is 1, so
log q_y and 1 - q_y have all their digits next to q_y = 1. The same launch writes the slope d loss / d z [B, T], all that the
backward has to know about the loss. Ignored rows have no loss and no slope; a target that is not a class makes both NaN.

`max` takes the first of equals, and NaN before everything (torch.max along a dimension); `top-k mean` orders entries in the
same way, and `picked` [B, T] is the place of the last one taken. They walk over the class once for each of the k.

Mean and sum of the losses: every program leaves its rows' sums, and one more program adds those in order. Where one program
has all rows (small batches) it writes the result itself: one launch. Always the same bits.

Bytes: the members' sectors of the scores (of probabilities the whole row, and the members once more from the cache), 8 bytes
an entry of the map for every ROWS samples, and for the backward 4 B T. At B=65536, S=1000 in 10 classes of 100, bf16: 131 MB.
FLOPs: about 5 an entry; bound by bytes, and by gathers from the L1 cache where classes are long.
"""

import torch
import triton
import triton.language as tl

from .._shared import rounded

# ---- Sums of exponentials ----


@triton.jit
def log1p(r):
    """log(1 + r) for r >= 0: the error of rounding 1 + r cancels in the quotient."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / (u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0."""
    u = tl.exp(x)
    return tl.where(x < -1.0, u - 1.0, tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u))))


@triton.jit
def power(x, a):
    """x ** a for x >= 0."""
    return tl.where(a == 0.0, 1.0, tl.exp(a * tl.log(x)))


@triton.jit
def extended(m, rest, x):
    """(m, rest) [ROWS, 1] with the columns of x: m is the maximum, 1 + rest = sum exp(x - m). Starts as (-inf, -1)."""
    top = tl.max(x, axis=1)[:, None]
    largest = x == top
    more = tl.sum(tl.where(largest, 0.0, tl.exp(x - top)), axis=1)[:, None]
    more += tl.sum(largest.to(tl.float32), axis=1)[:, None] - 1.0
    f = tl.exp(tl.where(top == m, 0.0, -tl.abs(top - m)))
    rest = tl.where(top > m, (1.0 + rest) * f + more, rest + (1.0 + more) * f)
    return tl.maximum(m, top), rest


@triton.jit
def row_sum(row, live, sources, stride_s, SOURCES: tl.constexpr, ROWS: tl.constexpr):
    """(m, log of the sum of exp(x - m)) [ROWS, 1] of whole rows of the scores."""
    m = tl.full([ROWS, 1], float("-inf"), tl.float32)
    rest = tl.full([ROWS, 1], -1.0, tl.float32)
    for start in range(0, sources, SOURCES):
        s = (start + tl.arange(0, SOURCES)).to(tl.int64)[None, :]
        x = tl.load(row + s * stride_s, mask=live & (s < sources), other=float("-inf")).to(tl.float32)
        m, rest = extended(m, rest, x)
    return m, tl.where(m == float("inf"), float("nan"), log1p(rest))


# ---- Entries ----


@triton.jit
def map_of(map_ptr, b, live, maps, stride_map):
    """(the map of every sample, is it one?): map 0 without map_id."""
    if map_ptr is None:
        n = tl.zeros([1, 1], tl.int64)
        return n, n == 0
    else:
        n = tl.load(map_ptr + b * stride_map, mask=live, other=0)
        known = (n >= 0) & (n < maps)
        return tl.where(known, n, 0), known


@triton.jit
def after(x, place, last, last_place):
    """Whether an entry comes behind another: large before small, NaN first, equals by their place."""
    return tl.where(last == last, (x < last) | ((x == last) & (place > last_place)), (x == x) | (place > last_place))


@triton.jit
def log_prior(prior_ptr, s, known, stride_prior, PROBABILITIES: tl.constexpr):
    """What is subtracted from the score of source s."""
    prior = tl.load(prior_ptr + s * stride_prior, mask=known, other=1.0).to(tl.float32)
    return tl.log(prior) if PROBABILITIES else prior


@triton.jit
def entries(
    row, members_ptr, prior_ptr, live, first, stop, m, logsum, j, sources, stride_s, stride_prior,
    PROBABILITIES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """(x, place in the class, there?) of ENTRIES entries from the j-th on of every class: [ROWS, CLASSES, ENTRIES]."""
    place = j + tl.arange(0, ENTRIES)[None, None, :]
    at = first[:, :, None] + place
    there = at < stop[:, :, None]
    s = tl.load(members_ptr + at, mask=there, other=-1)
    known = (s >= 0) & (s < sources)
    x = tl.load(row[:, :, None] + s * stride_s, mask=known & live[:, :, None], other=0.0).to(tl.float32)
    if PROBABILITIES:
        x = (x - m[:, :, None]) - logsum[:, :, None]
    if prior_ptr is not None:
        x -= log_prior(prior_ptr, s, known, stride_prior, PROBABILITIES)
    return tl.where(known, x, float("nan")), place, there


@triton.jit
def reduced(
    row, members_ptr, weights_ptr, prior_ptr, live, first, stop, m, logsum, longest, k, sources, stride_s, stride_prior,
    REDUCE: tl.constexpr, PROBABILITIES: tl.constexpr, ONCE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """(z, place of the last entry taken by max and top-k mean) of a tile of samples and classes [ROWS, CLASSES]."""
    # Of a sum of exponentials, `best` is the largest x and `total` the sum relative to it.
    best = tl.full([ROWS, CLASSES], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, CLASSES], tl.float32)
    picked = tl.full([ROWS, CLASSES], -1, tl.int32)
    size = (stop - first).to(tl.int32)
    EXPONENTIAL: tl.constexpr = REDUCE == "logsumexp" or (PROBABILITIES and REDUCE != "max" and REDUCE != "first")
    if REDUCE == "max" or REDUCE == "top-k mean":
        last = tl.full([ROWS, CLASSES], float("nan"), tl.float32)
        for i in range(0, k):
            value = tl.full([ROWS, CLASSES], float("-inf"), tl.float32)
            value_at = tl.full([ROWS, CLASSES], -1, tl.int32)
            for j in range(0, ENTRIES if ONCE else longest, ENTRIES):
                x, place, there = entries(
                    row, members_ptr, prior_ptr, live, first, stop, m, logsum, j, sources, stride_s, stride_prior,
                    PROBABILITIES, ENTRIES,
                )  # fmt: skip
                left = there & after(x, place, last[:, :, None], picked[:, :, None])
                nan = left & (x != x)
                has_nan = tl.max(nan.to(tl.int32), axis=2) > 0
                top = tl.max(tl.where(left & (x == x), x, float("-inf")), axis=2)
                hit = tl.where(has_nan[:, :, None], nan, left & (x == top[:, :, None]))
                at = tl.min(tl.where(hit, place, 2147483647), axis=2)
                top = tl.where(has_nan, float("nan"), top)
                better = (at < 2147483647) & ((value_at < 0) | ((value == value) & ((top > value) | has_nan)))
                value = tl.where(better, top, value)
                value_at = tl.where(better, at, value_at)
            # Short classes have no more to give.
            more = i < size
            last = tl.where(more, value, last)
            picked = tl.where(more, value_at, picked)
            if REDUCE == "max":
                total = last
            elif EXPONENTIAL:
                best = tl.where(i == 0, value, best)
                part = tl.where(value == best, 1.0, tl.exp(value - best))
                total += tl.where(more, part, 0.0)
            else:
                total += tl.where(more, value, 0.0)
    else:
        for j in range(0, ENTRIES if ONCE else longest, ENTRIES):
            x, place, there = entries(
                row, members_ptr, prior_ptr, live, first, stop, m, logsum, j, sources, stride_s, stride_prior,
                PROBABILITIES, ENTRIES,
            )  # fmt: skip
            weight = tl.full([1, 1, 1], 1.0, tl.float32)
            if REDUCE == "weighted":
                weight = tl.load(weights_ptr + (first[:, :, None] + place), mask=there, other=0.0).to(tl.float32)
            if EXPONENTIAL:
                x = tl.where(there & (weight != 0.0), x, float("-inf"))
                top = tl.maximum(best, tl.max(x, axis=2))
                part = tl.where(x == top[:, :, None], 1.0, tl.exp(x - top[:, :, None])) * weight
                total *= tl.where(best == top, 1.0, tl.exp(best - top))
                total += tl.sum(tl.where(there, part, 0.0), axis=2)
                best = top
            else:
                total += tl.sum(tl.where(there, x * weight, 0.0), axis=2)
    z = total
    if EXPONENTIAL:
        z = best + tl.log(total)
    if REDUCE == "mean" or REDUCE == "top-k mean":
        count = tl.minimum(size, k).to(tl.float32) if REDUCE == "top-k mean" else size.to(tl.float32)
        z = z - tl.log(count) if EXPONENTIAL else z / count
    return z, picked


# ---- Forward ----


@triton.jit(do_not_specialize=["batch", "longest", "k", "turns"])
def reduce_segments_kernel(
    scores_ptr, members_ptr, starts_ptr, weights_ptr, map_ptr, prior_ptr, target_ptr, weight_ptr,
    out_ptr, kept_ptr, picked_ptr, source_sum_ptr, slope_ptr, losses_ptr, totals_ptr,
    batch, sources, classes, maps, longest, k, turns,
    stride_b, stride_s, stride_map, stride_prior, stride_target, stride_weight,
    smoothing, focal, ignore_index,
    REDUCE: tl.constexpr, PROBABILITIES: tl.constexpr, LOSS: tl.constexpr, RENORMALIZE: tl.constexpr,
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, TOTAL: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ENTRIES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """`turns` times ROWS samples, and all classes of them; without loss or probabilities only CLASSES of them.

    ONCE: no class has more than ENTRIES entries. ALONE: all classes fit in one tile, so z stays in registers.
    TOTAL: "" | "part", the sums of this program's rows | "sum" | "mean", of all rows, by the only program.
    """
    pid = tl.program_id(0).to(tl.int64)
    from_class = 0
    to_class = CLASSES if ALONE else classes
    if not (LOSS or PROBABILITIES or ALONE):
        tiles = tl.cdiv(classes, CLASSES)
        from_class = (pid % tiles).to(tl.int32) * CLASSES
        to_class = from_class + CLASSES
        pid = pid // tiles
    column = tl.arange(0, CLASSES)[None, :]
    loss_total = tl.zeros([ROWS, 1], tl.float32)
    weight_total = tl.zeros([ROWS, 1], tl.float32)
    for turn in range(0, turns):
        b = ((pid * turns + turn) * ROWS + tl.arange(0, ROWS))[:, None]
        live = b < batch
        row = scores_ptr + b * stride_b
        n, known = map_of(map_ptr, b, live, maps, stride_map)
        m = tl.zeros([ROWS, 1], tl.float32)
        logsum = tl.zeros([ROWS, 1], tl.float32)
        if PROBABILITIES:
            m, logsum = row_sum(row, live, sources, stride_s, SOURCES, ROWS)
            if source_sum_ptr is not None:
                tl.store(source_sum_ptr + b * 2, m, mask=live)
                tl.store(source_sum_ptr + b * 2 + 1, logsum, mask=live)
        y = tl.full([ROWS, 1], -1, tl.int64)
        if LOSS:
            y = tl.load(target_ptr + b * stride_target, mask=live, other=-1)
        top = tl.full([ROWS, 1], float("-inf"), tl.float32)
        rest = tl.full([ROWS, 1], -1.0, tl.float32)
        z_y = tl.zeros([ROWS, 1], tl.float32)
        z = tl.zeros([ROWS, CLASSES], tl.float32)
        for start in range(from_class, to_class, CLASSES):
            t = start + column
            there = t < classes
            first = tl.load(starts_ptr + n * classes + t, mask=there, other=0)
            stop = tl.load(starts_ptr + n * classes + t + 1, mask=there, other=0)
            if REDUCE == "first":
                stop = tl.minimum(stop, first + 1)
            z, picked = reduced(
                row, members_ptr, weights_ptr, prior_ptr, live, first, stop, m, logsum, longest, k, sources, stride_s,
                stride_prior, REDUCE, PROBABILITIES, ONCE, ROWS, CLASSES, ENTRIES,
            )  # fmt: skip
            z = tl.where(known, z, float("nan"))
            to = b * classes + t
            if out_ptr is not None:
                tl.store(out_ptr + to, rounded(z, out_ptr.dtype.element_ty), mask=live & there)
            if kept_ptr is not None:
                tl.store(kept_ptr + to, z, mask=live & there)
            if picked_ptr is not None:
                tl.store(picked_ptr + to, picked, mask=live & there)
            if LOSS:
                z = tl.where(there, z, float("-inf"))
                z_y += tl.sum(tl.where(t == y, z, 0.0), axis=1)[:, None]
                if RENORMALIZE:
                    top, rest = extended(top, rest, z)
        if LOSS:
            # log q = (z - top) - log_rest
            log_rest = tl.where(top == float("inf"), float("nan"), log1p(rest))
            if not RENORMALIZE:
                top = tl.zeros([ROWS, 1], tl.float32)
                log_rest = tl.zeros([ROWS, 1], tl.float32)
            valid = (y >= 0) & (y < classes)
            w_y = tl.full([ROWS, 1], 1.0, tl.float32)
            if weight_ptr is not None:
                w_y = tl.load(weight_ptr + y * stride_weight, mask=valid, other=0.0).to(tl.float32)
            log_q_y = (z_y - top) - log_rest
            loss = -w_y * log_q_y
            all_w = tl.zeros([ROWS, 1], tl.float32)
            if not ALONE:
                tl.debug_barrier()  # z comes back from memory, where other threads of this program put it
            if SMOOTH:
                smooth = tl.zeros([ROWS, 1], tl.float32)
                for start in range(from_class, to_class, CLASSES):
                    t = start + column
                    there = t < classes
                    if not ALONE:
                        z = tl.load(kept_ptr + b * classes + t, mask=live & there, other=0.0)
                    w = tl.full([1, CLASSES], 1.0, tl.float32)
                    if weight_ptr is not None:
                        w = tl.load(weight_ptr + t * stride_weight, mask=there, other=0.0).to(tl.float32)
                    w = tl.where(there, w, 0.0)
                    all_w += tl.sum(w, axis=1)[:, None]
                    smooth -= tl.sum(tl.where(there, w * ((z - top) - log_rest), 0.0), axis=1)[:, None]
                loss = (1.0 - smoothing) * loss + smoothing / classes * smooth
            # With focal: loss * (1 - q_y)^focal, whose slope has a second part, along q_y.
            keep = tl.full([ROWS, 1], 1.0, tl.float32)
            fall = tl.zeros([ROWS, 1], tl.float32)
            if FOCAL:
                miss_y = tl.maximum(-expm1(tl.minimum(log_q_y, 0.0)), 0.0)
                miss_y = tl.where(log_q_y == log_q_y, miss_y, float("nan"))
                keep = power(miss_y, focal)
                q_y = tl.exp(log_q_y)
                fall = tl.where((q_y == 0.0) | (miss_y == 0.0), 0.0, loss * q_y * focal * power(miss_y, focal - 1.0))
                loss = tl.where(keep == 0.0, 0.0, keep * loss)
            ignored = y == ignore_index
            valid = valid & (ignored == 0)
            loss = tl.where(valid, loss, tl.where(ignored, 0.0, float("nan")))
            if losses_ptr is not None and TOTAL == "":
                tl.store(losses_ptr + b, loss, mask=live)
            loss_total += tl.where(live, loss, 0.0)
            weight_total += tl.where(live & valid, w_y, 0.0)
            if slope_ptr is not None:
                for start in range(from_class, to_class, CLASSES):
                    t = start + column
                    there = t < classes
                    if not ALONE:
                        z = tl.load(kept_ptr + b * classes + t, mask=live & there, other=0.0)
                    q = tl.zeros([ROWS, CLASSES], tl.float32)
                    miss = tl.where(t == y, -1.0, q)
                    if RENORMALIZE:
                        q = tl.exp((z - top) - log_rest)
                        miss = tl.where(t == y, expm1(log_q_y), q)
                    slope = w_y * miss
                    if SMOOTH:
                        w = tl.full([1, CLASSES], 1.0, tl.float32)
                        if weight_ptr is not None:
                            w = tl.load(weight_ptr + t * stride_weight, mask=there, other=0.0).to(tl.float32)
                        slope = (1.0 - smoothing) * slope + smoothing / classes * (q * all_w - w)
                    if FOCAL:
                        slope = keep * slope + fall * miss
                    slope = tl.where(valid, slope, tl.where(ignored, 0.0, float("nan")))
                    tl.store(slope_ptr + b * classes + t, slope, mask=live & there)
    if TOTAL != "":
        total = tl.sum(loss_total)
        weights = tl.sum(weight_total)
        if TOTAL == "mean":
            total = total / weights
            tl.store(totals_ptr, weights)
        if TOTAL == "part":
            tl.store(totals_ptr + pid * 2, total)
            tl.store(totals_ptr + pid * 2 + 1, weights)
        else:
            tl.store(losses_ptr, total)


@triton.jit(do_not_specialize=["count"])
def total_loss_kernel(parts_ptr, loss_ptr, divisor_ptr, count, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all programs' losses, in order, and of their weights; MEAN: the quotient."""
    loss = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        loss += tl.load(parts_ptr + i * 2, mask=i < count, other=0.0)
        weights += tl.load(parts_ptr + i * 2 + 1, mask=i < count, other=0.0)
    total = tl.sum(loss)
    if MEAN:
        divisor = tl.sum(weights)
        total = total / divisor
        tl.store(divisor_ptr, divisor)
    tl.store(loss_ptr, total)


def simplest(reduce, seg, k):
    """(the reduction, k) that gives the same for this map with the least work."""
    if reduce == "weighted":
        return ("sum" if seg.weights is None else reduce), 0
    if seg.longest == 1:
        return "sum", 0
    return reduce, {"max": 1, "top-k mean": k}.get(reduce, 0)


def reduce_segments(
    scores, seg, map_id=None, prior=None, target=None, weight=None, *, reduce, k=None, probabilities=False, loss=False,
    reduction="none", renormalize=True, smoothing=0.0, focal=0.0, ignore_index=-100, differentiable=True, launch,
):  # fmt: skip
    """The mapped scores or, with `loss`, their cross-entropy; and what the backward needs when `differentiable`.

    Returns (out, losses, divisor, source_sum, kept, picked, slope); those that are not asked for or not needed are empty [0]:
        out: [B, T] without loss: the scores' dtype of logits, float32 of probabilities.
        losses: float32 [B], or [] for a reduction of "mean" or "sum".
        divisor: float32 [], of a mean: what it was divided by, the number of rows that are not ignored or their weights' sum.
        source_sum: float32 [B, 2], of probabilities: the largest score m and log sum exp(score - m).
        kept: float32 [B, T], z where the backward needs it and `out` is not float32.
        picked: int32 [B, T] for max and top-k mean.
        slope: float32 [B, T], d loss / d z.
    """
    batch, sources = scores.shape
    classes = seg.num_classes
    reduce, k = simplest(reduce, seg, k)
    longest = 1 if reduce == "first" else seg.longest
    alone = classes <= launch.CLASSES
    needs_z = differentiable and (reduce == "logsumexp" or (probabilities and reduce not in ("first", "max")))

    def empty(wanted, *shape, dtype=torch.float32):
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=scores.device)

    def given(t):
        return t if t.numel() or t.dim() == 0 else None

    value_dtype = torch.float32 if probabilities else scores.dtype
    out = empty(not loss, batch, classes, dtype=value_dtype)
    total = reduction if loss and reduction != "none" else ""
    losses = empty(loss, *(() if total else (batch,)))
    divisor = empty(total == "mean")
    source_sum = empty(differentiable and probabilities, batch, 2)
    kept = empty((loss and (needs_z or not alone)) or (needs_z and value_dtype != torch.float32), batch, classes)
    picked = empty(differentiable and reduce in ("max", "top-k mean"), batch, classes, dtype=torch.int32)
    slope = empty(differentiable and loss, batch, classes)
    programs = triton.cdiv(batch, launch.ROWS * launch.turns)
    if not (loss or probabilities):
        programs *= triton.cdiv(classes, launch.CLASSES)
    elif total:
        programs = max(programs, 1)
    parts = empty(True, programs, 2) if total and programs > 1 else divisor
    if programs:
        reduce_segments_kernel[(programs,)](
            scores, seg.members, seg.starts, seg.weights if reduce == "weighted" else None, map_id, prior, target, weight,
            given(out), given(kept), given(picked), given(source_sum), given(slope), given(losses), given(parts),
            batch, sources, classes, seg.num_maps, longest, k, launch.turns,
            *scores.stride(), *(t.stride(0) if t is not None else 0 for t in (map_id, prior, target, weight)),
            float(smoothing), float(focal), ignore_index,
            REDUCE=reduce, PROBABILITIES=probabilities, LOSS=loss, RENORMALIZE=renormalize,
            SMOOTH=smoothing != 0, FOCAL=focal != 0, TOTAL=total if programs == 1 else "part" if total else "",
            ONCE=longest <= launch.ENTRIES, ALONE=alone,
            ROWS=launch.ROWS, CLASSES=launch.CLASSES, ENTRIES=launch.ENTRIES, SOURCES=launch.SOURCES,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if total and programs > 1:
        total_loss_kernel[(1,)](
            parts, losses, given(divisor), programs, MEAN=reduction == "mean", BLOCK=1024, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return out, losses, divisor, source_sum, kept, picked, slope
