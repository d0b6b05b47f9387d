"""Operators of the perturbation family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors an analytic PyTorch form runs that keeps a few samples in the cache at
a time; with impl="triton" the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.reference import perturbation as reference
from fastprompt.reference.perturbation import Rect
from fastprompt.tuning.perturbation import pick

if _runtime.HAS_TRITON:
    from fastprompt.kernels.perturbation import backward as kernel_backward
    from fastprompt.kernels.perturbation import forward as kernel_forward


class Settings(NamedTuple):
    """Everything about a call that is not a tensor, in schema order. `fastprompt.functional.perturb` explains each."""

    canvas: tuple[int, int]
    image: Rect
    interpolation: str
    copies: int
    period: int
    window: Rect
    hole: Rect
    share: str
    squash: str
    mask_first: bool
    scale: float
    normalized: bool
    clamp: str
    dtype: torch.dtype
    channels_last: bool
    impl: str


_SETTINGS = (
    "SymInt[] canvas, SymInt[] image, str interpolation, SymInt copies, SymInt period, SymInt[] window, SymInt[] hole, "
    "str share, str squash, bool mask_first, float scale, bool normalized, str clamp, ScalarType dtype, "
    "bool channels_last, str impl"
)
_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define(
    "perturb(Tensor x, Tensor? prompt, Tensor? mask, Tensor? cells, Tensor? index, Tensor norm, " + _SETTINGS + ") -> Tensor"
)
_library.define(
    "perturb_prompt_gradient(Tensor g, Tensor? x, Tensor prompt, Tensor? mask, Tensor? index, Tensor norm, "
    + _SETTINGS
    + ") -> Tensor"
)
_library.define(
    "perturb_cells_gradient(Tensor g, Tensor? x, Tensor prompt, Tensor? mask, Tensor cells, Tensor norm, "
    + _SETTINGS
    + ") -> (Tensor, Tensor)"
)
_library.define(
    "perturb_image_gradient(Tensor g, Tensor? x, Tensor? prompt, Tensor? mask, Tensor? cells, Tensor? index, Tensor norm, "
    "SymInt[] size, ScalarType image_dtype, " + _SETTINGS + ") -> Tensor"
)

# ---- Triton ----


@lru_cache(maxsize=64)
def _taps(size: int, out: int, mode: str, integer: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    first, weights = reference.resize_taps(size, out, mode)
    table = torch.from_numpy(reference.fixed_point(weights)) if integer else torch.from_numpy(weights).float()
    return torch.from_numpy(first).to(device), table.to(device)


@lru_cache(maxsize=64)
def _matrix(size: int, out: int, mode: str, device: torch.device) -> Tensor:
    return reference.resize_matrix(size, out, mode, False).to(device=device, dtype=torch.float32)


def _flags(s: Settings, channels: int, mask: Tensor | None, clamp: bool, taps: Tensor | None) -> dict[str, Any]:
    return {
        "C": channels, "H": s.canvas[0], "W": s.canvas[1],
        "IMAGE": tuple(s.image), "COPIES": s.copies, "PERIOD": s.period,
        "WINDOW": tuple(s.window), "HOLE": tuple(s.hole),
        "SHARE": s.share, "SQUASH": s.squash, "MASK_FIRST": s.mask_first,
        "MASK_CHANNELS": 0 if mask is None else mask.shape[0],
        "NORMALIZED": s.normalized, "CLAMP": clamp, "TAPS": 0 if taps is None else taps.shape[1],
    }  # fmt: skip


def _cell_flags(s: Settings, cells: Tensor | None) -> dict[str, Any]:
    if cells is None:
        return {"CELL_CHANNELS": 0, "CELLS": (1, 1)}
    return {
        "CELL_CHANNELS": cells.shape[1],
        "CELLS": (s.canvas[0] // cells.shape[2], s.canvas[1] // cells.shape[3]),
    }


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Prompts, masks and cells are small: the kernels take them contiguous, and bool as bytes."""
    dense = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in dense]


def _near(t: Tensor) -> Tensor:
    """t, or a dense copy where one sample spans 2**31 elements: within a sample the kernels count with 32 bits."""
    spans = [(size - 1) * stride for size, stride in zip(t.shape[-3:], t.stride()[-3:], strict=True)]
    return t if sum(spans) < 2**31 else t.contiguous()


