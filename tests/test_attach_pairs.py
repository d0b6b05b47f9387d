"""Prefixes in an encoder, a decoder and its cross attention: a plain cache, or the formula written here.

    softmax(scale * q [prefix_k | k]^T + [bias of the prefix | bias]) [prefix_v | v]

Under T5's bias by distance a decoder's prefix has the bias that it has in a plain cache; elsewhere it has none. Float64 to
1e-9 on transformers' own classes with random weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

import fastprompt
from fastprompt import nn as fnn
from fastprompt.hoist import Inexact
from fastprompt.integrations.peft import accelerate
from tests.test_attach import Norm, agree, traces
from tests.test_hoist import HEADS, VOCABULARY, WIDTH, B, P, T, ahead, double, frozen, padding, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers")

LAYERS, S, D = 2, 6, WIDTH // HEADS
T5 = {
    "d_model": WIDTH, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS, "d_kv": D, "vocab_size": VOCABULARY,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "T5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": {
        "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
        "max_position_embeddings": 32, "pad_token_id": 1, "forced_eos_token_id": None,
    },
}  # fmt: skip
PARTS = ("encoder", "decoder", "decoder.cross")


@functools.cache
def model_of(name: str):
    kind = getattr(transformers, name)

    def make():
        built = kind(kind.config_class(**MODELS[name]))
        for place, part in list(built.named_modules()):
            if type(part).__name__.endswith("T5LayerNorm"):
                built.set_submodule(place, Norm(part.weight, part.variance_epsilon, 0))
        return built

    return frozen(make)


def prefix_of(seed: int = 2, **options) -> fnn.PrefixKV:
    prefix = fnn.PrefixKV(LAYERS, HEADS, options.pop("length", P), D, **options).double()
    prefix.prefix.data.normal_(generator=torch.Generator().manual_seed(seed))
    return prefix


def source() -> Tensor:
    return torch.randint(2, VOCABULARY, (B, S), generator=torch.Generator().manual_seed(5))


def source_mask(side: str | None) -> Tensor | None:
    mask = torch.arange(S) < torch.tensor([S, 3, 2])[:, None]
    return None if side is None else (mask if side == "right" else mask.flip(1)).long()


def run(model, side: str | None = None, **options):
    own = {"decoder_input_ids": tokens(), "decoder_attention_mask": padding(side), **options}
    return model(source(), attention_mask=source_mask(side), use_cache=False, **own).logits


@contextlib.contextmanager
def by_hand(model, prefix: fnn.PrefixKV, name: str):
    """The formula, for the part called that: attention whose prefix has no bias."""
    cross = ("EncDecAttention", "encoder_attn")
    pairs, layers = prefix(), {}
    for place, part in model.named_modules():
        wanted = "encoder." in place if name == "encoder" else place.endswith(cross)
        if wanted and hasattr(part, "layer_idx") and hasattr(part, "is_causal"):
            layers[part] = pairs[len(layers)]

    def attention(module, q, k, v, mask, scaling=None, position_bias=None, **_):
        scores = q @ k.transpose(2, 3) * scaling
        scores = scores if position_bias is None else scores + position_bias
        scores = scores if mask is None else scores + mask[..., : k.shape[2]]
        if module in layers:
            keys, values = (part.expand(len(q), -1, -1, -1) for part in layers[module])
            scores = torch.cat([q @ keys.transpose(2, 3) * scaling, scores], 3)
            v = torch.cat([values, v], 2)
        return (scores.softmax(3) @ v).transpose(1, 2), None

    transformers.AttentionInterface.register("by_hand", attention)
    transformers.AttentionMaskInterface.register("by_hand", transformers.masking_utils.eager_mask)
    sides = [model, *(part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))]
    for side in sides:
        side.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        for side in sides:
            side.set_attn_implementation("sdpa")


def in_a_cache(prefix: fnn.PrefixKV):
    self_attention = transformers.DynamicCache()
    for layer, pair in enumerate(prefix()):
        self_attention.update(*(part.expand(B, -1, -1, -1) for part in pair), layer)
    return transformers.EncoderDecoderCache(self_attention, transformers.DynamicCache())


def expected(model, prefix: fnn.PrefixKV, part: str, side: str | None) -> Tensor:
    if part == "decoder":
        mask = torch.ones(B, P + T, dtype=torch.long) if side is None else ahead(padding(side))
        return run(model, side, decoder_attention_mask=mask, past_key_values=in_a_cache(prefix))
    with by_hand(model, prefix, part):
        return run(model, side)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_in_each_part(name, part):
    model, prefix = model_of(name), prefix_of()
    before, bare = traces(model), run(model)
    for side in (None, "right", "left"):
        want = expected(model, prefix, part, side)
        handle = fastprompt.attach(model, prefix, part=part)
        assert ("the prompt is copied" in repr(handle)) == (part != "decoder.cross" and "T5" in name)
        agree(run(model, side), want, handle, padding(side))
        handle.detach()
    assert (want - bare).abs().max() > 1e-2
    assert torch.equal(run(model), bare)
    assert traces(model) == before


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_three_prefixes_and_generation(name):
    """Detached in the order of attaching; greedy as from whole forward passes, beams and a static cache as without a cache."""
    model = model_of(name)
    before, bare = traces(model), run(model)
    handles = [fastprompt.attach(model, prefix_of(seed), part=part) for seed, part in enumerate(PARTS)]
    whole = run(model)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": source_mask("right")}
    ids = torch.full((B, 1), model.config.decoder_start_token_id)
    for _ in range(6):
        logits = model(source(), attention_mask=source_mask("right"), decoder_input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.eos_token_id or []] = -torch.inf
        ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    assert len(ids.unique()) > 3
    for cache, beams in itertools.product(("dynamic", "static"), (1, 3)):
        options = {"num_beams": beams, "do_sample": False, **settings}
        got = model.generate(source(), cache_implementation=cache, **options)
        assert torch.equal(got, ids if beams == 1 else model.generate(source(), use_cache=False, **options))
        vars(model).pop("_cache", None)
    for handle, part in zip(handles, PARTS, strict=True):
        with handle.disabled():
            assert (run(model) - whole).abs().max() > 1e-2, part
    assert torch.equal(run(model), whole)
    for handle in handles:
        assert (run(model) - bare).abs().max() > 1e-2
        handle.detach()
    assert torch.equal(run(model), bare)
    assert traces(model)[:2] == before[:2]


EVERY = [*(("T5ForConditionalGeneration", part) for part in PARTS), ("BartForConditionalGeneration", "decoder")]


@pytest.mark.parametrize(("name", "part"), EVERY)
def test_every_sample_its_own_prefix(name, part):
    """Two lengths in a batch, and a sample without one; distances, and BART's positions, start at each sample's own prefix."""
    model = model_of(name)
    handle = fastprompt.attach(model, [prefix_of(), prefix_of(3, length=2)], part=part, use=[1, None, 0])
    mixed = run(model, "right")
    for sample, number in enumerate([1, None, 0]):
        handle.use(number)
        there = padding("right").bool()[sample]
        torch.testing.assert_close(run(model, "right")[sample][there], mixed[sample][there], rtol=1e-9, atol=1e-9)
    handle.use([1, None, 0])
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    beams = model.generate(source(), **options)
    handle.use(1)
    assert torch.equal(model.generate(source()[:1], **options)[0], beams[0])
    handle.detach()


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_soft_prompt_in_a_decoder_is_tokens(name):
    model, prompt = model_of(name), double(fnn.SoftPrompt(P, WIDTH))
    rows = torch.cat([prompt().expand(B, -1, -1), model.get_decoder().embed_tokens(tokens())], 1)
    want = run(model, decoder_input_ids=None, decoder_inputs_embeds=rows)[:, P:]
    handle = fastprompt.attach(model, prompt, part="decoder", fallback="tokens")
    agree(run(model), want, handle)
    handle.detach()


def test_peft_prefix_tuning_of_t5():
    peft = pytest.importorskip("peft", reason="needs peft")
    model, bare = copy.deepcopy(model_of("T5ForConditionalGeneration")), model_of("T5ForConditionalGeneration")
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    tuned = peft.get_peft_model(model, config).double().eval()
    rows = tuned.prompt_encoder["default"].embedding.weight
    rows.data.normal_(generator=torch.Generator().manual_seed(2))
    pairs = fnn.PrefixKV.from_flat(rows, LAYERS, HEADS)()
    pairs = [pairs[2 * layer % LAYERS] for layer in range(LAYERS)]  # which PEFT 0.21 hands to that layer of a decoder
    handle = fastprompt.attach(bare, fnn.PrefixKV(LAYERS, HEADS, P, D, init=pairs).double(), part="decoder")
    for side in (None, "right"):
        seen = slice(None) if side is None else padding(side).bool()
        masks = {"attention_mask": source_mask(side), "decoder_attention_mask": padding(side)}
        want = tuned(source(), decoder_input_ids=tokens(), use_cache=False, **masks).logits
        torch.testing.assert_close(run(bare, side)[seen], want[seen], rtol=1e-9, atol=1e-9)
    handle.detach()
    with pytest.raises(Inexact, match="PEFT gives layer i of the decoder's L layers the trained keys and values 2i mod L"):
        accelerate(tuned)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    with pytest.raises(Inexact, match="PROMPT_TUNING for CAUSAL_LM, got default for SEQ_2_SEQ_LM; in an encoder a prompt's rows"):
        accelerate(peft.get_peft_model(copy.deepcopy(bare), config))


@pytest.mark.slow
def test_t5_compiles_in_one_graph():
    model, prefix = copy.deepcopy(model_of("T5ForConditionalGeneration")), prefix_of()
    want = run(model, past_key_values=in_a_cache(prefix))
    handle = fastprompt.attach(model, prefix, part="decoder")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    agree(run(compiled), want, handle)
    handle.detach()


def test_checkpointing_and_half_precision():
    model, prefix = copy.deepcopy(model_of("T5ForConditionalGeneration")), prefix_of()
    want = run(model, past_key_values=in_a_cache(prefix))
    handle = fastprompt.attach(model, prefix, part="decoder")
    for part in model.modules():
        if hasattr(part, "dropout_rate"):
            part.dropout_rate = 0.0
        part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    model.gradient_checkpointing_enable()
    model.train()
    agree(run(model), want, handle)
    model.gradient_checkpointing_disable()
    handle.detach()
    model, single = copy.deepcopy(model_of("T5ForConditionalGeneration")).to(torch.bfloat16), copy.deepcopy(prefix).float()
    rival = run(model, past_key_values=in_a_cache(copy.deepcopy(prefix).to(torch.bfloat16)))
    handle = fastprompt.attach(model, single, part="decoder")
    assert (run(model) - want).abs().max() <= 2 * (rival - want).abs().max()
    handle.detach()


def test_whisper_decoder():
    config = transformers.WhisperConfig(
        d_model=WIDTH, encoder_layers=1, decoder_layers=LAYERS, encoder_attention_heads=2, decoder_attention_heads=HEADS,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY, num_mel_bins=4, max_source_positions=S,
        max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model, prefix = frozen(transformers.WhisperForConditionalGeneration, config=config), prefix_of()
    sound = torch.randn(B, 4, 2 * S, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    options = {"decoder_input_ids": tokens()}
    want = model(sound, past_key_values=in_a_cache(prefix), **options).logits
    handle = fastprompt.attach(model, prefix, part="decoder")
    agree(model(sound, use_cache=False, **options).logits, want, handle)
    handle.detach()
    with by_hand(model, prefix, "decoder.cross"):
        want = model(sound, use_cache=False, **options).logits
    handle = fastprompt.attach(model, prefix, part="decoder.cross")
    agree(model(sound, use_cache=False, **options).logits, want, handle)
    handle.detach()


def test_what_pairs_refuse():
    t5, bart = model_of("T5ForConditionalGeneration"), model_of("BartForConditionalGeneration")
    soft, deep = double(fnn.SoftPrompt(P, WIDTH)), double(fnn.DeepPrompt(LAYERS, P, WIDTH))
    before = traces(t5), traces(bart)
    for model, prompt, options, message in (
        (t5, prefix_of(), {}, 'an encoder and a decoder; attach to one, by part="encoder", "decoder" or "decoder.cross"'),
        (t5, prefix_of(), {"part": "encoder.cross"}, "part: expected a decoder with cross attention, got T5Stack"),
        (t5, deep, {"part": "decoder.cross"}, r"part: expected a decoder of transformers for \.cross, and PrefixKV"),
        (t5, prefix_of(), {"part": "middle"}, "part: expected the name of a part of T5ForConditionalGeneration, got 'middle'"),
        (t5, soft, {"part": "encoder", "fallback": "tokens"}, "expected PrefixKV in T5Stack, whose rows a decoder reads, got a"),
        (bart, soft, {"part": "decoder"}, "BartDecoder: a decoder, where a soft prompt reads each sample's encoder"),
        (t5, deep, {"part": "encoder"}, "a position_bias, in which tokens of the prompt would move the samples'"),
        (t5, fnn.PrefixKV(LAYERS, 2, P, D), {"part": "decoder"}, "prompt 0: expected kv_heads=4"),
        (bart, fnn.PrefixKV(3, HEADS, P, D), {"part": "decoder.cross"}, "prompt 0: expected layers=2"),
    ):
        with pytest.raises(ValueError, match=message):
            fastprompt.attach(model, prompt, **options)
    handle = fastprompt.attach(t5, prefix_of(), part="decoder.cross")
    with pytest.raises(ValueError, match=r"call detach\(\) on its handle first"):
        fastprompt.attach(t5, prefix_of(), part="decoder.cross")
    handle.detach()
    handle = fastprompt.attach(t5, prefix_of(), part="encoder")
    with pytest.raises(Inexact, match="T5Stack: a bias by distance in the row, which knows of no packed sequences"):
        t5.encoder(source(), cu_seq_lens_q=torch.tensor([0, S]))
    handle.detach()
    handle = fastprompt.attach(bart, prefix_of(length=27), part="decoder")
    with pytest.raises(ValueError, match=r"prompt: expected at most the 32 positions of .*embed_positions, got 27 and the 7"):
        run(bart)
    handle.detach()
    assert (traces(t5), traces(bart)) == before
