"""`search-llm` from beginning to end: a folder like any other, the same after a kill, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from helpers import contents, shards
from prunekit.errors import HistoryError, InputError
from prunekit.model.source import ResidentModel, StreamedModel
from prunekit.parts import find_part
from prunekit.shrink import searching
from prunekit.shrink.plan import Plan
from prunekit.shrink.units import find_structures
from prunekit.shrink.view import BlockView
from prunekit.statistics import Statistics
from searches import calls_of, killed_after, search_in
from test_cli import call
from whole import draw_windows

SEARCH = {"trials": 10, "population": 5, "parents": 3, "samples": 4, "first": 1, "window": 0.01, "step": 0.1}


@pytest.fixture
def asked(tmp_path: Path, text_file: Path) -> dict[str, Any]:
    tiny.save_model(tmp_path / "model", "llama")
    return {
        "model": tmp_path / "model",
        "method": "search-llm",
        "ratio": 0.2,
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "dtype": "float32",
        "parts": {"search": SEARCH},
    }


def test_the_folder_is_what_the_search_found(asked: dict[str, Any], tmp_path: Path) -> None:
    result = prunekit.prune(**asked, out=tmp_path / "out")
    search = search_in(tmp_path / "out")
    model = prunekit.load(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == result.parameters - result.removed
    assert abs(result.ratio - 0.2) <= 0.01
    widths = [[kept for kept, _ in block] for block in search["candidate"]]
    plan = json.loads((tmp_path / "out" / "prune_plan.json").read_text())
    assert widths == [[len(entry["kept"]) for entry in block.values()] for block in plan["blocks"]]
    assert [block.mlp.down_proj.in_features for block in model.model.layers] == [block[1] for block in widths]
    assert search["proposed"] == 10
    assert search["measured"] + search["given_up"] == 10
    assert search["best"] == min(value for _, value in search["course"]) <= search["first"]
    assert search["course"][0] == [1, search["first"]]
    assert len(search["held_out"]) == 2
    assert not [path.name for path in (tmp_path / "out").iterdir() if "search" in path.name], "nothing is left behind"
    assert prunekit.inspect(tmp_path / "out").sound
    recipe = json.loads((tmp_path / "out" / "prunekit.json").read_text())["recipe"]
    assert prunekit.Recipe.build(recipe).command("OUT").count("search.trials=10") == 1


def test_the_command_line_says_what_the_search_found(asked: dict[str, Any], tmp_path: Path) -> None:
    options = [f"search.{name}={value}" for name, value in (SEARCH | {"trials": 4, "population": 4}).items()]
    words = ["--calibration", asked["calibration"]["source"], "--samples", 4, "--length", 32, "--dtype", "float32"]
    words += [word for option in options for word in ("--set", option)]
    done = call("prune", asked["model"], "--method", "search-llm", "--ratio", 0.2, *words, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = search_in(tmp_path / "out")
    first, best, *held_out = (f"{value:.2f}" for value in (found["first"], found["best"], *found["held_out"]))
    (line,) = (line for line in done.out.splitlines() if line.startswith("  search "))
    wanted = f"4 candidates: perplexity {first} -> {best}, on text held out {held_out[0]} -> {held_out[1]}"
    assert line.split(maxsplit=1)[1] == wanted


def test_equal_seeds_make_equal_bytes_and_another_seed_another_search(asked: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        prunekit.prune(**{**asked, "parts": {"search": {**SEARCH, "trials": 5}}}, seed=seed, out=tmp_path / name)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    one, three = (search_in(tmp_path / name) for name in ("one", "three"))
    assert one["tokens_sha256"] != three["tokens_sha256"]


@pytest.mark.parametrize("calls", [0, 2])
def test_a_killed_search_goes_on_to_the_same_folder(asked: dict[str, Any], tmp_path: Path, calls: int) -> None:
    prunekit.prune(**asked, out=tmp_path / "whole")
    with killed_after(calls, searching, "plan_losses") as before:
        prunekit.prune(**asked, out=tmp_path / "killed")
    history = tmp_path / "killed" / searching.HISTORY_NAME
    assert history.is_file()
    with calls_of(searching, "plan_losses") as behind:
        prunekit.prune(**asked, out=tmp_path / "killed", resume=True)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    one, other = (search_in(tmp_path / name) for name in ("killed", "whole"))
    told = ("best", "first", "candidate", "course", "held_out")
    assert {name: one[name] for name in told} == {name: other[name] for name in told}
    assert not history.exists()
    measured = sum(len(plans) * len(windows) for _, _, plans, windows in [*before, *behind])
    every_candidate_once, both_ends_held_out = other["windows_measured"], 2 * other["windows"]
    assert measured == every_candidate_once + both_ends_held_out, "nothing was measured twice"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text.replace("losses", "l0sses"), "cannot be read as the history of a search"),
        (lambda text: text.replace('"ratio": 0.2', '"ratio": 0.3'), "recipe.ratio is 0.3 there and 0.2 here"),
    ],
)
def test_a_damaged_history_is_refused_and_nothing_is_lost(
    asked: dict[str, Any], tmp_path: Path, damage: Callable[[str], str], sentence: str
) -> None:
    with killed_after(2, searching, "plan_losses"):
        prunekit.prune(**asked, out=tmp_path / "out")
    history = tmp_path / "out" / searching.HISTORY_NAME
    history.write_text(damage(history.read_text()))
    before = contents(tmp_path / "out")
    with pytest.raises(HistoryError, match=sentence):
        prunekit.prune(**asked, out=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parts": {"search": {**SEARCH, "window": 0.0}}}, "search.window allows 0 parameters more or less"),
        ({"parts": {"search": {**SEARCH, "least": 0.95}}}, "its widths leave at most"),
        ({"parts": {"search": SEARCH, "budget": {"shape": "uniform"}}}, "add --shape free"),
        (
            {"method": "flap+evolution", "parts": {"search": SEARCH, "budget": {"shape": "free"}}},
            "and so does budget 'global-cost': say --set budget.name=uniform",
        ),
        ({"parts": {"search": SEARCH, "budget": {"name": "widths", "mlp": 9}}, "ratio": None}, "name no widths"),
        (
            {"parts": {"search": SEARCH, "budget": {"shape": "free", "only": "mlp"}}},
            "has a choice of kinds of its own: in the place of budget.only",
        ),
        ({"parts": {"search": {**SEARCH, "samples": 10_000}}}, "what candidates are judged by takes 10000 windows"),
        ({"parts": {"search": {**SEARCH, "parents": 9}}}, "search.parents=9 make no search"),
        ({"parts": {"search": {**SEARCH, "text": "nowhere.txt"}}}, "text 'nowhere.txt' is neither a file"),
        ({"parts": {"search": {"name": "evolutoin"}}}, "search 'evolutoin' is unknown: did you mean 'evolution'"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        prunekit.prune(**{**asked, **changes}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_method_can_be_given_the_search(asked: dict[str, Any], tmp_path: Path) -> None:
    parts = {"search": {**SEARCH, "attention": "kv_group", "dropped": 1, "mask_rate": 0.2}, "budget": {"shape": "free"}}
    prunekit.prune(**{**asked, "method": "wanda-sp+evolution", "parts": parts}, out=tmp_path / "out")
    assert search_in(tmp_path / "out")["proposed"] == 10
    gradients = {**asked, "method": "llm-pruner+evolution"}
    gradients["parts"] = {"search": SEARCH, "budget": {"skip_first": 1, "skip_last": 0}}
    prunekit.prune(**gradients, out=tmp_path / "gradients")
    first = search_in(tmp_path / "gradients")["candidate"][0]
    assert first == [[2, 0], [48, 0]], "the block that is skipped stays whole"


@pytest.mark.parametrize("part", ["tune", "compensate"])
def test_a_search_that_drops_blocks_follows_no_dense_model(part: str, asked: dict[str, Any], tmp_path: Path) -> None:
    method = "search-llm+blockwise" if part == "tune" else "search-llm"
    parts = {"search": {**SEARCH, "dropped": 1}, "budget": {"shape": "free"}, part: {"target": "dense"}}
    with pytest.raises(InputError, match=rf"search\.dropped=1 lets whole blocks go, and {part}\.target=dense follows"):
        prunekit.prune(**{**asked, "method": method, "parts": parts}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_says_what_a_search_takes(asked: dict[str, Any]) -> None:
    recipe = prunekit.recipe.Recipe.build({**asked, "model": str(asked["model"])})
    made = prunekit.plan(recipe)
    few = recipe.model_copy(update={"parts": {"search": {**SEARCH, "trials": 2}}})
    assert made.seconds["forward"] > prunekit.plan(few).seconds["forward"]
    assert abs(made.ratio - 0.2) < 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_importance_is_that_of_all_matrices_of_a_unit(family: str) -> None:
    model = tiny.make_model(family)
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    draw = torch.Generator().manual_seed(0)
    block = source.anatomy.blocks[1]
    weights = {
        linear.name: linear.matrix(model.get_submodule(linear.full_name).weight.detach()) for linear in block.linears
    }
    grams = {}
    for name, weight in weights.items():
        inputs = torch.randn(200, weight.shape[1], generator=draw)
        grams[name] = inputs.t() @ inputs
    view = BlockView(weights, {name: Statistics(200, {"gram": gram}) for name, gram in grams.items()})
    score = find_part("unit-score", "obs-coupled")
    for structure in structures[1]:
        wanted = torch.zeros(structure.count, dtype=torch.float64)
        for name, weight in weights.items():
            damped = grams[name].double() + 0.01 * grams[name].double().diagonal().mean() * torch.eye(weight.shape[1])
            cost = weight.double() ** 2 / damped.inverse().diagonal()
            for part in structure.slices:
                if part.tensor == f"{name}.weight":
                    along = cost.sum(0) if name == structure.name else cost.sum(1)
                    wanted += along[part.entries].sum(1)
        assert torch.allclose(score.function(view, structure), wanted, rtol=1e-4)


def test_admm_comes_to_what_least_squares_says() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 12, generator=draw), torch.randn(300, 12, generator=draw)
    stats = Statistics(300, {"gram": inputs.t() @ inputs})
    keep = torch.tensor([0, 1, 3, 4, 7, 8, 11])
    exact, _ = find_part("compensate", "least-squares").function(weight, keep, stats, damping=0.0)
    few, _ = find_part("compensate", "admm").function(weight, keep, stats, rho=1.0, steps=30)
    many, bias = find_part("compensate", "admm").function(weight, keep, stats, rho=1.0, steps=400)
    assert bias is None
    assert float((many - exact).norm() / exact.norm()) < 1e-5
    assert float((few - exact).norm()) < 0.2 * float((weight[:, keep] - exact).norm())


def test_a_streamed_search_frees_what_it_read(asked: dict[str, Any]) -> None:
    from prunekit.checkpoint.reader import Reader

    source = StreamedModel(Reader(asked["model"]), torch.float32, torch.device("cpu"))
    structures = find_structures(source.module, source.anatomy)
    searching.plan_losses(source, structures, [Plan.whole(structures)], draw_windows(2, 16))
    assert not source.stored
