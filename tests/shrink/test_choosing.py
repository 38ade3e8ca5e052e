"""Divergences of plans without carrying them out, and the calibration chosen by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from prunekit.checkpoint.reader import Reader
from prunekit.model.source import ResidentModel, StreamedModel
from prunekit.model.stream import Windows
from prunekit.search.history import History
from prunekit.shrink import choosing
from prunekit.shrink.choosing import Choice, choose_calibration, divergences
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan, Structures
from prunekit.shrink.units import find_structures
from whole import draw_windows


def drawn_plan(structures: Structures, seed: int) -> Plan:
    """Three quarters of the units of everything, at random."""
    draw = torch.Generator().manual_seed(seed)
    return Plan(
        tuple(
            {
                each.name: tuple(
                    sorted(torch.randperm(each.count, generator=draw)[: max(1, 3 * each.count // 4)].tolist())
                )
                for each in block
            }
            for block in structures
        )
    )


def test_a_plan_that_removes_nothing_diverges_by_nothing(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    source = StreamedModel(Reader(tmp_path), torch.float32, torch.device("cpu"))
    structures = find_structures(source.module, source.anatomy)
    assert divergences(source, structures, [Plan.whole(structures)] * 2, draw_windows(3, 12)) == [[0.0] * 3] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_divergences_are_those_of_the_masked_model(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, family)
    anatomy = ResidentModel(model).anatomy
    structures = find_structures(model, anatomy)
    windows = draw_windows(3, 12)
    plans = [drawn_plan(structures, 0), Plan.whole(structures), drawn_plan(structures, 1)]
    plans[1] = Plan((plans[1].blocks[0], None, plans[1].blocks[2]))
    wanted = []
    with torch.inference_mode():
        dense = torch.log_softmax(model(windows.ids).logits[:, :-1].double(), -1)
        for plan in plans:
            with masked(model, anatomy, structures, plan):
                pruned = torch.log_softmax(model(windows.ids).logits[:, :-1].double(), -1)
            wanted += (dense.exp() * (dense - pruned)).sum(-1).mean(1).tolist()
    source = StreamedModel(Reader(tmp_path), torch.float32, torch.device("cpu"))
    for model_source in (source, ResidentModel(model)):
        found = divergences(model_source, structures, plans, windows)
        assert [value for each in found for value in each] == pytest.approx(wanted, rel=1e-4)
    assert not source.stored


@pytest.fixture
def source() -> ResidentModel:
    return ResidentModel(tiny.make_model("llama"))


def of_its_tokens(structures: Structures) -> Callable[[Windows], Plan]:
    """A plan that any two calibrations differ in."""
    return lambda windows: drawn_plan(structures, int(windows.ids.sum()))


def test_the_calibration_whose_plan_diverges_least_is_chosen(source: ResidentModel) -> None:
    structures = find_structures(source.module, source.anatomy)
    plan, steps = of_its_tokens(structures), []
    calibrations = [draw_windows(2, 8, seed) for seed in range(4)]
    held_out = draw_windows(3, 12, 99)
    choice = choose_calibration(
        source, structures, calibrations, plan, held_out, History(None, {}), step=lambda: steps.append(1)
    )
    alone = [sum(divergences(source, structures, [plan(each)], held_out)[0]) / 3 for each in calibrations]
    assert choice.summary == {"chosen": choice.number, "divergences": alone}
    assert alone[choice.number] == min(alone) < max(alone)
    assert choice.plan == plan(calibrations[choice.number])
    assert len(steps) == 4 * (1 + len(source.anatomy.blocks))


def test_of_equals_the_first_is_chosen(source: ResidentModel) -> None:
    structures = find_structures(source.module, source.anatomy)
    calibrations = [draw_windows(2, 8, seed) for seed in (7, 2)]
    whole = Plan.whole(structures)
    choice = choose_calibration(
        source, structures, calibrations, lambda _: whole, draw_windows(2, 8), History(None, {})
    )
    assert choice.summary == {"chosen": 0, "divergences": [0.0, 0.0]}


@pytest.mark.parametrize("stop", range(4))
def test_a_killed_choice_measures_nothing_twice_and_ends_the_same(
    source: ResidentModel, tmp_path: Path, stop: int
) -> None:
    structures = find_structures(source.module, source.anatomy)
    calibrations = [draw_windows(2, 8, seed) for seed in range(4)]
    real, made = of_its_tokens(structures), []

    def plan(windows: Windows) -> Plan:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(1)
        return real(windows)

    def choose(plan: Callable[[Windows], Plan], path: Path | None) -> Choice:
        history = History(path, {"seed": 0})
        return choose_calibration(source, structures, calibrations, plan, draw_windows(3, 12, 99), history)

    with pytest.raises(KeyboardInterrupt):
        choose(plan, tmp_path / "history")
    again: list[Windows] = []
    choice = choose(lambda windows: (again.append(windows), real(windows))[1], tmp_path / "history")
    assert choice == choose(real, None)
    # what is left, and the chosen plan where that was one of the first
    assert len(again) == 4 - stop + (choice.number < stop)


def test_a_run_that_chooses_goes_on_and_says_what_it_chose(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "model")
    asked: dict[str, Any] = {
        "method": "nirvana",
        "ratio": 0.2,
        "calibration": {"source": str(text_file), "samples": 8, "length": 16, "choices": 3},
        "dtype": "float32",
    }
    whole = prunekit.prune(tmp_path / "model", out=tmp_path / "whole", **asked)
    real, tries = choosing.divergences, []

    def stop_at_the_third(*given: Any, **named: Any) -> Any:
        tries.append(1)
        if len(tries) == 3:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(choosing, "divergences", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(tmp_path / "model", out=tmp_path / "killed", **asked)
    prunekit.prune(tmp_path / "model", out=tmp_path / "killed", resume=True, **asked)
    assert len(tries) == 4
    found = [json.loads((tmp_path / name / "prunekit.json").read_text()) for name in ("whole", "killed")]
    assert found[0]["choice"] == found[1]["choice"]
    assert len(found[0]["choice"]["divergences"]) == 3
    assert [path.read_bytes() for path in sorted((tmp_path / "whole").glob("*.safetensors"))] == [
        path.read_bytes() for path in sorted((tmp_path / "killed").glob("*.safetensors"))
    ]
    assert whole.verification is not None
    assert not [path for path in (tmp_path / "killed").iterdir() if "search" in path.name]
