"""A plan carried out on a block's tensors: rows, columns and entries of removed units are left out, nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.modules import exchanged
from .plan import Plan
from .sublayers import left_out
from .units import Structure, scaled_numbers, told_heads


class Slicer:
    """Cuts the tensors of one block.

    `index[name]` holds, for a tensor's name in the block, what stays of it along each axis that is cut: {axis: [kept] int64}. Of a
    sublayer that goes `empty` are the tensors of which no entry stays, `gone` those that are not written at all.
    """

    def __init__(self, structures: Sequence[Structure], plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.index: dict[str, dict[int, Tensor]] = {}
        self.left_out = tuple(each for each in structures if plan.leaves_out(each))
        self.empty = {f"{each.name}.weight" for each in self.left_out}
        self.gone = {name for each in self.left_out if each.sublayer for name in each.sublayer.tensors} - self.empty
        for structure in structures:
            kept = plan.kept(structure)
            if structure in self.left_out:
                continue
            if len(kept) == structure.count:
                continue
            for part in structure.slices:
                length = shapes[part.tensor][part.dim]
                axes = self.index.setdefault(part.tensor, {})
                stays = part.kept(kept, length)
                if part.dim in axes:  # a linear whose rows feed several structures
                    stays = stays[torch.isin(stays, axes[part.dim])]
                axes[part.dim] = stays

    @property
    def cuts(self) -> bool:
        """Whether anything goes."""
        return bool(self.index or self.left_out)

    def lost(self, name: str) -> bool:
        """Whether no entry of a tensor stays."""
        return name in self.empty or name in self.gone

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor is left with."""
        if name in self.empty:
            return (0,)
        axes = self.index.get(name, {})
        return tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(shape))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor; itself where nothing goes."""
        if name in self.empty:
            return tensor.new_empty(0)
        for axis, index in self.index.get(name, {}).items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor

    def fill(self, name: str, whole: Tensor, part: Tensor) -> None:
        """Put what is left of a tensor back into its places in the whole one; the rest of that stays as it is."""
        _fill(whole, part.to(whole), list(self.index.get(name, {}).items()))


def _fill(whole: Tensor, part: Tensor, axes: list[tuple[int, Tensor]]) -> None:
    if not axes:
        whole.copy_(part)
        return
    (axis, index), *others = axes
    index = index.to(whole.device)
    stretch = whole.index_select(axis, index)
    _fill(stretch, part, others)
    whole.index_copy_(axis, index, stretch)


@contextmanager
def cut(module: nn.Module, config: Any, structures: Sequence[Structure], plan: Plan, slicer: Slicer) -> Iterator[None]:
    """Let a block compute with what is left of its tensors for the time being, as the smaller model will.

    `config` is the text model's, which some blocks ask for their numbers of heads.
    """
    tensors = {
        name: nn.Parameter(slicer(name, tensor.detach()), requires_grad=False)
        for name, tensor in module.named_parameters()
        if name in slicer.index
    }
    with ExitStack() as stack:
        stack.enter_context(exchanged(module, tensors))
        for structure in structures:
            if structure in slicer.left_out:
                continue
            kept = len(plan.kept(structure))
            for attribute in structure.scaled:
                path, _, name = attribute.rpartition(".")
                owner = module.get_submodule(path)
                numbers = {name: getattr(owner, name)}
                stack.enter_context(scaled_numbers(owner, numbers, structure.count, kept))
            if structure.resizes == "together":
                heads = told_heads(config, structure.count)
                stack.enter_context(scaled_numbers(config, heads, structure.count, kept))
        for child in module.modules():
            if isinstance(child, Conv1D):  # GPT-2's own kind of linear says its width itself
                stack.enter_context(_wide(child))
        stack.enter_context(left_out(module, slicer.left_out))
        yield


@contextmanager
def _wide(child: Conv1D) -> Iterator[None]:
    before, child.nf = child.nf, child.weight.shape[1]
    try:
        yield
    finally:
        child.nf = before
