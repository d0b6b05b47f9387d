"""Hoisting: a prompt's keys and values made once, by a frozen model of transformers, instead of once a sample.

    kv = hoist(model, soft_prompt())             causal model: one run of the model on the prompt, at batch size 1
    kv = hoist_deep(model, deep_prompt())        VPT-deep: each block's own norm and projections on its tokens
    kv = prefix_kv()                             prefix tuning: trained keys and values
    with prefixed(model, kv):
        loss = model(input_ids=ids, labels=labels).loss

It is exact because a prompt acts on the other tokens only through the keys and values that they read, and these do not
depend on the other tokens. Where they do, or where something else reads the prompt's rows, it is refused; `fallback="tokens"`
then puts the prompt into every sample instead.

The wiring is one attention function, registered with transformers under the name "fastprompt". The prefix is its argument,
never an entry of a cache: the same for any cache, for gradient checkpointing and without.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, check_labels
from fastprompt.reference.attention import prefix_columns

KeyValue = tuple[Tensor, Tensor]
NAME = "fastprompt"


class Hoisted(list[KeyValue | None]):
    """Pairs (keys, values) [N, Hkv, P, D], one a layer, and the position of the first token behind them."""

    def __init__(self, layers: Sequence[KeyValue | None], offset: int) -> None:
        super().__init__(layers)
        self.offset = offset


class Tokens(NamedTuple):
    """The fallback: a prompt as tokens of every sample, [1 or B, P, width].

    shallow: in front of the model's embeddings, which then have positions P and on; the model's output has the samples' rows
    alone, but an encoder's pooler reads the first row there is, as with PEFT. deep: one a block, in place of the rows of the
    block before, which a block with None goes on with; `keep`: the output is then [first row, prompt, other rows].
    """

    shallow: Tensor | None
    deep: Sequence[Tensor | None] = ()
    keep: bool = False


class Inexact(ValueError):
    """A prompt that the model's own keys and values do not stand for."""


@dataclass(frozen=True)
class Reading:
    """What one call of a model reads: `prefixed` says what each is."""

    prefix: Sequence[KeyValue | None] | Tokens
    index: Tensor | None = None
    lengths: Tensor | None = None
    offset: int | Tensor | None = None
    rescale: float = 1.0
    padding: Tensor | None = None


class Given(NamedTuple):
    """What an attention layer of a prefixed model reads."""

    keys: Tensor
    values: Tensor
    which: Tensor | None
    lengths: Tensor | None
    read: list[bool]
    window: int | None = None  # a token sees what is less than that many positions before it
    past: int | Tensor = 0  # tokens between the prefix and the first query
    rescale: float = 1.0  # of the weights exp(score) of a sample's own keys
    padding: Tensor | None = None  # [B], how many of the tokens in between are none, for windows that do not count them


class _Record(NamedTuple):
    """Where an attention layer of a hoisting run leaves what it saw."""

    seen: list[KeyValue]
    shallow: bool
    last: bool


class _Enough(Exception):
    """The last keys and values are known: the rest of the run is not wanted."""


