"""A study: a grid whose perplexities make one table, with what a paper says of them.

A study file is a grid file with a section more:

    [study]
    title = "Scores at 50 %"
    about = "What is measured, and why."
    rows = "method"                    # an axis of the grid: its points are the table's rows
    columns = "pattern"                # another one
    over = "seed"                      # optional: the axis that figures are the mean ± standard deviation over
    compare = "rows"                   # whose best figure is marked: among rows, the default, or among "columns"
    plot = "bars"                      # or "lines": along the columns, a line a row
    log = true                         # the plot's scale

    [[study.claims]]                   # what the paper says, so that it can be held against what was measured
    claim = "Wanda is better than magnitude."
    less = ["wanda", 0.5]              # row and column whose perplexity is less ...
    than = ["magnitude", 0.5]          # ... than that of these
    slack = 0.01                       # optional: it may also be larger, by this fraction

    [[study.published]]                # figures others have published, shown beside ours
    model = "LLaMA-2 7B"
    row = "wanda"                      # or "dense", without a column
    column = 0.5
    value = 6.42
    source = "Sun et al. 2023, table 3"

Every axis of the grid is one of `rows`, `columns` and `over`, and the grid has no axis `model`: a study is of one model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from .calibration.text import is_source
from .errors import InputError, nearest
from .grid import Grid, is_case, label_of
from .recipe import Recipe, assign
from .settings import Section

DENSE = "dense"

Label = str | int | float
Place = tuple[Label, Label]


class Claim(Section):
    """What a paper says of two places of the table: one perplexity is less than the other."""

    claim: str
    less: Place
    than: Place
    slack: float = Field(0.0, ge=0)


class Published(Section):
    """A figure somebody has published; without a column it is that of the dense model."""

    model: str
    row: Label
    column: Label | None = None
    value: float
    source: str


class StudyOptions(Section):
    """The section [study]."""

    holder: ClassVar[str] = "a study"

    title: str
    about: str
    rows: str
    columns: str
    value: Literal["perplexity"] = "perplexity"
    over: str | None = None
    compare: Literal["rows", "columns"] = "rows"
    plot: Literal["bars", "lines"] = "bars"
    log: bool = False
    claims: tuple[Claim, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def titles(self) -> tuple[str, str]:
        """What rows and columns are called: `beta` for the axis `parts.score.beta`."""
        return self.rows.rsplit(".", 1)[-1], self.columns.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Cell:
    """A place of the table: one perplexity, or several that are averaged.

    Attributes:
        values: of the runs that were measured; infinite where a model lost its wits beyond what floats hold.
        missing: runs that failed.
    """

    row: str
    column: str
    values: tuple[float, ...]
    missing: int = 0

    @property
    def mean(self) -> float | None:
        """What the table shows; None where nothing was measured."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of fewer than two finite values."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return statistics.stdev(self.values)


@dataclass(frozen=True)
class Verdict:
    """A claim beside our measurement. `holds` is None where one of its places was not measured; `noisy`: within the spread of runs."""

    claim: Claim
    less: Cell
    than: Cell
    holds: bool | None
    noisy: bool


@dataclass(frozen=True)
class Study:
    """A study file, understood and checked.

    Attributes:
        grid: the command line's words are in it.
        rows, columns: labels, in the file's order.
    """

    name: str
    options: StudyOptions
    grid: Grid
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def model(self) -> str:
        """The model it is of."""
        return str(self.grid.base["model"])

    def cells(self, measured: Iterable[tuple[Mapping[str, Any], float | None]]) -> dict[tuple[str, str], Cell]:
        """The table: (row, column) -> cell, from each run's axes and its perplexity, None where it failed."""
        found: dict[tuple[str, str], list[float | None]] = {
            (row, column): [] for row in self.rows for column in self.columns
        }
        for axes, value in measured:
            found[label_of(axes[self.options.rows]), label_of(axes[self.options.columns])].append(value)
        return {
            (row, column): Cell(row, column, tuple(v for v in values if v is not None), values.count(None))
            for (row, column), values in found.items()
        }

    def verdicts(self, cells: Mapping[tuple[str, str], Cell]) -> list[Verdict]:
        """Whether each claim holds in what was measured."""
        return [_verdict(claim, cells[_place(claim.less)], cells[_place(claim.than)]) for claim in self.options.claims]


