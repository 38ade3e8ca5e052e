"""One weight matrix: score it, choose what to keep. Memory is bounded by working on chunks of rows where the parts allow it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..bits import all_finite, row_chunks
from ..catalogue import Method
from ..errors import InputError, PrunekitError
from ..parts import Part, find_part
from ..recipe import Pattern
from ..statistics import Statistics
from .patterns import keep_groups, keep_largest

Group = Literal["row", "layer"]


@dataclass(frozen=True)
class Sparsifier:
    """A method with its options bound: what turns (weight, statistics, pattern) into a keep-mask."""

    score: Part
    group: Group
    score_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Method, options: dict[str, dict[str, Any]]) -> Sparsifier:
        """The method's parts with a recipe's options laid over their defaults. Raises `InputError`."""
        part = find_part("score", method.score)
        pattern_options = dict(options.get("pattern", {}))
        group = pattern_options.pop("group", method.group)
        if group not in ("row", "layer"):
            raise InputError(f"'pattern.group' cannot be {group!r}: it is row or layer")
        if pattern_options:
            raise InputError(f"'pattern.{next(iter(pattern_options))}' is not an option of the pattern: known is group")
        return cls(part, cast(Group, group), part.bind(options.get("score", {})))

    @property
    def needs(self) -> frozenset[str]:
        """Statistics its parts read."""
        return self.score.needs

    def windows_needed(self, asked: int) -> int:
        """As many as asked; one where the method looks at no data, for the output errors and the reload check."""
        return asked if self.needs else 1

    def resolved(self, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """A recipe's part options with the defaults that hold today filled in."""
        own = {"score": self.score_options} if self.score_options else {}
        return {**options, **own, "pattern": {"group": self.group}}

    def works_by_rows(self, pattern: Pattern) -> bool:
        """Whether some rows' mask depends on those rows alone."""
        return self.score.rowwise and (pattern.keep is not None or self.group == "row")

    def keep_mask(self, weight: Tensor, stats: Statistics, pattern: Pattern, name: str) -> Tensor:
        """Which weights stay.

        Shapes: weight [out, in], any float dtype -> bool [out, in], True = kept. Exactly `floor(in·s)` False per row, or
        `floor(out·in·s)` over the layer, or `G − K` per group. Scores are computed in float32 (float64 for a float64 weight), on
        the device the statistics lie on, and the mask is there too.
        """
        rows, columns = weight.shape
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        device = stats.device or weight.device
        stats = stats.to(dtype)
        chunks = list(row_chunks(rows, columns)) if self.score.rowwise else [slice(0, rows)]
        if pattern.keep is None and self.group == "layer":
            whole = torch.empty(rows, columns, dtype=dtype, device=device)
            for part in chunks:
                whole[part] = self._scores(weight[part].to(device), stats, dtype, name)
            return keep_largest(whole.reshape(1, -1), pattern.zeros(rows * columns)).reshape(rows, columns)
        keep = torch.empty(rows, columns, dtype=torch.bool, device=device)
        for part in chunks:
            scores = self._scores(weight[part].to(device), stats, dtype, name)
            if pattern.keep is None:
                keep[part] = keep_largest(scores, pattern.zeros(columns))
            else:
                assert pattern.group is not None
                keep[part] = keep_groups(scores, pattern.keep, pattern.group)
        return keep

    def _scores(self, weight: Tensor, stats: Statistics, dtype: torch.dtype, name: str) -> Tensor:
        scores = self.score.function(weight.to(dtype), stats, **self.score_options)
        if scores.shape != weight.shape:
            raise PrunekitError(
                f"score '{self.score.name}' gave shape {list(scores.shape)} for a weight {list(weight.shape)}: they must be equal"
            )
        if not all_finite(scores):
            raise InputError(
                f"score '{self.score.name}' of '{name}' is NaN or infinite: its weights or its inputs are not finite"
            )
        return cast(Tensor, scores)
