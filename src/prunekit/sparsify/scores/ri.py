"""Relative importance: how much of its row and of its column a weight is."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from torch import Tensor

from ...parts import Limits, score
from ...statistics import Statistics, column_norm

_RIA = "https://openreview.net/forum?id=Tr0lPx9woF"


@score(needs=set(), paper=_RIA, rowwise=True)
def ri(weight: Tensor, stats: Statistics) -> Tensor:
    """The weight's share of its row plus its share of its column, |W_kj|·(1/‖W_k:‖₁ + 1/‖W_:j‖₁); looks at no data.

    Shapes: weight [out, in] -> importance [out, in]; a row or column of zeros has no shares. Comparable within the whole layer.
    Source: Zhang et al. 2024, relative importance; Yi and Richtárik 2025, theorem 3.5.
    """
    return relative(weight, *norms(weight, stats, 1))


@score(needs={"input_square"}, paper=_RIA, rowwise=True)
def ria(weight: Tensor, stats: Statistics, *, alpha: Annotated[float, Limits(at_least=0)] = 0.5) -> Tensor:
    """Relative importance times the norm of the input channel to the power α, RI_kj·‖X_j‖₂^α.

    Shapes: weight [out, in], stats.input_norm [in] -> importance [out, in]. Comparable within the whole layer. α = 0 is RI, also where
    an input is always 0.
    Source: Zhang et al. 2024, relative importance and activation; Yi and Richtárik 2025, lemma 3.6.
    """
    return ri(weight, stats) * stats.input_norm.pow(alpha)


@score(
    needs={"input_square"},
    paper="https://arxiv.org/abs/2501.18980",
    rowwise=True,
    note="p = 0 counts weights that are not 0: where none is, the order is that of |W_kj|·‖X_j‖^α, whatever the group",
)
def lp_ria(
    weight: Tensor,
    stats: Statistics,
    *,
    p: Annotated[float, Limits(at_least=0.2)] | Literal[0, "inf"] = 1.0,
    alpha: Annotated[float, Limits(at_least=0)] = 0.5,
) -> Tensor:
    """RIA with ℓp norms, |W_kj|·(1/‖W_k:‖_p + 1/‖W_:j‖_p)·‖X_j‖₂^α.

    p = 0 counts what is not 0, `inf` takes the largest magnitude, 1 is RIA. Between 0 and 0.2 norms of thousands of entries leave the
    range of float32.

    Shapes: weight [out, in], stats.input_norm [in] -> importance [out, in]. Comparable within the whole layer.
    Source: Yi and Richtárik 2025, lemma 3.8; a random unit vector in place of the row (lemma 3.9) gives the same score.
    """
    return relative(weight, *norms(weight, stats, float(p))) * stats.input_norm.pow(alpha)


def norms(weight: Tensor, stats: Statistics, p: float) -> tuple[Tensor, Tensor]:
    """ℓp norms of the rows given, [rows], and of the whole weight's columns, [in]."""
    return row_norm(weight, p), stats.weight_column_norm(p)


def row_norm(weight: Tensor, p: float) -> Tensor:
    """ℓp norm of every row, summed in float64: [rows], in the weight's dtype."""
    return column_norm(weight.t(), p).to(weight.dtype)


def relative(weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """|W_kj|/row_k + |W_kj|/column_j, the term of a norm that is 0 left out. [out, in], [out], [in] -> [out, in].

    Each quotient is taken by itself: the reciprocal of a tiny norm would overflow, a weight's share of its own norm cannot.
    """
    magnitude = weight.abs()
    return magnitude / row.where(row > 0, math.inf)[:, None] + magnitude / column.where(column > 0, math.inf)
