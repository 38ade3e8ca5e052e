"""Lazy reader over `*.safetensors`: what a folder holds is known from the headers, a tensor is read when asked for.

The safetensors library checks every file; the bytes are then read straight into a tensor's own memory. Its memory-mapped
tensors would count twice, once mapped and once copied, and memory of one block is what prunekit promises. Everything a damaged
or unsuitable folder can show is refused here, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError, StorageError
from .bitmask import INDEX_NAME as PACKED_INDEX_NAME
from .bitmask import packed_shapes, read_mask, unpack

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_CHUNK_BYTES = 4 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Mask:
    """That a tensor is stored packed: where the mask's bytes begin, and how many values it keeps."""

    offset: int
    kept: int


@dataclass(frozen=True)
class Entry:
    """Where a stored tensor lies and what it is; where it is packed (see `bitmask`), `offset` is that of the values it keeps."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    mask: Mask | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def bytes(self) -> int:
        """Size of the tensor; where it is packed, it takes less on disk."""
        return self.count * self.dtype.itemsize


class Reader:
    """A model folder opened for reading. Packed tensors are unpacked as they are read, so nobody above sees a difference.

    Attributes:
        folder: the folder.
        config: `config.json` as it stands.
        files: names of the safetensors files.
        index: name of the index file; one of a packed folder is another, which transformers does not know.
        entries: stored tensor name -> `Entry`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.index = _index_name(folder)
        self.files = _shard_names(folder, self.index)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self._read_header(file)
        self._check_index()

    def _read_header(self, file: str) -> None:
        for name, entry in read_header(self.folder, file).items():
            if name in self.entries:
                raise InputError(f"tensor '{name}' stands in both '{self.entries[name].file}' and '{file}'")
            self.entries[name] = entry

    def _check_index(self) -> None:
        listed = _index_map(self.folder, self.index)
        if listed is None:
            return
        for name, file in listed.items():
            if name not in self.entries:
                raise InputError(f"'{self.index}' promises tensor '{name}' in '{file}', which does not hold it")

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, torch.Tensor]:
        """The named tensors, in their stored dtype, in memory of their own; `pinned` memory goes to a CUDA device unwaited for."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        found = {}
        for file, wanted in by_file.items():
            with _opened(self.folder / file) as stream:
                for name in sorted(wanted, key=lambda name: self.entries[name].offset):
                    found[name] = _read_tensor(stream, self.entries[name], pinned=pinned)
        return found

    def read_packed(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mask [rows, ⌈columns / 8⌉] and values [kept] of a matrix as they are stored; None where it is stored plain."""
        entry = self.entries[name]
        if entry.mask is None:
            return None
        mask = torch.empty((entry.shape[0], -(-entry.shape[1] // 8)), dtype=torch.uint8)
        values = torch.empty(entry.mask.kept, dtype=entry.dtype)
        with _opened(self.folder / entry.file) as stream:
            for offset, part in ((entry.mask.offset, mask), (entry.offset, values)):
                stream.seek(offset)
                _fill(stream, bytes_of(part), entry)
        return mask, values

    def rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor a few rows at a time: (first row, [rows, ...]), in its stored dtype. What is too large to hold is read like this."""
        entry = self.entries[name]
        size = _rows_at_a_time(entry)
        with _opened(self.folder / entry.file) as stream:
            unpacker = None if entry.mask is None else _Unpacker(stream, entry, entry.mask)
            stream.seek(entry.offset)
            for start in range(0, entry.shape[0], size):
                part = torch.empty((min(size, entry.shape[0] - start), *entry.shape[1:]), dtype=entry.dtype)
                if unpacker is None:
                    _fill(stream, bytes_of(part), entry)
                else:
                    unpacker.fill(part)
                yield start, part

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, a few megabytes at a time; a chunk holds until the next is asked for."""
        entry = self.entries[name]
        if entry.mask is not None:
            yield from (bytes_of(part) for _, part in self.rows(name))
            return
        memory = memoryview(bytearray(min(entry.bytes, _CHUNK_BYTES)))
        with _opened(self.folder / entry.file) as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.bytes, _CHUNK_BYTES):
                part = memory[: min(_CHUNK_BYTES, entry.bytes - start)]
                _fill(stream, part, entry)
                yield part

    def sha256(self) -> dict[str, str]:
        """File name -> sha256 of every weight file and of the config."""
        return {file: sha256_file(self.folder / file) for file in ("config.json", *self.files)}


def read_header(folder: Path, file: str) -> dict[str, Entry]:
    """What one safetensors file holds, by tensor name. Raises `InputError` where it is damaged or cut short."""
    path = folder / file
    try:
        with safe_open(path, framework="pt"):  # the library's own check of the whole layout
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as problem:
        raise InputError(f"'{path}' is not a whole safetensors file ({problem}): copy or download it again") from None
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, part in header.items():
        if part["dtype"] not in DTYPES:
            raise InputError(
                f"tensor '{name}' in '{path}' is stored as {part['dtype']}: prunekit reads unquantised checkpoints; take the "
                "model's float version"
            )
        offset = 8 + length + part["data_offsets"][0]
        found[name] = Entry(file, tuple(part["shape"]), DTYPES[part["dtype"]], offset)
    for name, (rows, columns) in packed_shapes(path, metadata).items():
        mask, values = found.pop(f"{name}.mask", None), found.pop(f"{name}.values", None)
        wanted = ((rows, -(-columns // 8)), torch.uint8)
        if (
            mask is None
            or values is None
            or (mask.shape, mask.dtype) != wanted
            or len(values.shape) != 1
            or name in found
        ):
            raise InputError(f"'{path}' does not hold the mask and the values of '{name}' that its header promises")
        found[name] = Entry(file, (rows, columns), values.dtype, values.offset, Mask(mask.offset, values.count))
    return found


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file, in memory of their own."""
    with _opened(path) as stream:
        return {name: _read_tensor(stream, entry) for name, entry in read_header(path.parent, path.name).items()}


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A file for reading, unbuffered. Raises `StorageError` where the system refuses, then or later."""
    try:
        with path.open("rb", buffering=0) as stream:
            yield stream
    except OSError as problem:
        raise StorageError(f"cannot read '{path}': {problem.strerror or problem}") from problem


def _read_tensor(stream: FileIO, entry: Entry, *, pinned: bool = False) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, pin_memory=pinned)
    if entry.mask is not None:
        unpacker = _Unpacker(stream, entry, entry.mask)
        for part in torch.split(tensor, _rows_at_a_time(entry)):
            unpacker.fill(part)
        return tensor
    stream.seek(entry.offset)
    _fill(stream, bytes_of(tensor), entry)
    return tensor


def _rows_at_a_time(entry: Entry) -> int:
    return max(1, _CHUNK_BYTES * entry.shape[0] // max(1, entry.bytes))


class _Unpacker:
    """Reads a packed tensor from its first row to its last, as many rows at a time as it is asked for."""

    def __init__(self, stream: FileIO, entry: Entry, mask: Mask) -> None:
        self._stream = stream
        self._entry = entry
        self._mask_at = mask.offset
        self._values_at = entry.offset
        self._left = mask.kept  # values
        self._rows_left = entry.shape[0]

    def fill(self, part: torch.Tensor) -> None:
        """Fill the next rows, `part` [rows, columns]. Raises `InputError` where mask and values do not belong together."""
        entry = self._entry
        rows, columns = part.shape
        mask = torch.empty((rows, -(-columns // 8)), dtype=torch.uint8)
        self._stream.seek(self._mask_at)
        _fill(self._stream, bytes_of(mask), entry)
        keep = read_mask(mask, columns)
        kept = int(torch.count_nonzero(keep))
        self._mask_at += mask.numel()
        self._rows_left -= rows
        self._left -= kept
        if self._left < 0 or (self._left and not self._rows_left):
            raise InputError(
                f"'{entry.file}' is damaged: a mask in it has another number of bits than there are values"
            )
        values = torch.empty(kept, dtype=entry.dtype)
        self._stream.seek(self._values_at)
        _fill(self._stream, bytes_of(values), entry)
        self._values_at += kept * entry.dtype.itemsize
        unpack(part, keep, values)


def _fill(stream: FileIO, memory: memoryview, entry: Entry) -> None:
    done = 0
    while done < len(memory):  # one read call gives at most 2 GiB
        got = stream.readinto(memory[done:])
        if not got:
            raise StorageError(f"'{entry.file}' ended while it was read: is another program changing it?")
        done += got


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous processor tensor's own memory, as bytes; nothing is copied."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in chunks. Raises `StorageError`."""
    digest = hashlib.sha256()
    with _opened(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_no_folder(folder: Path) -> None:
    """Raise `InputError` where a model's folder is none."""
    if not folder.exists():
        raise InputError(f"model folder '{folder}' does not exist")
    if not folder.is_dir():
        raise InputError(f"model '{folder}' is a file: name the folder that holds its config.json")


def _read_config(folder: Path) -> dict[str, Any]:
    refuse_no_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"'{folder}' has no config.json: it is not a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise InputError(f"'{path}' cannot be read as JSON: {problem}") from None
    if not isinstance(config, dict):
        raise InputError(f"'{path}' does not hold a JSON object")
    if config.get("quantization_config") is not None:
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise InputError(
            f"'{folder}' is quantised ({method}): prunekit prunes float weights; prune the float model, then quantise"
        )
    return config


def _index_name(folder: Path) -> str:
    plain = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return PACKED_INDEX_NAME if not plain and (folder / PACKED_INDEX_NAME).is_file() else INDEX_NAME


def _index_map(folder: Path, index: str) -> dict[str, str] | None:
    """`weight_map` of the index, checked; None where there is no index (or a single file makes it moot, as transformers has it)."""
    path = folder / index
    if not path.is_file() or (folder / SINGLE_NAME).is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in listed.values()):
            raise TypeError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise InputError(f"'{path}' is not a safetensors index: {problem}") from None
    for file in set(listed.values()):
        inside = PurePosixPath(file)
        if inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"'{path}' points outside the folder, at '{file}': refused")
        if not (folder / file).is_file():
            raise InputError(f"'{path}' names '{file}', which is missing from the folder: download it again")
    return dict(listed)


def _shard_names(folder: Path, index: str) -> list[str]:
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    listed = _index_map(folder, index)
    if listed is not None:
        return sorted(set(listed.values()))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"'{folder}' holds only pickled weights ('{pickled[0]}'), which can run code when loaded: convert them with "
            "`from_pretrained(...).save_pretrained(...)` in transformers, which writes safetensors"
        )
    raise InputError(f"'{folder}' holds neither '{SINGLE_NAME}' nor '{INDEX_NAME}'")
