"""Each score is its formula, entry by entry."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit import bits
from prunekit.errors import InputError, PrunekitError
from prunekit.parts import find_part, parts
from prunekit.sparsify.scores import stochastic
from prunekit.sparsify.scores.stochastic import sample_indices
from prunekit.statistics import INPUT_SUMS, OUTPUT_SUMS, Statistics

assert_close = partial(torch.testing.assert_close, rtol=1e-13, atol=0)


def draw(rows: int = 5, columns: int = 7, seed: int = 0) -> tuple[Tensor, Statistics, list[list[float]]]:
    """A weight, the statistics of random inputs, and those inputs as lists."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(11, columns, generator=generator, dtype=torch.float64)
    return weight, measured(weight, inputs), inputs.tolist()


def measured(weight: Tensor, inputs: Tensor) -> Statistics:
    """All that can be known of a linear without bias, summed by Python."""
    columns = inputs.t().tolist()
    outputs = [[math.fsum(a * b for a, b in zip(w, x, strict=True)) for x in inputs.tolist()] for w in weight.tolist()]
    sums = {
        "input_sum": [math.fsum(column) for column in columns],
        "input_square": [math.fsum(x * x for x in column) for column in columns],
        "output_square": [math.fsum(y * y for y in output) for output in outputs],
    }
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}
    return Statistics(len(inputs), tensors, weight=weight)


def score(name: str, weight: Tensor, stats: Statistics, seed: int = 0, **options: Any) -> Tensor:
    part = find_part("score", name)
    given = part.bind(options)
    if part.random:
        given["generator"] = torch.Generator().manual_seed(seed)
    found: Tensor = part.function(weight, stats, **given)
    return found


def by_entry(weight: Tensor, formula: Any) -> Tensor:
    """|W_kj| times what `formula(k, j)` says."""
    rows = [[abs(w) * formula(k, j) for j, w in enumerate(row)] for k, row in enumerate(weight.tolist())]
    return torch.tensor(rows, dtype=torch.float64)


def norm(values: list[float], p: float) -> float:
    if p == 0:
        return sum(value != 0 for value in values)
    if p == math.inf:
        return max(map(abs, values))
    return float(math.fsum(abs(value) ** p for value in values) ** (1 / p))


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


def test_owanda_is_magnitude_times_output_norm() -> None:
    weight, stats, _ = draw()
    norms = stats.output_square.sqrt().tolist()
    assert_close(score("owanda", weight, stats), by_entry(weight, lambda k, j: norms[k]))


@pytest.mark.parametrize("balance", ["none", "mean"])
@pytest.mark.parametrize("combine", ["sum", "rss"])
def test_symwanda_weighs_inputs_and_outputs(combine: str, balance: str) -> None:
    weight, stats, _ = draw()
    inputs, outputs = stats.input_square.sqrt().tolist(), stats.output_square.sqrt().tolist()
    if balance == "mean":
        inputs = [one * len(inputs) / math.fsum(inputs) for one in inputs]
        outputs = [one * len(outputs) / math.fsum(outputs) for one in outputs]
    add = math.hypot if combine == "rss" else lambda a, b: a + b
    found = score("symwanda", weight, stats, lambda_in=0.3, lambda_out=2, combine=combine, balance=balance)
    assert_close(found, by_entry(weight, lambda k, j: add(0.3 * inputs[j], 2 * outputs[k])))


