"""What lies between the residual stream and the last linear of a multilayer perceptron: its norm and its gate, found by trying.

The block is run as in `units.py`, with stubs for its linears. Where every input of the last linear is made of two outputs, the
activation is the module whose output times one of them is that input; that one is called up, the other the gate. The norm is the module
whose output these linears are fed.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.anatomy import Anatomy, Block, weight_of
from ..model.modules import evaluating
from ..statistics import Watch
from .plan import Structures
from .units import MLP, Structure, Tracer, likeness, near

GATE, NORM = "gate", "norm"
AROUND = frozenset({GATE, NORM})  # what a score of units may need besides sums
_FAR = 16  # slopes that are steeper beyond it than before grow without end
_STEPS = 256  # values of an activation to a unit of its input


@dataclass(frozen=True, eq=False)
class Rows:
    """The outputs of a linear that belong to the channels of a perceptron, [channels] int64."""

    linear: str
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Gate:
    """The product a(g) ∘ u that the last linear is fed.

    Attributes:
        gate, up: where g and u come from.
        activation: name in the block of the module that computes a.
        slope: the Lipschitz constant of a.
    """

    gate: Rows
    up: Rows
    activation: str
    slope: float


@dataclass(frozen=True)
class Norm:
    """The RMS norm that feeds a perceptron.

    Attributes:
        name: in the block.
        reader: a linear that is fed what it returns.
        width: of the residual stream.
    """

    name: str
    reader: str
    width: int

    @torch.inference_mode()
    def gains(self, module: nn.Module) -> Tensor:
        """The absolute value of what it multiplies every channel by, [width] float32: of ones it makes its gains."""
        ones = weight_of(module.get_submodule(self.reader)).new_ones(1, self.width)
        gains: Tensor = module.get_submodule(self.name)(ones)
        return gains[0].float().abs()


@dataclass(frozen=True, eq=False)
class Perceptron:
    """What was asked for of a block's perceptron."""

    gate: Gate | None = None
    norm: Norm | None = None

    def watched(self, module: nn.Module) -> dict[str, Watch]:
        """The modules that are measured besides linears' inputs, by name in the block."""
        found: dict[str, Watch] = {}
        if self.gate is not None:
            for name in (self.gate.activation, self.gate.up.linear):
                found[name] = Watch(module.get_submodule(name), frozenset({"output_abs"}))
        if self.norm is not None:
            found[self.norm.name] = Watch(module.get_submodule(self.norm.name), frozenset({"inverse_rms"}), fed=True)
        return found


def find_perceptrons(
    model: Any, anatomy: Anatomy, structures: Structures, wanted: Set[str]
) -> tuple[Perceptron | None, ...]:
    """`GATE`, `NORM` or both of every block of a model, which may lie on the meta device; None where a block has no channels.

    Raises `InputError` where a perceptron has no gate, no activation that is a module and has a largest slope, or no RMS norm.
    """
    known: dict[Any, Perceptron] = {}
    found: list[Perceptron | None] = []
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        tracer = Tracer(model, anatomy)
        for block in anatomy.blocks:
            module = model.get_submodule(block.name)
            last = next((each for each in structures[block.index] if each.kind == MLP), None)
            if last is None:
                found.append(None)
                continue
            alike = likeness(block, module)
            if alike not in known:
                trial = _Trial(tracer, block, module, last)
                known[alike] = Perceptron(
                    trial.gate() if GATE in wanted else None, trial.norm() if NORM in wanted else None
                )
            found.append(known[alike])
    return tuple(found)


class _Trial:
    """One run of a block whose linears return made-up outputs, and what its modules were fed and returned."""

    def __init__(self, tracer: Tracer, block: Block, module: nn.Module, last: Structure) -> None:
        self._block, self._module, self._last = block, module, last
        self._outputs, rest = tracer.made_up(block, module)
        self._seen: list[tuple[str, Tensor, Tensor]] = []  # in the order they were called
        linears = {linear.name for linear in block.linears}
        handles = [
            child.register_forward_hook(self._note(name))
            for name, child in module.named_modules()
            if name not in linears and not any(child.children())
        ]
        hidden = tracer.random(1, len(self._outputs[last.name][0]), tracer.width)
        try:
            with tracer.stubs(block, module, self._outputs, rest) as self._fed:
                tracer.calls[block.index].replay(module, hidden)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                self._seen.append((name, _flat(inputs[0]), _flat(output)))

        return hook

    def _feeding(self) -> list[Rows]:
        """The outputs that every channel is made of."""
        weights = (part for part in self._last.slices[1:] if part.tensor.endswith(".weight"))
        return [Rows(part.tensor.removesuffix(".weight"), rows) for part in weights for rows in part.entries.t()]

    def gate(self) -> Gate:
        """The gate, or an `InputError` that says what is missing."""
        feeding, name = self._feeding(), self._last.consumer.full_name
        if len(feeding) != 2 or self._last.size != 1:
            raise InputError(
                f"score.gated=true is for multilayer perceptrons with a gate, and there is none in front of '{name}': leave it out"
            )
        product = _flat(self._fed[self._last.name])
        for gate, up in permutations(feeding):
            factor = _flat(self._outputs[up.linear])[:, up.rows]
            for activation, _, value in self._seen:
                if value.shape == product.shape and near(value * factor, product):
                    slope = steepest(self._module.get_submodule(activation))
                    if slope is None:
                        raise InputError(
                            f"score.gated=true wants an activation with a largest slope, and that of '{name}' has none: leave it out"
                        )
                    return Gate(gate, up, activation, slope)
        raise InputError(
            f"score.gated=true measures the activation behind the gate, and no module in front of '{name}' computes it: leave it out"
        )

    def norm(self) -> Norm:
        """The norm, or an `InputError` that says that it is none."""
        reader = self._feeding()[0].linear
        fed = _flat(self._fed[reader])
        for name, given, value in self._seen:
            if value.shape == given.shape == fed.shape and torch.equal(value, fed) and not torch.equal(value, given):
                unit = given / given.square().mean(-1, keepdim=True).sqrt()
                gains = (value * unit).sum(0) / unit.square().sum(0)
                if near(gains * unit, value):  # those of a LayerNorm are not the same for all tokens
                    return Norm(name, reader, fed.shape[-1])
        raise InputError(
            "score.norm=true is for an RMS norm right in front of a multilayer perceptron, and there is none in front of "
            f"'{self._block.name}.{reader}': leave it out"
        )


@torch.no_grad()
def steepest(activation: nn.Module) -> float | None:
    """The Lipschitz constant of an elementwise function to five digits, from its values between −32 and 32.

    None where it is steeper beyond ±16 than within, as one without a largest slope is.
    """
    values = torch.arange(-2 * _FAR * _STEPS, 2 * _FAR * _STEPS + 1, dtype=torch.float64) / _STEPS
    slopes = activation(values).diff().abs() * _STEPS
    within = slopes[_FAR * _STEPS : -_FAR * _STEPS].max()
    return float(within) if float(slopes.max()) <= float(within) * (1 + 1e-9) else None


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])
