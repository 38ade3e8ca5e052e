"""Optimal brain surgeon over all matrices of a unit: those that make its inputs and the one that reads them."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...normal import inverse_factor
from ...parts import Limits, unit_score
from ...statistics import Statistics
from ..units import Structure
from ..view import BlockView


@unit_score(needs={"gram"}, paper="https://arxiv.org/abs/2409.17372", coupled=True)
def obs_coupled(
    view: BlockView, structure: Structure, *, damping: Annotated[float, Limits(at_least=0)] = 0.01
) -> Tensor:
    """Σ W_ij² / (H⁻¹)_jj over the rows of the linears that produce a unit, and over the columns of the one that consumes it.

    H is the gram matrix of what each linear is fed, with `damping` times its mean on the diagonal.

    Shapes: -> [units]. Source: equations 1 to 3 of Search for Efficient Large Language Models (2024). `obs` is the consumer's share.
    """
    diagonals: dict[int, Tensor] = {}

    def cost(name: str) -> Tensor:
        """W_ij² / (H⁻¹)_jj, [out, in] float64."""
        inputs = view.statistics[name]
        place = inputs.gram.data_ptr()  # of linears that are fed the same tensor there is one matrix
        if place not in diagonals:
            diagonals[place] = _inverse_diagonal(inputs, damping)
        return view.weight(name).double().square() / diagonals[place]

    fed = view.statistics[structure.name].gram.diagonal() > 0  # what never was is missed by nobody
    total = structure.by_unit(cost(structure.name).sum(0) * fed)
    for part in structure.slices[1:]:
        linear, _, leaf = part.tensor.rpartition(".")
        if leaf == "weight" and linear in view.statistics:
            total = total + cost(linear).sum(1)[part.entries].sum(1)
    return total


def _inverse_diagonal(inputs: Statistics, damping: float) -> Tensor:
    """The diagonal of (H + λI)⁻¹, [in] float64."""
    factor: Tensor = torch.as_tensor(inverse_factor(inputs.gram, damping, "score.damping"))
    return factor.double().square().sum(0)
