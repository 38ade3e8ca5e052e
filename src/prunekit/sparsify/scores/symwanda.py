"""SymWanda: inputs and outputs weighed together."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ...errors import InputError
from ...parts import Limits, score
from ...statistics import Statistics
from .owanda import owanda
from .wanda import wanda


@score(
    needs={"input_square", "output_square"},
    paper="https://arxiv.org/abs/2501.18980",
    rowwise=True,
    note="within an output row it lies between wanda and magnitude, because ‖Y_k‖ is constant there",
)
def symwanda(
    weight: Tensor,
    stats: Statistics,
    *,
    lambda_in: Annotated[float, Limits(at_least=0)] = 1.0,
    lambda_out: Annotated[float, Limits(at_least=0)] = 1.0,
    combine: Literal["sum", "rss"] = "sum",
    balance: Literal["none", "mean"] = "none",
) -> Tensor:
    """Weight magnitude times the weighted norms of its input and its output, |W_kj|·(λ_in·‖X_j‖₂ + λ_out·‖Y_k‖₂).

    `combine="rss"` takes the root of the sum of squares instead, which is the score of the squared objective. Inputs and outputs have
    their own scales; `balance="mean"` divides the norms of each by their mean over the layer. A weight λ of 0 leaves exactly the
    other side: Wanda or OWanda.

    Shapes: weight [out, in], stats.input_norm [in], stats.output_norm [out] (bias included) -> importance [out, in]. Comparable
    within the whole layer.
    Source: Yi and Richtárik 2025, lemma 3.1; the weights λ, `rss` and `balance` are ours.
    """
    if not lambda_in and not lambda_out:
        raise InputError(
            "'score.lambda_in' and 'score.lambda_out' are both 0, which makes all weights equal: raise one"
        )
    if not lambda_out:
        return wanda(weight, stats)
    if not lambda_in:
        return owanda(weight, stats)
    inputs, outputs = stats.input_norm, stats.output_norm
    if balance == "mean":  # where all are 0 so is their mean, and 0 they stay
        least = torch.finfo(inputs.dtype).tiny
        inputs = inputs / inputs.mean().clamp_min(least)
        outputs = outputs / stats.mean_output_norm.clamp_min(least)
    return weight.abs() * combined(lambda_in * inputs, lambda_out * outputs, combine)


def combined(of_columns: Tensor, of_rows: Tensor, combine: Literal["sum", "rss"]) -> Tensor:
    """Every column's norm with every row's: added, or the root of the sum of their squares. [in], [out] -> [out, in]."""
    if combine == "rss":
        return torch.hypot(of_rows[:, None], of_columns)
    return of_rows[:, None] + of_columns
