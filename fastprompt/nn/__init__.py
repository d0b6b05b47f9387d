"""Drop-in modules: parameters, initialisation, printing and state; the mathematics is in `fastprompt.functional`."""

from fastprompt.nn.attention import (
    DeepPrompt,
    PrefixKV,
    PromptAttention,
    SoftPrompt,
    scaled_dot_product_attention,
)
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
    "DeepPrompt",
    "FramePrompt",
    "GeneratedPrompt",
    "LabelMap",
    "MaskNet",
    "MaskedPrompt",
    "PaddedPrompt",
    "PatchPrompt",
    "PrefixKV",
    "PromptAttention",
    "SeriesPrompt",
    "SoftPrompt",
    "scaled_dot_product_attention",
]
