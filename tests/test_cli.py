"""The command line is a contract: these options, these keys, these exit codes. Scripts depend on them.

`call` runs a command in this process, through the same `main` as the installed script; a process of its own costs seconds.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import prunekit
import tiny
from helpers import ctrl_c
from prunekit import cli
from prunekit.benching import Memory
from prunekit.catalogue import METHODS
from prunekit.checkpoint.writer import Writer
from prunekit.jobs import job_of
from prunekit.model.source import StreamedModel


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line on stdout."""
        return json.loads(self.out.splitlines()[-1])


def call(*words: object) -> Done:
    """Run `prunekit words...` in this process."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["prunekit", *map(str, words)])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture
def few(text_file: Path) -> list[str]:
    """Options of a run that takes no time."""
    return ["--calibration", str(text_file), "--samples", "3", "--length", "32", "--dtype", "float32"]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[prunekit.Recipe]:
    """The recipes that `prune` would run; nothing is run."""
    found: list[prunekit.Recipe] = []

    class Stop(prunekit.PrunekitError):
        exit_code = 77

    def note(recipe: prunekit.Recipe, *_: Any, **__: Any) -> None:
        found.append(recipe)
        raise Stop("not run")

    monkeypatch.setattr("prunekit.pruning.run", note)
    return found


def recipe_of(recorded: list[prunekit.Recipe], *words: object) -> prunekit.Recipe:
    done = call("prune", "MODEL", "--out", "OUT", *words)
    assert done.code == 77, done.err
    return recorded[-1]


# Every option


def test_prune_takes_every_option(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "magnitude"\n')
    out = tmp_path / "out"
    words = ["prune", llama_folder, "--method", "wanda", "--sparsity", "0.5", "--set", "calibration.sampling=first"]
    words += ["--set", "budget.ignore=*.o_proj", "--calibration", text_file, "--samples", "3", "--length", "32"]
    words += ["--seed", "7", "--dtype", "float32", "--device", "cpu", "--recipe", recipe, "--memory-budget", "1GB"]
    words += ["--revision", "main", "--out", out, "--json"]
    for extra in ([], ["--resume"], ["--overwrite"]):
        done = call(*words, *extra)
        assert done.code == 0, done.err
    assert done.json["method"] == "wanda"
    assert call("prune", llama_folder, "--pattern", "2:4", "--out", out, "--device", "auto", "--trust-remote-code").code


def test_plan_takes_the_options_of_prune_and_writes_nothing(tmp_path: Path, llama_folder: Path, few: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: magnitude\n")
    words = ["plan", llama_folder, "--method", "wanda", "--pattern", "2:4", "--set", "calibration.mode=dense", *few]
    words += ["--seed", "7", "--device", "auto", "--recipe", recipe, "--out", tmp_path / "out", "--json"]
    done = call(*words)
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    assert done.json["method"] == "wanda"
    assert done.json["windows"] == 3
    assert done.json["memory"]["peak"] >= done.json["hidden_states"] > 0
    stored = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(llama_folder / "model.safetensors").values()
    )
    assert done.json["disk"]["weights"] == stored


def test_plan_refuses_what_prune_refuses(llama_folder: Path) -> None:
    assert call("plan", llama_folder, "--pattern", "3:5").code == 2
    assert call("plan", llama_folder, "--ratio", "0.2").code == 2
    assert call("plan", llama_folder, "--length", "4096").code == 2


def test_eval_takes_every_option(llama_folder: Path, text_file: Path) -> None:
    done = call("eval", llama_folder, "--text", text_file, "--length", "32", "--samples", "4", "--dtype", "float32",
                "--device", "cpu", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json.keys() >= {"perplexity", "tokens", "tokens_per_second", "tasks"}
    assert done.json["tokens"] == 4 * 32
    assert done.json["perplexity"] > 1
    assert done.json["tokens_per_second"] > 0
    assert done.json["tasks"] == {}


def test_eval_without_a_text_takes_the_held_out_builtin_part(llama_folder: Path) -> None:
    words = ["eval", llama_folder, "--length", "32", "--samples", "2", "--dtype", "float32", "--json"]
    default = call(*words).json["perplexity"]
    assert default == call(*words, "--text", "builtin:eval").json["perplexity"]
    assert default != call(*words, "--text", "builtin").json["perplexity"]


# Output


def test_prune_json_has_the_contracts_keys(tmp_path: Path, llama_folder: Path, few: list[str]) -> None:
    done = call("prune", llama_folder, "--out", tmp_path / "out", *few, "--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1  # everything else goes to stderr
    found = done.json
    assert found.keys() >= {
        *("out", "method", "sparsity", "parameters", "blocks", "windows", "tokens", "seconds", "peak_rss_bytes")
    }
    assert found["out"] == str(tmp_path / "out")
    assert (found["method"], found["sparsity"], found["blocks"]) == ("wanda", 0.5, 3)
    assert (found["windows"], found["tokens"]) == (3, 96)
    parameters = sum(tensor.numel() for tensor in load_file(llama_folder / "model.safetensors").values())
    assert found["parameters"] == {"before": parameters, "after": parameters}
    assert found["seconds"].keys() >= {"total", "forward", "prune", "write"}
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert found["peak_rss_bytes"] > 10_000_000
    assert "wanda 3/3" in done.err


def test_without_json_a_person_is_told_the_same(tmp_path: Path, llama_folder: Path, few: list[str]) -> None:
    done = call("prune", llama_folder, "--out", tmp_path / "out", *few)
    assert done.code == 0, done.err
    for words in (
        str(tmp_path / "out"),
        "sparsity",
        "0.5000",
        "11,520 zeros of 23,040 weights",
        "3 windows, 96 tokens",
    ):
        assert words in done.out


def test_failing_leaves_stdout_empty(tmp_path: Path, few: list[str]) -> None:
    done = call("prune", tmp_path / "nowhere", "--out", tmp_path / "out", *few, "--json")
    assert (done.code, done.out) == (2, "")


def test_our_own_failures_exit_with_1_and_one_sentence(
    tmp_path: Path, llama_folder: Path, few: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise prunekit.StorageError("cannot write: No space left on device")

    monkeypatch.setattr(Writer, "write_index", refuse)
    done = call("prune", llama_folder, "--out", tmp_path / "out", *few)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "prunekit: cannot write: No space left on device"
    assert "--resume" in done.err


def test_an_interrupt_exits_with_130(
    tmp_path: Path, llama_folder: Path, few: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "write_index", ctrl_c)
    done = call("prune", llama_folder, "--out", tmp_path / "out", *few)
    assert done.code == 130
    assert "--resume" in done.err


def test_version() -> None:
    done = call("--version")
    assert (done.code, done.out) == (0, f"{prunekit.__version__}\n")


@pytest.mark.parametrize("verb", ["compare", "eval", "sweep", "tune"])
def test_what_does_not_share_its_work_is_refused_under_torchrun(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {"compare": ["M", "--methods", "wanda", "--out", "o"], "eval": ["M"], "sweep": ["f.toml", "--out", "o"]}
    done = call(verb, *words.get(verb, ["M", "--out", "o"]))
    assert done.code == 2
    assert done.err == (
        f"prunekit: '{verb}' does not share its work, and 2 processes would each do all of it: "
        "start it without torchrun, which is for prune\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert (call("eval", "M").code, call("eval", "M").err) == (2, ""), "one of them says it"


def test_unknown_words_exit_with_2() -> None:
    for words in (["prune"], ["prune", "--nonsense"], ["nonsense"], ["eval"], ["prune", "M", "--sparsity", "half"]):
        done = call(*words)
        assert done.code == 2, words
        assert "Traceback" not in done.err


# Recipes


RECIPES = {
    "recipe.toml": 'method = "magnitude"\nseed = 3\nsparsity = 0.25\n[calibration]\nsamples = 5\n'
    '[parts.budget]\nignore = ["*.o_proj"]\n[parts.budget.overrides]\n"*.down_proj" = 0.75\n',
    "recipe.yaml": "method: magnitude\nseed: 3\nsparsity: 0.25\ncalibration:\n  samples: 5\n"
    "parts:\n  budget:\n    ignore: ['*.o_proj']\n    overrides:\n      '*.down_proj': 0.75\n",
    "recipe.json": '{"method": "magnitude", "seed": 3, "sparsity": 0.25, "calibration": {"samples": 5}, '
    '"parts": {"budget": {"ignore": ["*.o_proj"], "overrides": {"*.down_proj": 0.75}}}}',
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_file_says_what_options_say(name: str, tmp_path: Path, recorded: list[prunekit.Recipe]) -> None:
    (tmp_path / name).write_text(RECIPES[name])
    found = recipe_of(recorded, "--recipe", tmp_path / name)
    words = ["--method", "magnitude", "--seed", "3", "--sparsity", "0.25", "--samples", "5"]
    words += ["--set", "budget.ignore=['*.o_proj']", "--set", "budget.overrides.*.down_proj=0.75"]
    assert found == recipe_of(recorded, *words)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_wins_over_the_file(name: str, tmp_path: Path, recorded: list[prunekit.Recipe]) -> None:
    (tmp_path / name).write_text(RECIPES[name])
    words = ["--method", "wanda", "--pattern", "2:4", "--samples", "9", "--set", "budget.overrides.*.down_proj=0.5"]
    found = recipe_of(recorded, "--recipe", tmp_path / name, *words)
    assert (found.method, found.pattern, found.sparsity, found.seed) == ("wanda", "2:4", None, 3)
    assert found.calibration.samples == 9
    assert found.parts["budget"] == {"ignore": ["*.o_proj"], "overrides": {"*.down_proj": 0.5}}
    assert found.model == "MODEL"


def test_the_model_may_come_from_the_file(tmp_path: Path, recorded: list[prunekit.Recipe]) -> None:
    (tmp_path / "recipe.toml").write_text('model = "there"\n')
    assert call("prune", "--recipe", tmp_path / "recipe.toml", "--out", "OUT").code == 77
    assert recorded[-1].model == "there"
    assert recorded[-1].method == "wanda"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("recipe.toml", "sparsitty = 0.5\n", "sparsitty"),
        ("recipe.toml", "[calibration]\nsample = 5\n", "calibration.sample"),
        ("recipe.toml", "[parts.refin]\nsteps = 5\n", "refin"),
        ("recipe.toml", "sparsity = \n", "not valid toml"),
        ("recipe.yaml", "a: [b\n", "not valid yaml"),
        ("recipe.json", "[1, 2]", "must hold names and values"),
        ("recipe.ini", "method = wanda", "must end in"),
        ("recipe.toml", "calibration = 5\n", "calibration"),
        ("recipe.toml", "parts = 5\n", "parts"),
    ],
)
def test_a_wrong_recipe_file_is_refused(
    name: str, content: str, word: str, tmp_path: Path, recorded: list[prunekit.Recipe]
) -> None:
    (tmp_path / name).write_text(content)
    done = call("prune", "MODEL", "--out", "OUT", "--recipe", tmp_path / name)
    assert done.code == 2
    assert word in done.err
    assert len(done.err.splitlines()) == 1
    assert call("prune", "MODEL", "--out", "OUT", "--recipe", tmp_path / "gone.toml").code == 2
    assert not recorded


@pytest.mark.parametrize(
    ("setting", "where", "value"),
    [
        ("calibration.sampling=first", ("calibration", "sampling"), "first"),
        ("calibration.mode=dense", ("calibration", "mode"), "dense"),
        ("calibration.batch=2", ("calibration", "batch"), 2),
        ("calibration.samples=9", ("calibration", "samples"), 9),
        ("budget.overrides.model.layers.0=0.25", ("parts", "budget", "overrides"), {"model.layers.0": 0.25}),
        ("budget.overrides.*.o_proj=2:4", ("parts", "budget", "overrides"), {"*.o_proj": "2:4"}),
        ("budget.ignore=*.o_proj", ("parts", "budget", "ignore"), "*.o_proj"),
        ("budget.ignore=*.o_proj,*.down_proj", ("parts", "budget", "ignore"), "*.o_proj,*.down_proj"),
        ("budget.ignore=[a, b]", ("parts", "budget", "ignore"), ["a", "b"]),
        ("pattern.group=layer", ("parts", "pattern", "group"), "layer"),
    ],
)
def test_set_reaches_its_option(
    setting: str, where: tuple[str, ...], value: object, recorded: list[prunekit.Recipe]
) -> None:
    found: Any = recipe_of(recorded, "--set", setting).model_dump()
    for name in where:
        found = found[name]
    assert found == value


def test_later_settings_win_and_overrides_add_up(recorded: list[prunekit.Recipe]) -> None:
    words = ["budget.overrides.a=0.1", "budget.overrides.b=0.2", "budget.overrides.a=0.3", "calibration.batch=1"]
    found = recipe_of(recorded, *(word for setting in [*words, "calibration.batch=2"] for word in ("--set", setting)))
    assert found.parts["budget"]["overrides"] == {"a": 0.3, "b": 0.2}
    assert found.calibration.batch == 2


@pytest.mark.parametrize(
    "setting",
    ["sampling", "sampling=first", "=first", ".x=1", "calibration.=1", "refin.steps=3", "calibration.sampling=second",
     "calibration.samples=many", "calibration.length=1"],
)  # fmt: skip
def test_a_bad_setting_is_refused(setting: str, recorded: list[prunekit.Recipe]) -> None:
    done = call("prune", "MODEL", "--out", "OUT", "--set", setting)
    assert done.code == 2
    assert done.err.startswith("prunekit: ")
    assert len(done.err.splitlines()) == 1
    assert not recorded


@pytest.mark.parametrize("parts", ["[1]", "{budget: 3}", "{budget: {overrides: 3}}"])
def test_a_setting_on_top_of_a_misshapen_recipe_is_refused(
    parts: str, tmp_path: Path, recorded: list[prunekit.Recipe]
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"parts: {parts}\n")
    words = ["--recipe", tmp_path / "recipe.yaml", "--set", "budget.overrides.*.o_proj=0.3"]
    done = call("prune", "MODEL", "--out", "OUT", *words)
    assert done.code == 2
    assert done.err.startswith("prunekit: ")
    assert not recorded


@pytest.mark.parametrize("setting", ["score.power=2", "pattern.size=3", "pattern.group=column", "budget.slope=1",
                                     "budget.overrides.*=lots", "budget.overrides=0.5"])  # fmt: skip
def test_a_setting_that_the_methods_parts_do_not_have_is_refused(
    setting: str, tmp_path: Path, llama_folder: Path, few: list[str]
) -> None:
    done = call("prune", llama_folder, "--out", tmp_path / "out", *few, "--set", setting)
    assert done.code == 2, done.err
    assert done.err.startswith("prunekit: ")
    assert setting.partition("=")[0].partition(".*")[0] in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--sparsity", "0.3"],
        ["--pattern", "2:4", "--seed", "4", "--revision", "v1", "--trust-remote-code"],
        ["--set", "calibration.sampling=first", "--set", "calibration.mode=dense", "--set", "calibration.batch=2"],
        ["--set", "budget.overrides.*.o_proj=0.25", "--set", "budget.overrides.model.layers.0=2:4"],
        ["--set", "budget.ignore=*.o_proj,*.down_proj", "--set", "pattern.group=layer"],
        ["--calibration", "a folder/it's text.txt", "--samples", "5", "--length", "77", "--dtype", "bfloat16"],
    ],
)
def test_the_recorded_command_parses_to_the_same_recipe(words: list[str], recorded: list[prunekit.Recipe]) -> None:
    first = recipe_of(recorded, *words)
    again = shlex.split(first.command("OUT"))
    assert again[0] == "prunekit"
    assert call(*again[1:]).code == 77
    # the command always says --pattern; what is asked for is `target`
    assert recorded[-1].target == first.target
    same = {"sparsity": None, "pattern": None}
    assert recorded[-1].model_copy(update=same) == first.model_copy(update=same)


@pytest.mark.parametrize("sparsity", ["0.6666666", "0.123456789"])
def test_the_recorded_command_keeps_every_digit(sparsity: str, recorded: list[prunekit.Recipe]) -> None:
    first = recipe_of(recorded, "--sparsity", sparsity)
    assert call(*shlex.split(first.command("OUT"))[1:]).code == 77
    assert recorded[-1].target == first.target


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more blocks than any method leaves alone at its ends."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    tiny.save_model(folder, "llama", num_hidden_layers=8)
    return folder


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"planned"}))  # a plan in the place of a ratio
def test_the_command_of_a_run_says_all_its_options_as_they_are(
    method: str, deep: Path, recorded: list[prunekit.Recipe]
) -> None:
    source = StreamedModel.open(deep, dtype="float32", device="cpu", trust_remote_code=False)
    first = recipe_of(recorded, "--method", method, *(["--ratio", "0.1"] if METHODS[method].kind == "shrink" else []))
    resolved = first.model_copy(update={"parts": job_of(first, source).resolved})
    assert call(*shlex.split(resolved.command("OUT"))[1:]).code == 77
    assert recorded[-1].parts == resolved.parts


@pytest.mark.parametrize(
    ("words", "target"),
    [
        ([], ("sparsity", 0.6)),
        (["--target-sparsity", "0.7"], ("sparsity", 0.7)),
        (["--pattern", "2:4"], ("pattern", "2:4")),
    ],
)
def test_a_search_for_recipes_takes_its_target_from_a_file_or_the_command_line(
    words: list[str], target: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(tuning: Any, *_: Any, **__: Any) -> None:
        asked.append(tuning.recipe)
        raise prunekit.InputError("not run")

    monkeypatch.setattr("prunekit.tuning.tune_recipes", note)
    (tmp_path / "recipe.toml").write_text('model = "MODEL"\nsparsity = 0.6\n')
    done = call("tune", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out", *words)
    assert (done.code, done.err) == (2, "prunekit: not run\n")
    assert {name: getattr(asked[0], name) for name in ("sparsity", "pattern")} == {
        "sparsity": None,
        "pattern": None,
    } | dict([target])


# Inspect


@pytest.fixture
def pruned(tmp_path: Path, llama_folder: Path, few: list[str]) -> Path:
    out = tmp_path / "pruned"
    assert call("prune", llama_folder, "--out", out, "--pattern", "2:4", *few).code == 0
    return out


def test_inspect_says_that_the_pattern_holds(pruned: Path) -> None:
    done = call("inspect", pruned)
    assert done.code == 0, done.err
    for words in (
        "sparsity    0.5000",
        "11,520 zeros of 23,040",
        "--pattern 2:4",
        "holds in all 21 linears",
        "as written",
    ):
        assert words in done.out
    found = call("inspect", pruned, "--json").json
    assert found["sound"] is True
    assert (found["broken"], found["changed"]) == ([], [])
    assert (found["sparsity"], len(found["linears"])) == (0.5, 21)


def test_inspect_counts_what_is_stored_whatever_the_manifest_says(pruned: Path) -> None:
    manifest = json.loads((pruned / "prunekit.json").read_text())
    for row in manifest["linears"]:
        row["zeros"] = 0
    (pruned / "prunekit.json").write_text(json.dumps(manifest))
    assert call("inspect", pruned, "--json").json["zeros"] == 11520


def test_inspect_tells_a_tampered_shard(pruned: Path) -> None:
    name, shard = "model.layers.1.mlp.up_proj", "model-00003-of-00004.safetensors"
    tensors = load_file(pruned / shard)
    tensors[f"{name}.weight"][tensors[f"{name}.weight"] == 0] = 1e-3
    save_file(tensors, pruned / shard, metadata={"format": "pt"})
    done = call("inspect", pruned)
    assert done.code == 1
    assert f"BROKEN in {name}" in done.out
    assert f"CHANGED: {shard}" in done.out
    found = call("inspect", pruned, "--json")
    assert found.code == 1
    assert (found.json["sound"], found.json["broken"], found.json["changed"]) == (False, [name], [shard])


def test_inspect_tells_a_changed_kept_weight_by_its_hash(pruned: Path) -> None:
    shard = "model-00003-of-00004.safetensors"
    content = bytearray((pruned / shard).read_bytes())
    content[-3] ^= 1
    (pruned / shard).write_bytes(content)
    done = call("inspect", pruned, "--json")
    assert (done.code, done.json["changed"], done.json["broken"]) == (1, [shard], [])


def test_inspect_tells_a_missing_file(pruned: Path) -> None:
    (pruned / "tokenizer.json").unlink()
    assert call("inspect", pruned, "--json").json["changed"] == ["tokenizer.json"]


@pytest.mark.parametrize("sparsity", ["0.3", "0.29", "0.6666666"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_inspect_finds_sound_what_prune_wrote(
    method: str, sparsity: str, tmp_path: Path, llama_folder: Path, few: list[str]
) -> None:
    out = tmp_path / "out"
    assert call("prune", llama_folder, "--out", out, "--method", method, "--sparsity", sparsity, *few).code == 0
    assert call("inspect", out, "--json").json["broken"] == []


def test_inspect_of_an_unfinished_folder_says_how_to_finish(
    tmp_path: Path, llama_folder: Path, few: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "write_index", ctrl_c)
    call("prune", llama_folder, "--out", tmp_path / "out", *few)
    done = call("inspect", tmp_path / "out")
    assert done.code == 2
    assert "interrupted" in done.err
    assert "--resume" in done.err


def test_inspect_of_a_folder_that_prunekit_did_not_write(llama_folder: Path) -> None:
    done = call("inspect", llama_folder)
    assert done.code == 0, done.err
    assert "prunekit did not write this folder" in done.out
    found = call("inspect", llama_folder, "--json").json
    assert (found["recipe"], found["zeros"], found["sound"]) == (None, 0, True)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_inspect_draws_a_weight(suffix: str, pruned: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"weight{suffix}"
    words = ["--weight", "model.layers.1.mlp.up_proj", "--plot", picture]
    found = call("inspect", pruned, *words)
    assert found.code == 0, found.err
    assert str(picture) in found.out
    first = picture.read_bytes()
    assert first.startswith(b"<?xml" if suffix == ".svg" else b"\x89PNG")
    assert call("inspect", pruned, *words, "--json").json["plot"] == str(picture)
    assert picture.read_bytes() == first
    assert call("inspect", pruned, "--weight", "model.layers.1.mlp.up_proj.weight", "--plot", picture).code == 0
    assert call("inspect", pruned, "--weight", "model.layers.2.mlp.up_proj", "--plot", picture).code == 0
    assert picture.read_bytes() != first


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--weight", "model.layers.1.mlp.up_prj", "--plot", "w.svg"], "did you mean 'model.layers.1.mlp.up_proj'?"),
        (["--weight", "model.embed_tokens", "--plot", "w.svg"], "has no linear 'model.embed_tokens' in its blocks"),
        (["--weight", "model.layers.1.mlp.up_proj", "--plot", "w.jpg"], "must end in .svg or .png"),
        (["--weight", "model.layers.1.mlp.up_proj"], "go together"),
        (["--plot", "w.svg"], "go together"),
    ],
)
def test_inspect_refuses_what_it_cannot_draw(
    words: list[str], sentence: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call("inspect", llama_folder, *words)
    assert (found.code, found.out) == (2, "")
    assert sentence in found.err
    assert len(found.err.splitlines()) == 1
    assert not list(tmp_path.glob("w.*"))


def test_inspect_draws_nothing_without_matplotlib(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.report.plots.find_spec", lambda _: None)
    found = call("inspect", llama_folder, "--weight", "model.layers.1.mlp.up_proj", "--plot", tmp_path / "w.svg")
    assert found.code == 2
    assert "pip install 'prunekit[plots]'" in found.err


def test_inspect_reads_transposed_linears_too(tmp_path: Path, few: list[str]) -> None:
    tiny.save_model(tmp_path / "in", "gpt2")
    assert call("prune", tmp_path / "in", "--out", tmp_path / "out", "--pattern", "2:4", *few).code == 0
    done = call("inspect", tmp_path / "out", "--json")
    assert done.code == 0
    assert all(row["holds"] for row in done.json["linears"])


# Methods


def test_report_writes_page_and_card_anew(finished: Path) -> None:
    (finished / "report.html").unlink()
    done = call("report", finished)
    assert (done.code, done.out) == (0, f"page        {finished}/report.html, 1 run\ncard        written anew\n")
    assert (finished / "report.html").is_file()
    (finished / "README.md").write_text("mine")
    assert "left as it is: somebody has edited README.md" in call("report", finished).out
    assert call("report", finished, "--json").json == {"page": f"{finished}/report.html", "runs": 1, "card": "kept"}


def test_report_compares_several(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    done = call("report", finished, finished, "--out", out)
    assert (done.code, done.out) == (0, f"page        {out}, 2 runs\n")
    done = call("report", finished, finished)
    assert (done.code, done.out) == (2, "")
    assert "--out compare.html" in done.err


def test_push_takes_every_option(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def upload(folder: Path, repo: str, **options: Any) -> str:
        asked.update(options, folder=folder, repo=repo)
        return "https://hub/commit/1"

    monkeypatch.setattr("prunekit.publishing.upload", upload)
    done = call("push", finished, "me/model", "--private", "--revision", "half", "--json")
    assert done.json == {"folder": str(finished), "repo": "me/model", "commit": "https://hub/commit/1"}
    wanted = {
        "folder": finished,
        "repo": "me/model",
        "private": True,
        "revision": "half",
        "token": None,
        "endpoint": None,
    }
    assert asked.items() >= wanted.items()
    assert call("push", finished, "model").out == "pushed      https://hub/commit/1\n"
    assert (asked["private"], asked["revision"]) == (False, None)


def test_push_refuses_in_one_sentence(llama_folder: Path) -> None:
    done = call("push", llama_folder, "me/model")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "only those are pushed" in done.err


def test_methods_lists_every_method() -> None:
    done = call("methods")
    assert done.code == 0
    assert all(name in done.out for name in ("magnitude", "wanda"))
    assert {row["name"] for row in call("methods", "--json").json} >= {"magnitude", "wanda"}


def test_methods_describes_one() -> None:
    done = call("methods", "wanda")
    assert done.code == 0
    assert "2306.11695" in done.out
    assert "input_square" in done.out
    assert call("methods", "wanda", "--json").json["needs"] == ["input_square"]


def test_an_unknown_method_suggests_the_nearest() -> None:
    done = call("methods", "wonda")
    assert done.code == 2
    assert done.err.startswith("prunekit: method 'wonda' is unknown: did you mean 'wanda'?")


def test_export_takes_every_option(tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "model", "llama")
    words = ["export", tmp_path / "model", "--out", tmp_path / "packed", "--format", "bitmask"]
    done = call(*words)
    assert done.code == 0, done.err
    assert "packed      23 of 30 tensors" in done.out  # embedding and head have zeros here too
    assert call(*words).code == 2
    found = call(*words, "--overwrite", "--json").json
    assert found["format"] == "bitmask"
    assert found["packed_ratio"] == pytest.approx(0.53, abs=0.02)
    assert found.keys() >= {
        "model",
        "out",
        "tensors",
        "packed",
        "dense",
        "before",
        "after",
        "ratio",
        "seconds",
        "peak_rss_bytes",
    }
    assert call("export", tmp_path / "packed", "--out", tmp_path / "plain", "--json").json["format"] == "zip-free"
    done = call("export", tmp_path / "model", "--out", tmp_path / "it", "--pad")
    assert done.code == 2
    assert "has no blocks of different widths: transformers loads it as it is, without --pad" in done.err
    done = call("export", tmp_path / "model", "--out", tmp_path / "it", "--format", "tar")
    assert done.code == 2
    assert "format 'tar' is unknown" in done.err


def test_bench_takes_every_option(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.benching._memory_in_child", lambda asked: Memory(3_000_000, 5_000_000, None))
    words = ["bench", llama_folder, "--against", llama_folder, "--prompt", "8", "--tokens", "2", "--repetitions", "2"]
    words += ["--warmup", "0", "--dtype", "float32", "--device", "cpu"]
    done = call(*words)
    assert done.code == 0, done.err
    for words_of_it in (
        "prefill tokens/s",
        "peak memory MB",
        "as bitmask MB",
        "zeros skipped",
        "median of 2 rounds",
        "hardly any",
    ):
        assert words_of_it in done.out
    found = call(*words, "--json").json
    assert found["ratios"].keys() == {"prefill", "first_token", "decode"}
    assert found["memory"] == {"before": 3_000_000, "peak": 5_000_000, "device": None}
    assert found.keys() >= {
        "files",
        "dense",
        "zlib",
        "bitmask",
        "parameters",
        "nonzero",
        "flops",
        "nonzero_flops",
        "advice",
    }
    refused = call("bench", llama_folder, "--runtime", "2:4", "--device", "cpu")
    assert refused.code == 2
    assert "NVIDIA" in refused.err
    assert call("bench", llama_folder, "--trust-remote-code", "--tokens", "0").code == 2


# Real processes


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from prunekit.cli import main\n"
        "sys.argv = ['prunekit', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "Commands" in done.stdout
    loaded = set(done.stderr.split())
    assert "prunekit" in loaded
    assert not loaded & {"torch", "transformers", "pydantic", "rich", "numpy", "yaml", "datasets"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python(
        "-c", "import prunekit, sys; print(prunekit.__all__, 'torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    assert done.stdout.strip().endswith("False False")


def test_python_m_prunekit_works() -> None:
    done = python("-m", "prunekit", "methods", "nonesuch")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("prunekit: method 'nonesuch' is unknown")
    assert "Traceback" not in done.stderr
