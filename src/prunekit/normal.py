"""Normal equations of a linear's inputs: damping, and factorisations that do not give up quietly."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .errors import InputError, PrunekitWarning

_RETRIES = 3


def damped(gram: Tensor, damping: float, option: str) -> Tensor:
    """A new matrix, `gram` + λI with λ = `damping` · mean of the diagonal; channels that were never fed get that mean there, or 1 where
    none was.

    `option` is what a person sets the damping with. Shapes: [in, in]. Raises `InputError` for a negative damping.
    """
    if damping < 0:
        raise InputError(f"'{option}' cannot be {damping}: it is a fraction of the mean diagonal, like 0.01")
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.double().mean())
    diagonal += damping * mean
    diagonal[dead] = mean if mean > 0 else 1.0
    return matrix


def factor(gram: Tensor, damping: float, option: str) -> Tensor:
    """L, lower triangular, with LLᵀ = H + λI.

    Where the matrix is not positive definite in its own precision, it is tried in float64 with ten times the damping, up to three
    times, with a warning that says so. Shapes: [in, in]. Raises `InputError` where that does not help either.
    """
    tried = damping
    lower: Tensor
    for attempt in range(_RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(damped(gram if attempt == 0 else gram.double(), tried, option))
        if not int(failed) and bool(torch.isfinite(lower).all()):
            if attempt:
                warnings.warn(
                    f"gram matrix is not positive definite with damping {damping:g}: took {tried:g}",
                    PrunekitWarning,
                    stacklevel=2,
                )
            return lower
        tried = tried * 10 if tried > 0 else 1e-4
    raise InputError(f"{indefinite(option)} (tried up to {tried / 10:g})")


def inverse_factor(gram: Tensor, damping: float, option: str) -> Tensor:
    """U, upper triangular, with UᵀU = (H + λI)⁻¹: one `factor` of H turned about, and a triangular inverse. Shapes: [in, in]."""
    upper = factor(gram.flip(0, 1), damping, option).flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.to(gram.dtype)


def indefinite(option: str) -> str:
    """What a person is told where nothing can be factorised."""
    return (
        "the gram matrix of a linear's inputs is not positive definite: its inputs hold NaN or huge values; try --dtype float32, "
        f"or more damping with --set {option}=1"
    )
