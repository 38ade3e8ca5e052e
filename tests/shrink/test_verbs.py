"""What the other verbs make of folders from which structures were removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import prunekit
import tiny
from prunekit.report.card import WITH_CODE
from test_cli import call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and three folders made of them: `stock` loads anywhere, `free` brings code, `depth` has fewer blocks."""
    place = tmp_path_factory.mktemp("shrunk")
    tiny.save_model(place / "model", "llama", num_hidden_layers=4)
    (place / "text.txt").write_text(tiny.make_text(600), encoding="utf-8")
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32}
    for name, method, parts in (
        ("stock", "wanda-sp", {}),
        ("free", "numerical", {"budget": {"shape": "free"}}),
        ("depth", "shortgpt", {}),
    ):
        prunekit.prune(
            place / "model",
            out=place / name,
            method=method,
            ratio=0.3,
            calibration=calibration,
            dtype="float32",
            parts=parts,
        )
    return place


@pytest.mark.parametrize("name", ["stock", "free", "depth"])
def test_inspect_shows_widths_and_what_went(name: str, place: Path) -> None:
    done = call("inspect", place / name)
    assert done.code == 0, done.err
    found = prunekit.inspect(place / name)
    run = json.loads((place / name / "prunekit.json").read_text())["run"]
    assert (found.removed, found.ratio) == (run["removed"], run["ratio"])
    assert found.summary()["ratio"] == run["ratio"]
    assert "outputs × inputs" in done.out
    assert f"parameters  {found.parameters:,} of {run['parameters']:,}\n" in done.out
    assert f"({run['removed']:,} of {run['block_parameters']:,} block parameters removed)" in done.out
    shape = found.linears[-1].shape
    assert f"{shape[0]} × {shape[1]}" in done.out
    assert "pattern" not in done.out, "none was asked for"


def test_inspect_of_zeros_is_as_it_was(place: Path) -> None:
    found = prunekit.inspect(place / "model")
    assert (found.removed, found.ratio) == (0, 0.0)
    assert "zeros / weights" in call("inspect", place / "model").out


def test_the_card_says_whether_code_is_needed(place: Path, tmp_path: Path) -> None:
    cards = {name: (place / name / "README.md").read_text() for name in ("stock", "free", "depth")}
    assert {name: WITH_CODE in card for name, card in cards.items()} == {"stock": False, "free": True, "depth": False}
    prunekit.export(place / "free", out=tmp_path / "padded", pad=True)
    assert WITH_CODE not in (tmp_path / "padded" / "README.md").read_text()
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32}
    prunekit.prune(place / "free", out=tmp_path / "zeroed", calibration=calibration, dtype="float32")
    assert WITH_CODE in (tmp_path / "zeroed" / "README.md").read_text()


def test_a_sweep_and_its_page_say_what_went(place: Path, tmp_path: Path) -> None:
    grid = {
        "model": str(place / "model"),
        "calibration": {"source": str(place / "text.txt"), "samples": 4, "length": 32},
        "dtype": "float32",
        "grid": {
            "run": [{"label": "zeros", "method": "wanda"}, {"label": "units", "method": "wanda-sp", "ratio": 0.3}]
        },
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    done = call("sweep", tmp_path / "grid.json", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "removed" in done.out
    zeroed, shrunk = (json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert (zeroed["sparsity"], zeroed["ratio"]) == (0.5, 0.0)
    run = json.loads((place / "stock" / "prunekit.json").read_text())["run"]
    assert (shrunk["sparsity"], shrunk["ratio"]) == (run["sparsity"], run["ratio"])
    assert shrunk["parameters.after"] == run["parameters"] - run["removed"]
    prunekit.write_report([tmp_path / "out"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{shrunk['parameters.after']:,}" in page
    prunekit.write_report([place / "stock", place / "free"], out=tmp_path / "page.html")
    assert f"{100 * run['ratio']:.2f} %" in (tmp_path / "page.html").read_text()


def test_plan_says_what_will_go(place: Path) -> None:
    words = ["--ratio", 0.3, "--calibration", place / "text.txt", "--samples", 4, "--length", 32]
    done = call("plan", place / "model", "--method", "shortgpt", *words, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out.splitlines()[-1])
    run = json.loads((place / "depth" / "prunekit.json").read_text())["run"]
    assert (said["removed"], said["ratio"]) == (run["removed"], run["ratio"])
    told = call("plan", place / "model", "--method", "shortgpt", *words).out
    assert f"removes     about {run['removed']:,} parameters" in told
    assert "removes" not in call("plan", place / "model", *words[2:]).out


@pytest.mark.filterwarnings("default:.*nothing will be removed")
def test_less_than_half_a_block_removes_nothing_and_says_so(place: Path, tmp_path: Path) -> None:
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32}
    with pytest.warns(prunekit.errors.PrunekitWarning, match=r"ratio 0\.1 of 4 blocks is nearest to none of them"):
        result = prunekit.prune(
            place / "model",
            out=tmp_path / "out",
            method="shortgpt",
            ratio=0.1,
            calibration=calibration,
            dtype="float32",
        )
    assert result.removed == 0
