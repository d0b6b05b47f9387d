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


# The widest tile of each kernel: what is compiled ahead of time in the tests.
# Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, Launch] = {
    "forward": Launch(8, 128, 4),
    "gradient": Launch(8, 128, 4),
    "count": Launch(1, 1024, 4),
}


def pick(kernel: str, columns: int, arch: str) -> Launch:
    """The configuration for a kernel ("forward", "gradient", "count") over so many columns: few columns, more rows."""
    best = CONFIGS[kernel]
    width = min(best.COLUMNS, 1 << max(columns - 1, 0).bit_length())
    return Launch(best.TILE // width, width, best.num_warps)
