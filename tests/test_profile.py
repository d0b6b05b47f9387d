"""`fastprompt.profile`: whose time, memory and calls a step's are, what the rules say, and what it leaves behind (nothing)."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import timeit
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastprompt
from fastprompt import _runtime, functional
from fastprompt.nn import DeepPrompt, LabelMap, PaddedPrompt, SoftPrompt
from fastprompt.profiling import Op, Part, Profile, numbers, run_script, trace
from fastprompt.profiling.advice import Evidence, advise
from fastprompt.profiling.results import PARTS
from fastprompt.profiling.trace import Span, attribute, memory_of, spans_of

FEW = {"steps": 3, "warmup": 1}
NAP = 0.02


@pytest.fixture(autouse=True)
def few_threads(monkeypatch, request):
    """One thread, and ceilings that cost nothing where they are not looked at."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "ceilings" not in request.keywords:
        monkeypatch.setattr(numbers, "ceilings", lambda device: (1e10, 1e11))
    yield
    torch.set_num_threads(threads)


class Sleepy(nn.Module):
    """Passes on what it gets, late."""

    def forward(self, x):
        time.sleep(NAP)
        return x


class LateBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        time.sleep(NAP)
        return g


class SleepyBackward(nn.Module):
    def forward(self, x):
        return LateBackward.apply(x)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


def padded():
    return PaddedPrompt(canvas=16, image_size=8, mean=0.5, std=0.5)


def images(batch=8, dtype=torch.uint8, size=8):
    return torch.randint(256, (batch, 3, size, size)).to(dtype)


def step_of(inputs=None, outputs=None, x=None, **more):
    """A training step, with its model."""
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 50))
    inputs = padded() if inputs is None else inputs
    model = fastprompt.Reprogrammed(frozen, inputs, LabelMap(50, 5) if outputs is None else outputs, **more)
    x, y = images() if x is None else x, torch.arange(8) % 5
    optimizer = torch.optim.SGD(model.trainable_parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step.model = model
    return step


# ---- Whose time it is ----


def test_the_numbers_of_a_step(capsys):
    result = fastprompt.profile(step_of(), **FEW)
    assert capsys.readouterr().out.strip() == str(result).strip()
    assert (result.kind, result.device, result.steps, result.samples, result.tokens) == ("training", "cpu", 3, 8, None)
    assert result.p20 <= result.step <= result.p80
    assert result.samples_per_second == pytest.approx(8e3 / result.step)
    assert result.overhead == pytest.approx(result.step / result.frozen)
    assert result.spread[0] <= result.spread[1]
    assert sum(part.forward + part.backward for part in result.parts.values()) == pytest.approx(result.step, rel=1e-6)
    for name in ("perturbation", "frozen model", "mapping and loss"):
        assert result.parts[name].forward > 0, name
        assert result.parts[name].backward > 0, name
    assert result.parts["optimizer"].forward > 0
    assert result.parts["prompts"] == Part()
    assert {op.name: op.calls for op in result.operations} == {"perturb": 1, "map_labels": 1}
    moved = {op.name: op.moved for op in result.operations}
    assert moved["perturb"] == 8 * 3 * (8 * 8 + 16 * 16 * 4)
    assert result.flops >= 2 * 2 * 8 * 768 * 50  # the linear layer, there and back
    assert result.operators > 10
    assert result.copy > 1e8
    assert result.matmul > 1e8
    assert (result.launches, result.syncs, result.busy) == (None, None, None)
    assert result.held["frozen model"] == 4 * (768 * 50 + 50)
    assert result.peak >= sum(result.held.values())


@pytest.mark.parametrize(
    ("planted", "part", "way"),
    [
        ({"outputs": Sleepy()}, "mapping and loss", "forward"),
        ({"outputs": SleepyBackward()}, "mapping and loss", "backward"),
        ({"inputs": nn.Sequential(padded(), Sleepy())}, "perturbation", "forward"),
        ({"inputs": nn.Sequential(padded(), SleepyBackward())}, "perturbation", "backward"),
    ],
)
def test_planted_time_is_found_where_it_is_spent(planted, part, way):
    result = fastprompt.profile(step_of(**planted), **FEW)
    assert getattr(result.parts[part], way) > 0.5 * result.step
    assert result.overhead > 2


def test_planted_time_in_the_frozen_model_is_no_overhead():
    step = step_of()
    step.model.model.append(Sleepy())
    result = fastprompt.profile(step, **FEW)
    assert result.parts["frozen model"].forward > 0.5 * result.step
    assert 0.5 < result.overhead < 2


def test_a_loss_of_a_map_is_mapping():
    step = step_of()
    labels, x, y = step.model.outputs, images(), torch.arange(8) % 5
    result = fastprompt.profile(lambda: labels.loss(step.model.source_logits(x), y).backward(), **FEW)
    assert result.parts["mapping and loss"].forward > 0
    assert result.parts["mapping and loss"].backward > 0
    assert [op.name for op in result.operations] == ["perturb", "mapped_cross_entropy"]
    assert result.kind == "training"  # there is a backward, if no optimizer


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, place):
        time.sleep(NAP / 2)
        return images(1)[0], place % 5


