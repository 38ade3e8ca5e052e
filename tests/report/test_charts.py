"""Pictures for pages: the figures they were given, at the places the page points at, in the page's own colours."""

from __future__ import annotations

import random
import re
import signal
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure

from prunekit.report import charts
from prunekit.report.charts import (
    GLYPHS,
    Candidate,
    Chart,
    Error,
    Moment,
    error_chart,
    front_chart,
    memory_chart,
    pareto,
    recovery_chart,
    style_of,
)
from prunekit.report.plots import MARKERS

ERRORS = [Error(0, {"q": 0.1, "k": 0.3, "v": 0.2}), Error(1, {"q": 0.4, "k": 0.2}), Error(3, {"q": 0.05})]
MOMENTS = [Moment(0, 2.0, 1.0, 500_000_000), Moment(1, 3.5, 1.5, 800_000_000)]


def made() -> list[Chart]:
    runs = [Candidate("a", 0, 0.5, 20.0, True), Candidate("b", 1, 0.6, 25.0, True), Candidate("c", 1, 0.5, 30.0, False)]
    return [
        error_chart(ERRORS),
        memory_chart(MOMENTS, total=5.0, peak=900_000_000),
        front_chart("front-0", runs, 15.0, "sparsity"),
        recovery_chart([3.0, 2.9, 2.5, 2.6], {0: 20.0, 2: 18.0, 4: 15.0}),
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_picture_takes_everything_from_its_page(which: int) -> None:
    svg = made()[which].svg
    assert svg is not None
    assert svg == made()[which].svg
    root = ElementTree.fromstring(svg)
    assert root.attrib.keys() >= {"viewBox", "role", "aria-labelledby", "aria-describedby"}
    assert "width" not in root.attrib
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that no page can change"
    for leak in ("<style", "font-family", "xlink", "http://www.w3.org/1999", "<metadata"):
        assert leak not in svg
    assert "var(--muted)" in svg


def test_names_differ_between_pictures_and_lead_somewhere() -> None:
    names = [set(re.findall(r' id="([^"]+)"', chart.svg or "")) for chart in made()]
    assert len(set().union(*names)) == sum(map(len, names))
    for chart, own in zip(made(), names, strict=True):
        targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', chart.svg or ""))
        assert {one or other for one, other in targets} <= own


def test_points_lie_where_the_figures_are_drawn() -> None:
    first, second, third = error_chart(ERRORS).points
    assert first.text == "Block 0: median 0.200, most 0.300 in k"
    assert (second.text, third.text) == (
        "Block 1: median 0.300, most 0.400 in q",
        "Block 3: median 0.050, most 0.050 in q",
    )
    assert third.x - second.x == pytest.approx(2 * (second.x - first.x), abs=0.2)
    # 0 is at the lower end of the axis, 46 above the picture's end
    assert (240 - 46 - second.y) / (240 - 46 - first.y) == pytest.approx(1.5, abs=0.01)
    line = re.search(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) "', error_chart(ERRORS).svg or "")
    assert line is not None
    drawn = [float(number) for number in line.groups()]
    assert drawn == pytest.approx([first.x, first.y, second.x, second.y, third.x, third.y], abs=0.1)


def test_memory_is_drawn_over_the_whole_run() -> None:
    chart = memory_chart(MOMENTS, total=5.0, peak=900_000_000)
    first, second = chart.points
    assert second.text == "Block 1: done after 3.5 s (took 1.5 s), 0.80 GB resident"
    width = 400 - 70
    shaded = re.findall(
        r'd="M ([\d.]+) [\d.]+ L [\d.]+ [\d.]+ L ([\d.]+) [\d.]+ [^"]*" [^>]*fill: var\(--rule\)', chart.svg or ""
    )
    assert [(float(left), float(right)) for left, right in shaded] == [
        (pytest.approx(58), pytest.approx(58 + width / 5)),
        (pytest.approx(58 + width * 0.7), pytest.approx(58 + width)),
    ]
    assert (first.x, second.x) == (pytest.approx(58 + width * 2 / 5, abs=0.1), pytest.approx(58 + width * 0.7, abs=0.1))


def test_without_matplotlib_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    assert [chart.svg for chart in made()] == [None] * 4
    assert made()[0].data == []


def test_every_marker_has_a_glyph_and_no_two_series_look_alike() -> None:
    assert len(GLYPHS) == len(MARKERS)
    assert len({style_of(series) for series in range(64)}) == 64


def test_the_front_is_what_no_other_beats() -> None:
    assert pareto([(0.5, 20.0), (0.6, 19.0), (0.7, 30.0), (0.7, 31.0), (0.4, 5.0)]) == [False, True, True, False, True]
    assert pareto([(0.5, 20.0), (0.5, 20.0)]) == [True, True], "equals do not beat each other"
    assert pareto([]) == []
    draw = random.Random(0)
    figures = [(draw.randint(0, 9) / 10, float(draw.randint(10, 20))) for _ in range(60)]
    for (sparsity, perplexity), best in zip(figures, pareto(figures), strict=True):
        better = [
            f for f in figures if (f[0] > sparsity and f[1] <= perplexity) or (f[0] >= sparsity and f[1] < perplexity)
        ]
        assert best == (not better)


def test_an_interrupt_waits_until_a_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib's own C code makes a ValueError of one."""
    real, drawn = Figure.savefig, []

    def savefig(self: Figure, *where: object, **how: object) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self, *where, **how)
        drawn.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(KeyboardInterrupt):
        error_chart(ERRORS)
    assert len(drawn) == 1
