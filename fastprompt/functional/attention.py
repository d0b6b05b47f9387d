"""Attention over a prefix that the batch shares."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.functional.checks import autocast_dtype, bad, check_range, looks_at_values, one_of, path_of, tell
from fastprompt.ops import attention as ops
from fastprompt.reference import attention as reference


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, *,
    prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None,
    causal: bool = False, window: int | None = None, lengths: Tensor | None = None, padding: str = "right",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None, max_seqlen_k: int | None = None,
    gate: Tensor | None = None, separate: bool = False,
    dropout: float = 0.0, dropout_shared: bool = True, seed: int | Tensor | None = None,
    scale: float | None = None, softcap: float | None = None, return_lse: bool = False, impl: str = "auto",
) -> Any:  # fmt: skip
    """Attention of every query to a prefix and to the sample's own keys, without joining the two in memory.

        out = softmax(scale * q [gate * prefix_k | k]^T) [gate * prefix_v | v]

    with one softmax over the columns that a query sees; separate=True is attention(q, k, v) + gate * attention(q, prefix).
    Exact: it is what attention gives after the prefix has been copied in front of each sample's keys. Prefix tuning: Li &
    Liang 2021 (arXiv 2101.00190); P-tuning v2: Liu et al. 2022 (arXiv 2110.07602); VPT-deep: Jia et al. 2022 (arXiv
    2203.12119); gate: UniPELT, Mao et al. 2022 (arXiv 2110.07577); separate: LLaMA-Adapter, Zhang et al. 2024 (arXiv
    2303.16199).

    Args:
        q: [B, H, T, D], floating point, any strides.
        k, v: [B, Hkv, S, D]; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        prefix_k, prefix_v: [N, Hkv, P, D], seen by every query. N = 1: shared by the batch. N = B: one a sample. Other N:
            with `prefix_index`. None: no prefix.
        prefix_index: int64 [B] or [B, M]: each sample's prefixes, side by side; -1: none. On a GPU a sample with another
            value out of range is NaN and teaches nothing (FASTPROMPT_CHECK=1 raises instead).
        prefix_lengths: int64 [N]: how many of the P rows of each prefix exist, counted from the first.
        causal: own key j is seen by query i if j <= i + S - T: the last query lines up with the last key.
        window: w >= 1: own keys at most w - 1 positions before the query (and after it when not causal).
        lengths: int64 [B]: how many own keys of each sample exist; the first ones, or with padding="left" the last ones.
        key_mask: bool [B, S]: the own keys that exist.
        cu_seqlens: int64 or int32 [n + 1], 0 first: sequences of different lengths packed behind each other. B is 1 and T the
            sum of the lengths; wherever a shape above says B for a prefix, an index or a gate, it is n.
        cu_seqlens_k: the same for the keys. Default: cu_seqlens.
        max_seqlen, max_seqlen_k: the longest sequence. Default on a GPU: the sum of the lengths, which is right but slower.
        gate: [1 or B, 1 or H], floating point; multiplies the prefix's keys and values.
        separate: the prefix has a softmax of its own, and `gate` multiplies what it adds.
        dropout: share of the elements of prefix_k and prefix_v that are set to 0 (the others grow by 1 / (1 - dropout)).
        dropout_shared: one draw for the batch; otherwise one a sample, for which a prefix is copied for each sample.
        seed: of the draw, an int or an int64 tensor with one element. Default: from PyTorch's generator.
        scale: default D ** -0.5.
        softcap: c > 0: c * tanh(score / c) in the place of score.
        return_lse: also return the log-sum-exp of the scores.
        impl: see the module.

    Returns:
        [B, H, T, D] in the dtype of q (autocast's when it is on), or with return_lse (that, natural log-sum-exp [B, H, T] in
        float32). A query that sees nothing gives 0 and -inf, and has no gradient. Gradients: q, k, v, prefix_k, prefix_v and
        gate, through both results. Sums over the batch have a fixed order: the same bits every time.

    Raises:
        ValueError, TypeError: what was expected and what came, before any device work.
        RuntimeError: a second derivative of the fused paths is asked for (impl="torch" has one). Small calls on a CPU are
            PyTorch's own operators: theirs raises when the second derivative is taken, and products have one.
    """
    if prefix_k is not None and prefix_v is not None and impl == "auto" and _runtime.watch is None:
        rare = (prefix_index, prefix_lengths, window, lengths, key_mask, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, gate)
        usual = all(given is None for given in rare) and softcap is None and padding == "right"
        if usual and not (dropout or separate or return_lse or torch.is_autocast_enabled("cpu")):
            small = ops.joined(q, k, v, prefix_k, prefix_v, causal, scale)
            if small is not None:
                return small
    q, k, v, prefix_k, prefix_v = _check_heads(q, k, v, prefix_k, prefix_v)
    path = path_of(impl, q)
    near = {"prefix_index": prefix_index, "prefix_lengths": prefix_lengths, "lengths": lengths, "key_mask": key_mask}
    for name, other in (near | {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "gate": gate}).items():
        if other is not None and other.device != q.device:
            raise bad(name, f"a tensor on {q.device} like q", f"one on {other.device}")
    queries, keys = q.shape[2], k.shape[2]
    if cu_seqlens is None:
        for name, given in (("cu_seqlens_k", cu_seqlens_k), ("max_seqlen", max_seqlen), ("max_seqlen_k", max_seqlen_k)):
            if given is not None:
                raise bad("cu_seqlens", f"a tensor when {name} is given", None)
        starts_q = starts_k = None
        batch, max_q, max_k = q.shape[0], queries, keys
        if causal and queries > keys:
            raise bad("causal", "at most as many queries as keys", f"{queries} queries, {keys} keys")
    else:
        for name, given in (("lengths", lengths), ("key_mask", key_mask)):
            if given is not None:
                raise bad(name, "None with cu_seqlens, which says the lengths", "a tensor")
        starts_q, starts_k = _check_packing(cu_seqlens, cu_seqlens_k, q, k, causal)
        batch = starts_q.shape[0] - 1
        max_q = _longest("max_seqlen", max_seqlen, starts_q, queries)
        max_k = _longest("max_seqlen_k", max_seqlen if cu_seqlens_k is None else max_seqlen_k, starts_k, keys)
    if window is not None and window < 1:
        raise bad("window", "at least 1, or None", window)
    one_of("padding", padding, ("right", "left"))
    if lengths is not None:
        _check_counts_of("lengths", lengths, batch, keys)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, keys)):
        raise bad("key_mask", f"bool [{batch}, {keys}]", f"{key_mask.dtype} {list(key_mask.shape)}")
    index = _check_prefix_index(prefix_index, prefix_k, batch)
    if prefix_k is None:
        for name, given in (("prefix_lengths", prefix_lengths), ("gate", gate)):
            if given is not None:
                raise bad("prefix_k", f"a tensor when {name} is given", None)
    elif prefix_lengths is not None:
        _check_counts_of("prefix_lengths", prefix_lengths, prefix_k.shape[0], prefix_k.shape[2])
    if gate is not None:
        if not gate.is_floating_point():
            raise TypeError(f"gate: expected a floating point dtype, got {gate.dtype}")
        if gate.dim() != 2 or gate.shape[0] not in (1, batch) or gate.shape[1] not in (1, q.shape[1]):
            raise bad("gate", f"[1 or {batch}, 1 or {q.shape[1]}]", list(gate.shape))
    if separate and (gate is None or return_lse):
        raise bad("separate", "a gate, and no return_lse", f"gate={'a tensor' if gate is not None else None}, {return_lse=}")
    if not 0 <= dropout < 1:
        raise bad("dropout", "a number from 0 to less than 1", dropout)
    if softcap is not None and not softcap > 0:
        raise bad("softcap", "a positive number, or None", softcap)

    if dropout and prefix_k is not None and prefix_v is not None:
        if seed is None:
            seed = torch.randint(2**62, (), device=q.device)
        if not dropout_shared:
            prefix_k, prefix_v, index, prefix_lengths = _one_prefix_a_sample(prefix_k, prefix_v, index, prefix_lengths, batch)
        prefix_k = prefix_k * _kept_elements(prefix_k, dropout, seed, 0)
        prefix_v = prefix_v * _kept_elements(prefix_v, dropout, seed, 1)
    s = ops.Settings(
        max_q, max_k, window or 0, bool(causal), padding == "left", path == "triton",
        q.shape[3] ** -0.5 if scale is None else float(scale), softcap or 0.0,
    )  # fmt: skip
    own = (lengths, key_mask, starts_q, starts_k)
    if not separate:
        out, lse = _attend(q, k, v, prefix_k, prefix_v, index, prefix_lengths, *own, gate, s, path, impl, return_lse)
        return (out, lse) if return_lse else out
    assert gate is not None
    out, _ = _attend(q, k, v, None, None, None, None, *own, None, s, path, impl)
    alone = s._replace(max_k=0, window=0, causal=False)
    nothing = None if starts_k is None else torch.zeros_like(starts_k)
    theirs, _ = _attend(
        q, k[:, :, :0], v[:, :, :0], prefix_k, prefix_v, index, prefix_lengths, None, None, starts_q, nothing, None, alone,
        path, impl,
    )  # fmt: skip
    if starts_q is None:
        factor = gate[:, :, None, None]
    else:  # one row a token: that of its sequence
        sequence = torch.bucketize(torch.arange(queries, device=q.device), starts_q[1:], right=True)
        factor = gate.expand(batch, -1)[sequence].T[None, :, :, None]
    return (out + factor * theirs).to(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, index: Tensor | None,
    prefix_lengths: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, starts_q: Tensor | None,
    starts_k: Tensor | None, gate: Tensor | None, s: ops.Settings, path: str, impl: str, through_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax, on the chosen path; PyTorch's flash attention on a CPU has no soft cap."""
    others = (index, prefix_lengths, lengths, key_mask, starts_q, gate)
    if _runtime.watch is not None:
        _tell(q, k, prefix_k, others, s, path, impl)
    alone = all(t is None for t in others) and not (s.window or s.softcap or through_lse)
    if path == "auto" and alone and prefix_k is not None and prefix_v is not None:
        out = ops.joined(q, k, v, prefix_k, prefix_v, s.causal, s.scale)
        if out is not None:
            return out, out
    if path == "triton" or (path == "auto" and not (s.softcap and q.device.type == "cpu")):
        return ops.PrefixAttention.apply(
            q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, starts_q, starts_k, gate, s, through_lse
        )
    how: tuple[Any, ...] = (s.scale, s.causal, s.window, s.left, s.softcap)
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        if starts_q is None or starts_k is None:
            return reference.prefix_attention(q, k, v, prefix_k, prefix_v, index, prefix_lengths, lengths, key_mask, gate, *how)
        results = []
        for i, (own_q, own_k) in enumerate(ops.sequences(starts_q, starts_k)):
            pk, pv, size = ops.rows_of(i, index is None, prefix_k, prefix_v, prefix_lengths)
            chosen, factor = ops.rows_of(i, True, index, gate)
            own = (q[:, :, own_q], k[:, :, own_k], v[:, :, own_k])
            results.append(reference.prefix_attention(*own, pk, pv, chosen, size, None, None, factor, *how))
        outs, logs = zip(*results, strict=True)
        return torch.cat(outs, 2), torch.cat(logs, 2)


