"""Refinements against slow, obvious re-statements, and what they promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.errors import InputError
from prunekit.parts import find_part, parts
from prunekit.sparsify.patterns import keep_groups, keep_largest
from prunekit.sparsify.refine import _swapping
from prunekit.statistics import Statistics

NAMES = ["dsnot", "r2-dsnot", "swaps"]
GROUPS = [None, (2, 4), (4, 8), (1, 4), (3, 4)]
# R²-DSnoT with everything that makes it differ from DSnoT turned off
PLAIN = {"relative": "none", "gamma_grow": 0.0, "gamma_prune": 0.0, "alpha": 1.0}

Groups = tuple[int, int] | None


def draw(
    rows: int = 6, columns: int = 32, seed: int = 0, *, shift: float = 0.7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Statistics]:
    """A weight and the statistics of inputs whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    spread = 0.2 + torch.rand(columns, generator=generator, dtype=torch.float64)
    mean = shift * torch.randn(columns, generator=generator, dtype=torch.float64)
    inputs = mean + spread * torch.randn(40, columns, generator=generator, dtype=torch.float64)
    return weight, measure(inputs, weight).to(dtype)


def measure(inputs: Tensor, weight: Tensor) -> Statistics:
    sums = {"input_sum": inputs.sum(0), "input_square": inputs.square().sum(0), "gram": inputs.t() @ inputs}
    return Statistics(len(inputs), sums, weight=weight)


def wanda_mask(weight: Tensor, stats: Statistics, groups: Groups = None, sparsity: float = 0.5) -> Tensor:
    scores = weight.abs() * stats.input_norm
    if groups is not None:
        return keep_groups(scores, *groups)
    return keep_largest(scores, math.floor(weight.shape[1] * sparsity))


def refined(
    name: str, weight: Tensor, keep: Tensor, stats: Statistics, groups: Groups = None, **options: Any
) -> Tensor:
    part = find_part("refine", name)
    found: Tensor = part.function(weight, keep, stats, groups, **part.bind(options))
    return found


def drift_error(weight: Tensor, keep: Tensor, stats: Statistics) -> Tensor:
    """E of every row, recomputed."""
    return (weight.double() * stats.input_mean.double() * ~keep).sum(1)


