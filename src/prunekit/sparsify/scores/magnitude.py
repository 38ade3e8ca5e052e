"""Magnitude pruning."""

from __future__ import annotations

from torch import Tensor

from ...parts import score
from ...statistics import Statistics


@score(needs=set(), paper="https://arxiv.org/abs/1506.02626", rowwise=True)
def magnitude(weight: Tensor, stats: Statistics) -> Tensor:
    """Weight magnitude; looks at no data.

    Shapes: weight [out, in] -> importance [out, in]. Comparable within the whole layer.
    Source: Han et al. 2015, section 3.
    """
    return weight.abs()
