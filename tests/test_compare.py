"""The comparator refuses what is wrong and accepts what is right: it decides every other numerical test."""

from __future__ import annotations

import pytest
import torch

from tests.compare import check, check_bits, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def truth():
    return torch.randn(4, 3, 8, 16, generator=torch.Generator().manual_seed(0)).double()


def damaged(place, change):
    def wrong(good):
        good[place] = change(good[place])
        return good

    return wrong


def swapped_rows(good):
    good[0, 0, [1, 2]] = good[0, 0, [2, 1]]
    return good


def off_by_ulps(count):
    """The largest element of one row moved by `count` ulps beyond what the rival's error and one ulp allow."""

    def wrong(good):
        row = good[2, 1, 3]
        at = row.abs().argmax()
        row[at] += count * ulp(row.abs().max().double(), good.dtype).to(good.dtype)
        return good

    return wrong


WRONG = {
    "zeros": torch.zeros_like,
    "negated": torch.neg,
    "ones": torch.ones_like,
    "all NaN": lambda good: good * torch.nan,
    "one NaN": damaged((1, 2, 3, 4), lambda v: v * torch.nan),
    "one inf": damaged((1, 2, 3, 4), lambda v: v * torch.inf),
    "one row x 1.05": damaged((3, 2, 7), lambda row: row * 1.05),
    "one row zero": damaged((0, 0, 0), torch.zeros_like),
    "one row negated": damaged((0, 1, 0), torch.neg),
    "scaled by 1.01": lambda good: good * 1.01,
    "offset by 0.02 of the largest": lambda good: good + 0.02 * good.abs().max(),
    "rows swapped": swapped_rows,
    "samples swapped": lambda good: good.flip(0),
    "channels swapped": lambda good: good.flip(1),
    "reversed along the row": lambda good: good.flip(-1),
    "shifted by one": lambda good: good.roll(1, -1),
    "shifted by one row": lambda good: good.roll(1, -2),
    "last column stale": damaged((..., -1), lambda column: torch.full_like(column, 7.0)),
    "first column zero": damaged((..., 0), torch.zeros_like),
    "transposed": lambda good: good.transpose(0, 2).reshape(good.shape),
    "last row from the one before": damaged((3, 2, 7), lambda row: row.roll(3)),
    "one element zero": damaged((2, 0, 5, 11), torch.zeros_like),
    "one element four ulps off": off_by_ulps(4),
    "fewer rows": lambda good: good[:, :, :-1],
    "another rank": lambda good: good[None],
    "float64": torch.Tensor.double,
    "another half": lambda good: good.to(torch.bfloat16 if good.dtype != torch.bfloat16 else torch.float16),
    "another device": lambda good: good.to("meta"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_results_are_refused(kind, dtype):
    good = truth().to(dtype)
    with pytest.raises(AssertionError, match=r"^out:"):
        check(WRONG[kind](good.clone()), good.double(), good)


def test_a_thousandth_is_refused_in_float32():
    good = truth().float()
    with pytest.raises(AssertionError, match="row"):
        check(good * (1 + 1e-3), truth(), good)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_a_missing_special_value_is_refused(special):
    want = truth()
    want[1, 1, 1, 1] = special
    for got in (0.0, torch.nan, torch.inf, -torch.inf):
        mine = want.float()
        mine[1, 1, 1, 1] = got
        if mine.double().equal(want) or (mine.isnan().any() and want.isnan().any()):
            check(mine, want, want.float())
        else:
            with pytest.raises(AssertionError, match="places"):
                check(mine, want, want.float())


def test_a_rival_that_is_bad_in_one_row_excuses_that_row_alone():
    want = truth()
    rival = want.float()
    rival[0, 0, 0] *= 1.05
    check(rival, want, rival)
    moved = want.float()
    moved[0, 0, 1] *= 1.05
    with pytest.raises(AssertionError, match="row 1 "):
        check(moved, want, rival)


def test_a_row_of_zeros_must_be_exactly_zero():
    want = torch.zeros(2, 4, dtype=torch.float64)
    got = torch.zeros(2, 4)
    check(got, want, got)
    got[1, 2] = 1e-30
    with pytest.raises(AssertionError, match="row 1 "):
        check(got, want, torch.zeros(2, 4))


def test_the_truth_must_be_float64():
    with pytest.raises(AssertionError, match="float64"):
        check(torch.ones(2), torch.ones(2), torch.ones(2))


RIGHT = {
    "itself": lambda good: good,
    "a copy": torch.clone,
    "channels_last": lambda good: good.contiguous(memory_format=torch.channels_last),
    "a view with holes": lambda good: torch.stack([good, good + 1], -1)[..., 0],
    "requires a gradient": lambda good: good.clone().requires_grad_(),
    "one ulp off": off_by_ulps(1),
    "rounded twice": lambda good: good.double().to(good.dtype),
    "minus zero": damaged((0, 0, 0), lambda row: -row * 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", RIGHT)
def test_right_results_are_accepted(kind, dtype):
    want = truth()
    want[0, 0, 0] = 0
    good = want.to(dtype)
    check(RIGHT[kind](good.clone()), good.double(), good)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,), ()])
def test_empty_and_scalar_tensors(shape):
    good = torch.ones(shape)
    check(good, good.double(), good)


def test_bits_are_bits():
    good = truth().float()
    check_bits(good.clone(), good)
    check_bits(torch.tensor([torch.nan]), torch.tensor([-torch.nan]))
    check_bits(torch.tensor([1, 2]), torch.tensor([1, 2]))
    for wrong in (
        torch.nextafter(good, good + 1),
        good.double(),
        good.flip(0),
        damaged((0, 0, 0, 0), lambda v: v * torch.nan)(good.clone()),
    ):
        with pytest.raises(AssertionError):
            check_bits(wrong, good)
    with pytest.raises(AssertionError):
        check_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
