"""Output alignments as modules: how source classes become target classes.

target_logits = label_map(source_logits)            [B, num_source] -> [B, num_classes]

Where a map lies in the taxonomy follows from how it comes about: estimated by counting predictions it is statistical,
trained by gradient linear, and a fixed rule is structural.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional import Segments
from fastprompt.functional.checks import bad, check_labels, check_range, one_of
from fastprompt.nn._shared import Drawn
from fastprompt.taxonomy import Alignment, Place

_EMA_UNIT = 2**20  # what a sample counts in an average of arg-max counts


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When `fastprompt.fit` refreshes a counted map: exactly one of the first three. The first refresh is before any step.

    Args:
        every_epochs: before every n-th epoch.
        every_steps: before every n-th training step.
        once: before the first step only.
        online: count the predictions of the training steps themselves, which costs no pass of its own over the data (the
            "fast" BLM of Cai et al. 2024). Only the first refresh still makes one.
    """

    every_epochs: int | None = None
    every_steps: int | None = None
    once: bool = False
    online: bool = False

    def __post_init__(self) -> None:
        said = {"every_epochs": self.every_epochs, "every_steps": self.every_steps, "once": self.once or None}
        if sum(value is not None for value in said.values()) != 1:
            raise bad("Refresh", "exactly one of every_epochs, every_steps and once", said)
        for name, value in said.items():
            if value is not None and value < 1:
                raise bad(name, "at least 1", value)
        if self.once and self.online:
            raise bad("online", "False with once=True: there is nothing to count before the first step", True)

    @classmethod
    def of(cls, every: int | Refresh | None) -> Refresh | None:
        """From what a module's `refresh_every` may be: None never, 0 once, n every n-th epoch, or a schedule."""
        if every is None or isinstance(every, cls):
            return every
        assert isinstance(every, int)
        return cls(every_epochs=every) if every else cls(once=True)


Every = int | Refresh | dict[str, Any] | None


def _every(every: Every) -> int | Refresh | None:
    """The argument `refresh_every`; a table is a `Refresh` from a checkpoint."""
    if isinstance(every, dict):
        return Refresh(**every)
    if every is not None and not isinstance(every, Refresh) and every < 0:
        raise bad("refresh_every", "None (never), 0 (once), a number of epochs, or a Refresh", every)
    return every


def _sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise bad(name, "at least 1", size)


# ---- What maps share ----


