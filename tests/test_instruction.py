"""Prompt instruction: the outputs of the joined ids, from a context that is run once.

Float64 to 1e-9 on small models of transformers' own classes with random weights; the plain form is written here.
"""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fastprompt
from fastprompt import nn as fnn
from fastprompt.answers import Choice
from fastprompt.hoist import Inexact, prefixed
from fastprompt.instruction import ChainOfThought, Demonstrations, Instruction
from fastprompt.methods import table
from fastprompt.taxonomy import Alignment, Format, Location, Operator, Place
from tests.test_attach import model_of
from tests.test_hoist import VOCABULARY, bert, frozen, gpt2, llama

transformers = pytest.importorskip("transformers", reason="needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs transformers")

MODELS = {"llama": llama, "gpt2": gpt2}
WORDS = ["<unk>", "<s>", "Review", "Feeling", ":", "good", "bad", "N", "/", "A", ".", "Q", "so", "The", "answer", "is"]
WORDS += [f"w{i}" for i in range(VOCABULARY - len(WORDS))]
TEMPLATE = "Review: {text}\nFeeling: {label}"
EXAMPLES = [
    {"text": "w0 w1 w2", "label": "good"}, {"text": "w3", "label": "bad", "id": 7}, {"text": "w4 w5", "label": "good"},
    {"text": "w6 w7 w8 w9", "label": "bad"},
]  # fmt: skip
QUERIES = ["w10 w11", "w12", "w13 w14 w15 w16"]


def tokenizer(bos: bool = False):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    )
    if bos:
        words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>" if bos else None)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.replace(":", " : ").split()]


CONTEXT = [i for each in EXAMPLES for i in ids(f"Review: {each['text']} Feeling: {each['label']}")]


def asked(query: str) -> list[int]:
    return ids(f"Review: {query} Feeling:")


def plain(model, rows: list[list[int]]) -> Tensor:
    """[B, V] of the last token of each row, every row run alone."""
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def ready(name: str = "llama", prompt=None, bos: bool = False, **options):
    model = frozen(MODELS[name], **({"bos_token_id": 1, "eos_token_id": None} if name == "llama" else {}))
    return (Demonstrations(EXAMPLES, TEMPLATE) if prompt is None else prompt).on(model, tokenizer(bos), **options)


def encoder(texts: list[str]) -> Tensor:
    """Words as directions: texts are near when they share them."""
    return torch.stack([torch.eye(len(WORDS))[ids(text)].sum(0) for text in texts])


