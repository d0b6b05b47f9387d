"""The fallback of hoisting: a prompt as tokens of every sample, in front of the embeddings or in the blocks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.functional.checks import bad
from fastprompt.hoist.interface import Inexact


class Tokens(NamedTuple):
    """The fallback: a prompt as tokens of every sample, [1 or B, P, width].

    shallow: in front of the model's embeddings, which then have positions P and on; the model's output has the samples' rows
    alone, but an encoder's pooler reads the first row there is, as with PEFT. deep: one a block, in place of the rows of the
    block before, which a block with None goes on with; `keep`: the output is then [first row, prompt, other rows].
    """

    shallow: Tensor | None
    deep: Sequence[Tensor | None] = ()
    keep: bool = False


def named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def in_front(base: Any, prompt: Tensor, kwargs: dict[str, Any], began: bool) -> dict[str, Any]:
    """PEFT's prompt tuning: embeddings in front of the samples' own; the output has the samples' rows again."""
    length = prompt.shape[1]
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
        tensor = kwargs.get(name)
        if tensor is not None and tensor.dim() != 2:
            raise bad(name, "[B, S]", list(tensor.shape))
        if tensor is not None and (began or name == "attention_mask"):
            kwargs[name] = nn.functional.pad(tensor, (length, 0), value=fill)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + length
    if not began:
        return kwargs
    if kwargs.get("position_ids") is not None:
        first = torch.arange(length, device=prompt.device).expand(kwargs["position_ids"].shape[0], -1)
        kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], 1)
    own = kwargs.get("inputs_embeds")
    own = base.get_input_embeddings()(kwargs.pop("input_ids")) if own is None else own
    kwargs["inputs_embeds"] = torch.cat([prompt.to(own.dtype).expand(len(own), -1, -1), own], 1)
    return kwargs


def _rows(deep: Sequence[Tensor | None], place: int) -> int:
    """How many rows of prompts the blocks before have put in front."""
    lengths = [tokens.shape[1] for tokens in deep[:place] if tokens is not None]
    return lengths[-1] if lengths else 0


def with_rows(block: nn.Module, args: Any, kwargs: dict[str, Any], deep: Sequence[Tensor | None], place: int) -> Any:
    """VPT: a block's prompt replaces the rows of the one before; a block without a prompt goes on with them."""
    tokens, length = deep[place] if deep else None, _rows(deep, place)
    if tokens is None and not length:
        return None
    kwargs = named(block, args, kwargs)
    if kwargs.get("is_causal"):
        raise Inexact(f"{type(block).__name__}: tokens in the blocks of a causal model have no place in its mask")
    x = kwargs.pop("hidden_states")
    if tokens is not None:
        x, length = torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x[:, length:]], 1), tokens.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is not None:  # which keys are seen, the same for every query
        kwargs["attention_mask"] = nn.functional.pad(mask, (length, 0), value=True)
    return (x,), kwargs


def without_rows(out: Any, tokens: Tokens) -> Any:
    length = _rows(tokens.deep, len(tokens.deep))
    if not length:
        return None
    x = out[0] if isinstance(out, tuple) else out
    first, own = x[:, length : length + 1], x[:, length + 1 :]
    x = torch.cat([first, x[:, :length], own], 1) if tokens.keep else x[:, length:]
    return (x, *out[1:]) if isinstance(out, tuple) else x
