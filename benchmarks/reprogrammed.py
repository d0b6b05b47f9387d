"""Training steps of whole frozen models with a prompt inside, on models of transformers with random weights.

fastprompt comes in through `attach` and `accelerate`. Rivals: `tokens`, VPT's loop, prompt rows in every sample; `peft`, PEFT
itself. `frozen` is the same model without a prompt, with a gradient for its first rows: time over it is what the prompt costs.
It has another answer by design.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastprompt import attach
from fastprompt.integrations.peft import accelerate
from fastprompt.nn import DeepPrompt, SoftPrompt

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
                with torch.device(prompt.device):  # random numbers for a billion weights take a host core a minute
                    model = self.make()
                self.made[self.dtype] = model.eval().requires_grad_(False).to(prompt.device, self.dtype)
        if prompt.dtype not in self.made:
            self.made[prompt.dtype] = copy.deepcopy(self.made[self.dtype]).to(prompt.dtype)
        return self.made[prompt.dtype]


class Prompted(nn.Module):
    """A model and the prompt that is attached to it, so that `functional_call` can give both its values."""

    def __init__(self, model: Any, prompt: nn.Module) -> None:
        super().__init__()
        self.model, self.prompts = twin(model), prompt
        attach(self.model, self.prompts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def twin(model: Any) -> Any:
    """A copy with the same tensors."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def adapted(model: Any, length: int, kind: str = "PromptTuningConfig", logits: str | None = None) -> Any:
    """A model of PEFT over the same weights; with `logits` on fastprompt's path."""
    try:
        import peft
    except ImportError as missing:
        raise Skip("peft is not installed") from missing
    made = peft.get_peft_model(twin(model), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=length)).eval()
    if logits is not None:
        accelerate(made, logits=logits)
    return made


