"""The functions users call: checks with sentences, autocast, choice of path.

`impl` is "auto" (Triton kernels on a GPU, analytic PyTorch on a CPU, plain PyTorch for float64 and other devices),
"triton" (the kernels or an error; on CPU tensors only in Triton's interpreter) or "torch" (the differentiable reference).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.ops import mapping as _mapping
from fastprompt.ops import perturbation as _perturbation
from fastprompt.reference import mapping as _mapping_reference
from fastprompt.reference import perturbation as _perturbation_reference
from fastprompt.reference.perturbation import Rect

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Numbers = float | Sequence[float] | Tensor

# ---- What every function shares ----


def _bad(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def _one_of(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise _bad(argument, "one of " + ", ".join(choices), repr(value))
    return value


def _path(impl: str, x: Tensor) -> str:
    """ "torch" (the reference), "auto" or "triton" for an input tensor."""
    _one_of("impl", impl, ("auto", "triton", "torch"))
    if impl == "triton":
        if not _runtime.HAS_TRITON:
            raise RuntimeError('impl="triton": Triton is not installed; use impl="auto"')
        if not (x.is_cuda or (x.device.type == "cpu" and _runtime.INTERPRETING)):
            raise _bad('impl="triton"', "tensors on a GPU (or TRITON_INTERPRET=1)", f"tensors on {x.device}")
        if x.dtype == torch.float64:
            raise _bad('impl="triton"', "an input of at most 32 bits", "float64")
        return impl
    fused = (x.is_cuda and _runtime.HAS_TRITON) or x.device.type == "cpu"
    return "auto" if impl == "auto" and fused and x.dtype != torch.float64 else "torch"


def _output_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Autocast decides when it is on; otherwise a float input keeps its dtype."""
    if dtype is not None:
        if dtype not in _DTYPES:
            raise _bad("dtype", "float32, float16, bfloat16 or float64", dtype)
        return dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _pair(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(side < 1 for side in pair):
        raise _bad(argument, "a positive size or (height, width)", value)
    return pair[0], pair[1]


# ---- Perturbation: prompts on the raw input ----


class Normalization(NamedTuple):
    """How a model wants its pixels: table [4, C] float32 (mean, 1 / std, low, high) and whether values are clamped."""

    table: Tensor
    clamp: str  # "none" | "exact" | "straight"


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
        raise _bad("mean, std, low, high", "one number or one per channel", f"lengths {sorted(lengths)}")
    count = lengths.pop() if lengths else 1
    mean_, std_, low_, high_ = (row.expand(count) for row in rows)
    if not bool((std_ > 0).all()):
        raise _bad("std", "positive numbers", std_.tolist())
    if not bool((low_ <= high_).all()):
        raise _bad("low", "at most high", f"low {low_.tolist()}, high {high_.tolist()}")
    clamp = "none" if low is None and high is None else "straight" if straight_through else "exact"
    table = torch.stack([mean_, 1 / std_, low_, high_]).to(device=device, dtype=torch.float32)
    return Normalization(table, clamp)


def perturb(
    x: Tensor, prompt: Tensor | None = None, *,
    canvas: int | Sequence[int] | None = None, resize: int | Sequence[int] | None = None,
    interpolation: str = "bilinear", offset: Sequence[int] | None = None, copies: int = 1, period: int = 0,
    window: Rect | None = None, hole: Rect | str | None = None, mask: Tensor | None = None, cells: Tensor | None = None,
    share: str | None = None, index: Tensor | None = None,
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
        raise _bad("x", "4 dimensions [B, C, h, w]", f"{x.dim()} dimensions {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"x: expected uint8 or a floating point dtype, got {x.dtype}")
    if _one_of("data_format", data_format, ("NCHW", "NHWC")) == "NHWC":
        x = x.permute(0, 3, 1, 2)
    if prompt is not None:
        if not prompt.is_floating_point():
            raise TypeError(f"prompt: expected a floating point dtype, got {prompt.dtype}")
        prompt = prompt[None] if prompt.dim() == 3 else prompt
        if prompt.dim() != 4:
            raise _bad("prompt", "[C, h', w'] or [N, C, h', w']", list(prompt.shape))
    table, clamp = (None, "none") if norm is None else norm
    _same_device(x, prompt=prompt, mask=mask, cells=cells, index=index, norm=table)
    if memory_format is None:
        channels_last = x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    else:
        channels_last = memory_format == torch.channels_last
    plan = _settings if torch.compiler.is_compiling() else _known_settings
    channels, s = plan(
        (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), None if table is None else table.shape[1],
        None if prompt is None else tuple(prompt.shape), _fixed(canvas), _fixed(resize), interpolation, _fixed(offset),
        copies, period, _fixed(window), _fixed(hole), share, index is not None, cells is not None, squash, mask_first,
        float(scale), space, clamp, _output_dtype(dtype, x), channels_last, _path(impl, x),
    )  # fmt: skip
    if x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1)
    if table is not None and table.shape[1] != channels:
        table = table.expand(4, channels).contiguous()
    if s.share != "batch" and prompt is not None:
        _check_owners(s.share, prompt.shape[0], index, x.shape[0])
    if mask is not None:
        mask = _check_mask(mask, s, channels)
    if cells is not None:
        _check_cells(cells, s, x.shape[0], channels)
    if s.impl == "torch":
        table = _identity_table(channels, x) if table is None else table
        out = _perturbation_reference.perturb(x, prompt, mask, cells, index, table, *s[:-2])
        return out.contiguous(memory_format=torch.channels_last) if channels_last and out.dim() == 4 else out
    given = (x, prompt, mask, cells, index, None if table is None else table.float(), s)
    trained = any(t is not None and t.requires_grad for t in given[:6]) and torch.is_grad_enabled()
    return _perturbation.Perturb.apply(*given) if trained else _perturbation.forward(*given)


def _fixed(value: Any) -> Any:
    """Sizes and rectangles as something that can be looked up."""
    return tuple(value) if isinstance(value, list) else value


def _settings(
    source: tuple[int, int, int], norm_channels: int | None, prompt: tuple[int, ...] | None,
    canvas: int | Sequence[int] | None, resize: int | Sequence[int] | None, interpolation: str,
    offset: Sequence[int] | None, copies: int, period: int, window: Rect | None, hole: Rect | str | None,
    share: str | None, indexed: bool, celled: bool, squash: str, mask_first: bool, scale: float, space: str, clamp: str,
    dtype: torch.dtype, channels_last: bool, impl: str,
) -> tuple[int, _perturbation.Settings]:  # fmt: skip
    """(channels, settings) of a call, from everything about it but values and the batch. Checked once for equal calls."""
    channels = max(source[0], norm_channels or 1, prompt[1] if prompt else 0)
    for name, count in (("x", source[0]), ("norm", norm_channels or 1)):
        if count not in (1, channels):
            raise _bad(name, f"1 or {channels} channels", f"{count} channels")
    if prompt and prompt[1] != channels:
        raise _bad("prompt", f"{channels} channels", f"{prompt[1]} channels")
    size = source[1:]
    placed = size if resize is None else _pair("resize", resize)
    _one_of("interpolation", interpolation, ("bilinear", "bicubic"))
    if placed != size and 0 in size:
        raise _bad("x", "at least one pixel to resize", list(source))
    board = placed if canvas is None else _pair("canvas", canvas)
    image = _place(placed, board, offset, copies, period)
    s = _perturbation.Settings(
        canvas=board, image=image, interpolation="none" if placed == size else interpolation,
        copies=copies, period=period, window=_rect("window", window, board), hole=_hole(hole, image, copies),
        share=_share(share, prompt, indexed, celled),
        squash=_one_of("squash", squash, ("none", "sigmoid", "tanh")), mask_first=mask_first, scale=scale,
        normalized=_one_of("space", space, ("pixel", "normalized")) == "normalized", clamp=clamp,
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


def _same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise _bad(name, f"a tensor on {x.device} like x", f"one on {other.device}")


def _place(size: tuple[int, int], canvas: tuple[int, int], offset: Sequence[int] | None, copies: int, period: int) -> Rect:
    if copies < 1 or (copies > 1 and period < size[1]):
        raise _bad("copies, period", f"copies >= 1 and a period of at least {size[1]}", (copies, period))
    extent = (size[0], size[1] + (copies - 1) * period)
    if extent[0] > canvas[0] or extent[1] > canvas[1]:
        raise _bad("canvas", f"at least the image's {extent[0]}x{extent[1]}", f"{canvas[0]}x{canvas[1]}")
    top, left = ((canvas[0] - extent[0] + 1) // 2, (canvas[1] - extent[1] + 1) // 2) if offset is None else tuple(offset)
    if top < 0 or left < 0 or top + extent[0] > canvas[0] or left + extent[1] > canvas[1]:
        raise _bad("offset", f"the image inside the {canvas[0]}x{canvas[1]} canvas", f"{(top, left)} for {extent}")
    return top, left, *size


def _rect(argument: str, rect: Rect | None, canvas: tuple[int, int]) -> Rect:
    if rect is None:
        return 0, 0, *canvas
    top, left, height, width = rect
    if min(rect) < 0 or top + height > canvas[0] or left + width > canvas[1]:
        raise _bad(argument, f"(top, left, height, width) inside {canvas[0]}x{canvas[1]}", rect)
    return top, left, height, width


def _hole(hole: Rect | str | None, image: Rect, copies: int) -> Rect:
    if hole is None:
        return 0, 0, 0, 0
    if isinstance(hole, str):
        if hole != "image":
            raise _bad("hole", '"image", a rectangle or None', repr(hole))
        if copies > 1:
            raise _bad("hole", "a rectangle, or a pixel mask, for several copies of the image", '"image"')
        return image
    return hole


def _share(share: str | None, prompt: tuple[int, ...] | None, indexed: bool, celled: bool) -> str:
    if prompt is None:
        if share is not None or indexed or celled:
            raise _bad("prompt", "a tensor when share, cells or index is given", None)
        return "none"
    share = _one_of("share", share or ("index" if indexed else "batch"), ("batch", "index", "sample", "product"))
    if share == "batch" and prompt[0] != 1:
        raise _bad("share", f"index, sample or product for {prompt[0]} prompts", repr(share))
    if indexed != (share == "index"):
        raise _bad("index", 'a tensor exactly when share="index"', f"share={share!r}, index={indexed}")
    return share


def _check_owners(share: str, count: int, index: Tensor | None, batch: int) -> None:
    if share == "sample" and count != batch:
        raise _bad("prompt", f'one prompt a sample ({batch}) for share="sample"', f"{count} prompts")
    if index is not None:
        if index.dtype != torch.int64 or index.shape != (batch,):
            raise _bad("index", f"int64 [{batch}]", f"{index.dtype} {list(index.shape)}")
        _check_range("index", index, count)


def _check_prompt(s: _perturbation.Settings, prompt: tuple[int, ...]) -> None:
    top, left, height, width = s.window
    if prompt[2:] != (height, width):
        raise _bad("prompt", f"the window's size {height}x{width}", f"{prompt[2]}x{prompt[3]}")
    y, x, high, wide = s.hole
    if high * wide and not (y >= top and x >= left and y + high <= top + height and x + wide <= left + width):
        raise _bad("hole", f"a rectangle inside the window {s.window}", s.hole)
    if math.prod(prompt) >= 2**31:
        raise _bad("prompt", "fewer than 2**31 elements", math.prod(prompt))


def _check_mask(mask: Tensor, s: _perturbation.Settings, channels: int) -> Tensor:
    mask = mask[None] if mask.dim() == 2 else mask
    if mask.dim() != 3 or mask.shape[0] not in (1, channels) or tuple(mask.shape[1:]) != s.canvas:
        raise _bad("mask", f"[{s.canvas[0]}, {s.canvas[1]}] or [{channels}, ...] on the canvas", list(mask.shape))
    return mask


def _check_cells(cells: Tensor, s: _perturbation.Settings, batch: int, channels: int) -> None:
    shape = tuple(cells.shape)
    if len(shape) != 4 or shape[0] != batch or shape[1] not in (1, channels):
        raise _bad("cells", f"[{batch}, 1 or {channels}, rows, columns]", list(shape))
    if 0 in shape[2:] or s.canvas[0] % shape[2] or s.canvas[1] % shape[3]:
        raise _bad("cells", f"rows and columns that divide the canvas {s.canvas}", shape[2:])
    if s.share != "batch" or s.mask_first or s.hole[2] * s.hole[3] or s.window != (0, 0, *s.canvas):
        raise _bad("cells", "one prompt on the whole canvas, no hole, mask_first=False", "another combination")


def scale_image(x: Tensor, scale: Tensor, canvas: int | Sequence[int]) -> Tensor:
    """x [B, C, h, w], enlarged by a trainable scale about the centre of a zero canvas, bilinear without antialiasing.

    out(u) = x((u - centre) / scale + centre of x); `scale` is a scalar tensor and gets a gradient (AutoVP, Tsao et al. 2024,
    arXiv 2310.08381). For a fixed size use `perturb(resize=...)`, which is antialiased and fused.

    Returns:
        [B, C, H, W] in x's floating point dtype (uint8 is read as x / 255).
    """
    if x.dim() != 4:
        raise _bad("x", "4 dimensions [B, C, h, w]", list(x.shape))
    if scale.numel() != 1 or not scale.is_floating_point():
        raise _bad("scale", "a floating point tensor with one element", f"{scale.dtype} {list(scale.shape)}")
    height, width = _pair("canvas", canvas)
    x = x / 255 if x.dtype == torch.uint8 else x
    zoom = 1 / scale.reshape(()).to(x.dtype)
    theta = torch.eye(2, 3, dtype=x.dtype, device=x.device)
    theta = theta * torch.stack([zoom * (width / x.shape[3]), zoom * (height / x.shape[2])])[:, None]
    grid = torch.nn.functional.affine_grid(
        theta.expand(x.shape[0], 2, 3), [x.shape[0], x.shape[1], height, width], align_corners=False
    )
    return torch.nn.functional.grid_sample(x, grid, align_corners=False)


# ---- Mapping: from source classes to target classes ----


def map_labels(logits: Tensor, index: Tensor, *, impl: str = "auto") -> Tensor:
    """Target t reads source index[t]: out[b, t] = logits[b, index[t]]. One launch forward, one backward.

    The one-to-one label maps of ILM-VP (Chen et al. 2023, arXiv 2211.11635); `match_labels` and `nn.LabelMap` make them. A
    source that several targets read is allowed: its gradient is their sum, in the order of t.

    Args:
        logits: [B, S], floating point, any strides. NaN in, NaN out.
        index: int64 [T], values from 0 to S - 1. On a GPU a value out of range makes its column NaN and has no gradient
            (FASTPROMPT_CHECK=1 raises instead).
        impl: see the module.

    Returns:
        [B, T] in the dtype of the logits, with and without autocast: values are moved, not computed. The gradient is dense
        and the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came.
        RuntimeError: a second derivative of the kernels is asked for (impl="torch" has one).
    """
    _check_logits(logits)
    _check_labels("index", index, None)
    _same_device(logits, index=index)
    path = _path(impl, logits)
    if path == "auto" and logits.device.type == "cpu":
        try:
            return logits.index_select(1, index)  # the best there is on a CPU, backward too
        except (IndexError, RuntimeError):  # it looks at the index itself, without saying which argument is wrong
            _check_range("index", index, logits.shape[1])
            raise
    _check_range("index", index, logits.shape[1])
    if path == "torch":
        return _mapping_reference.map_labels(logits, index)
    return _mapping.MapLabels.apply(logits, index, logits.requires_grad and torch.is_grad_enabled())


@torch.no_grad()
def count_labels_(counts: Tensor, logits: Tensor, target: Tensor, *, impl: str = "auto") -> Tensor:
    """Adds to counts[s, t] the samples b with argmax(logits[b]) = s and target[b] = t. Changes `counts`, and returns it.

    The arg-max and the sum are one pass where the logits are: nothing is kept and nothing goes to the host. The arg-max is
    torch.argmax's: the first index wins a tie, and NaN is larger than everything. Integers are added, so the counts are
    exact and do not depend on the order or on how the samples are cut into batches. No gradient.

    Args:
        counts: int64 [S, T], contiguous.
        logits: [B, S], floating point, any strides.
        target: int64 [B], values from 0 to T - 1, or -100 (PyTorch's ignore_index) for a sample that is not counted. On a
            GPU, and under torch.compile, a sample with any other value is not counted either (on a GPU FASTPROMPT_CHECK=1
            raises instead).
        impl: see the module.

    Raises:
        ValueError, TypeError: what was expected and what came; `counts` is unchanged.
    """
    _check_logits(logits)
    _check_counts(counts)
    if not counts.is_contiguous():
        raise _bad("counts", "a contiguous tensor", f"strides {list(counts.stride())}")
    if counts.shape[0] != logits.shape[1]:
        raise _bad("counts", f"one row a source, {logits.shape[1]}", f"{counts.shape[0]} rows")
    _check_labels("target", target, logits.shape[0])
    _same_device(logits, counts=counts, target=target)
    _check_range("target", target, counts.shape[1], ignored=-100)
    path = _path(impl, logits)
    if path == "torch":
        return _mapping_reference.count_labels_(counts, logits, target)
    _mapping.count_labels_(counts, logits, target, path)
    return counts


def match_labels(counts: Tensor) -> Tensor:
    """The greedy one-to-one map of FLM and ILM (Chen et al. 2023, arXiv 2211.11635) from counts [S, T]: index [T].

    The same bits as "T times: take the largest cell of the flattened matrix, the first of equals; give that source to
    that target; strike its row and its column", by one sort of the cells that are not zero. A class that was never seen,
    or whose sources are all taken, gets a free source: the lowest source for the lowest class. Runs on the host, once a
    refresh; of counts on a GPU only the cells that are not zero are copied.

    Args:
        counts: int64 [S, T], not negative.

    Returns:
        int64 [T] on the device of the counts; no source twice.

    Raises:
        ValueError: more targets than sources, or a negative count. TypeError: another dtype.
    """
    _check_counts(counts)
    if counts.shape[1] > counts.shape[0]:
        raise _bad("counts", "at least as many sources as targets, for a one-to-one map", f"[S, T] {list(counts.shape)}")
    return _mapping.match_labels(counts)


def _check_logits(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating point dtype, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise _bad("logits", "[B, S] with at least one source class", list(logits.shape))


def _check_counts(counts: Tensor) -> None:
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected int64, got {counts.dtype}")
    if counts.dim() != 2:
        raise _bad("counts", "[S, T]", list(counts.shape))


def _check_labels(argument: str, labels: Tensor, length: int | None) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{argument}: expected int64, got {labels.dtype}")
    if labels.dim() != 1 or length not in (None, labels.shape[0]):
        raise _bad(argument, f"[{length}], one a sample" if length is not None else "[T]", list(labels.shape))


def _check_range(argument: str, values: Tensor, count: int, ignored: int | None = None) -> None:
    """Values from 0 to count - 1. Looking at them costs a sync on a GPU, so there only on request."""
    if (values.device.type == "cpu" or _runtime.checking()) and not torch.compiler.is_compiling() and len(values):
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if low >= 0 and high < count:
            return
        wrong = values[((values < 0) | (values >= count)) & (values != ignored if ignored is not None else True)]
        if len(wrong):
            raise _bad(argument, f"values from 0 to {count - 1}", wrong[:8].tolist())
