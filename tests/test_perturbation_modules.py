"""The prompt modules reproduce the literature's input transforms, each against a plain formula, and behave as modules."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import functional
from fastprompt import nn as fnn
from fastprompt.reference import perturbation as reference
from fastprompt.taxonomy import Format, Location, Operator, Place

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
M, S = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]


def images(size: int, batch: int = 3, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def trained(module: nn.Module, seed: int = 1) -> nn.Module:
    """A module whose prompt is not zero any more."""
    with torch.no_grad():
        module.prompt.copy_(torch.randn(module.prompt.shape, generator=torch.Generator().manual_seed(seed)))
    return module


def pad(x: Tensor, canvas: int) -> Tensor:
    """Zero padding as ILM-VP has it: an odd difference puts the extra pixel left and top."""
    before = (canvas - x.shape[-1] + 1) // 2
    after = (canvas - x.shape[-1]) // 2
    return F.pad(x, (before, after, before, after))


def outside(size: int, canvas: int) -> Tensor:
    return 1 - pad(torch.ones(1, size, size), canvas)


def agree(module: nn.Module, formula, x: Tensor, prompt: Tensor | None = None) -> None:
    """Outputs and the prompt's gradient of a module against a formula of (prompt, image in [0, 1])."""
    prompt = module.prompt if prompt is None else prompt
    out = module(x)
    wanted = formula(prompt, x.float() / 255)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (mine,) = torch.autograd.grad(out, prompt, g)
    (theirs,) = torch.autograd.grad(wanted, prompt, g)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# ---- The methods, one by one ----


@pytest.mark.parametrize(("size", "canvas"), [(8, 24), (7, 24), (8, 23)])
def test_ilm_vp_and_blm(size, canvas):
    """Norm(pad(x) + sigmoid(delta) * M), M = 1 outside the image."""
    module = trained(fnn.PaddedPrompt(canvas, size, mean=MEAN, std=STD))
    agree(module, lambda d, x: (pad(x, canvas) + torch.sigmoid(d[0]) * outside(size, canvas) - M) / S, images(size))


def test_ilm_vp_with_a_triangular_mask():
    """ABIDE: only the upper triangle of the canvas is prompted."""
    triangle = torch.triu(torch.ones(16, 16, dtype=torch.bool))
    module = trained(fnn.PaddedPrompt(16, 6, mean=MEAN, std=STD, mask=triangle))
    agree(module, lambda d, x: (pad(x, 16) + torch.sigmoid(d[0]) * outside(6, 16) * triangle - M) / S, images(6))


def test_attrvr_frame_of_sixteen():
    """192 on 224: 39,936 of 150,528 positions are trained."""
    module = trained(fnn.PaddedPrompt(224, 192, mean=MEAN, std=STD))
    assert module.trainable == 39_936
    assert module.prompt.numel() == 150_528
    agree(module, lambda d, x: (pad(x, 224) + torch.sigmoid(d[0]) * outside(192, 224) - M) / S, images(192, batch=2))


@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
def test_ar_and_bar_squash_the_masked_prompt(squash):
    """pad(x) + tanh(W * M); two re-implementations have sigmoid(W * M), which adds 1/2 to the image itself."""
    module = trained(fnn.PaddedPrompt(13, 6, squash=squash, mask_first=True))
    how = getattr(torch, squash)
    agree(module, lambda d, x: pad(x, 13) + how(d[0] * outside(6, 13)), images(6))
    operator = Operator.CONCATENATIVE if squash == "tanh" else Operator.ADDITIVE
    assert module.taxonomy == Place(Format.LEARNABLE, Location.RAW, operator)


def test_vp_frame_in_four_strips():
    """Norm(x) + frame, added after normalising; 2 * C * p * (H + W - 2p) positions."""
    width, size = 5, 20
    module = trained(fnn.FramePrompt(size, width, mean=MEAN, std=STD))
    assert module.trainable == 2 * 3 * width * (2 * size - 2 * width)
    inner = size - 2 * width

    def strips(d: Tensor, x: Tensor) -> Tensor:
        middle = torch.cat([d[..., width:-width, :width], torch.zeros(1, 3, inner, inner), d[..., width:-width, -width:]], -1)
        return (x - M) / S + torch.cat([d[..., :width, :], middle, d[..., -width:, :]], -2)

    agree(module, strips, images(size))
    assert fnn.FramePrompt(224, 30).trainable == 69_840


