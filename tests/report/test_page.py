"""What the page of a run says is what its manifest and its evaluation say. How it looks and behaves: test_browser.py."""

from __future__ import annotations

import copy
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prunekit.cli import app
from prunekit.evaluation.record import EvaluationRecord, TaskFigures, TextFigures
from prunekit.report import charts
from prunekit.report.page import duration, run_page

EVALUATION = EvaluationRecord(
    texts=(
        TextFigures(
            text="a <b>text",
            length=32,
            windows=4,
            perplexity=30.0,
            before=20.0,
            ratio_interval=(1.4, 1.6),
            kl=0.25,
            top1_changed=0.125,
        ),
        TextFigures(text="alone", length=64, windows=2, perplexity=float("inf")),
    ),
    tasks=(
        TaskFigures(
            task="arc", metric="acc", n=1234, value=0.5, stderr=0.01, before=0.6, difference_interval=(-0.12, -0.08)
        ),
    ),
)


class Text(HTMLParser):
    """What a reader sees of a page, and its tables: per table, per row, the cells' texts and titles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self._hidden = 0
        self._in_cell = False
        self.feed(page)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("style", "script")
        self.titles += [value for name, value in attributes if name == "title" and value]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self.words.append(data)
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, heading: str) -> list[list[str]]:
        """The rows of the table one of whose headings is this."""
        (found,) = [rows for rows in self.tables if any(heading == cell.strip() for cell in rows[0])]
        return [[" ".join(cell.split()) for cell in row] for row in found]


def test_a_run_leaves_the_page_of_its_manifest(finished_run: Path, manifest: dict[str, Any]) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert page == run_page(manifest)
    assert "Nothing has been evaluated yet" in page
    # the browser refuses what this does not allow, and the page is one file
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)


def test_the_heat_map_has_every_linears_zeros(manifest: dict[str, Any]) -> None:
    shown = Text(run_page(manifest))
    head, *rows = shown.table("whole block")
    assert head == [
        "block",
        *["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "whole block",
    ]
    assert rows == [["0", *["50.0"] * 8], ["1", *["0.0"] * 8], ["2", *["50.0"] * 8]]
    for line in manifest["linears"]:
        tip = next(title for title in shown.titles if title.startswith(f"{line['name']}: "))
        assert f"{line['zeros']:,} zeros of {line['weights']:,} weights" in tip
        assert ("left dense" in tip) == (line["pattern"] is None)


def test_linears_of_one_last_name_are_told_apart(manifest: dict[str, Any]) -> None:
    changed = copy.deepcopy(manifest)
    for line in changed["linears"]:
        line["name"] = line["name"].replace("mlp.down_proj", "mlp.o_proj")
    head = Text(run_page(changed)).table("whole block")[0]
    assert head[4] == "self_attn.o_proj"
    assert head[-2] == "mlp.o_proj"


def test_output_errors_by_block(manifest: dict[str, Any]) -> None:
    rows = Text(run_page(manifest)).table("most in")[1:]
    assert [row[0] for row in rows] == ["0", "2"], "nothing is lost where nothing is pruned"
    own = {line["name"].split(".", 3)[3]: line["output_error"] for line in manifest["linears"][:7]}
    assert rows[0][1] == f"{min(own.values()):.4f}"
    assert rows[0][2] == f"{sorted(own.values())[3]:.4f}"
    assert rows[0][3:] == [f"{max(own.values()):.4f}", max(own, key=lambda name: own[name])]


def test_time_and_memory_of_every_block(manifest: dict[str, Any]) -> None:
    recorded = manifest["blocks"]
    assert [line["block"] for line in recorded] == [0, 1, 2]
    times = [line["seconds"] for line in recorded]
    seconds = manifest["run"]["seconds"]
    assert seconds["start"] < times[0] < times[1] < times[2] < seconds["total"]
    assert all(0 < line["rss_bytes"] <= manifest["run"]["peak_rss_bytes"] for line in recorded)
    rows = Text(run_page(manifest)).table("took")[1:]
    assert [row[1] for row in rows] == [f"{time:.2f} s" for time in times]
    assert [row[2] for row in rows] == [f"{line['took']:.2f} s" for line in recorded]
    assert all(line["seconds"] - line["took"] >= before for before, line in zip([0.0, *times], recorded, strict=False))
    assert rows[2][3] == f"{recorded[2]['rss_bytes'] / 1e9:.3f} GB"


def test_phases_add_up_to_the_whole(manifest: dict[str, Any]) -> None:
    changed = copy.deepcopy(manifest)
    changed["run"]["seconds"] = dict.fromkeys(changed["run"]["seconds"], 0.0) | {
        "forward": 6.0,
        "prune": 2.5,
        "total": 10.0,
    }
    _, *rows = Text(run_page(changed)).table("phase")
    assert [[row[0], *row[2:]] for row in rows] == [
        ["forward passes", "60.0 %", "6.0 s"],
        ["score and mask", "25.0 %", "2.5 s"],
        ["everything else", "15.0 %", "1.5 s"],
        ["in all", "", "10.0 s"],
    ]


def test_a_resumed_run_says_what_it_does_not_know(manifest: dict[str, Any]) -> None:
    resumed = {**manifest, "blocks": manifest["blocks"][2:]}
    assert "2 of 3 blocks were finished before the run was resumed" in Text(run_page(resumed)).text
    for without in ({**manifest, "blocks": []}, {name: manifest[name] for name in manifest if name != "blocks"}):
        assert "walked no block, or was made by a prunekit that recorded no times" in Text(run_page(without)).text


def test_before_and_after(manifest: dict[str, Any]) -> None:
    shown = Text(run_page(manifest, EVALUATION))
    _, first, second = shown.table("text")
    assert first == ["a <b>text", "4 × 32", "20.00", "30.00", "1.5001.400 … 1.600", "0.2500", "12.5 %"]
    assert second == ["alone", "2 × 64", "–", "∞", "–", "–", "–"]
    _, task = shown.table("task")
    assert task == ["arc", "acc", "1,234", "60.0", "50.0± 2.0", "−10.0−12.0 … −8.0"]
    assert "perplexity 30.00 20.00 before, 1.500 ×, on a <b>text" in shown.text


def test_the_command_and_the_recipe_repeat_the_run(
    finished_run: Path, manifest: dict[str, Any], tmp_path: Path
) -> None:
    page = run_page(manifest)
    found = re.search(r'<pre class="command"><code>(.*?)</code>', page, re.DOTALL)
    assert found is not None
    command = "".join(Text(found[1]).words)
    app([*shlex.split(command)[1:-1], str(tmp_path / "command")], standalone_mode=False)
    recipe = re.search(r'aria-label="Recipe"[^>]*><code>(.*?)</code>', page, re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.json").write_text("".join(Text(recipe[1]).words), encoding="utf-8")
    words = ["prune", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "recipe")]
    app(words, standalone_mode=False)
    for again in ("command", "recipe"):
        outputs = json.loads((tmp_path / again / "prunekit.json").read_text(encoding="utf-8"))["outputs"]
        assert outputs == manifest["outputs"]


def test_versions_and_hashes_are_all_there(manifest: dict[str, Any]) -> None:
    text = Text(run_page(manifest)).text
    for part in ("inputs", "outputs"):
        for name, digest in manifest[part].items():
            assert f"{name} {digest}" in text
    assert manifest["calibration_tokens"] in text
    assert f"torch {manifest['versions']['torch']}" in text


def test_without_matplotlib_the_page_says_so_and_has_the_figures(
    manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pictures = run_page(manifest)
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    page = run_page(manifest)
    assert (with_pictures.count("<svg"), page.count("<svg")) == (2, 0)
    assert page.count("pip install &#39;prunekit[plots]&#39;") + page.count("pip install 'prunekit[plots]'") == 2
    assert Text(page).tables == Text(with_pictures).tables


def test_nothing_pruned_is_a_page_too(manifest: dict[str, Any]) -> None:
    changed = copy.deepcopy(manifest)
    for line in changed["linears"]:
        line["output_error"] = None
    assert "Every linear was left dense" in Text(run_page(changed)).text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (119.7, "2 min 00 s"), (3725.0, "1 h 02 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
