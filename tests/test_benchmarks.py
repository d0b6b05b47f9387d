"""The benchmarks: a wrong answer gets no time, a regression is found, a wrong name is an error, the report says everything."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import base, compare, pictures, suite
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "matmul": 1e11}
TINY = ("--device", "cpu", "--quick", "--family", "mapping", "--case", "label head")
SHAPE = ("--shape", "B=4,V=30,d=8,K=3")

run = partial(suite.run, device=CPU, ceilings=CEILINGS, quick=True)


@pytest.fixture(autouse=True)
def threads():
    """--busy and --threads change the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def each_once(calls, device, seconds=1.0, failed=None):
    """In place of the timer: every provider is called, and takes a millisecond more than the one before."""
    taken = {}
    for place, (name, own) in enumerate(calls.items()):
        for call in own:
            call()
        middle = 1e-3 * (1 if name == "A/A" else place + 1)
        taken[name] = suite.timing.Time(middle, 0.9 * middle, 1.1 * middle, 5, "host")
    return taken


@pytest.fixture(scope="module", autouse=True)
def one_moment():
    """What is tested here needs no real times, but for the timer itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.timing, "compare", each_once)
        patch.setattr(suite.gc, "collect", lambda: 0)
        for name in ("copy", "matmul"):
            patch.setattr(suite.timing, f"{name}_ceiling", lambda device, seconds, name=name: CEILINGS[name])
        yield


COMPARE = suite.timing.compare  # the real one


def test_the_timer(monkeypatch):
    """By a clock that only the calls move: medians and quantiles, every input set as often, providers in turns."""
    now, log = [0.0], []

    def call(name, place, spent):
        def work():
            now[0] += spent
            log.append((name, place))

        return work

    monkeypatch.setattr(suite.timing, "host_clock", lambda: now[0])
    calls = {"slow": [call("slow", place, 0.03) for place in range(3)], "fast": [call("fast", place, 0.01) for place in range(3)]}
    times = COMPARE(calls, CPU, 0.001)
    assert (times["slow"].median, times["fast"].median) == pytest.approx((0.03, 0.01))
    assert times["slow"].clock == "process"
    assert all(t.samples >= 5 for t in times.values())
    for name in calls:
        counts = [log.count((name, place)) for place in range(3)]
        assert max(counts) - min(counts) <= 1
    ranked = suite.timing.Time.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], "host")
    assert (ranked.p20, ranked.median, ranked.p80) == (2.0, 3.5, 5.0)
    measured = log[6:]  # after the first three calls of each
    turns = [{name for name, _ in measured[i : i + 2]} for i in range(0, 8, 2)]
    assert turns == [{"slow", "fast"}] * 4


def case(mode="forward", **forms):
    """x * 2, and what else claims to be it."""

    def truth(i):
        return i["x"] * 2

    def inputs(generator, device):
        x = torch.randn(5, generator=generator, device=device)
        return {"x": x.requires_grad_(mode != "forward"), "g": torch.ones(5)}

    return suite.Case(
        family="test", name="double", shape="B=5", mode=mode, dtype=torch.float32, inputs=inputs,
        forms={"fastprompt": truth} | forms, formula=truth, wrt=("x",), bytes=40, tolerance=1e-6,
    )  # fmt: skip


WRONG = {
    "another value": lambda i: i["x"] * 2.001,
    "one element": lambda i: torch.cat([i["x"][:4] * 2, i["x"][4:]]),
    "NaN": lambda i: i["x"] * torch.nan,
    "another shape": lambda i: i["x"][None] * 2,
    "writes its input": lambda i: i["x"].mul_(2),
    "breaks": lambda i: i["nothing"],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_gets_no_time(kind):
    result = run(case(wrong=WRONG[kind], plain=lambda i: i["x"] + i["x"]))
    assert "refused" in result["rows"]["wrong"]
    assert "median_s" not in result["rows"]["wrong"]
    assert "wrong" not in result["speedup"]
    if kind != "writes its input":  # then nobody's inputs are what they were
        assert result["speedup"]["plain"] > 0
    assert "refused" in run(replace(case(), forms={"fastprompt": WRONG[kind]}))["rows"]["fastprompt"]


def test_a_wrong_gradient_gets_no_time():
    def wrong(i):  # the right value with half the gradient
        return i["x"].detach() + i["x"]

    assert "refused" not in run(case(wrong=wrong))["rows"]["wrong"]
    for mode in ("backward", "both"):
        assert "refused" in run(case(mode, wrong=wrong))["rows"]["wrong"]


def test_the_time_over_the_frozen_model_has_its_own_column():
    chosen = replace(case(frozen=lambda i: i["x"], plain=lambda i: i["x"] + i["x"]), loose={"frozen": float("inf")})
    result = run(chosen)
    rows = result["rows"]
    assert result["overhead"].keys() == {"fastprompt", "plain"}
    assert result["overhead"]["plain"] == rows["plain"]["median_s"] / rows["frozen"]["median_s"]
    assert "vs frozen" in suite.text(result)
    assert "vs frozen" not in suite.text(run(case()))


@pytest.mark.parametrize("family", [family for family in suite.available() if hasattr(suite._module(family), "SIZED")])
def test_sizes_of_your_own(family):
    """Every builder takes its sizes, and fastprompt's answer is right at small ones."""
    small = {
        "B": 2, "T": 6, "P": 3, "K": 4, "N": 5, "d": 64, "V": 21, "H": 2, "Hkv": 1, "D": 16, "S": 20, "m": 2, "k": 2,
        "L": 1, "size": 8, "canvas": 16, "width": 3, "patch": 4, "target": 12, "length": 64, "short": 4,
    }  # fmt: skip
    for name, build in suite._module(family).SIZED.items():
        named = list(suite.signature(build).parameters)[1:]
        sizes = {n: small[n] for n in named} | ({"S": 7} if name == "decode" else {})
        chosen = build(torch.float32, **sizes)
        for size, value in re.findall(r"\b([A-Za-z]+)=(\d+)", " ".join(one.shape for one in chosen)):
            assert sizes.get(size, int(value)) == int(value), name
        if family == "reprogrammed":
            continue  # whole models of transformers
        for one in chosen:
            inputs = one.inputs(torch.Generator().manual_seed(0), CPU)
            ours = next(iter(one.forms.values()))
            error = suite.error(suite.bind(ours, one, inputs)(), suite.truth_of(one, inputs), one.mode)
            assert error <= one.tolerance, one.title


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--shape", "Q=3"), "mapping/count .*N=50000,S=1000,T=10"),
        (("--shape", "T=0"), "B=64,T=128"),
        (("--shape", "T"), "B=64,T=128"),
        (("--rival", "nobody"), "eager, full head"),
        (("--family", "nobody"), "perturbation"),
        (("--dtype", "float8"), "bfloat16"),
        (("--compare", "no/such/file"), "no/such/file"),
        (("--compare", __file__), "expected a report"),
    ],
)
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(arguments, names, capsys):
    with pytest.raises(SystemExit) as end:
        main([*TINY, *arguments])
    assert end.value.code == 2
    assert re.search(names, capsys.readouterr().err)


