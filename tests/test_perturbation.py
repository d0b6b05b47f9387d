"""`functional.perturb`: numbers, gradients, layouts, registration, compilation and errors, on every path.

"auto" is the path a user gets (on a CPU analytic PyTorch), "triton" the kernels (on a CPU in Triton's interpreter). Both
are compared with the reference in float64.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import PIL
import PIL.Image
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from fastprompt import _runtime, functional
from fastprompt.functional import normalization, perturb, scale_image
from fastprompt.ops import perturbation as ops
from fastprompt.reference import perturbation as reference
from fastprompt.tuning.perturbation import Launch
from tests.cases import (
    BF16,
    CANVAS,
    F16,
    F32,
    GEOMETRY,
    REGION,
    U8,
    Case,
    call,
    covering,
    gradient,
    run,
    sampled,
    tensors,
    truth,
)  # fmt: skip
from tests.compare import check, check_bits, memory

needs_triton = pytest.mark.skipif(not _runtime.HAS_TRITON, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
IMPLS = ("auto", TRITON)


@pytest.fixture
def small_launch(monkeypatch):
    """Several tiles, several samples a program and several chunks, at sizes that a test can afford."""
    monkeypatch.setattr(ops, "pick", lambda *_, **__: Launch(256, 2, 4, 4, SUM_BLOCK=128))


# Allowances in units in the last place beyond twice PyTorch's own error: sums over a patch cancel, and PyTorch's own
# antialiased resize, which is the CPU's, computes its weights in float32 (a clamped row is smaller than what it comes from).
def ulps(name, dtype, case, impl):
    if dtype != F32:
        return 1
    resized = "resize" in GEOMETRY[case.geometry][1] and case.x != U8
    return 12 if name == "cells" else 48 if name == "out" and resized and impl == "auto" else 4


def agree(case, device, impl, **changes):
    """Output and gradients of a case on a path against the truth, and the memory of its inputs untouched."""
    held = tensors(case, device)
    before = memory(*held.values())
    got = run(case, held, impl, **changes)
    g = gradient(got["out"])
    want, rival = truth(case, held, g, **changes), run(case, held, "torch", g, **changes)
    assert set(got) == set(want)
    for name in got:
        path = impl if device.type == "cpu" else "triton"
        allowed = ulps(name, got[name].dtype, case, path)
        check(got[name], want[name], rival[name], factor=3 if path == "auto" else 2, ulps=allowed, name=name)
    for was, now in zip(before, memory(*held.values()), strict=True):
        assert torch.equal(was, now)
    return got


# ---- Numbers ----


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", covering(), ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_pair_of_options(case, impl, device, request):
    if covering().index(case) % 2:
        request.getfixturevalue("small_launch")
    agree(case, device, impl)


@pytest.mark.slow
@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("case", sampled(400, random.Random(1)), ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_random_options(case, impl, device):
    agree(case, device, impl)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", [0, 1, 2, 17, 33])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=BF16),
        Case(share="index", squash="tanh", region="window", clamp="exact"),
        Case(share="product", region="frame of a window", channels_last=True),
        Case(share="sample", region="everywhere", space="normalized"),
        Case(share="none", x=U8, geometry="up bilinear"),
        Case(geometry="full", region="everywhere", squash="none", cells=(1, 11, 2)),
        Case(geometry="full", region="bool planes", squash="none", cells=(3, 1, 7), clamp="exact"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_batches_of_every_size(case, batch, impl, device, small_launch):
    agree(replace(case, batch=batch), device, impl)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("channels", "size", "canvas"),
    [
        (1, (1, 1), (1, 1)),
        (1, (1, 1), (2, 3)),
        (2, (1, 5), (1, 8)),
        (5, (3, 1), (4, 2)),
        (8, (7, 9), (8, 16)),
        (3, (16, 16), (33, 31)),
        (3, (2, 2), (65, 17)),
        (3, (0, 5), None),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_odd_sizes(channels, size, canvas, impl, device):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, device=device, requires_grad=True)
    prompt = torch.randn(channels, *(canvas or size), device=device, requires_grad=True)

    def both(impl, *inputs):
        out = perturb(*inputs, canvas=canvas, squash="tanh", impl=impl)
        return [out, *torch.autograd.grad(out, inputs, gradient(out))]

    exact = both("torch", x.double(), prompt.double())
    for name, got, want, rival in zip(
        ("out", "x", "prompt"), both(impl, x, prompt), exact, both("torch", x, prompt), strict=True
    ):
        check(got, want, rival, ulps=4, name=name)


@pytest.mark.parametrize("squash", ["sigmoid", "tanh"])
@pytest.mark.parametrize("impl", IMPLS)
def test_squashes_and_slopes_far_from_zero(impl, squash, device):
    """No overflow, and in the kernels no cancellation: the last places of each value, not of the largest."""
    far = torch.tensor([0.0, 1e-30, 1e-3, 0.2499, 0.2501, 1, 3, 8, 20, 40, 88, 200, 1e30, torch.inf])
    prompt = torch.cat([far, -far]).view(1, 1, -1).to(device).requires_grad_()
    x = torch.zeros(1, 1, *prompt.shape[1:], device=device)
    out = perturb(x, prompt, squash=squash, impl=impl)
    out.sum().backward()
    at = prompt.detach().double()
    e = torch.exp(-at.abs())
    slope = e / (1 + e) ** 2 if squash == "sigmoid" else 4 * e**2 / (1 + e**2) ** 2
    # Below the smallest normal number there are fewer digits; on a CPU the slope is PyTorch's own 1 - tanh(x)^2.
    cancels = impl == "auto" and device.type == "cpu"
    torch.testing.assert_close(prompt.grad.double(), slope, rtol=5e-6, atol=2e-7 if cancels else 1e-37)
    torch.testing.assert_close(out[0].double(), getattr(torch, squash)(at), rtol=4e-7, atol=1e-37)


@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_white_pixels_are_inside_the_limits(impl, device):
    """255 / 255 is exactly 1: the gradient of the prompt is not lost on white paper."""
    x = torch.full((2, 3, 4, 4), 255, dtype=U8, device=device)
    prompt = torch.zeros(3, 4, 4, device=device, requires_grad=True)
    norm = normalization(0.5, 0.25, 0.0, 1.0, channels=3, device=device)
    out = perturb(x, prompt, norm=norm, impl=impl)
    assert out.unique().tolist() == [2.0]
    out.sum().backward()
    assert prompt.grad.unique().tolist() == [8.0]


# ---- Resizing as Pillow does ----

SHAPES = [((32, 32), (50, 41)), ((9, 7), (8, 5)), ((7, 9), (7, 20)), ((20, 31), (40, 11)), ((5, 1), (11, 3)),
          ((13, 64), (64, 64)), ((64, 3), (17, 9)), ((28, 28), (28, 28)), ((40, 40), (1, 1))]  # fmt: skip


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_the_reference_resizes_bytes_as_pillow(size, out, mode):
    """Columns first. Pillow 13 and newer go rows first where only the rows shrink."""
    if int(PIL.__version__.split(".")[0]) >= 13 and out[0] < size[0] and out[1] >= size[1]:
        size, out = size[::-1], out[::-1]
    x = noisy_bytes(2, 3, *size)
    how = PIL.Image.Resampling[mode.upper()]
    want = [torch.from_numpy(np.array(PIL.Image.fromarray(plane.numpy()).resize(out[::-1], how))) for plane in x.flatten(0, 1)]
    check_bits(reference.resize(x, out, mode), torch.stack(want).unflatten(0, (2, 3)))


def noisy_bytes(*shape):
    """Black and white edges and noise: bicubic overshoots 0 and 255."""
    made = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, shape, generator=made, dtype=U8)
    edges = 255 * torch.randint(0, 2, shape, generator=made, dtype=U8)
    return torch.where(torch.rand(shape, generator=made) < 0.5, noise, edges)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "out"), SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_path_resizes_bytes_as_the_reference(size, out, mode, impl, device):
    x = noisy_bytes(2, 3, *size)
    got = perturb(x.to(device), resize=out, interpolation=mode, impl=impl).cpu() * 255
    assert (got - got.round()).abs().max() < 1e-4
    check_bits(got.round().to(U8), reference.resize(x, out, mode))


# Whole ratios, phases that repeat (8 / 7), none that do (51 / 37), one output, more than 32 taps, one axis alone.
SIZES = [(32, 224), (64, 32), (50, 64), (96, 32), (64, 56), (51, 37), (37, 51), (70, 1), (1, 9), (330, 8), (24, 24), (13, 26)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_bytes_on_a_cpu_are_pillows(mode):
    for (height, tall), (width, wide) in zip(SIZES, SIZES[3:] + SIZES[:3], strict=True):
        for channels, last in ((3, True), (3, False), (1, False)):
            x = noisy_bytes(5, channels, height, width)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            wanted = reference.resize(x, (tall, wide), mode)
            got = perturb(x, resize=(tall, wide), interpolation=mode, norm=normalization(0, 1 / 255, channels=channels))
            check_bits(got.round().to(U8), wanted)
            check_bits(ops._resize_exactly(x, (tall, wide), mode).to(U8), wanted)


def rounded(weights, bits, pixels):
    """Pillow's rule for rows of weights, as integers of `bits`, and bytes [n, taps]."""
    whole = np.trunc(weights * 2.0**bits + np.copysign(0.5, weights)).astype(np.int64)
    return (whole @ pixels.T + (1 << bits - 1) >> bits).clip(0, 255)