@pytest.mark.parametrize("options", [{}, {"combine": "rss"}, {"balance": "mean"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symwanda_of_one_side_is_that_side_to_the_bit(dtype: torch.dtype, options: dict[str, str]) -> None:
    weight, stats, _ = draw()
    weight, stats = weight.to(dtype), stats.to(dtype)
    one_side = {"lambda_in": 0.7, "lambda_out": 0.7, **options}
    assert torch.equal(score("symwanda", weight, stats, **{**one_side, "lambda_out": 0}), score("wanda", weight, stats))
    assert torch.equal(score("symwanda", weight, stats, **{**one_side, "lambda_in": 0}), score("owanda", weight, stats))


def test_symwanda_of_neither_side_is_refused() -> None:
    weight, stats, _ = draw()
    with pytest.raises(InputError, match=r"'score\.lambda_in' and 'score\.lambda_out' are both 0"):
        score("symwanda", weight, stats, lambda_in=0, lambda_out=0)


def test_balance_looks_at_the_whole_layer_from_any_of_its_rows() -> None:
    weight, stats, _ = draw()
    whole = score("symwanda", weight, stats, balance="mean")
    pieces = [slice(0, 1), slice(1, 3), slice(3, 5)]
    cut = [score("symwanda", weight[rows], stats.rows(rows).to(torch.float64), balance="mean") for rows in pieces]
    assert torch.equal(torch.cat(cut), whole)
    within = stats.rows(slice(1, 5)).rows(slice(1, 2))  # rows of rows
    assert torch.equal(score("symwanda", weight[2:3], within, balance="mean"), whole[2:3])


def test_balance_of_a_layer_that_saw_nothing_is_still_finite() -> None:
    weight, _, _ = draw()
    stats = measured(weight, torch.zeros(3, 7, dtype=torch.float64))
    assert not score("symwanda", weight, stats, balance="mean").any()


@pytest.mark.parametrize("combine", ["sum", "rss"])
def test_symmetric_is_magnitude_times_column_and_row_norm(combine: str) -> None:
    weight, stats, _ = draw()
    rows, columns = weight.tolist(), weight.t().tolist()
    add = math.hypot if combine == "rss" else lambda a, b: a + b
    expected = by_entry(weight, lambda k, j: add(norm(columns[j], 2), norm(rows[k], 2)))
    assert_close(score("symmetric", weight, stats, combine=combine), expected)


def test_ri_is_the_share_of_row_and_column() -> None:
    weight, stats, _ = draw()
    rows, columns = weight.tolist(), weight.t().tolist()
    expected = by_entry(weight, lambda k, j: 1 / norm(rows[k], 1) + 1 / norm(columns[j], 1))
    assert_close(score("ri", weight, stats), expected)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2.5])
@pytest.mark.parametrize("p", [0, 0.2, 0.5, 1, 2, 3, "inf", math.inf])
def test_lp_ria_is_relative_importance_with_other_norms(p: float | str, alpha: float) -> None:
    weight, stats, _ = draw()
    weight[2, 3] = 0
    stats = stats.of(weight)
    rows, columns, inputs = weight.tolist(), weight.t().tolist(), stats.input_square.sqrt().tolist()

    def formula(k: int, j: int) -> float:
        return float((1 / norm(rows[k], float(p)) + 1 / norm(columns[j], float(p))) * inputs[j] ** alpha)

    assert_close(score("lp-ria", weight, stats, p=p, alpha=alpha), by_entry(weight, formula))
    if p == 1:
        assert torch.equal(score("lp-ria", weight, stats, alpha=alpha), score("ria", weight, stats, alpha=alpha))


@pytest.mark.parametrize("p", [0.2, 0.5, 1, 2, 3, 40.0, "inf"])
@pytest.mark.parametrize("scale", [1e-25, 1e10])
def test_no_norm_leaves_the_range_of_float32(scale: float, p: float | str) -> None:
    weight, _, _ = draw(64, 48)
    ones = {"input_square": torch.ones(48, dtype=torch.float64)}
    reference = score("lp-ria", weight, Statistics(1, ones, weight=weight), p=p)  # in float64, of ordinary values
    scaled = (weight * scale).float()
    found = score("lp-ria", scaled, Statistics(1, ones, weight=scaled, dtype=torch.float32), p=p)
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=0)


def test_stade_is_the_squared_weight_times_the_unbiased_variance() -> None:
    weight, stats, inputs = draw()
    variances = [torch.tensor(column, dtype=torch.float64).var().item() for column in zip(*inputs, strict=True)]
    expected = [[w * w * variance for w, variance in zip(row, variances, strict=True)] for row in weight.tolist()]
    torch.testing.assert_close(
        score("stade", weight, stats), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_stade_of_constant_inputs_is_nothing() -> None:
    weight, _, _ = draw()
    for tokens in (1, 4):
        assert not score("stade", weight, measured(weight, torch.full((tokens, 7), 3.0, dtype=torch.float64))).any()


STOCHASTIC = ["stochastic-ri", "stochastic-ria"]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("tau_mode", "of_row", "of_column"), [("per-axis", 4, 2), ("min", 2, 2)])
def test_stochastic_ri_sums_over_the_sets_it_drew(tau_mode: str, of_row: int, of_column: int, rescale: bool) -> None:
    weight, stats, _ = draw(5, 10)
    found = score("stochastic-ri", weight, stats, seed=3, beta=0.4, tau_mode=tau_mode, rescale=rescale)
    generator = torch.Generator().manual_seed(3)
    of_rows = sample_indices(5, 10, of_row, generator).tolist()
    of_columns = sample_indices(10, 5, of_column, generator).tolist()
    of_row_scale, of_column_scale = (10 / of_row, 5 / of_column) if rescale else (1, 1)

    def formula(k: int, j: int) -> float:
        row = math.fsum(abs(float(weight[k, i])) for i in of_rows[k])
        column = math.fsum(abs(float(weight[i, j])) for i in of_columns[j])
        return 1 / (of_row_scale * row) + 1 / (of_column_scale * column)

    assert_close(found, by_entry(weight, formula))


