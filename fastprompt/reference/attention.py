"""Attention over a prefix and a sample's own keys in plain PyTorch, differentiable, float32 inside (float64 for float64).

    out = softmax(scale * q [prefix_k | k]^T) [prefix_v | v]        one softmax over the columns that a query sees

Prefix tuning: Li & Liang 2021 (arXiv 2101.00190); P-tuning v2: Liu et al. 2022 (arXiv 2110.07602); VPT-deep: Jia et al. 2022
(arXiv 2203.12119); gate on a prefix: UniPELT, Mao et al. 2022 (arXiv 2110.07577).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    queries: int, keys: int, causal: bool, window: int, lengths: Tensor | None, left: bool, key_mask: Tensor | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """[B or 1, queries, keys] bool: which own key a query sees. The last query lines up with the last key.

    causal: key <= query. window w > 0: query - w < key, and key < query + w when not causal. lengths [B]: the first (left:
    the last) keys of a sample.
    """
    key = torch.arange(keys, device=device)
    ahead = key - (torch.arange(queries, device=device) + keys - queries)[:, None]
    seen = torch.ones((1, queries, keys), dtype=torch.bool, device=device)
    if causal:
        seen = seen & (ahead <= 0)
    if window:
        seen = seen & (ahead > -window) & (ahead < window)
    if lengths is not None:
        seen = seen & ((key >= keys - lengths[:, None]) if left else (key < lengths[:, None]))[:, None]
    return seen if key_mask is None else seen & key_mask[:, None]


def prefix_columns(
    prefix: Tensor, index: Tensor | None, prefix_lengths: Tensor | None, batch: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(each sample's prefixes side by side [B, Hkv, M * P, D], which columns are there [B, M * P]).

    prefix [N, Hkv, P, D]. Without an index: N = 1 is everybody's, N = B is one a sample (M = 1). index [B, M]: the M
    prefixes of each sample; -1: none. A sample with another value out of range is NaN.
    """
    count, length = prefix.shape[0], prefix.shape[2]
    if index is None:
        index = torch.arange(count, device=prefix.device).expand(batch)[:, None]
    known = ((index >= -1) & (index < count)).all(1)
    chosen = prefix[index.clamp(0, count - 1)]  # [B, M, Hkv, P, D]
    columns = torch.where(known[:, None, None, None, None], chosen, torch.nan).transpose(1, 2).flatten(2, 3)
    size = torch.full_like(index, length) if prefix_lengths is None else prefix_lengths[index.clamp(0, count - 1)]
    size = torch.where(index == -1, 0, torch.where(known[:, None], size, length))
    return columns, (torch.arange(length, device=prefix.device) < size[:, :, None]).flatten(1)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, index: Tensor | None,
    prefix_lengths: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, gate: Tensor | None,
    scale: float, causal: bool, window: int, left: bool, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, T, D] in q's dtype, natural log-sum-exp [B, H, T] in float32 or float64).

    q [B, H, T, D]; k, v [B, Hkv, S, D]; prefix_k, prefix_v [N, Hkv, P, D]; index [B, M]; prefix_lengths [N]; lengths [B];
    key_mask [B, S]; gate [1 or B, 1 or H] multiplies the prefix's keys and values. softcap c > 0: c * tanh(score / c). The
    prefix is seen by every query. A row that sees nothing is 0, its log-sum-exp -inf, its gradient 0.
    """
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    query, key, value = q.to(inner), k.to(inner).repeat_interleave(group, 1), v.to(inner).repeat_interleave(group, 1)
    seen = visible(queries, k.shape[2], causal, window, lengths, left, key_mask, q.device).expand(batch, -1, -1)
    if prefix_k is not None and prefix_v is not None:
        ours, there = prefix_columns(prefix_k.to(inner), index, prefix_lengths, batch)
        theirs, _ = prefix_columns(prefix_v.to(inner), index, prefix_lengths, batch)
        if gate is not None:
            factor = gate.to(inner).expand(batch, heads)[:, :, None, None]
        else:
            factor = torch.ones((), dtype=inner, device=q.device)
        key = torch.cat([ours.repeat_interleave(group, 1) * factor, key], 2)
        value = torch.cat([theirs.repeat_interleave(group, 1) * factor, value], 2)
        seen = torch.cat([there[:, None].expand(-1, queries, -1), seen], 2)
    # 0 * NaN is NaN: what nobody in a sample sees must not be touched.
    hidden = ~seen.any(1)[:, None, :, None]
    key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    empty = ~seen.any(-1)[:, None, :, None]
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(~seen[:, None], 0.0)
    return (weights @ value).to(q.dtype), lse
