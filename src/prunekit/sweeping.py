"""`sweep`: run every recipe of a grid into a folder of its own, skip what is done, go on behind what fails, keep one table.

    OUT/NAME/               a pruned model, as `prune` writes it
    OUT/runs/NAME.json      how that run stands: its recipe, figures, evaluation, or why it failed
    OUT/results.jsonl       a row for every run that was done or failed, rewritten after each; results.parquet at the end

A run counts as done if its record says so and its folder holds the manifest the record was made from; no model is read to find that
out. Where a record is missing or disagrees, `pruning.run(resume=True)` decides, which checks everything.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import machine, pruning
from .checkpoint.manifest import read_manifest
from .checkpoint.output import usable
from .checkpoint.storage import is_temporary, remove, write_json
from .checkpoint.writer import MANIFEST_NAME, difference, holds_model
from .errors import InputError, PrunekitError
from .grid import Combination, EvaluationOptions, Grid, recipe_hash
from .progress import Progress
from .recipe import Recipe
from .report.table import Table

RECORDS = "runs"
RESULTS = "results.jsonl"
PARQUET = "results.parquet"


@dataclass(frozen=True)
class Record:
    """How one run stands; kept as `runs/NAME.json`.

    Attributes:
        recipe: as the grid asks for it.
        owned: the folder was made by this sweep, so what is unfinished in it may be begun again.
        pruned: once it is: `summary` as `prune --json` gives it, the `recipe` of the manifest, whether the peak of memory is its own.
        evaluated: once it is: the options `asked` for and the `summary`.
        failed: `kind` and `sentence` of the error, the `stage` it came in, `asked` if that was the evaluation.
        discarded: once the model was removed, because only its figures were wanted: the `machine` and `versions` it was made with.
    """

    recipe: dict[str, Any]
    owned: bool = False
    pruned: dict[str, Any] | None = None
    evaluated: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    discarded: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a file; None where there is none that can be understood: the folder itself then tells."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            recipe = Recipe.model_validate(found.recipe)  # names that recipes have got since take their defaults
        except (OSError, ValueError, TypeError, PrunekitError, ValidationError):
            return None
        return replace(found, recipe=recipe.model_dump(mode="json"))

    def status(self, evaluate: EvaluationOptions | None) -> str:
        """`done`, `failed`, or `open`: not begun, interrupted, or not evaluated as is asked now."""
        asked = None if evaluate is None else evaluate.model_dump()
        if self.failed is not None and (self.pruned is None or (asked is not None and self.failed["asked"] == asked)):
            return "failed"
        if self.pruned is None:
            return "open"
        return "done" if asked is None or (self.evaluated is not None and self.evaluated["asked"] == asked) else "open"


@dataclass(frozen=True)
class Run:
    """One run of a sweep: what to do, where, and how it stands. Can be sent to another machine."""

    name: str
    recipe: Recipe
    folder: Path
    record: Record
    evaluate: EvaluationOptions | None
    retry: bool = False
    memory_budget: int | None = None

    @property
    def record_path(self) -> Path:
        """Where its record is kept."""
        return self.folder.parent / RECORDS / f"{self.name}.json"

    @property
    def status(self) -> str:
        """`done`, `failed` or `open`."""
        return self.record.status(self.evaluate)


Executor = Callable[[list[Run]], Generator[tuple[Run, Record], None, None]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep left.

    Attributes:
        rows: one flat row per run that was done or failed, as in `results.jsonl`.
        skipped: how many of them had been before.
        parquet: the table as parquet; None where pyarrow is not installed.
    """

    out: Path
    rows: list[dict[str, Any]]
    skipped: int
    seconds: float
    results: Path
    parquet: Path | None

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows of the runs that failed, now or before."""
        return [row for row in self.rows if row["status"] == "failed"]

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        failures = [{name: row[name] for name in ("name", "error_kind", "error")} for row in self.failed]
        return {
            "out": str(self.out),
            "runs": len(self.rows),
            "done": len(self.rows) - len(failures),
            "failed": len(failures),
            "skipped": self.skipped,
            "seconds": self.seconds,
            "results": str(self.results),
            "parquet": None if self.parquet is None else str(self.parquet),
            "failures": failures,
        }


def run_grid(
    grid: Grid, out: Path, *, retry: bool, executor: Executor | None, progress: Progress, keep_models: bool = True
) -> Sweep:
    """Carry out every run of `grid` that is open, and those that failed if `retry`; keep records and table up to date.

    Args:
        grid: what to do.
        out: the folder of the sweep.
        retry: run again what failed before; what cannot be continued is begun again.
        executor: carries out runs and gives each with its new record as it ends; by default one after the other in this process.
        progress: told what is going on.
        keep_models: leave the pruned models; otherwise each is removed once it is evaluated, and its record stands for it.

    Raises:
        InputError: the grid is wrong, or `out` holds finished runs of other recipes; nothing was run.
        StorageError: a record or the table could not be written.
    """
    begun = time.perf_counter()
    out = out.expanduser()
    combinations = grid.combinations()
    with usable(out):
        _check_folder(out)
        runs = {c.name: _stand(c, out / c.name, grid.evaluate, retry=retry) for c in combinations}
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    table = Table(grid.axes, evaluated=grid.evaluate is not None)
    todo = [run for run in runs.values() if run.status == "open" or (retry and run.status == "failed")]
    skipped = len(runs) - len(todo)
    for run in runs.values():
        if run.status == "done" and run.record.discarded is not None:
            remove(run.folder)  # a kill came between the record and the removal
    if skipped:
        progress.say(f"{skipped} of {len(runs)} runs are {'done' if retry else 'done or failed'} already")
    for position, run in enumerate(todo):
        todo[position] = runs[run.name] = replace(run, record=replace(run.record, failed=None))
        write_json(run.record_path, asdict(todo[position].record))

    def rows() -> list[dict[str, Any]]:
        return [_row(table, c, runs[c.name]) for c in combinations if runs[c.name].status != "open"]

    try:
        table.write_lines(out / RESULTS, rows())
        with closing((executor or _one_by_one(progress))(todo)) as ended:
            for run, record in ended:
                run = runs[run.name] = replace(run, record=record)
                if run.status == "done" and not keep_models and record.owned:
                    run = runs[run.name] = _discard(run)
                else:
                    write_json(run.record_path, asdict(record))
                table.write_lines(out / RESULTS, rows())
                if record.failed is not None:
                    progress.say(f"{run.name} failed: {record.failed['sentence']}")
    except KeyboardInterrupt:
        progress.stop()
        ended_ = sum(run.status != "open" for run in runs.values())
        progress.say(f"stopped: {ended_} of {len(runs)} runs in '{out}' are done or failed; the same command goes on")
        raise
    finally:  # not after each run: pyarrow's own memory would count in the peak of the next
        has_parquet = table.write_parquet(out / PARQUET, rows())
    progress.stop()
    return Sweep(
        out=out,
        rows=rows(),
        skipped=skipped,
        seconds=time.perf_counter() - begun,
        results=out / RESULTS,
        parquet=out / PARQUET if has_parquet else None,
    )


def _discard(run: Run) -> Run:
    """Remove the model of a run that is done. Its record is written first: what it says needs the model no more."""
    manifest = read_manifest(run.folder)
    assert manifest is not None
    made = {name: manifest[name] for name in ("machine", "versions")}
    run = replace(run, record=replace(run.record, discarded=made))
    write_json(run.record_path, asdict(run.record))
    remove(run.folder)
    return run


def carry_out(run: Run, progress: Progress) -> Record:
    """Prune and evaluate as far as that is not done. Whatever goes wrong ends up in the record, save an interrupt, which is raised."""
    record = run.record
    try:
        if record.pruned is None:
            record = replace(record, pruned=_prune(run, progress))
        if run.evaluate is not None:
            record = replace(record, evaluated=_evaluate(run, run.evaluate, progress))
    except Exception as problem:  # a MemoryError too: the next run may be smaller
        record = failure(run, problem, pruned=record.pruned)
    finally:
        progress.stop()
        machine.let_go()  # a model's memory must not count in the next run's peak
    return record


def failure(run: Run, problem: Exception, *, pruned: dict[str, Any] | None = None) -> Record:
    """The run's record with an error in it, which came while evaluating if the run is `pruned`."""
    evaluating = pruned is not None and run.evaluate is not None
    failed = {
        "stage": "evaluate" if evaluating else "prune",
        "asked": run.evaluate.model_dump() if evaluating and run.evaluate is not None else None,
        "kind": type(problem).__name__,
        "sentence": _sentence(problem),
        # what prunekit itself refuses is said in its sentence
        "traceback": None if isinstance(problem, PrunekitError) else traceback.format_exception(problem),
    }
    return replace(run.record, pruned=pruned, evaluated=None, failed=failed)


