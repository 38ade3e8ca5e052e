"""Sparsify a model block by block: measure, score, mask, and hand the pruned block's outputs to the next one.

The same code prunes a checkpoint that is streamed and a model that lies in memory. Per block the windows go through twice, once to
measure and once, pruned, for the next block's inputs; in dense mode the first pass is also the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import apply_mask, count_zeros, removed_part, row_chunks
from ..catalogue import find_method
from ..distributed import Ranks
from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear, weight_of
from ..model.hidden import HiddenStates, InMemory, Place, room_for
from ..model.source import StreamedModel, exchanged
from ..model.stream import Walk
from ..recipe import Pattern, Recipe
from ..statistics import Collector, Statistics
from .budget import Budget
from .folding import Place as Stored
from .folding import find_spaces, fold, in_module, permute_statistics
from .linear import Sparsifier

ERROR_TOKENS = 256  # inputs of the last window on which a linear's output error is measured


def parts_of(recipe: Recipe, anatomy: Anatomy) -> tuple[Sparsifier, Budget, dict[str, Pattern | None]]:
    """The recipe's method with its options bound, its budget, and the pattern of every linear before anything is measured.

    Raises `InputError`.
    """
    method = find_method(recipe.method)
    budget = Budget.of(method, recipe.parts.get("budget"))
    sparsifier = Sparsifier.of(method, recipe.parts, recipe.seed)
    if sparsifier.tune is not None and recipe.calibration.mode == "dense":
        raise InputError(
            f"tune '{sparsifier.tune.part.name}' goes from block to pruned block: leave out --set calibration.mode=dense"
        )
    return sparsifier, budget, budget.allot(anatomy, recipe.target)


def windows_needed(sparsifier: Sparsifier, budget: Budget, asked: int) -> int:
    """As many windows as asked; one where nothing looks at data, for the output errors and the reload check."""
    return asked if sparsifier.needs | budget.part.needs else 1


def resolved_parts(sparsifier: Sparsifier, budget: Budget, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A recipe's part options with the names and defaults that hold today filled in."""
    parts = sparsifier.resolved(recipe.parts)
    return {**parts, "budget": {**parts.get("budget", {}), **budget.resolved}}


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear.

    `output_error` is ‖X(W̃−W)‖_F / ‖XW‖_F over the last 256 tokens of the last window, X being what the linear was fed when it was
    measured; None where it was left dense. `seconds` is scoring, masking and that error. `permuted` says, where that was asked for,
    whether its inputs have a new order; those that nothing can hand over in another order (the residual stream) keep theirs.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    weights: int
    zeros: int
    output_error: float | None
    seconds: float
    permuted: bool | None = None

    @classmethod
    def of(cls, line: dict[str, Any]) -> LinearReport:
        """The report a line of the manifest or the journal was written from."""
        return cls(**{**line, "shape": tuple(line["shape"])})


@dataclass(frozen=True)
class Measured:
    """Of every linear of a block, by its name there: statistics, and inputs sampled for its output error, [tokens, in]."""

    statistics: dict[str, Statistics]
    samples: dict[str, Tensor]


@dataclass
class Seconds:
    """Where the time went. `start` is all before the walk; `write` is what the walk waited for: writing goes on meanwhile."""

    forward: float = 0.0
    prune: float = 0.0
    tune: float = 0.0
    write: float = 0.0
    read: float = 0.0
    verify: float = 0.0
    start: float = 0.0
    total: float = 0.0

    def timed(self, name: str) -> _Timer:
        """A context that adds its duration to field `name`."""
        return _Timer(self, name)


class _Timer:
    def __init__(self, seconds: Seconds, name: str) -> None:
        self._seconds = seconds
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        setattr(self._seconds, self._name, getattr(self._seconds, self._name) + spent)


