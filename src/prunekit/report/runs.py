"""Several runs compared on one page: perplexity against what is gone, the Pareto front, a table that can be sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from .charts import GLYPHS, Candidate, front_chart, pareto, style_of
from .numbers import spelt
from .page import change, duration, render, short


@dataclass(frozen=True)
class Row:
    """A run in a comparison. Figures that nobody measured are None.

    Attributes:
        axes: what else may tell runs apart, by dotted name; shown where it differs.
        text, length, windows: what perplexity was measured on.
        dense: perplexity of the unpruned model on the same.
        ratio: parameters removed / block parameters.
        ratio_interval: 95 % interval of perplexity / dense.
    """

    name: str
    model: str
    method: str
    target: str
    sparsity: float
    seconds: float
    peak_rss_bytes: int
    perplexity: float | None = None
    text: str | None = None
    length: int | None = None
    windows: int | None = None
    dense: float | None = None
    ratio_interval: tuple[float, float] | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 0.0

    @property
    def condition(self) -> tuple[Any, ...]:
        """Perplexities can be compared where these are equal."""
        return self.model, self.text, self.length, self.windows

    @property
    def kind(self) -> str:
        """What stands for how much is gone: zeros stay, parameters that were removed do not."""
        return "ratio" if self.ratio else "sparsity"

    @property
    def gone(self) -> float:
        """How much of the blocks is gone."""
        return self.ratio or self.sparsity


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, what it is sorted by (None: behind all others), what is shown below it."""

    text: str
    key: float | str | None
    note: str = ""


_NOTHING = Cell("–", None)
_GONE = {"sparsity": "zeros", "ratio": "of the block parameters removed"}


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, what a run has in it, whether these are figures."""

    name: str
    cell: Callable[[Row], Cell]
    numeric: bool = True


def comparison_page(title: str, rows: Sequence[Row], failures: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page that compares several runs. `failures` have `name` and `error`.

    Perplexities of different models or texts never come into one picture or one Pareto front.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.perplexity is not None:
            groups.setdefault((*row.condition, row.kind), []).append(row)
    drawn = [group for group in groups.values() if len(group) > 1]  # a run alone is compared with nothing
    front: set[int] = set()
    for group in drawn:
        best = pareto([(row.gone, row.perplexity or 0.0) for row in group])
        front |= {id(row) for row, is_best in zip(group, best, strict=True) if is_best}
    methods = list(dict.fromkeys(row.method for row in rows))
    columns = _columns(rows)
    return render(
        "comparison.html.jinja",
        title=title,
        groups=[_group(f"front-{number}", group, front, methods) for number, group in enumerate(drawn)],
        kinds=sorted({row.kind for row in rows}, reverse=True),
        columns=columns,
        table=[(id(row) in front, [(column, column.cell(row)) for column in columns]) for row in rows],
        rows=rows,
        failures=failures,
        version=__version__,
    )


def _group(name: str, group: Sequence[Row], front: set[int], methods: Sequence[str]) -> dict[str, Any]:
    first = group[0]
    dense = next((row.dense for row in group if row.dense is not None), None)
    runs = [
        Candidate(
            f"{row.name}: {100 * row.gone:.1f} % {_GONE[row.kind]}, perplexity {spelt(row.perplexity)}",
            methods.index(row.method),
            row.gone,
            row.perplexity or 0.0,
            id(row) in front,
        )
        for row in group
    ]
    shown = [method for method in methods if any(row.method == method for row in group)]
    legend = [(style_of(methods.index(method)), method) for method in shown]
    return {
        "name": name,
        "model": short(first.model),
        "on": _measured_on(first),
        "dense": dense,
        "kind": first.kind,
        "chart": front_chart(name, runs, dense, first.kind),
        "legend": [(colour, GLYPHS[marker], method) for (colour, marker), method in legend],
        "best": sum(run.best for run in runs),
        "runs": len(runs),
    }


def _measured_on(row: Row) -> str:
    assert row.text is not None
    text = short(row.text) if row.text.startswith(("/", ".", "~")) else row.text
    return f"{text}, {row.windows} × {row.length} tokens"


def _columns(rows: Sequence[Row]) -> list[Column]:
    """The columns in which there is something to read."""
    columns = [Column("run", lambda row: _text(row.name), numeric=False)]
    if len({row.model for row in rows}) > 1:
        columns.append(Column("model", lambda row: _text(short(row.model)), numeric=False))
    columns.append(Column("method", lambda row: _text(row.method), numeric=False))
    columns.append(
        Column(
            "pattern" if all(row.kind == "sparsity" for row in rows) else "asked for",
            lambda row: _text(row.target),
            numeric=False,
        )
    )
    axes = dict.fromkeys(name for row in rows for name in row.axes)
    columns += [_axis(name, rows) for name in axes if len({str(row.axes.get(name)) for row in rows}) > 1]
    if any(row.kind == "sparsity" for row in rows):
        columns.append(Column("sparsity", lambda row: Cell(f"{100 * row.sparsity:.2f} %", row.sparsity)))
    if any(row.kind == "ratio" for row in rows):
        columns.append(Column("ratio", lambda row: Cell(f"{100 * row.ratio:.2f} %", row.ratio)))
    if any(row.perplexity is not None for row in rows):
        columns.append(Column("perplexity", lambda row: _figure(row.perplexity, spelt)))
    if any(row.dense is not None for row in rows):
        columns.append(Column("× dense", _ratio))
    if len({row.condition[1:] for row in rows if row.text is not None}) > 1:
        columns.append(Column("measured on", _measured, numeric=False))
    columns.append(Column("time", lambda row: Cell(duration(row.seconds), row.seconds)))
    columns.append(Column("memory", lambda row: Cell(f"{row.peak_rss_bytes / 1e9:.2f} GB", row.peak_rss_bytes)))
    return columns


def _text(words: str) -> Cell:
    return Cell(words, words)


def _figure(value: float | None, spell: Callable[[float], str]) -> Cell:
    return _NOTHING if value is None else Cell(spell(value), value)


def _axis(name: str, rows: Sequence[Row]) -> Column:
    values = [row.axes[name] for row in rows if row.axes.get(name) is not None]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return Column(name, lambda row: _figure(row.axes.get(name), "{:g}".format))
    return Column(
        name, lambda row: _text(str(row.axes[name])) if row.axes.get(name) is not None else _NOTHING, numeric=False
    )


def _ratio(row: Row) -> Cell:
    if row.dense is None or row.perplexity is None:
        return _NOTHING
    ratio = row.perplexity / row.dense
    return Cell(f"{ratio:.3f}", ratio, "" if row.ratio_interval is None else change(row.ratio_interval))


def _measured(row: Row) -> Cell:
    return _NOTHING if row.text is None else _text(_measured_on(row))
