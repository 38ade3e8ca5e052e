"""What the drawn faults would meet only now and then, one by one; and disks that are really full, or really read-only."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prunekit
import tiny
from helpers import contents, read_only, shards, stop_at
from prunekit import InputError, StorageError, machine, pruning
from prunekit.checkpoint import storage, writer
from prunekit.checkpoint.lock import LOCK_NAME
from prunekit.checkpoint.writer import JOURNAL_NAME, Writer, holds_model


class Setting:
    """A model, a text, and what an uninterrupted run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.model, self.text = folder / "model", folder / "text.txt"
        tiny.save_model(self.model, "llama")
        self.text.write_text(tiny.make_text(600), encoding="utf-8")
        self.run(folder / "whole")
        self.whole = contents(folder / "whole")
        self.finished = folder / "finished"
        self.run(self.finished, sparsity=0.25)

    def run(self, out: Path, **options: Any) -> prunekit.Result:
        calibration = {"source": str(self.text), "samples": 4, "length": 32}
        return prunekit.prune(self.model, out=out, calibration=calibration, dtype="float32", **options)

    def same(self, out: Path) -> bool:
        """Whether a folder holds what the uninterrupted run left, save for the times it tells."""
        found = contents(out)
        told = {"prunekit.json", "README.md", "report.html"}
        return found.keys() == self.whole.keys() and all(
            found[name] == self.whole[name] for name in found.keys() - told
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("recovery"))


