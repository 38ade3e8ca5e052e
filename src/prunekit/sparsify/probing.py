"""Which output of one linear feeds which input of another, found by running a block whose linears are stubs.

A stub returns what it is told, whatever it is fed. So a change in what one stub returns is seen by exactly those linears that its
output reaches without passing through another linear. Only the first token is looked at: it attends to itself alone, with a weight
of one, so that queries and keys do not reach what attention returns for it, and values do so channel by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..model.anatomy import Block, Linear
from ..model.modules import hollow

# A probed output is in the lower range or, changed, in the upper one. Both are positive, where no activation is flat, and far enough
# apart to be told from each other in bfloat16 behind one.
_LOW, _HIGH = (0.5, 0.75), (1.25, 1.5)
_CHANGED = 0.02


class Stubs:
    """A block whose linears, while it is entered, return made-up outputs and note their inputs."""

    def __init__(self, block: Block, module: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        self._linears = block.linears
        self._module = module
        self._run = run
        self._hollow = ExitStack()
        self._outputs: Mapping[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._tokens = 0

    def __enter__(self) -> Stubs:
        with ExitStack() as stack:
            stack.enter_context(hollow(self._module, self._linears, self._answer))
            self._begin()
            self._hollow = stack.pop_all()
        return self

    def _begin(self) -> None:
        self._run(self._module)  # with zeros for outputs, to learn how many tokens there are
        self._tokens = max(map(len, self._inputs.values()))
        draw = torch.Generator().manual_seed(0)
        self._low = {name: _uniform(*_LOW, value, draw) for name, value in self.random_outputs(draw).items()}
        self._high = {name: _uniform(*_HIGH, value, draw) for name, value in self._low.items()}
        self._base = self.inputs(self._low)

    def __exit__(self, *_: object) -> None:
        self._hollow.close()

    def _answer(self, name: str, inputs: Tensor) -> Tensor:
        self._inputs[name] = inputs.reshape(-1, inputs.shape[-1]).clone()
        width = next(linear.out_features for linear in self._linears if linear.name == name)
        if name not in self._outputs or len(self._inputs[name]) != self._tokens:  # one that is fed other than tokens
            return inputs.new_zeros(*inputs.shape[:-1], width)
        return self._outputs[name].to(inputs).reshape(*inputs.shape[:-1], width)

    def random_outputs(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Normal outputs for all stubs, [tokens, out] by name."""
        return {linear.name: torch.randn(self._tokens, linear.out_features, generator=draw) for linear in self._linears}

    def inputs(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every stub is fed, [tokens, in] by name, while the stubs return `outputs` [tokens, out]."""
        self._outputs, self._inputs = outputs, {}
        self._run(self._module)
        return self._inputs

    def changed(self, producer: Linear, rows: Tensor) -> dict[str, Tensor]:
        """Which inputs of the first token of every stub, [in] bool by name, feel a change of some of `producer`'s outputs."""
        output = self._low[producer.name].clone()
        output[:, rows] = self._high[producer.name][:, rows]
        found = self.inputs({**self._low, producer.name: output})
        return {name: _differs(value[0], self._base[name][0]) for name, value in found.items() if name in self._base}

    def reached_by(self, producer: Linear) -> set[Linear]:
        """The linears whose inputs for the first token feel a change of all of `producer`'s outputs."""
        changed = self.changed(producer, torch.arange(producer.out_features))
        return {linear for linear in self._linears if linear.name in changed and bool(changed[linear.name].any())}


def feeding_rows(stubs: Stubs, producer: Linear, consumer: Linear) -> Tensor | None:
    """The output rows of `producer` that feed each input of `consumer`, where every input has rows of its own kind.

    -> [parts, in] int64, rows ascending; or None where more rows reach an input, or not every input is reached by as many.
    Where the producer is as wide as several consumers (a fused gate and up), each stretch as wide as one may feed an input once.
    """
    width = consumer.in_features if producer.out_features % consumer.in_features == 0 else producer.out_features
    stretches = []
    for start in range(0, producer.out_features, width):
        rows = _row_of_each_input(stubs, producer, consumer, torch.arange(start, start + width))
        if rows is None:
            return None
        stretches.append(rows)
    found = torch.stack(stretches).sort(0).values  # -1, no row, comes first
    parts = (found >= 0).sum(0)
    if int(parts[0]) == 0 or not bool((parts == parts[0]).all()):
        return None
    return found[-int(parts[0]) :]


def _row_of_each_input(stubs: Stubs, producer: Linear, consumer: Linear, rows: Tensor) -> Tensor | None:
    """The one among `rows` that feeds each input, or −1: [in]. None where several feed one.

    Bit by bit of the row's number, the rows with that bit and then those without it are changed. An input that feels both has
    several rows; one that has a single row spells its number.
    """
    number = torch.arange(len(rows))
    feeding = torch.zeros(consumer.in_features, dtype=torch.int64)
    reached = torch.zeros(consumer.in_features, dtype=torch.bool)
    for bit in range(max(1, (len(rows) - 1).bit_length())):
        has = (number >> bit) & 1 == 1
        felt = stubs.changed(producer, rows[has])[consumer.name].cpu()
        felt_without = stubs.changed(producer, rows[~has])[consumer.name].cpu()
        if bool((felt & felt_without).any()):
            return None
        feeding += felt.long() << bit
        reached |= felt | felt_without
    # an input that only some of the bits reach spells a number past the end, or one the proof will refute
    return torch.where(reached, rows[feeding.clamp_max(len(rows) - 1)], -1)


def _differs(found: Tensor, base: Tensor) -> Tensor:
    return (found.float() - base.float()).abs() > _CHANGED * base.float().abs()


def _uniform(low: float, high: float, like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.empty_like(like).uniform_(low, high, generator=draw)
