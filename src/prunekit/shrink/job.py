"""A recipe that removes structures, bound to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blockwalk import Appetite, block_parameters
from ..catalogue import find_method
from ..distributed import Ranks
from ..errors import InputError
from ..model.memory import MemoryModel
from ..model.source import StreamedModel, refuse_sliced
from ..model.stream import Walk
from ..recipe import Recipe, refuse_choices
from ..statistics import TARGET_SUMS
from .budget import Counts, blocks_to_remove, no_scores, plan_of
from .choosing import refuse_few_windows
from .given import given_plan
from .gradients import gradient_bytes, gradient_files
from .narrowing import Narrowing
from .perceptron import Perceptron, find_perceptrons
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

    Where the residual stream is to be narrower, `narrowing` says how, and the structures are those of the narrower model: the same
    units.
    `perceptrons`, by block, are for a score that looks at gates or norms; there are none otherwise.
    `plan` is what stays, where that is given.
    """

    shrinker: Shrinker
    structures: Structures
    counts: Counts | None
    recipe: Recipe
    source: StreamedModel
    form: Form | None
    narrowing: Narrowing | None = None
    perceptrons: tuple[Perceptron | None, ...] = ()
    plan: Plan | None = None

    @classmethod
    def of(cls, recipe: Recipe, source: StreamedModel) -> Shrinking:
        """Raises `InputError` for what the method or its budget cannot do with this model."""
        shrinker = Shrinker.of(find_method(recipe.method), recipe.parts, recipe.seed)
        calibration = recipe.calibration
        if not shrinker.gradients:
            refuse_choices(recipe)
        if calibration.choices > 1:
            refuse_few_windows(calibration.choices, calibration.samples)
        if shrinker.tune is not None and calibration.mode == "dense":
            raise InputError(
                f"tune '{shrinker.tune.part.name}' goes from block to cut block: leave out --set calibration.mode=dense"
            )
        if shrinker.search is not None:
            _refuse_search(recipe, shrinker)
        if shrinker.follows and calibration.mode == "dense":
            raise InputError(
                f"{shrinker.follows} follows the dense model beside the cut one, and in calibration.mode=dense there is no other: "
                "leave one of them out"
            )
        refuse_sliced(source, "take heads and channels out of the original")
        if shrinker.planned:
            return cls._planned(shrinker, recipe, source)
        narrowing = _narrowing(source, shrinker)
        # which channels stay makes no difference to shapes
        shaped = source if narrowing is None else narrowing.model(range(narrowing.width))
        structures = find_structures(shaped.module, shaped.anatomy)
        if not any(structures):
            raise InputError(f"{type(source.module).__name__} has no units that can be taken out")
        if shrinker.sublayers:
            structures = find_sublayers(source.module, source.anatomy, structures)
        around = shrinker.around
        perceptrons = find_perceptrons(source.module, source.anatomy, structures, around) if around else ()
        parameters = block_parameters(shaped)
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
        if narrowing is not None or not shrinker.plans_first:
            form = form_of(shaped, structures, plan_of(structures, counts, chance), shrinker)
        known = None if shrinker.plans_first else counts
        return cls(shrinker, structures, known, recipe, source, form, narrowing, perceptrons)

    @classmethod
    def _planned(cls, shrinker: Shrinker, recipe: Recipe, source: StreamedModel) -> Shrinking:
        assert recipe.plan is not None
        plan, structures = given_plan(source.module, source.anatomy, Path(recipe.plan))
        if shrinker.follows and len(plan.kept_blocks) < len(structures):
            raise InputError(
                f"plan '{recipe.plan}' drops whole blocks, and {shrinker.follows} follows the dense model block by block: leave out "
                "the target"
            )
        if plan.hidden is not None:
            raise InputError(
                f"plan '{recipe.plan}' leaves channels of the residual stream out, which is not carried out from a file: say "
                f"--method minitron --set budget.name=widths --set budget.hidden={len(plan.hidden.kept)}"
            )
        form = form_of(source, structures, plan, shrinker)
        return cls(shrinker, structures, None, recipe, source, form, plan=plan)

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
        if needs & TARGET_SUMS:
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
            self.shrinker.keeps_targets,
            ahead=ahead,
            filed=gradient_files(self.source, windows, length) if gradients else 0,
            written=-self._spared,
            streams=2 if self.shrinker.follows else 1,
        )

    @property
    def _spared(self) -> int:
        """Bytes of weights that are not written, a little less than will be: what a budget takes differs from what was asked for."""
        smallest = min(entry.dtype.itemsize for entry in self.source.reader.entries.values())
        if self.shrinker.score is not None and self.shrinker.budget.part.given:
            return 0 if self.narrowing is None else self.narrowing.removed * smallest
        parameters = block_parameters(self.source)
        gone = float(self.recipe.target.fraction) * sum(parameters)
        if self.plan is not None:
            gone = self.plan.removed(self.structures, parameters)
        return int(_SPARED * gone * smallest)

    def work(
        self, walk: Walk, *, dense: bool, ranks: Ranks | None = None, first: int = 0, total: int | None = None
    ) -> ShrinkWalk:
        """What removes units from the blocks of `walk`'s model. Raises `InputError` for several processes where one must do it all."""
        if self.shrinker.search is not None and ranks is not None and ranks.size > 1:
            raise InputError(f"'{self.recipe.method}' searches, and one process does that: start it without torchrun")
        if self.shrinker.gradients and ranks is not None and ranks.size > 1:
            assert self.shrinker.score is not None
            raise InputError(
                f"'{self.shrinker.score.part.name}' wants gradients, which one process computes: start it without torchrun"
            )
        return ShrinkWalk(
            walk,
            self.shrinker,
            self.structures,
            self.recipe,
            self.counts,
            self.plan,
            self.form,
            narrowing=self.narrowing,
            perceptrons=self.perceptrons,
            dense=dense,
            ranks=Ranks() if ranks is None else ranks,
            first=first,
            total=total,
        )


