"""Hidden states in memory and in files against a list of tensors; what was saved is found again by any number of processes."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limits import small_files
from prunekit.checkpoint.writer import is_leftover
from prunekit.errors import StorageError
from prunekit.model import hidden
from prunekit.model.hidden import HiddenStates, InFiles, InMemory, Place, Scratch, is_whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Oracle:
    """All windows of a run in a plain list, and the same in objects under test, each with a part of the windows."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.draw = torch.Generator().manual_seed(seed)
        self.now: list[torch.Tensor] = []
        self.index = -1
        self.parts: list[tuple[HiddenStates, Place]] = []

    @property
    def window(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    def close(self) -> None:
        for states, _ in self.parts:
            states.close()

    def share(self, cuts: list[int], kinds: list[bool]) -> None:
        """New objects for the windows between `cuts`, in files or in memory as `kinds` says by turns."""
        self.close()
        edges = [0, *sorted({cut % self.shape[0] for cut in cuts} - {0}), self.shape[0]]
        self.parts = []
        for number, (start, stop) in enumerate(pairwise(edges)):
            place = Place(self.folder, start)
            shape = (stop - start, *self.shape[1:])
            states = InFiles(shape, self.dtype, place) if kinds[number % len(kinds)] else InMemory(shape, self.dtype)
            self.parts.append((states, place))

    def block(self, batch: int) -> None:
        """What a block does: read the inputs a batch at a time, write outputs, turn."""
        following = [torch.randn(self.shape[1:], generator=self.draw).to(self.dtype) for _ in range(self.shape[0])]
        for states, place in self.parts:
            count = states.shape[0]
            for start in range(0, count, batch):
                part = slice(start, start + batch)  # the last may reach beyond the end, as slices may
                mine = slice(place.first + start, place.first + min(start + batch, count))
                if self.now:
                    assert torch.equal(states[part], torch.stack(self.now[mine]))
                states[part] = torch.stack(following[mine])
            states.turn()
        self.now = following
        self.index += 1

    def check(self) -> None:
        for states, place in self.parts:
            mine = self.now[place.first : place.first + states.shape[0]]
            assert torch.equal(states[:], torch.stack(mine))
            assert (states.shape, states.dtype) == ((len(mine), *self.shape[1:]), self.dtype)
            assert torch.equal(states[-1:], mine[-1][None])

    def save(self) -> list[dict[str, Any]]:
        return [states.save(place) for states, place in self.parts]

    def stored(self) -> bytes:
        return b"".join(window.reshape(-1).view(torch.uint8).numpy().tobytes() for window in self.now)


kinds_of_parts = st.lists(st.booleans(), min_size=1, max_size=3)
cuts_of_parts = st.lists(st.integers(0, 100), max_size=3)


@settings(deadline=None)
@given(st.data())
def test_any_run_reads_what_it_wrote_however_it_is_kept_saved_and_shared(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 5)), "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    with TemporaryDirectory() as name, ExitStack() as stack:
        run = stack.enter_context(closing(Oracle(Path(name), shape, dtype, data.draw(st.integers(0, 1000), "seed"))))
        run.share(data.draw(cuts_of_parts, "cuts"), data.draw(kinds_of_parts, "in files"))
        notes: dict[int, list[dict[str, Any]]] = {}
        for _ in range(data.draw(st.integers(1, 5), "blocks")):
            run.block(data.draw(st.integers(1, 8), "batch"))
            run.check()
            notes.pop(run.index - 2, None)  # its file is written over
            if data.draw(st.booleans(), "save"):
                notes[run.index] = run.save()
                path = Place(Path(name)).file(run.index)
                assert path.read_bytes()[: len(run.stored())] == run.stored()
                assert sorted(part["start"] for part in notes[run.index]) == [place.first for _, place in run.parts]
                for part in notes[run.index]:
                    mine = run.stored()[part["start"] * run.window : part["stop"] * run.window]
                    assert part["sha256"] == hashlib.sha256(mine).hexdigest()
                if data.draw(st.booleans(), "continue with others"):
                    run.share(data.draw(cuts_of_parts, "cuts"), data.draw(kinds_of_parts, "in files"))
                    for states, place in run.parts:
                        states.load(place, run.index)
                    run.check()
            if run.index in notes:
                # the inputs of the block before are still whole when those behind it are saved, whoever keeps them
                assert all(
                    is_whole(Place(Path(name)).file(index), notes[index], run.window)
                    for index in notes
                    if index >= run.index - 1
                )


