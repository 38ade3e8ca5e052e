"""Pieces of text are whole characters, add up to what the tokenizer decodes at once, and have nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import tiny
from prunekit.generation.text import Detokenizer, StopFilter

TOKENIZER = tiny.make_tokenizer()


def byte_level(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def byte_fallback() -> tuple[Tokenizer, Callable[[list[int]], str]]:
    """As of Llama 2: a space is a mark in the token, the first of a text is left out, and bytes are tokens of their own."""
    words = ["▁world", "▁", "lo", "Hel"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        word: 256 + place for place, word in enumerate(words)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, tokenizer.decode


def pieces(decode: Callable[[list[int]], str], ids: list[int], prompt: list[int]) -> list[str]:
    made = Detokenizer(decode, prompt)
    return [*[made.push(token) for token in ids], made.flush()]


@given(st.text())
def test_pieces_add_up_to_the_text(text: str) -> None:
    found = pieces(byte_level, TOKENIZER(text)["input_ids"], TOKENIZER("before it")["input_ids"])
    assert "".join(found) == text


@given(st.lists(st.integers(0, 258)))
def test_bytes_that_are_no_text_are_marked_as_the_tokenizer_marks_them(ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids, [])) == byte_level(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = TOKENIZER("é😀.")["input_ids"]
    assert pieces(byte_level, ids, []) == ["", "é", "", "", "", "😀", ".", ""]
    assert pieces(byte_level, ids[:4], []) == ["", "é", "", "", "\ufffd"]


def test_a_real_replacement_character_is_text_like_any_other() -> None:
    assert "".join(pieces(byte_level, TOKENIZER("a\ufffd\ufffdb\ufffd")["input_ids"], [])) == "a\ufffd\ufffdb\ufffd"


def test_a_word_behind_the_prompt_keeps_its_space() -> None:
    tokenizer, decode = byte_fallback()
    prompt = [tokenizer.token_to_id(word) for word in ("Hel", "lo")]
    world = tokenizer.token_to_id("▁world")
    assert pieces(decode, [world, world], prompt) == [" world", " world", ""]
    assert pieces(decode, [world, world], []) == ["world", " world", ""]  # it begins a text
    emoji = list("😀".encode())
    assert pieces(decode, [*emoji, world], prompt) == ["", "", "", "😀", " world", ""]


def test_special_tokens_are_no_text_and_do_not_cut_it() -> None:
    tokenizer, decode = byte_fallback()
    world, end = tokenizer.token_to_id("▁world"), 300  # the decoder leaves out ids it does not know
    assert pieces(decode, [world, end, world], [tokenizer.token_to_id("lo")]) == [" world", "", " world", ""]


# Stop strings


def passed(stops: list[str], text: list[str]) -> tuple[list[str], bool]:
    """What comes through, piece by piece and at the end, and whether a stop string ended it."""
    made = StopFilter(stops)
    found = []
    for piece in text:
        found.append(made.push(piece))
        if made.stopped:
            return found, True
    return [*found, made.flush()], False


@pytest.mark.parametrize(
    ("stops", "text", "expected", "stopped"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], False),
        (["\n"], ["a", "b\nc"], ["a", "b"], True),
        (["stop"], ["a st", "op b"], ["a ", ""], True),
        (["stop"], ["a st", "ay"], ["a ", "stay", ""], False),
        (["stop"], ["a st"], ["a ", "st"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["bc", "b"], ["ab"], ["a"], True),
        (["xyz", "y"], ["x", "y", "z"], ["", "x"], True),
        (["b", "a"], ["cab"], ["c"], True),
    ],
)
def test_nothing_of_a_stop_string_comes_through(
    stops: list[str], text: list[str], expected: list[str], stopped: bool
) -> None:
    assert passed(stops, text) == (expected, stopped)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=4), max_size=8))
def test_what_comes_through_is_the_text_up_to_the_first_stop(stops: list[str], text: list[str]) -> None:
    found, stopped = passed(stops, text)
    said = "".join(text)
    assert stopped == any(stop in said for stop in stops)
    if not stopped:
        assert "".join(found) == said
        return
    # the piece that completes the first stop string decides: pieces behind it are never looked at
    read = next(
        "".join(text[:end]) for end in range(len(text) + 1) if any(stop in "".join(text[:end]) for stop in stops)
    )
    assert "".join(found) == read[: min(read.find(stop) for stop in stops if stop in read)]
