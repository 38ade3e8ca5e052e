"""What a search has measured, a line of JSON each: a kill at any moment costs what was being measured, and no more.

The first line says whose history it is. What is found half written behind the last whole line is dropped when the file is opened.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.storage import append_text, write_text
from ..checkpoint.writer import difference
from ..errors import HistoryError, StorageError

FORMAT = 1
_HASH = re.compile("[0-9a-f]{64}")


def key_of(candidate: Any) -> str:
    """A candidate, which is plain data, as text: equal ones are written in one way."""
    return json.dumps(candidate, sort_keys=True, separators=(",", ":"))


class History:
    """Losses of candidates, a number a window from the first window on; of a candidate that was given up there are fewer.

    Without a path it is kept in memory only. A file that is damaged or another search's is refused with a `HistoryError`, and not
    touched.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._losses: dict[str, list[float]] = {}
        if path is None:
            return
        if path.exists():
            self._read(path, identity)
            cut_torn_line(path)
        else:
            write_text(path, json.dumps({"format": FORMAT, "identity": identity}) + "\n")

    def _read(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            head, *lines = path.read_bytes().rpartition(b"\n")[0].decode().split("\n")
            said = json.loads(head)
            if said["format"] != FORMAT:
                raise ValueError(f"format {said['format']}")
            theirs = said["identity"]
            found = [json.loads(line) for line in lines]
            for line in found:
                losses = [math.inf if loss is None else float(loss) for loss in line["losses"]]
                self._losses.setdefault(key_of(line["candidate"]), []).extend(losses)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise HistoryError(
                f"'{path}' cannot be read as the history of a search ({problem}): it was left as it is; begin again elsewhere, "
                "or remove it"
            ) from None
        refuse_another(path, theirs, json.loads(json.dumps(identity)))

    def __len__(self) -> int:
        return len(self._losses)

    def losses(self, candidate: Any) -> list[float]:
        """What is known of a candidate; empty where it was never measured."""
        return list(self._losses.get(key_of(candidate), ()))

    def add(self, candidate: Any, losses: Sequence[float]) -> None:
        """Note what the next windows gave, durably. Raises `StorageError`."""
        self._losses.setdefault(key_of(candidate), []).extend(losses)
        if self._path is None:
            return
        plain = [loss if math.isfinite(loss) else None for loss in losses]  # JSON has no word for infinity
        append_text(self._path, json.dumps({"candidate": candidate, "losses": plain}) + "\n")


def refuse_another(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise `HistoryError` where a file is of a search with another identity."""
    differing = difference(theirs, ours)
    if differing:
        said = [line for line in differing if not _HASH.search(line)]  # texts differ because something else does
        raise HistoryError(
            f"'{path}' is of another search: {'; '.join(said or differing)}. It was left as it is; begin this one elsewhere"
        )


def cut_torn_line(path: Path) -> None:
    """Cut off what a kill left half written behind a file's last whole line. Raises `StorageError`."""
    try:
        with path.open("rb+") as stream:
            content = stream.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                stream.truncate(whole)
                os.fsync(stream.fileno())
    except OSError as problem:
        raise StorageError(f"cannot mend '{path}': {problem.strerror or problem}") from problem
