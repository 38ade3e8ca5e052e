"""The symmetric score: the weight stands in for its own inputs and outputs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...parts import score
from ...statistics import Statistics
from .ri import row_norm
from .symwanda import combined


@score(needs=set(), paper="https://arxiv.org/abs/2501.18980", rowwise=True)
def symmetric(weight: Tensor, stats: Statistics, *, combine: Literal["sum", "rss"] = "sum") -> Tensor:
    """Weight magnitude times the norms of its column and its row, |W_kj|·(‖W_:j‖₂ + ‖W_k:‖₂); looks at no data.

    Shapes: weight [out, in] -> importance [out, in]. Comparable within the whole layer.
    Source: Yi and Richtárik 2025 (SymWanda), corollary 3.4: lemma 3.1 with X = Y = Wᵀ. `combine="rss"` takes the root of the sum of
    squares instead, which is the score of the squared objective.
    """
    return weight.abs() * combined(stats.weight_column_norm(2), row_norm(weight, 2), combine)
