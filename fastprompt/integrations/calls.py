"""Prefixes in models by anybody: at the calls of PyTorch's attention that their blocks make.

For the time of a block's forward pass a `TorchFunctionMode`, which is the running thread's own and ends with an exception
too, takes `scaled_dot_product_attention` and `multi_head_attention_forward` (what `nn.MultiheadAttention` calls).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from fastprompt.functional.checks import bad
from fastprompt.hoist import Given, Hoisted, Inexact, KeyValue, Reading, Tokens, attend, check_deep, check_exact


class _Enough(Exception):
    """A block's keys and values are known."""


class Calls:
    """The blocks of a model; the same methods as `fastprompt.hoist.Wiring`.

    What the blocks read is made when the first of them is called, so any way to run the model will do. A block that backward
    runs again, under `torch.utils.checkpoint`, reads what it read before: the run that it belongs to says which.
    """

    def __init__(self, model: nn.Module, blocks: str | None, layers: int) -> None:
        self.model = self.key = model
        self.name, self.blocks = _stack(model, blocks, layers)
        self.given: Sequence[Any] | None = None
        self._again: weakref.WeakKeyDictionary[Any, tuple[Sequence[Any] | None]] = weakref.WeakKeyDictionary()
        self._graded = False  # whether the present call of the model makes a graph
        self.batch_first = True
        self.width = _width(self.blocks[0])
        self.kv_heads = self.head_dim = None

    @contextmanager
    def reading(self, source: Callable[[dict[str, Any]], Reading | None]) -> Iterator[None]:
        """Every run of the blocks reads what `source` says; None: nothing."""

        def run(place: int, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if block is not self.blocks[place]:
                raise Inexact(f"{type(block).__name__}: part of a copy of a model with a prompt; detach before copying")
            compiling = torch.compiler.is_compiling()
            frame = None if compiling else _checkpointed()
            if not compiling and torch._C._current_graph_task_id() != -1:
                if frame not in self._again:
                    raise Inexact(f"{type(block).__name__}: run again by backward, where its prompt is not known; {_REENTRANT}")
                given = self._again[frame][0]
            else:
                if place == 0:
                    x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
                    # What makes the prompt is kept, not run again: the hooks of a checkpoint must not count what it saves.
                    with nullcontext() if frame is None else torch.autograd.graph.saved_tensors_hooks(_same, _same):
                        reading = source({"x": x if self.batch_first else x.transpose(0, 1)})
                    self.given = None if reading is None else _given(reading, len(self.blocks))
                if frame is not None and self._again.setdefault(frame, (self.given,))[0] is not self.given:
                    raise Inexact(f"{type(block).__name__}: two runs of the model in one checkpoint; make it one for each")
                given = self.given
            given = None if given is None else given[place]
            if given is None:
                return original(*args, **kwargs)
            if self._graded and not torch.is_grad_enabled():
                raise Inexact(f"{type(block).__name__}: run without a graph inside a model that makes one; {_REENTRANT}")
            mode = _Attention(type(block).__name__, given)
            with mode:
                out = original(*args, **kwargs)
            if mode.calls != 1:
                raise Inexact(f"{type(block).__name__}: {_unreached(mode.calls)}")
            return out

        def begin(graded: bool, *_: Any) -> None:
            self._graded = graded and torch.is_grad_enabled()

        with ExitStack() as undo:
            undo.callback(self.model.register_forward_pre_hook(partial(begin, True)).remove)
            undo.callback(self.model.register_forward_hook(partial(begin, False), always_call=True).remove)
            for place, block in enumerate(self.blocks):
                undo.callback(_put_back, block, block.__dict__.get("forward"))
                block.forward = partial(run, place, block, block.forward)  # type: ignore[method-assign]
            yield
        self.given = None

    def shallow(self, prompt: Tensor) -> tuple[Hoisted, Any]:
        raise Inexact(f"{type(self.model).__name__}: not a model of transformers, whose embeddings a soft prompt could join")

    def deep(self, prompts: Sequence[Tensor | None]) -> Hoisted:
        """Keys and values of tokens by each block's own norm and projections."""
        check_deep(prompts, len(self.blocks), False)
        check_exact(self.model)
        pairs = zip(self.blocks, prompts, strict=True)
        return Hoisted([None if tokens is None else self._keys_values(block, tokens) for block, tokens in pairs], 0)

    def run(self, source: Callable[[dict[str, Any]], Reading | None]) -> None:
        """What a call of the model with one sample would read; and whether its blocks have samples first, or tokens."""
        tokens = torch.zeros(1, 2, self.width, device=_like(self.blocks[0]).device)
        self.batch_first = True
        self.batch_first = self._keys_values(self.blocks[0], tokens)[0].shape[2] == 2
        reading = source({"x": torch.zeros(1, 1, self.width)})
        if reading is not None:
            _given(reading, len(self.blocks))

    def restore(self) -> None:
        """There is nothing besides `reading`."""

    def _keys_values(self, block: nn.Module, tokens: Tensor) -> KeyValue:
        """Runs a block as far as its attention."""
        tokens = tokens.to(_like(block).dtype)
        forward = block.forward.args[2] if isinstance(block.forward, partial) else block.forward
        mode = _Attention(type(block).__name__, None)
        try:
            with mode:
                forward(tokens if self.batch_first else tokens.transpose(0, 1))
        except _Enough:
            assert mode.seen is not None
            return mode.seen
        except Inexact:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as needs:
            raise Inexact(f"{type(block).__name__}: does not run on the tokens of a prompt alone ({needs})") from needs
        raise Inexact(f"{type(block).__name__}: {_unreached(0)}")


_REENTRANT = "under torch.utils.checkpoint say use_reentrant=False, around blocks and not inside another checkpoint"


def _checkpointed() -> Any:
    """The run under `torch.utils.checkpoint` that is going on, the same object when backward repeats it; None: none is known.

    PyTorch says so nowhere but in the hooks by which a checkpoint keeps its tensors from being saved.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in () if hooks is None else inspect.unwrap(hooks[0]).__closure__ or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if isinstance(held, getattr(checkpoint, "_CheckpointFrame", ())):
            return held
    return None


def _same(x: Tensor) -> Tensor:
    return x


def _put_back(block: nn.Module, own: Any) -> None:
    del block.__dict__["forward"]
    if own is not None:
        block.forward = own  # type: ignore[method-assign]


def _unreached(calls: int) -> str:
    return (
        f"{calls} calls of scaled_dot_product_attention or nn.MultiheadAttention in it, not one; a switch such as timm's "
        "set_fused_attn may help"
    )


def _like(block: nn.Module) -> Tensor:
    return next(parameter for parameter in block.parameters() if parameter.dim() > 1)


def _width(block: nn.Module) -> int:
    norms = [part for part in block.modules() if isinstance(part, (nn.LayerNorm, nn.RMSNorm))]
    return norms[0].normalized_shape[-1] if norms else _like(block).shape[1]


def _stack(model: nn.Module, name: str | None, layers: int) -> tuple[str, list[nn.Module]]:
    """The list of blocks of that name, or the only list of so many blocks of one class."""
    if name is not None:
        found = {name: model.get_submodule(name)}
    else:
        lists = {n: part for n, part in model.named_modules() if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part)}
        found = {n: part for n, part in lists.items() if len(part) == layers and len({type(block) for block in part}) == 1}
    if len(found) != 1:
        raise bad("blocks", f"the name of the list of the {layers} blocks", f"{len(found)} lists: {', '.join(found) or 'none'}")
    ((name, part),) = found.items()
    blocks = list(part.children())
    if len(blocks) != layers:
        raise bad("prompt.layers", f"the {len(blocks)} blocks of {name}", layers)
    return name, blocks


def _given(reading: Reading, count: int) -> list[Given | None]:
    if isinstance(reading.prefix, Tokens):
        raise Inexact("fallback: tokens in every sample need a model of transformers")
    if len(reading.prefix) != count:
        raise bad("prefix", f"keys and values for each of the {count} blocks", len(reading.prefix))
    return [None if pair is None else Given(*pair, reading.index, reading.lengths, []) for pair in reading.prefix]


class _Attention(TorchFunctionMode):
    """Takes a block's attention: adds a prefix, or without one keeps the keys and values and stops the block."""

    def __init__(self, block: str, given: Given | None) -> None:
        super().__init__()
        self.block, self.given, self.calls = block, given, 0
        self.seen: KeyValue | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._dot_product(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dot_product(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        self.calls += 1
        if dropout_p:
            raise Inexact(f"{self.block}: dropout {dropout_p} on attention weights is active; put the frozen model in eval mode")
        if query.dim() != 4:
            raise Inexact(f"{self.block}: attention on {query.dim()} dimensions, not on [B, H, T, D]")
        if value.shape[-1] != key.shape[-1]:
            raise Inexact(f"{self.block}: keys of {key.shape[-1]} elements and values of {value.shape[-1]}")
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            raise Inexact(f"{self.block}: a {attn_mask.dtype} bias on its scores, which says nothing of a prefix")
        if self.given is None:
            self.seen = key, value
            raise _Enough
        if is_causal and query.shape[2] != key.shape[2]:
            raise Inexact(f"{self.block}: causal attention of {query.shape[2]} queries to {key.shape[2]} keys")
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        return attend(query, key, value, self.given, attn_mask, is_causal, scale)

    def _multi_head(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, weight: Tensor | None, bias: Tensor | None,
        bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout: float, out_weight: Tensor,
        out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
        static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """[T, B, E] as the original has it; no attention weights are made."""
        strange = use_separate_proj_weight or add_zero_attn or any(t is not None for t in (bias_k, static_k, static_v))
        if strange or query.dim() != 3 or weight is None:
            raise Inexact(f"{self.block}: nn.MultiheadAttention with kdim, vdim, add_bias_kv, add_zero_attn, or not batched")
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
        if key_padding_mask is not None:  # nn.MultiheadAttention has made it 0 and -inf
            hidden = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask.isneginf()
            if attn_mask is not None or is_causal:
                raise Inexact(f"{self.block}: a key_padding_mask besides another mask")
            attn_mask = hidden[:, None, None].logical_not()
        elif attn_mask is not None and attn_mask.is_floating_point() and is_causal:
            attn_mask = None
        if query is key and key is value:
            parts: Sequence[Tensor] = F.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            parts = [F.linear(*each) for each in zip((query, key, value), weight.chunk(3), biases, strict=True)]
        q, k, v = (part.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for part in parts)
        out = self._dot_product(q, k, v, attn_mask, dropout if training else 0.0, is_causal)
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None
