"""The lemmas behind the scores, checked against objectives written out with explicit X and Y (see docs/theory.md).

The objective of removing weights is g(Ŵ) = ‖X(Ŵ−W)ᵀ‖_F + ‖(Ŵ−W)ᵀY‖_F, for a weight W [out, in] and any X [·, in] and Y [out, ·].
Here it is computed as such, matrix by matrix, and compared with what the registered parts say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.parts import find_part
from prunekit.recipe import Pattern
from prunekit.sparsify.patterns import Selection
from prunekit.sparsify.scores.ri import relative
from prunekit.sparsify.scores.stochastic import sample_indices
from prunekit.statistics import Statistics

few = settings(deadline=None, max_examples=25, database=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)
patterns = st.sampled_from(["0.3", "0.5", "0.9", "2:4", "1:4", "3:4"])
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed: int, out: int, width: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [out, in], its inputs [tokens, in] and outputs [tokens, out], of very different scales by channel."""
    scale = draw(seed + 2, width).exp()
    weight, inputs = draw(seed, out, width), draw(seed + 1, tokens, width) * scale
    return weight, inputs, inputs @ weight.t()


def measured(weight: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> Statistics:
    outputs = inputs @ weight.t() if outputs is None else outputs
    sums = {
        "input_sum": inputs.sum(0),
        "input_square": inputs.square().sum(0),
        "output_square": outputs.square().sum(0),
    }
    return Statistics(len(inputs), sums, weight=weight)


def score(name: str, weight: Tensor, stats: Statistics, seed: int = 0, **options: Any) -> Tensor:
    part = find_part("score", name)
    given_options = part.bind(options)
    if part.random:
        given_options["generator"] = torch.Generator().manual_seed(seed)
    found: Tensor = part.function(weight, stats, **given_options)
    return found


def keep(scores: Tensor, pattern: str, group: Any = "row") -> Tensor:
    return Selection(Pattern.parse(pattern), group).mask(scores)


def frobenius(matrix: Tensor) -> float:
    return math.sqrt(math.fsum(value * value for value in matrix.flatten().tolist()))


def sides(weight: Tensor, kept: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    """‖X·Δᵀ‖_F and ‖Δᵀ·Y‖_F of Δ = the removed weights: inputs x [·, in], outputs y [out, ·]."""
    change = torch.where(kept, 0, -weight)
    return frobenius(x @ change.t()), frobenius(change.t() @ y)


def objective(weight: Tensor, kept: Tensor, x: Tensor, y: Tensor) -> float:
    return sum(sides(weight, kept, x, y))


def one_by_one(weight: Tensor, g: Callable[[Tensor, int, int], float]) -> Tensor:
    """What `g(kept, k, j)` says of removing the weight (k, j) alone: [out, in]."""
    found = torch.empty_like(weight)
    for k in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            kept = torch.ones_like(weight, dtype=torch.bool)
            kept[k, j] = False
            found[k, j] = g(kept, k, j)
    return found


def alone(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return one_by_one(weight, lambda kept, k, j: objective(weight, kept, x, y))


def nothing(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


# Lemma 3.1 and what follows from it


@few
@given(seeds, sizes, sizes)
def test_lemma_3_1_removing_one_weight_costs_its_score(seed: int, out: int, width: int) -> None:
    weight, inputs, outputs = linear(seed, out, width)
    found = score("symwanda", weight, measured(weight, inputs, outputs))
    assert_close(found, alone(weight, inputs, outputs.t()))


@few
@given(seeds, sizes, sizes, st.floats(0.01, 10), st.floats(0.01, 10))
def test_lambdas_scale_x_and_y(seed: int, out: int, width: int, lambda_in: float, lambda_out: float) -> None:
    weight, inputs, outputs = linear(seed, out, width)
    found = score("symwanda", weight, measured(weight, inputs, outputs), lambda_in=lambda_in, lambda_out=lambda_out)
    assert_close(found, alone(weight, lambda_in * inputs, lambda_out * outputs.t()))


@few
@given(seeds, sizes, sizes, st.floats(0, 1))
def test_removing_several_weights_costs_at_most_the_sum_of_their_scores(
    seed: int, out: int, width: int, share: float
) -> None:
    weight, inputs, outputs = linear(seed, out, width)
    scores = score("symwanda", weight, measured(weight, inputs, outputs))
    kept = torch.rand(out, width, generator=torch.Generator().manual_seed(seed)) < share
    assert objective(weight, kept, inputs, outputs.t()) <= float(scores[~kept].sum()) * (1 + 1e-12)


def test_the_bound_is_not_an_equality() -> None:
    weight = torch.ones(1, 2, dtype=torch.float64)
    inputs = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # what the two weights do cancels
    scores = score("wanda", weight, measured(weight, inputs))
    removed = torch.zeros(1, 2, dtype=torch.bool)
    assert objective(weight, removed, inputs, nothing(1, 1)) == 0
    assert float(scores.sum()) == 2


@few
@given(seeds, sizes, sizes)
def test_the_squared_objective_is_that_of_rss(seed: int, out: int, width: int) -> None:
    weight, inputs, outputs = linear(seed, out, width)
    stats = measured(weight, inputs, outputs)

    def squared(kept: Tensor, k: int, j: int) -> float:
        of_inputs, of_outputs = sides(weight, kept, inputs, outputs.t())
        return of_inputs**2 + of_outputs**2

    found = score("symwanda", weight, stats, combine="rss")
    assert_close(found.square(), one_by_one(weight, squared))
    own = score("symmetric", weight, stats, combine="rss")

    def squared_own(kept: Tensor, k: int, j: int) -> float:
        of_inputs, of_outputs = sides(weight, kept, weight, weight)
        return of_inputs**2 + of_outputs**2

    assert_close(own.square(), one_by_one(weight, squared_own))


def test_squared_and_unsquared_objectives_rank_differently() -> None:
    weight = torch.tensor([[1.0, 0.57]], dtype=torch.float64)
    norms = {"input_square": torch.tensor([9.0, 64.0]), "output_square": torch.tensor([16.0])}
    stats = Statistics(1, norms, weight=weight, dtype=torch.float64)
    plain, squared = score("symwanda", weight, stats)[0], score("symwanda", weight, stats, combine="rss")[0]
    assert plain[0] > plain[1]  # 1·(3 + 4) and 0.57·(8 + 4)
    assert squared[0] < squared[1]  # 1·√(9 + 16) and 0.57·√(64 + 16)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_the_squared_input_side_is_a_sum_over_outputs(seed: int, out: int, width: int) -> None:
    weight, inputs, _ = linear(seed, out, width)
    kept = draw(seed + 5, out, width) > 0
    whole = sides(weight, kept, inputs, nothing(out, 1))[0] ** 2
    by_rows = [sides(weight[k : k + 1], kept[k : k + 1], inputs, nothing(1, 1))[0] ** 2 for k in range(out)]
    assert math.isclose(whole, math.fsum(by_rows), rel_tol=1e-10, abs_tol=1e-12)


# Table 1: which X and Y make which method


@few
@given(seeds, sizes, sizes)
def test_x_and_y_of_magnitude_wanda_owanda_and_symmetric(seed: int, out: int, width: int) -> None:
    weight, inputs, outputs = linear(seed, out, width)
    stats = measured(weight, inputs, outputs)
    no_x, no_y = nothing(1, width), nothing(out, 1)
    identity = torch.eye(width, dtype=torch.float64)
    assert_close(score("magnitude", weight, stats), alone(weight, identity, no_y))
    assert_close(score("wanda", weight, stats), alone(weight, inputs, no_y))
    assert_close(score("owanda", weight, stats), alone(weight, no_x, outputs.t()))
    # the paper's W is our Wᵀ, so its X = Wᵀ [c, b] is our W [out, in]: its columns are the weight's columns. Y = Wᵀ likewise
    assert_close(score("symmetric", weight, stats), alone(weight, weight, weight))


@few
@given(seeds, sizes, sizes)
def test_theorem_3_5_both_choices_of_x_and_y_give_ri(seed: int, out: int, width: int) -> None:
    weight, inputs, _ = linear(seed, out, width)
    found = score("ri", weight, measured(weight, inputs))
    columns, rows = weight.abs().sum(0), weight.abs().sum(1)
    # constant columns of X and rows of Y, of as many entries as the weight has inputs and outputs
    x = torch.ones(width, 1, dtype=torch.float64) / (math.sqrt(width) * columns)
    y = torch.ones(1, out, dtype=torch.float64) / (math.sqrt(out) * rows[:, None])
    assert_close(found, alone(weight, x, y))
    assert_close(found, alone(weight, torch.diag(1 / columns), torch.diag(1 / rows)))


@few
@given(seeds, sizes, sizes, st.sampled_from([0.25, 0.5, 1.0]))
def test_lemma_3_6_ria_pair_by_pair(seed: int, out: int, width: int, alpha: float) -> None:
    """Y depends on the column of the weight that is removed, so there is one objective for every weight."""
    weight, inputs, _ = linear(seed, out, width)
    columns, rows, norms = weight.abs().sum(0), weight.abs().sum(1), inputs.norm(dim=0)

    def pairwise(kept: Tensor, k: int, j: int) -> float:
        return objective(weight, kept, torch.diag(norms**alpha / columns), torch.diag(norms[j] ** alpha / rows))

    found = score("ria", weight, measured(weight, inputs), alpha=alpha)
    assert_close(found, one_by_one(weight, pairwise))


def test_ria_is_no_objective_of_one_x_and_y() -> None:
    """Lemma 3.1 makes score/|W| a number of the row plus one of the column; RIA's is not such a sum."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    stats = measured(weight, torch.tensor([[1.0, 4.0]], dtype=torch.float64))

    def cross_difference(name: str) -> float:
        ratio = score(name, weight, stats) / weight
        return float(ratio[0, 0] + ratio[1, 1] - ratio[0, 1] - ratio[1, 0])

    assert abs(cross_difference("ri")) < 1e-15
    assert abs(cross_difference("symwanda")) < 1e-13
    assert abs(cross_difference("ria")) > 0.1


def test_ri_is_no_squared_objective_of_one_x_and_y() -> None:
    """There it is the square of score/|W| that would be a number of the row plus one of the column."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    square = (score("ri", weight, Statistics(0, {}, weight=weight)) / weight).square()
    assert abs(float(square[0, 0] + square[1, 1] - square[0, 1] - square[1, 0])) > 0.01


@few
@given(seeds, sizes, sizes)
def test_lemma_3_7_diagonal_x_and_y_scale_channels(seed: int, out: int, width: int) -> None:
    weight, x, y = draw(seed, out, width), draw(seed + 1, width), draw(seed + 2, out)
    stats = Statistics(1, {"input_square": x.square(), "output_square": y.square()}, weight=weight)
    assert_close(score("symwanda", weight, stats), alone(weight, torch.diag(x), torch.diag(y)))


@few
@given(seeds, sizes, sizes, st.sampled_from([0, 0.5, 1, 2, 3.5, "inf"]))
def test_lemmas_3_8_and_3_9_lp_norms_along_any_unit_vector(seed: int, out: int, width: int, p: float | str) -> None:
    weight, inputs, _ = linear(seed, out, width)
    found = score("lp-ria", weight, measured(weight, inputs), p=p, alpha=0)
    of_columns = [float(torch.linalg.vector_norm(column, float(p))) for column in weight.t()]
    of_rows = [float(torch.linalg.vector_norm(row, float(p))) for row in weight]
    # 3.8: the weight's own columns and rows, scaled
    x = torch.stack([w / (w.norm() * norm) for w, norm in zip(weight.t(), of_columns, strict=True)], 1)
    y = torch.stack([w / (w.norm() * norm) for w, norm in zip(weight, of_rows, strict=True)])
    assert_close(found, alone(weight, x, y))
    # 3.9: random unit vectors of any length, another for every channel
    unit_x, unit_y = draw(seed + 3, 5, width), draw(seed + 4, out, 3)
    x = unit_x / unit_x.norm(dim=0) / torch.tensor(of_columns, dtype=torch.float64)
    y = unit_y / unit_y.norm(dim=1, keepdim=True) / torch.tensor(of_rows, dtype=torch.float64)[:, None]
    assert_close(found, alone(weight, x, y))


@few
@given(seeds, sizes, sizes, st.floats(0.05, 1), st.sampled_from(["per-axis", "min"]))
def test_lemma_3_10_stochastic_ri_of_given_index_sets(
    seed: int, out: int, width: int, beta: float, tau_mode: str
) -> None:
    weight = draw(seed, out, width)
    found = score(
        "stochastic-ri", weight, Statistics(0, {}, weight=weight), seed, beta=beta, tau_mode=tau_mode, rescale=False
    )
    if tau_mode == "min":
        of_row = of_column = max(1, int(beta * min(out, width) + 1e-9))
    else:
        of_row, of_column = math.ceil(beta * width - 1e-9), math.ceil(beta * out - 1e-9)
    generator = torch.Generator().manual_seed(seed)  # draws again what the part drew; where all are summed nothing is
    everything = torch.arange(max(out, width))
    inputs = sample_indices(out, width, of_row, generator) if of_row < width else everything[:width].expand(out, -1)
    outputs = (
        sample_indices(width, out, of_column, generator) if of_column < out else everything[:out].expand(width, -1)
    )
    x, y = nothing(out, width), nothing(out, width)  # column j of X lives on S_j, row k of Y on S_k
    row, column = nothing(out), nothing(width)
    for j in range(width):
        column[j] = weight[outputs[j], j].abs().sum()
        x[outputs[j], j] = 1 / (math.sqrt(of_column) * column[j])
    for k in range(out):
        row[k] = weight[k, inputs[k]].abs().sum()
        y[k, inputs[k]] = 1 / (math.sqrt(of_row) * row[k])
    assert_close(found, alone(weight, x, y))
    assert_close(found, relative(weight, row, column))


# What the scores are of each other


@few
@given(seeds, patterns, st.sampled_from(["row", "layer"]))
def test_symwanda_without_outputs_is_wanda_and_without_inputs_owanda(seed: int, pattern: str, group: str) -> None:
    weight, inputs, outputs = linear(seed, 5, 8)
    no_outputs = measured(weight, inputs, nothing(9, 5))
    no_inputs = measured(weight, nothing(9, 8), outputs)
    for options in ({}, {"combine": "rss"}):  # by the data, to the bit; by λ = 0 see test_scores.py
        found = score("symwanda", weight, no_outputs, **options)
        assert torch.equal(found, score("wanda", weight, no_outputs))
        assert torch.equal(keep(found, pattern, group), keep(score("wanda", weight, no_outputs), pattern, group))
        assert torch.equal(score("symwanda", weight, no_inputs, **options), score("owanda", weight, no_inputs))


@few
@given(seeds, patterns)
def test_owanda_within_a_row_is_magnitude(seed: int, pattern: str) -> None:
    weight, inputs, outputs = linear(seed, 5, 8)
    stats = measured(weight, inputs, outputs)
    magnitude = score("magnitude", weight, stats)
    assert torch.equal(keep(score("owanda", weight, stats), pattern), keep(magnitude, pattern))


def test_owanda_over_the_layer_is_not_magnitude() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    stats = Statistics(1, {"output_square": torch.tensor([100.0, 1.0], dtype=torch.float64)}, weight=weight)
    found = keep(score("owanda", weight, stats), "0.5", "layer")
    assert found.tolist() == [[True, True], [False, False]]
    assert keep(weight.abs(), "0.5", "layer").tolist() == [[False, False], [True, True]]


@few
@given(seeds, patterns)
def test_symwanda_within_a_row_tends_to_magnitude_where_outputs_rule(seed: int, pattern: str) -> None:
    weight, inputs, outputs = linear(seed, 5, 8)
    stats = measured(weight, inputs, outputs)
    found = score("symwanda", weight, stats, lambda_out=1e9)
    assert torch.equal(keep(found, pattern), keep(score("magnitude", weight, stats), pattern))


@few
@given(seeds, patterns, st.floats(0.01, 100))
def test_wanda_of_equal_norms_is_magnitude_and_scale_does_not_matter(seed: int, pattern: str, scale: float) -> None:
    weight, inputs, _ = linear(seed, 5, 8)
    equal = inputs / inputs.norm(dim=0)
    magnitude = keep(score("magnitude", weight, measured(weight, inputs)), pattern)
    assert torch.equal(keep(score("wanda", weight, measured(weight, equal)), pattern), magnitude)
    found = keep(score("wanda", weight, measured(weight, inputs)), pattern)
    assert torch.equal(keep(score("wanda", weight, measured(weight, scale * inputs)), pattern), found)


@few
@given(seeds, st.sampled_from(["wanda", "ria", "symwanda", "stade", "lp-ria", "symmetric"]))
def test_scores_follow_their_channels_and_not_the_order_of_tokens(seed: int, name: str) -> None:
    weight, inputs, outputs = linear(seed, 5, 8)
    generator = torch.Generator().manual_seed(seed)
    tokens, columns, rows = (torch.randperm(n, generator=generator) for n in (9, 8, 5))
    found = score(name, weight, measured(weight, inputs, outputs))
    assert_close(score(name, weight, measured(weight, inputs[tokens], outputs[tokens])), found, rtol=1e-8)
    moved = weight[rows][:, columns]
    assert_close(
        score(name, moved, measured(moved, inputs[:, columns], outputs[:, rows])), found[rows][:, columns], rtol=1e-8
    )
    if name != "symmetric":
        kept = keep(found, "0.5")
        assert torch.equal(keep(found[rows][:, columns], "0.5"), kept[rows][:, columns])


@few
@given(seeds, sizes, sizes)
def test_ri_adds_up_to_the_number_of_channels(seed: int, out: int, width: int) -> None:
    weight = draw(seed, out, width)
    stats = Statistics(0, {}, weight=weight)
    assert math.isclose(float(score("ri", weight, stats).sum()), out + width, rel_tol=1e-12)
    no_column, no_row = torch.zeros(width), torch.zeros(out)
    row_part, column_part = (
        relative(weight, weight.abs().sum(1), no_column),
        relative(weight, no_row, weight.abs().sum(0)),
    )
    assert_close(row_part.sum(1), torch.ones(out, dtype=torch.float64))
    assert_close(column_part.sum(0), torch.ones(width, dtype=torch.float64))


@few
@given(seeds, sizes, sizes)
def test_ria_without_activations_is_ri_also_on_dead_inputs(seed: int, out: int, width: int) -> None:
    weight, inputs, _ = linear(seed, out, width)
    inputs[:, 0] = 0
    stats = measured(weight, inputs)
    found = score("ri", weight, stats)
    assert torch.equal(score("ria", weight, stats, alpha=0), found)
    assert torch.equal(score("lp-ria", weight, stats, alpha=0), found)
    assert not score("ria", weight, stats)[:, 0].any()


@few
@given(seeds, st.floats(1e-6, 1e6))
def test_ri_does_not_see_the_scale_of_the_weight(seed: int, scale: float) -> None:
    weight = draw(seed, 5, 8)
    found = score("ri", weight, Statistics(0, {}, weight=weight))
    assert_close(score("ri", scale * weight, Statistics(0, {}, weight=scale * weight)), found)
    rows = draw(seed + 1, 5, 1).exp()
    no_column = torch.zeros(8)
    row_term = relative(weight, weight.abs().sum(1), no_column)
    assert_close(relative(rows * weight, (rows * weight).abs().sum(1), no_column), row_term)


def test_ri_sees_the_scale_of_a_row() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    scaled = weight * torch.tensor([[10.0], [1.0]], dtype=torch.float64)
    before = score("ri", weight, Statistics(0, {}, weight=weight))
    after = score("ri", scaled, Statistics(0, {}, weight=scaled))
    assert not torch.allclose(before, after)
    assert before[0, 0] < before[1, 0]
    assert after[0, 0] > after[1, 0]


@few
@given(seeds, patterns, st.sampled_from(["row", "layer"]))
def test_lp_of_p_0_is_magnitude_where_no_weight_is_0(seed: int, pattern: str, group: str) -> None:
    weight, inputs, _ = linear(seed, 5, 8)
    stats = measured(weight, inputs)
    found = score("lp-ria", weight, stats, p=0, alpha=0)
    assert torch.equal(keep(found, pattern, group), keep(weight.abs(), pattern, group))


@few
@given(seeds, sizes, sizes)
def test_stochastic_ri_of_everything_is_ri(seed: int, out: int, width: int) -> None:
    weight, inputs, _ = linear(seed, out, width)
    stats = measured(weight, inputs)
    for options in ({}, {"rescale": False}, {"shared_index": True}):
        assert torch.equal(score("stochastic-ri", weight, stats, seed, beta=1, **options), score("ri", weight, stats))
        assert torch.equal(score("stochastic-ria", weight, stats, seed, beta=1, **options), score("ria", weight, stats))


@few
@given(seeds, sizes, st.booleans())
def test_a_common_tau_of_everything_is_ri_on_square_weights_only(seed: int, size: int, rescale: bool) -> None:
    options: dict[str, Any] = {"beta": 1, "tau_mode": "min", "rescale": rescale}
    square = draw(seed, size, size)
    stats = Statistics(0, {}, weight=square)
    assert torch.equal(score("stochastic-ri", square, stats, **options), score("ri", square, stats))
    for wide in (draw(seed, size, size + 2), draw(seed, size + 2, size)):
        stats = Statistics(0, {}, weight=wide)
        assert not torch.allclose(score("stochastic-ri", wide, stats, **options), score("ri", wide, stats))


@few
@given(seeds, patterns)
def test_stade_of_centred_inputs_is_wanda(seed: int, pattern: str) -> None:
    weight, inputs, _ = linear(seed, 5, 8)
    centred = inputs - inputs.mean(0)
    stats = measured(weight, centred)
    found = keep(score("stade", weight, stats), pattern)
    assert torch.equal(found, keep(score("wanda", weight, stats), pattern))
    moved = measured(weight, centred + 3)  # a mean that a bias could take up
    assert torch.equal(keep(score("stade", weight, moved), pattern), found)


@few
@given(seeds, st.integers(2, 9))
def test_stade_and_the_mean_make_wanda_with_the_biased_variance_only(seed: int, tokens: int) -> None:
    weight, inputs, _ = linear(seed, 4, 6, tokens)
    stats = measured(weight, inputs)
    squared_mean = weight.square() * stats.input_mean.square()
    biased = score("stade", weight, stats) * (tokens - 1) / tokens + squared_mean
    assert_close(biased * tokens, score("wanda", weight, stats).square())
    assert not torch.allclose(
        (score("stade", weight, stats) + squared_mean) * tokens, score("wanda", weight, stats).square(), rtol=1e-9
    )


# Masks

SCORES = [
    "magnitude",
    "wanda",
    "owanda",
    "symwanda",
    "symmetric",
    "ri",
    "ria",
    "lp-ria",
    "stochastic-ri",
    "stochastic-ria",
    "stade",
]


@few
@given(seeds, st.sampled_from(SCORES), st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4)]))
def test_every_group_keeps_exactly_k_of_g(seed: int, name: str, pattern: tuple[int, int]) -> None:
    weight, inputs, outputs = linear(seed, 5, 16)
    kept_of, group = pattern
    found = keep(score(name, weight, measured(weight, inputs, outputs), seed), f"{kept_of}:{group}")
    assert (found.reshape(5, -1, group).sum(2) == kept_of).all()
    assert found.sum(1).eq(16 * kept_of // group).all(), "which is a row's exact share too"


@few
@given(seeds, st.sampled_from(SCORES), patterns, st.sampled_from(["row", "layer"]))
def test_pruning_again_changes_nothing(seed: int, name: str, pattern: str, group: str) -> None:
    """Removed weights score 0, and what is kept scores more, whatever its norms have become."""
    weight, inputs, outputs = linear(seed, 5, 8)
    options = {"beta": 1} if name.startswith("stochastic") else {}  # a sum may miss all that is left
    kept = keep(score(name, weight, measured(weight, inputs, outputs), **options), pattern, group)
    pruned = weight * kept
    again = score(name, pruned, measured(pruned, inputs, outputs), **options)
    assert torch.equal(keep(again, pattern, group), kept)
