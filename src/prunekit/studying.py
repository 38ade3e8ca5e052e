"""`study`: sweep a study's grid, measure the dense model once, and write what was found as JSON, Markdown and a picture.

    OUT/NAME.json, NAME.md, NAME.svg    what was found
    OUT/.work/NAME/                     the sweep's folder: records, by which a killed study goes on and a finished one runs nothing
    OUT/.work/NAME/dense.json           the dense model's perplexity

A pruned model is removed as soon as it is evaluated, unless it is asked for.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .checkpoint.manifest import read_manifest
from .checkpoint.output import usable
from .checkpoint.storage import write_json, write_text
from .errors import InputError
from .progress import Progress
from .report.findings import findings
from .report.plots import check_drawable, draw_study
from .studies import Cell, Study, Verdict
from .sweeping import RECORDS, Record, Sweep, run_grid

DENSE_RECORD = "dense.json"


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        files: the JSON, the Markdown page and the picture.
        dense: perplexity before pruning.
        cells: (row, column) -> cell.
        sweep: the runs behind it.
    """

    study: Study
    files: tuple[Path, Path, Path]
    dense: float
    cells: dict[tuple[str, str], Cell]
    verdicts: list[Verdict]
    sweep: Sweep

    @property
    def contradicted(self) -> list[str]:
        """Claims that do not hold in what was measured."""
        return [verdict.claim.claim for verdict in self.verdicts if verdict.holds is False]

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {
            "study": self.study.name,
            "model": self.study.model,
            "files": [str(path) for path in self.files],
            "dense": self.dense,
            "cells": [_cell(cell) for cell in self.cells.values()],
            "claims": [_claim(verdict) for verdict in self.verdicts],
            "contradicted": self.contradicted,
            "runs": len(self.sweep.rows),
            "failed": len(self.sweep.failed),
            "skipped": self.sweep.skipped,
            "seconds": self.sweep.seconds,
        }


def run_study(
    study: Study,
    out: Path,
    *,
    work: Path | None,
    retry: bool,
    keep_models: bool,
    words: Sequence[str],
    progress: Progress,
) -> Findings:
    """Run what is open of a study and write what was found.

    Args:
        study: what to measure.
        out: the folder of the results.
        work: the folder of the sweep; by default inside `out`, out of git's sight.
        retry: run again what failed before.
        keep_models: leave the pruned models in `work`.
        words: the command that repeats it.
        progress: told what is going on.

    Raises:
        InputError: something in the study is wrong, or `out` has this study of another model; nothing was run.
        StorageError: a record or a result could not be written.
    """
    out = out.expanduser()
    page, data, picture = (out / f"{study.name}{suffix}" for suffix in (".md", ".json", ".svg"))
    check_drawable(picture)
    _refuse_other_model(study, data)
    folder = out / ".work" / study.name if work is None else work.expanduser()
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if work is None:
            (folder.parent / ".gitignore").write_text(
                "*\n", encoding="utf-8"
            )  # results are kept in the repository, records not
    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
    dense = _dense(study, folder / DENSE_RECORD, progress)
    sweep = run_grid(study.grid, folder, retry=retry, executor=None, progress=progress, keep_models=keep_models)
    axes = {combination.name: combination.axes for combination in study.grid.combinations()}
    cells = study.cells((axes[row["name"]], _perplexity(row)) for row in sweep.rows)
    verdicts = study.verdicts(cells)
    made_on = _made_on(dense, folder, sweep)
    value = dense["summary"]["perplexity"]
    found = Findings(study, (data, page, picture), value, cells, verdicts, sweep)
    command = shlex.join(words)
    figures = {
        "title": study.options.title,
        "about": study.options.about,
        "command": command,
        **{name: value for name, value in found.summary().items() if name not in ("files", "skipped", "seconds")},
        "published": [entry.model_dump() for entry in study.options.published],
        "grid": study.grid.model_dump(),
        "made_on": made_on,
        # where a model lay while it was measured says nothing
        "rows": [{name: value for name, value in row.items() if name != "out"} for row in sweep.rows],
    }
    write_json(data, figures)
    draw_study(study, cells, value, picture)
    text = findings(
        study, cells=cells, verdicts=verdicts, dense=value, failures=sweep.failed, made_on=made_on, command=command
    )
    write_text(page, text)
    return found


def _refuse_other_model(study: Study, data: Path) -> None:
    try:
        before = json.loads(data.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != study.model:
        raise InputError(
            f"'{data}' holds this study of the model '{before}', not '{study.model}': choose another --out"
        )


def _dense(study: Study, path: Path, progress: Progress) -> dict[str, Any]:
    """The record of the dense model's evaluation, made once."""
    from .api import evaluate

    options = study.grid.evaluate
    assert options is not None
    recipe = study.grid.combinations()[0].recipe
    same: dict[str, Any] = {
        "device": recipe.device,
        "revision": recipe.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    asked = {"model": recipe.model, **options.model_dump(), **same}
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known["asked"] == asked:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or nothing that can be understood
    progress.say(f"the dense model: {recipe.model}")
    found = evaluate(recipe.model, **options.model_dump(), **same, progress=progress)
    if not math.isfinite(found.perplexity):
        raise InputError(
            f"the dense model '{recipe.model}' has no finite perplexity on '{options.text}': nothing to compare with"
        )
    made = {"machine": machine.describe(), "versions": machine.versions()}
    record = {"asked": asked, "summary": found.summary(), **made}
    write_json(path, record)
    return record


def _perplexity(row: Mapping[str, Any]) -> float | None:
    if row["status"] != "done":
        return None
    return math.inf if row["perplexity"] is None else float(row["perplexity"])  # a table has no word for infinity


def _made_on(dense: dict[str, Any], folder: Path, sweep: Sweep) -> list[dict[str, Any]]:
    """Machines and versions the figures come from, each pair once: a study may be continued elsewhere, and later."""
    found = [{name: dense[name] for name in ("machine", "versions")}]
    for row in sweep.rows:
        record = Record.read(folder / RECORDS / f"{row['name']}.json")
        made = record and (record.discarded or read_manifest(folder / row["name"]))
        if made:
            made = {name: made[name] for name in ("machine", "versions")}
            found += [made] if made not in found else []
    return found


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "row": cell.row,
        "column": cell.column,
        "mean": _finite(cell.mean),
        "deviation": cell.deviation,
        "values": [_finite(value) for value in cell.values],
        "failed": cell.missing,
    }


def _claim(verdict: Verdict) -> dict[str, Any]:
    figures = {"less_mean": _finite(verdict.less.mean), "than_mean": _finite(verdict.than.mean)}
    return {**verdict.claim.model_dump(), **figures, "holds": verdict.holds, "noisy": verdict.noisy}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no word for infinity
