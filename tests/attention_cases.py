"""Calls of `functional.prefix_attention` as data, the tensors that go with them, and how exact an answer has to be."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprompt.functional import prefix_attention
from fastprompt.reference import attention as reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TRAINED = ("q", "k", "v", "prefix_k", "prefix_v", "gate")
SHARES = ("shared", "each", "index", "stack", "none")


@dataclass(frozen=True)
class Case:
    """One call. The defaults are grouped queries that read a shared prefix and their own keys."""

    batch: int = 3
    heads: tuple[int, int] = (4, 2)  # H, Hkv
    queries: int = 5
    keys: int = 7
    rows: int = 6  # of a prefix
    width: int = 8
    share: str = "shared"
    ragged: bool = False  # prefix_lengths
    causal: bool = False
    window: int | None = None
    lengths: str | None = None  # padding
    key_mask: bool = False
    packed: bool = False  # `batch` sequences of up to `queries` queries and `keys` keys
    gate: tuple[bool, bool] | None = None  # (one a sample, one a head)
    scale: float | None = None
    softcap: float | None = None
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    g_layout: str = "contiguous"
    through_lse: bool = False
    seed: int = 0

    def __str__(self) -> str:
        plain = vars(Case())
        return "-".join(f"{n}={v}".replace("torch.", "") for n, v in vars(self).items() if v != plain[n]) or "plain"


def sampled(draw: random.Random, sizes: tuple[int, ...] = (0, 1, 2, 3, 5, 8, 13), small: bool = False) -> Case:
    """A valid case at random; `small`: few programs for an interpreter."""
    groups, key_heads = draw.choice([(1, 1), (1, 2), (2, 1), (3, 2)] if small else [(1, 1), (1, 3), (2, 2), (4, 1), (3, 2)])
    share = draw.choice(SHARES)
    queries, keys = draw.choice(sizes), draw.choice(sizes)
    causal = draw.random() < 0.4
    if causal and queries > keys:
        queries, keys = keys, queries
    packed = draw.random() < 0.2
    return Case(
        batch=draw.choice((1, 2) if small else (1, 2, 3, 5)), heads=(groups * key_heads, key_heads), queries=queries,
        keys=keys, rows=draw.choice(sizes), width=draw.choice((1, 3, 8, 16, 20)), share=share,
        ragged=share != "none" and draw.random() < 0.4, causal=causal,
        window=draw.choice((None, None, 1, 2, 4, 50)), lengths=None if packed else draw.choice((None, None, "right", "left")),
        key_mask=not packed and draw.random() < 0.2, packed=packed,
        gate=draw.choice((None, None, (False, False), (True, True), (True, False), (False, True))) if share != "none" else None,
        scale=draw.choice((None, 0.3)), softcap=draw.choice((None, None, None, 1.5)),
        dtype=draw.choice((F32, F32, F32, BF16, F16)), layout=draw.choice(tuple(LAYOUTS)),
        g_layout=draw.choice(tuple(LAYOUTS)), through_lse=draw.random() < 0.4, seed=draw.randrange(2**31),
    )  # fmt: skip


# ---- Tensors ----


def _inner(t: Tensor) -> Tensor:
    """An inner slice of a larger tensor, so that it starts and ends away from its storage."""
    bigger = torch.full([side + 2 for side in t.shape], 99, dtype=t.dtype, device=t.device)
    inner = bigger[tuple(slice(1, 1 + side) for side in t.shape)]
    return inner.copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "token by token": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "rows and columns swapped": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "step 2": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "slice": _inner,
    "one sample for all": lambda t: t[:1].expand_as(t),
    "one head for all": lambda t: t[:, :1].expand_as(t),
}


def tensors(case: Case, device: torch.device | str) -> dict[str, Any]:
    """All keyword arguments of a case that are tensors: the same numbers every time."""
    made = torch.Generator().manual_seed(case.seed)
    draw = random.Random(case.seed)
    batch, (heads, key_heads) = case.batch, case.heads
    held: dict[str, Any] = {}
    queries, keys, samples = case.queries, case.keys, batch
    if case.packed:
        own_k = [draw.randint(0, case.keys) for _ in range(batch)]
        own_q = [draw.randint(0, min(case.queries, own_k[i]) if case.causal else case.queries) for i in range(batch)]
        held["cu_seqlens"] = torch.tensor([0, *own_q]).cumsum(0)
        held["cu_seqlens_k"] = torch.tensor([0, *own_k]).cumsum(0)
        queries, keys, samples = sum(own_q), sum(own_k), 1
    shapes = {"q": (samples, heads, queries), "k": (samples, key_heads, keys), "v": (samples, key_heads, keys)}
    count = {"shared": 1, "each": batch, "index": 3, "stack": 4, "none": 0}[case.share]
    if count:
        shapes |= dict.fromkeys(("prefix_k", "prefix_v"), (count, key_heads, case.rows))
    for name, shape in shapes.items():
        t = torch.randn((*shape, case.width), generator=made).to(case.dtype)
        held[name] = LAYOUTS[case.layout](t)
    if case.share == "index":
        held["prefix_index"] = torch.randint(-1, count, (batch,), generator=made)
    if case.share == "stack":
        held["prefix_index"] = torch.randint(-1, count, (batch, 3), generator=made)
    if case.ragged:
        held["prefix_lengths"] = torch.randint(case.rows + 1, (count,), generator=made)
    if case.lengths:
        held["lengths"] = torch.randint(case.keys + 1, (batch,), generator=made)
    if case.key_mask:
        held["key_mask"] = torch.rand((batch, case.keys), generator=made) < 0.7
    if case.gate:
        each, head = case.gate
        held["gate"] = torch.randn((batch if each else 1, heads if head else 1), generator=made)
    return {name: t.to(device) for name, t in held.items()}


def options(case: Case) -> dict[str, Any]:
    plain = {"causal": case.causal, "window": case.window, "scale": case.scale, "softcap": case.softcap}
    return plain | {"padding": case.lengths or "right", "return_lse": True}


def gradients(case: Case, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Incoming gradients that look like noise, in the dtypes of the results."""
    made = torch.Generator().manual_seed(case.seed + 1)
    g = LAYOUTS[case.g_layout](torch.randn(out.shape, generator=made).to(out))
    return g, torch.randn(lse.shape, generator=made).to(lse)


