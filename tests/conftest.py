"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from transformers.utils import logging

import tiny

# What is started in the background of a shell inherits that Ctrl-C is ignored; what the tests start and interrupt must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
