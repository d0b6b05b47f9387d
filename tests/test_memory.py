"""Memory that a kernel may not touch, and memory far away: guard pages, offsets beyond 2**31, and the size of launches.

Triton's interpreter reads and writes real addresses, so a tensor that ends at a page without access turns one element too
many into a dead process, and a sparse mapping of several GB shows an offset that wrapped at 32 bits. Whatever may die runs
in a process of its own: `python -m tests.test_memory end` for one.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.tuning.mapping import Launch
from tests.conftest import HAS_GPU, HAS_TRITON

pytestmark = pytest.mark.skipif(HAS_GPU or not HAS_TRITON or os.name != "posix", reason="needs the interpreter")

KERNELS = {
    "resize_columns_kernel", "perturb_forward_kernel", "prompt_gradient_kernel", "prompt_gradient_sum_kernel",
    "image_gradient_kernel", "cells_gradient_kernel",
}  # fmt: skip


def run_apart(job: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.test_memory", job]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("edge", ["end", "start", "attention end", "attention start", "mapping end", "mapping start"])
def test_nothing_is_touched_beyond_any_tensor(edge):
    """Every pointer of every kernel, read or written, with a forbidden page behind it or in front of it."""
    done = run_apart(edge)
    assert done.returncode == 0, done.stderr[-2000:] or f"killed by signal {-done.returncode}"
    assert "guarded" in done.stdout


@pytest.mark.parametrize("job", ["one beyond the end", "one before the start"])
def test_the_guard_page_kills(job):
    assert run_apart(job).returncode in (-signal.SIGSEGV, -signal.SIGBUS)


@pytest.mark.parametrize(
    "job",
    [
        "image samples",
        "image channels",
        "gradient samples",
        "gradient channels",
        "gradient prompts",
        "far output",
        "far attention",
        "far mapping",
    ],
)
def test_offsets_beyond_32_bits(job):
    done = run_apart(job)
    assert done.returncode == 0, done.stderr[-2000:] or f"killed by signal {-done.returncode}"
    assert "same bits" in done.stdout


def test_launches_fit_the_grid():
    """One dimension of at most 2**31 - 1 programs, for shapes of up to 2**38 elements that exist only on paper."""
    done = run_apart("audit")
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) >= KERNELS


@pytest.mark.parametrize("current", [0, 1])
def test_operators_run_on_the_device_of_their_tensors(current, monkeypatch):
    """Triton launches on the current device, whatever the tensors say."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    first = SimpleNamespace(device=torch.device("cuda:1"))
    assert _runtime.on_its_device(lambda tensor, *rest: rest)(first, 2, 3) == (2, 3)
    assert entered == ([] if current == 1 else [first.device])


def test_every_operator_is_registered_that_way():
    for path in (Path(__file__).parents[1] / "fastprompt" / "ops").glob("*.py"):
        for line in path.read_text().splitlines():
            assert '"CUDA")' not in line or "on_its_device(" in line, f"{path.name}: {line}"


# ---- What runs apart ----

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_kept: list[mmap.mmap] = []


def guarded(t: Tensor, edge: str) -> Tensor:
    """A copy of t with its strides, whose last (or first) byte lies at a page that nobody may touch."""
    page = mmap.PAGESIZE
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    size = span * t.element_size()
    pages = max(-(-size // page), 1)
    area = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for forbidden in (address, address + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    begin = (pages + 1) * page - size if edge == "end" else page
    flat = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=begin) if size else torch.empty(0, dtype=torch.uint8)
    _kept.append(area)
    elements = flat.view(t.dtype)
    held = elements.as_strided(t.shape, t.stride(), 0)
    if is_expanded(t):
        elements.copy_(t.as_strided((span,), (1,)))
        return held
    return held.copy_(t)


def is_expanded(t: Tensor) -> bool:
    """Whether elements share memory, which nobody may write to."""
    return any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))


