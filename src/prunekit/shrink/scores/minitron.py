"""Minitron: how strongly units are active."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...parts import unit_score
from ...statistics import Statistics
from ..units import ATTENTION, Structure
from ..view import BlockView


def channels(norms: Sequence[Statistics]) -> Tensor:
    """How active a channel of the residual stream is, by what the norms of all blocks return, each added up as of a unit's channel.

    Shapes: sums over [channels] each -> [channels].
    """
    return torch.stack([norm.window_abs.sqrt() for norm in norms]).sum(0)


@unit_score(needs={"input_square", "window_abs"}, channels=channels, paper="https://arxiv.org/abs/2407.14679")
def minitron(view: BlockView, structure: Structure) -> Tensor:
    """How strongly a unit is active: of a channel, the ℓ2 norm over windows of its mean |x| in each; of a group of heads, ‖x‖₂.

    x is what the consumer is fed. Weights have no say. Shapes: -> [units]. Comparable within a structure.
    Source: Muralidharan et al. 2024 (Minitron), section 2.2, with the aggregation (mean over tokens, ℓ2 over windows) of its code.
    """
    stats = view.statistics[structure.name]
    values = stats.input_square if structure.kind == ATTENTION else stats.window_abs
    return structure.by_unit(values).sqrt()
