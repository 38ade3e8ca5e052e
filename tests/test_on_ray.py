"""Runs and searches as Ray tasks: against a real Ray that is started for it on this machine, as the command line does it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
import tiny
from helpers import shards
from prunekit import InputError, Recipe, on_ray
from prunekit.grid import EvaluationOptions
from prunekit.sweeping import Record, Run
from test_cli import call

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'prunekit[ray]'")
SECONDS = 300  # after which a Ray that hangs is given up

GRID: dict[str, Any] = {
    "model": "good",
    "dtype": "float32",
    "calibration": {"source": "text.txt", "samples": 3, "length": 32},
    "grid": {"seed": [0]},
}

SLOW_DISK = """
import os
import time

replace, fsync = os.replace, os.fsync


def slowly(source, target, **options):
    if os.fspath(target).endswith(".safetensors"):
        time.sleep(0.5)
    replace(source, target, **options)


def slowly_noted(descriptor):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("study.log"):
        time.sleep(0.2)
    fsync(descriptor)


os.replace, os.fsync = slowly, slowly_noted
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text, both named relative to it, in which everything is started."""
    tiny.save_model(tmp_path / "good")
    (tmp_path / "text.txt").write_text(tiny.make_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the runs have below, because their number can change bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Started:
    """`prunekit ... --out out --ray local` in a process of its own, with its workers on a slow disk.

    The disk takes its time over every shard and every line of a journal, so what is done to a run after its third shard, or to a trial
    after its first line, is in time on any machine.
    """

    folder: Path
    words: list[str]

    def __enter__(self) -> Started:
        words = [*self.words, "--out", "out", "--ray", "local", "--cpus-per-run", "1", "--json"]
        disk = self.folder / "disk"
        disk.mkdir()
        (disk / "sitecustomize.py").write_text(SLOW_DISK)
        places = [disk, Path(prunekit.__file__).parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
        self.out, self.err = (self.folder / "stdout").open("w"), (self.folder / "stderr").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "prunekit", *words],
            cwd=self.folder,
            stdout=self.out,
            stderr=self.err,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},  # which Ray hands on to its workers
            start_new_session=True,  # so that it can be interrupted as a terminal does it, children and all
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.out.close()
        self.err.close()

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """What is found, once something is."""
        end = time.monotonic() + SECONDS
        while not (something := found()):
            assert self.process.poll() is None, (self.folder / "stderr").read_text()
            assert time.monotonic() < end, (self.folder / "stderr").read_text()
            time.sleep(0.02)
        return something

    def worker(self, name: str) -> int | None:
        """Process id of the worker that carries out run `name`, known by its title and its working folder."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_bytes().decode(errors="replace")
                if title.startswith(f"ray::{name}") and (process / "cwd").resolve() == self.folder:
                    return int(process.name)
        return None


def sweeping(folder: Path, grid: dict[str, Any]) -> Started:
    (folder / "grid.json").write_text(json.dumps(GRID | grid))
    return Started(folder, ["sweep", "grid.json"])


@needs_ray
@pytest.mark.usefixtures("one_thread")
def test_runs_on_a_real_ray_fail_alone_and_succeed_as_in_this_process(folder: Path) -> None:
    tiny.save_model(folder / "late")
    tensors = load_file(folder / "late" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, folder / "late" / "model.safetensors", metadata={"format": "pt"})
    tiny.save_model(folder / "slow", num_hidden_layers=40)
    slow, late, good = (f"{name}_wanda_0.5_seed0" for name in ("slow", "late", "good"))
    evaluation = {"text": "text.txt", "length": 32, "samples": 4, "dtype": "float32"}
    grid = {"grid": {"model": ["slow", "late", "good"]}, "evaluate": evaluation}
    with sweeping(folder, grid) as sweep:
        sweep.wait_for((folder / "out" / slow / "model-00003-of-00041.safetensors").exists)
        worker = sweep.worker(slow)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)  # as the system does where memory runs out
        code = sweep.process.wait(SECONDS)
    stderr = (folder / "stderr").read_text()
    assert code == 1, stderr
    (line,) = (folder / "stdout").read_text().splitlines()  # Ray's own messages are not among the results
    found = json.loads(line)
    assert (found["done"], found["failed"]) == (1, 2)
    rows = [json.loads(row) for row in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["status"]) for row in rows] == [(slow, "failed"), (late, "failed"), (good, "done")]
    assert [row["error_kind"] for row in rows] == ["WorkerCrashedError", "InputError", None]
    assert "died" in rows[0]["error"]
    assert "model.layers.2.mlp.up_proj" in rows[1]["error"]
    assert rows[2]["peak_rss_bytes"] > 10_000_000
    assert "FutureWarning" not in stderr

    # what came out is what this process makes
    alone = prunekit.prune("good", out="alone", calibration=GRID["calibration"], dtype="float32")
    made = shards(Path("alone"))
    assert made == shards(folder / "out" / good)
    assert len(made) == 4
    assert rows[2]["zeros"] == alone.zeros
    assert rows[2]["perplexity"] == prunekit.evaluate("alone", **evaluation).perplexity

    # and what Ray lost is continued here
    done = call("sweep", "grid.json", "--out", "out", "--retry", "--json")
    assert (done.code, done.json["done"], done.json["skipped"]) == (1, 2, 1)
    assert "resuming: " in done.err
    assert [failure["name"] for failure in done.json["failures"]] == [late]