@pytest.mark.parametrize(("size", "out"), [(256, 128), (32, 224), (224, 32), (50, 64), (96, 224), (84, 128), (336, 112)])
def test_where_pytorchs_resize_is_trusted_its_weights_cannot_differ(size, out):
    """The bytes of both sets of integer weights, on noise and on noise with black and white."""
    assert ops._rounds_alike(size, out, "bilinear")
    weights = np.unique(reference.resize_taps(size, out, "bilinear")[1], axis=0)
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, weights.shape[1]))
    pixels[::2] = np.where(pixels[::2] < 64, 0, np.where(pixels[::2] > 191, 255, pixels[::2]))
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2 ** (b + 1)) >= 1 << 15)
    np.testing.assert_array_equal(rounded(weights, bits, pixels), rounded(weights, 22, pixels))


@pytest.mark.parametrize(
    ("size", "out", "mode"),
    [(256, 224, "bilinear"), (16, 224, "bilinear"), (225, 15, "bilinear"), (32, 224, "bicubic"), (64, 32, "bicubic")],
)
def test_where_pytorchs_resize_may_differ_it_is_not_used(size, out, mode):
    """16 to 224: 28ths have halves. 225 to 15: 225ths have none, but come nearer to one than 29 rounded weights allow."""
    assert not ops._rounds_alike(size, out, mode)
    assert not ops._pytorch_resizes_alike(3, (size, 8), (out, 4), mode)


