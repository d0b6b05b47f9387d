"""Soft tokens among vocabulary tokens: `soft_gather` and what writes its ids, against plain loops, on every path.

"torch" is the reference, "auto" what a user gets, "triton" the kernels (on a CPU in Triton's interpreter). Rows are moved, so
forward is compared bit for bit; the gradient is a sum and is compared with float64.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt import _runtime
from fastprompt.functional import PADDING, map_vocabulary, place_prompt, soft_gather, soft_ids
from fastprompt.ops import embedding as ops
from fastprompt.reference import embedding as reference
from fastprompt.tuning.embedding import CONFIGS, Launch, pick
from tests.compare import check, check_bits, memory

pytestmark = pytest.mark.usefixtures("inside")
needs_triton = pytest.mark.skipif(not _runtime.HAS_TRITON, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
IMPLS = ("torch", "auto", TRITON)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WRONG = torch.iinfo(torch.int64).max


@pytest.fixture
def small_launch(monkeypatch):
    """Many tiles, chunks of the batch and turns over the ids, at sizes that a test can afford."""
    monkeypatch.setattr(ops, "pick", lambda kernel, *_: Launch(2, 8, 4, programs=40 if kernel == "add" else 0))


def rand(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_ids(batch, length, words, slots, seed=0):
    """Words, soft tokens (some more than once a sample) and padding at random places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (batch, length), generator=generator)
    soft = -torch.randint(1, slots + 1, (batch, length), generator=generator) if slots else ids
    kind = torch.rand((batch, length), generator=generator)
    return torch.where(kind < 0.5, ids, torch.where(kind < 0.9, soft, PADDING))


def loop(ids, vocab, soft, index=None, lengths=None, scale=1.0, positions=None):
    """Token after token in float64: the rows, and which soft row each is (None for another)."""
    out, reads = torch.zeros(*ids.shape, soft.shape[2], dtype=torch.float64), []
    for b, row in enumerate(ids.tolist()):
        n = index[b].item() if index is not None else b if len(soft) > 1 else 0
        size = 0 if n == -1 else soft.shape[1] if lengths is None else lengths[n].item()
        for t, token in enumerate(row):
            if 0 <= token < len(vocab):
                value = vocab[token].double() * scale
            elif -soft.shape[1] <= token < 0:
                if -1 - token >= size:
                    continue
                reads.append((b, t, n, -1 - token))
                value = soft[n, -1 - token].double() * scale
            elif token == PADDING:
                continue
            else:
                value = torch.full_like(out[b, t], torch.nan)
            out[b, t] = value if positions is None else value + positions[t].double()
    return out, reads


def gradient_of(g, reads, shape, scale=1.0):
    """The soft rows' gradient in float64, and the sum of absolute values that a rounding error is a share of."""
    d, size = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for b, t, n, j in reads:
        d[n, j] += g[b, t].double() * scale
        size[n, j] += g[b, t].double().abs() * abs(scale)
    return d, size


def agree(impl, device, ids, vocab, soft, *, dtype=None, seed=9, **options):
    """One call with its gradient on a path, against the loop."""
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    leaf = soft.to(device).requires_grad_()
    tensors = (ids.to(device), vocab.to(device), leaf)
    before = memory(*tensors)
    out = soft_gather(*tensors, dtype=dtype, impl=impl, **given)
    g = rand(*out.shape, dtype=out.dtype, seed=seed)
    (d,) = torch.autograd.grad(out, leaf, g.to(device))
    for was, now in zip(before, memory(*tensors), strict=True):
        assert torch.equal(was, now)
    named = {"index": options.get("prompt_index"), "lengths": options.get("soft_lengths")}
    scale, positions = options.get("scale") or 1.0, options.get("positions")
    cube = soft if soft.dim() == 3 else soft[None]
    want, reads = loop(ids, vocab, cube, **named, scale=scale, positions=positions)
    rounded = want.to(out.dtype)
    if positions is None:
        check_bits(out, rounded.to(device))
    else:  # one rounding more or less, as the multiplication and the addition are fused or not
        check(out, want, rounded.to(device), ulps=1.0)
    true, size = gradient_of(g, reads, cube.shape, scale)
    tiny = torch.finfo(soft.dtype).eps * true.abs() + 4 * torch.finfo(F32).eps * size
    assert d.dtype == soft.dtype
    assert d.shape == soft.shape
    assert bool(((d.cpu().view(cube.shape).double() - true).abs() <= tiny).all()), "gradient"
    return out, d


# ---- soft_gather ----