def test_a_picture_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([*TINY, "--plot", "folder"])
    assert "fastprompt[plot]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def reported(tmp_path_factory, one_moment):
    """What the command wrote, its path and its arguments."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / "out.json"
    shapes = [option for b in (2, 4, 8) for option in ("--shape", f"B={b},V=30,d=8,K=3")]
    command = [*TINY, *shapes, "--threads", "1", "--rival", "eager", "--json", str(path), "--plot", str(folder / "pictures")]
    before = torch.get_num_threads()
    assert main(command, prog="fastprompt bench") == 0
    torch.set_num_threads(before)
    return json.loads(path.read_text()), path, command


def test_the_report_has_all_conditions(reported):
    report, _, command = reported
    conditions = report["conditions"]
    assert conditions["command"] == " ".join(["fastprompt bench", *command])
    assert conditions["torch"] == torch.__version__
    assert conditions["threads"] == 1
    have = {"date", "commit", "changed_files", "python", "triton", "device", "fastprompt", "system", "huge_pages"}
    assert have <= conditions.keys()
    assert report["ceilings"].keys() == {"copy", "matmul"}
    assert len(report["results"]) == 6  # three sizes, forward and both
    for result in report["results"]:
        assert list(result["rows"]) == ["fastprompt", "eager", "A/A"]
        assert result["cold"] is False
        for name, row in result["rows"].items():
            assert name == "A/A" or row["page_faults"] is None or 0 <= row["page_faults"] < 100
            assert row["p20_s"] <= row["median_s"] <= row["p80_s"]


def test_the_pictures(reported):
    report, path, _ = reported
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    drawn = {file.stem for file in (path.parent / "pictures").glob("*.svg")}
    assert drawn == {"speedup_mapping", "scaling_mapping", "ceilings"}
    sweeps = pictures._sweeps(report["results"])
    assert [[size for size, _ in points] for points in sweeps.values()] == [[2, 4, 8]] * 2
    assert all(title.endswith("over B") for title in sweeps)


def changed(report, factor, rivals=1.0, noise=0.0):
    """The same report with other times."""
    new = copy.deepcopy(report)
    for result in new["results"]:
        result["noise"] = noise
        for place, row in enumerate(result["rows"].values()):
            row["median_s"] *= rivals if place else factor
    return new


@pytest.mark.parametrize(
    ("factor", "rivals", "noise", "bound", "code", "said"),
    [
        (1.00, 1.0, 0.00, 0.1, 0, "6 cases compared, 0 slower"),
        (1.20, 1.0, 0.00, 0.1, 1, "REGRESSION"),
        (1.05, 1.0, 0.00, 0.1, 0, "0.95x"),  # within the bound
        (1.05, 1.0, 0.00, 0.02, 1, "REGRESSION"),
        (1.20, 1.0, 0.25, 0.1, 0, "25.0%"),  # within the noise
        (2.00, 2.0, 0.00, 0.1, 0, "0.50x    0.50x"),  # the machine became slower
        (2.00, 1.5, 0.00, 0.1, 1, "REGRESSION"),
        (0.50, 1.0, 0.00, 0.1, 0, "faster"),
    ],
)
def test_a_regression_is_found(reported, capsys, factor, rivals, noise, bound, code, said):
    old = changed(reported[0], 1.0)
    assert compare.compare(old, changed(old, factor, rivals, noise), bound) == code
    assert said in capsys.readouterr().out


def test_what_cannot_be_compared(reported, capsys):
    old = changed(reported[0], 1.0)
    lost = changed(old, 1.0)
    del lost["results"][0]["noise"]
    assert compare.compare(old, lost, 0.1) == 1
    assert "REGRESSION, no time now" in capsys.readouterr().out
    nothing = old | {"results": [], "conditions": old["conditions"] | {"threads": 64}}
    assert compare.compare(old, nothing, 0.1) == 1
    said = capsys.readouterr().out
    assert "only then" in said
    assert "OTHER CONDITIONS  threads: 1 then, 64 now" in said


def test_compare_is_an_option(reported, tmp_path, capsys):
    """A thousand times faster once: now it is slower, and the command says so."""
    path = tmp_path / "old.json"
    path.write_text(json.dumps(changed(reported[0], 1e-3)))
    shape = reported[2][reported[2].index("--shape") + 1]
    assert main([*TINY, "--shape", shape, "--rival", "eager", "--compare", str(path)]) == 1
    assert "REGRESSION" in capsys.readouterr().out


def test_a_case_that_cannot_be_made_does_not_end_the_others(monkeypatch, capsys):
    def broken(generator, device):
        raise RuntimeError("no room")

    def absent(generator, device):
        raise suite.Skip("transformers is not installed")

    made = [replace(case(), inputs=broken), replace(case(), inputs=absent, name="absent"), case()]
    monkeypatch.setattr(suite, "choose", lambda options, device: made)
    assert main(["--device", "cpu", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  test/double forward B=5 float32: RuntimeError: no room" in said
    assert "NOT RUN  test/absent forward B=5 float32: transformers is not installed" in said
    assert "1 cases, 0 refused, 1 not run, 1 failed" in said


def test_the_benchmarks_work_under_both_names():
    """In a wheel they are fastprompt.benchmarks: no file may import `benchmarks`."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(), re.MULTILINE), f"{path.name}: import relatively"


