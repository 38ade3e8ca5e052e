"""Fixtures for tests on the real model. What a machine lacks is skipped with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunekit.checkpoint.locate import locate
from prunekit.errors import InputError

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M's folder, converted on first use."""
    try:
        return locate("smollm2-135m")
    except InputError as problem:
        pytest.skip(f"the embedded model cannot be had here: {problem}")


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder with `text/` and `tasks/`: `PRUNEKIT_TEST_DATA`, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("PRUNEKIT_TEST_DATA", _BESIDE))
    if not (folder / "text").is_dir():
        pytest.skip(f"no measuring data in {folder}: set PRUNEKIT_TEST_DATA to a folder with text/ and tasks/")
    return folder
