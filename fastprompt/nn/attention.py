"""Prompts on hidden states as modules: prefixes of keys and values, deep and soft prompts, and an attention that takes them.

A prefix is, layer by layer, a pair (prefix_k, prefix_v) of [N, Hkv, P, D]: N = 1 is shared by the batch, otherwise an index
chooses each sample's. `fastprompt.hoist` makes one from a prompt, and puts one into a frozen model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, check_labels, check_range, one_of, pair
from fastprompt.nn._shared import Described, check_sizes, from_words
from fastprompt.taxonomy import Format, Location, Operator, Place

KeyValue = tuple[Tensor, Tensor]


class _Prompt(Described):
    @property
    def taxonomy(self) -> Place:
        return Place(Format.LEARNABLE, Location.HIDDEN, Operator.CONCATENATIVE)


def _probability(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise bad("dropout", "a probability below 1", dropout)
    return dropout


def _start(parameter: Tensor, init: str, spread: float) -> None:
    """The random starts: normal with that standard deviation, uniform in [-spread, spread], zeros."""
    with torch.no_grad():
        if init == "normal":
            parameter.normal_(std=spread)
        elif init == "uniform":
            parameter.uniform_(-spread, spread)
        else:
            parameter.zero_()


class PrefixKV(_Prompt):
    """Trained keys and values in front of every layer's own: k = [prefix_k | k], v = [prefix_v | v].

    Prefix tuning (Li & Liang 2021, arXiv 2101.00190), with its reparameterisation (embedding - Linear - Tanh - Linear) when
    `hidden` is given; P-tuning v2 (Liu et al. 2022, arXiv 2110.07602); trained caches with frozen sink tokens (Cartridges,
    Eyuboglu et al. 2025, arXiv 2506.06266). Keys are stored as attention reads them, so after any rotary embedding.

    Args:
        layers, kv_heads, length, head_dim: L, Hkv, P and D.
        prompts: N prefixes, for tasks or samples.
        hidden: width of the reparameterisation's hidden layer; None trains keys and values themselves. It runs once a
            forward pass, on [N, P, width], whatever the batch.
        width: of its embedding. Default: Hkv * D.
        frozen: the first tokens that are not trained (attention sinks), as `init` or a loaded state gives them.
        init: "normal" (standard deviation 0.02) or "zeros", or, layer by layer, pairs of [N or 1, Hkv, P, D]: the keys and
            values of an existing cache, or of a text by `fastprompt.hoist.hoist`.
        dropout: on keys and values while training, one draw for the batch.

    Attributes:
        prefix: Parameter [L, 2, N, Hkv, P - frozen, D], without a reparameterisation.
        sink: buffer [L, 2, N, Hkv, frozen, D], when tokens are frozen.
        embedding: Parameter [N, P, width], and `mlp`, with one.

    Raises:
        ValueError: a size below 1, tensors that do not fit, or an option that has no meaning with a reparameterisation.
    """

    sink: Tensor | None

    def __init__(
        self, layers: int, kv_heads: int, length: int, head_dim: int, *, prompts: int = 1, hidden: int | None = None,
        width: int | None = None, frozen: int = 0, init: str | Sequence[KeyValue] = "normal", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers, kv_heads=kv_heads, length=length, head_dim=head_dim, prompts=prompts)
        self.layers, self.kv_heads, self.length, self.head_dim = layers, kv_heads, length, head_dim
        self.prompts, self.hidden, self.frozen = prompts, hidden, frozen
        self.dropout = _probability(dropout)
        if isinstance(init, str):
            self.init = one_of("init", init, ("normal", "zeros"))
        elif hidden is not None:
            raise bad("init", '"normal" with a reparameterisation', "tensors")
        if not 0 <= frozen < length:
            raise bad("frozen", f"0 to {length - 1}, so that something is trained", frozen)
        if width is not None and hidden is None:
            raise bad("width", "None without a reparameterisation", width)
        self.width = width
        if hidden is not None:
            self._reparameterise(hidden, kv_heads * head_dim if width is None else width, frozen)
            return
        whole = torch.empty(layers, 2, prompts, kv_heads, length, head_dim)
        if isinstance(init, str):
            _start(whole, init, 0.02)
        else:
            whole = _stacked(init, whole)
        self.register_buffer("sink", whole[..., :frozen, :].contiguous() if frozen else None)
        self.prefix = nn.Parameter(whole[..., frozen:, :].contiguous())

    def _reparameterise(self, hidden: int, width: int, frozen: int) -> None:
        check_sizes(hidden=hidden, width=width)
        if frozen:
            raise bad("frozen", "0 with a reparameterisation", frozen)
        self.embedding = nn.Parameter(torch.empty(self.prompts, self.length, width))
        _start(self.embedding, self.init, 1.0)
        out = self.layers * 2 * self.kv_heads * self.head_dim
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def stacked(self) -> Tensor:
        """[L, 2, N, Hkv, P, D]: keys and values of all layers."""
        if self.hidden is not None:
            flat = self.mlp(self.embedding)
            return _from_flat(flat, self.layers, self.kv_heads)
        return self.prefix if self.sink is None else torch.cat([self.sink, self.prefix], -2)

    def forward(self) -> list[KeyValue]:
        """L pairs (prefix_k, prefix_v) of [N, Hkv, P, D]."""
        whole = F.dropout(self.stacked(), self.dropout, self.training)
        return [(keys, values) for keys, values in (layer.unbind(0) for layer in whole.unbind(0))]

    def flat(self) -> Tensor:
        """[P, 2 * L * Hkv * D] (several prefixes: [N, P, ...]), the tensor that PEFT saves: per token layer 0's keys, its
        values, layer 1's keys, ...
        """
        flat = self.stacked().permute(2, 4, 0, 1, 3, 5).flatten(2)
        return flat[0] if self.prompts == 1 else flat

    @classmethod
    def from_flat(cls, flat: Tensor, layers: int, kv_heads: int, **options: Any) -> PrefixKV:
        """A prefix of what `flat` gives: [P, 2 * L * Hkv * D] or [N, P, ...]; options are the constructor's."""
        flat = flat[None] if flat.dim() == 2 else flat
        if flat.dim() != 3 or flat.shape[2] % (2 * layers * kv_heads):
            raise bad("flat", f"[P, 2 * {layers} * {kv_heads} * D] or [N, P, ...]", list(flat.shape))
        whole = _from_flat(flat.detach(), layers, kv_heads)
        _, _, prompts, _, length, head_dim = whole.shape
        pairs = [(layer[0], layer[1]) for layer in whole]
        return cls(layers, kv_heads, length, head_dim, prompts=prompts, init=pairs, **options)


