"""Prefixes, deep and soft prompts and the attention that takes them: numbers against plain formulas, and module manners."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import nn as fnn
from fastprompt.reprogram import Reprogrammed
from fastprompt.taxonomy import Format, Location, Operator, Place

MODULES = {
    "prefix": lambda: fnn.PrefixKV(3, 2, 5, 4),
    "prefix, tasks and sinks": lambda: fnn.PrefixKV(3, 2, 5, 4, prompts=2, frozen=2),
    "prefix, reparameterised": lambda: fnn.PrefixKV(3, 2, 5, 4, prompts=2, hidden=7, width=6),
    "deep": lambda: fnn.DeepPrompt(3, 5, 8, patch=4),
    "deep, projected": lambda: fnn.DeepPrompt(4, 5, 8, which=[0, 2], project=3, project_each=True),
    "deep, shared": lambda: fnn.DeepPrompt(3, 5, 8, shared=True, dropout=0.5),
    "soft": lambda: fnn.SoftPrompt(5, 8, prompts=2),
}


def flat(out) -> list[Tensor]:
    """The tensors of whatever a module gives."""
    if isinstance(out, Tensor):
        return [out]
    return [tensor for part in out if part is not None for tensor in flat(part)]


@pytest.fixture(params=MODULES)
def named(request):
    torch.manual_seed(0)
    return request.param, MODULES[request.param]().eval()


# ---- Every prompt ----


def test_copies_pickles_and_state(named):
    name, module = named
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(*pair) for pair in zip(flat(other()), flat(module()), strict=True))
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    torch.manual_seed(5)
    fresh = MODULES[name]().eval()
    assert not all(torch.equal(*pair) for pair in zip(flat(fresh()), flat(module()), strict=True))
    fresh.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(flat(fresh()), flat(module()), strict=True))
    torch.save(state, io.BytesIO())


def test_constructor_arguments_come_back(named):
    _, module = named
    other = type(module)(**module.config()).eval()
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(*pair) for pair in zip(flat(other()), flat(module()), strict=True))
    assert repr(other) == repr(module)
    assert other.taxonomy == module.taxonomy


def test_a_checkpoint_names_the_class(named, tmp_path):
    _, module = named
    Reprogrammed(nn.Identity(), module).save_pretrained(tmp_path)
    other = Reprogrammed.from_pretrained(tmp_path, nn.Identity()).inputs.eval()
    assert type(other) is type(module)
    assert all(torch.equal(*pair) for pair in zip(flat(other()), flat(module()), strict=True))


def test_dtype_and_device_move(named):
    _, module = named
    assert all(tensor.dtype == torch.float64 for tensor in flat(module.double()()))
    assert all(tensor.dtype == torch.bfloat16 for tensor in flat(module.bfloat16()()))
    assert all(tensor.is_meta for tensor in flat(module.to("meta")()))


def test_compiles_without_graph_breaks(named):
    _, module = named
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    mine, theirs = flat(compiled()), flat(module())
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    parameters = list(module.parameters())
    ones = [torch.autograd.grad(sum(t.square().sum() for t in each), parameters) for each in (mine, theirs)]
    assert all(torch.equal(*pair) for pair in zip(*ones, strict=True))


def test_autocast_computes_in_its_dtype(named):
    """Plain parameters stay as they are; the maps of a reparameterisation and a projection are computed in bfloat16."""
    name, module = named
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.bfloat16 if "ed" in name.split(", ")[-1] and "shared" not in name else torch.float32
        assert {tensor.dtype for tensor in flat(module())} == {wanted}


def test_only_parameters_are_trained(named):
    _, module = named
    sum(tensor.square().sum() for tensor in flat(module())).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    assert all(not buffer.requires_grad for buffer in module.buffers())


def test_places_in_the_taxonomy():
    hidden = Place(Format.LEARNABLE, Location.HIDDEN, Operator.CONCATENATIVE)
    assert fnn.PrefixKV(1, 1, 1, 1).taxonomy == fnn.DeepPrompt(1, 1, 1).taxonomy == hidden
    assert fnn.SoftPrompt(1, 1).taxonomy == Place(Format.LEARNABLE, Location.EMBEDDING, Operator.CONCATENATIVE)
    assert fnn.PromptAttention(4, 2).taxonomy == Place(location=Location.HIDDEN, operator=Operator.CONCATENATIVE)


def test_printing_says_what_it_is():
    assert repr(fnn.SoftPrompt(20, 768)) == "SoftPrompt(length=20, width=768, trainable=15,360)"
    text = repr(fnn.PrefixKV(12, 8, 10, 64, frozen=1, dropout=0.1))
    assert text == "PrefixKV(layers=12, kv_heads=8, length=10, head_dim=64, frozen=1, dropout=0.1, trainable=110,592)"
    assert "patch=[16, 16], trainable=460,800" in repr(fnn.DeepPrompt(12, 50, 768, patch=16))
    assert repr(fnn.PromptAttention(8, 2)).startswith("PromptAttention(\n  8, heads=2, batch_first=False")


# ---- PrefixKV ----


def test_the_reparameterisation_is_prefix_tunings_and_runs_once():
    """Linear - Tanh - Linear of an embedding, PEFT's view of its output: [P, 2L, Hkv, D], 2l keys and 2l + 1 values."""
    layers, heads, length, dim = 3, 2, 5, 4
    module = fnn.PrefixKV(layers, heads, length, dim, hidden=7, prompts=2)
    rows = []
    module.mlp.register_forward_hook(lambda mlp, args, out: rows.append(args[0].shape[:-1].numel()))
    got = module()
    assert rows == [2 * length]
    first, second = module.mlp[0], module.mlp[2]
    out = F.linear(torch.tanh(F.linear(module.embedding, first.weight, first.bias)), second.weight, second.bias)
    assert module.embedding.shape == (2, length, heads * dim)
    past = out.view(2, length, layers * 2, heads, dim).permute(2, 0, 3, 1, 4).split(2)
    for (keys, values), each in zip(got, past, strict=True):
        assert torch.equal(keys, each[0])
        assert torch.equal(values, each[1])
        assert keys.is_contiguous()
        assert values.is_contiguous()


