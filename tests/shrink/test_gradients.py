"""Streamed gradients against autograd over the whole model, and the promises on memory and dtypes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from helpers import streamed
from prunekit.errors import InputError, PrunekitError
from prunekit.model import hidden
from prunekit.model.anatomy import Linear
from prunekit.model.source import ResidentModel, Source, StreamedModel
from prunekit.model.stream import Windows
from prunekit.shrink.gradients import GRADIENTS, measure_gradients
from prunekit.shrink.units import find_structures
from prunekit.shrink.view import BlockView, Gradients
from whole import draw_windows, entry_products, views, weight_in, window_gradients


def stored_in(source: StreamedModel, linear: Linear) -> Tensor:
    return source.stored[linear.index][source.key_of[f"{linear.full_name}.weight"]]


def measure(source: Source, windows: Windows, objective: str = "loss", **options: object) -> list[dict[str, Gradients]]:
    structures = find_structures(source.module, source.anatomy)
    needs = frozenset(options.pop("needs", GRADIENTS))
    stored = partial(stored_in, source) if isinstance(source, StreamedModel) else partial(weight_in, source.module)
    return measure_gradients(source, windows, structures, needs, objective, stored, **options)


def flat(found: list[dict[str, Gradients]]) -> dict[tuple[int, str, str, str], Tensor]:
    return {
        (index, linear, side, name): value
        for index, block in enumerate(found)
        for linear, gradients in block.items()
        for side, sums in (("rows", gradients.rows), ("columns", gradients.columns))
        for name, value in sums.items()
    }


def assert_near(
    found: dict[tuple[int, str, str, str], Tensor], wanted: dict[tuple[int, str, str, str], Tensor]
) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # norms and softmax are computed in float32, however the model is loaded
        assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


@pytest.mark.parametrize("objective", ["loss", "output"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_sums_are_those_of_autograd_over_the_whole_model(family: str, objective: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    windows = draw_windows(5, 12)
    gradients = window_gradients(model, windows, objective)
    source = streamed(tmp_path, torch.float64)
    found = flat(measure(source, windows, objective, batch=2))
    wanted = {}
    for block, structures in zip(source.anatomy.blocks, find_structures(model, source.anatomy), strict=True):
        for linear in block.linears:
            products = entry_products(linear.matrix(weight_in(model, linear)), gradients[linear.full_name])
            for structure in structures:
                for part in structure.slices:
                    if part.tensor == f"{linear.name}.weight":
                        side, axis = ("columns", 0) if linear.name == structure.name else ("rows", 1)
                        for name, values in products.items():
                            wanted[block.index, linear.name, side, name] = values.sum(axis)
    assert len(wanted) >= 3 * 2 * len(GRADIENTS)
    assert_near(found, wanted)


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_what_goes_together_does_not_matter(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ResidentModel(tiny.make_model("llama", dtype=torch.float64))
    windows = draw_windows(5, 12)
    at_once = flat(measure(source, windows, objective, batch=5))
    assert_near(flat(measure(source, windows, objective, batch=1)), at_once)
    monkeypatch.setattr("prunekit.shrink.gradients.chunk_tokens", lambda vocabulary: 20)  # five positions at a time
    monkeypatch.setattr("prunekit.bits._CHUNK", 100)  # three rows of a weight
    for batch in (2, 5):
        assert_near(flat(measure(source, windows, objective, batch=batch)), at_once)


def test_inputs_in_files_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path)
    source = streamed(tmp_path, torch.bfloat16)
    in_memory = flat(measure(source, draw_windows(3, 8), batch=2))
    monkeypatch.setattr(hidden, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(hidden.InMemory, "__init__", None)  # nothing is held there now
    in_files = flat(measure(source, draw_windows(3, 8), batch=2))
    assert all(torch.equal(in_files[key], value) for key, value in in_memory.items())


def test_inputs_that_take_more_than_the_weights_go_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path)
    source = streamed(tmp_path, torch.bfloat16)
    made: list[tuple[int, ...]] = []
    real = hidden.InFiles.__init__

    def noted(self: hidden.InFiles, shape: tuple[int, ...], *rest: Any) -> None:
        made.append(shape)
        real(self, shape, *rest)

    monkeypatch.setattr(hidden.InFiles, "__init__", noted)
    blocks, width = len(source.anatomy.blocks), source.module.config.hidden_size
    most = source.parameter_count // (blocks * width * 8)  # windows of eight tokens that take as much as the weights
    measure(source, draw_windows(most, 8), batch=8)
    assert made == []
    measure(source, draw_windows(most + 1, 8), batch=8)
    assert made == [(blocks * (most + 1), 8, width)], "and what goes from block to block stays in memory"


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_padding_takes_no_part(objective: str) -> None:
    model = tiny.make_model("llama", dtype=torch.float64)
    ids = draw_windows(3, 10).ids
    keep = torch.ones(3, 10, dtype=torch.bool)
    keep[1, 6:] = False
    keep[2, 1:] = False  # predicts nothing
    windows = Windows(ids, keep)
    found = flat(measure(ResidentModel(model), windows, objective, batch=3))
    alone = window_gradients(model, windows[:2], objective)
    for linear in ResidentModel(model).anatomy.linears():
        gradients = alone[linear.full_name]
        if objective == "loss":
            gradients = torch.cat([gradients, torch.zeros_like(gradients[:1])])
        else:
            last = window_gradients(model, windows[2:], objective)[linear.full_name]
            gradients = torch.cat([gradients, last])
        products = entry_products(weight_in(model, linear), gradients)
        for (index, name, side, what), value in found.items():
            if (index, name) == (linear.index, linear.name):
                expected = products[what].sum(1 if side == "rows" else 0)
                assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_more_than_two_blocks_are_in_memory_and_none_stays(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    source = streamed(tmp_path)
    counts: list[int] = []
    measure(source, draw_windows(3, 8), step=lambda: counts.append(len(source.stored)))
    assert len(counts) == 2 * len(source.anatomy.blocks)
    assert max(counts) == 1  # the last one, which is the first on the way back; besides, the next may be on its way
    assert not source.stored
    assert all(parameter.is_meta for parameter in source.module.parameters())


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = tiny.make_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    expected = flat(measure(source, draw_windows(3, 8)))
    with torch.inference_mode():  # callers may be in it
        stored = partial(weight_in, model)
        found = flat(measure_gradients(source, draw_windows(3, 8), structures, GRADIENTS, "loss", stored))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("objective", ["loss", "output"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_bits_but_nothing_vanishes(dtype: torch.dtype, objective: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    windows = draw_windows(4, 32)
    exact = flat(measure(streamed(tmp_path), windows, objective))
    found = flat(measure(streamed(tmp_path, dtype), windows, objective))
    for key, value in exact.items():
        if key[3] != "gradient_signed":  # of opposite signs
            assert (found[key] > 0).all()
            assert torch.corrcoef(torch.stack([found[key], value]))[0, 1] > 0.99, key


def test_only_what_is_needed_is_summed() -> None:
    found = measure(ResidentModel(tiny.make_model("llama")), draw_windows(2, 8), needs={"gradient_second"})
    assert set(found[0]["mlp.down_proj"].columns) == {"gradient_second"}
    assert not found[0]["mlp.down_proj"].rows
    assert not found[0]["mlp.up_proj"].columns
    with pytest.raises(ValueError, match="gram"):
        measure(ResidentModel(tiny.make_model("llama")), draw_windows(2, 8), needs={"gram"})
    with pytest.raises(ValueError, match="nothing"):
        measure(ResidentModel(tiny.make_model("llama")), draw_windows(2, 8), "nothing")


def test_gradients_beyond_a_dtype_are_refused() -> None:
    model = tiny.make_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4)  # logits still fit, sums of its rows do not
    with pytest.raises(InputError, match=r"behind the last block hold NaN or infinite values in torch\.float16"):
        measure(ResidentModel(model), draw_windows(2, 8), "output")


def test_a_linear_that_is_used_twice_is_refused() -> None:
    model = tiny.make_model("llama")
    mlp = model.model.layers[1].mlp
    once = mlp.forward
    mlp.forward = lambda states: once(states) + once(states)
    with pytest.raises(InputError, match=r"'mlp\.gate_proj' is used more than once"):
        measure(ResidentModel(model), draw_windows(2, 8))


def test_reading_what_was_not_measured_is_an_error() -> None:
    view, structures = views(tiny.make_model("llama"), draw_windows(2, 8), {"gradient_abs"}, "loss")[0]
    assert len(view.gradient_sums(structures[1], "gradient_abs")) == 3
    with pytest.raises(PrunekitError, match=r"'gradient_second' of 'mlp\.gate_proj' was not measured"):
        view.gradient_sums(structures[1], "gradient_second")
    with pytest.raises(PrunekitError, match=r"no gradients of 'mlp\.down_proj'"):
        BlockView(view.weights).gradient_sums(structures[1], "gradient_abs")
    assert view.weight("mlp.down_proj").dtype == torch.float32
