"""CLIP's text side: class prompts that train, at the cost of the rows that matter.

    prompts = ContextPrompts(clip, tokenize(tokenizer, ["cat", "red panda"]), context=16)      # CoOp
    model = fastprompt.Reprogrammed(ImageFeatures(clip), outputs=prompts)
    fastprompt.fit(model, (pixels, targets), epochs=50)

CLIP's text encoder is causal and reads a class off the row of its end-of-text token (EOT). So nothing behind EOT matters, and
the rows that all classes begin with, [SOS, shared context], are the same for all of them: they run once, packed in front of
each class's own rows, and the gradient of the context is summed over the classes on the way. In the last block only the
keys, the values and the EOT rows are computed. 77 rows a class become 4 to 8, and the features are the same up to rounding.

The modules are alignments O of y = O(f(I(x))): from image features [B, d] to logits [B, C]

    logits = exp(logit_scale) * cos(image features, text features) (+ logit_bias)

over a CLIP of transformers (`CLIPModel`; `CLIPTextModelWithProjection` for features alone) or of open_clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt import functional
from fastprompt.functional.checks import bad, check_range, one_of
from fastprompt.taxonomy import Alignment, Format, Location, Operator, Place

__all__ = ["ConditionalPrompts", "ContextPrompts", "CoupledPrompts", "ImageFeatures", "ZeroShot", "tokenize"]


def tokenize(tokenizer: Callable[..., Any], names: Sequence[str], template: str | Sequence[str] = "{}.") -> Tensor:
    """Token ids of class names in a template, by a tokenizer of transformers or of open_clip.

    Returns:
        int64 [C, L], or for several templates [T, C, L].
    """
    templates = [template] if isinstance(template, str) else list(template)
    if isinstance(names, str) or not names or not templates:
        raise bad("names, template", "a list of at least one name, and at least one template", f"{names!r}, {template!r}")
    texts = [each.format(name) for each in templates for name in names]
    if hasattr(tokenizer, "pad_token_id"):
        ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(texts)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise TypeError(f"tokenizer: expected one that gives ids [texts, length], got {type(ids).__name__}")
    return ids if isinstance(template, str) else ids.unflatten(0, (len(templates), len(names)))


# ---- The two libraries ----


class _Block(NamedTuple):
    """A transformer block of either library."""

    norm1: Callable[[Tensor], Tensor]
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    heads: int

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input and the heads' outputs, [..., width] both."""
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))

    def split(self, t: Tensor) -> Tensor:
        """[B, rows, width] -> [B, H, rows, D]."""
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _block(block: Any) -> _Block:
    if hasattr(block, "self_attn"):
        a = block.self_attn
        maps = a.q_proj, a.k_proj, a.v_proj
        return _Block(block.layer_norm1, *maps, a.out_proj, block.layer_norm2, block.mlp, a.num_heads)
    a = block.attn
    biases = (None,) * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
    q, k, v = (partial(F.linear, weight=w, bias=b) for w, b in zip(a.in_proj_weight.chunk(3), biases, strict=True))

    def out(t: Tensor) -> Tensor:
        return block.ls_1(a.out_proj(t))

    def mlp(t: Tensor) -> Tensor:
        return block.ls_2(block.mlp(t))

    return _Block(block.ln_1, q, k, v, out, block.ln_2, mlp, a.num_heads)


def _is_plain(blocks: Any) -> bool:
    """Whether all blocks are open_clip's with PyTorch's attention, which `_block` knows."""
    names = ("ln_1", "ls_1", "ln_2", "ls_2", "mlp")
    return all(
        all(hasattr(block, name) for name in names) and isinstance(getattr(block, "attn", None), nn.MultiheadAttention)
        for block in blocks
    )


