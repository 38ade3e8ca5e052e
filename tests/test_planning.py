"""`plan`: the exact parts are exact, the estimates grow as they must, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import prunekit
import tiny
from prunekit.errors import InputError
from prunekit.recipe import Recipe


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
def test_methods_that_take_more_are_planned_to_take_more(llama_folder: Path, method: str) -> None:
    plain, more = make(llama_folder), make(llama_folder, method=method)
    assert more.memory["walk"] >= plain.memory["walk"]
    assert (more.seconds["tune"] > 0) == ("blockwise" in method)
    assert more.disk == plain.disk


def test_hidden_states_grow_with_samples_and_magnitude_needs_one_window(llama_folder: Path) -> None:
    small = make(llama_folder)
    large = make(llama_folder, calibration={"samples": 40, "length": 16})
    assert large.hidden_states == 10 * small.hidden_states
    assert large.disk["weights"] == small.disk["weights"]
    assert large.disk["hidden"] == 10 * small.disk["hidden"]
    assert make(llama_folder, method="magnitude").windows == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "3:5"}, "do not divide the 32 inputs of 'model.layers.0.self_attn.q_proj'"),
        ({"calibration": {"length": 4096}}, "length 4096 is more than the 128 positions"),
        ({"parts": {"budget": {"ignore": ["nothing"]}}}, "matches no linear"),
    ],
)
def test_what_a_run_would_refuse_is_refused(llama_folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(llama_folder, **changes)
