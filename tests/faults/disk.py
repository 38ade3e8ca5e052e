"""A disk that fails on purpose: every operation on one folder is numbered, and at one of them something happens.

It stands between Python and the system: `os.open`, `os.write`, `os.fsync`, `os.replace`, ... and every file opened for writing go
through it. It also keeps a picture of what a disk would hold if the power failed now. POSIX promises little about that: a file's
bytes are safe when the file was synced, its name is safe when its folder was synced; of everything else any part may be lost.

Nothing here knows prunekit. `unseen` tells what changed the folder behind our back, so a write that goes another way is noticed.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import pathlib
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# what an operation changes of a folder; the others can only fail
CHANGING = ("create", "empty", "write", "cut", "sync", "move", "remove", "mkdir", "rmdir")
KILLS = ("kill", "torn", "power")
ERRORS = ("error", "full", "readonly")
_ERRNO = {"sync": errno.EIO, "move": errno.EROFS, "remove": errno.EROFS, "rmdir": errno.EROFS, "chmod": errno.EROFS}
_TAKES_ROOM = ("create", "write", "mkdir")
_SECTOR = 512


@dataclass(frozen=True)
class Fault:
    """What happens, and at which operation: its label, or its number from 0.

    kill: SIGKILL before it. torn: SIGKILL after half of it (of a write), or right behind it. power: what was not synced is lost,
    in a way drawn by `seed`, and SIGKILL. error: it alone fails (a write: after half of it). full: from here on the disk is full.
    readonly: from here on nothing can be changed. interrupt: SIGTERM or SIGINT arrives.
    """

    kind: str
    at: str | int
    seed: int = 0


@dataclass(eq=False)
class _File:
    """A file, whatever its name. `durable` is what was synced last; None: nothing."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes | None = None


