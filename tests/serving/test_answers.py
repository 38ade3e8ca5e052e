"""What OpenAI's client is answered: the model's own text, whole or streamed."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import torch
from running import Running, until

from prunekit.generation.engine import Engine

PROMPT = "once upon a time"
MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def expected(engine: Engine, ids: list[int], tokens: int) -> str:
    found = engine.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return engine.decode([int(token) for token in found[0, len(ids) :]])


def complete(served: Running, prompt: Any = PROMPT, **options: Any) -> Any:
    return served.client.completions.create(model="talker", prompt=prompt, **{"temperature": 0, **options})


def chat(served: Running, **options: Any) -> Any:
    return served.client.chat.completions.create(model="talker", messages=MESSAGES, **{"temperature": 0, **options})


def test_the_model_is_listed(served: Running) -> None:
    (model,) = served.client.models.list().data
    assert (model.id, model.owned_by) == ("talker", "prunekit")
    assert served.client.models.retrieve("talker") == model
    with pytest.raises(openai.NotFoundError, match=r"no model .*other.* here: this server has .*talker"):
        served.client.models.retrieve("other")


def test_a_completion_is_the_text_of_generate(served: Running) -> None:
    answer = complete(served, max_tokens=9)
    (choice,) = answer.choices
    assert choice.text == expected(served.engine, served.engine.encode(PROMPT), 9)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (answer.model, answer.object) == ("talker", "text_completion")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (16, 9, 25)


def test_a_chat_is_the_text_of_generate_behind_the_template(served: Running) -> None:
    ids = served.engine.encode_chat(MESSAGES)
    for answer in (chat(served, max_tokens=9), chat(served, max_completion_tokens=9)):
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == expected(served.engine, ids, 9)
        assert choice.finish_reason == "length"
        assert answer.object == "chat.completion"
        assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.3, "seed": 5}, {"stop": "aa"}, {"stop": ["zz", "m"], "echo": True}, {"echo": True}],
)
def test_a_stream_adds_up_to_the_answer_in_one_piece(options: dict[str, Any], served: Running) -> None:
    whole = complete(served, max_tokens=20, **options)
    chunks = list(complete(served, max_tokens=20, stream=True, stream_options={"include_usage": True}, **options))
    *pieces, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(pieces) > 2


def test_a_streamed_chat_adds_up_too(served: Running) -> None:
    whole = chat(served, max_tokens=20)
    chunks = list(chat(served, max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_ends_as_the_protocol_says(served: Running) -> None:
    body = {"model": "talker", "prompt": PROMPT, "stream": True, "max_tokens": 2}
    answer = served.send("POST", "/v1/completions", json.dumps(body).encode())
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, empty = answer.body.decode().split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)


def test_defaults_are_those_of_openai(served: Running) -> None:
    assert complete(served).usage.completion_tokens == 16
    assert complete(served, "a" * 120).usage.completion_tokens == 8  # what the context leaves of them
    ids = served.engine.encode_chat(MESSAGES)
    assert chat(served).usage.completion_tokens == min(100, 128 - len(ids))
    drawn = {served.client.completions.create(model="talker", prompt=PROMPT).choices[0].text for _ in range(4)}
    assert len(drawn) > 1  # a temperature of 1 and no seed


def test_a_seed_repeats_a_draw(served: Running) -> None:
    texts = [complete(served, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert complete(served, temperature=1, top_p=1e-9).choices[0].text == complete(served).choices[0].text


def test_a_stop_string_is_not_in_the_answer(served: Running) -> None:
    whole = complete(served, max_tokens=30).choices[0].text
    stop = whole[4:6]
    for answer in (complete(served, max_tokens=30, stop=stop), complete(served, max_tokens=30, stop=["zzz", stop])):
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_a_prompt_may_be_token_ids_or_a_list_of_one(served: Running) -> None:
    text = complete(served).choices[0].text
    ids = served.engine.encode(PROMPT)
    for prompt in ([PROMPT], ids, [ids]):
        assert complete(served, prompt).choices[0].text == text
    assert complete(served, ids, echo=True).choices[0].text == PROMPT + text


def test_content_may_come_in_parts(served: Running) -> None:
    parts: list[Any] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages: list[Any] = [MESSAGES[0], {"role": "user", "content": parts}]
    answer = served.client.chat.completions.create(model="talker", messages=messages, temperature=0)
    assert answer.choices[0].message.content == chat(served).choices[0].message.content


def test_an_answer_may_be_sent_back(served: Running) -> None:
    message = chat(served, max_tokens=3).choices[0].message
    messages: list[Any] = [*MESSAGES, message, {"role": "user", "content": "more"}]
    answer = served.client.chat.completions.create(model="talker", messages=messages, max_tokens=3)
    sent = [*MESSAGES, {"role": "assistant", "content": message.content}, messages[-1]]
    assert answer.usage.prompt_tokens == len(served.engine.encode_chat(sent))


def test_parameters_that_say_nothing_are_accepted(served: Running) -> None:
    nothing = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "seed": None}
    assert complete(served, best_of=1, suffix=None, **nothing).choices[0].text == complete(served).choices[0].text
    plain = chat(served).choices[0].message.content
    more = {"response_format": {"type": "text"}, "tools": [], "logprobs": False, "store": False}
    assert chat(served, **nothing, **more).choices[0].message.content == plain


def test_every_request_is_a_line_without_its_words(served: Running) -> None:
    def lines() -> list[str]:
        return [line for line in served.notes.lines if line.startswith("16 + 2 tokens,")]

    before = len(lines())
    complete(served, max_tokens=2)
    until(lambda: len(lines()) > before)  # the lines of other tests' requests may come late, too
    assert lines()[-1].endswith("tokens/s, length")
    assert PROMPT not in "".join(served.notes.lines)


def test_health(served: Running) -> None:
    until(lambda: served.send("GET", "/health").json == {"status": "ok", "requests": 0})
