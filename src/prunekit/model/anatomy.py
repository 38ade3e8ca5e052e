"""What a model consists of, found from the model itself: its blocks, and the linears in them.

Nothing here knows a model family by name. The blocks are the module list that holds most of the model's linear weights; a linear
is a module whose forward is one matrix product; and any other tensor of two or more dimensions inside a block means the block is
of a kind prunekit does not yet understand (mixture-of-experts, state space, ...), which is refused rather than half pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..runtime.linear import PackedLinear


@dataclass(frozen=True)
class Linear:
    """A weight matrix `[out_features, in_features]` of a block.

    `name` is its name in the block called `block`, the one at place `index`. A GPT-2 `Conv1D` stores its weight the other way round
    (`transposed`); `matrix` presents either as `[out, in]`.
    """

    name: str
    block: str
    index: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def full_name(self) -> str:
        """Name in the whole model, like `model.layers.3.mlp.down_proj`."""
        return f"{self.block}.{self.name}"

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of the stored weight as `[out, in]`."""
        return weight.t() if self.transposed else weight

    def matches(self, glob: str) -> bool:
        """Whether a glob means it: by its name in the model, its name in its block, or the name of its block."""
        return any(fnmatchcase(name, glob) for name in (self.full_name, self.name, self.block))


# weight and bias of a linear where they lie: among what was read of the checkpoint, or in a module
Stored = Callable[[Linear], tuple[Tensor, Tensor | None]]


def place_of(full_name: str) -> tuple[int, str]:
    """Of a linear's name in the model, the number of its block and its name there: `model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`."""
    parts = full_name.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return int(parts[number]), ".".join(parts[number + 1 :])


@dataclass(frozen=True)
class Block:
    """One decoder layer: its place, its name in the model, its linears in definition order."""

    index: int
    name: str
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Anatomy:
    """A model's blocks. `blocks_name` is the module list they stand in, like `model.layers`."""

    blocks_name: str
    blocks: tuple[Block, ...]

    def linears(self) -> Iterator[Linear]:
        """Every linear that can be pruned, block by block."""
        for block in self.blocks:
            yield from block.linears


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one matrix product with an optional bias (subclasses of `nn.Linear` included)."""
    return isinstance(module, (nn.Linear, Conv1D))


def read_anatomy(model: nn.Module, *, packed: bool = False) -> Anatomy:
    """Find the blocks and linears of a causal language model; it may lie on the meta device.

    Linears of `prunekit.load(..., runtime="sparse")` are refused unless `packed` is given: they have no weight to read or change.

    Raises `InputError` where the model is not a stack of blocks of dense linears, naming the modules.
    """
    blocks_name = _find_blocks(model)
    container = model.get_submodule(blocks_name)
    assert isinstance(container, nn.ModuleList)
    _refuse_shared(model, blocks_name, container)
    _refuse_strange(blocks_name, container)
    blocks = []
    for index, module in enumerate(container):
        block_name = f"{blocks_name}.{index}"
        linears = []
        for name, child in module.named_modules():
            if isinstance(child, PackedLinear):
                if not packed:
                    raise InputError(
                        f"'{block_name}.{name}' is packed for the sparse runtime, which computes and changes nothing: load the model "
                        "without runtime='sparse'"
                    )
                linears.append(Linear(name, block_name, index, child.out_features, child.in_features, False))
            elif is_linear(child):
                transposed = isinstance(child, Conv1D)
                rows, columns = child.weight.shape if child.weight.ndim == 2 else (0, 0)
                size = (columns, rows) if transposed else (rows, columns)
                asked = (child.nf, child.nx) if transposed else (child.out_features, child.in_features)
                if size != asked or not child.weight.is_floating_point():
                    raise InputError(
                        f"'{block_name}.{name}' ({type(child).__name__}) holds {child.weight.dtype} {list(child.weight.shape)} "
                        f"for {list(asked)}: quantised or packed weights cannot be pruned; load the float model"
                    )
                linears.append(Linear(name, block_name, index, *size, transposed))
        blocks.append(Block(index, block_name, tuple(linears)))
    return Anatomy(blocks_name, tuple(blocks))


def _find_blocks(model: nn.Module) -> str:
    weights: dict[str, int] = {}
    for name, module in _text_decoder(model):
        inside_found = any(name.startswith(found + ".") for found in weights)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_found:
            weights[name] = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2) + sum(
                child.out_features * child.in_features for child in module.modules() if isinstance(child, PackedLinear)
            )
    if not weights or max(weights.values()) == 0:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks: prunekit prunes decoder-only models")
    return max(weights, key=lambda name: weights[name])


def _text_decoder(model: Any) -> list[tuple[str, nn.Module]]:
    """The named modules of the part that decodes text, where the model says which that is: a vision tower may be larger."""
    named: list[tuple[str, nn.Module]] = list(model.named_modules())
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = [(name, module) for name, module in named if module is decoder]
    if not inside or not any(isinstance(module, nn.ModuleList) for module in inside[0][1].modules()):
        return named
    home = inside[0][0]
    return [(name, module) for name, module in named if not home or name == home or name.startswith(home + ".")]


def _refuse_shared(model: nn.Module, blocks_name: str, container: nn.ModuleList) -> None:
    """A weight that stands in two places cannot be pruned in one of them."""
    owners: dict[int, str] = {}
    inside = {id(parameter) for parameter in container.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside:
            if id(parameter) in owners:
                raise InputError(
                    f"'{owners[id(parameter)]}' and '{name}' of '{blocks_name}' are one tensor: "
                    "models that share block weights are not supported yet"
                )
            owners[id(parameter)] = name


def _refuse_strange(blocks_name: str, container: nn.ModuleList) -> None:
    strange: dict[str, str] = {}
    for index, block in enumerate(container):
        for name, module in block.named_modules():
            path = f"{blocks_name}.{index}.{name}" if name else f"{blocks_name}.{index}"
            if isinstance(module, nn.ModuleList) and any(is_linear(child) for child in module.modules()):
                strange[path] = type(module[0]).__name__
            elif not is_linear(module):
                for tensor_name, tensor in module.named_parameters(recurse=False):
                    if tensor.ndim >= 2:
                        strange[f"{path}.{tensor_name}"] = type(module).__name__
    if not strange:
        return
    first = next(iter(strange))
    place = first.removeprefix(blocks_name + ".").split(".", 1)[0]
    shown = [f"'{path}' ({kind})" for path, kind in strange.items() if path.startswith(f"{blocks_name}.{place}.")]
    expert = any(word in f"{path} {kind}".lower() for path, kind in strange.items() for word in ("expert", "router"))
    what = "mixture-of-experts models are not yet supported" if expert else "this kind of block is not yet supported"
    raise InputError(
        f"{what}: in every such block there are parts that are neither norms nor plain linears; in block {place}: "
        f"{', '.join(shown)}"
    )


def longest_context(config: Any) -> int | None:
    """Tokens a model's positions reach, or None where nothing says so (a bias that grows with distance reaches any)."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if longest is None else int(longest)


def only_last_logits(model: nn.Module) -> dict[str, int]:
    """What a forward pass is called with for the logits of the last position alone, where the model can leave out the others."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Each name of a parameter that has several (a tied head) -> all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: found for found in names.values() if len(found) > 1 for name in found}


def weight_of(module: nn.Module) -> Tensor:
    """The stored weight of a linear module, without its gradient bookkeeping."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def tensors_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of a linear module and its bias, if it has one, without their gradient bookkeeping."""
    bias = module.bias
    return weight_of(module), bias.detach() if isinstance(bias, Tensor) else None


def in_module(block: nn.Module) -> Stored:
    """Where a block's linears have their weights and biases while it computes."""
    return lambda linear: tensors_of(block.get_submodule(linear.name))
