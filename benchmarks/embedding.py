"""Soft tokens among vocabulary tokens against what a user would run instead.

Rivals: `eager`, the chains of the public repositories, written from their formulas; `compile` of it; `plain`, the best plain
PyTorch found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import functional

from .suite import Case, Form, Inputs


def _tables(
    generator: torch.Generator, device: torch.device, words: int, width: int, prompts: int, slots: int, dtype: torch.dtype
) -> Inputs:
    make: dict[str, Any] = {"generator": generator, "device": device}
    return {
        "vocab": torch.randn((words, width), **make).to(dtype),
        "soft": torch.randn((prompts, slots, width), **make).requires_grad_(),
    }


def _cases(
    name: str, shape: str, sizes: tuple[int, int, int], read: int, dtype: torch.dtype, inputs: Any, forms: dict[str, Form],
    formula: str = "plain", best: tuple[str, ...] = ("plain",), tolerance: float | None = None,
) -> list[Case]:  # fmt: skip
    """Forward, and forward with the gradient of the soft rows. read: how many rows of the gradient belong to soft tokens."""
    batch, length, width = sizes
    moved = 2 * batch * length * width * dtype.itemsize
    if tolerance is None:
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    case = partial(
        Case, family="embedding", name=name, shape=shape, dtype=dtype, inputs=inputs, forms=forms, formula=forms[formula],
        wrt=("soft",), tolerance=tolerance, best=best,
    )  # fmt: skip
    return [case(mode="forward", bytes=moved), case(mode="both", bytes=moved + read * width * dtype.itemsize)]


def in_front(batch: int, length: int, slots: int, width: int, words: int, dtype: torch.dtype, *, prompts: int = 1) -> list[Case]:
    """A prompt in front of every sample: shared, or each sample its own of several."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _tables(generator, device, words, width, prompts, slots, dtype)
        made["words"] = torch.randint(words, (batch, length), generator=generator, device=device)
        made["ids"], _ = functional.place_prompt(made["words"], slots)
        made["index"] = torch.randint(prompts, (batch,), generator=generator, device=device) if prompts > 1 else None
        made["g"] = torch.randn((batch, slots + length, width), generator=generator, device=device).to(dtype)
        return made

    def rows(i: Inputs) -> Tensor:
        soft = i["soft"].to(i["vocab"].dtype)
        return soft.expand(batch, -1, -1) if prompts == 1 else soft[i["index"]]

    def copies(i: Inputs) -> Tensor:
        soft = i["soft"].to(i["vocab"].dtype)
        return soft.repeat(batch, 1, 1) if prompts == 1 else soft[i["index"]]

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.soft_gather(i["ids"], i["vocab"], i["soft"], prompt_index=i["index"]),
        "with placing": lambda i: functional.soft_gather(
            functional.place_prompt(i["words"], slots)[0], i["vocab"], i["soft"], prompt_index=i["index"]
        ),
        "eager": lambda i: torch.cat([copies(i), F.embedding(i["words"], i["vocab"])], 1),
        "plain": lambda i: torch.cat([rows(i), F.embedding(i["words"], i["vocab"])], 1),
    }
    shape = f"B={batch} T={length} P={slots} d={width} N={prompts}"
    name = "prompt in front" if prompts == 1 else "mixed batch"
    return _cases(name, shape, (batch, slots + length, width), batch * slots, dtype, inputs, forms)


def in_templates(batch: int, length: int, slots: int, width: int, words: int, dtype: torch.dtype) -> list[Case]:
    """Soft tokens at places that differ from sample to sample."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _tables(generator, device, words, width, 1, slots, dtype)
        text = torch.randint(words, (batch, length - slots), generator=generator, device=device)
        where = torch.randint(length - slots + 1, (batch,), generator=generator, device=device)
        made["ids"], _ = functional.place_prompt(text, slots, where)
        made["is_soft"] = (made["ids"] < 0)[..., None]
        made["words"], made["slots"] = made["ids"].clamp(min=0), (-1 - made["ids"]).clamp(min=0)
        made["g"] = torch.randn((batch, length, width), generator=generator, device=device).to(dtype)
        return made

    def chosen(i: Inputs) -> Tensor:
        soft = F.embedding(i["slots"], i["soft"][0]).to(i["vocab"].dtype)
        return torch.where(i["is_soft"], soft, F.embedding(i["words"], i["vocab"]))

    def written(i: Inputs) -> Tensor:
        soft = i["soft"][0].to(i["vocab"].dtype)
        at = i["is_soft"][..., 0].nonzero(as_tuple=True)
        return F.embedding(i["words"], i["vocab"]).index_put(at, soft[i["slots"][at]])

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.soft_gather(i["ids"], i["vocab"], i["soft"]),
        "eager": chosen,
        "plain": written,
    }
    shape = f"B={batch} T={length} P={slots} d={width}"
    sizes = (batch, length, width)
    return _cases("template", shape, sizes, batch * slots, dtype, inputs, forms, "eager", ("eager", "plain"))


def scaled(batch: int, length: int, slots: int, width: int, words: int, dtype: torch.dtype) -> list[Case]:
    """A prompt in front, everything scaled and positions added."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _tables(generator, device, words, width, 1, slots, dtype)
        made["words"] = torch.randint(words, (batch, length), generator=generator, device=device)
        made["ids"], _ = functional.place_prompt(made["words"], slots)
        made["positions"] = torch.randn((slots + length, width), generator=generator, device=device).to(dtype)
        made["g"] = torch.randn((batch, slots + length, width), generator=generator, device=device).to(dtype)
        return made

    def plain(i: Inputs) -> Tensor:
        rows = torch.cat([i["soft"].to(i["vocab"].dtype).expand(batch, -1, -1), F.embedding(i["words"], i["vocab"])], 1)
        return rows * width**0.5 + i["positions"]

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.soft_gather(
            i["ids"], i["vocab"], i["soft"], scale=width**0.5, positions=i["positions"]
        ),
        "eager": plain,
        "plain": plain,
    }
    shape, sizes = f"B={batch} T={length} P={slots} d={width}", (batch, slots + length, width)
    return _cases("scale and positions", shape, sizes, batch * slots, dtype, inputs, forms)


