"""What a person reads of runs that remove structures: plans, lists, cards, pages, tables, refusals."""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prunekit
import tiny
from prunekit.catalogue import METHODS
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.errors import PrunekitWarning
from prunekit.progress import Silent
from prunekit.pruning import run
from prunekit.recipe import Recipe
from prunekit.report.card import is_ours, model_card
from prunekit.report.page import run_page
from prunekit.report.runs import Row, comparison_page
from test_cli import call

SHRINK = [row.name for row in METHODS.values() if row.kind == "shrink" and not row.planned]
WIDTHS = ["--set", "budget.name=widths"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny.save_model(folder / "model", "llama", num_hidden_layers=7)
    (folder / "text.txt").write_text(tiny.make_text(600), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def few(place: Path) -> list[str]:
    return ["--calibration", str(place / "text.txt"), "--samples", "4", "--length", "32", "--dtype", "float32"]


def pruned(place: Path, out: Path, method: str, **more: Any) -> dict[str, Any]:
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32}
    values = {"ratio": 0.25} | more
    prunekit.prune(place / "model", out=out, method=method, calibration=calibration, dtype="float32", **values)
    found: dict[str, Any] = json.loads((out / "prunekit.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("method", SHRINK)
def test_every_method_can_be_planned_and_described(method: str, place: Path, few: list[str]) -> None:
    made = call("plan", place / "model", "--method", method, "--ratio", "0.1", *few, "--json")
    assert made.code == 0, made.err
    assert made.json["seconds"]["total"] > 0
    described = call("methods", method)
    assert described.code == 0
    assert ("removes     whole " in described.out) == (METHODS[method].depth is not None)
    of_units = METHODS[method].depth is None and METHODS[method].width is None
    assert ("budget." in described.out) == of_units


def test_a_method_says_what_its_defaults_read_and_draw() -> None:
    found = call("methods", "llm-pruner").out
    assert "measures    gradient_abs\n" in found
    assert "calibration samples=10, length=64" in found


class Counting(Silent):
    """Notes how many steps each piece of work was said to have, and how many it had."""

    def __init__(self) -> None:
        self.work: list[list[int]] = []

    def start(self, title: str, steps: int) -> None:
        self.work.append([steps, 0])

    def step(self, note: str = "") -> None:
        self.work[-1][1] += 1


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("numerical", {}),
        ("nirvana", {}),
        ("nirvana", {"choices": 2}),
        ("drop", {}),
        ("shortgpt", {}),
        ("shortgpt", {"choose": "greedy"}),
        ("shortgpt", {"choose": "contiguous"}),
    ],
)
def test_progress_ends_where_it_said(method: str, settings: dict[str, Any], place: Path, tmp_path: Path) -> None:
    parts = {"depth": {"choose": settings["choose"]}} if "choose" in settings else {}
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32, "choices": settings.get("choices", 1)}
    values = {"model": str(place / "model"), "method": method, "ratio": 0.4, "calibration": calibration, "parts": parts}
    progress = Counting()
    run(Recipe.build(values), tmp_path / "out", progress=progress)
    assert len(progress.work) == 2
    assert all(said == done for said, done in progress.work), progress.work


def test_cards_say_how_a_folder_loads_and_what_became_of_weights(place: Path, tmp_path: Path) -> None:
    free = {"budget": {"shape": "free", "name": "global-cost"}}
    manifests = {
        "stock": pruned(place, tmp_path / "stock", "random", parts={"compensate": {"name": "none"}}),
        "free": pruned(place, tmp_path / "free", "wanda-sp+least-squares", parts=free),
        "bias": pruned(place, tmp_path / "bias", "wanda-sp+bias"),
        "tuned": pruned(place, tmp_path / "tuned", "wanda-sp+blockwise"),
    }
    cards = {name: model_card(manifest, place / "model") for name, manifest in manifests.items()}
    assert "| method | random |" in cards["stock"]
    assert "of the blocks' matrices, what is kept is bit-identical." in cards["stock"]
    assert "it loads with `AutoModelForCausalLM.from_pretrained`, and is smaller" in cards["stock"]
    assert "`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`" in cards["free"]
    assert "were refitted (least-squares)" in cards["free"]
    assert "biases stand in for what" in cards["bias"]
    assert "was tuned towards" in cards["tuned"]
    assert not any("zeros are" in card or "zeros / weights" in card for card in cards.values())
    for name, card in cards.items():
        assert (tmp_path / name / "README.md").read_text(encoding="utf-8") == card
        assert is_ours(card, manifests[name], place / "model")


