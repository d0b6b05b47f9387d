"""Launch configurations of the embedding kernels."""

from __future__ import annotations

from dataclasses import dataclass

from fastprompt.tuning import _measured


@dataclass(frozen=True)
class Launch:
    """One kernel launch: a program owns a tile of ROWS tokens, ids or samples and COLUMNS of the width or slots.

    A batch is cut into chunks until `programs` run, so that few soft tokens of a long batch still fill a GPU. That depends
    on shapes alone, and so do the bits of the sum.
    """

    ROWS: int
    COLUMNS: int
    num_warps: int
    programs: int = 0

    def chunks(self, batch: int, programs: int) -> int:
        """How many parts of a batch are summed apart when one part takes so many programs."""
        return max(1, min(self.programs // programs, batch // self.ROWS))


# The widest tile of each kernel: what is compiled ahead of time in the tests.
# Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, Launch] = {
    "gather": Launch(4, 512, 4),
    "locate": Launch(32, 64, 4),
    "add": Launch(8, 256, 4, programs=528),
    "add chunks": Launch(1, 1024, 4),
}


def launches(arch: str) -> dict[str, Launch]:
    """`CONFIGS`, or what was measured on this machine's GPU."""
    return _measured.table("embedding", arch, lambda arch: CONFIGS)


def pick(kernel: str, columns: int, arch: str) -> Launch:
    """The configuration for a kernel over so many columns: few columns, more rows."""
    best = launches(arch)[kernel]
    width = min(best.COLUMNS, max(16, 1 << max(columns - 1, 0).bit_length()))
    return Launch(best.ROWS * best.COLUMNS // width, width, best.num_warps, best.programs)
