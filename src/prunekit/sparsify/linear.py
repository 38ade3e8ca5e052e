"""One weight matrix: score it, choose what to keep, move the mask, refit what is kept; in chunks of rows where the parts allow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..binding import Bound, bind, named_generator
from ..bits import all_finite, row_chunks
from ..catalogue import Method
from ..errors import InputError, PrunekitError
from ..parts import FOLLOWED
from ..recipe import Pattern
from ..statistics import Statistics
from .patterns import Group, Selection
from .permutation import require_scipy


@dataclass(frozen=True)
class Pruned:
    """What became of (some rows of) a linear.

    Shapes: keep bool [rows, in]; weight [rows, in] float where kept weights were changed, else None.
    """

    keep: Tensor
    weight: Tensor | None = None

    def __getitem__(self, rows: slice) -> Pruned:
        return Pruned(self.keep[rows], None if self.weight is None else self.weight[rows])


@dataclass(frozen=True)
class Sparsifier:
    """A method with its options bound: what turns (weight, statistics, pattern) into a keep-mask and refitted weights."""

    score: Bound | None
    group: Group
    refine: Bound | None = None
    reconstruct: Bound | None = None
    tune: Bound | None = None
    seed: int = 0
    permute: bool = False

    @classmethod
    def of(cls, method: Method, options: Mapping[str, Mapping[str, Any]], seed: int = 0) -> Sparsifier:
        """The method's parts with a recipe's options laid over their defaults. Raises `InputError`."""
        bound = {kind: bind(kind, method, options) for kind in ("score", "refine", "reconstruct", "tune")}
        pattern = {"group": method.group, "permute": False, **options.get("pattern", {})}
        group, permute = pattern.pop("group"), pattern.pop("permute")
        if group not in ("row", "layer"):
            raise InputError(f"'pattern.group' cannot be {group!r}: it is row or layer")
        if not isinstance(permute, bool):
            raise InputError(f"'pattern.permute' cannot be {permute!r}: it is true or false")
        if pattern:
            raise InputError(
                f"'pattern.{next(iter(pattern))}' is not an option of the pattern: known are group and permute"
            )
        if permute:
            require_scipy()
        last = bound["reconstruct"]
        if bound["score"] is None:
            if last is None or not last.part.chooses:
                raise InputError(
                    f"method '{method.name}' has nothing that chooses what to keep: name a score with --set score.name=wanda"
                )
            if bound["refine"] is not None:
                raise InputError(
                    f"refine '{bound['refine'].part.name}' moves a mask and '{method.name}' makes its own while it solves: "
                    "give it a score first, like --set score.name=wanda"
                )
        return cls(bound["score"], cast(Group, group), bound["refine"], last, bound["tune"], seed, permute)

    @property
    def parts(self) -> list[Bound]:
        """The parts it has, in the order they work."""
        return [part for part in (self.score, self.refine, self.reconstruct, self.tune) if part is not None]

    @property
    def needs(self) -> frozenset[str]:
        """Statistics its parts read."""
        return frozenset().union(*(bound.part.needs for bound in self.parts if bound is not self.tune))

    @property
    def tunes_to_dense(self) -> bool:
        """Whether blocks are tuned towards what those of the dense model give there, whose hidden states then go beside ours."""
        return self.tune is not None and FOLLOWED in self.tune.needs

    def resolved(self, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """A recipe's part options with the names and defaults that hold today filled in."""
        own = {bound.part.kind: {"name": bound.part.name, **bound.options} for bound in self.parts}
        return {**options, **own, "pattern": {"group": self.group, "permute": self.permute}}

    def works_by_rows(self, pattern: Pattern) -> bool:
        """Whether some rows' result depends on those rows alone."""
        return Selection(pattern, self.group).by_rows and all(
            bound.part.rowwise for bound in self.parts if bound is not self.tune
        )

    def prune(
        self, weight: Tensor, stats: Statistics, pattern: Pattern, name: str, rows: slice | None = None
    ) -> Pruned:
        """Which weights stay, and what the kept ones become.

        Shapes: weight [out, in], any float dtype -> those `rows` of it, by default all. Exactly `floor(in·s)` False per row, or
        `floor(out·in·s)` over the layer, or `G − K` per group. Computed in float32 (float64 for a float64 weight), on the device the
        statistics lie on, where the result is too. Raises `InputError` where a score or a refitted weight is not finite.
        """
        selection = Selection(pattern, self.group)
        mine = slice(0, len(weight)) if rows is None else rows
        stats = stats.of(weight).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if self.works_by_rows(pattern):
            return self._prune(weight[mine], stats.rows(mine), selection, name)
        return self._prune(weight, stats, selection, name)[mine]

    def importance(self, weight: Tensor, stats: Statistics, name: str) -> Tensor:
        """What the score says of every weight, [out, in]; magnitude times input norm where the method has no score of its own."""
        exact = stats.of(weight).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        if self.score is None:
            return _exact(weight, stats).abs() * exact.gram.diagonal().clamp_min(0).sqrt()
        return self._scores(weight, exact, name)

    def _prune(self, weight: Tensor, stats: Statistics, selection: Selection, name: str) -> Pruned:
        keep = None if self.score is None else self._choose(weight, stats, selection, name)
        if keep is not None and self.refine is not None:
            keep = self._refined(weight, keep, stats, selection)
        if self.reconstruct is None:
            assert keep is not None
            return Pruned(keep)
        new, keep = self.reconstruct(_exact(weight, stats), keep, stats, selection)
        if not all_finite(new):
            raise InputError(
                f"reconstruct '{self.reconstruct.part.name}' of '{name}' gave NaN or infinite weights: "
                "its weights or inputs are not finite, or --set reconstruct.damping is too small"
            )
        return Pruned(keep, new)

    def _choose(self, weight: Tensor, stats: Statistics, selection: Selection, name: str) -> Tensor:
        assert self.score is not None
        rows, columns = weight.shape
        device = stats.device or weight.device
        chunks = list(row_chunks(rows, columns)) if self.score.part.rowwise else [slice(0, rows)]
        if selection.by_rows:
            keep = torch.empty(rows, columns, dtype=torch.bool, device=device)
            for part in chunks:
                keep[part] = selection.mask(self._scores(weight[part], stats.rows(part), name))
            return keep
        if len(chunks) == 1:
            return selection.mask(self._scores(weight, stats, name))
        whole: Tensor | None = None
        for part in chunks:
            scores = self._scores(weight[part], stats.rows(part), name)
            whole = torch.empty(rows, columns, dtype=scores.dtype, device=device) if whole is None else whole
            whole[part] = scores
        assert whole is not None
        return selection.mask(whole)

    def _scores(self, weight: Tensor, stats: Statistics, name: str) -> Tensor:
        assert self.score is not None
        exact = _exact(weight, stats)
        more = {"generator": named_generator(self.seed, name)} if self.score.part.random else {}
        scores = self.score(exact, stats, **more)
        if scores.shape != weight.shape:
            raise PrunekitError(
                f"score '{self.score.part.name}' gave shape {list(scores.shape)} for a weight {list(weight.shape)}: they must be equal"
            )
        if not all_finite(scores):
            raise InputError(
                f"score '{self.score.part.name}' of '{name}' is NaN or infinite: its weights or its inputs are not finite"
            )
        return cast(Tensor, scores)

    def _refined(self, weight: Tensor, keep: Tensor, stats: Statistics, selection: Selection) -> Tensor:
        assert self.refine is not None
        if not self.refine.part.rowwise:
            return cast(Tensor, self.refine(_exact(weight, stats), keep, stats, selection.groups))
        for part in row_chunks(*weight.shape):
            rows = _exact(weight[part], stats)
            keep[part] = self.refine(rows, keep[part], stats.rows(part), selection.groups)
        return keep


def _exact(weight: Tensor, stats: Statistics) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(device=stats.device or weight.device, dtype=dtype)
