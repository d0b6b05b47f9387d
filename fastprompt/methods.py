"""The survey's methods by name: each a few lines over `fastprompt.nn`. For example:

    model = build("ilm-vp", frozen, canvas=224, image_size=32, num_source=1000, num_classes=10, mean=..., std=...)

`fastprompt methods` prints them with their place in the taxonomy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastprompt.nn import FramePrompt, LabelMap, MaskedPrompt, PaddedPrompt, PatchPrompt, SeriesPrompt
from fastprompt.reprogram import Reprogrammed
from fastprompt.taxonomy import Place


@dataclass(frozen=True)
class Method:
    """A method of the literature: where it comes from, and what makes its input and output."""

    name: str
    paper: str
    summary: str
    inputs: Callable[..., nn.Module]
    labels: str | None  # the method of a `LabelMap`, None reads f's outputs as they are

    def place(self) -> Place:
        """Where it lies, read off a small example of its modules."""
        example = {"length": 8, "series_length": 2} if self.inputs is _series else {"canvas": 8, "image_size": 4}
        outputs = None if self.labels is None else LabelMap(4, 2, method=self.labels)
        return Reprogrammed(nn.Identity(), self.inputs(**example), outputs).taxonomy


def _padded(squash: str, mask_first: bool = False, **fixed: Any) -> Callable[..., nn.Module]:
    def make(canvas: Any, image_size: Any, **options: Any) -> nn.Module:
        settings: dict[str, Any] = {"squash": squash, "mask_first": mask_first} | fixed | options
        return PaddedPrompt(canvas, image_size, **settings)

    return make


def _full(kind: type[nn.Module], *arguments: Any, **fixed: Any) -> Callable[..., nn.Module]:
    """A prompt on an image that fills the canvas: there is no image size."""

    def make(canvas: Any, image_size: Any = None, **options: Any) -> nn.Module:
        return kind(canvas, *arguments, **(fixed | options))

    return make


def _patch(canvas: Any, image_size: Any = None, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"patch": 4, "position": "random", "init": "normal"} | options
    return PatchPrompt(canvas, **settings)


def _series(length: int, series_length: int, **options: Any) -> nn.Module:
    return SeriesPrompt(length, series_length, **options)


_ILM, _VP = "Chen et al. 2023, arXiv 2211.11635", "Bahng et al. 2022, arXiv 2203.17274"
_AR, _SMM = "Elsayed et al. 2019, arXiv 1806.11146", "Cai et al. 2024, arXiv 2406.03150"
_AUTOVP, _BLM = "Tsao et al. 2024, arXiv 2310.08381", "Cai et al. 2024, arXiv 2410.24018"
_V2S = "Yang et al. 2021, arXiv 2106.09296"

METHODS = {
    method.name: method
    for method in (
        Method("rlm-vp", _ILM, "padded prompt, random label map", _padded("sigmoid"), "random"),
        Method("flm-vp", _ILM, "padded prompt, frequent label map", _padded("sigmoid"), "frequent"),
        Method("ilm-vp", _ILM, "padded prompt, iterative label map", _padded("sigmoid"), "iterative"),
        Method("ar", _AR, "padded tanh(W * M), fixed label map", _padded("tanh", True), "random"),
        Method("autovp", _AUTOVP, "padded prompt, trained image scale", _padded("sigmoid", trainable_scale=True), "iterative"),
        Method("smm", _SMM, "sample-specific masks of one pattern", _full(MaskedPrompt), "iterative"),
        Method("vp", _VP, "frame of 30 pixels on the image", _full(FramePrompt, 30, init="normal"), None),
        Method("vp-patch", _VP, "patch at a random place", _patch, None),
        Method("watermark", _BLM, "prompt on the whole image", _full(FramePrompt, None), "iterative"),
        Method("voice2series", _V2S, "tiled series, prompt in the gaps", _series, "random"),
    )
}


def build(
    name: str, model: nn.Module, *, num_source: int | None = None, num_classes: int | None = None, **options: Any
) -> Reprogrammed:
    """A frozen model reprogrammed by a named method (`fastprompt methods` lists them).

    Args:
        name: such as "ilm-vp".
        model: f; it is frozen in place.
        num_source, num_classes: S of the source labels and T of the target, for methods with a label map.
        options: of the method's input module: canvas and image_size (or length and series_length), mean, std, ...
    """
    if name not in METHODS:
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    outputs = None
    if method.labels is not None:
        if num_source is None or num_classes is None:
            raise ValueError(f"num_source, num_classes: expected both for {name}, got {num_source} and {num_classes}")
        outputs = LabelMap(num_source, num_classes, method=method.labels)
    return Reprogrammed(model, method.inputs(**options), outputs)


def table() -> str:
    """The methods with their place in the taxonomy, as aligned text."""
    head = ("method", "format", "location", "operator", "alignment", "what it does", "paper")
    rows = [head]
    for method in METHODS.values():
        cells = ["-" if part is None else part.value for part in vars(method.place()).values()]
        rows.append((method.name, *cells, method.summary, method.paper))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
