"""What a run has done, made durable in an order that a kill at any moment cannot break.

A thread of its own writes, so that the next block is computed meanwhile. Per block:

1. the shard is written, synced and renamed; then the journal notes it with its hash;
2. the windows' hidden states behind the block are written and synced; then the journal notes them with their hashes.

The walk waits for 1 before it measures the next block and for 2 before it overwrites hidden states. The inputs of the last finished
block stay until the outputs of the next one are written over them, so whatever of this is found torn, one block is all that is
done again.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .checkpoint.shard import Piece
from .checkpoint.writer import Journal, Writer
from .distributed import Ranks
from .model.hidden import HiddenStates, Place, is_whole

States = list[tuple[HiddenStates, Place]]


class Keeper:
    """Makes shards and hidden states durable in the background. Use as a context; leaving it waits for the write under way."""

    def __init__(self, writer: Writer, journal: Journal, ranks: Ranks) -> None:
        self._writer = writer
        self._journal = journal
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunekit-write")
        self._shard: Future[None] | None = None
        self._hidden: tuple[int, Future[list[dict[str, Any]]]] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def shard(
        self, position: int, pieces: Iterable[Piece], linears: list[dict[str, Any]], noted: dict[str, Any]
    ) -> None:
        """Begin to write a shard and to note it, in the first process; the others have nothing to write."""
        if self._ranks.first:
            self._shard = self._thread.submit(self._write_shard, position, pieces, linears, noted)

    def _write_shard(
        self, position: int, pieces: Iterable[Piece], linears: list[dict[str, Any]], noted: dict[str, Any]
    ) -> None:
        self._journal.add(self._writer.write_shard(position, pieces), linears, noted)

    def hidden(self, index: int, states: States) -> None:
        """Begin to save the inputs of block `index`."""
        self._hidden = index, self._thread.submit(_save, states)

    def settle(self) -> None:
        """Wait until everything begun is durable and noted. Raises what went wrong with it."""
        with self._ranks.together():
            if self._shard is not None:
                shard, self._shard = self._shard, None
                shard.result()
        if self._hidden is not None:
            (index, saving), self._hidden = self._hidden, None
            parts: list[dict[str, Any]] = []
            with self._ranks.together():
                parts = saving.result()
            everywhere = [part for own in self._ranks.gather(parts) for part in own]
            self._ranks.share(lambda: self._journal.note_hidden(index, everywhere))


def _save(states: States) -> list[dict[str, Any]]:
    return [hidden.save(place) for hidden, place in states]


def saved_blocks(journal: Journal, window: int) -> list[int]:
    """The blocks whose inputs lie whole on disk; `window` is the bytes of a window's hidden states."""
    place = Place(journal.path.parent)
    return [note["block"] for note in journal.hidden if is_whole(place.file(note["block"]), note["parts"], window)]
