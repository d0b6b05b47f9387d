"""`fastprompt tune`: measures launch configurations on this machine's GPU and writes the file that `fastprompt.tuning` reads.

Every kernel is launched with each candidate on one or two of its usual shapes. A candidate whose answer differs from plain
PyTorch's, or that does not fit the machine, is left out. What is left is timed interleaved, as CUDA graphs over input sets
that no cache holds; the kernel's present launch is kept unless another one is more than 2 % faster over all its shapes.
Before that, processes beside each other compile what will be tried: one after the other that would take most of the time.
Nothing is measured on a user's call. On a CPU (`--dry`) the same runs in Triton's interpreter on tiny shapes.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt import _runtime, functional
from fastprompt.functional.checks import bad
from fastprompt.tuning import _measured
from fastprompt.tuning.attention import Tile
from fastprompt.tuning.embedding import Launch as Rows
from fastprompt.tuning.mapping import Elements, Launch
from fastprompt.tuning.perturbation import Launch as Block

GAIN = 1.02  # by which another launch must be faster to replace the present one
COLD = 240 << 20  # bytes of the input sets together: more than a second-level cache holds
Inputs = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """One use of some kernels: the call `form(inputs)`, or its gradient for the inputs `wrt`."""

    family: str
    title: str
    kernels: tuple[Any, ...]
    inputs: Callable[[torch.Generator, torch.device], Inputs]
    form: Callable[[Inputs, str], Tensor]
    wrt: tuple[str, ...] = ()
    tolerance: float = 1.0  # of the largest value; that of the dtype where it is less

    def bind(self, inputs: Inputs, impl: str) -> Call:
        if not self.wrt:
            return lambda: (self.form(inputs, impl),)
        out, wanted = self.form(inputs, impl), [inputs[name] for name in self.wrt]
        return lambda: torch.autograd.grad(out, wanted, inputs["g"], retain_graph=True)


# ---- What is launched ----


_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def works(family: str, small: bool, dtype: torch.dtype | None = None) -> list[Work]:
    """The shapes that the kernels of a family are measured on, in bfloat16. small: as the interpreter needs, in float32."""
    make = {"perturbation": _perturbation, "embedding": _embedding, "attention": _attention, "mapping": _mapping}[family]
    dtype = dtype or (torch.float32 if small else torch.bfloat16)
    return [replace(work, tolerance=min(work.tolerance, _TOLERANCE[dtype])) for work in make(small, dtype)]


def _normal(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _perturbation(small: bool, half: torch.dtype) -> list[Work]:
    batch, canvas, sizes = (2, 32, (8, 24)) if small else (256, 224, (32, 192))
    made = []
    for size in sizes:

        def inputs(generator: torch.Generator, device: torch.device, size: int = size) -> Inputs:
            return {
                "x": torch.randint(256, (batch, 3, size, size), generator=generator, device=device, dtype=torch.uint8),
                "prompt": _normal((1, 3, canvas, canvas), generator, device, torch.float32).requires_grad_(),
                "g": _normal((batch, 3, canvas, canvas), generator, device, half),
            }

        def padded(i: Inputs, impl: str) -> Tensor:
            return functional.perturb(i["x"], i["prompt"], canvas=canvas, hole="image", squash="sigmoid", dtype=half, impl=impl)

        title = f"B={batch} {size}->{canvas}"
        made.append(Work("perturbation", f"pad forward {title}", ("forward",), inputs, padded))
        made.append(Work("perturbation", f"pad backward {title}", ("prompt_gradient",), inputs, padded, ("prompt",)))

    def images(generator: torch.Generator, device: torch.device) -> Inputs:
        return {
            "x": _normal((batch, 3, canvas, canvas), generator, device, half).requires_grad_(),
            "prompt": _normal((1, 3, canvas, canvas), generator, device, torch.float32),
            "cells": _normal((batch, 3, canvas // 8, canvas // 8), generator, device, half).requires_grad_(),
            "g": _normal((batch, 3, canvas, canvas), generator, device, half),
        }

    def masked(i: Inputs, impl: str) -> Tensor:
        return functional.perturb(i["x"], i["prompt"], cells=i["cells"], dtype=half, impl=impl)

    made.append(Work("perturbation", f"masks backward B={batch} {canvas}", ("cells_gradient",), images, masked, ("cells",)))
    made.append(Work("perturbation", f"image backward B={batch} {canvas}", ("image_gradient",), images, masked, ("x",)))
    return made


def _embedding(small: bool, half: torch.dtype) -> list[Work]:
    words = 50 if small else 128_256
    made = []
    for batch, length, slots, width in [(2, 5, 3, 16)] if small else [(8, 2048, 128, 4096), (256, 197, 50, 768)]:

        def inputs(
            generator: torch.Generator, device: torch.device, batch: int = batch, length: int = length, slots: int = slots,
            width: int = width,
        ) -> Inputs:  # fmt: skip
            ids = torch.randint(words, (batch, length), generator=generator, device=device)
            return {
                "ids": functional.place_prompt(ids, slots)[0],
                "vocab": _normal((words, width), generator, device, half),
                "soft": _normal((1, slots, width), generator, device, torch.float32).requires_grad_(),
                "g": _normal((batch, slots + length, width), generator, device, half),
            }

        def gathered(i: Inputs, impl: str) -> Tensor:
            return functional.soft_gather(i["ids"], i["vocab"], i["soft"], impl=impl)

        title = f"B={batch} T={length} P={slots} d={width}"
        made.append(Work("embedding", f"gather forward {title}", ("gather",), inputs, gathered))
        kernels = ("locate", "add", "add chunks")
        made.append(Work("embedding", f"gather backward {title}", kernels, inputs, gathered, ("soft",)))
    return made


def _attention(small: bool, half: torch.dtype) -> list[Work]:
    tiny = [("tiny", 2, 2, 1, 9, 3, width, True) for width in (16, 80, 192)]
    shapes = [("Llama", 8, 32, 8, 2048, 128, 128, True), ("ViT-B", 256, 12, 12, 197, 50, 64, False)]
    made = []
    for name, batch, heads, shared, length, rows, width, causal in tiny if small else shapes:

        def inputs(
            generator: torch.Generator, device: torch.device, batch: int = batch, heads: int = heads, shared: int = shared,
            length: int = length, rows: int = rows, width: int = width,
        ) -> Inputs:  # fmt: skip
            given = {"q": (batch, heads, length), "k": (batch, shared, length), "v": (batch, shared, length)}
            given |= {"prefix_k": (1, shared, rows), "prefix_v": (1, shared, rows), "g": (batch, heads, length)}
            return {n: _normal((*shape, width), generator, device, half).requires_grad_(n != "g") for n, shape in given.items()}

        def attended(i: Inputs, impl: str, causal: bool = causal) -> Tensor:
            return functional.prefix_attention(i["q"], i["k"], i["v"], i["prefix_k"], i["prefix_v"], causal=causal, impl=impl)

        title = f"{name} B={batch} H={heads}/{shared} T={length} P={rows} D={width}"
        key = (half.itemsize, next(w for w in (64, 128, 256) if width <= w))
        made.append(Work("attention", f"forward {title}", (("forward", *key),), inputs, attended))
        for kernel, wrt in (("query", ("q",)), ("own", ("k", "v")), ("prefix", ("prefix_k", "prefix_v"))):
            made.append(Work("attention", f"{kernel} gradient {title}", ((kernel, *key),), inputs, attended, wrt))
    return made


def _mapping(small: bool, half: torch.dtype) -> list[Work]:
    batch, sources, targets = (9, 40, 4) if small else (65536, 1000, 10)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        order = torch.randperm(sources, generator=generator, device=device)
        return {
            "logits": _normal((batch, sources), generator, device, half).requires_grad_(),
            "y": torch.randint(targets, (batch,), generator=generator, device=device),
            "index": order[:targets],
            "map": functional.segments(order.view(targets, -1).cpu(), sources).to(device),
            "g": torch.ones((), device=device),
            "rows": _normal((batch, targets), generator, device, half),
        }

    def indexed(i: Inputs, impl: str) -> Tensor:
        return functional.map_labels(i["logits"], i["index"], impl=impl)

    def loss(i: Inputs, impl: str) -> Tensor:
        return functional.mapped_cross_entropy(i["logits"], i["map"], i["y"], impl=impl)

    def counted(k: int | None) -> Callable[[Inputs, str], Tensor]:
        def count(i: Inputs, impl: str) -> Tensor:
            counts = torch.zeros((sources, targets), dtype=torch.int64, device=i["logits"].device)
            return functional.count_labels_(counts, i["logits"].detach(), i["y"], k=k, impl=impl)

        return count

    def rows(generator: torch.Generator, device: torch.device) -> Inputs:
        made = inputs(generator, device)
        return made | {"g": made["rows"]}

    title = f"B={batch} S={sources} T={targets}"
    return [
        Work("mapping", f"index forward {title}", ("forward",), inputs, indexed),
        Work("mapping", f"index backward {title}", ("gradient",), rows, indexed, ("logits",)),
        Work("mapping", f"loss forward {title}", ("segments forward",), inputs, loss),
        Work("mapping", f"loss backward {title}", ("segments gradient",), inputs, loss, ("logits",)),
        Work("mapping", f"count {title}", ("count",), inputs, counted(None), tolerance=0),
        Work("mapping", f"count top-3 {title}", ("count largest",), inputs, counted(3), tolerance=1e-3),
    ]


# ---- With what ----

_BLOCKS = [Block(b, s, 16, w) for b, w in ((512, 2), (1024, 4), (2048, 8), (2048, 4)) for s in (1, 2, 4)]
_BLOCKS += [Block(1024, 2, chunk, 4) for chunk in (8, 32)]
_TILES = [Tile(r, c, w, s) for r, c, w in ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8), (32, 64, 4)) for s in (2, 3)]
_TILES += [Tile(32, 128, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)]
_LAUNCHES = [Launch(r, c, w) for r, c, w in ((4, 128, 4), (8, 128, 4), (16, 128, 4), (8, 128, 8), (2, 512, 4), (4, 256, 8))]
_COUNTS = [Launch(r, c, w) for r, c, w in ((1, 1024, 4), (1, 1024, 8), (1, 2048, 4), (1, 2048, 8), (2, 1024, 8))]
_ELEMENTS = [Elements(e, w) for e in (512, 1024, 2048) for w in (2, 4, 8)]
_ROWS = [Rows(r, c, w) for r, c, w in ((4, 512, 4), (8, 512, 8), (2, 1024, 4), (1, 2048, 4), (8, 256, 4), (4, 1024, 8))]


def candidates(family: str, kernel: Any, present: Any) -> list[Any]:
    """The launches that are tried for a kernel, the present one first."""
    if family == "perturbation":
        walks = kernel in ("prompt_gradient", "cells_gradient")
        tried: list[Any] = _BLOCKS if walks or kernel == "forward" else [b for b in _BLOCKS if b.SAMPLES == 1]
    elif family == "attention":
        tried = _TILES
    elif family == "mapping":
        tried = _ELEMENTS if isinstance(present, Elements) else _COUNTS if kernel.startswith("count") else _LAUNCHES
    elif kernel == "add":
        tried = [
            replace(present, ROWS=r, COLUMNS=c, programs=n) for r, c in ((8, 256), (4, 256), (8, 512)) for n in (264, 528, 1056)
        ]
    else:
        tried = [replace(launch, programs=present.programs) for launch in _ROWS]
    return [present, *(launch for launch in tried if launch != present)]


def label(launch: Any) -> str:
    return " ".join(f"{name.lower()} {size}" for name, size in asdict(launch).items())


# ---- The machine ----


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Autograd replays a backward pass on its forward's stream, and a graph needs another one than the default."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def _replay(calls: list[Call], device: torch.device) -> Callable[[], float]:
    """Runs one call for each input set; the seconds of one."""
    if device.type != "cuda":

        def on_host() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return on_host
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(calls)

    return on_gpu


def differs(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether an answer is further from the truth than that part of the truth's largest value; NaN is."""
    for out, true in zip(found, truth, strict=True):
        true = true.detach().double()
        distance = float((out.detach().double() - true).abs().max())
        if not distance <= tolerance * max(float(true.abs().max()), 1e-30):
            return True
    return False