SIZES = ((3, 4, 3, 3, 17), (2, 5, 1, 2, 16), (1, 1, 1, 1, 1), (4, 3, 2, 2, 24))  # B, T, N, P, d
EMPTY = ((0, 5, 1, 2, 8), (2, 0, 1, 2, 8), (2, 3, 1, 0, 8), (0, 0, 1, 0, 3))


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, F32) for size in SIZES + EMPTY]
    + [(SIZES[0], BF16)]
    + [pytest.param(size, dtype, marks=pytest.mark.slow) for size in SIZES[1:] for dtype in (BF16, F16)],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_token_is_its_row(impl, size, dtype, device):
    batch, length, prompts, slots, width = size
    ids, vocab = some_ids(batch, length, 11, slots), rand(11, width, dtype=dtype)
    soft = rand(prompts, slots, width, seed=1)
    index = torch.arange(batch) % (prompts + 1) - 1  # -1: no prompt
    lengths = torch.arange(prompts) % (slots + 1)
    if impl != "triton":  # the interpreter is slow, and the next call has an index too
        agree(impl, device, ids, vocab, soft.to(dtype), prompt_index=index)
    agree(impl, device, ids, vocab, soft.to(dtype), prompt_index=index, soft_lengths=lengths, scale=2.0)
    if prompts == 1:
        agree(impl, device, ids, vocab, soft[0])
    if batch > 1 and slots:
        agree(impl, device, ids, vocab, rand(batch, slots, width, seed=2))  # one prompt a sample


@pytest.mark.usefixtures("small_launch")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_soft_token_that_stands_several_times_gets_the_sum(impl, device):
    """With others, padding and words in between; in all samples, in one, and not at all."""
    ids = torch.tensor([[-1, -2, -1, PADDING, -1, 3, -1], [-2, -2, 5, -1, -3, -2, -1], [0, 1, 2, 3, -2, 4, 5]])
    agree(impl, device, ids, rand(11, 9), rand(1, 4, 9, seed=1))
    agree(impl, device, ids, rand(11, 9), rand(2, 3, 9, seed=1), prompt_index=torch.tensor([1, 0, 1]))


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("tables", [(BF16, F32, None), (F16, F32, None), (F32, BF16, None), (BF16, BF16, F32), (F32, F32, F16)])
@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_scale_and_positions(impl, tables, device):
    vocab_dtype, soft_dtype, dtype = tables
    ids, vocab = some_ids(2, 4, 11, 2, seed=3), rand(11, 12, dtype=vocab_dtype)
    soft, positions = rand(2, 2, 12, dtype=soft_dtype, seed=1), rand(9, 12, dtype=vocab_dtype, seed=2)
    index = torch.tensor([1, 0])
    out, _ = agree(impl, device, ids, vocab, soft, prompt_index=index, dtype=dtype)
    assert out.dtype == (dtype or vocab_dtype)
    lengths = torch.tensor([1, 2])
    agree(
        impl, device, ids, vocab, soft, prompt_index=index, dtype=dtype, soft_lengths=lengths, scale=12**0.5, positions=positions
    )
    front, _ = place_prompt(ids.clamp(min=0), 2)
    agree(impl, device, front, vocab, soft[:1], dtype=dtype, positions=positions)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("where", ["front", "after bos", "suffix"])
