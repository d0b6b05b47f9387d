"""Operators of the embedding family: schemas, CUDA and CPU implementations, fakes and the `autograd.Function`.

On CUDA tensors the Triton kernels run. On CPU tensors PyTorch's own row gather does, into the result itself where a sample
is large; with impl="triton" the kernels run there too, in Triton's interpreter.
"""

from __future__ import annotations

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

# Measured (one EPYC core, rows of 384 to 1024): from so many bytes a sample on, gathering into the result beats joining.
_LARGE = 160 * 1024


def _run(ids: Tensor, index: Tensor | None, lengths: Tensor | None, prompts: int, slots: int) -> tuple[int, int, int] | None:
    """(first place, last place + 1, first slot) when every sample holds the same rising slots there and none elsewhere."""
    values = ids.numpy()
    if lengths is not None or not values.size:
        return None
    if index is not None and not (0 <= int(index.min()) and int(index.max()) < prompts):
        return None
    held = np.flatnonzero(values[0] < 0)
    if not len(held):
        return (0, 0, 0) if values.min() >= 0 else None
    start, stop = int(held[0]), int(held[-1]) + 1
    first = -1 - int(values[0, start])
    same = stop - start == len(held) and first + len(held) <= slots
    same = same and bool((values[:, start:stop] == np.arange(-1 - first, -1 - first - len(held), -1)).all())
    same = same and all(part.size == 0 or part.min() >= 0 for part in (values[:, :start], values[:, stop:]))
    return (start, stop, first) if same else None


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
    is_nothing = (slot == -1 - PADDING) | (is_slot & (n == -1)) | (chosen & ~is_soft)
    return place[is_soft], (n * slots + slot)[is_soft], place[is_nothing], place[~is_soft & ~is_nothing]


def _forward_cpu(  # type: ignore[no-untyped-def]
    ids, vocab, soft, index, lengths, positions, scale, dtype, triton
) -> Tensor:
    if triton:
        return _forward_triton(ids, vocab, soft, index, lengths, positions, scale, dtype, triton)
    batch, length = ids.shape
    width = soft.shape[2]
    run = _run(ids, index, lengths, *soft.shape[:2])
    computes = scale != 1 or positions is not None
    inner = torch.promote_types(dtype, torch.float32) if computes else dtype
    out = torch.empty((batch, length, width), dtype=dtype)
    bytes_ = max(length * width * inner.itemsize, 1)
    at_once = 1 if bytes_ >= _LARGE else max(1, 8 * _LARGE // bytes_) if computes else max(batch, 1)
    for first in range(0, batch, at_once):
        samples = slice(first, first + at_once)
        part = out[samples] if inner == dtype else torch.empty((len(ids[samples]), length, width), dtype=inner)
        if run is None:
            _words_into(part, ids[samples], vocab)
        else:
            start, stop, slot = run
            rows = soft[:, slot : slot + stop - start]
            rows = rows[index[samples]] if index is not None else rows[samples] if len(rows) > 1 else rows
            _join_into(part, ids[samples], vocab, rows, start, stop)
        if scale != 1:
            part.mul_(scale)
        if positions is not None:
            part.add_(positions[:length])
        if inner != dtype:
            out[samples] = part
    if run is None and out.numel():
        _place_soft(out.view(-1, width), ids, vocab, soft, index, lengths, positions, scale)
    return out


def _words_into(part: Tensor, ids: Tensor, vocab: Tensor) -> None:
    """Rows of the vocabulary everywhere."""
    flat, rows = ids.reshape(-1).clamp(0, len(vocab) - 1), part.view(-1, part.shape[2])
    if vocab.dtype == part.dtype:
        torch.index_select(vocab, 0, flat, out=rows)
    else:
        rows.copy_(vocab.index_select(0, flat))


def _join_into(part: Tensor, ids: Tensor, vocab: Tensor, rows: Tensor, start: int, stop: int) -> None:
    """Soft rows [samples or 1, stop - start, d] at the same places of every sample, rows of the vocabulary elsewhere."""
    if len(ids) == 1 and vocab.dtype == part.dtype:
        for words, target in ((ids[0, :start], part[0, :start]), (ids[0, stop:], part[0, stop:])):
            if len(words):
                torch.index_select(vocab, 0, words, out=target)
        part[:, start:stop] = rows
    else:
        pieces = [torch.embedding(vocab, ids[:, :start]), rows.expand(len(ids), -1, -1), torch.embedding(vocab, ids[:, stop:])]
        torch.cat([piece.to(part.dtype) for piece in pieces if piece.shape[1]], 1, out=part)


def _place_soft(
    out: Tensor, ids: Tensor, vocab: Tensor, soft: Tensor, index: Tensor | None, lengths: Tensor | None,
    positions: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Writes the soft rows, the rows of no token and those of wrong ids into out [B * T, d]."""
    width = out.shape[1]
    place, row, nothing, wrong = _readers(ids, index, lengths, *soft.shape[:2])
    rows = soft.reshape(-1, width).index_select(0, row)
    if scale != 1 or positions is not None:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).mul(scale)
        if positions is not None:
            rows = rows.add_(positions[place % ids.shape[1]])
    out.index_copy_(0, place, rows.to(out.dtype))
    out.index_fill_(0, nothing, 0.0)
    out.index_fill_(0, torch.cat([wrong, (ids.reshape(-1) >= len(vocab)).nonzero()[:, 0]]), torch.nan)


def _gradient_cpu(  # type: ignore[no-untyped-def]
    g, ids, index, lengths, prompts, slots, scale, dtype, triton
) -> Tensor:
    if triton:
        return _gradient_triton(g, ids, index, lengths, prompts, slots, scale, dtype, triton)
    width = g.shape[2]
    inner = torch.promote_types(dtype, torch.float32)
    run = _run(ids, index, lengths, prompts, slots)
    d = torch.zeros((prompts, slots, width), dtype=inner)
    if run is not None:
        start, stop, slot = run
        read, target = g[:, start:stop], d[:, slot : slot + stop - start]
        if prompts == 1:
            torch.sum(read, 0, keepdim=True, dtype=inner, out=target)
        elif index is None:
            target.copy_(read)
        else:
            target.index_add_(0, index, read.to(inner))  # one sample after the other
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

_forward = torch.ops.fastprompt.soft_gather.default
_gradient = torch.ops.fastprompt.soft_gather_gradient.default


class SoftGather(torch.autograd.Function):
    """`soft_gather` by the fused paths, with a gradient for the soft rows alone."""

    @staticmethod
    def forward(ctx, ids, vocab, soft, index, lengths, positions, scale, dtype, triton):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids, index, lengths)
        ctx.settings = *soft.shape[:2], scale, soft.dtype, triton
        return _forward(ids, vocab, soft, index, lengths, positions, scale, dtype, triton)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastprompt.functional.soft_gather has no second derivative: call backward without create_graph=True, "
                'or use impl="torch"'
            )
        d = _gradient(g, *ctx.saved_tensors, *ctx.settings)
        return None, None, d, None, None, None, None, None, None