def peft_loss(model: Any, prompt: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    own = {"prompt_encoder.default.embedding.weight": prompt}
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
    return functional_call(model, own, (), settings).loss


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
    attached: list[Prompted] = []

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        prompt = torch.randn((layers, length, width), **make).to(dtype).requires_grad_()
        g = torch.ones((), device=device, dtype=dtype)
        return {"images": torch.randn((batch, 3, 224, 224), **make).to(dtype), "prompt": prompt, "g": g}

    def loss(features: Tensor) -> Tensor:
        return features[:, 0, : width // 2].square().sum()

    def ours(i: Inputs) -> Tensor:
        if not attached:
            attached.append(Prompted(models(i["prompt"]), DeepPrompt(layers, length, width).to(i["prompt"])))
        return loss(functional_call(attached[0], {"prompts.prompt": i["prompt"]}, (i["images"],)).last_hidden_state)

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


def llama_like(width: int, layers: int, vocabulary: int) -> Any:
    transformers = _transformers()
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=vocabulary,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def soft_prompt(batch: int, queries: int, length: int, dtype: torch.dtype) -> Case:
    """Llama-like, 8 layers, width 384, 6 heads on 2, V = 32,000: cross-entropy of the last two tokens, and its gradient."""
    width, layers, vocabulary, answer = 384, 8, 32000, 2
    models = Models(partial(llama_like, width, layers, vocabulary), dtype)
    made: dict[str, Any] = {}

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        prompt = torch.randn((length, width), **make).to(dtype).requires_grad_()
        ids = torch.randint(vocabulary, (batch, queries), **make)
        return {"ids": ids, "prompt": prompt, "g": torch.ones((), device=device, dtype=dtype)}

    def head(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """Only the rows that carry a label meet the vocabulary."""
        logits = model.lm_head(hidden[:, -answer - 1 : -1].flatten(0, 1))
        return F.cross_entropy(logits, ids[:, -answer:].flatten())

    def labels(ids: Tensor) -> Tensor:
        return torch.where(torch.arange(queries, device=ids.device) < queries - answer, -100, ids)

    def ours(i: Inputs) -> Tensor:
        if "ours" not in made:
            made["ours"] = adapted(models(i["prompt"]), length, logits="labelled")
        return peft_loss(made["ours"], i["prompt"], i["ids"], labels(i["ids"]))

    def attached(i: Inputs) -> Tensor:
        if "attached" not in made:
            made["attached"] = Prompted(models(i["prompt"]).model, SoftPrompt(length, width).to(i["prompt"]))
        own, settings = {"prompts.prompt": i["prompt"][None]}, {"input_ids": i["ids"], "use_cache": False}
        hidden = functional_call(made["attached"], own, (), settings).last_hidden_state
        return head(models(i["prompt"]), hidden, i["ids"])

    def tokens(i: Inputs) -> Tensor:
        """Plain concatenation, with the same head: the truth, and what is left of the gain without PEFT's full head."""
        model = models(i["prompt"])
        rows = torch.cat([i["prompt"].expand(batch, -1, -1), model.get_input_embeddings()(i["ids"])], 1)
        return head(model, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state, i["ids"])

    def peft(i: Inputs) -> Tensor:
        if "peft" not in made:
            made["peft"] = adapted(models(i["prompt"]), length)
        return peft_loss(made["peft"], i["prompt"], i["ids"], labels(i["ids"]))

    def frozen(i: Inputs) -> Tensor:
        model = models(i["prompt"])
        rows = model.get_input_embeddings()(i["ids"]) + 0 * i["prompt"][0]
        return head(model, model.model(inputs_embeds=rows, use_cache=False).last_hidden_state, i["ids"])

    forms: dict[str, Form] = {"fastprompt": ours, "attach": attached, "peft": peft, "tokens": tokens, "frozen": frozen}
    matrices = layers * (width * (2 * width + 2 * 128) + 3 * width * 1024)
    own = 2 * (batch * queries + length) * matrices + 2 * batch * answer * width * vocabulary
    return Case(
        family="reprogrammed", name="soft prompt", shape=f"Llama L=8 d=384 V=32000 B={batch} T={queries} P={length}", mode="both",
        dtype=dtype, inputs=inputs, forms=forms, formula=tokens, wrt=("prompt",), bytes=matrices * dtype.itemsize, flops=2 * own,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, best=("peft", "tokens"), loose={"frozen": math.inf},
    )  # fmt: skip


# ---- PEFT before and after ----


def adapter(kind: str, batch: int, queries: int, length: int, dtype: torch.dtype, small: bool) -> Case:
    """A step of a PEFT model with a label for every token but the first, as Llama-3.2-1B is built (small: two thin layers)."""
    width, layers, heads, kv_heads, vocabulary = (256, 2, 8, 2, 2048) if small else (2048, 16, 32, 8, 128256)
    prefix = kind == "PrefixTuningConfig"
    shape = (length, 2 * layers * kv_heads * width // heads) if prefix else (length, width)

    def make() -> Any:
        transformers = _transformers()
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=131072,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    models, made = Models(make, dtype), dict[str, Any]()

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        make: dict[str, Any] = {"generator": generator, "device": device}
        ids = torch.randint(vocabulary, (batch, queries), **make)
        labels = torch.cat([ids.new_full((batch, 1), -100), ids[:, 1:]], 1)
        prompt = torch.randn(shape, **make).to(dtype).requires_grad_()
        return {"ids": ids, "labels": labels, "prompt": prompt, "g": torch.ones((), device=device, dtype=dtype)}

    def form(logits: str | None, i: Inputs) -> Tensor:
        if str(logits) not in made:
            made[str(logits)] = adapted(models(i["prompt"]), length, kind, logits)
        return peft_loss(made[str(logits)], i["prompt"], i["ids"], i["labels"])

    def formula(i: Inputs) -> Tensor:
        """A sample at a time, or float64 has no room: a plain cache, or the prompt's rows in front."""
        model = models(i["prompt"])

        def one(prompt: Tensor, ids: Tensor) -> Tensor:
            if prefix:
                pairs = prompt.unflatten(1, (layers, 2, kv_heads, -1)).permute(1, 2, 3, 0, 4)[:, :, None]
                cache = _transformers().DynamicCache()
                for place, (keys, values) in enumerate(pairs):
                    cache.update(keys, values, place)
                logits = model(ids, past_key_values=cache).logits
            else:
                rows = torch.cat([prompt[None], model.get_input_embeddings()(ids)], 1)
                logits = model(inputs_embeds=rows, use_cache=False).logits[:, length:]
            return F.cross_entropy(logits[0, :-1], ids[0, 1:])

        return torch.stack([checkpoint(one, i["prompt"], ids[None], use_reentrant=False) for ids in i["ids"]]).mean()

    matrices = layers * (2 * width**2 * (1 + kv_heads / heads) + 12 * width**2) + width * vocabulary
    rows = batch * queries + (0 if prefix else length)
    return Case(
        family="reprogrammed", name="prefix tuning" if prefix else "prompt tuning", mode="both", dtype=dtype, inputs=inputs,
        shape=f"Llama L={layers} d={width} V={vocabulary} B={batch} T={queries} P={length}", formula=formula, wrt=("prompt",),
        forms={"fastprompt": partial(form, "all"), "labelled": partial(form, "labelled"), "peft": partial(form, None)},
        bytes=int(matrices) * dtype.itemsize, flops=int(4 * rows * matrices), best=("peft",),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family reprogrammed` runs."""
    row = partial(vpt_deep, 384, 12, 16, dtype=dtype)
    made = [row(length=length, mode=mode) for length in (50, 100) for mode in ("both", "forward")]
    made.append(soft_prompt(16, 64, 100, dtype))
    small = device.type != "cuda"
    for kind in ("PromptTuningConfig", "PrefixTuningConfig"):
        for batch, queries, length in ((4, 210, 200), (32, 128, 100), (8, 2048, 128)):
            made.append(adapter(kind, batch // 4 if small else batch, queries, length, dtype, small))
    if not small:
        made += [vpt_deep(768, 12, 256, length, dtype, "both") for length in (10, 50, 100)]
        made += [soft_prompt(32, 128, 100, dtype)]
    return made


# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "vpt-deep": lambda dtype, d=384, L=12, B=16, P=50: [vpt_deep(d, L, B, P, dtype, mode) for mode in ("both", "forward")],
    "soft prompt": lambda dtype, B=16, T=64, P=100: [soft_prompt(B, T, P, dtype)],
}