# Another revision


@pytest.fixture
def repository(tmp_path):
    """Two revisions of a package with a `benchmarks` of its own."""
    root = tmp_path / "root"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").write_text("")
    git = ("git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run([*git, "init", "-q"], check=True)
    for value in ("old", "new"):
        (root / "package.py").write_text(value)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", value], check=True)
    (root / "benchmarks" / "extra.py").write_text("# not committed")
    return root


def worktrees(root):
    said = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()


def test_another_revision_is_checked_out_and_gone_afterwards(repository):
    with base.worktree("HEAD~1", repository) as tree:
        assert (tree / "package.py").read_text() == "old"
        assert (tree / "benchmarks" / "extra.py").exists()  # this tree's benchmarks
        assert len(worktrees(repository)) == 2
    assert not tree.exists()
    assert len(worktrees(repository)) == 1
    for ended in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ended), base.worktree("HEAD", repository) as tree:
            raise ended
        assert not tree.exists()
        assert len(worktrees(repository)) == 1
    with pytest.raises(SystemExit, match="nobody"), base.worktree("nobody", repository):
        pass
    with pytest.raises(SystemExit, match="git checkout"), base.worktree("HEAD", repository.parent):
        pass


def test_turns_are_one_result():
    turns = [
        {"noise": 0.01, "rows": {"fastprompt": {"median_s": t, "p20_s": t, "p80_s": t}}, "speedup": {}} for t in (1.0, 1.2, 1.1)
    ]
    one = base.merged([*turns, {"rows": {"fastprompt": {"refused": "x"}}}])
    assert one["rows"]["fastprompt"]["median_s"] == 1.1
    assert one["noise"] == pytest.approx(0.1)  # turns of one revision differ by more than A/A
    assert turns[0]["rows"]["fastprompt"]["median_s"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_this_tree_against_its_own_revision(tmp_path, interrupted):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")

    def left():
        return [line for line in worktrees(ROOT) if str(tmp_path) in line]

    command = [sys.executable, "-m", "benchmarks", *TINY, *SHAPE, "--threads", "1", "--bound", "100", "--base", "HEAD"]
    command += ["--case", "label head + cross-entropy forward", "--json", str(tmp_path / "out.json")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    # Where the tests run in the background, a child would ignore the interrupt that it is sent.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    while interrupted and not left():
        assert child.poll() is None
        time.sleep(0.1)
    if interrupted:
        child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=300)[0]
    assert left() == []
    assert not list(tmp_path.glob("fastprompt-base-*"))
    assert (child.returncode == 0) is not interrupted
    if not interrupted:
        assert "1 cases compared, 0 slower" in said
        report = json.loads((tmp_path / "out.json").read_text())
        assert [len(r["results"]) for r in (report, report["base"])] == [1, 1]


class FakeGpu:
    """What the timer asks of torch.cuda, on a clock that calls move; a graph can be refused."""

    def __init__(self, patch, refuse=False):
        self.now, self.graphs, self.mode, self.drawn = 0.0, 0, "default", True
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Graph:
            def replay(self):
                fake.now += self.took

        @contextlib.contextmanager
        def graph(made, stream):
            fake.graphs += 1
            start = fake.now
            yield
            if refuse and fake.graphs == 1:
                fake.drawn = False  # PyTorch's generator
                raise RuntimeError("operation failed due to a previous error during capture")
            fake.drawn, made.took = True, fake.now - start

        def synchronize():
            pass

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": synchronize, "_sleep": lambda cycles: None,
            "current_stream": lambda: None, "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(suite.timing.time, "perf_counter", lambda: self.now)
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))

    def call(self, seconds, waits=False):
        def run():
            if waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            self.now += seconds

        return run