def output_loss(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    gone = weight.double() * ~keep
    return ((gone @ gram.double()) * gone).sum(1)


def slow_swaps(
    drift: list[float],
    keep: list[bool],
    grow: list[float],
    prune: list[float],
    groups: Groups,
    *,
    steps: int = 50,
    epsilon: float = 1e-3,
    accept: str = "official",
) -> list[bool]:
    """One row, one swap after another, each candidate looked at anew."""
    columns = range(len(drift))
    size = len(drift) if groups is None else groups[1]
    mask, moved = list(keep), set[int]()
    error = start = math.fsum(drift[j] for j in columns if not keep[j])
    for _ in range(steps):
        if not abs(error) > epsilon * abs(start):
            break
        sign = math.copysign(1, error)

        free = [j for j in columns if j not in moved]
        removable = {
            j: [i for i in free if keep[i] and i // size == j // size and (groups is not None or sign * drift[i] < 0)]
            for j in free
        }
        to_grow = [j for j in free if not keep[j] and sign * drift[j] > 0 and removable[j]]
        if not to_grow:
            break
        g = min(to_grow, key=lambda j: (-np.float32(grow[j]), j))
        q = min(removable[g], key=lambda j: (np.float32(prune[j]), j))
        after = error - drift[g] + drift[q]
        if groups is not None and math.copysign(1, after) * (after != 0) != math.copysign(1, start):
            break
        if accept == "monotone" and not abs(after) < abs(error):
            break
        mask[g], mask[q], error = True, False, after
        moved |= {g, q}
    return mask


def dsnot_terms(weight: Tensor, stats: Statistics, power: float = 1.0) -> tuple[list[list[float]], ...]:
    mean, var, norm = stats.input_mean.tolist(), stats.input_variance.tolist(), stats.input_norm.tolist()
    w = weight.tolist()
    columns = range(len(mean))
    drift = [[row[j] * mean[j] for j in columns] for row in w]
    grow = [[abs(row[j] * mean[j] / var[j] ** power) for j in columns] for row in w]
    prune = [[abs(row[j]) * norm[j] for j in columns] for row in w]
    return drift, grow, prune


def r2_terms(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    *,
    alpha: float,
    relative: str,
    gammas: tuple[float, float],
    p: float,
) -> tuple[list[list[float]], ...]:
    mean, var, norm = stats.input_mean.tolist(), stats.input_variance.tolist(), stats.input_norm.tolist()
    w = weight.tolist()
    columns = range(len(mean))
    by_column = [math.fsum(abs(row[j]) for row in w) for j in columns]
    drift = [[row[j] * mean[j] for j in columns] for row in w]
    importance = [[1 / by_column[j] + 1 / math.fsum(map(abs, row)) for j in columns] for row in w]
    masked = (weight * keep).tolist()
    size = [math.fsum(abs(row[j]) ** p for row in masked) ** (1 / p) for j in columns]
    typical = math.fsum(size) / len(size)
    grow, prune = [], []
    for row, ri in zip(w, importance, strict=True):
        g = [abs(row[j] * mean[j] / var[j]) * (ri[j] if relative == "grow" else 1) for j in columns]
        q = [abs(row[j]) * norm[j] ** alpha * (ri[j] if relative == "prune" else 1) for j in columns]
        grow.append([v + gammas[0] * size[j] / typical * math.fsum(g) / len(g) for j, v in enumerate(g)])
        prune.append([v + gammas[1] * size[j] / typical * math.fsum(q) / len(q) for j, v in enumerate(q)])
    return drift, grow, prune


def by_hand(terms: tuple[list[list[float]], ...], keep: Tensor, groups: Groups, **options: Any) -> list[list[bool]]:
    drift, grow, prune = terms
    return [slow_swaps(*row, groups, **options) for row in zip(drift, keep.tolist(), grow, prune, strict=True)]


@pytest.mark.parametrize("accept", ["official", "monotone"])
@pytest.mark.parametrize("groups", [*GROUPS, (2, 16)])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_dsnot_is_its_definition_row_by_row(groups: Groups, accept: str, steps: int) -> None:
    moved = 0
    for seed in range(4):
        weight, stats = draw(seed=seed)
        keep = wanda_mask(weight, stats, groups)
        options = {"steps": steps, "accept": accept}
        found = refined("dsnot", weight, keep, stats, groups, **options)
        assert found.tolist() == by_hand(dsnot_terms(weight, stats), keep, groups, **options)
        moved += int((found != keep).sum())
    assert moved > 0


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_the_variance_power_counts(power: float) -> None:
    weight, stats = draw(seed=3)
    keep = wanda_mask(weight, stats)
    found = refined("dsnot", weight, keep, stats, variance_power=power, steps=4)
    assert found.tolist() == by_hand(dsnot_terms(weight, stats, power), keep, None, steps=4)


@pytest.mark.parametrize("groups", [None, (2, 4)])
@pytest.mark.parametrize("relative", ["none", "grow", "prune"])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.0, 0.5), (2.0, 0.0), (1.0, 3.0)])
def test_r2_dsnot_is_its_definition_row_by_row(groups: Groups, relative: str, gammas: tuple[float, float]) -> None:
    for seed in range(2):
        weight, stats = draw(rows=8, seed=seed)
        keep = wanda_mask(weight, stats, groups)
        terms = r2_terms(weight, keep, stats, alpha=0.5, relative=relative, gammas=gammas, p=2)
        options = {"relative": relative, "gamma_grow": gammas[0], "gamma_prune": gammas[1], "steps": 5}
        found = refined("r2-dsnot", weight, keep, stats, groups, **options)
        assert found.tolist() == by_hand(terms, keep, groups, steps=5)


