"""A process that does a great many runs: it imports everything once, and every run is a copy of it that may be killed.

Started by `test_faults.py` as `driver.py FOLDER`. It makes a model, a text and an uninterrupted run of every setting, and answers
with one JSON line: the disk's operations by setting. Then, for every line on stdin (a file of jobs, one JSON object a line), one
JSON line per job, in the order they end.

A job is a chain of runs of the real command line into one folder. In each but the last something happens; the last must finish it,
with its hidden states kept elsewhere where the job says so (`then`: another setting).
What is wrong is in `violations`; a job that survived has none.

Copies are made with `fork`, which takes only the calling thread along: this process must never have a second one. What a run does
before it touches its output folder (tokens, hashes of the model, module skeletons) is done once and copied too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import json
import os
import select
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from disk import ERRORS, KILLS, Disk, Fault
from transformers.utils import logging

import tiny
from helpers import contents
from prunekit import cli, keeper, machine, pruning
from prunekit.blockwalk import BlockWalk
from prunekit.checkpoint import lock, shard, storage, writer
from prunekit.checkpoint.reader import Reader
from prunekit.checkpoint.writer import Journal, Writer
from prunekit.model import hidden, source, stream
from prunekit.report import charts
from prunekit.shrink.slicewalk import SliceWalk
from prunekit.shrink.walk import ShrinkWalk
from prunekit.sparsify.walk import SparsifyWalk

BLOCKS = 4
PATIENCE = 300.0  # seconds after which a run hangs, on a machine however busy
_IN_MEMORY, _IN_FILES = "100KB", "1"  # the reload check is streamed in both, which is the faster one here
_MODES = {
    "sequential": [],
    "dense": ["--set", "calibration.mode=dense"],
    # what removes structures: all planned first and weights refitted towards the dense model, whose hidden states go along; biases
    # and widths that no config has; whole blocks; and channels of the stream, whose basis is saved with the hidden states
    "refitted": ["--method", "numerical", "--ratio", "0.3", "--set", "compensate.target=dense"],
    "biased": ["--method", "flap", "--ratio", "0.3", "--shape", "free", "--set", "calibration.mode=dense"],
    "shallower": ["--method", "shortgpt", "--ratio", "0.25"],
    "sliced": ["--method", "slicegpt", "--ratio", "0.3"],
    # weights tuned towards the dense model, whose hidden states go along here too; and channels of the stream that are left out
    "tuned": ["--method", "wanda+blockwise", "--set", "tune.target=dense", "--set", "tune.epochs=1"],
    "narrowed": ["--method", "minitron", "--set", "budget.name=widths", "--set", "budget.hidden=24"],
}
SETTINGS = {
    f"{mode}-{where}": [*words, "--memory-budget", budget]
    for mode, words in _MODES.items()
    for where, budget in (("memory", _IN_MEMORY), ("files", _IN_FILES))
}
_TIMED = ("prunekit.json", "README.md", "report.html")  # they say how long it took
NOTES = "notes.md"  # a file of the user's

Event = list[Any]


@dataclasses.dataclass
class Attempt:
    """What became of one run."""

    status: int
    events: list[Event]
    message: str
    hung: bool

    def of(self, name: str) -> list[Any]:
        """What the events of one name say."""
        return [event[1] for event in self.events if event[0] == name]

    @property
    def fired(self) -> bool:
        """Whether the fault happened; a killed run had no time to say so."""
        return self.status == -signal.SIGKILL or any(self.of("fired"))


class Driver:
    """Everything the runs share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.text = folder / "model", folder / "text.txt"
        tiny.save_model(self.model, "llama", num_hidden_layers=BLOCKS)
        templates = self.model / "additional_chat_templates"
        templates.mkdir()
        (templates / "tools.jinja").write_text("tools")
        self.text.write_text(tiny.make_text(600), encoding="utf-8")
        self.seconds: dict[str, float] = {}
        self.whole: dict[str, dict[str, bytes]] = {}
        for setting in SETTINGS:
            out = folder / f"whole-{setting}"
            begun = time.monotonic()
            self._command(setting, out)
            self.seconds[setting] = time.monotonic() - begun
            self.whole[setting] = contents(out)
        for mode in _MODES:
            in_memory, in_files = (weights(self.whole[f"{mode}-{where}"]) for where in ("memory", "files"))
            assert in_memory == in_files, "where hidden states are kept changes no bit"
        told = {tuple(weights(self.whole[f"{mode}-memory"]).values()) for mode in _MODES}
        assert len(told) == len(_MODES), "each does something else"
        self._make_starts()
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._keep_what_is_the_same()
        for module in (machine, stream):  # costs more than all else where everything is tiny
            module.return_memory = lambda: None  # type: ignore[attr-defined]
        charts._drawn = lambda *_: charts.Chart(None)  # pictures cost as much as a run, and touch no file
        gc.collect()  # ends the threads of readers nobody holds
        gc.freeze()  # a collection would write on every page, and copy it
        assert threading.active_count() == 1, threading.enumerate()

    def _words(self, setting: str, out: Path, *more: str) -> list[str]:
        text = ["--calibration", str(self.text), "--samples", "6", "--length", "32", "--set", "calibration.batch=2"]
        shared = ["prunekit", "prune", str(self.model), *text, "--dtype", "float32", "--out", str(out)]
        return [*shared, *SETTINGS[setting], *more]

    def _command(self, setting: str, out: Path, *more: str) -> None:
        sys.argv = self._words(setting, out, *more)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}") from end

    def _make_starts(self) -> None:
        """Folders that --overwrite may meet: a model of someone else's, a finished run, and one that was killed."""
        shutil.copytree(self.model, self.folder / "start-foreign")
        self._command("sequential-memory", self.folder / "start-finished", "--sparsity", "0.25")
        real = Writer.write_shard
        calls = iter(range(BLOCKS + 1))

        def stop(self: Writer, position: int, pieces: Iterable[Any]) -> dict[str, Any]:
            if next(calls) == BLOCKS:
                raise KeyboardInterrupt
            return real(self, position, pieces)

        Writer.write_shard = stop  # type: ignore[method-assign]
        with contextlib.suppress(RuntimeError):
            self._command("sequential-memory", self.folder / "start-unfinished", "--sparsity", "0.25")
        Writer.write_shard = real  # type: ignore[method-assign]
        for start in ("foreign", "finished", "unfinished"):
            (self.folder / f"start-{start}" / NOTES).write_text("mine")

    def _keep_what_is_the_same(self) -> None:
        """Let copies find what comes before the output ready-made."""
        prepare, build = pruning._prepare, source.build_skeleton

        def prepared(recipe: Any, folder: Path, budget: int | None, progress: Any, ranks: Any) -> Any:
            key = (recipe.model_dump_json(), budget)
            if key not in self._prepared:
                self._prepared[key] = prepare(recipe, folder, budget, progress, ranks)
            return dataclasses.replace(self._prepared[key], progress=progress)

        pruning._prepare = prepared
        for setting in SETTINGS:
            self._command(setting, self.folder / f"whole-{setting}", "--resume")  # it is finished: nothing but prepared
        some = next(iter(self._prepared.values())).source
        ready = {}  # a run has a second one, for the reload check
        for setting in SETTINGS:
            reader = Reader(self.folder / f"whole-{setting}")
            ready[json.dumps(reader.config)] = build(reader, some.dtype, some.device)

        def built(reader: Reader, *rest: Any, **named: Any) -> Any:
            return ready.pop(json.dumps(reader.config), None) or build(reader, *rest, **named)

        source.build_skeleton = built

    # One run.

    def attempt(self, job: dict[str, Any], number: int, fault: dict[str, Any] | None, *words: str) -> Attempt:
        """A run in a copy of this process; `fault` is what happens in it."""
        place = self.folder / f"job-{job['id']}"
        said = place / f"said-{number}"
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.close(ours)
            self._run(job, place / "out", fault, said, theirs, words)
        os.close(theirs)
        delay = fault["delay"] if fault is not None and fault["kind"] == "clock" else None
        events, hung = _listen(ours, child, delay)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Attempt(status, events, said.read_text() if said.exists() else "", hung)

    def _run(
        self,
        job: dict[str, Any],
        out: Path,
        fault: dict[str, Any] | None,
        said: Path,
        pipe: int,
        words: tuple[str, ...],
    ) -> None:
        """What the copy does; it never returns."""
        write = os.write
        paper = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(paper, 1)
        os.dup2(paper, 2)
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def note(*event: Any) -> None:
            write(pipe, (json.dumps(event) + "\n").encode())

        wanted = None
        if fault is not None and fault["kind"] != "clock":
            wanted = Fault(fault["kind"], fault["at"], fault.get("seed", 0))
        disk = Disk(out, wanted, None if fault is None else fault.get("jitter"))
        code: Any = 70
        try:
            _watch(note)
            for name in job.get("sabotage", []):
                SABOTAGE[name]()
            disk.install()
            sys.argv = self._words(
                job["setting"] if fault is not None else job.get("then", job["setting"]), out, *words
            )
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        threading._shutdown()  # type: ignore[attr-defined] (as Python ends: threads are waited for)
        if fault is not None and job.get("record"):
            (out.parent / "labels.json").write_text(json.dumps(disk.labels))
        note("fired", disk.fired)
        note("unseen", disk.unseen())
        os._exit(code)

    # A chain of them.

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Let the job's faults happen one after the other, finish the run, and see what is wrong."""
        place = self.folder / f"job-{job['id']}"
        place.mkdir()
        out = place / "out"
        start = job.get("start")
        if start is not None:
            shutil.copytree(self.folder / f"start-{start}", out)
        attempts: list[Attempt] = []
        wrong: list[str] = []
        for number, fault in enumerate(job["faults"]):
            how = ["--resume"] if number else [] if start is None else ["--overwrite"]
            before = set(contents(out))
            attempts.append(self.attempt(job, number, fault, *how))
            wrong += _judge(fault, attempts[-1], out, before)
        last = self.attempt(job, len(attempts), None, "--resume")
        refused = last.status == 2 and start is not None
        if refused:  # nothing of the new run was noted yet, so it is begun again
            last = self.attempt(job, len(attempts) + 1, None, "--overwrite")
        attempts.append(last)
        if last.status or last.hung:
            wrong.append(f"could not be finished ({last.status}): {last.message[-600:]}")
        else:
            wrong += self._compare(job["setting"], out, start)
        wrong += [
            f"changed behind the disk's back: {name}"
            for attempt in attempts
            for names in attempt.of("unseen")
            for name in names
        ]
        again, forwarded, trouble = _redone([] if refused else attempts)
        result = {
            **job,
            "status": [attempt.status for attempt in attempts],
            "fired": [attempt.fired for attempt in attempts[:-1]],
            "pruned_again": again,
            "forwarded_again": forwarded,
            "refused": refused,
            "violations": wrong + trouble,
        }
        if job.get("record"):
            result["labels"] = json.loads((place / "labels.json").read_text())
        if not result["violations"]:
            shutil.rmtree(place)
        return result

    def _compare(self, setting: str, out: Path, start: str | None) -> list[str]:
        """How a finished folder differs from that of an uninterrupted run."""
        found, wanted = contents(out), dict(self.whole[setting])
        if start is not None:
            wanted[NOTES] = b"mine"
        wrong = [f"missing in the end: {name}" for name in sorted(wanted.keys() - found.keys())]
        wrong += [f"left in the end: {name}" for name in sorted(found.keys() - wanted.keys())]
        same = (found.keys() & wanted.keys()) - set(_TIMED)
        wrong += [f"not the same bytes: {name}" for name in sorted(same) if found[name] != wanted[name]]
        if "prunekit.json" in found:
            ours, theirs = (_untimed(json.loads(files["prunekit.json"])) for files in (found, wanted))
            wrong += [f"the manifest's {part} is another" for part in theirs if ours[part] != theirs[part]]
        return wrong


