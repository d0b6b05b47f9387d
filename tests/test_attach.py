"""Prompts attached to models by others: the outputs and gradients of token concatenation, or of a plain cache.

Float64 to 1e-9 on small models of transformers' own classes with random weights, unpadded, right- and left-padded.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

import fastprompt
from fastprompt import nn as fnn
from fastprompt.hoist import Inexact, hoist_deep
from tests.test_hoist import (
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    B,
    P,
    T,
    ahead,
    cached,
    concatenated,
    deep_by_tokens,
    double,
    frozen,
    images,
    own,
    padding,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}  # others compute in float32
CAUSAL = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 6},
    "Qwen3ForCausalLM": {**GROUPED, "sliding_window": 4, "use_sliding_window": True, "layer_types": KINDS},
    "Gemma3ForCausalLM": {**GROUPED, "sliding_window": 7, "layer_types": KINDS, "query_pre_attn_scalar": 16},
    "GPT2LMHeadModel": {"bos_token_id": 0, "eos_token_id": None},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "pad_token_id": 1},
    "Gemma2ForCausalLM": {
        **GROUPED, "sliding_window": 7, "layer_types": KINDS, "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",  # older ones take PyTorch's, which leaves the cap out
    },
    "GptOssForCausalLM": {**GROUPED, "sliding_window": 7, "layer_types": KINDS, **EXPERTS, "num_local_experts": 3},
    "MoshiForCausalLM": {**GROUPED, "ffn_dim": 64, "sliding_window": 6},  # a setting that its masks do not read
    "DeepseekV3ForCausalLM": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": HEADS, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, **EXPERTS,
    },
}  # fmt: skip
ENCODERS = {"BertModel": {}, "RobertaModel": {"pad_token_id": 1}}
PICTURES = {"image_size": 8, "patch_size": 4}


class Norm(nn.Module):
    """A root mean square norm that stays in float64; the library's own compute in float32."""

    def __init__(self, weight: Tensor, eps: float, shift: int) -> None:
        super().__init__()
        self.weight, self.eps, self.shift = weight, eps, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.shift)


@functools.cache
def model_of(name: str):
    """One model of a class for all tests: each has to leave it as it was."""
    kind = getattr(transformers, name)
    settings = (CAUSAL | ENCODERS | OTHERS)[name]
    plain = (
        {}
        if name in OTHERS
        else {k: v for k, v in SIZES.items() if not (k == "intermediate_size" and name.startswith(("GPT", "OPT", "Moshi")))}
    )

    def make():
        built = kind(kind.config_class(**(plain | settings)))
        for place, part in list(built.named_modules()):
            if type(part).__name__.endswith("RMSNorm"):
                eps = getattr(part, "variance_epsilon", None) or part.eps
                built.set_submodule(place, Norm(part.weight, eps, int(name.startswith("Gemma"))))
        return built

    return frozen(make)


