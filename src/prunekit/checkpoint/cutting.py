"""A model folder of whose tensors only some entries are read: what it would hold if the others had been left out of its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .reader import Reader, bytes_of

# stored name -> axis -> the entries along it that are read, ascending, [kept] int64
Cuts = Mapping[str, Mapping[int, Tensor]]


class CutReader(Reader):
    """A reader of another one's folder that leaves out what `cuts` do not name; tensors they say nothing of are read whole.

    One tensor is in memory whole at a time, or a few rows of it. `config` is what config.json would be.
    """

    def __init__(self, whole: Reader, config: dict[str, Any], cuts: Cuts) -> None:
        self._whole, self._cuts = whole, cuts
        self.folder, self.files, self.index, self.config = whole.folder, whole.files, whole.index, config
        self.entries = {
            name: replace(entry, shape=self._shape(name, entry.shape), mask=None) if name in cuts else entry
            for name, entry in whole.entries.items()
        }

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(len(self._cuts[name].get(axis, range(size))) for axis, size in enumerate(shape))

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """The named tensors, in their stored dtype, in memory of their own; `pinned` memory goes to a CUDA device unwaited for."""
        found = {}
        for name in names:
            tensor = self._whole.read([name], pinned=pinned and name not in self._cuts)[name]
            for axis, kept in self._cuts.get(name, {}).items():
                tensor = tensor.index_select(axis, kept)
            found[name] = tensor.pin_memory() if pinned and name in self._cuts else tensor
        return found

    def read_packed(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Mask and values as they are stored; None for a tensor that is cut, of which nothing is stored like that."""
        return None if name in self._cuts else self._whole.read_packed(name)

    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor a few rows at a time: (first row, [rows, ...]), both as they are when it is cut."""
        cuts, done = self._cuts.get(name, {}), 0
        for start, part in self._whole.rows(name):
            for axis, kept in cuts.items():
                here = kept[(kept >= start) & (kept < start + len(part))] - start if axis == 0 else kept
                part = part.index_select(axis, here)
            yield done, part
            done += len(part)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, a few megabytes at a time; a chunk holds until the next is asked for."""
        if name in self._cuts:
            yield from (bytes_of(part) for _, part in self.rows(name))
        else:
            yield from self._whole.chunks(name)
