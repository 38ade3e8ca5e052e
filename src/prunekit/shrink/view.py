"""What a score is shown of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..statistics import Statistics
from .units import Structure


@dataclass(frozen=True, eq=False)
class BlockView:
    """A block as a score sees it; linears are called by their names in the block.

    Attributes:
        structures: what can go from it.
        read: linear -> its weight [out, in] as the checkpoint holds it.
        statistics: consumer -> sums over its inputs in the dense block.
        gradients: linear -> what its gradient was reduced to, by the name of the sum: [out] for producers, [in] for consumers.
    """

    structures: tuple[Structure, ...]
    read: Callable[[str], Tensor]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    gradients: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def weight(self, linear: str) -> Tensor:
        """Weight of a linear, [out, in], in float32 (float64 where it is stored so)."""
        weight = self.read(linear)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def other(self, structure: Structure) -> Structure | None:
        """The block's first structure of the other kind."""
        return next((each for each in self.structures if each.kind != structure.kind), None)
