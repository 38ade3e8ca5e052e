"""How sure a measured difference is: paired bootstrap intervals.

The same windows, or the same questions, are asked of both models, so what is drawn again is pairs: the scatter that both share
cancels out, and an interval is as narrow as the difference allows (Koehn 2004, "Statistical significance tests").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_DRAWS = 2000
_PERCENT = (2.5, 97.5)
_CELLS = 1_000_000  # drawn at a time: 8 MB


def difference_interval(after: Values, before: Values) -> tuple[float, float]:
    """95 % interval of mean(after) − mean(before); both [items], paired."""
    return _percentiles(np.concatenate([gap.mean(1) for gap in _drawn(after - before)]))


def ratio_interval(losses: Values, before: Values, predictions: int) -> tuple[float, float]:
    """95 % interval of perplexity / perplexity before, from each window's summed losses [windows] of `predictions` tokens."""
    low, high = difference_interval(losses / predictions, before / predictions)
    return float(np.exp(low)), float(np.exp(high))


def standard_error(values: Values) -> float | None:
    """Of the mean: sample standard deviation (n − 1) over √n, as lm-evaluation-harness has it; None for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _drawn(values: Values) -> Iterator[Values]:
    """`_DRAWS` samples with replacement, some rows at a time; the same ones every time."""
    draw = np.random.default_rng(0)
    rows = max(1, _CELLS // len(values))
    for start in range(0, _DRAWS, rows):
        yield values[draw.integers(0, len(values), (min(rows, _DRAWS - start), len(values)))]


def _percentiles(means: Values) -> tuple[float, float]:
    low, high = np.percentile(means, _PERCENT)
    return float(low), float(high)
