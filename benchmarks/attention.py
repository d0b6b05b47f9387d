"""Attention over a shared prefix against what a user would run instead.

Rivals: `concat`, the prefix copied in front of every sample's keys, then PyTorch's attention with the mask that it handles
best (`causal_lower_right`; on a CPU that is a dense mask made on each call); `dense mask`, the same with a boolean mask that
was made before; `eager`, scores, softmax and weighted sum spelt out. On a GPU `flash` and `cuDNN` fix the backend and `flex`
is FlexAttention with a block mask; `unshared` is fastprompt's own kernel told that every sample has a prefix of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fastprompt.functional import prefix_attention

from .suite import Case, Form, Inputs, Skip

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
STEP = ("forward", "backward")
TRAINED = ("q", "k", "v", "prefix_k", "prefix_v")


def _joined(i: Inputs) -> tuple[Tensor, Tensor]:
    batch = i["q"].shape[0]
    prefixes = (i[name].expand(batch, -1, -1, -1) for name in ("prefix_k", "prefix_v"))
    k, v = (torch.cat([ours, i[name]], 2) for ours, name in zip(prefixes, ("k", "v"), strict=True))
    return k, v


def _on(i: Inputs, backend: SDPBackend | None) -> contextlib.AbstractContextManager[Any]:
    if backend is None:
        return contextlib.nullcontext()
    if not i["q"].is_cuda:
        raise Skip("a GPU backend")
    return sdpa_kernel(backend)


def _attention(i: Inputs, mask: Any, backend: SDPBackend | None = None) -> Tensor:
    k, v = _joined(i)
    with _on(i, backend):
        return F.scaled_dot_product_attention(i["q"], k, v, attn_mask=mask, enable_gqa=i["q"].shape[1] != k.shape[1])


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(queries: int, rows: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + rows + keys - queries

    return create_block_mask(seen, None, None, queries, rows + keys, device=device)


def shared(
    name: str, batch: int, heads: tuple[int, int], queries: int, keys: int, rows: int, width: int, dtype: torch.dtype,
    modes: tuple[str, ...], *, causal: bool = False, wrt: tuple[str, ...] = TRAINED,
) -> list[Case]:  # fmt: skip
    """Queries [batch, heads[0], queries, width] over a prefix of `rows` and own keys [batch, heads[1], keys, width]."""
    causal = causal and queries > 1

    def inputs(generator: torch.Generator, device: torch.device) -> Inputs:
        def normal(samples: int, count: int, length: int) -> Tensor:
            t = torch.randn((samples, length, count, width), generator=generator, device=device).to(dtype)
            return t.transpose(1, 2)  # as a linear layer leaves it

        made: Inputs = {"q": normal(batch, heads[0], queries), "g": normal(batch, heads[0], queries)}
        made |= {n: normal(batch, heads[1], keys) for n in ("k", "v")}
        made |= {n: normal(1, heads[1], rows).contiguous() for n in ("prefix_k", "prefix_v")}
        made["mask"] = torch.ones((queries, rows + keys), dtype=torch.bool, device=device).tril(rows + keys - queries)
        for n in wrt:
            made[n].requires_grad_()
        return made

    def ours(i: Inputs, impl: str = "auto") -> Tensor:
        return prefix_attention(i["q"], i["k"], i["v"], i["prefix_k"], i["prefix_v"], causal=causal, impl=impl)

    def concat(i: Inputs, backend: SDPBackend | None = None) -> Tensor:
        return _attention(i, causal_lower_right(queries, rows + keys) if causal else None, backend)

    def dense(i: Inputs, backend: SDPBackend | None = None) -> Tensor:
        return _attention(i, i["mask"] if causal else None, backend)

    def eager(i: Inputs) -> Tensor:
        k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in _joined(i))
        scores = i["q"] @ k.transpose(2, 3) * width**-0.5
        scores = scores.masked_fill(~i["mask"], -torch.inf) if causal else scores
        return torch.softmax(scores, -1) @ v

    def flex(i: Inputs) -> Tensor:
        if not i["q"].is_cuda:
            raise Skip("FlexAttention has no backward on a CPU")
        k, v = _joined(i)
        mask = _block_mask(queries, rows, keys, i["q"].device) if causal else None
        return _flex()(i["q"], k, v, block_mask=mask, enable_gqa=heads[0] != heads[1])

    def unshared(i: Inputs) -> Tensor:
        if not i["q"].is_cuda:
            raise Skip("a GPU kernel")
        own = [i[n].expand(batch, -1, -1, -1) for n in ("prefix_k", "prefix_v")]
        return prefix_attention(i["q"], i["k"], i["v"], *own, causal=causal)

    forms: dict[str, Form] = {"fastprompt": ours, "concat": concat, "eager": eager}
    if causal:
        forms["dense mask"] = dense
    forms |= {
        "flash": partial(concat, backend=SDPBackend.FLASH_ATTENTION),
        "cuDNN": partial(dense, backend=SDPBackend.CUDNN_ATTENTION), "flex": flex, "unshared": unshared,
    }  # fmt: skip
    area = queries * (rows + keys) - (queries * (queries - 1) // 2 if causal else 0)
    flops = 4 * batch * heads[0] * area * width
    once = (batch * (2 * heads[0] * queries + 2 * heads[1] * keys) + 2 * heads[1] * rows) * width * dtype.itemsize
    case = partial(
        Case, family="attention", name=name, dtype=dtype, inputs=inputs, forms=forms, wrt=wrt, tolerance=TOLERANCE[dtype],
        formula=partial(ours, impl="torch"), best=("concat", "dense mask"),
        shape=f"B={batch} H={heads[0]}/{heads[1]} T={queries} S={keys} P={rows} D={width}{' causal' * causal}",
    )  # fmt: skip
    cost = {"forward": (once, flops), "backward": (2 * once, 5 * flops // 2), "both": (3 * once, 7 * flops // 2)}
    return [case(mode=mode, bytes=cost[mode][0], flops=cost[mode][1]) for mode in modes]


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What `python -m benchmarks --family attention` runs."""
    step = STEP
    make: Callable[..., list[Case]] = partial(shared, dtype=dtype)
    if device.type == "cuda":
        made = [make("Llama", 8, (32, 8), 2048, 2048, p, 128, modes=step, causal=True) for p in (32, 128)]
        made += [make("ViT-B", 256, (12, 12), 197, 197, p, 64, modes=step) for p in (10, 50, 100)]
        made += [make("decode", 64, (32, 8), 1, 2048, 1024, 128, modes=("forward",))]
        made += [make("decode", 64, (32, 8), 1, 128, 1024, 128, modes=("forward",))]
        made += [make("decode guard", b, (32, 8), 1, 2048, p, 128, modes=("forward",)) for b in (1, 8) for p in (16, 256)]
        made += [make("prompt only", 8, (32, 8), 2048, 2048, 128, 128, modes=("backward",), causal=True, wrt=TRAINED[3:])]
        return [case for some in made for case in some]
    made = [make("decode", 16, (8, 8), 1, 1, 1024, 64, modes=("forward",))]
    made += [make("decode", 16, (8, 2), 1, 256, 1024, 64, modes=("forward", "both"))]
    decode = partial(make, "decode", modes=("forward",), wrt=())  # nobody trains while decoding
    made += [decode(b, (8, 8), 1, 256, p, 64) for b, p in ((1, 256), (2, 16), (64, 16))]
    made += [decode(1, (32, 8), 1, 2048, 64, 64)]
    made += [make("ViT-S", 16, (6, 6), 197, 197, p, 64, modes=step) for p in (10, 50, 100)]
    made += [make("BERT", 8, (12, 12), 128, 128, 20, 64, modes=step)]
    made += [make("Llama", 16, (6, 2), 64, 64, 100, 64, modes=step, causal=True)]
    made += [make("Llama", 2, (12, 4), 512, 512, p, 64, modes=step, causal=True) for p in (16, 128)]
    made += [make("Llama", 4, (8, 2), 256, 256, 64, 64, modes=step, causal=True)]
    made += [make("cached", 4, (8, 2), 16, 272, 128, 64, modes=step, causal=True)]
    made += [make("CoOp", 64, (8, 8), 8, 8, 17, 64, modes=step, causal=True)]
    made += [make("one sample", 1, (8, 8), 256, 256, 64, 64, modes=step, causal=causal) for causal in (False, True)]
    made += [make("prompt only", 16, (6, 6), 197, 197, 50, 64, modes=("backward",), wrt=TRAINED[3:])]
    return [case for some in made for case in some]


# The sizes that `--shape` sets.
SIZED: dict[str, Callable[..., list[Case]]] = {
    "causal": lambda dtype, B=4, H=8, Hkv=2, T=256, P=64, D=64: shared(
        "causal", B, (H, Hkv), T, T, P, D, dtype, STEP, causal=True
    ),
    "bidirectional": lambda dtype, B=16, H=6, Hkv=6, T=197, P=50, D=64: shared(
        "bidirectional", B, (H, Hkv), T, T, P, D, dtype, STEP
    ),
    "decode": lambda dtype, B=16, H=8, Hkv=8, S=256, P=1024, D=64: shared("decode", B, (H, Hkv), 1, S, P, D, dtype, STEP[:1]),
}


def host_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The calls that a training loop makes, on inputs so small that only the host's work counts."""
    q, k, v, g = (torch.randn(2, 2, 4, 16, device=device) for _ in range(4))
    prefix = [torch.randn(1, 2, 3, 16, device=device).requires_grad_() for _ in range(2)]

    def forward() -> Tensor:
        return prefix_attention(q, k, v, *prefix, causal=True)

    return {
        "prefix_attention": torch.no_grad()(forward),
        "prefix_attention+backward": lambda: torch.autograd.grad(forward(), prefix, g),
    }
