"""SliceGPT block by block: find the basis of the stream behind each branch, write the block in it, and go on through what was written.

The windows pass through the very tensors that are written, in the channels that are kept; what is beyond them is zero. What a branch
adds is seen in the model's own channels first, behind everything that is sliced before it; the basis of that goes into the branch's
writer and into its shortcut. The basis behind a block is what the next one begins with: it is saved beside the hidden states, as if it
were more windows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..binding import Bound, bind
from ..bits import count_zeros
from ..blockwalk import Appetite, BlockWalk, LinearReport, Rehearsal, block_parameters
from ..catalogue import Method, find_method
from ..checkpoint.shard import Piece
from ..checkpoint.writer import MODELING_NAME
from ..distributed import Ranks
from ..errors import InputError
from ..model.anatomy import Block, Linear, Stored, weight_of
from ..model.hidden import HiddenStates, InMemory, Place
from ..model.memory import bare_copy
from ..model.resizing import add_shortcuts, widened
from ..model.source import StreamedModel
from ..model.stream import Walk
from ..recipe import Recipe, refuse_choices
from ..statistics import Sums
from .residual import Branch, find_layouts
from .turning import Turned, principal, refuse_foreign, turn_branch, turn_rows
from .units import find_structures
from .width import Stream


def bound_width(method: Method, options: Mapping[str, Mapping[str, Any]]) -> Bound:
    """The method's width part with a recipe's options. Raises `InputError`, also for options of parts it does not have."""
    for part in options:
        if part != "width":
            raise InputError(
                f"method '{method.name}' has no {part}: all it can be told is --set width.name or width.align"
            )
    for part, name in method.of_units.items():
        raise InputError(
            f"{part} '{name}' is about units of blocks, and '{method.name}' removes channels of the residual stream: leave it out"
        )
    bound = bind("width", method, options)
    if bound is None:
        raise InputError(f"method '{method.name}' needs a width: parameters or channels")
    return bound


@dataclass(frozen=True)
class Slicing:
    """A recipe that slices the residual stream, bound to a model."""

    recipe: Recipe
    width: Bound
    turned: Turned

    @classmethod
    def of(cls, recipe: Recipe, source: StreamedModel) -> Slicing:
        """Raises `InputError` for models that do not compute the same with their stream turned, and ratios that leave nothing."""
        name = recipe.method
        bound = bound_width(find_method(name), recipe.parts)
        refuse_choices(recipe)
        if recipe.calibration.mode == "dense":
            raise InputError(
                f"'{name}' finds each basis behind all that is sliced before it: use --set calibration.mode=sequential"
            )
        refuse_foreign(source)
        structures = find_structures(source.module, source.anatomy)
        layouts = find_layouts(source.module, source.anatomy, structures)
        before = sum(block_parameters(source))
        channels = Turned(source, layouts, 1).channels
        ratio = recipe.target.fraction
        stream = Stream(channels, ratio, before, lambda width: Turned(source, layouts, width).block_parameters())
        width = bound(stream)
        if width < 1:
            raise InputError(
                f"ratio {float(ratio):g} leaves none of the {channels} channels of the stream: ask for less"
            )
        if width >= channels:  # transformers alone would load the folder, and leave its shortcuts out
            raise InputError(f"ratio {float(ratio):g} keeps all {channels} channels of the stream: ask for more")
        return cls(recipe, bound, Turned(source, layouts, width))

    @property
    def looks_at_data(self) -> bool:
        """Whether anything depends on the calibration tokens."""
        return True

    @property
    def resolved(self) -> dict[str, dict[str, Any]]:
        """The recipe's part options with the names and defaults that hold today filled in."""
        return {"width": {"name": self.width.part.name, **self.width.options}}

    def appetite(self, windows: int, length: int) -> Appetite:
        """A gram matrix of the stream and its components in float64, and a block in its new basis twice."""
        source, channels = self.turned.source, self.turned.channels
        largest = max(block_parameters(source)) + 2 * channels**2
        more = self.turned.block_parameters() - sum(block_parameters(source)) + self.turned.added_outside()
        stored = max(entry.dtype.itemsize for entry in source.reader.entries.values())
        return Appetite(4 * channels**2 * 8, largest * (source.dtype.itemsize + stored), written=max(0, more * stored))

    def work(
        self, walk: Walk, *, dense: bool, ranks: Ranks | None = None, first: int = 0, total: int | None = None
    ) -> SliceWalk:
        """What slices the blocks of `walk`'s model."""
        return SliceWalk(
            walk, self.turned, dense=dense, ranks=Ranks() if ranks is None else ranks, first=first, total=total
        )


