"""Images read out of a set by row: the bits of the gathered batch on every path; and `DeviceDataset`, its orders and `fit`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch._dynamo.backends.debugging import aot_eager

import fastprompt
from fastprompt import functional
from fastprompt import nn as fnn
from fastprompt.data import DeviceDataset, Rows
from fastprompt.functional import perturb
from fastprompt.ops import perturbation as ops
from fastprompt.training import evaluate, fit, refresh
from fastprompt.tuning.perturbation import Launch
from tests.cases import BF16, U8, Case, call, covering, gradient, run, tensors
from tests.compare import check_bits, memory
from tests.test_perturbation import ALL, IMPLS, LAYOUT_CASES, LAYOUTS, TRITON, needs_triton
from tests.test_trains import data as samples
from tests.test_trains import make


@pytest.fixture
def small_launch(monkeypatch):
    """Several tiles, several samples a program and several chunks."""
    monkeypatch.setattr(ops, "pick", lambda *_, **__: Launch(256, 2, 4, 4, SUM_BLOCK=128))


def set_of(case, device):
    """A case's tensors with a larger set in place of the batch, and the rows to take: one twice, out of order."""
    held = tensors(replace(case, batch=case.batch + 2), device)
    whole = held["x"]
    rows = torch.randperm(len(whole), generator=torch.Generator().manual_seed(3))[: case.batch]
    rows[-1] = rows[0]
    return tensors(case, device) | {"x": whole}, rows.to(device)


def agree(case, impl, device, exact=True):
    held, rows = set_of(case, device)
    before = memory(*held.values(), rows)
    got = run(case, held, impl, rows=rows, wanted="prompt cells")
    want = run(case, held | {"x": held["x"][rows]}, impl, wanted="prompt cells")
    assert set(got) == set(want)
    for name in want:
        if exact:
            check_bits(got[name], want[name], name)
        else:  # one channel repeated in memory and in strides are multiplied in another order
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
    for was, now in zip(before, memory(*held.values(), rows), strict=True):
        assert torch.equal(was, now)


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_rows_of_a_set_are_the_gathered_batch(impl, device):
    for case in covering()[::3]:
        agree(case, impl, device, exact=impl != "torch")


@needs_triton
@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize(
    "case", [*covering()[5::20], pytest.param(covering()[2::9], marks=pytest.mark.slow)], ids=lambda case: str(case)[:60]
)
def test_rows_of_a_set_in_the_kernels(case, device):
    for one in case if isinstance(case, list) else [case]:
        agree(one, "triton", device)


@pytest.mark.parametrize("dtype", [U8, BF16], ids=str)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda case: case.geometry)
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_the_set(dtype, case, impl, device):
    """Any strides of the set give the bits of the gathered batch."""
    held, rows = set_of(replace(case, x=dtype, batch=2), device)
    layouts = dict(LAYOUTS) if impl == "auto" else {name: LAYOUTS[name] for name in ("batch innermost", "slice")}
    for layout, change in layouts.items():
        x = change(held["x"])
        got = run(case, held | {"x": x}, impl, rows=rows, wanted="prompt cells")
        want = run(case, held | {"x": x[rows].contiguous()}, impl, wanted="prompt cells")
        for name in want:
            check_bits(got[name], want[name], f"{layout}: {name}")
        if impl == "triton" and dtype != U8:
            break  # the strides do not depend on the dtype


@pytest.mark.parametrize("batch", [0, 6])
@pytest.mark.parametrize("impl", IMPLS)
def test_batches_of_every_size(batch, impl, device, small_launch):
    """More rows than images, none, and one."""
    case = Case(x=U8, share="index", clamp="exact", batch=3)
    held = tensors(case, device)
    rows = torch.arange(batch, device=device) % 3
    index = torch.arange(batch, device=device) % 4
    got = run(case, held | {"index": index}, impl, rows=rows)
    want = run(case, held | {"index": index, "x": held["x"][rows]}, impl)
    for name in want:
        check_bits(got[name], want[name], name)


