"""Training steps of whole frozen models with a prompt inside, on models of transformers with random weights.

Rivals: `tokens`, VPT's loop, prompt rows in every sample; `peft`, PEFT's prompt tuning. `frozen` is the same model without a
prompt, with a gradient for its first rows: time over it is what the prompt costs. It has another answer by design.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt.hoist import hoist, hoist_deep, prefixed

from .suite import Case, Form, Inputs, Skip


class Models:
    """A frozen model in each dtype that is asked for, made on first use."""

    def __init__(self, make: Callable[[], Any], dtype: torch.dtype) -> None:
        self.make, self.dtype = make, dtype
        self.made: dict[torch.dtype, Any] = {}

    def __call__(self, prompt: Tensor) -> Any:
        if not self.made:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.made[self.dtype] = self.make().eval().requires_grad_(False).to(prompt.device, self.dtype)
        if prompt.dtype not in self.made:
            self.made[prompt.dtype] = copy.deepcopy(self.made[self.dtype]).to(prompt.dtype)
        return self.made[prompt.dtype]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as missing:
        raise Skip("transformers is not installed") from missing
    return transformers


# ---- VPT-deep ----


def vpt_deep(width: int, layers: int, batch: int, length: int, dtype: torch.dtype, mode: str) -> Case:
    """ViT/16 at 224: a loss of half the CLS features (all of them squared would be constant), and the prompts' gradient."""

    def make() -> Any:
        transformers = _transformers()
        config = transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
            image_size=224, patch_size=16,
        )  # fmt: skip
        return transformers.ViTModel(config, add_pooling_layer=False)

    models = Models(make, dtype)

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        prompt = torch.randn((layers, length, width), **make).to(dtype).requires_grad_()
        g = torch.ones((), device=device, dtype=dtype)
        return {"images": torch.randn((batch, 3, 224, 224), **make).to(dtype), "prompt": prompt, "g": g}

    def loss(features: Tensor) -> Tensor:
        return features[:, 0, : width // 2].square().sum()

    def ours(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        with prefixed(model, hoist_deep(model, i["prompt"][:, None].unbind(0))):  # type: ignore[arg-type]
            return loss(model(i["images"]).last_hidden_state)

    def tokens(i: Inputs) -> Tensor:
        model, prompt = models(i["prompt"]), i["prompt"]
        x, rows = model.embeddings(i["images"]), 0
        for block, own in zip(model.layers, prompt, strict=True):
            x = block(torch.cat([x[:, :1], own.expand(batch, -1, -1), x[:, 1 + rows :]], 1))
            rows = length
        return loss(model.layernorm(x))

    def frozen(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        x = model.embeddings(i["images"]) + 0 * i["prompt"][0, 0]
        for block in model.layers:
            x = block(x)
        return loss(model.layernorm(x))

    rows = batch * 197
    once = 2 * rows * 12 * width**2 * layers + 4 * rows * (197 + length) * width * layers
    return Case(
        family="reprogrammed", name="vpt-deep", shape=f"ViT-{width}/16 L={layers} B={batch} P={length}", mode=mode, dtype=dtype,
        inputs=inputs, forms={"fastprompt": ours, "tokens": tokens, "frozen": frozen}, formula=tokens, wrt=("prompt",),
        bytes=12 * width**2 * layers * dtype.itemsize, flops=once * (2 if mode == "both" else 1), best=("tokens",),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, loose={"frozen": math.inf},
    )  # fmt: skip


# ---- Soft prompts in a causal model ----


def soft_prompt(batch: int, queries: int, length: int, dtype: torch.dtype) -> Case:
    """Llama-like, 8 layers, width 384, 6 heads on 2, V = 32,000: cross-entropy of the last two tokens, and its gradient."""
    width, layers, vocabulary, answer = 384, 8, 32000, 2

    def make() -> Any:
        transformers = _transformers()
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
            vocab_size=vocabulary,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    models = Models(make, dtype)
    adapted: dict[torch.dtype, Any] = {}

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        prompt = torch.randn((length, width), **make).to(dtype).requires_grad_()
        ids = torch.randint(vocabulary, (batch, queries), **make)
        return {"ids": ids, "prompt": prompt, "g": torch.ones((), device=device, dtype=dtype)}

    def head(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """Only the rows that carry a label meet the vocabulary."""
        logits = model.lm_head(hidden[:, -answer - 1 : -1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -answer:].flatten())

    def ours(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        with prefixed(model, hoist(model, i["prompt"])):
            return head(model, model.model(i["ids"], use_cache=False).last_hidden_state, i["ids"])

    def tokens(i: Inputs) -> Tensor:
        """Plain concatenation, with the same head: the truth, and what is left of the gain without PEFT's full head."""
        model = models(i["prompt"])
        rows = torch.cat([i["prompt"].expand(batch, -1, -1), model.get_input_embeddings()(i["ids"])], 1)
        return head(model, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state, i["ids"])

    def peft(i: Inputs) -> Tensor:
        try:
            from peft import PromptTuningConfig, get_peft_model
        except ImportError as missing:
            raise Skip("peft is not installed") from missing
        prompt, ids = i["prompt"], i["ids"]
        if prompt.dtype not in adapted:
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
            adapted[prompt.dtype] = get_peft_model(copy.deepcopy(models(prompt)), config).eval()
        labels = torch.where(torch.arange(queries, device=ids.device) < queries - answer, -100, ids)
        own = {"prompt_encoder.default.embedding.weight": prompt}
        settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return torch.func.functional_call(adapted[prompt.dtype], own, (), settings).loss

    def frozen(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        rows = model.get_input_embeddings()(i["ids"]) + 0 * i["prompt"][0]
        return head(model, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state, i["ids"])

    forms: dict[str, Form] = {"fastprompt": ours, "peft": peft, "tokens": tokens, "frozen": frozen}
    matrices = layers * (width * (2 * width + 2 * 128) + 3 * width * 1024)
    own = 2 * (batch * queries + length) * matrices + 2 * batch * answer * width * vocabulary
    return Case(
        family="reprogrammed", name="soft prompt", shape=f"Llama L=8 d=384 V=32000 B={batch} T={queries} P={length}", mode="both",
        dtype=dtype, inputs=inputs, forms=forms, formula=tokens, wrt=("prompt",), bytes=matrices * dtype.itemsize, flops=2 * own,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, best=("peft", "tokens"), loose={"frozen": math.inf},
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family reprogrammed` runs."""
    small = partial(vpt_deep, 384, 12, 16, dtype=dtype)
    made = [small(length=length, mode=mode) for length in (50, 100) for mode in ("both", "forward")]
    made.append(soft_prompt(16, 64, 100, dtype))
    if device.type == "cuda":
        made += [vpt_deep(768, 12, 256, length, dtype, "both") for length in (10, 50, 100)]
        made += [soft_prompt(32, 128, 100, dtype)]
    return made


# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "vpt-deep": lambda dtype, d=384, L=12, B=16, P=50: [vpt_deep(d, L, B, P, dtype, mode) for mode in ("both", "forward")],
    "soft prompt": lambda dtype, B=16, T=64, P=100: [soft_prompt(B, T, P, dtype)],
}
