"""Label maps: applying, counting, matching and `nn.LabelMap`, against plain formulas, on every path.

"torch" is the reference, "auto" what a user gets, "triton" the kernels (on a CPU in Triton's interpreter). A one-to-one
map only moves values and a count is an integer, so nearly everything here is compared bit for bit.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import mmap
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastprompt import _runtime
from fastprompt.functional import (
    COUNT_UNIT,
    Segments,
    bayesian_matrix,
    count_labels_,
    map_labels,
    mapped_cross_entropy,
    match_labels,
    segments,
    stack_maps,
)
from fastprompt.nn import LabelMap
from fastprompt.ops import mapping as ops
from fastprompt.ops import mapping_counts as counts_ops
from fastprompt.ops import mapping_cpu as cpu_ops
from fastprompt.reference import mapping as reference
from fastprompt.taxonomy import Alignment, Place
from fastprompt.tuning.mapping import Launch, pick
from tests.compare import check, check_bits, memory

pytestmark = pytest.mark.usefixtures("inside")
needs_triton = pytest.mark.skipif(not _runtime.HAS_TRITON, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
IMPLS = ("torch", "auto", TRITON)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (*IMPLS, pytest.param("triton, small tiles", marks=needs_triton))
SIZES = ((0, 5, 3), (1, 1, 1), (3, 7, 7), (5, 33, 0), (6, 31, 17), (17, 129, 10), (1, 300, 140))  # B, S, T


@pytest.fixture
def small_launch(monkeypatch):
    """Many tiles, and several turns over the targets or sources, at sizes that a test can afford."""
    monkeypatch.setattr(ops, "pick", lambda *_: Launch(4, 8, 4))


def path(name: str, request) -> str:
    if "small" in name:
        request.getfixturevalue("small_launch")
    return name.split(",")[0]


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def injective(sources, targets, seed=0):
    return torch.randperm(sources, generator=torch.Generator().manual_seed(seed))[:targets]


def gradient_of(g: Tensor, index: Tensor, sources: int) -> Tensor:
    """Target after target into its source, in float64."""
    d = torch.zeros(g.shape[0], sources, dtype=torch.float64)
    for t, s in enumerate(index.tolist()):
        d[:, s] += g[:, t].cpu().double()
    return d


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x [n, m] in other memory."""
    padded = torch.full((x.shape[0] * 2, x.shape[1] * 3 + 1), torch.nan, dtype=x.dtype, device=x.device)
    padded[::2, 1::3] = x
    return {
        "contiguous": x.contiguous(),
        "transposed": x.T.contiguous().T,
        "every other": padded[::2, 1::3],
        "slice": torch.cat([x, x], 1)[:, x.shape[1] :],
        "reversed in memory": torch.stack([x, x], 2)[..., 1],
    }


# ---- map_labels ----


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", PATHS)
def test_one_to_one(impl, size, dtype, device, request):
    impl = path(impl, request)
    batch, sources, targets = size
    index = injective(sources, targets).to(device)
    logits = rand(batch, sources, dtype=dtype).to(device).requires_grad_()
    g = rand(batch, targets, dtype=dtype, seed=1).to(device)
    before = memory(logits, index, g)
    out = map_labels(logits, index, impl=impl)
    (d,) = torch.autograd.grad(out, logits, g)
    check_bits(out, logits.detach()[:, index])
    check_bits(d, gradient_of(g, index, sources).to(dtype).to(device), "gradient")
    for was, now in zip(before, memory(logits, index, g), strict=True):
        assert torch.equal(was, now)


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [[2] * 40, [0, 1, 0, 2, 0, 1], [*range(19), *range(19)], [18, 0, 18], [3]], ids=len)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_source_that_several_targets_read_gets_the_sum(impl, index, dtype, device):
    index = torch.tensor(index, device=device)
    logits = rand(9, 19, dtype=dtype).to(device).requires_grad_()
    g = rand(9, len(index), dtype=dtype, seed=1).to(device)
    out = map_labels(logits, index, impl=impl)
    (d,) = torch.autograd.grad(out, logits, g)
    check_bits(out, logits.detach()[:, index])
    want = gradient_of(g, index, 19)
    # The kernels sum in float32 and round once (the interpreter's cast to bfloat16 truncates: one unit more).
    inner = dtype if impl == "auto" else torch.float32
    rival = torch.zeros(9, 19, dtype=inner, device=device).index_add_(1, index, g.to(inner))
    check(d, want, rival.to(dtype), name="gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_logits_and_gradients(impl, device, small_launch):
    index = injective(21, 11).to(device)
    logits, g = rand(10, 21).to(device), rand(10, 11, seed=1).to(device)
    want = gradient_of(g, index, 21).float().to(device)
    for name, x in layouts(logits).items():
        check_bits(map_labels(x, index, impl=impl), logits[:, index], name)
        leaf = x.detach().requires_grad_()
        for kind, upstream in layouts(g).items():
            (d,) = torch.autograd.grad(map_labels(leaf, index, impl=impl), leaf, upstream)
            check_bits(d, want, f"{name}, {kind} gradient")
    for row in (rand(1, 21), rand(1, 1)):  # stride 0
        x = row.to(device).expand(10, 21)
        check_bits(map_labels(x, index, impl=impl), x.contiguous()[:, index], "expanded")
    leaf = logits.clone().requires_grad_()
    for upstream in (torch.ones(1, 1), rand(1, 11)):
        g = upstream.to(device).expand(10, 11)
        (d,) = torch.autograd.grad(map_labels(leaf, index, impl=impl), leaf, g)
        check_bits(d, gradient_of(g, index, 21).float().to(device), "expanded gradient")
    strided = torch.stack([index, index], 1)[:, 0]
    check_bits(map_labels(logits, strided, impl=impl), logits[:, index], "strided index")


@pytest.mark.parametrize("impl", IMPLS)
def test_special_values_stay_in_their_place(impl, device):
    index = injective(40, 20).to(device)
    logits, g = rand(6, 40).to(device), rand(6, 20, seed=1).to(device)
    for k, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)):
        logits[k, index[2 * k]] = value
        logits[k, :] = torch.where(torch.arange(40, device=device) == 39 - k, value, logits[k, :])
        g[k, 3 * k] = value
    leaf = logits.clone().requires_grad_()
    out = map_labels(leaf, index, impl=impl)
    (d,) = torch.autograd.grad(out, leaf, g)
    check_bits(out, logits[:, index])
    check_bits(d, gradient_of(g, index, 40).float().to(device), "gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient_has_one(impl, device):
    index = injective(5, 3).to(device)
    x = rand(2, 5).to(device)
    assert not map_labels(x, index, impl=impl).requires_grad
    with torch.no_grad():
        assert not map_labels(x.requires_grad_(), index, impl=impl).requires_grad
    with torch.inference_mode():
        check_bits(map_labels(x, index, impl=impl), x.detach()[:, index])
    twice = (map_labels(x, index, impl=impl) * 2).sum() + map_labels(x, index[:1], impl=impl).sum()
    (d,) = torch.autograd.grad(twice, x)  # two losses on the same logits
    g = torch.full((2, 3), 2.0)
    g[:, 0] += 1
    check_bits(d, gradient_of(g, index, 5).float().to(device))


def test_the_reference_passes_gradcheck():
    x = rand(3, 7, dtype=torch.float64).requires_grad_()
    for index in (injective(7, 4), torch.tensor([1, 1, 6])):
        assert torch.autograd.gradcheck(lambda x, i=index: map_labels(x, i), x)
        assert torch.autograd.gradgradcheck(lambda x, i=index: map_labels(x, i), x)


@needs_triton
def test_a_second_derivative_of_the_kernels_is_refused(device):
    x = rand(3, 7).to(device).requires_grad_()
    (d,) = torch.autograd.grad(map_labels(x, injective(7, 4).to(device), impl="torch").square().sum(), x, create_graph=True)
    d.square().sum().backward()  # the reference has one
    loss = map_labels(x, injective(7, 4).to(device), impl="triton").square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@needs_triton
@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("wrong", [-1, 19, 2**31, -(2**63), 2**63 - 1])
def test_the_kernels_turn_an_index_out_of_range_into_nan(wrong, device):
    index = torch.tensor([4, wrong, 0, 7], device=device)
    logits, g = rand(9, 19).to(device), rand(9, 4).to(device)
    out, readers = ops._forward_triton(logits, index, True)
    d = ops._gradient_triton(g, index, readers, 19)
    known = torch.tensor([0, 2, 3], device=device)
    assert out[:, 1].isnan().all()
    check_bits(out[:, known], logits[:, index[known]])
    check_bits(d, gradient_of(g[:, known], index[known], 19).float().to(device))
    check_bits(reference.map_labels(logits, index), out, "reference")


def test_an_index_out_of_range_is_an_error_where_values_are_looked_at(device, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CHECK", "1")
    for wrong in (-1, 5, 2**31, 2**40, -(2**63)):
        with pytest.raises(ValueError, match=rf"labels: expected values from 0 to 4, got \[{wrong}\]"):
            map_labels(rand(2, 5).to(device), torch.tensor([0, wrong], device=device))


# ---- count_labels_ ----


def counts_of(logits: Tensor, target: Tensor, classes: int) -> Tensor:
    """Sample after sample in Python. NaN is larger than everything; the first index wins."""
    counts = torch.zeros(logits.shape[1], classes, dtype=torch.int64)
    for row, t in zip(logits.double().tolist(), target.tolist(), strict=True):
        nan = [s for s, v in enumerate(row) if v != v]
        if 0 <= t < classes:
            counts[nan[0] if nan else row.index(max(row)), t] += 1
    return counts


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 1), (50, 7, 1), (13, 31, 5), (9, 64, 64), (3, 300, 3), (1, 1025, 2)], ids=str)
@pytest.mark.parametrize("impl", PATHS)
def test_counts_equal_a_python_loop(impl, size, dtype, device, request):
    impl = path(impl, request)
    batch, sources, classes = size
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (batch,), generator=generator)
    target[::7] = -100
    ties = torch.randint(3, (batch, sources), generator=generator).to(dtype)
    for logits in (rand(batch, sources, dtype=dtype), ties, -ties, torch.full_like(ties, -torch.inf)):
        counts = torch.ones(sources, classes, dtype=torch.int64, device=device)
        before = memory(logits)
        given = (logits.to(device), target.to(device))
        assert count_labels_(counts, *given, impl=impl) is counts
        check_bits(counts, (counts_of(logits, target, classes) + 1).to(device))
        assert torch.equal(before[0], memory(logits)[0])


