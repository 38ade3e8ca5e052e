"""What pruning a model block by block has in common, whatever is done to a block.

The windows go through the model once; per block they are measured, the block is changed by whoever derives from `BlockWalk`, and they
go on through the changed block. What the last batch comes to behind the last block is what a reload is compared with.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .binding import Bound
from .bits import row_chunks
from .checkpoint.shard import Piece
from .checkpoint.writer import MODELING_NAME
from .distributed import Ranks
from .machine import return_memory
from .model.anatomy import Block, Stored
from .model.hidden import HiddenStates, InMemory, Place
from .model.modules import exchanged
from .model.resizing import SHAPES
from .model.source import Source, StreamedModel, resizing_code
from .model.stream import Walk
from .progress import Step
from .statistics import Collector, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# activations a block holds at a time, in vectors a token: of the widest linear's width, and of the hidden states' width
_WIDE, _NARROW = 4, 8
ERROR_TOKENS = 256  # inputs of the last window on which a linear's output error is measured


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear.

    `output_error` is ‖X(W̃−W)‖_F / ‖XW‖_F over the last 256 tokens of the last window, X being what the linear was fed when it was
    measured; None where it was left dense. `seconds` is scoring, masking and that error. `permuted` says, where that was asked for,
    whether its inputs have a new order; those that nothing can hand over in another order (the residual stream) keep theirs.
    `name` is its name in the dense model; `shape` and `weights` are those of what is stored, 0 where its sublayer is gone;
    `removed` weights went with structures.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    weights: int
    zeros: int
    output_error: float | None
    seconds: float
    permuted: bool | None = None
    removed: int = 0

    @classmethod
    def of(cls, line: dict[str, Any]) -> LinearReport:
        """The report a line of the manifest or the journal was written from."""
        return cls(**{**line, "shape": tuple(line["shape"])})


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


@dataclass(frozen=True)
class Appetite:
    """Bytes a method takes besides blocks, hidden states and activations.

    Attributes:
        sums: of a block's statistics, at most.
        written: bytes of the model that is written beyond those of the one that is read; negative where it has less.
        choosing: while it works on a linear.
        tunes: whether it runs blocks with gradients.
        targets: whether it does so towards the outputs of whole blocks for what pruned ones are fed, which it then keeps besides.
        ahead: all told, while gradients of the dense model are measured before the first block is changed.
        filed: of files for the time being.
        streams: how many hidden states every window has: two where the dense model is followed beside the pruned one.
    """

    sums: int
    choosing: int
    tunes: bool = False
    targets: bool = False
    written: int = 0
    ahead: int = 0
    filed: int = 0
    streams: int = 1


@dataclass(frozen=True)
class Rehearsal:
    """What can be said of a run before it looks at any data.

    Attributes:
        removed: how many parameters of blocks go with structures, as nearly as that is known.
        passes: what `look_ahead` takes, in forward passes of all windows through all blocks.
        outside: how many parameters go that are in no block.
        tried: the place among `blocks` of the first that is changed.
        tuned: how many of them are tuned, where they are at all.
    """

    removed: int
    passes: float
    outside: int = 0
    tried: int = 0
    tuned: int = 0


class Job(Protocol):
    """A recipe's method bound to a model: what a run does to its blocks."""

    @property
    def looks_at_data(self) -> bool:
        """Whether anything depends on the calibration tokens; else one window does, for output errors and the reload check."""

    @property
    def resolved(self) -> dict[str, dict[str, Any]]:
        """The recipe's part options with the names and defaults that hold today filled in."""

    def appetite(self, windows: int, length: int) -> Appetite:
        """What it takes of memory, on so many windows of that many tokens."""

    def work(self, walk: Walk, *, dense: bool, ranks: Ranks, first: int, total: int | None) -> BlockWalk:
        """What changes the blocks of `walk`'s model."""


