"""A name never stands for half a file, the index says where everything lies, and the user's own files are left alone."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limits import small_files
from prunekit.checkpoint.reader import INDEX_NAME, sha256_file
from prunekit.checkpoint.shard import Piece
from prunekit.checkpoint.storage import replace_file, write_json, write_text
from prunekit.checkpoint.writer import JOURNAL_NAME, Journal, Writer, clear, difference
from prunekit.errors import InputError, StorageError


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece.of(name, tensor) for name, tensor in tensors.items()]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def narrow_umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


@pytest.mark.parametrize("problem", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, problem: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise problem

    with pytest.raises(type(problem)):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["file"]


def test_the_system_refusing_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError) as caught:
        write_text(path, "new")
    assert str(caught.value) == f"cannot write '{path}': No space left on device"
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["file"]


def test_writing_into_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        write_text(tmp_path / "gone" / "file", "text")


def test_files_get_the_users_usual_permissions(tmp_path: Path, narrow_umask: int) -> None:
    # safetensors makes its files private; a folder that others should read would be half unreadable
    write_json(tmp_path / "file.json", {"a": 1})
    record = Writer(tmp_path, 1).write_shard(0, pieces({"a": torch.ones(2)}))
    for name in ("file.json", record["file"]):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == narrow_umask, name


def test_json_keeps_letters_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"ä": [1]})
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"ä": [1]}


def test_shards_are_named_as_every_loader_knows_them(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 31)
    assert writer.shard_name(0) == "model-00001-of-00031.safetensors"
    assert writer.shard_name(30) == "model-00031-of-00031.safetensors"


def test_a_shard_record_describes_its_file(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    record = Writer(tmp_path, 2).write_shard(1, pieces(tensors))
    path = tmp_path / "model-00002-of-00002.safetensors"
    assert record == {
        "position": 1,
        "file": path.name,
        "sha256": sha256_file(path),
        "tensors": ["a", "b"],
        "bytes": 24 + 10,
    }
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_a_disk_that_fills_up_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="model-00001-of-00001"), small_files(1 << 20):
        Writer(tmp_path, 1).write_shard(0, pieces({"a": torch.ones(1 << 20)}))
    assert listing(tmp_path) == []


def test_the_index_maps_every_tensor_and_counts_bytes(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2)
    records = [
        writer.write_shard(0, pieces({"z": torch.ones(3)})),
        writer.write_shard(1, pieces({"b": torch.ones(2, dtype=torch.float16), "a": torch.ones(1)})),
    ]
    writer.write_index(records)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 12 + 4 + 4
    assert index["weight_map"] == {
        "a": "model-00002-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "z": "model-00001-of-00002.safetensors",
    }
    writer.withdraw_index()
    assert not (tmp_path / INDEX_NAME).exists()


CARRIED = [
    "LICENSE",
    "NOTICE.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = [
    "README.md",
    "evaluation.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "prunekit.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "picture.png",
    "report.html",
]


@pytest.mark.parametrize("with_code", [False, True])
def test_what_is_carried_over(tmp_path: Path, with_code: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (source / "onnx").mkdir()
    target.mkdir()
    for name in [*CARRIED, *LEFT, "config.json", "modeling_x.py"]:
        (source / name).write_text(f"content of {name}")
    carried = Writer(target, 1).carry_over(source, with_code=with_code)
    code = ["modeling_x.py"] if with_code else []
    templates = "additional_chat_templates/tools.jinja"
    assert sorted(carried) == sorted([*CARRIED, *code, "config.json", templates])
    assert carried[-1] == "config.json"  # without it nothing loads, so it comes when the rest is there
    assert listing(target) == sorted([*CARRIED, *code, "config.json", "additional_chat_templates"])
    assert (target / "tokenizer.json").read_text() == "content of tokenizer.json"
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


def written_journal(folder: Path, shards: int = 3) -> Journal:
    journal = Journal.fresh(folder, {"recipe": {"seed": 0}})
    writer = Writer(folder, shards)
    for position in range(shards):
        journal.add(
            writer.write_shard(position, pieces({f"t{position}": torch.full((4,), float(position))})), [{"name": "x"}]
        )
    return journal


def test_a_journal_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = written_journal(tmp_path)
    found = Journal.read(tmp_path)
    assert found == journal
    assert found is not None
    assert found.shards[1]["linears"] == [{"name": "x"}]
    assert found.whole_shards() == journal.shards


def test_no_journal_where_none_was_written(tmp_path: Path) -> None:
    assert Journal.read(tmp_path) is None
    Journal.fresh(tmp_path, {})  # a run that has finished no shard leaves nothing to resume
    assert Journal.read(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_torn_shard_is_not_whole(tmp_path: Path, damage: str) -> None:
    journal = written_journal(tmp_path)
    path = tmp_path / journal.shards[1]["file"]
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    assert journal.whole_shards() == [journal.shards[0], journal.shards[2]]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"identity": {}}',
        '{"identity": {}, "shards": []}',
        '{"identity": 1, "shards": [], "hidden": []}',
        '{"identity": {}, "shards": [1], "hidden": []}',
        '{"identity": {}, "shards": [], "hidden": [1]}',
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / JOURNAL_NAME).write_text(content)
    with pytest.raises(InputError, match="--overwrite"):
        Journal.read(tmp_path)


def test_difference_names_what_differs_with_both_values() -> None:
    found = {"recipe": {"seed": 0, "parts": {}}, "tokens": "a", "same": 1}
    wanted = {"recipe": {"seed": 1, "parts": {}}, "tokens": "b", "same": 1, "new": None}
    assert difference(found, wanted) == ["recipe.seed is 0 there and 1 here", 'tokens is "a" there and "b" here']
    assert difference(found, found) == []


def test_clear_leaves_the_users_other_files(tmp_path: Path) -> None:
    written_journal(tmp_path)
    ours = ("config.json", "tokenizer.json", "README.md", "report.html", "evaluation.json")
    for name in (*ours, INDEX_NAME, ".x.safetensors.prunekit-tmp"):
        (tmp_path / name).touch()
    (tmp_path / "custom_table.txt").touch()
    (tmp_path / "prunekit.json").write_text(json.dumps({"outputs": {"custom_table.txt": "", "../outside": ""}}))
    for name in ("notes.md", "data.json", ".hidden"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "runs").mkdir()
    clear(tmp_path)
    assert listing(tmp_path) == [".hidden", "data.json", "notes.md", "runs"]


def test_clear_removes_a_folder_that_held_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    written_journal(folder)
    clear(folder)
    assert not folder.exists()
    clear(folder)  # and does not mind that it is gone


def test_files_are_written_in_the_place_of_the_sources(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in ("config.json", "tokenizer.json", "modeling_prunekit.py"):
        (source / name).write_text("old")
    carried = Writer(target, 1).carry_over(source, with_code=True, written={"config.json": "new", "extra.json": "more"})
    assert carried == ["extra.json", "tokenizer.json", "config.json"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "config.json": "new",
        "extra.json": "more",
        "tokenizer.json": "old",
    }
