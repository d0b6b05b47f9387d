"""`python -m benchmarks.gpu --part NAME`: all that a machine with a GPU can tell, in parts of at most 10 minutes.

    correctness  answers in float32, float16 and bfloat16, every launch configuration alone, determinism, indices out of range,
                 CUDA graphs warm and cold, side streams, more than 2^31 elements, hidden syncs, host cost, the first call
    tests        the test suite, on the GPU
    kernels      every kernel beside its rivals, the goals' rows first, and there the rivals that the goals name
    steps        whole models beside the bare frozen one
    memory       peak memory of a call beside its operands; growth over many calls
    sanitizer    compute-sanitizer over small cases, where the tool is there
    ncu          achieved bandwidth and tensor-core use of each kernel, where the tool is there

A part does its most valuable tasks first. A task that fails is recorded and the next one runs: in a new process where it hung, or
took the process or its CUDA context along. What there was no time for, or what cannot run here, is listed with the reason. What
is not timed runs side by side on all cores of the host, which compile. Results go to gpu_<part>.json and .txt, with every
row of `goals.py` and its verdict. The exit code is 1 when a task failed. `python -m benchmarks.report` makes the tables of the
documentation from them. `fastprompt tune` first finds the launches for this machine. With --dry the same runs on a CPU, cut
short, kernels in Triton's interpreter: only what calls CUDA is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

import torch

from . import attention, embedding, goals, gpu_checks, gpu_processes, mapping, perturbation, suite, timing
from .gpu_checks import DTYPES, KERNELS
from .gpu_processes import NotHere

TESTS = (  # what runs kernels, the most telling files first
    "attention_kernels", "mapping_kernels", "perturbation", "embedding", "attention", "mapping", "memory", "label_head",
    "label_maps", "hoist", "attention_modules", "perturbation_modules", "embedding_modules", "verbalizers", "attach", "peft",
    "reprogram", "trains", "tuning", "checkpoint", "readme",
)  # fmt: skip

Task = tuple[str, Callable[[], Any]]  # what it returns is recorded under its name


# ---- Parts: the tasks of each ----


def correctness(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    named = [(str(dtype).removeprefix("torch."), dtype) for dtype in DTYPES[: 1 if dry else None]]
    tasks: list[Task] = []
    for check in (
        gpu_checks.check_labels, gpu_checks.check_determinism, gpu_checks.check_graph, gpu_checks.check_syncs,
        gpu_checks.check_host_cost, gpu_checks.check_streams,
    ):  # fmt: skip
        tasks.append((check.__name__.removeprefix("check_"), partial(check, device, dry)))
    for apart in (gpu_processes.check_cold, gpu_processes.check_graph_cold):
        tasks.append((apart.__name__.removeprefix("check_"), partial(apart, device, dry, left)))
    tasks.append(("halves", partial(gpu_checks.check_halves, device, dry)))
    # Those that are done side by side before: here only where that failed.
    return tasks + [
        (f"{what} {family} {name}", partial(check, device, dry, family, dtype))
        for what, check in (("answers", gpu_checks.check_answers), ("launches", gpu_checks.check_launches))
        for family in KERNELS
        for name, dtype in named
    ]


def tests(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    return [(f"tests {file}", partial(gpu_processes.check_tests, dry, file, left)) for file in TESTS[: 1 if dry else None]]


def _in_turn(cases: list[suite.Case], part: str) -> list[tuple[suite.Case, set[str]]]:
    """Cases with the rivals that goals name for them: first one case for every row of the goals, then a second one, ...; last
    those that no goal asks for, without rivals."""
    seen: dict[str, int] = {}
    ranked = []
    for case in cases:
        rows, rivals = [], set[str]()
        for goal in goals.GOALS:
            bars = [bar for bar in goal.bars if bar.part == part and bar.holds_for(case.title + " ")]
            rows += [goal.row] * bool(bars)
            for bar in bars:
                rivals |= {"frozen"} if bar.metric == "overhead" else set(bar.metric.removeprefix("over ").split("|"))
        for row in rows:
            seen[row] = seen.get(row, 0) + 1
        ranked.append((min((seen[row] for row in rows), default=len(cases)), case, rivals))
    return [(case, rivals) for _, case, rivals in sorted(ranked, key=lambda entry: entry[0])]


def _compare(
    case: suite.Case, rivals: Sequence[str] | None, device: torch.device, dry: bool, ceilings: dict[str, float]
) -> dict[str, Any]:  # fmt: skip
    try:
        result = suite.run(case, device, ceilings, quick=dry, rivals=rivals, seconds=None if dry else 0.4)
    except suite.Skip as reason:
        raise NotHere(str(reason)) from reason
    print(suite.text(result), flush=True)
    ours = next(iter(result["rows"].values()))
    if ours.get("refused", "").startswith("not here"):
        raise NotHere(ours["refused"])
    assert "refused" not in ours, ours["refused"]
    return result


def _timed(
    cases: list[suite.Case], part: str, slow: tuple[str, ...], device: torch.device, dry: bool, ceilings: dict[str, float]
) -> list[Task]:  # fmt: skip
    """slow: rivals that take long to compile, only beside the cases for which a goal names them."""
    tasks: list[Task] = []
    for case, named in _in_turn(cases, part):
        rivals = [name for name in (*case.forms, "compile") if name in named or name in case.best or name not in slow]
        tasks.append((case.title, partial(_compare, case, rivals, device, dry, ceilings)))
    return tasks


def kernels(device: torch.device, dry: bool, ceilings: dict[str, float]) -> list[Task]:
    dtype = torch.float32 if dry else torch.bfloat16
    cases = [case for family in KERNELS for case in suite.load(family)(device, dtype)]
    if dry:
        few = ("demo size forward", "CoOp forward", "map + cross-entropy forward B=32", "front forward B=2")
        cases = [case for case in cases if any(words in case.title for words in few)]
    return _timed(cases, "kernels", ("compile", "flex"), device, dry, ceilings)


def steps(device: torch.device, dry: bool, ceilings: dict[str, float]) -> list[Task]:
    from . import reprogrammed

    if dry:
        cases = [reprogrammed.vpt_deep(64, 1, 1, 2, torch.float32, mode) for mode in ("forward", "both")]
    else:
        families = [family for family in suite.available() if family not in KERNELS]
        cases = [reprogrammed.soft_prompt(64, 64, 100, torch.bfloat16)]  # row 8
        cases += [case for family in families for case in suite.load(family)(device, torch.bfloat16)]
        cases += [reprogrammed.vpt_deep(768, 12, 256, length, torch.bfloat16, "forward") for length in (50, 100)]
    return _timed(cases, "steps", ("compiled",), device, dry, ceilings)


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
    tasks: list[Task] = [(name, partial(gpu_checks.memory_of, case, device)) for name, case in made.items()]
    return [*tasks, ("growth", partial(gpu_checks.check_growth, device, dry))]


def sanitizer(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    def alone() -> dict[str, str]:
        gpu_processes.launch_small(device, dry)
        return {"kernels": "right without the tool"}

    kinds = ("memcheck", "racecheck", "synccheck", "initcheck")
    return [("alone", alone), *((kind, partial(gpu_processes.check_sanitizer, kind, dry, left)) for kind in kinds)]


def ncu(device: torch.device, dry: bool, left: Callable[[], float]) -> list[Task]:
    return [(f"kernels {family}", partial(gpu_processes.check_ncu, dry, family, left)) for family in KERNELS]


PARTS: dict[str, Callable[..., list[Task]]] = {
    "correctness": correctness, "tests": tests, "kernels": kernels, "steps": steps, "memory": memory, "sanitizer": sanitizer,
    "ncu": ncu,
}  # fmt: skip

# What a part does first, side by side: names of tasks, the longest first, and how many processes at a time on 16 cores.
BESIDE: dict[str, tuple[tuple[str, ...], int]] = {
    "correctness": (
        (
            *(f"launches attention {dtype}" for dtype in ("float32", "bfloat16", "float16")),
            "answers attention",  # one after the other: each takes 50 GB in float64
            *(
                f"{what} {family} {dtype}"
                for what in ("answers", "launches")
                for family in ("perturbation", "mapping", "embedding")
                for dtype in ("float32", "bfloat16", "float16")
            ),
        ),
        14,
    ),
    "tests": (tuple(f"tests {file}" for file in TESTS), 5),  # each on three processes
}
# Seconds after which a task hangs. The tools have a limit of their own, and what runs side by side that of its part.
HANGS = {"correctness": 150.0, "kernels": 100.0, "steps": 200.0, "memory": 100.0}
AGAIN = 3  # the exit code of a process whose CUDA context died: the tasks that are left need another one


def tasks_of(part: str, device: torch.device, dry: bool, ceilings: dict[str, float], left: Callable[[], float]) -> list[Task]:
    given = {"kernels": (ceilings,), "steps": (ceilings,), "memory": ()}.get(part, (left,))
    return PARTS[part](device, dry, *given)


# ---- One process: tasks one after the other ----


def work(part: str, device: torch.device, dry: bool, seconds: float, out: Path, only: str = "") -> dict[str, Any]:
    """Does the tasks of a part one after the other; the file holds before and after each of them what is known.

    What an earlier process has written there is kept, and its tasks are not done again.
    """
    end = time.perf_counter() + seconds
    timed = part in ("kernels", "steps")
    random.seed(0)
    with contextlib.nullcontext() if dry else torch.cuda.stream(torch.cuda.Stream()):
        report: dict[str, Any] = {"part": part, "dry": dry, "results": [], "checks": {}, "failed": {}, "not_run": {}, "done": []}
        if out.exists():
            report |= json.loads(out.read_text())
        if timed and not report.get("ceilings"):
            report["ceilings"] = {"copy": timing.copy_ceiling(device), "matmul": timing.matmul_ceiling(device)}
        report["conditions"] = report.get("conditions") or suite.conditions(device)
        left = lambda: end - time.perf_counter()  # noqa: E731
        tasks = tasks_of(part, device, dry, report.get("ceilings", {}), left)
        tasks = [task for task in tasks if only in task[0] and task[0] not in report["done"]]
        report["not_run"] |= {name: "the time was up" for name, _ in tasks}
        while tasks:
            name, task = tasks.pop(0)  # what a case holds goes with it: models, and their graphs
            if left() > 0:
                report["running"] = name
                _write(out, report)
                _do(name, task, report, timed)
                report["done"].append(name)
            report["running"] = ""
            del task
            _write(out, report)
            if "the context died" in report["failed"].get(name, ""):
                break
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
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
            report["failed"][name] += " (the context died)"
        said = f"FAIL  {report['failed'][name]}"
    report["not_run"].pop(name, None)
    print(f"{said[:600] if timed else said}  {name}  ({time.perf_counter() - start:.1f} s)", flush=True)


# ---- A part: processes that are watched ----


def _watched(part: str, only: str, held: Path, log: Path, end: float, dry: bool, hanging: float) -> int:
    """Processes that do the tasks whose name holds `only`, a new one where a task took the last one along, or `hanging` seconds.
    The exit code."""
    command = [sys.executable, "-m", f"{__package__}.gpu", "--work", part, "--out", str(held), "--only", only, *["--dry"] * dry]
    while True:
        seconds = max(1.0, end - time.monotonic())
        margin = min(30.0, 0.1 * seconds)

        def hangs() -> bool:
            return held.exists() and time.time() - held.stat().st_mtime > hanging

        before = _read(held)
        done = gpu_processes.run([*command, "--seconds", str(seconds - margin)], {}, seconds - margin / 5, log, hangs)
        known = _read(held)
        running = known.get("running", "")
        if running and done.returncode != 0:
            up = time.monotonic() > end - margin
            why = f"exit code {done.returncode}: {done.stdout[-800:]}" if done.returncode != 124 else "it hung and was ended"
            if up:
                known["not_run"][running] = "the time was up"
            else:
                known["failed"][running] = why
                known["not_run"].pop(running, None)
            known["done"].append(running)
            known["running"] = ""
            _write(held, known)
            if up:
                return 124
        elif done.returncode in (0, 1, 124):  # else its CUDA context died, or it did when that was taken down
            return done.returncode
        if len(known.get("done", ())) <= len(before.get("done", ())) or time.monotonic() > end - margin:
            return done.returncode


def _read(held: Path) -> dict[str, Any]:
    return json.loads(held.read_text()) if held.exists() else {}


def _write(held: Path, known: dict[str, Any]) -> None:
    """Whole or not at all: a process can be ended at any moment."""
    draft = held.with_suffix(".part")
    draft.write_text(json.dumps(known, indent=1) + "\n")
    draft.replace(held)


def _side_by_side(part: str, held: Path, log: Path, end: float, only: str) -> None:
    """The tasks of `BESIDE` in processes of their own; what they found goes to `held`, what they said to `log`."""
    names, most = BESIDE[part]
    names = tuple(name for name in names if only in name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, min(most, most * cores // 16))) as pool:
        files = [(Path(folder) / f"{n}.json", Path(folder) / f"{n}.txt") for n in range(len(names))]
        started = [
            pool.submit(_watched, part, name, *own, end, False, float("inf")) for name, own in zip(names, files, strict=True)
        ]  # fmt: skip
        codes = [each.result() for each in started]
        whole: dict[str, Any] = {}
        for name, code, (own, said) in zip(names, codes, files, strict=True):
            known = _read(own)
            if code not in (0, 1, 124, AGAIN) or not known:
                words = said.read_text(errors="replace")[-800:] if said.exists() else ""
                known.setdefault("failed", {})[f"{name}: the process"] = f"exit code {code}: {words}"
            for key, value in known.items():
                whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else whole.get(key) or value
            whole["done"] = sorted({*whole.get("done", ()), *known.get("done", ())})
            with log.open("a") as together:
                together.write(said.read_text(errors="replace") if said.exists() else f"{name}: nothing was said\n")
    _write(held, {"results": [], "checks": {}, "failed": {}, "not_run": {}} | whole)


def run_part(part: str, dry: bool, minutes: float, folder: Path, only: str = "", commit: str = "") -> int:
    """A part in processes that are ended when the time is up; what they knew by then is kept."""
    held, log = folder / f"gpu_{part}.json", folder / f"gpu_{part}.txt"
    for old in (held, log):
        old.unlink(missing_ok=True)
    end = time.monotonic() + 60 * minutes - min(5.0, 0.02 * 60 * minutes)
    if part in BESIDE and not dry:
        _side_by_side(part, held, log, end - 0.3 * 60 * minutes * (part == "correctness"), only)
    code = _watched(part, only, held, log, end, dry, HANGS.get(part, float("inf")))
    said = log.read_text(errors="replace") if log.exists() else ""
    known: dict[str, Any] = {"part": part, "dry": dry, "failed": {}, "not_run": {}} | _read(held)
    if code not in (0, 1, 124, AGAIN) or "conditions" not in known:
        known["failed"]["the part itself"] = f"exit code {code}: {said[-800:]}"
    elif commit and known["conditions"]["commit"] == "unknown":
        known["conditions"]["commit"] = commit
    known["exit_code"] = code
    rows = goals.evaluate({} if dry else {part: known})
    known["goals"] = rows
    _write(held, known)
    lines = [said.strip(), f"\n==== goals: what {part} says ====", goals.text(rows), f"\n==== {part} ===="]
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
    parser.add_argument("--commit", default="", help="of this tree, for the report of a copy that git knows nothing of")
    parser.add_argument("--dry", action="store_true", help="on a CPU, cut short")
    parser.add_argument("--work", choices=(*PARTS, "small", "once"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here; --dry runs on the CPU", file=sys.stderr)
        return 1
    if options.work == "small":
        gpu_processes.launch_small(device, options.dry)
        return 0
    if options.work == "once":
        gpu_processes.launch_once(device, options.dry, options.only)
        return 0
    if options.work:
        report = work(options.work, device, options.dry, options.seconds, Path(options.out), options.only)
        died = any("the context died" in reason for reason in report["failed"].values())
        return AGAIN if died else int(bool(report["failed"]))
    results = tempfile.mkdtemp(prefix="gpu-dry-") if options.dry else str(Path(__file__).parent / "results")
    folder = Path(options.out or results)
    folder.mkdir(parents=True, exist_ok=True)
    parts = options.part or PARTS
    return max(run_part(part, options.dry, options.minutes, folder, options.only, options.commit) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
