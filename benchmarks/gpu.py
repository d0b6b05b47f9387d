"""`python -m benchmarks.gpu --part NAME`: all that a machine with a GPU can tell, in parts of at most 10 minutes.

    correctness  answers in float32, float16 and bfloat16, every launch configuration alone, determinism, indices out of range,
                 CUDA graphs warm and cold, side streams, more than 2^31 elements, hidden syncs, host cost, the first call, tests
    kernels      every kernel beside its rivals, the goals' rows first
    steps        whole models beside the bare frozen one
    memory       peak memory of a call beside its operands; growth over many calls
    sanitizer    compute-sanitizer over small cases, where the tool is there
    ncu          achieved bandwidth and tensor-core use of each kernel, where the tool is there

A part does its most valuable tasks first; a task that fails is recorded and the next one runs; what there was no time for, or
what cannot run here, is listed with the reason. Results go to gpu_<part>.json and .txt, with every row of `goals.py` and its
verdict. The exit code is 1 when a task failed. `python -m benchmarks.report` makes the tables of the documentation from them.
`fastprompt tune` first finds the launches for this machine. With --dry the same runs on a CPU, cut short, kernels in Triton's
interpreter: only what calls CUDA is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

import torch
from torch import Tensor

from fastprompt import _runtime, functional, tune
from fastprompt.tuning import _measured

from . import attention, embedding, goals, mapping, perturbation, suite, timing

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("attention", "perturbation", "mapping", "embedding")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TESTS = (  # what runs kernels, the most telling files first
    "attention_kernels", "mapping_kernels", "perturbation", "embedding", "attention", "mapping", "memory", "label_head",
    "label_maps", "hoist", "attention_modules", "perturbation_modules", "embedding_modules", "verbalizers", "attach", "peft",
    "reprogram", "trains", "tuning", "checkpoint", "readme",
)  # fmt: skip


class NotHere(Exception):
    """A task that this machine cannot do, and why."""


Task = tuple[str, Callable[[], Any]]  # what it returns is recorded under its name


# ---- Correctness ----


def _call(case: suite.Case, inputs: suite.Inputs) -> timing.Call:
    return suite.bind(next(iter(case.forms.values())), case, inputs)


def _inputs(case: suite.Case, device: torch.device) -> suite.Inputs:
    return case.inputs(torch.Generator(device).manual_seed(1), device)


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
    make.append(embedding.in_front(batch, 20, 10, 64, 500, dtype))
    return [case for cases in make for case in cases if case.mode == "both"]


def check_answers(device: torch.device, dry: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Every case of the battery against float64."""
    cases = [case for family in KERNELS for case in suite.load(family)(device, dtype)]
    if dry:
        cases = [case for case in cases if case.name in ("demo size", "series", "CoOp") or " B=32 S=1000 T=10" in case.title]
    errors = {}
    for case in cases:
        inputs = _inputs(case, device)
        errors[case.title] = suite.error(_call(case, inputs)(), suite.truth_of(case, inputs), case.mode)
        assert errors[case.title] <= case.tolerance, f"{case.title}: error {errors[case.title]:.2g}, allowed {case.tolerance:.2g}"
    return {"cases": len(errors), "largest": max(errors.values())}


def check_launches(device: torch.device, dry: bool, family: str) -> dict[str, Any]:
    """Every launch configuration of the tables and of `fastprompt tune` alone, in every dtype, against plain PyTorch."""
    launches, impl = tune.table_of(family, _runtime.arch(device)), tune.impl_here(device)
    tried, unfit, wrong = 0, [], []
    for dtype in DTYPES[: 1 if dry else None]:
        for work in tune.works(family, True, dtype):
            if dry and "D=" in work.title and "D=16" not in work.title:
                continue
            inputs = work.inputs(torch.Generator(device).manual_seed(1), device)
            truth = tuple(t.detach() for t in work.bind(inputs, "torch")())
            call = work.bind(inputs, impl)
            for kernel in work.kernels:
                present = launches[kernel]
                for launch in tune.candidates(family, kernel, present)[: 2 if dry else None]:
                    named = f"{work.title} {kernel} {tune.label(launch)} {dtype}"
                    tried += 1
                    with _measured.trying(launches, kernel, launch):
                        try:
                            if tune.differs(call(), truth, work.tolerance):
                                wrong.append(named)
                        except Exception:  # more registers or shared memory than there is
                            if launch == present:
                                raise
                            unfit.append(named)
    assert not wrong, f"wrong answers: {'; '.join(wrong)}"
    return {"launches": tried, "do not fit": unfit}


