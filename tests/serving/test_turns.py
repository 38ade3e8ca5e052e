"""One text at a time: who waits, who is turned away, who hangs up, and how a server ends."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from running import PATIENCE, Running, until

PROMPT = "once upon a time"


def complete(running: Running, tokens: int = 3, **options: Any) -> Any:
    return running.client.completions.create(model="talker", prompt=PROMPT, max_tokens=tokens, temperature=0, **options)


def hang_up(running: Running, *, stream: bool, tokens: int = 100) -> Callable[[], None]:
    """A request whose answer is not read; returns what hangs up."""
    body = json.dumps(
        {"model": "talker", "prompt": PROMPT, "max_tokens": tokens, "stream": stream, "temperature": 0}
    ).encode()
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(head.encode() + body)
    return connection.close


def test_requests_wait_their_turn_and_get_what_they_would_alone(serving: Callable[..., Running]) -> None:
    running = serving(queue=3)
    seeds = range(4)

    def ask(seed: int) -> Any:
        body = {"model": "talker", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": seed}
        return running.client.completions.create(**body).choices[0].text

    alone = [ask(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, seeds)) == alone
    assert len(set(alone)) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_beyond_the_queue_a_request_is_turned_away(stream: bool, serving: Callable[..., Running]) -> None:
    running = serving(slow=True, queue=1)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(complete, running), pool.submit(complete, running)]
        until(lambda: running.requests == 2)
        with pytest.raises(openai.RateLimitError, match="one text is being generated and 1 wait") as caught:
            complete(running, stream=stream)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        running.allow(6)
        assert len({answer.result().choices[0].text for answer in answers}) == 1
    until(lambda: running.requests == 0)
    running.allow(3)
    assert complete(running).usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_generated_for(stream: bool, serving: Callable[..., Running]) -> None:
    running = serving(slow=True)
    close = hang_up(running, stream=stream)
    running.waiting.wait(PATIENCE)
    running.allow(3)
    until(lambda: running.server.worker._jobs[0].generation.tokens == 3)
    close()
    until(lambda: running.deserted)
    running.allow(1)  # what is being computed is, and no token more
    until(lambda: running.requests == 0)
    assert running.notes.lines[-1].endswith("cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_while_waiting_leaves_the_line(stream: bool, serving: Callable[..., Running]) -> None:
    running = serving(slow=True, queue=1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, running)
        running.waiting.wait(PATIENCE)
        close = hang_up(running, stream=stream)
        until(lambda: running.requests == 2)
        close()
        until(lambda: running.requests == 1)
        running.allow(3)
        assert answer.result().usage.completion_tokens == 3


def test_a_stream_that_is_closed_halfway_ends_the_generation(serving: Callable[..., Running]) -> None:
    running = serving(slow=True)
    running.allow(2)
    with complete(running, 100, stream=True) as stream:
        assert next(iter(stream)).choices[0].text
    until(lambda: running.deserted)
    running.allow(1)
    until(lambda: running.requests == 0)
    assert running.notes.lines[-1].endswith("cancelled")


def test_a_refused_prompt_gives_its_place_back(serving: Callable[..., Running]) -> None:
    running = serving(queue=0)
    for _ in range(3):
        with pytest.raises(openai.BadRequestError):
            running.client.completions.create(model="talker", prompt="")
    assert complete(running).usage.completion_tokens == 3


def test_who_hangs_up_in_the_middle_of_a_request_is_no_failure(
    serving: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    running = serving()
    host, port = running.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + b'{"model"')
        until(lambda: len(running.server.server_state.connections) == 1)
    until(lambda: not running.server.server_state.connections and not running.server.server_state.tasks)
    assert caplog.text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_an_error_and_the_next_request_is_answered(
    stream: bool, serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serving()
    with monkeypatch.context() as patch:
        patch.setattr(running.engine, "forward", lambda *_: (torch.full((288,), torch.nan), None))
        with pytest.raises(openai.APIError, match="logits are not finite") as caught:
            list(complete(running, stream=stream))
    assert stream or isinstance(caught.value, openai.InternalServerError)
    until(lambda: "16 + 0 tokens, failed: the model's logits are not finite" in "".join(running.notes.lines))
    assert complete(running).usage.completion_tokens == 3


def test_a_failure_of_ours_is_a_500_and_its_traceback_is_for_the_log(
    serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serving()
    with monkeypatch.context() as patch:
        patch.setattr(running.engine, "forward", lambda *_: 1 / 0)
        answer = running.send("POST", "/v1/completions", json.dumps({"model": "talker", "prompt": PROMPT}).encode())
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "ZeroDivision" not in answer.error["message"]
    until(lambda: "ZeroDivisionError" in caplog.text)
    assert complete(running).usage.completion_tokens == 3


# The end


def test_a_server_with_nothing_to_do_ends_at_once(serving: Callable[..., Running]) -> None:
    running = serving()
    complete(running)  # its connection stays open, and is no reason to wait
    running.stop()
    running.join()
    assert not running.server.worker.cut_off
    with pytest.raises(openai.APIConnectionError):
        complete(running)


def test_what_runs_is_finished_and_what_waits_is_refused(serving: Callable[..., Running]) -> None:
    running = serving(slow=True)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(complete, running)
        running.waiting.wait(PATIENCE)
        second = pool.submit(complete, running)
        until(lambda: running.requests == 2)
        running.stop()
        with pytest.raises(openai.InternalServerError, match="the server is ending") as caught:
            second.result()
        assert (caught.value.status_code, caught.value.code) == (503, "server_ending")
        running.allow(3)
        assert first.result().usage.completion_tokens == 3
    running.join()
    assert not running.server.worker.cut_off


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_signal_cuts_off_what_runs(stream: bool, serving: Callable[..., Running]) -> None:
    running = serving(slow=True)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: list(complete(running, 100, stream=stream)))
        running.waiting.wait(PATIENCE)
        running.stop(2)
        until(lambda: running.server.worker.cut_off)
        running.allow(1)
        with pytest.raises(openai.APIError, match="has cut this answer off"):
            answer.result()
    running.join()


def test_grace_does_not_last_for_ever(serving: Callable[..., Running]) -> None:
    running = serving(slow=True, grace=0.2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, running, 100)
        running.waiting.wait(PATIENCE)
        running.stop()
        until(lambda: running.server.worker.cut_off)
        running.allow(1)
        with pytest.raises(openai.InternalServerError, match="has cut this answer off"):
            answer.result()
    running.join()
