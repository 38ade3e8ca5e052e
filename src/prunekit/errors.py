"""What can go wrong, sorted by whose move it is.

`InputError` is the user's: one sentence that names the value, why it is wrong and what to do. The command line prints it without
a traceback and exits with 2. Every other `PrunekitError` is ours or the machine's and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrunekitError(Exception):
    """Anything prunekit itself refuses or fails at."""

    exit_code = 1


class InputError(PrunekitError):
    """The user's input is wrong; the message says which value, why, and what to do."""

    exit_code = 2


class HistoryError(InputError):
    """What a search wrote is damaged or another's; whoever meets it leaves everything as it is, because it may be worth mending."""


class StorageError(PrunekitError):
    """The machine could not store the result (disk full, read-only, ...); what is written so far can be resumed."""


class VerificationError(PrunekitError):
    """What was written does not compute what the walk computed; the output must not be used."""


class PrunekitWarning(UserWarning):
    """Something was done otherwise than asked, and the result is still right; the message says what and why."""


def first_line(problem: BaseException) -> str:
    """The first line of what somebody else's code says of a failure; its kind where it says nothing."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """A half-sentence that suggests the closest known name, and lists them all.

    Example: `nearest("wonda", ["magnitude", "wanda"])` -> `did you mean 'wanda'? Known: magnitude, wanda`.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
