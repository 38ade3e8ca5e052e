"""One run at a time in a folder: a lock the system takes back when its owner dies, however it dies.

The lock is on an open file (`flock`), not on the file's existence, so that what a killed run leaves is no lock. The file says who
holds it, for the sentence the other one gets.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ..errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no flock; there a lock file that cannot be removed while it is open serves
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".prunekit-lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the time being. Raises `InputError`, naming the owner, where another process holds it."""
    path = folder / LOCK_NAME
    handle = _acquire(path)
    try:
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(owner).encode())
        yield
    finally:
        # what cannot be removed does no harm, and must not hide why the run ended
        if fcntl is not None:
            with suppress(OSError):
                path.unlink()  # while it is still ours
        os.close(handle)
        if fcntl is None:
            with suppress(OSError):
                path.unlink()


def refuse_locked(folder: Path) -> None:
    """Raise `InputError` where another process holds the folder's lock now; takes nothing."""
    path = folder / LOCK_NAME
    if fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            _flock(handle, path)
        finally:
            os.close(handle)


def _acquire(path: Path) -> int:
    if fcntl is None:
        try:
            path.unlink(missing_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:
            raise _in_use(path) from None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(handle, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(
            handle
        )  # its last owner removed it between our opening and our locking: this is no folder's lock any more


def _flock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path) from None


def _in_use(path: Path) -> InputError:
    try:
        owner = json.loads(path.read_text())
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return InputError(f"'{path.parent}' is being written by {who}: wait for it, stop it, or choose another --out")
