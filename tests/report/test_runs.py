"""A comparison puts together what can be compared, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from test_page import Text

from prunekit.report import charts
from prunekit.report.runs import Row, comparison_page

ROW = Row(
    name="a",
    model="org/model",
    method="wanda",
    target="0.5",
    sparsity=0.5,
    seconds=10.0,
    peak_rss_bytes=10**9,
    perplexity=30.0,
    text="/data/wiki.txt",
    length=1024,
    windows=64,
)


def rows_of(page: str) -> list[list[str]]:
    return Text(page).table("run")


def test_columns_are_those_with_something_to_read() -> None:
    plain = comparison_page("t", [ROW, replace(ROW, name="b", sparsity=0.6, perplexity=40.0)])
    head, *rows = rows_of(plain)
    assert head == ["front", "run", "method", "pattern", "sparsity", "perplexity", "time", "memory"]
    assert rows[1] == ["●", "b", "wanda", "0.5", "60.00 %", "40.00", "10.0 s", "1.00 GB"]
    other = replace(
        ROW,
        name="b",
        model="org/other",
        dense=15.0,
        ratio_interval=(1.9, 2.1),
        windows=8,
        axes={"seed": 1, "calibration.samples": 16},
    )
    head, first, second = rows_of(comparison_page("t", [replace(ROW, axes={"seed": 1}), other]))
    wanted = ["run", "model", "method", "pattern", "calibration.samples", "sparsity", "perplexity", "× dense"]
    assert head == [*wanted, "measured on", "time", "memory"], "the seed is the same in both"
    assert first[4] == "–"
    assert first[7:9] == ["–", "wiki.txt, 64 × 1024 tokens"]
    assert second[4:9] == ["16", "50.00 %", "30.00", "2.0001.900 … 2.100", "wiki.txt, 8 × 1024 tokens"]


@pytest.mark.parametrize("change", [{"model": "org/other"}, {"text": "c4"}, {"length": 512}, {"windows": 32}])
def test_what_cannot_be_compared_has_a_front_of_its_own(change: dict[str, object]) -> None:
    pair = [ROW, replace(ROW, name="b", sparsity=0.6, perplexity=20.0)]
    others = [replace(row, name=f"{row.name}2", perplexity=99.0, **change) for row in pair]  # type: ignore[arg-type]
    page = comparison_page("t", [*pair, *others])
    assert page.count("<svg") == 2
    front = {row[1]: row[0] for row in rows_of(page)[1:]}
    assert front == {"a": "", "b": "●", "a2": "", "b2": "●"}


def test_a_run_without_perplexity_is_a_row_and_no_point() -> None:
    unknown = replace(ROW, name="c", perplexity=None, text=None, length=None, windows=None)
    page = comparison_page("t", [ROW, replace(ROW, name="b", sparsity=0.4, perplexity=20.0), unknown])
    assert [row[-3] for row in rows_of(page)[1:]] == ["30.00", "20.00", "–"]
    assert page.count("&#34;text&#34;") == 2
    assert "On it: 2 of 2 runs." in Text(page).text


def test_a_run_alone_has_no_front() -> None:
    page = comparison_page("t", [ROW, replace(ROW, model="org/other")])
    assert "<svg" not in page
    assert "there is no front to draw" in page
    assert rows_of(page)[0][0] == "run"


def test_cells_are_sorted_by_what_they_stand_for() -> None:
    page = comparison_page("t", [ROW, replace(ROW, name="b", seconds=4000.0, perplexity=None)])
    keys = [re.findall(r'data-key="([^"]*)"', line) for line in page.split("<tbody>")[1].split("</tr>")]
    assert keys[0] == ["a", "wanda", "0.5", "0.5", "30.0", "10.0", "1000000000"]
    assert keys[1] == ["b", "wanda", "0.5", "0.5", "4000.0", "1000000000"], "what is not known has no key"


def test_what_failed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    page = comparison_page("t", [ROW], [{"name": "x_<1>", "error": "the disk is full"}])
    assert "x_<1> the disk is full" in Text(page).text
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    page = comparison_page("t", [ROW, replace(ROW, sparsity=0.7)])
    assert "because matplotlib is not installed" in Text(page).text
