"""Where a reprogramming step's time goes: `fastprompt.profile` and `fastprompt profile script.py`.

A step is one call of `step_fn`; in a script or a `with` block it ends with an optimizer's step or, where nothing is trained,
when the outermost reprogrammed model (a `Reprogrammed`, a model with a prompt attached, `frozen`) is called again.

Steps are timed as they are, in turns with the bare frozen model on the same inputs. Then a few run under `torch.profiler`, with
ranges around this package's functions and modules. The ranges are hooks and wrappers that exist for those steps alone: without
a profile there is nothing to pay.
"""

from __future__ import annotations

import re
import runpy
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, record_function

from fastprompt import _runtime, functional, hoist
from fastprompt.functional.checks import bad
from fastprompt.integrations import calls, handle
from fastprompt.nn import attention, embedding, mapping, perturbation, trained_verbalizers, verbalizers
from fastprompt.reprogram import Reprogrammed

DATA, PERTURBATION, PROMPTS = "data", "perturbation", "prompts"
FROZEN, MAPPING, OPTIMIZER, HOST = "frozen model", "mapping and loss", "optimizer", "host"
PARTS = (DATA, PERTURBATION, PROMPTS, FROZEN, MAPPING, OPTIMIZER, HOST)

# Whose time a function's is; None: that of whoever calls it.
_FUNCTIONS: dict[str, str | None] = {
    "perturb": PERTURBATION, "scale_image": PERTURBATION, "soft_gather": PROMPTS, "place_prompt": PROMPTS, "soft_ids": PROMPTS,
    "map_vocabulary": PROMPTS, "prefix_attention": None, "map_labels": MAPPING, "mapped_cross_entropy": MAPPING,
    "label_head": MAPPING, "label_columns": MAPPING, "fold": MAPPING, "count_labels_": MAPPING, "match_labels": MAPPING,
    "bayesian_matrix": MAPPING,
}  # fmt: skip
_BACKWARD = {
    "PerturbBackward": PERTURBATION, "SoftGatherBackward": PROMPTS, "MapLabelsBackward": MAPPING,
    "MapSegmentsBackward": MAPPING, "ReduceSegmentsBackward": MAPPING,
}  # fmt: skip
_RANGE, _ENGINE = "fastprompt: ", "autograd::engine::evaluate_function: "
_MARK = "fastprompt boundary"
_LOSS = re.compile(r"aten::(\w+_loss(_nd)?|binary_cross_entropy\w*)$")
_COMPILED = ("Torch-Compiled Region", "CompiledFunction")  # which hides its parts: counted as the frozen model
_LAUNCH = re.compile(r"(cuda|hip|cu)(Module)?(LaunchKernel|GraphLaunch|LaunchCooperativeKernel|Memcpy\w*Async|Memset\w*Async)")
_SYNC = re.compile(r"(cuda|hip|cu)(StreamSynchronize|DeviceSynchronize|EventSynchronize|CtxSynchronize|Memcpy$)")
_TRACED = 3  # steps in the trace
_BLOCK = {"cuda": 4}  # timed steps between two waits for the device, so that the host may run ahead as it does without us


# ---- What comes out ----


@dataclass
class Part:
    """Milliseconds of a step, and what of its memory is this part's at the peak (bytes)."""

    forward: float = 0.0
    backward: float = 0.0
    memory: int = 0


@dataclass
class Op:
    """An operator's calls of one step on one path. milliseconds: forward; moved: bytes; flops: of the forward pass."""

    name: str
    path: str
    why: str
    calls: float = 0.0
    milliseconds: float = 0.0
    moved: float = 0.0
    flops: float = 0.0


@dataclass
class Profile:
    """A profile's numbers; `print` shows them as a page.

    Attributes:
        kind: "training" or "inference". device: of the frozen model.
        steps: timed steps. samples, tokens: of a step; None where nobody said and none could be seen.
        step, p20, p80: milliseconds of a step without the profiler. frozen: of the bare frozen model on the same inputs.
        overhead: step / frozen; None, with the reason in `no_overhead`, where the frozen model is not known. spread: p20 and
            p80 of that ratio over the pairs of timings that were taken one after the other.
        parts: by name, in milliseconds of `step`: shares of the traced steps times `step`, so they sum to it.
        traced: milliseconds of a step under the profiler.
        operators: PyTorch operators of a step called from outside one. launches, syncs: of a GPU.
        busy: the share of a step in which the GPU works.
        flops: of products and convolutions in a step, as PyTorch counts them, and of attention over prefixes (forward).
        copy, matmul: measured ceilings, bytes read plus written a second and FLOP/s.
        peak: bytes at the highest point of a step, what was there before included; held: what was there before, by what.
        advice: what to change.
    """

    kind: str
    device: str
    steps: int
    step: float
    p20: float
    p80: float
    samples: float | None = None
    tokens: float | None = None
    frozen: float | None = None
    overhead: float | None = None
    spread: tuple[float, float] | None = None
    no_overhead: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    traced: float = 0.0
    operators: float = 0.0
    launches: float | None = None
    syncs: float | None = None
    busy: float | None = None
    flops: float = 0.0
    copy: float = 0.0
    matmul: float = 0.0
    peak: int = 0
    held: dict[str, int] = field(default_factory=dict)
    operations: list[Op] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def samples_per_second(self) -> float | None:
        return None if self.samples is None else 1e3 * self.samples / self.step

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tokens is None else 1e3 * self.tokens / self.step

    def share(self, part: str) -> float:
        """Of a step."""
        return (self.parts[part].forward + self.parts[part].backward) / self.step

    def __str__(self) -> str:
        return _text(self)


