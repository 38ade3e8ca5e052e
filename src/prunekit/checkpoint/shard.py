"""Writing one safetensors file as a stream, hashed on its way out.

The library's own writer wants every tensor in memory, and its file must be read again to be hashed. What lies outside the blocks
(an embedding and a head of a large vocabulary) may be larger than any block; here it goes from file to file in chunks. The bytes
are those the library writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .reader import DTYPES, Reader, bytes_of
from .storage import replace_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the library lays tensors of larger elements first, and among equals goes by this order and by name
_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
_PIECE = 1 << 20  # bytes written and hashed at a time, while they are in cache


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written: what it is, and its bytes in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Iterable[memoryview]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        """A tensor that is in memory."""
        return cls(name, tuple(tensor.shape), tensor.dtype, [bytes_of(tensor.contiguous().cpu())])

    @classmethod
    def stored(cls, name: str, reader: Reader) -> Piece:
        """A tensor of another file, read a chunk at a time when its turn comes."""
        entry = reader.entries[name]
        return cls(name, entry.shape, entry.dtype, _Lazily(reader, name))


@dataclass(frozen=True)
class _Lazily:
    reader: Reader
    name: str

    def __iter__(self) -> Iterator[memoryview]:
        return self.reader.chunks(self.name)


def write_shard(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file durably, `metadata` in its header, and return its sha256. Raises `StorageError`."""
    ordered = _ordered(pieces)
    digest = hashlib.sha256()
    replace_file(path, partial(_fill, header=_header(ordered, metadata or {}), pieces=ordered, digest=digest))
    return digest.hexdigest()


def shard_bytes(pieces: Iterable[Piece], metadata: Mapping[str, str] | None = None) -> int:
    """How large a file `write_shard` would write."""
    ordered = _ordered(pieces)
    return len(_header(ordered, metadata or {})) + sum(piece.bytes for piece in ordered)


def _ordered(pieces: Iterable[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: (-_ORDER.index(_NAMES[piece.dtype]), piece.name))


def _fill(path: Path, *, header: bytes, pieces: list[Piece], digest: hashlib._Hash) -> None:
    with path.open("wb", buffering=0) as stream:
        for chunk in chain([memoryview(header)], *(piece.chunks for piece in pieces)):
            for start in range(0, len(chunk), _PIECE):
                part = chunk[start : start + _PIECE]
                digest.update(part)
                while part:  # an unbuffered stream may take less than it is given
                    part = part[stream.write(part) :]


def _header(pieces: list[Piece], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for piece in pieces:
        end = offset + piece.bytes
        table[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
