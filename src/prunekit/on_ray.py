"""The runs of a sweep as Ray tasks, on one machine or a cluster, and tasks that work on a search. Ray is imported here only.

Each run is one task that declares processors, accelerators and memory; Ray decides where and when. A task writes into the sweep's
folder and sends its record back; records and table are written by the one process that started the sweep. So the output folder, and
models and texts that are named by a path, must lie on storage that every node sees under the same path, and prunekit must be installed
on every node. Nothing is sent to Ray's makers: usage statistics are off, and a Ray that is started here has no dashboard.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import InputError, PrunekitError, first_line
from .planning import predicted_memory
from .progress import Progress, Silent
from .recipe import Recipe
from .sweeping import Executor, Record, Run, carry_out, failure

_OBJECT_STORE = 100 * 1024**2  # what goes through it is a few kilobytes a run
_CONNECT_SECONDS = 10
_CANCEL_SECONDS = 15
_POLL_SECONDS = 1.0


def ray_executor(
    address: str, *, cpus: int | None = None, gpus: float | None = None, progress: Progress | None = None
) -> Executor:
    """What carries out the runs of a sweep as Ray tasks.

    Args:
        address: `local` starts a Ray on this machine for the time being; `auto` finds the one that runs here; `host:port` is the head
            node of a cluster.
        cpus: processors, and torch threads, of each run. Default: as many as torch uses here, or the largest node's where less.
        gpus: accelerators of each run. Default: 1 where the recipe's device is cuda, or auto and the cluster has any; else 0.
        progress: told what is going on.

    Raises:
        InputError: Ray is not installed, or the values cannot be used. That no Ray answers is found out when the runs begin.
    """
    check_ray(address, cpus, gpus)

    def execute(runs: list[Run]) -> Generator[tuple[Run, Record], None, None]:
        if not runs:
            return
        with _session(address) as ray:
            yield from _execute(ray, runs, cpus, gpus, address == "local", progress or Silent())

    return execute


def check_ray(address: str, cpus: int | None, gpus: float | None) -> None:
    """Raise `InputError` where Ray is not installed, or the values cannot be used."""
    if find_spec("ray") is None:
        raise InputError("--ray needs Ray, which is not installed: pip install 'prunekit[ray]'")
    if address not in ("auto", "local") and "://" not in address and not address.rpartition(":")[2].isdecimal():
        raise InputError(f"Ray address '{address}' is none: it is auto, local or host:port")
    if cpus is not None and cpus < 1:
        raise InputError(f"{cpus} processors per run are too few: give 1 or more")
    if gpus is not None and gpus < 0:
        raise InputError(f"{gpus} accelerators per run are too few: give 0 or more")


@dataclass(frozen=True)
class _Job:
    """What a task is sent. `paths` are files and folders the driver sees; the worker must see them too."""

    run: Run
    folder: str
    threads: int
    paths: list[str]

    @classmethod
    def of(cls, run: Run, memory: int, threads: int) -> _Job:
        named = [run.recipe.model, run.recipe.calibration.source, *([run.evaluate.text] if run.evaluate else [])]
        return cls(
            run=replace(run, folder=run.folder.resolve(), memory_budget=memory),
            folder=str(Path.cwd()),
            threads=threads,
            paths=[path for path in named if Path(path).expanduser().exists()],
        )


def ray_workers(
    address: str,
    recipe: Recipe,
    out: Path,
    *,
    workers: int | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    progress: Progress | None = None,
) -> Callable[[Callable[[], bool]], None]:
    """What lets Ray tasks work on the study in `out`, which all nodes must see, until it is done.

    `recipe` is one of those it tries. `workers` are as many as the cluster has processors for by default; the other arguments are
    those of `ray_executor`.
    """
    check_ray(address, cpus, gpus)

    def run(done: Callable[[], bool]) -> None:
        with _session(address) as ray:
            nodes = _alive(ray)
            threads = cpus or _threads(nodes)
            need = {"num_cpus": threads, "num_gpus": _gpus(recipe, gpus, nodes)}
            if not _fitting(nodes, need):
                _lacking(need, "the search", address == "local", progress or Silent())
            fit = max(1, sum(int(node.get("CPU", 0)) // threads for node in nodes))
            task = ray.remote(_help).options(**need, max_retries=0, name="tune")
            waiting = [task.remote(str(Path.cwd()), str(out.resolve()), threads) for _ in range(workers or fit)]
            try:
                while waiting and not done():  # tasks that no node was free for are not waited for
                    ended, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
                    for reference in ended:
                        try:
                            ray.get(reference)
                        except Exception as problem:  # whatever ends a task: what it left undone is done here
                            said = (
                                str(getattr(problem, "cause", None) or problem).strip() or type(problem).__name__
                            ).splitlines()
                            (progress or Silent()).say(f"a task of the search ended: {said[-1]}")
            finally:
                _cancel(ray, waiting)

    return run


def _help(folder: str, out: str, threads: int) -> None:
    """Work on a study, in a worker of Ray."""
    from .tuning import help_with

    if Path(folder).is_dir():
        os.chdir(folder)
    if not Path(out).is_dir():
        raise InputError(f"node '{socket.gethostname()}' does not see '{out}': put it on storage that all nodes share")
    help_with(Path(out), threads)


def _execute(
    ray: Any, runs: list[Run], cpus: int | None, gpus: float | None, local: bool, progress: Progress
) -> Generator[tuple[Run, Record], None, None]:
    nodes = _alive(ray)
    cpus = cpus or _threads(nodes)
    needs = {run.name: {"num_cpus": cpus, "num_gpus": _gpus(run.recipe, gpus, nodes)} for run in runs}
    for name, need in needs.items():
        if not _fitting(nodes, need):
            _lacking(need, f"'{name}'", local, progress)
    task = ray.remote(_task)
    predicted: dict[str, int] = {}
    waiting: dict[Any, Run] = {}
    progress.start("runs", len(runs))
    try:
        for run in runs:
            try:
                memory = _memory(run, predicted)
            except Exception as problem:  # what cannot be opened here could not be there
                yield run, failure(run, problem, pruned=run.record.pruned)
                progress.step(run.name)
                continue
            # more than any node has would never be scheduled; the run then has the largest one to itself
            limits = [int(node["memory"]) for node in _fitting(nodes, needs[run.name]) if "memory" in node]
            memory = min(memory, max(limits, default=memory))
            # no retries: a run that killed its worker would kill the next one
            options = {**needs[run.name], "memory": memory, "max_retries": 0, "name": run.name}
            waiting[task.options(**options).remote(_Job.of(run, memory, cpus))] = run
        while waiting:
            for reference in ray.wait(list(waiting), num_returns=1)[0]:
                try:
                    record = ray.get(reference)
                except ray.exceptions.LocalRayletDiedError:
                    raise PrunekitError("the Ray this sweep ran on is gone: the same command goes on") from None
                except Exception as problem:
                    record = _lost(ray, waiting[reference], problem)
                run = waiting.pop(reference)
                yield run, record
                progress.step(run.name)
    finally:
        _cancel(ray, list(waiting))


def _task(job: _Job) -> Record:
    """One run, in a worker of Ray."""
    node = socket.gethostname()
    try:
        if Path(job.folder).is_dir():
            os.chdir(job.folder)  # recipes may name things relative to where the sweep was started
        written = Record.read(job.run.record_path)
        if written is None or written.recipe != job.run.record.recipe:
            raise InputError(
                f"node '{node}' does not see the sweep's folder '{job.run.folder.parent}': put it on storage that all nodes share"
            )
        for path in job.paths:
            if not Path(path).expanduser().exists():
                raise InputError(f"node '{node}' does not see '{path}': put it on storage that all nodes share")
    except PrunekitError as problem:
        return failure(job.run, problem, pruned=job.run.record.pruned)
    torch.set_num_threads(job.threads)
    return carry_out(job.run, Silent())


def _lost(ray: Any, run: Run, problem: Exception) -> Record:
    """The record of a run that sent none back."""
    errors = ray.exceptions
    if isinstance(problem, errors.OutOfMemoryError):
        sentence = "Ray ended the run because its node ran out of memory: retry with fewer at a time (--cpus-per-run)"
    elif isinstance(problem, (errors.WorkerCrashedError, errors.NodeDiedError)):
        sentence = "the process of the run died: it was killed, ran out of memory or crashed"
    elif "No module named 'prunekit" in str(problem):
        sentence = f"the node's Python has no prunekit {__version__}: install the same prunekit on every node"
    else:
        cause = getattr(problem, "cause", None)
        return failure(run, cause if isinstance(cause, Exception) else problem, pruned=run.record.pruned)
    record = failure(run, problem, pruned=run.record.pruned)
    assert record.failed is not None
    return replace(record, failed=record.failed | {"sentence": sentence})


def _gpus(recipe: Recipe, asked: float | None, nodes: list[dict[str, float]]) -> float:
    if recipe.device.startswith("cuda:"):
        raise InputError(f"device '{recipe.device}' names an accelerator, but Ray gives each run its own: write cuda")
    if asked is not None:
        return asked
    has_any = any(node.get("GPU", 0) >= 1 for node in nodes)
    return 1 if recipe.device == "cuda" or (recipe.device == "auto" and has_any) else 0


def _alive(ray: Any) -> list[dict[str, float]]:
    """What every node that is there has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _threads(nodes: list[dict[str, float]]) -> int:
    """As many as torch uses here, or the largest node's where that has less."""
    return max(1, min(torch.get_num_threads(), int(max(node.get("CPU", 0) for node in nodes))))


