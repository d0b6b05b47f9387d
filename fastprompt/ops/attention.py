"""Operators of the attention family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own flash attention runs on the prefix and on the own keys,
and the two are merged by their log-sum-exp, or on both after a copy where that is cheaper (`joined`); with impl="triton" the
kernels run there too, in Triton's interpreter.

Backward: fed with the merged output and the merged log-sum-exp, flash attention's backward of one part gives that part's
exact share: P = exp(score - lse) and dscore = P * (dout v - delta), delta = rowsum(out * dout) - dlse, hold column by column.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastprompt import _runtime
from fastprompt.reference.attention import visible
from fastprompt.tuning.attention import Launch, pick

if _runtime.HAS_TRITON:
    from fastprompt.kernels.attention.backward import attention_backward
    from fastprompt.kernels.attention.forward import attention_forward

_library = torch.library.Library("fastprompt", "FRAGMENT")
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? index, Tensor? prefix_lengths, "
    "Tensor? lengths, Tensor? key_mask, Tensor? starts_q, Tensor? starts_k, Tensor? gate, "
)
_SETTINGS = (
    "SymInt max_q, SymInt max_k, SymInt window, bool causal, bool left, bool triton, float scale, float softcap"  # Settings
)
_library.define(f"prefix_attention({_TENSORS}{_SETTINGS}) -> Tensor[]")
_library.define(
    f"prefix_attention_backward(Tensor g, Tensor? g_lse, {_TENSORS}Tensor out, Tensor lse, "
    f"bool joined, bool[] needs, {_SETTINGS}) -> Tensor[]"
)


class Settings(NamedTuple):
    """Everything about a call that is not a tensor, in schema order; 0 for no window and no soft cap."""

    max_q: int
    max_k: int
    window: int
    causal: bool
    left: bool
    triton: bool
    scale: float
    softcap: float


def sequences(starts_q: Tensor, starts_k: Tensor) -> list[tuple[slice, slice]]:
    """(queries, keys) of each packed sequence."""
    ends = [[slice(a, b) for a, b in pairwise(s)] for s in (starts_q.tolist(), starts_k.tolist())]
    return list(zip(*ends, strict=True))


def rows_of(i: int, rows: bool, *tensors: Any) -> list[Any]:
    """Row i of what has a row a sequence (`rows`); what is one for all, and None, as they are."""
    return [t[i : i + 1] if rows and t is not None and t.shape[0] > 1 else t for t in tensors]


# ---- Triton ----


def _forward_triton(  # type: ignore[no-untyped-def]
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, *settings
) -> list[Tensor]:
    s = Settings(*settings)
    out, lse = results = _empty_results(q)
    attention_forward(
        q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
        max_q=s.max_q, max_k=s.max_k, scale=s.scale, causal=s.causal, window=s.window, left=s.left, softcap=s.softcap,
        launch=_launch("forward", q, k, prefix_k, index, starts_q, gate, s),
    )  # fmt: skip
    return results


def _backward_triton(  # type: ignore[no-untyped-def]
    g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
    joined, needs, *settings,
) -> list[Tensor]:  # fmt: skip
    s = Settings(*settings)
    found = attention_backward(
        g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
        needs=tuple(needs), max_q=s.max_q, max_k=s.max_k, scale=s.scale, causal=s.causal, window=s.window, left=s.left,
        softcap=s.softcap, launch=_launch("backward", q, k, prefix_k, index, starts_q, gate, s),
    )  # fmt: skip
    return _in_promised_layout(found, q, k, v, prefix_k, prefix_v, gate, False, needs, True)


def _launch(
    direction: str, q: Tensor, k: Tensor, prefix_k: Tensor | None, index: Tensor | None, starts_q: Tensor | None,
    gate: Tensor | None, s: Settings,
) -> Launch:  # fmt: skip
    return pick(
        direction, batch=q.shape[0] if starts_q is None else starts_q.shape[0] - 1, heads=q.shape[1], kv_heads=k.shape[1],
        queries=s.max_q, keys=s.max_k, prefixes=0 if prefix_k is None else prefix_k.shape[0],
        prefix_rows=0 if prefix_k is None else prefix_k.shape[2], stack=1 if index is None else index.shape[1],
        width=q.shape[3], dtype=q.dtype, arch=_runtime.arch(q.device), gated=gate is not None,
    )  # fmt: skip


# ---- CPU: the parts of one softmax ----


class _Own(NamedTuple):
    """The own keys that some query sees, and how PyTorch's flash attention is told which."""

    k: Tensor
    v: Tensor
    start: int  # columns before it are seen by nobody
    causal: bool  # queries and keys are equally many and each query sees the keys up to its own
    mask: Tensor | None  # otherwise: float, added to the scores, [B or 1, 1, T or 1, S]
    hidden: Tensor | None  # bool [B or 1, 1, S, 1]: keys that no query of a sample sees
    blind: Tensor | None  # bool [B or 1, 1, T]: queries that see no key


