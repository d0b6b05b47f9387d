"""One-to-one label maps in plain PyTorch: applying, counting, matching.

Random, frequent and iterative label maps (RLM, FLM, ILM): Chen et al. 2023 (arXiv 2211.11635).
"""

from __future__ import annotations

import torch
from torch import Tensor


def map_labels(logits: Tensor, index: Tensor) -> Tensor:
    """out[b, t] = logits[b, index[t]]: [B, S], [T] -> [B, T]. NaN, and no gradient, where index[t] is not a source."""
    known = (index >= 0) & (index < logits.shape[1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # for the gradient: a source may be read twice
    out = wide.index_select(1, index.clamp(0, logits.shape[1] - 1))
    return torch.where(known, out, torch.nan).to(logits.dtype)


def count_labels_(counts: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """counts[s, t] += number of samples b with argmax(logits[b]) = s and target[b] = t; other targets do not count."""
    known = (target >= 0) & (target < counts.shape[1])
    cell = torch.where(known, logits.argmax(1) * counts.shape[1] + target, 0)
    counts.view(-1).scatter_add_(0, cell, known.long())
    return counts


def match_labels(counts: Tensor) -> Tensor:
    """counts [S, T] -> index [T]: T times, take the largest cell (the first of equals), strike its row and column."""
    left, index = counts.clone(), counts.new_empty(counts.shape[1])
    for _ in range(counts.shape[1]):
        source, target = divmod(int(left.argmax()), counts.shape[1])
        index[target] = source
        left[source, :] = -1
        left[:, target] = -1
    return index
