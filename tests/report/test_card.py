"""The card says to the hub what was measured, and is known again as ours whatever it shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from prunekit.evaluation.record import EvaluationRecord, TaskFigures, TextFigures
from prunekit.report.card import is_ours, model_card

EVALUATION = EvaluationRecord(
    texts=(
        TextFigures(
            text="hf:org/data: #1", length=32, windows=4, perplexity=30.0, before=20.0, ratio_interval=(1.4, 1.6)
        ),
        TextFigures(text="broken", length=32, windows=4, perplexity=math.inf),
    ),
    tasks=(
        TaskFigures(
            task="arc", metric="acc", n=1000, value=0.5, stderr=0.01, before=0.6, difference_interval=(-0.12, -0.08)
        ),
        TaskFigures(task="piqa", metric="acc_norm", n=9, value=0.25, stderr=0.1),
    ),
)


@pytest.fixture(scope="module")
def manifest(finished_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished_run / "prunekit.json").read_text(encoding="utf-8"))
    return found


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_hub_reads_the_figures(finished_run: Path, manifest: dict[str, Any]) -> None:
    card = model_card(manifest, finished_run, EVALUATION)
    found = metadata(card)
    assert found["metrics"] == ["acc", "acc_norm", "perplexity"]
    assert (found["license"], found["tags"]) == ("mit", ["pruned", "sparse", "wanda"])
    (index,) = found["model-index"]
    assert index["name"] == "llama-wanda"
    figures = [(r["dataset"]["name"], r["metrics"][0]["type"], r["metrics"][0]["value"]) for r in index["results"]]
    assert figures == [("hf:org/data: #1", "perplexity", 30.0), ("arc", "acc", 0.5), ("piqa", "acc_norm", 0.25)]
    results = ModelCard(card).data.eval_results  # the hub's own reader
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == figures


def test_the_card_shows_before_and_after(finished_run: Path, manifest: dict[str, Any]) -> None:
    card = model_card(manifest, finished_run, EVALUATION)
    assert "| hf:org/data: #1, 4 windows of 32 tokens | 20.00 | 30.00 | 1.500 (1.400 … 1.600) |" in card
    assert "| broken, 4 windows of 32 tokens | – | ∞ | – |" in card
    assert "| arc (acc, 1,000 questions) | 60.0 | 50.0 ± 2.0 | -10.0 (-12.0 … -8.0) |" in card
    assert "| piqa (acc_norm, 9 questions) | – | 25.0 ± 19.6 | – |" in card


@pytest.mark.parametrize(
    "evaluation", [None, EvaluationRecord(), EVALUATION, EvaluationRecord(texts=EVALUATION.texts[1:])]
)
def test_a_card_is_ours_whatever_it_shows(
    finished_run: Path, manifest: dict[str, Any], evaluation: EvaluationRecord | None
) -> None:
    card = model_card(manifest, finished_run, evaluation)
    assert is_ours(card, manifest, finished_run)
    assert not is_ours(card.replace("Made by prunekit", "Made by me"), manifest, finished_run)
    assert not is_ours(card.replace("- sparse\n", "- sparse\n- mine\n"), manifest, finished_run)
    assert not is_ours(card + "\nUse it well.\n", manifest, finished_run)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "kept weights are bit-identical to the original's."),
        ({"reconstruct": {"name": "sparsegpt"}}, "kept weights were refitted (sparsegpt)."),
        ({"reconstruct": {"name": "alps"}, "tune": {"name": "blockwise"}}, "kept weights were tuned towards"),
        ({"pattern": {"permute": True}}, "channels of linears were put into another order"),
    ],
)
def test_the_card_says_what_became_of_the_weights_that_are_kept(
    finished_run: Path, manifest: dict[str, Any], parts: dict[str, Any], said: str
) -> None:
    recipe = {**manifest["recipe"], "parts": {**manifest["recipe"]["parts"], **parts}}
    card = model_card({**manifest, "recipe": recipe}, finished_run)
    assert said in card
    assert ("bit-identical" in card) == (not {"reconstruct", "tune"} & parts.keys())


def test_the_card_a_run_wrote_is_ours(finished_run: Path, manifest: dict[str, Any]) -> None:
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    assert is_ours(card, manifest, finished_run)
    assert "model-index" not in card