def guard_every_launch(edge: str) -> set[tuple[str, str]]:
    """From now on kernels get guarded copies of their tensors. Returns the (kernel, pointer) pairs seen, as they come."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[tuple[str, str]] = set()
    run = InterpretedFunction.run

    def guarding(self, *args, grid, warmup, **options):
        copies = [guarded(a, edge) if isinstance(a, Tensor) else a for a in args]
        run(self, *copies, grid=grid, warmup=warmup, **options)
        for name, original, copy in zip(self.arg_names, args, copies, strict=False):
            if isinstance(original, Tensor):
                seen.add((self.fn.__name__, name))
                if not is_expanded(original):
                    original.copy_(copy)
        _kept.clear()

    InterpretedFunction.run = guarding
    return seen


def touch_everything(edge: str) -> None:
    from fastprompt.kernels.perturbation import backward, forward
    from fastprompt.ops import perturbation as ops
    from fastprompt.tuning.perturbation import Launch
    from tests.cases import BF16, F16, F32, U8, Case, run, tensors

    seen = guard_every_launch(edge)
    full = Case(geometry="full", region="everywhere", clamp="exact", batch=3)
    cases = [
        Case(batch=3),
        Case(region="frame of a window", dtype=BF16, batch=3),
        Case(region="float planes in a window", x=BF16, clamp="exact", batch=3),
        Case(geometry="up bicubic", share="index", region="bool mask", clamp="exact", batch=3),
        Case(geometry="down bilinear", share="product", x=U8, clamp="exact", batch=2),
        Case(share="index", region="window", batch=3),
        Case(share="product", region="frame of a window", clamp="exact", batch=2),
        Case(share="sample", region="window", space="normalized", clamp="exact", batch=2),
        Case(geometry="down bicubic", share="sample", region="half mask in a frame", x=F16, clamp="exact", batch=2),
        Case(geometry="up bilinear", share="none", x=U8, channels_last=True, batch=2),
        Case(geometry="copies", region="rows above and below", clamp="exact", channels_last=True, batch=3),
        replace(full, share="index", mask_first=True),
        replace(full, cells=(1, 11, 2), region="float mask"),
        replace(full, cells=(3, 1, 7), region="bool planes", x=U8),
        replace(full, cells=(3, 1, 7), geometry="up bilinear"),
    ]
    pick = ops.pick
    for launch in (pick, lambda *_, **__: Launch(256, 2, 2, 4, SUM_BLOCK=128)):
        ops.pick = launch
        for case in cases:
            run(case, tensors(case, torch.device("cpu")), "triton")
            if case.x == U8 and case.clamp == "none":
                run(replace(case, x=F32), tensors(replace(case, x=F32), torch.device("cpu")), "triton")
    rows = torch.tensor([2, 0, 2])  # of a set
    for case in (cases[2], replace(cases[3], x=U8), cases[12]):
        run(case, tensors(case, torch.device("cpu")), "triton", rows=rows, wanted="prompt cells")
    pointers = kernel_pointers(forward, backward)
    assert {name for name, _ in pointers} == KERNELS, sorted(pointers)
    assert pointers <= seen, sorted(pointers - seen)
    print("guarded", len(seen), "pointers")


def touch_attention(edge: str) -> None:
    from fastprompt.kernels.attention import backward, forward
    from tests.test_attention_kernels import CASES, F16, FEW, FORWARD, agree, agree_backward, replace

    seen = guard_every_launch(edge)
    names = (
        "causal window", "left padding", "key mask", "ragged", "ragged stack", "index out of range", "packed",
        "packed, own prefixes", "packed, two prefixes", "gate a sample and head", "soft cap", "sliced", "expanded",
    )  # fmt: skip
    for name in names:
        agree_backward(CASES[name], torch.device("cpu"))
    agree_backward(replace(CASES["causal"], dtype=F16, width=8), torch.device("cpu"))
    for case in (FEW["decode"], CASES["key mask"]):
        agree(case, torch.device("cpu"), FORWARD["apart"])
    pointers = kernel_pointers(forward, backward)
    assert len({name for name, _ in pointers}) == 7, sorted(pointers)
    assert pointers <= seen, sorted(pointers - seen)
    print("guarded", len(seen), "pointers")


def touch_mapping(edge: str) -> None:
    from fastprompt.kernels.mapping import backward, count, forward, segments, segments_backward
    from fastprompt.ops import mapping as ops
    from tests.test_mapping_kernels import RAGGED, SHARED, TURNS, WHOLE, Case, operands, run

    seen = guard_every_launch(edge)
    every = {"batch": 5, "maps": (RAGGED, SHARED), "prior": True, "layout": "sliced"}
    loss = {"loss": {"smoothing": 0.1, "focal": 2.0}, "class_weight": True}
    cases = [
        Case("top-k mean", "probabilities", **every, **loss),
        Case("weighted", "probabilities", **every, tile=TURNS),
        Case("logsumexp", dtype=torch.bfloat16, tile=WHOLE),
        Case("max", **loss, layout="transposed"),
        Case("mean", "probabilities", batch=5, loss={"renormalize": False, "reduction": "none"}),
    ]
    for case in cases:
        run(case, operands(case, torch.device("cpu")))
    for launch in (Launch(2, 8, 4), Launch(4, 32, 4)):
        for k in (None, 3):
            target, counts = torch.arange(7) % 3, torch.zeros(19, 3, dtype=torch.int64)
            count.count_labels_(counts, torch.randn(7, 19).half(), target, launch, k)
    out, readers = ops._forward_triton(torch.randn(5, 19), torch.arange(7) * 2, True)
    ops._gradient_triton(out, torch.arange(7) * 2, readers, 19)
    pointers = kernel_pointers(forward, backward, segments, segments_backward, count)
    assert len({name for name, _ in pointers}) == 7, sorted(pointers)
    assert pointers <= seen, sorted(pointers - seen)
    print("guarded", len(seen), "pointers")


def touch_embedding(edge: str) -> None:
    from fastprompt.kernels.embedding import backward, forward
    from fastprompt.ops import embedding as ops
    from fastprompt.tuning.embedding import Launch
    from tests.test_embedding import agree, rand, some_ids

    ops.pick = lambda kernel, *_: Launch(2, 8, 4, programs=40 if kernel == "add" else 0)
    seen = guard_every_launch(edge)
    ids, vocab, soft = some_ids(5, 6, 11, 3), rand(11, 13), rand(2, 3, 13, seed=1)
    index, lengths = torch.tensor([1, 0, -1, 1, 0]), torch.tensor([3, 2])
    agree("triton", torch.device("cpu"), ids, vocab, soft, prompt_index=index, soft_lengths=lengths, positions=rand(6, 13))
    pointers = kernel_pointers(forward, backward)
    assert pointers <= seen, sorted(pointers - seen)
    print("guarded", len(seen), "pointers")


def kernel_pointers(*modules: ModuleType) -> set[tuple[str, str]]:
    """The (kernel, pointer argument) pairs of some kernel files."""
    return {
        (name, parameter)
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
        for parameter in inspect.signature(kernel.fn).parameters
        if parameter.endswith("_ptr")
    }


def overrun(edge: str) -> None:
    """A kernel that reads one element too many: the guard has to kill this process."""
    import triton
    import triton.language as tl

    @triton.jit
    def shifted_kernel(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at + shift))

    guard_every_launch(edge)
    x, out = torch.arange(16.0), torch.empty(16)
    shifted_kernel[(1,)](x, out, 0, BLOCK=16)
    assert torch.equal(out, x)
    shifted_kernel[(1,)](x, out, 1 if edge == "end" else -1, BLOCK=16)


def sparse(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on a mapping that only has memory where it is written."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    area = mmap.mmap(-1, span * dtype.itemsize, flags=flags)
    return torch.frombuffer(area, dtype=torch.uint8).view(dtype).as_strided(shape, strides)


def reach(job: str) -> None:
    """The same call with an operand's samples, channels or prompts more than 2**31 elements apart."""
    from tests.cases import BF16, U8, Case, gradient, run, tensors
    from tests.compare import check_bits

    clamped = Case(region="frame", clamp="exact", batch=2)
    cases = [
        replace(clamped, share="index"),
        replace(clamped, geometry="up bilinear"),
        replace(clamped, geometry="rows only", x=U8),
        replace(clamped, share="product", dtype=BF16),
        replace(clamped, share="sample"),
        replace(clamped, geometry="full", region="everywhere", cells=(3, 1, 7)),
    ]
    apart = 2**31 + 64 if "channels" not in job else 2**30 + 64  # twice 2**30 is what wraps
    for case in cases:
        held = tensors(case, torch.device("cpu"))
        want = run(case, held, "triton")
        g = gradient(want["out"])
        near = held["x"] if "image" in job else g
        strides = list(near.stride())
        strides[{"samples": -4, "channels": -3, "prompts": 0}[job.split()[1]]] = apart
        held_far = sparse(tuple(near.shape), tuple(strides), near.dtype).copy_(near)
        got = run(case, held | {"x": held_far}, "triton", g) if "image" in job else run(case, held, "triton", held_far)
        for name in want:
            check_bits(got[name], want[name], name)
        if job == "image samples":
            rows = torch.tensor([1, 1])
            got = run(case, held | {"x": held_far}, "triton", g, rows=rows, wanted="prompt")
            want = run(case, held | {"x": near[rows]}, "triton", g, wanted="prompt")
            for name in want:
                check_bits(got[name], want[name], name)
    print("same bits")