def timed(gpu, calls):
    return suite.timing._EventTimer(calls, 1.0)


@pytest.mark.parametrize(
    ("seconds", "waits", "refuse", "clock", "sets"),
    [
        (1e-5, False, False, "graph", 64),
        (1e-5, True, False, "events", 64),  # no capture is even tried
        (1e-5, False, True, "events", 64),
        (1e-3, False, False, "events", 64),
        (0.05, False, False, "events", 4),  # a rotation of 64 would take 3 seconds
        (3.0, False, False, "events", 2),
    ],
)
def test_the_timer_of_a_gpu(monkeypatch, capsys, seconds, waits, refuse, clock, sets):
    gpu = FakeGpu(monkeypatch, refuse)
    timer = timed(gpu, [gpu.call(seconds, waits)] * 64)
    assert (timer.clock, len(timer.calls)) == (clock, sets)
    assert gpu.graphs == (0 if waits or seconds > 1e-4 else 2 if refuse else 1)
    assert gpu.drawn
    assert gpu.mode == "default"
    timer.sample()
    assert timer.samples == [pytest.approx(seconds)]
    assert ("no CUDA graph" in capsys.readouterr().err) == refuse


def test_a_form_that_fails_while_it_is_timed_leaves_the_others_their_times():
    left = [3]

    def breaks():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")

    failed = {}
    times = COMPARE({"good": [lambda: None], "bad": [breaks]}, CPU, 0.01, failed)
    assert list(times) == ["good"]
    assert str(failed["bad"]) == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        COMPARE({"bad": [breaks]}, CPU, 0.01)


def test_a_result_without_times_of_ours_is_refused(monkeypatch):
    for name in ("fastprompt", "A/A"):

        def compare(calls, device, seconds, failed, name=name):
            failed[name] = RuntimeError("illegal address")
            return {other: taken for other, taken in each_once(calls, device).items() if other != name}

        monkeypatch.setattr(suite.timing, "compare", compare)
        result = run(case(plain=lambda i: i["x"] + i["x"]))
        assert result["rows"]["fastprompt"]["refused"] == "failed: RuntimeError: illegal address"
        assert "speedup" not in result
        assert result["rows"]["plain"]["median_s"] > 0
        assert "illegal address" in suite.text(result)


def test_the_truth_is_in_float32_where_float64_has_no_room(monkeypatch):
    def tight(inputs):
        if inputs["x"].dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs["x"] * 2

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    half = replace(case(), formula=tight, dtype=torch.bfloat16)
    assert run(half)["truth"].startswith("float32")
    assert "truth" not in run(case())
    with pytest.raises(torch.OutOfMemoryError):
        run(replace(case(), formula=tight))
