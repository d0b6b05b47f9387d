"""The wires of a model of transformers: which blocks it has, and what each of them gets in a call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastprompt.functional.checks import bad, check_labels
from fastprompt.hoist.interface import NAME, Enough, Given, Inexact, KeyValue, Record, attention, mask
from fastprompt.hoist.tokens import Tokens, in_front, named, with_rows, without_rows


class Hoisted(list[KeyValue | None]):
    """Pairs (keys, values) [N, Hkv, P, D], one a layer, and the position of the first token behind them."""

    def __init__(self, layers: Sequence[KeyValue | None], offset: int) -> None:
        super().__init__(layers)
        self.offset = offset


@dataclass(frozen=True)
class Reading:
    """What one call of a model reads: `prefixed` says what each is."""

    prefix: Sequence[KeyValue | None] | Tokens
    index: Tensor | None = None
    lengths: Tensor | None = None
    offset: int | Tensor | None = None
    rescale: float = 1.0


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
    name = type(model).__name__
    if pair:
        raise Inexact(f'{name}: an encoder and a decoder; attach to one, by part="encoder", "decoder" or "decoder.cross"')
    if getattr(config, "add_cross_attention", False):
        raise Inexact(f"{name}: cross attention that may be there or not, where a prefix has no place")
    counts = {getattr(config, key, 0) for key in ("num_hidden_layers", "encoder_layers", "decoder_layers")}
    lists = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) in counts - {0}]
    lists = [part for part in lists if len({type(block) for block in part}) == 1 and _passes_on(part[0])]
    if len(lists) != 1:
        count = getattr(config, "num_hidden_layers", 0)
        raise Inexact(f"{name}: {len(lists)} stacks of {count} blocks that pass arguments on to attention, not one")
    # The innermost, because a head may call a decoder past the model around it.
    holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and lists[0] in part.modules()]
    return holders[-1], list(lists[0])


def _windows(model: Any, count: int) -> list[int | None]:
    """How far back each block sees; None: all."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if not any(name.startswith("create_") and "sliding_window" in name for name in vars(sys.modules[type(model).__module__])):
        window = None  # Moshi's masks do not read the setting
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


def _cross(block: nn.Module) -> nn.Module | None:
    """The cross attention of a decoder's block."""
    names = ("EncDecAttention", "encoder_attn")
    return next((part for name, part in block.named_modules() if name.rpartition(".")[2] in names), None)


def _relative(blocks: Sequence[nn.Module]) -> list[nn.Module | None]:
    """Where causal blocks have a table of biases by distance, as T5's first one for all."""
    found: list[nn.Module | None] = []
    for block in blocks:
        own = next((part for part in block.modules() if getattr(part, "has_relative_attention_bias", False)), None)
        found.append(own if own is not None or not found else found[0])
    return found if _is_causal(blocks[0]) else [None] * len(blocks)


# ---- Wiring ----


@dataclass
class _Use:
    """A configuration, the attention that was in it before, and how many wires need this package's."""

    config: Any
    before: Any
    wires: int = 0

    def release(self) -> None:
        self.wires -= 1
        if not self.wires and _used.get(id(self.config)) is self:
            self.config._attn_implementation_internal = self.before
            del _used[id(self.config)]


_used: dict[int, _Use] = {}


