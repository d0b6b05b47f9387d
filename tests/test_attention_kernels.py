"""The attention kernels, launcher against reference: every mask, prefix, layout and dtype, on tiles smaller than the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from fastprompt.reference.attention import prefix_attention
from fastprompt.tuning.attention import Launch, Tile, pick
from tests.compare import check, check_bits
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to run kernels")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = Launch(query=Tile(32, 16, 4, 1), own=Tile(32, 16, 4, 1), prefix=Tile(32, 16, 4, 1), splits=2)
# Forward: every column by one program; shared out and merged; the prefix apart from the own keys besides.
FORWARD = {"whole": replace(SMALL, splits=1), "shares": replace(SMALL, splits=3), "apart": replace(SMALL, splits=2, apart=2)}


@dataclass(frozen=True)
class Case:
    """One call. prefix: how many there are (0: none); index: rows of prefix numbers, or a sequence's; lists become tensors."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    queries: int = 33
    keys: int = 35
    width: int = 16
    prefix: int = 1
    rows: int = 5
    index: tuple[tuple[int, ...], ...] | None = None
    prefix_lengths: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    left: bool = False
    masked: bool = False
    causal: bool = False
    window: int = 0
    gate: tuple[int, int] | None = None
    softcap: float = 0.0
    starts_q: tuple[int, ...] | None = None
    starts_k: tuple[int, ...] | None = None
    layout: str = "plain"
    dtype: torch.dtype = F32
    seed: int = 0


# No two operands that could be confused have the same strides.
MIXED = {"q": "sliced", "k": "sliced", "v": "transposed", "prefix_k": "transposed", "prefix_v": "sliced"}


def laid_out(t: Tensor, layout: str, filler: float = float("nan")) -> Tensor:
    """The numbers of t in another memory layout: what lies between them is `filler`."""
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = t.new_full((*t.shape[:2], t.shape[2] + 3, t.shape[3] + 5), filler)
        wide[:, :, 2:-1, 1:-4] = t
        return wide[:, :, 2:-1, 1:-4]
    if layout == "rotated":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t


