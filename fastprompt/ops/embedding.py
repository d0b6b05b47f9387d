"""Operators of the embedding family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own row gather does: over the whole result, into which the soft
rows are then written, or, where all samples hold the same soft tokens at the same places, in one of the ways of `way`. With
impl="triton" the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprompt import _runtime
from fastprompt.reference.embedding import PADDING
from fastprompt.tuning.embedding import pick

if _runtime.HAS_TRITON:
    from fastprompt.kernels.embedding import backward as kernel_backward
    from fastprompt.kernels.embedding import forward as kernel_forward

_library = torch.library.Library("fastprompt", "FRAGMENT")
_library.define(
    "soft_gather(Tensor ids, Tensor vocab, Tensor soft, Tensor? index, Tensor? lengths, Tensor? positions, float scale, "
    "ScalarType dtype, bool triton) -> Tensor"
)
_library.define(
    "soft_gather_gradient(Tensor g, Tensor ids, Tensor? index, Tensor? lengths, SymInt prompts, SymInt slots, float scale, "
    "ScalarType dtype, bool triton) -> Tensor"
)

# ---- Triton ----


def _forward_triton(  # type: ignore[no-untyped-def]
    ids, vocab, soft, index, lengths, positions, scale, dtype, triton
) -> Tensor:
    launch = pick("gather", soft.shape[2], _runtime.arch(ids.device))
    return kernel_forward.soft_gather(ids, vocab, soft, index, lengths, positions, scale, dtype, PADDING, launch)


def _gradient_triton(  # type: ignore[no-untyped-def]
    g, ids, index, lengths, prompts, slots, scale, dtype, triton
) -> Tensor:
    arch = _runtime.arch(g.device)
    launches = pick("locate", slots, arch), pick("add", g.shape[2], arch), pick("add chunks", g.shape[2], arch)
    return kernel_backward.soft_gradient(g, ids, index, lengths, prompts, slots, scale, dtype, launches)


# ---- CPU ----

_CHUNK = 1 << 20  # bytes of float32 that are computed at a time, so that they stay in the cache
_JOINED = 1 << 20  # numbers of a result
_WRITTEN = 1 << 15  # numbers of a sample's words


class Run(NamedTuple):
    """Where every sample of a batch holds the same soft tokens, one after the other. What stands around them are words."""

    start: int
    stop: int
    slot: int

    def rows(self, soft: Tensor, index: Tensor | None) -> Tensor:
        """The soft rows [1 or B, stop - start, d]."""
        size = self.stop - self.start
        if size != soft.shape[1]:  # a view costs as much as a small gather, and more in backward
            soft = soft[:, self.slot : self.slot + size]
        return soft if index is None else soft.index_select(0, index)


def run_of(ids: Tensor, index: Tensor | None, slots: int) -> Run | None:
    """The run of a batch on a CPU, if it has one; not whether words stand around it. NumPy has the least host cost."""
    values = ids.numpy()
    if not values.size or (index is not None and int(index.min()) < 0):
        return None
    row = values[0]
    size = int(np.count_nonzero(row < 0))
    if not size:
        return Run(0, 0, 0)
    stop = int(row.argmin()) + 1  # the last soft token is the least id
    first = int(row[stop - size])
    if stop < size or first >= 0 or size - 1 - first > slots:
        return None
    held = values[:, stop - size : stop].tobytes()
    return Run(stop - size, stop, -1 - first) if held == _falling(first, size, len(values)) else None


@lru_cache(maxsize=16)
def _falling(first: int, size: int, batch: int) -> bytes:
    return np.arange(first, first - size, -1).tobytes() * batch


def surrounds(run: Run, ids: Tensor, words: int) -> bool:
    """Whether all ids around a run are words."""
    known = np.count_nonzero(ids.numpy().view(np.uint64) < words)  # a negative number is a large one without its sign
    return bool(known == ids.numel() - len(ids) * (run.stop - run.start))


def way(run: Run, ids: Tensor, width: int) -> str:
    """How rows are moved best (measured). "join" them by PyTorch's operators: little, where the host's cost decides, and much
    that is soft. "write" each sample's to its place: many of one sample. "gather" all and write the soft ones over them.
    """
    length, size = ids.shape[1], run.stop - run.start
    if size and (length - size) * width >= _WRITTEN:
        return "write"
    return "join" if size and (ids.numel() * width <= _JOINED or 3 * size > length) else "gather"


def quick(ids: Tensor, vocab: Tensor, soft: Tensor) -> Tensor | None:
    """A small call with all soft tokens in front on a CPU, with the least host cost; None: others have to do it.

    It looks at what PyTorch would take and should not; what PyTorch refuses is for the caller to explain.
    """
    dtype, shape = soft.dtype, soft.shape
    slots, width = shape[-2:]
    if (
        ids.dtype is not torch.int64 or not ids.is_cpu or not slots * width or len(shape) > 3 or ids.numel() * width > _JOINED
        or vocab.dtype is not dtype or not dtype.is_floating_point or vocab.requires_grad or torch.compiler.is_compiling()
    ):  # fmt: skip
        return None
    values = ids.numpy()
    batch, length = values.shape
    if length == slots or values[:, :slots].tobytes() != _falling(-1, slots, batch):
        return None
    # A slice copied by NumPy costs less than one that PyTorch makes contiguous.
    return torch.cat((soft.expand(batch, -1, -1), torch.embedding(vocab, torch.from_numpy(values[:, slots:].copy()))), 1)


def joined(ids: Tensor, vocab: Tensor, soft: Tensor, index: Tensor | None, run: Run) -> Tensor:
    """The rows of a run and of the words around it, by operators that PyTorch differentiates."""
    batch, length = ids.shape
    rows = run.rows(soft, index)
    pieces = [rows if rows.shape[0] == batch else rows.expand(batch, -1, -1)]
    if run.start:
        pieces.insert(0, torch.embedding(vocab, ids[:, : run.start]))
    if run.stop < length:
        pieces.append(torch.embedding(vocab, ids[:, run.stop :]))
    return torch.cat(pieces, 1)


def _written(ids: Tensor, vocab: Tensor, soft: Tensor, index: Tensor | None, run: Run) -> Tensor:
    """The same, each row written once to its place: much for each sample, where memory decides."""
    out = vocab.new_empty((*ids.shape, vocab.shape[1]))
    out[:, run.start : run.stop] = run.rows(soft, index)
    for part in (slice(0, run.start), slice(run.stop, ids.shape[1])):
        if part.start < part.stop:
            for row, words in zip(out[:, part].unbind(0), ids[:, part].unbind(0), strict=True):
                torch.index_select(vocab, 0, words, out=row)
    return out


def _readers(
    ids: Tensor, index: Tensor | None, lengths: Tensor | None, prompts: int, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of flattened ids: the places that read soft rows, and which [N * P]; the places of no token; those of wrong ids."""
    flat = ids.reshape(-1)
    place = (flat < 0).nonzero()[:, 0]
    slot = -1 - flat[place]
    sample = place // max(ids.shape[1], 1)
    n = index[sample] if index is not None else sample if prompts > 1 else torch.zeros_like(sample)
    is_slot = slot < slots
    chosen = is_slot & (n >= 0) & (n < prompts)
    is_soft = chosen if lengths is None else chosen & (slot < lengths[torch.where(chosen, n, 0)])
    if bool(is_soft.all()):
        return place, n * slots + slot, place[:0], place[:0]
    is_nothing = (slot == -1 - PADDING) | (is_slot & (n == -1)) | (chosen & ~is_soft)
    return place[is_soft], (n * slots + slot)[is_soft], place[is_nothing], place[~is_soft & ~is_nothing]


