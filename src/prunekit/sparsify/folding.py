"""Where input channels can change places without changing what a block computes: their producers' rows change places with them.

The inputs of `down_proj` are outputs of `gate_proj` and `up_proj`, channel by channel; those of `o_proj` are mixtures over tokens of
outputs of `v_proj`, within each head. No family is known by name here. Each block is tried: its linears are replaced by stubs that
return made-up outputs, and what then arrives at the others shows which output feeds which input. Every space found that way is
proved with the real weights before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..bits import row_chunks
from ..model.anatomy import Block, Linear, Stored, in_module
from ..statistics import Statistics
from .permutation import channel_permutation
from .probing import Stubs, feeding_rows

Run = Callable[[nn.Module], Tensor]

# how far a block's tensors may move, relative to their norm, when its channels are permuted: sums in another order, nothing else
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_ROUNDING = 2e-2


@dataclass(frozen=True, eq=False)
class Space:
    """Input channels of a linear that may change places, and the outputs of other linears that must go with them.

    A slot is what moves: the channels fed by one output row, such as those of all query heads that share a value head. Slots move
    within windows of `width` neighbouring slots, such as a head; all slots of a multilayer perceptron are one window.

    Attributes:
        channels: the consumer's inputs by slot, [slots, repeats].
        producers: linears, and their output rows by slot, [slots, parts] (two parts where gate and up are one matrix).
    """

    consumer: Linear
    channels: Tensor
    producers: tuple[tuple[Linear, Tensor], ...]
    width: int

    def fits(self, group: int) -> bool:
        """Whether groups of `group` inputs never straddle windows, so that an order within a window is an order within groups."""
        places = self.channels.reshape(-1, self.width, self.channels.shape[1])
        first = places[:, :1]
        whole = torch.equal(places, first + torch.arange(self.width)[None, :, None].expand_as(places))
        return whole and self.width % group == 0 and not bool((first % group).any())

    def order(self, scores: Tensor, keep: int, group: int, *, refine: bool = True) -> Tensor:
        """The order of slots in which keep:group retains the most of the consumer's scores; the identity where groups do not fit.

        Shapes: scores [out, in] float -> [slots] int64 on the processor: new slot j is the old slot `order[j]`.
        """
        result = torch.arange(len(self.channels))
        if not self.fits(group):
            return result
        for window in torch.split(result.clone(), self.width):
            # channels that move together are further rows of one matrix [repeats · out, width]
            together = torch.cat([scores[:, self.channels[window, part]] for part in range(self.channels.shape[1])])
            result[window] = window[channel_permutation(together, keep, group, refine=refine).cpu()]
        return result

    def input_order(self, order: Tensor) -> Tensor:
        """The consumer's inputs behind an order of slots, [in]: new input j is the old input `[j]`."""
        return _moved(self.consumer.in_features, self.channels, order)

    def output_order(self, producer: Linear, order: Tensor) -> Tensor:
        """A producer's outputs behind an order of slots, [out]: new output j is the old output `[j]`."""
        rows = next(rows for linear, rows in self.producers if linear == producer)
        return _moved(producer.out_features, rows, order)


def _moved(size: int, places: Tensor, order: Tensor) -> Tensor:
    result = torch.arange(size)
    result[places] = places[order]
    return result


def fold(space: Space, order: Tensor, *places: Stored) -> None:
    """Permute, in place, the consumer's columns and its producers' rows and biases.

    Shapes: order [slots]. A place gives a linear's weight as it is stored and its bias or None: one for the module that runs, one for
    the checkpoint's tensors. Where two places give the same memory, it is permuted once.
    """
    seen: set[int] = set()
    for place in places:
        weight, _ = place(space.consumer)
        _permute(space.consumer.matrix(weight).t(), space.input_order(order), seen)
        for producer, _ in space.producers:
            weight, bias = place(producer)
            rows = space.output_order(producer, order)
            _permute(producer.matrix(weight), rows, seen)
            if bias is not None:
                _permute(bias[:, None], rows, seen)


def _permute(matrix: Tensor, order: Tensor, seen: set[int]) -> None:
    if matrix.data_ptr() in seen:
        return
    seen.add(matrix.data_ptr())
    order = order.to(matrix.device)
    for columns in row_chunks(*matrix.t().shape):
        matrix[:, columns] = matrix[order, columns]


def permute_statistics(space: Space, order: Tensor, statistics: MutableMapping[str, Statistics]) -> None:
    """Replace the statistics (by a linear's name in its block) of the linears of a space by those they would have behind `fold`."""
    statistics[space.consumer.name] = statistics[space.consumer.name].permuted(space.input_order(order))
    for producer, _ in space.producers:
        rows = space.output_order(producer, order)
        statistics[producer.name] = statistics[producer.name].permuted_outputs(rows)


