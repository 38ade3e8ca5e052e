"""`compare`: what it finds is what pruning and evaluating each method by itself finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import prunekit
import tiny
from prunekit import InputError
from prunekit.cli import app

METHODS = ["magnitude", "wanda", "ria+r2-dsnot", "wanda+least-squares"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder, "llama")
    return folder


def options(text_file: Path, **changes: Any) -> dict[str, Any]:
    calibration = {"source": str(text_file), "samples": 5, "length": 32, **changes}
    return {"calibration": calibration, "dtype": "float32", "sparsity": 0.5}


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": None, "pattern": "2:4"}])
def test_figures_are_those_of_pruning_and_evaluating_each(
    target: dict[str, Any], model: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = {**options(text_file), **target}
    found = prunekit.compare(model, METHODS, out=tmp_path / "out", text=str(text_file), text_samples=4, **asked)
    assert found.dense == pytest.approx(evaluate(model, text_file), rel=1e-6)
    zeros = []
    for row, method in zip(found.rows, METHODS, strict=True):
        assert row.method == method
        folder = tmp_path / method
        dense = options(text_file, mode="dense") | target
        result = prunekit.prune(model, out=folder, method=method, **dense)
        assert row.zeros == result.zeros
        assert row.sparsity == result.sparsity
        if method != "magnitude":  # by itself it looks at one window only
            errors = [linear.output_error for linear in result.linears]
            assert row.output_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert row.perplexity == pytest.approx(evaluate(folder, text_file), rel=1e-4)
        zeros.append(removed(folder, [linear.name for linear in result.linears]))
    for left, mine in enumerate(zeros):
        for right, other in enumerate(zeros):
            expected = int((mine & other).sum()) / int((mine | other).sum())
            assert found.overlap[left][right] == pytest.approx(expected)
    assert found.overlap[1][3] == 1.0, "least squares keeps Wanda's mask"
    assert found.overlap[0][1] < 1.0


def evaluate(folder: Path, text_file: Path) -> float:
    return prunekit.evaluate(folder, text=str(text_file), length=32, samples=4, dtype="float32").perplexity


def removed(folder: Path, names: list[str]) -> torch.Tensor:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return torch.cat([(tensors[f"{name}.weight"] == 0).flatten() for name in names])


def test_order_and_company_change_nothing(model: Path, text_file: Path, tmp_path: Path) -> None:
    def rows(methods: list[str]) -> dict[str, tuple[int, float]]:
        found = prunekit.compare(
            model, methods, out=tmp_path, text=str(text_file), text_samples=2, **options(text_file)
        )
        return {row.method: (row.zeros, row.perplexity) for row in found.rows}

    together = rows(["sparsegpt", "wanda", "owl", "stochastic-ria"])
    for method in together:
        assert rows([method])[method] == together[method]
    assert rows(["stochastic-ria", "owl", "wanda", "sparsegpt"]) == together


def test_channels_are_permuted_and_put_back(model: Path, text_file: Path, tmp_path: Path) -> None:
    asked = {**options(text_file), "sparsity": None, "pattern": "2:4", "parts": {"pattern": {"permute": True}}}
    found = prunekit.compare(model, ["wanda", "ria"], out=tmp_path / "a", text=str(text_file), text_samples=2, **asked)
    alone = prunekit.compare(model, ["ria"], out=tmp_path / "b", text=str(text_file), text_samples=2, **asked)
    assert alone.rows[0].perplexity == found.rows[1].perplexity
    assert found.overlap is None, "zeros lie in the order of each method's own channels"
    assert "masks are not compared" in (tmp_path / "a" / "compare.md").read_text()
    assert (tmp_path / "a" / "compare.svg").exists()
    plain = {**asked, "parts": {}}
    other = prunekit.compare(model, ["ria"], out=tmp_path / "c", text=str(text_file), text_samples=2, **plain)
    assert other.rows[0].perplexity != alone.rows[0].perplexity
    assert other.dense == alone.dense


def test_the_command_prints_a_table_and_writes_three_files(model: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["compare", str(model), "--methods", "magnitude, wanda", "--calibration", str(text_file), "--samples", "4"]
    words += ["--length", "32", "--dtype", "float32", "--text", str(text_file), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*words, "--pattern", "2:4"])
    assert shown.exit_code == 0, shown.output
    assert "magnitude" in shown.stdout
    assert "compare.svg" in shown.stdout
    printed = CliRunner().invoke(app, [*words, "--json"])
    summary = json.loads(printed.stdout.splitlines()[-1])
    assert [row["method"] for row in summary["rows"]] == ["magnitude", "wanda"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == summary
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| wanda | " in table
    assert (tmp_path / "out" / "compare.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "no method is named"),
        (["wanda", "wanda"], "method 'wanda' is named twice"),
        (["wonda"], "method 'wonda' is unknown: did you mean 'wanda'"),
        (["wanda+dsnot+swaps"], "two parts of the kind refine: 'dsnot' and 'swaps'"),
        (["wanda", "wanda+blockwise"], "'wanda\\+blockwise' tunes each block behind those that are pruned"),
        (["wanda+ria"], "'ria' of method 'wanda\\+ria' is no part that can be added"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    methods: list[str], message: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prunekit.compare(model, methods, out=tmp_path / "out", **options(text_file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["there/below", "\0"])
def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(
    where: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("a file")
    with pytest.raises(InputError, match="cannot be used: "):
        prunekit.compare(model, ["wanda"], out=tmp_path / where, **options(text_file))
