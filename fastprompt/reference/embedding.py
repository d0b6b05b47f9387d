"""One gather from two tables, in plain PyTorch: the frozen vocabulary and the soft tokens."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = -(2**31)
"""The id of no token: its row is 0."""


def soft_gather(
    ids: Tensor, vocab: Tensor, soft: Tensor, index: Tensor | None, lengths: Tensor | None, positions: Tensor | None,
    scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out[b, t] = scale * row + positions[t]: [B, T], [V, d], [N, P, d], [B], [N], [T or more, d] -> [B, T, d].

    row is vocab[id] for an id from 0 on, soft[n, j] for the id -(j + 1), n = index[b] (without an index 0, or b when there
    are several prompts). A row of 0 where there is no token: PADDING, a sample with index -1, a slot j >= lengths[n]. NaN,
    and no gradient, for any other id or index.
    """
    prompts, slots, width = soft.shape
    inner = torch.promote_types(torch.promote_types(vocab.dtype, soft.dtype), torch.promote_types(dtype, torch.float32))
    own = torch.arange(len(ids), device=ids.device) * (prompts > 1)
    n = (own if index is None else index)[:, None].expand_as(ids)
    slot = -1 - ids
    is_word = (ids >= 0) & (ids < len(vocab))
    is_slot = (ids < 0) & (slot < slots)
    chosen = is_slot & (n >= 0) & (n < prompts)
    is_soft = chosen if lengths is None else chosen & (slot < lengths[torch.where(chosen, n, 0)])
    is_nothing = (ids == PADDING) | (is_slot & (n == -1)) | (chosen & ~is_soft)

    table = torch.nn.functional.pad(soft.to(inner).reshape(-1, width), (0, 0, 0, 1))  # a row for all that read none
    soft_rows = table.index_select(0, torch.where(is_soft, n * slots + slot, prompts * slots).reshape(-1))
    words = vocab[torch.where(is_word, ids, 0)].to(inner)
    rows = torch.where(is_soft[..., None], soft_rows.view(words.shape), words)
    out = scale * rows
    if positions is not None:
        out = out + positions[: ids.shape[1]].to(inner)
    out = torch.where(is_nothing[..., None], 0, out)
    return torch.where((is_word | is_soft | is_nothing)[..., None], out, torch.nan).to(dtype)
