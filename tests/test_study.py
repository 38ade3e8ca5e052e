"""A study measures a table, holds what its paper says against it, writes it down, and repeats nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

import prunekit
from helpers import ctrl_c
from prunekit import InputError, api, pruning, studying
from prunekit.evaluation.record import TextFigures
from prunekit.grid import Grid
from prunekit.report import plots
from prunekit.report.numbers import spelt
from prunekit.studies import Cell, Claim, Study, read_study
from test_cli import call

# two runs instead of four: each costs a second
SMALL = {"method": ["wanda", "magnitude"], "pattern": [0.5]}
STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))


class Setting:
    """A model and texts, lying in `inputs`, and a study of them in a folder of its own."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.inputs, self.folder, self.model, self.text = inputs, folder, inputs / "model", inputs / "text.txt"
        self.out, self.file = folder / "out", folder / "tiny.json"

    def values(self, *, study: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "dtype": "float32",
            "calibration": {"source": str(self.text), "samples": 3, "length": 32},
            "grid": {
                "variant": [
                    {"label": "Wanda | ‖x‖", "method": "wanda"},
                    {"label": "α = 1", "method": "ria", "parts": {"score": {"alpha": 1.0}}},
                ],
                "pattern": [0.5, "2:4"],
            },
            "evaluate": {"text": str(self.text), "length": 32, "samples": 4, "dtype": "float32"},
            "study": {"title": "T", "about": "Why.", "rows": "variant", "columns": "pattern"} | (study or {}),
        } | sections

    def write(self, **values: Any) -> Path:
        self.file.write_text(json.dumps(self.values(**values)))
        return self.file

    def run(self, **values: Any) -> prunekit.Findings:
        return prunekit.study(self.write(**values), out=self.out)

    def read(self, suffix: str) -> str:
        return (self.out / f"tiny{suffix}").read_text(encoding="utf-8")


@pytest.fixture
def setting(inputs: Path, tmp_path: Path) -> Setting:
    """A study that has not begun."""
    return Setting(inputs, tmp_path)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    setting = Setting(inputs, tmp_path_factory.mktemp("finished"))
    assert setting.run().sweep.failed == []
    return setting.out


