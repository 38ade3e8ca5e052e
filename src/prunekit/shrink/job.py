"""A recipe that removes structures, bound to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blockwalk import Appetite, block_parameters
from ..catalogue import find_method
from ..distributed import Ranks
from ..errors import InputError
from ..model.source import StreamedModel, refuse_sliced
from ..model.stream import Walk
from ..recipe import Recipe, refuse_choices
from .budget import Counts, blocks_to_remove, no_scores, plan_of
from .given import given_plan
from .gradients import gradient_bytes
from .plan import Plan, Structures
from .saving import Form
from .searching import trial_bytes
from .shrinker import Shrinker
from .sublayers import find_sublayers, plan_without
from .units import find_structures
from .walk import ShrinkWalk, form_of

_SPARED = 0.8  # of the weights that are to go


@dataclass(frozen=True)
class Shrinking:
    """The method with its options bound, the model's structures, and how many units stay where no score has a say in that.

    `plan` is what stays, where that is given.
    """

    shrinker: Shrinker
    structures: Structures
    counts: Counts | None
    recipe: Recipe
    source: StreamedModel
    form: Form | None
    plan: Plan | None = None

    @classmethod
    def of(cls, recipe: Recipe, source: StreamedModel) -> Shrinking:
        """Raises `InputError` for what the method or its budget cannot do with this model."""
        shrinker = Shrinker.of(find_method(recipe.method), recipe.parts, recipe.seed)
        calibration = recipe.calibration
        if not shrinker.gradients:
            refuse_choices(recipe)
        if 1 < calibration.choices >= calibration.samples:
            raise InputError(
                f"calibration.choices={calibration.choices} shares out the windows, with a last share to judge by: "
                f"{calibration.samples} --samples are too few"
            )
        if shrinker.tune is not None and calibration.mode == "dense":
            raise InputError(
                f"tune '{shrinker.tune.part.name}' goes from block to cut block: leave out --set calibration.mode=dense"
            )
        if shrinker.search is not None:
            _refuse_search(recipe, shrinker)
        if shrinker.follows and calibration.mode == "dense":
            raise InputError(
                "compensate.target=dense follows the dense model beside the cut one, and in calibration.mode=dense there is no other: "
                "leave one of them out"
            )
        refuse_sliced(source, "take heads and channels out of the original")
        if shrinker.planned:
            return cls._planned(shrinker, recipe, source)
        structures = find_structures(source.module, source.anatomy)
        if not any(structures):
            raise InputError(f"{type(source.module).__name__} has no units that can be taken out")
        if shrinker.sublayers:
            structures = find_sublayers(source.module, source.anatomy, structures)
        parameters = block_parameters(source)
        # what the ratio or the alignment cannot be is refused before anything is measured
        chance = no_scores(structures)
        form: Form | None = None
        if shrinker.sublayers:
            plan = plan_without(structures, parameters, recipe.target.fraction, shrinker.candidates(structures))
            form_of(source, structures, plan, shrinker)
            return cls(shrinker, structures, None, recipe, source, None)
        if shrinker.depth is not None:
            blocks_to_remove(recipe.target.fraction, len(structures))
            return cls(shrinker, structures, None, recipe, source, None)
        counts = shrinker.budget.counts(structures, parameters, recipe.target.fraction, chance)
        if not shrinker.plans_first:
            form = form_of(source, structures, plan_of(structures, counts, chance), shrinker)
        return cls(shrinker, structures, None if shrinker.plans_first else counts, recipe, source, form)

    @classmethod
    def _planned(cls, shrinker: Shrinker, recipe: Recipe, source: StreamedModel) -> Shrinking:
        assert recipe.plan is not None
        plan, structures = given_plan(source.module, source.anatomy, Path(recipe.plan))
        if shrinker.follows and len(plan.kept_blocks) < len(structures):
            raise InputError(
                f"plan '{recipe.plan}' drops whole blocks, and compensate.target=dense follows the dense model block by block: leave "
                "out the target"
            )
        form = form_of(source, structures, plan, shrinker)
        return cls(shrinker, structures, None, recipe, source, form, plan)

    @property
    def looks_at_data(self) -> bool:
        """Whether score or compensation read statistics or gradients."""
        shrinker = self.shrinker
        measures = shrinker.measured | shrinker.gradients | shrinker.refits
        return bool(measures) or shrinker.depth is not None or shrinker.tune is not None

    @property
    def resolved(self) -> dict[str, dict[str, Any]]:
        """The recipe's part options with the names and defaults that hold today filled in."""
        return self.shrinker.resolved(self.recipe.parts)

    def appetite(self, windows: int, length: int) -> Appetite:
        """Sums of what consumers are fed; a system of the widest one in float64, thrice, and its weight in float32."""
        needs = self.shrinker.measured | self.shrinker.refits
        gram = "gram" in needs
        widths = [[each.consumer.in_features for each in block] for block in self.structures]
        matrices = 2 if "half_gram" in needs else 1
        sums = matrices * max(sum(width**2 * 4 for width in block) for block in widths) if gram else 0
        if self.shrinker.follows:
            sums += matrices * max(sum(each.consumer.count * 4 for each in block) for block in self.structures)
        if gram and self.shrinker.coupled:
            sums += matrices * 4 * int(self.source.module.config.get_text_config().hidden_size) ** 2
        widest = max(max(block, default=0) for block in widths)
        largest = max(linear.count for linear in self.source.anatomy.linears())
        gradients = self.shrinker.gradients
        ahead = gradient_bytes(self.source, windows, length, gradients) if gradients else 0
        if self.shrinker.search is not None:
            samples, judged = (self.shrinker.search.options[name] for name in ("samples", "length"))
            ahead = max(ahead, trial_bytes(self.source, samples, judged or 2 * length))
        return Appetite(
            sums,
            3 * largest * 4 + (3 * widest**2 * 8 if gram else 0),
            self.shrinker.tune is not None,
            ahead=ahead,
            written=-self._spared,
            streams=2 if self.shrinker.follows else 1,
        )

    @property
    def _spared(self) -> int:
        """Bytes of weights that are not written, a little less than will be: what a budget takes differs from what was asked for."""
        if self.shrinker.score is not None and self.shrinker.budget.part.given:
            return 0
        parameters = block_parameters(self.source)
        gone = float(self.recipe.target.fraction) * sum(parameters)
        if self.plan is not None:
            gone = self.plan.removed(self.structures, parameters)
        return int(_SPARED * gone * min(entry.dtype.itemsize for entry in self.source.reader.entries.values()))

    def work(
        self, walk: Walk, *, dense: bool, ranks: Ranks | None = None, first: int = 0, total: int | None = None
    ) -> ShrinkWalk:
        """What removes units from the blocks of `walk`'s model. Raises `InputError` for several processes where one must do it all."""
        if self.shrinker.gradients and ranks is not None and ranks.size > 1:
            assert self.shrinker.score is not None
            raise InputError(
                f"'{self.shrinker.score.part.name}' wants gradients, which one process computes: start it without torchrun"
            )
        if self.shrinker.search is not None and ranks is not None and ranks.size > 1:
            raise InputError(f"'{self.recipe.method}' searches, and one process does that: start it without torchrun")
        return ShrinkWalk(
            walk,
            self.shrinker,
            self.structures,
            self.recipe,
            self.counts,
            self.plan,
            self.form,
            dense=dense,
            ranks=Ranks() if ranks is None else ranks,
            first=first,
            total=total,
        )


