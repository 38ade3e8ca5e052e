"""A sweep does what single runs do, skips what is done, goes on behind what fails, and keeps a table that is always whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import prunekit
import tiny
from helpers import ctrl_c, shards
from prunekit import machine, pruning, sweeping
from prunekit.checkpoint.shard import Piece
from prunekit.checkpoint.writer import JOURNAL_NAME, Writer
from test_cli import call

WANDA, MAGNITUDE = "model_wanda_0.5_seed0", "model_magnitude_0.5_seed0"
BOTH = {"method": ["wanda", "magnitude"]}


class Setting:
    """A model and a text, lying in `inputs`, and a sweep over them in a folder of its own."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.folder, self.model, self.text = folder, inputs / "model", inputs / "text.txt"
        self.out, self.file = folder / "out", folder / "grid.json"

    def values(self, axes: dict[str, Any] | None = None, **base: Any) -> dict[str, Any]:
        calibration = {"source": str(self.text), "samples": 3, "length": 32}
        return {"model": str(self.model), "dtype": "float32", "calibration": calibration, "grid": axes or BOTH} | base

    def sweep(self, axes: dict[str, Any] | None = None, *, retry: bool = False, **base: Any) -> prunekit.Sweep:
        return prunekit.sweep(self.values(axes, **base), out=self.out, retry=retry)

    def call(self, *words: object, axes: dict[str, Any] | None = None, **base: Any) -> Any:
        self.file.write_text(json.dumps(self.values(axes, **base)))
        return call("sweep", self.file, "--out", self.out, *words)

    def evaluation(self, **options: Any) -> dict[str, Any]:
        return {"text": str(self.text), "length": 32, "samples": 4, "dtype": "float32"} | options

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]

    def record(self, name: str) -> dict[str, Any]:
        found = json.loads((self.out / "runs" / f"{name}.json").read_text())
        assert isinstance(found, dict)
        return found


@pytest.fixture
def setting(inputs: Path, tmp_path: Path) -> Setting:
    """A sweep that has not begun."""
    return Setting(inputs, tmp_path)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    setting = Setting(inputs, tmp_path_factory.mktemp("finished"))
    assert setting.sweep().failed == []
    return setting.out


