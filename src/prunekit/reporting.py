"""`report`: the page of a finished run written anew, with what has been evaluated since; or one page that compares several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.lock import refuse_locked
from .checkpoint.manifest import read_manifest
from .checkpoint.storage import write_text
from .checkpoint.writer import CARD_NAME, PAGE_NAME
from .errors import InputError
from .evaluation.record import EvaluationRecord, read_record
from .recipe import Recipe
from .report.card import is_ours, model_card
from .report.page import run_page
from .report.runs import Row, comparison_page
from .report.table import COLUMNS
from .sweeping import RESULTS


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        runs: how many runs are on it.
        card: of the page of one run, what became of the model card: `written`, or `kept`, because somebody has edited it.
    """

    page: Path
    runs: int
    card: str | None = None

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {"page": str(self.page), "runs": self.runs, "card": self.card}


def make_report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """Write the page of one run into its folder, or a page that compares several.

    Args:
        folders: output folders of runs, and of sweeps, which stand for all their runs.
        out: the page; by default `report.html` in the folder, where there is one only.

    Raises:
        InputError: a folder is of no finished run, or it is not said where the page goes.
        StorageError: the disk refused the page.
    """
    if not folders:
        raise InputError("no folder is named: give the output folders of runs or sweeps")
    if out is not None and out.suffix not in (".html", ".htm"):
        raise InputError(f"page '{out}' must end in .html")
    folders = [folder.expanduser() for folder in folders]
    if len(folders) > 1 and out is None:
        raise InputError(
            f"a page that compares {len(folders)} folders lies in none of them: name it with --out compare.html"
        )
    if len(folders) == 1 and not _is_sweep(folders[0]):
        return _of_one(folders[0], out)
    rows, failures = [], []
    for folder in folders:
        if _is_sweep(folder):
            found, failed = _of_sweep(folder)
            rows += found
            failures += failed
        else:
            rows.append(_of_run(folder))
    if not rows:
        raise InputError(f"none of the runs in '{folders[0]}' is done: there is nothing to compare")
    page = folders[0] / PAGE_NAME if out is None else out
    title = f"Sweep {folders[0].resolve().name}" if len(folders) == 1 else f"{len(rows)} runs compared"
    write_text(page, comparison_page(title, rows, failures))
    return Report(page, len(rows))


def _is_sweep(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


def _of_one(folder: Path, out: Path | None) -> Report:
    manifest, evaluation = _finished(folder)
    page = run_page(manifest, evaluation)
    if out is not None:
        write_text(out, page)
        return Report(out, 1)
    refuse_locked(folder)
    write_text(folder / PAGE_NAME, page)
    card = folder / CARD_NAME
    if card.is_file() and not is_ours(card.read_text(encoding="utf-8", errors="replace"), manifest, folder):
        return Report(folder / PAGE_NAME, 1, "kept")
    write_text(card, model_card(manifest, folder, evaluation))
    return Report(folder / PAGE_NAME, 1, "written")


def _finished(folder: Path) -> tuple[dict[str, Any], EvaluationRecord | None]:
    manifest = read_manifest(folder)
    if manifest is None:
        hint = "it is no folder" if not folder.is_dir() else "it holds no finished run of prunekit, and no sweep"
        raise InputError(f"'{folder}' has no page: {hint}")
    return manifest, read_record(folder)


def _of_run(folder: Path) -> Row:
    manifest, evaluation = _finished(folder)
    recipe, run = Recipe.build(manifest["recipe"]), manifest["run"]
    first = evaluation.texts[0] if evaluation is not None and evaluation.texts else None
    known = first is not None and math.isfinite(first.perplexity)
    return Row(
        name=folder.resolve().name,
        model=recipe.model,
        method=recipe.method,
        target=recipe.asked,
        sparsity=run["sparsity"],
        ratio=run["ratio"],
        seconds=run["seconds"]["total"],
        peak_rss_bytes=run["peak_rss_bytes"],
        axes={"seed": recipe.seed},
        **{} if first is None or not known else _figures(first),
    )


def _figures(first: Any) -> dict[str, Any]:
    return {
        "perplexity": first.perplexity,
        "text": first.text,
        "length": first.length,
        "windows": first.windows,
        "dense": first.before,
        "ratio_interval": first.ratio_interval,
    }


def _of_sweep(folder: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """The runs that are done, and those that failed."""
    path = folder / RESULTS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        done = [_of_line(line) for line in lines if line["status"] == "done"]
        failed = [{"name": line["name"], "error": line["error"]} for line in lines if line["status"] == "failed"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(
            f"'{path}' is no table of a sweep ({problem}): run the sweep again, which writes it anew"
        ) from None
    return done, failed


def _of_line(line: dict[str, Any]) -> Row:
    return Row(
        name=line["name"],
        model=line["model"],
        method=line["method"],
        target=line["target"],
        sparsity=line["sparsity"],
        ratio=line["ratio"],
        seconds=line["seconds.total"],
        peak_rss_bytes=line["peak_rss_bytes"],
        perplexity=line.get("perplexity"),
        text=line.get("evaluation.text"),
        length=line.get("evaluation.length"),
        windows=line.get("evaluation.windows"),
        axes={name: value for name, value in line.items() if name == "seed" or name not in COLUMNS},
    )
