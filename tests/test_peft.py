"""PEFT models accelerated: PEFT's own logits, loss, gradients and texts; and its files, both ways."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import sys

import pytest
import safetensors.torch
import torch

import fastprompt
from fastprompt import nn as fnn
from fastprompt.checkpoint import CheckpointError
from fastprompt.hoist import Inexact, hoist, prefixed
from fastprompt.integrations.peft import accelerate, load_peft, save_peft
from tests.test_attach import model_of
from tests.test_hoist import HEADS, LAYERS, WIDTH, B, P, T, ahead, bert, frozen, padding, tokens

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

KINDS = {
    "prompt": lambda **o: peft.PromptTuningConfig(num_virtual_tokens=P, **o),
    "p-tuning": lambda **o: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=6, **o),
    "prefix": lambda **o: peft.PrefixTuningConfig(num_virtual_tokens=P, **o),
    "projected prefix": lambda **o: peft.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=6, **o
    ),
    "cartridge": lambda **o: peft.CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=2, **o),
}


def loss_function(logits, labels, vocab_size, **others) -> torch.Tensor:
    """The library's own, which rounds to float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def adapted(base, kind: str, task: str = "CAUSAL_LM", **options):
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), KINDS[kind](task_type=task, **options)).double()
    if task == "CAUSAL_LM":
        model.get_base_model().loss_function = loss_function
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_(std=0.7)
    return model.eval()


@functools.cache
def causal(name: str, kind: str):
    return adapted(model_of(name), kind)


def labels() -> torch.Tensor:
    return torch.where(tokens() % 5 == 0, -100, tokens())


