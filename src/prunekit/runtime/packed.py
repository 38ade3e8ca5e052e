"""A packed weight in memory: the bitmask format's mask and values (docs/bitmask.md), laid out for the kernels.

Three things differ from the file: rows of the mask are filled up to whole words of 64 bits, the place of every row's first value is
there, and behind the last value there is room that may be read.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..bits import row_chunks
from ..checkpoint.bitmask import pack_mask, pack_values
from ..errors import InputError

WORD = 64
PADDING = 32  # values; whole vectors are read, of 64 bytes at most
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class Packed(NamedTuple):
    """A weight [rows, columns].

    Shapes: mask uint8 [rows, 8 · ⌈columns / 64⌉]; values [kept + PADDING], of the weight's dtype; offsets int64 [rows + 1].
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    columns: int

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """Pack a weight [rows, columns]; bit for bit, a -0 included."""
        return cls.of_parts(*pack(weight), weight.shape[1], "a weight in memory")

    @classmethod
    def of_parts(cls, mask: Tensor, values: Tensor, columns: int, name: str) -> Packed:
        """From the mask [rows, ⌈columns / 8⌉] and the values [kept] of a file; `name` is for messages.

        Raises `InputError` where they do not belong together: kernels trust them blindly.
        """
        width = -(-columns // 8)
        if mask.dtype != torch.uint8 or mask.ndim != 2 or mask.shape[1] != width or values.ndim != 1:
            _refuse(name, f"a mask {list(mask.shape)} and values {list(values.shape)} are none of {columns} columns")
        if columns % 8 and bool((mask[:, -1] >> (columns % 8)).any()):
            _refuse(name, f"its mask has ones behind column {columns}")
        ones = torch.from_numpy(_ONES[mask.numpy()].sum(axis=1, dtype=np.int64))
        offsets = nn.functional.pad(ones.cumsum(0), (1, 0))
        if int(offsets[-1]) != len(values):
            _refuse(name, f"its mask has {int(offsets[-1])} ones and there are {len(values)} values")
        padded = nn.functional.pad(mask, (0, 8 * words_of(columns) - width))
        return cls(padded.contiguous(), torch.cat([values, values.new_zeros(PADDING)]), offsets, columns)

    @property
    def rows(self) -> int:
        """Output features."""
        return self.offsets.shape[0] - 1

    def check(self) -> None:
        """Raise `InputError` where these tensors cannot be what `of_parts` gives; whether the mask is right is not looked at."""
        sizes = (self.mask.shape, self.values.ndim, self.offsets.ndim)
        wanted = ((self.rows, 8 * words_of(self.columns)), 1, 1)
        kinds = (self.mask.dtype, self.offsets.dtype) == (torch.uint8, torch.int64)
        whole = all(tensor.is_contiguous() for tensor in (self.mask, self.values, self.offsets))
        if sizes != wanted or not kinds or not whole or int(self.offsets[-1]) + PADDING != len(self.values):
            _refuse(
                "given to an operator", f"mask, values and offsets are none of a weight with {self.columns} columns"
            )


def words_of(columns: int) -> int:
    """Words of mask in a row."""
    return -(-columns // WORD)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mask [rows, ⌈columns / 8⌉] and values [kept] of a weight [rows, columns].

    Some rows at a time: while it picks values torch takes 16 bytes for each.
    """
    weight = weight.contiguous()
    parts = [weight[rows] for rows in row_chunks(*weight.shape)]
    return torch.cat([pack_mask(part) for part in parts]), torch.cat([pack_values(part) for part in parts])


def _refuse(name: str, reason: str) -> NoReturn:
    raise InputError(f"packed weight '{name}' is damaged: {reason}; copy or export the folder again")