def check_determinism(device: torch.device, dry: bool) -> dict[str, int]:
    """The same bits in 100 runs."""
    runs = 3 if dry else 100
    for case in _shapes(device, dry):
        call = _call(case, _inputs(case, device))
        first = call()
        for _ in range(runs):
            assert all(map(torch.equal, call(), first)), f"{case.title}: other bits in another run"
    return {"runs": runs}


def check_labels(device: torch.device, dry: bool) -> dict[str, str]:
    """An index out of range spoils its own row (on a CPU: it raises), and the context lives on."""
    logits = torch.randn(6, 40, device=device)
    labels = functional.segments([[t, t + 10] for t in range(10)], 40).to(device)
    good = torch.arange(6, device=device)
    bad = good.clone()
    bad[[1, 4]] = torch.tensor([10**6, -7], device=device)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, device=device)
    prompts = torch.randn(6, 3, 16, 16, device=device)
    q, prefix = torch.randn(6, 2, 3, 16, device=device), torch.randn(6, 2, 4, 16, device=device)
    vocab, soft = torch.randn(9, 16, device=device), torch.randn(6, 2, 16, device=device)
    ids = torch.tensor([[-1, -2, 3]] * 6, device=device)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "target of a loss": lambda i: functional.mapped_cross_entropy(logits, labels, i, reduction="none"),
        "target of a one-to-one loss": lambda i: functional.mapped_cross_entropy(logits, good, i, reduction="none"),
        "prompt of an image": lambda i: functional.perturb(images, prompts, canvas=16, share="index", index=i),
        "prefix of a sample": lambda i: functional.prefix_attention(q, q, q, prefix, prefix, prefix_index=i),
        "prompt of a text": lambda i: functional.soft_gather(ids, vocab, soft, prompt_index=i),
    }
    found = {}
    for name, call in calls.items():
        want = call(good).flatten(1) if call(good).dim() > 1 else call(good)[:, None]
        try:
            out = call(bad)
        except ValueError:
            if device.type != "cpu":
                raise
            found[name] = "raises"
            continue
        out = out.flatten(1) if out.dim() > 1 else out[:, None]
        assert out[[1, 4]].isnan().any(1).all(), f"{name}: a row with an index out of range is not NaN"
        others = [0, 2, 3, 5]
        assert torch.equal(out[others], want[others]), f"{name}: another row changed"
        found[name] = "NaN in its row"
    assert float(torch.ones(4, device=device).sum()) == 4, "the context died"
    return found


def check_graph(device: torch.device, dry: bool) -> dict[str, int]:
    """A CUDA graph of forward and backward gives the eager bits, on new inputs too."""
    for case in _shapes(device, dry):
        inputs = _inputs(case, device)
        call = _call(case, inputs)
        call()
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                captured = call()
            with torch.no_grad():
                inputs["g"].mul_(2)
                next(inputs[name] for name in ("prompt", "prefix_k", "logits", "soft") if name in inputs).mul_(0.5)
            graph.replay()
            assert all(map(torch.equal, captured, call())), f"{case.title}: the replay differs"
    return {"graphs": len(_shapes(device, dry))}


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


def check_graph_cold(device: torch.device, dry: bool) -> dict[str, str]:
    """In a new process with an empty cache: `fastprompt.warmup`, then a capture of the first step."""
    with tempfile.TemporaryDirectory() as cache:
        done = _python(["-c", GRAPH, device.type], {"TRITON_CACHE_DIR": cache}, 120)
    assert done.returncode == 0, done.stdout[-800:]
    return {"capture": "ok"}


