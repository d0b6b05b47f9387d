"""The kernels for segments and for counting by probability, launcher against a plain float64 formula written here.

Tiles are smaller than the shapes, so that every loop turns and every mask cuts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprompt.functional import segments, stack_maps
from fastprompt.reference import mapping as reference
from fastprompt.tuning.mapping import Launch, Tile, pick, pick_segments
from tests.compare import check, check_bits, memory
from tests.conftest import HAS_TRITON

pytestmark = [pytest.mark.skipif(not HAS_TRITON, reason="needs Triton to run kernels"), pytest.mark.usefixtures("inside")]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SOURCES = 19
RAGGED = [[3, 1, 9, 18, 12], [2], [5, 17, 0, 7], [11, 10], [4], [16, 13, 15]]  # 6, 8 and 14 are not read
SHARED = [[3, 1, 9, 18, 12], [3], [5, 1, 0, 7, 3, 4, 12], [1, 10], [3, 18], [0, 1, 2]]  # 3 is read by four classes
SINGLE = [[7], [0], [18], [3], [12]]
AGAIN = [[18, 0], [1, 2, 3, 4, 5, 6], [7], [18], [8, 9, 1], [0]]
SMALL = Tile(2, 4, 4, 16, 4)  # samples, classes, entries, sources, warps
WHOLE = Tile(8, 8, 8, 32, 4)  # everything at once
TURNS = Tile(2, 4, 2, 8, 4, 2)
REDUCTIONS = ("mean", "sum", "max", "first", "logsumexp", "weighted", "top-k mean")
PLAIN = [(reduce, of) for reduce in REDUCTIONS for of in ("logits", "probabilities") if (reduce, of[0]) != ("logsumexp", "p")]


@dataclass(frozen=True)
class Case:
    """One call. maps: one map, or several of which every sample has one; loss: None, or the options of a loss."""

    reduce: str = "mean"
    of: str = "logits"
    maps: tuple[Any, ...] = (SHARED,)
    batch: int = 3
    sources: int = SOURCES
    k: int = 2
    prior: bool = False
    weighted: bool = True  # whether the map has weights
    loss: dict[str, Any] | None = None
    class_weight: bool = False
    dtype: torch.dtype = F32
    layout: str = "plain"
    tile: Tile = SMALL
    seed: int = 0
    hold: dict[str, Tensor] = field(default_factory=dict)  # operands to use in place of random ones


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The numbers of t in other memory, NaN (or a large integer) between them."""
    filler = torch.nan if t.is_floating_point() else 10**6
    if layout == "transposed" and t.dim() == 2:
        return t.T.contiguous().T
    if layout == "sliced" or (layout == "transposed" and t.dim() == 1):
        wide = t.new_full((2 * len(t) + 3, *(3 * n + 1 for n in t.shape[1:])), filler)
        at = (slice(3, None, 2), *(slice(1, None, 3) for _ in t.shape[1:]))
        wide[at] = t
        return wide[at]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def operands(case: Case, device: torch.device) -> dict[str, Any]:
    random = torch.Generator().manual_seed(case.seed)
    classes = len(case.maps[0])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    held: dict[str, Any] = {
        "scores": (2 * draw(case.batch, case.sources)).to(case.dtype),
        "prior": draw(case.sources).abs() + 0.1 if case.prior else None,
        "map_id": torch.randint(len(case.maps), (case.batch,), generator=random) if len(case.maps) > 1 else None,
        "target": torch.randint(classes, (case.batch,), generator=random) if case.loss is not None else None,
        "weight": draw(classes).abs() + 0.2 if case.class_weight else None,
    }
    shape = (case.batch,) if case.loss is not None else (case.batch, classes)
    held["g"] = draw() if total(case) else draw(*shape).to(F32 if case.of[0] == "p" or case.loss is not None else case.dtype)
    maps = []
    for classes_of in case.maps:
        entries = sum(map(len, classes_of))
        weights = draw(entries).abs() + 0.1 if case.weighted else None
        if weights is not None:
            weights[entries // 2] = 0.0  # an entry that does not count
        maps.append(segments(classes_of, case.sources, weights=weights))
    held["seg"] = (maps[0] if len(maps) == 1 else stack_maps(maps)).to(device)
    held |= case.hold
    for name, t in held.items():
        if isinstance(t, Tensor):
            held[name] = laid_out(t, case.layout if t.dim() else "plain").to(device)
    return held


def total(case: Case) -> bool:
    return case.loss is not None and case.loss.get("reduction", "mean") != "none"


def run(case: Case, held: dict[str, Any], **changed: Any) -> tuple[Tensor, Tensor]:
    """What the kernels give: (mapped scores or loss, gradient)."""
    from fastprompt.kernels.mapping.segments import reduce_segments
    from fastprompt.kernels.mapping.segments_backward import reduce_segments_gradient

    loss = dict(case.loss or {})
    flags = {"reduce": case.reduce, "k": case.k, "probabilities": case.of[0] == "p", "loss": case.loss is not None}
    both = {name: loss[name] for name in ("ignore_index", "renormalize") if name in loss}
    rest = {name: value for name, value in loss.items() if name not in both}
    if case.loss is not None:
        rest.setdefault("reduction", "mean")
    given = [held["scores"], held["seg"], held["map_id"], held["prior"], held["target"]]
    found = reduce_segments(*given, held["weight"], **flags, **both, **rest, launch=case.tile)
    out, losses, *kept = found
    d = reduce_segments_gradient(held["g"], *given, out, *kept, **flags, **both, launch=case.tile)
    return (losses if case.loss is not None else out), d


def formula(case: Case, held: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition, sample by sample and class by class, and its gradient by autograd."""
    leaf = held["scores"].detach().cpu().to(dtype).requires_grad_()
    seg = held["seg"].to("cpu")
    values = leaf
    if case.of[0] == "p":
        values = leaf.log_softmax(1)
    if held["prior"] is not None:
        prior = held["prior"].cpu().to(dtype)
        values = values - (prior.log() if case.of[0] == "p" else prior)
    rows = []
    for b in range(len(leaf)):
        n = 0 if held["map_id"] is None else int(held["map_id"][b])
        first = n * seg.num_classes
        if not 0 <= n < seg.num_maps:
            rows.append(leaf[b, : seg.num_classes] * torch.nan)
            continue
        row = []
        for t in range(seg.num_classes):
            entries = slice(int(seg.starts[first + t]), int(seg.starts[first + t + 1]))
            v = values[b, seg.members[entries]]
            w = torch.ones_like(v) if seg.weights is None else seg.weights[entries].to(dtype)
            row.append(reduced(v, w, case))
        rows.append(torch.stack(row))
    z = torch.stack(rows) if rows else leaf[:, : seg.num_classes] * 1.0
    if case.loss is not None:
        z = loss_of(z, held, case, dtype)
    g = held["g"].detach().cpu().to(dtype)
    (d,) = torch.autograd.grad(z, leaf, g)
    return z.detach(), d


def reduced(v: Tensor, w: Tensor, case: Case) -> Tensor:
    """One class of one sample. Of probabilities, v and the result are logarithms."""
    if case.reduce == "first":
        return v[0]
    if case.reduce == "max":
        return v[v.argmax()]  # the first of equals
    if case.reduce == "top-k mean":
        v = v[v.sort(descending=True, stable=True).indices[: case.k]]
        w = torch.ones_like(v)
    if case.reduce == "logsumexp":
        return v.logsumexp(0)
    weighted = case.reduce == "weighted"
    by = len(v) if "mean" in case.reduce else 1
    if case.of[0] == "p":
        # Without a class's largest nothing is lost; a class without mass is a constant.
        v = v[w != 0] + w[w != 0].log() if weighted else v
        mass = bool((v > -torch.inf).any() | v.isnan().any())
        return v.logsumexp(0) - math.log(by) if mass else torch.zeros_like(v).sum() - torch.inf
    return (v * w if weighted else v).sum() / by


def loss_of(z: Tensor, held: dict[str, Any], case: Case, dtype: torch.dtype) -> Tensor:
    options = case.loss or {}
    classes = z.shape[1]
    log_q = z.log_softmax(1) if options.get("renormalize", True) or case.of[0] == "l" else z
    w = torch.ones(classes, dtype=dtype) if held["weight"] is None else held["weight"].cpu().to(dtype)
    smoothing, ignored = options.get("smoothing", 0.0), options.get("ignore_index", -100)
    losses, weights = [], []
    for b, y in enumerate(held["target"].tolist()):
        if y == ignored:
            losses.append(z.new_zeros(()))
            continue
        if not 0 <= y < classes:
            losses.append(z[b, 0] * torch.nan)
            continue
        loss = -(1 - smoothing) * w[y] * log_q[b, y]
        if smoothing:
            loss = loss - smoothing / classes * (w * log_q[b]).sum()
        if options.get("focal", 0.0):
            others = torch.cat([log_q[b, :y], log_q[b, y + 1 :]])
            miss = others.exp().sum() if options.get("renormalize", True) or case.of[0] == "l" else -log_q[b, y].expm1()
            loss = loss * miss ** options["focal"]
        losses.append(loss)
        weights.append(w[y])
    all_losses = torch.stack(losses) if losses else z.sum(1)
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return all_losses
    return all_losses.sum() if reduction == "sum" else all_losses.sum() / sum(weights, torch.zeros((), dtype=dtype))


def agree(case: Case, device: torch.device, *, ulps: float = 8.0, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Kernels against the formula in float64; what plain PyTorch loses in float32 is allowed twice, and `ulps`."""
    held = operands(case, device)
    before = memory(*(t for t in held.values() if isinstance(t, Tensor)))
    got, d = run(case, held)
    assert all(map(torch.equal, before, memory(*(t for t in held.values() if isinstance(t, Tensor)))))
    want, want_d = formula(case, held, torch.float64)
    near, near_d = formula(case, held, F32)
    kind = F32 if case.of[0] == "p" or case.loss is not None else case.dtype
    ulps = ulps if kind == F32 else 1.0
    more = torch.tensor(floor, dtype=torch.float64)
    check(got, want, near.to(kind).to(device), ulps=ulps, floor=more, name="out")
    check(d, want_d, near_d.to(case.dtype).to(device), ulps=8.0 if case.dtype == F32 else 1.0, floor=more, name="gradient")
    return got, d


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("maps", [(SHARED,), (RAGGED, AGAIN, SHARED)], ids=["one map", "three"])
@pytest.mark.parametrize(("reduce", "of"), PLAIN)
def test_map(reduce, of, maps, device):
    agree(Case(reduce, of, maps, prior=len(maps) == 1), device)


@pytest.mark.parametrize(("reduce", "of"), PLAIN)
def test_everything_in_one_tile(reduce, of, device):
    agree(Case(reduce, of, k=9, loss={}, tile=WHOLE), device)  # k of more than there are


@pytest.mark.parametrize(("reduce", "of"), [("mean", "probabilities"), ("logsumexp", "logits")])
def test_many_turns(reduce, of, device):
    agree(Case(reduce, of, batch=5, tile=TURNS, loss={"smoothing": 0.1, "focal": 1.5}), device)


def test_without_a_backward_nothing_is_kept_for_one(device):
    from fastprompt.kernels.mapping.segments import reduce_segments

    for reduce, of in (("top-k mean", "probabilities"), ("logsumexp", "logits")):
        for loss in (None, {}):
            held = operands(Case(reduce, of, dtype=BF16, loss=loss), device)
            given = [held["scores"], held["seg"], None, None, held["target"], None]
            flags = {"reduce": reduce, "k": 2, "probabilities": of[0] == "p", "loss": loss is not None, "launch": WHOLE}
            found, alone = (reduce_segments(*given, **flags, differentiable=d) for d in (True, False))
            check_bits(alone[0], found[0])
            check_bits(alone[1], found[1])
            assert any(t.numel() for t in found[3:])
            assert not any(t.numel() for t in alone[3:])


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "smoothing": {"smoothing": 0.3, "reduction": "none"},
    "all smooth": {"smoothing": 1.0},
    "focal": {"focal": 2.0, "reduction": "none"},
    "focal 1": {"focal": 1.0},
    "focal, smooth": {"focal": 0.5, "smoothing": 0.1},
}  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("of", ["logits", "renormalize", "probabilities"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, of, device):
    options = LOSSES[name] | ({"renormalize": False} if of == "probabilities" else {})
    target = torch.tensor([1, -100, 5])
    case = Case(of="logits" if of == "logits" else "probabilities", loss=options, hold={"target": target})
    agree(replace(case, class_weight=True, prior=True, reduce="sum", tile=WHOLE), device)
    if of != "renormalize" and name in ("none", "smoothing", "focal"):
        agree(case, device)


@pytest.mark.slow
@pytest.mark.parametrize(("reduce", "of"), PLAIN)
def test_loss_of_every_reduction(reduce, of, device):
    agree(Case(reduce, of, (RAGGED, SHARED), loss={"smoothing": 0.2}, class_weight=True), device)


@pytest.mark.parametrize(("reduce", "of"), PLAIN)
def test_half_precision(reduce, of, device):
    agree(Case(reduce, of, dtype=BF16, tile=WHOLE), device)
    if reduce in ("mean", "logsumexp"):
        agree(Case(reduce, of, dtype=F16, loss={}, tile=WHOLE), device)


@pytest.mark.parametrize(
    ("of", "layout"), [("logits", "transposed"), ("logits", "sliced"), ("probabilities", "sliced"), ("probabilities", "expanded")]
)
def test_layouts(of, layout, device):
    case = Case("top-k mean", of, (RAGGED, SHARED), prior=True, layout=layout)
    agree(case, device)
    agree(replace(case, reduce="weighted", loss={"smoothing": 0.1, "reduction": "none"}, class_weight=True), device)


@pytest.mark.parametrize("batch", [0, 5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_batch_sizes(batch, reduction, device):
    for tile in (SMALL, WHOLE):
        agree(Case(batch=batch, loss={"reduction": reduction}, tile=tile), device)
    if reduction == "none":
        agree(Case(batch=batch), device)


def test_one_program_or_many_give_the_loss(device):
    """The launches that goals ask for: one for a small batch, mean included."""
    case = Case(batch=7, loss={}, class_weight=True)
    alone = replace(case, tile=Tile(2, 8, 8, 32, 4, 4))
    many = replace(case, tile=Tile(2, 8, 8, 32, 4, 1))
    for each, launches in ((alone, 1), (many, 2)):
        calls = count_launches(lambda each=each: agree(each, device))
        assert calls == {"reduce_segments_kernel": 1, "reduce_segments_gradient_kernel": 1} | (
            {} if launches == 1 else {"total_loss_kernel": 1}
        )


def count_launches(call: Any) -> dict[str, int]:
    """How often each kernel was launched."""
    from fastprompt.kernels.mapping import segments as forward
    from fastprompt.kernels.mapping import segments_backward as backward

    seen: dict[str, int] = {}
    names = [(m, n) for m in (forward, backward) for n in vars(m) if n.endswith("_kernel")]
    originals = [getattr(m, n) for m, n in names]

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            seen[self.name] = seen.get(self.name, 0) + 1
            return self.kernel[grid]

    try:
        for (m, n), kernel in zip(names, originals, strict=True):
            setattr(m, n, Counted(n, kernel))
        call()
    finally:
        for (m, n), kernel in zip(names, originals, strict=True):
            setattr(m, n, kernel)
    return seen


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("tile", [SMALL, WHOLE])
def test_bad_targets_and_maps_spoil_their_own_row(of, tile, device):
    target = torch.tensor([1, 6, -100, -1, 3, 2**40])
    map_id = torch.tensor([1, 0, 0, 1, 2, -1])
    case = Case(of=of, maps=(RAGGED, SHARED), batch=6, hold={"target": target, "map_id": map_id}, tile=tile)
    out, d = run(replace(case, hold={"map_id": map_id}), held := operands(replace(case, hold={"map_id": map_id}), device))
    assert out.isnan().all(1).tolist() == d.isnan().all(1).tolist() == [False] * 4 + [True] * 2
    check(out[:4], formula(case, held, torch.float64)[0][:4], formula(case, held, F32)[0][:4].to(device), ulps=8.0)
    for reduction in ("none", "mean"):
        with_loss = replace(case, loss={"reduction": reduction})
        held = operands(with_loss, device)
        out, d = run(with_loss, held)
        bad = [False, True, False, True, True, True]
        assert d.isnan().all(1).tolist() == bad == d.isnan().any(1).tolist()
        assert not d[2].any()
        assert (out.isnan().tolist() == bad) if reduction == "none" else out.isnan()


def test_all_ignored(device):
    ignored = torch.full((3,), -7)
    for reduction, want in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        options = {"reduction": reduction, "ignore_index": -7, "smoothing": 0.1, "focal": 1.0}
        for tile in (SMALL, WHOLE) if reduction == "mean" else (WHOLE,):
            case = Case(loss=options, hold={"target": ignored}, tile=tile)
            out, d = run(case, operands(case, device))
            assert not d.any()
            assert bool(out.isnan()) if reduction == "mean" else bool((out == want).all())


def test_ignored_rows_may_hold_anything(device):
    case = Case(loss={}, hold={"target": torch.tensor([1, -100, 2])})
    held = operands(case, device)
    want = run(case, held)
    held["scores"][1] = torch.nan
    for got, was in zip(run(case, held), want, strict=True):
        check_bits(got, was)


@pytest.mark.parametrize("tile", [Tile(8, 4, 4, 16, 4), WHOLE], ids=["small", "whole"])
@pytest.mark.parametrize(("reduce", "of"), [("logsumexp", "logits"), ("max", "logits"), ("sum", "probabilities")])
def test_one_finite_score(reduce, of, tile, device):
    """Everything else is -inf, wherever in a tile the finite one stands; classes without it have no mass."""
    scores = torch.full((SOURCES, SOURCES), -torch.inf)
    scores.diagonal().copy_(torch.linspace(-1e4, 30, SOURCES))
    case = Case(reduce, of, (RAGGED,), batch=SOURCES, hold={"scores": scores}, tile=tile)
    held = operands(case, device)
    out, d = run(case, held)
    want, want_d = formula(case, held, torch.float64)
    check(out, want, want.float().to(device), ulps=4.0)
    # Where PyTorch has -inf - (-inf), nothing is -inf's part of nothing.
    check(d, want_d.nan_to_num(0.0), want_d.nan_to_num(0.0).float().to(device), ulps=4.0)


def test_loss_beside_classes_without_mass(device):
    scores = torch.full((6, SOURCES), -torch.inf)
    for t, members in enumerate(RAGGED):
        scores[t, members] = torch.linspace(-2, 3, len(members)) + t
    scores[:, 9] = 1.0  # class 0 has mass in every row
    for of, reduce in (("logits", "logsumexp"), ("logits", "max"), ("probabilities", "sum")):
        case = Case(reduce, of, (RAGGED,), batch=6, loss={"reduction": "none"}, hold={"scores": scores})
        for tile, target in ((SMALL, torch.arange(6)), (WHOLE, torch.zeros(6, dtype=torch.int64))):
            each = replace(case, tile=tile, hold=case.hold | {"target": target})
            held = operands(each, device)
            out, d = run(each, held)
            want, want_d = formula(each, held, torch.float64)
            check(out, want, want.float().to(device), ulps=8.0)
            check(d, want_d.nan_to_num(0.0), want_d.nan_to_num(0.0).float().to(device), ulps=16.0)


@pytest.mark.parametrize(("reduce", "of"), [plain for plain in PLAIN if plain[0] not in ("sum", "first")])
def test_shifted_scores(reduce, of, device):
    """Of a softmax a constant is taken out exactly: multiples of 1/8, so that the scores themselves are exact."""
    scores = (torch.randn(2, SOURCES, generator=torch.Generator().manual_seed(1)) * 8).round() / 8
    scores += torch.tensor([[-1e4], [1e4]])
    case = Case(reduce, of, (RAGGED,), batch=2, loss={"reduction": "none"}, hold={"scores": scores})
    linear = of == "logits" and reduce in ("mean", "sum", "weighted", "top-k mean")
    agree(replace(case, loss=None) if linear else case, device)


@pytest.mark.parametrize("margin", [0.0, 5.0, 9.2103, 12.0, 30.0, 60.0])
@pytest.mark.parametrize("tile", [SMALL, WHOLE])
def test_confident_rows_keep_their_digits(margin, tile, device):
    """p = 0.9999 and beyond: the loss and the slope of the right class are as exact as any other."""
    classes = [[t] for t in range(6)]
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) / 4 + margin * torch.eye(6)
    for options in ({"reduction": "none"}, {"reduction": "none", "focal": 2.0}):
        case = Case(
            maps=(classes,), sources=6, batch=6, loss=options, tile=tile, hold={"scores": scores, "target": torch.arange(6)}
        )
        held = operands(case, device)
        out, d = run(case, held)
        want, want_d = formula(case, held, torch.float64)
        # -log q and q - 1 in float64 lose digits themselves beyond a margin of 30: from the sum of the others.
        x = scores.double()
        others = (x - x.diagonal()[:, None]).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).exp().sum(1)
        miss = others / (1 + others)
        factor = miss ** options.get("focal", 0.0)
        want = factor * others.log1p()
        assert ((out.cpu() - want).abs() <= (4e-6 + 1e-7 * margin) * want + 1e-38).all()  # a GPU's exp(x) is good to 6e-8 x
        if "focal" not in options:
            slope = -miss * held["g"].cpu().double()
            assert ((d.cpu().diagonal() - slope).abs() <= (2e-6 + 1e-7 * margin) * slope.abs()).all()
        if margin < 30.0:  # where float64 itself has digits left
            check(d, want_d, want_d.float().to(device), ulps=64.0)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_equals(of, device):
    """Of equal scores max takes the first, top-k mean those that stand first; in the order of the entries."""
    scores = torch.tensor([[0.0] * 19, [1.0, 2.0] * 9 + [2.0], [2.0, 1.0] * 9 + [2.0], [-1.0] * 18 + [3.0], [5.0] * 19])
    for reduce, k, tile in (("max", 1, SMALL), ("top-k mean", 1, WHOLE), ("top-k mean", 3, SMALL)):
        agree(Case(reduce, of, batch=5, k=k, hold={"scores": scores}, tile=tile), device)


@pytest.mark.parametrize(("reduce", "of"), PLAIN)
def test_nan_in_nan_out(reduce, of, device):
    scores = torch.randn(4, SOURCES, generator=torch.Generator().manual_seed(2))
    scores[0, 3], scores[1, 12], scores[2, 6], scores[3, 18] = (torch.nan,) * 4  # nobody reads 6
    case = Case(reduce, of, (RAGGED,), batch=4, k=2, hold={"scores": scores}, weighted=False)
    held = operands(case, device)
    out, d = run(case, held)
    want, want_d = formula(case, held, F32)
    assert torch.equal(out.cpu().isnan(), want.isnan())
    if of == "logits":
        assert torch.equal(d.cpu().isnan(), want_d.isnan())
    else:
        assert d.isnan().all()
    out, d = run(replace(case, loss={"reduction": "none"}), operands(replace(case, loss={"reduction": "none"}), device))
    assert torch.equal(out.cpu().isnan(), want.isnan().any(1))


def test_a_member_that_is_not_a_source_spoils_its_class(device):
    case = Case("sum", maps=(SINGLE,))
    held = operands(case, device)
    held["seg"] = held["seg"]._replace(members=torch.tensor([7, 19, 18, -1, 12], device=device))
    out, _ = run(case, held)
    assert out.isnan().tolist() == [[False, True, False, True, False]] * 3
    check_bits(out[:, ::2], held["scores"][:, [7, 18, 12]])


def test_one_source_a_class_is_a_gather(device):
    """Data movement, bit for bit, whatever the reduction is called."""
    index = torch.tensor(SINGLE, device=device)[:, 0]
    for reduce, dtype in (("mean", BF16), ("max", F32), ("first", F32), ("logsumexp", F16), ("top-k mean", F32)):
        case = Case(reduce, maps=(SINGLE,), dtype=dtype, weighted=False)
        held = operands(case, device)
        out, d = run(case, held)
        check_bits(out, held["scores"][:, index])
        check_bits(d, torch.zeros_like(held["scores"]).index_copy_(1, index, held["g"]))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.slow
def test_random_calls(seed, device):
    random = torch.Generator().manual_seed(seed)

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    sources, classes = one_of(1, 5, 17, 40), one_of(1, 2, 5, 11)

    def a_map() -> list[list[int]]:
        return [torch.randperm(sources, generator=random)[: one_of(1, 2, 4, sources)].tolist() for _ in range(classes)]

    reduce, of = one_of(*PLAIN)
    loss = one_of(None, *LOSSES.values())
    if loss is not None and of == "probabilities" and one_of(True, False):
        loss = loss | {"renormalize": False}
    if loss is not None and (classes == 1 or sources == 1):
        loss = {name: value for name, value in loss.items() if name != "focal"}  # 0 ** focal has no slope
    case = Case(
        reduce, of, tuple(a_map() for _ in range(one_of(1, 1, 3))), batch=one_of(1, 3, 6), sources=sources, k=one_of(1, 2, 5),
        prior=one_of(True, False), weighted=one_of(True, False) and sources > 1, loss=loss, class_weight=one_of(True, False),
        dtype=one_of(F32, F32, BF16, F16), layout=one_of("plain", "transposed", "sliced", "expanded"), seed=seed,
        tile=Tile(one_of(1, 2, 4), one_of(1, 4, 16), one_of(1, 2, 8), one_of(4, 16, 64), 4, one_of(1, 2, 3)),
    )  # fmt: skip
    agree(case, device, ulps=16.0, floor=2e-6)


# ---- Counting by probability ----


def counts_of(logits: Tensor, target: Tensor, targets: int, k: int) -> list[list[int]]:
    """Sample by sample, in float64."""
    counts = [[0] * targets for _ in range(logits.shape[1])]
    for row, y in zip(logits.double().cpu(), target.tolist(), strict=True):
        p = row.softmax(0)
        if not 0 <= y < targets or p.isnan().any():
            continue
        for s in sorted(range(len(row)), key=lambda s: (-float(row[s]), s))[:k]:
            counts[s][y] += round(float(p[s]) * 2**40)
    return counts


@pytest.mark.parametrize(
    ("launch", "dtype"),
    [(Launch(8, 8, 4), F32), (Launch(8, 32, 4), F32), (Launch(8, 32, 4), F16), (Launch(8, 32, 4), BF16)],
    ids=["turns", "whole", "half", "bfloat16"],
)
def test_counting_the_largest(launch, dtype, device):
    from fastprompt.kernels.mapping.count import count_labels_

    logits = (3 * torch.randn(11, SOURCES, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[0, 3] = logits[0, 7] = logits[0, 18] = 9.0  # equals: the lower position first
    logits[1], logits[2, 5], logits[3, 4] = -torch.inf, torch.nan, torch.inf  # no softmax
    logits[4, 2:], logits[5], logits[6, 8:] = -torch.inf, 1.0, -20.0
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, -100, 3, 2**40, 2])
    for layout, k in (("plain", 1), ("plain", SOURCES), ("transposed", 2), ("sliced", 3)):
        x, y = laid_out(logits, layout).to(device), laid_out(target, layout).to(device)
        counts = torch.full((SOURCES, 3), 7, dtype=torch.int64, device=device)
        count_labels_(counts, x, y, launch, k)
        want = torch.tensor(counts_of(logits, target, 3, k)) + 7
        assert torch.equal(counts.cpu() > 7, want > 7), (layout, k)  # who counts is exact
        assert int((counts.cpu() - want).abs().max()) <= 2**19, (layout, k)  # 2**-21 of a probability
        if k == 3:
            again = torch.full_like(counts, 7)
            for part in (slice(0, 5), slice(5, 11)):
                count_labels_(again, x[part], y[part], launch, k)
            assert torch.equal(again, counts), "depends on how the samples are cut into batches"


def test_halves_of_a_unit_go_to_the_even_one(device):
    from fastprompt.kernels.mapping.count import count_labels_

    logits = torch.tensor([[0.0, -28.4], [0.0, -27.9], [0.0, -26.0]])
    counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
    count_labels_(counts, logits.to(device), torch.arange(3, device=device), Launch(1, 2, 4), 2)
    want = reference.count_labels_(torch.zeros(2, 3, dtype=torch.int64), logits, torch.arange(3), 2)
    assert torch.equal(counts.cpu(), want)
    assert counts[0].tolist() == [2**40] * 3
    assert counts[1].tolist() == [round(math.exp(x) * 2**40) for x in (-28.4, -27.9, -26.0)]


# ---- Tiles ----


def test_tiles_are_powers_of_two_that_fit():
    for kernel in ("forward", "gradient"):
        for batch in (0, 1, 5, 256, 4096, 65536, 2**20):
            for sources, classes, longest in (
                (1000, 10, 1),
                (1000, 10, 100),
                (1000, 1000, 1),
                (32157, 397, 30),
                (2**18, 2, 999),
                (1, 1, 1),
            ):
                for probabilities in (False, True):
                    for loss in (False, True):
                        tile = pick_segments(
                            kernel, batch=batch, sources=sources, classes=classes, longest=longest, probabilities=probabilities,
                            loss=loss, arch="sm_90",
                        )  # fmt: skip
                        sides = (tile.ROWS, tile.CLASSES, tile.ENTRIES, tile.COLUMNS, tile.num_warps)
                        assert all(side >= 1 and side & (side - 1) == 0 for side in sides), tile
                        assert tile.ROWS * tile.COLUMNS <= 2048 or not probabilities
                        assert kernel == "gradient" or tile.ROWS * tile.CLASSES * tile.ENTRIES <= 4096
                        assert tile.turns >= 1
                        assert tile.turns == 1 or tile.turns * tile.ROWS < batch + tile.ROWS


def test_new_batch_sizes_compile_nothing():
    facts = {"sources": 1000, "classes": 10, "probabilities": True, "loss": True, "arch": "sm_90"}
    for kernel in ("forward", "gradient"):
        for longest in (1, 100):
            tiles = {replace(pick_segments(kernel, batch=b, longest=longest, **facts), turns=1) for b in range(1, 1025)}
            assert len(tiles) <= 2, tiles


def test_small_batches_are_one_program():
    facts = {"sources": 1000, "longest": 1, "probabilities": False, "loss": True, "arch": "sm_90"}
    for batch, classes in ((256, 10), (256, 100), (1, 1000), (32, 1000)):
        tile = pick_segments("forward", batch=batch, classes=classes, **facts)
        assert tile.ROWS * tile.turns >= batch
    tile = pick_segments("forward", batch=65536, classes=10, **facts)
    assert tile.turns == 1
    assert pick("count largest", 1000, "sm_90").COLUMNS >= 1000