@pytest.mark.parametrize("wrong", [-1, 5, 2**31, -(2**40)])
def test_a_row_out_of_range_is_an_error_on_the_cpu(wrong):
    held, rows = set_of(Case(batch=3), "cpu")
    rows[1] = wrong
    with pytest.raises(ValueError, match=rf"rows: expected values from 0 to 4, got \[{wrong}\]"):
        call(Case(batch=3), held, "auto", rows=rows)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (Case(batch=4), -1),
        (Case(batch=4, clamp="exact", region="everywhere"), 2**31),
        (Case(batch=4, geometry="up bilinear", x=U8, share="index"), 6),
        (Case(batch=4, geometry="up bilinear", clamp="exact"), -(2**40)),
        (replace(ALL, batch=4), 2**33),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_a_row_out_of_range_is_nan_on_a_gpu(case, wrong, impl, device, monkeypatch):
    """The sample is NaN and teaches nothing; every other sample keeps its bits."""
    held, rows = set_of(case, device)
    monkeypatch.setattr(functional.perturbation, "check_range", lambda *_: None)
    sound = run(case, held, impl, rows=rows, wanted="")["out"]
    keep = torch.tensor([0, 1, 3], device=device)
    rows[2] = wrong
    got = run(case, held, impl, gradient(sound), rows=rows, wanted="prompt cells")
    assert got["out"][2].isnan().all()
    check_bits(got["out"][keep], sound[keep])
    fewer = held | {name: held[name][keep] for name in ("index", "cells") if name in held}
    want = run(replace(case, batch=3), fewer, impl, gradient(sound)[keep], rows=rows[keep], wanted="prompt cells")
    torch.testing.assert_close(got["prompt"], want["prompt"], rtol=1e-6, atol=1e-6)
    if "cells" in got:
        torch.testing.assert_close(got["cells"][keep], want["cells"], rtol=1e-6, atol=1e-6)
        assert got["cells"][2].abs().max() == 0


@pytest.mark.parametrize(
    ("rows", "x", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), {}, r"rows: expected int64 \[B\], got torch.int32 \[2\]"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, r"rows: expected int64 \[B\], got torch.int64 \[2, 1\]"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), {}, "rows: expected a tensor on cpu like x, got one on meta"),
        (torch.zeros(2, dtype=torch.int64), {"requires_grad": True}, "x: expected images without a gradient when rows is given"),
    ],
)
def test_rows_that_are_refused(rows, x, message, monkeypatch):
    monkeypatch.setattr(ops.Perturb, "apply", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=message):
        perturb(torch.zeros(5, 3, 4, 4, **x), torch.zeros(3, 4, 4, requires_grad=True), rows=rows)


@pytest.mark.parametrize("case", [Case(clamp="exact", x=U8), replace(ALL, cells=(3, 1, 7))], ids=["prompt", "cells"])
def test_opcheck(case, device, monkeypatch):
    """Schemas, fakes and dynamic shapes with rows."""
    seen = {}
    for name in ("forward", "_prompt_gradient", "_cells_gradient"):
        operator = getattr(torch.ops.fastprompt, "perturb" if name == "forward" else "perturb" + name).default

        def watched(*given, operator=operator):
            *given, settings = given
            seen[operator] = (*given, *settings.encode())
            return operator(*seen[operator])

        monkeypatch.setattr(ops, name, watched)
    held, rows = set_of(replace(case, batch=2), device)
    run(case, held, "auto", rows=rows, wanted="prompt cells")
    assert len(seen) == 2
    for operator, arguments in seen.items():
        given = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(given))


def test_compile_without_graph_breaks(device):
    """A whole reprogrammed model takes `Rows` under torch.compile."""
    torch._dynamo.reset()
    x, _ = samples(7)
    module, rows = make("random").to(device), torch.tensor([4, 1, 4], device=device)
    compiled = torch.compile(module, fullgraph=True, backend=aot_eager)
    got, want = compiled(Rows(x.to(device), rows)), module(x.to(device)[rows])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    grad = module.inputs.prompt.grad.clone()
    module.inputs.prompt.grad = None
    want.sum().backward()
    torch.testing.assert_close(grad, module.inputs.prompt.grad, rtol=1e-5, atol=1e-6)