def check_streams(device: torch.device, dry: bool) -> dict[str, int]:
    """On a side stream, behind work that takes a while, the same bits."""
    for case in _shapes(device, dry):
        inputs = _inputs(case, device)
        want = _call(case, inputs)()
        if device.type == "cuda":
            torch.cuda.synchronize()
            side, made = torch.cuda.Stream(), {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
            with torch.cuda.stream(side), torch.no_grad():
                kept = {name: t.clone() for name, t in made.items()}
                for t in made.values():
                    t.zero_()
                torch.cuda._sleep(20_000_000)
                for name, t in made.items():
                    t.copy_(kept[name])  # whoever does not wait on this stream reads zeros
            with torch.cuda.stream(side):
                found = _call(case, inputs)()
            side.synchronize()
        else:
            found = _call(case, inputs)()
        assert all(map(torch.equal, found, want)), f"{case.title}: other bits on another stream"
    return {"cases": len(_shapes(device, dry))}


def check_halves(device: torch.device, dry: bool) -> dict[str, int]:
    """More than 2^31 elements in one call are what two calls of a half give, bit for bit."""
    impl = tune.impl_here(device)
    half_type = torch.float32 if dry else torch.bfloat16
    largest = {}

    def compare(name: str, batch: int, call: Callable[[int, int], tuple[Tensor, ...]]) -> None:
        whole, half = call(0, batch), batch // 2
        largest[name] = max(t.numel() for t in whole)
        for low, high in ((0, half), (half, batch)):
            for out, part in zip(whole, call(low, high), strict=True):
                assert torch.equal(out[low:high], part), f"{name}: rows {low} to {high} differ"
        assert dry or largest[name] > 2**31, f"{name}: {largest[name]} elements are not enough"

    rows = 4 if dry else 14_300
    images = torch.randint(256, (rows, 3, 8, 8), dtype=torch.uint8, device=device)
    prompt, canvas = torch.randn(1, 3, *((16, 16) if dry else (224, 224)), device=device), 16 if dry else 224
    compare("perturb", rows, lambda a, b: (functional.perturb(images[a:b], prompt, canvas=canvas, dtype=half_type, impl=impl),))

    rows = 6 if dry else 2_150_000
    logits = torch.empty((rows, 40 if dry else 1000), dtype=half_type, device=device).normal_()
    y = torch.arange(rows, device=device) % 10
    labels = functional.segments([[t, t + 10] for t in range(10)], logits.shape[1]).to(device)

    def loss(a: int, b: int) -> tuple[Tensor, ...]:
        x = logits[a:b].detach().requires_grad_()
        out = functional.mapped_cross_entropy(x, labels, y[a:b], reduction="none", impl=impl)
        return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))

    compare("loss", rows, loss)

    rows, heads, length, width = (4, 2, 5, 16) if dry else (33_000, 8, 64, 128)
    q = torch.empty((rows, heads, length, width), dtype=half_type, device=device).normal_()
    k = torch.empty((rows, 1, length, width), dtype=half_type, device=device).normal_()
    prefix = torch.randn(1, 1, 4, width, device=device).to(half_type)

    def attend(a: int, b: int) -> tuple[Tensor, ...]:
        x = q[a:b].detach().requires_grad_()
        out = functional.prefix_attention(x, k[a:b], k[a:b], prefix, prefix, causal=True, impl=impl)
        return out.detach(), *torch.autograd.grad(out, x, out.detach())

    compare("attention", rows, attend)

    rows, length, width = (4, 5, 16) if dry else (16, 33_000, 4096)
    vocab = torch.empty((100, width), dtype=half_type, device=device).normal_()
    ids = torch.randint(-2, 100, (rows, length), device=device)
    soft = torch.randn(1, 2, width, device=device)
    compare("soft gather", rows, lambda a, b: (functional.soft_gather(ids[a:b], vocab, soft, impl=impl),))
    return largest


def check_syncs(device: torch.device, dry: bool) -> dict[str, int]:
    """No forward or backward waits for the device."""
    for case in _shapes(device, dry):
        call = _call(case, _inputs(case, device))
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
    calls = perturbation.host_calls(device) | _small_calls(device)
    found = {name: round(timing.host_cost(call, count, device) * 1e6, 2) for name, call in calls.items()}
    forward = [cost for name, cost in found.items() if "backward" not in name and "gradient" not in name]
    return found | {"largest_us": max(forward)}


