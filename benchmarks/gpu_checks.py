"""What must hold on a GPU: the checks of `benchmarks.gpu` that run in its own process.

Each takes the device and whether the run is dry, returns what it found, and raises AssertionError where something is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastprompt import _runtime, functional, tune
from fastprompt.tuning import _measured

from . import attention, embedding, mapping, perturbation, suite, timing

KERNELS = ("attention", "perturbation", "mapping", "embedding")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def check_answers(device: torch.device, dry: bool, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every case of the battery against float64; all of them, also behind one that is wrong."""
    cases = suite.load(family)(device, dtype)
    if dry:
        cases = [case for case in cases if case.name in ("demo size", "series", "CoOp") or " B=32 S=1000 T=10" in case.title]
    errors, wrong = {}, []
    for case in cases:
        try:
            inputs = _inputs(case, device)
            errors[case.title] = suite.error(_call(case, inputs)(), suite.truth_of(case, inputs), case.mode)
        except suite.Skip:
            continue
        except Exception as failure:
            _alive(device, failure)
            wrong.append(f"{case.title}: {suite.sentence(failure)}")
            continue
        if not errors[case.title] <= case.tolerance:
            wrong.append(f"{case.title}: error {errors[case.title]:.2g}, allowed {case.tolerance:.2g}")
    assert not wrong, f"{len(wrong)} of {len(cases)} wrong: {'; '.join(wrong)}"
    return {"cases": len(errors), "largest": max(errors.values(), default=0.0)}


def _alive(device: torch.device, failure: Exception) -> None:
    """Raises what failed where it took the CUDA context along: everything after it would fail too."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise failure from None


def check_launches(device: torch.device, dry: bool, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every launch configuration of the tables and of `fastprompt tune` alone, against plain PyTorch; in float16, which takes
    those of bfloat16, the present ones."""
    most = 2 if dry else 1 if dtype == torch.float16 else None
    launches, impl = tune.table_of(family, _runtime.arch(device)), tune.impl_here(device)
    tried = 0
    unfit: list[str] = []
    wrong: list[str] = []
    for work in tune.works(family, True, dtype):
        if dry and "D=" in work.title and "D=16" not in work.title:
            continue
        inputs = work.inputs(torch.Generator(device).manual_seed(1), device)
        truth = tuple(t.detach() for t in work.bind(inputs, "torch")())
        call = work.bind(inputs, impl)
        for kernel in work.kernels:
            present = launches[kernel]
            for launch in tune.candidates(family, kernel, present)[:most]:
                named = f"{work.title} {kernel} {tune.label(launch)}"
                tried += 1
                with _measured.trying(launches, kernel, launch):
                    try:
                        if tune.differs(call(), truth, work.tolerance):
                            wrong.append(named)
                    except Exception as failure:  # more registers or shared memory than there is
                        _alive(device, failure)
                        (wrong if launch == present else unfit).append(f"{named}: {suite.sentence(failure)}")
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
