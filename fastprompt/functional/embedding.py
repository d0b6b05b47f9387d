"""From token ids to embeddings, with soft tokens among them.

An id from 0 on is a row of the vocabulary. Soft token j of a sample's prompt is written -(j + 1), anywhere in `ids`: -1 is the
first, -2 the second. `PADDING` is no token at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprompt import _runtime
from fastprompt.functional.checks import bad, check_labels, check_range, looks_at_values, one_of, path_of, same_device, tell
from fastprompt.ops import embedding as ops
from fastprompt.reference import embedding as reference
from fastprompt.reference.embedding import PADDING


def soft_gather(
    ids: Tensor, vocab_weight: Tensor, soft_weight: Tensor, *, prompt_index: Tensor | None = None,
    soft_lengths: Tensor | None = None, scale: float | None = None, positions: Tensor | None = None,
    dtype: torch.dtype | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """One gather from the frozen vocabulary and from soft tokens that stand anywhere among the ids.

        out[b, t] = scale * vocab_weight[id] + positions[t]         id = ids[b, t] >= 0
        out[b, t] = scale * soft_weight[n, j] + positions[t]        id = -(j + 1), n = prompt_index[b]

    Prompt tuning: Lester et al. 2021 (arXiv 2104.08691); templates: P-tuning, Liu et al. 2021 (arXiv 2103.10385). Every row
    is read and written once, where joining writes it twice and choosing between two gathers reads it three times. The
    gradient is that of the soft rows alone, the sum over all places that read one; the vocabulary gets none.

    Args:
        ids: int64 [B, T]: vocabulary ids, soft tokens -(j + 1) and `PADDING`. `place_prompt` and `soft_ids` write them.
        vocab_weight: the frozen embedding matrix [V, d], any strides.
        soft_weight: [N, P, d] or [P, d], floating point, any dtype and strides. N = 1 is shared by the batch; N = B is one a
            sample; other N need a prompt_index.
        prompt_index: int64 [B]: each sample's prompt; -1: none, its soft tokens are no tokens.
        soft_lengths: int64 [N]: how many of the P soft tokens of each prompt exist, counted from the first; the others are
            no tokens.
        scale: multiplies both tables' rows, such as Gemma's sqrt(d). Default: 1.
        positions: [T or more, d], frozen: row t is added to every sample's token t.
        dtype: of the result. Default: that of vocab_weight, with and without autocast: values are moved.
        impl: see the module.

    Returns:
        [B, T, d], computed in float32 and rounded once; bit for bit the rows themselves without scale and positions. What is
        no token is a row of 0. The gradient has the same bits every time.

        On a GPU an id, or the index of a sample that holds soft tokens, that is out of range gives a row of NaN and has no
        gradient; other rows are untouched (FASTPROMPT_CHECK=1 raises instead).

    Raises:
        ValueError, TypeError: what was expected and what came; so for a vocabulary that asks for a gradient, which would be
            [V, d] large: `fastprompt.nn.TrainableTokens` trains single rows.
        RuntimeError: a second derivative of the fused paths is asked for (impl="torch" has one).
    """
    if prompt_index is soft_lengths is positions is scale is dtype is None and impl == "auto" and _runtime.watch is None:
        try:
            if (out := ops.quick(ids, vocab_weight, soft_weight)) is not None:
                return out
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            pass  # what follows says why
    tensors = ids, vocab_weight, soft_weight, positions, prompt_index, soft_lengths
    compiling = torch.compiler.is_compiling()
    factor = 1.0 if scale is None else float(scale)
    if compiling:
        s = _settings(*tensors, factor, dtype, impl)
    else:
        key = *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors], factor, dtype, impl
        s = _known_settings.get(key) or _known(key, _settings(*tensors, factor, dtype, impl))
    trained = torch.is_grad_enabled()
    if trained:
        for name, table in (("vocab_weight", vocab_weight), ("positions", positions)):
            if table is not None and table.requires_grad:
                raise bad(name, "a frozen table (detach it; nn.TrainableTokens trains single rows)", "requires_grad=True")
        trained = soft_weight.requires_grad
    soft = soft_weight if s.cube else soft_weight[None]
    if prompt_index is not None:
        check_range("prompt_index", prompt_index, s.prompts, ignored=-1)
    if soft_lengths is not None:
        check_range("soft_lengths", soft_lengths, s.slots + 1)
    given = ids, vocab_weight, soft, prompt_index, soft_lengths, positions, factor, s.dtype, s.path == "triton"
    run = ops.run_of(ids, prompt_index, s.slots) if s.on_cpu and soft_lengths is None and not compiling else None
    if _runtime.watch is not None:
        form = "gather" if run is None or not s.moves else ops.way(run, ids, s.width)
        path = "torch" if s.dtype == torch.float64 else s.path
        moved = ids.nbytes + ids.numel() * s.width * (vocab_weight.itemsize + s.dtype.itemsize)
        tell("soft_gather", impl, path, vocab_weight, soft_weight, ids, how=form, moved=moved)
    if run is not None:
        way = ops.way(run, ids, s.width) if s.moves else "gather"
        try:
            if way == "join" and soft.dtype == s.dtype:
                return ops.joined(ids, vocab_weight, soft, prompt_index, run)
            if way == "write" or ops.surrounds(run, ids, s.words):
                return ops.SoftGather.apply(*given, run) if trained else ops.forward(*given, run)
        except IndexError:  # from PyTorch: not all around the run are words
            pass
    _check_values(ids, s.words, s.slots)
    if s.path == "torch" or s.dtype == torch.float64:
        return reference.soft_gather(*given[:-1])
    return ops.SoftGather.apply(*given, None) if trained else ops.forward(*given, None)


def place_prompt(
    ids: Tensor, length: int, where: str | Tensor = "front", *, mask: Tensor | None = None, lengths: Tensor | None = None,
    first: int = 0, padding: str = "right",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes `length` soft tokens among the ids of every sample, on their device: (ids, attention mask), [B, T + length].

    The ids of `soft_gather`: -(first + 1), -(first + 2), ... A template of several parts is several calls, each `first` where
    the one before ended. What else belongs to the tokens moves with them:

        order, _ = place_prompt(torch.arange(T).expand(B, T), length, where)
        labels = torch.where(order < 0, -100, labels.gather(1, order.clamp(min=0)))

    Args:
        ids: int64 [B, T].
        length: of the prompt.
        where: "front": before a sample's first token. "after bos": behind its first token. "suffix": behind its last token.
            int64 [B]: before that place of the sample's row, from 0 to T.
        mask: [B, T], bool or numbers, not 0 for a token: padding on either side stays outside. Default: all are tokens.
        lengths: int64 [B], at most `length`: each sample's own. What it needs less is `PADDING` at the end of its row.
        first: the number of the first soft token.
        padding: "left" puts that padding at the start of the row, for generation.

    Returns:
        ids, and a mask in the dtype of the given one (bool without one): the prompt counts as tokens.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    _check_ids("ids", ids)
    batch, count = ids.shape
    for name, number in (("length", length), ("first", first)):
        if number < 0:
            raise bad(name, "at least 0", number)
    one_of("padding", padding, ("right", "left"))
    if mask is not None and mask.shape != ids.shape:
        raise bad("mask", f"[{batch}, {count}] like ids", list(mask.shape))
    if isinstance(where, str):
        one_of("where", where, ("front", "after bos", "suffix"))
    else:
        check_labels("where", where, batch)
        check_range("where", where, count + 1)
    if lengths is not None:
        check_labels("lengths", lengths, batch)
        check_range("lengths", lengths, length + 1)
    same_device(ids, mask=mask, lengths=lengths, where=where if isinstance(where, Tensor) else None)
    if isinstance(where, str) and lengths is None and mask is None:
        at = {"front": 0, "after bos": min(1, count), "suffix": count}[where]
        slots = torch.arange(-1 - first, -1 - first - length, -1, device=ids.device).expand(batch, -1)
        pieces = [ids[:, :at], slots, ids[:, at:]] if at else [slots, ids]
        return torch.cat(pieces, 1), ids.new_ones((batch, count + length), dtype=torch.bool)
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    start = _start_of(where, kept) if isinstance(where, str) else where
    size = torch.full_like(start, length) if lengths is None else lengths
    place = torch.arange(count + length, device=ids.device) - (length - size if padding == "left" else size * 0)[:, None]
    start, size = start[:, None], size[:, None]
    slot = place - start
    is_soft = (slot >= 0) & (slot < size)
    source = torch.where(slot < 0, place, place - size)
    is_own = ~is_soft & (source >= 0) & (source < count)
    if not count:
        return torch.where(is_soft, -1 - first - slot, PADDING), is_soft.to(kept.dtype)
    source = source.clamp(0, count - 1)
    placed = torch.where(is_own, ids.gather(1, source), PADDING)
    return (
        torch.where(is_soft, -1 - first - slot, placed),
        torch.where(is_soft, 1, torch.where(is_own, kept.gather(1, source), 0)).to(kept.dtype),
    )


def soft_ids(ids: Tensor, trained: Tensor) -> Tensor:
    """Vocabulary ids with those that are trained written as soft tokens: trained[j] becomes -(j + 1), on the device.

    Args:
        ids: int64 [B, T], vocabulary ids or `PADDING`. Another negative id becomes one that no table has.
        trained: int64 [K], rising.
    """
    _check_ids("ids", ids)
    check_labels("trained", trained, None)
    if looks_at_values(trained) and bool((trained.diff() <= 0).any()):
        raise bad("trained", "rising ids", trained[:8].tolist())
    same_device(ids, trained=trained)
    if looks_at_values(ids) and ids.numel() and int(ids.min()) < 0:
        negative = ids[(ids < 0) & (ids != PADDING)]
        if len(negative):
            raise bad("ids", "vocabulary ids or PADDING", negative[:8].tolist())
    ids = torch.where((ids < 0) & (ids != PADDING), torch.iinfo(torch.int64).max, ids)
    if not len(trained):
        return ids
    place = torch.searchsorted(trained, ids).clamp(max=len(trained) - 1)
    return torch.where(trained[place] == ids, -1 - place, ids)


def map_vocabulary(weight: Tensor, vocab_weight: Tensor, source: Tensor | None = None) -> Tensor:
    """A new vocabulary [V_T, d] of weighted sums of the frozen one's rows [V, d], in the dtype of the weights.

    Args:
        weight: [V_T, V], or with `source` [V_T, k].
        source: int64 [V_T, k]: the k rows that each new one is made of; values from 0 to V - 1.
    """
    words, columns = len(vocab_weight), len(vocab_weight) if source is None else source.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != columns or (source is not None and source.shape != weight.shape):
        raise bad("weight", f"[V_T, {columns}]", list(weight.shape))
    if source is None:
        return weight @ vocab_weight.to(weight.dtype)
    if source.dtype != torch.int64:
        raise TypeError(f"source: expected int64, got {source.dtype}")
    check_range("source", source.flatten(), words)
    return F.embedding_bag(source, vocab_weight.to(weight.dtype), mode="sum", per_sample_weights=weight)


def _start_of(where: str, kept: Tensor) -> Tensor:
    """Where in its row a sample's prompt begins, int64 [B]."""
    if not kept.shape[1]:
        return kept.new_zeros(len(kept), dtype=torch.int64)
    real = (kept != 0).long()
    if where == "suffix":
        return (real * torch.arange(1, kept.shape[1] + 1, device=kept.device)).amax(1)
    return real.argmax(1) + (real.amax(1) if where == "after bos" else 0)


