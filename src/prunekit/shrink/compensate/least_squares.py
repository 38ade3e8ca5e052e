"""Kept columns refitted so that they give what all of them gave."""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
from torch import Tensor

from ...errors import InputError, PrunekitWarning
from ...parts import Limits, compensate
from ...statistics import Statistics

_RETRIES = 3


@compensate(needs={"gram"}, paper="https://arxiv.org/abs/2412.12441")
def least_squares(
    weight: Tensor, keep: Tensor, stats: Statistics, *, damping: Annotated[float, Limits(at_least=0)] = 0.01
) -> tuple[Tensor, Tensor | None]:
    """V = W_K + W_P G_PK (G_KK + λI)⁻¹, which minimises ‖X Wᵀ − X_K Vᵀ‖² + λ‖V − W_K‖².

    The damping shrinks the update, not the weights: with nothing removed V is W, and the error on the calibration tokens is never above
    that of leaving columns out, whatever λ. λ is `damping` times the mean of G's diagonal; where that is not enough, ten times more
    is tried in float64, with a warning.

    Shapes: weight [out, in], keep [kept], stats.gram [in, in] -> [out, kept], None.
    Source: theorem 3 of Numerical Pruning (2024), and the fixed point of the reformation of Search for Efficient LLMs (2024).
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[keep] = False
    if not bool(gone.any()):
        return weight, None
    gram = stats.gram
    kept, cross = gram[keep][:, keep].double(), gram[keep][:, gone].double()
    update = _solved(kept, cross @ weight[:, gone].double().t(), damping)
    return weight[:, keep] + update.t().to(weight), None


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """(G + λI)⁻¹ R. Shapes: gram [kept, kept], right [kept, out]."""
    mean = float(gram.diagonal().mean())
    tried = damping
    for attempt in range(_RETRIES + 1):
        matrix = gram.clone()
        diagonal = matrix.diagonal()
        dead = diagonal == 0
        diagonal += tried * mean
        diagonal[dead] += 1.0
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            if attempt:
                warnings.warn(
                    f"gram matrix of kept inputs is not positive definite with damping {damping:g}: took {tried:g}",
                    PrunekitWarning,
                    stacklevel=2,
                )
            return torch.cholesky_solve(right, lower)
        tried = tried * 10 if tried > 0 else 1e-4
    raise InputError(
        "the gram matrix of a linear's kept inputs is not positive definite: its inputs hold NaN or huge values; try --dtype float32, "
        f"or more damping than --set compensate.damping={damping:g}"
    )