def test_a_sparse_copy_of_a_free_folder_says_how_it_loads(place: Path, tmp_path: Path) -> None:
    pruned(place, tmp_path / "free", "wanda-sp", parts={"budget": {"shape": "free", "name": "global-cost"}})
    prunekit.prune(tmp_path / "free", out=tmp_path / "sparse", method="magnitude", sparsity=0.5)
    card = (tmp_path / "sparse" / "README.md").read_text(encoding="utf-8")
    assert "The zeros are stored like any other number: the folder loads with `prunekit.load`" in card
    for name in ("free", "sparse"):
        padded = prunekit.export(tmp_path / name, out=tmp_path / f"{name}-padded", pad=True).out
        first, _, note = (padded / "README.md").read_text(encoding="utf-8").partition("## Padded")
        assert "trust_remote_code" not in first, "its folder has no code"
        assert "so that transformers loads it as it is" in note
        assert first.count("Repeat it with") == 1


def test_an_export_takes_the_plan_along_where_widths_stay(place: Path, tmp_path: Path) -> None:
    pruned(place, tmp_path / "free", "wanda-sp", parts={"budget": {"shape": "free", "name": "global-cost"}})
    plan = (tmp_path / "free" / PLAN_NAME).read_bytes()
    packed = prunekit.export(tmp_path / "free", out=tmp_path / "packed", format="bitmask").out
    plain = prunekit.export(packed, out=tmp_path / "plain").out
    for folder in (packed, plain):
        assert (folder / PLAN_NAME).read_bytes() == plan
        assert PLAN_NAME in json.loads((folder / "prunekit.json").read_text(encoding="utf-8"))["outputs"]
        assert prunekit.inspect(folder).sound
    padded = prunekit.export(tmp_path / "free", out=tmp_path / "padded", pad=True).out
    assert not (padded / PLAN_NAME).exists(), "it has units back that the plan says are gone"


def test_a_page_shows_blocks_that_went(place: Path, tmp_path: Path) -> None:
    manifest = pruned(place, tmp_path / "out", "shortgpt")
    gone = manifest["run"]["dropped_blocks"]
    kept = [line["block"] for line in manifest["blocks"]]
    assert sorted(gone + kept) == list(range(7))
    assert len(gone) == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [int(found) for found in re.findall(r"block (\d): removed as a whole", page)] == gone
    assert "25 % of the block parameters, in whole blocks" in page
    assert "No linear of the blocks that stay was changed" in page
    assert "zeros" not in re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", "", page, flags=re.DOTALL)


def test_zeros_that_were_there_are_not_taken_for_removed(place: Path, tmp_path: Path) -> None:
    manifest = pruned(place, tmp_path / "out", "random", ratio=None, parts={"budget": {"name": "widths", "mlp": 36}})
    manifest["linears"][0]["zeros"] = 500  # of a linear that lost nothing
    page = run_page(manifest)
    assert "0 of 1,024 weights removed, 32 x 32 left" in page
    assert page.count("block 0: 1,152 of 7,680 weights") == 1


def test_inspect_shows_widths(place: Path, tmp_path: Path) -> None:
    manifest = pruned(place, tmp_path / "out", "wanda-sp", ratio=None, parts={"budget": {"name": "widths", "mlp": 32}})
    shown = call("inspect", tmp_path / "out").out
    assert "outputs x inputs" in shown
    assert "32 x 48" not in shown
    assert shown.count("32 x 32") >= 7
    assert f"{manifest['run']['removed']:,} fewer than before" in shown
    assert "pattern " not in shown
    assert call("inspect", tmp_path / "out", "--json").json["removed"] == manifest["run"]["removed"]