OTHERS = {
    "ViTModel": {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")} | PICTURES,
    "CLIPTextModel": {**SIZES, "eos_token_id": 2},
    "WhisperModel": {
        "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 2, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
        "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0, "decoder_start_token_id": 1,
    },
    "T5Model": {"d_model": WIDTH, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "d_kv": 8, "vocab_size": VOCABULARY},
}  # fmt: skip
OTHERS |= {"DeiTModel": OTHERS["ViTModel"], "CLIPVisionModel": OTHERS["ViTModel"]}


def prefix_of(model, **options) -> fnn.PrefixKV:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return double(fnn.PrefixKV(LAYERS, heads, options.pop("length", P), width, **options), 0.5)


def words(least: int = 2) -> Tensor:
    return tokens().clamp(min=least)


def agree(got: Tensor, want: Tensor, prompt, mask: Tensor | None = None, close: float = 1e-9) -> None:
    """Outputs at the samples' tokens, and gradients of everything that `prompt` trains."""
    seen = slice(None) if mask is None else mask.bool()
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[seen]
    torch.testing.assert_close(got[seen], want[seen], rtol=close, atol=close)
    trained = list(prompt.parameters())
    mine, theirs = (torch.autograd.grad(out[seen], trained, g, retain_graph=True) for out in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-3, "a gradient that says nothing"
        torch.testing.assert_close(one, other, rtol=close, atol=close)


def traces(model) -> tuple:
    """What attaching might leave behind."""
    configs = [
        repr(vars(part.config)) for part in model.modules() if hasattr(part, "config") and not isinstance(part.config, dict)
    ]
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    held = [sorted(vars(part)) for part in model.modules()]
    frozen = [(part.training, [p.requires_grad for p in part.parameters(False)]) for part in model.modules()]
    return configs, hooks, held, frozen


# ---- Exact ----


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name):
    """A soft prompt is its tokens and a prefix is a plain cache; windows end within the prompt, and behind it."""
    model, before = model_of(name), traces(model_of(name))
    bare = model(words()).logits
    close = 1e-6 if name.startswith("Gemma2") else 1e-9  # its own softmax is in float32
    soft, prefix = double(fnn.SoftPrompt(P, WIDTH)), prefix_of(model)
    for side in (None, "right", "left"):
        mask = padding(side)
        full = torch.ones(B, P + T, dtype=torch.long) if mask is None else ahead(mask)
        rows = {soft: concatenated(model, soft(), words(), mask)}
        if not name.startswith("Deepseek"):  # whose cache holds neither keys nor values
            rows[prefix] = model(words(), attention_mask=full, past_key_values=cached(prefix())).logits
        for prompt, want in rows.items():
            handle = fastprompt.attach(model, prompt)
            agree(model(words(), attention_mask=mask).logits, want, handle, mask, close)
            assert handle.detach() is model
        assert (rows[soft] - rows.get(prefix, bare)).abs().max() > 0.1
    assert torch.equal(model(words()).logits, bare)
    assert traces(model) == before


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    """P-tuning v2 is a plain cache, deep prompts are VPT's loop, a soft prompt falls back to tokens."""
    model, before = model_of(name), traces(model_of(name))
    prefix, deep, soft = prefix_of(model), double(fnn.DeepPrompt(LAYERS, P, WIDTH)), double(fnn.SoftPrompt(P, WIDTH))
    with pytest.raises(Inexact, match=r'bidirectional.*fallback="tokens"'):
        fastprompt.attach(model, soft)
    assert traces(model) == before
    for side in (None, "right", "left") if name == "BertModel" else (None, "right"):
        mask = padding(side)
        full = torch.ones(B, P + T, dtype=torch.long) if mask is None else ahead(mask)
        rows = [model(words(), attention_mask=full, past_key_values=cached(prefix())).last_hidden_state]
        rows += [own(deep_by_tokens(model.encoder.layer, model.embeddings(words()), deep(), mask))] if side != "left" else [None]
        rows += [concatenated(model, soft(), words(), mask)]
        for prompt, want in zip((prefix, deep, soft), rows, strict=True):
            if want is not None:
                handle = fastprompt.attach(model, prompt, fallback="tokens")
                agree(model(words(), attention_mask=mask).last_hidden_state, want, handle, mask)
                assert ("tokens are in every sample, because" in repr(handle)) == (prompt is soft)
                handle.detach()
    assert traces(model) == before


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "CLIPVisionModel", "WhisperModel"])
def test_deep_prompts_in_towers(name):
    """VPT's loop; and the keys and values that it makes, as a prefix."""
    model, deep = model_of(name), double(fnn.DeepPrompt(LAYERS, P, WIDTH, patch=4))
    before, attend = traces(model), model
    if name == "WhisperModel":
        tower = attend = model.encoder
        x, pictures = torch.randn(B, 4, 12, dtype=torch.float64), None
        rows = nn.functional.gelu(tower.conv2(nn.functional.gelu(tower.conv1(x)))).permute(0, 2, 1)
        want = tower.layer_norm(own(deep_by_tokens(tower.layers, rows + tower.embed_positions.weight, deep())))
        pictures = x
    elif name == "CLIPVisionModel":
        pictures = images()
        rows = model.pre_layrnorm(model.embeddings(pictures))
        want = own(deep_by_tokens(model.encoder.layers, rows, deep()))
    else:
        pictures = images()
        want = model.layernorm(own(deep_by_tokens(model.layers, model.embeddings(pictures), deep())))
    with torch.no_grad():
        prefix = prefix_of(attend)
        prefix.prefix.copy_(torch.stack([torch.stack(pair) for pair in hoist_deep(attend, deep())]))
    part = "encoder" if name == "WhisperModel" else None
    handle = fastprompt.attach(model, deep, part=part)
    agree(attend(pictures).last_hidden_state, want, handle)
    handle.detach()
    handle = fastprompt.attach(model, prefix, part=part)
    torch.testing.assert_close(attend(pictures).last_hidden_state, want, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert traces(model) == before


def test_the_text_side_of_clip():
    model, prompt = model_of("CLIPTextModel"), double(fnn.SoftPrompt(P, WIDTH))
    for side in (None, "right"):
        mask = padding(side)
        rows = torch.cat([prompt().expand(B, -1, -1), model.embeddings.token_embedding(words())], 1)
        rows = rows + model.embeddings.position_embedding.weight[: P + T]
        seen = torch.ones(P + T, P + T, dtype=torch.bool).tril() & (
            ahead(mask).bool()[:, None, None] if mask is not None else True
        )
        want = model.final_layer_norm(model.encoder(rows, seen.expand(B, 1, -1, -1)).last_hidden_state)[:, P:]
        handle = fastprompt.attach(model, prompt)
        agree(model(words(), attention_mask=mask).last_hidden_state, want, handle, mask)
        handle.detach()
    handle = fastprompt.attach(model, double(fnn.SoftPrompt(60, WIDTH)))
    with pytest.raises(ValueError, match=r"prompt: expected at most the 64 positions of .*position_embedding, got 60 and the 7"):
        model(words())
    handle.detach()


def test_positions_that_begin_behind_the_padding_id_are_the_models_own():
    config = transformers.RobertaConfig(**SIZES, pad_token_id=1, is_decoder=True)
    model = frozen(lambda: transformers.RobertaForCausalLM(config))
    prompt = double(fnn.SoftPrompt(P, WIDTH))
    want = concatenated(model, prompt(), words())
    handle = fastprompt.attach(model, prompt)
    agree(model(words()).logits, want, handle)
    with pytest.raises(Inexact, match=r"position_ids: RobertaModel has its own"):
        model.generate(words(), max_new_tokens=2)
    handle.detach()


def test_both_towers_of_clip_at_once():
    text = {**SIZES, "eos_token_id": 2}
    vision = OTHERS["CLIPVisionModel"]
    model = frozen(lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)))
    before, bare = traces(model), model(words(), images()).logits_per_image
    soft, deep = double(fnn.SoftPrompt(P, WIDTH)), double(fnn.DeepPrompt(LAYERS, P, WIDTH))
    with pytest.raises(Inexact, match="stacks of"):
        fastprompt.attach(model, soft)
    handles = [fastprompt.attach(model, soft, part="text_model"), fastprompt.attach(model, deep, part="vision_model")]
    assert (model(words(), images()).logits_per_image - bare).abs().max() > 1e-3
    want = [model.text_model(words()).last_hidden_state, model.vision_model(images()).last_hidden_state]
    handles[0].detach()
    assert torch.equal(model.vision_model(images()).last_hidden_state, want[1])
    handles[1].detach()
    assert torch.equal(model(words(), images()).logits_per_image, bare)
    assert traces(model) == before


