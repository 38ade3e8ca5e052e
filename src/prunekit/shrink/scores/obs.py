"""Optimal brain surgeon: what is lost when all other inputs make up for one."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ...normal import inverse_factor
from ...parts import Limits, unit_score
from ..units import Structure
from ..view import BlockView


@unit_score(needs={"gram"}, paper="https://arxiv.org/abs/2409.17372")
def obs(view: BlockView, structure: Structure, *, damping: Annotated[float, Limits(at_least=0)] = 0.01) -> Tensor:
    """Squared norm of an input's column over its entry on the diagonal of the inverse gram matrix, summed over a unit.

    Σ_i W_ij² / (H⁻¹)_jj is the output error that is left when input j is removed and least squares refits the others. Of an input that
    was never fed that is 0.

    Shapes: -> [units]. Source: equations 1 to 3 of Search for Efficient Large Language Models (2024), of which this takes the
    consumer's columns.
    """
    weight = view.weight(structure.name)
    gram = view.statistics[structure.name].gram
    inverse = inverse_factor(gram, damping, "score.damping").double().square().sum(0)
    return structure.by_unit(weight.double().square().sum(0) / inverse * (gram.diagonal() > 0))
