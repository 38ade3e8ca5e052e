"""The reformation of Search for Efficient LLMs, step by step as the paper has it."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...errors import InputError
from ...parts import Limits, compensate
from ...statistics import Statistics


@compensate(needs={"gram"}, paper="https://arxiv.org/abs/2409.17372")
def admm(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    *,
    rho: Annotated[float, Limits(above=0)] = 1.0,
    steps: Annotated[int, Limits(at_least=1)] = 30,
) -> tuple[Tensor, Tensor | None]:
    """min ‖X W′ᵀ − X Wᵀ‖² with W′ zero where inputs are gone, by the alternating direction method of multipliers.

    W′ ← (G + ρI)⁻¹ (G Wᵀ + ρ(Z − U)ᵀ), Z ← W′ + U without what is gone, U ← U + W′ − Z, from W′ = Z = W, U = 0; ρ is `rho` times
    the mean of G's diagonal. What it comes to in the end is what `least-squares` computes at once without damping, so this is here to
    be compared with.

    Shapes: weight [out, in], keep [kept], stats.gram [in, in] -> [out, kept], None.
    Source: equations 6 to 9, where the constraint is printed with the mask's sign the other way round.
    """
    gram = stats.gram.double()
    target = gram @ weight.double().t()
    shift = rho * float(gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if int(failed) or shift == 0:
        raise InputError("the gram matrix of a linear's inputs is not positive definite: give --set compensate.rho=10")
    stays = torch.zeros(weight.shape[1], 1, dtype=torch.bool, device=weight.device)
    stays[keep] = True
    solution = weight.double().t()
    split, multiplier = solution.clone(), torch.zeros_like(solution)
    for _ in range(steps):
        solution = torch.cholesky_solve(target + shift * (split - multiplier), lower)
        split = torch.where(stays, solution + multiplier, 0)
        multiplier += solution - split
    return split.t()[:, keep].to(weight), None