class _Text(NamedTuple):
    """CLIP's text side: tables [V, width] and [positions, width], blocks, last norm, projection."""

    words: Tensor
    positions: Tensor
    blocks: Any
    norm: nn.Module
    projection: Any  # nn.Linear, [width, d] or None
    eos: int | None  # a text ends at the first of these; None: at its largest id

    @property
    def width(self) -> int:
        return self.words.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks[0].mlp.parameters()).dtype

    def tensors(self) -> Iterator[Tensor]:
        """All that features depend on."""
        yield self.words
        yield self.positions
        for part in (self.blocks, self.norm, self.projection):
            if isinstance(part, nn.Module):
                yield from part.parameters()
            elif part is not None:
                yield part

    def project(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Module) else x @ self.projection

    def ends(self, tokens: Tensor) -> Tensor:
        """[N] of ids [N, L]: where each text ends, as the library pools it."""
        if self.eos is None:
            return tokens.argmax(1)
        return (tokens == self.eos).int().argmax(1)


def _text(clip: Any) -> _Text:
    name = type(clip).__name__
    if getattr(getattr(clip, "config", None), "model_type", None) in ("clip", "clip_text_model"):
        if not hasattr(clip, "text_projection"):
            raise TypeError(f"clip: expected CLIPModel or CLIPTextModelWithProjection of transformers, got {name}")
        side = clip.text_model
        tables = side.embeddings.token_embedding.weight, side.embeddings.position_embedding.weight
        eos = None if side.eos_token_id == 2 else side.eos_token_id  # 2: configurations of before the id was corrected
        return _Text(*tables, side.encoder.layers, side.final_layer_norm, clip.text_projection, eos)
    side = getattr(clip, "text", clip)
    parts = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask")
    blocks = getattr(getattr(side, "transformer", None), "resblocks", ())
    if not all(hasattr(side, part) for part in parts) or not len(blocks) or not _is_plain(blocks):
        raise TypeError(f"clip: expected a CLIP of transformers or open_clip with its usual text blocks, got {name}")
    if side.attn_mask is None or getattr(side, "cls_emb", None) is not None:
        raise bad("clip", "a causal text side without a class token", f"{name} with another")
    pool = one_of("clip.text_pool_type", side.text_pool_type if side is clip else side.pool_type, ("argmax", "eos"))
    eos = None if pool == "argmax" else (side.text_eos_id if side is clip else side.eos_id)
    tables = side.token_embedding.weight, side.positional_embedding
    return _Text(*tables, blocks, side.ln_final, side.text_projection, eos)


# ---- The text encoder on packed rows ----


