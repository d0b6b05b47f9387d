"""Prompts on the raw input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.functional.checks import bad, check_range, one_of, output_dtype, pair, path_of, same_device, tell
from fastprompt.ops import perturbation as ops
from fastprompt.reference import perturbation as reference
from fastprompt.reference.perturbation import Rect

Numbers = float | Sequence[float] | Tensor


class Normalization(NamedTuple):
    """How a model wants its pixels: table [4, C] float32 (mean, 1 / std, low, high) and whether values are clamped."""

    table: Tensor
    clamp: str  # "none" | "exact" | "straight"


class Rows(NamedTuple):
    """A batch that was not made: sample b is images[rows[b]]. The modules of `fastprompt.nn` read it where it lies.

    images [N, ...] uint8 or floating point; rows int64 [B] on the same device.
    """

    images: Tensor
    rows: Tensor

    def gather(self) -> Tensor:
        """The batch [B, ...] itself, for a module that does not know rows."""
        return self.images[self.rows]


def normalization(
    mean: Numbers = 0.0, std: Numbers = 1.0, low: Numbers | None = None, high: Numbers | None = None,
    *, channels: int | None = None, straight_through: bool = False, device: torch.device | str | None = None,
) -> Normalization:  # fmt: skip
    """The normalisation (v - mean) / std per channel, and the range [low, high] that v is clamped to before it.

    Args:
        mean, std, low, high: a number or C numbers, in units of a pixel in [0, 1]; low and high are in the space where the
            prompt is added (see `perturb`). None leaves a side open.
        channels: C, when every other argument is a single number.
        straight_through: let the gradient through where values are clamped (otherwise it is exactly 0 there).
        device: where the table lives; that of the images.

    Raises:
        ValueError: a std that is not positive, low above high, or lengths that differ.
    """
    rows = [torch.as_tensor(v, dtype=torch.float64).flatten().cpu() for v in (mean, std)]
    rows.append(torch.as_tensor(-torch.inf if low is None else low, dtype=torch.float64).flatten().cpu())
    rows.append(torch.as_tensor(torch.inf if high is None else high, dtype=torch.float64).flatten().cpu())
    lengths = {len(row) for row in rows} - {1} | ({channels} if channels is not None else set())
    if len(lengths) > 1:
        raise bad("mean, std, low, high", "one number or one per channel", f"lengths {sorted(lengths)}")
    count = lengths.pop() if lengths else 1
    mean_, std_, low_, high_ = (row.expand(count) for row in rows)
    if not bool((std_ > 0).all()):
        raise bad("std", "positive numbers", std_.tolist())
    if not bool((low_ <= high_).all()):
        raise bad("low", "at most high", f"low {low_.tolist()}, high {high_.tolist()}")
    clamp = "none" if low is None and high is None else "straight" if straight_through else "exact"
    table = torch.stack([mean_, 1 / std_, low_, high_]).to(device=device, dtype=torch.float32)
    return Normalization(table, clamp)


def perturb(
    x: Tensor, prompt: Tensor | None = None, *,
    canvas: int | Sequence[int] | None = None, resize: int | Sequence[int] | None = None,
    interpolation: str = "bilinear", offset: Sequence[int] | None = None, copies: int = 1, period: int = 0,
    window: Rect | None = None, hole: Rect | str | None = None, mask: Tensor | None = None, cells: Tensor | None = None,
    share: str | None = None, index: Tensor | None = None, rows: Tensor | None = None,
    squash: str = "none", mask_first: bool = False, scale: float = 1.0,
    space: str = "pixel", norm: Normalization | None = None,
    dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None, data_format: str = "NCHW",
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Images in, the prompted and normalised model input out, in one pass over memory.

    With p = scale * squash(prompt) * M (`mask_first`: scale * squash(prompt * M)):

        space="pixel"       out = (clamp(place(resize(x)) + p) - mean) / std
        space="normalized"  out = clamp(place((resize(x) - mean) / std) + p)

    The canvas around the image is 0 in the space where the prompt is added. NaN in, NaN out. Padded prompts: Elsayed et al.
    2019 (arXiv 1806.11146); sample-specific masks: Cai et al. 2024 (arXiv 2406.03150).

    Args:
        x: [B, C, h, w] (data_format="NHWC": [B, h, w, C]), uint8 (read as x / 255), float32, float16 or bfloat16; any
            strides. One channel is repeated to the prompt's or the normalisation's C.
        prompt: [C, h', w'] or [N, C, h', w'], floating point, trained in its own dtype. None: only place and normalise.
        canvas: the model's input size (H, W). Default: the size of the image.
        resize: the image's size on the canvas, antialiased. uint8: bit for bit what Pillow computes (columns first, each
            pass rounded). Default: as it is.
        interpolation: "bilinear" or "bicubic".
        offset: (top, left) of the image. Default: centred, an odd difference puts the extra pixel at the top and left.
        copies, period: repeat the image `copies` times every `period` columns (series; see `nn.SeriesPrompt`).
        window: (top, left, height, width) of the prompt on the canvas. Default: all of it.
        hole: where the prompt is absent: a rectangle inside the window, "image" (where the image lies), or None.
        mask: M on the canvas, [H, W], [1, H, W] or [C, H, W], bool or number.
        cells: per-sample masks [B, 1 or C, rows, columns] that multiply p patch by patch; needs one prompt, no hole.
        share: whose prompt it is. "batch": one for all samples (the default for one prompt). "index": prompt index[b] for
            sample b (the default with `index`). "sample": prompt b. "product": every prompt on every sample.
        index: int64 [B]. On a GPU an index out of range makes its sample NaN and has no gradient (FASTPROMPT_CHECK=1
            raises instead).
        rows: int64 [B]. x holds all the images of a set, and sample b is x[rows[b]], read where it lies: no batch is put
            together. Such an x has no gradient. Out of range: as for `index`.
        squash: "none", "sigmoid" or "tanh".
        norm: from `normalization`. Default: none.
        dtype: of the output. Default: autocast's, else that of a float x, else the default dtype.
        memory_format: of the output. Default: that of x.

    Returns:
        [B, C, H, W], or [N, B, C, H, W] for share="product". Gradients: prompt, cells and a float x. The sum over the batch
        has a fixed order: the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came, before any device work.
    """
    if x.dim() != 4:
        raise bad("x", "4 dimensions [B, C, h, w]", f"{x.dim()} dimensions {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"x: expected uint8 or a floating point dtype, got {x.dtype}")
    if one_of("data_format", data_format, ("NCHW", "NHWC")) == "NHWC":
        x = x.permute(0, 3, 1, 2)
    if prompt is not None:
        if not prompt.is_floating_point():
            raise TypeError(f"prompt: expected a floating point dtype, got {prompt.dtype}")
        prompt = prompt[None] if prompt.dim() == 3 else prompt
        if prompt.dim() != 4:
            raise bad("prompt", "[C, h', w'] or [N, C, h', w']", list(prompt.shape))
    table, clamp = (None, "none") if norm is None else norm
    same_device(x, prompt=prompt, mask=mask, cells=cells, index=index, rows=rows, norm=table)
    if rows is not None:
        _check_rows(rows, x)
    batch = x.shape[0] if rows is None else rows.shape[0]
    if memory_format is None:
        channels_last = x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    else:
        channels_last = memory_format == torch.channels_last
    plan = _settings if torch.compiler.is_compiling() else _known_settings
    channels, s = plan(
        (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), None if table is None else table.shape[1],
        None if prompt is None else tuple(prompt.shape), _fixed(canvas), _fixed(resize), interpolation, _fixed(offset),
        copies, period, _fixed(window), _fixed(hole), share, index is not None, cells is not None, squash, mask_first,
        float(scale), space, clamp, output_dtype(dtype, x), channels_last, path_of(impl, x),
    )  # fmt: skip
    if x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1)
    if table is not None and table.shape[1] != channels:
        table = table.expand(4, channels).contiguous()
    if s.share != "batch" and prompt is not None:
        _check_owners(s.share, prompt.shape[0], index, batch)
    if mask is not None:
        mask = _check_mask(mask, s, channels)
    if cells is not None:
        _check_cells(cells, s, batch, channels)
    if _runtime.watch is not None:
        written = batch * channels * math.prod(s.canvas) * s.dtype.itemsize
        written *= prompt.shape[0] if s.share == "product" and prompt is not None else 1
        read = x[:1].nbytes * batch // (1 if x.stride(1) else channels)
        tell("perturb", impl, s.impl, x, prompt, moved=read + written)
    if s.impl == "torch":
        table = _identity_table(channels, x) if table is None else table
        out = reference.perturb(x, prompt, mask, cells, index, rows, table, *s[:-2])
        return out.contiguous(memory_format=torch.channels_last) if channels_last and out.dim() == 4 else out
    given = (x, prompt, mask, cells, index, rows, None if table is None else table.float(), s)
    trained = any(t is not None and t.requires_grad for t in given[:7]) and torch.is_grad_enabled()
    return ops.Perturb.apply(*given) if trained else ops.forward(*given)