# ---- A shared context ----


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("queries", [QUERIES[:1] * 2, QUERIES], ids=["one length", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_joined_ids(name, queries, bos):
    made = ready(name, bos=bos)
    rows = [[1] * bos + CONTEXT + asked(query) for query in queries]
    assert [[*context, *own] for (context,), own in made.encode(queries)] == rows
    want = plain(made.model, rows)
    near(made.logits(queries), want)
    assert (want - plain(made.model, [asked(query) for query in queries])).abs().max() > 0.1, "the context does nothing"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_says_what_the_joined_ids_say(name, cache):
    made = ready(name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = []
    for query in QUERIES:
        row = torch.tensor([CONTEXT + asked(query)])
        want.append(made.model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist())
    got = made.generate(QUERIES, cache_implementation=cache, **options)
    assert [ids(text) for text in got] == want
    assert len({tuple(each) for each in want}) == 3
    several = made.generate(QUERIES[:2], num_beams=3, num_return_sequences=2, **options)
    row = torch.tensor([CONTEXT + asked(QUERIES[1])])
    beams = made.model.generate(row, attention_mask=torch.ones_like(row), num_beams=3, num_return_sequences=2, **options)
    assert [ids(text) for text in several[1]] == beams[:, row.shape[1] :].tolist()


@pytest.mark.parametrize("retrieved", [False, True])
@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma3ForCausalLM", "Qwen3ForCausalLM", "OPTForCausalLM"])
def test_windows_and_other_positions(name, retrieved):
    """A window counts tokens, and no padding between context and query."""
    model, options = model_of(name), {"k": 2, "encoder": encoder} if retrieved else {}
    made = Demonstrations(EXAMPLES, TEMPLATE, **options).on(model, tokenizer())
    rows = [[*context, *own] for (context,), own in made.encode(QUERIES)]
    near(made.logits(QUERIES), plain(model, rows))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1, "num_beams": 2}
    for row, text in zip(rows, made.generate(QUERIES, **options), strict=True):
        row = torch.tensor([row])
        assert model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist() == ids(text)


def test_a_verbalizer_reads_the_label_words_alone():
    made = ready()
    words = fnn.Verbalizer.from_text({"no": "bad", "yes": ["good", "so"]}, made.tokenizer, num_tokens=VOCABULARY)
    want = words(plain(made.model, [CONTEXT + asked(query) for query in QUERIES]))
    near(made.scores(QUERIES, words), want)
    near(made.scores(QUERIES, copy.deepcopy(words).attach(made.model)), want)


def test_an_instruction_stands_in_front():
    made = ready(prompt=Instruction("w20 w21", "Review: {text}\nFeeling:"))
    near(made.logits(QUERIES), plain(made.model, [ids("w20 w21") + asked(query) for query in QUERIES]))
    made = ready(prompt=Demonstrations(EXAMPLES[:1], TEMPLATE, text="w20 w21", separator=" w22 "))
    want = ids("w20 w21 w22 Review: w0 w1 w2 Feeling: good w22")
    assert made.encode(["w10"]) == [([want], asked("w10"))]
    assert ready(prompt=Instruction("")).encode(["w1"]) == [([[]], ids("w1"))]
    empty = ready(prompt=Instruction("", "Review: {text}\nFeeling:"))
    near(empty.logits(QUERIES), plain(empty.model, [asked(query) for query in QUERIES]))


def test_bos_is_in_front_once():
    made = ready(bos=True, prompt=Instruction("<s> w1"))
    assert made.encode(["w2"]) == [([[1, *ids("w1")]], ids("w2"))]
    assert ready(bos=True, prompt=Instruction("")).encode(["w2"]) == [([[1]], ids("w2"))]


def test_the_model_is_left_as_it_was():
    made = ready()
    row = torch.tensor([CONTEXT])
    before, attention = made.model(input_ids=row).logits, made.model.config._attn_implementation
    made.logits(QUERIES)
    with pytest.raises(ValueError, match="multiple of 3 rows"), made.reading(QUERIES) as batch:
        made.model(batch["input_ids"][:2])
    assert made.model.config._attn_implementation == attention
    assert torch.equal(made.model(input_ids=row).logits, before)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in made.model.modules())


# ---- Which examples ----


def labels_of(prompt: Demonstrations, queries=QUERIES) -> list[list[str]]:
    """The examples' texts in each context."""
    return [[line[8:] for line in context[0].split("\n") if line.startswith("Review")] for context in prompt.contexts(queries)]


def test_order_and_choice():
    texts = [each["text"] for each in EXAMPLES]
    assert labels_of(Demonstrations(EXAMPLES, TEMPLATE))[0] == texts
    assert labels_of(Demonstrations(EXAMPLES, TEMPLATE, k=2))[0] == texts[:2]
    orders = {tuple(labels_of(Demonstrations(EXAMPLES, TEMPLATE, order="random", seed=seed))[0]) for seed in range(20)}
    assert len(orders) > 5
    assert all(sorted(each) == sorted(texts) for each in orders)
    picks = Counter(labels_of(Demonstrations(EXAMPLES, TEMPLATE, k=1, order="random", seed=seed))[0][0] for seed in range(60))
    assert set(picks) == set(texts)
    again = Demonstrations(EXAMPLES, TEMPLATE, order="random", seed=3)
    assert again.contexts(QUERIES) == Demonstrations(EXAMPLES, TEMPLATE, order="random", seed=3).contexts(QUERIES)


def test_retrieval_takes_the_nearest():
    asks = ["w6 w7 w4", "w0", "w9 w9 w3 w3 w3"]
    near_ones = [["w4 w5", "w6 w7 w8 w9"], ["w0 w1 w2", "w3"], ["w3", "w6 w7 w8 w9"]]
    assert labels_of(Demonstrations(EXAMPLES, TEMPLATE, k=2, encoder=encoder), asks) == near_ones
    similar = [["w4 w5", "w6 w7 w8 w9"], ["w3", "w0 w1 w2"], ["w6 w7 w8 w9", "w3"]]
    assert labels_of(Demonstrations(EXAMPLES, TEMPLATE, k=2, encoder=encoder, order="similar"), asks) == similar
    shuffled = labels_of(Demonstrations(EXAMPLES, TEMPLATE, k=2, encoder=encoder, order="random", seed=1), asks)
    assert [sorted(each) for each in shuffled] == [sorted(each) for each in near_ones]


@pytest.mark.parametrize("name", MODELS)
def test_each_query_reads_what_was_retrieved_for_it(name):
    asks = ["w6 w7 w4", "w0", "w1 w0", "w9 w9 w3 w3 w3"]
    made = ready(name, Demonstrations(EXAMPLES, TEMPLATE, k=2, encoder=encoder, order="similar"), keep=2)
    joined = [[*context, *own] for (context,), own in made.encode(asks)]
    want = plain(made.model, joined)
    near(made.logits(asks), want)
    assert len(made._kept) == 2  # of three contexts, one of them read by two queries
    near(made.logits(asks[::-1]), want.flip(0))
    near(made.logits(asks[:1]), want[:1])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    for row, text in zip(joined, made.generate(asks, **options), strict=True):
        row = torch.tensor([row])
        assert made.model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist() == ids(text)


def test_new_contexts_are_run_once_in_bounded_parts(monkeypatch):
    made = ready(prompt=Demonstrations(EXAMPLES, TEMPLATE, k=1, encoder=encoder))
    runs, run = [], made._run
    monkeypatch.setattr(made, "_run", lambda texts, starts: runs.append(list(map(len, texts))) or run(texts, starts))
    asks = ["w0", "w3", "w4", "w5", "w9"]
    want = made.logits(asks)
    assert runs == [[6, 7, 8, 9]]
    near(made.logits(asks), want)
    assert len(runs) == 1
    made.forget()
    monkeypatch.setattr(fastprompt.instruction, "_RUN", 14)
    near(made.logits(asks), want)
    assert runs[1:] == [[6, 7], [8], [9]]


# ---- Groups of demonstrations ----


def side_by_side(model, groups: list[list[int]], query: list[int]) -> Tensor:
    """Structured prompting by a plain cache and a bias of log M on the query's own scores."""
    end, cache = max(map(len, groups)), transformers.DynamicCache()
    parts = []
    for group in groups:
        own = transformers.DynamicCache()
        model(
            input_ids=torch.tensor([group]), position_ids=torch.arange(end - len(group), end)[None], past_key_values=own,
            attention_mask=torch.ones(1, len(group), dtype=torch.long),
        )  # fmt: skip
        parts.append([(layer.keys, layer.values) for layer in own.layers])
    for place, layers in enumerate(zip(*parts, strict=True)):
        cache.update(*(torch.cat(tensors, 2) for tensors in zip(*layers, strict=True)), place)
    size = sum(map(len, groups))
    bias = torch.zeros(1, 1, len(query), size + len(query), dtype=torch.float64)
    own = torch.full((len(query), len(query)), math.log(len(groups)), dtype=torch.float64)
    bias[..., size:] = own.masked_fill(torch.ones_like(own).triu(1).bool(), -torch.inf)
    places = torch.arange(end, end + len(query))[None]
    out = model(input_ids=torch.tensor([query]), attention_mask=bias, position_ids=places, past_key_values=cache)
    return out.logits[0, -1]


@pytest.mark.parametrize("retrieved", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_groups_side_by_side_are_the_plain_formula(name, retrieved):
    options = {"k": 3, "encoder": encoder, "order": "similar"} if retrieved else {}
    made = ready(name, Demonstrations(EXAMPLES, TEMPLATE, groups=3, **options), bos=True)
    encoded = made.encode(QUERIES)
    assert all(len(groups) == 3 and all(group[0] == 1 for group in groups) for groups, _ in encoded)
    assert len({len(group) for group in encoded[0][0]}) > 1, "groups of one length say nothing of their alignment"
    want = torch.stack([side_by_side(made.model, groups, own) for groups, own in encoded])
    near(made.logits(QUERIES), want)
    with made.reading(QUERIES) as batch:  # a step at a time: with a cache, the same
        cache = transformers.DynamicCache()
        mask, places = batch["attention_mask"], batch["position_ids"]
        for t in range(mask.shape[1]):
            step = {"attention_mask": mask[:, : t + 1], "position_ids": places[:, t : t + 1], "past_key_values": cache}
            out = made.model(input_ids=batch["input_ids"][:, t : t + 1], **step).logits[:, -1]
    near(out, want)


def test_groups_need_the_positions_of_one():
    made = ready("gpt2", Demonstrations(EXAMPLES * 3, TEMPLATE, groups=6))  # 90 tokens and 64 positions
    assert sum(len(group) for group in made.encode(["w1"])[0][0]) > 64
    assert made.logits(["w1"]).isfinite().all()
    assert made.generate(["w1"], max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="groups: expected 1, because"):
        made.trainable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rescaled_softmax(dtype):
    """The plain formula in float64, on the path of each dtype."""
    from fastprompt.hoist import Given, attend

    torch.manual_seed(0)
    q, own = torch.randn(2, 4, 5, 16).to(dtype), torch.randn(2, 2, 2, 7, 16).to(dtype)
    prefix = torch.randn(2, 1, 2, 9, 16).to(dtype)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., :6] = False
    got = attend(q, own[0], own[1], Given(prefix[0], prefix[1], None, None, [], rescale=3.0), mask, True)
    joined = torch.cat([prefix.expand(2, 2, -1, -1, -1), own], 3).double().repeat_interleave(2, 2)
    keys, values = joined.unbind(0)
    weights = (q.double() @ keys.transpose(2, 3) / 4).exp()
    weights[..., 9:] *= 3 * (mask & torch.ones(5, 7, dtype=torch.bool).tril(2))
    want = weights @ values / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


# ---- Never stale ----


def test_what_is_kept_follows_the_model():
    made = ready()
    first = made.logits(QUERIES)

    def check():
        got = made.logits(QUERIES)
        near(got.double(), plain(made.model, [CONTEXT + asked(query) for query in QUERIES]).double())
        return got

    with torch.no_grad():
        made.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert (check() - first).abs().max() > 1e-3
    made.model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.randn(48, 32).double(), requires_grad=False)
    check()
    weight = made.model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.flip(0)  # another storage, the same version
    second = check()
    made.model.half()
    made.model.double()  # the storage may lie where it lay
    rounded = made.logits(QUERIES)
    assert 0 < (rounded - second).abs().max() < 0.5
    near(rounded, plain(made.model, [CONTEXT + asked(query) for query in QUERIES]))
    kept = made.prefix[0][0]
    made.logits(QUERIES)
    assert made.prefix[0][0] is kept
    made.forget()
    assert made.prefix[0][0] is not kept
    assert torch.equal(made.prefix[0][0], kept)


