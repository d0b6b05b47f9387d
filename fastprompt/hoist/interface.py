"""What transformers calls in a wired model: attention over a prefix and own keys, and the masks that go with it.

One attention function and one mask function, registered with transformers under the name "fastprompt". The prefix is an
argument of the attention function, never an entry of a cache: the same for any cache, for gradient checkpointing and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad
from fastprompt.reference.attention import prefix_columns

KeyValue = tuple[Tensor, Tensor]
NAME = "fastprompt"


class Inexact(ValueError):
    """A prompt that the model's own keys and values do not stand for."""


@dataclass(frozen=True)  # no tuple: what moves a block's arguments to another device would take a tuple apart
class Given:
    """What an attention layer of a prefixed model reads."""

    keys: Tensor
    values: Tensor
    which: Tensor | None
    lengths: Tensor | None
    read: list[bool]
    window: int | None = None  # a token sees what is less than that many positions before it
    past: int | Tensor = 0  # tokens between the prefix and the first query
    cross: nn.Module | None = None  # the block's cross attention,
    to_cross: bool = False  # which alone reads this, or which alone does not
    relative: nn.Module | None = None  # T5's attention with the table of biases by distance
    rescale: float = 1.0  # of the weights exp(score) of a sample's own keys
    places: Tensor | None = None  # [B, T], of the queries behind the prefix, where the model is told them
    number: Tensor | None = None  # [T], whose prefix among a sample's several each query reads (packed sequences)

    def beside(self, key: Tensor) -> Given:
        """On the device, and in the dtype, of a layer's own keys."""
        names = ("which", "lengths", "places", "number")
        counts = {name: part.to(key.device) for name in names if (part := getattr(self, name)) is not None}
        keys, values = (part.to(key.device, key.dtype) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values, **counts)


@dataclass(frozen=True)
class Record:
    """Where an attention layer of a hoisting run leaves what it saw."""

    seen: list[KeyValue]
    shallow: bool
    last: bool


class Enough(Exception):
    """The last keys and values are known: the rest of the run is not wanted."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, fastprompt: Given | Record | None = None,
    fastprompt_cross: Given | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, T, D], key and value [B, Hkv, S, D] -> [B, T, H, D].

    attention_mask is `mask`'s: None, or bool [B, 1, 1, S'], where S' <= S says how many keys a static cache holds, or
    [B, 1 or H, T, S], which says everything. cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: where packed sequences
    start, as transformers hands them to its varlen attention; a mask is then not read.
    """
    layer = type(module).__name__
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True)  # a decoder may be used as an encoder
    if dropout:
        raise Inexact(f"{layer}: dropout {dropout} on attention weights is active; put the frozen model in eval mode")
    width = value.shape[-1]
    if width > key.shape[-1]:
        raise Inexact(f"{layer}: keys of {key.shape[-1]} elements and values of {width}")
    if width < key.shape[-1]:  # latent attention (DeepSeek)
        value = nn.functional.pad(value, (0, key.shape[-1] - width))
    if isinstance(fastprompt, Record):
        if position_bias is not None:
            raise Inexact(f"{layer}: a position_bias, in which tokens of the prompt would move the samples'; use PrefixKV")
        if fastprompt.shallow and not causal:
            raise Inexact(
                f"{layer}: bidirectional attention, where a shallow prompt's keys and values depend on each sample; use a deep "
                'prompt, or fallback="tokens"'
            )
        fastprompt.seen.append((key, value))
        if fastprompt.last and not torch.compiler.is_compiling():  # a compiler drops by itself what nobody reads
            raise Enough
    both = [each for each in (fastprompt, fastprompt_cross) if isinstance(each, Given)]
    if any(each.cross is module for each in both):
        position_bias = None  # T5 hands zeros to cross attention
    given = next((each for each in both if (each.cross is module) == each.to_cross), None)
    if given is not None:
        given.read[:] = [True]
        if given.window and not causal:
            raise Inexact(f"{layer}: a window of {given.window} tokens to both sides, in which a prefix has no place")
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.dim() != 4):
        raise bad("attention_mask", "which keys are seen, bool [B, S]", f"{attention_mask.dtype} {list(attention_mask.shape)}")
    packed = None
    if others.get("cu_seq_lens_q") is not None:
        names = {"cu_seqlens": "cu_seq_lens_q", "cu_seqlens_k": "cu_seq_lens_k"}
        names |= {"max_seqlen": "max_length_q", "max_seqlen_k": "max_length_k"}
        packed = {name: others.get(theirs) for name, theirs in names.items()}
    causal, softcap = causal and query.shape[2] > 1, others.get("softcap")
    window = others.get("sliding_window") if given is None else given.window
    if packed is not None and window:
        longest, before = packed["max_seqlen_k"], 0 if given is None else given.keys.shape[2]
        if isinstance(longest, int) and before + longest <= window:
            given = None if given is None else replace(given, window=None)
        else:
            given, attention_mask = _apart(query, key, given, others["cu_seq_lens_q"], window, causal)
            packed = None
    sinks = others.get("s_aux")
    out = attend(query, key, value, given, attention_mask, causal, scaling, softcap, position_bias, packed, sinks)
    return out[..., :width].transpose(1, 2).contiguous(), None  # some models view it


