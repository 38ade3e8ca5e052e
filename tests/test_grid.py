"""A grid file becomes recipes: which, in what order, under what names, and what is refused before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prunekit import InputError, Recipe
from prunekit.grid import Combination, EvaluationOptions, Grid
from prunekit.recipe import Pattern
from test_cli import call

BASE = {"model": "M", "method": "wanda"}


def made(axes: dict[str, Any], **base: Any) -> list[Combination]:
    return Grid.build({**BASE, **base, "grid": axes}).combinations()


def test_the_product_is_taken_in_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'model = "M"\nseed = 5\n[calibration]\nsamples = 7\n'
        '[grid]\nmethod = ["wanda", "magnitude"]\npattern = [0.5, "2:4"]\n"calibration.length" = [16, 32]\n'
    )
    calibration = {"samples": 7}
    expected = [
        Recipe.build({"model": "M", "seed": 5, "method": m, **p, "calibration": {**calibration, "length": n}})
        for m, p, n in [
            ("wanda", {"sparsity": 0.5}, 16),
            ("wanda", {"sparsity": 0.5}, 32),
            ("wanda", {"pattern": "2:4"}, 16),
            ("wanda", {"pattern": "2:4"}, 32),
            ("magnitude", {"sparsity": 0.5}, 16),
            ("magnitude", {"sparsity": 0.5}, 32),
            ("magnitude", {"pattern": "2:4"}, 16),
            ("magnitude", {"pattern": "2:4"}, 32),
        ]
    ]
    found = Grid.read(path).combinations()
    assert [combination.recipe for combination in found] == expected
    assert list(found[3].axes.items()) == [("method", "wanda"), ("pattern", "2:4"), ("calibration.length", 32)]


FILES = {
    "grid.toml": 'model = "M"\n[grid]\ncalibration.samples = [8, 16]\n"parts.budget.overrides.*.o_proj" = [0.1, "2:4"]\n'
    "[evaluate]\nsamples = 3\n",
    "grid.yaml": "model: M\ngrid:\n  calibration.samples: [8, 16]\n  parts:\n    budget:\n      overrides:\n"
    "        '*.o_proj': [0.1, 2:4]\nevaluate: {samples: 3}\n",
    "grid.json": '{"model": "M", "grid": {"calibration.samples": [8, 16], "parts.budget.overrides.*.o_proj": [0.1, "2:4"]}, '
    '"evaluate": {"samples": 3}}',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same_and_names_may_be_nested(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    grid = Grid.read(tmp_path / name)
    assert grid.axes == {"calibration.samples": [8, 16], "parts.budget.overrides.*.o_proj": [0.1, "2:4"]}
    assert grid.evaluate == EvaluationOptions(text="builtin:eval", length=None, samples=3, dtype="auto")
    recipes = [combination.recipe for combination in grid.combinations()]
    assert [recipe.calibration.samples for recipe in recipes] == [8, 8, 16, 16]
    overrides = [recipe.parts["budget"]["overrides"] for recipe in recipes]
    assert overrides == [{"*.o_proj": 0.1}, {"*.o_proj": "2:4"}] * 2


def test_an_axis_takes_the_place_of_the_base() -> None:
    found = made({"pattern": [0, 0.25, "2:4"], "calibration.samples": [3]}, sparsity=0.9, calibration={"samples": 50})
    assert [str(c.recipe.target) for c in found] == ["0", "0.25", "2:4"]
    assert {c.recipe.calibration.samples for c in found} == {3}
    (other,) = made({"sparsity": [0.25]}, pattern="2:4")
    assert (other.recipe.sparsity, other.recipe.pattern) == (0.25, None)


def test_one_target_is_one_recipe_however_it_is_said() -> None:
    said = [{}, {"sparsity": 0.5}, {"pattern": 0.5}, {"pattern": "0.50"}]
    (first,), *others = [made({"seed": [1]}, **target) for target in said]
    assert all(other == [first] for other in others)
    assert (first.recipe.sparsity, first.recipe.pattern) == (0.5, None)
    for text in ("0.29", "1/3", "2:4", "0", "1e-05", "0.6666666"):
        (found,) = made({"pattern": [text]})
        assert found.recipe.target == Pattern.parse(text)


def test_combinations_do_not_share_what_can_be_changed() -> None:
    one, two = made({"seed": [0, 1]}, parts={"budget": {"overrides": {"a": 0.1}}})
    one.recipe.parts["budget"]["overrides"]["a"] = 0.9
    assert two.recipe.parts["budget"]["overrides"] == {"a": 0.1}


# Names


def test_names_say_what_a_run_is() -> None:
    assert [
        c.name for c in made({"method": ["wanda", "magnitude"], "pattern": [0.5, "2:4"]}, model="org/Tiny-1.5B")
    ] == [
        "Tiny-1.5B_wanda_0.5_seed0",
        "Tiny-1.5B_wanda_2-4_seed0",
        "Tiny-1.5B_magnitude_0.5_seed0",
        "Tiny-1.5B_magnitude_2-4_seed0",
    ]
    axes = {
        "seed": [3],
        "calibration.samples": [64],
        "calibration.source": ["data/my text.txt", "c4"],
        "dtype": ["auto"],
    }
    assert [c.name for c in made(axes, model="smollm2-135m", sparsity=0.3)] == [
        "smollm2-135m_wanda_0.3_samples64_source-my-text.txt_dtype-auto_seed3",
        "smollm2-135m_wanda_0.3_samples64_source-c4_dtype-auto_seed3",
    ]


def test_a_name_does_not_change_when_the_grid_grows() -> None:
    small = made({"pattern": [0.5]})
    large = made({"model": ["N", "M"], "method": ["magnitude", "wanda"], "pattern": [0.3, 0.5], "seed": [0, 1]})
    assert len(large) == 16
    assert small[0].name in {c.name for c in large}


def test_names_are_unique_also_where_case_is_not_told_apart() -> None:
    names = [c.name for c in made({"model": ["one/model", "two/model", "three/Model", "other"]})]
    assert names[3] == "other_wanda_0.5_seed0"
    assert all(re.fullmatch(r"[mM]odel_wanda_0\.5_seed0_[0-9a-f]{8}", name) for name in names[:3])
    assert len({name.lower() for name in names}) == 4
    third = [c.name for c in made({"pattern": ["1/3", "1:3"]})]
    assert len(set(third)) == 2


@pytest.mark.parametrize(
    "model", ["..", "/", "a/..", "x" * 300, "a\nb", 'mödel:*?"<>|\\', "./.hidden/", "../up", "con/trailing./"]
)
def test_names_are_safe_on_any_file_system(model: str) -> None:
    (found,) = made({"model": [model], "parts.budget.overrides": [{"*.o_proj": 0.5, "x/y": "2:4"}]})
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*[A-Za-z0-9]", found.name), found.name
    assert len(found.name) < 120


def test_the_embedded_hash_tells_long_names_apart() -> None:
    one, two = made({"model": ["x" * 300 + "a", "x" * 300 + "b"]})
    assert one.name != two.name


# Cases


def test_a_case_sets_several_names_at_once_and_is_known_by_its_label() -> None:
    variants = [
        {"label": "plain"},
        {"label": "α = 1, per row", "method": "ria", "parts": {"score": {"alpha": 1.0}, "pattern": {"group": "row"}}},
        {"label": "half kept", "pattern": "2:4", "parts.budget.overrides.*.o_proj": 0.1},
    ]
    found = made({"variant": variants, "seed": [1, 2]}, sparsity=0.3)
    assert [list(c.axes.items()) for c in found[:3]] == [
        [("variant", "plain"), ("seed", 1)],
        [("variant", "plain"), ("seed", 2)],
        [("variant", "α = 1, per row"), ("seed", 1)],
    ]
    expected: list[dict[str, Any]] = [
        {"sparsity": 0.3},
        {"sparsity": 0.3, "method": "ria", "parts": {"score": {"alpha": 1.0}, "pattern": {"group": "row"}}},
        {"pattern": "2:4", "parts": {"budget": {"overrides": {"*.o_proj": 0.1}}}},
    ]
    assert [c.recipe for c in found[::2]] == [Recipe.build({**BASE, "seed": 1, **values}) for values in expected]
    assert len({c.name for c in found}) == 6


def test_cases_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(
        'model = "M"\n[[grid.variant]]\nlabel = "a"\nmethod = "ria"\nparts.score.alpha = 0.7\n'
        '[[grid.variant]]\nlabel = "b"\nmethod = "wanda"\n'
    )
    one, two = Grid.read(tmp_path / "g.toml").combinations()
    assert (one.recipe.parts, one.axes, two.recipe.method) == ({"score": {"alpha": 0.7}}, {"variant": "a"}, "wanda")


def test_a_case_is_named_after_what_it_sets_and_not_after_its_label() -> None:
    def names(*labels: str) -> list[str]:
        return [c.name for c in made({"v": [{"label": label, "seed": at} for at, label in enumerate(labels)]})]

    assert names("a", "b") == names("ä | ?", "something else")
    assert names("a", "b")[1] == names("a", "b", "c")[1]


def test_a_label_may_stand_for_a_value_of_a_name() -> None:
    (one, two) = made({"calibration.source": ["builtin", {"label": "c4", "calibration.source": "/a/long/path.jsonl"}]})
    assert (one.axes["calibration.source"], two.axes["calibration.source"]) == ("builtin", "c4")
    assert two.recipe.calibration.source == "/a/long/path.jsonl"


# Refused


BAD = {
    'model = "M"\n': "no axes",
    'model = "M"\ngrid = 5\n': "no axes",
    'model = "M"\n[grid]\n': "no axes",
    'model = "M"\n[grid.calibration]\n': "no axes",
    'model = "M"\n[grid]\nmetod = ["wanda"]\n': "'metod' is not a name of a recipe: did you mean 'method'?",
    'model = "M"\n[grid]\ncalibration.sample = [1]\n': "did you mean 'calibration.samples'?",
    'model = "M"\n[grid]\ncalibration = ["c4"]\n': "'calibration' is not a name of a recipe",
    'model = "M"\n[grid]\nparts.score = [1]\n': "parts.PART.OPTION",
    'model = "M"\n[grid]\n"score.alpha" = [1]\n': "'score.alpha' is not a name of a recipe",
    'model = "M"\n[grid]\nmethod = "wanda"\n': "write ['wanda']",
    'model = "M"\n[grid]\nseed = []\n': "axis 'seed' is an empty list",
    'model = "M"\n[grid]\nsparsity = [0.5]\npattern = ["2:4"]\n': "exclude each other",
    "[grid]\nseed = [1]\n": "names no model",
    'model = "M"\n[grid]\nmethod = ["wanda", "wonda"]\nseed = [1]\n': "combination (method=wonda, seed=1): method 'wonda' is unknown",
    'model = "M"\n[grid]\nseed = [0, -1]\n': "combination (seed=-1): seed cannot be -1",
    'model = "M"\n[grid]\npattern = [0.5, "4:2"]\n': "combination (pattern=4:2): pattern '4:2'",
    'model = "M"\n[grid]\nmodel = [1]\n': "combination (model=1): model cannot be 1",
    'model = "M"\nratio = 0.1\n[grid]\nseed = [1]\n': "combination (seed=1): ratio 0.1",
    'model = "M"\nsampels = 1\n[grid]\nseed = [1]\n': "'sampels' is not a name a recipe has",
    'model = "M"\ncalibration = 5\n[grid]\ncalibration.samples = [1]\n': "'calibration' is 5 in the grid file",
    'model = "M"\n[grid]\nparts.score.power = [2]\n': "combination (parts.score.power=2): 'score.power'",
    'model = "M"\n[grid]\nparts.refine.steps = [2]\n': "'refine.steps' is an option of a refine",
    'model = "M"\n[grid]\nparts.pattern.group = ["column"]\n': "combination (parts.pattern.group=column)",
    'model = "M"\n[grid]\nseed = [1, 2, 1]\n': "combinations (seed=1) and (seed=1) are the same recipe",
    'model = "M"\n[grid]\npattern = [0.5, "0.50"]\n': "combinations (pattern=0.5) and (pattern=0.50) are the same recipe",
    'model = "M"\n[[grid.v]]\nlabel = "a"\nsampels = 1\n': "'sampels' of case 'a' is not a name of a recipe",
    'model = "M"\n[[grid.v]]\nmethod = "ria"\n': "axis 'v' is not a name of a recipe",
    'model = "M"\n[[grid.v]]\nlabel = ""\n': "a label is text",
    'model = "M"\n[[grid.v]]\nlabel = "a"\n[[grid.v]]\nlabel = "a"\nseed = 1\n': "more than one case labelled 'a'",
    'model = "M"\n[[grid.v]]\nlabel = "a"\n[[grid.v]]\nlabel = "b"\n': "combinations (v=a) and (v=b) are the same recipe",
    'model = "M"\n[[grid.status]]\nlabel = "a"\n': "has the name of a column of every table",
    'model = "M"\n[grid]\nseed = [1]\n[evaluate]\ntxt = "c4"\n': "'evaluate.txt' is not a name a grid has",
    'model = "M"\n[grid]\nseed = [1]\n[evaluate]\nsamples = 0\n': "evaluate.samples cannot be 0",
    'model = "M"\nevaluate = "c4"\n[grid]\nseed = [1]\n': "evaluate cannot be",
    'model = \n[grid]\nseed = [1]\n': "not valid toml",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_a_wrong_grid_is_refused_in_one_sentence_before_anything_runs(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.pruning.run", lambda *_, **__: pytest.fail("something ran"))
    (tmp_path / "grid.toml").write_text(content)
    done = call("sweep", tmp_path / "grid.toml", "--out", tmp_path / "out", "--json")
    assert (done.code, done.out) == (2, "")
    assert BAD[content] in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_file_is_no_grid(tmp_path: Path) -> None:
    done = call("sweep", tmp_path / "none.toml", "--out", tmp_path / "out")
    assert done.code == 2
    assert "none.toml" in done.err


def test_a_grid_in_python_is_the_same_as_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    values = {"model": "M", "grid": {"seed": [1, 2]}, "evaluate": {"text": "c4"}}
    path.write_text(json.dumps(values))
    assert Grid.read(path) == Grid.build(values)
    with pytest.raises(InputError, match="no axes"):
        Grid.build({"model": "M"})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "studies").glob("*.toml")), ids=lambda path: path.name
)
def test_the_studies_are_grids(path: Path) -> None:
    found = Grid.read(path).combinations()
    assert len({combination.name for combination in found}) == len(found) > 1
