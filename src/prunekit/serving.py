"""`serve`: a model behind OpenAI's routes, on this machine. Needs `prunekit[serve]`, which only the room `server` imports."""

from __future__ import annotations

import ipaddress
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from .errors import InputError, PrunekitError
from .generating import open_engine
from .generation.sampling import Tokens
from .progress import Progress
from .settings import Section

if TYPE_CHECKING:
    from .generation.engine import Engine
    from .server.run import Server
    from .server.worker import Job


class Limits(Section):
    """What a server takes.

    Attributes:
        max_tokens: that one request may generate at most.
        max_request_bytes: of a request's body.
        queue: requests that may wait while one is answered.
        grace: seconds that what runs has left after the first signal.
    """

    holder: ClassVar[str] = "a server"

    max_tokens: Tokens = 1024
    max_request_bytes: int = Field(1_000_000, ge=1)
    queue: int = Field(16, ge=0)
    grace: float = Field(10.0, ge=0, allow_inf_nan=False)


def serve_model(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    limits: Limits,
    opening: dict[str, Any],
    progress: Progress,
) -> None:
    """Serve until a signal ends it; see `prunekit.serve`. `opening` is how the model is opened.

    Raises:
        InputError: something in the input is wrong, or FastAPI or uvicorn is missing.
        KeyboardInterrupt: a request was cut off.
    """
    missing = [package for package in ("fastapi", "uvicorn") if find_spec(package) is None]
    if missing:
        raise InputError(f"serve needs {' and '.join(missing)}, not installed here: pip install 'prunekit[serve]'")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("the API key must be plain ASCII without spaces around it, and not empty")
    with bound(host, port) as listening:  # before the model is loaded: a port in use is known at once
        engine = open_engine(model, **opening, progress=progress)
        called = name or model_name(model)
        server = make_server(engine, name=called, api_key=api_key, limits=limits, progress=progress)
        server.ready = lambda: _welcome(called, listening, api_key, progress)
        server.run([listening])
    if server.worker.cut_off:
        raise KeyboardInterrupt


def make_server(engine: Engine, *, name: str, api_key: str | None, limits: Limits, progress: Progress) -> Server:
    """A server that is ready to run on sockets that are bound."""
    from .server.app import make_app
    from .server.run import Server
    from .server.worker import Worker

    worker = Worker(limits.queue, told=lambda job: _tell(job, progress))
    app = make_app(
        engine,
        worker,
        name=name,
        api_key=api_key,
        max_tokens=limits.max_tokens,
        max_request_bytes=limits.max_request_bytes,
    )
    return Server(app, worker, limits.grace)


def bound(host: str, port: int) -> socket.socket:
    """A socket on that address, which does not listen yet. Raises `InputError`."""
    if not 0 <= port < 2**16:  # the system would take the remainder
        raise InputError(f"port {port} is none: it is from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as problem:
        raise InputError(f"'{host}' port {port} is no address to listen on: {problem}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except OSError as problem:
        made.close()
        raise InputError(
            f"cannot listen on '{host}' port {port} ({problem}): give another --port, or 0 for a free one, or another --host"
        ) from None
    return made


def address(listening: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_name(model: str) -> str:
    """What clients call a model: a folder's own name, or the hub id."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _welcome(name: str, listening: socket.socket, api_key: str | None, progress: Progress) -> None:
    progress.say(f"serving {name} on {address(listening)}/v1; Ctrl-C ends it")
    if api_key is None and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        progress.say("whoever reaches this address can use it: --api-key KEY asks them for one")


def _tell(job: Job, progress: Progress) -> None:
    """One line about an answer; nothing of what was said in it."""
    made = job.generation
    if made is None:
        return
    if isinstance(job.problem, PrunekitError):
        progress.say(f"{made.prompt_tokens} + {made.tokens} tokens, failed: {job.problem}")
    elif made.finish is not None:
        speed = "" if made.decode is None else f", {made.decode:.1f} tokens/s"
        progress.say(f"{made.prompt_tokens} + {made.tokens} tokens{speed}, {made.finish}")