def _apart(
    query: Tensor, key: Tensor, given: Given | None, starts: Tensor, window: int, causal: bool
) -> tuple[Given | None, Tensor]:
    """Packed sequences in windows by a whole mask [1, 1, T, T], and where each query is in its own sequence."""
    if query.shape[2] != key.shape[2] or not (causal or query.shape[2] == 1):
        raise Inexact("cu_seq_lens_q: expected causal attention without a cache where attention has a window, got another")
    place = torch.arange(query.shape[2], device=query.device)
    starts = starts.to(place)
    number = torch.bucketize(place, starts[1:], right=True)
    back = place[:, None] - place
    seen = (number[:, None] == number) & (back >= 0) & (back < window)
    if given is not None:
        given = replace(given, places=(place - starts[number])[None], number=number)
    return given, seen[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, given: Given | None, mask: Tensor | None, causal: bool,
    scale: float | None = None, softcap: float | None = None, bias: Tensor | None = None,
    packed: dict[str, Any] | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, T, D] over a prefix and own keys; mask [B, 1, 1, S'] says which first S' keys exist, [.., T, S] all.

    bias [1, H, T, S] is added to the scores of own keys; the prefix's columns have `given.relative`'s, or 0. sinks [H] are
    scores of a column without a value (gpt-oss): the softmax's sum has them, so out * sigmoid(lse - sinks).
    """
    given = None if given is None else given.beside(key)
    queries, width = query.shape[2], given.keys.shape[2] if given is not None else 0
    near = given is None or given.window is None
    if not near and isinstance(given.past, int):  # type: ignore[union-attr]
        near = width + given.past + queries <= given.window  # type: ignore[union-attr, operator]
    rescale = 1.0 if given is None else given.rescale
    if packed is not None and not (near and bias is None and rescale == 1):
        raise Inexact("cu_seq_lens_q: expected no packed sequences where attention has a bias or a rescale, got some")
    if near and bias is None and (mask is None or mask.shape[1:3] == (1, 1) or packed is not None):
        options = {} if packed is None else dict(packed)
        if mask is not None and packed is None:
            options["key_mask"] = mask[:, 0, 0].expand(query.shape[0], -1)
            key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
        if given is not None:
            options["prefix_k"], options["prefix_v"] = given.keys, given.values
            options["prefix_index"], options["prefix_lengths"] = given.which, given.lengths
        how: dict[str, Any] = {"causal": causal, "scale": scale, "softcap": softcap}
        if rescale != 1 and sinks is not None:
            raise Inexact(f"rescale: expected 1 where attention has sinks, got {rescale}")
        if rescale != 1:
            return _attend_rescaled(query, key, value, options, rescale, **how)
        if sinks is None:
            return functional.prefix_attention(query, key, value, **how, **options)  # type: ignore[no-any-return]
        out, lse = functional.prefix_attention(query, key, value, **how, **options, return_lse=True)
        return (out * torch.sigmoid(lse - sinks[:, None])[..., None]).to(out.dtype)  # type: ignore[no-any-return]
    return _attend_masked(query, key, value, given, mask, causal, scale, softcap, bias, sinks)


def _attend_rescaled(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], rescale: float, **how: Any) -> Tensor:
    """One softmax in which the weight exp(score) of each own key is multiplied: own and prefix apart, joined by their sums."""
    mask = {"key_mask": options.pop("key_mask", None)}
    own, own_lse = functional.prefix_attention(query, key, value, **mask, **how, return_lse=True)
    nothing = {**how, "causal": False}
    theirs, lse = functional.prefix_attention(query, key[:, :, :0], value[:, :, :0], **options, **nothing, return_lse=True)
    share = torch.sigmoid(own_lse - lse + math.log(rescale))[..., None]
    return (theirs + share * (own - theirs)).to(own.dtype)  # type: ignore[no-any-return]


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, given: Given | None, mask: Tensor | None, causal: bool, scale: float | None,
    softcap: float | None, bias: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The general case, by PyTorch's attention on the prefix copied in front of each sample's keys, with a whole mask."""
    if given is not None and given.rescale != 1:
        raise Inexact(f"rescale: expected 1 with a windowed, packed or four-dimensional mask, got {given.rescale}")
    batch, queries, device = query.shape[0], query.shape[2], query.device
    if mask is None:
        mask = torch.ones((1, 1, 1, key.shape[2]), dtype=torch.bool, device=device)
    key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
    mask = mask.expand(batch, -1, queries, -1)
    if causal and mask.shape[2] != 1 and mask.stride(2) == 0:
        mask = mask & torch.ones((queries, key.shape[2]), dtype=torch.bool, device=device).tril(key.shape[2] - queries)
    bias = None if bias is None else bias[..., : mask.shape[3]]
    if given is not None:
        index = given.which
        if index is not None and index.dim() == 1:
            index = index[:, None] if given.number is None else index[None]
        width = given.keys.shape[2]
        columns, there = prefix_columns(given.keys, index, given.lengths, batch)
        values, _ = prefix_columns(given.values, index, given.lengths, batch)
        seen = there[:, None, None].expand(-1, 1, queries, -1)
        if given.number is not None and index is not None:
            seen = seen & (torch.arange(seen.shape[3], device=device) // width == given.number[:, None])
        if given.window is not None or given.relative is not None:
            if given.number is None and index is not None and index.shape[1] > 1:
                raise Inexact("index: expected one prefix a sample where attention counts positions, got several")
            place = torch.arange(there.shape[1], device=device) % width
            counts = there.unflatten(1, (-1, width)).sum(2)
            counts = counts if given.number is None or index is None else counts[:, given.number]
            own = given.past + torch.arange(queries, device=device) if given.places is None else given.places
            ahead = (counts + own)[..., None] - place
            if given.window is not None:
                seen = seen & (ahead < given.window)[:, None]
        if bias is not None:
            front = bias.new_zeros(()).expand(1, bias.shape[1], queries, there.shape[1])
            if given.relative is not None:
                longest = there.shape[1] + key.shape[2]  # behind an absent prefix, distances are not read
                table = given.relative.compute_bias(1, longest, device=device, past_seen_tokens=longest - 1)  # type: ignore[operator]
                same = index is None and given.lengths is None
                distance = longest - 1 - ahead[: 1 if same else None].clamp(0, longest - 1)
                front = table[0, :, 0].to(bias.dtype)[:, distance].transpose(0, 1)
            bias = torch.cat([front, bias.expand(len(front), -1, -1, -1)], 3)
        mask = torch.cat([seen.expand(-1, mask.shape[1], -1, -1), mask], 3)
        key = torch.cat([columns.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([values.expand(batch, -1, -1, -1), value], 2)
    if bias is not None:
        mask = bias.to(query.dtype).masked_fill(~mask, -torch.inf)
    if softcap or sinks is not None:
        return _attend_written_out(query, key, value, mask, scale, softcap, sinks)
    grouped = key.shape[1] != query.shape[1]
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _attend_written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """With a soft cap, or sinks, and a whole mask, bool or added: what PyTorch's attention does not know."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(2, 3)).to(wide) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -torch.inf).all(3, keepdim=True)  # padding that sees nothing: 0, not NaN
    scores = scores.masked_fill(nothing, 0)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)], 3)
    weights = torch.softmax(scores, 3)[..., : key.shape[2]].masked_fill(nothing, 0)
    return weights.to(value.dtype) @ value


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, device: Any = None, **others: Any,
) -> Tensor | None:  # fmt: skip
    """Which keys are seen: bool [B, 1, 1, S] or None, what is causal being left to `attention`; other kinds [B, 1, T, S]."""
    from transformers import masking_utils

    known = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    window, plain = others.get("local_size"), others.get("allow_is_causal_skip", False)
    if window and plain and isinstance(q_offset, int) and not kv_offset and q_offset + q_length <= window:
        mask_function = masking_utils.causal_mask_function  # a window that reaches back to the first key
    if mask_function not in known or kv_offset:
        others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **others
        )
    seen = None if attention_mask is None else attention_mask.to(torch.bool)
    if mask_function is masking_utils.bidirectional_mask_function:
        return None if seen is None else seen[:, None, None]
    if isinstance(q_offset, Tensor) and q_length > 1:
        q_offset = int(q_offset)  # filling a static cache: once a prefill, never in a compiled step
    if isinstance(q_offset, Tensor):
        filled = torch.arange(kv_length, device=device)[None] <= q_offset
        if seen is None:
            return filled.expand(batch_size, -1)[:, None, None]
        return (nn.functional.pad(seen, (0, kv_length - seen.shape[1]))[:, :kv_length] & filled)[:, None, None]
    end = q_offset + q_length
    # Looking at a mask costs a sync on a GPU.
    if seen is not None and seen.device.type == "cpu" and not torch.compiler.is_compiling() and bool(seen[:, :end].all()):
        seen = None if seen.shape[1] >= end else seen
    if seen is None:
        if end == kv_length:
            return None
        seen = torch.ones((batch_size, end), dtype=torch.bool, device=device)
    return nn.functional.pad(seen, (0, max(0, end - seen.shape[1])))[:, None, None, :end]