def _fixed(value: Any) -> Any:
    """Sizes and rectangles as something that can be looked up."""
    return tuple(value) if isinstance(value, list) else value


def _settings(
    source: tuple[int, int, int], norm_channels: int | None, prompt: tuple[int, ...] | None,
    canvas: int | Sequence[int] | None, resize: int | Sequence[int] | None, interpolation: str,
    offset: Sequence[int] | None, copies: int, period: int, window: Rect | None, hole: Rect | str | None,
    share: str | None, indexed: bool, celled: bool, squash: str, mask_first: bool, scale: float, space: str, clamp: str,
    dtype: torch.dtype, channels_last: bool, impl: str,
) -> tuple[int, ops.Settings]:  # fmt: skip
    """(channels, settings) of a call, from everything about it but values and the batch. Checked once for equal calls."""
    channels = max(source[0], norm_channels or 1, prompt[1] if prompt else 0)
    for name, count in (("x", source[0]), ("norm", norm_channels or 1)):
        if count not in (1, channels):
            raise bad(name, f"1 or {channels} channels", f"{count} channels")
    if prompt and prompt[1] != channels:
        raise bad("prompt", f"{channels} channels", f"{prompt[1]} channels")
    size = source[1:]
    placed = size if resize is None else pair("resize", resize)
    one_of("interpolation", interpolation, ("bilinear", "bicubic"))
    if placed != size and 0 in size:
        raise bad("x", "at least one pixel to resize", list(source))
    board = placed if canvas is None else pair("canvas", canvas)
    image = placed_at(placed, board, offset, copies, period)
    s = ops.Settings(
        canvas=board, image=image, interpolation="none" if placed == size else interpolation,
        copies=copies, period=period, window=rectangle("window", window, board), hole=_hole(hole, image, copies),
        share=_share(share, prompt, indexed, celled),
        squash=one_of("squash", squash, ("none", "sigmoid", "tanh")), mask_first=mask_first, scale=scale,
        normalized=one_of("space", space, ("pixel", "normalized")) == "normalized", clamp=clamp,
        dtype=dtype, channels_last=channels_last, impl=impl,
    )  # fmt: skip
    if prompt:
        _check_prompt(s, prompt)
    return channels, s


_known_settings = lru_cache(maxsize=1024)(_settings)


def _identity_table(channels: int, x: Tensor) -> Tensor:
    table = torch.zeros((4, channels), device=x.device)
    table[1:2] = 1
    return table


def placed_at(size: tuple[int, int], canvas: tuple[int, int], offset: Sequence[int] | None, copies: int, period: int) -> Rect:
    if copies < 1 or (copies > 1 and period < size[1]):
        raise bad("copies, period", f"copies >= 1 and a period of at least {size[1]}", (copies, period))
    extent = (size[0], size[1] + (copies - 1) * period)
    if extent[0] > canvas[0] or extent[1] > canvas[1]:
        raise bad("canvas", f"at least the image's {extent[0]}x{extent[1]}", f"{canvas[0]}x{canvas[1]}")
    top, left = ((canvas[0] - extent[0] + 1) // 2, (canvas[1] - extent[1] + 1) // 2) if offset is None else tuple(offset)
    if top < 0 or left < 0 or top + extent[0] > canvas[0] or left + extent[1] > canvas[1]:
        raise bad("offset", f"the image inside the {canvas[0]}x{canvas[1]} canvas", f"{(top, left)} for {extent}")
    return top, left, *size


def rectangle(argument: str, rect: Rect | None, canvas: tuple[int, int]) -> Rect:
    if rect is None:
        return 0, 0, *canvas
    top, left, height, width = rect
    if min(rect) < 0 or top + height > canvas[0] or left + width > canvas[1]:
        raise bad(argument, f"(top, left, height, width) inside {canvas[0]}x{canvas[1]}", rect)
    return top, left, height, width


def _hole(hole: Rect | str | None, image: Rect, copies: int) -> Rect:
    if hole is None:
        return 0, 0, 0, 0
    if isinstance(hole, str):
        if hole != "image":
            raise bad("hole", '"image", a rectangle or None', repr(hole))
        if copies > 1:
            raise bad("hole", "a rectangle, or a pixel mask, for several copies of the image", '"image"')
        return image
    return hole


def _share(share: str | None, prompt: tuple[int, ...] | None, indexed: bool, celled: bool) -> str:
    if prompt is None:
        if share is not None or indexed or celled:
            raise bad("prompt", "a tensor when share, cells or index is given", None)
        return "none"
    share = one_of("share", share or ("index" if indexed else "batch"), ("batch", "index", "sample", "product"))
    if share == "batch" and prompt[0] != 1:
        raise bad("share", f"index, sample or product for {prompt[0]} prompts", repr(share))
    if indexed != (share == "index"):
        raise bad("index", 'a tensor exactly when share="index"', f"share={share!r}, index={indexed}")
    return share


def _check_owners(share: str, count: int, index: Tensor | None, batch: int) -> None:
    if share == "sample" and count != batch:
        raise bad("prompt", f'one prompt a sample ({batch}) for share="sample"', f"{count} prompts")
    if index is not None:
        if index.dtype != torch.int64 or index.shape != (batch,):
            raise bad("index", f"int64 [{batch}]", f"{index.dtype} {list(index.shape)}")
        check_range("index", index, count)


def _check_rows(rows: Tensor, x: Tensor) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise bad("rows", "int64 [B]", f"{rows.dtype} {list(rows.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise bad("x", "images without a gradient when rows is given", "requires_grad=True")
    check_range("rows", rows, x.shape[0])


def _check_prompt(s: ops.Settings, prompt: tuple[int, ...]) -> None:
    top, left, height, width = s.window
    if prompt[2:] != (height, width):
        raise bad("prompt", f"the window's size {height}x{width}", f"{prompt[2]}x{prompt[3]}")
    y, x, high, wide = s.hole
    if high * wide and not (y >= top and x >= left and y + high <= top + height and x + wide <= left + width):
        raise bad("hole", f"a rectangle inside the window {s.window}", s.hole)
    if math.prod(prompt) >= 2**31:
        raise bad("prompt", "fewer than 2**31 elements", math.prod(prompt))


def _check_mask(mask: Tensor, s: ops.Settings, channels: int) -> Tensor:
    mask = mask[None] if mask.dim() == 2 else mask
    if mask.dim() != 3 or mask.shape[0] not in (1, channels) or tuple(mask.shape[1:]) != s.canvas:
        raise bad("mask", f"[{s.canvas[0]}, {s.canvas[1]}] or [{channels}, ...] on the canvas", list(mask.shape))
    return mask


def _check_cells(cells: Tensor, s: ops.Settings, batch: int, channels: int) -> None:
    shape = tuple(cells.shape)
    if len(shape) != 4 or shape[0] != batch or shape[1] not in (1, channels):
        raise bad("cells", f"[{batch}, 1 or {channels}, rows, columns]", list(shape))
    if 0 in shape[2:] or s.canvas[0] % shape[2] or s.canvas[1] % shape[3]:
        raise bad("cells", f"rows and columns that divide the canvas {s.canvas}", shape[2:])
    if s.share != "batch" or s.mask_first or s.hole[2] * s.hole[3] or s.window != (0, 0, *s.canvas):
        raise bad("cells", "one prompt on the whole canvas, no hole, mask_first=False", "another combination")


def scale_image(x: Tensor, scale: Tensor, canvas: int | Sequence[int]) -> Tensor:
    """x [B, C, h, w], enlarged by a trainable scale about the centre of a zero canvas, bilinear without antialiasing.

    out(u) = x((u - centre) / scale + centre of x); `scale` is a scalar tensor and gets a gradient (AutoVP, Tsao et al. 2024,
    arXiv 2310.08381). For a fixed size use `perturb(resize=...)`, which is antialiased and fused.

    Returns:
        [B, C, H, W] in x's floating point dtype (uint8 is read as x / 255).
    """
    if x.dim() != 4:
        raise bad("x", "4 dimensions [B, C, h, w]", list(x.shape))
    if scale.numel() != 1 or not scale.is_floating_point():
        raise bad("scale", "a floating point tensor with one element", f"{scale.dtype} {list(scale.shape)}")
    height, width = pair("canvas", canvas)
    x = x / 255 if x.dtype == torch.uint8 else x
    zoom = 1 / scale.reshape(()).to(x.dtype)
    theta = torch.eye(2, 3, dtype=x.dtype, device=x.device)
    theta = theta * torch.stack([zoom * (width / x.shape[3]), zoom * (height / x.shape[2])])[:, None]
    grid = torch.nn.functional.affine_grid(
        theta.expand(x.shape[0], 2, 3), [x.shape[0], x.shape[1], height, width], align_corners=False
    )
    return torch.nn.functional.grid_sample(x, grid, align_corners=False)
