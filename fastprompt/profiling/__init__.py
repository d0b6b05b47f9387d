"""Where a reprogramming step's time goes: `fastprompt.profile` and `fastprompt profile script.py`.

A step is one call of `step_fn`; in a script or a `with` block it ends with an optimizer's step or, where nothing is trained,
when the outermost reprogrammed model (a `Reprogrammed`, a model with a prompt attached, `frozen`) is called again.

Steps are timed as they are, in turns with the bare frozen model on the same inputs. Then a few run under `torch.profiler`, with
ranges around this package's functions and modules. The ranges are hooks and wrappers that exist for those steps alone: without
a profile there is nothing to pay.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from fastprompt.profiling.results import Op, Part, Profile
from fastprompt.profiling.session import Session, TooFewSteps

__all__ = ["Op", "Part", "Profile", "TooFewSteps", "profile", "run_script"]


@overload
def profile(
    step_fn: Callable[[], Any], *, samples: float | None = ..., tokens: float | None = ..., steps: int = ..., warmup: int = ...,
    frozen: Any = ..., out: str | Path | None = ...,
) -> Profile: ...  # fmt: skip
@overload
def profile(
    step_fn: None = ..., *, samples: float | None = ..., tokens: float | None = ..., steps: int = ..., warmup: int = ...,
    frozen: Any = ..., out: str | Path | None = ...,
) -> Session: ...  # fmt: skip
def profile(
    step_fn: Callable[[], Any] | None = None, *, samples: float | None = None, tokens: float | None = None, steps: int = 20,
    warmup: int = 3, frozen: Any = None, out: str | Path | None = None,
) -> Profile | Session:  # fmt: skip
    """Measures a step of training or inference, prints a page on where its time goes and what to change, and returns it.

        result = fastprompt.profile(step)               # calls step() 29 times
        with fastprompt.profile() as watched: ...       # your own loop of at least 29 steps; then watched.result

    The overhead is the step over the bare frozen model on the same inputs, timed in turns: forward, and in training backward
    to its input (with an attached prompt to its first block). Shares come from three steps under torch.profiler.

    Args:
        step_fn: does one step. In a `with` block a step ends with `optimizer.step()` of the first optimizer, or where nothing
            is trained when the outermost reprogrammed model is called again.
        samples, tokens: of a step. Default: the batch of what reprogrammed models are called with, its token ids.
        steps: that are timed. warmup: before that; the last of them is looked at. Six more are traced.
        frozen: the frozen nn.Module, or a function that runs it as the step does; for models that neither `Reprogrammed` nor
            `attach` knows.
        out: a folder for trace.json (Perfetto), report.md and its picture.

    Raises:
        ValueError, TypeError: what was expected and what came. TooFewSteps (a RuntimeError).
    """
    if step_fn is None:
        return Session(samples, tokens, steps, warmup, frozen, out)
    if not callable(step_fn):
        raise TypeError(f"step_fn: expected a function without arguments, got {type(step_fn).__name__}")
    with Session(samples, tokens, steps, warmup, frozen, out, hooked=False) as session:
        while session.advance():
            step_fn()
    return session.result


def run_script(path: str, arguments: Sequence[str] = (), **options: Any) -> Profile:
    """Runs a script as `python path arguments` does, and stops it when its training steps are measured.

    options: those of `profile`.
    """
    defaults: dict[str, Any] = {"samples": None, "tokens": None, "steps": 20, "warmup": 3, "frozen": None, "out": None}
    session = Session(**(defaults | options), stop=True)
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [path, *arguments], [str(Path(path).resolve().parent)]
    try:
        with session:
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
    finally:
        sys.argv, sys.path[:] = before
    return session.result
