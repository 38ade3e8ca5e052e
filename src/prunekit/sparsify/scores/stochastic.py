"""Relative importance from sums over random parts of rows and columns."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...bits import row_chunks
from ...parts import Limits, score
from ...statistics import Statistics
from .ri import relative, row_norm

_SYMWANDA = "https://arxiv.org/abs/2501.18980"
_MARKS = 1 << 24  # entries of the marks kept while drawing: more rows at a time are fewer steps, each of which is short


@score(needs=set(), paper=_SYMWANDA, random=True)
def stochastic_ri(
    weight: Tensor,
    stats: Statistics,
    *,
    generator: torch.Generator,
    beta: Annotated[float, Limits(above=0, at_most=1)] = 0.1,
    tau_mode: Literal["per-axis", "min"] = "per-axis",
    rescale: bool = True,
    shared_index: bool = False,
) -> Tensor:
    """Relative importance with every ℓ1 norm summed over τ random entries, |W_kj|·(1/‖W_k,S_k‖₁ + 1/‖W_S_j,j‖₁).

    S_k (inputs) is drawn for every row and S_j (outputs) for every column, without replacement; with `shared_index` all rows share one
    set and all columns another, which is the one that reads less. `tau_mode="per-axis"` takes τ = ⌈β·in⌉ of a row and ⌈β·out⌉ of a
    column, and β = 1 is RI to the bit; "min", the common τ = ⌊β·min(in, out)⌋ of an independent implementation, is not RI for any β
    unless the weight is square. `rescale` multiplies a sum by entries/τ, so that it is an unbiased estimate of the whole sum. A sum
    that comes out 0 leaves its term out.

    Shapes: weight [out, in] -> importance [out, in]. Comparable within the whole layer. The same generator state gives the same sums on
    every device.
    Source: Yi and Richtárik 2025, lemma 3.10 (no activations, β = 0.1); "per-axis", `rescale` and `shared_index` are ours.
    """
    outputs, inputs = weight.shape
    of_row, of_column = _sample_sizes(outputs, inputs, beta, tau_mode)
    sampled = partial(_sampled_sums, generator=generator, rescale=rescale, shared=shared_index)
    row = sampled(weight, of_row) if of_row < inputs else row_norm(weight, 1)
    column = sampled(weight.t(), of_column) if of_column < outputs else stats.weight_column_norm(1)
    scores = torch.empty_like(weight)
    for part in row_chunks(outputs, inputs):
        scores[part] = relative(weight[part], row[part], column)
    return scores


@score(needs={"input_square"}, paper=_SYMWANDA, random=True)
def stochastic_ria(
    weight: Tensor,
    stats: Statistics,
    *,
    generator: torch.Generator,
    alpha: Annotated[float, Limits(at_least=0)] = 0.5,
    beta: Annotated[float, Limits(above=0, at_most=1)] = 0.1,
    tau_mode: Literal["per-axis", "min"] = "per-axis",
    rescale: bool = True,
    shared_index: bool = False,
) -> Tensor:
    """Stochastic relative importance times the norm of the input channel to the power α, StochRI_kj·‖X_j‖₂^α.

    Options but `alpha` are those of `stochastic-ri`.

    Shapes: weight [out, in], stats.input_norm [in] -> importance [out, in]. Comparable within the whole layer.
    Source: Yi and Richtárik 2025, lemma 3.10, with the activations of lemma 3.6.
    """
    relative_importance = stochastic_ri(
        weight,
        stats,
        generator=generator,
        beta=beta,
        tau_mode=tau_mode,
        rescale=rescale,
        shared_index=shared_index,
    )
    return relative_importance.mul_(stats.input_norm.pow(alpha))


def sample_indices(
    lines: int, length: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """For each of `lines`, `size` distinct numbers below `length`, every such set equally likely: [lines, size] int64 on `device`.

    Floyd's algorithm, all lines at once: `size` steps instead of the sort of `length` random numbers a line.
    """
    # in float64 the product below never rounds up to the bound
    draws = torch.rand(size, lines, dtype=torch.float64, generator=generator, device=generator.device).to(device)
    marks = torch.zeros(lines, length, dtype=torch.bool, device=device)
    line = torch.arange(lines, device=device)
    chosen = torch.empty(size, lines, dtype=torch.int64, device=device)
    for step, last in enumerate(range(length - size, length)):
        drawn = (draws[step] * (last + 1)).long()
        chosen[step] = torch.where(marks[line, drawn], last, drawn)
        marks[line, chosen[step]] = True
    return chosen.t()


def _sample_sizes(outputs: int, inputs: int, beta: float, tau_mode: str) -> tuple[int, int]:
    """How many entries of a row and of a column to sum. The margin is for products such as 0.07·100 = 7.000000000000001."""
    if tau_mode == "min":
        common = max(1, math.floor(beta * min(outputs, inputs) + 1e-9))
        return common, common
    return max(1, math.ceil(beta * inputs - 1e-9)), max(1, math.ceil(beta * outputs - 1e-9))


def _sampled_sums(matrix: Tensor, size: int, *, generator: torch.Generator, rescale: bool, shared: bool) -> Tensor:
    """Σ|·| over `size` random entries of every row of a matrix: [rows]."""
    rows, columns = matrix.shape
    if shared:
        index = sample_indices(1, columns, size, generator, matrix.device)[0]
        sums = matrix[:, index].abs().sum(1, dtype=torch.float64)
    else:
        sums = torch.empty(rows, dtype=torch.float64, device=matrix.device)
        step = max(1, _MARKS // columns)
        for start in range(0, rows, step):
            part = matrix[start : start + step]
            index = sample_indices(len(part), columns, size, generator, matrix.device)
            sums[start : start + step] = part.gather(1, index).abs().sum(1, dtype=torch.float64)
    return (sums * (columns / size) if rescale else sums).to(matrix.dtype)
