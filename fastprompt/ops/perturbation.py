"""Operators of the perturbation family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors an analytic PyTorch form runs that keeps a few samples in the cache at
a time; with impl="triton" the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.reference import perturbation as reference
from fastprompt.reference.perturbation import Rect
from fastprompt.tuning.perturbation import pick

if _runtime.HAS_TRITON:
    from fastprompt.kernels.perturbation import backward as kernel_backward
    from fastprompt.kernels.perturbation import forward as kernel_forward


_CODES: dict[str, tuple[Any, ...]] = {
    "interpolation": ("none", "bilinear", "bicubic"),
    "share": ("none", "batch", "index", "sample", "product"),
    "squash": ("none", "sigmoid", "tanh"),
    "clamp": ("none", "exact", "straight"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "impl": ("auto", "triton"),
}


class Settings(NamedTuple):
    """Everything about a call that is not a tensor. `fastprompt.functional.perturb` explains each."""

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

    def encode(self) -> tuple[list[int], float]:
        """For the operators: one list of integers passes the dispatcher in half the time of sixteen arguments."""
        numbers = [*self.canvas, *self.image, self.copies, self.period, *self.window, *self.hole]
        numbers += [int(self.mask_first), int(self.normalized), int(self.channels_last)]
        return numbers + [choices.index(getattr(self, name)) for name, choices in _CODES.items()], self.scale


@lru_cache(maxsize=1024)
def _decode(numbers: tuple[int, ...], scale: float) -> Settings:
    chosen = {name: choices[code] for (name, choices), code in zip(_CODES.items(), numbers[19:], strict=True)}
    return Settings(
        canvas=numbers[:2], image=numbers[2:6], copies=numbers[6], period=numbers[7],  # type: ignore[arg-type]
        window=numbers[8:12], hole=numbers[12:16], mask_first=bool(numbers[16]), scale=scale,  # type: ignore[arg-type]
        normalized=bool(numbers[17]), channels_last=bool(numbers[18]), **chosen,
    )  # fmt: skip


_known_code = lru_cache(maxsize=1024)(Settings.encode)
_library = torch.library.Library("fastprompt", "FRAGMENT")
for _schema in (
    "perturb(Tensor x, Tensor? prompt, Tensor? mask, Tensor? cells, Tensor? index, Tensor? rows, Tensor? norm, "
    "int[] settings, float scale) -> Tensor",
    "perturb_prompt_gradient(Tensor g, Tensor? x, Tensor prompt, Tensor? mask, Tensor? index, Tensor? rows, Tensor? norm, "
    "int[] settings, float scale) -> Tensor",
    "perturb_cells_gradient(Tensor g, Tensor? x, Tensor prompt, Tensor? mask, Tensor cells, Tensor? rows, Tensor? norm, "
    "int[] settings, float scale) -> (Tensor, Tensor)",
    "perturb_image_gradient(Tensor g, Tensor? x, Tensor? prompt, Tensor? mask, Tensor? cells, Tensor? index, Tensor? norm, "
    "SymInt[] size, ScalarType image_dtype, int[] settings, float scale) -> Tensor",
):
    _library.define(_schema)

# ---- Triton ----


@lru_cache(maxsize=64)
def _taps(size: int, out: int, mode: str, integer: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    first, weights = reference.resize_taps(size, out, mode)
    table = torch.from_numpy(reference.fixed_point(weights)) if integer else torch.from_numpy(weights).float()
    return torch.from_numpy(first).to(device), table.to(device)


@lru_cache(maxsize=64)
def _matrix(size: int, out: int, mode: str, device: torch.device) -> Tensor:
    return reference.resize_matrix(size, out, mode, False).to(device=device, dtype=torch.float32)


@lru_cache(maxsize=64)
def _identity_table(channels: int, device: torch.device) -> Tensor:
    # From the host, which waits for the copy: kept for all streams, and a graph that is captured cannot make it its own.
    return torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].repeat(1, channels).to(device)


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


def _source(x: Tensor | None, rows: Tensor | None, s: Settings) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x; or the samples with their columns resized, first row, row weights) for the kernels."""
    if x is None:
        return None, None, None
    x = _near(x)
    if s.interpolation == "none":
        return x, None, None
    integer = x.dtype == torch.uint8
    across = _taps(x.shape[3], s.image[3], s.interpolation, integer, x.device)
    down = _taps(x.shape[2], s.image[2], s.interpolation, integer, x.device)
    launch = pick("forward", _batch(x, rows), _runtime.arch(x.device))
    return kernel_forward.resize_columns(x, rows, *across, s.image[3], launch), *down


