"""Plans tried without being carried out."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from prunekit.evaluation.perplexity import perplexity
from prunekit.model.source import ResidentModel
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan
from prunekit.shrink.trying import plan_losses
from prunekit.shrink.units import find_structures
from whole import draw_windows


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt2", "llama", "opt", "phi3"])
def test_the_losses_of_a_plan_are_those_of_the_masked_model(family: str) -> None:
    model = tiny.make_model(family, dtype=torch.float64)
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    windows = draw_windows(3, 12)
    some = tuple(
        {each.name: tuple(range(each.count // 3, each.count)) or (0,) for each in block} for block in structures
    )
    plans = [Plan(some), Plan((some[0], None, some[2])), Plan.whole(structures)]
    wanted = []
    with torch.inference_mode():
        for plan in plans:
            with masked(model, source.anatomy, structures, plan):
                logits = model(windows.ids).logits[:, :-1].double()
            wanted.append(
                torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows.ids[:, 1:], reduction="none")
                .mean(1)
                .tolist()
            )
    found = plan_losses(source, structures, plans, windows)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_plan_that_keeps_all_has_the_perplexity_of_the_dense_model_to_the_last_bit() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    structures = find_structures(source.module, source.anatomy)
    windows = draw_windows(4, 16)
    (losses,) = plan_losses(source, structures, [Plan.whole(structures)], windows)
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(perplexity(source, windows)[0], rel=1e-12)


def test_what_a_plan_comes_to_does_not_depend_on_the_others() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    structures = find_structures(source.module, source.anatomy)
    windows = draw_windows(3, 16)
    plans = [
        Plan(tuple({each.name: tuple(range(count)) for each in block if each.kind == "mlp"} for block in structures))
        for count in (40, 20, 9)
    ]
    together = plan_losses(source, structures, plans, windows)
    assert together == [plan_losses(source, structures, [plan], windows)[0] for plan in plans]
    halves = [plan_losses(source, structures, plans[:1], part)[0] for part in (windows[0:1], windows[1:3])]
    assert halves[0] + halves[1] == pytest.approx(together[0], rel=1e-6)


def test_products_of_what_is_gone_are_not_computed() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    structures = find_structures(source.module, source.anatomy)
    seen: list[tuple[int, ...]] = []
    for index in range(3):
        down = source.module.get_submodule(f"model.layers.{index}.mlp.down_proj")
        down.register_forward_pre_hook(
            lambda module, inputs: seen.append((*inputs[0].shape[-1:], *module.weight.shape))
        )
    plan = Plan(({"mlp.down_proj": tuple(range(10))}, None, {}))
    plan_losses(source, structures, [plan], draw_windows(2, 16))
    assert [shape for shape in seen if shape[0] != 48] == [(10, 32, 10)]
    assert len(seen) == 3, "the block that is tried first, the one that is cut, the one that stays whole"


def test_losses_that_cannot_be_computed_are_infinite() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(math.inf)
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    assert plan_losses(source, structures, [Plan.whole(structures)], draw_windows(2, 16)) == [[math.inf, math.inf]]
