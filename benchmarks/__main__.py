"""`python -m benchmarks`: every case side by side with its rivals, as text and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler talks to stderr

import torch

from benchmarks import suite, timing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen cases; 0 when fastprompt's every answer was right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--family", choices=suite.available(), action="append", help="default: all")
    parser.add_argument("--case", default="", help="only the cases whose title contains this")
    parser.add_argument("--dtype", action="append", help="of the output; default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: all")
    parser.add_argument(
        "--busy", action="store_true", help="one thread and CPU time, not the wall's: for a machine that others use"
    )
    parser.add_argument("--quick", action="store_true", help="little time a case, and no torch.compile")
    parser.add_argument("--seconds", type=float, default=None, help="start no new case after this long")
    parser.add_argument("--json", metavar="FILE", help="also write everything there, with the conditions")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    if options.busy:
        timing.host_clock = time.process_time
    if options.threads or options.busy:
        torch.set_num_threads(options.threads or 1)
    dtypes = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    cases = [
        case
        for family in options.family or suite.available()
        for dtype in dtypes
        for case in suite.load(family)(device, getattr(torch, dtype))
        if options.case in case.title
    ]
    start = time.perf_counter()
    # CUDA graphs need another stream than the default one.
    own_stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    with own_stream:
        ceilings = {"copy": timing.copy_ceiling(device), "matmul": timing.matmul_ceiling(device)}
        report: dict[str, Any] = {"conditions": suite.conditions(device), "ceilings": ceilings, "results": [], "not_run": []}
        print(" ".join(f"{key}={value}" for key, value in report["conditions"].items()))
        print(f"ceilings: copy {ceilings['copy'] / 1e9:,.1f} GB/s, matmul {ceilings['matmul'] / 1e12:,.3f} TFLOP/s\n")
        for case in cases:
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                report["not_run"].append(case.title)
                continue
            report["results"].append(suite.run(case, device, ceilings, quick=options.quick))
            print(suite.text(report["results"][-1]) + "\n", flush=True)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(report, file, indent=1)
                    file.write("\n")
    return summary(report)


def summary(report: dict[str, Any]) -> int:
    """Prints what was lost, refused and not run; 1 when an answer of fastprompt's was refused."""
    refused = 0
    for result in report["results"]:
        title = f"{result['case']} {result['mode']} {result['shape']} {result['dtype']}"
        ours = next(iter(result["rows"].values()))
        if "refused" in ours:
            refused += 1
            print(f"REFUSED  {title}: {ours['refused']}")
            continue
        for name in result["best"]:
            if result["speedup"].get(name, 1.0) < 0.95:
                print(f"LOSS  {title}: {result['speedup'][name]:.2f}x of {name}")
    for title in report["not_run"]:
        print(f"NOT RUN  {title}")
    count = len(report["results"])
    print(f"{count} cases, {refused} refused, {len(report['not_run'])} not run")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