def _small_calls(device: torch.device) -> dict[str, timing.Call]:
    """A mapped loss, by an index and by segments; attention; a gather."""
    labels = functional.segments([[t, t + 10] for t in range(10)], 20).to(device)
    logits, y = torch.randn(8, 20, device=device).requires_grad_(), torch.arange(8, device=device)
    plain, index = logits.detach(), labels.members[:10]
    q, prefix = torch.randn(2, 2, 4, 64, device=device), torch.randn(1, 2, 4, 64, device=device)
    vocab, soft, ids = (
        torch.randn(9, 16, device=device),
        torch.randn(1, 2, 16, device=device),
        torch.tensor([[-1, 3]], device=device),
    )

    def step(form: Any) -> Any:
        return lambda: torch.autograd.grad(functional.mapped_cross_entropy(logits, form, y), logits)

    return {
        "map, index": lambda: functional.map_labels(plain, index),
        "map, segments": lambda: functional.map_labels(plain, labels),
        "loss, index": lambda: functional.mapped_cross_entropy(plain, index, y),
        "loss, segments": lambda: functional.mapped_cross_entropy(plain, labels, y),
        "loss and gradient, index": step(index),
        "loss and gradient, segments": step(labels),
        "attention": lambda: functional.prefix_attention(q, q, q, prefix, prefix),
        "soft gather": lambda: functional.soft_gather(ids, vocab, soft),
    }


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


def check_cold(device: torch.device, dry: bool) -> dict[str, Any]:
    """Seconds from the start of Python to the end of a first step of each kind, and the most kernels that 100 new batch sizes
    compile for one of them."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", COLD, device.type, "2" if dry else "100"]
        environment = _environment({"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)})
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
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
        child.communicate(timeout=60)
    assert child.returncode == 0
    worst = max(more.values())
    return {"first_step_s": round(first, 2), "kernels": counts[0], "compiled_for_new_batch_sizes": worst, "each": more}


def check_tests(device: torch.device, dry: bool, file: str, left: Callable[[], float]) -> dict[str, Any]:
    """A file of the test suite, on this device."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    options = ["-q", "-p", "no:cacheprovider", "--maxfail", "5", f"tests/test_{file}.py"]
    if dry:
        options.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        options += ["-n", "8"]
    done = _python(["-m", "pytest", *options], {}, max(10.0, left()))
    last = done.stdout.strip().splitlines()[-1:] or ["nothing was said"]
    if done.returncode == 124:
        raise NotHere("the time was up before the file was through")
    if done.returncode == 2 and "ModuleNotFoundError" in done.stdout:
        missing = next(line for line in done.stdout.splitlines() if "ModuleNotFoundError" in line)
        raise NotHere(missing.strip("E "))
    assert done.returncode == 0, done.stdout[-1500:]
    return {"said": last[0]}


