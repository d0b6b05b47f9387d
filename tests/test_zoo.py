"""A soft prompt in every causal language model of transformers that a small configuration makes: exact, or refused.

Against the prompt's tokens in front of every sample, in float64 but for the norms and routers that compute in float32.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastprompt

transformers = pytest.importorskip("transformers", reason="needs transformers")

WIDTH, P, T, WORDS = 64, 6, 14, 99
EXACT = str.split("""
    afmoe apertus arcee aria_text beam bert bert-generation biogpt bitnet camembert cohere cohere2 cohere2_moe
    ctrl cwm data2vec-text deepseek_v2 deepseek_v3 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 llama longcat_flash mellum mimo_v2_flash
    minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat
    olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta
    roberta-prelayernorm roc_bert seed_oss smollm3 solar_open starcoder2 vaultgemma xlm-roberta xlm-roberta-xl
    youtu
""")
REFUSED = {
    "cannot be exchanged": """
        big_bird bloom codegen falcon gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp roformer trocr xglm xlm
    """,
    "which a prefix has no place in": """
        bailing_hybrid bamba falcon_mamba granitemoehybrid hy_v4 inkling_text jamba kimi_linear lfm3 llama4_text mamba minimax
        nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma
    """,
    "a soft prompt reads each sample's encoder": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart whisper
    """,
    "attention calls read the prompt in 3 blocks": "diffllama git nemotron stablelm",
    "blocks that pass arguments on to attention": "hrm_text olmo_hybrid openai-gpt rwkv",
    "attention_mask: expected which keys are seen": "doge",
    "expected width=64 for RemBert": "rembert",
}
SMALL = dict.fromkeys(str.split("hidden_size n_embd d_model word_embed_proj_dim embedding_size"), WIDTH)
SMALL |= dict.fromkeys(str.split("num_hidden_layers n_layer n_layers num_layers decoder_layers"), 3)
SMALL |= dict.fromkeys(
    str.split("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"), 4
)
SMALL |= dict.fromkeys(str.split("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff"), 96)
SMALL |= dict.fromkeys(str.split("num_experts num_local_experts n_routed_experts"), 4)
SMALL |= dict.fromkeys(str.split("moe_intermediate_size shared_expert_intermediate_size"), 32)
SMALL |= dict.fromkeys(str.split("head_dim v_head_dim kv_lora_rank q_lora_rank hidden_size_per_layer_input mamba_d_head"), 16)
SMALL |= dict.fromkeys(str.split("sliding_window attention_chunk_size rotary_dim qk_rope_head_dim qk_nope_head_dim"), 8)
SMALL |= dict.fromkeys(str.split("mamba_n_heads mamba_d_state state_size"), 8)
SMALL |= dict.fromkeys(
    str.split("attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout"), 0.0
)
SMALL |= dict.fromkeys(str.split("n_group topk_group first_k_dense_replace bos_token_id decoder_start_token_id"), 1)
SMALL |= {
    "vocab_size": WORDS, "vocab_size_per_layer_input": WORDS, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "n_positions": 256, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 2, "is_decoder": True, "encoder_layers": 2,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
OWN = dict.fromkeys(("deepseek_v2", "deepseek_v3", "longcat_flash", "youtu"), LATENT) | {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 8, "num_hidden_layers": 4}
}


def model_of(kind: str):
    """Small, with random weights, and with a layer of every kind that the configuration has."""
    from transformers.models.auto import configuration_auto, modeling_auto

    config_class = configuration_auto.CONFIG_MAPPING[kind]
    usual = config_class()
    settings = {name: value for name, value in SMALL.items() if hasattr(usual, name)} | OWN.get(kind, {})
    if kind == "falcon":
        del settings["head_dim"]
    if vars(usual).get("layer_types") is not None:
        settings["layer_types"] = (list(dict.fromkeys(usual.layer_types)) * 3)[:3]
    config = config_class(**settings)
    config._experts_implementation = "eager"  # the others have no float64
    torch.manual_seed(0)
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model = getattr(transformers, name if isinstance(name, str) else name[0])(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompt_of(model) -> fastprompt.nn.SoftPrompt:
    return fastprompt.nn.SoftPrompt(P, getattr(model.get_input_embeddings(), "embedding_dim", WIDTH)).double()


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_every_causal_class_that_is_exact(kind):
    model = model_of(kind)
    prompt, ids = prompt_of(model), torch.randint(3, WORDS, (2, T), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([prompt().expand(2, -1, -1), model.get_input_embeddings()(ids).detach()], 1)
    want = model(inputs_embeds=rows, attention_mask=torch.ones(2, P + T, dtype=torch.long), use_cache=False).logits[:, P:]
    fastprompt.attach(model, prompt)
    got = model(input_ids=ids, use_cache=False).logits
    g = torch.linspace(-1, 1, math.prod(want.shape), dtype=want.dtype).view_as(want)
    for one, other in ((got, want), [torch.autograd.grad((out * g).sum(), prompt.prompt)[0] for out in (got, want)]):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6 * other.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reason"), [(kind, reason) for reason, kinds in REFUSED.items() for kind in kinds.split()])
def test_every_causal_class_that_is_refused(kind, reason):
    model = model_of(kind)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=reason):
        fastprompt.attach(model, prompt_of(model))
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
