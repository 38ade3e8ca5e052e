"""Several processes on one run: windows are shared out, sums added up, rows of every linear scored where they belong.

    torchrun --nproc-per-node 2 -m prunekit prune ...

Every process walks the whole model, a block at a time, with its own windows. After a block's measuring pass the statistics are
added up over all processes, so each has what one process would have; each chooses the keep-mask of its share of rows; masks are
gathered as bits. The first process alone reads the calibration text, hashes, writes shards and prints.

The code above this room is written once, for `Ranks`; a run that nobody started with torchrun is `Ranks()`, a single one.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .errors import PrunekitError

T = TypeVar("T")

# A lost process is noticed by its closed connection, not by this; ranks may wait long for the first one's reading and writing.
_PATIENCE = timedelta(days=7)


class Ranks:
    """A single process. `rank` counts from 0, `size` is how many there are."""

    rank = 0
    size = 1

    @property
    def here(self) -> int:
        """How many of the processes share this machine's memory."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads, writes and prints."""
        return self.rank == 0

    def share(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process; all return its result or raise its `PrunekitError`."""
        return work()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A `PrunekitError` that one process meets inside is raised in all of them."""
        yield

    def sum_up(self, tensors: list[Tensor]) -> None:
        """Add up tensors of equal shapes over all processes, in place."""

    def gather(self, value: T) -> list[T]:
        """Every process's small object, by rank."""
        return [value]

    def from_last(self, value: Tensor) -> Tensor:
        """The last process's tensor; elsewhere `value` gives shape and dtype, and its content does not matter."""
        return value

    def gather_rows(self, part: Tensor, rows: int) -> Tensor:
        """Put together a matrix [rows, columns], bool or float, of which each process has the rows `share_of(rows)`."""
        return part

    def share_of(self, count: int) -> slice:
        """This process's part of `count` consecutive things; the parts differ in size by one at most."""
        return _cut(count, self.size)[self.rank]


class TorchRanks(Ranks):
    """The processes torchrun started: gloo on processors, nccl between CUDA devices."""

    def __init__(self, device: str) -> None:
        from torch import distributed

        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # small objects go over gloo in both cases; nccl moves the statistics, which lie on the devices
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if not distributed.is_initialized():  # one group serves every run of these processes
            with _told():
                distributed.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(distributed.destroy_process_group)
        self._distributed = distributed
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()

    def share(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process; all return its result or raise its `PrunekitError`."""
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [(work(), None)]
            except PrunekitError as problem:
                outcome = [(None, problem)]
        with _told():
            self._distributed.broadcast_object_list(outcome, device=torch.device("cpu"))
        result, refused = outcome[0]
        if refused is not None:
            raise refused
        return cast(T, result)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A `PrunekitError` that one process meets inside is raised in all of them."""
        problem = None
        try:
            yield
        except PrunekitError as met:
            problem = met
        for other in self.gather(problem):
            if other is not None:
                raise other

    def sum_up(self, tensors: list[Tensor]) -> None:
        """Add up tensors of equal shapes over all processes, in place."""
        with _told():
            for tensor in tensors:
                self._distributed.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Every process's small object, by rank."""
        found: list[Any] = [None] * self.size
        with _told():
            self._distributed.all_gather_object(found, value)
        return found

    def from_last(self, value: Tensor) -> Tensor:
        """The last process's tensor; elsewhere `value` gives shape and dtype, and its content does not matter."""
        value = value.contiguous()
        with _told():
            self._distributed.broadcast(value, src=self.size - 1)
        return value

    def gather_rows(self, part: Tensor, rows: int) -> Tensor:
        """Put together a matrix [rows, columns], bool or float, of which each process has the rows `share_of(rows)`."""
        parts = _cut(rows, self.size)
        tallest = max(cut.stop - cut.start for cut in parts)
        # masks travel as bits, other numbers as they lie in memory: gloo does not know every dtype
        flat = part.contiguous().cpu()
        own = np.packbits(flat.numpy(), axis=1) if part.dtype == torch.bool else flat.view(torch.uint8).numpy()
        packed = np.zeros((tallest, own.shape[1]), dtype=np.uint8)  # gathering wants equal shapes
        packed[: len(part)] = own
        found = [torch.empty(packed.shape, dtype=torch.uint8) for _ in parts]
        with _told():
            self._distributed.all_gather(found, torch.from_numpy(packed))
        whole = np.concatenate([sent.numpy()[: cut.stop - cut.start] for sent, cut in zip(found, parts, strict=True)])
        if part.dtype == torch.bool:
            bits = np.unpackbits(whole, axis=1, count=part.shape[1]).view(bool)
            return torch.from_numpy(bits).to(part.device)
        return torch.from_numpy(whole).view(part.dtype).to(part.device)


def among_several() -> bool:
    """Whether torchrun started this process and others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def find_ranks(device: str) -> Ranks:
    """The processes of this run: those torchrun started, or this one alone."""
    if not among_several():
        return Ranks()
    return TorchRanks(device)


def _cut(count: int, size: int) -> list[slice]:
    return [slice(count * number // size, count * (number + 1) // size) for number in range(size)]


@contextmanager
def _told() -> Iterator[None]:
    """Say in our words that another process is gone."""
    try:
        yield
    except RuntimeError as problem:
        reason = re.sub(r"^(\[.*?\] )+", "", str(problem)).split(". ", 1)[0]
        raise PrunekitError(
            f"another process of this run was lost ({reason}): the same command with --resume continues"
        ) from problem