@needs_ray
@pytest.mark.usefixtures("one_thread")
def test_an_interrupt_ends_the_tasks_and_the_same_command_goes_on(folder: Path) -> None:
    tiny.save_model(folder / "slow", num_hidden_layers=40)
    name = "slow_wanda_0.5_seed0"
    with sweeping(folder, {"model": "slow"}) as sweep:
        sweep.wait_for((folder / "out" / name / "model-00003-of-00041.safetensors").exists)
        os.killpg(sweep.process.pid, signal.SIGINT)
        assert sweep.process.wait(SECONDS) == 130
        end = time.monotonic() + SECONDS
        while sweep.worker(name) is not None:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert (folder / "stdout").read_text() == ""
    assert "0 of 1 runs" in (folder / "stderr").read_text()
    done = call("sweep", "grid.json", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert "resuming: " in done.err


@needs_ray
def test_tasks_share_a_search_and_what_one_leaves_undone_is_done_all_the_same(folder: Path) -> None:
    few = ["--samples", "2", "--length", "32", "--text-samples", "2", "--test-samples", "2", "--dtype", "float32"]
    words = [
        "tune",
        "good",
        "--space",
        "scores",
        "--presets",
        "wanda,ria,stade",
        "--calibration",
        "text.txt",
        "--test",
        "text.txt",
    ]
    words += [*few, "--trials", "4"]

    def begun() -> list[int]:
        """Process ids of those who have begun a trial."""
        log = folder / "out" / "study.log"
        lines = log.read_text().splitlines()[:-1] if log.exists() else []
        noted = (json.loads(line).get("user_attr", {}).get("worker", "") for line in lines)
        return [int(who.split()[1]) for who in noted if who]

    with Started(folder, words) as search:
        victim = search.wait_for(begun)[0]
        assert victim != search.process.pid
        os.kill(victim, signal.SIGKILL)
        code = search.process.wait(SECONDS)
    stderr = (folder / "stderr").read_text()
    assert code == 0, stderr
    assert stderr.count("a task of the search ended") == 1, stderr
    found = json.loads((folder / "stdout").read_text())
    assert found["trials"] == 4
    assert sorted(trial["preset"] for trial in found["presets"]) == ["ria", "stade", "wanda"]
    trials = [json.loads(line) for line in (folder / "out" / "trials.jsonl").read_text().splitlines()]
    assert len({trial["number"] for trial in trials}) == 4
    assert len(set(begun())) > 1, "another took over"

    # what was tried there is tried no more, and what a method gives does not depend on who tries it
    more = call(*words[:-1], "5", "--out", "out", "--json")
    assert more.code == 0, more.err
    assert more.json["trials"] == 5
    assert more.json["presets"] == found["presets"]
    alone = call(*words[:-1], "3", "--out", "alone", "--json")
    figures = ("recipe", "perplexity", "test_perplexity", "sparsity")
    here, there = (
        {each["preset"]: [each[name] for name in figures] for each in one.json["presets"]} for one in (alone, more)
    )
    assert here == there


# What needs no Ray


@needs_ray
@pytest.mark.parametrize("address", ["", "nonsense", "host:", "host:port", ":", "6379x"])
def test_what_is_no_address_is_refused(address: str, folder: Path) -> None:
    (folder / "grid.json").write_text(json.dumps(GRID))
    done = call("sweep", "grid.json", "--out", "out", "--ray", address)
    assert done.code == 2
    assert f"'{address}'" in done.err
    assert not Path("out").exists()


def test_without_ray_one_is_told_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda _: None)
    (folder / "grid.json").write_text(json.dumps(GRID))
    done = call("sweep", "grid.json", "--out", "out", "--ray", "local")
    assert done.code == 2
    assert "pip install 'prunekit[ray]'" in done.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words", [["--cpus-per-run", "2"], ["--gpus-per-run", "1"], ["--ray", "local", "--cpus-per-run", "0"],
              ["--ray", "local", "--gpus-per-run", "-1"]]
)  # fmt: skip
def test_shares_that_make_no_sense_are_refused(words: list[str], folder: Path) -> None:
    (folder / "grid.json").write_text(json.dumps(GRID))
    done = call("sweep", "grid.json", "--out", "out", *words)
    assert done.code == 2
    assert not Path("out").exists()


