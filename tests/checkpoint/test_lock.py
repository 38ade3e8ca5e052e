"""One run at a time in a folder; what a killed one leaves is no lock; who is refused takes and removes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import prunekit
from helpers import contents
from prunekit.checkpoint import lock
from prunekit.checkpoint.lock import LOCK_NAME, locked, refuse_locked
from prunekit.errors import InputError

pytest.importorskip("fcntl", reason="the lock is the system's only where there is flock")

HOLD = """
import sys
from pathlib import Path
from prunekit.checkpoint.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def environment() -> dict[str, str]:
    """Where other processes find prunekit."""
    places = [str(Path(prunekit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A live process that holds the folder's lock until its stdin is closed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_lock_is_there_while_it_is_held_and_says_by_whom(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with locked(tmp_path):
        owner = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (owner["process"], owner["host"]) == (os.getpid(), socket.gethostname())
    assert contents(tmp_path) == {"mine": b"mine"}


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    assert contents(tmp_path) == {}
    with locked(tmp_path):
        pass


def test_another_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("half a model")
    with holder(tmp_path) as process:
        before = contents(tmp_path)
        told = rf"is being written by process {process.pid} on {re.escape(socket.gethostname())}, since 2"
        with pytest.raises(InputError, match=told), locked(tmp_path):
            pass
        with pytest.raises(InputError, match=told):
            refuse_locked(tmp_path)
        assert contents(tmp_path) == before, "not even the lock file is touched"
        with pytest.raises(InputError, match=told), locked(tmp_path):  # being refused has not taken the lock away
            pass
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert contents(tmp_path) == {"theirs": b"half a model"}
    with locked(tmp_path):
        pass


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(InputError, match=f"process {os.getpid()} "), locked(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists(), "the refused one has not removed it"


def test_what_a_killed_process_leaves_is_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == process.pid
        refuse_locked(tmp_path)
        assert (tmp_path / LOCK_NAME).exists(), "looking takes nothing"
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}', "\udcff"])
def test_a_lock_that_does_not_say_who_holds_it(tmp_path: Path, content: str) -> None:
    # its owner was about to write it
    with locked(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="is being written by another process: wait for it"), locked(tmp_path):
            pass


def test_a_longer_line_of_an_earlier_owner_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("x" * 1000)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


def test_no_folder_is_not_locked(tmp_path: Path) -> None:
    refuse_locked(tmp_path)
    refuse_locked(tmp_path / "nowhere")
    assert contents(tmp_path) == {}


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOCK_NAME
    real = lock._flock
    taken = []

    def late(handle: int, where: Path) -> None:
        real(handle, where)
        taken.append(os.fstat(handle).st_ino)
        if len(taken) == 1:
            path.unlink()
        if len(taken) == 2:  # and now somebody else has made one of his own
            path.rename(tmp_path / "old")
            path.touch()

    monkeypatch.setattr(lock, "_flock", late)
    with locked(tmp_path):
        assert len(taken) == 3
        assert path.stat().st_ino == taken[2], "what is locked is what the others will find"


def test_a_lock_that_cannot_be_removed_does_not_hide_why_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            _ = 1 / 0
    with locked(tmp_path):  # and it is no lock
        pass


CONTEND = """
import os, random, sys, time
from pathlib import Path
from prunekit.checkpoint.lock import locked
from prunekit.errors import InputError
folder, mine = Path(sys.argv[1]), int(sys.argv[2])
inside = folder / "inside"
held = 0
while held < mine:
    try:
        with locked(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another one is inside
            time.sleep(random.random() * 0.0005)
            inside.unlink()
            held += 1
    except InputError:
        time.sleep(random.random() * 0.0005)
print(held)
"""


def test_of_many_processes_one_at_a_time_is_inside(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTEND, str(tmp_path), "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            out, problem = process.communicate(timeout=240)
            assert (out, problem) == ("60\n", "")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert contents(tmp_path) == {}


def test_the_command_line_refuses_a_folder_in_use_with_exit_code_2(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "prunekit", "prune", str(llama_folder), "--out", str(out), "--resume"]
    with holder(out) as process:
        before = contents(out)
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 2
        assert f"is being written by process {process.pid} on {socket.gethostname()}" in done.stderr
        assert done.stderr.count("\n") == 1, "one sentence"
        assert contents(out) == before