# ---- Ranges ----


class _Ranges:
    """While entered: a range of the profiler around every function and module of this package; and what they were told."""

    def __init__(self, session: _Session) -> None:
        self.session = session
        self.parts: dict[int, str] = {}  # of modules, by id
        self.mapped: set[int] = set()  # ids of outputs that were applied to logits
        self.operations: dict[tuple[str, str, str], Op] = {}
        self.tracing = False
        self.open = threading.local()

    def __enter__(self) -> _Ranges:
        self.undo = ExitStack()
        for model in [each.model for each in handle._attached.values()] + [self.session.module]:
            if model is not None:
                self.parts[id(model)] = FROZEN
        for name in _FUNCTIONS:
            self._wrap(functional, name, f"fastprompt.{name}")
        for owner, name in ((handle.Attached, "_made"), (hoist.Wiring, "shallow"), (hoist.Wiring, "deep"), (calls.Calls, "deep")):
            self._wrap(owner, name, _RANGE + PROMPTS)
        self.undo.enter_context(_patched(Reprogrammed, "_run", self._run))
        self.undo.enter_context(_patched(hoist.Wiring, "reading", self._reading))
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

        self.undo.enter_context(_patched(owner, name, run))

    def _run(self, original: Callable[..., Tensor], module: Reprogrammed, x: Tensor, index: Any, model: Any) -> Tensor:
        """`Reprogrammed._run`; given another model than its own, that is f up to its head and a head that maps."""
        for part, name in ((module.inputs, PERTURBATION), (module.model, FROZEN), (module.outputs, MAPPING)):
            if part is not None:
                self.parts[id(part)] = _part_of(part) or name
        with record_function(_RANGE + (HOST if model is module.model else MAPPING)):
            return original(module, x, index, model)

    def _reading(self, original: Callable[..., Any], wiring: hoist.Wiring, source: Any) -> Any:
        self.parts[id(wiring.base)] = FROZEN
        return original(wiring, source)

    def _before(self, module: nn.Module, args: Any) -> None:
        stack = self.open.__dict__.setdefault("stack", [])
        part = self.parts.get(id(module)) or _part_of(module)
        if part is None or torch.compiler.is_compiling() or (stack and stack[-1][1] == part):
            return
        opened = record_function(_RANGE + part)
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
def _patched(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
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


# ---- Steps ----


@dataclass
class _Call:
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


class _Done(BaseException):
    """Ends a script whose steps are measured."""


class _Session(AbstractContextManager["_Session"]):
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

    def __enter__(self) -> _Session:
        self.plan = self._plan()
        self.undo = ExitStack()
        self.undo.callback(register_optimizer_step_post_hook(self._stepped).remove)
        self.undo.enter_context(_patched(Reprogrammed, "_run", self._run))
        self.undo.enter_context(_patched(handle.Attached, "__init__", self._attach))
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
        self.calls: list[_Call] = []
        self.counted = [0.0, 0.0]  # samples, tokens
        if self.hooked:
            self.advance()

    def advance(self) -> bool:
        """One step has ended, if one has begun; False: it was the last one."""
        self.done += 1
        self.called = False
        if next(self.plan, _Done) is not _Done:
            return True
        self.ended = True
        if self.stop and self.kind == "training":
            raise _Done
        return False

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None and self.hooked and not self.ended and self.kind == "inference" and self.called:
            self.advance()
        self.plan.close()
        self.undo.close()
        if kind is not None and not issubclass(kind, _Done):
            return False
        if not self.ended:
            wanted = self.warmup + self.steps + _TRACED + 3
            raise TooFewSteps(
                f"steps: expected {wanted} steps (warmup {self.warmup}, timed {self.steps}, traced {_TRACED + 3}), "
                f"got {max(self.done, 0)}; ask for fewer, or run more"
            )
        _finish(self)
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
                self._keep(_Call(called, args, kwargs, *_mode(x), owner=module, raw=x))

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
                self._keep(_Call(called, args, kwargs, *_mode(next(model.parameters(), torch.empty(0))), attached=attached))

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

    def _keep(self, call: _Call) -> None:
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
        with _Ranges(self) as seen:
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
        with _Ranges(self) as self.ranges:
            self.ranges.parts |= seen.parts
            yield  # compiled code and the caches, with the ranges there
            for _ in range(3):
                self.extra = False
                self.ranges.operations.clear()
                with torch.profiler.profile(activities=activities) as self.trace:
                    self._mark()
                    self.ranges.tracing = True
                    for _ in range(_TRACED):
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
        with record_function(_MARK):
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

    def _replay(self, call: _Call) -> float:
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


# ---- What a trace says ----


class Span(NamedTuple):
    """An event of a trace; times in nanoseconds. link: of a kernel, the `id` of the operator that launched it."""

    name: str
    start: int
    end: int
    thread: int = 0
    id: int = 0
    sequence: int = -1
    forward_thread: int = 0
    on_gpu: bool = False
    link: int = 0


_Label = tuple[str, str]  # (part, "forward" or "backward")


def spans_of(trace: Any) -> list[Span]:
    return [
        Span(
            e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.start_thread_id(), e.correlation_id(), e.sequence_nr(),
            e.fwd_thread_id(), e.device_type() != torch.autograd.DeviceType.CPU, e.linked_correlation_id(),
        )
        for e in trace.profiler.kineto_results.events()
        if e.duration_ns() or e.name() == _MARK
    ]  # fmt: skip


def attribute(spans: Sequence[Span]) -> tuple[dict[_Label, float], float, list[tuple[int, int]], float | None]:
    """(nanoseconds by part and direction, those of all steps, the steps' windows, how long a GPU worked).

    Every instant of a step belongs to one label, so they sum to the steps. On a CPU: to the innermost range, operator or
    backward node that the steps' thread is in. With a GPU: its kernels belong to what launched them, and the time in which it
    waits to the loader as far as that was running, else to the host.
    """
    marks = sorted((s for s in spans if s.name == _MARK and not s.on_gpu), key=lambda s: s.start)
    windows = [(a.end, b.start) for a, b in pairwise(marks)]
    main = marks[0].thread
    threads: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if not span.on_gpu and span.name != _MARK:
            threads[span.thread].append(span)
    known: dict[int, _Label] = {}  # by the id of an operator
    nodes: dict[tuple[int, int], _Label] = {}  # by thread and sequence number of a forward operator
    charged: dict[_Label, float] = defaultdict(float)
    for thread in sorted(threads, key=lambda t: t != main):  # what runs backward has run forward before
        for label, start, end in _timeline(threads[thread], windows, known, nodes):
            if thread == main:
                charged[label] += sum(max(0, min(end, to) - max(start, of)) for of, to in windows)
    total = float(sum(to - of for of, to in windows))
    kernels = [s for s in spans if s.on_gpu and not s.name.startswith(_RANGE)]
    if not kernels:
        return dict(charged), total, windows, None
    by_kernel: dict[_Label, float] = defaultdict(float)
    inside: list[tuple[int, int]] = []
    for span in kernels:
        for of, to in windows:
            if min(span.end, to) > max(span.start, of):
                inside.append((max(span.start, of), min(span.end, to)))
                by_kernel[known.get(span.link, (HOST, "forward"))] += inside[-1][1] - inside[-1][0]
    busy, reached = 0.0, 0
    for start, end in sorted(inside):
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    scale = busy / max(sum(by_kernel.values()), 1)  # kernels of several streams at a time share it
    found = {label: spent * scale for label, spent in by_kernel.items()}
    waiting = min(total - busy, charged.get((DATA, "forward"), 0.0))
    found[DATA, "forward"] = found.get((DATA, "forward"), 0.0) + waiting
    found[HOST, "forward"] = found.get((HOST, "forward"), 0.0) + total - busy - waiting
    return found, total, windows, busy


def _timeline(
    spans: list[Span], windows: list[tuple[int, int]], known: dict[int, _Label], nodes: dict[tuple[int, int], _Label]
) -> Iterator[tuple[_Label, int, int]]:
    """(label, start, end) of a thread's time, one after the other, from the first step's start to the last one's end."""
    open_: list[tuple[Span, _Label | None]] = []
    now, last = windows[0][0], windows[-1][1]
    begins = [of for of, _ in windows]
    called: dict[int, int] = {}  # when the model is first called in each step
    for span in spans:
        if span.name.startswith(_RANGE):
            step = sum(span.start >= of for of in begins)
            called[step] = min(called.get(step, span.start), span.start)
    recent: _Label = (HOST, "forward")  # of the last backward node

    def until(to: int, after: Span | None = None) -> Iterator[tuple[_Label, int, int]]:
        nonlocal now
        to = min(to, last)
        label = next((label for _, label in reversed(open_) if label), None)
        if label is None and after is not None and after.name.startswith(_ENGINE) and recent[1] == "backward":
            label = recent  # between two nodes
        while now < to:
            end, chosen = to, label
            if chosen is None:
                step = sum(now >= of for of in begins)
                first = called.get(step, now)
                chosen = (DATA, "forward") if now < first else (HOST, "forward")
                end = min([to, *([first] if now < first else []), *[of for of in begins if of > now]])
            yield chosen, now, end
            now = end

    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while open_ and open_[-1][0].end <= span.start:
            yield from until(open_[-1][0].end)
            open_.pop()
        backward = span.name.startswith(_ENGINE)
        yield from until(span.start, span if backward and not open_ else None)
        inherited = next((label for _, label in reversed(open_) if label), None)
        label = _label(span, inherited, nodes, recent)
        if label and label[1] == "backward":
            recent = label
        elif not backward:
            recent = (HOST, "forward") if label else recent
        if (label or inherited) and span.id:
            known[span.id] = label or inherited or recent
        if span.sequence >= 0 and not backward and not span.forward_thread:
            nodes[span.thread, span.sequence] = label or inherited or (HOST, "forward")
        open_.append((span, label))
    while open_:
        yield from until(open_[-1][0].end)
        open_.pop()
    yield from until(last)


def _label(span: Span, inherited: _Label | None, nodes: dict[tuple[int, int], _Label], recent: _Label) -> _Label | None:
    """Of a range, an operator or a backward node; None: that of what it is inside."""
    name = span.name
    if name.startswith(_RANGE):
        title = name.removeprefix(_RANGE)
        return None if title == HOST else (title, "forward")
    if name.startswith("fastprompt."):
        part = _FUNCTIONS.get(name.removeprefix("fastprompt."))
        return (part, "forward") if part else None
    if name.startswith("Optimizer."):
        return OPTIMIZER, "forward"
    if name.startswith("enumerate(DataLoader)"):
        return DATA, "forward"
    if name.startswith(_ENGINE):
        node = name.removeprefix(_ENGINE)
        known = nodes.get((span.forward_thread, span.sequence), recent)
        return _BACKWARD.get(node, known[0]), "backward"
    if inherited is None and name.startswith(_COMPILED):
        return FROZEN, "forward"
    if _LOSS.match(name) and (inherited is None or inherited == (FROZEN, "forward")):
        return MAPPING, "forward"
    return None


def memory_of(trees: Iterable[Any], device: str) -> tuple[int, dict[_Label, int]]:
    """(bytes, by whom) that a step has allocated, and not yet freed, at its highest point."""
    events: list[tuple[int, int, int, _Label]] = []

    def walk(node: Any, label: _Label) -> None:
        name = node.name
        if str(node.tag).endswith("Allocation"):
            at = node.extra_fields
            if str(at.device).startswith(device):
                events.append((node.start_time_ns, at.ptr, at.alloc_size, label))
        elif name.startswith(_ENGINE):
            label = _BACKWARD.get(name.removeprefix(_ENGINE), FROZEN), "backward"
        else:
            label = _label(Span(name, 0, 0), label, {}, label) or label
        for child in node.children:
            walk(child, label)

    for tree in trees:
        walk(tree, (HOST, "forward"))
    held: dict[int, tuple[int, _Label]] = {}
    now = peak = 0
    at_peak: dict[int, tuple[int, _Label]] = {}
    for _, pointer, size, label in sorted(events, key=lambda e: e[0]):
        if size > 0:
            held[pointer] = size, label
            now += size
        elif pointer in held:  # else it is older than the step
            now -= held.pop(pointer)[0]
        if now > peak:
            peak, at_peak = now, dict(held)
    by: dict[_Label, int] = defaultdict(int)
    for size, label in at_peak.values():
        by[label] += size
    return peak, dict(by)


def _finish(session: _Session) -> None:
    """The result of a session whose steps have all run: written, printed."""
    ranked = sorted(1e3 * each for each in session.seconds)
    p20, p80 = (ranked[int(share * (len(ranked) - 1))] for share in (0.2, 0.8))
    spans = spans_of(session.trace)
    charged, total, windows, busy = attribute(spans)
    trains = session.optimizers or session.backward or any(way == "backward" for _, way in charged)
    kind = "training" if trains else "inference"
    result = Profile(kind, str(session.device), len(ranked), statistics.median(ranked), p20, p80)
    result.samples = session.samples or session.amounts[0] or None
    result.tokens = session.tokens or session.amounts[1] or None
    result.no_overhead = session.no_overhead
    if session.frozen_seconds and not session.no_overhead:
        result.frozen = 1e3 * statistics.median(session.frozen_seconds)
        result.overhead = result.step / result.frozen
        ratios = sorted(a / b for a, b in zip(session.seconds, session.frozen_seconds, strict=True))
        result.spread = ratios[int(0.2 * (len(ratios) - 1))], ratios[int(0.8 * (len(ratios) - 1))]
    result.traced = 1e-6 * total / len(windows)
    charged_bytes: dict[_Label, int]
    peak, charged_bytes = memory_of(session.memory.profiler.kineto_results.experimental_event_tree(), session.device.type)
    for name in PARTS:
        forward, backward = ((charged.get((name, way), 0.0) / total) * result.step for way in ("forward", "backward"))
        result.parts[name] = Part(forward, backward, sum(charged_bytes.get((name, way), 0) for way in ("forward", "backward")))
    _count(result, spans, windows, busy)
    events = session.memory.profiler.kineto_results.events()
    result.operations = [
        replace(op, calls=op.calls / _TRACED, moved=op.moved / _TRACED, flops=op.flops / _TRACED)
        for op in session.ranges.operations.values()
    ]
    result.flops = float(sum(e.flops() for e in events)) + sum(op.flops for op in result.operations)
    spent: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.name.startswith("fastprompt.") and any(of <= span.start < to for of, to in windows):
            spent[span.name.removeprefix("fastprompt.")] += 1e-6 * (span.end - span.start) / len(windows)
    calls_of: dict[str, float] = defaultdict(float)
    for op in result.operations:
        calls_of[op.name] += op.calls
    for op in result.operations:  # several paths of one operator share its time by their calls
        op.milliseconds = spent[op.name] * op.calls / calls_of[op.name] * result.step / result.traced
    _hold(result, session, peak)
    result.copy, result.matmul = ceilings(session.device)
    result.advice = advise(_evidence(result, session, spans))
    if session.out is not None:
        _report(result, Path(session.out), session.trace)
    session.result = result
    print(result, flush=True)


def _count(result: Profile, spans: list[Span], windows: list[tuple[int, int]], busy: float | None) -> None:
    """Operators, launches and syncs of a step."""
    inside = [s for s in spans if any(of <= s.start < to for of, to in windows)]
    steps = len(windows)
    ends: dict[int, int] = {}  # of the operator that a thread is in
    operators = 0
    for span in sorted((s for s in inside if not s.on_gpu and "::" in s.name), key=lambda s: s.start):
        if not span.name.startswith("autograd::") and span.start >= ends.get(span.thread, 0):
            operators, ends[span.thread] = operators + 1, span.end
    result.operators = operators / steps
    if busy is not None:
        result.busy = busy / sum(to - of for of, to in windows)
        result.launches = sum(bool(_LAUNCH.match(s.name)) for s in inside) / steps
        result.syncs = max(0.0, sum(bool(_SYNC.match(s.name)) for s in inside) / steps - 1)  # one is the profile's own


def _hold(result: Profile, session: _Session, peak: int) -> None:
    """What memory holds before a step begins."""
    models = {id(call.model): call.model for call in session.calls}
    frozen = [t for model in models.values() for t in (*model.parameters(), *model.buffers())]
    trained = [t for optimizer in session.optimizers for group in optimizer.param_groups for t in group["params"]]
    state = [t for optimizer in session.optimizers for each in optimizer.state.values() for t in each.values()]
    given = [call.raw for call in session.calls] + [t for call in session.calls for t in call.kwargs.values()]
    groups = {
        "frozen model": frozen,
        "trained tensors, gradients, optimizer": trained + [t.grad for t in trained] + state,
        "batch": given,
    }
    for name, tensors in groups.items():
        known = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor) and t.device.type == session.device.type}
        result.held[name] = sum(known.values())
    result.peak = session.highest or peak + sum(result.held.values())


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes read plus written a second by a large copy, FLOP/s of a large product: bfloat16 on a GPU, float32 on a CPU)."""
    gpu = device.type == "cuda"
    source = torch.rand((1 << 27) if gpu else (1 << 23), device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 512
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16 if gpu else torch.float32)

    def best(call: Callable[[], Any]) -> float:
        spent = []
        for _ in range(5):
            if gpu:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - start)
        return min(spent)

    with torch.no_grad():
        return 2 * source.nbytes / best(lambda: target.copy_(source)), 2 * side**3 / best(lambda: a @ a)


# ---- What to change ----


@dataclass
class Evidence:
    """What the rules of `advise` look at, besides the numbers.

    images: (module, shape, dtype, bytes) of floating point images that a prompt on images was given from the host.
    folds: (head, sources, classes, share of the step's FLOPs in columns of the head that nobody reads).
    trainable: elements of the frozen model that ask for a gradient. dtype, amp: of the frozen model.
    in_samples: why a prompt's rows are in every sample. recorded: autograd records what no backward reads.
    waits: which operators wait for the GPU.
    """

    profile: Profile
    images: list[tuple[str, tuple[int, ...], torch.dtype, int]] = field(default_factory=list)
    folds: list[tuple[str, int, int, float]] = field(default_factory=list)
    trainable: int = 0
    dtype: torch.dtype | None = None
    amp: torch.dtype | None = None
    in_samples: list[str] = field(default_factory=list)
    recorded: bool = False
    waits: dict[str, int] = field(default_factory=dict)


def _evidence(result: Profile, session: _Session, spans: list[Span]) -> Evidence:
    found = Evidence(result)
    from_host = session.device.type == "cpu" or any(s.on_gpu and "HtoD" in s.name for s in spans)
    seen: set[int] = set()
    for call in session.calls:
        owner, raw = call.owner, call.raw
        parameters = list(call.model.parameters())
        found.amp = found.amp or call.amp
        if id(call.model) in seen:
            continue
        seen.add(id(call.model))
        found.dtype = found.dtype or next((p.dtype for p in parameters if p.is_floating_point()), None)
        own = {id(p) for p in call.attached.parameters()} if call.attached is not None else set()
        found.trainable += sum(p.numel() for p in parameters if p.requires_grad and id(p) not in own)
        found.recorded |= call.grad and not session.backward and result.kind == "inference"
        if call.attached is not None and call.attached.reason:
            found.in_samples.append(call.attached.reason)
        if owner is None:
            continue
        if isinstance(owner.inputs, perturbation.InputPrompt) and from_host and raw.is_floating_point() and raw.dim() == 4:
            found.images.append((type(owner.inputs).__name__, tuple(raw.shape), raw.dtype, raw.nbytes))
        outputs: Any = owner.outputs
        if owner.head is None and getattr(outputs, "foldable", False) and id(outputs) in session.ranges.mapped:
            heads = {n: m for n, m in call.model.named_modules() if type(m) is nn.Linear and m.out_features == outputs.num_source}
            for name, head in list(heads.items())[-1:]:
                unread = 2 * (result.samples or 0) * head.in_features * (outputs.num_source - outputs.num_classes)
                unread *= 2 if result.kind == "training" else 1
                found.folds.append((name, outputs.num_source, outputs.num_classes, unread / max(result.flops, 1)))
    operators = {s.id: s.name for s in spans if s.id and "::" in s.name}
    waits = Counter(operators.get(s.link, "") for s in spans if _SYNC.match(s.name))
    found.waits = {name: count for name, count in waits.items() if name}
    return found


def advise(e: Evidence) -> list[str]:
    """What to change, a sentence for each rule that what was seen speaks for."""
    p, said = e.profile, []
    gpu = p.device.startswith("cuda")
    data = p.parts.get(DATA, Part()).forward
    if data > 0.2 * p.step:
        said.append(
            f"The data, and what else comes before the model is called, take {100 * data / p.step:.0f} % of a step ({data:.2f} "
            f"of {p.step:.2f} ms): more loader workers, pinned memory, or data that stay where the model is."
        )
    for name, shape, dtype, size in e.images:
        if size >= 1 << 20:
            narrow = size // dtype.itemsize
            said.append(
                f"{shape[-1]}-pixel {_short(dtype)} images come from the host: {size / 1e6:.1f} MB a batch; pass uint8 to "
                f"{name}, which converts in its own pass: {narrow / 1e6:.1f} MB."
            )
    if gpu and e.dtype == torch.float32 and e.amp is None:
        said.append("The frozen model computes in float32 on a GPU: model.to(torch.bfloat16), or autocast (amp= of fit).")
    for head, sources, classes, unread in e.folds:
        worth = p.share(MAPPING) + unread * p.share(FROZEN)
        if worth >= 0.01:
            said.append(
                f"The labels are mapped behind the head {head!r} by a map that is linear: pass head={head!r} to Reprogrammed, "
                f"for {classes} columns in place of {sources} (mapping and unread columns: up to {100 * worth:.0f} % of a step)."
            )
    if e.trainable:
        said.append(
            f"Gradients of the frozen model are computed: {e.trainable:,} of its elements have requires_grad=True; "
            "model.requires_grad_(False), or attach with freeze=True."
        )
    for reason in dict.fromkeys(e.in_samples):
        said.append(f"A prompt's rows are in every sample, because {reason}")
    if e.recorded:
        said.append("Autograd records the forward pass, and no backward reads it: run inference under torch.no_grad().")
    for op in p.operations:
        if op.path.startswith("plain PyTorch") and "asks for it" not in op.why:
            said.append(f"{op.name} runs in plain PyTorch, because {op.why}: {op.milliseconds:.2f} ms a step.")
    if p.syncs:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(e.waits.items(), key=lambda each: -each[1])[:3])
        said.append(f"The host waits for the GPU {p.syncs:.0f} times a step{': ' + names if names else ''}; keep values there.")
    if p.busy is not None and p.busy < 0.7 and data < 0.2 * p.step:
        said.append(
            f"The GPU works {100 * p.busy:.0f} % of a step and waits for the host else ({p.launches or 0:.0f} launches): a "
            "larger batch, torch.compile, or a CUDA graph."
        )
    return said


# ---- The page ----


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _head_lines(p: Profile) -> list[str]:
    threads = f", threads: {torch.get_num_threads()}" if p.device == "cpu" else ""
    lines = [f"{p.kind} on {p.device}{threads}, torch {torch.__version__}, {p.steps} steps timed"]
    rates = [
        f"{amount:,.0f} {name}/s"
        for name, amount in (("samples", p.samples_per_second), ("tokens", p.tokens_per_second))
        if amount is not None
    ]
    of = f" of {p.samples:g} samples" if p.samples else ""
    lines.append(f"step    {p.step:9.3f} ms{of} (p20 {p.p20:.3f}, p80 {p.p80:.3f})  {'  '.join(rates)}".rstrip())
    if p.frozen is not None and p.spread is not None:
        way = "forward and backward" if p.kind == "training" else "forward"
        spread = "p20 {:.3f}, p80 {:.3f}".format(*p.spread)
        lines.append(
            f"frozen  {p.frozen:9.3f} ms, {way} alone on the same inputs, in turns; overhead {p.overhead:.3f}x ({spread})"
        )
    else:
        lines.append(f"frozen  not timed: {p.no_overhead}")
    return lines


def _part_rows(p: Profile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("part", "forward ms", "backward ms", "of a step", "at the peak")]
    for name, part in p.parts.items():
        if part == Part():
            continue
        both = f"{part.backward:.3f}" if part.backward else ""
        rows.append(
            (name, f"{part.forward:.3f}", both, f"{100 * p.share(name):.1f} %", _bytes(part.memory) if part.memory >= 100 else "")
        )
    total = sum(part.forward + part.backward for part in p.parts.values())
    return [*rows, ("sum", f"{total:.3f}", "", f"{100 * total / p.step:.1f} %", "")]


def _op_rows(p: Profile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("operator", "calls", "ms", "moves", "of the copy rate", "path")]
    for op in p.operations:
        rate = op.moved / max(op.milliseconds, 1e-9) * 1e3 / max(p.copy, 1)
        path = f"{op.path}, because {op.why}"
        rows.append((op.name, f"{op.calls:.2g}", f"{op.milliseconds:.3f}", _bytes(op.moved), f"{100 * rate:.0f} %", path))
    return rows


def _notes(p: Profile) -> list[str]:
    said = [f"{p.operators:.0f} operators called a step"]
    if p.launches is not None:
        said.append(f"{p.launches:.0f} launches, {p.syncs:.0f} host syncs, the GPU works {100 * (p.busy or 0):.0f} % of it")
    share = p.flops / max(p.step * 1e-3 * p.matmul, 1)
    said.append(
        f"{p.flops / 1e9:.3f} GFLOP in products and convolutions (those of convolutions forward only): {100 * share:.0f} % of "
        f"what a large product reaches here, {p.matmul / 1e9:,.0f} GFLOP/s; a large copy: {p.copy / 1e9:.1f} GB/s"
    )
    held = ", ".join(f"{name} {_bytes(size)}" for name, size in p.held.items() if size)
    said.append(f"peak memory {_bytes(p.peak)}: {held or 'nothing known'} from before; what the step makes is in the table")
    said.append(f"a step under the profiler took {p.traced:.3f} ms; the table has its shares of the step without it")
    return said


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right, a sixth column of words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if place in (0, 5) else str.rjust for place in range(len(widths))]
    return ["  " + "  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)) for row in rows]


def _text(p: Profile) -> str:
    lines = [*_head_lines(p), "", "where the time goes", *_table(_part_rows(p)), ""]
    lines += [f"  {note}" for note in _notes(p)]
    if p.operations:
        lines += ["", "paths", *_table(_op_rows(p))]
    lines += ["", "what to change", *[f"  {n}. {advice}" for n, advice in enumerate(p.advice, 1)]]
    return "\n".join(line.rstrip() for line in (lines if p.advice else [*lines, "  nothing that the rules know of"]))


def _report(p: Profile, folder: Path, trace: Any) -> None:
    """trace.json for Perfetto or chrome://tracing, report.md, and pictures where matplotlib is."""
    trace.export_chrome_trace(str(folder / "trace.json"))

    def table(rows: list[tuple[str, ...]]) -> list[str]:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

    lines = ["# Profile", "", *[f"- {line}" for line in _head_lines(p)], "", "## Where the time goes", ""]
    try:
        _draw(p, folder)
        lines += ["![shares of a step](step.png)", ""]
    except ImportError:
        lines += ["(No pictures: matplotlib is not installed.)", ""]
    lines += [*table(_part_rows(p)), *[f"- {note}" for note in _notes(p)], ""]
    if p.operations:
        lines += ["## Paths", "", *table(_op_rows(p))]
    lines += ["## What to change", "", *[f"{n}. {advice}" for n, advice in enumerate(p.advice, 1)]]
    lines += [] if p.advice else ["Nothing that the rules know of."]
    lines += ["", "The trace is in trace.json: open it at https://ui.perfetto.dev or chrome://tracing.", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _draw(p: Profile, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    time_axes, memory_axes = figure.subplots(2, 1)
    names = [name for name, part in p.parts.items() if part != Part()][::-1]
    forward, backward = ([getattr(p.parts[name], way) for name in names] for way in ("forward", "backward"))
    time_axes.barh(names, forward, label="forward")
    time_axes.barh(names, backward, left=forward, label="backward")
    time_axes.set(xlabel="ms of a step", title=f"{p.step:.2f} ms a step")
    time_axes.legend()
    made = {f"{name}, in the step": part.memory for name, part in p.parts.items()}
    sizes = {name: size / 1e6 for name, size in (p.held | made).items() if 100 * size > p.peak}
    memory_axes.barh(list(sizes)[::-1], list(sizes.values())[::-1], color="tab:gray")
    memory_axes.set(xlabel="MB at the peak", title=f"{_bytes(p.peak)} at the peak")
    figure.savefig(folder / "step.png", dpi=120)


# ---- What users call ----


@overload
def profile(
    step_fn: Callable[[], Any], *, samples: float | None = ..., tokens: float | None = ..., steps: int = ..., warmup: int = ...,
    frozen: Any = ..., out: str | Path | None = ...,
) -> Profile: ...  # fmt: skip
@overload
def profile(
    step_fn: None = ..., *, samples: float | None = ..., tokens: float | None = ..., steps: int = ..., warmup: int = ...,
    frozen: Any = ..., out: str | Path | None = ...,
) -> _Session: ...  # fmt: skip
def profile(
    step_fn: Callable[[], Any] | None = None, *, samples: float | None = None, tokens: float | None = None, steps: int = 20,
    warmup: int = 3, frozen: Any = None, out: str | Path | None = None,
) -> Profile | _Session:  # fmt: skip
    """Measures a step of training or inference, prints a page on where its time goes and what to change, and returns it.

        result = fastprompt.profile(step)               # calls step() 29 times
        with fastprompt.profile() as watched: ...       # your own loop of at least 29 steps; then watched.result

    The overhead is the step over the bare frozen model on the same inputs, timed in turns: forward, and in training backward
    to its input (with an attached prompt to its first block). Shares come from three steps under torch.profiler.

    Args:
        step_fn: does one step. In a `with` block a step ends with `optimizer.step()` of the first optimizer, or where nothing
            is trained when the outermost reprogrammed model is called again.
        samples, tokens: of a step. Default: the batch of what reprogrammed models are called with, its token ids.
        steps: that are timed. warmup: before that; the last of them is looked at. Six more are traced.
        frozen: the frozen nn.Module, or a function that runs it as the step does; for models that neither `Reprogrammed` nor
            `attach` knows.
        out: a folder for trace.json (Perfetto), report.md and its picture.

    Raises:
        ValueError, TypeError: what was expected and what came. TooFewSteps (a RuntimeError).
    """
    if step_fn is None:
        return _Session(samples, tokens, steps, warmup, frozen, out)
    if not callable(step_fn):
        raise TypeError(f"step_fn: expected a function without arguments, got {type(step_fn).__name__}")
    with _Session(samples, tokens, steps, warmup, frozen, out, hooked=False) as session:
        while session.advance():
            step_fn()
    return session.result


def run_script(path: str, arguments: Sequence[str] = (), **options: Any) -> Profile:
    """Runs a script as `python path arguments` does, and stops it when its training steps are measured.

    options: those of `profile`.
    """
    defaults: dict[str, Any] = {"samples": None, "tokens": None, "steps": 20, "warmup": 3, "frozen": None, "out": None}
    session = _Session(**(defaults | options), stop=True)
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [path, *arguments], [str(Path(path).resolve().parent)]
    try:
        with session:
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
    finally:
        sys.argv, sys.path[:] = before
    return session.result
