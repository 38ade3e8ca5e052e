"""ALPS: mask and weights found together by the alternating direction method of multipliers."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...errors import InputError
from ...normal import damped, indefinite
from ...parts import Limits, reconstruct
from ...statistics import Statistics
from ..patterns import Selection
from .least_squares import conjugate_gradients

_PERIOD = 3  # iterations between two looks at how much of the mask still moves


@reconstruct(needs={"gram"}, paper="https://arxiv.org/abs/2406.07831", rowwise=False, chooses=True)
def alps(
    weight: Tensor,
    keep: Tensor | None,
    stats: Statistics,
    selection: Selection,
    *,
    steps: Annotated[int, Limits(at_least=1)] = 300,
    rho: Annotated[float, Limits(above=0)] = 0.1,
    damping: float = 0.01,
    polish: Annotated[int, Limits(at_least=0)] = 10,
) -> tuple[Tensor, Tensor]:
    """Split weights into a free copy and one that has the pattern, and pull them together ever harder; then polish on the mask found.

    The problem is scaled to a unit diagonal. Every three iterations the penalty grows with the share of the mask that moved since:
    by 1.3 above a tenth, by 1.2 above half a hundredth, by 1.1 below; ADMM ends when the mask stands still, and `polish` steps of
    conjugate gradients find the weights for it. Where `keep` is given, only they are done.

    Shapes: weight [out, in], stats.gram [in, in] -> weight and keep-mask [out, in].
    Source: Meng et al. 2024, algorithm 1 and its appendix on penalty updates. Raises `InputError` where nothing can be factorised.
    """
    matrix = damped(stats.gram, damping, "reconstruct.damping").to(weight.dtype)
    root = matrix.diagonal().sqrt()
    matrix = matrix / root / root[:, None]
    scaled = weight * root
    if keep is None:
        found, keep = _admm(scaled, matrix, selection, steps, rho)
    else:
        found = scaled * keep
    return conjugate_gradients(scaled, found, keep, matrix, polish).div_(root), keep


def _admm(weight: Tensor, matrix: Tensor, selection: Selection, steps: int, rho: float) -> tuple[Tensor, Tensor]:
    """Shapes: weight [out, in] of the scaled problem, matrix [in, in] with a diagonal of ones -> weight, keep-mask."""
    target = weight @ matrix
    keep = selection.mask(weight.abs())
    sparse = weight * keep
    dual = torch.zeros_like(weight)
    inverse = _inverse(matrix, rho)
    before = keep
    kept = max(1, int(keep.sum()))
    for step in range(1, steps + 1):
        free = (target - dual).add_(sparse, alpha=rho) @ inverse
        pulled = free + dual / rho
        keep = selection.mask(pulled.abs())
        sparse = pulled * keep
        dual += rho * (free - sparse)
        if step % _PERIOD == 0:
            moved = int((keep != before).sum()) / (2 * kept)
            before = keep
            if moved == 0 or step == steps:
                break
            rho *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1
            inverse = _inverse(matrix, rho)
    return sparse, keep


def _inverse(matrix: Tensor, rho: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(rho)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise InputError(indefinite("reconstruct.damping"))
    return torch.cholesky_inverse(lower)
