"""Writing files so that a name never stands for half a file: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import StorageError

_SUFFIX = ".prunekit-tmp"


def is_temporary(path: Path) -> bool:
    """Whether this is what a killed run left of a file it had not finished."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable, and rename it to `path`.

    Raises `StorageError` where the system refuses (disk full, read-only, ...); `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what this user's files usually are; safetensors makes its own private ones
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as problem:
        with suppress(OSError):  # a disk that has become read-only must not hide what happened
            temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise StorageError(f"cannot write '{path}': {problem.strerror or problem}") from problem
        raise


def write_text(path: Path, text: str) -> None:
    """`replace_file` with text."""

    def fill(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_file(path, fill)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """`replace_file` with JSON; without indent it is written by compiled code, which counts for what is written often."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, durably. Raises `StorageError` where the system refuses; the file is then as it was."""
    try:
        with path.open("ab", buffering=0) as stream:  # a buffer would be written once more when the file is closed
            size = os.fstat(stream.fileno()).st_size
            try:
                left = text.encode()
                while left:
                    left = left[stream.write(left) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)
                raise
    except OSError as problem:
        raise StorageError(f"cannot write '{path}': {problem.strerror or problem}") from problem


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it where they are missing, durably. Raises `OSError`."""
    missing = [place for place in folder.parents if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, *missing):  # this one always: who made it may have been killed before its name was safe
        with suppress(OSError):  # what lies above may not be ours to open
            sync_folder(place.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder where it is there, durably. Raises `StorageError`."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as problem:
        raise StorageError(f"cannot remove '{path}': {problem.strerror or problem}") from problem


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable; not every system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
