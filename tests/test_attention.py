"""`functional.prefix_attention`: numbers, gradients, layouts, registration, compilation and errors, on every path.

"auto" is the path a user gets (on a CPU PyTorch's own flash attention, merged), "triton" the kernels (on a CPU in Triton's
interpreter). Both are compared with the reference in float64, and the reference with PyTorch's attention.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastprompt import _runtime
from fastprompt.functional import prefix_attention
from fastprompt.nn import SoftPrompt
from fastprompt.ops import attention as ops
from fastprompt.reference import attention as reference
from tests.attention_cases import BF16, F16, F32, LAYOUTS, TRAINED, Case, gradients, options, run, sampled, sizes, tensors, truth
from tests.compare import check, check_bits, memory

needs_triton = pytest.mark.skipif(not _runtime.HAS_TRITON, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
IMPLS = ("auto", TRITON)

# Rounding errors allowed, in units in the last place of what is summed (see `sizes`). PyTorch's CPU attention has an exp
# that is right to 20 units; in 16 bits the weights themselves are rounded before they meet the values.
FLOOR = {F32: 24.0, F16: 4.0, BF16: 4.0}


def agree(case, device, impl, held=None, **changes):
    """Results and gradients of a case on a path against the truth, and the memory of its inputs untouched."""
    held = tensors(case, device) if held is None else held
    before = memory(*held.values())
    got = run(case, held, impl, **changes)
    want, rival, size = truth(case, held), run(case, held, "torch"), sizes(case, held)
    assert set(got) == set(want)
    found = [got]
    if impl == "auto" and not case.through_lse:  # nobody asks for the log-sum-exp: another way through the CPU path
        found.append(run(case, held, impl, **changes, return_lse=False))
        found.append(run(case, held, impl, (), **changes, return_lse=False))
    for results, name in itertools.chain.from_iterable(zip([each] * len(each), each, strict=True) for each in found):
        floor = FLOOR[case.dtype] * torch.finfo(case.dtype).eps * size[name]
        check(results[name], want[name], rival[name], ulps=2, floor=floor, name=f"{case}: {name}")
    for was, now in zip(before, memory(*held.values()), strict=True):
        assert torch.equal(was, now)
    return got


# ---- The reference is attention ----


def plain(q, k, v, pk, pv, index, prefix_lengths, lengths, key_mask, gate, scale, causal, window, left):
    """Attention of one query at a time to the columns that it sees, as the documentation says."""
    group = q.shape[1] // k.shape[1]
    (batch, heads, queries), keys = q.shape[:3], k.shape[2]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        columns = []
        if pk is not None:
            factor = 1 if gate is None else gate.expand(batch, heads)[b, h]
            mine = [0 if pk.shape[0] == 1 else b] if index is None else index[b].tolist()
            for n in mine:
                rows = pk.shape[2] if prefix_lengths is None else int(prefix_lengths[n])
                columns += [(factor * pk[n, h // group, j], factor * pv[n, h // group, j]) for j in range(rows) if n >= 0]
        for j in range(keys):
            ahead = j - (i + keys - queries)
            length = keys if lengths is None else int(lengths[b])
            seen = not (causal and ahead > 0) and (not window or abs(ahead) < window)
            seen = seen and (j >= keys - length if left else j < length)
            if seen and (key_mask is None or bool(key_mask[b, j])):
                columns.append((k[b, h // group, j], v[b, h // group, j]))
        if columns:
            key, value = (torch.stack(some) for some in zip(*columns, strict=True))
            lse[b, h, i] = torch.logsumexp(key @ q[b, h, i] * scale, 0)
            out[b, h, i] = F.scaled_dot_product_attention(q[b, h, i][None], key, value, scale=scale)[0]
    return out, lse


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_is_attention_to_what_a_query_sees(seed):
    draw = random.Random(seed)
    case = replace(sampled(draw, (0, 1, 2, 3, 5)), packed=False, softcap=None, layout="contiguous", dtype=F32)
    held = tensors(case, "cpu")
    held = {name: t.double() if t.is_floating_point() else t for name, t in held.items()}
    names = (*TRAINED[:5], "prefix_index", "prefix_lengths", "lengths", "key_mask", "gate")
    given = dict.fromkeys(names) | held
    if given["prefix_index"] is not None and given["prefix_index"].dim() == 1:
        given["prefix_index"] = given["prefix_index"][:, None]
    how = (case.scale or case.width**-0.5, case.causal, case.window or 0, case.lengths == "left")
    inputs = [given[name].requires_grad_() for name in TRAINED if given[name] is not None]
    got, want = reference.prefix_attention(*given.values(), *how, 0.0), plain(*given.values(), *how)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    if want[0].requires_grad and want[0].grad_fn is not None:
        g = torch.randn_like(want[0])
        found = (torch.autograd.grad(out, inputs, g, allow_unused=True, materialize_grads=True) for out in (got[0], want[0]))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_the_reference_caps_scores():
    case = Case(softcap=0.7)
    held = {name: t.double() for name, t in tensors(case, "cpu").items()}
    k, v = (torch.cat([held[f"prefix_{n}"].expand(3, -1, -1, -1), held[n]], 2).repeat_interleave(2, 1) for n in ("k", "v"))
    scores = 0.7 * torch.tanh(held["q"] @ k.transpose(2, 3) * 8**-0.5 / 0.7)
    out, lse = prefix_attention(**held, **options(case))
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1), rtol=1e-12, atol=1e-12)


GRADCHECK = [
    Case(batch=2, queries=2, keys=3, rows=2, width=3),
    Case(batch=2, queries=2, keys=3, rows=2, width=3, share="stack", ragged=True, causal=True, gate=(True, True)),
    Case(batch=2, queries=3, keys=3, rows=2, width=3, share="each", lengths="left", causal=True, window=2, softcap=1.0),
    Case(batch=2, queries=3, keys=4, rows=2, width=3, share="index", packed=True, gate=(True, False), seed=3),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_of_the_reference(case):
    held = {name: t.double() if t.is_floating_point() else t for name, t in tensors(case, "cpu").items()}
    names = [name for name in TRAINED if name in held]
    inputs = [held[name].requires_grad_() for name in names]

    def function(*given):
        out, lse = prefix_attention(**(held | dict(zip(names, given, strict=True))), **options(case))
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-6)


# ---- Numbers ----


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(50))
def test_random_calls(seed, device, monkeypatch):
    """What is chosen by size is also chosen against the rule: sizes here are tiny."""
    if seed % 3:
        monkeypatch.setattr(ops, "_copying_pays", lambda *_: False)
    if seed % 3 == 2:
        monkeypatch.setattr(ops, "_folds", lambda *_: False)
    draw = random.Random(seed)
    for _ in range(8):
        agree(sampled(draw), device, "auto")


@needs_triton
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(20))
def test_random_calls_of_the_kernels(seed, device):
    draw = random.Random(1000 + seed)
    for _ in range(5):
        agree(sampled(draw, small=True), device, "triton")


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("impl", IMPLS)
def test_many_random_calls(seed, impl, device):
    draw = random.Random(10_000 + seed)
    for _ in range(480 if impl == "auto" or device.type == "cuda" else 20):
        agree(sampled(draw, (0, 1, 2, 3, 5, 8, 13, 31, 33, 66), small=impl == "triton"), device, impl)


def eager(q, k, v, prefix_k, prefix_v):
    """What a user would write: keys and values side by side, the softmax in float32, the weights in the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (
        torch.cat([prefix.expand(q.shape[0], -1, -1, -1), own], 2).repeat_interleave(group, 1)
        for prefix, own in ((prefix_k, k), (prefix_v, v))
    )
    weight = torch.softmax((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float(), -1).to(q.dtype)
    return weight @ v


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_many_random_calls_as_a_population(impl, dtype, scale, device):
    """One call may be twice as wrong by chance. Of many, half are no worse, and one in a hundred by half (backward: twice)."""
    draw, ratios = random.Random(0), {}
    for seed in range(60 if impl == "triton" and device.type == "cpu" else 300):
        case = Case(
            batch=2, queries=draw.randint(2, 40), keys=draw.randint(2, 40), rows=draw.randint(1, 40),
            width=draw.choice((16, 32, 64)), dtype=dtype, seed=seed,
        )  # fmt: skip
        held = {name: scale * t for name, t in tensors(case, device).items()}
        g = torch.randn(held["q"].shape, generator=torch.Generator().manual_seed(seed)).to(held["q"])
        found = []
        for attend, wide in ((eager, True), (eager, False), (lambda **a: prefix_attention(**a, impl=impl), False)):
            inputs = {name: (t.double() if wide else t.clone()).requires_grad_() for name, t in held.items()}
            out = attend(**inputs)
            found.append([out, *torch.autograd.grad(out, list(inputs.values()), g.to(out.dtype))])
        for name, want, rival, got in zip(("out", *held), *found, strict=True):
            error, allowed = ((x.double() - want).abs().max().item() for x in (got, rival))
            ratios.setdefault(name, []).append(error / allowed)
    for name, of in ratios.items():
        of = torch.tensor(of)
        assert of.median() <= 1.0, f"{name}: median {of.median():.2f}"
        assert of.quantile(0.99) <= (1.5 if name == "out" else 2.0), f"{name}: 99 of 100 up to {of.quantile(0.99):.2f}"


LENGTHS = [32 * n + extra for n in (1, 2) for extra in (0, 1, 2, 31)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_around_a_tile(length, causal, impl, device):
    """Each of the three lengths in turn, with a prefix that is one row seen everywhere (stride 0)."""
    for queries, keys, rows in ((length, length, 3), (3, length, 5), (2, 4, length)):
        case = Case(batch=2, heads=(2, 1), queries=queries, keys=keys, rows=rows, causal=causal, width=16)
        held = tensors(case, device)
        for name in ("prefix_k", "prefix_v"):
            held[name] = held[name][:, :, :1].expand(-1, -1, rows, -1)
        agree(case, device, impl, held)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("share", ["shared", "each", "stack", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_of_zero_and_one(share, impl, device):
    for queries, keys, rows in itertools.product((0, 1), repeat=3):
        case = Case(batch=2, heads=(2, 1), queries=queries, keys=keys, rows=rows, share=share, through_lse=True)
        agree(case, device, impl)
    agree(Case(batch=0, share=share if share != "each" else "shared"), device, impl)
    agree(Case(batch=1, heads=(1, 1), queries=1, keys=1, rows=1, width=1, share=share), device, impl)


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_widths_of_a_head(width, impl, device):
    agree(Case(batch=2, heads=(2, 1), queries=3, keys=4, rows=5, width=width, causal=True), device, impl)


CHOICES = [
    Case(batch=4, queries=70, keys=70, rows=9),
    Case(batch=4, queries=70, keys=70, rows=9, causal=True),
    Case(batch=4, queries=70, keys=70, rows=9, gate=(True, True), through_lse=True),
    Case(batch=1, queries=6, keys=9, rows=7),
    Case(batch=16, heads=(6, 2), queries=1, keys=19, rows=13, width=64),  # two products instead of flash attention
    Case(batch=16, heads=(6, 2), queries=3, keys=19, rows=13, width=64, causal=True),
    Case(batch=1, heads=(16, 16), queries=1, keys=19, rows=50, width=64),  # one sample: products without copies
    Case(batch=1, heads=(16, 8), queries=3, keys=70, rows=60, width=64, causal=True),
    Case(batch=9, queries=2, keys=3, rows=40, share="index", ragged=True),  # readers of a prefix grouped
    Case(batch=3, queries=2, keys=3, rows=7, share="index", ragged=True, seed=4),  # one prefix a sample gathered
    Case(batch=3, queries=70, keys=80, rows=7, share="each", ragged=True, causal=True),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_every_choice_of_path(case, dtype, joined, device, monkeypatch):
    if not joined:
        monkeypatch.setattr(ops, "_copying_pays", lambda *_: False)
    agree(replace(case, dtype=dtype), device, "auto")


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_far_from_zero(offset, causal, impl, device):
    """A constant added to every score of a query changes its log-sum-exp and nothing else."""
    case = Case(width=4, scale=1.0, causal=causal)
    held = tensors(case, device)
    # Multiples of 1/8 and 1/64 stay exact beside 10,000 in float32: all error is the softmax's own.
    held = {name: (t * 8).round() / 8 for name, t in held.items()}
    plain = run(case, held, "torch")
    moved = dict(held)
    for name in ("q", "k", "prefix_k"):
        column = torch.full_like(held[name][..., :1], 1.0 if name == "q" else offset)
        moved[name] = torch.cat([held[name], column], -1)
    for name in ("v", "prefix_v"):
        moved[name] = F.pad(held[name], (0, 1))
    out, lse = prefix_attention(**moved, **options(case), impl=impl)
    # float32 has steps of 1e-3 around 10,000, whether scores (of base 2) or log-sum-exps of two parts are rounded there.
    torch.testing.assert_close(out[..., :4], plain["out"], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, plain["lse"] + offset, rtol=0, atol=2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_nobody_sees_has_no_effect(impl, device):
    """NaN and infinity in padding, in masked keys, beyond a window and behind a prefix's length."""
    cases = [
        Case(lengths="right", seed=1), Case(lengths="left", causal=True, seed=2), Case(key_mask=True, seed=3),
        Case(window=2, causal=True), Case(share="each", ragged=True), Case(share="stack", ragged=True), Case(ragged=True),
        Case(lengths="right", key_mask=True, queries=1, window=3, gate=(True, True)),
    ]  # fmt: skip
    for case, bad in itertools.product(cases, (torch.nan, torch.inf, -torch.inf)):
        held = tensors(case, device)
        if case.lengths:
            held["lengths"] = torch.tensor([3, 0, 7], device=device)
        if case.ragged:
            held["prefix_lengths"].clamp_(max=case.rows - 1)
        spoiled = {name: t.clone() for name, t in held.items()}
        seen = reference.visible(
            case.queries, case.keys, case.causal, case.window or 0, held.get("lengths"), case.lengths == "left",
            held.get("key_mask"), device,
        )  # fmt: skip
        hidden = ~seen.any(1).expand(case.batch, -1)
        for name in ("k", "v"):
            spoiled[name].masked_fill_(hidden[:, None, :, None], bad)
        if case.ragged:
            beyond = torch.arange(case.rows, device=device) >= held["prefix_lengths"][:, None]
            for name in ("prefix_k", "prefix_v"):
                spoiled[name].masked_fill_(beyond[:, None, :, None], bad)
        assert any(not torch.equal(spoiled[name], held[name]) for name in held), f"{case}: everything is seen"
        want, got = run(case, held, impl), run(case, spoiled, impl)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-6, msg=f"{case} {bad}: {name}")


@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_nan_in_what_is_seen_comes_out(impl, device):
    case = Case(heads=(2, 2))
    clean = run(case, tensors(case, device), impl)
    for name, sample in itertools.product(("q", "k", "v", "prefix_k", "prefix_v"), (0, 2)):
        held = tensors(case, device)
        shared = name.startswith("prefix")
        held[name][0 if shared else sample, 1, 2, 3] = torch.nan
        got = run(case, held, impl)
        place = torch.zeros_like(got["out"], dtype=torch.bool)
        rows = slice(2, 3) if name == "q" else slice(None)
        columns = slice(3, 4) if name.endswith("v") else slice(None)
        place[slice(None) if shared else sample, 1, rows, columns] = True
        assert torch.equal(got["out"].isnan(), place), name
        assert torch.equal(got["lse"].isnan(), place.any(-1) if not name.endswith("v") else torch.zeros_like(place[..., 0])), name
        torch.testing.assert_close(got["out"][~place], clean["out"][~place], rtol=1e-6, atol=1e-6)
        assert torch.equal(run(case, held, impl, return_lse=False)["out"].isnan(), place), name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_a_query_that_sees_nothing(impl, device):
    """Gives 0, -inf and no gradient, and changes nothing for the others."""
    case = Case(share="each", ragged=True, lengths="right", through_lse=True)
    held = tensors(case, device)
    held["prefix_lengths"][1], held["lengths"][1] = 0, 0
    held["prefix_lengths"][0] = held["lengths"][2] = 3
    got = run(case, held, impl)
    assert not got["out"][1].any()
    assert (got["lse"][1] == -torch.inf).all()
    assert got["lse"][[0, 2]].isfinite().all()
    for name in TRAINED[:5]:
        assert not got[name][1].any()
        assert got[name].isfinite().all()
        assert got[name][0].any()
    windowed = Case(queries=5, keys=2, share="none", window=1)
    assert (agree(windowed, device, impl)["lse"][:, :, :3] == -torch.inf).all()
    assert (agree(Case(keys=0, rows=0), device, impl)["lse"] == -torch.inf).all()


# ---- Equal to other ways of computing it ----


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_concatenation(impl, device):
    case = Case(batch=2, heads=(2, 2), queries=7, keys=7, rows=5, width=16, causal=True)
    held = tensors(case, device)
    got = run(case, held, impl)
    inputs = {name: held[name].requires_grad_() for name in TRAINED[:5]}
    k, v = (torch.cat([inputs[f"prefix_{n}"].expand(2, -1, -1, -1), inputs[n]], 2) for n in ("k", "v"))
    mask = torch.ones((7, 12), dtype=torch.bool, device=device).tril(5)
    out = F.scaled_dot_product_attention(inputs["q"], k, v, attn_mask=mask)
    g, _ = gradients(case, out, got["lse"])
    torch.testing.assert_close(got["out"], out, rtol=1e-5, atol=1e-5)
    for name, want in zip(inputs, torch.autograd.grad(out, list(inputs.values()), g), strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_left_padding_changes_nothing(causal, impl, device):
    case = Case(queries=5, keys=5, causal=causal, lengths="left")
    held = tensors(case, device)
    for pad in (1, 3):
        wide = dict(held)
        for name in ("k", "v"):
            wide[name] = F.pad(held[name], (0, 0, pad, 0), value=7.0)
        padded = run(replace(case, keys=5 + pad), wide, impl)
        for name, want in run(case, held, impl).items():
            got = padded[name][:, :, pad:] if name in ("k", "v") else padded[name]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("share", ["shared", "each", "index", "stack"])
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_packed_equals_padded(share, impl, device):
    case = Case(batch=4, queries=6, keys=6, share=share, causal=True, gate=(True, True), through_lse=True, seed=5)
    held = tensors(case, device)
    lengths = [6, 1, 0, 4]
    packed = dict(held)
    for name in ("q", "k", "v"):
        packed[name] = torch.cat([held[name][b : b + 1, :, :n] for b, n in enumerate(lengths)], 2)
    packed["cu_seqlens"] = torch.tensor([0, 6, 7, 7, 11], dtype=torch.int32, device=device)
    got = run(case, packed, impl)
    starts = [0, 6, 7, 7, 11]
    prefix = 0
    for b, n in enumerate(lengths):
        one = {name: held[name][b : b + 1, :, :n] for name in ("q", "k", "v")}
        mine = slice(b, b + 1) if share == "each" else slice(None)
        one |= {name: held[name][mine] for name in ("prefix_k", "prefix_v")} | {"gate": held["gate"][b : b + 1]}
        if "prefix_index" in held:
            one["prefix_index"] = held["prefix_index"][b : b + 1]
        inputs = {name: one[name].detach().requires_grad_() for name in TRAINED}
        out, lse = prefix_attention(**(one | inputs), **options(case), impl=impl)
        here = slice(starts[b], starts[b + 1])
        torch.testing.assert_close(got["out"][:, :, here], out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["lse"][:, :, here], lse, rtol=1e-5, atol=1e-6)
        whole = gradients(case, got["out"], got["lse"])
        found = torch.autograd.grad((out, lse), list(inputs.values()), [t[:, :, here] for t in whole], materialize_grads=True,
                                    allow_unused=True)  # fmt: skip
        for name, want in zip(TRAINED[:3], found, strict=False):
            torch.testing.assert_close(got[name][:, :, here], want, rtol=1e-4, atol=1e-5, msg=name)
        prefix = prefix + found[3] if share != "each" else prefix
        if share == "each":
            torch.testing.assert_close(got["prefix_k"][mine], found[3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["gate"][b : b + 1], found[5], rtol=1e-4, atol=1e-5)
    if share != "each":
        torch.testing.assert_close(got["prefix_k"], prefix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_an_index_equals_the_prefixes_that_it_names(impl, device):
    case = Case(batch=4, share="index", ragged=True, seed=2)
    held = tensors(case, device)
    held["prefix_index"] = torch.tensor([2, 0, 2, 1], device=device)
    each = {n: t for n, t in held.items() if n != "prefix_index"}
    for name in ("prefix_k", "prefix_v", "prefix_lengths"):
        each[name] = held[name][held["prefix_index"]]
    got, want = run(case, held, impl), run(case, each, impl)
    for name in got:
        summed = torch.zeros_like(got[name])
        expected = summed.index_add_(0, held["prefix_index"], want[name]) if name.startswith("prefix") else want[name]
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5, msg=name)


# ---- Options that are built from the operator ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_separate_adds_a_second_softmax(packed, impl, device):
    case = Case(batch=3, queries=4, keys=6, causal=True, packed=packed, gate=(True, True), seed=1)
    held = tensors(case, device)
    how = {n: x for n, x in options(case).items() if n != "return_lse"}
    out = prefix_attention(**held, **how, separate=True, impl=impl)
    own = {n: t for n, t in held.items() if not n.startswith("prefix") and n != "gate"}
    alone = {n: t for n, t in held.items() if n != "gate"}
    for name in ("k", "v"):
        alone[name] = held[name][:, :, :0]
    factor = held["gate"][:, :, None, None]
    if packed:
        alone["cu_seqlens_k"] = torch.zeros_like(held["cu_seqlens_k"])
        factor = held["gate"].repeat_interleave(held["cu_seqlens"].diff(), 0).T[None, :, :, None]
    want = prefix_attention(**own, **how, impl=impl) + factor * prefix_attention(**alone, impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    zero = prefix_attention(**(held | {"gate": torch.zeros_like(held["gate"])}), **how, separate=True, impl=impl)
    torch.testing.assert_close(zero, prefix_attention(**own, **how, impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("share", ["shared", "stack"])
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_dropout_of_the_prefix(share, impl, device):
    """A seed gives the same draw every time and everywhere; the gradient belongs to what was drawn."""
    case = Case(share=share, dtype=F32)
    held = tensors(case, device)
    for shared in (True, False):
        how = {"dropout": 0.4, "dropout_shared": shared, "seed": 11}
        got, again = run(case, held, impl, **how), run(case, held, impl, **(how | {"seed": torch.tensor(11, device=device)}))
        for name in got:
            check_bits(again[name], got[name])
        want = run(case, held, "torch", **how)
        for name in got:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
        other = run(case, held, impl, **(how | {"seed": 12}))
        assert not torch.equal(other["out"], got["out"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = run(case, held, impl, dropout=0.4)
        second = run(case, held, impl, dropout=0.4)
        torch.manual_seed(0)
        check_bits(run(case, held, impl, dropout=0.4)["out"], first["out"])
    assert not torch.equal(first["out"], second["out"])


def test_dropout_draws_each_element_by_itself():
    """One key per sample and a prefix of ones: what comes out is 0 or 1 / (1 - p), one draw a sample or one for all."""
    q, empty, ones = torch.zeros(64, 2, 1, 32), torch.zeros(64, 2, 0, 32), torch.ones(1, 2, 1, 32)
    draws = {}
    for shared in (True, False):
        out = prefix_attention(q, empty, empty, ones, ones, dropout=0.25, dropout_shared=shared, seed=3)
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        draws[shared] = out != 0
    assert (draws[True] == draws[True][:1]).all()
    rows = draws[False].flatten(1).double()
    assert abs(rows.mean() - 0.75) < 0.02  # 4,096 draws: three standard deviations
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6  # 64 elements each


# ---- Layouts ----


@pytest.mark.parametrize("case", [Case(causal=True, queries=4), Case(share="each", lengths="left"), Case(queries=66, keys=66)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_inputs_and_gradients(case, impl, device):
    if impl == "triton":
        case = replace(case, queries=4, batch=2)
    for layout in LAYOUTS:
        agree(replace(case, layout=layout), device, impl)
        agree(replace(case, g_layout=layout, through_lse=True), device, impl)
    held = tensors(case, device)
    needs = {name: held[name].requires_grad_() for name in TRAINED[:5]}
    out, _ = prefix_attention(**held, **options(case), impl=impl)
    got = torch.autograd.grad(out.sum(), list(needs.values()), retain_graph=True)
    want = torch.autograd.grad(out, list(needs.values()), torch.ones_like(out))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_lie_in_memory_like_the_queries(impl, device):
    held = tensors(Case(layout="token by token"), device)
    out = prefix_attention(**held, impl=impl)
    assert out.stride() == held["q"].stride()
    assert out.transpose(1, 2).is_contiguous()
    assert prefix_attention(**tensors(Case(), device), impl=impl).is_contiguous()


# ---- Autograd ----

ALL = Case(batch=2, queries=3, keys=4, rows=3, gate=(True, True), causal=True, through_lse=True)


@pytest.mark.parametrize("case", [ALL, replace(ALL, gate=None, through_lse=False), replace(ALL, share="index", seed=1)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_all_subsets_of_what_needs_a_gradient(case, impl, device):
    held = tensors(case, device)
    everything = run(case, held, impl)
    names = [name for name in TRAINED if name in held]
    subsets = [s for count in range(len(names) + 1) for s in itertools.combinations(names, count)]
    if impl == "triton" and device.type == "cpu":
        subsets = subsets[::5]
    for wanted in subsets:
        got = run(case, held, impl, wanted)
        assert set(got) == {"out", "lse", *wanted}
        assert got["out"].requires_grad == bool(wanted)
        for name in got:
            if wanted and set(wanted) <= {"prefix_k", "prefix_v"} and name in wanted:
                # Nothing but the prefix's columns is looked at then.
                torch.testing.assert_close(got[name], everything[name], rtol=1e-5, atol=1e-6)
            else:
                check_bits(got[name], everything[name], f"{wanted}: {name}")


@pytest.mark.parametrize("joined", [False, True])
def test_only_what_needs_a_gradient_is_computed(joined, device, monkeypatch):
    if device.type != "cpu":
        return
    called = []
    for name in ("_own_backward", "_read_backward"):
        whole = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, whole=whole: called.append(name) or whole(*a))
    monkeypatch.setattr(ops, "_copying_pays", lambda *_: joined)
    own = set() if joined else {"_own_backward"}
    both = set() if joined else {"_own_backward", "_read_backward"}
    expected = {"q": both, "k": own, "v": own, "prefix_k": {"_read_backward"}, "prefix_v": {"_read_backward"}}
    for name, parts in expected.items():
        called.clear()
        run(Case(), tensors(Case(), device), "auto", (name,))
        assert set(called) == parts


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients(impl, device):
    held = tensors(ALL, device)
    want = run(ALL, held, impl, ())
    needs = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in held.items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, lse = prefix_attention(**needs, **options(ALL), impl=impl)
        assert not out.requires_grad
        check_bits(out, want["out"])
        check_bits(lse, want["lse"])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_through_the_log_sum_exp_alone(impl, device):
    case = Case(causal=True)
    held = tensors(case, device)
    exact = {name: t.double() for name, t in held.items()}
    found = []
    for given, path in ((held, impl), (exact, "torch")):
        inputs = {name: given[name].requires_grad_() for name in TRAINED[:5]}
        _, lse = prefix_attention(**given, **options(case), impl=path)
        found.append(torch.autograd.grad(lse.sin().sum(), list(inputs.values()), allow_unused=True, materialize_grads=True))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_raises(impl, device):
    held = tensors(Case(), device)
    q = held["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r'no second derivative.*impl="torch"'):
        torch.autograd.grad(prefix_attention(**held, impl=impl, return_lse=True)[0].pow(2).sum(), q, create_graph=True)

    def twice():  # a small call has PyTorch's own gradients, and its sentence
        (first,) = torch.autograd.grad(prefix_attention(**held, impl=impl).pow(2).sum(), q, create_graph=True)
        torch.autograd.grad(first.sum(), q)

    with pytest.raises(RuntimeError, match=r"no second derivative|derivative .* is not implemented"):
        twice()
    (first,) = torch.autograd.grad(prefix_attention(**held, impl="torch").pow(2).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), q)
    assert second.abs().max() > 0


@pytest.mark.parametrize("case", [ALL, Case(batch=5, share="stack", ragged=True), Case(dtype=BF16, queries=1)], ids=str)
@pytest.mark.parametrize("repeats", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_have_the_same_bits(case, impl, repeats, device):
    held = tensors(case, device)
    first = run(case, held, impl)
    for _ in range(repeats if impl == "auto" or device.type == "cuda" else 2):
        again = run(case, held, impl)
        for name in first:
            check_bits(again[name], first[name], name)


# ---- An index out of range ----


def calls(case, held, monkeypatch, impl):
    """The operators' arguments in a forward and a backward pass."""
    seen = {}
    with monkeypatch.context() as m:
        for name in ("_forward", "_backward"):
            whole = getattr(ops, name)
            m.setattr(ops, name, lambda *a, whole=whole: seen.setdefault(whole, a) and whole(*a))
        run(case, held, impl)
    return seen


@pytest.mark.parametrize("share", ["index", "stack"])
@pytest.mark.parametrize("bad", [-2, 4, 2**40])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_index_out_of_range_is_nan_in_its_sample(bad, share, impl, device, monkeypatch):
    """What the operators do where nobody looks at values: the sample is NaN and teaches nothing; others keep theirs."""
    case = Case(batch=4, share=share, seed=1)
    held = tensors(case, device)
    (forward, given), (backward, then) = calls(case, held, monkeypatch, impl).items()
    wrong = given[5].clone()
    wrong[2, -1] = bad
    out, lse = forward(*given[:5], wrong, *given[6:])
    want = forward(*given)
    keep = torch.tensor([0, 1, 3], device=device)
    assert out[2].isnan().all()
    assert lse[2].isnan().all()
    torch.testing.assert_close(out[keep], want[0][keep])
    found = backward(*then[:7], wrong, *then[8:14], out, lse, *then[16:])
    for d in found[:3]:
        assert d[2].isnan().all()
        assert d[keep].isfinite().all()
    some = {n: t[keep] if n in ("q", "k", "v", "prefix_index") else t for n, t in held.items()}
    inputs = {n: some[n].detach().requires_grad_() for n in TRAINED[:5]}
    expected = torch.autograd.grad(
        prefix_attention(**(some | inputs), impl="torch"), list(inputs.values()), then[0][keep], allow_unused=True
    )
    for mine, theirs in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# ---- Registration, compilation and autocast ----

OPCHECK = [
    Case(), ALL, Case(share="none", layout="token by token"), Case(share="stack", ragged=True, dtype=BF16),
    Case(packed=True, share="each", seed=2), Case(lengths="left", key_mask=True, layout="step 2"), Case(batch=0), Case(queries=0),
    Case(keys=0, rows=0), Case(queries=66, keys=66, rows=3), Case(queries=66, keys=66, rows=3, causal=True, through_lse=True),
]  # fmt: skip


@pytest.mark.parametrize("case", OPCHECK, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(case, impl, device, monkeypatch):
    if impl == "triton" and case.queries > 8:
        case = replace(case, queries=4, keys=4, batch=1)
    seen = calls(case, tensors(case, device), monkeypatch, impl)
    assert len(seen) == 2
    for operator, arguments in seen.items():
        given = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(given))


@pytest.mark.parametrize("case", [Case(causal=True), ALL, Case(share="index", lengths="left"), Case(share="none")], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_compile_without_graph_breaks(case, impl, device):
    """Forward and backward, the bits of eager, and at most two compilations for four batch sizes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def function(held):
        return prefix_attention(**held, **(options(case) | {"return_lse": case.through_lse}), impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for batch in (3, 2, 5, 4):
        sized = replace(case, batch=batch)
        held = tensors(sized, device)
        want = run(sized, held, impl)
        inputs = {name: held[name].detach().requires_grad_() for name in TRAINED if name in held}
        results = compiled(held | inputs) if case.through_lse else (compiled(held | inputs),)
        sent = gradients(sized, want["out"], want["lse"])[: len(results)]
        for name, got in zip(("out", "lse"), results, strict=False):
            check_bits(got, want[name], name)
        for name, d in zip(inputs, torch.autograd.grad(results, list(inputs.values()), sent), strict=True):
            check_bits(d, want[name], name)
    assert len(graphs) <= 2


@pytest.mark.slow
def test_inductor_draws_the_dropout_of_eager_and_counts_from_no_end(device):
    torch._dynamo.reset()
    held = tensors(Case(), device)

    prompts = SoftPrompt(3, 4, prompts=3).to(device)

    def both(seed, index):
        return prefix_attention(**held, dropout=0.5, seed=seed), prompts(index)

    compiled = torch.compile(both, fullgraph=True)
    given = torch.tensor([3], device=device), torch.tensor([2, 0], device=device)
    for mine, theirs in zip(compiled(*given), both(*given), strict=True):
        torch.testing.assert_close(mine, theirs)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="out of bounds"):
            compiled(given[0], torch.tensor([-2, 1]))


@pytest.mark.parametrize("amp", [BF16, F16], ids=str)
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_autocast_casts_all(amp, impl, device):
    case = Case(gate=(True, True))
    held = tensors(case, device)
    half = {name: t.to(amp) if name != "gate" else t for name, t in held.items()}
    want = run(case, half, impl)
    got = run(case, held | {"k": half["k"]}, impl, amp=amp)
    assert got["out"].dtype == amp
    check_bits(got["out"], want["out"])
    for name in TRAINED:
        assert got[name].dtype == (amp if name == "k" else F32)
        check_bits(got[name].to(want[name].dtype), want[name], name)


def test_meta_tensors_have_shapes_and_gradients():
    held = {name: t.to("meta") for name, t in tensors(Case(causal=True), torch.device("cpu")).items()}
    q = held["q"].requires_grad_()
    out = prefix_attention(**held, causal=True)
    assert out.device.type == "meta"
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


class Marked(torch.Tensor):
    """Somebody's tensors that stand in for others."""


def test_small_calls_meet_no_operator_of_ours_unless_somebody_is_to_see_one(device, monkeypatch):
    if device.type != "cpu":
        return
    held = tensors(Case(causal=True), device)
    seen, whole = [], ops._forward
    monkeypatch.setattr(ops, "_forward", lambda *a: seen.append(1) or whole(*a))
    plain = prefix_attention(**held, causal=True)
    assert not seen
    check_bits(prefix_attention(**held, causal=True, return_lse=True)[0], plain)
    check_bits(prefix_attention(**held | {"q": held["q"].as_subclass(Marked)}, causal=True).as_subclass(torch.Tensor), plain)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert prefix_attention(**held, causal=True).shape == plain.shape
    assert len(seen) == 3


@pytest.mark.parametrize("trained", ["prefix_k", "q"])
def test_gradients_of_the_prefix_alone_are_not_pytorchs_gradients_of_all(trained, device, monkeypatch):
    if device.type != "cpu":
        return
    seen, whole = [], ops._forward
    monkeypatch.setattr(ops, "_forward", lambda *a: seen.append(1) or whole(*a))
    held = tensors(Case(batch=4, queries=64, keys=64, rows=20, width=64, heads=(4, 4)), device)
    held[trained].requires_grad_()
    prefix_attention(**held).sum().backward()
    assert len(seen) == (trained == "prefix_k")


def test_a_mask_that_is_kept_serves_inference_and_training(device):
    ops._kept_mask.cache_clear()
    held = tensors(Case(causal=True), device)
    with torch.inference_mode():
        prefix_attention(**held, causal=True)
    held["q"].requires_grad_()
    prefix_attention(**held, causal=True).sum().backward()
    assert held["q"].grad is not None


def test_float64_takes_the_reference(device):
    held = {name: t.double() for name, t in tensors(Case(), device).items()}
    assert prefix_attention(**held, return_lse=True)[1].dtype == torch.float64


# ---- Errors ----

Q, K, P = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(1, 2, 6, 8)
ONE_Q, ONE_K = Q[:1], K[:1, :, :3]
PACK = torch.tensor([0, 1, 3])
THREE = P.expand(3, -1, -1, -1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "q: expected a floating point dtype, got torch.int32"),
        ({"prefix_v": P.long()}, TypeError, "prefix_v: expected a floating point dtype, got torch.int64"),
        ({"q": Q[0]}, ValueError, r"q: expected 4 dimensions .* got 3 dimensions \[4, 3, 8\]"),
        ({"k": K[0]}, ValueError, "k: expected 4 dimensions"),
        ({"prefix_k": P[0]}, ValueError, "prefix_k: expected 4 dimensions"),
        ({"q": Q[:, :3]}, ValueError, "q: expected a multiple of the 2 heads of k, got 3 heads"),
        ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "q: expected a multiple of the 0 heads of k"),
        ({"q": Q[..., :7]}, ValueError, "k: expected heads of 7 elements like q, got 8"),
        ({"v": K[..., :7]}, ValueError, "v: expected heads of 8 elements like q, got 7"),
        ({"prefix_k": P[..., :7], "prefix_v": P[..., :7]}, ValueError, "prefix_k: expected heads of 8 elements like q, got 7"),
        ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0], "prefix_k": None, "prefix_v": None}, ValueError, "q: expected h"),
        ({"v": K[:, :, :4]}, ValueError, r"v: expected the shape of k, \[2, 2, 5, 8\], got \[2, 2, 4, 8\]"),
        ({"k": K[:1], "v": K[:1]}, ValueError, "k: expected 2 samples like q, got 1"),
        ({"k": K.double(), "v": K.double()}, ValueError, "k: expected torch.float32 like q, got torch.float64"),
        ({"prefix_k": P.half()}, ValueError, "prefix_k: expected torch.float32 like q, got torch.float16"),
        ({"prefix_k": P.to("meta")}, ValueError, "prefix_k: expected a tensor on cpu like q, got one on meta"),
        ({"v": K.to("meta")}, ValueError, "v: expected a tensor on cpu like q, got one on meta"),
        ({"gate": torch.ones(1, 1, device="meta")}, ValueError, "gate: expected a tensor on cpu like q"),
        ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "lengths: expected a tensor on cpu like q"),
        ({"prefix_v": None}, ValueError, "prefix_k, prefix_v: expected both or neither, got only prefix_k"),
        ({"prefix_k": None}, ValueError, "prefix_k, prefix_v: expected both or neither, got only prefix_v"),
        ({"prefix_v": P[:, :, :5]}, ValueError, r"prefix_v: expected the shape of prefix_k, \[1, 2, 6, 8\]"),
        ({"prefix_k": P[:, :1], "prefix_v": P[:, :1]}, ValueError, "prefix_k: expected 2 heads like k, got 1"),
        ({"prefix_k": THREE, "prefix_v": THREE}, ValueError, "prefix_k: expected 1 or 2 prefixes without a prefix_index, got 3"),
        ({"prefix_index": torch.zeros(2)}, ValueError, r"prefix_index: expected int64 \[2\] or \[2, M\], got torch.float32"),
        ({"prefix_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"prefix_index: expected int64 \[2\]"),
        ({"prefix_index": torch.tensor([0, 1])}, ValueError, r"prefix_index: expected values from 0 to 0, got \[1\]"),
        ({"prefix_index": torch.tensor([[0, -1], [-2, 0]])}, ValueError, r"prefix_index: expected values .* got \[-2\]"),
        ({"prefix_index": PACK[:2], "prefix_k": P[:0], "prefix_v": P[:0]}, ValueError, "prefix_k: expected at least"),
        ({"prefix_lengths": torch.tensor([7])}, ValueError, r"prefix_lengths: expected values from 0 to 6, got \[7\]"),
        ({"prefix_lengths": torch.tensor([1, 2])}, ValueError, r"prefix_lengths: expected int64 \[1\], got torch.int64 \[2\]"),
        ({"lengths": torch.tensor([6, 0])}, ValueError, r"lengths: expected values from 0 to 5, got \[6\]"),
        ({"lengths": torch.tensor([-1, 0])}, ValueError, r"lengths: expected values from 0 to 5, got \[-1\]"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected int64 \[2\]"),
        ({"lengths": torch.ones(2)}, ValueError, r"lengths: expected int64 \[2\], got torch.float32"),
        ({"padding": "centre"}, ValueError, "padding: expected one of right, left, got 'centre'"),
        ({"key_mask": torch.ones(2, 5)}, ValueError, r"key_mask: expected bool \[2, 5\], got torch.float32 \[2, 5\]"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"key_mask: expected bool \[2, 5\]"),
        ({"window": 0}, ValueError, "window: expected at least 1, or None, got 0"),
        ({"window": -3}, ValueError, "window: expected at least 1"),
        ({"causal": True, "k": K[:, :, :2], "v": K[:, :, :2]}, ValueError, "causal: expected at most as many queries as"),
        ({"gate": torch.ones(3, 1)}, ValueError, r"gate: expected \[1 or 2, 1 or 4\], got \[3, 1\]"),
        ({"gate": torch.ones(4)}, ValueError, r"gate: expected \[1 or 2, 1 or 4\], got \[4\]"),
        ({"gate": torch.ones(1, 1, dtype=torch.int64)}, TypeError, "gate: expected a floating point dtype"),
        ({"gate": torch.ones(1, 1), "prefix_k": None, "prefix_v": None}, ValueError, "prefix_k: expected a tensor when gate is"),
        ({"prefix_index": PACK[:2], "prefix_k": None, "prefix_v": None}, ValueError, "prefix_k: expected a tensor when prefix_i"),
        ({"prefix_lengths": PACK[:1], "prefix_k": None, "prefix_v": None}, ValueError, "prefix_k: expected a tensor when prefi"),
        ({"separate": True}, ValueError, "separate: expected a gate, and no return_lse, got gate=None"),
        ({"separate": True, "gate": torch.ones(1, 1), "return_lse": True}, ValueError, "separate: expected a gate, and no ret"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a number from 0 to less than 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: expected"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number, or None, got 0.0"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of auto, triton, torch, got 'cuda'"),
        ({"max_seqlen": 3}, ValueError, "cu_seqlens: expected a tensor when max_seqlen is given, got None"),
        ({"cu_seqlens_k": PACK}, ValueError, "cu_seqlens: expected a tensor when cu_seqlens_k is given"),
        ({"cu_seqlens": PACK}, ValueError, r"q: expected \[1, H, total length, D\] with cu_seqlens, got \[2, 4, 3, 8\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(changes, error, message, monkeypatch):
    refused(monkeypatch, {"q": Q, "k": K, "v": K, "prefix_k": P, "prefix_v": P} | changes, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": PACK[:2]}, ValueError, "lengths: expected None with cu_seqlens"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "key_mask: expected None with cu_seqlens"),
        ({"cu_seqlens": PACK.float()}, TypeError, "cu_seqlens: expected int64 or int32, got torch.float32"),
        ({"cu_seqlens": PACK[:1]}, ValueError, r"cu_seqlens: expected \[n \+ 1\] for at least one sequence"),
        ({"cu_seqlens_k": PACK[:2]}, ValueError, r"cu_seqlens_k: expected \[n \+ 1\] .* as many for queries as for keys"),
        ({"cu_seqlens": torch.tensor([1, 2, 3])}, ValueError, r"cu_seqlens: expected rising values from 0 to 3, got \[1, 2, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 2])}, ValueError, "cu_seqlens: expected rising values from 0 to 3"),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens: expected rising values from 0 to 3"),
        ({"k": K[:1], "v": K[:1]}, ValueError, "cu_seqlens_k: expected a tensor for keys of another total length"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 3]), "causal": True}, ValueError, "causal: expected .* got a sequence with more"),
        ({"max_seqlen": 1}, ValueError, "max_seqlen: expected at least the longest sequence, 2, got 1"),
        ({"cu_seqlens_k": PACK, "max_seqlen_k": 1}, ValueError, "max_seqlen_k: expected at least the longest sequence, 2, got 1"),
        ({"prefix_index": torch.zeros(1, dtype=torch.int64)}, ValueError, r"prefix_index: expected int64 \[2\]"),
        ({"gate": torch.ones(3, 1)}, ValueError, r"gate: expected \[1 or 2, 1 or 4\]"),
        ({"prefix_k": THREE, "prefix_v": THREE}, ValueError, "prefix_k: expected 1 or 2 prefixes without a prefix_index, got 3"),
    ],
)  # fmt: skip
def test_bad_packing_is_refused_before_any_work(changes, error, message, monkeypatch):
    packed = {"q": ONE_Q, "k": ONE_K, "v": ONE_K, "prefix_k": P, "prefix_v": P, "cu_seqlens": PACK}
    refused(monkeypatch, packed | changes, error, message)


def refused(monkeypatch, arguments, error, message):
    def reached(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(ops.PrefixAttention, "apply", reached)
    monkeypatch.setattr(reference, "prefix_attention", reached)
    with pytest.raises(error, match=message):
        prefix_attention(**arguments)


def test_the_kernels_on_request_or_an_error(monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(_runtime, "HAS_TRITON", False)
        with pytest.raises(RuntimeError, match='impl="triton": Triton is not installed'):
            prefix_attention(Q, K, K, P, P, impl="triton")
        prefix_attention(Q, K, K, P, P)
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)
    monkeypatch.setattr(_runtime, "INTERPRETING", False)
    with pytest.raises(ValueError, match=r"tensors on a GPU .* got tensors on cpu"):
        prefix_attention(Q, K, K, P, P, impl="triton")
