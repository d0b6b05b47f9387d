"""Label maps in plain PyTorch, differentiable, float32 inside (float64 for float64): applying, loss, counting, matching.

A map takes S source classes to T target classes, in one of three forms, or N of a form with a `map_id` for every sample:

    identity     None                             out = v
    one-to-one   index int64 [T] or [N, T]        out[b, t] = v[b, index[t]]
    segmented    `Segments`                       out[b, t] = reduce over the entries e of class t of v[b, members[e]]
    matrix       float [S, T] or [N, S, T]        out = v @ matrix

    of="logits"         v = scores - prior
    of="probabilities"  v = p / prior, p = softmax(scores), and out is the logarithm of what is above, by log-sum-exp

Random, frequent and iterative label maps (RLM, FLM, ILM): Chen et al. 2023 (arXiv 2211.11635). Bayesian label maps (BLM,
BLM+): Cai et al. 2024 (arXiv 2410.24018). Many-to-one: Tsai et al. 2020 (BAR, arXiv 2007.08714), Tsao et al. 2024 (AutoVP,
arXiv 2310.08381), Yang et al. 2021 (Voice2Series, arXiv 2106.09296).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COUNT_UNIT = 2**40
"""A probability of 1 in the counts of `count_labels_` with k: they are integers, so their sum has no order."""


class Segments(NamedTuple):
    """Every class reads a list of sources (compressed rows), for one map or N of them. `functional.segments` makes it.

    The entries stand class after class, map after map. `order` and `readers` are the inverse: who reads a source.
    """

    members: Tensor  # int64 [M]: the source of every entry
    starts: Tensor  # int64 [N*T + 1]: the entries of class t of map n are starts[n*T+t] to starts[n*T+t+1]
    order: Tensor  # int64 [M]: the entries sorted by (map, source), stable
    readers: Tensor  # int64 [N*S + 1]: those that read source s of map n are order[readers[n*S+s] : readers[n*S+s+1]]
    owner: Tensor  # int64 [M]: the class of every entry
    weights: Tensor | None  # float [M], for reduce="weighted"
    num_source: int  # S
    num_classes: int  # T
    num_maps: int  # N
    longest: int  # most entries of a class
    busiest: int  # most entries that read one source: 1 where classes share none

    def to(self, device: torch.device | str) -> Segments:
        """The same map on a device."""
        return self._replace(
            members=self.members.to(device), starts=self.starts.to(device), order=self.order.to(device),
            readers=self.readers.to(device), owner=self.owner.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )  # fmt: skip


Labels = Tensor | Segments


def segments(members: Tensor, starts: Tensor, sources: int, maps: int = 1, weights: Tensor | None = None) -> Segments:
    """`Segments` from its rows, without a look at the values: members [M], starts [N*T + 1]."""
    sizes = starts.diff()
    classes = len(sizes) // maps
    row = torch.repeat_interleave(torch.arange(len(sizes), device=members.device), sizes)
    key = (row // max(classes, 1)) * sources + members
    read = torch.bincount(key, minlength=maps * sources)
    return Segments(
        members, starts, key.argsort(stable=True), torch.nn.functional.pad(read.cumsum(0), (1, 0)), row % max(classes, 1),
        weights, sources, classes, maps, int(sizes.max()) if len(sizes) else 0, int(read.max()),
    )  # fmt: skip


# ---- Applying ----


def map_labels(
    scores: Tensor, labels: Labels | None, *, reduce: str = "mean", map_id: Tensor | None = None, of: str = "logits",
    k: int | None = None, prior: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scores [B, S] -> [B, T]: of logits in the dtype of the scores, of probabilities float32 at least.

    A row is NaN where its map_id is not a map; a column where its index is not a source.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    values = source_values(scores.to(wide), prior, of)
    out = reduce_values(values, labels, reduce, map_id, k, of == "probabilities")
    return out if of == "probabilities" else out.to(scores.dtype)


def source_values(scores: Tensor, prior: Tensor | None, of: str) -> Tensor:
    """What a map reads: scores - prior, or log(p / prior)."""
    if of == "probabilities":
        scores = scores.log_softmax(1)
        return scores if prior is None else scores - prior.to(scores.dtype).log()
    return scores if prior is None else scores - prior.to(scores.dtype)


def reduce_values(
    values: Tensor, labels: Labels | None, reduce: str, map_id: Tensor | None, k: int | None, logarithms: bool
) -> Tensor:
    """The map of values [B, S]; where they are logarithms, the logarithm of the map of what they are the logarithms of."""
    if labels is None:
        return values
    known = None
    if map_id is not None:
        maps = labels.num_maps if isinstance(labels, Segments) else labels.shape[0]
        known = (map_id >= 0) & (map_id < maps)
        map_id = torch.where(known, map_id, 0)
    if isinstance(labels, Segments):
        out = _reduce_segments(values, labels, reduce, map_id, k, logarithms)
    elif labels.is_floating_point():
        out = _multiply(values, labels, map_id, logarithms)
    else:
        index = labels if map_id is None else labels[map_id]
        out = _read(values, index)
        out = torch.where((index >= 0) & (index < values.shape[1]), out, torch.nan)
    return out if known is None else torch.where(known[:, None], out, torch.nan)


def _read(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[...]], or values[b, index[b, ...]] where the first axis of a longer index is the batch."""
    index = index.clamp(0, values.shape[1] - 1)
    if index.dim() == 1:
        return values.index_select(1, index)
    return values.gather(1, index)


