"""`serve` as a command: what it says, what it refuses before it starts, and the exit code of each of its ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import prunekit
from prunekit import generating, serving
from prunekit.generation.engine import Engine
from prunekit.server.run import Server
from test_bad_input import assert_refused
from test_cli import Done, call

PATIENCE = 120  # seconds; a machine may be busy with something else
COMPUTING = ["--dtype", "float32", "--device", "cpu"]


def ask(url: str, tokens: int = 3) -> Any:
    body = json.dumps({"model": "talker", "prompt": "hello", "max_tokens": tokens, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def serve(folder: Path, client: Callable[[str], None], *words: object, end_by: signal.Signals = signal.SIGTERM) -> Done:
    """The command in this process; `client` is called in a thread with the address once it listens, and then a signal ends it."""

    def use() -> None:
        end = time.monotonic() + PATIENCE
        said = None
        while said is None and time.monotonic() < end:
            time.sleep(0.01)
            said = re.search(r"on (http://\S+);", sys.stderr.getvalue())  # type: ignore[attr-defined]
        try:
            assert said
            client(said[1])
        finally:
            os.kill(os.getpid(), end_by)

    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # as it is behind every command: a signal too many is no end of the tests
    thread = threading.Thread(target=use)
    thread.start()
    done = call("serve", folder, "--port", 0, *COMPUTING, *words)
    thread.join()
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_its_good_end(number: signal.Signals, talker: Path) -> None:
    answers: list[Any] = []

    done = serve(talker, lambda url: answers.append(ask(url)), end_by=number)
    assert (done.code, done.out) == (0, ""), done.err
    assert answers[0]["usage"]["completion_tokens"] == 3
    first, second = done.err.splitlines()
    assert re.fullmatch(r"serving talker on http://127\.0\.0\.1:\d+/v1; Ctrl-C ends it", first)
    assert second.startswith("5 + 3 tokens, ")


def test_an_answer_that_is_cut_off_is_an_interrupted_run(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, running = Engine.forward, threading.Event()

    def slow(*words: Any) -> Any:
        running.set()
        time.sleep(0.05)
        return forward(*words)

    def client(url: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, url, 100)
            running.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                answer.result()
            caught.value.close()

    monkeypatch.setattr(Engine, "forward", slow)
    done = serve(talker, client)
    assert done.code == 130, done.err
    assert done.err.splitlines()[-1].endswith("cancelled")


def test_the_process_really_ends(talker: Path) -> None:
    words = [sys.executable, "-m", "prunekit", "serve", str(talker), "--port", "0", *COMPUTING]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        try:
            said = re.search(r"on (http://\S+);", process.stderr.readline())
            assert said
            assert ask(said[1])["usage"]["completion_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
        assert process.stdout.read() == ""


def test_name_key_and_environment(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an exporter in the environment is not heard: nothing is counted
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PRUNEKIT_API_KEY", "secret")
    found: list[Any] = []

    def client(url: str) -> None:
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found.append(json.load(answer))

    done = serve(talker, client, "--name", "mine")
    assert done.code == 0, done.err
    assert [model["id"] for model in found[0]["data"]] == ["mine"]
    assert "secret" not in done.err


def test_an_open_address_is_warned_of(talker: Path) -> None:
    for words, warned in (([], True), (["--api-key", "secret"], False)):
        done = serve(talker, lambda _: None, "--host", "0.0.0.0", *words)
        assert done.code == 0, done.err
        assert ("whoever reaches this address can use it: --api-key KEY" in done.err) == warned


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-tokens", 0], ["max_tokens", "0"]),
        (["--max-request-bytes", 0], ["max_request_bytes"]),
        (["--queue", -1], ["queue", "-1"]),
        (["--grace", "nan"], ["grace"]),
        (["--grace", -1], ["grace"]),
        (["--port", 70000], ["70000"]),
        (["--port", -1], ["-1"]),
        (["--host", "no such host"], ["'no such host'"]),
        (["--host", "203.0.113.1"], ["cannot listen on '203.0.113.1'", "--host"]),
        (["--api-key", ""], ["API key"]),
        (["--api-key", "sécret"], ["API key", "ASCII"]),
        (["--runtime", "spare"], ["'spare'"]),
        (["--dtype", "int8"], ["int8"]),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[object], named: list[str], talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "run", None)
    assert_refused(call("serve", talker, "--port", 0, *COMPUTING, *words), *named)


def test_a_port_in_use_is_known_before_the_model_is_loaded(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(call("serve", talker, "--port", port), f"port {port}", "in use", "--port, or 0 for a free one")


def test_a_missing_extra_is_one_sentence(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert_refused(call("serve", talker), "fastapi and uvicorn", "pip install 'prunekit[serve]'")


def test_what_clients_call_a_model(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(talker)
    for given, expected in ((str(talker), "talker"), (".", "talker"), ("org/name", "org/name"), ("smollm2-135m",) * 2):
        assert serving.model_name(given) == expected


def test_addresses_are_those_of_browsers() -> None:
    with serving.bound("127.0.0.1", 0) as listening:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", serving.address(listening))
    if socket.has_ipv6:
        try:
            listening = serving.bound("::1", 0)
        except prunekit.InputError:
            pytest.skip("no IPv6 here")
        with listening:
            assert re.fullmatch(r"http://\[::1\]:\d+", serving.address(listening))