@pytest.mark.parametrize("kind", ["DataLoader", "generator"])
def test_a_sleeping_loader_is_data(kind):
    step = step_of()
    model, optimizer = step.model, torch.optim.SGD(step.model.trainable_parameters(), 0.1)

    def batches():
        while True:
            time.sleep(4 * NAP)
            yield images(), torch.arange(8) % 5

    source = torch.utils.data.DataLoader(Slow(), batch_size=8) if kind == "DataLoader" else batches()
    with fastprompt.profile(**FEW) as watched:
        taken = 0
        while taken < 10:
            for x, y in source:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken += 1
                if taken == 10:
                    break
    result = watched.result
    assert result.share("data") > 0.5
    assert any(advice.startswith("The data") and "take" in advice for advice in result.advice)
    assert result.samples == 8


class SlowlyMatched(LabelMap):
    def refresh(self):
        time.sleep(0.5)
        super().refresh()


def test_fit_is_measured_without_its_refresh():
    """It comes before the first and the seventh step; the seventh would be timed."""
    step = step_of(outputs=SlowlyMatched(50, 5, method="iterative", refresh_every=3))
    data = images(40), torch.arange(40) % 5
    with fastprompt.profile(steps=4, warmup=2) as watched:
        fastprompt.fit(step.model, data, epochs=8, batch_size=20, progress=False)
    assert watched.result.kind == "training"
    assert watched.result.samples == 20
    assert max(watched.seconds) < 0.5
    assert [op.name for op in watched.result.operations] == ["perturb", "map_labels"]


def test_a_model_that_stops_at_its_head_ends_its_range():
    step = step_of(head="1")

    def slow():
        step()
        time.sleep(NAP)

    result = fastprompt.profile(slow, **FEW)
    assert result.share("host") > 0.5
    assert result.parts["frozen model"].forward > 0
    assert result.parts["mapping and loss"].forward > 0  # the folded head


def test_an_attached_prompt():
    model = Blocks()
    handle = fastprompt.attach(model, DeepPrompt(2, 4, 16))
    x = torch.randn(6, 7, 16)
    result = fastprompt.profile(lambda: model(x).sum().backward(), **FEW)
    assert result.samples == 6
    assert result.overhead is not None
    assert result.parts["prompts"].forward > 0
    assert result.parts["prompts"].backward > 0
    assert result.parts["frozen model"].forward > 0
    assert {op.name: op.calls for op in result.operations} == {"prefix_attention": 2}
    assert result.flops >= 2 * 4 * 6 * 7 * (7 + 4) * 16  # attention over the prefix: told by the operator
    handle.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_language_model_with_its_prompt_in_every_sample():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config)
    handle = fastprompt.attach(bert, SoftPrompt(3, 16), fallback="tokens")
    ids = torch.randint(50, (4, 6))
    result = fastprompt.profile(lambda: bert(input_ids=ids, labels=torch.zeros(4).long()).loss.backward(), **FEW)
    assert (result.samples, result.tokens) == (4, 24)
    assert result.tokens_per_second == pytest.approx(24e3 / result.step)
    assert result.parts["mapping and loss"].forward > 0  # the loss inside the model
    assert result.overhead is not None, result.no_overhead
    assert any(advice.startswith("A prompt's rows are in every sample, because Bert") for advice in result.advice)
    handle.detach()


