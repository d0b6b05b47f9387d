"""What a profile says: its parts and its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

DATA, PERTURBATION, PROMPTS = "data", "perturbation", "prompts"
FROZEN, MAPPING, OPTIMIZER, HOST = "frozen model", "mapping and loss", "optimizer", "host"
PARTS = (DATA, PERTURBATION, PROMPTS, FROZEN, MAPPING, OPTIMIZER, HOST)


@dataclass
class Part:
    """Milliseconds of a step, and what of its memory is this part's at the peak (bytes)."""

    forward: float = 0.0
    backward: float = 0.0
    memory: int = 0


@dataclass
class Op:
    """An operator's calls of one step on one path. milliseconds: forward; moved: bytes; flops: of the forward pass."""

    name: str
    path: str
    why: str
    calls: float = 0.0
    milliseconds: float = 0.0
    moved: float = 0.0
    flops: float = 0.0


@dataclass
class Profile:
    """A profile's numbers; `print` shows them as a page.

    Attributes:
        kind: "training" or "inference". device: of the frozen model.
        steps: timed steps. samples, tokens: of a step; None where nobody said and none could be seen.
        step, p20, p80: milliseconds of a step without the profiler. frozen: of the bare frozen model on the same inputs.
        overhead: step / frozen; None, with the reason in `no_overhead`, where the frozen model is not known. spread: p20 and
            p80 of that ratio over the pairs of timings that were taken one after the other.
        parts: by name, in milliseconds of `step`: shares of the traced steps times `step`, so they sum to it.
        traced: milliseconds of a step under the profiler.
        operators: PyTorch operators of a step called from outside one. launches, syncs: of a GPU.
        busy: the share of a step in which the GPU works.
        flops: of products and convolutions in a step, as PyTorch counts them, and of attention over prefixes (forward).
        copy, matmul: measured ceilings, bytes read plus written a second and FLOP/s.
        peak: bytes at the highest point of a step, what was there before included; held: what was there before, by what.
        advice: what to change.
    """

    kind: str
    device: str
    steps: int
    step: float
    p20: float
    p80: float
    samples: float | None = None
    tokens: float | None = None
    frozen: float | None = None
    overhead: float | None = None
    spread: tuple[float, float] | None = None
    no_overhead: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    traced: float = 0.0
    operators: float = 0.0
    launches: float | None = None
    syncs: float | None = None
    busy: float | None = None
    flops: float = 0.0
    copy: float = 0.0
    matmul: float = 0.0
    peak: int = 0
    held: dict[str, int] = field(default_factory=dict)
    operations: list[Op] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def samples_per_second(self) -> float | None:
        return None if self.samples is None else 1e3 * self.samples / self.step

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.tokens is None else 1e3 * self.tokens / self.step

    def share(self, part: str) -> float:
        """Of a step."""
        return (self.parts[part].forward + self.parts[part].backward) / self.step

    def __str__(self) -> str:
        from fastprompt.profiling.page import text

        return text(self)
