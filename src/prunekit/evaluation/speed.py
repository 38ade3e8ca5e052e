"""How fast a model that is in memory answers: prefill, time to first token, decoding, repetition by repetition.

Several models are timed in turn, one repetition of each after the other and every second time in reverse, so that what else the
machine does slows all of them alike; only figures of the same repetition are divided by each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..model.anatomy import longest_context, only_last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEFAULT_PROMPT = 512


@dataclass(frozen=True)
class Spread:
    """The median of repetitions, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """One repetition.

    Attributes:
        prefill: prompt tokens per second of the forward pass that fills the cache; logits of the last position only, where the model
            can leave out the others.
        first_token: seconds from the prompt's token ids to the first chosen token: the prefill, and the choice.
        decode: tokens per second behind the first, one by one, each the likeliest.
    """

    prefill: float
    first_token: float
    decode: float


def prompt_length(config: PreTrainedConfig, asked: int | None, tokens: int) -> int:
    """Tokens of the prompt: as asked, or 512, or what the model's positions leave. Raises `InputError`."""
    if tokens < 1:
        raise InputError(f"tokens {tokens} is no number of tokens to decode: give 1 or more")
    longest = longest_context(config)
    length = (
        min(DEFAULT_PROMPT, longest - tokens if longest is not None else DEFAULT_PROMPT) if asked is None else asked
    )
    if length < 1 or (longest is not None and length + tokens > longest):
        raise InputError(
            f"a prompt of {length} and {tokens} tokens behind it do not fit the model's {longest} positions: give a smaller "
            "--prompt or --tokens, both at least 1"
        )
    return length


def draw_prompt(vocabulary: int, length: int) -> Tensor:
    """Token ids [1, length], the same every time: how long dense products take does not depend on them."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def measure(
    models: Sequence[PreTrainedModel],
    prompt: Tensor,
    *,
    tokens: int,
    repetitions: int,
    warmup: int,
    step: Callable[[], None] = lambda: None,
) -> list[list[Round]]:
    """Time models in turn: for each model its rounds, in the order they were taken, warm-up rounds left out.

    Args:
        models: in eval mode; each on its own device.
        prompt: token ids [1, length].
        tokens: to decode behind the first.
        repetitions: that count, of each model.
        warmup: rounds of each model before those.
        step: called after each model's round.

    Raises:
        InputError: there is nothing to measure.
    """
    if repetitions < 1 or warmup < 0:
        raise InputError(
            f"{repetitions} repetitions after {warmup} to warm up measure nothing: give 1 or more, after 0 or more"
        )
    rounds: list[list[Round]] = [[] for _ in models]
    for number in range(warmup + repetitions):
        for place in range(len(models))[:: 1 if number % 2 == 0 else -1]:
            taken = one_round(models[place], prompt, tokens)
            if number >= warmup:
                rounds[place].append(taken)
            step()
    return rounds


@torch.inference_mode()
def one_round(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Round:
    """One prefill of `prompt` [1, length], and `tokens` tokens behind the first."""
    ids = prompt.to(model.device)
    only_last = only_last_logits(model)
    begun = _now(model.device)
    output = model(input_ids=ids, use_cache=True, **only_last)
    filled = _now(model.device)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(model.device)
    for _ in range(tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    ended = _now(model.device)
    return Round(ids.shape[1] / (filled - begun), first - begun, tokens / (ended - first))


def _now(device: torch.device) -> float:
    """The time when everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
