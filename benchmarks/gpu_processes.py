"""What `benchmarks.gpu` runs in processes of their own: fresh Pythons, the test suite, compute-sanitizer and ncu."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastprompt import tune

from .gpu_checks import DTYPES, KERNELS

ROOT = Path(__file__).resolve().parents[1]


class NotHere(Exception):
    """A task that this machine cannot do, and why."""


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"} | more


def run(
    command: list[str], environment: dict[str, str], seconds: float, log: Path | None = None,
    hangs: Callable[[], bool] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs a command in its own process group. Its exit code is 124 when the time was up or it hangs; its output, which is added
    to `log`, what it had said."""
    with log.open("a+", errors="replace") if log else tempfile.TemporaryFile("w+", errors="replace") as said:
        start = said.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            command, cwd=ROOT, env=_environment(environment), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + seconds
        while True:
            try:
                code = child.wait(timeout=max(0.0, min(1.0, end - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() < end and not (hangs and hangs()):
                    continue
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                code = 124
                break
        said.seek(start)
        return subprocess.CompletedProcess(command, code, said.read())


def _python(command: list[str], environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *command], {"PYTHONPATH": str(ROOT), **environment}, seconds)


# ---- Fresh Pythons ----


GRAPH = """
import sys, torch, fastprompt
from fastprompt.nn import LabelMap, PaddedPrompt
device = sys.argv[1]
class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 16, 1000)
    def forward(self, x):
        return self.head(torch.nn.functional.avg_pool2d(x, 8).flatten(1))
torch.manual_seed(0)
model = fastprompt.Reprogrammed(Frozen(), inputs=PaddedPrompt(32, 16, mean=0.5, std=0.25), outputs=LabelMap(1000, 10)).to(device)
x = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device=device)
y = torch.arange(8, device=device)
wanted = model.trainable_parameters()
def step():
    return torch.autograd.grad(model.outputs.loss(model.source_logits(x), y), wanted)
fastprompt.warmup(model, x, step=lambda x: model.outputs.loss(model.source_logits(x), y))
if device == "cuda":
    # Warmed up and never run: the first step is the captured one.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, step())), "the replay differs"
else:
    assert all(map(torch.equal, step(), step()))
print("ok")
"""


def check_graph_cold(device: torch.device, dry: bool, left: Callable[[], float]) -> dict[str, str]:
    """In a new process with an empty cache: `fastprompt.warmup`, then a capture of the first step."""
    with tempfile.TemporaryDirectory() as cache:
        done = _python(["-c", GRAPH, device.type], {"TRITON_CACHE_DIR": cache}, max(10.0, min(120.0, left())))
    assert done.returncode == 0, done.stdout[-800:]
    return {"capture": "ok"}


COLD = """
import random, sys, time
start = time.perf_counter()
import torch
from fastprompt import functional
from fastprompt.nn import LabelMap, PaddedPrompt
device, batches = sys.argv[1], int(sys.argv[2])
prompt = PaddedPrompt(224 if batches > 9 else 32, 16, mean=0.5, std=0.25).to(device)
labels = LabelMap(1000, 10).to(device)
groups = functional.segments(torch.arange(1000).view(10, 100), 1000).to(device)
prefix = torch.randn(1, 2, 32, 64, device=device, requires_grad=True)
vocab, soft = torch.randn(99, 64, device=device), torch.randn(1, 8, 64, device=device, requires_grad=True)
columns = functional.label_columns(torch.arange(10, device=device), torch.randn(500, 64, device=device))
def logits(batch):
    x = torch.randint(256, (batch, 3, 16, 16), dtype=torch.uint8, device=device)
    return prompt(x).mean((2, 3)).repeat(1, 334)[:, :1000], torch.zeros(batch, dtype=torch.int64, device=device)
def images(batch):
    x, y = logits(batch)
    labels.loss(x, y).backward()
def many(batch):
    x, y = logits(batch)
    functional.mapped_cross_entropy(x, groups, y).backward()
def texts(batch):
    ids = functional.place_prompt(torch.zeros((batch, 20), dtype=torch.int64, device=device), 8)[0]
    q = functional.soft_gather(ids, vocab, soft)[:, None].expand(-1, 4, -1, -1)
    hidden = functional.prefix_attention(q, q[:, :2], q[:, :2], prefix, prefix, causal=True)[:, 0, -1]
    functional.label_head(hidden, columns, target=torch.zeros(batch, dtype=torch.int64, device=device)).backward()
for step in (images, many, texts): step(64)
if device == "cuda": torch.cuda.synchronize()
print("first", time.perf_counter() - start, flush=True)
random.seed(0)
for step in (images, many, texts):
    sys.stdin.readline()
    for _ in range(batches): step(random.randint(1, 512))
    print(step.__name__, flush=True)
"""


def check_cold(device: torch.device, dry: bool, left: Callable[[], float]) -> dict[str, Any]:
    """Seconds from the start of Python to the end of a first step of each kind, and the most kernels that 100 new batch sizes
    compile for one of them."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", COLD, device.type, "2" if dry else "100"]
        environment = _environment({"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)})
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as child:  # fmt: skip
            late = threading.Timer(max(10.0, left()), child.kill)
            late.start()
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                assert child.stdout.readline().startswith("first"), "the first step failed"
                first, counts = time.perf_counter() - start, [len(list(Path(cache).rglob("*.cubin")))]
                more = {}
                for kind in ("images", "many", "texts"):
                    child.stdin.write("\n")
                    child.stdin.flush()
                    assert child.stdout.readline().strip() == kind, f"{kind}: a step with another batch size failed"
                    counts.append(len(list(Path(cache).rglob("*.cubin"))))
                    more[kind] = counts[-1] - counts[-2]
            finally:
                late.cancel()
    assert child.returncode == 0, f"exit code {child.returncode}"
    worst = max(more.values())
    return {"first_step_s": round(first, 2), "kernels": counts[0], "compiled_for_new_batch_sizes": worst, "each": more}


def check_tests(dry: bool, file: str, left: Callable[[], float]) -> dict[str, Any]:
    """A file of the test suite, on this device."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    options = ["-q", "-p", "no:cacheprovider", "--maxfail", "5", f"tests/test_{file}.py"]
    if dry:
        options.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        options += ["-n", "3"]
    done = _python(["-m", "pytest", *options], {}, max(10.0, left()))
    last = done.stdout.strip().splitlines()[-1:] or ["nothing was said"]
    if done.returncode == 124:
        raise NotHere("the time was up before the file was through")
    if done.returncode == 2 and "ModuleNotFoundError" in done.stdout:
        missing = next(line for line in done.stdout.splitlines() if "ModuleNotFoundError" in line)
        raise NotHere(missing.strip("E "))
    assert done.returncode == 0, done.stdout[-1500:]
    return {"said": last[0]}


# ---- Tools ----


def _tool(name: str) -> str:
    beside_cuda = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    for folder in ("", *beside_cuda, *map(str, Path("/opt/nvidia/nsight-compute").glob("*"))):
        found = shutil.which(name, path=folder or None)
        if found:
            return found
    raise NotHere(f"not available: {name} is neither on the PATH nor beside CUDA")


def launch_small(device: torch.device, dry: bool) -> None:
    """Every kernel on small shapes, in every dtype: what the sanitizer watches."""
    for family in KERNELS:
        for dtype in DTYPES[: 1 if dry else None]:
            for work in tune.works(family, True, dtype):
                inputs = work.inputs(torch.Generator(device).manual_seed(1), device)
                truth = tuple(t.detach() for t in work.bind(inputs, "torch")())
                assert not tune.differs(work.bind(inputs, tune.impl_here(device))(), truth, work.tolerance), work.title


def launch_once(device: torch.device, dry: bool, family: str) -> None:
    """Every kernel of a family once on its usual shapes, between cudaProfilerStart and cudaProfilerStop: what ncu looks at."""
    for work in tune.works(family, dry):
        inputs = work.inputs(torch.Generator(device).manual_seed(1), device)
        call = work.bind(inputs, tune.impl_here(device))
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def check_sanitizer(kind: str, dry: bool, left: Callable[[], float]) -> dict[str, Any]:
    """`ERROR SUMMARY: 0 errors` over every kernel; initcheck is told, not judged: it knows PyTorch's allocator badly."""
    command = [_tool("compute-sanitizer"), "--tool", kind, sys.executable, "-m", f"{__package__}.gpu", "--work", "small"]
    done = run(command + ["--dry"] * dry, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, max(10.0, left() / 2))
    if done.returncode == 124:
        raise NotHere("the time was up")
    # Children that use no GPU are followed too, and each has a summary.
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    if not summary and any(words in done.stdout for words in ("not supported", "LibraryNotLoaded", "error 999")):
        raise NotHere(f"not available: {done.stdout.strip().splitlines()[-1][:160]}")
    assert summary, done.stdout[-1500:]
    errors = sum(int(line.split("ERROR SUMMARY:")[1].split()[0]) for line in summary)
    assert kind == "initcheck" or (errors == 0 and done.returncode == 0), done.stdout[-1500:]
    return {"errors": errors}


def read_ncu(said: str) -> dict[str, dict[str, float]]:
    """{kernel: {"us", "dram_percent", "tensor_percent"}} of the longest launch of each, from `ncu --csv --page raw`."""
    lines = said.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    units, rows = rows[0], rows[1:]
    found: dict[str, dict[str, float]] = {}

    def value(row: dict[str, str], part: str) -> float | None:
        numbers = []
        for name, held in row.items():
            if re.search(part, name or "") and "pct" in name.replace("%", "pct") + (units.get(name) or "").replace("%", "pct"):
                with contextlib.suppress(ValueError):
                    numbers.append(float((held or "").replace(",", "")))
        return max(numbers, default=None)

    for row in rows:
        duration = row.get("gpu__time_duration.sum") or ""
        with contextlib.suppress(ValueError):
            scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}
            us = float(duration.replace(",", "")) * scale.get(units.get("gpu__time_duration.sum") or "", 1e-3)
            kernel = row.get("Kernel Name", "").split("(")[0]
            if us > found.get(kernel, {}).get("us", 0.0):
                facts = {"us": us, "dram_percent": value(row, r"dram_+throughput"), "tensor_percent": value(row, "pipe_tensor")}
                found[kernel] = {name: round(v, 2) for name, v in facts.items() if v is not None}
    return found


def check_ncu(dry: bool, family: str, left: Callable[[], float]) -> dict[str, Any]:
    """Every kernel of a family with the share of the memory's rate and of the tensor cores' that it achieved."""
    sections = [
        word for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis") for word in ("--section", name)
    ]
    command = [_tool("ncu"), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    command += [sys.executable, "-m", f"{__package__}.gpu", "--work", "once", "--only", family]
    done = run(command + ["--dry"] * dry, {}, max(10.0, left()))
    found = {name: facts for name, facts in read_ncu(done.stdout).items() if name.endswith("_kernel")}
    if done.returncode == 124:
        raise NotHere("the time was up: ncu says nothing before its end")
    if not found:
        raise NotHere(f"not available: {(done.stdout.strip().splitlines() or ['ncu said nothing'])[-1][:160]}")
    return {"kernels": found, "not seen": sorted(_kernel_names(family) - found.keys())}


def _kernel_names(family: str) -> set[str]:
    import ast

    return {
        node.name
        for path in (ROOT / "kernels" / family).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
