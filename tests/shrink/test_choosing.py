"""Divergences of plans without carrying them out, and the calibration chosen by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from helpers import streamed
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Windows
from prunekit.shrink.choosing import choose_calibration, divergences
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
    source = streamed(tmp_path)
    structures = find_structures(source.module, source.anatomy)
    assert divergences(source, structures, [Plan.whole(structures)] * 2, draw_windows(3, 12)) == [0.0, 0.0]


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
            wanted.append(float((dense.exp() * (dense - pruned)).sum(-1).mean()))
    source = streamed(tmp_path)
    assert divergences(source, structures, plans, windows) == pytest.approx(wanted, rel=1e-4)
    assert divergences(ResidentModel(model), structures, plans, windows) == pytest.approx(wanted, rel=1e-4)
    assert not source.stored


def test_the_calibration_whose_plan_diverges_least_is_chosen() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    structures = find_structures(source.module, source.anatomy)
    steps: list[int] = []

    def draw(seed: int) -> Windows:
        return draw_windows(2, 8, seed)

    def plan(windows: Windows) -> Plan:
        return drawn_plan(structures, int(windows.ids.sum()))

    held_out = draw_windows(3, 12, 99)
    choice = choose_calibration(source, structures, [3, 4, 5, 6], draw, plan, held_out, step=lambda: steps.append(1))
    alone = {seed: divergences(source, structures, [plan(draw(seed))], held_out)[0] for seed in choice.divergences}
    assert choice.divergences == alone
    assert list(alone) == [3, 4, 5, 6]
    assert alone[choice.seed] == min(alone.values()) < max(alone.values())
    assert torch.equal(choice.windows.ids, draw(choice.seed).ids)
    assert choice.plan == plan(choice.windows)
    assert len(steps) == 4 + len(source.anatomy.blocks)


def test_of_equals_the_first_is_chosen() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    structures = find_structures(source.module, source.anatomy)
    choice = choose_calibration(
        source,
        structures,
        [7, 2],
        lambda seed: draw_windows(2, 8, seed),
        lambda windows: Plan.whole(structures),
        draw_windows(2, 8),
    )
    assert choice.seed == 7
    assert choice.divergences == {7: 0.0, 2: 0.0}
