"""A hoisted prompt gives the outputs and the gradients of the same prompt as tokens of every sample, on models by others.

Float64 to 1e-10, against plain token concatenation (soft and deep prompts) and a plain cache (prefix tuning).
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from fastprompt import nn as fnn
from fastprompt.hoist import Inexact, Tokens, hoist, hoist_deep, interface, prefixed

transformers = pytest.importorskip("transformers", reason="needs transformers")

B, T, P, WIDTH, HEADS, LAYERS, VOCABULARY = 3, 7, 5, 32, 4, 3, 61


def llama(**options):
    settings = {"intermediate_size": 48, "num_key_value_heads": 2} | options
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCABULARY, **settings
    )
    model = transformers.LlamaForCausalLM(config)
    # Llama's own norm computes in float32, whatever the model's dtype: a sum over samples before it or after differs by 1e-8.
    for name, part in list(model.named_modules()):
        if type(part).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(WIDTH, eps=config.rms_norm_eps)
            norm.weight.data.uniform_(0.5, 1.5)
            model.set_submodule(name, norm)
    return model


def gpt2(**options):
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | options
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=None,
        **settings,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(**options):
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | options
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCABULARY, intermediate_size=48,
        max_position_embeddings=64, **settings,
    )  # fmt: skip
    return transformers.BertModel(config)


def vit(**options):
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=5, **options,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


CAUSAL = {"llama": llama, "gpt2": gpt2}


def frozen(make, **options):
    """A model whose random weights make attention far from uniform, in float64."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(**options).double().eval().requires_grad_(False)
    return far_from_uniform(model)


