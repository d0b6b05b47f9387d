"""Operators of the mapping family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own gather does, and NumPy counts; with impl="triton"
the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.tuning.mapping import pick

if _runtime.HAS_TRITON:
    from fastprompt.kernels.mapping import backward as kernel_backward
    from fastprompt.kernels.mapping import count as kernel_count
    from fastprompt.kernels.mapping import forward as kernel_forward

_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define("map_labels(Tensor logits, Tensor index, bool differentiable) -> (Tensor, Tensor)")
_library.define("map_labels_gradient(Tensor g, Tensor index, Tensor readers, SymInt sources) -> Tensor")
_library.define("count_labels_(Tensor(a!) counts, Tensor logits, Tensor target, str impl) -> ()")

# ---- Triton ----


def _forward_triton(logits: Tensor, index: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    readers = _empty_readers(logits, differentiable)
    launch = pick("forward", index.shape[0], _runtime.arch(logits.device))
    return kernel_forward.map_labels(logits, index.contiguous(), readers, launch), readers


def _gradient_triton(g: Tensor, index: Tensor, readers: Tensor, sources: int) -> Tensor:
    launch = pick("gradient", sources, _runtime.arch(g.device))
    return kernel_backward.map_labels_gradient(g, index.contiguous(), readers, sources, launch)


def _count_triton(counts: Tensor, logits: Tensor, target: Tensor, impl: str) -> None:
    launch = pick("count", logits.shape[1], _runtime.arch(logits.device))
    kernel_count.count_labels_(counts, logits, target, launch)


# ---- CPU ----


def _count_cpu(counts: Tensor, logits: Tensor, target: Tensor, impl: str) -> None:
    if impl == "triton":
        _count_triton(counts, logits, target, impl)
    elif len(logits):
        # NumPy's arg-max has the same rules as PyTorch's and is several times faster on a core.
        source, labels = logits.detach().float().numpy().argmax(1), target.numpy()
        known = (labels >= 0) & (labels < counts.shape[1])
        np.add.at(counts.view(-1).numpy(), (source * counts.shape[1] + labels)[known], 1)


# ---- Registration ----


def _empty_readers(logits: Tensor, differentiable: bool) -> Tensor:
    """Room for the inverted map, where there will be a backward."""
    return torch.empty((2, logits.shape[1] if differentiable else 0), dtype=torch.int32, device=logits.device)


def _forward_fake(logits: Tensor, index: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty((logits.shape[0], index.shape[0])), _empty_readers(logits, differentiable)


def _gradient_fake(g: Tensor, index: Tensor, readers: Tensor, sources: int) -> Tensor:
    return g.new_empty((g.shape[0], sources))


def _count_fake(counts: Tensor, logits: Tensor, target: Tensor, impl: str) -> None:
    return None


for _name, _triton, _cpu, _fake in (
    ("map_labels", _forward_triton, _forward_triton, _forward_fake),
    ("map_labels_gradient", _gradient_triton, _gradient_triton, _gradient_fake),
    ("count_labels_", _count_triton, _count_cpu, _count_fake),
):
    _library.impl(_name, _runtime.on_its_device(_triton), "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _fake, lib=_library)

_forward = torch.ops.fastprompt.map_labels.default
_gradient = torch.ops.fastprompt.map_labels_gradient.default
count_labels_ = torch.ops.fastprompt.count_labels_.default


class MapLabels(torch.autograd.Function):
    """`map_labels` by the kernels, with a gradient for the logits."""

    @staticmethod
    def forward(ctx, logits, index, differentiable):  # type: ignore[no-untyped-def]
        out, readers = _forward(logits, index, differentiable)
        ctx.save_for_backward(index, readers)
        ctx.sources = logits.shape[1]
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.map_labels has no second derivative: call backward without create_graph=True, "
                'or use impl="torch"'
            )
        index, readers = ctx.saved_tensors
        return _gradient(g, index, readers, ctx.sources), None, None


# ---- Matching: on the host, once an epoch ----


def match_labels(counts: Tensor) -> Tensor:
    """What `reference.match_labels` gives, bit for bit, from one sort of the cells that are not zero.

    Striking a row and a column never changes the order of the other cells, so walking once through all cells by falling
    count, then by position, meets the same maxima. Only those cells leave a GPU.
    """
    sources, targets = counts.shape
    flat = counts.reshape(-1)
    if flat.device.type == "cpu":
        cells = np.flatnonzero(flat.numpy() != 0)  # NumPy's comparison and search are the fastest on a CPU
        values = flat.numpy()[cells]
    else:
        found = flat.nonzero()[:, 0]
        cells, values = found.cpu().numpy(), flat[found].cpu().numpy()
    if (values < 0).any():
        raise ValueError(f"counts: expected no negative numbers, got {values.min()}")
    cells = cells[np.argsort(-values, kind="stable")]
    index = np.full(targets, -1, dtype=np.int64)
    free = np.ones(sources, dtype=bool)
    start, step = 0, 2 * targets
    while start < len(cells) and (index < 0).any():
        part = cells[start : start + step]
        source, target = part // targets, part % targets
        alive = free[source] & (index[target] < 0)  # a Python loop over the few that are left
        for s, t in zip(source[alive].tolist(), target[alive].tolist(), strict=True):
            if free[s] and index[t] < 0:
                index[t], free[s] = s, False
        start, step = start + step, 2 * step
    # Only zeros are left: the first one is the lowest free source with the lowest open target.
    open_ = np.flatnonzero(index < 0)
    index[open_] = np.flatnonzero(free)[: len(open_)]
    return torch.from_numpy(index).to(counts.device)


def match_optimally(counts: Tensor) -> Tensor:
    """The one-to-one map with the largest sum of counts (Hungarian method)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RuntimeError("optimal=True needs SciPy: pip install scipy") from None
    source, target = linear_sum_assignment(counts.cpu().numpy(), maximize=True)
    index = np.empty(counts.shape[1], dtype=np.int64)
    index[target] = source
    return torch.from_numpy(index).to(counts.device)


# ---- The whole vocabulary, in chunks ----

_CHUNK = 1 << 22  # scores held at a time: 16 MB


class LogPartition(torch.autograd.Function):
    """log(sum over v of exp(hidden @ weight[v] + bias[v])), [R]; the backward computes every chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):  # type: ignore[no-untyped-def]
        out = None
        for _, scores in _chunks(hidden, weight, bias):
            part = scores.logsumexp(1)
            out = part if out is None else torch.logaddexp(out, part)
        ctx.save_for_backward(hidden, weight, bias, out)
        return out

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.label_head has no second derivative here: call backward without create_graph=True"
            )
        hidden, weight, bias, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need[0] else None
        d_weight = torch.empty_like(weight) if need[1] else None
        d_bias = torch.empty_like(bias) if need[2] else None
        for part, scores in _chunks(hidden, weight, bias):
            share = (scores - lse[:, None]).exp_().mul_(g[:, None])
            if d_bias is not None:
                d_bias[part] = share.sum(0)
            share = share.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += share @ weight[part]
            if d_weight is not None:
                d_weight[part] = share.T @ hidden
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The head's scores in float32 (float64), some columns at a time."""
    step = max(256, _CHUNK // max(len(hidden), 1))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        yield part, torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part]).to(wide)


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.log_partition` without a tensor of the size of rows times vocabulary."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return LogPartition.apply(hidden, weight, bias)