def _forward_cpu(  # type: ignore[no-untyped-def]
    ids, vocab, soft, index, lengths, positions, scale, dtype, triton, run=None
) -> Tensor:
    if triton:
        return _forward_triton(ids, vocab, soft, index, lengths, positions, scale, dtype, triton)
    length, width = ids.shape[1], soft.shape[2]
    computes = scale != 1 or positions is not None
    if run and not computes and dtype == vocab.dtype and way(run, ids, width) == "write":
        return _written(ids, vocab, soft.detach(), index, run)
    flat, soft = ids.reshape(-1), soft.detach()
    words = flat.clamp(0, len(vocab) - 1)
    inner = torch.promote_types(dtype, torch.float32)
    if not computes:
        out = vocab.index_select(0, words).to(dtype)
    else:
        out = torch.empty((len(flat), width), dtype=dtype)
        step = max(1, _CHUNK // (4 * length * width)) * length if len(flat) else 1
        for first in range(0, len(flat), step):
            rows = vocab.index_select(0, words[first : first + step]).to(inner).view(-1, length, width)
            table = None if positions is None else positions[:length]
            out[first : first + step] = _computed(rows, table, scale).view(-1, width)
    if run:
        rows = run.rows(soft, index)
        if computes:
            table = None if positions is None else positions[run.start : run.stop]
            rows = _computed(rows.to(inner, copy=True), table, scale)
        out.view(*ids.shape, width)[:, run.start : run.stop] = rows
        return out.view(*ids.shape, width)
    place, row, nothing, wrong = _readers(ids, index, lengths, *soft.shape[:2])
    rows = soft.reshape(-1, width).index_select(0, row)
    if computes:
        table = None if positions is None else positions[place % max(length, 1)]
        rows = _computed(rows.to(inner), table, scale)
    out[place] = rows.to(dtype)
    if len(nothing):
        out[nothing] = 0.0
    for other in (wrong, (flat >= len(vocab)).nonzero()[:, 0]):
        if len(other):
            out[other] = torch.nan
    return out.view(*ids.shape, width)


def _computed(rows: Tensor, positions: Tensor | None, scale: float) -> Tensor:
    """scale * rows + positions, in place."""
    if scale != 1:
        rows.mul_(scale)
    return rows if positions is None else rows.add_(positions)


def _gradient_cpu(  # type: ignore[no-untyped-def]
    g, ids, index, lengths, prompts, slots, scale, dtype, triton, run=None
) -> Tensor:
    if triton:
        return _gradient_triton(g, ids, index, lengths, prompts, slots, scale, dtype, triton)
    width = g.shape[2]
    inner = torch.promote_types(dtype, torch.float32)
    if run and prompts == 1 and index is None and run.stop - run.start == slots:
        d = torch.sum(g[:, run.start : run.stop], 0, keepdim=True, dtype=inner)
        return (d if scale == 1 else d.mul_(scale)).to(dtype)
    d = torch.zeros((prompts, slots, width), dtype=inner)
    if run:
        start, stop, slot = run
        read, target = g[:, start:stop], d[:, slot : slot + stop - start]
        if index is not None:
            target.index_add_(0, index, read.to(inner))  # one sample after the other
        elif prompts > 1:
            target.copy_(read)
        else:
            torch.sum(read, 0, keepdim=True, dtype=inner, out=target)
    else:
        place, row, _, _ = _readers(ids, index, lengths, prompts, slots)
        length = max(ids.shape[1], 1)
        d.view(-1, width).index_add_(0, row, g[place // length, place % length].to(inner))
    return (d if scale == 1 else d.mul_(scale)).to(dtype)


# ---- Registration ----


def _forward_fake(  # type: ignore[no-untyped-def]
    ids, vocab, soft, index, lengths, positions, scale, dtype, triton
) -> Tensor:
    return ids.new_empty((*ids.shape, soft.shape[2]), dtype=dtype)


def _gradient_fake(  # type: ignore[no-untyped-def]
    g, ids, index, lengths, prompts, slots, scale, dtype, triton
) -> Tensor:
    return g.new_empty((prompts, slots, g.shape[2]), dtype=dtype)


for _name, _triton, _cpu, _fake in (
    ("soft_gather", _forward_triton, _forward_cpu, _forward_fake),
    ("soft_gather_gradient", _gradient_triton, _gradient_cpu, _gradient_fake),
):
    _library.impl(_name, _runtime.on_its_device(_triton), "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"fastprompt::{_name}", _fake, lib=_library)


def _direct(operator: Any, on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator, with the run that `run_of` found. Eager calls on a CPU skip the dispatcher, which knows of no run."""

    def call(first: Tensor, *given: Any) -> Tensor:
        if first.is_cpu and not torch.compiler.is_compiling():
            return on_cpu(first, *given)
        return operator(first, *given[:-1])

    return call


forward = _direct(torch.ops.fastprompt.soft_gather.default, _forward_cpu)
_gradient = _direct(torch.ops.fastprompt.soft_gather_gradient.default, _gradient_cpu)


class SoftGather(torch.autograd.Function):
    """`soft_gather` by the fused paths, with a gradient for the soft rows alone. run: what `run_of` found, if it did."""

    @staticmethod
    def forward(ctx, ids, vocab, soft, index, lengths, positions, scale, dtype, triton, run):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids, index, lengths)
        ctx.settings = *soft.shape[:2], scale, soft.dtype, triton, run
        return forward(ids, vocab, soft, index, lengths, positions, scale, dtype, triton, run)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.soft_gather has no second derivative: call backward without create_graph=True, "
                'or use impl="torch"'
            )
        return None, None, _gradient(g, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None, None, None