@pytest.mark.parametrize("p", [0.0, 1.0, 3.0, math.inf])
def test_any_norm_regularises(p: float) -> None:
    weight, stats = draw(rows=40)
    keep = wanda_mask(weight, stats)
    found = refined("r2-dsnot", weight, keep, stats, gamma_prune=5.0, p=p)
    assert found.sum(1).tolist() == keep.sum(1).tolist()
    assert not torch.equal(found, refined("r2-dsnot", weight, keep, stats, gamma_prune=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", GROUPS)
def test_r2_dsnot_without_its_additions_is_dsnot(groups: Groups, dtype: torch.dtype) -> None:
    weight, stats = draw(rows=30, columns=64, dtype=dtype)
    keep = wanda_mask(weight, stats, groups)
    assert torch.equal(
        refined("r2-dsnot", weight, keep, stats, groups, **PLAIN), refined("dsnot", weight, keep, stats, groups)
    )


@pytest.mark.parametrize("groups", [None, (2, 4)])
def test_the_row_axis_regulariser_changes_nothing(groups: Groups) -> None:
    weight, stats = draw(rows=30, columns=64, dtype=torch.float32)
    keep = wanda_mask(weight, stats, groups)
    without = refined("r2-dsnot", weight, keep, stats, groups, gamma_grow=0.0, gamma_prune=0.0)
    for gamma in (1e-4, 1.0, 1e6):
        along = {"gamma_grow": gamma, "gamma_prune": gamma}
        assert torch.equal(refined("r2-dsnot", weight, keep, stats, groups, reg_axis="row", **along), without)
    assert not torch.equal(refined("r2-dsnot", weight, keep, stats, groups, reg_axis="col", **along), without)


def test_dsnot_as_published_is_not_monotone() -> None:
    weight, stats = draw(rows=32, columns=64, seed=1)
    keep = wanda_mask(weight, stats)
    errors = [
        drift_error(weight, refined("dsnot", weight, keep, stats, steps=steps), stats).abs() for steps in range(12)
    ]
    rises = torch.stack([after > before for before, after in itertools.pairwise(errors)])
    assert rises.any()
    assert (errors[-1] > errors[0]).any()  # for one row even the end is worse than the start


@pytest.mark.parametrize("name", ["dsnot", "r2-dsnot"])
@pytest.mark.parametrize("groups", GROUPS)
def test_monotone_swaps_never_raise_the_error(name: str, groups: Groups) -> None:
    weight, stats = draw(rows=32, columns=64, seed=1)
    keep = wanda_mask(weight, stats, groups)
    before = drift_error(weight, keep, stats).abs()
    for steps in range(1, 12):
        moved = refined(name, weight, keep, stats, groups, steps=steps, accept="monotone")
        after = drift_error(weight, moved, stats).abs()
        assert (after <= before + 1e-12).all()
        before = after
    assert before.mean() < 0.9 * drift_error(weight, keep, stats).abs().mean()


def test_a_swap_beyond_the_end_of_a_row_changes_no_other() -> None:
    """More steps than there are weights: rows that run out stop, and none loses or gains a weight."""
    weight, stats = draw(rows=32, columns=16)
    for sparsity in (0.1, 0.5, 0.9):
        keep = wanda_mask(weight, stats, sparsity=sparsity)
        found = refined("dsnot", weight, keep, stats, steps=1000, epsilon=0.0)
        assert torch.equal(found.sum(1), keep.sum(1))
        assert found.tolist() == by_hand(dsnot_terms(weight, stats), keep, None, steps=1000, epsilon=0.0)


def test_a_finished_row_stays_as_it_is() -> None:
    """One row starts at E = 0 exactly, one has nothing pruned of its error's sign; the rest goes on."""
    weight = torch.tensor([[1.0, -1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 3.0], [1.0, 1.0, -2.0, -3.0]], dtype=torch.float64)
    sums = {"input_sum": torch.full((4,), 8.0), "input_square": torch.full((4,), 16.0)}
    keep = torch.tensor([[False, False, True, True]] * 3)
    found = refined("dsnot", weight, keep, Statistics(8, sums), None)
    assert found.tolist() == [[False, False, True, True], [False, False, True, True], [True, False, False, True]]


def test_rows_stop_at_epsilon() -> None:
    weight, stats = draw(rows=20)
    keep = wanda_mask(weight, stats)
    assert torch.equal(refined("dsnot", weight, keep, stats, epsilon=1.0), keep)
    start = drift_error(weight, keep, stats).abs()
    one = drift_error(weight, refined("dsnot", weight, keep, stats, steps=1), stats).abs()
    near = refined("dsnot", weight, keep, stats, epsilon=0.3)
    stopped = one <= 0.3 * start
    assert stopped.any()
    assert torch.equal(near[stopped], refined("dsnot", weight, keep, stats, steps=1)[stopped])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", GROUPS)
def test_no_steps_is_the_mask_itself(name: str, groups: Groups) -> None:
    weight, stats = draw()
    keep = wanda_mask(weight, stats, groups)
    found = refined(name, weight, keep, stats, groups, steps=0)
    assert torch.equal(found, keep)
    assert found is not keep


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([*GROUPS, (0, 4), (4, 4)]),
    st.floats(0, 1),
    st.integers(0, 20),
    st.integers(0, 1000),
)
def test_counts_are_kept_and_inputs_untouched(
    name: str, rows: int, eighths: int, groups: Groups, sparsity: float, steps: int, seed: int
) -> None:
    weight, stats = draw(rows, 8 * eighths, seed, dtype=torch.float32)
    keep = wanda_mask(weight, stats, groups, sparsity)
    weight_before, keep_before = weight.clone(), keep.clone()
    sums_before = [stats.input_mean.clone(), stats.gram.clone()]
    found = refined(name, weight, keep, stats, groups, steps=steps)
    assert found.dtype == torch.bool
    assert torch.equal(found.sum(1), keep.sum(1))
    if groups is not None:
        assert (found.reshape(-1, groups[1]).sum(1) == groups[0]).all()
    assert torch.equal(weight, weight_before)
    assert torch.equal(keep, keep_before)
    assert torch.equal(stats.input_mean, sums_before[0])
    assert torch.equal(stats.gram, sums_before[1])


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_different_counts_keep_theirs(name: str) -> None:
    weight, stats = draw(rows=12)
    scores = weight.abs() * stats.input_norm
    keep = keep_largest(scores.reshape(1, -1), 12 * 16).reshape(12, 32)
    keep[0], keep[1] = True, False
    found = refined(name, weight, keep, stats)
    assert torch.equal(found.sum(1), keep.sum(1))
    assert not torch.equal(found, keep)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [None, (2, 4)])
