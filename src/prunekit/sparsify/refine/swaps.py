"""SparseSwaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...bits import row_chunks
from ...parts import refine
from ...statistics import Statistics
from ._swapping import require, smallest


@refine(needs={"gram"}, paper="https://arxiv.org/abs/2512.10922", rowwise=True)
def swaps(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    groups: tuple[int, int] | None,
    *,
    steps: int = 25,
    candidates: int = 32,
    tolerance: float = 1e-6,
) -> Tensor:
    """Swap, one pair a step, the two weights of a row whose swap lowers its output error most.

    A row's loss is L = ‖X·e‖₂² = eᵀHe with e its pruned weights (0 elsewhere) and H = XᵀX. With c = He, keeping the pruned weight u
    and pruning the kept one v changes it by

        ΔL = (w_u²·H_uu − 2·w_u·c_u) + (w_v²·H_vv + 2·w_v·c_v) − 2·w_u·w_v·H_uv.

    Each of at most `steps` steps takes the best pair and brings c up to date; a row ends when no pair lowers its loss by more
    than `tolerance` times Σ e_j²·H_jj at the start, which keeps rounding from moving anything. In groups (K, G) all pairs within
    groups are looked at. Without groups only the `candidates` u of smallest first term and the `candidates` v of smallest second
    term are paired: from the number of inputs on, that is every pair. Among equal pairs the one of lower u, then lower v, is
    taken.

    Shapes: weight [out, in], keep [out, in] bool (True = kept), stats.gram [in, in], groups (K, G) or None -> keep-mask of the same
    counts a row or group. The loss never rises. Memory: `candidates`² numbers a row, or G a weight, over chunks of rows.
    Source: Zimmer et al. 2025, the exact 1-swap.
    """
    require(0, steps=steps, tolerance=tolerance)
    require(1, candidates=candidates)
    gram = stats.gram.to(weight)
    columns = weight.shape[1]
    pairs = columns * groups[1] if groups is not None else min(candidates, columns) ** 2
    moved = keep.clone()
    for rows in row_chunks(len(weight), max(columns, pairs)):
        moved[rows] = _descend(weight[rows], keep[rows], gram, groups, steps, candidates, tolerance)
    return moved


def _descend(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    groups: tuple[int, int] | None,
    steps: int,
    candidates: int,
    tolerance: float,
) -> Tensor:
    """Rows that have ended are dropped from the working set, so late steps are cheap."""
    moved = keep.clone()
    going = torch.arange(len(weight), device=weight.device)
    gone = torch.where(keep, 0, weight)
    pull = gone @ gram
    least = tolerance * (gone.square() @ gram.diagonal())
    for _ in range(steps):
        change, grow, prune = _best(weight, keep, pull, gram, groups, candidates)
        better = change < -least
        if not better.all():
            weight, keep, pull, least, going = weight[better], keep[better], pull[better], least[better], going[better]
            grow, prune = grow[better], prune[better]
        if not len(going):
            break
        row = torch.arange(len(going), device=weight.device)
        moved[going, grow], moved[going, prune] = True, False
        keep = moved[going]
        pull = pull + gram[prune] * weight[row, prune, None] - gram[grow] * weight[row, grow, None]
    return moved


def _best(
    weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor, groups: tuple[int, int] | None, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of each row: its ΔL (inf where a row has none), u and v, each [rows]."""
    alone, cross = weight.square() * gram.diagonal(), 2 * weight * pull
    grow = torch.where(keep, math.inf, alone - cross)
    prune = torch.where(keep, alone + cross, math.inf)
    if groups is None:
        count = min(candidates, weight.shape[1])
        u, v = smallest(grow, count), smallest(prune, count)
        between = gram[u[:, :, None], v[:, None, :]]
        change = _pair(weight.gather(1, u), grow.gather(1, u), weight.gather(1, v), prune.gather(1, v), between)
        best, at = _minimum(change.flatten(1))
        return best, u.gather(1, at // count)[:, 0], v.gather(1, at % count)[:, 0]
    size = groups[1]
    w, a, b = (one.reshape(len(one), -1, size) for one in (weight, grow, prune))
    blocks = gram.reshape(w.shape[1], size, w.shape[1], size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    best, at = _minimum(_pair(w, a, w, b, blocks).flatten(1))
    home = at // size**2 * size
    return best, (home + at % size**2 // size)[:, 0], (home + at % size)[:, 0]


def _pair(weight_u: Tensor, term_u: Tensor, weight_v: Tensor, term_v: Tensor, between: Tensor) -> Tensor:
    """ΔL of every u [..., n] with every v [..., m]: [..., n, m]."""
    change = between * (-2 * weight_u[..., :, None] * weight_v[..., None, :])
    return change.add_(term_u[..., :, None]).add_(term_v[..., None, :])


def _minimum(values: Tensor) -> tuple[Tensor, Tensor]:
    at = values.argmin(1, keepdim=True)
    return values.gather(1, at)[:, 0], at
