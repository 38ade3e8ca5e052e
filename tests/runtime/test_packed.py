"""Weights in memory: packed and unpacked bit for bit; parts that do not belong together are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekit
from prunekit.checkpoint.bitmask import pack_mask, pack_values
from prunekit.runtime.kernels import available, kernels_called
from prunekit.runtime.packed import PADDING, Packed

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", available())
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_any_bits_come_back(name: str, dtype: torch.dtype, rows: int, columns: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    bits = torch.randint(
        limits.min, limits.max, (rows, columns), dtype=integer
    )  # NaN, -0 and subnormal ones among them
    bits[torch.rand(rows, columns) >= density] = 0
    packed = Packed.of(bits.view(dtype))
    begin = rows // 3
    out = torch.empty((rows - begin, columns), dtype=dtype)
    kernels_called(name).expand(packed, begin, out)
    assert torch.equal(out.view(integer), bits[begin:])
    assert packed.values.numel() == int((bits != 0).sum()) + PADDING
    assert packed.mask.shape == (rows, 8 * -(-columns // 64))


def test_a_negative_zero_is_kept() -> None:
    packed = Packed.of(torch.tensor([[0.0, -0.0, 1.0]]))
    assert packed.offsets.tolist() == [0, 2]


def test_a_view_is_packed_like_its_copy() -> None:
    weight = torch.randn(9, 21).relu()
    assert torch.equal(Packed.of(weight.t()).values, Packed.of(weight.t().contiguous()).values)


WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
MASK, VALUES = pack_mask(WEIGHT), pack_values(WEIGHT)


@pytest.mark.parametrize(
    ("mask", "values", "columns", "message"),
    [
        (MASK, VALUES[:-1], 3, r"'w' is damaged: its mask has 3 ones and there are 2 values"),
        (MASK, torch.cat([VALUES, VALUES]), 3, r"its mask has 3 ones and there are 6 values"),
        (MASK | 8, VALUES, 3, r"its mask has ones behind column 3"),
        (MASK, VALUES, 9, r"a mask \[2, 1\] and values \[3\] are none of 9 columns"),
        (MASK[0], VALUES, 3, r"are none of 3 columns"),
        (MASK.int(), VALUES, 3, r"are none of 3 columns"),
        (MASK, VALUES[None], 3, r"are none of 3 columns"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    mask: torch.Tensor, values: torch.Tensor, columns: int, message: str
) -> None:
    with pytest.raises(prunekit.InputError, match=message):
        Packed.of_parts(mask, values, columns, "w")
