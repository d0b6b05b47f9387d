"""Kernels compiled before they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.functional.checks import bad

Like = Tensor | tuple[tuple[int, ...], torch.dtype]


def warmup(model: nn.Module, *inputs: Like, step: Callable[..., Any] | None = None, backward: bool = True) -> None:
    """Runs a step once on zeros, so that every kernel it launches is compiled, loaded and ready for CUDA graph capture.

    A kernel is compiled for dtypes, for which strides are 1 or multiples of 16, and for few classes of sizes, not for a batch
    size: one call a shape that will be captured is enough, and other batch sizes rarely compile anything.
    Parameters, their .grad, buffers and the random state are as before. What a module keeps outside of these (a count of calls,
    say) has seen one more call.

    Args:
        model: whose trainable parameters get the gradient that is computed and dropped.
        inputs: what the step takes: example tensors, of which only shape, dtype and device count, or (shape, dtype) for one on
            the model's device. Zeros are passed: valid pixels, token ids and labels.
        step: what is run, for example `lambda x, y: labels.loss(model.source_logits(x), y)`; None: `model(*inputs)`.
        backward: also run the gradient. With no trainable parameter there is none.

    Raises:
        ValueError: an input that is neither.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    zeros = [_zeros(like, device) for like in inputs]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    grad = backward and bool(trained)
    devices = sorted({t.device.index for t in (*model.parameters(), *zeros) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(grad):
        try:
            found = [t for t in _tensors((step or model)(*zeros)) if t.requires_grad]
            if grad and found:
                torch.autograd.grad(found, trained, [torch.zeros_like(t) for t in found], allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
    for index in devices:
        torch.cuda.synchronize(index)


def _zeros(like: Any, device: torch.device) -> Tensor:
    if isinstance(like, Tensor):
        return torch.zeros_like(like, requires_grad=False)
    if isinstance(like, tuple) and len(like) == 2 and isinstance(like[1], torch.dtype):
        return torch.zeros(like[0], dtype=like[1], device=device)
    raise bad("inputs", "tensors or (shape, dtype)", repr(like)[:80])


def _tensors(found: Any) -> list[Tensor]:
    """The tensors in what a model returns: a tensor, a tuple, a list, a mapping, an output of transformers."""
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if hasattr(found, "values") else found if isinstance(found, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]
