"""`attach`: prompts in a model that somebody already has, without a subclass and without a change of its code.

handle = fastprompt.attach(model, fastprompt.nn.SoftPrompt(20, model.config.hidden_size))
loss = model(input_ids=ids, labels=labels).loss       # the model with the prompt
loss.backward()                                       # gradients of handle.parameters()
handle.detach()                                       # the model as it was
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastprompt.functional.checks import bad, check_labels, check_range
from fastprompt.hoist import Inexact, KeyValue, Reading, Tokens, Wiring
from fastprompt.integrations.calls import Calls
from fastprompt.integrations.ends import Ends
from fastprompt.nn import DeepPrompt, PrefixKV, SoftPrompt
from fastprompt.taxonomy import Location, Place

_INNER = (PrefixKV, DeepPrompt, SoftPrompt)
_attached: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()


def attach(
    model: nn.Module, prompt: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] = (), *,
    outputs: nn.Module | None = None, head: str | None = None, use: Any = 0, part: str | None = None,
    blocks: str | None = None, fallback: str | None = None, freeze: bool = True,
) -> Attached:  # fmt: skip
    """Puts prompts into a model: from now on `model(...)` and `model.generate(...)` run with one of them.

        out = softmax(scale * q [prompt's keys | keys]^T) [prompt's values | values]       in every block

    The prompt's keys and values are made once a call, whatever the batch (`fastprompt.hoist` says why that is exact). Masks
    and labels are those of the samples alone.

    Models of transformers are wired through their attention and mask interfaces. Other models (timm, torchvision, open_clip,
    your own) are wired at their blocks' calls of `scaled_dot_product_attention` or `nn.MultiheadAttention`, for `DeepPrompt`
    and `PrefixKV`; nothing moves their positions there. Gradient checkpointing of blocks is exact with
    `use_reentrant=False` and refused with True, which would lose the prompt's gradient.

    Left padding is nothing to a sample where the model is told positions that do not count it, as `generate` does; otherwise
    it lies between prompt and sample, as with tokens in front, for rotary positions and sliding windows alike.

    Args:
        model: frozen here, in eval mode, until `detach`. For gradient checkpointing call `model.train()` afterwards; dropout
            that is active then is refused.
        prompt: `PrefixKV` (prefix tuning, arXiv 2101.00190), `DeepPrompt` (VPT-deep, arXiv 2203.12119) or `SoftPrompt` (prompt
            tuning, arXiv 2104.08691); or several of one kind, in a list or by name. Prompts are numbered through. Besides, or
            alone, one prompt on the input, such as `PaddedPrompt`: what the model's first argument goes through.
        outputs: what reads the model's logits, such as `LabelMap`; the model then returns its scores, as a tensor or as
            `.logits`. A verbalizer reads hidden states, so it needs `head`.
        head: the name of the model's last layer, an nn.Linear whose output the model returns ("fc", "lm_head"): a map that is
            linear in the logits is folded into it, and a verbalizer stands in its place, at every position.
        use: the prompt in use at first, see `Attached.use`.
        part: name of the part of the model to attach to ("vision_model" of a CLIP). A model with an encoder and a decoder
            takes prompts at "encoder", "decoder" and, for its cross attention, "decoder.cross" (`PrefixKV`): one handle each
            (the first to freeze the model is the one whose `detach` thaws it).
            Under T5's bias by distance a decoder's prefix is what stands before the first token, as in a plain cache;
            in the encoder, and in cross attention, the prefix's columns have no bias.
        blocks: name of the list of blocks, for a model that is not of transformers and has several of that length.
        fallback: "tokens": where keys and values made once are not exact (a soft prompt in an encoder, deep prompts in the
            first blocks only), tokens in every sample of a model of transformers.
        freeze: False leaves gradients and mode as they are.

    Raises:
        Inexact (a ValueError): what cannot be done exactly, and why.
        ValueError, TypeError: a prompt that does not fit, a model that has one already.
    """
    return Attached(
        model, prompt, outputs=outputs, head=head, use=use, part=part, blocks=blocks, fallback=fallback, freeze=freeze
    )


class Attached:
    """What `attach` did: `print` says it, `detach` undoes it. One thread at a time runs the model; a copy of it is refused.

    Attributes:
        model: the model.
        prompts: the prompts by name; "0", "1", ... in the order of a list.
        outputs: what reads the model's logits.
    """

    def __init__(
        self, model: nn.Module, prompt: Any, *, outputs: nn.Module | None, head: str | None, use: Any, part: str | None,
        blocks: str | None, fallback: str | None, freeze: bool,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if fallback not in (None, "tokens"):
            raise bad("fallback", 'None or "tokens"', repr(fallback))
        self.model, self.prompts, self.fallback, self.reason = model, _by_name(prompt), fallback, ""
        inner = {name: each for name, each in self.prompts.items() if isinstance(each, _INNER)}
        inputs = [each for each in self.prompts.values() if not isinstance(each, _INNER)]
        if not inner and not inputs and outputs is None:
            raise bad("prompt, outputs", "at least one of them", "neither")
        self.outputs = outputs
        self._ends: Ends | None = None
        self._path: Any = None  # Wiring or Calls
        keys: list[nn.Module] = []
        if inner:
            self._path = _path(model, part, blocks, next(iter(inner.values())))
            keys.append(self._path.key)
        if inputs or outputs is not None:
            target = model if part is None else _part(model, part)
            self._ends = Ends(target, inputs[0] if inputs else None, outputs, head)
            keys.append(target)
        elif head is not None:
            raise bad("head", "None without outputs", repr(head))
        for key in keys:
            if key in _attached:
                other = "one with " + ", ".join(_attached[key]._kinds())
                raise bad("model", "one without a prompt; call detach() on its handle first, or attach a list of prompts", other)
        self._keys = keys
        self._rows: list[tuple[Any, int]] = []
        for name, each in inner.items():
            _check_fit(name, each, self._path)
        for each in inner.values() if inner else inputs:
            self._rows += [(each, row) for row in range(_count(each))]
        if inner and inputs and _count(inputs[0]) > 1:
            raise bad("prompt", "one prompt on the input besides those in the model", f"{_count(inputs[0])}")
        self._begun: WeakKeyDictionary[Any, tuple[Any, Reading | None]] = WeakKeyDictionary()
        self._hooks = ExitStack()
        self.use(use if self._rows else None)
        own = {id(parameter) for parameter in self.parameters()}
        self._modes = [(module, module.training) for module in model.modules()] if freeze else []
        self._trained = [p for p in model.parameters() if freeze and p.requires_grad and id(p) not in own]
        try:
            if freeze:
                model.eval()
            for parameter in self._trained:
                parameter.requires_grad_(False)
            self._wire()
            with torch.no_grad():
                self._try()
        except BaseException:
            self.detach()
            raise
        _attached.update(dict.fromkeys(self._keys, self))

    def _wire(self) -> None:
        if self._path is not None:
            self._hooks.enter_context(self._path.reading(self._read))
        if self._ends is not None:
            self._hooks.enter_context(self._ends.reading(self._chosen))

    def _kinds(self) -> list[str]:
        parts = [*self.prompts.values(), *([] if self.outputs is None else [self.outputs])]
        return [type(each).__name__ for each in parts]

    # ---- What users call ----

    def use(self, choice: Any) -> Attached:
        """Chooses the prompt of all samples (a number or a name; None: no prompt), or each sample's own.

        Each sample's own: int64 [B], -1 for none, or a list of numbers and names, None for none; packed sequences with
        `cu_seq_lens_q` are a sample each. It holds until the next `use`. In `generate`, beams and repeated sequences take
        their sample's. A prompt on the input is chosen so where it is the only one; otherwise it goes with any other.
        """
        index = None
        if isinstance(choice, Tensor):
            check_labels("use", choice, None)
            check_range("use", choice, len(self._rows), ignored=-1)
            used, index = torch.unique(choice, return_inverse=True)
            used = used.tolist()
            if used and used[0] == -1:
                used, index = used[1:], index - 1
        elif isinstance(choice, (list, tuple)):
            return self.use(torch.tensor([-1 if each is None else self._number(each) for each in choice], dtype=torch.int64))
        else:
            used = [] if choice is None else [self._number(choice)]
        self._used: list[int] = used
        self._choice = object()
        if self._path is None and index is not None and len(index) and not bool((index >= 0).all()):
            raise bad("use", "a prompt on the input for each sample", "None for some")
        device = next(self.parameters()).device if used else None
        self._index = None if index is None or not used else index.to(device)
        self._numbers = torch.tensor([self._rows[row][1] for row in used], dtype=torch.int64, device=device)
        lengths = [self._rows[row][0].length for row in used if self._path is not None]
        self._lengths = torch.tensor(lengths, device=device) if len(set(lengths)) > 1 else None
        return self

    def _number(self, choice: Any) -> int:
        if isinstance(choice, str):
            if choice not in self.prompts:
                raise bad("use", "one of " + ", ".join(self.prompts), repr(choice))
            if not any(module is self.prompts[choice] for module, _ in self._rows):
                raise bad("use", "a prompt in the model, with which the one on the input goes", repr(choice))
            rows = [number for number, (module, _) in enumerate(self._rows) if module is self.prompts[choice]]
            if len(rows) > 1:
                raise bad("use", f"a number from {rows[0]} to {rows[-1]}, because {choice} has several prompts", repr(choice))
            return rows[0]
        if isinstance(choice, bool) or not isinstance(choice, int):
            raise TypeError(f"use: expected a number, a name, a list of them, int64 [B] or None, got {type(choice).__name__}")
        if not -1 <= choice < len(self._rows) or choice == -1:
            raise bad("use", f"a number from 0 to {len(self._rows) - 1}", choice)
        return choice

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model without a prompt, wires and all."""
        self._hooks.close()
        try:
            yield self.model
        finally:
            self._wire()

    def source_logits(self, *args: Any, **kwargs: Any) -> Any:
        """What the model with its prompt returns where `outputs` does not map it: for counting, as `LabelMap.count` does."""
        if self._ends is None:
            return self.model(*args, **kwargs)
        with self._ends.unmapped():
            return self.model(*args, **kwargs)

    def detach(self) -> nn.Module:
        """The very same model again: hooks, configuration, gradients and mode are those before `attach`."""
        self._hooks.close()
        if self._path is not None:
            self._path.restore()
        for key in self._keys:
            if _attached.get(key) is self:
                del _attached[key]
        for module, mode in self._modes:
            module.training = mode
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._modes, self._trained = [], []
        return self.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer should get."""
        parts = [*self.prompts.values(), *([] if self.outputs is None else [self.outputs])]
        return iter([parameter for module in parts for parameter in module.parameters()])

    def __repr__(self) -> str:
        held = [f"{name}: {type(each).__name__}({each.extra_repr()})" for name, each in self.prompts.items()]
        lines = [f"{type(self.model).__name__} with {', '.join(held) or self._kinds()[0]}"]
        lines += [] if self._ends is None else self._ends.lines()
        lines += [] if self._path is None else self._path_lines(self._path)
        used = ", ".join(map(str, self._used)) or "nothing"
        lines.append(f"in use: {used}{'' if self._index is None else ', each sample its own'}")
        return "\n  ".join(lines)

    def _path_lines(self, path: Wiring | Calls) -> list[str]:
        blocks, prompt = path.blocks, self._rows[0][0]
        cross = ", cross attention" if getattr(path, "to_cross", False) else ""
        lines = [f"layers: {len(blocks)} {type(blocks[0]).__name__}{cross}"]
        if isinstance(path, Wiring):
            lines.append("path: the attention and mask interfaces of transformers, fastprompt.functional.prefix_attention")
        else:
            lines.append(f"path: calls of PyTorch's attention in {path.name}, fastprompt.functional.prefix_attention")
        if isinstance(prompt, PrefixKV):
            lines.append("hoisted: nothing to hoist, keys and values are trained themselves")
        elif self.reason:
            lines.append(f"hoisted: nothing, tokens are in every sample, because {self.reason}")
        else:
            lines.append("hoisted: the prompt's keys and values, made once a call for the batch")
        if getattr(path, "biased", False):
            lines.append("not fused: scores have a bias by distance, so the prompt is copied in front of each sample's keys")
        windows = getattr(path, "windows", None) or []
        far = [place for place, window in enumerate(windows) if window]
        if far:
            lines.append(f"not fused: layers {far} see {windows[far[0]]} tokens back; behind that, a prompt is copied and masked")
        return lines

    # ---- What the wires call ----

    def _chosen(self, batch: int) -> tuple[bool, Tensor | None]:
        """Whether a prompt on the input is in use, and each sample's where it has several."""
        if not self._used:
            return False, None
        module = self._rows[0][0]
        if isinstance(module, _INNER) or _count(module) == 1:
            return True, None
        if self._index is None:
            return True, self._numbers.expand(batch)
        if len(self._index) != batch:
            raise bad("use", f"one prompt for each of the {batch} samples", len(self._index))
        return True, self._numbers[self._index]

    def _read(self, kwargs: dict[str, Any]) -> Reading | None:
        """What a call reads. A cache goes on with the prompt that it was begun with."""
        cache = kwargs.get("past_key_values")
        if cache is None or torch.compiler.is_compiling():
            return self._made(kwargs)
        state = self._choice, [parameter._version for parameter in self.parameters()], torch.is_grad_enabled()
        begun = self._begun.get(cache)
        rows = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        # Asking a static cache how full it is costs a sync on a GPU.
        if begun is not None and ((begun[0] == state and rows.shape[1] == 1) or bool(cache.get_seq_length())):
            return begun[1]
        reading = self._made(kwargs)
        self._begun[cache] = state, reading
        return reading

    def _made(self, kwargs: dict[str, Any]) -> Reading | None:
        if not self._used:
            return None
        batch = next(len(value) for value in kwargs.values() if isinstance(value, Tensor))
        if kwargs.get("cu_seq_lens_q") is not None:
            batch = len(kwargs["cu_seq_lens_q"]) - 1
        index = self._index
        if index is not None and len(index) != batch:
            if batch % len(index) or kwargs.get("past_key_values") is None:
                raise bad("use", f"one prompt for each of the {batch} samples", len(index))
            index = index.repeat_interleave(batch // len(index))
        modules = [self._rows[row] for row in self._used]
        if isinstance(modules[0][0], PrefixKV):
            return Reading(_side_by_side(modules), index, self._lengths)
        try:
            if isinstance(modules[0][0], SoftPrompt):
                whole = _joined([module()[row : row + 1] for module, row in modules])
                return Reading(self._path.shallow(whole)[0], index, self._lengths)
            return Reading(self._path.deep(_layers(modules, batch)), index, self._lengths)
        except Inexact as reason:
            if self.fallback is None:
                raise
            self.reason = str(reason)
            return Reading(self._tokens(modules, index, batch))

    def _tokens(self, modules: Sequence[tuple[Any, int]], index: Tensor | None, batch: int) -> Tokens:
        if self._lengths is not None:
            raise Inexact("use: prompts of several lengths in a batch cannot be tokens of every sample")
        if isinstance(modules[0][0], SoftPrompt):
            whole = _joined([module()[row : row + 1] for module, row in modules])
            if index is not None:
                check_range("use", index, len(modules))
                whole = whole[index]
            return Tokens(whole)
        layers = _layers(modules, batch)
        return Tokens(None, layers if index is None else [None if tokens is None else tokens[index] for tokens in layers])

    def _try(self) -> None:
        """One run of each prompt, so that what is not exact is refused now."""
        if self._path is None:
            return
        before = self._used, self._index, self._numbers, self._lengths, self._choice
        try:
            for number in range(len(self._rows)):
                self.use(number)
                self._path.run(self._made)
        finally:
            self._used, self._index, self._numbers, self._lengths, self._choice = before


def _by_name(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        prompts = dict(prompt)
    else:
        prompts = {str(place): each for place, each in enumerate(prompt if isinstance(prompt, (list, tuple)) else [prompt])}
    kinds = {type(each).__name__ for each in prompts.values()}
    inputs = [each for each in prompts.values() if _on_input(each)]
    if not all(isinstance(each, _INNER) or _on_input(each) for each in prompts.values()):
        wanted = "PrefixKV, DeepPrompt, SoftPrompt, or a prompt on the input such as PaddedPrompt"
        raise TypeError(f"prompt: expected {wanted}, got {', '.join(sorted(kinds))}")
    if len(kinds) - len(inputs[:1]) > 1 or len(inputs) > 1:
        raise bad("prompt", "prompts of one kind in the model, and one on its input", " and ".join(sorted(kinds)))
    return prompts


def _on_input(prompt: Any) -> bool:
    place = getattr(prompt, "taxonomy", None)
    return isinstance(place, Place) and place.location is Location.RAW


def _path(model: nn.Module, part: str | None, blocks: str | None, prompt: Any) -> Wiring | Calls:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        PreTrainedModel = ()  # type: ignore[assignment, misc]
    cross = part is not None and part.endswith(".cross")
    target = model if part is None else _part(model, part.removesuffix(".cross"))
    if cross and not (isinstance(target, PreTrainedModel) and isinstance(prompt, PrefixKV)):
        raise bad("part", "a decoder of transformers for .cross, and PrefixKV", f"{part!r} and {type(prompt).__name__}")
    if isinstance(target, PreTrainedModel):
        if blocks is not None:
            raise bad("blocks", "None for a model of transformers, whose blocks are known", repr(blocks))
        return Wiring(target, cross)
    if isinstance(prompt, SoftPrompt):
        raise Inexact(f"{type(target).__name__}: not a model of transformers, whose embeddings a soft prompt could join")
    return Calls(target, blocks, prompt.layers)


def _part(model: Any, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)  # type: ignore[no-any-return]
    except AttributeError as missing:
        if name in ("encoder", "decoder") and hasattr(model, f"get_{name}"):
            return getattr(model, f"get_{name}")()  # type: ignore[no-any-return]
        raise bad("part", f"the name of a part of {type(model).__name__}", repr(name)) from missing


def _check_fit(name: str, prompt: Any, path: Wiring | Calls) -> None:
    def check(argument: str, wanted: int | None) -> None:
        if wanted is not None and getattr(prompt, argument) != wanted:
            raise bad(f"prompt {name}", f"{argument}={wanted} for {type(path.model).__name__}", getattr(prompt, argument))

    if not isinstance(prompt, SoftPrompt):
        check("layers", len(path.blocks))
    if isinstance(prompt, PrefixKV):
        check("kv_heads", path.kv_heads)
        check("head_dim", path.head_dim)
    else:
        check("width", path.width)


def _count(prompt: Any) -> int:
    return getattr(prompt, "prompts", 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[n, ..., P, width] of n tensors [1, ..., P', width], filled up with zeros."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts])


def _side_by_side(modules: Sequence[tuple[Any, int]]) -> list[KeyValue]:
    made = {id(module): module() for module, _ in modules}
    rows = [[(k[row : row + 1], v[row : row + 1]) for k, v in made[id(module)]] for module, row in modules]
    return [(_joined([k for k, _ in layer]), _joined([v for _, v in layer])) for layer in zip(*rows, strict=True)]


def _layers(modules: Sequence[tuple[Any, int]], batch: int) -> list[Tensor | None]:
    made = [module(batch) for module, _ in modules]
    layers: list[Tensor | None] = []
    for place, tokens in enumerate(zip(*made, strict=True)):
        given = [each for each in tokens if each is not None]
        if given and len(given) < len(tokens):
            raise Inexact(f"use: block {place} has a prompt of some of the prompts in use, and not of others")
        layers.append(_joined(given) if given else None)
    return layers
