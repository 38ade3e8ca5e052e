"""The size of a unit's weights."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ...parts import Limits, unit_score
from ..units import Structure
from ..view import BlockView


@unit_score(needs=set(), paper="https://arxiv.org/abs/2312.11983")
def magnitude(
    view: BlockView, structure: Structure, *, p: Annotated[float, Limits(above=0)] = 2.0, coupled: bool = True
) -> Tensor:
    """Sum of |weight|^p over a unit; with `coupled` over all matrices that lose something with it, else over the consumer's columns.

    Shapes: -> [units]. Source: the mag-sp baseline of FLAP is p = 2 on the consumer alone; LLM-Pruner's l1 and l2 are coupled.
    """
    total = torch.zeros(structure.count, dtype=torch.float64)
    for part in structure.slices:
        linear = part.tensor.removesuffix(".weight")
        if linear == part.tensor or (linear != structure.name and not coupled):
            continue
        weight = view.weight(linear)
        powers = weight.abs().pow(p).sum(0 if linear == structure.name else 1, dtype=torch.float64).cpu()
        total += powers[part.entries].sum(1)
    return total
