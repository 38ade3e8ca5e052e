"""The routes. Every answer is JSON, errors included, or a stream of events; nothing is asked of the network, nothing is counted."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..errors import InputError, PrunekitError
from ..generation.engine import Engine, Generation
from .protocol import Asked, ChatRequest, CompletionRequest, Kind, RequestError, Shape, parse, shown
from .worker import BusyError, EndingError, Job, Worker

Value = TypeVar("Value")

_GONE = "the client has hung up"  # which it will not read

# So many times as much as a body may have is read and thrown away, because a client that is still sending sees no answer.
_PATIENCE = 16


def make_app(
    engine: Engine, worker: Worker, *, name: str, api_key: str | None, max_tokens: int, max_request_bytes: int
) -> FastAPI:
    """The application.

    Args:
        engine: what generates.
        worker: who does it, and when.
        name: what clients call the model.
        api_key: what clients of `/v1` must send, if anything.
        max_tokens: that one request may ask for.
        max_request_bytes: of a body.
    """
    desk = _Desk(engine, worker, name=name, max_tokens=max_tokens, max_request_bytes=max_request_bytes)

    def check_key(authorization: Annotated[str, Header()] = "") -> None:
        if api_key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {api_key}".encode()):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise RequestError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    # pages of documentation would fetch their scripts from elsewhere; FastAPI's telemetry is off whatever the environment says
    silent: dict[str, Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    options: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None, "telemetry": silent}
    app = FastAPI(title="prunekit", **options)
    app.add_exception_handler(Exception, _answer_problem)
    for kind in (RequestError, HTTPException, PrunekitError):
        app.add_exception_handler(kind, _answer_problem)
    routes = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    routes.add_api_route("/models", desk.models, methods=["GET"], response_model=None)
    routes.add_api_route("/models/{asked:path}", desk.model, methods=["GET"], response_model=None)
    routes.add_api_route("/completions", desk.complete, methods=["POST"], response_model=None)
    routes.add_api_route("/chat/completions", desk.chat, methods=["POST"], response_model=None)
    app.include_router(routes)
    app.add_api_route("/health", desk.health, methods=["GET"], response_model=None)
    return app


class _Desk:
    """Takes requests, one method a route."""

    def __init__(self, engine: Engine, worker: Worker, *, name: str, max_tokens: int, max_request_bytes: int) -> None:
        self._engine = engine
        self._worker = worker
        self._name = name
        self._max_tokens = max_tokens
        self._max_request_bytes = max_request_bytes
        self._created = int(time.time())

    async def health(self) -> Response:
        return _json({"status": "ok", "requests": self._worker.count})

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, asked: str) -> Response:
        self._check_model(asked)
        return _json(self._described())

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, await self._read(request, CompletionRequest))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, await self._read(request, ChatRequest))

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "prunekit"}

    def _check_model(self, asked: str) -> None:
        if asked != self._name:
            message = f"there is no model {shown(asked)} here: this server has {shown(self._name)}"
            raise RequestError(404, message, param="model", code="model_not_found")

    async def _read(self, request: Request, kind: type[Kind]) -> Kind:
        """The request, checked as far as that can be done without the model. Raises `RequestError`."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the body must be JSON, sent with 'Content-Type: application/json'")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, "the body must be sent as it is, without 'Content-Encoding'")
        asked = parse(await self._body(request), kind)
        self._check_model(asked.model)
        if (asked.tokens or 0) > self._max_tokens:
            message = f"{asked.tokens} tokens are asked for, and this server generates {self._max_tokens} at most"
            raise RequestError(400, message, param="max_tokens")
        return asked

    async def _body(self, request: Request) -> bytes:
        body, read = bytearray(), 0
        try:
            async for chunk in request.stream():
                read += len(chunk)
                if read <= self._max_request_bytes:
                    body += chunk
                elif read > _PATIENCE * self._max_request_bytes:
                    break
        except ClientDisconnect:
            raise RequestError(499, _GONE) from None
        if read > self._max_request_bytes:
            message = f"the body has more than the {self._max_request_bytes} bytes this server takes"
            raise RequestError(413, message, code="request_too_large", headers={"Connection": "close"})
        return bytes(body)

    async def _answer(self, request: Request, asked: Asked) -> Response:
        with ExitStack() as stack:
            job = self._admit()
            stack.callback(job.close)
            generation = await asyncio.to_thread(self._prepare, asked, job)
            self._worker.start(job, generation)
            shape = Shape(asked, number=uuid.uuid4().hex, model=self._name, created=int(time.time()))
            before = await asyncio.to_thread(self._echoed, asked)
            if asked.stream:
                return _Events(_events(job, generation, shape, before), stack.pop_all())
            await _unless_gone(request, _through(job))
            return _json(shape.whole(generation, before))

    def _admit(self) -> Job:
        try:
            return self._worker.admit()
        except BusyError as problem:
            raise RequestError(429, str(problem), code="queue_full", headers={"Retry-After": "1"}) from None

    def _prepare(self, asked: Asked, job: Job) -> Generation:
        """What is to be generated. Raises `RequestError` where the prompt is wrong or does not fit."""
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        try:
            prompt = self._encoded(asked)
        except InputError as problem:
            raise RequestError(400, str(problem), param=param) from None
        most = self._max_tokens if asked.default_tokens is None else min(asked.default_tokens, self._max_tokens)
        try:
            tokens = self._engine.fit(len(prompt), asked.tokens, most)
        except InputError as problem:
            raise RequestError(400, str(problem), param=param, code="context_length_exceeded") from None
        return self._engine.generate(prompt, asked.sampling(), tokens, job.stopped)

    def _encoded(self, asked: Asked) -> list[int]:
        if isinstance(asked, ChatRequest):
            return self._engine.encode_chat([message.model_dump() for message in asked.messages])
        assert isinstance(asked, CompletionRequest)
        prompt = asked.prompt
        return self._engine.encode(prompt) if isinstance(prompt, str) else self._engine.check_ids(prompt)

    def _echoed(self, asked: Asked) -> str:
        """The prompt, where it is to come before the text."""
        if not isinstance(asked, CompletionRequest) or not asked.echo:
            return ""
        return asked.prompt if isinstance(asked.prompt, str) else self._engine.decode(asked.prompt)