@pytest.fixture(params=["memory", "files"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[dict[str, Any]], int]:
    """A file of seven windows saved by three processes, their notes, and the bytes of a window."""
    run = Oracle(tmp_path, (7, 3, 5), torch.float32, 0)
    run.share([2, 6], [request.param == "files"])
    run.block(2)
    notes = run.save()
    for states, _ in run.parts:
        states.close()
    return Place(tmp_path).file(0), notes, run.window


def test_a_saved_file_is_whole(saved: tuple[Path, list[dict[str, Any]], int]) -> None:
    path, notes, window = saved
    assert is_whole(path, notes, window)
    with path.open("ab") as stream:  # longer than it need be: more windows of an earlier run
        stream.write(b"beyond")
    assert is_whole(path, notes, window)


def test_a_flipped_bit_anywhere_is_found(saved: tuple[Path, list[dict[str, Any]], int]) -> None:
    path, notes, window = saved
    whole = path.read_bytes()
    assert len(whole) == 7 * window
    for place in range(len(whole)):
        torn = bytearray(whole)
        torn[place] ^= 1
        path.write_bytes(torn)
        assert not is_whole(path, notes, window), place


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "gone", "a folder"])
def test_a_torn_file_is_found(saved: tuple[Path, list[dict[str, Any]], int], damage: str) -> None:
    path, notes, window = saved
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": content[:-1], "empty": b"", "zeros": bytes(len(content))}[damage])
    assert not is_whole(path, notes, window)


def test_looking_for_a_file_does_not_make_it(tmp_path: Path) -> None:
    assert not is_whole(tmp_path / "nothing", [{"start": 0, "stop": 1, "sha256": ""}], 4)
    assert list(tmp_path.iterdir()) == []


def filled(states: HiddenStates, value: float) -> HiddenStates:
    states[0 : states.shape[0]] = torch.full(states.shape, value)
    states.turn()
    return states


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_two_files_take_turns_and_are_written_over(kind: str, tmp_path: Path) -> None:
    shape, place = (4, 2, 3), Place(tmp_path)
    states = InMemory(shape, torch.float32) if kind == "memory" else InFiles(shape, torch.float32, place)
    files = []
    for index in range(4):
        filled(states, float(index))
        states.save(place)
        status = place.file(index).stat()
        files.append((place.file(index).name, status.st_ino, status.st_size))
    states.close()
    assert files[2:] == files[:2], "the same files: new ones would cost their pages again"
    assert files[0] != files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name for name, _, _ in files[:2])
    assert {size for _, _, size in files} == {4 * 2 * 3 * 4}


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_values_of_any_dtype_and_layout_are_taken(kind: str, tmp_path: Path) -> None:
    shape, place = (2, 3, 4), Place(tmp_path)
    states: HiddenStates = InMemory(shape, torch.bfloat16)
    if kind == "files":
        states = InFiles(shape, torch.bfloat16, place)
    values = torch.randn(4, 3, 2).permute(2, 1, 0)  # float32, and not contiguous
    states[0:2] = values
    states.turn()
    assert torch.equal(states[:], values.bfloat16())
    assert states[:].dtype == torch.bfloat16
    states.close()


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_what_is_saved_has_been_synced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    synced = []
    real = os.fsync

    def note(handle: int) -> None:
        real(handle)
        status = os.fstat(handle)
        synced.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", note)
    shape = (4, 2, 3)
    states = filled(InMemory(shape, torch.float32) if kind == "memory" else InFiles(shape, torch.float32, place), 1.0)
    states.save(place)
    states.close()
    status = place.file(0).stat()
    assert synced == [(status.st_ino, status.st_size)]
    assert status.st_size == 4 * 2 * 3 * 4


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    place = Place(tmp_path)
    in_files = InFiles((4, 10, 10), torch.float32, place)
    with pytest.raises(StorageError, match=r"cannot keep the hidden states in '.*hidden-0'"), small_files(100):
        filled(in_files, 1.0)
    in_files.close()
    in_memory = filled(InMemory((4, 10, 10), torch.float32), 1.0)
    with pytest.raises(StorageError, match=r"cannot keep the hidden states in '.*hidden-0'"), small_files(100):
        in_memory.save(place)


