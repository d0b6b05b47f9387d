"""The four dimensions of neural network reprogrammability (Ye et al. 2025, arXiv 2506.04650).

    y_hat = O_omega ( f ( I_{lambda, tau, ell} (x, c) ) )          f frozen

lambda is the `Format` of the manipulation, ell its `Location`, tau its `Operator`, omega the output `Alignment`. A module
answers `.taxonomy` with a `Place`; an input leaves `alignment` open, an output leaves the other three open.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    """lambda: what is applied."""

    FIXED = "fixed"
    LEARNABLE = "learnable"


class Location(Enum):
    """ell: where it is applied."""

    RAW = "raw input"
    EMBEDDING = "embedding"
    HIDDEN = "hidden"


class Operator(Enum):
    """tau: how it is applied. Concatenative iff prompt and input share no position."""

    ADDITIVE = "additive"
    CONCATENATIVE = "concatenative"
    PARAMETRIC = "parametric"


class Alignment(Enum):
    """omega: how outputs are read. Statistical iff estimated by counting, linear iff trained by gradient."""

    IDENTITY = "identity"
    STRUCTURAL = "structural"
    STATISTICAL = "statistical"
    LINEAR = "linear"


@dataclass(frozen=True)
class Place:
    """A point of the taxonomy; None where a module has nothing to say."""

    format: Format | None = None
    location: Location | None = None
    operator: Operator | None = None
    alignment: Alignment | None = None

    def __or__(self, other: Place) -> Place:
        """The place of an input and an output together."""
        mine, theirs = vars(self), vars(other)
        return Place(**{name: theirs[name] if mine[name] is None else mine[name] for name in mine})

    def __str__(self) -> str:
        return " / ".join("-" if part is None else part.value for part in vars(self).values())
