"""Bootstrap intervals, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prunekit.evaluation.interval import difference_interval, ratio_interval, standard_error


def test_a_constant_difference_has_no_width() -> None:
    before = np.random.default_rng(1).normal(size=40)
    low, high = difference_interval(before + 0.25, before)
    assert (low, high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_it_is_as_wide_as_the_normal_one_and_covers_as_often() -> None:
    draw = np.random.default_rng(2)
    covered, widths = 0, []
    for _ in range(200):
        after, before = draw.normal(0.1, 1, 400), np.zeros(400)
        low, high = difference_interval(after, before)
        covered += low <= 0.1 <= high
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 20, rel=0.05)
    assert 180 <= covered <= 198


def test_what_both_share_cancels_out() -> None:
    draw = np.random.default_rng(3)
    scatter = draw.normal(size=300) * 100
    low, high = difference_interval(scatter + 1 + 0.01 * draw.normal(size=300), scatter)
    assert high - low < 0.01
    assert low < 1 < high


def test_ratios_of_perplexities() -> None:
    losses = np.full(10, 30.0)
    assert ratio_interval(losses, losses - 3 * math.log(2), 3) == (pytest.approx(2), pytest.approx(2))


def test_the_same_every_time() -> None:
    values = np.random.default_rng(4).normal(size=3000)  # more than are drawn at a time
    assert difference_interval(values, np.zeros(3000)) == difference_interval(values, np.zeros(3000))


def test_standard_error_of_a_share() -> None:
    values = np.array([1.0] * 30 + [0.0] * 70)
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert standard_error(np.array([1.0])) is None