def test_a_failing_sync_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    place = Place(tmp_path)
    in_files = InFiles((2, 3, 4), torch.float32, place)
    for states in (in_files, InMemory((2, 3, 4), torch.float32)):
        with pytest.raises(StorageError, match="hidden-0': Input/output error"):
            filled(states, 1.0).save(place)
    in_files.close()


def test_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    place = Place(tmp_path / "gone")
    for states in (InFiles((2, 3, 4), torch.float32, place), InMemory((2, 3, 4), torch.float32)):
        with pytest.raises(StorageError, match=r"cannot open '.*hidden-0': No such file"):
            filled(states, 1.0).save(place)


def test_a_file_that_ends_early_is_a_storage_error(tmp_path: Path) -> None:
    place = Place(tmp_path)
    states = filled(InFiles((4, 2, 3), torch.float32, place), 1.0)
    os.truncate(place.file(0), 30)
    with pytest.raises(StorageError, match="ended while it was read"):
        states[0:4]
    states.close()
    with pytest.raises(StorageError, match="ended while it was read"):
        InMemory((4, 2, 3), torch.float32).load(place, 0)


def test_a_file_that_cannot_be_read_is_a_storage_error() -> None:
    class Damaged:
        name = "the file"

        def readinto(self, memory: memoryview) -> int:
            raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match="'the file': Input/output error"):
        hidden._read(Damaged(), memoryview(bytearray(4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("free", "kind"), [(2 * 96, InMemory), (2 * 96 - 1, InFiles), (0, InFiles)])
def test_room_is_in_memory_or_in_files_that_go_again(
    free: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "available_memory_bytes", lambda: free)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Scratch().room_for((4, 2, 3), torch.float32, torch.device("cpu")) as states:  # 96 bytes
        assert type(states) is kind
        filled(states, 2.0)
        filled(states, 3.0)
        assert torch.equal(states[:], torch.full((4, 2, 3), 3.0))
        kept = [path for path in tmp_path.rglob(".prunekit-hidden-*") if path.is_file()]
        assert len(kept) == (2 if kind is InFiles else 0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_may_take_and_its_folder_hold_for_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    for most, asked, kind in ((96, None, InMemory), (95, None, InFiles), (96, 95, InFiles)):
        with Scratch(most, tmp_path).room_for((4, 2, 3), torch.float32, torch.device("cpu"), asked) as states:
            assert type(states) is kind
            filled(states, 2.0)
            left = list(tmp_path.iterdir())
            assert all(is_leftover(path) for path in left)
            assert len(left) == (kind is InFiles)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_room_is_given_back_after_an_error(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "available_memory_bytes", lambda: free)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(states: HiddenStates) -> None:
        filled(states, 1.0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Scratch().room_for((4, 2, 3), torch.float32, torch.device("cpu")) as states:
        fail(states)
    assert list(tmp_path.iterdir()) == []
    if isinstance(states, InMemory):
        with pytest.raises(AssertionError, match="the walk is over"):
            _ = states.tensor
