"""What the files of an exported folder will hold: a file of the source becomes one of the output, its weights packed or plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bits import any_bit
from .bitmask import header_of, pack_mask, pack_values, packed_bytes
from .reader import Reader, bytes_of
from .shard import Piece, shard_bytes


@dataclass(frozen=True)
class Sheet:
    """One file to be written: its pieces, and the weights that are packed in it, name -> rows, columns."""

    names: list[str]
    pieces: list[Piece]
    packed: dict[str, tuple[int, int]]

    @property
    def metadata(self) -> dict[str, str]:
        """What its header says besides."""
        return header_of(self.packed) if self.packed else {}

    @property
    def bytes(self) -> int:
        """Its size."""
        return shard_bytes(self.pieces, self.metadata)


@dataclass(frozen=True)
class _Part:
    """Mask or values of a stored weight, made a few rows at a time."""

    reader: Reader
    name: str
    make: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[memoryview]:
        for _, rows in self.reader.rows(self.name):
            yield bytes_of(self.make(rows))


def plain_sheets(reader: Reader) -> list[Sheet]:
    """A folder's files as they are written plain."""
    return [Sheet(names, [Piece.stored(name, reader) for name in names], {}) for names in _by_file(reader)]


def packed_sheets(reader: Reader) -> list[Sheet]:
    """A folder's files as they are written packed; what packing would not make smaller stays plain. Reads every matrix once."""
    sheets = []
    for names in _by_file(reader):
        pieces: list[Piece] = []
        packed: dict[str, tuple[int, int]] = {}
        for name in names:
            parts = _parts(reader, name)
            if parts:
                rows, columns = reader.entries[name].shape
                packed[name] = (rows, columns)
            pieces += parts or [Piece.stored(name, reader)]
        sheets.append(Sheet(names, pieces, packed))
    return sheets


def _parts(reader: Reader, name: str) -> list[Piece]:
    """Mask and values of a weight; nothing where it is no matrix, or packing does not pay."""
    entry = reader.entries[name]
    taken = f"{name}.mask" in reader.entries or f"{name}.values" in reader.entries
    if len(entry.shape) != 2 or taken:
        return []
    rows, columns = entry.shape
    kept = sum(int(torch.count_nonzero(any_bit(part))) for _, part in reader.rows(name))
    if packed_bytes(rows, columns, kept, entry.dtype.itemsize) >= entry.bytes:
        return []
    return [
        Piece(f"{name}.mask", (rows, -(-columns // 8)), torch.uint8, _Part(reader, name, pack_mask)),
        Piece(f"{name}.values", (kept,), entry.dtype, _Part(reader, name, pack_values)),
    ]


def _by_file(reader: Reader) -> list[list[str]]:
    return [sorted(name for name, entry in reader.entries.items() if entry.file == file) for file in reader.files]
