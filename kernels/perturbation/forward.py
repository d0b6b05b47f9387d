"""Prompted model input in one pass: place, resize, prompt, clamp, normalise, cast.

    pixel space       out = (clamp(place(x) + p) - mean) / std
    normalised space  out = clamp(place((x - mean) / std) + p)          p = scale * squash(delta) * M

x [B, C, h, w] uint8 (read as x / 255) or float, any strides, or images of which sample b is rows[b];
delta [N, C, h', w'] on a window of the canvas; out [B, C, H, W] (or [K, B, C, H, W] for K prompts on one batch), contiguous
or channels_last. The canvas around the image is 0 in the space where the prompt is added.

Bytes: read x once, delta and M once (they stay in registers while a program walks over its samples), write out once. At
B=256, 3x224x224, bf16 out, from uint8 32x32: 0.8 + 77.1 MB. FLOPs: about 4 an output element; the kernel is bound by bytes.
Resizing adds a first kernel along the columns (`resize_columns_kernel`); the rows are resized inside the main pass.
"""

import torch
import triton
import triton.language as tl

from .pixel import clamped, coordinates, image_of, image_pixel, mask_value, prompt_offset, prompt_value, within


@triton.jit(do_not_specialize=["lines", "images"], do_not_specialize_on_alignment=["rows_ptr"])
def resize_columns_kernel(
    x_ptr, rows_ptr, first_ptr, taps_ptr, out_ptr, lines, images,
    stride_b, stride_c, stride_y, stride_x,
    C: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, j] = sum_t taps[j, t] * x[r, first[j] + t] for the lines r of all samples and channels; rounded for uint8."""
    UINT8: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    line = e // WIDTH
    column = (e % WIDTH).to(tl.int32)
    live = line < lines
    image, known = image_of(rows_ptr, images, line // (C * H), live, 0)
    at = x_ptr + image * stride_b + (line // H) % C * stride_c + line % H * stride_y
    first = tl.load(first_ptr + column, mask=live, other=0)
    if UINT8:
        total = tl.full([BLOCK], 1 << 21, tl.int32)
        for t in range(TAPS):
            weight = tl.load(taps_ptr + column * TAPS + t, mask=live, other=0)
            value = tl.load(at + (first + t) * stride_x, mask=known & (weight != 0), other=0)
            total += value.to(tl.int32) * weight
        result = tl.minimum(tl.maximum(total >> 22, 0), 255)
    else:
        result = tl.zeros([BLOCK], tl.float32)
        for t in range(TAPS):
            weight = tl.load(taps_ptr + column * TAPS + t, mask=live, other=0.0)
            value = tl.load(at + (first + t) * stride_x, mask=known & (weight != 0.0), other=0.0)
            result += value.to(tl.float32) * weight
    tl.store(out_ptr + e, result.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["images", "batch", "prompts", "chunk"], do_not_specialize_on_alignment=["rows_ptr"])
def perturb_forward_kernel(
    x_ptr, rows_ptr, prompt_ptr, mask_ptr, cells_ptr, index_ptr, norm_ptr, first_ptr, taps_ptr, out_ptr,
    images, batch, prompts, chunk,
    stride_b, stride_c, stride_y, stride_x,
    scale,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    IMAGE: tl.constexpr, COPIES: tl.constexpr, PERIOD: tl.constexpr, WINDOW: tl.constexpr, HOLE: tl.constexpr,
    SHARE: tl.constexpr, SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr, MASK_CHANNELS: tl.constexpr,
    CELL_CHANNELS: tl.constexpr, CELLS: tl.constexpr,
    NORMALIZED: tl.constexpr, CLAMP: tl.constexpr, CHANNELS_LAST: tl.constexpr, TAPS: tl.constexpr,
    VECTOR: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program writes BLOCK positions of `chunk` samples, SAMPLES at a time.

    SHARE says whose prompt it is: "none", "batch" (one for all), "index" (prompt index[b]), "sample" (prompt b),
    "product" (every prompt on every sample). A row or an index out of range makes its own sample NaN and touches nothing
    else.
    """
    SIZE: tl.constexpr = C * H * W
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    PROMPT: tl.constexpr = C * WINDOW[2] * WINDOW[3]
    pid = tl.program_id(0)
    e = (pid % TILES * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = e < SIZE
    c, y, x = coordinates(e, C, H, W, CHANNELS_LAST)
    mean = tl.load(norm_ptr + c, mask=valid, other=0.0)
    gain = tl.load(norm_ptr + C + c, mask=valid, other=0.0)
    low = tl.load(norm_ptr + 2 * C + c, mask=valid, other=0.0)
    high = tl.load(norm_ptr + 3 * C + c, mask=valid, other=0.0)
    p = tl.zeros([1, BLOCK], tl.float32)
    m = p
    covered = valid & within(y, x, WINDOW)
    at = prompt_offset(c, y, x, WINDOW)
    if SHARE != "none":
        m = mask_value(mask_ptr, c, y, x, valid, C, H, W, WINDOW, HOLE, MASK_CHANNELS)
    if SHARE == "batch":
        delta = tl.load(prompt_ptr + at, mask=covered, other=0.0).to(tl.float32)
        p = prompt_value(delta, m, scale, SQUASH, MASK_FIRST)

    start = pid // TILES * chunk
    for b0 in range(start, tl.minimum(start + chunk, batch), SAMPLES):
        b = b0 + tl.arange(0, SAMPLES)[:, None]
        live = (b < batch) & valid
        image, there = image_of(rows_ptr, images, b, b < batch, TAPS)
        pixel, inside = image_pixel(
            x_ptr, first_ptr, taps_ptr, image, c, y, x, there & valid, stride_b, stride_c, stride_y, stride_x,
            IMAGE, COPIES, PERIOD, TAPS, VECTOR,
        )  # fmt: skip
        base = tl.where(inside, (pixel - mean) * gain, 0.0) if NORMALIZED else tl.where(inside, pixel, 0.0)
        for k in range(prompts if SHARE == "product" else 1):
            add = p
            if SHARE == "index" or SHARE == "sample" or SHARE == "product":
                if SHARE == "index":
                    n = tl.load(index_ptr + b, mask=b < batch, other=0).to(tl.int64)
                elif SHARE == "sample":
                    n = b.to(tl.int64)
                else:
                    n = tl.zeros([SAMPLES, 1], tl.int64) + k
                known = (n >= 0) & (n < prompts)
                delta = tl.load(prompt_ptr + n * PROMPT + at, mask=live & covered & known, other=0.0)
                add = prompt_value(delta.to(tl.float32), m, scale, SQUASH, MASK_FIRST)
                add = tl.where(known, add, float("nan"))
            if CELL_CHANNELS > 0:
                plane = c if CELL_CHANNELS == C else c * 0
                cell = (plane * (H // CELLS[0]) + y // CELLS[0]) * (W // CELLS[1]) + x // CELLS[1]
                grid = CELL_CHANNELS * (H // CELLS[0]) * (W // CELLS[1])
                add = add * tl.load(cells_ptr + b.to(tl.int64) * grid + cell, mask=live, other=0.0).to(tl.float32)
            v = base + add
            if CLAMP:
                v = clamped(v, low, high)
            if not NORMALIZED:
                v = (v - mean) * gain
            if rows_ptr is not None:
                v = tl.where(there, v, float("nan"))
            to = (b.to(tl.int64) + k * batch) * SIZE + e
            tl.store(out_ptr + to, v.to(out_ptr.dtype.element_ty), mask=live)


def resize_columns(x, rows, first, taps, width, launch):
    """x [B, C, h, w], or the images `rows` of x -> [B, C, h, width] contiguous, in uint8 for uint8 and float32 otherwise."""
    images, channels, height, _ = x.shape
    batch = images if rows is None else rows.shape[0]
    dtype = torch.uint8 if x.dtype == torch.uint8 else torch.float32
    out = torch.empty((batch, channels, height, width), dtype=dtype, device=x.device)
    if out.numel():
        resize_columns_kernel[(triton.cdiv(out.numel(), launch.BLOCK),)](
            x, rows, first, taps, out, batch * channels * height, images, *x.stride(),
            C=channels, H=height, WIDTH=width, TAPS=taps.shape[1], BLOCK=launch.BLOCK,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def perturb_forward(x, rows, images, prompt, mask, cells, index, norm, first, taps, out, scale, flags, launch):
    """Fills `out`. `flags` are the kernel's compile-time arguments; every tensor but x is contiguous.

    rows: which of the `images` each sample is, or None; x is all of them, or resized the batch's own.
    """
    batch = x.shape[0] if rows is None else rows.shape[0]
    if not out.numel():
        return out
    size = flags["C"] * flags["H"] * flags["W"]
    grid = (triton.cdiv(size, launch.BLOCK) * triton.cdiv(batch, launch.chunk),)
    perturb_forward_kernel[grid](
        x, rows, prompt, mask, cells, index, norm, first, taps, out,
        images, batch, 1 if prompt is None else prompt.shape[0], launch.chunk, *x.stride(), scale, **flags,
        SAMPLES=launch.SAMPLES, BLOCK=launch.BLOCK,
        num_warps=launch.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
