"""The failing disk itself: it sees every way Python writes, and loses what a disk may lose, no less and no more."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import Disk, Fault

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be copied"),
    # from Python 3.12 on; what the copies do here needs no other thread
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def in_child(out: Path, work: Callable[[], None], fault: Fault | None = None) -> tuple[int, list[str], list[str]]:
    """Do `work` in a process whose disk fails; returns its exit status, the operations, and what the disk has not seen."""
    report = out.parent / "report.json"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            disk = Disk(out, fault)
            disk.install()
            work()
            report.write_text(json.dumps([disk.labels, disk.unseen()]))
            os._exit(0)
        except OSError as problem:
            os._exit(problem.errno or 1)
        except BaseException:
            traceback.print_exc()
            os._exit(200)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    labels, unseen = json.loads(report.read_text()) if status == 0 else ([], [])
    return status, labels, unseen


def test_every_way_of_writing_is_seen(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)

    def work() -> None:
        out.mkdir()
        (out / "text").write_text("some text")
        with (out / "raw").open("wb", buffering=0) as stream:
            stream.write(b"raw")
            os.fsync(stream.fileno())
        with (out / "raw").open("r+b") as both:
            both.seek(1)
            both.write(b"ewritten")
        shutil.copyfile(source, out / "copy")
        (out / "moved").touch()
        (out / "copy").replace(out / "moved")
        handle = os.open(out / "number", os.O_RDWR | os.O_CREAT)
        os.write(handle, b"12345")
        os.ftruncate(handle, 2)
        os.close(handle)
        (out / "below").mkdir()
        (out / "below" / "gone").write_text("gone")
        (out / "below" / "too").write_text("gone too")
        (out / "below" / "gone").unlink()
        shutil.rmtree(out / "below")
        (out / "text").chmod(0o600)
        (tmp_path / "elsewhere").write_text("not ours")

    status, labels, unseen = in_child(out, work)
    assert (status, unseen) == (0, [])
    assert labels == [
        "mkdir out#1",
        *("create out/text#1", "write out/text#1"),
        *("create out/raw#1", "write out/raw#1", "sync out/raw#1"),
        *("open out/raw#1", "write out/raw#2"),
        *("create out/copy#1", "write out/copy#1", *(["write out/copy#2"] if "write out/copy#2" in labels else [])),
        *("create out/moved#1", "move out/moved#1"),
        *("create out/number#1", "write out/number#1", "cut out/number#1"),
        *("mkdir out/below#1", "create out/below/gone#1", "write out/below/gone#1"),
        *("create out/below/too#1", "write out/below/too#1"),
        *("remove out/below/gone#1", "remove out/below/too#1", "rmdir out/below#1"),
        "chmod out/text#1",
    ]
    assert (out / "moved").read_bytes() == b"x" * 1000
    assert (out / "raw").read_bytes() == b"rewritten"


def write_twice(out: Path) -> Callable[[], None]:
    def work() -> None:
        out.mkdir()
        (out / "a").write_text("first")
        (out / "a").write_text("second!!")

    return work


@pytest.mark.parametrize(
    ("kind", "at", "left"),
    [
        ("kill", "write out/a#1", ""),
        ("kill", "empty out/a#1", "first"),
        ("torn", "write out/a#1", "fi"),
        ("torn", "empty out/a#1", ""),
        ("torn", 4, "seco"),
        ("kill", "mkdir out#1", None),
    ],
)
def test_a_kill_leaves_what_was_done(out: Path, kind: str, at: str | int, left: str | None) -> None:
    status, *_ = in_child(out, write_twice(out), Fault(kind, at))
    assert status == -signal.SIGKILL
    assert ((out / "a").read_text() if out.exists() else None) == left


@pytest.mark.parametrize(
    ("kind", "at", "number", "left"),
    [
        ("error", "mkdir out#1", errno.ENOSPC, None),
        ("full", "write out/a#1", errno.ENOSPC, ""),
        ("full", "empty out/a#1", errno.ENOSPC, ""),
        ("readonly", "empty out/a#1", errno.EROFS, "first"),
    ],
)
def test_an_error_is_the_systems(out: Path, kind: str, at: str, number: int, left: str | None) -> None:
    status, *_ = in_child(out, write_twice(out), Fault(kind, at))
    assert status == number
    assert ((out / "a").read_text() if out.exists() else None) == left


def test_a_failing_write_may_have_written_half(out: Path) -> None:
    out.mkdir()

    def work() -> None:
        with (out / "a").open("wb", buffering=0) as stream:
            stream.write(b"first")

    assert in_child(out, work, Fault("error", "write out/a#1"))[0] == errno.ENOSPC
    assert (out / "a").read_bytes() == b"fi"


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def test_what_was_synced_survives_every_power_failure(out: Path) -> None:
    def work() -> None:
        out.mkdir()
        sync(out.parent)
        (out / "a").write_text("safe")
        sync(out / "a")
        sync(out)
        (out / "b").write_text("named, not synced" * 100)
        sync(out)
        (out / "c").write_text("synced, not named")
        sync(out / "c")
        (out / "d").write_text("new")
        (out / "d").replace(out / "a")
        (out / "e").touch()

    found: dict[str, set[str | None]] = {name: set() for name in "abcde"}
    for seed in range(60):
        assert in_child(out, work, Fault("power", "create out/e#1", seed))[0] == -signal.SIGKILL
        for name, contents in found.items():
            contents.add((out / name).read_text() if (out / name).exists() else None)
        shutil.rmtree(out)
    assert found["a"] >= {"safe", "new", ""}, "not renamed, renamed with its bytes, renamed without them"
    assert found["a"] <= {"safe", "new", "", "\0\0\0"}
    assert {"named, not synced" * 100, ""} < found["b"], "and it may be torn"
    assert None not in found["b"]
    assert found["c"] == {"synced, not named", None}
    assert found["d"] <= {None, "new", "", "\0\0\0"}
    assert found["e"] == {None}


def test_a_folder_whose_name_was_not_synced_may_be_gone(out: Path) -> None:
    def work() -> None:
        out.mkdir()
        (out / "a").write_text("safe")
        sync(out / "a")
        sync(out)
        (out / "b").touch()

    found = set()
    for seed in range(20):
        in_child(out, work, Fault("power", "create out/b#1", seed))
        found.add((out / "a").read_text() if out.exists() else None)
        shutil.rmtree(out, ignore_errors=True)
    assert found == {None, "safe"}
