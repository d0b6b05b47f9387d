"""Drop-in modules: parameters, initialisation, printing and state; the mathematics is in `fastprompt.functional`."""

from fastprompt.nn.attention import (
    DeepPrompt,
    PrefixKV,
    PromptAttention,
    SoftPrompt,
    scaled_dot_product_attention,
)
from fastprompt.nn.embedding import EmbeddingMap, PromptTokens, PrototypeAttention, TrainableTokens
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
from fastprompt.nn.trained_verbalizers import PrototypicalVerbalizer, SoftVerbalizer
from fastprompt.nn.verbalizers import (
    ContextualCalibration,
    KnowledgeableVerbalizer,
    LabelHead,
    Verbalizer,
    label_head_of,
)

__all__ = [
    "AttributeMap",
    "BayesianMap",
    "ContextualCalibration",
    "DeepPrompt",
    "DescriptionMap",
    "EmbeddingMap",
    "FramePrompt",
    "GeneratedPrompt",
    "KnowledgeableVerbalizer",
    "LabelHead",
    "LabelMap",
    "LinearMap",
    "MaskNet",
    "MaskedPrompt",
    "PaddedPrompt",
    "PatchPrompt",
    "PrefixKV",
    "PromptAttention",
    "PromptTokens",
    "PrototypeAttention",
    "PrototypicalVerbalizer",
    "Refresh",
    "SeriesPrompt",
    "SoftPrompt",
    "SoftVerbalizer",
    "TrainableTokens",
    "Verbalizer",
    "label_head_of",
    "scaled_dot_product_attention",
]