@dataclass
class SliceWalk(BlockWalk):
    """Slices the blocks of `walk`'s model in order.

    Attributes:
        turned: how the model is written.
    """

    turned: Turned
    _first: Tensor | None = field(init=False, default=None)
    _next: Tensor | None = field(init=False, default=None)
    _kept: InMemory | None = field(init=False, default=None)
    _sliced: nn.Module | None = field(init=False, default=None)
    _written: dict[str, Tensor] = field(init=False, default_factory=dict)

    @property
    def _basis(self) -> Tensor:
        """Of the present block's inputs, [channels, width] float32."""
        assert self._kept is not None
        shape = (self.turned.channels, self.turned.width)
        flat = self._kept.tensor.view(torch.uint8).flatten()
        return flat[: 4 * shape[0] * shape[1]].view(torch.float32).view(shape)

    def start(self, hidden: HiddenStates | None = None, *, keep: bool = True) -> None:
        """Run the model around its blocks; `walk.hidden` then holds the first block's inputs in the kept channels."""
        turned, walk = self.turned, self.walk
        window = torch.Size(walk.shape[1:]).numel() * walk.dtype.itemsize
        windows = -(-4 * turned.channels * turned.width // window)
        self._kept = InMemory((windows, *walk.shape[1:]), walk.dtype)
        self._kept.tensor.zero_()
        if keep:
            self._basis.copy_(self._first_basis())
            self._kept.turn()
        super().start(hidden, keep=keep)

    def enter(self, hidden: Tensor) -> Tensor:
        """The embedded tokens in the first basis, zero beyond the kept channels."""
        dtype = self.turned.source.reader.entries[self._embedding_key].dtype
        kept = turn_rows(hidden.to(dtype), self._basis.to(hidden.device)).to(hidden.dtype)
        return widened(kept, hidden.shape[-1])

    @property
    def _embedding_key(self) -> str:
        keys, turned = self.turned.source.key_of, self.turned
        return next(keys[name] for name in (turned.embedding, turned.tied_head) if name in keys)

    def _first_basis(self) -> Tensor:
        """The components of the embedded calibration tokens, from how often each is there."""
        if self._first is None:
            source, windows = self.turned.source, self.walk.windows
            ids = windows.ids if windows.keep is None else windows.ids[windows.keep]
            rows = source.module.get_input_embeddings().weight.shape[0]
            counts = torch.bincount(ids.flatten().cpu(), minlength=rows).double()
            self.ranks.sum_up([counts])
            sums = Sums(frozenset({"gram"}))
            with self.seconds.timed("prune"):
                for start, part in source.reader.rows(self._embedding_key):
                    often = counts[start : start + len(part)]
                    sums.add(part[often > 0].double() * often[often > 0].sqrt()[:, None], None)
                sums.finish()
                self._first = principal(sums.sums["gram"], self.turned.width)
        return self._first

    def outer(self) -> list[Piece]:
        """What lies outside the blocks, the embedding in its basis."""
        return self.turned.outer(self._first_basis())

    @torch.inference_mode()
    def prune_block(self, block: Block, module: nn.Module, stored: Stored) -> list[LinearReport]:
        """Turn and cut the block, each branch behind what is sliced before it."""
        begun = time.perf_counter()
        errors = self._slice(block, module)
        seconds = time.perf_counter() - begun
        return [self._report(linear, errors.get(linear.name), seconds / len(block.linears)) for linear in block.linears]

    def _slice(self, block: Block, module: nn.Module) -> dict[str, float]:
        """Write the block in its bases; returns output errors of its writers, by name."""
        layout, tensors = self.turned.layouts[block.index], self._tensors(block)
        written, errors = dict(tensors), {}
        sliced = self._sliced = self._with_shortcuts(block, module)
        before = self._basis.clone()
        for branch in layout.branches:
            opened = turn_branch(branch, layout, tensors, before, None)
            _set(sliced, opened, self.turned.source)
            if self.turned.is_last(block.index, branch):
                written |= opened
                continue
            after = self._components(block, sliced, branch)
            turned = turn_branch(branch, layout, tensors, before, after)
            errors[branch.writer.name] = self._writer_error(block, sliced, branch, after, turned)
            _set(sliced, turned, self.turned.source)
            written |= turned
            before = after
        self._next = before
        self._written = {f"{block.name}.{name}": tensor for name, tensor in written.items()}
        return errors

    def _with_shortcuts(self, block: Block, module: nn.Module) -> nn.Module:
        """The block's code with shortcuts, as yet with the weights of the dense block."""
        layout = self.turned.layouts[block.index]
        sliced: nn.Module = bare_copy(module)
        add_shortcuts(sliced, layout.named)
        for branch in layout.branches:
            setattr(sliced.get_submodule(branch.norm), layout.epsilon, self.turned.epsilon(block.index, branch))
        _set(sliced, dict(module.named_parameters()), self.turned.source)
        return sliced.eval()

    def _tensors(self, block: Block) -> dict[str, Tensor]:
        """The block's tensors as they are stored, by their names in it."""
        source = self.turned.source
        return {
            name.removeprefix(f"{block.name}."): source.stored[block.index][source.key_of[name]]
            for name in source.block_parameters(block.index)
        }

    def _components(self, block: Block, sliced: nn.Module, branch: Branch) -> Tensor:
        """The basis behind a branch that adds to the stream in the model's own channels as yet."""
        sums = Sums(frozenset({"gram"}))
        with self.seconds.timed("forward"), self.ranks.together(), _up_to(sliced, branch):
            for position, batch in enumerate(self.walk.batches):
                found = self.walk.run_batch(block.index, sliced, position, self.walk.hidden[batch])
                sums.add(found.double(), self.walk.windows[batch].keep)
        with self.seconds.timed("prune"):
            self.ranks.sum_up([sums.sums["gram"]])
            sums.finish()
            return principal(sums.sums["gram"].cpu(), self.turned.width)

    def _writer_error(
        self, block: Block, sliced: nn.Module, branch: Branch, after: Tensor, turned: Mapping[str, Tensor]
    ) -> float:
        """How much of what a writer adds lies outside the kept channels."""
        name = branch.writer.name
        module = sliced.get_submodule(name)
        with _up_to(sliced, branch):
            collector = self._collect(block, sliced, {name: module}, frozenset(), None)
        weight = weight_of(module)
        kept, basis = turned[f"{name}.weight"].to(weight), after.to(weight)
        sample = self.ranks.from_last(collector.sample(name))
        with self.seconds.timed("prune"):
            return self._output_error(weight, lambda rows: weight[rows] - basis[rows] @ kept, sample)

    def _report(self, linear: Linear, error: float | None, seconds: float) -> LinearReport:
        weight = self._written[f"{linear.full_name}.weight"]
        return LinearReport(
            name=linear.full_name,
            shape=(weight.shape[0], weight.shape[1]),
            pattern=None,
            weights=weight.numel(),
            zeros=count_zeros(weight),
            output_error=error,
            seconds=seconds,
            removed=linear.count - weight.numel(),
        )

    @torch.inference_mode()
    def pass_on(self, index: int, module: nn.Module) -> None:
        """Send the windows through the block as it is written; what is behind it has the next basis."""
        assert self._sliced is not None
        super().pass_on(index, self._sliced)
        assert self._kept is not None
        assert self._next is not None
        self._basis.copy_(self._next)
        self._kept.turn()
        self._sliced = self._next = None

    def states(self, folder: Path) -> list[tuple[HiddenStates, Place]]:
        """The hidden states, and their basis as if it were more windows behind the last."""
        assert self._kept is not None
        total = len(self.walk.windows) if self.total is None else self.total
        return [*super().states(folder), (self._kept, Place(folder, total))]

    def shard(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors in its bases, and its shortcuts."""
        return self._written

    @torch.inference_mode()
    def take_up(self, block: Block, tensors: dict[str, Tensor], noted: Mapping[str, Any]) -> nn.Module:
        """The dense block, sliced once more: the same inputs give the same bits, and the basis behind it, which lies in no shard."""
        module = self.turned.source.load_block(block.index)
        self._slice(block, module)
        return module

    def release(self) -> None:
        """Give hidden states and basis back."""
        super().release()
        if self._kept is not None:
            self._kept.close()

    @property
    def told(self) -> dict[str, Any]:
        """Parameters of the shortcuts in every block, which take some of what went away back."""
        return {"shortcuts": [self.turned.shortcuts(index) for index in range(len(self.turned.layouts))]}

    def files(self) -> dict[str, str] | None:
        """The config, and the code that loads the model."""
        config = json.dumps(self.turned.config(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {"config.json": config, MODELING_NAME: self.turned.code()}

    def rehearse(self) -> Rehearsal:
        """What goes is known from shapes."""
        return Rehearsal(self.block_removed, 0.0, -self.turned.added_outside())

    @property
    def removed(self) -> int:
        """Parameters that the model has fewer: of its blocks, less what it has more outside them."""
        return self.block_removed - self.turned.added_outside()

    @property
    def channels(self) -> tuple[int, int] | None:
        """How many channels the residual stream had and has between blocks."""
        return self.turned.channels, self.turned.width

    @property
    def block_removed(self) -> int:
        """Parameters that its blocks have fewer, shortcuts counted."""
        return sum(block_parameters(self.turned.source)) - self.turned.block_parameters()


def _set(block: nn.Module, tensors: Mapping[str, Tensor], source: StreamedModel) -> None:
    """Let a block compute with these, by their names in it."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        value = nn.Parameter(tensor.to(source.device, source.dtype), requires_grad=False)
        block.get_submodule(path).register_parameter(leaf, value)


@contextmanager
def _up_to(block: Any, branch: Branch) -> Iterator[None]:
    """Leave out for the time being what comes behind a branch."""
    whole = block._branches
    block._branches = whole[: whole.index((branch.norm, branch.part)) + 1]
    try:
        yield
    finally:
        block._branches = whole