def test_the_run_that_hoists_is_no_call_of_the_model():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    handle = fastprompt.attach(gpt, SoftPrompt(3, 16))
    ids = torch.randint(50, (4, 6))
    result = fastprompt.profile(lambda: gpt(input_ids=ids).last_hidden_state.sum().backward(), **FEW)
    assert (result.samples, result.tokens) == (4, 24)
    assert result.parts["prompts"].forward > 0
    handle.detach()


def test_a_frozen_model_that_only_the_user_knows():
    prompt, frozen = padded(), nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    x = images()

    def step():
        frozen(prompt(x)).sum().backward()

    unknown = fastprompt.profile(step, samples=8, **FEW)
    assert unknown.frozen is None
    assert "pass frozen=" in unknown.no_overhead
    known = fastprompt.profile(step, frozen=frozen, **FEW)
    assert known.samples == 8
    assert known.overhead is not None
    assert known.parts["frozen model"].forward > 0
    calls = []
    by_function = fastprompt.profile(step, frozen=lambda: calls.append(time.sleep(NAP)), samples=8, **FEW)
    assert len(calls) == 3
    assert by_function.frozen >= 1e3 * NAP


# ---- Attribution, exactly ----


BASE = Profile("training", "cpu", 3, 10.0, 9.0, 11.0, samples=8, parts={n: Part() for n in PARTS}, flops=1e9)


def marks(*times):
    return [Span(trace.MARK, at, at) for at in times]


def test_every_instant_belongs_to_one_part():
    spans = [
        *marks(0, 100),
        Span("Optimizer.zero_grad#SGD.zero_grad", 0, 5),
        Span("enumerate(DataLoader)#x.__next__", 10, 20),
        Span("fastprompt: host", 30, 60),
        Span("fastprompt: perturbation", 30, 40),
        Span("fastprompt.perturb", 32, 38, id=1, sequence=7),
        Span("fastprompt: frozen model", 40, 55),
        Span("aten::linear", 41, 50, id=2, sequence=8),
        Span("aten::cross_entropy_loss", 50, 55, id=3, sequence=9),
        Span(trace.ENGINE + "NllLossBackward0", 62, 70, sequence=9, forward_thread=1),
        Span(trace.ENGINE + "AddmmBackward0", 72, 80, sequence=8, forward_thread=1),
        Span("aten::mm", 73, 79, id=4),
        Span(trace.ENGINE + "PerturbBackward", 80, 85, sequence=7, forward_thread=1),
        Span("Optimizer.step#SGD.step", 90, 98),
    ]
    spans = [span._replace(thread=1) for span in spans]
    found, total, windows, busy = attribute(spans)
    assert (total, windows, busy) == (100, [(0, 100)], None)
    assert {label: spent for label, spent in found.items() if spent} == {
        ("optimizer", "forward"): 5 + 8,
        ("data", "forward"): 10 + 5 + 10,  # the loader, and what comes before the model is called
        ("perturbation", "forward"): 10,
        ("frozen model", "forward"): 10,
        ("mapping and loss", "forward"): 5,
        ("mapping and loss", "backward"): 8 + 2,  # and the way to the next node
        ("frozen model", "backward"): 8,
        ("perturbation", "backward"): 5,
        ("host", "forward"): 5 + 2 + 5 + 2,
    }


