"""Prompts on the raw input as modules: model_input = prompt(images), [B, C, h, w] -> [B, C, H, W].

Each takes any dataset's tensors straight: uint8 or float, one channel or several.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, one_of, pair
from fastprompt.functional.perturbation import Numbers, Rows, placed_at, rectangle
from fastprompt.reference.perturbation import Rect
from fastprompt.taxonomy import Format, Location, Operator, Place

Size = int | Sequence[int]

_MEMORY_FORMATS = {
    "preserve": None,
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def _parts(x: Tensor | Rows) -> tuple[Tensor, Tensor | None]:
    """(images, which of them the samples are, or None for all)."""
    return (x.images, x.rows) if isinstance(x, Rows) else (x, None)


def _plain(value: Any) -> Any:
    """A constructor argument as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


class InputPrompt(nn.Module):
    """What the prompts on images share: the canvas, the normalisation, the space the prompt is added in, the output.

    Args:
        canvas: the model's input size, H or (H, W).
        channels: C of the model's input. Images with one channel are repeated.
        mean, std: the model's normalisation, for pixels in [0, 1]; a number or one per channel.
        low, high: the valid range that prompted pixels are clamped to; None leaves a side open.
        straight_through: let the gradient through where pixels are clamped.
        space: "pixel" (the prompt is added before normalising) or "normalized" (after).
        squash: "none", "sigmoid" or "tanh", applied to the prompt.
        mask_first: squash(prompt * M) instead of squash(prompt) * M.
        scale: what the squashed prompt is multiplied by.
        prompts: how many prompts are trained. `forward(x, index)` uses prompt index[b] for sample b; without an index
            several prompts are all applied to the whole batch and the output is [prompts, B, C, H, W].
        init: "zeros" or "normal" (standard normal).
        interpolation: how images of another size are resized, "bilinear" or "bicubic", antialiased, as Pillow does.
        data_format: of the images, "NCHW" or "NHWC".
        dtype: of the output, such as "bfloat16". Default: autocast's, else that of float images, else the default dtype.
        memory_format: of the output, "preserve", "contiguous" or "channels_last".

    Attributes:
        prompt: Parameter [prompts, C, window height, window width].
    """

    takes_rows = True  # `forward` takes images of a set (`functional.Rows`) as it takes a batch

    norm: Tensor
    mask: Tensor | None
    window: Rect
    hole: Rect
    image: Rect

    def __init__(
        self, canvas: Size, *, channels: int = 3, mean: Numbers = 0.0, std: Numbers = 1.0,
        low: Numbers | None = None, high: Numbers | None = None, straight_through: bool = False,
        space: str = "pixel", squash: str = "none", mask_first: bool = False, scale: float = 1.0,
        prompts: int = 1, init: str = "zeros", interpolation: str = "bilinear", data_format: str = "NCHW",
        dtype: str | None = None, memory_format: str = "preserve",
    ) -> None:  # fmt: skip
        super().__init__()
        self.canvas = pair("canvas", canvas)
        if channels < 1:
            raise bad("channels", "at least 1", channels)
        if prompts < 1:
            raise bad("prompts", "at least 1", prompts)
        self.channels, self.prompts = channels, prompts
        self.mean, self.std, self.low, self.high = (_plain(value) for value in (mean, std, low, high))
        self.straight_through = straight_through
        self.space = one_of("space", space, ("pixel", "normalized"))
        self.squash = one_of("squash", squash, ("none", "sigmoid", "tanh"))
        self.mask_first, self.scale = mask_first, scale
        self.init = one_of("init", init, ("zeros", "normal"))
        self.interpolation = one_of("interpolation", interpolation, ("bilinear", "bicubic"))
        self.data_format = one_of("data_format", data_format, ("NCHW", "NHWC"))
        if dtype is not None and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
            raise bad("dtype", 'the name of a floating point dtype, such as "bfloat16"', repr(dtype))
        self.dtype = dtype
        self.memory_format = one_of("memory_format", memory_format, tuple(_MEMORY_FORMATS))
        self.register_buffer("norm", None, persistent=False)
        self.register_buffer("mask", None)
        self._set_norm(torch.device("cpu"))

    def _set_norm(self, device: torch.device) -> None:
        self.norm, self._clamp = functional.normalization(
            self.mean, self.std, self.low, self.high,
            channels=self.channels, straight_through=self.straight_through, device=device,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.norm.dtype != torch.float32 and not self.norm.is_meta:  # .half() is for weights, not for mean and std
            self._set_norm(self.norm.device)
        return self

    def _set_prompt(self, window: Rect, hole: Rect, mask: Any = None, persistent: bool = True) -> None:
        """The trainable tensor on its window, and the pixel mask."""
        self.window, self.hole = window, hole
        self.prompt = nn.Parameter(torch.empty(self.prompts, self.channels, window[2], window[3]))
        if mask is not None:
            mask = torch.as_tensor(mask)
            height, width = self.canvas
            if mask.shape[-2:] != (height, width) or mask.dim() not in (2, 3):
                raise bad("mask", f"[{height}, {width}] or [C, {height}, {width}]", list(mask.shape))
            self.register_buffer("mask", mask, persistent)
        if not self.trainable:
            raise bad("mask", "at least one trainable pixel on the canvas", "none")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.prompt) if self.init == "zeros" else nn.init.normal_(self.prompt)

    @property
    def trainable(self) -> int:
        """How many positions of one prompt reach the model's input."""
        on = torch.zeros(self.canvas, dtype=torch.bool)
        on[self.window[0] : self.window[0] + self.window[2], self.window[1] : self.window[1] + self.window[3]] = True
        on[self.hole[0] : self.hole[0] + self.hole[2], self.hole[1] : self.hole[1] + self.hole[3]] = False
        on = on.expand(self.channels, *self.canvas)
        return int((on if self.mask is None else on & (self.mask.cpu() != 0)).sum())

    @property
    def taxonomy(self) -> Place:
        """Concatenative iff no prompted position lies on the image."""
        y, x, height, width = self.image
        apart = self.hole[0] <= y and self.hole[1] <= x
        apart = apart and y + height <= self.hole[0] + self.hole[2] and x + width <= self.hole[1] + self.hole[3]
        leaks = self.mask_first and self.squash == "sigmoid"  # sigmoid(0) = 1/2 lands on the image too
        operator = Operator.CONCATENATIVE if apart and not leaks else Operator.ADDITIVE
        return Place(Format.LEARNABLE, Location.RAW, operator)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        names = {**inspect.signature(InputPrompt).parameters, **inspect.signature(type(self)).parameters}
        held = {name: _plain(getattr(self, name)) for name in names if hasattr(self, name)}
        return held | ({"mask": None} if "mask" in held else {})  # the pixel mask is a tensor of the state

    def extra_repr(self) -> str:
        height, width = self.canvas
        parts = [f"{self.channels}x{height}x{width}", f"trainable={self.trainable:,}", f"squash={self.squash}"]
        parts += [f"space={self.space}"]
        parts += [f"prompts={self.prompts}"] if self.prompts > 1 else []
        parts += [f"image={self.image[2]}x{self.image[3]}"] if hasattr(self, "image") else []
        return ", ".join(parts)

    def _perturb(self, x: Tensor | Rows, prompt: Tensor | None, **options: Any) -> Tensor:
        """`functional.perturb` with this module's settings."""
        if isinstance(x, Rows):
            options |= {"rows": x.rows}
            x = x.images
        settings: dict[str, Any] = {
            "canvas": self.canvas, "norm": functional.Normalization(self.norm, self._clamp), "space": self.space,
            "interpolation": self.interpolation, "data_format": self.data_format,
            "dtype": None if self.dtype is None else getattr(torch, self.dtype),
            "memory_format": _MEMORY_FORMATS[self.memory_format],
        }  # fmt: skip
        if prompt is not None:
            settings |= {
                "squash": self.squash, "mask_first": self.mask_first, "scale": self.scale,
                "window": self.window, "hole": self.hole, "mask": self.mask,
            }  # fmt: skip
        return functional.perturb(x, prompt, **(settings | options))

    def _share(self, index: Tensor | None) -> dict[str, Any]:
        return {"index": index, "share": "index" if index is not None else "product" if self.prompts > 1 else "batch"}

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        """images [B, C, h, w], or `Rows` of a set -> model input [B, C, H, W]; index int64 [B] chooses each sample's prompt."""
        return self._perturb(x, self.prompt, resize=self.image[2:], offset=self.image[:2], **self._share(index))