def reach_attention() -> None:
    """Every operand of attention with its samples, heads or rows that far apart."""
    from tests.compare import check_bits
    from tests.test_attention_kernels import Case, arriving, backward, forward, tensors

    cases = [
        Case(queries=3, keys=4, heads=4, kv_heads=2, rows=3, prefix=2, causal=True),
        Case(queries=3, keys=4, heads=2, kv_heads=2, rows=3, prefix=3, index=((2, 0), (1, 2))),
    ]
    for case in cases:
        held = tensors(case, torch.device("cpu")) | {"g": None}
        held["g"], _ = arriving(case, held)
        want = dict(zip(("out", "lse"), forward(case, held), strict=True)) | backward(case, held, held["g"], None)
        for name in ("q", "k", "v", "prefix_k", "prefix_v", "g"):
            for dim in range(3):
                near = held[name]
                strides = list(near.stride())
                strides[dim] = 2**31 + 64 if near.shape[dim] == 2 else 2**30 + 64  # from the third on that wraps too
                far = held | {name: sparse(tuple(near.shape), tuple(strides), near.dtype).copy_(near)}
                got = dict(zip(("out", "lse"), forward(case, far), strict=True)) | backward(case, far, far["g"], None)
                for result in want:
                    check_bits(got[result], want[result], f"{result}, far {name}")
    print("same bits")