def run(
    case: Case, held: dict[str, Any], impl: str, wanted: tuple[str, ...] = TRAINED, amp: torch.dtype | None = None,
    **changes: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """out and lse of a case (under autocast to `amp`), and the gradients of those of `wanted` that are there."""
    inputs = {name: held[name].detach().requires_grad_() for name in wanted if name in held}
    with torch.autocast(held["q"].device.type, amp, enabled=amp is not None):
        found = prefix_attention(**(held | inputs), **(options(case) | {"impl": impl} | changes))
    out, lse = found if isinstance(found, tuple) else (found, None)
    results = {"out": out} if lse is None else {"out": out, "lse": lse}
    if inputs and out.requires_grad:
        g, g_lse = gradients(case, out, out[..., 0] if lse is None else lse)
        sent = (g, torch.where(lse == -torch.inf, 0, g_lse)) if case.through_lse else (g,)
        found = torch.autograd.grad((out, lse)[: len(sent)], list(inputs.values()), sent, allow_unused=True)
        # An impl may leave out a gradient that is zero.
        results |= {n: torch.zeros_like(inputs[n]) if d is None else d for n, d in zip(inputs, found, strict=True)}
    return results


def truth(case: Case, held: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """`run` in float64, by the reference; the incoming gradients are those of the case's dtype."""
    exact = {name: t.double() if t.is_floating_point() else t for name, t in held.items()}
    out, lse = prefix_attention(
        **(exact | {name: exact[name].requires_grad_() for name in TRAINED if name in exact}),
        **(options(case) | {"impl": "torch"} | changes),
    )
    g, g_lse = gradients(case, out.to(case.dtype), lse.float())
    inputs = {name: exact[name] for name in TRAINED if name in exact}
    sent = (g.double(), torch.where(lse == -torch.inf, 0, g_lse).double()) if case.through_lse else (g.double(),)
    found = torch.autograd.grad((out, lse)[: len(sent)], list(inputs.values()), sent, allow_unused=True)
    zeros = {n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(inputs.items(), found, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **zeros}


# ---- How exact ----


def sizes(case: Case, held: dict[str, Any]) -> dict[str, Tensor]:
    """For each row of each result the size of what is summed there, [..., 1] in float64: the unit of rounding errors.

    A sum may cancel (dscore = P * (dout v - delta) is 0 where a query sees one key), what is summed does not. The gradients
    of a loss whose factors are all absolute values sum the same terms without their signs.
    """
    inputs = {name: held[name].detach().double().abs().requires_grad_() for name in TRAINED if name in held}
    exact = {name: held[name].detach().double() for name in inputs}
    scale = case.width**-0.5 if case.scale is None else case.scale
    made = {"out": torch.zeros(held["q"].shape[:3]), "lse": torch.zeros(held["q"].shape[:3])}
    g, g_lse = gradients(case, held["q"], made["lse"])
    loss = torch.zeros((), dtype=torch.float64)
    for samples, own_q, own_k, sequence in _calls(case, held):
        seen = reference.visible(
            own_q.stop - own_q.start, own_k.stop - own_k.start, case.causal, case.window or 0, held.get("lengths"),
            case.lengths == "left", held.get("key_mask"), g.device,
        ).expand(samples, -1, -1)  # fmt: skip

        def columns(x: dict[str, Tensor], own_k=own_k, sequence=sequence, samples=samples) -> list[Tensor]:
            both = []
            for name in ("k", "v"):
                t = x[name][:, :, own_k].repeat_interleave(case.heads[0] // case.heads[1], 1)
                if f"prefix_{name}" in x:
                    ours, _ = _prefixes(case, held, x[f"prefix_{name}"], sequence, samples)
                    ours = ours.repeat_interleave(case.heads[0] // case.heads[1], 1)
                    gate = x["gate"].expand(case.batch, -1) if "gate" in x else torch.ones((case.batch, 1))
                    ours = ours * (gate if sequence is None else gate[sequence : sequence + 1])[:, :, None, None].to(ours)
                    t = torch.cat([ours, t], 2)
                both.append(t)
            return both

        if "prefix_k" in held:
            _, there = _prefixes(case, held, exact["prefix_k"], sequence, samples)
            seen = torch.cat([there[:, None].expand(-1, seen.shape[1], -1), seen], 2)
        seen = seen[:, None]
        key, value = columns(exact)
        query, sent = exact["q"][:, :, own_q], g[:, :, own_q].double().abs()
        scores = query @ key.transpose(2, 3) * scale
        scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
        scores = scores.masked_fill(~seen, -torch.inf)
        weight = torch.softmax(scores, -1).nan_to_num(0.0)
        back = sent @ value.abs().transpose(2, 3)
        spread = weight * (back + (weight * back).sum(-1, keepdim=True) + g_lse[:, :, own_q, None].double().abs())
        key, value = columns(inputs)
        product = inputs["q"][:, :, own_q] @ key.transpose(2, 3) * scale
        loss = loss + (spread * product).sum() + ((weight @ value) * sent).sum()
        made["out"][:, :, own_q] = (weight @ value.detach()).amax(-1).float()
        made["lse"][:, :, own_q] = 1 + (product.detach() * seen).amax(-1).float() if product.shape[-1] else 1.0
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    rows = {n: torch.zeros_like(inputs[n]) if d is None else d for n, d in zip(inputs, found, strict=True)}
    largest = {n: d.amax(-1, keepdim=True) if d.numel() else d.sum(-1, keepdim=True) for n, d in rows.items()}
    # A row of log-sum-exps has one allowance.
    lse = made["lse"].amax(-1, keepdim=True) if made["lse"].numel() else made["lse"].sum(-1, keepdim=True)
    return {"out": made["out"][..., None].double(), "lse": lse.double(), **largest}


def _calls(case: Case, held: dict[str, Any]) -> list[tuple[int, slice, slice, int | None]]:
    """(samples, queries, keys, number) of each packed sequence, or of the one call."""
    if not case.packed:
        return [(case.batch, slice(0, case.queries), slice(0, case.keys), None)]
    a, b = held["cu_seqlens"].tolist(), held["cu_seqlens_k"].tolist()
    return [(1, slice(a[i], a[i + 1]), slice(b[i], b[i + 1]), i) for i in range(case.batch)]


def _prefixes(case: Case, held: dict[str, Any], t: Tensor, sequence: int | None, samples: int) -> tuple[Tensor, Tensor]:
    index, sizes = held.get("prefix_index"), held.get("prefix_lengths")
    index = index[:, None] if index is not None and index.dim() == 1 else index
    if sequence is not None:
        one = slice(sequence, sequence + 1)
        if index is None and t.shape[0] > 1:
            t, sizes = t[one], None if sizes is None else sizes[one]
        index = None if index is None else index[one]
    return reference.prefix_columns(t, index, sizes, samples)
