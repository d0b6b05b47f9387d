"""`fastprompt.nn`'s output alignments against the published algorithms, written here as plain formulas."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprompt import Reprogrammed, build, fit, functional
from fastprompt.nn import AttributeMap, BayesianMap, DescriptionMap, LabelMap, LinearMap, PaddedPrompt, Refresh
from fastprompt.taxonomy import Alignment
from fastprompt.training import refresh

S, T, B = 24, 4, 300


def sample(sources: int = S, classes: int = T, absent: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores that lean towards a few sources a class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (B,), generator=generator)
    if absent is not None:
        target[target == absent] = (absent + 1) % classes
    logits = torch.randn(B, sources, generator=generator)
    logits[torch.arange(B), (target * 3 + torch.randint(3, (B,), generator=generator)) % sources] += 2.5
    return logits, target


def learn(label_map, logits: Tensor, target: Tensor):
    """Counts in uneven batches, then refreshes."""
    label_map.reset_counts()
    for start in range(0, len(target), 77):
        label_map.count(logits[start : start + 77], target[start : start + 77])
    label_map.refresh()
    return label_map


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


# ---- The published algorithms ----


def autovp(logits: Tensor, target: Tensor, classes: int, m: int) -> list[list[int]]:
    """Repeated arg-max over cells: a class takes a free source until it has m."""
    sources = logits.shape[1]
    left = torch.zeros(sources, classes)
    for source, t in zip(logits.argmax(1).tolist(), target.tolist(), strict=True):
        left[source, t] += 1
    chosen: list[list[int]] = [[] for _ in range(classes)]
    while any(len(own) < m for own in chosen):
        source, t = divmod(int(left.flatten().argmax()), classes)
        chosen[t].append(source)
        left[source] = -1
        if len(chosen[t]) == m:
            left[:, t] = -1
    return chosen


@pytest.mark.parametrize(("m", "absent"), [(1, None), (3, None), (3, 2), (6, 0)])
def test_many_to_one_is_autovps(m, absent):
    logits, target = sample(absent=absent)
    label_map = learn(LabelMap(S, T, "frequent", sources_per_class=m), logits, target)
    want = autovp(logits, target, T, m)
    assert label_map.index.view(T, m).tolist() == want
    assert len({source for own in want for source in own}) == T * m
    close(label_map(logits), torch.stack([logits[:, own].mean(1) for own in want], 1))
    assert label_map.segments.members.tolist() == [source for own in want for source in own]


@pytest.mark.parametrize(
    ("reduce", "of", "formula"),
    [
        ("sum", "logits", lambda own: own.sum(1)),
        ("max", "logits", lambda own: own.amax(1)),
        ("logsumexp", "logits", lambda own: own.logsumexp(1)),
        ("mean", "probabilities", lambda own: own.mean(1).log()),
        ("max", "probabilities", lambda own: own.amax(1).log()),
    ],
)
def test_reductions_and_the_loss(reduce, of, formula):
    logits, target = sample()
    label_map = LabelMap(S, T, "random", sources_per_class=3, reduce=reduce, of=of, seed=2)
    assert torch.equal(label_map.index.flatten(), torch.randperm(S, generator=torch.Generator().manual_seed(2))[: 3 * T])
    wide = logits.double()
    values = wide.softmax(1) if of == "probabilities" else wide
    want = torch.stack([formula(values[:, own]) for own in label_map.index.tolist()], 1)
    close(label_map(logits), want)
    close(label_map.loss(logits, target, label_smoothing=0.1), nn.functional.cross_entropy(want, target, label_smoothing=0.1))


def test_rules_need_no_counting():
    logits, target = sample()
    assert torch.equal(LabelMap(S, T, "first")(logits), logits[:, :T])
    groups = LabelMap(S, T, "groups", sources_per_class=6)
    close(groups(logits), logits.view(B, T, 6).mean(2))
    for label_map in (groups, LabelMap(S, T, "first"), LabelMap.from_index(torch.tensor([3, 3]), S)):
        assert label_map.taxonomy.alignment is Alignment.STRUCTURAL
        label_map.count(logits, target % label_map.num_classes)
        with pytest.raises(RuntimeError, match="fixed map"):
            label_map.refresh()


def test_given_maps_may_share_and_differ_in_size():
    logits, _ = sample()
    classes = [[5], [0, 7, 5], [1, 2]]
    label_map = LabelMap.from_index(classes, S, reduce="sum")
    want = torch.stack([logits[:, own].sum(1) for own in classes], 1)
    close(label_map(logits), want)
    again = LabelMap.from_index(label_map.segments, S, reduce="sum")
    assert torch.equal(again(logits), label_map(logits))
    loaded = LabelMap(**json.loads(json.dumps(label_map.config())))
    loaded.load_state_dict(label_map.state_dict())
    assert torch.equal(loaded(logits), label_map(logits))
    assert LabelMap.from_index(torch.tensor([[3, 1], [2, 3]]), S).segments.busiest == 2
    assert LabelMap.from_index(torch.tensor([4, 4, 4]), 5).num_classes == 3
    assert LabelMap.from_index(torch.zeros(9, dtype=torch.int64), 5)(logits[:, :5]).shape == (B, 9)  # T > S may share


@pytest.mark.parametrize("m", [1, 2])
def test_the_semantic_map_is_a_round_robin(m):
    similarity = torch.rand(9, T, generator=torch.Generator().manual_seed(1))
    similarity[4] = 2.0  # everybody's best
    free, want = set(range(9)), [[] for _ in range(T)]
    for _ in range(m):
        for t in range(T):
            best = max(sorted(free), key=lambda s, t=t: similarity[s, t].item())
            want[t].append(best)
            free.remove(best)
    assert LabelMap.from_similarity(similarity, m).index.view(T, m).tolist() == want
    assert want[0][0] == 4


def test_optimal_matching_beats_greedy():
    label_map = LabelMap(3, 2, "frequent", matching="optimal")
    counts = torch.tensor([[5, 4], [4, 0], [0, 0]])
    label_map.counts = counts
    label_map.refresh()
    assert label_map.index.tolist() == [1, 0]  # 8, where greedy has 5
    greedy = LabelMap(3, 2, "frequent")
    greedy.counts = counts
    greedy.refresh()
    assert greedy.index.tolist() == [0, 1]


def bayesian(logits: Tensor, target: Tensor, classes: int, k: int | None, smoothing: float) -> Tensor:
    counts = torch.zeros(logits.shape[1], classes, dtype=torch.float64)
    p = logits.double().softmax(1)
    for row, t in zip(p, target.tolist(), strict=True):
        if k is None:
            counts[row.argmax(), t] += 1
        else:
            best = row.topk(k).indices
            counts[best, t] += row[best]
    share = counts / (counts.sum(1, keepdim=True) + smoothing).clamp(min=1e-300)
    column = share.sum(0)
    return torch.where(column > 0, share / column.clamp(min=1e-300), 1 / len(counts))


@pytest.mark.parametrize("top", [None, 0.15, 0.8])
@pytest.mark.parametrize(("smoothing", "absent"), [(1.0, None), (0.0, 1)])
def test_bayesian_maps_are_the_published_ones(top, smoothing, absent):
    logits, target = sample(sources=40, absent=absent)  # some sources are never predicted
    label_map = BayesianMap(40, T, top=top, smoothing=smoothing)
    assert torch.equal(label_map.matrix, torch.full((40, T), 1 / 40))
    assert label_map.k == {None: None, 0.15: 1, 0.8: 3}[top]  # int(0.15 * 4) is 0
    learn(label_map, logits, target)
    want = bayesian(logits, target, T, label_map.k, smoothing)
    close(label_map.matrix, want)
    close(label_map.matrix.sum(0), torch.ones(T))
    close(label_map(logits), logits.double() @ want)
    close(label_map.loss(logits, target), nn.functional.cross_entropy(logits.double() @ want, target))
    assert label_map(logits.double()).dtype == torch.float64
    assert label_map.half()(logits.half()).isfinite().all()


@pytest.mark.parametrize("top", [None, 0.8])
def test_momentum_averages_over_refreshes(top):
    label_map = BayesianMap(S, T, top=top, momentum=0.9)
    parts = [sample(seed=seed) for seed in (0, 1, 2)]
    for logits, target in parts:
        learn(label_map, logits, target)
    one_hot = []
    for logits, target in parts:
        single = learn(BayesianMap(S, T, top=top), logits, target)
        one_hot.append(single.counts.double() / (functional.COUNT_UNIT if top else 1))
    total = (one_hot[0] * 0.9 + one_hot[1]) * 0.9 + one_hot[2]
    share = total / (total.sum(1, keepdim=True) + 1)
    close(label_map.matrix, share / share.sum(0))
    assert set(label_map.state_dict()) == {"matrix", "history"}


@pytest.mark.parametrize(("descriptions", "top"), [(5, 3), ([2, 6, 3, 1], 3), (2, 9)])
def test_description_weights_are_dvps(descriptions, top):
    sizes = [descriptions] * T if isinstance(descriptions, int) else descriptions
    starts = [sum(sizes[:t]) for t in range(T)]
    logits, target = sample(sources=sum(sizes), absent=2)
    label_map = DescriptionMap(T, descriptions, top=top)
    close(label_map.weights, torch.cat([torch.full((m,), 1 / m) for m in sizes]))
    learn(label_map, logits, torch.where(torch.arange(B) < 9, -100, target))
    counts = [[0] * m for m in sizes]
    for row, t in zip(logits[9:].tolist(), target[9:].tolist(), strict=True):
        own = row[starts[t] : starts[t] + sizes[t]]
        for place in sorted(range(len(own)), key=lambda i, own=own: -own[i])[:top]:
            counts[t][place] += 1
    want = torch.tensor([n / sum(own) if sum(own) else 1 / len(own) for own in counts for n in own])
    close(label_map.weights, want)
    weighted = (logits * want).split(sizes, 1)
    close(label_map(logits), torch.stack([own.sum(1) for own in weighted], 1))
    assert label_map.taxonomy.alignment is Alignment.STATISTICAL


def test_descriptions_of_several_prompts():
    label_map = DescriptionMap(T, [6, 3, 4, 7], prompts=3)
    assert label_map.prompt_of.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 0, 1, 2, 0, 0, 0, 1, 1, 2, 2]
    scores, target = torch.randn(3, B, 20, requires_grad=True), sample()[1]
    own = torch.stack([scores[label_map.prompt_of[a], :, a] for a in range(20)], 1)
    plain = DescriptionMap(T, [6, 3, 4, 7])
    close(label_map(scores), plain(own))
    learn(plain, own.detach(), target)
    label_map.count(scores.detach(), target)
    label_map.refresh()
    assert torch.equal(label_map.weights, plain.weights)
    label_map.loss(scores, target).backward()
    assert (scores.grad != 0).sum() <= B * 20
    assert not label_map.foldable
    with pytest.raises(ValueError, match=r"scores: expected \[3, B, 20\], got \[300, 20\]"):
        label_map(own)


@pytest.mark.parametrize(("m", "k"), [(20, 3), (2, 3), (1, 1)])
def test_attributes_are_attrvrs(m, k):
    label_map = AttributeMap(T, m, k=k, alpha=0.3)
    scores = torch.randn(7, 2 * T * m, requires_grad=True)
    des, dist_ = (half.view(7, T, m) for half in scores.double().chunk(2, 1))
    best = [half.sort(2, descending=True).values[:, :, :k].mean(2) for half in (des, dist_)]
    want = 0.3 * best[0] + 0.7 * best[1]
    close(label_map(scores), want)
    target = torch.arange(7) % T
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(want, target), scores)
    (got,) = torch.autograd.grad(label_map.loss(scores, target), scores)
    close(got, wanted)
    close(label_map.dense().sum(0), torch.ones(T))


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, T * S + T),
        ({"bias": False, "init": "identity"}, T * S),
        ({"weight": "sigmoid"}, T * S + T),
        ({"rank": 2}, 2 * (S + T) + T),
        ({"rank": 2, "weight": "sigmoid"}, 2 * (S + T) + T),
        ({"init": torch.arange(T * S).view(T, S) / 100}, T * S + T),
    ],
)
def test_linear_maps(options, trained):
    label_map = LinearMap(S, T, **options)
    logits, target = sample()
    assert sum(parameter.numel() for parameter in label_map.parameters()) == trained
    matrix = label_map.up @ label_map.down if "rank" in options else label_map.weight
    matrix = matrix.sigmoid() if "weight" in options else matrix
    want = logits @ matrix.T + (0 if label_map.bias is None else label_map.bias)
    close(label_map(logits), want)
    label_map.loss(logits, target).backward()
    assert all(parameter.grad is not None for parameter in label_map.parameters())
    if options.get("init") == "identity":
        assert torch.equal(label_map(logits), logits[:, :T])
    close(label_map.dense(), matrix.T)
    assert f"trainable={trained:,}" in repr(label_map)


def test_one_class_and_one_source():
    logits, target = sample(sources=1, classes=1)
    for made in (LabelMap(1, 1), BayesianMap(1, 1), BayesianMap(1, 1, top=0.15), DescriptionMap(1, 1)):
        learn(made, logits, target)
        assert torch.equal(made(logits), logits)
        assert made.loss(logits, target) == 0


def test_counts_of_zero_and_nan_scores_have_a_result():
    logits = torch.full((3, S), torch.nan)
    for made in MAPS.values():
        module = made()
        if hasattr(module, "reset_counts"):
            module.reset_counts()
            if not isinstance(module, LabelMap) or module.method == "iterative":
                module.refresh()
            before = {name: value.clone() for name, value in module.state_dict().items()}
            assert all(value.isfinite().all() for value in before.values())
        assert module(logits).isnan().all()


# ---- What every map is ----

MAPS = {
    "one": lambda: LabelMap(S, T),
    "several": lambda: LabelMap(S, T, sources_per_class=3, refresh_every=Refresh(every_steps=5)),
    "probabilities": lambda: LabelMap(S, T, of="probabilities", matching="optimal"),
    "uneven": lambda: LabelMap.from_index([[0], [1, 2], [3], [4, 0, 1]], S, reduce="max"),
    "blm": lambda: BayesianMap(S, T),
    "blm+": lambda: BayesianMap(S, T, top=0.5, momentum=0.5, refresh_every=Refresh(every_epochs=2, online=True)),
    "descriptions": lambda: DescriptionMap(T, [6, 5, 7, 6]),
    "attributes": lambda: AttributeMap(T, 3, k=2),
    "linear": lambda: LinearMap(S, T, rank=2),
}
PLACES = {"uneven": Alignment.STRUCTURAL, "attributes": Alignment.STRUCTURAL, "linear": Alignment.LINEAR}


def trained_map(name: str) -> nn.Module:
    made = MAPS[name]()
    if hasattr(made, "refresh") and getattr(made, "method", "") != "given":
        learn(made, *sample())
    return made


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_a_plain_module(name, device, tmp_path):
    made = trained_map(name).to(device)
    logits = sample()[0].to(device)
    assert made.taxonomy.alignment is PLACES.get(name, Alignment.STATISTICAL)
    want = made(logits)
    assert want.shape == (B, T)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(logits), want)
    state = made.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    rebuilt = type(made)(**json.loads(json.dumps(made.config()))).to(device)
    assert rebuilt.config() == made.config()
    assert repr(rebuilt) == repr(made)
    rebuilt.load_state_dict(state)
    assert torch.equal(rebuilt(logits), want)
    frozen = nn.Linear(5, S).to(device)
    Reprogrammed(frozen, outputs=made).save_pretrained(tmp_path)
    loaded = Reprogrammed.from_pretrained(tmp_path, frozen)
    assert type(loaded.outputs) is type(made)
    assert torch.equal(loaded.outputs.to(device)(logits), want)
    fallen = copy.deepcopy(made)
    fallen.to("meta")
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    close(compiled(logits), want)
    if made.taxonomy.alignment is not Alignment.LINEAR and name not in ("uneven", "attributes", "probabilities"):
        close(made(logits), logits @ made.dense())


def test_a_changed_index_is_a_changed_map():
    """Segments follow whatever writes into the index, gradients too."""
    logits = sample()[0].requires_grad_()
    label_map = LabelMap(S, T, sources_per_class=2)
    for write in (
        lambda index: label_map.index.copy_(index),
        lambda index: label_map.load_state_dict({"index": index}),
        lambda index: label_map.load_state_dict({"index": index.clone()}, assign=True),
        lambda index: setattr(label_map, "index", index.clone()),
    ):
        index = torch.randperm(S)[: 2 * T].view(T, 2)
        write(index)
        (got,) = torch.autograd.grad(label_map(logits)[:, 1].sum(), logits)
        assert set(got[0].nonzero().flatten().tolist()) == set(index[1].tolist())


@pytest.mark.parametrize("name", MAPS)
def test_every_map_shows_itself(name):
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    made = trained_map(name)
    given = Figure().subplots()
    assert made.plot(ax=given) is given
    names = [f"source {i}" for i in range(S)]
    ax = made.plot(names, list("abcd"))
    assert [label.get_text() for label in ax.get_xticklabels()] == list("abcd")
    shown = {label.get_text() for label in ax.get_yticklabels()}
    assert shown == {names[i] for i in made.dense().abs().amax(1).nonzero().flatten().tolist()}
    with pytest.raises(ValueError, match="target_names: expected 4 names, got 3"):
        made.plot(names, list("abc"))
    pyplot.close("all")


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "fastprompt\[plot\]"'):
        LabelMap(3, 2).plot()


# ---- Folded into the head ----


class Frozen(nn.Module):
    def __init__(self, bias=True, after=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.fc, self.after = nn.Linear(6, 8), nn.Linear(8, S, bias=bias), after
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        out = self.fc(self.body(x).relu())
        return out if self.after is None else self.after(out)


FOLDS = ["one", "several", "blm", "blm+", "descriptions"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FOLDS)
def test_a_folded_head_is_the_map_behind_the_head(name, bias):
    x, target = torch.randn(B, 6), sample()[1]
    model = Frozen(bias).double()  # in float64 the two orders of summation agree to 1e-12
    module = Reprogrammed(model, outputs=MAPS[name](), head="fc").double()
    x = x.double().requires_grad_()
    runs = []
    model.fc.register_forward_hook(lambda *call: runs.append(1))
    with torch.inference_mode():
        module(x)  # what it keeps serves training below

    def agree():
        want = module.outputs(model(x))
        runs.clear()
        got = module(x)
        assert not runs  # f stopped before its head
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for one, other in zip(*(torch.autograd.grad(out.square().sum(), x) for out in (got, want)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    agree()
    kept = module._folded[2]
    module(x)
    assert module._folded[2] is kept  # made once
    refresh(module, (x.detach(), target))  # counts all S
    assert module.outputs.counts.sum() > 0
    agree()
    assert module._folded[2] is not kept
    state = {key: value.clone() for key, value in module.outputs.state_dict().items()}
    first = next(iter(state))
    module.outputs.load_state_dict(state | {first: state[first].flip(0)})
    agree()
    with torch.no_grad():
        model.fc.weight.mul_(2)
    agree()
    model.float(), model.double()  # a rounded head
    agree()
    module.float()
    assert module(x.detach().float()).dtype == torch.float32
    twin = copy.deepcopy(module).double()
    close(twin(x), twin.outputs(twin.model(x)))
    with torch.inference_mode():
        made_there = Reprogrammed(model.double(), outputs=MAPS[name](), head="fc").double()
        torch.testing.assert_close(made_there(x), made_there.outputs(model(x)))


def test_only_a_linear_map_of_logits_is_folded():
    for name in sorted(set(MAPS) - set(FOLDS)):
        made = MAPS[name]()
        module = Reprogrammed(Frozen(), outputs=made, head="fc")
        x = torch.randn(5, 6)
        assert torch.equal(module(x), made(module.model(x)))
        with pytest.raises(ValueError, match="fold: expected a map that is linear in the logits"):
            made.fold(module.model.fc.weight)
    assert not LabelMap(S, T, sources_per_class=2, reduce="max").foldable


def test_a_head_is_the_last_layer_of_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"head: expected the name of an nn.Linear in the model, got 'head', NoneType"):
        Reprogrammed(Frozen(), outputs=LabelMap(S, T), head="head")
    with pytest.raises(ValueError, match="got 'after', Softmax"):
        Reprogrammed(Frozen(after=nn.Softmax(1)), outputs=LabelMap(S, T), head="after")
    module = Reprogrammed(Frozen(after=nn.Softmax(1)), outputs=LabelMap(S, T), head="fc")
    for _ in range(2):
        with pytest.raises(ValueError, match="head: expected the layer whose output f returns as it is, got 'fc'"):
            module(torch.randn(2, 6))
    module = Reprogrammed(Frozen(), outputs=LabelMap(S, T), head="fc")
    module.save_pretrained(tmp_path)
    loaded = Reprogrammed.from_pretrained(tmp_path, module.model)
    assert loaded.head == "fc"
    assert torch.equal(loaded(torch.ones(2, 6)), module(torch.ones(2, 6)))


def test_a_tied_embedding_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(S, 8), nn.Linear(8, S, bias=False)
            self.fc.weight = self.embed.weight

        def forward(self, ids):
            return self.fc(self.embed(ids).mean(1))

    ids = torch.arange(12).view(3, 4) % S
    module = Reprogrammed(Tied(), outputs=LabelMap(S, T), head="fc")
    close(module(ids), module.outputs(module.model(ids)))


def test_threads_that_share_a_model_do_not_meet():
    import concurrent.futures

    model, x = Frozen(), torch.randn(B, 6)
    modules = [Reprogrammed(model, outputs=LabelMap(S, T, seed=seed), head="fc" if seed else None) for seed in range(4)]
    want = [module.outputs(model(x)) for module in modules]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, expected in zip(pool.map(lambda module: module(x), modules), want, strict=True):
                close(got, expected)


def test_clip_templates_fold_into_the_chosen_texts():
    """ILM over templates x classes: after a refresh T rows of text features are left."""
    texts, images = torch.randn(81 * T, 16), torch.randn(B, 16)
    label_map = learn(LabelMap(81 * T, T), images @ texts.T, sample()[1])
    rows, bias = label_map.fold(texts)
    assert bias is None
    assert torch.equal(rows, texts[label_map.index])
    close(images @ rows.T, label_map(images @ texts.T))


# ---- Counting across ranks, schedules ----

RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from tests.test_label_maps import MAPS, ranks_share
dist.init_process_group("gloo", init_method="file://{store}", rank=1, world_size=2)
ranks_share(1)
dist.destroy_process_group()
"""


