"""The pictures of the demo: the prompt, the label map, the accuracy while training."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt.reprogram import Reprogrammed

from . import glyphs, source


def read_as(model: source.SourceModel, reprogrammed: Reprogrammed) -> list[tuple[str, str]]:
    """(character, name) that each class of the label map reads."""
    labels: Any = reprogrammed.outputs
    return [(model.class_characters[i][0], model.class_names[i]) for i in labels.index.tolist()]


def require_matplotlib() -> None:
    """Raises an ImportError that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "fastprompt[demo]"') from error


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that needs no display and leaves the user's matplotlib settings alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


@torch.no_grad()
def draw_prompt(reprogrammed: Reprogrammed, images: Tensor, path: Path) -> None:
    """The trained border alone, and around some digits: pixel values, where 0 is black ground."""
    inputs: Any = reprogrammed.inputs
    shown = torch.cat([torch.zeros_like(images[:1]), images[:5]])
    pixels = (inputs(shown) * source.STD + source.MEAN).cpu()
    figure, axes = _figure(1, len(pixels), (12, 2.4))
    for axis, canvas in zip(axes[0], pixels, strict=True):
        drawn = axis.imshow(canvas[0], cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
    axes[0, 0].set_title("prompt")
    figure.colorbar(drawn, ax=axes[0, -1])
    figure.savefig(path, dpi=150)


def draw_labels(
    model: source.SourceModel,
    frequent: Reprogrammed,
    iterative: Reprogrammed,
    part: tuple[Tensor, Tensor],
    path: Path,
) -> None:
    """One digit of each class above the printed character that it is read as, before and after."""
    images, labels = (tensor.cpu() for tensor in part)
    figure, axes = _figure(3, 10, (14, 5))
    for digit in range(10):
        axes[0, digit].imshow(images[labels == digit][0, 0], cmap="gray")
        axes[0, digit].set_title(str(digit))
    for row, reprogrammed in ((1, frequent), (2, iterative)):
        for digit, (character, name) in enumerate(read_as(model, reprogrammed)):
            axes[row, digit].imshow(glyphs.render("DejaVuSans", ord(character)), cmap="gray")
            axes[row, digit].set_title(textwrap.fill(name, 20), fontsize=7)
    for row, title in enumerate(("handwritten", "FLM, before training", "ILM, after training")):
        axes[row, 0].set_ylabel(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


def draw_map(model: source.SourceModel, labels: Any, title: str, path: Path) -> None:
    """Which printed characters each digit reads, as a heat map."""
    figure, axes = _figure(1, 1, (8, 10))
    names = [textwrap.shorten(name, 45) for name in model.class_names]
    labels.plot(names, [str(digit) for digit in range(10)], ax=axes[0, 0])
    axes[0, 0].set_title(title)
    axes[0, 0].tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=150)


def draw_curves(
    curves: dict[str, list[dict[str, float]]],
    accuracy: dict[str, list[float]],
    titles: dict[str, str],
    path: Path,
) -> None:
    """Validation accuracy after each epoch, and the test accuracy of what has no epochs."""
    figure, axes = _figure(1, 1, (7, 4.5))
    axis = axes[0, 0]
    for method, rows in curves.items():
        axis.plot(
            [row["epoch"] for row in rows],
            [100 * row["validation"] for row in rows],
            marker="o",
            label=titles[method],
        )
    for key, style in (("untrained", ":"), ("pixels", "--"), ("probe", "-.")):
        axis.axhline(accuracy[key][0], color="gray", linestyle=style, label=f"{titles[key]} (test)")
    axis.set(xlabel="epoch", ylabel="validation accuracy in %", ylim=(0, 101))
    axis.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=150)
