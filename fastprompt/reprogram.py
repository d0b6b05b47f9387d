"""A frozen model, repurposed: y_hat = O(f(I(x))).

reprogrammed = Reprogrammed(model, inputs=PaddedPrompt(224, 32, ...), outputs=LabelMap(1000, 10))
logits = reprogrammed(images)
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import checkpoint
from fastprompt import nn as modules
from fastprompt.checkpoint import CheckpointError
from fastprompt.functional import Rows
from fastprompt.nn._shared import Folded, folded
from fastprompt.taxonomy import Alignment, Place


class _HeadReached(Exception):
    """Ends a forward of f at its head."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("f has reached its head")
        self.features = features


class Reprogrammed(nn.Module):
    """Freezes f, puts `inputs` in front of it and `outputs` behind it.

    The model stays in eval mode and without gradients whatever `train()` says; only the prompt, and what the alignment
    trains, is in `trainable_parameters()` and in `state_dict()`. Nothing is cached between calls but the folded head.

    With `head`, a map that is linear in the logits (a `LabelMap` of logits, a `BayesianMap`, ...) is folded into that layer
    (`map.fold`), so that T columns are computed in place of S: the same numbers up to rounding. f is not changed, it stops at
    its head; `source_logits`, which counting reads, runs all of it. The folded head is made again when the map or the head
    has changed or moved. Under torch.compile the map is applied behind f.

    Args:
        model: f, from the model input [B, C, H, W] to logits [B, S] (or an object with `.logits`). It is frozen in place.
        inputs: a module from the data to the model input, such as `PaddedPrompt`; None passes the data on.
        outputs: a module from source logits to target logits, such as `LabelMap`; None reads f's outputs as they are.
        head: the name of f's last layer, an nn.Linear whose output f returns, such as "fc".
    """

    def __init__(
        self, model: nn.Module, inputs: nn.Module | None = None, outputs: nn.Module | None = None, *, head: str | None = None
    ) -> None:
        super().__init__()
        for name, part in (("model", model), ("inputs", inputs), ("outputs", outputs)):
            if not (isinstance(part, nn.Module) or (part is None and name != "model")):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(part).__name__}")
        self.model = model.requires_grad_(False).eval()
        self.inputs, self.outputs, self.head = inputs, outputs, head
        self._folded: Folded | None = None
        self._head_is_last = False  # not seen yet
        if head is not None and type(layer := dict(model.named_modules()).get(head)) is not nn.Linear:
            raise ValueError(f"head: expected the name of an nn.Linear in the model, got {head!r}, {type(layer).__name__}")
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_forgive_frozen)

    def train(self, mode: bool = True) -> Reprogrammed:
        super().train(mode)
        self.model.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer should get."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_frozen(self) -> None:
        """Raises when f could change: a parameter that asks for a gradient, or a part in training mode."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                raise RuntimeError(f"model.{name}: expected a frozen parameter, got requires_grad=True")
        for name, part in self.model.named_modules():
            if part.training:
                raise RuntimeError(f"model.{name}: expected eval mode, got training mode")

    @property
    def taxonomy(self) -> Place:
        """Where this composition lies; the outputs of f as they are mean identity alignment."""
        place = Place()
        for part in (self.inputs, self.outputs):
            place = place | getattr(part, "taxonomy", Place())
        return place if self.outputs is not None else place | Place(alignment=Alignment.IDENTITY)

    def source_logits(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        """f(I(x)): [B, S], or [K, B, S] when K prompts are applied to every sample."""
        return self._run(x, index, self.model)

    def _run(self, x: Any, index: Tensor | None, model: Callable[[Tensor], Any]) -> Tensor:
        if isinstance(x, Rows) and not getattr(self.inputs, "takes_rows", False):
            x = x.gather()
        if self.inputs is not None:
            x = self.inputs(x) if index is None else self.inputs(x, index)
        lead = x.shape[:-3] if x.dim() == 5 else None
        out = model(x if lead is None else x.flatten(0, 1))
        out = getattr(out, "logits", out)
        return out if lead is None else out.unflatten(0, lead)

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        """O(f(I(x))), x a batch or `Rows` of a set; index int64 [B] chooses each sample's prompt where `inputs` has several."""
        if self.head is not None and getattr(self.outputs, "foldable", False) and not torch.compiler.is_compiling():
            weight, bias = self._folded_head(self.model.get_submodule(self.head))
            return self._run(x, index, lambda x: nn.functional.linear(self._features(x), weight, bias))
        out = self.source_logits(x, index)
        return out if self.outputs is None else self.outputs(out)

    def _features(self, x: Tensor) -> Tensor:
        """What f's head reads. f stops there; the first time it runs on, to see that it returns what the head gives."""
        given: list[tuple[Tensor, Tensor]] = []
        thread = threading.get_ident()  # another thread that shares f is left alone

        def stop(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                raise _HeadReached(arguments[0])

        def watch(layer: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            if threading.get_ident() == thread:
                given.append((arguments[0], out))

        head = self.model.get_submodule(str(self.head))
        hook = head.register_forward_pre_hook(stop) if self._head_is_last else head.register_forward_hook(watch)
        try:
            out = self.model(x)
        except _HeadReached as reached:
            return reached.features
        finally:
            hook.remove()
        if len(given) != 1 or given[0][1] is not getattr(out, "logits", out):
            raise ValueError(f"head: expected the layer whose output f returns as it is, got {self.head!r}")
        self._head_is_last = True
        return given[0][0]

    def _folded_head(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """f's head with the map inside."""
        self._folded = folded(self.outputs, layer, self._folded)
        return self._folded[2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": None}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `fastprompt_config.json` and `fastprompt.safetensors`; a checkpoint already there survives a failure."""
        checkpoint.save(folder, self.state_dict(), self.config())

    def config(self) -> dict[str, Any]:
        """The composition as data: classes of `fastprompt.nn` by name with their arguments."""
        held = {"inputs": _describe(self.inputs), "outputs": _describe(self.outputs)}
        return held if self.head is None else held | {"head": self.head}

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], model: nn.Module, inputs: nn.Module | None = None,
        outputs: nn.Module | None = None,
    ) -> Reprogrammed:  # fmt: skip
        """Rebuilds what `save_pretrained` wrote, around the frozen model.

        Modules that are not fastprompt's own (a generator, a mask network of yours) are code and not in the file: build
        them and pass `inputs` or `outputs`; their tensors are loaded.

        Raises:
            CheckpointError: a damaged or hostile file, or tensors that do not fit.
        """
        tensors, config = checkpoint.load(folder, allowed={"format", "inputs", "outputs", "head"})
        if inputs is None:
            inputs = _build("inputs", config.get("inputs"), tensors)
        if outputs is None:
            outputs = _build("outputs", config.get("outputs"), tensors)
        made = cls(model, inputs, outputs, head=config.get("head"))
        checkpoint.check_match(tensors, made.state_dict())
        made.load_state_dict(tensors)
        return made


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + "model.")]:
        del state[name]


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    # A wrapper may have put its own prefix in front of "model.".
    frozen = tuple(f"model.{name}" for name in module.model.state_dict())  # type: ignore[union-attr, operator]
    keys.missing_keys[:] = [
        name for name in keys.missing_keys if not name.endswith(frozen) or "inputs." in name or "outputs." in name
    ]


