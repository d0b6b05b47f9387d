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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, check_labels

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


class _Given(NamedTuple):
    """What an attention layer of a prefixed model reads."""

    keys: Tensor
    values: Tensor
    which: Tensor | None
    lengths: Tensor | None
    read: list[bool]


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
    scaling: float | None = None, is_causal: bool | None = None, fastprompt: _Given | _Record | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, T, D], key and value [B, Hkv, S, D] -> [B, T, H, D].

    attention_mask is `_mask`'s: None, or bool [B, 1, 1, S'], where S' <= S says how many keys a static cache holds.
    """
    layer = type(module).__name__
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True)  # a decoder may be used as an encoder
    for name in ("sliding_window", "position_bias", "s_aux"):
        if others.get(name) is not None:
            raise Inexact(f"{layer}: its attention has a {name}, which attention over a shared prefix does not know")
    if dropout:
        raise Inexact(f"{layer}: dropout {dropout} on attention weights is active; put the frozen model in eval mode")
    if isinstance(fastprompt, _Record):
        if fastprompt.shallow and not causal:
            raise Inexact(
                f"{layer}: bidirectional attention, where a shallow prompt's keys and values depend on each sample; use a deep "
                'prompt, or fallback="tokens"'
            )
        fastprompt.seen.append((key, value))
        if fastprompt.last:
            raise _Enough
    key_mask = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1):
            got = f"{attention_mask.dtype} {list(attention_mask.shape)}"
            raise bad("attention_mask", "which keys are seen, [B, S]", got)
        key_mask = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        key, value = key[:, :, : key_mask.shape[1]], value[:, :, : key_mask.shape[1]]
    options: dict[str, Any] = {}
    if value.shape[-1] != key.shape[-1]:
        raise Inexact(f"{layer}: keys of {key.shape[-1]} elements and values of {value.shape[-1]}")
    if isinstance(fastprompt, _Given):
        fastprompt.read[:] = [True]
        options["prefix_k"], options["prefix_v"] = fastprompt.keys.to(key.dtype), fastprompt.values.to(key.dtype)
        options["prefix_index"], options["prefix_lengths"] = fastprompt.which, fastprompt.lengths
    out = functional.prefix_attention(
        query, key, value, causal=causal and query.shape[2] > 1, key_mask=key_mask, scale=scaling,
        softcap=others.get("softcap"), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None, device: Any = None, **others: Any,
) -> Tensor | None:  # fmt: skip
    """Which keys are seen, bool [B, 1, 1, S] or None; what is causal is left to the attention function."""
    from transformers import masking_utils

    known = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if mask_function not in known or kv_offset:
        raise Inexact("attention_mask: expected causal or full attention, got a mask of another kind (packed, windowed, chunked)")
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
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
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


def _check_layers(model: Any) -> None:
    windowed = ["sliding_attention"] if getattr(model.config, "sliding_window", None) else []
    kinds = set(getattr(model.config, "layer_types", None) or windowed) - {"full_attention"}
    if kinds:
        raise Inexact(f"{type(model).__name__}: layers of kind {', '.join(sorted(kinds))}, which do not see a whole prefix")


def _passes_on(block: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(block.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _check_exact(model: nn.Module) -> None:
    """Refuses what makes a token's keys and values depend on chance or on its neighbours in the batch."""
    capacity = [name for name in vars(getattr(model, "config", object())) if "capacity" in name]
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