class PaddedPrompt(InputPrompt):
    """The image in the middle of a larger canvas, the prompt around it: out = (place(x) + squash(delta) * M - mean) / std.

    The padding prompt of adversarial reprogramming (Elsayed et al. 2019, arXiv 1806.11146), ILM-VP (Chen et al. 2023, arXiv
    2211.11635), BLM, AutoVP, BAR and AttrVR. An odd difference of sizes puts the extra pixel at the top and left.

    Args:
        image_size: the image's size on the canvas; images of another size are resized to it.
        mask: extra pixel mask [H, W] or [C, H, W]; 0 is not prompted.
        offset: (top, left) of the image. Default: centred.
        on_image: prompt the image too (no hole).
        trainable_scale: learn one factor that enlarges the image about the centre, within [0.1, 5], and prompt what it
            leaves free (AutoVP, Tsao et al. 2024, arXiv 2310.08381). Bilinear without antialiasing.
        The other arguments are those of `InputPrompt`.

    Raises:
        ValueError: the image fills the canvas, or the mask leaves nothing to train.
    """

    def __init__(
        self, canvas: Size, image_size: Size, *, squash: str = "sigmoid", mask: Any = None,
        offset: Sequence[int] | None = None, on_image: bool = False, trainable_scale: bool = False, **shared: Any,
    ) -> None:  # fmt: skip
        super().__init__(canvas, squash=squash, **shared)
        self.image_size = pair("image_size", image_size)
        self.on_image, self.trainable_scale = on_image, trainable_scale
        height, width = self.canvas
        self.image = placed_at(self.image_size, self.canvas, offset, 1, 0)
        self.offset = self.image[:2]
        whole = on_image or trainable_scale
        if self.image_size == self.canvas and not whole:
            raise bad("image_size", f"smaller than the canvas {height}x{width}", "the same size")
        self._set_prompt((0, 0, height, width), (0, 0, 0, 0) if whole else self.image, mask)
        if trainable_scale:
            self.image_scale = nn.Parameter(torch.ones(()))

    @property
    def taxonomy(self) -> Place:
        """A trained scale moves the hole with the image: they stay apart."""
        place = super().taxonomy
        apart = self.trainable_scale and not (self.mask_first and self.squash == "sigmoid")
        return replace(place, operator=Operator.CONCATENATIVE) if apart else place

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        if not self.trainable_scale:
            return super().forward(x, index)
        images, rows = _parts(x)
        x = functional.perturb(
            images, resize=self.image_size, rows=rows, interpolation=self.interpolation, data_format=self.data_format
        )
        scale = self.image_scale.clamp(0.1, 5)
        beyond = [
            (torch.arange(size, device=x.device) - (size - 1) / 2).abs() * 2 >= torch.floor(side * scale.detach())
            for size, side in zip(self.canvas, self.image_size, strict=True)
        ]
        mask = beyond[0][:, None] | beyond[1]
        if self.mask is not None:
            mask = mask * self.mask
        placed = functional.scale_image(x, scale, self.canvas)
        return self._perturb(placed, self.prompt, mask=mask, data_format="NCHW", **self._share(index))


