"""Fixtures of the tests about what is written of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def manifest(finished_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished_run / "prunekit.json").read_text(encoding="utf-8"))
    return found
