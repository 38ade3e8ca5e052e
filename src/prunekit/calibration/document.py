"""A text and where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and where it came from; `read` returns it, so that a large source costs only what is used of it."""

    name: str
    read: Callable[[], str]
