"""Cases, and how one is run: every provider's answer is checked against float64 first, and a wrong answer gets no time."""

from __future__ import annotations

import gc
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing

Inputs = dict[str, Any]
Form = Callable[[Inputs], Tensor]

FAMILIES = ("perturbation", "embedding", "attention", "mapping", "reprogrammed", "instruction")


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

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family}/{self.name} {self.mode} {self.shape} {dtype}"


def load(family: str) -> Callable[..., list[Case]]:
    """The `cases(device, dtype)` of a family."""
    return import_module(f"benchmarks.{family}").cases


def available() -> list[str]:
    return [name for name in FAMILIES if (Path(__file__).parent / f"{name}.py").exists()]


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


def in_float64(inputs: Inputs) -> Inputs:
    """The same values, floating point as float64."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

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


def truth_of(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in bind(case.formula, case, in_float64(inputs))())


# ---- One case ----


def _compiled(form: Form) -> Form:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # backward is timed with a retained graph
    return torch.compile(form, dynamic=False, fullgraph=True)


def run(case: Case, device: torch.device, ceilings: dict[str, float], *, quick: bool = False) -> dict[str, Any]:
    """Checks and times a case. Everything that is printed is in the result."""
    generator = torch.Generator(device).manual_seed(0)
    first = case.inputs(generator, device)
    truth = truth_of(case, first)
    tensors = [value for value in first.values() if isinstance(value, Tensor)]
    set_bytes = sum(t.nbytes for t in tensors) + sum(t.numel() for t in truth) * case.dtype.itemsize
    count = timing.sets_needed(set_bytes, device)
    sets = [first, *(case.inputs(generator, device) for _ in range(count - 1))]

    forms = dict(case.forms)
    if "eager" in forms and not quick:
        forms["compile"] = _compiled(forms["eager"])
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
            calls[name] = [call, *(bind(form, case, inputs) for inputs in sets[1:])]
            row["peak_bytes"] = timing.peak_memory(call, device)
            row["launches"] = timing.launches(call, device)
        except Skip as reason:
            row["refused"] = f"not here: {reason}"
        except Exception as failure:  # a rival that breaks is a result, not the end of the run
            row["refused"] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0][:160]}"
    ours = next(iter(forms))
    if ours in calls:
        calls["A/A"] = calls[ours]
    times = timing.compare(calls, device, 0.15 if quick else 1.0)
    for name, taken in times.items():
        rows.setdefault(name, {}).update(
            median_s=taken.median, p20_s=taken.p20, p80_s=taken.p80, samples=taken.samples, clock=taken.clock
        )
    floor = max(case.bytes / ceilings["copy"], case.flops / ceilings["matmul"])
    result = {
        "family": case.family, "case": case.name, "mode": case.mode, "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes, "flops": case.flops,
        "floor_s": floor, "sets": count, "best": [name for name in case.best if name in times], "rows": rows,
    }  # fmt: skip
    if ours in times:
        base = times[ours].median
        result["noise"] = abs(times["A/A"].median / base - 1)
        result["of_copy_ceiling"] = case.bytes / base / ceilings["copy"]
        result["speedup"] = {n: times[n].median / base for n in times if n not in (ours, "A/A")}
    del calls, sets, first, truth
    gc.collect()
    return result


def text(result: dict[str, Any]) -> str:
    """A result as aligned lines that can be pasted."""

    def us(seconds: float) -> str:
        return f"{seconds * 1e6:,.1f}"

    head = f"{result['family']}/{result['case']} {result['mode']}  {result['shape']} -> {result['dtype']}"
    facts = f"floor {us(result['floor_s'])} us ({result['bytes'] / 1e6:,.1f} MB)"
    if "noise" in result:
        facts += f", {result['of_copy_ceiling']:.0%} of the copy ceiling, A/A {result['noise']:.1%}"
    lines = [head, f"  {facts}"]
    lines.append(
        f"  {'':14}{'median us':>12}{'p20':>12}{'p80':>12}{'vs ours':>9}{'peak MB':>9}{'launches':>9}{'error':>9}  clock"
    )
    for name, row in result["rows"].items():
        if "refused" in row:
            lines.append(f"  {name:14}  {row['refused']}")
            continue
        if name == "A/A":
            continue
        ratio = result.get("speedup", {}).get(name)
        lost = " LOSS" if name in result["best"] and ratio and ratio < 0.95 else ""
        lines.append(
            f"  {name:14}{us(row['median_s']):>12}{us(row['p20_s']):>12}{us(row['p80_s']):>12}"
            f"{f'{ratio:.2f}x' if ratio else '':>9}{row['peak_bytes'] / 1e6:>9.1f}"
            f"{'' if row['launches'] is None else row['launches']:>9}{row['error']:>9.1e}  {row['clock']}{lost}"
        )
    return "\n".join(lines)


# ---- Conditions ----


def conditions(device: torch.device) -> dict[str, Any]:
    """Everything that a number needs beside it."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError:
            return ""

    root = str(Path(__file__).parent.parent)
    try:
        triton = import_module("triton").__version__
    except ImportError:
        triton = None
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "-C", root, "rev-parse", "--short=12", "HEAD") or "unknown",
        "changed_files": output("git", "-C", root, "status", "--porcelain", "--", "fastprompt", "kernels").splitlines(),
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton,
        "device": _cpu_name(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