@pytest.mark.parametrize("prompts", [1, 2])
def test_pefts_layout_and_back(prompts):
    layers, heads, length, dim = 3, 2, 5, 4
    stored = torch.randn(length, 2 * layers * heads * dim) if prompts == 1 else torch.randn(2, length, 2 * layers * heads * dim)
    module = fnn.PrefixKV.from_flat(stored, layers, heads, frozen=1)
    assert torch.equal(module.flat(), stored)
    assert module.prefix.shape == (layers, 2, prompts, heads, length - 1, dim)
    past = stored.reshape(prompts, length, 2 * layers, heads, dim).permute(2, 0, 3, 1, 4)
    for layer, pair in enumerate(module()):
        assert torch.equal(pair[0], past[2 * layer])
        assert torch.equal(pair[1], past[2 * layer + 1])


def test_the_layout_is_pefts_own():
    peft = pytest.importorskip("peft", reason="needs transformers")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        num_layers=3,
        num_attention_heads=2,
        token_dim=8,
        num_transformer_submodules=1,
    )
    encoder = peft.PrefixEncoder(config)
    stored = encoder(torch.arange(5))
    module = fnn.PrefixKV.from_flat(stored, 3, 2)
    past = stored[None].view(1, 5, 6, 2, 4).permute(2, 0, 3, 1, 4).split(2)  # PeftModel.get_prompt
    for pair, theirs in zip(module(), past, strict=True):
        assert all(torch.equal(*each) for each in zip(pair, theirs, strict=True))


def test_a_cache_and_frozen_sinks():
    pairs = [(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)) for _ in range(3)]
    module = fnn.PrefixKV(3, 2, 5, 4, prompts=2, init=pairs, frozen=2)
    for mine, given in zip(module(), pairs, strict=True):
        assert all(torch.equal(one, other.expand(2, -1, -1, -1)) for one, other in zip(mine, given, strict=True))
    sum(part.sum() for pair in module() for part in pair).backward()
    assert torch.equal(module.prefix.grad, torch.ones(3, 2, 2, 2, 3, 4))
    assert module.sink.shape == (3, 2, 2, 2, 2, 4)
    assert set(module.state_dict()) == {"prefix", "sink"}
    pairs[0][0].zero_()
    assert module()[0][0].abs().min() > 0, "the given tensors are copied"


