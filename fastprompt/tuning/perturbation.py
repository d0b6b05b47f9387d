"""Launch configurations of the perturbation kernels."""

from __future__ import annotations

from dataclasses import dataclass

from fastprompt.tuning import _measured


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    BLOCK: positions of the canvas a program owns. SAMPLES: samples loaded together, so that several loads are in flight.
    chunk: samples a program walks over with the prompt in registers. SUM_BLOCK: positions a program owns when the partial
    sums of the chunks are added.
    """

    BLOCK: int
    SAMPLES: int
    chunk: int
    num_warps: int
    SUM_BLOCK: int = 256


# Every configuration that `pick` can return, by kernel: what is compiled ahead of time in the tests.
# 8 bf16 a thread is one 16-byte access. Not yet measured on a GPU: chosen from registers and bytes in flight.
CONFIGS: dict[str, tuple[Launch, ...]] = {
    "forward": (Launch(1024, 2, 16, 4), Launch(1024, 1, 1, 4)),
    "prompt_gradient": (Launch(1024, 4, 16, 4), Launch(1024, 1, 16, 4)),
    "cells_gradient": (Launch(1024, 1, 16, 4),),
    "image_gradient": (Launch(1024, 1, 1, 4),),
}


def launches(arch: str) -> dict[str, Launch]:
    """The first configuration of every kernel, or what was measured on this machine's GPU."""
    return _measured.table("perturbation", arch, lambda arch: {kernel: found[0] for kernel, found in CONFIGS.items()})


def pick(kernel: str, batch: int, arch: str, wide: bool = False) -> Launch:
    """The configuration for a kernel ("forward", "prompt_gradient", "cells_gradient", "image_gradient").

    wide: the kernel also holds the image's pixels (it resizes or finds clamped positions again); one sample at a time then
    fits the registers. A small batch takes the same launch as a large one, so that a new batch size compiles nothing. At most
    16 chunks of a batch are summed, so the partial sums stay under 16 prompts' worth of memory.
    """
    few = CONFIGS[kernel][1:]
    best = few[0] if few and wide else launches(arch)[kernel]
    if kernel in ("prompt_gradient", "cells_gradient"):
        chunk = max(best.chunk, -(-batch // 16))
        return Launch(best.BLOCK, best.SAMPLES, chunk, best.num_warps, best.SUM_BLOCK)
    return best