@pytest.mark.usefixtures("small_launch")
@pytest.mark.parametrize("impl", IMPLS)
def test_counts_with_nan_and_infinity(impl, device):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -3e38])
    chosen = torch.randint(8, (60, 19), generator=torch.Generator().manual_seed(0))
    logits = torch.cat([values[chosen % n] for n in (2, 4, 5, 8)])
    logits[:60, 1:] = torch.where(rand(60, 18) > 0, logits[:60, 1:], -torch.inf)
    target = torch.arange(len(logits)) % 3
    counts = torch.zeros(19, 3, dtype=torch.int64, device=device)
    count_labels_(counts, logits.to(device), target.to(device), impl=impl)
    want = counts_of(logits, target, 3)
    check_bits(counts, want.to(device))
    check_bits(torch.bincount(logits.argmax(1) * 3 + target, minlength=57).view(19, 3), want, "torch.argmax")


@pytest.mark.usefixtures("small_launch")
@pytest.mark.parametrize("impl", IMPLS)
def test_counts_do_not_depend_on_layout_order_or_batches(impl, device):
    logits, target = rand(40, 21).to(device), (torch.arange(40) % 4).to(device)
    want = count_labels_(torch.zeros(21, 4, dtype=torch.int64, device=device), logits, target, impl="torch")
    for name, x in layouts(logits).items():
        y = torch.stack([target, target + 1], 1)[:, 0]
        counts = torch.zeros_like(want)
        count_labels_(counts, x.requires_grad_(), y, impl=impl)
        check_bits(counts, want, name)
    counts, order = torch.zeros_like(want), injective(40, 40).to(device)
    for part in (order[:1], order[1:1], order[1:30], order[30:]):
        count_labels_(counts, logits[part], target[part], impl=impl)
    check_bits(counts, want, "batches")
    row = logits[:1].expand(40, 21)
    counts = count_labels_(torch.zeros_like(want), row, target[:1].expand(40), impl=impl)
    assert counts[row[0].argmax(), target[0]] == counts.sum() == 40


@needs_triton
@pytest.mark.parametrize("wrong", [-1, 3, 2**31, -(2**63), 2**63 - 1])
def test_the_kernel_drops_a_target_out_of_range(wrong, device):
    logits, target = rand(5, 6).to(device), torch.tensor([0, wrong, 2, 1, wrong], device=device)
    for count in (ops._count_triton, lambda *given: reference.count_labels_(*given[:4])):
        counts = torch.zeros(6, 3, dtype=torch.int64, device=device)
        count(counts, logits, target, None, "triton")
        check_bits(counts, counts_of(logits, target, 3).to(device))


