"""NIRVANA's score by loops over whole-model gradients."""

from __future__ import annotations

import pytest
import torch

import tiny
from prunekit.parts import find_part
from whole import draw_windows, unit_parts, views, weight_in, window_gradients


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "gemma2"])
def test_a_unit_scores_the_sum_of_its_weights_first_order_effects_on_the_output(family: str) -> None:
    model = tiny.make_model(family, dtype=torch.float64)
    windows = draw_windows(3, 10)
    part = find_part("unit-score", "nirvana")
    assert part.objective == "output"
    gradients = {name: each.mean(0) for name, each in window_gradients(model, windows, "output").items()}
    for view, structures in views(model, windows, set(part.needed({})), part.objective):
        for structure in structures:
            wanted = []
            for unit in range(structure.count):
                total = 0.0
                for linear, entries, columns in unit_parts(model, structure, unit):
                    effect = (linear.matrix(weight_in(model, linear)) * gradients[linear.full_name]).abs()
                    for entry in entries:
                        total += float((effect[:, entry] if columns else effect[entry]).sum())
                wanted.append(total)
            assert part.function(view, structure).tolist() == pytest.approx(wanted, rel=1e-5)