def test_stochastic_ria_is_stochastic_ri_times_input_norm_to_alpha() -> None:
    weight, stats, _ = draw()
    options = {"beta": 0.5, "tau_mode": "min", "rescale": False, "shared_index": True}
    plain = score("stochastic-ri", weight, stats, **options)
    assert_close(score("stochastic-ria", weight, stats, alpha=0.3, **options), plain * stats.input_norm.pow(0.3))
    assert torch.equal(score("stochastic-ria", weight, stats, alpha=0, **options), plain)


def test_a_shared_index_is_one_set_for_all_rows_and_one_for_all_columns() -> None:
    weight, stats, _ = draw(6, 8)
    found = score("stochastic-ri", weight, stats, beta=0.5, rescale=False, shared_index=True)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = sample_indices(1, 8, 4, generator)[0], sample_indices(1, 6, 3, generator)[0]
    row, column = weight[:, inputs].abs().sum(1), weight[outputs].abs().sum(0)
    assert_close(found, weight.abs() * (1 / row[:, None] + 1 / column))


@pytest.mark.parametrize("beta", [0.001, 0.1, 0.34, 0.99, 1])
@pytest.mark.parametrize("tau_mode", ["per-axis", "min"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_scores_follow_the_generator_alone(name: str, tau_mode: str, beta: float) -> None:
    weight, stats, _ = draw(9, 16)
    first = score(name, weight, stats, seed=5, beta=beta, tau_mode=tau_mode)
    assert torch.isfinite(first).all()
    torch.manual_seed(99)
    assert torch.equal(first, score(name, weight, stats, seed=5, beta=beta, tau_mode=tau_mode))
    exact = beta > 0.95 and tau_mode == "per-axis"
    assert (
        torch.equal(first, score(name, weight, stats, seed=6, beta=beta, tau_mode=tau_mode)) == exact
    )  # ⌈0.99·16⌉ is all


def test_chunks_of_rows_draw_sets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats, _ = draw(9, 16)
    monkeypatch.setattr(stochastic, "_MARKS", 40)  # two rows, or four columns, at a time
    monkeypatch.setattr(bits, "_CHUNK", 40)
    found = score("stochastic-ri", weight, stats, seed=2, beta=0.25)
    generator = torch.Generator().manual_seed(2)
    rows = torch.cat([sample_indices(size, 16, 4, generator) for size in (2, 2, 2, 2, 1)])
    columns = torch.cat([sample_indices(4, 9, 3, generator) for _ in range(4)])
    row = weight.gather(1, rows).abs().sum(1) * 16 / 4
    column = weight.t().gather(1, columns).abs().sum(1) * 9 / 3
    assert_close(found, weight.abs() * (1 / row[:, None] + 1 / column))


@pytest.mark.parametrize(("length", "size"), [(1, 1), (2, 1), (6, 2), (6, 5), (6, 6)])
def test_every_set_of_indices_is_as_likely(length: int, size: int) -> None:
    lines = 6000
    drawn = sample_indices(lines, length, size, torch.Generator().manual_seed(0))
    assert drawn.shape == (lines, size)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < length
    sets: dict[tuple[int, ...], int] = {}
    for line in drawn.sort(1).values.tolist():
        assert len(set(line)) == size, "without replacement"
        sets[tuple(line)] = sets.get(tuple(line), 0) + 1
    assert len(sets) == math.comb(length, size)
    expected = lines / len(sets)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in sets.values())


@pytest.mark.parametrize("shared", [False, True])
def test_a_rescaled_sum_is_unbiased(shared: bool) -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        float(stochastic._sampled_sums(weight, 2, generator=generator, rescale=True, shared=shared))
        for _ in range(4000)
    ]
    assert sum(drawn) / len(drawn) == pytest.approx(15, abs=0.35)  # five standard errors