class _Rows(nn.Module):
    """C token sequences as rows that run once: the P first ones that all share, then each sequence's own, packed.

    Args:
        sequences: for each class its ids up to EOT; soft token j is -(j + 1).
        places: positions of the model.
    """

    prefix: Tensor
    own: Tensor
    places: Tensor
    lengths: Tensor
    starts: Tensor
    ends: Tensor
    padded: Tensor
    packed: Tensor

    def __init__(self, sequences: Sequence[Sequence[int]], places: int) -> None:
        super().__init__()
        longest = max(len(ids) for ids in sequences)
        if longest > places:
            raise bad("tokens", f"context and name in at most the {places} positions of the model", f"{longest} tokens")
        shared = min(len(ids) for ids in sequences) - 1
        shared = next((t for t in range(shared) if len({ids[t] for ids in sequences}) > 1), shared)
        if not shared:
            raise bad("tokens", "texts that begin with the same start-of-text token", "several")
        own = [list(ids[shared:]) for ids in sequences]
        self.shared, self.count, self.longest = shared, len(own), max(map(len, own))
        self.rows = sum(map(len, own))
        self.even = self.rows == self.count * self.longest
        self.soft = min(min(ids) for ids in own) < 0  # own rows hold soft tokens too
        lengths = torch.tensor([len(ids) for ids in own])
        starts = F.pad(lengths.cumsum(0), (1, 0))
        step = torch.arange(self.longest)
        buffers = {
            "prefix": torch.tensor([list(sequences[0][:shared])]),
            "own": torch.tensor([[each for ids in own for each in ids]]),
            "places": shared + torch.cat([step[: len(ids)] for ids in own]),
            "lengths": lengths,
            "starts": starts,
            "ends": starts[1:] - 1,
            "padded": (starts[:-1, None] + torch.minimum(step, lengths[:, None] - 1)).flatten(),
            "packed": (step < lengths[:, None]).flatten().nonzero()[:, 0],
        }
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, text: _Text, soft: Tensor | None = None, deep: Sequence[Tensor] = (), again: bool = False) -> Tensor:
        """Features [B, C, d].

        Args:
            soft: the soft tokens [B, slots, width]; without any B is 1.
            deep: [M, width] for the input of block 1, 2, ... in the place of the rows behind the first.
            again: blocks run again in backward, and keep nothing else (gradient checkpointing).
        """
        dtype, places = text.dtype, text.positions
        if soft is None:
            prefix = F.embedding(self.prefix, text.words).to(dtype) + places[: self.shared].to(dtype)
        else:
            ids = self.prefix.expand(len(soft), -1)
            prefix = functional.soft_gather(ids, text.words, soft, positions=places[: self.shared], dtype=dtype)
        at = F.embedding(self.places, places)
        if soft is None or not self.soft:
            own = (F.embedding(self.own, text.words).to(dtype) + at.to(dtype)).expand(len(prefix), -1, -1)
        else:
            own = functional.soft_gather(self.own.expand(len(soft), -1), text.words, soft, positions=at, dtype=dtype)
        x: tuple[Tensor, ...] = (prefix, own)  # in the first block apart: own rows have no gradient there
        for place, block in enumerate(text.blocks):
            if 0 < place <= len(deep):
                tokens = deep[place - 1].to(x[0].dtype).expand(len(prefix), -1, -1)
                x = (torch.cat([x[0][:, :1], tokens, x[0][:, 1 + tokens.shape[1] :]], 1),)
            last = place == len(text.blocks) - 1
            if again and torch.is_grad_enabled():
                x = (checkpoint(self._run, block, last, *x, use_reentrant=False),)
            else:
                x = (self._run(block, last, *x),)
        return text.project(x[0])

    def _run(self, module: nn.Module, last: bool, *parts: Tensor) -> Tensor:
        """A block on rows [B, shared + own, width] (or these two apart); the last one gives the EOT rows [B, C, width]."""
        block = _block(module)
        normed = [block.norm1(part) for part in parts]
        keys, values = (self._both([each(h) for h in normed]) for each in (block.key, block.value))
        if last:
            x, h = (self._both(t)[1].index_select(1, self.ends) for t in (parts, normed))
            return block.finish(x, self._attend(block, block.query(h), keys, values, last))
        front, query = self._both([block.query(h) for h in normed])
        q, k, v = (block.split(t) for t in (front, keys[0], values[0]))
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        attended = torch.cat([first, self._attend(block, query, keys, values, last)], 1)
        return block.finish(parts[0] if len(parts) == 1 else torch.cat(parts, 1), attended)

    def _both(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """(shared rows, own rows)."""
        return parts if len(parts) == 2 else parts[0].split([self.shared, self.rows], 1)

    def _attend(self, block: _Block, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], last: bool) -> Tensor:
        """What own rows, or in the last block the EOT rows, read of the shared and of their sequence's rows.

        Packed rows stay packed where a kernel reads them so. Elsewhere packed sequences are a loop, so queries and keys are
        padded to the longest for the attention alone: causal, so nobody sees the padding, and the last block is told the lengths.
        """
        batch, device = len(query), query.device
        options: dict[str, Any] = {"causal": True}
        if batch > 1:
            options["prefix_index"] = torch.arange(batch, device=device).repeat_interleave(self.count)
        prefix = [block.split(t[0]) for t in (keys, values)]
        if _packs(query):
            q, k, v = (block.split(t.reshape(1, -1, t.shape[2])) for t in (query, keys[1], values[1]))
            starts = (self.starts[:-1] + self.rows * torch.arange(batch, device=device)[:, None]).flatten()
            starts = F.pad(starts, (0, 1), value=batch * self.rows)
            options |= {"cu_seqlens_k": starts, "max_seqlen_k": self.longest}
            options["cu_seqlens"] = torch.arange(batch * self.count + 1, device=device) if last else starts
            options["max_seqlen"] = 1 if last else self.longest
            out: Tensor = functional.prefix_attention(q, k, v, *prefix, **options)
            return out.transpose(1, 2).reshape(query.shape)
        if last and not self.even:
            options |= {"lengths": self.lengths.repeat(batch), "causal": False}
        q = block.split(query.reshape(batch * self.count, 1, query.shape[2])) if last else self._pad(block, query)
        own = [self._pad(block, t[1]) for t in (keys, values)]
        out = functional.prefix_attention(q, *own, *prefix, **options).transpose(1, 2)
        out = out.reshape(batch, self.count * q.shape[2], query.shape[2])
        return out if last or self.even else out.index_select(1, self.packed)

    def _pad(self, block: _Block, t: Tensor) -> Tensor:
        """Own rows [B, R, width] -> [B * C, H, longest, D]."""
        t = t if self.even else t.index_select(1, self.padded)
        return block.split(t.reshape(-1, self.longest, t.shape[2]))


