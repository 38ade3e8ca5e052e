"""Whatever is wrong with the input: exit code 2, one sentence that names it, and nothing left behind."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import tiny
from helpers import contents, edit_config
from prunekit.errors import InputError
from prunekit.recipe import Recipe
from test_cli import Done, call

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAST_UP = "model.layers.2.mlp.up_proj.weight"


@dataclass
class Case:
    """A command that would work, and the places to spoil."""

    model: Path
    text: Path
    out: Path
    options: dict[str, object] = field(default_factory=dict)

    def prune(self, *words: object) -> Done:
        options = {"calibration": self.text, "samples": 3, "length": 32, "dtype": "float32", **self.options}
        given = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        return call("prune", self.model, "--out", self.out, *given, *words)


@pytest.fixture
def case(tmp_path: Path, llama_folder: Path, text_file: Path) -> Case:
    return Case(llama_folder, text_file, tmp_path / "out")


def assert_refused(done: Done, *named: str) -> None:
    """Exit code 2 and, as the last line on stderr, one sentence with every word of `named` in it."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    ours = [line for line in done.err.splitlines() if line.startswith("prunekit: ")]
    assert ours == done.err.splitlines()[-1:], done.err
    for word in named:
        assert word in ours[0], ours[0]


def test_the_case_itself_works(case: Case) -> None:
    assert case.prune().code == 0  # else every refusal below would prove nothing


# Options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "wonda"}, ["'wonda'", "did you mean 'wanda'?"]),
        ({"method": ""}, ["''", "Known: "]),
        ({"sparsity": "1.0"}, ["1.0"]),
        ({"sparsity": "-0.1"}, ["-0.1"]),
        ({"sparsity": "1.5"}, ["1.5"]),
        ({"sparsity": "nan"}, ["nan"]),
        ({"sparsity": "inf"}, ["inf"]),
        ({"pattern": "2:2"}, ["2:2"]),
        ({"pattern": "4:2"}, ["4:2"]),
        ({"pattern": "0:4"}, ["0:4"]),
        ({"pattern": "x:y"}, ["x:y"]),
        ({"pattern": "2:"}, ["2:"]),
        ({"pattern": "-2:4"}, ["-2:4"]),
        ({"pattern": "2:4:8"}, ["2:4:8"]),
        ({"pattern": "half"}, ["half"]),
        ({"pattern": "1/0"}, ["1/0"]),
        ({"pattern": "1.0"}, ["1.0"]),
        ({"pattern": "3:5"}, ["5", "32 inputs", "model.layers.0.self_attn.q_proj"]),
        ({"pattern": "32:64"}, ["64", "32 inputs", "model.layers.0.self_attn.q_proj"]),
        ({"ratio": "0.2"}, ["ratio 0.2", "wanda", "use --sparsity or --pattern"]),
        ({"ratio": "2", "method": "flap"}, ["ratio 2.0", "like 0.2"]),
        ({"ratio": "-0.1", "method": "flap"}, ["ratio -0.1"]),
        ({"ratio": "nan", "method": "flap"}, ["ratio nan"]),
        ({"ratio": "0.99", "method": "flap"}, ["ratio 0.99", "ask for at most 0."]),
        ({"ratio": "0.9", "method": "shortgpt"}, ["would remove all 3 blocks"]),
        ({"sparsity": "0.5", "method": "flap"}, ["sparsity 0.5", "'flap'", "use --ratio"]),
        ({"pattern": "2:4", "method": "flap"}, ["pattern 2:4", "'flap'", "use --ratio"]),
        ({"shape": "round", "method": "flap"}, ["'round'", "uniform or free"]),
        ({"shape": "uniform"}, ["'budget.shape'", "'wanda' zeroes single weights"]),
        ({"align": "8"}, ["'budget.align'", "'wanda' zeroes single weights"]),
        ({"shape": "free", "method": "shortgpt"}, ["'budget.shape'", "'shortgpt' removes whole blocks"]),
        ({"align": "0", "method": "flap"}, ["'budget.align'", "0", "at least 1"]),
        ({"align": "1000", "method": "flap"}, ["1000", "mlp.down_proj", "channels"]),
        ({"method": "flap", "set": "score.name=nonsense"}, ["'nonsense'", "Known: flap"]),
        ({"method": "flap", "set": "compensate.name=nonsense"}, ["'nonsense'", "Known: admm, bias"]),
        ({"method": "flap", "set": "depth.name=shortgpt"}, ["either a score", "or a depth"]),
        ({"method": "wanda-sp+flop"}, ["'flop'", "Known: admm, bias"]),
        ({"method": "wanda", "set": "compensate.name=bias"}, ["'compensate'", "'wanda'"]),
        ({"sparsity": "0.5", "pattern": "2:4"}, ["0.5", "2:4"]),
        ({"samples": 0}, ["samples", "0"]),
        ({"samples": -3}, ["samples", "-3"]),
        ({"samples": 100_000}, ["100000 windows of 32 tokens", "--samples"]),
        ({"length": 0}, ["length", "0"]),
        ({"length": 1}, ["length", "1"]),
        ({"length": 129}, ["129", "128", "--length"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"dtype": "foo"}, ["dtype", "foo", "bfloat16"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"device": "nonsense"}, ["nonsense"]),
        ({"device": "meta"}, ["meta"]),
        ({"set": "budget.overrides.*.nonsense=0.3"}, ["*.nonsense", "q_proj"]),
        ({"set": "budget.ignore=lm_head"}, ["lm_head", "q_proj"]),
        ({"set": "budget.overrides.*=1.0"}, ["1.0"]),
        ({"memory-budget": "much"}, ["much"]),
        ({"memory-budget": "0"}, ["0"]),
        ({"calibration": "wikitext3"}, ["wikitext3", "wikitext2"]),
        ({"calibration": "nowhere.txt"}, ["nowhere.txt"]),
        ({"calibration": ""}, []),
        ({"recipe": "nowhere.toml"}, ["nowhere.toml"]),
    ],
    ids=lambda value: "-".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_options(options: dict[str, object], named: list[str], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.out.parent)
    (case.out.parent / "empty").mkdir()
    monkeypatch.chdir(case.out.parent / "empty")  # `--calibration ""` is the current folder
    case.options = options
    assert_refused(case.prune(), *named)
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"metod": "wanda"}, "'metod' is not a name a recipe has at that place: did you mean 'method'? Known: "),
        ({"samples": 4}, "'samples' is not a name .*: write it under calibration, like calibration.samples"),
        ({"shape": "free"}, "'shape' is not a name .*: write it under parts, like parts.budget.shape"),
        (
            {"calibration": {"sampels": 4}},
            "'calibration.sampels' is not a name .*: did you mean 'samples'? Known: batch,",
        ),
    ],
)
def test_names_that_a_recipe_does_not_have(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named.replace("?", r"\?")):
        Recipe.build({"model": "M", "method": "wanda", **values})


