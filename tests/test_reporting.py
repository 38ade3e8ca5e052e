"""`report` finds the runs that are meant, writes what they say, and touches nothing that somebody has edited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import prunekit
import tiny
from prunekit import InputError
from prunekit.checkpoint.lock import locked

EVALUATION = {"texts": [{"text": "t", "length": 32, "windows": 4, "perplexity": 30.0, "before": 20.0}]}


def evaluate(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION), encoding="utf-8")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_without_an_evaluation_everything_stays_as_it_is(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    made = prunekit.write_report(finished)
    assert (made.page, made.runs, made.card) == (finished / "report.html", 1, "written")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_an_evaluation_comes_into_page_and_card_and_leaves_them_with_its_file(finished: Path) -> None:
    before = read(finished / "report.html"), read(finished / "README.md")
    evaluate(finished)
    assert prunekit.write_report(finished).card == "written"
    assert "30.00" in read(finished / "report.html")
    assert "model-index:" in read(finished / "README.md")
    (finished / "evaluation.json").unlink()
    assert prunekit.write_report(finished).card == "written"
    assert (read(finished / "report.html"), read(finished / "README.md")) == before


def test_a_card_that_somebody_edited_is_kept(finished: Path) -> None:
    (finished / "README.md").write_text(read(finished / "README.md") + "\nMine.\n", encoding="utf-8")
    edited = read(finished / "README.md")
    evaluate(finished)
    assert prunekit.write_report(finished).card == "kept"
    assert read(finished / "README.md") == edited
    assert "30.00" in read(finished / "report.html")


def test_a_page_elsewhere_leaves_the_folder_alone(finished: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    made = prunekit.write_report([finished], out=tmp_path / "page.html")
    assert made.card is None
    assert read(tmp_path / "page.html") == before["report.html"].decode()
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_pruning_again_forgets_the_evaluation(finished: Path, finished_run: Path) -> None:
    evaluate(finished)
    calibration = {"source": str(finished_run.parent / "text.txt"), "samples": 2, "length": 32}
    prunekit.prune(finished_run.parent / "llama", out=finished, calibration=calibration, overwrite=True)
    assert not (finished / "evaluation.json").exists()
    assert "Nothing has been evaluated yet" in read(finished / "report.html")


def test_runs_and_sweeps_on_one_page(finished: Path, tmp_path: Path) -> None:
    evaluate(finished)
    tiny.save_model(tmp_path / "llama", "llama")
    (tmp_path / "text.txt").write_text(tiny.make_text(), encoding="utf-8")
    grid = {
        "model": str(tmp_path / "llama"),
        "calibration": {"source": str(tmp_path / "text.txt"), "samples": 2, "length": 32},
        "dtype": "float32",
        "grid": {"sparsity": [0.3, 0.6], "seed": [0, 1], "method": ["magnitude"]},
        "evaluate": {"text": str(tmp_path / "text.txt"), "length": 32, "samples": 2},
    }
    runs = tmp_path / "runs"
    swept = prunekit.sweep(grid, out=runs)
    lines = [json.loads(line) for line in read(runs / "results.jsonl").splitlines()]
    lines[0] |= {"status": "failed", "error": "it broke"}
    (runs / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = prunekit.write_report(runs)
    page = read(runs / "report.html")
    assert (made.page, made.runs) == (runs / "report.html", 3)
    assert "it broke" in page
    assert re.search(r">seed</th>", page), "an axis is a column"
    both = prunekit.write_report([runs, finished], out=tmp_path / "compare.html")
    page = read(both.page)
    assert both.runs == 4
    for row in [*swept.rows[1:], {"name": finished.name}]:
        assert f">{row['name']}</th>" in page
    assert "× dense" in page


@pytest.mark.parametrize(
    ("folders", "out", "sentence"),
    [
        ([], None, "no folder is named"),
        (["pruned", "pruned"], None, "name it with --out compare.html"),
        (["pruned"], "page.txt", "must end in .html"),
        (["nothing"], None, "it is no folder"),
        (["."], None, "holds no finished run of prunekit, and no sweep"),
        (["pruned", "nothing"], "page.html", "it is no folder"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    finished: Path, tmp_path: Path, folders: list[str], out: str | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        prunekit.write_report([tmp_path / name for name in folders], out=None if out is None else tmp_path / out)
    assert not (tmp_path / "page.html").exists()


def test_a_sweep_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"status": "failed", "name": "a", "error": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"none of the runs in .* is done"):
        prunekit.write_report(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"status": "done"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"is no table of a sweep .*run the sweep again"):
        prunekit.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_being_written_is_left_alone(finished: Path) -> None:
    with locked(finished), pytest.raises(InputError, match="is being written by process"):
        prunekit.write_report(finished)