class _Events(StreamingResponse):
    """A stream of events that gives its job up when it ends, however it ends."""

    def __init__(self, events: AsyncIterator[str], closing: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._closing:
            await super().__call__(scope, receive, send)


async def _events(job: Job, generation: Generation, shape: Shape, before: str) -> AsyncIterator[str]:
    for event in shape.first(before):
        yield _event(event)
    try:
        async for piece in job.pieces():
            yield _event(shape.piece(piece))
    except Exception as problem:  # the status is sent already, so the error is an event
        yield _event(_refusal(problem).body)
        if not isinstance(problem, PrunekitError):
            raise
        return
    for event in shape.last(generation):
        yield _event(event)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _through(job: Job) -> None:
    async for _ in job.pieces():
        pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """What `work` gives. Raises `RequestError`, with `work` cancelled, where the client hangs up before."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError(499, _GONE)
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(problem: Exception) -> RequestError:
    """How a problem is answered."""
    if isinstance(problem, RequestError):
        return problem
    if isinstance(problem, HTTPException):
        return RequestError(
            problem.status_code, f"{problem.detail}: see /v1/models, /v1/completions, /v1/chat/completions, /health"
        )
    if isinstance(problem, EndingError):
        return RequestError(503, str(problem), code="server_ending")
    if isinstance(problem, PrunekitError):
        return RequestError(500, str(problem))
    return RequestError(500, "the server failed; its log says how")


async def _answer_problem(_: Request, problem: Exception) -> Response:
    refusal = _refusal(problem)
    return _json(refusal.body, refusal.status, refusal.headers)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII, because what a client sent and is named in an error may be no valid Unicode
    return Response(json.dumps(content), status, headers, media_type="application/json")