def trained_tokens(batch: int, length: int, count: int, width: int, words: int, dtype: torch.dtype) -> list[Case]:
    """Some words of the vocabulary are trained; `eager` copies the vocabulary, as PEFT does."""

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        made = _tables(generator, device, words, width, 1, count, dtype)
        made["trained"] = torch.arange(count, device=device) * (words // count)
        made["ids"] = torch.randint(words, (batch, length), generator=generator, device=device)
        places = torch.randint(length, (batch, count), generator=generator, device=device)
        made["ids"].scatter_(1, places, made["trained"].expand(batch, -1).contiguous())
        made["g"] = torch.randn((batch, length, width), generator=generator, device=device).to(dtype)
        return made

    def copied(i: Inputs) -> Tensor:
        return F.embedding(i["ids"], i["vocab"].index_copy(0, i["trained"], i["soft"][0].to(i["vocab"].dtype)))

    def chosen(i: Inputs) -> Tensor:
        place = torch.searchsorted(i["trained"], i["ids"]).clamp(max=count - 1)
        soft = F.embedding(place, i["soft"][0]).to(i["vocab"].dtype)
        return torch.where((i["trained"][place] == i["ids"])[..., None], soft, F.embedding(i["ids"], i["vocab"]))

    forms: dict[str, Form] = {
        "fastprompt": lambda i: functional.soft_gather(functional.soft_ids(i["ids"], i["trained"]), i["vocab"], i["soft"]),
        "eager": copied,
        "plain": chosen,
    }
    shape = f"B={batch} T={length} K={count} d={width} V={words}"
    return _cases("trained tokens", shape, (batch, length, width), batch * count, dtype, inputs, forms)


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family embedding` runs."""
    words = 32_000
    if device.type == "cpu":
        shared = [(2, 16, 4, 64), (16, 64, 100, 384), (4, 210, 200, 1024), (8, 512, 20, 768)]
        other = (16, 128, 20, 768)
    else:
        words = 128_256
        shared = [(4, 210, 200, 4096), (32, 128, 100, 4096), (8, 2048, 128, 4096), (256, 197, 50, 768)]
        other = (32, 512, 20, 4096)
    made = [case for sizes in shared for case in in_front(*sizes, words, dtype)]
    made += in_front(*other, words, dtype, prompts=8)
    made += in_templates(*other, words, dtype)
    made += scaled(*other, words, dtype)
    return made + trained_tokens(*other, words, dtype)


# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "prompt in front": lambda dtype, B=16, T=128, P=20, d=768, V=32_000: in_front(B, T, P, d, V, dtype),
    "mixed batch": lambda dtype, B=16, T=128, P=20, d=768, V=32_000, N=8: in_front(B, T, P, d, V, dtype, prompts=N),
    "template": lambda dtype, B=16, T=128, P=20, d=768, V=32_000: in_templates(B, T, P, d, V, dtype),
    "scale and positions": lambda dtype, B=16, T=128, P=20, d=768, V=32_000: scaled(B, T, P, d, V, dtype),
    "trained tokens": lambda dtype, B=16, T=128, K=20, d=768, V=32_000: trained_tokens(B, T, K, d, V, dtype),
}


def host_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The calls that a training loop makes, on inputs so small that only the host's work counts."""
    vocab, words = torch.randn(10, 8, device=device), torch.arange(6, device=device).view(2, 3)
    soft = torch.randn(1, 4, 8, device=device).requires_grad_()
    ids, _ = functional.place_prompt(words, 4)
    g = torch.ones((2, 7, 8), device=device)

    def forward() -> Tensor:
        return functional.soft_gather(ids, vocab, soft)

    return {
        "place_prompt": lambda: functional.place_prompt(words, 4),
        "soft_gather": torch.no_grad()(forward),
        "soft_gather+backward": lambda: torch.autograd.grad(forward(), soft, g),
    }
