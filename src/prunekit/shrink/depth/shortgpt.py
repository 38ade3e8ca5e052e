"""Block influence: a block that hardly turns its inputs can go."""

from __future__ import annotations

from typing import Literal

from ...parts import depth
from ..influence import Influence


def _steps(blocks: int, count: int, *, choose: str) -> int:
    return sum(range(blocks - count + 1, blocks + 1)) if choose == "greedy" else blocks


@depth(paper="https://arxiv.org/abs/2403.03853", steps=_steps)
def shortgpt(
    influence: Influence, count: int, *, choose: Literal["once", "greedy", "contiguous"] = "once"
) -> list[int]:
    """Remove the `count` blocks whose outputs are most like their inputs, 1 − mean over tokens of cos(x_l, x_{l+1}).

    `once` takes the lowest of one pass. `greedy` removes one, measures again without it, and so on. `contiguous` removes neighbouring
    blocks, those between whose first input and last output the angle at the last token is least.

    Returns their numbers, ascending. Source: Men et al. 2024 (ShortGPT), equation 1; `contiguous` is Gromov et al. 2024
    (https://arxiv.org/abs/2403.17887), equation 4; `greedy` is ours.
    """
    if choose == "contiguous":
        angles = influence.angles(count)
        first = min(range(len(angles)), key=angles.__getitem__)
        return list(range(first, first + count))
    gone: list[int] = []
    if choose == "once":
        turned = influence.turned(gone)
        return sorted(sorted(turned, key=lambda block: (turned[block], block))[:count])
    for _ in range(count):
        turned = influence.turned(gone)
        gone.append(min(turned, key=lambda block: (turned[block], block)))
    return sorted(gone)
