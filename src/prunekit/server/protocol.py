"""What requests look like and what is answered: the part of OpenAI's API that one model on one machine can give.

Parameters that would change the text and are not built are refused by name. Where such a parameter has the value that means "as if it
were not given", it is accepted, because clients send those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..generation.engine import Generation
from ..generation.sampling import Sampling, Seed, Stops, Temperature, Tokens, TopP

# Parameters of OpenAI's that are not built, and the value each may have all the same.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}


class RequestError(Exception):
    """An answer with an error in it, in OpenAI's form.

    Attributes:
        status: of HTTP.
        body: the JSON: `{"error": {"message", "type", "param", "code"}}`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})


def _list_of_stops(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


def _one_prompt(value: Any) -> str | list[int]:
    """A text or token ids, perhaps as the only entry of a list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    if isinstance(value, list) and all(isinstance(prompt, (str, list)) for prompt in value):
        raise ValueError(
            f"prompt has {len(value)} prompts, and a request is answered for one: send one after the other"
        )
    raise ValueError("prompt is a text or a list of token ids")


def _text_of(value: Any) -> Any:
    """A message's content, whose parts are joined where it comes in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('content has a part that is no text: only {"type": "text", "text": "..."} is taken')
    return "".join(part["text"] for part in value)


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """What a stream has besides the text."""

    include_usage: bool = False


class Message(_Strict):
    """One turn of a conversation. What is null counts as not given: clients send back what they were answered."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        return _without_nulls(values) if isinstance(values, dict) else values

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]


class Asked(_Strict):
    """What requests for a completion and for a chat have in common; defaults are OpenAI's."""

    model: str
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Annotated[Stops, BeforeValidator(_list_of_stops)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    max_tokens: Tokens | None = None

    default_tokens: ClassVar[int | None] = None  # None: as many as may be

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are those of a stream: send stream=true too, or leave them out")
        return self

    @property
    def tokens(self) -> int | None:
        """How many tokens are asked for."""
        return self.max_tokens

    def sampling(self) -> Sampling:
        """How they are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed, stop=self.stop)


class CompletionRequest(Asked):
    """The body of `/v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    echo: bool = False

    default_tokens: ClassVar[int | None] = 16


class ChatRequest(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None  # its name today; `max_tokens` is the one before

    @model_validator(mode="after")
    def _one_of_the_names(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one of them")
        return self

    @property
    def tokens(self) -> int | None:
        """By either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Kind = TypeVar("Kind", bound=Asked)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body. Raises `RequestError`, which names the parameter that is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise RequestError(400, f"the body is no JSON: {problem}") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body must be a JSON object of parameters")
    given = _without_nulls(values)
    for name in sorted(given.keys() - kind.model_fields.keys()):
        if name not in _NEUTRAL:
            raise RequestError(
                400, f"there is no parameter {shown(name)} here", param=name, code="unsupported_parameter"
            )
        value, neutral = given.pop(name), _NEUTRAL[name]
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            message = f"'{name}' cannot be {shown(value)} here: leave it out, or send {json.dumps(neutral)}"
            raise RequestError(400, message, param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as problem:
        error = problem.errors()[0]
        raise RequestError(400, _sentence(error), param=str(error["loc"][0]) if error["loc"] else None) from None


def _sentence(error: Any) -> str:
    """What is wrong, of one of pydantic's errors."""
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"'{where}' is missing"
    if error["type"] == "extra_forbidden":
        return f"there is no parameter '{where}' here"
    if error["type"] == "model_type":
        return f"{where} cannot be {shown(error['input'])}: it is an object with names and values"
    return f"{where} cannot be {shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def shown(value: Any) -> str:
    """A value as JSON, its middle left out where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


class Shape:
    """The answers to one request: whole, or event by event. `created` is in seconds since 1970."""

    def __init__(self, asked: Asked, *, number: str, model: str, created: int) -> None:
        self._chat = isinstance(asked, ChatRequest)
        self._head = {"id": ("chatcmpl-" if self._chat else "cmpl-") + number, "created": created, "model": model}
        self._usage_wanted = asked.stream_options is not None and asked.stream_options.include_usage

    def whole(self, generation: Generation, before: str) -> dict[str, Any]:
        """The answer in one piece, with the prompt `before` it where that is to be echoed."""
        text = before + generation.text
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._enveloped("", content, generation.finish), "usage": _usage(generation)}

    def first(self, before: str) -> list[dict[str, Any]]:
        """What a stream begins with."""
        if self._chat:
            return [self._enveloped(".chunk", {"delta": {"role": "assistant", "content": ""}}, None)]
        return [self.piece(before)] if before else []

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text in a stream."""
        return self._enveloped(".chunk", {"delta": {"content": text}} if self._chat else {"text": text}, None)

    def last(self, generation: Generation) -> list[dict[str, Any]]:
        """What a stream ends with."""
        end = self._enveloped(".chunk", {"delta": {}} if self._chat else {"text": ""}, generation.finish)
        return [end, {**end, "choices": [], "usage": _usage(generation)}] if self._usage_wanted else [end]

    def _enveloped(self, suffix: str, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": kind, "choices": [choice]}


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": generation.prompt_tokens + generation.tokens,
    }
