"""Prompted model input in plain PyTorch, differentiable, float32 inside (float64 for float64 inputs).

    pixel space       out = (clamp(place(x) + p) - mean) / std              p = scale * squash(delta) * M
    normalised space  out = clamp(place((x - mean) / std) + p)

Model reprogramming: Elsayed et al. 2019 (arXiv 1806.11146); padded prompt: Chen et al. 2023 (ILM-VP, arXiv 2211.11635);
sample-specific masks: Cai et al. 2024 (SMM, arXiv 2406.03150).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Rect = tuple[int, int, int, int]  # top, left, height, width, on the canvas


@lru_cache(maxsize=256)
def resize_taps(size: int, out: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased resampling weights along one axis, as Pillow computes them.

    Returns (first [out] int32, weights [out, taps] float64): out pixel i is sum_t weights[i, t] * pixel[first[i] + t], the
    weights of a pixel sum to 1, and weights beyond the image are 0. mode is "bilinear" or "bicubic" (a = -0.5).
    """
    support = {"bilinear": 1.0, "bicubic": 2.0}[mode]
    ratio = size / out
    stretch = max(ratio, 1.0)
    center = (np.arange(out) + 0.5) * ratio
    low = np.maximum((center - support * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((center + support * stretch + 0.5).astype(np.int64), size)
    taps = int((high - low).max())
    at = low[:, None] + np.arange(taps)
    t = np.abs((at - center[:, None] + 0.5) / stretch)
    if mode == "bilinear":
        weights = np.where(t < 1, 1 - t, 0.0)
    else:
        near = (1.5 * t - 2.5) * t * t + 1
        far = (((t - 5) * t + 8) * t - 4) * -0.5
        weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    weights = np.where(at < high[:, None], weights, 0.0)
    return low.astype(np.int32), weights / weights.sum(1, keepdims=True)


def fixed_point(weights: np.ndarray) -> np.ndarray:
    """The weights as Pillow's 22-bit integers (half away from zero)."""
    return np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int32)


@lru_cache(maxsize=64)
def resize_matrix(size: int, out: int, mode: str, integer: bool) -> Tensor:
    """`resize_taps` as a dense [out, size] float64 matrix; of 22-bit integers when `integer`."""
    first, weights = resize_taps(size, out, mode)
    dense = np.zeros((out, size))
    at = np.minimum(first[:, None] + np.arange(weights.shape[1]), size - 1)
    np.add.at(dense, (np.arange(out)[:, None], at), fixed_point(weights) if integer else weights)
    return torch.from_numpy(dense)


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """x [..., h, w] -> [..., size]: columns first, then rows, antialiased.

    uint8: bit for bit what `PIL.Image.resize` gives, each pass rounded to uint8. Float: the same weights, not rounded.
    """
    if x.dtype == torch.uint8:
        # Products of 22-bit weights and 8-bit pixels are exact in float64.
        for axis, out in ((-1, size[1]), (-2, size[0])):
            matrix = resize_matrix(x.shape[axis], out, mode, True).to(x.device)
            wide = x.double()
            total = wide @ matrix.T if axis == -1 else matrix @ wide
            x = torch.floor((total + (1 << 21)) / (1 << 22)).clamp(0, 255).to(torch.uint8)
        return x
    rows = resize_matrix(x.shape[-2], size[0], mode, False).to(x)
    columns = resize_matrix(x.shape[-1], size[1], mode, False).to(x)
    return rows @ (x @ columns.T)


def squash(delta: Tensor, how: str) -> Tensor:
    """none | sigmoid | tanh."""
    if how == "none":
        return delta.clone()
    return torch.sigmoid(delta) if how == "sigmoid" else torch.tanh(delta)


def region(canvas: tuple[int, int], window: Rect, hole: Rect, device: torch.device) -> Tensor:
    """[H, W] bool: inside the window, outside the hole."""
    on = torch.zeros(canvas, dtype=torch.bool, device=device)
    on[window[0] : window[0] + window[2], window[1] : window[1] + window[3]] = True
    on[hole[0] : hole[0] + hole[2], hole[1] : hole[1] + hole[3]] = False
    return on


def prompt_canvas(
    prompt: Tensor, mask: Tensor | None, canvas: tuple[int, int], window: Rect, hole: Rect,
    scale: float, squash_: str, mask_first: bool,
) -> Tensor:  # fmt: skip
    """p = scale * squash(delta) * M on the whole canvas: [N, C, H, W] from the prompt [N, C, h', w']."""
    top, left, height, width = window
    delta = torch.nn.functional.pad(prompt, (left, canvas[1] - left - width, top, canvas[0] - top - height))
    m = region(canvas, window, hole, prompt.device).to(prompt.dtype)
    if mask is not None:
        m = m * mask.to(prompt.dtype)
    return scale * (squash(delta * m, squash_) if mask_first else squash(delta, squash_) * m)


def place(x: Tensor, canvas: tuple[int, int], image: Rect, copies: int, period: int) -> Tensor:
    """x [B, C, h, w] on a zero canvas [B, C, H, W], `copies` times side by side every `period` columns."""
    top, left, height, width = image
    out = x.new_zeros((*x.shape[:2], *canvas))
    for copy in range(copies):
        start = left + copy * period
        out[:, :, top : top + height, start : start + width] = x
    return out


def perturb(
    x: Tensor, prompt: Tensor | None, mask: Tensor | None, cells: Tensor | None, index: Tensor | None, rows: Tensor | None,
    norm: Tensor,
    canvas: tuple[int, int], image: Rect, interpolation: str, copies: int, period: int, window: Rect, hole: Rect,
    share: str, squash_: str, mask_first: bool, scale: float, normalized: bool, clamp: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The prompted input [B, C, H, W] (share "product": [K, B, C, H, W]) in `dtype`.

    x [B, C, h, w] uint8 or float, or images of which sample b is x[rows[b]]; prompt [N, C, h', w']; mask [1 or C, H, W];
    cells [B, 1 or C, rows, columns]; index [B]; norm [4, C]: mean, 1 / std, low, high. interpolation "none" needs h, w to be
    the image rectangle's. clamp is "none", "exact" (gradient 0 where clamped) or "straight" (straight-through).
    """
    inner = torch.float64 if torch.float64 in (x.dtype, norm.dtype) else torch.float32
    there = None
    if rows is not None:
        there = (rows >= 0) & (rows < x.shape[0])
        x = x[rows.clamp(0, x.shape[0] - 1)]
    if interpolation != "none":
        x = resize(x if x.dtype in (torch.uint8, inner) else x.to(inner), image[2:], interpolation)
    pixel = x.to(inner) / 255 if x.dtype == torch.uint8 else x.to(inner)
    mean, gain, low, high = norm.to(inner)[:, :, None, None]
    base = place((pixel - mean) * gain if normalized else pixel, canvas, image, copies, period)
    if prompt is not None:
        p = prompt_canvas(prompt.to(inner), mask, canvas, window, hole, scale, squash_, mask_first)
        if index is not None:
            known = (index >= 0) & (index < p.shape[0])
            p = p[index.clamp(0, p.shape[0] - 1)]
            p = torch.where(known[:, None, None, None], p, torch.nan)
        elif share == "product":
            p = p[:, None]
        if cells is not None:
            down, across = canvas[0] // cells.shape[2], canvas[1] // cells.shape[3]
            p = p * cells.to(inner).repeat_interleave(down, 2).repeat_interleave(across, 3)
        base = base + p
    if clamp != "none":
        limited = torch.minimum(torch.maximum(base, low), high)
        inside = (base >= low) & (base <= high)
        limited = torch.where(inside | base.isnan(), base, limited.detach())
        base = limited if clamp == "exact" else base + (limited - base).detach()
    out = base if normalized else (base - mean) * gain
    if there is not None:
        out = torch.where(there[:, None, None, None], out, torch.nan)
    return out.to(dtype)
