"""Measured launches: the file, who wins, what is refused; and the command that writes it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastprompt
from fastprompt.tuning import _measured, attention, embedding, mapping, perturbation
from tests.conftest import HAS_GPU, HAS_TRITON

ROOT = Path(__file__).parents[1]
ARCH = "cpu"  # the interpreter's: its "GPU" is called cpu


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files are looked for here alone, and nothing is remembered."""
    monkeypatch.setenv("FASTPROMPT_TUNING", str(tmp_path))
    _measured.forget()
    yield tmp_path
    _measured.forget()


def write(path, **changes):
    found = {
        "format": 1,
        "gpu": "cpu",
        "arch": "cpu",
        "launches": {"mapping": {"forward": {"ROWS": 2, "COLUMNS": 64, "num_warps": 8}}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | changes))


def test_a_measured_launch_is_picked_and_the_others_stay(folder):
    before = mapping.pick("gradient", 1000, ARCH)
    write(folder / "cpu.json")
    assert mapping.pick("forward", 1000, ARCH) == mapping.pick("forward", 1000, "sm_90")  # read once
    _measured.forget()
    assert mapping.pick("forward", 1000, ARCH) == mapping.Launch(2, 64, 8)
    assert mapping.pick("forward", 10, ARCH) == mapping.Launch(8, 16, 8)
    assert mapping.pick("gradient", 1000, ARCH) == before
    assert mapping.pick("forward", 1000, "sm_90") == mapping.Launch(8, 128, 4)  # another machine's
    assert perturbation.pick("forward", 256, ARCH) == perturbation.CONFIGS["forward"][0]


def test_every_family_reads_what_was_written(folder):
    tables = {family.__name__.rsplit(".")[-1]: family.launches(ARCH) for family in (attention, embedding, mapping, perturbation)}
    changed = {name: {kernel: replace(launch, num_warps=2) for kernel, launch in found.items()} for name, found in tables.items()}
    _measured.write(folder / "cpu.json", "cpu", ARCH, changed)
    _measured.forget()
    assert perturbation.pick("prompt_gradient", 256, ARCH).num_warps == 2
    assert embedding.pick("add", 4096, ARCH).num_warps == 2
    facts = {"batch": 8, "sources": 1000, "classes": 10, "longest": 100, "probabilities": False, "loss": False, "arch": ARCH}
    assert mapping.pick_segments("forward", **facts).num_warps == 2
    shape = {
        "batch": 8, "heads": 8, "kv_heads": 2, "queries": 512, "keys": 512, "prefixes": 1, "prefix_rows": 32, "stack": 1,
        "width": 64, "dtype": torch.bfloat16, "arch": ARCH, "gated": False,
    }  # fmt: skip
    launch = attention.pick("backward", **shape)
    assert [tile.num_warps for tile in (launch.query, launch.own, launch.prefix)] == [2, 2, 2]
    assert not list(folder.glob("*.tmp"))


