"""Cases, and how one is run: every provider's answer is checked against float64 first, and a wrong answer gets no time."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastprompt

from . import timing

ROOT = Path(__file__).resolve().parents[1]  # of the source tree; in a wheel, the package
Inputs = dict[str, Any]
Form = Callable[[Inputs], Tensor]

FAMILIES = ("perturbation", "embedding", "attention", "mapping", "reprogrammed", "clip", "instruction", "steps")


class Skip(Exception):
    """A provider that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        forms: what is compared, each from the inputs to the output; the first one is fastprompt.
        formula: the same in plain PyTorch, run on the inputs in float64: the truth.
        inputs: makes random inputs on a device from a generator; what needs a gradient has requires_grad set.
        mode: "forward", "backward" (the gradients alone, from one forward pass) or "both".
        wrt: names of the inputs whose gradients are asked for.
        best: the forms that stand for the best plain PyTorch (goal C9).
        bytes: that must move: each input read once, each output written once. flops: that must be computed.
        tolerance: largest error, relative to 1 + |truth| (forward) or to the largest |truth| (gradients).
        loose: a wider tolerance for forms that compute something slightly different by design.
        items: what one call works through, in `unit`s, for a throughput.
    """

    family: str
    name: str
    shape: str
    mode: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator, torch.device], Inputs]
    forms: dict[str, Form]
    formula: Form
    wrt: tuple[str, ...]
    bytes: int
    flops: int = 0
    tolerance: float = 0.0
    best: tuple[str, ...] = ("plain",)
    loose: dict[str, float] = field(default_factory=dict)
    items: int = 0
    unit: str = "samples"

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family}/{self.name} {self.mode} {self.shape} {dtype}"


def load(family: str) -> Callable[..., list[Case]]:
    """The `cases(device, dtype)` of a family."""
    return _module(family).cases


def _module(family: str) -> Any:
    return import_module(f"{__package__}.{family}")


def available() -> list[str]:
    return [name for name in FAMILIES if (Path(__file__).parent / f"{name}.py").exists()]


# ---- The choice of cases ----


def prepare(options: Namespace) -> torch.device:
    """Sets threads and clock as the options say."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: there is no GPU here")
    if options.busy:
        timing.host_clock = time.process_time
    if options.threads or options.busy:
        torch.set_num_threads(options.threads or 1)
    return device


def own_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """CUDA graphs need another stream than the default one."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()


def choose(options: Namespace, device: torch.device) -> list[Case]:
    """The cases that the options name. ValueError says which sizes or rivals there are when one is unknown."""
    families = options.family or available()
    dtypes = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    made = [case for sizes in options.shape or () for dtype in dtypes for case in _sized(families, sizes, getattr(torch, dtype))]
    if not options.shape:
        made = [case for family in families for dtype in dtypes for case in load(family)(device, getattr(torch, dtype))]
    made = [case for case in made if options.case in case.title]
    if options.rival:
        known = {name for case in made for name in _rivals(case)}
        if unknown := sorted(set(options.rival) - known):
            raise ValueError(f"--rival {unknown[0]!r}: these cases have {', '.join(sorted(known)) or 'none'}")
        made = [case for case in made if set(options.rival) & set(_rivals(case))]
    return made


def _sized(families: Sequence[str], sizes: dict[str, int], dtype: torch.dtype) -> list[Case]:
    """The cases of a family's `SIZED` that have all these sizes; the other sizes keep their defaults."""
    builders = {f"{family}/{name}": build for family in families for name, build in getattr(_module(family), "SIZED", {}).items()}
    names = {title: dict(list(signature(build).parameters.items())[1:]) for title, build in builders.items()}
    found = [case for title, build in builders.items() if sizes.keys() <= names[title].keys() for case in build(dtype, **sizes)]
    if not found:
        known = "\n".join(f"  {title:36} {','.join(f'{n}={p.default}' for n, p in own.items())}" for title, own in names.items())
        raise ValueError(f"--shape: no case has all of {', '.join(sizes)}. Sizes and their defaults:\n{known}")
    return found


def _rivals(case: Case) -> list[str]:
    return [*list(case.forms)[1:], *(["compile"] if "eager" in case.forms else [])]


# ---- One provider ----


def bind(form: Form, case: Case, inputs: Inputs) -> timing.Call:
    """A call without arguments that does the case's work on these inputs and returns a tuple of tensors."""
    if case.mode == "forward":
        return lambda: (form(inputs),)
    wanted = [inputs[name] for name in case.wrt]
    if case.mode == "both":
        return lambda: torch.autograd.grad(form(inputs), wanted, inputs["g"])
    out = form(inputs)
    return lambda: torch.autograd.grad(out, wanted, inputs["g"], retain_graph=True)


