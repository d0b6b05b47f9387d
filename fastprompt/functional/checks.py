"""What every function asks of its arguments, in sentences: the argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt import _runtime

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bad(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def one_of(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise bad(argument, "one of " + ", ".join(choices), repr(value))
    return value


def path_of(impl: str, x: Tensor) -> str:
    """ "torch" (the reference), "auto" or "triton" for an input tensor."""
    one_of("impl", impl, ("auto", "triton", "torch"))
    if impl == "triton":
        if not _runtime.HAS_TRITON:
            raise RuntimeError('impl="triton": Triton is not installed; use impl="auto"')
        if not (x.is_cuda or (x.device.type == "cpu" and _runtime.INTERPRETING)):
            raise bad('impl="triton"', "tensors on a GPU (or TRITON_INTERPRET=1)", f"tensors on {x.device}")
        if x.dtype == torch.float64:
            raise bad('impl="triton"', "an input of at most 32 bits", "float64")
        return impl
    fused = (x.is_cuda and _runtime.HAS_TRITON) or x.device.type == "cpu"
    return "auto" if impl == "auto" and fused and x.dtype != torch.float64 else "torch"


_GIVEN_UP = "plain PyTorch (the reference)"


def tell(
    op: str, impl: str, path: str, *tensors: Tensor | None, how: str = "", why: str = "", moved: int = 0, flops: int = 0
) -> None:  # fmt: skip
    """Tells `_runtime.watch`, which has to be set, what a call does. how: the form on a CPU; why: where the path does not say it.

    moved: the bytes of what is read and written once; flops: where products count.
    """
    if _runtime.watch is None or torch.compiler.is_compiling():
        return
    x = next(t for t in tensors if t is not None)
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    if path == "torch":
        name = _GIVEN_UP
        reason = 'impl="torch" asks for it' if impl == "torch" else "float64 has no other" if wide else ""
        reason = reason or ("Triton is not installed" if x.is_cuda else f"{x.device.type} tensors have no other")
    elif x.is_cpu and path == "triton":
        name, reason = "Triton's interpreter", 'impl="triton" asks for the kernels, on tensors of a CPU'
    elif x.is_cpu:
        name, reason = f"PyTorch on the CPU, {how or 'analytic'}", "the tensors are on a CPU"
    else:
        name, reason = f"Triton kernels ({_runtime.arch(x.device)})", "the tensors are on a GPU and Triton is there"
    _runtime.watch(op, name, why or reason, tensors, moved, flops)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks for where x is, when it is on. Meta tensors, among others, have none."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def output_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Autocast decides when it is on; otherwise a float input keeps its dtype."""
    if dtype is not None:
        if dtype not in _DTYPES:
            raise bad("dtype", "float32, float16, bfloat16 or float64", dtype)
        return dtype
    amp = autocast_dtype(x)
    if amp is not None:
        return amp
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def pair(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or any(side < 1 for side in sides):
        raise bad(argument, "a positive size or (height, width)", value)
    return sides[0], sides[1]


def same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise bad(name, f"a tensor on {x.device} like x", f"one on {other.device}")


def looks_at_values(t: Tensor) -> bool:
    """Looking at values costs a sync on a GPU, so there only on request."""
    return (t.device.type == "cpu" or _runtime.checking()) and not torch.compiler.is_compiling()


def check_labels(argument: str, labels: Tensor, length: int | None) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{argument}: expected int64, got {labels.dtype}")
    if labels.dim() != 1 or length not in (None, labels.shape[0]):
        raise bad(argument, f"[{length}], one a sample" if length is not None else "[T]", list(labels.shape))


def check_range(argument: str, values: Tensor, count: int, ignored: int | None = None) -> None:
    """Values from 0 to count - 1, where values are looked at."""
    if looks_at_values(values) and len(values):
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if low >= 0 and high < count:
            return
        wrong = values[((values < 0) | (values >= count)) & (values != ignored if ignored is not None else True)]
        if len(wrong):
            raise bad(argument, f"values from 0 to {count - 1}", wrong[:8].tolist())
