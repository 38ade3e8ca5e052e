"""A narrower residual stream: the same channels left out of everything that reads it, adds to it or normalises it.

Which tensors those are is listed for no family. The model's own class is built with fewer hidden channels and everything else of the
same size: the axes that become shorter are the stream's. That nothing else depends on how many there are, like a factor on the
embedding, is tried: where every channel is there twice, in any order, and half of each is read, the logits must be the same.
A model whose stream is cut is a model of its own, read from the same files; what else goes from it is seen to by whoever walks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..checkpoint.cutting import CutReader
from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear, is_linear, read_anatomy
from ..model.modules import hollow
from ..model.resizing import SHAPES
from ..model.source import StreamedModel, make_buffers
from .plan import Channels, Plan
from .residual import LowRank
from .saving import FormChooser, NarrowConfig
from .turning import refuse_foreign
from .units import other_parameters

# name of a parameter -> its axes that are the stream's
Axes = Mapping[str, tuple[int, ...]]

_ROWS = 16  # of embedding and head, for as many different tokens
_SAME = 1e-3  # how far, relative to their norm, logits may be from those with every channel twice
_RANK = 4


@dataclass(frozen=True)
class Narrowing:
    """A model and how it is saved with fewer channels in its residual stream.

    Attributes:
        source: the model before.
        width: how many channels stay.
        config: what config.json will hold.
        axes: of the source's parameters that have the stream's channels.
    """

    source: StreamedModel
    width: int
    config: dict[str, Any]
    axes: Axes

    @classmethod
    def of(cls, source: StreamedModel, width: int) -> Narrowing:
        """Raises `InputError` where the class cannot be built like that, or computes something else then."""
        refuse_foreign(source)
        if SHAPES in source.reader.config:
            raise InputError(
                f"blocks of '{source.reader.folder}' have shapes that its config notes beside the class's own: take channels of the "
                "residual stream out of the original"
            )
        blocks = len(source.anatomy.blocks)
        chooser = FormChooser(
            source.module,
            source.anatomy,
            source.reader.config,
            source.key_of,
            [()] * blocks,
            Plan(tuple({} for _ in range(blocks))),
        )
        found = chooser.narrowed(width)
        axes = _stream_axes(source.module, found.built, width)
        narrowing = cls(source, width, found.config, axes)
        for block in source.anatomy.blocks:
            if not narrowing.norms(block):
                raise InputError(f"'{block.name}' has no norms with weights, whose outputs say which channels matter")
        _refuse_dependent(found, axes, type(source.module).__name__)
        return narrowing

    @property
    def channels(self) -> int:
        """How many the stream has before."""
        return int(self.source.module.config.get_text_config().hidden_size)

    @property
    def removed(self) -> int:
        """How many parameters go with the channels; a tied head counts once."""
        channels, parameters = self.channels, self.source.module.named_parameters()
        return sum(each.numel() // channels * (channels - self.width) for name, each in parameters if name in self.axes)

    def norms(self, block: Block) -> list[str]:
        """The modules of a block that normalise the stream, by their names in it."""
        linears = {linear.name for linear in block.linears}
        names = [name.removeprefix(f"{block.name}.") for name in self.axes if name.startswith(f"{block.name}.")]
        owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
        return [name for name in owners if name not in linears]

    def model(self, kept: Sequence[int]) -> StreamedModel:
        """The model with these channels of the stream alone, ascending, read from the source's files."""
        source = self.source
        index = torch.tensor(kept)
        cuts = {
            source.key_of[name]: dict.fromkeys(axes, index) for name, axes in self.axes.items() if name in source.key_of
        }
        model = StreamedModel(
            CutReader(source.reader, self.config, cuts),
            source.dtype,
            source.device,
            config=CONFIG_MAPPING[self.config["model_type"]].from_dict(self.config),
        )
        model.scratch = source.scratch
        return model


def narrowed(source: StreamedModel, hidden: Channels) -> StreamedModel:
    """The model with the channels of the residual stream that a plan keeps. Raises `InputError`, also for another model's plan."""
    channels = int(source.module.config.get_text_config().hidden_size)
    if hidden.count != channels:
        raise InputError(f"the plan is for a residual stream of {hidden.count} channels, this one has {channels}")
    return source if len(hidden.kept) == channels else Narrowing.of(source, len(hidden.kept)).model(hidden.kept)


