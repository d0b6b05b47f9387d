"""`python -m benchmarks.scaling`: how cost grows with batch, prompt length, tasks, classes and source labels, beside the law.

One operation a sweep, its sizes timed interleaved. The law is a power, cost ~ size^p, and the slope is that of a straight line
through log(cost) over log(size); what a call costs at any size makes it smaller, and is printed beside it, from a straight line
through cost over size. A slope above the law plus 0.15 is printed as such, and the command returns 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt import functional

from . import suite, timing

SLACK = 0.15


@dataclass(frozen=True)
class Sweep:
    """`make(size)` gives a call; its cost should grow as size ** law, for the reason `why`."""

    name: str
    over: str
    sizes: tuple[int, ...]
    law: float
    why: str
    make: Callable[[int], timing.Call]


def sweeps(device: torch.device) -> list[Sweep]:
    """The sweeps of a device: small on a CPU, on a GPU at sizes that fill it."""
    large = device.type == "cuda"
    dtype = torch.bfloat16 if large else torch.float32
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=random, device=device)

    canvas = 224 if large else 64
    norm = functional.normalization(0.5, 0.25, channels=3, device=device)

    def perturb(batch: int, tasks: int = 1) -> timing.Call:
        """A padded prompt on a batch out of a set on the device; forward and backward."""
        images, rows = whole(256, 512, 3, 32, 32).to(torch.uint8), whole(512, batch)
        prompt = normal(tasks, 3, canvas, canvas).requires_grad_()
        index = whole(tasks, batch) if tasks > 1 else None
        g = normal(batch, 3, canvas, canvas)

        def call() -> Any:
            shown = functional.perturb(
                images, prompt, rows=rows, index=index, canvas=canvas, hole="image", squash="sigmoid", norm=norm, dtype=dtype
            )
            return torch.autograd.grad(shown, prompt, g)

        return call

    def attention(batch: int, length: int) -> timing.Call:
        """One query a sample over a prefix that the batch shares."""
        heads, width = (32, 128) if large else (8, 64)
        q, k, v = normal(batch, heads, 1, width), normal(batch, heads, 1, width), normal(batch, heads, 1, width)
        prefix_k, prefix_v = normal(1, heads, length, width), normal(1, heads, length, width)
        return lambda: functional.prefix_attention(q, k, v, prefix_k, prefix_v)

    def attended(tasks: int, batch: int, length: int) -> timing.Call:
        heads, width = (32, 128) if large else (8, 64)
        q, k, v = normal(batch, heads, 1, width), normal(batch, heads, 1, width), normal(batch, heads, 1, width)
        prefix_k, prefix_v = normal(tasks, heads, length, width), normal(tasks, heads, length, width)
        index = torch.arange(batch, device=device) % tasks
        return lambda: functional.prefix_attention(q, k, v, prefix_k, prefix_v, prefix_index=index)

    def classes(count: int, batch: int) -> timing.Call:
        """The label columns of a head of 50,257."""
        hidden, weight = normal(batch, 1024), normal(50257, 1024)
        columns = functional.label_columns(whole(50257, count).unique()[:count], weight)
        return lambda: functional.label_head(hidden, columns)

    def sources(count: int, batch: int, of: str) -> timing.Call:
        """Ten classes' loss of all sources (their mean), or of ten of them."""
        scores, y = normal(batch, count), whole(10, batch)
        labels: Any = torch.arange(10, device=device)
        if of == "all":
            labels = functional.segments([list(range(t, count, 10)) for t in range(10)], count).to(device)
        return lambda: functional.mapped_cross_entropy(scores, labels, y)

    batches = (64, 256, 1024, 4096) if large else (32, 64, 128, 256)
    lengths = (512, 1024, 2048, 4096, 8192)
    many = (256, 1024, 4096, 16384) if large else (2048, 4096, 8192, 16384)
    labels = (1000, 4000, 16000, 32000) if large else (2000, 4000, 8000, 16000)
    rows = 16384 if large else 1024  # so that no cache holds the scores
    return [
        Sweep("padded prompt, forward and backward", "batch", batches, 1, "each pixel written once", perturb),
        Sweep("shared prefix, one query", "batch", batches, 1, "each query once", lambda n: attention(n, 1024)),
        Sweep("shared prefix, one query", "prompt length", lengths, 1, "each key once", lambda n: attention(64, n)),
        Sweep("padded prompt, a task a sample", "tasks in a batch", (2, 4, 8, 16), 0, "the same pixels, other prompts",
              lambda n: perturb(batches[2], n)),
        Sweep("prefix, a task a sample", "tasks in a batch", (1, 2, 4, 8, 16), 1, "each task's keys once",
              lambda n: attended(n, 64, 1024)),
        Sweep("label head", "classes", many, 1, "a column a class", lambda n: classes(n, 64)),
        Sweep("one-to-one map, loss", "source labels", labels, 0, "ten columns are read", lambda n: sources(n, rows, "ten")),
        Sweep("many-to-one map, loss", "source labels", labels, 1, "each score once", lambda n: sources(n, rows, "all")),
    ]  # fmt: skip


def measure(sweep: Sweep, device: torch.device, seconds: float) -> dict[str, Any]:
    calls = {str(size): [sweep.make(size)] for size in sweep.sizes}
    times = timing.compare(calls, device, seconds)
    median = [times[str(size)].median for size in sweep.sizes]
    slope, _ = np.polyfit(np.log(sweep.sizes), np.log(median), 1)
    _, fixed = np.polyfit(sweep.sizes, median, 1, w=1 / np.array(median))
    return {
        "name": sweep.name, "over": sweep.over, "sizes": list(sweep.sizes), "median_s": median, "law": sweep.law,
        "why": sweep.why, "slope": float(slope), "fixed_s": float(fixed), "kept": bool(slope <= sweep.law + SLACK),
        "clock": times[str(sweep.sizes[0])].clock,
    }  # fmt: skip


def text(result: dict[str, Any]) -> str:
    costs = "  ".join(f"{size}: {spent * 1e3:.3g}" for size, spent in zip(result["sizes"], result["median_s"], strict=True))
    verdict = "" if result["kept"] else "  ABOVE THE LAW"
    return (
        f"{result['name'] + ' over ' + result['over']:58}law {result['law']:.0f}  slope {result['slope']:5.2f}"
        f"  fixed {result['fixed_s'] * 1e3:6.2f} ms{verdict}\n"
        f"    {result['why']}; ms at {costs}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0 when no cost grows faster than its law."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--busy", action="store_true", help="one thread and CPU time: for a machine that others use")
    parser.add_argument("--seconds", type=float, default=0.15, help="of measuring each size (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write everything there, with the conditions")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.busy:
        timing.host_clock = time.process_time
        torch.set_num_threads(1)
    report: dict[str, Any] = {"conditions": suite.conditions(device), "results": []}
    print(" ".join(f"{key}={value}" for key, value in report["conditions"].items()))
    for sweep in sweeps(device):
        report["results"].append(measure(sweep, device, options.seconds))
        print(text(report["results"][-1]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return int(not all(result["kept"] for result in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
