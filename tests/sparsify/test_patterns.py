"""Selection by rank: exact counts, ties by index, against sorting in plain Python."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.errors import InputError
from prunekit.recipe import Pattern
from prunekit.sparsify import patterns
from prunekit.sparsify.patterns import check_fits, keep_groups, keep_largest

plenty = settings(deadline=None, max_examples=200, database=None)


def slow_keep_row(scores: list[float], zeros: int) -> list[bool]:
    """Sort by (score, index), drop the first `zeros`."""
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    dropped = set(order[:zeros])
    return [index not in dropped for index in range(len(scores))]


def slow_keep(scores: Tensor, zeros: int) -> Tensor:
    return torch.tensor([slow_keep_row(row, zeros) for row in scores.tolist()]).reshape(scores.shape)


def slow_keep_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    rows = []
    for row in scores.tolist():
        mask: list[bool] = []
        for start in range(0, len(row), group):
            mask += slow_keep_row(row[start : start + group], group - keep)
        rows.append(mask)
    return torch.tensor(rows).reshape(scores.shape)


@st.composite
def tied_scores(draw: st.DrawFn, columns: int = 40) -> tuple[Tensor, int]:
    """A matrix of few distinct values, both zeros among them, and how many to drop in a row."""
    width = draw(st.integers(1, columns))
    rows = draw(st.integers(1, 4))
    values = draw(
        st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-40, 3e38]), min_size=rows * width, max_size=rows * width)
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(values, dtype=dtype).reshape(rows, width), draw(st.integers(0, width))


@plenty
@given(tied_scores())
def test_keep_largest_is_sorting_by_score_and_index(given_scores: tuple[Tensor, int]) -> None:
    scores, zeros = given_scores
    before = scores.clone()
    found = keep_largest(scores, zeros)
    assert found.dtype == torch.bool
    assert torch.equal(found, slow_keep(scores, zeros))
    assert ((~found).sum(1) == zeros).all()
    assert torch.equal(scores, before), "scores are only looked at"


@plenty
@given(tied_scores(columns=16))
def test_short_and_long_rows_are_ranked_alike(given_scores: tuple[Tensor, int]) -> None:
    scores, zeros = given_scores
    short = keep_largest(scores, zeros)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_SHORT", 0)
        assert torch.equal(keep_largest(scores, zeros), short)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 64, 300])
def test_every_count_of_zeros_on_distinct_and_on_equal_scores(columns: int) -> None:
    distinct = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).float()[None]
    equal = torch.ones(2, columns)
    for zeros in range(columns + 1):
        assert torch.equal(keep_largest(distinct, zeros), distinct >= zeros)
        # among equals the lowest indices go
        assert torch.equal(keep_largest(equal, zeros), torch.arange(columns).expand(2, -1) >= zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_lie_apart_in_memory_and_the_path_without_numpy(dtype: torch.dtype) -> None:
    # bfloat16 has no NumPy counterpart and takes the way that scores on an accelerator take
    scores = torch.randint(0, 5, (40, 6), generator=torch.Generator().manual_seed(0)).to(dtype).t()
    assert not scores.is_contiguous()
    for zeros in (0, 1, 20, 39, 40):
        assert torch.equal(keep_largest(scores, zeros), slow_keep(scores, zeros))


@pytest.mark.parametrize(
    ("keep", "group"),
    [(k, g) for g in (2, 3, 4, 5, 8, 16) for k in range(1, g)] + [(1, 17), (8, 20), (16, 32), (31, 32), (1, 64)],
)
def test_keep_groups(keep: int, group: int) -> None:
    draw = torch.Generator().manual_seed(keep * 100 + group)
    for scores in (
        torch.rand(5, 3 * group, generator=draw),
        torch.randint(0, 3, (5, 3 * group), generator=draw).double(),
        torch.zeros(2, group),
        torch.rand(2 * group, 3, generator=draw).t(),  # not contiguous
    ):
        found = keep_groups(scores, keep, group)
        assert torch.equal(found, slow_keep_groups(scores, keep, group))
        assert (found.reshape(-1, group).sum(1) == keep).all()


def test_groups_that_do_not_divide_are_refused() -> None:
    check_fits("a.b", 12, 4)
    check_fits("a.b", 13, None)
    with pytest.raises(InputError, match=r"groups of 4 do not divide the 13 inputs of 'a\.b'.*budget\.ignore=a\.b"):
        check_fits("a.b", 13, 4)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("0.5", Fraction(1, 2)),
        (0.5, Fraction(1, 2)),
        (0, Fraction(0)),
        ("0", Fraction(0)),
        (0.29, Fraction(29, 100)),
        (" 0.7 ", Fraction(7, 10)),
        ("1e-1", Fraction(1, 10)),
        (0.1 + 0.2, Fraction("0.30000000000000004")),
    ],
)
def test_a_fraction_is_the_decimal_that_was_written(text: str | float, fraction: Fraction) -> None:
    assert Pattern.parse(text) == Pattern(fraction)


@pytest.mark.parametrize(
    ("text", "count", "zeros"),
    [
        (0.29, 100, 29),  # int(0.29 * 100) is 28
        (0.57, 100, 57),  # int(0.57 * 100) is 56
        (0.7, 10, 7),
        (0.1, 30, 3),
        (0.6, 4096, 2457),
        (0.5, 7, 3),
        (0.99, 10, 9),
        (0, 10, 0),
        (0.001, 999, 0),
    ],
)
def test_zeros_are_the_floor_of_the_exact_product(text: float, count: int, zeros: int) -> None:
    assert Pattern.parse(text).zeros(count) == zeros


@plenty
@given(st.integers(0, 999), st.integers(1, 10**9))
def test_zeros_in_whole_numbers(thousandths: int, count: int) -> None:
    assert Pattern.parse(thousandths / 1000).zeros(count) == count * thousandths // 1000


def test_groups_are_parsed_and_written_back() -> None:
    pattern = Pattern.parse("2:4")
    assert (pattern.keep, pattern.group, pattern.fraction) == (2, 4, Fraction(1, 2))
    one = Pattern.parse("1:4")
    assert one.fraction == Fraction(3, 4), "K is what is kept"
    for text in ("2:4", "4:8", "1:4", "31:32", "0.5", "0.29", "0", "0.12345678", "1/3", "0.9999999"):
        assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", ":4", "2:", "2:4:8", "a:b", "-2:4", "2.0:4", "²:4"])
def test_what_is_no_group_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not K:G with 0 < K < G"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["half", "", "nan", "inf", "50%", "1/0", True, None])
def test_what_is_no_number_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="neither a fraction of zeros"):
        Pattern.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [1, 1.0, "1", 50, -0.1, "-1e-9"])
def test_fractions_outside_zero_to_one_are_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        Pattern.parse(text)