def test_a_pytorch_with_other_weights_is_not_used(monkeypatch):
    """The proof is of today's PyTorch; another is caught by trying."""
    theirs = ops._resize_by_pytorch
    monkeypatch.setattr(ops, "_resize_by_pytorch", lambda *given: theirs(*given) ^ 1)
    assert not ops._pytorch_resizes_alike.__wrapped__(3, (8, 8), (4, 4), "bilinear")


def test_large_parts_are_scaled_channel_by_channel(monkeypatch):
    """As whole parts are, to the last rounding."""
    x, norm = noisy_bytes(3, 3, 20, 24), normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    prompt = torch.randn(2, 3, 32, 30, generator=torch.Generator().manual_seed(0))
    forms = [
        lambda: perturb(x, prompt[0], canvas=(32, 30), hole="image", norm=norm),
        lambda: perturb(x / 255, canvas=(32, 30), norm=norm, space="normalized"),
        lambda: perturb(x, resize=(32, 30), norm=norm),
        lambda: perturb(x[:, :1], canvas=(32, 30), norm=norm),
        lambda: perturb(x, prompt, canvas=(32, 30), hole="image", share="product", norm=norm),
        lambda: perturb(x, canvas=(32, 30), norm=norm, memory_format=torch.channels_last),
    ]
    wanted = [form() for form in forms]
    monkeypatch.setattr(ops, "_ONE_PASS", 1)
    monkeypatch.setattr(ops, "_SHORT", 0)
    for form, want in zip(forms, wanted, strict=True):
        torch.testing.assert_close(form(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "out"), SHAPES)
def test_the_reference_resizes_floats_as_pytorch(size, out, mode):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    want = torch.nn.functional.interpolate(x, out, mode=mode, antialias=True, align_corners=False)
    torch.testing.assert_close(reference.resize(x, out, mode), want, rtol=1e-12, atol=1e-12)


# ---- Layouts ----


def expanded_batch(t):
    return t[:1].expand_as(t)


def padded_storage(t):
    """An inner slice of a larger tensor, so that it starts and ends away from its storage."""
    bigger = torch.full([side + 4 for side in t.shape], 99, dtype=t.dtype, device=t.device)
    inner = bigger[tuple(slice(1, 1 + side) for side in t.shape)]
    return inner.copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows and columns swapped": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "step 2": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "every other row": lambda t: torch.stack([t, t + 1], 3)[:, :, :, 0],
    "slice": padded_storage,
    "cat slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "one sample for all": expanded_batch,
    "one channel for all": lambda t: t[:, :1].expand_as(t),
}
LAYOUT_CASES = [
    Case(geometry="padded", region="frame", clamp="exact"),
    Case(geometry="up bilinear", region="window", clamp="exact", share="index", dtype=BF16),
    Case(geometry="full", region="everywhere", squash="none", cells=(3, 1, 7), clamp="exact"),
]


@pytest.mark.parametrize("dtype", [U8, F32, BF16], ids=str)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=lambda case: case.geometry)
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_the_image(dtype, case, impl, device):
    """Any strides give the bits of a contiguous image, forward and backward."""
    case = replace(case, x=dtype, batch=3)
    held = tensors(case, device)
    plain = run(case, held, impl)
    for layout, change in LAYOUTS.items():
        x = change(held["x"])
        before = memory(x)
        got = run(case, held | {"x": x}, impl)
        want = plain if torch.equal(x, held["x"]) else run(case, held | {"x": x.contiguous()}, impl)
        assert set(got) == set(want)
        for name in want:
            check_bits(got[name], want[name], f"{layout}: {name}")
        assert torch.equal(before[0], memory(x)[0])


