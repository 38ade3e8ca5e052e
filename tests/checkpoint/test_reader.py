"""What a folder holds is read exactly; what prunekit cannot prune is refused in a sentence that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from helpers import edit_config, streamed
from prunekit.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Reader, read_file, sha256_file
from prunekit.errors import InputError, StorageError

Tensors = dict[str, torch.Tensor]


def make_folder(folder: Path, **shards: Tensors) -> Path:
    """A folder with a config and either `model=...` alone or several shards under an index."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    if "model" not in shards:
        write_index(folder, {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def load_all(folder: Path) -> None:
    source = streamed(folder)
    source.load_outer(torch.zeros(1, dtype=torch.long), "whole")
    for block in source.anatomy.blocks:
        source.load_block(block.index)


def various() -> Tensors:
    """Every stored dtype, a scalar, and a tensor without elements."""
    draw = torch.Generator().manual_seed(0)
    found = {
        str(dtype).removeprefix("torch."): torch.randn(3, 5, generator=draw).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    found |= {
        str(dtype).removeprefix("torch."): torch.randint(0, 100, (7,), generator=draw).to(dtype)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    }
    return found | {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}


def test_entries_tell_shape_dtype_and_size(tmp_path: Path) -> None:
    reader = Reader(make_folder(tmp_path / "m", model=various()))
    assert reader.files == [SINGLE_NAME]
    assert reader.entries.keys() == various().keys()
    for name, tensor in various().items():
        entry = reader.entries[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert (entry.count, entry.bytes) == (tensor.numel(), tensor.numel() * tensor.element_size())


def test_read_gives_what_safetensors_gives(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", model=various())
    expected = load_file(folder / SINGLE_NAME)
    for found in (Reader(folder).read(expected), read_file(folder / SINGLE_NAME)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_read_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", model={"a": torch.ones(4), "b": torch.ones(4)})
    reader = Reader(folder)
    first = reader.read(["a", "b"])
    first["a"].zero_()
    assert first["b"].sum() == 4
    assert reader.read(["a"])["a"].sum() == 4  # neither a second read nor the file saw the change
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, folder / SINGLE_NAME)
    assert first["b"].sum() == 4  # nor does a changed file reach into what was read


@pytest.mark.parametrize("chunk", [1, 7, 12, 64, 4 << 20])
def test_rows_and_chunks_give_the_whole_tensor_a_part_at_a_time(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.checkpoint.reader._CHUNK_BYTES", chunk)
    tensors = various()
    reader = Reader(make_folder(tmp_path / "m", model=tensors))
    for name, tensor in tensors.items():
        memory = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        parts = [bytes(part) for part in reader.chunks(name)]
        assert b"".join(parts) == memory, name
        assert all(0 < len(part) <= chunk for part in parts), name
        if not tensor.ndim:
            continue
        found = [(start, rows.clone()) for start, rows in reader.rows(name)]
        assert torch.equal(torch.cat([rows for _, rows in found], 0) if found else tensor[:0], tensor), name
        firsts = [start for start, _ in found]
        assert firsts == [sum(len(rows) for _, rows in found[:number]) for number in range(len(found))], name
        width = tensor[0].numel() * tensor.element_size() if len(tensor) else 0
        assert all(rows.dtype == tensor.dtype and len(rows) * width <= max(chunk, width) for _, rows in found), name


def test_a_file_that_changes_while_it_is_read_is_no_input_error(tmp_path: Path) -> None:
    # an InputError in the middle of a run would have its output removed
    folder = make_folder(tmp_path / "m", model={"a": torch.ones(1000)})
    reader = Reader(folder)
    whole = (folder / SINGLE_NAME).read_bytes()
    (folder / SINGLE_NAME).write_bytes(whole[:2000])
    for read in (lambda: reader.read(["a"]), lambda: list(reader.rows("a")), lambda: list(reader.chunks("a"))):
        with pytest.raises(StorageError, match="ended while it was read"):
            read()
    (folder / SINGLE_NAME).unlink()
    for read in (
        lambda: reader.read(["a"]),
        lambda: list(reader.rows("a")),
        lambda: list(reader.chunks("a")),
        reader.sha256,
    ):
        with pytest.raises(StorageError, match=r"cannot read '.*model\.safetensors': No such file"):
            read()


def test_indexed_shards_read_as_one(tmp_path: Path) -> None:
    parts = {"one": {"a": torch.arange(3.0)}, "two": {"b": torch.arange(4.0), "c": torch.arange(5.0)}}
    reader = Reader(make_folder(tmp_path / "m", **parts))
    assert reader.files == ["one.safetensors", "two.safetensors"]
    assert {name: entry.file for name, entry in reader.entries.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
        "c": "two.safetensors",
    }
    found = reader.read(["c", "a"])
    assert torch.equal(found["a"], torch.arange(3.0))
    assert torch.equal(found["c"], torch.arange(5.0))


def test_a_single_file_wins_over_a_stale_index(tmp_path: Path) -> None:
    # transformers loads model.safetensors too where both are there
    folder = make_folder(tmp_path / "m", model={"a": torch.ones(1)})
    write_index(folder, {"a": "gone.safetensors"})
    assert Reader(folder).files == [SINGLE_NAME]


def test_hashes_cover_config_and_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    names = ["config.json", "one.safetensors", "two.safetensors"]
    assert Reader(folder).sha256() == {name: sha256_file(folder / name) for name in names}


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Reader(folder)
    return str(caught.value)


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"model folder '{tmp_path / 'nowhere'}' does not exist"


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    assert "is a file: name the folder" in refusal(tmp_path / "m.safetensors")


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\xff"])
def test_refuses_a_config_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(("quantisation", "words"), [({"quant_method": "gptq"}, "(gptq)"), ({}, ""), ("gptq", "")])
def test_refuses_a_quantised_model(tmp_path: Path, quantisation: object, words: str) -> None:
    folder = make_folder(tmp_path / "m", model={"a": torch.ones(1)})
    edit_config(folder, quantization_config=quantisation)
    message = refusal(folder)
    assert "is quantised" in message
    assert words in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_refuses_pickled_weights_and_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert name in message
    assert "save_pretrained" in message


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert SINGLE_NAME in refusal(tmp_path)


def test_refuses_a_truncated_file_wherever_it_was_cut(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", model={"a": torch.randn(64), "b": torch.randn(64)})
    whole = (folder / SINGLE_NAME).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 4, 8, header // 2, header - 1, header, header + 256, len(whole) - 1):
        (folder / SINGLE_NAME).write_bytes(whole[:length])
        message = refusal(folder)
        assert SINGLE_NAME in message, length
        assert "not a whole safetensors file" in message, length


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_refuses_a_broken_index(tmp_path: Path, content: str) -> None:
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)})
    (folder / INDEX_NAME).write_text(content)
    assert "is not a safetensors index" in refusal(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/../../x.safetensors", "/etc/x.safetensors"])
def test_refuses_an_index_that_points_outside(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")  # it is there: only the path is wrong
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)})
    (folder / "sub").mkdir()
    write_index(folder, {"a": file})
    message = refusal(folder)
    assert "points outside the folder" in message
    assert f"'{file}'" in message


def test_refuses_an_index_naming_a_missing_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    (folder / "two.safetensors").unlink()
    assert "names 'two.safetensors', which is missing" in refusal(folder)


def test_refuses_an_index_promising_what_its_file_lacks(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)})
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    assert "promises tensor 'b' in 'one.safetensors'" in refusal(folder)


def test_refuses_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", one={"a": torch.ones(1)}, two={"a": torch.ones(1), "b": torch.ones(1)})
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    assert refusal(folder) == "tensor 'a' stands in both 'one.safetensors' and 'two.safetensors'"


def test_refuses_a_dtype_it_cannot_prune(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", model={"a": torch.ones(4).to(torch.float8_e4m3fn)})
    message = refusal(folder)
    assert "'a'" in message
    assert "F8_E4M3" in message


# From here on the folder is readable, but it is not a model.

UP = "model.layers.2.mlp.up_proj.weight"


def test_refuses_a_missing_tensor(llama_folder: Path) -> None:
    edit_weights(llama_folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match=f"lacks 1 tensors its config.json asks for: '{re.escape(UP)}'"):
        streamed(llama_folder)


def test_refuses_an_unexpected_tensor(llama_folder: Path) -> None:
    edit_weights(llama_folder, lambda tensors: tensors.update({"model.layers.9.extra.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=re.escape("does not know: 'model.layers.9.extra.weight'")):
        streamed(llama_folder)


def test_refuses_a_wrong_shape(llama_folder: Path) -> None:
    edit_weights(llama_folder, lambda tensors: tensors.update({UP: torch.ones(48, 31)}))
    with pytest.raises(InputError) as caught:
        streamed(llama_folder)
    for part in (UP, "[48, 31]", "[48, 32]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        (UP, "block 2"),
        ("model.layers.0.input_layernorm.weight", "block 0"),
        ("model.norm.weight", "outside the blocks"),
    ],
)
def test_refuses_weights_that_are_not_finite(llama_folder: Path, name: str, where: str, value: float) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name].view(-1)[5] = value

    edit_weights(llama_folder, damage)
    with pytest.raises(InputError, match=re.escape(f"tensor '{name}' ({where}) holds 1 NaN or infinite values")):
        load_all(llama_folder)


def test_refuses_the_folders_own_code_unless_it_is_trusted(llama_folder: Path) -> None:
    edit_config(llama_folder, model_type="strange", auto_map={"AutoConfig": "code.StrangeConfig"})
    (llama_folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="--trust-remote-code"):
        streamed(llama_folder)


def test_refuses_an_unknown_model_type(llama_folder: Path) -> None:
    edit_config(llama_folder, model_type="strange")
    with pytest.raises(InputError, match=r"not a config transformers knows.*strange"):
        streamed(llama_folder)


@pytest.mark.parametrize("model_type", ["t5", "vit", "clip"])
def test_refuses_what_is_no_causal_language_model(llama_folder: Path, model_type: str) -> None:
    (llama_folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match="does not describe a causal language model"):
        streamed(llama_folder)


def test_refuses_mixtures_of_experts_for_now(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "mixtral")
    with pytest.raises(InputError):  # stored per expert or stacked, by release: either is refused
        streamed(tmp_path)
