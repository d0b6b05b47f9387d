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

    Forward: CLASSES at a time by ENTRIES of each at a time; SOURCES at a time where whole rows are summed.
    Backward: SOURCES of the gradient; CLASSES at a time where what arrives at a row is summed.
    """

    ROWS: int
    CLASSES: int
    ENTRIES: int
    SOURCES: int
    num_warps: int
    turns: int = 1


# The widest tile of each kernel: what is compiled ahead of time in the tests.
# Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, Launch] = {
    "forward": Launch(8, 128, 4),
    "gradient": Launch(8, 128, 4),
    "count": Launch(1, 1024, 4),
}

SEGMENT_ELEMENTS = 2048  # of a tile, for 4 warps
ALONE = 32768  # entries of all samples up to which one program does the whole batch, loss and mean included
PROGRAMS = 528  # 4 for each multiprocessor of an H200: fewer are made smaller


def pick(kernel: str, columns: int, arch: str) -> Launch:
    """The configuration for a kernel ("forward", "gradient", "count") over so many columns: few columns, more rows."""
    best = CONFIGS[kernel]
    width = min(best.COLUMNS, _power(columns))
    return Launch(best.TILE // width, width, best.num_warps)


def pick_segments(
    kernel: str, *, batch: int, sources: int, classes: int, longest: int, probabilities: bool, loss: bool, arch: str
) -> Tile:
    """The tile for segments, "forward" or "gradient". `longest`: the most entries that are read of a class.

    Forward: all classes in one tile where they fit, since a loss needs all of them. Long lists are cut into more rows a
    tile, which share the reading of the map, unless there would be too few programs to hide what a turn waits for.
    """
    if kernel == "gradient":
        width = min(1024, _power(sources))
        rows = max(1, SEGMENT_ELEMENTS // width // 2)
        turns = max(1, min(16, batch // (rows * PROGRAMS)))
        return Tile(rows, min(128, _power(classes)), 1, width, 4, turns)
    across = min(1024 if loss else 256, _power(classes))
    each = min(_power(longest), SEGMENT_ELEMENTS // across)
    whole_rows = min(1024, _power(sources)) if probabilities else 1
    work = batch * _power(classes) * _power(longest) + (batch * sources if probabilities else 0)
    if loss and work <= ALONE:
        rows = min(_power(batch), max(1, 2 * SEGMENT_ELEMENTS // max(across * each, whole_rows)))
        return Tile(rows, across, each, whole_rows, 8, -(-batch // rows) or 1)
    rows = max(1, SEGMENT_ELEMENTS // max(across * each, whole_rows))
    while each > 4 and rows < 8 and batch // (2 * rows) >= PROGRAMS:
        each, rows = each // 2, rows * 2
    return Tile(min(rows, _power(batch)), across, each, whole_rows, 4)


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
