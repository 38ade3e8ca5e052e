"""Pictures, drawn by matplotlib (the extra `plots`), which is imported when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from ..checkpoint.storage import replace_file
from ..errors import InputError
from ..machine import signals_held
from ..studies import Cell, Study
from .numbers import spelt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")

# Okabe and Ito's colours, told apart by every kind of colour vision; markers and hatches differ as well
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
_GREY = "#666666"
_FINEST = 640  # cells along a side of a heat map: more than a page can show


def check_drawable(path: Path) -> None:
    """Refuse, before anything takes time, what `draw_...` could not write. Raises `InputError`."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"picture '{path}' must end in {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise InputError(f"drawing '{path}' needs matplotlib: pip install 'prunekit[plots]'")


def draw_study(study: Study, cells: Mapping[tuple[str, str], Cell], dense: float, path: Path) -> None:
    """Draw a study's table: bars, a group a row, or lines along the columns, a line a row. Raises `InputError`, `StorageError`."""
    height = 1.4 + 0.15 * len(study.rows) * (len(study.columns) + 1)
    with _figure(path, (8.0, max(2.8, height) if study.options.plot == "bars" else 4.6)) as figure:
        axes = figure.subplots()
        draw: Callable[..., None] = _bars if study.options.plot == "bars" else _lines
        draw(axes, study, cells, dense)
        axes.set_title(f"{study.options.title}\n{study.model}", loc="left", fontsize=10)


def draw_weight(weight: Tensor, name: str, path: Path) -> None:
    """Draw a weight [out, in]: |W| as a heat map, the norms of its rows to the right, of its columns above.

    What is larger than a picture can show is averaged over blocks of entries. Raises `InputError`, `StorageError`.
    """
    size = weight.abs().float()
    rows, columns = size.shape
    down, across = math.ceil(rows / _FINEST), math.ceil(columns / _FINEST)
    # blocks at the edge may be smaller: their mean is over what is there
    shown = functional.avg_pool2d(size[None, None], (down, across), ceil_mode=True)[0, 0]
    # a few weights are many times larger than the rest, and would leave it all one colour
    top = float(shown.flatten().kthvalue(math.ceil(0.995 * shown.numel())).values) or 1.0
    wide = min(2.2, max(0.45, columns / rows))
    with _figure(path, (5.2 * math.sqrt(wide) + 1.8, 5.2 / math.sqrt(wide) + 1.4)) as figure:
        places = figure.subplot_mosaic(
            [["columns", "."], ["map", "rows"]], width_ratios=[5, 1], height_ratios=[1, 5], empty_sentinel="."
        )
        extent = (0.0, float(across * shown.shape[1]), float(down * shown.shape[0]), 0.0)
        image = places["map"].imshow(
            shown.numpy(), cmap="magma", vmin=0, vmax=top, aspect="auto", interpolation="nearest", extent=extent
        )
        places["map"].set(
            xlim=(0, columns),
            ylim=(rows, 0),
            xlabel=f"input channel ({columns:,})",
            ylabel=f"output channel ({rows:,})",
        )
        places["columns"].plot(size.norm(dim=0).numpy(), color=_COLOURS[0], linewidth=0.6)
        places["columns"].set(xlim=(0, columns), ylabel="column\nnorm", xticklabels=[])
        places["rows"].plot(size.norm(dim=1).numpy(), range(rows), color=_COLOURS[3], linewidth=0.6)
        places["rows"].set(ylim=(rows, 0), xlabel="row norm", yticklabels=[])
        averaged = "" if shown.shape == size.shape else f", mean of {down} × {across} entries"
        figure.colorbar(image, ax=places["map"], location="left", extend="max", label=f"|W|{averaged}", pad=0.02)
        zeros = int((weight == 0).sum())
        figure.suptitle(f"{name}   [{rows:,} × {columns:,}], {zeros / weight.numel():.1%} zeros", fontsize=10)


def draw_comparison(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `compare` found: perplexities as bars, and how far the masks agree. Raises `InputError`, `StorageError`."""
    rows = sorted(found["rows"], key=lambda row: -row["perplexity"])
    names = [row["method"] for row in found["rows"]]
    overlap = found["overlap"]
    with _figure(path, (5.5 + (0.45 * len(names) if overlap else 0), 1.8 + 0.4 * len(names))) as figure:
        left, *others = figure.subplots(1, 2 if overlap else 1, squeeze=False)[0]
        bars = left.barh([row["method"] for row in rows], [row["perplexity"] for row in rows], color=_COLOURS[0])
        left.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=8)
        left.axvline(found["dense"], color=_GREY, linestyle="--", linewidth=1)
        left.set_xscale("log")
        left.set_xlabel(f"perplexity (dashed: dense, {found['dense']:.1f})", fontsize=9)
        left.margins(x=0.25)
        for right in others:
            figure.colorbar(_draw_overlap(right, names, overlap), ax=right, shrink=0.8)
        for axes in (left, *others):
            axes.tick_params(labelsize=8)
        figure.suptitle(f"{found['model']} at {found['pattern']}", fontsize=10)


def _draw_overlap(axes: Axes, names: Sequence[str], overlap: Sequence[Sequence[float]]) -> Any:
    """How far every two methods agree, as a table of colours; returns what a bar of them is made of."""
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, values in enumerate(overlap):
        for column, value in enumerate(values):
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title("removed by both / by either", fontsize=9)
    return axes.imshow(overlap, vmin=0, vmax=1, cmap="viridis")


def draw_search(course: Sequence[tuple[int, float]], dense: float, path: Path, *, title: str) -> None:
    """Draw a search: perplexity of every trial by its place, and the least so far. Raises `InputError`, `StorageError`."""
    with _figure(path, (7.0, 3.6)) as figure:
        axes = figure.subplots()
        places, values = zip(*course, strict=True)
        least = [min(values[: place + 1]) for place in range(len(values))]
        axes.plot(places, values, ".", color=_GREY, alpha=0.6, label="a trial")
        axes.step(places, least, where="post", color=_COLOURS[0], linewidth=1.6, label="best so far")
        axes.axhline(dense, color=_GREY, linestyle="--", linewidth=1, label=f"dense ({spelt(dense)})")
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        whole_ticks(axes.xaxis)
        axes.set(xlabel="trial", ylabel="perplexity")
        _legend_below(figure)
        axes.set_title(title, loc="left", fontsize=10)


def draw_front(trials: Sequence[tuple[float, float, bool]], dense: float, path: Path, *, title: str) -> None:
    """Draw (seconds, perplexity, whether none is better in both) of trials. Raises `InputError`, `StorageError`."""
    with _figure(path, (7.0, 3.6)) as figure:
        axes = figure.subplots()
        front = sorted((seconds, value) for seconds, value, best in trials if best)
        rest = [(seconds, value) for seconds, value, best in trials if not best]
        if rest:
            axes.plot(*zip(*rest, strict=True), ".", color=_GREY, alpha=0.6, label="a trial")
        axes.step(
            *zip(*front, strict=True),
            "o-",
            where="post",
            color=_COLOURS[0],
            markersize=5,
            label="none is better in both",
        )
        axes.axhline(dense, color=_GREY, linestyle="--", linewidth=1, label=f"dense ({spelt(dense)})")
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set(xlabel="seconds to prune", ylabel="perplexity")
        _legend_below(figure)
        axes.set_title(title, loc="left", fontsize=10)


def _legend_below(figure: Figure) -> None:
    """Outside, where it hides nothing of a picture whose points may lie anywhere."""
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _bars(axes: Axes, study: Study, cells: Mapping[tuple[str, str], Cell], dense: float) -> None:
    thick = 0.8 / len(study.columns)
    finite = [c.mean for c in cells.values() if c.mean is not None and math.isfinite(c.mean)]
    left, right = _range(study, [*finite, dense])
    for at, column in enumerate(study.columns):
        places = [number + (at - (len(study.columns) - 1) / 2) * thick for number in range(len(study.rows))]
        found = [cells[row, column] for row in study.rows]
        widths = [min(c.mean, right) if c.mean is not None else left for c in found]
        axes.barh(
            places,
            [width - left for width in widths],
            left=left,
            height=0.92 * thick,
            xerr=[c.deviation or 0.0 for c in found] if study.options.over else None,
            color=_COLOURS[at % len(_COLOURS)],
            ecolor=_GREY,
            label=column,
        )
        for place, cell, width in zip(places, found, widths, strict=True):
            end = width + (cell.deviation or 0.0)
            if cell.mean == math.inf:  # the bar goes on beyond the page
                axes.annotate(
                    "∞ ", (right, place), (-4, 0), textcoords="offset points", ha="right", va="center", color="white"
                )
                continue
            axes.annotate(
                spelt(cell.mean), (end, place), (3, 0), textcoords="offset points", va="center", fontsize=7, color=_GREY
            )
    axes.axvline(dense, color=_GREY, linestyle="--", linewidth=1, label=f"dense ({spelt(dense)})")
    axes.set_yticks(range(len(study.rows)), study.rows)
    axes.set_ylim(len(study.rows) - 0.4, -0.6)
    if study.options.log:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    axes.set(xlim=(left, right), xlabel="perplexity")
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), title=study.options.titles[1])


def _lines(axes: Axes, study: Study, cells: Mapping[tuple[str, str], Cell], dense: float) -> None:
    # evenly spaced, because columns need not be numbers, and numbers of a sweep are seldom evenly spaced
    places = range(len(study.columns))
    for at, row in enumerate(study.rows):
        found = [cells[row, column] for column in study.columns]
        means = [math.nan if c.mean is None or not math.isfinite(c.mean) else c.mean for c in found]
        axes.errorbar(
            places,
            means,
            yerr=[c.deviation or 0.0 for c in found] if study.options.over else None,
            color=_COLOURS[at % len(_COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            markersize=5,
            linewidth=1.3,
            capsize=3,
            label=row,
        )
    axes.axhline(dense, color=_GREY, linestyle="--", linewidth=1, label=f"dense ({spelt(dense)})")
    axes.set_xticks(places, study.columns)
    if study.options.log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    axes.set(xlabel=study.options.titles[1], ylabel="perplexity")
    axes.grid(axis="y", color=_GREY, alpha=0.15)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), title=study.options.titles[0])


def _range(study: Study, values: list[float]) -> tuple[float, float]:
    """From where to where bars go; on a logarithmic scale there is no zero to begin at."""
    if study.options.log:
        low, high = min(values), max(values)
        return low / 1.15, high * (high / low) ** 0.12 * 1.1
    return 0.0, 1.12 * max(values)


def plain_ticks(axis: Any) -> None:
    """Numbers as people write them along a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def whole_ticks(axis: Any) -> None:
    """Whole numbers along an axis that counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw into, written to `path` in the end. Neither pyplot nor its global state is touched."""
    check_drawable(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure as NewFigure

    # equal figures are equal files: names in an SVG are otherwise drawn at random
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "prunekit"}
    with signals_held(), mpl.rc_context(style):
        figure = NewFigure(figsize=size, layout="constrained")
        yield figure
        kind = path.suffix[1:]
        metadata = {"Date": None} if kind == "svg" else None
        replace_file(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150, metadata=metadata))