def ranks_share(rank: int) -> None:
    logits, target = sample(seed=5)
    for name in ("one", "several", "blm", "blm+", "descriptions"):
        made = MAPS[name]()
        made.reset_counts()
        part = slice(rank * 100, 100 + rank * 200)
        made.count(logits[part], target[part])
        seen = made.counts.clone()
        made.refresh()
        assert torch.equal(made.counts, seen)
        whole = MAPS[name]()
        whole.count(logits, target)
        whole._match(whole.counts)
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in made.state_dict().items()), name


def test_ranks_share_what_they_counted(tmp_path, pytestconfig):
    store = tmp_path / "store"
    other = subprocess.Popen([sys.executable, "-c", RANK.format(root=str(pytestconfig.rootpath), store=store)])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    try:
        ranks_share(0)
    finally:
        dist.destroy_process_group()
    assert other.wait(60) == 0


def task(outputs: nn.Module, **options) -> Reprogrammed:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, S))
    return Reprogrammed(model, PaddedPrompt(8, 4, squash="tanh"), outputs, **options)


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(T, (40,), generator=generator)
    return (torch.rand(40, 3, 4, 4, generator=generator) + target[:, None, None, None]) / 4, target


@pytest.mark.parametrize(
    ("every", "passes", "refreshes"),
    [
        (None, 0, 0),
        (0, 1, 1),
        (2, 2, 2),
        (Refresh(every_epochs=1), 3, 3),
        (Refresh(every_steps=4), 4, 4),  # before steps 0, 4, 8 and 12 of 15
        (Refresh(every_steps=4, online=True), 1, 4),
        (Refresh(every_epochs=1, online=True), 1, 3),
        (Refresh(once=True), 1, 1),
    ],
)
def test_fit_refreshes_when_it_is_due(every, passes, refreshes, monkeypatch):
    import fastprompt.training as training

    module = task(BayesianMap(S, T, refresh_every=every))
    seen, own = [], module.outputs.refresh
    monkeypatch.setattr(module.outputs, "refresh", lambda: (seen.append(int(module.outputs.counts.sum())), own()))
    made, once = [], training.refresh
    monkeypatch.setattr(training, "refresh", lambda *a, **k: (made.append(1), once(*a, **k)))
    rows = fit(module, pictures(), epochs=3, lr=0.1, batch_size=8, progress=False)
    assert (len(made), len(seen)) == (passes, refreshes)
    online = getattr(every, "online", False)
    assert seen == ([40] + [32 if every.every_steps else 40] * (refreshes - 1) if online else [40] * refreshes)
    assert len(rows) == 3
    assert module.training


