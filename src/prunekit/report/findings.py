"""A study's findings as text: the table, what the paper claims and whether it held here, what others published, how to repeat it.

Equal figures give equal text, so that a study that is repeated shows in a diff what has changed and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..grid import label_of
from ..studies import DENSE, Cell, Study, Verdict
from .numbers import spelt


def findings(
    study: Study,
    *,
    cells: Mapping[tuple[str, str], Cell],
    verdicts: Sequence[Verdict],
    dense: float,
    failures: Sequence[Mapping[str, Any]],
    made_on: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    """The Markdown page.

    Args:
        study: what was asked.
        cells: what was measured.
        verdicts: how the paper's claims fared.
        dense: perplexity of the model before it is pruned.
        failures: name and error of runs that failed.
        made_on: `machine` and `versions`, each pair once.
        command: what repeats it.
    """
    options = study.options
    parts = [f"# {options.title}", options.about.strip(), _conditions(study), f"![{options.title}]({study.name}.svg)"]
    parts += ["## Perplexity", _table(study, cells), _footnote(study, dense)]
    if failures:
        parts += ["## Failed", "\n".join(f"- `{failure['name']}`: {failure['error']}" for failure in failures)]
    if verdicts:
        contradicted = [verdict for verdict in verdicts if verdict.holds is False]
        parts += ["## What the paper says", "\n".join(_sentence(verdict) for verdict in verdicts)]
        if contradicted:
            parts.append(f"**Our measurement contradicts {len(contradicted)} of {len(verdicts)} claims.**")
    if options.published:
        parts += ["## Beside published figures", _beside(study, cells, dense)]
    parts += ["## How to repeat it", f"```\n{command}\n```", "\n".join(map(_made, made_on))]
    return "\n\n".join(parts) + "\n"


def _conditions(study: Study) -> str:
    # read off a recipe and not off the file, so that defaults are said too
    recipe, evaluate = study.grid.combinations()[0].recipe, study.grid.evaluate
    assert evaluate is not None
    calibration = recipe.calibration
    varied = study.grid.axes.keys()
    said = {
        "calibration.source": f"from `{calibration.source}`",
        "calibration.samples": f"{calibration.samples} windows",
        "calibration.length": f"of {calibration.length or 'the default number of'} tokens",
    }
    fixed = " ".join(
        said[name] for name in ("calibration.samples", "calibration.length", "calibration.source") if name not in varied
    )
    windows = "all windows" if evaluate.samples is None else f"the first {evaluate.samples} windows"
    return (
        f"Model `{study.model}`; calibration: {fixed or 'see the table'}; perplexity on {windows} of "
        f"{evaluate.length or 'the default number of'} tokens of `{evaluate.text}`."
    )


def _table(study: Study, cells: Mapping[tuple[str, str], Cell]) -> str:
    by_rows = study.options.compare == "rows"
    lines = [[study.options.titles[0], *study.columns]]
    for row in study.rows:
        line = [row]
        for column in study.columns:
            # the best figure among those that are compared is the one a reader looks for
            others = [cells[r, column] for r in study.rows] if by_rows else [cells[row, c] for c in study.columns]
            best = min((cell.mean for cell in others if cell.mean is not None), default=None)
            cell = cells[row, column]
            line.append(f"**{_figure(cell)}**" if cell.mean is not None and cell.mean == best else _figure(cell))
        lines.append(line)
    return _markdown(lines, figures=set(range(1, len(study.columns) + 1)))


def _figure(cell: Cell) -> str:
    text = spelt(cell.mean)
    if cell.deviation is not None:
        text += f" ± {spelt(cell.deviation)}"
    return f"{text} ({cell.missing} failed)" if cell.missing and cell.values else text


def _footnote(study: Study, dense: float) -> str:
    over = study.options.over
    mean = ""
    if over is not None:
        points = [label_of(value) for value in study.grid.axes[over]]
        mean = f" Figures are the mean ± standard deviation over {over} {', '.join(points)}."
    rows, columns = study.options.titles
    best = "column" if study.options.compare == "rows" else "row"
    return f"Rows: {rows}; columns: {columns}. Dense model: {spelt(dense)}. Less is better; the best of each {best} is bold.{mean}"


def _sentence(verdict: Verdict) -> str:
    less, than, slack = verdict.less, verdict.than, verdict.claim.slack
    bound = f", which may be larger by {100 * slack:g} %" if slack else ""
    what = f"{less.row}, {less.column}: {_figure(less)}; {than.row}, {than.column}: {_figure(than)}{bound}"
    if verdict.holds is None:
        return f"- *Not known*, because runs failed: {verdict.claim.claim} ({what})"
    noise = "; the difference is smaller than the spread of the runs" if verdict.noisy else ""
    word = "**Agrees**" if verdict.holds else "**CONTRADICTS the paper**"
    return f"- {word}: {verdict.claim.claim} ({what}{noise})"


def _beside(study: Study, cells: Mapping[tuple[str, str], Cell], dense: float) -> str:
    published = study.options.published
    of_dense = {entry.model: entry.value for entry in published if label_of(entry.row) == DENSE}
    sources = list(dict.fromkeys(entry.source for entry in published))
    head = [f"here: {study.model}", "× dense", "published", "× dense", "of", "source"]
    lines = [[*study.options.titles, *head]]
    for entry in published:
        row, column = label_of(entry.row), "" if entry.column is None else label_of(entry.column)
        ours = dense if entry.column is None else cells[row, column].mean
        here = [spelt(ours), _ratio(ours, dense)]
        there = [f"{entry.value:g}", _ratio(entry.value, of_dense.get(entry.model))]
        lines.append([row, column, *here, *there, entry.model, f"[{sources.index(entry.source) + 1}]"])
    notes = "\n".join(f"- [{number}] {source}" for number, source in enumerate(sources, 1))
    advice = "Models differ, so compare by what each loses against its dense self."
    return f"{_markdown(lines, figures={2, 3, 4, 5})}\n\n{advice}\n\n{notes}"


def _ratio(value: float | None, dense: float | None) -> str:
    return "" if value is None or dense is None else spelt(value / dense)


def _markdown(lines: list[list[str]], *, figures: set[int]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[at]) for line in cells)) for at in range(len(cells[0]))]

    def line(words: list[str]) -> str:
        padded = [w.rjust(widths[at]) if at in figures else w.ljust(widths[at]) for at, w in enumerate(words)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if at in figures else "-" * width for at, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _made(made: Mapping[str, Any]) -> str:
    machine, versions = made["machine"], made["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    accelerator = "" if machine["accelerator"] == "none" else f", {machine['accelerator']}"
    return f"- {machine['processor']}, {machine['threads']} of {machine['cores']} threads{accelerator}; {packages}"
