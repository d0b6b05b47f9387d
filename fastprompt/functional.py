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
from fastprompt.ops import attention as _attention
from fastprompt.ops import mapping as _mapping
from fastprompt.ops import perturbation as _perturbation
from fastprompt.reference import attention as _attention_reference
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


# ---- Attention: a prefix that the batch shares ----


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, *,
    prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None,
    causal: bool = False, window: int | None = None, lengths: Tensor | None = None, padding: str = "right",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None, max_seqlen_k: int | None = None,
    gate: Tensor | None = None, separate: bool = False,
    dropout: float = 0.0, dropout_shared: bool = True, seed: int | Tensor | None = None,
    scale: float | None = None, softcap: float | None = None, return_lse: bool = False, impl: str = "auto",
) -> Any:  # fmt: skip
    """Attention of every query to a prefix and to the sample's own keys, without joining the two in memory.

        out = softmax(scale * q [gate * prefix_k | k]^T) [gate * prefix_v | v]

    with one softmax over the columns that a query sees; separate=True is attention(q, k, v) + gate * attention(q, prefix).
    Exact: it is what attention gives after the prefix has been copied in front of each sample's keys. Prefix tuning: Li &
    Liang 2021 (arXiv 2101.00190); P-tuning v2: Liu et al. 2022 (arXiv 2110.07602); VPT-deep: Jia et al. 2022 (arXiv
    2203.12119); gate: UniPELT, Mao et al. 2022 (arXiv 2110.07577); separate: LLaMA-Adapter, Zhang et al. 2024 (arXiv
    2303.16199).

    Args:
        q: [B, H, T, D], floating point, any strides.
        k, v: [B, Hkv, S, D]; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        prefix_k, prefix_v: [N, Hkv, P, D], seen by every query. N = 1: shared by the batch. N = B: one a sample. Other N:
            with `prefix_index`. None: no prefix.
        prefix_index: int64 [B] or [B, M]: each sample's prefixes, side by side; -1: none. On a GPU a sample with another
            value out of range is NaN and teaches nothing (FASTPROMPT_CHECK=1 raises instead).
        prefix_lengths: int64 [N]: how many of the P rows of each prefix exist, counted from the first.
        causal: own key j is seen by query i if j <= i + S - T: the last query lines up with the last key.
        window: w >= 1: own keys at most w - 1 positions before the query (and after it when not causal).
        lengths: int64 [B]: how many own keys of each sample exist; the first ones, or with padding="left" the last ones.
        key_mask: bool [B, S]: the own keys that exist.
        cu_seqlens: int64 or int32 [n + 1], 0 first: sequences of different lengths packed behind each other. B is 1 and T the
            sum of the lengths; wherever a shape above says B for a prefix, an index or a gate, it is n.
        cu_seqlens_k: the same for the keys. Default: cu_seqlens.
        max_seqlen, max_seqlen_k: the longest sequence. Default on a GPU: the sum of the lengths, which is right but slower.
        gate: [1 or B, 1 or H], floating point; multiplies the prefix's keys and values.
        separate: the prefix has a softmax of its own, and `gate` multiplies what it adds.
        dropout: share of the elements of prefix_k and prefix_v that are set to 0 (the others grow by 1 / (1 - dropout)).
        dropout_shared: one draw for the batch; otherwise one a sample, for which a prefix is copied for each sample.
        seed: of the draw, an int or an int64 tensor with one element. Default: from PyTorch's generator.
        scale: default D ** -0.5.
        softcap: c > 0: c * tanh(score / c) in the place of score.
        return_lse: also return the log-sum-exp of the scores.
        impl: see the module.

    Returns:
        [B, H, T, D] in the dtype of q (autocast's when it is on), or with return_lse (that, natural log-sum-exp [B, H, T] in
        float32). A query that sees nothing gives 0 and -inf, and has no gradient. Gradients: q, k, v, prefix_k, prefix_v and
        gate, through both results. Sums over the batch have a fixed order: the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came, before any device work.
        RuntimeError: a second derivative of the fused paths is asked for (impl="torch" has one).
    """
    q, k, v, prefix_k, prefix_v = _check_heads(q, k, v, prefix_k, prefix_v)
    path = _path(impl, q)
    near = {"prefix_index": prefix_index, "prefix_lengths": prefix_lengths, "lengths": lengths, "key_mask": key_mask}
    for name, other in (near | {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "gate": gate}).items():
        if other is not None and other.device != q.device:
            raise _bad(name, f"a tensor on {q.device} like q", f"one on {other.device}")
    queries, keys = q.shape[2], k.shape[2]
    if cu_seqlens is None:
        for name, given in (("cu_seqlens_k", cu_seqlens_k), ("max_seqlen", max_seqlen), ("max_seqlen_k", max_seqlen_k)):
            if given is not None:
                raise _bad("cu_seqlens", f"a tensor when {name} is given", None)
        starts_q = starts_k = None
        batch, max_q, max_k = q.shape[0], queries, keys
        if causal and queries > keys:
            raise _bad("causal", "at most as many queries as keys", f"{queries} queries, {keys} keys")
    else:
        for name, given in (("lengths", lengths), ("key_mask", key_mask)):
            if given is not None:
                raise _bad(name, "None with cu_seqlens, which says the lengths", "a tensor")
        starts_q, starts_k = _check_packing(cu_seqlens, cu_seqlens_k, q, k, causal)
        batch = starts_q.shape[0] - 1
        max_q = _longest("max_seqlen", max_seqlen, starts_q, queries)
        max_k = _longest("max_seqlen_k", max_seqlen if cu_seqlens_k is None else max_seqlen_k, starts_k, keys)
    if window is not None and window < 1:
        raise _bad("window", "at least 1, or None", window)
    _one_of("padding", padding, ("right", "left"))
    if lengths is not None:
        _check_counts_of("lengths", lengths, batch, keys)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, keys)):
        raise _bad("key_mask", f"bool [{batch}, {keys}]", f"{key_mask.dtype} {list(key_mask.shape)}")
    index = _check_prefix_index(prefix_index, prefix_k, batch)
    if prefix_k is None:
        for name, given in (("prefix_lengths", prefix_lengths), ("gate", gate)):
            if given is not None:
                raise _bad("prefix_k", f"a tensor when {name} is given", None)
    elif prefix_lengths is not None:
        _check_counts_of("prefix_lengths", prefix_lengths, prefix_k.shape[0], prefix_k.shape[2])
    if gate is not None:
        if not gate.is_floating_point():
            raise TypeError(f"gate: expected a floating point dtype, got {gate.dtype}")
        if gate.dim() != 2 or gate.shape[0] not in (1, batch) or gate.shape[1] not in (1, q.shape[1]):
            raise _bad("gate", f"[1 or {batch}, 1 or {q.shape[1]}]", list(gate.shape))
    if separate and (gate is None or return_lse):
        raise _bad("separate", "a gate, and no return_lse", f"gate={'a tensor' if gate is not None else None}, {return_lse=}")
    if not 0 <= dropout < 1:
        raise _bad("dropout", "a number from 0 to less than 1", dropout)
    if softcap is not None and not softcap > 0:
        raise _bad("softcap", "a positive number, or None", softcap)

    if dropout and prefix_k is not None and prefix_v is not None:
        if seed is None:
            seed = torch.randint(2**62, (), device=q.device)
        if not dropout_shared:
            prefix_k, prefix_v, index, prefix_lengths = _one_prefix_a_sample(prefix_k, prefix_v, index, prefix_lengths, batch)
        prefix_k = prefix_k * _kept_elements(prefix_k, dropout, seed, 0)
        prefix_v = prefix_v * _kept_elements(prefix_v, dropout, seed, 1)
    s = _attention.Settings(
        max_q, max_k, window or 0, bool(causal), padding == "left", path == "triton",
        q.shape[3] ** -0.5 if scale is None else float(scale), softcap or 0.0,
    )  # fmt: skip
    own = (lengths, key_mask, starts_q, starts_k)
    if not separate:
        out, lse = _attend(q, k, v, prefix_k, prefix_v, index, prefix_lengths, *own, gate, s, path, return_lse)
        return (out, lse) if return_lse else out
    assert gate is not None
    out, _ = _attend(q, k, v, None, None, None, None, *own, None, s, path)
    alone = s._replace(max_k=0, window=0, causal=False)
    nothing = None if starts_k is None else torch.zeros_like(starts_k)
    theirs, _ = _attend(
        q, k[:, :, :0], v[:, :, :0], prefix_k, prefix_v, index, prefix_lengths, None, None, starts_q, nothing, None, alone, path
    )
    if starts_q is None:
        factor = gate[:, :, None, None]
    else:  # one row a token: that of its sequence
        sequence = torch.bucketize(torch.arange(queries, device=q.device), starts_q[1:], right=True)
        factor = gate.expand(batch, -1)[sequence].T[None, :, :, None]
    return (out + factor * theirs).to(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, index: Tensor | None,
    prefix_lengths: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, starts_q: Tensor | None,
    starts_k: Tensor | None, gate: Tensor | None, s: _attention.Settings, path: str, through_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax, on the chosen path; PyTorch's flash attention on a CPU has no soft cap."""
    if path == "triton" or (path == "auto" and not (s.softcap and q.device.type == "cpu")):
        return _attention.PrefixAttention.apply(
            q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, s, through_lse
        )
    how: tuple[Any, ...] = (s.scale, s.causal, s.window, s.left, s.softcap)
    with torch.autocast(q.device.type, enabled=False):
        if starts_q is None or starts_k is None:
            return _attention_reference.prefix_attention(
                q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, *how
            )
        results = []
        for i, (own_q, own_k) in enumerate(_attention.sequences(starts_q, starts_k)):
            pk, pv, size = _attention.rows_of(i, index is None, prefix_k, prefix_v, prefix_lengths)
            chosen, factor = _attention.rows_of(i, True, index, gate)
            own = (q[:, :, own_q], k[:, :, own_k], v[:, :, own_k])
            results.append(_attention_reference.prefix_attention(*own, pk, pv, chosen, size, None, None, factor, *how))
        outs, logs = zip(*results, strict=True)
        return torch.cat(outs, 2), torch.cat(logs, 2)


def _check_heads(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The five tensors in autocast's dtype, after all that their shapes, dtypes and devices can do wrong."""
    if (prefix_k is None) != (prefix_v is None):
        raise _bad("prefix_k, prefix_v", "both or neither", f"only prefix_{'k' if prefix_v is None else 'v'}")
    given = {"q": q, "k": k, "v": v}
    if prefix_k is not None and prefix_v is not None:
        given |= {"prefix_k": prefix_k, "prefix_v": prefix_v}
    amp = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else None
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {t.dtype}")
        if t.dim() != 4:
            raise _bad(name, "4 dimensions [batch, heads, length, D]", f"{t.dim()} dimensions {list(t.shape)}")
        if t.device != q.device:
            raise _bad(name, f"a tensor on {q.device} like q", f"one on {t.device}")
        if amp is not None and t.dtype != torch.float64:
            given[name] = t = t.to(amp)
        if t.dtype != given["q"].dtype:
            raise _bad(name, f"{given['q'].dtype} like q", t.dtype)
        if t.shape[3] != q.shape[3]:
            raise _bad(name, f"heads of {q.shape[3]} elements like q", t.shape[3])
    if v.shape != k.shape:
        raise _bad("v", f"the shape of k, {list(k.shape)}", list(v.shape))
    if k.shape[0] != q.shape[0]:
        raise _bad("k", f"{q.shape[0]} samples like q", k.shape[0])
    heads, key_heads = q.shape[1], k.shape[1]
    if key_heads < 1 or heads < 1 or heads % key_heads:
        raise _bad("q", f"a multiple of the {key_heads} heads of k", f"{heads} heads")
    if q.shape[3] < 1:
        raise _bad("q", "heads of at least 1 element", 0)
    if prefix_k is not None and prefix_v is not None:
        if prefix_v.shape != prefix_k.shape:
            raise _bad("prefix_v", f"the shape of prefix_k, {list(prefix_k.shape)}", list(prefix_v.shape))
        if prefix_k.shape[1] != key_heads:
            raise _bad("prefix_k", f"{key_heads} heads like k", prefix_k.shape[1])
    return given["q"], given["k"], given["v"], given.get("prefix_k"), given.get("prefix_v")


def _check_packing(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the packed sequences start, as int64: of the queries and of the keys."""
    if q.shape[0] != 1:
        raise _bad("q", "[1, H, total length, D] with cu_seqlens", list(q.shape))
    both = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens if cu_seqlens_k is None else cu_seqlens_k}
    for name, starts in both.items():
        if starts.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {starts.dtype}")
        if starts.dim() != 1 or starts.shape[0] < 2 or starts.shape != cu_seqlens.shape:
            raise _bad(name, "[n + 1] for at least one sequence, as many for queries as for keys", list(starts.shape))
    if cu_seqlens_k is None and q.shape[2] != k.shape[2]:
        raise _bad("cu_seqlens_k", "a tensor for keys of another total length", f"{q.shape[2]} queries, {k.shape[2]} keys")
    starts_q, starts_k = (starts.to(torch.int64) for starts in both.values())
    if _looks_at_values(cu_seqlens):
        for name, starts, total in (("cu_seqlens", starts_q, q.shape[2]), ("cu_seqlens_k", starts_k, k.shape[2])):
            values = starts.tolist()
            if values[0] != 0 or values[-1] != total or values != sorted(values):
                raise _bad(name, f"rising values from 0 to {total}", values[:8] if len(values) <= 8 else [*values[:8], "..."])
        if causal and bool((starts_q.diff() > starts_k.diff()).any()):
            raise _bad("causal", "at most as many queries as keys in each sequence", "a sequence with more")
    return starts_q, starts_k


def _longest(argument: str, given: int | None, starts: Tensor, total: int) -> int:
    look = _looks_at_values(starts)
    longest = int(starts.diff().max()) if look else total
    if given is not None and (given < longest if look else given < 0):
        raise _bad(argument, f"at least the longest sequence, {longest}" if look else "at least 0", given)
    return longest if given is None else given


def _looks_at_values(t: Tensor) -> bool:
    """Looking at values costs a sync on a GPU, so there only on request."""
    return (t.device.type == "cpu" or _runtime.checking()) and not torch.compiler.is_compiling()


def _check_counts_of(argument: str, lengths: Tensor, count: int, longest: int) -> None:
    if lengths.dtype != torch.int64 or lengths.shape != (count,):
        raise _bad(argument, f"int64 [{count}]", f"{lengths.dtype} {list(lengths.shape)}")
    _check_range(argument, lengths, longest + 1)


def _check_prefix_index(index: Tensor | None, prefix: Tensor | None, batch: int) -> Tensor | None:
    """The index as [B, M]."""
    if prefix is None:
        if index is not None:
            raise _bad("prefix_k", "a tensor when prefix_index is given", None)
        return None
    if index is None:
        if prefix.shape[0] not in (1, batch):
            raise _bad("prefix_k", f"1 or {batch} prefixes without a prefix_index", f"{prefix.shape[0]} prefixes")
        return None
    if index.dtype != torch.int64 or index.dim() not in (1, 2) or index.shape[0] != batch:
        raise _bad("prefix_index", f"int64 [{batch}] or [{batch}, M]", f"{index.dtype} {list(index.shape)}")
    if prefix.shape[0] < 1:
        raise _bad("prefix_k", "at least one prefix", list(prefix.shape))
    _check_range("prefix_index", index.flatten(), prefix.shape[0], ignored=-1)
    return index[:, None] if index.dim() == 1 else index


def _one_prefix_a_sample(
    prefix_k: Tensor, prefix_v: Tensor, index: Tensor | None, prefix_lengths: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The prefixes once for every sample that reads them, so that each can be another draw."""
    if index is None:
        if prefix_k.shape[0] == batch:
            return prefix_k, prefix_v, None, prefix_lengths
        lengths = None if prefix_lengths is None else prefix_lengths.expand(batch)
        return prefix_k.expand(batch, -1, -1, -1), prefix_v.expand(batch, -1, -1, -1), None, lengths
    count, flat = prefix_k.shape[0], index.flatten()
    chosen = flat.clamp(0, count - 1)
    # -1 stays none, and what is out of range stays out of range.
    own = torch.arange(len(flat), device=flat.device)
    own = torch.where(flat < 0, flat, torch.where(flat < count, own, len(flat)))
    lengths = None if prefix_lengths is None else prefix_lengths[chosen]
    return prefix_k[chosen], prefix_v[chosen], own.view(index.shape), lengths


def _kept_elements(prefix: Tensor, dropout: float, seed: int | Tensor, stream: int) -> Tensor:
    """0 or 1 / (1 - dropout) for each element: a hash of the seed and the element's place, so the same on every device."""
    place = torch.arange(prefix.numel(), device=prefix.device).view(prefix.shape)
    mixed = _mix(_mix(2 * place + stream) + seed)
    kept = (mixed & 0xFFFFFF) >= round(dropout * 2**24)
    return kept.to(prefix.dtype) * (1 / (1 - dropout))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195) on int64, which wraps around."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


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
