"""Whole reprogramming steps: data, prompt, frozen model, map and loss; `forward` is inference, `both` a training step.

Rivals: `public`, the step as the public repositories write it, from its formula; `host float`, fastprompt from their float images
in place of uint8 on the device. `frozen` is the bare model on rows of the same number, in training with the gradient of what it
is given: time over it is what reprogramming costs. On a GPU also `graph` and `compiled`, our own step that way. The maps choose
10 of 1000 classes. Models of transformers with random weights; on a CPU small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import Reprogrammed, functional
from fastprompt.functional import Rows
from fastprompt.hoist import hoist, hoist_deep, prefixed
from fastprompt.nn import BayesianMap, LabelMap, MaskNet, PaddedPrompt

from .mapping import wide
from .perturbation import MEAN, STD
from .reprogrammed import Models, _transformers
from .suite import Case, Form, Inputs

SOURCES, CLASSES, SET = 1000, 10, 512
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
KINKS = (
    2e-2  # gradients of models with ReLU: where rounding puts its input, or a pool's maximum, on the other side, 0.2 % and more
)


class _Reached(torch.autograd.Function):
    """x as it is; backward computes the gradient of x, and the prompt gets none: a frozen model's own backward."""

    @staticmethod
    def forward(ctx, x, prompt):  # type: ignore[no-untyped-def]
        ctx.prompt = prompt.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return None, g.new_zeros(()).expand(ctx.prompt)


def _hoisted(i: Inputs, mode: str, make: Callable[[Tensor], Any]) -> Any:
    """The prompt's keys and values: in training of every step anew, for inference once."""
    if mode == "both":
        return make(i["prompt"])
    if "hoisted" not in i:
        i["hoisted"] = make(i["prompt"])
    return i["hoisted"]


def _graphed(form: Form, names: tuple[str, ...]) -> Form:
    """One CUDA graph for all input sets: what changes is copied into it."""
    made: dict[str, Any] = {}

    def run(i: Inputs) -> Tensor:
        given = tuple(i[name] for name in names)
        if not made:
            made["call"] = torch.cuda.make_graphed_callables(lambda *t: form(i | dict(zip(names, t, strict=True))), given)
        return made["call"](*given)

    return run


def _case(
    name: str, shape: str, mode: str, dtype: torch.dtype, items: int, unit: str, forms: dict[str, Form],
    inputs: Callable[[torch.Generator, torch.device], Inputs], *, wrt: tuple[str, ...] = ("prompt",),
    changing: tuple[str, ...] = (), kinks: bool = False, device: torch.device,
) -> Case:  # fmt: skip
    """`forms` has fastprompt, public (the truth) and frozen. kinks: the model has ReLU."""
    formula = forms["public"]
    if device.type == "cuda":
        ours = forms["fastprompt"]
        forms = forms | {"graph": _graphed(ours, (*wrt, *changing)), "compiled": torch.compile(ours)}
    if mode == "forward":
        forms, formula = {n: torch.no_grad()(form) for n, form in forms.items()}, torch.no_grad()(formula)
    tolerance = max(TOLERANCE[dtype], KINKS if kinks and mode == "both" else 0.0)
    return Case(
        family="steps", name=name, shape=shape, mode=mode, dtype=dtype, inputs=inputs, forms=forms, formula=formula, wrt=wrt,
        bytes=0, tolerance=tolerance, best=("public",), loose={"frozen": math.inf}, items=items, unit=unit,
    )  # fmt: skip


# ---- Vision models behind a prompt on the raw input ----


def _resnet(depths: tuple[int, ...], widths: tuple[int, ...], layer: str) -> Any:
    transformers = _transformers()
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=list(widths), depths=list(depths), layer_type=layer, num_labels=SOURCES
    )
    return transformers.ResNetForImageClassification(config)


_resnet18 = partial(_resnet, (2, 2, 2, 2), (64, 128, 256, 512), "basic")
_resnet50 = partial(_resnet, (3, 4, 6, 3), (256, 512, 1024, 2048), "bottleneck")


