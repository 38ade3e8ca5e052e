"""The loop: halving, memory, and going on where a kill came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prunekit.search.evolution import Evolution
from prunekit.search.history import History
from prunekit.search.loop import Found, Judge, fixed, rungs_of, search
from searches import Counted


def loss(candidate: float, window: int) -> float:
    return abs(candidate - 0.7) + 0.01 * math.sin(candidate * 50 + window)


class Line:
    """Numbers from 0 to 1; those above 0.9 are outside."""

    def first(self) -> list[Any]:
        return [0.1]

    def mutant(self, parent: Any, draw: Any, *, strong: bool) -> Any | None:
        child = round(min(1.0, max(0.0, parent + draw.gauss(0, 0.3 if strong else 0.05))), 4)
        return None if child > 0.9 else child

    def crossover(self, one: Any, other: Any, draw: Any) -> Any | None:
        return round((one + other) / 2, 5)


def evolve(path: Path | None, objective: Counted, seed: int = 0) -> tuple[Found, Evolution, Judge]:
    judge = Judge(objective, History(path, {"seed": seed}), rungs_of(8, 2), least=3)
    made = Evolution(Line(), trials=40, population=10, parents=3, seed=seed)
    return search(made.proposals(), judge), made, judge


def test_rungs_double_up_to_all_windows() -> None:
    assert rungs_of(8, 2) == [2, 4, 8]
    assert rungs_of(20, 3) == [3, 6, 12, 20]
    assert rungs_of(4, 0) == [4]
    assert rungs_of(4, 8) == [4]


def test_the_better_half_goes_on_and_nothing_is_measured_twice() -> None:
    objective = Counted(loss)
    judge = Judge(objective, History(None, {}), [1, 2, 4])
    values = judge([0.0, 0.2, 0.5, 0.7])
    assert objective.asked[:4] == [(0.0, 0, 1), (0.2, 0, 1), (0.5, 0, 1), (0.7, 0, 1)]
    # 0.0 came first of all, so it is held against the others to the end
    assert sorted(objective.asked[4:]) == [(0.0, 1, 2), (0.0, 2, 4), (0.5, 1, 2), (0.7, 1, 2), (0.7, 2, 4)]
    assert [math.isfinite(value) for value in values] == [True, False, False, True]
    assert values[3] == pytest.approx(sum(loss(0.7, window) for window in range(4)) / 4)
    assert (judge.measured, judge.given_up, judge.windows) == (2, 2, 11)
    before = len(objective.asked)
    assert judge([0.7, 0.7]) == [values[3]] * 2
    assert len(objective.asked) == before, "what is known costs nothing"
    assert judge.known == 1


def test_what_fell_behind_is_taken_up_where_it_was_left() -> None:
    objective = Counted(loss)
    judge = Judge(objective, History(None, {}), [1, 4])
    judge([0.7, 0.1, 0.5, 0.6])
    del objective.asked[:]
    judge([0.1])
    assert objective.asked == [(0.1, 1, 4)]


def test_the_best_is_found() -> None:
    found, made, judge = evolve(None, Counted(loss))
    assert found.value == min(value for _, value in found.course)
    assert abs(found.best - 0.7) < 0.05 < abs(found.first - 0.7)
    assert found.proposed == 40
    assert made.rejected > 0, "some draws were outside the space"
    assert judge.measured < 40


def test_equal_seeds_find_the_same_and_other_seeds_something_else() -> None:
    one, again, other = (evolve(None, Counted(loss), seed)[0] for seed in (0, 0, 1))
    assert one == again
    assert one.course != other.course


@pytest.mark.parametrize("dies_after", [0, 1, 7, 23, 60])
def test_a_killed_search_goes_on_to_the_same_end(tmp_path: Path, dies_after: int) -> None:
    path = tmp_path / "history.jsonl"
    whole = Counted(loss)
    wanted = evolve(tmp_path / "whole.jsonl", whole)[0]
    first = Counted(loss, dies_after)
    with pytest.raises(KeyboardInterrupt):
        evolve(path, first)
    second = Counted(loss)
    assert evolve(path, second)[0] == wanted
    assert sorted(first.asked + second.asked) == sorted(whole.asked), "nothing was lost, and nothing measured twice"


def test_a_list_is_judged_at_once_and_the_first_of_equals_is_best() -> None:
    judge = Judge(Counted(loss), History(None, {}), [2])
    seen: list[float] = []
    found = search(fixed([0.5, 0.7, 0.70001, 0.7]), judge, seen.append)
    assert found.best == 0.7
    assert found.proposed == 4
    assert len(seen) == 4
    nothing = search(fixed([]), Judge(Counted(loss), History(None, {}), [2]))
    assert nothing.best is None


def test_infinite_losses_are_never_best() -> None:
    def objective(candidates: Sequence[Any], windows: slice) -> Iterator[list[float]]:
        for candidate in candidates:
            yield [math.inf if candidate == 0 else 1.0]

    found = search(fixed([0, 1]), Judge(objective, History(None, {}), [1]))
    assert (found.best, found.value, found.course) == (1, 1.0, [(2, 1.0)])
