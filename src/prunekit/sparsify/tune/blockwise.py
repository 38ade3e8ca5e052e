"""Block-wise reconstruction: the kept weights of a whole block, tuned to give the dense block's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ...parts import FOLLOWED, Limits, tune

# of Adam: decay of the squared gradients for a few dozen steps, and what keeps a gradient of 0 from being divided by
_DECAY, _SQUARED_DECAY, _TINY = 0.9, 0.95, 1e-12


Target = Literal["own", "dense"]


def _reads(target: Target, **_: float) -> set[str]:
    return {FOLLOWED} if target == "dense" else set()


@tune(paper="https://arxiv.org/abs/2402.12419", needs={FOLLOWED}, reads=_reads)
def blockwise(
    weights: Mapping[str, tuple[nn.Parameter, Tensor]],
    batches: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]],
    steps_an_epoch: int,
    sum_up: Callable[[list[Tensor]], None],
    *,
    epochs: Annotated[int, Limits(at_least=1)] = 1,
    rate: Annotated[float, Limits(above=0)] = 0.01,
    warmup: Annotated[float, Limits(at_least=0, at_most=1)] = 0.1,
    share: Annotated[float, Limits(above=0, at_most=1)] = 1.0,
    target: Target = "own",
) -> tuple[float, float]:
    """Descend the mean square between a pruned block's outputs and those that are wanted, masks held.

    Unlike the reconstructions of single linears this sees the block's attention, activation and residual, so that linears make up for
    each other. Adam on float32 copies, one step a batch; the step's length rises over the first `warmup` of the steps and falls to 0
    behind them; it is given as a share of the root mean square of each linear's kept weights, so that it means the same in every model.

    Args:
        weights: by linear, the parameter that runs, as stored [out, in] or transposed, and its keep-mask of the same shape.
        batches: every time it is called, the batches of an epoch: inputs, the block's outputs on them with the present weights
            (with gradients), the outputs wanted; each [windows, length, hidden], or [tokens, hidden] of
            the real tokens of padded windows.
        steps_an_epoch: how many they are, in the process that has the most.
        sum_up: adds up tensors over processes, in place.
        epochs, rate, warmup: see above.
        share: so many of the batches are descended on, in every epoch the first ones, which windows drawn at random make as good as
            any. A step costs three passes of a batch through the block, so this is most of what tuning costs.
        target: which outputs are wanted. `own`: what the block gave before it was pruned, for the same inputs. `dense`: what it gives
            in the dense model, so that blocks also make up for what was pruned before them, those that lose nothing too where units are
            removed; the dense model's hidden states go along, one more pass.

    Returns:
        The loss in the first and in the last batch, as a share of what the dense block changes its inputs by.

    Source: Guo et al. 2024 (EBFT), which this is a short form of.
    """
    steps_an_epoch = math.ceil(share * steps_an_epoch)
    states = [_Adam(parameter, keep, rate) for parameter, keep in weights.values()]
    total = epochs * steps_an_epoch
    losses: list[float] = []
    for epoch in range(epochs):
        given = iter(batches())
        for number in range(steps_an_epoch):
            batch = next(given, None)
            if batch is not None:  # else other processes have one more
                inputs, outputs, wanted = batch
                change = (wanted - inputs).float().square().sum().clamp_min(1e-30)
                loss = (outputs.float() - wanted.float()).square().sum() / change
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()))
            sum_up([state.gradient for state in states])
            step = epoch * steps_an_epoch + number + 1
            length = min(step / max(1.0, warmup * total), 1.0) * (1 - (step - 1) / total)
            for state in states:
                state.step(step, length)
    return losses[0], losses[-1]


class _Adam:
    """One weight's float32 copy and moments; what is removed has no gradient and stays 0."""

    def __init__(self, parameter: nn.Parameter, keep: Tensor, rate: float) -> None:
        self._parameter = parameter
        self._keep = keep
        self._exact = parameter.detach().float().clone()
        kept = max(1, int(keep.sum()))
        self._rate = rate * float(torch.linalg.vector_norm(self._exact)) / kept**0.5
        self._mean = torch.zeros_like(self._exact)
        self._square = torch.zeros_like(self._exact)

    @property
    def gradient(self) -> Tensor:
        """Of the last loss; zeros where the weight took no part in it."""
        if self._parameter.grad is None:
            self._parameter.grad = torch.zeros_like(self._parameter)
        return self._parameter.grad

    @torch.no_grad()
    def step(self, number: int, part: float) -> None:
        """Move by `part` of the rate."""
        gradient = self.gradient.float().mul_(self._keep)
        self._parameter.grad = None
        self._mean.lerp_(gradient, 1 - _DECAY)
        self._square.lerp_(gradient.square_(), 1 - _SQUARED_DECAY)
        length = self._rate * part * (1 - _SQUARED_DECAY**number) ** 0.5 / (1 - _DECAY**number)
        self._exact.addcdiv_(self._mean, self._square.sqrt().add_(_TINY), value=-length)
        self._parameter.copy_(self._exact)
