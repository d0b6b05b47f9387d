"""CLIP's text side, forward and backward to the context, on a transformers CLIP of ViT-B/32's text size with random weights.

Rivals: `77 tokens`, the public form, every class padded to the model's 77 positions; `truncated`, the strong one, padded to the
longest class, with attention causal and without a mask; `loop`, CoCoOp's, the encoder on 77 tokens a class for each image.
Names have 1 to 5 tokens, with a full stop behind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.clip import ConditionalPrompts, ContextPrompts

from .reprogrammed import Models, _transformers
from .suite import Case, Form, Inputs

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


class Features(nn.Module):
    """The text features of prompts whose own tensors come from outside."""

    def __init__(self, prompts: Any) -> None:
        super().__init__()
        self.prompts = prompts

    def forward(self, *given: Tensor) -> Tensor:
        return self.prompts.features(*given)


def coop(count: int, length: int, dtype: torch.dtype, per_class: bool = False) -> Case:
    """CoOp: text features of C classes, and the gradient of a weighted sum of them for the context."""
    models = Models(_make, dtype)
    made: dict[Any, Any] = {}
    ids, shape = names(count), (count, length, WIDTH) if per_class else (length, WIDTH)
    ends = (ids == EOT).int().argmax(1)
    places = 1 + length + int(ends.max())

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        context = torch.randn(shape, generator=generator, device=device).mul(0.02).to(dtype)
        g = torch.randn(count, WIDTH, generator=generator, device=device).to(dtype)
        return {"context": context.requires_grad_(), "ids": ids.to(device), "g": g}

    def ours(i: Inputs) -> Tensor:
        if not made:
            made[0] = Features(ContextPrompts(models(i["context"]), i["ids"], context=length, per_class=per_class))
        return torch.func.functional_call(made[0], {"prompts.context": i["context"]}, ())

    def plain(i: Inputs, places: int) -> Tensor:
        return encode(models(i["context"]), i["ids"], i["context"], places)

    rows = int(ends.sum()) + 1 + (count * length if per_class else length)
    return _case(
        "CoOp, a context a class" if per_class else "CoOp", f"C={count} M={length}", dtype, inputs, rows,
        {"fastprompt": ours, "77 tokens": partial(plain, places=77), "truncated": partial(plain, places=places)},
        partial(plain, places=77), ("context",),
    )  # fmt: skip


def cocoop(batch: int, count: int, length: int, dtype: torch.dtype) -> Case:
    """CoCoOp: text features of C classes for each of B images; given are the images' features, trained context and shift."""
    models = Models(_make, dtype)
    made: dict[Any, Any] = {}
    ids = names(count)
    ends = (ids == EOT).int().argmax(1)
    places = 1 + length + int(ends.max())

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul(scale).to(dtype)

        given = {
            "context": draw(length, WIDTH, scale=0.02).requires_grad_(),
            "ids": ids.to(device),
            "g": draw(batch, count, WIDTH),
        }
        return given | {"image": draw(batch, WIDTH), "inner": draw(32, WIDTH), "outer": draw(WIDTH, 32, scale=0.02)}

    def ours(i: Inputs) -> Tensor:
        if not made:
            made[0] = Features(ConditionalPrompts(models(i["context"]), i["ids"], context=length))
        own = {"context": i["context"], "shift.0.weight": i["inner"], "shift.2.weight": i["outer"]}
        own |= {"shift.0.bias": i["inner"].new_zeros(32), "shift.2.bias": i["outer"].new_zeros(WIDTH)}
        return torch.func.functional_call(made[0], {f"prompts.{name}": t for name, t in own.items()}, (i["image"],))

    def loop(i: Inputs, places: int) -> Tensor:
        shift = torch.relu(nn.functional.normalize(i["image"], dim=1) @ i["inner"].T) @ i["outer"].T
        return torch.stack([encode(models(i["context"]), i["ids"], i["context"] + each, places) for each in shift])

    return _case(
        "CoCoOp", f"B={batch} C={count} M={length}", dtype, inputs, batch * (int(ends.sum()) + 1 + length),
        {"fastprompt": ours, "loop": partial(loop, places=77), "truncated": partial(loop, places=places)},
        partial(loop, places=77), ("context",),
    )  # fmt: skip


def _case(
    name: str, shape: str, dtype: torch.dtype, inputs: Any, rows: int, forms: dict[str, Form], formula: Form, wrt: tuple[str, ...]
) -> Case:
    weights = 12 * WIDTH**2 * LAYERS
    return Case(
        family="clip", name=name, shape=f"{shape} d={WIDTH} L={LAYERS}", mode="both", dtype=dtype, inputs=inputs, forms=forms,
        formula=formula, wrt=wrt, bytes=2 * weights * dtype.itemsize, flops=2 * 2 * rows * weights,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, best=("truncated",),
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family clip` runs."""
    if device.type == "cuda":
        return [coop(1000, 16, dtype), coop(100, 16, dtype), coop(100, 16, dtype, per_class=True), cocoop(8, 100, 4, dtype)]
    return [coop(50, 16, dtype), coop(100, 16, dtype), coop(20, 16, dtype, per_class=True), cocoop(2, 25, 4, dtype)]
