"""What a score of units is shown of a block: weights, and what was measured of its linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import PrunekitError
from ..statistics import Statistics
from .perceptron import Perceptron
from .units import Structure


@dataclass(frozen=True)
class Gradients:
    """Sums over a weight's rows [out] and over its columns [in], float64 on the processor, by what is summed (see `gradients.py`)."""

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockView:
    """One block, by the names of its linears there.

    Attributes:
        weights: [out, in] each, as the checkpoint holds them.
        statistics: sums over what each linear was fed, and of the modules of `perceptron` over what it names.
        gradients: sums over what each linear's weight does to an objective.
        structures: what can go from it.
        perceptron: its gate and its norm, where the score needs them.
        gains: what that norm multiplies channels by, in absolute value, [hidden].
    """

    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    gradients: Mapping[str, Gradients] = field(default_factory=dict)
    structures: tuple[Structure, ...] = ()
    perceptron: Perceptron | None = None
    gains: Tensor | None = None

    def other(self, structure: Structure) -> Structure | None:
        """The block's first structure of the other kind."""
        return next((each for each in self.structures if each.kind != structure.kind), None)

    def weight(self, name: str) -> Tensor:
        """A linear's weight in float32 or better, [out, in]."""
        weight = self.weights[name]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def gradient_sums(self, structure: Structure, name: str) -> list[Tensor]:
        """The sums called `name` of every entry of a structure's units, [units, entries] for each linear.

        Rows of its producers, in the order the block defines them, then columns of its consumer. Raises `PrunekitError` for what was
        not measured.
        """
        found = []
        for part in (*structure.slices[1:], structure.slices[0]):
            linear, _, leaf = part.tensor.rpartition(".")
            if leaf != "weight" or linear not in self.gradients:
                continue  # a bias, or a norm
            gradients = self.gradients[linear]
            sums = gradients.columns if linear == structure.name else gradients.rows
            if name not in sums:
                raise PrunekitError(f"'{name}' of '{linear}' was not measured: the part that reads it must declare it")
            found.append(sums[name][part.entries])
        if len(found) < 2:
            raise PrunekitError(f"no gradients of '{structure.name}' were measured")
        return found
