"""Zeroing and counting on the bits of weights.

A keep-mask applied to a float's bits leaves kept weights untouched to the last bit and writes +0 elsewhere; on a processor it is
also an order of magnitude faster than `masked_fill` on bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix about a million entries at a time: few enough that what is made of them stays in cache."""
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def apply_mask(weight: Tensor, keep: Tensor) -> None:
    """Zero, in place, the entries of `weight` [rows, columns] where `keep` (same shape, bool) is False."""
    bits = _bits(weight)
    for rows in row_chunks(*weight.shape):
        bits[rows].mul_(keep[rows])


def removed_part(weight: Tensor, keep: Tensor) -> Tensor:
    """A new tensor with what `apply_mask` would take away, and zeros where `keep` is True."""
    return (_bits(weight) * ~keep).view(weight.dtype)


def count_zeros(weight: Tensor) -> int:
    """Number of entries of a matrix equal to 0, of either sign."""
    bits = _bits(weight)
    magnitude = torch.iinfo(bits.dtype).max
    return sum(
        bits[rows].numel() - int(torch.count_nonzero(bits[rows] & magnitude)) for rows in row_chunks(*weight.shape)
    )


def any_bit(weight: Tensor) -> Tensor:
    """Where any bit of an entry is set, as a bool tensor: everything but +0. The sign of a -0 is a bit."""
    return _bits(weight) != 0


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; one pass, no copies."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGER[tensor.dtype.itemsize])
