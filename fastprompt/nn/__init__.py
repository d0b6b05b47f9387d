"""Drop-in modules: parameters, initialisation, printing and state; the mathematics is in `fastprompt.functional`."""

from fastprompt.nn.attention import (
    DeepPrompt,
    PrefixKV,
    PromptAttention,
    SoftPrompt,
    scaled_dot_product_attention,
)
from fastprompt.nn.embedding import EmbeddingMap, PromptTokens, PrototypeAttention, TrainableTokens
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
    "EmbeddingMap",
    "FramePrompt",
    "GeneratedPrompt",
    "LabelMap",
    "MaskNet",
    "MaskedPrompt",
    "PaddedPrompt",
    "PatchPrompt",
    "PrefixKV",
    "PromptAttention",
    "PromptTokens",
    "PrototypeAttention",
    "SeriesPrompt",
    "SoftPrompt",
    "TrainableTokens",
    "scaled_dot_product_attention",
]
