"""The steps of a recovery, and all it takes to go on behind any of them in the same bits.

Which windows a step sees and what its dropout draws follows from the seed and the step's number, so no state of a random generator has
to be kept: adapters, the optimiser's moments, and the figures so far are all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..evaluation.perplexity import perplexity_of
from ..model.stream import Windows
from .loss import cross_entropy, loss_and_gradient
from .options import RecoveryOptions, rate_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 1024  # that go through the model together; a step adds up as many passes as it needs
POINTS = 10  # times the held-out windows are looked at on the way
_CLIP = 1.0  # norm of the gradient, as transformers' Trainer has it
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Training:
    """A model with adapters on its way.

    Attributes:
        losses: mean loss of every step's predictions.
        curve: step -> perplexity on the held-out windows behind it; that of step 0 is from before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        windows: Windows,
        held: Windows,
        options: RecoveryOptions,
        dense: PreTrainedModel | None,
    ) -> None:
        assert options.steps is not None
        assert options.warmup is not None
        self._model = model
        self._parameters = dict(parameters)
        self._windows = windows
        self._held = held
        self._options = options
        self._dense = dense
        self._steps, self._warmup = options.steps, int(options.warmup)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=options.rate, weight_decay=0.0)
        self.losses: list[float] = []
        self.curve: dict[int, float] = {}

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    @property
    def due(self) -> bool:
        """Whether it is time to look at the held-out windows."""
        stride = max(1, self._steps // POINTS)
        return self.step not in self.curve and (self.step % stride == 0 or self.step == self._steps)

    def look(self) -> float:
        """Perplexity on the held-out windows, noted in `curve`."""
        self._model.eval()
        self.curve[self.step] = held_out_perplexity(self._model, self._held)
        self._model.train()
        return self.curve[self.step]

    def advance(self) -> float:
        """One step; returns its loss. Raises `InputError` where that is not finite."""
        torch.manual_seed(_number(self._options.seed, "dropout", self.step))
        share = rate_share(self.step, self._steps, self._warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate * share
        ids = self._windows.ids[self._order()]
        predictions = len(ids) * (self._windows.length - 1)
        loss = sum(self._pass(part, 1 / predictions) for part in passes(ids)) / predictions
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), _CLIP))
        if not math.isfinite(loss + norm):
            raise InputError(
                f"loss {loss:g} with a gradient of norm {norm:g} in step {self.step + 1}: try --dtype float32, or a smaller --rate"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss)
        return loss

    def _pass(self, ids: Tensor, scale: float) -> float:
        """Forward and backward of a few windows; returns the sum of their losses."""
        ids = ids.to(self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits
        if self._dense is None:
            loss, gradient = loss_and_gradient(logits, ids, scale=scale)
        else:
            with torch.inference_mode():
                wanted = self._dense(input_ids=ids, use_cache=False).logits
            loss, gradient = loss_and_gradient(logits, ids, wanted, share=self._options.distill_share, scale=scale)
        logits.backward(gradient)
        return loss

    def _order(self) -> list[int]:
        """The windows of the next step: one random order of all of them after the other."""
        count = len(self._windows)
        places = range(self.step * self._options.batch, (self.step + 1) * self._options.batch)
        return [_permutation(self._options.seed, place // count, count)[place % count] for place in places]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, by name."""
        found = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "curve": torch.tensor([*self.curve.items()], dtype=torch.float64).reshape(-1, 2),
        }
        for name, parameter in self._parameters.items():
            found[name] = parameter.detach()
            state = self._optimizer.state[parameter]
            found |= {f"{name}/{moment}": state[moment] for moment in _MOMENTS}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on behind the step after which `tensors` were taken."""
        self.losses = tensors["losses"].tolist()
        self.curve = {int(step): perplexity for step, perplexity in tensors["curve"].tolist()}
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
            moments = {moment: tensors[f"{name}/{moment}"] for moment in _MOMENTS}
            self._optimizer.state[parameter] = {
                moment: tensor if moment == "step" else tensor.to(parameter.device)
                for moment, tensor in moments.items()
            }


def passes(ids: Tensor) -> tuple[Tensor, ...]:
    """Windows [windows, length] in parts that go through the model together."""
    return torch.split(ids, max(1, PASS_TOKENS // ids.shape[1]))


@torch.inference_mode()
def held_out_perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Perplexity of a whole model in eval mode, as `evaluate` defines it. Raises `InputError` where it is not a number."""
    total = 0.0
    for part in passes(windows.ids):
        ids = part.to(model.device)
        total += cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)
    if not math.isfinite(total):
        raise InputError(f"the model's logits are NaN or infinite in {model.dtype}: try --dtype float32")
    predictions = len(windows) * (windows.length - 1)
    return perplexity_of(torch.tensor([total], dtype=torch.float64), predictions)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(_number(seed, "order", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _number(seed: int, purpose: str, place: int) -> int:
    """A seed that differs with each of its parts."""
    return random.Random(f"{seed}/{purpose}/{place}").getrandbits(63)