def test_packed_sequences_each_see_the_prompt():
    model, prompt = model_of("LlamaForCausalLM"), double(fnn.SoftPrompt(P, WIDTH))
    ids, places = words()[:1], torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    want = torch.cat([concatenated(model, prompt(), ids[:, :3]), concatenated(model, prompt(), ids[:, 3:])], 1)
    handle = fastprompt.attach(model, prompt)
    agree(model(ids, position_ids=places, use_cache=False).logits, want, handle)
    handle.detach()
    starts = torch.tensor([0, 3, T], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4, "use_cache": False}
    handle = fastprompt.attach(model, [prompt, double(fnn.SoftPrompt(2, WIDTH))])
    agree(model(ids, position_ids=places, **packed).logits, want, prompt)
    with pytest.raises(ValueError, match="position_ids: expected each sequence's own positions, beside cu_seq_lens_q, got None"):
        model(ids, **packed)
    handle.use([1, 0])
    mixed = model(ids, position_ids=places, **packed).logits
    handle.use(1)
    torch.testing.assert_close(model(ids[:, :3]).logits, mixed[:, :3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixed[:, 3:], want[:, 3:], rtol=1e-9, atol=1e-9)
    handle.detach()


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Qwen3ForCausalLM"])
def test_packed_sequences_in_windows(name):
    """Each sequence as it is alone, with a prompt of its own; windows of 6 and 4 end within and behind the prompts."""
    model, prompts = model_of(name), nn.ModuleList([double(fnn.SoftPrompt(n, WIDTH)) for n in (P, 2)])
    lengths, handle = (1, 4, 6), fastprompt.attach(model, list(prompts))
    ids, places = words().flatten()[None, : sum(lengths)], torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.tensor([0, 1, 5, 11], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6, "use_cache": False}

    def alone(*choice):
        rows = []
        for number, part in zip(choice, ids.split(lengths, 1), strict=True):
            rows.append(model(part).logits if number is None else concatenated(model, prompts[number](), part))
        return torch.cat(rows, 1)

    for choice in ([0, 1, 0], [1, None, 1], [None] * 3):
        with handle.disabled():
            want = alone(*choice)
        handle.use(choice)
        got = model(ids, position_ids=places, **packed).logits
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        if choice == [0, 1, 0]:
            agree(got, want, prompts)
    handle.use(0)
    with handle.disabled():
        want = alone(0, 0, 0)
    for how in (packed, {"use_cache": False}):
        agree(model(ids, position_ids=places, **how).logits, want, prompts[0])
    two = torch.tensor([0, 1, 2], dtype=torch.int32)
    few = packed | {"cu_seq_lens_q": two, "cu_seq_lens_k": two, "max_length_q": 1, "max_length_k": 1}
    near = model(ids[:, :2], position_ids=torch.zeros(1, 2, dtype=torch.long), **few).logits  # within every window, no mask
    torch.testing.assert_close(near[:, :1], want[:, :1], rtol=1e-9, atol=1e-9)
    with pytest.raises(Inexact, match="expected causal attention without a cache where attention has a window"):
        model(ids[:, :2], position_ids=places[:, :2], past_key_values=model(ids).past_key_values, **packed | {"use_cache": True})
    handle.detach()


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_padding_on_the_left_is_nothing(name):
    """With positions that do not count it, as `generate` gives them: each sample as it is alone, also in windows."""
    model, prompt, mask = model_of(name), double(fnn.SoftPrompt(P, WIDTH)), padding("left")
    handle = fastprompt.attach(model, prompt)
    got = model(words(), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    want = [
        nn.functional.pad(model(row[None, seen.bool()]).logits, (0, 0, T - int(seen.sum()), 0))
        for row, seen in zip(words(), mask, strict=True)
    ]
    agree(got, torch.cat(want), prompt, mask)
    handle.detach()


# ---- Several prompts ----


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM"])
def test_every_sample_its_own_prompt(name):
    """Two lengths in a batch, and a sample without a prompt."""
    model = model_of(name)
    prompts = {"long": double(fnn.SoftPrompt(P, WIDTH)), "short": double(fnn.SoftPrompt(2, WIDTH))}
    want = [
        concatenated(model, prompts["short"](), words()[:1]),
        model(words()[1:2]).logits,
        concatenated(model, prompts["long"](), words()[2:]),
    ]
    handle = fastprompt.attach(model, prompts)
    for choice in (["short", None, 0], torch.tensor([1, -1, 0])):
        handle.use(choice)
        agree(model(words()).logits, torch.cat(want), handle)
    handle.use("short")
    torch.testing.assert_close(model(words())[0][:1], want[0], rtol=1e-9, atol=1e-9)
    handle.use(None)
    torch.testing.assert_close(model(words())[0][1:2], want[1], rtol=1e-9, atol=1e-9)
    handle.use([0, 1])
    with pytest.raises(ValueError, match="use: expected one prompt for each of the 3 samples, got 2"):
        model(words())
    handle.detach()


def test_mixed_prefixes_and_deep_prompts():
    model = model_of("GPT2LMHeadModel")
    prefixes = [prefix_of(model), prefix_of(model, length=3, prompts=2)]
    torch.manual_seed(5)
    prefixes[1].prefix.data.normal_()
    handle = fastprompt.attach(model, prefixes, use=[0, 2, 1])
    mixed = model(words()).logits
    for sample, number in enumerate([0, 2, 1]):
        handle.use(number)
        torch.testing.assert_close(model(words()[sample : sample + 1])[0], mixed[sample : sample + 1], rtol=1e-9, atol=1e-9)
    handle.detach()
    vit = model_of("ViTModel")
    deep = [double(fnn.DeepPrompt(LAYERS, length, WIDTH)) for length in (P, 2)]
    handle = fastprompt.attach(vit, deep, use=[1, 0, 1])
    mixed = vit(images()).last_hidden_state
    for sample, number in enumerate([1, 0, 1]):
        handle.use(number)
        torch.testing.assert_close(vit(images()[sample : sample + 1])[0], mixed[sample : sample + 1], rtol=1e-9, atol=1e-9)
    handle.detach()


# ---- Generation ----


HOW = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 2},
}


