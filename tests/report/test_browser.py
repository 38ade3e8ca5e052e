"""Pages in a real browser: nothing goes wrong, nothing is fetched, tables sort, pictures answer, everybody can read them.

Needs Chromium or Chrome and the package playwright, which drives the browser that is there; the checks by axe need the file
`axe.min.js` of the npm package axe-core, named by PRUNEKIT_AXE. What a machine lacks is skipped with the reason.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from test_page import EVALUATION
from test_runs import ROW

from prunekit.report.page import run_page
from prunekit.report.runs import comparison_page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")
VIEWS = [("light", 390), ("dark", 390), ("light", 1200), ("dark", 1200)]
RUNS = [
    replace(ROW, name="b", perplexity=100.0, seconds=5000.0),
    replace(ROW, name="a", method="ria", sparsity=0.6, perplexity=30.5, dense=15.0, ratio_interval=(1.9, 2.1)),
    replace(ROW, name="d", perplexity=None, text=None, length=None, windows=None, seconds=9.0),
    replace(ROW, name="c", method="a+very+long+name+of+a+method", sparsity=0.7, perplexity=200.25, seconds=80.0),
]


@dataclass
class Opened:
    """A page in the browser, and what happened since: what was said on the console, which addresses were asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


Open = Callable[..., AbstractContextManager[Opened]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser that is there."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(_NAMES)} is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright here to drive the browser")
    with driver.sync_playwright() as started:
        options = ["--no-first-run", *(f"--disable-{name}" for name in _QUIET)]
        opened = started.chromium.launch(executable_path=found, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything that can be on its page, one with as little as can be, and a comparison."""
    manifest = json.loads((finished_run / "prunekit.json").read_text(encoding="utf-8"))
    bare = [{**line, "output_error": None} for line in manifest["linears"]]
    made = {
        "run": run_page(manifest, EVALUATION),
        "bare": run_page({**manifest, "linears": bare, "blocks": []}),
        "comparison": comparison_page("Runs", RUNS, [{"name": "e", "error": "it broke"}]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def show(browser: Any) -> Open:
    """Opens a file as a reader would."""

    @contextmanager
    def opened(path: Path, *, scheme: str = "light", width: int = 1200, **options: Any) -> Iterator[Opened]:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, **options)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda problem: found.said.append(str(problem)))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto(path.as_uri())
        yield found
        context.close()

    return opened


@pytest.mark.parametrize(("scheme", "width"), VIEWS)
@pytest.mark.parametrize("name", ["run", "bare", "comparison"])
def test_nothing_goes_wrong_and_nothing_is_fetched(
    pages: dict[str, Path], show: Open, name: str, scheme: str, width: int
) -> None:
    with show(pages[name], scheme=scheme, width=width) as opened:
        page = opened.page
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        for canvas in page.locator(".canvas svg").all():
            canvas.hover()
        assert opened.said == []
        assert opened.asked == [pages[name].as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width, "the page itself never scrolls sideways"
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")


def test_what_a_page_should_not_do_would_be_seen(pages: dict[str, Path], show: Open, tmp_path: Path) -> None:
    spoilt = pages["bare"].read_text(encoding="utf-8")
    spoilt = spoilt.replace("<main>", '<main><img src="http://192.0.2.1/x.png" alt="">')
    (tmp_path / "spoilt.html").write_text(spoilt, encoding="utf-8")
    with show(tmp_path / "spoilt.html") as opened:
        assert any("Content Security Policy" in words for words in opened.said)
    unguarded = spoilt.replace("Content-Security-Policy", "nothing")
    (tmp_path / "spoilt.html").write_text(unguarded, encoding="utf-8")
    with show(tmp_path / "spoilt.html") as opened:
        assert "http://192.0.2.1/x.png" in opened.asked


@pytest.mark.parametrize(
    ("scheme", "width"), VIEWS[1:3]
)  # a scheme's colours and a width's layout do not depend on each other
@pytest.mark.parametrize("name", ["run", "bare", "comparison"])
def test_axe_finds_nothing_that_keeps_anybody_out(
    pages: dict[str, Path], show: Open, name: str, scheme: str, width: int
) -> None:
    axe = os.environ.get("PRUNEKIT_AXE")
    if axe is None:
        pytest.skip("no axe here: set PRUNEKIT_AXE to axe.min.js of the npm package axe-core")
    with show(pages[name], scheme=scheme, width=width) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        opened.page.evaluate(Path(axe).read_text(encoding="utf-8"))
        found = opened.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    broken = [f"{rule['id']}: {node['target']}" for rule in found["violations"] for node in rule["nodes"]]
    assert broken == []
    assert {"color-contrast", "svg-img-alt"} <= {rule["id"] for rule in found["passes"]} or name == "bare"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_ground(pages: dict[str, Path], show: Open, scheme: str) -> None:
    """Axe does not look at letters over pictures and heat maps, nor at marks."""
    with show(pages["run"], scheme=scheme) as opened:
        read = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
        names = ["ground", "surface", "ink", "muted", "accent", "heat", *(f"series-{number}" for number in range(8))]
        colours = {name: opened.page.evaluate(read, name) for name in names}
    for ground in ("ground", "surface"):
        assert {name: contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "muted", "accent")} == {
            "ink": True,
            "muted": True,
            "accent": True,
        }
        assert [
            name for name in names if name.startswith("series") and contrast(colours[name], colours[ground]) < 3
        ] == []
    assert contrast(colours["ink"], colours["heat"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2 between two colours like `#12ab9f`."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def order(page: Any) -> str:
    return "".join(page.locator("table.sortable tbody th").all_inner_texts())


@pytest.mark.parametrize(
    ("column", "up", "down"),
    [("run", "abcd", "dcba"), ("perplexity", "abcd", "cbad"), ("time", "dacb", "bcad"), ("front", "acbd", "bdac")],
)
def test_a_heading_sorts_by_its_column(pages: dict[str, Path], show: Open, column: str, up: str, down: str) -> None:
    with show(pages["comparison"]) as opened:
        page = opened.page
        assert order(page) == "badc"
        head = page.locator("table.sortable thead th", has_text=column)
        head.get_by_role("button").click()
        assert order(page) == up, "numbers by size; what is not known comes last"
        assert head.get_attribute("aria-sort") == "ascending"
        head.get_by_role("button").click()
        assert order(page) == down, "and last again the other way round"
        assert head.get_attribute("aria-sort") == "descending"
        assert page.locator("th[aria-sort]").count() == 1
        assert opened.said == []


def test_the_keyboard_sorts_too(pages: dict[str, Path], show: Open) -> None:
    with show(pages["comparison"]) as opened:
        page = opened.page
        page.get_by_role("button", name="time").focus()
        page.keyboard.press("Enter")
        assert order(page) == "dacb"
        page.keyboard.press("Space")
        assert order(page) == "bcad"
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.textContent") != "time"


def test_pictures_say_what_is_pointed_at(pages: dict[str, Path], show: Open) -> None:
    with show(pages["comparison"]) as opened:
        page = opened.page
        canvas = page.locator(".canvas")
        readout = page.locator(".picture .readout")
        rest = readout.inner_text()
        for point in json.loads(canvas.get_attribute("data-points")):
            box, (_, _, width, height) = canvas.bounding_box(), canvas.locator("svg").get_attribute("viewBox").split()
            place = {
                "x": box["width"] * point["x"] / float(width) + 2,
                "y": box["height"] * point["y"] / float(height) + 2,
            }
            canvas.hover(position=place)
            assert readout.inner_text() == point["text"]
            assert page.locator("circle.pointed").count() == 1
        page.mouse.move(1, 1)
        assert readout.inner_text() == rest
        assert page.locator("circle.pointed").count() == 0


def test_the_heat_map_says_what_is_pointed_at_or_touched(pages: dict[str, Path], show: Open) -> None:
    with show(pages["run"], width=390, has_touch=True) as opened:
        page = opened.page
        readout = page.locator("#heat-readout")
        rows = page.locator("table.heat tbody tr")
        rows.nth(2).locator("td").first.tap()
        assert "model.layers.2.self_attn.q_proj: " in readout.inner_text()
        rows.nth(0).locator("td").nth(1).hover()
        assert "model.layers.0.self_attn.k_proj: " in readout.inner_text()
        page.locator("h1").hover()
        assert "Point at a cell" in readout.inner_text()


def test_everything_is_there_without_javascript(pages: dict[str, Path], show: Open) -> None:
    with show(pages["comparison"], java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator("table.sortable tbody th").all_inner_texts() == ["b", "a", "d", "c"]
        assert page.get_by_role("button").count() == 0
        assert page.locator(".readout:visible").count() == 0
        assert page.get_by_text("A heading sorts").is_hidden()
        assert page.get_by_role("img", name="perplexity against sparsity").count() == 1
