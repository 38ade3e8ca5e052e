"""What a recovery is asked for, checked; defaults are those of LLM-Pruner (https://arxiv.org/abs/2305.11627)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..errors import InputError
from ..settings import Section

_EPOCHS = 2
_WARMUP = 100  # steps, or a tenth of all where that is less


class RecoveryOptions(Section):
    """How a model is trained. Two recoveries with equal options on equal inputs give equal bytes."""

    holder: ClassVar[str] = "a recovery"

    data: str = Field(description="text source, as for calibration")
    steps: int | None = Field(None, ge=1, description=f"steps of the optimiser; default {_EPOCHS} times the windows")
    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: float = Field(16.0, gt=0, description="an adapter's product is multiplied by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of an adapter's inputs that is left out")
    targets: tuple[str, ...] = Field((), description="globs of the linears to tune; default all of the blocks")
    rate: float = Field(1e-4, gt=0, description="learning rate behind the warm-up; it falls to 0 linearly")
    warmup: float | None = Field(
        None, ge=0, description=f"steps, or below 1 a share; default {_WARMUP}, at most a tenth"
    )
    batch: int = Field(64, ge=1, description="windows a step")
    samples: int | None = Field(None, ge=1, description="windows to train on; default all of the text, within limits")
    length: int = Field(256, ge=2, description="tokens per window")
    distill: str | None = Field(None, description="dense model to learn from")
    distill_share: float = Field(0.5, gt=0, le=1, description="what its divergence counts for in the loss")
    checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    seed: int = Field(0, ge=0, description="seed of everything drawn at random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the passes")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    trust_remote_code: bool = Field(False, description="run code that the model folder brings")

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, warmup: float | None) -> float | None:
        if warmup is not None and warmup >= 1 and warmup != int(warmup):
            raise ValueError(f"warmup {warmup:g} is neither a whole number of steps nor a share below 1")
        return warmup

    @classmethod
    def of(cls, recovery: Mapping[str, Any]) -> RecoveryOptions:
        """Those of a manifest's section `recovery`."""
        return cls(**recovery["identity"]["options"], distill=recovery["distill"])

    def command(self, folder: str, out: str) -> str:
        """The command line that repeats it on the model in `folder`."""
        words = ["prunekit", "recover", folder]
        for name, value in self.model_dump().items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value is not None and value is not False and value != ():
                forms = {tuple: ",".join, float: "{:g}".format}
                words += [option, forms.get(type(value), str)(value)]
        return shlex.join([*words, "--out", out])

    def resolved(self, *, windows: int, dtype: str, device: str) -> RecoveryOptions:
        """The same with every default that depends on the input filled in. Raises `InputError`."""
        steps = self.steps or -(-_EPOCHS * windows // self.batch)
        warmup = min(_WARMUP, steps // 10)
        if self.warmup is not None:
            warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        if warmup >= steps:
            raise InputError(
                f"warmup {warmup} leaves nothing of {steps} steps: give a smaller --warmup or more --steps"
            )
        known = {"steps": steps, "warmup": float(warmup), "samples": windows, "dtype": dtype, "device": device}
        return self.model_copy(update=known)


def rate_share(step: int, steps: int, warmup: int) -> float:
    """What the rate of step `step` (from 0) is multiplied by: it rises linearly to 1, then falls to 0 behind the last step."""
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
