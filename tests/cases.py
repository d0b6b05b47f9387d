"""Calls of `functional.perturb` as data: every pair of options at least once, and the tensors that go with them."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprompt.functional import Normalization, perturb

F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
CANVAS = (11, 14)

# The image on the canvas: its size, and how it gets there.
GEOMETRY: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "padded": ((6, 7), {}),  # both differences are odd
    "corner": ((5, 8), {"offset": (6, 0)}),
    "full": (CANVAS, {}),
    "up bilinear": ((4, 5), {"resize": (7, 10)}),
    "up bicubic": ((5, 4), {"resize": (9, 6), "interpolation": "bicubic"}),
    "down bilinear": ((19, 13), {"resize": (8, 6)}),
    "down bicubic": ((13, 23), {"resize": (6, 9), "interpolation": "bicubic"}),
    "rows only": ((4, 6), {"resize": (9, 6)}),
    "copies": ((8, 3), {"offset": (2, 1), "copies": 3, "period": 4}),
}
# Where the prompt is: window, hole, and the pixel mask's dtype and planes.
REGION: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "around the image": {"hole": "image"},
    "window": {"window": (1, 2, 9, 8)},
    "frame": {"hole": (2, 3, 7, 9)},
    "frame of a window": {"window": (1, 2, 9, 8), "hole": (3, 4, 5, 5)},
    "rows above and below": {"hole": (2, 0, 7, 14)},
    "columns beside": {"hole": (0, 3, 11, 7)},
    "bool mask": {"mask": (torch.bool, 1)},
    "bool planes": {"mask": (torch.bool, 3)},
    "float mask": {"mask": (F32, 1)},
    "float planes in a window": {"mask": (F32, 3), "window": (0, 2, 11, 12)},
    "half mask in a frame": {"mask": (F16, 3), "hole": (2, 3, 7, 9)},
}
AXES: dict[str, tuple[Any, ...]] = {
    "geometry": tuple(GEOMETRY),
    "region": tuple(REGION),
    "share": ("batch", "index", "sample", "product", "none"),
    "cells": (None, (1, 11, 2), (3, 1, 7)),  # patches of 1x7 and 11x2 pixels: no powers of two
    "squash": ("none", "sigmoid", "tanh"),
    "mask_first": (False, True),
    "space": ("pixel", "normalized"),
    "clamp": ("none", "exact", "straight"),
    "x": (U8, F32, F16, BF16),
    "gray": (False, True),
    "dtype": (F32, F16, BF16),
    "prompt": (F32, BF16),
    "channels_last": (False, True),
    "batch": (5, 1, 2),
}


@dataclass(frozen=True)
class Case:
    """One call. The defaults are a padded prompt."""

    geometry: str = "padded"
    region: str = "around the image"
    share: str = "batch"
    cells: tuple[int, int, int] | None = None
    squash: str = "sigmoid"
    mask_first: bool = False
    space: str = "pixel"
    clamp: str = "none"
    x: torch.dtype = F32
    gray: bool = False
    dtype: torch.dtype = F32
    prompt: torch.dtype = F32
    channels_last: bool = False
    batch: int = 5

    def __str__(self) -> str:
        return "-".join(
            str(value).replace("torch.", "") if not isinstance(value, bool) else name * value
            for name, value in vars(self).items()
        )

    def valid(self) -> bool:
        if self.cells and (self.share != "batch" or self.mask_first):
            return False
        if self.cells and any(key in REGION[self.region] for key in ("window", "hole")):
            return False
        return not (self.geometry == "copies" and self.region == "around the image")


def pairs(case: Case) -> set[tuple[Any, ...]]:
    """Every two options of a case with their values."""
    return set(itertools.combinations(vars(case).items(), 2))


@functools.cache
def covering(seed: int = 0) -> list[Case]:
    """Cases in which every possible pair of values of `AXES` occurs, chosen greedily."""
    draw = random.Random(seed)
    wanted = set()
    for (a, some), (b, others) in itertools.combinations(AXES.items(), 2):
        wanted |= {((a, one), (b, other)) for one in some for other in others}
    cases: list[Case] = []
    while True:
        fresh = [c for c in sampled(400, draw) if pairs(c) & wanted]
        if not fresh:
            return cases
        best = max(fresh, key=lambda case: len(pairs(case) & wanted))
        cases.append(best)
        wanted -= pairs(best)


def sampled(count: int, draw: random.Random) -> list[Case]:
    """Valid cases at random."""
    cases = (Case(**{name: draw.choice(some) for name, some in AXES.items()}) for _ in range(count))
    return [case for case in cases if case.valid()]


PROMPTS = {"none": 0, "batch": 1, "index": 4, "product": 3}
LIMITS = {"pixel": (0.13, 0.87), "normalized": (-1.3, 1.9)}


def tensors(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, prompt, mask, cells, index and norm of a case: the same numbers every time."""
    made = torch.Generator().manual_seed(hash_of(case))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    shape = (case.batch, 1 if case.gray else 3, *GEOMETRY[case.geometry][0])
    x = (0.5 + 0.4 * normal(*shape)).to(F32 if case.x == U8 else case.x)
    held = {"x": (x * 255).clamp(0, 255).to(U8) if case.x == U8 else x}
    region = REGION[case.region]
    if case.share != "none":
        window = region.get("window", (0, 0, *CANVAS))
        count = PROMPTS.get(case.share, case.batch)
        held["prompt"] = normal(count, 3, *window[2:]).to(case.prompt)
        if "mask" in region:
            dtype, planes = region["mask"]
            held["mask"] = normal(planes, *CANVAS)
            held["mask"] = held["mask"] > -0.5 if dtype == torch.bool else held["mask"].to(dtype)
    if case.share == "index":
        held["index"] = torch.randint(4, (case.batch,), generator=made)
    if case.cells:
        held["cells"] = normal(case.batch, *case.cells)
    low, high = LIMITS[case.space]
    scale = torch.tensor([1.0, 1.1, 0.9])
    held["norm"] = torch.stack([torch.tensor([0.41, 0.5, 0.57]), torch.tensor([4.1, 3.9, 4.7]), low * scale, high * scale])
    return {name: tensor.to(device) for name, tensor in held.items()}