def test_dead_and_constant_inputs(name: str, groups: Groups) -> None:
    weight, _ = draw(rows=8, columns=16, dtype=torch.float32)
    inputs = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs[:, 2:6] = 0
    inputs[:, 9] = 3
    stats = measure(inputs.double(), weight).to(torch.float32)
    keep = wanda_mask(weight, stats, groups)
    found = refined(name, weight, keep, stats, groups)
    assert torch.equal(found.sum(1), keep.sum(1))
    assert not torch.equal(found, keep)
    if groups is None and name != "swaps":
        assert torch.equal(found[:, 2:6], keep[:, 2:6])  # they cannot change E
    dead = measure(torch.zeros(30, 16, dtype=torch.float64), weight).to(torch.float32)
    assert torch.equal(refined(name, weight, keep, dead, groups), keep)


def test_a_pruned_constant_input_is_grown_first() -> None:
    """Its variance is rounding, not 0: it is the steadiest there is, and its key is a number."""
    inputs = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 5] = 2
    weight = torch.ones(1, 8, dtype=torch.float64)
    weight[0, :4] = -3 * inputs.sum(0)[:4].sign()
    keep = torch.tensor([[True] * 4 + [False] * 4])
    found = refined("dsnot", weight, keep, measure(inputs, weight), steps=1)
    assert found[0, 5]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", GROUPS)