class _Raw(io.FileIO):
    """An unbuffered file whose writes the disk sees."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        self._disk = disk
        super().__init__(path, mode, opener=lambda name, flags: disk.open(name, flags, 0o666))

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        return self._disk.write(self.fileno(), view, super().write)


class Disk:
    """What `root` holds, on the disk and in the cache above it; `labels` are the operations so far, like `write config.json#2`."""

    def __init__(self, root: Path, fault: Fault | None = None, jitter: int | None = None) -> None:
        self.root = root
        self.labels: list[str] = []
        self.fired = False
        self._fault = fault
        self._jitter = None if jitter is None else random.Random(jitter)
        self._lock = threading.RLock()
        self._count: Counter[str] = Counter()
        self._broken = ""
        self._past = 0  # the thread whose operations are no longer looked at
        self._handles: dict[int, tuple[Path, _File | None, tuple[int, int]]] = {}
        self._names: dict[Path, _File | None] = {}  # None: a folder
        for path in [root, *root.rglob("*")] if root.is_dir() else []:
            content = None if path.is_dir() else path.read_bytes()
            self._names[path] = None if content is None else _File(bytearray(content), content)
        self._durable = dict(self._names)
        self._pending: list[
            tuple[Path, Path | None, Path | None, _File | None]
        ] = []  # folder, old name, new name, what

    # What the picture is made of.

    def _link(self, path: Path, file: _File | None, old: Path | None = None) -> None:
        if old is not None:
            del self._names[old]
        self._names[path] = file
        self._pending.append((path.parent, old, path, file))

    def _unlink(self, path: Path) -> None:
        self._pending.append((path.parent, path, None, self._names.pop(path)))

    def _store(self, file: _File, at: int, data: bytes) -> None:
        file.data.extend(bytes(max(0, at + len(data) - len(file.data))))
        file.data[at : at + len(data)] = data

    def _synced(self, path: Path, file: _File | None) -> None:
        if file is not None:
            file.durable = bytes(file.data)
            return
        for change in self._pending:
            if change[0] == path:
                _apply(self._durable, change)
        self._pending = [change for change in self._pending if change[0] != path]

    def unseen(self) -> list[str]:
        """Names under which the folder differs from the picture."""
        real = [self.root, *self.root.rglob("*")] if self.root.is_dir() else []
        found = {path: None if path.is_dir() else path.read_bytes() for path in real}
        pictured = {path: None if file is None else bytes(file.data) for path, file in self._names.items()}
        either = found.keys() | pictured.keys()
        return sorted(str(path) for path in either if found.get(path, b"-") != pictured.get(path, b"-"))

    def lose_power(self, seed: int) -> None:
        """Make of the folder what may be found after a power failure: `seed` draws which names and which bytes are lost."""
        draw = random.Random(seed)
        self._past = threading.get_ident()
        names = dict(self._durable)
        how = draw.choice(["none", "all", "prefix", "any"])
        kept = {"none": 0, "all": len(self._pending), "prefix": draw.randint(0, len(self._pending))}
        for number, change in enumerate(self._pending):
            if draw.random() < 0.5 if how == "any" else number < kept[how]:
                _apply(names, change)
        how = draw.choice(["old", "zeros", "sectors", "new"])
        contents = {file: _left(file, how, draw) for file in names.values() if file is not None}
        shutil.rmtree(self.root, ignore_errors=True)
        if self.root in names:  # a folder whose own name was not synced is gone with all that is in it
            self.root.mkdir()
            for path, file in sorted(names.items()):
                if file is None:
                    path.mkdir(exist_ok=True)
                elif path.parent.is_dir():
                    path.write_bytes(contents[file])

    # What may go wrong.

    def _operate(self, name: str, path: Path, do: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        """Number an operation, let happen what is to happen, and do it."""
        if self._jitter is not None and self._jitter.random() < 0.3:
            time.sleep(self._jitter.random() * 0.003)
        with self._lock:
            title = f"{name} {path.relative_to(self.root.parent)}"
            self._count[title] += 1
            label = f"{title}#{self._count[title]}"
            here = self._fault is not None and self._fault.at in (label, len(self.labels))
            self.labels.append(label)
            if here:
                assert self._fault is not None
                self.fired = True
                if self._fault.kind == "power":
                    self.lose_power(self._fault.seed)
                if self._fault.kind == "torn":
                    with contextlib.suppress(OSError):
                        (half or do)()
                if self._fault.kind in KILLS:
                    os.kill(os.getpid(), signal.SIGKILL)
                    signal.pause()  # the other threads wait for the lock until they are gone
                if self._fault.kind == "interrupt":
                    os.kill(os.getpid(), signal.SIGTERM if self._fault.seed % 2 else signal.SIGINT)
                if self._fault.kind in ("full", "readonly"):
                    self._broken = self._fault.kind
                if self._fault.kind == "error":
                    if half is not None:
                        half()
                    _fail(_ERRNO.get(name, errno.ENOSPC))
            if self._broken == "full" and name in _TAKES_ROOM:
                _fail(errno.ENOSPC)
            if self._broken == "readonly" and name != "sync":
                _fail(errno.EROFS)
            return do()

    # What Python calls.

    def _here(self, path: Any, folder: int | None = None) -> Path | None:
        """The path where it is inside the folder, or is the one above it, which knows its name."""
        if isinstance(path, int) or self._past == threading.get_ident():
            return None
        found = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 (Path.resolve follows links, which are not ours)
        if folder is not None and not os.path.isabs(os.fsdecode(path)):  # noqa: PTH117
            known = self._handle(folder)
            if known is None:
                return None
            found = known[0] / os.fsdecode(path)
        return found if found in (self.root, self.root.parent) or self.root in found.parents else None

    def _handle(self, handle: int) -> tuple[Path, _File | None] | None:
        """Path and file of an open handle of ours."""
        if handle not in self._handles or self._past == threading.get_ident():
            return None
        path, file, identity = self._handles[handle]
        status = os.fstat(handle)  # a number is given out again after it was closed
        return (path, file) if (status.st_dev, status.st_ino) == identity else None

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """`os.open`."""
        place = self._here(path, dir_fd)
        if place is None:
            return _REAL["open"](path, flags, mode, dir_fd=dir_fd)

        def do() -> int:
            fresh = place not in self._names and place != self.root.parent
            handle: int = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
            status = os.fstat(handle)
            if fresh:
                self._link(place, _File())
            file = self._names.get(place)
            if file is not None and flags & os.O_TRUNC:
                file.data.clear()
            self._handles[handle] = (place, file, (status.st_dev, status.st_ino))
            return handle

        known = self._names.get(place)
        if flags & os.O_CREAT and place not in self._names:
            return self._operate("create", place, do)
        if flags & os.O_TRUNC and known is not None and known.data:
            return self._operate("empty", place, do)
        if flags & (os.O_WRONLY | os.O_RDWR):
            return self._operate("open", place, do)
        with self._lock:
            return do()

    def open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """`open`."""
        if not set(mode) & set("wax+") or self._here(file) is None:
            return _REAL["open_file"](file, mode, buffering, encoding, errors, *rest, **named)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, *rest, **named)

    def write(self, handle: int, data: Any, real: Callable[[Any], int] | None = None) -> int:
        """`os.write`, and that of files."""
        known = self._handle(handle)
        put = real or (lambda part: _REAL["write"](handle, part))
        if known is None or known[1] is None:
            return put(data)
        path, file = known

        def do(part: Any) -> int:
            at = os.lseek(handle, 0, os.SEEK_CUR)
            done = put(part)
            self._store(file, at, bytes(part[:done]))
            return done

        return self._operate("write", path, lambda: do(data), lambda: do(data[: len(data) // 2]))

    def sendfile(self, target: int, source: int, offset: int, count: int, *more: Any) -> int:
        """`os.sendfile`, which `shutil` copies with."""
        known = self._handle(target)
        if known is None or known[1] is None:
            return _REAL["sendfile"](target, source, offset, count, *more)
        path, file = known

        def do(part: int) -> int:
            at = os.lseek(target, 0, os.SEEK_CUR)
            done: int = _REAL["sendfile"](target, source, offset, part, *more)
            self._store(file, at, os.pread(source, done, offset))
            return done

        rest = max(0, os.fstat(source).st_size - offset)
        return self._operate("write", path, lambda: do(count), lambda: do(rest // 2) if rest > 1 else 0)

    def ftruncate(self, handle: int, size: int) -> None:
        """`os.ftruncate`."""
        known = self._handle(handle)
        if known is None or known[1] is None:
            return _REAL["ftruncate"](handle, size)
        path, file = known

        def do() -> None:
            _REAL["ftruncate"](handle, size)
            del file.data[size:]
            self._store(file, size, b"")

        return self._operate("cut", path, do)

    def fsync(self, handle: int) -> None:
        """`os.fsync`: noted, and not done, because a killed process loses nothing and it takes its time."""
        known = self._handle(handle)
        if known is None:
            return _REAL["fsync"](handle)
        return self._operate("sync", known[0], lambda: self._synced(*known))

    def replace(self, old: Any, new: Any, **more: Any) -> None:
        """`os.replace` and `os.rename`."""
        source, target = self._here(old), self._here(new)
        if source is None or target is None:
            return _REAL["replace"](old, new, **more)

        def do() -> None:
            _REAL["replace"](old, new, **more)
            self._link(target, self._names[source], source)

        return self._operate("move", target, do)

    def _at_name(self, name: str, real: str) -> Callable[..., None]:
        def call(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> None:
            place = self._here(path, dir_fd)
            named |= {} if dir_fd is None else {"dir_fd": dir_fd}
            if place is None:
                return _REAL[real](path, *rest, **named)

            def do() -> None:
                _REAL[real](path, *rest, **named)
                if name == "mkdir":
                    self._link(place, None)
                elif name in ("remove", "rmdir"):
                    self._unlink(place)

            return self._operate(name, place, do)

        return call

    def install(self) -> None:
        """Take the place of the system's functions in this process, for good."""
        functions = {
            "open": self.open,
            "write": self.write,
            "fsync": self.fsync,
            "ftruncate": self.ftruncate,
            "sendfile": self.sendfile,
            "replace": self.replace,
            "rename": self.replace,
            "unlink": self._at_name("remove", "unlink"),
            "remove": self._at_name("remove", "unlink"),
            "mkdir": self._at_name("mkdir", "mkdir"),
            "rmdir": self._at_name("rmdir", "rmdir"),
            "chmod": self._at_name("chmod", "chmod"),
        }
        for name, function in functions.items():
            if name in _REAL:
                setattr(os, name, function)
        builtins.open = io.open = self.open_file  # type: ignore[assignment]
        noted = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 has noted the functions it found at its start
        for name, function in {**functions, "open": self.open_file}.items():
            if noted is not None and name in vars(noted):
                setattr(noted, name, staticmethod(function))


_NAMES = (
    "open",
    "write",
    "fsync",
    "ftruncate",
    "sendfile",
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "chmod",
)
_REAL: dict[str, Any] = {name: getattr(os, name) for name in _NAMES if hasattr(os, name)} | {"open_file": io.open}


def _apply(names: dict[Path, _File | None], change: tuple[Path, Path | None, Path | None, _File | None]) -> None:
    _, old, new, file = change
    if old is not None:
        names.pop(old, None)
    if new is not None:
        names[new] = file


def _left(file: _File, how: str, draw: random.Random) -> bytes:
    """What is left of a file's bytes: those synced last, or the new ones, or zeros for them, or any of these by sector."""
    old, new = file.durable or b"", bytes(file.data)
    if how == "old":
        return old
    if how == "new" or old == new:
        return new
    if how == "zeros":
        return bytes(len(new)) if file.durable is None else old[: len(new)] + bytes(max(0, len(new) - len(old)))
    parts = []
    for start in range(0, len(new), _SECTOR):
        part = new[start : start + _SECTOR]
        before = (old[start : start + _SECTOR] + bytes(len(part)))[: len(part)]
        parts.append(draw.choice([part, before]))
    return b"".join(parts)


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number))