def _narrowing(source: StreamedModel, shrinker: Shrinker) -> Narrowing | None:
    """How the residual stream becomes narrower; None where all its channels stay."""
    if not shrinker.budget.narrows:
        return None
    channels = int(source.module.config.get_text_config().hidden_size)
    width = shrinker.budget.hidden(channels)
    if width == channels:
        return None
    if isinstance(source, MemoryModel):
        raise InputError(
            f"budget.hidden={width} cuts embedding and head, too, which needs a folder: save the model, and give prunekit.prune that"
        )
    return Narrowing.of(source, width)


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
    dropped = search.options.get("dropped")
    if dropped and shrinker.follows:
        raise InputError(
            f"search.dropped={dropped} lets whole blocks go, and {shrinker.follows} follows the dense model block by block: leave "
            "one of them out"
        )
    varied = search.part.varies
    if varied is not None and (score.part.function is not varied or score.options != score.part.bind({})):
        raise InputError(
            f"the search of '{recipe.method}' chooses how '{varied.__name__}' computes importance: leave out the options of the score, "
            f"and say what may be chosen with those of the search, which 'prunekit methods {recipe.method}' lists"
        )
    if search.part.sizes and shrinker.budget.least:
        raise InputError(
            f"the search of '{recipe.method}' has a least share of its own: in the place of budget.least say --set "
            f"search.least={shrinker.budget.least:g}"
        )
    if search.part.sizes and shrinker.budget.only != "all":
        raise InputError(
            f"the search of '{recipe.method}' has a choice of kinds of its own: in the place of budget.only say --set "
            "search.attention=none for channels alone, or search.attention=kv_group for both"
        )
    if search.part.sizes and not shrinker.budget.part.even:
        raise InputError(
            f"the search of '{recipe.method}' finds itself how many units stay, and so does budget '{shrinker.budget.part.name}': say "
            "--set budget.name=uniform"
        )
