"""`fastprompt bench`, `python -m benchmarks`: every case side by side with its rivals, as text, JSON and pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler talks to stderr

import torch

from . import base, compare, pictures, suite, timing


def sizes(text: str) -> dict[str, int]:
    """ "B=64,T=128" as {"B": 64, "T": 128}."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and value.isdecimal() and int(value) for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"expected sizes such as B=64,T=128, got {text!r}")
    return {name: int(value) for name, _, value in pairs}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Runs the chosen cases; 1 when a case failed, fastprompt's answer was refused, or it became slower; 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--family", choices=suite.available(), action="append", help="default: all")
    parser.add_argument("--case", default="", help="only the cases whose title contains this")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), action="append",
        help="of the output; default: float32 on a CPU, bfloat16 on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=sizes, action="append", metavar="B=64,T=128",
        help="sizes of your own, for every chosen case that has them; again for another shape; ?=1 lists them",
    )  # fmt: skip
    parser.add_argument("--rival", action="append", metavar="NAME", help="only these rivals, and the cases that have one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: all")
    parser.add_argument(
        "--busy", action="store_true", help="one thread and CPU time, not the wall's: for a machine that others use"
    )
    parser.add_argument("--quick", action="store_true", help="little time a case, and no torch.compile")
    parser.add_argument("--seconds", type=float, default=None, help="start no new case after this long")
    parser.add_argument("--json", metavar="FILE", help="also write everything there, with the conditions")
    parser.add_argument("--plot", metavar="FOLDER", help="also draw pictures there (needs matplotlib)")
    parser.add_argument("--compare", metavar="FILE", help="with the times in this older --json; 1 when fastprompt is slower now")
    parser.add_argument(
        "--base", metavar="REV", help="the same cases on another revision too, in turns; 1 when slower than there"
    )
    parser.add_argument("--bound", type=float, default=0.1, help="by which share slower is slower (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.command = " ".join([prog, *(sys.argv[1:] if arguments is None else arguments)])
    try:
        device = suite.prepare(options)
        cases = suite.choose(options, device)
        old = compare.read(options.compare) if options.compare else None
        if options.plot:
            pictures.pyplot()
    except (ValueError, OSError, ImportError) as wrong:
        parser.error(str(wrong))
    if not cases:
        print(f"no case's title contains {options.case!r}", file=sys.stderr)
    if options.base:
        report = base.run(options, [case.title for case in cases])
        _write(report, options.json)
    else:
        report = _run(options, cases, device)
    code = summary(report)
    if options.plot:
        print("\n".join(f"drawn: {path}" for path in pictures.draw(report, options.plot)))
    for before in (report.get("base"), old):
        if before is not None:
            code |= compare.compare(before, report, options.bound)
    return code


def _run(options: argparse.Namespace, cases: list[suite.Case], device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    with suite.own_stream(device):
        seconds = 0.2 if options.quick else 1.0
        ceilings = {"copy": timing.copy_ceiling(device, seconds), "matmul": timing.matmul_ceiling(device, seconds)}
        conditions = suite.conditions(device) | {"command": options.command}
        report: dict[str, Any] = {"conditions": conditions, "ceilings": ceilings, "results": [], "not_run": [], "failed": []}
        print(" ".join(f"{key}={value}" for key, value in report["conditions"].items()))
        print(f"ceilings: copy {ceilings['copy'] / 1e9:,.1f} GB/s, matmul {ceilings['matmul'] / 1e12:,.3f} TFLOP/s\n")
        for case in cases:
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                report["not_run"].append(case.title)
                continue
            try:
                report["results"].append(suite.run(case, device, ceilings, quick=options.quick, rivals=options.rival))
                print(suite.text(report["results"][-1]) + "\n", flush=True)
            except suite.Skip as reason:
                report["not_run"].append(f"{case.title}: {reason}")
            except Exception as failure:  # one case that cannot be made does not end the others
                report["failed"].append(f"{case.title}: {suite.sentence(failure)}")
            _write(report, options.json)
    return report


def _write(report: dict[str, Any], path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


def summary(report: dict[str, Any]) -> int:
    """Prints what was lost, refused, failed and not run; 1 when a case failed or an answer of fastprompt's was refused."""
    refused = 0
    for result in report["results"]:
        title = compare.title(result)
        ours = next(iter(result["rows"].values()))
        if "refused" in ours:
            refused += 1
            print(f"REFUSED  {title}: {ours['refused']}")
            continue
        for name in result["best"]:
            if result["speedup"].get(name, 1.0) < 0.95:
                print(f"LOSS  {title}: {result['speedup'][name]:.2f}x of {name}")
    for verdict in ("failed", "not_run"):
        for title in report[verdict]:
            print(f"{verdict.upper().replace('_', ' ')}  {title}")
    count, failed = len(report["results"]), len(report["failed"])
    print(f"{count} cases, {refused} refused, {len(report['not_run'])} not run" + (f", {failed} failed" if failed else ""))
    return int(refused + failed > 0)


if __name__ == "__main__":
    sys.exit(main())
