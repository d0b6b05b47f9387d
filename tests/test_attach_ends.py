"""Prompts on the input and maps of the outputs, attached: the composition by hand, on transformers' own classes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import fastprompt
from fastprompt import nn as fnn
from tests.test_attach import traces
from tests.test_hoist import HEADS, VOCABULARY, B, P, concatenated, deep_by_tokens, double, frozen, llama, own, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers")

WIDTH, LAYERS, CANVAS, SOURCES, CLASSES = 32, 3, 8, 9, 4


def vit():
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, image_size=CANVAS,
        patch_size=4, num_labels=SOURCES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=SOURCES, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


HEADS_OF = {"vit": "classifier", "resnet": "classifier.1"}


@functools.cache
def model_of(name: str):
    return frozen({"vit": vit, "resnet": resnet, "llama": llama}[name])


def padded(**options) -> fnn.PaddedPrompt:
    prompt = fnn.PaddedPrompt(CANVAS, 4, mean=0.4, std=0.3, **options)
    return double(prompt, 0.5)


def pictures() -> Tensor:
    return torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def label_map(**options) -> fnn.LabelMap:
    return fnn.LabelMap(SOURCES, CLASSES, sources_per_class=2, seed=1, **options)


def agree(got: Tensor, want: Tensor, trained) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trained = list(trained)
    for mine, theirs in zip(*(torch.autograd.grad(out, trained, g, retain_graph=True) for out in (got, want)), strict=True):
        assert theirs.abs().max() > 1e-4, "a gradient that says nothing"
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", HEADS_OF)
def test_an_input_prompt_and_a_label_map(name, head):
    model, prompt, labels = model_of(name), padded(), label_map()
    before, bare = traces(model), model(prompt(pictures())).logits
    handle = fastprompt.attach(model, prompt, outputs=labels, head=HEADS_OF[name] if head else None)
    layer = model.get_submodule(HEADS_OF[name])
    out = model(pictures())
    agree(out.logits, labels(bare), prompt.parameters())
    assert torch.equal(model(pixel_values=pictures(), return_dict=True).logits, out.logits)
    assert ("forward" in vars(layer)) == head
    assert f"output: LabelMap, {f'folded into {HEADS_OF[name]}' if head else 'behind the model'}" in repr(handle)
    assert torch.equal(handle.source_logits(pictures()).logits, bare)
    labels.reset_counts()
    labels.count(handle.source_logits(pictures()).logits, torch.arange(B))
    labels.refresh()
    agree(model(pictures()).logits, labels(bare), prompt.parameters())
    with handle.disabled():
        assert torch.equal(model(prompt(pictures())).logits, bare)
    handle.use(None)
    torch.testing.assert_close(model(prompt(pictures())).logits, labels(bare), rtol=1e-9, atol=1e-9)
    assert handle.detach() is model
    assert traces(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("part", [fnn.LinearMap, fnn.LabelMap])
def test_the_ends_compile_in_one_graph(part):
    model, inputs, labels = model_of("vit"), padded(), part(SOURCES, CLASSES).double()
    handle = fastprompt.attach(model, [inputs, double(fnn.DeepPrompt(LAYERS, P, WIDTH))], outputs=labels, head="classifier")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    agree(compiled(pictures()).logits, model(pictures()).logits, handle.parameters())
    handle.detach()


def test_bytes_and_half_weights():
    """uint8 from the data set; the prompt writes what the model reads."""
    model, prompt = vit().eval().to(torch.bfloat16), fnn.PaddedPrompt(CANVAS, 4, mean=0.4, std=0.3, dtype="bfloat16")
    images = (pictures() * 255).to(torch.uint8)
    want = model(prompt(images)).logits
    fastprompt.attach(model, prompt)
    assert torch.equal(model(images).logits, want)


def test_three_in_one():
    """An input prompt, deep prompts and a map that is trained, behind one handle."""
    model, inputs, labels = model_of("vit"), padded(), double(fnn.LinearMap(SOURCES, CLASSES))
    deep = double(fnn.DeepPrompt(LAYERS, P, WIDTH))
    x = own(deep_by_tokens(model.vit.layers, model.vit.embeddings(inputs(pictures())), deep()))
    want = labels(model.classifier(model.vit.layernorm(x)[:, 0]))
    before = traces(model)
    handle = fastprompt.attach(model, {"border": inputs, "deep": deep}, outputs=labels, head="classifier")
    agree(model(pictures()).logits, want, handle.parameters())
    assert len(list(handle.parameters())) == sum(len(list(part.parameters())) for part in (inputs, deep, labels))
    assert repr(handle).splitlines()[1:5] == [
        "  input: through PaddedPrompt, before ViTForImageClassification",
        "  output: LinearMap, behind the model",
        "  layers: 3 ViTLayer",
        "  path: the attention and mask interfaces of transformers, fastprompt.functional.prefix_attention",
    ]
    for wrong, message in (
        ({"labels": torch.zeros(B, dtype=torch.long)}, "labels: expected None with outputs"),
        ({"return_dict": False}, "outputs: expected a model that returns logits, or an object with them, got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            model(pictures(), **wrong)
    with pytest.raises(ValueError, match="use: expected a prompt in the model, with which the one on the input goes"):
        handle.use("border")
    handle.detach()
    assert traces(model) == before


def test_every_sample_its_own_input_prompt():
    model, prompt = model_of("resnet"), padded(prompts=3)
    handle = fastprompt.attach(model, prompt, use=[2, 0, 2])
    with handle.disabled():
        want = model(prompt(pictures(), torch.tensor([2, 0, 2]))).logits
        last = model(prompt(pictures(), torch.tensor([1, 1, 1]))).logits
    agree(model(pictures()).logits, want, prompt.parameters())
    handle.use(1)
    agree(model(pictures()).logits, last, prompt.parameters())
    with pytest.raises(ValueError, match="use: expected a prompt on the input for each sample, got None for some"):
        handle.use([0, None, 1])
    handle.use([0, 1])
    with pytest.raises(ValueError, match="use: expected one prompt for each of the 3 samples, got 2"):
        model(pictures())
    handle.detach()


def test_a_soft_prompt_and_a_verbalizer():
    """The vocabulary head computes the classes' scores alone, at every position; counting is with the whole head."""
    model, prompt = model_of("llama"), double(fnn.SoftPrompt(P, WIDTH))
    words = fnn.Verbalizer([[3, 5], [7], [11, 2]], VOCABULARY)
    logits = concatenated(model, prompt(), tokens())
    want = fnn.Verbalizer([[3, 5], [7], [11, 2]], VOCABULARY)(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
    before = traces(model)
    handle = fastprompt.attach(model, prompt, outputs=words, head="lm_head")
    assert "output: Verbalizer, in place of lm_head" in repr(handle)
    agree(model(tokens()).logits, want, prompt.parameters())
    last = model(tokens(), logits_to_keep=1).logits
    torch.testing.assert_close(last, want[:, -1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(handle.source_logits(tokens()).logits, logits, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert traces(model) == before
    assert words._head is None
    trained = double(fnn.SoftVerbalizer(3, WIDTH))
    handle = fastprompt.attach(model, outputs=trained, head="lm_head")
    hidden = model.model(tokens()).last_hidden_state
    agree(model(tokens()).logits, trained(hidden.flatten(0, 1)).unflatten(0, logits.shape[:2]), trained.parameters())
    handle.detach()


def test_what_the_ends_refuse():
    model, prompt, labels = model_of("vit"), padded(), label_map()
    before = traces(model)
    for given, options, message in (
        ((), {}, "prompt, outputs: expected at least one of them, got neither"),
        (prompt, {"head": "classifier"}, "head: expected the name of an nn.Linear in the model, for outputs"),
        (prompt, {"outputs": labels, "head": "vit"}, "head: expected the name of an nn.Linear .*, for outputs, got 'vit'"),
        ((), {"outputs": fnn.Verbalizer([[1], [2]], SOURCES)}, "head: expected the name of the vocabulary head"),
        ([prompt, padded()], {}, "prompt: expected prompts of one kind in the model, and one on its input, got PaddedPrompt"),
        ([padded(prompts=2), double(fnn.DeepPrompt(LAYERS, P, WIDTH))], {}, "one prompt on the input besides .*, got 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fastprompt.attach(model, given, **options)
    with pytest.raises(TypeError, match="prompt: expected PrefixKV, DeepPrompt, SoftPrompt, or a prompt on the input such as"):
        fastprompt.attach(model, labels)
    with pytest.raises(TypeError, match=r"outputs: expected a torch\.nn\.Module, got str"):
        fastprompt.attach(model, outputs="labels")
    assert traces(model) == before
    first = fastprompt.attach(model, prompt)
    with pytest.raises(ValueError, match=r"call detach\(\) on its handle first.*got one with PaddedPrompt"):
        fastprompt.attach(model, padded())
    with pytest.raises(ValueError, match="a copy of ViTForImageClassification"):
        copy.deepcopy(model)(pictures())
    first.detach()
    again = fastprompt.attach(model, prompt)
    first.detach()  # once more: not the other's business
    with pytest.raises(ValueError, match=r"call detach\(\) on its handle first"):
        fastprompt.attach(model, prompt)
    again.detach()
    soft = nn.Sequential(nn.Flatten(), nn.Linear(3 * CANVAS**2, SOURCES), nn.Softmax(1)).double()
    handle = fastprompt.attach(soft, prompt, outputs=labels, head="1")
    with pytest.raises(ValueError, match="head: expected the layer whose output the model returns as it is, got '1'"):
        soft(pictures())
    handle.detach()
    assert traces(model) == before