def table_of(family: str, arch: str) -> dict[Any, Any]:
    return import_module(f"fastprompt.tuning.{family}").launches(arch)


def impl_here(device: torch.device) -> str:
    return "auto" if device.type == "cuda" else "triton"


def compile_ahead(families: list[str], seconds: float, processes: int | None = None) -> list[int]:
    """Fills Triton's cache with every candidate in processes that each launch their share once. Their exit codes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(14, cores - 2)) if processes is None else processes
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    code = "import sys; from fastprompt.tune import launch_share; launch_share(sys.argv[1].split(','), *map(int, sys.argv[2:]))"
    command, end = [sys.executable, "-c", code, ",".join(families)], time.monotonic() + seconds
    started = [
        subprocess.Popen(
            [*command, str(share), str(count)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for share in range(count)
    ]
    codes = []
    for child in started:
        try:
            codes.append(child.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            child.kill()
            codes.append(child.wait())
    return codes


def launch_share(families: list[str], share: int, shares: int) -> None:
    """Launches every candidate whose turn it is once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launches = {family: table_of(family, _runtime.arch(device)) for family in families}
    turn = 0
    for work in (work for family in families for work in works(family, device.type == "cpu")):
        call = None
        for kernel in work.kernels:
            table = launches[work.family]
            for launch in candidates(work.family, kernel, table[kernel]):
                turn += 1
                if turn % shares != share:
                    continue
                with _measured.trying(table, kernel, launch), contextlib.suppress(Exception):  # told when it is measured
                    call = call or work.bind(work.inputs(torch.Generator(device).manual_seed(0), device), impl_here(device))
                    call()


