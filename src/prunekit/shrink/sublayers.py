"""Sublayers: the attention, or the multilayer perceptron, of a block as a whole. What goes with one is found by trying, as units are.

Where a sublayer is gone nothing is added to the stream in its place. A stub (`resizing.Removed`) stands for its module; norms that
nothing else reads go with it. That a hollow block then computes what it computes with the sublayer's output at zero, and hands on
what it is given when it has no sublayer left, is seen to here, and a model that does not is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear
from ..model.modules import evaluating
from ..model.resizing import Removed
from .plan import Plan, Structures
from .units import (
    ATTENTION,
    MLP,
    TOKENS,
    Answer,
    Slices,
    Structure,
    Sublayer,
    Tracer,
    feels_earlier_tokens,
    gradients_of,
    likeness,
    near,
    shared_path,
)

_ADDS_NOTHING: Mapping[str, Any] = {"returns": None, "outputs": 0, "empty": None}
_HANDS_ON: Mapping[str, Any] = {"returns": 0, "outputs": 0, "empty": None}

Modules = Mapping[str, Mapping[str, Any]]


class _UnlikeError(Exception):
    """A block is not made of sublayers that can be left out."""


def find_sublayers(model: Any, anatomy: Anatomy, structures: Structures) -> list[tuple[Structure, ...]]:
    """The structures of every block of a causal language model, which may lie on the meta device, with what goes where none of their
    units stays; a sublayer without units of its own is a structure of one.

    Raises `InputError` where a block computes something else without its sublayers than with nothing added in their place.
    """
    known: dict[Any, tuple[Structure, ...]] = {}
    found = []
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        tracer = Tracer(model, anatomy)
        for block, units in zip(anatomy.blocks, structures, strict=True):
            module = model.get_submodule(block.name)
            alike = likeness(block, module)
            if alike not in known:
                try:
                    known[alike] = _Tried(tracer, block, module).structures(units)
                except _UnlikeError as problem:
                    raise InputError(
                        f"{type(model).__name__} cannot lose single sublayers: {problem}; take a method that removes units or blocks"
                    ) from None
            linears = {linear.name: linear for linear in block.linears}
            own = {each.name: each for each in units}
            found.append(
                tuple(
                    replace(
                        own.get(each.name, each), block=block.index, consumer=linears[each.name], sublayer=each.sublayer
                    )
                    for each in known[alike]
                )
            )
    return found


def plan_without(
    structures: Structures, parameters: Sequence[int], ratio: Fraction, order: Sequence[Structure]
) -> Plan:
    """The plan that leaves out sublayers, the first of `order` first, until `ratio` of the blocks' parameters is met as nearly as
    whole sublayers can; a block whose sublayers all go, goes. The last of `order` stays.

    Raises `InputError` where no sublayer would go, or all of them would have to.
    """
    target = round(ratio * sum(parameters))
    plan, removed = Plan.whole(structures), 0
    for number, each in enumerate(order):
        blocks = list(plan.blocks)
        kept = {**(blocks[each.block] or {}), each.name: ()}
        blocks[each.block] = kept if any(kept.values()) else None
        more = Plan(tuple(blocks))
        reached = more.removed(structures, parameters)
        if reached - target >= target - removed:
            if target and not removed:
                raise InputError(
                    f"ratio {float(ratio):g} asks for {target:,} parameters, less than half of a sublayer of {reached:,}: ask for "
                    f"{math.ceil(500 * reached / sum(parameters)) / 1000:g} or more"
                )
            return plan
        if number == len(order) - 1:
            raise InputError(
                f"ratio {float(ratio):g} asks for {target:,} parameters, and at most {removed:,} can go while one of {len(order)} "
                f"sublayers stays: ask for at most {math.floor(1000 * removed / sum(parameters)) / 1000:g}"
            )
        plan, removed = more, reached
    return plan


@contextmanager
def left_out(module: nn.Module, structures: Collection[Structure]) -> Iterator[None]:
    """Let a block compute without some of its sublayers for the time being."""
    names = {name: answer for each in structures if each.sublayer for name, answer in each.sublayer.modules.items()}
    with _replaced(module, names):
        yield


@contextmanager
def _replaced(module: nn.Module, names: Modules) -> Iterator[None]:
    before = {name: module.get_submodule(name) for name in names}
    try:
        for name, answer in names.items():
            _put(module, name, Removed(before[name], **answer))
        yield
    finally:
        for name, child in before.items():
            _put(module, name, child)


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, child)


@dataclass(frozen=True)
class _Consumer:
    """A linear that ends a sublayer.

    Attributes:
        producers: linears that feed it.
        kind: `attention` or `mlp`.
        reads: linears whose outputs have reached what its producers are fed.
    """

    linear: Linear
    producers: tuple[str, ...]
    kind: str
    reads: frozenset[str]


class _Tried:
    """The sublayers of one block, found by running it hollow."""

    def __init__(self, tracer: Tracer, block: Block, module: nn.Module) -> None:
        self._tracer = tracer
        self._block = block
        self._module = module
        self._outputs, self._rest = tracer.made_up(block, module)
        self._hidden = tracer.random(1, TOKENS, tracer.width)
        # so that what comes out of a linear depends on what goes in, which made-up outputs do not
        self._maps: dict[str, Answer] = {
            linear.name: partial(_spread, tracer.random(linear.in_features), tracer.random(linear.out_features))
            for linear in block.linears
        }

    def structures(self, units: Sequence[Structure]) -> tuple[Structure, ...]:
        consumers = self._consumers()
        own = {each.name: each for each in units}
        kinds = sorted(each.kind for each in consumers)
        if not consumers or len(set(kinds)) < len(kinds):
            raise _UnlikeError(f"block {self._block.index} is not one attention and one perceptron")
        ends = {each.linear.name for each in consumers}
        modules = {each.linear.name: self._modules(each) for each in consumers}
        found = []
        for each in consumers:
            sublayer = self._sublayer(each, modules[each.linear.name], ends)
            found.append(replace(own.get(each.linear.name) or _whole(each, self._block), sublayer=sublayer))
        everything = {name: answer for some in modules.values() for name, answer in some.items()}
        if not near(self._output(everything), self._hidden):
            raise _UnlikeError(f"block {self._block.index} does something to its stream besides adding to it")
        return tuple(sorted(found, key=lambda structure: structure.kind != ATTENTION))

    def _consumers(self) -> list[_Consumer]:
        """Linears that see the stream through other linears only, the last of each sublayer."""
        traced, _ = self._run(self._outputs)
        felt = {name: self._felt(value) for name, value in traced.items()}
        reached = {name: {each for each in some if each in self._outputs} for name, some in felt.items()}
        inside = {name: some for name, some in reached.items() if some and "" not in felt[name]}
        last = {name for name in inside if not any(name in some for some in inside.values())}
        found = []
        for linear in self._block.linears:
            if linear.name in last:
                producers = tuple(each for each in self._outputs if each in inside[linear.name])
                reads = frozenset(each for producer in producers for each in reached[producer])
                found.append(_Consumer(linear, producers, self._kind(traced[linear.name], producers), reads))
        return found

    def _felt(self, value: Tensor) -> set[str]:
        """Names of the made-up values that something depends on; that of the stream is empty."""
        leaves = {"": self._hidden, **self._outputs, **self._rest}
        weighted = (value * self._tracer.random(*value.shape).detach()).sum()
        if not weighted.requires_grad:
            return set()
        return {name for name, gradient in gradients_of(weighted, leaves).items() if bool((gradient != 0).any())}

    def _kind(self, value: Tensor, producers: Sequence[str]) -> str:
        last = value.reshape(-1, value.shape[-1])[-1].sum()
        mixes = feels_earlier_tokens(last, {name: self._outputs[name] for name in producers})
        return ATTENTION if mixes else MLP

    def _modules(self, consumer: _Consumer) -> dict[str, Mapping[str, Any]]:
        """The modules that make up a sublayer, and how a stub answers in the place of each."""
        name = consumer.linear.name
        path = shared_path([name, *consumer.producers])
        if not path:  # its linears are the block's own
            return {**dict.fromkeys(consumer.producers, _HANDS_ON), name: {**_ADDS_NOTHING, "empty": "weight"}}
        calls: list[tuple[tuple[Any, ...], Any, int]] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs = len(output) if isinstance(output, tuple) else 0
            # some blocks go on to add to it in place
            calls.append(((*args, *kwargs.values()), first.clone() if isinstance(first, Tensor) else None, outputs))

        handle = self._module.get_submodule(path).register_forward_hook(see, with_kwargs=True)
        try:
            self._output({}, silent=name)
        finally:
            handle.remove()
        (given, first, outputs), *more = calls
        if more or first is None or not given or not isinstance(given[0], Tensor):
            raise _UnlikeError(f"'{path}' of block {self._block.index} is not called once with the stream it reads")
        returns = None
        if bool(first.any()) or first.shape != given[0].shape:
            alike = (
                place for place, value in enumerate(given) if isinstance(value, Tensor) and value.shape == first.shape
            )
            returns = next((place for place in alike if near(given[place], first)), None)
            if returns is None:
                raise _UnlikeError(
                    f"'{path}' of block {self._block.index} returns something when its last linear returns zeros"
                )
        return {path: {"returns": returns, "outputs": outputs, "empty": name.removeprefix(f"{path}.") + ".weight"}}

    def _sublayer(
        self, consumer: _Consumer, modules: Mapping[str, Mapping[str, Any]], ends: Collection[str]
    ) -> Sublayer:
        name, index = consumer.linear.name, self._block.index
        norms = self._norms(modules)
        stubs: dict[str, Mapping[str, Any]] = {**modules, **dict.fromkeys(norms, _HANDS_ON)}
        if not near(self._output(stubs), self._output({}, silent=name)):
            raise _UnlikeError(f"block {index} computes something else without what ends in '{name}'")
        gone = {
            path: tensor.numel()
            for path, tensor in self._module.named_parameters()
            if any(path.startswith(f"{each}.") for each in stubs)
        }
        reads = consumer.reads & set(ends)
        return Sublayer(stubs, frozenset(gone), sum(gone.values()), reads)

    def _norms(self, modules: Modules) -> list[str]:
        """Modules whose parameters nothing depends on any more where some modules are gone."""
        traced, output = self._run(self._outputs, modules)
        felt = self._felt(output).union(*map(self._felt, traced.values()))
        dead: dict[str, bool] = {}
        for name in self._rest:
            if not within(name, modules):
                path = name.rpartition(".")[0]
                dead[path] = dead.get(path, True) and name not in felt
        return [path for path, all_of_it in dead.items() if path and all_of_it]

    def _output(self, modules: Modules, *, silent: str | None = None) -> Tensor:
        """What the block returns with stubs for some modules, or with zeros from one of its linears."""
        answers = dict(self._maps)
        if silent is not None:
            linear = next(each for each in self._block.linears if each.name == silent)
            answers[silent] = partial(_nothing, linear.out_features)
        with torch.no_grad():
            return self._run(answers, modules)[1]

    def _run(self, answers: Mapping[str, Answer], modules: Modules | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """What every linear is fed, and what the block returns, with stubs for some modules."""
        call = self._tracer.calls[self._block.index]
        with (
            self._tracer.stubs(self._block, self._module, answers, self._rest) as inputs,
            _replaced(self._module, modules or {}),
        ):
            output = call.replay(self._module, self._hidden)
        return inputs, output[0] if isinstance(output, tuple) else output


def within(name: str, modules: Collection[str]) -> bool:
    """Whether something named is one of some modules, or in one."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _spread(reads: Tensor, writes: Tensor, value: Tensor) -> Tensor:
    """A made-up linear of rank one."""
    return (value @ reads / len(reads))[..., None] * writes


def _nothing(width: int, value: Tensor) -> Tensor:
    return value.new_zeros(*value.shape[:-1], width)


def _whole(consumer: _Consumer, block: Block) -> Structure:
    """A structure whose only unit is all of it."""
    linear = consumer.linear
    columns = Slices(
        f"{linear.name}.weight",
        0 if linear.transposed else 1,
        torch.arange(linear.in_features)[None],
        linear.out_features,
    )
    return Structure(block.index, consumer.kind, linear, 1, (columns,))
