"""Masks on bits: what is kept stays bit for bit, what goes becomes +0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prunekit.bits import all_finite, any_bit, apply_mask, count_zeros, removed_part

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
WIDE = DTYPES[:4]
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


pytestmark = pytest.mark.usefixtures("seeded")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGER[tensor.dtype.itemsize])


def awkward(dtype: torch.dtype) -> Tensor:
    """A 4x6 matrix of the values that arithmetic would change: both zeros, subnormals, extremes, infinities, NaN payloads."""
    integer = INTEGER[dtype.itemsize]
    top = torch.iinfo(integer).min  # the sign bit alone is -0.0
    largest = bits(torch.tensor([torch.finfo(dtype).max]).to(dtype)).item()
    patterns = [0, top, 1, top + 1, 3, largest, top + largest, -1, torch.iinfo(integer).max, top + 5, 7, 11]
    return torch.tensor(patterns * 2, dtype=integer).view(dtype).reshape(4, 6)


def checkerboard(rows: int, columns: int) -> Tensor:
    return torch.tensor([[(i * i + j) % 3 > 0 for j in range(columns)] for i in range(rows)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_plus_zero_has_no_bit(dtype: torch.dtype) -> None:
    assert any_bit(awkward(dtype)).tolist() == [[bool(entry) for entry in row] for row in bits(awkward(dtype)).tolist()]
    assert not any_bit(awkward(dtype))[0, 0]
    assert any_bit(awkward(dtype))[0, 1], "-0 is a bit"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_stay_to_the_bit_and_the_others_become_plus_zero(dtype: torch.dtype, transposed: bool) -> None:
    stored = awkward(dtype)
    before = bits(stored).clone()
    view = stored.t() if transposed else stored  # a Conv1D's weight is seen through a transposed view
    keep = checkerboard(*view.shape)
    gone = removed_part(view, keep)
    assert torch.equal(bits(stored), before), "removed_part only looks"
    apply_mask(view, keep)
    expected, expected_gone = before.clone(), torch.zeros_like(before)
    for i in range(4):
        for j in range(6):
            if not (keep[j, i] if transposed else keep[i, j]):
                expected[i, j], expected_gone[i, j] = 0, before[i, j]
    assert torch.equal(bits(stored), expected)
    assert gone.dtype == dtype
    assert torch.equal(bits(gone), expected_gone.t() if transposed else expected_gone)


@pytest.mark.parametrize("dtype", WIDE)
def test_every_keep_and_no_keep(dtype: torch.dtype) -> None:
    weight = awkward(dtype)
    before = bits(weight).clone()
    apply_mask(weight, torch.ones(4, 6, dtype=torch.bool))
    assert torch.equal(bits(weight), before)
    apply_mask(weight, torch.zeros(4, 6, dtype=torch.bool))
    assert not bits(weight).any()


def test_a_row_slice_changes_nothing_around_it() -> None:
    whole = torch.randn(6, 4)
    before = whole.clone()
    apply_mask(whole[2:4], torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(whole[:2], before[:2])
    assert torch.equal(whole[4:], before[4:])
    assert not whole[2:4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_either_sign_count_and_subnormals_do_not(dtype: torch.dtype) -> None:
    values = awkward(dtype)
    expected = sum(1 for value in values.double().flatten().tolist() if value == 0)
    assert expected == 4
    assert count_zeros(values) == count_zeros(values.t()) == expected
    assert count_zeros(torch.zeros(3, 5, dtype=dtype)) == 15
    assert count_zeros(torch.empty(0, 5, dtype=dtype)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", WIDE)
def test_one_value_that_is_not_finite_is_seen_anywhere(dtype: torch.dtype, bad: float) -> None:
    # Large enough that a sum of the entries would overflow: finite all the same.
    values = torch.full((5, 37), torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    assert all_finite(values)
    assert all_finite(values.t())
    for place in ((0, 0), (2, 17), (4, 36)):
        spoilt = values.clone()
        spoilt[place] = bad
        assert not all_finite(spoilt)
        assert not all_finite(spoilt.t())


def test_what_has_no_entries_or_no_fractions_is_finite() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.tensor([True]))
