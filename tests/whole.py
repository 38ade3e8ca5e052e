"""Gradients the obvious way: the whole model in memory, autograd, one window at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers import draw_ids
from prunekit.model.anatomy import Linear
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Windows
from prunekit.shrink.gradients import measure_gradients
from prunekit.shrink.units import Structure, find_structures
from prunekit.shrink.view import BlockView


def draw_windows(count: int, length: int, seed: int = 1) -> Windows:
    return Windows(draw_ids(count, length, seed))


def objective_of(model: PreTrainedModel, windows: Windows, number: int, objective: str) -> Tensor:
    """One window's objective."""
    keep = torch.ones(windows.length, dtype=torch.bool) if windows.keep is None else windows.keep[number]
    ids = windows.ids[number]
    mask = None if windows.keep is None else keep.long()[None]
    logits = model(ids[None], attention_mask=mask).logits[0].double()
    if objective == "output":
        return torch.stack([logits[keep, token].max() for token in range(logits.shape[1])]).mean()
    losses = [
        -torch.log_softmax(logits[place], 0)[ids[place + 1]]
        for place in range(windows.length - 1)
        if keep[place] and keep[place + 1]
    ]
    return torch.stack(losses).mean()


def window_gradients(model: PreTrainedModel, windows: Windows, objective: str = "loss") -> dict[str, Tensor]:
    """The gradient of every window's objective for the weight of every linear of the blocks, [windows, out, in] by full name."""
    linears = list(ResidentModel(model).anatomy.linears())
    weights = [model.get_submodule(linear.full_name).weight for linear in linears]
    each = [
        torch.autograd.grad(objective_of(model, windows, number, objective), weights) for number in range(len(windows))
    ]
    return {
        linear.full_name: torch.stack([linear.matrix(gradients[place]) for gradients in each])
        for place, linear in enumerate(linears)
    }


def entry_products(weight: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """What the sums are over, [out, in] by name. Shapes: weight [out, in], gradients [windows, out, in]."""
    mean, square = gradients.mean(0), gradients.square().mean(0)
    mixed = weight * mean - 0.5 * weight * square * weight
    return {
        "gradient_abs": (weight * mean).abs(),
        "gradient_signed": weight * mean,
        "gradient_second": weight * square * weight,
        "gradient_mixed": mixed.abs(),
    }


def weight_in(model: PreTrainedModel, linear: Linear) -> Tensor:
    """A linear's stored weight."""
    return model.get_submodule(linear.full_name).weight.detach()


def views(
    model: PreTrainedModel, windows: Windows, needs: set[str], objective: str
) -> list[tuple[BlockView, tuple[Structure, ...]]]:
    """What scores are shown of each block of a model in memory."""
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    measured = measure_gradients(
        source, windows, structures, frozenset(needs), objective, lambda linear: weight_in(model, linear)
    )
    found = []
    for block, gradients, of in zip(source.anatomy.blocks, measured, structures, strict=True):
        weights = {linear.name: linear.matrix(weight_in(model, linear)) for linear in block.linears}
        found.append((BlockView(weights, gradients=gradients), of))
    return found


def unit_parts(model: PreTrainedModel, structure: Structure, unit: int) -> list[tuple[Linear, list[int], bool]]:
    """The linears of a unit, its consumer last: each with its entries, and whether those are columns."""
    block = ResidentModel(model).anatomy.blocks[structure.block]
    linears = {f"{linear.name}.weight": linear for linear in block.linears}
    parts = [
        (linears[part.tensor], part.entries[unit].tolist(), part.tensor == f"{structure.name}.weight")
        for part in structure.slices
        if part.tensor in linears
    ]
    return sorted(parts, key=lambda part: part[2])
