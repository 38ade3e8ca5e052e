"""A GGUF file holds the model's own bits: transformers' reader of the format makes the same model of it, tokenizer included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
import tiny
from prunekit import to_gguf

pytest.importorskip("gguf")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def gpt2_tokenizer(folder: Path) -> None:
    """Let the tiny tokenizer cut words as GPT-2's does, and merge something: llama.cpp knows no tokenizer that cuts nothing."""

    def change(tokenizer: Any) -> None:
        tokenizer["pre_tokenizer"]["use_regex"] = True
        tokenizer["model"]["merges"] = [["t", "h"]]
        tokenizer["model"]["vocab"]["th"] = 259

    edit(folder / "tokenizer.json", change)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.save_sparse(tmp_path / "model", "llama")
    gpt2_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"dtype": torch.float32}),
        ("llama", {"dtype": torch.bfloat16, "tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"dtype": torch.float16, "num_key_value_heads": 1}),
        ("mistral", {"dtype": torch.bfloat16, "sliding_window": None, "head_dim": 16}),
        ("qwen2", {"dtype": torch.bfloat16}),
    ],
)
def test_transformers_reads_the_same_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "model", family, **changes)
    gpt2_tokenizer(tmp_path / "model")
    found = prunekit.export(tmp_path / "model", out=tmp_path / "it.gguf", format="gguf")
    assert (found.format, found.after, found.packed) == ("gguf", (tmp_path / "it.gguf").stat().st_size, 0)
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "it.gguf"}
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()(ids).logits
    assert torch.equal(theirs, ours)
    text = "the other thing: it's 2024"
    ids_of = AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(**source)(text)["input_ids"] == ids_of


def test_a_packed_folder_gives_the_same_file(tmp_path: Path, model: Path) -> None:
    from gguf import GGUFReader

    prunekit.export(model, out=tmp_path / "packed", format="bitmask")
    names = ("plain.gguf", "packed.gguf")
    for folder, name in zip((model, tmp_path / "packed"), names, strict=True):
        prunekit.export(folder, out=tmp_path / name, format="gguf")
    written = [{tensor.name: tensor.data.tobytes() for tensor in GGUFReader(tmp_path / name).tensors} for name in names]
    assert written[0] == written[1]


def test_the_file_says_what_llama_cpp_asks(tmp_path: Path, model: Path) -> None:
    from gguf import GGUFReader

    prunekit.export(model, out=tmp_path / "it.gguf", format="gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "it.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (4, 2)
    assert (fields["llama.rope.dimension_count"], fields["llama.context_length"]) == (8, 128)
    assert fields["tokenizer.ggml.merges"] == ["t h"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (256, 257)
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCABULARY
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD287]"
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[256], kinds[287]) == (1, 3, 5)  # normal, control, unused


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("steps", "normaliser", "whole", "name"),
    [
        (WORDS, None, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, WORDS), None, False, "smollm"),
        (sequence(regex(LLAMA3), BYTES), None, True, "llama-bpe"),
        (sequence(regex(LLAMA3.replace("{1,3}", "")), BYTES), {"type": "NFC"}, False, "qwen2"),
        (sequence(regex(LLAMA3), BYTES), None, False, None),
        (sequence(regex(LLAMA3.replace("{1,3}", "")), BYTES), None, False, None),
        (sequence({"type": "Digits", "individual_digits": False}, WORDS), None, False, None),
        ({**WORDS, "add_prefix_space": True}, None, False, None),
        (WORDS, {"type": "NFC"}, False, None),
        (BYTES, None, False, None),
        (None, None, False, None),
    ],
)
def test_how_text_is_split_is_known_by_name_or_refused(
    steps: Any, normaliser: Any, whole: bool, name: str | None, tmp_path: Path
) -> None:
    model = {"type": "BPE", "ignore_merges": whole, "vocab": {}, "merges": []}
    content = {"pre_tokenizer": steps, "normalizer": normaliser, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if name is not None:
        assert to_gguf._tokenizer(tmp_path)[1] == name
        return
    with pytest.raises(prunekit.InputError, match=r"splits text; use llama\.cpp's converter .* convert_hf_to_gguf\.py"):
        to_gguf._tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt2", {}, "its architecture is gpt2"),
        ("mistral", {}, "its attention slides"),
        ("llama", {"attention_bias": True}, "its linears have biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "its rope is scaled"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "its attention slides"),
    ],
)
def test_what_cannot_be_written_exactly_names_the_converter(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "model", family, **changes)
    with pytest.raises(prunekit.InputError, match=rf"{why}.* convert_hf_to_gguf\.py"):
        prunekit.export(tmp_path / "model", out=tmp_path / "it.gguf", format="gguf")
    assert not (tmp_path / "it.gguf").exists()


def test_the_output_is_a_file_that_is_not_there_yet(tmp_path: Path, model: Path) -> None:
    (tmp_path / "old.gguf").write_text("old")
    for out, message in (
        (tmp_path / "old.gguf", "is there already: --overwrite replaces it"),
        (tmp_path / "folder", "is the name of no GGUF file"),
        (tmp_path / "gone" / "it.gguf", "there is no folder"),
    ):
        with pytest.raises(prunekit.InputError, match=message):
            prunekit.export(model, out=out, format="gguf")
    assert (tmp_path / "old.gguf").read_text() == "old"
    prunekit.export(model, out=tmp_path / "old.gguf", format="gguf", overwrite=True)
    assert (tmp_path / "old.gguf").read_bytes()[:4] == b"GGUF"


def test_a_written_bit_that_is_wrong_is_found(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = to_gguf._write

    def tamper(path: Path, **options: Any) -> dict[str, int]:
        starts = real(path, **options)
        content = bytearray(path.read_bytes())
        content[starts["blk.1.attn_q.weight"] + 1] ^= 1
        path.write_bytes(content)
        return starts

    monkeypatch.setattr(to_gguf, "_write", tamper)
    with pytest.raises(prunekit.VerificationError, match="nothing was kept"):
        prunekit.export(model, out=tmp_path / "it.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(prunekit.InputError, match=r"pip install 'prunekit\[embedded\]'"):
        prunekit.export(model, out=tmp_path / "it.gguf", format="gguf")