def test_all_weights_equal(name: str, groups: Groups) -> None:
    """Ties everywhere: the lower index goes first, every time."""
    weight = torch.ones(4, 16)
    inputs = torch.tensor([[1.0, -1.0] * 8, [3.0, -3.0] * 8], dtype=torch.float64)
    stats = measure(inputs, weight).to(torch.float32)
    keep = wanda_mask(weight, stats, groups)
    keep[1] = keep[0].flip(0)
    found = refined(name, weight, keep, stats, groups)
    assert torch.equal(found.sum(1), keep.sum(1))
    assert torch.equal(found[2], found[3])
    if name == "dsnot" and groups is not None:
        assert found.tolist() == by_hand(dsnot_terms(weight, stats), keep, groups)


def test_ties_go_to_the_lower_index() -> None:
    weight = torch.ones(1, 8)
    weight[0, 4:] = -1
    sums = {"input_sum": torch.full((8,), 8.0), "input_square": torch.full((8,), 16.0)}
    keep = torch.tensor([[False, False, False, True, False, True, True, True]])
    found = refined("dsnot", weight, keep, Statistics(8, sums), steps=1)
    assert found.tolist() == [[True, False, False, True, False, False, True, True]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.99, 1.0])
def test_extreme_sparsities_and_a_single_row(name: str, sparsity: float) -> None:
    weight, stats = draw(rows=1, columns=200)
    keep = wanda_mask(weight, stats, sparsity=sparsity)
    found = refined(name, weight, keep, stats)
    assert int(found.sum()) == int(keep.sum())
    if sparsity in (0.0, 1.0):
        assert torch.equal(found, keep)


