"""R²-DSnoT."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ...parts import Limits, refine
from ...statistics import Statistics, column_norm
from ._swapping import Terms, require, row_sums, swap_while_off
from .dsnot import growth_factor


@refine(needs={"input_sum", "input_square"}, paper="https://arxiv.org/abs/2501.18980")
def r2_dsnot(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    groups: tuple[int, int] | None,
    *,
    steps: int = 50,
    epsilon: float = 1e-3,
    accept: Literal["official", "monotone"] = "official",
    variance_power: float = 1.0,
    alpha: float = 0.5,
    relative: Literal["none", "grow", "prune"] = "grow",
    gamma_grow: float = 0.0,
    gamma_prune: float = 1e-4,
    p: Annotated[float, Limits(at_least=0)] | Literal["inf"] = 2.0,
    reg_axis: Literal["row", "col"] = "col",
) -> Tensor:
    """DSnoT with relative weights and a regulariser in what it swaps first.

    As in `dsnot` (`steps`, `epsilon`, `accept`, `variance_power`), but a row keeps the pruned weight of largest
    sign(E)·D_ij·mean(x_j)/var(x_j)^variance_power + γ_grow·R_j and prunes that of smallest |P_ij|·‖X_j‖₂^alpha + γ_prune·R_j. D and
    P are W, except that the one named by `relative` is the signed relative importance W_ij·(1/‖W_:j‖₁ + 1/‖W_i:‖₁). Both at once is
    not offered: the paper found it to do harm. E itself is always that of W.

    R_j is the ℓp norm of column j of the weight as it was masked at the start (`p` positive, inf, or 0 to count), divided by the
    mean over columns and times the mean of the row's other term: the two terms are in different units, one of which grows with
    the number of tokens, and so γ is a pure number, the share of an average score that an average column adds. With
    `reg_axis="row"`, the norm of the row, the term is equal for all a row may choose from, and nothing changes.

    Shapes: weight [out, in], keep [out, in] bool (True = kept), groups (K, G) or None -> keep-mask of the same counts a row or group.
    Source: Yi and Richtárik 2025, R²-DSnoT, put together from descriptions of it rather than from its formula. The scale of R and
    the default of `reg_axis` are ours.
    """
    require(0, steps=steps, epsilon=epsilon, variance_power=variance_power, alpha=alpha)
    require(0, gamma_grow=gamma_grow, gamma_prune=gamma_prune)
    mean = stats.input_mean.to(weight)
    growth, norm = growth_factor(stats, variance_power).to(weight), stats.input_norm.pow(alpha).to(weight)
    by_column = _inverse(stats.weight_column_norm(1)).to(weight) if relative != "none" else None
    # Along rows the term is a constant: adding it could only blur scores that are nearly equal, so it is left out.
    regularised = reg_axis == "col" and (gamma_grow > 0 or gamma_prune > 0)
    penalty = _over_mean(column_norm(weight * keep, float(p))) if regularised else None

    def terms(rows: slice) -> Terms:
        part = weight[rows]
        grow, prune = (part * growth).abs_(), part.abs().mul_(norm)
        if by_column is not None:
            importance = by_column + _inverse(row_sums(part.abs()))[:, None].to(weight)
            (grow if relative == "grow" else prune).mul_(importance)
        if penalty is not None:
            _add_penalty(grow, gamma_grow, penalty)
            _add_penalty(prune, gamma_prune, penalty)
        return Terms(part * mean, grow, prune)

    return swap_while_off(keep, terms, groups, steps=steps, epsilon=epsilon, accept=accept)


def _inverse(norm: Tensor) -> Tensor:
    """1/norm, and 0 where all is 0 and there is nothing to be relative to."""
    return torch.where(norm > 0, 1 / norm, 0)


def _over_mean(norm: Tensor) -> Tensor:
    mean = norm.mean()
    return norm / mean if mean > 0 else norm


def _add_penalty(scores: Tensor, gamma: float, penalty: Tensor) -> None:
    """Add γ·R, in place. Shapes: scores [rows, in], penalty [in] (1 on average)."""
    if gamma > 0:
        typical = row_sums(scores) / scores.shape[1]
        scores.addcmul_((gamma * typical)[:, None].to(scores), penalty.to(scores))
