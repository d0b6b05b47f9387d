"""Launch configurations of the mapping kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel launch: a program owns a tile of ROWS samples and COLUMNS classes."""

    ROWS: int
    COLUMNS: int
    num_warps: int

    @property
    def TILE(self) -> int:
        return self.ROWS * self.COLUMNS


@dataclass(frozen=True)
class Tile:
    """One launch of the kernels for segments: a program owns `turns` times ROWS samples.

    Forward: CLASSES at a time by ENTRIES of each at a time; COLUMNS sources at a time where whole rows are summed.
    Backward: COLUMNS sources of the gradient; CLASSES at a time where what arrives at a row is summed.
    """

    ROWS: int
    CLASSES: int
    ENTRIES: int
    COLUMNS: int
    num_warps: int
    turns: int = 1


# The widest tile of each kernel: what is compiled ahead of time in the tests.
# Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, Launch] = {
    "forward": Launch(8, 128, 4),
    "gradient": Launch(8, 128, 4),
    "count": Launch(1, 1024, 4),
    "count largest": Launch(1, 2048, 4),
}

ELEMENTS = 1024  # of a tile of segments, for 4 warps
ALONE = 32768  # entries of all samples up to which one program does the whole batch, its mean included
PROGRAMS = 528  # 4 for each multiprocessor of an H200: fewer are made smaller


def pick(kernel: str, columns: int, arch: str) -> Launch:
    """The configuration for a kernel of `CONFIGS` over so many columns: few columns, more rows."""
    best = CONFIGS[kernel]
    width = min(best.COLUMNS, _power(columns))
    return Launch(best.TILE // width, width, best.num_warps)


def pick_segments(
    kernel: str, *, batch: int, sources: int, classes: int, longest: int, probabilities: bool, loss: bool, arch: str
) -> Tile:
    """The tile for segments, "forward" or "gradient". `longest`: the most entries that are read of a class.

    Forward: all classes in one tile where they fit, since a loss needs all of them. Long lists are cut into more rows a
    tile, which share the reading of the map, unless there would be too few programs to hide what a turn waits for. A tile
    depends on the batch in few steps, so that new batch sizes compile nothing.
    """
    if kernel == "gradient":
        columns = min(ELEMENTS, _power(sources))
        rows = ELEMENTS // columns
        turns = max(1, min(16, batch // (rows * PROGRAMS)))
        return Tile(rows, max(1, min(128, _power(classes))), 1, columns, 4, turns)
    across = min(ELEMENTS if loss else 256, _power(classes))
    each = min(_power(longest), ELEMENTS // across)
    rows, warps, turns = max(1, ELEMENTS // (across * each)), 4, 1
    if probabilities:
        rows = min(rows, 8)  # whole rows are read, a wide piece of each at a time
    elif loss and batch * _power(classes) * _power(longest) <= ALONE:
        rows, warps = 4 * rows, 16
        turns = max(1, -(-batch // rows))
    if warps == 4:
        while each > 4 and rows < 8 and batch // (2 * rows) >= PROGRAMS:
            each, rows = each // 2, rows * 2
    return Tile(rows, across, each, min(_power(sources), 2 * ELEMENTS // min(rows, 8)), warps, turns)


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