def _source(x: Tensor | None, s: Settings) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x with its columns resized, first row, row weights) for the kernels."""
    if x is None:
        return None, None, None
    x = _near(x)
    if s.interpolation == "none":
        return x, None, None
    integer = x.dtype == torch.uint8
    columns = _taps(x.shape[3], s.image[3], s.interpolation, integer, x.device)
    rows = _taps(x.shape[2], s.image[2], s.interpolation, integer, x.device)
    launch = pick("forward", x.shape[0], _runtime.arch(x.device))
    return kernel_forward.resize_columns(x, *columns, s.image[3], launch), *rows


def _forward_triton(x, prompt, mask, cells, index, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    prompt, mask, cells, index = _contiguous(prompt, mask, cells, index)
    out = _empty_output(x, prompt, s)
    source, first, taps = _source(x, s)
    launch = pick("forward", x.shape[0], _runtime.arch(x.device), taps is not None)
    flags = _flags(s, x.shape[1], mask, s.clamp != "none", taps) | _cell_flags(s, cells)
    flags |= {"CHANNELS_LAST": s.channels_last, "VECTOR": _edge_alignment(s)}
    return kernel_forward.perturb_forward(source, prompt, mask, cells, index, norm, first, taps, out, s.scale, flags, launch)


def _edge_alignment(s: Settings) -> int:
    """The largest power of two up to 16 that divides every edge of the image on the canvas."""
    if s.channels_last or s.copies > 1:
        return 1
    edges = (s.canvas[1], s.image[1], s.image[3])
    return next(n for n in (16, 8, 4, 2, 1) if all(edge % n == 0 for edge in edges))


def _prompt_gradient_triton(g, x, prompt, mask, index, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    prompt, mask, index = _contiguous(prompt, mask, index)
    g = _near(g)
    source, first, taps = _source(x, s)
    launch = pick("prompt_gradient", g.shape[-4], _runtime.arch(g.device), x is not None)
    flags = _flags(s, g.shape[-3], mask, x is not None, taps)
    g = g if s.share == "product" else g[None]
    return kernel_backward.prompt_gradient(g, source, prompt, mask, index, norm, first, taps, s.scale, flags, launch)


def _cells_gradient_triton(g, x, prompt, mask, cells, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    prompt, mask, cells = _contiguous(prompt, mask, cells)
    g = _near(g)
    source, first, taps = _source(x, s)
    launch = pick("cells_gradient", g.shape[0], _runtime.arch(g.device))
    flags = _flags(s, g.shape[1], mask, x is not None, taps) | _cell_flags(s, cells)
    return kernel_backward.cells_gradient(g, source, prompt, mask, cells, norm, first, taps, s.scale, flags, launch)


def _image_gradient_triton(g, x, prompt, mask, cells, index, norm, size, image_dtype, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    prompt, mask, cells, index = _contiguous(prompt, mask, cells, index)
    g = _near(g)
    source, first, taps = _source(x, s)
    launch = pick("image_gradient", g.shape[-4], _runtime.arch(g.device))
    flags = _flags(s, g.shape[-3], mask, x is not None, taps) | _cell_flags(s, cells)
    g = g if s.share == "product" else g[None]
    dtype = image_dtype if s.interpolation == "none" else torch.float32
    placed = kernel_backward.image_gradient(
        g, source, prompt, mask, cells, index, norm, first, taps, dtype, s.scale, flags, launch
    )
    return _resize_transposed(placed, size, s).to(image_dtype)


def _resize_transposed(d: Tensor, size: tuple[int, int], s: Settings) -> Tensor:
    """The gradient through the resize: the transposed weights."""
    if s.interpolation == "none":
        return d
    rows = _matrix(size[0], s.image[2], s.interpolation, d.device)
    return rows.T @ (d @ _matrix(size[1], s.image[3], s.interpolation, d.device))


# ---- CPU ----

_CACHE_BYTES = 1 << 20  # a chunk of samples that fits in a core's second-level cache


def _chunks(batch: int, sample_bytes: int, one_by_one: bool = False) -> list[slice]:
    step = 1 if one_by_one else max(1, _CACHE_BYTES // max(sample_bytes, 1))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _spots(s: Settings) -> list[tuple[slice, slice]]:
    """Where the copies of the image lie on the canvas."""
    top, left, height, width = s.image
    starts = [left + copy * s.period for copy in range(s.copies)]
    return [(slice(top, top + height), slice(start, start + width)) for start in starts]


@lru_cache(maxsize=64)
def _bands(size: int, out: int, mode: str, step: int) -> list[tuple[slice, slice, Tensor]]:
    """Exact resampling as small matrix products: (out pixels, the pixels they read, weights [2 * out pixels, read]).

    A 22-bit weight w is split into its high half w >> 11 and its low half (w & 2047) / 2**11, stacked. Pixels of 8 bits times
    a half, summed over up to 32 taps, are multiples of 1 (of 2**-11) that float32 holds exactly.
    """
    weights = reference.resize_matrix(size, out, mode, True).long()
    bands = []
    for start in range(0, out, step):
        part = weights[start : start + step]
        read = part.any(0).nonzero()[:, 0]
        reach = slice(int(read[0]), int(read[-1]) + 1)
        part = part[:, reach]
        bands.append((slice(start, start + len(part)), reach, torch.cat([(part >> 11).float(), (part & 2047) * 2.0**-11])))
    return bands


def _round_exactly(total: Tensor) -> Tensor:
    """(w * pixel summed + 2**21) >> 22, limited to a byte, from the high halves with the carry of the low ones."""
    return total.add_(1024).mul_(2**-11).floor_().clamp_(0, 255)


def _resize_exactly(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [S, C, h, w] -> Pillow's bytes at `size`, as float32 [S, C, *size] (rows outermost in memory)."""
    samples, channels, height, width = x.shape
    lines = samples * channels
    flat = x.permute(2, 0, 1, 3).reshape(height * lines, width).float()
    columns = torch.empty(height * lines, size[1])
    for out, reach, weights in _bands(width, size[1], mode, size[1] if size[1] > width else 16):
        high, low = (weights @ flat[:, reach].T).chunk(2)
        columns[:, out] = _round_exactly(high.add_(low.floor_())).T
    columns = columns.view(height, lines * size[1])
    result = torch.empty(size[0], lines * size[1])
    for out, reach, weights in _bands(height, size[0], mode, 32 if size[0] > height else 16):
        high, low = (weights @ columns[reach]).chunk(2)
        torch.add(high, low.floor_(), out=result[out])
    return _round_exactly(result).view(size[0], samples, channels, size[1]).permute(1, 2, 0, 3)


