"""A frozen model, repurposed: y_hat = O(f(I(x))).

reprogrammed = Reprogrammed(model, inputs=PaddedPrompt(224, 32, ...), outputs=LabelMap(1000, 10))
logits = reprogrammed(images)
"""

from __future__ import annotations

import inspect
import os
from typing import Any

from torch import Tensor, nn

from fastprompt import checkpoint
from fastprompt import nn as modules
from fastprompt.checkpoint import CheckpointError
from fastprompt.taxonomy import Alignment, Place


class Reprogrammed(nn.Module):
    """Freezes f, puts `inputs` in front of it and `outputs` behind it.

    The model stays in eval mode and without gradients whatever `train()` says; only the prompt, and what the alignment
    trains, is in `trainable_parameters()` and in `state_dict()`. Nothing is cached between calls.

    Args:
        model: f, from the model input [B, C, H, W] to logits [B, S] (or an object with `.logits`). It is frozen in place.
        inputs: a module from the data to the model input, such as `PaddedPrompt`; None passes the data on.
        outputs: a module from source logits to target logits, such as `LabelMap`; None reads f's outputs as they are.
    """

    def __init__(self, model: nn.Module, inputs: nn.Module | None = None, outputs: nn.Module | None = None) -> None:
        super().__init__()
        for name, part in (("model", model), ("inputs", inputs), ("outputs", outputs)):
            if not (isinstance(part, nn.Module) or (part is None and name != "model")):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(part).__name__}")
        self.model = model.requires_grad_(False).eval()
        self.inputs, self.outputs = inputs, outputs
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

    def source_logits(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """f(I(x)): [B, S], or [K, B, S] when K prompts are applied to every sample."""
        if self.inputs is not None:
            x = self.inputs(x) if index is None else self.inputs(x, index)
        lead = x.shape[:-3] if x.dim() == 5 else None
        out = self.model(x if lead is None else x.flatten(0, 1))
        out = getattr(out, "logits", out)
        return out if lead is None else out.unflatten(0, lead)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """O(f(I(x))); index int64 [B] chooses each sample's prompt where `inputs` has several."""
        out = self.source_logits(x, index)
        return out if self.outputs is None else self.outputs(out)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `fastprompt_config.json` and `fastprompt.safetensors`; a checkpoint already there survives a failure."""
        checkpoint.save(folder, self.state_dict(), self.config())

    def config(self) -> dict[str, Any]:
        """The composition as data: classes of `fastprompt.nn` by name with their arguments."""
        return {"inputs": _describe(self.inputs), "outputs": _describe(self.outputs)}

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
        tensors, config = checkpoint.load(folder, allowed={"format", "inputs", "outputs"})
        if inputs is None:
            inputs = _build("inputs", config.get("inputs"), tensors)
        if outputs is None:
            outputs = _build("outputs", config.get("outputs"), tensors)
        made = cls(model, inputs, outputs)
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
    if name not in modules.__all__:
        raise CheckpointError(f"config {role}: expected one of {', '.join(modules.__all__)}, got {name!r}")
    kind = getattr(modules, name)
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
