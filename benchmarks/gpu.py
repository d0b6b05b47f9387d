"""`python -m benchmarks.gpu`: all that a machine with a GPU can tell, in one command and at most ten minutes.

Checks on the hardware (answers in every dtype, determinism, CUDA graphs, host syncs and host cost, the first call on a cold
cache), the benchmark battery, a sweep of launch configurations, the demo and the tests. Every part has its own share of the
time; a part that fails is recorded, the others still run, and the exit code is 1. Results go to gpu.json and gpu.txt.

With --dry the same runs on a CPU, cut short: only what calls CUDA is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported

import torch

from fastprompt import functional
from fastprompt.ops import attention as attention_ops
from fastprompt.ops import mapping as mapping_ops
from fastprompt.ops import perturbation as perturbation_ops
from fastprompt.tuning import mapping as mapping_tuning
from fastprompt.tuning.attention import Tile
from fastprompt.tuning.perturbation import Launch

from . import attention, mapping, perturbation, suite, timing

ROOT = Path(__file__).parent.parent
SHARES = {  # of the time
    "checks": 0.17, "attention": 0.18, "perturbation": 0.12, "mapping": 0.05, "reprogrammed": 0.08, "sweep": 0.18,
    "demo": 0.05, "tests": 0.17,
}  # fmt: skip


# ---- Checks ----


def _shapes(device: torch.device, dry: bool) -> list[suite.Case]:
    """One case of every kind of gradient."""
    batch, dtype = (2, torch.float32) if dry else (256, torch.bfloat16)
    make = [perturbation.padded(batch, 192, 224, dtype, ("both",)), perturbation.framed(batch, None, dtype, ("both",))]
    make += [perturbation.framed(batch, 30, dtype, ("both",), prompts=10), perturbation.masked(batch, dtype, ("both",))]
    length = 24 if dry else 512
    for causal, heads in ((True, (8, 2)), (False, (6, 6))):
        make.append(attention.shared("attention", 2, heads, length, length, 20, 64, dtype, ("both",), causal=causal))
    make.append(attention.shared("decode", 8, (8, 2), 1, length, 40, 64, dtype, ("both",)))
    make.append(mapping.mapped_loss(batch, 1000, 10, dtype))
    make += [mapping.many_to_one(batch, 1000, 10, 100, reduce, dtype) for reduce in ("mean", "probabilities", "top-3 mean")]
    return [case for cases in make for case in cases if case.mode == "both"]


def _inputs(case: suite.Case, device: torch.device) -> suite.Inputs:
    return case.inputs(torch.Generator(device).manual_seed(1), device)


def _ours(case: suite.Case) -> suite.Form:
    return next(iter(case.forms.values()))


def check_answers(device: torch.device, dry: bool) -> dict[str, float]:
    """Every case of the battery in float32, float16 and bfloat16 against float64."""
    errors = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases = [case for family in (perturbation, attention, mapping) for case in family.cases(device, dtype)]
        for case in [case for case in cases if not dry or case.name in ("demo size", "series", "CoOp") or " B=32 " in case.title]:
            inputs = _inputs(case, device)
            truth = suite.truth_of(case, inputs)
            found = suite.error(suite.bind(_ours(case), case, inputs)(), truth, case.mode)
            errors[case.title] = found
            assert found <= case.tolerance, f"{case.title}: error {found:.2g}, allowed {case.tolerance:.2g}"
    return {"cases": len(errors), "largest": max(errors.values())}


def check_determinism(device: torch.device, dry: bool) -> dict[str, int]:
    """The same bits in 100 runs."""
    runs = 3 if dry else 100
    for case in _shapes(device, dry):
        call = suite.bind(_ours(case), case, _inputs(case, device))
        first = call()
        for _ in range(runs):
            assert all(map(torch.equal, call(), first)), f"{case.title}: other bits in another run"
    return {"runs": runs}


def check_graph(device: torch.device, dry: bool) -> dict[str, int]:
    """A CUDA graph of forward and backward gives the eager bits, on new inputs too."""
    for case in _shapes(device, dry):
        inputs = _inputs(case, device)
        call = suite.bind(_ours(case), case, inputs)
        call()
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                captured = call()
            with torch.no_grad():
                inputs["g"].mul_(2)
                next(inputs[name] for name in ("prompt", "prefix_k", "logits") if name in inputs).mul_(0.5)
            graph.replay()
            assert all(map(torch.equal, captured, call())), f"{case.title}: the replay differs"
    return {"graphs": len(_shapes(device, dry))}


def check_syncs(device: torch.device, dry: bool) -> dict[str, int]:
    """No forward or backward waits for the device."""
    for case in _shapes(device, dry):
        call = suite.bind(_ours(case), case, _inputs(case, device))
        call()
        with _no_syncs(device):
            call()
    return {"syncs": 0}


@contextlib.contextmanager
def _no_syncs(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_host_cost(device: torch.device, dry: bool) -> dict[str, float]:
    """Host microseconds a call, on inputs so small that the device is never waited for."""
    count = 20 if dry else 1000
    calls = perturbation.host_calls(device) | _loss_calls(device)
    return {name: round(timing.host_cost(call, count, device) * 1e6, 2) for name, call in calls.items()}


def _loss_calls(device: torch.device) -> dict[str, timing.Call]:
    """A mapped loss, by an index and by segments."""
    labels = functional.segments([[t, t + 10] for t in range(10)], 20).to(device)
    logits, y = torch.randn(8, 20, device=device).requires_grad_(), torch.arange(8, device=device)
    plain = logits.detach()
    index = labels.members[:10]

    def step(form: Any) -> Any:
        return lambda: torch.autograd.grad(functional.mapped_cross_entropy(logits, form, y), logits)

    return {
        "map, index": lambda: functional.map_labels(plain, index),
        "map, segments": lambda: functional.map_labels(plain, labels),
        "loss, index": lambda: functional.mapped_cross_entropy(plain, index, y),
        "loss, segments": lambda: functional.mapped_cross_entropy(plain, labels, y),
        "loss and gradient, index": step(index),
        "loss and gradient, segments": step(labels),
    }


COLD = """
import random, sys, time
start = time.perf_counter()
import torch
from fastprompt.nn import LabelMap, PaddedPrompt
device, batches = sys.argv[1], int(sys.argv[2])
prompt = PaddedPrompt(224, 32, mean=0.5, std=0.25).to(device)
labels = LabelMap(1000, 10).to(device)
def step(batch):
    x = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    out = prompt(x)
    logits = out.mean((2, 3)).repeat(1, 334)[:, :1000]
    torch.nn.functional.cross_entropy(labels(logits), torch.zeros(batch, dtype=torch.int64, device=device)).backward()
    if device == "cuda": torch.cuda.synchronize()
