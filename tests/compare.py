"""When two tensors agree. Per row and against float64, as a multiple of PyTorch's own error in the same dtype.

A global maximum hides one bad row, a relative mean hides many, and a plain `allclose` hides wrong dtypes, devices and
layouts, so none of them decides here. `test_compare.py` shows what is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    got: Tensor, want: Tensor, rival: Tensor, *, factor: float = 2.0, ulps: float = 1.0, floor: Tensor | None = None,
    name: str = "out",
) -> None:  # fmt: skip
    """Asserts that every row of `got` is as near to `want` as `factor` times `rival` is, plus `ulps`.

    Args:
        got: what is tested.
        want: the truth, float64.
        rival: plain PyTorch's result, whose dtype, device and shape are the promise. A row's allowance is `factor` times
            the rival's largest error in that row plus `ulps` units in the last place of the row's largest value.
        floor: an allowance more for each row [..., 1], where what is summed is larger than its sum.

    NaN and infinities must stand at the same places as in the truth rounded to the dtype.
    """
    assert want.dtype == torch.float64, f"{name}: the truth has to be float64, not {want.dtype}"
    check_kind(got, rival, name)
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    got64, rival64 = got.detach().double().cpu(), rival.detach().double().cpu()
    want = want.detach().cpu()
    rounded = want.to(got.dtype).double()
    check_special(got64, rounded, name)
    finite = rounded.isfinite()
    error = torch.where(finite, got64 - want, 0.0).abs()
    allowed = torch.where(finite & rival64.isfinite(), rival64 - want, 0.0).abs()
    size = torch.where(finite, want, 0.0).abs()
    if got.dim() == 0:
        error, allowed, size = error[None], allowed[None], size[None]
    if not got.numel():
        return
    allowed = factor * allowed.amax(-1, keepdim=True) + ulps * ulp(size.amax(-1, keepdim=True), got.dtype)
    if floor is not None:
        allowed = allowed + floor.cpu()
    worst = (error - allowed).amax(-1)
    row = int(worst.flatten().argmax())
    assert worst.flatten()[row] <= 0, (
        f"{name}: row {row} of {worst.numel()} is off by {error.amax(-1).flatten()[row]:.3e}, "
        f"allowed {allowed.flatten()[row]:.3e} (largest value {size.amax(-1).flatten()[row]:.3e})"
    )


def check_bits(got: Tensor, want: Tensor, name: str = "out") -> None:
    """Asserts that `got` has the very bits of `want` (any NaN equals any NaN): for data movement and for repeats."""
    check_kind(got, want, name)
    got, want = got.detach().cpu().contiguous(), want.detach().cpu().contiguous()
    if got.is_floating_point():
        same = torch.where(want.isnan(), got.isnan(), (got == want) & (got.signbit() == want.signbit()))
    else:
        same = got == want
    assert bool(same.all()), (
        f"{name}: {int((~same).sum())} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"
    )


def check_kind(got: Tensor, want: Tensor, name: str = "out") -> None:
    """Asserts the same dtype, device and shape."""
    for what in ("dtype", "device", "shape"):
        mine, theirs = getattr(got, what), getattr(want, what)
        assert mine == theirs, f"{name}: {what} {mine}, wanted {theirs}"


def check_special(got: Tensor, want: Tensor, name: str = "out") -> None:
    """Asserts that NaN, +inf and -inf stand at the same places."""
    for kind, mine, theirs in (
        ("NaN", got.isnan(), want.isnan()),
        ("+inf", got == torch.inf, want == torch.inf),
        ("-inf", got == -torch.inf, want == -torch.inf),
    ):
        assert torch.equal(mine, theirs), (
            f"{name}: {kind} at {int(mine.sum())} places, wanted at {int(theirs.sum())} places or elsewhere"
        )


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype around `size`, in float64."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(size.clamp(min=info.tiny)))) * info.eps


def memory(*tensors: Tensor | None) -> list[Tensor]:
    """A copy of each tensor's whole storage, to show later that nothing was written to it."""
    storages = [t.detach().untyped_storage() for t in tensors if t is not None]
    return [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s).clone() for s in storages]