def _forward_triton(x, prompt, mask, cells, index, rows, norm, s):  # type: ignore[no-untyped-def]
    prompt, mask, cells, index, rows = _contiguous(prompt, mask, cells, index, rows)
    norm = _identity_table(x.shape[1], x.device) if norm is None else norm
    out = _empty_output(x, prompt, rows, s)
    source, first, taps = _source(x, rows, s)
    launch = pick("forward", _batch(x, rows), _runtime.arch(x.device), taps is not None)
    flags = _flags(s, x.shape[1], mask, s.clamp != "none", taps) | _cell_flags(s, cells)
    flags |= {"CHANNELS_LAST": s.channels_last, "VECTOR": _edge_alignment(s)}
    return kernel_forward.perturb_forward(
        source, rows, x.shape[0], prompt, mask, cells, index, norm, first, taps, out, s.scale, flags, launch
    )


def _edge_alignment(s: Settings) -> int:
    """The largest power of two up to 16 that divides every edge of the image on the canvas."""
    if s.channels_last or s.copies > 1:
        return 1
    edges = (s.canvas[1], s.image[1], s.image[3])
    return next(n for n in (16, 8, 4, 2, 1) if all(edge % n == 0 for edge in edges))


def _prompt_gradient_triton(g, x, prompt, mask, index, rows, norm, s):  # type: ignore[no-untyped-def]
    prompt, mask, index, rows = _contiguous(prompt, mask, index, rows)
    g = _near(g)
    norm = _identity_table(g.shape[-3], g.device) if norm is None else norm
    again = s.clamp == "exact"  # clamped positions are found again
    source, first, taps = _source(x if again else None, rows, s)
    launch = pick("prompt_gradient", g.shape[-4], _runtime.arch(g.device), again)
    flags = _flags(s, g.shape[-3], mask, again, taps)
    g = g if s.share == "product" else g[None]
    images = 0 if x is None else x.shape[0]
    return kernel_backward.prompt_gradient(
        g, source, rows, images, prompt, mask, index, norm, first, taps, s.scale, flags, launch
    )


def _cells_gradient_triton(g, x, prompt, mask, cells, rows, norm, s):  # type: ignore[no-untyped-def]
    prompt, mask, cells, rows = _contiguous(prompt, mask, cells, rows)
    g = _near(g)
    norm = _identity_table(g.shape[-3], g.device) if norm is None else norm
    again = s.clamp == "exact"
    source, first, taps = _source(x if again else None, rows, s)
    launch = pick("cells_gradient", g.shape[0], _runtime.arch(g.device))
    flags = _flags(s, g.shape[1], mask, again, taps) | _cell_flags(s, cells)
    images = 0 if x is None else x.shape[0]
    return kernel_backward.cells_gradient(g, source, rows, images, prompt, mask, cells, norm, first, taps, s.scale, flags, launch)


def _image_gradient_triton(g, x, prompt, mask, cells, index, norm, size, image_dtype, s):  # type: ignore[no-untyped-def]
    prompt, mask, cells, index = _contiguous(prompt, mask, cells, index)
    g = _near(g)
    norm = _identity_table(g.shape[-3], g.device) if norm is None else norm
    source, first, taps = _source(x, None, s)
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
_ONE_PASS = 1 << 17  # elements from which a pass for each channel costs less than two over all of them
_SHORT = 64  # columns of a part of the canvas from which one more pass over its rows costs less than a dense copy
_MOST_RUNS = 8  # runs of phases from which gathering rows costs less