@pytest.fixture
def done(setting: Setting, finished: Path) -> Setting:
    """A study that was run to its end."""
    shutil.copytree(finished, setting.out)
    return setting


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what was pruned, and of the models that were evaluated, in order."""
    names: list[str] = []
    run, evaluate = pruning.run, api.evaluate

    def pruned(recipe: prunekit.Recipe, out: Path, **options: Any) -> prunekit.Result:
        names.append(f"prune {out.name}")
        return run(recipe, out, **options)

    def evaluated(model: Any, **options: Any) -> prunekit.Evaluation:
        names.append(f"eval {Path(model).name}")
        return evaluate(model, **options)

    monkeypatch.setattr(pruning, "run", pruned)
    monkeypatch.setattr(api, "evaluate", evaluated)
    return names


# What it measures


def test_the_table_is_what_pruning_and_evaluating_by_hand_give(setting: Setting) -> None:
    found = setting.run(grid=setting.values()["grid"] | {"pattern": ["2:4"]})
    options = setting.values()["evaluate"]
    calibration = setting.values()["calibration"]
    recipes: dict[str, dict[str, Any]] = {
        "Wanda | ‖x‖": {"method": "wanda"},
        "α = 1": {"method": "ria", "parts": {"score": {"alpha": 1.0}}},
    }
    for (row, column), cell in found.cells.items():
        out = setting.folder / "alone"
        prunekit.prune(setting.model, out=out, pattern=column, calibration=calibration, dtype="float32", overwrite=True,
                       **recipes[row])  # fmt: skip
        assert cell.values == (prunekit.evaluate(out, **options).perplexity,)
    assert list(found.cells) == [(row, "2:4") for row in recipes]
    assert found.dense == prunekit.evaluate(setting.model, **options).perplexity


def test_models_are_removed_and_their_records_stay(done: Setting) -> None:
    work = done.out / ".work" / "tiny"
    assert not list(done.out.rglob("*.safetensors"))
    assert {path.name for path in work.iterdir()} == {"dense.json", "results.jsonl", "results.parquet", "runs"}
    assert len(list((work / "runs").iterdir())) == 4
    assert (done.out / ".work" / ".gitignore").read_text() == "*\n"
    assert {path.name for path in done.out.iterdir()} == {".work", "tiny.json", "tiny.md", "tiny.svg"}


def test_models_are_left_where_they_are_asked_for(setting: Setting, ran: list[str]) -> None:
    file = setting.write(grid=SMALL, study={"rows": "method"})
    found = prunekit.study(file, out=setting.out, work=setting.folder / "work", keep_models=True)
    for row in found.sweep.rows:
        assert prunekit.inspect(setting.folder / "work" / row["name"]).sound
    assert not (setting.out / ".work").exists()
    prunekit.study(file, out=setting.out, work=setting.folder / "work")
    assert len(ran) == 2 + 3  # what was left is not removed behind its owner's back, and nothing is run again
    assert len(list((setting.folder / "work").rglob("*.safetensors"))) > 2


def test_what_is_done_is_not_repeated_and_gives_the_same_files(done: Setting, ran: list[str]) -> None:
    first = done.run()
    texts = [done.read(suffix) for suffix in (".json", ".md", ".svg")]
    second = done.run()
    assert ran == []
    assert [done.read(suffix) for suffix in (".json", ".md", ".svg")] == texts
    assert (second.cells, second.dense, second.sweep.skipped) == (first.cells, first.dense, 4)


def test_a_label_may_be_reworded_without_running_anything(done: Setting, ran: list[str]) -> None:
    grid = done.values()["grid"]
    grid["variant"][0]["label"] = "W"
    found = done.run(grid=grid)
    assert ran == []
    assert found.study.rows == ("W", "α = 1")


def test_another_evaluation_needs_the_models_again(done: Setting, ran: list[str]) -> None:
    evaluation = done.values()["evaluate"] | {"samples": 2}
    before = done.read(".md")
    grid = done.values()["grid"] | {"pattern": [0.5]}
    found = done.run(evaluate=evaluation, grid=grid)
    assert sum(name.startswith("prune") for name in ran) == 2
    assert "eval model" in ran
    assert done.read(".md") != before
    assert found.sweep.failed == []
    assert not list(done.out.rglob("*.safetensors"))


def test_a_killed_study_goes_on(setting: Setting, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: Any, **options: Any) -> prunekit.Evaluation:
        if "magnitude" in str(model):
            raise KeyboardInterrupt
        return evaluate(model, **options)

    evaluate = api.evaluate
    values: dict[str, Any] = {"grid": SMALL, "study": {"rows": "method"}}
    with monkeypatch.context() as patch:
        patch.setattr(api, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setting.run(**values)
    assert not (setting.out / "tiny.md").exists()
    ran.clear()
    found = setting.run(**values)
    assert found.sweep.skipped == 1
    # dense and Wanda's are known, and the second model is pruned already: only its evaluation is missing
    assert ran == ["eval model_magnitude_0.5_seed0"]


def test_a_kill_between_record_and_removal_leaves_no_model(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"grid": SMALL, "study": {"rows": "method"}}
    with monkeypatch.context() as patch:
        patch.setattr("prunekit.sweeping.remove", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            setting.run(**values)
    assert list(setting.out.rglob("*.safetensors"))
    assert setting.run(**values).sweep.skipped == 1
    assert not list(setting.out.rglob("*.safetensors"))


def test_a_run_that_fails_is_a_hole_in_the_table(setting: Setting) -> None:
    impossible = {"label": "impossible", "parts": {"budget": {"overrides": {"*.no_such": 0.5}}}}
    grid = {"variant": [{"label": "α = 1", "method": "ria"}, impossible], "pattern": [0.5]}
    claims = [{"claim": "C.", "less": ["impossible", 0.5], "than": ["α = 1", 0.5]}]
    setting.write(grid=grid, study={"claims": claims})
    found = call("study", setting.file, "--out", setting.out, "--json")
    assert found.code == 1
    assert found.json["failed"] == 1
    page = setting.read(".md")
    assert re.search(r"^\| impossible +\| +failed \|$", page, re.M)
    assert "no_such" in page.partition("## Failed")[2]
    assert "*Not known*, because runs failed: C." in page
    assert found.json["claims"][0]["holds"] is None


# Means over seeds


def test_figures_are_means_over_an_axis(setting: Setting) -> None:
    grid = {"method": ["stochastic-ri"], "seed": [0, 1, 2], "pattern": [0.6]}
    found = setting.run(grid=grid, study={"rows": "method", "over": "seed"})
    perplexities = [row["perplexity"] for row in found.sweep.rows]
    assert len(set(perplexities)) == 3
    cell = found.cells["stochastic-ri", "0.6"]
    assert cell.mean == statistics.fmean(perplexities)
    assert cell.deviation == statistics.stdev(perplexities)
    page = setting.read(".md")
    assert f"{spelt(cell.mean)} ± {spelt(cell.deviation)}" in page
    assert "the mean ± standard deviation over seed 0, 1, 2." in page
    saved = json.loads(setting.read(".json"))
    assert saved["cells"][0]["values"] == perplexities


def test_a_model_that_lost_its_wits_is_shown_and_stays_json() -> None:
    cell = Cell("a", "b", (math.inf, 2.0))
    assert (cell.mean, cell.deviation, spelt(cell.mean)) == (math.inf, None, "∞")
    assert [spelt(x) for x in (None, 9.876, 99.9, 123.45, 12345.6, 654321.0)] == [
        "failed", "9.88", "99.90", "123.5", "12346", "6.5e+05"]  # fmt: skip


# What a paper says


def verdict(less: list[float], than: list[float], slack: float = 0.0) -> tuple[bool | None, bool]:
    claim = Claim(claim="c", less=("a", 1), than=("b", 1), slack=slack)
    options = {"title": "", "about": "", "rows": "r", "columns": "c", "claims": (claim,)}
    study = Study("s", prunekit.studies.StudyOptions(**options), Grid(base={}, axes={}), ("a", "b"), ("1",))
    cells = {("a", "1"): Cell("a", "1", tuple(less)), ("b", "1"): Cell("b", "1", tuple(than))}
    (found,) = study.verdicts(cells)
    return found.holds, found.noisy


def test_claims_hold_or_not() -> None:
    assert verdict([1.0], [2.0]) == (True, False)
    assert verdict([2.0], [1.0]) == (False, False)
    assert verdict([2.0], [2.0]) == (False, False)
    assert verdict([2.02], [2.0], slack=0.02) == (True, False)
    assert verdict([2.05], [2.0], slack=0.02) == (False, False)
    assert verdict([], [2.0]) == (None, False)
    assert verdict([1.0, 3.0], [2.1, 2.3]) == (True, True)
    assert verdict([1.0, 1.1], [2.1, 2.3]) == (True, False)
    assert verdict([2.0], [math.inf]) == (True, False)
    assert verdict([math.inf], [math.inf]) == (False, False)


def test_the_page_says_plainly_what_contradicts_the_paper(done: Setting) -> None:
    one, two = ["α = 1", 0.5], ["Wanda | ‖x‖", "0.5"]
    claims = [{"claim": "One.", "less": one, "than": two}, {"claim": "Two.", "less": two, "than": one}]
    found = done.run(study={"claims": claims})
    holds = [verdict.holds for verdict in found.verdicts]
    assert sorted(map(bool, holds)) == [False, True]
    page = done.read(".md")
    true, false = ("One.", "Two.") if holds[0] else ("Two.", "One.")
    assert f"- **Agrees**: {true}" in page
    assert f"- **CONTRADICTS the paper**: {false}" in page
    assert "**Our measurement contradicts 1 of 2 claims.**" in page
    assert found.contradicted == [false]
    assert json.loads(done.read(".json"))["contradicted"] == [false]


def test_published_figures_stand_beside_ours(done: Setting) -> None:
    source = "A. et al., table 1"
    published = [
        {"model": "L", "row": "dense", "value": 5.0, "source": source},
        {"model": "L", "row": "α = 1", "column": 0.5, "value": 10.0, "source": source},
        {"model": "M", "row": "α = 1", "column": "2:4", "value": 42.13, "source": "B."},
    ]
    found = done.run(study={"published": published})
    lines = done.read(".md").partition("## Beside published figures")[2].splitlines()
    cells = [[word.strip() for word in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    ours = found.cells["α = 1", "0.5"].mean
    assert ours is not None
    assert cells[2] == ["dense", "", spelt(found.dense), "1.00", "5", "1.00", "L", "[1]"]
    assert cells[3] == ["α = 1", "0.5", spelt(ours), spelt(ours / found.dense), "10", "2.00", "L", "[1]"]
    assert cells[4][4:] == ["42.13", "", "M", "[2]"]
    assert f"- [1] {source}" in lines


# What it writes


def test_the_page(done: Setting) -> None:
    found = done.run()
    page = done.read(".md")
    assert page.startswith("# T\n\nWhy.\n\n")
    table = [line for line in page.partition("## Perplexity")[2].splitlines() if line.startswith("|")]
    assert [re.sub(" +", " ", line) for line in (table[0], table[2])] == [
        "| variant | 0.5 | 2:4 |",
        f"| Wanda \\| ‖x‖ | {bold(found, 'Wanda | ‖x‖', '0.5')} | {bold(found, 'Wanda | ‖x‖', '2:4')} |",
    ]
    assert f"Dense model: {spelt(found.dense)}." in page
    assert f"3 windows of 32 tokens from `{done.text}`" in page
    assert f"the first 4 windows of 32 tokens of `{done.text}`" in page
    assert f"prunekit study {done.file} --out {done.out}" in page
    assert "![T](tiny.svg)" in page
    assert f"torch {prunekit.machine.versions()['torch']}" in page


def test_the_best_is_marked_among_what_is_compared(done: Setting) -> None:
    done.run(study={"compare": "columns", "columns": "pattern"})
    page = done.read(".md")
    table = [line for line in page.partition("## Perplexity")[2].splitlines() if line.startswith("|")]
    assert [line.count("**") for line in table[2:]] == [2, 2]
    assert "Rows: variant; columns: pattern." in page
    assert "the best of each row is bold" in page


def bold(found: prunekit.Findings, row: str, column: str) -> str:
    means = {r: found.cells[r, column].mean or 0.0 for r in found.study.rows}
    text = spelt(means[row])
    return f"**{text}**" if means[row] == min(means.values()) else text


def test_the_json_holds_every_figure(done: Setting) -> None:
    found = done.run()
    saved = json.loads(done.read(".json"))
    assert saved["dense"] == found.dense
    assert [cell["mean"] for cell in saved["cells"]] == [cell.mean for cell in found.cells.values()]
    assert [row["perplexity"] for row in saved["rows"]] == [row["perplexity"] for row in found.sweep.rows]
    assert saved["grid"]["base"]["model"] == str(done.model)
    assert saved["made_on"] == [{"machine": prunekit.machine.describe(), "versions": prunekit.machine.versions()}]


@pytest.mark.parametrize("plot", ["bars", "lines"])
@pytest.mark.parametrize("log", [False, True])
def test_the_picture_shows_every_label(done: Setting, plot: str, log: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")  # letters instead of outlines
    found = done.run(study={"plot": plot, "log": log})
    drawn = done.read(".svg")
    assert "<svg" in drawn
    for label in ("variant" if plot == "lines" else "pattern", "Wanda | ‖x‖", "α = 1", "0.5", "2:4", "perplexity"):
        assert f">{label}</text>" in drawn, label
    assert f">dense ({spelt(found.dense)})</text>" in drawn


def test_holes_and_infinities_can_be_drawn(done: Setting) -> None:
    for plot in ("bars", "lines"):
        study = read_study(done.write(study={"plot": plot, "log": True}))
        cells = {(row, column): Cell(row, column, (math.inf,)) for row in study.rows for column in study.columns}
        cells["α = 1", "0.5"] = Cell("α = 1", "0.5", ())
        plots.draw_study(study, cells, 7.0, done.out / f"{plot}.png")
        assert matplotlib.image.imread(done.out / f"{plot}.png").shape[2] == 4


# The command line's words


def test_the_command_line_says_where_models_and_texts_are(setting: Setting) -> None:
    grid = {"method": ["wanda"], "calibration.source": ["speeches", str(setting.text)]}
    setting.write(grid=grid, study={"rows": "method", "columns": "calibration.source"}, evaluate={"length": 32})
    words = ["--model", setting.inputs / "other", "--calibration", f"speeches={setting.inputs / 'speech.txt'}"]
    words += ["--text", setting.text, "--set", "calibration.samples=2", "--set", "evaluate.samples=3"]
    found = call("study", setting.file, *words, "--out", setting.out, "--json")
    assert found.code == 0, found.err
    assert found.json["model"] == str(setting.inputs / "other")
    assert [cell["column"] for cell in found.json["cells"]] == ["speeches", str(setting.text)]
    saved = json.loads(setting.read(".json"))
    assert {row["windows"] for row in saved["rows"]} == {2}
    assert {row["evaluation.windows"] for row in saved["rows"]} == {3}
    assert {row["evaluation.text"] for row in saved["rows"]} == {str(setting.text)}
    assert saved["cells"][0]["mean"] != saved["cells"][1]["mean"]
    page = setting.read(".md")
    assert f"--calibration speeches={setting.inputs / 'speech.txt'} --text {setting.text}" in page


def test_the_page_is_printed_without_json(done: Setting) -> None:
    found = call("study", done.write(), "--out", done.out)
    assert found.code == 0, found.err
    assert found.out.startswith(done.read(".md"))
    assert f"written     {done.out / 'tiny.svg'}" in found.out


def test_one_calibration_text_takes_the_place_of_the_files(setting: Setting) -> None:
    study = read_study(setting.write(), calibration=[str(setting.inputs / "speech.txt")])
    assert {c.recipe.calibration.source for c in study.grid.combinations()} == {str(setting.inputs / "speech.txt")}
    assert {c.recipe.calibration.samples for c in study.grid.combinations()} == {3}


# Refused

BASE = {"variant": [{"label": "a", "method": "wanda"}, {"label": "b", "method": "ria"}], "pattern": [0.5, "2:4"]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"study": {"rows": "varian"}}, "rows of the study is 'varian', which is no axis of its grid: did you mean 'variant'?"),
    ({"study": {"over": "pattern"}}, "axis 'pattern' is named twice"),
    ({"study": {"plot": "pie"}}, 'plot cannot be "pie"'),
    ({"study": {"titel": "x"}}, "'titel' is not a name a study has at that place: did you mean 'title'?"),
    (
        {"study": {"claims": [{"claim": "c", "less": ["a", 0.5], "than": ["b", 0.5], "slak": 1}]}},
        "'claims.0.slak' is not a name a study has at that place: did you mean 'slack'?",
    ),
    ({"study": {"value": "speed"}}, 'value cannot be "speed"'),
    ({"study": {"claims": [{"claim": "c", "less": ["a", 0.5], "than": ["c", 0.5]}]}}, "row 'c', which its table does not have"),
    ({"study": {"claims": [{"claim": "c", "less": ["a", 0.6], "than": ["b", 0.5]}]}}, "column '0.6', which its table"),
    ({"study": {"published": [{"model": "M", "row": "a", "value": 1, "source": "s"}]}}, "everything else has one"),
    ({"grid": BASE | {"seed": [0, 1]}}, "axis 'seed' of the grid is neither rows, columns nor over"),
    ({"grid": BASE | {"model": ["x"]}}, "a study is of one model"),
    ({"grid": BASE | {"pattern": [0.5, "0.5"]}}, "two points called '0.5'"),
    ({"grid": BASE | {"variant": ["a", "b"]}}, "'variant' is not a name of a recipe"),
    ({"grid": BASE | {"variant": [{"label": "a"}, {"label": "a", "method": "ria"}]}}, "more than one case labelled 'a'"),
    ({"grid": BASE | {"variant": [{"label": 3}]}}, "a label is text"),
    ({"grid": BASE | {"variant": [{"label": "a", "metod": "ria"}]}}, "'metod' of case 'a' is not a name of a recipe"),
    ({"grid": BASE | {"variant": [{"label": "a", "method": "wonda"}]}}, "combination (variant=a, pattern=0.5): method 'wonda'"),
    ({"grid": {"zeros": [{"label": "a"}]}}, "the name of a column"),
    ({"evaluate": {"text": "builtin:eval", "sample": 3}}, "a grid has at that place: did you mean 'samples'?"),
    ({"evaluate": 5}, "evaluate cannot be 5"),
    ({"calibration": {"source": "speeches"}}, "say where it lies with --calibration speeches=FILE"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_a_wrong_study_is_refused_in_one_sentence_before_anything_runs(
    values: dict[str, Any], sentence: str, setting: Setting, ran: list[str]
) -> None:
    done = call("study", setting.write(**{"grid": BASE, **values}), "--out", setting.out)
    assert (done.code, done.out, ran) == (2, "", [])
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not setting.out.exists()


def test_a_grid_is_no_study_but_a_study_is_a_grid(setting: Setting) -> None:
    values = setting.values()
    assert len(Grid.build(values).combinations()) == 4
    del values["study"]
    setting.file.write_text(json.dumps(values))
    done = call("study", setting.file, "--out", setting.out)
    assert done.code == 2
    assert "no section [study]" in done.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--calibration", "c4=/x"], "compares no text called 'c4'"),
        (["--set", "evaluate.sample=3"], "'evaluate.sample' is not a name"),
        (["--set", "calibration.samples"], "is not part.option=value"),
        (["--calibration", "/no/such.txt"], "calibration text '/no/such.txt' is no file"),
    ],
)
def test_wrong_words_are_refused(words: list[str], sentence: str, setting: Setting) -> None:
    done = call("study", setting.write(), *words, "--out", setting.out)
    assert done.code == 2
    assert sentence in done.err


def test_a_text_must_be_named_where_texts_are_compared(setting: Setting) -> None:
    grid = {"method": ["wanda"], "calibration.source": ["builtin", "c4"]}
    file = setting.write(grid=grid, study={"rows": "method", "columns": "calibration.source"})
    with pytest.raises(InputError, match="say which one it is, like --calibration c4="):
        read_study(file, calibration=[str(setting.text)])
    with pytest.raises(InputError, match="did you mean 'c4'"):
        read_study(file, calibration=[f"c5={setting.text}"])
    with pytest.raises(InputError, match=r"'calibration\.source' is an axis of the study"):
        read_study(file, settings=["calibration.source=x"])


def test_results_of_another_model_are_not_written_over(done: Setting, ran: list[str]) -> None:
    done.run()
    before = done.read(".md")
    with pytest.raises(InputError, match="choose another --out"):
        prunekit.study(done.write(), out=done.out, model=done.inputs / "other")
    assert (done.read(".md"), ran) == (before, [])


def test_without_matplotlib_nothing_begins(setting: Setting, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    done = call("study", setting.write(), "--out", setting.out)
    assert done.code == 2
    assert "pip install 'prunekit[plots]'" in done.err
    assert ran == []
    assert not setting.out.exists()


def test_a_dense_model_that_says_nothing_is_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TextFigures(text="t", length=2, windows=1, perplexity=math.inf)
    evaluation = prunekit.Evaluation("m", None, (text,), (), 1.0, 1)
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: evaluation)
    with pytest.raises(InputError, match="no finite perplexity"):
        setting.run()
    assert not (setting.out / ".work" / "tiny" / studying.DENSE_RECORD).exists()


# The studies of this repository


@pytest.mark.parametrize("path", [p for p in STUDIES if "[study]" in p.read_text()], ids=lambda path: path.name)
def test_the_papers_studies_are_sound(path: Path) -> None:
    study = read_study(path, calibration=[f"speeches={__file__}"] if path.stem == "calibration" else [])
    assert study.model == "smollm2-135m"
    assert study.options.claims or "nothing" in study.options.about or study.options.over
    assert len(study.grid.combinations()) >= 4