class FramePrompt(InputPrompt):
    """The image fills the canvas, the prompt is added on a frame of it: out = norm(x) + delta * M.

    The pad prompt of VP (Bahng et al. 2022, arXiv 2203.17274), the watermark of ILM-VP, BLM and SMM's baselines, and, one
    for every cluster, DAM-VP (Huang et al. 2023, arXiv 2303.08138).

    Args:
        width: of the frame in pixels, or None for the whole image.
        mask: extra pixel mask [H, W] or [C, H, W]; 0 is not prompted.
        The other arguments are those of `InputPrompt`; the prompt is added in normalised space by default.
    """

    def __init__(
        self, canvas: Size, width: int | None = 30, *, space: str = "normalized", mask: Any = None, **shared: Any
    ) -> None:
        super().__init__(canvas, space=space, **shared)
        height, across = self.canvas
        if width is not None and width < 1:
            raise bad("width", "at least 1, or None for the whole image", width)
        self.width = width
        self.image = (0, 0, height, across)
        inner = (0, 0, 0, 0)
        if width is not None and 2 * width < min(height, across):
            inner = (width, width, height - 2 * width, across - 2 * width)
        self._set_prompt(self.image, inner, mask)


class PatchPrompt(InputPrompt):
    """A small prompt on a full image, at a fixed place or at one random place a batch (VP, Bahng et al. 2022).

    Args:
        patch: size of the prompt.
        position: (top, left), or "random" for one place a forward pass while training (and the centre in eval mode).
        The other arguments are those of `InputPrompt`; the prompt is added in normalised space by default.
    """

    def __init__(
        self, canvas: Size, patch: Size, position: Sequence[int] | str = (0, 0), *, space: str = "normalized", **shared: Any
    ) -> None:
        super().__init__(canvas, space=space, **shared)
        self.patch = pair("patch", patch)
        self.image = (0, 0, *self.canvas)
        if isinstance(position, str):
            one_of("position", position, ("random",))
        self.position = position if isinstance(position, str) else (position[0], position[1])
        self.free = (self.canvas[0] - self.patch[0], self.canvas[1] - self.patch[1])
        top, left = (side // 2 for side in self.free) if isinstance(self.position, str) else self.position
        self._set_prompt(rectangle("position, patch", (top, left, *self.patch), self.canvas), (0, 0, 0, 0))

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        if not (self.training and self.position == "random"):
            return super().forward(x, index)
        # The window is a compile-time constant of the kernels, so a moving patch is written on a canvas of its own size.
        top, left = (int(torch.randint(side + 1, ())) for side in self.free)
        squashed = nn.functional.pad(self.prompt, (left, self.free[1] - left, top, self.free[0] - top))
        moved = {"window": (0, 0, *self.canvas), "mask": self._moved_mask(top, left)}
        return self._perturb(x, squashed, resize=self.canvas, **moved, **self._share(index))

    def _moved_mask(self, top: int, left: int) -> Tensor | None:
        """sigmoid(0) is not 0: outside the patch it has to be masked."""
        if self.squash != "sigmoid":
            return None
        mask = torch.zeros(self.canvas, dtype=torch.bool, device=self.prompt.device)
        mask[top : top + self.patch[0], left : left + self.patch[1]] = True
        return mask


class MaskNet(nn.Sequential):
    """SMM's mask generator: images [B, C, H, W] -> masks [B, channels, H / patch, W / patch], unbounded.

    3x3 convolutions C-8-16-32-64[-128]-channels with batch norm, ReLU and log2(patch) max pools (Cai et al. 2024, arXiv
    2406.03150): 26,499 parameters with 5 layers and patch 8, 102,339 with 6.
    """

    def __init__(self, channels: int = 3, out_channels: int = 3, patch: int = 8, layers: int = 5) -> None:
        if layers not in (5, 6):
            raise bad("layers", "5 or 6", layers)
        if patch not in (1, 2, 4, 8, 16, 32):
            raise bad("patch", "a power of two from 1 to 32", patch)
        pools = patch.bit_length() - 1
        widths = [8, 16, 32, 64, 128][: layers - 1]
        if pools > len(widths):
            raise bad("patch", f"at most {2 ** len(widths)} with {layers} layers", patch)
        parts: list[nn.Module] = []
        for place, (have, give) in enumerate(zip([channels, *widths], widths, strict=False)):
            parts += [nn.Conv2d(have, give, 3, padding=1), nn.BatchNorm2d(give), nn.ReLU()]
            parts += [nn.MaxPool2d(2)] if place < pools else []
        super().__init__(*parts, nn.Conv2d(widths[-1], out_channels, 3, padding=1))


class MaskedPrompt(InputPrompt):
    """Sample-specific masks: out = norm(x) + delta * upsample(mask_net(norm(x))) (SMM, Cai et al. 2024, arXiv 2406.03150).

    The mask is never upsampled in memory; one backward pass over the gradient serves the pattern and the mask.

    Args:
        mask_net: module from the normalised image [B, C, H, W] to [B, 1 or C, H / patch, W / patch], or None for
            `MaskNet(channels, channels, patch, layers)`.
        patch, layers: of the default mask network.
        The other arguments are those of `InputPrompt`. With a zero prompt the mask network has no gradient in the first
        step.
    """

    def __init__(
        self, canvas: Size, mask_net: nn.Module | None = None, *, patch: int = 8, layers: int = 5, **shared: Any
    ) -> None:
        super().__init__(canvas, **({"space": "normalized"} | shared))
        _refuse(self, space="normalized", prompts=1, mask_first=False, low=None, high=None)
        self.patch, self.layers = patch, layers
        self.image = (0, 0, *self.canvas)
        self._set_prompt(self.image, (0, 0, 0, 0))
        self.own_net = mask_net is None
        self.mask_net = MaskNet(self.channels, self.channels, patch, layers) if mask_net is None else mask_net

    @property
    def taxonomy(self) -> Place:
        return Place(Format.LEARNABLE, Location.RAW, Operator.PARAMETRIC)

    def config(self) -> dict[str, Any]:
        return _without_module(super().config(), "mask_net", self.own_net)

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        image = self._perturb(x, None, resize=self.canvas)
        return functional.perturb(
            image, self.prompt, cells=self.mask_net(image), squash=self.squash, scale=self.scale, dtype=image.dtype
        )


class GeneratedPrompt(InputPrompt):
    """A prompt image made from each image by another module: out = clamp(norm(x) + scale * generator(norm(x))).

    BlackVIP's coordinator (Oh et al. 2023, arXiv 2303.14773): a frozen encoder and a trained decoder, per-channel clamp to
    the valid range of the normalised image.

    Args:
        generator: any module from the normalised image [B, C, H, W] to prompts [B, C, H, W].
        low, high: valid range of the normalised image, None for no clamp.
        The other arguments are those of `InputPrompt`.
    """

    def __init__(self, canvas: Size, generator: nn.Module, **shared: Any) -> None:
        super().__init__(canvas, **({"space": "normalized"} | shared))
        _refuse(self, space="normalized", prompts=1, mask_first=False)
        self.image = (0, 0, *self.canvas)
        self.window, self.hole = self.image, (0, 0, 0, 0)
        self.generator = generator

    @property
    def taxonomy(self) -> Place:
        return Place(Format.LEARNABLE, Location.RAW, Operator.PARAMETRIC)

    def config(self) -> dict[str, Any]:
        return _without_module(super().config(), "generator", False)

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        clean = functional.Normalization(self.norm, "none")
        image = self._perturb(x, None, resize=self.canvas, norm=clean)
        identity = self.norm.clone()
        identity[0], identity[1] = 0, 1
        norm = functional.Normalization(identity, self._clamp)
        return functional.perturb(
            image, self.generator(image), share="sample", squash=self.squash, scale=self.scale, space="normalized",
            norm=norm, dtype=image.dtype,
        )  # fmt: skip


def _refuse(module: InputPrompt, **only: Any) -> None:
    """Shared arguments that have one meaning here."""
    for name, value in only.items():
        if getattr(module, name) != value:
            raise bad(name, f"{value!r} for a {type(module).__name__}", repr(getattr(module, name)))


def _without_module(config: dict[str, Any], name: str, default: bool) -> dict[str, Any]:
    """A module is code, not data: a checkpoint holds its tensors, and loading asks for it (None is the default one)."""
    config[name] = None if default else "?"
    return config


class SeriesPrompt(InputPrompt):
    """A 1-D series on a longer canvas, tiled in segments, with a prompt: out = tile(x) + delta * M.

    Voice2Series (Yang et al. 2021, arXiv 2106.09296): `segments` copies at equally spaced offsets that are multiples of the
    series' length, the first at 0; M is 0 over the signal unless `on_signal`.

    Args:
        length: of the model's input.
        series_length: of the series; segments * series_length must fit.
        segments: copies of the series.
        on_signal: prompt the signal too, as the published code does.
        dropout: on the prompt while training (0.4 in the published code).
        The other arguments are those of `InputPrompt`, with one channel by default.

    Shape:
        series [B, L] or [B, C, L], uint8 or float -> [B, length] or [B, C, length].
    """

    def __init__(
        self, length: int, series_length: int, *, segments: int = 1, on_signal: bool = False, dropout: float = 0.0,
        channels: int = 1, **shared: Any,
    ) -> None:  # fmt: skip
        super().__init__((1, length), channels=channels, **shared)
        _refuse(self, data_format="NCHW", memory_format="preserve")
        if not 1 <= segments * series_length <= length:
            raise bad("segments", f"1 to {length // max(series_length, 1)} for this length", segments)
        if not 0 <= dropout < 1:
            raise bad("dropout", "a probability below 1", dropout)
        self.length, self.series_length, self.segments = length, series_length, segments
        self.on_signal, self.dropout = on_signal, dropout
        self.period = length // series_length // segments * series_length
        self.image = (0, 0, 1, series_length)
        mask = None
        if not on_signal:
            place = torch.arange(length)
            mask = ((place % self.period >= series_length) | (place >= segments * self.period))[None]
        self._set_prompt((0, 0, 1, length), (0, 0, 0, 0), mask, persistent=False)

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name != "canvas"}

    @property
    def taxonomy(self) -> Place:
        operator = Operator.ADDITIVE if self.on_signal else Operator.CONCATENATIVE
        return Place(Format.LEARNABLE, Location.RAW, operator)

    def forward(self, x: Tensor | Rows, index: Tensor | None = None) -> Tensor:
        x, rows = _parts(x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.series_length:
            raise bad("x", f"[B, {self.series_length}] or [B, C, {self.series_length}]", list(x.shape))
        flat = x.dim() == 2
        x = x[:, None, None] if flat else x[:, :, None]
        prompt = nn.functional.dropout(self.prompt, self.dropout, self.training)
        tiles = {"offset": (0, 0), "copies": self.segments, "period": self.period}
        out = self._perturb(x, prompt, rows=rows, **tiles, **self._share(index)).squeeze(-2)
        return out.squeeze(-2) if flat and self.channels == 1 else out
