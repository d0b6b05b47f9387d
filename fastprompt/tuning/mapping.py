"""Launch configurations of the mapping kernels."""

from __future__ import annotations

from dataclasses import dataclass

from fastprompt.tuning import _measured


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


@dataclass(frozen=True)
class Elements:
    """Of a tile of segments, and its warps. `pick_segments` shares them out between samples, classes and entries."""

    ELEMENTS: int
    num_warps: int


# The widest tile of each kernel: what is compiled ahead of time in the tests.
# Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, Launch] = {
    "forward": Launch(8, 128, 4),
    "gradient": Launch(8, 128, 4),
    "count": Launch(1, 1024, 4),
    "count largest": Launch(1, 2048, 4),
}

SEGMENTS: dict[str, Elements] = {"segments forward": Elements(1024, 4), "segments gradient": Elements(1024, 4)}
ALONE = 32768  # entries of all samples up to which one program does the whole batch, its mean included
PROGRAMS = 528  # 4 for each multiprocessor of an H200: fewer are made smaller


def launches(arch: str) -> dict[str, Launch | Elements]:
    """`CONFIGS` and `SEGMENTS`, or what was measured on this machine's GPU."""
    return _measured.table("mapping", arch, lambda arch: {**CONFIGS, **SEGMENTS})


def pick(kernel: str, columns: int, arch: str) -> Launch:
    """The configuration for a kernel of `CONFIGS` over so many columns: few columns, more rows."""
    best = launches(arch)[kernel]
    assert isinstance(best, Launch)
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
    best = launches(arch)[f"segments {kernel}"]
    assert isinstance(best, Elements)
    elements, warps, turns = best.ELEMENTS, best.num_warps, 1
    if kernel == "gradient":
        columns = min(elements, _power(sources))
        rows = elements // columns
        turns = max(1, min(16, batch // (rows * PROGRAMS)))
        return Tile(rows, max(1, min(128, _power(classes))), 1, columns, warps, turns)
    across = min(elements if loss else 256, _power(classes))
    each = min(_power(longest), elements // across)
    rows = max(1, elements // (across * each))
    if probabilities:
        rows = min(rows, 8)  # whole rows are read, a wide piece of each at a time
    alone = loss and not probabilities and batch * _power(classes) * _power(longest) <= ALONE
    if alone:
        rows, warps = 4 * rows, min(16, 4 * warps)
        turns = max(1, -(-batch // rows))
    while not alone and each > 4 and rows < 8 and batch // (2 * rows) >= PROGRAMS:
        each, rows = each // 2, rows * 2
    return Tile(rows, across, each, min(_power(sources), 2 * elements // min(rows, 8)), warps, turns)


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
