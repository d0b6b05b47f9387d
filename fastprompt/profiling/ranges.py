"""Ranges around this package's functions and modules, which are there while a profile's steps are traced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastprompt import _runtime, functional, hoist
from fastprompt.integrations import calls, handle
from fastprompt.nn import attention, embedding, mapping, perturbation, trained_verbalizers, verbalizers
from fastprompt.profiling.results import FROZEN, HOST, MAPPING, PERTURBATION, PROMPTS, Op
from fastprompt.profiling.trace import FUNCTIONS, RANGE
from fastprompt.reprogram import Reprogrammed

if TYPE_CHECKING:
    from fastprompt.profiling.session import Session


class Ranges:
    """While entered: a range of the profiler around every function and module of this package; and what they were told."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parts: dict[int, str] = {}  # of modules, by id
        self.mapped: set[int] = set()  # ids of outputs that were applied to logits
        self.operations: dict[tuple[str, str, str], Op] = {}
        self.tracing = False
        self.open = threading.local()

    def __enter__(self) -> Ranges:
        self.undo = ExitStack()
        for model in [each.model for each in handle._attached.values()] + [self.session.module]:
            if model is not None:
                self.parts[id(model)] = FROZEN
        for name in FUNCTIONS:
            self._wrap(functional, name, f"fastprompt.{name}")
        for owner, name in ((handle.Attached, "_made"), (hoist.Wiring, "shallow"), (hoist.Wiring, "deep"), (calls.Calls, "deep")):
            self._wrap(owner, name, RANGE + PROMPTS)
        self.undo.enter_context(patched(Reprogrammed, "_run", self._run))
        self.undo.enter_context(patched(hoist.Wiring, "reading", self._reading))
        hooks = torch.nn.modules.module
        self.undo.callback(hooks.register_module_forward_pre_hook(self._before).remove)
        self.undo.callback(hooks.register_module_forward_hook(self._after, always_call=True).remove)
        self.watched, _runtime.watch = _runtime.watch, self._told
        return self

    def __exit__(self, *error: object) -> None:
        _runtime.watch = self.watched
        self.undo.close()

    def _wrap(self, owner: Any, name: str, title: str) -> None:
        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with record_function(title):
                return original(*args, **kwargs)

        self.undo.enter_context(patched(owner, name, run))

    def _run(self, original: Callable[..., Tensor], module: Reprogrammed, x: Tensor, index: Any, model: Any) -> Tensor:
        """`Reprogrammed._run`; given another model than its own, that is f up to its head and a head that maps."""
        for part, name in ((module.inputs, PERTURBATION), (module.model, FROZEN), (module.outputs, MAPPING)):
            if part is not None:
                self.parts[id(part)] = _part_of(part) or name
        with record_function(RANGE + (HOST if model is module.model else MAPPING)):
            return original(module, x, index, model)

    def _reading(self, original: Callable[..., Any], wiring: hoist.Wiring, source: Any) -> Any:
        self.parts[id(wiring.base)] = FROZEN
        return original(wiring, source)

    def _before(self, module: nn.Module, args: Any) -> None:
        stack = self.open.__dict__.setdefault("stack", [])
        part = self.parts.get(id(module)) or _part_of(module)
        if part is None or torch.compiler.is_compiling() or (stack and stack[-1][1] == part):
            return
        opened = record_function(RANGE + part)
        opened.__enter__()
        stack.append((module, part, opened))

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        stack = self.open.__dict__.setdefault("stack", [])
        if stack and stack[-1][0] is module and not torch.compiler.is_compiling():
            stack.pop()[2].__exit__(None, None, None)
            self.mapped.add(id(module))

    def _told(self, op: str, path: str, why: str, tensors: tuple[Tensor | None, ...], moved: int, flops: int) -> None:
        if self.watched is not None:
            self.watched(op, path, why, tensors, moved, flops)
        if self.tracing:
            known = self.operations.setdefault((op, path, why), Op(op, path, why))
            known.calls, known.moved, known.flops = known.calls + 1, known.moved + moved, known.flops + flops


@contextmanager
def patched(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """owner.name(...) is by(owner.name, ...), except where a compiler looks."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return by(original, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _part_of(module: nn.Module) -> str | None:
    """Of a module of this package, or a loss of PyTorch."""
    if isinstance(module, perturbation.InputPrompt):
        return PERTURBATION
    if isinstance(module, (mapping._Map, verbalizers.OnHead, trained_verbalizers.PrototypicalVerbalizer, nn.modules.loss._Loss)):
        return MAPPING
    prompts = (attention.PrefixKV, attention.DeepPrompt, attention.SoftPrompt, embedding.PromptTokens)
    others = (embedding.TrainableTokens, embedding.EmbeddingMap, embedding.PrototypeAttention)
    return PROMPTS if isinstance(module, prompts + others) else None
