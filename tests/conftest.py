"""What every test gets: kernels that run without a GPU, a device, poison, a skip budget."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = "triton" not in sys.modules and importlib.util.find_spec("triton") is not None

# Triton reads this when a kernel is defined, so it must be set before anything imports triton.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# Small tensors: more threads only wait, and with pytest-xdist every core has a process of its own.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1))

# The skip budget: how a skip's reason may begin, and whether this run may have such skips. Any
# other skip fails the run, because a test that quietly stops running protects nothing.
ALLOWED_SKIPS = {
    "needs a GPU": not HAS_GPU,
    "needs Triton": not HAS_TRITON,
    "needs the interpreter": HAS_GPU or not HAS_TRITON,
    "needs POSIX": os.name != "posix",
    "needs transformers": "CI" not in os.environ,
    "needs peft": "CI" not in os.environ,
    "needs a git checkout": "CI" not in os.environ,
    "needs matplotlib": "CI" not in os.environ,
    "needs timm": True,  # torchvision has no build for a CPU build of torch; test_attach_calls.py says how to run
    "needs a file system to fill": True,  # mounting a tiny one takes root
}


def is_allowed_skip(reason: str) -> bool:
    return any(ok and reason.startswith(start) for start, ok in ALLOWED_SKIPS.items())


def _skip_reasons(config: pytest.Config) -> list[tuple[str, str]]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    return [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in skipped]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    refused = not all(is_allowed_skip(reason) for _, reason in _skip_reasons(session.config))
    if refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for nodeid, reason in _skip_reasons(config):
        verdict = "skip" if is_allowed_skip(reason) else "SKIP OUTSIDE THE BUDGET"
        terminalreporter.write_line(f"{verdict}: {nodeid}: {reason}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def poison():
    """Fill what torch.empty and its kin return with NaN, or the largest integer, in this test."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what switches the fill on
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class _Inside:
    """The interpreter's memory accesses, refused outside the storages of the tensors that the kernel was given."""

    def __init__(self, real):
        self.real, self.storages = real, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def check(self, pointers, mask):
        low, high = int(pointers.min()), int(pointers.max())
        if any(begin <= low and high < end for begin, end in self.storages):
            return
        at = pointers[mask]
        known = sum(((at >= begin) & (at < end) for begin, end in self.storages), start=at < 0)
        if not known.all():
            raise IndexError(f"a kernel touches memory that is not its tensors', {int((~known).sum())} elements")

    def load(self, pointers, mask, *rest):
        self.check(pointers, mask)
        return self.real.load(pointers, mask, *rest)

    def store(self, pointers, value, mask):
        self.check(pointers, mask)
        return self.real.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, *rest):
        self.check(pointers, mask)
        return self.real.atomic_rmw(operation, pointers, value, mask, *rest)


@pytest.fixture(scope="module")
def inside():
    """A kernel without a mask fails its test; else it may read anything, or end the process."""
    if HAS_GPU or not HAS_TRITON:
        yield
        return
    from triton.runtime import interpreter

    watch, run = _Inside(interpreter._interpreter), interpreter.InterpretedFunction.run

    def watched(self, *given, **options):
        storages = [x.untyped_storage() for x in given if isinstance(x, torch.Tensor)]
        watch.storages = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return run(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", watch)
        patch.setattr(interpreter.InterpretedFunction, "run", watched)
        yield
