"""What the first call compiles, and what new batch sizes compile after it, with no GPU: goal 18.

Launches are recorded, not run; Triton's own binder gives the key under which the JIT would look for compiled code. Used by
test_first_call.py in a process of its own, without the interpreter. `python -m tests.first_call --compile [N]` also compiles
all (N) kernels of the first calls for sm_90 from an empty cache and adds up the processor's seconds.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import sys
import tempfile
import time

import torch

from tests.aot import TARGETS, recorded_launches, source


def steps() -> dict:
    """One step of every kind, of a batch size: forward and gradient, on shapes whose strides are those of real ones."""
    from fastprompt import functional

    half = torch.bfloat16
    groups = functional.segments(torch.arange(1000).view(10, 100), 1000)
    norm = functional.normalization(0.5, 0.5, channels=3)
    mask = torch.randn(1, 3, 32, 32, requires_grad=True)
    soft = torch.randn(1, 8, 64, requires_grad=True)
    vocab = torch.zeros(99, 64, dtype=half)
    prefix = torch.zeros(1, 4, 32, 64, dtype=half, requires_grad=True)
    head = torch.zeros(500, 64, dtype=half)
    prompt = torch.randn(1, 3, 32, 32, requires_grad=True)
    several = torch.randn(4, 3, 32, 32, requires_grad=True)
    index = torch.arange(10)

    def pixels(batch, size):
        return torch.zeros((batch, 3, size, size), dtype=torch.uint8)

    def gradient(out, *wanted):
        torch.autograd.grad(out, wanted, torch.empty_like(out))

    def images(of, size, **options):
        def run(batch):
            index = torch.zeros(batch, dtype=torch.int64) if options.get("share") == "index" else None
            given = {"norm": norm, "dtype": half, "index": index, "impl": "triton", **options}
            gradient(functional.perturb(pixels(batch, size), of, canvas=32, **given), of)

        return run

    def masks(batch):
        cells = torch.zeros((batch, 3, 4, 4), requires_grad=True)
        gradient(functional.perturb(pixels(batch, 32), mask, cells=cells, norm=norm, dtype=half, impl="triton"), mask, cells)

    def loss(labels, **options):
        def run(batch):
            logits = torch.empty((batch, 1000), dtype=half, requires_grad=True)
            y = torch.zeros(batch, dtype=torch.int64)
            gradient(functional.mapped_cross_entropy(logits, labels, y, impl="triton", **options), logits)

        return run

    def mapped(batch):
        logits = torch.empty((batch, 1000), dtype=half, requires_grad=True)
        gradient(functional.map_labels(logits, index, impl="triton"), logits)

    def counted(k):
        def run(batch):
            counts, y = torch.zeros((1000, 10), dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
            functional.count_labels_(counts, torch.empty((batch, 1000), dtype=half), y, k=k, impl="triton")

        return run

    def columns(batch):
        hidden = torch.zeros((batch, 64), dtype=half, requires_grad=True)
        y = torch.zeros(batch, dtype=torch.int64)
        gradient(functional.label_head(hidden, functional.label_columns(index, head), target=y, impl="triton"), hidden)

    def gathered(batch):
        ids = functional.place_prompt(torch.zeros((batch, 20), dtype=torch.int64), 8)[0]
        gradient(functional.soft_gather(ids, vocab, soft, impl="triton"), soft)

    def attended(queries, causal):
        def run(batch):
            q = torch.empty((batch, 8, queries, 64), dtype=half, requires_grad=True)
            k = torch.empty((batch, 4, max(queries, 32), 64), dtype=half, requires_grad=True)
            out = functional.prefix_attention(q, k, k, prefix, prefix, causal=causal, impl="triton")
            gradient(out, q, k, prefix)

        return run

    return {
        "padded prompt": images(prompt, 16, hole="image", squash="sigmoid"), "watermark": images(prompt, 32),
        "resized": images(prompt, 24, resize=16), "of several": images(several, 32, share="index", hole=(4, 4, 24, 24)),
        "masks": masks, "one-to-one": mapped,
        "one-to-one loss": loss(index), "mean of 100": loss(groups), "probabilities": loss(groups, of="probabilities"),
        "count": counted(None), "count top-3": counted(3), "label head": columns, "soft gather": gathered,
        "vision attention": attended(50, False), "causal attention": attended(32, True), "decode": attended(1, False),
    }  # fmt: skip


def keys(sizes: list[int]) -> dict[str, list[list[str]]]:
    """For every step, the keys of each call's launches that no earlier call of the step had; and what is compiled for them."""
    import triton.runtime.jit as jit
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from fastprompt import _runtime

    backend = make_backend(GPUTarget(*TARGETS["sm_90"]))
    _runtime.INTERPRETING = True  # CPU tensors may take the way of the kernels; with launches recorded, nothing runs
    _runtime.arch = lambda device: "sm_90"
    binder = functools.cache(lambda kernel: jit.create_function_from_signature(kernel.signature, kernel.params, backend))
    found: dict[str, list[list[str]]] = {}
    with recorded_launches() as launches:
        for name, step in steps().items():
            seen: set[str] = set()
            found[name] = []
            for batch in sizes:
                launches.clear()
                step(batch)
                new = []
                assert launches, name
                for kernel, arguments, options in launches:
                    _, specialization, rest = binder(kernel)(**arguments, **options)
                    key = kernel.fn.__name__ + jit.compute_cache_key({}, specialization, rest)
                    if key not in seen:
                        seen.add(key)
                        new.append(key)
                        COMPILED.setdefault(key, (kernel, arguments, options))
                found[name].append(new)
    return found


COMPILED: dict[str, tuple] = {}


def compile_all(wanted: list[str]) -> dict[str, float]:
    """Processor's and wall's seconds to compile these for sm_90, one after the other, from an empty cache."""
    import triton
    from triton.backends.compiler import GPUTarget

    def spent():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        start, wall = spent(), time.perf_counter()
        for key in wanted:
            kernel, arguments, options = COMPILED[key]
            triton.compile(source(kernel, arguments), target=GPUTarget(*TARGETS["sm_90"]), options=dict(options))
        return {"kernels": len(wanted), "cpu_s": round(spent() - start, 1), "wall_s": round(time.perf_counter() - wall, 1)}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "in a process without the interpreter"
    random.seed(0)
    sizes = [64, 1, 8, 16, *(random.randint(2, 512) for _ in range(97))]
    found = keys(sizes)
    report = {
        name: {
            "first": len(calls[0]), "calls": len(calls) - 1, "recompilations": sum(map(len, calls[1:])),
            "at": {size: [key[:60] for key in new] for size, new in zip(sizes[1:], calls[1:], strict=True) if new},
        }
        for name, calls in found.items()
    }  # fmt: skip
    if "--compile" in sys.argv:
        wanted = sorted({key for calls in found.values() for key in calls[0]})
        count = int(sys.argv[-1]) if sys.argv[-1].isdigit() else len(wanted)
        report["cold"] = {"of": len(wanted)} | compile_all(random.sample(wanted, count))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
