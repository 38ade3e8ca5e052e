"""NIRVANA."""

from __future__ import annotations

import torch
from torch import Tensor

from ...parts import unit_score
from ..units import Structure
from ..view import BlockView


@unit_score(needs={"gradient_abs"}, paper="https://arxiv.org/abs/2509.14230", objective="output")
def nirvana(view: BlockView, structure: Structure) -> Tensor:
    """Σ |W∘∂f/∂W| over all weights of a unit, f being the model's output instead of a loss.

    f is, as in the paper's code, the mean over windows and vocabulary of the largest logit over a window's positions.
    Shapes: -> [units]. Comparable between the blocks of a model, among structures of one kind.
    Source: Ai et al. 2025 (NIRVANA).
    """
    return torch.stack([each.sum(1) for each in view.gradient_sums(structure, "gradient_abs")]).sum(0)
