"""Chance: what a criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ...parts import unit_score
from ..units import Structure
from ..view import BlockView


@unit_score(needs=set(), paper="", random=True)
def random(view: BlockView, structure: Structure, *, generator: torch.Generator) -> Tensor:
    """A uniform random number for every unit.

    Shapes: -> [units].
    """
    return torch.rand(structure.count, generator=generator, dtype=torch.float64)
