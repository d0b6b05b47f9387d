"""What this machine offers. No device is asked at import."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules[package] is None: somebody has blocked it on purpose
        return False


HAS_TRITON = _has("triton")
"""Whether the `triton` package can be imported."""

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors. Read once, as Triton does when a kernel is defined."""


@cache
def arch(device: torch.device) -> str:
    """The table key of a device: "cpu", "sm_90", "gfx942", ..."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def checking() -> bool:
    """True when `FASTPROMPT_CHECK=1`: look at values (index ranges) on the GPU too, at the price of a sync."""
    return os.environ.get("FASTPROMPT_CHECK", "0") == "1"


LARGE = 1 << 23
"""Bytes from which a CPU tensor is fresh memory in every call, page by page."""


@cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def in_huge_pages(out: torch.Tensor) -> torch.Tensor:
    """A CPU tensor nobody has written yet, its memory asked for in pages of 2 MB instead of 4 kB.

    The first touch of the 154 MB of 256 images took 17 ms instead of 68. Where the system offers no such pages nothing changes.
    """
    advise = _madvise() if out.nbytes >= LARGE else None
    if advise is not None:
        start, end = -(-out.data_ptr() // 4096) * 4096, (out.data_ptr() + out.nbytes) // 4096 * 4096
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE
    return out


_told: set[str] = set()


def log_choice(op: str, path: str, why: str, tensors: tuple[torch.Tensor | None, ...], moved: int, flops: int) -> None:
    """Logs which path a call took and why, once for equal shapes, dtypes and device."""
    given = [t for t in tensors if t is not None]
    shown = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in given)
    line = f"{op}: {path}, because {why}; {shown} on {given[0].device}"
    if line in _told:
        return
    if len(_told) >= 4096:  # somebody whose every batch has another shape
        _told.clear()
    _told.add(line)
    log = logging.getLogger("fastprompt")
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
    log.info(line)


watch: Callable[[str, str, str, tuple[torch.Tensor | None, ...], int, int], None] | None = None
"""Told of every call of an operator: (operator, path, why, tensors, bytes that must move, FLOPs). None: nobody is, and a call
pays one comparison. `FASTPROMPT_LOG=path`, read once, sets `log_choice`; a profile sets its own."""

if os.environ.get("FASTPROMPT_LOG") == "path":
    watch = log_choice


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation for CUDA tensors: Triton launches on the current device, so that has to be theirs."""
    operator = with_a_cache(operator)

    @wraps(operator)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return operator(first, *rest)
        with torch.cuda.device(first.device):
            return operator(first, *rest)

    return run


def with_a_cache(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Triton cannot compile where it cannot write: a read-only or full cache folder is replaced by a temporary one, once.

    The operator then runs again. It is out of place, or fails before its one launch.
    """

    @wraps(operator)
    def run(*arguments: Any) -> Any:
        try:
            return operator(*arguments)
        except OSError as reason:
            if not _another_cache(reason):
                raise
            return operator(*arguments)

    return run


# What a folder answers in which nothing can be written.
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG}
_temporary: tempfile.TemporaryDirectory[str] | None = None  # removed when Python ends


def _another_cache(reason: OSError) -> bool:
    """Lets Triton compile into a temporary folder; False where that would not help."""
    global _temporary
    if reason.errno not in _UNWRITABLE:
        return False
    if _temporary is not None:  # set by another thread, or of no use either
        return not str(reason.filename).startswith(_temporary.name)
    import triton

    _temporary = tempfile.TemporaryDirectory(prefix="fastprompt-triton-")
    warnings.warn(
        f"Triton cannot write to its cache folder {triton.knobs.cache.dir} ({reason}); kernels of this process are compiled into "
        f"{_temporary.name}. TRITON_CACHE_DIR names a folder that keeps them",
        stacklevel=2,
    )
    triton.knobs.cache.dir = _temporary.name
    return True
