"""A transformers model whose tensors have the shapes that its config notes as `prunekit_shapes`: blocks of different widths, or without
their attention or perceptron, or a narrower stream between them.

prunekit writes this file, and two lines behind it that name the model's class, into folders that no stock config describes:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then loads them without prunekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

SHAPES = "prunekit_shapes"
SHORTCUTS = "shortcuts"
REMOVED = "removed"


def resized(kind: Any) -> Any:
    """The transformers class `kind`, under its own name, with the shapes that the config of each model notes."""

    class Resized(kind):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            resize(self, getattr(config, SHAPES))

    Resized.__name__ = Resized.__qualname__ = kind.__name__
    return Resized


def resize(model: nn.Module, shapes: dict[str, dict[str, Any]]) -> None:
    """Give a model other shapes, in place.

    Args:
        model: as its class builds it; the meta device will do.
        shapes: `tensors`, name -> shape of every parameter that is to be smaller, or of a linear's bias that is to be there;
            `attributes`, name -> value of what a module keeps beside its tensors and must fit them, like its number of heads; and
            perhaps `shortcuts`, name of a block -> its branches, see `add_shortcuts`, and `removed`, name of a module that is gone ->
            how `Removed` answers in its place.
    """
    for name, answer in shapes.get(REMOVED, {}).items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, Removed(model.get_submodule(name), **answer))
    for name, branches in shapes.get(SHORTCUTS, {}).items():
        add_shortcuts(model.get_submodule(name), branches)
    for name, shape in shapes["tensors"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        before = getattr(module, leaf)
        if before is None:
            value = module.get_parameter("weight").new_zeros(shape)
        else:
            value = before.detach()[tuple(slice(size) for size in shape)].clone()
        module.register_parameter(leaf, nn.Parameter(value))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = shape
        elif hasattr(module, "nf") and leaf == "weight":  # GPT-2's own kind of linear
            module.nx, module.nf = shape
        elif isinstance(module, nn.Embedding):
            module.__class__ = _NarrowEmbedding
    for name, value in shapes["attributes"].items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)


class Removed(nn.Module):
    """What stands in the place of a module that is gone.

    Where the module wrote keys and values into a cache, this still counts the tokens there, one number each: some models ask their
    first layers how long the cache is.

    Args:
        before: the module.
        returns: the place among its arguments of the one that is returned; None for zeros like the first.
        outputs: how many it returns, all but the first None; 0 where it returns no tuple.
        empty: name in it of a weight that stays, with no entry, so that code which does not know of this class stops at its shape.
    """

    def __init__(self, before: nn.Module, returns: int | None, outputs: int, empty: str | None) -> None:
        super().__init__()
        self.returns, self.outputs = returns, outputs
        self.layer_idx = getattr(before, "layer_idx", None)
        if empty is not None:
            *path, leaf = empty.split(".")
            owner: nn.Module = self
            for name in path:
                owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            weight = before.get_parameter(empty).detach()
            owner.register_parameter(leaf, nn.Parameter(weight.new_empty(0), requires_grad=False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the module's place; the cache may be anywhere among the arguments."""
        given = (*args, *kwargs.values())
        first = given[0]
        output = torch.zeros_like(first) if self.returns is None else given[self.returns]
        cache = next((each for each in given if isinstance(each, Cache)), None)
        if cache is not None and self.layer_idx is not None:
            counted = first.new_zeros(len(first), 1, first.shape[-2], 1)
            cache.update(counted, counted, self.layer_idx)
        return (output, *[None] * (self.outputs - 1)) if self.outputs else output


class _NarrowEmbedding(nn.Embedding):
    """An embedding of fewer channels than it returns; zeros are in the place of the others."""

    def forward(self, input: Tensor) -> Tensor:
        return widened(super().forward(input), self.embedding_dim)


def add_shortcuts(block: nn.Module, branches: Sequence[Sequence[str]]) -> None:
    """Let the stream that passes through a block have another basis, and fewer channels, behind every branch, in place.

    Between blocks the stream is as wide as ever, with zeros beyond the channels that are kept, so that nothing around them notices.

    Args:
        block: computes x + attention(norm(x)), and then the same with its multilayer perceptron.
        branches: the names of norm and attention, and those of norm and perceptron. Each gets a linear `NAME_shortcut`, which
            carries the stream to where the branch is added; as wide as the norm is now, its weight not set.
    """
    for norm, name in branches:
        weight = block.get_submodule(norm).get_parameter("weight")
        shortcut = nn.Linear(len(weight), len(weight), bias=False, device="meta", dtype=weight.dtype)
        block.add_module(f"{name}_shortcut", shortcut.to_empty(device=weight.device))
    changed: Any = block
    changed._branches = [tuple(branch) for branch in branches]
    changed.__class__ = _with_shortcuts(changed.__class__)


@cache
def _with_shortcuts(kind: Any) -> Any:
    """The class of a block, under its own name, whose stream goes through shortcuts."""

    class Block(kind):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            stream = hidden_states[..., : len(getattr(self, self._branches[0][0]).weight)]
            for norm, name in self._branches:
                added = getattr(self, name)(getattr(self, norm)(stream), **kwargs)
                kwargs = {}  # what is left to say concerns attention, which comes first
                added = added[0] if isinstance(added, tuple) else added
                stream = getattr(self, f"{name}_shortcut")(stream) + added
            return widened(stream, hidden_states.shape[-1])

    Block.__name__ = Block.__qualname__ = kind.__name__
    return Block


def widened(stream: Tensor, channels: int) -> Tensor:
    """Vectors [..., kept] with zeros behind them, [..., channels]."""
    return nn.functional.pad(stream, (0, channels - stream.shape[-1]))