def test_kernels_of_a_gpu_belong_to_what_launched_them():
    gpu = {"on_gpu": True, "thread": 9}
    spans = [
        *marks(0, 100),
        Span("enumerate(DataLoader)#x.__next__", 0, 8),
        Span("fastprompt: perturbation", 10, 12),
        Span("fastprompt::perturb", 10, 12, id=1, sequence=3),
        Span("fastprompt: frozen model", 12, 20),
        Span("aten::mm", 13, 14, id=2, sequence=4),
        Span(trace.ENGINE + "MmBackward0", 21, 23, thread=5, sequence=4),
        Span("aten::mm", 21, 23, thread=5, id=3),
        Span("k1", 12, 22, link=1, **gpu),
        Span("k2", 22, 52, link=2, **gpu),
        Span("k3", 52, 92, link=3, **gpu),
        Span("k4", 95, 130, link=3, **gpu),  # ends in the next step
    ]
    found, total, _, busy = attribute(spans)
    assert busy == 10 + 30 + 40 + 5
    assert {label: spent for label, spent in found.items() if spent} == {
        ("perturbation", "forward"): 10, ("frozen model", "forward"): 30, ("frozen model", "backward"): 45,
        ("data", "forward"): 10, ("host", "forward"): 5,  # the GPU waits 15
    }  # fmt: skip
    assert sum(found.values()) == total


def test_streams_at_a_time_share_it_and_calls_of_the_driver_are_counted():
    gpu = {"on_gpu": True, "thread": 9}
    driver = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize"]
    spans = [
        *marks(0, 100),
        Span("fastprompt: perturbation", 0, 4),
        Span("aten::add", 1, 3, id=1),
        Span("aten::fill_", 1, 2, id=4),
        Span("fastprompt: frozen model", 4, 8),
        Span("aten::mm", 5, 7, id=2),
        Span("k1", 10, 50, link=1, **gpu),
        Span("k2", 10, 50, link=2, **gpu),
        *[Span(name, 8 + n, 9 + n, link=2) for n, name in enumerate(driver)],
    ]
    found, _, windows, busy = attribute(spans)
    assert busy == 40
    assert found["perturbation", "forward"] == found["frozen model", "forward"] == 20
    counted = replace(BASE)
    numbers.count_calls(counted, spans, windows, busy)
    assert (counted.operators, counted.launches, counted.syncs, counted.busy) == (2, 3, 1, 0.4)  # one wait is the profile's own


def test_copies_of_ranges_on_a_gpu_are_no_kernels():
    """Kineto shows every `record_function` again on the device, around the kernels that were launched inside."""
    kinds = torch.autograd.DeviceType

    def event(name, start, end, device=kinds.CPU, user=False, link=0):
        given = {
            "name": name, "start_ns": start, "duration_ns": end - start, "start_thread_id": 1, "correlation_id": 1,
            "sequence_nr": -1, "fwd_thread_id": 0, "device_type": device, "linked_correlation_id": link,
            "is_user_annotation": user,
        }  # fmt: skip
        return SimpleNamespace(**{key: lambda value=value: value for key, value in given.items()})

    events = [
        event(trace.MARK, 0, 0, user=True), event("fastprompt.perturb", 1, 5, user=True), event("aten::add", 2, 4),
        event("k1", 6, 9, kinds.CUDA, link=1), event("fastprompt.perturb", 6, 90, kinds.CUDA, user=True),
        event("empty", 3, 3), event(trace.MARK, 100, 100, user=True),
    ]  # fmt: skip
    found = spans_of(SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))))
    assert [(s.name, s.on_gpu) for s in found] == [
        (trace.MARK, False), ("fastprompt.perturb", False), ("aten::add", False), ("k1", True), (trace.MARK, False)
    ]  # fmt: skip
    charged, _, _, busy = attribute(found)
    assert busy == 3
    assert charged["perturbation", "forward"] == 3


def allocation(at, pointer, size, device="cpu"):
    fields = SimpleNamespace(ptr=pointer, alloc_size=size, device=device)
    return SimpleNamespace(name="[memory]", tag="Allocation", start_time_ns=at, extra_fields=fields, children=[])


def test_what_memory_holds_at_the_peak():
    def node(name, *children):
        return SimpleNamespace(name=name, tag="TorchOp", start_time_ns=0, extra_fields=None, children=list(children))

    trees = [
        node("fastprompt: perturbation", node("aten::empty", allocation(1, 10, 100)), allocation(2, 11, 7)),
        node("fastprompt: frozen model", allocation(3, 12, 50), allocation(4, 11, -7), allocation(5, 13, 30)),
        node(trace.ENGINE + "AddmmBackward0", allocation(6, 12, -50), allocation(7, 14, 40), allocation(8, 99, -5)),
        node("aten::x", allocation(9, 15, 1000, "cuda:0")),
    ]
    peak, by = memory_of(trees, "cpu")
    assert peak == 180
    assert by == {("perturbation", "forward"): 100, ("frozen model", "forward"): 80}


