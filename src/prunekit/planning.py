"""What a run would take, before it is started: memory and disk from the shapes, time from one block tried here."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

import torch

from . import machine
from .blockwalk import BlockWalk, Job, Rehearsal, block_parameters
from .calibration.windows import window_length
from .checkpoint.output import refuse_no_room
from .checkpoint.reader import bytes_of
from .distributed import Ranks
from .estimate import Needs, hidden_room, needs_of, refuse_memory
from .jobs import job_of
from .model.hidden import Scratch
from .model.source import StreamedModel
from .model.stream import Walk, Windows, batch_size
from .opening import find_model, open_model, open_tokenizer
from .progress import Progress, Silent
from .recipe import Recipe

_TRIED = 3  # batches that are sent through one block


@dataclass(frozen=True)
class Plan:
    """An estimate, in bytes and seconds; nothing was written.

    Attributes:
        memory: the process's peak up to the end of each phase: `start` (embeddings and first hidden states), `walk`, `verify`;
            `peak` is the last.
        memory_available: what this machine could give now.
        removed: parameters that go with structures, about; `ratio` is the share of the block parameters that does.
        hidden_states: the buffer of windows × length × hidden, part of `walk`; in files beyond the memory budget.
        disk: `weights` of the output folder, `hidden` while the run lasts, `peak` both; `disk_available` is what is free.
        seconds: by phase, as a run's own figures: `start`, `forward`, `prune`, `tune`, `write` (what is waited for), `read`, `verify`;
            and `total`.
    """

    model: str
    method: str
    blocks: int
    linears: int
    parameters: int
    removed: int
    ratio: float
    weights: int
    windows: int
    length: int
    dtype: str
    memory: dict[str, int]
    memory_available: int
    hidden_states: int
    hidden_in_files: bool
    disk: dict[str, int]
    disk_available: int
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class _Outline:
    """What is known of a run from its recipe and the model's shapes."""

    source: StreamedModel
    job: Job
    windows: int
    length: int
    batch: int
    needs: Needs

    @classmethod
    def of(cls, recipe: Recipe, out: Path, progress: Progress, memory_budget: int | None) -> _Outline:
        """Raises `InputError` for what a run would refuse of the model, the method, the budget and the machine."""
        folder = find_model(recipe, progress)
        source = open_model(recipe, folder)
        room = hidden_room(memory_budget)
        source.scratch = Scratch(room)
        calibration = recipe.calibration
        job = job_of(recipe, source)
        length = window_length(source.module.config, calibration.length, progress)
        windows = calibration.samples if job.looks_at_data else 1
        batch = min(windows, calibration.batch or batch_size(length))
        open_tokenizer(recipe, folder)  # a run has its code in memory too
        machine.return_memory()
        base = machine.rss_bytes()
        needs = needs_of(
            source,
            job,
            windows=windows,
            all_windows=windows,
            length=length,
            batch=batch,
            budget=room,
            base=base,
        )
        refuse_memory(needs, base=base, processes=1)
        refuse_no_room(out, needs.disk["peak"], hidden=needs.disk["hidden"], replaced=0)
        return cls(source, job, windows, length, batch, needs)


def predicted_memory(recipe: Recipe, out: Path) -> int:
    """Bytes of memory pruning by this recipe takes at most, from shapes alone. Raises `InputError`."""
    return _Outline.of(recipe, out, Silent(), None).needs.memory["peak"]


