"""Composition: f stays frozen, only what is trained is state, and a folder brings it all back."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import re

import pytest
import torch
from torch import nn

import fastprompt
from fastprompt import CheckpointError, Reprogrammed, build, checkpoint
from fastprompt import nn as fnn
from fastprompt.methods import ELSEWHERE, METHODS, table
from fastprompt.taxonomy import Alignment, Format, Location, Operator, Place

SOURCES, CLASSES, CANVAS = 12, 4, 16


def frozen_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, SOURCES),
    )  # fmt: skip


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


INPUTS = {
    "padded": lambda: fnn.PaddedPrompt(CANVAS, 6, mean=(0.4, 0.5, 0.6), std=0.2, init="normal"),
    "padded, masked": lambda: fnn.PaddedPrompt(CANVAS, 6, mask=torch.rand(CANVAS, CANVAS) > 0.5),
    "padded, scaled": lambda: fnn.PaddedPrompt(CANVAS, 6, trainable_scale=True, offset=None),
    "frame": lambda: fnn.FramePrompt(CANVAS, 3, low=-1.0, high=1.0),
    "patch": lambda: fnn.PatchPrompt(CANVAS, (3, 4), "random", init="normal"),
    "masked": lambda: fnn.MaskedPrompt(CANVAS, init="normal"),
}


def make(inputs: str = "padded", method: str = "iterative") -> Reprogrammed:
    torch.manual_seed(1)
    return Reprogrammed(frozen_model(), INPUTS[inputs](), fnn.LabelMap(SOURCES, CLASSES, method=method, seed=3))


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_the_model_is_frozen_and_stays_in_eval_mode():
    model = frozen_model().train()
    reprogrammed = Reprogrammed(model, INPUTS["masked"]())
    assert reprogrammed.train() is reprogrammed
    assert reprogrammed.training
    assert reprogrammed.inputs.mask_net[1].training  # its own parts do train
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    reprogrammed.check_frozen()
    before = copy.deepcopy(model.state_dict())
    reprogrammed(images()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # batch norm did not move
    assert all(parameter.grad is not None for parameter in reprogrammed.trainable_parameters())


def test_a_model_that_could_change_is_reported():
    reprogrammed = make()
    reprogrammed.model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"model\.0\.weight: expected a frozen parameter"):
        reprogrammed.check_frozen()
    reprogrammed.model[0].weight.requires_grad_(False)
    reprogrammed.model[1].train()
    with pytest.raises(RuntimeError, match=r"model\.1: expected eval mode"):
        reprogrammed.check_frozen()


@pytest.mark.parametrize(("model", "inputs"), [(None, None), (len, None), (nn.Identity(), 3)])
def test_parts_have_to_be_modules(model, inputs):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got"):
        Reprogrammed(model, inputs)


def test_state_holds_what_is_trained_and_the_map():
    reprogrammed = make()
    assert set(reprogrammed.state_dict()) == {"inputs.prompt", "outputs.index"}
    wrapped = nn.ModuleDict({"inner": make()})  # a prefix of somebody else's
    assert set(wrapped.state_dict()) == {"inner.inputs.prompt", "inner.outputs.index"}
    wrapped.load_state_dict(wrapped.state_dict())
    state = reprogrammed.state_dict()
    del state["inputs.prompt"]
    with pytest.raises(RuntimeError, match=r"inputs\.prompt"):
        reprogrammed.load_state_dict(state)


def test_outputs_are_the_composition():
    reprogrammed = make()
    x = images()
    by_hand = reprogrammed.model(reprogrammed.inputs(x))[:, reprogrammed.outputs.index]
    assert torch.equal(reprogrammed(x), by_hand)
    assert torch.equal(Reprogrammed(reprogrammed.model)(x.float()), reprogrammed.model(x.float()))


def test_an_output_object_with_logits_is_read():
    class Output(nn.Module):
        def forward(self, x):
            return type("ModelOutput", (), {"logits": x.mean((2, 3))})()

    assert Reprogrammed(Output(), INPUTS["padded"]())(images()).shape == (5, 3)


def test_every_prompt_on_every_sample():
    prompts = fnn.PaddedPrompt(CANVAS, 6, prompts=3, init="normal")
    reprogrammed = Reprogrammed(frozen_model(), prompts)
    out = reprogrammed(images())
    assert out.shape == (3, 5, SOURCES)
    index = torch.tensor([0, 2, 1, 1, 0])
    chosen = reprogrammed(images(), index)
    torch.testing.assert_close(chosen, out[index, torch.arange(5)])


@pytest.mark.parametrize("method", ["random", "frequent", "iterative"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_folder_brings_it_back(inputs, method, tmp_path):
    saved = make(inputs, method)
    with torch.no_grad():
        for parameter in saved.trainable_parameters():
            parameter.add_(torch.rand_like(parameter))
    saved.outputs.index.copy_(torch.tensor([7, 1, 0, 5]))
    saved.eval()
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fastprompt_config.json", "fastprompt.safetensors"}
    loaded = Reprogrammed.from_pretrained(tmp_path, frozen_model()).eval()
    assert type(loaded.inputs) is type(saved.inputs)
    assert loaded.config() == saved.config()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    assert torch.equal(loaded(images()), saved(images()))


def test_a_path_in_the_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        checkpoint.save(tmp_path, make().state_dict(), make().config() | {"inputs": {"class": "../x", "arguments": {}}})
    assert not any(tmp_path.iterdir())


def test_code_is_not_in_the_folder(tmp_path):
    made = Reprogrammed(frozen_model(), fnn.GeneratedPrompt(CANVAS, Generator(), low=-1.0, high=1.0))
    made.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"build it and pass inputs="):
        Reprogrammed.from_pretrained(tmp_path, frozen_model())
    given = fnn.GeneratedPrompt(CANVAS, Generator(), low=-1.0, high=1.0)
    loaded = Reprogrammed.from_pretrained(tmp_path, frozen_model(), inputs=given)
    assert torch.equal(loaded(images()), made(images()))


def padded(**arguments):
    return {"class": "PaddedPrompt", "arguments": {"canvas": CANVAS} | arguments}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"inputs": {"class": "Conv2d", "arguments": {}}}, "expected one of"),
        ({"inputs": padded(image_size=6, hook=1)}, "unknown for PaddedPrompt: hook"),
        ({"inputs": padded(image_size=60)}, "canvas: expected at least"),
        ({"inputs": padded(image_size=8), "outputs": None}, "outputs.index"),
        ({"inputs": 3}, "expected class and arguments"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused(change, message, tmp_path):
    reprogrammed = make()
    checkpoint.save(tmp_path, reprogrammed.state_dict(), reprogrammed.config() | change)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        Reprogrammed.from_pretrained(tmp_path, frozen_model())


def test_the_config_is_for_people_too(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "fastprompt_config.json").read_text())
    assert config["inputs"]["class"] == "PaddedPrompt"
    assert config["outputs"]["arguments"]["num_classes"] == CLASSES


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(clone):
    original = make()
    other = clone(original)
    assert torch.equal(other(images()), original(images()))
    with torch.no_grad():
        other.inputs.prompt.add_(1)
    assert not torch.equal(other(images()), original(images()))
    assert set(other.state_dict()) == set(original.state_dict())
    other.train()
    assert not other.model.training


def test_the_place_of_a_composition():
    place = Place(Format.LEARNABLE, Location.RAW, Operator.CONCATENATIVE, Alignment.STATISTICAL)
    assert make().taxonomy == place
    assert str(place) == "learnable / raw input / concatenative / statistical"
    assert Reprogrammed(frozen_model(), INPUTS["frame"]()).taxonomy.alignment is Alignment.IDENTITY


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name(name):
    classes = 3 if name == "attrvr" else CLASSES  # two sets of attributes for each class
    if name == "voice2series":
        made = build(name, nn.Linear(32, SOURCES), num_source=SOURCES, num_classes=CLASSES, length=32, series_length=7)
        assert made(torch.randn(2, 7)).shape == (2, CLASSES)
    else:
        size = {"image_size": 6} if METHODS[name].place().operator is not Operator.PARAMETRIC else {}
        made = build(name, frozen_model(), num_source=SOURCES, num_classes=classes, canvas=CANVAS, **size)
        assert made(images()).shape == (5, SOURCES if METHODS[name].labels is None else classes)
    assert made.taxonomy == METHODS[name].place()
    assert f"\n{name} " in table()


def test_the_table_says_what_makes_the_others():
    lines = {line.split()[0]: " ".join(line.split()) for line in table().splitlines()}
    assert lines["coop"].startswith("coop learnable embedding concatenative identity clip.ContextPrompts Zhou")
    assert lines["maple"].startswith("maple learnable hidden concatenative identity clip.CoupledPrompts Khattak")
    assert lines["vpt-deep"].startswith("vpt-deep learnable hidden concatenative identity attach(model, nn.DeepPrompt) Jia")
    for _, how, _ in ELSEWHERE.values():  # exists under that name
        for name in re.findall(r"[a-z.]+[A-Z]\w+|attach", how):
            assert operator.attrgetter(name)(fastprompt)


def test_methods_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"name: expected one of rlm-vp, .*got 'ilm'"):
        build("ilm", frozen_model())
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'coop', which is made by clip\.ContextPrompts"):
        build("coop", frozen_model())
    with pytest.raises(ValueError, match=r"num_source, num_classes: expected both for ilm-vp"):
        build("ilm-vp", frozen_model(), canvas=CANVAS, image_size=6)
