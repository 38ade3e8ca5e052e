"""Sparsify a model block by block: measure, score, mask, and hand the pruned block's outputs to the next one.

The same code prunes a checkpoint that is streamed and a model that lies in memory. Per block the windows go through twice, once to
measure and once, pruned, for the next block's inputs; in dense mode the first pass is also the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import apply_mask, count_zeros, removed_part
from ..catalogue import find_method
from ..model.anatomy import Anatomy, Block, Linear, weight_of
from ..model.stream import Walk
from ..recipe import Pattern, Recipe
from ..statistics import Collector
from .budget import allot
from .linear import Sparsifier

ERROR_TOKENS = 256  # inputs of the last window on which a linear's output error is measured


def parts_of(recipe: Recipe, anatomy: Anatomy) -> tuple[Sparsifier, dict[str, Pattern | None]]:
    """The recipe's method with its options bound, and the pattern of every linear. Raises `InputError`."""
    method = find_method(recipe.method)
    patterns = allot(anatomy, recipe.target, part=method.budget, options=recipe.parts.get("budget"))
    return Sparsifier.of(method, recipe.parts), patterns


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear.

    `output_error` is ‖X(W̃−W)‖_F / ‖XW‖_F over the last 256 tokens of the last window, X being what the linear was fed when it was
    measured; None where it was left dense. `seconds` is scoring, masking and that error.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    weights: int
    zeros: int
    output_error: float | None
    seconds: float

    @classmethod
    def of(cls, line: dict[str, Any]) -> LinearReport:
        """The report a line of the manifest or the journal was written from."""
        return cls(**{**line, "shape": tuple(line["shape"])})


@dataclass
class Seconds:
    """Where the time went."""

    forward: float = 0.0
    prune: float = 0.0
    write: float = 0.0
    read: float = 0.0
    verify: float = 0.0
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
        check: hidden states of the last batch, computed by the pruned model; what a reload is compared with.
    """

    walk: Walk
    sparsifier: Sparsifier
    patterns: dict[str, Pattern | None]
    dense: bool = False
    seconds: Seconds = field(default_factory=Seconds)
    check: Tensor = field(init=False)

    def start(self) -> None:
        """Run the model around its blocks; `walk.hidden` then holds the first block's inputs."""
        with self.seconds.timed("forward"):
            self.walk.start()
        self.check = self.walk.hidden[self.walk.batches[-1]]
        if self.dense:
            self.check = self.check.clone()

    def release(self) -> None:
        """Give the hidden states back; the walk is over."""
        del self.check  # in sequential mode a view that would keep all of them
        self.walk.release()

    @torch.inference_mode()
    def prune_block(self, block: Block, module: nn.Module, stored: Callable[[Linear], Tensor]) -> list[LinearReport]:
        """Measure and prune one block in place, and send the windows on.

        `stored(linear)` is the weight as the checkpoint holds it: it is what scores see and is zeroed along with the module's.
        """
        collector = self._measure(block, module)
        reports = []
        with self.seconds.timed("prune"):
            statistics = collector.statistics()
            for linear in block.linears:
                begun = time.perf_counter()
                pattern = self.patterns[linear.full_name]
                weight = linear.matrix(stored(linear))
                error = None
                if pattern is not None:
                    keep = self.sparsifier.keep_mask(weight, statistics[linear.name], pattern, linear.full_name)
                    live = linear.matrix(weight_of(module.get_submodule(linear.name)))
                    live_keep = keep.to(live.device)
                    error = _output_error(live, live_keep, collector.sample(linear.name))
                    apply_mask(weight, keep)
                    if live.data_ptr() != weight.data_ptr():
                        apply_mask(live, live_keep)
                reports.append(
                    LinearReport(
                        name=linear.full_name,
                        shape=(linear.out_features, linear.in_features),
                        pattern=None if pattern is None else str(pattern),
                        weights=linear.count,
                        zeros=count_zeros(weight),
                        output_error=error,
                        seconds=time.perf_counter() - begun,
                    )
                )
        self.pass_on(block.index, module)
        return reports

    @torch.inference_mode()
    def pass_on(self, index: int, module: nn.Module) -> None:
        """Send the windows through a pruned block to become the next block's inputs."""
        with self.seconds.timed("forward"):
            last = len(self.walk.batches) - 1
            if self.dense:
                self.check = self.walk.run_batch(index, module, last, self.check).to(self.check.device)
            elif index + 1 == len(self.walk.source.anatomy.blocks):  # no block waits for these but the check does
                self.check.copy_(self.walk.run_batch(index, module, last, self.check))
            else:
                self.walk.run(index, module)

    @torch.inference_mode()
    def pass_on_dense(self, index: int, module: nn.Module) -> None:
        """Send the windows through a block that is still dense; in dense mode this gives the next block's inputs."""
        with self.seconds.timed("forward"):
            self.walk.run(index, module)

    def _measure(self, block: Block, module: nn.Module) -> Collector:
        linears = {linear.name: module.get_submodule(linear.name) for linear in block.linears}
        collector = Collector(linears, self.sparsifier.needs)
        last = len(self.walk.batches) - 1
        with self.seconds.timed("forward"), collector:
            for position, batch in enumerate(self.walk.batches):
                collector.windows = batch.stop - batch.start
                collector.keep = self.walk.windows[batch].keep
                collector.sample_tokens = ERROR_TOKENS if position == last else 0
                output = self.walk.run_batch(block.index, module, position, self.walk.hidden[batch])
                collector.end_batch()
                if self.dense:
                    self.walk.hidden[batch] = output.to(self.walk.hidden.device)
        return collector


def _output_error(weight: Tensor, keep: Tensor, inputs: Tensor) -> float:
    """‖X(W̃−W)ᵀ‖_F / ‖XWᵀ‖_F, products in the model's dtype; 0 where there was nothing to lose.

    Shapes: weight and keep [out, in], inputs [tokens, in].
    """
    norm_dtype = torch.promote_types(weight.dtype, torch.float32)
    lost = torch.linalg.vector_norm(inputs @ removed_part(weight, keep).t(), dtype=norm_dtype)
    whole = torch.linalg.vector_norm(inputs @ weight.t(), dtype=norm_dtype)
    return float(lost / whole) if float(whole) > 0 else 0.0
