"""Evolution: the best so far are parents of mutants and crossovers; a share of every generation comes from far away.

What a space refuses costs nothing: it is drawn again.
"""

from __future__ import annotations

import random
from typing import Any, Protocol

from ..errors import InputError
from .history import key_of
from .loop import Proposals

_ATTEMPTS = 200  # draws for one place in a generation before it stays empty


class Space(Protocol):
    """What candidates are, and what can be made of them. All draws come from `draw`."""

    def first(self) -> list[Any]:
        """Candidates to begin with, the one that mutants are made of first."""

    def mutant(self, parent: Any, draw: random.Random, *, strong: bool) -> Any | None:
        """A changed candidate; None where what was drawn is outside the space."""

    def crossover(self, one: Any, other: Any, draw: random.Random) -> Any | None:
        """A candidate with genes of both; None likewise."""


class Evolution:
    """Proposes generations.

    As in Search for Efficient LLMs (2024): the first generation are strong mutants of the first candidate; then `mutants` and
    `crossovers` of every generation are made of parents, the rest are strong mutants again; parents are the best of all so far.

    Attributes:
        rejected: how many draws were outside the space.
        repeated: how many had been proposed before.
    """

    def __init__(
        self,
        space: Space,
        *,
        trials: int,
        population: int,
        parents: int,
        seed: int,
        mutants: float = 0.5,
        crossovers: float = 0.3,
    ) -> None:
        self._space = space
        self._trials = trials
        self._population = population
        self._parents = parents
        self._seed = seed
        self._shares = (mutants, crossovers)
        self.rejected = self.repeated = 0
        self._proposed: set[str] = set()

    def proposals(self) -> Proposals:
        """Generations until as many candidates as `trials` were proposed, or nothing new can be drawn."""
        best: list[tuple[float, str, Any]] = []
        start = self._space.first()[: self._trials]
        generation = 0
        while len(self._proposed) < self._trials:
            draw = random.Random(f"{self._seed} generation {generation}")
            parents = [candidate for _, _, candidate in best] or start[:1]
            room = min(self._population, self._trials - len(self._proposed))
            batch = self._generation(parents, draw, room, () if generation else start)
            if not batch:
                return
            values = yield batch
            ranked = [(value, key_of(each), each) for value, each in zip(values, batch, strict=True)]
            best = sorted([*best, *ranked], key=lambda entry: entry[:2])[: self._parents]
            generation += 1

    def _generation(self, parents: list[Any], draw: random.Random, room: int, given: Any) -> list[Any]:
        batch: list[Any] = []
        for candidate in given:
            self._take(candidate, batch)
        mutants, crossovers = (round(share * room) for share in self._shares)
        while len(batch) < room:
            place = len(batch)
            for _ in range(_ATTEMPTS):
                if given or place >= mutants + crossovers:
                    child = self._space.mutant(parents[0] if given else draw.choice(parents), draw, strong=True)
                elif place < mutants or len(parents) < 2:
                    child = self._space.mutant(draw.choice(parents), draw, strong=False)
                else:
                    one, other = draw.sample(parents, 2)
                    child = self._space.crossover(one, other, draw)
                if child is None:
                    self.rejected += 1
                elif self._take(child, batch):
                    break
            else:
                return batch
        return batch

    def _take(self, candidate: Any, batch: list[Any]) -> bool:
        key = key_of(candidate)
        if key in self._proposed:
            self.repeated += 1
            return False
        self._proposed.add(key)
        batch.append(candidate)
        return True


def check_evolution(trials: int, population: int, parents: int) -> None:
    """Raise `InputError` for numbers that make no evolution."""
    if trials < 1 or population < 2 or not 1 <= parents <= population:
        raise InputError(
            f"search.trials={trials}, search.population={population} and search.parents={parents} make no search: it takes a trial, "
            "a population of 2, and at least one parent and no more than the population"
        )