def test_dropout_on_a_prefix_is_one_draw():
    module = fnn.PrefixKV(3, 2, 50, 4, dropout=0.25)
    kept = torch.stack([torch.stack(pair) for pair in module()])
    share = (kept == 0).float().mean()
    assert 0.2 < share < 0.3
    torch.testing.assert_close(kept[kept != 0], module.stacked()[kept != 0] / 0.75)
    assert not any((part == 0).any() for pair in module.eval()() for part in pair)


# ---- DeepPrompt and SoftPrompt ----


def test_vpts_init():
    """uniform in [-v, v], v = sqrt(6 / (3 * 16 * 16 + 768)), and Kaiming with fan_out for the projection."""
    torch.manual_seed(0)
    v = math.sqrt(6 / (3 * 16 * 16 + 768))
    prompt = fnn.DeepPrompt(12, 50, 768, patch=16).prompt
    assert prompt.abs().max() <= v
    assert prompt.abs().max() > 0.99 * v
    torch.testing.assert_close(prompt.std(), torch.tensor(v / math.sqrt(3)), rtol=0.01, atol=0)
    module = fnn.DeepPrompt(12, 50, 768, patch=(16, 8), project=64)
    assert 0.99 * math.sqrt(6 / (3 * 128 + 64)) < module.prompt.abs().max() <= math.sqrt(6 / (3 * 128 + 64))
    torch.testing.assert_close(module.projections[0].weight.std(), torch.tensor(math.sqrt(2 / 768)), rtol=0.02, atol=0)


def test_which_layers_and_projections():
    module = fnn.DeepPrompt(4, 5, 8, which=[0, 2], project=3, project_each=True)
    out = module()
    assert [None if part is None else tuple(part.shape) for part in out] == [(1, 5, 8), None, (1, 5, 8), None]
    assert torch.equal(out[2][0], module.projections[1](module.prompt[1]))
    one = fnn.DeepPrompt(4, 5, 8, project=3)
    assert torch.equal(one()[3][0], one.projections[0](one.prompt[3]))
    shared = fnn.DeepPrompt(4, 5, 8, shared=True)
    assert all(torch.equal(part, shared.prompt) for part in shared())


def test_dropout_shared_or_a_sample():
    shared = fnn.DeepPrompt(2, 50, 8, dropout=0.5)
    assert shared(3)[0].shape == (1, 50, 8)
    assert 0.3 < (shared()[0] == 0).float().mean() < 0.7
    each = fnn.DeepPrompt(2, 50, 8, dropout=0.5, per_sample=True)
    out = each(3)
    assert out[0].shape == (3, 50, 8)
    assert not torch.equal(out[0][0], out[0][1])
    kept = out[1][2] != 0
    torch.testing.assert_close(out[1][2][kept], 2 * each.prompt[1][kept])
    assert each.eval()(3)[0].shape == (1, 50, 8), "without dropout the samples share one prompt"
    with pytest.raises(ValueError, match="batch: expected the number of samples"):
        each.train()()


def test_soft_prompts_start_from_the_vocabulary():
    vocabulary = torch.randn(11, 8)
    text = fnn.SoftPrompt.from_vocabulary(vocabulary, 5, [3, 7], prompts=2)
    assert torch.equal(text(), vocabulary[[3, 7, 3, 7, 3]].expand(2, -1, -1))
    assert torch.equal(fnn.SoftPrompt.from_vocabulary(vocabulary, 2, torch.tensor([3, 7, 9]))()[0], vocabulary[[3, 7]])
    drawn = fnn.SoftPrompt.from_vocabulary(vocabulary, 5, prompts=2, seed=1)
    assert all((row == vocabulary).all(1).any() for row in drawn().flatten(0, 1))
    assert not torch.equal(*drawn())
    assert torch.equal(drawn(), fnn.SoftPrompt.from_vocabulary(vocabulary, 5, prompts=2, seed=1)())
    with torch.no_grad():
        text.prompt.zero_()
    assert vocabulary.abs().min() > 0, "the vocabulary's rows are copied"


