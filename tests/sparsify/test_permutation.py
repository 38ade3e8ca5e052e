"""Channel permutation against slow loops, all permutations of few channels, and its own promises."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.errors import InputError
from prunekit.sparsify import permutation
from prunekit.sparsify.permutation import channel_permutation, dealt_out, exchange_gains, exchanged, retained_score

linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment

plenty = settings(deadline=None, max_examples=100, database=None)
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 3)]


def draw_scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    channel = torch.randn(columns, generator=draw).mul(1.5).exp()  # channels differ, as activations' norms do
    return torch.rand(rows, columns, generator=draw) * channel


def slow_retained(scores: Tensor, keep: int, group: int) -> float:
    total = []
    for row in scores.double().tolist():
        for start in range(0, len(row), group):
            total += sorted(row[start : start + group])[group - keep :]
    return math.fsum(total)


def best_of_all(scores: Tensor, keep: int, group: int) -> float:
    orders = itertools.permutations(range(scores.shape[1]))
    return max(slow_retained(scores[:, list(order)], keep, group) for order in orders)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    keep, group = draw(st.sampled_from(PATTERNS))
    groups, rows = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        scores = draw_scores(rows, groups * group, draw(st.integers(0, 1000)))
    else:  # ties
        values = st.lists(
            st.sampled_from([0.0, 0.25, 1.0]), min_size=rows * groups * group, max_size=rows * groups * group
        )
        scores = torch.tensor(draw(values)).reshape(rows, -1)
    return scores, keep, group


@plenty
@given(cases())
def test_retained_score_is_the_sum_of_the_largest(case: tuple[Tensor, int, int]) -> None:
    assert retained_score(*case) == pytest.approx(slow_retained(*case), rel=1e-6)


@plenty
@given(cases(), st.booleans(), st.integers(1, 4))
def test_order_is_a_permutation_that_never_retains_less(
    case: tuple[Tensor, int, int], refine: bool, at_once: int
) -> None:
    scores, keep, group = case
    before = scores.clone()
    order = channel_permutation(scores, keep, group, refine=refine, at_once=at_once)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(scores.shape[1]))
    plain = slow_retained(scores, keep, group)
    assert slow_retained(scores[:, order], keep, group) >= plain * (1 - 1e-12)
    assert torch.equal(scores, before)


@plenty
@given(cases())
def test_exchange_gains_are_what_a_group_would_retain_more(case: tuple[Tensor, int, int]) -> None:
    scores, keep, group = case
    members = dealt_out(scores, group)
    values = scores[:, members.t().flatten()].t().reshape(group, len(members), -1).contiguous()
    for position in range(group):
        gains = exchange_gains(values, position, keep)
        others = [place for place in range(group) if place != position]
        for taker, giver in itertools.product(range(len(members)), repeat=2):
            rest = members[taker][others]
            joined = torch.cat([rest, members[giver][position, None]])
            gain = slow_retained(scores[:, joined], keep, group) - slow_retained(scores[:, rest], keep, group - 1)
            assert float(gains[taker, giver]) == pytest.approx(gain, abs=2e-5 * float(scores.sum() + 1))


@plenty
@given(cases())
def test_what_is_retained_rises_from_stage_to_stage(case: tuple[Tensor, int, int]) -> None:
    scores, keep, group = case
    dealt = dealt_out(scores, group)
    once = exchanged(scores, dealt, keep, linear_sum_assignment)
    twice = exchanged(scores, once, keep, linear_sum_assignment)
    stages = [slow_retained(scores[:, members.flatten()], keep, group) for members in (dealt, once, twice)]
    slack = 1e-6 * stages[-1]
    assert stages[0] <= stages[1] + slack
    assert stages[1] <= stages[2] + slack


def test_channels_are_dealt_out_like_cards() -> None:
    scores = torch.tensor([[5.0, 0.0, 3.0, 1.0, 4.0, 2.0]])  # in order of their scores: 1 3 5 2 4 0
    assert dealt_out(scores, 2).tolist() == [[1, 0], [3, 4], [5, 2]]
    assert dealt_out(scores, 3).tolist() == [[1, 2, 4], [3, 5, 0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("keep", "group", "columns"), [(1, 2, 4), (1, 2, 6), (2, 3, 6), (1, 3, 6)])
def test_no_exchange_at_one_position_is_better(keep: int, group: int, columns: int, seed: int) -> None:
    scores = draw_scores(3, columns, seed)
    values = scores.t().reshape(columns // group, group, -1).transpose(0, 1).contiguous()
    for position in range(group):
        gains = exchange_gains(values, position, keep)
        chosen = linear_sum_assignment(gains.numpy(), maximize=True)[1]
        members = torch.arange(columns).reshape(-1, group)

        def retained(order: tuple[int, ...], place: int = position, members: Tensor = members) -> float:
            moved = members.clone()
            moved[:, place] = members[list(order), place]
            return slow_retained(scores[:, moved.flatten()], keep, group)

        every = [retained(order) for order in itertools.permutations(range(columns // group))]
        assert retained(tuple(chosen)) == pytest.approx(max(every), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("columns", [4, 6])
def test_few_channels_come_close_to_the_best_of_all_orders(columns: int, seed: int) -> None:
    scores = draw_scores(4, columns, seed)
    best, plain = best_of_all(scores, 1, 2), slow_retained(scores, 1, 2)
    found = slow_retained(scores[:, channel_permutation(scores, 1, 2)], 1, 2)
    assert plain <= found <= best * (1 + 1e-12)
    assert found >= 0.98 * best


def test_a_single_row_finds_the_optimum() -> None:
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    order = channel_permutation(scores, 1, 2)
    assert slow_retained(scores[:, order], 1, 2) == 8 + 7 + 6 + 5


def test_refining_retains_more_and_parts_of_the_groups_a_little_less() -> None:
    scores = draw_scores(24, 96)
    orders = [
        torch.arange(96),
        channel_permutation(scores, 2, 4, refine=False),
        channel_permutation(scores, 2, 4, at_once=6),
        channel_permutation(scores, 2, 4),
    ]
    plain, dealt, parts, whole = (retained_score(scores[:, order], 2, 4) for order in orders)
    assert plain < dealt < parts < whole


def test_the_same_scores_give_the_same_order() -> None:
    scores = draw_scores(16, 64)
    assert torch.equal(channel_permutation(scores, 2, 4), channel_permutation(scores.clone(), 2, 4))


@pytest.mark.parametrize("value", [0.0, 1.0, 3e-5])
def test_equal_scores_leave_the_order(value: float) -> None:
    assert torch.equal(channel_permutation(torch.full((5, 24), value), 2, 4), torch.arange(24))


def test_one_group_and_groups_kept_whole_leave_the_order() -> None:
    assert torch.equal(channel_permutation(draw_scores(3, 4), 2, 4), torch.arange(4))
    assert torch.equal(channel_permutation(draw_scores(3, 12), 4, 4), torch.arange(12))


def test_an_exchange_that_is_none_better_is_not_made() -> None:
    scores = draw_scores(4, 16)
    members = dealt_out(scores, 4)

    def worst(gains: object, maximize: bool) -> tuple[object, object]:
        return linear_sum_assignment(gains, maximize=not maximize)

    assert torch.equal(exchanged(scores, members, 2, worst), members)


def test_without_scipy_only_refining_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match=r"pip install 'prunekit\[permutation\]'"):
        channel_permutation(draw_scores(2, 8), 2, 4)
    assert len(channel_permutation(draw_scores(2, 8), 2, 4, refine=False)) == 8


def test_groups_beyond_the_limit_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(gains: object, maximize: bool) -> object:
        sizes.append(len(gains))  # type: ignore[arg-type]
        return linear_sum_assignment(gains, maximize=maximize)

    monkeypatch.setattr(permutation, "require_scipy", lambda: spy)
    channel_permutation(draw_scores(3, 40), 2, 4, at_once=4)
    assert sizes == [4] * 4 + [3] * 4 + [3] * 4