class _Map(Drawn, nn.Module):
    """What every map shares: the loss, the fold, the picture, printing, the constructor's arguments as data."""

    num_source: int
    num_classes: int
    of = "logits"
    _alignment = Alignment.STRUCTURAL

    def __init__(self, num_source: int, num_classes: int) -> None:
        super().__init__()
        _sizes(num_source=num_source, num_classes=num_classes)
        self.num_source, self.num_classes = num_source, num_classes

    def _labels(self) -> tuple[Tensor | Segments | None, str | None]:
        """The map as `functional.map_labels` takes it, and its reduction; None where it is more than such a map."""
        return None, None

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=self._alignment)

    def forward(self, logits: Tensor) -> Tensor:
        """source logits [B, S] -> target logits [B, T]."""
        labels, reduce = self._labels()
        return functional.map_labels(logits, labels, reduce=reduce, of=self.of)

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The mean cross-entropy of the mapped source logits [B, S], in float32 at least; target int64 [B].

        options: of `functional.mapped_cross_entropy`, such as weight, label_smoothing, focal.
        """
        labels, reduce = self._labels()
        scores = self(logits) if labels is None else logits
        return functional.mapped_cross_entropy(scores, labels, target, reduce=reduce, of=self.of, **options)

    @property
    def foldable(self) -> bool:
        """Whether the map is linear in the logits and not trained, so that `fold` can put it into the head."""
        labels, reduce = self._labels()
        return labels is not None and self.of == "logits" and reduce in (None, "mean", "sum", "weighted")

    def fold(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The map and the head before it as one head: F.linear(h, *fold(weight, bias)) = self(F.linear(h, weight, bias)).

        Exact up to rounding. weight [S, d] may be the head of a classifier, or the text features of S prompts.

        Returns:
            weight [T, d] and bias [T] or None.

        Raises:
            ValueError: the map is not linear in the logits, is trained, or reads another number of sources.
        """
        labels, reduce = self._labels()
        if labels is None or not self.foldable:
            raise bad("fold", "a map that is linear in the logits and not trained", self)
        if weight.shape[0] != self.num_source:
            raise bad("weight", f"[{self.num_source}, d], a row a source", list(weight.shape))
        return functional.fold(labels, weight, bias, reduce=reduce)

    def dense(self) -> Tensor:
        """The map as a matrix, float [S, T]: how much each class reads of each source."""
        labels, reduce = self._labels()
        assert labels is not None
        if isinstance(labels, Tensor) and labels.is_floating_point():
            return labels.detach().clone()
        if isinstance(labels, Tensor):
            labels = functional.segments(labels[:, None], self.num_source)
        weights = labels.weights
        if weights is None:
            weights = torch.ones(len(labels.members), device=labels.members.device)
            if reduce == "mean":
                weights = weights / labels.starts.diff()[labels.owner]
        matrix = weights.new_zeros(self.num_source, self.num_classes)
        matrix[labels.members, labels.owner] = weights.detach()
        return matrix

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them; tensors are in the state."""
        held = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: dataclasses.asdict(each) if isinstance(each, Refresh) else each for name, each in held.items()}

    def extra_repr(self) -> str:
        shown = inspect.signature(type(self)).parameters
        parts = [
            f"{name}={getattr(self, name)}"
            for name in self.config()
            if name not in ("num_source", "num_classes", "seed") and getattr(self, name) != shown[name].default
        ]
        return ", ".join([f"{self.num_source} -> {self.num_classes}", *parts])


class _CountedMap(_Map):
    """A map that is estimated by counting predictions: reset_counts, count every batch, refresh.

    `counts` is no buffer: DistributedDataParallel would overwrite every rank's with those of rank 0.
    """

    _alignment = Alignment.STATISTICAL
    refresh_every: int | Refresh | None

    def __init__(self, num_source: int, num_classes: int, refresh_every: Every) -> None:
        super().__init__(num_source, num_classes)
        self.refresh_every = _every(refresh_every)
        self.counts: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _CountedMap:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.counts is not None:
            self.counts = fn(self.counts)
        return self

    def _cells(self) -> tuple[int, ...]:
        return self.num_source, self.num_classes

    def _count(self, counts: Tensor, logits: Tensor, target: Tensor) -> None:
        functional.count_labels_(counts, logits, target)

    def _match(self, counts: Tensor) -> None:
        raise NotImplementedError

    @torch.inference_mode(False)
    def reset_counts(self) -> None:
        """Starts counting from zero."""
        self.counts = torch.zeros(self._cells(), dtype=torch.int64, device=next(self.buffers()).device)

    @torch.no_grad()
    def count(self, logits: Tensor, target: Tensor) -> None:
        """Counts the predictions of a batch where they are: source logits [B, S], target int64 [B] (-100: not counted)."""
        if self.counts is None:
            self.reset_counts()
        assert self.counts is not None
        self._count(self.counts, logits, target)

    @torch.no_grad()
    def refresh(self) -> None:
        """The map of what was counted; where torch.distributed is initialised, of what all ranks counted (all call it).

        Raises:
            RuntimeError: the map is fixed, or nothing was counted.
        """
        if self.counts is None:
            raise RuntimeError(f"{type(self).__name__}: nothing to refresh from; call reset_counts and count first")
        counts = self.counts
        if dist.is_available() and dist.is_initialized():
            counts = counts.clone()  # a rank's own counts stay its own: a second refresh may follow
            dist.all_reduce(counts)
        self._match(counts)


# ---- One source a class, or a few ----


class LabelMap(_CountedMap):
    """A class reads one source, out[b, t] = logits[b, index[t]], or a few of them: a reduction over index[t, 0 .. m-1].

    - "random" (RLM; Elsayed et al. 2019, arXiv 1806.11146): a random permutation's first m T sources, fixed by the seed.
    - "first" (AR; Elsayed et al. 2019): class t reads source t.
    - "groups" (Voice2Series; Yang et al. 2021, arXiv 2106.09296): class t reads sources t m to (t + 1) m - 1.
    - "frequent" (FLM): the source classes that the frozen model most often predicts for each target class, counted once
      before training.
    - "iterative" (ILM; Chen et al. 2023, arXiv 2211.11635): the same, counted again as the prompt is trained.
    - "given": `from_index` and `from_similarity` make it.

    A frequent or iterative map starts as the random one. With `sources_per_class=m` (BAR, Tsai et al. 2020, arXiv
    2007.08714; AutoVP, Tsao et al. 2024, arXiv 2310.08381) the cells of the counts are walked from the largest (of equals
    the lowest source, then class), and a class takes each free source until it has m. A class that was never seen gets the
    lowest free sources. To refresh a map, count the predictions, then match:

        label_map.reset_counts()
        for x, y in train:
            label_map.count(model(x), y)
        label_map.refresh()

    `fastprompt.fit` does so by `refresh_every`. Choosing a template a class for CLIP (ILM-VP) is a map over all templates'
    texts, num_source = templates * classes; between refreshes `label_map.fold(text_features)` gives the T chosen rows.
    Under DistributedDataParallel all ranks refresh, or load, the same map: rank 0 alone would leave the others behind.

    Taxonomy: statistical where it is counted, else structural (surveys also file the random map under statistical).

    Args:
        num_source: S, the frozen model's classes.
        num_classes: T, the task's classes; m T is at most S.
        method: see above.
        seed: of the random map; the global generator is not touched.
        refresh_every: epochs between two refreshes of an iterative map, or a `Refresh`. Default: 1.
        sources_per_class: m.
        reduce: for several sources a class: "mean", "sum", "max" or "logsumexp" (of logits only).
        of: "logits" maps the source logits as they are; "probabilities" maps their softmax and returns the logarithm.
        matching: "greedy", or "optimal": the map with the largest sum of counts (SciPy's linear_sum_assignment).

    Attributes:
        index: buffer, int64: the sources of every class, [T], [T, m], or for classes of several sizes one after the other.
        counts: int64 [S, T], not saved: how often a source was predicted for a target. None before counting.

    Raises:
        ValueError: more classes than sources, an unknown method, or an argument where it has no meaning.
    """

    index: Tensor

    def __init__(
        self, num_source: int, num_classes: int, method: str = "iterative", *, seed: int = 0,
        refresh_every: Every = None, sources_per_class: int | Sequence[int] = 1, reduce: str = "mean", of: str = "logits",
        matching: str = "greedy",
    ) -> None:  # fmt: skip
        iterative = method == "iterative"
        epochs = isinstance(refresh_every, int)
        if refresh_every is not None and (not iterative or (epochs and refresh_every < 1)):  # type: ignore[operator]
            raise bad("refresh_every", 'at least 1, and only for method="iterative"', refresh_every)
        super().__init__(max(num_source, 1), max(num_classes, 1), refresh_every or 1)
        self.method = one_of("method", method, ("random", "first", "groups", "frequent", "iterative", "given"))
        if not 1 <= num_classes <= num_source and (method != "given" or num_classes < 1):
            raise bad("num_classes", f"1 to {num_source}, the number of source classes", num_classes)
        if not iterative:
            self.refresh_every = 0 if method == "frequent" else None
        self.seed = seed
        self.reduce = one_of("reduce", reduce, ("mean", "sum", "max", "logsumexp"))
        self.of = one_of("of", of, ("logits", "probabilities"))
        if reduce == "logsumexp" and of == "probabilities":
            raise bad("reduce", 'a reduction of probabilities ("sum" is what logsumexp is of logits)', repr(reduce))
        self.matching = one_of("matching", matching, ("greedy", "optimal"))
        self.sources_per_class = sources_per_class if isinstance(sources_per_class, int) else [*sources_per_class]
        self.register_buffer("index", self._start())
        self._segments: Segments | None = None
        self._seen: tuple[Any, ...] = ()
        self._update()

    def _start(self) -> Tensor:
        """The index before anything is counted."""
        m, sources, classes = self.sources_per_class, self.num_source, self.num_classes
        if not isinstance(m, int):
            if self.method != "given" or len(m) != classes or min(m) < 1:
                raise bad("sources_per_class", 'a number, or for method="given" one a class, at least 1', m)
            return torch.arange(sum(m)) % sources
        if not 1 <= m <= (sources if self.method == "given" else sources // classes):
            raise bad("sources_per_class", f"1 to {sources // classes}, as {classes} classes share {sources} sources", m)
        if self.method == "first" and m != 1:
            raise bad("sources_per_class", '1 for method="first" ("groups" has several)', m)
        index = torch.arange(m * classes)
        if self.method in ("random", "frequent", "iterative"):
            shuffled = torch.randperm(sources, generator=torch.Generator().manual_seed(self.seed), device="cpu")
            index = shuffled[: m * classes].clone()
        return (index % sources).view(classes, m).squeeze(1) if m == 1 else (index % sources).view(classes, m)

    @classmethod
    def from_index(
        cls, index: Tensor | Segments | Sequence[Sequence[int]], num_source: int, *, reduce: str = "mean", of: str = "logits"
    ) -> LabelMap:
        """A fixed map: int64 [T] or [T, m], a list of sources a class, or `Segments`. Classes may share sources.

        Raises:
            ValueError: a class without a source or with one twice, or a source out of range.
        """
        if isinstance(index, Segments):
            if index.num_maps != 1 or index.weights is not None or index.num_source != num_source:
                raise bad("index", f"one map of {num_source} sources, without weights", index)
            made = index
        else:
            single = isinstance(index, Tensor) and index.dim() == 1
            made = functional.segments(index[:, None] if single else index, num_source)  # type: ignore[call-overload, index]
        sizes = made.starts.diff().tolist()
        m = sizes[0] if sizes and set(sizes) == {sizes[0]} else sizes
        label_map = cls(num_source, len(sizes), "given", sources_per_class=m, reduce=reduce, of=of)
        label_map.index = made.members.view(label_map.index.shape).clone()
        label_map._update()
        return label_map

    @classmethod
    def from_similarity(
        cls, similarity: Tensor, sources_per_class: int = 1, *, reduce: str = "mean", of: str = "logits"
    ) -> LabelMap:
        """The semantic map of AutoVP: m rounds in which every class in turn takes its most similar free source.

        Args:
            similarity: float [S, T], such as the cosine of text embeddings of the class names. Of equals the first.
            sources_per_class: m; m T is at most S.
        """
        if similarity.dim() != 2 or not similarity.is_floating_point() or not bool(similarity.isfinite().all()):
            raise bad("similarity", "finite floating point numbers [S, T]", f"{similarity.dtype} {list(similarity.shape)}")
        sources, classes = similarity.shape
        m = sources_per_class
        if not 1 <= m * classes <= sources:
            raise bad("sources_per_class", f"1 to {sources // max(classes, 1)}, as classes share no source", m)
        left, index = similarity.detach().clone(), torch.empty((classes, m), dtype=torch.int64)
        for place in range(m):
            for t in range(classes):
                index[t, place] = best = int(left[:, t].argmax())
                left[best] = -torch.inf
        return cls.from_index(index.to(similarity.device), sources, reduce=reduce, of=of)

    @property
    def _alignment(self) -> Alignment:  # type: ignore[override]
        return Alignment.STATISTICAL if self.method in ("frequent", "iterative") else Alignment.STRUCTURAL

    @property
    def segments(self) -> Segments:
        """The map as `Segments`, on the device of the index."""
        # Under torch.compile a version cannot be asked for; whatever changes the index but a hand has updated them there.
        if not torch.compiler.is_compiling() and self._seen != _stamp(self.index):
            self._update()
        if self._segments is None:
            return functional.segments(self.index[:, None], self.num_source)
        return self._segments

    @torch.inference_mode(False)
    def _update(self) -> None:
        """`Segments` of several sources a class: they are made on the host, so only when the index has changed."""
        self._segments, self._seen = None, _stamp(self.index)
        if self.sources_per_class == 1 or self.index.is_meta:
            return
        classes: Any = self.index
        if isinstance(self.sources_per_class, list):
            starts = torch.tensor([0, *self.sources_per_class], device=self.index.device).cumsum(0)
            classes = (self.index, starts)
        self._segments = functional.segments(classes, self.num_source)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LabelMap:
        super()._apply(fn, recurse)
        self._update()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._update()

    def _labels(self) -> tuple[Tensor | Segments, str | None]:
        return (self.index, None) if self.sources_per_class == 1 else (self.segments, self.reduce)

    def refresh(self) -> None:
        if self.method not in ("frequent", "iterative"):
            raise RuntimeError(f'LabelMap: method="{self.method}" has a fixed map; use "frequent" or "iterative" to refresh it')
        super().refresh()

    def _match(self, counts: Tensor) -> None:
        m = self.sources_per_class
        assert isinstance(m, int)
        # m columns a class: the greedy walk of one-to-one maps over them is the walk in which a class takes m sources.
        index = functional.match_labels(counts.repeat_interleave(m, 1), optimal=self.matching == "optimal")
        self.index.copy_(index.view(self.index.shape))
        self._update()

    def config(self) -> dict[str, Any]:
        held = super().config()
        if self.method != "iterative":
            held["refresh_every"] = None
        new = {"sources_per_class": 1, "reduce": "mean", "of": "logits", "matching": "greedy"}  # not in old checkpoints
        return {name: value for name, value in held.items() if name not in new or value != new[name]}

    def extra_repr(self) -> str:
        held = self.config()
        parts = [f"{name}={held[name]}" for name in held if name not in ("num_source", "num_classes", "method", "seed")]
        if self.method != "iterative":
            parts.remove("refresh_every=None")
        return ", ".join([f"{self.num_source} -> {self.num_classes}", f"method={self.method}", *parts])


def _stamp(t: Tensor) -> tuple[Any, ...]:
    """Differs when the values may have changed, or moved."""
    return (t.data_ptr(), t.device, None if t.is_inference() else t._version)


# ---- Matrices that are counted ----


class BayesianMap(_CountedMap):
    """A class reads every source, weighted by how probable it makes the class: BLM and BLM+ (Cai et al. 2024, arXiv
    2410.24018). out = logits @ matrix, with N[s, t] the samples of class t that are predicted as source s:

        P[s, t] = N[s, t] / (sum_t N[s, t] + smoothing),    matrix[:, t] = P[:, t] / sum_s P[s, t]

    BLM counts the arg-max. BLM+ (top = 0.15 in the paper) adds the softmax probabilities of the k = max(1, int(top * T))
    largest logits; the published k is 0 below 7 classes, which gives NaN.

    A source that is never predicted has weight 0. A class that is never seen reads all sources alike, 1 / S, and so does
    every class before the first refresh.

    Taxonomy: statistical.

    Args:
        num_source, num_classes: S and T, in any proportion.
        top: None is BLM, a ratio BLM+.
        smoothing: the Laplace term in the denominator.
        momentum: keeps an average over refreshes, counts <- momentum * counts + new counts, which is in the state. For counts
            that are collected as training goes on (`Refresh(online=True)`). None: only what was counted since `reset_counts`.
        refresh_every: None never, 0 once, a number of epochs, or a `Refresh`.

    Attributes:
        matrix: buffer, float [S, T].
        history: buffer, int64 [S, T], with momentum: the average, in fixed point; a cell holds 2^22 samples / (1 - momentum).
        counts: int64 [S, T], not saved; with `top` a sample counts `functional.COUNT_UNIT`.
    """

    matrix: Tensor
    history: Tensor | None

    def __init__(
        self, num_source: int, num_classes: int, *, top: float | None = None, smoothing: float = 1.0,
        momentum: float | None = None, refresh_every: Every = 1,
    ) -> None:  # fmt: skip
        super().__init__(num_source, num_classes, refresh_every)
        if top is not None and not 0 < top < float("inf"):
            raise bad("top", "None (BLM) or a positive ratio of the classes (BLM+, 0.15 in the paper)", top)
        if not 0 <= smoothing < float("inf"):
            raise bad("smoothing", "0 or more", smoothing)
        if momentum is not None and not 0 <= momentum < 1:
            raise bad("momentum", "None, or 0 to below 1", momentum)
        self.top, self.smoothing, self.momentum = top, smoothing, momentum
        self.k = None if top is None else min(num_source, max(1, int(top * num_classes)))
        nothing = torch.zeros(num_source, num_classes, dtype=torch.int64)
        self.register_buffer("matrix", functional.bayesian_matrix(nothing))
        self.register_buffer("history", None if momentum is None else nothing)

    def _labels(self) -> tuple[Tensor | Segments, str | None]:
        return self.matrix, None

    def _count(self, counts: Tensor, logits: Tensor, target: Tensor) -> None:
        functional.count_labels_(counts, logits, target, k=self.k)

    def _match(self, counts: Tensor) -> None:
        unit = 1 if self.k is None else functional.COUNT_UNIT
        if self.history is not None:
            scale = _EMA_UNIT if self.k is None else 1
            assert self.momentum is not None
            counts = (self.history.double() * self.momentum).round().long() + counts * scale
            self.history.copy_(counts)
            unit *= scale
        self.matrix.copy_(functional.bayesian_matrix(counts, self.smoothing, unit))


class DescriptionMap(_CountedMap):
    """A class reads its own descriptions, weighted by how often its samples match them: the probabilistic reweighting matrix
    of DVP (Cai et al. 2025, Decoupled Visual Prompts, arXiv 2506.01000). Sources are descriptions, class after class:

        out[b, t] = sum over the descriptions a of class t of weight[a] * scores[b, a]
        weight[a] = how often a is among the `top` best of class t's descriptions, over the samples of t / the same of all a

    Of equals the first description counts. A class that is never seen keeps the initial weights, 1 / m each.

    With several prompts (decoupled: one a cause or a cluster) scores are [prompts, B, S], as `Reprogrammed` gives them, and
    description a is read from prompt `prompt_of[a]`; at first each class's descriptions are cut into equal parts in order.

    Taxonomy: statistical.

    Args:
        num_classes: T.
        descriptions: m for each class, or a number for each.
        top: how many of the true class's descriptions a sample counts.
        prompts: how many prompts f is run with.
        refresh_every: None never, 0 once, a number of epochs, or a `Refresh`.

    Attributes:
        weights: buffer, float [S], 1 in sum over each class.
        prompt_of: buffer, int64 [S], with several prompts.
        counts: int64 [S], not saved.
    """

    weights: Tensor
    prompt_of: Tensor | None

    def __init__(
        self, num_classes: int, descriptions: int | Sequence[int], *, top: int = 3, prompts: int = 1,
        refresh_every: Every = 1,
    ) -> None:  # fmt: skip
        _sizes(num_classes=num_classes, top=top, prompts=prompts)
        sizes = [descriptions] * num_classes if isinstance(descriptions, int) else [*descriptions]
        if len(sizes) != num_classes or min(sizes) < 1:
            raise bad("descriptions", f"a number, or one for each of {num_classes} classes, at least 1", descriptions)
        super().__init__(sum(sizes), num_classes, refresh_every)
        self.descriptions = descriptions if isinstance(descriptions, int) else sizes
        self.top, self.prompts = top, prompts
        starts = torch.tensor([0, *sizes]).cumsum(0)
        self._segments = functional.segments((torch.arange(self.num_source), starts), self.num_source)
        size = starts.diff()[self._segments.owner]
        place = self._segments.members - starts[self._segments.owner]
        self.register_buffer("weights", 1.0 / size)
        self.register_buffer("prompt_of", None if prompts == 1 else place * prompts // size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DescriptionMap:
        super()._apply(fn, recurse)
        self._segments = self._segments.to(self.weights.device)
        return self

    def _labels(self) -> tuple[Tensor | Segments, str | None]:
        return self._segments._replace(weights=self.weights), "weighted"

    @property
    def foldable(self) -> bool:
        return self.prompts == 1

    def _own_prompts(self, scores: Tensor) -> Tensor:
        """[prompts, B, S] -> [B, S]: each description from its prompt."""
        if self.prompt_of is None:
            return scores
        if scores.dim() != 3 or scores.shape[::2] != (self.prompts, self.num_source):
            raise bad("scores", f"[{self.prompts}, B, {self.num_source}]", list(scores.shape))
        chosen = self.prompt_of[None, :, None].expand(scores.shape[1], -1, 1)
        return scores.permute(1, 2, 0).gather(2, chosen).squeeze(2)

    def forward(self, logits: Tensor) -> Tensor:
        """scores [B, S], or [prompts, B, S], -> target logits [B, T]."""
        return super().forward(self._own_prompts(logits))

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return super().loss(self._own_prompts(logits), target, **options)

    def _cells(self) -> tuple[int, ...]:
        return (self.num_source,)

    def _count(self, counts: Tensor, logits: Tensor, target: Tensor) -> None:
        scores = self._own_prompts(logits)
        if scores.dim() != 2 or scores.shape[1] != self.num_source:
            raise bad("scores", f"[B, {self.num_source}]", list(scores.shape))
        check_labels("target", target, len(scores))
        check_range("target", target, self.num_classes, ignored=-100)
        known = (target >= 0) & (target < self.num_classes)
        row, segments = torch.where(known, target, 0), self._segments
        first, size = segments.starts[row][:, None], segments.starts.diff()[row][:, None]
        place = torch.arange(segments.longest, device=scores.device)
        own = scores.gather(1, (first + place).clamp(max=self.num_source - 1)).masked_fill(place >= size, -torch.inf)
        best = own.sort(dim=1, descending=True, stable=True).indices[:, : self.top]
        counted = (best < size) & known[:, None]  # a class with fewer descriptions than `top` counts them all
        counts.index_add_(0, torch.where(counted, first + best, 0).flatten(), counted.long().flatten())

    def _match(self, counts: Tensor) -> None:
        owner = self._segments.owner
        total = counts.new_zeros(self.num_classes).index_add_(0, owner, counts)[owner]
        self.weights.copy_(torch.where(total > 0, counts / total.clamp(min=1), 1.0 / self._segments.starts.diff()[owner]))


# ---- Rules ----


class AttributeMap(_Map):
    """A class reads the best of its attributes: AttrVR (Cai et al. 2025, arXiv 2501.13982). For its m descriptive and its m
    distinctive attributes

        out[b, t] = alpha * mean of the k largest descriptive scores + (1 - alpha) * mean of the k largest distinctive ones

    chosen again for every sample; of fewer than k attributes all are read. The gradient goes to the scores that are read.

    Taxonomy: structural.

    Args:
        num_classes: T.
        attributes: m. Sources are the descriptive attributes, class after class, then the distinctive ones: S = 2 T m.
        k: how many of m count.
        alpha: the share of the descriptive ones, 0 to 1.
    """

    def __init__(self, num_classes: int, attributes: int, *, k: int = 3, alpha: float = 0.5) -> None:
        _sizes(num_classes=num_classes, attributes=attributes, k=k)
        super().__init__(2 * num_classes * attributes, num_classes)
        if not 0 <= alpha <= 1:
            raise bad("alpha", "0 to 1", alpha)
        self.attributes, self.k, self.alpha = attributes, k, alpha
        half = num_classes * attributes
        self._segments = functional.segments(torch.arange(half).view(num_classes, attributes), half)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttributeMap:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._segments = self._segments.to(fn(self._segments.members).device)  # it holds no tensor of its own to ask
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """scores [B, 2 T m] -> target logits [B, T]."""
        if logits.dim() != 2 or logits.shape[1] != self.num_source:
            raise bad("scores", f"[B, {self.num_source}]: {self.attributes} attributes a class, twice", list(logits.shape))
        both = logits.unflatten(1, (2, -1)).flatten(0, 1)  # descriptive and distinctive rows in turn: one pass over them
        mapped = functional.map_labels(both, self._segments, reduce="top-k mean", k=self.k).unflatten(0, (-1, 2))
        return self.alpha * mapped[:, 0] + (1 - self.alpha) * mapped[:, 1]

    def dense(self) -> Tensor:
        """Float [S, T]: what each class could read of each attribute, were all of a class as good as each other."""
        own = torch.eye(self.num_classes, device=self._segments.members.device) / self.attributes
        own = own.repeat_interleave(self.attributes, 0)
        return torch.cat([self.alpha * own, (1 - self.alpha) * own])


# ---- Trained ----


class LinearMap(_Map):
    """A class reads every source through a trained matrix: out = logits @ W^T + b. On features it is a trained head.

    The fully connected map of AutoVP (Tsao et al. 2024, arXiv 2310.08381) and the trained output layer that BLM is compared
    with (Cai et al. 2024, arXiv 2410.24018).

    Taxonomy: linear.

    Args:
        num_source: S, or the width of the features.
        num_classes: T.
        weight: "free", or "sigmoid": W = sigmoid(parameter), so that every weight is between 0 and 1.
        rank: W = up @ down through so many dimensions, rank (S + T) parameters. None: W itself, S T of them.
        bias: whether b is trained (from 0) or absent.
        init: "normal": standard deviation 1 / sqrt(inputs) for each factor; "identity": W[t, t] = 1 and 0 elsewhere, class t
            starts as source t; or a tensor [T, S]. The last two have no rank, and "identity" is for "free".

    Attributes:
        weight: parameter [T, S]; with rank `down` [rank, S] and `up` [T, rank] instead. bias: parameter [T] or None.
    """

    _alignment = Alignment.LINEAR

    def __init__(
        self, num_source: int, num_classes: int, *, weight: str = "free", rank: int | None = None, bias: bool = True,
        init: str | Tensor = "normal",
    ) -> None:  # fmt: skip
        super().__init__(num_source, num_classes)
        self.form = one_of("weight", weight, ("free", "sigmoid"))
        if rank is not None and not 1 <= rank <= min(num_source, num_classes):
            raise bad("rank", f"None, or 1 to {min(num_source, num_classes)}", rank)
        self.rank = rank
        if isinstance(init, Tensor):
            shape = [num_classes, num_source]
            if rank is not None or list(init.shape) != shape or not init.is_floating_point():
                raise bad("init", f"a floating point {shape}, and no rank", f"{init.dtype} {list(init.shape)}, rank={rank}")
        elif one_of("init", init, ("normal", "identity")) == "identity" and (
            rank is not None or weight != "free" or num_classes > num_source
        ):
            raise bad("init", '"normal", or "identity" for a free matrix without rank and T <= S', repr(init))
        self.init = "normal" if isinstance(init, Tensor) else init
        if rank is None:
            self.weight = nn.Parameter(torch.empty(num_classes, num_source))
        else:
            self.down = nn.Parameter(torch.empty(rank, num_source))
            self.up = nn.Parameter(torch.empty(num_classes, rank))
        self.bias = nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()
        if isinstance(init, Tensor):
            with torch.no_grad():
                self.weight.copy_(init)

    def reset_parameters(self) -> None:
        """Starts again from `init` (from "normal" where a tensor was given)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "bias":
                    parameter.zero_()
                elif self.init == "identity":
                    parameter.copy_(torch.eye(*parameter.shape))
                else:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)

    def forward(self, logits: Tensor) -> Tensor:
        """[..., S] -> [..., T]."""
        if self.form == "sigmoid" or self.rank is None:
            return nn.functional.linear(logits, self._matrix(), self.bias)
        return nn.functional.linear(nn.functional.linear(logits, self.down), self.up, self.bias)

    def _matrix(self) -> Tensor:
        matrix = self.weight if self.rank is None else self.up @ self.down
        return torch.sigmoid(matrix) if self.form == "sigmoid" else matrix

    def dense(self) -> Tensor:
        return self._matrix().detach().T

    def config(self) -> dict[str, Any]:
        return {
            "num_source": self.num_source, "num_classes": self.num_classes, "weight": self.form, "rank": self.rank,
            "bias": self.bias is not None, "init": self.init,
        }  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{name}={self.config()[name]}" for name in ("weight", "rank", "bias", "init")]
        trainable = sum(parameter.numel() for parameter in self.parameters())
        return ", ".join([f"{self.num_source} -> {self.num_classes}", *parts, f"trainable={trainable:,}"])