def _chunks(batch: int, sample_bytes: int, one_by_one: bool = False) -> list[slice]:
    step = 1 if one_by_one else max(1, _CACHE_BYTES // max(sample_bytes, 1))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _images(x: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """The images of the samples `part`: a view, but for several rows, which are copied into the cache."""
    if rows is None:
        return x[part]
    chosen = rows[part]
    return x[int(chosen)][None] if len(chosen) == 1 else x.index_select(0, chosen)


def _on_image(canvas: Tensor, s: Settings) -> Tensor:
    """The image's rectangle of a canvas [..., H, W], as a view; with several copies [..., h, copies, w]."""
    top, left, height, width = s.image
    if s.copies > 1:
        return canvas[..., top : top + height, left:].unfold(-1, width, s.period)[..., : s.copies, :]
    return canvas[..., top : top + height, left : left + width]


class _Taps(NamedTuple):
    """Resampling along one axis as sums of whole rows [before + size + after, n] times weights; the margins may hold anything.

    parts: (phases, rows they read, 22-bit weights). A ratio of p / q pixels repeats every q outputs, its phases, so that a
    tap of neighbouring phases is a slice with step p.
    """

    before: int
    after: int
    phases: int
    overshoots: bool
    parts: list[tuple[slice, slice | Tensor, Tensor]]


@lru_cache(maxsize=64)
def _taps_cpu(size: int, out: int, mode: str) -> _Taps:
    weights = reference.resize_matrix(size, out, mode, True).to(torch.int32)
    overshoots = bool((weights < 0).any())
    repeats = math.gcd(size, out)
    step, phases = size // repeats, out // repeats
    start = step * torch.arange(repeats)[:, None]
    used = (weights != 0).int()
    low = (used.argmax(1).view(repeats, phases) - start).amin(0).tolist()
    high = (size - used.flip(1).argmax(1).view(repeats, phases) - start).amax(0).tolist()
    longest = max(end - first for first, end in zip(low, high, strict=True))
    runs: list[range] = []
    for phase in range(phases):
        begin = runs[-1].start if runs else 0
        if runs and max(high[begin : phase + 1]) - min(low[begin : phase + 1]) <= longest:
            runs[-1] = range(begin, phase + 1)
        else:
            runs.append(range(phase, phase + 1))
    if len(runs) > _MOST_RUNS:  # every tap gathers its rows
        first, table = (torch.from_numpy(t) for t in _integer_taps(size, out, mode))
        gathered = [(first + tap).clamp(max=size - 1) for tap in range(table.shape[1])]
        return _Taps(0, 0, 1, overshoots, [(slice(1), rows, w[:, None, None]) for rows, w in zip(gathered, table.T, strict=True)])
    before, after = max(0, -min(low)), max(0, max(high) - step)
    weights = torch.nn.functional.pad(weights, (before, after))
    parts: list[tuple[slice, slice | Tensor, Tensor]] = []
    for run in runs:
        outputs = phases * torch.arange(repeats)[:, None] + torch.tensor(run)
        for tap in range(before + min(low[i] for i in run), before + max(high[i] for i in run)):
            rows = slice(tap, tap + step * (repeats - 1) + 1, step)
            parts.append((slice(run.start, run.stop), rows, weights[outputs, tap + start][..., None].contiguous()))
    return _Taps(before, after, phases, overshoots, parts)


def _integer_taps(size: int, out: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    first, weights = reference.resize_taps(size, out, mode)
    return first, reference.fixed_point(weights)


def _resample(rows: Tensor, taps: _Taps, out: int) -> Tensor:
    """int32 [before + size + after, n] of bytes -> [out, n]: Pillow's (sum of w * pixel + 2**21) >> 22, limited to a byte."""
    total = rows.new_empty((out, rows.shape[1]))
    by_phase = total.view(-1, taps.phases, rows.shape[1])
    half = torch.full_like(rows[0], 1 << 21)  # a row, as PyTorch does not vectorise a sum with two broadcast numbers
    begun = -1
    for phases, read, weight in taps.parts:
        source = (rows[read] if isinstance(read, slice) else rows.index_select(0, read))[:, None]
        to = by_phase[:, phases]
        torch.addcmul(to if phases.start == begun else half.expand_as(to), source, weight, out=to)
        begun = phases.start
    total.bitwise_right_shift_(22)
    return total.clamp_(0, 255) if taps.overshoots else total


def _resize_exactly(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [S, C, h, w] -> Pillow's bytes at `size`, as int32 [S, C, *size] (rows outermost in memory)."""
    samples, channels, height, width = x.shape
    x = x.permute(3, 0, 1, 2)
    if size[1] != width:
        across = _taps_cpu(width, size[1], mode)
        columns = torch.empty((across.before + width + across.after, samples * channels * height), dtype=torch.int32)
        columns[across.before : across.before + width].view(x.shape).copy_(x)
        # Turning bytes over takes half the time of turning integers over.
        x = _resample(columns, across, size[1]).to(torch.uint8).view(size[1], samples, channels, height)
    down = _taps_cpu(height, size[0], mode)
    rows = torch.empty((down.before + height + down.after, samples * channels * size[1]), dtype=torch.int32)
    rows[down.before : down.before + height].view(height, samples, channels, size[1]).copy_(x.permute(3, 1, 2, 0))
    return _resample(rows, down, size[0]).view(size[0], samples, channels, size[1]).permute(1, 2, 0, 3)


@lru_cache(maxsize=64)
def _rounds_alike(size: int, out: int, mode: str) -> bool:
    """Whether the weights of PyTorch's uint8 resize (16-bit integers) must give the same bytes as Pillow's of 22 bits.

    Where an output's weights are multiples of 1 / D, so is its value. With an odd D it stays 1 / 2D away from a half, and
    rounding the weights changes nothing as long as it moves the value by less. With an even D there are halves, which are
    only safe where both hold the weights exactly, as for ratios of powers of two.
    """
    weights = np.unique(reference.resize_taps(size, out, mode)[1], axis=0)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2.0 ** (b + 1)) >= 1 << 15)  # PyTorch's choice
    multiples = weights * np.arange(1, 257)[:, None, None]
    whole = np.abs(multiples - np.rint(multiples)).max(2) < 1e-9
    parts = 1 + whole.argmax(0)
    exact = np.rint(weights * parts[:, None]) / parts[:, None]
    moved = [np.abs(np.rint(exact * 2.0**b) / 2.0**b - exact).sum(1) * 255 for b in (22, bits)]
    safe = np.where(parts % 2 == 1, np.maximum(*moved) < 0.49 / parts, np.maximum(*moved) == 0)
    return bool((whole.any(0) & safe).all())


@lru_cache(maxsize=64)
def _pytorch_resizes_alike(channels: int, size: tuple[int, int], out: tuple[int, int], mode: str) -> bool:
    """Whether PyTorch's uint8 resize gives Pillow's bytes: by proof, and tried once, as its weights are no public promise."""
    if 1 in out or not all(_rounds_alike(*axis, mode) for axis in zip(size, out, strict=True)):
        return False  # PyTorch 2.13 fails for one column
    noise = torch.randint(256, (1, channels, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.equal(_resize_by_pytorch(noise, out, mode).to(torch.int32), _resize_exactly(noise, out, mode))


def _resize_by_pytorch(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return torch.nn.functional.interpolate(x, size=size, mode=mode, antialias=True, align_corners=False)


def _pixels_cpu(x: Tensor, s: Settings) -> Tensor:
    """The images at their size on the canvas, uint8 as integers of 0 to 255."""
    if s.interpolation == "none":
        return x
    size = s.image[2:]
    if x.dtype != torch.uint8:
        return _resize_by_pytorch(x.float(), size, s.interpolation)
    if _pytorch_resizes_alike(x.shape[1], tuple(x.shape[2:]), size, s.interpolation):
        return _resize_by_pytorch(x, size, s.interpolation)
    return _resize_exactly(x, size, s.interpolation)


def _within(rect: Rect) -> tuple[Any, slice, slice]:
    return ..., slice(rect[0], rect[0] + rect[2]), slice(rect[1], rect[1] + rect[3])


class _Affine(NamedTuple):
    """v * gain - less, each [C, 1, 1]; None for 1 and 0."""

    gain: Tensor | None
    less: Tensor | None


_NOTHING = _Affine(None, None)


def _affine(norm: Tensor | None) -> _Affine:
    if norm is None:
        return _NOTHING
    mean, gain, _, _ = norm.reshape(4, -1, 1, 1).unbind()
    return _Affine(gain, mean * gain)


def _under_image(s: Settings) -> bool:
    """Whether the prompt's hole is exactly what the image covers, so that nothing has to be written there twice."""
    return s.hole == s.image and s.copies == 1


def _absent(to: _Affine, s: Settings) -> Tensor | float:
    """p * gain - less where there is no prompt."""
    if s.mask_first and s.squash == "sigmoid":
        value = 0.5 * s.scale if to.gain is None else to.gain * (0.5 * s.scale)  # squash(0)
        return value if to.less is None else value - to.less
    return 0.0 if to.less is None else -to.less


def _squashed(prompt: Tensor, mask: Tensor | None, s: Settings) -> Tensor:
    """squash(delta) * M on the window, in float32. Not to be written to: it may be the prompt itself."""
    y = prompt.float()
    m = None if mask is None else mask[_within(s.window)].float()
    if m is not None and s.mask_first:
        y = y * m
    if s.squash != "none":
        y = torch.sigmoid(y) if s.squash == "sigmoid" else torch.tanh(y)
    return y * m if m is not None and not s.mask_first else y


def _prompts_cpu(prompt: Tensor | None, mask: Tensor | None, to: _Affine, s: Settings) -> Tensor:
    """p * gain - less on the canvas [N, C, H, W] in float32; without a prompt [1, C or 1, 1, 1]. Not to be written to.

    Under the image it is anything where `_under_image`.
    """
    if prompt is None:
        return torch.zeros((1, 1, 1, 1)) if to.less is None else -to.less[None]
    y = _squashed(prompt, mask, s)
    times = s.scale if to.gain is None else to.gain if s.scale == 1 else to.gain * s.scale
    p = y if to.gain is None and s.scale == 1 else y * times
    if to.less is not None:
        p = p.sub_(to.less) if p is not y else p - to.less
    if tuple(s.window[2:]) != tuple(s.canvas):
        canvas = torch.empty((*p.shape[:2], *s.canvas))
        canvas[:] = _absent(to, s)
        canvas[_within(s.window)] = p
        p = canvas
    if s.hole[2] * s.hole[3] and not _under_image(s):
        p = p.clone() if p is prompt else p
        p[_within(s.hole)] = _absent(to, s)
    return p


def _whose(p: Tensor, index: Tensor | None, part: slice, s: Settings) -> Tensor:
    """The prompts of the samples `part`: [S, C, H, W], [1, C, H, W] or [K, 1, C, H, W]."""
    if s.share == "index":
        assert index is not None
        chosen = index[part]
        return p[int(chosen)][None] if len(chosen) == 1 else p[chosen]  # one prompt is a view, several are a copy
    if s.share == "sample":
        return p[part]
    return p[:, None] if s.share == "product" else p


def _only_adds(x: Tensor, canvas: _Affine, image: _Affine, s: Settings) -> bool:
    """Whether the image needs nothing but the prompt."""
    return image == _NOTHING == canvas and tuple(s.image[2:]) == tuple(s.canvas) and x.dtype != torch.uint8


def _compose(
    x: Tensor, p: Tensor, cells: Tensor | None, canvas: _Affine, image: _Affine, out: Tensor, s: Settings
) -> None:  # fmt: skip
    """out = p, with pixel * gain - less of the image added where it lies: few passes over a part in the cache.

    With cells p lacks what the canvas subtracts, as the cells multiply p.
    """
    if cells is None:
        _place_cpu(x, p, _absent(canvas, s) if _under_image(s) else None, image, out, s)
        return
    if _only_adds(x, canvas, image, s):
        v = _pixels_cpu(x, s).float()
    else:
        v = torch.empty(out.shape)
        base = _absent(canvas, s._replace(mask_first=False))
        _place_cpu(x, torch.as_tensor(base).expand(1, len(v[0]), 1, 1), base, image, v, s)
    _, _, rows, columns = cells.shape
    wide = cells.float().repeat_interleave(s.canvas[1] // columns, 3)[:, :, :, None]  # only columns are repeated
    v, p, out = (t.unflatten(2, (rows, -1)) for t in (v, p, out))
    torch.addcmul(v, p, wide, out=out)


def _place_cpu(x: Tensor, under: Tensor, flat: Tensor | float | None, image: _Affine, out: Tensor, s: Settings) -> None:
    """out = under [1 or S, C, H, W] (or [1, C, 1, 1]), with pixel * gain - less added where the image lies.

    flat: what lies under the image where that is one number a channel.
    """
    if under.shape[-1] == 1:
        flat = under
    if s.copies > 1 or tuple(s.image[2:]) != tuple(s.canvas):
        out.copy_(under.expand_as(out))
        under, out = under if flat is not None else _on_image(under, s), _on_image(out, s)
    pixel, gain, less = _pixels_cpu(x, s), image.gain, image.less
    if s.copies > 1:
        pixel = pixel[..., None, :].expand(*pixel.shape[:-1], s.copies, -1)
        gain, less = (None if t is None else t[..., None, :] for t in (gain, less))
        flat = flat[..., None, :] if isinstance(flat, Tensor) else flat
    to_one = 1 / 255 if x.dtype == torch.uint8 else 1.0
    unit = to_one if gain is None else gain * to_one
    if flat is not None:
        _scale_and_shift(pixel.expand_as(out), unit, flat if less is None else flat - less, out)
    elif isinstance(unit, Tensor):
        torch.addcmul(under if less is None else under - less, pixel.float(), unit, out=out)
    else:
        torch.add(under, pixel.float(), alpha=unit, out=out)


def _scale_and_shift(pixel: Tensor, unit: Tensor | float, flat: Tensor | float, out: Tensor) -> None:
    """out = pixel * unit + flat, which are one number or one a channel."""
    if out.dtype != torch.float32 or (out.shape[-1] < _SHORT and not out.is_contiguous()):
        torch.add(pixel * unit, flat, out=out)
    elif out.dim() == 4 and out.stride(-1) == 1 and out.numel() >= _ONE_PASS:
        # PyTorch vectorises a pass with one number, not with a channel's: one pass for each channel.
        units, flats = (torch.as_tensor(t, dtype=torch.float32).flatten().expand(out.shape[1]) for t in (unit, flat))
        for times, plus, from_, to in zip(units.tolist(), flats.unbind(), pixel.unbind(1), out.unbind(1), strict=True):
            torch.add(plus, from_ if from_.dtype == torch.float32 else to.copy_(from_), alpha=times, out=to)
    else:
        torch.mul(pixel.float(), unit, out=out).add_(flat)


def _forward_cpu(x, prompt, mask, cells, index, rows, norm, s):  # type: ignore[no-untyped-def]
    if s.impl == "triton":
        return _forward_triton(x, prompt, mask, cells, index, rows, norm, s)
    out = _runtime.in_huge_pages(_empty_output(x, prompt, rows, s))
    batch = _batch(x, rows)
    gain, less = _affine(norm)
    covers = s.copies == 1 and tuple(s.image[2:]) == tuple(s.canvas)
    # Everything is written normalised at once: in pixel space the mean belongs to the canvas, otherwise to the image.
    canvas, image = (_NOTHING, _Affine(gain, less)) if s.normalized else (_Affine(gain, less), _Affine(gain, None))
    if s.normalized and covers:
        canvas, image = _Affine(None, less), _Affine(gain, None)
    to_prompts = canvas if cells is None else canvas._replace(less=None)
    one_by_one = s.share == "index"
    apart = s.share == "sample" or (one_by_one and prompt.shape[0] > batch)  # or most prompts would be made for nobody
    p = None if apart else _prompts_cpu(prompt, mask, to_prompts, s)
    bounds = None
    if s.clamp != "none":
        bounds = [limit if gain is None or s.normalized else limit * gain - less for limit in norm[2:, :, None, None]]
    sample = (
        4 * x.shape[1] * (s.image[2] * s.image[3] * s.copies if bounds is None and cells is None else s.canvas[0] * s.canvas[1])
    )
    if cells is not None and bounds is None and s.interpolation == "none" and _only_adds(x, canvas, image, s):
        sample = 0  # one pass: nothing to keep in the cache
    elif s.interpolation != "none" and x.dtype == torch.uint8:
        sample //= 4  # passes over long rows gain more than the cache
    parts = _chunks(batch, sample * (len(prompt) if s.share == "product" else 1), one_by_one)
    for part in parts:
        if p is not None:
            ours = _whose(p, index, part, s)
        else:
            ours = _prompts_cpu(prompt[index[part] if one_by_one else part], mask, to_prompts, s)
        to = out if len(parts) == 1 else out[..., part, :, :, :]
        ours_x = x if len(parts) == 1 and rows is None else _images(x, rows, part)
        _compose(ours_x, ours, None if cells is None else cells[part], canvas, image, to, s)
        if bounds is not None:
            torch.minimum(torch.maximum(to, bounds[0], out=to), bounds[1], out=to)
    return out


def _kept_cpu(g: Tensor, x: Tensor, prompt: Tensor | None, mask, cells, index, rows, norm: Tensor, s: Settings) -> Tensor:  # type: ignore[no-untyped-def]
    """g [..., B, C, H, W] with 0 where the sample was clamped."""
    # hardtanh's backward is one pass; it excludes its limits and clamp does not, so they move by one step.
    low = torch.nextafter(norm[2], torch.tensor(-torch.inf)).tolist()
    high = torch.nextafter(norm[3], torch.tensor(torch.inf)).tolist()
    alike = len(set(low)) == len(set(high)) == 1
    planes = [slice(None)] if alike else [slice(c, c + 1) for c in range(len(low))]
    p = _prompts_cpu(prompt, mask, _NOTHING, s)
    image = _affine(norm) if s.normalized else _NOTHING
    kept = torch.empty_like(g)
    sample = 4 * g.shape[-3] * s.canvas[0] * s.canvas[1]
    for part in _chunks(_batch(x, rows), sample * (len(p) if s.share == "product" else 1), s.share == "index"):
        v = torch.empty(g[..., part, :, :, :].shape)
        _compose(_images(x, rows, part), _whose(p, index, part, s), None if cells is None else cells[part], _NOTHING, image, v, s)
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


def _sum_of_samples(g: Tensor, index: Tensor | None, prompts: int, s: Settings) -> Tensor:
    """g [..., B, C, H, W] summed over the samples of each prompt, on the window: [N, C, h', w'] in float32.

    What lies in the hole is anything.
    """
    whole = tuple(s.window[2:]) == tuple(s.canvas)
    # A product reads whole rows of a sample at once, five times faster a byte than a sum over short strips.
    if whole and 5 * (s.canvas[1] - s.hole[3]) >= s.canvas[1] and g.is_contiguous() and g.dtype == torch.float32:
        if index is not None:
            return torch.zeros((prompts, *g.shape[1:])).index_add_(0, index, g)
        if s.share != "sample":
            return (g.new_ones((1, g.shape[-4])) @ g.flatten(-3)).view(prompts, *g.shape[-3:])
    total = torch.empty((prompts, g.shape[-3], *s.window[2:]))
    for rows, columns in _strips(s):
        part = g[..., rows, columns]
        to = total[..., slice(rows.start - s.window[0], rows.stop - s.window[0]),
                   slice(columns.start - s.window[1], columns.stop - s.window[1])]  # fmt: skip
        if index is not None:
            to.copy_(torch.zeros(to.shape).index_add_(0, index, part.to(torch.float32).contiguous()))
        elif s.share == "sample":
            to.copy_(part)
        else:
            torch.sum(part, -4, dtype=torch.float32, out=to if s.share == "product" else to[0])
    return total


def _through_prompt_cpu(total: Tensor, prompt: Tensor, mask: Tensor | None, s: Settings) -> Tensor:
    """scale * d p on the window [N, C, h', w'] -> d prompt; may write to `total`."""
    at = prompt.float()
    if mask is not None:
        m = mask[_within(s.window)].float()
        total.mul_(m)
        at = at * m if s.mask_first else at
    if s.squash == "sigmoid":
        total = torch.ops.aten.sigmoid_backward(total, torch.sigmoid(at))
    elif s.squash == "tanh":
        total = torch.ops.aten.tanh_backward(total, torch.tanh(at))
    top, left, height, width = s.hole
    if height * width:
        total[_within((top - s.window[0], left - s.window[1], height, width))] = 0
    return total.to(prompt.dtype)


def _prompt_gradient_cpu(g, x, prompt, mask, index, rows, norm, s):  # type: ignore[no-untyped-def]
    if s.impl == "triton":
        return _prompt_gradient_triton(g, x, prompt, mask, index, rows, norm, s)
    if s.clamp == "exact":
        g = _kept_cpu(g, x, prompt, mask, None, index, rows, norm, s)
    total = _sum_of_samples(g, index, prompt.shape[0], s)
    gain = None if s.normalized else _affine(norm).gain
    if gain is not None or s.scale != 1:
        total.mul_(s.scale if gain is None else gain * s.scale)
    return _through_prompt_cpu(total, prompt, mask, s)


def _cells_gradient_cpu(g, x, prompt, mask, cells, rows, norm, s):  # type: ignore[no-untyped-def]
    if s.impl == "triton":
        return _cells_gradient_triton(g, x, prompt, mask, cells, rows, norm, s)
    if s.clamp == "exact":
        g = _kept_cpu(g, x, prompt, mask, cells, None, rows, norm, s)
    gain = None if s.normalized else _affine(norm).gain
    p = _prompts_cpu(prompt, mask, _NOTHING, s)
    _, planes, rows, columns = cells.shape
    total, d_cells = torch.zeros(p.shape[1:]), torch.empty(cells.shape)
    by_patch = total.unflatten(1, (rows, -1))
    wide = cells.float().repeat_interleave(s.canvas[1] // columns, 3)[:, :, :, None]
    for sample in range(len(g)):
        d = g[sample].float() if gain is None else g[sample] * gain
        by_patch.addcmul_(d.unflatten(1, (rows, -1)), wide[sample])
        by_channel = (d * p[0]).unflatten(1, (rows, -1)).sum(2).unflatten(2, (columns, -1)).sum(3)
        d_cells[sample] = by_channel.sum(0) if planes == 1 else by_channel
    top, left, height, width = s.window
    total = total[None, :, top : top + height, left : left + width] * s.scale
    return _through_prompt_cpu(total, prompt, mask, s), d_cells.to(cells.dtype)


def _image_gradient_cpu(g, x, prompt, mask, cells, index, norm, size, image_dtype, s):  # type: ignore[no-untyped-def]
    if s.impl == "triton":
        return _image_gradient_triton(g, x, prompt, mask, cells, index, norm, size, image_dtype, s)
    if x is not None:
        g = _kept_cpu(g, x, prompt, mask, cells, index, None, norm, s)
    placed = _on_image(g, s)
    placed = placed.float().sum(-2) if s.copies > 1 else placed
    placed = placed.float().sum(0) if s.share == "product" else placed
    gain = _affine(norm).gain
    placed = placed.to(torch.float32, copy=True) if gain is None else placed * gain
    return _resize_transposed(placed, size, s).to(image_dtype)


# ---- Registration ----


def _batch(x: Tensor, rows: Tensor | None) -> int:
    return x.shape[0] if rows is None else rows.shape[0]


def _empty_output(x: Tensor, prompt: Tensor | None, rows: Tensor | None, s: Settings) -> Tensor:
    batch = _batch(x, rows)
    shape = (batch, x.shape[1], *s.canvas)
    if s.share == "product":
        assert prompt is not None
        shape = (prompt.shape[0] * shape[0], *shape[1:])
    memory_format = torch.channels_last if s.channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=s.dtype, device=x.device, memory_format=memory_format)
    return out.unflatten(0, (prompt.shape[0], batch)) if s.share == "product" else out  # type: ignore[union-attr]


def _forward_fake(x, prompt, mask, cells, index, rows, norm, s):  # type: ignore[no-untyped-def]
    return _empty_output(x, prompt, rows, s)


def _prompt_gradient_fake(g, x, prompt, mask, index, rows, norm, s):  # type: ignore[no-untyped-def]
    return torch.empty_like(prompt, memory_format=torch.contiguous_format)


def _cells_gradient_fake(g, x, prompt, mask, cells, rows, norm, s):  # type: ignore[no-untyped-def]
    dense = torch.contiguous_format
    return torch.empty_like(prompt, memory_format=dense), torch.empty_like(cells, memory_format=dense)


def _image_gradient_fake(g, x, prompt, mask, cells, index, norm, size, image_dtype, s):  # type: ignore[no-untyped-def]
    return g.new_empty((g.shape[-4], g.shape[-3], *size), dtype=image_dtype)


def _decoded(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that takes `Settings` as one that takes the schema's numbers."""

    def run(*given: Any) -> Any:
        return implementation(*given[:-2], _decode(tuple(given[-2]), given[-1]))

    return run


for _name, _triton, _cpu, _fake in (
    ("perturb", _forward_triton, _forward_cpu, _forward_fake),
    ("perturb_prompt_gradient", _prompt_gradient_triton, _prompt_gradient_cpu, _prompt_gradient_fake),
    ("perturb_cells_gradient", _cells_gradient_triton, _cells_gradient_cpu, _cells_gradient_fake),
    ("perturb_image_gradient", _image_gradient_triton, _image_gradient_cpu, _image_gradient_fake),
):
    _library.impl(_name, _runtime.on_its_device(_decoded(_triton)), "CUDA")
    _library.impl(_name, _decoded(_cpu), "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _decoded(_fake), lib=_library)


def _direct(operator: Callable[..., Any], on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, taking `Settings`. Eager calls on a CPU skip the dispatcher, which costs as much as a small image."""

    def run(first: Tensor, *given: Any) -> Any:
        *rest, s = given
        if torch.compiler.is_compiling():
            return operator(first, *rest, *s.encode())
        return on_cpu(first, *rest, s) if first.is_cpu else operator(first, *rest, *_known_code(s))

    return run


forward = _direct(torch.ops.fastprompt.perturb.default, _forward_cpu)
_prompt_gradient = _direct(torch.ops.fastprompt.perturb_prompt_gradient.default, _prompt_gradient_cpu)
_cells_gradient = _direct(torch.ops.fastprompt.perturb_cells_gradient.default, _cells_gradient_cpu)
_image_gradient = _direct(torch.ops.fastprompt.perturb_image_gradient.default, _image_gradient_cpu)


class Perturb(torch.autograd.Function):
    """`perturb` with gradients for the image, the prompt and the cells; only what needs one is computed."""

    @staticmethod
    def forward(ctx, x, prompt, mask, cells, index, rows, norm, settings):  # type: ignore[no-untyped-def]
        # Nothing of the image is kept unless clamped positions must be found again, or it is a whole set that stays anyway.
        kept = x if settings.clamp == "exact" or rows is not None else None
        ctx.save_for_backward(kept, prompt, mask, cells, index, rows, norm)
        ctx.settings, ctx.size, ctx.image_dtype = settings, x.shape[-2:], x.dtype
        return forward(x, prompt, mask, cells, index, rows, norm, settings)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.perturb has no second derivative: call backward without create_graph=True, or use "
                'impl="torch"'
            )
        x, prompt, mask, cells, index, rows, norm = ctx.saved_tensors
        s = ctx.settings
        d_x = d_prompt = d_cells = None
        if ctx.needs_input_grad[0]:
            d_x = _image_gradient(g, x, prompt, mask, cells, index, norm, ctx.size, ctx.image_dtype, s)
        if cells is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
            d_prompt, d_cells = _cells_gradient(g, x, prompt, mask, cells, rows, norm, s)
        elif ctx.needs_input_grad[1]:
            d_prompt = _prompt_gradient(g, x, prompt, mask, index, rows, norm, s)
        return d_x, d_prompt, None, d_cells, None, None, None, None