GENERATION = list(itertools.product(("LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"), HOW, ("dynamic", "static")))
QUICK = [GENERATION[place] for place in (0, 8, 11, 15)]


@pytest.mark.parametrize(
    ("name", "how", "cache"), QUICK + [pytest.param(*each, marks=pytest.mark.slow) for each in GENERATION if each not in QUICK]
)
def test_generation(name, how, cache):
    """As from embeddings with padding, prompt and sample in this order, through the end of every window."""
    model, prompt, mask = model_of(name), double(fnn.SoftPrompt(P, WIDTH)), padding("left")
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "cache_implementation": cache, **HOW[how]}
    rows = torch.cat([prompt().expand(B, -1, -1), model.get_input_embeddings()(words())], 1)
    whole, order = ahead(mask).sort(dim=1, stable=True)
    torch.manual_seed(6)
    want = model.generate(inputs_embeds=rows.gather(1, order[..., None].expand_as(rows)), attention_mask=whole, **settings)
    handle = fastprompt.attach(model, prompt)
    torch.manual_seed(6)
    got = model.generate(words(), attention_mask=mask, **settings)
    assert torch.equal(got[:, T:], want)
    handle.use([0, None, 0])
    torch.manual_seed(6)
    mixed = model.generate(words(), attention_mask=mask, **settings)
    handle.detach()
    assert torch.equal(mixed[[0, 2], T:], want[[0, 2]]) or how == "sampling"
    if how == "greedy":
        assert torch.equal(mixed[1], model.generate(words()[1:2], attention_mask=mask[1:2], **settings)[0])
    model._cache = None


