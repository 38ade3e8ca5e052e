"""Pictures inside pages: SVG by matplotlib (the extra `plots`), remade so that the page's style gives it colours and letters.

matplotlib draws in colours that stand for names; they become `var(--name)`, which the page defines for light and for dark. What a
reader can point at is handed to the page as points in the picture's own coordinates, with a sentence each.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from ..machine import signals_held
from .plots import MARKERS, plain_ticks, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GLYPHS = "●■◆▲▼✚✖★"  # what MARKERS look like in text
SERIES = 8  # colours `--series-0` and on
_INK, _MUTED, _RULE, _ACCENT, _SURFACE = "#000001", "#000002", "#000003", "#000004", "#000005"
_SERIES = tuple(f"#00001{number}" for number in range(SERIES))
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _RULE: "rule",
    _ACCENT: "accent",
    _SURFACE: "surface",
    **{colour: f"series-{number}" for number, colour in enumerate(_SERIES)},
}
_LETTERS = 12.0  # height in the picture's units; a phone shows a picture at about 0.8 of its size


@dataclass(frozen=True)
class Point:
    """Something to point at: a place in the picture's coordinates, from its upper left corner, and what is there."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture and what can be pointed at in it. `svg` is None where there is no matplotlib to draw it."""

    svg: str | None
    points: tuple[Point, ...] = ()

    @property
    def data(self) -> list[dict[str, float | str]]:
        """The points as the page's script reads them."""
        return [asdict(point) for point in self.points]


@dataclass(frozen=True)
class Error:
    """Output errors of a block's linears, by their names there."""

    block: int
    values: Mapping[str, float]

    @property
    def middle(self) -> float:
        """Their median."""
        return median(self.values.values())

    @property
    def largest(self) -> str:
        """The linear that has the largest."""
        return max(self.values, key=lambda name: self.values[name])


@dataclass(frozen=True)
class Moment:
    """When a block was done: seconds since the run's start, seconds it took, bytes resident."""

    block: int
    seconds: float
    took: float
    rss_bytes: int


@dataclass(frozen=True)
class Candidate:
    """A run in a comparison. `series` numbers its kind, `best` says that of no other as much is `gone`, with less perplexity."""

    text: str
    series: int
    gone: float
    perplexity: float
    best: bool


