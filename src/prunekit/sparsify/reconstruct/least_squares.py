"""Least squares: the best weights for a mask that is given."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ...errors import InputError
from ...normal import damped
from ...parts import Limits, reconstruct
from ...statistics import Statistics
from ..patterns import Selection


@reconstruct(needs={"gram"}, paper="https://arxiv.org/abs/2406.07831", rowwise=True)
def least_squares(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    selection: Selection,
    *,
    solver: Literal["cg", "exact"] = "cg",
    steps: Annotated[int, Limits(at_least=0)] = 20,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The kept weights that bring each row's output nearest to the dense row's, the mask being given.

    Minimises (w̃ − w)(H + λI)(w̃ − w)ᵀ of every row over its kept entries: by `steps` of conjugate gradients on all rows at once,
    projected on the mask and preconditioned with the diagonal, or exactly, a row at a time.

    Shapes: weight and keep [out, in], stats.gram [in, in] -> weight and keep-mask [out, in].
    Source: Meng et al. 2024 (ALPS), section 3.3. Raises `InputError` where a system cannot be solved.
    """
    matrix = damped(stats.gram, damping, "reconstruct.damping").to(weight.dtype)
    if solver == "exact":
        return _exact(weight, keep, matrix), keep
    return conjugate_gradients(weight, weight * keep, keep, matrix, steps), keep


def conjugate_gradients(weight: Tensor, start: Tensor, keep: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """Projected, preconditioned conjugate gradients for min (w̃ − w) M (w̃ − w)ᵀ in every row, from `start` on.

    Rows have step lengths of their own; one that is solved stands still. The quadratic loss of no row ever rises.
    Shapes: weight, start, keep [out, in], matrix [in, in] -> [out, in].
    """
    scale = matrix.diagonal().reciprocal()
    found = start.clone()
    residual = ((weight - found) @ matrix).mul_(keep)
    toward = residual * scale
    descent = toward.clone()
    product = (residual * toward).sum(1, keepdim=True)
    for _ in range(steps):
        image = (descent @ matrix).mul_(keep)
        curvature = (descent * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, product / curvature, 0)
        found.addcmul_(length, descent)
        residual.addcmul_(length, image, value=-1)
        torch.mul(residual, scale, out=toward)
        following = (residual * toward).sum(1, keepdim=True)
        descent.mul_(torch.where(product > 0, following / product, 0)).add_(toward)
        product = following
    return found


def _exact(weight: Tensor, keep: Tensor, matrix: Tensor) -> Tensor:
    """Row by row, by the normal equations of the kept entries in float64."""
    matrix = matrix.double()
    found = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        inside, outside = torch.nonzero(kept).flatten(), torch.nonzero(~kept).flatten()
        if not len(inside):
            continue
        system = matrix[inside[:, None], inside]
        lower, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            raise InputError(
                f"the least squares of row {row} are singular: add damping, like --set reconstruct.damping=0.01"
            )
        moved = matrix[inside[:, None], outside] @ weight[row, outside].double()
        solved = torch.cholesky_solve(moved[:, None], lower)[:, 0]
        found[row, inside] = weight[row, inside] + solved.to(weight.dtype)
    return found