def in_dtype(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
    """The same values, floating point in that dtype."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def error(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...], mode: str) -> float:
    """The largest error, relative as `Case.tolerance` says; NaN counts as infinite."""
    worst = 0.0
    for out, true in zip(outputs, truth, strict=True):
        if out.shape != true.shape:
            return math.inf
        scale = 1 + true.abs() if mode == "forward" else true.abs().max().clamp(min=1e-30)
        wrong = ((out.detach().double() - true) / scale).abs().max()
        worst = max(worst, math.inf if bool(wrong.isnan()) else float(wrong))
    return worst


def sentence(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:160]}"


def truth_of(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The formula's answer in float64; in float32, for a case of 16 bits, where a GPU has no room for that."""
    try:
        return _in(torch.float64, case, inputs)
    except torch.OutOfMemoryError:
        if case.dtype.itemsize > 2:
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return _in(torch.float32, case, inputs)


def _in(dtype: torch.dtype, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in bind(case.formula, case, in_dtype(inputs, dtype))())


# ---- One case ----


def _compiled(form: Form) -> Form:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # backward is timed with a retained graph
    return torch.compile(form, dynamic=False, fullgraph=True)


def run(
    case: Case, device: torch.device, ceilings: dict[str, float], *, quick: bool = False, rivals: Sequence[str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Checks and times a case, beside these rivals (None: all). Everything that is printed is in the result.

    quick: without torch.compile, unless `rivals` names it. seconds: of timing for each form (default: 1, quick 0.15).
    """
    generator = torch.Generator(device).manual_seed(0)
    first = case.inputs(generator, device)
    truth = truth_of(case, first)
    true_dtype = next((t.dtype for t in truth if t.is_floating_point()), torch.float64)
    tensors = [value for value in first.values() if isinstance(value, Tensor)]
    set_bytes = sum(t.nbytes for t in tensors) + sum(t.numel() for t in truth) * case.dtype.itemsize
    count = timing.sets_needed(set_bytes, device)
    sets = [first, *(case.inputs(generator, device) for _ in range(count - 1))]

    forms = {name: form for place, (name, form) in enumerate(case.forms.items()) if not place or rivals is None or name in rivals}
    if "eager" in case.forms and (not quick if rivals is None else "compile" in rivals):
        forms["compile"] = _compiled(case.forms["eager"])
    written = [t._version for t in tensors]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[timing.Call]] = {}
    for name, form in forms.items():
        row: dict[str, Any] = {}
        rows[name] = row
        try:
            start = time.perf_counter()
            call = bind(form, case, first)
            outputs = call()
            row["first_call_s"] = time.perf_counter() - start
            row["error"] = error(outputs, truth, case.mode)
            del outputs
            if row["error"] > case.loose.get(name, case.tolerance):
                row["refused"] = f"wrong answer: error {row['error']:.2g}"
                continue
            if [t._version for t in tensors] != written:
                raise RuntimeError("it writes into the inputs that all providers share")
            calls[name] = [call, *(bind(form, case, inputs) for inputs in sets[1:])]
            row["peak_bytes"] = timing.peak_memory(call, device)
            row["launches"] = timing.launches(call, device)
            row["page_faults"] = timing.page_faults(call, device)
        except Skip as reason:
            row["refused"] = f"not here: {reason}"
        except Exception as failure:  # a rival that breaks is a result, not the end of the run
            row["refused"] = f"failed: {sentence(failure)}"
            calls.pop(name, None)
    ours = next(iter(forms))
    if ours in calls:
        calls["A/A"] = calls[ours]
    failed: dict[str, Exception] = {}
    times = timing.compare(calls, device, seconds or (0.15 if quick else 1.0), failed)
    for name, why in failed.items():
        rows.setdefault(ours if name == "A/A" else name, {})["refused"] = f"failed: {sentence(why)}"
    if not {ours, "A/A"} <= times.keys():
        times = {name: taken for name, taken in times.items() if name not in (ours, "A/A")}
    for name, taken in times.items():
        rows.setdefault(name, {}).update(
            median_s=taken.median, p20_s=taken.p20, p80_s=taken.p80, samples=taken.samples, clock=taken.clock
        )
    floor = max(case.bytes / ceilings["copy"], case.flops / ceilings["matmul"])
    result = {
        "family": case.family, "case": case.name, "mode": case.mode, "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes, "flops": case.flops,
        "floor_s": floor, "sets": count, "cold": set_bytes * count >= timing.COLD_BYTES[device.type],
        "best": [name for name in case.best if name in times], "rows": rows,
    }  # fmt: skip
    result |= {"items": case.items, "unit": case.unit} if case.items else {}
    result |= {"truth": "float32, float64 has no room"} if true_dtype == torch.float32 else {}
    if ours in times:
        base = times[ours].median
        result["noise"] = abs(times["A/A"].median / base - 1)
        result["of_copy_ceiling"] = case.bytes / base / ceilings["copy"]
        result["speedup"] = {n: times[n].median / base for n in times if n not in (ours, "A/A")}
    if "frozen" in times:
        result["overhead"] = {n: t.median / times["frozen"].median for n, t in times.items() if n not in ("frozen", "A/A")}
    del calls, sets, first, truth
    gc.collect()
    return result


def text(result: dict[str, Any]) -> str:
    """A result as aligned lines that can be pasted."""

    def us(seconds: float) -> str:
        return f"{seconds * 1e6:,.1f}"

    head = f"{result['family']}/{result['case']} {result['mode']}  {result['shape']} -> {result['dtype']}"
    if result.get("items") and "noise" in result:
        ours = next(iter(result["rows"].values()))
        head += f"  {result['items'] / ours['median_s']:,.0f} {result['unit']}/s"
    facts = f"floor {us(result['floor_s'])} us ({result['bytes'] / 1e6:,.1f} MB)"
    if "noise" in result:
        facts += f", {result['of_copy_ceiling']:.0%} of the copy ceiling, A/A {result['noise']:.1%}"
    facts += "" if result["cold"] else ", warm cache"
    facts += f", truth in {result['truth']}" if "truth" in result else ""
    lines = [head, f"  {facts}"]
    overhead = result.get("overhead", {})
    over = f"{'vs frozen':>11}" if overhead else ""
    # What a call costs besides bytes: launches on a GPU, page faults of fresh memory on a CPU.
    extra = "launches" if any(row.get("launches") is not None for row in result["rows"].values()) else "page_faults"
    lines.append(
        f"  {'':14}{'median us':>12}{'p20':>12}{'p80':>12}{'vs ours':>9}{over}{'peak MB':>9}{extra.removeprefix('page_'):>9}"
        f"{'error':>9}  clock"
    )
    for name, row in result["rows"].items():
        if "refused" in row:
            lines.append(f"  {name:14}  {row['refused']}")
            continue
        if name == "A/A":
            continue
        ratio = result.get("speedup", {}).get(name)
        lost = " LOSS" if name in result["best"] and ratio and ratio < 0.95 else ""
        over = f"{f'{overhead[name]:.2f}x' if name in overhead else '':>11}" if overhead else ""
        lines.append(
            f"  {name:14}{us(row['median_s']):>12}{us(row['p20_s']):>12}{us(row['p80_s']):>12}"
            f"{f'{ratio:.2f}x' if ratio else '':>9}{over}{row['peak_bytes'] / 1e6:>9.1f}"
            f"{'' if row[extra] is None else row[extra]:>9}{row['error']:>9.1e}  {row['clock']}{lost}"
        )
    return "\n".join(lines)


# ---- Conditions ----


def conditions(device: torch.device) -> dict[str, Any]:
    """Everything that a number needs beside it."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    checkout = (ROOT / ".git").exists()  # an installed package may lie in somebody else's
    git = ("git", "-C", str(ROOT))
    try:
        triton = import_module("triton").__version__
    except ImportError:
        triton = None
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": (output(*git, "rev-parse", "--short=12", "HEAD") if checkout else "") or "unknown",
        "changed_files": output(*git, "status", "--porcelain", "--", "fastprompt", "kernels").splitlines() if checkout else [],
        "fastprompt": fastprompt.__version__,
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton,
        "device": _cpu_name(), "threads": torch.get_num_threads(),
        "system": platform.platform(), "huge_pages": huge_pages(), "command": " ".join(sys.argv),
    }  # fmt: skip
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


def huge_pages() -> str | None:
    """Whether large tensors on the host are made of huge pages: the kernel's setting, then PyTorch's. Page faults of fresh
    outputs are most of the time of a cheap pass on a CPU."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return None
    chosen = setting.read_text().partition("[")[2].partition("]")[0]
    return f"{chosen}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
