"""`fastprompt doctor` on a healthy machine, and on one that is broken in each way it knows."""

from __future__ import annotations

import sys

import pytest
import torch

from fastprompt import _runtime, doctor, functional
from fastprompt.__main__ import main

PERTURB = {"perturb": doctor.CASES["perturb"]}


@pytest.fixture
def one_check(monkeypatch, tmp_path):
    """One self-check alone, a cache folder that can be written, no variable of the user's."""
    monkeypatch.setattr(doctor, "CASES", PERTURB)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTPROMPT_LOG", raising=False)


def wrong(capsys):
    """(what is wrong and how to mend it, line by line; what is right)."""
    lines = capsys.readouterr().out.splitlines()
    found = [line + lines[place + 1] for place, line in enumerate(lines) if line.startswith("  WRONG")]
    assert lines[-1] == (f"{len(found)} {'is' if len(found) == 1 else 'are'} wrong" if found else "nothing is wrong")
    return found, [line for line in lines if line.startswith("  ok")]


def test_a_healthy_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["doctor"]) == (0 if _runtime.HAS_TRITON else 1)
    found, right = wrong(capsys)
    assert len(found) == (0 if _runtime.HAS_TRITON else 1)
    page = "\n".join(right)
    for said in ("fastprompt 0.", "Python 3.", f"torch {torch.__version__}", "numpy ", "cores", f"TRITON_CACHE_DIR={tmp_path}"):
        assert said in page
    checks = [line.split(":")[0].split()[-1] for line in right if ": error " in line]
    interpreted = 2 if _runtime.INTERPRETING and not torch.cuda.is_available() else 1
    assert checks == [name for name in doctor.CASES for _ in range(interpreted)]
    assert page.count(" backward") == (len(doctor.CASES) - 1) * interpreted  # counting has none
    assert _runtime.watch is None
    if not torch.cuda.is_available():  # where nothing is compiled
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("what", ["forward", "backward", "nan", "raises"])
def test_a_wrong_kernel_is_caught(one_check, capsys, monkeypatch, what):
    original = functional.perturb

    def broken(x, prompt, *, impl, **given):
        if impl == "torch":
            return original(x, prompt, impl=impl, **given)
        if what == "raises":
            raise RuntimeError("no such image")
        out = original(x, prompt, impl=impl, **given)
        if what == "backward":
            return out * 1.001 - out.detach() * 0.001  # the value of out, a wrong gradient
        return out + torch.full_like(out, float("nan") if what == "nan" else 0.001).tril()

    monkeypatch.setattr(functional, "perturb", broken)
    assert doctor.examine("cpu") == 1
    found, _ = wrong(capsys)
    found = [line for line in found if "perturb" in line]
    assert len(found) == (2 if _runtime.INTERPRETING else 1)
    says = {"raises": "raises RuntimeError: no such image", "nan": "error inf forward"}
    assert says.get(what, "at most 1e-04 is right") in found[0]
    assert 'until it is mended, impl="torch" is right' in found[0]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_no_triton(one_check, capsys, monkeypatch, platform):
    monkeypatch.setattr(_runtime, "HAS_TRITON", False)
    monkeypatch.setattr(_runtime, "INTERPRETING", False)
    monkeypatch.setattr(sys, "platform", platform)  # the package has no Triton to ask for elsewhere
    assert doctor.examine("cpu") == (platform == "linux")
    found, right = wrong(capsys)
    if platform == "linux":
        assert "Triton is not installed" in found[0]
        assert 'pip install "triton>=3.6"' in found[0]
    else:
        assert any("Triton is not installed" in line for line in right)


def test_a_cache_that_cannot_be_written(one_check, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")  # root may write to any folder, but nobody into a file
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)
    assert doctor.examine("cpu") == 1
    found, _ = wrong(capsys)
    assert len(found) == 1
    assert "cannot be written" in found[0]
    assert "set TRITON_CACHE_DIR to a folder that can be written" in found[0]


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("FASTPROMPT_LOG", "paths", "FASTPROMPT_LOG=path is what is known"),
        ("FASTPROMPT_CHECK", "yes", "FASTPROMPT_CHECK is 0 or 1"),
        ("FASTPROMPT_CHEK", "1", "one of FASTPROMPT_CHECK, FASTPROMPT_LOG"),
    ],
)
def test_a_variable_that_says_nothing(monkeypatch, name, value, fix):
    monkeypatch.setenv(name, value)
    assert [each.fix for each in doctor._environment() if each.fix] == [fix]


def test_an_old_version_and_a_device_that_is_not_there(capsys, monkeypatch):
    assert doctor._old_enough("torch", "2.10.1").fix == 'pip install "torch>=2.11"'
    assert doctor._old_enough("torch", "2.13.0+cpu").fix == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "CASES", PERTURB)
    assert main(["doctor", "--device", "cuda"]) == 1
    assert "no GPU is seen" in capsys.readouterr().out
