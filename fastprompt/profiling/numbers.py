"""The numbers of a profile, from its timings and traces."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.profiling.advice import advise, evidence_of
from fastprompt.profiling.page import report
from fastprompt.profiling.results import PARTS, Part, Profile
from fastprompt.profiling.trace import LAUNCH, SYNC, TRACED, Label, Span, attribute, memory_of, spans_of

if TYPE_CHECKING:
    from fastprompt.profiling.session import Session


def finish(session: Session) -> None:
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
    charged_bytes: dict[Label, int]
    peak, charged_bytes = memory_of(session.memory.profiler.kineto_results.experimental_event_tree(), session.device.type)
    for name in PARTS:
        forward, backward = ((charged.get((name, way), 0.0) / total) * result.step for way in ("forward", "backward"))
        result.parts[name] = Part(forward, backward, sum(charged_bytes.get((name, way), 0) for way in ("forward", "backward")))
    count_calls(result, spans, windows, busy)
    events = session.memory.profiler.kineto_results.events()
    result.operations = [
        replace(op, calls=op.calls / TRACED, moved=op.moved / TRACED, flops=op.flops / TRACED)
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
    hold(result, session, peak)
    result.copy, result.matmul = ceilings(session.device)
    result.advice = advise(evidence_of(result, session, spans))
    if session.out is not None:
        report(result, Path(session.out), session.trace)
    session.result = result
    print(result, flush=True)


def count_calls(result: Profile, spans: list[Span], windows: list[tuple[int, int]], busy: float | None) -> None:
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
        result.launches = sum(bool(LAUNCH.match(s.name)) for s in inside) / steps
        result.syncs = max(0.0, sum(bool(SYNC.match(s.name)) for s in inside) / steps - 1)  # one is the profile's own


def hold(result: Profile, session: Session, peak: int) -> None:
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
