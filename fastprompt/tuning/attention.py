"""Launch configurations of the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel: a program owns ROWS queries (times the heads that read one key head) and walks over COLUMNS keys at a
    time, or owns COLUMNS keys and walks over ROWS queries at a time."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """What one call launches.

    query: the forward kernel, or the gradients of the queries. own: the gradients of a sample's own keys. prefix: those of
    the prefix, whose queries are split into `splits` chunks. (Forward: own and prefix are not used.)
    """

    query: Tile
    own: Tile
    prefix: Tile
    splits: int = 1


def pick(
    direction: str, *, batch: int, heads: int, kv_heads: int, queries: int, keys: int, prefixes: int, prefix_rows: int,
    stack: int, width: int, dtype: torch.dtype, arch: str,
) -> Launch:  # fmt: skip
    """The launch of a call: direction "forward" or "backward"; prefixes N of prefix_rows P, stack M of them side by side."""
    t = Tile(64, 64, 4, 2)
    return Launch(t, t, t, 1)
