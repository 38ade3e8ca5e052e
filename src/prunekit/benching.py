"""`bench`: how fast and how large a model is, next to another; every figure with its spread, ratios repetition by repetition.

Both models are timed in this process, in turn. The peak of memory is taken from a process of its own for each, which does nothing but
load the model and answer once; what Python and the libraries take in it is given beside.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import machine
from .errors import PrunekitError
from .evaluation.speed import Round, Spread, draw_prompt, measure, one_round, prompt_length
from .footprint import Footprint, measure_footprint, runtime_advice
from .loading import DENSE, load_model, resolve_place
from .model.source import StreamedModel
from .progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIGURES = ("prefill", "first_token", "decode")


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that loads a model and answers once: before it loads, and at most. `device` is the peak on a GPU, or None."""

    before: int
    peak: int
    device: int | None


@dataclass(frozen=True)
class Measured:
    """One model's figures. `rounds` are its repetitions; `advice` says which runtime would use its zeros."""

    model: str
    footprint: Footprint
    memory: Memory
    rounds: list[Round]
    advice: str

    def spread(self, figure: str) -> Spread:
        """Median, lowest and highest of `prefill`, `first_token` or `decode`."""
        return Spread.of([getattr(taken, figure) for taken in self.rounds])

    def summary(self) -> dict[str, Any]:
        """The model's figures in `--json`."""
        return {
            "model": self.model,
            "prefill_tokens_per_second": asdict(self.spread("prefill")),
            "first_token_seconds": asdict(self.spread("first_token")),
            "decode_tokens_per_second": asdict(self.spread("decode")),
            "memory": asdict(self.memory),
            **asdict(self.footprint),
            "sparsity": self.footprint.sparsity,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        measured: the model, and the one it was measured against where there was one.
        prompt, tokens: lengths of the prompt and of what was decoded behind its first token.
        warmup: rounds of each model that do not count.
        dtype, device, threads: of the computation.
        runtime: of the model (not of the other).
    """

    measured: list[Measured]
    prompt: int
    tokens: int
    warmup: int
    dtype: str
    device: str
    threads: int
    runtime: str

    def ratio(self, figure: str) -> Spread:
        """The model's figure divided by the other's, of each repetition: median, lowest, highest."""
        ours, theirs = ([getattr(taken, figure) for taken in found.rounds] for found in self.measured)
        return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        first, *others = self.measured
        return {
            **first.summary(),
            "against": others[0].summary() if others else None,
            "ratios": {figure: asdict(self.ratio(figure)) for figure in _FIGURES} if others else None,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "repetitions": len(first.rounds),
            "warmup": self.warmup,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "runtime": self.runtime,
        }


def bench_folders(
    folders: list[tuple[str, Path]],
    *,
    prompt: int | None,
    tokens: int,
    repetitions: int,
    warmup: int,
    dtype: str = "auto",
    device: str = "auto",
    runtime: str = DENSE,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Measure one folder, or two in turn.

    Args:
        folders: what the user calls them, and where they are; `runtime` is that of the first.
        prompt: tokens of the prompt; 512, or what the models' positions leave.
        tokens: to decode behind the first.
        repetitions, warmup: rounds of each model that count, and before those.
        dtype, device, runtime, trust_remote_code: as for `load`.
        progress: told what is going on.

    Raises:
        InputError: something in the input is wrong.
    """
    progress = progress or Silent()
    place = str(resolve_place(device, runtime))
    sources = [
        StreamedModel.open(folder, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        for _, folder in folders
    ]
    length = min(prompt_length(source.module.config, prompt, tokens) for source in sources)
    ids = draw_prompt(min(source.module.get_input_embeddings().weight.shape[0] for source in sources), length)
    ways = [runtime, DENSE][: len(folders)]

    def load(folder: Path, way: str) -> PreTrainedModel:
        return load_model(folder, dtype=dtype, device=place, runtime=way, trust_remote_code=trust_remote_code)

    models = [load(folder, way) for (_, folder), way in zip(folders, ways, strict=True)]
    progress.start("timing", len(models) * (warmup + repetitions))
    rounds = measure(models, ids, tokens=tokens, repetitions=repetitions, warmup=warmup, step=progress.step)
    progress.stop()
    models.clear()
    machine.let_go()
    measured = []
    for (name, folder), source, way, taken in zip(folders, sources, ways, rounds, strict=True):
        progress.say(f"weighing {name}")
        options = {"dtype": dtype, "device": place, "runtime": way, "trust_remote_code": trust_remote_code}
        memory = _memory_in_child({"folder": str(folder), "prompt": ids.tolist(), "tokens": tokens, "options": options})
        footprint = measure_footprint(source)
        measured.append(Measured(name, footprint, memory, taken, runtime_advice(footprint)))
    return Bench(
        measured=measured,
        prompt=length,
        tokens=tokens,
        warmup=warmup,
        dtype=str(sources[0].dtype).removeprefix("torch."),
        device=place,
        threads=torch.get_num_threads(),
        runtime=runtime,
    )


def _memory_in_child(asked: dict[str, Any]) -> Memory:
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PrunekitError(
            f"measuring the memory of '{asked['folder']}' in a process of its own failed (exit code {done.returncode}): {reason}"
        )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _memory(asked: dict[str, Any]) -> Memory:
    """What loading a model and answering once takes in this process."""
    before = machine.rss_bytes()
    model = load_model(Path(asked["folder"]), **asked["options"])
    one_round(model, torch.tensor(asked["prompt"]), asked["tokens"])
    device = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    return Memory(before, machine.peak_rss_bytes(), device)


if __name__ == "__main__":
    print(json.dumps(asdict(_memory(json.load(sys.stdin)))))  # noqa: T201
