"""One text at a time, the others wait in line: a thread that generates, and the jobs it is given.

One thread for all of them, because every thread that multiplies keeps a team of its own. Everything but `_run` is called on the
thread of the event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import PrunekitError
from ..generation.engine import Generation


class BusyError(PrunekitError):
    """The line is full."""


class EndingError(PrunekitError):
    """The server is on its way out."""


class Job:
    """A place in the line, and the generation it is for.

    Attributes:
        generation: None until it is started.
        problem: what it failed with.
        refused: why it was cut off.
    """

    def __init__(self, left: Callable[[Job], None]) -> None:
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._work: Future[None] | None = None
        self.generation: Generation | None = None
        self.problem: BaseException | None = None
        self.refused: EndingError | None = None

    def stopped(self) -> bool:
        """Whether the generation is to end; asked by it between tokens."""
        return self._stop.is_set()

    def start(self, generation: Generation, pool: ThreadPoolExecutor) -> None:
        """Generate once the jobs before are done."""
        self.generation = generation
        self._work = pool.submit(self._run, generation)
        self._work.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._left, self))

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Raises what the generation raised, or `EndingError` where it was cut off."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
        if self.refused is not None:
            raise self.refused

    def close(self) -> None:
        """Give the place up: nobody wants the rest."""
        self._stop.set()
        if self._work is None:
            self._left(self)
        else:
            self._work.cancel()

    def refuse(self, *, running: bool) -> bool:
        """End it because the server ends, if it waits; with `running` also if it runs. Returns whether it ran and was cut off."""
        if self._work is None or self._work.done():
            return False
        if self._work.cancel():
            self._items.put_nowait(EndingError("the server is ending"))
            return False
        if not running or self._stop.is_set():  # if it is stopped, nobody waits for it
            return False
        self.refused = EndingError("the server is ending and has cut this answer off")
        self._stop.set()
        return True

    def _run(self, generation: Generation) -> None:
        try:
            for piece in generation:
                self._put(piece)
            self._put(None)
        except BaseException as problem:  # raised again where the pieces are read
            self.problem = problem
            self._put(problem)

    def _put(self, item: str | BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Worker:
    """The thread, and the line before it.

    Args:
        queue: jobs that may wait while one runs.
        told: called with every job that ended.

    Attributes:
        cut_off: whether the end came for a job that was running.
    """

    def __init__(self, queue: int, told: Callable[[Job], None]) -> None:
        self.cut_off = False
        self._places = 1 + queue
        self._told = told
        self._jobs: list[Job] = []
        self._closing = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @property
    def count(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    def admit(self) -> Job:
        """A place at the end of the line. Raises `BusyError` where there is none, `EndingError` near the end."""
        if self._closing:
            raise EndingError("the server is ending")
        if len(self._jobs) >= self._places:
            raise BusyError(f"one text is being generated and {self._places - 1} wait, as many as may: try again later")
        job = Job(self._leave)
        self._jobs.append(job)
        return job

    def start(self, job: Job, generation: Generation) -> None:
        """Put the generation of an admitted job into the line. Raises `EndingError`."""
        if self._closing:
            raise EndingError("the server is ending")
        job.start(generation, self._pool)

    def end(self) -> None:
        """Take no more, and refuse those that wait; what runs goes on."""
        self._closing = True
        for job in self._jobs:
            job.refuse(running=False)

    def cut(self) -> None:
        """End what runs, at its next token."""
        self._closing = True
        for job in self._jobs:
            self.cut_off |= job.refuse(running=True)

    def shut(self) -> None:
        """Wait until the thread is through; call `cut` before."""
        self._pool.shutdown()

    def _leave(self, job: Job) -> None:
        if job in self._jobs:
            self._told(job)
            self._jobs.remove(job)
