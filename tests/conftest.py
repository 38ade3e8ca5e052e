"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

import tiny

logging.disable_progress_bar()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A small text to calibrate on: about 16,000 byte tokens."""
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(), encoding="utf-8")
    return path


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny Llama with grouped-query attention, saved as a Hugging Face folder."""
    folder = tmp_path / "llama"
    tiny.save_model(folder, "llama")
    return folder