def _refuse_search(recipe: Recipe, shrinker: Shrinker) -> None:
    """What a search cannot do, or what it would take no notice of."""
    if shrinker.budget.shape != "free" or shrinker.budget.part.given:
        raise InputError(
            f"the search of '{recipe.method}' gives every block widths of its own: add --shape free, and name no widths"
        )
    if recipe.calibration.choices > 1:
        raise InputError(
            f"calibration.choices={recipe.calibration.choices} and the search of '{recipe.method}' would both choose: leave out the "
            "choices"
        )
    search, score = shrinker.search, shrinker.score
    assert search is not None
    assert score is not None
    if search.part.name == "tpe" and (score.part.name != "taylor" or score.options != score.part.bind({})):
        raise InputError(
            f"the search of '{recipe.method}' chooses how 'taylor' computes importance: leave out the options of the score, and say "
            "what may be chosen, like --set search.order=first,second"
        )
    if search.part.name == "evolution" and shrinker.budget.least:
        raise InputError(
            f"the search of '{recipe.method}' has a least share of its own: in the place of budget.least say --set "
            f"search.least={shrinker.budget.least:g}"
        )
    if search.part.name == "evolution" and shrinker.budget.part.name != "uniform":
        raise InputError(
            f"the search of '{recipe.method}' finds itself how many units stay: leave out budget '{shrinker.budget.part.name}'"
        )