def _pixels_cpu(x: Tensor, s: Settings) -> Tensor:
    """The images at their size on the canvas, float32; uint8 stays on its scale of 0 to 255."""
    if s.interpolation == "none":
        return x.float()
    if x.dtype != torch.uint8:
        return torch.nn.functional.interpolate(
            x.float(), size=tuple(s.image[2:]), mode=s.interpolation, antialias=True, align_corners=False
        )
    taps = max(reference.resize_taps(x.shape[2 + axis], s.image[2 + axis], s.interpolation)[1].shape[1] for axis in (0, 1))
    if taps > 32:
        return reference.resize(x, s.image[2:], s.interpolation).float()
    return _resize_exactly(x, s.image[2:], s.interpolation)


def _within(rect: Rect) -> tuple[Any, slice, slice]:
    return ..., slice(rect[0], rect[0] + rect[2]), slice(rect[1], rect[1] + rect[3])


def _prompts_cpu(prompt: Tensor | None, mask: Tensor | None, channels: int, s: Settings) -> Tensor:
    """p [N, C, H, W] in float32; zeros without a prompt."""
    if prompt is None:
        return torch.zeros((1, channels, *s.canvas))
    m = None if mask is None else mask[_within(s.window)].float()
    delta = prompt.float()
    if m is None:
        p = reference.squash(delta, s.squash).mul_(s.scale)
    elif s.mask_first:
        p = reference.squash(delta * m, s.squash).mul_(s.scale)
    else:
        p = reference.squash(delta, s.squash).mul_(m).mul_(s.scale)
    absent = s.scale * 0.5 if s.mask_first and s.squash == "sigmoid" else 0.0  # squash(0)
    if tuple(s.window[2:]) != tuple(s.canvas):
        p, window = torch.full((len(prompt), channels, *s.canvas), absent), p
        p[_within(s.window)] = window
    p[_within(s.hole)] = absent
    return p


def _add_cpu(p: Tensor, index: Tensor | None, part: slice, s: Settings) -> Tensor:
    """What is added to the samples `part`: [S, C, H, W], [1, C, H, W] or [K, 1, C, H, W]."""
    if s.share == "index":
        assert index is not None
        chosen = index[part]
        return p[int(chosen)][None] if len(chosen) == 1 else p[chosen]  # one prompt is a view, several are a copy
    if s.share == "sample":
        return p[part]
    return p[:, None] if s.share == "product" else p


