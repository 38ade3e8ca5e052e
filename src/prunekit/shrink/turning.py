"""A residual stream in another basis, cut: what becomes of a model's tensors, shapes and config.

With Q [channels, kept] the basis at a place, s = x Q is what passes there. A norm divides by the root of |x|² / channels + ε; of the
kept channels |s|² is what is left, which is never scaled up again. So a norm of the model's own class, as wide as s, has to have
ε · channels / kept, and what it returns is √(kept / channels) times what it should be: that, and the norm's gains, go into the
linears that read it. Behind a branch the stream is x Q' = s Qᵀ Q' + what the branch adds, turned by Q'.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Reader, bytes_of
from ..checkpoint.shard import Piece
from ..checkpoint.writer import MODELING_NAME
from ..errors import InputError
from ..model.resizing import SHAPES, SHORTCUTS
from ..model.source import StreamedModel, refuse_sliced, resizing_code
from .residual import Branch, Layout


def principal(gram: Tensor, width: int) -> Tensor:
    """The first `width` principal components of a stream, in columns, by falling share of its energy.

    Of all bases of that width it loses least: the sum of the other eigenvalues. Damping, as the official code adds, would move all
    eigenvalues and no component.

    Shapes: gram [channels, channels] -> [channels, width] float32.
    """
    components: Tensor = torch.linalg.eigh(gram.double())[1]
    return components.flip(1)[:, :width].float().contiguous()


def turn_reader(weight: Tensor, gains: Tensor, basis: Tensor) -> Tensor:
    """A linear that reads the stream through a norm with `gains`, for one without that has the kept channels.

    Shapes: weight [out, channels], gains [channels], basis [channels, kept] -> [out, kept], in the weight's dtype.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    channels, kept = basis.shape
    turned = (weight.to(exact) * gains.to(exact)) @ basis.to(exact)
    return turned.mul(math.sqrt(channels / kept)).to(weight.dtype)


def turn_writer(tensor: Tensor, basis: Tensor | None) -> Tensor:
    """Weight or bias of a linear that adds to the stream; with no basis it stays as it is.

    Shapes: tensor [channels, in] or [channels], basis [channels, kept] -> [kept, in] or [kept], in the tensor's dtype.
    """
    if basis is None:
        return tensor
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return (basis.to(exact).t() @ tensor.to(exact)).to(tensor.dtype)