step(64)
print("first", time.perf_counter() - start, flush=True)
sys.stdin.readline()
random.seed(0)
for _ in range(batches): step(random.randint(2, 256))
"""


def check_cold(device: torch.device, dry: bool) -> dict[str, float]:
    """Seconds from the start of Python to the end of a first training step, and kernels compiled for new batch sizes."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", COLD, device.type, "2" if dry else "100"]
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert child.stdout is not None
        assert child.stdout.readline().startswith("first"), "the first step failed"
        first, before = time.perf_counter() - start, len(list(Path(cache).rglob("*.cubin")))
        child.communicate("\n", timeout=120)
        more = len(list(Path(cache).rglob("*.cubin"))) - before
    assert child.returncode == 0, "a step with another batch size failed"
    return {"first_step_s": round(first, 2), "kernels": before, "compiled_for_new_batch_sizes": more}


CHECKS = (check_answers, check_determinism, check_graph, check_syncs, check_host_cost, check_cold)


def checks(device: torch.device, dry: bool, seconds: float) -> dict[str, Any]:
    """Runs every check; a failure does not stop the next one."""
    report: dict[str, Any] = {"failed": []}
    for check in CHECKS:
        name, start = check.__name__.removeprefix("check_"), time.perf_counter()
        try:
            report[name] = check(device, dry)
            verdict = "ok  "
        except Exception as failure:
            report[name] = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
            report["failed"].append(name)
            verdict = "FAIL"
        print(f"{verdict} {name:12} {report[name]}  ({time.perf_counter() - start:.1f} s)", flush=True)
    return report


# ---- Sweep of launch configurations ----

Choice = tuple[str, Callable[[timing.Call], timing.Call]]  # its name, and a call made with it

_TILES = ((512, 2), (1024, 4), (2048, 8), (2048, 4))  # BLOCK, num_warps
LAUNCHES = [Launch(block, samples, 16, warps) for block, warps in _TILES for samples in (1, 2, 4)]
LAUNCHES += [Launch(1024, 2, chunk, 4) for chunk in (8, 32)]
TILES = [Tile(r, c, w, s) for r, c, w in ((64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8), (32, 64, 4)) for s in (2, 3)]

