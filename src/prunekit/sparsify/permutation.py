"""Which input channel should sit beside which, so that K:G groups keep more: RIA's channel permutation (Plug-and-Play, ICLR 2024).

A K:G pattern keeps K of every G neighbouring inputs; a group of G important channels loses what a group of G useless ones could
have given up. Two stages find a better order: channels are dealt out so that every group gets strong and weak ones, and then, one
position in the groups after the other, the channels at that position are exchanged between the groups by a linear assignment,
which is the best exchange there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import row_chunks
from ..errors import InputError
from .patterns import keep_groups

# Groups that exchange channels with each other. An assignment over n groups looks at n² pairs of channels and solves in n³, so
# thousands of groups are cut into parts; 512 of them, with 4096 rows, take a second a position on one core and 100 MB in all.
_GROUPS = 512


def channel_permutation(
    scores: Tensor, keep: int, group: int, *, refine: bool = True, at_once: int = _GROUPS
) -> Tensor:
    """The order of input channels in which keeping `keep` of every `group` retains the most score that was found.

    Shapes: scores [out, in] float, finite, not negative; `in` a multiple of `group` -> [in] int64, a permutation: new channel j is the
    old channel `order[j]`. It is the identity where nothing better was found.

    Args:
        refine: exchange channels by linear assignment after they were dealt out; needs scipy.
        at_once: at most so many groups exchange channels with each other.
    """
    solve = require_scipy() if refine else None
    identity = torch.arange(scores.shape[1], device=scores.device)
    if keep == group or scores.shape[1] == group:  # nothing is lost, or there is only one group to be in
        return identity
    members = dealt_out(scores, group)
    if solve is not None:
        parts = -(-len(members) // at_once)
        for first in range(parts):  # every part-th group: each part then has strong and weak groups to exchange between
            members[first::parts] = exchanged(scores, members[first::parts], keep, solve)
    order = members.flatten()
    better = retained_score(scores[:, order], keep, group) > retained_score(scores, keep, group)
    return order if better else identity


def retained_score(scores: Tensor, keep: int, group: int) -> float:
    """Sum, in float64, of the `keep` largest of every `group` neighbours in every row of scores [out, in]."""
    total = 0.0
    for rows in row_chunks(*scores.shape):
        part = scores[rows]
        total += float((part * keep_groups(part, keep, group)).sum(dtype=torch.float64))
    return total


def dealt_out(scores: Tensor, group: int) -> Tensor:
    """Channels dealt out to groups like cards, in order of their summed score, the direction changing every round.

    Shapes: scores [out, in] -> the channels of every group [in / group, group] int64.
    """
    ranked = torch.argsort(scores.sum(0, dtype=torch.float64), stable=True).reshape(group, -1).clone()
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().contiguous()


def exchanged(scores: Tensor, members: Tensor, keep: int, solve: Any) -> Tensor:
    """The groups after the channels at each position were exchanged between them as well as can be, position by position.

    Shapes: scores [out, in], members [groups, group] (channels) -> [groups, group]. What they retain never falls.
    """
    members = members.clone()
    # [group, groups, out]: a channel's scores lie together, and so do the channels at one position
    values = scores[:, members.t().flatten()].t().reshape(*members.t().shape, -1).contiguous()
    retained = _sum(_largest(list(values), keep))
    for position in range(members.shape[1]):
        gains = exchange_gains(values, position, keep)
        taken = torch.from_numpy(solve(gains.cpu().numpy(), maximize=True)[1]).to(members.device)
        moved = values[position][taken]
        others = [value for place, value in enumerate(values) if place != position]
        now = _sum(_largest([*others, moved], keep))
        if now > retained:  # gains are rounded: an exchange that is none better by them may be worse
            retained = now
            values[position] = moved
            members[:, position] = members[taken, position]
    return members


def exchange_gains(values: Tensor, position: int, keep: int) -> Tensor:
    """What every group would gain from having every group's channel at `position`, against having none there.

    Shapes: values [group, groups, out] -> [groups (who gets it), groups (whose it is)].

    Beside the other channels of its group, with t the `keep`-th largest score among them, a channel with score v adds max(v − t, 0)
    to what a row retains. Over all rows that is (Σ|v − t| + Σv − Σt) / 2, whose first term is a distance of vectors, for which there
    are fast and sparing routines.
    """
    others = [value for place, value in enumerate(values) if place != position]
    threshold, value = _largest(others, keep)[-1], values[position]
    distance = torch.cdist(threshold, value, p=1.0)
    return (distance + value.sum(1)[None] - threshold.sum(1)[:, None]) / 2


def _largest(values: list[Tensor], count: int) -> list[Tensor]:
    """Entry by entry, the `count` largest of several tensors of one shape, largest first: one bubble after another."""
    found = []
    for _ in range(count):
        top, rest = values[0], []
        for value in values[1:]:
            rest.append(torch.minimum(top, value))
            top = torch.maximum(top, value)
        found.append(top)
        values = rest
    return found


def _sum(tensors: list[Tensor]) -> float:
    return sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors)


def require_scipy() -> Any:
    """Scipy's solver of linear assignments. Raises `InputError` where it is not installed."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError(
            "channel permutation needs scipy, which is not installed: pip install 'prunekit[permutation]'"
        ) from None
    return linear_sum_assignment
