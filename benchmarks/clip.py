"""CLIP's text side, forward and backward to the context, on a transformers CLIP of ViT-B/32's text size with random weights.

Rivals: `77 tokens`, the public form, every class padded to the model's 77 positions; `truncated`, the strong one, padded to the
longest class, with attention causal and without a mask; `loop`, CoCoOp's, an encoder run of 77 tokens a class for each image.
Names have 1 to 5 tokens, with a full stop behind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reprogrammed import Models, _transformers
from benchmarks.suite import Case, Form, Inputs
from fastprompt.clip import ConditionalPrompts, ContextPrompts

WIDTH, LAYERS, HEADS, SOS, EOT, STOP = 512, 12, 8, 49406, 49407, 269


def _make() -> Any:
    transformers = _transformers()
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, projection_dim=WIDTH,
        eos_token_id=EOT, bos_token_id=SOS,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def names(count: int) -> Tensor:
    """int64 [C, 77]."""
    random = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.35, 0.35, 0.18, 0.08, 0.04])
    ids = torch.full((count, 77), EOT)
    for row, length in zip(ids, (torch.multinomial(shares, count, True, generator=random) + 1).tolist(), strict=True):
        row[0], row[length + 1] = SOS, STOP
        row[1 : length + 1] = torch.randint(300, 40000, (length,), generator=random)
    return ids


def encode(model: Any, ids: Tensor, context: Tensor, places: int) -> Tensor:
    """The public form with that many positions: [SOS, context, name., EOT] a class. Context [M, width] or [C, M, width]."""
    length, side = context.shape[-2], model.text_model
    words = side.embeddings.token_embedding(ids)
    context = context.expand(len(ids), length, -1)
    x = torch.cat([words[:, :1], context, words[:, 1 : places - length]], 1) + side.embeddings.position_embedding.weight[:places]
    x = side.final_layer_norm(side.encoder(inputs_embeds=x, attention_mask=None, is_causal=True).last_hidden_state)
    ends = (ids == EOT).int().argmax(1) + length
    return model.text_projection(x[torch.arange(len(ids), device=ids.device), ends])


def coop(count: int, length: int, dtype: torch.dtype, position: str = "end", per_class: bool = False) -> Case:
    """CoOp: text features of C classes, and the gradient of a weighted sum of them for the context."""
    models, made = Models(_make, dtype), {}
    ids, shape = names(count), (count, length, WIDTH) if per_class else (length, WIDTH)
    places = 1 + length + int((ids == EOT).int().argmax(1).max())

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        context = torch.randn(shape, generator=generator, device=device).mul(0.02).to(dtype)
        g = torch.randn(count, WIDTH, generator=generator, device=device).to(dtype)
        return {"context": context.requires_grad_(), "ids": ids.to(device), "g": g}

    def ours(i: Inputs) -> Tensor:
        if not made:
            made[0] = ContextPrompts(models(i["context"]), i["ids"], context=length, per_class=per_class)
        return torch.func.functional_call(made[0], {"context": i["context"]}, (), tie_weights=False)

    def plain(i: Inputs, rows: int) -> Tensor:
        return encode(models(i["context"]), i["ids"], i["context"], rows)

    own = int((ids == EOT).int().argmax(1).sum()) + (count * length if per_class else length) + 1
    return Case(
        family="clip", name="CoOp, a context a class" if per_class else "CoOp", shape=f"C={count} M={length} d={WIDTH} L={LAYERS}",
        mode="both", dtype=dtype, inputs=inputs, forms={"fastprompt": ours, "77 tokens": partial(plain, rows=77),
        "truncated": partial(plain, rows=places)}, formula=partial(plain, rows=77), wrt=("context",),
        bytes=12 * WIDTH**2 * LAYERS * dtype.itemsize, flops=2 * 2 * own * 12 * WIDTH**2 * LAYERS,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, best=("truncated",),
    )  # fmt: skip