def test_vp_fixed_patch():
    module = trained(fnn.PatchPrompt(12, (4, 3), (5, 7), mean=MEAN, std=STD))
    agree(module, lambda d, x: (x - M) / S + F.pad(d[0], (7, 2, 5, 3)), images(12))


@pytest.mark.parametrize("squash", ["none", "sigmoid"])
def test_vp_random_patch(squash):
    module = trained(fnn.PatchPrompt(12, (4, 3), "random", mean=MEAN, std=STD, squash=squash)).train()
    x, places = images(12), set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = module(x)
        torch.manual_seed(seed)
        top, left = int(torch.randint(9, ())), int(torch.randint(10, ()))
        places.add((top, left))
        patch = module.prompt[0] if squash == "none" else torch.sigmoid(module.prompt[0])
        wanted = (x / 255 - M) / S + F.pad(patch, (left, 9 - left, top, 8 - top))
        torch.testing.assert_close(out, wanted)
        (gradient,) = torch.autograd.grad(out.sum(), module.prompt)
        assert gradient.abs().min() > 0
    assert len(places) > 5
    torch.testing.assert_close(module.eval()(x), module(x))  # one place, the centre, in eval mode


def test_watermark_on_the_whole_image():
    module = trained(fnn.FramePrompt(9, None, mean=MEAN, std=STD))
    assert module.trainable == 3 * 81
    agree(module, lambda d, x: (x - M) / S + d[0], images(9))