# ---- Modules ----

MODULES = {
    "padded": (lambda: fnn.PaddedPrompt(12, 7), (5, 3, 7, 7)),
    "resized, NHWC": (lambda: fnn.PaddedPrompt(12, 7, data_format="NHWC"), (5, 4, 5, 3)),
    "trained scale": (lambda: fnn.PaddedPrompt(12, 7, trainable_scale=True), (5, 3, 7, 7)),
    "frame": (lambda: fnn.FramePrompt(12, 2), (5, 3, 9, 9)),
    "patch": (lambda: fnn.PatchPrompt(12, 4, "random"), (5, 3, 12, 12)),
    "masked": (lambda: fnn.MaskedPrompt(16), (5, 1, 16, 16)),
    "generated": (lambda: fnn.GeneratedPrompt(8, torch.nn.Conv2d(3, 3, 1)), (5, 3, 8, 8)),
    "series": (lambda: fnn.SeriesPrompt(40, 9, segments=2), (5, 9)),
    "series of channels": (lambda: fnn.SeriesPrompt(40, 9, channels=2), (5, 2, 9)),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_input_prompt_takes_rows(name, device):
    build, shape = MODULES[name]
    module = build().to(device)
    whole = torch.randint(256, shape, dtype=U8, device=device)
    rows = torch.tensor([3, 0, 3], device=device)
    outs = []
    for x in (Rows(whole, rows), Rows(whole, rows).gather()):
        torch.manual_seed(1)
        outs.append(module(x))
    check_bits(*outs)
    assert torch.equal(Rows(whole, rows).gather(), whole[rows])


def test_a_reprogrammed_model_gathers_for_modules_that_do_not_know_rows():
    x, _ = samples(6)
    rows = torch.tensor([5, 2, 2])
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 9))

    class Scale(torch.nn.Module):
        def forward(self, x):
            return x / 255

    plain = fastprompt.Reprogrammed(body, Scale())
    check_bits(plain(Rows(x, rows)), plain(x[rows]))
    bare = fastprompt.Reprogrammed(torch.nn.Sequential(Scale(), body))
    check_bits(bare(Rows(x, rows)), bare(x[rows]))
    known = make("random")
    check_bits(known(Rows(x, rows)), known(x[rows]))


# ---- DeviceDataset ----


def epoch(dataset):
    return [(batch.rows.tolist(), y.tolist()) for batch, y in dataset]