# ---- What to change ----

GPU = replace(BASE, device="cuda:0", busy=0.9, syncs=0.0, launches=100.0)
FLOAT = ("PaddedPrompt", (256, 3, 224, 224), torch.float32, 256 * 3 * 224 * 224 * 4)


def parts(**milliseconds):
    return BASE.parts | {name.replace("_", " "): Part(forward) for name, forward in milliseconds.items()}


@pytest.mark.parametrize(
    ("fires", "silent", "says"),
    [
        (
            Evidence(replace(BASE, parts=parts(data=6.0))),
            Evidence(replace(BASE, parts=parts(data=1.0))),
            "take 60 % of a step (6.00 of 10.00 ms)",
        ),
        (
            Evidence(BASE, images=[FLOAT]),
            Evidence(BASE, images=[(*FLOAT[:1], (2, 3, 8, 8), torch.float32, 1536)]),
            "224-pixel float32 images come from the host: 154.1 MB a batch; pass uint8 to PaddedPrompt, which converts in its "
            "own pass: 38.5 MB",
        ),
        (Evidence(GPU, dtype=torch.float32), Evidence(GPU, dtype=torch.float32, amp=torch.bfloat16), "in float32 on a GPU"),
        (Evidence(GPU, dtype=torch.float32), Evidence(BASE, dtype=torch.float32), "in float32 on a GPU"),
        (
            Evidence(replace(BASE, parts=parts(frozen_model=5.0, mapping_and_loss=0.1)), folds=[("fc", 1000, 10, 0.02)]),
            Evidence(replace(BASE, parts=parts(frozen_model=9.0)), folds=[("fc", 1000, 10, 0.001)]),
            "pass head='fc' to Reprogrammed, for 10 columns in place of 1000 (mapping and unread columns: up to 2 % of",
        ),
        (Evidence(BASE, trainable=12345), Evidence(BASE), "Gradients of the frozen model are computed: 12,345 of its elements"),
        (Evidence(BASE, in_samples=["it is so"]), Evidence(BASE), "rows are in every sample, because it is so"),
        (Evidence(BASE, recorded=True), Evidence(BASE), "torch.no_grad()"),
        (
            Evidence(replace(BASE, operations=[Op("perturb", "plain PyTorch (the reference)", "float64 has no other", 1, 2.0)])),
            Evidence(
                replace(BASE, operations=[Op("perturb", "plain PyTorch (the reference)", 'impl="torch" asks for it', 1, 2)])
            ),
            "perturb runs in plain PyTorch, because float64 has no other: 2.00 ms",
        ),
        (
            Evidence(replace(GPU, syncs=3.0), waits={"aten::item": 2, "aten::nonzero": 1}),
            Evidence(GPU),
            "waits for the GPU 3 times a step: aten::item (2), aten::nonzero (1)",
        ),
        (Evidence(replace(GPU, busy=0.4)), Evidence(GPU), "The GPU works 40 % of a step"),
    ],
)
def test_a_rule_fires_on_its_evidence_alone(fires, silent, says):
    assert len(advise(fires)) == 1
    assert says in advise(fires)[0]
    assert advise(silent) == []


def advice_on(step, **more):
    return " ".join(fastprompt.profile(step, **FEW, **more).advice)


def test_rules_see_real_steps():
    """Each with a step that makes it speak, and the same step mended."""
    large = 400  # pixels: above the megabyte below which nothing is said
    wanted = {"x": images(8, torch.float32, large), "inputs": PaddedPrompt(canvas=16, image_size=8)}
    assert f"{large}-pixel float32 images come from the host: 15.4 MB a batch" in advice_on(step_of(**wanted))
    assert "images" not in advice_on(step_of(x=images(8, torch.uint8, large)))

    assert "pass head='1' to Reprogrammed, for 5 columns in place of 50" in advice_on(step_of())
    assert "head" not in advice_on(step_of(head="1"))

    trains = step_of()
    trains.model.model.requires_grad_(True)
    assert "Gradients of the frozen model are computed: 38,450 of its elements" in advice_on(trains)
    assert "Gradients" not in advice_on(step_of())

    model, x = step_of().model, images()
    assert "torch.no_grad()" in advice_on(lambda: model(x))
    assert "no_grad" not in advice_on(torch.no_grad()(lambda: model(x)))

    wide = step_of(x=images().double() / 255, inputs=padded().double())
    wide.model.double()
    assert "perturb runs in plain PyTorch, because float64 has no other" in advice_on(wide)