@pytest.mark.parametrize("name", ["dsnot", "r2-dsnot"])
@pytest.mark.parametrize("groups", [None, (2, 4), (1, 8)])
def test_chunks_change_nothing(name: str, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = draw(rows=37, columns=48, dtype=torch.float32)
    keep = wanda_mask(weight, stats, groups)
    whole = refined(name, weight, keep, stats, groups)
    monkeypatch.setattr("prunekit.bits._CHUNK", 400)
    monkeypatch.setattr(_swapping, "_AT_ONCE", 150)
    assert torch.equal(refined(name, weight, keep, stats, groups), whole)
    if find_part("refine", name).rowwise:
        for rows in (slice(0, 1), slice(5, 20), slice(36, 37)):
            assert torch.equal(refined(name, weight[rows], keep[rows], stats, groups), whole[rows])


def best_swap(weight: Tensor, keep: Tensor, gram: Tensor, groups: Groups) -> tuple[float, Tensor]:
    """Of one row: the lowest loss one swap away and its mask, by computing every loss."""
    size = len(weight) if groups is None else groups[1]
    best = (math.inf, keep)
    for u in torch.nonzero(~keep).flatten().tolist():
        for v in torch.nonzero(keep).flatten().tolist():
            if u // size == v // size:
                other = keep.clone()
                other[u], other[v] = True, False
                best = min(best, (float(output_loss(weight[None], other[None], gram)), other), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("groups", [None, (2, 4), (1, 4), (4, 8)])
def test_swaps_take_the_best_pair_every_step(groups: Groups) -> None:
    for seed in range(3):
        weight, stats = draw(rows=5, columns=8, seed=seed)
        keep = wanda_mask(weight, stats, groups)
        expected = keep.clone()
        for steps in range(1, 5):
            for row, one in enumerate(weight):
                loss, mask = best_swap(one, expected[row], stats.gram, groups)
                if loss < output_loss(one[None], expected[row][None], stats.gram) * (1 - 1e-9):
                    expected[row] = mask
            found = refined("swaps", weight, keep, stats, groups, steps=steps)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", [None, (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_swaps_never_raise_the_loss(groups: Groups, dtype: torch.dtype, shift: float) -> None:
    weight, stats = draw(rows=20, columns=64, shift=shift, dtype=dtype)
    keep = wanda_mask(weight, stats, groups)
    before = output_loss(weight, keep, stats.gram)
    for steps in (1, 2, 5, 25, 100):
        found = refined("swaps", weight, keep, stats, groups, steps=steps, candidates=8)
        after = output_loss(weight, found, stats.gram)
        assert (after <= before).all()
        before = after
    assert before.mean() < 0.9 * output_loss(weight, keep, stats.gram).mean()


def test_more_candidates_than_inputs_are_all_pairs() -> None:
    weight, stats = draw(rows=10, columns=24)
    keep = wanda_mask(weight, stats)
    every = refined("swaps", weight, keep, stats, candidates=24)
    assert torch.equal(refined("swaps", weight, keep, stats, candidates=10**6), every)
    for row, one in enumerate(weight):  # the end is where no single swap helps
        loss, _ = best_swap(one, every[row], stats.gram, None)
        assert loss >= output_loss(one[None], every[row][None], stats.gram) * (1 - 1e-5)


def test_swaps_leave_what_is_best_alone() -> None:
    """With a diagonal gram matrix the smallest |W|·‖x‖ of a row are the best to prune."""
    weight, stats = draw(rows=10, columns=24)
    diagonal = Statistics(stats.count, {"gram": stats.gram.diagonal().diag()})
    keep = wanda_mask(weight, stats)
    assert torch.equal(refined("swaps", weight, keep, diagonal), keep)
    worst = ~wanda_mask(weight, stats)
    assert torch.equal(refined("swaps", weight, worst, diagonal, steps=12), keep)


def test_swaps_of_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = draw(rows=20, columns=32)
    keep = wanda_mask(weight, stats)
    whole = refined("swaps", weight, keep, stats, candidates=4)
    monkeypatch.setattr("prunekit.bits._CHUNK", 100)
    assert torch.equal(refined("swaps", weight, keep, stats, candidates=4), whole)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dsnot", "accept", "always"),
        ("dsnot", "steps", 1.5),
        ("dsnot", "alpha", 0.5),
        ("r2-dsnot", "relative", "both"),
        ("r2-dsnot", "p", -1.0),
        ("r2-dsnot", "reg_axis", "rows"),
        ("swaps", "candidates", "all"),
    ],
)
def test_unknown_options_and_values_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(InputError, match=option):
        find_part("refine", name).bind({option: value})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dsnot", "steps", -1),
        ("dsnot", "epsilon", math.nan),
        ("dsnot", "variance_power", math.inf),
        ("r2-dsnot", "gamma_prune", -1e-4),
        ("r2-dsnot", "gamma_grow", math.inf),
        ("r2-dsnot", "alpha", -0.5),
        ("swaps", "candidates", 0),
        ("swaps", "tolerance", -1.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, option: str, value: Any) -> None:
    weight, stats = draw()
    with pytest.raises(InputError, match=f"refine.{option}"):
        refined(name, weight, wanda_mask(weight, stats), stats, **{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_every_refinement_says_what_it_is(name: str) -> None:
    part = parts("refine")[name]
    assert part.summary.endswith(".")
    assert part.paper.startswith("https://arxiv.org/abs/")


def test_what_is_computed_by_rows_is_declared() -> None:
    rowwise: Callable[[str], bool] = lambda name: find_part("refine", name).rowwise  # noqa: E731
    assert [rowwise(name) for name in NAMES] == [True, False, True]
