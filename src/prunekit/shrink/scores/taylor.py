"""LLM-Pruner's family: what the loss changes by, in a Taylor series, when a unit's weights become zero."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...parts import unit_score
from ..units import Structure
from ..view import BlockView

_ELEMENT = {"first": "gradient_abs", "second": "gradient_second", "mix": "gradient_mixed"}
_VECTOR = {"first": {"gradient_signed"}, "second": {"gradient_second"}, "mix": {"gradient_signed", "gradient_second"}}


def taylor_reads(order: str, granularity: str, reduction: str) -> set[str]:
    """The sums of gradients that some options ask for."""
    return {_ELEMENT[order]} if granularity == "element" else _VECTOR[order]


@unit_score(
    needs={"gradient_abs", "gradient_signed", "gradient_second", "gradient_mixed"},
    paper="https://arxiv.org/abs/2305.11627",
    objective="loss",
    reads=taylor_reads,
)
def taylor(
    view: BlockView,
    structure: Structure,
    *,
    order: Literal["first", "second", "mix"] = "first",
    granularity: Literal["element", "vector"] = "element",
    reduction: Literal["sum", "mean", "max", "prod", "first", "last"] = "sum",
) -> Tensor:
    """How much the loss changes, to first or second order, when the unit's weights become zero.

    Of every entry, a row of a producer or a column of the consumer: Σ|s| over its weights (`element`) or |Σ s| (`vector`), where s is
    W∘G (`first`), W∘A∘W (`second`) or W∘G − ½ W∘A∘W (`mix`), G being the gradient of the mean loss and A the mean of the squared
    gradients of single windows. A unit's entries are added up for each linear, and its linears joined by `reduction`; `first` and
    `last` take one of them, in the order the block defines them and the consumer last. Linears stored as one matrix count as one.
    Shapes: -> [units]. Comparable within a structure; the paper cuts each block alone.
    Source: Ma et al. 2023 (LLM-Pruner), and its code: Vector is `vector`, Element¹ `first`, Element² `second`, param_mix `mix`.
    The code joins linears channel by channel before it adds channels up, and with grouped-query attention adds other heads'
    queries to a key-value head than its own; neither is followed.
    """
    if granularity == "element":
        entries = view.gradient_sums(structure, _ELEMENT[order])
    elif order == "second":
        entries = view.gradient_sums(structure, "gradient_second")  # no term of it is negative
    else:
        entries = view.gradient_sums(structure, "gradient_signed")
        if order == "mix":
            curved = view.gradient_sums(structure, "gradient_second")
            entries = [signed - 0.5 * second for signed, second in zip(entries, curved, strict=True)]
        entries = [each.abs() for each in entries]
    linears = torch.stack([each.sum(1) for each in entries])
    if reduction == "mean":
        return linears.mean(0)
    if reduction == "max":
        return linears.amax(0)
    if reduction == "prod":
        return linears.prod(0)
    if reduction == "sum":
        return linears.sum(0)
    return linears[0 if reduction == "first" else -1]