def results(model, **inputs) -> list[torch.Tensor]:
    out = model(tokens(), **inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    return [out.logits, out.loss, *torch.autograd.grad(out.loss + out.logits.square().mean(), trained)]


if not hasattr(peft, "CartridgeConfig"):  # since PEFT 0.19
    del KINDS["cartridge"]
ALL = list(itertools.product(("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM", "OPTForCausalLM"), KINDS))
QUICK = [(name, kind) for name, kind in ALL if name == "LlamaForCausalLM" or kind in ("prompt", "prefix")]


@pytest.mark.parametrize(
    ("name", "kind"), [each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow) for each in ALL]
)
def test_accelerated_is_peft(name, kind):
    model = causal(name, kind)
    for side in (None, "left", "right"):
        mask = padding(side)
        inputs = {"attention_mask": mask, "labels": labels() if mask is None else torch.where(mask.bool(), labels(), -100)}
        want = results(model, **inputs)
        fast = accelerate(model)
        got = results(model, **inputs)
        assert f"accelerated: default: {model.peft_config['default'].peft_type.value}" in repr(fast)
        fast.restore()
        if mask is not None:  # what padding says is nobody's, and with it the mean square of all logits
            seen = (ahead(mask) if got[0].shape[1] > T else mask).bool()
            torch.testing.assert_close(got[0][seen], want[0][seen], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-9)
            continue
        for one, other in zip(got, want, strict=True):
            assert other.abs().max() > 1e-3
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not {"forward", "generate"} & set(vars(model))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_gradients_under_padding(kind):
    model = causal("LlamaForCausalLM", kind)
    mask = padding("left")
    inputs = {"attention_mask": mask, "labels": torch.where(mask.bool(), labels(), -100)}
    trained = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(tokens(), **inputs).loss, trained)
    fast = accelerate(model, logits="own")
    out = model(tokens(), **inputs)
    assert out.logits.shape[1] == T
    for one, other in zip(torch.autograd.grad(out.loss, trained), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    fast.restore()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_head_for_labelled_rows_alone(kind):
    """The loss and gradients of all rows; also with a label for the first token, with a label in one sample alone, with none."""
    model, heads = causal("LlamaForCausalLM", kind), []
    trained = [p for p in model.parameters() if p.requires_grad]
    head = model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape[:-1].numel()))
    few = torch.full((B, T), -100)
    few[1, 3], few[2, 0], few[2, T - 1] = 5, 6, 7
    for targets in (labels(), few, few[:, [3, 3, 1, 2, 3, 4, 4]]):
        want = model(tokens(), labels=targets)
        fast = accelerate(model, logits="labelled")
        heads.clear()
        got = model(tokens(), labels=targets)
        there = (targets[:, 1:] != -100).sum() + (kind == "prompt") * (targets[:, 0] != -100).sum()
        assert got.logits.shape == (there, want.logits.shape[2])
        assert sum(heads) <= there + 2
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-9)
        for one, other in zip(*(torch.autograd.grad(out.loss, trained) for out in (got, want)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert model(tokens()).logits.shape[:2] == (B, T)
        fast.restore()
    assert model(tokens(), labels=targets * 0 - 100).loss.isnan()
    fast = accelerate(model, logits="labelled")
    assert model(tokens(), labels=targets * 0 - 100).loss.isnan()
    fast.restore()
    head.remove()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_prefixes_of_an_encoder(task):
    kind = {"SEQ_CLS": "BertForSequenceClassification", "TOKEN_CLS": "BertForTokenClassification"}[task]
    base = frozen(lambda: getattr(transformers, kind)(bert().config))
    model, mask = adapted(base, "prefix", task), padding("right")
    classes = tokens()[:, 0] % 2 if task == "SEQ_CLS" else tokens() % 2
    want = results(model, attention_mask=mask, labels=classes)
    fast = accelerate(model)
    for one, other in zip(results(model, attention_mask=mask, labels=classes), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    fast.restore()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_and_switching_off(kind):
    model = causal("LlamaForCausalLM", kind)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    want = model.generate(**inputs, **settings)
    with model.disable_adapter():
        off, bare = model(tokens()).logits, model.generate(**inputs, **settings)
    fast = accelerate(model)
    assert torch.equal(model.generate(**inputs, **settings), want)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), want)  # PEFT raises
    assert torch.equal(model.generate(**inputs, **settings, num_beams=1, num_return_sequences=1), want)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()).logits, off, rtol=1e-9, atol=1e-9)
        assert torch.equal(model.generate(**inputs, **settings), bare)
    assert torch.equal(model.generate(**inputs, **settings), want)
    fast.restore()
    assert not torch.equal(bare, want)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_every_sample_its_own_adapter(kind):
    """What PEFT ignores: adapter_names."""
    model = adapted(model_of("LlamaForCausalLM"), kind)
    model.add_adapter("other", KINDS[kind](task_type="CAUSAL_LM"))
    model.double().eval()
    model.prompt_encoder["other"].embedding.weight.data.normal_()
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        model.prompt_encoder[name].embedding.weight.requires_grad_(True)  # switching takes it from the others
        alone.append(model(tokens()).logits)
    for name in ("default", "other"):
        model.prompt_encoder[name].embedding.weight.requires_grad_(True)
    fast = accelerate(model)
    mixed = model(tokens(), adapter_names=["other", "default", "other"]).logits
    apart = torch.stack([alone[1][0], alone[0][1], alone[1][2]])
    torch.testing.assert_close(mixed, apart, rtol=1e-9, atol=1e-9)
    both = [model.prompt_encoder[name].embedding.weight for name in ("default", "other")]
    for one, other in zip(*(torch.autograd.grad(out.square().mean(), both) for out in (mixed, apart)), strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = model.generate(tokens(), adapter_names=["other", "default", "other"], num_beams=2, **settings)
    model.set_adapter("default")
    assert torch.equal(texts[1], model.generate(tokens(), num_beams=2, **settings)[1])
    with pytest.raises(ValueError, match="adapter_names: expected one for each of the 3 samples, got 1"):
        model(tokens(), adapter_names=["other"])
    with pytest.raises(ValueError, match="adapter_names: expected adapters of one kind among default, other"):
        model(tokens(), adapter_names=["other", "third", "other"])
    fast.restore()


def test_every_sample_its_own_task():
    """Multitask prompt tuning: a prompt is made for each task of the batch, not for each sample."""
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=4, num_ranks=2, prompt_tuning_init="RANDOM"
    )
    model = peft.get_peft_model(copy.deepcopy(model_of("LlamaForCausalLM")), config).double().eval()
    model.get_base_model().loss_function = loss_function
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_()
    inputs = {"task_ids": torch.tensor([3, 1, 3]), "labels": labels()}
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "task_ids": inputs["task_ids"]}
    want, text = results(model, **inputs), model.generate(input_ids=tokens(), **settings)
    fast = accelerate(model)
    for one, other in zip(results(model, **inputs), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(input_ids=tokens(), **settings), text)
    with pytest.raises(ValueError, match=r"task_ids: expected int64 \[3\], each sample's task, got None"):
        model(tokens())
    fast.restore()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_given_positions_and_packed_sequences(kind):
    """PEFT drops both for prompts: a warning, and other logits."""
    model = causal("LlamaForCausalLM", kind)
    lengths = (4, 2, 1)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = tokens()[:1]
    fast = accelerate(model, logits="own")
    packed = model(ids, position_ids=places, use_cache=False).logits[0]
    alone = [model(each[None]).logits[0] for each in ids[0].split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-9)
    moved = model(ids[:, 2:], position_ids=torch.arange(2, T)[None]).logits
    far = fast.restore()(ids[:, 2:]).logits[:, -T + 2 :]
    assert (moved - far).abs().max() > 1e-3  # as far behind the prompt as the positions say
    fast = accelerate(model, logits="own")
    hole = model(tokens(), attention_mask=(torch.arange(T) > 1).long().expand(B, T)).logits[:1, 2:]
    torch.testing.assert_close(moved, hole, rtol=1e-9, atol=1e-9)
    fast.restore()


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(kind):
    model = adapted(model_of("LlamaForCausalLM"), kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    fast = accelerate(model)
    want = model(tokens(), labels=labels(), use_cache=False)
    got = torch.compile(model, fullgraph=True, backend="eager")(tokens(), labels=labels(), use_cache=False)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-9)
    for one, other in zip(*(torch.autograd.grad(out.loss, trained) for out in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    fast.restore()


@pytest.mark.parametrize("kind", ["prompt", "prefix", "cartridge"])
def test_training_goes_on_from_a_saved_adapter(kind, tmp_path):
    """PEFT refuses to load one as trainable. One step more gives what PEFT's own model gives that was never saved."""
    if kind not in KINDS:
        pytest.skip("this PEFT has no cartridges")
    model, base = adapted(model_of("LlamaForCausalLM"), kind), copy.deepcopy(model_of("LlamaForCausalLM"))
    base.loss_function = loss_function
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    targets = labels()
    targets[:, 0] = -100  # PEFT has the prompt say the first token, `attach` not
    prompt, config = load_peft(tmp_path)
    handle = fastprompt.attach(base, prompt)
    for each, parameters in ((model, [p for p in model.parameters() if p.requires_grad]), (base, list(handle.parameters()))):
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(tokens(), labels=targets).loss.backward()
            optimizer.step()
    handle.detach()
    save_peft(tmp_path / "after", prompt, config)
    model.save_pretrained(tmp_path / "theirs")
    after, theirs = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("after", "theirs"))
    before = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(after, theirs, rtol=1e-9, atol=1e-9)
    moved = (after["prompt_embeddings"] - before["prompt_embeddings"]).abs().amax(1) > 1e-3
    assert moved.tolist() == [kind != "cartridge"] * 2 + [True] * (P - 2)  # sinks stay


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_gradient_checkpointing(kind):
    """With a prefix PEFT raises."""
    model = adapted(model_of("LlamaForCausalLM"), kind)
    want = results(model, labels=labels())
    fast = accelerate(model)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    for one, other in zip(results(model, labels=labels()), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    fast.restore()
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_what_accelerate_refuses():
    llama, gpt2 = model_of("LlamaForCausalLM"), copy.deepcopy(model_of("GPT2LMHeadModel"))
    with pytest.raises(TypeError, match="peft_model: expected a model of peft, got LlamaForCausalLM"):
        accelerate(llama)
    lora = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(Inexact, match="got default of type LORA"):
        accelerate(lora)
    classifier = frozen(lambda: transformers.BertForSequenceClassification(bert().config))
    with pytest.raises(Inexact, match=r"PROMPT_TUNING for CAUSAL_LM, got default for SEQ_CLS; elsewhere"):
        accelerate(adapted(classifier, "prompt", "SEQ_CLS"))
    shape = {"num_layers": LAYERS, "num_attention_heads": 2, "token_dim": 2 * WIDTH // HEADS}
    for wrong in ({"num_layers": 2}, {"num_attention_heads": 4}, {"token_dim": 8}):
        other = adapted(llama, "prefix", **shape)
        vars(other.peft_config["default"]).update(wrong)
        with pytest.raises(
            ValueError, match=r"an adapter of this LlamaForCausalLM \(layers, heads of keys and their width \(3, 2, 8\)\)"
        ):
            accelerate(other)
    other = adapted(llama, "prompt")
    other.peft_config["default"].token_dim = 16
    with pytest.raises(ValueError, match=r"an adapter of this LlamaForCausalLM \(token_dim \(32,\)\), got default with \(16,\)"):
        accelerate(other)
    model = causal("LlamaForCausalLM", "prompt")
    with pytest.raises(ValueError, match="logits: expected one of all, own, labelled, got 'none'"):
        accelerate(model, logits="none")
    fast = accelerate(model)
    with pytest.raises(ValueError, match=r"for copying; call restore\(\) first"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"call restore\(\) first"):
        accelerate(model)
    with pytest.raises(ValueError, match="output_hidden_states: expected False"):
        model(tokens(), output_hidden_states=True)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 with labels, got 1"):
        model(tokens(), labels=labels(), logits_to_keep=1)
    assert model(tokens(), logits_to_keep=2).logits.shape[1] == 2
    assert isinstance(model(tokens(), return_dict=False), tuple)
    fast.restore()
    for part in gpt2.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    dropping = adapted(gpt2, "prompt").train()
    fast = accelerate(dropping)
    with pytest.raises(Inexact, match="dropout"):
        dropping(tokens())
    dropping.get_base_model().eval()
    dropping(tokens())
    fast.restore()


# ---- Files ----


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways(kind, tmp_path):
    """Byte for byte; the same logits in PEFT and here; heads of keys counted as PEFT does."""
    model = adapted(model_of("LlamaForCausalLM"), kind).float()
    model.save_pretrained(tmp_path / "theirs")
    prompt, config = load_peft(tmp_path / "theirs")
    assert prompt.length == P
    if isinstance(prompt, fnn.PrefixKV):
        assert (prompt.layers, prompt.kv_heads, prompt.head_dim) == (LAYERS, 2, WIDTH // HEADS)
        assert (config["token_dim"], config["num_attention_heads"]) == (2 * WIDTH // HEADS, 2)
        assert prompt.frozen == (2 if kind == "cartridge" else 0)
    save_peft(tmp_path / "ours", prompt, config)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    base = copy.deepcopy(model_of("LlamaForCausalLM")).float()
    with torch.no_grad():
        want = model(tokens()).logits[:, -T:]
        kv = prompt() if isinstance(prompt, fnn.PrefixKV) else hoist(base, prompt())
        with prefixed(base, kv):
            torch.testing.assert_close(base(tokens()).logits, want, rtol=1e-4, atol=1e-4)
        save_peft(tmp_path / "new", prompt)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "new").eval()
        torch.testing.assert_close(theirs(tokens()).logits[:, -T:], want, rtol=1e-4, atol=1e-4)
    saved = safetensors.torch.load_file(tmp_path / "new" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"])


def test_folders_that_are_refused(tmp_path, monkeypatch):
    prompt = fnn.SoftPrompt(P, WIDTH)
    save_peft(tmp_path, prompt)
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    load_peft(tmp_path)

    def refused(message: str, **changes) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(CheckpointError, match=message):
            load_peft(tmp_path)

    refused("expected peft_type PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CARTRIDGE, got 'LORA'", peft_type="LORA")
    refused(r"peft_type .*, got \['x'\]", peft_type=["x"])
    (tmp_path / "hostile.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    refused("names a class to import", auto_mapping={"base_model_class": "system", "parent_library": "hostile"})
    assert "hostile" not in sys.modules
    refused("no encoder-decoder", num_transformer_submodules=2)
    refused("no modules_to_save", modules_to_save=["score"])
    refused("num_virtual_tokens as a positive number, got '5'", num_virtual_tokens="5")
    refused("token_dim as a positive number, got 0", token_dim=0)
    refused(r"expected prompt_embeddings \[5, 16\], got \[5, 32\]", token_dim=16)
    refused("num_layers as a positive number, got None", peft_type="PREFIX_TUNING")
    refused("token_dim as a multiple of num_attention_heads", peft_type="PREFIX_TUNING", num_layers=1, num_attention_heads=5)
    shape = {"num_layers": 1, "num_attention_heads": 2, "token_dim": WIDTH // 2}
    for sinks in (P, -1, None, True):
        refused("num_frozen_tokens from 0 to 4", peft_type="CARTRIDGE", num_frozen_tokens=sinks, **shape)
    config, payload = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    for text, message in (
        ("[]", "a JSON object, got list"),
        ("{", "expected JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 9999, "JSON"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_peft(tmp_path)
    config.write_text(json.dumps(good))
    whole = payload.read_bytes()
    for data, message in (
        (whole[:-3], "a safetensors file"),
        (b"\x80\x04K\x01.", "a safetensors file"),
        (b"", "a safetensors file"),
    ):
        payload.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load_peft(tmp_path)
    safetensors.torch.save_file({"prompt_embeddings": prompt().detach()[0], "score.weight": torch.ones(2)}, payload)
    with pytest.raises(CheckpointError, match="alone, got"):
        load_peft(tmp_path)
    payload.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle, which is never read"):
        load_peft(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a JSON file of at most 1 MB, got none"):
        load_peft(tmp_path)
    with pytest.raises(CheckpointError, match="got no folder"):
        load_peft(tmp_path / "nowhere")


def test_adapters_of_another_model(tmp_path):
    """What is loaded says what does not fit when it is attached."""
    model = model_of("LlamaForCausalLM")
    for prompt, message in (
        (fnn.SoftPrompt(P, 16), f"width={WIDTH} for LlamaForCausalLM, got 16"),
        (fnn.PrefixKV(2, 2, P, 8), f"layers={LAYERS} for LlamaForCausalLM, got 2"),
        (fnn.PrefixKV(LAYERS, 4, P, 8), "kv_heads=2 for LlamaForCausalLM, got 4"),
    ):
        save_peft(tmp_path, prompt)
        with pytest.raises(ValueError, match=message):
            fastprompt.attach(model, load_peft(tmp_path)[0])
    with pytest.raises(ValueError, match="prompts of one kind"):
        fastprompt.attach(model, [load_peft(tmp_path)[0], fnn.SoftPrompt(P, WIDTH)])


def test_what_cannot_be_saved(tmp_path):
    prefix = fnn.PrefixKV(2, 2, P, 8)
    with pytest.raises(TypeError, match="prompt: expected a SoftPrompt or PrefixKV, got DeepPrompt"):
        save_peft(tmp_path, fnn.DeepPrompt(2, P, 8))
    with pytest.raises(ValueError, match="prompt: expected one prompt, as an adapter of PEFT holds, got 2"):
        save_peft(tmp_path, fnn.SoftPrompt(P, 8, prompts=2))
    save_peft(tmp_path, prefix)
    _, config = load_peft(tmp_path)
    with pytest.raises(ValueError, match="config: expected that of this prompt"):
        save_peft(tmp_path, fnn.PrefixKV(3, 2, P, 8), config)
    with pytest.raises(ValueError, match="config: expected that of this prompt"):
        save_peft(tmp_path, fnn.SoftPrompt(P, 16), config)
    assert torch.equal(load_peft(tmp_path)[0].stacked(), prefix.stacked())
    sunk = fnn.PrefixKV(2, 2, P, 8, frozen=1)
    with pytest.raises(ValueError, match=r"config: expected that of this prompt.*num_frozen_tokens"):
        save_peft(tmp_path, sunk, config)
    save_peft(tmp_path, sunk)
    again, config = load_peft(tmp_path)
    assert (again.frozen, config["peft_type"]) == (1, "CARTRIDGE")
    assert torch.equal(again.stacked(), sunk.stacked())