def measure(work: Work, device: torch.device, seconds: float, most: int | None = None) -> dict[Any, dict[Any, float]]:
    """{kernel: {launch: seconds a call}} of those launches that give the right answer, the present one first.

    Raises:
        RuntimeError: the present launch gives a wrong answer.
    """
    impl, arch = impl_here(device), _runtime.arch(device)
    generator = torch.Generator(device).manual_seed(0)
    first = work.inputs(generator, device)
    held = sum(t.nbytes for t in first.values() if isinstance(t, Tensor))
    count = 2 if device.type == "cpu" else max(2, min(64, -(-COLD // max(held, 1))))
    sets = [first, *(work.inputs(generator, device) for _ in range(count - 1))]
    calls = [work.bind(inputs, impl) for inputs in sets]
    truth = tuple(t.detach() for t in work.bind(first, "torch")())
    launches, found = table_of(work.family, arch), {}
    for kernel in work.kernels:
        tried = candidates(work.family, kernel, launches[kernel])[:most]
        replays: dict[Any, Callable[[], float]] = {}
        for launch in tried:
            with _measured.trying(launches, kernel, launch):
                try:
                    wrong = differs(calls[0](), truth, work.tolerance)
                    if not wrong:
                        replays[launch] = _replay(calls, device)
                except Exception as failure:  # it does not fit the machine
                    if launch == tried[0]:
                        raise
                    print(f"  {kernel} {label(launch)}: {type(failure).__name__}")
                    continue
            if wrong and launch == tried[0]:
                raise RuntimeError(f"{work.title}: the present launch of {kernel} gives a wrong answer")
            if wrong:
                print(f"  {kernel} {label(launch)}: wrong answer, left out")
        found[kernel] = _interleaved(replays, launches, kernel, seconds / len(work.kernels), device)
    return found


def _interleaved(
    replays: dict[Any, Callable[[], float]], launches: dict[Any, Any], kernel: Any, seconds: float, device: torch.device
) -> dict[Any, float]:
    samples: dict[Any, list[float]] = {launch: [] for launch in replays}
    order, start = list(replays), time.perf_counter()
    while len(samples[order[0]]) < 3 or time.perf_counter() - start < seconds:
        random.shuffle(order)
        for launch in order:
            with _measured.trying(launches, kernel, launch):  # a graph has its launch inside; a host's call reads the table
                samples[launch].append(replays[launch]())
    return {launch: statistics.median(samples[launch]) for launch in replays}


def tune(families: list[str] | None = None, *, dry: bool = False, minutes: float = 8.0, path: str | None = None) -> Path:
    """Measures, writes the file after every shape and returns where it lies. What the time was too short for, or what failed,
    keeps its launch and is listed.

    Raises:
        RuntimeError: no GPU, and not dry; or, at the end, a kernel whose present launch fails or gives a wrong answer.
        ValueError: a family that has no launches.
    """
    for family in families or ():
        if family not in _measured.FAMILIES:
            raise bad("family", "one of " + ", ".join(_measured.FAMILIES), repr(family))
    if not _runtime.HAS_TRITON or not (torch.cuda.is_available() or (dry and _runtime.INTERPRETING)):
        raise RuntimeError("launches are measured on a GPU with Triton; --dry tries the command on a CPU")
    device = torch.device("cpu" if dry else f"cuda:{torch.cuda.current_device()}")
    arch = _runtime.arch(device)
    gpu = _measured.gpu_name(arch)
    assert gpu is not None
    to = Path(path) if path else _measured.target(gpu)
    chosen = {family: dict(table_of(family, arch)) for family in _measured.FAMILIES} if to.is_file() else {}
    facts = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch.__version__}
    facts["triton"] = import_module("triton").__version__
    todo = [work for family in families or _measured.FAMILIES for work in works(family, dry)]
    times: dict[tuple[str, Any], list[dict[Any, float]]] = {}
    report: dict[str, Any] = {}
    failed, start = [], time.perf_counter()
    if not dry:
        codes = compile_ahead(list(families or _measured.FAMILIES), 20 * minutes)
        print(f"compiled ahead by {len(codes)} processes in {time.perf_counter() - start:.0f} s", flush=True)
    with _own_stream(device):
        for work in todo:
            if time.perf_counter() - start > 60 * minutes:
                print(f"not measured, the time was up: {work.title}")
                continue
            print(work.title, flush=True)
            try:
                found_of = measure(work, device, 0.01 if dry else 1.0, 2 if dry else None)
            except Exception as failure:
                failed.append(f"{work.title}: {type(failure).__name__}: {failure}"[:400])
                print(f"  failed: {failed[-1]}", flush=True)
                continue
            for kernel, found in found_of.items():
                times.setdefault((work.family, kernel), []).append(found)
                ranked = sorted(found, key=found.__getitem__)
                report[f"{work.title}: {_measured._name(kernel)}"] = {label(c): round(found[c] * 1e6, 2) for c in ranked}
                for launch in ranked[:3]:
                    present = "  (present)" if launch == next(iter(found)) else ""
                    print(f"  {_measured._name(kernel):20}{found[launch] * 1e6:>10.1f} us  {label(launch)}{present}")
                chosen.setdefault(work.family, {})[kernel] = best(times[work.family, kernel])
            _measured.write(to, gpu, arch, chosen, conditions=facts, microseconds=report)
    _measured.forget()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} shapes failed: {'; '.join(failed)}")
    print(f"written: {to}")
    return to


def best(found: list[dict[Any, float]]) -> Any:
    """The launch with the least product of times over all shapes of a kernel; the present one unless it gains."""
    present = next(iter(found[0]))
    everywhere = [launch for launch in found[0] if all(launch in times for times in found)]
    cost = {launch: sum(math.log(times[launch]) for times in found) / len(found) for launch in everywhere}
    fastest = min(everywhere, key=cost.__getitem__)
    return fastest if cost[present] - cost[fastest] > math.log(GAIN) else present
