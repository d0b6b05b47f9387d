"""CLIP's text side against the plain form, all positions of every class by the library's own model, in float64 to 1e-9."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

import fastprompt
from fastprompt import clip as clip_module
from fastprompt.clip import ConditionalPrompts, ContextPrompts, CoupledPrompts, ImageFeatures, ZeroShot, tokenize
from fastprompt.taxonomy import Alignment, Format, Location, Operator, Place
from tests.test_hoist import far_from_uniform

transformers = pytest.importorskip("transformers", reason="needs transformers")

PLACES, WIDTH, VISION, DIM = 20, 32, 24, 16
SOS, EOT, STOP, PAD = 97, 98, 50, 60
NAMES = [[5], [7, 8], [7, 9, 11, 3], [4, 2, 1]]
ONE_LENGTH = [[5, 6], [7, 8], [5, 9]]
ONE_START = [[7, 8], [7, 9, 11], [7, 8, 2, 1]]


@functools.cache
def model_of(eos: int = EOT, layers: tuple[int, int] = (3, 4)) -> transformers.CLIPModel:
    both = {"intermediate_size": 48, "num_attention_heads": 4, "projection_dim": DIM}
    text = {"vocab_size": 99, "hidden_size": WIDTH, "max_position_embeddings": PLACES, "eos_token_id": eos, "bos_token_id": SOS}
    vision = {"hidden_size": VISION, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=both | text | {"num_hidden_layers": layers[0]},
        vision_config=both | vision | {"num_hidden_layers": layers[1]},
        projection_dim=DIM,
    )
    return far_from_uniform(transformers.CLIPModel(config).double().eval().requires_grad_(False))


def ids_of(names: list[list[int]], length: int = 9) -> Tensor:
    """[SOS, name, STOP, EOT, PAD, ...]"""
    rows = [[SOS, *name, STOP, EOT] for name in names]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def image_features(model, batch: int = 3) -> Tensor:
    with torch.no_grad():
        return model.get_image_features(images(batch)).pooler_output


def filled(prompts):
    """With parameters that are not small."""
    for parameter in (parameter for name, parameter in prompts.named_parameters() if not name.startswith("clip.")):
        parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return prompts


def plain(model, names: list[list[int]], context: Tensor, position: str = "end") -> Tensor:
    """The library's own encoder on all positions, with context [C, M, width] where the ids say PAD + 1."""
    length, slot = context.shape[1], PAD + 1
    rows = []
    for name in names:
        slots, half = [slot] * length, length // 2
        middle = {"end": [*slots, *name], "middle": [*slots[:half], *name, *slots[half:]], "front": [*name, *slots]}[position]
        rows.append([SOS, *middle, STOP, EOT])
    ids = torch.tensor([row + [PAD] * (PLACES - len(row)) for row in rows])

    def put(table, args, out):
        out = out.clone()
        out[ids == slot] = context.flatten(0, 1)
        return out

    hook = model.text_model.embeddings.token_embedding.register_forward_hook(put)
    try:
        return model.get_text_features(ids).pooler_output
    finally:
        hook.remove()


