"""The one loop of every search: what is proposed is judged, and what was judged decides what is proposed next.

Proposals are a generator. It yields lists of candidates, which are plain data, and is sent the value of each: less is better, and
infinite is what was given up. A proposer draws from generators that are made anew of the seed and of how far it is, never from the
state of one, so that going on means beginning again: what the history knows is not measured a second time, and leads to the same
proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .history import History, key_of

Proposals = Generator[list[Any], list[float], None]


class Objective(Protocol):
    """Measures candidates on some of the windows."""

    def __call__(self, candidates: Sequence[Any], windows: slice) -> Iterator[list[float]]:
        """The losses of each candidate in turn, a number a window."""


class Judge:
    """Gives candidates their values, the mean of their losses, and measures none twice.

    All are measured on the first `rungs[0]` windows, the better `share` of them on those up to `rungs[1]`, and so on; the last number
    is that of all windows. What falls behind on the way is given up, and may be taken up again when it is proposed later; only the
    first candidate of all is not, because the others are held against it.

    Attributes:
        measured, given_up, known: how many candidates were measured on all windows, fell behind, or had been measured before.
        windows: how many windows were sent through the model.
    """

    def __init__(
        self, objective: Objective, history: History, rungs: Sequence[int], *, share: float = 0.5, least: int = 1
    ) -> None:
        self._objective = objective
        self._history = history
        self._rungs = list(rungs)
        self._share = share
        self._least = least
        self._spared: str | None = None
        self.measured = self.given_up = self.known = self.windows = 0

    def __call__(self, candidates: Sequence[Any]) -> list[float]:
        """The value of every candidate; infinite for those that fell behind."""
        distinct = {key_of(candidate): candidate for candidate in candidates}
        self.known += sum(len(self._history.losses(each)) >= self._rungs[-1] for each in distinct.values())
        running = list(distinct)
        if self._spared is None and running:
            self._spared = running[0]
        values: dict[str, float] = {}
        for rung, stop in enumerate(self._rungs):
            self._measure([distinct[key] for key in running], stop)
            values = {key: _mean(self._history.losses(distinct[key])[:stop]) for key in running}
            if rung < len(self._rungs) - 1:
                order = sorted((key for key in running if key != self._spared), key=lambda key: (values[key], key))
                ahead = order[: max(self._least, math.ceil(self._share * len(order)))]
                running = [key for key in running if key == self._spared] + ahead
        self.given_up += len(distinct) - len(running)
        return [
            values.get(key_of(candidate), math.inf) if key_of(candidate) in running else math.inf
            for candidate in candidates
        ]

    def _measure(self, candidates: Sequence[Any], stop: int) -> None:
        """Let the history know of all these the losses up to a window."""
        by_start: dict[int, list[Any]] = {}
        for candidate in candidates:
            start = len(self._history.losses(candidate))
            if start < stop:
                by_start.setdefault(start, []).append(candidate)
        for start, some in by_start.items():
            for candidate, losses in zip(some, self._objective(some, slice(start, stop)), strict=True):
                self._history.add(candidate, losses)
                self.windows += stop - start
                self.measured += stop == self._rungs[-1]


@dataclass
class Found:
    """What a search came to.

    Attributes:
        best, value: the candidate with the least value, the first of equals.
        first, first_value: the candidate that was proposed first, which a proposer makes the one that needs no search.
        course: (how many were proposed when it was judged, value) of every candidate that was judged on all windows.
        proposed: how many there were.
    """

    best: Any = None
    value: float = math.inf
    first: Any = None
    first_value: float = math.inf
    course: list[tuple[int, float]] = field(default_factory=list)
    proposed: int = 0


def search(proposals: Proposals, judge: Judge, step: Callable[[float], None] = lambda best: None) -> Found:
    """Judge everything that is proposed. `step` is told the least value so far, once for every candidate."""
    found = Found()
    try:
        batch = next(proposals)
        while True:
            values = judge(batch)
            for candidate, value in zip(batch, values, strict=True):
                found.proposed += 1
                if found.proposed == 1:
                    found.first, found.first_value = candidate, value
                if math.isfinite(value):
                    found.course.append((found.proposed, value))
                if value < found.value:
                    found.best, found.value = candidate, value
                step(found.value)
            batch = proposals.send(values)
    except StopIteration:
        return found


def fixed(candidates: Sequence[Any]) -> Proposals:
    """Propose a list, all at once."""
    yield list(candidates)


def rungs_of(windows: int, first: int) -> list[int]:
    """How many windows candidates are measured on before some are given up: `first`, twice as many, and so on, then all of them."""
    found = []
    while 0 < first < windows:
        found.append(first)
        first *= 2
    return [*found, windows]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
