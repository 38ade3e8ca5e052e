"""ZipLM: optimal brain surgeon one unit at a time, all others refitted behind each."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ...normal import inverse_factor
from ...parts import Limits, unit_score
from ..units import Structure
from ..view import BlockView

_EXACT = 4096  # inputs up to which it is computed in float64
_LAZY = 64  # inputs that are removed between two updates of whole matrices


@unit_score(needs={"gram"}, paper="https://arxiv.org/abs/2302.04089")
def ziplm(view: BlockView, structure: Structure, *, damping: Annotated[float, Limits(at_least=0)] = 0.01) -> Tensor:
    """What the removal of a unit costs at its turn, when the cheapest one goes first and the others make up for it each time.

    With W the weight refitted so far and H⁻¹ the inverse gram matrix of the inputs that are left, removing the inputs S of a unit and
    refitting costs tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) of squared output error. `obs` is the first round of this; behind it channels that stand in
    for each other are no longer both cheap. All units are removed; a score is that cost, or just more than the score before where it is
    less, so that their order is the order of removal. Inputs that were never fed go first.

    Shapes: -> [units]. Source: Kurtic et al. 2023 (ZipLM), equations 4 and 5 and algorithm 1. That only WᵀW and H⁻¹ are carried, as
    matrices with a few rank-one terms, is ours. Raises `InputError` where the gram matrix cannot be factorised.
    """
    gram, weight = view.statistics[structure.name].gram, view.weight(structure.name)
    dtype = torch.float64 if len(gram) <= _EXACT else torch.float32
    factor = inverse_factor(gram, damping, "score.damping").to(dtype)
    weight = weight.to(dtype) * (gram.diagonal() > 0)
    left = _Left(factor.t() @ factor, weight.t() @ weight)
    scores = torch.empty(structure.count, dtype=torch.float64)
    open_units = torch.ones(structure.count, dtype=torch.bool)
    before = -math.inf
    for _ in range(structure.count):
        costs = torch.full((structure.count,), math.inf, dtype=dtype)
        costs[open_units] = left.costs(structure.inputs(open_units.nonzero().flatten()).reshape(-1, structure.size))
        unit = int(costs.argmin())
        before = max(float(costs[unit].clamp_min(0)), math.nextafter(before, math.inf))
        scores[unit] = before
        open_units[unit] = False
        for channel in structure.inputs(torch.tensor([unit])).tolist():
            left.remove(channel)
    return scores


class _Left:
    """H⁻¹ and WᵀW of a weight W while its inputs are removed, [in, in] each.

    Removing input j with h = H⁻¹_:j and a = (WᵀW)_:j takes u uᵀ from the one and u vᵀ + v uᵀ from the other, where u = h / √h_j and
    v = a / √h_j − u a_j / (2 h_j). These terms are subtracted from the matrices once in a while, all together.
    """

    def __init__(self, inverse: Tensor, product: Tensor) -> None:
        self._inverse, self._product = inverse, product
        self._of_inverse, self._of_product = inverse.diagonal().clone(), product.diagonal().clone()
        self._u, self._v = inverse.new_empty(2, len(inverse), _LAZY)
        self._terms = 0

    def costs(self, units: Tensor) -> Tensor:
        """What the removal of each of some units costs. Shapes: inputs of the units [units, size] -> [units]."""
        if units.shape[1] == 1:
            inputs = units[:, 0]
            return self._of_product[inputs] / self._of_inverse[inputs]
        self._settle()
        places = units[:, :, None], units[:, None, :]
        solved: Tensor = torch.linalg.solve(self._inverse[places], self._product[places])
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, channel: int) -> None:
        """Remove an input that is left, the others refitted."""
        if self._terms == _LAZY:
            self._settle()
        u, v = self._u[:, : self._terms], self._v[:, : self._terms]
        inverse = self._inverse[:, channel] - u @ u[channel]
        product = self._product[:, channel] - u @ v[channel] - v @ u[channel]
        root = inverse[channel].sqrt()
        new_u = inverse / root
        new_v = product / root - new_u * (product[channel] / (2 * inverse[channel]))
        self._u[:, self._terms], self._v[:, self._terms] = new_u, new_v
        self._terms += 1
        self._of_inverse -= new_u.square()
        self._of_product -= 2 * new_u * new_v

    def _settle(self) -> None:
        u, v = self._u[:, : self._terms], self._v[:, : self._terms]
        self._inverse -= u @ u.t()
        both = u @ v.t()
        self._product -= both + both.t()
        self._terms = 0