def test_a_target_out_of_range_is_an_error_where_values_are_looked_at(device, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CHECK", "1")
    counts = torch.zeros(5, 3, dtype=torch.int64, device=device)
    for wrong in (-1, 3, -99):
        with pytest.raises(ValueError, match=rf"target: expected values from 0 to 2, got \[{wrong}\]"):
            count_labels_(counts, rand(3, 5).to(device), torch.tensor([0, wrong, -100], device=device))
    assert not counts.any()


@pytest.mark.parametrize("k", [1, 3, 12, 13])
def test_the_largest_of_hostile_rows(k, device):
    """Ties, few finite scores and rows without a softmax, counted as the reference does."""
    logits, target = rand(40, 30).to(device), torch.arange(40, device=device) % 3
    logits[:8, ::3] = 2.0
    logits[8:12] = -torch.inf
    logits[9, 0] = logits[10, 5] = logits[10, 7] = 1.0
    logits[12, 3], logits[13, 29], logits[14] = torch.nan, torch.inf, 0.0
    before = memory(logits)[0].clone()
    counts, want = (torch.zeros(30, 3, dtype=torch.int64, device=device) for _ in range(2))
    count_labels_(counts, logits, target, k=k)
    count_labels_(want, logits, target, k=k, impl="torch")
    if device.type == "cpu":
        check_bits(counts, want)
    else:  # another softmax's last bits
        assert (counts - want).abs().max() <= COUNT_UNIT >> 20
    assert torch.equal(memory(logits)[0].view(torch.int32), before.view(torch.int32))


# ---- match_labels ----


def matched(counts: Tensor) -> list[int]:
    """The published loop: T times the largest cell, the first of equals source by source; strike its row and column."""
    left, index = counts.tolist(), [-1] * counts.shape[1]
    for _ in index:
        best = max(max(row) for row in left)
        s = next(s for s, row in enumerate(left) if best in row)
        t = left[s].index(best)
        index[t] = s
        left[s] = [-1] * len(left[s])
        for row in left:
            row[t] = -1
    return index


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_matching_equals_repeated_argmax(data):
    targets = data.draw(st.integers(1, 7))
    sources = data.draw(st.integers(targets, 12))
    most = data.draw(st.sampled_from([0, 1, 2, 5, 2**62]))
    cells = st.lists(st.integers(0, most), min_size=sources * targets, max_size=sources * targets)
    counts = torch.tensor(data.draw(cells)).view(sources, targets)
    if data.draw(st.booleans()):
        counts[:, data.draw(st.integers(0, targets - 1))] = 0  # a class that is absent
    for few in (0, counts_ops._FEW_CELLS):  # by sorting, and one after the other
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counts_ops, "_FEW_CELLS", few)
            index = match_labels(counts)
        assert index.tolist() == matched(counts) == reference.match_labels(counts).tolist()
        assert index.dtype == torch.int64


def adversarial() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randint(1000, (300, 40), generator=generator)
    rank_one = torch.arange(60).view(60, 1) * torch.arange(30)
    return {
        "zeros": torch.zeros(9, 4, dtype=torch.int64),
        "all equal": torch.ones(50, 20, dtype=torch.int64),
        "square": torch.randint(3, (30, 30), generator=generator),
        "one source for all": torch.nn.functional.one_hot(torch.full((20,), 7), 25).T.contiguous(),
        "every source prefers the last target": rank_one,  # the order is struck again and again
        "every target prefers the last source": rank_one.flip(0).contiguous(),
        "sparse": torch.where(sparse > 990, sparse, 0),
        "dense": torch.randint(10**6, (400, 50), generator=generator),
        "one target": torch.tensor([[0], [5], [5], [2]]),
        "no target": torch.zeros(3, 0, dtype=torch.int64),
        "a column, not contiguous": torch.randint(5, (12, 24), generator=generator)[:, ::2],
        "beyond 32 bits": torch.tensor([[2**40, 2**40 + 1], [2**40 + 1, 2**63 - 1]]),
    }


@pytest.mark.parametrize("few", [0, 1 << 18])
@pytest.mark.parametrize("kind", adversarial())
def test_matching_hard_matrices(kind, few, device, monkeypatch):
    monkeypatch.setattr(counts_ops, "_FEW_CELLS", few)
    counts = adversarial()[kind].to(device)
    before = memory(counts)
    index = match_labels(counts)
    check_bits(index, torch.tensor(matched(counts.cpu()), dtype=torch.int64, device=device))
    assert len(set(index.tolist())) == counts.shape[1]
    assert torch.equal(before[0], memory(counts)[0])


# ---- Segments, matrices, several maps ----

LISTS = [[3, 1], [0], [7, 8, 9, 22], [5, 6, 1]]
WEIGHTS = [[0.3, 0.1], [2.0], [0.0, 0.1, 0.2, 0.3], [1.0, 1.0, 0.5]]
REDUCTIONS = ("mean", "sum", "max", "first", "logsumexp", "weighted", "top-k mean")
MAPS = {
    "uniform": segments(injective(23, 12).view(4, 3), 23, weights=torch.rand(4, 3)),
    "ragged": segments([*LISTS[:3], [5, 6]], 23, weights=[*WEIGHTS[:3], [1.0, 1.0]]),
    "shared": segments(LISTS, 23, weights=WEIGHTS),
    "hub": segments([[3, t + 4] for t in range(6)], 23, weights=torch.rand(12)),
    "single": segments([[3], [4], [9]], 23, weights=torch.rand(3)),
    "index": torch.tensor([3, 22, 3, 0]),
    "matrix": torch.rand(23, 4, generator=torch.Generator().manual_seed(2)),
}
MAPS["maps"] = stack_maps([MAPS["uniform"], MAPS["ragged"], MAPS["shared"]])
MAPS["indices"] = stack_maps([MAPS["index"], MAPS["index"].flip(0)])
MAPS["matrices"] = stack_maps([MAPS["matrix"], MAPS["matrix"] ** 2])


def classes_of(labels, n):
    """[(source, weight)] of every class of map n."""
    if isinstance(labels, Segments):
        starts = labels.starts[n * labels.num_classes :].tolist()
        weights = torch.ones(len(labels.members)) if labels.weights is None else labels.weights
        rows = [slice(*starts[t : t + 2]) for t in range(labels.num_classes)]
        return [list(zip(labels.members[r].tolist(), weights[r].tolist(), strict=True)) for r in rows]
    one = labels[n] if labels.dim() > (2 if labels.is_floating_point() else 1) else labels
    if one.is_floating_point():
        return [list(enumerate(column)) for column in one.T.tolist()]
    return [[(s, 1.0)] for s in one.tolist()]


def reduced(e, w, reduce, k):
    if reduce == "top-k mean":
        return e.topk(min(k, len(e))).values.mean()
    return {
        "mean": e.mean(), "sum": e.sum(), "max": e.max(), "first": e[0], "logsumexp": e.logsumexp(0), "weighted": (e * w).sum(),
        None: (e * w).sum(),
    }[reduce]  # fmt: skip


def formula(scores, labels, reduce, of="logits", k=None, prior=None, map_id=None):
    """Class after class in float64, as one would say it."""
    x = scores.double()
    v = x if of == "logits" else x.softmax(1)
    if prior is not None:
        v = v - prior.double() if of == "logits" else v / prior.double()
    rows = []
    for b in range(len(x)):
        out = []
        for entries in classes_of(labels, 0 if map_id is None else int(map_id[b])):
            weights = torch.tensor([w for _, w in entries], dtype=torch.float64)
            out.append(reduced(v[b, [s for s, _ in entries]], weights, reduce, k))
        rows.append(torch.stack(out))
    out = torch.stack(rows)
    return out if of == "logits" else out.log()