def _sentence(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    if lines:
        return lines[0]
    return "the machine has no more memory to give" if isinstance(problem, MemoryError) else "it gave no reason"


def _one_by_one(progress: Progress) -> Executor:
    def execute(runs: list[Run]) -> Generator[tuple[Run, Record], None, None]:
        for number, run in enumerate(runs, 1):
            progress.say(f"run {number} of {len(runs)}: {run.name}")
            if run.evaluate is not None and run.record.pruned is None:
                record = carry_out(replace(run, evaluate=None), progress)
                yield run, record  # kept before the evaluation, which may be interrupted
                if record.failed is not None:
                    continue
                run = replace(run, record=record)
            yield run, carry_out(run, progress)

    return execute


def _prune(run: Run, progress: Progress) -> dict[str, Any]:
    finished_before = (run.folder / MANIFEST_NAME).is_file()
    reset = machine.reset_peak_rss()
    try:
        result = pruning.run(run.recipe, run.folder, resume=True, memory_budget=run.memory_budget, progress=progress)
    except InputError as problem:
        # what a killed or failed run of this sweep left may be of no use (other versions, a failed reload check, ...)
        if not run.record.owned or not holds_model(run.folder) or (finished_before and not run.retry):
            raise
        progress.say(f"{run.name} cannot be continued and is begun again: {problem}")
        finished_before = False
        result = pruning.run(run.recipe, run.folder, overwrite=True, memory_budget=run.memory_budget, progress=progress)
    manifest = read_manifest(run.folder)
    assert manifest is not None
    return {
        "summary": result.summary(),
        "recipe": manifest["recipe"],
        "peak_rss_reset": None if finished_before else reset,
    }


def _evaluate(run: Run, options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    from .api import evaluate

    machine.reset_peak_rss()
    found = evaluate(
        run.folder,
        **options.model_dump(),
        device=run.recipe.device,
        trust_remote_code=run.recipe.trust_remote_code,
        progress=progress,
    )
    return {"asked": options.model_dump(), "summary": found.summary()}


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"output '{out}' is a file: choose another --out")
    if (out / RESULTS).exists() and not (out / RECORDS).is_dir():
        raise InputError(f"output folder '{out}' holds a {RESULTS} that is of no sweep: choose another --out")


def _stand(combination: Combination, folder: Path, evaluate: EvaluationOptions | None, *, retry: bool) -> Run:
    """How a combination stands, from its record and its folder's manifest. Raises `InputError` for another recipe's result."""
    asked = combination.recipe.model_dump(mode="json")
    record = Record(recipe=asked, owned=_is_free(folder))
    run = Run(combination.name, combination.recipe, folder, record, evaluate, retry)
    found = Record.read(run.record_path)
    if found is None:
        return run
    fresh = replace(record, owned=record.owned or found.owned)
    if found.recipe == asked:
        if found.discarded is not None:  # its figures stand, but nothing else can be measured of it
            return replace(run, record=found if found.status(evaluate) == "done" else fresh)
        finished = found.pruned is None or found.pruned["recipe"] == _finished_recipe(folder)
        return replace(run, record=replace(found, owned=fresh.owned) if finished else fresh)
    differing = difference(found.recipe | {"model": None}, asked | {"model": None})  # the model may lie elsewhere now
    if differing and found.pruned is not None and _finished_recipe(folder) is not None:
        raise InputError(
            f"'{folder}' holds the result of another recipe: {'; '.join(differing)}. Choose another --out, or remove it"
        )
    return replace(run, record=fresh)


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and all(is_temporary(path) for path in folder.iterdir()))


def _finished_recipe(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(folder)
    except InputError:  # the run itself will say what is wrong with it
        return None
    return None if manifest is None else manifest["recipe"]


def _row(table: Table, combination: Combination, run: Run) -> dict[str, Any]:
    recipe, record = run.recipe, run.record
    figures = {} if record.pruned is None else record.pruned["summary"]
    evaluation = {} if record.evaluated is None else record.evaluated
    failed = record.failed if run.status == "failed" and record.failed is not None else {}
    return table.row(
        {
            **figures,
            **combination.axes,
            "name": run.name,
            "status": run.status,
            "model": recipe.model,
            "method": recipe.method,
            "target": recipe.asked,
            "seed": recipe.seed,
            "sparsity": figures.get("sparsity"),
            "ratio": figures.get("ratio"),
            "perplexity": evaluation.get("summary", {}).get("perplexity"),
            "evaluation": {**evaluation.get("asked", {}), **evaluation.get("summary", {})},
            "peak_rss_reset": None if record.pruned is None else record.pruned["peak_rss_reset"],
            "error_kind": failed.get("kind"),
            "error": failed.get("sentence"),
            "out": str(run.folder),
            "recipe_sha256": recipe_hash(recipe),
        }
    )