# ---- Scripts ----

SCRIPT = """
import sys, torch, fastprompt
from torch import nn
from fastprompt.nn import LabelMap, PaddedPrompt
assert __name__ == "__main__" and sys.argv[1:] == ["--lr", "0.1"]
frozen = nn.Sequential(nn.Flatten(), nn.Linear(768, 50))
model = fastprompt.Reprogrammed(frozen, PaddedPrompt(canvas=16, image_size=8), LabelMap(50, 5))
x, y = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 5
if TRAINS:
    optimizer = torch.optim.SGD(model.trainable_parameters(), float(sys.argv[2]))
for step in range(STEPS):
    if TRAINS:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    else:
        with torch.no_grad():
            model(x)
print("the script's own end")
"""


@pytest.mark.parametrize(("trains", "steps", "ends"), [(True, 100, False), (True, 8, True), (False, 8, True)])
def test_a_script(tmp_path, capsys, trains, steps, ends):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("TRAINS", str(trains)).replace("STEPS", str(steps)))
    before = sys.argv, sys.path[:]
    if trains and ends:  # one more is measured than there are
        with pytest.raises(RuntimeError, match=r"steps: expected 9 steps \(warmup 1, timed 2, traced 6\), got 8"):
            run_script(str(script), ["--lr", "0.1"], steps=2, warmup=1)
    else:
        result = run_script(str(script), ["--lr", "0.1"], steps=1, warmup=1)
        assert (result.kind, result.samples) == ("training" if trains else "inference", 8)
        assert ("the script's own end" in capsys.readouterr().out) == ends
        assert result.overhead is not None, result.no_overhead
    assert (sys.argv, sys.path) == before


def test_the_command(tmp_path, capsys, monkeypatch):
    from fastprompt.__main__ import main

    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("TRAINS", "True").replace("STEPS", "9"))
    given = ["profile", "--steps", "2", "--warmup", "1", "--out", str(tmp_path / "out"), str(script), "--lr", "0.1"]
    assert main(given) == 0
    assert "where the time goes" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| frozen model |" in report
    assert "![shares of a step](step.png)" in report
    assert (tmp_path / "out" / "step.png").stat().st_size > 1000
    assert '"fastprompt: perturbation"' in (tmp_path / "out" / "trace.json").read_text()
    assert main(["profile", "--steps", "20", str(script), "--lr", "0.1"]) == 1
    assert "fastprompt profile: steps: expected 29 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", str(tmp_path / "no.py")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fastprompt.profile(step_of(), out=tmp_path / "plain", **FEW)
    assert "(No pictures: matplotlib is not installed.)" in (tmp_path / "plain" / "report.md").read_text()


# ---- What it leaves behind ----


def test_nothing_is_left_behind():
    hooks = torch.nn.modules.module
    held = (functional.perturb, fastprompt.Reprogrammed._run, fastprompt.integrations.handle.Attached.__init__)

    def clean():
        now = (functional.perturb, fastprompt.Reprogrammed._run, fastprompt.integrations.handle.Attached.__init__)
        own = _runtime.watch is None and not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
        return now == held and own

    step = step_of()
    fastprompt.profile(step, **FEW)
    assert clean()
    for fails_at in range(10):
        left = iter(range(fails_at))

        def failing(left=left):
            if next(left, None) is None:
                raise KeyError("mine")
            step()

        with pytest.raises(KeyError):
            fastprompt.profile(failing, **FEW) if fails_at < 10 else failing()
        assert clean()


