"""Every kernel and launch configuration compiles ahead of time, without a GPU, and the machine code is what was meant."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aot import SHARED_LIMIT, TARGETS
from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parent.parent
GRADIENTS = (
    "prompt_gradient", "prompt_gradient_sum", "image_gradient", "cells_gradient", "map_labels_gradient", "reduce_segments",
    "reduce_segments_gradient", "total_loss", "locate_slots", "soft_gradient", "soft_gradient_sum",
)  # fmt: skip
ATTENTION = ("forward", "query_gradient", "own_gradient", "prefix_gradient")  # what walks over keys or queries
FEW = ("attention_forward_kernel", "attention_query_gradient_kernel")  # 16 queries are too few rows for wgmma

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to compile with")


@functools.cache
def table(target: str) -> list[dict]:
    """What `python -m tests.aot` made of every launch, in a process without the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# sm_90 and the other vendor on every run; the others differ little from them and are in the slow run, as is all of sm_90.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_90+", "sm_80", "sm_100")]


@pytest.fixture(scope="module", params=["sm_90", "gfx942", *SLOW])
def target(request) -> str:
    return request.param


def test_targets_are_the_promised_ones():
    assert set(TARGETS) == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_every_kernel_is_compiled(target):
    written = {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written
    assert {row["name"] for row in table(target)} == written


def test_resources_stay_within_the_machine(target):
    for row in table(target):
        assert row["shared"] <= SHARED_LIMIT[target.removesuffix("+")], row
        if target.startswith("sm_"):
            assert row["spills"] == 0, row
            assert row["registers"] <= 255, row


def test_no_tf32_and_no_atomics_in_gradients(target):
    if not target.startswith("sm_"):
        assert table(target)
        return
    for row in table(target):
        assert not row["tf32"], row
        if row["name"].removesuffix("_kernel") in GRADIENTS or row["name"].startswith("attention_"):
            assert not row["atomics"], row


def test_accesses_are_wide(target):
    """The forward pass stores 16 bytes a thread; the gradient reads 16 bytes of a half-precision g a thread."""
    if not target.startswith("sm_"):
        assert table(target)
        return
    stores = [row["wide"]["st"] for row in table(target) if row["name"] == "perturb_forward_kernel"]
    assert stores
    assert all(widths == [16] for widths in stores), stores
    gathers = [row["wide"] for row in table(target) if row["name"] == "soft_gather_kernel"]
    whole = [wide for wide in gathers if wide["st"] == [16] and 16 in wide["ld"] and 2 not in wide["ld"]]
    assert len(whole) >= 6, gathers  # all but rows of 1, 33 and 1000
    loads = [row["wide"]["ld"] for row in table(target) if row["name"] == "prompt_gradient_kernel"]
    assert sum(16 in widths for widths in loads) > 0.7 * len(loads), loads
    stores = [row["wide"]["st"] for row in table(target) if row["name"] == "reduce_segments_gradient_kernel"]
    assert sum(widths == [16] for widths in stores) > 0.7 * len(stores), stores


def test_attention_reads_wide_and_multiplies_on_the_tensor_cores(target):
    """Each walk over keys or queries reads 16 bytes a thread, asynchronously; half precision is multiplied by wgmma on sm_90."""
    if not target.startswith("sm_"):
        assert table(target)
        return
    rows = [row for row in table(target) if row["name"].removeprefix("attention_").removesuffix("_kernel") in ATTENTION]
    assert {row["name"] for row in rows} == {f"attention_{name}_kernel" for name in ATTENTION}
    for row in rows:
        # Everything but masks, indices and statistics: nothing of 2 bytes, which an unaligned half would be.
        assert 16 in row["wide"]["ld"], row
        assert 2 not in row["wide"]["ld"], row
    if not target.startswith("sm_90"):
        return
    half = [row for row in rows if "float32" not in row["operand"] and row["width"] in (64, 128)]
    assert {row["width"] for row in half} == {64, 128}
    for row in half:
        assert row["wgmma"] or (row["blocks"]["ROWS"] < 64 and row["name"] in FEW), row


def test_every_configuration_is_compiled(target):
    from fastprompt.tuning import attention, embedding, mapping, perturbation

    compiled = {(row["name"], *row["blocks"].values(), row["options"]["num_warps"]) for row in table(target)}
    for kernel in ("forward", "prompt_gradient"):
        name = "perturb_forward_kernel" if kernel == "forward" else f"{kernel}_kernel"
        for launch in perturbation.CONFIGS[kernel]:
            assert (name, launch.BLOCK, launch.SAMPLES, launch.num_warps) in compiled, (launch, compiled)
    widest = {kernel: (launch.ROWS, launch.COLUMNS, launch.num_warps) for kernel, launch in mapping.CONFIGS.items()}
    for kernel, name in (("forward", "map_labels_kernel"), ("gradient", "map_labels_gradient_kernel")):
        assert (name, *widest[kernel]) in compiled, (widest, compiled)
    for kernel, name in (("gather", "soft_gather"), ("locate", "locate_slots"), ("add", "soft_gradient")):
        launch = embedding.CONFIGS[kernel]
        columns = min(launch.COLUMNS, 32) if kernel == "locate" else launch.COLUMNS  # 20 slots
        assert (f"{name}_kernel", launch.ROWS * launch.COLUMNS // columns, columns, launch.num_warps) in compiled, launch
    if target == "sm_90+":  # elsewhere a part of the table is compiled
        names = [f"attention_{name}_kernel" for name in ATTENTION]
        for tiles in attention.HOPPER.values():
            for name, tile in zip(names, tiles, strict=True):
                assert (name, tile.ROWS, tile.COLUMNS, tile.num_warps) in compiled, (name, tile)