@dataclass
class SparsifyWalk:
    """Prunes the blocks of `walk`'s model in order.

    Attributes:
        patterns: linear full name -> what to remove; None = leave dense.
        dense: take all statistics from the dense model.
        ranks: the processes that share the windows; each has those of its own `walk`, in the order of the ranks.
        first, total: number of the first of our windows, and how many there are in all.
        check: hidden states of the last batch of all, computed by the pruned model; what a reload is compared with. In dense mode
            they go along from the start; in sequential mode they are there after the last block. None in every process but the last.
    """

    walk: Walk
    sparsifier: Sparsifier
    patterns: dict[str, Pattern | None]
    dense: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    first: int = 0
    total: int | None = None
    seconds: Seconds = field(default_factory=Seconds)
    check: InMemory | None = field(init=False, default=None)

    @property
    def _checks(self) -> bool:
        return self.ranks.rank == self.ranks.size - 1

    def start(self, hidden: HiddenStates | None = None, *, keep: bool = True) -> None:
        """Run the model around its blocks; `walk.hidden` then holds the first block's inputs, unless `keep` is False."""
        with self.seconds.timed("forward"), self.ranks.together():
            self.walk.start(hidden, keep=keep)
        if self.dense and self._checks:
            self.check = self._last_batch(self.walk.hidden[self.walk.batches[-1]] if keep else None)

    def _last_batch(self, values: Tensor | None) -> InMemory:
        batch = self.walk.batches[-1]
        check = InMemory((batch.stop - batch.start, *self.walk.shape[1:]), self.walk.dtype, self.walk.source.device)
        if values is not None:
            check[:] = values
            check.turn()
        return check

    def states(self, folder: Path) -> list[tuple[HiddenStates, Place]]:
        """What has to be saved to go on from here, and where: `check` as if it were more windows behind the last."""
        own: list[tuple[HiddenStates, Place]] = [(self.walk.hidden, Place(folder, self.first))]
        if self.dense and self.check is not None:
            total = len(self.walk.windows) if self.total is None else self.total
            own.append((self.check, Place(folder, total)))
        return own

    def release(self) -> None:
        """Give the hidden states back; the walk is over."""
        if self.check is not None:
            self.check.close()
        self.walk.release()

    def prune_block(self, block: Block, module: nn.Module, stored: Stored) -> list[LinearReport]:
        """Measure and prune one block in place; `pass_on` then sends the windows through it.

        `stored(linear)` is weight and bias as the checkpoint holds them: they are what scores see and change along with the module's.
        """
        if self.sparsifier.tune is None:
            return self.prune_measured(block, module, stored, self.measure(block, module, self.sparsifier.needs))
        with ExitStack() as stack:
            walk = self.walk
            wanted = stack.enter_context(room_for(walk.shape, walk.dtype, walk.source.device))
            measured = self.measure(block, module, self.sparsifier.needs, outputs=wanted)
            dense = {linear.name: linear.matrix(stored(linear)[0]).clone() for linear in block.linears}
            reports = self.prune_measured(block, module, stored, measured)
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

        `outputs` is where the dense block's outputs are wanted.
        """
        collector = self._measure(block, module, needs, self.walk.hidden if self.dense else outputs)
        with self.seconds.timed("prune"):
            statistics = collector.statistics(self.ranks.sum_up)
        return Measured(statistics, {linear.name: collector.sample(linear.name) for linear in block.linears})

    @torch.inference_mode()
    def prune_measured(self, block: Block, module: nn.Module, stored: Stored, measured: Measured) -> list[LinearReport]:
        """Prune one block in place by what was measured of it, which is left as it is."""
        statistics, samples = dict(measured.statistics), dict(measured.samples)
        with self.seconds.timed("prune"):
            permuted = self._permute(block, module, stored, statistics, samples) if self.sparsifier.permute else None
            return [
                self._prune_linear(
                    linear,
                    module,
                    stored(linear)[0],
                    statistics[linear.name],
                    samples[linear.name],
                    None if permuted is None else linear.name in permuted,
                )
                for linear in block.linears
            ]

    def _permute(
        self,
        block: Block,
        module: nn.Module,
        stored: Stored,
        statistics: dict[str, Statistics],
        samples: dict[str, Tensor],
    ) -> set[str]:
        """Give linears of a K:G pattern the order of inputs in which most is retained, where producers can take it over.

        Returns the names of those that have a new order; what is known of them is put into it.
        """
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
        """Tune the block's kept weights on all windows; `wanted` are the dense block's outputs."""
        part, walk = self.sparsifier.tune, self.walk
        assert part is not None
        pruned = {f"{linear.name}.weight": linear for linear in block.linears if self.patterns[linear.full_name]}
        # gradients need tensors that were not made in inference mode
        with torch.inference_mode(False), torch.enable_grad():
            copies = {
                name: nn.Parameter(old.detach().clone(), name in pruned) for name, old in module.named_parameters()
            }
            weights = {name: (copies[name], copies[name].detach() != 0) for name in pruned}
            buffers = {name: old.clone() for name, old in module.named_buffers()}

            def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                for position, batch in enumerate(walk.batches):
                    inputs = walk.hidden[batch].clone()
                    outputs = walk.replay(block.index, module, position, inputs)
                    yield inputs, outputs, wanted[batch].to(outputs.device).clone()

            steps = max(self.ranks.gather(len(walk.batches)))
            with exchanged(module, {**copies, **buffers}):
                part(weights, batches, steps, self.ranks.sum_up)
        with torch.inference_mode():
            for name, linear in pruned.items():
                tuned, keep = weights[name]
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

    def _output_error(self, weight: Tensor, change: Callable[[slice], Tensor], sample: Tensor) -> float:
        mine = self.ranks.share_of(len(weight))
        squares = error_squares(weight, change, sample, mine)
        self.ranks.sum_up([squares])
        lost, whole = squares.sqrt().tolist()
        return float(lost / whole) if whole > 0 else 0.0

    @torch.inference_mode()
    def pass_on(self, index: int, module: nn.Module) -> None:
        """Send the windows through a pruned block to become the next block's inputs."""
        with self.seconds.timed("forward"), self.ranks.together():
            last = len(self.walk.batches) - 1
            if self.dense:
                if self.check is not None:
                    self.check[:] = self.walk.run_batch(index, module, last, self.check[:])
                    self.check.turn()
            elif index + 1 < len(self.walk.source.anatomy.blocks):
                self.walk.run(index, module)
            elif self._checks:  # no block waits for the others
                inputs = self.walk.hidden[self.walk.batches[last]]
                self.check = self._last_batch(self.walk.run_batch(index, module, last, inputs))

    @torch.inference_mode()
    def pass_on_dense(self, index: int, module: nn.Module) -> None:
        """Send the windows through a block that is still dense; in dense mode this gives the next block's inputs."""
        with self.seconds.timed("forward"), self.ranks.together():
            self.walk.run(index, module)

    @torch.inference_mode()
    def profile(self, budget: Budget, stored: Stored, step: Callable[[], None]) -> list[float]:
        """What a budget wants to know of every block of the dense model: a walk of its own, before the one that prunes."""
        walk, found = self.walk, []
        with room_for(walk.shape, walk.dtype, walk.source.device) as hidden:
            with self.seconds.timed("forward"), self.ranks.together():
                walk.start(hidden)
            for block in walk.source.anatomy.blocks:
                with self.seconds.timed("read"):
                    module = walk.source.load_block(block.index)
                walk.source.prefetch(block.index + 1)
                collector = self._measure(block, module, budget.part.needs, walk.hidden)
                with self.seconds.timed("prune"):
                    measured = collector.statistics(self.ranks.sum_up)
                    weights = [linear.matrix(stored(linear)[0]) for linear in block.linears]
                    stats = [measured[linear.name].to(torch.float32) for linear in block.linears]
                    found.append(budget.measure(weights, stats))
                walk.source.free_block(block.index)
                step()
            walk.release()
        walk.prepare()
        return found

    def _measure(
        self, block: Block, module: nn.Module, needs: frozenset[str], outputs: HiddenStates | None
    ) -> Collector:
        """Statistics of a block's linears, and its outputs where they are wanted, be it in the place of its inputs."""
        linears = {linear.name: module.get_submodule(linear.name) for linear in block.linears}
        collector = Collector(linears, needs, result_used=outputs is not None)
        last = len(self.walk.batches) - 1
        with self.seconds.timed("forward"), self.ranks.together(), collector:
            for position, batch in enumerate(self.walk.batches):
                collector.windows = batch.stop - batch.start
                collector.keep = self.walk.windows[batch].keep
                collector.sample_tokens = ERROR_TOKENS if position == last else 0
                output = self.walk.run_batch(block.index, module, position, self.walk.hidden[batch])
                collector.end_batch()
                if outputs is not None:
                    outputs[batch] = output
            if outputs is not None:
                outputs.turn()
        return collector


