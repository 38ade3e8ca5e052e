"""Taylor scores against loops over whole-model gradients, and what must hold whatever the numbers are."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Windows
from prunekit.parts import find_part
from prunekit.shrink.gradients import GRADIENTS
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan
from prunekit.shrink.scores.nirvana import nirvana
from prunekit.shrink.scores.taylor import taylor
from prunekit.shrink.units import Structure, find_structures
from whole import draw_windows, objective_of, unit_parts, views, weight_in, window_gradients

ORDERS = ("first", "second", "mix")
JOINS = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "prod": math.prod,
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
}


def slow_taylor(
    model: PreTrainedModel,
    gradients: dict[str, Tensor],
    structure: Structure,
    order: str,
    granularity: str,
    reduction: str,
) -> list[float]:
    """Weight by weight, as LLM-Pruner's code has it."""
    scores = []
    for unit in range(structure.count):
        linears = []
        for linear, entries, columns in unit_parts(model, structure, unit):
            weight, each = linear.matrix(weight_in(model, linear)), gradients[linear.full_name]
            mean, square = each.mean(0), torch.stack([one * one for one in each]).mean(0)
            total = 0.0
            for entry in entries:
                w, g, a = ((value[:, entry] if columns else value[entry]).tolist() for value in (weight, mean, square))
                terms = {
                    "first": [w * g for w, g in zip(w, g, strict=True)],
                    "second": [w * a * w for w, a in zip(w, a, strict=True)],
                    "mix": [w * g - 0.5 * w * a * w for w, g, a in zip(w, g, a, strict=True)],
                }[order]
                total += sum(map(abs, terms)) if granularity == "element" else abs(sum(terms))
            linears.append(total)
        scores.append(float(JOINS[reduction](linears)))
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "gemma2"])
def test_every_combination_of_options_is_the_formula(family: str) -> None:
    model = tiny.make_model(family, dtype=torch.float64)
    windows = draw_windows(3, 10)
    gradients = window_gradients(model, windows)
    view, structures = views(model, windows, set(GRADIENTS), "loss")[1]
    for structure in structures:
        for order, granularity in product(ORDERS, ("element", "vector")):
            for reduction in JOINS if (order, granularity) == ("first", "element") else ("sum",):
                found = taylor(view, structure, order=order, granularity=granularity, reduction=reduction)
                wanted = slow_taylor(model, gradients, structure, order, granularity, reduction)
                # sums of opposite signs lose digits: norms and softmax are computed in float32, however the model is loaded
                assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6 * max(wanted))


def test_only_the_sums_that_the_options_ask_for_are_needed() -> None:
    part = find_part("unit-score", "taylor")
    assert part.objective == "loss"
    model, windows = tiny.make_model("llama"), draw_windows(2, 8)
    for order, granularity in product(ORDERS, ("element", "vector")):
        options = part.bind({"order": order, "granularity": granularity})
        needs = part.needed(options)
        assert needs < part.needs
        for view, structures in views(model, windows, set(needs), part.objective):
            for structure in structures:
                assert part.function(view, structure, **options).shape == (structure.count,)
    with pytest.raises(InputError, match="takes one of first, second, mix"):
        part.bind({"order": "third"})


def mask_derivatives(model: PreTrainedModel, windows: Windows, structure: Structure) -> Tensor:
    """|∂loss/∂m| for a mask m of ones on the consumer's inputs, [in]."""
    mask = torch.ones(structure.consumer.in_features, dtype=torch.float64, requires_grad=True)
    consumer = model.get_submodule(structure.consumer.full_name)
    handle = consumer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask,))
    losses = [objective_of(model, windows, number, "loss") for number in range(len(windows))]
    (derivative,) = torch.autograd.grad(torch.stack(losses).mean(), mask)
    handle.remove()
    return derivative.abs()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_consumers_vector_score_is_the_derivative_by_a_mask(family: str) -> None:
    model = tiny.make_model(family, dtype=torch.float64)
    windows = draw_windows(3, 10)
    for view, structures in views(model, windows, {"gradient_signed"}, "loss"):
        for structure in structures:
            found = taylor(view, structure, granularity="vector", reduction="last")
            wanted = structure.by_unit(mask_derivatives(model, windows, structure))
            assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-6 * float(wanted.max()))


def all_scores(model: PreTrainedModel, structure: Structure, windows: Windows) -> list[Tensor]:
    """Every Taylor score of a structure, and NIRVANA's."""
    view = views(model, windows, set(GRADIENTS), "loss")[structure.block][0]
    scores = [
        taylor(view, structure, order=order, granularity=granularity, reduction=reduction)
        for order, granularity, reduction in product(ORDERS, ("element", "vector"), JOINS)
    ]
    output = views(model, windows, {"gradient_abs"}, "output")[structure.block][0]
    return [*scores, nirvana(output, structure)]


@pytest.mark.parametrize("place", [0, 1])
def test_a_unit_that_nothing_reads_scores_zero_and_its_removal_changes_nothing(place: int) -> None:
    model = tiny.make_model("llama", dtype=torch.float64)
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    structure = structures[1][place]
    weight = weight_in(model, structure.consumer)
    weight[:, structure.inputs(torch.tensor([1]))] = 0
    windows = draw_windows(3, 10)
    for scores in all_scores(model, structure, windows):
        assert float(scores[1]) == 0
        assert (scores[torch.arange(structure.count) != 1] > 0).all()
    blocks = list(Plan.whole(structures).blocks)
    kept = tuple(unit for unit in range(structure.count) if unit != 1)
    blocks[1] = {**blocks[1], structure.name: kept}
    with torch.inference_mode():
        dense = model(windows.ids).logits
        with masked(model, source.anatomy, structures, Plan(tuple(blocks))):
            assert torch.equal(model(windows.ids).logits, dense)


def test_a_key_value_heads_score_counts_its_own_query_heads_and_no_others() -> None:
    # LLM-Pruner's code adds up query heads k, k + 2, ... for key-value head k of two: heads 0 and 1 are dead here
    model = tiny.make_model("llama", dtype=torch.float64)
    structure = find_structures(model, ResidentModel(model).anatomy)[0][0]
    assert (structure.count, structure.size) == (2, 16)
    model.model.layers[0].self_attn.o_proj.weight.data[:, :16] = 0
    for scores in all_scores(model, structure, draw_windows(3, 10)):
        assert float(scores[0]) == 0
        assert float(scores[1]) > 0


def test_channels_that_are_alike_score_alike() -> None:
    model = tiny.make_model("llama", dtype=torch.float64)
    mlp = model.model.layers[1].mlp
    for weight in (mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.t()):
        weight[7] = weight[3]
    structure = find_structures(model, ResidentModel(model).anatomy)[1][1]
    for scores in all_scores(model, structure, draw_windows(3, 10)):
        assert float(scores[7]) == pytest.approx(float(scores[3]), rel=1e-6)