def make_plan(recipe: Recipe, out: Path, progress: Progress, memory_budget: int | None = None) -> Plan:
    """Estimate a run. Raises `InputError` for what a run would refuse of the model, the method, the budget and the machine."""
    begun = time.perf_counter()
    outline = _Outline.of(recipe, out, progress, memory_budget)
    opened = time.perf_counter() - begun
    source, needs, batch = outline.source, outline.needs, outline.batch
    batches = -(-outline.windows // batch)
    ids = _draw(source, batch * min(batches, _TRIED), outline.length)
    walk = Walk(source, Windows(ids), batch)
    dense = recipe.calibration.mode == "dense"
    trial = outline.job.work(walk, dense=dense, ranks=Ranks(), first=0, total=None)
    rehearsal = trial.rehearse()
    walked = walk.source
    assert isinstance(walked, StreamedModel)
    seconds = _Trial(trial, rehearsal, walked, out).extrapolate(batches, needs.hidden)
    seconds["start"] += opened
    seconds["total"] = sum(seconds.values())
    return Plan(
        model=recipe.model,
        method=recipe.method,
        blocks=len(source.anatomy.blocks),
        linears=sum(1 for _ in source.anatomy.linears()),
        parameters=source.parameter_count,
        removed=rehearsal.removed + rehearsal.outside,
        ratio=rehearsal.removed / sum(block_parameters(source)),
        weights=sum(linear.count for linear in source.anatomy.linears()),
        windows=outline.windows,
        length=outline.length,
        dtype=str(source.dtype).removeprefix("torch."),
        memory=needs.memory,
        memory_available=machine.available_memory_bytes(),
        hidden_states=needs.hidden,
        hidden_in_files=needs.in_files,
        disk=needs.disk,
        disk_available=machine.free_disk_bytes(out),
        seconds=seconds,
    )


class _Trial:
    """One block measured, pruned and run as a run does it, on a few batches of random tokens; nothing of it is kept."""

    def __init__(self, trial: BlockWalk, rehearsal: Rehearsal, source: StreamedModel, out: Path) -> None:
        self._source = source
        self._rehearsal = rehearsal
        self._dense_blocks = len(source.anatomy.blocks)
        self._blocks = len(trial.blocks)
        block = trial.blocks[rehearsal.tried]
        self._tried = len(trial.walk.batches)
        begun = time.perf_counter()
        trial.start()
        self._start = time.perf_counter() - begun
        begun = time.perf_counter()
        source.free_block(block.index)
        module = source.load_block(block.index)
        self._read = time.perf_counter() - begun
        stored = source.stored[block.index]
        fastest = [float("inf")] * 4
        for _ in range(3):  # the first one warms up
            trial.seconds.forward = trial.seconds.prune = trial.seconds.tune = 0.0
            trial.prune_block(block, module, source.stored_of)
            measured = trial.seconds.forward
            trial.pass_on(block.index, module)
            taken = (measured, trial.seconds.forward - measured, trial.seconds.prune, trial.seconds.tune)
            fastest = [min(pair) for pair in zip(fastest, taken, strict=True)]
        self._measure, self._pass_on, self._prune, self._tune = fastest
        self._pruned_weights = sum(linear.count for linear in block.linears)
        self._weights = sum(linear.count for each in trial.blocks for linear in each.linears)
        self._shard_bytes = sum(tensor.nbytes for tensor in stored.values())
        begun = time.perf_counter()
        with TemporaryFile(dir=_nearest_folder(out)) as stream:  # as fast as the disk that will be written, if we may
            for tensor in stored.values():
                stream.write(bytes_of(tensor))
            stream.flush()
        self._write = time.perf_counter() - begun
        begun = time.perf_counter()
        digest = hashlib.sha256()
        for tensor in stored.values():
            digest.update(bytes_of(tensor))
        self._hash = (time.perf_counter() - begun) / self._shard_bytes
        trial.release()
        source.free_block(block.index)

    def extrapolate(self, batches: int, hidden: int) -> dict[str, float]:
        """Seconds by phase of a run with so many batches and bytes of hidden states."""
        source, more = self._source, batches / self._tried
        measure, pass_on = self._measure * more, self._pass_on * more
        stored = sum(entry.bytes for entry in source.reader.entries.values())
        per_byte = self._write / self._shard_bytes + self._hash  # written and hashed in one go
        blocks_bytes = self._shard_bytes * self._dense_blocks
        shard, saving = self._shard_bytes * per_byte, hidden * (per_byte if self._blocks > 1 else 0.0)
        reading = self._read * stored / self._shard_bytes
        ahead = self._start * more + self._dense_blocks * max(measure, pass_on)
        return {
            "start": stored * self._hash,
            "forward": self._start * more
            + self._blocks * measure
            + (self._blocks - 1) * pass_on
            + self._rehearsal.passes * ahead,
            "prune": self._prune * self._weights / self._pruned_weights,
            "tune": self._tune * more * self._rehearsal.tuned,
            "write": max(0, stored - blocks_bytes) * per_byte
            + self._blocks * (max(0.0, shard - pass_on) + max(0.0, saving - measure)),
            "read": self._read,
            "verify": reading + self._blocks * self._pass_on / self._tried,
        }


def _draw(source: StreamedModel, windows: int, length: int) -> torch.Tensor:
    rows = source.module.get_input_embeddings().weight.shape[0]
    return torch.randint(rows, (windows, length), generator=torch.Generator().manual_seed(0))


def _nearest_folder(out: Path) -> str:
    """The folder nearest to `out` that exists and takes a nameless temporary file."""
    place = out.expanduser().resolve()
    while not place.is_dir():
        place = place.parent
    try:
        with TemporaryFile(dir=place):
            return str(place)
    except OSError:
        return gettempdir()