def test_soft_prompts_of_tasks():
    module = fnn.SoftPrompt(5, 8, prompts=3)
    index = torch.tensor([2, 0, 2, 1])
    assert torch.equal(module(index), module.prompt[index])
    assert module.prompt.abs().max() <= 0.5
    with pytest.raises(ValueError, match=r"index: expected values from 0 to 2, got \[3\]"):
        module(torch.tensor([0, 3]))


# ---- PromptAttention ----


def pair(batch_first: bool, bias: bool = True):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    return theirs, fnn.PromptAttention.from_module(theirs)


def sequences(batch_first: bool, *sizes: int) -> list[Tensor]:
    made = [torch.randn(3, size, 8, dtype=torch.float64) for size in sizes]
    return made if batch_first else [x.transpose(0, 1) for x in made]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_multihead_attention(batch_first, bias, padded):
    theirs, mine = pair(batch_first, bias)
    mask = torch.arange(6) >= torch.tensor([6, 3, 1])[:, None] if padded else None
    own, query = sequences(batch_first, 6, 4)
    for inputs in ((own, own, own), (query, own, own), (query, own, own.flip(0) * 2)):
        want, _ = theirs(*inputs, key_padding_mask=mask, need_weights=False)
        got, weights = mine(*inputs, key_padding_mask=mask)
        assert weights is None
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    if not padded:
        want, _ = theirs(own, own, own, attn_mask=causal, is_causal=True, need_weights=False)
        got, _ = mine(own, own, own, attn_mask=causal, is_causal=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        alone = own[0] if batch_first else own[:, 0]
        torch.testing.assert_close(mine(alone, alone, alone)[0], theirs(alone, alone, alone)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_prompt_tokens_are_tokens_of_the_input(batch_first, bias):
    theirs, mine = pair(batch_first, bias)
    (own,) = sequences(batch_first, 6)
    prompt = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) >= torch.tensor([6, 3, 1])[:, None]
    axis = 1 if batch_first else 0
    tokens = prompt[None].expand(3, -1, -1) if batch_first else prompt[:, None].expand(-1, 3, -1)
    both = torch.cat([tokens, own], axis)
    want, _ = theirs(own, both, both, key_padding_mask=F.pad(mask, (5, 0)), need_weights=False)
    got, _ = mine(own, own, own, key_padding_mask=mask, prompt=prompt)
    other, _ = mine(own, own, own, key_padding_mask=mask, prefix=mine.project(prompt[None]))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    mine_g, theirs_g = (torch.autograd.grad(out, prompt, g)[0] for out in (got, want))
    torch.testing.assert_close(mine_g, theirs_g, rtol=1e-11, atol=1e-11)


def test_a_prefix_by_index_and_length():
    _, mine = pair(True)
    (own,) = sequences(True, 6)
    keys, values = torch.randn(2, 2, 2, 5, 4, dtype=torch.float64)
    index, lengths = torch.tensor([1, -1, 0]), torch.tensor([5, 2])
    got, _ = mine(own, own, own, prefix=(keys, values), prefix_index=index, prefix_lengths=lengths)
    alone = [
        mine(own[:1], own[:1], own[:1], prefix=(keys[1:, :, :2], values[1:, :, :2]))[0],
        mine(own[1:2], own[1:2], own[1:2])[0],
        mine(own[2:], own[2:], own[2:], prefix=(keys[:1], values[:1]))[0],
    ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_state_is_multihead_attentions_own():
    theirs, mine = pair(True)
    assert isinstance(mine, nn.MultiheadAttention)
    assert all(one is other for one, other in zip(mine.parameters(), theirs.parameters(), strict=True))
    fresh = fnn.PromptAttention(8, 2, batch_first=True).double()
    fresh.load_state_dict(theirs.state_dict())
    (own,) = sequences(True, 6)
    assert torch.equal(fresh(own, own, own)[0], mine(own, own, own)[0])
    theirs.load_state_dict(fresh.state_dict())
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(own, own, own)[0], mine(own, own, own)[0])


def test_attention_compiles_and_autocasts():
    mine = fnn.PromptAttention(8, 2, batch_first=True)
    own, prompt = torch.randn(3, 6, 8), torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    out = compiled(own, own, own, prompt=prompt)[0]
    torch.testing.assert_close(out, mine(own, own, own, prompt=prompt)[0])
    (g,) = torch.autograd.grad(out.square().sum(), prompt)
    (want,) = torch.autograd.grad(mine(own, own, own, prompt=prompt)[0].square().sum(), prompt)
    torch.testing.assert_close(g, want)
    with torch.autocast("cpu", torch.bfloat16):
        low = mine(own, own, own, prompt=prompt)[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), out, rtol=0.05, atol=0.05)