def _lacking(need: dict[str, float], what: str, local: bool, progress: Progress) -> None:
    """Say that no node has what is needed. Raises `InputError` where none can join."""
    lacking = f"no node of this Ray has {need['num_cpus']} processors and {need['num_gpus']:g} accelerators for {what}"
    if local:
        raise InputError(f"{lacking}: ask for less with --cpus-per-run and --gpus-per-run")
    progress.say(f"{lacking}: it waits until one joins")


def _fitting(nodes: list[dict[str, float]], need: dict[str, float]) -> list[dict[str, float]]:
    names = {"CPU": need["num_cpus"], "GPU": need["num_gpus"]}
    return [node for node in nodes if all(node.get(name, 0) >= amount for name, amount in names.items())]


def _memory(run: Run, known: dict[str, int]) -> int:
    """Bytes a run is predicted to take at most; `known` remembers them by what they depend on."""
    recipe = run.recipe.model_copy(update={"device": "cpu", "seed": 0, "sparsity": None, "pattern": None})
    key = recipe.model_dump_json()
    if key not in known:
        known[key] = predicted_memory(recipe, run.folder)
    return known[key]


@contextmanager
def _session(address: str) -> Iterator[Any]:
    """A connection to Ray; its own messages go to stderr, because stdout is for results."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with redirect_stdout(sys.stderr):
        import ray

        if ray.is_initialized():  # the caller's own; it is left as it was found
            yield ray
            return
        host, _, port = address.rpartition(":")
        if host and "://" not in address:
            try:  # Ray itself would try for a quarter of an hour
                socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
            except (OSError, OverflowError) as problem:
                raise InputError(f"no Ray answers at '{address}' ({problem}): is its head node up?") from None
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
        except Exception as problem:  # no cluster, another version, no authentication, no room in /dev/shm, ...
            raise InputError(
                f"Ray at '{address}' cannot be used: {first_line(problem)} (Ray's version and authentication must be the cluster's)"
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _cancel(ray: Any, references: list[Any]) -> None:
    """End what still runs: each worker gets an interrupt, so that its run can be continued, and some time."""
    with suppress(Exception):  # Ray may be what went away
        for reference in references:
            ray.cancel(reference, force=False)
        if references:
            ray.wait(references, num_returns=len(references), timeout=_CANCEL_SECONDS)
