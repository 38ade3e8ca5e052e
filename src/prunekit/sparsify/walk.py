"""Sparsify a model block by block: measure, score, mask, and hand the pruned block's outputs to the next one.

The same code prunes a checkpoint that is streamed and a model that lies in memory. Per block the windows go through twice, once to
measure and once, pruned, for the next block's inputs; in dense mode the first pass is also the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import apply_mask, count_zeros, removed_part
from ..blockwalk import Appetite, BlockWalk, LinearReport, dense_blocks
from ..catalogue import find_method
from ..distributed import Ranks
from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear, Stored, in_module, weight_of
from ..model.hidden import HiddenStates
from ..model.stream import Walk
from ..recipe import Pattern, Recipe, refuse_choices
from ..statistics import Collector, Statistics
from .budget import Budget
from .folding import find_spaces, fold, permute_statistics
from .linear import Sparsifier

_CHUNKS = 32 << 20


@dataclass(frozen=True)
class Sparsification:
    """A recipe's method with its options bound, and what goes from each linear before anything is measured."""

    sparsifier: Sparsifier
    budget: Budget
    patterns: dict[str, Pattern | None]
    recipe: Recipe
    anatomy: Anatomy

    @classmethod
    def of(cls, recipe: Recipe, anatomy: Anatomy) -> Sparsification:
        """Raises `InputError` for what the method or its budget cannot do."""
        method = find_method(recipe.method)
        budget = Budget.of(method, recipe.parts.get("budget"))
        sparsifier = Sparsifier.of(method, recipe.parts, recipe.seed)
        refuse_choices(recipe)
        if sparsifier.tune is not None and recipe.calibration.mode == "dense":
            raise InputError(
                f"tune '{sparsifier.tune.part.name}' goes from block to pruned block: leave out --set calibration.mode=dense"
            )
        return cls(sparsifier, budget, budget.allot(anatomy, recipe.target), recipe, anatomy)

    @property
    def looks_at_data(self) -> bool:
        """Whether a part reads statistics or runs blocks."""
        return bool(self.sparsifier.needs | self.budget.part.needs) or self.sparsifier.tune is not None

    @property
    def resolved(self) -> dict[str, dict[str, Any]]:
        """The recipe's part options with the names and defaults that hold today filled in."""
        parts = self.sparsifier.resolved(self.recipe.parts)
        return {**parts, "budget": {**parts.get("budget", {}), **self.budget.resolved}}

    def appetite(self, windows: int, length: int) -> Appetite:
        """Sums of every linear's inputs, and what scoring and refitting a linear takes."""
        sparsifier, linears = self.sparsifier, list(self.anatomy.linears())
        largest = max(linear.count for linear in linears)
        gram = "gram" in sparsifier.needs
        sums = max(sum(linear.in_features**2 * 4 for linear in block.linears) for block in self.anatomy.blocks)
        choosing = largest + _CHUNKS  # a mask, and chunks of weights in float32, scores, and what they are made of
        by_rows = all(bound.part.rowwise for bound in sparsifier.parts if bound is not sparsifier.tune)
        if not by_rows or sparsifier.group == "layer":
            choosing += 3 * largest * 4  # the same of a whole linear
        if gram:
            choosing += 4 * largest * 4 + 3 * max(linear.in_features for linear in linears) ** 2 * 4
        follows = sparsifier.tunes_to_dense
        tunes = sparsifier.tune is not None
        return Appetite(sums if gram else 0, choosing, tunes, tunes and not follows, streams=2 if follows else 1)

    def work(
        self, walk: Walk, *, dense: bool, ranks: Ranks | None = None, first: int = 0, total: int | None = None
    ) -> SparsifyWalk:
        """What zeroes weights of the blocks of `walk`'s model."""
        return SparsifyWalk(
            walk,
            self.sparsifier,
            self.patterns,
            self.budget,
            self.recipe.target,
            dense=dense,
            ranks=Ranks() if ranks is None else ranks,
            first=first,
            total=total,
        )


@dataclass(frozen=True)
class Measured:
    """Of every linear of a block, by its name there: statistics, and inputs sampled for its output error, [tokens, in]."""

    statistics: dict[str, Statistics]
    samples: dict[str, Tensor]


