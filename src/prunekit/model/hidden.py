"""Hidden states of all windows between two blocks: the one buffer that grows with the calibration.

They lie in memory, or, where they would not fit, in two files that take turns: one holds a block's inputs while its outputs fill the
other. Files are read and written a batch at a time instead of being mapped: mapped pages count as the process's own memory, and
the system's page cache serves plain reads as fast while there is room.

`save` and `load` use the same files and the same layout for both: window w of the whole run lies at w times a window's bytes, so
processes that share the windows out share the file, and a run may be continued by another number of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.reader import bytes_of
from ..checkpoint.writer import HIDDEN_PREFIX
from ..errors import StorageError
from ..machine import available_memory_bytes

_PIECE = 1 << 20  # bytes written and hashed at a time, while they are in cache


@dataclass(frozen=True)
class Place:
    """Where the hidden states of a run are kept: the inputs of even blocks in one file, of odd blocks in the other.

    Files are written over, not made anew: a torn one shows by its hash, and pages the system already holds are written
    many times as fast. `first` is the first of the windows that are ours, counted over the whole run.
    """

    folder: Path
    first: int = 0

    def file(self, index: int) -> Path:
        """The file with the inputs of block `index`."""
        return self.folder / f"{HIDDEN_PREFIX}{index % 2}"


@dataclass(frozen=True)
class Scratch:
    """Where hidden states beside those of a run go, such as the targets of tuning, which nobody resumes from.

    Attributes:
        most: bytes that each of them may take in memory; None where only what is free sets a limit.
        folder: holds the files of those that take more; None for the system's folder of temporary files.
    """

    most: int | None = None
    folder: Path | None = None

    def bytes_for(self, most: int | None = None) -> int:
        """Bytes that hidden states for the time being may take in memory: half of what is free, and no more than was asked."""
        limits = (available_memory_bytes() // 2, self.most, most)
        return min(limit for limit in limits if limit is not None)

    @contextmanager
    def room_for(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, most: int | None = None
    ) -> Iterator[HiddenStates]:
        """Hidden states for the time being: in memory where they and `most` bytes allow, or in files that go at the end.

        The files lie in a folder whose name says that it is left over where we are killed.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        with ExitStack() as stack:
            hidden: HiddenStates
            if size <= self.bytes_for(most):
                hidden = InMemory(shape, dtype, device)
            else:
                folder = Path(gettempdir()) if self.folder is None else self.folder
                hidden = InFiles(shape, dtype, Place(stack.enter_context(_own_folder(folder))))
            stack.callback(hidden.close)
            yield hidden


class HiddenStates(Protocol):
    """[windows, length, hidden], read and written a batch of windows at a time.

    What is written is read only after `turn`. Attributes: shape, dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, batch: slice) -> Tensor:
        """The present block's inputs, on the processor."""

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        """The next block's inputs; their windows' present ones must not be read after this."""

    def turn(self) -> None:
        """The next block becomes the present one."""

    def save(self, place: Place) -> dict[str, Any]:
        """Make the present inputs durable in their file; returns `{start, stop, sha256}`."""

    def load(self, place: Place, index: int) -> None:
        """Take the inputs of block `index` from their file."""

    def beside(self, first: int) -> HiddenStates:
        """Room of the same kind for as many others; in files from window `first` on."""

    def close(self) -> None:
        """Give the memory back; files are left to their owner."""


