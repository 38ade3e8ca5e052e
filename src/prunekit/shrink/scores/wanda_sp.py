"""Wanda for structures."""

from __future__ import annotations

from torch import Tensor

from ...parts import unit_score
from ..units import Structure
from ..view import BlockView


@unit_score(needs={"input_square"}, paper="https://arxiv.org/abs/2312.11983")
def wanda_sp(view: BlockView, structure: Structure) -> Tensor:
    """Mean of |W_ij| over the consumer's outputs times the norm of its input, ‖x_j‖/√tokens, summed over a unit.

    Shapes: -> [units]. Source: the Wanda-sp baseline of FLAP (An et al. 2023).
    """
    stats = view.statistics[structure.name]
    size = view.weight(structure.name).abs().mean(0).double()
    return structure.by_unit(size * (stats.input_square / stats.count).sqrt().to(size))
