"""Fixtures of the fault tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