_FORWARD = [{"ROWS": r, "ENTRIES": e, "num_warps": w, "turns": 1} for r, e, w in (
    (1, 64, 4), (2, 32, 4), (4, 16, 4), (4, 32, 4), (8, 8, 4), (8, 16, 4), (8, 16, 8), (16, 8, 4), (32, 4, 4), (32, 2, 4),
)]  # fmt: skip
_GRADIENT = [{"ROWS": r, "COLUMNS": c, "num_warps": w, "turns": n} for r, c, w, n in (
    (1, 1024, 4, 4), (1, 1024, 4, 8), (1, 1024, 4, 32), (1, 1024, 8, 16), (2, 1024, 4, 8), (4, 512, 4, 8), (4, 1024, 8, 8),
)]  # fmt: skip
SEGMENTS = {"forward": _FORWARD, "gradient": _GRADIENT}


def sweep(device: torch.device, dry: bool, seconds: float) -> dict[str, Any]:
    """Times launch configurations on the goal shapes; the one in use is marked. Wrong answers are left out."""
    batch, dtype = (2, torch.float32) if dry else (256, torch.bfloat16)
    length, heads = (32, (2, 1)) if dry else (2048, (32, 8))
    steps = ("forward", "backward")
    plans: list[tuple[suite.Case, list[Choice]]] = []
    make = [perturbation.padded(batch, size, 224, dtype, steps) for size in (32, 192)]
    make.append(perturbation.framed(batch, None, dtype, steps, name="watermark"))
    for case in [case for cases in make for case in cases]:
        kernel = "forward" if case.mode == "forward" else "prompt_gradient"
        plans.append((case, [(_label(launch), _launched(kernel, launch)) for launch in LAUNCHES]))
    make = [attention.shared("Llama", 8, heads, length, length, 128, 128, dtype, steps, causal=True)]
    make.append(attention.shared("ViT-B", batch, (12, 12), 197, 197, 50, 64, dtype, steps) if not dry else [])
    for case in [case for cases in make for case in cases]:
        kernels = ("query",) if case.mode == "forward" else ("query", "own", "prefix")
        plans.append((case, [(f"{kernel} {_label(tile)}", _tiled(kernel, tile)) for kernel in kernels for tile in TILES]))
    make = [mapping.many_to_one(256 * batch, 1000, 10, 100, reduce, dtype) for reduce in ("mean", "probabilities")]
    make.append(mapping.mapped_loss(256 * batch, 1000, 10, dtype)[1:])  # forward there is one entry to read
    for case in [case for cases in make for case in cases]:
        kernel = "forward" if case.mode == "forward" else "gradient"
        plans.append((case, [(f"{kernel} {_label(change)}", _segmented(kernel, change)) for change in SEGMENTS[kernel]]))
    start, report = time.perf_counter(), {}
    for place, (case, choices) in enumerate(plans):
        share = start + seconds * (place + 1) / len(plans)
        generator = torch.Generator(device).manual_seed(0)
        first = case.inputs(generator, device)
        truth = suite.truth_of(case, first)
        sets = [first, *(case.inputs(generator, device) for _ in range(timing.sets_needed(case.bytes, device) - 1))]
        calls = {"in use": [suite.bind(_ours(case), case, inputs) for inputs in sets]}
        for name, chosen in choices[:2] if dry else choices:
            if time.perf_counter() > share:
                break
            tuned = [chosen(call) for call in calls["in use"]]
            try:
                if suite.error(tuned[0](), truth, case.mode) <= case.tolerance:
                    calls[name] = tuned
            except Exception as failure:
                print(f"{case.title}: {name}: {type(failure).__name__}", flush=True)
        times = timing.compare(calls, device, 0.01 if dry else 0.1)
        ranked = sorted(times, key=lambda name: times[name].median)
        report[case.title] = {name: times[name].median * 1e6 for name in ranked}
        print(f"{case.title}  floor bytes {case.bytes / 1e6:.1f} MB", flush=True)
        for name in ranked[:5] + [name for name in ranked[5:] if name == "in use"]:
            rate = case.bytes / times[name].median / 1e9
            print(f"  {name:28}{times[name].median * 1e6:>10.1f} us{rate:>10,.0f} GB/s  {times[name].clock}")
    return report


def _label(launch: Launch | Tile | dict[str, int]) -> str:
    if isinstance(launch, dict):
        return " ".join(f"{name.lower()} {size}" for name, size in launch.items())
    if isinstance(launch, Tile):
        return f"{launch.ROWS}x{launch.COLUMNS} warps {launch.num_warps} stages {launch.num_stages}"
    return f"{launch.BLOCK}x{launch.SAMPLES} chunk {launch.chunk} warps {launch.num_warps}"


def _with_pick(ops: Any, change: Callable[..., Any], name: str = "pick") -> Callable[[timing.Call], timing.Call]:
    """Calls during which `change(pick, ...)` chooses the launch."""

    def choose(call: timing.Call) -> timing.Call:
        original = getattr(ops, name)

        def run() -> Any:
            setattr(ops, name, partial(change, original))
            try:
                return call()
            finally:
                setattr(ops, name, original)

        return run

    return choose


