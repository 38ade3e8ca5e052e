"""Progress on stderr: a bar with time left and memory on a terminal, plain lines elsewhere, nothing where nothing is wanted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .machine import rss_bytes


class Progress(Protocol):
    """Told what is going on. Implementations print; the library itself never does."""

    def say(self, text: str) -> None:
        """A sentence worth reading, once."""

    def start(self, title: str, steps: int) -> None:
        """A piece of work of `steps` steps begins."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def stop(self) -> None:
        """The piece of work ended, or failed."""


class Step(Protocol):
    """Told that one step is done, perhaps with a word about it."""

    def __call__(self, note: str = "") -> None:
        """One step is done."""


class Silent:
    """Prints nothing; the default of the Python API."""

    def say(self, text: str) -> None:
        """Nothing."""

    def start(self, title: str, steps: int) -> None:
        """Nothing."""

    def step(self, note: str = "") -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines, for logs and pipes: every step of a short job, about ten of a long one."""

    def __init__(self) -> None:
        self._title = ""
        self._steps = self._done = 0
        self._started = 0.0

    def say(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    def start(self, title: str, steps: int) -> None:
        """Note the title."""
        self._title, self._steps, self._done = title, steps, 0
        self._started = time.monotonic()

    def step(self, note: str = "") -> None:
        """Print every so many steps."""
        self._done += 1
        stride = max(1, self._steps // 10)
        if self._done % stride and self._done != self._steps:
            return
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._steps - self._done)
        self.say(
            f"{self._title} {self._done}/{self._steps}  {note}  {spent:.0f} s, {left:.0f} s left, "
            f"memory {rss_bytes() / 1e9:.2f} GB"
        )

    def stop(self) -> None:
        """Nothing to close."""


class Bar:
    """A bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: object | None = None

    def say(self, text: str) -> None:
        """Print it above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def start(self, title: str, steps: int) -> None:
        """Show the bar."""
        from rich import progress

        self.stop()
        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._task = bar.add_task(title, total=steps, note="")
        bar.start()
        self._bar = bar

    def step(self, note: str = "") -> None:
        """Move the bar."""
        from rich.progress import Progress as RichProgress

        assert isinstance(self._bar, RichProgress)
        self._bar.update(self._task, advance=1, note=f"{note}  memory {rss_bytes() / 1e9:.2f} GB")

    def stop(self) -> None:
        """Take the bar away."""
        from rich.progress import Progress as RichProgress

        if isinstance(self._bar, RichProgress):
            self._bar.stop()
        self._bar = None


@contextmanager
def no_bar() -> Iterator[None]:
    """Without transformers' own progress bar: the library prints nothing unless it is asked to."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_quiet() -> bool:
    """Whether this is one of several processes that torchrun started, and another does the talking."""
    return int(os.environ.get("RANK", "0")) > 0


def for_terminal() -> Progress:
    """The bar where stderr is a terminal, lines where it is not, silence where another process talks."""
    if is_quiet():
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
