"""The same cases on another revision: two processes that take turns, one in a git worktree of that revision.

Both run the benchmarks of this tree, so that only the package differs. What the other revision cannot run has no time there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastprompt

from . import suite, timing

ROUNDS = 3  # turns of each revision on each case


# ---- The process of one revision ----


def work(options: Namespace) -> None:
    """Answers each title on stdin with the case's result."""
    device = suite.prepare(options)
    cases: dict[str, suite.Case] = {}
    for family in options.family or suite.available():
        # A family that this revision cannot import has no cases here; wrong names were refused before.
        with contextlib.suppress(Exception):
            own = Namespace(**vars(options) | {"family": [family], "rival": None})
            cases |= {case.title: case for case in suite.choose(own, device)}
    with suite.own_stream(device):
        ceilings = {"copy": timing.copy_ceiling(device, 0.2), "matmul": timing.matmul_ceiling(device, 0.2)}
        start = {
            "package": fastprompt.__file__,
            "conditions": suite.conditions(device) | {"command": options.command},
            "ceilings": ceilings,
        }
        print(json.dumps(start), flush=True)
        for line in sys.stdin:
            title = line.rstrip("\n")
            answer: dict[str, Any] = {"failed": "this revision cannot make the case"}
            if title in cases:
                try:
                    answer = suite.run(cases[title], device, ceilings, quick=options.quick, rivals=options.rival or ())
                except Exception as failure:
                    answer = {"failed": suite.sentence(failure)}
            print(json.dumps(answer), flush=True)


# ---- Both ----


@contextlib.contextmanager
def worktree(revision: str, root: Path = suite.ROOT) -> Iterator[Path]:
    """A checkout of a revision, with this tree's benchmarks, gone afterwards whatever happened."""

    def git(*command: str, check: bool = True) -> None:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit(f"--base {revision}: git {command[0]}: {done.stderr.strip()}")

    if not (root / ".git").exists():
        raise SystemExit("--base needs a git checkout of fastprompt; an installed package has one revision")
    with tempfile.TemporaryDirectory(prefix="fastprompt-base-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder, "tree")
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it cleans up as after Ctrl-C
        try:
            git("worktree", "add", "--detach", "--force", str(tree), revision)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(root / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
            yield tree
        finally:
            patient = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C waits for the cleanup
            git("worktree", "remove", "--force", str(tree), check=False)
            git("worktree", "prune", check=False)
            signal.signal(signal.SIGINT, patient)
            signal.signal(signal.SIGTERM, before)


class Side:
    """The process of one tree."""

    def __init__(self, tree: Path, options: Namespace) -> None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "plot", "compare", "base")}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.base", json.dumps(settings)], cwd=tree, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tree)}, start_new_session=True,
        )  # fmt: skip
        try:
            self.start = self._read()
            if not Path(self.start["package"]).resolve().is_relative_to(tree.resolve()):
                raise SystemExit(f"--base: {self.start['package']} was imported, not the package in {tree}")
        except BaseException:
            self.close()
            raise

    def ask(self, title: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(title + "\n")
        self.child.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("--base: a process ended early; what it said stands above")
        return json.loads(line)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def run(options: Namespace, titles: list[str]) -> dict[str, Any]:
    """The report of this tree; under "base" that of the other revision."""
    with contextlib.ExitStack() as stack:
        sides = []
        for tree in (stack.enter_context(worktree(options.base)), suite.ROOT):
            sides.append(Side(tree, options))
            stack.callback(sides[-1].close)
        reports: list[dict[str, Any]] = [
            {
                "conditions": side.start["conditions"],
                "ceilings": side.start["ceilings"],
                "results": [],
                "not_run": [],
                "failed": [],
            }
            for side in sides
        ]
        print(f"{options.base} ({reports[0]['conditions']['commit']}) and this tree in turns, {ROUNDS} times a case", flush=True)
        start = time.perf_counter()
        for title in titles:
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                reports[1]["not_run"].append(title)
                continue
            taken: list[list[dict[str, Any]]] = [[], []]
            for turn in range(ROUNDS):
                for side in (0, 1) if turn % 2 else (1, 0):
                    taken[side].append(sides[side].ask(title))
            for side, results in enumerate(taken):
                if "failed" in results[0]:
                    reports[side]["failed" if side else "not_run"].append(f"{title}: {results[0]['failed']}")
                else:
                    reports[side]["results"].append(merged(results))
    return reports[1] | {"base": reports[0]}


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several turns as one result: medians of what was timed, the largest noise."""
    timed = [result for result in results if "noise" in result]
    one = dict((timed or results)[0])
    if not timed:
        return one
    one["rows"] = {name: dict(row) for name, row in one["rows"].items()}
    for name, row in one["rows"].items():
        for key in ("median_s", "p20_s", "p80_s"):
            if key in row:
                row[key] = statistics.median(r["rows"][name][key] for r in timed if key in r["rows"][name])
    first = [next(iter(r["rows"].values()))["median_s"] for r in timed]
    # Turns of one revision differ too: that is noise as well.
    one["noise"] = max(*(r["noise"] for r in timed), statistics.median(first) / min(first) - 1)
    for key in {"speedup", "overhead"} & one.keys():
        one[key] = {n: statistics.median(r[key][n] for r in timed if n in r[key]) for n in one[key]}
    return one


if __name__ == "__main__":
    work(Namespace(**json.loads(sys.argv[1])))
