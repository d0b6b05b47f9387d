"""The functions users call: checks with sentences, autocast, choice of path.

`impl` is "auto" (Triton kernels on a GPU, analytic PyTorch on a CPU, plain PyTorch for float64 and other devices),
"triton" (the kernels or an error; on CPU tensors only in Triton's interpreter) or "torch" (the differentiable reference).
"""

from fastprompt.functional.attention import prefix_attention
from fastprompt.functional.embedding import PADDING, map_vocabulary, place_prompt, soft_gather, soft_ids
from fastprompt.functional.mapping import count_labels_, map_labels, match_labels
from fastprompt.functional.perturbation import Normalization, normalization, perturb, scale_image

__all__ = [
    "PADDING",
    "Normalization",
    "count_labels_",
    "map_labels",
    "map_vocabulary",
    "match_labels",
    "normalization",
    "perturb",
    "place_prompt",
    "prefix_attention",
    "scale_image",
    "soft_gather",
    "soft_ids",
]
