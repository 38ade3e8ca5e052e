"""Servers for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Running

from prunekit.generating import open_engine
from prunekit.generation.engine import Engine


@pytest.fixture(scope="session")
def engine(talker: Path) -> Engine:
    return open_engine(
        str(talker),
        dtype="float32",
        device="cpu",
        runtime="dense",
        revision=None,
        trust_remote_code=False,
        progress=None,
    )


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    running = Running(engine, max_tokens=100)
    yield running
    running.close()


@pytest.fixture
def serving(engine: Engine) -> Iterator[Callable[..., Running]]:
    """Makes servers, and ends them."""
    made: list[Running] = []

    def make(**options: Any) -> Running:
        made.append(Running(engine, **options))
        return made[-1]

    yield make
    for running in made:
        running.close()
