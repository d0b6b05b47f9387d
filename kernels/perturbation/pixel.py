"""One pixel of a prompted image: the device functions that the forward and the backward kernels share.

    v = place(x) + scale * squash(delta) * M          squash(delta * M) when MASK_FIRST

The canvas is C x H x W. The rectangles are compile-time tuples (top, left, height, width) on it: IMAGE is where the image
lies, WINDOW is what the prompt tensor covers, and the prompt is absent inside HOLE.
"""

import triton
import triton.language as tl

from .._shared import tanh


@triton.jit
def squash(x, SQUASH: tl.constexpr):
    """none | sigmoid | tanh, in float32."""
    if SQUASH == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    elif SQUASH == "tanh":
        return tanh(x)
    else:
        return x


@triton.jit
def squash_slope(x, SQUASH: tl.constexpr):
    """The derivative of `squash` at x, from the exponential: 1 - tanh(x)^2 would cancel where the slope is small."""
    if SQUASH == "sigmoid":
        e = tl.exp(-tl.abs(x))
        return e / ((1.0 + e) * (1.0 + e))
    elif SQUASH == "tanh":
        e = tl.exp(-2.0 * tl.abs(x))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        return x * 0.0 + 1.0


@triton.jit
def coordinates(e, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Position e of a flattened C x H x W image as (channel, row, column), in either memory format."""
    if CHANNELS_LAST:
        return e % C, (e // C) // W, (e // C) % W
    else:
        return e // (H * W), (e // W) % H, e % W


@triton.jit
def within(y, x, RECT: tl.constexpr):
    """True where (y, x) lies in the rectangle."""
    rows = (y >= RECT[0]) & (y < RECT[0] + RECT[2])
    return rows & (x >= RECT[1]) & (x < RECT[1] + RECT[3])


@triton.jit
def mask_value(
    mask_ptr, c, y, x, valid,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, MASK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """M at a pixel: 1 in the window and outside the hole, times the pixel mask [MASK_CHANNELS, H, W] if there is one."""
    on = valid & within(y, x, WINDOW)
    if HOLE[2] * HOLE[3] > 0:
        on = on & (within(y, x, HOLE) == 0)
    m = tl.where(on, 1.0, 0.0)
    if MASK_CHANNELS > 0:
        plane = c if MASK_CHANNELS == C else c * 0
        m *= tl.load(mask_ptr + (plane * H + y) * W + x, mask=on, other=0.0).to(tl.float32)
    return m


@triton.jit
def prompt_offset(c, y, x, WINDOW: tl.constexpr):
    """Where a canvas pixel lies in one contiguous prompt [C, WINDOW height, WINDOW width]."""
    return (c * WINDOW[2] + (y - WINDOW[0])) * WINDOW[3] + (x - WINDOW[1])


@triton.jit
def prompt_value(delta, m, scale, SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr):
    """What the prompt adds to a pixel."""
    if MASK_FIRST:
        return squash(delta * m, SQUASH) * scale
    else:
        return squash(delta, SQUASH) * m * scale


@triton.jit
def prompt_slope(delta, m, scale, SQUASH: tl.constexpr, MASK_FIRST: tl.constexpr):
    """The derivative of `prompt_value` with respect to delta."""
    if MASK_FIRST:
        return squash_slope(delta * m, SQUASH) * m * scale
    else:
        return squash_slope(delta, SQUASH) * m * scale


@triton.jit
def image_of(rows_ptr, images, b, take, TAPS: tl.constexpr):
    """(Where sample b's image lies in x, whether there is one): image rows[b] of `images`, or b itself without rows.

    Resizing along the columns (TAPS > 0) has already put the images in the batch's order.
    """
    n = b.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + b, mask=take, other=-1)
        take = take & (row >= 0) & (row < images)
        n = row if TAPS == 0 else n
    return n, take


@triton.jit
def image_pixel(
    x_ptr, first_ptr, taps_ptr, b, c, y, x, live,
    stride_b, stride_c, stride_y, stride_x,
    IMAGE: tl.constexpr, COPIES: tl.constexpr, PERIOD: tl.constexpr, TAPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(pixel in [0, 1], inside?) of samples b [S, 1] at canvas positions [1, BLOCK].

    uint8 is scaled by 1/255. With TAPS > 0 the image is resized along rows here: out row y is the weighted sum of the
    TAPS source rows from first[y]; weights of a uint8 image are 22-bit integers and the result is rounded as PIL does.
    """
    UINT8: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    row = y - IMAGE[0]
    column = x - IMAGE[1]
    inside = (row >= 0) & (row < IMAGE[2]) & (column >= 0)
    if COPIES > 1:
        inside = inside & (column < COPIES * PERIOD)
        column = column % PERIOD
    inside = inside & (column < IMAGE[3])
    if VECTOR > 1:
        # The edges of the rectangle are multiples of VECTOR: whole groups are in or out, so wide loads are allowed.
        inside = tl.max_constancy(inside, [1, VECTOR])
    load = live & inside
    at = x_ptr + b.to(tl.int64) * stride_b + c * stride_c + column * stride_x
    if TAPS == 0:
        pixel = tl.load(at + row * stride_y, mask=load, other=0).to(tl.float32)
    else:
        first = tl.load(first_ptr + row, mask=inside, other=0)
        if UINT8:
            total = tl.full(load.shape, 1 << 21, tl.int32)
            for t in range(TAPS):
                weight = tl.load(taps_ptr + row * TAPS + t, mask=inside, other=0)
                value = tl.load(at + (first + t) * stride_y, mask=load & (weight != 0), other=0)
                total += value.to(tl.int32) * weight
            pixel = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.float32)
        else:
            pixel = tl.zeros(load.shape, tl.float32)
            for t in range(TAPS):
                weight = tl.load(taps_ptr + row * TAPS + t, mask=inside, other=0.0)
                value = tl.load(at + (first + t) * stride_y, mask=load & (weight != 0.0), other=0.0)
                pixel += value.to(tl.float32) * weight
    if UINT8:
        pixel *= 1.0 / 255
    return pixel, inside


@triton.jit
def clamped(v, low, high):
    """v limited to [low, high]; NaN stays NaN."""
    return tl.where(v < low, low, tl.where(v > high, high, v))