def stored_place(source: StreamedModel, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """A linear's weight and bias as the checkpoint holds them."""
    tensors = source.stored[linear.index]
    bias = source.key_of.get(f"{linear.full_name}.bias")
    return tensors[source.key_of[f"{linear.full_name}.weight"]], None if bias is None else tensors[bias]


def resident_place(model: nn.Module, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """A linear's weight and bias in a model that lies in memory."""
    module = model.get_submodule(linear.full_name)
    bias = module.bias
    return weight_of(module), bias.detach() if isinstance(bias, Tensor) else None


def error_squares(weight: Tensor, change: Callable[[slice], Tensor], inputs: Tensor, rows: slice) -> Tensor:
    """‖X(W−W̃)ᵀ‖²_F and ‖XWᵀ‖²_F over some rows of W, products in the model's dtype, sums in float64: [2].

    Shapes: weight [out, in], inputs [tokens, in]; `change(rows)` gives W−W̃, [rows, in].
    """
    norm_dtype = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for part in row_chunks(rows.stop - rows.start, weight.shape[1]):
        chunk = slice(rows.start + part.start, rows.start + part.stop)
        lost = torch.linalg.vector_norm(inputs @ change(chunk).t(), dtype=norm_dtype)
        whole = torch.linalg.vector_norm(inputs @ weight[chunk].t(), dtype=norm_dtype)
        squares += torch.stack([lost, whole]).double().square()
    return squares