@pytest.mark.parametrize(
    "every", [Refresh(every_steps=3), Refresh(every_steps=3, online=True), Refresh(every_epochs=2, online=True)]
)
def test_resuming_between_refreshes_gives_the_same_bits(every, tmp_path):
    def run(epochs, folder, resume=False):
        module = task(BayesianMap(S, T, top=0.5, momentum=0.5, refresh_every=every), head="1")
        rows = fit(
            module, pictures(), epochs=epochs, lr=0.1, batch_size=8, schedule="constant", folder=folder, resume=resume,
            progress=False,
        )  # fmt: skip
        return module, rows

    straight, rows = run(3, tmp_path / "a")
    run(1, tmp_path / "b")
    resumed, again = run(3, tmp_path / "b", resume=True)
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_methods_take_options_of_their_map():
    made = build("autovp", nn.Identity(), num_source=S, num_classes=T, canvas=8, image_size=4, labels={"sources_per_class": 2})
    assert made.outputs.index.shape == (T, 2)
    with pytest.raises(ValueError, match="num_source: expected a multiple of 8, 2 for each class, got 20"):
        build("attrvr", nn.Identity(), num_source=20, num_classes=T, canvas=8, image_size=4)


# ---- Bad input ----

ROW, ONE = torch.zeros(1, 6), torch.tensor([1])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LabelMap(8, 3, sources_per_class=3), "sources_per_class: expected 1 to 2, as 3 classes share 8 sources, got 3"),
        (lambda: LabelMap(8, 3, sources_per_class=0), "sources_per_class: expected 1 to 2"),
        (lambda: LabelMap(8, 3, sources_per_class=[1, 2, 1]), r'for method="given" one a class, at least 1, got \[1, 2, 1\]'),
        (lambda: LabelMap(8, 3, "first", sources_per_class=2), r'sources_per_class: expected 1 for method="first"'),
        (lambda: LabelMap(3, 4, "groups"), "num_classes: expected 1 to 3"),
        (lambda: LabelMap(8, 3, reduce="median"), "reduce: expected one of mean, sum, max, logsumexp, got 'median'"),
        (lambda: LabelMap(8, 3, reduce="logsumexp", of="probabilities"), "reduce: expected a reduction of probabilities"),
        (lambda: LabelMap(8, 3, of="scores"), "of: expected one of logits, probabilities"),
        (lambda: LabelMap(8, 3, matching="best"), "matching: expected one of greedy, optimal"),
        (lambda: LabelMap.from_index(torch.tensor([8]), 8), r"classes: expected sources from 0 to 7, got \[8\]"),
        (lambda: LabelMap.from_index([[1], []], 8), "at least one source for every class, got none for class 1"),
        (lambda: LabelMap.from_index([[1, 1]], 8), "classes: expected no source twice in a class"),
        (lambda: LabelMap.from_index(LabelMap(8, 3).segments, 9), "index: expected one map of 9 sources, without weights"),
        (lambda: LabelMap.from_similarity(torch.full((3, 2), torch.nan)), "similarity: expected finite"),
        (lambda: LabelMap.from_similarity(torch.ones(3, 2), 2), "sources_per_class: expected 1 to 1, as classes share no source"),
        (lambda: LabelMap(8, 3, sources_per_class=2)(torch.zeros(2, 9)), "labels: expected a map of 9 sources.* got one of 8"),
        (lambda: LabelMap(8, 3).fold(torch.zeros(9, 2)), r"weight: expected \[8, d\], a row a source, got \[9, 2\]"),
        (lambda: BayesianMap(8, 3, top=0), "top: expected None"),
        (lambda: BayesianMap(8, 3, smoothing=-1), "smoothing: expected 0 or more"),
        (lambda: BayesianMap(8, 3, momentum=1), "momentum: expected None, or 0 to below 1"),
        (lambda: BayesianMap(8, 3, refresh_every=-1), "refresh_every: expected None"),
        (lambda: BayesianMap(8, 0), "num_classes: expected at least 1, got 0"),
        (lambda: DescriptionMap(3, [2, 0, 1]), "descriptions: expected a number, or one for each of 3 classes, at least 1"),
        (lambda: DescriptionMap(3, 2, top=0), "top: expected at least 1"),
        (lambda: DescriptionMap(3, 2).count(ROW[:, :5], ONE), r"scores: expected \[B, 6\], got \[1, 5\]"),
        (lambda: DescriptionMap(3, 2).count(ROW, ONE * 3), r"target: expected values from 0 to 2, got \[3\]"),
        (lambda: AttributeMap(3, 2, alpha=2), "alpha: expected 0 to 1"),
        (lambda: AttributeMap(3, 2)(torch.zeros(2, 6)), r"scores: expected \[B, 12\]: 2 attributes a class, twice, got \[2, 6\]"),
        (lambda: LinearMap(8, 3, rank=4), "rank: expected None, or 1 to 3, got 4"),
        (lambda: LinearMap(8, 3, weight="tanh"), "weight: expected one of free, sigmoid"),
        (lambda: LinearMap(8, 3, rank=1, init="identity"), 'init: expected "normal", or "identity" for a free matrix'),
        (lambda: LinearMap(3, 8, init="identity"), 'init: expected "normal", or "identity" for a free matrix'),
        (lambda: LinearMap(8, 3, weight="sigmoid", init="identity"), 'init: expected "normal", or "identity" for a free'),
        (lambda: LinearMap(8, 3, init=torch.zeros(8, 3)), r"init: expected a floating point \[3, 8\], and no rank, got"),
        (lambda: LinearMap(8, 3, rank=1, init=torch.zeros(3, 8)), "and no rank, got torch.float32.*rank=1"),
        (lambda: LinearMap(8, 3, init="zeros"), "init: expected one of normal, identity, got 'zeros'"),
        (lambda: Refresh(), "Refresh: expected exactly one of"),
        (lambda: Refresh(every_steps=0), "every_steps: expected at least 1, got 0"),
        (lambda: Refresh(once=True, online=True), "online: expected False with once=True"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("module", [AttributeMap(3, 2), LinearMap(12, 3, rank=2)], ids=lambda module: type(module).__name__)
def test_every_map_takes_the_options_of_the_loss(module):
    """Also those that are more than a map of the scores: the focal loss, in float32, of what they give."""
    logits, target = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 2, 1, -100, 2])
    module = copy.deepcopy(module).double()
    log_p = module(logits).log_softmax(1)[target >= 0, target[target >= 0]]
    want = -((1 - log_p.exp()) ** 2 * log_p).mean()
    torch.testing.assert_close(module.loss(logits, target, focal=2.0), want)
    half = copy.deepcopy(module).bfloat16()
    assert half.loss(logits.bfloat16(), target).dtype == torch.float32