def _packs(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float64


# ---- Modules ----


class _Classes(nn.Module):
    """What reads image features as classes: a frozen CLIP, and texts."""

    num_classes: int
    _kept: tuple[Any, ...] | None = None

    def __init__(self, clip: nn.Module, *, again: bool = False) -> None:
        super().__init__()
        _text(clip)
        self.clip = clip.requires_grad_(False).eval()
        self.again = again
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_forgive_frozen)

    @classmethod
    def from_names(
        cls, clip: nn.Module, tokenizer: Callable[..., Any], names: Sequence[str], *, template: str | Sequence[str] = "{}.",
        context: int | str | Tensor | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """From class names and a tokenizer (see `tokenize`); the context may be words, such as "a photo of a"."""
        if isinstance(context, str):
            (ids,) = _sequences(_text(clip), tokenize(tokenizer, [context], "{}"))
            context = torch.tensor(ids[1:-1], dtype=torch.int64)
        if context is not None:
            options["context"] = context
        make: Any = cls
        return make(clip, tokenize(tokenizer, names, template), **options)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.clip.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def _own(self) -> Iterator[Tensor]:
        """The prompts' own tensors."""
        return (tensor for name, tensor in self.named_parameters() if not name.startswith("clip."))

    def extra_repr(self) -> str:
        return f"classes={self.num_classes}, trainable={sum(t.numel() for t in self._own() if t.requires_grad):,}"

    def _encode(self, text: _Text) -> Tensor:
        raise NotImplementedError

    def features(self) -> Tensor:
        """Text features [C, d], not normalised, in the model's dtype.

        They are kept, and given again while nothing that they are made of trains: no gradient is asked for, and no tensor has
        been exchanged, moved or written to since. (What is written through `.data` is not seen.)
        """
        text = _text(self.clip)
        made_of = [*self._own(), *text.tensors()]
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in made_of)):
            return self._encode(text)
        device = text.words.device.type
        amp = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        known = not any(t.is_inference() for t in made_of)  # those do not tell when they change
        stamps = [amp, *((t.data_ptr(), t.dtype, t.device, t._version if known else 0) for t in made_of)]
        if self._kept is None or not known or self._kept[0] != stamps:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                # An alias of each is kept, so that its address cannot be another tensor's by now.
                self._kept = (stamps, [t.detach() for t in made_of], self._encode(text))
        return self._kept[2]

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits [B, C] of image features [B, d], which need not be normalised; float32, or float64."""
        scale = getattr(self.clip, "logit_scale", None)
        if scale is None:
            raise bad("clip", "a model with a logit_scale (`features` needs none)", type(self.clip).__name__)
        if image_features.dim() != 2 or not image_features.is_floating_point():
            raise bad("image_features", "floating point [B, d]", f"{image_features.dtype} {list(image_features.shape)}")
        image = _normal(image_features)
        text = _normal(self._texts(image))
        if text.shape[-1] != image.shape[1]:
            raise bad("image_features", f"[B, {text.shape[-1]}] like the text features", list(image_features.shape))
        bias = getattr(self.clip, "logit_bias", None)
        with torch.autocast(image.device.type, enabled=False):
            logits = image @ text.T if text.dim() == 2 else (text @ image[:, :, None])[:, :, 0]
            logits = scale.exp() * logits
            return logits if bias is None else logits + bias

    def _texts(self, image: Tensor) -> Tensor:
        return self.features()


def _normal(features: Tensor) -> Tensor:
    """Of length 1; 16 bits would cost a logit of 100 * cos its digits."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + "clip.")]:
        del state[name]


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    frozen = tuple(f"clip.{name}" for name in module.clip.state_dict())  # type: ignore[union-attr, operator]
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(frozen)]