class Wiring:
    """A model of transformers whose blocks get an argument each, for the time of `attention` or `reading`.

    Args:
        model: a model of transformers with one stack of blocks.
        cross: wires the blocks' cross attention, not their self-attention.

    Attributes:
        base, blocks, windows: the model without its head, its blocks, how far back each of them sees (None: all).
        biased: scores have a bias by relative position (T5).
        key: what can have one prompt only.
        given, tokens: what the blocks get in the present call.
        busy: a run of the model inside another's hook.
    """

    def __init__(self, model: nn.Module, cross: bool = False) -> None:
        self.model, self.to_cross = model, cross
        self.base, self.blocks = _parts(model)
        self.crosses, self.relative = [_cross(block) for block in self.blocks], _relative(self.blocks)
        if cross and None in self.crosses:
            raise bad("part", "a decoder with cross attention", type(self.base).__name__)
        self.key: nn.Module = self.crosses[0] if cross else self.base  # type: ignore[assignment]
        self.biased = not cross and any(hasattr(part, "relative_attention_bias") for part in self.blocks[0].modules())
        self.windows = [None] * len(self.blocks) if cross else _windows(model, len(self.blocks))
        self.given: Sequence[Any] | None = None
        self.tokens: Tokens | None = None
        self.began = self.busy = False
        self._passes: dict[tuple[int, int, int], tuple[StorageWeakRef, Any]] = {}

        config = self.base.config
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        if config.is_encoder_decoder:  # the configuration's numbers are the encoder's
            found = [vars(part).get("num_heads", vars(part).get("n_heads")) for part in self.blocks[0].modules()]
            heads = next((each for each in found if each), 0)
        self.width: int | None = getattr(config, "hidden_size", None)
        self.kv_heads: int | None = heads or None
        heads = heads if config.is_encoder_decoder else getattr(config, "num_attention_heads", 0)
        self.head_dim: int | None = getattr(config, "head_dim", None) or (self.width // heads if heads and self.width else None)
        self.kept: list[_Use] = []
        table = getattr(self.base, "embed_positions", None)  # BART's decoder is not told positions, its table is
        told = table is not None and "position_ids" in inspect.signature(table.forward).parameters
        self.table: nn.Module | None = table if told and not _takes_positions(self.base) and _is_causal(self.blocks[0]) else None
        self.moved: int | Tensor = 0

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Attention by `interface.attention`, where each block's layer gets its own argument."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        model, base = self.model, self.base
        configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
        held = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
        before = len(self.kept)
        for config in held:
            if config._attn_implementation != NAME:
                _used[id(config)] = _Use(config, config._attn_implementation)
            if id(config) in _used:  # otherwise it was made with this attention
                _used[id(config)].wires += 1
                self.kept.append(_used[id(config)])
        with ExitStack() as hooks:
            try:
                if any(config._attn_implementation != NAME for config in held):
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
                if not any(getattr(block, "gradient_checkpointing", False) for block in base.modules()):
                    self.restore(before)

    def restore(self, until: int = 0) -> None:
        """The attention that the model had before the first `attention`, unless other wires need this one."""
        while len(self.kept) > until:
            self.kept.pop().release()

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
            return with_rows(block, args, kwargs, self.tokens.deep, place)
        given = None if self.given is None else self.given[place]
        if getattr(block, "gradient_checkpointing", False) and not torch.compiler.is_compiling():
            given = self._seen_before(place, args[0] if args else kwargs["hidden_states"], given)
        if given is None:
            return None
        name = NAME + "_cross" if self.to_cross else NAME
        if name in kwargs:
            raise ValueError(f"{type(block).__name__}: the model has a prefix already; leave that context first")
        return args, {**kwargs, name: given}

    def _seen_before(self, place: int, x: Tensor, given: Any) -> Any:
        """What a block reads that backward runs again: transformers before 5.23 then calls this hook, on the very same input."""
        key = place, x.data_ptr(), x._version
        if torch._C._current_graph_task_id() != -1:
            return self._passes[key][1] if key in self._passes else given
        for old in [old for old, (storage, _) in self._passes.items() if storage.expired()] if place == 0 else []:
            del self._passes[old]
        self._passes[key] = StorageWeakRef(x.untyped_storage()), given
        return given

    def _after_block(self, place: int, block: nn.Module, args: Any, out: Any) -> Any:
        if self.tokens is not None and place == len(self.blocks) - 1:
            return without_rows(out, self.tokens)
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
            kwargs, self.tokens, self.given, self.busy = named(module, args, kwargs), None, None, True
            self.moved = 0
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

        def place(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            positions = kwargs["position_ids"]
            if isinstance(self.moved, Tensor):  # the table knows of no samples
                positions = (positions + self.moved.to(positions.device)).flatten()
            else:
                positions = positions + self.moved
            return args, {**kwargs, "position_ids": positions}

        def placed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out.reshape(len(self.moved), -1, out.shape[-1]) if isinstance(self.moved, Tensor) else out

        with self.attention(), ExitStack() as hooks:
            if self.table is not None:
                hooks.callback(self.table.register_forward_pre_hook(place, with_kwargs=True).remove)
                hooks.callback(self.table.register_forward_hook(placed).remove)
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
            return kwargs if prefix.shallow is None else in_front(base, prefix.shallow, kwargs, self.began)
        shift, past, starts = self.shift(reading), _past(kwargs), kwargs.get("cu_seq_lens_q")
        if starts is not None and self.biased:
            raise Inexact(f"{type(base).__name__}: a bias by distance in the row, which knows of no packed sequences")
        if starts is not None and kwargs.get("position_ids") is None:
            raise bad("position_ids", "each sequence's own positions, beside cu_seq_lens_q", None)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        given = partial(
            Given, which=reading.index, lengths=reading.lengths, past=past, to_cross=self.to_cross, rescale=reading.rescale,
            places=_places(kwargs, past) if any(self.windows) else None,
        )  # fmt: skip
        layers = zip(prefix, self.windows, self.crosses, self.relative, strict=True)
        self.given = [
            None if pair is None else given(*pair, read=[], window=window, cross=cross, relative=bias)
            for pair, window, cross, bias in layers
        ]
        if isinstance(shift, int) and shift == 0:
            return kwargs
        self.moved = shift
        if isinstance(prefix, Hoisted) and kwargs.get("position_ids") is not None and _starts_late(base):
            raise Inexact(
                f"position_ids: {type(base).__name__} has its own, which begin behind the padding id, and so have the prompt's "
                "tokens; got some (generate() counts from 0)"
            )
        if self.table is not None or _takes_positions(base):
            positions = _positions(base, kwargs)
            if isinstance(shift, Tensor):
                shift = shift.to(positions.device)
                if starts is not None and len(shift) > 1:  # one a sequence
                    places = torch.arange(positions.shape[1], device=positions.device)
                    shift = shift[torch.bucketize(places, starts[1:].to(places), right=True)].T
            if not isinstance(past, Tensor):
                furthest = prefix.offset if isinstance(prefix, Hoisted) else _length(prefix)
                _check_table(base, furthest, past + positions.shape[1])
            if self.table is None:
                kwargs["position_ids"] = torch.where(positions < 0, positions, positions + shift)  # below 0 is padding
        return kwargs

    def shift(self, reading: Reading) -> int | Tensor:
        """How far a reading moves the samples' positions, after what can be wrong with it."""
        prefix = reading.prefix
        assert not isinstance(prefix, Tokens)
        if len(prefix) != len(self.blocks):
            raise bad("prefix", f"keys and values for each of the {len(self.blocks)} blocks", len(prefix))
        shift = _offset(prefix, reading.index, reading.lengths) if reading.offset is None else reading.offset
        if self.to_cross or self.biased:
            return 0  # what is there has no positions, or counts distances
        moves = not (isinstance(shift, int) and shift == 0)
        if moves and not _takes_positions(self.base) and _is_causal(self.blocks[0]) and self.table is None:
            name = type(self.base).__name__
            raise Inexact(f"{name}: no position_ids, so tokens cannot start behind a prompt, only at offset=0")
        return shift

    def shallow(self, prompt: Tensor, model: nn.Module | None = None, **inputs: Any) -> tuple[Hoisted, Any]:
        """(`hoist` inside `attention`, with a model the output that it has at the prompt's rows); inputs are the model's."""
        base, blocks = self.base, self.blocks
        check_exact(base)
        if any(self.crosses):
            raise Inexact(f"{type(base).__name__}: a decoder, where a soft prompt reads each sample's encoder; use PrefixKV")
        if base.config.is_encoder_decoder:  # as tokens neither: their rows are taken out of the encoder's output
            raise bad("prompt", f"PrefixKV in {type(base).__name__}, whose rows a decoder reads", "a soft prompt")
        if any(isinstance(part, nn.Conv1d) for block in blocks for part in block.modules()):
            raise Inexact(f"{type(base).__name__}: convolutions, by which a prompt reaches its neighbours besides attention")
        seen: list[KeyValue] = []
        self.given = [Record(seen, True, model is None and block is blocks[-1]) for block in blocks]
        out, rows = None, prompt
        if prompt.dtype == torch.int64:
            inputs["input_ids"] = prompt
        else:
            rows = prompt.to(base.dtype, copy=True)  # some models scale embeddings in place
            inputs["inputs_embeds"] = rows
        with _without_checkpointing(blocks), suppress(Enough), ExitStack() as hooks:
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
        records = [Record([], False, True) for _ in blocks]
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


def _begin(block: nn.Module, tokens: Tensor) -> None:
    """Runs a block as far as its attention."""
    mask = inspect.signature(block.forward).parameters.get("attention_mask")
    needed = {"attention_mask": None} if mask is not None and mask.default is inspect.Parameter.empty else {}
    try:
        block(tokens, **needed)
    except Enough:
        return
    except Inexact:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as needs:
        raise Inexact(f"{type(block).__name__}: does not run on the tokens of a prompt alone ({needs})") from needs
    if not torch.compiler.is_compiling():
        raise Inexact(f"{type(block).__name__}: its attention was not called")


# ---- Positions ----


def _is_causal(block: nn.Module) -> bool:
    return any(getattr(part, "is_causal", False) for part in block.modules())


def _takes_positions(base: Any) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


def _places(kwargs: dict[str, Any], past: Any) -> Tensor | None:
    """Where windows find the queries: as the model is told, so without padding and in a sequence of its own; never further."""
    ids = kwargs.get("position_ids")
    return None if ids is None else torch.minimum(ids, past + torch.arange(ids.shape[-1], device=ids.device))


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


def _past(kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def _starts_late(module: Any) -> bool:
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())


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
