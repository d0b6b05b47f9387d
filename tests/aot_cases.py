"""The launches that are compiled ahead of time: every kernel, every configuration of the tuning tables, every option."""

from __future__ import annotations

import itertools

import torch

from fastprompt.functional import segments as segments_of
from fastprompt.ops import embedding as embedding_ops
from fastprompt.ops import mapping as mapping_ops
from fastprompt.ops import perturbation as ops
from fastprompt.tuning import attention as attention_tuning
from fastprompt.tuning.mapping import pick_segments


def perturbation() -> None:
    """Calls the Triton path on CPU tensors; with launches recorded, nothing runs."""
    base = ops.Settings(
        canvas=(224, 224), image=(16, 16, 192, 192), interpolation="none", copies=1, period=0,
        window=(0, 0, 224, 224), hole=(16, 16, 192, 192), share="batch", squash="sigmoid", mask_first=False, scale=1.0,
        normalized=False, clamp="none", dtype=torch.bfloat16, channels_last=False, impl="triton",
    )  # fmt: skip
    full = base._replace(image=(0, 0, 224, 224), hole=(0, 0, 0, 0))
    cases = [base._replace(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    cases += [
        base._replace(channels_last=True),
        base._replace(interpolation="bicubic"),
        base._replace(share="index", squash="tanh", clamp="exact"),
        base._replace(share="product", normalized=True, squash="none"),
        full._replace(share="sample", squash="tanh", clamp="exact", normalized=True),
        base._replace(
            canvas=(1, 16000), image=(0, 0, 1, 4000), copies=4, period=4000, window=(0, 0, 1, 16000), hole=(0, 0, 0, 0)
        ),
    ]
    for s, batch, uint8 in itertools.product(cases, (256, 2), (True, False)):
        channels = 1 if s.canvas[0] == 1 else 3
        height, width = (32, 32) if s.interpolation != "none" else s.image[2:]
        x = torch.zeros((batch, channels, height, width), dtype=torch.uint8 if uint8 else torch.float32)
        count = {"batch": 1, "index": 4, "sample": batch, "product": 3}[s.share]
        prompt = torch.zeros((count, channels, *s.window[2:]))
        index = torch.zeros(batch, dtype=torch.int64) if s.share == "index" else None
        mask = torch.ones((1, *s.canvas), dtype=torch.bool) if s.share == "index" else None
        _launch(s, x, prompt, mask, None, index)
        if uint8 and batch > 2 and s in (base, *cases[4:6]):  # the same batch read out of a set
            _launch(s, x, prompt, mask, None, index, torch.zeros(batch, dtype=torch.int64))
    for planes in (1, 3):
        cells = torch.zeros((256, planes, 28, 28), dtype=torch.bfloat16)
        given = torch.zeros(256, 3, 224, 224), torch.zeros(1, 3, 224, 224), None, cells, None
        _launch(full._replace(squash="none"), *given)
    _launch(full._replace(squash="none", clamp="exact"), *given, torch.zeros(256, dtype=torch.int64))


def _launch(s, x, prompt, mask, cells, index, rows=None) -> None:
    norm = torch.zeros(4, x.shape[1])
    out = ops._forward_triton(x, prompt, mask, cells, index, rows, norm, s)
    kept = x if s.clamp == "exact" or rows is not None else None
    if cells is None:
        ops._prompt_gradient_triton(out, kept, prompt, mask, index, rows, norm, s)
    else:
        ops._cells_gradient_triton(out, kept, prompt, mask, cells, rows, norm, s)
    if x.is_floating_point() and rows is None:
        ops._image_gradient_triton(out, kept, prompt, mask, cells, index, norm, x.shape[2:], x.dtype, s)


def mapping(arch: str, whole: bool) -> None:
    """Wide and narrow tiles; rows that allow 16-byte accesses and rows that do not. Segments: plain ones, and every option.

    whole: every reduction, with several maps too, more classes than a tile, and short and long lists.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    shapes = ((1024, 128), (997, 1), (10, 10), (1, 1))
    for dtype, (sources, targets) in [(dtype, (1000, 10)) for dtype in dtypes] + [(dtypes[2], shape) for shape in shapes]:
        logits, index = torch.zeros((256, sources), dtype=dtype), torch.zeros(targets, dtype=torch.int64)
        out, readers = mapping_ops._forward_triton(logits, index, True)
        mapping_ops._gradient_triton(out, index, readers, sources)
        counts = torch.zeros((sources, targets), dtype=torch.int64)
        mapping_ops._count_triton(counts, logits, torch.zeros(256, dtype=torch.int64), None, "triton")
    columns = torch.zeros(64, 256, dtype=torch.bfloat16).T  # neighbouring sources lie far apart
    mapping_ops._forward_triton(columns, torch.zeros(10, dtype=torch.int64), False)
    target = torch.zeros(256, dtype=torch.int64)
    mapping_ops._count_triton(torch.zeros((64, 10), dtype=torch.int64), columns, target, None, "triton")
    for sources in (1000, 32157):  # a row in one tile and in many
        logits, counts = torch.empty((256, sources), dtype=dtypes[2]), torch.empty((sources, 10), dtype=torch.int64)
        mapping_ops._count_triton(counts, logits, target, 3, "triton")

    groups = [list(range(100 * t, 100 * t + 100)) for t in range(10)]
    single = [[t] for t in range(10)]
    overlapping = [list(range(t, t + 50)) for t in range(10)]
    mean = {"loss": True, "reduction": "mean"}
    everything = mean | {"renormalize": False, "smoothing": 0.1, "focal": 2.0, "several": True, "probabilities": True}
    segments(arch, 65536, 1000, groups, "mean", **mean)
    segments(arch, 65536, 1000, groups, "sum", probabilities=True, **mean)
    segments(arch, 256, 1000, single, "mean", **mean)
    segments(arch, 4096, 1000, overlapping, "top-k mean", **everything)
    segments(arch, 4096, 1000, groups, "logsumexp")
    if not whole:
        return
    for dtype in (torch.float32, torch.float16):
        segments(arch, 4096, 1000, groups, "mean", dtype=dtype, probabilities=True, **mean)
    for reduce in ("sum", "max", "first", "weighted", "top-k mean"):
        segments(arch, 4096, 997, overlapping, reduce)
        segments(arch, 4096, 1000, groups, reduce, probabilities=True)
        segments(arch, 256, 8192, overlapping, reduce, **everything)
    segments(arch, 4096, 1000, overlapping, "logsumexp", dtype=torch.float32, several=True, **mean)
    for loss in ({}, mean, everything):
        segments(arch, 4096, 32000, [[4 * t + j for j in range(4)] for t in range(2000)], "mean", **loss)
        segments(arch, 65536, 1000, [[t] for t in range(1000)], "mean", **loss)
        segments(arch, 1, 1000, groups, "sum", **loss)
    segments(arch, 4096, 1000, groups, "mean", loss=True, reduction="none", smoothing=0.1, focal=0.5)


def segments(  # type: ignore[no-untyped-def]
    arch: str, batch: int, sources: int, classes: list[list[int]], reduce: str, *, several: bool = False,
    dtype: torch.dtype = torch.bfloat16, loss: bool = False, probabilities: bool = False, renormalize: bool = True, **options,
) -> None:  # fmt: skip
    """A map of these lists forward and backward; several: one of many maps for each sample, a prior and class weights."""
    from fastprompt.kernels.mapping.segments import reduce_segments
    from fastprompt.kernels.mapping.segments_backward import reduce_segments_gradient

    weights = [[1.0] * len(members) for members in classes] if reduce == "weighted" else None
    seg = segments_of(classes, sources, weights=weights)
    scores, labels = torch.empty((batch, sources), dtype=dtype), torch.zeros(batch, dtype=torch.int64)
    given = [scores, seg, labels if several else None, torch.ones(sources) if several else None, labels if loss else None]
    flags = {"reduce": reduce, "k": 3, "probabilities": probabilities, "loss": loss, "renormalize": renormalize}
    facts = {
        "batch": batch, "sources": sources, "classes": len(classes), "longest": 1 if reduce == "first" else seg.longest,
        "probabilities": probabilities, "loss": loss, "arch": arch,
    }  # fmt: skip
    weight = torch.ones(len(classes)) if several else None
    out, _, *kept = reduce_segments(*given, weight, **flags, **options, launch=pick_segments("forward", **facts))
    g = torch.ones(()) if loss else torch.empty((batch, len(classes)), dtype=dtype)
    reduce_segments_gradient(g, *given, out, *kept, **flags, launch=pick_segments("gradient", **facts))


def attention(arch: str, whole: bool) -> None:
    """The plain call, few queries and the one with every option, at the widths that fill the registers.

    whole: every head width and dtype; all masks and prefixes on the two common widths; packed.
    """
    from fastprompt.kernels.attention.backward import attention_backward
    from fastprompt.kernels.attention.forward import attention_forward

    half, long = torch.bfloat16, torch.int64
    plain = {"causal": True}
    bidirectional = {"causal": False, "no prefix": True}
    few = {"queries": 1, "causal": True, "rows": 1024}
    everything = {
        "causal": True, "window": 64, "softcap": 30.0, "lengths": torch.zeros(2, dtype=long), "left": True,
        "key_mask": torch.ones(2, 512, dtype=torch.bool), "index": torch.zeros(2, 2, dtype=long),
        "prefix_lengths": torch.zeros(3, dtype=long), "gate": torch.ones(2, 8),
    }  # fmt: skip
    packed = {
        "starts_q": torch.zeros(5, dtype=long), "starts_k": torch.zeros(5, dtype=long), "index": torch.zeros(4, 1, dtype=long),
        "causal": True,
    }  # fmt: skip
    cells = [(width, half, options) for width in (64, 128) for options in (plain, bidirectional, few, everything, packed)]
    cells += [(width, half, plain) for width in (32, 80, 256)] + [(128, torch.float16, plain)]
    cells += [(width, torch.float32, plain) for width in (64, 128, 256)]
    if not whole:
        cells = [(64, half, plain), (128, half, few), (128, half, everything), (256, half, plain), (128, torch.float32, plain)]
    for width, dtype, options in cells:
        given = dict(options)
        batch = 1 if "starts_q" in given else 2
        q = torch.empty(batch, 8, given.pop("queries", 512), width, dtype=dtype)
        k = torch.empty(batch, 2, 512, width, dtype=dtype)
        count, rows = 3 if "index" in given else 1, 0 if given.pop("no prefix", False) else given.pop("rows", 64)
        prefix = torch.empty(count, 2, rows, width, dtype=dtype) if rows else None
        facts = {
            "batch": 2, "heads": 8, "kv_heads": 2, "queries": q.shape[2], "keys": 512, "prefixes": count,
            "prefix_rows": rows, "stack": 2 if "key_mask" in given else 1, "width": width,
            "dtype": dtype, "arch": arch, "gated": "gate" in given,
        }  # fmt: skip
        flags = {
            "scale": 0.1, "causal": given.pop("causal"), "window": given.pop("window", 0), "left": given.pop("left", False),
            "softcap": given.pop("softcap", 0.0), "max_q": q.shape[2], "max_k": 512,
        }  # fmt: skip
        names = ("index", "prefix_lengths", "lengths", "key_mask", "starts_q", "starts_k", "gate")
        operands = (q, k, k, prefix, prefix, *(given.get(name) for name in names))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        attention_forward(*operands, out, lse, **flags, launch=attention_tuning.pick("forward", **facts))
        needs = (True, True, prefix is not None, "gate" in given)
        launch = attention_tuning.pick("backward", **facts)
        attention_backward(out, lse, *operands, out, lse, needs=needs, **flags, launch=launch)


def embedding() -> None:
    """Wide and narrow rows with every option, with one prompt a sample and with none; the dtypes that a frozen model has."""
    half, single, long = torch.bfloat16, torch.float32, torch.int64
    cells = [
        (half, 4096, "plain"),
        (half, 4096, "own"),
        (half, 4096, "everything"),
        (half, 1000, "everything"),
        (half, 1, "plain"),
    ]
    cells += [(torch.float16, 768, "plain"), (single, 768, "everything"), (half, 33, "everything"), (half, 64, "plain")]
    for dtype, width, options in cells:
        vocab, ids = torch.zeros(512, width, dtype=dtype), torch.zeros(8, 128, dtype=long)
        soft = torch.zeros({"plain": 1, "own": 8, "everything": 3}[options], 20, width)
        index = lengths = positions = None
        if options == "everything":
            index, lengths, positions = (
                torch.zeros(8, dtype=long),
                torch.zeros(3, dtype=long),
                torch.zeros(128, width, dtype=dtype),
            )
        out = embedding_ops._forward_triton(ids, vocab, soft, index, lengths, positions, 2.0, dtype, True)
        embedding_ops._gradient_triton(out, ids, index, lengths, *soft.shape[:2], 2.0, single, True)
    many = torch.zeros(1024, 2, 64, dtype=half)  # in chunks
    embedding_ops._gradient_triton(many, torch.zeros(1024, 2, dtype=long), None, None, 1, 1, 2.0, half, True)


def launch_all(arch: str, whole: bool) -> None:
    perturbation()
    mapping(arch, whole)
    embedding()
    attention(arch, whole)
