"""What the machine says it has: a control group's limit, files written by hand."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from prunekit import machine

GB = 1_000_000_000


def group(folder: Path, *, limit: str, used: int, stat: str) -> None:
    """A control group's files."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (16 * GB, 14 * GB, 0, 2 * GB),
        (16 * GB, 14 * GB, 13 * GB, 15 * GB),  # a checkpoint was just hashed
        (16 * GB, 16 * GB, 0, 0),  # full: not "unknown"
    ],
)
def test_page_cache_counts_as_free_in_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, used: int, cached: int, free: int
) -> None:
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(machine, "_system_memory_bytes", lambda: 64 * GB)
    stat = f"anon {used - cached}\nfile {cached}\nshmem 0\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
    group(tmp_path, limit=str(limit), used=used, stat=stat)
    assert machine.available_memory_bytes() == free


def test_the_system_may_have_less_than_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    monkeypatch.setattr(machine, "_system_memory_bytes", lambda: 3 * GB)
    group(tmp_path, limit=str(16 * GB), used=GB, stat="inactive_file 0\nactive_file 0\n")
    assert machine.available_memory_bytes() == 3 * GB
    group(tmp_path, limit="max", used=GB, stat="inactive_file 0\nactive_file 0\n")
    assert machine.available_memory_bytes() == 3 * GB


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_is_what_it_would_have_been(number: signal.Signals) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt(number)

    done = False
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt) as found, machine.signals_held():  # noqa: PT012  that nothing is cut short
            os.kill(os.getpid(), number)
            done = sum(range(1000)) > 0
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert done
    assert found.value.args == (number,)


def test_signals_are_not_touched_where_none_arrives_and_in_other_threads() -> None:
    before = signal.getsignal(signal.SIGINT)
    with machine.signals_held():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    within: list[object] = []

    def elsewhere() -> None:
        with machine.signals_held():
            within.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert within == [before]
