"""What tests of searches have in common: objectives that count and die, runs that are killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Counted:
    """An objective that notes what it is asked, and may die.

    Attributes:
        asked: every candidate with the first window it was measured on, and the one behind the last.
    """

    def __init__(self, loss: Callable[[Any, int], float], dies_after: int = 10**9) -> None:
        self.asked: list[tuple[Any, int, int]] = []
        self._loss = loss
        self._left = dies_after

    def __call__(self, candidates: Sequence[Any], windows: slice) -> Iterator[list[float]]:
        for candidate in candidates:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            self.asked.append((candidate, windows.start, windows.stop))
            yield [self._loss(candidate, window) for window in range(windows.start, windows.stop)]


@contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every call of `owner.name` meanwhile."""
    real, seen = getattr(owner, name), []

    def noting(*given: Any) -> Any:
        seen.append(given)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, noting)
        yield seen


@contextmanager
def killed_after(calls: int, owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """What goes on meanwhile is ended when it calls `owner.name` once more than that; yields the arguments of the calls before."""
    with calls_of(owner, name) as seen:
        real = getattr(owner, name)

        def dying(*given: Any) -> Any:
            if len(seen) == calls:
                raise KeyboardInterrupt
            return real(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(KeyboardInterrupt):
                yield seen


def search_in(folder: Path) -> dict[str, Any]:
    """What the manifest of a finished run says of its search."""
    found: dict[str, Any] = json.loads((folder / "prunekit.json").read_text())["search"]
    return found
