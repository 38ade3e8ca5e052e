"""Numerical Pruning: Newton's method on a relaxed mask, which ends after one step."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...errors import InputError
from ...parts import Limits, unit_score
from ..units import Structure
from ..view import BlockView

_EXACT = 4096  # inputs up to which the system is solved in float64


@unit_score(needs={"gram"}, paper="https://arxiv.org/abs/2412.12441")
def numerical(view: BlockView, structure: Structure, *, damping: Annotated[float, Limits(at_least=0)] = 1e-3) -> Tensor:
    """The minimiser z of ½ Σ_i ‖X W_i − X (z ∘ W_i)‖² + λ/2 (1ᵀz − r)², up to what does not change its order.

    The objective is quadratic, so the paper's iterations end after one: z = 1 − c·u with u = A⁻¹1 and A = (WᵀW) ∘ (XᵀX). λ and r
    only set c, which for mean z = 1 − ρ is ρ·D/Σu; −u·D/Σu is returned, whose mean is −1 in every structure, so that structures may be
    compared as the paper's z are. Inputs that were never fed come out lowest. `damping` times the mean diagonal is added to A's.

    Shapes: -> [units], the mean over a unit's inputs. Source: Numerical Pruning (2024), section 3; the closed form is ours.
    Raises `InputError` where A cannot be factorised.
    """
    weight, gram = view.weight(structure.name), view.statistics[structure.name].gram
    exact = torch.float64 if len(gram) <= _EXACT else torch.float32
    matrix = (weight.t() @ weight).to(exact).mul_(gram.to(exact))
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    mean = diagonal.double().mean()
    diagonal += damping * float(mean)
    diagonal[dead] = 1.0
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise InputError(
            f"the system of '{structure.consumer.full_name}' cannot be solved: take more --samples, or more "
            f"--set score.damping than {damping:g}"
        )
    ones = (~dead).to(exact)[:, None]
    found = torch.cholesky_solve(ones, lower)[:, 0].double()
    total = float(found.sum())
    values = -found * int((~dead).sum()) / total if total else -found
    if bool(dead.any()):
        values[dead] = values.min() - 1
    return structure.by_unit(values) / structure.size