def test_given_widths_are_said_and_repeated_without_a_ratio(place: Path, tmp_path: Path) -> None:
    first = pruned(place, tmp_path / "a", "wanda-sp", ratio=None, parts={"budget": {"name": "widths", "mlp": 32}})
    assert first["recipe"]["ratio"] is None
    command = Recipe.build(first["recipe"]).command(str(tmp_path / "b")).split()
    assert "--ratio" not in command
    assert "budget.attention=null" in command
    assert call(*command[1:]).code == 0
    again = json.loads((tmp_path / "b" / "prunekit.json").read_text(encoding="utf-8"))
    assert again["outputs"] == first["outputs"]
    assert "Given widths" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "0.2"], r"or one of the others \(random, "),
        (["--align", "8"], r"'budget.align' is for methods that remove structures \(random, "),
        (["--method", "wanda-sp", "--ratio", "0.3", *WIDTHS], "both say how much goes"),
        (["--method", "wanda-sp", *WIDTHS], "is given the numbers that stay: say --set budget.mlp=N"),
        (
            ["--method", "wanda-sp", "--ratio", "0.0001"],
            r"a unit has 96 or more and goes from every block alike: with align 1 none goes; ask for more, or add --shape free",
        ),
        (["--method", "wanda-sp", "--ratio", "0.9"], r"ask for at most 0\.78"),
        (["--method", "llm-pruner", "--ratio", "0.9"], "skip fewer blocks, or remove whole blocks"),
        (["--method", "shortgpt", "--ratio", "0.05"], r"of 7 blocks is less than half of one: ask for 0\.143 or more"),
        (["--method", "shortgpt", "--ratio", "0.99"], "would remove all 7 blocks"),
        (["--method", "shortgpt", "--shape", "free"], "removes whole blocks: leave it out"),
    ],
)
def test_what_would_be_ignored_or_do_nothing_is_refused(
    words: list[str], message: str, place: Path, few: list[str], tmp_path: Path
) -> None:
    refused = call("prune", place / "model", *few, *words, "--out", tmp_path / "out")
    assert refused.code == 2
    assert re.search(message, refused.err), refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "out").exists()


def test_the_most_a_refusal_names_can_be_had(place: Path, few: list[str], tmp_path: Path) -> None:
    refused = call("prune", place / "model", *few, "--method", "random", "--ratio", "0.9", "--out", tmp_path / "out")
    named = re.search(r"at most (0\.\d+)", refused.err)
    assert named is not None
    words = ["--method", "random", "--ratio", named[1], "--out", tmp_path / "out"]
    assert call("prune", place / "model", *few, *words).code == 0


def test_one_window_is_enough_where_no_calibration_is_chosen(place: Path, few: list[str], tmp_path: Path) -> None:
    words = ["--method", "wanda-sp", "--samples", "1", "--out", tmp_path / "out"]
    assert call("prune", place / "model", *few, *words).code == 0


def test_compare_sends_elsewhere(place: Path, few: list[str], tmp_path: Path) -> None:
    refused = call("compare", place / "model", *few, "--methods", "wanda,flap", "--out", tmp_path / "out")
    assert (refused.code, refused.out) == (2, "")
    assert "'flap' removes structures, and compare puts every block back" in refused.err


def test_a_sweep_and_its_page_tell_ratios(place: Path, tmp_path: Path) -> None:
    grid = {
        "model": str(place / "model"),
        "calibration": {"source": str(place / "text.txt"), "samples": 4, "length": 32},
        "grid": {"method": ["random", "shortgpt"], "ratio": [0.2, 0.4]},
        "evaluate": {"text": str(place / "text.txt"), "length": 32, "samples": 4},
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    shown = call("sweep", tmp_path / "grid.json", "--out", tmp_path / "runs")
    assert shown.code == 0, shown.err
    assert "sparsity" not in shown.out
    assert "model_random_0.2_seed0" in shown.out
    lines = [
        json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["target"] for line in lines] == ["0.2", "0.4", "0.2", "0.4"]
    assert [round(line["ratio"], 1) for line in lines[:2]] == [0.2, 0.4]
    assert call("report", tmp_path / "runs", "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "perplexity against ratio" in page
    assert "parsity" not in page


def test_zeros_and_removed_parameters_never_come_into_one_picture() -> None:
    row = Row("a", "m", "wanda", "0.5", 0.5, 1.0, 1, perplexity=30.0, text="t", length=8, windows=1)
    small = replace(row, method="flap", sparsity=0.0, ratio=0.3)
    rows = [row, replace(row, name="b", sparsity=0.6), small, replace(small, name="c", ratio=0.4)]
    page = comparison_page("t", rows)
    assert page.count("perplexity against sparsity") == page.count("perplexity against ratio") == 1


def test_warnings_are_sentences(few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "opt", "opt")
    words = ["--method", "wanda-sp", "--ratio", "0.3", "--out", tmp_path / "out"]

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always", PrunekitWarning)
        monkeypatch.setattr(warnings, "showwarning", show)  # as Python does it where pytest does not collect them
        done = call("prune", tmp_path / "opt", *few, *words)
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "has no config for these widths" in line]
    assert len(said) == 1
    assert said[0].startswith("prunekit: OPTForCausalLM has no config")
    assert "PrunekitWarning" not in done.err