class InMemory:
    """Hidden states in one tensor, written in place; in memory a CUDA device can fetch from by itself, where one is used."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.shape = shape
        self.dtype = dtype
        self._index = -1  # the first block's inputs are written like any other block's outputs
        pinned = device is not None and device.type == "cuda"
        self._tensor: Tensor | None = torch.empty(shape, dtype=dtype, pin_memory=pinned)

    @property
    def tensor(self) -> Tensor:
        """All of them."""
        assert self._tensor is not None, "the walk is over"
        return self._tensor

    def __getitem__(self, batch: slice) -> Tensor:
        return self.tensor[batch]

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        self.tensor[batch].copy_(value)

    def turn(self) -> None:
        """Nothing moves; a block has passed."""
        self._index += 1

    def save(self, place: Place) -> dict[str, Any]:
        """Write them out."""
        memory = bytes_of(self.tensor)
        digest = hashlib.sha256()
        with _opened(place.file(self._index)) as stream:
            stream.seek(place.first * (len(memory) // self.shape[0]))
            for start in range(0, len(memory), _PIECE):
                part = memory[start : start + _PIECE]
                digest.update(part)
                _write(stream, part)
            os.fsync(stream.fileno())
        return _part(place, self.shape[0], digest)

    def load(self, place: Place, index: int) -> None:
        """Read them in."""
        self._index = index
        memory = bytes_of(self.tensor)
        with _opened(place.file(index)) as stream:
            stream.seek(place.first * (len(memory) // self.shape[0]))
            _read(stream, memory)

    def beside(self, first: int) -> InMemory:
        """Another tensor like this one."""
        return InMemory(self.shape, self.dtype, torch.device("cuda") if self.tensor.is_pinned() else None)

    def close(self) -> None:
        """Drop the tensor."""
        self._tensor = None


class InFiles:
    """Hidden states in two files that take turns. Raises `StorageError` where the disk refuses."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> None:
        self.shape = shape
        self.dtype = dtype
        self._place = place
        self._window = torch.Size(shape[1:]).numel() * dtype.itemsize
        self._index = -1
        self._streams: dict[int, FileIO] = {}

    def _stream(self, index: int, window: int) -> FileIO:
        """The file with the inputs of block `index`, at one of our windows."""
        if index % 2 not in self._streams:
            self._streams[index % 2] = _open(self._place.file(index))
        stream = self._streams[index % 2]
        stream.seek((self._place.first + window) * self._window)
        return stream

    def __getitem__(self, batch: slice) -> Tensor:
        start, stop, _ = batch.indices(self.shape[0])
        tensor = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        _read(self._stream(self._index, start), bytes_of(tensor))
        return tensor

    def __setitem__(self, batch: slice, value: Tensor) -> None:
        start = batch.indices(self.shape[0])[0]
        memory = bytes_of(value.to(device="cpu", dtype=self.dtype).contiguous())
        _write(self._stream(self._index + 1, start), memory)

    def turn(self) -> None:
        """The file that was written is read from now on."""
        self._index += 1

    def save(self, place: Place) -> dict[str, Any]:
        """Make the file that is read durable."""
        digest = hashlib.sha256()
        with _opened(place.file(self._index)) as stream:
            os.fsync(stream.fileno())
            _hash_range(digest, stream, place.first * self._window, self.shape[0] * self._window)
        return _part(place, self.shape[0], digest)

    def load(self, place: Place, index: int) -> None:
        """Read from that file from now on."""
        self._index = index

    def beside(self, first: int) -> InFiles:
        """More windows in the same files."""
        return InFiles(self.shape, self.dtype, Place(self._place.folder, first))

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A folder in `folder` for the time being, by the first number that is free: the same in every run, another for every process."""
    for number in count():
        place = folder / f"{HIDDEN_PREFIX}beside-{number}"
        try:
            place.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
        except OSError as problem:
            raise StorageError(f"cannot make '{place}': {problem.strerror}") from problem
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)  # where the disk refuses that, it is left over


def is_whole(path: Path, parts: list[dict[str, Any]], window: int) -> bool:
    """Whether a file holds what `save` noted of it; `window` is the bytes of a window."""
    if not path.is_file():
        return False
    size = path.stat().st_size
    with _opened(path) as stream:
        for part in parts:
            digest = hashlib.sha256()
            if size < part["stop"] * window:
                return False
            _hash_range(digest, stream, part["start"] * window, (part["stop"] - part["start"]) * window)
            if digest.hexdigest() != part["sha256"]:
                return False
    return True


def _part(place: Place, windows: int, digest: hashlib._Hash) -> dict[str, Any]:
    return {"start": place.first, "stop": place.first + windows, "sha256": digest.hexdigest()}


def _open(path: Path) -> FileIO:
    try:
        path.touch()
        return path.open("r+b", buffering=0)
    except OSError as problem:
        raise StorageError(f"cannot open '{path}': {problem.strerror}") from problem


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    stream = _open(path)
    try:
        yield stream
    except OSError as problem:
        raise StorageError(f"cannot keep the hidden states in '{path}': {problem.strerror}") from problem
    finally:
        stream.close()


def _write(stream: FileIO, memory: memoryview) -> None:
    try:
        while memory:
            memory = memory[stream.write(memory) :]
    except OSError as problem:
        raise StorageError(f"cannot keep the hidden states in '{stream.name}': {problem.strerror}") from problem


def _read(stream: FileIO, memory: memoryview) -> None:
    while memory:
        try:
            done = stream.readinto(memory)
        except OSError as problem:
            raise StorageError(f"cannot read hidden states from '{stream.name}': {problem.strerror}") from problem
        if not done:
            raise StorageError(f"'{stream.name}' ended while it was read: is another program changing it?")
        memory = memory[done:]


def _hash_range(digest: hashlib._Hash, stream: FileIO, offset: int, size: int) -> None:
    memory = memoryview(bytearray(min(size, _PIECE)))
    stream.seek(offset)
    for start in range(0, size, _PIECE):
        part = memory[: min(_PIECE, size - start)]
        _read(stream, part)
        digest.update(part)
