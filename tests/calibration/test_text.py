"""Text comes from files, folders, presets and hub data sets; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from prunekit.calibration.text import documents
from prunekit.errors import InputError


def texts(source: str | Path, purpose: Any = "calibration") -> list[str]:
    return [document.read() for document in documents(str(source), purpose)]


def refusal(source: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        texts(source)
    return str(caught.value)


def write_parquet(path: Path, **columns: list[Any]) -> None:
    parquet.write_table(pyarrow.table(columns), path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße,\n\nline two\n", encoding="utf-8")
    assert texts(tmp_path / "a.txt") == ["Grüße,\n\nline two\n"]


def test_a_text_file_is_read_when_its_text_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("early")
    (document,) = documents(str(path), "calibration")
    path.write_text("late")
    assert document.read() == "late"


def test_json_lines_are_a_document_each(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "one", "id": 1}), "", json.dumps({"text": "two\nlines"}), "  "]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = documents(str(tmp_path / "a.jsonl"), "calibration")
    assert [document.read() for document in found] == ["one", "two\nlines"]
    assert [document.name for document in found] == [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'a.jsonl'}:3"]


def test_a_json_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    # U+2028 and its like are line ends to `str.splitlines`, but plain characters inside a JSON string
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == [text]


def test_parquet_rows_are_a_document_each(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["one", "two"], id=[1, 2])
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


def test_a_folder_is_its_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n{"text": "a2"}\n')
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    assert texts(tmp_path) == ["a1", "a2", "b", "c"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    assert f"'{tmp_path}' holds no .txt, .jsonl, .parquet file" in refusal(tmp_path)


def test_an_unknown_source_is_refused_with_what_there_is() -> None:
    message = refusal("wikitext3")
    for word in ("'wikitext3'", "wikitext2", "c4", "ptb", "builtin", "hf:"):
        assert word in message


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text")
    assert "must end in .txt, .jsonl, .parquet" in refusal(tmp_path / "a.csv")


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\xe9bad")
    assert "is not UTF-8 (byte 4)" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ('{"content": "x"}', "line 2 has no field 'text'"),
        ("[1]", "line 2 has no field 'text'"),
        ('"text"', "line 2 has no field 'text'"),
        ('{"text": 3}', ":2: field 'text' holds int, not text"),
        ('{"text": null}', ":2: field 'text' holds NoneType, not text"),
    ],
)
def test_a_bad_json_line_is_refused_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert words in refusal(tmp_path / "a.jsonl")


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    assert "broken.parquet" in refusal(tmp_path / "broken.parquet")
    write_parquet(tmp_path / "other.parquet", content=["one"])
    assert "column 'text'" in refusal(tmp_path / "other.parquet")
    write_parquet(tmp_path / "null.parquet", text=["one", None])
    assert ":2: field 'text' holds NoneType" in refusal(tmp_path / "null.parquet")


class Hub:
    """Stands in for `datasets.load_dataset`: notes what it was asked for and gives `rows`, or raises."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows = rows
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> list[dict[str, Any]]:
        self.asked.append({name: value for name, value in arguments.items() if value is not None})
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> Hub:
    stand_in = Hub(rows)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
PTB = {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "revision": "refs/convert/parquet"}


@pytest.mark.parametrize(
    ("preset", "purpose", "asked"),
    [
        ("wikitext2", "calibration", {**WIKITEXT, "split": "train"}),
        ("wikitext2", "evaluation", {**WIKITEXT, "split": "test"}),
        ("ptb", "calibration", {**PTB, "split": "train"}),
        ("ptb", "evaluation", {**PTB, "split": "test"}),
        (
            "c4",
            "calibration",
            {"path": "allenai/c4", "split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        ),
        (
            "c4",
            "evaluation",
            {
                "path": "allenai/c4",
                "split": "validation",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            },
        ),
    ],
)
def test_presets_ask_for_the_part_that_papers_use(
    preset: str, purpose: Any, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    field = "sentence" if preset == "ptb" else "text"
    stand_in = hub(monkeypatch, [{field: "one"}, {field: ""}, {field: "two"}])
    found = texts(preset, purpose)
    assert stand_in.asked == [asked]
    # wikitext and ptb are one text cut into lines; c4 consists of separate pages
    assert found == (["one", "", "two"] if preset == "c4" else ["one\n\n\n\ntwo"])


@pytest.mark.parametrize(
    ("source", "asked", "field"),
    [
        ("hf:org/name", {"path": "org/name", "split": "train"}, "text"),
        ("hf:org/name:test", {"path": "org/name", "split": "test"}, "text"),
        ("hf:name:test:body", {"path": "name", "split": "test"}, "body"),
    ],
)
def test_hub_data_sets(source: str, asked: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = hub(monkeypatch, [{field: "one", "id": 3}])
    assert texts(source) == ["one"]
    assert stand_in.asked == [asked]


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:b:c:d"])
def test_a_hub_source_of_the_wrong_form_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = hub(monkeypatch, [])
    assert f"'{source}' is not hf:ID[:split[:field]]" in refusal(source)
    assert not stand_in.asked


def test_a_hub_data_set_without_the_field_is_refused_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"question": "one", "answer": "two"}])
    message = refusal("hf:org/name")
    assert "no field 'text'" in message
    assert "question, answer" in message


def test_a_hub_failure_without_a_message_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError())
    assert "ConnectionError" in refusal("c4")


@pytest.mark.parametrize("source", ["wikitext2", "hf:org/name"])
def test_being_offline_is_told_with_what_works_offline(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("Couldn't reach the hub\nlong traceback"))
    message = refusal(source)
    assert f"'{source}'" in message
    assert "Couldn't reach the hub" in message
    assert "long traceback" not in message
    assert "builtin" in message
