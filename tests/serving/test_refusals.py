"""What is wrong with a request is said in OpenAI's form, with the parameter's name; nothing wrong is ever a failure of the server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from running import PATIENCE, Running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def refused(served: Running, path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The error in the answer to a request that would be right but for `values`."""
    right = {"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}
    answer = served.send("POST", path, json.dumps({"model": "talker", **right, **values}).encode())
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    found: dict[str, Any] = answer.error
    return found


BOTH = [
    ({"n": 2}, "n", "'n' cannot be 2 here: leave it out, or send 1"),
    ({"n": True}, "n", "'n' cannot be true here"),
    ({"logprobs": 0}, "logprobs", "'logprobs' cannot be 0 here: leave it out, or send false"),
    ({"presence_penalty": 0.5}, "presence_penalty", "cannot be 0.5"),
    ({"logit_bias": {"50": 1}}, "logit_bias", 'cannot be {"50": 1}'),
    ({"tools": [{"type": "function"}]}, "tools", "'tools' cannot be"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'send {"type": "text"}'),
    ({"top_k": 5}, "top_k", 'there is no parameter "top_k" here'),
    ({"\ud800": 5}, "\ud800", 'there is no parameter "\\ud800" here'),
    ({"temperature": 2.5}, "temperature", "temperature cannot be 2.5: input should be less than or equal to 2"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", 'temperature cannot be "hot"'),
    ({"temperature": float("nan")}, "temperature", "temperature cannot be NaN"),
    ({"top_p": 0}, "top_p", "top_p cannot be 0"),
    ({"seed": 1.5}, "seed", "seed cannot be 1.5"),
    ({"seed": 2**64}, "seed", "seed cannot be"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens cannot be 0"),
    ({"max_tokens": "9"}, "max_tokens", 'max_tokens cannot be "9"'),
    ({"max_tokens": 101}, "max_tokens", "101 tokens are asked for, and this server generates 100 at most"),
    ({"stop": ""}, "stop", 'stop.0 cannot be ""'),
    ({"stop": ["a", 5]}, "stop", "stop.1 cannot be 5"),
    ({"stop": ["a"] * 17}, "stop", "stop cannot be"),
    ({"stream": "yes"}, "stream", 'stream cannot be "yes"'),
    ({"stream_options": {"usage": True}}, "stream_options", "no parameter 'stream_options.usage'"),
    ({"stream_options": "x", "stream": True}, "stream_options", "it is an object with names and values"),
    ({"stream_options": {"include_usage": True}}, None, "send stream=true too"),
    ({"model": 5}, "model", "model cannot be 5"),
    ({"model": None}, "model", "'model' is missing"),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("values", "param", "words"), BOTH, ids=[str(place) for place in range(len(BOTH))])
def test_a_wrong_parameter_is_named(path: str, values: dict[str, Any], param: str, words: str, served: Running) -> None:
    error = refused(served, path, values)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"prompt": None}, "prompt", "'prompt' is missing"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": 5}, "prompt", "a text or a list of token ids"),
        ({"prompt": [[1], "a"]}, "prompt", "has 2 prompts, and a request is answered for one"),
        ({"prompt": []}, "prompt", "no token"),
        ({"prompt": [[]]}, "prompt", "no token"),
        ({"prompt": [1, 288]}, "prompt", "token 288 is not one of the 288"),
        ({"prompt": [1, True]}, "prompt", "a text or a list of token ids"),
        ({"prompt": [-1]}, "prompt", "token -1 is not one"),
        ({"prompt": [2**70]}, "prompt", "is not one of the 288"),
        ({"prompt": "a\ud800"}, "prompt", "no valid Unicode at character 1"),
        ({"prompt": "a" * 128}, "prompt", "a prompt of 128 tokens does not fit the 128 positions"),
        ({"prompt": "a" * 120, "max_tokens": 9}, "prompt", "120 tokens and 9 behind it do not fit"),
        ({"echo": 1}, "echo", "echo cannot be 1"),
        ({"suffix": "end"}, "suffix", "'suffix' cannot be \"end\""),
        ({"best_of": 3}, "best_of", "'best_of' cannot be 3"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "there is no parameter"),
    ],
)
def test_a_wrong_completion_is_refused(values: dict[str, Any], param: str, words: str, served: Running) -> None:
    error = refused(served, COMPLETIONS, values)
    assert (error["param"], words in error["message"]) == (param, True), error


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"messages": None}, "messages", "'messages' is missing"),
        ({"messages": []}, "messages", "messages cannot be []"),
        ({"messages": "hello"}, "messages", 'messages cannot be "hello"'),
        ({"messages": ["hello"]}, "messages", 'messages.0 cannot be "hello": it is an object'),
        ({"messages": [{"role": "user"}]}, "messages", "'messages.0.content' is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "a part that is no text"),
        ({"messages": [{**MESSAGES[0], "tool_calls": []}]}, "messages", "no parameter 'messages.0.tool_calls'"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "a"}]}, "messages", "system comes first"),
        ({"messages": [{"role": "user", "content": "a\udfff"}]}, "messages", "no valid Unicode"),
        ({"messages": [{"role": "user", "content": "a" * 128}]}, "messages", "does not fit the 128 positions"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, None, "give one of them"),
        ({"max_completion_tokens": 101}, "max_tokens", "101 tokens are asked for"),
        ({"echo": True}, "echo", "there is no parameter"),
    ],
)
def test_a_wrong_chat_is_refused(values: dict[str, Any], param: str | None, words: str, served: Running) -> None:
    error = refused(served, CHAT, values)
    assert (error["param"], words in error["message"]) == (param, True), error


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'"a"', b"[" * 100_000, b"1" * 5000, b'{"model": NaN}'])
def test_a_body_that_is_no_object_is_refused(body: bytes, served: Running) -> None:
    answer = served.send("POST", COMPLETIONS, body)
    assert answer.status == 400
    assert len(answer.error["message"]) < 200


