"""What a search remembers: durable line by line, torn ends dropped, damage and other searches refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from prunekit.errors import HistoryError
from prunekit.search.history import History, key_of

IDENTITY = {"seed": 0, "tokens": "abc"}


def test_what_was_added_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, IDENTITY)
    history.add([[3, 0], None], [0.1, 2 / 3])
    history.add([[3, 0], None], [math.inf])
    history.add({"a": 1}, [5.0])
    again = History(path, IDENTITY)
    assert again.losses([[3, 0], None]) == [0.1, 2 / 3, math.inf]
    assert again.losses({"a": 1}) == [5.0]
    assert again.losses({"a": 2}) == []
    assert len(again) == 2


def test_equal_candidates_have_one_key() -> None:
    assert key_of({"b": (1, 2), "a": None}) == key_of({"a": None, "b": [1, 2]})
    assert key_of([1, 2]) != key_of([2, 1])


def test_a_line_that_was_torn_by_a_kill_is_dropped_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, IDENTITY)
    history.add("first", [1.0])
    whole = path.read_bytes()
    history.add("second", [2.0])
    full = path.read_bytes()
    for cut in range(len(whole), len(full)):
        path.write_bytes(full[:cut])
        again = History(path, IDENTITY)
        assert again.losses("first") == [1.0]
        assert again.losses("second") == []
        again.add("second", [2.0])
        assert path.read_bytes() == full


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text.replace('"losses"', '"lost"'), "cannot be read as the history of a search"),
        (lambda text: "not json\n" + text, "cannot be read as the history of a search"),
        (lambda text: "", "cannot be read as the history of a search"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format 9"),
        (lambda text: text.replace('"abc"', '"xyz"'), 'tokens is "xyz" there and "abc" here'),
    ],
)
def test_a_damaged_or_foreign_history_is_refused_and_not_touched(tmp_path: Path, damage, sentence: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "history.jsonl"
    History(path, IDENTITY).add("one", [1.0])
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=sentence):
        History(path, IDENTITY)
    assert path.read_bytes() == before