def shortcut(before: Tensor, after: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [kept behind, kept before] that carries the stream from one basis [channels, kept] to the next, or to none."""
    return (before if after is None else after.t() @ before).to(dtype)


@dataclass(frozen=True)
class Turned:
    """How a sliced model is saved: the model before, its layouts, and the channels that stay.

    Behind the last block the stream has the model's own channels again, all of them: the final norm and the head stay as they are.
    """

    source: StreamedModel
    layouts: Sequence[Layout]
    width: int

    @property
    def channels(self) -> int:
        """Of the stream before."""
        return int(self.source.module.get_input_embeddings().weight.shape[1])

    def is_last(self, index: int, branch: Branch) -> bool:
        """Whether the final norm comes behind a branch of a block."""
        return index == len(self.layouts) - 1 and branch is self.layouts[index].branches[-1]

    def epsilon(self, index: int, branch: Branch) -> float:
        """What a norm adds to the mean square of the kept channels."""
        norm = self.source.module.get_submodule(f"{self.source.anatomy.blocks[index].name}.{branch.norm}")
        return float(getattr(norm, self.layouts[index].epsilon)) * self.channels / self.width

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of a block, by its name there."""
        module = self.source.module.get_submodule(self.source.anatomy.blocks[index].name)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        width = self.width
        for branch in self.layouts[index].branches:
            behind = self.channels if self.is_last(index, branch) else self.width
            shapes[f"{branch.norm}.weight"] = (width,)
            shapes |= {f"{each.name}.weight": (each.out_features, width) for each in branch.readers}
            shapes[f"{branch.writer.name}.weight"] = (behind, branch.writer.in_features)
            if f"{branch.writer.name}.bias" in shapes:
                shapes[f"{branch.writer.name}.bias"] = (behind,)
            shapes[f"{branch.part}_shortcut.weight"] = (behind, width)
            width = behind
        return shapes

    def block_parameters(self) -> int:
        """Parameters of all blocks."""
        shapes = (self.block_shapes(index) for index in range(len(self.layouts)))
        return sum(torch.Size(shape).numel() for block in shapes for shape in block.values())

    @property
    def embedding(self) -> str:
        """Name of the embedding's weight."""
        module = self.source.module
        weight = module.get_input_embeddings().weight
        return next(str(name) for name, tensor in module.named_parameters() if tensor is weight)

    @property
    def tied_head(self) -> str | None:
        """Name of the head's weight where it is the embedding, from which it has to part."""
        module = self.source.module
        weight = module.get_input_embeddings().weight
        named = module.named_parameters(remove_duplicate=False)
        return next((name for name, tensor in named if tensor is weight and name != self.embedding), None)

    def added_outside(self) -> int:
        """How many more parameters there are outside the blocks; fewer where it is negative."""
        rows = int(self.source.module.get_input_embeddings().weight.shape[0])
        return rows * self.width - (0 if self.tied_head else rows * self.channels)

    def outer(self, basis: Tensor) -> list[Piece]:
        """What is written of what lies outside the blocks; `basis` [channels, width] is that of the first block's inputs."""
        source = self.source
        pieces = []
        for name in source.outer_parameters():
            if name in source.key_of and name not in (self.embedding, self.tied_head):
                pieces.append(replace(Piece.stored(source.key_of[name], source.reader), name=name))
        key = next(source.key_of[name] for name in (self.embedding, self.tied_head) if name in source.key_of)
        entry = source.reader.entries[key]
        rows = _TurnedRows(source.reader, key, basis)
        pieces.append(Piece(self.embedding, (entry.shape[0], self.width), entry.dtype, rows))
        if self.tied_head is not None:
            pieces.append(replace(Piece.stored(key, source.reader), name=self.tied_head))
        return pieces

    def config(self) -> dict[str, Any]:
        """What config.json holds: the widths of before, and the true shapes beside them."""
        source = self.source
        config = copy.deepcopy(source.reader.config)
        noted = config.get(SHAPES, {"tensors": {}, "attributes": {}})
        tensors: dict[str, list[int]] = {**noted["tensors"]}
        rows = source.module.get_input_embeddings().weight.shape[0]
        tensors[self.embedding] = [rows, self.width]
        attributes, shortcuts = dict(noted["attributes"]), {}
        for block, layout in zip(source.anatomy.blocks, self.layouts, strict=True):
            before = dict(source.module.get_submodule(block.name).named_parameters())
            for name, shape in self.block_shapes(block.index).items():
                if name not in before or tuple(before[name].shape) != shape:
                    tensors[f"{block.name}.{name}"] = list(shape)
            for branch in layout.branches:
                attributes[f"{block.name}.{branch.norm}.{layout.epsilon}"] = self.epsilon(block.index, branch)
            shortcuts[block.name] = layout.named
        config[SHAPES] = {"tensors": tensors, "attributes": attributes, SHORTCUTS: shortcuts}
        config["tie_word_embeddings"] = False
        kind = type(source.module).__name__
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_NAME.removesuffix('.py')}.{kind}"}
        return config

    def code(self) -> str:
        """The file of code that lies in the folder."""
        return resizing_code(self.source.module)


def refuse_foreign(source: StreamedModel) -> None:
    """Raise `InputError` for models of whose residual stream the config says more than we know."""
    module, kind = source.module, type(source.module).__name__
    refuse_sliced(source, "slice the original")
    if type(module.config).model_type != source.reader.config.get("model_type"):
        raise InputError(f"{kind} is a part of a larger model: its residual stream cannot be sliced")
    if not type(module).__module__.startswith("transformers."):
        raise InputError(f"{kind} is code that the folder brings: its residual stream cannot be sliced")


@dataclass(frozen=True)
class _TurnedRows:
    """The rows of a stored embedding in another basis, a few at a time."""

    reader: Reader
    key: str
    basis: Tensor

    def __iter__(self) -> Iterator[memoryview]:
        for _, rows in self.reader.rows(self.key):
            yield bytes_of(turn_rows(rows, self.basis))


def turn_rows(rows: Tensor, basis: Tensor) -> Tensor:
    """Vectors of the stream in a basis. Shapes: rows [..., channels], basis [channels, kept] -> [..., kept], in the rows' dtype."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(exact) @ basis.to(exact)).to(rows.dtype)


def turn_branch(
    branch: Branch, layout: Layout, tensors: Mapping[str, Tensor], before: Tensor, after: Tensor | None
) -> dict[str, Tensor]:
    """A branch's tensors, by their names in the block, where the stream has the basis `before` and then `after`, or none."""
    norm = f"{branch.norm}.weight"
    gains = tensors[norm].to(torch.promote_types(tensors[norm].dtype, torch.float32)) + layout.gain
    found = {
        f"{each.name}.weight": turn_reader(tensors[f"{each.name}.weight"], gains, before) for each in branch.readers
    }
    found[norm] = tensors[norm].new_full((before.shape[1],), 1 - layout.gain)
    weight = f"{branch.writer.name}.weight"
    for name in (weight, f"{branch.writer.name}.bias"):
        if name in tensors:
            found[name] = turn_writer(tensors[name], after)
    found[f"{branch.part}_shortcut.weight"] = shortcut(before, after, tensors[weight].dtype)
    return found