def style_of(series: int) -> tuple[int, int]:
    """Numbers of colour and marker of a series: no two of the first 64 have both in common."""
    return (series + series // SERIES) % SERIES, series % len(MARKERS)


def error_chart(errors: Sequence[Error]) -> Chart:
    """Output error by block: a dot a linear, a line through the medians."""

    def draw(axes: Axes) -> list[tuple[float, float, str]]:
        dots = [(error.block, value) for error in errors for value in error.values.values()]
        axes.plot(*zip(*dots, strict=True), ".", color=_MUTED, markersize=6, alpha=0.6, markeredgewidth=0)
        axes.plot([e.block for e in errors], [e.middle for e in errors], color=_ACCENT, linewidth=1.8)
        axes.set(xlabel="block", ylabel="output error")
        axes.set_ylim(bottom=0)
        whole_ticks(axes.xaxis)
        return [
            (
                e.block,
                e.middle,
                f"Block {e.block}: median {e.middle:.3f}, most {e.values[e.largest]:.3f} in {e.largest}",
            )
            for e in errors
        ]

    return _drawn("error", (400, 240), draw)


def memory_chart(moments: Sequence[Moment], *, total: float, peak: int) -> Chart:
    """Resident memory over the run, a dot a block; shaded is what comes before the first block and behind the last."""

    def draw(axes: Axes) -> list[tuple[float, float, str]]:
        times, sizes = [m.seconds for m in moments], [m.rss_bytes / 1e9 for m in moments]
        for left, right in ((0.0, times[0] - moments[0].took), (times[-1], total)):
            axes.axvspan(left, right, color=_RULE, alpha=0.45, linewidth=0)
        axes.axhline(peak / 1e9, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(times, sizes, ".-", color=_ACCENT, linewidth=1.8, markersize=5)
        axes.set(xlabel="seconds since the start", ylabel="memory, GB", xlim=(0, total), ylim=(0, 1.12 * peak / 1e9))
        return [
            (time, size, f"Block {m.block}: done after {time:.1f} s (took {m.took:.1f} s), {size:.2f} GB resident")
            for m, time, size in zip(moments, times, sizes, strict=True)
        ]

    return _drawn("memory", (400, 240), draw)


def recovery_chart(losses: Sequence[float], curve: Mapping[int, float]) -> Chart:
    """The loss of every step, and on top of it the logarithm of the held-out perplexity, a dot a measurement."""

    def draw(axes: Axes) -> list[tuple[float, float, str]]:
        axes.plot(range(1, len(losses) + 1), losses, color=_MUTED, linewidth=1, alpha=0.7)
        steps, heights = list(curve), [math.log(perplexity) for perplexity in curve.values()]
        axes.plot(steps, heights, ".-", color=_ACCENT, linewidth=1.8, markersize=6)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        whole_ticks(axes.xaxis)
        return [
            (step, height, f"Behind step {step}: held-out perplexity {curve[step]:.2f}")
            for step, height in zip(steps, heights, strict=True)
        ]

    return _drawn("recovery", (520, 260), draw)


def search_chart(course: Sequence[tuple[int, float]]) -> Chart:
    """Perplexity of every candidate that was judged on all windows, by its place among those proposed, and the least so far."""

    def draw(axes: Axes) -> list[tuple[float, float, str]]:
        places, values = [place for place, _ in course], [value for _, value in course]
        least = [min(values[: number + 1]) for number in range(len(values))]
        axes.plot(places, values, ".", color=_MUTED, markersize=6, alpha=0.7, markeredgewidth=0)
        axes.step(places, least, where="post", color=_ACCENT, linewidth=1.8)
        axes.set(xlabel="candidate", ylabel="perplexity")
        whole_ticks(axes.xaxis)
        return [
            (place, value, f"Candidate {place}: {value:.2f}, best so far {best:.2f}")
            for (place, value), best in zip(course, least, strict=True)
        ]

    return _drawn("search", (520, 260), draw)


def front_chart(name: str, runs: Sequence[Candidate], dense: float | None, kind: str) -> Chart:
    """Perplexity against what is gone, a mark a run, with the Pareto front as a line.

    `dense` is the unpruned model's perplexity, `kind` what the other axis is called.
    """

    def draw(axes: Axes) -> list[tuple[float, float, str]]:
        front = sorted((run.gone, run.perplexity) for run in runs if run.best)
        axes.step(*zip(*front, strict=True), where="pre", color=_ACCENT, linewidth=1.4, alpha=0.7)
        for run in runs:
            colour, marker = style_of(run.series)
            look: Any = {"markersize": 7.5, "markeredgewidth": 1.0, "markeredgecolor": _SURFACE}
            axes.plot(run.gone, run.perplexity, marker=MARKERS[marker], color=_SERIES[colour], clip_on=False, **look)
        axes.set_yscale("log")
        axes.margins(0.08)
        if dense is not None:
            axes.axhline(dense, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        plain_ticks(axes.yaxis)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set(xlabel=kind, ylabel="perplexity")
        return [(run.gone, run.perplexity, run.text) for run in runs]

    return _drawn(name, (520, 320), draw)


def pareto(figures: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (gone, perplexity) whether no other has at least as much gone, at most its perplexity, and is better in one."""
    return [
        not any(
            gone >= own and perplexity <= ours and (gone, perplexity) != (own, ours) for gone, perplexity in figures
        )
        for own, ours in figures
    ]


def _drawn(name: str, size: tuple[int, int], draw: Callable[[Axes], list[tuple[float, float, str]]]) -> Chart:
    """Let `draw` fill the axes of a picture [width, height]; it returns what can be pointed at, in the axes' own coordinates."""
    if find_spec("matplotlib") is None:
        return Chart(None)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width, height = size
    with signals_held(), mpl.rc_context(_style()):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((58 / width, 46 / height, (width - 70) / width, (height - 58) / height))
        found = draw(axes)
        points = []
        for x, y, text in found:
            across, up = axes.transData.transform((x, y)) * 72 / figure.dpi
            points.append(Point(round(float(across), 1), round(height - float(up), 1), text))
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return Chart(_remade(stream.getvalue(), name), tuple(points))


def _style() -> Any:  # matplotlib's own type lists every name there is
    return {
        "font.size": _LETTERS,
        "svg.fonttype": "none",  # letters stay letters, of the reader's own font
        "svg.hashsalt": "prunekit",
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _MUTED,
        "axes.labelsize": _LETTERS,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": _RULE,
        "grid.linewidth": 0.8,
        "text.color": _INK,
        "xtick.color": _MUTED,
        "xtick.major.size": 3,
        "ytick.color": _MUTED,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }


def _remade(svg: str, name: str) -> str:
    """The picture as a part of a page: no colours, fonts, sizes or rules of its own, and names that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL
    )  # it would be a rule for the whole page
    svg = re.sub(r'<svg .*?viewBox="([^"]*)".*?>', partial(_head, name), svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg)).strip()


def _head(name: str, found: re.Match[str]) -> str:
    return f'<svg viewBox="{found[1]}" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-about">'
