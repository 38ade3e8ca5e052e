"""As databases are tested: at every operation on the output folder something goes wrong, and `--resume` must make it good.

Afterwards every file is what an uninterrupted run writes, byte for byte; nothing is left over; at most one block was pruned again
and at most one was only passed again; nothing that had been noted was written again. `driver.py` says how, `disk.py` what with.

`PRUNEKIT_FAULTS=2000` kills at every operation of every setting and draws about so many faults besides; `PRUNEKIT_FAULT_SEED`
repeats a drawing. How many were injected and survived is said at the end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import CHANGING, ERRORS

import prunekit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be copied")

FAULTS = int(os.environ.get("PRUNEKIT_FAULTS", "0"))
JOBS = -(-FAULTS // 13)  # of each of ten sorts; some are chains
SEED = int(os.environ.get("PRUNEKIT_FAULT_SEED", "20261122"))  # the same for everyone: what fails, fails again
MODES = ["sequential", "dense", "refitted", "biased", "shallower", "sliced", "tuned", "narrowed"]
SETTINGS = [f"{mode}-{where}" for mode in MODES for where in ("memory", "files")]
EVERYWHERE = (
    "dense-memory"  # measuring overwrites its inputs, and they are saved by another thread: the hardest of them
)
STARTS = ["foreign", "finished", "unfinished"]
KINDS = ["kill", "torn", "power", "error", "full", "readonly", "interrupt"]
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # or the driver could not be copied

Job = dict[str, Any]


class Driver:
    """The process that does the runs, and what it told about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = Path(prunekit.__file__).parents[1]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            **dict.fromkeys(ONE_THREAD, "1"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": path,
        }
        self.said = folder / "driver.log"
        with self.said.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("driver.py"), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")},
            )
        ready = self._answer()
        self.operations: dict[str, list[str]] = {setting: ready[setting]["labels"] for setting in SETTINGS}
        self.seconds: dict[str, float] = {setting: ready[setting]["seconds"] for setting in SETTINGS}
        self._jobs = 0

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the driver died:\n{self.said.read_text()[-3000:]}"
        return json.loads(line)

    def do(self, jobs: list[Job]) -> list[Job]:
        """Each job with what came of it."""
        assert jobs
        assert self._process.stdin is not None
        self._jobs += 1
        numbered = [{**job, "id": f"{self._jobs}-{number}"} for number, job in enumerate(jobs)]
        path = self.folder / f"jobs-{self._jobs}"
        path.write_text("\n".join(map(json.dumps, numbered)))
        print(path, file=self._process.stdin, flush=True)
        return [self._answer() for _ in jobs]

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("faults"))
    yield driver
    driver.close()


@pytest.fixture
def survive(driver: Driver, record_property: Callable[[str, object], None]) -> Callable[[list[Job]], list[Job]]:
    """Do jobs, count them, and have none go wrong."""

    def survive(wanted: list[Job]) -> list[Job]:
        found = driver.do(wanted)
        failed = [job for job in found if job["violations"]]
        done, lost = (Counter(kind for job in jobs for kind in happened(job)) for jobs in (found, failed))
        record_property("faults", {kind: (count, count - lost[kind]) for kind, count in done.items()})
        record_property("fault seed", SEED)
        shown = "\n".join(f"{describe(job)}: {' | '.join(job['violations'])[:1500]}" for job in failed[:5])
        assert not failed, f"{len(found) - len(failed)} of {len(found)} survived, PRUNEKIT_FAULT_SEED={SEED}:\n{shown}"
        assert done, "nothing went wrong, so nothing was tried"
        return found

    return survive


def happened(job: Job) -> list[str]:
    """The kinds of its faults that came to pass: a run may be over before one."""
    return [fault["kind"] for fault, fired in zip(job["faults"], job.get("fired", []), strict=False) if fired]


def describe(job: Job) -> str:
    faults = ", ".join(f"{fault['kind']} at {fault.get('at', fault.get('delay'))!r}" for fault in job["faults"])
    return f"{job['setting']}{' over a ' + job['start'] + ' one' if 'start' in job else ''}: {faults} ({job['id']})"


def changing(operations: list[str]) -> list[str]:
    """Those before which a kill leaves something else than before the one before."""
    return [label for label in operations if label.split()[0] in CHANGING]


def draw_one(draw: random.Random, operations: dict[str, list[str]], kind: str) -> Job:
    """A run in which one thing goes wrong, at any operation it can go wrong at."""
    setting = draw.choice(SETTINGS)
    labels = operations[setting] if kind in ERRORS else changing(operations[setting])
    fault = {"kind": kind, "at": draw.choice(labels), "seed": draw.getrandbits(30), "jitter": draw.getrandbits(30)}
    return {"setting": setting, "faults": [fault]}


def draw_chain(draw: random.Random, kinds: list[str] = KINDS) -> Job:
    """A run that is resumed, and something goes wrong again, and again."""
    faults = [
        {
            "kind": draw.choice(kinds),
            "at": draw.randrange(160),
            "seed": draw.getrandbits(30),
            "jitter": draw.getrandbits(30),
        }
        for _ in range(draw.randint(2, 5))
    ]
    setting = draw.choice(SETTINGS)
    mode = setting.split("-")[0]
    return {"setting": setting, "then": f"{mode}-{draw.choice(['memory', 'files'])}", "faults": faults}


