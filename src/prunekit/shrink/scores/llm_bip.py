"""Block-wise importance propagation: how far a channel's removal can move the block's output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import PrunekitError
from ...parts import unit_score
from ..perceptron import GATE, NORM
from ..units import ATTENTION, Structure
from ..view import BlockView


def llm_bip_reads(gated: bool, norm: bool) -> set[str]:
    """What some options ask for."""
    return {"input_abs"} | ({GATE} if gated else set()) | ({NORM} if norm else set())


@unit_score(needs={"input_abs", GATE, NORM}, paper="https://arxiv.org/abs/2412.06419", reads=llm_bip_reads)
def llm_bip(view: BlockView, structure: Structure, *, gated: bool = False, norm: bool = False) -> Tensor:
    """An upper bound on how much the block's output moves, in ℓ1, when an input of the consumer is taken away; summed over a unit.

    For the multilayer perceptron Σ_t |x_tj| · Σ_i |W_ij|. What attention adds to the residual stream also passes through the
    multilayer perceptron behind it, which multiplies by at most |W_up| and |W_down|: Σ_t |x_tj| · Σ_i |W_ij| v_i with
    v = 1 + |W_up|ᵀ |W_down|ᵀ 1. The matrix that counts for W_up is the last one that feeds the consumer of the multilayer perceptron
    (up, where there is a gate).

    Two options, which are ours and not the paper's, change the second term of v. With `gated` it is that of a product a(g) ∘ u:
    (|W_gate|ᵀ diag(L E|u|) + |W_up|ᵀ diag(E|a(g)|)) |W_down|ᵀ 1, E the mean over tokens and L the largest slope of a. With `norm` its
    channel i is multiplied by |γ_i| E[1/rms(h)], h being what the RMS norm in front of the perceptron is fed and γ its gains; that it
    also projects is left out. Means over tokens are in the place of each token's own factors, so with either it is an estimate.

    Shapes: -> [units]. Source: LLM-BIP, the two scores of section 3, in matrix-vector products.
    """
    stats = view.statistics[structure.name]
    weight = view.weight(structure.name).abs()
    passed = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    behind = view.other(structure)
    if structure.kind == ATTENTION and behind is not None:
        through = _through_gate(view, behind) if gated else _through(view, behind)
        passed = passed + (through * _gain(view).to(through) if norm else through)
    values = stats.input_abs * (weight.t() @ passed).double()
    return structure.by_unit(values)


def _through(view: BlockView, behind: Structure) -> Tensor:
    """|W_up|ᵀ |W_down|ᵀ 1, [hidden]."""
    feeding = [part.tensor for part in behind.slices[1:] if part.tensor.endswith(".weight")]
    up = view.weight(feeding[-1].removesuffix(".weight")).abs()
    down = view.weight(behind.name).abs().sum(0)
    rows = next(part.entries for part in behind.slices if part.tensor == feeding[-1])
    return up[rows[:, -1]].t() @ down


def _through_gate(view: BlockView, behind: Structure) -> Tensor:
    """(|W_gate|ᵀ diag(L E|u|) + |W_up|ᵀ diag(E|a(g)|)) |W_down|ᵀ 1, [hidden]."""
    if view.perceptron is None or view.perceptron.gate is None:
        raise PrunekitError(f"the gate of '{behind.name}' was not looked for: the part that reads it must declare it")
    found = view.perceptron.gate
    down = view.weight(behind.name).abs().sum(0)
    ups, active = view.statistics[found.up.linear], view.statistics[found.activation]
    up_mean = (ups.output_abs[found.up.rows] / ups.count).to(down)
    active_mean = (active.output_abs / active.count).to(down)
    by_gate = view.weight(found.gate.linear)[found.gate.rows].abs().t() @ (found.slope * up_mean * down)
    return by_gate + view.weight(found.up.linear)[found.up.rows].abs().t() @ (active_mean * down)


def _gain(view: BlockView) -> Tensor:
    """|γ| E[1/rms(h)] of the norm in front of the perceptron, [hidden]."""
    if view.perceptron is None or view.perceptron.norm is None or view.gains is None:
        raise PrunekitError("the norm of a block was not looked for: the part that reads it must declare it")
    stats = view.statistics[view.perceptron.norm.name]
    return view.gains.double() * stats.inverse_rms / stats.count