@pytest.mark.parametrize(
    "case",
    [
        *LAYOUT_CASES,
        Case(region="frame of a window", dtype=BF16),
        Case(share="index", region="rows above and below", dtype=F16),
        Case(share="sample", region="columns beside"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_the_gradient(case, impl, device, small_launch):
    """A gradient of any strides gives the same numbers: after `cat`, `sum`, `expand`, `transpose`, channels_last."""
    held = {name: t.requires_grad_(t.is_floating_point()) for name, t in tensors(case, device).items()}
    names = [name for name in ("x", "prompt", "cells") if name in held]
    out = call(case, held, impl)

    def backward(g):
        return torch.autograd.grad(out, [held[name] for name in names], g, retain_graph=True)

    dense, plain = gradient(out), backward(gradient(out))
    for layout, change in LAYOUTS.items():
        g = change(dense)
        before = memory(g)
        same = torch.equal(g, dense)
        got, want = backward(g), plain if same else backward(g.contiguous())
        exact, rival = truth(case, held, g.contiguous()), run(case, held, "torch", g.contiguous())
        for name, mine, theirs in zip(names, got, want, strict=True):
            check(mine, exact[name], rival[name], ulps=12, name=f"{layout}: {name}")
            if name == "x" or impl == "triton":
                check_bits(mine, theirs, f"{layout}: {name}")
        assert torch.equal(before[0], memory(g)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_a_sum(impl, device, small_launch):
    """`sum()` sends back one number with stride 0 everywhere."""
    for case in (Case(), Case(share="product"), Case(share="index", channels_last=True)):
        held = tensors(case, device)
        dense = run(case, held, impl, torch.ones_like(call(case, held, "torch")))
        expanded = run(case, held, impl, torch.ones((), device=device).expand_as(dense["out"]))
        for name in dense:
            torch.testing.assert_close(expanded[name], dense[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
@pytest.mark.parametrize("dtype", [U8, F32], ids=str)
def test_memory_format_of_the_output(impl, dtype, device):
    last = torch.channels_last
    case = Case(x=dtype)
    held = tensors(case, device)
    images = {"contiguous": held["x"], "channels_last": held["x"].contiguous(memory_format=last)}
    for have, x in images.items():
        for ask in (None, torch.contiguous_format, last):
            out = call(case, held | {"x": x}, impl, memory_format=ask)
            is_last = ask == last or (ask is None and have == "channels_last")
            assert out.is_contiguous(memory_format=last) == is_last
            assert out.is_contiguous() != is_last
            check_bits(out, call(case, held, impl))


@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_nhwc_images(impl, device):
    for case in (Case(x=U8), Case(clamp="exact"), Case(geometry="up bilinear", x=U8)):
        held = tensors(case, device)
        nhwc = held | {"x": held["x"].permute(0, 2, 3, 1).contiguous()}
        got = run(case, nhwc, impl, data_format="NHWC")
        want = run(case, held, impl)
        check_bits(got["out"], want["out"])
        check_bits(got["prompt"], want["prompt"])
        if "x" in want:
            check_bits(got["x"], want["x"].permute(0, 2, 3, 1))
        preserved = call(case, nhwc, impl, data_format="NHWC", memory_format=None)
        assert preserved.is_contiguous(memory_format=torch.channels_last)


RUNS = [
    ((16, 32), (0, 0, 16, 32), (4, 8, 8, 16)),
    ((16, 32), (0, 0, 16, 32), (0, 0, 0, 0)),
    ((16, 32), (0, 0, 16, 32), (4, 0, 8, 32)),
    ((16, 32), (2, 8, 12, 16), (4, 12, 4, 8)),
    ((16, 32), (2, 4, 12, 20), (4, 4, 4, 16)),
    ((8, 18), (0, 0, 8, 18), (2, 4, 4, 8)),
    ((11, 14), (0, 0, 11, 14), (2, 3, 7, 9)),
]


@needs_triton
@pytest.mark.parametrize(("canvas", "window", "hole"), RUNS)
def test_promised_runs_of_the_gradient_are_runs(canvas, window, hole):
    """What the compiler is told about addresses is true: the interpreter would not notice a lie."""
    from fastprompt.kernels.perturbation.backward import run_length

    inside = reference.region(canvas, window, hole, torch.device("cpu"))
    y, x = inside.nonzero(as_tuple=True)
    longest = 1
    for channels, (name, layout) in itertools.product((1, 3, 4, 8), LAYOUTS.items()):
        g = layout(torch.zeros(2, channels, *canvas))[None]
        last = g.stride(2) == 1 and channels > 1
        runs = run_length(g, {"C": channels, "WINDOW": window, "HOLE": hole}, last)
        longest = max(longest, runs)
        c = torch.arange(channels)
        if last:
            offset = c * g.stride(2) + (y * g.stride(3) + x * g.stride(4))[:, None]
        else:
            offset = c[:, None] * g.stride(2) + y * g.stride(3) + x * g.stride(4)
        offset = offset.flatten()
        assert len(offset) % runs == 0 or runs == 1, name
        groups = offset[: len(offset) // runs * runs].view(-1, runs)
        assert torch.equal(groups, groups[:, :1] + torch.arange(runs)), name
        starts = [int(start) for start in groups[:, 0].unique()]
        for lead in (*starts, g.storage_offset(), g.stride(0), g.stride(1)):
            assert lead % runs == 0, name
    if all(edge % 4 == 0 for edge in (canvas[1], window[1], window[3], hole[1], hole[3])):
        assert longest >= 4


@pytest.mark.parametrize("left", [0, 4, 8, 16, 3])
@pytest.mark.parametrize("width", [4, 8, 16, 5])
def test_promised_edges_of_the_image_are_edges(left, width):
    """Groups of neighbouring pixels are all on the image or all beside it."""
    for across in (32, 48, 21 + left):
        if left + width > across:
            continue
        s = settings(canvas=(3, across), image=(1, left, 1, width))
        group = ops._edge_alignment(s)
        inside = torch.zeros(3, across, dtype=torch.bool)
        inside[1, left : left + width] = True
        groups = inside.flatten().view(-1, group)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert ops._edge_alignment(s._replace(channels_last=True)) == 1
        assert ops._edge_alignment(s._replace(copies=2)) == 1
    assert ops._edge_alignment(settings(canvas=(3, 32), image=(1, 16, 1, 16))) == 16


def settings(**changes):
    """A call's settings, of a prompt on the whole canvas."""
    plain = ops.Settings(
        canvas=(4, 6), image=(1, 1, 2, 3), interpolation="none", copies=1, period=0, window=(0, 0, 4, 6),
        hole=(0, 0, 0, 0), share="batch", squash="none", mask_first=False, scale=1.0, normalized=False, clamp="none",
        dtype=F32, channels_last=False, impl="auto",
    )  # fmt: skip
    return plain._replace(**changes)


# ---- Autograd ----

ALL = Case(geometry="full", region="everywhere", squash="none", cells=(1, 11, 2), clamp="exact")


@pytest.mark.parametrize("case", [ALL, Case(share="index"), Case(share="product", geometry="up bilinear")], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient_is_computed(case, impl, device, monkeypatch):
    called = []
    for name in ("_prompt_gradient", "_cells_gradient", "_image_gradient"):
        whole = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, whole=whole: called.append(name) or whole(*a))
    held = tensors(case, device)
    everything = run(case, held, impl)
    names = [name for name in ("x", "prompt", "cells") if name in held]
    for count in range(len(names) + 1):
        for wanted in itertools.combinations(names, count):
            called.clear()
            got = run(case, held, impl, wanted=" ".join(wanted))
            assert set(got) == {"out", *wanted}
            assert got["out"].requires_grad == bool(wanted)
            for name in got:
                check_bits(got[name], everything[name], name)
            expected = {"_image_gradient"} if "x" in wanted else set()
            if case.cells and {"prompt", "cells"} & set(wanted):
                expected |= {"_cells_gradient"}
            elif "prompt" in wanted:
                expected |= {"_prompt_gradient"}
            assert sorted(called) == sorted(expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients(impl, device):
    held = tensors(ALL, device)
    want = run(ALL, held, impl)["out"]
    needs = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors(ALL, device).items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = call(ALL, needs, impl)
        assert not out.requires_grad
        check_bits(out, want)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(geometry="copies", region="window", squash="tanh", mask_first=True),
        Case(geometry="up bicubic", region="frame", space="normalized", share="index"),
        Case(geometry="down bilinear", region="float mask", share="sample", clamp="exact"),
        Case(geometry="rows only", region="float planes in a window", share="product", mask_first=True),
        Case(geometry="corner", region="bool planes", squash="none", space="normalized", clamp="exact"),
        Case(geometry="full", region="float mask", cells=(1, 11, 2), squash="tanh"),
        Case(geometry="full", region="everywhere", cells=(3, 1, 7), clamp="exact", space="normalized"),
        Case(geometry="down bicubic", share="none", gray=True),
    ],
    ids=str,
)
def test_gradcheck_of_the_reference(case):
    case = replace(case, batch=2)
    held = {n: t.double() if t.is_floating_point() and n != "mask" else t for n, t in tensors(case, "cpu").items()}
    names = [name for name in ("x", "prompt", "cells") if name in held]
    inputs = [held[name].requires_grad_() for name in names]

    def function(*given):
        return call(case, held | dict(zip(names, given, strict=True)), "torch", dtype=torch.float64)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_straight_through_ignores_the_limits(impl, device):
    case = Case(clamp="straight", squash="none", region="everywhere")
    held = tensors(case, device)
    limited, free = run(case, held, impl), run(case, held | {"norm": open_limits(held["norm"])}, impl)
    assert not torch.equal(limited["out"], free["out"])
    for name in ("x", "prompt"):
        check_bits(limited[name], free[name])


def open_limits(table):
    table = table.clone()
    table[2], table[3] = -torch.inf, torch.inf
    return table


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_raises(impl, device):
    """It would be silently wrong otherwise; the reference has one."""
    x = torch.randn(2, 3, 4, 4, device=device)
    prompt = torch.randn(3, 4, 4, device=device, requires_grad=True)
    out = perturb(x, prompt, squash="tanh", impl=impl).pow(2).sum()
    with pytest.raises(RuntimeError, match=r'no second derivative.*impl="torch"'):
        torch.autograd.grad(out, prompt, create_graph=True)
    out = perturb(x, prompt, squash="tanh", impl="torch").pow(2).sum()
    (first,) = torch.autograd.grad(out, prompt, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), prompt)
    assert second.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_gradients_add_up(impl, device):
    case = Case(clamp="exact")
    held = tensors(case, device)
    held["prompt"].requires_grad_()
    out = call(case, held, impl)
    g = gradient(out)
    out.backward(g, retain_graph=True)
    once = held["prompt"].grad.clone()
    out.backward(g)
    check_bits(held["prompt"].grad, 2 * once)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_repeat_bit_for_bit(impl, device, small_launch):
    for case in (replace(ALL, batch=9), Case(share="index", batch=9, dtype=BF16), Case(share="product", batch=9)):
        held = tensors(case, device)
        first, again = run(case, held, impl), run(case, held, impl)
        for name in first:
            check_bits(again[name], first[name], name)


# ---- NaN, and an index out of range ----


@pytest.mark.parametrize("clamp", ["none", "exact", "straight"])
@pytest.mark.parametrize("share", ["batch", "index", "product"])
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_nan_in_the_image_stays_in_its_place(impl, clamp, share, device):
    case = Case(clamp=clamp, share=share, region="everywhere")
    held = tensors(case, device)
    clean = run(case, held, impl)
    held["x"][1, 2, 3, 4] = torch.nan
    got = run(case, held, impl)
    place = torch.zeros_like(got["out"], dtype=torch.bool)
    place[..., 1, 2, 3 + 3, 4 + 4] = True
    assert torch.equal(got["out"].isnan(), place)
    check_bits(got["out"][~place], clean["out"][~place])
    for name in ("x", "prompt"):
        assert got[name].isfinite().all()


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("region", ["frame", "frame of a window", "rows above and below", "columns beside", "window"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_is_read_only_where_something_is_trained(impl, region, batch, device, small_launch):
    """What comes back inside the hole and outside the window has no part in the prompt's gradient, NaN or not."""
    case = Case(region=region, batch=batch)
    held = tensors(case, device)
    want = run(case, held, impl)
    g = gradient(want["out"])
    where = REGION[region]
    on = reference.region(CANVAS, where.get("window", (0, 0, *CANVAS)), where.get("hole", (0, 0, 0, 0)), device)
    got = run(case, held, impl, torch.where(on, g, torch.nan), wanted="prompt")
    check_bits(got["prompt"], want["prompt"])


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_spreads_only_as_far_as_the_resize_reaches(impl, device):
    x = torch.zeros(2, 3, 8, 8, device=device)
    x[1, 2, 4, 4] = torch.nan
    nan = perturb(x, resize=16, impl=impl).isnan()
    reached = torch.zeros_like(nan)
    reached[1, 2, 7:11, 7:11] = True
    assert torch.equal(nan, reached)


@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**40)])
def test_an_index_out_of_range_is_an_error_on_the_cpu(bad):
    case = Case(share="index")
    held = tensors(case, "cpu")
    held["index"][2] = bad
    with pytest.raises(ValueError, match=rf"index: expected values from 0 to 3, got \[{bad}\]"):
        call(case, held, "auto")


@needs_triton
@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**40)])
@pytest.mark.parametrize("clamp", ["none", "exact"])
def test_an_index_out_of_range_is_nan_in_the_kernels(bad, clamp, device, monkeypatch):
    """The sample is NaN and teaches nothing; every other sample keeps its bits."""
    case = Case(share="index", region="everywhere", clamp=clamp, batch=6)
    held = tensors(case, device)
    held["x"] = held["x"].clamp(0.2, 0.8)
    monkeypatch.setattr(functional.perturbation, "_check_owners", lambda *_: None)
    out = run(case, held, "triton", wanted="")["out"]
    keep = torch.tensor([0, 1, 3, 4, 5], device=device)
    held["index"][2] = bad
    got = run(case, held, "triton", gradient(out))
    assert got["out"][2].isnan().all()
    check_bits(got["out"][keep], out[keep])
    fewer = held | {"x": held["x"][keep], "index": held["index"][keep]}
    want = run(replace(case, batch=5), fewer, "triton", gradient(out)[keep])
    check_bits(got["prompt"], want["prompt"])
    check_bits(got["x"][keep], want["x"])


# ---- Registration and compilation ----

OPCHECK = [
    Case(),
    Case(x=U8, dtype=BF16, channels_last=True),
    Case(share="index", region="frame of a window", clamp="exact"),
    Case(share="product", region="window", clamp="exact", channels_last=True),
    Case(share="sample", geometry="up bilinear", x=F16, clamp="exact"),
    Case(geometry="copies", region="float mask", squash="tanh", mask_first=True),
    Case(batch=0),
    ALL,
    replace(ALL, cells=(3, 1, 7), clamp="none"),
]


@pytest.mark.parametrize("case", OPCHECK, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(case, impl, device, monkeypatch):
    """Schemas, fakes and dynamic shapes of the four operators, with the arguments of real calls."""
    seen = {}
    for name in ("forward", "_prompt_gradient", "_cells_gradient", "_image_gradient"):
        operator = getattr(torch.ops.fastprompt, "perturb" if name == "forward" else "perturb" + name).default

        def watched(*given, operator=operator):
            *given, settings = given
            seen[operator] = (*given, *settings.encode())
            return operator(*seen[operator])

        monkeypatch.setattr(ops, name, watched)
    run(case, tensors(case, device), impl)
    assert len(seen) >= 2
    for operator, arguments in seen.items():
        given = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(given))


@pytest.mark.parametrize("case", [Case(), ALL, Case(share="index", clamp="exact"), Case(share="product", x=U8)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_compile_without_graph_breaks(case, impl, device):
    """Forward and backward, the bits of eager, and at most two compilations for five batch sizes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(lambda held: call(case, held, impl), fullgraph=True, backend=backend)
    for batch in (3, 2, 5, 7, 4):
        sized = replace(case, batch=batch)
        held = tensors(sized, device)
        want = run(sized, held, impl)
        inputs = {n: t.detach().requires_grad_(t.is_floating_point() and n in want) for n, t in held.items()}
        out = compiled(inputs)
        check_bits(out, want["out"])
        out.backward(gradient(out))
        for name in want.keys() - {"out"}:
            check_bits(inputs[name].grad, want[name], name)
    assert len(graphs) <= 2


@pytest.mark.parametrize("prompt", [F32, BF16], ids=str)
@pytest.mark.parametrize("x", [U8, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("amp", [BF16, F16, None], ids=str)
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_autocast_decides_the_output(impl, amp, x, prompt, device):
    case = Case(x=x, prompt=prompt)
    held = tensors(case, device)
    promised = amp or (x if x != U8 else F32)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        got = run(case, held, impl, dtype=None)
        explicit = call(case, held, impl, dtype=F32)
    assert got["out"].dtype == promised
    assert explicit.dtype == F32
    assert got["prompt"].dtype == prompt
    assert "x" not in got or got["x"].dtype == x
    rival, want = run(case, held, "torch", dtype=promised), truth(case, held, gradient(got["out"]))
    for name in got:
        check(got[name], want[name], rival[name], ulps=4, name=name)


def test_a_float64_image_takes_the_reference(device):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device)
    prompt = torch.randn(3, 4, 4, dtype=torch.float64, device=device)
    out = perturb(x, prompt, squash="tanh")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, x + prompt.tanh(), rtol=1e-15, atol=1e-15)


# ---- scale_image ----


def enlarged(x, scale, canvas):
    """The documented formula, pixel by pixel: bilinear, zero outside the image."""
    out = x.new_zeros(*x.shape[:2], *canvas)
    height, width = x.shape[2:]
    for i, j in itertools.product(range(canvas[0]), range(canvas[1])):
        v = (i - (canvas[0] - 1) / 2) / scale + (height - 1) / 2
        u = (j - (canvas[1] - 1) / 2) / scale + (width - 1) / 2
        top, left = math.floor(v), math.floor(u)
        for row, column in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                weight = (1 - abs(v - row)) * (1 - abs(u - column))
                out[:, :, i, j] += weight * x[:, :, row, column]
    return out


@pytest.mark.parametrize("scale", [1.0, 0.6, 1.7])
def test_scale_image(scale, device):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device)
    got = scale_image(x, torch.tensor(scale, dtype=torch.float64, device=device), (9, 8))
    torch.testing.assert_close(got, enlarged(x, scale, (9, 8)), rtol=1e-10, atol=1e-10)


def test_scale_image_gradcheck_and_bytes():
    x = torch.rand(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: scale_image(x, s, (9, 8)), (x, scale), atol=1e-6)
    white = torch.full((1, 1, 3, 3), 255, dtype=U8)
    torch.testing.assert_close(scale_image(white, torch.tensor(1.0), 3), torch.ones(1, 1, 3, 3))


# ---- Settings and errors ----


def test_normalization_table():
    norm = normalization([0.1, 0.2], [0.5, 0.25], 0.0, [1.0, 2.0])
    expected = [[0.1, 0.2], [2.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    assert norm.clamp == "exact"
    torch.testing.assert_close(norm.table, torch.tensor(expected), rtol=0, atol=0)
    assert normalization(channels=3).table.tolist() == [[0.0] * 3, [1.0] * 3, [-torch.inf] * 3, [torch.inf] * 3]
    assert normalization().clamp == "none"
    assert normalization(low=0.0).table[3].tolist() == [torch.inf]
    assert normalization(high=1.0, straight_through=True).clamp == "straight"
    assert normalization(torch.tensor([0.5, 0.5, 0.5])).table.shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0.0}, r"std: expected positive numbers, got \[0.0\]"),
        ({"std": [1.0, -1.0]}, "std: expected positive"),
        ({"std": float("nan")}, "std: expected positive"),
        ({"low": 1.0, "high": 0.0}, "low: expected at most high"),
        ({"low": float("nan")}, "low: expected at most high"),
        ({"mean": [0.1, 0.2], "std": [1.0, 1.0, 1.0]}, r"lengths \[2, 3\]"),
        ({"mean": [0.1, 0.2], "channels": 3}, r"lengths \[2, 3\]"),
    ],
)
def test_bad_normalization(arguments, message):
    with pytest.raises(ValueError, match=message):
        normalization(**arguments)


X, P = torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 5)
CELLS = torch.ones(2, 1, 2, 1)


@pytest.mark.parametrize(
    ("x", "prompt", "options", "error", "message"),
    [
        (X[0], P, {}, ValueError, r"x: expected 4 dimensions .* got 3 dimensions \[3, 4, 5\]"),
        (X.int(), P, {}, TypeError, "x: expected uint8 or a floating point dtype, got torch.int32"),
        (X.bool(), P, {}, TypeError, "x: expected uint8 or a floating"),
        (X, P.int(), {}, TypeError, "prompt: expected a floating point dtype, got torch.int32"),
        (X, P[0], {}, ValueError, r"prompt: expected \[C, h', w'\] .* got \[4, 5\]"),
        (X[:, :2], P, {}, ValueError, "x: expected 1 or 3 channels, got 2 channels"),
        (X[:, :0], P, {}, ValueError, "x: expected 1 or 3 channels, got 0 channels"),
        (X, P[:2], {}, ValueError, "prompt: expected 3 channels, got 2 channels"),
        (X, P[:1], {}, ValueError, "prompt: expected 3 channels, got 1 channels"),
        (X, P, {"norm": normalization([0.5, 0.5])}, ValueError, "norm: expected 1 or 3 channels, got 2"),
        (X, P.to("meta"), {}, ValueError, "prompt: expected a tensor on cpu like x, got one on meta"),
        (X, P, {"mask": torch.ones(4, 5, device="meta")}, ValueError, "mask: expected a tensor on cpu"),
        (X, P, {"cells": CELLS.to("meta")}, ValueError, "cells: expected a tensor on cpu"),
        (X, P, {"norm": normalization(device="meta")}, ValueError, "norm: expected a tensor on cpu"),
        (X, P, {"index": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "index: expected a tensor on cpu"),
        (X, P, {"canvas": (3, 9)}, ValueError, "canvas: expected at least the image's 4x5, got 3x9"),
        (X, P, {"canvas": (9, 4)}, ValueError, "canvas: expected at least the image's 4x5, got 9x4"),
        (X, P, {"canvas": 0}, ValueError, r"canvas: expected a positive size .* got 0"),
        (X, P, {"canvas": (9, 9, 9)}, ValueError, "canvas: expected a positive size"),
        (X, P, {"resize": -1}, ValueError, "resize: expected a positive size"),
        (X[:, :, :0], None, {"resize": 4}, ValueError, "x: expected at least one pixel to resize"),
        (X, P, {"interpolation": "nearest"}, ValueError, "interpolation: expected one of bilinear, bicubic, got 'nearest'"),
        (X, P, {"canvas": 9, "offset": (6, 0)}, ValueError, "offset: expected the image inside the 9x9 canvas"),
        (X, P, {"canvas": 9, "offset": (0, -1)}, ValueError, "offset: expected the image inside"),
        (X, P, {"copies": 0}, ValueError, "copies, period: expected"),
        (X, P, {"copies": 2, "period": 4, "canvas": (4, 20)}, ValueError, "period of at least 5"),
        (X, P, {"copies": 2, "period": 5}, ValueError, "canvas: expected at least the image's 4x10"),
        (X, P, {"window": (0, 0, 5, 5)}, ValueError, "window: expected .* inside 4x5"),
        (X, P, {"window": (-1, 0, 4, 5)}, ValueError, "window: expected"),
        (X, P, {"window": (0, 0, 2, 2)}, ValueError, "prompt: expected the window's size 2x2, got 4x5"),
        (X, P, {"canvas": 9}, ValueError, "prompt: expected the window's size 9x9, got 4x5"),
        (X, P, {"hole": (0, 0, 5, 5)}, ValueError, "hole: expected a rectangle inside the window"),
        (X, P, {"hole": (0, -1, 2, 2)}, ValueError, "hole: expected a rectangle inside the window"),
        (X, P, {"hole": "middle"}, ValueError, "hole: expected \"image\""),
        (X, P, {"hole": "image", "copies": 2, "period": 5, "canvas": (4, 10)}, ValueError, "hole: expected a rectangle, or a"),
        (X, P, {"mask": torch.ones(4, 4)}, ValueError, "mask: expected"),
        (X, P, {"mask": torch.ones(2, 4, 5)}, ValueError, "mask: expected"),
        (X, P, {"cells": CELLS[:1]}, ValueError, r"cells: expected \[2, 1 or 3, rows, columns\], got \[1, 1, 2, 1\]"),
        (X, P, {"cells": torch.ones(2, 1, 3, 1)}, ValueError, "cells: expected rows and columns that divide the canvas"),
        (X, P, {"cells": torch.ones(2, 1, 0, 1)}, ValueError, "cells: expected rows and columns"),
        (X, P, {"cells": CELLS, "hole": (1, 1, 1, 1)}, ValueError, "cells: expected one prompt on the whole canvas"),
        (X, P, {"cells": CELLS, "mask_first": True}, ValueError, "cells: expected one prompt on the whole canvas"),
        (X, None, {"cells": CELLS}, ValueError, "prompt: expected a tensor when share, cells or index is given, got None"),
        (X, None, {"share": "batch"}, ValueError, "prompt: expected a tensor"),
        (X, P, {"share": "all"}, ValueError, "share: expected one of batch, index, sample, product, got 'all'"),
        (X, P.expand(2, 3, 4, 5), {}, ValueError, "share: expected index, sample or product for 2 prompts, got 'batch'"),
        (X, P.expand(3, 3, 4, 5), {"share": "sample"}, ValueError, "prompt: expected one prompt a sample"),
        (X, P, {"share": "index"}, ValueError, "index: expected a tensor exactly when"),
        (X, P, {"share": "batch", "index": torch.tensor([0, 0])}, ValueError, "index: expected a tensor exactly when"),
        (X, P, {"index": torch.zeros(2, dtype=torch.int32)}, ValueError, r"index: expected int64 \[2\], got torch.int32 \[2\]"),
        (X, P, {"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index: expected int64 \[2\], got torch.int64 \[3\]"),
        (X, P, {"index": torch.tensor([0, 1])}, ValueError, r"index: expected values from 0 to 0, got \[1\]"),
        (X, P, {"squash": "relu"}, ValueError, "squash: expected one of none, sigmoid, tanh, got 'relu'"),
        (X, P, {"space": "rgb"}, ValueError, "space: expected one of pixel, normalized, got 'rgb'"),
        (X, P, {"dtype": torch.int8}, ValueError, "dtype: expected float32, float16, bfloat16 or float64, got torch.int8"),
        (X, P, {"data_format": "CHWN"}, ValueError, "data_format: expected one of NCHW, NHWC, got 'CHWN'"),
        (X, P, {"impl": "cuda"}, ValueError, "impl: expected one of auto, triton, torch, got 'cuda'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(x, prompt, options, error, message, monkeypatch):
    def reached(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(ops.Perturb, "apply", reached)
    monkeypatch.setattr(reference, "perturb", reached)
    with pytest.raises(error, match=message):
        perturb(x, prompt, **options)


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (X[0], torch.ones(()), r"x: expected 4 dimensions \[B, C, h, w\], got \[3, 4, 5\]"),
        (X, torch.ones(2), r"scale: expected a floating point tensor with one element, got torch.float32 \[2\]"),
        (X, torch.ones((), dtype=torch.int64), "scale: expected a floating point tensor"),
    ],
)
def test_bad_input_of_scale_image(x, scale, message):
    with pytest.raises(ValueError, match=message):
        scale_image(x, scale, 9)


def test_the_kernels_on_request_or_an_error(monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(_runtime, "HAS_TRITON", False)
        with pytest.raises(RuntimeError, match='impl="triton": Triton is not installed'):
            perturb(X, P, impl="triton")
        check_bits(perturb(X, P), X)
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)
    monkeypatch.setattr(_runtime, "INTERPRETING", False)
    with pytest.raises(ValueError, match=r"tensors on a GPU .* got tensors on cpu"):
        perturb(X, P, impl="triton")
    monkeypatch.setattr(_runtime, "INTERPRETING", True)
    with pytest.raises(ValueError, match="an input of at most 32 bits, got float64"):
        perturb(X.double(), P.double(), impl="triton")