# ---- What transformers calls ----


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, fastprompt: Given | _Record | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, T, D], key and value [B, Hkv, S, D] -> [B, T, H, D].

    attention_mask is `_mask`'s: None, or bool [B, 1, 1, S'], where S' <= S says how many keys a static cache holds, or
    [B, 1 or H, T, S], which says everything.
    """
    layer = type(module).__name__
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True)  # a decoder may be used as an encoder
    for name in ("position_bias", "s_aux"):
        if others.get(name) is not None:
            raise Inexact(f"{layer}: its attention has a {name}, which attention over a shared prefix does not know")
    if dropout:
        raise Inexact(f"{layer}: dropout {dropout} on attention weights is active; put the frozen model in eval mode")
    if value.shape[-1] != key.shape[-1]:
        raise Inexact(f"{layer}: keys of {key.shape[-1]} elements and values of {value.shape[-1]}")
    if isinstance(fastprompt, _Record):
        if fastprompt.shallow and not causal:
            raise Inexact(
                f"{layer}: bidirectional attention, where a shallow prompt's keys and values depend on each sample; use a deep "
                'prompt, or fallback="tokens"'
            )
        fastprompt.seen.append((key, value))
        if fastprompt.last and not torch.compiler.is_compiling():  # a compiler drops by itself what nobody reads
            raise _Enough
    given = fastprompt if isinstance(fastprompt, Given) else None
    if given is not None:
        given.read[:] = [True]
        if given.window and not causal:
            raise Inexact(f"{layer}: a window of {given.window} tokens to both sides, in which a prefix has no place")
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.dim() != 4):
        raise bad("attention_mask", "which keys are seen, bool [B, S]", f"{attention_mask.dtype} {list(attention_mask.shape)}")
    softcap = others.get("softcap")
    out = attend(query, key, value, given, attention_mask, causal and query.shape[2] > 1, scaling, softcap)
    return out.transpose(1, 2), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, given: Given | None, mask: Tensor | None, causal: bool,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, T, D] over a prefix and own keys; mask [B, 1, 1, S'] says which first S' keys exist, [.., T, S] all."""
    queries, width = query.shape[2], given.keys.shape[2] if given is not None else 0
    near = given is None or given.window is None
    if not near and isinstance(given.past, int):  # type: ignore[union-attr]
        near = width + given.past + queries <= given.window  # type: ignore[union-attr, operator]
    if near and (mask is None or mask.shape[1:3] == (1, 1)):
        options: dict[str, Any] = {}
        if mask is not None:
            options["key_mask"] = mask[:, 0, 0].expand(query.shape[0], -1)
            key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
        if given is not None:
            options["prefix_k"], options["prefix_v"] = given.keys.to(key.dtype), given.values.to(key.dtype)
            options["prefix_index"], options["prefix_lengths"] = given.which, given.lengths
        if given is not None and given.rescale != 1:
            return _attend_rescaled(query, key, value, options, given.rescale, causal=causal, scale=scale, softcap=softcap)
        out: Tensor = functional.prefix_attention(query, key, value, causal=causal, scale=scale, softcap=softcap, **options)
        return out
    return _attend_masked(query, key, value, given, mask, causal, scale, softcap)


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
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """The general case, by PyTorch's attention on the prefix copied in front of each sample's keys, with a whole mask."""
    if given is not None and given.rescale != 1:
        raise Inexact(f"rescale: expected 1 with a windowed, packed or four-dimensional mask, got {given.rescale}")
    if softcap:
        raise Inexact(f"softcap: expected none with a windowed, packed or four-dimensional mask, got {softcap}")
    batch, queries, device = query.shape[0], query.shape[2], query.device
    if mask is None:
        mask = torch.ones((1, 1, 1, key.shape[2]), dtype=torch.bool, device=device)
    key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
    mask = mask.expand(batch, -1, queries, -1)
    if causal and mask.shape[2] != 1 and mask.stride(2) == 0:
        mask = mask & torch.ones((queries, key.shape[2]), dtype=torch.bool, device=device).tril(key.shape[2] - queries)
    if given is not None:
        index = given.which[:, None] if given.which is not None and given.which.dim() == 1 else given.which
        columns, there = prefix_columns(given.keys.to(key.dtype), index, given.lengths, batch)
        values, _ = prefix_columns(given.values.to(key.dtype), index, given.lengths, batch)
        seen = there[:, None, None].expand(-1, 1, queries, -1)
        if given.window is not None:
            if index is not None and index.shape[1] > 1:
                raise Inexact("index: expected one prefix a sample where attention has a window, got several")
            place = torch.arange(there.shape[1], device=device)
            ahead = there.sum(1)[:, None, None] - place + given.past + torch.arange(queries, device=device)[:, None]
            ahead = ahead if given.padding is None else ahead - given.padding[:, None, None]
            seen = seen & (ahead < given.window)[:, None]
        mask = torch.cat([seen.expand(-1, mask.shape[1], -1, -1), mask], 3)
        key = torch.cat([columns.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([values.expand(batch, -1, -1, -1), value], 2)
    grouped = key.shape[1] != query.shape[1]
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, device: Any = None, **others: Any,
) -> Tensor | None:  # fmt: skip
    """Which keys are seen: bool [B, 1, 1, S] or None, what is causal being left to `_attention`; other kinds [B, 1, T, S]."""
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


# ---- The model's parts ----


def _parts(model: nn.Module) -> tuple[Any, list[nn.Module]]:
    """(the model without its head, its blocks in order)."""
    try:
        from transformers import PreTrainedModel
    except ImportError as missing:
        raise RuntimeError("fastprompt.hoist wires models of transformers, which is not installed") from missing
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    config = model.config
    pair = config.is_encoder_decoder and {"encoder", "decoder"} <= {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if pair or getattr(config, "add_cross_attention", False):
        raise Inexact(f"{type(model).__name__}: cross attention, where a prefix has no place")
    count = getattr(config, "num_hidden_layers", 0)
    lists = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    lists = [part for part in lists if len({type(block) for block in part}) == 1 and _passes_on(part[0])]
    if len(lists) != 1:
        raise Inexact(
            f"{type(model).__name__}: {len(lists)} stacks of {count} blocks that pass arguments on to attention, not one"
        )
    # The innermost, because a head may call a decoder past the model around it.
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and lists[0] in part.modules()]
    return holders[-1], list(lists[0])


def _windows(model: Any, count: int) -> list[int | None]:
    """How far back each block sees; None: all."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise Inexact(f"{type(model).__name__}: layers of kind {', '.join(strange)}, which a prefix has no place in")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _passes_on(block: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(block.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def check_exact(model: nn.Module) -> None:
    """Refuses what makes a token's keys and values depend on chance or on its neighbours in the batch."""
    config = getattr(model, "config", None)
    capacity = [] if config is None else [name for name in vars(config) if "capacity" in name]
    for name, part in model.named_modules():
        held = vars(part)
        capacity += [f"{name}.{key}" for key in held if "capacity" in key]
        if not part.training:
            continue
        for key, value in held.items():
            chance = "drop" in key or (key == "p" and isinstance(part, nn.modules.dropout._DropoutNd))
            if chance and isinstance(value, float) and value > 0:
                raise Inexact(f"{name or 'model'}: dropout ({key}={value}) is active; put the frozen model in eval mode")
    if capacity:
        raise Inexact(f"{capacity[0]}: experts with a capacity limit, where a token's route depends on the batch")


# ---- Wiring ----


class Wiring:
    """A model of transformers whose blocks get an argument each, for the time of `attention` or `reading`.

    Args:
        model: a model of transformers with one stack of blocks.

    Attributes:
        base, blocks, windows: the model without its head, its blocks, how far back each of them sees (None: all).
        given, tokens: what the blocks get in the present call.
        busy: a run of the model inside another's hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base, self.blocks = _parts(model)
        self.windows = _windows(model, len(self.blocks))
        self.given: Sequence[Any] | None = None
        self.tokens: Tokens | None = None
        self.began = self.busy = False

        heads, config = getattr(self.base.config, "num_attention_heads", 0), self.base.config
        self.width: int | None = getattr(config, "hidden_size", None)
        self.kv_heads: int | None = getattr(config, "num_key_value_heads", None) or heads or None
        self.head_dim: int | None = getattr(config, "head_dim", None) or (self.width // heads if heads and self.width else None)
        self.kept: list[tuple[Any, Any]] = []

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Attention by `_attention`, where each block's layer gets its own argument."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        model, base = self.model, self.base
        configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
        foreign = base.config._attn_implementation != NAME
        if foreign:
            self.kept = [(held, held._attn_implementation) for held in configs.values() if hasattr(held, "_attn_implementation")]
        with ExitStack() as hooks:
            try:
                if foreign:
                    model.set_attn_implementation(NAME)  # type: ignore[operator]
                if base.config._attn_implementation != NAME:
                    raise Inexact(f"{type(model).__name__}: its attention cannot be exchanged")
                for place, block in enumerate(self.blocks):
                    hook = partial(self._before_block, place)
                    hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    hooks.callback(block.register_forward_hook(partial(self._after_block, place)).remove)
                yield
            finally:
                # Backward runs checkpointed blocks again: they must find the attention that they ran with.
                if foreign and not any(getattr(block, "gradient_checkpointing", False) for block in base.modules()):
                    self.restore()

    def restore(self) -> None:
        """The attention that the model had before the first `attention`."""
        for config, name in self.kept:
            config._attn_implementation_internal = name
        self.kept = []

    def run(self, source: Callable[[dict[str, Any]], Reading | None]) -> None:
        """What a call of the model with one sample would read, inside `reading`."""
        self.busy = True
        try:
            reading = source({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
            if reading is not None and not isinstance(reading.prefix, Tokens):
                self.shift(reading)
        finally:
            self.given, self.busy = None, False

    def _before_block(self, place: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.tokens is not None:
            return _with_rows(block, args, kwargs, self.tokens.deep, place)
        if self.given is None or self.given[place] is None:
            return None
        if "fastprompt" in kwargs:
            raise ValueError(f"{type(block).__name__}: the model has a prefix already; leave that context first")
        return args, {**kwargs, "fastprompt": self.given[place]}

    def _after_block(self, place: int, block: nn.Module, args: Any, out: Any) -> Any:
        if self.tokens is not None and place == len(self.blocks) - 1:
            return _without_rows(out, self.tokens)
        given = None if self.given is None else self.given[place]
        if isinstance(given, Given) and not (torch.compiler.is_compiling() or given.read):
            raise Inexact(f"{type(block).__name__}: it does not hand the prefix on to its attention")
        return None

    @contextmanager
    def reading(self, source: Callable[[dict[str, Any]], Reading | None]) -> Iterator[None]:
        """Every call of the model reads what `source` says of the call's arguments; None: nothing."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if module is not self.base:
                raise Inexact(f"{type(module).__name__}: a copy of a model with a prompt; take the prompt out before copying")
            if self.busy:
                return None
            kwargs, self.tokens, self.given, self.busy = _named(module, args, kwargs), None, None, True
            try:
                reading = source(kwargs)
            finally:
                self.given, self.busy = None, False
            return None if reading is None else ((), self._arguments(reading, kwargs))

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            if self.busy:
                return None
            tokens, self.given, self.tokens = self.tokens, None, None
            if tokens is None or tokens.shallow is None or not self.began:
                return None
            out["last_hidden_state"] = out["last_hidden_state"][:, tokens.shallow.shape[1] :]
            return out

        with self.attention(), ExitStack() as hooks:
            hooks.callback(self.base.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(self.base.register_forward_hook(after).remove)
            yield

    def _arguments(self, reading: Reading, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call that reads a prefix."""
        prefix, base = reading.prefix, self.base
        if isinstance(prefix, Tokens):
            if prefix.shallow is None and _is_causal(self.blocks[0]):
                raise Inexact(f"{type(base).__name__}: tokens in the blocks of a causal model have no place in its mask")
            self.tokens, self.began = prefix, not _past(kwargs)
            return kwargs if prefix.shallow is None else _in_front(base, prefix.shallow, kwargs, self.began)
        shift, past = self.shift(reading), _past(kwargs)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        if any(self.windows):
            _check_packing(kwargs)
        given = partial(Given, which=reading.index, lengths=reading.lengths, past=past, rescale=reading.rescale)
        self.given = [
            None if pair is None else given(*pair, read=[], window=window, padding=reading.padding)
            for pair, window in zip(prefix, self.windows, strict=True)
        ]
        if not (isinstance(shift, int) and shift == 0) and _takes_positions(base):
            positions = _positions(base, kwargs)
            if not isinstance(past, Tensor):
                furthest = prefix.offset if isinstance(prefix, Hoisted) else _length(prefix)
                _check_table(base, furthest, past + positions.shape[1])
            kwargs["position_ids"] = torch.where(positions < 0, positions, positions + shift)  # below 0 is padding
        return kwargs

    def shift(self, reading: Reading) -> int | Tensor:
        """How far a reading moves the samples' positions, after what can be wrong with it."""
        prefix = reading.prefix
        assert not isinstance(prefix, Tokens)
        if len(prefix) != len(self.blocks):
            raise bad("prefix", f"keys and values for each of the {len(self.blocks)} blocks", len(prefix))
        shift = _offset(prefix, reading.index, reading.lengths) if reading.offset is None else reading.offset
        moves = not (isinstance(shift, int) and shift == 0)
        if moves and not _takes_positions(self.base) and _is_causal(self.blocks[0]):
            name = type(self.base).__name__
            raise Inexact(f"{name}: no position_ids, so tokens cannot start behind a prompt, only at offset=0")
        return shift

    def shallow(self, prompt: Tensor, model: nn.Module | None = None, **inputs: Any) -> tuple[Hoisted, Any]:
        """(`hoist` inside `attention`, with a model the output that it has at the prompt's rows); inputs are the model's."""
        base, blocks = self.base, self.blocks
        check_exact(base)
        if any(isinstance(part, nn.Conv1d) for block in blocks for part in block.modules()):
            raise Inexact(f"{type(base).__name__}: convolutions, by which a prompt reaches its neighbours besides attention")
        seen: list[KeyValue] = []
        self.given = [_Record(seen, True, model is None and block is blocks[-1]) for block in blocks]
        out, rows = None, prompt
        if prompt.dtype == torch.int64:
            inputs["input_ids"] = prompt
        else:
            rows = prompt.to(base.dtype, copy=True)  # some models scale embeddings in place
            inputs["inputs_embeds"] = rows
        with _without_checkpointing(blocks), suppress(_Enough), ExitStack() as hooks:
            if "inputs_embeds" in inputs and "inputs_embeds" not in inspect.signature(base.forward).parameters:
                # The text side of CLIP takes ids alone.
                inputs = {"input_ids": rows.new_zeros(rows.shape[:2], dtype=torch.int64)}
                hooks.callback(base.get_input_embeddings().register_forward_hook(lambda *_: rows).remove)
            out = (base if model is None else model)(**inputs, use_cache=False)
        self.given = None
        if len(seen) != len(blocks):
            raise Inexact(f"{type(base).__name__}: {len(seen)} attention calls read the prompt in {len(blocks)} blocks")
        return Hoisted(seen, prompt.shape[1]), out

    def deep(self, prompts: Sequence[Tensor | None], reads_prompt: bool = False) -> Hoisted:
        """`hoist_deep` inside `attention`."""
        blocks = self.blocks
        check_deep(prompts, len(blocks), reads_prompt)
        check_exact(self.base)
        records = [_Record([], False, True) for _ in blocks]
        self.given = records
        with _without_checkpointing(blocks):
            for block, tokens in zip(blocks, prompts, strict=True):
                if tokens is not None:
                    _begin(block, tokens.to(self.base.dtype))
        return Hoisted([record.seen[0] if record.seen else None for record in records], 0)


def check_deep(prompts: Sequence[Tensor | None], count: int, reads_prompt: bool) -> None:
    """Refuses deep prompts that keys and values do not stand for."""
    if len(prompts) != count:
        raise bad("prompts", f"one for each of the {count} blocks", len(prompts))
    first = next((place for place, tokens in enumerate(prompts) if tokens is not None), count)
    missing = [place for place in range(first, count) if prompts[place] is None]
    if missing:
        raise Inexact(f"prompts: block {missing[0]} has none, and so would read what block {missing[0] - 1} made of its prompt")
    if reads_prompt:
        raise Inexact("reads_prompt: the prompt's rows are read after the last block, so they have to be computed")


@contextmanager
def _without_checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """A recorded tensor must not belong to a run that is thrown away."""
    ones = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]
    for block in ones:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in ones:
            block.gradient_checkpointing = True  # type: ignore[assignment]


def _fallback(fallback: str | None) -> bool:
    if fallback not in (None, "tokens"):
        raise bad("fallback", 'None or "tokens"', repr(fallback))
    return fallback is not None


# ---- Hoisting ----


def hoist(model: nn.Module, prompt: Tensor, *, fallback: str | None = None) -> Hoisted | Tokens:
    """The keys and values of a prompt in front of a causal model, from one run on the prompt alone.

    Under a causal mask nothing that follows changes the prompt's rows, so one run serves every sample, and the prompt's
    gradient is the sum over samples that this run's backward gets. The keys are rotated, or the positions added, as at
    positions 0 to P - 1; `prefixed` lets the samples start at P.

    Args:
        model: a causal model of transformers. Its parameters need not be frozen here; gradients go where they are asked for.
        prompt: embeddings [P, width] or [N, P, width], as `fastprompt.nn.SoftPrompt` gives them, or token ids, int64 [P] or
            [N, P], for cached demonstrations and for `PrefixKV`'s init.
        fallback: "tokens": where hoisting is not exact, return the prompt as tokens, which `prefixed` puts into every sample.

    Returns:
        L pairs (keys, values) of [N, Hkv, P, D], or `Tokens`.

    Raises:
        Inexact (a ValueError): bidirectional attention; sliding windows, recurrent or cross-attention layers; dropout active
            inside the model; experts with a capacity limit.
    """
    if prompt.dim() not in ((1, 2) if prompt.dtype == torch.int64 else (2, 3)):
        raise bad("prompt", "embeddings [N, P, width] or ids [N, P]", f"{prompt.dtype} {list(prompt.shape)}")
    ids = prompt.dtype == torch.int64
    prompt = prompt[None] if prompt.dim() == (1 if ids else 2) else prompt
    allowed = _fallback(fallback)
    try:
        wiring = Wiring(model)
        with wiring.attention():
            return wiring.shallow(prompt)[0]
    except Inexact:
        if not allowed:
            raise
        return Tokens(model.get_input_embeddings()(prompt) if ids else prompt)  # type: ignore[operator]


def hoist_deep(
    model: nn.Module, prompts: Sequence[Tensor | None], *, reads_prompt: bool = False, fallback: str | None = None
) -> Hoisted | Tokens:
    """The keys and values of tokens that every block gets anew, by each block's own norm and projections.

    A deep prompt's rows are thrown away after the block, so only its keys and values matter, and they are the same for the
    batch. Exact for bidirectional and causal blocks alike, when the block needs nothing but its input (no rotary positions).

    Args:
        model: a model of transformers, such as ViT or BERT.
        prompts: one [N, P, width] a block, as `fastprompt.nn.DeepPrompt` gives them; None only for the first blocks.
        reads_prompt: the task reads the prompt's last rows (prompt pooling).
        fallback: "tokens": where this is not exact, return the prompts as tokens, which `prefixed` puts into every sample.

    Returns:
        L pairs (keys, values) of [N, H, P, D] (None where there is no prompt), or `Tokens`.

    Raises:
        Inexact (a ValueError): a block without a prompt after one with (it reads the earlier prompt's rows), prompt pooling,
            dropout active inside the model, experts with a capacity limit.
    """
    allowed = _fallback(fallback)
    try:
        wiring = Wiring(model)
        with wiring.attention():
            return wiring.deep(prompts, reads_prompt)
    except Inexact:
        if not allowed:
            raise
        return Tokens(None, list(prompts), reads_prompt)


def _begin(block: nn.Module, tokens: Tensor) -> None:
    """Runs a block as far as its attention."""
    mask = inspect.signature(block.forward).parameters.get("attention_mask")
    needed = {"attention_mask": None} if mask is not None and mask.default is inspect.Parameter.empty else {}
    try:
        block(tokens, **needed)
    except _Enough:
        return
    except TypeError as needs:
        raise Inexact(f"{type(block).__name__}: needs more than its input ({needs})") from needs
    if not torch.compiler.is_compiling():
        raise Inexact(f"{type(block).__name__}: its attention was not called")


# ---- A model with a prefix ----


@contextmanager
def prefixed(
    model: nn.Module, prefix: Sequence[KeyValue | None] | Tokens, *, index: Tensor | None = None, lengths: Tensor | None = None,
    offset: int | None = None,
) -> Iterator[nn.Module]:  # fmt: skip
    """Every call of the model inside sees the prefix in front of its own keys; also `generate`, with any cache.

    Masks and labels are those of the samples alone, without columns for the prefix. With gradient checkpointing the model
    keeps this attention function afterwards (without a prefix it is plain attention), because backward runs blocks again.

    Args:
        model: a model of transformers.
        prefix: L pairs (keys, values) [N, Hkv, P, D], from `hoist`, `hoist_deep` or `fastprompt.nn.PrefixKV`; or `Tokens`.
        index: int64 [B], each sample's prefix; -1: none.
        lengths: int64 [N], how many tokens of each prefix there are.
        offset: the position of a sample's first token. Default: P, as behind a cache of that length (with lengths, each
            sample's own); 0 for a deep prompt, which takes no positions.

    Raises:
        ValueError: a prefix that does not fit the model, or a model that has one already.
    """
    if isinstance(prefix, Tokens) and (index is not None or lengths is not None or offset is not None):
        raise bad("index, lengths, offset", "None for a prompt as tokens", "at least one")
    wiring, reading = Wiring(model), Reading(prefix, index, lengths, offset)
    if not isinstance(prefix, Tokens):
        wiring.shift(reading)
    with wiring.reading(lambda kwargs: reading):
        yield model


def _is_causal(block: nn.Module) -> bool:
    return any(getattr(part, "is_causal", False) for part in block.modules())


def _takes_positions(base: Any) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


def _check_packing(kwargs: dict[str, Any]) -> None:
    from transformers import masking_utils

    ids, mask, cache = (kwargs.get(name) for name in ("position_ids", "attention_mask", "past_key_values"))
    packs = ids is not None and mask is None and cache is None and ids.shape[0] == 1
    if packs and masking_utils.find_packed_sequence_indices(ids) is not None:
        raise Inexact("position_ids: expected no packed sequences where attention has a window, got some")


def _check_table(base: Any, prompt: int, own: int) -> None:
    """A prompt may not push tokens beyond a learned table of positions."""
    for name, table in base.named_modules():
        if isinstance(table, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
            if prompt + own > table.num_embeddings - unused:
                room = f"at most the {table.num_embeddings - unused} positions of {type(base).__name__}.{name}"
                raise bad("prompt", room, f"{prompt} and the {own} of the samples")


def _offset(prefix: Sequence[KeyValue | None], index: Tensor | None, lengths: Tensor | None) -> int | Tensor:
    length = prefix.offset if isinstance(prefix, Hoisted) else _length(prefix)
    if (index is None and lengths is None) or not length:
        return length
    if index is None:
        return lengths[:, None]  # type: ignore[index]
    check_labels("index", index, None)
    chosen = length if lengths is None else lengths[index.clamp(min=0)]
    return torch.where(index < 0, 0, chosen)[:, None]


def _length(prefix: Sequence[KeyValue | None]) -> int:
    return max([0, *(pair[0].shape[2] for pair in prefix if pair is not None)])


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def _past(kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def _positions(module: Any, kwargs: dict[str, Any]) -> Tensor:
    """The positions that are given, or that the model would take without a prefix."""
    if kwargs.get("position_ids") is not None:
        return kwargs["position_ids"]
    ids, past, mask = kwargs.get("input_ids"), _past(kwargs), kwargs.get("attention_mask")
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids"):  # RoBERTa and its kin count behind the padding id
            if ids is None:
                return part.create_position_ids_from_inputs_embeds(kwargs["inputs_embeds"], part.padding_idx) + past
            return part.create_position_ids_from_input_ids(ids, part.padding_idx, past)
    if mask is not None and mask.dim() == 2 and module.config.model_type == "opt":  # counts what is not padding
        return (mask.cumsum(1) * mask - 1).long()[:, past:]
    rows = kwargs["inputs_embeds"] if ids is None else ids
    return (torch.arange(rows.shape[1], device=rows.device) + past)[None]


# ---- The fallback: tokens in every sample ----


def _in_front(base: Any, prompt: Tensor, kwargs: dict[str, Any], began: bool) -> dict[str, Any]:
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


def _with_rows(block: nn.Module, args: Any, kwargs: dict[str, Any], deep: Sequence[Tensor | None], place: int) -> Any:
    """VPT: a block's prompt replaces the rows of the one before; a block without a prompt goes on with them."""
    tokens, length = deep[place] if deep else None, _rows(deep, place)
    if tokens is None and not length:
        return None
    kwargs = _named(block, args, kwargs)
    if kwargs.get("is_causal"):
        raise Inexact(f"{type(block).__name__}: tokens in the blocks of a causal model have no place in its mask")
    x = kwargs.pop("hidden_states")
    if tokens is not None:
        x, length = torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x[:, length:]], 1), tokens.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is not None:  # which keys are seen, the same for every query
        kwargs["attention_mask"] = nn.functional.pad(mask, (length, 0), value=True)
    return (x,), kwargs


def _without_rows(out: Any, tokens: Tokens) -> Any:
    length = _rows(tokens.deep, len(tokens.deep))
    if not length:
        return None
    x = out[0] if isinstance(out, tuple) else out
    first, own = x[:, length : length + 1], x[:, length + 1 :]
    x = torch.cat([first, x[:, :length], own], 1) if tokens.keep else x[:, length:]
    return (x, *out[1:]) if isinstance(out, tuple) else x
