"""A context of 512 tokens in front of 16 queries of 32: logits behind each query, on a model of transformers with random weights.

The context is run before the clock starts, but for `tokens`, which runs it again in every sample. Rivals that keep it, too, as
transformers has it: `cache`, a DynamicCache of batch 1, copied and repeated for each batch; `cache crop`, one of the whole
batch, cut back to the context after each. `frozen` is the model without a
context (another answer). `groups` is structured prompting, whose `cache` adds log M to a mask. Ours gets
queries as text and tokenises them, with a tokenizer that reads numbers; rivals get ids.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastprompt.instruction import Demonstrations, Instructed

from .reprogrammed import Models, _transformers, llama_like
from .suite import Case, Form, Inputs

WIDTH, LAYERS, VOCABULARY = 384, 8, 32000
BATCH, QUERIES, CONTEXT, STEPS, GROUPS, CONTEXTS = 16, 32, 512, 8, 4, 4


class Numbers:
    """A tokenizer whose texts are ids."""

    bos_token_id = pad_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(int, text.split()))


@functools.cache
def _models(dtype: torch.dtype) -> Models:
    return Models(functools.partial(llama_like, WIDTH, LAYERS, VOCABULARY), dtype)


def _contexts(count: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def _text(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def instruction(name: str, dtype: torch.dtype, *, groups: int = 1, contexts: int = 1, steps: int = 0) -> Case:
    """groups: of one context; contexts: that many, each for as many of the queries; steps: single tokens with a cache."""
    models, made = _models(dtype), {}
    parts = _contexts(groups * contexts, CONTEXT // groups)
    each = BATCH // contexts

    def once(what: str, i: Inputs, make: Callable[[Any], Any]) -> Any:
        """What is made before the clock starts: the check of the answer runs first."""
        key = what, i["like"].dtype
        if key not in made:
            with torch.no_grad():
                made[key] = make(models(i["like"]))
        return made[key]

    def nearest(texts: list[str]) -> Tensor:
        """Whose number is first: of a context, or of the query's context."""
        return torch.eye(contexts)[[int(text.split()[0]) % contexts for text in texts]]

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        ids = torch.randint(VOCABULARY // contexts, (BATCH, QUERIES + steps), generator=generator, device=device) * contexts
        ids[:, 0] += torch.arange(contexts, device=device).repeat_interleave(each)
        return {"ids": ids, "texts": [_text(row) for row in ids[:, :QUERIES]], "like": torch.zeros(1, device=device, dtype=dtype)}

    def on(model: Any) -> Instructed:
        examples = [{"text": str(i % contexts), "label": _text(part[1:])} for i, part in enumerate(parts)]
        options = {"encoder": nearest, "k": 1} if contexts > 1 else {"groups": groups}
        return Demonstrations(examples, "{text} {label}", separator="\n", **options).on(model, Numbers())  # type: ignore[arg-type]

    def ids_of(row: int, device: torch.device) -> Tensor:
        """[groups, tokens]: the context of a query."""
        number = row // each
        ids = parts[number * groups : (number + 1) * groups].clone()
        ids[:, 0] = torch.arange(number * groups, (number + 1) * groups) % contexts
        return ids.to(device)

    def walk(model: Any, i: Inputs, cache: Any, first: Tensor, **how: Any) -> Tensor:
        out = model(first, past_key_values=cache, use_cache=steps > 0, logits_to_keep=1, **how).logits[:, -1]
        for t in range(QUERIES, QUERIES + steps):
            out = model(i["ids"][:, t : t + 1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return out

    @torch.no_grad()
    def ours(i: Inputs) -> Tensor:
        ready = once("ready", i, on)
        if not steps:
            return ready.logits(i["texts"])
        with ready.reading(i["texts"]) as batch:
            return walk(ready.model, i, _transformers().DynamicCache(), batch["input_ids"])

    @torch.no_grad()
    def tokens(i: Inputs) -> Tensor:
        rows = torch.cat([torch.cat([ids_of(row, i["ids"].device)[0] for row in range(BATCH)]).view(BATCH, -1), i["ids"]], 1)
        model = models(i["like"])
        cache = _transformers().DynamicCache() if steps else None
        return walk(model, i, cache, rows[:, : CONTEXT + QUERIES])

    def encoded(model: Any, row: int) -> Any:
        """A cache of the context of a query, its groups side by side."""
        ids = ids_of(row, model.device)
        cache = _transformers().DynamicCache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        joined = _transformers().DynamicCache()
        for place, layer in enumerate(cache.layers):
            both = (t.transpose(0, 1).flatten(1, 2)[None] for t in (layer.keys, layer.values))
            joined.update(*both, place)
        return joined

    def with_bias(model: Any) -> dict[str, Tensor]:
        if groups == 1:
            return {}
        bias = torch.full((QUERIES, QUERIES), -torch.inf).triu(1) + math.log(groups)
        bias = torch.cat([torch.zeros(QUERIES, CONTEXT), bias], 1)[None, None].to(model.device, model.dtype)
        start = CONTEXT // groups
        return {
            "attention_mask": bias.expand(BATCH, 1, -1, -1),
            "position_ids": torch.arange(start, start + QUERIES, device=model.device)[None],
        }

    @torch.no_grad()
    def cached(i: Inputs) -> Tensor:
        model = models(i["like"])
        kept = once("cache", i, lambda model: [encoded(model, row) for row in range(0, BATCH, each)])
        how, outs = once("bias", i, with_bias), []
        for number, one in enumerate(kept):
            cache = copy.deepcopy(one)
            cache.batch_repeat_interleave(each)
            outs.append(walk(model, i, cache, i["ids"][number * each : (number + 1) * each, :QUERIES], **how))
        return torch.cat(outs)

    @torch.no_grad()
    def cropped(i: Inputs) -> Tensor:
        def make(model: Any) -> Any:
            cache = encoded(model, 0)
            cache.batch_repeat_interleave(BATCH)
            return cache

        model, cache = models(i["like"]), once("whole cache", i, make)
        out = walk(model, i, cache, i["ids"][:, :QUERIES], **once("bias", i, with_bias))
        cache.crop(-QUERIES - steps)
        return out

    @torch.no_grad()
    def frozen(i: Inputs) -> Tensor:
        cache = _transformers().DynamicCache() if steps else None
        return walk(models(i["like"]), i, cache, i["ids"][:, :QUERIES])

    forms: dict[str, Form] = {"fastprompt": ours}
    if groups == 1 and not steps:
        forms["tokens"] = tokens
    forms["cache"] = cached
    if contexts == 1:
        forms["cache crop"] = cropped
    best = tuple(forms)[-1:]
    forms["frozen"] = frozen
    matrices = LAYERS * (WIDTH * (2 * WIDTH + 2 * 128) + 3 * WIDTH * 1024)
    rows = BATCH * (QUERIES + steps)
    more = "".join(f" {n}={v}" for n, v, least in (("M", groups, 1), ("contexts", contexts, 1), ("steps", steps, 0)) if v > least)
    return Case(
        family="instruction", name=name, shape=f"Llama L=8 d=384 V=32000 B={BATCH} T={QUERIES} P={CONTEXT}{more}", mode="forward",
        dtype=dtype, inputs=inputs, forms=forms, formula=cached if groups > 1 else tokens, wrt=(),
        bytes=(matrices + WIDTH * VOCABULARY) * dtype.itemsize,
        flops=2 * rows * matrices + 4 * rows * (CONTEXT + QUERIES // 2) * WIDTH * LAYERS + 2 * BATCH * WIDTH * VOCABULARY,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, best=best, loose={"frozen": math.inf},
    )  # fmt: skip


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family instruction` runs."""
    return [
        instruction("demonstrations", dtype),
        instruction("retrieved", dtype, contexts=CONTEXTS),
        instruction("groups", dtype, groups=GROUPS),
        instruction("decoding", dtype, steps=STEPS),
    ]
