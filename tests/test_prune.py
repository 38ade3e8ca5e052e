"""`prune` from end to end, on tiny folders of every family: what comes out loads, and differs from what went in as it should."""

from __future__ import annotations

import hashlib
import json
import shlex
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from helpers import shards
from prunekit import InputError, VerificationError, Windows, pruning
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, token_hash
from prunekit.checkpoint import writer
from prunekit.checkpoint.shard import Piece, write_shard
from prunekit.checkpoint.writer import HIDDEN_PREFIX
from prunekit.cli import app
from prunekit.model import hidden
from prunekit.model.anatomy import read_anatomy
from prunekit.model.hidden import InMemory
from prunekit.model.stream import Walk

SAMPLES, LENGTH = 6, 32


def calibration(text_file: Path, **changes: Any) -> dict[str, Any]:
    return {"source": str(text_file), "samples": SAMPLES, "length": LENGTH, **changes}


def prune(model: Path, out: Path, text_file: Path, **options: Any) -> prunekit.Result:
    changes = options.pop("calibration", {})
    return prunekit.prune(
        model, out=out, calibration=calibration(text_file, **changes), **{"dtype": "float32", **options}
    )


def same_windows(text_file: Path, seed: int = 0) -> Windows:
    texts = documents(str(text_file), "calibration")
    return calibration_windows(
        texts, tiny.make_tokenizer(), samples=SAMPLES, length=LENGTH, seed=seed, sampling="random"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def shard_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prunekit.json").read_text(encoding="utf-8"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_comes_out_loadable_exact_and_equal_to_pruning_in_memory(
    family: str, tmp_path: Path, text_file: Path
) -> None:
    model = tiny.save_model(tmp_path / "in", family)
    result = prune(tmp_path / "in", tmp_path / "out", text_file)
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert after.keys() == before.keys()
    loaded = load(tmp_path / "out")
    linears = {linear.full_name: linear for linear in read_anatomy(loaded).linears()}
    assert [report.name for report in result.linears] == list(linears)
    pruned = {report.name: report for report in result.linears}

    changed = {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}
    # stored names may leave out the base model's prefix
    expected = {name for name in before if any(f"{linear}.weight".endswith(name) for linear in linears)}
    assert changed == expected
    for name in changed:
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept]), name

    state = loaded.state_dict()
    for name, linear in linears.items():
        matrix = linear.matrix(state[f"{name}.weight"])
        zeros = (matrix == 0).sum(1)
        assert (zeros == matrix.shape[1] // 2).all(), name
        assert pruned[name].zeros == int(zeros.sum())
        assert pruned[name].shape == tuple(matrix.shape)

    prunekit.prune_(model, same_windows(text_file))
    for name, tensor in model.state_dict().items():
        assert torch.equal(bits(tensor), bits(state[name])), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_peer_prunes_smollm2s_tied_embedding_to_50_percent(tied: bool, tmp_path: Path, text_file: Path) -> None:
    # SmolLM2's head is its embedding; a tool that prunes "every Linear" halves both. Neither may get one new zero here.
    tiny.save_model(tmp_path / "in", "llama", tie_word_embeddings=tied)
    prune(tmp_path / "in", tmp_path / "out", text_file)
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert ("lm_head.weight" in before) is not tied
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert torch.equal(bits(after[name]), bits(before[name]))
    loaded = load(tmp_path / "out")
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shared is tied
    assert torch.equal(loaded.get_input_embeddings().weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_the_stored_dtype_stays_whatever_is_computed_in(
    stored: str, computed: str, tmp_path: Path, text_file: Path
) -> None:
    tiny.save_model(tmp_path / "in", "llama", dtype=getattr(torch, stored))
    prune(tmp_path / "in", tmp_path / "out", text_file, dtype=computed)
    assert manifest_of(tmp_path / "out")["recipe"]["dtype"] == computed
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == getattr(torch, stored)
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]), name


