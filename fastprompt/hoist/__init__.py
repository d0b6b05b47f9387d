"""Hoisting: a prompt's keys and values made once, by a frozen model of transformers, instead of once a sample.

    kv = hoist(model, soft_prompt())             causal model: one run of the model on the prompt, at batch size 1
    kv = hoist_deep(model, deep_prompt())        VPT-deep: each block's own norm and projections on its tokens
    kv = prefix_kv()                             prefix tuning: trained keys and values
    with prefixed(model, kv):
        loss = model(input_ids=ids, labels=labels).loss

It is exact because a prompt acts on the other tokens only through the keys and values that they read, and these do not
depend on the other tokens. Where they do, or where something else reads the prompt's rows, it is refused; `fallback="tokens"`
then puts the prompt into every sample instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprompt.functional.checks import bad
from fastprompt.hoist.interface import Given, Inexact, KeyValue, attend
from fastprompt.hoist.tokens import Tokens
from fastprompt.hoist.wiring import Hoisted, Reading, Wiring, check_deep, check_exact

__all__ = [
    "Given", "Hoisted", "Inexact", "KeyValue", "Reading", "Tokens", "Wiring", "attend", "check_deep", "check_exact", "hoist",
    "hoist_deep", "prefixed",
]  # fmt: skip


def _fallback(fallback: str | None) -> bool:
    if fallback not in (None, "tokens"):
        raise bad("fallback", 'None or "tokens"', repr(fallback))
    return fallback is not None


def hoist(model: nn.Module, prompt: Tensor, *, fallback: str | None = None) -> Hoisted | Tokens:
    """The keys and values of a prompt in front of a causal model, from one run on the prompt alone.

    Under a causal mask nothing that follows changes the prompt's rows, so one run serves every sample, and the prompt's
    gradient is the sum over samples that this run's backward gets. The keys are rotated, or the positions added, as at
    positions 0 to P - 1; `prefixed` lets the samples start at P.

    Args:
        model: a causal model of transformers. Its parameters need not be frozen here; gradients go where they are asked for.
        prompt: embeddings [P, width] or [N, P, width], as `fastprompt.nn.SoftPrompt` gives them, or token ids, int64 [P] or
            [N, P], for cached demonstrations and for `PrefixKV`'s init.
        fallback: "tokens": where hoisting is not exact, return the prompt as tokens, which `prefixed` puts into every sample.

    Returns:
        L pairs (keys, values) of [N, Hkv, P, D], or `Tokens`.

    Raises:
        Inexact (a ValueError): bidirectional attention; sliding windows, recurrent or cross-attention layers; dropout active
            inside the model; experts with a capacity limit.
    """
    if prompt.dim() not in ((1, 2) if prompt.dtype == torch.int64 else (2, 3)):
        raise bad("prompt", "embeddings [N, P, width] or ids [N, P]", f"{prompt.dtype} {list(prompt.shape)}")
    ids = prompt.dtype == torch.int64
    prompt = prompt[None] if prompt.dim() == (1 if ids else 2) else prompt
    allowed = _fallback(fallback)
    try:
        wiring = Wiring(model)
        with wiring.attention():
            return wiring.shallow(prompt)[0]
    except Inexact:
        if not allowed:
            raise
        return Tokens(model.get_input_embeddings()(prompt) if ids else prompt)  # type: ignore[operator]


def hoist_deep(
    model: nn.Module, prompts: Sequence[Tensor | None], *, reads_prompt: bool = False, fallback: str | None = None
) -> Hoisted | Tokens:
    """The keys and values of tokens that every block gets anew, by each block's own norm and projections.

    A deep prompt's rows are thrown away after the block, so only its keys and values matter, and they are the same for the
    batch. Exact for bidirectional and causal blocks alike, when the block needs nothing but its input (no rotary positions).

    Args:
        model: a model of transformers, such as ViT or BERT.
        prompts: one [N, P, width] a block, as `fastprompt.nn.DeepPrompt` gives them; None only for the first blocks.
        reads_prompt: the task reads the prompt's last rows (prompt pooling).
        fallback: "tokens": where this is not exact, return the prompts as tokens, which `prefixed` puts into every sample.

    Returns:
        L pairs (keys, values) of [N, H, P, D] (None where there is no prompt), or `Tokens`.

    Raises:
        Inexact (a ValueError): a block without a prompt after one with (it reads the earlier prompt's rows), prompt pooling,
            dropout active inside the model, experts with a capacity limit.
    """
    allowed = _fallback(fallback)
    try:
        wiring = Wiring(model)
        with wiring.attention():
            return wiring.deep(prompts, reads_prompt)
    except Inexact:
        if not allowed:
            raise
        return Tokens(None, list(prompts), reads_prompt)


@contextmanager
def prefixed(
    model: nn.Module, prefix: Sequence[KeyValue | None] | Tokens, *, index: Tensor | None = None, lengths: Tensor | None = None,
    offset: int | None = None,
) -> Iterator[nn.Module]:  # fmt: skip
    """Every call of the model inside sees the prefix in front of its own keys; also `generate`, with any cache.

    Masks and labels are those of the samples alone, without columns for the prefix. With gradient checkpointing the model
    keeps this attention function afterwards (without a prefix it is plain attention), because backward runs blocks again;
    with transformers before 5.23 it has to run inside.

    Args:
        model: a model of transformers.
        prefix: L pairs (keys, values) [N, Hkv, P, D], from `hoist`, `hoist_deep` or `fastprompt.nn.PrefixKV`; or `Tokens`.
        index: int64 [B], each sample's prefix; -1: none.
        lengths: int64 [N], how many tokens of each prefix there are.
        offset: the position of a sample's first token. Default: P, as behind a cache of that length (with lengths, each
            sample's own); 0 for a deep prompt, which takes no positions.

    Raises:
        ValueError: a prefix that does not fit the model, or a model that has one already.
    """
    if isinstance(prefix, Tokens) and (index is not None or lengths is not None or offset is not None):
        raise bad("index, lengths, offset", "None for a prompt as tokens", "at least one")
    wiring, reading = Wiring(model), Reading(prefix, index, lengths, offset)
    if not isinstance(prefix, Tokens):
        wiring.shift(reading)
    with wiring.reading(lambda kwargs: reading):
        yield model