def _stream_axes(model: PreTrainedModel, narrow: PreTrainedModel, width: int) -> dict[str, tuple[int, ...]]:
    """Axes that are shorter where the stream is narrower. Raises `InputError` where something else is."""
    channels, kind = int(model.config.get_text_config().hidden_size), type(model).__name__
    shapes = {name: tuple(tensor.shape) for name, tensor in narrow.named_parameters(remove_duplicate=False)}
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        before, after = tuple(tensor.shape), shapes.get(name, ())
        axes = tuple(axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
        alone = len(before) == len(after) and all((before[axis], after[axis]) == (channels, width) for axis in axes)
        if not alone or len(axes) > 1:
            raise InputError(
                f"the residual stream of {kind} cannot have {width} channels with everything else as it is: "
                f"'{name}' would go from {list(before)} to {list(after)}"
            )
        if axes:
            found[name] = axes
    return found


@torch.no_grad()
def _refuse_dependent(found: NarrowConfig, axes: Axes, kind: str) -> None:
    """Raise `InputError` where a model does not compute the same with every channel of its stream twice."""
    width = int(found.built.config.get_text_config().hidden_size)
    twice = torch.randperm(2 * width, generator=torch.Generator().manual_seed(0)) % width
    try:
        once, doubled = _logits(found.built, axes, None), _logits(found.doubled, axes, twice)
    except (TypeError, RuntimeError, AttributeError, ValueError) as problem:  # what the family's own code stumbles over
        raise InputError(
            f"whether {kind} computes the same with fewer channels in its residual stream cannot be tried: "
            f"{' '.join(str(problem).split()[:24])}"
        ) from None
    if not float((once - doubled).norm()) <= _SAME * float(once.norm()):
        raise InputError(
            f"the residual stream of {kind} cannot have {width} channels with everything else as it is: what it computes depends on "
            "how many there are in other places than its norms"
        )


class _MadeUp:
    """Values in the place of parameters: the same in the same order for a model and for one with every channel of its stream twice.

    `twice` [2 · width] says which channel each one is, or is None where each is there once.
    """

    def __init__(self, axes: Axes, twice: Tensor | None) -> None:
        self._axes, self._twice = axes, twice
        self._draw = torch.Generator().manual_seed(0)

    def linear(self, linear: Linear) -> LowRank:
        """What computes in a linear's place."""
        axes = self._axes.get(f"{linear.full_name}.weight", ())
        reads = [axis == (0 if linear.transposed else 1) for axis in axes]
        inputs, outputs = self._once(linear.in_features, True in reads), self._once(linear.out_features, False in reads)
        rows = torch.randn(inputs, _RANK, generator=self._draw) / inputs**0.5
        columns = torch.randn(_RANK, outputs, generator=self._draw) / _RANK**0.5
        if True in reads:
            rows = self._lifted(rows, (0,), read=True)
        return LowRank(rows, self._lifted(columns, (1,), read=False) if False in reads else columns)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Weights or biases of a norm, positive."""
        axes = self._axes.get(name, ())
        once = tuple(self._once(size, axis in axes) for axis, size in enumerate(shape))
        return self._lifted(torch.rand(once, generator=self._draw) + 0.5, axes, read=False)

    def matrix(self, names: Mapping[str, bool], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """A matrix outside the blocks under each of its `names`, which say whether it is a linear's there."""
        axes = next(self._axes.get(name, ()) for name in names)
        once = tuple(self._once(size, axis in axes) for axis, size in enumerate(shape))
        value = torch.randn(once, generator=self._draw)
        # a linear outside the blocks has its inputs along its last axis
        return {name: self._lifted(value, axes, read=linear and axes == (1,)) for name, linear in names.items()}

    def _once(self, size: int, of_stream: bool) -> int:
        return size // 2 if of_stream and self._twice is not None else size

    def _lifted(self, value: Tensor, axes: Sequence[int], *, read: bool) -> Tensor:
        """The value with every channel of the stream twice, of which each is read by half."""
        if self._twice is None:
            return value
        for axis in axes:
            value = value.index_select(axis, self._twice) / (2 if read else 1)
        return value


def _logits(model: PreTrainedModel, axes: Axes, twice: Tensor | None) -> Tensor:
    """Logits of a few tokens of a model on the meta device, which is given made-up parameters for good."""
    make_buffers(model, torch.device("cpu"))
    anatomy, made_up = read_anatomy(model), _MadeUp(axes, twice)
    values: dict[str, Tensor] = {}
    alike: dict[tuple[str, int, int], LowRank] = {}  # blocks may share what is in the place of their linears
    with ExitStack() as stack:
        for block in anatomy.blocks:
            module = model.get_submodule(block.name)
            for linear in block.linears:
                key = linear.name, linear.out_features, linear.in_features
                alike[key] = alike.get(key) or made_up.linear(linear)
            own = {each.name: alike[each.name, each.out_features, each.in_features] for each in block.linears}
            stack.enter_context(hollow(module, block.linears, partial(_answer, own)))
            for name, shape in other_parameters(block, module).items():
                values[f"{block.name}.{name}"] = made_up.vector(f"{block.name}.{name}", shape)
        values |= _outside(model, anatomy, made_up)
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        ids = torch.arange(_ROWS)[None]
        logits = model(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def _outside(model: PreTrainedModel, anatomy: Anatomy, made_up: _MadeUp) -> dict[str, Tensor]:
    """Made-up parameters outside the blocks; embedding and head have few rows."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    embedding.padding_idx = None  # it may lie beyond the few rows
    few = [id(tensor) for module in (embedding, head) for tensor in module.parameters(recurse=False)]
    aliases: dict[int, dict[str, bool]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{anatomy.blocks_name}."):
            aliases.setdefault(id(tensor), {})[name] = is_linear(model.get_submodule(name.rpartition(".")[0]))
            tensors[id(tensor)] = tensor
    found: dict[str, Tensor] = {}
    for key, names in aliases.items():
        shape = tuple(tensors[key].shape)
        shape = (_ROWS, *shape[1:]) if key in few else shape
        if len(shape) > 1:
            found |= made_up.matrix(names, shape)
        else:
            found |= {name: made_up.vector(name, shape) for name in names}
    return found


def _answer(own: Mapping[str, LowRank], name: str, value: Tensor) -> Tensor:
    return own[name](value)