def test_bad_arguments_are_named():
    step = step_of()
    for given, name in (({"steps": 0}, "steps"), ({"warmup": 0}, "warmup"), ({"samples": -1}, "samples")):
        with pytest.raises(ValueError, match=name):
            fastprompt.profile(step, **given)
    with pytest.raises(TypeError, match="frozen"):
        fastprompt.profile(step, frozen=3)
    with pytest.raises(TypeError, match="step_fn"):
        fastprompt.profile(3)


# ---- FASTPROMPT_LOG=path ----


def test_paths_are_logged_once(monkeypatch, capsys):
    monkeypatch.setenv("FASTPROMPT_LOG", "path")
    found = importlib.util.spec_from_file_location("again", _runtime.__file__)
    again = importlib.util.module_from_spec(found)
    found.loader.exec_module(again)  # as a process does that starts with the variable
    assert again.watch is again.log_choice
    monkeypatch.setattr(_runtime, "watch", again.watch)
    log = logging.getLogger("fastprompt")
    for name, value in (("propagate", False), ("handlers", []), ("level", logging.WARNING)):
        monkeypatch.setattr(log, name, value)  # as where nobody has set up logging
    log.manager._clear_cache()
    x = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for batch in (x, x, x[:2]):
        functional.perturb(batch, torch.zeros(3, 16, 16), canvas=16)
    functional.map_labels(torch.zeros(2, 9, dtype=torch.float64), torch.arange(3))
    on_cpu = "perturb: PyTorch on the CPU, analytic, because the tensors are on a CPU; "
    assert capsys.readouterr().err.splitlines() == [
        on_cpu + "uint8 [4, 3, 8, 8], float32 [1, 3, 16, 16] on cpu",
        on_cpu + "uint8 [2, 3, 8, 8], float32 [1, 3, 16, 16] on cpu",
        "map_labels: plain PyTorch (the reference), because float64 has no other; float64 [2, 9], int64 [3] on cpu",
    ]
    log.manager._clear_cache()


def test_every_family_says_its_path(monkeypatch):
    told = []
    monkeypatch.setattr(_runtime, "watch", lambda op, path, why, *_: told.append((op, path, why)))
    q, prefix = torch.randn(2, 2, 3, 8), torch.randn(1, 2, 4, 8)
    functional.prefix_attention(q, q, q, prefix, prefix)
    functional.prefix_attention(q, q, q, prefix, prefix, softcap=2.0)
    functional.soft_gather(torch.tensor([[-1, 3]]), torch.randn(9, 8), torch.randn(1, 8))
    scores, target = torch.randn(2, 9), torch.tensor([0, 1])
    functional.mapped_cross_entropy(scores, functional.segments([[0, 1], [2, 3]], 9), target)
    functional.mapped_cross_entropy(scores, None, target, focal=1.0)
    functional.map_labels(scores, torch.rand(9, 3), impl="torch")
    functional.count_labels_(torch.zeros(9, 2, dtype=torch.int64), scores, target)
    cpu, reference = "PyTorch on the CPU, ", "plain PyTorch (the reference)"
    assert [(op, path.startswith(cpu) or path) for op, path, _ in told] == [
        ("prefix_attention", True), ("prefix_attention", reference), ("soft_gather", True), ("mapped_cross_entropy", True),
        ("mapped_cross_entropy", True), ("map_labels", reference), ("count_labels_", True),
    ]  # fmt: skip
    assert told[1][2] == "PyTorch's flash attention on a CPU has no soft cap"
    if _runtime.HAS_TRITON and _runtime.INTERPRETING:
        functional.map_labels(scores, torch.arange(3), impl="triton")
        assert told[-1][1] == "Triton's interpreter"
    compiled = torch.compile(lambda s: functional.map_labels(s, torch.arange(3)), fullgraph=True, backend="eager")
    count = len(told)
    assert torch.equal(compiled(scores), scores[:, :3])
    assert len(told) == count


def test_off_costs_one_comparison():
    """The statement that every operator pays when nobody watches, by the best of many runs."""
    spent = min(timeit.repeat("_runtime.watch is not None", globals={"_runtime": _runtime}, number=100_000, repeat=20))
    assert spent / 100_000 < 0.1e-6
