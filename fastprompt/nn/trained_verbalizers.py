"""Verbalizers without words: trained vectors and prototypes in the place of the head's rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad
from fastprompt.functional.mapping_heads import select_rows
from fastprompt.nn._shared import Drawn
from fastprompt.nn.verbalizers import OnHead, Verbalizer, class_loss
from fastprompt.taxonomy import Alignment, Place


class SoftVerbalizer(OnHead):
    """A trained vector a class in place of words: out[c] = v[c] . transform(h) + b[c].

    WARP (Hambardzumyan et al. 2021, arXiv 2101.00121). `from_words` starts v[c] from the mean of the head's rows of the
    class's words. The hidden states are taken to the dtype of the vectors; scores are float32 at least. Alignment: linear.

    Args:
        num_classes, width: C and d.
        bias: b; without, out[c] = v[c] . transform(h).

    Attributes:
        weight: Parameter [C, d], normal with standard deviation 0.02 unless `from_words` fills it. bias: Parameter [C], 0.
    """

    bias: Tensor | None

    def __init__(self, num_classes: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("width", width)):
            if size < 1:
                raise bad(name, "at least 1", size)
        self.num_classes, self.width = num_classes, width
        self.weight = nn.Parameter(torch.empty(num_classes, width).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None

    @classmethod
    def from_words(cls, verbalizer: Verbalizer, *, bias: bool = True) -> SoftVerbalizer:
        """Starts as the mean logit of every class's words on the head that the verbalizer is attached to, and attaches to it.

        Raises:
            ValueError: the verbalizer has no head, or takes the maximum over tokens, which no vector does.
        """
        if verbalizer._head is None:
            raise bad("verbalizer", "one with a head (call attach first)", "one without")
        if verbalizer._inner is not None and verbalizer.tokens == "max":
            raise bad("verbalizer", 'tokens="first" or "mean", which a vector can be', '"max"')
        with torch.no_grad():
            weight, offset = functional.fold(verbalizer._classes, *verbalizer._label_rows())
            made = cls(*weight.shape, bias=bias).to(weight.device)
            made.weight.copy_(weight)
            if made.bias is not None and offset is not None:
                made.bias.copy_(offset)
        made._head = verbalizer._head
        return made

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.LINEAR)

    def _check_head(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape[-1] != self.width:
            raise bad("head", f"a weight [V, {self.width}]", list(weight.shape))

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """hidden [B, d], [B, T, d] with rows [B], or [M, d] with rows [R] -> class scores [R, C].

        Only the head's transform is used, and none without a head.
        """
        scores = F.linear(self._states(hidden, rows, self.weight).to(self.weight.dtype), self.weight, self.bias)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def dense(self) -> Tensor:
        """The cosines between the vectors of the classes, [C, C]."""
        return _cosines(self.weight)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as data."""
        return {"num_classes": self.num_classes, "width": self.width, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        head = "" if self._head is None else ", attached"
        return f"{self.width} -> {self.num_classes}, bias={self.bias is not None}{head}"


class PrototypicalVerbalizer(Drawn, nn.Module):
    """Cosines between projected hidden states and trained prototypes: out[c] = cos(A h, m[c]).

    ProtoVerb (Cui et al. 2022, arXiv 2203.09770). Its loss is the sum of two, with S the cosine and z = A h:

        prototypes   mean over samples i of       -log( exp S(z_i, m[y_i]) / sum over c of exp S(z_i, m[c]) )
        instances    mean over pairs y_i = y_j of -log( exp S(z_i, z_j) / (exp S(z_i, z_j) + N_j) ),
                     N_j = sum over k with y_k != y_j of exp S(z_k, z_j)

    A sample is a pair with itself, as in OpenPrompt, whose two losses for K samples of each class are these over C. Computed
    as matrices, in float32 at least; samples with target -100 are left out. Alignment: linear.

    Args:
        num_classes, width: C and d.
        size: of the prototypes.

    Attributes:
        project: nn.Linear(d, size) without bias. prototypes: Parameter [C, size], Xavier uniform.
    """

    def __init__(self, num_classes: int, width: int, size: int = 64) -> None:
        super().__init__()
        for name, count in (("num_classes", num_classes), ("width", width), ("size", size)):
            if count < 1:
                raise bad(name, "at least 1", count)
        self.num_classes, self.width, self.size = num_classes, width, size
        self.project = nn.Linear(width, size, bias=False)
        self.prototypes = nn.Parameter(torch.empty(num_classes, size))
        nn.init.xavier_uniform_(self.prototypes)

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.LINEAR)

    def _unit(self, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected states and prototypes of length 1; a state of zeros stays 0."""
        z = self.project(select_rows(hidden, rows, self.project.weight).to(self.project.weight.dtype))
        wide = torch.promote_types(z.dtype, torch.float32)
        return F.normalize(z.to(wide), dim=1), F.normalize(self.prototypes.to(wide), dim=1)

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """hidden [B, d], [B, T, d] with rows [B], or [M, d] with rows [R] -> cosines [R, C]."""
        z, prototypes = self._unit(hidden, rows)
        with _no_autocast(z):
            return z @ prototypes.T

    def loss(self, hidden: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """Both losses; target int64 [R]."""
        z, prototypes = self._unit(hidden, rows)
        with _no_autocast(z):
            return class_loss(z @ prototypes.T, target) + _instance_loss(z @ z.T, target)

    def dense(self) -> Tensor:
        """The cosines between the prototypes, [C, C]."""
        return _cosines(self.prototypes)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as data."""
        return {"num_classes": self.num_classes, "width": self.width, "size": self.size}

    def extra_repr(self) -> str:
        return f"{self.width} -> {self.num_classes}, size={self.size}"


def _cosines(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors.detach().float(), dim=1)
    return unit @ unit.T


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _instance_loss(similar: Tensor, target: Tensor) -> Tensor:
    kept = target != -100
    kept = kept[:, None] & kept
    same = (target[:, None] == target) & kept
    others = torch.where(kept & ~same, similar, -torch.inf).logsumexp(0)  # of the samples of other classes with j
    pairs = F.softplus(others - similar)
    return torch.where(same, pairs, 0).sum() / same.sum()
