"""Each score is its formula, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prunekit.errors import InputError, PrunekitError
from prunekit.parts import find_part, parts
from prunekit.statistics import INPUT_SUMS, OUTPUT_SUMS, Statistics


def draw(rows: int = 5, columns: int = 7, seed: int = 0) -> tuple[Tensor, Statistics, list[list[float]]]:
    """A weight, the statistics of random inputs, and those inputs as lists."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(11, columns, generator=generator, dtype=torch.float64).tolist()
    squares = [math.fsum(x[j] ** 2 for x in inputs) for j in range(columns)]
    return weight, Statistics(11, {"input_square": torch.tensor(squares, dtype=torch.float64)}), inputs


def score(name: str, weight: Tensor, stats: Statistics) -> Tensor:
    found: Tensor = find_part("score", name).function(weight, stats)
    return found


def test_magnitude_is_the_absolute_value_and_looks_at_no_data() -> None:
    weight, _, _ = draw()
    found = score("magnitude", weight, Statistics(0, {}))
    assert found.tolist() == [[abs(value) for value in row] for row in weight.tolist()]


def test_wanda_is_magnitude_times_input_norm() -> None:
    weight, stats, inputs = draw()
    found = score("wanda", weight, stats)
    norms = [math.sqrt(math.fsum(x[j] ** 2 for x in inputs)) for j in range(7)]
    expected = [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_wanda_of_constant_norms_is_magnitude() -> None:
    weight, _, _ = draw()
    stats = Statistics(1, {"input_square": torch.full((7,), 16.0, dtype=torch.float64)})
    assert torch.equal(score("wanda", weight, stats), 4 * weight.abs())


def test_wanda_follows_scaled_inputs() -> None:
    weight, stats, _ = draw()
    scaled = Statistics(11, {"input_square": 9 * stats.input_square})
    torch.testing.assert_close(score("wanda", weight, scaled), 3 * score("wanda", weight, stats))


def test_wanda_gives_a_dead_input_no_importance() -> None:
    weight, stats, _ = draw()
    squares = stats.input_square.clone()
    squares[3] = 0
    found = score("wanda", weight, Statistics(11, {"input_square": squares}))
    assert not found[:, 3].any()
    assert found[:, :3].all()


@pytest.mark.parametrize("name", sorted(parts("score")))
def test_every_score_declares_what_it_reads_and_keeps_its_promises(name: str) -> None:
    part = find_part("score", name)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, generator=generator)
    inputs = torch.randn(40, 8, generator=generator)
    everything = {
        "input_sum": inputs.sum(0),
        "input_square": inputs.square().sum(0),
        "input_abs": inputs.abs().sum(0),
        "output_square": (inputs @ weight.t()).square().sum(0),
        "gram": inputs.t() @ inputs,
    }
    assert everything.keys() == INPUT_SUMS | OUTPUT_SUMS
    declared = Statistics(40, {need: everything[need] for need in part.needs})
    before = weight.clone()
    found = part.function(weight, declared)  # reading anything else would raise
    assert found.shape == weight.shape
    assert torch.isfinite(found).all()
    assert torch.equal(weight, before), "a score only looks"
    assert part.summary.endswith(".")
    assert part.paper.startswith("https://")
    for need in part.needs:
        with pytest.raises(PrunekitError, match=f"'{need}' was not measured"):
            part.function(weight, Statistics(40, {other: everything[other] for other in part.needs - {need}}))
    if part.rowwise and not part.needs & OUTPUT_SUMS:  # rows can be scored on their own
        alone = torch.cat([part.function(weight[row : row + 1], declared) for row in range(6)])
        assert torch.equal(alone, found)


def test_an_unknown_score_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="score 'wonda' is unknown: did you mean 'wanda'"):
        find_part("score", "wonda")


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"'score\.alpha' is not an option of score 'wanda'"):
        find_part("score", "wanda").bind({"alpha": 0.5})
