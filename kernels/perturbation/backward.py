"""Gradients of the prompted input, each in one pass over the incoming gradient g.

    d delta[n] = slope(delta[n], M) * sum over the samples b of prompt n of g[b] / std        (clamped samples excepted)
    d x[b]     = crop(g[b]) / std                                  d cells[b, patch] = sum over the patch of g * p / std

The prompt's gradient is summed over the batch in ordered float32 partials: a program walks over its chunk of samples, a
second kernel adds the chunks in order and multiplies by the slope. No atomics: the result is the same bits every time.
Only the trainable positions of g are read: with a HOLE (the image under a padded prompt) the positions around it are
enumerated densely, so no lane and no byte is spent inside.

Bytes at B=256, 3x224x224, bf16 g: 77.1 MB without a hole, 21.0 MB for a 16-pixel frame, plus 2 x 4 bytes a trainable
position and chunk. FLOPs: one addition an element of g.
"""

import math

import torch
import triton
import triton.language as tl

from .pixel import coordinates, image_of, image_pixel, mask_value, prompt_offset, prompt_slope, prompt_value, within


@triton.jit
def dense_to_pixel(k, WINDOW: tl.constexpr, HOLE: tl.constexpr):
    """The k-th pixel of the window outside the hole, in reading order: (row, column) on the canvas."""
    TOP: tl.constexpr = (HOLE[0] - WINDOW[0]) * WINDOW[3]
    LEFT: tl.constexpr = HOLE[1] - WINDOW[1]
    SIDES: tl.constexpr = WINDOW[3] - HOLE[3]
    if HOLE[2] * HOLE[3] == 0:
        return WINDOW[0] + k // WINDOW[3], WINDOW[1] + k % WINDOW[3]
    elif SIDES == 0:
        flat = tl.where(k < TOP, k, k + HOLE[2] * WINDOW[3])
        return WINDOW[0] + flat // WINDOW[3], WINDOW[1] + flat % WINDOW[3]
    else:
        j = k - TOP
        side = j % SIDES
        beside_y = HOLE[0] - WINDOW[0] + j // SIDES
        beside_x = tl.where(side < LEFT, side, side + HOLE[3])
        flat = tl.where(k < TOP, k, k + HOLE[2] * HOLE[3])
        beside = (k >= TOP) & (j < HOLE[2] * SIDES)
        y = tl.where(beside, beside_y, flat // WINDOW[3])
        x = tl.where(beside, beside_x, flat % WINDOW[3])
        return WINDOW[0] + y, WINDOW[1] + x


@triton.jit
def pixel_to_dense(y, x, WINDOW: tl.constexpr, HOLE: tl.constexpr):
    """The inverse of `dense_to_pixel`, for pixels of the window outside the hole."""
    row = y - WINDOW[0]
    column = x - WINDOW[1]
    flat = row * WINDOW[3] + column
    if HOLE[2] * HOLE[3] == 0:
        return flat
    else:
        above: tl.constexpr = HOLE[0] - WINDOW[0]
        left: tl.constexpr = HOLE[1] - WINDOW[1]
        skipped = tl.where(row < above, 0, tl.minimum(row - above, HOLE[2]) * HOLE[3])
        beside = (row >= above) & (row < above + HOLE[2]) & (column >= left)
        return flat - skipped - tl.where(beside, HOLE[3], 0)


@triton.jit(do_not_specialize=["images", "batch", "prompts", "chunk"], do_not_specialize_on_alignment=["rows_ptr"])
def prompt_gradient_kernel(
    g_ptr, x_ptr, rows_ptr, prompt_ptr, mask_ptr, index_ptr, norm_ptr, first_ptr, taps_ptr, out_ptr,
    images, batch, prompts, chunk,
    stride_gk, stride_gb, stride_gc, stride_gy, stride_gx,
    stride_b, stride_c, stride_y, stride_x,
    scale,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    IMAGE: tl.constexpr, COPIES: tl.constexpr, PERIOD: tl.constexpr, WINDOW: tl.constexpr, HOLE: tl.constexpr,
    SHARE: tl.constexpr, SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_CHANNELS: tl.constexpr,
    NORMALIZED: tl.constexpr, CLAMP: tl.constexpr, CHANNELS_LAST: tl.constexpr, TAPS: tl.constexpr,
    FINAL: tl.constexpr, VECTOR: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program sums g over its chunk of samples at BLOCK positions of one prompt.

    FINAL: there is one chunk, so the slope is applied here and out is the gradient [N, C, window]. Otherwise out is the
    partial sums [splits, N, C, positions outside the hole].
    """
    PIXELS: tl.constexpr = WINDOW[2] * WINDOW[3] if FINAL else WINDOW[2] * WINDOW[3] - HOLE[2] * HOLE[3]
    TILES: tl.constexpr = (C * PIXELS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    n = (pid // TILES % prompts).to(tl.int64)
    split = pid // TILES // prompts
    e = (pid % TILES * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = e < C * PIXELS
    c, _, column = coordinates(e, C, 1, PIXELS, CHANNELS_LAST)
    if FINAL:
        y, x = WINDOW[0] + column // WINDOW[3], WINDOW[1] + column % WINDOW[3]
    else:
        y, x = dense_to_pixel(column, WINDOW, HOLE)
    wanted = valid
    if FINAL and HOLE[2] * HOLE[3] > 0:
        wanted = wanted & (within(y, x, HOLE) == 0)
    offset = c * stride_gc + y * stride_gy + x * stride_gx
    if VECTOR > 1:
        # Runs of VECTOR positions lie side by side in g and start on a multiple of it (checked on the host).
        offset = tl.max_contiguous(tl.multiple_of(offset, [1, VECTOR]), [1, VECTOR])

    p = tl.zeros([1, BLOCK], tl.float32)
    mean = p
    gain = tl.load(norm_ptr + C + c, mask=valid, other=0.0)
    low = p
    high = p
    if CLAMP or FINAL:
        at = n * (C * WINDOW[2] * WINDOW[3]) + prompt_offset(c, y, x, WINDOW)
        delta = tl.load(prompt_ptr + at, mask=valid, other=0.0).to(tl.float32)
        m = mask_value(mask_ptr, c, y, x, valid, C, H, W, WINDOW, HOLE, MASK_CHANNELS)
    if CLAMP:
        p = prompt_value(delta, m, scale, SQUASH, MASK_FIRST)
        mean = tl.load(norm_ptr + c, mask=valid, other=0.0)
        low = tl.load(norm_ptr + 2 * C + c, mask=valid, other=0.0)
        high = tl.load(norm_ptr + 3 * C + c, mask=valid, other=0.0)

    total = tl.zeros([SAMPLES, BLOCK], tl.float32)
    start = n.to(tl.int32) if SHARE == "sample" else split * chunk
    stop = start + 1 if SHARE == "sample" else tl.minimum(start + chunk, batch)
    for b0 in range(start, stop, SAMPLES):
        b = b0 + tl.arange(0, SAMPLES)[:, None]
        image, take = image_of(rows_ptr, images, b, b < stop, TAPS)  # a row out of range has no gradient
        if SHARE == "index":
            take = take & (tl.load(index_ptr + b, mask=take, other=-1).to(tl.int64) == n)
        source = g_ptr + b.to(tl.int64) * stride_gb
        if SHARE == "product":
            source = source + n * stride_gk
        g = tl.load(source + offset, mask=take & wanted, other=0.0).to(tl.float32)
        if CLAMP:
            pixel, inside = image_pixel(
                x_ptr, first_ptr, taps_ptr, image, c, y, x, take & wanted, stride_b, stride_c, stride_y, stride_x,
                IMAGE, COPIES, PERIOD, TAPS, 1,
            )  # fmt: skip
            v = p + (tl.where(inside, (pixel - mean) * gain, 0.0) if NORMALIZED else tl.where(inside, pixel, 0.0))
            g = tl.where((v < low) | (v > high), 0.0, g)
        total += g
    d = tl.sum(total, axis=0)[None, :]
    if not NORMALIZED:
        d *= gain
    if FINAL:
        d *= prompt_slope(delta, m, scale, SQUASH, MASK_FIRST)
        tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=valid)
    else:
        to = (split.to(tl.int64) * prompts + n) * (C * PIXELS) + c * PIXELS + column
        tl.store(out_ptr + to, d, mask=valid)


@triton.jit(do_not_specialize=["prompts", "splits"])
def prompt_gradient_sum_kernel(
    partial_ptr, prompt_ptr, mask_ptr, out_ptr, prompts, splits, scale,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, HOLE: tl.constexpr,
    SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] = slope(delta[n]) * (partial[0, n] + partial[1, n] + ...), 0 inside the hole."""
    PIXELS: tl.constexpr = WINDOW[2] * WINDOW[3] - HOLE[2] * HOLE[3]
    SIZE: tl.constexpr = C * WINDOW[2] * WINDOW[3]
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    n = (pid // TILES).to(tl.int64)
    e = pid % TILES * BLOCK + tl.arange(0, BLOCK)
    valid = e < SIZE
    c, y, x = coordinates(e, C, WINDOW[2], WINDOW[3], False)
    y += WINDOW[0]
    x += WINDOW[1]
    wanted = valid
    if HOLE[2] * HOLE[3] > 0:
        wanted = wanted & (within(y, x, HOLE) == 0)
    source = partial_ptr + n * (C * PIXELS) + c * PIXELS + pixel_to_dense(y, x, WINDOW, HOLE)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(source, mask=wanted, other=0.0)
        source += prompts * (C * PIXELS)
    delta = tl.load(prompt_ptr + n * SIZE + e, mask=valid, other=0.0).to(tl.float32)
    m = mask_value(mask_ptr, c, y, x, valid, C, H, W, WINDOW, HOLE, MASK_CHANNELS)
    total *= prompt_slope(delta, m, scale, SQUASH, MASK_FIRST)
    tl.store(out_ptr + n * SIZE + e, total.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["total", "prompts"])
def image_gradient_kernel(
    g_ptr, x_ptr, prompt_ptr, mask_ptr, cells_ptr, index_ptr, norm_ptr, first_ptr, taps_ptr, out_ptr,
    total, prompts,
    stride_gk, stride_gb, stride_gc, stride_gy, stride_gx,
    stride_b, stride_c, stride_y, stride_x,
    scale,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    IMAGE: tl.constexpr, COPIES: tl.constexpr, PERIOD: tl.constexpr, WINDOW: tl.constexpr, HOLE: tl.constexpr,
    SHARE: tl.constexpr, SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_CHANNELS: tl.constexpr,
    CELL_CHANNELS: tl.constexpr, CELLS: tl.constexpr,
    NORMALIZED: tl.constexpr, CLAMP: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, C, image height, image width] = g at the image's place / std, summed over its copies and over the prompts."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < total
    SIZE: tl.constexpr = C * IMAGE[2] * IMAGE[3]
    b = e // SIZE
    c, row, column = coordinates((e % SIZE).to(tl.int32), C, IMAGE[2], IMAGE[3], False)
    y = row + IMAGE[0]
    mean = tl.load(norm_ptr + c, mask=live, other=0.0)
    gain = tl.load(norm_ptr + C + c, mask=live, other=0.0)
    low = tl.load(norm_ptr + 2 * C + c, mask=live, other=0.0)
    high = tl.load(norm_ptr + 3 * C + c, mask=live, other=0.0)
    d = tl.zeros([BLOCK], tl.float32)
    for copy in range(COPIES):
        x = column + IMAGE[1] + copy * PERIOD
        for k in range(prompts if SHARE == "product" else 1):
            at = b * stride_gb + c * stride_gc + y * stride_gy + x * stride_gx
            g = tl.load(g_ptr + at + k * stride_gk, mask=live, other=0.0).to(tl.float32)
            if CLAMP:
                p = tl.zeros([BLOCK], tl.float32)
                if SHARE != "none":
                    if SHARE == "index":
                        n = tl.load(index_ptr + b, mask=live, other=0).to(tl.int64)
                    elif SHARE == "sample":
                        n = b
                    else:
                        n = b * 0 + k
                    covered = live & within(y, x, WINDOW) & (n >= 0) & (n < prompts)
                    source = n * (C * WINDOW[2] * WINDOW[3]) + prompt_offset(c, y, x, WINDOW)
                    delta = tl.load(prompt_ptr + source, mask=covered, other=0.0).to(tl.float32)
                    m = mask_value(mask_ptr, c, y, x, live, C, H, W, WINDOW, HOLE, MASK_CHANNELS)
                    p = prompt_value(delta, m, scale, SQUASH, MASK_FIRST)
                if CELL_CHANNELS > 0:
                    plane = c if CELL_CHANNELS == C else c * 0
                    cell = (plane * (H // CELLS[0]) + y // CELLS[0]) * (W // CELLS[1]) + x // CELLS[1]
                    grid = CELL_CHANNELS * (H // CELLS[0]) * (W // CELLS[1])
                    p *= tl.load(cells_ptr + b * grid + cell, mask=live, other=0.0).to(tl.float32)
                pixel, _ = image_pixel(
                    x_ptr, first_ptr, taps_ptr, b, c, y, x, live, stride_b, stride_c, stride_y, stride_x,
                    IMAGE, COPIES, PERIOD, TAPS, 1,
                )  # fmt: skip
                v = (pixel - mean) * gain + p if NORMALIZED else pixel + p
                g = tl.where((v < low) | (v > high), 0.0, g)
            d += g
    tl.store(out_ptr + e, (d * gain).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["images", "batch", "chunk"], do_not_specialize_on_alignment=["rows_ptr"])
def cells_gradient_kernel(
    g_ptr, x_ptr, rows_ptr, prompt_ptr, mask_ptr, cells_ptr, norm_ptr, first_ptr, taps_ptr, cells_out_ptr, partial_ptr,
    images, batch, chunk,
    stride_gb, stride_gc, stride_gy, stride_gx,
    stride_b, stride_c, stride_y, stride_x,
    scale,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    IMAGE: tl.constexpr, COPIES: tl.constexpr, PERIOD: tl.constexpr, WINDOW: tl.constexpr, HOLE: tl.constexpr,
    SQUASH: tl.constexpr, MASK_CHANNELS: tl.constexpr, CELL_CHANNELS: tl.constexpr, CELLS: tl.constexpr,
    NORMALIZED: tl.constexpr, CLAMP: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS: tl.constexpr, PATCHES: tl.constexpr, AREA: tl.constexpr,
):  # fmt: skip
    """Sample-specific masks: the pattern's partial sums and the gradient of every cell, reading g once.

    A tile is [CHANNELS, PATCHES, AREA]: the channels that share a cell, some patches, the pixels of a patch (each padded
    to a power of two). partial [splits, C, H, W] has the whole canvas as its window.
    """
    GROUP: tl.constexpr = C if CELL_CHANNELS == 1 else 1
    ROWS: tl.constexpr = H // CELLS[0]
    COLUMNS: tl.constexpr = W // CELLS[1]
    TILES: tl.constexpr = (ROWS * COLUMNS + PATCHES - 1) // PATCHES
    pid = tl.program_id(0)
    plane = pid // TILES % CELL_CHANNELS
    split = pid // TILES // CELL_CHANNELS
    c = (plane * GROUP + tl.arange(0, CHANNELS))[:, None, None]
    patch = (pid % TILES * PATCHES + tl.arange(0, PATCHES))[None, :, None]
    area = tl.arange(0, AREA)[None, None, :]
    y = patch // COLUMNS * CELLS[0] + area // CELLS[1]
    x = patch % COLUMNS * CELLS[1] + area % CELLS[1]
    valid = (tl.arange(0, CHANNELS)[:, None, None] < GROUP) & (patch < ROWS * COLUMNS) & (area < CELLS[0] * CELLS[1])
    gain = tl.load(norm_ptr + C + c, mask=valid, other=0.0)
    mean = tl.load(norm_ptr + c, mask=valid, other=0.0)
    low = tl.load(norm_ptr + 2 * C + c, mask=valid, other=0.0)
    high = tl.load(norm_ptr + 3 * C + c, mask=valid, other=0.0)
    covered = valid & within(y, x, WINDOW)
    delta = tl.load(prompt_ptr + prompt_offset(c, y, x, WINDOW), mask=covered, other=0.0).to(tl.float32)
    m = mask_value(mask_ptr, c, y, x, valid, C, H, W, WINDOW, HOLE, MASK_CHANNELS)
    p = prompt_value(delta, m, scale, SQUASH, False)
    unit = valid.to(tl.float32) if NORMALIZED else gain
    total = tl.zeros([CHANNELS, PATCHES, AREA], tl.float32)
    for b in range(split * chunk, tl.minimum(split * chunk + chunk, batch)):
        sample = tl.zeros([1, 1, 1], tl.int64) + b
        cell_at = (sample * CELL_CHANNELS + plane) * (ROWS * COLUMNS) + patch
        known = patch < ROWS * COLUMNS
        image, there = image_of(rows_ptr, images, sample, sample < batch, TAPS)
        take = valid & there
        cell = tl.load(cells_ptr + cell_at, mask=known, other=0.0).to(tl.float32)
        at = sample * stride_gb + c * stride_gc + y * stride_gy + x * stride_gx
        g = tl.load(g_ptr + at, mask=take, other=0.0).to(tl.float32) * unit
        if CLAMP:
            pixel, inside = image_pixel(
                x_ptr, first_ptr, taps_ptr, image, c, y, x, take, stride_b, stride_c, stride_y, stride_x,
                IMAGE, COPIES, PERIOD, TAPS, 1,
            )  # fmt: skip
            base = tl.where(inside, (pixel - mean) * gain, 0.0) if NORMALIZED else tl.where(inside, pixel, 0.0)
            v = base + p * cell
            g = tl.where((v < low) | (v > high), 0.0, g)
        total += g * cell
        d_cell = tl.sum(tl.sum(g * p, axis=2), axis=0)[None, :, None]
        tl.store(cells_out_ptr + cell_at, d_cell.to(cells_out_ptr.dtype.element_ty), mask=known)
    to = ((split.to(tl.int64) * C + c) * H + y) * W + x
    tl.store(partial_ptr + to, total, mask=valid)


def run_length(g, flags, channels_last):
    """How many neighbouring positions (a power of two, at most 16) always lie side by side and aligned in g."""
    _, left, _, width = flags["WINDOW"]
    _, hole_left, _, hole_width = flags["HOLE"]
    *outer, stride_c, stride_y, stride_x = g.stride()
    channels = flags["C"]
    if channels_last:
        if stride_c != 1 or stride_x != channels:
            return 1
        edges = [channels * edge for edge in (left, width, hole_left - left, hole_width)]
    elif stride_x == 1:
        edges = [left, width, hole_left - left, hole_width, stride_c]
    else:
        return 1
    return math.gcd(16, *edges, stride_y, *outer, g.storage_offset())


def strides_of(x):
    """x is read again only where samples were clamped; elsewhere it is None."""
    return (0, 0, 0, 0) if x is None else x.stride()


def prompt_gradient(g, x, rows, images, prompt, mask, index, norm, first, taps, scale, flags, launch):
    """d prompt [N, C, h', w'] in the prompt's dtype; g is [K, B, C, H, W], K = 1 unless SHARE is "product"."""
    batch = g.shape[1]
    prompts = prompt.shape[0]
    out = torch.empty_like(prompt)
    if not out.numel():
        return out
    hole = flags["HOLE"][2] * flags["HOLE"][3]
    pixels = flags["WINDOW"][2] * flags["WINDOW"][3]
    channels = flags["C"]
    channels_last = g.stride(2) == 1 and channels > 1
    splits = 1 if flags["SHARE"] == "sample" else triton.cdiv(batch, launch.chunk)
    final = splits <= 1
    positions = channels * (pixels if final else pixels - hole)
    partial = out if final else torch.empty((splits, prompts, positions), dtype=torch.float32, device=g.device)
    samples = 1 if flags["SHARE"] == "sample" else launch.SAMPLES
    if final and g.dtype == torch.float32:
        samples = max(1, samples // 2)  # beside the slope of the squash, more do not fit into the registers of sm_100
    if partial.numel():
        prompt_gradient_kernel[(triton.cdiv(positions, launch.BLOCK) * prompts * max(splits, 1),)](
            g, x, rows, prompt, mask, index, norm, first, taps, partial,
            images, batch, prompts, launch.chunk, *g.stride(), *strides_of(x), scale, **flags,
            CHANNELS_LAST=channels_last, FINAL=final, VECTOR=1 if final else run_length(g, flags, channels_last),
            SAMPLES=samples, BLOCK=launch.BLOCK, num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if not final:
        sum_partials(partial, prompt, mask, out, splits, scale, flags, launch)
    return out


def sum_partials(partial, prompt, mask, out, splits, scale, flags, launch):
    """The second half of a prompt's gradient: add the chunks in order, multiply by the slope."""
    keep = ("C", "H", "W", "WINDOW", "HOLE", "SQUASH", "MASK_FIRST", "MASK_CHANNELS")
    prompts = prompt.shape[0]
    prompt_gradient_sum_kernel[(triton.cdiv(prompt[0].numel(), launch.SUM_BLOCK) * prompts,)](
        partial, prompt, mask, out, prompts, splits, scale, **{name: flags[name] for name in keep},
        BLOCK=launch.SUM_BLOCK, num_warps=launch.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def image_gradient(g, x, prompt, mask, cells, index, norm, first, taps, dtype, scale, flags, launch):
    """d (the image as it is placed) [B, C, image height, image width], before any resize; g is [K, B, C, H, W]."""
    _, _, height, width = flags["IMAGE"]
    out = torch.empty((g.shape[1], flags["C"], height, width), dtype=dtype, device=g.device)
    if out.numel():
        image_gradient_kernel[(triton.cdiv(out.numel(), launch.BLOCK),)](
            g, x, prompt, mask, cells, index, norm, first, taps, out,
            out.numel(), 1 if prompt is None else prompt.shape[0], *g.stride(), *strides_of(x), scale, **flags,
            BLOCK=launch.BLOCK, num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def cells_gradient(g, x, rows, images, prompt, mask, cells, norm, first, taps, scale, flags, launch):
    """(d prompt [1, C, H, W], d cells [B, CELL_CHANNELS, rows, columns]) of sample-specific masks; g is [B, C, H, W]."""
    batch = g.shape[0]
    out, d_cells = torch.empty_like(prompt), torch.empty_like(cells)
    splits = triton.cdiv(batch, launch.chunk)
    _, planes, down, across = cells.shape
    area = triton.next_power_of_2(flags["CELLS"][0] * flags["CELLS"][1])
    channels = triton.next_power_of_2(flags["C"]) if planes == 1 else 1
    patches = max(1, min(triton.next_power_of_2(down * across), launch.BLOCK // (area * channels)))
    partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=g.device)
    if batch:
        cells_gradient_kernel[(triton.cdiv(down * across, patches) * planes * splits,)](
            g, x, rows, prompt, mask, cells, norm, first, taps, d_cells, partial,
            images, batch, launch.chunk, *g.stride(), *strides_of(x), scale, **flags,
            CHANNELS=channels, PATCHES=patches, AREA=area,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    sum_partials(partial, prompt, mask, out, splits, scale, flags, launch)
    return out, d_cells
