"""Shrink a model block by block: measure what consumers of units are fed, choose, refit, and cut.

While it is refitted a block keeps its shapes: columns of removed units are zero. Then it is cut, compared with itself before, and the
windows go on through the cut block, which is what is written and what the reload check compares.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bits import all_finite, count_zeros
from ..blockwalk import BlockWalk, LinearReport, Rehearsal, block_parameters, dense_blocks
from ..calibration.windows import load_tokenizer, token_hash
from ..checkpoint.shard import Piece
from ..checkpoint.writer import PLAN_NAME
from ..errors import InputError, PrunekitWarning, VerificationError
from ..model.anatomy import Block, Stored, weight_of
from ..model.hidden import HiddenStates
from ..model.memory import MemoryModel
from ..model.source import StreamedModel
from ..model.stream import Windows
from ..progress import Step
from ..recipe import Recipe
from ..search.history import History
from ..statistics import Statistics, Watch
from ..verify import TOLERANCE, relative_difference
from .budget import Counts, Scores, blocks_to_remove, plan_of, top_units
from .choosing import choose_calibration, refuse_few_windows
from .gradients import measure_gradients
from .influence import Influence
from .installing import install
from .narrowing import Narrowing
from .perceptron import Perceptron
from .plan import Channels, Plan, Structures
from .saving import Form, choose_form
from .searching import HISTORY_NAME, Answer, Drawing, Ground, Texts
from .shrinker import Shrinker
from .slicing import Slicer, cut
from .sublayers import plan_without
from .units import Structure
from .view import BlockView, Gradients
from .writing import block_tensors, outer_pieces

Kept = Mapping[str, tuple[int, ...]]
_PASSES_FOR_GRADIENTS = 4.0  # there; and back, where each block is run again and its inputs and weights have gradients


@dataclass
class ShrinkWalk(BlockWalk):
    """Removes units from the blocks of `walk`'s model in order.

    Attributes:
        shrinker: the method.
        structures: what can go, by block.
        recipe: what was asked for.
        counts: how many units of each structure stay, where that is known before anything is scored.
        plan: what stays, where that is decided before the first block is cut.
        form: how the smaller model is saved, where that is known before anything is scored.
        narrowing: how the residual stream becomes narrower; the model that is walked has fewer channels once they are chosen.
        perceptrons: by block, the gates and norms that the score looks at; empty where it looks at none.
        kept: what stays of the blocks that are done.
        biases: consumers that were given a bias they did not have, by full name.
        added: how many parameters those are in every block that is done.
        aside: tensors of the smaller model in memory that are not as they were in the whole one, by name.
        texts: what candidates of a search are judged by.
        found: what was found before the first block is cut: the plan, and what the manifest says of a search or a choice.
    """

    shrinker: Shrinker
    structures: Structures
    recipe: Recipe
    counts: Counts | None = None
    plan: Plan | None = None
    form: Form | None = None
    narrowing: Narrowing | None = None
    perceptrons: Sequence[Perceptron | None] = ()
    kept: dict[int, Kept] = field(default_factory=dict, kw_only=True)
    biases: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    added: dict[int, int] = field(default_factory=dict, kw_only=True)
    aside: dict[str, Tensor] = field(default_factory=dict, init=False)
    texts: Texts | None = field(default=None, init=False)
    found: Mapping[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        source = self.walk.source
        self._dense_parameters, self._dense_total = block_parameters(source), source.parameter_count
        self._dense_linears = {linear.full_name: linear.count for linear in source.anatomy.linears()}
        self._parameters = self._dense_parameters

    def prepare(self) -> None:
        """Draw the texts of a search, too."""
        super().prepare()
        if self.shrinker.search is not None:
            source, part = self._streamed, self.shrinker.search
            tokenizer = load_tokenizer(source.reader.folder, trust_remote_code=self.recipe.trust_remote_code)
            assert part.part.draws is not None
            self.texts = part.part.draws(Drawing(self.recipe, source, tokenizer, self.walk.windows), **part.options)

    @property
    def told(self) -> dict[str, Any]:
        """What a search, or a choice among calibrations, came to."""
        return {name: self.found[name] for name in ("search", "choice") if name in self.found}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that stay, in order."""
        blocks = super().blocks
        return blocks if self.plan is None else tuple(blocks[index] for index in self.plan.kept_blocks)

    @property
    def looks_ahead(self) -> str:
        """The name of what ranks, where the plan is made before the first block is cut."""
        ranks = self.shrinker.search or self.shrinker.depth or self.shrinker.score
        return ranks.part.name if ranks is not None and self.shrinker.plans_first else ""

    @property
    def steps_ahead(self) -> int:
        """Once through the dense model, and back where there are gradients; of several choices each, and once more to try its plan."""
        blocks = len(self.structures)
        if not self.shrinker.plans_first:
            return 0
        if self.shrinker.search is not None:
            search = self.shrinker.search
            assert search.part.steps is not None
            return search.part.steps(blocks, **search.options)
        if self.shrinker.depth is None:
            choices = self.recipe.calibration.choices
            if self.shrinker.gradients and choices > 1:
                return choices * (3 * blocks + 1)
            return 2 * blocks if self.shrinker.gradients else blocks
        steps = self.shrinker.depth.part.steps
        assert steps is not None
        count = blocks if self.shrinker.sublayers and self.recipe.target.fraction else self._blocks_to_remove
        return steps(blocks, count, **self.shrinker.depth.options) if count else 0

    def rehearse(self) -> Rehearsal:
        """Stand in for `look_ahead` with random scores, or with the last blocks removed."""
        blocks = len(self.structures)
        passes = self.steps_ahead / blocks
        if self.shrinker.planned:
            assert self.plan is not None
            plan = self.plan
        elif self.shrinker.sublayers:
            plan = self.plan = self._without_sublayers(list(reversed(self.shrinker.candidates(self.structures))))
        elif self.shrinker.depth is not None:
            plan = self.plan = self._without(range(blocks - self._blocks_to_remove, blocks))
        else:
            generator = torch.Generator().manual_seed(self.recipe.seed)
            scores = [
                {each.name: torch.rand(each.count, generator=generator) for each in block} for block in self.structures
            ]
            counts = self._counts(scores)
            plan = plan_of(self.structures, counts, scores)
            if self.shrinker.search is not None:
                self.plan, passes = plan, self._passes_of_search
            elif self.shrinker.gradients:  # which no block alone has
                self.plan, passes = plan, _PASSES_FOR_GRADIENTS
            elif self.narrowing is not None:
                self.plan = plan
                self._narrow(range(self.narrowing.width))
            else:
                self.counts = counts
        if self.form is None:
            self.form = form_of(self._streamed, self.structures, plan, self.shrinker)
        names = self._streamed.key_of
        new = [
            each
            for each in _biased(self.structures, plan, self.shrinker)
            if f"{each.consumer.full_name}.bias" not in names
        ]
        added = sum(each.consumer.out_features for each in new) + self._zeros
        losing = [
            place for place, block in enumerate(self.blocks) if self._loses(block.index, plan.blocks[block.index])
        ]
        first = losing[0] if losing else 0
        tuned = len(self.blocks) - first if self.shrinker.tunes_to_dense else len(losing)
        removed = self._removed_by(plan) - added
        return Rehearsal(removed, passes, self._removed_outside, tried=first, tuned=tuned)

    def _loses(self, index: int, kept: Kept | None) -> bool:
        return kept is None or any(len(kept[each.name]) < each.count for each in self.structures[index])

    @property
    def _passes_of_search(self) -> float:
        """What a search takes at most, in passes of the calibration windows."""
        search = self.shrinker.search
        assert search is not None
        trials, samples, length = (search.options[name] for name in ("trials", "samples", "length"))
        judged = trials * samples * (length or 2 * self.walk.windows.length)
        passes = _PASSES_FOR_GRADIENTS if self.shrinker.gradients else 1.0
        return float(passes + judged / self.recipe.calibration.samples / self.walk.windows.length)

    def look_ahead(self, known: Any, stored: Stored, step: Step) -> Any:
        """Make the plan from the scores of all blocks of the dense model, or by a search, or take up the one that is `known`."""
        if not self.shrinker.plans_first:
            return None
        if known is None:
            plan, found = self._make_plan(stored, step)
            known = {**plan.to_json(self.structures), **found}
        self.found = known
        self.plan = Plan.from_json(known, self.structures)
        if self.plan.hidden is not None:
            self._narrow(self.plan.hidden.kept)
        self.form = form_of(self._streamed, self.structures, self.plan, self.shrinker)
        return known

    def _narrow(self, kept: Sequence[int]) -> None:
        """Go on with the model that has these channels of the residual stream alone."""
        assert self.narrowing is not None
        self.walk.move_to(self.narrowing.model(kept))
        self._parameters = block_parameters(self.walk.source)

    def _search(self, stored: Stored, step: Step) -> tuple[Plan, dict[str, Any]]:
        assert self.shrinker.search is not None
        assert self.texts is not None
        ground = Ground(
            self.recipe,
            self.walk.source,
            self.structures,
            self._parameters,
            self.shrinker.budget,
            self.walk.windows.length,
            self.texts,
            scores=lambda: self._scores_of_all(stored, step),
            gradients=lambda windows: self._gradients(windows, stored, lambda: None),
            scratch=self.scratch,
            identity=self._identity,
            step=step,
        )
        answer: Answer = self.shrinker.search(ground)
        self.walk.prepare()
        return answer.plan, {"search": answer.summary}

    @property
    def _identity(self) -> dict[str, Any]:
        """What must be equal for what was kept of a search to be this one's."""
        return {"recipe": self.recipe.model_dump(exclude={"model"}), "calibration": token_hash(self.walk.windows)}

    def _make_plan(self, stored: Stored, step: Step) -> tuple[Plan, dict[str, Any]]:
        """The plan, and what the manifest says of how it was found."""
        if self.shrinker.search is not None:
            return self._search(stored, step)
        if self.shrinker.gradients and self.recipe.calibration.choices > 1:
            return self._chosen_plan(stored, step)
        if self.narrowing is not None:
            return self._narrow_plan(self.narrowing, stored, step), {}
        if self.shrinker.depth is None:
            return self._planned(self._scores_of_all(stored, step)), {}
        influence = Influence(self.walk, self.ranks, self.seconds, step)
        if self.shrinker.sublayers:
            wanted = bool(self.recipe.target.fraction)
            return self._without_sublayers(self.shrinker.depth(influence, self.structures) if wanted else []), {}
        count = self._blocks_to_remove
        gone = self.shrinker.depth(influence, count) if count else []
        return self._without(gone), {}

    def _narrow_plan(self, narrowing: Narrowing, stored: Stored, step: Callable[[], None]) -> Plan:
        """Channels of the residual stream and units of blocks, both chosen from one pass through the dense model."""
        norms: list[Statistics] = []
        plan = self._planned(self._dense_scores(stored, step, norms))
        kept = top_units(self.shrinker.channel_scores(norms), narrowing.width)
        return replace(plan, hidden=Channels(narrowing.channels, kept))

    def _scores_of_all(self, stored: Stored, step: Callable[[], None]) -> list[dict[str, Tensor]]:
        if self.shrinker.gradients:
            return self._gradient_scores(self.walk.windows, stored, step)
        return self._dense_scores(stored, step)

    @property
    def _blocks_to_remove(self) -> int:
        return blocks_to_remove(self.recipe.target.fraction, len(self.structures))

    def _without(self, gone: Collection[int]) -> Plan:
        whole = Plan.whole(self.structures).blocks
        return Plan(tuple(None if index in gone else kept for index, kept in enumerate(whole)))

    def _without_sublayers(self, order: Sequence[Structure]) -> Plan:
        return plan_without(self.structures, self._parameters, self.recipe.target.fraction, order)

    def _planned(self, scores: list[dict[str, Tensor]]) -> Plan:
        return plan_of(self.structures, self._counts(scores), scores)

    def _counts(self, scores: Scores) -> Counts:
        ratio = self.recipe.target.fraction
        return self.counts or self.shrinker.budget.counts(self.structures, self._parameters, ratio, scores)

    def _chosen_plan(self, stored: Stored, step: Callable[[], None]) -> tuple[Plan, dict[str, Any]]:
        """Of several calibrations the plan that moves predictions least, on windows that none of them has seen."""
        windows, parts = self.walk.windows, self.recipe.calibration.choices + 1
        refuse_few_windows(parts - 1, len(windows))
        if windows.keep is not None:
            raise InputError(
                f"calibration.choices={parts - 1} judges by whole windows: it cannot do with padded ones, leave it out"
            )
        size = len(windows) // parts
        choice = choose_calibration(
            self.walk.source,
            self.structures,
            [windows[number * size : (number + 1) * size] for number in range(parts - 1)],
            lambda drawn: self._planned(self._gradient_scores(drawn, stored, step)),
            windows[(parts - 1) * size :],
            History(None if self.scratch is None else self.scratch / HISTORY_NAME, self._identity),
            step=step,
        )
        self.walk.prepare()
        return choice.plan, {"choice": choice.summary}

    def _gradient_scores(self, windows: Windows, stored: Stored, step: Callable[[], None]) -> list[dict[str, Tensor]]:
        """Scores of all units from gradients of the dense model."""
        measured = self._gradients(windows, stored, step)
        self.walk.prepare()
        return [
            self.shrinker.scores(BlockView({}, gradients=gradients, structures=tuple(block)))
            for gradients, block in zip(measured, self.structures, strict=True)
        ]

    def _gradients(self, windows: Windows, stored: Stored, step: Callable[[], None]) -> list[dict[str, Gradients]]:
        """The sums of gradients of the dense model that the score or the search reads."""
        score = self.shrinker.score
        assert score is not None
        source = self.walk.source
        with self.seconds.timed("forward"):
            return measure_gradients(
                source,
                windows,
                self.structures,
                self.shrinker.gradients,
                score.part.objective,
                lambda linear: stored(linear)[0],
                step=step,
            )

    @torch.inference_mode()
    def _dense_scores(
        self, stored: Stored, step: Callable[[], None], norms: list[Statistics] | None = None
    ) -> list[dict[str, Tensor]]:
        """Scores of all units in the dense model; `norms` are given what the norms of the residual stream returned, block by block."""
        found = []
        for block, module in dense_blocks(self.walk, self.ranks, self.seconds, step):
            measured = self._measured(block, module)
            names = [] if self.narrowing is None else self.narrowing.norms(block)
            watched = self._watched(block, module)
            watched |= {name: Watch(module.get_submodule(name), self.shrinker.measured) for name in names}
            collector = self._collect(
                block, module, measured, self.shrinker.measured, self.walk.hidden, watched=watched
            )
            with self.seconds.timed("prune"), self.ranks.together():
                statistics = collector.statistics(self.ranks.sum_up)
                if norms is not None:
                    norms += [statistics[name] for name in names]
                found.append(self._scores(block, module, stored, statistics))
        return found

    def _scores(
        self, block: Block, module: nn.Module, stored: Stored, statistics: Mapping[str, Statistics]
    ) -> dict[str, Tensor]:
        weights = {linear.name: linear.matrix(stored(linear)[0]) for linear in block.linears}
        perceptron = self._perceptron(block)
        norm = None if perceptron is None else perceptron.norm
        view = BlockView(
            weights,
            statistics,
            structures=tuple(self.structures[block.index]),
            perceptron=perceptron,
            gains=None if norm is None else norm.gains(module),
        )
        return self.shrinker.scores(view)

    def _perceptron(self, block: Block) -> Perceptron | None:
        return self.perceptrons[block.index] if self.perceptrons else None

    def _watched(self, block: Block, module: nn.Module) -> dict[str, Watch]:
        """The modules the score looks at that are no linears it wants the inputs of."""
        perceptron = self._perceptron(block)
        return {} if perceptron is None else perceptron.watched(module)

    @property
    def follows(self) -> bool:
        """Whether compensation or tuning aims at what the dense model computes."""
        return bool(self.shrinker.follows)

    def _consumers(self, block: Block, module: nn.Module) -> dict[str, nn.Module]:
        return {each.name: module.get_submodule(each.name) for each in self.structures[block.index]}

    def _measured(self, block: Block, module: nn.Module) -> dict[str, nn.Module]:
        """The linears whose inputs the score looks at: consumers of units, and of a score that is coupled their producers."""
        consumers = self._consumers(block, module)
        if not self.shrinker.coupled:
            return consumers
        sliced = {part.tensor for each in self.structures[block.index] for part in each.slices}
        producers = [linear.name for linear in block.linears if f"{linear.name}.weight" in sliced]
        return {**{name: module.get_submodule(name) for name in producers}, **consumers}

    @torch.inference_mode()
    def prune_block(self, block: Block, module: nn.Module, stored: Stored) -> list[LinearReport]:
        """Measure the block, choose what stays, and let its consumers, and perhaps all of it, do without the rest."""
        walk = self.walk
        with ExitStack() as stack:
            outputs = walk.hidden if self.dense else None
            wanted = self.beside
            if self.shrinker.keeps_targets:
                outputs = wanted = stack.enter_context(walk.room())
            settled = None if self.plan is None else self.plan.blocks[block.index]
            needs = self.shrinker.refits | (frozenset() if settled is not None else self.shrinker.measured)
            linears = self._measured(block, module) if settled is None else self._consumers(block, module)
            watched = self._watched(block, module) if settled is None else {}
            collector = self._collect(block, module, linears, needs, outputs, watched, follow=self.follows)
            begun = time.perf_counter()
            with self.seconds.timed("prune"), self.ranks.together():
                statistics = collector.statistics(self.ranks.sum_up)
                kept = settled if settled is not None else self._choose(block, module, stored, statistics)
                self.kept[block.index] = kept
                left = [each for each in self.structures[block.index] if kept[each.name]]
                lost = [each for each in left if len(kept[each.name]) < each.count]
                self._silence(block, module)
                dense = {each.name: each.consumer.matrix(stored(each.consumer)[0]).clone() for each in lost}
                shifts = {each.name: self._cut(each, module, stored, statistics[each.name]) for each in lost}
                given = (self.biases.get(each.consumer.full_name) for each in lost)
                self.added[block.index] = sum(bias.numel() for bias in given if bias is not None)
            if self.shrinker.tune is not None and self._strayed(block):
                assert wanted is not None
                with self.seconds.timed("tune"):
                    self._tune(block, module, stored, wanted)
            with self.seconds.timed("prune"), self.ranks.together():
                errors = {
                    each.name: self._cut_error(
                        dense[each.name].to(weight_of(module.get_submodule(each.name))),
                        each.consumer.matrix(stored(each.consumer)[0]),
                        shifts[each.name],
                        self.ranks.from_last(collector.sample(each.name)),
                    )
                    for each in lost
                }
            return self._reports(block, stored, errors, time.perf_counter() - begun)

    def _strayed(self, block: Block) -> bool:
        """Whether there is something tuning can make up for: in this block, or towards the dense model before it, too."""
        first = 0 if self.shrinker.tunes_to_dense else block.index
        return any(self._loses(index, kept) for index, kept in self.kept.items() if first <= index <= block.index)

    def _reports(self, block: Block, stored: Stored, errors: Mapping[str, float], seconds: float) -> list[LinearReport]:
        """What became of every linear of a block; the seconds it took are shared among those that were refitted."""
        slicer, reports = self._slicer(block), []
        for linear in block.linears:
            if slicer.lost(f"{linear.name}.weight"):
                whole = self._dense_linears[linear.full_name]
                reports.append(LinearReport(linear.full_name, (0, 0), None, 0, 0, None, 0.0, removed=whole))
                continue
            matrix = linear.matrix(slicer(f"{linear.name}.weight", stored(linear)[0]))
            reports.append(
                LinearReport(
                    name=linear.full_name,
                    shape=(matrix.shape[0], matrix.shape[1]),
                    pattern=None,
                    weights=matrix.numel(),
                    zeros=count_zeros(matrix),
                    output_error=errors.get(linear.name),
                    seconds=seconds / len(errors) if linear.name in errors else 0.0,
                    removed=self._dense_linears[linear.full_name] - matrix.numel(),
                )
            )
        return reports

    def _choose(self, block: Block, module: nn.Module, stored: Stored, statistics: Mapping[str, Statistics]) -> Kept:
        assert self.counts is not None
        scores = self._scores(block, module, stored, statistics)
        return {name: top_units(scores[name], count) for name, count in self.counts[block.index].items()}

    def _cut(self, structure: Structure, module: nn.Module, stored: Stored, statistics: Statistics) -> Tensor:
        """Give the consumer the weight, and perhaps the bias, it has without what goes; its removed columns are zero.

        Returns what was added to its output, [out].
        """
        linear, units = structure.consumer, torch.tensor(self.kept[structure.block][structure.name])
        weight, bias = stored(linear)
        matrix = linear.matrix(weight)
        keep = structure.inputs(units).to(matrix.device)
        exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        added = None
        if self.shrinker.compensate is None:
            kept = exact[:, keep]
        else:
            refitted: tuple[Tensor, Tensor | None] = self.shrinker.compensate(exact, keep, statistics)
            kept, added = refitted
        if not all_finite(kept):
            raise InputError(
                f"compensating '{linear.full_name}' gave NaN or infinite weights: take more --samples, or more damping"
            )
        new = torch.zeros_like(matrix)
        new[:, keep] = kept.to(new.dtype)
        child = module.get_submodule(linear.name)
        matrix.copy_(new)
        linear.matrix(weight_of(child)).copy_(new)
        if added is None:
            return torch.zeros(len(matrix))
        self._add_bias(structure, child, bias, added.to(weight.dtype))
        return added

    def _silence(self, block: Block, module: nn.Module) -> None:
        """Let the consumers of sublayers that go return zeros."""
        for each in self._slicer(block).left_out:
            for tensor in module.get_submodule(each.name).parameters():
                tensor.detach().zero_()

    def _tune(self, block: Block, module: nn.Module, stored: Stored, wanted: HiddenStates) -> None:
        """Tune the cut block's weights towards `wanted` outputs."""
        part = self.shrinker.tune
        assert part is not None
        slicer = self._slicer(block)
        weights = {f"{linear.name}.weight": linear for linear in block.linears}
        names = {name: linear for name, linear in weights.items() if not slicer.lost(name)}
        with self._cut_block(block, module, slicer):
            tuned = self._descend(part, block, module, names, wanted)
        for name, (value, _) in tuned.items():
            linear = names[name]
            weight = stored(linear)[0]
            slicer.fill(name, weight, value)
            weight_of(module.get_submodule(linear.name)).copy_(weight)

    def _cut_error(self, live: Tensor, new: Tensor, shift: Tensor, sample: Tensor) -> float:
        """Output error of new columns and of what is added to the output: an input that is always one carries that."""
        carried = torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1)
        dense = torch.cat([live, torch.zeros_like(live[:, :1])], dim=1)
        shift = shift.to(live)[:, None]
        return self._output_error(
            dense, lambda rows: dense[rows] - torch.cat([new[rows].to(live), shift[rows]], dim=1), carried
        )

    def _add_bias(self, structure: Structure, child: nn.Module, bias: Tensor | None, added: Tensor) -> None:
        if bias is None:
            self.biases[structure.consumer.full_name] = added
            live = weight_of(child)
            child.bias = nn.Parameter(added.to(live), requires_grad=False)
            return
        bias += added
        own = child.bias
        assert isinstance(own, Tensor)
        if own.data_ptr() != bias.data_ptr():
            own.copy_(bias)

    @torch.inference_mode()
    def pass_on(self, index: int, module: nn.Module) -> None:
        """Send the windows through the block as it will be, cut; then take biases off it that its class does not have."""
        block = self.walk.source.anatomy.blocks[index]
        slicer = self._slicer(block)
        with ExitStack() as stack:
            if slicer.cuts:
                self._compare(block, module, slicer)
                stack.enter_context(self._cut_block(block, module, slicer))
            super().pass_on(index, module)
        for each in self.structures[index]:
            if each.consumer.full_name in self.biases:
                module.get_submodule(each.name).register_parameter("bias", None)

    def _cut_block(self, block: Block, module: nn.Module, slicer: Slicer) -> AbstractContextManager[None]:
        """The block without what goes, for the time being."""
        config = self.walk.source.module.config.get_text_config()
        return cut(module, config, self.structures[block.index], self._plan_of(block), slicer)

    def _compare(self, block: Block, module: nn.Module, slicer: Slicer) -> None:
        """Raise `VerificationError` where the cut block does not compute what the whole one does with zeros for what is gone.

        The reload check compares what is loaded with cut blocks; this compares those, one by one, with what was measured and refitted.
        """
        with self.seconds.timed("verify"), self.ranks.together():
            last = len(self.walk.batches) - 1
            inputs = (
                self.check[:] if self.dense and self.check is not None else self.walk.hidden[self.walk.batches[last]]
            )
            zeroed = self.walk.replay(block.index, module, last, inputs)
            with self._cut_block(block, module, slicer):
                found = self.walk.replay(block.index, module, last, inputs)
            difference = relative_difference(found, zeroed)
            if not difference <= TOLERANCE[self.walk.source.dtype]:
                raise VerificationError(
                    f"'{block.name}' computes something else without its removed units: its output differs by {difference:.2g} of its "
                    f"norm (allowed: {TOLERANCE[self.walk.source.dtype]:g}); please report this"
                )

    def _plan_of(self, block: Block) -> Plan:
        """The plan of one block that is done."""
        blocks: list[Kept | None] = [None] * len(self.structures)
        blocks[block.index] = self.kept[block.index]
        return Plan(tuple(blocks))

    def _slicer(self, block: Block) -> Slicer:
        module = self.walk.source.module.get_submodule(block.name)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        return Slicer(self.structures[block.index], self._plan_of(block), shapes)

    def outer(self) -> list[Piece]:
        """What lies outside the blocks, under the names it has in the smaller model."""
        return outer_pieces(self._streamed, self._form)

    def shard(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors without what was removed, under the names they have in the smaller model."""
        written = block_tensors(self._streamed, self._slicer(block), self._form, block.index, tensors)
        for each in self.structures[block.index]:
            added = self.biases.get(each.consumer.full_name)
            if added is not None:
                written[self._form.names[f"{each.consumer.full_name}.bias"]] = added
        return written

    def keep(self, block: Block) -> None:
        """Put aside those of the block's tensors that are not as they were."""
        source, names = self._streamed, self._form.names
        assert isinstance(source, MemoryModel)
        before = {names[name]: name for name in source.block_parameters(block.index) if name in names}
        for name, tensor in self.shard(block, source.stored[block.index]).items():
            if not source.reader.unchanged(before.get(name, ""), tensor):
                self.aside[name] = tensor

    def install(self, model: PreTrainedModel) -> None:
        """Make the model in memory the smaller one."""
        install(model, self.walk.source.anatomy, self._form, self.aside)

    def files(self) -> dict[str, str] | None:
        """The config, the code it may need, and the plan."""
        plan = json.dumps(self.made_plan().to_json(self.structures)) + "\n"
        return {**self._form.texts, PLAN_NAME: plan}

    @property
    def _streamed(self) -> StreamedModel:
        assert isinstance(self.walk.source, StreamedModel)
        return self.walk.source

    @property
    def _form(self) -> Form:
        assert self.form is not None
        return self.form

    def noted(self, block: Block) -> dict[str, Any]:
        """The units that stay, and how many parameters of biases were added."""
        kept = {name: list(units) for name, units in self.kept[block.index].items()}
        return {"kept": kept, "added": self.added[block.index]}

    def skip(self, block: Block, noted: Mapping[str, Any]) -> None:
        """Remember what stays of the block."""
        self.kept[block.index] = {name: tuple(units) for name, units in noted["kept"].items()}
        self.added[block.index] = noted["added"]

    @torch.inference_mode()
    def take_up(self, block: Block, tensors: dict[str, Tensor], noted: Mapping[str, Any]) -> nn.Module:
        """The dense block with what was written of it, consumers without what is gone."""
        source, names = self._streamed, self._form.names
        module = source.load_block(block.index)
        if self.beside is not None:
            self.follow_all(block, module)
        stored = source.stored[block.index]
        self.skip(block, noted)
        slicer = self._slicer(block)
        for each in self.structures[block.index]:
            if 0 < len(self.kept[block.index][each.name]) < each.count:
                stored[source.key_of[f"{each.consumer.full_name}.weight"]].zero_()
        for name in source.block_parameters(block.index):
            local, full = name.removeprefix(f"{block.name}."), stored[source.key_of[name]]
            if slicer.lost(local):
                continue
            slicer.fill(local, full, tensors[names[name]])
            path, _, leaf = local.rpartition(".")
            live = getattr(module.get_submodule(path), leaf)
            live.detach().copy_(full)
        self._silence(block, module)
        for each in self.structures[block.index]:
            name, child = f"{each.consumer.full_name}.bias", module.get_submodule(each.name)
            if name in names and name not in source.key_of:
                self.biases[each.consumer.full_name] = tensors[names[name]]
                child.bias = nn.Parameter(tensors[names[name]].to(weight_of(child)), requires_grad=False)
        return module

    @property
    def removed(self) -> int:
        """Parameters of removed units, blocks and channels of the residual stream, less those of biases that were added."""
        return self.block_removed + self._removed_outside

    @property
    def _removed_outside(self) -> int:
        """How many of them were in no block."""
        gone = self._dense_total - self.walk.source.parameter_count
        return gone - (sum(self._dense_parameters) - sum(self._parameters))

    @property
    def block_removed(self) -> int:
        """How many of them were in blocks."""
        return self._removed_by(self.made_plan()) - sum(self.added.values()) - self._zeros

    def _removed_by(self, plan: Plan) -> int:
        """Parameters of blocks that a plan removes, and those that a narrower stream has taken already."""
        narrowed = sum(self._dense_parameters) - sum(self._parameters)
        return narrowed + plan.removed(self.structures, self._parameters)

    @property
    def channels(self) -> tuple[int, int] | None:
        """How many channels the residual stream had and has."""
        return None if self.narrowing is None else (self.narrowing.channels, self.narrowing.width)

    @property
    def _zeros(self) -> int:
        """Entries of biases that the smaller model's class has besides."""
        return sum(torch.Size(shape).numel() for zeros in self._form.zeros.values() for shape in zeros.values())

    def made_plan(self) -> Plan:
        """What stays of every block, known when the walk is over."""
        gone = {} if self.plan is None else {i: None for i, block in enumerate(self.plan.blocks) if block is None}
        blocks = tuple(gone.get(index, self.kept.get(index)) for index in range(len(self.structures)))
        return Plan(blocks, None if self.plan is None else self.plan.hidden)


def form_of(source: StreamedModel, structures: Structures, plan: Plan, shrinker: Shrinker) -> Form:
    """How what a plan leaves is saved; with a warning where all blocks were to be as wide and stock configs cannot say it.

    Raises `InputError` where the model cannot be saved in that shape.
    """
    biased = _biased(structures, plan, shrinker)
    form = choose_form(source, structures, plan, biased=[each.consumer.full_name for each in biased])
    if not form.stock and shrinker.budget.shape == "uniform":
        warnings.warn(
            f"{form.reason}: the folder brings code that loads it, for --trust-remote-code or prunekit.load",
            PrunekitWarning,
            stacklevel=2,
        )
    return form


def _biased(structures: Structures, plan: Plan, shrinker: Shrinker) -> list[Structure]:
    """Those whose consumers are given a bias, or another one, for what they lose."""
    if shrinker.compensate is None or not shrinker.compensate.part.shifts:
        return []
    return [each for index in plan.kept_blocks for each in structures[index] if len(plan.kept(each)) < each.count]
