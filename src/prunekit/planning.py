"""What a run would take, before it is started: memory by phase and disk from the shapes, time from one block measured here."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import machine
from .calibration.windows import window_length
from .checkpoint.locate import locate
from .model.source import StreamedModel
from .model.stream import BATCH_TOKENS, Walk, Windows
from .progress import Progress
from .recipe import Recipe
from .sparsify.walk import parts_of


@dataclass(frozen=True)
class Plan:
    """An estimate, in bytes and seconds; nothing was written.

    Attributes:
        memory: peak by phase: `start` (embeddings and first hidden states), `walk`, `verify`; `peak` is the largest.
        memory_available: what this machine could give now.
        hidden_states: the buffer of windows × length × hidden, part of `walk`.
        disk: size of the output folder's weights; `disk_available` is what is free where it would lie.
        seconds: forward passes plus what pruning and writing were measured to add.
    """

    model: str
    method: str
    blocks: int
    linears: int
    parameters: int
    weights: int
    windows: int
    length: int
    dtype: str
    memory: dict[str, int]
    memory_available: int
    hidden_states: int
    disk: int
    disk_available: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return asdict(self)


def make_plan(recipe: Recipe, out: Path, progress: Progress) -> Plan:
    """Estimate a run. Raises `InputError` for what a run would refuse of the model, the method and the budget."""
    folder = locate(
        recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, progress=progress
    )
    source = StreamedModel.open(
        folder, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    sparsifier, _ = parts_of(recipe, source.anatomy)
    length = window_length(source.module.config, recipe.calibration.length, progress)
    windows = sparsifier.windows_needed(recipe.calibration.samples)
    batch = min(windows, recipe.calibration.batch or max(1, BATCH_TOKENS // length))
    base = machine.rss_bytes()
    seconds_per_pass, hidden_size = _time_block(source, batch, length)
    weights = sum(linear.count for linear in source.anatomy.linears())
    passes = 1 if recipe.calibration.mode == "dense" else 2
    seconds = passes * len(source.anatomy.blocks) * seconds_per_pass * windows / batch + weights / _WEIGHTS_PER_SECOND
    stored = {name: entry.bytes for name, entry in source.reader.entries.items()}
    block_bytes = max(sum(stored[key] for key in source.block_keys(block.index)) for block in source.anatomy.blocks)
    outer_bytes = sum(stored[key] for key in source.outer_keys())
    size = source.dtype.itemsize
    hidden = windows * length * hidden_size * size
    widest = max(max(linear.out_features, linear.in_features) for linear in source.anatomy.linears())
    activations = batch * length * (4 * widest + 12 * hidden_size) * size
    parameters = source.parameter_count
    memory = {
        "start": base + 2 * outer_bytes + hidden,
        "walk": base + hidden + 2 * block_bytes + activations,
        "verify": base + parameters * size + activations,
    }
    memory["peak"] = max(memory.values())
    return Plan(
        model=recipe.model,
        method=recipe.method,
        blocks=len(source.anatomy.blocks),
        linears=sum(1 for _ in source.anatomy.linears()),
        parameters=parameters,
        weights=weights,
        windows=windows,
        length=length,
        dtype=str(source.dtype).removeprefix("torch."),
        memory=memory,
        memory_available=machine.available_memory_bytes(),
        hidden_states=hidden,
        disk=sum(stored.values()),
        disk_available=machine.free_disk_bytes(out),
        seconds=seconds,
    )


# scoring, masking, hashing and writing, measured on two cores of a server: 106 million weights in about 2.5 s
_WEIGHTS_PER_SECOND = 4e7


@torch.inference_mode()
def _time_block(source: StreamedModel, batch: int, length: int) -> tuple[float, int]:
    """Seconds one batch takes through the first block on this machine, and the width of the hidden states."""
    generator = torch.Generator().manual_seed(0)
    rows = source.module.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (batch, length), generator=generator)
    walk = Walk(source, Windows(ids), batch)
    walk.start()
    block = source.load_block(0)
    fastest = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        walk.run_batch(0, block, 0, walk.hidden[:])
        fastest = min(fastest, time.perf_counter() - begun)
    source.free_block(0)
    return fastest, walk.hidden.shape[-1]