def test_checkpointing_gives_the_same_gradient():
    _, mine = pair(True)
    (own,) = sequences(True, 6)
    prompt = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def run(tokens: Tensor) -> Tensor:
        return mine(own, own, own, prompt=tokens)[0]

    (want,) = torch.autograd.grad(run(prompt).square().sum(), prompt)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, prompt, use_reentrant=False).square().sum(), prompt)
    assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_code_that_calls_sdpa(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 6, 4, dtype=torch.float64) for heads in (4, 2, 2))
    prefix = (torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    got = fnn.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    seen = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    mask = seen[:, None, None].expand(-1, 1, 6, -1)
    mask = mask & torch.ones(6, 6, dtype=torch.bool).tril() if causal else mask
    both = [torch.cat([ahead.expand(3, -1, -1, -1), own], 2) for ahead, own in zip(prefix, (k, v), strict=True)]
    want = F.scaled_dot_product_attention(q, *both, attn_mask=F.pad(mask, (5, 0), value=True), enable_gqa=True)
    got = fnn.scaled_dot_product_attention(q, k, v, seen[:, None, None], is_causal=causal, enable_gqa=True, prefix=prefix)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- Two processes ----


class Block(nn.Module):
    """A prompted block with everything that is trained in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = fnn.PromptAttention(8, 2, batch_first=True).requires_grad_(False)
        self.prefix = fnn.PrefixKV(1, 2, 5, 4, hidden=7)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, prefix=self.prefix()[0])[0]


def _ddp(rank: int, meeting: str, results: str) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 6, 8)
    parallel = nn.parallel.DistributedDataParallel(block)
    parallel(x[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in block.prefix.parameters()], results)
    # The wrapper holds the process group: without it nothing is left to end while the interpreter shuts down.
    del parallel, block
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_average_the_gradient(tmp_path):
    results = str(tmp_path / "gradients")
    torch.multiprocessing.spawn(_ddp, (str(tmp_path / "meeting"), results), nprocs=2)
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 6, 8)
    block(x).square().mean().backward()
    for mine, parameter in zip(torch.load(results, weights_only=True), block.prefix.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


# ---- What is wrong is said ----

Q = torch.randn(2, 3, 8)
S = torch.randn(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.PrefixKV(0, 2, 5, 4), "layers: expected at least 1, got 0"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, prompts=0), "prompts: expected at least 1, got 0"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, init="ones"), "init: expected one of normal, zeros, got 'ones'"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, frozen=5), "frozen: expected 0 to 4, so that something is trained, got 5"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, dropout=1.0), "dropout: expected a probability below 1, got 1.0"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, width=6), "width: expected None without a reparameterisation, got 6"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, hidden=0), "hidden: expected at least 1, got 0"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, hidden=6, frozen=1), "frozen: expected 0 with a reparameterisation, got 1"),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, hidden=6, init=[]), 'init: expected "normal" with a reparameterisation'),
        (lambda: fnn.PrefixKV(3, 2, 5, 4, init=[(S, S)]), "init: expected 3 pairs of keys and values, one a layer, got 1"),
        (lambda: fnn.PrefixKV(1, 2, 5, 4, init=[(S, S)]), r"init: expected keys and values of \[1, 2, 5, 4\], got"),
        (lambda: fnn.PrefixKV.from_flat(torch.zeros(5, 7), 3, 2), r"flat: expected \[P, 2 \* 3 \* 2 \* D\]"),
        (lambda: fnn.DeepPrompt(3, 0, 8), "length: expected at least 1, got 0"),
        (lambda: fnn.DeepPrompt(3, 5, 8, which=[3]), "which: expected rising layer numbers from 0 to 2"),
        (lambda: fnn.DeepPrompt(3, 5, 8, which=[1, 0]), "which: expected rising layer numbers"),
        (lambda: fnn.DeepPrompt(3, 5, 8, which=[]), "which: expected rising layer numbers"),
        (lambda: fnn.DeepPrompt(3, 5, 8, patch=0), "patch: expected a positive size"),
        (lambda: fnn.DeepPrompt(3, 5, 8, project=0), "project: expected at least 1, got 0"),
        (lambda: fnn.DeepPrompt(3, 5, 8, project_each=True), "project_each: expected False without a projection, got True"),
        (lambda: fnn.SoftPrompt(5, 0), "width: expected at least 1, got 0"),
        (lambda: fnn.SoftPrompt(5, 8, init="text"), "init: expected one of uniform, normal, zeros, got 'text'"),
        (lambda: fnn.SoftPrompt(5, 8, init=torch.zeros(4, 8)), r"init: expected \[5, 8\] or \[1, 5, 8\], got \[4, 8\]"),
        (lambda: fnn.SoftPrompt(5, 8, init=torch.zeros(5, 8).long()), "init: expected floating point embeddings"),
        (lambda: fnn.SoftPrompt.from_vocabulary(torch.zeros(9), 5), r"vocabulary: expected an embedding matrix \[V, width\]"),
        (lambda: fnn.SoftPrompt.from_vocabulary(torch.zeros(9, 8), 5, [9]), r"ids: expected at least one, each from 0 to 8"),
        (lambda: fnn.SoftPrompt.from_vocabulary(torch.zeros(9, 8), 5, []), "ids: expected at least one"),
        (lambda: fnn.PromptAttention(8, 3), "embed_dim: expected a multiple of num_heads=3, got 8"),
        (lambda: fnn.PromptAttention.from_module(nn.MultiheadAttention(8, 2, kdim=4)), "module: expected one without kdim"),
        (lambda: fnn.PromptAttention.from_module(nn.MultiheadAttention(8, 2, add_bias_kv=True)), "module: expected one without"),
        (lambda: fnn.PromptAttention(8, 2)(Q, Q, Q, need_weights=True), "need_weights: expected False"),
        (lambda: fnn.PromptAttention(8, 2)(Q, Q, Q, attn_mask=torch.zeros(2, 2)), "attn_mask: expected None, or is_causal=True"),
        (lambda: fnn.PromptAttention(8, 2, 0.1)(Q, Q, Q), "dropout: expected 0, or eval mode"),
        (lambda: fnn.PromptAttention(8, 2)(Q, Q, Q, prefix=(S, S), prompt=Q), "prefix, prompt: expected at most one"),
        (lambda: fnn.PromptAttention(8, 2)(Q, Q, Q, prompt=Q[..., :4]), r"prompt: expected \[P, 8\] or \[N, P, 8\], got"),
        (lambda: fnn.scaled_dot_product_attention(S, S, S, dropout_p=0.1), "dropout_p: expected 0"),
        (lambda: fnn.scaled_dot_product_attention(S, S[:, :1], S[:, :1]), "key: expected 2 heads, or enable_gqa=True, got 1"),
        (lambda: fnn.scaled_dot_product_attention(S[:, :, :2], S, S, is_causal=True), "is_causal: expected as many queries as k"),
        (lambda: fnn.scaled_dot_product_attention(S, S, S, torch.zeros(3, 3)), r"attn_mask: expected bool \[2, 1, 1, 3\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn.MultiheadAttention, got Linear"):
        fnn.PromptAttention.from_module(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"key_padding_mask: expected bool, got torch\.float32"):
        fnn.PromptAttention(8, 2)(Q, Q, Q, key_padding_mask=torch.zeros(3, 2))