def _add_by_cells_(v: Tensor, p: Tensor, cells: Tensor) -> Tensor:
    """v [S, C, H, W] += p [1, C, H, W] * cells [S, 1 or C, rows, columns], patch by patch; only columns are repeated."""
    _, _, rows, columns = cells.shape
    wide = cells.float().repeat_interleave(v.shape[3] // columns, 3)[:, :, :, None]
    v.unflatten(2, (rows, -1)).addcmul_(p.unflatten(2, (rows, -1)), wide)
    return v


def _land_cpu(x: Tensor, under: Tensor, unit: Tensor, shift: Tensor | None, to: Tensor, s: Settings) -> None:
    """to = under, with (pixel * unit - shift) added where the image lies: one multiply-add an image pixel."""
    if tuple(s.image[2:]) != tuple(s.canvas):
        to.copy_(under.expand_as(to))
    pixel = _pixels_cpu(x, s)
    for rows, columns in _spots(s):
        below = under[..., rows, columns] if shift is None else under[..., rows, columns] - shift
        torch.addcmul(below, pixel, unit, out=to[..., rows, columns])


def _unclamped_cpu(x: Tensor, add: Tensor, cells: Tensor | None, norm: Tensor, s: Settings) -> Tensor:
    """The canvas before clamping, in the space of the prompt: a new float32 tensor."""
    mean, gain, _, _ = norm[:, :, None, None]
    unit = (gain if s.normalized else torch.ones_like(gain)) / (255 if x.dtype == torch.uint8 else 1)
    v = torch.empty((*add.shape[:-4], len(x), *add.shape[-3:]))
    under = add if cells is None else torch.zeros(()).expand_as(add)
    _land_cpu(x, under, unit, mean * gain if s.normalized else None, v, s)
    return v if cells is None else _add_by_cells_(v, add, cells)


def _forward_cpu(x, prompt, mask, cells, index, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    if s.impl == "triton":
        return _forward_triton(x, prompt, mask, cells, index, norm, *settings)
    out = _empty_output(x, prompt, s)
    norm = norm.float()
    mean, gain, low, high = norm[:, :, None, None]
    p = _prompts_cpu(prompt, mask, x.shape[1], s)
    linear = s.clamp == "none" and cells is None  # then the frame is normalised once, for all samples
    frame, shift = p if s.normalized or not linear else (p - mean) * gain, mean * gain
    unit = gain / 255 if x.dtype == torch.uint8 else gain
    if linear and s.normalized and tuple(s.image[2:]) == tuple(s.canvas):
        frame, shift = frame - shift, None
    sample = x.shape[1] * (s.image[2] * s.image[3] * s.copies if linear else s.canvas[0] * s.canvas[1])
    for part in _chunks(len(x), 4 * sample * (len(p) if s.share == "product" else 1), s.share == "index"):
        add, to = _add_cpu(frame, index, part, s), out[..., part, :, :, :]
        if linear:
            _land_cpu(x[part], add, unit, shift if s.normalized else None, to, s)
            continue
        v = _unclamped_cpu(x[part], add, None if cells is None else cells[part], norm, s)
        if s.clamp != "none":
            torch.minimum(torch.maximum(v, low, out=v), high, out=v)
        if s.normalized:
            to.copy_(v)
        else:
            torch.addcmul(-mean * gain, v, gain, out=to)
    return out


def _kept_cpu(g: Tensor, x: Tensor, p: Tensor, cells, index, norm: Tensor, s: Settings) -> Tensor:  # type: ignore[no-untyped-def]
    """g [..., B, C, H, W] with 0 where the sample was clamped."""
    # hardtanh's backward is one pass; it excludes its limits and clamp does not, so they move by one step.
    low = torch.nextafter(norm[2], torch.tensor(-torch.inf)).tolist()
    high = torch.nextafter(norm[3], torch.tensor(torch.inf)).tolist()
    alike = len(set(low)) == len(set(high)) == 1
    planes = [slice(None)] if alike else [slice(c, c + 1) for c in range(len(low))]
    kept = torch.empty_like(g)
    for part in _chunks(len(x), 4 * p[0].numel() * (len(p) if s.share == "product" else 1), s.share == "index"):
        v = _unclamped_cpu(x[part], _add_cpu(p, index, part, s), None if cells is None else cells[part], norm, s)
        for plane, minimum, maximum in zip(planes, low, high, strict=False):
            at = (..., part, plane, slice(None), slice(None))
            kept[at] = torch.ops.aten.hardtanh_backward(g[at].float(), v[..., plane, :, :], minimum, maximum)
    return kept


def _strips(s: Settings) -> list[tuple[slice, slice]]:
    """The window without the hole, as rectangles on the canvas; a small hole is not worth four rectangles."""
    top, left, height, width = s.window
    if 4 * s.hole[2] * s.hole[3] <= height * width:
        return [(slice(top, top + height), slice(left, left + width))]
    y0, x0, y1, x1 = s.hole[0], s.hole[1], s.hole[0] + s.hole[2], s.hole[1] + s.hole[3]
    middle = slice(y0, y1)
    return [
        (slice(top, y0), slice(left, left + width)),
        (slice(y1, top + height), slice(left, left + width)),
        (middle, slice(left, x0)),
        (middle, slice(x1, left + width)),
    ]


def _through_prompt_cpu(total: Tensor, prompt: Tensor, mask: Tensor | None, s: Settings) -> Tensor:
    """scale * d p on the window [N, C, h', w'] -> d prompt, in place."""
    at = prompt.float()
    if mask is not None:
        m = mask[_within(s.window)].float()
        total.mul_(m)
        at = at * m if s.mask_first else at
    if s.squash != "none":
        y = reference.squash(at, s.squash)
        total.mul_(y.mul(1 - y) if s.squash == "sigmoid" else y.square_().neg_().add_(1))
    top, left, height, width = s.hole
    total[_within((top - s.window[0], left - s.window[1], height, width))] = 0
    return total.to(prompt.dtype)


def _prompt_gradient_cpu(g, x, prompt, mask, index, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    if s.impl == "triton":
        return _prompt_gradient_triton(g, x, prompt, mask, index, norm, *settings)
    norm = norm.float()
    if x is not None:
        g = _kept_cpu(g, x, _prompts_cpu(prompt, mask, g.shape[-3], s), None, index, norm, s)
    total = torch.empty(prompt.shape)
    for rows, columns in _strips(s):
        part = g[..., rows, columns]
        to = total[..., slice(rows.start - s.window[0], rows.stop - s.window[0]),
                   slice(columns.start - s.window[1], columns.stop - s.window[1])]  # fmt: skip
        if s.share == "index":
            to.copy_(torch.zeros(to.shape).index_add_(0, index, part.to(torch.float32).contiguous()))
        elif s.share == "sample":
            to.copy_(part)
        else:
            torch.sum(part, -4, dtype=torch.float32, out=to if s.share == "product" else to[0])
    unit = norm[1, :, None, None] * s.scale if not s.normalized else s.scale
    return _through_prompt_cpu(total if s.normalized and s.scale == 1 else total.mul_(unit), prompt, mask, s)


def _cells_gradient_cpu(g, x, prompt, mask, cells, norm, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    if s.impl == "triton":
        return _cells_gradient_triton(g, x, prompt, mask, cells, norm, *settings)
    norm = norm.float()
    p = _prompts_cpu(prompt, mask, g.shape[1], s)
    if x is not None:
        g = _kept_cpu(g, x, p, cells, None, norm, s)
    _, planes, rows, columns = cells.shape
    total, d_cells = torch.zeros(p.shape[1:]), torch.empty(cells.shape)
    by_patch = total.unflatten(1, (rows, -1))
    wide = cells.float().repeat_interleave(s.canvas[1] // columns, 3)[:, :, :, None]
    for sample in range(len(g)):
        d = g[sample].float() if s.normalized else g[sample] * norm[1, :, None, None]
        by_patch.addcmul_(d.unflatten(1, (rows, -1)), wide[sample])
        by_channel = (d * p[0]).unflatten(1, (rows, -1)).sum(2).unflatten(2, (columns, -1)).sum(3)
        d_cells[sample] = by_channel.sum(0) if planes == 1 else by_channel
    top, left, height, width = s.window
    total = total[None, :, top : top + height, left : left + width] * s.scale
    return _through_prompt_cpu(total, prompt, mask, s), d_cells.to(cells.dtype)


def _image_gradient_cpu(g, x, prompt, mask, cells, index, norm, size, image_dtype, *settings):  # type: ignore[no-untyped-def]
    s = Settings(*settings)
    if s.impl == "triton":
        return _image_gradient_triton(g, x, prompt, mask, cells, index, norm, size, image_dtype, *settings)
    norm = norm.float()
    if x is not None:
        g = _kept_cpu(g, x, _prompts_cpu(prompt, mask, g.shape[-3], s), cells, index, norm, s)
    placed = sum(g[..., rows, columns].float() for rows, columns in _spots(s))
    placed = (placed.sum(0) if s.share == "product" else placed) * norm[1, :, None, None]
    return _resize_transposed(placed, size, s).to(image_dtype)


# ---- Registration ----


def _empty_output(x: Tensor, prompt: Tensor | None, s: Settings) -> Tensor:
    shape = (x.shape[0], x.shape[1], *s.canvas)
    if s.share == "product":
        assert prompt is not None
        shape = (prompt.shape[0] * shape[0], *shape[1:])
    memory_format = torch.channels_last if s.channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=s.dtype, device=x.device, memory_format=memory_format)
    return out.unflatten(0, (prompt.shape[0], x.shape[0])) if s.share == "product" else out  # type: ignore[union-attr]


def _forward_fake(x, prompt, mask, cells, index, norm, *settings):  # type: ignore[no-untyped-def]
    return _empty_output(x, prompt, Settings(*settings))


def _prompt_gradient_fake(g, x, prompt, mask, index, norm, *settings):  # type: ignore[no-untyped-def]
    return torch.empty_like(prompt, memory_format=torch.contiguous_format)


def _cells_gradient_fake(g, x, prompt, mask, cells, norm, *settings):  # type: ignore[no-untyped-def]
    dense = torch.contiguous_format
    return torch.empty_like(prompt, memory_format=dense), torch.empty_like(cells, memory_format=dense)


def _image_gradient_fake(g, x, prompt, mask, cells, index, norm, size, image_dtype, *settings):  # type: ignore[no-untyped-def]
    return g.new_empty((g.shape[-4], g.shape[-3], *size), dtype=image_dtype)


for _name, _triton, _cpu, _fake in (
    ("perturb", _forward_triton, _forward_cpu, _forward_fake),
    ("perturb_prompt_gradient", _prompt_gradient_triton, _prompt_gradient_cpu, _prompt_gradient_fake),
    ("perturb_cells_gradient", _cells_gradient_triton, _cells_gradient_cpu, _cells_gradient_fake),
    ("perturb_image_gradient", _image_gradient_triton, _image_gradient_cpu, _image_gradient_fake),
):
    _library.impl(_name, _runtime.on_its_device(_triton), "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _fake, lib=_library)

_forward = torch.ops.fastprompt.perturb.default
_prompt_gradient = torch.ops.fastprompt.perturb_prompt_gradient.default
_cells_gradient = torch.ops.fastprompt.perturb_cells_gradient.default
_image_gradient = torch.ops.fastprompt.perturb_image_gradient.default


class Perturb(torch.autograd.Function):
    """`perturb` with gradients for the image, the prompt and the cells; only what needs one is computed."""

    @staticmethod
    def forward(ctx, x, prompt, mask, cells, index, norm, settings):  # type: ignore[no-untyped-def]
        # Nothing of the image is kept unless clamped positions must be found again.
        ctx.save_for_backward(x if settings.clamp == "exact" else None, prompt, mask, cells, index, norm)
        ctx.settings, ctx.size, ctx.image_dtype = settings, x.shape[-2:], x.dtype
        return _forward(x, prompt, mask, cells, index, norm, *settings)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.perturb has no second derivative: call backward without create_graph=True, or use "
                'impl="torch"'
            )
        x, prompt, mask, cells, index, norm = ctx.saved_tensors
        s = ctx.settings
        d_x = d_prompt = d_cells = None
        if ctx.needs_input_grad[0]:
            d_x = _image_gradient(g, x, prompt, mask, cells, index, norm, ctx.size, ctx.image_dtype, *s)
        if cells is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
            d_prompt, d_cells = _cells_gradient(g, x, prompt, mask, cells, norm, *s)
        elif ctx.needs_input_grad[1]:
            d_prompt = _prompt_gradient(g, x, prompt, mask, index, norm, *s)
        return d_x, d_prompt, None, d_cells, None, None, None
