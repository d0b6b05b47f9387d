"""Counting labels on a CPU, and matching them: on the host, once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.reference import mapping as reference

# ---- Counting ----


def count_on_host(counts: Tensor, logits: Tensor, target: Tensor, k: int | None) -> None:
    """`reference.count_labels_` of tensors on a CPU, by NumPy."""
    labels, classes = target.numpy(), counts.shape[1]
    known = (labels >= 0) & (labels < classes)
    logits = logits.detach().float()
    amount: Any = 1
    if k is None:
        # NumPy's arg-max has the same rules as PyTorch's and is several times faster on a core.
        cells = (logits.numpy().argmax(1) * classes + labels)[known]
    else:
        rows = max(1, _CACHED // logits.shape[1])
        at, share = (torch.cat(part) for part in zip(*(_shares(x, k) for x in logits.split(rows)), strict=True))
        cells = (at.numpy() * classes + labels[:, None])[known]
        amount = share.numpy()[known]
    np.add.at(counts.view(-1).numpy(), cells, amount)


_CACHED = 1 << 18  # scores that stay in the cache while their softmax and their largest are taken
_FEW_LARGEST = 12  # arg-maxima, each as fast as memory, beat a selection


def _shares(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The places of the k largest of every row, the first of equals, and their softmax in fixed point."""
    p = x.softmax(1)
    if k <= _FEW_LARGEST:
        found, left, rows = np.empty((len(x), k), np.int64), x.numpy().copy(), np.arange(len(x))
        gone = np.empty((len(x), k), bool)
        for j in range(k):
            found[:, j] = left.argmax(1)
            at = rows, found[:, j]
            gone[:, j] = left[at] == -np.inf  # taken before, or a share of 0
            left[at] = -np.inf
        places = torch.from_numpy(found)
        share = p.gather(1, places).masked_fill_(torch.from_numpy(gone), 0.0)
    else:
        values, places = x.topk(k, 1)
        # Rows in which torch.topk had a choice that it does not promise to make in the same way
        tied = np.flatnonzero(np.count_nonzero(x.numpy() >= values[:, -1:].numpy(), axis=1) != k)
        if len(tied):
            places[tied] = x[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        share = p.gather(1, places)
    return places, (share.double() * reference.COUNT_UNIT).nan_to_num_(0.0).round_().long()


# ---- Matching ----


def match_labels(counts: Tensor) -> Tensor:
    """What `reference.match_labels` gives, bit for bit, from a sort of the cells that matter.

    Striking a row and a column never changes the order of the other cells, so walking once through all cells by falling
    count, then by position, meets the same maxima. First the cells that are not below every class's largest, which are few
    and mostly enough; then the same for the classes still open, with a bound that falls faster. Only those cells leave a GPU.
    """
    sources, targets = counts.shape
    if counts.is_cpu and counts.numel() * targets <= _FEW_CELLS:
        return _match_few(counts.numpy().copy())
    index, free, columns = np.full(targets, -1, dtype=np.int64), np.ones(sources, dtype=bool), np.arange(targets)
    rest, low, turn = counts, 2, 0
    while low > 1 and len(columns):
        top = _largest_of_columns(rest)
        if turn == 0 and (top < 0).any():
            raise ValueError(f"counts: expected no negative numbers, got {int(counts.min())}")
        low = max(1, int(top.min(where=top > 0, initial=top.max())) >> 2 * turn)
        _walk(rest, columns, low, index, free)
        columns = np.flatnonzero(index < 0)
        if counts.is_cpu:
            rest = torch.from_numpy(counts.numpy().take(columns, 1))
        else:
            rest = counts.index_select(1, torch.from_numpy(columns).to(counts.device))
        rest[torch.from_numpy(index[index >= 0]).to(counts.device)] = 0
        turn += 1
    # Only zeros are left: the first one is the lowest free source with the lowest open target.
    index[columns] = np.flatnonzero(free)[: len(columns)]
    return torch.from_numpy(index).to(counts.device)


_FEW_CELLS = 1 << 18  # cells that all maxima together look at


def _match_few(left: np.ndarray) -> Tensor:
    """`reference.match_labels`, where that costs less than to sort."""
    targets = left.shape[1]
    if left.size and (low := left.min()) < 0:
        raise ValueError(f"counts: expected no negative numbers, got {low}")
    index = np.empty(targets, dtype=np.int64)
    for _ in range(targets):
        source, target = divmod(int(left.argmax()), targets)
        index[target], left[source], left[:, target] = source, -1, -1
    return torch.from_numpy(index)


def _largest_of_columns(counts: Tensor) -> np.ndarray:
    """The largest of every column, or a negative number that stands in it."""
    if not counts.is_cpu:
        low, top = torch.stack(counts.aminmax(dim=0)).cpu().numpy()
        return np.where(low < 0, low, top)
    sources, targets = counts.shape
    rows = max(1, 1024 // targets)  # short ones are read several at a time
    whole = sources - sources % rows
    cells = counts.numpy().view(np.uint64)  # read as unsigned numbers, negative ones are the largest
    top = cells[:whole].reshape(-1, rows * targets).max(0, initial=0).reshape(rows, targets).max(0)
    return np.maximum(top, cells[whole:].max(0, initial=0)).view(np.int64)


def _walk(counts: Tensor, columns: np.ndarray, low: int, index: np.ndarray, free: np.ndarray) -> None:
    """Gives free sources to open targets by the cells from `low` on, the largest first; counts [S, columns]."""
    flat = counts.reshape(-1)
    if flat.is_cpu:
        cells = np.flatnonzero(flat.numpy() >= low)  # NumPy's comparison and search are the fastest on a CPU
        values = flat.numpy()[cells]
    else:
        found = (flat >= low).nonzero()[:, 0]
        cells, values = found.cpu().numpy(), flat[found].cpu().numpy()
    fall = values.max(initial=0) - values
    if len(fall) and fall.max() < 1 << 16:
        fall = fall.astype(np.uint16)  # NumPy sorts them by their digits
    cells = cells[np.argsort(fall, kind="stable")]
    start, step, left = 0, 4 * len(columns), len(columns)
    while start < len(cells) and left:
        source, place = np.divmod(cells[start : start + step], len(columns))
        target = columns[place]
        alive = free[source] & (index[target] < 0)
        given: set[int] = set()
        taken: dict[int, int] = {}
        for s, t in zip(source[alive].tolist(), target[alive].tolist(), strict=True):  # the few that are left
            if s not in given and t not in taken:
                given.add(s)
                taken[t] = s
        index[list(taken)], free[list(given)] = list(taken.values()), False
        start, step, left = start + step, 4 * step, left - len(taken)


def match_optimally(counts: Tensor) -> Tensor:
    """The one-to-one map with the largest sum of counts (Hungarian method)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RuntimeError("optimal=True needs SciPy: pip install scipy") from None
    source, target = linear_sum_assignment(counts.cpu().numpy(), maximize=True)
    index = np.empty(counts.shape[1], dtype=np.int64)
    index[target] = source
    return torch.from_numpy(index).to(counts.device)