def correctness(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    dtypes = DTYPES[:1] if dry else DTYPES
    tasks: list[Task] = [
        (f"answers {dtype}".replace("torch.", ""), partial(check_answers, device, dry, dtype)) for dtype in dtypes
    ]
    tasks += [(f"launches {family}", partial(check_launches, device, dry, family)) for family in KERNELS]
    for check in (
        check_determinism, check_labels, check_graph, check_streams, check_syncs, check_host_cost, check_cold, check_graph_cold,
        check_halves,
    ):  # fmt: skip
        tasks.append((check.__name__.removeprefix("check_"), partial(check, device, dry)))
    return tasks + [(f"tests {file}", partial(check_tests, device, dry, file, left)) for file in TESTS[: 1 if dry else None]]


# ---- Kernels and steps ----


def _cases(families: Sequence[str], device: torch.device, dtype: torch.dtype, part: str) -> list[suite.Case]:
    """The cases of these families, those that a goal names first."""
    wanted = [bar.where for goal in goals.GOALS for bar in goal.bars if bar.part == part]

    def behind(case: suite.Case) -> bool:
        return not any(all(word in case.title + " " for word in where) for where in wanted)

    return sorted((case for family in families for case in suite.load(family)(device, dtype)), key=behind)


def _compare(case: suite.Case, device: torch.device, dry: bool, ceilings: dict[str, float]) -> dict[str, Any]:
    try:
        result = suite.run(case, device, ceilings, quick=dry)
    except suite.Skip as reason:
        raise NotHere(str(reason)) from reason
    print(suite.text(result), flush=True)
    ours = next(iter(result["rows"].values()))
    if ours.get("refused", "").startswith("not here"):
        raise NotHere(ours["refused"])
    assert "refused" not in ours, ours["refused"]
    return result


def _timed(cases: list[suite.Case], device: torch.device, dry: bool, ceilings: dict[str, float]) -> list[Task]:
    return [(case.title, partial(_compare, case, device, dry, ceilings)) for case in cases]


def kernels(device: torch.device, dry: bool, ceilings: dict[str, float]) -> list[Task]:
    cases = _cases(KERNELS, device, torch.float32 if dry else torch.bfloat16, "kernels")
    if dry:
        few = ("demo size forward", "CoOp forward", "map + cross-entropy forward B=32", "front forward B=2")
        cases = [case for case in cases if any(words in case.title for words in few)]
    return _timed(cases, device, dry, ceilings)


def steps(device: torch.device, dry: bool, ceilings: dict[str, float]) -> list[Task]:
    from . import reprogrammed

    if dry:
        small = [reprogrammed.vpt_deep(64, 1, 1, 2, torch.float32, mode) for mode in ("forward", "both")]
        return _timed(small, device, dry, ceilings)
    families = [family for family in suite.available() if family not in KERNELS]
    cases = _cases(families, device, torch.bfloat16, "steps")
    if not any("soft prompt" in case.title and "B=64 T=64 P=100" in case.title for case in cases):
        cases.insert(0, reprogrammed.soft_prompt(64, 64, 100, torch.bfloat16))  # row 8
    if not any("ViT-768" in case.title and case.mode == "forward" for case in cases):
        cases += [reprogrammed.vpt_deep(768, 12, 256, length, torch.bfloat16, "forward") for length in (50, 100)]
    return _timed(cases, device, dry, ceilings)


# ---- Memory ----


def _peak(call: timing.Call, device: torch.device) -> tuple[int, int]:
    """(bytes at the highest point of a call, bytes of what it returns)."""
    call()
    return timing.peak_memory(call, device), sum(t.nbytes for t in call())


def memory_of(case: suite.Case, device: torch.device) -> dict[str, Any]:
    """Megabytes beyond operands and outputs, the peak over operands and outputs, and every rival's peak beside it."""
    inputs = _inputs(case, device)
    operands = sum(t.nbytes for t in inputs.values() if isinstance(t, Tensor))
    found: dict[str, Any] = {"title": case.title, "operands_mb": operands / 1e6, "peak_mb": {}}
    for place, (name, form) in enumerate(case.forms.items()):
        try:
            peak, returned = _peak(suite.bind(form, case, inputs), device)
        except Exception as failure:
            if not place:
                raise
            found["peak_mb"][name] = f"not here: {type(failure).__name__}"
            continue
        found["peak_mb"][name] = peak / 1e6
        if not place:
            found |= {"workspace_mb": (peak - returned) / 1e6, "of_operands": (operands + peak) / (operands + returned)}
    return found


def check_growth(device: torch.device, dry: bool) -> dict[str, float]:
    """Bytes that 1000 steps of every kind leave behind: none on the device."""
    steps, grown = 5 if dry else 1000, 0
    for case in _shapes(device, True):
        call = _call(case, _inputs(case, device))
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
        for _ in range(steps):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            grown = max(grown, torch.cuda.memory_allocated() - before)
    assert grown == 0, f"{grown} bytes after {steps} steps"
    return {"steps": steps, "bytes": grown}


def memory(device: torch.device, dry: bool) -> list[Task]:
    dtype = torch.float32 if dry else torch.bfloat16
    modes = ("forward", "backward")
    sizes = (2, (2, 1), 16, 16, 4, 64) if dry else (8, (32, 8), 2048, 2048, 128, 128)
    made = {f"attention {case.mode}": case for case in attention.shared("Llama", *sizes, dtype, modes, causal=True)}
    made |= {f"padding {case.mode}": case for case in perturbation.padded(2 if dry else 256, 192, 224, dtype, modes)}
    made |= {f"loss {case.mode}": case for case in mapping.mapped_loss(9 if dry else 65536, 1000, 10, dtype)}
    head = (4, 500, 64, 8) if dry else (16384, 128256, 4096, 32)
    made |= {f"label head {case.mode}": case for case in mapping.label_head(*head, dtype)}
    tokens = (2, 5, 3, 16, 50) if dry else (8, 2048, 128, 4096, 128_256)
    made |= {f"soft gather {case.mode}": case for case in embedding.in_front(*tokens, dtype)}
    tasks: list[Task] = [(name, partial(memory_of, case, device)) for name, case in made.items()]
    return [*tasks, ("growth", partial(check_growth, device, dry))]


# ---- Tools ----


def _tool(name: str) -> str:
    for folder in ("", "/usr/local/cuda/bin", *map(str, Path("/opt/nvidia/nsight-compute").glob("*"))):
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


def launch_once(device: torch.device, dry: bool) -> None:
    """Every kernel once on its usual shapes, between cudaProfilerStart and cudaProfilerStop: what ncu looks at."""
    for family in KERNELS:
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
    done = _process(command + ["--dry"] * dry, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, max(10.0, left()))
    if done.returncode == 124:
        raise NotHere("the time was up")
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    if not summary and any(words in done.stdout for words in ("not supported", "LibraryNotLoaded", "error 999")):
        raise NotHere(f"not available: {done.stdout.strip().splitlines()[-1][:160]}")
    assert summary, done.stdout[-1500:]
    errors = int(summary[-1].split("ERROR SUMMARY:")[1].split()[0])
    assert kind == "initcheck" or (errors == 0 and done.returncode == 0), done.stdout[-1500:]
    return {"errors": errors}


def sanitizer(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    def alone() -> dict[str, str]:
        launch_small(device, dry)
        return {"kernels": "right without the tool"}

    kinds = ("memcheck", "racecheck", "synccheck", "initcheck")
    return [("alone", alone), *((kind, partial(check_sanitizer, kind, dry, left)) for kind in kinds)]


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
            if part in (name or "") and "pct" in name.replace("%", "pct") + (units.get(name) or "").replace("%", "pct"):
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
                facts = {"us": us, "dram_percent": value(row, "dram__throughput"), "tensor_percent": value(row, "pipe_tensor")}
                found[kernel] = {name: round(v, 2) for name, v in facts.items() if v is not None}
    return found


def check_ncu(dry: bool, left: Callable[[], float]) -> dict[str, Any]:
    """Every kernel of the package with the share of the memory's rate and of the tensor cores' that it achieved."""
    sections = [
        word for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis") for word in ("--section", name)
    ]
    command = [_tool("ncu"), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    command += [sys.executable, "-m", f"{__package__}.gpu", "--work", "once"]
    done = _process(command + ["--dry"] * dry, {}, max(10.0, left()))
    found = {name: facts for name, facts in read_ncu(done.stdout).items() if name.endswith("_kernel")}
    if not found and done.returncode != 124:
        raise NotHere(f"not available: {(done.stdout.strip().splitlines() or ['ncu said nothing'])[-1][:160]}")
    assert found, "the time was up before the first kernel"
    missing = sorted(_kernel_names() - found.keys())
    return {"kernels": found, "not seen": missing}


def _kernel_names() -> set[str]:
    import ast

    return {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def ncu(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    def alone() -> dict[str, str]:
        launch_once(device, dry)
        return {"kernels": "run without the tool"}

    return [("alone", alone), ("kernels", partial(check_ncu, dry, left))]


# ---- Processes ----


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"} | more


def _process(
    command: list[str], environment: dict[str, str], seconds: float, log: Path | None = None
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs a command in its own process group; its exit code is 124 when the time was up, and its output what it had said."""
    with log.open("w+", errors="replace") if log else tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            command, cwd=ROOT, env=_environment(environment), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = 124
        said.seek(0)
        return subprocess.CompletedProcess(command, code, said.read())


def _python(command: list[str], environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    return _process([sys.executable, *command], {"PYTHONPATH": str(ROOT), **environment}, seconds)


PARTS = ("correctness", "kernels", "steps", "memory", "sanitizer", "ncu")


def tasks_of(part: str, device: torch.device, dry: bool, ceilings: dict[str, float], left: Callable[[], float]) -> list[Task]:
    if part in ("kernels", "steps"):
        return {"kernels": kernels, "steps": steps}[part](device, dry, ceilings)
    if part == "memory":
        return memory(device, dry)
    return {"correctness": correctness, "sanitizer": sanitizer, "ncu": ncu}[part](device, dry, left)


def work(part: str, device: torch.device, dry: bool, seconds: float, out: Path, only: str = "") -> dict[str, Any]:
    """Does the tasks of a part one after the other; the file holds after each of them what is known."""
    end = time.perf_counter() + seconds
    timed = part in ("kernels", "steps")
    random.seed(0)
    with contextlib.nullcontext() if dry else torch.cuda.stream(torch.cuda.Stream()):
        ceilings = {"copy": timing.copy_ceiling(device), "matmul": timing.matmul_ceiling(device)} if timed else {}
        left = lambda: end - time.perf_counter()  # noqa: E731
        tasks = [task for task in tasks_of(part, device, dry, ceilings, left) if only in task[0]]
        report: dict[str, Any] = {
            "part": part, "dry": dry, "conditions": suite.conditions(device), "ceilings": ceilings, "results": [], "checks": {},
            "failed": {}, "not_run": {name: "the time was up" for name, _ in tasks},
        }  # fmt: skip
        for name, task in tasks:
            if left() > 0:
                _do(name, task, report, timed)
            out.write_text(json.dumps(report, indent=1) + "\n")
            if "the context died" in report["failed"].get(name, ""):
                break
    return report


def _do(name: str, task: Callable[[], Any], report: dict[str, Any], timed: bool) -> None:
    start = time.perf_counter()
    try:
        found = task()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if timed:
            report["results"].append(found)
        else:
            report["checks"][name] = found
        said = "ok   " if timed else f"ok    {found}"
    except NotHere as reason:
        report["not_run"][name] = str(reason)
        print(f"NOT RUN  {name}: {reason}", flush=True)
        return
    except Exception as failure:
        report["failed"][name] = f"{type(failure).__name__}: {failure}"[-1600:]
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            report["failed"][name] += " (the context died: what would follow is not run)"
        said = f"FAIL  {report['failed'][name]}"
    report["not_run"].pop(name, None)
    print(f"{said[:600] if timed else said}  {name}  ({time.perf_counter() - start:.1f} s)", flush=True)


def run_part(part: str, dry: bool, minutes: float, folder: Path, only: str = "") -> int:
    """A part in a process of its own, which is ended when its time is up; what it knew by then is kept."""
    held, log = folder / f"gpu_{part}.json", folder / f"gpu_{part}.txt"
    held.unlink(missing_ok=True)
    seconds = 60 * minutes
    command = [sys.executable, "-m", f"{__package__}.gpu", "--work", part, "--out", str(held), "--only", only]
    command += ["--seconds", str(seconds - min(30, 0.1 * seconds)), *["--dry"] * dry]
    done = _process(command, {}, seconds - min(5, 0.02 * seconds), log)
    known: dict[str, Any] = (
        json.loads(held.read_text()) if held.exists() else {"part": part, "dry": dry, "failed": {}, "not_run": {}}
    )
    if done.returncode not in (0, 1, 124) or not held.exists():
        known["failed"]["the part itself"] = f"exit code {done.returncode}: {done.stdout[-800:]}"
    known["exit_code"] = done.returncode
    rows = goals.evaluate({} if dry else {part: known})
    known["goals"] = rows
    held.write_text(json.dumps(known, indent=1) + "\n")
    lines = [done.stdout.strip(), f"\n==== goals: what {part} says ====", goals.text(rows), f"\n==== {part} ===="]
    lines += [f"NOT RUN  {name}: {reason}" for name, reason in known["not_run"].items()]
    lines += [f"FAILED   {name}: {reason[-300:]}" for name, reason in known["failed"].items()]
    missed = [row["row"] for row in rows if row["verdict"] in goals.VERDICTS[:2]]
    count = len(known.get("checks", {})) + len(known.get("results", []))
    lines.append(f"{count} done, {len(known['not_run'])} not run, {len(known['failed'])} failed")
    lines.append(f"goals missed: {', '.join(missed) or 'none'}")
    log.write_text("\n".join(lines) + "\n")
    print(log.read_text(), flush=True)
    return int(bool(known["failed"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that are named, or all; 0 when nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--minutes", type=float, default=9.5, help="for each part (default: %(default)s)")
    parser.add_argument("--out", help="folder (default: benchmarks/results; --dry: one that is made in the temporary folder)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the tasks whose name holds this")
    parser.add_argument("--dry", action="store_true", help="on a CPU, cut short")
    parser.add_argument("--work", choices=(*PARTS, "small", "once"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here; --dry runs on the CPU", file=sys.stderr)
        return 1
    if options.work in ("small", "once"):
        {"small": launch_small, "once": launch_once}[options.work](device, options.dry)
        return 0
    if options.work:
        return int(bool(work(options.work, device, options.dry, options.seconds, Path(options.out), options.only)["failed"]))
    results = tempfile.mkdtemp(prefix="gpu-dry-") if options.dry else str(Path(__file__).parent / "results")
    folder = Path(options.out or results)
    folder.mkdir(parents=True, exist_ok=True)
    return max(run_part(part, options.dry, options.minutes, folder, options.only) for part in options.part or PARTS)


if __name__ == "__main__":
    sys.exit(main())
