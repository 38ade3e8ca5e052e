"""Compensation against loops and solvers in float64, and the promise that least squares is never worse than leaving columns out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from prunekit.errors import InputError, PrunekitWarning
from prunekit.shrink.compensate.bias import bias
from prunekit.shrink.compensate.least_squares import least_squares
from prunekit.statistics import Statistics


def make(tokens: int = 40, outputs: int = 5, inputs: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=draw, dtype=torch.float64) @ mix + 0.5
    return x, torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)


def measured(x: Tensor) -> Statistics:
    return Statistics(len(x), {"gram": x.t() @ x, "input_sum": x.sum(0)})


def lost(x: Tensor, w: Tensor, keep: Tensor, new: Tensor, added: Tensor | None = None) -> float:
    out = x[:, keep] @ new.t() + (0 if added is None else added)
    return float((out - x @ w.t()).square().sum())


def test_least_squares_is_the_minimiser() -> None:
    x, w = make()
    keep = torch.tensor([0, 2, 3, 6])
    new, added = least_squares(w, keep, measured(x), damping=0.0)
    wanted = torch.linalg.lstsq(x[:, keep], x @ w.t()).solution.t()
    assert added is None
    torch.testing.assert_close(new, wanted)


def test_the_error_left_is_the_schur_complement() -> None:
    x, w = make()
    keep, gone = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5, 7, 8])
    new, _ = least_squares(w, keep, measured(x), damping=0.0)
    g = x.t() @ x
    schur = g[gone][:, gone] - g[gone][:, keep] @ torch.linalg.solve(g[keep][:, keep], g[keep][:, gone])
    assert lost(x, w, keep, new) == pytest.approx(float((w[:, gone] @ schur @ w[:, gone].t()).trace()))


def test_it_is_theorem_three_and_where_admm_ends() -> None:
    x, w = make(inputs=6)
    keep, gone = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5])
    new, _ = least_squares(w, keep, measured(x), damping=0.0)
    g = x.t() @ x
    # theorem 3 of Numerical Pruning: δ = −(2G)⁻¹ M (Mᵀ (2G)⁻¹ M)⁻¹ Mᵀ W, in the paper's layout
    inverse = torch.linalg.inv(2 * g)
    delta = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w.t()[gone])
    whole = w.t() + delta
    torch.testing.assert_close(whole[keep].t(), new)
    assert float(whole[gone].abs().max()) < 1e-10
    # equations 6 to 9 of Search for Efficient LLMs
    rho = 20.0
    kept = torch.zeros(6, 1, dtype=torch.float64)
    kept[keep] = 1
    z, u = w.t().clone(), torch.zeros_like(w.t())
    for _ in range(4000):
        v = torch.linalg.solve(g + rho * torch.eye(6, dtype=torch.float64), g @ w.t() + rho * (z - u))
        z = (v + u) * kept
        u = u + v - z
    torch.testing.assert_close(z[keep].t(), new, rtol=1e-5, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(seed=some.integers(0, 50), damping=some.floats(0.0, 100.0), kept=some.sets(some.integers(0, 8), min_size=1))
def test_it_is_never_worse_than_leaving_out(seed: int, damping: float, kept: set[int]) -> None:
    x, w = make(tokens=12 if seed % 2 else 40, seed=seed)
    keep = torch.tensor(sorted(kept))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrunekitWarning)
        new, _ = least_squares(w, keep, measured(x), damping=damping)
    assert lost(x, w, keep, new) <= lost(x, w, keep, w[:, keep]) * (1 + 1e-9) + 1e-9


def test_with_nothing_removed_weights_are_what_they_were() -> None:
    x, w = make()
    new, _ = least_squares(w, torch.arange(9), measured(x), damping=0.5)
    assert torch.equal(new, w)


def test_a_duplicate_channel_takes_over_all_of_its_twin() -> None:
    x, w = make()
    x[:, 7] = x[:, 3]
    keep = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])
    new, _ = least_squares(w, keep, measured(x), damping=0.0)
    wanted = w[:, keep].clone()
    wanted[:, 3] += w[:, 7]
    torch.testing.assert_close(new, wanted)


def test_the_order_of_channels_does_not_matter() -> None:
    x, w = make()
    keep = torch.tensor([0, 2, 3, 6])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    moved = torch.tensor([int((order == unit).nonzero()) for unit in keep]).sort().values
    first, _ = least_squares(w, keep, measured(x), damping=0.01)
    second, _ = least_squares(w[:, order], moved, measured(x[:, order]), damping=0.01)
    by_channel = {int(order[place]): second[:, number] for number, place in enumerate(moved)}
    torch.testing.assert_close(torch.stack([by_channel[int(unit)] for unit in keep], 1), first)


def test_channels_that_were_never_fed_do_no_harm() -> None:
    x, w = make()
    x[:, [2, 5]] = 0
    new, _ = least_squares(w, torch.tensor([0, 2, 3]), measured(x), damping=0.0)
    assert bool(torch.isfinite(new).all())
    torch.testing.assert_close(new[:, 1], w[:, 2])


def test_a_matrix_that_cannot_be_factorised_gets_more_damping_and_says_so() -> None:
    x, w = make()
    x[:, 1] = x[:, 0]
    gram = x.t() @ x
    gram[0, 0] *= 1 - 1e-6
    stats = Statistics(len(x), {"gram": gram})
    with pytest.warns(PrunekitWarning, match="not positive definite with damping 0: took 0.0001"):
        new, _ = least_squares(w, torch.tensor([0, 1, 2]), stats, damping=0.0)
    assert bool(torch.isfinite(new).all())
    with pytest.raises(InputError, match=r"not positive definite: .* --set compensate\.damping=1"):
        least_squares(w, torch.tensor([0, 1, 2]), Statistics(len(x), {"gram": -gram}), damping=0.0)


def test_the_damping_is_the_one_that_does_best_on_the_other_half() -> None:
    # many inputs and few tokens: what fits the first half closely does badly on the second
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(2, 24, 20, generator=draw, dtype=torch.float64)
    w = torch.randn(5, 20, generator=draw, dtype=torch.float64)
    keep = torch.arange(0, 20, 2)
    first, rest = x[0], x[1]
    gram = first.t() @ first + rest.t() @ rest
    stats = Statistics(48, {"gram": gram, "half_gram": first.t() @ first})
    found, _ = least_squares(w, keep, stats)
    errors = {}
    for damping in (0.03, 0.1, 0.3, 1.0):
        fitted, _ = least_squares(w, keep, measured(first), damping=damping)
        errors[damping] = lost(rest, w, keep, fitted)
    best = min(errors, key=errors.__getitem__)
    wanted, _ = least_squares(w, keep, Statistics(48, {"gram": gram}), damping=best)
    assert torch.equal(found, wanted)
    assert best > 0.03


def aimed_at(x: Tensor, y: Tensor, halves: int | None = None) -> Statistics:
    sums = {"gram": x.t() @ x, "target": y.t() @ x}
    if halves is not None:
        sums |= {"half_gram": x[:halves].t() @ x[:halves], "half_target": y[:halves].t() @ x[:halves]}
    return Statistics(len(x), sums)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_aimed_at_the_dense_model_it_is_the_minimiser_of_that(damping: float) -> None:
    x, w = make()
    y = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)) @ w.t()
    keep = torch.tensor([0, 2, 3, 6])
    new, added = least_squares(w, keep, aimed_at(x, y), damping=damping, target="dense")
    assert added is None
    weight = damping * (x[:, keep].square().sum(0)).mean()
    # ridge regression towards the kept columns, as a plain system of equations
    rows = torch.cat([x[:, keep], weight.sqrt() * torch.eye(4, dtype=x.dtype)])
    wanted = torch.cat([y, weight.sqrt() * w[:, keep].t()])
    torch.testing.assert_close(new, torch.linalg.lstsq(rows, wanted).solution.t(), rtol=1e-7, atol=1e-8)
    error = (x[:, keep] @ new.t() - y).square().sum()
    assert float(error) <= float((x[:, keep] @ w[:, keep].t() - y).square().sum())


def test_where_nothing_was_removed_before_the_dense_model_is_no_other_target() -> None:
    x, w = make()
    keep = torch.tensor([0, 2, 3, 6])
    own, _ = least_squares(w, keep, measured(x), damping=0.1)
    dense, _ = least_squares(w, keep, aimed_at(x, x @ w.t()), damping=0.1, target="dense")
    torch.testing.assert_close(dense, own, rtol=1e-9, atol=1e-10)


def test_the_damping_towards_the_dense_model_does_best_on_the_other_half() -> None:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(48, 20, generator=draw, dtype=torch.float64)
    w = torch.randn(5, 20, generator=draw, dtype=torch.float64)
    y = (x + 0.5 * torch.randn(48, 20, generator=draw, dtype=torch.float64)) @ w.t()
    keep = torch.arange(0, 20, 2)
    found, _ = least_squares(w, keep, aimed_at(x, y, 24), target="dense")
    errors = {}
    for damping in (0.03, 0.1, 0.3, 1.0):
        fitted, _ = least_squares(w, keep, aimed_at(x[:24], y[:24]), damping=damping, target="dense")
        errors[damping] = float((x[24:, keep] @ fitted.t() - y[24:]).square().sum())
    best = min(errors, key=errors.__getitem__)
    wanted, _ = least_squares(w, keep, aimed_at(x, y), damping=best, target="dense")
    assert torch.equal(found, wanted)


def test_bias_puts_means_in_the_place_of_what_is_gone() -> None:
    x, w = make()
    keep, gone = [0, 2, 3, 6], [1, 4, 5, 7, 8]
    new, added = bias(w, torch.tensor(keep), measured(x))
    assert torch.equal(new, w[:, keep])
    assert added is not None
    for i in range(len(w)):
        assert float(added[i]) == pytest.approx(sum(float(w[i, j]) * float(x[:, j].mean()) for j in gone))
    x[:, gone] = x[:1, gone]  # constant: the bias says all of it
    new, added = bias(w, torch.tensor(keep), measured(x))
    assert lost(x, w, torch.tensor(keep), new, added) == pytest.approx(0, abs=1e-18)