RELATIVE = ["ri", "ria", "lp-ria", *STOCHASTIC]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["symmetric", *RELATIVE])
def test_rows_and_columns_of_zeros_have_no_importance_and_spoil_no_other(name: str, dtype: torch.dtype) -> None:
    weight, stats, _ = draw(6, 8)
    weight[2], weight[:, 5] = 0, 0
    weight = weight.to(dtype)
    options = {"beta": 0.5} if name in STOCHASTIC else {}  # enough that no sum misses all but zeros
    found = score(name, weight, stats.of(weight).to(dtype), **options)
    assert torch.isfinite(found).all()
    assert torch.equal(found != 0, weight != 0)


def test_a_sum_that_comes_out_0_leaves_its_term_out() -> None:
    weight = torch.zeros(10, 10, dtype=torch.float64)
    weight[0, 0] = 1
    found = score("stochastic-ri", weight, Statistics(1, {}, weight=weight), beta=0.1, rescale=False)
    assert found[0, 0] in (0, 1, 2)
    assert found.count_nonzero() <= 1


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
        "window_abs": inputs.abs().mean(0).square(),
        "half_gram": inputs[:20].t() @ inputs[:20],
        "output_square": (inputs @ weight.t()).square().sum(0),
        "output_abs": (inputs @ weight.t()).abs().sum(0),
        "gram": inputs.t() @ inputs,
    }
    assert everything.keys() == INPUT_SUMS | OUTPUT_SUMS
    declared = Statistics(40, {need: everything[need] for need in part.needs}, weight=weight, dtype=torch.float32)
    before = weight.clone()
    found = score(name, weight, declared)  # reading anything else would raise
    assert found.shape == weight.shape
    assert found.dtype == weight.dtype
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    assert torch.equal(weight, before), "a score only looks"
    assert part.summary.endswith(".")
    assert part.paper.startswith("https://")
    for need in part.needs:
        others = {other: everything[other] for other in part.needs - {need}}
        with pytest.raises(PrunekitError, match=f"'{need}' was not measured"):
            score(name, weight, Statistics(40, others, weight=weight))
    assert not (part.random and part.rowwise), "what is drawn for some rows depends on the rows before them"
    if part.rowwise:  # rows can be scored on their own
        pieces = [slice(row, row + 1) for row in range(6)]
        assert torch.equal(torch.cat([score(name, weight[rows], declared.rows(rows)) for rows in pieces]), found)


@pytest.mark.parametrize(
    ("name", "option", "value", "takes"),
    [
        ("ria", "alpha", -0.1, "a number of at least 0"),
        ("ria", "alpha", math.nan, "a number of at least 0"),
        ("ria", "alpha", "half", "a number of at least 0"),
        ("lp-ria", "p", -1, "a number of at least 0.2 or one of 0, inf"),
        ("lp-ria", "p", 0.1, "a number of at least 0.2 or one of 0, inf"),
        ("lp-ria", "p", False, "a number of at least 0.2 or one of 0, inf"),
        ("stochastic-ri", "beta", 0, "a number above 0 and at most 1"),
        ("stochastic-ri", "beta", 1.01, "a number above 0 and at most 1"),
        ("stochastic-ria", "beta", True, "a number above 0 and at most 1"),
        ("stochastic-ri", "tau_mode", "max", "one of per-axis, min"),
        ("symwanda", "lambda_out", -1, "a number of at least 0"),
        ("symmetric", "combine", "product", "one of sum, rss"),
    ],
)
def test_values_an_option_does_not_take_are_refused(name: str, option: str, value: object, takes: str) -> None:
    with pytest.raises(InputError) as refusal:
        find_part("score", name).bind({option: value})
    assert str(refusal.value) == f"'score.{option}' cannot be {value!r}: it takes {takes}"


def test_the_generator_is_not_an_option() -> None:
    assert "generator" not in find_part("score", "stochastic-ri").options
    assert {name for name, part in parts("score").items() if part.random} == set(STOCHASTIC)


def test_a_score_says_where_it_is_no_better_than_a_simpler_one() -> None:
    assert "the order is that of magnitude" in find_part("score", "owanda").note
    assert find_part("score", "wanda").note == ""


def test_an_unknown_score_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="score 'wonda' is unknown: did you mean 'wanda'"):
        find_part("score", "wonda")


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"'score\.alpha' is not an option of score 'wanda'"):
        find_part("score", "wanda").bind({"alpha": 0.5})