def agree(got: Tensor, want: Tensor, parameters) -> None:
    """The same outputs, and gradients of the parameters."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    theirs = torch.autograd.grad(want, parameters, weights, retain_graph=True)
    ours = torch.autograd.grad(got, parameters, weights, retain_graph=True)
    assert parameters
    assert all(gradient.abs().max() > 1e-3 for gradient in theirs)
    for mine, other in zip((got, *ours), (want, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


# ---- Exactness ----


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("names", [NAMES, ONE_LENGTH, ONE_START, NAMES[:1]], ids=["ragged", "even", "one start", "one class"])
@pytest.mark.parametrize("per_class", [False, True], ids=["shared", "per class"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_context_prompts(position, per_class, names, packed, monkeypatch):
    if packed:
        monkeypatch.setattr(clip_module, "_packs", lambda query: True)
    model, length = model_of(), 5
    prompts = filled(ContextPrompts(model, ids_of(names), context=length, position=position, per_class=per_class))
    context = prompts.context if per_class else prompts.context.expand(len(names), -1, -1)
    agree(prompts.features(), plain(model, names, context, position), prompts.parameters())
    if len(names) > 1:  # what all classes begin with
        ahead = {"end": length, "middle": length // 2, "front": 0}[position] * (not per_class)
        same = names is ONE_START and (not per_class or position == "front")
        assert prompts.texts.shared == 1 + ahead + same
        assert prompts.texts.rows == sum(map(len, names)) + len(names) * (3 + length - prompts.texts.shared)


def test_the_older_rule_for_the_end_of_a_text():
    """eos_token_id 2 in a configuration means the largest id; and EOT is the first of several."""
    model = model_of(eos=2)
    prompts = filled(ContextPrompts(model, ids_of(NAMES), context=3))
    agree(prompts.features(), plain(model, NAMES, prompts.context.expand(4, -1, -1)), prompts.parameters())
    ids = ids_of(NAMES)
    ids[:, 7:] = EOT
    for each in (model, model_of()):
        torch.testing.assert_close(ZeroShot(each, ids).features(), each.get_text_features(ids).pooler_output)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"position": "front"}, {"per_class": True}, {"checkpointing": True}], ids=str)
def test_conditional_prompts_are_a_loop_over_images(options, packed, monkeypatch):
    if packed:
        monkeypatch.setattr(clip_module, "_packs", lambda query: True)
    model = model_of()
    prompts = filled(ConditionalPrompts(model, ids_of(NAMES), context=3, hidden=4, **options))
    image = image_features(model)
    context = prompts.context.expand(4, -1, -1)
    shifts = prompts.shift(image / image.norm(dim=1, keepdim=True))
    want = torch.stack([plain(model, NAMES, context + shift, options.get("position", "end")) for shift in shifts])
    agree(prompts.features(image), want, prompts.parameters())
    text, image = want / want.norm(dim=2, keepdim=True), image / image.norm(dim=1, keepdim=True)
    agree(prompts(image), model.logit_scale.exp() * (text @ image[:, :, None])[..., 0], prompts.parameters())


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, (3, 4)), (2, (3, 4)), (3, (3, 4)), (3, (4, 3)), (1, (1, 1))], ids=lambda value: str(value)
)
def test_coupled_prompts_are_rows_that_are_replaced(depth, layers):
    model, length = model_of(layers=layers), 2
    prompts = filled(CoupledPrompts(model, ids_of(NAMES), context=length, depth=depth))

    def text(place, block, args):
        return (torch.cat([args[0][:, :1], prompts.prompt[place].expand(4, -1, -1), args[0][:, 1 + length :]], 1), *args[1:])

    def vision(place, block, args):
        x = args[0] if place == 0 else args[0][:, :-length]
        return (torch.cat([x, prompts.maps[place](prompts.prompt[place]).expand(len(x), -1, -1)], 1), *args[1:])

    hooks = []
    for place in range(depth):
        if place:
            block = model.text_model.encoder.layers[place]
            hooks.append(block.register_forward_pre_hook(functools.partial(text, place)))
        block = model.vision_model.encoder.layers[place]
        hooks.append(block.register_forward_pre_hook(functools.partial(vision, place)))
    texts = plain(model, NAMES, prompts.prompt[0].expand(4, -1, -1))
    seen = model.get_image_features(images()).pooler_output
    for hook in hooks:
        hook.remove()
    agree(prompts.features(), texts, [prompts.prompt])
    agree(ImageFeatures(model, prompts)(images()), seen, [prompts.prompt, *prompts.maps.parameters()])
    logits = torch.nn.functional.cosine_similarity(seen[:, None], texts, dim=2) * model.logit_scale.exp()
    whole = fastprompt.Reprogrammed(ImageFeatures(model, prompts), outputs=prompts)
    agree(whole(images()), logits, prompts.parameters())


def test_zero_shot_and_templates():
    model, ids = model_of(), ids_of(NAMES)
    read = fastprompt.Reprogrammed(ImageFeatures(model), outputs=ZeroShot(model, ids))
    want = model(input_ids=ids, pixel_values=images()).logits_per_image
    torch.testing.assert_close(read(images()), want, rtol=1e-9, atol=1e-9)
    several = torch.stack([ids, ids_of([[33, *name] for name in NAMES]), ids_of([[*name, 12] for name in NAMES])])
    each = model.get_text_features(several.flatten(0, 1)).pooler_output
    want = (each / each.norm(dim=1, keepdim=True)).unflatten(0, (3, 4)).mean(0)
    torch.testing.assert_close(ZeroShot(model, several).features(), want, rtol=1e-9, atol=1e-9)
    side = transformers.CLIPTextModelWithProjection(model.config.text_config).double().eval()
    alone = ZeroShot(side, ids)
    torch.testing.assert_close(alone.features(), side(ids).text_embeds, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="clip: expected a model with a logit_scale"):
        alone(torch.zeros(1, DIM))


# ---- Use ----


def test_features_are_kept_and_never_stale(monkeypatch):
    model = copy.deepcopy(model_of())
    prompts, ids = filled(ContextPrompts(model, ids_of(NAMES), context=3)), ids_of(NAMES)
    runs = []
    encode = ContextPrompts._encode
    monkeypatch.setattr(ContextPrompts, "_encode", lambda self, text: runs.append(1) or encode(self, text))

    def made_again(times: int) -> bool:
        runs.clear()
        with torch.no_grad():
            got = [prompts.features() for _ in range(3)]
        with torch.inference_mode():
            prompts.features()
        assert len(runs) == times
        fresh = encode(prompts, clip_module._text(model))
        return all(torch.equal(each, fresh) for each in got)

    assert made_again(1)
    assert prompts.features().requires_grad  # a training step sees no kept ones
    assert made_again(0)
    optimizer = torch.optim.Adam([prompts.context])
    for change in (
        lambda: (prompts.features().sum().backward(), optimizer.step()),
        lambda: prompts.load_state_dict({"context": torch.randn(3, WIDTH)}),
        lambda: model.text_model.encoder.layers[1].mlp.fc1.weight.mul_(1.5),
        lambda: setattr(model.text_model.final_layer_norm, "weight", torch.nn.Parameter(torch.full((WIDTH,), 2.0).double())),
        lambda: setattr(prompts, "context", torch.nn.Parameter(torch.ones(3, WIDTH, dtype=torch.float64))),
        lambda: setattr(prompts.context, "data", torch.randn(3, WIDTH, dtype=torch.float64)),
    ):
        with torch.set_grad_enabled("backward" in change.__code__.co_names):
            change()
        assert made_again(1)
    model.vision_model.post_layernorm.weight.data.mul_(2)
    assert made_again(0)
    # Nothing in the texts trains, so a visual prompt's steps read what is kept; also what inference mode has made.
    fixed = ZeroShot(model, ids)
    with torch.inference_mode():
        fixed.features()
    image = image_features(model).requires_grad_()
    fixed(image).square().sum().backward()
    assert image.grad.abs().max() > 0
    assert fixed.features() is fixed.features()
    assert copy.deepcopy(fixed)._kept is None


def test_it_trains_saves_and_loads(tmp_path):
    model = copy.deepcopy(model_of(layers=(2, 2))).float().train()
    torch.manual_seed(0)
    for kind, state in (
        (ContextPrompts, {"context"}),
        (ConditionalPrompts, {"context", "shift.0.weight", "shift.0.bias", "shift.2.weight", "shift.2.bias"}),
        (CoupledPrompts, {"prompt", *(f"maps.{place}.{name}" for place in (0, 1) for name in ("weight", "bias"))}),
        (ZeroShot, set()),
    ):
        options = {} if kind is ZeroShot else {"context": 2}
        options |= {"depth": 2} if kind is CoupledPrompts else {}
        prompts = kind(model, ids_of(NAMES), **options)
        assert set(prompts.state_dict()) == state
        for each in (prompts, ImageFeatures(model)):
            assert each.train().training
            assert not any(part.training for part in model.modules())
        f = ImageFeatures(model, prompts if kind is CoupledPrompts else None)
        whole = fastprompt.Reprogrammed(f, outputs=prompts)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x, y = images(12).float(), torch.arange(12) % 4
        rows = fastprompt.fit(whole, (x, y), epochs=15, lr=0.05, batch_size=6, progress=False)
        assert kind is ZeroShot or rows[-1]["loss"] < 0.8 * rows[0]["loss"]
        assert not any(part.training for part in model.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        whole.save_pretrained(tmp_path / kind.__name__)
        again = kind(model, ids_of(NAMES), **options)
        twin = ImageFeatures(model, again if kind is CoupledPrompts else None)
        loaded = fastprompt.Reprogrammed.from_pretrained(tmp_path / kind.__name__, twin, outputs=again)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(x), whole.eval()(x))
            other = copy.deepcopy(whole)
            for parameter in other.trainable_parameters():
                parameter.add_(1)
            assert torch.equal(loaded(x), whole(x))
            assert kind is ZeroShot or not torch.equal(other(x), whole(x))


@pytest.mark.parametrize("kind", [ContextPrompts, ConditionalPrompts, CoupledPrompts])
def test_half_weights_autocast_and_compile(kind):
    options = {"depth": 2} if kind is CoupledPrompts else {}
    exact = filled(kind(model_of(), ids_of(NAMES), context=3, **options))
    image = image_features(model_of())
    want = exact(image)
    gradients = torch.autograd.grad(want.square().sum(), list(exact._own())[:1])

    def near(prompts, image, bound: float) -> None:
        got = prompts(image)
        assert got.dtype == torch.float32
        found = torch.autograd.grad(got.square().sum(), list(prompts._own())[:1])
        for mine, other in zip((got, *found), (want, *gradients), strict=True):
            assert (mine - other).abs().max() < bound * other.abs().max()

    single = copy.deepcopy(exact).float()
    near(single, image.float(), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        near(single, image.float(), 0.1)
    half = kind(copy.deepcopy(model_of()).bfloat16(), ids_of(NAMES), context=3, **options)
    half.load_state_dict(single.state_dict())
    assert half.features(image).dtype == torch.bfloat16 if kind is ConditionalPrompts else True
    near(half, image.bfloat16(), 0.1)


@pytest.mark.parametrize("kind", [ContextPrompts, pytest.param(ConditionalPrompts, marks=pytest.mark.slow)])
def test_compiled(kind):
    model = copy.deepcopy(model_of(layers=(2, 1))).float()
    image = image_features(model_of()).float()
    prompts = filled(kind(model, ids_of(NAMES), context=3))
    compiled = torch.compile(prompts, fullgraph=True, backend="aot_eager")
    want, got = prompts(image), compiled(image)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), prompts.context)[0] for out in (got, want)))


def test_checkpointing_gives_the_same_and_keeps_less():
    model, kept = model_of(), []
    for again in (False, True):
        prompts = filled(ContextPrompts(model, ids_of(NAMES), context=3, checkpointing=again))
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = prompts.features()
        kept.append((count, out, torch.autograd.grad(out.square().sum(), prompts.context)[0]))
    (more, *want), (less, *got) = kept
    assert less < more / 3
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_names_and_tokenizers():
    tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")
    words = {"<s>": SOS, "</s>": EOT, "<pad>": PAD, ".": STOP, "cat": 5, "red": 7, "panda": 8, "a": 20, "photo": 21, "of": 22}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $0 </s>", None, [("<s>", SOS), ("</s>", EOT)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    names = ["cat", "red panda"]
    assert torch.equal(tokenize(tokenizer, names), ids_of([[5], [7, 8]], 5))

    def of_open_clip(texts):  # [texts, context length], zeros behind EOT
        rows = [made.encode(text).ids for text in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    model = model_of()
    prompts = ContextPrompts.from_names(model, tokenizer, names, context="a photo of a")
    table = model.text_model.embeddings.token_embedding.weight
    assert torch.equal(prompts.context, table[[20, 21, 22, 20]])
    said = ["a photo of a {}."]
    for each in (tokenizer, of_open_clip):
        plainly = ZeroShot.from_names(model, each, names, template=said)
        torch.testing.assert_close(plainly.features(), prompts.features().detach(), rtol=1e-9, atol=1e-9)
    assert tokenize(of_open_clip, names, ["{}.", "a {}."]).shape == (2, 2, 12)
    assert ConditionalPrompts.from_names(model, tokenizer, names, context="a photo", hidden=3).context.shape == (2, WIDTH)
    assert CoupledPrompts.from_names(model, tokenizer, names, context="a photo", depth=2).prompt.shape == (2, 2, WIDTH)
    with pytest.raises(ValueError, match="names, template: expected a list of at least one name"):
        tokenize(tokenizer, "cat")
    with pytest.raises(TypeError, match="tokenizer: expected one that gives ids"):
        tokenize(lambda texts: [[1]], names)


def test_places_of_the_taxonomy():
    model, ids = model_of(), ids_of(NAMES)
    trained = (Format.LEARNABLE, Operator.CONCATENATIVE, Alignment.IDENTITY)
    for prompts, location in (
        (ContextPrompts(model, ids, context=2), Location.EMBEDDING),
        (ConditionalPrompts(model, ids), Location.EMBEDDING),
        (CoupledPrompts(model, ids, depth=2), Location.HIDDEN),
    ):
        assert prompts.taxonomy == Place(trained[0], location, *trained[1:])
    assert ZeroShot(model, ids).taxonomy == Place(Format.FIXED, Location.RAW, *trained[1:])


# ---- Bad input ----


def test_what_is_refused():
    model, ids = model_of(), ids_of(NAMES)
    open_end = ids.clone()
    open_end[2, open_end[2] == EOT] = PAD
    other = ids.clone()
    other[1, 0] = 3
    for given, options, message in (
        (ids, {"context": 15}, "tokens: expected context and name in at most the 20 positions of the model, got 22 tokens"),
        (open_end, {}, r"tokens: expected texts with an end-of-text token \(id 98\) behind the first, got none in text 2"),
        (other, {"context": 2}, "tokens: expected texts that begin with the same start-of-text token"),
        (ids + 5, {}, "tokens: expected values from 0 to 98"),
        (ids[0], {}, r"tokens: expected \[C, L\] for at least one class"),
        (ids[:0], {}, r"tokens: expected \[C, L\] for at least one class"),
        (ids.float(), {}, "tokens: expected int64"),
        (ids, {"context": torch.zeros(3, 31)}, r"context: expected embeddings \[M, 32\]"),
        (ids, {"context": torch.tensor([3, 99])}, "context: expected values from 0 to 98"),
        (ids, {"context": 0}, "context: expected at least 1 token"),
        (ids, {"position": "back"}, "position: expected one of end, middle, front"),
        (ids, {"ending": 3}, "ending: expected 0 to 2"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ContextPrompts(model, given, **options)
    with pytest.raises(ValueError, match=r"tokens: expected texts with an end-of-text token \(their largest id\)"):
        ContextPrompts(model_of(eos=2), torch.tensor([[SOS, 5, 6]]))
    with pytest.raises(ValueError, match="depth: expected 1 to 3, the blocks of both sides, got 4"):
        CoupledPrompts(model, ids, depth=4)
    with pytest.raises(ValueError, match="hidden: expected at least 1"):
        ConditionalPrompts(model, ids, hidden=0)
    with pytest.raises(TypeError, match="prompts: expected CoupledPrompts, got ContextPrompts"):
        ImageFeatures(model, ContextPrompts(model, ids, context=2))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    bert = transformers.BertModel(transformers.BertConfig(**small))
    siglip = transformers.SiglipTextModel(transformers.SiglipTextConfig(**small))
    for wrong in (bert, siglip, model.text_model, torch.nn.Linear(2, 2)):
        for kind in (ContextPrompts, ZeroShot):
            with pytest.raises(TypeError, match="clip: expected"):
                kind(wrong, ids)
    with pytest.raises(TypeError, match="clip: expected a CLIP of transformers or open_clip with an image side"):
        ImageFeatures(bert)
    with pytest.raises(TypeError, match="clip: expected a CLIP whose vision side is a transformer"):
        CoupledPrompts(transformers.CLIPTextModelWithProjection(model.config.text_config), ids, depth=1)
    for prompts in (ContextPrompts(model, ids, context=2), ConditionalPrompts(model, ids)):
        assert prompts(torch.zeros(0, 16, dtype=torch.float64)).shape == (0, 4)
        for features, message in (
            (torch.zeros(3), r"image_features: expected floating point \[B, d\]"),
            (torch.zeros(3, 16, dtype=torch.int64), "image_features: expected floating point"),
            (torch.zeros(3, 15), r"image_features: expected \[B, 16\] like the text features, got \[3, 15\]"),
        ):
            with pytest.raises(ValueError, match=message):
                prompts(features)
