"""Launch configurations of the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastprompt.tuning import _measured


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
    the prefix. (Forward: own and prefix are not used.)
    splits: backward: the chunks of queries that the prefix's gradient is summed from; forward: the shares of the columns
    that a query's result is merged from. apart: forward: the shares of the prefix's columns when the queries of the whole
    batch read the prefix once; 0: each sample reads it in front of its own keys.
    """

    query: Tile
    own: Tile
    prefix: Tile
    splits: int = 1
    apart: int = 0


Tiles = tuple[Tile, Tile, Tile, Tile]

# (forward, gradient of the queries, of own keys, of the prefix) by the bytes of an element and the padded head width.
# Not yet measured on a GPU: chosen so that no target spills and a stage of loads fits beside the one that is computed.
PORTABLE: dict[tuple[int, int], Tiles] = {
    (2, 64): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
    (2, 128): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
    (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 64): (Tile(32, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 128): (Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
# The products of sm_90 read their operands from shared memory, which leaves registers for larger tiles.
HOPPER: dict[tuple[int, int], Tiles] = {
    **PORTABLE,
    (2, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    (2, 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}
PROGRAMS = 264  # two for each of the 132 processors of an H200
MOST_SPLITS = 64
FEW = 16  # queries, or rows (queries x heads of a key head)
APART_FROM = 512  # prefix rows from which few queries read a shared prefix once


KERNELS = ("forward", "query", "own", "prefix")


def launches(arch: str) -> dict[tuple[str, int, int], Tile]:
    """The tile of (kernel, bytes of an element, padded head width), or what was measured on this machine's GPU."""
    return _measured.table("attention", arch, _tiles)


def _tiles(arch: str) -> dict[tuple[str, int, int], Tile]:
    tables = HOPPER if arch == "sm_90" else PORTABLE
    return {(kernel, *key): tile for key, tiles in tables.items() for kernel, tile in zip(KERNELS, tiles, strict=True)}


def pick(
    direction: str, *, batch: int, heads: int, kv_heads: int, queries: int, keys: int, prefixes: int, prefix_rows: int,
    stack: int, width: int, dtype: torch.dtype, arch: str, gated: bool,
) -> Launch:  # fmt: skip
    """The launch of a call: direction "forward" or "backward"; prefixes N of prefix_rows P, stack M of them side by side.

    Few rows take a tile of 16; a gate, and prefixes side by side, need registers and take smaller ones. Few queries
    share out long columns, and the prefix's gradient shares out the queries, until every processor has two programs.
    """
    rows = queries * heads // kv_heads
    size = 2 if dtype.itemsize == 2 else 4
    table, padded = launches(arch), next(w for w in (64, 128, 256) if width <= w or w == 256)
    forward, query, own, prefix = (table[kernel, size, padded] for kernel in KERNELS)
    query = forward if direction == "forward" else query
    if gated or stack > 1:
        query = replace(query, ROWS=min(query.ROWS, 64), COLUMNS=max(16, query.COLUMNS // 4))
        prefix = replace(prefix, ROWS=min(prefix.ROWS, 32))
    if rows <= FEW:
        halved = direction == "backward" and not (gated or stack > 1)
        query = Tile(16, max(16, query.COLUMNS // 2) if halved else query.COLUMNS, 4, query.num_stages)
    if direction == "forward":
        if queries > FEW:
            return Launch(query, own, prefix)
        apart = 0
        if prefixes == 1 and stack == 1 and batch > 1 and prefix_rows >= APART_FROM:
            apart = _shares(kv_heads * -(-batch * rows // query.ROWS), prefix_rows, query)
        splits = _shares(batch * kv_heads * -(-rows // query.ROWS), keys + (0 if apart else stack * prefix_rows), query)
        return Launch(query, own, prefix, splits, apart)
    programs = prefixes * kv_heads * -(-prefix_rows // prefix.COLUMNS)
    steps = -(-batch * stack * rows // (max(prefixes, 1) * prefix.ROWS))
    splits = max(1, min(-(-PROGRAMS // max(programs, 1)), steps, MOST_SPLITS))
    return Launch(query, own, prefix, splits)


def _shares(programs: int, columns: int, tile: Tile) -> int:
    """Into how many shares columns are split: two programs a processor, and at least four tiles a share."""
    return max(1, min(-(-PROGRAMS // max(programs, 1)), columns // (4 * tile.COLUMNS), MOST_SPLITS))
