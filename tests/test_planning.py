"""`plan`: the exact parts are exact, the estimates grow as they must, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from prunekit.catalogue import METHODS
from prunekit.errors import InputError
from prunekit.model.source import StreamedModel
from prunekit.model.stream import Walk, Windows
from prunekit.recipe import Recipe
from prunekit.shrink.job import Shrinking
from prunekit.shrink.walk import ShrinkWalk


def make(folder: Path, **changes: object) -> prunekit.Plan:
    values = {"model": str(folder), "method": "wanda", "dtype": "float32", "device": "cpu"} | changes
    return prunekit.plan(Recipe.build({"calibration": {"samples": 4, "length": 16}} | values))


def test_counts_and_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    made = make(tmp_path / "model")
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert made.weights == sum(
        module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")
    )
    assert (made.blocks, made.linears, made.windows, made.length) == (3, 21, 4, 16)
    assert made.disk == {"weights": made.parameters * 4, "hidden": 2 * 8192, "peak": made.parameters * 4 + 2 * 8192}
    assert made.hidden_states == 4 * 16 * 32 * 4 == 8192
    assert made.memory["peak"] == max(made.memory.values()) > made.hidden_states
    phases = ["start", "forward", "prune", "tune", "write", "read", "verify"]
    assert list(made.seconds) == [*phases, "total"]
    assert made.seconds["total"] == pytest.approx(sum(made.seconds[phase] for phase in phases))
    assert made.seconds["tune"] == 0
    assert min(made.seconds[phase] for phase in phases if phase not in ("write", "tune")) > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("method", ["sparsegpt+owl", "wanda+least-squares+blockwise", "ria+swaps"])
def test_methods_that_take_more_are_planned_to_take_more(
    llama_folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "prunekit.machine.rss_bytes", lambda: 10**8
    )  # what tests left behind may go from one to the other
    plain, more = make(llama_folder), make(llama_folder, method=method)
    assert more.memory["walk"] >= plain.memory["walk"]
    assert (more.seconds["tune"] > 0) == ("blockwise" in method)
    assert more.disk == plain.disk


def test_blocks_that_are_tuned_are_planned_for_though_the_first_is_skipped(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=5)
    budget = {"shape": "free", "skip_first": 1, "skip_last": 1}
    tuned = {}
    for target in ("own", "dense"):
        asked = {"method": "wanda-sp+blockwise", "ratio": 0.2, "parts": {"budget": budget, "tune": {"target": target}}}
        assert make(tmp_path / "model", **asked).seconds["tune"] > 0
        rehearsal = jobs_walk(tmp_path / "model", asked).rehearse()
        assert rehearsal.tried == 1
        tuned[target] = rehearsal.tuned
    assert tuned == {"own": 3, "dense": 4}


def test_hidden_states_grow_with_samples_and_magnitude_needs_one_window(llama_folder: Path) -> None:
    small = make(llama_folder)
    large = make(llama_folder, calibration={"samples": 40, "length": 16})
    assert large.hidden_states == 10 * small.hidden_states
    assert large.disk["weights"] == small.disk["weights"]
    assert large.disk["hidden"] == 10 * small.disk["hidden"]
    assert make(llama_folder, method="magnitude").windows == 1


FREE = {"budget": {"shape": "free", "align": 1, "skip_first": 0, "skip_last": 0}}


@pytest.mark.parametrize("method", [row.name for row in METHODS.values() if row.kind == "shrink" and not row.planned])
def test_methods_that_remove_structures_are_planned_as_they_run(
    method: str, llama_folder: Path, tmp_path: Path
) -> None:
    parts: dict[str, Any] = FREE if METHODS[method].score else {}
    if METHODS[method].search is not None:
        parts = {**parts, "search": {"trials": 3, "samples": 3}}
    options: dict[str, object] = {"method": method, "ratio": 0.3, "parts": parts}
    made = make(llama_folder, **options)
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(600), encoding="utf-8")
    calibration = {"source": str(text), "samples": 4, "length": 16}
    result = prunekit.prune(llama_folder, out=tmp_path / "out", calibration=calibration, dtype="float32", **options)
    assert made.ratio == pytest.approx(result.ratio, abs=0.07), (
        "a group of heads is so much of this model, and scores choose"
    )
    outside = result.removed - result.block_removed  # which only slicegpt changes here
    assert made.ratio == pytest.approx((made.removed - outside) / result.block_parameters)
    assert min(made.seconds[phase] for phase in ("start", "forward", "prune", "verify")) > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_looking_ahead_is_planned_for(llama_folder: Path) -> None:
    # every walk of a greedy search is one more pass; gradients are kept, and all that blocks were fed
    greedy = {"parts": {"depth": {"choose": "greedy"}}}
    walks = [jobs_walk(llama_folder, {"method": "shortgpt", "ratio": 0.6} | more) for more in ({}, greedy)]
    assert [walk.steps_ahead for walk in walks] == [3, 3 + 2]
    assert [walk.rehearse().passes for walk in walks] == [1, 5 / 3]
    free = {"parts": FREE, "ratio": 0.3}
    taylor, random = (make(llama_folder, method=method, **free) for method in ("llm-pruner", "random"))
    assert taylor.memory["start"] > random.memory["start"]
    assert jobs_walk(llama_folder, {"method": "llm-pruner"} | free).steps_ahead == 6
    assert jobs_walk(llama_folder, {"method": "random"} | free).steps_ahead == 0


def jobs_walk(folder: Path, values: dict[str, object]) -> ShrinkWalk:
    source = StreamedModel.open(folder, dtype="float32", device="cpu")
    recipe = Recipe.build({"model": str(folder)} | values)
    windows = Windows(torch.zeros(2, 16, dtype=torch.int64))
    return Shrinking.of(recipe, source).work(Walk(source, windows), dense=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "3:5"}, "do not divide the 32 inputs of 'model.layers.0.self_attn.q_proj'"),
        ({"calibration": {"length": 4096}}, "length 4096 is more than the 128 positions"),
        ({"parts": {"budget": {"ignore": ["nothing"]}}}, "matches no linear"),
        ({"method": "numerical", "ratio": 0.99}, "ask for at most 0"),
        ({"method": "shortgpt", "ratio": 0.9}, "would remove all 3 blocks"),
        ({"method": "shortgpt", "ratio": 0.3, "parts": FREE}, "'shortgpt' removes whole blocks: leave it out"),
        ({"method": "llm-pruner", "ratio": 0.3}, "skip all of the model's 3 blocks"),
    ],
)
def test_what_a_run_would_refuse_is_refused(llama_folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(llama_folder, **changes)