@contextmanager
def _wired(model: nn.Module, base: Any, blocks: Sequence[nn.Module], given: Sequence[Any]) -> Iterator[None]:
    """Attention by `_attention`, where each block's layer gets its own argument."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)

    def argument(value: Any) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if "fastprompt" in kwargs:
                raise ValueError(f"{type(block).__name__}: the model has a prefix already; leave that context first")
            return args, {**kwargs, "fastprompt": value}

        return hook

    def check(block: nn.Module, args: Any, out: Any, given: _Given) -> None:
        if not (torch.compiler.is_compiling() or given.read):
            raise Inexact(f"{type(block).__name__}: it does not hand the prefix on to its attention")

    before = base.config._attn_implementation
    with ExitStack() as hooks:
        try:
            if before != NAME:
                model.set_attn_implementation(NAME)  # type: ignore[operator]
            if base.config._attn_implementation != NAME:
                raise Inexact(f"{type(model).__name__}: its attention cannot be exchanged")
            for block, value in zip(blocks, given, strict=True):
                if value is not None:
                    hooks.callback(block.register_forward_pre_hook(argument(value), with_kwargs=True).remove)
                if isinstance(value, _Given):
                    hooks.callback(block.register_forward_hook(partial(check, given=value)).remove)
            yield
        finally:
            # Backward runs checkpointed blocks again: they must find the attention that they ran with.
            if before != NAME and not any(getattr(block, "gradient_checkpointing", False) for block in base.modules()):
                model.set_attn_implementation(before)  # type: ignore[operator]


@contextmanager
def _without_checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """A recorded tensor must not belong to a run that is thrown away."""
    before = [getattr(block, "gradient_checkpointing", None) for block in blocks]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block, value in zip(blocks, before, strict=True):
            if value is None:
                del block.gradient_checkpointing
            else:
                block.gradient_checkpointing = value  # type: ignore[assignment]


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
        base, blocks = _parts(model)
        _check_layers(model)
        _check_exact(base)
        if any(isinstance(part, nn.Conv1d) for block in blocks for part in block.modules()):
            raise Inexact(f"{type(model).__name__}: convolutions, by which a prompt reaches its neighbours besides attention")
        seen: list[KeyValue] = []
        records = [_Record(seen, True, block is blocks[-1]) for block in blocks]
        inputs = {"input_ids": prompt} if ids else {"inputs_embeds": prompt.to(base.dtype, copy=True)}  # some scale it in place
        with _without_checkpointing(blocks), _wired(model, base, blocks, records), suppress(_Enough):
            base(**inputs, use_cache=False)
        if len(seen) != len(blocks):
            raise Inexact(f"{type(model).__name__}: {len(seen)} attention calls read the prompt in {len(blocks)} blocks")
        return Hoisted(seen, prompt.shape[1])
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
        base, blocks = _parts(model)
        if len(prompts) != len(blocks):
            raise bad("prompts", f"one for each of the {len(blocks)} blocks", len(prompts))
        first = next((place for place, tokens in enumerate(prompts) if tokens is not None), len(blocks))
        missing = [place for place in range(first, len(blocks)) if prompts[place] is None]
        if missing:
            raise Inexact(
                f"prompts: block {missing[0]} has none, and so would read what block {missing[0] - 1} made of its prompt"
            )
        if reads_prompt:
            raise Inexact("reads_prompt: the prompt's rows are read after the last block, so they have to be computed")
        _check_exact(base)
        records = [_Record([], False, True) for _ in blocks]
        with _without_checkpointing(blocks), _wired(model, base, blocks, records):
            for block, tokens in zip(blocks, prompts, strict=True):
                if tokens is not None:
                    _begin(block, tokens.to(base.dtype))
        return Hoisted([record.seen[0] if record.seen else None for record in records], 0)
    except Inexact:
        if not allowed:
            raise
        return Tokens(None, list(prompts), reads_prompt)


def _begin(block: nn.Module, tokens: Tensor) -> None:
    """Runs a block as far as its attention."""
    try:
        block(tokens)
    except _Enough:
        return
    except TypeError as needs:
        raise Inexact(f"{type(block).__name__}: needs more than its input ({needs})") from needs
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
    if isinstance(prefix, Tokens):
        if index is not None or lengths is not None or offset is not None:
            raise bad("index, lengths, offset", "None for a prompt as tokens", "at least one")
        with _with_tokens(model, prefix):
            yield model
        return
    base, blocks = _parts(model)
    _check_layers(model)
    if len(prefix) != len(blocks):
        raise bad("prefix", f"keys and values for each of the {len(blocks)} blocks", len(prefix))
    given = [None if pair is None else _Given(*pair, index, lengths, []) for pair in prefix]
    shift = _offset(prefix, index, lengths) if offset is None else offset

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = (), _named(module, args, kwargs)
        return args, {**kwargs, "position_ids": _positions(module, kwargs) + shift}

    moves = not (isinstance(shift, int) and shift == 0)
    placed = "position_ids" in inspect.signature(base.forward).parameters
    if moves and not placed and any(getattr(part, "is_causal", False) for part in blocks[0].modules()):
        raise Inexact(f"{type(base).__name__}: no position_ids, so tokens cannot start behind a prompt, only at offset=0")
    with _wired(model, base, blocks, given), ExitStack() as hooks:
        if moves and placed:
            hooks.callback(base.register_forward_pre_hook(move, with_kwargs=True).remove)
        yield model


def _offset(prefix: Sequence[KeyValue | None], index: Tensor | None, lengths: Tensor | None) -> int | Tensor:
    length = max((pair[0].shape[2] for pair in prefix if pair is not None), default=0)
    if isinstance(prefix, Hoisted):
        length = prefix.offset
    if (index is None and lengths is None) or not length:
        return length
    if index is None:
        return lengths[:, None]  # type: ignore[index]
    check_labels("index", index, None)
    chosen = length if lengths is None else lengths[index.clamp(min=0)]
    return torch.where(index < 0, 0, chosen)[:, None]


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


@contextmanager
def _with_tokens(model: nn.Module, prompt: Tokens) -> Iterator[None]:
    base, blocks = _parts(model)
    with ExitStack() as hooks:
        if prompt.shallow is not None:
            _in_front(base, prompt.shallow, hooks)
        else:
            if any(getattr(part, "is_causal", False) for part in blocks[0].modules()):
                raise Inexact(f"{type(model).__name__}: tokens in the blocks of a causal model have no place in its mask")
            _in_blocks(blocks, prompt, hooks)
        yield


def _in_front(base: Any, prompt: Tensor, hooks: ExitStack) -> None:
    """PEFT's prompt tuning: embeddings in front of the samples' own; the output has the samples' rows again."""
    length = prompt.shape[1]
    began: list[bool] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = _named(module, args, kwargs)
        began[:] = [not _past(kwargs)]
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            tensor = kwargs.get(name)
            if tensor is not None and tensor.dim() != 2:
                raise bad(name, "[B, S]", list(tensor.shape))
            if tensor is not None and (began[0] or name == "attention_mask"):
                kwargs[name] = nn.functional.pad(tensor, (length, 0), value=fill)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + length
        if not began[0]:
            return (), kwargs
        if kwargs.get("position_ids") is not None:
            first = torch.arange(length, device=prompt.device).expand(kwargs["position_ids"].shape[0], -1)
            kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], 1)
        own = kwargs.get("inputs_embeds")
        own = base.get_input_embeddings()(kwargs.pop("input_ids")) if own is None else own
        kwargs["inputs_embeds"] = torch.cat([prompt.to(own.dtype).expand(len(own), -1, -1), own], 1)
        return (), kwargs

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        if began[0]:
            out["last_hidden_state"] = out["last_hidden_state"][:, length:]
        return out

    hooks.callback(base.register_forward_pre_hook(before, with_kwargs=True).remove)
    hooks.callback(base.register_forward_hook(after).remove)