def far_from_uniform(model):
    """The model, with random weights that make its attention so."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


def padding(side: str | None) -> Tensor | None:
    """[B, T], 1 where there is a token."""
    if side is None:
        return None
    mask = torch.arange(T) < torch.tensor([T, 4, 1])[:, None]
    return (mask if side == "right" else mask.flip(1)).long()


def ahead(mask: Tensor | None, length: int = P) -> Tensor | None:
    return None if mask is None else torch.cat([torch.ones(B, length, dtype=torch.long), mask], 1)


def double(module: nn.Module, spread: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
    return module


def agree(got: Tensor, want: Tensor, prompt: nn.Module, mask: Tensor | None = None) -> None:
    """Outputs at the samples' tokens, and gradients of everything the prompt trains."""
    seen = slice(None) if mask is None else mask.bool()
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[seen]
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-10, atol=1e-10)
    trained = list(prompt.parameters())
    mine, theirs = (torch.autograd.grad(out[seen], trained, g, retain_graph=True) for out in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-3, "a gradient that says nothing"
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def concatenated(model, prompt: Tensor, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """Plain token concatenation: the prompt's rows in every sample."""
    embeddings = torch.cat([prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
    return model(inputs_embeds=embeddings, attention_mask=ahead(mask, prompt.shape[1]), **options)[0][:, prompt.shape[1] :]


def cached(prefix, batch: int = B):
    """A plain cache that holds the prefix for every sample."""
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache


# ---- Soft prompts in causal models ----


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_soft_prompt_is_its_tokens(name, side):
    model, prompt, mask = frozen(CAUSAL[name]), double(fnn.SoftPrompt(P, WIDTH)), padding(side)
    want = concatenated(model, prompt(), tokens(), mask)
    with prefixed(model, hoist(model, prompt())):
        agree(model(input_ids=tokens(), attention_mask=mask).logits, want, prompt, mask)
    assert (want - model(input_ids=tokens(), attention_mask=mask).logits).abs().max() > 0.1, "the prompt does nothing"


@pytest.mark.parametrize("name", CAUSAL)
def test_given_positions_and_embeddings_start_behind_the_prompt(name):
    model, prompt, mask = frozen(CAUSAL[name]), double(fnn.SoftPrompt(P, WIDTH)), padding("left")
    place = (mask.cumsum(1) - 1).clamp(min=0)
    first = torch.arange(P).expand(B, -1)
    want = concatenated(model, prompt(), tokens(), mask, position_ids=torch.cat([first, place + P], 1))
    rows = model.get_input_embeddings()(tokens())
    with prefixed(model, hoist(model, prompt())):
        agree(model(inputs_embeds=rows, attention_mask=mask, position_ids=place).logits, want, prompt, mask)


def test_the_base_model_alone_is_prefixed_too():
    model, prompt = frozen(llama), double(fnn.SoftPrompt(P, WIDTH))
    with prefixed(model, hoist(model, prompt())):
        torch.testing.assert_close(model.lm_head(model.model(tokens())[0]), model(tokens()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_sample_its_own_prompt_by_index(name):
    """Task prompts of two lengths; -1 is the frozen model, positions included."""
    model, prompt = frozen(CAUSAL[name]), double(fnn.SoftPrompt(P, WIDTH, prompts=2))
    lengths, index = torch.tensor([P, 2]), torch.tensor([1, -1, 0])
    with prefixed(model, hoist(model, prompt()), index=index, lengths=lengths):
        got = model(input_ids=tokens()).logits
    want = [
        concatenated(model, prompt()[1:, :2], tokens()[:1]),
        model(input_ids=tokens()[1:2]).logits,
        concatenated(model, prompt()[:1], tokens()[2:]),
    ]
    agree(got, torch.cat(want), prompt)


OTHERS = {
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "RobertaForCausalLM": {"intermediate_size": 48, "is_decoder": True},
    "BioGptForCausalLM": {"intermediate_size": 48},
    "CTRLLMHeadModel": {"dff": 48, "n_positions": 64},
    "GPTNeoXForCausalLM": {"intermediate_size": 48},
    "Qwen3ForCausalLM": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, side):
    """Positions that count tokens, that start behind the padding id, that are rotated; embeddings scaled in place."""
    kind = getattr(transformers, name)
    config = kind.config_class(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=VOCABULARY, pad_token_id=1,
        max_position_embeddings=64, **OTHERS[name],
    )  # fmt: skip
    model, prompt, mask = frozen(kind, config=config), double(fnn.SoftPrompt(P, WIDTH)), padding(side)
    ids = tokens().clamp(min=2)
    want = concatenated(model, prompt(), ids, mask)
    with prefixed(model, hoist(model, prompt())):
        got = model(input_ids=ids, attention_mask=mask).logits
    seen = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)  # some have norms in float32
    assert (want - model(input_ids=ids, attention_mask=mask).logits)[seen].abs().max() > 0.1


def test_a_text_is_a_prompt():
    """Cached demonstrations: ids instead of embeddings."""
    model = frozen(llama)
    text = tokens()[0, :P]
    want = model(torch.cat([text.expand(B, -1), tokens()], 1)).logits[:, P:]
    with torch.no_grad(), prefixed(model, hoist(model, text)):
        torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-10, atol=1e-10)


def test_a_prefix_starts_from_a_text():
    model = frozen(llama)
    kv = hoist(model, tokens()[:1, :P])
    prefix = fnn.PrefixKV(LAYERS, 2, P, WIDTH // HEADS, init=kv, frozen=1)
    with prefixed(model, kv):
        want = model(tokens()).logits
    with prefixed(model, prefix()):
        torch.testing.assert_close(model(tokens()).logits, want, rtol=0, atol=0)
    assert prefix.prefix.shape[-2] == P - 1


# ---- Prefix tuning ----


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefix_tuning_is_a_plain_cache(name, side, hidden):
    model, mask = frozen(CAUSAL[name]), padding(side)
    heads = 2 if name == "llama" else HEADS
    prefix = double(fnn.PrefixKV(LAYERS, heads, P, WIDTH // HEADS, hidden=hidden), 0.5)
    want = model(tokens(), attention_mask=ahead(mask), past_key_values=cached(prefix())).logits
    with prefixed(model, prefix()):
        agree(model(tokens(), attention_mask=mask).logits, want, prefix, mask)


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_p_tuning_v2_on_an_encoder(side):
    model, mask = frozen(bert), padding(side)
    prefix = double(fnn.PrefixKV(LAYERS, HEADS, P, WIDTH // HEADS))
    full = torch.ones(B, P + T, dtype=torch.long) if mask is None else ahead(mask)
    want = model(tokens(), attention_mask=full, past_key_values=cached(prefix())).last_hidden_state
    with prefixed(model, prefix()):
        agree(model(tokens(), attention_mask=mask).last_hidden_state, want, prefix, mask)


# ---- Deep prompts ----


def deep_by_tokens(blocks, x: Tensor, prompts, mask: Tensor | None = None) -> Tensor:
    """VPT's loop: [CLS, prompts, rest], a layer's prompts instead of the last layer's."""
    rows = 0
    for block, prompt in zip(blocks, prompts, strict=True):
        if prompt is not None:
            x = torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1 + rows :]], 1)
            rows = prompt.shape[1]
        there = None
        if mask is not None:
            there = torch.cat([mask[:, :1], torch.ones(len(x), rows, dtype=torch.long), mask[:, 1:]], 1)
            there = there.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
        x = block(x, there)
    return x


def own(x: Tensor) -> Tensor:
    """The samples' rows."""
    return torch.cat([x[:, :1], x[:, 1 + P :]], 1)


def images() -> Tensor:
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def head(model, x: Tensor) -> Tensor:
    return model.classifier(model.vit.layernorm(x)[:, 0])


@pytest.mark.parametrize("options", [{}, {"project": 6}, {"project": 6, "project_each": True}, {"shared": True}])
def test_vpt_deep_on_a_vit(options):
    model, prompt = frozen(vit), double(fnn.DeepPrompt(LAYERS, P, WIDTH, patch=4, **options))
    want = head(model, deep_by_tokens(model.vit.layers, model.vit.embeddings(images()), prompt()))
    with prefixed(model, hoist_deep(model, prompt())):
        agree(model(images()).logits, want, prompt)
    assert (want - model(images()).logits).abs().max() > 0.01


def test_prompts_from_a_later_layer_on_are_exact_too():
    model, prompt = frozen(vit), double(fnn.DeepPrompt(LAYERS, P, WIDTH, which=[1, 2]))
    want = head(model, deep_by_tokens(model.vit.layers, model.vit.embeddings(images()), prompt()))
    with prefixed(model, hoist_deep(model, prompt())):
        agree(model(images()).logits, want, prompt)


def test_dropout_a_sample_makes_a_prefix_a_sample():
    model, prompt = frozen(vit), double(fnn.DeepPrompt(LAYERS, P, WIDTH, dropout=0.5, per_sample=True)).train()
    dropped = prompt(B)
    assert dropped[0].shape == (B, P, WIDTH)
    want = head(model, deep_by_tokens(model.vit.layers, model.vit.embeddings(images()), dropped))
    with prefixed(model, hoist_deep(model, dropped)):
        agree(model(images()).logits, want, prompt)


@pytest.mark.parametrize("side", [None, "right"])
def test_deep_tokens_in_bert(side):
    """Tokens in the blocks have no positions of their own."""
    model, prompt, mask = frozen(bert), double(fnn.DeepPrompt(LAYERS, P, WIDTH)), padding(side)
    want = own(deep_by_tokens(model.encoder.layer, model.embeddings(tokens()), prompt(), mask))
    with prefixed(model, hoist_deep(model, prompt())):
        agree(model(tokens(), attention_mask=mask).last_hidden_state, want, prompt, mask)


# ---- Generation ----


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation(name, side, cache):
    model, prompt = frozen(CAUSAL[name]), double(fnn.SoftPrompt(P, WIDTH))
    mask = torch.ones(B, T, dtype=torch.long) if side is None else padding(side)
    settings = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    rows = torch.cat([prompt().expand(B, -1, -1), model.get_input_embeddings()(tokens())], 1)
    want = model.generate(inputs_embeds=rows, attention_mask=ahead(mask), **settings)
    with prefixed(model, hoist(model, prompt())):
        got = model.generate(tokens(), attention_mask=mask, cache_implementation=cache, **settings)
    assert torch.equal(got.sequences[:, T:], want.sequences)
    assert len(want.sequences[0].unique()) > 1
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-10, atol=1e-10)


def test_a_static_cache_filled_in_two_pieces():
    model, prompt = frozen(llama), double(fnn.SoftPrompt(P, WIDTH))
    want = concatenated(model, prompt(), tokens())
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad(), prefixed(model, hoist(model, prompt())):
        pieces = [model(part, past_key_values=cache).logits for part in (tokens()[:, :3], tokens()[:, 3:])]
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-10, atol=1e-10)


# ---- What wraps a model ----


@pytest.mark.parametrize("name", CAUSAL)
def test_gradient_checkpointing(name):
    """Backward runs the blocks again after the context was left (transformers before 5.23: inside): with the prefix."""
    model, prompt = frozen(CAUSAL[name]), double(fnn.SoftPrompt(P, WIDTH))
    want = concatenated(model, prompt(), tokens())
    model.gradient_checkpointing_enable()
    model.train()
    with prefixed(model, hoist(model, prompt())):
        got = model(tokens()).logits
        if not hasattr(model, "activation_checkpointing_enable"):
            agree(got, want, prompt)
    if hasattr(model, "activation_checkpointing_enable"):
        agree(got, want, prompt)
    assert model.config._attn_implementation == "fastprompt"
    torch.testing.assert_close(model(tokens()).logits, frozen(CAUSAL[name])(tokens()).logits, rtol=1e-10, atol=1e-10)


def test_autocast():
    model, prompt = frozen(llama).float(), double(fnn.SoftPrompt(P, WIDTH)).float()
    want = concatenated(model, prompt(), tokens())
    with torch.autocast("cpu", torch.bfloat16):
        with prefixed(model, hoist(model, prompt())):
            got = model(tokens()).logits
        rival = concatenated(model, prompt(), tokens())
    assert got.dtype == rival.dtype
    assert (got - want).abs().max() <= 2 * (rival - want).abs().max()
    got.float().square().sum().backward()
    assert prompt.prompt.grad.dtype == torch.float32
    assert prompt.prompt.grad.isfinite().all()


def test_the_blocks_compile_in_one_graph():
    model, prefix = frozen(llama), double(fnn.PrefixKV(LAYERS, 2, P, WIDTH // HEADS))
    mask = torch.ones(B, T, dtype=torch.long)
    want = model(tokens(), attention_mask=ahead(mask), past_key_values=cached(prefix())).logits
    with prefixed(model, prefix()):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        agree(compiled(tokens(), attention_mask=mask, use_cache=False).logits, want, prefix)


@pytest.mark.parametrize("fail", [False, True])
def test_a_model_is_left_as_it_was(fail):
    model, prompt = frozen(gpt2), double(fnn.SoftPrompt(P, WIDTH))
    before = model(tokens()).logits
    with pytest.raises(RuntimeError) if fail else torch.no_grad(), prefixed(model, hoist(model, prompt())):
        model(tokens())
        if fail:
            raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert not any(hasattr(part, "fastprompt") for part in model.modules())
    assert torch.equal(model(tokens()).logits, before)
    copy.deepcopy(model)


def test_hoisting_reads_nothing_into_a_frozen_model():
    model, prompt = frozen(llama), double(fnn.SoftPrompt(P, WIDTH))
    kv = hoist(model, prompt())
    assert len(kv) == LAYERS
    assert kv[0][0].shape == kv[0][1].shape == (1, 2, P, WIDTH // HEADS)
    sum(part.square().sum() for pair in kv for part in pair).backward()
    assert prompt.prompt.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- What is refused, and the fallback ----


def test_dropout_inside_the_model_is_refused():
    prompt = double(fnn.SoftPrompt(P, WIDTH))
    for make, options in ((gpt2, {"resid_pdrop": 0.1}), (gpt2, {"attn_pdrop": 0.1}), (llama, {"attention_dropout": 0.1})):
        model = frozen(make, **options)
        hoist(model, prompt())  # eval mode: nothing drops
        with pytest.raises(Inexact, match=r"dropout.*eval mode"):
            hoist(model.train(), prompt())
    model = frozen(vit, hidden_dropout_prob=0.1).train()
    with pytest.raises(Inexact, match=r"dropout.*eval mode"):
        hoist_deep(model, double(fnn.DeepPrompt(LAYERS, P, WIDTH))())


def test_dropout_on_attention_weights_is_refused_in_a_prefixed_model():
    model, prefix = frozen(gpt2, attn_pdrop=0.1), double(fnn.PrefixKV(LAYERS, HEADS, P, WIDTH // HEADS))
    with prefixed(model.train(), prefix()), pytest.raises(Inexact, match="eval mode"):
        model(tokens())


def test_a_shallow_prompt_under_bidirectional_attention():
    """Refused, and with the fallback the same as concatenation by hand."""
    model, prompt, mask = frozen(bert), double(fnn.SoftPrompt(P, WIDTH)), padding("right")
    with pytest.raises(Inexact, match="bidirectional"):
        hoist(model, prompt())
    assert model.config._attn_implementation == "sdpa"
    kept = hoist(model, prompt(), fallback="tokens")
    assert isinstance(kept, Tokens)
    want = concatenated(model, prompt(), tokens(), mask)
    with prefixed(model, kept):
        agree(model(tokens(), attention_mask=mask).last_hidden_state, want, prompt, mask)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_a_decoder_used_as_an_encoder_is_bidirectional():
    model, mask = frozen(llama), padding("left")
    model.config.is_causal = False
    with pytest.raises(Inexact, match="bidirectional"):
        hoist(model, double(fnn.SoftPrompt(P, WIDTH))())
    prefix = double(fnn.PrefixKV(LAYERS, 2, P, WIDTH // HEADS))
    want = model(tokens(), attention_mask=ahead(mask), past_key_values=cached(prefix())).logits
    with prefixed(model, prefix()):
        agree(model(tokens(), attention_mask=mask, use_cache=False).logits, want, prefix, mask)


def test_the_fallback_of_a_causal_model_generates():
    model, prompt = frozen(gpt2, resid_pdrop=0.1).train(), double(fnn.SoftPrompt(P, WIDTH))
    kept = hoist(model, prompt(), fallback="tokens")
    assert isinstance(kept, Tokens)
    model.eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = padding("left")
    rows = torch.cat([prompt().expand(B, -1, -1), model.get_input_embeddings()(tokens())], 1)
    want = model.generate(inputs_embeds=rows, attention_mask=ahead(mask), **settings)
    with prefixed(model, kept):
        assert torch.equal(model.generate(tokens(), attention_mask=mask, **settings)[:, T:], want)


def test_a_prompt_that_goes_on_through_later_blocks():
    """Partial-deep: refused, and with the fallback VPT's own loop; also when the prompt's rows are pooled."""
    model, prompt = frozen(vit), double(fnn.DeepPrompt(LAYERS, P, WIDTH, which=[0, 1]))
    with pytest.raises(Inexact, match="block 2 has none"):
        hoist_deep(model, prompt())
    rows = deep_by_tokens(model.vit.layers, model.vit.embeddings(images()), prompt())
    with prefixed(model, hoist_deep(model, prompt(), fallback="tokens")):
        agree(model(images()).logits, head(model, rows), prompt)

    whole = double(fnn.DeepPrompt(LAYERS, P, WIDTH))
    with pytest.raises(Inexact, match="reads_prompt"):
        hoist_deep(model, whole(), reads_prompt=True)
    rows = deep_by_tokens(model.vit.layers, model.vit.embeddings(images()), whole())
    with prefixed(model, hoist_deep(model, whole(), reads_prompt=True, fallback="tokens")):
        agree(model.vit(images()).last_hidden_state, model.vit.layernorm(rows), whole)


def test_deep_tokens_with_padding_fall_back_too():
    model, prompt, mask = frozen(bert), double(fnn.DeepPrompt(LAYERS, P, WIDTH, which=[0])), padding("right")
    want = own(deep_by_tokens(model.encoder.layer, model.embeddings(tokens()), prompt(), mask))
    with prefixed(model, hoist_deep(model, prompt(), fallback="tokens")):
        agree(model(tokens(), attention_mask=mask).last_hidden_state, want, prompt, mask)


def test_experts_with_a_capacity_are_refused():
    model, prompt = frozen(llama), double(fnn.SoftPrompt(P, WIDTH))
    model.model.layers[1].mlp.expert_capacity = 4
    with pytest.raises(Inexact, match=r"layers\.1\.mlp\.expert_capacity.*capacity limit"):
        hoist(model, prompt())
    model = frozen(llama)
    model.config.capacity_factor = 1.25
    with pytest.raises(Inexact, match="capacity limit"):
        hoist(model, prompt())


def test_experts_without_a_capacity_are_exact():
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
        vocab_size=VOCABULARY, num_local_experts=3, sliding_window=None,
    )  # fmt: skip
    model, prompt = transformers.MixtralForCausalLM(config).eval(), fnn.SoftPrompt(P, WIDTH)
    want = concatenated(model, prompt(), tokens())
    with prefixed(model, hoist(model, prompt())):
        torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-5, atol=1e-5)  # there are no experts in float64


def test_models_that_cannot_be_treated_exactly():
    prompt = double(fnn.SoftPrompt(P, WIDTH))
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    modern = transformers.ModernBertConfig(
        **{k: v for k, v in sizes.items() if k != "num_key_value_heads"}, local_attention=4, pad_token_id=0
    )
    modern = frozen(lambda: transformers.ModernBertModel(modern))
    with prefixed(modern, double(fnn.PrefixKV(2, HEADS, P, 8))()), pytest.raises(Inexact, match="to both sides"):
        modern(tokens())
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=WIDTH, state_size=4, num_hidden_layers=2, vocab_size=VOCABULARY)
    )
    with pytest.raises(Inexact):
        hoist(mamba, prompt().float())
    t5 = transformers.T5Model(
        transformers.T5Config(d_model=WIDTH, d_ff=48, num_layers=2, num_heads=HEADS, d_kv=8, vocab_size=VOCABULARY)
    )
    with pytest.raises(Inexact, match="an encoder and a decoder"):
        hoist(t5, prompt().float())
    stable = frozen(lambda: transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes)))
    with pytest.raises(Inexact, match="0 attention calls read the prompt in 2 blocks"):
        hoist(stable, prompt())
    prefix = double(fnn.PrefixKV(2, 2, P, WIDTH // HEADS))
    with prefixed(stable, prefix()), pytest.raises(Inexact, match="does not hand the prefix on"):
        stable(tokens())
    config = transformers.BartConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=48,
        vocab_size=VOCABULARY,
    )
    bart = frozen(lambda: transformers.BartForCausalLM(config))
    with pytest.raises(Inexact, match="a decoder, where a soft prompt reads each"), prefixed(bart, hoist(bart, prompt())):
        pass
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        hoist(nn.Linear(2, 2), prompt())
    with pytest.raises(Inexact, match="LlamaDecoderLayer: does not run on the tokens of a prompt alone"):
        hoist_deep(frozen(llama), double(fnn.DeepPrompt(LAYERS, P, WIDTH))())


def test_four_dimensional_masks():
    """Which key each query sees, bool; a float bias is refused."""
    model, prefix = frozen(llama), double(fnn.PrefixKV(LAYERS, 2, P, WIDTH // HEADS))
    seen = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    with prefixed(model, prefix()):
        want = model(tokens()).logits
        agree(model(tokens(), attention_mask=seen).logits, want, prefix)
        with pytest.raises(ValueError, match="attention_mask: expected which keys are seen"):
            model(tokens(), attention_mask=seen.double())


def test_wrong_arguments():
    model, prefix = frozen(llama), double(fnn.PrefixKV(LAYERS, 2, P, WIDTH // HEADS))
    with pytest.raises(ValueError, match="prefix: expected keys and values for each of the 3 blocks, got 2"), \
            prefixed(model, prefix()[:2]):  # fmt: skip
        pass
    with prefixed(model, prefix()), prefixed(model, prefix()), pytest.raises(ValueError, match="has a prefix already"):
        model(tokens())
    with pytest.raises(ValueError, match=r"index: expected \[T\]"), \
            prefixed(model, prefix(), index=torch.zeros(B, 2, dtype=torch.long)):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="prompt: expected embeddings"):
        hoist(model, torch.zeros(4))
    with pytest.raises(ValueError, match="fallback: expected None"):
        hoist(model, torch.zeros(4, WIDTH), fallback="yes")
    with pytest.raises(ValueError, match="prompts: expected one for each of the 3 blocks, got 1"):
        hoist_deep(model, [None])
    with pytest.raises(ValueError, match="index, lengths, offset: expected None"), prefixed(model, Tokens(None), offset=1):
        pass


def test_nothing_is_copied_on_the_way_to_attention_and_back(monkeypatch):
    given = [torch.randn(2, 7, 4, 8).transpose(1, 2) for _ in range(3)]
    seen, made = [], torch.empty_like(given[0])
    monkeypatch.setattr(interface, "attend", lambda *a: seen.extend(a[:3]) or made)
    out, _ = interface.attention(nn.Module(), *given, None)
    assert all(one is other for one, other in zip(seen, given, strict=True))
    assert out.data_ptr() == made.data_ptr()
    assert out.shape == (2, 7, 4, 8)
