"""DSnoT."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...parts import refine
from ...statistics import Statistics
from ._swapping import Terms, require, swap_while_off


@refine(needs={"input_sum", "input_square"}, paper="https://arxiv.org/abs/2310.08915", rowwise=True)
def dsnot(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    groups: tuple[int, int] | None,
    *,
    steps: int = 50,
    epsilon: float = 1e-3,
    accept: Literal["official", "monotone"] = "official",
    variance_power: float = 1.0,
) -> Tensor:
    """Swap weights until the mean of what each output loses is near 0.

    A row's error is E = Σ_{j pruned} W_ij·mean(x_j). Up to `steps` times a row keeps the pruned weight of largest
    sign(E)·W_ij·mean(x_j)/var(x_j)^variance_power and prunes, of the kept ones with sign(E)·W_ij·mean(x_j) < 0, that of smallest
    |W_ij|·‖X_j‖₂; in groups, the smallest of the same group. No weight moves twice.

    Shapes: weight [out, in], keep [out, in] bool (True = kept), groups (K, G) or None -> keep-mask of the same counts a row or group.
    Source: Zhang et al. 2024, the growing and the pruning criterion. Where this differs from it or from its published code:

    - The code stops a row at |E| ≤ 0.1 in sums over a sequence, a number that depends on the sequences' length and the inputs'
      scale. Here a row stops at `epsilon` times its |E| at the start: by default a thousandth, beyond which a swap overshoots.
    - `accept="official"` takes every swap while E is above that, as published. A swap may overshoot, and |E| then rises: the end may
      be worse than the start. "monotone" takes a swap only if it lowers |E|, and ends the row otherwise.
    - var is that of all tokens together; the code averages the variances within the sequences.
    - 50 steps are meant for rows of thousands of weights. On SmolLM2-135M's rows of 576 they make Wanda's mask much worse, and 7,
      the same share of a row, do not (docs/results/refinement.md).
    - The row ends when it runs out of weights to swap; the code then goes on with weights of the wrong sign.
    - In groups, a swap that would turn the sign of E ends the row whatever `accept` says, as in the code.
    """
    require(0, steps=steps, epsilon=epsilon, variance_power=variance_power)
    mean = stats.input_mean.to(weight)
    growth, norm = growth_factor(stats, variance_power).to(weight), stats.input_norm.to(weight)

    def terms(rows: slice) -> Terms:
        part = weight[rows]
        return Terms(part * mean, (part * growth).abs_(), part.abs().mul_(norm))

    return swap_while_off(keep, terms, groups, steps=steps, epsilon=epsilon, accept=accept)


def growth_factor(stats: Statistics, variance_power: float) -> Tensor:
    """mean(x_j)/var(x_j)^power, [in], float64; 0 for a channel that is always 0.

    A variance below float32's resolution of E[x²] is rounding, so it counts as that much: what is constant is then very steady, not
    infinitely so.
    """
    mean, variance = stats.input_mean.double(), stats.input_variance.double()
    floor = torch.finfo(torch.float32).eps * (variance + mean.square())
    steady = torch.maximum(variance, floor).pow(variance_power)
    # float32 must hold it times a weight
    return torch.where(steady > 0, mean / steady, 0).clamp(-1e30, 1e30)