def read_study(
    path: Path,
    *,
    model: str | None = None,
    calibration: Iterable[str] = (),
    text: str | None = None,
    settings: Sequence[str] = (),
) -> Study:
    """The study in a file, with the command line's words laid over it.

    Args:
        path: a `.toml`, `.yaml`, `.yml` or `.json` file.
        model: takes the place of the file's.
        calibration: a source takes the place of the file's; `NAME=SOURCE` says where the text lies that the file calls NAME.
        text: takes the place of the evaluation text.
        settings: `part.option=value` as for `prune`, or `evaluate.option=value`.

    Raises:
        InputError: something in the file or in the words is wrong.
    """
    path = path.expanduser()
    values = Recipe.read(path)
    section = values.get("study")
    if not isinstance(section, Mapping):
        raise InputError(
            f"'{path}' has no section [study]: it names title, about, rows and columns; without it, it is a grid for "
            "`prunekit sweep`"
        )
    try:
        options = StudyOptions.build(section)
    except InputError as problem:
        raise InputError(f"[study] of '{path}': {problem}") from None
    values.setdefault("evaluate", {})
    if model is not None:
        values["model"] = model
    if text is not None:
        assign_evaluation(values, "text", text)
    for setting in settings:
        if setting.startswith("evaluate."):
            name, _, value = setting.removeprefix("evaluate.").partition("=")
            assign_evaluation(values, name, int(value) if value.isdecimal() else value)
        else:
            assign(values, setting)
    grid = _with_sources(Grid.build(values), list(calibration))
    for setting in settings:
        name = setting.partition("=")[0].strip()
        if name in grid.axes or f"parts.{name}" in grid.axes:
            raise InputError(
                f"--set '{setting}': '{name}' is an axis of the study, which takes its values from the file"
            )
    _check_axes(options, grid)
    rows, columns = (tuple(label_of(value) for value in grid.axes[axis]) for axis in (options.rows, options.columns))
    study = Study(path.stem, options, grid, rows, columns)
    _check_places(study)
    for combination in grid.combinations():
        source = combination.recipe.calibration.source
        if not is_source(source):
            raise InputError(
                f"calibration text '{source}' is no file, folder or preset: say where it lies with --calibration {source}=FILE"
            )
    return study


def assign_evaluation(values: dict[str, Any], name: str, value: Any) -> None:
    """Lay an option of the evaluation over unvalidated study `values`, in place; validation comes later."""
    section = values["evaluate"]
    if not isinstance(section, dict):
        raise InputError(f"'evaluate' is {section!r} in the study file, not a section that could hold '{name}'")
    section[name] = value


def _with_sources(grid: Grid, given: list[str]) -> Grid:
    """The grid with the command line's calibration texts in it; texts that the file compares keep its names for labels."""
    axis = "calibration.source"
    named = [label_of(value) for value in grid.axes.get(axis, [])]
    places: dict[str, str] = {}
    base = grid.base
    for word in given:
        name, separator, source = word.partition("=")
        if separator and (name in named or not Path(word).exists()):
            if name not in named:
                known = nearest(name, named) if named else "it compares none, so write --calibration SOURCE"
                raise InputError(f"--calibration '{word}': the study compares no text called '{name}': {known}")
            places[name] = source
        elif named:
            raise InputError(
                f"--calibration '{word}': the study compares texts ({', '.join(named)}): say which one it is, like "
                f"--calibration {named[-1]}={word}"
            )
        else:
            section = base.get("calibration", {})
            if not isinstance(section, dict):
                raise InputError(
                    f"'calibration' is {section!r} in the study file, not a section that could hold 'source'"
                )
            base = {**base, "calibration": {**section, "source": word}}
    axes = dict(grid.axes)
    if places:
        axes[axis] = [
            {"label": label_of(value), axis: places[label_of(value)]} if label_of(value) in places else value
            for value in axes[axis]
        ]
    return grid.model_copy(update={"base": base, "axes": axes})


def _check_axes(options: StudyOptions, grid: Grid) -> None:
    roles = {"rows": options.rows, "columns": options.columns, "over": options.over}
    used = [axis for axis in roles.values() if axis is not None]
    for role, axis in roles.items():
        if axis is not None and axis not in grid.axes:
            raise InputError(
                f"{role} of the study is '{axis}', which is no axis of its grid: {nearest(axis, grid.axes)}"
            )
        if axis is not None and used.count(axis) > 1:
            raise InputError(f"axis '{axis}' is named twice in [study]: rows, columns and over are different axes")
    if "model" in grid.axes:
        raise InputError("the study's grid has an axis 'model': a study is of one model; write it at the top")
    for axis, given in grid.axes.items():
        if axis not in used:
            raise InputError(
                f"axis '{axis}' of the grid is neither rows, columns nor over of the study: name it, or take it out of the grid"
            )
        labels = [label_of(value) for value in given]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"axis '{axis}' has two points called '{label}': give each its own label")
        if not all(is_case(value) or isinstance(value, (str, int, float)) for value in given):
            raise InputError(f"axis '{axis}' of a study holds lists or tables: write them as cases with a label")


def _check_places(study: Study) -> None:
    places = [_place(place) for claim in study.options.claims for place in (claim.less, claim.than)]
    for published in study.options.published:
        row = label_of(published.row)
        if (published.column is None) != (row == DENSE):
            raise InputError(
                f"published figure {published.value} of '{row}': the dense model has no column, and everything else has one"
            )
        if published.column is not None:
            places.append((row, label_of(published.column)))
    for row, column in places:
        for label, known, what in ((row, study.rows, "row"), (column, study.columns, "column")):
            if label not in known:
                raise InputError(
                    f"[study] speaks of {what} '{label}', which its table does not have: {nearest(label, known)}"
                )


def _place(place: Place) -> tuple[str, str]:
    return label_of(place[0]), label_of(place[1])


def _verdict(claim: Claim, less: Cell, than: Cell) -> Verdict:
    if less.mean is None or than.mean is None:
        return Verdict(claim, less, than, None, noisy=False)
    holds = less.mean <= than.mean * (1 + claim.slack) if claim.slack else less.mean < than.mean
    spread = math.hypot(less.deviation or 0.0, than.deviation or 0.0)
    return Verdict(claim, less, than, holds, noisy=abs(less.mean - than.mean) < spread)
