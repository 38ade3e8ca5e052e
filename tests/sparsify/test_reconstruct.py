"""Reconstructions against what they mean: a removal at a time with explicit inverses, and normal equations solved by themselves."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.errors import InputError, PrunekitWarning
from prunekit.normal import damped, inverse_factor
from prunekit.parts import find_part, parts
from prunekit.recipe import Pattern
from prunekit.sparsify.patterns import Selection
from prunekit.sparsify.reconstruct.alps import alps
from prunekit.sparsify.reconstruct.least_squares import least_squares
from prunekit.sparsify.reconstruct.sparsegpt import sparsegpt
from prunekit.sparsify.scores.wanda import wanda
from prunekit.statistics import Statistics

SOLVERS = sorted(parts("reconstruct"))


def draw(rows: int = 6, columns: int = 12, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A weight and the statistics of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return weight, of(torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix)


def of(inputs: Tensor) -> Statistics:
    return Statistics(len(inputs), {"gram": inputs.t() @ inputs, "input_square": inputs.square().sum(0)})


def select(pattern: str | float, group: str = "row") -> Selection:
    return Selection(Pattern.parse(pattern), group)  # type: ignore[arg-type]


def loss(weight: Tensor, found: Tensor, matrix: Tensor) -> float:
    """Σ over rows of (w̃ − w) M (w̃ − w)ᵀ."""
    difference = found - weight
    return float((difference @ matrix * difference).sum())


def slow_obs(weight: Tensor, keep: Tensor, matrix: Tensor) -> tuple[Tensor, float]:
    """Columns from left to right: where a weight goes, the ones to its right move by the optimal brain surgeon's formula.

    The inverse is that of the columns from the present one on, taken afresh each time. Also the sum of what each removal costs.
    """
    found, cost = weight.clone(), 0.0
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(matrix[column:, column:])
        for row in range(weight.shape[0]):
            if not keep[row, column]:
                value = found[row, column].clone()
                cost += float(value**2 / inverse[0, 0])
                found[row, column:] -= value / inverse[0, 0] * inverse[0]
                found[row, column] = 0
    return found, cost


def test_the_factor_is_that_of_the_inverse_and_its_diagonal_belongs_to_the_columns_to_come() -> None:
    _, stats = draw()
    matrix = damped(stats.gram, 0.01, "reconstruct.damping")
    assert torch.equal(matrix, stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(12, dtype=torch.float64))
    factor = inverse_factor(stats.gram, 0.01, "score.damping")
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(matrix), rtol=1e-9, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    for column in range(12):
        expected = torch.linalg.inv(matrix[column:, column:])[0, 0]
        assert float(factor[column, column]) ** 2 == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("block", [1, 5, 128])
def test_sparsegpt_on_a_given_mask_is_one_removal_after_the_other(block: int) -> None:
    weight, stats = draw()
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(3)) > 0.5
    found, kept = sparsegpt(weight, keep, stats, select(0.5), block=block)
    expected, cost = slow_obs(weight, keep, damped(stats.gram, 0.01, "reconstruct.damping"))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(kept, keep)
    # what the removals cost adds up to the quadratic loss of the damped problem
    assert loss(weight, found, damped(stats.gram, 0.01, "reconstruct.damping")) == pytest.approx(cost, rel=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "4:6"])
def test_sparsegpt_chooses_each_group_from_weights_that_make_up_for_the_groups_before(pattern: str) -> None:
    weight, stats = draw()
    found, kept = sparsegpt(weight, None, stats, select(pattern), block=8)
    matrix = damped(stats.gram, 0.01, "reconstruct.damping")
    wanted, group = map(int, pattern.split(":"))
    keep = torch.ones(6, 12, dtype=torch.bool)
    for start in range(0, 12, group):
        present, _ = slow_obs(weight, keep, matrix)
        for row in range(6):
            costs = [
                float(present[row, column] ** 2 / torch.linalg.inv(matrix[column:, column:])[0, 0])
                for column in range(start, start + group)
            ]
            for place in sorted(range(group), key=lambda place, costs=costs: costs[place])[: group - wanted]:
                keep[row, start + place] = False
    assert torch.equal(kept, keep)
    torch.testing.assert_close(found, slow_obs(weight, keep, matrix)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.99])
def test_sparsegpt_meets_a_fraction_block_by_block_with_exact_totals(group: str, sparsity: float) -> None:
    weight, stats = draw(rows=7, columns=13)
    pattern = Pattern.parse(sparsity)
    found, kept = sparsegpt(weight, None, stats, select(sparsity, group), block=4)
    assert torch.equal(found != 0, kept)
    for end in (4, 8, 12, 13):
        if group == "row":
            assert ((~kept[:, :end]).sum(1) == pattern.zeros(end)).all()
        else:
            assert int((~kept[:, :end]).sum()) == pattern.zeros(7 * end)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_sparsegpt_of_uncorrelated_inputs_is_wanda(pattern: str) -> None:
    weight, _ = draw()
    squares = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    stats = Statistics(9, {"gram": squares.diag(), "input_square": squares})
    found, kept = sparsegpt(weight, None, stats, select(pattern), damping=0.0)
    assert torch.equal(kept, select(pattern).mask(wanda(weight, stats)))
    assert torch.equal(found, weight * kept), "nothing can make up for anything"
    _, other = sparsegpt(weight, None, stats, select(pattern), damping=1e6)
    assert torch.equal(other, select(pattern).mask(weight.abs())), "damping hides the inputs"


def slow_least_squares(weight: Tensor, keep: Tensor, matrix: Tensor) -> Tensor:
    """Row by row: min ‖L(w̃ − w)‖² over the kept entries, L Lᵀ being the matrix, by a general solver."""
    root = torch.linalg.cholesky(matrix).t()
    found = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        columns = torch.nonzero(keep[row]).flatten()
        found[row, columns] = torch.linalg.lstsq(root[:, columns], root @ weight[row]).solution
    return found


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8])
def test_least_squares_is_the_best_that_a_mask_allows(sparsity: float) -> None:
    weight, stats = draw()
    keep = select(sparsity).mask(wanda(weight, stats))
    expected = slow_least_squares(weight, keep, damped(stats.gram, 0.01, "reconstruct.damping"))
    exact, kept = least_squares(weight, keep, stats, select(sparsity), solver="exact")
    torch.testing.assert_close(exact, expected, rtol=1e-7, atol=1e-9)
    assert kept is keep
    steps, _ = least_squares(weight, keep, stats, select(sparsity), steps=60)
    torch.testing.assert_close(steps, expected, rtol=1e-5, atol=1e-7)


def test_every_step_of_conjugate_gradients_lowers_the_loss_of_every_row() -> None:
    weight, stats = draw(rows=9, columns=30)
    matrix = damped(stats.gram, 0.01, "reconstruct.damping")
    keep = select(0.6).mask(wanda(weight, stats))
    before = None
    for steps in range(8):
        found, _ = least_squares(weight, keep, stats, select(0.6), steps=steps)
        difference = found - weight
        losses = (difference @ matrix * difference).sum(1)
        assert before is None or (losses <= before * (1 + 1e-12)).all()
        before = losses


def test_better_solvers_lose_less() -> None:
    weight, stats = draw(rows=24, columns=32, tokens=400)
    matrix = damped(stats.gram, 0.01, "reconstruct.damping")
    mask = select(0.6).mask(wanda(weight, stats))
    masked = loss(weight, weight * mask, matrix)
    updated = loss(weight, sparsegpt(weight, mask, stats, select(0.6))[0], matrix)
    refitted = loss(weight, least_squares(weight, mask, stats, select(0.6), solver="exact")[0], matrix)
    together = loss(weight, alps(weight, None, stats, select(0.6))[0], matrix)
    assert together < refitted < updated < masked


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["0.4", "0.75", "2:4", "1:4"]), st.sampled_from(["row", "layer"]))
def test_alps_ends_on_its_pattern(seed: int, pattern: str, group: str) -> None:
    weight, stats = draw(rows=5, columns=16, seed=seed)
    found, kept = alps(weight, None, stats, select(pattern, group))
    matrix = damped(stats.gram, 0.01, "reconstruct.damping")
    assert bool((found[~kept] == 0).all())
    zeros = Pattern.parse(pattern)
    if zeros.keep is not None:
        assert (kept.reshape(5, -1, 4).sum(-1) == zeros.keep).all()
    elif group == "row":
        assert ((~kept).sum(1) == zeros.zeros(16)).all()
    else:
        assert int((~kept).sum()) == zeros.zeros(80)
    plain = select(pattern, group).mask((weight * matrix.diagonal().sqrt()).abs())
    assert loss(weight, found, matrix) <= loss(weight, weight * plain, matrix) * (1 + 1e-9)


def test_alps_with_a_mask_only_polishes() -> None:
    weight, stats = draw()
    keep = select(0.5).mask(wanda(weight, stats))
    found, kept = alps(weight, keep, stats, select(0.5), polish=60)
    assert kept is keep
    torch.testing.assert_close(
        found, slow_least_squares(weight, keep, damped(stats.gram, 0.01, "reconstruct.damping")), rtol=1e-5, atol=1e-7
    )


def solve(name: str, weight: Tensor, stats: Statistics, selection: Selection) -> tuple[Tensor, Tensor]:
    part = find_part("reconstruct", name)
    keep = None if part.chooses else selection.mask(wanda(weight, stats))
    found: tuple[Tensor, Tensor] = part.function(weight, keep, stats, selection)
    return found


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("pattern", ["0.0", "0.5", "0.99", "2:4"])
@pytest.mark.parametrize(
    "kind", ["dead channels", "rank deficient", "one sample", "one row", "equal weights", "no input"]
)
def test_degenerate_input_gives_exact_counts_and_finite_weights(name: str, pattern: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1 if kind == "one row" else 5, 12, generator=generator)
    tokens = {"rank deficient": 4, "one sample": 1}.get(kind, 50)
    inputs = torch.randn(tokens, 12, generator=generator)
    if kind == "dead channels":
        inputs[:, [0, 3, 11]] = 0
    if kind == "no input":
        inputs[:] = 0
    if kind == "equal weights":
        weight[:] = 0.5
    before = weight.clone()
    found, kept = solve(name, weight, of(inputs), select(pattern))
    assert torch.isfinite(found).all()
    assert bool((found[~kept] == 0).all())
    zeros = Pattern.parse(pattern)
    if zeros.keep is not None:
        assert (kept.reshape(len(weight), -1, 4).sum(-1) == zeros.keep).all()
    else:
        assert ((~kept).sum(1) == zeros.zeros(12)).all()
    assert torch.equal(weight, before), "the input is left as it was"
    if pattern == "0.0":
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    if kind == "dead channels" and pattern == "0.5" and name == "sparsegpt":
        assert not kept[:, [0, 3]].any(), "what is never fed goes first"


def test_a_matrix_that_is_no_gram_matrix_is_damped_with_a_warning_or_refused() -> None:
    _, stats = draw()
    lifted = stats.gram - 0.05 * stats.gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    with pytest.warns(PrunekitWarning, match=r"not positive definite with damping 0\.001: took 0\.1"):
        factor = inverse_factor(lifted, 0.001, "score.damping")
    torch.testing.assert_close(
        factor.t() @ factor, torch.linalg.inv(damped(lifted, 0.1, "score.damping")), rtol=1e-8, atol=1e-12
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse_factor(stats.gram, 0.001, "score.damping")
    with pytest.raises(InputError, match=r"not positive definite: .* score\.damping=1 \(tried up to 10\)"):
        inverse_factor(torch.full((4, 4), math.nan), 0.01, "score.damping")
    with pytest.raises(InputError, match="not positive definite"):
        alps(torch.ones(3, 4), None, Statistics(9, {"gram": torch.full((4, 4), math.nan)}), select(0.5))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_reconstruction_declares_what_it_reads(name: str) -> None:
    part = find_part("reconstruct", name)
    weight, stats = draw()
    selection = select(0.5)
    keep = None if part.chooses else selection.mask(weight.abs())
    declared = Statistics(40, {need: getattr(stats, need) for need in part.needs})
    found, kept = part.function(weight, keep, declared, selection)
    assert found.shape == kept.shape == weight.shape
    assert part.summary.endswith(".")
    assert part.paper.startswith("https://")
    again, _ = part.function(weight, keep, declared, selection)
    assert torch.equal(again, found)
    if part.rowwise:  # rows can be solved on their own
        alone = torch.cat(
            [
                part.function(
                    weight[row : row + 1], None if keep is None else keep[row : row + 1], declared, selection
                )[0]
                for row in range(6)
            ]
        )
        torch.testing.assert_close(alone, found, rtol=1e-9, atol=1e-11)


def test_a_damping_below_0_is_refused() -> None:
    weight, stats = draw()
    with pytest.raises(InputError, match=r"'reconstruct\.damping' cannot be -0\.1"):
        sparsegpt(weight, None, stats, select(0.5), damping=-0.1)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sparsegpt", "block", 0),
        ("alps", "rho", 0.0),
        ("alps", "steps", 0),
        ("alps", "polish", -1),
        ("least-squares", "steps", -1),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(InputError, match=f"'reconstruct.{option}' cannot be {value}"):
        find_part("reconstruct", name).bind({option: value})
