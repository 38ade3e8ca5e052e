"""The packed form: its bytes are those the document says, every bit comes back, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import reader as reading
from prunekit.checkpoint.bitmask import INDEX_NAME, header_of, pack_mask, pack_values
from prunekit.checkpoint.packing import packed_sheets
from prunekit.checkpoint.reader import Reader, read_file
from prunekit.checkpoint.shard import write_shard
from prunekit.errors import InputError, StorageError

FILE = "bitmask-00001-of-00001.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def any_bits(rows: int, columns: int, dtype: torch.dtype, *, share: float, seed: int = 0) -> torch.Tensor:
    """A matrix of any bits at all (NaN, infinities, -0, ...) of which about `share` is +0."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (rows * columns * dtype.itemsize,), generator=draw, dtype=torch.uint8)
    weight = bits.view(dtype).reshape(rows, columns)
    weight[torch.rand(rows, columns, generator=draw) < share] = 0
    weight[torch.rand(rows, columns, generator=draw) < 0.05] = -0.0
    return weight


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[left.dtype.itemsize]
    return left.dtype == right.dtype and torch.equal(left.view(whole), right.view(whole))


def plain_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> Reader:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return Reader(folder)


def packed_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> Reader:
    """The same tensors packed, by way of a plain folder."""
    folder.mkdir(exist_ok=True)
    (sheet,) = packed_sheets(plain_folder(folder / "plain", tensors))
    write_shard(folder / FILE, sheet.pieces, sheet.metadata)
    (folder / "config.json").write_text("{}")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))
    assert (folder / FILE).stat().st_size == sheet.bytes
    return Reader(folder)