def _vit(width: int, canvas: int) -> Any:
    transformers = _transformers()
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=width // 64, intermediate_size=4 * width,
        image_size=canvas, patch_size=16, num_labels=SOURCES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _images(batch: int, size: int, canvas: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """A set on the device, a batch of it, and what the public code has of it: float images on the host."""
    images = torch.randint(256, (SET, 3, size, size), generator=generator, device=device, dtype=torch.uint8)
    rows = torch.randint(SET, (batch,), generator=generator, device=device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    return {
        "images": images, "rows": rows, "host": (images[rows] / 255).cpu(), "mean": mean, "std": std,
        "y": torch.randint(CLASSES, (batch,), generator=generator, device=device),
        "ready": torch.randn((batch, 3, canvas, canvas), generator=generator, device=device).to(dtype),
        "g": torch.ones((), device=device),
    }  # fmt: skip


def padded(
    network: str, make: Callable[[], Any], head: str, output: str, batch: int, size: int, canvas: int, dtype: torch.dtype,
    mode: str, device: torch.device, probes: int = 1,
) -> Case:  # fmt: skip
    """ILM-VP and BLM: a padded prompt, a counted map. probes: several prompts on one batch, forward only (black-box search)."""
    models = Models(make, dtype)
    made: dict[Any, Any] = {}
    low, high = (canvas - size + 1) // 2, (canvas - size) // 2

    def labels(device: torch.device) -> Any:
        if output == "ILM":
            return LabelMap(SOURCES, CLASSES, "random").to(device)
        blm = BayesianMap(SOURCES, CLASSES)
        random = torch.Generator().manual_seed(0)
        blm.reset_counts()
        blm.count(torch.randn(2000, SOURCES, generator=random), torch.randint(CLASSES, (2000,), generator=random))
        blm.refresh()
        return blm.to(device)

    def module(prompt: Tensor) -> Reprogrammed:
        if not made:
            inputs = PaddedPrompt(canvas, size, mean=MEAN, std=STD, prompts=probes, dtype=str(dtype).removeprefix("torch."))
            made["ours"] = Reprogrammed(models(prompt), inputs.to(prompt.device), labels(prompt.device), head=head)
        return made["ours"]

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        i = _images(batch, size, canvas, dtype, generator, device)
        prompt = torch.randn((probes, 3, canvas, canvas), generator=generator, device=device).to(dtype)
        mask = torch.ones((canvas, canvas), device=device)
        mask[low : low + size, low : low + size] = 0
        if probes > 1:
            i["ready"] = i["ready"].repeat(probes, 1, 1, 1)
        module(prompt)  # of this dtype, before the truth asks for its map
        return i | {"prompt": prompt.requires_grad_(mode == "both"), "mask": mask}

    def finish(i: Inputs, logits: Tensor) -> Tensor:
        return F.cross_entropy(wide(logits), i["y"]) if mode == "both" else logits

    def step(i: Inputs, x: Any) -> Tensor:
        held = {"inputs.prompt": i["prompt"]}
        return finish(i, torch.func.functional_call(module(i["prompt"]), held, (x,), tie_weights=False))

    def mapped(i: Inputs, logits: Tensor) -> Tensor:
        outputs: Any = module(i["prompt"]).outputs
        return logits[:, outputs.index] if output == "ILM" else logits @ outputs.matrix.to(logits.dtype)

    def public(i: Inputs) -> Tensor:
        x = F.pad(i["host"].to(i["prompt"].device), (low, high, low, high))
        outs = []
        for program in i["prompt"]:
            shown = (x + torch.sigmoid(program) * i["mask"]).sub(i["mean"]).div(i["std"])
            outs.append(mapped(i, models(i["prompt"])(shown.to(program.dtype)).logits))
        return finish(i, outs[0]) if probes == 1 else torch.stack(outs)

    def frozen(i: Inputs) -> Tensor:
        x = _Reached.apply(i["ready"], i["prompt"]) if mode == "both" else i["ready"]
        return finish(i, models(i["prompt"])(x).logits)

    forms: dict[str, Form] = {
        "fastprompt": lambda i: step(i, Rows(i["images"], i["rows"])),
        "host float": lambda i: step(i, i["host"].to(i["prompt"].device)),
        "public": public, "frozen": frozen,
    }  # fmt: skip
    name = f"padded + {output}" if probes == 1 else "probes"
    shape = f"{network} B={batch} 3x{size}->{canvas}" + (f" K={probes}" if probes > 1 else "")
    return _case(
        name, shape, mode, dtype, batch * probes, "samples", forms, inputs, changing=("rows", "y"),
        kinks=network.startswith("ResNet"), device=device,
    )  # fmt: skip


def masked(batch: int, canvas: int, dtype: torch.dtype, mode: str, device: torch.device) -> Case:
    """SMM on ResNet-18: a pattern times a mask that a small network makes of each image; trained: both."""
    models, nets = Models(_resnet18, dtype), Models(partial(MaskNet, 3, 3, 8), dtype)
    grid = canvas // 8

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        i = _images(batch, canvas, canvas, dtype, generator, device)
        i["host"] = ((i["host"].to(device) - i["mean"]) / i["std"]).cpu()  # the loader normalises
        prompt = torch.randn((1, 3, canvas, canvas), generator=generator, device=device).to(dtype)
        weights = torch.cat([p.detach().flatten() for p in nets(prompt).parameters()])
        both = mode == "both"
        norm = functional.normalization(MEAN, STD, device=device)
        return i | {"prompt": prompt.requires_grad_(both), "weights": weights.clone().requires_grad_(both), "norm": norm}

    def cells(i: Inputs, image: Tensor) -> Tensor:
        net: Any = nets(i["prompt"])
        names, sizes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
        parts = i["weights"].split([math.prod(size) for size in sizes])
        held = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        return torch.func.functional_call(net, held, (image,))

    def finish(i: Inputs, shown: Tensor) -> Tensor:
        logits = models(i["prompt"])(shown).logits[:, :CLASSES]
        return F.cross_entropy(wide(logits), i["y"]) if mode == "both" else logits

    def ours(i: Inputs) -> Tensor:
        image = functional.perturb(i["images"], rows=i["rows"], space="normalized", norm=i["norm"], dtype=dtype)
        return finish(i, functional.perturb(image, i["prompt"], cells=cells(i, image), dtype=dtype))

    def public(i: Inputs) -> Tensor:
        image = i["host"].to(i["prompt"].device, i["prompt"].dtype)
        spread = cells(i, image).view(batch, 3, grid, 1, grid, 1).expand(-1, -1, -1, 8, -1, 8)
        return finish(i, image + i["prompt"] * spread.reshape(image.shape))

    def frozen(i: Inputs) -> Tensor:
        prompts = i["prompt"], i["weights"]
        x = i["ready"]
        for prompt in prompts if mode == "both" else ():
            x = _Reached.apply(x, prompt)
        return finish(i, x)

    return _case(
        "smm", f"ResNet-18 B={batch} 3x{canvas} patch 8", mode, dtype, batch, "samples",
        {"fastprompt": ours, "public": public, "frozen": frozen}, inputs, wrt=("prompt", "weights"), changing=("rows", "y"),
        kinks=True, device=device,
    )  # fmt: skip


def deep(
    width: int, layers: int, batch: int, length: int, dtype: torch.dtype, mode: str, device: torch.device, canvas: int = 224
) -> Case:  # fmt: skip
    """VPT-deep on ViT/16: prompt rows in front of every block, which the public form has in every sample."""

    def make() -> Any:
        transformers = _transformers()
        config = transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
            image_size=canvas, patch_size=16,
        )  # fmt: skip
        return transformers.ViTModel(config, add_pooling_layer=False)

    models = Models(make, dtype)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        prompt = torch.randn((layers, length, width), generator=generator, device=device).to(dtype)
        images = torch.randn((batch, 3, canvas, canvas), generator=generator, device=device).to(dtype)
        return {"images": images, "prompt": prompt.requires_grad_(mode == "both"), "g": torch.ones((), device=device)}

    def finish(features: Tensor) -> Tensor:
        features = wide(features[:, 0, : width // 2])
        return features.square().sum() if mode == "both" else features

    def ours(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        with prefixed(model, _hoisted(i, mode, lambda prompt: hoist_deep(model, prompt[:, None].unbind(0)))):
            return finish(model(i["images"]).last_hidden_state)

    def public(i: Inputs) -> Tensor:
        model, rows = models(i["prompt"]), 0
        x = model.embeddings(i["images"])
        for block, own in zip(model.layers, i["prompt"], strict=True):
            x, rows = block(torch.cat([x[:, :1], own.expand(batch, -1, -1), x[:, 1 + rows :]], 1)), length
        return finish(model.layernorm(x))

    def frozen(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        x = model.embeddings(i["images"])
        x = _Reached.apply(x, i["prompt"]) if mode == "both" else x
        for block in model.layers:
            x = block(x)
        return finish(model.layernorm(x))

    return _case(
        "vpt-deep", f"ViT-{width}/16 L={layers} B={batch} P={length}", mode, dtype, batch, "samples",
        {"fastprompt": ours, "public": public, "frozen": frozen}, inputs, changing=("images",), device=device,
    )  # fmt: skip


# ---- Language models behind a prompt ----


def language(
    kind: str, batch: int, tokens: int, length: int, width: int, layers: int, dtype: torch.dtype, mode: str, device: torch.device
) -> Case:  # fmt: skip
    """A soft prompt or a tuned prefix in front of a Llama-like model, and the logits of the last two tokens."""
    heads, answer, vocabulary = width // 64, 2, 32000
    shared = max(1, heads // 4)

    def make() -> Any:
        transformers = _transformers()
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=8 * width // 3 // 8 * 8, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=shared, vocab_size=vocabulary,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    models = Models(make, dtype)
    shape = (length, width) if kind == "soft prompt" else (layers, 2, 1, shared, length, 64)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        prompt = torch.randn(shape, generator=generator, device=device).to(dtype)
        ids = torch.randint(vocabulary, (batch, tokens), generator=generator, device=device)
        return {"prompt": prompt.requires_grad_(mode == "both"), "ids": ids, "g": torch.ones((), device=device)}

    def finish(i: Inputs, hidden: Tensor) -> Tensor:
        logits = models(i["prompt"]).lm_head(hidden[:, -answer - 1 : -1]).flatten(0, 1)
        return F.cross_entropy(wide(logits), i["ids"][:, -answer:].flatten()) if mode == "both" else logits

    def ours(i: Inputs) -> Tensor:
        model, prompt = models(i["prompt"]), i["prompt"]
        prefix = [(keys, values) for keys, values in prompt] if kind == "prefix" else None
        with prefixed(model, prefix or _hoisted(i, mode, partial(hoist, model))):
            return finish(i, model.model(i["ids"], use_cache=False).last_hidden_state)

    def public(i: Inputs) -> Tensor:
        model, prompt, ids = models(i["prompt"]), i["prompt"], i["ids"]
        if kind == "soft prompt":
            rows = torch.cat([prompt.expand(batch, -1, -1), model.get_input_embeddings()(ids)], 1)
            return finish(i, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state)
        cache = _transformers().DynamicCache()
        for layer, (keys, values) in enumerate(prompt):
            cache.update(keys.repeat(batch, 1, 1, 1), values.repeat(batch, 1, 1, 1), layer)
        seen = torch.ones((batch, length + tokens), dtype=torch.int64, device=ids.device)
        return finish(i, model.model(ids, past_key_values=cache, attention_mask=seen).last_hidden_state)

    def frozen(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        rows = model.get_input_embeddings()(i["ids"])
        rows = _Reached.apply(rows, i["prompt"]) if mode == "both" else rows
        return finish(i, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state)

    return _case(
        kind, f"Llama L={layers} d={width} V={vocabulary} B={batch} T={tokens} P={length}", mode, dtype, batch * tokens, "tokens",
        {"fastprompt": ours, "public": public, "frozen": frozen}, inputs, changing=("ids",), device=device,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family steps` runs."""
    large = device.type == "cuda"
    batch, canvas, width = (256, 224, 768) if large else (16, 64, 192)
    vit = partial(_vit, width, 224 if large else 96)
    vision = (
        ("ResNet-18", _resnet18, "classifier.1", 32, canvas),
        (f"ViT-{width}/16", vit, "classifier", 192 if large else 64, 224 if large else 96),
    )
    made = []
    for mode in ("forward", "both"):
        for network, make, head, size, across in vision:
            for output in ("ILM", "BLM"):
                made.append(padded(network, make, head, output, batch, size, across, dtype, mode, device))
        made.append(masked(batch, canvas, dtype, mode, device))
        made.append(deep(width, 12, 256 if large else 4, 50, dtype, mode, device))
        sizes = (32, 128, 100, 2048, 16) if large else (8, 32, 20, 256, 4)
        made += [language(kind, *sizes, dtype, mode, device) for kind in ("prefix", "soft prompt")]
    made.append(padded("ResNet-18", _resnet18, "classifier.1", "ILM", batch // 4, 32, canvas, dtype, "forward", device, probes=4))
    for mode in ("forward", "both"):
        made.append(padded("ResNet-50", _resnet50, "classifier.1", "ILM", batch, 32, canvas, dtype, mode, device))
    return made
