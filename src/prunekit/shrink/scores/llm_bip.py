"""Block-wise importance propagation: how far a channel's removal can move the block's output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...parts import unit_score
from ..units import ATTENTION, Structure
from ..view import BlockView


@unit_score(needs={"input_abs"}, paper="https://arxiv.org/abs/2412.06419")
def llm_bip(view: BlockView, structure: Structure) -> Tensor:
    """An upper bound on how much the block's output moves, in ℓ1, when an input of the consumer is taken away; summed over a unit.

    For the multilayer perceptron Σ_t |x_tj| · Σ_i |W_ij|. What attention adds to the residual stream also passes through the
    multilayer perceptron behind it, which multiplies by at most |W_up| and |W_down|: Σ_t |x_tj| · Σ_i |W_ij| v_i with
    v = 1 + |W_up|ᵀ |W_down|ᵀ 1. The matrix that counts for W_up is the last one that feeds the consumer of the multilayer perceptron
    (up, where there is a gate).

    Shapes: -> [units]. Source: LLM-BIP, the two scores of section 3, in matrix-vector products.
    """
    stats = view.statistics[structure.name]
    weight = view.weight(structure.name).abs()
    passed = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    behind = view.other(structure)
    if structure.kind == ATTENTION and behind is not None:
        feeding = [part.tensor for part in behind.slices[1:] if part.tensor.endswith(".weight")]
        up = view.weight(feeding[-1].removesuffix(".weight")).abs()
        down = view.weight(behind.name).abs().sum(0)
        rows = next(part.entries for part in behind.slices if part.tensor == feeding[-1])
        passed = passed + up[rows[:, -1]].t() @ down
    values = stats.input_abs * (weight.t() @ passed).double()
    return structure.by_unit(values)