def test_only_json_is_read(served: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a page in a browser can send anywhere
        answer = served.send("POST", COMPLETIONS, b'{"model": "talker", "prompt": "a"}', **{"Content-Type": kind})
        assert answer.status == 415
        assert "Content-Type: application/json" in answer.error["message"]
    answer = served.send("POST", COMPLETIONS, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert (answer.status, "Content-Encoding" in answer.error["message"]) == (415, True)
    fine = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert served.send("POST", COMPLETIONS, b'{"model": "talker", "prompt": "a"}', **fine).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/complete", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_what_is_not_there_is_said_in_the_same_form(method: str, path: str, status: int, served: Running) -> None:
    answer = served.send(method, path)
    assert answer.status == status
    assert "/v1/chat/completions" in answer.error["message"]


def test_another_model_is_refused(served: Running) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no model .*gpt.* here: this server has .*talker") as caught:
        served.client.completions.create(model="gpt", prompt="hello")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_that_does_not_fit_has_its_code(served: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model="talker", prompt="a" * 200)
    assert caught.value.code == "context_length_exceeded"


def test_chat_without_a_template_is_refused(serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = serving()
    monkeypatch.setattr(running.engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        running.client.chat.completions.create(model="talker", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("size", [2001, 20_000, 1_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(size: int, chunked: bool, serving: Callable[..., Running]) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (body[start : start + 1000] for start in range(0, size, 1000))

    body = json.dumps({"model": "talker", "prompt": "a"}).encode().ljust(size)
    running = serving(max_request_bytes=2000)
    if size > 16 * 2000:  # too large to be read to its end: the answer is there for those that look
        assert answered_early(running, size).startswith(b"HTTP/1.1 413")
        return
    answer = running.send("POST", COMPLETIONS, chunks() if chunked else body)
    assert answer.status == 413
    assert "more than the 2000 bytes" in answer.error["message"]
    assert running.send("POST", COMPLETIONS, body[:2000]).status == 200


def answered_early(running: Running, size: int) -> bytes:
    """What comes back while a body of `size` bytes is still on its way."""
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + b" " * (16 * 2000 + 1))
        return connection.recv(1000)


def test_a_key_is_asked_for_before_anything_else(serving: Callable[..., Running]) -> None:
    running = serving(api_key="secret", max_tokens=5)
    answer = running.client.completions.create(model="talker", prompt="hello", temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    for wrong in ("secre", "secrets", "", "sécret"):
        answer = running.send("POST", COMPLETIONS, b"{", Authorization=f"Bearer {wrong}".encode().decode("latin-1"))
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert running.send("GET", "/v1/models").status == 401
    assert running.send("GET", "/health").status == 200
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        running.make_client("other").models.list()