DAMAGED = {
    "cut off": lambda path: path.write_text(path.read_text()[:60]),
    "not utf-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "a list": lambda path: path.write_text("[]"),
    "another format": lambda path: write(path, format=2),
    "another GPU's": lambda path: write(path, gpu="NVIDIA H100"),
    "another family": lambda path: write(path, launches={"convolution": {}}),
    "another kernel": lambda path: write(path, launches={"mapping": {"backward": {}}}),
    "a field too few": lambda path: write(path, launches={"mapping": {"forward": {"ROWS": 8, "COLUMNS": 64}}}),
    "no power of two": lambda path: write(path, launches={"mapping": {"forward": {"ROWS": 3, "COLUMNS": 64, "num_warps": 4}}}),
    "true": lambda path: write(path, launches={"mapping": {"forward": {"ROWS": True, "COLUMNS": 64, "num_warps": 4}}}),
    "too large": lambda path: write(path, launches={"mapping": {"forward": {"ROWS": 8, "COLUMNS": 64, "num_warps": 64}}}),
    "zero": lambda path: write(path, launches={"mapping": {"forward": {"ROWS": 8, "COLUMNS": 0, "num_warps": 4}}}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_a_warning_that_names_it(damage, folder):
    write(folder / "cpu.json")
    DAMAGED[damage](folder / "cpu.json")
    with pytest.warns(UserWarning, match="cpu.json.*fastprompt tune"):
        assert mapping.pick("forward", 1000, ARCH) == mapping.Launch(8, 128, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapping.pick("forward", 1000, ARCH)  # said once


def test_the_users_file_goes_before_the_packages(folder, monkeypatch):
    monkeypatch.delenv("FASTPROMPT_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(_measured, "SHIPPED", folder / "package")
    assert _measured.target("cpu") == folder / "package" / "cpu.json"
    write(folder / "package" / "cpu.json")
    assert mapping.pick("forward", 1000, ARCH) == mapping.Launch(2, 64, 8)
    own = folder / "cache" / "fastprompt" / "tuning" / "cpu.json"
    write(own, launches={"mapping": {"forward": {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}}})
    _measured.forget()
    assert mapping.pick("forward", 1000, ARCH) == mapping.Launch(4, 256, 4)
    assert _measured.target("cpu") == own  # a new file may not lie in an old one's shadow
    own.unlink()
    monkeypatch.setattr(_measured.os, "access", lambda *_: False)
    assert _measured.target("cpu") == own


def test_the_name_of_a_file_says_which_gpu():
    assert _measured.file_name("NVIDIA H200") == "nvidia_h200.json"
    assert _measured.file_name("../../NVIDIA GH200 480GB") == "nvidia_gh200_480gb.json"


def test_nothing_is_shipped_that_nobody_measured():
    for path in (ROOT / "fastprompt" / "tuning").glob("configs/*.json"):
        assert json.loads(path.read_text())["microseconds"], path


# ---- The command ----

needs_interpreter = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="needs the interpreter")


@needs_interpreter
def test_the_command_writes_what_pick_reads(folder, capsys, monkeypatch):
    from fastprompt import __main__, tune

    monkeypatch.setattr(tune, "best", lambda found: list(found[0])[-1])  # the last one tried, whatever its time
    assert __main__.main(["tune", "--dry", "--family", "embedding"]) == 0
    said = capsys.readouterr().out
    assert "written: " + str(folder / "cpu.json") in said
    assert "(present)" in said
    found = json.loads((folder / "cpu.json").read_text())
    assert set(found["launches"]) == {"embedding"}
    assert found["conditions"]["torch"] == torch.__version__
    want = tune.candidates("embedding", "gather", embedding.CONFIGS["gather"])[1]
    assert embedding.launches(ARCH)["gather"] == want != embedding.CONFIGS["gather"]
    work = tune.works("embedding", small=True)[0]
    inputs = work.inputs(torch.Generator().manual_seed(0), torch.device("cpu"))
    assert not tune.differs(work.bind(inputs, "triton")(), work.bind(inputs, "torch")(), 1e-6)
    write(folder / "cpu.json")  # another family's launches are kept
    monkeypatch.setattr(tune, "measure", lambda work, *_: {kernel: {want: 1.0} for kernel in work.kernels[:1]})
    tune.tune(["embedding"], dry=True)
    assert set(json.loads((folder / "cpu.json").read_text())["launches"]) == {"embedding", "perturbation", "attention", "mapping"}
    assert mapping.pick("forward", 1000, ARCH) == mapping.Launch(2, 64, 8)


@needs_interpreter
def test_wrong_answers_are_refused(folder, capsys, monkeypatch):
    from fastprompt import tune

    work = tune.works("embedding", small=True)[0]
    present = embedding.launches(ARCH)["gather"]

    def wrong_with(bad):
        def form(inputs, impl):
            out = work.form(inputs, impl)
            return out * 2 if impl == "triton" and (embedding.launches(ARCH)["gather"] == present) is bad else out

        return replace(work, form=form)

    found = tune.measure(wrong_with(False), torch.device("cpu"), 0.0, 2)["gather"]
    assert list(found) == [present]
    assert "wrong answer, left out" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="present launch"):
        tune.measure(wrong_with(True), torch.device("cpu"), 0.0, 2)


@needs_interpreter
def test_a_kernel_that_fails_leaves_the_others_their_launches(folder, monkeypatch):
    from fastprompt import tune

    def measure(work, *_):
        if work.title.startswith("gather backward"):
            raise RuntimeError("the present launch of add gives a wrong answer")
        return {kernel: {embedding.launches(ARCH)[kernel]: 1.0} for kernel in work.kernels}

    monkeypatch.setattr(tune, "measure", measure)
    with pytest.raises(RuntimeError, match=r"1 of 2 shapes failed: gather backward .*wrong answer"):
        tune.tune(["embedding"], dry=True)
    assert set(json.loads((folder / "cpu.json").read_text())["launches"]["embedding"]) == {"gather"}


@needs_interpreter
def test_every_launch_is_compiled_ahead_by_one_process(tmp_path, monkeypatch):
    from fastprompt import tune

    tried = []
    monkeypatch.setattr(tune.Work, "bind", lambda work, inputs, impl: lambda: tried.append((work.title, share)) or 1 / 0)
    counts = [0, 0, 0]
    for share in range(3):
        tune.launch_share(["embedding", "mapping"], share, 3)
        counts[share] = len(tried) - sum(counts[:share])
    everything = 0
    for family in ("embedding", "mapping"):
        table = tune.table_of(family, ARCH)
        everything += sum(len(tune.candidates(family, k, table[k])) for work in tune.works(family, True) for k in work.kernels)
    assert sum(counts) == everything
    assert max(counts) - min(counts) <= 1
    assert tune.table_of("embedding", ARCH) == embedding.CONFIGS

    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$3 $4 $5" >> {tmp_path}/said\nexit $4\n')
    python.chmod(0o755)
    monkeypatch.setattr(tune.sys, "executable", str(python))
    assert tune.compile_ahead(["embedding", "mapping"], 30.0, 2) == [0, 1]
    assert sorted((tmp_path / "said").read_text().split("\n")) == ["", "embedding,mapping 0 2", "embedding,mapping 1 2"]
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    assert tune.compile_ahead(["embedding"], 0.0, 1) == [-9]


def test_another_launch_must_gain_over_all_shapes():
    from fastprompt import tune

    assert tune.best([{"a": 1.0, "b": 0.99}]) == "a"  # noise
    assert tune.best([{"a": 1.0, "b": 0.9}]) == "b"
    assert tune.best([{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 3.0}]) == "a"
    assert tune.best([{"a": 1.0, "b": 0.5}, {"a": 1.0}]) == "a"  # it does not run everywhere


@pytest.mark.skipif(HAS_GPU, reason="needs the interpreter")
def test_without_a_gpu_the_command_says_so(capsys):
    from fastprompt import __main__

    assert __main__.main(["tune"]) == 1
    assert "--dry" in capsys.readouterr().err
    assert __main__.main(["tune", "--dry", "--family", "convolution"]) == 1
    assert "family: expected one of perturbation" in capsys.readouterr().err


# ---- The first call ----


def run(*command, **environment):
    import os

    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "0", **environment},
    )  # fmt: skip


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to compile with")
def test_new_batch_sizes_compile_at_most_two_kernels():
    """Goal 18: 100 batch sizes from 1 to 512 after the first, a step of every kind, by the JIT's own cache keys."""
    done = run("-m", "tests.first_call")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report) == 16
    for name, found in report.items():
        assert found["first"] >= 1, name
        assert found["calls"] == 100
        assert found["recompilations"] <= 2, (name, found["at"])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to compile with")