def _own(k: Tensor, v: Tensor, queries: int, lengths: Tensor | None, key_mask: Tensor | None, s: Settings) -> _Own | None:
    keys = k.shape[2]
    start = max(0, keys - queries - s.window + 1) if s.window else 0
    keys -= start
    if not keys:
        return None
    k, v = _rows(k[:, :, start:]), _rows(v[:, :, start:])
    band = bool(s.window) and (s.window < keys or (not s.causal and s.window < queries))
    causal = s.causal and queries > 1
    if lengths is None and key_mask is None and not band:
        if not causal or queries == keys:
            return _Own(k, v, start, causal, None, None, None)
        if queries <= keys:  # the first query sees a key, and the last one all of them
            return _Own(k, v, start, False, _lower_right(queries, keys, True), None, None)
    seen = torch.ones((1, 1, keys), dtype=torch.bool)
    if band or causal:
        seen = visible(queries, keys, causal, s.window if band else 0, None, False, None, k.device)
    if lengths is not None or key_mask is not None:
        seen = seen & visible(1, keys + start, False, 0, lengths, s.left, key_mask, k.device)[:, :, start:]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None].expand(-1, -1, queries, -1)
    return _Own(k, v, start, False, mask, ~seen.any(1)[:, None, :, None], ~seen.any(2)[:, None].expand(-1, -1, queries))


class _Read(NamedTuple):
    """One flash attention to prefixes: which samples read which prefixes."""

    samples: slice | list[int]
    prefixes: slice | Tensor  # one, or one a sample
    length: int  # of all of them
    lengths: list[int] | None  # of each, where they differ


def _reads(prefix: Tensor | None, index: Tensor | None, prefix_lengths: Tensor | None, batch: int) -> list[_Read]:
    """The prefixes that samples read, so that those of a prefix read it together."""
    if prefix is None or not prefix.shape[2]:
        return []
    count, longest = prefix.shape[0], prefix.shape[2]
    sizes = [longest] * count if prefix_lengths is None else prefix_lengths.tolist()
    if index is None:
        if count == 1:
            return [_Read(slice(None), slice(None), sizes[0], None)] if sizes[0] else []
        return [_Read(slice(None), slice(None), longest, sizes if min(sizes) < longest else None)] if max(sizes) else []
    reads = []
    for column in index.T.tolist():
        readers: dict[int, list[int]] = {}
        for sample, prefix_id in enumerate(column):
            if prefix_id >= 0 and sizes[prefix_id]:
                readers.setdefault(prefix_id, []).append(sample)
        if 2 * len(readers) > batch > 1:  # hardly anything is shared
            everybody = [sample for group in readers.values() for sample in group]
            ids = [prefix_id for prefix_id, group in readers.items() for _ in group]
            each = [sizes[prefix_id] for prefix_id in ids]
            reads.append(_Read(everybody, torch.tensor(ids), max(each), each if min(each) < max(each) else None))
            continue
        for prefix_id, group in readers.items():
            samples = slice(None) if len(group) == batch else group
            reads.append(_Read(samples, slice(prefix_id, prefix_id + 1), sizes[prefix_id], None))
    return reads


def _columns(prefix: Tensor, read: _Read) -> Tensor:
    """[1 or samples, Hkv, length, D] of a read, 0 where a prefix is shorter."""
    prefix = _rows(prefix[read.prefixes][:, :, : read.length])
    return prefix if read.lengths is None else prefix.masked_fill(_beyond(read, prefix.shape[2])[:, None, :, None], 0)