def test_cuda_where_there_is_none(case: Case) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    case.options = {"device": "cuda"}
    assert_refused(case.prune(), "'cuda'", "cpu")
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dtype", "foo"], ["foo"]),
        (["--dtype", "int32"], ["int32"]),
        (["--length", "0"], ["0"]),
        (["--length", "1"], ["1"]),
        (["--length", "-5"], ["-5"]),
        (["--length", "129"], ["129", "128"]),
        (["--samples", "0"], ["samples", "0"]),
        (["--samples", "-1"], ["samples", "-1"]),
        (["--samples", "100000"], ["100000 windows"]),
        (["--text", "nowhere.txt"], ["nowhere.txt"]),
        (["--device", "nonsense"], ["nonsense"]),
    ],
    ids=lambda value: "".join(value),
)
def test_options_of_eval(words: list[str], named: list[str], case: Case) -> None:
    given = {"--text": str(case.text), "--length": "32", "--dtype": "float32", words[0]: words[1]}
    done = call("eval", case.model, *(word for pair in given.items() for word in pair))
    assert_refused(done, *named)


# Text


TEXTS: dict[str, tuple[bytes, list[str]]] = {
    "short.txt": (b"x" * 31, ["31 tokens", "one window of 32", "--length"]),
    "few.txt": (b"x" * 95, ["95 tokens", "enough for 2", "--samples"]),
    "empty.txt": (b"", ["0 tokens"]),
    "blank.txt": (b" \n\n ", ["0 tokens"]),
    "latin.txt": ("Grüße ".encode("latin-1") * 100, ["latin.txt", "UTF-8"]),
    "bad.jsonl": (b'{"text": "fine"}\n{"text": \n', ["bad.jsonl", "line 2"]),
    "field.jsonl": (b'{"text": "fine"}\n{"content": "x"}\n', ["field.jsonl", "line 2", "'text'"]),
    "number.jsonl": (b'{"text": 3}\n', ["number.jsonl:1", "int"]),
    "bad.parquet": (b"PAR1", ["bad.parquet"]),
    "text.pdf": (b"text", ["text.pdf", ".txt"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, case: Case, tmp_path: Path) -> None:
    content, named = TEXTS[name]
    case.text = tmp_path / name
    case.text.write_bytes(content)
    assert_refused(case.prune(), *named)
    assert not case.out.exists()


def test_a_folder_without_texts(case: Case, tmp_path: Path) -> None:
    case.text = tmp_path / "texts"
    case.text.mkdir()
    assert_refused(case.prune(), str(case.text), ".txt")
    assert not case.out.exists()


# Models. Each change spoils a working folder; `tests/checkpoint/test_reader.py` has the variants.


def change_config(**changes: Any) -> Callable[[Path], None]:
    return partial(edit_config, **changes)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return apply


def save_bert(folder: Path) -> None:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertForMaskedLM(config).save_pretrained(folder)


def pickle_weights(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def cut(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-100])


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAST_UP][3, 4] = value

    return change


def enlarge(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "mlp" in name and "layers.2" in name:
            tensor.mul_(3000)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (remove("config.json"), ["config.json"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "quantised": (change_config(quantization_config={"quant_method": "awq"}), ["quantised", "awq"]),
    "unknown type": (change_config(model_type="strange"), ["strange"]),
    "own code": (
        change_config(model_type="strange", auto_map={"AutoConfig": "c.C"}),
        ["its own model code", "--trust-remote-code"],
    ),
    "encoder-decoder": (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), ["causal"]),
    "no weights": (remove(SINGLE), [SINGLE]),
    "pickled weights": (pickle_weights, ["pytorch_model.bin", "save_pretrained"]),
    "cut weights": (cut, [SINGLE]),
    "foreign dtype": (
        change_weights(lambda tensors: tensors.update({LAST_UP: tensors[LAST_UP].to(torch.float8_e4m3fn)})),
        [LAST_UP, "F8_E4M3"],
    ),
    "missing tensor": (change_weights(lambda tensors: tensors.pop(LAST_UP)), [LAST_UP]),
    "unexpected tensor": (change_weights(lambda tensors: tensors.update(extra=torch.ones(2))), ["'extra'"]),
    "wrong shape": (change_weights(lambda tensors: tensors.update({LAST_UP: torch.ones(2, 3)})), [LAST_UP, "[2, 3]"]),
    "index outside": (index({"a": "../part.safetensors"}), ["../part.safetensors", "outside"]),
    "index names a missing file": (index({"a": "gone.safetensors"}), ["gone.safetensors"]),
    "index promises too much": (index({"a": "part.safetensors"}), ["'a'", "part.safetensors"]),
    "experts": (change_config(model_type="mixtral"), []),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["copy the model's tokenizer.json there"]),
    "reads both ways": (save_bert, ["BertForMaskedLM", "causal language models"]),
    "NaN in the last block": (change_weights(spoil(float("nan"))), [LAST_UP, "block 2"]),
    "Inf in the last block": (change_weights(spoil(float("inf"))), [LAST_UP, "block 2"]),
    "NaN outside the blocks": (
        change_weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
        ["model.norm.weight"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, case: Case) -> None:
    change, named = MODELS[name]
    change(case.model)
    before = contents(case.model)
    assert_refused(case.prune(), *named)
    assert not case.out.exists()
    assert contents(case.model) == before


def test_a_missing_model_folder(case: Case, tmp_path: Path) -> None:
    case.model = tmp_path / "nowhere"
    assert_refused(case.prune(), str(case.model), "does not exist")
    assert not case.out.exists()


def test_no_model_at_all(case: Case) -> None:
    assert_refused(call("prune", "--out", case.out), "'model' is missing")


def test_an_embedding_smaller_than_the_tokenizers_vocabulary(case: Case, tmp_path: Path) -> None:
    case.model = tmp_path / "small"
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny.save_model(case.model, "llama", vocab_size=50, **special)
    assert_refused(case.prune(), "the 50 ")
    assert not case.out.exists()


def test_activations_that_overflow_leave_nothing_though_blocks_were_written(case: Case) -> None:
    change_weights(enlarge)(case.model)  # finite in float32, beyond 65504 in float16, and only in the last block
    case.options = {"dtype": "float16"}
    done = case.prune()
    assert_refused(done, "block 2", "float16", "--dtype float32")
    assert "wanda 2/3" in done.err  # shards of two blocks had been written
    assert not case.out.exists()
    case.options = {"dtype": "float32"}
    assert case.prune().code == 0


def test_a_late_refusal_leaves_the_users_other_files(case: Case) -> None:
    change_weights(spoil(float("nan")))(case.model)
    case.out.mkdir()
    (case.out / "notes.md").write_text("mine")
    assert_refused(case.prune("--overwrite"), LAST_UP)
    assert contents(case.out) == {"notes.md": b"mine"}


# The hub


@pytest.mark.parametrize("kind", ["offline", "unreachable", "unknown"])
def test_a_hub_model_that_cannot_be_had(kind: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    problems = {
        "offline": OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled"),
        "unreachable": LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        "unknown": ValueError("404 Client Error: no such model\nRequest ID: 1"),
    }

    def refuse(*_: object, **__: object) -> str:
        raise problems[kind]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    case.model = Path("org/name")
    named = ["no such model"] if kind == "unknown" else ["cannot be reached", "smollm2-135m"]
    assert_refused(case.prune(), "'org/name'", *named)
    assert not case.out.exists()


def test_a_name_that_is_neither_folder_nor_hub_id(case: Case) -> None:
    case.model = Path("not a model!")
    assert_refused(case.prune(), "'not a model!'", "org/name")


@pytest.mark.parametrize("source", ["wikitext2", "hf:org/name"])
def test_a_hub_text_that_cannot_be_had(source: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(**_: object) -> object:
        raise ConnectionError("Couldn't reach it on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    case.options = {"calibration": source}
    assert_refused(case.prune(), source, "Couldn't reach it", "builtin")
    assert not case.out.exists()


# The output folder


def test_an_output_that_is_not_empty(case: Case) -> None:
    case.out.mkdir()
    (case.out / "notes.md").write_text("mine")
    assert_refused(case.prune(), str(case.out), "--overwrite", "--resume")
    assert_refused(case.prune("--resume"), str(case.out), "holds no run of prunekit")
    assert contents(case.out) == {"notes.md": b"mine"}


@pytest.mark.parametrize("words", [[], ["--overwrite"], ["--resume"]])
def test_an_output_that_overlaps_the_model(words: list[str], case: Case, tmp_path: Path) -> None:
    before = contents(case.model)
    link = tmp_path / "link"
    link.symlink_to(case.model)
    for out in (case.model, case.model / "sub", case.model.parent, link, link / "sub"):
        case.out = out
        assert_refused(case.prune(*words), str(out), "--out")
        assert contents(case.model) == before
    assert not (case.model / "sub").exists()


def test_an_output_that_is_a_file(case: Case) -> None:
    case.out.write_text("mine")
    for words in ([], ["--overwrite"]):
        assert_refused(case.prune(*words), str(case.out), "is a file")
    case.out = case.out / "sub"
    assert_refused(case.prune(), str(case.out))
    assert case.out.parent.read_text() == "mine"


def test_resume_and_overwrite_together(case: Case) -> None:
    assert_refused(case.prune("--resume", "--overwrite"), "--resume", "--overwrite")
    assert not case.out.exists()


def test_a_disk_that_is_too_small(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    done = case.prune()
    assert_refused(done, str(case.out), "GB free")
    assert re.search(r"needs \d+\.\d+ GB", done.err)
    assert not case.out.exists()


def test_overwrite_refuses_before_it_removes_anything(case: Case) -> None:
    assert case.prune().code == 0
    before = contents(case.out)
    for options in ({"pattern": "3:5"}, {"samples": 100_000}, {"calibration": "nowhere.txt"}):
        case.options = dict(options)
        assert_refused(case.prune("--overwrite"))
    assert contents(case.out) == before
