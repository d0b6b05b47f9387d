"""Prompts on the raw input against what a user would run instead.

Rivals: `eager`, the chain of the public repositories, written from its formula and given every benefit (mean and std are
tensors on the device, one pass turns uint8 into pixels); `compile`, torch.compile of it; `plain`, the best plain PyTorch
found: what the batch shares is computed once, only the image is written per sample, the gradient is a sum over the
trainable strips. `Pillow` is the per-image transform of a data loader.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import functional
from fastprompt.nn import PaddedPrompt

from .suite import Case, Form, Inputs, Skip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4.1e-3, torch.float16: 5.2e-4}  # forward: rounding of the output
GRADIENT = 2e-5  # float32 sums over a batch
ONE_LEVEL = 1.02 / 255 / min(STD)  # one grey level, after normalising


# ---- Plain PyTorch with a gradient written by hand ----


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, inputs, *leaves):  # type: ignore[no-untyped-def]
        ctx.by_hand, ctx.inputs = backward, inputs
        return forward(inputs)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return None, None, None, *ctx.by_hand(ctx.inputs, g)


def by_hand(forward: Form, backward: Callable[[Inputs, Tensor], tuple[Tensor, ...]], *wrt: str) -> Form:
    return lambda i: _ByHand.apply(forward, backward, i, *(i[name] for name in wrt))


# ---- Inputs ----


def _common(generator: torch.Generator, device: torch.device) -> Inputs:
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    return {
        "mean": mean, "std": std, "unit": torch.tensor(1 / 255, device=device),
        "norm": functional.normalization(MEAN, STD, device=device),
    }  # fmt: skip


def _random(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _pixels(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)


def _sizes(*shapes: tuple[int, ...]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def _modes(names: tuple[str, ...], forward: int, backward: int, build: Callable[..., Case]) -> list[Case]:
    moved = {"forward": forward, "backward": backward, "both": forward + backward}
    return [
        build(mode=mode, bytes=moved[mode], tolerance=TOLERANCE[torch.float32] if mode == "forward" else GRADIENT)
        for mode in names
    ]


# ---- Padded prompt: ILM-VP, BLM, AttrVR ----


def padded(
    batch: int, size: int, canvas: int, dtype: torch.dtype, modes: tuple[str, ...], *, channels: int = 3,
    channels_last: bool = False, copies: int = 1, image_gradient: bool = False, name: str = "pad",
) -> list[Case]:  # fmt: skip
    """out = (pad(x) + sigmoid(prompt) * M - mean) / std; `copies` prompts on the same batch (DVP)."""
    low, high = (canvas - size + 1) // 2, (canvas - size) // 2
    inside = slice(low, low + size)
    shape = (batch, channels, canvas, canvas)
    full = shape if copies == 1 else (copies, *shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    source = torch.float32 if image_gradient else torch.uint8
    wrt = ("x", "prompt") if image_gradient else ("prompt",)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _common(generator, device)
        made["x"] = _pixels((batch, channels, size, size), generator, device).contiguous(memory_format=layout)
        if image_gradient:
            made["x"] = (made["x"] / 255).requires_grad_()
            made["unit"].fill_(1)
        made["prompt"] = _random((copies, channels, canvas, canvas), generator, device, torch.float32).requires_grad_()
        made["g"] = _random(full, generator, device, dtype)
        if copies == 1:
            made["g"] = made["g"].contiguous(memory_format=layout)
        made["mask"] = torch.ones((canvas, canvas), device=device)
        made["mask"][inside, inside] = 0
        return made

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(
            i["x"], i["prompt"], canvas=canvas, hole="image", squash="sigmoid", norm=i["norm"], dtype=dtype,
            memory_format=layout, share="batch" if copies == 1 else "product",
        )  # fmt: skip

    def chain(i: Inputs) -> Tensor:
        image = F.pad(i["x"] * i["unit"], (low, high, low, high))
        outs = [(image + torch.sigmoid(p) * i["mask"]).sub(i["mean"]).div(i["std"]) for p in i["prompt"].unbind()]
        return outs[0] if copies == 1 else torch.stack(outs)

    def plain(i: Inputs) -> Tensor:
        gain = 1 / i["std"]
        frame = (torch.sigmoid(i["prompt"]) * i["mask"] - i["mean"]) * gain
        out = torch.empty(shape if copies == 1 else full, dtype=dtype, device=i["x"].device)
        out = out.contiguous(memory_format=layout) if channels_last else out
        out.copy_(frame if copies == 1 else frame[:, None])
        out[..., inside, inside] = (i["x"] * (i["unit"] * gain)).sub_(i["mean"] * gain)
        return out

    def plain_gradient(i: Inputs, g: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros_like(i["prompt"])
        across = slice(0, canvas)
        above, below = slice(0, low), slice(low + size, canvas)
        for rows, columns in ((above, across), (below, across), (inside, above), (inside, below)):
            total[..., rows, columns] = g[..., rows, columns].sum(-4, dtype=torch.float32)
        y = torch.sigmoid(i["prompt"])
        prompt = total / i["std"] * (y * (1 - y))
        return (g[..., inside, inside] / i["std"], prompt) if image_gradient else (prompt,)

    image = _sizes((batch, channels, size, size)) * source.itemsize
    prompt = _sizes((copies, channels, canvas, canvas)) * 4
    output = _sizes(full) * dtype.itemsize
    frame = output * (canvas**2 - size**2) // canvas**2
    backward = frame + 2 * prompt
    if image_gradient:
        backward = output + 2 * prompt + image
    title = f"B={batch} {channels}x{size}->{canvas}" + (f" K={copies}" if copies > 1 else "")
    case = partial(
        Case, family="perturbation", name=name, shape=title, dtype=dtype, inputs=inputs,
        forms={"fastprompt": ours, "eager": lambda i: chain(i).to(dtype), "plain": by_hand(plain, plain_gradient, *wrt)},
        formula=chain, wrt=wrt,
    )  # fmt: skip
    return _modes(modes, image + prompt + output, backward, _rounded(case, dtype))


def _rounded(build: Callable[..., Case], dtype: torch.dtype) -> Callable[..., Case]:
    """Forward outputs may differ by their own rounding."""

    def with_tolerance(mode: str, tolerance: float, **rest: Any) -> Case:
        return build(mode=mode, tolerance=TOLERANCE[dtype] if mode == "forward" else tolerance, **rest)

    return with_tolerance


# ---- A prompt on a full image: watermark, VP, DAM-VP ----


def framed(
    batch: int, width: int | None, dtype: torch.dtype, modes: tuple[str, ...], *, prompts: int = 1, canvas: int = 224,
    name: str = "frame",
) -> list[Case]:  # fmt: skip
    """out = (x - mean) / std + prompt[index] * M, from uint8; width None: the whole image."""
    shape = (batch, 3, canvas, canvas)
    inner = slice(width, canvas - width) if width else slice(0, 0)
    hole = (width, width, canvas - 2 * width, canvas - 2 * width) if width else None

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _common(generator, device)
        made["x"] = _pixels(shape, generator, device)
        made["prompt"] = _random((prompts, 3, canvas, canvas), generator, device, torch.float32).requires_grad_()
        made["index"] = torch.randint(prompts, (batch,), generator=generator, device=device)
        made["g"] = _random(shape, generator, device, dtype)
        made["mask"] = torch.ones((canvas, canvas), device=device)
        made["mask"][inner, inner] = 0
        return made

    def ours(i: Inputs) -> Tensor:
        index = i["index"] if prompts > 1 else None
        return functional.perturb(i["x"], i["prompt"], hole=hole, index=index, space="normalized", norm=i["norm"], dtype=dtype)

    def chain(i: Inputs) -> Tensor:
        added = i["prompt"] * i["mask"]
        added = added[i["index"]] if prompts > 1 else added
        return (i["x"] * i["unit"]).sub(i["mean"]).div(i["std"]) + added

    def loop(i: Inputs) -> Tensor:
        image = (i["x"] * i["unit"]).sub(i["mean"]).div(i["std"])
        strips = [i["prompt"][int(n)] * i["mask"] for n in i["index"]]
        return torch.cat([image[b, None] + strips[b] for b in range(batch)]).to(dtype)

    def plain(i: Inputs) -> Tensor:
        gain = 1 / i["std"]
        added = i["prompt"] * i["mask"] - i["mean"] * gain
        added = added.index_select(0, i["index"]) if prompts > 1 else added
        return torch.addcmul(added, i["x"], i["unit"] * gain).to(dtype)

    def plain_gradient(i: Inputs, g: Tensor) -> tuple[Tensor]:
        if prompts > 1:
            total = torch.zeros_like(i["prompt"]).index_add_(0, i["index"], g.float())
            return (total * i["mask"],)
        total = torch.zeros_like(i["prompt"])
        across, edge = slice(0, canvas), width or 0
        strips = [(slice(0, edge), across), (slice(canvas - edge, canvas), across)]
        strips += [(inner, slice(0, edge)), (inner, slice(canvas - edge, canvas))]
        for rows, columns in strips if width else [(across, across)]:
            total[..., rows, columns] = g[..., rows, columns].sum(0, dtype=torch.float32)
        return (total,)

    forms = {"fastprompt": ours, "eager": lambda i: chain(i).to(dtype), "plain": by_hand(plain, plain_gradient, "prompt")}
    if prompts > 1:
        forms["per sample"] = loop
    trainable = 1.0 if width is None else 1 - (canvas - 2 * width) ** 2 / canvas**2
    prompt = prompts * _sizes(shape[1:]) * 4
    output = _sizes(shape) * dtype.itemsize
    case = partial(
        Case, family="perturbation", name=name, shape=f"B={batch} 3x{canvas}" + (f" N={prompts}" if prompts > 1 else ""),
        dtype=dtype, inputs=inputs, forms=forms, formula=chain, wrt=("prompt",),
    )  # fmt: skip
    return _modes(modes, _sizes(shape) + prompt + output, int(output * trainable) + 2 * prompt, _rounded(case, dtype))


# ---- Prompts in pixel space, clamped to the valid range ----


def clamped(batch: int, dtype: torch.dtype, modes: tuple[str, ...], canvas: int = 224) -> list[Case]:
    """out = (clamp(x + prompt, 0, 1) - mean) / std with the exact gradient."""
    shape = (batch, 3, canvas, canvas)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _common(generator, device)
        made["norm"] = functional.normalization(MEAN, STD, 0.0, 1.0, device=device)
        made["x"] = _pixels(shape, generator, device)
        # Odd multiples of half a grey level: no sum lies on the bounds, where rounding would decide.
        level = torch.randint(-60, 60, (1, *shape[1:]), generator=generator, device=device)
        made["prompt"] = ((2 * level + 1) / 510).requires_grad_()
        made["g"] = _random(shape, generator, device, dtype)
        return made

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(i["x"], i["prompt"], norm=i["norm"], dtype=dtype)

    def chain(i: Inputs) -> Tensor:
        return (i["x"] * i["unit"] + i["prompt"]).clamp(0, 1).sub(i["mean"]).div(i["std"])

    def plain(i: Inputs) -> Tensor:
        out = torch.addcmul(i["prompt"], i["x"], i["unit"]).clamp_(0, 1)
        return out.sub_(i["mean"]).div_(i["std"]).to(dtype)

    def plain_gradient(i: Inputs, g: Tensor) -> tuple[Tensor]:
        value = torch.addcmul(i["prompt"], i["x"], i["unit"])
        kept = g * ((value >= 0) & (value <= 1))
        return (kept.sum(0, keepdim=True, dtype=torch.float32) / i["std"],)

    prompt, pixels = _sizes(shape[1:]) * 4, _sizes(shape)
    case = partial(
        Case, family="perturbation", name="clamp", shape=f"B={batch} 3x{canvas}", dtype=dtype, inputs=inputs,
        forms={"fastprompt": ours, "eager": lambda i: chain(i).to(dtype), "plain": by_hand(plain, plain_gradient, "prompt")},
        formula=chain, wrt=("prompt",),
    )  # fmt: skip
    output = pixels * dtype.itemsize
    return _modes(modes, pixels + prompt + output, pixels + output + 2 * prompt, _rounded(case, dtype))


# ---- Sample-specific masks (SMM) ----


def masked(batch: int, dtype: torch.dtype, modes: tuple[str, ...], canvas: int = 224, patch: int = 8) -> list[Case]:
    """out = image + prompt * upsample(cells): gradients of the prompt and of the masks."""
    shape, grid = (batch, 3, canvas, canvas), canvas // patch

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        return {
            "x": _random(shape, generator, device, dtype),
            "prompt": _random((1, *shape[1:]), generator, device, torch.float32).requires_grad_(),
            "cells": _random((batch, 3, grid, grid), generator, device, dtype).requires_grad_(),
            "g": _random(shape, generator, device, dtype),
        }

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(i["x"], i["prompt"], cells=i["cells"], dtype=dtype)

    def chain(i: Inputs) -> Tensor:
        spread = i["cells"].view(batch, 3, grid, 1, grid, 1).expand(-1, -1, -1, patch, -1, patch)
        return i["x"] + i["prompt"] * spread.reshape(shape)

    def plain(i: Inputs) -> Tensor:
        blocks = (3, grid, patch, grid, patch)
        out = torch.addcmul(i["x"].view(batch, *blocks), i["prompt"].view(blocks).to(dtype), i["cells"][:, :, :, None, :, None])
        return out.view(shape)

    def plain_gradient(i: Inputs, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g.reshape(batch, 3, grid, patch, grid, patch)
        prompt = torch.einsum("bciujv,bcij->ciujv", g.float(), i["cells"].float())
        cells = torch.einsum("bciujv,ciujv->bcij", g.float(), i["prompt"].view(g.shape[1:]))
        return prompt.reshape(1, *shape[1:]), cells.to(dtype)

    prompt, pixels, cells = _sizes(shape[1:]) * 4, _sizes(shape), _sizes((batch, 3, grid, grid)) * dtype.itemsize
    case = partial(
        Case, family="perturbation", name="smm", shape=f"B={batch} 3x{canvas} patch {patch}", dtype=dtype, inputs=inputs,
        forms={
            "fastprompt": ours, "eager": lambda i: chain(i).to(dtype),
            "plain": by_hand(plain, plain_gradient, "prompt", "cells"),
        },
        formula=chain, wrt=("prompt", "cells"),
    )  # fmt: skip
    made = _modes(modes, 2 * pixels * dtype.itemsize + prompt + cells, pixels * dtype.itemsize + 2 * (prompt + cells), case)
    loosest = 3 * TOLERANCE[dtype]  # values up to 20, and in half precision every form rounds them, some also the prompt
    return [replace(case, tolerance=max(case.tolerance, loosest)) for case in made]


# ---- A prompt image per sample, clamped per channel (BlackVIP) ----


def generated(batch: int, dtype: torch.dtype, canvas: int = 224) -> list[Case]:
    """out = clamp(image + 0.5 * prompt, low, high) per channel, forward only: the method has no gradient."""
    shape = (batch, 3, canvas, canvas)
    low = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    high = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        low_, high_ = (torch.tensor(v, device=device)[:, None, None].to(dtype) for v in (low, high))
        return {
            "x": _random(shape, generator, device, dtype), "prompt": _random(shape, generator, device, dtype),
            "low": low_, "high": high_,
            "norm": functional.normalization(low=low_.flatten(), high=high_.flatten(), device=device),
        }  # fmt: skip

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(i["x"], i["prompt"], share="sample", scale=0.5, space="normalized", norm=i["norm"], dtype=dtype)

    def chain(i: Inputs) -> Tensor:
        out = i["x"] + 0.5 * i["prompt"]
        return torch.cat([out[:, c, None].clamp(i["low"][c], i["high"][c]) for c in range(3)], 1)

    def plain(i: Inputs) -> Tensor:
        return torch.clamp_(torch.add(i["x"], i["prompt"], alpha=0.5), i["low"], i["high"])

    return [
        Case(
            family="perturbation", name="blackvip", shape=f"B={batch} 3x{canvas}", mode="forward", dtype=dtype,
            inputs=inputs, forms={"fastprompt": ours, "eager": chain, "plain": plain}, formula=chain, wrt=(),
            bytes=3 * _sizes(shape) * dtype.itemsize, tolerance=2 * TOLERANCE[dtype],
        )
    ]  # fmt: skip


# ---- Resizing ----


def _pillow(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as missing:
        raise Skip("Pillow is not installed") from missing
    return np.asarray(Image.fromarray(image).resize((size, size), getattr(Image.Resampling, mode.upper())))


def resized(
    batch: int, size: int, target: int, mode: str, dtype: torch.dtype, *, width: int = 0, name: str = "resize"
) -> list[Case]:
    """uint8 images on the host to the normalised input, as a data loader would make it; with a frame when `width`."""
    hole = (width, width, target - 2 * width, target - 2 * width)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _common(generator, device)
        noise = _pixels((batch, 3, size, size), generator, device).float()
        smooth = F.avg_pool2d(noise, 3, 1, 1).permute(0, 2, 3, 1)  # bicubic weights overshoot on noise as on no photograph
        made["host"] = smooth.to(torch.uint8).contiguous().cpu()
        made["prompt"] = _random((1, 3, target, target), generator, device, torch.float32)
        made["mask"] = torch.ones((target, target), device=device)
        made["mask"][width : target - width, width : target - width] = 0
        return made

    def finish(i: Inputs, image: Tensor) -> Tensor:
        """image in [0, 1]"""
        out = image.sub(i["mean"]).div(i["std"])
        return out + i["prompt"] * i["mask"] if width else out

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(
            i["host"].to(i["mean"].device), i["prompt"] if width else None, data_format="NHWC", resize=target,
            interpolation=mode, norm=i["norm"], space="normalized", dtype=dtype, hole=hole if width else None,
            memory_format=torch.contiguous_format,
        )  # fmt: skip

    def exact(i: Inputs) -> Tensor:
        images = np.stack([_pillow(image, target, mode) for image in i["host"].numpy()])
        image = torch.from_numpy(images).permute(0, 3, 1, 2).to(i["mean"].device, i["mean"].dtype)
        return finish(i, image / 255)

    def transform(image: np.ndarray) -> Tensor:
        """Resize, ToTensor and Normalize of one image."""
        tensor = torch.from_numpy(_pillow(image, target, mode).copy()).permute(2, 0, 1).contiguous().float().div(255)
        return tensor.clone().sub_(torch.as_tensor(MEAN).view(-1, 1, 1)).div_(torch.as_tensor(STD).view(-1, 1, 1))

    def loader(i: Inputs, apply: Callable[..., Any] = map) -> Tensor:
        out = torch.stack(list(apply(transform, i["host"].numpy()))).to(i["mean"].device)
        return (out + i["prompt"] * i["mask"] if width else out).to(dtype)

    def two_threads(i: Inputs) -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            return loader(i, pool.map)

    def uint8(i: Inputs) -> Tensor:
        if i["mean"].is_cuda:
            raise Skip("F.interpolate resizes uint8 on CPUs only")
        image = F.interpolate(i["host"].permute(0, 3, 1, 2), (target, target), mode=mode, antialias=True)
        return finish(i, image * i["unit"]).to(dtype)

    def floating(i: Inputs) -> Tensor:
        x = i["host"].to(i["mean"].device).permute(0, 3, 1, 2) * i["unit"]
        image = F.interpolate(x, (target, target), mode=mode, antialias=True)
        return finish(i, image.clamp(0, 1)).to(dtype)

    pixels = _sizes((batch, 3, target, target))
    about = TOLERANCE[dtype]
    return [
        Case(
            family="perturbation", name=name, shape=f"B={batch} 3x{size}->{target} {mode}" + (" frame" if width else ""),
            mode="forward", dtype=dtype, inputs=inputs,
            forms={"fastprompt": ours, "Pillow": loader, "Pillow 2thr": two_threads, "uint8": uint8, "float": floating},
            formula=exact, wrt=(), bytes=_sizes((batch, 3, size, size)) + pixels * dtype.itemsize, tolerance=about,
            best=("uint8", "float"), loose={"uint8": about + 2 * ONE_LEVEL, "float": about + 2 * ONE_LEVEL},
        )
    ]  # fmt: skip


# ---- One-dimensional series (Voice2Series) ----


def series(batch: int, dtype: torch.dtype, modes: tuple[str, ...], length: int = 16000, short: int = 500) -> list[Case]:
    """out = tile(x) + prompt * M: eight copies of a series on a longer canvas."""
    copies = 8
    period = length // short // copies * short
    shape = (batch, 1, 1, length)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        mask = torch.ones((1, length), device=device)
        for start in range(0, copies * period, period):
            mask[:, start : start + short] = 0
        return {
            "x": _random((batch, 1, 1, short), generator, device, torch.float32),
            "prompt": _random((1, 1, 1, length), generator, device, torch.float32).requires_grad_(),
            "mask": mask, "g": _random(shape, generator, device, dtype),
        }  # fmt: skip

    def ours(i: Inputs) -> Tensor:
        return functional.perturb(
            i["x"], i["prompt"], canvas=(1, length), offset=(0, 0), copies=copies, period=period, mask=i["mask"],
            dtype=dtype,
        )  # fmt: skip

    def chain(i: Inputs) -> Tensor:
        starts = range(0, copies * period, period)
        tiled = sum(F.pad(i["x"], (start, length - start - short)) for start in starts)
        return tiled + i["prompt"] * i["mask"]

    def plain(i: Inputs) -> Tensor:
        out = (i["prompt"] * i["mask"]).to(dtype).repeat(batch, 1, 1, 1)
        out[..., : copies * period].unflatten(-1, (copies, period))[..., :short] += i["x"][..., None, :]
        return out

    def plain_gradient(i: Inputs, g: Tensor) -> tuple[Tensor]:
        return (g.sum(0, keepdim=True, dtype=torch.float32) * i["mask"],)

    case = partial(
        Case, family="perturbation", name="series", shape=f"B={batch} {copies}x{short}->{length}", dtype=dtype, inputs=inputs,
        forms={"fastprompt": ours, "eager": lambda i: chain(i).to(dtype), "plain": by_hand(plain, plain_gradient, "prompt")},
        formula=chain, wrt=("prompt",),
    )  # fmt: skip
    output = _sizes(shape) * dtype.itemsize
    return _modes(modes, batch * short * 4 + length * 8 + output, output + 12 * length, _rounded(case, dtype))


# ---- All ----


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family perturbation` runs, the named goals first."""
    batch = 256 if device.type == "cuda" else 32
    step, all_ = ("forward", "backward"), ("forward", "backward", "both")
    made = [case for size in (32, 128, 192) for case in padded(batch, size, 224, dtype, all_)]
    made += framed(batch, None, dtype, all_, name="watermark")
    made += framed(batch, 30, dtype, all_)
    made += resized(256, 32, 224, "bicubic", dtype, name="pipeline")
    if batch != 256:
        made += [case for size in (32, 192) for case in padded(256, size, 224, dtype, step)]
    made += masked(batch, dtype, all_)
    made += framed(batch, 30, dtype, step, prompts=10, name="dam-vp")
    made += padded(batch, 192, 224, dtype, step, copies=3, name="dvp")
    made += generated(batch, dtype)
    made += clamped(batch, dtype, step)
    made += resized(batch, 32, 224, "bicubic", dtype, width=30)
    made += resized(batch, 256, 128, "bilinear", dtype)
    made += padded(batch, 128, 224, dtype, step, channels_last=True, name="pad nhwc")
    made += padded(batch, 128, 224, dtype, step, image_gradient=True, name="pad dx")
    made += series(batch, dtype, step)
    made += padded(64, 16, 32, dtype, all_, channels=3, name="demo size")
    made += padded(1, 192, 224, dtype, step, name="one image")
    return made


