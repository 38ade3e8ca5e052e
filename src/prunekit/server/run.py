"""uvicorn with an end of its own: the first signal lets what is being generated finish, the second cuts it off."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .worker import Worker

# Seconds that answers have for their way to the client once nothing is generated any more.
_LAST_SECONDS = 5


class Server(uvicorn.Server):
    """Listens until SIGINT or SIGTERM.

    Args:
        app: the application.
        worker: who generates; told of the end.
        grace: seconds between the first signal and cutting off what still runs.

    Attributes:
        ready: called once it listens and signals end it as they should.
    """

    def __init__(self, app: FastAPI, worker: Worker, grace: float) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(grace) + _LAST_SECONDS,
        )
        super().__init__(config)
        self.worker = worker
        self.ready: Callable[[], None] = lambda: None
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on sockets that are bound, and come back when all is over."""
        asyncio.run(self.serve(sockets))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """The same in a loop that runs already."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            self.worker.cut()  # of a client that has long read nothing, say
            self.worker.shut()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. (uvicorn would raise it once more at its end; here the exit code says what it came to.)"""
        self.stop()

    def stop(self) -> None:
        """Begin to end; called again, end at once. Any thread may call it."""
        if self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self.worker.cut if self.should_exit else self._begin_to_end)
        self.should_exit = True

    def _begin_to_end(self) -> None:
        self.worker.end()
        asyncio.get_running_loop().call_later(self._grace, self.worker.cut)