def _multiply(values: Tensor, matrix: Tensor, map_id: Tensor | None, logarithms: bool) -> Tensor:
    """values @ matrix. Probabilities are summed in float64, whose range goes down to exp(-700) of a row's largest."""
    top = values.new_zeros(())
    if logarithms:
        top = values.amax(1, keepdim=True).detach() if values.shape[1] else top
        values = (values - top).double().exp()
    with torch.autocast(values.device.type, enabled=False):
        out = values @ matrix.to(values.dtype)  # [B, T], or [N, B, T]: every sample by every map, which copies no matrix
    if map_id is not None:
        out = out[map_id, torch.arange(len(map_id), device=out.device)]
    if logarithms:
        nothing = out == 0
        out = torch.where(nothing, -torch.inf, torch.where(nothing, 1, out).log() + top).to(top.dtype)
    return out


def _reduce_segments(
    values: Tensor, seg: Segments, reduce: str, map_id: Tensor | None, k: int | None, logarithms: bool
) -> Tensor:
    """Every class's entries side by side, [B, T, longest], then the reduction over the last axis."""
    shape = (seg.num_maps, seg.num_classes)
    place = torch.arange(seg.longest, device=values.device)
    size = seg.starts.diff().view(shape)
    exists = place < size[..., None]  # [N, T, longest]
    entry = torch.where(exists, seg.starts[:-1].view(shape)[..., None] + place, 0)
    read, weights = seg.members[entry] if len(seg.members) else entry, None
    if reduce == "weighted" and seg.weights is not None:
        weights = torch.where(exists, seg.weights.to(values.dtype)[entry], 0)
    if map_id is None:  # one map: [1, T, longest] is for every sample
        found = _read(values, read.flatten()).view(len(values), seg.num_classes, seg.longest)
    else:
        size, exists = size[map_id], exists[map_id]
        weights = weights if weights is None else weights[map_id]
        found = _read(values, read[map_id].flatten(1)).view(len(values), seg.num_classes, seg.longest)

    if reduce == "first":
        return found[..., 0]
    if reduce == "max":
        return torch.where(exists, found, -torch.inf).max(-1).values  # the first of equals has the gradient
    if reduce == "top-k mean":
        assert k is not None
        found = torch.where(exists, found, -torch.inf).sort(dim=-1, descending=True, stable=True).values[..., :k]
        size = size.clamp(max=k)
        exists = place[:k] < size[..., None]
    if logarithms or reduce == "logsumexp":
        out = log_sum_exp(torch.where(exists, found, -torch.inf), weights)
        return out - size.to(out.dtype).log() if reduce in ("mean", "top-k mean") else out
    if weights is not None:
        found = found * weights
    out = torch.where(exists, found, 0).sum(-1)
    return out / size if reduce in ("mean", "top-k mean") else out


def log_sum_exp(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """log(sum of weights * exp(x)) over the last axis; -inf, and no gradient, where nothing is summed."""
    if weights is not None:
        x = torch.where(weights == 0, -torch.inf, x)
    top = x.amax(-1, keepdim=True).detach()
    top = torch.where(top.isinf(), 0, top)
    mass = (x - top).exp()
    mass = (mass if weights is None else weights * mass).sum(-1)
    nothing = mass == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, 1, mass).log() + top[..., 0])


