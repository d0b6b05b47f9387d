"""Drop-in modules: parameters, initialisation, printing and state; the mathematics is in `fastprompt.functional`."""

from fastprompt.nn.attention import (
    DeepPrompt,
    PrefixKV,
    PromptAttention,
    SoftPrompt,
    scaled_dot_product_attention,
)
from fastprompt.nn.mapping import AttributeMap, BayesianMap, DescriptionMap, LabelMap, LinearMap, Refresh
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
    "AttributeMap",
    "BayesianMap",
    "DeepPrompt",
    "DescriptionMap",
    "FramePrompt",
    "GeneratedPrompt",
    "LabelMap",
    "LinearMap",
    "MaskNet",
    "MaskedPrompt",
    "PaddedPrompt",
    "PatchPrompt",
    "PrefixKV",
    "PromptAttention",
    "Refresh",
    "SeriesPrompt",
    "SoftPrompt",
    "scaled_dot_product_attention",
]