@torch.inference_mode()
def find_spaces(block: Block, module: nn.Module, run: Run) -> list[Space]:
    """The spaces of a block, each proved by permuting the real weights, which are then put back bit for bit.

    `run(module)` returns what the block makes of a few fixed hidden states [windows, tokens, hidden], the first token of which sees
    no other. It is called a few hundred times with stubs for linears, and once and once a space with the real ones. What a block
    hands to later blocks past its output (shared keys and values) is not seen.
    """
    found = _candidates(block, module, run)
    if not found:
        return []
    expected = _record(block, module, run)
    draw = torch.Generator().manual_seed(1)
    return [space for space in found if _holds(space, _draw_order(space, draw), module, block, run, expected)]


def _candidates(block: Block, module: nn.Module, run: Run) -> list[Space]:
    found: list[Space] = []
    draw = torch.Generator().manual_seed(0)
    with Stubs(block, module, run) as stubs:
        reached = {producer: stubs.reached_by(producer) for producer in block.linears}
        for consumer in block.linears:
            lanes: list[tuple[Linear, Tensor]] = []
            for producer in block.linears:
                if consumer in reached[producer]:
                    rows = feeding_rows(stubs, producer, consumer)
                    if rows is None:  # its outputs are mixed on the way (a norm): no channel has rows of its own
                        lanes = []
                        break
                    lanes.append((producer, rows))
            space = _slots(consumer, lanes)
            narrowed = None if space is None else _narrowed(space, stubs, draw)
            if narrowed is not None:
                found.append(narrowed)
    return found


def _slots(consumer: Linear, lanes: list[tuple[Linear, Tensor]]) -> Space | None:
    """Channels that one row feeds, taken together. Lanes are [parts, in]: the rows that feed each channel."""
    rows = [lane for _, parts in lanes for lane in parts]
    if not rows:
        return None
    shared = min(rows, key=lambda lane: len(torch.unique(lane)))
    _, slot, counts = torch.unique(shared, return_inverse=True, return_counts=True)
    if len(counts) < 2 or not bool((counts == counts[0]).all()):
        return None
    channels = torch.argsort(slot, stable=True).reshape(len(counts), -1)
    channels = channels[torch.argsort(channels[:, 0])]
    producers = []
    for producer, parts in lanes:
        # [slots, parts · repeats]; where all channels of a slot are fed by one row, that row stands there once
        fed_by = torch.cat([lane[channels] for lane in parts], dim=1)
        producers.append((producer, torch.unique(fed_by, dim=1)))
    return Space(consumer, channels, tuple(producers), len(channels))


def _narrowed(space: Space, stubs: Stubs, draw: torch.Generator) -> Space | None:
    """The space with the widest windows within which slots may be permuted, or None."""
    outputs = stubs.random_outputs(draw)
    before = stubs.inputs(outputs)[space.consumer.name]
    slots = len(space.channels)
    for width in (slots // parts for parts in range(1, slots // 2 + 1) if slots % parts == 0):
        narrower = Space(space.consumer, space.channels, space.producers, width)
        order = _draw_order(narrower, draw)
        moved = dict(outputs)
        for producer, _ in space.producers:
            moved[producer.name] = outputs[producer.name][..., space.output_order(producer, order)]
        after = stubs.inputs(moved)[space.consumer.name]
        if _close(after, before[:, space.input_order(order)], by_channel=True):
            return narrower
    return None


def _draw_order(space: Space, draw: torch.Generator) -> Tensor:
    windows = torch.split(torch.arange(len(space.channels)), space.width)
    return torch.cat([window[torch.randperm(len(window), generator=draw)] for window in windows])


def _holds(space: Space, order: Tensor, module: nn.Module, block: Block, run: Run, expected: dict[str, Tensor]) -> bool:
    """Whether, with the space's weights permuted, all that is computed stays as it was, but for the producers' outputs."""
    with _folded(space, order, module):
        found = _record(block, module, run)
    producers = {producer.name for producer, _ in space.producers}
    return all(_close(found[name], value) for name, value in expected.items() if name not in producers)


@contextmanager
def _folded(space: Space, order: Tensor, module: nn.Module) -> Iterator[None]:
    fold(space, order, in_module(module))
    try:
        yield
    finally:
        fold(space, torch.argsort(order), in_module(module))


def _record(block: Block, module: nn.Module, run: Run) -> dict[str, Tensor]:
    """What every linear of the block returns, by name, and what the block does, under the empty name."""
    seen: dict[str, Tensor] = {}

    def note(name: str, child: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output.clone()

    handles = [
        module.get_submodule(linear.name).register_forward_hook(partial(note, linear.name)) for linear in block.linears
    ]
    try:
        seen[""] = run(module).clone()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _close(found: Tensor, expected: Tensor, *, by_channel: bool = False) -> bool:
    allowed = _ROUNDING.get(expected.dtype, _COARSE_ROUNDING)
    found, expected = found.double(), expected.double()
    dim = 0 if by_channel else None
    far = torch.linalg.vector_norm(found - expected, dim=dim)
    return bool((far <= allowed * torch.linalg.vector_norm(expected, dim=dim)).all())
