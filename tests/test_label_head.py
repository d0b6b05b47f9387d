"""Heads that compute only label columns, against the whole head in float64, then the index."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastprompt.functional import fold, label_columns, label_head, map_labels, mapped_cross_entropy, segments
from tests.compare import check

WORDS = segments([[3, 11], [40], [7, 3, 9], [22, 23], [5]], 50)  # tokens of every word
CLASSES = segments([[0, 2], [1], [4, 3]], 5)  # words of every class
TOKENS = segments([[3, 11, 40], [7], [9, 22]], 50, weights=[[0.5, 0.2, 0.3], [1.0], [0.0, 2.0]])
INDEX = torch.tensor([4, 49, 4, 0])


def head(dtype=torch.float32, shape=(6, 16)):
    generator = torch.Generator().manual_seed(0)
    make = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    return make(*shape).requires_grad_(), make(50, 16).requires_grad_(), make(50).requires_grad_()


def whole(hidden, weight, bias, full=False):
    scores = F.linear(hidden.double(), weight.double(), bias.double())
    return scores.log_softmax(1) if full else scores


@pytest.mark.parametrize("full", [False, True], ids=["columns", "full"])
@pytest.mark.parametrize("labels", [INDEX, TOKENS], ids=["index", "segments"])
def test_the_label_head_equals_the_whole_head(labels, full):
    hidden, weight, bias = head()
    target = torch.tensor([0, 2, 1, -100, 2, 0])
    truth = map_labels(whole(hidden, weight, bias, full), labels)
    for columns in (weight, label_columns(labels, weight, bias)):
        given = (columns, bias, labels) if columns is weight else (columns,)
        out = label_head(hidden, *given, full=full)
        rival = map_labels(whole(hidden.detach(), weight.detach(), bias.detach(), full), labels).float()
        check(out, truth, rival, factor=4, ulps=16)
        loss = label_head(hidden, *given, target=target, full=full, focal=2.0)
        want = mapped_cross_entropy(whole(hidden, weight, bias, full), labels, target, focal=2.0)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(loss, (hidden, weight, bias))
        for d, true in zip(got, torch.autograd.grad(want, (hidden, weight, bias)), strict=True):
            torch.testing.assert_close(d, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("full", [False, True], ids=["columns", "full"])
@pytest.mark.parametrize("tokens", ["first", "mean", "max"])
def test_words_of_several_tokens(tokens, full, of):
    hidden, weight, bias = head()
    scores = whole(hidden, weight, bias, full)
    words = torch.stack(
        [
            {"first": part[:, 0], "mean": part.mean(1), "max": part.amax(1)}[tokens]
            for part in (scores[:, list(t)] for t in ((3, 11), (40,), (7, 3, 9), (22, 23), (5,)))
        ],
        1,
    )
    if of == "probabilities":
        p = words.exp() if full else words.softmax(1)  # the whole vocabulary's, or the words'
        truth = torch.stack([p[:, [0, 2]].mean(1), p[:, 1], p[:, [4, 3]].mean(1)], 1).log()
    else:
        truth = torch.stack([words[:, [0, 2]].mean(1), words[:, 1], words[:, [4, 3]].mean(1)], 1)
    out = label_head(hidden, weight, bias, (WORDS, CLASSES), tokens=tokens, full=full, of=of)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    columns = label_columns((WORDS, CLASSES), weight, bias, tokens=tokens)
    assert torch.equal(label_head(hidden, columns, full=full, of=of), out)


def test_rows():
    hidden, weight, bias = head(shape=(4, 5, 16))
    rows = torch.tensor([0, -1, 3, -5])
    chosen = hidden[torch.arange(4), rows]
    want = label_head(chosen, weight, bias, INDEX)
    out = label_head(hidden, weight, bias, INDEX, rows=rows)
    assert torch.equal(out, want)
    assert torch.equal(*(torch.autograd.grad(t.square().sum(), hidden)[0] for t in (out, want)))
    flat = hidden.flatten(0, 1)
    assert torch.equal(
        label_head(flat, weight, bias, INDEX, rows=torch.tensor([7, -1])), label_head(flat[[7, -1]], weight, bias, INDEX)
    )
    transposed = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(label_head(transposed, weight, bias, INDEX, rows=rows), want)


def test_only_what_needs_a_gradient_and_no_second_one():
    hidden, weight, bias = head()
    out = label_head(hidden.detach(), weight.detach(), bias, TOKENS, full=True)
    assert torch.autograd.grad(out.sum(), bias)[0].isfinite().all()
    out = label_head(hidden, weight.detach(), None, TOKENS, full=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folded_head_gives_the_mapped_logits(dtype):
    hidden, weight, bias = head(dtype)
    matrix = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    scores = F.linear(hidden.double(), weight.double(), bias.double())
    for labels, reduce in ((INDEX, None), (matrix, None), *((TOKENS, r) for r in ("mean", "sum", "weighted", "first"))):
        folded = fold(labels, weight, bias, reduce=reduce)
        assert folded[0].dtype == folded[1].dtype == dtype
        out = F.linear(hidden.double(), *(part.double() for part in folded))
        near = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(out, map_labels(scores, labels, reduce=reduce), rtol=near, atol=near)
    assert fold(TOKENS, weight)[1] is None


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda h, w, b: label_head(h, w, b), ValueError, "labels: expected"),
        (lambda h, w, b: label_head(h, label_columns(INDEX, w), b), ValueError, "weight: expected either"),
        (lambda h, w, b: label_head(h[None], w, b, INDEX), ValueError, r"rows: expected int64 \[B\]"),
        (lambda h, w, b: label_head(h[:, :3], w, b, INDEX), ValueError, "hidden: expected .* d = 16"),
        (lambda h, w, b: label_head(h, w, b, INDEX, rows=torch.tensor([6])), ValueError, r"rows: expected positions.*\[6\]"),
        (lambda h, w, b: label_head(h, w, b, segments([[1]], 7)), ValueError, "labels: expected a map of 50 sources"),
        (lambda h, w, b: label_head(h, w, b, INDEX + 1), ValueError, "labels: expected values from 0 to 49"),
        (lambda h, w, b: label_head(h, w, b, (WORDS, TOKENS)), ValueError, "labels: expected classes over 5 words"),
        (lambda h, w, b: label_columns(INDEX, w, tokens="last"), ValueError, "tokens: expected one of"),
        (lambda h, w, b: label_columns(INDEX, w, b[:3]), ValueError, r"bias: expected a floating point \[50\]"),
        (lambda h, w, b: fold(TOKENS, w, reduce="max"), ValueError, "reduce: expected one of mean, sum"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(*head())
