"""The packed form of a weight with zeros: a bit for every entry, then the entries that are not +0. Byte by byte in docs/bitmask.md.

A -0 is an entry like any other, because its sign is a bit: what is unpacked is what was packed, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..bits import any_bit
from ..errors import InputError

# not the name that transformers looks for: it would load the masks as unknown tensors and make up the weights
INDEX_NAME = "bitmask.safetensors.index.json"
VERSION = 1
_KEY = "prunekit.bitmask"


def pack_mask(weight: Tensor) -> Tensor:
    """The mask of a weight [rows, columns]: uint8 [rows, ⌈columns / 8⌉], the lowest bit of a byte first, each row padded with zeros."""
    return torch.from_numpy(np.packbits(any_bit(weight).numpy(), axis=1, bitorder="little"))


def pack_values(weight: Tensor) -> Tensor:
    """The entries of a weight [rows, columns] that have any bit set, row by row: [kept]."""
    return weight[any_bit(weight)]


def read_mask(mask: Tensor, columns: int) -> Tensor:
    """The bits of a mask [rows, ⌈columns / 8⌉] as bool [rows, columns]."""
    bits = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def unpack(weight: Tensor, keep: Tensor, values: Tensor) -> None:
    """Fill a weight [rows, columns] from its mask (bool, same shape) and its values [kept], of its dtype."""
    weight.zero_().masked_scatter_(keep, values)


def packed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """What mask and values of a weight take."""
    return rows * -(-columns // 8) + kept * itemsize


def header_of(packed: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """What the header of a safetensors file says of the weights that are packed in it: name -> rows, columns."""
    return {_KEY: json.dumps({"version": VERSION, "packed": {name: list(shape) for name, shape in packed.items()}})}


def packed_shapes(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """The same, read from a file's header; empty where nothing is packed. Raises `InputError`."""
    if _KEY not in metadata:
        return {}
    try:
        said = json.loads(metadata[_KEY])
        version = said["version"]
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in said["packed"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(f"'{path}' does not say in its header what is packed in it: {problem!r}") from None
    if version != VERSION:
        raise InputError(
            f"'{path}' is packed in version {version}, this prunekit reads {VERSION}: use the one that wrote it"
        )
    return shapes
