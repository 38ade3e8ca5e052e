"""An exported folder holds the same bits in another form, every verb reads it, and nothing is left of an export that failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunekit
import tiny
from prunekit import exporting
from prunekit.checkpoint.bitmask import INDEX_NAME
from prunekit.checkpoint.reader import Reader, sha256_file
from prunekit.checkpoint.writer import JOURNAL_NAME, Writer

SETUP: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "dtype": "float32"}


@pytest.fixture
def pruned(tmp_path: Path, llama_folder: Path, text_file: Path) -> Path:
    out = tmp_path / "pruned"
    calibration = {"source": str(text_file), "samples": 2, "length": 32}
    prunekit.prune(llama_folder, out=out, calibration=calibration, **SETUP)
    return out


@pytest.fixture
def packed(tmp_path: Path, pruned: Path) -> Path:
    prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    return tmp_path / "packed"


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_there_and_back_is_the_same_folder(tmp_path: Path, pruned: Path) -> None:
    there = prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    back = prunekit.export(there.out, out=tmp_path / "back")
    before, after = hashes(pruned), hashes(back.out)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["prunekit.json"]
    manifests = [json.loads((folder / "prunekit.json").read_text()) for folder in (pruned, back.out)]
    assert manifests[1].pop("export") is None
    assert manifests[0] == manifests[1]


def test_the_result_tells_what_was_written(tmp_path: Path, pruned: Path) -> None:
    found = prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    written = [path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors")]
    assert (found.format, found.packed, found.tensors) == ("bitmask", 21, 30)
    assert (found.after, found.dense) == (sum(written), sum(e.bytes for e in Reader(pruned).entries.values()))
    summary = found.summary()
    assert summary["packed_ratio"] == pytest.approx(0.5 + 1 / 32)  # float32: a bit in 32
    assert summary["ratio"] == found.after / found.dense
    plain = prunekit.export(pruned, out=tmp_path / "plain")
    assert (plain.format, plain.packed, plain.summary()["packed_ratio"]) == ("zip-free", 0, None)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_a_folder_that_prunekit_did_not_write_is_exported_too(family: str, tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "model", family, dtype=torch.bfloat16)
    found = prunekit.export(tmp_path / "model", out=tmp_path / "packed", format="bitmask")
    assert found.packed
    assert not (tmp_path / "packed" / "prunekit.json").exists()
    assert not (tmp_path / "packed" / JOURNAL_NAME).exists()
    source, packed = Reader(tmp_path / "model"), Reader(tmp_path / "packed")
    assert source.entries.keys() == packed.entries.keys()
    tensors = packed.read(packed.entries)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in source.read(source.entries).items())


def test_what_the_folder_brings_comes_along(tmp_path: Path, pruned: Path) -> None:
    (pruned / "modeling_own.py").write_text("")
    found = prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    names = {path.name for path in found.out.iterdir() if path.suffix != ".safetensors"}
    assert names == {path.name for path in pruned.iterdir() if path.suffix != ".safetensors"} - {
        "model.safetensors.index.json"
    } | {INDEX_NAME}
    card = (found.out / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text())
    assert "prunekit.load" in card


# Packed folders are read by every verb


def test_inspect_finds_zeros_pattern_and_hashes(packed: Path, pruned: Path) -> None:
    found, plain = prunekit.inspect(packed), prunekit.inspect(pruned)
    assert found.sound
    assert found.linears == plain.linears
    (packed / "bitmask-00002-of-00004.safetensors").write_bytes(
        (packed / "bitmask-00003-of-00004.safetensors").read_bytes()
    )
    with pytest.raises(prunekit.InputError, match="stands in both"):
        prunekit.inspect(packed)


def test_eval_gives_the_same_perplexity(packed: Path, pruned: Path, text_file: Path) -> None:
    setup: dict[str, Any] = {"text": str(text_file), "length": 32, "samples": 3, "dtype": "float32"}
    assert prunekit.evaluate(packed, **setup).perplexity == prunekit.evaluate(pruned, **setup).perplexity


def test_a_packed_folder_can_be_pruned_on(tmp_path: Path, packed: Path, pruned: Path, text_file: Path) -> None:
    setup: dict[str, Any] = {"method": "wanda", "pattern": "2:4", "dtype": "float32"}
    setup["calibration"] = {"source": str(text_file), "samples": 2, "length": 32}
    for folder in (packed, pruned):
        prunekit.prune(folder, out=tmp_path / f"again-{folder.name}", **setup)
    weights = [
        load_file(tmp_path / name / "model-00002-of-00004.safetensors") for name in ("again-packed", "again-pruned")
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_transformers_refuses_a_packed_folder(packed: Path) -> None:
    # it would take masks for tensors it does not know, and make up the weights
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


# Refused, failed, interrupted


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path, pruned: Path, packed: Path) -> None:
    before = hashes(packed)
    with pytest.raises(prunekit.InputError, match=r"is not empty: --overwrite replaces it$"):
        prunekit.export(pruned, out=packed)
    assert hashes(packed) == before
    (packed / "mine.md").write_text("mine")
    prunekit.export(pruned, out=packed, overwrite=True)
    assert (packed / "mine.md").read_text() == "mine"
    assert not list(packed.glob("bitmask*"))
    assert prunekit.inspect(packed).sound
    with pytest.raises(prunekit.InputError, match="own folder"):
        prunekit.export(pruned, out=pruned, overwrite=True)


def test_an_unknown_format_is_refused(tmp_path: Path, pruned: Path) -> None:
    with pytest.raises(prunekit.InputError, match="format 'bitmap' is unknown: did you mean 'bitmask'"):
        prunekit.export(pruned, out=tmp_path / "out", format="bitmap")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_changed_since_it_was_written_is_refused(tmp_path: Path, pruned: Path) -> None:
    with (pruned / "config.json").open("a") as stream:
        stream.write("\n")
    with pytest.raises(prunekit.InputError, match=r"is not what was written: config\.json changed since"):
        prunekit.export(pruned, out=tmp_path / "out", format="bitmask")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused(tmp_path: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.machine.free_disk_bytes", lambda folder: 1000)
    with pytest.raises(prunekit.InputError, match=r"its disk has 0\.00 GB free"):
        prunekit.export(pruned, out=tmp_path / "out", format="bitmask")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("problem", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write_shard", "carry_over", "write_index"])
def test_nothing_is_left_of_an_export_that_failed(
    step: str, problem: BaseException, tmp_path: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(Writer, step, fail)
    with pytest.raises(type(problem)):
        prunekit.export(pruned, out=tmp_path / "out", format="bitmask")
    assert not (tmp_path / "out").exists()


def test_a_written_bit_that_is_wrong_is_found(tmp_path: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.Writer.write_index

    def tamper(writer: Writer, records: Any) -> None:
        path = writer.folder / writer.shard_name(1)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        real(writer, records)

    monkeypatch.setattr(Writer, "write_index", tamper)
    with pytest.raises(prunekit.VerificationError, match="is not what"):
        prunekit.export(pruned, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_export_is_known_for_what_it_is(
    tmp_path: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_finish", lambda *_: 1 / 0)
        patch.setattr(exporting, "clear", lambda folder, keep=None: None)  # nobody tidies up behind kill -9
        with pytest.raises(ZeroDivisionError):
            prunekit.export(pruned, out=out, format="bitmask")
    assert (out / INDEX_NAME).is_file()
    for use in (prunekit.inspect, prunekit.load, lambda folder: prunekit.evaluate(folder, text=str(text_file))):
        with pytest.raises(prunekit.InputError, match="an export that was interrupted: run it again with --overwrite"):
            use(out)
    prunekit.export(pruned, out=out, format="bitmask", overwrite=True)
    assert prunekit.inspect(out).sound