def _in_blocks(blocks: Sequence[nn.Module], prompt: Tokens, hooks: ExitStack) -> None:
    """VPT: a block's prompt replaces the rows of the one before; a block without a prompt goes on with them."""
    rows = 0
    for block, tokens in zip(blocks, prompt.deep, strict=True):
        if rows or tokens is not None:
            hook = _placing(tokens, rows)
            hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        rows = rows if tokens is None else tokens.shape[1]

    def after(block: nn.Module, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        first, own = x[:, rows : rows + 1], x[:, rows + 1 :]
        x = torch.cat([first, x[:, :rows], own], 1) if prompt.keep else x[:, rows:]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    hooks.callback(blocks[-1].register_forward_hook(after).remove)


def _placing(tokens: Tensor | None, rows: int) -> Callable[..., Any]:
    """A block's hook: its tokens instead of the first `rows` rows, and a mask that sees them."""

    def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = _named(block, args, kwargs)
        x, length = kwargs.pop("hidden_states"), rows
        if tokens is not None:
            x, length = torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x[:, rows:]], 1), tokens.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is not None:  # [B, 1, T, T] of transformers, bool or added; every query sees the same
            mask = nn.functional.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
            kwargs["attention_mask"] = torch.cat([mask[:, :, :1].expand(-1, -1, length, -1), mask], 2)
        return (x,), kwargs

    return hook
