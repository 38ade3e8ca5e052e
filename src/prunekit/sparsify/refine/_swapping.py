"""The engine of DSnoT and its kin: swap a pruned weight with a kept one while a row's tracked error is large.

A row's error is the expected change of its output, E = Σ_{j pruned} W_ij·mean(x_j). Both sides of a swap move E against its sign,
so there are two lists of swaps a row, one for E > 0 and one for E < 0, and each weight stands on at most one of them: everything a
row may ever do is known before its first step, and the steps themselves only add numbers up. Only the first `steps` swaps of a list
can be reached, so only these are sorted. Nothing a row does depends on the rows beside it, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...bits import row_chunks
from ...errors import InputError
from ..patterns import keep_largest

Accept = Literal["official", "monotone"]

_LOW = 0xFFFFFFFF  # the lower half of an int64


# entries looked at together while swaps are chosen, for each of which an integer of eight bytes is made
_AT_ONCE = 1 << 18


class Terms(NamedTuple):
    """What decides on the swaps of some rows, each [rows, in].

    `drift` is W·mean(x). Of the pruned weights that of largest `grow` is kept first, of the kept ones that of smallest `prune` is
    pruned first; neither is negative, and they are compared in float32.
    """

    drift: Tensor
    grow: Tensor
    prune: Tensor


class _Swaps(NamedTuple):
    """What rows may do, in order: grow and prune [rows, sides, n] (column indices), usable [rows, sides] (how many of the n)."""

    grow: Tensor
    prune: Tensor
    usable: Tensor


class _Walks(NamedTuple):
    """What a walk needs of the rows: error [rows], change [rows, sides, n] (what each swap adds to the error), and their swaps."""

    error: Tensor
    change: Tensor
    swaps: _Swaps


def swap_while_off(
    keep: Tensor,
    terms: Callable[[slice], Terms],
    groups: tuple[int, int] | None,
    *,
    steps: int,
    epsilon: float,
    accept: Accept,
) -> Tensor:
    """A mask of the same counts whose pruned weights add up to less of an expected output.

    Shapes: keep [out, in] bool -> the same; `terms` gives the terms of some rows. Every weight moves at most once, and one whose
    drift is 0 only as the partner within a group; ties go to the lower index. A row takes at most `steps` swaps and ends when
    |E| ≤ epsilon·|E at the start|, when no swap is left on the side its error asks for, or when `accept` refuses one: "monotone"
    refuses what does not lower |E|.

    Without groups, a grown weight's drift has the sign of E and its partner's the opposite one. In groups (K, G) the partner is of
    the same group and of any sign, a group with nothing left to give is passed over, and a swap after which E would not have the
    sign it had at the start is refused.
    """
    moved = keep.clone(memory_format=torch.contiguous_format)
    if not steps or (groups is not None and groups[0] in (0, groups[1])):
        return moved
    columns = keep.shape[1]
    # in groups, that many whole groups of a row are sorted
    width = columns if groups is None else max(columns, min(steps, columns) * groups[1])
    for rows in row_chunks(len(keep), columns):
        step = max(1, _AT_ONCE // width)
        parts = [slice(at, min(at + step, rows.stop)) for at in range(rows.start, rows.stop, step)]
        walks = [_prepare(keep[part], terms(part), groups, steps) for part in parts]
        error, change = (torch.cat(one) for one in zip(*(walk[:2] for walk in walks), strict=True))
        swaps = _Swaps(*map(torch.cat, zip(*(walk.swaps for walk in walks), strict=True)))
        taken = _walk(error, change, swaps.usable, steps, epsilon, accept)
        done = torch.arange(change.shape[2], device=keep.device) < taken[:, :, None]
        flat = moved[rows].view(-1)
        first = torch.arange(0, len(flat), columns, device=keep.device)[:, None, None]
        flat[(swaps.grow + first)[done]] = True
        flat[(swaps.prune + first)[done]] = False
    return moved


def row_sums(values: Tensor) -> Tensor:
    """Sum of each row, in float64: [rows, columns] -> [rows]. Folded in halves, so that it never depends on the other rows."""
    total = values.double()
    while (columns := total.shape[1]) > 1:
        half = columns - columns // 2
        folded = total[:, :half].clone()
        folded[:, : columns - half] += total[:, half:]
        total = folded
    return total[:, 0]


def smallest(costs: Tensor, count: int) -> Tensor:
    """Columns of the `count` smallest of each row, in ascending column order; among equals the lower column is taken.

    Shapes: costs [rows, columns], no NaN -> int64 [rows, count].
    """
    chosen = ~keep_largest(costs, count)
    return torch.nonzero(chosen)[:, 1].reshape(len(costs), count)


def require(least: float, **options: float) -> None:
    """Raise `InputError` for an option of a refinement that is not finite or below `least`."""
    for name, value in options.items():
        if not (math.isfinite(value) and value >= least):
            raise InputError(f"'refine.{name}' cannot be {value}: it must be at least {least}, and finite")


def _ranks(scores: Tensor, side: Tensor, *, low_first: bool = False) -> Tensor:
    """Integers whose order is that in which entries are taken: the largest first where `side` is 1, the smallest where it is -1.

    They hold the score in float32 above the column, so no two are equal and no sort can break a tie its own way; 0 is never taken.
    Shapes: scores [rows, columns] not negative, side [rows, columns] of -1, 0, 1 -> int64 [rows, columns].
    """
    # as an integer, the bits of a float that is not negative are in the order of the floats
    bits = scores.float().view(torch.int32)
    if low_first:
        bits = torch.iinfo(torch.int32).max - bits
    ranks = bits.long().bitwise_left_shift_(32)
    ranks.bitwise_or_(_LOW - torch.arange(scores.shape[1], device=scores.device))
    return ranks.mul_(side)


def _first(ranks: Tensor, count: int, side: int) -> Tensor:
    """The columns of the `count` entries of one side that are taken first, in that order; any column where it has no more."""
    return _column(ranks.topk(count, largest=side > 0).values.abs_(), ranks.shape[1])


def _column(ranks: Tensor, columns: int) -> Tensor:
    return (_LOW - ranks.bitwise_and(_LOW)).clamp_(max=columns - 1)


def _prepare(keep: Tensor, terms: Terms, groups: tuple[int, int] | None, steps: int) -> _Walks:
    error = row_sums(terms.drift * ~keep)
    swaps = _free_swaps(keep, terms, steps) if groups is None else _grouped_swaps(keep, terms, error, groups, steps)
    out, into = (terms.drift.gather(1, one.flatten(1)).reshape(one.shape).double() for one in (swaps.grow, swaps.prune))
    return _Walks(error, into - out, swaps)


def _free_swaps(keep: Tensor, terms: Terms, steps: int) -> _Swaps:
    """The swaps for E > 0 and those for E < 0."""
    sign = terms.drift.sign().to(torch.int8)
    out, into = sign * ~keep, -sign * keep
    usable = torch.stack(
        [torch.minimum((out == side).count_nonzero(1), (into == side).count_nonzero(1)) for side in (1, -1)], 1
    )
    count = min(steps, keep.shape[1])
    by_growth, by_cost = _ranks(terms.grow, out), _ranks(terms.prune, into, low_first=True)
    return _Swaps(
        torch.stack([_first(by_growth, count, side) for side in (1, -1)], 1),
        torch.stack([_first(by_cost, count, side) for side in (1, -1)], 1),
        usable,
    )


def _grouped_swaps(keep: Tensor, terms: Terms, error: Tensor, groups: tuple[int, int], steps: int) -> _Swaps:
    """The swaps on the only side a row uses, that of its error's sign at the start."""
    kept, group = groups
    eligible = ~keep & (terms.drift.sign() == error.sign()[:, None]) & (terms.drift != 0)
    available = eligible.count_nonzero(1)
    # a group gives `kept` weights at most and then passes over the rest of its `group - kept` candidates
    reach = min(max(steps, -(-steps * (group - kept) // kept)), keep.shape[1])
    found = _first(_ranks(terms.grow, eligible), reach, 1)
    home = found // group
    turn = _occurrence(home)
    usable = (torch.arange(reach, device=found.device) < available[:, None]) & (turn < kept)
    usable_first = (~usable).byte().sort(dim=1, stable=True).indices[:, :steps]
    found, home, turn = (one.gather(1, usable_first) for one in (found, home, turn))
    givers = _ranks(terms.prune, keep, low_first=True).reshape(len(keep), -1, group)
    offered = givers.gather(1, home[:, :, None].expand(-1, -1, group)).sort(dim=2, descending=True).values
    # past the last usable one stand repeated columns, of any turn
    partner = _column(offered.gather(2, turn.clamp(max=group - 1)[:, :, None])[:, :, 0], keep.shape[1])
    return _Swaps(found[:, None], partner[:, None], usable.count_nonzero(1)[:, None])


def _occurrence(values: Tensor) -> Tensor:
    """How many equal values stand before each, in its row. Shapes: [rows, n] -> int64 [rows, n]."""
    ordered, order = values.sort(dim=1, stable=True)
    position = torch.arange(values.shape[1], device=values.device).expand_as(values)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(starts, position, 0).cummax(1).values
    return torch.empty_like(values).scatter_(1, order, position - first)


def _walk(error: Tensor, change: Tensor, usable: Tensor, steps: int, epsilon: float, accept: Accept) -> Tensor:
    """How many swaps of each list a row takes. Shapes: error [rows], change [rows, sides, n], usable [rows, sides] -> as usable."""
    sides, count = change.shape[1:]
    changes = change.flatten(1)
    sign, enough = error.sign(), epsilon * error.abs()
    taken = torch.zeros_like(usable)
    going = error.abs() > enough
    for _ in range(steps):
        side = (error < 0).long()[:, None] if sides == 2 else torch.zeros_like(usable)
        step = taken.gather(1, side)
        after = error + changes.gather(1, side * count + step.clamp(max=count - 1))[:, 0]
        going &= (step < usable.gather(1, side))[:, 0]
        if accept == "monotone":
            going &= after.abs() < error.abs()
        if sides == 1:
            going &= after.sign() == sign
        if not going.any():
            break
        error = torch.where(going, after, error)
        taken.scatter_add_(1, side, going.long()[:, None])
        going &= error.abs() > enough
    return taken
