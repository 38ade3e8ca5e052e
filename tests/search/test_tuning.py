"""`tune`: trials are what `prune` and `eval` say, searches go on, and what is wrong is refused with nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from helpers import contents
from limits import small_files
from prunekit import tuning
from prunekit.calibration.document import Document
from prunekit.calibration.windows import calibration_windows
from prunekit.errors import HistoryError, InputError, StorageError
from prunekit.progress import Silent
from prunekit.recipe import Recipe
from prunekit.search.recipes import SPACES, RecipeSpace, values_of
from prunekit.search.texts import sharing
from prunekit.tuning import Bench, Tuning
from searches import calls_of, killed_after
from test_cli import call

SECONDS = 120  # after which a process that hangs is given up

SPACE = {
    "method": ["wanda", "ria", "sparsegpt"],
    "parts.score.alpha": {"low": 0.1, "high": 1.0, "when": {"method": ["ria"]}},
    "parts.refine.name": {"of": ["none", "dsnot"], "when": {"method": ["wanda", "ria"]}},
    "parts.pattern.group": {"of": ["none", "layer"], "when": {"method": ["wanda"]}},
}


@pytest.fixture
def asked(tmp_path: Path, text_file: Path) -> dict[str, Any]:
    tiny.save_model(tmp_path / "model")
    return {
        "model": tmp_path / "model",
        "target_sparsity": 0.6,
        "trials": 10,
        "space": SPACE,
        "calibration": {"source": str(text_file), "samples": 3, "length": 32},
        "dtype": "float32",
        "text_samples": 3,
        "test": str(text_file),
        "test_samples": 3,
    }


def figures(found: tuning.Tuned) -> list[tuple[Any, ...]]:
    """What must not differ between two equal searches."""
    return [(trial.point, trial.preset, trial.loss, trial.test, trial.sparsity) for trial in found.trials]


@pytest.mark.parametrize("method", ["ria+least-squares+blockwise", "owl"])
def test_a_trial_is_what_prune_and_eval_say(tmp_path: Path, text_file: Path, method: str) -> None:
    tiny.save_model(tmp_path / "model")
    base = {
        "model": str(tmp_path / "model"),
        "sparsity": 0.6,
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "dtype": "float32",
    }
    bench = Bench.of(Tuning(base, SPACE, 1, (), "", 3, str(text_file), 2), Silent())
    loss, test, seconds, sparsity = bench.try_recipe(Recipe.build({**base, "method": method}))
    result = prunekit.prune(**base, method=method, out=tmp_path / "out")  # type: ignore[arg-type]
    assert sparsity == result.sparsity
    assert seconds > 0
    model = prunekit.load(tmp_path / "out", dtype="float32")
    for windows, found in ((bench.judged, loss), (bench.test, test)):
        with torch.inference_mode():
            logits = model(windows.ids).logits[:, :-1].double()
        wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows.ids[:, 1:])
        assert found == pytest.approx(float(wanted), rel=1e-5)


def test_the_three_texts_share_no_passage(tmp_path: Path, asked: dict[str, Any], text_file: Path) -> None:
    base = {"model": str(asked["model"]), "calibration": asked["calibration"], "dtype": "float32"}
    bench = Bench.of(Tuning(base, SPACE, 1, (), "", 4, str(text_file), 4), Silent())
    three = [bench.calibration, bench.judged, bench.test]
    for windows in three:
        assert not [other for other in three if other is not windows and sharing(windows, [other])]
    same = calibration_windows(
        [Document("text", tiny.make_text)], tiny.make_tokenizer(), samples=3, length=32, seed=0, sampling="random"
    )
    assert torch.equal(bench.calibration.ids, same.ids), "the calibration is that of prune"


def test_what_is_found_is_the_best_and_can_be_run(asked: dict[str, Any], tmp_path: Path) -> None:
    found = prunekit.tune(**asked, out=tmp_path / "out")
    good = [trial for trial in found.trials if trial.refused is None]
    assert len(found.trials) == 10
    assert found.best.loss == min(trial.loss for trial in good)
    assert [trial.preset for trial in found.trials[:4]] == ["wanda", "ria", "sparsegpt", None]
    assert [trial.recipe.get("parts", {}) for trial in found.presets] == [{}, {}, {}], "methods as they are"
    assert found.best.loss <= min(trial.loss for trial in found.presets)
    for one in good:
        beaten = any(other.loss < one.loss and other.seconds < one.seconds for other in good)
        assert (one in found.front) <= (not beaten)
    assert found.best in found.front
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"tune.json", "study.log", "recipe.toml", "trials.jsonl", "tune.md", "history.svg", "front.svg"}
    recipe = Recipe.build(Recipe.read(tmp_path / "out" / "recipe.toml"))
    assert recipe.model_dump() == Recipe.build(found.best.recipe).model_dump()
    done = call("prune", "--recipe", tmp_path / "out" / "recipe.toml", "--out", tmp_path / "best", "--json")
    assert done.code == 0
    assert done.json["sparsity"] == found.best.sparsity
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [trial.number for trial in found.trials]
    page = (tmp_path / "out" / "tune.md").read_text()
    assert "| **best** |" in page
    assert "## What mattered" in page


@pytest.mark.parametrize("dies_after", [1, 5])
def test_a_killed_search_goes_on_to_the_same_trials(asked: dict[str, Any], tmp_path: Path, dies_after: int) -> None:
    whole = prunekit.tune(**asked, out=tmp_path / "whole")
    with killed_after(dies_after, Bench, "try_recipe"):
        prunekit.tune(**asked, out=tmp_path / "killed")
    with calls_of(Bench, "try_recipe") as tried:
        found = prunekit.tune(**asked, out=tmp_path / "killed")
        assert figures(found) == figures(whole)
        assert len(tried) == 10 - dies_after
        more = prunekit.tune(**{**asked, "trials": 11}, out=tmp_path / "killed")
    assert figures(more)[:10] == figures(whole)
    assert len(tried) == 11 - dies_after


def test_the_command_line_says_what_python_says(asked: dict[str, Any], tmp_path: Path) -> None:
    source = asked["calibration"]["source"]
    texts = [
        "--calibration",
        source,
        "--samples",
        3,
        "--length",
        32,
        "--test",
        source,
        "--text-samples",
        3,
        "--test-samples",
        3,
    ]
    words = [
        "tune",
        asked["model"],
        "--target-sparsity",
        0.6,
        "--trials",
        3,
        "--space",
        "scores",
        "--presets",
        "wanda,ria",
    ]
    words += [*texts, "--dtype", "float32", "--out", tmp_path / "out"]
    done = call(*words, "--json")
    assert done.code == 0
    assert (done.json["trials"], done.json["target"]) == (3, "0.6")
    assert [trial["preset"] for trial in done.json["presets"]] == ["wanda", "ria"]
    assert done.json["recipe"] == str(tmp_path / "out" / "recipe.toml")
    told = call(*words)
    assert told.code == 0
    assert "trials      3, 0 refused" in told.out
    front = [line.split()[1] for line in told.out.splitlines() if line.startswith("front ")]
    assert front == [f"{trial['perplexity']:.4f}" for trial in done.json["front"]]
    assert "importance  too few trials" in told.out
    assert call(*words, "--pattern", "2:4").code == 2
    assert "space 'fll' is unknown" in call(*words, "--space", "fll").err


def test_a_killed_process_takes_its_helpers_along_and_another_goes_on(asked: dict[str, Any], tmp_path: Path) -> None:
    out, script = tmp_path / "out", tmp_path / "main.py"
    script.write_text(
        "import json, sys, prunekit\n\nif __name__ == '__main__':\n    prunekit.tune(**json.loads(sys.argv[1]), workers=2)\n"
    )

    def begun() -> set[int]:
        """Process ids of those who have begun a trial."""
        log = out / "study.log"
        lines = log.read_text().splitlines()[:-1] if log.exists() else []
        noted = (json.loads(line).get("user_attr", {}).get("worker", "") for line in lines)
        return {int(who.split()[1]) for who in noted if who}

    def wait_until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end
            time.sleep(0.05)

    endless = {**asked, "model": str(asked["model"]), "trials": 100_000, "out": str(out)}
    with subprocess.Popen([sys.executable, script, json.dumps(endless)]) as main:
        try:
            wait_until(lambda: len(begun()) == 2)
        finally:
            main.kill()
    (helper,) = begun() - {main.pid}
    command = Path(f"/proc/{helper}/cmdline")  # of a process that is gone and nobody asked about, it is empty
    wait_until(lambda: not (command.exists() and command.read_bytes()))
    found = prunekit.tune(**{**asked, "trials": 4}, out=out)
    assert [trial.preset for trial in found.presets] == ["wanda", "ria", "sparsegpt"]


def test_several_processes_share_a_search(asked: dict[str, Any], tmp_path: Path) -> None:
    found = prunekit.tune(**{**asked, "trials": 6}, out=tmp_path / "out", workers=2)
    assert len(found.trials) == 6
    assert sorted(trial.preset for trial in found.presets if trial.preset) == ["ria", "sparsegpt", "wanda"]
    assert found.best.loss == min(trial.loss for trial in found.trials)


def test_recipes_that_do_not_go_together_cost_nothing_and_are_told(asked: dict[str, Any], tmp_path: Path) -> None:
    space = {"method": ["sparsegpt"], "parts.refine.name": ["none", "dsnot"]}
    with calls_of(Bench, "try_recipe") as tried:
        found = prunekit.tune(**{**asked, "space": space, "trials": 6}, out=tmp_path / "out")
    refused = [trial for trial in found.trials if trial.refused is not None]
    assert refused
    assert len(tried) == 6 - len(refused)
    assert "makes its own while it solves" in str(refused[0].refused)
    assert "were refused" in (tmp_path / "out" / "tune.md").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": "fll"}, "space 'fll' is unknown: did you mean 'full'"),
        ({"space": {"method": "wanda"}}, "'method' of the space is 'wanda': give a list of values"),
        ({"space": {"ratio": [0.1]}}, "'ratio' of the space is not a name that can be searched"),
        ({"space": {"parts.score.p": {"low": 3, "high": 1}}}, "lies between 3 and 1"),
        ({"space": {"method": {"of": ["wanda"], "when": {"seed": [1]}}}}, "depends on 'seed', which is not in front"),
        ({"space": {"method": ["wnda"]}}, "method 'wnda' is unknown"),
        ({"presets": ["auto"]}, "preset 'auto' is no method of the space, which has wanda, ria, sparsegpt"),
        ({"trials": 0}, "0 trials in 1 processes are no search"),
        ({"workers": 0}, "10 trials in 0 processes are no search"),
        ({"space": {"method": [["wanda"]]}}, r"has \[\['wanda'\]\] for values: give a list of words"),
        ({"space": {"parts.score.p": {"low": 1, "high": 2, "when": {"method": "ria"}}}}, "`when` of 'parts.score.p'"),
        ({"space": {"parts.score.p": {"low": 1, "high": float("inf")}}}, "lies between 1 and inf"),
        ({"space": {"parts.score.p": {"low": 0, "high": 1, "log": True}}}, "cannot have log = True"),
        ({"space": {"parts.score.p": {"low": 0, "high": 1}}, "presets": []}, "the space names no methods"),
        ({"space": "text.txt"}, "space 'text.txt' is unknown"),
        ({"text_samples": 0}, "0 --text-samples and 3 --test-samples judge nothing"),
        ({"test_samples": -1}, "3 --text-samples and -1 --test-samples judge nothing"),
        ({"text_samples": 10_000}, "what recipes are chosen by takes 10000 windows"),
        ({"test_samples": 10_000}, "what the best is tested on takes 10000 windows"),
        ({"target_sparsity": 1.5}, "sparsity 1.5 is outside"),
        ({"cpus_per_run": 2}, "give --ray ADDRESS too"),
        ({"ray": "nowhere"}, "Ray address 'nowhere' is none"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_and_writes_nothing(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        prunekit.tune(**{**asked, **changes}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_searches_and_damaged_ones_are_refused_and_left_alone(asked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prunekit.tune(**{**asked, "trials": 2}, out=out)

    before = contents(out)
    with pytest.raises(HistoryError, match=r"base\.sparsity is 0\.6 there and 0\.5 here"):
        prunekit.tune(**{**asked, "target_sparsity": 0.5}, out=out)
    assert contents(out) == before
    with pytest.raises(HistoryError, match=r"base\.seed is null there and 1 here"):
        prunekit.tune(**asked, seed=1, out=out)
    assert contents(out) == before
    tiny.save_model(asked["model"], seed=1)
    with pytest.raises(HistoryError, match=r"inputs\.model\.safetensors is"):
        prunekit.tune(**asked, out=out)
    assert contents(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other things"):
        prunekit.tune(**asked, out=tmp_path / "other")


def test_a_damaged_journal_is_refused_and_left_alone_wherever_it_is_damaged(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    two = {**asked, "trials": 2}
    whole = prunekit.tune(**two, out=out)
    log = out / "study.log"
    lines = log.read_bytes().splitlines(keepends=True)
    loss = next(place for place, line in enumerate(lines) if b'"user_attr":{"loss"' in line)
    point = next(place for place, line in enumerate(lines) if b'"user_attr":{"point"' in line)
    middle = len(lines) // 2
    damages = {
        "is not as it was": (*lines[:middle], b"\x00\xff\n", *lines[middle + 1 :]),
        "is cut": (*lines[:middle], lines[middle][:9] + b"\n", *lines[middle + 1 :]),
        "is cut, and the end as well": (
            *lines[:middle],
            lines[middle][:9] + b"\n",
            *lines[middle + 1 : -1],
            lines[-1][:-5],
        ),
        "is another's": (b'{"a":1}\n', *lines),
        "begins later": lines[1:],
        "lacks a loss": (*lines[:loss], *lines[loss + 1 :]),
        "lacks a point": (*lines[:point], *lines[point + 1 :]),
    }
    for what, damaged in damages.items():
        log.write_bytes(b"".join(damaged))
        before = contents(out)
        with pytest.raises(HistoryError, match="left as it"):
            prunekit.tune(**two, out=out)
        assert contents(out) == before, what
    for end in (lines[-1][:-5], b"", lines[-1]):  # only what a kill leaves is mended
        log.write_bytes(b"".join([*lines[:-1], end]))
        assert figures(prunekit.tune(**two, out=out)) == figures(whole)
    for begun in (0, 1, 2):  # killed before anything was tried
        log.write_bytes(b"".join(lines[:begun]))
        assert figures(prunekit.tune(**two, out=out)) == figures(whole)


def test_a_full_disk_ends_a_search_that_goes_on_when_there_is_room(asked: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = {**asked, "trials": 2, "presets": ["wanda"]}
    whole = prunekit.tune(**few, out=tmp_path / "whole")
    size = (tmp_path / "whole" / "study.log").stat().st_size
    for part in (size // 3, 2 * size // 3):
        with small_files(part), pytest.raises(StorageError, match=r"cannot write '.*study\.log': File too large"):
            prunekit.tune(**few, out=out)
        assert (out / "study.log").read_bytes().endswith(b"\n"), "no half of a line for others to write behind"
    assert figures(prunekit.tune(**few, out=out)) == figures(whole)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_method_of_a_space_stands_in_it_as_it_is_in_the_catalogue(name: str) -> None:
    space = RecipeSpace.of(name)
    assert space.methods
    for method in space.methods:
        settled = space.settled(method)
        assert values_of(settled, {"model": "m", "parts": {}}) == {"model": "m", "method": method, "parts": {}}


def test_a_space_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        '[space]\nmethod = ["wanda", "ria"]\n"parts.score.alpha" = { low = 0.1, high = 1, when = { method = ["ria"] } }\n'
    )
    space = RecipeSpace.of(str(path))
    assert space.methods == ["wanda", "ria"]
    assert space.genes[1].when == {"method": ["ria"]}
    (tmp_path / "none.toml").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"has no section \[space\]"):
        RecipeSpace.of(str(tmp_path / "none.toml"))


def test_a_recipe_is_written_as_it_is_read() -> None:
    values = {
        "model": 'a "model"',
        "method": "owl",
        "sparsity": 0.6,
        "calibration": {"source": "tëxt.txt", "samples": 3},
        "parts": {
            "budget": {"spread": 1e-5, "ignore": ["a.*", "b"], "overrides": {"*.down_proj": 0.5}},
            "pattern": {"permute": True},
        },
    }
    recipe = Recipe.build(values)
    assert Recipe.build(prunekit.recipe.tomllib.loads(recipe.to_toml())) == recipe