def draw_kills(draw: random.Random, seconds: dict[str, float]) -> Job:
    """A run that is killed from outside, whatever it does just then, and again."""
    setting = draw.choice(SETTINGS)
    return {
        "setting": setting,
        "faults": [
            {"kind": "clock", "delay": draw.random() * seconds[setting], "jitter": draw.getrandbits(30)}
            for _ in range(draw.randint(1, 3))
        ],
    }


def draw_overwriting(draw: random.Random) -> Job:
    """A run over what was there, in which something goes wrong, mostly while that is removed."""
    fault = {
        "kind": draw.choice(["kill", "power", "interrupt"]),
        "at": draw.randrange(40),
        "seed": draw.getrandbits(30),
    }
    return {"setting": draw.choice(SETTINGS), "start": draw.choice(STARTS), "faults": [fault]}


def test_killed_before_every_operation(driver: Driver, survive: Callable[[list[Job]], list[Job]]) -> None:
    settings = SETTINGS if FAULTS else [EVERYWHERE]
    jobs = [
        {"setting": setting, "faults": [{"kind": "kill", "at": label}]}
        for setting in settings
        for label in changing(driver.operations[setting])
    ]
    found = survive(jobs)
    assert all(job["fired"] == [True] for job in found)
    # a block's work is lost now and then, or nothing was at stake
    assert {job["pruned_again"] for job in found} == {0, 1}
    assert {job["forwarded_again"] for job in found} == {0, 1}


def test_killed_before_every_note_of_what_keeps_more_than_weights(
    driver: Driver, survive: Callable[[list[Job]], list[Job]]
) -> None:
    # what a resumed run has to know differs from note to note: the plan, units and biases of blocks, hidden states of two kinds, bases
    found = survive(
        [
            {"setting": setting, "faults": [{"kind": "kill", "at": label}]}
            for setting in ("refitted-memory", "biased-files", "sliced-memory", "tuned-files", "narrowed-memory")
            for label in driver.operations[setting]
            if label.startswith("move out/.prunekit-journal.json")
        ]
    )
    assert all(job["fired"] == [True] for job in found)


@pytest.mark.parametrize("kind", KINDS)
def test_one_thing_goes_wrong(driver: Driver, survive: Callable[[list[Job]], list[Job]], kind: str) -> None:
    draw = random.Random(f"{SEED} {kind}")
    count = JOBS or {"kill": 4, "power": 20}.get(kind, 8)
    found = survive([draw_one(draw, driver.operations, kind) for _ in range(count)])
    assert all(job["fired"] == [True] for job in found)


def test_things_go_wrong_again_and_again(survive: Callable[[list[Job]], list[Job]]) -> None:
    draw = random.Random(f"{SEED} chain")
    survive([draw_chain(draw) for _ in range(JOBS or 10)])


def test_killed_from_outside_at_any_moment(driver: Driver, survive: Callable[[list[Job]], list[Job]]) -> None:
    draw = random.Random(f"{SEED} clock")
    survive([draw_kills(draw, driver.seconds) for _ in range(JOBS or 12)])


def test_killed_while_overwriting(survive: Callable[[list[Job]], list[Job]]) -> None:
    draw = random.Random(f"{SEED} overwrite")
    survive([draw_overwriting(draw) for _ in range(JOBS or 15)])


# Tests of these tests: what is done wrong is found out.


_SHARD, _NOTE = (
    "write out/.model-00004-of-00005.safetensors.prunekit-tmp",
    "write out/..prunekit-journal.json.prunekit-tmp",
)
_LATE = [f"{_SHARD}#5", f"{_NOTE}#8"]  # behind the first blocks, where something can be lost
CARELESS = {
    "shards are not synced": ("power", _LATE, ["were durable and were written again", "could not be finished"]),
    "folders are not synced": ("power", _LATE, ["were durable and were written again"]),
    "files are written in place": ("torn", ["write out/.prunekit-journal.json#7"], ["could not be finished"]),
    "hidden states are not synced": ("power", _LATE, ["though the inputs of"]),
    "hidden states are not synced + hidden states are trusted": ("power", _LATE, ["does not compute what was pruned"]),
    "hidden states are not used": ("kill", _LATE, ["were passed again"]),
    "plans are not used": ("kill", _LATE, ["looked ahead again"]),
}


@pytest.mark.parametrize("sabotage", CARELESS)
def test_carelessness_is_found_out(driver: Driver, sabotage: str) -> None:
    kind, labels, words = CARELESS[sabotage]
    jobs = [
        {
            "setting": "refitted-memory" if "plans" in sabotage else "sequential-memory",
            "sabotage": sabotage.split(" + "),
            "faults": [{"kind": kind, "at": label, "seed": seed}],
        }
        for label in labels
        for seed in range(4 if kind == "power" else 1)  # what is lost is drawn
    ]
    found = [violation for job in driver.do(jobs) for violation in job["violations"]]
    assert any(word in violation for violation in found for word in words), found
