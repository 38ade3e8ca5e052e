"""Wanda."""

from __future__ import annotations

from torch import Tensor

from ...parts import score
from ...statistics import Statistics


@score(needs={"input_square"}, paper="https://arxiv.org/abs/2306.11695", rowwise=True)
def wanda(weight: Tensor, stats: Statistics) -> Tensor:
    """Weight magnitude times the norm of its input channel, |W_ij|·‖X_j‖₂.

    Shapes: weight [out, in], stats.input_norm [in] -> importance [out, in]. Comparable within an output row.
    Source: Sun et al. 2023, equation 1.
    """
    return weight.abs() * stats.input_norm