@pytest.fixture
def swept(setting: Setting, finished: Path) -> Setting:
    """A sweep over `BOTH` that is done; nothing was evaluated."""
    shutil.copytree(finished, setting.out)
    return setting


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that `pruning.run` was called for, in order."""
    names: list[str] = []
    run = pruning.run

    def note(recipe: prunekit.Recipe, out: Path, **options: Any) -> prunekit.Result:
        names.append(out.name)
        return run(recipe, out, **options)

    monkeypatch.setattr(pruning, "run", note)
    return names


def files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and content of every file: equal means that nobody has written them again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def zeros_and_weights(folder: Path) -> tuple[int, int]:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    linears = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
    return sum(int((tensor == 0).sum()) for tensor in linears), sum(tensor.numel() for tensor in linears)


# What it does


def test_each_run_is_what_prune_alone_gives(setting: Setting) -> None:
    found = setting.sweep({"method": ["wanda", "magnitude"], "pattern": [0.3, "2:4"], "seed": [1]})
    names = ["model_wanda_0.3_seed1", "model_wanda_2-4_seed1", "model_magnitude_0.3_seed1", "model_magnitude_2-4_seed1"]
    assert [row["name"] for row in found.rows] == names
    assert sorted(path.name for path in setting.out.iterdir()) == sorted(
        [*names, "results.jsonl", "results.parquet", "runs"]
    )
    alone = setting.folder / "alone"
    for row, (method, pattern) in zip(
        found.rows, [("wanda", "0.3"), ("wanda", "2:4"), ("magnitude", "0.3"), ("magnitude", "2:4")], strict=True
    ):
        calibration = {"source": str(setting.text), "samples": 3, "length": 32}
        prunekit.prune(setting.model, out=alone, method=method, pattern=pattern, calibration=calibration, seed=1,
                       dtype="float32", overwrite=True)  # fmt: skip
        assert shards(setting.out / row["name"]) == shards(alone)
        zeros, count = zeros_and_weights(alone)
        assert (row["zeros"], row["weights"], row["sparsity"]) == (zeros, count, zeros / count)
        assert (row["method"], row["target"], row["seed"], row["model"]) == (method, pattern, 1, str(setting.model))
        assert (row["status"], row["out"], row["error"]) == ("done", str(setting.out / row["name"]), None)
        assert (row["blocks"], row["tokens"]) == (3, 96 if method == "wanda" else 32)
        assert 0 < row["seconds.forward"] < row["seconds.total"]
    assert (found.skipped, found.failed) == (0, [])
    assert len({row["recipe_sha256"] for row in found.rows}) == 4


def test_results_are_evaluated_as_evaluate_alone_does(setting: Setting) -> None:
    found = setting.sweep(evaluate=setting.evaluation())
    for row in found.rows:
        alone = prunekit.evaluate(setting.out / row["name"], **setting.evaluation())
        assert row["perplexity"] == alone.perplexity
        assert row["evaluation.predictions"] == 4 * 31
        assert (row["evaluation.text"], row["evaluation.length"]) == (str(setting.text), 32)
    assert found.rows[0]["perplexity"] != found.rows[1]["perplexity"]


# Done


def test_what_is_done_is_skipped_and_nothing_of_the_model_is_read(
    swept: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = swept.sweep(evaluate=swept.evaluation())
    before = {name: files(swept.out / name) for name in (WANDA, MAGNITUDE)}
    for place in ("checkpoint.reader.sha256_file", "checkpoint.manifest.sha256_file", "pruning.run", "api.evaluate"):
        monkeypatch.setattr(f"prunekit.{place}", lambda *_, **__: pytest.fail("something was read"))
    away = swept.model.rename(swept.model.with_name("away"))  # cannot be hashed, opened or pruned
    try:
        second = swept.sweep(evaluate=swept.evaluation())
    finally:
        away.rename(swept.model)
    assert (second.skipped, second.rows) == (2, first.rows)
    assert {name: files(swept.out / name) for name in (WANDA, MAGNITUDE)} == before


def test_only_what_is_new_in_a_grown_grid_is_run(swept: Setting, ran: list[str]) -> None:
    before = files(swept.out / WANDA)
    found = swept.sweep({"seed": [3, 0], "method": ["magnitude", "wanda"]}, sparsity=0.5)
    assert (sorted(ran), found.skipped) == (["model_magnitude_0.5_seed3", "model_wanda_0.5_seed3"], 2)
    assert [row["seed"] for row in found.rows] == [3, 3, 0, 0]
    assert files(swept.out / WANDA) == before


def test_a_lost_or_damaged_record_costs_no_second_pruning(swept: Setting) -> None:
    before = files(swept.out / WANDA), files(swept.out / MAGNITUDE)
    (swept.out / "runs" / f"{WANDA}.json").unlink()
    (swept.out / "runs" / f"{MAGNITUDE}.json").write_text('{"recipe": ')
    found = swept.sweep()
    assert [row["status"] for row in found.rows] == ["done", "done"]
    assert (files(swept.out / WANDA), files(swept.out / MAGNITUDE)) == before
    # the peak of memory is that of the process that pruned, of which nothing is known here
    assert [row["peak_rss_reset"] for row in found.rows] == [None, None]


def test_a_result_that_was_removed_is_made_again(swept: Setting, ran: list[str]) -> None:
    before = shards(swept.out / MAGNITUDE)
    shutil.rmtree(swept.out / MAGNITUDE)
    assert swept.sweep().skipped == 1
    assert ran == [MAGNITUDE]
    assert shards(swept.out / MAGNITUDE) == before


def test_a_result_that_another_run_put_there_is_not_taken_for_ours(swept: Setting) -> None:
    calibration = {"source": str(swept.text), "samples": 5, "length": 32}
    prunekit.prune(swept.model, out=swept.out / WANDA, calibration=calibration, dtype="float32", overwrite=True)
    before = files(swept.out / WANDA)
    row, _ = swept.sweep().rows
    assert row["status"] == "failed"
    assert "calibration.samples is 5 there and 3 here" in row["error"]
    assert files(swept.out / WANDA) == before


def test_a_result_that_was_put_right_by_hand_is_taken(swept: Setting, ran: list[str]) -> None:
    kept = swept.record(WANDA)
    other = kept["recipe"] | {
        "seed": 7
    }  # of which the record says that it failed; what lies there is what is asked for
    failed = {"stage": "prune", "asked": None, "kind": "StorageError", "sentence": "disk full", "traceback": None}
    record = {"recipe": other, "owned": True, "failed": failed}
    (swept.out / "runs" / f"{WANDA}.json").write_text(json.dumps(record))
    before = files(swept.out / WANDA)
    assert [row["status"] for row in swept.sweep().rows] == ["done", "done"]
    assert ran == [WANDA]
    assert files(swept.out / WANDA) == before


def test_a_base_that_changed_is_refused_before_anything_runs(swept: Setting, ran: list[str]) -> None:
    shutil.rmtree(swept.out / WANDA)
    before = files(swept.out)
    done = swept.call(dtype="bfloat16")
    assert done.code == 2
    assert MAGNITUDE in done.err
    assert 'dtype is "float32" there and "bfloat16" here' in done.err
    assert (ran, files(swept.out)) == ([], before)


def test_a_model_that_was_moved_is_the_same_model(swept: Setting) -> None:
    before = files(swept.out / WANDA)
    moved = swept.folder / "elsewhere" / "model"
    shutil.copytree(swept.model, moved)
    found = swept.sweep(model=str(moved))
    assert [row["status"] for row in found.rows] == ["done", "done"]
    assert files(swept.out / WANDA) == before


def test_an_evaluation_asked_for_later_prunes_nothing_again(swept: Setting, ran: list[str]) -> None:
    before = files(swept.out / WANDA)
    found = swept.sweep(evaluate=swept.evaluation())
    assert (ran, found.skipped) == ([], 0)
    four = [row["perplexity"] for row in found.rows]
    assert all(math.isfinite(perplexity) for perplexity in four)
    other = swept.sweep(evaluate=swept.evaluation(samples=2))
    assert (ran, other.skipped) == ([], 0)
    assert [row["evaluation.windows"] for row in other.rows] == [2, 2]
    assert four != [row["perplexity"] for row in other.rows]
    assert "perplexity" not in swept.sweep().rows[0]
    assert files(swept.out / WANDA) == before


# Interrupted


def stop_at(monkeypatch: pytest.MonkeyPatch, position: int, problem: BaseException) -> Callable[[], None]:
    """Let writing the shard at `position` fail once; returns what lets everything pass again."""
    write = Writer.write_shard

    def fail(self: Writer, at: int, tensors: Any) -> Any:
        if at == position:
            raise problem
        return write(self, at, tensors)

    monkeypatch.setattr(Writer, "write_shard", fail)
    return lambda: monkeypatch.setattr(Writer, "write_shard", write)


def test_an_interrupt_exits_with_130_and_the_same_command_goes_on(
    setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = stop_at(monkeypatch, 3, KeyboardInterrupt())
    done = setting.call("--json")
    assert (done.code, done.out) == (130, "")
    assert "0 of 2 runs" in done.err
    assert (setting.out / "results.jsonl").read_text() == ""
    begun = files(setting.out / WANDA)
    assert "model-00003-of-00004.safetensors" in begun
    assert not (setting.out / MAGNITUDE).exists()
    go_on()
    done = setting.call("--json")
    assert done.code == 0, done.err
    assert "resuming: 2 of 3 blocks are finished" in done.err
    for name in (WANDA, MAGNITUDE):
        assert shards(setting.out / name) == shards(finished / name)
    after = files(setting.out / WANDA)
    for shard in ("model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"):
        assert after[shard] == begun[shard]  # not written a second time


def test_an_interrupted_evaluation_costs_no_second_pruning(
    setting: Setting, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"method": ["magnitude"]}
    with monkeypatch.context() as patch:
        patch.setattr("prunekit.api.evaluate", ctrl_c)
        assert setting.call(axes=axes, evaluate=setting.evaluation()).code == 130
    assert ran == [MAGNITUDE]
    assert setting.call(axes=axes, evaluate=setting.evaluation()).code == 0
    assert ran == [MAGNITUDE]  # not even to see that it is finished


def test_what_cannot_be_continued_is_begun_again(
    setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = stop_at(monkeypatch, 3, KeyboardInterrupt())
    assert setting.call(axes={"method": ["wanda"]}).code == 130
    go_on()
    path = setting.out / WANDA / JOURNAL_NAME
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.0-'))
    done = setting.call(axes={"method": ["wanda"]})
    assert done.code == 0, done.err
    assert f"{WANDA} cannot be continued and is begun again" in done.err
    assert shards(setting.out / WANDA) == shards(finished / WANDA)


def test_a_changed_base_begins_unfinished_runs_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = stop_at(monkeypatch, 3, KeyboardInterrupt())
    assert setting.call(axes={"method": ["wanda"]}).code == 130
    go_on()
    calibration = {"source": str(setting.text), "samples": 5, "length": 32}
    (row,) = setting.sweep({"method": ["wanda"]}, calibration=calibration).rows
    assert (row["status"], row["windows"]) == ("done", 5)


def test_a_folder_the_sweep_did_not_make_is_never_replaced(setting: Setting) -> None:
    tiny.save_model(setting.out / WANDA, "gpt2")  # somebody's model lies where a run would
    before = files(setting.out / WANDA)
    for retry in (False, True):
        (row,) = setting.sweep({"method": ["wanda"]}, retry=retry).rows
        assert row["status"] == "failed"
        assert "is not empty" in row["error"]
        assert files(setting.out / WANDA) == before


# Failed


def test_a_failure_is_recorded_and_the_others_go_on(setting: Setting, ran: list[str]) -> None:
    missing = setting.folder / "missing"
    axes = {"model": [str(missing), str(setting.model)], "method": ["wanda"]}
    done = setting.call("--json", axes=axes)
    assert done.code == 1
    failed = "missing_wanda_0.5_seed0"
    assert ran == [failed, WANDA]
    assert (done.json["runs"], done.json["done"], done.json["failed"], done.json["skipped"]) == (2, 1, 1, 0)
    (failure,) = done.json["failures"]
    assert (failure["name"], failure["error_kind"]) == (failed, "InputError")
    assert failure["error"] == f"model folder '{missing}' does not exist"
    bad, good = setting.lines()
    assert (bad["name"], bad["status"], bad["error"]) == (failed, "failed", failure["error"])
    assert bad["sparsity"] is bad["seconds.total"] is bad["peak_rss_bytes"] is None
    assert (good["name"], good["status"], good["error"], good["error_kind"]) == (WANDA, "done", None, None)

    ran.clear()
    again = setting.call("--json", axes=axes)  # reports what failed, and leaves it alone
    assert (again.code, ran) == (1, [])
    assert (again.json["skipped"], again.json["failures"]) == (2, [failure])

    retried = setting.call("--json", "--retry", axes=axes)
    assert (retried.code, ran, retried.json["skipped"]) == (1, [failed], 1)

    ran.clear()
    tiny.save_model(missing)
    mended = setting.call("--json", "--retry", axes=axes)
    assert (mended.code, ran) == (0, [failed])
    assert mended.json["failures"] == []
    assert [row["status"] for row in setting.lines()] == ["done", "done"]


WRONG = [
    (MemoryError(), "MemoryError", "the machine has no more memory to give"),
    (RuntimeError("cannot allocate\nmore\n"), "RuntimeError", "cannot allocate"),
    (ZeroDivisionError(), "ZeroDivisionError", "it gave no reason"),
    (prunekit.StorageError("cannot write 'x': disk full"), "StorageError", "cannot write 'x': disk full"),
]


def test_whatever_goes_wrong_in_a_run_stays_in_it(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = iter([problem for problem, _, _ in WRONG])

    def fail(*_: object, **__: object) -> None:
        raise next(problems)

    monkeypatch.setattr(pruning, "run", fail)
    found = setting.sweep({"seed": [0, 1, 2, 3]})
    assert [(row["status"], row["error_kind"], row["error"]) for row in found.rows] == [
        ("failed", kind, sentence) for _, kind, sentence in WRONG
    ]
    for seed, (problem, kind, _) in enumerate(WRONG):
        kept = setting.record(f"model_wanda_0.5_seed{seed}")["failed"]["traceback"]
        if isinstance(problem, prunekit.PrunekitError):
            assert kept is None
        else:
            assert "in fail" in "".join(kept)
            assert kind in kept[-1]


def test_a_retry_continues_what_failed(setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = stop_at(monkeypatch, 3, prunekit.StorageError("disk full"))
    assert setting.sweep({"method": ["wanda"]}).failed
    go_on()
    begun = files(setting.out / WANDA)
    assert setting.sweep({"method": ["wanda"]}, retry=True).failed == []
    shard = "model-00003-of-00004.safetensors"
    assert files(setting.out / WANDA)[shard] == begun[shard]
    assert shards(setting.out / WANDA) == shards(finished / WANDA)


def test_a_failed_reload_check_can_be_retried(
    setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Writer.write_shard

    def spoil(self: Writer, position: int, pieces: list[Piece]) -> Any:
        ones = [Piece.of(piece.name, torch.ones(piece.shape, dtype=piece.dtype)) for piece in pieces]
        return write(self, position, ones)

    monkeypatch.setattr(Writer, "write_shard", spoil)
    (row,) = setting.sweep({"method": ["wanda"]}).rows
    assert row["error_kind"] == "VerificationError"
    monkeypatch.setattr(Writer, "write_shard", write)
    assert setting.sweep({"method": ["wanda"]}, retry=True).failed == []
    assert shards(setting.out / WANDA) == shards(finished / WANDA)


def test_a_damaged_result_is_only_replaced_by_a_retry(swept: Setting, finished: Path) -> None:
    kept = swept.record(WANDA)
    (swept.out / "runs" / f"{WANDA}.json").write_text(
        json.dumps(kept | {"pruned": None})
    )  # so that the folder is looked at
    shard = swept.out / WANDA / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    before = files(swept.out / WANDA)
    row, _ = swept.sweep().rows
    assert (row["status"], files(swept.out / WANDA)) == ("failed", before)
    assert f"{shard.name} changed since" in row["error"]
    assert swept.sweep(retry=True).failed == []
    assert shards(swept.out / WANDA) == shards(finished / WANDA)


def test_a_failed_evaluation_is_retried_without_pruning(swept: Setting, ran: list[str]) -> None:
    text = swept.folder / "late.txt"
    options = swept.evaluation(text=str(text))
    found = swept.sweep(evaluate=options)
    assert [row["status"] for row in found.rows] == ["failed", "failed"]
    assert str(text) in found.rows[0]["error"]
    assert found.rows[0]["sparsity"] == 0.5  # that much was done
    assert found.rows[0]["perplexity"] is None
    text.write_text(tiny.make_text(seed=3))
    assert len(swept.sweep(evaluate=options).failed) == 2
    assert swept.sweep().failed == []  # what is asked of them without it is done
    assert swept.sweep(evaluate=options, retry=True).failed == []
    assert ran == []


def test_a_mended_evaluation_section_needs_no_retry(swept: Setting) -> None:
    assert swept.sweep(evaluate=swept.evaluation(text="nowhere.txt")).failed
    assert swept.sweep(evaluate=swept.evaluation()).failed == []


# The table


def test_the_table_is_tidy(setting: Setting) -> None:
    axes = {
        "model": [str(setting.model), str(setting.folder / "missing")],
        "calibration.samples": [2, 3],
        "parts.budget.overrides": [{"*.o_proj": 0.25}],
        "calibration.sampling": ["first"],
    }
    setting.sweep(axes, method="magnitude", evaluate=setting.evaluation())
    rows = setting.lines()
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert len({tuple(row) for row in rows}) == 1  # the same columns in the same order
    assert {"name", "status", "model", "method", "target", "seed", "sparsity", "zeros", "weights", "seconds.total",
            "seconds.forward", "peak_rss_bytes", "perplexity", "error", "out", "recipe_sha256"} <= set(rows[0])  # fmt: skip
    assert all(isinstance(value, (str, int, float, bool, type(None))) for row in rows for value in row.values())
    assert [row["calibration.samples"] for row in rows] == [2, 3, 2, 3]
    assert {row["parts.budget.overrides"] for row in rows} == {'{"*.o_proj": 0.25}'}
    assert {row["calibration.sampling"] for row in rows} == {"first"}


def test_an_axis_of_several_kinds_is_text_throughout(setting: Setting) -> None:
    axes = {
        "parts.budget.overrides.*.o_proj": [0.25, "2:4"],
        "calibration.batch": [None, 2],
        "parts.budget.overrides.*.q_proj": [0, 0.5],
    }
    found = setting.sweep(
        axes, model=str(setting.folder / "missing")
    )  # rows have these columns whatever became of the runs
    assert [row["parts.budget.overrides.*.o_proj"] for row in found.rows] == ["0.25"] * 4 + ["2:4"] * 4
    assert [row["calibration.batch"] for row in found.rows] == [None, None, 2, 2] * 2
    assert found.parquet is not None
    assert pyarrow.parquet.read_table(found.parquet).to_pylist() == found.rows == setting.lines()
    types = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(found.parquet)}
    assert [types[name] for name in axes] == ["string", "int64", "double"]


def test_parquet_holds_what_the_lines_hold(swept: Setting) -> None:
    axes = {"model": [str(swept.model), str(swept.folder / "missing")], **BOTH}
    found = swept.sweep(axes, evaluate=swept.evaluation())
    assert found.parquet == swept.out / "results.parquet"
    table = pyarrow.parquet.read_table(found.parquet)
    assert table.to_pylist() == swept.lines() == found.rows
    assert [row["status"] for row in found.rows] == ["done", "done", "failed", "failed"]
    types = {field.name: str(field.type) for field in table.schema}
    names = ("sparsity", "zeros", "status", "perplexity")
    assert [types[name] for name in names] == ["double", "int64", "string", "double"]


def test_columns_keep_their_types_where_every_value_is_missing(setting: Setting) -> None:
    found = setting.sweep({"model": [str(setting.folder / "missing")]}, evaluate=setting.evaluation())
    types = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(found.parquet)}
    assert (types["sparsity"], types["zeros"], types["peak_rss_reset"]) == ("double", "int64", "bool")


def test_without_pyarrow_there_are_lines_only(swept: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    (swept.out / "results.parquet").unlink()
    monkeypatch.setattr("prunekit.report.table.find_spec", lambda _: None)
    done = swept.call("--json")
    assert (done.code, done.json["parquet"]) == (0, None)
    assert not (swept.out / "results.parquet").exists()
    assert len(swept.lines()) == 2


def test_the_table_is_whole_after_every_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def look(*_: Any, **__: Any) -> None:
        seen.append([row["name"] for row in setting.lines()])
        raise MemoryError

    monkeypatch.setattr(pruning, "run", look)
    setting.sweep({"method": ["wanda", "magnitude"], "pattern": [0.5, "2:4"]})
    names = [row["name"] for row in setting.lines()]
    assert len(names) == 4
    assert seen == [names[:0], names[:1], names[:2], names[:3]]


def test_the_table_and_the_records_are_replaced_not_overwritten(
    swept: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, record = swept.out / "results.jsonl", swept.out / "runs" / f"{WANDA}.json"
    inodes, whole = (table.stat().st_ino, record.stat().st_ino), table.read_bytes()
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target == table:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with table.open(), record.open():  # or a new file may be given the number of one that is gone
        monkeypatch.setattr(Path, "replace", die)
        with pytest.raises(prunekit.StorageError, match="No space left"):
            swept.sweep(evaluate=swept.evaluation())
        assert table.read_bytes() == whole
        monkeypatch.setattr(Path, "replace", replace)
        swept.sweep(evaluate=swept.evaluation())
        assert inodes[0] != table.stat().st_ino
        assert inodes[1] != record.stat().st_ino


def test_a_perplexity_beyond_all_numbers_is_still_json(swept: Setting) -> None:
    swept.sweep(evaluate=swept.evaluation())
    kept = swept.record(WANDA)
    kept["evaluated"]["summary"]["perplexity"] = math.inf
    (swept.out / "runs" / f"{WANDA}.json").write_text(json.dumps(kept))
    assert [row["perplexity"] is None for row in swept.sweep(evaluate=swept.evaluation()).rows] == [True, False]
    assert "Infinity" not in (swept.out / "results.jsonl").read_text()


# The command line


def test_json_is_one_object_on_stdout(setting: Setting) -> None:
    done = setting.call("--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert done.json["seconds"] > 0
    assert {name: value for name, value in done.json.items() if name != "seconds"} == {
        "out": str(setting.out),
        "runs": 2,
        "done": 2,
        "failed": 0,
        "skipped": 0,
        "results": str(setting.out / "results.jsonl"),
        "parquet": str(setting.out / "results.parquet"),
        "failures": [],
    }
    assert "run 1 of 2: model_wanda_0.5_seed0" in done.err
    assert "wanda 3/3" in done.err


def test_without_json_a_person_gets_a_table(swept: Setting) -> None:
    axes = {"model": [str(swept.model), str(swept.folder / "missing")], "method": ["wanda"]}
    done = swept.call(axes=axes, evaluate=swept.evaluation())
    assert done.code == 1
    perplexity = swept.lines()[0]["perplexity"]
    first = next(line for line in done.out.splitlines() if WANDA in line)
    assert all(word in first for word in ("done", "0.5000", f"{perplexity:.4f}", "GB"))
    assert "failed      missing_wanda_0.5_seed0: model folder" in done.out
    assert "1 done, 1 failed; 0 of them before; --retry runs them again" in done.out


def test_a_grid_file_as_the_documentation_writes_it_runs(setting: Setting) -> None:
    path = setting.folder / "grid.toml"
    lines = [
        f'model = "{setting.model}"',
        'method = "magnitude"',
        'dtype = "float32"',
        "[calibration]",
        f'source = "{setting.text}"',
        "samples = 2",
        "length = 32",
        "[grid]",
        "pattern = [0.5]",
        "[evaluate]",
        "samples = 2",
        "length = 32",
    ]
    path.write_text("\n".join(lines))
    done = call("sweep", path, "--out", setting.out, "--json")
    assert (done.code, done.json["done"]) == (0, 1)
    assert setting.lines()[0]["evaluation.text"] == "builtin:eval"


def test_an_output_that_cannot_be_one_is_refused(setting: Setting) -> None:
    setting.out.write_text("a file")
    assert setting.call().code == 2
    setting.out.unlink()
    setting.out.mkdir()
    (setting.out / "results.jsonl").write_text("mine\n")
    done = setting.call()
    assert done.code == 2
    assert "results.jsonl" in done.err
    assert (setting.out / "results.jsonl").read_text() == "mine\n"
    done = call("sweep", setting.file, "--out", setting.folder / ("x" * 300))
    assert done.code == 2
    assert "cannot be used" in done.err


# Memory


def test_the_peak_can_be_counted_anew() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can")
    big = torch.ones(300_000_000 // 4)
    assert machine.peak_rss_bytes() > 300_000_000
    before = machine.peak_rss_bytes()
    del big
    assert machine.reset_peak_rss()
    assert machine.peak_rss_bytes() < before - 200_000_000


def test_a_run_does_not_inherit_the_peak_of_what_came_before(swept: Setting) -> None:
    if not machine.reset_peak_rss():
        pytest.skip("this system does not let a process count its peak anew")
    shutil.rmtree(swept.out / WANDA)
    for evaluate in (None, swept.evaluation()):  # prunes one, then evaluates both
        big = torch.ones(600_000_000 // 4)
        del big
        held = machine.rss_bytes()
        assert machine.peak_rss_bytes() > held + 400_000_000
        row, _ = swept.sweep(evaluate=evaluate).rows
        assert row["peak_rss_reset"] is True
        assert row["peak_rss_bytes"] < held + 300_000_000
        assert evaluate is None or row["evaluation.peak_rss_bytes"] < held + 300_000_000


def test_a_row_says_when_its_peak_is_not_its_own(swept: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def refuse(self: Path, *words: Any, **options: Any) -> int:
        if self == Path("/proc/self/clear_refs"):
            raise PermissionError(13, "Permission denied")
        return write(self, *words, **options)

    monkeypatch.setattr(Path, "write_text", refuse)
    shutil.rmtree(swept.out / MAGNITUDE)
    assert swept.sweep().rows[1]["peak_rss_reset"] is False


def test_a_record_reads_what_was_written(swept: Setting) -> None:
    found = sweeping.Record.read(swept.out / "runs" / f"{WANDA}.json")
    assert found is not None
    assert found.pruned is not None
    assert found.pruned["recipe"] == json.loads((swept.out / WANDA / "prunekit.json").read_text())["recipe"]
    assert sweeping.Record.read(Path(os.devnull)) is None