def reach_mapping() -> None:
    """Every operand of a map and its loss with its samples, sources or classes that far apart."""
    from fastprompt.kernels.mapping.count import count_labels_
    from tests.compare import check_bits
    from tests.test_mapping_kernels import RAGGED, SHARED, Case, operands, run

    loss = {"loss": {"reduction": "none", "smoothing": 0.1}, "class_weight": True}
    cases = [
        Case("top-k mean", "probabilities", (RAGGED, SHARED), prior=True, **loss),
        Case("logsumexp", maps=(RAGGED, SHARED), batch=2),
    ]
    for case in cases:
        held = operands(case, torch.device("cpu"))
        want = run(case, held)
        for name in ("scores", "g", "map_id", "prior", "target", "weight"):
            near = held[name]
            for dim in range(near.dim() if near is not None else 0):
                strides = list(near.stride())
                strides[dim] = 2**31 // (near.shape[dim] - 1) + 64  # the last one is beyond 2**31
                if case.reduce == "logsumexp" and (name, dim) != ("g", 1):
                    continue  # as with the loss
                far = sparse(tuple(near.shape), tuple(strides), near.dtype).copy_(near)
                for got, was in zip(run(case, held | {name: far}), want, strict=True):
                    check_bits(got, was, f"far {name} {dim}")
    logits, target = torch.randn(3, 9), torch.tensor([1, 0, 1])
    want_counts = torch.zeros(9, 2, dtype=torch.int64)
    count_labels_(want_counts, logits, target, Launch(2, 8, 4), 2)
    for strides in ((2**30 + 64, 1), (1, 2**28 + 64)):
        counts = torch.zeros_like(want_counts)
        count_labels_(counts, sparse((3, 9), strides, torch.float32).copy_(logits), target, Launch(2, 8, 4), 2)
        check_bits(counts, want_counts, "counts")
    print("same bits")


