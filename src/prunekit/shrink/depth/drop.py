"""Dropping the sublayers that hardly turn the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...parts import depth
from ..influence import Influence
from ..plan import Structures
from ..units import Structure

What = Literal["both", "attention", "mlp"]


def _steps(blocks: int, count: int, *, what: What) -> int:
    return blocks


def _candidates(structures: Structures, *, what: What) -> list[Structure]:
    return [each for block in structures for each in block if what in ("both", each.kind)]


@depth(paper="https://arxiv.org/abs/2406.15786", steps=_steps, candidates=_candidates)
def drop(influence: Influence, structures: Structures, *, what: What = "both") -> Sequence[Structure]:
    """Remove the attention modules and perceptrons with the least 1 − mean over tokens of cos(x, x + f(x)), x the stream before them.

    `what` says whether `attention` alone may go, `mlp` alone, or `both`, one order for all of them.

    Returns those that may go, the least important first. Source: He et al. 2024 (What Matters in Transformers?), Attention Drop, MLP
    Drop and Joint Layer Drop, measured in one pass.
    """
    turned = influence.turned_by_sublayers(structures)
    return sorted(_candidates(structures, what=what), key=lambda each: turned[each.block, each.name])