@needs_ray
def test_a_cluster_that_does_not_answer_is_named_at_once(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"no Ray answers at '{address}'"):
            prunekit.sweep(GRID, out="out", ray=address)


def job(folder: Path) -> on_ray._Job:
    recipe = Recipe.build({name: value for name, value in GRID.items() if name != "grid"} | {"method": "wanda"})
    record = Record(recipe=recipe.model_dump(mode="json"), owned=True)
    run = Run("name", recipe, folder / "out" / "name", record, EvaluationOptions(text="text.txt"))
    return on_ray._Job.of(run, 10**9, 1)


def test_a_node_that_does_not_see_the_sweeps_folder_says_so(folder: Path) -> None:
    record = on_ray._task(job(folder))
    assert record.failed is not None
    assert record.failed["kind"] == "InputError"
    assert f"does not see the sweep's folder '{folder / 'out'}'" in record.failed["sentence"]
    assert socket.gethostname() in record.failed["sentence"]


def test_a_node_that_does_not_see_a_model_or_a_text_says_so(folder: Path) -> None:
    made = job(folder)
    assert sorted(made.paths) == ["good", "text.txt", "text.txt"]
    made.run.record_path.parent.mkdir(parents=True)
    made.run.record_path.write_text(json.dumps({"recipe": made.run.record.recipe, "owned": True}))
    (folder / "text.txt").rename(folder / "elsewhere.txt")
    record = on_ray._task(made)
    assert record.failed is not None
    assert "does not see 'text.txt'" in record.failed["sentence"]


@pytest.mark.parametrize(
    ("device", "asked", "nodes", "expected"),
    [
        ("auto", None, [{"CPU": 8}], 0),
        ("auto", None, [{"CPU": 8}, {"CPU": 8, "GPU": 4}], 1),
        ("cpu", None, [{"CPU": 8, "GPU": 4}], 0),
        ("cuda", None, [{"CPU": 8}], 1),
        ("cuda", 0.5, [{"CPU": 8, "GPU": 4}], 0.5),
        ("auto", 0, [{"CPU": 8, "GPU": 4}], 0),
    ],
)
def test_accelerators_follow_the_device(
    device: str, asked: float | None, nodes: list[dict[str, float]], expected: float
) -> None:
    recipe = Recipe.build({"model": "M", "method": "wanda", "device": device})
    assert on_ray._gpus(recipe, asked, nodes) == expected


def test_a_device_with_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="cuda:1"):
        on_ray._gpus(Recipe.build({"model": "M", "method": "wanda", "device": "cuda:1"}), None, [{"GPU": 2}])


def test_only_nodes_with_enough_of_everything_fit() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert on_ray._fitting(nodes, {"num_cpus": 4, "num_gpus": 0}) == [nodes[0], nodes[2]]
    assert on_ray._fitting(nodes, {"num_cpus": 1, "num_gpus": 2}) == [nodes[2]]
    assert on_ray._fitting(nodes, {"num_cpus": 9, "num_gpus": 0}) == []


def test_memory_is_predicted_once_for_runs_that_take_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def predict(recipe: Recipe, out: Path) -> int:
        asked.append(recipe)
        return 1000 + len(asked)

    monkeypatch.setattr(on_ray, "predicted_memory", predict)
    known: dict[str, int] = {}

    def memory(**changes: Any) -> int:
        recipe = Recipe.build({"model": "good", "method": "wanda"} | changes)
        return on_ray._memory(Run("n", recipe, folder, Record(recipe={}), None), known)

    assert memory() == memory(seed=3, pattern="2:4") == memory(device="cuda") == 1001
    assert memory(calibration={"samples": 7}) == 1002
    assert memory(method="magnitude") == 1003


def test_the_prediction_covers_the_model(folder: Path) -> None:
    size = (folder / "good" / "model.safetensors").stat().st_size
    recipe = Recipe.build({"model": "good", "method": "wanda", "calibration": {"samples": 2, "length": 16}})
    assert size < on_ray.predicted_memory(recipe, folder / "out") < 10**10