def _launched(kernel: str, launch: Launch) -> Callable[[timing.Call], timing.Call]:
    """With another configuration of one perturbation kernel."""
    return _with_pick(perturbation_ops, lambda pick, name, *shape: launch if name == kernel else pick(name, *shape))


def _tiled(kernel: str, tile: Tile) -> Callable[[timing.Call], timing.Call]:
    """With another tile of one attention kernel."""
    return _with_pick(attention_ops, lambda pick, *shape, **facts: replace(pick(*shape, **facts), **{kernel: tile}))


def _segmented(kernel: str, change: dict[str, int]) -> Callable[[timing.Call], timing.Call]:
    """With another tile of one of the kernels for segments."""

    def changed(pick: Callable[..., mapping_tuning.Tile], name: str, **facts: Any) -> mapping_tuning.Tile:
        tile = pick(name, **facts)
        return replace(tile, **change) if name == kernel else tile

    return _with_pick(mapping_ops, changed, "pick_segments")


# ---- All parts ----


def _command(part: str, dry: bool, seconds: float, scratch: str) -> list[str]:
    """What runs a part; what it knows it writes to <scratch>/<part>.json."""
    python = [sys.executable, "-m"]
    if part in suite.FAMILIES:
        quick = {"perturbation": "demo size", "attention": "CoOp", "mapping": "B=32", "reprogrammed": "nothing"}
        only = ["--family", part, "--device", *(["cpu", "--quick", "--case", quick[part]] if dry else ["cuda"])]
        return [*python, "benchmarks", *only, "--seconds", str(0.85 * seconds), "--json", f"{scratch}/{part}.json"]
    if part == "demo":
        return [*python, "fastprompt", *(["methods"] if dry else ["demo", "--seeds", "1", "--out", f"{scratch}/demo"])]
    if part == "tests":
        plugins = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        plugins += ["--timeout", "120"] if importlib.util.find_spec("pytest_timeout") else []
        return [*python, "pytest", "-q", "-p", "no:cacheprovider", *(["-q", "--collect-only"] if dry else plugins), "tests"]
    own = [*python, "benchmarks.gpu", "--part", part, "--seconds", str(0.85 * seconds), "--out", scratch]
    return own + (["--dry"] if dry else [])


def _run(command: list[str], seconds: float, log: Any) -> int:
    """Runs a command in its own process group, its output to `log`; 124 when the time was up."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment | {"PYTHONUNBUFFERED": "1"}, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return 124


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts, or the one that is named; 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: %(default)s)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=SHARES, help="only these parts")
    parser.add_argument("--dry", action="store_true", help="on a CPU, cut short")
    parser.add_argument("--part", choices=("checks", "sweep"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here; --dry runs on the CPU", file=sys.stderr)
        return 1
    if options.part:
        random.seed(0)
        own_stream = contextlib.nullcontext() if options.dry else torch.cuda.stream(torch.cuda.Stream())
        with own_stream:
            found = {"checks": checks, "sweep": sweep}[options.part](device, options.dry, options.seconds)
        Path(options.out, f"{options.part}.json").write_text(json.dumps(found))
        return int(bool(found.get("failed")))

    start, out = time.perf_counter(), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    total = 60 * options.minutes - 20  # for what starts and ends
    report: dict[str, Any] = {"conditions": suite.conditions(device), "parts": {}}
    parts = [part for part in SHARES if part in (options.only or SHARES)]
    with (out / "gpu.txt").open("w+") as log, tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(report["conditions"], indent=1), file=log)
        for place, part in enumerate(parts):
            left = total - (time.perf_counter() - start)
            seconds = max(1.0, left * SHARES[part] / sum(SHARES[later] for later in parts[place:]))
            print(f"\n==== {part} ====", file=log, flush=True)
            begun = time.perf_counter()
            code = _run(_command(part, options.dry, seconds, scratch), seconds, log)
            log.seek(0, os.SEEK_END)
            spent = time.perf_counter() - begun
            held = Path(scratch, f"{part}.json")
            report["parts"][part] = {
                "exit_code": code, "seconds": round(spent, 1),
                "result": json.loads(held.read_text()) if held.exists() else {},
            }  # fmt: skip
            (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        verdicts = "\n".join(
            f"{part:8} {'FAILED ' + str(done['exit_code']) if done['exit_code'] else 'ok'}  {done['seconds']} s"
            for part, done in report["parts"].items()
        )
        print(f"\n==== summary ====\n{verdicts}", file=log, flush=True)
        log.seek(0)
        print(log.read())
    return int(any(done["exit_code"] for done in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
