"""A file written as a stream is, byte for byte, the one the safetensors library writes, and its hash is the file's."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prunekit
from helpers import read_only
from limits import small_files
from prunekit.checkpoint import reader
from prunekit.checkpoint.reader import DTYPES, Reader
from prunekit.checkpoint.shard import Piece, write_shard
from prunekit.errors import StorageError

Tensors = dict[str, torch.Tensor]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of any bits at all, save that a bool is 0 or 1."""
    count = torch.Size(shape).numel()
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=draw).bool()
    bits = torch.randint(0, 256, (count * dtype.itemsize,), generator=draw, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def library(path: Path, tensors: Tensors) -> bytes:
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def folder_with(folder: Path, tensors: Tensors) -> Reader:
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Reader(folder)


names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.one_of(st.just(()), st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple))
described = st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(DTYPES)), st.integers(0, 99)), max_size=8)


@settings(deadline=None)
@given(described)
def test_any_tensors_are_written_as_the_library_writes_them(
    wanted: dict[str, tuple[tuple[int, ...], str, int]],
) -> None:
    tensors = {name: make(shape, DTYPES[dtype], seed) for name, (shape, dtype, seed) in wanted.items()}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ours.safetensors"
        digest = write_shard(path, [Piece.of(name, tensor) for name, tensor in tensors.items()])
        ours = path.read_bytes()
        assert ours == library(Path(folder) / "theirs.safetensors", tensors)
        assert digest == hashlib.sha256(ours).hexdigest()
        stored = folder_with(Path(folder), tensors)
        again = write_shard(path, [Piece.stored(name, stored) for name in tensors])
        assert path.read_bytes() == ours
        assert again == digest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (7,), (3, 5), (2, 1, 3, 2)])
def test_every_dtype_and_shape(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    tensors = {"it": make(shape, DTYPES[dtype]), "other": torch.ones(3)}
    write_shard(tmp_path / "ours", [Piece.of(name, tensor) for name, tensor in tensors.items()])
    assert (tmp_path / "ours").read_bytes() == library(tmp_path / "theirs", tensors)
    found = load_file(tmp_path / "ours")
    assert {name: (found[name].dtype, found[name].shape) for name in tensors} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }


def test_every_dtype_is_in_the_librarys_order(tmp_path: Path) -> None:
    tensors = {f"{name}{number}": make((3,), dtype) for name, dtype in DTYPES.items() for number in range(2)}
    for order in (list(tensors), list(reversed(tensors))):
        write_shard(tmp_path / "ours", [Piece.of(name, tensors[name]) for name in order])
        assert (tmp_path / "ours").read_bytes() == library(tmp_path / "theirs", tensors)


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = make((6, 4), torch.float32)
    tensors = {"turned": tensor.t(), "some": tensor[::2, 1:3], "spread": torch.ones(1).expand(5)}
    write_shard(tmp_path / "ours", [Piece.of(name, part) for name, part in tensors.items()])
    whole = {name: part.contiguous() for name, part in tensors.items()}
    assert (tmp_path / "ours").read_bytes() == library(tmp_path / "theirs", whole)


CHUNK = reader._CHUNK_BYTES


@pytest.mark.parametrize("count", [CHUNK // 2 - 1, CHUNK // 2, CHUNK // 2 + 1, 5 * CHUNK // 4 + 3])
def test_a_stored_tensor_larger_than_a_chunk_is_copied_as_it_is(count: int, tmp_path: Path) -> None:
    large = make((count,), torch.bfloat16)
    tensors = {"large": large, "small": make((5,), torch.float32), "second": make((3, 7), torch.bfloat16)}
    stored = folder_with(tmp_path, tensors)
    parts = list(map(len, Piece.stored("large", stored).chunks))
    assert sum(parts) == 2 * count
    assert max(parts) <= CHUNK
    assert len(parts) == -(-2 * count // CHUNK)
    digest = write_shard(tmp_path / "ours", [Piece.stored(name, stored) for name in tensors])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_a_piece_is_described_by_what_it_stores(tmp_path: Path) -> None:
    tensor = make((3, 5), torch.bfloat16)
    stored = folder_with(tmp_path, {"it": tensor})
    for piece in (Piece.of("it", tensor), Piece.stored("it", stored)):
        assert (piece.name, piece.shape, piece.dtype, piece.bytes) == ("it", (3, 5), torch.bfloat16, 30)
        assert b"".join(map(bytes, piece.chunks)) == tensor.view(torch.uint8).numpy().tobytes()


COPY = """
import sys
from pathlib import Path
from prunekit.checkpoint.reader import Reader
from prunekit.checkpoint.shard import Piece, write_shard
from prunekit.machine import peak_rss_bytes, rss_bytes
folder = Path(sys.argv[1])
stored = Reader(folder)
write_shard(folder / "first", [Piece.stored("small", stored)])
before = rss_bytes()
write_shard(folder / "copy", [Piece.stored("large", stored)])
print(peak_rss_bytes() - before)
"""


def test_a_copied_tensor_is_never_in_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to know what a process takes")
    size = 128 << 20
    large = torch.zeros(size, dtype=torch.uint8)
    folder_with(tmp_path, {"large": large, "small": torch.zeros(CHUNK * 2, dtype=torch.uint8)})
    del large
    path = os.pathsep.join([str(Path(prunekit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COPY, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert (tmp_path / "copy").stat().st_size > size
    assert int(done.stdout) < size // 4


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write_shard(path, [Piece.of("it", torch.ones(3))])
    before = path.read_bytes()
    with pytest.raises(StorageError, match=rf"cannot write '{path}'"), small_files(100_000):
        write_shard(path, [Piece.of("it", torch.ones(1 << 20))])
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_cannot_even_remove_says_what_happened_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as when the system makes it read-only because it is damaged
    def damaged(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", damaged)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StorageError, match="Input/output error"):
        write_shard(tmp_path / "it", [Piece.of("it", torch.ones(3))])


def test_a_source_that_cannot_be_read_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    stored = folder_with(tmp_path, {"it": torch.ones(1000)})
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(StorageError, match=r"'model\.safetensors' ended while it was read"):
        write_shard(tmp_path / "ours", [Piece.stored("it", stored)])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"cannot read '.*model\.safetensors': No such file"):
        write_shard(tmp_path / "ours", [Piece.stored("it", stored)])
    assert [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_a_stream_that_takes_little_at_a_time_is_given_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open
    sizes = []

    class Slow:
        """Takes at most 1000 bytes a call, as the system may."""

        def __init__(self, path: Path) -> None:
            self._stream = real(path, "wb", buffering=0)

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self._stream.close()

        def write(self, part: memoryview) -> int:
            sizes.append(min(len(part), 1000))
            self._stream.write(part[:1000])
            return sizes[-1]

    def slowly(self: Path, mode: str = "r", **named: int) -> object:
        return Slow(self) if mode == "wb" else real(self, mode, **named)

    tensors = {"it": make((2500,), torch.float32)}
    expected = library(tmp_path / "theirs", tensors)
    monkeypatch.setattr(Path, "open", slowly)
    digest = write_shard(tmp_path / "ours", [Piece.of("it", tensors["it"])])
    monkeypatch.undo()
    assert (tmp_path / "ours").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()
    assert len(sizes) > 10