def _untimed(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says besides how long it took, and in how much memory."""
    same = ("outputs", "recipe", "inputs", "calibration_tokens")
    counts = ("parameters", "removed", "block_parameters", "weights", "zeros", "sparsity", "blocks")
    return {
        **{part: manifest[part] for part in same},
        **{f"run.{name}": manifest["run"][name] for name in counts},
        "linears": [{name: value for name, value in line.items() if name != "seconds"} for line in manifest["linears"]],
    }


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """The weights among them."""
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def _listen(pipe: int, child: int, delay: float | None) -> tuple[list[Event], bool]:
    """What a copy tells, until it is gone; after `delay` seconds it is killed, and after a long time, too."""
    told = b""
    hung = False
    patience = PATIENCE if delay is None else delay
    until = time.monotonic() + patience
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            hung = delay is None
            until = time.monotonic() + PATIENCE
            continue
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        told += part
    os.close(pipe)
    return [json.loads(line) for line in told.decode().splitlines()], hung


def _watch(note: Callable[..., None]) -> None:
    """Tell which blocks are pruned and passed, and what is durable."""
    forward, add, keep, save = BlockWalk.pass_on, Journal.add, Journal.note_hidden, Journal.save
    write, look = Writer.write_shard, ShrinkWalk.look_ahead

    def number(work: BlockWalk, index: int) -> int:
        """Of a block among those that stay, as shards and hidden states are numbered."""
        return [block.index for block in work.blocks].index(index)

    def watched(prune: Callable[..., Any]) -> Callable[..., Any]:
        def prune_block(self: Any, block: Any, *rest: Any) -> Any:
            note("pruned", number(self, block.index))
            return prune(self, block, *rest)

        return prune_block

    def pass_on(self: Any, index: int, *rest: Any) -> Any:
        note("passed", number(self, index))
        return forward(self, index, *rest)

    def look_ahead(self: Any, known: Any, *rest: Any) -> Any:
        if self.looks_ahead and known is None:
            note("looked ahead", True)
        return look(self, known, *rest)

    def saved(self: Any) -> None:
        save(self)
        if self.profile is not None:
            note("profile", True)

    def write_shard(self: Any, position: int, *rest: Any) -> Any:
        note("written", position)
        return write(self, position, *rest)

    def noted(self: Any, shard: dict[str, Any], *rest: Any) -> None:
        add(self, shard, *rest)
        note("durable", shard["position"])

    def noted_hidden(self: Any, block: int, *rest: Any) -> None:
        keep(self, block, *rest)
        note("hidden", block)

    for work in (SparsifyWalk, ShrinkWalk, SliceWalk):
        work.prune_block = watched(work.prune_block)  # type: ignore[method-assign]
    BlockWalk.pass_on, ShrinkWalk.look_ahead = pass_on, look_ahead  # type: ignore[method-assign]
    Writer.write_shard = write_shard  # type: ignore[method-assign]
    Journal.add, Journal.note_hidden, Journal.save = noted, noted_hidden, saved  # type: ignore[method-assign]


def _judge(fault: dict[str, Any], attempt: Attempt, out: Path, before: set[str]) -> list[str]:
    """What is wrong with how a run ended after its fault; `before` are the files there were."""
    kind, status, message = fault["kind"], attempt.status, attempt.message
    wrong = []
    if attempt.hung:
        return [f"hung: {message[-600:]}"]
    if "Traceback" in message:
        wrong.append(f"a traceback: {message[-1500:]}")
    if isinstance(fault.get("at"), str) and not attempt.fired:
        wrong.append(f"{fault['at']} never came")
    if kind in (*KILLS, "clock"):
        allowed: tuple[int, ...] = (-signal.SIGKILL,) if isinstance(fault.get("at"), str) else (-signal.SIGKILL, 0)
    else:
        allowed = (0, 130) if kind == "interrupt" else (0, 1, 2)
    if status not in allowed:
        wrong.append(f"ended with {status}: {message[-600:]}")
    if kind in ERRORS and status in (1, 2):
        if not any(words in message for words in ("No space left", "Input/output error", "Read-only file system")):
            wrong.append(f"does not say what the system said: {message[-600:]}")
        if status == 1 and attempt.of("written") and "--resume continues" not in message:
            wrong.append(f"does not say how to go on: {message[-600:]}")
        if status == 2 and not before and kind == "error" and out.exists():
            wrong.append(f"refused as wrong input, and left {sorted(contents(out))}")
    if kind in ("error", "interrupt") and status:
        left = [name for name in sorted(contents(out).keys() - before) if storage.is_temporary(Path(name))]
        held = status == 1 or lock.LOCK_NAME not in before  # a refused run never held what a killed one left
        # an interruption may come just before it is removed
        if kind == "error" and held and lock.LOCK_NAME in contents(out):
            left.append(lock.LOCK_NAME)
        wrong += [f"left behind: {name}" for name in left]
    return wrong


def _redone(attempts: list[Attempt]) -> tuple[int, int, list[str]]:
    """The most blocks that one run pruned again and passed again, and what is more than was promised."""
    pruned: set[int] = set()
    durable: set[int] = set()
    hidden_of = -1
    most_again = most_forwarded = 0
    profiled = False
    wrong = []
    for attempt in attempts:
        if profiled and attempt.of("looked ahead"):
            wrong.append("looked ahead again, though what was found was durable")
        profiled |= bool(attempt.of("profile"))
        now = set(attempt.of("pruned"))
        again = sorted(now & pruned)
        forwarded = sorted(set(attempt.of("passed")) - now)
        lost = sorted(set(attempt.of("written")) & durable)
        touched = now | set(attempt.of("passed"))
        most_again, most_forwarded = max(most_again, len(again)), max(most_forwarded, len(forwarded))
        if len(again) > 1:
            wrong.append(f"blocks {again} were pruned again")
        if len(forwarded) > 1:
            wrong.append(f"blocks {forwarded} were passed again")
        if lost:
            wrong.append(f"shards {lost} were durable and were written again")
        if touched and min(touched) < hidden_of:
            wrong.append(f"began with block {min(touched)}, though the inputs of {hidden_of} were durable")
        pruned |= now
        durable |= set(attempt.of("durable"))
        hidden_of = max([hidden_of, *attempt.of("hidden")])
    return most_again, most_forwarded, wrong


# Ways of doing it wrong, that the tests of these tests use: each must be found out.


class _Careless:
    """`os`, but files are not synced."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            os.fsync(handle)


def _no_fsync(module: Any) -> None:
    module.os = _Careless()


def _no_folder_sync() -> None:
    storage.sync_folder = lambda folder: None


def _no_temporary() -> None:
    for module in (storage, writer, shard):
        module.replace_file = lambda path, write: write(path)  # type: ignore[attr-defined]


def _trust_hidden() -> None:
    keeper.is_whole = lambda path, parts, window: path.is_file()


def _never_trust_hidden() -> None:
    keeper.is_whole = lambda path, parts, window: False


def _never_use_plans() -> None:
    read = Journal.read

    def forgetful(folder: Path) -> Journal | None:
        journal = read(folder)
        return None if journal is None else dataclasses.replace(journal, profile=None)

    Journal.read = forgetful  # type: ignore[method-assign,assignment]


SABOTAGE: dict[str, Callable[[], None]] = {
    "shards are not synced": partial(_no_fsync, storage),
    "hidden states are not synced": partial(_no_fsync, hidden),
    "folders are not synced": _no_folder_sync,
    "files are written in place": _no_temporary,
    "hidden states are trusted": _trust_hidden,
    "hidden states are not used": _never_trust_hidden,
    "plans are not used": _never_use_plans,
}


def main() -> None:
    """Make everything, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    driver = Driver(Path(sys.argv[1]))
    ready = {}
    for setting in SETTINGS:
        whole = {"kind": "clock", "delay": PATIENCE}
        job = {"id": f"record-{setting}", "setting": setting, "faults": [whole], "record": True}
        found = driver.do(job)
        assert not found["violations"], found
        ready[setting] = {"labels": found["labels"], "seconds": driver.seconds[setting]}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        _answer(driver, [json.loads(job) for job in Path(line.strip()).read_text().splitlines()], answers)


def _answer(driver: Driver, jobs: list[dict[str, Any]], answers: Any) -> None:
    """Do the jobs, two at a time where there are two cores, each in a copy that makes the copies that run."""
    width = min(2, os.cpu_count() or 1)
    at_work: dict[int, dict[str, Any]] = {}
    waiting = list(reversed(jobs))
    while waiting or at_work:
        while waiting and len(at_work) < width:
            job = waiting.pop()
            child = os.fork()
            if not child:
                try:
                    result = driver.do(job)
                except BaseException:
                    result = {**job, "violations": [traceback.format_exc()]}
                (driver.folder / f"result-{job['id']}").write_text(json.dumps(result))
                os._exit(0)
            at_work[child] = job
        child, status = os.waitpid(-1, 0)
        job = at_work.pop(child)
        path = driver.folder / f"result-{job['id']}"
        text = path.read_text() if path.exists() else json.dumps({**job, "violations": [f"the driver died: {status}"]})
        path.unlink(missing_ok=True)
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()