def write_far() -> None:
    """The last programs of outputs of more than 2**31 elements, on their own."""
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    from fastprompt.functional import normalization, perturb

    run, empty = InterpretedFunction.run, torch.empty
    index, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim

    def last_programs(self, *args, grid, warmup, **options):
        interpreter_builder.set_grid_dim = lambda *_: size(grid[0], 1, 1)
        interpreter_builder.set_grid_idx = lambda x, y, z: index(grid[0] - 1 - x, y, z)
        run(self, *args, grid=(2,), warmup=warmup, **options)

    def empty_far(shape, *, dtype, device, memory_format=torch.contiguous_format):
        dense = torch.empty(shape, dtype=dtype, device="meta").stride()
        return sparse(tuple(shape), dense, dtype) if torch.Size(shape).numel() > 2**31 else empty(shape, dtype=dtype)

    InterpretedFunction.run = last_programs
    x = torch.ones(1, 1, 1, 1).expand(17, 1, 1, 2**27).requires_grad_()
    meta_empty, torch.empty = torch.empty, lambda *a, **k: (empty if k.get("device") == "meta" else empty_far)(*a, **k)
    out = perturb(x, norm=normalization(0.5, 0.25), impl="triton", dtype=torch.bfloat16)
    (d,) = torch.autograd.grad(out, x, torch.ones((), dtype=out.dtype).expand_as(out))
    torch.empty = meta_empty
    for wrote, value in ((out, 2.0), (d, 4.0)):
        assert wrote.numel() > 2**31
        flat = wrote.view(-1)
        assert flat[-2048:].unique().tolist() == [value]
        assert flat[:4096].unique().tolist() == [0.0]
        assert flat[2**31 - 2**20 : 2**31 + 2**20 : 4096].unique().tolist() == [0.0]
    print("same bits")


def audit() -> None:
    """What would be launched for tensors without memory."""
    os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton
    from itertools import product

    from triton.runtime.jit import JITFunction

    from fastprompt.ops import perturbation as ops
    from tests.test_perturbation import settings

    grids = []

    def record(self, *args, grid, warmup, **options):
        grids.append((self.fn.__name__, grid))

    JITFunction.run = record
    canvases = ((1, 1), (1, 16000), (224, 224), (384, 384), (1024, 1024), (1, 2**20))
    for canvas, batch, share, clamp in product(
        canvases, (1, 256, 70_000, 2**17), ("batch", "product", "sample"), ("none", "exact")
    ):
        if canvas[0] * canvas[1] * batch > 2**37 or (share == "sample" and canvas[0] * canvas[1] * batch > 2**29):
            continue
        s = settings(canvas=canvas, image=(0, 0, *canvas), window=(0, 0, *canvas), share=share, clamp=clamp)
        meta = torch.device("meta")
        x = torch.empty(1, 3, *canvas, device=meta).expand(batch, -1, -1, -1)
        prompt = torch.empty({"batch": 1, "product": 3, "sample": batch}[share], 3, *canvas, device=meta)
        norm = torch.empty(4, 3, device=meta)
        resized = s._replace(interpolation="bilinear") if canvas[0] > 1 else s
        small = torch.empty(batch, 3, 7, 9, device=meta)
        cells = torch.empty(batch, 1, canvas[0], canvas[1] // 8 or 1, device=meta)
        for step in (s, resized):
            source = x if step is s else small
            g = ops._forward_triton(source, prompt, None, None, None, None, norm, step)
            kept = source if clamp == "exact" else None
            ops._prompt_gradient_triton(g, kept, prompt, None, None, None, norm, step)
            ops._image_gradient_triton(g, kept, prompt, None, None, None, norm, source.shape[2:], torch.float32, step)
            if share == "batch" and canvas[1] % cells.shape[3] == 0:
                ops._cells_gradient_triton(g, kept, prompt, None, cells, None, norm, step)
    for name, grid in grids:
        assert len(grid) == 1, (name, grid)
        assert 1 <= grid[0] <= 2**31 - 1, (name, grid)
    print(*sorted({name for name, _ in grids}))
    print(len(grids), "launches")


if __name__ == "__main__":
    job = sys.argv[1]
    if job == "audit":
        audit()
    elif job in ("end", "start"):
        touch_everything(job)
    elif job.startswith("attention "):
        touch_attention(job.split()[-1])
    elif job.startswith("one "):
        overrun(job.split()[-1])
    elif job == "far attention":
        reach_attention()
    elif job.startswith("mapping "):
        touch_mapping(job.split()[-1])
        touch_embedding(job.split()[-1])  # a process costs more than both
    elif job == "far mapping":
        reach_mapping()
    elif job == "far output":
        write_far()
    else:
        reach(job)