@dataclass
class SparsifyWalk(BlockWalk):
    """Zeroes weights of the blocks of `walk`'s model in order.

    Attributes:
        patterns: linear full name -> what to remove; None = leave dense.
    """

    sparsifier: Sparsifier
    patterns: dict[str, Pattern | None]
    budget: Budget
    target: Pattern

    @property
    def follows(self) -> bool:
        """Whether tuning aims at what the dense model computes."""
        return self.sparsifier.tunes_to_dense

    def prune_block(self, block: Block, module: nn.Module, stored: Stored) -> list[LinearReport]:
        """Measure and prune one block in place; `pass_on` then sends the windows through it.

        `stored(linear)` is weight and bias as the checkpoint holds them: they are what scores see and change along with the module's.
        """
        if self.sparsifier.tune is None:
            return self.prune_measured(block, module, stored, self.measure(block, module, self.sparsifier.needs))
        with ExitStack() as stack:
            wanted = self.beside
            if wanted is None:
                wanted = stack.enter_context(self.walk.room())
            measured = self.measure(block, module, self.sparsifier.needs, outputs=None if self.follows else wanted)
            measured, permuted = self._put_in_order(block, module, stored, measured)
            dense = {linear.name: linear.matrix(stored(linear)[0]).clone() for linear in block.linears}
            reports = self._prune_linears(block, module, stored, measured, permuted)
            with self.seconds.timed("tune"):
                self._tune(block, module, stored, wanted)
            return [
                self._reported_again(report, linear, module, stored, dense[linear.name], measured.samples[linear.name])
                for report, linear in zip(reports, block.linears, strict=True)
            ]

    @torch.inference_mode()
    def measure(
        self, block: Block, module: nn.Module, needs: frozenset[str], outputs: HiddenStates | None = None
    ) -> Measured:
        """What the linears of a block are fed, over all windows; in dense mode the windows go on to the next block.

        `outputs` is where the whole block's outputs are wanted.
        """
        collector = self._measure(block, module, needs, self.walk.hidden if self.dense else outputs)
        with self.seconds.timed("prune"):
            statistics = collector.statistics(self.ranks.sum_up)
        return Measured(statistics, {linear.name: collector.sample(linear.name) for linear in block.linears})

    @torch.inference_mode()
    def prune_measured(self, block: Block, module: nn.Module, stored: Stored, measured: Measured) -> list[LinearReport]:
        """Prune one block in place by what was measured of it, which is left as it is."""
        return self._prune_linears(block, module, stored, *self._put_in_order(block, module, stored, measured))

    @torch.inference_mode()
    def _prune_linears(
        self, block: Block, module: nn.Module, stored: Stored, measured: Measured, permuted: set[str] | None
    ) -> list[LinearReport]:
        with self.seconds.timed("prune"):
            return [
                self._prune_linear(
                    linear,
                    module,
                    stored(linear)[0],
                    measured.statistics[linear.name],
                    measured.samples[linear.name],
                    None if permuted is None else linear.name in permuted,
                )
                for linear in block.linears
            ]

    @torch.inference_mode()
    def _put_in_order(
        self, block: Block, module: nn.Module, stored: Stored, measured: Measured
    ) -> tuple[Measured, set[str] | None]:
        """Give linears of a K:G pattern the order of inputs in which most is retained, where producers can take it over.

        Returns what was measured in the new order, and the names of the linears that have one; None where none was asked for.
        """
        if not self.sparsifier.permute:
            return measured, None
        with self.seconds.timed("prune"):
            statistics, samples = dict(measured.statistics), dict(measured.samples)
            moved = self._permute(block, module, stored, statistics, samples)
        return Measured(statistics, samples), moved

    def _permute(
        self,
        block: Block,
        module: nn.Module,
        stored: Stored,
        statistics: dict[str, Statistics],
        samples: dict[str, Tensor],
    ) -> set[str]:
        """Put linears, statistics and samples into their new order; returns the names of the linears."""
        moved: set[str] = set()
        for space in find_spaces(block, module, partial(self.walk.run_probe, block.index)):
            consumer = space.consumer
            pattern = self.patterns[consumer.full_name]
            if pattern is None or pattern.keep is None or pattern.group is None or not space.fits(pattern.group):
                continue
            matrix = consumer.matrix(stored(consumer)[0])
            scores = self.sparsifier.importance(matrix, statistics[consumer.name], consumer.full_name)
            # one process decides: another processor might round otherwise and end in another order
            order = self.ranks.share(partial(space.order, scores, pattern.keep, pattern.group))
            fold(space, order, in_module(module), stored)
            permute_statistics(space, order, statistics)
            samples[consumer.name] = samples[consumer.name][
                :, space.input_order(order).to(samples[consumer.name].device)
            ]
            moved.add(consumer.name)
        return moved

    def _tune(self, block: Block, module: nn.Module, stored: Stored, wanted: HiddenStates) -> None:
        """Tune the block's kept weights on all windows, towards `wanted` outputs."""
        part = self.sparsifier.tune
        assert part is not None
        pruned = {f"{linear.name}.weight": linear for linear in block.linears if self.patterns[linear.full_name]}
        if not pruned:
            return
        with torch.inference_mode():
            for name, (tuned, keep) in self._descend(part, block, module, pruned, wanted).items():
                linear = pruned[name]
                weight = stored(linear)[0]
                weight.copy_(tuned)
                apply_mask(linear.matrix(weight), linear.matrix(keep).to(weight.device))
                weight_of(module.get_submodule(linear.name)).copy_(weight)

    def _reported_again(
        self, report: LinearReport, linear: Linear, module: nn.Module, stored: Stored, dense: Tensor, sample: Tensor
    ) -> LinearReport:
        """A linear's report with the zeros and the output error it has now."""
        if report.pattern is None:
            return report
        live = linear.matrix(weight_of(module.get_submodule(linear.name)))
        dense = dense.to(live)
        error = self._output_error(dense, lambda rows: dense[rows] - live[rows], self.ranks.from_last(sample))
        zeros = count_zeros(linear.matrix(stored(linear)[0]))
        return replace(report, zeros=zeros, output_error=error)

    def _prune_linear(
        self,
        linear: Linear,
        module: nn.Module,
        stored: Tensor,
        statistics: Statistics,
        sample: Tensor,
        permuted: bool | None,
    ) -> LinearReport:
        begun = time.perf_counter()
        pattern = self.patterns[linear.full_name]
        weight = linear.matrix(stored)
        error = None
        if pattern is not None:
            mine = self.ranks.share_of(linear.out_features)
            with self.ranks.together():
                pruned = self.sparsifier.prune(weight, statistics, pattern, linear.full_name, mine)
            keep = self.ranks.gather_rows(pruned.keep, linear.out_features)
            live = linear.matrix(weight_of(module.get_submodule(linear.name)))
            sample = self.ranks.from_last(sample)
            if pruned.weight is None:
                error = self._output_error(live, lambda rows: removed_part(live[rows], keep[rows]), sample)
                apply_mask(weight, keep.to(weight.device))
                if live.data_ptr() != weight.data_ptr():
                    apply_mask(live, keep)
            else:
                new = self.ranks.gather_rows(pruned.weight.to(weight.dtype), linear.out_features).to(weight.device)
                apply_mask(new, keep.to(weight.device))
                error = self._output_error(live, lambda rows: live[rows] - new[rows].to(live), sample)
                weight.copy_(new)
                live.copy_(new)
        return LinearReport(
            name=linear.full_name,
            shape=(linear.out_features, linear.in_features),
            pattern=None if pattern is None else str(pattern),
            weights=linear.count,
            zeros=count_zeros(weight),
            output_error=error,
            seconds=time.perf_counter() - begun,
            permuted=permuted,
        )

    @property
    def looks_ahead(self) -> str:
        """The budget's name, where it measures."""
        return self.budget.part.name if self.budget.part.measure is not None else ""

    @property
    def steps_ahead(self) -> int:
        """One walk through the dense model."""
        return len(self.walk.source.anatomy.blocks) if self.looks_ahead else 0

    def look_ahead(self, known: Any, stored: Stored, step: Callable[[], None]) -> Any:
        """What the budget wants to know of every block of the dense model, and the patterns that come of it."""
        if not self.looks_ahead:
            return None
        profile: list[float] = self._profile(stored, step) if known is None else known
        self.patterns = self.budget.allot(self.walk.source.anatomy, self.target, profile)
        return profile

    @torch.inference_mode()
    def _profile(self, stored: Stored, step: Callable[[], None]) -> list[float]:
        """What a budget wants to know of every block of the dense model."""
        found = []
        for block, module in dense_blocks(self.walk, self.ranks, self.seconds, step):
            collector = self._measure(block, module, self.budget.part.needs, self.walk.hidden)
            with self.seconds.timed("prune"):
                measured = collector.statistics(self.ranks.sum_up)
                weights = [linear.matrix(stored(linear)[0]) for linear in block.linears]
                stats = [measured[linear.name].to(torch.float32) for linear in block.linears]
                found.append(self.budget.measure(weights, stats))
        return found

    def _measure(
        self, block: Block, module: nn.Module, needs: frozenset[str], outputs: HiddenStates | None
    ) -> Collector:
        """Statistics of a block's linears, and its outputs where they are wanted, be it in the place of its inputs."""
        linears = {linear.name: module.get_submodule(linear.name) for linear in block.linears}
        return self._collect(block, module, linears, needs, outputs, follow=self.beside is not None)