def _from_flat(flat: Tensor, layers: int, kv_heads: int) -> Tensor:
    """[N, P, 2 * L * Hkv * D] -> [L, 2, N, Hkv, P, D], each layer's part contiguous, as attention reads it."""
    return flat.unflatten(2, (layers, 2, kv_heads, -1)).permute(2, 3, 0, 4, 1, 5).contiguous()


def _stacked(pairs: Sequence[KeyValue], whole: Tensor) -> Tensor:
    layers, _, *shape = whole.shape
    allowed = (tuple(shape), (1, *shape[1:]))
    if len(pairs) != layers:
        raise bad("init", f"{layers} pairs of keys and values, one a layer", len(pairs))
    for tensor in (tensor for keys_values in pairs for tensor in keys_values):
        if tuple(tensor.shape) not in allowed:
            raise bad("init", f"keys and values of {list(shape)}", list(tensor.shape))
    filled = [torch.stack([part.detach().expand(shape) for part in pair]) for pair in pairs]
    return torch.stack(filled)


class DeepPrompt(_Prompt):
    """Trained tokens for the input of every layer, or of chosen ones; nobody reads what the layers make of them.

    VPT-deep (Jia et al. 2022, arXiv 2203.12119) and, with a projection a layer, MaPLe's visual side (Khattak et al. 2023,
    arXiv 2210.03117). The tokens act only as keys and values, which `fastprompt.hoist.hoist_deep` makes once for a batch.

    Args:
        layers, length, width: L of the model, P and the model's width.
        patch: the model's patch size, for VPT's init: uniform in [-v, v], v = sqrt(6 / (3 * patch_area + token width)).
            None: normal with standard deviation 0.02.
        which: the layers that are prompted. Default: all.
        shared: one prompt for all layers.
        project: token width, when a linear map takes the tokens to the model's width (Kaiming, as VPT has it).
        project_each: one map a layer (MaPLe) instead of one for all (VPT).
        dropout: on the tokens while training.
        per_sample: one draw of dropout a sample, as VPT has it, instead of one for the batch; then the tokens, and the keys
            and values made of them, are the samples' own.

    Attributes:
        prompt: Parameter [prompted layers or 1, P, token width].

    Raises:
        ValueError: a size below 1, or layers that the model has not.
    """

    def __init__(
        self, layers: int, length: int, width: int, *, patch: int | Sequence[int] | None = None,
        which: Sequence[int] | None = None, shared: bool = False, project: int | None = None, project_each: bool = False,
        dropout: float = 0.0, per_sample: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(layers=layers, length=length, width=width)
        self.layers, self.length, self.width, self.shared = layers, length, width, shared
        self.which = None if which is None else tuple(which)
        prompted = range(layers) if self.which is None else self.which
        if not prompted or list(prompted) != sorted(set(prompted)) or not set(prompted) <= set(range(layers)):
            raise bad("which", f"rising layer numbers from 0 to {layers - 1}", which)
        self.project, self.project_each, self.per_sample = project, project_each, per_sample
        self.dropout = _probability(dropout)
        self.patch = None if patch is None else pair("patch", patch)
        inner = width if project is None else project
        check_sizes(project=inner)
        if project_each and project is None:
            raise bad("project_each", "False without a projection", project_each)
        self.prompt = nn.Parameter(torch.empty(1 if shared else len(prompted), length, inner))
        if self.patch is None:
            _start(self.prompt, "normal", 0.02)
        else:
            _start(self.prompt, "uniform", math.sqrt(6 / (3 * self.patch[0] * self.patch[1] + inner)))
        maps = 0 if project is None else len(prompted) if project_each else 1
        self.projections = nn.ModuleList(nn.Linear(inner, width) for _ in range(maps))
        for each in self.projections:
            nn.init.kaiming_normal_(each.weight, a=0, mode="fan_out")  # type: ignore[arg-type]

    def forward(self, batch: int | None = None) -> list[Tensor | None]:
        """L token tensors [1, P, width], None for a layer that is not prompted; [batch, P, width] with dropout per sample."""
        prompted = range(self.layers) if self.which is None else self.which
        parts = self.prompt.expand(len(prompted), -1, -1).unbind(0)
        out: list[Tensor | None] = [None] * self.layers
        for place, (layer, tokens) in enumerate(zip(prompted, parts, strict=True)):
            if len(self.projections):
                tokens = self.projections[place if self.project_each else 0](tokens)
            out[layer] = self._dropped(tokens[None], batch)
        return out

    def _dropped(self, tokens: Tensor, batch: int | None) -> Tensor:
        if not (self.training and self.dropout):
            return tokens
        if self.per_sample:
            if batch is None:
                raise bad("batch", "the number of samples, for dropout per sample", None)
            tokens = tokens.expand(batch, -1, -1)
        return F.dropout(tokens, self.dropout, True)


class SoftPrompt(_Prompt):
    """Trained embeddings in front of a sequence's own (Lester et al. 2021, arXiv 2104.08691).

    In a causal model the prompt's keys and values do not depend on what follows: `fastprompt.hoist.hoist` makes them once.

    Args:
        length, width: P and the model's width.
        prompts: N prompts, for tasks.
        init: "uniform" (in [-0.5, 0.5], as published), "normal" (standard deviation 1, as PEFT), "zeros", or a tensor
            [P, width] or [N, P, width].

    Attributes:
        prompt: Parameter [N, P, width].
    """

    def __init__(self, length: int, width: int, *, prompts: int = 1, init: str | Tensor = "uniform") -> None:
        super().__init__()
        check_sizes(length=length, width=width, prompts=prompts)
        self.length, self.width, self.prompts = length, width, prompts
        if isinstance(init, Tensor):
            if tuple(init.shape) not in ((length, width), (1, length, width), (prompts, length, width)):
                raise bad("init", f"[{length}, {width}] or [{prompts}, {length}, {width}]", list(init.shape))
            if not init.is_floating_point():
                raise bad("init", "floating point embeddings", init.dtype)
            start = init.detach().expand(prompts, length, width).clone()
        else:
            self.init = one_of("init", init, ("uniform", "normal", "zeros"))
            start = torch.empty(prompts, length, width)
            _start(start, init, 0.5 if init == "uniform" else 1.0)
        self.prompt = nn.Parameter(start)

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Tensor, length: int, ids: Sequence[int] | Tensor | None = None, *, prompts: int = 1, seed: int = 0
    ) -> SoftPrompt:
        """Starts from rows of an embedding matrix [V, width]: those of a text's ids, repeated or cut to the length, or random
        rows (each prompt its own).
        """
        start = from_words(vocabulary, length, ids, prompts, seed)
        return cls(length, vocabulary.shape[1], prompts=prompts, init=start)

    @property
    def taxonomy(self) -> Place:
        return Place(Format.LEARNABLE, Location.EMBEDDING, Operator.CONCATENATIVE)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """[N, P, width], or with an index int64 [B] each sample's [B, P, width]."""
        if index is None:
            return self.prompt
        check_labels("index", index, None)
        check_range("index", index, self.prompts)
        if torch.compiler.is_compiling():  # Inductor counts from the end; this stays an error
            index = torch.where(index < 0, self.prompts, index)
        return self.prompt.index_select(0, index)


class PromptAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that takes a prefix: the same parameters, state and shapes.

    out = out_proj(attention(q, [prefix_k | k], [prefix_v | v])). The prefix is keys and values, or tokens, which get the
    keys and values of this module's own in_proj: what VPT-deep and MaPLe need.

    Differences to the original: no attention weights are made (None in their place), masks are `key_padding_mask` and
    `is_causal`, and there is no dropout on attention weights.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: those of `torch.nn.MultiheadAttention`.
        dropout: kept for a module taken over; a forward pass with dropout in training mode raises.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, batch_first: bool = False,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        check_sizes(embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise bad("embed_dim", f"a multiple of num_heads={num_heads}", embed_dim)
        super().__init__(
            embed_dim, num_heads, dropout=_probability(dropout), bias=bias, batch_first=batch_first, device=device, dtype=dtype
        )

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention) -> PromptAttention:
        """Takes over a module with its very parameters: nothing is copied."""
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise bad("module", "one without kdim, vdim, add_bias_kv and add_zero_attn", module)
        mine = cls(
            module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None, module.batch_first, device="meta"
        )
        mine.in_proj_weight, mine.in_proj_bias, mine.out_proj = module.in_proj_weight, module.in_proj_bias, module.out_proj
        return mine.train(module.training)

    @property
    def taxonomy(self) -> Place:
        return Place(location=Location.HIDDEN, operator=Operator.CONCATENATIVE)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, batch_first={self.batch_first}"

    def project(self, tokens: Tensor) -> KeyValue:
        """Keys and values [N, H, P, D] of tokens [N, P, embed_dim] (or [P, embed_dim]), by this module's in_proj."""
        if tokens.dim() not in (2, 3) or tokens.shape[-1] != self.embed_dim:
            raise bad("prompt", f"[P, {self.embed_dim}] or [N, P, {self.embed_dim}]", list(tokens.shape))
        tokens = tokens[None] if tokens.dim() == 2 else tokens
        width = self.embed_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[width:]
        both = F.linear(tokens, self.in_proj_weight[width:], bias)
        keys, values = both.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
        prefix: KeyValue | None = None, prompt: Tensor | None = None, prefix_index: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """(out, None): as the original, with keys and values, or tokens, that every query sees besides.

        Args:
            query, key, value: [T, B, E], [S, B, E], [S, B, E]; with batch_first [B, T, E], ...; unbatched [T, E], ...
            key_padding_mask: bool [B, S], True is not seen.
            is_causal: key j is seen by query i iff j <= i + S - T.
            attn_mask: None, or with is_causal the causal mask that the original asks for, which is not read.
            prefix: (prefix_k, prefix_v) [N, H, P, D].
            prompt: tokens [P, E] or [N, P, E], already normed as the block norms its input.
            prefix_index, prefix_lengths: see `fastprompt.functional.prefix_attention`.
        """
        if need_weights:
            raise bad("need_weights", "False: the weights are never made", True)
        if attn_mask is not None and not is_causal:
            raise bad("attn_mask", "None, or is_causal=True, or a key_padding_mask", f"a mask {list(attn_mask.shape)}")
        if self.training and self.dropout:
            raise bad("dropout", "0, or eval mode: a frozen model does not drop", self.dropout)
        if prefix is not None and prompt is not None:
            raise bad("prefix, prompt", "at most one of them", "both")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = self._turned(query, key, value)
        heads = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self._in_projection(query, key, value)]
        if prompt is not None:
            prefix = self.project(prompt)
        keys, values = (None, None) if prefix is None else prefix
        out = functional.prefix_attention(
            heads[0], heads[1], heads[2], keys, values, prefix_index=prefix_index, prefix_lengths=prefix_lengths,
            causal=is_causal, key_mask=_seen(key_padding_mask),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    @staticmethod
    def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch first; a tensor that is given twice stays one, so that one projection serves."""
        first = query.transpose(0, 1)
        second = first if key is query else key.transpose(0, 1)
        return first, second, second if value is key else value.transpose(0, 1)

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        return [F.linear(*each) for each in inputs]


def _seen(key_padding_mask: Tensor | None) -> Tensor | None:
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected bool, got {key_padding_mask.dtype}")
    return ~key_padding_mask


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, prefix: KeyValue | None = None,
    prefix_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` with a prefix that every query sees, for code that calls that.

    Args:
        query, key, value: [B, H, T, D], [B, Hkv, S, D], [B, Hkv, S, D].
        attn_mask: None, or a key mask: bool [B, 1, 1, S], True is seen.
        is_causal: as there aligned top left, so for T = S only.
        prefix: (prefix_k, prefix_v) [N, Hkv, P, D].
        prefix_index: see `fastprompt.functional.prefix_attention`.
    """
    if dropout_p:
        raise bad("dropout_p", "0: a frozen model does not drop", dropout_p)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise bad("key", f"{query.shape[1]} heads, or enable_gqa=True", f"{key.shape[1]} heads")
    if is_causal and query.shape[2] != key.shape[2]:
        raise bad("is_causal", "as many queries as keys", f"{query.shape[2]} and {key.shape[2]}")
    key_mask = None
    if attn_mask is not None:
        wanted = (query.shape[0], 1, 1, key.shape[2])
        if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) != wanted:
            raise bad("attn_mask", f"bool {list(wanted)}", f"{attn_mask.dtype} {list(attn_mask.shape)}")
        key_mask = attn_mask[:, 0, 0]
    keys, values = (None, None) if prefix is None else prefix
    out = functional.prefix_attention(
        query, key, value, keys, values, prefix_index=prefix_index, causal=is_causal, key_mask=key_mask, scale=scale
    )
    assert isinstance(out, Tensor)
    return out