def _tell(
    q: Tensor, k: Tensor, prefix_k: Tensor | None, others: tuple[Tensor | None, ...], s: ops.Settings, path: str, impl: str
) -> None:  # fmt: skip
    rows = 0 if prefix_k is None else prefix_k.shape[2]
    own = k.shape[2] - (min(q.shape[2], k.shape[2]) - 1) / 2 if s.causal else k.shape[2]
    form, why = "flash attention of prefix and keys, merged", ""
    if prefix_k is None:
        form = "flash attention, no prefix"
    elif path == "auto" and ops._joins(q, k, prefix_k, others, s):
        form, why = "attention on [prefix | keys]", "copying the prefix costs less than merging at this size"
    if path == "auto" and s.softcap and q.is_cpu:
        path, why = "torch", "PyTorch's flash attention on a CPU has no soft cap"
    moved = 2 * q.nbytes + 2 * k.nbytes + (0 if prefix_k is None else 2 * prefix_k.nbytes)
    flops = 4 * q.numel() * (own + rows)
    tell("prefix_attention", impl, path, q, k, prefix_k, how=form, why=why, moved=moved, flops=int(flops))


def _check_heads(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The five tensors in autocast's dtype, after all that their shapes, dtypes and devices can do wrong."""
    if (prefix_k is None) != (prefix_v is None):
        raise bad("prefix_k, prefix_v", "both or neither", f"only prefix_{'k' if prefix_v is None else 'v'}")
    given = {"q": q, "k": k, "v": v}
    if prefix_k is not None and prefix_v is not None:
        given |= {"prefix_k": prefix_k, "prefix_v": prefix_v}
    amp = autocast_dtype(q)
    for name, t in given.items():
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {t.dtype}")
        if t.dim() != 4:
            raise bad(name, "4 dimensions [batch, heads, length, D]", f"{t.dim()} dimensions {list(t.shape)}")
        if t.device != q.device:
            raise bad(name, f"a tensor on {q.device} like q", f"one on {t.device}")
        if amp is not None and t.dtype != torch.float64:
            given[name] = t = t.to(amp)
        if t.dtype != given["q"].dtype:
            raise bad(name, f"{given['q'].dtype} like q", t.dtype)
        if t.shape[3] != q.shape[3]:
            raise bad(name, f"heads of {q.shape[3]} elements like q", t.shape[3])
    if v.shape != k.shape:
        raise bad("v", f"the shape of k, {list(k.shape)}", list(v.shape))
    if k.shape[0] != q.shape[0]:
        raise bad("k", f"{q.shape[0]} samples like q", k.shape[0])
    heads, key_heads = q.shape[1], k.shape[1]
    if key_heads < 1 or heads < 1 or heads % key_heads:
        raise bad("q", f"a multiple of the {key_heads} heads of k", f"{heads} heads")
    if q.shape[3] < 1:
        raise bad("q", "heads of at least 1 element", 0)
    if prefix_k is not None and prefix_v is not None:
        if prefix_v.shape != prefix_k.shape:
            raise bad("prefix_v", f"the shape of prefix_k, {list(prefix_k.shape)}", list(prefix_v.shape))
        if prefix_k.shape[1] != key_heads:
            raise bad("prefix_k", f"{key_heads} heads like k", prefix_k.shape[1])
    return given["q"], given["k"], given["v"], given.get("prefix_k"), given.get("prefix_v")


def _check_packing(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the packed sequences start, as int64: of the queries and of the keys."""
    if q.shape[0] != 1:
        raise bad("q", "[1, H, total length, D] with cu_seqlens", list(q.shape))
    both = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens if cu_seqlens_k is None else cu_seqlens_k}
    for name, starts in both.items():
        if starts.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {starts.dtype}")
        if starts.dim() != 1 or starts.shape[0] < 2 or starts.shape != cu_seqlens.shape:
            raise bad(name, "[n + 1] for at least one sequence, as many for queries as for keys", list(starts.shape))
    if cu_seqlens_k is None and q.shape[2] != k.shape[2]:
        raise bad("cu_seqlens_k", "a tensor for keys of another total length", f"{q.shape[2]} queries, {k.shape[2]} keys")
    starts_q, starts_k = (starts.to(torch.int64) for starts in both.values())
    if looks_at_values(cu_seqlens):
        for name, starts, total in (("cu_seqlens", starts_q, q.shape[2]), ("cu_seqlens_k", starts_k, k.shape[2])):
            values = starts.tolist()
            if values[0] != 0 or values[-1] != total or values != sorted(values):
                raise bad(name, f"rising values from 0 to {total}", values[:8] if len(values) <= 8 else [*values[:8], "..."])
        if causal and bool((starts_q.diff() > starts_k.diff()).any()):
            raise bad("causal", "at most as many queries as keys in each sequence", "a sequence with more")
    return starts_q, starts_k


def _longest(argument: str, given: int | None, starts: Tensor, total: int) -> int:
    look = looks_at_values(starts)
    longest = int(starts.diff().max()) if look else total
    if given is not None and (given < longest if look else given < 0):
        raise bad(argument, f"at least the longest sequence, {longest}" if look else "at least 0", given)
    return longest if given is None else given


def _check_counts_of(argument: str, lengths: Tensor, count: int, longest: int) -> None:
    if lengths.dtype != torch.int64 or lengths.shape != (count,):
        raise bad(argument, f"int64 [{count}]", f"{lengths.dtype} {list(lengths.shape)}")
    check_range(argument, lengths, longest + 1)


def _check_prefix_index(index: Tensor | None, prefix: Tensor | None, batch: int) -> Tensor | None:
    """The index as [B, M]."""
    if prefix is None:
        if index is not None:
            raise bad("prefix_k", "a tensor when prefix_index is given", None)
        return None
    if index is None:
        if prefix.shape[0] not in (1, batch):
            raise bad("prefix_k", f"1 or {batch} prefixes without a prefix_index", f"{prefix.shape[0]} prefixes")
        return None
    if index.dtype != torch.int64 or index.dim() not in (1, 2) or index.shape[0] != batch:
        raise bad("prefix_index", f"int64 [{batch}] or [{batch}, M]", f"{index.dtype} {list(index.shape)}")
    if prefix.shape[0] < 1:
        raise bad("prefix_k", "at least one prefix", list(prefix.shape))
    check_range("prefix_index", index.flatten(), prefix.shape[0], ignored=-1)
    return index[:, None] if index.dim() == 1 else index


def _one_prefix_a_sample(
    prefix_k: Tensor, prefix_v: Tensor, index: Tensor | None, prefix_lengths: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The prefixes once for every sample that reads them, so that each can be another draw."""
    if index is None:
        if prefix_k.shape[0] == batch:
            return prefix_k, prefix_v, None, prefix_lengths
        lengths = None if prefix_lengths is None else prefix_lengths.expand(batch)
        return prefix_k.expand(batch, -1, -1, -1), prefix_v.expand(batch, -1, -1, -1), None, lengths
    count, flat = prefix_k.shape[0], index.flatten()
    chosen = flat.clamp(0, count - 1)
    # -1 stays none, and what is out of range stays out of range.
    own = torch.arange(len(flat), device=flat.device)
    own = torch.where(flat < 0, flat, torch.where(flat < count, own, len(flat)))
    lengths = None if prefix_lengths is None else prefix_lengths[chosen]
    return prefix_k[chosen], prefix_v[chosen], own.view(index.shape), lengths


def _kept_elements(prefix: Tensor, dropout: float, seed: int | Tensor, stream: int) -> Tensor:
    """0 or 1 / (1 - dropout) for each element: a hash of the seed and the element's place, so the same on every device."""
    place = torch.arange(prefix.numel(), device=prefix.device).view(prefix.shape)
    # Not a sum: Inductor would multiply its terms by _mix's constants ahead of time, beyond 64 bits.
    mixed = _mix(_mix(2 * place | stream) + seed)
    kept = (mixed & 0xFFFFFF) >= round(dropout * 2**24)
    return kept.to(prefix.dtype) * (1 / (1 - dropout))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195) on int64, which wraps around."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