@dataclass
class BlockWalk(ABC):
    """Changes the blocks of `walk`'s model in order.

    Attributes:
        dense: take all statistics from the dense model.
        ranks: the processes that share the windows; each has those of its own `walk`, in the order of the ranks.
        first, total: number of the first of our windows, and how many there are in all.
        check: hidden states of the last batch of all, computed by the pruned model; what a reload is compared with. In dense mode
            they go along from the start; in sequential mode they are there after the last block. None in every process but the last.
        scratch: the folder in which `look_ahead` may keep what it has found so far, until the run is done.
        beside: hidden states of the dense model, where something aims at what that computes.
    """

    walk: Walk
    dense: bool = field(default=False, kw_only=True)
    ranks: Ranks = field(default_factory=Ranks, kw_only=True)
    first: int = field(default=0, kw_only=True)
    total: int | None = field(default=None, kw_only=True)
    seconds: Seconds = field(default_factory=Seconds, kw_only=True)
    check: InMemory | None = field(init=False, default=None)
    scratch: Path | None = field(init=False, default=None)
    beside: HiddenStates | None = field(init=False, default=None)

    @property
    def follows(self) -> bool:
        """Whether something aims at what the dense model computes, whose hidden states then go beside ours."""
        return False

    def prepare(self) -> None:
        """Have everything refused that can be refused before the output folder exists. Raises `InputError`."""
        self.walk.prepare()

    @property
    def told(self) -> dict[str, Any]:
        """What the manifest says besides what it says of every run."""
        return {}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that stay, in order."""
        return self.walk.source.anatomy.blocks

    @abstractmethod
    def prune_block(self, block: Block, module: nn.Module, stored: Stored) -> list[LinearReport]:
        """Measure and change one block in place; `pass_on` then sends the windows through it.

        `stored(linear)` is weight and bias as the checkpoint holds them: they are what methods see and change along with the module's.
        """

    def look_ahead(self, known: Any, stored: Stored, step: Step) -> Any:
        """What has to be known of the whole model before its first block is changed, as JSON for the journal: None for nothing.

        It may take a walk of its own; `known` is what an interrupted run found, or None. `walk` is prepared, and is so again behind it.
        """
        return None

    @property
    def looks_ahead(self) -> str:
        """The name of the part that wants `look_ahead`; empty where none does."""
        return ""

    @property
    def steps_ahead(self) -> int:
        """How often `look_ahead` calls its `step`: for a block the windows go through, there and back, or for what is tried."""
        return 0

    def rehearse(self) -> Rehearsal:
        """Stand in for `look_ahead` with made-up findings, so that one of `blocks` can be tried as a run would change it."""
        blocks = len(self.walk.source.anatomy.blocks)
        return Rehearsal(0, self.steps_ahead / blocks, tuned=blocks)

    def shard(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is written of a block, by the names it is stored under; `tensors` are the checkpoint's, changed by `prune_block`."""
        return dict(tensors)

    def keep(self, block: Block) -> None:
        """Of a model in memory that is not changed in place: put aside what became of a block, for `install`."""
        return

    def install(self, model: PreTrainedModel) -> None:
        """Give a model in memory what was put aside, when the walk is over."""
        return

    def noted(self, block: Block) -> dict[str, Any]:
        """What the journal keeps of a block that was changed, for `take_up`."""
        return {}

    def skip(self, block: Block, noted: Mapping[str, Any]) -> None:
        """A block that an earlier run finished and that nothing passes through any more."""
        return

    def take_up(self, block: Block, tensors: dict[str, Tensor], noted: Mapping[str, Any]) -> nn.Module:
        """The block as an earlier run left it, from what that wrote; its module computes what the written tensors do."""
        source = self.walk.source
        assert isinstance(source, StreamedModel)
        if self.beside is not None:
            self.follow_all(block, source.load_block(block.index))
            source.free_block(block.index)
        return source.load_block(block.index, tensors)

    @property
    def removed(self) -> int:
        """How many parameters the model has fewer; known when the walk is over."""
        return 0

    @property
    def block_removed(self) -> int:
        """How many of them were in blocks."""
        return self.removed

    @property
    def channels(self) -> tuple[int, int] | None:
        """How many channels the residual stream had and has between blocks; None where nothing was done to it."""
        return None

    def outer(self) -> list[Piece]:
        """What is written of what lies outside the blocks."""
        source = self.walk.source
        assert isinstance(source, StreamedModel)
        return [Piece.stored(key, source.reader) for key in source.outer_keys()]

    def files(self) -> dict[str, str] | None:
        """Texts of files that are written in the place of the checkpoint's, such as a config.json that is another; None for none."""
        source = self.walk.source
        assert isinstance(source, StreamedModel)
        # of code that loads blocks of different widths we write our own
        return {MODELING_NAME: resizing_code(source.module)} if SHAPES in source.reader.config else None

    @property
    def _checks(self) -> bool:
        return self.ranks.rank == self.ranks.size - 1

    def start(self, hidden: HiddenStates | None = None, *, keep: bool = True) -> None:
        """Run the model around its blocks; `walk.hidden` then holds the first block's inputs, unless `keep` is False."""
        with self.seconds.timed("forward"), self.ranks.together():
            self.walk.start(hidden, keep=keep, enter=self.enter)
        if self.dense and self._checks:
            self.check = self._last_batch(self.walk.hidden[self.walk.batches[-1]] if keep else None)
        if not self.follows:
            return
        self.beside = self.walk.hidden.beside(self._behind)
        if keep:  # the dense model's first hidden states are the same as ours
            for batch in self.walk.batches:
                self.beside[batch] = self.walk.hidden[batch]
            self.beside.turn()

    def follow(self, block: Block, module: nn.Module, position: int) -> None:
        """Send a batch of the dense model's hidden states through a block that is still whole."""
        assert self.beside is not None
        batch = self.walk.batches[position]
        self.beside[batch] = self.walk.run_batch(block.index, module, position, self.beside[batch])

    @torch.inference_mode()
    def follow_all(self, block: Block, module: nn.Module) -> None:
        """Send all of them through it."""
        assert self.beside is not None
        with self.seconds.timed("forward"):
            for position in range(len(self.walk.batches)):
                self.follow(block, module, position)
            self.beside.turn()

    @property
    def _behind(self) -> int:
        """In files the dense model's windows lie behind all of ours."""
        return self.first + self._windows

    @property
    def _windows(self) -> int:
        return len(self.walk.windows) if self.total is None else self.total

    def enter(self, hidden: Tensor) -> Tensor:
        """What the first block is given in the place of the model's own first hidden states [windows, length, hidden]."""
        return hidden

    def _last_batch(self, values: Tensor | None) -> InMemory:
        batch = self.walk.batches[-1]
        check = InMemory((batch.stop - batch.start, *self.walk.shape[1:]), self.walk.dtype, self.walk.source.device)
        if values is not None:
            check[:] = values
            check.turn()
        return check

    def states(self, folder: Path) -> list[tuple[HiddenStates, Place]]:
        """What has to be saved to go on from here, and where: all but our own as if they were more windows behind the last."""
        own: list[tuple[HiddenStates, Place]] = [(self.walk.hidden, Place(folder, self.first))]
        if self.dense and self.check is not None:
            own.append((self.check, Place(folder, self._windows)))
        if self.beside is not None:
            own.append((self.beside, Place(folder, self._behind)))
        return own

    @property
    def measures_in_place(self) -> bool:
        """Whether measuring a block overwrites hidden states, which then have to be saved by that time: the dense model's."""
        return self.dense or self.follows

    @property
    def hidden_bytes(self) -> int:
        """What the hidden states of our windows take, all of them; those of the dense model too where it is followed."""
        return self.walk.hidden_bytes * (2 if self.follows else 1)

    def release(self) -> None:
        """Give the hidden states back; the walk is over."""
        for states in (self.check, self.beside):
            if states is not None:
                states.close()
        self.walk.release()

    @torch.inference_mode()
    def pass_on(self, index: int, module: nn.Module) -> None:
        """Send the windows through a pruned block to become the next block's inputs."""
        with self.seconds.timed("forward"), self.ranks.together():
            last = len(self.walk.batches) - 1
            if self.dense:
                if self.check is not None:
                    self.check[:] = self.walk.run_batch(index, module, last, self.check[:])
                    self.check.turn()
            elif index != self.blocks[-1].index:
                self.walk.run(index, module)
            elif self._checks:  # no block waits for the others
                inputs = self.walk.hidden[self.walk.batches[last]]
                self.check = self._last_batch(self.walk.run_batch(index, module, last, inputs))

    @torch.inference_mode()
    def pass_on_dense(self, index: int, module: nn.Module) -> None:
        """Send the windows through a block that is still dense; in dense mode this gives the next block's inputs."""
        with self.seconds.timed("forward"), self.ranks.together():
            self.walk.run(index, module)

    def _output_error(self, weight: Tensor, change: Callable[[slice], Tensor], sample: Tensor) -> float:
        mine = self.ranks.share_of(len(weight))
        squares = error_squares(weight, change, sample, mine)
        self.ranks.sum_up([squares])
        lost, whole = squares.sqrt().tolist()
        return float(lost / whole) if whole > 0 else 0.0

    def _descend(
        self, tune: Bound, block: Block, module: nn.Module, names: Collection[str], wanted: HiddenStates
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameters of a block, and which entries of them are not zero, tuned on all windows towards `wanted` outputs.

        The module itself is left as it is.
        """
        walk = self.walk
        # gradients need tensors that were not made in inference mode
        with torch.inference_mode(False), torch.enable_grad():
            copies = {
                name: nn.Parameter(old.detach().clone(), name in names) for name, old in module.named_parameters()
            }
            weights = {name: (copies[name], copies[name].detach() != 0) for name in names}
            buffers = {name: old.clone() for name, old in module.named_buffers()}

            def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                for position, batch in enumerate(walk.batches):
                    inputs = walk.hidden[batch].clone()
                    outputs = walk.replay(block.index, module, position, inputs)
                    aims = wanted[batch].to(outputs.device).clone()
                    keep = walk.windows[batch].keep
                    real = ... if keep is None else keep.to(outputs.device)  # nothing is wanted of padding
                    yield inputs[real], outputs[real], aims[real]

            steps = max(self.ranks.gather(len(walk.batches)))
            with exchanged(module, {**copies, **buffers}):
                tune(weights, batches, steps, self.ranks.sum_up)
        return {name: (tuned.detach(), keep) for name, (tuned, keep) in weights.items()}

    def _collect(
        self,
        block: Block,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        needs: frozenset[str],
        outputs: HiddenStates | None,
        watched: Mapping[str, Watch] | None = None,
        follow: bool = False,
    ) -> Collector:
        """Statistics of some of a block's linears, and its outputs where they are wanted, be it in the place of its inputs.

        `watched` are more modules, with sums of their own. Where we `follow` the dense model each of its batches goes through the block
        first; what linears give then is the target of what they are fed by ours.
        """
        used = outputs is not None or follow
        collector = Collector(linears, needs, result_used=used, watched=watched)
        last = len(self.walk.batches) - 1
        with self.seconds.timed("forward"), self.ranks.together(), collector:
            for position, batch in enumerate(self.walk.batches):
                if follow:
                    with collector.following():
                        self.follow(block, module, position)
                if not needs and outputs is None and position < last:
                    continue  # of ours nothing is wanted but the sample
                collector.windows = batch.stop - batch.start
                collector.keep = self.walk.windows[batch].keep
                collector.sample_tokens = ERROR_TOKENS if position == last else 0
                output = self.walk.run_batch(block.index, module, position, self.walk.hidden[batch])
                collector.end_batch()
                if outputs is not None:
                    outputs[batch] = output
            if outputs is not None:
                outputs.turn()
            if follow:
                assert self.beside is not None
                self.beside.turn()
        return collector


@torch.inference_mode()
def dense_blocks(
    walk: Walk, ranks: Ranks, seconds: Seconds, step: Callable[[], None], without: Collection[int] = ()
) -> Iterator[tuple[Block, nn.Module]]:
    """The blocks of `walk`'s model that are not in `without`, in memory one at a time: a walk of its own, ahead of the one that prunes.

    `walk.hidden` holds the inputs of the block that is given, and has to hold its outputs when the next one is asked for. `step` is
    called behind every block; `walk` is prepared again at the end.
    """
    with walk.room() as hidden:
        with seconds.timed("forward"), ranks.together():
            walk.start(hidden)
        for block in walk.source.anatomy.blocks:
            if block.index in without:
                continue
            with seconds.timed("read"):
                module = walk.source.load_block(block.index)
            walk.source.prefetch(block.index + 1)
            yield block, module
            walk.source.free_block(block.index)
            return_memory()
            step()
        walk.release()
    walk.prepare()


def activation_bytes(tokens: int, widest: int, width: int, dtype: torch.dtype) -> int:
    """What a block holds at a time of so many tokens; `widest` is the width of its widest linear, `width` that of hidden states."""
    return tokens * (_WIDE * widest + _NARROW * width) * dtype.itemsize


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


def block_parameters(source: Source) -> list[int]:
    """How many parameters each block has."""
    return [
        sum(parameter.numel() for parameter in source.module.get_submodule(block.name).parameters())
        for block in source.anatomy.blocks
    ]
