"""Prompts on embeddings as modules: numbers against plain formulas and models by others, and module manners."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import nn as fnn
from fastprompt.functional import PADDING
from fastprompt.reprogram import Reprogrammed
from fastprompt.taxonomy import Format, Location, Operator, Place

V, D = 23, 8
IDS = torch.tensor([[3, 1, 7, 0], [5, 5, 2, 1]])


def vocabulary():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(7))


PATCHES = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(8))


MODULES = {
    "prompt": (lambda: fnn.PromptTokens(3, D), lambda m, w: m(IDS, w)[0]),
    "prompts, ragged": (
        lambda: fnn.PromptTokens(3, D, prompts=2, lengths=[2, 3], init="uniform"),
        lambda m, w: m(IDS, w, index=torch.tensor([1, 0]), where="after bos")[0],
    ),
    "prompt, mlp": (lambda: fnn.PromptTokens(3, D, reparameterise="mlp", hidden=5), lambda m, w: m(IDS, w)[0]),
    "prompt, lstm": (lambda: fnn.PromptTokens(3, D, reparameterise="lstm", hidden=5), lambda m, w: m(IDS, w)[0]),
    "prompts, low rank": (
        lambda: fnn.PromptTokens(3, D, prompts=2, rank=2),
        lambda m, w: m(IDS, w, index=torch.tensor([1, 0]), where="suffix")[0],
    ),
    "trained words": (lambda: fnn.TrainableTokens([7, 5], D), lambda m, w: m(IDS, w)),
    "map": (lambda: fnn.EmbeddingMap(9, V), lambda m, w: m(IDS, w)),
    "map, sparse": (lambda: fnn.EmbeddingMap(9, V, k=3), lambda m, w: m(IDS, w)),
    "map, drawn": (lambda: fnn.EmbeddingMap(9, V, temperature=0.7), lambda m, w: m(IDS, w)),
    "prototypes": (
        lambda: fnn.PrototypeAttention(6, D, V, prototypes=4, heads=2, dropout=0.1),
        lambda m, w: m(PATCHES.to(w.dtype), w),
    ),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    make, call = MODULES[name]
    return name, make().eval(), call


@pytest.fixture(params=MODULES)
def named(request):
    return made(request.param)


# ---- Every module ----


def test_copies_pickles_state_and_config(named, tmp_path):
    _, module, call = named
    want = call(module, vocabulary())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(call(other, vocabulary()), want)
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    torch.manual_seed(5)
    fresh = type(module)(**module.config()).eval()
    assert not torch.equal(call(fresh, vocabulary()), want)
    fresh.load_state_dict(state)
    assert torch.equal(call(fresh, vocabulary()), want)
    assert repr(fresh) == repr(module)
    Reprogrammed(nn.Identity(), module).save_pretrained(tmp_path)
    other = Reprogrammed.from_pretrained(tmp_path, nn.Identity()).inputs.eval()
    assert type(other) is type(module)
    assert torch.equal(call(other, vocabulary()), want)


def test_dtype_and_device_move(named):
    _, module, call = named
    want = call(module, vocabulary())
    torch.testing.assert_close(call(module.double(), vocabulary().double()).float(), want)
    assert call(module.bfloat16(), vocabulary().bfloat16()).dtype == torch.bfloat16
    module.to("meta")
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))


SLOW = ("prompt, mlp", "prompt, lstm", "prompts, low rank", "map, sparse")  # others' operators, put together in another way


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODULES])
def test_compiles_without_graph_breaks(name):
    name, module, call = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mine, theirs = compiled(module, vocabulary()), call(module, vocabulary())
    torch.testing.assert_close(mine, theirs)
    if theirs.requires_grad:
        parameters = list(module.parameters())
        grads = [torch.autograd.grad(each.square().sum(), parameters) for each in (mine, theirs)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_only_parameters_are_trained_and_all_of_them(named):
    _, module, call = named
    weight = vocabulary().requires_grad_()  # not frozen by its owner: it still gets no gradient
    call(module.train(), weight).square().sum().backward()
    assert weight.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_autocast(named):
    """Moved rows keep the vocabulary's dtype; what is computed is computed in autocast's."""
    name, module, call = named
    with torch.autocast("cpu", torch.bfloat16):
        out = call(module, vocabulary())
    assert out.dtype == (torch.bfloat16 if name == "prototypes" else torch.float32)
    torch.testing.assert_close(out.float(), call(module, vocabulary()), rtol=0.05, atol=0.05)


def test_places_and_printing():
    learned = Format.LEARNABLE, Location.EMBEDDING
    assert fnn.PromptTokens(1, 1).taxonomy == Place(*learned, Operator.CONCATENATIVE)
    for name in ("trained words", "map", "prototypes"):
        assert MODULES[name][0]().taxonomy == Place(*learned, Operator.PARAMETRIC)
    assert repr(fnn.PromptTokens(20, 768)) == "PromptTokens(length=20, width=768, trainable=15,360)"
    assert repr(fnn.TrainableTokens([9, 4], 16)) == "TrainableTokens(ids=[4, 9], width=16, trainable=32)"
    assert repr(fnn.EmbeddingMap(30, 500, k=8)) == "EmbeddingMap(targets=30, sources=500, k=8, trainable=240)"
    text = repr(fnn.PrototypeAttention(6, 8, 23, prototypes=4, heads=2))
    assert text.startswith("PrototypeAttention(\n  in_width=6, width=8, words=23, prototypes=4, heads=2, trainable=")


# ---- PromptTokens ----


def test_a_prompt_goes_where_it_is_told():
    module, weight = fnn.PromptTokens(3, D, prompts=2), vocabulary()
    words, index = F.embedding(IDS, weight), torch.tensor([1, 0])
    soft = module.prompt[index]
    for where, at in (("front", 0), ("after bos", 1), ("suffix", 4)):
        out, mask = module(IDS, weight, index=index, where=where)
        assert torch.equal(out, torch.cat([words[:, :at], soft, words[:, at:]], 1))
        assert mask.dtype == torch.bool
        assert mask.all()
    out, _ = module(IDS, weight, index=index, where=torch.tensor([2, 0]), scale=2.0)
    assert torch.equal(out[0], 2 * torch.cat([words[0, :2], soft[0], words[0, 2:]]))
    assert torch.equal(out[1], 2 * torch.cat([soft[1], words[1]]))
    template = torch.tensor([[-1, 4, -2, PADDING], [3, -3, -1, 2]])
    out, mask = module(template, weight, index=index, where=None)
    zero = torch.zeros(D)
    want = torch.stack([soft[0, 0], weight[4], soft[0, 1], zero, weight[3], soft[1, 2], soft[1, 0], weight[2]])
    assert torch.equal(out.flatten(0, 1), want)
    assert mask.tolist() == [[True, True, True, False], [True] * 4]


def test_a_mixed_batch_with_ragged_prompts_and_none():
    module, weight = fnn.PromptTokens(3, D, prompts=2, lengths=[3, 1]), vocabulary()
    ids, index = torch.cat([IDS, IDS[:1]]), torch.tensor([1, 0, -1])
    words = F.embedding(ids, weight)
    out, mask = module(ids, weight, index=index, mask=torch.ones_like(ids))
    assert mask.tolist() == [[1] * 5 + [0] * 2, [1] * 7, [1] * 4 + [0] * 3]
    for row, n, size in zip(range(3), (1, 0, 0), (1, 3, 0), strict=True):
        assert torch.equal(out[row], torch.cat([module.prompt[n, :size], words[row], torch.zeros(3 - size, D)]))
    left, mask = module(ids, weight, index=index, padding="left")
    assert torch.equal(left[0], torch.cat([torch.zeros(2, D), module.prompt[1, :1], words[0]]))
    assert mask[0].tolist() == [False] * 2 + [True] * 5
    template = torch.tensor([[-1, -2, 4]] * 3)
    out, _ = module(template, weight, index=index, where=None)
    assert torch.equal(out[0], torch.stack([module.prompt[1, 0], torch.zeros(D), weight[4]]))
    assert torch.equal(out[2], torch.stack([torch.zeros(D), torch.zeros(D), weight[4]]))
    alone, _ = fnn.PromptTokens(3, D, lengths=[2], init=module.prompt[0])(IDS, weight)
    assert torch.equal(alone[1], torch.cat([module.prompt[0, :2], words[1], torch.zeros(1, D)]))


def test_a_reparameterisation_runs_once_for_a_batch():
    mlp = fnn.PromptTokens(3, D, prompts=2, reparameterise="mlp", hidden=5)
    first, second, third = mlp.mlp[0], mlp.mlp[2], mlp.mlp[4]
    want = third(torch.relu(second(torch.relu(first(mlp.prompt)))))
    assert torch.equal(mlp.table(), want)
    lstm = fnn.PromptTokens(3, D, reparameterise="lstm", hidden=5)
    assert torch.equal(lstm.table(), lstm.mlp[2](torch.relu(lstm.mlp[0](lstm.lstm(lstm.prompt)[0]))))
    theirs = torch.nn.LSTM(D, 5, num_layers=2, bidirectional=True, batch_first=True)
    theirs.load_state_dict(lstm.lstm.state_dict())
    assert torch.equal(lstm.lstm(lstm.prompt)[0], theirs(lstm.prompt)[0])
    rows = []
    mlp.mlp.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
    mlp(IDS.repeat(50, 1), vocabulary(), index=torch.arange(100) % 2)
    assert rows == [6]


def test_multitask_prompts_are_the_shared_one_times_low_rank():
    torch.manual_seed(0)
    module = fnn.PromptTokens(3, D, prompts=5, rank=2)
    assert module.prompt.shape == (1, 3, D)
    for n in range(5):
        want = module.prompt[0] * (module.task_columns[n] @ module.task_rows[n])
        torch.testing.assert_close(module.table()[n], want)
        torch.testing.assert_close(module.table()[n], module.prompt[0], rtol=0.3, atol=0)  # where it starts


def test_starts():
    weight = vocabulary()
    text = fnn.PromptTokens.from_vocabulary(weight, 5, [3, 7], prompts=2)
    assert torch.equal(text.prompt, weight[[3, 7, 3, 7, 3]].expand(2, -1, -1))
    drawn = fnn.PromptTokens.from_vocabulary(weight, 5, prompts=2, seed=1, lengths=[5, 2])
    assert all((row == weight).all(1).any() for row in drawn.prompt.flatten(0, 1))
    assert not torch.equal(drawn.prompt[0], drawn.prompt[1])
    assert fnn.PromptTokens.from_vocabulary(weight, 4, rank=1, prompts=3).prompt.shape == (1, 4, D)
    given = torch.randn(2, 3, D)
    module = fnn.PromptTokens(3, D, prompts=2, init=given)
    given.zero_()
    assert module.prompt.abs().min() > 0
    assert 0.9 < fnn.PromptTokens(50, 64).prompt.std() < 1.1
    uniform = fnn.PromptTokens(50, 64, init="uniform").prompt
    assert 0.49 < uniform.abs().max() <= 0.5


# ---- TrainableTokens, EmbeddingMap, PrototypeAttention ----


def test_trained_words_start_as_they_are_and_alone_are_trained():
    weight = vocabulary()
    module = fnn.TrainableTokens.from_vocabulary(weight, [7, 5])
    assert torch.equal(module(IDS, weight), F.embedding(IDS, weight))
    with torch.no_grad():
        module.rows.normal_()
    changed = weight.index_copy(0, torch.tensor([5, 7]), module.rows.detach()).requires_grad_()
    out, want = module(IDS, weight), F.embedding(IDS, changed)
    assert torch.equal(out, want)
    g = torch.randn_like(out)
    (mine,), (theirs,) = torch.autograd.grad(out, module.rows, g), torch.autograd.grad(want, changed, g)
    torch.testing.assert_close(mine, theirs[[5, 7]])
    rows = torch.randn(2, D)
    assert torch.equal(fnn.TrainableTokens([7, 5], D, init=rows).rows, rows[[1, 0]])


def test_a_map_is_a_matrix_product():
    weight = vocabulary()
    dense, sparse = fnn.EmbeddingMap(9, V), fnn.EmbeddingMap(9, V, k=3)
    torch.testing.assert_close(dense(IDS, weight), F.embedding(IDS, dense.weight @ weight))
    theta = torch.zeros(9, V).scatter(1, sparse.source, sparse.weight)
    assert all(len(set(row)) == 3 for row in sparse.source.tolist())
    torch.testing.assert_close(sparse(IDS, weight, scale=2.0), 2 * F.embedding(IDS, theta @ weight))
    padded = IDS.masked_fill(IDS == 1, PADDING)
    assert not dense(padded, weight)[padded == PADDING].any()
    drawn = fnn.EmbeddingMap(9, V, temperature=0.1)
    assert torch.equal(drawn.eval()(IDS, weight), F.embedding(IDS, weight[drawn.weight.argmax(1)]))
    torch.manual_seed(0)
    first, second = drawn.train().table(weight), drawn.table(weight)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"ids: expected values from 0 to 8, got \[9\]"):
        dense(IDS.masked_fill(IDS == 7, 9), weight)


def test_patches_attend_to_prototypes():
    torch.manual_seed(0)
    module, weight, x = fnn.PrototypeAttention(6, D, V, prototypes=4, heads=2), vocabulary(), PATCHES
    table = module.words_map(weight.T).T  # as published: a linear map over the vocabulary, with a bias
    torch.testing.assert_close(module.table(weight), table)
    q, k, v = (part.unflatten(-1, (2, 3)) for part in (module.query(x), module.key(table), module.value(table)))
    share = (torch.einsum("blhe,she->bhls", q, k) / math.sqrt(3)).softmax(-1)
    want = module.out(torch.einsum("bhls,she->blhe", share, v).flatten(2))
    torch.testing.assert_close(module(x, weight), want)
    torch.testing.assert_close(module(x, prototypes=module.table(weight)), want)
    assert module(x[:0], weight).shape == (0, 5, D)
    dropped = fnn.PrototypeAttention(6, D, V, prototypes=4, heads=2, dropout=0.5)
    assert not torch.equal(dropped(x, weight), dropped(x, weight))
    assert torch.equal(dropped.eval()(x, weight), dropped(x, weight))


def test_wrong_arguments_are_named():
    weight = vocabulary()
    for message, call in (
        ("length: expected at least 1", lambda: fnn.PromptTokens(0, 4)),
        ("rank: expected at least 1", lambda: fnn.PromptTokens(2, 4, rank=0)),
        ("lengths: expected 2 numbers from 0 to 3", lambda: fnn.PromptTokens(3, 4, prompts=2, lengths=[4, 1])),
        ("init: expected one of", lambda: fnn.PromptTokens(3, 4, init="zeros")),
        (r"init: expected a tensor of \[1, 3, 4\]", lambda: fnn.PromptTokens(3, 4, init=weight)),
        ("init: expected floating point", lambda: fnn.PromptTokens(3, 4, init=torch.zeros(3, 4, dtype=torch.int64))),
        ("init: expected .* with a reparam", lambda: fnn.PromptTokens(3, 4, init=torch.zeros(3, 4), reparameterise="mlp")),
        ("reparameterise: expected one of mlp, lstm", lambda: fnn.PromptTokens(3, 4, reparameterise="gru")),
        ("hidden: expected None", lambda: fnn.PromptTokens(3, 4, hidden=3)),
        ("vocabulary: expected an embedding matrix", lambda: fnn.PromptTokens.from_vocabulary(weight[0], 3)),
        ("ids: expected at least one, each from 0 to 22", lambda: fnn.PromptTokens.from_vocabulary(weight, 3, [23])),
        ("index: expected each sample's prompt", lambda: fnn.PromptTokens(3, D, prompts=2)(IDS, weight)),
        ("ids: expected at least one word", lambda: fnn.TrainableTokens([3, 3], 4)),
        ("ids: expected at least one word", lambda: fnn.TrainableTokens([], 4)),
        (r"init: expected a tensor of \[1, 2, 4\]", lambda: fnn.TrainableTokens([3, 4], 4, init=weight)),
        ("ids: expected vocabulary ids or PADDING", lambda: fnn.TrainableTokens([3], D)(IDS - 1, weight)),
        ("k: expected at most 5", lambda: fnn.EmbeddingMap(3, 5, k=6)),
        ("temperature: expected", lambda: fnn.EmbeddingMap(3, 5, temperature=0.0)),
        ("temperature: expected", lambda: fnn.EmbeddingMap(3, 5, k=2, temperature=1.0)),
        (r"weight: expected \[V_T, 23\]", lambda: fnn.EmbeddingMap(9, 5)(IDS, weight)),
        ("dropout: expected a probability", lambda: fnn.PrototypeAttention(6, D, V, dropout=1.0)),
        (r"patches: expected \[B, L, 6\]", lambda: fnn.PrototypeAttention(6, D, V)(PATCHES[..., :5], weight)),
        (r"vocab_weight: expected \[23, 8\]", lambda: fnn.PrototypeAttention(6, D, V)(PATCHES, weight[:5])),
        ("vocab_weight, prototypes: expected one of", lambda: fnn.PrototypeAttention(6, D, V)(PATCHES)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# ---- Models by others ----


@functools.cache
def models():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V, "intermediate_size": 24}
    llama = transformers.LlamaModel(transformers.LlamaConfig(**common, num_key_value_heads=1))
    bert = transformers.BertModel(transformers.BertConfig(**common, max_position_embeddings=32))
    return {"llama": llama.eval().requires_grad_(False), "bert": bert.eval().requires_grad_(False)}


@pytest.mark.parametrize(
    ("name", "where"), [("llama", "front"), ("llama", "after bos"), ("llama", "suffix"), ("bert", "after bos")]
)
def test_a_model_sees_plain_concatenation(name, where):
    model = models()[name]
    weight = model.get_input_embeddings().weight
    module, mask = fnn.PromptTokens(3, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    rows, seen = module(IDS, weight, where=where, mask=mask)
    got = model(inputs_embeds=rows, attention_mask=seen).last_hidden_state
    words, parts, masks = F.embedding(IDS, weight), [], []
    for b, count in enumerate((4, 3)):
        at = {"front": 0, "after bos": 1, "suffix": count}[where]
        parts.append(torch.cat([words[b, :at], module.prompt[0], words[b, at:]]))
        masks.append(torch.cat([mask[b, :at], torch.ones(3, dtype=torch.int64), mask[b, at:]]))
    assert torch.equal(seen, torch.stack(masks))
    want = model(inputs_embeds=torch.stack(parts), attention_mask=torch.stack(masks)).last_hidden_state
    assert torch.equal(got, want)
    mine, theirs = (torch.autograd.grad(out.square().sum(), module.prompt)[0] for out in (got, want))
    torch.testing.assert_close(mine, theirs)


def test_each_sample_of_a_mixed_batch_is_as_if_alone():
    """Ragged prompts in one batch: the padding that they leave is not seen."""
    model = models()["llama"]
    weight = model.get_input_embeddings().weight
    module = fnn.PromptTokens(3, 16, prompts=2, lengths=[3, 1])
    rows, seen = module(IDS, weight, index=torch.tensor([1, 0]))
    got = model(inputs_embeds=rows, attention_mask=seen).last_hidden_state
    for b, (n, size) in enumerate(((1, 1), (0, 3))):
        alone = torch.cat([module.prompt[n, :size], F.embedding(IDS[b], weight)])[None]
        torch.testing.assert_close(got[b : b + 1, : 4 + size], model(inputs_embeds=alone).last_hidden_state)