def test_an_indexed_input_comes_out_as_a_single_file_does(tmp_path: Path, text_file: Path) -> None:
    tiny.save_model(tmp_path / "one", "llama")
    tiny.save_model(tmp_path / "many", "llama", shard="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        prune(tmp_path / name, tmp_path / f"{name}-out", text_file)
    assert shard_hashes(tmp_path / "one-out") == shard_hashes(tmp_path / "many-out")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_a_group_pattern_is_in_every_group(pattern: str, tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    result = prune(llama_folder, tmp_path / "out", text_file, pattern=pattern)
    keep, group = map(int, pattern.split(":"))
    stored = weights(tmp_path / "out")
    for report in result.linears:
        groups = stored[f"{report.name}.weight"].reshape(-1, group)
        assert ((groups != 0).sum(1) == keep).all(), report.name
    assert result.sparsity == 1 - keep / group


def test_magnitude_removes_the_smallest_of_each_layer_and_uses_one_window(
    tmp_path: Path, llama_folder: Path, text_file: Path
) -> None:
    result = prune(llama_folder, tmp_path / "out", text_file, method="magnitude", sparsity=0.3)
    assert (result.windows, result.tokens) == (1, LENGTH)
    before, after = weights(llama_folder), weights(tmp_path / "out")
    for report in result.linears:
        weight, left = before[f"{report.name}.weight"], after[f"{report.name}.weight"]
        smallest = weight.abs().flatten().argsort()[: int(weight.numel() * 3 // 10)]
        expected = weight.clone().flatten().index_fill(0, smallest, 0).reshape(weight.shape)
        assert torch.equal(left, expected), report.name


def test_dense_statistics_differ_from_sequential_ones_behind_the_first_block(
    tmp_path: Path, llama_folder: Path, text_file: Path
) -> None:
    for mode in ("sequential", "dense"):
        prune(llama_folder, tmp_path / mode, text_file, calibration={"mode": mode})
    sequential, dense = weights(tmp_path / "sequential"), weights(tmp_path / "dense")
    differing = {name for name in dense if not torch.equal(dense[name], sequential[name])}
    assert not any("layers.0." in name for name in differing)
    assert any("layers.2." in name for name in differing)


def test_equal_runs_give_equal_bytes_and_the_seed_matters(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(llama_folder, tmp_path / name, text_file, seed=seed)
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    assert shard_hashes(tmp_path / "a") != shard_hashes(tmp_path / "c")
    a, b = manifest_of(tmp_path / "a"), manifest_of(tmp_path / "b")
    assert a["outputs"] == b["outputs"]
    assert a["calibration_tokens"] == b["calibration_tokens"] != manifest_of(tmp_path / "c")["calibration_tokens"]


def test_first_windows_do_not_depend_on_the_seed(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    for seed in (0, 1):
        prune(llama_folder, tmp_path / str(seed), text_file, seed=seed, calibration={"sampling": "first"})
    assert shard_hashes(tmp_path / "0") == shard_hashes(tmp_path / "1")
    ids = tiny.make_tokenizer()(text_file.read_text())["input_ids"][: SAMPLES * LENGTH]
    expected = token_hash(Windows(torch.tensor(ids).reshape(SAMPLES, LENGTH)))
    assert manifest_of(tmp_path / "0")["calibration_tokens"] == expected


def test_overrides_and_ignores_reach_the_stored_weights(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    parts = {"budget": {"overrides": {"*.o_proj": 0.25, "model.layers.1": "2:4"}, "ignore": ["*.down_proj"]}}
    result = prune(llama_folder, tmp_path / "out", text_file, parts=parts)
    fractions = {report.name: report.zeros / report.weights for report in result.linears}
    patterns = {report.name: report.pattern for report in result.linears}
    for name, fraction in fractions.items():
        wanted = 0 if "down_proj" in name else 0.25 if "o_proj" in name and ".1." not in name else 0.5
        assert fraction == wanted, name
        assert (patterns[name] is None) == ("down_proj" in name)
    assert patterns["model.layers.1.self_attn.q_proj"] == "2:4"
    assert prunekit.inspect(tmp_path / "out").sound


def test_the_manifest_is_the_whole_record(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    result = prune(llama_folder, out, text_file, sparsity=0.25)
    manifest = manifest_of(out)
    recipe = prunekit.Recipe.build(manifest["recipe"])
    assert recipe.model_dump() == manifest["recipe"]
    assert (recipe.model, recipe.method, recipe.sparsity) == (str(llama_folder), "wanda", 0.25)
    assert (recipe.device, recipe.dtype, recipe.calibration.length) == ("cpu", "float32", LENGTH)  # none left on auto
    for folder, names in ((llama_folder, manifest["inputs"]), (out, manifest["outputs"])):
        for name, digest in names.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert manifest["inputs"].keys() == {"config.json", "model.safetensors"}
    assert manifest["outputs"].keys() >= {"config.json", "tokenizer.json", *shard_hashes(out)}
    assert manifest["calibration_tokens"] == token_hash(same_windows(text_file))
    assert manifest["versions"].keys() >= {"python", "prunekit", "torch", "transformers", "safetensors"}
    assert manifest["versions"]["torch"] == torch.__version__
    stored = weights(out)
    assert len(manifest["linears"]) == 3 * 7
    for row in manifest["linears"]:
        weight = stored[f"{row['name']}.weight"]
        assert (row["shape"], row["weights"]) == (list(weight.shape), weight.numel())
        assert (row["zeros"], row["pattern"]) == (int((weight == 0).sum()), "0.25")
        assert 0 < row["output_error"] < 1
    assert manifest["run"]["zeros"] == result.zeros == sum(row["zeros"] for row in manifest["linears"])
    assert manifest["run"]["parameters"] == sum(tensor.numel() for tensor in weights(llama_folder).values())
    assert not (out / ".prunekit-journal.json").exists()


def test_the_cards_command_repeats_the_run(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    # options that the command has to spell out, odd characters included
    parts = {"budget": {"overrides": {"*.o_proj": 0.25}, "ignore": ["*.down_proj", "model.layers.1"]}}
    prune(llama_folder, tmp_path / "out", text_file, sparsity=0.3, seed=5, calibration={"mode": "dense"}, parts=parts)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    words = shlex.split(next(line for line in card.splitlines() if line.startswith("prunekit prune ")))
    assert words[-2:] == ["--out", "OUT"]
    app([*words[1:-1], str(tmp_path / "again")], standalone_mode=False)
    assert shard_hashes(tmp_path / "again") == shard_hashes(tmp_path / "out")


def test_the_card_names_the_source_licence(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    (llama_folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# their card\n")
    prune(llama_folder, tmp_path / "out", text_file)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "\nlicense: apache-2.0\n" in card
    assert "their card" not in card


def test_both_ways_of_verifying_agree(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    found = {}
    for through, memory in (("from_pretrained", None), ("streamed", 1)):
        verification = prune(llama_folder, tmp_path / through, text_file, memory_budget=memory).verification
        assert verification is not None
        assert verification.through == through
        found[through] = verification
    assert all(verification.difference <= 1e-6 for verification in found.values())
    assert all(verification.tokens == LENGTH for verification in found.values())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda+blockwise", "sparsity": 0.5},
        {"method": "wanda-sp+blockwise", "ratio": 0.2},
        {"method": "llm-pruner", "ratio": 0.2, "parts": {"budget": {"skip_first": 0, "skip_last": 0}}},
    ],
)
def test_whatever_a_method_keeps_goes_to_the_output_folder_within_the_budget(
    options: dict[str, Any], tmp_path: Path, llama_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    prune(llama_folder, tmp_path / "memory", text_file, **options)
    monkeypatch.setattr(hidden, "InMemory", None)
    out = tmp_path / "files"
    out.mkdir()
    (out / f"{HIDDEN_PREFIX}left").mkdir()  # by a run that was killed
    prune(llama_folder, out, text_file, memory_budget=1, overwrite=True, **options)
    assert shards(out) == shards(tmp_path / "memory")
    assert not any(path.name.startswith(HIDDEN_PREFIX) for path in out.iterdir())


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("shard", [1, 4])
def test_what_is_written_wrongly_is_caught_and_does_not_load(
    shard: int, memory: int | None, tmp_path: Path, llama_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrongly(path: Path, pieces: list[Piece], metadata: Any) -> str:
        if f"-{shard:05d}-of-" in str(path):  # the first holds embeddings and norm, the last a block
            place = next(place for place, piece in enumerate(pieces) if len(piece.shape) == 2)
            pieces[place] = Piece.of(pieces[place].name, torch.randn(pieces[place].shape).to(pieces[place].dtype))
        return write_shard(path, pieces, metadata)

    monkeypatch.setattr(writer, "write_shard", write_wrongly)
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="does not compute what was pruned"):
        prune(llama_folder, out, text_file, memory_budget=memory)
    assert not (out / "prunekit.json").exists()
    with pytest.raises(OSError, match="safetensors"):
        load(out)
    with pytest.raises(InputError):
        prunekit.evaluate(out, text=str(text_file), length=LENGTH)


def test_the_folder_evaluates_as_the_pruned_model_does(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    prune(llama_folder, tmp_path / "out", text_file)
    found = prunekit.evaluate(tmp_path / "out", text=str(text_file), length=64, samples=4, dtype="float32")
    model = load(tmp_path / "out")
    ids = torch.tensor(tiny.make_tokenizer()(text_file.read_text())["input_ids"][: 4 * 64]).reshape(4, 64)
    with torch.inference_mode():
        expected = torch.stack([model(row[None], labels=row[None]).loss for row in ids]).mean().exp()
    assert found.perplexity == pytest.approx(float(expected), rel=1e-5)
    (row,) = found.texts
    assert (row.windows, row.tokens, row.predictions) == (4, 256, 4 * 63)


def test_overwrite_replaces_the_model_and_leaves_other_files(
    tmp_path: Path, llama_folder: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    tiny.save_model(out, "gpt2", shard="20KB")  # more shards than the new model has, and other names
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        prune(llama_folder, out, text_file)
    prune(llama_folder, out, text_file, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(shard_hashes(out)) == 4
    assert load(out).config.model_type == "llama"
    assert prunekit.inspect(out).sound


def test_an_existing_empty_folder_is_fine(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    (tmp_path / "out").mkdir()
    result = prune(llama_folder, tmp_path / "out", text_file)
    assert result.out == tmp_path / "out"
    assert (tmp_path / "out" / "prunekit.json").exists()


def test_the_input_folder_is_left_as_it_was(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    prune(llama_folder, tmp_path / "out", text_file)
    assert {path.name: path.read_bytes() for path in llama_folder.iterdir()} == before


@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_a_tied_pair_may_be_stored_under_either_name(kept: str, tmp_path: Path, text_file: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {"model.embed_tokens.weight": embedding} if kept != "head" else {}
    tensors |= {"lm_head.weight": embedding.clone()} if kept != "embedding" else {}
    save_file(tensors, path, metadata={"format": "pt"})
    prunekit.prune(
        tmp_path / "model",
        out=tmp_path / "out",
        calibration={"source": str(text_file), "samples": 2, "length": 16},
        dtype="float32",
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)


def test_hidden_states_are_given_back_before_the_reload(
    llama_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[weakref.ref[torch.Tensor]] = []
    start, check = Walk.start, pruning.verify

    def watched(walk: Walk, *arguments: Any, **named: Any) -> None:
        start(walk, *arguments, **named)
        assert isinstance(walk.hidden, InMemory)
        buffers.append(weakref.ref(walk.hidden.tensor))

    def verify(*arguments: Any, **named: Any) -> Any:
        assert len(buffers) == 1
        assert buffers[0]() is None
        return check(*arguments, **named)

    monkeypatch.setattr(Walk, "start", watched)
    monkeypatch.setattr("prunekit.pruning.verify", verify)
    calibration = {"source": str(text_file), "samples": 4, "length": 16}
    prunekit.prune(llama_folder, out=tmp_path / "out", calibration=calibration)


def test_overwrite_touches_no_folder_that_is_no_model(llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "project"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(prunekit.InputError, match=r"holds no model, but 'README\.md'"):
        prunekit.prune(llama_folder, out=out, calibration=str(text_file), overwrite=True)
    assert (out / "README.md").read_text() == "mine"


def test_a_linear_that_text_does_not_reach_is_refused_before_anything_is_written(
    tmp_path: Path, text_file: Path
) -> None:
    tiny.save_model(tmp_path / "model", "gpt2", add_cross_attention=True)
    with pytest.raises(prunekit.InputError, match=r"does not use .*crossattention"):
        prunekit.prune(
            tmp_path / "model",
            out=tmp_path / "out",
            calibration={"source": str(text_file), "samples": 2, "length": 16},
        )
    assert not (tmp_path / "out").exists()