def _sequences(text: _Text, tokens: Tensor) -> list[list[int]]:
    """Each text's ids up to EOT, of [N, L]."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected int64 ids, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2 or not tokens.numel():
        raise bad("tokens", "[C, L] for at least one class", list(tokens.shape))
    tokens = tokens.cpu()
    check_range("tokens", tokens.flatten(), len(text.words))
    ends = text.ends(tokens).tolist()
    if min(ends) < 1:
        wanted = "their largest id" if text.eos is None else f"id {text.eos}"
        raise bad(
            "tokens", f"texts with an end-of-text token ({wanted}) behind the first", f"none in text {ends.index(min(ends))}"
        )
    return [ids[: end + 1] for ids, end in zip(tokens.tolist(), ends, strict=True)]


class ZeroShot(_Classes):
    """Class texts as they are: zero-shot classification (Radford et al. 2021, arXiv 2103.00020).

        text features of a class = mean over templates of normalised features

    Args:
        clip: frozen here, in eval mode.
        tokens: int64 [C, L], or [T, C, L] for T templates, as `tokenize` gives them.
    """

    def __init__(self, clip: nn.Module, tokens: Tensor) -> None:
        super().__init__(clip)
        text = _text(clip)
        several = tokens if isinstance(tokens, Tensor) and tokens.dim() == 3 else [tokens]
        layouts = [_Rows(_sequences(text, each), len(text.positions)) for each in several]
        if not layouts:
            raise bad("tokens", "[T, C, L] for at least one template", list(tokens.shape))
        self.texts, self.num_classes = nn.ModuleList(layouts).to(text.words.device), layouts[0].count

    taxonomy = Place(Format.FIXED, Location.RAW, Operator.CONCATENATIVE, Alignment.IDENTITY)

    def _encode(self, text: _Text) -> Tensor:
        each = [layout(text)[0] for layout in self.texts]
        if len(each) == 1:
            return each[0]
        return torch.stack([_normal(features) for features in each]).mean(0).to(each[0].dtype)


class ContextPrompts(_Classes):
    """Trained context tokens around class names: CoOp (Zhou et al. 2022, arXiv 2109.01134).

        t_c = [SOS][v_1] ... [v_M][name_c].[EOT]        text features = text encoder(t_c)

    Exact for every position. At the "end" (the name is there) with a shared context, SOS and context run once; in the "middle"
    the context's first half does, at the "front" and with a context a class SOS alone. Nothing behind EOT is ever computed.

    Args:
        clip: a CLIP of transformers or open_clip; frozen here, in eval mode, whatever `train()` says.
        tokens: int64 [C, L], the class names as `tokenize` gives them: [SOS, name, ending, EOT, ...].
        context: M (random, standard deviation 0.02), or token ids int64 [M], or embeddings [M, width], to start from.
        position: of the name: "end", "middle" (of the context) or "front".
        per_class: a context a class, as CoOp's class-specific one.
        ending: how many ids before EOT stay behind everything (a full stop), which matters for "middle" and "front".
        checkpointing: run the text encoder's blocks again in backward instead of keeping what they computed.

    Attributes:
        context: Parameter [M, width], or [C, M, width]; with `clip` frozen, all that is trained and all that is saved.

    Raises:
        TypeError, ValueError: a model of another kind, texts without EOT or too long for the model's positions, a context of
            another width.
    """

    def __init__(
        self, clip: nn.Module, tokens: Tensor, *, context: int | Tensor = 16, position: str = "end", per_class: bool = False,
        ending: int = 1, checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(clip, again=checkpointing)
        text = _text(clip)
        one_of("position", position, ("end", "middle", "front"))
        names = _sequences(text, tokens)
        shortest = min(map(len, names)) - 2
        if not 0 <= ending <= shortest:
            raise bad("ending", f"0 to {shortest}, the ids between SOS and EOT of the shortest text", ending)
        self.num_classes, self.position, self.ending = len(names), position, ending
        start = _start(text, context)
        self.context = nn.Parameter(start.expand(len(names), -1, -1).clone() if per_class else start)
        length = len(start)
        made = []
        for place, ids in enumerate(names):
            slots = [-(1 + j + place * length * per_class) for j in range(length)]
            cut = 1 if position == "end" else len(ids) - 1 - ending
            ahead = length if position == "end" else length // 2 if position == "middle" else 0
            made.append([ids[0], *slots[:ahead], *ids[1:cut], *slots[ahead:], *ids[cut:]])
        self.texts = _Rows(made, len(text.positions)).to(text.words.device)

    taxonomy = Place(Format.LEARNABLE, Location.EMBEDDING, Operator.CONCATENATIVE, Alignment.IDENTITY)

    def _encode(self, text: _Text) -> Tensor:
        return self.texts(text, self.context.flatten(0, -2)[None], again=self.again)[0]


def _start(text: _Text, context: int | Tensor) -> Tensor:
    """The first context [M, width], in float32 (or float64)."""
    dtype, device = torch.promote_types(text.dtype, torch.float32), text.words.device
    if not isinstance(context, Tensor):
        if context < 1:
            raise bad("context", "at least 1 token", context)
        return torch.empty(context, text.width, dtype=dtype, device=device).normal_(std=0.02)
    if context.dtype == torch.int64:
        if context.dim() != 1 or not len(context):
            raise bad("context", "ids [M] of at least one token", list(context.shape))
        check_range("context", context, len(text.words))
        context = F.embedding(context.to(device), text.words)
    if context.dim() != 2 or not len(context) or context.shape[1] != text.width or not context.is_floating_point():
        raise bad("context", f"embeddings [M, {text.width}], or ids int64 [M]", f"{context.dtype} {list(context.shape)}")
    return context.detach().to(device, dtype, copy=True)


class ConditionalPrompts(ContextPrompts):
    """A context that each image shifts: CoCoOp (Zhou et al. 2022, arXiv 2203.05557).

        v_m(x) = v_m + h(image features / |image features|)        h: Linear - ReLU - Linear, width d / 16

    Every image has its own texts of all classes. They run in one pass over B * C sequences, where each image's [SOS, context]
    runs once for its C classes and nothing behind EOT is computed; `checkpointing` keeps the memory small.

    Args:
        as `ContextPrompts`; hidden: width of h's hidden layer, default d // 16.

    Attributes:
        context: Parameter [M, width]; shift: h.
    """

    def __init__(
        self, clip: nn.Module, tokens: Tensor, *, context: int | Tensor = 4, hidden: int | None = None, **options: Any
    ) -> None:
        super().__init__(clip, tokens, context=context, **options)
        text = _text(clip)
        with torch.no_grad():
            width = text.project(torch.zeros(1, text.width, dtype=text.dtype, device=text.words.device)).shape[1]
        hidden = max(1, width // 16) if hidden is None else hidden
        if hidden < 1:
            raise bad("hidden", "at least 1", hidden)
        shift = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, text.width))
        self.shift = shift.to(self.context.device, self.context.dtype)

    def features(self, image_features: Tensor) -> Tensor:  # type: ignore[override]
        """Text features [B, C, d] for image features [B, d]."""
        image = _normal(image_features).to(self.context.dtype)
        soft = self.context.flatten(0, -2) + self.shift(image)[:, None]
        return self.texts(_text(self.clip), soft, again=self.again)

    def _texts(self, image: Tensor) -> Tensor:
        if image.shape[1] != self.shift[0].in_features:
            raise bad("image_features", f"[B, {self.shift[0].in_features}] like the text features", list(image.shape))
        return self.features(image)


class CoupledPrompts(_Classes):
    """Deep prompts on both sides, the visual ones linear maps of the textual ones: MaPLe (Khattak et al. 2023, arXiv 2210.03117).

        text, block j < J:    [SOS][P_j][name][EOT]: P_0 behind SOS, P_j in its place in the input of block j
        vision, block j < J:  [CLS][patches][F_j(P_j)], in the place of F_{j-1}'s rows; later blocks go on with the last ones

    The text side runs as in `ContextPrompts`. Of the visual side `ImageFeatures(clip, prompts)` takes care: prompts that the
    next block replaces act as keys and values only, which are made once a batch; from block J - 1 on they are rows.

    Args:
        clip, tokens, checkpointing: as `ContextPrompts`.
        context: M (2 as published), or the start of P_0 as ids or embeddings.
        depth: J, at most the number of blocks of either side.

    Attributes:
        prompt: Parameter [J, M, text width]; maps: J linear maps to the width of the vision side.
    """

    def __init__(
        self, clip: nn.Module, tokens: Tensor, *, context: int | Tensor = 2, depth: int = 9, checkpointing: bool = False
    ) -> None:
        super().__init__(clip, again=checkpointing)
        text, vision = _text(clip), _vision(clip)
        most = min(len(text.blocks), len(vision.blocks))
        if not 1 <= depth <= most:
            raise bad("depth", f"1 to {most}, the blocks of both sides", depth)
        start = _start(text, context)
        names = _sequences(text, tokens)
        self.num_classes, self.depth = len(names), depth
        later = torch.empty(depth - 1, *start.shape, dtype=start.dtype, device=start.device).normal_(std=0.02)
        self.prompt = nn.Parameter(torch.cat([start[None], later]))
        maps = (nn.Linear(text.width, vision.width) for _ in range(depth))
        self.maps = nn.ModuleList(maps).to(start.device, start.dtype)
        slots = [-(1 + j) for j in range(len(start))]
        made = [[ids[0], *slots, *ids[1:]] for ids in names]
        self.texts = _Rows(made, len(text.positions)).to(text.words.device)

    taxonomy = Place(Format.LEARNABLE, Location.HIDDEN, Operator.CONCATENATIVE, Alignment.IDENTITY)

    def _encode(self, text: _Text) -> Tensor:
        return self.texts(text, self.prompt[:1], self.prompt[1:].unbind(0), self.again)[0]

    def visual(self) -> list[Tensor]:
        """F_j(P_j): J tensors [M, vision width]."""
        return [each(tokens) for each, tokens in zip(self.maps, self.prompt, strict=True)]


# ---- The vision side ----


class _Vision(NamedTuple):
    """CLIP's vision transformer."""

    blocks: Any
    width: int
    embed: Callable[[Tensor], Tensor]  # images -> [B, 1 + patches, width], CLS first
    pool: Callable[[Tensor], Tensor]  # CLS rows [B, 1, width] -> features [B, d]