def interrupt(setting: Setting, out: Path, owner: Any, name: str, call: int = 0, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            setting.run(out, **options)


# Behind the manifest.


@pytest.mark.parametrize("removed", range(3))
def test_what_a_run_killed_behind_its_manifest_left_is_removed(setting: Setting, out: Path, removed: int) -> None:
    # hidden states may be larger than the model
    interrupt(setting, out, writer, "remove", removed)
    (out / LOCK_NAME).touch()
    left = set(contents(out)) - set(setting.whole)
    assert len(left) == 3 - removed + 1, "journal, two files of hidden states, the lock"
    result = setting.run(out, resume=True)
    assert result.verification is not None
    assert setting.same(out)


def test_a_finished_folder_that_cannot_be_tidied_is_finished(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(setting, out, writer, "remove", 2)
    assert (out / JOURNAL_NAME).exists()

    monkeypatch.setattr(Path, "unlink", read_only)
    assert setting.run(out, resume=True).verification is not None


# In the middle of --overwrite.


@pytest.mark.parametrize("again", ["resume", "overwrite"])
@pytest.mark.parametrize("removed", [0, 1, 2, 5, 8])
def test_killed_while_the_old_model_is_removed(setting: Setting, out: Path, removed: int, again: str) -> None:
    shutil.copytree(setting.finished, out)
    (out / "notes.md").write_text("mine")
    interrupt(setting, out, writer, "remove", removed, overwrite=True)
    assert holds_model(out), "or --overwrite would not touch it again"
    if removed == 0 and again == "resume":
        # the old run's manifest is still there, and whole
        with pytest.raises(InputError, match="belongs to another run"):
            setting.run(out, resume=True)
        return
    setting.run(out, **{again: True})
    assert (out / "notes.md").read_text() == "mine"
    (out / "notes.md").unlink()
    assert setting.same(out)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_killed_while_an_unfinished_run_of_another_recipe_is_removed(setting: Setting, out: Path, removed: int) -> None:
    interrupt(setting, out, Writer, "write_shard", 3, sparsity=0.25)
    interrupt(setting, out, writer, "remove", removed, overwrite=True)
    setting.run(out, resume=True)
    assert setting.same(out)


# Refused, or out of room.


@pytest.mark.parametrize("there", [True, False])
def test_a_refused_run_leaves_the_folder_it_was_given(
    there: bool, setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        out.mkdir()
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match="make room"):
        setting.run(out)
    assert out.exists() == there
    assert not there or contents(out) == {}


def test_what_a_stopped_run_has_taken_is_not_asked_for_again(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the disk had just enough room when the run began, and nothing else was put there since
    asked: list[int] = []
    real = pruning.refuse_no_room

    def note(out: Path, needed: int, **named: int) -> None:
        asked.append(needed)
        real(out, needed, **named)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "refuse_no_room", note)
        interrupt(setting, out, Writer, "write_shard", 3)
    room = int(asked[0] * 1.03)

    def free(folder: Path) -> int:
        return max(0, room - sum(path.stat().st_size for path in out.iterdir() if path.name != JOURNAL_NAME))

    assert {path.name for path in out.iterdir()} >= {".prunekit-hidden-0", ".prunekit-hidden-1"}
    torn = sorted(out.glob("*.safetensors"))[-1]
    torn.write_bytes(torn.read_bytes()[::-1])  # it will be written again, in its own place
    monkeypatch.setattr(machine, "free_disk_bytes", free)
    setting.run(out, resume=True)
    monkeypatch.undo()
    assert setting.same(out)


def test_a_finished_shard_that_cannot_be_read_does_not_cost_the_others(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(setting, out, Writer, "write_index")
    before = set(shards(out))

    def damaged(path: Path) -> None:
        raise InputError(f"'{path}' is not a whole safetensors file (Input/output error): copy or download it again")

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "read_file", damaged)
        with pytest.raises(StorageError, match=r"model-00004-of-00004\.safetensors' cannot be read again"):
            setting.run(out, resume=True)
    assert set(shards(out)) == before
    setting.run(out, resume=True)
    assert setting.same(out)


def test_wrong_input_is_told_though_nothing_can_be_removed(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise StorageError("read-only")

    def wrong(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(writer, "remove", refuse)
        raise InputError("activations hold NaN")

    monkeypatch.setattr(pruning, "_walk", wrong)
    with pytest.raises(InputError, match="activations hold NaN"):
        setting.run(out)


def test_what_is_above_a_new_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # or all that is written into it may be gone after a power failure
    synced = []
    monkeypatch.setattr(storage, "sync_folder", synced.append)
    storage.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    storage.make_folder(tmp_path / "a")  # who made it may not have come so far
    assert synced == [tmp_path]


def test_a_folder_below_one_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage, "sync_folder", refuse)
    storage.make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_a_removal_that_fails_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(shutil, "rmtree", read_only)
    for name in ("file", "folder"):
        with pytest.raises(StorageError, match=f"cannot remove '.*{name}': Read-only file system"):
            storage.remove(tmp_path / name)
    monkeypatch.undo()
    for name in ("file", "folder", "nothing"):
        storage.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_in_the_output_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StorageError, match="additional_chat_templates': No space left on device"):
        Writer(tmp_path / "out", 1).carry_over(tmp_path / "source", with_code=False)


def test_the_manifest_goes_first_and_the_journal_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "prunekit.json", "tokenizer.json", JOURNAL_NAME, ".prunekit-hidden-0"):
        (tmp_path / name).write_text("{}")
    order: list[str] = []
    monkeypatch.setattr(writer, "remove", lambda path: order.append(path.name))
    writer.clear(tmp_path)
    assert (order[0], order[-1]) == ("prunekit.json", JOURNAL_NAME)
    assert len(order) == 5
    order.clear()
    writer.clear(tmp_path, keep=tmp_path / JOURNAL_NAME)
    assert JOURNAL_NAME not in order
    assert len(order) == 4


# Real disks. A namespace of our own lets us make small ones; where that is forbidden the tests above must do.


def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what it likes; nobody else sees it."""
    places = [str(Path(prunekit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-eu", "-c", script, "sh", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHON": sys.executable},
        check=False,
    )


@pytest.fixture
def can_mount(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or in_namespace('mount -t tmpfs none "$1"', str(disk)).returncode:
        pytest.skip("a small disk can only be made where processes may have their own mounts")


PRUNE = '"$PYTHON" -m prunekit prune "$2" --calibration "$3" --samples 4 --length 32 --dtype float32 --out "$1/out"'


def test_a_disk_that_is_really_full_and_then_larger(setting: Setting, tmp_path: Path, can_mount: None) -> None:
    # room for the weights and hidden states that the check before counts, but not for all of the small files
    weights = sum(len(content) for name, content in setting.whole.items() if name.endswith(".safetensors"))
    kept = 2 * 4 * 32 * 32 * 4
    size = int((weights + kept) * 1.02) + 12_000
    done = in_namespace(
        f'mount -t tmpfs -o size={size} none "$1"\n'
        f"code=0; {PRUNE} || code=$?\n"
        'echo "ended with $code"; ls -A "$1/out"\n'
        'mount -o remount,size=100m "$1"\n'
        f'{PRUNE} --resume\ncp -r "$1/out" "$4"\n',
        *map(str, (tmp_path / "disk", setting.model, setting.text, tmp_path / "copy")),
    )
    assert done.returncode == 0, done.stderr
    assert "ended with 1" in done.stdout
    assert "No space left on device" in done.stderr
    assert "the same command with --resume continues" in done.stderr
    assert "Traceback" not in done.stderr
    listed = done.stdout.split("ended with 1")[1].split("prunekit pruned")[0]
    assert "prunekit-tmp" not in listed
    assert setting.same(tmp_path / "copy")


def test_a_disk_that_is_really_read_only(setting: Setting, tmp_path: Path, can_mount: None) -> None:
    done = in_namespace(
        f'mount -t tmpfs none "$1"; mount -o remount,ro "$1"\ncode=0; {PRUNE} || code=$?; echo "ended with $code"',
        *map(str, (tmp_path / "disk", setting.model, setting.text)),
    )
    assert done.stdout == "ended with 2\n"
    assert done.stderr.count("\n") == 1, done.stderr
    assert "out' cannot be used: Read-only file system" in done.stderr
