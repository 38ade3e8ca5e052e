"""OWanda."""

from __future__ import annotations

from torch import Tensor

from ...parts import score
from ...statistics import Statistics


@score(
    needs={"output_square"},
    paper="https://arxiv.org/abs/2501.18980",
    rowwise=True,
    note="within an output row or a K:G group the order is that of magnitude: it needs the layer as its group",
)
def owanda(weight: Tensor, stats: Statistics) -> Tensor:
    """Weight magnitude times the norm of its output channel, |W_kj|·‖Y_k‖₂.

    Shapes: weight [out, in], stats.output_norm [out] (of the linear's output, bias included) -> importance [out, in]. Comparable
    within the whole layer.
    Source: Yi and Richtárik 2025 (SymWanda), corollary 3.3: lemma 3.1 with X = 0.
    """
    return weight.abs() * stats.output_norm[:, None]