def _vision(clip: Any) -> _Vision:
    if hasattr(clip, "vision_model") and hasattr(clip, "visual_projection"):
        return _vision_of_transformers(clip, clip.vision_model)
    side: Any = getattr(clip, "visual", None)
    blocks = getattr(getattr(side, "transformer", None), "resblocks", ())
    if not len(blocks) or not _is_plain(blocks) or side.attn_pool is not None or side.pool_type != "tok":
        name = type(clip).__name__
        raise TypeError(f"clip: expected a CLIP whose vision side is a transformer that reads its class token, got {name}")

    def pool(x: Tensor) -> Tensor:
        pooled: Tensor = side._pool(x)[0]
        return pooled if side.proj is None else pooled @ side.proj

    return _Vision(blocks, side.class_embedding.shape[0], side._embeds, pool)


def _vision_of_transformers(clip: Any, side: Any) -> _Vision:
    def embed(images: Tensor) -> Tensor:
        x: Tensor = side.pre_layrnorm(side.embeddings(images))
        return x

    def pool(x: Tensor) -> Tensor:
        features: Tensor = clip.visual_projection(side.post_layernorm(x[:, 0]))
        return features

    return _Vision(side.encoder.layers, side.embeddings.embed_dim, embed, pool)


class ImageFeatures(nn.Module):
    """CLIP's image side as a frozen model f: images [B, 3, H, W] to features [B, d], not normalised.

    Args:
        clip: `CLIPModel` of transformers or a CLIP of open_clip; frozen here, in eval mode.
        prompts: `CoupledPrompts`, whose visual side every call reads. They are not part of this module: they train, move and
            are saved where they are, as `outputs` of `fastprompt.Reprogrammed` for example.
    """

    def __init__(self, clip: nn.Module, prompts: CoupledPrompts | None = None) -> None:
        super().__init__()
        if not hasattr(clip, "encode_image") and not hasattr(clip, "get_image_features"):
            raise TypeError(f"clip: expected a CLIP of transformers or open_clip with an image side, got {type(clip).__name__}")
        if prompts is not None and not isinstance(prompts, CoupledPrompts):
            raise TypeError(f"prompts: expected CoupledPrompts, got {type(prompts).__name__}")
        self.clip = clip.requires_grad_(False).eval()
        self._prompts = () if prompts is None else (prompts,)  # in a tuple, or it would be a part

    def train(self, mode: bool = True) -> ImageFeatures:
        super().train(mode)
        self.clip.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        clip: Any = self.clip
        if self._prompts:
            return _prompted(_vision(clip), images, self._prompts[0].visual())
        if hasattr(clip, "encode_image"):
            return clip.encode_image(images)
        out = clip.get_image_features(pixel_values=images)
        return getattr(out, "pooler_output", out)


def _prompted(vision: _Vision, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Features with [M, width] more rows in the first blocks; CLS reads all rows, so their order is free."""
    x = vision.embed(images)
    for place, module in enumerate(vision.blocks):
        block, last = _block(module), place == len(vision.blocks) - 1
        given = prompts[place].to(x.dtype)[None] if place < len(prompts) else None
        if place == len(prompts) - 1 and not last:  # the blocks behind read what this one makes of them
            x, given = torch.cat([x, given.expand(len(x), -1, -1)], 1), None  # type: ignore[union-attr]
        prefix: list[Tensor] = []
        if given is not None:
            normed = block.norm1(given)
            prefix = [block.split(each(normed)) for each in (block.key, block.value)]
        h = block.norm1(x)
        key, value = (block.split(each(h)) for each in (block.key, block.value))
        if last:
            x, h = x[:, :1], h[:, :1]
        out = functional.prefix_attention(block.split(block.query(h)), key, value, *prefix)
        x = block.finish(x, out.transpose(1, 2).flatten(2))
    return vision.pool(x)
