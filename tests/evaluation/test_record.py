"""An evaluation file is read as it is documented, and one that is wrong is refused with the place where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prunekit import InputError
from prunekit.evaluation import record
from prunekit.evaluation.record import EvaluationRecord, read_record

TEXT: dict[str, Any] = {"text": "t", "length": 32, "windows": 4, "perplexity": 30.0}


def write(folder: Path, content: Any) -> None:
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    documented = record.__doc__
    assert documented is not None
    example = documented[documented.index("{") : documented.rindex("}") + 1]
    (tmp_path / "evaluation.json").write_text(example, encoding="utf-8")
    found = read_record(tmp_path)
    assert found is not None
    assert json.loads(found.model_dump_json()) == json.loads(example)
    assert found.texts[0].ratio == 29.0 / 15.9


def test_what_was_not_compared_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write(tmp_path, {"texts": [{**TEXT, "perplexity": math.inf}], "made_by": "a later version"})
    found = read_record(tmp_path)
    assert found is not None
    (text,) = found.texts
    assert (text.perplexity, text.before, text.ratio, text.ratio_interval, text.kl) == (
        math.inf,
        None,
        None,
        None,
        None,
    )
    assert found.tasks == ()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"texts": [{**TEXT, "length": "long"}]}, "texts.0.length"),
        ({"texts": [{**TEXT, "ratio_interval": [1.0]}]}, "texts.0.ratio_interval"),
        ({"tasks": [{"task": "t", "metric": "acc", "n": 3}]}, "tasks.0.value"),
        ([], "the whole"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, content: Any, place: str) -> None:
    write(tmp_path, content)
    with pytest.raises(InputError, match=rf"evaluation.json' cannot be read: {place}"):
        read_record(tmp_path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"texts": [', encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot be read: .*Evaluate again, or remove it"):
        read_record(tmp_path)


def test_an_empty_record_is_a_record() -> None:
    assert EvaluationRecord().texts == ()