def _describe(part: nn.Module | None) -> dict[str, Any] | None:
    if part is None:
        return None
    name = type(part).__name__
    if getattr(modules, name, None) is not type(part):
        return {"class": "?", "arguments": {}}
    return {"class": name, "arguments": part.config()}  # type: ignore[operator]


def _build(role: str, described: Any, tensors: dict[str, Tensor]) -> nn.Module | None:
    """A module of `fastprompt.nn` from its description: a closed list of names, and only arguments that it takes."""
    if described is None:
        return None
    if not isinstance(described, dict) or set(described) != {"class", "arguments"}:
        raise CheckpointError(f"config {role}: expected class and arguments, got {described!r}")
    name, arguments = described["class"], described["arguments"]
    if name == "?" or (isinstance(arguments, dict) and "?" in arguments.values()):
        raise CheckpointError(f"config {role}: made of code that is not in the file; build it and pass {role}=...")
    kinds = {
        key: kind for key in modules.__all__ if isinstance(kind := getattr(modules, key), type) and issubclass(kind, nn.Module)
    }
    if name not in kinds:
        raise CheckpointError(f"config {role}: expected one of {', '.join(kinds)}, got {name!r}")
    kind = kinds[name]
    if not isinstance(arguments, dict):
        raise CheckpointError(f"config {role}.arguments: expected a table, got {arguments!r}")
    known = {key for base in kind.__mro__ if base is not nn.Module for key in inspect.signature(base).parameters}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise CheckpointError(f"config {role}.arguments: unknown for {name}: {', '.join(unknown)}")
    if f"{role}.mask" in tensors:
        arguments = arguments | {"mask": tensors[f"{role}.mask"]}
    try:
        built: nn.Module = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config {role}.arguments: {error}") from error
    return built