def _check_ids(argument: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{argument}: expected int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise bad(argument, "[B, T]", list(ids.shape))


class _Settings(NamedTuple):
    """What a call is, from everything about it but values."""

    path: str
    dtype: torch.dtype
    words: int
    prompts: int
    slots: int
    width: int
    cube: bool  # the soft tokens came as [N, P, d]
    on_cpu: bool  # the fused path of a CPU
    moves: bool  # the vocabulary's rows are moved as they are


_known_settings: dict[Any, _Settings] = {}


def _known(key: Any, s: _Settings) -> _Settings:
    """Equal calls are checked once: what the checks cost is felt in a small call."""
    if len(_known_settings) >= 1024:
        _known_settings.clear()
    _known_settings[key] = s
    return s


def _settings(
    ids: Tensor, vocab: Tensor, soft: Tensor, positions: Tensor | None, index: Tensor | None, lengths: Tensor | None,
    scale: float, dtype: torch.dtype | None, impl: str,
) -> _Settings:  # fmt: skip
    _check_ids("ids", ids)
    batch, length = ids.shape
    for name, table in (("vocab_weight", vocab), ("soft_weight", soft), ("positions", positions)):
        if table is not None and not table.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {table.dtype}")
    if vocab.dim() != 2 or not vocab.numel():
        raise bad("vocab_weight", "[V, d] with at least one row and column", list(vocab.shape))
    words, width = vocab.shape
    if soft.dim() not in (2, 3) or soft.shape[-1] != width:
        raise bad("soft_weight", f"[N, P, {width}] or [P, {width}]", list(soft.shape))
    if positions is not None and (positions.dim() != 2 or positions.shape[0] < length or positions.shape[1] != width):
        raise bad("positions", f"[{length} or more, {width}]", list(positions.shape))
    prompts, slots = (1, *soft.shape)[-3:-1]
    if index is not None:
        check_labels("prompt_index", index, batch)
    elif prompts not in (1, batch):
        raise bad("soft_weight", f"1 or {batch} prompts without a prompt_index", f"{prompts} prompts")
    if lengths is not None:
        check_labels("soft_lengths", lengths, prompts)
    same_device(ids, vocab_weight=vocab, soft_weight=soft, prompt_index=index, soft_lengths=lengths, positions=positions)
    wide = [table for table in (vocab, soft, positions) if table is not None and table.dtype == torch.float64]
    path = path_of(impl, wide[0] if wide else vocab)
    dtype = vocab.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise bad("dtype", "a floating point dtype", dtype)
    on_cpu = path == "auto" and ids.device.type == "cpu" and dtype != torch.float64
    moves = scale == 1 and positions is None and dtype == vocab.dtype
    return _Settings(path, dtype, words, prompts, slots, width, soft.dim() == 3, on_cpu, moves)


def _check_values(ids: Tensor, words: int, slots: int) -> None:
    if not looks_at_values(ids) or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low >= -slots and high < words:
        return
    wrong = ids[(ids >= words) | ((ids < -slots) & (ids != PADDING))]
    if len(wrong):
        soft = f"soft tokens from -1 to -{slots}" if slots else "no soft tokens"
        raise bad("ids", f"values from 0 to {words - 1}, {soft}, or PADDING", wrong[:8].tolist())
