"""The survey's methods by name: each a few lines over `fastprompt.nn`. For example:

    model = build("ilm-vp", frozen, canvas=224, image_size=32, num_source=1000, num_classes=10, mean=..., std=...)

`fastprompt methods` prints them with their place in the taxonomy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastprompt.clip import ConditionalPrompts, ContextPrompts, CoupledPrompts, ZeroShot
from fastprompt.instruction import ChainOfThought, Demonstrations
from fastprompt.nn import (
    AttributeMap,
    BayesianMap,
    DeepPrompt,
    DescriptionMap,
    FramePrompt,
    LabelMap,
    LinearMap,
    MaskedPrompt,
    PaddedPrompt,
    PatchPrompt,
    PrefixKV,
    SeriesPrompt,
    SoftPrompt,
)
from fastprompt.reprogram import Reprogrammed
from fastprompt.taxonomy import Alignment, Place


@dataclass(frozen=True)
class Method:
    """A method of the literature: where it comes from, and what makes its input and output."""

    name: str
    paper: str
    summary: str
    inputs: Callable[..., nn.Module]
    labels: Callable[..., nn.Module] | None  # from (S, T) to the output module; None reads f's outputs as they are

    def place(self) -> Place:
        """Where it lies, read off a small example of its modules."""
        example = {"length": 8, "series_length": 2} if self.inputs is _series else {"canvas": 8, "image_size": 4}
        outputs = None if self.labels is None else self.labels(4, 2)
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


def _labels(method: str, **fixed: Any) -> Callable[..., nn.Module]:
    return lambda sources, classes, **options: LabelMap(sources, classes, method, **(fixed | options))


def _map(kind: type[nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    return lambda sources, classes, **options: kind(sources, classes, **(fixed | options))


def _groups(sources: int, classes: int, **options: Any) -> nn.Module:
    """All sources, in equal groups: the mean of their probabilities."""
    settings: dict[str, Any] = {"sources_per_class": sources // max(classes, 1), "of": "probabilities"} | options
    return LabelMap(sources, classes, "groups", **settings)


def _bar(sources: int, classes: int, **options: Any) -> nn.Module:
    """Six sources a class, as in the paper's code, or as many as there are: the mean of their probabilities."""
    settings: dict[str, Any] = {"sources_per_class": min(6, sources // max(classes, 1)), "of": "probabilities"} | options
    return LabelMap(sources, classes, "frequent", **settings)


def _per_class(sources: int, classes: int, sets: int = 1) -> int:
    """How many descriptions or attributes a class has, when the sources are those of all classes."""
    if sources % (sets * classes):
        raise ValueError(f"num_source: expected a multiple of {sets * classes}, {sets} for each class, got {sources}")
    return sources // (sets * classes)


def _attributes(sources: int, classes: int, **options: Any) -> nn.Module:
    return AttributeMap(classes, _per_class(sources, classes, 2), **options)


def _descriptions(sources: int, classes: int, **options: Any) -> nn.Module:
    """For three prompts, one a cause; for v of them build with prompts=v and labels={"prompts": v}."""
    return DescriptionMap(classes, _per_class(sources, classes), **({"prompts": 3} | options))


_ILM, _VP = "Chen et al. 2023, arXiv 2211.11635", "Bahng et al. 2022, arXiv 2203.17274"
_AR, _SMM = "Elsayed et al. 2019, arXiv 1806.11146", "Cai et al. 2024, arXiv 2406.03150"
_AUTOVP, _BLM = "Tsao et al. 2024, arXiv 2310.08381", "Cai et al. 2024, arXiv 2410.24018"
_V2S, _BAR = "Yang et al. 2021, arXiv 2106.09296", "Tsai et al. 2020, arXiv 2007.08714"
_ATTRVR, _DVP = "Cai et al. 2025, arXiv 2501.13982", "Cai et al. 2025, arXiv 2506.01000"
_SCALED = _padded("sigmoid", trainable_scale=True)

METHODS = {
    method.name: method
    for method in (
        Method("rlm-vp", _ILM, "padded prompt, random label map", _padded("sigmoid"), _labels("random")),
        Method("flm-vp", _ILM, "padded prompt, frequent label map", _padded("sigmoid"), _labels("frequent")),
        Method("ilm-vp", _ILM, "padded prompt, iterative label map", _padded("sigmoid"), _labels("iterative")),
        Method("blm", _BLM, "padded prompt, Bayesian label map", _padded("sigmoid"), _map(BayesianMap)),
        Method("blm+", _BLM, "padded prompt, Bayesian map of top-k", _padded("sigmoid"), _map(BayesianMap, top=0.15)),
        Method("ar", _AR, "padded tanh(W * M), the first classes", _padded("tanh", True), _labels("first")),
        Method("bar", _BAR, "padded tanh(W * M), several labels", _padded("tanh", True), _bar),
        Method("autovp", _AUTOVP, "padded prompt, trained image scale", _SCALED, _labels("iterative")),
        Method("autovp-fc", _AUTOVP, "the same, trained map", _SCALED, _map(LinearMap)),
        Method("smm", _SMM, "sample-specific masks of one pattern", _full(MaskedPrompt), _labels("iterative")),
        Method("vp", _VP, "frame of 30 pixels on the image", _full(FramePrompt, 30, init="normal"), None),
        Method("vp-patch", _VP, "patch at a random place", _patch, None),
        Method("watermark", _BLM, "prompt on the whole image", _full(FramePrompt, None), _labels("iterative")),
        Method("voice2series", _V2S, "tiled series, groups of labels", _series, _groups),
        Method("attrvr", _ATTRVR, "padded prompt, the best attributes", _padded("sigmoid"), _attributes),
        Method("dvp", _DVP, "a prompt a cause, description weights", _padded("sigmoid", prompts=3), _descriptions),
    )
}

_TWO = [{"text": 0, "label": 0}] * 2
# What `build` does not make: something that states its place, what makes it, where it comes from.
ELSEWHERE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "prompt-tuning": (lambda: SoftPrompt(1, 1), "attach(model, nn.SoftPrompt)", "Lester et al. 2021, arXiv 2104.08691"),
    "prefix-tuning": (lambda: PrefixKV(1, 1, 1, 1), "attach(model, nn.PrefixKV)", "Li and Liang 2021, arXiv 2101.00190"),
    "vpt-deep": (lambda: DeepPrompt(1, 1, 1), "attach(model, nn.DeepPrompt)", "Jia et al. 2022, arXiv 2203.12119"),
    "zero-shot": (lambda: ZeroShot, "clip.ZeroShot", "Radford et al. 2021, arXiv 2103.00020"),
    "coop": (lambda: ContextPrompts, "clip.ContextPrompts", "Zhou et al. 2022, arXiv 2109.01134"),
    "cocoop": (lambda: ConditionalPrompts, "clip.ConditionalPrompts", "Zhou et al. 2022, arXiv 2203.05557"),
    "maple": (lambda: CoupledPrompts, "clip.CoupledPrompts", "Khattak et al. 2023, arXiv 2210.03117"),
    "icl": (lambda: Demonstrations(_TWO, "{text}{label}"), "instruction.Demonstrations", "Brown et al. 2020, arXiv 2005.14165"),
    "structured": (
        lambda: Demonstrations(_TWO, "{text}{label}", groups=2),
        "instruction.Demonstrations(groups=n)",
        "Hao et al. 2022, arXiv 2212.06713",
    ),
    "cot": (lambda: ChainOfThought(), "instruction.ChainOfThought", "Wei et al. 2022, arXiv 2201.11903"),
}


def build(
    name: str, model: nn.Module, *, num_source: int | None = None, num_classes: int | None = None,
    labels: dict[str, Any] | None = None, head: str | None = None, **options: Any,
) -> Reprogrammed:  # fmt: skip
    """A frozen model reprogrammed by a named method (`fastprompt methods` lists them).

    Args:
        name: such as "ilm-vp".
        model: f; it is frozen in place.
        num_source, num_classes: S of the source labels and T of the target, for methods with a label map. For "attrvr" and
            "dvp" sources are the texts of all classes.
        labels: options of the output module, such as {"sources_per_class": 3}.
        head: of `Reprogrammed`.
        options: of the method's input module: canvas and image_size (or length and series_length), mean, std, ...
    """
    if name not in METHODS:
        how = f", which is made by {ELSEWHERE[name][1]}" if name in ELSEWHERE else ""
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {name!r}{how}")
    method = METHODS[name]
    outputs = None
    if method.labels is not None:
        if num_source is None or num_classes is None:
            raise ValueError(f"num_source, num_classes: expected both for {name}, got {num_source} and {num_classes}")
        outputs = method.labels(num_source, num_classes, **(labels or {}))
    return Reprogrammed(model, method.inputs(**options), outputs, head=head)


def table() -> str:
    """The methods with their place in the taxonomy, as aligned text."""
    head = ("method", "format", "location", "operator", "alignment", "what it does", "paper")
    rows, reads = [head], Place(alignment=Alignment.IDENTITY)
    found = [(method.name, method.place(), method.summary, method.paper) for method in METHODS.values()]
    found += [(name, make().taxonomy | reads, how, paper) for name, (make, how, paper) in ELSEWHERE.items()]
    for name, place, *more in found:
        rows.append((name, *("-" if part is None else part.value for part in vars(place).values()), *more))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
