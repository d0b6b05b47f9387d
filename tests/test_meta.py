"""Meta tensors in the place of a GPU's: what a launcher makes lies on the device of what it is given, no value is asked for,
and grids stay within a GPU's limits, at real sizes and beyond 2^31 elements."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

from fastprompt import _runtime, functional
from fastprompt.ops import attention, embedding, mapping, perturbation
from tests.conftest import HAS_GPU, HAS_TRITON

pytestmark = pytest.mark.skipif(HAS_GPU or not HAS_TRITON, reason="needs the interpreter")
META, HALF = torch.device("meta"), torch.bfloat16


@pytest.fixture
def launches(monkeypatch):
    """Every launch as (kernel, arguments, grid); the implementations for CUDA tensors run, and no kernel does."""
    from triton.runtime.interpreter import InterpretedFunction

    from fastprompt.kernels.attention import forward

    seen = []

    def launch(self, grid):
        return lambda *args, **options: seen.append((self.fn.__name__, (*args, *options.values()), grid))

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)
    monkeypatch.setattr(_runtime, "arch", lambda device: "sm_90")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(forward, "aligned", lambda *tensors: True)
    for name in ("attention", "embedding", "mapping", "mapping_counts", "perturbation"):
        monkeypatch.setattr(importlib.import_module(f"fastprompt.functional.{name}"), "path_of", lambda impl, x: "auto")
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(attention, name, getattr(attention, f"{name}_triton"))
    for name in ("_forward", "_gradient", "_segments", "_segments_gradient"):
        monkeypatch.setattr(mapping, name, getattr(mapping, f"{name}_triton"))
    monkeypatch.setattr(mapping, "count_labels_", mapping._count_triton)
    for name in ("forward", "_prompt_gradient", "_cells_gradient", "_image_gradient"):
        monkeypatch.setattr(perturbation, name, getattr(perturbation, f"_{name.removeprefix('_')}_triton"))
    monkeypatch.setattr(embedding, "forward", lambda *given: embedding._forward_triton(*given[:-1]))
    monkeypatch.setattr(embedding, "_gradient", lambda *given: embedding._gradient_triton(*given[:-1]))
    return seen


def empty(*shape, dtype=HALF, grad=False):
    return torch.empty(shape, dtype=dtype, device=META).requires_grad_(grad)


def whole(*shape):
    return torch.zeros(shape, dtype=torch.int64, device=META)


def images(batch, canvas=224, **options):
    given = {"canvas": canvas, "squash": "sigmoid", "dtype": HALF} | options
    prompt = empty(10 if options.get("share") == "index" else 1, 3, canvas, canvas, dtype=torch.float32, grad=True)
    index = whole(batch) if options.get("share") == "index" else None
    return functional.perturb(empty(batch, 3, 32, 32, dtype=torch.uint8), prompt, index=index, **given), [prompt]


def clamped():
    return images(256, norm=functional.normalization(0.5, 0.5, low=0, high=1, channels=3, device=META))


def masks(batch):
    x, prompt, cells = empty(batch, 3, 224, 224, grad=True), empty(1, 3, 224, 224, grad=True), empty(batch, 3, 28, 28, grad=True)
    return functional.perturb(x, prompt, cells=cells, dtype=HALF), [x, prompt, cells]


def attended(batch, heads, kv_heads, queries, keys, rows, width, causal=False, **options):
    q, prefix = empty(batch, heads, queries, width, grad=True), empty(1, kv_heads, rows, width, grad=True)
    k = empty(batch, kv_heads, keys, width, grad=True)
    return functional.prefix_attention(q, k, k, prefix, prefix, causal=causal, **options), [q, k, prefix]


def by_index(batch, sources, targets, map_only=False):
    logits, index = empty(batch, sources, grad=True), whole(targets)
    if map_only:
        return functional.map_labels(logits, index), [logits]
    return functional.mapped_cross_entropy(logits, index, whole(batch)), [logits]


def grouped(batch, sources, targets):
    labels = functional.segments(torch.arange(sources).view(targets, -1), sources)
    labels = labels._replace(**{n: t.to(META) for n, t in labels._asdict().items() if isinstance(t, torch.Tensor)})
    logits = empty(batch, sources, grad=True)
    return functional.mapped_cross_entropy(logits, labels, whole(batch)), [logits]


def gathered(batch, length, slots, width):
    soft = empty(1, slots, width, dtype=torch.float32, grad=True)
    ids = functional.place_prompt(whole(batch, length), slots)[0]
    return functional.soft_gather(ids, empty(500, width), soft), [soft]


CALLS = {
    "pad": lambda: images(256, hole="image"), "of several": lambda: images(256, share="index"),
    "resized": lambda: images(256, resize=192), "clamped": clamped,
    "masks": lambda: masks(256), "Llama": lambda: attended(8, 32, 8, 2048, 2048, 128, 128, causal=True),
    "ViT": lambda: attended(256, 12, 12, 197, 197, 50, 64), "decode": lambda: attended(64, 32, 8, 1, 2048, 1024, 128),
    "of several prefixes": lambda: attended(64, 8, 2, 50, 50, 20, 64, prefix_index=whole(64)),
    "map": lambda: by_index(65536, 1000, 10, map_only=True), "loss": lambda: by_index(65536, 1000, 10),
    "small loss": lambda: by_index(256, 1000, 10), "mean of 100": lambda: grouped(65536, 1000, 10),
    "gather": lambda: gathered(8, 2048, 128, 4096),
    "many images": lambda: images(14_300, hole="image"), "many samples": lambda: attended(33_000, 8, 1, 64, 64, 4, 128),
    "many logits": lambda: by_index(2_150_000, 1000, 10), "many tokens": lambda: gathered(16, 33_000, 2, 4096),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_launches_stay_on_the_device(name, launches):
    out, trained = CALLS[name]()
    gradients = torch.autograd.grad(out, trained, torch.empty_like(out))
    assert all(t.device == META for t in (out, *gradients))
    assert len(launches) >= 2
    for kernel, arguments, grid in launches:
        assert len(grid) == 1, kernel
        assert 0 < grid[0] < 2**31, kernel
        for value in arguments:
            assert not isinstance(value, torch.Tensor) or value.device == META, kernel


def test_counting_stays_on_the_device(launches):
    functional.count_labels_(whole(1000, 10), empty(50_000, 1000), whole(50_000), k=3)
    ((_, arguments, _),) = launches
    assert {value.device for value in arguments if isinstance(value, torch.Tensor)} == {META}
