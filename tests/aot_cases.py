"""The launches that are compiled ahead of time: every kernel, every configuration of the tuning tables, every option."""

from __future__ import annotations

import itertools

import torch

from fastprompt.ops import mapping as mapping_ops
from fastprompt.ops import perturbation as ops


def perturbation() -> None:
    """Calls the Triton path on CPU tensors; with launches recorded, nothing runs."""
    base = ops.Settings(
        canvas=(224, 224), image=(16, 16, 192, 192), interpolation="none", copies=1, period=0,
        window=(0, 0, 224, 224), hole=(16, 16, 192, 192), share="batch", squash="sigmoid", mask_first=False, scale=1.0,
        normalized=False, clamp="none", dtype=torch.bfloat16, channels_last=False, impl="triton",
    )  # fmt: skip
    full = base._replace(image=(0, 0, 224, 224), hole=(0, 0, 0, 0))
    cases = [base._replace(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    cases += [
        base._replace(channels_last=True),
        base._replace(interpolation="bicubic"),
        base._replace(share="index", squash="tanh", clamp="exact"),
        base._replace(share="product", normalized=True, squash="none"),
        full._replace(share="sample", squash="tanh", clamp="exact", normalized=True),
        base._replace(
            canvas=(1, 16000), image=(0, 0, 1, 4000), copies=4, period=4000, window=(0, 0, 1, 16000), hole=(0, 0, 0, 0)
        ),
    ]
    for s, batch, uint8 in itertools.product(cases, (256, 2), (True, False)):
        channels = 1 if s.canvas[0] == 1 else 3
        height, width = (32, 32) if s.interpolation != "none" else s.image[2:]
        x = torch.zeros((batch, channels, height, width), dtype=torch.uint8 if uint8 else torch.float32)
        count = {"batch": 1, "index": 4, "sample": batch, "product": 3}[s.share]
        prompt = torch.zeros((count, channels, *s.window[2:]))
        index = torch.zeros(batch, dtype=torch.int64) if s.share == "index" else None
        mask = torch.ones((1, *s.canvas), dtype=torch.bool) if s.share == "index" else None
        _launch(s, x, prompt, mask, None, index)
    for planes in (1, 3):
        cells = torch.zeros((256, planes, 28, 28), dtype=torch.bfloat16)
        _launch(full._replace(squash="none"), torch.zeros(256, 3, 224, 224), torch.zeros(1, 3, 224, 224), None, cells, None)


def _launch(s, x, prompt, mask, cells, index) -> None:
    norm = torch.zeros(4, x.shape[1])
    out = ops._forward_triton(x, prompt, mask, cells, index, norm, s)
    kept = x if s.clamp == "exact" else None
    if cells is None:
        ops._prompt_gradient_triton(out, kept, prompt, mask, index, norm, s)
    else:
        ops._cells_gradient_triton(out, kept, prompt, mask, cells, norm, s)
    if x.is_floating_point():
        ops._image_gradient_triton(out, kept, prompt, mask, cells, index, norm, x.shape[2:], x.dtype, s)


def mapping() -> None:
    """Wide and narrow tiles; rows that allow 16-byte accesses and rows that do not."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    shapes = ((1024, 128), (997, 1), (10, 10), (1, 1))
    for dtype, (sources, targets) in [(dtype, (1000, 10)) for dtype in dtypes] + [(dtypes[2], shape) for shape in shapes]:
        logits, index = torch.zeros((256, sources), dtype=dtype), torch.zeros(targets, dtype=torch.int64)
        out, readers = mapping_ops._forward_triton(logits, index, True)
        mapping_ops._gradient_triton(out, index, readers, sources)
        counts = torch.zeros((sources, targets), dtype=torch.int64)
        mapping_ops._count_triton(counts, logits, torch.zeros(256, dtype=torch.int64), "triton")
    columns = torch.zeros(64, 256, dtype=torch.bfloat16).T  # neighbouring sources lie far apart
    mapping_ops._forward_triton(columns, torch.zeros(10, dtype=torch.int64), False)
    mapping_ops._count_triton(torch.zeros((64, 10), dtype=torch.int64), columns, torch.zeros(256, dtype=torch.int64), "triton")


def launch_all() -> None:
    perturbation()
    mapping()
