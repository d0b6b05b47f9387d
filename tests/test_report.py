"""README's tables and docs/performance.md are what the committed results say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import goals, report

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of README, the page and the results, and the command over it."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path, lambda *more: report.main(["--root", str(tmp_path), "--results", str(tmp_path / "results"), *more])


def test_the_committed_text_is_what_the_results_say():
    assert report.main(["--check"]) == 0, "run `python -m benchmarks.report`"


def test_a_typed_number_is_found(copy, capsys):
    folder, command = copy
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(re.sub(r"\| [0-9.]+ ms \|", "| 0.01 ms |", text, count=1))
    assert command("--check") == 1
    assert "0.01 ms" in capsys.readouterr().out
    assert command() == 0
    assert (folder / "README.md").read_text() == text
    assert command("--check") == 0
    (folder / "docs" / "performance.md").unlink()
    assert command("--check") == 1


def test_a_newer_result_replaces_an_older_one(copy):
    folder, command = copy
    found = json.loads((folder / "results" / "cpu.json").read_text())
    found["conditions"]["date"] = "2099-01-01T00:00:00+00:00"
    found["results"] = [r for r in found["results"] if r["case"] == "demo size" and r["mode"] == "both"]
    found["results"][0]["rows"]["fastprompt"]["median_s"] = 0.04321
    (folder / "results" / "cpu_perturbation.json").write_text(json.dumps(found))
    (folder / "results" / "cpu_experiment.json").write_text(json.dumps(found).replace("0.04321", "0.09876"))
    assert command("--check") == 1
    assert command() == 0
    text = (folder / "README.md").read_text()
    assert "98.76" not in text  # an experiment, not a family
    assert "| demo size both, B=64 3x16 to 32 | 43.21 ms |" in text
    assert "cpu_perturbation.json" in text


def test_blocks_that_nobody_writes_or_closes(copy):
    folder, _ = copy
    results = report.Results(folder / "results")
    assert report.fill("no block", results) == "no block"
    with pytest.raises(ValueError, match="expected one of cpu conditions"):
        report.fill("<!-- table: cpu resnet -->\n<!-- /table -->", results)
    with pytest.raises(ValueError, match="not closed"):
        report.fill("<!-- table: gpu -->\n", results)
    with pytest.raises(ValueError, match="0 such cases"):
        results.case("mapping", "match forward S=1 T=1")
    assert set(report.BLOCKS) == {block["name"] for block in report._BLOCK.finditer((ROOT / "README.md").read_text())}


def test_what_a_gpu_measured_is_shown_and_a_dry_run_is_not(copy):
    folder, command = copy
    kernels = json.loads((folder / "results" / "cpu.json").read_text())
    kernels["results"] = [r | {"dtype": "bfloat16"} for r in kernels["results"] if r["case"] == "pad" and "B=256" in r["shape"]]
    kernels |= {"part": "kernels", "dry": True, "checks": {}, "failed": {}, "not_run": {}}
    kernels["conditions"] |= {"device": "NVIDIA H200", "driver": "580"}
    path = folder / "results" / "gpu_kernels.json"
    path.write_text(json.dumps(kernels))
    assert command("--check") == 0
    path.write_text(json.dumps(kernels | {"dry": False}))
    assert command() == 0
    text = (folder / "README.md").read_text()
    assert "not yet measured" not in text
    assert "- kernels: NVIDIA H200, driver 580, torch 2.13.0" in text
    row = next(line for line in text.splitlines() if line.startswith("| 12 |"))
    worst = min(r["speedup"]["eager"] for r in kernels["results"] if r["mode"] == "backward")
    assert f"{worst:.3g} over eager" in row
    assert len([line for line in text.splitlines() if "not measured (" in line]) >= 20
    assert "### kernels\n\nNVIDIA H200" in (folder / "docs" / "performance.md").read_text()


def test_the_page_has_every_row():
    """The rows of the goals that the page shows are all rows."""
    page = (ROOT / "docs" / "performance.md").read_text()
    assert all(f"| {goal.row} | " in page for goal in goals.GOALS)
