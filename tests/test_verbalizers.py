"""Verbalizers: numbers against plain formulas and real model classes, calibration, trained words, and module manners."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import nn as fnn
from fastprompt.reprogram import Reprogrammed
from fastprompt.taxonomy import Alignment, Place

V, D = 40, 12
SINGLE = [[3, 7, 1], [20], [5, 39]]
MULTI = [[[3], [7, 1, 7]], [[20, 21]], [[5], [39, 1, 2]]]
PRIOR = [0.1, 0.4, 0.2, 0.05, 0.25]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    made = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    made.weight.copy_(rand(V, D, seed=1))
    if bias:
        made.bias.copy_(rand(V, seed=2))
    return made


# ---- The formulas, sample after sample in float64 ----


def word_scores(row: list[float], words, tokens) -> list[float]:
    out = []
    for word in (word for each in words for word in each):
        parts = [row[t] for t in ([word] if isinstance(word, int) else word)]
        out.append({"first": parts[0], "mean": sum(parts) / len(parts), "max": max(parts)}[tokens or "first"])
    return out


def log_softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    total = top + math.log(math.fsum(math.exp(s - top) for s in scores))
    return [s - total for s in scores]


def class_scores(logits: Tensor, words, *, tokens=None, of="log-probabilities", reduce="mean", prior=None) -> Tensor:
    rows = []
    for row in logits.double().tolist():
        s = word_scores(row, words, tokens)
        if of == "logits":
            values = [a - math.log(p) for a, p in zip(s, prior or [1.0] * len(s), strict=True)]
        else:  # divided by the prior, normalised again
            p = [math.exp(a) / b for a, b in zip(log_softmax(s), prior or [1.0] * len(s), strict=True)]
            values = [a / math.fsum(p) for a in p]
            values = values if of == "probabilities" else list(map(math.log, values))
        out, at = [], 0
        for each in words:
            part, at = values[at : at + len(each)], at + len(each)
            value = {"mean": sum(part) / len(part), "sum": sum(part), "max": max(part), "first": part[0]}[reduce]
            out.append(math.log(value) if of == "probabilities" else value)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)


CASES = [
    {}, {"reduce": "max"}, {"reduce": "first"}, {"prior": PRIOR}, {"of": "logits"}, {"of": "logits", "prior": PRIOR},
    {"of": "probabilities", "reduce": "sum", "prior": PRIOR}, {"of": "probabilities"}, {"of": "probabilities", "reduce": "max"},
    *({"tokens": tokens, "prior": PRIOR} for tokens in ("first", "mean", "max")),
    {"tokens": "max", "of": "probabilities"}, {"tokens": "mean", "of": "logits", "reduce": "max"},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_formula(case):
    words = MULTI if "tokens" in case else SINGLE
    if "prior" in case:
        case = case | {"prior": PRIOR[: sum(map(len, words))] + [0.3] * (sum(map(len, words)) - 5)}
    verbalizer = fnn.Verbalizer(words, V, **case).double()
    if "prior" in case:
        verbalizer.log_prior.copy_(torch.tensor(case["prior"], dtype=torch.float64).log())  # was rounded to float32
    lm, hidden, target = head(), rand(4, 6, D, dtype=torch.float64), torch.tensor([2, 0, -100, 1])
    rows = torch.tensor([0, -1, 3, -6])
    logits = lm(hidden)[torch.arange(4), rows]
    want = class_scores(logits, words, **case)
    for got in (verbalizer.from_logits(logits), verbalizer(logits), verbalizer.attach(lm)(hidden, rows)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    flat = torch.tensor([0, 11, 15, 18])
    torch.testing.assert_close(verbalizer(hidden.flatten(0, 1), flat), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(verbalizer(hidden[torch.arange(4), rows]), want, rtol=0, atol=1e-12)
    loss = F.cross_entropy(want, target)
    torch.testing.assert_close(verbalizer.loss(hidden, target, rows), loss, rtol=0, atol=1e-12)


def test_the_gradient_reaches_what_is_upstream_and_not_the_head():
    for kind in (fnn.Verbalizer(SINGLE, V), fnn.Verbalizer(MULTI, V, tokens="max"), fnn.KnowledgeableVerbalizer(SINGLE, V)):
        verbalizer, lm = kind.double(), head()
        verbalizer.attach(lm)
        prompt = rand(1, D, dtype=torch.float64).requires_grad_()
        hidden, target = rand(5, D, dtype=torch.float64, seed=4), torch.tensor([0, 1, 2, 1, 0])

        def loss(prompt, verbalizer=verbalizer, hidden=hidden, target=target):
            return verbalizer.loss((hidden + prompt).tanh(), target)

        assert torch.autograd.gradcheck(loss, prompt)
        (fused,) = torch.autograd.grad(loss(prompt), prompt)
        plain = F.cross_entropy(verbalizer((hidden + prompt).tanh()), target)
        torch.testing.assert_close(fused, torch.autograd.grad(plain, prompt)[0], rtol=0, atol=1e-12)
        assert lm.weight.grad is lm.bias.grad is None


# ---- The head ----


def test_a_frozen_head_is_gathered_once_and_never_stale():
    lm, hidden, target = head(), rand(3, D, dtype=torch.float64), torch.tensor([0, 2, 1])
    verbalizer = fnn.Verbalizer(MULTI, V, tokens="mean").double().attach(lm)
    verbalizer(hidden)
    gathered = verbalizer._gathered
    with torch.inference_mode():
        verbalizer(hidden)
    assert verbalizer._gathered is gathered

    def replaced():
        lm.weight = nn.Parameter(lm.weight * 2, requires_grad=False)

    def loaded():
        lm.load_state_dict({"weight": lm.weight + 1, "bias": lm.bias - 1})

    for change in (
        lambda: lm.weight.add_(1), lambda: lm.bias.mul_(2), replaced, loaded,
        lambda: verbalizer.calibrate(rand(V, dtype=torch.float64)),
        lambda: setattr(lm.weight, "data", lm.weight.data + 1), lambda: lm.load_state_dict(head().state_dict(), assign=True),
    ):  # fmt: skip
        change()
        for p in lm.parameters():
            p.requires_grad_(False)
        torch.testing.assert_close(verbalizer(hidden), verbalizer.from_logits(lm(hidden)), rtol=0, atol=1e-12)
        plain = F.cross_entropy(verbalizer(hidden), target)
        torch.testing.assert_close(verbalizer.loss(hidden, target), plain, rtol=0, atol=1e-12)
    for _ in range(20):  # the allocator likes to give an address again
        for _ in range(2):
            lm.weight.data = torch.randn_like(lm.weight)
        torch.testing.assert_close(verbalizer(hidden), verbalizer.from_logits(lm(hidden)), rtol=0, atol=1e-12)
    lm.weight.data.mul_(2)
    torch.testing.assert_close(verbalizer.attach(lm)(hidden), verbalizer.from_logits(lm(hidden)), rtol=0, atol=1e-12)
    assert verbalizer._gathered.classes[0].shape == (3, D)
    assert not verbalizer._gathered.words[0].requires_grad
    with torch.inference_mode():
        fresh = fnn.Verbalizer(SINGLE, V).double().attach(lm)
        fresh(hidden)
    fresh(hidden.requires_grad_()).sum().backward()  # what inference mode gathered can be trained through
    fresh = fnn.Verbalizer(SINGLE, V).double().attach(lm)
    torch.func.vmap(fresh.word_logits)(hidden[:, None])
    assert fresh._gathered is None  # what a transform or a mode makes is not kept


@pytest.mark.parametrize("tokens", ["first", "mean", "max"])
def test_a_trainable_head_gets_gradients_in_the_label_rows(tokens):
    lm, hidden = head().requires_grad_(), rand(3, D, dtype=torch.float64)
    verbalizer = fnn.Verbalizer(MULTI, V, tokens=tokens).double().attach(lm)
    target = torch.tensor([0, 2, 1])
    verbalizer.loss(hidden, target).backward()
    mine = lm.weight.grad, lm.bias.grad
    lm.zero_grad()
    F.cross_entropy(verbalizer.from_logits(lm(hidden)), target).backward()
    for got, want in zip(mine, (lm.weight.grad, lm.bias.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    with torch.no_grad():
        lm.weight.add_(1)
        torch.testing.assert_close(verbalizer(hidden), verbalizer.from_logits(lm(hidden)), rtol=0, atol=1e-12)


def test_the_head_is_not_the_verbalizers():
    lm = head()
    verbalizer = fnn.Verbalizer(SINGLE, V).double().attach(lm)
    hidden = rand(2, D, dtype=torch.float64)
    want = verbalizer(hidden)
    assert list(verbalizer.state_dict()) == ["log_prior"]
    assert not list(verbalizer.parameters())
    assert len(pickle.dumps(verbalizer)) < 20_000
    loaded = pickle.loads(pickle.dumps(verbalizer))
    with pytest.raises(ValueError, match=r"hidden: expected a head \(call attach first\), or logits \[B, 40\] without rows"):
        loaded(hidden)
    torch.testing.assert_close(loaded.attach(lm)(hidden), want, rtol=0, atol=0)
    both = nn.ModuleDict({"verbalizer": verbalizer, "lm": lm})
    other = copy.deepcopy(both)
    assert other["verbalizer"]._head[1] is other["lm"]
    other["lm"].weight.add_(1)
    torch.testing.assert_close(verbalizer(hidden), want, rtol=0, atol=0)
    assert not torch.equal(other["verbalizer"](hidden), want)


def models() -> dict[str, nn.Module]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    small = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": V}
    return {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**small)),
        "roberta": transformers.RobertaForMaskedLM(transformers.RobertaConfig(**small)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=D, n_layer=1, n_head=2, vocab_size=V)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=1)),
    }


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_real_models(name):
    torch.manual_seed(0)
    model = models()[name].double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)  # biases and norms that matter
    ids, rows = torch.randint(5, V, (3, 7)), torch.tensor([2, -1, 0])
    hidden = model.base_model(ids).last_hidden_state
    logits = model(ids).logits[torch.arange(3), rows]
    for verbalizer in (
        fnn.Verbalizer(SINGLE, V),
        fnn.Verbalizer(MULTI, V, tokens="mean"),
        fnn.Verbalizer(MULTI, V, tokens="max"),
    ):
        verbalizer.double().attach(model)
        want = class_scores(logits, verbalizer.words, tokens=verbalizer.tokens)
        torch.testing.assert_close(verbalizer(hidden, rows), want, rtol=0, atol=1e-10)
    transform, weight, bias = fnn.label_head_of(model)
    torch.testing.assert_close(F.linear(transform(hidden), weight, bias), model(ids).logits, rtol=0, atol=1e-10)
    soft = fnn.SoftVerbalizer.from_words(fnn.Verbalizer(MULTI, V, tokens="mean").double().attach(model)).double()
    means = [sum(sum(row[t] for t in word) / len(word) for word in each) / len(each) for row in logits for each in MULTI]
    torch.testing.assert_close(soft(hidden, rows), torch.stack(means).view(3, 3), rtol=1e-6, atol=1e-6)


def test_other_heads_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a BERT, .*, got Linear; pass LabelHead"):
        fnn.label_head_of(nn.Linear(2, 2))
    model = models()["gpt2"]

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="got Scaled"):
        fnn.label_head_of(Scaled(model.config))
    with pytest.raises(TypeError, match="got NonDynamicallyQuantizableLinear"):
        fnn.Verbalizer(SINGLE, V).attach(nn.modules.linear.NonDynamicallyQuantizableLinear(D, V))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match=r"a plain nn.Linear as its vocabulary head, got Sequential"):
        fnn.label_head_of(model)


# ---- Words as text ----


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["[UNK]", "[MASK]", "great", "good", "bad", "un", "##believ", "##able", "fine", "##ly"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]")


def test_words_of_text(tokenizer):
    verbalizer = fnn.Verbalizer.from_text({"positive": ["great", "good"], "negative": "bad"}, tokenizer, reduce="max")
    assert verbalizer.words == [[[2], [3]], [[4]]]
    assert verbalizer.names == ["positive", "negative"]
    assert (verbalizer.num_tokens, verbalizer.num_classes, verbalizer.reduce) == (10, 2, "max")
    both = {"positive": ["unbelievable", "fine"], "negative": ["bad"]}
    many = fnn.KnowledgeableVerbalizer.from_text(both, tokenizer, multi_token="mean", num_tokens=64)
    assert many.words == [[[5, 6, 7], [8]], [[4]]]
    assert (type(many), many.tokens, many.num_tokens) == (fnn.KnowledgeableVerbalizer, "mean", 64)


def test_the_prefix_chooses_the_token():
    """Byte-level BPE, as GPT-2 has it: a word with a space in front is another token."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({"o": 0, "k": 1, "ok": 2, "\u0120": 3, "\u0120ok": 4}, [("o", "k"), ("\u0120", "ok")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    assert fnn.Verbalizer.from_text({"a": "ok"}, bpe).words == [[[4]]]
    assert fnn.Verbalizer.from_text({"a": "ok"}, bpe, prefix="").words == [[[2]]]


