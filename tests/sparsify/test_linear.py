"""One weight matrix: which weights a method keeps, and what must not change that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit import bits
from prunekit.bits import apply_mask
from prunekit.catalogue import find_method
from prunekit.errors import InputError, PrunekitError
from prunekit.parts import Part
from prunekit.recipe import Pattern
from prunekit.sparsify.linear import Bound, Sparsifier
from prunekit.statistics import Statistics


def draw(
    rows: int = 9, columns: int = 20, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    return weight, statistics(torch.rand(columns, generator=generator, dtype=torch.float64) + 0.01)


def statistics(input_square: Tensor) -> Statistics:
    return Statistics(7, {"input_square": input_square})


def keep(method: str, weight: Tensor, stats: Statistics, pattern: str | float, group: str | None = None) -> Tensor:
    options = {} if group is None else {"pattern": {"group": group}}
    return Sparsifier.of(find_method(method), options).prune(weight, stats, Pattern.parse(pattern), "a.b").keep


def slow_keep(scores: list[list[float]], zeros_of_row: Callable[[int], int]) -> list[list[bool]]:
    masks = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda j, row=row: (row[j], j))
        dropped = set(order[: zeros_of_row(len(row))])
        masks.append([j not in dropped for j in range(len(row))])
    return masks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0, 0.29, 0.5, 0.95])
def test_wanda_drops_the_smallest_of_each_row(dtype: torch.dtype, sparsity: float) -> None:
    weight, stats = draw(dtype=dtype)
    norms = [math.sqrt(square) for square in stats.input_square.tolist()]
    scores = [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.double().tolist()]
    found = keep("wanda", weight, stats, sparsity)
    assert found.tolist() == slow_keep(scores, lambda width: int(width * round(100 * sparsity) / 100))


@pytest.mark.parametrize("group", ["layer", "row"])
def test_magnitude_compares_over_the_layer_unless_told_otherwise(group: str) -> None:
    weight, stats = draw(rows=7, columns=11)
    values = [[abs(w) for w in row] for row in weight.tolist()]
    found = keep("magnitude", weight, stats, 0.4, None if group == "layer" else "row")
    if group == "layer":
        flat = [value for row in values for value in row]
        assert found.flatten().tolist() == slow_keep([flat], lambda _: int(7 * 11 * 0.4))[0]
        assert len(set(found.sum(1).tolist())) > 1, "rows lose what they lose"
    else:
        assert found.tolist() == slow_keep(values, lambda _: 4)


def test_layer_ties_go_by_flat_index() -> None:
    weight = torch.ones(3, 20)
    assert keep("magnitude", weight, statistics(torch.ones(20)), 0.5).flatten().tolist() == [False] * 30 + [True] * 30


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:20", "1:2"])
def test_groups_are_consecutive_inputs_whatever_the_method(method: str, pattern: str) -> None:
    weight, stats = draw()
    kept, group = map(int, pattern.split(":"))
    found = keep(method, weight, stats, pattern)
    norms = [math.sqrt(s) if method == "wanda" else 1.0 for s in stats.input_square.tolist()]
    for i, row in enumerate(weight.tolist()):
        for start in range(0, 20, group):
            part = [abs(row[j]) * norms[j] for j in range(start, start + group)]
            assert found[i, start : start + group].tolist() == slow_keep([part], lambda _: group - kept)[0]


@pytest.mark.parametrize("pattern", [0.45, "2:4"])
@pytest.mark.parametrize("factor", [2.0**-20, 0.3, 1e6])
def test_wanda_does_not_care_how_inputs_are_scaled(pattern: str | float, factor: float) -> None:
    weight, stats = draw(rows=40)
    scaled = statistics(stats.input_square * factor**2)
    assert torch.equal(keep("wanda", weight, scaled, pattern), keep("wanda", weight, stats, pattern))


@pytest.mark.parametrize("pattern", [0.45, "2:4"])
def test_wanda_of_constant_norms_is_magnitude_by_row(pattern: str | float) -> None:
    weight, _ = draw(dtype=torch.float32)
    constant = statistics(torch.full((20,), 64.0))  # a power of two, so that no products round to a tie
    by_row = keep("magnitude", weight, constant, pattern, "row")
    assert torch.equal(keep("wanda", weight, constant, pattern), by_row)


def test_permuted_outputs_and_inputs_permute_the_mask() -> None:
    weight, stats = draw(rows=30)
    outputs, inputs = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (30, 20))
    for pattern in (0.45, "2:4"):  # groups know outputs apart from inputs
        found = keep("wanda", weight, stats, pattern)
        assert torch.equal(keep("wanda", weight[outputs], stats, pattern), found[outputs])
    found = keep("wanda", weight, stats, 0.45)
    permuted = statistics(stats.input_square[inputs])
    assert torch.equal(keep("wanda", weight[:, inputs], permuted, 0.45), found[:, inputs])


def test_signs_do_not_matter() -> None:
    weight, stats = draw()
    for method in ("wanda", "magnitude"):
        assert torch.equal(keep(method, -weight.abs(), stats, 0.5), keep(method, weight, stats, 0.5))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [0.45, "2:4"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_pruning_again_changes_nothing(method: str, pattern: str | float, group: str) -> None:
    weight, stats = draw()
    first = keep(method, weight, stats, pattern, group)
    apply_mask(weight, first)
    assert torch.equal(keep(method, weight, stats, pattern, group), first)


@pytest.mark.parametrize("chunk", [1, 20, 47, 60, 10**9])
@pytest.mark.parametrize("pattern", [0.45, "2:4"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_chunks_of_rows_give_the_same_mask(
    chunk: int, pattern: str | float, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randint(-2, 3, (9, 20), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    stats = statistics(torch.ones(20))
    for method in ("wanda", "magnitude"):
        whole = keep(method, weight, stats, pattern, group)
        with monkeypatch.context() as patch:
            patch.setattr(bits, "_CHUNK", chunk)
            assert torch.equal(keep(method, weight, stats, pattern, group), whole)


@pytest.mark.parametrize("rowwise", [True, False])
def test_only_rowwise_scores_are_asked_in_chunks(rowwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def watched(weight: Tensor, stats: Statistics) -> Tensor:
        asked.append(tuple(weight.shape))
        return weight.abs()

    monkeypatch.setattr(bits, "_CHUNK", 40)
    sparsifier = Sparsifier(part(watched, rowwise=rowwise), "row")
    sparsifier.prune(*draw(), Pattern.parse(0.5), "a.b")
    assert asked == ([(2, 20)] * 4 + [(1, 20)] if rowwise else [(9, 20)])


def part(function: Callable[..., Tensor], rowwise: bool = True) -> Bound:
    return Bound(
        Part(kind="score", name="homemade", function=function, needs=frozenset(), paper="", rowwise=rowwise, options={})
    )


@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_score_of_another_shape_is_refused(group: Any) -> None:
    sparsifier = Sparsifier(part(lambda weight, stats: weight.t()), group)
    with pytest.raises(PrunekitError, match=r"score 'homemade' gave shape \[20, 9\] for a weight \[9, 20\]"):
        sparsifier.prune(*draw(), Pattern.parse(0.5), "a.b")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_score_that_is_not_finite_is_refused(bad: float, group: Any) -> None:
    def spoilt(weight: Tensor, stats: Statistics) -> Tensor:
        scores = weight.abs()
        scores[-1, -1] = bad
        return scores

    for pattern in ("0.5", "2:4"):
        with pytest.raises(InputError, match=r"score 'homemade' of 'a\.b' is NaN or infinite"):
            Sparsifier(part(spoilt), group).prune(*draw(), Pattern.parse(pattern), "a.b")


def test_scores_are_computed_in_float32_or_better() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def watched(weight: Tensor, stats: Statistics) -> Tensor:
        seen.append((weight.dtype, stats.input_square.dtype))
        return weight.abs()

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        Sparsifier(part(watched), "row").prune(*draw(dtype=dtype), Pattern.parse(0.5), "a.b")
    assert seen == [(torch.float32, torch.float32)] * 3 + [(torch.float64, torch.float64)]


def test_a_transposed_view_is_a_weight_like_any_other() -> None:
    weight, stats = draw()
    stored = weight.t().contiguous()  # as a Conv1D has it
    for pattern in (0.45, "2:4"):
        assert torch.equal(keep("wanda", stored.t(), stats, pattern), keep("wanda", weight, stats, pattern))


def test_needs_are_those_of_the_score() -> None:
    assert Sparsifier.of(find_method("wanda"), {}).needs == {"input_square"}
    assert Sparsifier.of(find_method("magnitude"), {}).needs == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": {"group": "column"}}, r"'pattern\.group' cannot be 'column': it is row or layer"),
        ({"pattern": {"gruop": "row"}}, r"'pattern\.gruop' is not an option of the pattern"),
        ({"score": {"alpha": 1}}, r"'score\.alpha' is not an option of score 'wanda'"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sparsifier.of(find_method("wanda"), options)
