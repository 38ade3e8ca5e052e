"""Texts share no passage, and it is found out where they do."""

from __future__ import annotations

import pytest
import torch

import tiny
from prunekit.calibration.document import Document
from prunekit.calibration.windows import calibration_windows
from prunekit.errors import InputError
from prunekit.model.stream import Windows
from prunekit.search.texts import RUN, passages, sharing, windows_apart


def drawn(count: int, length: int, seed: int) -> Windows:
    return Windows(torch.randint(0, 1000, (count, length), generator=torch.Generator().manual_seed(seed)))


def test_passages_are_equal_where_the_tokens_are_and_nowhere_else() -> None:
    windows = drawn(3, 120, 0)
    windows.ids[2, 30:80] = windows.ids[0, 10:60]
    found = passages(windows, 48)
    same = {(a, b) for a in range(73) for b in range(73) if found[0, a] == found[2, b]}
    slow = {
        (a, b)
        for a in range(73)
        for b in range(73)
        if torch.equal(windows.ids[0, a : a + 48], windows.ids[2, b : b + 48])
    }
    assert same == slow == {(10, 30), (11, 31), (12, 32)}


@pytest.mark.parametrize(("common", "shares"), [(RUN - 1, False), (RUN, True), (RUN + 5, True)])
def test_a_window_shares_what_is_as_long_as_a_passage(common: int, shares: bool) -> None:
    one, other = drawn(2, 200, 1), drawn(3, 200, 2)
    other.ids[1, 7 : 7 + common] = one.ids[0, 90 : 90 + common]
    assert sharing(other, [one]) == ([1] if shares else [])


def test_short_windows_are_compared_as_a_whole() -> None:
    one, other = drawn(2, 200, 1), drawn(3, 16, 2)
    other.ids[2] = one.ids[1, 50:66]
    assert sharing(other, [one]) == [2]
    assert sharing(other, []) == []


def test_windows_are_drawn_apart_from_others_and_by_the_seed() -> None:
    tokenizer = tiny.make_tokenizer()
    documents = [Document("text", tiny.make_text)]
    calibration = calibration_windows(documents, tokenizer, samples=8, length=64, seed=0, sampling="random")
    asked = {"samples": 6, "length": 64, "apart_from": [calibration], "what": "judging", "advice": "advice"}
    first = windows_apart(documents, tokenizer, seed=0, **asked)  # type: ignore[arg-type]
    assert first.ids.shape == (6, 64)
    assert sharing(first, [calibration]) == []
    assert torch.equal(first.ids, windows_apart(documents, tokenizer, seed=0, **asked).ids)  # type: ignore[arg-type]
    assert not torch.equal(first.ids, windows_apart(documents, tokenizer, seed=1, **asked).ids)  # type: ignore[arg-type]


def test_a_text_with_too_few_windows_left_is_refused_with_numbers() -> None:
    tokenizer = tiny.make_tokenizer()
    documents = [Document("text", lambda: tiny.make_text()[:640])]
    everything = calibration_windows(documents, tokenizer, samples=5, length=128, seed=0, sampling="first")
    with pytest.raises(
        InputError, match=r"judging takes 2 windows of 64 tokens, and of the 10 the text has 0 share no 48"
    ):
        windows_apart(
            documents, tokenizer, samples=2, length=64, seed=0, apart_from=[everything], what="judging", advice="more"
        )