@pytest.mark.parametrize(
    ("words", "options", "match"),
    [
        ({"a": ["great", "awful"]}, {}, r"words of the vocabulary, got 'awful' of class 'a', which becomes \['\[UNK\]'\]"),
        (
            {"a": ["unbelievable"]},
            {},
            r"one token, got 'unbelievable' of class 'a', which becomes \['un', '##believ', '##able'\]",
        ),
        ({"a": ["good", "bad"], "b": ["bad"]}, {}, "the same for 'bad' of class 'a' and 'bad' of class 'b'"),
        ({"a": ["good", "good"]}, {}, "the same for 'good' of class 'a' and 'good' of class 'a'"),
        (
            {"a": ["fine"], "b": ["finely"]},
            {"multi_token": "first"},
            "the same for 'fine' of class 'a' and 'finely' of class 'b'",
        ),
        ({"a": ["good"], "b": []}, {}, "at least one word for every class, got none for class 'b'"),
        ({"a": ["good", " "]}, {}, "words of text for class 'a', got ' '"),
        ({"a": [3]}, {}, "words of text for class 'a', got 3"),
        ({}, {}, "at least one class, got none"),
        ({"a": ["bad"]}, {"num_tokens": 3}, "token ids from 0 to 2, got 'bad' of class 'a'"),
        ({"a": ["bad"]}, {"multi_token": "last"}, "multi_token: expected one of"),
    ],
)
def test_words_that_are_refused(tokenizer, words, options, match):
    with pytest.raises(ValueError, match=match):
        fnn.Verbalizer.from_text(words, tokenizer, **options)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: fnn.Verbalizer([[1], [1]], V), ValueError, r"the same for tokens \[1\] of class 0 and tokens \[1\] of class 1"),
        (lambda: fnn.Verbalizer([[[1, 2]], [[2, 1]]], V, tokens="mean"), ValueError, "words with scores of their own"),
        (lambda: fnn.Verbalizer([[[1, 2]]], V), ValueError, r'one token a word, or tokens="first", .* \[1, 2\] of class 0'),
        (lambda: fnn.Verbalizer([[V]], V), ValueError, r"token ids from 0 to 39, got tokens \[40\] of class 0"),
        (lambda: fnn.Verbalizer([[-1]], V), ValueError, "token ids"),
        (lambda: fnn.Verbalizer([[[]]], V), ValueError, "token ids"),
        (lambda: fnn.Verbalizer([[1.0]], V), TypeError, "float|token ids"),
        (lambda: fnn.Verbalizer([["a"]], V), TypeError, "words: expected token ids"),
        (lambda: fnn.Verbalizer([[True]], V), TypeError, "words: expected token ids"),
        (lambda: fnn.Verbalizer(SINGLE, V, reduce="sum"), ValueError, "reduce: expected one of mean, max, first, got 'sum'"),
        (lambda: fnn.Verbalizer(SINGLE, V, of="words"), ValueError, "of: expected"),
        (lambda: fnn.Verbalizer(SINGLE, V, names=["a"]), ValueError, "names: expected 3"),
        (lambda: fnn.Verbalizer([[1], [2]], V, prior=[1.0, 0.0]), ValueError, "prior: expected positive numbers"),
        (lambda: fnn.Verbalizer([[1], [2]], V, prior=[1.0]), ValueError, "prior: expected positive numbers"),
        (lambda: fnn.Verbalizer(SINGLE, V).attach(nn.Linear(D, V + 1)), ValueError, r"head: expected .* \[40, d\]"),
        (lambda: fnn.Verbalizer(SINGLE, V)(rand(2, D)), ValueError, "call attach first"),
        (lambda: fnn.Verbalizer(SINGLE, V).from_logits(rand(2, D)), ValueError, r"logits: expected \[B, 40\]"),
        (lambda: fnn.Verbalizer(SINGLE, V).attach(head())(rand(2, D + 1)), ValueError, "hidden: expected"),
        (lambda: fnn.Verbalizer(SINGLE, V).attach(head())(rand(2, 3, D)), ValueError, "rows: expected"),
        (lambda: fnn.Verbalizer(SINGLE, V).attach(head())(rand(2, 3, D), torch.tensor([0, 3])), ValueError, "rows: expected"),
        (lambda: fnn.Verbalizer(SINGLE, V).calibrate(), ValueError, "logits or hidden, one of them, got none"),
        (lambda: fnn.Verbalizer(SINGLE, V).calibrate(rand(0, V)), ValueError, "at least one input"),
        (lambda: fnn.Verbalizer([[0], [1]], 2).calibrate(torch.tensor([0, -torch.inf])), ValueError,
         r"share for every label word, got none for tokens \[1\] of class 1"),
        (lambda: fnn.KnowledgeableVerbalizer(SINGLE, V).refine(torch.arange(V), 0.6), ValueError, "none for class 0"),
        (lambda: fnn.KnowledgeableVerbalizer(SINGLE, V).refine(torch.arange(V - 1)), ValueError, r"prior: expected \[40\]"),
        (lambda: fnn.SoftVerbalizer(0, D), ValueError, "num_classes"),
        (lambda: fnn.SoftVerbalizer(3, D).attach(nn.Linear(D + 1, V)), ValueError, r"head: expected a weight \[V, 12\]"),
        (lambda: fnn.SoftVerbalizer.from_words(fnn.Verbalizer(SINGLE, V)), ValueError, "call attach first"),
        (lambda: fnn.PrototypicalVerbalizer(3, D, 0), ValueError, "size"),
        (lambda: fnn.ContextualCalibration(3, "probabilities")(rand(2, 3)), ValueError, "probabilities, rows that sum to 1"),
        (lambda: fnn.ContextualCalibration(3)(rand(2, 4)), ValueError, r"scores: expected a floating point \[B, 3\]"),
        (lambda: fnn.ContextualCalibration(2, "probabilities").calibrate(torch.tensor([[1.0, 0.0]])), ValueError,
         "some probability for every class, got 0.0 for class 1"),
    ],
)  # fmt: skip
def test_errors_are_sentences(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ---- Calibration ----


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_calibration_measures_the_prior(average):
    verbalizer = fnn.Verbalizer(MULTI, V, tokens="mean").double()
    support, logits = rand(6, V, dtype=torch.float64, seed=3), rand(4, V, dtype=torch.float64)
    words = [word_scores(row, MULTI, "mean") for row in support.tolist()]
    if average == "logits":
        prior = [math.exp(p) for p in log_softmax([sum(column) / 6 for column in zip(*words, strict=True)])]
    else:
        prior = [sum(math.exp(p) for p in column) / 6 for column in zip(*map(log_softmax, words), strict=True)]
    assert verbalizer.calibrate(support, average=average) is verbalizer
    torch.testing.assert_close(verbalizer.log_prior.exp(), torch.tensor(prior, dtype=torch.float64), rtol=0, atol=1e-14)
    want = class_scores(logits, MULTI, tokens="mean", prior=prior)
    torch.testing.assert_close(verbalizer(logits), want, rtol=0, atol=1e-12)
    lm, hidden = head(), rand(6, D, dtype=torch.float64)
    by_hidden = fnn.Verbalizer(SINGLE, V).double().attach(lm).calibrate(hidden=hidden, average=average)
    by_logits = fnn.Verbalizer(SINGLE, V).double().calibrate(lm(hidden), average=average)
    torch.testing.assert_close(by_hidden.log_prior, by_logits.log_prior, rtol=0, atol=1e-12)
    one = fnn.Verbalizer(SINGLE, V).double().calibrate(logits[0], average=average)
    torch.testing.assert_close(one(logits[:1]).exp(), torch.full((1, 3), 1 / 6, dtype=torch.float64))  # no content, no opinion


def test_contextual_calibration_is_a_diagonal_matrix():
    free, scores = rand(5, 3, dtype=torch.float64, seed=1), rand(4, 3, dtype=torch.float64)
    prior = free.softmax(1).mean(0)
    want = scores.softmax(1) @ torch.diag(1 / prior)
    want = want / want.sum(1, keepdim=True)
    logits, probabilities = fnn.ContextualCalibration(3).double(), fnn.ContextualCalibration(3, "probabilities").double()
    for module in (logits, probabilities):
        before = module(scores.softmax(1).log() if module is logits else scores.softmax(1))
        torch.testing.assert_close(before.exp() if module is logits else before, scores.softmax(1))
    logits.calibrate(free)
    probabilities.calibrate(free.softmax(1))
    torch.testing.assert_close(logits(scores).exp(), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(probabilities(scores.softmax(1)), want, rtol=0, atol=1e-14)
    target = torch.tensor([0, 2, 1, 1])
    nll = F.nll_loss(want.log(), target)
    torch.testing.assert_close(logits.loss(scores, target), nll)
    torch.testing.assert_close(probabilities.loss(scores.softmax(1), target), nll)
    assert probabilities(torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]


# ---- Weights and vectors that are trained ----


def test_word_weights_are_a_softmax_over_a_class():
    verbalizer = fnn.KnowledgeableVerbalizer(SINGLE, V).double()
    logits, target = rand(4, V, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(verbalizer(logits), class_scores(logits, SINGLE), rtol=0, atol=1e-12)
    with torch.no_grad():
        verbalizer.word_weights.copy_(rand(6, dtype=torch.float64, seed=5) * 3)
    verbalizer.calibrate(rand(V, dtype=torch.float64, seed=6))
    prior = verbalizer.log_prior.exp().tolist()
    a = verbalizer.word_weights

    def formula(a):
        columns = []
        for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
            words = [word for each in SINGLE for word in each]
            log_p = class_scores(logits, [[word] for word in words], prior=prior)
            columns.append(log_p[:, part] @ a[part].softmax(0))
        return torch.stack(columns, 1)

    torch.testing.assert_close(verbalizer(logits), formula(a), rtol=0, atol=1e-12)
    want = torch.autograd.grad(F.cross_entropy(formula(a), target), a)[0]
    (got,) = torch.autograd.grad(verbalizer.loss(logits, target), a)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    (got,) = torch.autograd.grad(F.cross_entropy(verbalizer(logits), target), a)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_refining_drops_words_the_model_hardly_says():
    verbalizer = fnn.KnowledgeableVerbalizer(MULTI, V, tokens="mean", names=["a", "b", "c"]).double()
    verbalizer.calibrate(rand(V, dtype=torch.float64))
    with torch.no_grad():
        verbalizer.word_weights.copy_(torch.arange(5.0))
    prior = torch.ones(V)
    prior[[2, 7]] = 0  # one token of a word is enough
    refined = verbalizer.attach(head()).refine(prior, share=2 / V)
    assert refined.words == [[[3]], [[20, 21]], [[5]]]
    assert refined.word_weights.tolist() == [0, 2, 3]
    assert torch.equal(refined.log_prior, verbalizer.log_prior[[0, 2, 3]])
    assert refined.names == verbalizer.names
    assert refined(rand(2, D, dtype=torch.float64)).shape == (2, 3)
    assert verbalizer.refine(prior, share=0).words == verbalizer.words


def test_soft_vectors_start_as_the_mean_of_the_label_rows_and_train():
    lm = head(torch.float32)
    soft = fnn.SoftVerbalizer.from_words(fnn.Verbalizer(SINGLE, V).attach(lm))
    hidden = rand(4, 5, D)
    rows = torch.tensor([1, 2, 3, -1])
    states = hidden[torch.arange(4), rows]
    want = torch.stack([lm(states)[:, each].mean(1) for each in SINGLE], 1)
    torch.testing.assert_close(soft(hidden, rows), want)
    soft.loss(hidden, torch.tensor([0, 1, 2, 0]), rows).backward()
    assert all(p.grad.abs().max() > 0 for p in soft.parameters())
    assert lm.weight.grad is None
    no_bias = fnn.SoftVerbalizer.from_words(fnn.Verbalizer(SINGLE, V).attach(lm), bias=False)
    torch.testing.assert_close(no_bias(hidden, rows), want - soft.bias)
    assert no_bias(hidden.bfloat16(), rows).dtype == torch.float32


def test_prototypes_are_cosines_and_contrast():
    proto = fnn.PrototypicalVerbalizer(3, D, 5).double()
    hidden, target = rand(7, D, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 0, 1, -100])
    z, m = hidden @ proto.project.weight.T, proto.prototypes
    cosine = F.cosine_similarity(z[:, None], m[None], dim=-1)
    torch.testing.assert_close(proto(hidden), cosine, rtol=0, atol=1e-14)
    similar = F.cosine_similarity(z[:, None], z[None], dim=-1)
    terms = []
    for j in range(6):
        others = sum(similar[k, j].exp() for k in range(6) if target[k] != target[j])
        terms += [-(s := similar[i, j]) + (s.exp() + others).log() for i in range(6) if target[i] == target[j]]
    want = F.cross_entropy(cosine[:6], target[:6]) + sum(terms) / len(terms)
    loss = proto.loss(hidden, target)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-13)
    for got, formula in zip(*(torch.autograd.grad(x, list(proto.parameters())) for x in (loss, want)), strict=True):
        torch.testing.assert_close(got, formula, rtol=0, atol=1e-13)
    proto.zero_grad()
    alone = proto.loss(hidden[:2] * torch.tensor([[1.0], [0.0]]), torch.tensor([1, 1]))  # one class, a state of zeros
    alone.backward()
    assert all(p.grad.isfinite().all() for p in proto.parameters())
    torch.testing.assert_close(alone, F.cross_entropy(torch.stack([cosine[0], torch.zeros(3)]).double(), torch.tensor([1, 1])))


# ---- Numerics ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_never_gives_nan(dtype):
    """Classes with 1 and with 3 words, a certain word and impossible ones: OpenPrompt's log(p + 1e-15) is NaN here in float16."""
    logits = torch.zeros(3, V, dtype=dtype)
    logits[0, 3], logits[1, 20], logits[2, :] = 6e4, -6e4, -6e4
    for options in ({}, {"of": "probabilities", "reduce": "sum"}, {"of": "logits"}):
        verbalizer = fnn.Verbalizer(SINGLE, V, **options)
        got = verbalizer(logits)
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        torch.testing.assert_close(got, class_scores_safe(logits, options).float(), rtol=1e-6, atol=1e-5)
        x = logits.clone().requires_grad_()
        loss = verbalizer.loss(x, torch.tensor([1, 1, 0]))
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


def class_scores_safe(logits: Tensor, options: dict[str, str]) -> Tensor:
    log_p = logits.double()[:, [word for each in SINGLE for word in each]]
    log_p = log_p if options.get("of") == "logits" else log_p.log_softmax(1)
    parts = log_p.split([len(each) for each in SINGLE], 1)
    return torch.stack([p.logsumexp(1) if options.get("of") == "probabilities" else p.mean(1) for p in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_head_is_computed_in_half_precision(dtype):
    """The scores of a half precision head are as near to the truth as the rounding of its logits allows."""
    lm, hidden = head(dtype), rand(64, D, dtype=dtype)
    verbalizer = fnn.Verbalizer(MULTI, V, tokens="mean").attach(lm)
    want = class_scores(F.linear(hidden.double(), lm.weight.double(), lm.bias.double()), MULTI, tokens="mean")
    size = F.linear(hidden.double().abs(), lm.weight.double().abs(), lm.bias.double().abs()).amax()
    assert (verbalizer(hidden) - want).abs().max() < 4 * torch.finfo(dtype).eps * size
    assert verbalizer(hidden).dtype == torch.float32


def test_autocast_and_large_offsets():
    lm, hidden = head(torch.float32), rand(8, D)
    for module in (fnn.Verbalizer(SINGLE, V).attach(lm), fnn.SoftVerbalizer(3, D), fnn.PrototypicalVerbalizer(3, D)):
        with torch.autocast("cpu", torch.bfloat16):
            got, loss = module(hidden), module.loss(hidden, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
        assert got.dtype == loss.dtype == torch.float32
        torch.testing.assert_close(got, module(hidden), rtol=0.05, atol=0.1)
    logits = rand(8, V, dtype=torch.float64)
    moved = fnn.Verbalizer(SINGLE, V)(logits + 1e6)
    torch.testing.assert_close(moved, class_scores(logits, SINGLE), rtol=0, atol=1e-8)


# ---- Manners of modules ----

MODULES = {
    "words": lambda: fnn.Verbalizer(SINGLE, V, names=["a", "b", "c"]),
    "words of several tokens": lambda: fnn.Verbalizer(MULTI, V, tokens="mean", of="probabilities", reduce="sum"),
    "largest token": lambda: fnn.Verbalizer(MULTI, V, tokens="max", reduce="max"),
    "weighted words": lambda: fnn.KnowledgeableVerbalizer(MULTI, V, tokens="first"),
    "soft": lambda: fnn.SoftVerbalizer(3, D, bias=False),
    "prototypes": lambda: fnn.PrototypicalVerbalizer(3, D, 5),
    "contextual": lambda: fnn.ContextualCalibration(3),
}


def scramble(module: nn.Module) -> nn.Module:
    for seed, tensor in enumerate(module.state_dict().values()):
        tensor.copy_(rand(*tensor.shape, seed=seed).abs() + 0.1)
    return module


def example(module: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(module, fnn.ContextualCalibration):
        return (rand(4, 3),)
    if isinstance(module, fnn.Verbalizer):
        return (rand(4, V),) if module._head is None else (rand(4, 5, D), torch.tensor([0, -1, 2, 3]))
    return (rand(4, 5, D), torch.tensor([0, -1, 2, 3]))


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return scramble(MODULES[request.param]())


def test_copies_pickles_state_and_arguments(module, tmp_path):
    x = example(module)
    want = module(*x)
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    rebuilt = type(module)(**json.loads(json.dumps(module.config())))
    assert not torch.equal(rebuilt(*x), want)
    rebuilt.load_state_dict(state)
    Reprogrammed(nn.Identity(), outputs=module).save_pretrained(tmp_path)
    stored = Reprogrammed.from_pretrained(tmp_path, nn.Identity()).outputs
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), rebuilt, stored):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert other.taxonomy == module.taxonomy
        assert torch.equal(other(*x), want)


def test_moves_and_conversions_do_not_spoil_the_maps(module):
    x = example(module)
    want = module(*x)
    state = copy.deepcopy(module.state_dict())
    module.to("meta")
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    if not isinstance(module, fnn.KnowledgeableVerbalizer):  # matrices know no autocast there
        assert module(*(t.to("meta") for t in x)).is_meta
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(*x), want)
    assert module.double()(*(t.double() if t.is_floating_point() else t for t in x)).dtype == torch.float64


def test_compiles_without_graph_breaks(module):
    torch._dynamo.reset()
    if isinstance(module, fnn.Verbalizer):
        transform = nn.Sequential(nn.Linear(D, D), nn.GELU()).requires_grad_(False)
        module.attach(fnn.LabelHead(transform, head(torch.float32).weight))
    elif isinstance(module, fnn.SoftVerbalizer):
        module.attach(head(torch.float32))
    x = tuple(t.requires_grad_() if t.is_floating_point() else t for t in example(module))
    target = torch.tensor([0, 1, 2, 1])

    def step(x, *rest):
        return module(x, *rest), module.loss(x, target, *rest)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*x), step(*x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    trained = [x[0], *(p for p in module.parameters())]
    ones = [torch.autograd.grad(sum(out.sum() for out in f(*x)), trained, allow_unused=True) for f in (compiled, step)]
    for got, want in zip(*ones, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_places_in_the_taxonomy():
    trained, fixed = fnn.KnowledgeableVerbalizer(SINGLE, V), fnn.KnowledgeableVerbalizer(SINGLE, V).requires_grad_(False)
    for module, alignment in (
        (fnn.Verbalizer(SINGLE, V), Alignment.STRUCTURAL), (fixed, Alignment.STRUCTURAL), (trained, Alignment.LINEAR),
        (fnn.SoftVerbalizer(2, 2), Alignment.LINEAR), (fnn.PrototypicalVerbalizer(2, 2), Alignment.LINEAR),
        (fnn.ContextualCalibration(2), Alignment.STATISTICAL),
    ):  # fmt: skip
        assert module.taxonomy == Place(alignment=alignment)


def test_printing_says_what_it_is():
    verbalizer = fnn.Verbalizer(MULTI, V, tokens="mean")
    said = "40 tokens -> 5 words -> 3, reduce=mean, tokens=mean, of=log-probabilities"
    assert repr(verbalizer) == f"Verbalizer({said})"
    assert repr(verbalizer.attach(head())) == f"Verbalizer({said}, attached)"
    assert repr(fnn.SoftVerbalizer(3, 12)) == "SoftVerbalizer(12 -> 3, bias=True)"


def test_a_prompt_learns_through_a_verbalizer():
    """A frozen language model, a trained prompt in front of it: the loss falls, and the model stays as it was."""
    torch.manual_seed(0)
    model = models()["gpt2"].eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    verbalizer = fnn.Verbalizer([[3, 4], [5]], V).attach(model)
    prompt = fnn.SoftPrompt(4, D)
    ids, target = torch.randint(V, (8, 5)), torch.tensor([0, 1] * 4)
    ids[:, 0] = target + 10
    embeddings = model.get_input_embeddings()(ids)
    optimizer, losses = torch.optim.Adam(prompt.parameters(), lr=0.1), []
    for _ in range(25):
        x = torch.cat([prompt.prompt.expand(8, -1, -1), embeddings], 1)
        hidden = model.transformer(inputs_embeds=x).last_hidden_state
        loss = verbalizer.loss(hidden, target, torch.full((8,), -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_class_reads_is_a_matrix_and_a_picture():
    from matplotlib.figure import Figure

    logits = rand(4, V)
    known = fnn.KnowledgeableVerbalizer(SINGLE, V)
    with torch.no_grad():
        known.word_weights.copy_(rand(6))
    for module in (fnn.Verbalizer(SINGLE, V), known):
        words = logits[:, [word for each in SINGLE for word in each]]
        want = words.log_softmax(1).float() @ module.dense()
        torch.testing.assert_close(module.from_logits(logits), want, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(fnn.ContextualCalibration(2).dense(), torch.diag(torch.tensor([2.0, 2.0])))
    torch.testing.assert_close(fnn.SoftVerbalizer(3, D).dense().diagonal(), torch.ones(3))
    torch.testing.assert_close(fnn.PrototypicalVerbalizer(3, D).dense().diagonal(), torch.ones(3))
    ax = known.plot([f"word {i}" for i in range(6)], ["a", "b", "c"], ax=Figure().subplots())
    assert {label.get_text() for label in ax.get_yticklabels()} == {f"word {i}" for i in range(6)}