def test_autocast_has_keys_of_its_own():
    made = ready()
    made.model.float()
    want = plain(made.model, [CONTEXT + asked(query) for query in QUERIES])
    with torch.autocast("cpu", torch.bfloat16):
        low = made.logits(QUERIES)
        rounded = made.prefix[0][1]
    assert 1e-4 < (made.prefix[0][1] - rounded).abs().max() < 0.1
    torch.testing.assert_close(low.float(), want, rtol=0.3, atol=0.3)
    torch.testing.assert_close(made.logits(QUERIES), want, rtol=1e-5, atol=1e-5)


def test_a_context_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        made = ready()
        want = made.logits(QUERIES)
    near(made.logits(QUERIES), want)
    assert not any(t.is_inference() or t.requires_grad for pair in made.prefix for t in pair)


# ---- Training from it ----


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_starts_as_the_context_and_trains(name):
    made = ready(name)
    want, prefix = made.logits(QUERIES), made.trainable()
    with made.reading(QUERIES) as batch:
        pass
    with prefixed(made.model, prefix()):
        near(made.model(**batch).logits[:, -1], want)
    handle = fastprompt.attach(made.model, prefix)
    near(made.model(**batch).logits[:, -1], want)
    optimizer, target, losses = torch.optim.SGD(handle.parameters(), 0.5), torch.tensor([5, 6, 5]), []
    for _ in range(4):
        loss = nn.functional.cross_entropy(made.model(**batch).logits[:, -1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    handle.detach()
    near(made.logits(QUERIES), want)
    assert made.trainable(frozen=1).prefix.shape[-2] == len(CONTEXT) - 1


# ---- Answers ----


class Scripted:
    """What `generate` would say, in turn."""

    def __init__(self, made, says):
        self.asked, self.says = [], says
        made.model.generate, made.tokenizer = self, self
        self.pad_token_id = 0
        self.inner = tokenizer()

    def __call__(self, rows, attention_mask, **options):
        self.asked.append(options)
        return nn.functional.pad(rows.repeat_interleave(len(self.says) // len(rows), 0), (0, 1))

    def encode(self, *args, **options):
        return self.inner.encode(*args, **options)

    def batch_decode(self, rows, skip_special_tokens):
        assert rows.shape == (len(self.says), 1)
        return self.says


THOUGHTS = [{"question": "w0", "rationale": "w1 so", "answer": 3}]


def test_chains_of_thought_vote():
    made = ready(prompt=ChainOfThought(THOUGHTS))
    assert made.prompt.contexts(["w2"]) == [("Q: w0\nA: w1 so The answer is 3.\n\n",)]
    assert made.prompt.query("w2") == "Q: w2\nA:"
    script = Scripted(made, ["w1. The answer is 4.\n\nQ: w9\nA: 7", "The answer is 5.", "so 4", "none", "8", "no"])
    assert made.answers(["w2", "w3"], samples=3, max_new_tokens=9) == [4, 8]
    assert script.asked == [{"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}]
    script.says = ["The answer is (B)", "C"]
    made.prompt.reader = fastprompt.answers.Answers(Choice("ABC"))
    assert made.answers(["w2", "w3"]) == ["B", "C"]
    assert script.asked[1] == {}


def test_zero_shot_asks_to_reason():
    prompt = ChainOfThought()
    assert prompt.query("w2") == "Q: w2\nA: Let's think step by step."
    assert prompt.contexts(["w2"]) == [("",)]
    assert prompt.ends("a\n\nb") == "a\n\nb"
    made = ready(prompt=ChainOfThought(trigger="so"))
    near(made.logits(["w2", "w3 w4"]), plain(made.model, [ids("Q : w2 A : so"), ids("Q : w3 w4 A : so")]))


def test_self_consistency_samples_from_the_model():
    made = ready(prompt=ChainOfThought(THOUGHTS, rule=lambda text: text.split()[0]))
    torch.manual_seed(0)
    answers = made.answers(["w2", "w3"], samples=4, max_new_tokens=3, pad_token_id=0)
    torch.manual_seed(0)
    texts = made.generate(["w2", "w3"], do_sample=True, num_return_sequences=4, max_new_tokens=3, pad_token_id=0)
    assert list(map(len, texts)) == [4, 4]
    assert len(set(texts[0])) > 1
    assert answers == [fastprompt.answers.majority(text.split()[0] for text in each) for each in texts]


def test_calibration_divides_by_what_is_said_without_content():
    made = ready()
    words = fnn.Verbalizer.from_text({"no": "bad", "yes": "good"}, made.tokenizer, num_tokens=VOCABULARY)
    calibration = made.calibration(words, inputs=["N/A", "", "w1"])
    pair = torch.tensor(ids("bad good"))
    empty = plain(made.model, [CONTEXT + asked(text) for text in ("N / A", "", "w1")])[:, pair].softmax(1).mean(0)
    want = plain(made.model, [CONTEXT + asked(query) for query in QUERIES])[:, pair].softmax(1) / empty
    near(calibration(made.scores(QUERIES, words)).exp(), want / want.sum(1, keepdim=True))
    assert made.calibration(words).prior.shape == (2,)
    with pytest.raises(ValueError, match="prompt: expected the same context for all queries"):
        ready(prompt=Demonstrations(EXAMPLES, TEMPLATE, k=1, encoder=encoder)).calibration(words)


# ---- Its place, and what is wrong ----


def test_its_place():
    place = Place(Format.FIXED, Location.RAW, Operator.CONCATENATIVE, Alignment.IDENTITY)
    assert Instruction("w0").taxonomy == Demonstrations(EXAMPLES, TEMPLATE).taxonomy == place
    assert Demonstrations(EXAMPLES, TEMPLATE, groups=2).taxonomy.location is Location.HIDDEN
    assert ChainOfThought(THOUGHTS).taxonomy.alignment is Alignment.STRUCTURAL
    assert ["icl", "fixed", "raw", "input", "concatenative", "identity"] in [line.split()[:6] for line in table().splitlines()]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Demonstrations([*EXAMPLES, {"text": "w0"}], TEMPLATE), r"examples\[4\]: .* 'label', got only 'text'"),
        (lambda: Demonstrations(EXAMPLES, "{text}"), "template: expected a field 'label'"),
        (lambda: Demonstrations(EXAMPLES, "{label} {text}"), "template: expected a field for the query before its target"),
        (lambda: Instruction("w0", "{text.__class__}"), "template: expected plain fields"),
        (lambda: Instruction("w0", "{}"), "template: expected plain fields"),
        (lambda: Instruction("w0", "{text!r}"), "template: expected plain fields"),
        (lambda: Instruction("w0", "{text"), "template: expected fields in braces"),
        (lambda: Instruction("w0", "{{text}}"), "template: expected a field for the query"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, k=5), "k: expected 1 to 4"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, k=0), "k: expected 1 to 4"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, k=2, groups=3), "groups: expected 1 to 2"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, order="similar"), "order: .* without an encoder"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, order="best"), "order: expected one of given, random, similar"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, encoder=lambda texts: torch.ones(1, 2)), r"encoder: .*\[4, d\]"),
        (lambda: Demonstrations(EXAMPLES, TEMPLATE, encoder=lambda texts: torch.full((4, 2), torch.nan)), "encoder: .*finite"),
        (lambda: ready(keep=0), "keep: expected at least 1"),
        (lambda: ready().logits([]), "queries: expected at least one"),
        (lambda: ready(prompt=Instruction("w0")).logits(["w1", ""]), r"queries\[1\]: expected at least one token"),
        (lambda: ready().logits(["w1", {"review": "w0"}]), r"queries\[1\]: .* 'text', got only 'review'"),
        (lambda: ready(prompt=Instruction("w0", "{a} {b}")).logits(["w1"]), r"queries\[0\]: .* fields a, b"),
        (lambda: ready("gpt2", Instruction("w0 " * 64)), "prompt: .* the 64 positions of GPT2LMHeadModel, got a context of 64"),
        (lambda: ready("gpt2", Instruction("w0 " * 60)).logits(["w1", "w1 " * 5]), r"queries\[1\]: .* 64 positions .* 60 .* 5"),
        (lambda: ready().answers(["w0"]), "prompt: expected one with a rule"),
        (lambda: ready(prompt=ChainOfThought(THOUGHTS)).answers(["w0"], samples=0), "samples: expected at least 1"),
        (lambda: ready(prompt=Instruction("")).prefix, "prompt: expected a context of at least one token"),
    ],
)  # fmt: skip
def test_what_is_wrong(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_one_query_is_no_list():
    with pytest.raises(TypeError, match="queries: expected a list"):
        ready().logits("w1")
    with pytest.raises(TypeError, match=r"examples\[0\]: expected a str or a number for 'text'"):
        Demonstrations([{"text": None, "label": "good"}], TEMPLATE)


def test_models_that_a_context_does_not_fit():
    with pytest.raises(Inexact, match=r"does not depend on what follows: .*bidirectional attention"):
        Instruction("w0").on(frozen(bert), tokenizer())
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(Inexact, match="whose encoder reads in both directions"):
        Instruction("w0").on(t5, tokenizer())
    with pytest.raises(Inexact, match="sliding windows"):
        Demonstrations(EXAMPLES, TEMPLATE, groups=2).on(model_of("MistralForCausalLM"), tokenizer())
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long |= {"original_max_position_embeddings": 8}
    with pytest.raises(ValueError, match="fewer tokens than the 8 positions"):
        Instruction("w0 " * 8).on(frozen(llama, rope_parameters=long), tokenizer())
    dropout = frozen(gpt2, resid_pdrop=0.1)
    made = Instruction("w0").on(dropout, tokenizer())
    dropout.train()
    with pytest.raises(Inexact, match="dropout"):
        made.logits(["w1"])