# ---- Loss ----


def mapped_cross_entropy(
    scores: Tensor, labels: Labels | None, target: Tensor, *, reduce: str = "mean", map_id: Tensor | None = None,
    of: str = "logits", k: int | None = None, prior: Tensor | None = None, renormalize: bool = True,
    weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100, focal: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The cross-entropy of the mapped scores, which are not rounded in between. float32 at least."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    mapped = map_labels(scores.to(wide), labels, reduce=reduce, map_id=map_id, of=of, k=k, prior=prior)
    losses, weights = cross_entropies(
        mapped, target, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, focal=focal,
        renormalize=renormalize or of == "logits",
    )  # fmt: skip
    return total(losses, weights, reduction)


def cross_entropies(
    mapped: Tensor, target: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0,
    ignore_index: int = -100, focal: float = 0.0, renormalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and the weight of every sample, as torch.nn.functional.cross_entropy defines them: [B], [B].

        (1 - smoothing) w[y] (-log p[y]) + smoothing / T  sum_c w[c] (-log p[c]),  all times (1 - p[y])^focal

    p = softmax(mapped); without `renormalize`, exp(mapped). Ignored samples are 0, targets that are no class NaN.
    """
    classes = mapped.shape[1]
    log_p = mapped.log_softmax(1) if renormalize else mapped
    kept, known = target != ignore_index, (target >= 0) & (target < classes)
    at = torch.where(kept & known, target, 0)
    each = log_p.new_ones(classes) if weight is None else weight.to(log_p.dtype)
    weights = torch.where(kept, each[at] if classes else 1.0, 0.0)
    picked = log_p.gather(1, at[:, None])[:, 0]
    losses = -picked * each[at]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - (log_p * each).sum(1) * (label_smoothing / classes)
    if focal:
        losses = losses * (-picked.expm1()).clamp_min(torch.finfo(picked.dtype).tiny) ** focal
    return torch.where(kept, torch.where(known, losses, torch.nan), 0.0), weights


def total(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """What becomes of the losses; their mean is over the weights."""
    if reduction == "none":
        return losses
    return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()


# ---- Making maps ----


def count_labels_(counts: Tensor, logits: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """counts[s, t] += number of samples b with argmax(logits[b]) = s and target[b] = t; other targets do not count.

    With k, the k largest logits of a sample count, the first of equals, each by its softmax probability in units of
    1 / COUNT_UNIT. A sample without a softmax (NaN, +inf, nothing but -inf) counts nothing.
    """
    known = (target >= 0) & (target < counts.shape[1])
    if k is None:
        source, amount = logits.argmax(1)[:, None], known.long()[:, None]
    else:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        source = wide.sort(dim=1, descending=True, stable=True).indices[:, :k]
        share = wide.softmax(1).gather(1, source).double() * COUNT_UNIT
        amount = torch.where(known[:, None] & ~share.isnan(), share, 0.0).round().long()
    cell = torch.where(known[:, None], source * counts.shape[1] + target[:, None], 0)
    counts.view(-1).scatter_add_(0, cell.flatten(), amount.flatten())
    return counts


def match_labels(counts: Tensor) -> Tensor:
    """counts [S, T] -> index [T]: T times, take the largest cell (the first of equals), strike its row and column."""
    left, index = counts.clone(), counts.new_empty(counts.shape[1])
    for _ in range(counts.shape[1]):
        source, target = divmod(int(left.argmax()), counts.shape[1])
        index[target] = source
        left[source, :] = -1
        left[:, target] = -1
    return index


def bayesian_matrix(counts: Tensor, smoothing: float = 1.0, unit: int = 1) -> Tensor:
    """counts [S, T] -> float32 [S, T]: N[s, t] / (sum of row s + smoothing), every column then divided by its sum.

    A source that was never predicted has a row of 0; a class that was never counted reads every source alike, 1 / S.
    """
    n = counts.double() / unit
    total = n.sum(1, keepdim=True) + smoothing
    share = n / torch.where(total == 0, 1, total)
    column = share.sum(0)
    return torch.where(column == 0, 1 / max(len(counts), 1), share / torch.where(column == 0, 1, column)).float()


# ---- Heads ----


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log(sum over the vocabulary of exp(hidden @ weight.T + bias)): [R, d], [V, d], [V] -> [R]."""
    return torch.nn.functional.linear(hidden, weight, bias).logsumexp(1)
