"""What a run needs of memory and disk, from shapes alone; and the refusal of one that cannot end well, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from . import machine
from .blockwalk import Job, activation_bytes
from .errors import InputError
from .model.source import StreamedModel


@dataclass(frozen=True)
class Needs:
    """Bytes a run takes.

    Attributes:
        memory: by phase, the process's peak up to its end: `start` (embedding rows, first hidden states), `walk`, `verify`; `peak`
            is the last of them. Several processes on one machine take this each.
        disk: `weights` stay, `hidden` (saved hidden states, and others in files) only while the run lasts; `peak` is their sum.
        hidden: the hidden states of one process; they lie in files where they exceed the memory budget (`in_files`).
    """

    memory: dict[str, int]
    disk: dict[str, int]
    hidden: int
    in_files: bool
    activations: int
    block: int


def needs_of(
    source: StreamedModel,
    job: Job,
    *,
    windows: int,
    all_windows: int,
    length: int,
    batch: int,
    budget: int,
    base: int,
) -> Needs:
    """Estimate a run.

    Args:
        source: the model.
        job: what is done to it.
        windows, all_windows: of this process and of all.
        length: tokens per window.
        batch: windows per forward pass.
        budget: memory budget in bytes.
        base: bytes resident before anything of the model is read.
    """
    anatomy, width, appetite = source.anatomy, _hidden_width(source), job.appetite(windows, length)
    stored = {name: entry.bytes for name, entry in source.reader.entries.items()}
    counts = {name: entry.count for name, entry in source.reader.entries.items()}
    size = source.dtype.itemsize
    block = converted = 0
    for number in range(len(anatomy.blocks)):
        keys = source.block_keys(number)
        block = max(block, sum(stored[key] for key in keys))
        other = [key for key in keys if source.reader.entries[key].dtype != source.dtype]
        converted = max(converted, sum(counts[key] * size for key in other))
    linears = list(anatomy.linears())
    block_weights = max(sum(linear.count for linear in each.linears) for each in anatomy.blocks)
    widest = max(max(linear.out_features, linear.in_features) for linear in linears)
    activations = activation_bytes(batch * length, widest, width, source.dtype)
    hidden = appetite.streams * windows * length * width * size
    in_files = hidden > budget
    in_memory = appetite.streams * batch * length * width * size if in_files else hidden
    choosing, filed = appetite.choosing, appetite.filed
    if appetite.tunes:
        # a whole block's outputs beside its inputs; gradients, moments and copies of a block; a window's activations kept for them
        targets = hidden // appetite.streams if appetite.targets else 0
        in_memory += targets if targets <= budget else 0
        filed = max(filed, 0 if targets <= budget else all_windows * length * width * size)
        choosing = max(choosing, 8 * block_weights * 4 + 3 * activations)
    outer = source.outer_bytes(all_windows * length)
    start = base + max(outer + in_memory + block + converted + activations, appetite.ahead)
    walk = base + in_memory + 2 * block + converted + appetite.sums + max(activations, choosing)
    parameters = source.parameter_count * size
    verify = base + activations + (parameters if parameters <= budget else 2 * block + converted)
    memory = {"start": start, "walk": max(start, walk), "verify": max(start, walk, verify)}
    memory["peak"] = memory["verify"]
    weights = sum(stored.values()) + appetite.written
    kept = 2 * appetite.streams * all_windows * length * width * size if len(anatomy.blocks) > 1 else 0
    disk = {"weights": weights, "hidden": kept + filed, "peak": weights + kept + filed}
    return Needs(memory, disk, hidden, in_files, activations, block + converted)


def _hidden_width(source: StreamedModel) -> int:
    """Width of the hidden states, as the model's own config gives it."""
    return int(source.module.config.get_text_config().hidden_size)


def hidden_room(asked: int | None, processes: int = 1) -> int:
    """Bytes that the hidden states of each of so many processes may take in memory: as asked, or half of what is free."""
    return machine.available_memory_bytes() // 2 // processes if asked is None else asked


def refuse_memory(needs: Needs, *, base: int, processes: int) -> None:
    """Raise `InputError` where the machine cannot give what a run needs, naming the option that helps most."""
    wanted = (needs.memory["peak"] - base) * processes
    free = machine.available_memory_bytes()
    if wanted <= free:
        return
    if not needs.in_files and needs.hidden * processes > wanted - free:
        budget = max(1, needs.hidden // 2_000_000)
        advice = f"--memory-budget {budget}MB keeps the hidden states in files, fewer --samples make them less"
    elif needs.activations * processes > wanted - free:
        advice = "a shorter --length or --set calibration.batch=1 lets fewer tokens through a block at a time"
    else:
        advice = f"its largest block alone takes {needs.block / 1e9:.2f} GB: take a machine with more memory"
    raise InputError(f"the run needs about {wanted / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free: {advice}")
