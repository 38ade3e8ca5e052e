"""What a generation is asked for, and the choice of the next token."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..errors import PrunekitError
from ..settings import Section

# The types of fields here and in the requests a server takes: one set of limits for both.
Tokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[tuple[Stop, ...], Field(max_length=16)]

# Where two logits differ at all, dividing by less makes the lower one's probability zero.
_GREEDY = 1e-6


class Sampling(Section):
    """How text is generated.

    Attributes:
        max_tokens: to generate at most; None leaves it to what generates.
        temperature: what logits are divided by; 0 takes the likeliest token every time.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: of the draws; None draws differently every time.
        stop: strings that end the text, which then has what is before the first of them.
    """

    holder: ClassVar[str] = "a generation"

    max_tokens: Tokens | None = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Stops = ()


class Chooser:
    """Chooses one token after the other. Made anew for every text, because the seed counts from its beginning."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature < _GREEDY:
            return
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, logits: Tensor) -> int:
        """The token chosen by `logits` [vocabulary]. Raises `PrunekitError` where they are no numbers."""
        scores = logits.float()
        if not math.isfinite(scores.max()):
            raise PrunekitError(
                "the model's logits are not finite: its weights are damaged, or its dtype is too narrow for it; try --dtype float32"
            )
        if self._generator is None:
            return int(scores.argmax())
        warped = self._warpers(None, scores[None])
        return int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