# ---- What wraps a model ----


def test_gradient_checkpointing_with_two_passes_before_a_backward():
    model = copy.deepcopy(model_of("LlamaForCausalLM"))
    prompts = [double(fnn.SoftPrompt(P, WIDTH)), double(fnn.SoftPrompt(2, WIDTH))]
    want = concatenated(model, prompts[0](), words()) + concatenated(model, prompts[1](), words())
    before = traces(model)
    handle = fastprompt.attach(model, prompts)
    model.gradient_checkpointing_enable()
    model.train()
    first = model(words()).logits
    handle.use(1)
    agree(first + model(words()).logits, want, handle)
    model.gradient_checkpointing_disable()
    handle.detach()
    assert traces(model)[0] == before[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    """No further from float64 than twice the same prompt as tokens."""
    exact, prompt = model_of("LlamaForCausalLM"), double(fnn.SoftPrompt(P, WIDTH))
    want = concatenated(exact, prompt(), words())
    model = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    single = copy.deepcopy(prompt).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rival = concatenated(model, single().to(model.dtype), words())
        handle = fastprompt.attach(model, single)
        got = model(words()).logits
    assert got.dtype == rival.dtype
    assert (got - want).abs().max() <= 2 * (rival - want).abs().max()
    got.float().square().sum().backward()
    assert single.prompt.grad.dtype == torch.float32
    assert single.prompt.grad.abs().max() > 0
    handle.detach()


@pytest.mark.parametrize("kind", ["soft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("deep", "prefix"))])
def test_compiled_in_one_graph(kind):
    model = copy.deepcopy(model_of("ViTModel" if kind == "deep" else "LlamaForCausalLM"))
    prompt = prefix_of(model) if kind == "prefix" else double(fnn.SoftPrompt(P, WIDTH))
    prompt = double(fnn.DeepPrompt(LAYERS, P, WIDTH)) if kind == "deep" else prompt
    handle = fastprompt.attach(model, prompt)
    given = (images(),) if kind == "deep" else (words(),)
    options = {} if kind == "deep" else {"use_cache": False}
    want = model(*given, **options)[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    agree(compiled(*given, **options)[0], want, handle)
    handle.detach()


def test_ddp(tmp_path):
    """A module that holds model and prompts; gradients are those without it."""
    model, prompt = model_of("LlamaForCausalLM"), double(fnn.SoftPrompt(P, WIDTH))
    handle = fastprompt.attach(model, prompt)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.prompt = model, prompt

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    want = torch.autograd.grad(model(words()).logits.square().sum(), prompt.prompt)[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(Both())
        parallel(words()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(prompt.prompt.grad, want, rtol=1e-9, atol=1e-9)
    handle.detach()


# ---- Several devices ----


@pytest.mark.parametrize("kind", ["soft", "prefix", "mixed"])
def test_a_model_that_accelerate_dispatches(kind):
    """Its hooks take the arguments of every block apart and move them; weights come from elsewhere, call by call."""
    accelerate = pytest.importorskip("accelerate", reason="needs peft")
    model = copy.deepcopy(model_of("LlamaForCausalLM"))
    prompts = prefix_of(model) if kind == "prefix" else double(fnn.SoftPrompt(P, WIDTH))
    prompts = [prompts, double(fnn.SoftPrompt(2, WIDTH))] if kind == "mixed" else prompts
    choice = [1, None, 0] if kind == "mixed" else 0
    handle = fastprompt.attach(model, prompts, use=choice)
    want = model(words()).logits
    handle.detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=model.state_dict())
    assert next(model.parameters()).is_meta
    handle = fastprompt.attach(model, prompts, use=choice)
    agree(model(words(), use_cache=False).logits, want, handle)
    handle.detach()


def test_keys_and_values_go_to_each_block_s_device(monkeypatch):
    """Where things lie, and no more: two of three blocks are on "meta", which has no values, and attention is a stand-in."""
    model, seen = copy.deepcopy(model_of("LlamaForCausalLM")), []

    def moved(_, args, kwargs):
        kwargs = {k: tuple(t.to("meta") for t in v) if k == "position_embeddings" else v for k, v in kwargs.items()}
        return [each.to("meta") for each in args], kwargs

    def attention(q, k, v, prefix_k=None, prefix_v=None, prefix_index=None, prefix_lengths=None, **_):
        if prefix_k is not None:
            seen.append([t.device.type for t in (q, k, prefix_k, prefix_v, prefix_index, prefix_lengths)])
        return torch.empty_like(q)

    for part in (*model.model.layers[1:], model.model.norm, model.lm_head):
        part.to("meta").register_forward_pre_hook(moved, with_kwargs=True)
    monkeypatch.setattr(fastprompt.functional, "prefix_attention", attention)
    for prompts in ([prefix_of(model), prefix_of(model, length=2)], [double(fnn.SoftPrompt(n, WIDTH)) for n in (P, 2)]):
        handle = fastprompt.attach(model, prompts, use=[1, 0, 1])
        assert model(words(), use_cache=False).logits.shape == (B, T, VOCABULARY)
        assert seen[-LAYERS:] == [["cpu"] * 6, ["meta"] * 6, ["meta"] * 6]
        handle.detach()


# ---- The handle ----


def test_what_a_handle_says_and_does():
    model = copy.deepcopy(model_of("MistralForCausalLM"))
    model.train().requires_grad_(True)
    before, bare = traces(model), model(words()).logits
    prompt = double(fnn.SoftPrompt(P, WIDTH))
    handle = fastprompt.attach(model, {"tone": prompt})
    assert list(handle.parameters()) == [prompt.prompt]
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(part.training for part in model.modules())
    assert repr(handle).splitlines() == [
        "MistralForCausalLM with tone: SoftPrompt(length=5, width=32, trainable=160)",
        "  layers: 3 MistralDecoderLayer",
        "  path: the attention and mask interfaces of transformers, fastprompt.functional.prefix_attention",
        "  hoisted: the prompt's keys and values, made once a call for the batch",
        "  not fused: layers [0, 1, 2] see 6 tokens back; behind that, a prompt is copied and masked",
        "  in use: 0",
    ]
    prompted = model(words()).logits
    with handle.disabled() as same:
        assert same is model
        assert torch.equal(model(words()).logits, bare)
    assert torch.equal(model(words()).logits, prompted)
    assert (prompted - bare).abs().max() > 0.1
    with pytest.raises(
        ValueError, match=r"call detach\(\) on its handle first, or attach a list of prompts, got one with SoftPrompt"
    ):
        fastprompt.attach(model, prompt)
    assert torch.equal(model(words()).logits, prompted)
    handle.detach()
    assert traces(model) == before
    assert torch.equal(model(words()).logits, bare)
    kept = fastprompt.attach(model, prompt, freeze=False)
    assert traces(model)[3] == before[3]
    kept.detach()


def test_a_failing_call_leaves_nothing():
    model = model_of("LlamaForCausalLM")
    before = traces(model)
    handle = fastprompt.attach(model, double(fnn.SoftPrompt(P, WIDTH)))
    want = model(words()).logits
    with pytest.raises(IndexError):
        model(torch.full((B, T), VOCABULARY + 5))
    assert torch.equal(model(words()).logits, want)
    with pytest.raises(RuntimeError), handle.disabled():
        raise RuntimeError
    with pytest.raises(Inexact, match="a copy of a model with a prompt"):
        copy.deepcopy(model)(words())
    assert torch.equal(model(words()).logits, want)
    handle.detach()
    assert traces(model) == before


def test_what_is_refused():
    soft, deep = double(fnn.SoftPrompt(P, WIDTH)), double(fnn.DeepPrompt(LAYERS, P, WIDTH))
    llama, vit = model_of("LlamaForCausalLM"), model_of("ViTModel")
    before = traces(llama)
    for wrong, prompt, message in (
        (model_of("T5Model"), soft, "T5Model: an encoder and a decoder"),
        (llama, fnn.SoftPrompt(P, 16), "prompt 0: expected width=32 for LlamaForCausalLM, got 16"),
        (llama, fnn.PrefixKV(2, 2, P, 8), "prompt 0: expected layers=3 for LlamaForCausalLM, got 2"),
        (llama, fnn.PrefixKV(LAYERS, HEADS, P, 8), "prompt 0: expected kv_heads=2 for LlamaForCausalLM, got 4"),
        (
            llama,
            [soft, deep],
            "prompt: expected prompts of one kind in the model, and one on its input, got DeepPrompt and SoftPrompt",
        ),
        (llama, deep, "LlamaDecoderLayer: does not run on the tokens of a prompt alone"),
        (vit, double(fnn.DeepPrompt(LAYERS, P, WIDTH, which=[0])), "block 1 has none"),
    ):
        with pytest.raises(ValueError, match=message):
            fastprompt.attach(wrong, prompt)
    with pytest.raises(TypeError, match="or a prompt on the input such as PaddedPrompt, got LabelMap"):
        fastprompt.attach(llama, fnn.LabelMap(10, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        fastprompt.attach("llama", soft)
    with pytest.raises(ValueError, match="blocks: expected None"):
        fastprompt.attach(llama, soft, blocks="layers")
    with pytest.raises(ValueError, match="fallback: expected None"):
        fastprompt.attach(llama, soft, fallback="yes")
    with pytest.raises(ValueError, match="use: expected one of a, b, got 'c'"):
        fastprompt.attach(llama, {"a": soft, "b": soft}, use="c")
    with pytest.raises(ValueError, match="use: expected a number from 0 to 0, got 3"):
        fastprompt.attach(llama, soft, use=3)
    handle = fastprompt.attach(vit, double(fnn.DeepPrompt(LAYERS, P, WIDTH)))
    vit.train()
    vit.layers[0].mlp.dropout_p = 0.1
    with pytest.raises(Inexact, match=r"dropout.*eval mode"):
        vit(images())
    del vit.layers[0].mlp.dropout_p
    handle.detach()
    assert traces(llama) == before