def host_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The calls that a training loop makes, on inputs so small that only the host's work counts."""
    module = PaddedPrompt(16, 8, mean=0.5, std=0.5).to(device)
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, device=device)
    norm = functional.normalization(0.5, 0.5, channels=3, device=device)
    g = torch.ones((2, 3, 16, 16), device=device)

    def forward() -> Tensor:
        return functional.perturb(x, module.prompt, canvas=16, hole="image", squash="sigmoid", norm=norm)

    return {
        "perturb": torch.no_grad()(forward),
        "perturb+backward": lambda: torch.autograd.grad(forward(), module.prompt, g),
        "PaddedPrompt": lambda: module(x),
    }


ALL = ("forward", "backward", "both")
# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "pad": lambda dtype, B=32, size=32, canvas=224, K=1: padded(B, size, canvas, dtype, ALL, copies=K),
    "watermark": lambda dtype, B=32, canvas=224: framed(B, None, dtype, ALL, canvas=canvas, name="watermark"),
    "frame": lambda dtype, B=32, canvas=224, width=30, N=1: framed(B, width, dtype, ALL, prompts=N, canvas=canvas),
    "clamp": lambda dtype, B=32, canvas=224: clamped(B, dtype, ALL, canvas),
    "smm": lambda dtype, B=32, canvas=224, patch=8: masked(B, dtype, ALL, canvas, patch),
    "blackvip": lambda dtype, B=32, canvas=224: generated(B, dtype, canvas),
    "resize": lambda dtype, B=32, size=32, target=224: resized(B, size, target, "bicubic", dtype),
    "series": lambda dtype, B=32, length=16_000, short=500: series(B, dtype, ALL, length, short),
}