def options(name):
    labels = MAPS[name]
    for reduce in REDUCTIONS if isinstance(labels, Segments) else (None,):
        for of in ("logits", "probabilities"):
            if (reduce, of) != ("logsumexp", "probabilities"):
                yield {"reduce": reduce, "of": of, "k": 2 if reduce == "top-k mean" else None}


def both(call, x, *args, g=None, **kwargs):
    """call(x, ...) and the gradient of x, by default for random gradients from above."""
    out = call(x, *args, **kwargs)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)) if g is None else g
    return out, torch.autograd.grad(out, x, g.to(out))[0]


@pytest.mark.parametrize(
    ("few", "dtype"), [(0, torch.float32), (1 << 17, torch.float32), (0, torch.bfloat16)], ids=["fused", "few", "bfloat16"]
)
@pytest.mark.parametrize("name", MAPS)
def test_every_reduction_of_every_map(name, dtype, few, monkeypatch):
    monkeypatch.setattr(cpu_ops, "_FEW", few)
    labels = MAPS[name]
    x = (rand(3, 23) * 3).to(dtype).requires_grad_()
    map_id = torch.tensor([0, 1, 1]) if name in ("maps", "indices", "matrices") else None
    prior = torch.rand(23) + 0.1
    for option in options(name):
        for p in (None, prior):
            more = {"map_id": map_id, "prior": p, **option}
            true = both(formula, x, labels, **more)
            wide = both(map_labels, x.detach().double().requires_grad_(), labels, **more)[1]
            floor = torch.full((3, 1), 4e-6)  # the softmax's gradient is a difference of sums
            for impl in ("torch", "auto"):
                out, d = both(map_labels, x, labels, impl=impl, **more)
                assert out.dtype == (dtype if option["of"] == "logits" else torch.float32)
                check(out, true[0], true[0].to(out.dtype), ulps=8, name=f"{option} {impl}")
                check(d, wide, true[1].to(dtype), ulps=8, floor=floor, name="gradient")


LOSSES = (
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": torch.rand(4) + 0.1, "label_smoothing": 0.2},
    {"label_smoothing": 1.0}, {"weight": torch.rand(4), "reduction": "none"}, {"ignore_index": 0}, {"ignore_index": 3},
    {"ignore_index": 4},
)  # fmt: skip


@pytest.mark.parametrize("few", [0, 1 << 17], ids=["fused", "few"])
@pytest.mark.parametrize("name", ["uniform", "shared", "index", "matrix", "maps"])
def test_the_loss_is_pytorchs_on_the_mapped_scores(name, few, monkeypatch):
    monkeypatch.setattr(cpu_ops, "_FEW", few)
    labels, x = MAPS[name], (rand(9, 23) * 4).requires_grad_()
    map_id = torch.arange(9) % 3 if name == "maps" else None
    reduce = "mean" if isinstance(labels, Segments) else None

    def plain(x, target, of, **loss):
        return F.cross_entropy(formula(x, labels, reduce, of, map_id=map_id), target, **loss)

    for loss in LOSSES:
        target = torch.tensor([0, 3, -100, 1, 2, 3, 0, 1, 2])
        target[2] = loss.get("ignore_index", -100)
        wide = {k: v.double() if k == "weight" else v for k, v in loss.items()}
        for of in ("logits", "probabilities"):
            wanted = both(plain, x, target, of, **wide)
            for impl in ("torch", "auto"):
                got = both(mapped_cross_entropy, x, labels, target, of=of, map_id=map_id, impl=impl, **loss)
                assert got[0].dtype == torch.float32
                for one, true in zip(got, wanted, strict=True):
                    torch.testing.assert_close(one.double(), true.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_focal_and_unnormalised_losses(impl):
    labels, x, y = MAPS["shared"], rand(5, 23).requires_grad_(), torch.tensor([0, 1, 2, 3, -100])
    q = formula(x, labels, "sum", "probabilities")
    for focal in (0.0, 0.5, 4.0):
        picked = q[:4].gather(1, y[:4, None])[:, 0]
        want = (-picked * (1 - picked.exp()) ** focal).sum()
        got = mapped_cross_entropy(
            x, labels, y, reduce="sum", of="probabilities", renormalize=False, focal=focal, reduction="sum", impl=impl
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (got, want)), rtol=1e-4, atol=1e-6)
    sure = torch.zeros(1, 23).requires_grad_()
    sure.data[0, 0] = 200.0  # p is 1
    loss = mapped_cross_entropy(sure, MAPS["index"], torch.tensor([3]), focal=0.5, impl=impl)
    assert loss == 0
    assert torch.autograd.grad(loss, sure)[0].isfinite().all()


