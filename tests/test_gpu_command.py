"""`python -m benchmarks.gpu` without a GPU: every part runs, and it fails when a check fails."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import goals, gpu, gpu_checks, gpu_processes, suite
from tests.conftest import HAS_GPU, HAS_TRITON

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="needs the interpreter")


def result(family="attention", case="Llama", mode="forward", shape="B=8 T=2048 P=32 causal", speedup=None, **more):
    rows = {"fastprompt": {"median_s": 1e-3, "launches": 1}}
    return {
        "family": family, "case": case, "mode": mode, "shape": shape, "dtype": "bfloat16", "rows": rows, "flops": 5e11,
        "floor_s": 1e-3, "of_copy_ceiling": 0.5, "best": ["plain"], "speedup": speedup or {}, **more,
    }  # fmt: skip


def row(name, **parts):
    return next(row for row in goals.evaluate(parts) if row["row"] == name)


def test_every_row_has_a_verdict_or_a_reason():
    rows = goals.evaluate({})
    assert [r["row"] for r in rows][4:] == [*(f"C{n}" for n in range(1, 11)), *map(str, range(1, 19))]
    assert all(r["verdict"] == "not measured" and r["reason"] and r["must"] for r in rows)
    assert goals.text(rows).count("not measured") == len(rows)
    names = set(gpu.PARTS) | {"cpu"}
    assert {bar.part for goal in goals.GOALS for bar in goal.bars} <= names


def test_verdicts_are_those_of_the_worst_case():
    ceilings = {"matmul": 1e15, "copy": 4e12}
    fast = {"flash": 2.0, "dense mask": 4.0, "flex": 1.3, "cuDNN": 1.0}

    def kernels(*results):
        return {"kernels": {"results": list(results), "ceilings": ceilings}}

    good = result(speedup=fast, flops=6e11)
    assert row("1", **kernels(good))["verdict"] == "moonshot"
    assert row("1", **kernels(good, result(speedup=fast | {"dense mask": 2.5}, flops=6e11)))["verdict"] == "must"
    slow = row("1", **kernels(good, result(speedup=fast | {"flash": 1.05})))
    assert slow["verdict"] == "MISSED"
    assert next(bar for bar in slow["bars"] if bar["bar"].endswith("over flash"))["measured"] == 1.05
    assert row("1", **kernels(result(speedup=fast, flops=9e11)))["verdict"] == "beyond its limit"
    del fast["flex"]
    assert row("1", **kernels(result(speedup=fast, flops=6e11)))["verdict"] == "not measured"
    assert row("2", **kernels(good))["verdict"] == "not measured"  # its backward is another case
    assert (
        row("14", **kernels(result("mapping", "map + cross-entropy", "forward", "B=256 S=1000 T=10")))["verdict"]
        == "not measured"
    )


def test_overheads_and_checks_are_at_most():
    def steps(frozen):
        made = result("reprogrammed", "soft prompt", "both", "B=64 T=64 P=100", {"frozen": frozen, "tokens": 2.2})
        return {"steps": {"results": [made], "ceilings": {}}}

    assert row("training, soft", **steps(1 / 1.06))["verdict"] == "moonshot"
    assert row("training, soft", **steps(1 / 1.10))["verdict"] == "must"
    assert row("training, soft", **steps(1 / 1.20))["verdict"] == "MISSED"
    assert row("8", **steps(1.0))["verdict"] == "must"
    checks = {
        "host_cost": {"largest_us": 9.0},
        "syncs": {"syncs": 0},
        "cold": {"first_step_s": 70, "compiled_for_new_batch_sizes": 2},
    }
    assert row("17", correctness={"checks": checks})["verdict"] == "must"
    assert row("18", correctness={"checks": checks})["verdict"] == "MISSED"


def test_a_failing_task_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails():
        raise AssertionError("other bits in another run")

    def cannot():
        raise gpu.NotHere("no such tool")

    tasks = [("first", dict), ("second", fails), ("third", cannot), ("fourth", lambda: {"runs": 3})]
    late = [("late", lambda: 1 / 0)]
    monkeypatch.setattr(gpu, "tasks_of", lambda *_: list(tasks))
    report = gpu.work("correctness", CPU, True, 60, tmp_path / "out.json")
    assert report["checks"] == {"first": {}, "fourth": {"runs": 3}}
    assert report["failed"] == {"second": "AssertionError: other bits in another run"}
    assert report["not_run"] == {"third": "no such tool"}
    assert json.loads((tmp_path / "out.json").read_text()) == report
    monkeypatch.setattr(gpu, "tasks_of", lambda *_: late)
    assert gpu.work("correctness", CPU, True, -1, tmp_path / "late.json")["not_run"] == {"late": "the time was up"}
    assert gpu.main(["--dry", "--work", "correctness", "--seconds", "-1", "--out", str(tmp_path / "late.json")]) == 0
    tasks[:] = [("second", fails)]
    monkeypatch.setattr(gpu, "tasks_of", lambda *_: tasks)
    assert gpu.main(["--dry", "--work", "correctness", "--out", str(tmp_path / "failed.json")]) == 1


def test_checks_fail_when_something_is_wrong(monkeypatch):
    from fastprompt import functional, tune

    monkeypatch.setattr(tune, "differs", lambda *_: True)
    with pytest.raises(AssertionError, match="wrong answers"):
        gpu_checks.check_launches(CPU, True, "embedding", torch.float32)
    monkeypatch.undo()
    right = functional.perturb
    monkeypatch.setattr(functional, "perturb", lambda x, *a, **k: right(x, *a, **k) + (len(x) == 4))
    with pytest.raises(AssertionError, match="perturb: rows 0 to 2 differ"):
        gpu_checks.check_halves(CPU, True)
    monkeypatch.undo()
    calls = []
    right_loss = functional.mapped_cross_entropy
    monkeypatch.setattr(gpu_checks, "_shapes", lambda *_: gpu.mapping.mapped_loss(4, 20, 3, torch.float32)[1:])
    assert gpu_checks.check_determinism(CPU, True) == {"runs": 3}
    monkeypatch.setattr(
        functional, "mapped_cross_entropy", lambda *a, **k: calls.append(1) or right_loss(*a, **k) * (1 + 1e-6 * len(calls))
    )
    with pytest.raises(AssertionError, match="other bits"):
        gpu_checks.check_determinism(CPU, True)


def tool(folder, name, script):
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_the_tools_are_used_where_they_are(tmp_path, monkeypatch):
    left = lambda: 30.0  # noqa: E731
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin:/usr/bin")
    with pytest.raises(gpu.NotHere, match="not available: ncu"):
        gpu_processes.check_ncu(True, "embedding", left)
    tool(tmp_path, "compute-sanitizer", 'echo "$@" >> $0.log; echo "========= ERROR SUMMARY: 0 errors"')
    assert gpu_processes.check_sanitizer("memcheck", True, left) == {"errors": 0}
    said = (tmp_path / "compute-sanitizer.log").read_text()
    assert said.startswith("--tool memcheck ")
    assert said.strip().endswith("-m benchmarks.gpu --work small --dry")
    tool(
        tmp_path,
        "compute-sanitizer",
        'echo "========= Invalid __global__ write"; echo "========= ERROR SUMMARY: 2 errors"; exit 1',
    )
    with pytest.raises(AssertionError, match="Invalid __global__ write"):
        gpu_processes.check_sanitizer("racecheck", True, left)
    assert gpu_processes.check_sanitizer("initcheck", True, left) == {"errors": 2}
    tool(tmp_path, "compute-sanitizer", 'echo "Error: Device not supported"; exit 1')
    with pytest.raises(gpu.NotHere, match="Device not supported"):
        gpu_processes.check_sanitizer("memcheck", True, left)
    monkeypatch.setattr(gpu_processes, "run", lambda command, *_: subprocess.CompletedProcess(command, 124, ""))
    with pytest.raises(gpu.NotHere, match="time was up"):
        gpu_processes.check_sanitizer("memcheck", True, left)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin:/usr/bin")
    rows = [
        '"ID","Kernel Name","gpu__time_duration.sum","gpu__dram_throughput.avg.pct_of_peak","sm__pipe_tensor.pct"',
        '"","","us","%","%"', '"0","soft_gather_kernel","1,234.5","81.5","0"', '"1","soft_gather_kernel","2.0","99","0"',
        '"2","attention_forward_kernel","70","20","61.25"', '"3","elementwise(float)","70","20","n/a"',
    ]  # fmt: skip
    (tmp_path / "rows.csv").write_text("==PROF== Connected\n" + "\n".join(rows) + "\n")
    tool(tmp_path, "ncu", "cat $(dirname $0)/rows.csv")
    found = gpu_processes.check_ncu(True, "embedding", left)
    assert found["kernels"] == {
        "soft_gather_kernel": {"us": 1234.5, "dram_percent": 81.5, "tensor_percent": 0.0},
        "attention_forward_kernel": {"us": 70.0, "dram_percent": 20.0, "tensor_percent": 61.25},
    }
    assert found["not seen"] == ["locate_slots_kernel", "soft_gradient_kernel", "soft_gradient_sum_kernel"]
    tool(tmp_path, "ncu", 'echo "==ERROR== LibraryNotLoaded"; exit 1')
    with pytest.raises(gpu.NotHere, match="LibraryNotLoaded"):
        gpu_processes.check_ncu(True, "embedding", left)


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--part", "ncu"]) == 1
    assert "--dry" in capsys.readouterr().err


# A part of every part: the whole of `--dry` takes minutes.
SOME = {
    "correctness": ("answers embedding", "launches embedding", "labels", "halves"), "tests": ("tests",),
    "kernels": ("map + cross-entropy",), "steps": ("forward",),
    "memory": ("attention", "growth"), "sanitizer": ("check",), "ncu": ("kernels",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_runs_dry(part, tmp_path, monkeypatch):
    if part == "steps":
        pytest.importorskip("transformers", reason="needs transformers")
    for words in SOME[part]:
        found = gpu.work(part, CPU, True, 300, tmp_path / "out.json", words)
        assert found["failed"] == {}
        assert found["checks"] or found["results"] or found["not_run"]
        assert all("not available" in reason for reason in found["not_run"].values()), found["not_run"]


def processes(monkeypatch, *lives):
    """Stands for the processes of a part: each of `lives` is (exit code, what the file says at its end). Gives the commands."""
    commands, left = [], list(lives)

    def run(command, environment, seconds, log=None, hangs=None):
        commands.append((command, seconds))
        code, known = left.pop(0)
        if known is not None:
            held = Path(command[command.index("--out") + 1])
            before = json.loads(held.read_text()) if held.exists() else {}
            held.write_text(json.dumps(EMPTY | before | known))
        if log:
            log.write_text("ok  growth")
        return subprocess.CompletedProcess(command, code, "Segmentation fault")

    monkeypatch.setattr(gpu_processes, "run", run)
    return commands


CONDITIONS = {"commit": "unknown"}
EMPTY = {"part": "memory", "dry": False, "conditions": CONDITIONS, "checks": {}, "failed": {}, "not_run": {}, "done": []}


def test_what_a_part_knew_is_kept_when_it_is_killed(tmp_path, monkeypatch, capsys):
    known = {"checks": {"growth": {"bytes": 0}}, "not_run": {"late": "the time was up"}, "done": ["growth"]}
    commands = processes(monkeypatch, (124, known), (124, None))
    assert gpu.run_part("memory", False, 9.5, tmp_path, commit="abc") == 0
    found = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert (found["exit_code"], found["checks"]) == (124, {"growth": {"bytes": 0}})
    assert found["conditions"]["commit"] == "abc"
    assert [r["row"] for r in found["goals"]] == [goal.row for goal in goals.GOALS]
    said = capsys.readouterr().out
    assert "NOT RUN  late: the time was up" in said
    assert "1 done, 1 not run, 0 failed" in said
    command, seconds = commands[0]
    assert seconds < 9.5 * 60 <= 600
    assert float(command[command.index("--seconds") + 1]) < seconds
    assert gpu.run_part("memory", False, 9.5, tmp_path) == 1  # not even a beginning
    assert "exit code 124" in json.loads((tmp_path / "gpu_memory.json").read_text())["failed"]["the part itself"]


def test_a_task_that_takes_its_process_along_does_not_end_the_part(tmp_path, monkeypatch):
    waiting = {"crash": "the time was up", "hang": "the time was up"}
    lives = (
        (-11, {"running": "crash", "not_run": waiting}),
        (gpu.AGAIN, {"failed": {"crash": "", "dead": "CUDA error (the context died)"}, "done": ["crash", "dead"], "running": ""}),
        (-6, {"done": ["crash", "dead", "aborts"], "running": ""}),
        (124, {"running": "hang", "not_run": {"hang": "the time was up"}}),
        (0, {"checks": {"last": {}}, "done": ["crash", "dead", "aborts", "hang", "last"], "running": ""}),
    )
    commands = processes(monkeypatch, *lives)
    assert gpu.run_part("memory", False, 9.5, tmp_path) == 1
    assert len(commands) == 5
    found = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert found["failed"]["hang"] == "it hung and was ended"
    assert found["not_run"] == {}
    assert found["checks"] == {"last": {}}
    commands = processes(monkeypatch, (-11, {"running": "crash", "not_run": waiting}), (0, {}))
    gpu.run_part("memory", False, 9.5, tmp_path)
    failed = json.loads((tmp_path / "gpu_memory.json").read_text())["failed"]
    assert failed == {"crash": "exit code -11: Segmentation fault"}


def test_a_process_is_ended_when_it_hangs_or_its_time_is_up(tmp_path):
    python = [sys.executable, "-c", "import time; print('said', flush=True); time.sleep(60)"]
    done = gpu_processes.run(python, {}, 30, tmp_path / "log", hangs=lambda: "said" in (tmp_path / "log").read_text())
    assert (done.returncode, done.stdout) == (124, "said\n")
    done = gpu_processes.run([sys.executable, "-c", "print('more')"], {}, 30, tmp_path / "log")
    assert (done.returncode, done.stdout) == (0, "more\n")
    assert (tmp_path / "log").read_text() == "said\nmore\n"


def test_side_by_side_nothing_gets_lost(tmp_path, monkeypatch):
    names = tuple(f"launches {n}" for n in range(3))
    monkeypatch.setitem(gpu.BESIDE, "correctness", (names, 1))
    lives = [(0, {"checks": {name: {"launches": 1}}, "done": [name]}) for name in names[:2]]
    commands = processes(monkeypatch, *lives, (-9, None), (0, {}))
    assert gpu.run_part("correctness", False, 9.5, tmp_path) == 1
    assert [c[c.index("--only") + 1] for c, _ in commands] == [*names, ""]
    found = json.loads((tmp_path / "gpu_correctness.json").read_text())
    assert list(found["failed"]) == ["launches 2: the process"]
    assert sorted(found["done"]) == list(names[:2])
    assert found["checks"] == {name: {"launches": 1} for name in names[:2]}
    assert "2 done" in (tmp_path / "gpu_correctness.txt").read_text()


def test_a_second_process_goes_on_where_the_first_one_ended(tmp_path, monkeypatch):
    done = []
    tasks = [(name, lambda name=name: done.append(name) or {"bytes": 0}) for name in ("first", "second")]
    monkeypatch.setattr(gpu, "tasks_of", lambda *_: list(tasks))
    (tmp_path / "out.json").write_text(json.dumps(EMPTY | {"done": ["first"], "checks": {"first": {"bytes": 1}}}))
    report = gpu.work("memory", CPU, True, 60, tmp_path / "out.json")
    assert done == ["second"]
    assert report["checks"] == {"first": {"bytes": 1}, "second": {"bytes": 0}}
    assert report["conditions"] == CONDITIONS


def test_every_row_of_the_goals_gets_a_case_before_any_gets_two():
    """And a rival that compiles for long only where a goal names it."""
    cuda = torch.device("cuda")
    cases = [case for family in gpu.KERNELS for case in suite.load(family)(cuda, torch.bfloat16)]
    order = gpu._in_turn(cases, "kernels")
    assert len(order) == len(cases)
    first = [case.title for case, _ in order[:9]]
    for words in ("attention/Llama forward", "attention/Llama backward", "ViT-B", "decode", "pad ", "B=65536", "label head"):
        assert any(words in title for title in first), words
    rivals = {case.title.removesuffix(" bfloat16"): named for case, named in order}
    llama = rivals["attention/Llama forward B=8 H=32/8 T=2048 S=2048 P=32 D=128 causal"]
    assert {"flash", "flex", "cuDNN", "dense mask"} <= llama
    assert not rivals["mapping/count forward N=50000 S=1000 T=10"]
    tasks = dict(gpu._timed(cases, "kernels", ("compile", "flex"), cuda, False, {}))
    of = {title: task.args[1] for title, task in tasks.items()}
    assert "compile" in of["perturbation/pad forward B=256 3x32->224 bfloat16"]
    assert not {"compile", "flex"} & set(of["attention/ViT-B forward B=256 H=12/12 T=197 S=197 P=10 D=64 bfloat16"])
    assert "plain" in of["mapping/count forward N=50000 S=1000 T=10 bfloat16"]
    assert all(set(case.best) & set(case.forms) <= set(of[case.title]) for case in cases)


def test_what_is_done_side_by_side_are_tasks():
    for part, (names, most) in gpu.BESIDE.items():
        known = [name for name, _ in gpu.PARTS[part](torch.device("cuda"), False, lambda: 1.0)]
        assert most > 1
        for name in names:
            assert any(name in task for task in known), name


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "benchmarks.gpu", "--dry", "--part", "memory", "--only", "attention forward", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert found["dry"] is True
    assert found["checks"]["attention forward"]["workspace_mb"] > 0
    assert {r["verdict"] for r in found["goals"]} == {"not measured"}  # a dry run measures nothing
    assert "goals missed: none" in (tmp_path / "gpu_memory.txt").read_text()