def unpacked_by_the_document(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """docs/bitmask.md followed word by word, with nothing of prunekit: bits as whole numbers, by tensor name."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    said = json.loads(header["__metadata__"]["prunekit.bitmask"])
    assert said["version"] == 1

    def stored(name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        return raw[8 + length + start : 8 + length + stop]

    found = {}
    for name, (rows, columns) in said["packed"].items():
        mask = stored(f"{name}.mask")
        width = (columns + 7) // 8
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[header[f"{name}.values"]["dtype"]]
        values = iter(np.frombuffer(stored(f"{name}.values"), dtype=f"<i{size}"))
        weight = np.zeros((rows, columns), dtype=f"<i{size}")
        for row in range(rows):
            for column in range(columns):
                if mask[row * width + column // 8] >> (column % 8) & 1:
                    weight[row, column] = next(values)
        assert next(values, None) is None
        found[name] = weight
    return found


def test_bits_of_a_byte_are_the_columns_from_the_lowest_on() -> None:
    weight = torch.tensor([[0.0, 5, 0, -0.0, 0, 0, 0, 0, 7, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]])
    assert pack_mask(weight).tolist() == [[0b00001010, 0b01], [0b00000001, 0b10]]
    values = pack_values(weight)
    assert values.tolist() == [5, 0, 7, 1, 2]
    assert bool(values[1].signbit())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_document_unpacks_what_is_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"w{columns}": any_bits(5, columns, dtype, share=0.6, seed=columns) for columns in (16, 19, 33)}
    packed_folder(tmp_path, tensors)
    found = unpacked_by_the_document(tmp_path / FILE)
    assert found.keys() == tensors.keys()
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for name, weight in tensors.items():
        assert found[name].tolist() == weight.view(whole).tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(FLOATS),
    st.floats(0, 1),
    st.integers(0, 99),
    st.integers(1, 400),
)
def test_every_bit_comes_back_however_it_is_read(
    rows: int, columns: int, dtype: torch.dtype, share: float, seed: int, chunk: int
) -> None:
    weight = any_bits(rows, columns, dtype, share=share, seed=seed)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK_BYTES", chunk)
        stored = packed_folder(Path(folder), {"it": weight, "other": torch.ones(3)})
        entry = stored.entries["it"]
        assert (entry.shape, entry.dtype, entry.bytes) == ((rows, columns), dtype, weight.nbytes)
        assert same_bits(stored.read(["it"])["it"], weight)
        parts = list(stored.rows("it"))
        assert [start for start, _ in parts] == list(range(0, rows, len(parts[0][1])))
        assert same_bits(torch.cat([part for _, part in parts]), weight)
        assert b"".join(map(bytes, stored.chunks("it"))) == weight.view(torch.uint8).numpy().tobytes()
        assert same_bits(read_file(Path(folder) / FILE)["it"], weight)


def test_half_of_the_entries_take_nine_sixteenths_of_bfloat16(tmp_path: Path) -> None:
    weight = torch.ones(64, 128, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    (sheet,) = packed_sheets(plain_folder(tmp_path, {"it": weight}))
    assert sum(piece.bytes for piece in sheet.pieces) == weight.nbytes * 9 // 16
    assert sheet.packed == {"it": (64, 128)}


def test_what_packing_would_not_make_smaller_stays_plain(tmp_path: Path) -> None:
    few = torch.ones(16, 16, dtype=torch.bfloat16)
    few[0] = 0  # a sixteenth, exactly what the mask takes
    more = few.clone()
    more[1, 0] = 0
    tensors = {
        "dense": torch.ones(8, 8),
        "few": few,
        "more": more,
        "vector": torch.zeros(64),
        "cube": torch.zeros(4, 4, 4),
        "none": torch.zeros(0, 8),
        "taken": torch.zeros(8, 8),
        "taken.mask": torch.zeros(3),
    }
    (sheet,) = packed_sheets(plain_folder(tmp_path, tensors))
    assert sheet.packed.keys() == {"more"}
    stored = packed_folder(tmp_path, tensors)
    assert stored.entries.keys() == tensors.keys()
    assert all(same_bits(tensor, tensors[name]) for name, tensor in stored.read(tensors).items())


def test_the_packed_index_serves_where_there_are_no_plain_weights(tmp_path: Path) -> None:
    stored = packed_folder(tmp_path, {"it": torch.eye(32)})
    assert (stored.index, stored.files) == (INDEX_NAME, [FILE])
    save_file({"it": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert Reader(tmp_path).files == ["model.safetensors"]


# Damage


def edit(folder: Path, change: Any, header: dict[str, str] | None = None) -> None:
    """Write the packed file again with some of its tensors, or what its header says of them, changed."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata=header or header_of({"it": (32, 32)}))


def damage(name: str, index: int, value: int) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return change


@pytest.mark.parametrize(("index", "value"), [(0, 0), (0, 3), (127, 0), (127, 255)])
def test_a_mask_that_does_not_count_its_values_is_refused(index: int, value: int, tmp_path: Path) -> None:
    packed_folder(tmp_path, {"it": torch.eye(32)})
    edit(tmp_path, damage("it.mask", index, value))
    stored = Reader(tmp_path)
    with pytest.raises(InputError, match="damaged: a mask in it has another number of bits than there are values"):
        stored.read(["it"])
    with pytest.raises(InputError, match="damaged"):
        list(stored.rows("it"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("it.mask"),
        lambda tensors: tensors.pop("it.values"),
        lambda tensors: tensors.update({"it.mask": torch.zeros(32, 5, dtype=torch.uint8)}),
        lambda tensors: tensors.update({"it.mask": torch.zeros(32, 4, dtype=torch.int8)}),
        lambda tensors: tensors.update({"it.values": torch.zeros(4, 8)}),
        lambda tensors: tensors.update({"it": torch.zeros(4, 8)}),
    ],
)
def test_a_file_without_what_its_header_promises_is_refused(change: Any, tmp_path: Path) -> None:
    packed_folder(tmp_path, {"it": torch.eye(32)})
    edit(tmp_path, change)
    with pytest.raises(InputError, match="does not hold the mask and the values of 'it'"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "does not say in its header"),
        ("[]", "does not say in its header"),
        ('{"packed": {}}', "does not say in its header"),
        ('{"version": 1, "packed": {"it": [32]}}', "does not say in its header"),
        ('{"version": 2, "packed": {}}', "is packed in version 2, this prunekit reads 1"),
    ],
)
def test_a_header_that_is_not_understood_is_refused(said: str, message: str, tmp_path: Path) -> None:
    packed_folder(tmp_path, {"it": torch.eye(32)})
    edit(tmp_path, lambda tensors: None, {"prunekit.bitmask": said})
    with pytest.raises(InputError, match=message):
        Reader(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_a_storage_error(tmp_path: Path) -> None:
    stored = packed_folder(tmp_path, {"it": torch.eye(32)})
    with (tmp_path / FILE).open("rb+") as stream:
        stream.truncate((tmp_path / FILE).stat().st_size - 1)
    with pytest.raises(StorageError, match="ended while it was read"):
        stored.read(["it"])