def hash_of(case: Case) -> int:
    """Like `hash`, but the same in every process."""
    return sum(ord(letter) * 31 ** (place % 6) for place, letter in enumerate(str(case)))


def call(case: Case, held: dict[str, Tensor], impl: str, **changes: Any) -> Tensor:
    """The model input of a case from its tensors; float64 tensors give the float64 truth."""
    geometry = GEOMETRY[case.geometry][1]
    region = {key: value for key, value in REGION[case.region].items() if key != "mask"}
    if case.share == "none":
        region = {}
    options: dict[str, Any] = {
        "canvas": CANVAS, **geometry, **region,
        "mask": held.get("mask"), "cells": held.get("cells"), "index": held.get("index"),
        "share": None if case.share == "none" else case.share,
        "squash": case.squash, "mask_first": case.mask_first, "scale": 0.7, "space": case.space,
        "norm": Normalization(held["norm"], case.clamp), "dtype": case.dtype, "impl": impl,
        "memory_format": torch.channels_last if case.channels_last else torch.contiguous_format,
    }  # fmt: skip
    return perturb(held["x"], held.get("prompt"), **(options | changes))


def run(
    case: Case, held: dict[str, Tensor], impl: str, g: Tensor | None = None, wanted: str = "x prompt cells", **changes: Any
) -> dict[str, Tensor]:  # fmt: skip
    """{"out": ..., and the gradient of each of `wanted` that a gradient can reach}, for the incoming gradient `g`."""
    held = {name: tensor.detach() for name, tensor in held.items()}
    inputs = {}
    for name in wanted.split():
        if name in held and held[name].is_floating_point():
            inputs[name] = held[name].requires_grad_()
    out = call(case, held, impl, **changes)
    results = {"out": out}
    if inputs:
        g = gradient(out) if g is None else g
        found = torch.autograd.grad(out, list(inputs.values()), g.to(out.dtype), allow_unused=True)
        results |= {name: d for name, d in zip(inputs, found, strict=True) if d is not None}
    return results


def truth(case: Case, held: dict[str, Tensor], g: Tensor | None = None, **changes: Any) -> dict[str, Tensor]:
    """`run` in float64, by the reference."""
    exact = {name: t.double() if t.is_floating_point() and name != "mask" else t for name, t in held.items()}
    return run(case, exact, "torch", g, **({"dtype": torch.float64} | changes))


def gradient(out: Tensor) -> Tensor:
    """An incoming gradient that looks like noise, in the dtype of the output."""
    made = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=made).to(out)