def test_an_epoch_is_every_sample_once_and_a_function_of_seed_and_epoch():
    x, y = samples(11)
    dataset = DeviceDataset(x, y, batch_size=4, seed=5)
    first, second = epoch(dataset), epoch(dataset)
    assert [len(rows) for rows, _ in first] == [4, 4, 3]
    assert len(dataset) == 3
    for one in (first, second):
        assert sorted(row for rows, _ in one for row in rows) == list(range(11))
        assert all(targets == y[rows].tolist() for rows, targets in one)
    assert first != second
    assert epoch(DeviceDataset(x, y, batch_size=4, seed=6)) != first
    dataset.set_epoch(1)
    assert epoch(dataset) == second
    next(iter(dataset))  # an epoch that is broken off counts as one
    dataset.set_epoch(0)
    assert epoch(dataset) == first
    ordered = [rows for batch, _ in dataset.in_order() for rows in batch.rows.tolist()]
    assert ordered == list(range(11))
    plain = DeviceDataset(x, y, batch_size=4, shuffle=False, drop_last=True)
    assert [rows for rows, _ in epoch(plain)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(plain) == 2
    assert all(batch.images.data_ptr() == x.data_ptr() for batch, _ in plain)  # nothing is copied
    assert repr(plain) == "DeviceDataset([11, 3, 5, 5] uint8 on cpu, batch_size=4, batches=2)"


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [2, 9, 11, 12])
def test_each_rank_has_its_share(count, drop_last, monkeypatch):
    """Equally many samples on each rank; together the order of one process, and in order every sample once."""
    x, y = samples(count)
    alone = [row for rows, _ in epoch(DeviceDataset(x, y, batch_size=2)) for row in rows]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    shares, ordered = [], []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        dataset = DeviceDataset(x, y, batch_size=2, drop_last=drop_last)
        batches = epoch(dataset)
        assert len(batches) == len(dataset)
        shares.append([row for rows, _ in batches for row in rows])
        ordered += [row for batch, _ in dataset.in_order() for row in batch.rows.tolist()]
    assert sorted(ordered) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    together = [row for rows in zip(*shares, strict=True) for row in rows]
    if drop_last:
        assert together == alone[: len(together)]
        assert len(together) == count // 3 // 2 * 2 * 3
    else:
        assert together == (2 * alone)[: -(-count // 3) * 3]


def test_accuracy_is_that_of_all_ranks(monkeypatch):
    x, y = samples(11)
    module = make("random")
    want = evaluate(module, (x, y))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    sums = []
    monkeypatch.setattr(dist, "all_reduce", lambda t: sums.append(t.clone()))
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        evaluate(module, DeviceDataset(x, y, batch_size=4))
    right, seen = sum(sums).tolist()
    assert (seen, right / seen) == (11, want)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.copy_(sum(sums)))
    assert evaluate(module, DeviceDataset(x, y)) == want


def test_fit_and_refresh_give_what_tensors_give(device):
    """The same seed gives the order of tensors that `fit` shuffles itself: the same bits."""
    x, y = (part.to(device) for part in samples(50))
    dataset = DeviceDataset(x, y, batch_size=16)
    one, other = make().to(device), make().to(device)
    options = {"epochs": 2, "lr": 0.1, "progress": False}
    rows = fit(one, dataset, dataset, **options)
    want = fit(other, (x, y), (x, y), batch_size=16, **options)
    for mine, theirs in zip(rows, want, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    check_bits(one.inputs.prompt, other.inputs.prompt)
    refresh(one, dataset)
    refresh(other, (x, y))
    assert torch.equal(one.outputs.counts, other.outputs.counts)
    assert int(one.outputs.counts.sum()) == 50


def test_resuming_gives_the_same_bits(tmp_path):
    """An interrupted run takes up the order where it stood."""
    dataset = DeviceDataset(*samples(), batch_size=16)
    straight = make()
    options = {"lr": 0.1, "schedule": "constant", "progress": False}
    fit(straight, dataset, epochs=4, **options)
    fit(make(), DeviceDataset(*samples(), batch_size=16), epochs=2, folder=tmp_path, **options)
    resumed = make()
    fit(resumed, DeviceDataset(*samples(), batch_size=16), epochs=4, folder=tmp_path, resume=True, **options)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_arrays_and_lists_and_what_is_refused():
    x, y = samples(6)
    given = DeviceDataset(x.numpy(), y.tolist(), batch_size=4)
    assert torch.equal(given.images, x)
    assert torch.equal(given.targets, y)
    for images, targets, options, message in (
        (x.int(), y, {}, "images: expected uint8 or a floating point dtype, got torch.int32"),
        (x[:, 0, 0, 0], y, {}, r"images: expected \[N, C, h, w\], .* got \[6\]"),
        (x, y[:5], {}, r"targets: expected \[6\], one a sample, got \[5\]"),
        (x, y.float(), {}, "targets: expected int64, got torch.float32"),
        (x, y, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DeviceDataset(images, targets, **options)
    with pytest.raises(ValueError, match="labels: expected values from 0 to 2, got 1 to 3"):
        fit(make("random"), DeviceDataset(x, np.asarray(y) + 1), epochs=1, progress=False)
    with pytest.raises(ValueError, match="data: expected a DeviceDataset on cpu, where the model is, got one on meta"):
        fit(make("random"), DeviceDataset(x, y, device="meta"), epochs=1, progress=False)