def _beyond(read: _Read, length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(read.lengths)[:, None]


def _known(index: Tensor | None, prefix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(the index, none for a sample with a value out of range; bool [B]: those samples, if there are any)."""
    if index is None or prefix is None or not index.numel():
        return index, None
    wrong = ((index < -1) | (index >= prefix.shape[0])).any(1)
    return (torch.where(wrong[:, None], -1, index), wrong) if bool(wrong.any()) else (index, None)


def _rows(t: Tensor) -> Tensor:
    """PyTorch's flash attention on a CPU reads rows as if they were dense."""
    return t if t.stride(3) == 1 else t.contiguous()


def _fold(t: Tensor, key_heads: int) -> Tensor:
    """[B, H, T, ...] -> [1, Hkv, B * group * T, ...]: all rows that read a key head, as the queries of one sample."""
    return t.unflatten(1, (key_heads, -1)).transpose(0, 1).reshape(1, key_heads, -1, *t.shape[3:])


def _unfold(t: Tensor, like: Tensor) -> Tensor:
    """Back from `_fold`, as a view where the strides allow it."""
    batch, heads, queries = like.shape[:3]
    return t.view(t.shape[1], batch, -1, queries, *t.shape[3:]).transpose(0, 1).reshape(batch, heads, queries, *t.shape[3:])


def _folds(q: Tensor, columns: Tensor) -> bool:
    """Whether the samples that share a prefix are made one sample: it pays while few queries read a key head (measured)."""
    return columns.shape[0] == 1 and q.shape[0] > 1 and q.shape[2] * q.shape[1] // columns.shape[1] <= 64


def _joins(q: Tensor, k: Tensor, prefix_k: Tensor | None, others: tuple[Tensor | None, ...], s: Settings) -> bool:
    """Whether a prefix is copied in front of the keys after all: where that costs less than merging two results (measured).

    A function of shapes alone, because the joined keys are then results too: the backward pass reads them again.
    """
    if prefix_k is None or s.triton or q.device.type != "cpu" or s.window or any(t is not None for t in others):
        return False
    (batch, heads, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
    return _copying_pays(batch, heads, queries, width, key_heads, keys, prefix_k.shape[2], s.causal)


def _copying_pays(
    batch: int, heads: int, queries: int, width: int, key_heads: int, keys: int, rows: int, causal: bool
) -> bool:  # fmt: skip
    if not (batch and queries and keys and rows) or (causal and queries >= 512 and rows >= 64):
        return False
    # Merging reads a prefix that samples share once, and takes two more passes over the results.
    read = keys + (rows if batch == 1 else 2 * rows)
    return 2 * batch * key_heads * read * width < 4 * batch * heads * queries * width + 1_100_000


_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None, blind: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of PyTorch's flash attention, with 0 and -inf for the `blind` queries (which see nothing) and NaN for NaN.

    Where no score of a query passes for a maximum, PyTorch gives 0 and a log-sum-exp of 0, even when all scores are NaN.
    """
    out, lse = _flash_forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if blind is not None:
        out.masked_fill_(blind[..., None], 0)
        lse.masked_fill_(blind, -torch.inf)
    if int(torch.count_nonzero(lse)) < lse.numel():
        scores = q.unflatten(1, (k.shape[1], -1)) @ k.transpose(2, 3)[:, :, None]
        scores = scores.flatten(1, 2).float() * scale if mask is None else scores.flatten(1, 2).float() * scale + mask
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
        lost = (lse == 0) & ~scores.amax(-1).isfinite()
        out.masked_fill_(lost[..., None], torch.nan)
        lse.masked_fill_(lost, torch.nan)
    return out, lse


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over the columns of both. Two shares: 1 - share would lose the digits of a small one."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    nothing = lse == -torch.inf
    shares = [torch.sigmoid(d).masked_fill_(nothing, 0)[..., None] for d in (lse_a - lse_b, lse_b - lse_a)]
    return torch.addcmul(out_a * shares[0], out_b.float(), shares[1]).to(out_a.dtype), lse


def _read(q: Tensor, k: Tensor, v: Tensor, read: _Read, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of some samples' queries to the columns of a read."""
    if _folds(q, k):
        out, lse = _flash(_fold(q, k.shape[1]), k, v, scale)
        return _unfold(out, q), _unfold(lse, q)
    k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
    if read.lengths is None:
        return _flash(q, k, v, scale)
    mask = _column_mask(read, q.shape[2])
    return _flash(q, k, v, scale, False, mask, (mask == -torch.inf).all(-1))


def _column_mask(read: _Read, queries: int) -> Tensor:
    beyond = _beyond(read, read.length)
    return torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None].expand(-1, -1, queries, -1)


def _read_own(q: Tensor, own: _Own, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _flash(q, own.k, own.v, scale, own.causal, own.mask, own.blind)
    if own.hidden is not None and bool(out.isnan().any()):  # 0 * NaN is NaN: once more without what nobody sees
        k, v = (t.masked_fill(own.hidden, 0) for t in (own.k, own.v))
        out, lse = _flash(q, k, v, scale, own.causal, own.mask, own.blind)
    return out, lse


def _attend(  # type: ignore[no-untyped-def]
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, s: Settings
) -> tuple[Tensor, Tensor]:
    """The forward pass of samples that are not packed."""
    index, unknown = _known(index, prefix_k)
    own, reads = _own(k, v, q.shape[2], lengths, key_mask, s), _reads(prefix_k, index, prefix_lengths, q.shape[0])
    q = _rows(q)
    result = None if own is None else _read_own(q, own, s.scale)
    factor = None if gate is None else gate.to(q.dtype).expand(q.shape[:2])[:, :, None, None]
    for read in reads:
        # A gate on a prefix's keys is one on the queries that read it, and one on its values one on what they read.
        asking = (q if factor is None else q * factor)[read.samples]
        found = _read(asking, _columns(prefix_k, read), _columns(prefix_v, read), read, s.scale)
        if factor is not None:
            found = found[0] * factor[read.samples], found[1]
        if not isinstance(read.samples, slice):
            whole = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
            whole[0][read.samples], whole[1][read.samples] = found
            found = whole
        result = found if result is None else _merge(result, found)
    out, lse = (torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)) if result is None else result
    if unknown is not None:
        out[unknown], lse[unknown] = torch.nan, torch.nan
    return out, lse


def _part_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor | None, causal: bool,
    mask: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dq, dk, dv) of one part, from the merged output and log-sum-exp, or from delta in the place of the output."""
    if delta is None:
        return _flash_backward(g, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    # Flash attention computes rowsum(out * g) itself: one more column, which is 0 in v, 1 in g and delta in an output of 0.
    width = q.shape[3]
    q, k, v, g = (torch.nn.functional.pad(t, (0, 1)) for t in (q, k, v, g))
    out = torch.zeros_like(g)
    g[..., width], out[..., width] = 1, delta
    return tuple(d[..., :width] for d in _flash_backward(g, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale))


def _own_backward(  # type: ignore[no-untyped-def]
    g, q, own: _Own, out, lse, delta, scale: float
) -> tuple[Tensor, ...]:
    found = _part_backward(g, q, own.k, own.v, out, lse, delta, own.causal, own.mask, scale)
    if own.hidden is not None and any(bool(d.isnan().any()) for d in found):
        k, v = (t.masked_fill(own.hidden, 0) for t in (own.k, own.v))
        found = _part_backward(g, q, k, v, out, lse, delta, own.causal, own.mask, scale)
    dq, dk, dv = found
    return (dq, *(torch.nn.functional.pad(d, (0, 0, own.start, 0)) if own.start else d for d in (dk, dv)))


def _read_backward(  # type: ignore[no-untyped-def]
    g, q, k, v, out, lse, delta, read: _Read, scale: float
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of a read; dk and dv in float32, summed over the samples where the read has one prefix."""
    if _folds(q, k):
        rows: list[Any] = [None if t is None else _fold(t, k.shape[1]) for t in (g, q, out, lse, delta)]
        dq, dk, dv = _part_backward(rows[0], rows[1], k, v, rows[2], rows[3], rows[4], False, None, scale)
        return _unfold(dq, q), dk.float(), dv.float()
    mask, one = None, k.shape[0] == 1 < q.shape[0]
    if read.lengths is not None:
        mask = _column_mask(read, q.shape[2])
    k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
    dq, dk, dv = _part_backward(g, q, k, v, out, lse, delta, False, mask, scale)
    return dq, *(d.sum(0, keepdim=True, dtype=torch.float32) if one else d.float() for d in (dk, dv))


def _attend_backward(  # type: ignore[no-untyped-def]
    g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, out, lse, needs, s: Settings
) -> list[Tensor | None]:
    """(dq, dk, dv, dprefix_k, dprefix_v, dgate) of samples that are not packed, those of prefixes and gates in float32."""
    need_q, need_own, need_prefix, need_gate = needs
    index, unknown = _known(index, prefix_k)
    own, reads = _own(k, v, q.shape[2], lengths, key_mask, s), _reads(prefix_k, index, prefix_lengths, q.shape[0])
    g, q = _rows(g), _rows(q)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # what sees nothing has weights of exp(-inf)
    delta = None
    if gate is not None or g_lse is not None:
        delta = (g * out).sum(-1) if g_lse is None else (g * out).sum(-1) - g_lse
    dq = dk = dv = d_prefix_k = d_prefix_v = d_gate = None
    if own is not None and (need_q or need_own):
        dq, dk, dv = _own_backward(g, q, own, out, lse, delta, s.scale)
    if need_own and own is None:
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    if need_gate:
        d_gate = torch.zeros(q.shape[:2])
    factor = None if gate is None else gate.to(q.dtype).expand(q.shape[:2])[:, :, None, None]
    for read in reads if need_q or need_prefix or need_gate else []:
        some = read.samples
        keys, values = _columns(prefix_k, read), _columns(prefix_v, read)
        asking, asked, sent = q[some], q[some], g[some]
        if factor is not None:
            asked, sent = asking * factor[some], sent * factor[some]
        d, dk_read, dv_read = _read_backward(
            sent, asked, keys, values, out[some], lse[some], None if delta is None else delta[some], read, s.scale
        )
        if d_gate is not None:
            found, log = _read(asked, keys, values, read, s.scale)
            share = torch.exp(log - lse[some])
            d_gate[some] += (d * asking).sum((2, 3)) + (share * (g[some] * found).sum(-1)).sum(2)
        if need_q:
            d = d if factor is None else d * factor[some]
            if dq is None and isinstance(some, slice):
                dq = d
            else:
                dq = torch.zeros_like(q) if dq is None else dq
                dq[some] += d
        if need_prefix:
            d_prefix_k = _gathered(d_prefix_k, dk_read, read, prefix_k.shape)
            d_prefix_v = _gathered(d_prefix_v, dv_read, read, prefix_k.shape)
    if need_q and dq is None:
        dq = torch.zeros_like(q)
    if need_prefix and d_prefix_k is None:
        d_prefix_k, d_prefix_v = torch.zeros(prefix_k.shape), torch.zeros(prefix_k.shape)
    for lost in (dq, dk, dv) if unknown is not None else ():
        if lost is not None:
            lost[unknown] = torch.nan
    dq, (dk, dv) = dq if need_q else None, (dk, dv) if need_own else (None, None)
    return [dq, dk, dv, d_prefix_k, d_prefix_v, None if d_gate is None else d_gate.sum_to_size(gate.shape)]


def _gathered(total: Tensor | None, d: Tensor, read: _Read, shape: torch.Size) -> Tensor:
    """The gradients of a read, added to those of the whole prefix in the order of the samples."""
    if total is None:
        if isinstance(read.prefixes, slice) and d.shape == shape:
            return d
        total = torch.zeros(shape)
    part = total[:, :, : read.length]
    if isinstance(read.prefixes, slice):
        part[read.prefixes] += d
    else:
        part.index_add_(0, read.prefixes, d)
    return total


# ---- CPU: whole calls ----


def _exactly(gate: Tensor | None, g_lse: Tensor | None, *tensors: Any) -> list[Any]:
    """float32 where a gate, or delta, is multiplied in: rounding those to 16 bits would add an error of its own."""
    if gate is None and g_lse is None:
        return list(tensors)
    return [None if t is None else t.float() for t in tensors]


def _join(k: Tensor, prefix: Tensor) -> Tensor:
    batch = k.shape[0]
    return torch.cat((prefix if prefix.shape[0] == batch else prefix.expand(batch, -1, -1, -1), k), 2)


def _lower_right(queries: int, columns: int, causal: bool) -> Tensor | None:
    """The causal mask of joined columns."""
    if not causal or queries == 1:
        return None
    return (_kept_mask if queries * columns <= 16384 else _new_mask)(queries, columns)


def _new_mask(queries: int, columns: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((queries, columns), -torch.inf, device="cpu").triu_(columns - queries + 1)


_kept_mask = lru_cache(64)(_new_mask)  # at most 4 MB


def joined(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool, scale: float | None
) -> Tensor | None:  # fmt: skip
    """A small call as a whole, by PyTorch's operators and with their gradients. None: this is not such a call.

    Checks, a registered operator and an `autograd.Function` take three times as long as a small attention itself, so this
    comes before all of them. Whoever traces calls, or stands in for tensors, sees the registered operator.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    given, dtype = (q, k, v, prefix_k, prefix_v), q.dtype
    for t in given:
        if (type(t) is not Tensor and type(t) is not Parameter) or not t.is_cpu or t.dtype is not dtype or t.dim() != 4:
            return None
    (batch, heads, queries, width), own, theirs = q.shape, k.shape, prefix_k.shape
    key_heads, keys, rows = own[1], own[2], theirs[2]
    if (
        own != v.shape or theirs != prefix_v.shape or own != (batch, key_heads, keys, width) or dtype not in _FLASH
        or theirs not in ((1, key_heads, rows, width), (batch, key_heads, rows, width)) or (causal and queries > keys)
        or not (heads and queries and key_heads and keys and rows and width) or heads % key_heads
    ):  # fmt: skip
        return None
    grouped, large = key_heads < heads, batch * key_heads * (rows + keys) * width >= 65536
    few = large and dtype is torch.float32 and queries <= (8 if grouped else 4)  # measured, as all bounds here
    recorded = [t.requires_grad for t in given] if torch.is_grad_enabled() else [False] * 5
    if few and batch == 1 and not any(recorded):
        return _one_sample(q, k, v, prefix_k, prefix_v, causal, width**-0.5 if scale is None else scale)
    if not _copying_pays(batch, heads, queries, width, key_heads, keys, rows, causal):
        return None
    if any(recorded) and not any(recorded[:3]) and batch * heads * queries * (rows + keys) * width >= 1 << 22:
        return None  # PyTorch would compute all gradients, and those of the prefix alone cost half
    joint_k, joint_v = _join(k, prefix_k), _join(v, prefix_v)
    mask = _lower_right(queries, rows + keys, causal)
    # Flash attention takes queries that read the same key head one after the other.
    if few and grouped:
        return _products(q, joint_k, joint_v, mask, width**-0.5 if scale is None else scale)
    # Called without torch.ops, which takes as long as all of the above.
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        _rows(q), joint_k, joint_v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out if int(torch.count_nonzero(lse)) == lse.numel() else None  # see `_flash`


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as two batched products; k and v dense."""
    (batch, heads, queries, width), (key_heads, columns) = q.shape, k.shape[1:3]
    k, v = k.view(-1, columns, width), v.view(-1, columns, width)
    rows = (q * scale).reshape(batch * key_heads, -1, width)
    if mask is None:
        scores = torch.bmm(rows, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(mask.repeat(heads // key_heads, 1), rows, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, 2), v).view(batch, heads, queries, width)


def _one_sample(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool, scale: float
) -> Tensor:  # fmt: skip
    """Few queries of one sample, without gradients: nothing is copied but their scores."""
    (heads, queries, width), (key_heads, keys), rows = q.shape[1:], k.shape[1:3], prefix_k.shape[2]
    asking = (q * scale).reshape(key_heads, -1, width)
    mask, keys_of, values = _lower_right(queries, keys, causal), k[0].transpose(1, 2), v[0]
    own = torch.bmm(asking, keys_of) if mask is None else torch.baddbmm(mask.repeat(heads // key_heads, 1), asking, keys_of)
    weights = torch.softmax(torch.cat((torch.bmm(asking, prefix_k[0].transpose(1, 2)), own), 2), 2)
    found = torch.baddbmm(torch.bmm(weights[:, :, :rows], prefix_v[0]), weights[:, :, rows:], values)
    return found.view(1, heads, queries, width)


_FLASH = (torch.float32, torch.bfloat16, torch.float16)


def _forward_cpu(  # type: ignore[no-untyped-def]
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, *settings
) -> list[Tensor]:
    s = Settings(*settings)
    if s.triton:
        return _forward_triton(
            q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, *settings
        )
    if _joins(q, k, prefix_k, (index, prefix_lengths, lengths, key_mask, starts_q, gate), s):
        keys, values = _join(k, prefix_k), _join(v, prefix_v)
        out, lse = _flash(_rows(q), keys, values, s.scale, False, _lower_right(q.shape[2], keys.shape[2], s.causal))
        return [out, lse.contiguous(), keys, values]  # out lies like _rows(q), which is what the fake promises
    like = q
    q, k, v, prefix_k, prefix_v = _exactly(gate, None, q, k, v, prefix_k, prefix_v)
    if starts_q is None and q.numel():
        found = _attend(q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, s)
        return _as_promised(found, like)
    out, lse = _empty_results(like)
    if starts_q is None:
        return [out, lse]
    for i, (own_q, own_k) in enumerate(sequences(starts_q, starts_k)):
        if own_q.start < own_q.stop:
            pk, pv, size = rows_of(i, index is None, prefix_k, prefix_v, prefix_lengths)
            chosen, factor = rows_of(i, True, index, gate)
            out[:, :, own_q], lse[:, :, own_q] = _attend(
                q[:, :, own_q], k[:, :, own_k], v[:, :, own_k], pk, pv, chosen, size, None, None, factor, s
            )
    return [out, lse]


def _as_promised(found: tuple[Tensor, Tensor], q: Tensor) -> list[Tensor]:
    return [_laid_out(found[0], _empty_like(q, "meta")), found[1].contiguous()]


def _laid_out(t: Tensor, promised: Tensor) -> Tensor:
    """t in the strides and dtype that a fake promises."""
    if t.dtype == promised.dtype and t.stride() == promised.stride():
        return t
    return torch.empty_strided(t.shape, promised.stride(), dtype=promised.dtype, device=t.device).copy_(t)


def _backward_cpu(  # type: ignore[no-untyped-def]
    g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
    joined, needs, *settings,
) -> list[Tensor]:  # fmt: skip
    s = Settings(*settings)
    if s.triton:
        return _backward_triton(
            g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out,
            lse, joined, needs, *settings,
        )  # fmt: skip
    given = (q, k, v, prefix_k, prefix_v, gate)
    rows = prefix_k.shape[2] if joined else 0
    g, q, k, v, prefix_k, prefix_v, out = _exactly(gate, g_lse, g, q, k, v, prefix_k, prefix_v, out)
    if joined and (needs[0] or needs[1]):
        delta = None if g_lse is None else (g * out).sum(-1) - g_lse
        mask = _lower_right(q.shape[2], k.shape[2], s.causal)
        dq, *both = _part_backward(_rows(g), _rows(q), k, v, out, lse, delta, False, mask, s.scale)
        whole: list[Any] = [dq if needs[0] else None]
        # Token by token first: what is sliced after that lies where the fake says.
        tokens = [d.to(given[1].dtype).transpose(1, 2).contiguous().transpose(1, 2) for d in both]
        whole += [d[:, :, rows:] if needs[1] else None for d in tokens]
        if needs[2]:
            ours = [d[:, :, :rows] for d in both]
            whole += [d.sum(0, keepdim=True, dtype=torch.float32) if prefix_k.shape[0] == 1 else d for d in ours]
        return _in_promised_layout(whole, *given, joined, needs, False)
    if starts_q is None and q.numel():
        k, v = k[:, :, rows:], v[:, :, rows:]
        whole = _attend_backward(
            g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, out, lse, needs, s
        )
        return _in_promised_layout(whole, *given, joined, needs, False)
    found: list[Any] = [torch.zeros(t.shape) if need else None for t, need in zip(given, _by_tensor(needs), strict=True)]
    for i, (own_q, own_k) in enumerate([] if starts_q is None else sequences(starts_q, starts_k)):
        if own_q.start == own_q.stop:
            continue
        pk, pv, size = rows_of(i, index is None, prefix_k, prefix_v, prefix_lengths)
        chosen, factor = rows_of(i, True, index, gate)
        part = _attend_backward(
            g[:, :, own_q], None if g_lse is None else g_lse[:, :, own_q], q[:, :, own_q], k[:, :, own_k], v[:, :, own_k],
            pk, pv, chosen, size, None, None, factor, out[:, :, own_q], lse[:, :, own_q], needs, s,
        )  # fmt: skip
        to = [t if t is None else t[:, :, own] for t, own in zip(found[:3], (own_q, own_k, own_k), strict=True)]
        to += rows_of(i, index is None, *found[3:5]) + rows_of(i, True, found[5])
        for total, d in zip(to, part, strict=True):
            if total is not None:
                total += d
    return _in_promised_layout(found, *given, joined, needs, False)


# ---- Registration ----


def _empty_like(t: Tensor, device: str | None = None) -> Tensor:
    """In the strides of t where its rows are dense."""
    layout = torch.preserve_format if t.stride(3) == 1 else torch.contiguous_format
    return torch.empty_like(t, memory_format=layout, device=device)


def _empty_results(q: Tensor) -> list[Tensor]:
    return [_empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)]


def _by_tensor(needs: list[bool]) -> tuple[bool, ...]:
    """What is needed (q, own, prefix, gate) for each of q, k, v, prefix_k, prefix_v, gate."""
    return needs[0], needs[1], needs[1], needs[2], needs[2], needs[3]


def _empty_gradients(  # type: ignore[no-untyped-def]
    q, k, v, prefix_k, prefix_v, gate, joined: bool, needs, kernels: bool, device: str | None = None
) -> list[Tensor]:
    """Those of q, k and v as the kernels leave them, or token by token as PyTorch's flash attention on a CPU does."""
    made = []
    for place, (t, need) in enumerate(zip((q, k, v, prefix_k, prefix_v, gate), _by_tensor(needs), strict=True)):
        if need and place < 3 and kernels:
            made.append(_empty_like(t, device))
        elif need and place < 3:
            whole = t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3]), device=device).transpose(1, 2)
            made.append(whole[:, :, prefix_k.shape[2] :] if joined and place else whole)
        elif need:
            made.append(t.new_empty(t.shape, device=device))
    return made


def _in_promised_layout(  # type: ignore[no-untyped-def]
    found, q, k, v, prefix_k, prefix_v, gate, joined: bool, needs, kernels: bool
) -> list[Tensor]:
    """What was found and is not None."""
    promised = _empty_gradients(q, k, v, prefix_k, prefix_v, gate, joined, needs, kernels, "meta")
    return [_laid_out(d, to) for d, to in zip((d for d in found if d is not None), promised, strict=True)]


def _forward_fake(  # type: ignore[no-untyped-def]
    q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, *settings
):
    results = _empty_results(q)
    if _joins(q, k, prefix_k, (index, prefix_lengths, lengths, key_mask, starts_q, gate), Settings(*settings)):
        results += [_join(k, prefix_k), _join(v, prefix_v)]
    return results


def _backward_fake(  # type: ignore[no-untyped-def]
    g, g_lse, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, out, lse,
    joined, needs, *settings,
):  # fmt: skip
    kernels = Settings(*settings).triton or q.device.type == "cuda"
    return _empty_gradients(q, k, v, prefix_k, prefix_v, gate, joined, needs, kernels)


for _name, _triton, _cpu, _fake in (
    ("prefix_attention", _forward_triton, _forward_cpu, _forward_fake),
    ("prefix_attention_backward", _backward_triton, _backward_cpu, _backward_fake),
):
    _library.impl(_name, _runtime.on_its_device(_triton), "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _fake, lib=_library)

_forward = torch.ops.fastprompt.prefix_attention.default
_backward = torch.ops.fastprompt.prefix_attention_backward.default


class PrefixAttention(torch.autograd.Function):
    """(out, lse) with gradients through both for q, k, v, the prefix and the gate; only what needs one is computed."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, settings,
        through_lse,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        given = (q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate)
        out, lse, *joined = _forward(*given, *settings)
        ctx.save_for_backward(q, *(joined or (k, v)), *given[3:], out, lse)
        ctx.settings, ctx.through_lse, ctx.joined = settings, through_lse, bool(joined)
        return out, lse

    @staticmethod
    def backward(ctx, g, g_lse):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.prefix_attention has no second derivative: call backward without create_graph=True, "
                'or use impl="torch"'
            )
        saved = ctx.saved_tensors
        asked = ctx.needs_input_grad
        needs = [asked[0], asked[1] or asked[2], asked[3] or asked[4], asked[11]]
        if g is None:
            g = torch.zeros_like(saved[-2])
        g_lse = g_lse if ctx.through_lse else None  # compiled code sends zeros for what nobody reads
        found = iter(_backward(g, g_lse, *saved, ctx.joined, needs, *ctx.settings))
        kinds = (0, 1, 1, 2, 2, None, None, None, None, None, None, 3, None, None)
        return tuple(next(found) if kind is not None and needs[kind] else None for kind in kinds)