def tensors(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """The operands of a case, by argument name."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    packed = case.starts_q is not None
    batch = 1 if packed else case.batch
    queries = case.starts_q[-1] if case.starts_q else case.queries
    keys = case.starts_k[-1] if case.starts_k else case.keys
    held: dict[str, Tensor | None] = {
        "q": draw(batch, case.heads, queries, case.width) * 2,
        "k": draw(batch, case.kv_heads, keys, case.width),
        "v": draw(batch, case.kv_heads, keys, case.width),
    }
    for name in ("prefix_k", "prefix_v"):
        held[name] = draw(case.prefix, case.kv_heads, case.rows, case.width) if case.prefix else None
        if case.layout == "expanded" and case.prefix:
            held[name] = held[name][:, :, :1].expand(-1, -1, case.rows, -1)
    if case.layout == "expanded":
        for name in ("k", "v"):
            held[name] = held[name][:1, :1].expand_as(held[name])
        held["q"] = held["q"][:, :, :1].expand_as(held["q"])
    held["gate"] = None if case.gate is None else draw(*case.gate)
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        if held[name] is not None:
            kept = held[name].to(case.dtype)  # keeps the strides of an expanded tensor
            held[name] = laid_out(kept, MIXED[name] if case.layout == "mixed" else case.layout).to(device)
    for name in ("index", "prefix_lengths", "lengths", "starts_q", "starts_k"):
        value = getattr(case, name)
        held[name] = None if value is None else torch.tensor(value, dtype=torch.int64, device=device)
    held["key_mask"] = (torch.rand(batch, keys, generator=random) < 0.6).to(device) if case.masked else None
    if held["gate"] is not None:
        held["gate"] = held["gate"].to(device)
    return held


def settings(case: Case) -> dict[str, object]:
    return {
        "scale": case.width**-0.5, "causal": case.causal, "window": case.window, "left": case.left, "softcap": case.softcap,
    }  # fmt: skip


OPERANDS = (
    "q", "k", "v", "prefix_k", "prefix_v", "index", "prefix_lengths", "lengths", "key_mask", "starts_q", "starts_k", "gate",
)  # fmt: skip


def longest(starts: tuple[int, ...] | None, size: int) -> int:
    return size if starts is None else max(b - a for a, b in pairwise(starts))


def forward(case: Case, held: dict[str, Tensor | None], launch: Launch = FORWARD["whole"]) -> tuple[Tensor, Tensor]:
    from fastprompt.kernels.attention.forward import attention_forward

    q = held["q"]
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    if case.layout in ("transposed", "rotated"):
        out = laid_out(out, case.layout)
    lse = torch.full(q.shape[:3], torch.nan, device=q.device)
    attention_forward(
        *(held[name] for name in OPERANDS), out, lse, max_q=longest(case.starts_q, case.queries),
        max_k=longest(case.starts_k, case.keys), **settings(case), launch=launch,
    )  # fmt: skip
    return out, lse


def reference(case: Case, held: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The specification, one packed sequence after the other."""
    if case.starts_q is None:
        return prefix_attention(*(held[n] for n in OPERANDS if not n.startswith("starts")), *settings(case).values())
    outs = []
    for i in range(len(case.starts_q) - 1):
        part = dict(held)
        part["q"] = held["q"][:, :, case.starts_q[i] : case.starts_q[i + 1]]
        for name in ("k", "v"):
            part[name] = held[name][:, :, case.starts_k[i] : case.starts_k[i + 1]]
        if held["index"] is not None:
            part["index"] = held["index"][i : i + 1]
        elif case.prefix > 1:
            part |= {name: held[name][i : i + 1] for name in ("prefix_k", "prefix_v")}
        if case.gate and case.gate[0] > 1:
            part["gate"] = held["gate"][i : i + 1]
        outs.append(reference(replace(case, starts_q=None, starts_k=None), part))
    return torch.cat([o for o, _ in outs], 2), torch.cat([x for _, x in outs], 2)


def wider(held: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in held.items()}


def agree(case: Case, device: torch.device, launch: Launch = FORWARD["whole"]) -> None:
    held = tensors(case, device)
    out, lse = forward(case, held, launch)
    want, want_lse = reference(case, wider(held, torch.float64))
    near, near_lse = reference(case, held)
    # Another order of summation, and logits that are exact to an ulp of their own size, not of the output's.
    check(out, want, near, ulps=8.0 if case.dtype == F32 else 1.0, name="out")
    check(lse, want_lse, near_lse, ulps=8.0, name="lse")


PACKED = Case(prefix=3, index=((2,), (0,), (1,), (-1,)), starts_q=(0, 7, 7, 40, 41), starts_k=(0, 9, 12, 47, 52), causal=True)
CASES = {
    "plain": Case(),
    "no prefix": Case(prefix=0),
    "causal": Case(causal=True, rows=17),
    "causal, more keys": Case(causal=True, queries=9, keys=65),
    "group of 3": Case(heads=6, kv_heads=2, causal=True, queries=21),
    "one head": Case(heads=1, queries=65, keys=3),
    "window": Case(window=7, queries=33, keys=40),
    "causal window": Case(window=5, causal=True, queries=40, keys=65, heads=1),
    "window of 1": Case(window=1, causal=True, prefix=0),
    "huge window": Case(window=2**31 - 1, causal=True),
    "lengths": Case(batch=4, queries=5, lengths=(0, 1, 20, 35)),
    "left padding": Case(batch=4, queries=35, lengths=(0, 1, 20, 35), left=True, causal=True),
    "lengths beyond": Case(batch=2, queries=5, lengths=(-3, 99)),
    "left lengths beyond": Case(batch=2, queries=5, lengths=(-3, 99), left=True),
    "nothing seen": Case(batch=3, prefix=0, lengths=(0, 35, 3)),
    "key mask": Case(masked=True, causal=True),
    "key mask and lengths": Case(masked=True, lengths=(30, 3), prefix=0),
    "prefix a sample": Case(batch=3, prefix=3, rows=31),
    "index": Case(batch=4, queries=5, prefix=3, index=((2,), (0,), (-1,), (2,))),
    "two prefixes": Case(batch=4, queries=5, prefix=3, rows=9, index=((2, 0), (-1, 1), (1, -1), (-1, -1))),
    "the same twice": Case(batch=1, prefix=2, rows=20, index=((1, 1),)),
    "index out of range": Case(batch=4, queries=5, prefix=3, index=((3,), (0,), (-2,), (2,))),
    "two, one out of range": Case(batch=4, queries=5, prefix=3, index=((0, 3), (0, 1), (-2, 1), (-1, 2**40))),
    "ragged": Case(prefix=2, batch=2, rows=33, prefix_lengths=(33, 4)),
    "ragged shared": Case(rows=33, prefix_lengths=(7,), causal=True),
    "ragged index": Case(batch=4, queries=5, prefix=3, rows=20, index=((2,), (0,), (-1,), (1,)), prefix_lengths=(0, 20, 6)),
    "ragged stack": Case(batch=3, queries=5, prefix=3, rows=9, index=((2, 0), (1, 2), (0, -1)), prefix_lengths=(0, 9, 6)),
    "packed": PACKED,
    "packed, shared prefix": replace(PACKED, prefix=1, index=None, rows=17),
    "packed, own prefixes": replace(PACKED, prefix=4, index=None, gate=(4, 2)),
    "packed, two prefixes": replace(PACKED, index=((2, 1), (0, -1), (-1, 1), (5, 1)), causal=False, window=6),
    "gate": Case(gate=(1, 1), heads=4, kv_heads=2),
    "gate a head": Case(gate=(1, 4), heads=4, kv_heads=2, causal=True),
    "gate a sample": Case(gate=(2, 1), rows=18),
    "gate a sample and head": Case(gate=(2, 4), heads=4, kv_heads=2, prefix=2),
    "soft cap": Case(softcap=2.0, causal=True, rows=17),
    "soft cap of 50, gate": Case(softcap=50.0, gate=(2, 2)),
    "transposed": Case(layout="transposed", heads=4, kv_heads=2, prefix=2),
    "sliced": Case(layout="sliced", heads=4, kv_heads=2, prefix=2, causal=True),
    "rotated": Case(layout="rotated", heads=4, kv_heads=2, prefix=2),
    "expanded": Case(layout="expanded", heads=4, kv_heads=2, prefix=2),
    "mixed": Case(layout="mixed", heads=4, kv_heads=2, prefix=3, index=((2,), (0,)), rows=18),
    "packed, mixed": replace(PACKED, layout="mixed", heads=4, kv_heads=2),
    "packed, sliced": replace(PACKED, layout="sliced", heads=4, kv_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("launch", FORWARD)
def test_forward(launch, name, device):
    agree(CASES[name], device, FORWARD[launch])


FEW = {
    "decode": Case(batch=5, heads=4, kv_heads=2, queries=1, keys=40, rows=37, causal=True),
    "no own keys": Case(batch=3, queries=2, keys=0, rows=37),
    "more shares than columns": Case(batch=3, queries=1, keys=1, rows=2),
    "nothing seen": Case(batch=3, queries=2, prefix_lengths=(0,), lengths=(0, 9, 0)),
    "gate a head": Case(batch=3, queries=2, rows=37, gate=(1, 4), heads=4, kv_heads=2),
    "transposed": Case(batch=3, queries=4, rows=20, layout="transposed", heads=4, kv_heads=2),
    "sliced": Case(batch=3, queries=4, rows=20, layout="sliced", heads=4, kv_heads=2, softcap=3.0),
    "half": Case(batch=3, queries=1, rows=20, dtype=BF16),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("launch", FORWARD)
def test_few_queries(launch, name, device):
    agree(FEW[name], device, FORWARD[launch])


def test_few_queries_share_out_what_is_long():
    facts = {
        "heads": 32, "kv_heads": 8, "queries": 1, "prefixes": 1, "stack": 1, "width": 128, "dtype": BF16, "arch": "sm_90",
        "gated": False,
    }  # fmt: skip
    decode = pick("forward", batch=64, keys=2048, prefix_rows=1024, **facts)
    assert decode.apart > 1
    assert decode.splits == 1
    alone = pick("forward", batch=1, keys=2048, prefix_rows=1024, **facts)
    assert (alone.apart, alone.splits > 8) == (0, True)
    assert pick("forward", batch=64, keys=2048, prefix_rows=16, **facts).apart == 0
    assert pick("forward", batch=64, keys=2048, prefix_rows=1024, **(facts | {"queries": 17})).apart == 0


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", ["causal", "key mask", "two prefixes", "packed", "gate a sample and head", "soft cap", "sliced"])
def test_forward_in_half_precision(name, dtype, device):
    agree(replace(CASES[name], dtype=dtype), device)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 65])
@pytest.mark.parametrize("causal", [False, True])
def test_prefix_sizes(rows, causal, device):
    agree(Case(rows=rows, causal=causal, heads=1, queries=3, keys=3), device)
    agree(Case(rows=rows, prefix=2, index=((1, 0), (0, -1)), heads=1, queries=3, keys=4), device)


@pytest.mark.parametrize("queries", [0, 1, 31, 32, 33, 65])
@pytest.mark.parametrize("keys", [0, 1, 31, 32, 33, 65])
def test_sizes(queries, keys, device):
    agree(Case(batch=1, queries=queries, keys=keys), device)
    if keys >= queries:
        agree(Case(batch=1, queries=queries, keys=keys, prefix=0, causal=True), device)


@pytest.mark.parametrize("width", [1, 8, 32, 64, 80, 96, 128, 256])
def test_widths(width, device):
    agree(Case(batch=1, heads=1, queries=3, keys=17, width=width, causal=True), device)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_shifted_scores(shift, device):
    """A softmax does not see a constant: the running maximum has to take it out."""
    case = Case(keys=65, queries=5, prefix=0)
    held = tensors(case, device)
    held["q"][..., 0], held["k"][..., 0] = 1.0, shift
    out, lse = forward(case, held)
    want, want_lse = reference(case, wider(held, torch.float64))
    near, near_lse = reference(case, held)
    check(out, want, near)
    check(lse, want_lse, near_lse)


GRADIENTS = ("q", "k", "v", "prefix_k", "prefix_v", "gate")


def backward(
    case: Case, held: dict[str, Tensor | None], g: Tensor, g_lse: Tensor | None, needs: tuple[bool, ...] = (True,) * 4,
    launch: Launch = SMALL,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients by name, from the forward kernel's results; a case without a gate or prefix needs none of theirs."""
    from fastprompt.kernels.attention.backward import attention_backward

    out, lse = forward(case, held, launch)
    needs = (needs[0], needs[1], needs[2] and case.prefix > 0, needs[3] and case.gate is not None)
    got = attention_backward(
        g, g_lse, *(held[name] for name in OPERANDS), out, lse, needs=needs, max_q=longest(case.starts_q, case.queries),
        max_k=longest(case.starts_k, case.keys), **settings(case), launch=launch,
    )  # fmt: skip
    wanted = (needs[0], needs[1], needs[1], needs[2], needs[2], needs[3])
    assert [t is not None for t in got] == list(wanted)
    return {name: t for name, t in zip(GRADIENTS, got, strict=True) if t is not None}


def reference_gradients(
    case: Case, held: dict[str, Tensor | None], g: Tensor, g_lse: Tensor | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:  # fmt: skip
    held = held if dtype is None else wider(held, dtype)
    leaves = {n: held[n].detach().clone().requires_grad_() for n in GRADIENTS if held[n] is not None}
    out, lse = reference(case, held | leaves)
    total = (out * g.to(out.dtype)).sum() if g_lse is None else (out * g.to(out.dtype)).sum() + (lse * g_lse.to(lse.dtype)).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def arriving(case: Case, held: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """A gradient for out and one for lse."""
    random = torch.Generator().manual_seed(case.seed + 1)
    q = held["q"]
    g, g_lse = torch.randn(q.shape, generator=random), torch.randn(q.shape[:3], generator=random)
    return g.to(q.dtype).to(q.device), g_lse.to(q.device)


def agree_backward(case: Case, device: torch.device, launch: Launch = SMALL) -> None:
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    got = backward(case, held, g, g_lse, launch=launch)
    want = reference_gradients(case, held, g, g_lse, torch.float64)
    near = reference_gradients(case, held, g, g_lse)
    assert set(got) == set(want)
    for name in got:
        # g v^T - delta cancels: an error is as large as the terms, which the whole head shows and a single row may not.
        mine, truth, rival = (t.flatten(2) if t.dim() == 4 else t.flatten() for t in (got[name], want[name], near[name]))
        if name == "gate":  # delta comes from the rounded out
            mine, rival = mine.to(case.dtype), rival.to(case.dtype)
        check(mine, truth, rival, ulps=16.0 if case.dtype == F32 else 1.0, name=name)


@pytest.mark.parametrize("name", CASES)
def test_backward(name, device):
    agree_backward(CASES[name], device)


HALF = ["causal", "key mask", "two prefixes", "packed", "gate a sample and head", "soft cap", "sliced"]


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", HALF)
def test_backward_in_half_precision(name, dtype, device):
    agree_backward(replace(CASES[name], dtype=dtype), device)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 65])
def test_prefix_sizes_backward(rows, device):
    agree_backward(Case(rows=rows, heads=1, queries=3, keys=3), device)
    agree_backward(Case(rows=rows, prefix=2, index=((1, 0), (0, -1)), heads=1, queries=3, keys=4, causal=True), device)


@pytest.mark.parametrize("queries", [0, 1, 31, 32, 33, 65])
@pytest.mark.parametrize("keys", [0, 1, 31, 32, 33, 65])
def test_sizes_backward(queries, keys, device):
    agree_backward(Case(batch=1, queries=queries, keys=keys, causal=keys >= queries), device)


@pytest.mark.parametrize("width", [1, 8, 32, 64, 80, 96, 128, 256])
def test_widths_backward(width, device):
    agree_backward(Case(batch=1, heads=1, queries=3, keys=17, width=width, causal=True), device)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("name", ["plain", "index", "packed", "packed, shared prefix", "packed, own prefixes"])
def test_chunks_of_queries(name, splits, device):
    """Any number of chunks, also more than there are tiles, gives the prefix the same gradient."""
    agree_backward(replace(CASES[name], rows=5), device, replace(SMALL, prefix=Tile(16, 16, 4, 1), splits=splits))


@pytest.mark.parametrize("needs", list(product((False, True), repeat=4)))
def test_only_what_is_needed(needs, device):
    """Every subset gives the same bits as all together."""
    case = Case(heads=4, kv_heads=2, queries=17, keys=18, gate=(2, 4), causal=True)
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    whole = backward(case, held, g, g_lse)
    got = backward(case, held, g, g_lse, needs=needs)
    for name, t in got.items():
        check_bits(t, whole[name], name)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rotated", "expanded", "one number"])
def test_layouts_of_the_arriving_gradient(layout, device):
    case = Case(heads=4, kv_heads=2, queries=17, keys=9, gate=(1, 4))
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    if layout == "expanded":
        laid, g_lse = g[:, :, :1].expand_as(g), g_lse[:1, :, :1].expand_as(g_lse)
    elif layout == "one number":
        laid, g_lse = g[0, 0, 0, 0].expand_as(g), g_lse[0, 0, 0].expand_as(g_lse)
    else:
        laid, g_lse = laid_out(g, layout), g_lse.transpose(1, 2).contiguous().transpose(1, 2)
    want = backward(case, held, laid.clone(memory_format=torch.contiguous_format), g_lse.contiguous())
    for name, t in backward(case, held, laid, g_lse).items():
        check_bits(t, want[name], name)


def test_without_a_gradient_of_lse(device):
    case = Case(heads=4, kv_heads=2, queries=17, keys=9)
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    want = backward(case, held, g, torch.zeros_like(g_lse))
    for name, t in backward(case, held, g, None).items():
        check_bits(t, want[name], name)


@pytest.mark.parametrize("repeats", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["two prefixes", "gate a sample and head"])
def test_repeats_are_the_same_bits(name, repeats, device):
    case = replace(CASES[name], queries=9, keys=10, batch=2, index=((2, 0), (0, 1)) if CASES[name].index else None)
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    first = backward(case, held, g, g_lse)
    for _ in range(repeats):
        for gradient, t in backward(case, held, g, g_lse).items():
            check_bits(t, first[gradient], gradient)


def test_chunks_are_added_in_order(device):
    """The sum over chunks is ((first + second) + third) in float32, and not another order."""
    from fastprompt.kernels.attention.backward import attention_prefix_sum_kernel

    partial = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)).to(device) * 1e3
    out = torch.empty(2, 300, device=device)
    attention_prefix_sum_kernel[(2,)](*partial, *out, 300, 5, BLOCK=256, num_warps=4, enable_fp_fusion=True)
    want = partial[:, 0].clone()
    for row in partial[:, 1:].unbind(1):
        want += row
    check_bits(out, want)


HIDDEN = {
    "lengths": (Case(lengths=(20, 33), queries=5), "own", lambda t: t[0, :, 20:]),
    "left padding": (Case(lengths=(20, 35), left=True, queries=5), "own", lambda t: t[0, :, :15]),
    "window": (Case(window=4, queries=5, causal=True), "own", lambda t: t[:, :, :26]),
    "prefix length": (Case(rows=20, prefix_lengths=(3,)), "prefix", lambda t: t[:, :, 3:]),
    "prefix length of a stack": (
        Case(rows=9, prefix=2, index=((1, 0), (0, -1)), prefix_lengths=(3, 9)), "prefix", lambda t: t[0, :, 3:],
    ),
    "nobody's prefix": (Case(prefix=2, index=((0,), (-1,))), "prefix", lambda t: t[1]),
    "nobody's stacked prefix": (Case(prefix=3, index=((0, -1), (-1, 2))), "prefix", lambda t: t[1]),
    "key mask": (Case(masked=True), "own", None),
}  # fmt: skip


def hide(held: dict[str, Tensor | None], whose: str, where) -> dict[str, Tensor | None]:
    """NaN in every hidden row of the keys and of the values."""
    dirty = dict(held)
    for name in ("k", "v") if whose == "own" else ("prefix_k", "prefix_v"):
        dirty[name] = held[name].clone()
        if where is None:
            dirty[name].masked_fill_(~held["key_mask"][:, None, :, None], torch.nan)
        else:
            where(dirty[name]).fill_(torch.nan)
        assert dirty[name].isnan().any()
    return dirty


@pytest.mark.parametrize("name", HIDDEN)
def test_what_nobody_sees_may_be_nan(name, device):
    case, whose, where = HIDDEN[name]
    held = tensors(case, device)
    for got, want in zip(forward(case, hide(held, whose, where)), forward(case, held), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_nobody_sees_has_no_gradient(name, device):
    case, whose, where = HIDDEN[name]
    held = tensors(case, device)
    g, g_lse = arriving(case, held)
    want = backward(case, held, g, g_lse)
    for gradient, t in backward(case, hide(held, whose, where), g, g_lse).items():
        check_bits(t, want[gradient], gradient)


@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v", "gate"])
def test_nan_in_nan_out(name, device):
    case = Case(gate=(2, 2))
    held = tensors(case, device)
    held[name][(0,) * held[name].dim()] = torch.nan
    got, want = forward(case, held), reference(case, held)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pick_is_a_pure_function(direction, dtype):
    facts = {
        "batch": 8, "heads": 32, "kv_heads": 8, "queries": 64, "keys": 64, "prefixes": 1, "prefix_rows": 32, "stack": 1,
        "width": 128, "dtype": dtype, "arch": "sm_90", "gated": False,
    }  # fmt: skip
    assert pick(direction, **facts) == pick(direction, **facts)
    assert hash(pick(direction, **facts)) is not None
