"""Optuna's estimator: the same draws by seed, also behind a kill; damaged and foreign journals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunekit.errors import HistoryError, InputError
from prunekit.search import tpe as module
from prunekit.search.history import History
from prunekit.search.loop import Found, Judge, search
from prunekit.search.tpe import complete, open_study, tpe
from searches import Counted

IDENTITY = {"seed": 0}


def define(trial: Any) -> dict[str, Any]:
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    point = {"kind": kind, "x": round(trial.suggest_float("x", 0.0, 1.0), 4)}
    return point | ({"y": round(trial.suggest_float("y", 0.0, 1.0), 4)} if kind == "b" else {})


def loss(point: dict[str, Any], _: int = 0) -> float:
    return abs(float(point["x"]) - 0.3) + {"a": 0.5, "b": 0.0, "c": 1.0}[point["kind"]] + 0.2 * float(point.get("y", 0))


def run(folder: Path | None, dies_after: int = 10**9, trials: int = 25, seed: int = 0) -> Found:
    study = open_study(None if folder is None else folder / "study.log", IDENTITY)
    history = History(None if folder is None else folder / "history.jsonl", IDENTITY)
    start = {"kind": "c", "x": 0.9}
    judge = Judge(Counted(loss, dies_after), history, [1])
    return search(tpe(study, define, trials=trials, seed=seed, start=start), judge)


def test_the_estimator_finds_the_best_and_begins_where_it_is_told() -> None:
    found = run(None)
    assert found.first == {"kind": "c", "x": 0.9}
    assert found.proposed == 25
    assert found.value < 0.15
    assert found.best["kind"] == "b"
    assert run(None) == found
    assert run(None, seed=1).course != found.course


@pytest.mark.parametrize("dies_after", [0, 1, 9, 17])
def test_a_killed_search_draws_what_it_would_have_drawn(tmp_path: Path, dies_after: int) -> None:
    wanted = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dies_after)
    with (tmp_path / "study.log").open("a") as stream:
        stream.write('{"op_code": 4, "worker')  # what a kill leaves of a line
    assert run(tmp_path) == wanted
    study = open_study(tmp_path / "study.log", IDENTITY)
    assert len(complete(study)) == 25
    assert run(tmp_path) == wanted, "a finished one is not begun again"


def test_a_longer_search_begins_with_the_shorter_one(tmp_path: Path) -> None:
    short = run(tmp_path, trials=12)
    longer = run(tmp_path, trials=25)
    assert longer.course[:12] == short.course
    assert longer == run(None)


@pytest.mark.parametrize("content", ["nonsense\n{}\n", '{"a": 1}\n{"b": 2}\n'])
def test_what_is_no_journal_is_refused_and_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.log"
    path.write_text(content)
    with pytest.raises(HistoryError, match="cannot be read as a study of Optuna"):
        open_study(path, IDENTITY)
    assert path.read_text() == content


def test_another_searchs_study_is_refused_and_not_touched(tmp_path: Path) -> None:
    run(tmp_path, trials=3)
    before = (tmp_path / "study.log").read_bytes()
    with pytest.raises(HistoryError, match="seed is 0 there and 7 here"):
        open_study(tmp_path / "study.log", {"seed": 7})
    assert (tmp_path / "study.log").read_bytes() == before


def test_without_optuna_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'prunekit\[search\]'"):
        open_study(None, IDENTITY)