def test_everything_compiles_cold_within_a_minute():
    """On one core: a third of the kernels, three times their time."""
    done = run("-m", "tests.first_call", "--compile", "15")
    assert done.returncode == 0, done.stderr[-2000:]
    cold = json.loads(done.stdout)["cold"]
    assert cold["kernels"] == 15
    assert cold["of"] >= 40
    assert cold["cpu_s"] / 15 * cold["of"] < 60, cold


UNWRITABLE = """
import errno, os, sys, warnings
import torch, triton
from triton.runtime.cache import FileCacheManager
from triton.backends.compiler import GPUTarget
from fastprompt import _runtime
from fastprompt.ops import mapping
from tests.aot import recorded_launches, source

with recorded_launches() as launches:
    mapping._forward_triton(torch.zeros(4, 20), torch.zeros(5, dtype=torch.int64), False)
kernel, arguments, options = launches[0]
def compile_it():
    return triton.compile(source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=dict(options)).asm["cubin"]

given, put = sys.argv[1], FileCacheManager.put
def full(self, *arguments, **options):
    if self.cache_dir.startswith(given):
        raise OSError(errno.ENOSPC, "No space left on device")
    return put(self, *arguments, **options)

for kind in ("read-only", "full"):
    triton.knobs.cache.dir = given + "/file/cache" if kind == "read-only" else given + "/cache"
    FileCacheManager.put = put if kind == "read-only" else full
    try:
        compile_it()
        raise SystemExit("it was expected to fail")
    except OSError as reason:
        print(kind, reason.errno)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert len(_runtime.with_a_cache(compile_it)()) > 1000
        assert len(_runtime.with_a_cache(compile_it)()) > 1000
    print([str(w.message)[:60] for w in said if "cache folder" in str(w.message)])
    assert os.listdir(triton.knobs.cache.dir) and given not in triton.knobs.cache.dir
    print(triton.knobs.cache.dir)
    _runtime._temporary = None
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to compile with")
def test_a_cache_folder_that_cannot_be_written_still_works(tmp_path):
    """Below a file no folder can be made, by root either; a full disk is played."""
    (tmp_path / "file").write_text("")
    done = run("-c", UNWRITABLE, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    read_only, warned, folder, full, warned_again, second = done.stdout.splitlines()
    assert (read_only, full) == ("read-only 20", "full 28")
    for said in (warned, warned_again):
        assert said.count("Triton cannot write to its cache folder") == 1
    assert not Path(folder).exists()  # gone with the process
    assert folder != second


class Counting(torch.nn.Module):
    """A model with everything that a forward pass can leave behind."""

    def __init__(self):
        super().__init__()
        self.weight, self.frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.norm, self.drop = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)
        self.seen, self.backwards = [], 0

    def forward(self, x, ids):
        self.seen.append((x, ids, torch.is_grad_enabled()))
        out = self.drop(self.norm(x.float() * self.weight + self.frozen))
        if out.requires_grad:
            out.register_hook(lambda g: setattr(self, "backwards", self.backwards + 1))
        return {"logits": out, "parts": (ids, out[:1])}


def test_warming_up_runs_a_step_on_zeros_and_leaves_no_trace():
    model = Counting()
    model.weight.grad = torch.full((3,), 7.0)
    kept, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    x = torch.ones((4, 3), dtype=torch.bfloat16, requires_grad=True)
    assert fastprompt.warmup(model, x, ((4,), torch.int64)) is None
    ((seen, ids, grad),) = model.seen
    assert (seen.dtype, seen.shape, ids.dtype) == (torch.bfloat16, (4, 3), torch.int64)
    assert not seen.requires_grad
    assert not seen.any()
    assert not ids.any()
    assert grad
    assert model.backwards == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert (model.weight.grad == 7).all()
    assert model.frozen.grad is None
    assert x.grad is None
    assert model.norm.bias.grad is None
    fastprompt.warmup(model, x, ids, backward=False)
    assert model.backwards == 1
    assert not model.seen[-1][2]
    given = []
    fastprompt.warmup(model, x, step=lambda x: given.append(x) or (model.weight * 2).sum())
    assert len(given) == 1
    assert len(model.seen) == 2
    with pytest.raises(ValueError, match="inputs: expected tensors or"):
        fastprompt.warmup(model, (4, 3))
    with pytest.raises(RuntimeError):
        fastprompt.warmup(model, ((4, 5), torch.float32), ids)  # what the model says, and no trace of it either
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_other_failures_are_not_the_caches():
    from fastprompt import _runtime

    calls = []

    def broken():
        calls.append(1)
        raise FileNotFoundError(2, "no gcc")

    with pytest.raises(FileNotFoundError):
        _runtime.with_a_cache(broken)()
    assert len(calls) == 1
