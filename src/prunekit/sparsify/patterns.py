"""From importance to keep-mask, with exact counts.

Selection is by rank, not by threshold: exactly the asked number goes, and among equal scores the one with the lower index goes
first, on every device and in every chunking. One primitive, `keep_largest`, serves all groups: a row, a whole layer seen as one
row, or K:G groups seen as short rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..recipe import Pattern

Group = Literal["row", "layer"]

_SHORT = 16  # rows up to this long are ranked by comparing all pairs, which beats sorting them


def keep_largest(scores: Tensor, zeros: int) -> Tensor:
    """Keep all but the `zeros` smallest of each row; ties go by index, lowest first.

    Shapes: scores [rows, columns] float, finite -> keep-mask [rows, columns] bool with exactly `zeros` False per row.
    """
    columns = scores.shape[1]
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if columns <= _SHORT:
        return _rank_pairs(scores) >= zeros
    threshold = _kth_smallest(scores, zeros)
    keep = scores > threshold
    # Where several scores equal the threshold, too many were dropped with it: give the last of them back.
    surplus = (columns - zeros) - keep.sum(1)
    short = torch.nonzero(surplus).flatten()
    if len(short):
        equal = scores[short] == threshold[short]
        from_the_right = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        keep[short] |= equal & (from_the_right <= surplus[short, None])
    return keep


def keep_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keep the `keep` largest of every `group` consecutive inputs.

    Shapes: scores [out, in] -> keep-mask [out, in]; `in` must be a multiple of `group` (checked by `check_fits`).
    """
    return keep_largest(scores.reshape(-1, group), group - keep).reshape(scores.shape)


@dataclass(frozen=True)
class Selection:
    """What may be kept of a matrix: a pattern, and what weights are compared with where it is a fraction.

    Zeros are exact: `floor(in·s)` in every row, or `floor(out·in·s)` over the layer, or G − K of every G consecutive inputs.
    """

    pattern: Pattern
    group: Group = "row"

    @property
    def groups(self) -> tuple[int, int] | None:
        """(K, G) of a K:G pattern."""
        if self.pattern.keep is None or self.pattern.group is None:
            return None
        return self.pattern.keep, self.pattern.group

    @property
    def by_rows(self) -> bool:
        """Whether every row is chosen by itself."""
        return self.groups is not None or self.group == "row"

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the largest. Shapes: scores [out, in] float, finite -> keep-mask [out, in]."""
        rows, columns = scores.shape
        if self.groups is not None:
            return keep_groups(scores, *self.groups)
        if self.group == "row":
            return keep_largest(scores, self.pattern.zeros(columns))
        return keep_largest(scores.reshape(1, -1), self.pattern.zeros(rows * columns)).reshape(rows, columns)


def check_fits(name: str, in_features: int, group: int | None) -> None:
    """Raise `InputError` where a linear's inputs cannot be cut into groups of `group`."""
    if group is not None and in_features % group:
        raise InputError(
            f"groups of {group} do not divide the {in_features} inputs of '{name}': choose another pattern, "
            f"or leave it out with --set budget.ignore={name}"
        )


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """[rows, 1]: the k-th smallest (from 1) of each row. NumPy's vectorised partition is several times faster on a processor."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        partitioned = np.partition(scores.detach().numpy(), k - 1, axis=1)
        return torch.from_numpy(np.ascontiguousarray(partitioned[:, k - 1 : k]))
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _rank_pairs(scores: Tensor) -> Tensor:
    """Rank of each entry in its short row, 0 the smallest; among equals the lower index ranks lower."""
    columns = scores.t().contiguous()  # [columns, rows]: each comparison below then runs over contiguous memory
    ranks = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
    for right in range(1, len(columns)):
        for left in range(right):
            before = columns[left] <= columns[right]
            ranks[right] += before
            ranks[left] += ~before
    return ranks.t()