@pytest.mark.parametrize("size", [(3, 6, 4, 9), (5, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("way", ["join", "write", "gather", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])])
def test_a_prompt_at_the_same_place_of_every_sample(way, size, where, device, monkeypatch):
    """A run of soft tokens, on all ways that a CPU has for it; also from its second token on, and none."""
    batch, length, slots, width = size
    monkeypatch.setattr(ops, "way", lambda run, *_: way if run.stop > run.start else "gather")
    impl = "triton" if way == "triton" else "auto"
    words = torch.arange(batch * length).view(batch, length) % 13
    for dtype in (F32, BF16) if way != "triton" else (F32,):
        vocab = rand(13, width, dtype=dtype)
        for first in (0, 1) if slots > 1 else (0,):
            ids, _ = place_prompt(words, slots - first, where, first=first)
            agree(impl, device, ids, vocab, rand(1, slots, width, seed=1))
            assert not soft_gather(ids.to(device), vocab.to(device), rand(slots, width).to(device), impl=impl).requires_grad
        agree(impl, device, ids, vocab, rand(batch, slots, width, seed=1))
        agree(impl, device, ids, vocab, rand(2, slots, width, seed=1), prompt_index=torch.arange(batch) % 2)
        agree(impl, device, words, vocab, rand(1, slots, width, seed=1))  # no soft token at all
        if slots > 1:
            ids[-1, (ids[-1] >= 0).nonzero()[0]] = PADDING  # beside the run
            agree(impl, device, ids, vocab, rand(1, slots, width, seed=1))
            with pytest.raises(ValueError, match="ids: expected"):
                soft_gather(ids.masked_fill(ids == PADDING, 13), vocab, rand(1, slots, width))


def test_which_way_a_run_goes():
    def way(batch, length, size, width):
        return ops.way(ops.Run(0, size, 0), torch.empty(batch, length, dtype=torch.int64), width)

    assert [way(2, 20, 4, 64), way(16, 164, 100, 384), way(64, 36, 4, 700)] == ["join", "join", "gather"]
    assert [way(4, 410, 200, 1024), way(1, 600, 0, 4096)] == ["write", "gather"]


def test_only_a_run_is_taken_for_one():
    def run(rows, index=None):
        ids = torch.tensor(rows)
        found = ops.run_of(ids, index, slots=3)
        return found if found is not None and ops.surrounds(found, ids, words=9) else None

    assert run([[5, -1, -2, 5], [5, -1, -2, 0]]) == (1, 3, 0)
    assert run([[-2, -3, 5, 5]]) == (0, 2, 1)
    assert run([[5, 4], [8, 0]]) == (0, 0, 0)
    for rows in (
        [[-1, -2, 5, 5], [-1, 5, -2, 5]], [[-2, -1]], [[-1, 5, -2]], [[-1, -1]], [[-1, 5], [5, -1]], [[-3, -4]], [[-1, 9]],
        [[-1, PADDING]], [[PADDING]], [[-1, 5, 5], [-1, 5, -1]], [[5, -1], [-1, -2]], [[-1, -2], [-1, 5], [-1, 5]],
        [[-1, 5], [-1, PADDING]], [[5, 5], [5, -1]], [[-2, 5, -1]], [[-(2**63), -1]], [[-1, -(2**63)]],
    ):  # fmt: skip
        assert run(rows) is None, rows
    assert run([[-1, 5]], index=torch.tensor([1])) == (0, 1, 0)
    assert run([[-1, 5]], index=torch.tensor([-1])) is None


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of x in other memory."""
    last = x.dim() - 1
    padded = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 1), torch.nan if x.is_floating_point() else WRONG).to(x)
    padded[..., 1::2] = x
    return {
        "transposed": x.transpose(0, last).contiguous().transpose(0, last),
        "every other column": padded[..., 1::2],
        "slice": torch.cat([x, x], last)[..., x.shape[-1] :],
        "rows apart": torch.stack([x, x], 1)[:, 1],
    }


@pytest.mark.usefixtures("small_launch")
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl, device):
    ids, vocab, soft = some_ids(3, 3, 11, 2), rand(11, 9), rand(2, 2, 9, seed=1)
    index, positions, g = torch.tensor([1, 0, 1]), rand(3, 9, seed=2), rand(3, 3, 9, seed=3)
    lengths = torch.tensor([2, 1])

    def both(ids, vocab, soft, index, lengths, positions, g):
        leaf = soft.detach().requires_grad_()
        out = soft_gather(ids, vocab, leaf, prompt_index=index, soft_lengths=lengths, positions=positions, impl=impl)
        return out, *torch.autograd.grad(out, leaf, g)

    given = [t.to(device) for t in (ids, vocab, soft, index, lengths, positions, g)]
    want = both(*given)
    other = [layouts(t[:, None] if t.dim() == 1 else t) for t in given]
    other = [{name: x[:, 0] if t.dim() == 1 else x for name, x in made.items()} for made, t in zip(other, given, strict=True)]
    for name in other[0]:
        every = [made[name] for made in other]
        changed = [[*given[:k], x, *given[k + 1 :]] for k, x in enumerate(every)]
        for operands in [every] if impl == "triton" else [every, *changed]:  # the interpreter is slow
            for got, true in zip(both(*operands), want, strict=True):
                check_bits(got, true, name)
    strided_0 = (rand(3, 1, 1), rand(1, 1, 9), torch.ones(1, 1, 1))  # as a sum's gradient is
    for g in strided_0[2:] if impl == "triton" else strided_0:
        wide = g.to(device).expand(3, 3, 9)
        check_bits(both(*given[:-1], wide)[1], both(*given[:-1], wide.contiguous())[1], "expanded gradient")
    row = ids[:1].to(device).expand(3, 3)
    check_bits(both(row, *given[1:])[0], both(row.contiguous(), *given[1:])[0], "expanded ids")


@pytest.mark.parametrize("impl", IMPLS)
def test_special_values_stay_in_their_place(impl, device):
    vocab, soft = rand(5, 8).to(device), rand(1, 5, 8).to(device)
    for k, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, 1e-42)):
        vocab[k, k], soft[0, k, k] = value, value
    ids = torch.tensor([[0, 1, 2, 3, 4, -1, -2, -3, -4, -5]], device=device)
    check_bits(soft_gather(ids, vocab, soft, impl=impl), torch.cat([vocab, soft[0]])[None])
    g = torch.zeros(1, 10, 8, device=device)
    g[0, 6] = torch.inf
    g[0, 2] = torch.nan  # a word's
    soft.requires_grad_()
    (d,) = torch.autograd.grad(soft_gather(ids, vocab, soft, impl=impl), soft, g)
    assert bool((d[0, 1] == torch.inf).all())
    assert not d[0, [0, 2, 3, 4]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient_has_one(impl, device):
    ids, vocab = some_ids(2, 5, 7, 2).to(device), rand(7, 8).to(device)
    soft = rand(1, 2, 8).to(device)
    assert not soft_gather(ids, vocab, soft, impl=impl).requires_grad
    soft.requires_grad_()
    with torch.no_grad():
        assert not soft_gather(ids, vocab.requires_grad_(), soft, impl=impl).requires_grad
    with torch.inference_mode():
        soft_gather(ids, vocab, soft, impl=impl)
    for name, table in (("vocab_weight", vocab), ("positions", rand(5, 8).to(device).requires_grad_())):
        options = {"positions": table} if name == "positions" else {}
        with pytest.raises(ValueError, match=f"{name}: expected a frozen table"):
            soft_gather(ids, table if not options else vocab.detach(), soft, impl=impl, **options)
    vocab = vocab.detach()
    (d,) = torch.autograd.grad(
        soft_gather(ids, vocab, soft, impl=impl).sum() + soft_gather(ids[:1], vocab, soft, impl=impl).sum(), soft
    )
    count = torch.stack([(ids == -1).sum() + (ids[0] == -1).sum(), (ids == -2).sum() + (ids[0] == -2).sum()])
    check_bits(d, count.float()[None, :, None].expand(1, 2, 8).contiguous())


@pytest.mark.parametrize("impl", ["auto", TRITON])
def test_the_gradient_needs_no_room_for_the_vocabulary(impl, device):
    """Backward reads ids and the arriving gradient; a vocabulary that is gone by then is not missed."""
    vocab, soft = rand(50, 512), rand(1, 2, 512).to(device).requires_grad_()
    out = soft_gather(some_ids(3, 5, 50, 2).to(device), vocab.to(device), soft, impl=impl)
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert sum(t.numel() for t in saved) == 15
    (d,) = torch.autograd.grad(out.sum(), soft)
    assert d.shape == soft.shape


def test_the_reference_passes_gradcheck():
    vocab, soft = rand(7, 3, dtype=torch.float64), rand(2, 3, 3, dtype=torch.float64).requires_grad_()
    options = {"prompt_index": torch.tensor([1, -1, 0, 1]), "soft_lengths": torch.tensor([3, 2]), "scale": 1.5}
    options["positions"] = rand(6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: soft_gather(some_ids(4, 6, 7, 3), vocab, s, **options), soft)
    assert torch.autograd.gradgradcheck(lambda s: soft_gather(some_ids(4, 6, 7, 3), vocab, s.square(), **options), soft)


@pytest.mark.parametrize("impl", ["auto", TRITON])
def test_a_second_derivative_is_refused(impl, device):
    vocab, soft = rand(7, 8).to(device), rand(1, 3, 8).to(device).requires_grad_()
    loss = soft_gather(some_ids(3, 6, 7, 3).to(device), vocab, soft, impl=impl).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, soft, create_graph=True)


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("path", ["reference", "cpu", pytest.param("kernels", marks=needs_triton)])
def test_an_id_out_of_range_is_a_row_of_nan_where_values_are_not_looked_at(path, device):
    ids, vocab, soft, g = some_ids(3, 6, 11, 4), rand(11, 9), rand(2, 4, 9, seed=1), rand(3, 6, 9, seed=2)
    ids[1], index = torch.tensor([11, -5, 2**31, -(2**31) - 1, -(2**63), 2**63 - 1]), torch.tensor([1, 0, 1])
    want, reads = loop(ids, vocab, soft, index)
    true, _ = gradient_of(g, reads, soft.shape)
    tensors = [t.to(device) for t in (ids, vocab, soft)]
    rest = (index.to(device), None, None, 1.0, F32)
    if path == "reference":
        leaf = tensors[2].requires_grad_()
        out = reference.soft_gather(*tensors, *rest)
        (d,) = torch.autograd.grad(out, leaf, g.to(device))
    elif path == "cpu" and device.type == "cuda":
        return
    else:
        out = torch.ops.fastprompt.soft_gather(*tensors, *rest, path == "kernels")
        d = torch.ops.fastprompt.soft_gather_gradient(g.to(device), tensors[0], rest[0], None, 2, 4, 1.0, F32, path == "kernels")
    assert bool(out[1].isnan().all())
    assert not bool(out[[0, 2]].isnan().any())
    check_bits(out, want.float().to(device))
    torch.testing.assert_close(d.cpu().double(), true, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_launch")
@pytest.mark.parametrize("path", ["reference", "cpu", pytest.param("kernels", marks=needs_triton)])
def test_an_index_out_of_range_spoils_its_soft_tokens_alone(path, device):
    ids = torch.tensor([[3, -1, PADDING], [-2, 4, -1], [1, 2, 3]])
    vocab, soft, index = rand(11, 9), rand(2, 2, 9, seed=1), torch.tensor([0, 2, -7])
    rest = (index.to(device), torch.tensor([1, 2], device=device), None, 1.0, F32)
    tensors = [t.to(device) for t in (ids, vocab, soft)]
    if path == "reference":
        out = reference.soft_gather(*tensors, *rest)
    elif path == "cpu" and device.type == "cuda":
        return
    else:
        out = torch.ops.fastprompt.soft_gather(*tensors, *rest, path == "kernels")
    want = torch.stack([vocab[3], soft[0, 0], torch.zeros(9), *[soft[0, 0] * torch.nan] * 3, *vocab[1:4]]).view(3, 3, 9)
    want[1, 1] = vocab[4]
    check_bits(out, want.to(device))


def test_values_out_of_range_are_errors_where_they_are_looked_at(device, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CHECK", "1")
    vocab, soft = rand(11, 4).to(device), rand(2, 3, 4).to(device)
    good, index = torch.zeros(2, 4, dtype=torch.int64, device=device), torch.tensor([0, 1], device=device)
    for wrong in (11, -4, 2**40, -(2**31) + 1, -(2**63)):
        ids = good.clone()
        ids[1, 3] = wrong
        message = rf"ids: expected values from 0 to 10, soft tokens from -1 to -3, or PADDING, got \[{wrong}\]"
        for impl in ("auto", "torch"):
            with pytest.raises(ValueError, match=message):
                soft_gather(ids, vocab, soft, prompt_index=index, impl=impl)
    with pytest.raises(ValueError, match="no soft tokens"):
        soft_gather(good - 1, vocab, soft[:1, :0])
    with pytest.raises(ValueError, match=r"prompt_index: expected values from 0 to 1, got \[2\]"):
        soft_gather(good, vocab, soft, prompt_index=index + 1)
    with pytest.raises(ValueError, match=r"soft_lengths: expected values from 0 to 3, got \[4\]"):
        soft_gather(good, vocab, soft, prompt_index=index, soft_lengths=index * 4)


def test_wrong_arguments_are_named():
    ids, vocab, soft = torch.zeros(2, 4, dtype=torch.int64), rand(11, 4), rand(3, 3, 4)
    index = torch.tensor([0, 1])
    for error, message, args, options in (
        (TypeError, "ids: expected int64", (ids.int(), vocab, soft[:1]), {}),
        (ValueError, r"ids: expected \[B, T\]", (ids[0], vocab, soft[:1]), {}),
        (ValueError, r"vocab_weight: expected \[V, d\]", (ids, soft, soft[:1]), {}),
        (ValueError, "vocab_weight: expected .* at least one row", (ids, vocab[:0], soft[:1]), {}),
        (TypeError, "vocab_weight: expected a floating point", (ids, vocab.long(), soft[:1]), {}),
        (TypeError, "soft_weight: expected a floating point", (ids, vocab, soft[:1].long()), {}),
        (ValueError, r"soft_weight: expected \[N, P, 4\] or \[P, 4\]", (ids, vocab, soft[..., :3]), {}),
        (ValueError, "soft_weight: expected 1 or 2 prompts without a prompt_index, got 3", (ids, vocab, soft), {}),
        (ValueError, r"prompt_index: expected \[2\]", (ids, vocab, soft), {"prompt_index": torch.tensor([0])}),
        (TypeError, "prompt_index: expected int64", (ids, vocab, soft), {"prompt_index": index.int()}),
        (ValueError, r"soft_lengths: expected \[3\]", (ids, vocab, soft), {"prompt_index": index, "soft_lengths": index}),
        (ValueError, r"positions: expected \[4 or more, 4\]", (ids, vocab, soft[:1]), {"positions": vocab[:3]}),
        (ValueError, "dtype: expected a floating point", (ids, vocab, soft[:1]), {"dtype": torch.int64}),
        (ValueError, "impl: expected one of", (ids, vocab, soft[:1]), {"impl": "cuda"}),
        (ValueError, "soft_weight: expected a tensor on cpu", (ids, vocab, soft[:1].to("meta")), {}),
    ):
        with pytest.raises(error, match=message):
            soft_gather(*args, **options)
    if _runtime.INTERPRETING:
        with pytest.raises(ValueError, match="at most 32 bits"):
            soft_gather(ids, vocab, soft[:1].double(), impl="triton")


@pytest.mark.usefixtures("poison", "small_launch")
@pytest.mark.parametrize("impl", ["auto", TRITON])
def test_the_same_bits_every_time(impl, device):
    ids, vocab = some_ids(6, 3, 7, 2).to(device), rand(7, 9, dtype=BF16).to(device)
    soft, g = rand(2, 2, 9).to(device).requires_grad_(), (1e3 * rand(6, 3, 9)).to(BF16).to(device)
    index = (torch.arange(6) % 2).to(device)

    def d():
        return torch.autograd.grad(soft_gather(ids, vocab, soft, prompt_index=index, impl=impl), soft, g)[0]

    first = d()
    for _ in range(2):
        check_bits(d(), first)


@needs_triton
def test_the_chunks_of_a_batch_do_not_change_the_sum(device, monkeypatch):
    """All chunk counts, and the tiles of the tables, give the float64 sum to float32 rounding."""
    ids, soft = some_ids(9, 2, 7, 2), rand(1, 2, 20)
    ids[:, 1] = -1  # every sample, so the last chunk too
    for launch in (Launch(1, 16, 4, 10**6), Launch(2, 16, 4, 24), Launch(16, 16, 4, 99)):
        monkeypatch.setattr(ops, "pick", lambda *_, launch=launch: launch)
        agree("triton", device, ids, rand(7, 20), soft, scale=3.0)
    assert CONFIGS["add"].chunks(1024, 3) == 128
    assert CONFIGS["add"].chunks(1024, 264) == 2
    assert CONFIGS["add"].chunks(1, 3) == CONFIGS["add"].chunks(0, 3) == CONFIGS["add"].chunks(64, 10**5) == 1
    assert pick("gather", 64, "cpu") == Launch(32, 64, 4)
    assert pick("gather", 1, "cpu") == Launch(128, 16, 4)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_offsets_beyond_32_bits(device):
    """Every operand with its rows, samples or columns more than 2**31 elements apart, on memory that is only reserved."""
    from tests.test_memory import sparse

    ids, vocab, soft = torch.tensor([[2, -1, 1], [-3, 0, -2]]), rand(3, 3), rand(3, 3, 3, seed=1)
    held = {"ids": ids, "vocab": vocab, "soft": soft, "positions": rand(3, 3, seed=2), "g": rand(2, 3, 3, seed=3)}
    index = torch.tensor([2, 1])

    def both(ids, vocab, soft, positions, g):
        rest = (index, None, positions, 1.0, F32, True)
        return (
            torch.ops.fastprompt.soft_gather(ids, vocab, soft, *rest),
            torch.ops.fastprompt.soft_gather_gradient(g, ids, index, None, 3, 3, 1.0, F32, True),
        )

    want = both(**held)
    for name, near in held.items():
        for dim in range(near.dim()):
            strides = list(near.stride())
            strides[dim] = 2**31 + 64 if near.shape[dim] == 2 else 2**30 + 64  # from the third on that wraps too
            far = sparse(tuple(near.shape), tuple(strides), near.dtype).copy_(near)
            for got, true in zip(both(**(held | {name: far})), want, strict=True):
                check_bits(got, true, f"{name}, dimension {dim}")


# ---- Registration, compilation ----


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=needs_triton)])
def test_opcheck(triton, device):
    if device.type == "cuda" and not triton:
        triton = True
    ids, vocab, soft = (t.to(device) for t in (some_ids(3, 2, 11, 3), rand(11, 8), rand(2, 3, 8)))
    index, lengths = torch.tensor([1, 0, -1], device=device), torch.tensor([3, 2], device=device)
    everything, nothing = (index, lengths, rand(7, 8).to(device), 2.0, BF16), (None, None, None, 1.0, F32)
    turned = vocab.T.contiguous().T, soft[:1].transpose(1, 2).contiguous().transpose(1, 2)
    for tables, options in (((vocab, soft), everything), (turned, nothing)):
        torch.library.opcheck(torch.ops.fastprompt.soft_gather, (ids, *tables, *options, triton))
    g = rand(3, 2, 8, dtype=BF16).to(device)
    torch.library.opcheck(torch.ops.fastprompt.soft_gather_gradient, (g, ids, index, lengths, 2, 3, 2.0, F32, triton))


@pytest.mark.parametrize(
    "impl",
    [pytest.param("torch", marks=pytest.mark.slow), "auto", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])],
)
def test_torch_compile_without_a_graph_break(impl, device):
    torch._dynamo.reset()
    words, vocab = (torch.arange(12) % 11).view(2, 6).to(device), rand(11, 8).to(device)
    soft, index = rand(2, 3, 8).to(device).requires_grad_(), torch.tensor([1, 0], device=device)
    trained, mask = torch.tensor([2, 5], device=device), torch.ones(2, 6, dtype=torch.int64, device=device)

    def step(words, soft, mask):
        ids, seen = place_prompt(words, 3, "after bos", mask=mask, lengths=index + 1)
        placed, _ = place_prompt(soft_ids(words, trained), 1, first=2)
        rows = soft_gather(ids, vocab, soft, prompt_index=index, scale=2.0, impl=impl)
        return (rows.sin() * seen[..., None]).sum() + soft_gather(placed, vocab, soft[0], impl=impl).cos().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)):
        loss = run(words, soft, mask)
        results.append((loss, *torch.autograd.grad(loss, soft)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


def test_autocast_moves_values(device):
    ids, vocab, soft = some_ids(2, 5, 7, 2).to(device), rand(7, 8).to(device), rand(1, 2, 8).to(device)
    with torch.autocast(device.type, BF16):
        check_bits(soft_gather(ids, vocab, soft), soft_gather(ids, vocab, soft, impl="torch"))
        assert soft_gather(ids, vocab, soft).dtype == F32


# ---- place_prompt, soft_ids, map_vocabulary ----


def placed(ids, kept, length, at, size, first, left):
    """One sample as a Python list: (ids, mask)."""
    soft = [(-1 - first - j, 1) for j in range(size)]
    own = list(zip(ids, kept, strict=True))
    spare = [(PADDING, 0)] * (length - size)
    row = own[:at] + soft + own[at:]
    return [list(part) for part in zip(*(spare + row if left else row + spare), strict=True)] or [[], []]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("where", ["front", "after bos", "suffix", "places"])
def test_a_prompt_is_placed_as_lists_are_joined(where, padding, device):
    ids = torch.arange(1, 25).view(4, 6)
    masks = {
        "none": None,
        "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]]) > 0,
    }
    for name, mask in masks.items():
        for lengths in (None, torch.tensor([3, 0, 2, 1])):
            for first in (0, 2):
                kept = (torch.ones_like(ids) if mask is None else mask.long()).tolist()
                begin = [row.index(1) for row in kept]
                end = [6 - row[::-1].index(1) for row in kept]
                at = {"front": begin, "after bos": [b + 1 for b in begin], "suffix": end, "places": [0, 6, 3, 2]}[where]
                given = torch.tensor(at, device=device) if where == "places" else where
                options = {"mask": mask, "lengths": lengths}
                moved = {key: None if value is None else value.to(device) for key, value in options.items()}
                got = place_prompt(ids.to(device), 3, given, first=first, padding=padding, **moved)
                sizes = [3] * 4 if lengths is None else lengths.tolist()
                samples = zip(ids.tolist(), kept, at, sizes, strict=True)
                want = [placed(row, own, 3, *rest, first, padding == "left") for row, own, *rest in samples]
                assert got[0].tolist() == [row[0] for row in want], name
                assert got[1].long().tolist() == [row[1] for row in want], name
                assert got[1].dtype == (torch.bool if mask is None else mask.dtype)


def test_placing_in_nothing_and_nothing(device):
    for batch, count, length in ((0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)):
        ids = torch.ones(batch, count, dtype=torch.int64, device=device)
        for where in ("front", "after bos", "suffix", torch.zeros(batch, dtype=torch.int64, device=device)):
            for lengths in (None, torch.full((batch,), length, device=device)):
                out, mask = place_prompt(ids, length, where, mask=torch.ones_like(ids), lengths=lengths)
                assert out.shape == mask.shape == (batch, count + length)
                assert bool(mask.all())
                assert int((out < 0).sum()) == batch * length


def test_labels_and_templates_move_with_the_tokens(device):
    words = torch.arange(12).view(2, 6).to(device)
    where = torch.tensor([1, 4], device=device)
    order, _ = place_prompt(torch.arange(6, device=device).expand(2, 6), 3, where)
    labels = torch.where(order < 0, -100, (words + 50).gather(1, order.clamp(min=0)))
    ids, _ = place_prompt(words, 3, where)
    check_bits(labels, torch.where(ids < 0, -100, ids + 50))
    twice, _ = place_prompt(place_prompt(words, 2)[0], 1, "suffix", first=2)
    assert twice[0].tolist() == [-1, -2, 0, 1, 2, 3, 4, 5, -3]


def test_placing_says_what_is_wrong():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for message, args, options in (
        ("length: expected at least 0", (ids, -1), {}),
        ("first: expected at least 0", (ids, 1), {"first": -1}),
        ("where: expected one of front, after bos, suffix", (ids, 1, "middle"), {}),
        (r"where: expected \[2\]", (ids, 1, torch.tensor([0])), {}),
        ("where: expected values from 0 to 4", (ids, 1, torch.tensor([0, 5])), {}),
        (r"mask: expected \[2, 4\]", (ids, 1), {"mask": ids[:1]}),
        ("lengths: expected values from 0 to 1", (ids, 1), {"lengths": torch.tensor([0, 2])}),
        ("padding: expected one of right, left", (ids, 1), {"padding": "top"}),
    ):
        with pytest.raises(ValueError, match=message):
            place_prompt(*args, **options)
    with pytest.raises(TypeError, match="ids: expected int64"):
        place_prompt(ids.int(), 1)


def test_trained_words_become_soft_tokens(device):
    ids = torch.tensor([[0, 3, 9, 4], [PADDING, 9, 9, 7]], device=device)
    trained = torch.tensor([3, 9], device=device)
    assert soft_ids(ids, trained).tolist() == [[0, -1, -2, 4], [PADDING, -2, -2, 7]]
    check_bits(soft_ids(ids, trained[:0]), ids)
    for argument, wrong in (("trained", (ids, trained.flip(0))), ("ids", (ids.clamp(max=-1), trained))):
        with pytest.raises(ValueError, match=f"{argument}: expected"):
            soft_ids(*(t.cpu() for t in wrong))


def test_a_new_vocabulary_is_sums_of_rows(device):
    vocab, weight = rand(9, 5).to(device), rand(4, 3, seed=1).to(device)
    source = torch.tensor([[0, 8, 3], [1, 1, 2], [7, 6, 5], [4, 4, 4]], device=device)
    dense = torch.zeros(4, 9, device=device).scatter_add_(1, source, weight)
    torch.testing.assert_close(map_vocabulary(weight, vocab, source), dense @ vocab)
    torch.testing.assert_close(map_vocabulary(dense, vocab), dense @ vocab, rtol=0, atol=0)
    assert map_vocabulary(weight, vocab.to(BF16), source).dtype == F32
    leaf = weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: map_vocabulary(w, vocab.double(), source), leaf)
    for message, args in (
        (r"weight: expected \[V_T, 9\]", (weight, vocab)),
        (r"weight: expected \[V_T, 2\]", (weight, vocab, source[:, :2])),
        ("source: expected values from 0 to 8", (weight.cpu(), vocab.cpu(), source.cpu() + 1)),
    ):
        with pytest.raises(ValueError, match=message):
            map_vocabulary(*args)


def test_no_host_sync_is_written():
    """What runs on a GPU asks for no value: neither in the functions, outside the checks, nor in the launchers."""
    source = "".join(inspect.getsource(f) for f in (soft_gather, place_prompt, ops._forward_triton, ops._gradient_triton))
    assert not any(word in source for word in (".item(", "nonzero", ".tolist(", ".cpu("))


@pytest.mark.gpu
def test_it_equals_plain_pytorch_on_a_gpu_at_real_sizes(device):
    for dtype, width in ((BF16, 4096), (F16, 768), (F32, 1000)):
        vocab, soft = rand(5000, width, dtype=dtype).to(device), rand(1, 20, width).to(device).requires_grad_()
        words = torch.randint(5000, (16, 300), device=device)
        ids, _ = place_prompt(words, 20)
        out = soft_gather(ids, vocab, soft)
        check_bits(out, torch.cat([soft.detach().to(dtype).expand(16, -1, -1), F.embedding(words, vocab)], 1))
        g = rand(*out.shape, dtype=dtype).to(device)
        (d,) = torch.autograd.grad(out, soft, g)
        torch.testing.assert_close(d, g[:, :20].double().sum(0, keepdim=True).float(), rtol=1e-5, atol=1e-5)
        again = torch.autograd.grad(soft_gather(ids, vocab, soft), soft, g)[0]
        check_bits(again, d)
