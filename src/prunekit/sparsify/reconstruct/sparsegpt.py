"""SparseGPT: optimal brain surgeon with the order of the columns fixed."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...normal import inverse_factor
from ...parts import Limits, reconstruct
from ...statistics import Statistics
from ..patterns import Selection, keep_groups, keep_largest


@reconstruct(needs={"gram"}, paper="https://arxiv.org/abs/2301.00774", rowwise=True, chooses=True)
def sparsegpt(
    weight: Tensor,
    keep: Tensor | None,
    stats: Statistics,
    selection: Selection,
    *,
    block: Annotated[int, Limits(at_least=1)] = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Remove column by column, each time changing the columns to the right so that the output changes least.

    A fraction is met within each `block` of columns, over all rows or in each row as `selection.group` says, with exact totals: after
    every block, `floor` of the columns so far times the fraction. K:G groups are chosen one by one, from weights that already make up
    for the groups before. Where `keep` is given it is respected and only the weights are found. Inputs that are always 0 are removed
    first and change nothing.

    Shapes: weight [out, in], stats.gram [in, in] -> weight and keep-mask [out, in].
    Source: Frantar & Alistarh 2023, algorithm 1. Raises `InputError` where the gram matrix cannot be factorised.
    """
    rows, columns = weight.shape
    groups = selection.groups
    if groups is not None:
        block = max(groups[1], block // groups[1] * groups[1])
    gram = stats.gram
    dead = gram.diagonal() == 0
    factor = inverse_factor(gram, damping, "reconstruct.damping").to(weight.dtype)
    scale = factor.diagonal()
    work = weight.t().clone(memory_format=torch.contiguous_format)  # [in, out]: a column is then contiguous
    kept = (
        torch.ones_like(work, dtype=torch.bool)
        if keep is None
        else keep.t().clone(memory_format=torch.contiguous_format)
    )
    done = 0  # zeros chosen so far, of a row or of all rows
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if keep is None and groups is None:
            scores = _importance(work[start:end], scale[start:end], dead[start:end]).t()
            if selection.group == "row":
                zeros = selection.pattern.zeros(end) - done
                chosen = keep_largest(scores, zeros)
            else:
                zeros = selection.pattern.zeros(rows * end) - done
                chosen = keep_largest(scores.reshape(1, -1), zeros).reshape(scores.shape)
            done += zeros
            kept[start:end] = chosen.t()
        errors = torch.empty_like(work[start:end])
        for column in range(start, end):
            if keep is None and groups is not None and column % groups[1] == 0:
                part = slice(column, column + groups[1])
                kept[part] = keep_groups(_importance(work[part], scale[part], dead[part]).t(), *groups).t()
            error = (work[column] * ~kept[column]).div_(scale[column])
            work[column].mul_(kept[column])
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    work.mul_(kept)  # what a removed weight's own column gave it back
    return work.t(), kept.t()


def _importance(work: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    """(w / U_jj)², what removing a weight costs; 0 for inputs that are always 0. Shapes: [columns, out]."""
    return (work / scale[:, None]).square().masked_fill_(dead[:, None], 0)
