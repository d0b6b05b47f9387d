"""Training: the fused path has the loss curve of a plain PyTorch loop, and `fit` resumes bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastprompt import CheckpointError, Reprogrammed, fit
from fastprompt import nn as fnn
from fastprompt.functional import Normalization, perturb
from fastprompt.training import _factor, evaluate, refresh
from tests.conftest import HAS_TRITON

CANVAS, SIZE, SOURCES, CLASSES = 12, 5, 9, 3
MEAN, STD = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]


def frozen_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, SOURCES))


def data(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    x = torch.randint(0, 120, (count, 3, SIZE, SIZE), generator=generator) + 60 * y[:, None, None, None]
    return x.to(torch.uint8), y


def make(method: str = "iterative") -> Reprogrammed:
    prompt = fnn.PaddedPrompt(CANVAS, SIZE, mean=MEAN.flatten(), std=STD.flatten(), squash="tanh")
    return Reprogrammed(frozen_model(), prompt, fnn.LabelMap(SOURCES, CLASSES, method=method))


def plain_curve(model: nn.Module, steps: int, index: torch.Tensor) -> list[float]:
    """What the public repositories do: pad, add a masked tanh, normalise, index the logits."""
    before = (CANVAS - SIZE + 1) // 2
    after = CANVAS - SIZE - before
    delta = torch.zeros(3, CANVAS, CANVAS, requires_grad=True)
    mask = torch.ones(CANVAS, CANVAS)
    mask[before : before + SIZE, before : before + SIZE] = 0
    optimizer = torch.optim.Adam([delta], 0.05)
    x, y = data()
    losses = []
    for step in range(steps):
        part = slice(step % 3 * 16, step % 3 * 16 + 16)
        padded = nn.functional.pad(x[part].float() / 255, (before, after, before, after))
        logits = model((padded + torch.tanh(delta) * mask - MEAN) / STD)[:, index]
        loss = nn.functional.cross_entropy(logits, y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_the_loss_curve_is_plain_pytorchs(impl, device):
    steps = 50
    if impl == "triton" and not HAS_TRITON:
        pytest.skip("needs Triton")
    model = frozen_model().requires_grad_(False)
    index = torch.tensor([4, 0, 7])
    wanted = plain_curve(model, steps, index)
    module = make().to(device)
    optimizer = torch.optim.Adam(module.trainable_parameters(), 0.05)
    x, y = (part.to(device) for part in data())
    losses = []
    for step in range(steps):
        part = slice(step % 3 * 16, step % 3 * 16 + 16)
        prompt = module.inputs
        shown = perturb(
            x[part], prompt.prompt, canvas=CANVAS, hole="image", squash="tanh", impl=impl,
            norm=Normalization(prompt.norm, "none"),
        )  # fmt: skip
        loss = nn.functional.cross_entropy(module.model(shown)[:, index.to(device)], y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(wanted[-3:]) < 0.95 * sum(wanted[:3])  # it does learn
    assert losses == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_fit_learns_and_writes_best_and_last(device, tmp_path):
    module = make().to(device)
    train = data()
    rows = fit(module, train, train, epochs=6, lr=0.1, batch_size=16, folder=tmp_path, progress=False)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    best = Reprogrammed.from_pretrained(tmp_path / "best", frozen_model()).to(device)
    assert evaluate(best, train) == max(row["validation"] for row in rows)
    assert (tmp_path / "last" / "fastprompt.safetensors").exists()


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resuming_gives_the_same_bits(schedule, stop, tmp_path):
    def run(epochs, folder, resume=False):
        module = make()
        options = {"lr": 0.1, "batch_size": 16, "folder": folder, "schedule": schedule, "progress": False}
        return module, fit(module, data(), data(), epochs=epochs, resume=resume, **options)

    straight, rows = run(4, tmp_path / "a")
    interrupted, calls = make(), []
    original = interrupted.outputs.refresh
    interrupted.outputs.refresh = lambda: _stop_at(calls, stop, original)
    options = {"lr": 0.1, "batch_size": 16, "folder": tmp_path / "b", "schedule": schedule, "progress": False}
    with pytest.raises(KeyboardInterrupt):  # a run of four epochs that is stopped after `stop` of them
        fit(interrupted, data(), data(), epochs=4, **options)
    resumed, again = run(4, tmp_path / "b", resume=True)
    assert [row["epoch"] for row in again] == [1, 2, 3, 4]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for one, other in zip(rows, again, strict=True):
        assert {key: one[key] for key in one if key != "seconds"} == {key: other[key] for key in other if key != "seconds"}


def _stop_at(calls, stop, original):
    calls.append(1)
    if len(calls) > stop:
        raise KeyboardInterrupt
    original()


def test_resume_refuses_other_modules(tmp_path):
    fit(make("iterative"), data(), epochs=1, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="expected the modules that are being trained"):
        fit(make("frequent"), data(), epochs=2, folder=tmp_path, resume=True, progress=False)
    make().save_pretrained(tmp_path / "last")
    with pytest.raises(CheckpointError, match="without training state"):
        fit(make(), data(), epochs=2, folder=tmp_path, resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path):
    fit(make(), data(), epochs=1, folder=tmp_path, progress=False)
    before = (tmp_path / "last" / "fastprompt.safetensors").read_bytes()
    x, y = data()
    broken = x.float() / 255
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss: expected a finite number, got nan in epoch 2"):
        fit(make(), (broken, y), epochs=2, folder=tmp_path, resume=True, progress=False)
    assert (tmp_path / "last" / "fastprompt.safetensors").read_bytes() == before


def test_a_map_is_refreshed_when_its_method_says(monkeypatch):
    for method, wanted in (("random", 0), ("frequent", 1), ("iterative", 3)):
        module, calls = make(method), []
        monkeypatch.setattr(fnn.LabelMap, "refresh", lambda self, calls=calls: calls.append(1))
        fit(module, data(), epochs=3, progress=False)
        assert len(calls) == wanted, method


def test_refresh_counts_the_prompted_predictions():
    module = make()
    x, y = data()
    refresh(module, (x, y), batch_size=7)
    predicted = module.model(module.inputs(x)).argmax(1)
    wanted = torch.zeros(SOURCES, CLASSES, dtype=torch.int64)
    for source, target in zip(predicted.tolist(), y.tolist(), strict=True):
        wanted[source, target] += 1
    assert torch.equal(module.outputs.counts, wanted)


def test_a_loader_gives_what_tensors_give():
    x, y = data()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]
    assert evaluate(make(), batches) == evaluate(make(), (x, y), batch_size=16)
    one, other = make("random"), make("random")
    rows = fit(one, batches, epochs=2, lr=0.1, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not torch.equal(one.inputs.prompt, other.inputs.prompt)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns(amp, device):
    module = make().to(device)
    rows = fit(module, data(), epochs=4, lr=0.1, batch_size=16, amp=amp, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert module.inputs.prompt.dtype == torch.float32


def test_rates_of_the_schedules():
    assert _factor("cosine", 0, 4, 0, 10) == 1
    assert _factor("cosine", 2, 4, 0, 10) == pytest.approx(0.5)
    assert _factor("cosine", 3, 4, 9, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3.9 / 4)))
    assert [_factor("multistep", epoch, 100, 0, 1) for epoch in (49, 50, 71, 72)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert _factor("constant", 3, 4, 0, None) == 1


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ((data()[0], data()[1] + 1), {}, "labels: expected values from 0 to 2, got 1 to 3"),
        ((data()[0], data()[1].float()), {}, r"labels: expected int64 \[B\], got torch.float32"),
        ((data()[0], data()[1][:5]), {}, "data: expected as many labels as samples, got 5 and 48"),
        ((data()[0][:0], data()[1][:0]), {}, "train: expected at least one sample, got none"),
        (data(), {"schedule": "linear"}, "schedule: expected cosine, multistep or constant, got 'linear'"),
        (data(), {"epochs": 0}, "epochs: expected at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(train, options, message):
    with pytest.raises(ValueError, match=message):
        fit(make("random"), train, progress=False, **({"epochs": 1} | options))


def test_a_label_outside_the_classes_in_a_loader():
    x, y = data()
    with pytest.raises(ValueError, match="labels: expected values from 0 to 2, got 0 to 7"):
        fit(make("random"), [(x, torch.where(y == 2, 7, y))], epochs=1, progress=False)
