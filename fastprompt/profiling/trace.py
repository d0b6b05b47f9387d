"""Whose the time and the memory in a trace of `torch.profiler` are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from fastprompt.profiling.results import DATA, FROZEN, HOST, MAPPING, OPTIMIZER, PERTURBATION, PROMPTS

# Whose time a function's is; None: that of whoever calls it.
FUNCTIONS: dict[str, str | None] = {
    "perturb": PERTURBATION, "scale_image": PERTURBATION, "soft_gather": PROMPTS, "place_prompt": PROMPTS, "soft_ids": PROMPTS,
    "map_vocabulary": PROMPTS, "prefix_attention": None, "map_labels": MAPPING, "mapped_cross_entropy": MAPPING,
    "label_head": MAPPING, "label_columns": MAPPING, "fold": MAPPING, "count_labels_": MAPPING, "match_labels": MAPPING,
    "bayesian_matrix": MAPPING,
}  # fmt: skip
_BACKWARD = {
    "PerturbBackward": PERTURBATION, "SoftGatherBackward": PROMPTS, "MapLabelsBackward": MAPPING,
    "MapSegmentsBackward": MAPPING, "ReduceSegmentsBackward": MAPPING,
}  # fmt: skip
RANGE, ENGINE = "fastprompt: ", "autograd::engine::evaluate_function: "
MARK = "fastprompt boundary"
_LOSS = re.compile(r"aten::(\w+_loss(_nd)?|binary_cross_entropy\w*)$")
_COMPILED = ("Torch-Compiled Region", "CompiledFunction")  # which hides its parts: counted as the frozen model
LAUNCH = re.compile(r"(cuda|hip|cu)(Module)?(LaunchKernel|GraphLaunch|LaunchCooperativeKernel|Memcpy\w*Async|Memset\w*Async)")
SYNC = re.compile(r"(cuda|hip|cu)(StreamSynchronize|DeviceSynchronize|EventSynchronize|CtxSynchronize|Memcpy$)")
TRACED = 3  # steps in the trace


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


Label = tuple[str, str]  # (part, "forward" or "backward")


def spans_of(trace: Any) -> list[Span]:
    """The events, without the copies of ranges that a trace shows on a GPU around the kernels inside: those are no work."""
    return [
        Span(
            e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.start_thread_id(), e.correlation_id(), e.sequence_nr(),
            e.fwd_thread_id(), e.device_type() != torch.autograd.DeviceType.CPU, e.linked_correlation_id(),
        )
        for e in trace.profiler.kineto_results.events()
        if (e.duration_ns() or e.name() == MARK)
        and (e.device_type() == torch.autograd.DeviceType.CPU or not e.is_user_annotation())
    ]  # fmt: skip


def attribute(spans: Sequence[Span]) -> tuple[dict[Label, float], float, list[tuple[int, int]], float | None]:
    """(nanoseconds by part and direction, those of all steps, the steps' windows, how long a GPU worked).

    Every instant of a step belongs to one label, so they sum to the steps. On a CPU: to the innermost range, operator or
    backward node that the steps' thread is in. With a GPU: its kernels belong to what launched them, and the time in which it
    waits to the loader as far as that was running, else to the host.
    """
    marks = sorted((s for s in spans if s.name == MARK and not s.on_gpu), key=lambda s: s.start)
    windows = [(a.end, b.start) for a, b in pairwise(marks)]
    main = marks[0].thread
    threads: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if not span.on_gpu and span.name != MARK:
            threads[span.thread].append(span)
    known: dict[int, Label] = {}  # by the id of an operator
    nodes: dict[tuple[int, int], Label] = {}  # by thread and sequence number of a forward operator
    charged: dict[Label, float] = defaultdict(float)
    for thread in sorted(threads, key=lambda t: t != main):  # what runs backward has run forward before
        for label, start, end in _timeline(threads[thread], windows, known, nodes):
            if thread == main:
                charged[label] += sum(max(0, min(end, to) - max(start, of)) for of, to in windows)
    total = float(sum(to - of for of, to in windows))
    kernels = [s for s in spans if s.on_gpu and not s.name.startswith(RANGE)]
    if not kernels:
        return dict(charged), total, windows, None
    by_kernel: dict[Label, float] = defaultdict(float)
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
    spans: list[Span], windows: list[tuple[int, int]], known: dict[int, Label], nodes: dict[tuple[int, int], Label]
) -> Iterator[tuple[Label, int, int]]:
    """(label, start, end) of a thread's time, one after the other, from the first step's start to the last one's end."""
    open_: list[tuple[Span, Label | None]] = []
    now, last = windows[0][0], windows[-1][1]
    begins = [of for of, _ in windows]
    called: dict[int, int] = {}  # when the model is first called in each step
    for span in spans:
        if span.name.startswith(RANGE):
            step = sum(span.start >= of for of in begins)
            called[step] = min(called.get(step, span.start), span.start)
    recent: Label = (HOST, "forward")  # of the last backward node

    def until(to: int, after: Span | None = None) -> Iterator[tuple[Label, int, int]]:
        nonlocal now
        to = min(to, last)
        label = next((label for _, label in reversed(open_) if label), None)
        if label is None and after is not None and after.name.startswith(ENGINE) and recent[1] == "backward":
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
        backward = span.name.startswith(ENGINE)
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


def _label(span: Span, inherited: Label | None, nodes: dict[tuple[int, int], Label], recent: Label) -> Label | None:
    """Of a range, an operator or a backward node; None: that of what it is inside."""
    name = span.name
    if name.startswith(RANGE):
        title = name.removeprefix(RANGE)
        return None if title == HOST else (title, "forward")
    if name.startswith("fastprompt."):
        part = FUNCTIONS.get(name.removeprefix("fastprompt."))
        return (part, "forward") if part else None
    if name.startswith("Optimizer."):
        return OPTIMIZER, "forward"
    if name.startswith("enumerate(DataLoader)"):
        return DATA, "forward"
    if name.startswith(ENGINE):
        node = name.removeprefix(ENGINE)
        known = nodes.get((span.forward_thread, span.sequence), recent)
        return _BACKWARD.get(node, known[0]), "backward"
    if inherited is None and name.startswith(_COMPILED):
        return FROZEN, "forward"
    if _LOSS.match(name) and (inherited is None or inherited == (FROZEN, "forward")):
        return MAPPING, "forward"
    return None


def memory_of(trees: Iterable[Any], device: str) -> tuple[int, dict[Label, int]]:
    """(bytes, by whom) that a step has allocated, and not yet freed, at its highest point."""
    events: list[tuple[int, int, int, Label]] = []

    def walk(node: Any, label: Label) -> None:
        name = node.name
        if str(node.tag).endswith("Allocation"):
            at = node.extra_fields
            if str(at.device).startswith(device):
                events.append((node.start_time_ns, at.ptr, at.alloc_size, label))
        elif name.startswith(ENGINE):
            label = _BACKWARD.get(name.removeprefix(ENGINE), FROZEN), "backward"
        else:
            label = _label(Span(name, 0, 0), label, {}, label) or label
        for child in node.children:
            walk(child, label)

    for tree in trees:
        walk(tree, (HOST, "forward"))
    held: dict[int, tuple[int, Label]] = {}
    now = peak = 0
    at_peak: dict[int, tuple[int, Label]] = {}
    for _, pointer, size, label in sorted(events, key=lambda e: e[0]):
        if size > 0:
            held[pointer] = size, label
            now += size
        elif pointer in held:  # else it is older than the step
            now -= held.pop(pointer)[0]
        if now > peak:
            peak, at_peak = now, dict(held)
    by: dict[Label, int] = defaultdict(int)
    for size, label in at_peak.values():
        by[label] += size
    return peak, dict(by)
