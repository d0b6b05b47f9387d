"""Label maps as modules: which source class a target class reads.

target_logits = label_map(source_logits)            [B, num_source] -> [B, num_classes]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, one_of
from fastprompt.taxonomy import Alignment, Place


class LabelMap(nn.Module):
    """A one-to-one label map, random, frequent or iterative: out[b, t] = logits[b, index[t]].

    - "random" (RLM; Elsayed et al. 2019, arXiv 1806.11146): a random permutation's first classes, fixed by the seed.
    - "frequent" (FLM): the source classes that the frozen model most often predicts for each target class, counted once
      before training.
    - "iterative" (ILM; Chen et al. 2023, arXiv 2211.11635): the same, counted again as the prompt is trained.

    A frequent or iterative map starts as the random one. To refresh it, count the predictions, then match:

        label_map.reset_counts()
        for x, y in train:
            label_map.count(model(x), y)
        label_map.refresh()

    `fastprompt.fit` does so by `refresh_every`: None never, 0 once before the first epoch, n before every n-th epoch.

    Args:
        num_source: S, the frozen model's classes.
        num_classes: T, the task's classes, at most S.
        method: "random", "frequent" or "iterative".
        seed: of the random map; the global generator is not touched.
        refresh_every: epochs between two refreshes of an iterative map. Default: 1.

    Attributes:
        index: buffer, int64 [T], no source twice: the source class of every target class.
        counts: buffer, int64 [S, T], not saved: how often a source was predicted for a target. None before counting.

    Raises:
        ValueError: more classes than sources, an unknown method, or refresh_every where it has no meaning.
    """

    index: Tensor
    counts: Tensor | None

    def __init__(
        self, num_source: int, num_classes: int, method: str = "iterative", *, seed: int = 0,
        refresh_every: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= num_classes <= num_source:
            raise bad("num_classes", f"1 to {num_source}, the number of source classes", num_classes)
        self.num_source, self.num_classes, self.seed = num_source, num_classes, seed
        self.method = one_of("method", method, ("random", "frequent", "iterative"))
        if refresh_every is not None and (method != "iterative" or refresh_every < 1):
            raise bad("refresh_every", 'at least 1, and only for method="iterative"', refresh_every)
        self.refresh_every = {"random": None, "frequent": 0, "iterative": refresh_every or 1}[method]
        shuffled = torch.randperm(num_source, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.register_buffer("index", shuffled[:num_classes].clone())
        self.register_buffer("counts", None, persistent=False)

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.STATISTICAL)

    def forward(self, logits: Tensor) -> Tensor:
        """source logits [B, S] -> target logits [B, T], in their dtype."""
        return functional.map_labels(logits, self.index)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of the mapped source logits [B, S], in float32 at least; target int64 [B]."""
        mapped = self(logits)
        return nn.functional.cross_entropy(mapped if mapped.dtype == torch.float64 else mapped.float(), target)

    def reset_counts(self) -> None:
        """Starts counting from zero."""
        self.counts = torch.zeros((self.num_source, self.num_classes), dtype=torch.int64, device=self.index.device)

    def count(self, logits: Tensor, target: Tensor) -> None:
        """Counts the source that each sample is predicted as: logits [B, S], target int64 [B], on their device."""
        if self.counts is None:
            self.reset_counts()
        assert self.counts is not None
        functional.count_labels_(self.counts, logits, target)

    def refresh(self) -> None:
        """The greedy one-to-one map of what was counted.

        Raises:
            RuntimeError: the map is random, or nothing was counted.
        """
        if self.method == "random":
            raise RuntimeError('LabelMap: method="random" has a fixed map; use "frequent" or "iterative" to refresh it')
        if self.counts is None:
            raise RuntimeError("LabelMap: nothing to refresh from; call reset_counts and count first")
        self.index.copy_(functional.match_labels(self.counts))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as data."""
        every = self.refresh_every if self.method == "iterative" else None
        return {
            "num_source": self.num_source, "num_classes": self.num_classes, "method": self.method, "seed": self.seed,
            "refresh_every": every,
        }  # fmt: skip

    def extra_repr(self) -> str:
        every = f", refresh_every={self.refresh_every}" if self.method == "iterative" else ""
        return f"{self.num_source} -> {self.num_classes}, method={self.method}{every}"
