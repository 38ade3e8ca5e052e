"""STADE."""

from __future__ import annotations

from torch import Tensor

from ...parts import score
from ...statistics import Statistics


@score(needs={"input_sum", "input_square"}, paper="https://arxiv.org/abs/2503.22451", rowwise=True)
def stade(weight: Tensor, stats: Statistics) -> Tensor:
    """Squared weight times the variance of its input channel, W_ij²·Var(X_j).

    What a weight adds to its output that a bias could not. STADE then moves Σ W_ij·E[X_j] over the removed weights into the bias; that
    is not done here, since most linears have none and a checkpoint keeps its tensors: this is its criterion alone.

    Shapes: weight [out, in], stats.input_variance [in] (of a token) -> importance [out, in]. Comparable within an output row.
    Source: STADE: Standard Deviation as a Pruning Metric, 2025. The variance is unbiased (by count − 1), as in its official code.
    """
    unbiased = stats.input_variance * (
        stats.count / max(stats.count - 1, 1)
    )  # of one token the variance is 0 either way
    return weight.square() * unbiased
