"""The steps of a profile: how they are seen, timed in turns with the bare frozen model, and traced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, record_function

from fastprompt.functional.checks import bad
from fastprompt.integrations import handle
from fastprompt.profiling.numbers import finish
from fastprompt.profiling.ranges import Ranges, patched
from fastprompt.profiling.results import FROZEN, Profile
from fastprompt.profiling.trace import MARK, TRACED
from fastprompt.reprogram import Reprogrammed

_BLOCK = {"cuda": 4}  # timed steps between two waits for the device, so that the host may run ahead as it does without us


@dataclass
class Call:
    """A call of a frozen model as a step made it. raw: what the reprogrammed model was given."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    amp: torch.dtype | None
    attached: handle.Attached | None = None
    owner: Reprogrammed | None = None
    raw: Any = None


class TooFewSteps(RuntimeError):
    """A script or a `with` block has ended before its steps were measured."""


class Done(BaseException):
    """Ends a script whose steps are measured."""


class Session(AbstractContextManager["Session"]):
    """What runs the steps of a profile: `plan` goes on by one step whenever one ends.

    hooked: steps are seen from outside (a script, a `with` block). After the block `result` is there.
    """

    result: Profile

    def __init__(
        self, samples: float | None, tokens: float | None, steps: int, warmup: int, frozen: Any, out: Any, hooked: bool = True,
        stop: bool = False,
    ) -> None:  # fmt: skip
        for name, count in (("steps", steps), ("warmup", warmup)):
            if not isinstance(count, int) or count < 1:
                raise bad(name, "at least 1", count)
        for name, amount in (("samples", samples), ("tokens", tokens)):
            if amount is not None and not amount > 0:
                raise bad(name, "a positive number a step, or None", amount)
        if frozen is not None and not callable(frozen):
            raise TypeError(f"frozen: expected the frozen nn.Module or a function that runs it, got {type(frozen).__name__}")
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
        self.samples, self.tokens, self.steps, self.warmup, self.out = samples, tokens, steps, warmup, out
        self.module = frozen if isinstance(frozen, nn.Module) else None
        self.function = None if isinstance(frozen, nn.Module) else frozen
        self.hooked, self.stop = hooked, stop
        self.thread = threading.get_ident()

    # ---- Where steps end ----

    def __enter__(self) -> Session:
        self.plan = self._plan()
        self.undo = ExitStack()
        self.undo.callback(register_optimizer_step_post_hook(self._stepped).remove)
        self.undo.enter_context(patched(Reprogrammed, "_run", self._run))
        self.undo.enter_context(patched(handle.Attached, "__init__", self._attach))
        for each in list(handle._attached.values()):
            self._watch(each.model, each)
        if self.module is not None:
            self._watch(self.module, None)
        self._restart("inference")
        return self

    def _restart(self, kind: str) -> None:
        self.plan.close()
        self.kind, self.ended = kind, False
        self.optimizers: list[torch.optim.Optimizer] = []
        self.plan = self._plan()
        self.done = -1
        self.inside = self.called = self.extra = self.capturing = self.backward = False
        self.calls: list[Call] = []
        self.counted = [0.0, 0.0]  # samples, tokens
        if self.hooked:
            self.advance()

    def advance(self) -> bool:
        """One step has ended, if one has begun; False: it was the last one."""
        self.done += 1
        self.called = False
        if next(self.plan, Done) is not Done:
            return True
        self.ended = True
        if self.stop and self.kind == "training":
            raise Done
        return False

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None and self.hooked and not self.ended and self.kind == "inference" and self.called:
            self.advance()
        self.plan.close()
        self.undo.close()
        if kind is not None and not issubclass(kind, Done):
            return False
        if not self.ended:
            wanted = self.warmup + self.steps + TRACED + 3
            raise TooFewSteps(
                f"steps: expected {wanted} steps (warmup {self.warmup}, timed {self.steps}, traced {TRACED + 3}), "
                f"got {max(self.done, 0)}; ask for fewer, or run more"
            )
        finish(self)
        return kind is not None

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread or (self.ended and self.kind == "training"):
            return
        first = self.hooked and self.kind == "inference" and self.done > 0  # steps of inference came before
        if first:
            self._restart("training")
        self.kind = "training"
        if not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)
        if self.hooked and not first and optimizer is self.optimizers[0]:
            self.advance()

    def _run(self, original: Callable[..., Tensor], module: Reprogrammed, x: Tensor, index: Any, model: Any) -> Tensor:
        if self.inside or threading.get_ident() != self.thread:
            return original(module, x, index, model)
        self._root((x,), {})
        self.inside = True
        undo = ExitStack()
        if self.capturing:

            def capture(called: nn.Module, args: Any, kwargs: Any) -> None:
                self._keep(Call(called, args, kwargs, *_mode(x), owner=module, raw=x))

            undo.callback(module.model.register_forward_pre_hook(capture, with_kwargs=True).remove)
        try:
            with undo:
                out = original(module, x, index, model)
        finally:
            self.inside = False
        self._see_backward(out)
        return out

    def _attach(self, original: Callable[..., None], attached: handle.Attached, *args: Any, **kwargs: Any) -> None:
        original(attached, *args, **kwargs)
        self._watch(attached.model, attached)

    def _watch(self, model: nn.Module, attached: handle.Attached | None) -> None:
        def before(called: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling() or self.inside or threading.get_ident() != self.thread:
                return
            if attached is not None and getattr(attached._path, "busy", False):  # the run that hoists its prompt
                return
            self._root(args, kwargs)
            if self.capturing:
                self._keep(Call(called, args, kwargs, *_mode(next(model.parameters(), torch.empty(0))), attached=attached))

        def after(called: nn.Module, args: Any, out: Any) -> None:
            self._see_backward(out)

        self.undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self.undo.callback(model.register_forward_hook(after).remove)

    def _root(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """The outermost model is called."""
        if self.kind == "training" and not torch.is_grad_enabled():
            self.extra = True
            return
        if self.hooked and not self.ended and self.called and not torch.is_grad_enabled():
            self.advance()
        self.called = True
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        if given:
            self.counted[0] += len(given[0])
            ids = kwargs.get("input_ids", given[0])
            if ids is not None and ids.dtype == torch.int64 and ids.dim() == 2:
                self.counted[1] += ids.numel()

    def _keep(self, call: Call) -> None:
        call.args = tuple(t.detach() if isinstance(t, Tensor) else t for t in call.args)
        call.kwargs = {name: t.detach() if isinstance(t, Tensor) else t for name, t in call.kwargs.items()}
        self.calls.append(call)

    def _see_backward(self, out: Any) -> None:
        if not self.capturing or not torch.is_grad_enabled():
            return

        def seen(g: Tensor) -> None:
            self.backward = True

        for t in (out, getattr(out, "loss", None), getattr(out, "logits", None)):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(seen)

    # ---- What is done with them ----

    def _plan(self) -> Generator[None, None, None]:
        """One step runs at every `yield`."""
        for _ in range(self.warmup - 1):
            yield
        self.capturing, self.extra = True, False
        with Ranges(self) as seen:
            yield
        self.capturing, allowed = False, self.extra
        if self.backward:
            self.calls = [call for call in self.calls if call.grad]
        self.device = self._find_device()
        for model in {id(call.model): call.model for call in self.calls}.values():
            seen.parts[id(model)] = FROZEN
        self.seconds: list[float] = []
        self.frozen_seconds: list[float] = []
        self.no_overhead = "" if self.calls or self.function else "the frozen model is not known; pass frozen="
        self.counted = [0.0, 0.0]
        timed = 0
        while timed < self.steps:
            block = min(_BLOCK.get(self.device.type, 1), self.steps - timed)
            self._wait()
            before, self.extra = list(self.counted), False
            start = time.perf_counter()
            for _ in range(block):
                yield
            self._wait()
            spent = (time.perf_counter() - start) / block
            if self.extra and not allowed:  # an evaluation between two training steps
                self.counted = before
                continue
            timed += block
            self.seconds += [spent] * block
            self._time_frozen(block)
        self.amounts = [each / timed for each in self.counted]
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        with Ranges(self) as self.ranges:
            self.ranges.parts |= seen.parts
            yield  # compiled code and the caches, with the ranges there
            for _ in range(3):
                self.extra = False
                self.ranges.operations.clear()
                with torch.profiler.profile(activities=activities) as self.trace:
                    self._mark()
                    self.ranges.tracing = True
                    for _ in range(TRACED):
                        yield
                        self._mark()
                    self.ranges.tracing = False
                whole = allowed or not self.extra
                yield  # what is open now has to close before the next profiler starts, which would write to this one's memory
                if whole:
                    break
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            with torch.profiler.profile(
                activities=activities[:1], profile_memory=True, record_shapes=True, with_flops=True
            ) as self.memory:
                yield
            self._wait()
        self.highest = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _find_device(self) -> torch.device:
        tensors = [t for call in self.calls for t in call.model.parameters()]
        tensors += [t for optimizer in self.optimizers for group in optimizer.param_groups for t in group["params"]]
        if tensors:
            return tensors[0].device
        return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> None:
        self._wait()
        with record_function(MARK):
            pass

    def _time_frozen(self, count: int) -> None:
        if self.no_overhead:
            return
        try:
            for _ in range(count):
                self.frozen_seconds.append(sum(self._replay(call) for call in self.calls) if not self.function else self._bare())
        except Exception as error:  # a frozen model that cannot run alone costs the comparison, not the profile
            self.no_overhead = f"the frozen model did not run alone: {type(error).__name__}: {error}"

    def _bare(self) -> float:
        self._wait()
        start = time.perf_counter()
        assert self.function is not None
        self.function()
        self._wait()
        return time.perf_counter() - start

    def _replay(self, call: Call) -> float:
        """Seconds of the frozen model alone: forward, and backward to the first tensor behind which something is trained."""
        leaves: list[Tensor] = []

        def leaf(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            leaves.append(t.detach().requires_grad_())
            return leaves[-1]

        def first_block(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            for name in ("hidden_states", "x"):
                if not args and name in kwargs:
                    return args, kwargs | {name: leaf(kwargs[name])}
            return (leaf(args[0]), *args[1:]), kwargs

        backward = self.backward and call.grad
        kind = self.device.type
        with ExitStack() as around:
            around.enter_context(torch.set_grad_enabled(backward or call.grad))
            around.enter_context(torch.autocast(kind, call.amp, enabled=call.amp is not None))
            inside = self.inside
            self.inside = True
            around.callback(setattr, self, "inside", inside)
            args = call.args
            if call.attached is not None:
                around.enter_context(call.attached.disabled())
                if backward:
                    block = call.attached._path.blocks[0]
                    around.callback(block.register_forward_pre_hook(first_block, with_kwargs=True).remove)
            elif backward:
                args = tuple(leaf(t) for t in args)
            self._wait()
            start = time.perf_counter()
            out = call.model(*args, **call.kwargs)
            if backward:
                value = getattr(out, "loss", None)
                value = getattr(out, "logits", out) if value is None else value
                value = value if isinstance(value, Tensor) else next(iter(value.values() if isinstance(value, dict) else value))
                if leaves:
                    torch.autograd.grad(value.sum(), leaves)
            del out
            self._wait()
            return time.perf_counter() - start


def _mode(x: Tensor) -> tuple[bool, torch.dtype | None]:
    """Whether autograd records, and autocast's dtype."""
    kind = x.device.type
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
