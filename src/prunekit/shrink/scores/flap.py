"""Fluctuation: what a constant could not stand in for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...parts import unit_score
from ..units import ATTENTION, Structure
from ..view import BlockView


@unit_score(needs={"input_sum", "input_square"}, paper="https://arxiv.org/abs/2312.11983")
def flap(view: BlockView, structure: Structure, *, metric: Literal["wifv", "ifv", "wifn"] = "wifv") -> Tensor:
    """Variance of a consumer's input times the squared norm of its column, standardised over the structure's inputs.

    `ifv` leaves the column out, `wifn` is the mean |W_ij| times the norm of the input. Attention's values are squared before they are
    standardised and then averaged over a unit, as in the official code; so the scores of all blocks and kinds may be compared.

    Shapes: -> [units]. Source: An et al. 2023 (FLAP), equations 3 to 5.
    """
    stats = view.statistics[structure.name]
    weight = view.weight(structure.name)
    if metric == "ifv":
        values = stats.input_variance
    elif metric == "wifv":
        values = stats.input_variance * weight.square().sum(0).double()
    else:
        values = stats.input_norm * weight.abs().mean(0).double()
    if structure.kind == ATTENTION:
        values = values.square()
    spread = values.std()
    values = (values - values.mean()) / spread if float(spread) > 0 else values - values.mean()
    return structure.by_unit(values) / structure.size