@pytest.mark.parametrize("few", [0, 1 << 17], ids=["fused", "few"])
@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("reduce", ["mean", "max", "logsumexp", "sum", "top-k mean"])
def test_confident_shifted_and_masked_rows(reduce, of, few, monkeypatch):
    monkeypatch.setattr(cpu_ops, "_FEW", few)
    if (reduce, of) == ("logsumexp", "probabilities"):
        return
    x = rand(6, 23)
    x[0, 7] += 9.2  # p of about 0.9999
    x[1] += 1e4
    x[2] -= 1e4
    x[3] = -torch.inf
    x[3, 8] = 2.0  # a single finite score
    x[4] *= 100
    y, option = torch.tensor([2, 1, 0, 2, 3, 1]), {"reduce": reduce, "of": of, "k": 2 if reduce == "top-k mean" else None}
    if reduce in ("mean", "sum", "top-k mean") and of == "logits":
        x[3] = 0  # every class would be -inf
    wide, x, near = x.double().requires_grad_(), x.requires_grad_(), 2e-3 if reduce == "logsumexp" else 2e-6
    more = {"g": torch.rand(6), "reduction": "none", **option}
    want = both(mapped_cross_entropy, wide, MAPS["ragged"], y, **more)
    for impl in ("torch", "auto"):
        for one, true in zip(both(mapped_cross_entropy, x, MAPS["ragged"], y, impl=impl, **more), want, strict=True):
            torch.testing.assert_close(one.double(), true, rtol=1e-3, atol=near)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_edges_of_the_loss(impl):
    labels, x = MAPS["ragged"], rand(3, 23).requires_grad_()
    ignored = torch.full((3,), -100)
    assert mapped_cross_entropy(x, labels, ignored, impl=impl).isnan()
    loss = mapped_cross_entropy(x, labels, ignored, reduction="sum", impl=impl)
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()
    empty = rand(0, 23).requires_grad_()
    for reduce in ("mean", "max", "logsumexp"):
        out = map_labels(empty, labels, reduce=reduce, impl=impl)
        assert out.shape == (0, 4)
        assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 23)
    assert mapped_cross_entropy(empty, labels, torch.zeros(0, dtype=torch.int64), reduction="sum", impl=impl) == 0
    y = torch.tensor([0, 1, 2])
    first = mapped_cross_entropy(x, labels, y, impl=impl)
    twice = first + 2 * mapped_cross_entropy(x, MAPS["index"], y, impl=impl)  # two losses on the same scores
    (d,) = torch.autograd.grad(twice, x, retain_graph=True)
    assert torch.equal(d, torch.autograd.grad(twice, x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for m in ("uniform", "matrix"):
            check_bits(map_labels(x.detach(), MAPS[m], impl="torch"), map_labels(x.detach(), MAPS[m].to("cpu"), impl="torch"))
            assert map_labels(x, MAPS[m], impl=impl).dtype == torch.float32
            torch.testing.assert_close(
                map_labels(x, MAPS[m], impl=impl), formula(x, MAPS[m], "mean" if m == "uniform" else None).float()
            )


@pytest.mark.parametrize("few", [0, 1 << 17], ids=["fused", "few"])
@pytest.mark.parametrize("reduce", ["max", "top-k mean"])
def test_the_first_of_equals_has_the_gradient(reduce, few, monkeypatch):
    monkeypatch.setattr(cpu_ops, "_FEW", few)
    x = torch.zeros(2, 23).requires_grad_()
    given = {"reduce": reduce, "k": 2 if reduce != "max" else None}
    seg = segments([[9, 4, 2], [5, 6, 1]], 23)
    for impl in ("torch", "auto"):
        (d,) = torch.autograd.grad(map_labels(x, seg, impl=impl, **given).sum(), x)
        assert d[0].nonzero()[:, 0].tolist() == ([5, 9] if reduce == "max" else [4, 5, 6, 9])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_products_and_partitions_are_used(value):
    """One source of class 1 and one that no class reads, in rows of their own, the first of them ignored by the loss."""
    y = torch.tensor([-100, 1, 0, 2])
    x = rand(4, 23)
    x[0, 7], x[1, 22] = value, value
    for name in ("uniform", "ragged"):
        seg = segments([[0, 1, 2], [7, 8], [3]] if name == "ragged" else [[0, 1, 2], [7, 8, 9], [3, 4, 5]], 23)
        for option in ({}, {"of": "probabilities"}, {"reduce": "top-k mean", "k": 2}):
            for call, more in ((map_labels, ()), (mapped_cross_entropy, (y,))):
                got, want = (
                    both(call, x.clone().requires_grad_(), seg, *more, impl=impl, **option) for impl in ("auto", "torch")
                )
                torch.testing.assert_close(got[0], want[0], equal_nan=True)
                known = want[1].isfinite().all(1)
                assert known.sum() >= 2 or not want[0].isfinite().all()
                torch.testing.assert_close(got[1][known], want[1][known])


def test_layouts_of_scores_and_gradients_of_segments():
    x, g = rand(10, 23), rand(10, 4, seed=1)
    for name in ("uniform", "ragged", "shared", "matrix"):
        want = both(map_labels, x.clone().requires_grad_(), MAPS[name], g=g)
        for kind, other in layouts(x).items():
            for upstream in layouts(g).values():
                got = both(map_labels, other.detach().requires_grad_(), MAPS[name], g=upstream)
                torch.testing.assert_close(got, want, msg=f"{name} {kind}")


def test_the_reference_of_segments_passes_gradcheck():
    x = rand(2, 23, dtype=torch.float64).requires_grad_()
    weights = torch.rand(11, dtype=torch.float64, requires_grad=True)
    matrix, y = MAPS["matrix"].double().requires_grad_(), torch.tensor([0, 3])
    for option in options("shared"):  # every reduction
        assert torch.autograd.gradcheck(lambda x, o=option: map_labels(x, MAPS["shared"], **o), x, fast_mode=True)

    def learned(x, weights, matrix, of):
        seg = MAPS["shared"]._replace(weights=weights)
        loss = mapped_cross_entropy(x, seg, y, reduce="weighted", of=of, focal=2.0)
        return loss + mapped_cross_entropy(x, matrix, y, of=of)

    for of in ("logits", "probabilities"):
        assert torch.autograd.gradcheck(learned, (x, weights, matrix, of), fast_mode=True)


def test_a_class_without_mass_is_minus_infinity_and_has_no_gradient():
    x = torch.full((1, 23), -torch.inf)
    x[0, 0] = 1.0
    for name, reduce in (("ragged", "mean"), ("ragged", "max"), ("ragged", "weighted"), ("matrix", None)):
        labels = MAPS[name] if name == "ragged" else torch.eye(23)[:, :4]
        for impl in ("torch", "auto"):
            leaf = x.clone().requires_grad_()
            out = map_labels(leaf, labels, reduce=reduce, of="probabilities", impl=impl)
            assert (out == -torch.inf).sum() == 3
            assert out.isfinite().sum() == 1
            (d,) = torch.autograd.grad(out[out.isfinite()].sum(), leaf)
            assert d.isfinite().all(), (name, reduce, impl)


def test_maps_are_found_again_and_a_changed_one_is_not():
    x, members = rand(4, 9), torch.tensor([[0, 1], [2, 3]])
    seg = segments(members, 9)
    before = map_labels(x, seg, reduce="max")
    check_bits(map_labels(x, seg, reduce="max"), before)
    seg.members.copy_(torch.tensor([5, 6, 7, 8]))
    check_bits(map_labels(x, seg, reduce="max"), torch.stack([x[:, 5:7].amax(1), x[:, 7:].amax(1)], 1))
    other = segments([[3], [4], [8]], 9)
    with torch.inference_mode():
        map_labels(x, other)
    map_labels(x.requires_grad_(), other).sum().backward()


@needs_triton
def test_operators_of_segments_are_registered_and_compile(device):
    x, y = rand(6, 23).to(device).requires_grad_(), (torch.arange(6) % 4).to(device)
    seg, index = MAPS["ragged"].to(device), MAPS["index"].to(device)
    for parts, sizes in (([*seg[:5]], list(seg[6:])), ([index], [])):
        for loss, reduction in ((True, "mean"), (True, "none"), (False, "none")):
            flags = (sizes, "logsumexp" if sizes else "first", None, False, loss, reduction, True, 0.1, 0.0, -100)
            given = (x.detach(), parts, None, None, None, y if loss else None, None, True, *flags)
            torch.library.opcheck(torch.ops.fastprompt.map_segments.default, given)
            out, losses, *saved = torch.ops.fastprompt.map_segments.default(*given)
            g = rand(*(losses if loss else out).shape).to(device)
            given = (g, x.detach(), parts, None, None, None, y if loss else None, [out, *saved], *flags)
            torch.library.opcheck(torch.ops.fastprompt.map_segments_gradient.default, given)
    compiled = torch.compile(mapped_cross_entropy, fullgraph=True, backend="aot_eager")
    for labels in (seg, index, MAPS["matrix"].to(device), None):
        for impl in ("auto", "triton"):
            out = both(mapped_cross_entropy, x, labels, y, impl=impl)
            torch.testing.assert_close(both(compiled, x, labels, y, impl=impl), out)
            torch.testing.assert_close(out, both(mapped_cross_entropy, x, labels, y, impl="torch"))
    for out in (map_labels(x, seg, impl="triton"), mapped_cross_entropy(x, seg, y, impl="triton")):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("sources", [2**18, 9973])
def test_many_sources(sources):
    x = rand(2, sources).requires_grad_()
    seg = segments(injective(sources, sources).tensor_split(10), sources)
    y = torch.tensor([0, 9])
    want = both(mapped_cross_entropy, x.detach().double().requires_grad_(), seg, y)
    for one, true in zip(both(mapped_cross_entropy, x, seg, y), want, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_ragged_map_of_all_sources_in_another_order(dtype):
    """As many entries as sources: a matrix of the sources must not meet the entries."""
    x, seg = rand(3, 23).to(dtype), segments(injective(23, 23).tensor_split(3), 23)
    torch.testing.assert_close(map_labels(x, seg).double(), map_labels(x.double(), seg, impl="torch"), rtol=1e-2, atol=1e-3)


# ---- Published maps ----


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_counts_by_probability(k, impl):
    logits, target = rand(50, 9), torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    target[target == 1] = 2  # a class that is absent
    logits[3, :], logits[4, 2], logits[5, :] = 0.0, torch.nan, -torch.inf
    counts = count_labels_(torch.zeros(9, 3, dtype=torch.int64), logits, target, k=k, impl=impl)
    want = torch.zeros(9, 3, dtype=torch.float64)
    for row, t in zip(logits.double(), target.tolist(), strict=True):
        p = row.softmax(0)
        for s in sorted(range(9), key=lambda s: (-p[s], s))[:k]:
            want[s, t] += 0.0 if p.isnan().any() else p[s]
    torch.testing.assert_close(counts.double() / COUNT_UNIT, want, rtol=1e-6, atol=1e-6)
    parts = torch.zeros_like(counts)
    for part in (slice(0, 1), slice(1, 30), slice(30, 50)):
        count_labels_(parts, logits[part], target[part], k=k, impl=impl)
    check_bits(parts, counts)


@pytest.mark.parametrize("smoothing", [0, 1, 2.5])
def test_bayesian_maps_equal_the_published_loops(smoothing):
    counts = torch.tensor([[3, 0, 1], [0, 0, 0], [2, 0, 5], [0, 0, 4]])
    want = torch.zeros(4, 3, dtype=torch.float64)
    for s, row in enumerate(counts.tolist()):
        for t, n in enumerate(row):
            want[s, t] = n / (sum(row) + smoothing) if n else 0.0
    for t in range(3):
        total = want[:, t].sum()
        want[:, t] = want[:, t] / total if total else 1 / 4  # a class that was never counted
    check_bits(bayesian_matrix(counts, smoothing), want.float())
    check_bits(bayesian_matrix(counts * COUNT_UNIT, smoothing, COUNT_UNIT), want.float())
    assert torch.equal(bayesian_matrix(torch.tensor([[7]])), torch.ones(1, 1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_optimal_matching_beats_every_other(data):
    targets = data.draw(st.integers(1, 4))
    cells = data.draw(st.lists(st.integers(0, 9), min_size=5 * targets, max_size=5 * targets))
    counts = torch.tensor(cells).view(5, targets)
    index = match_labels(counts, optimal=True)

    def value(index):
        return int(counts[list(index), range(targets)].sum())

    assert len(set(index.tolist())) == targets
    assert index.dtype == torch.int64
    assert value(index) == max(map(value, itertools.permutations(range(5), targets)))


# ---- Memory ----

NORESERVE = 0x4000  # Linux; Python names it from 3.13


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_offsets_beyond_32_bits():
    """Rows and columns 2^31 elements apart, on memory that is reserved but never touched in between."""
    far = 2**31 + 16
    held = mmap.mmap(-1, 4 * (2 * far + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    big = torch.frombuffer(held, dtype=torch.float32)
    index, target = torch.tensor([2, 0]), torch.tensor([0, 1])
    for strides in ((far, 1), (1, far)):
        shape = (2, 3) if strides[0] == far else (2, 2)
        x = big.as_strided(shape, strides)
        x.copy_(rand(*shape))
        i = index % shape[1]
        out, readers = ops._forward_triton(x, i, True)
        check_bits(out, x[:, i].contiguous())
        d = ops._gradient_triton(x[:, :2], i, readers, shape[1])
        check_bits(d, gradient_of(x[:, :2], i, shape[1]).float())
        counts = torch.zeros(shape[1], 2, dtype=torch.int64)
        ops._count_triton(counts, x, target, None, "triton")
        check_bits(counts, counts_of(x, target, 2))
        x.zero_()
    counts = torch.frombuffer(held, dtype=torch.int64).as_strided((2, far // 2 + 4), (far // 2 + 4, 1))
    ops._count_triton(counts, torch.tensor([[0.0, 1.0]]), torch.tensor([far // 2 + 3]), None, "triton")
    assert counts[1, -1] == 1
    del big, x, counts


LARGE = {
    "many rows, few classes": (256, [[10 * i + t for i in range(60)] for t in range(10)]),
    "few rows": (8, [[10 * i + t for i in range(60)] for t in range(10)]),
    "ragged": (300, [list(range(t * t, t * t + 2 * t + 1)) for t in range(24)]),
    "shared": (260, [list(range(20 * t, 20 * t + 55)) for t in range(12)]),
}


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("kind", LARGE)
def test_large_maps_on_a_cpu(kind, reduce):
    """What becomes a product there, or is not kept for a backward, and an infinite score that no class may see."""
    batch, lists = LARGE[kind]
    seg, x, y = segments(lists, 600), rand(batch, 600), torch.arange(batch) % len(lists)
    unread = sorted(set(range(600)) - {s for row in lists for s in row})
    for spoiled in (False, True):
        if spoiled and unread:
            x[3, unread[0]], x[4, unread[-1]] = torch.inf, torch.nan
        wide = x.double().requires_grad_()
        columns = [wide[:, row].mean(1) if reduce == "mean" else wide[:, row].max(1).values for row in lists]
        true = torch.stack(columns, 1)
        loss = F.cross_entropy(true, y)
        (slope,) = torch.autograd.grad(loss, wide)
        given = x.clone().requires_grad_()
        got = mapped_cross_entropy(given, seg, y, reduce=reduce)
        torch.testing.assert_close(got.double(), loss, rtol=1e-6, atol=1e-6)
        (d,) = torch.autograd.grad(got, given)
        torch.testing.assert_close(d.double(), slope, rtol=1e-5, atol=1e-8)
        for out in (map_labels(given, seg, reduce=reduce), map_labels(x, seg, reduce=reduce)):
            assert out.is_contiguous()
            torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "classes"), [(15, 10), (16, 16), (64, 3), (64, 17)])
def test_matrix_products_either_way(batch, classes):
    x, matrix, y = rand(batch, 50), rand(50, classes).double(), torch.arange(batch) % classes
    given, weight = x.clone().requires_grad_(), matrix.float().requires_grad_()
    wide, true_weight = x.double().requires_grad_(), matrix.clone().requires_grad_()
    assert map_labels(given, weight).is_contiguous()
    torch.testing.assert_close(map_labels(given, weight).double(), wide @ true_weight, rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad(F.cross_entropy(wide @ true_weight, y), (wide, true_weight))
    got = torch.autograd.grad(mapped_cross_entropy(given, weight, y), (given, weight))
    for d, true in zip(got, want, strict=True):
        torch.testing.assert_close(d.double(), true, rtol=1e-4, atol=1e-6)


# ---- Registration, compilation ----


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_of_the_map(layout, device):
    x, index = layouts(rand(4, 9).to(device))[layout], injective(9, 5).to(device)
    for differentiable in (True, False):
        torch.library.opcheck(torch.ops.fastprompt.map_labels, (x, index, differentiable))
    out, readers = torch.ops.fastprompt.map_labels(x, index, True)
    torch.library.opcheck(torch.ops.fastprompt.map_labels_gradient, (out, index, readers, 9))


@pytest.mark.parametrize("impl", ["auto", TRITON])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_of_the_counts(impl, layout, device):
    x, target = layouts(rand(4, 9).to(device))[layout], torch.arange(4, device=device) % 3
    counts = torch.zeros(9, 3, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.fastprompt.count_labels_, (counts, x, target, None, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_compile_without_a_graph_break(impl, device):
    torch._dynamo.reset()
    x, index = rand(6, 9).to(device).requires_grad_(), injective(9, 4).to(device)
    target = torch.arange(6, device=device) % 4

    def step(x, index, target, counts):
        count_labels_(counts, x, target, impl=impl)
        return torch.nn.functional.cross_entropy(map_labels(x, index, impl=impl), target)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)):
        counts = torch.zeros(9, 4, dtype=torch.int64, device=device)
        loss = run(x, index, target, counts)
        results.append((loss, *torch.autograd.grad(loss, x), counts))
    for plain, compiled in zip(*results, strict=True):
        check_bits(compiled, plain)


# ---- LabelMap ----


def test_a_random_map_is_the_start_of_a_seeded_permutation():
    state = torch.get_rng_state()
    label_map = LabelMap(1000, 10, "random", seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(label_map.index, torch.randperm(1000)[:10])
    assert not torch.equal(label_map.index, LabelMap(1000, 10, "random", seed=8).index)
    assert label_map.refresh_every is None
    with pytest.raises(RuntimeError, match="fixed map"):
        label_map.refresh()


@pytest.mark.parametrize("method", ["frequent", "iterative"])
def test_refreshing_equals_the_published_algorithm(method, device):
    label_map = LabelMap(30, 6, method).to(device)
    assert label_map.refresh_every == {"frequent": 0, "iterative": 1}[method]
    with pytest.raises(RuntimeError, match="count first"):
        label_map.refresh()
    for seed in range(2):  # the second time from zero again
        logits = rand(500, 30, seed=seed).to(device)
        target = torch.randint(6, (500,), generator=torch.Generator().manual_seed(seed)).to(device)
        target[target == 2] = 3  # class 2 is absent
        logits[:, 4] += 2 * (target == 5)
        label_map.reset_counts()
        for part in range(0, 500, 64):
            label_map.count(logits[part : part + 64], target[part : part + 64])
        label_map.refresh()
        want = matched(counts_of(logits, target, 6))
        assert label_map.index.tolist() == want
        assert label_map.index[5] == 4
        check_bits(label_map(logits), logits[:, label_map.index])


def test_the_loss_is_cross_entropy_in_float32():
    label_map = LabelMap(20, 5)
    logits, target = rand(8, 20, dtype=torch.bfloat16).requires_grad_(), torch.arange(8) % 5
    loss = label_map.loss(logits, target)
    mapped = logits.detach().double()[:, label_map.index]
    want = (mapped.logsumexp(1) - mapped[torch.arange(8), target]).mean()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - want.item()) < 1e-6
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert label_map.loss(logits.double(), target).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert label_map(logits.float()).dtype == torch.float32  # moved, not computed
        assert label_map.loss(logits.float(), target).dtype == torch.float32


def test_a_label_map_is_a_plain_module(device):
    label_map = LabelMap(20, 5, refresh_every=3)
    assert list(label_map.state_dict()) == ["index"]
    assert not list(label_map.parameters())
    assert repr(label_map) == "LabelMap(20 -> 5, method=iterative, refresh_every=3)"
    assert label_map.taxonomy == Place(alignment=Alignment.STATISTICAL)
    label_map.count(rand(9, 20), torch.arange(9) % 5)
    label_map.refresh()
    assert list(label_map.state_dict()) == ["index"]
    for twin in (copy.deepcopy(label_map), pickle.loads(pickle.dumps(label_map))):
        assert torch.equal(twin.index, label_map.index)
        assert torch.equal(twin.counts, label_map.counts)
        twin.reset_counts()
        assert label_map.counts.sum() == 9
    rebuilt = LabelMap(**json.loads(json.dumps(label_map.config())))
    assert rebuilt.config() == label_map.config()
    rebuilt.load_state_dict(label_map.state_dict(), strict=True)
    assert torch.equal(rebuilt.index, label_map.index)
    saved = io.BytesIO()
    torch.save(label_map.state_dict(), saved)
    saved.seek(0)
    torch.load(saved, weights_only=True)
    moved = label_map.to(device).half()
    assert moved.index.dtype == moved.counts.dtype == torch.int64
    assert moved.index.device == moved.counts.device == rand(1).to(device).device
    with pytest.raises(RuntimeError, match="size mismatch"):
        LabelMap(20, 6).load_state_dict(label_map.state_dict())


@pytest.mark.parametrize("method", ["random", "frequent", "iterative"])
def test_the_configuration_rebuilds_a_label_map(method):
    label_map = LabelMap(12, 4, method, seed=3)
    assert torch.equal(LabelMap(**label_map.config()).index, label_map.index)


# ---- Bad input ----

ONE, COUNTS, TARGET = torch.zeros(2, 5), torch.zeros(5, 3, dtype=torch.int64), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: map_labels(ONE.long(), TARGET), TypeError, "scores: expected a floating point dtype, got torch.int64"),
        (lambda: map_labels(ONE[0], TARGET), ValueError, r"scores: expected \[B, S\] .*, got \[5\]"),
        (lambda: map_labels(ONE[:, :0], TARGET), ValueError, "at least one source class"),
        (lambda: map_labels(ONE, TARGET.int()), TypeError, "labels: expected int64 or a floating point matrix, got torch.int32"),
        (lambda: map_labels(ONE, TARGET[None]), ValueError, r"labels: expected \[T\], got \[1, 2\]"),
        (lambda: map_labels(ONE, TARGET.to("meta")), ValueError, "labels: expected a tensor on cpu"),
        (lambda: map_labels(ONE, TARGET + 4), ValueError, r"labels: expected values from 0 to 4, got \[5\]"),
        (lambda: map_labels(ONE, TARGET, impl="fast"), ValueError, "impl: expected one of"),
        (lambda: count_labels_(COUNTS, ONE.long(), TARGET), TypeError, "logits: expected a floating point dtype"),
        (lambda: count_labels_(COUNTS.int(), ONE, TARGET), TypeError, "counts: expected int64"),
        (lambda: count_labels_(COUNTS[0], ONE, TARGET), ValueError, r"counts: expected \[S, T\], got \[3\]"),
        (
            lambda: count_labels_(COUNTS[:4], ONE, TARGET),
            ValueError,
            "counts: expected one row a source, 5, got 4 rows",
        ),
        (lambda: count_labels_(COUNTS[:, :2], ONE, TARGET), ValueError, "counts: expected a contiguous tensor"),
        (
            lambda: count_labels_(COUNTS, ONE, TARGET[:1]),
            ValueError,
            r"target: expected \[2\], one a sample, got \[1\]",
        ),
        (lambda: count_labels_(COUNTS, ONE, TARGET.float()), TypeError, "target: expected int64"),
        (lambda: count_labels_(COUNTS, ONE, TARGET + 2), ValueError, r"target: expected values from 0 to 2, got \[3\]"),
        (
            lambda: segments([[1], []], 5),
            ValueError,
            "classes: expected at least one source for every class, got none for class 1",
        ),
        (
            lambda: segments([[1, 1]], 5),
            ValueError,
            "classes: expected no source twice in a class, got source 1 twice in class 0",
        ),
        (lambda: segments([[5]], 5), ValueError, r"classes: expected sources from 0 to 4, got \[5\]"),
        (lambda: segments([[1]], 0), ValueError, "num_source: expected at least 1"),
        (lambda: segments(torch.zeros(2), 5), ValueError, r"classes: expected \[T, m\]"),
        (lambda: segments((TARGET, TARGET.int()), 5), TypeError, "classes: expected int64 starts"),
        (lambda: segments([[1]], 5, weights=[[1.0, 2.0]]), ValueError, "weights: expected the lengths of the classes"),
        (lambda: stack_maps([]), ValueError, "maps: expected at least one"),
        (lambda: stack_maps([segments([[1]], 5), segments([[1]], 6)]), ValueError, "maps: expected single maps"),
        (lambda: map_labels(ONE, segments([[1]], 6)), ValueError, "labels: expected a map of 5 sources"),
        (lambda: map_labels(ONE, segments([[1]], 5), reduce="median"), ValueError, "reduce: expected one of mean, sum"),
        (lambda: map_labels(ONE, segments([[1]], 5), reduce="top-k mean"), ValueError, "k: expected at least 1"),
        (lambda: map_labels(ONE, segments([[1]], 5), reduce="weighted"), ValueError, "labels: expected Segments with weights"),
        (lambda: map_labels(ONE, TARGET, reduce="mean"), ValueError, "reduce: expected None"),
        (lambda: map_labels(ONE, torch.zeros(4, 2)), ValueError, "labels: expected a matrix with a row for each of 5"),
        (lambda: map_labels(ONE, [1]), TypeError, "labels: expected an int64 index, Segments or a matrix"),
        (lambda: map_labels(ONE, TARGET[None], prior=torch.ones(5)), ValueError, "map_id: expected"),
        (lambda: map_labels(ONE, TARGET[None], map_id=TARGET), ValueError, r"map_id: expected values from 0 to 0, got \[1\]"),
        (lambda: map_labels(ONE, TARGET, prior=torch.ones(4)), ValueError, r"prior: expected a floating point \[5\]"),
        (lambda: map_labels(ONE, TARGET, of="odds"), ValueError, "of: expected one of logits, probabilities"),
        (
            lambda: map_labels(ONE, segments([[1]], 5), reduce="logsumexp", of="probabilities"),
            ValueError,
            "reduce: expected a reduction of probabilities",
        ),
        (lambda: mapped_cross_entropy(ONE, TARGET, TARGET + 1), ValueError, r"target: expected values from 0 to 1, got \[2\]"),
        (lambda: mapped_cross_entropy(ONE, TARGET + 4, TARGET), ValueError, r"labels: expected values from 0 to 4, got \[5\]"),
        (lambda: mapped_cross_entropy(ONE, TARGET, TARGET, reduction="max"), ValueError, "reduction: expected one of"),
        (
            lambda: mapped_cross_entropy(ONE, TARGET, TARGET, weight=ONE[0]),
            ValueError,
            r"weight: expected a floating point \[2\]",
        ),
        (lambda: mapped_cross_entropy(ONE, TARGET, TARGET, label_smoothing=2), ValueError, "label_smoothing: expected 0 to 1"),
        (lambda: mapped_cross_entropy(ONE, TARGET, TARGET, focal=-1), ValueError, "focal: expected 0 or more"),
        (lambda: count_labels_(COUNTS, ONE, TARGET, k=6), ValueError, "k: expected 1 to 5"),
        (lambda: bayesian_matrix(COUNTS, -1), ValueError, "smoothing: expected 0 or more"),
        (lambda: match_labels(COUNTS.T), ValueError, "at least as many sources as targets.*, got"),
        (lambda: match_labels(COUNTS - 1), ValueError, "counts: expected no negative numbers, got -1"),
        (lambda: match_labels(COUNTS.float()), TypeError, "counts: expected int64"),
        (lambda: match_labels(COUNTS[0]), ValueError, r"counts: expected \[S, T\]"),
        (lambda: LabelMap(3, 4), ValueError, "num_classes: expected 1 to 3, the number of source classes, got 4"),
        (lambda: LabelMap(3, 0), ValueError, "num_classes: expected 1 to 3"),
        (
            lambda: LabelMap(3, 2, "best"),
            ValueError,
            "method: expected one of random, first, groups, frequent, iterative, given, got 'best'",
        ),
        (lambda: LabelMap(3, 2, "random", refresh_every=1), ValueError, "refresh_every: expected"),
        (lambda: LabelMap(3, 2, refresh_every=0), ValueError, "refresh_every: expected at least 1"),
        (lambda: LabelMap(3, 2)(ONE[:, :2]), ValueError, "labels: expected values from 0 to 1"),
    ],
)
def test_bad_input_is_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
    assert not COUNTS.any()


def test_launches_cover_their_columns():
    for kernel in ("forward", "gradient", "count"):
        for columns in (0, 1, 2, 3, 17, 1000, 10**6):
            launch = pick(kernel, columns, "sm_90")
            assert launch.TILE == pick(kernel, 10**6, "sm_90").TILE
            assert launch.COLUMNS & (launch.COLUMNS - 1) == 0 < launch.COLUMNS
