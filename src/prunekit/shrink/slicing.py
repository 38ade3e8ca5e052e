"""A plan carried out on a block's tensors: rows, columns and entries of removed units are left out, nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .plan import Plan
from .units import Structure


class Slicer:
    """Cuts the tensors of one block.

    `index[name]` holds, for a tensor's name in the block, what stays of it along each axis that is cut: {axis: [kept] int64}.
    """

    def __init__(self, structures: Sequence[Structure], plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.index: dict[str, dict[int, Tensor]] = {}
        for structure in structures:
            kept = plan.kept(structure)
            if len(kept) == structure.count:
                continue
            for part in structure.slices:
                length = shapes[part.tensor][part.dim]
                axes = self.index.setdefault(part.tensor, {})
                stays = part.kept(kept, length)
                if part.dim in axes:  # a linear whose rows feed several structures
                    stays = stays[torch.isin(stays, axes[part.dim])]
                axes[part.dim] = stays

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor is left with."""
        axes = self.index.get(name, {})
        return tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(shape))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor; itself where nothing goes."""
        for axis, index in self.index.get(name, {}).items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor
