"""The residual stream of a model: where blocks read it, where they add to it, and whether it may be turned.

A stream that is read through RMS norms only can be turned by any orthogonal matrix: the norm's length does not change, its gains go
into the linears that read, and every linear that reads or adds is turned the other way. Whether a model is made like that is tried,
like everything else that is known of its structures: a hollow block, whose linears are made-up matrices of low rank, must return the
turned outputs when it is given turned inputs and computes with turned linears and shortcuts. No weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear
from ..model.memory import bare_copy
from ..model.modules import evaluating
from ..model.resizing import add_shortcuts
from ..model.stream import Call
from .plan import Structures
from .units import ATTENTION, MLP, Answer, Tracer, other_parameters

_RANK = 4
_SAME = 1e-4  # how far, relative to the largest, a turned block's outputs may be from the turned outputs of the block


@dataclass(frozen=True)
class Branch:
    """What is added to the stream at one place of a block: `writer(... readers(norm(x)))`.

    Attributes:
        norm, part: names of the norm, and of the attention or perceptron behind it.
        readers: linears that are fed what the norm returns.
        writer: the linear whose output is added.
    """

    norm: str
    part: str
    readers: tuple[Linear, ...]
    writer: Linear


@dataclass(frozen=True)
class Layout:
    """The branches of a block, and what its norms are like.

    Attributes:
        branches: attention, then the perceptron.
        gain: a norm multiplies by its weight plus this: 0 or 1.
        epsilon: the attribute of a norm that is added to the mean square.
    """

    branches: tuple[Branch, ...]
    gain: float
    epsilon: str

    @property
    def named(self) -> list[list[str]]:
        """The branches as `add_shortcuts` wants them."""
        return [[branch.norm, branch.part] for branch in self.branches]


def find_layouts(model: Any, anatomy: Anatomy, structures: Structures) -> list[Layout]:
    """How every block reads and adds to the stream of a causal language model, which may lie on the meta device.

    Raises `InputError` where turning the stream would change what the model computes.
    """
    kind = type(model).__name__
    outer = [
        name
        for name, tensor in model.named_parameters()
        if not name.startswith(f"{anatomy.blocks_name}.") and tensor.ndim > 1
    ]
    known = [
        getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    strange = [name for name in outer if not any(model.get_parameter(name) is weight for weight in known)]
    with evaluating(model):
        tracer = Tracer(model, anatomy)
        if strange or not tracer.direct:
            how = f"'{strange[0]}' has a part in" if strange else "more than an embedding is in"
            raise InputError(_refusal(kind, f"{how} what reaches the first block"))
        found: dict[Any, Layout] = {}
        layouts = []
        for block in anatomy.blocks:
            module = model.get_submodule(block.name)
            alike = type(module), tuple((each.name, each.out_features, each.in_features) for each in block.linears)
            if alike not in found:
                found[alike] = _layout(kind, tracer, block, module, structures)
            layouts.append(_for(found[alike], block))
    return layouts


def _for(layout: Layout, block: Block) -> Layout:
    """The layout of a block that is made alike."""
    own = {linear.name: linear for linear in block.linears}
    branches = tuple(
        Branch(branch.norm, branch.part, tuple(own[each.name] for each in branch.readers), own[branch.writer.name])
        for branch in layout.branches
    )
    return Layout(branches, layout.gain, layout.epsilon)


def _layout(kind: str, tracer: Tracer, block: Block, module: nn.Module, structures: Structures) -> Layout:
    width = tracer.width
    writers = {each.kind: each.consumer for each in structures[block.index]}
    norms = [
        name
        for name, child in module.named_children()
        if [tuple(tensor.shape) for tensor in child.parameters()] == [(width,)] and "weight" in child._parameters
    ]
    if set(writers) != {ATTENTION, MLP} or any(writer.transposed for writer in writers.values()) or len(norms) != 2:
        raise InputError(
            _refusal(
                kind, f"block {block.index} is not one attention and one perceptron, each behind a norm without bias"
            )
        )
    gain, epsilon = _norm(kind, module.get_submodule(norms[0]), width)
    parts = [writers[which].name.split(".")[0] for which in (ATTENTION, MLP)]
    for order in permutations(norms):
        branches = tuple(
            Branch(norm, part, _readers(block, part, writers[which], width), writers[which])
            for norm, part, which in zip(order, parts, (ATTENTION, MLP), strict=True)
        )
        layout = Layout(branches, gain, epsilon)
        if all(branch.readers for branch in branches) and _turns(tracer, block, module, layout):
            return layout
    raise InputError(_refusal(kind, f"a turned block {block.index} does not return the turned outputs"))


def _refusal(kind: str, why: str) -> str:
    return f"{kind} does not compute the same with its residual stream turned: {why}; take a method that removes heads and channels"


def _readers(block: Block, part: str, writer: Linear, width: int) -> tuple[Linear, ...]:
    inside = (each for each in block.linears if each.name.split(".")[0] == part and each.name != writer.name)
    return tuple(each for each in inside if each.in_features == width)


@torch.no_grad()
def _norm(kind: str, norm: nn.Module, width: int) -> tuple[float, str]:
    """What is added to a norm's weight to have its gain, and its attribute for epsilon; proved on a narrower one."""
    names = [name for name, value in vars(norm).items() if type(value) is float and "eps" in name]
    narrow = max(1, width // 2)
    values = torch.randn(3, narrow, generator=torch.Generator().manual_seed(0))
    for gain in (0.0, 1.0):
        for name in names:
            tried = copy.deepcopy(norm)
            tried.weight = nn.Parameter(torch.full((narrow,), 1.0 - gain))
            setattr(tried, name, 0.5)
            wanted = values * (values.square().mean(-1, keepdim=True) + 0.5).rsqrt()
            try:
                found = tried(values)
            except RuntimeError:  # a class that remembers its width elsewhere
                continue
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                return gain, name
    raise InputError(_refusal(kind, f"{type(norm).__name__} is no plain RMS norm"))


@dataclass(frozen=True)
class LowRank:
    """A made-up linear: x ↦ x · rows · columns. Shapes: rows [in, rank], columns [rank, out]."""

    rows: Tensor
    columns: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        """The product. Shapes: [..., in] -> [..., out]."""
        return value @ self.rows @ self.columns


@dataclass(frozen=True)
class _Mirror:
    """An orthogonal matrix that is its own inverse, x ↦ x − 2 (x · v) v."""

    axis: Tensor

    @classmethod
    def draw(cls, width: int, draw: torch.Generator) -> _Mirror:
        axis = torch.randn(width, generator=draw)
        return cls(axis / axis.norm())

    def __call__(self, value: Tensor) -> Tensor:
        """Turn the last axis."""
        return value - 2 * (value @ self.axis)[..., None] * self.axis


@torch.no_grad()
def _turns(tracer: Tracer, block: Block, module: nn.Module, layout: Layout) -> bool:
    """Whether a hollow block gives the turned outputs for turned inputs when it is turned."""
    draw = torch.Generator().manual_seed(0)
    width = tracer.width
    linears = {
        each.name: LowRank(
            torch.randn(each.in_features, _RANK, generator=draw) / each.in_features**0.5,
            torch.randn(_RANK, each.out_features, generator=draw) / _RANK**0.5,
        )
        for each in block.linears
    }
    rest = {name: torch.rand(shape, generator=draw) + 0.5 for name, shape in other_parameters(block, module).items()}
    values = torch.randn(1, 8, width, generator=draw)
    mirrors = [_Mirror.draw(width, draw) for _ in range(3)]
    turned_linears: dict[str, Callable[[Tensor], Tensor]] = dict(linears)
    turned_rest = dict(rest)
    shortcuts = []
    for branch, before, after in zip(layout.branches, mirrors, mirrors[1:], strict=False):
        gains = rest[f"{branch.norm}.weight"] + layout.gain
        turned_rest[f"{branch.norm}.weight"] = torch.full((width,), 1.0 - layout.gain)
        for reader in branch.readers:
            whole = linears[reader.name]
            turned_linears[reader.name] = LowRank(before((gains[:, None] * whole.rows).t()).t(), whole.columns)
        whole = linears[branch.writer.name]
        turned_linears[branch.writer.name] = LowRank(whole.rows, after(whole.columns))
        name = f"{branch.part}_shortcut"
        turned_linears[name] = lambda value, before=before, after=after: after(before(value))  # type: ignore[misc]
        shortcuts.append(Linear(name, block.name, block.index, width, width, False))
    turned = bare_copy(module)
    add_shortcuts(turned, layout.named)
    call = tracer.calls[block.index]
    wanted = _run(tracer, call, block, module, linears, rest, values)
    hollow = Block(block.index, block.name, (*block.linears, *shortcuts))
    try:
        found = _run(tracer, call, hollow, turned, turned_linears, turned_rest, mirrors[0](values))
    except (TypeError, RuntimeError, AttributeError, ValueError):  # what the family's own code stumbles over
        return False
    if not (isinstance(wanted, Tensor) and isinstance(found, Tensor)):
        return False
    return float((mirrors[-1](found) - wanted).abs().max()) <= _SAME * float(wanted.abs().max())


def _run(
    tracer: Tracer,
    call: Call,
    block: Block,
    module: nn.Module,
    linears: Mapping[str, Answer],
    rest: Mapping[str, Tensor],
    values: Tensor,
) -> Any:
    parameters = {name: nn.Parameter(value.to(tracer.device)) for name, value in rest.items()}
    with tracer.stubs(block, module, linears, parameters):
        return call.replay(module, values.to(tracer.device))
