"""A method that removes structures, with its options bound: score, budget, compensation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..binding import Bound, bind, named_generator
from ..bits import all_finite
from ..catalogue import Method
from ..errors import InputError, PrunekitError
from ..parts import FOLLOWED
from ..statistics import TARGET_SUMS, Statistics
from .budget import UnitBudget
from .perceptron import AROUND
from .plan import Structures
from .units import Structure
from .view import BlockView

GRADIENTS = "gradient_"  # sums of gradients are needed under names that begin like this


@dataclass(frozen=True)
class Shrinker:
    """What turns a block and what was measured of it into scores, counts and refitted weights; columns are just left out where nothing
    compensates.
    """

    score: Bound | None
    budget: UnitBudget
    compensate: Bound | None
    depth: Bound | None = None
    tune: Bound | None = None
    search: Bound | None = None
    planned: bool = False
    seed: int = 0

    @classmethod
    def of(cls, method: Method, options: Mapping[str, Mapping[str, Any]], seed: int = 0) -> Shrinker:
        """The method's parts with a recipe's options laid over their defaults. Raises `InputError`."""
        score, depth = bind("unit-score", method, options), bind("depth", method, options)
        compensate, tune = bind("compensate", method, options), bind("tune", method, options)
        search, budget = bind("search", method, options), options.get("budget")
        width = bind("width", method, options)
        if width is not None:
            raise InputError(
                f"width '{width.part.name}' is about directions of the residual stream, which '{method.name}' does not turn: "
                "leave it out, or take --method slicegpt"
            )
        if method.planned:
            reason = f"with '{method.name}' the plan says what stays"
            _refuse_others(method, budget, (score, depth, search), "is there to choose what goes", reason)
        elif (score is None) == (depth is None):
            raise InputError(
                f"method '{method.name}' must have either a score, which ranks units, or a depth, which removes blocks"
            )
        if depth is not None:
            what = "blocks" if depth.part.candidates is None else "sublayers"
            others, reason = (compensate, tune, search), f"'{method.name}' removes whole {what}"
            _refuse_others(method, budget, others, "is about blocks that lose some of their units", reason)
        units = UnitBudget.of(method, budget)
        if units.narrows:
            _refuse_narrow(method, score, [part for part in (compensate, tune) if part is not None])
        return cls(score, units, compensate, depth, tune, search, method.planned, seed)

    @property
    def sublayers(self) -> bool:
        """Whether it removes sublayers."""
        return self.depth is not None and self.depth.part.candidates is not None

    def candidates(self, structures: Structures) -> Sequence[Structure]:
        """Sublayers that may go, in the model's order."""
        assert self.depth is not None
        assert self.depth.part.candidates is not None
        return self.depth.part.candidates(structures, **self.depth.options)

    @property
    def parts(self) -> list[Bound]:
        """The parts it has, its budget aside."""
        return [part for part in (self.score, self.compensate, self.depth, self.tune, self.search) if part is not None]

    @property
    def measured(self) -> frozenset[str]:
        """Statistics its score reads."""
        return frozenset(name for name in self._needs - AROUND if not name.startswith(GRADIENTS))

    @property
    def gradients(self) -> frozenset[str]:
        """Sums of gradients its score reads."""
        return self._needs - self.measured - AROUND

    @property
    def around(self) -> frozenset[str]:
        """What its score wants to know of the perceptron besides its linears: its gate, its norm."""
        return self._needs & AROUND

    @property
    def _needs(self) -> frozenset[str]:
        searched = frozenset() if self.search is None else self.search.needs
        return searched or (frozenset() if self.score is None else self.score.needs)

    @property
    def coupled(self) -> bool:
        """Whether its score reads statistics of the linears that produce units, too."""
        return self.score is not None and self.score.part.coupled

    @property
    def refits(self) -> frozenset[str]:
        """Statistics its compensation reads."""
        return frozenset() if self.compensate is None else self.compensate.needs

    @property
    def follows(self) -> str:
        """The option by which something aims at what the dense model computes, whose hidden states then go beside ours; or nothing."""
        if self.refits & TARGET_SUMS:
            return "compensate.target=dense"
        return "tune.target=dense" if self.tunes_to_dense else ""

    @property
    def tunes_to_dense(self) -> bool:
        """Whether blocks are tuned towards what those of the dense model give there."""
        return self.tune is not None and FOLLOWED in self.tune.needs

    @property
    def keeps_targets(self) -> bool:
        """Whether they are tuned towards what whole blocks give for what they are fed here, which is then kept."""
        return self.tune is not None and not self.tunes_to_dense

    @property
    def plans_first(self) -> bool:
        """Whether the whole plan is made before the first block is cut.

        From the scores of all, from gradients, by a search, or because the residual stream is to be narrower in all blocks alike.
        """
        planning = self.depth is not None or self.search is not None
        return self.budget.scored or self.budget.narrows or bool(self.gradients) or planning

    def resolved(self, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """A recipe's part options with the names and defaults that hold today filled in."""
        own = {bound.part.word: {"name": bound.part.name, **bound.options} for bound in self.parts}
        budget = {} if self.score is None else {"budget": self.budget.resolved}
        return {**{key: dict(value) for key, value in options.items()}, **own, **budget}

    def scores(self, view: BlockView) -> dict[str, Tensor]:
        """Importance of the units of every structure of a block, [units] by name. Raises `InputError` where one is not finite."""
        found = {}
        assert self.score is not None
        for structure in view.structures:
            more = (
                {"generator": named_generator(self.seed, structure.consumer.full_name)}
                if self.score.part.random
                else {}
            )
            found[structure.name] = self.score(view, structure, **more)
            if found[structure.name].shape != (structure.count,):
                raise PrunekitError(
                    f"score '{self.score.part.name}' gave {list(found[structure.name].shape)} for {structure.count} units"
                )
            if not all_finite(found[structure.name]):
                raise InputError(
                    f"score '{self.score.part.name}' of '{structure.consumer.full_name}' holds NaN or infinite values: "
                    "try --dtype float32"
                )
        return found

    def channel_scores(self, norms: Sequence[Statistics]) -> Tensor:
        """Importance of the channels of the residual stream, [channels], by what all norms returned. Raises `InputError`."""
        assert self.score is not None
        assert self.score.part.channels is not None
        found: Tensor = self.score.part.channels(norms)
        if not all_finite(found):
            raise InputError(
                f"score '{self.score.part.name}' of the residual stream holds NaN or infinite values: try --dtype float32"
            )
        return found


def _refuse_narrow(method: Method, score: Bound | None, others: Sequence[Bound]) -> None:
    """What cannot go with fewer channels of the residual stream."""
    if score is None or score.part.channels is None:
        raise InputError(
            f"the score of '{method.name}' does not rank channels of the residual stream: leave out budget.hidden, or take "
            "--method minitron"
        )
    if others:
        raise InputError(
            f"{others[0].part.word} '{others[0].part.name}' aims at what the whole model computes, which blocks of a narrower stream "
            "cannot: leave out budget.hidden, or the part; `prunekit recover` trains what is left"
        )


def _refuse_others(
    method: Method, budget: Mapping[str, Any] | None, others: Sequence[Bound | None], purpose: str, reason: str
) -> None:
    """Raise `InputError` for a budget and for other parts that would not be asked, saying what each is for."""
    if budget:
        raise InputError(
            f"'budget.{next(iter(budget))}' is for methods that remove units of blocks; {reason}: leave it out"
        )
    named = [(part.part.word, part.part.name) for part in others if part is not None]
    named += [("budget", method.budget)] if "budget" in method.of_units else []
    for word, name in named:
        raise InputError(f"{word} '{name}' {purpose}; {reason}: leave it out")
