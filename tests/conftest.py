"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import prunekit
import tiny

# What is started in the background of a shell inherits that Ctrl-C is ignored; what the tests start and interrupt must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: whoever of several processes comes last is not left alone with them."""
    items.sort(key=lambda item: not {"real", "faults"} & set(item.path.parts))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the fault tests have done is said at the end: a number nobody reads proves nothing.

    It stands here because only this file is read by the process that several others report to.
    """
    survived: dict[str, int] = {}
    injected: dict[str, int] = {}
    seeds = set()
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties:
            if name == "faults":
                for kind, (done, well) in value.items():
                    injected[kind] = injected.get(kind, 0) + done
                    survived[kind] = survived.get(kind, 0) + well
            elif name == "fault seed":
                seeds.add(value)
    if injected:
        parts = ", ".join(f"{kind} {survived[kind]}/{injected[kind]}" for kind in sorted(injected))
        seed = ", ".join(map(str, sorted(seeds)))
        terminalreporter.write_line(
            f"faults survived: {sum(survived.values())} of {sum(injected.values())} ({parts}); PRUNEKIT_FAULT_SEED={seed}"
        )


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run may write."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny Llamas, `model` and `other`, and two texts, text.txt and speech.txt; for reading only."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_model(folder / "model")
    tiny.save_model(folder / "other", seed=1)
    (folder / "text.txt").write_text(tiny.make_text(), encoding="utf-8")
    (folder / "speech.txt").write_text(tiny.make_text(seed=1), encoding="utf-8")
    return folder


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


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that writes ASCII, with a chat template; for reading only."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    tiny.readable(tiny.make_model("llama")).save_pretrained(folder)
    tiny.make_chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny Llama pruned to 2:4, its middle block left dense; for reading only."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.save_model(folder / "llama", "llama")
    (folder / "llama" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (folder / "text.txt").write_text(tiny.make_text(), encoding="utf-8")
    prunekit.prune(
        folder / "llama",
        out=folder / "out",
        pattern="2:4",
        calibration={"source": str(folder / "text.txt"), "samples": 4, "length": 32},
        dtype="float32",
        parts={"budget": {"ignore": ["model.layers.1"]}},
    )
    return folder / "out"


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to do anything with."""
    return Path(shutil.copytree(finished_run, tmp_path / "pruned"))
