"""Drop-in modules: parameters, initialisation, printing and state; the mathematics is in `fastprompt.functional`."""

from fastprompt.nn.mapping import LabelMap
from fastprompt.nn.perturbation import (
    FramePrompt,
    GeneratedPrompt,
    MaskedPrompt,
    MaskNet,
    PaddedPrompt,
    PatchPrompt,
    SeriesPrompt,
)

__all__ = [
    "FramePrompt",
    "GeneratedPrompt",
    "LabelMap",
    "MaskNet",
    "MaskedPrompt",
    "PaddedPrompt",
    "PatchPrompt",
    "SeriesPrompt",
]
