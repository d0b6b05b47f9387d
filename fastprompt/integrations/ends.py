"""Both ends of a model that somebody already has: a prompt on its input, a map of its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.functional.checks import bad
from fastprompt.nn import PrototypicalVerbalizer, SoftVerbalizer, Verbalizer
from fastprompt.nn._shared import Folded, folded


class Ends:
    """outputs(model(inputs(x))), with the model's own forward, by hooks.

    A map that is linear in the logits is folded into the head, and a verbalizer reads what the head reads: the head then
    computes T columns in place of S. A head that is not the last layer is refused when the model is called.
    """

    def __init__(self, model: nn.Module, inputs: Any, outputs: nn.Module | None, head: str | None) -> None:
        self.model, self.inputs, self.outputs, self.head = model, inputs, outputs, head
        self.on_hidden = isinstance(outputs, (Verbalizer, SoftVerbalizer, PrototypicalVerbalizer))
        if outputs is not None and not isinstance(outputs, nn.Module):
            raise TypeError(f"outputs: expected a torch.nn.Module, got {type(outputs).__name__}")
        if head is not None and (outputs is None or type(dict(model.named_modules()).get(head)) is not nn.Linear):
            raise bad("head", "the name of an nn.Linear in the model, for outputs", repr(head))
        if self.on_hidden and head is None:
            raise bad("head", f"the name of the vocabulary head, whose input {type(outputs).__name__} reads", None)
        self.folds = head is not None and not self.on_hidden and bool(getattr(outputs, "foldable", False))
        self._kept: Folded | None = None
        self._mapped = True

    @contextmanager
    def reading(self, index: Callable[[int], tuple[bool, Tensor | None]]) -> Iterator[None]:
        """Every call of the model; index says of a batch size whether it is prompted, and by which prompts."""
        given: list[Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given.clear()
            if module is not self.model:
                raise bad("model", "the one with the prompt; detach before copying", f"a copy of {type(module).__name__}")
            if self.outputs is not None and self._mapped and kwargs.get("labels") is not None:
                raise bad("labels", "None with outputs, whose loss is that of the mapped logits", "labels")
            if self.inputs is None:
                return None
            name = None
            if not (args and isinstance(args[0], Tensor)):
                names = [*inspect.signature(module.forward).parameters, *kwargs]
                name = next(each for each in names if isinstance(kwargs.get(each), Tensor))
            x = args[0] if name is None else kwargs[name]
            prompted, chosen = index(len(x))
            if not prompted:
                return None
            x = self.inputs(x) if chosen is None else self.inputs(x, chosen)
            return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            logits = getattr(out, "logits", out)
            if self.outputs is None or not self._mapped:
                return None
            if not isinstance(logits, Tensor):
                raise bad("outputs", "a model that returns logits, or an object with them", type(out).__name__)
            if given:
                if len(given) != 1 or given[0] is not logits:
                    raise bad("head", "the layer whose output the model returns as it is", repr(self.head))
                return None
            if self.on_hidden:
                raise bad("head", "a layer that the model calls", repr(self.head))
            logits = self.outputs(logits)
            if isinstance(out, Tensor):
                return logits
            out["logits"] = logits
            return out

        with ExitStack() as undo:
            undo.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(self.model.register_forward_hook(after).remove)
            if self.folds or self.on_hidden:
                undo.enter_context(self._in_the_head(given))
            yield

    @contextmanager
    def _in_the_head(self, given: list[Tensor]) -> Iterator[None]:
        layer: Any = self.model.get_submodule(str(self.head))
        own, original, outputs = layer.__dict__.get("forward"), layer.forward, self.outputs
        before = getattr(outputs, "_head", None)
        if before is not None or isinstance(outputs, Verbalizer):
            outputs.attach(layer)  # type: ignore[union-attr, operator]

        def forward(x: Tensor) -> Tensor:
            if not self._mapped or (self.folds and torch.compiler.is_compiling()):
                return original(x)  # type: ignore[no-any-return]
            if self.on_hidden:
                out: Tensor = outputs(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # type: ignore[misc]
            else:
                self._kept = folded(outputs, layer, self._kept)
                out = F.linear(x, *self._kept[2])
            given.append(out)
            return out

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward
            if own is not None:
                layer.forward = own
            if hasattr(outputs, "_head"):
                outputs._head = before  # type: ignore[union-attr, assignment]

    @contextmanager
    def unmapped(self) -> Iterator[None]:
        self._mapped = False
        try:
            yield
        finally:
            self._mapped = True

    def lines(self) -> list[str]:
        """For `print`."""
        said = [] if self.inputs is None else [f"input: through {type(self.inputs).__name__}, before {type(self.model).__name__}"]
        if self.outputs is not None:
            how = (
                f"in place of {self.head}" if self.on_hidden else f"folded into {self.head}" if self.folds else "behind the model"
            )
            said.append(f"output: {type(self.outputs).__name__}, {how}")
        return said
