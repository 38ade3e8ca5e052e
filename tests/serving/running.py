"""A server of a tiny model in a thread of this process, and the official client."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import openai

from prunekit.generation.engine import Engine
from prunekit.progress import Silent
from prunekit.server.run import Server
from prunekit.serving import Limits, address, bound, make_server

# Seconds until what should have happened is given up: many, because a machine may be busy with something else.
PATIENCE = 120


class Notes(Silent):
    """What a server says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """What an answer in OpenAI's form says of an error."""
        assert self.headers["content-type"] == "application/json"
        assert self.json.keys() == {"error"}
        assert self.json["error"].keys() == {"message", "type", "param", "code"}
        return self.json["error"]


class Running:
    """A server that runs in a thread until it is stopped.

    With `slow` every token waits until the test lets it go on, by `allow`.
    """

    def __init__(self, engine: Engine, *, api_key: str | None = None, slow: bool = False, **limits: Any) -> None:
        self.notes = Notes()
        self.engine = engine
        self._allowed = threading.Semaphore(0)
        self.waiting = threading.Event()
        if slow:
            self.engine = Engine(engine.model, engine.tokenizer)
            forward = self.engine.forward

            def held(*words: Any) -> Any:
                self.waiting.set()
                assert self._allowed.acquire(timeout=PATIENCE)
                return forward(*words)

            self.engine.forward = held  # type: ignore[method-assign]
        options = Limits.build(limits)
        self.server: Server = make_server(
            self.engine, name="talker", api_key=api_key, limits=options, progress=self.notes
        )
        self._socket = bound("127.0.0.1", 0)
        self.url = address(self._socket)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._thread.start()
        until(lambda: self.server.started)
        self.client = self.make_client(api_key or "none")

    def make_client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def send(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **headers: str) -> Answer:
        """A request that no client library has made sense of."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def allow(self, forwards: int = 1) -> None:
        """Let so many forward passes go on."""
        for _ in range(forwards):
            self._allowed.release()

    @property
    def requests(self) -> int:
        """Those that run or wait."""
        return self.server.worker.count

    @property
    def deserted(self) -> bool:
        """Whether nobody waits for what runs or waits."""
        return all(job.stopped() for job in self.server.worker._jobs)

    def stop(self, times: int = 1) -> None:
        for _ in range(times):
            self.server.stop()

    def join(self) -> None:
        self._thread.join(timeout=PATIENCE)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.client.close()
        self.allow(1000)
        self.stop(2)
        self.join()


def until(what: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.005)