@pytest.mark.parametrize("patch", [1, 4])
def test_smm(patch):
    """resize(x) + delta * upsample(mask(x)): values, the pattern's gradient and the mask network's."""
    torch.manual_seed(0)
    module = trained(fnn.MaskedPrompt(16, patch=patch, mean=MEAN, std=STD)).eval()
    x = images(16)
    image = (x / 255 - M) / S
    agree(module, lambda d, _: image + d[0] * F.interpolate(module.mask_net(image), scale_factor=patch), x)
    weights = list(module.mask_net.parameters())
    g = torch.randn(3, 3, 16, 16)
    mine = torch.autograd.grad(module(x), weights, g)
    plain = image + module.prompt[0] * F.interpolate(module.mask_net(image), scale_factor=patch)
    for one, other in zip(mine, torch.autograd.grad(plain, weights, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert module.taxonomy.operator is Operator.PARAMETRIC


@pytest.mark.parametrize(("layers", "wanted"), [(5, 26_499), (6, 102_339)])
def test_smm_mask_network_sizes(layers, wanted):
    net = fnn.MaskNet(layers=layers)
    assert sum(parameter.numel() for parameter in net.parameters()) == wanted
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 4, 4)


def test_smm_with_a_zero_prompt_gives_the_mask_no_gradient():
    module = fnn.MaskedPrompt(16)
    module(images(16)).square().sum().backward()
    assert all(not parameter.grad.any() for parameter in module.mask_net.parameters())
    assert module.prompt.grad.any()


@pytest.mark.parametrize("scale", [1.0, 1.3, 0.6, 40.0])
def test_autovp_trains_the_scale(scale):
    """The image enlarged about the centre, the prompt where it is not; the scale is kept in [0.1, 5]."""
    module = trained(fnn.PaddedPrompt(16, 8, mean=MEAN, std=STD, trainable_scale=True))
    with torch.no_grad():
        module.image_scale.fill_(scale)
    x = images(8)
    out = module(x)
    kept = min(scale, 5.0)
    theta = torch.tensor([[16 / 8 / kept, 0, 0], [0, 16 / 8 / kept, 0]])
    grid = F.affine_grid(theta.expand(3, 2, 3), [3, 3, 16, 16], align_corners=False)
    placed = F.grid_sample(x / 255, grid, align_corners=False)
    side = int(8 * kept)
    free = torch.ones(16, 16)
    low = max(0, (16 - side + 1) // 2)
    free[low : max(low, 16 - (16 - side) // 2), low : max(low, 16 - (16 - side) // 2)] = 0
    if (16 - side) % 2 == 0 or side >= 16:
        torch.testing.assert_close(out, (placed + torch.sigmoid(module.prompt[0]) * free - M) / S, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    assert module.prompt.grad is not None
    assert (module.image_scale.grad == 0) == (scale > 5)  # clamped: no gradient
    assert module.taxonomy.operator is Operator.CONCATENATIVE


def test_the_gradient_of_the_scale_is_right():
    scale = torch.tensor(1.37, dtype=torch.float64, requires_grad=True)
    x = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, x: functional.scale_image(x, s, 9), (scale, x))


def test_dvp_applies_every_prompt_to_the_batch():
    """K padded prompts, K encoder inputs from one image."""
    module = trained(fnn.PaddedPrompt(16, 6, prompts=3, mean=MEAN, std=STD))
    agree(module, lambda d, x: (pad(x, 16) + torch.sigmoid(d)[:, None] * outside(6, 16) - M) / S, images(6))


def test_dam_vp_chooses_the_nearest_prototype():
    module = trained(fnn.FramePrompt(10, 2, prompts=4, mean=MEAN, std=STD))
    x = images(10, batch=6)
    prototypes = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    index = torch.cdist(x.float().flatten(1) / 255, prototypes).argmin(1)
    index[:2] = torch.tensor([3, 1])
    frame = torch.ones(10, 10)
    frame[2:-2, 2:-2] = 0
    looped = torch.cat([(x[i : i + 1] / 255 - M) / S + module.prompt[index[i]] * frame for i in range(6)])
    out = module(x, index)
    torch.testing.assert_close(out, looped, rtol=1e-5, atol=1e-5)
    g = torch.randn(out.shape)
    (mine,), (theirs,) = (torch.autograd.grad(value, module.prompt, g) for value in (out, looped))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_blackvip_adds_a_generated_prompt_and_clips_each_channel():
    torch.manual_seed(0)
    generator = nn.Conv2d(3, 3, 3, padding=1)
    low, high = [(0 - m) / s for m, s in zip(MEAN, STD, strict=True)], [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    module = fnn.GeneratedPrompt(12, generator, mean=MEAN, std=STD, low=low, high=high, scale=2.0)
    x = images(12)
    image = (x / 255 - M) / S
    wanted = torch.minimum(
        torch.maximum(image + 2 * generator(image), torch.tensor(low)[:, None, None]), torch.tensor(high)[:, None, None]
    )
    out = module(x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert (out == wanted.amax((0, 2, 3), keepdim=True)).any()  # something was clipped
    g = torch.randn(out.shape)
    for mine, theirs in zip(
        torch.autograd.grad(out, generator.parameters(), g),
        torch.autograd.grad(wanted, generator.parameters(), g),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("on_signal", [False, True])
def test_voice2series(segments, on_signal):
    """Copies at multiples of the series' length, equally spaced; the formula leaves the signal alone, the code does not."""
    length, series = 50, 8
    module = trained(fnn.SeriesPrompt(length, series, segments=segments, on_signal=on_signal))
    x = torch.randn(4, series)
    step = length // series // segments * series
    tiled, free = torch.zeros(4, length), torch.ones(length)
    for copy_ in range(segments):
        tiled[:, copy_ * step : copy_ * step + series] = x
        free[copy_ * step : copy_ * step + series] = 0
    wanted = tiled + module.prompt.flatten() * (1 if on_signal else free)
    torch.testing.assert_close(module(x), wanted)
    (mine,), (theirs,) = (torch.autograd.grad(v.square().sum(), module.prompt) for v in (module(x), wanted))
    torch.testing.assert_close(mine, theirs)
    assert module.trainable == (length if on_signal else length - segments * series)


def test_voice2series_drops_out_the_prompt_in_training():
    module = trained(fnn.SeriesPrompt(100, 10, dropout=0.4))
    x = torch.zeros(1, 10)
    torch.manual_seed(0)
    dropped = (module.train()(x)[0, 10:] == 0).float().mean()
    assert 0.2 < dropped < 0.6
    assert (module.eval()(x)[0, 10:] != 0).all()


# ---- As modules ----

MODULES = {
    "padded": lambda: fnn.PaddedPrompt(16, 6, mean=MEAN, std=STD),
    "padded, several": lambda: fnn.PaddedPrompt(16, (6, 7), prompts=2, squash="tanh", memory_format="channels_last"),
    "padded, masked": lambda: fnn.PaddedPrompt(16, 6, mask=torch.eye(16, dtype=torch.bool)),
    "padded, scaled": lambda: fnn.PaddedPrompt(16, 6, trainable_scale=True),
    "frame": lambda: fnn.FramePrompt(16, 3, low=-1, high=(1, 2, 3)),
    "patch": lambda: fnn.PatchPrompt(16, 5, (2, 3), dtype="bfloat16"),
    "masked": lambda: fnn.MaskedPrompt(16, patch=4),
    "generated": lambda: fnn.GeneratedPrompt(16, nn.Conv2d(3, 3, 1)),
    "series": lambda: fnn.SeriesPrompt(40, 6, segments=2, channels=3),
}


def inputs(name: str) -> Tensor:
    x = images(6, batch=2)
    return x[:, :, 0] / 255 if name == "series" else x


@pytest.fixture(params=MODULES)
def named(request):
    torch.manual_seed(0)
    module = MODULES[request.param]().eval()
    return request.param, trained(module) if hasattr(module, "prompt") else module


def test_copies_pickles_and_state(named):
    name, module = named
    x = inputs(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    torch.manual_seed(5)
    fresh = MODULES[name]().eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), module(x))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert set(state) == set(MODULES[name]().state_dict())


def test_constructor_arguments_come_back(named):
    name, module = named
    config = module.config()
    if name == "generated":
        assert config["generator"] == "?"
        return
    if "mask" in config:
        config["mask"] = module.mask  # a tensor of the state
    other = type(module)(**config)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(inputs(name)), module(inputs(name)))
    assert repr(other) == repr(module)
    assert other.taxonomy == module.taxonomy


def test_printing_says_what_it_is():
    text = repr(fnn.PaddedPrompt(224, 128, prompts=2, mean=MEAN, std=STD))
    for part in ("PaddedPrompt(", "3x224x224", "image=128x128", "prompts=2", "squash=sigmoid", "trainable=101,376"):
        assert part in text, text


def test_half_and_double_keep_mean_and_std(named):
    _, module = named
    before = module.norm.clone()
    module.half().float()
    assert torch.equal(module.norm, before)
    assert module.norm.dtype == torch.float32
    module.bfloat16()
    if hasattr(module, "prompt"):
        assert module.prompt.dtype == torch.bfloat16
    module.double()
    assert torch.equal(module.norm, before)


def test_the_meta_device(named):
    _, module = named
    assert module.to("meta").norm.is_meta


def test_compiles_without_graph_breaks(named):
    name, module = named
    x = inputs(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, module(x))
    parameters = list(module.parameters())
    mine = torch.autograd.grad(out.float().square().sum(), parameters)
    theirs = torch.autograd.grad(module(x).float().square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_autocast_decides_the_output_dtype(named):
    name, module = named
    with torch.autocast("cpu", torch.bfloat16):
        assert module(inputs(name)).dtype == torch.bfloat16
    wanted = torch.bfloat16 if name == "patch" else torch.float32
    assert module(inputs(name)).dtype == wanted


def test_gray_images_are_repeated_and_nhwc_is_understood():
    module = trained(fnn.PaddedPrompt(16, 6, mean=MEAN, std=STD))
    gray = images(6, channels=1)
    assert torch.equal(module(gray), module(gray.expand(-1, 3, -1, -1)))
    other = trained(fnn.PaddedPrompt(16, 6, mean=MEAN, std=STD, data_format="NHWC", memory_format="contiguous"))
    x = images(6)
    assert torch.equal(other(x.permute(0, 2, 3, 1).contiguous()), module(x))


def test_images_of_another_size_are_resized():
    module = trained(fnn.PaddedPrompt(16, 6, mean=MEAN, std=STD, interpolation="bicubic"))
    wanted = module(reference.resize(images(9), (6, 6), "bicubic"))
    torch.testing.assert_close(module(images(9)), wanted)


def _ddp(rank: int, meeting: str, results: str) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = {}
    for name in ("padded", "frame", "masked", "series"):
        torch.manual_seed(0)
        module = trained(MODULES[name]()).eval()
        parallel = nn.parallel.DistributedDataParallel(module)
        x = inputs(name)[rank : rank + 1]
        parallel(x).square().mean().backward()
        found[name] = [parameter.grad.clone() for parameter in module.parameters()]
    if rank == 0:
        torch.save(found, results)
    # The wrapper holds the process group: without it nothing is left to end while the interpreter shuts down.
    del parallel, module
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_average_the_gradient(tmp_path):
    results = str(tmp_path / "gradients")
    torch.multiprocessing.spawn(_ddp, (str(tmp_path / "meeting"), results), nprocs=2)
    for name, gradients in torch.load(results, weights_only=True).items():
        torch.manual_seed(0)
        module = trained(MODULES[name]()).eval()
        module(inputs(name)).square().mean().backward()
        for mine, parameter in zip(gradients, module.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.PaddedPrompt(16, 16), "image_size: expected smaller than the canvas 16x16, got the same size"),
        (lambda: fnn.PaddedPrompt(16, 17), "canvas: expected at least the image's 17x17, got 16x16"),
        (lambda: fnn.PaddedPrompt(16, 6, offset=(12, 0)), "offset: expected the image inside the 16x16 canvas"),
        (lambda: fnn.PaddedPrompt(16, 6, mask=torch.zeros(16, 16)), "mask: expected at least one trainable pixel"),
        (lambda: fnn.PaddedPrompt(16, 6, mask=torch.ones(8, 8)), r"mask: expected \[16, 16\]"),
        (lambda: fnn.PaddedPrompt(16, 6, squash="relu"), "squash: expected one of none, sigmoid, tanh, got 'relu'"),
        (lambda: fnn.PaddedPrompt(16, 6, mean=(0.1, 0.2)), "mean, std, low, high: expected one number or one per channel"),
        (lambda: fnn.PaddedPrompt(16, 6, std=0.0), "std: expected positive numbers"),
        (lambda: fnn.PaddedPrompt(16, 6, low=1.0, high=0.0), "low: expected at most high"),
        (lambda: fnn.PaddedPrompt(16, 6, prompts=0), "prompts: expected at least 1, got 0"),
        (lambda: fnn.PaddedPrompt(16, 6, channels=0), "channels: expected at least 1, got 0"),
        (lambda: fnn.PaddedPrompt(0, 6), "canvas: expected a positive size"),
        (lambda: fnn.PaddedPrompt(16, 6, dtype="int8"), "dtype: expected the name of a floating point dtype"),
        (lambda: fnn.FramePrompt(16, 0), "width: expected at least 1"),
        (lambda: fnn.PatchPrompt(16, 5, (13, 0)), r"position, patch: expected .* inside 16x16"),
        (lambda: fnn.PatchPrompt(16, 5, "left"), "position: expected one of random, got 'left'"),
        (lambda: fnn.MaskedPrompt(16, patch=3), "patch: expected a power of two"),
        (lambda: fnn.MaskedPrompt(16, prompts=2), "prompts: expected 1 for a MaskedPrompt, got 2"),
        (lambda: fnn.GeneratedPrompt(16, nn.Identity(), space="pixel"), "space: expected 'normalized' for a GeneratedPrompt"),
        (lambda: fnn.SeriesPrompt(16, 6, segments=3), "segments: expected 1 to 2 for this length, got 3"),
        (lambda: fnn.SeriesPrompt(16, 6, dropout=1.0), "dropout: expected a probability below 1"),
        (lambda: fnn.SeriesPrompt(16, 6)(torch.rand(2, 7)), r"x: expected \[B, 6\] or \[B, C, 6\], got \[2, 7\]"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
