"""The functions users call: checks with sentences, autocast, choice of path.

`impl` is "auto" (Triton kernels on a GPU, analytic PyTorch on a CPU, plain PyTorch for float64 and other devices),
"triton" (the kernels or an error; on CPU tensors only in Triton's interpreter) or "torch" (the differentiable reference).
"""

from fastprompt.functional.attention import prefix_attention
from fastprompt.functional.embedding import PADDING, map_vocabulary, place_prompt, soft_gather, soft_ids
from fastprompt.functional.mapping import Segments, map_labels, mapped_cross_entropy, segments, stack_maps
from fastprompt.functional.mapping_counts import COUNT_UNIT, bayesian_matrix, count_labels_, match_labels
from fastprompt.functional.mapping_heads import LabelColumns, fold, label_columns, label_head
from fastprompt.functional.perturbation import Normalization, Rows, normalization, perturb, scale_image

__all__ = [
    "COUNT_UNIT",
    "PADDING",
    "LabelColumns",
    "Normalization",
    "Rows",
    "Segments",
    "bayesian_matrix",
    "count_labels_",
    "fold",
    "label_columns",
    "label_head",
    "map_labels",
    "map_vocabulary",
    "mapped_cross_entropy",
    "match_labels",
    "normalization",
    "perturb",
    "place_prompt",
    "prefix_attention",
    "scale_image",
    "segments",
    "soft_gather",
    "soft_ids",
    "stack_maps",
]
