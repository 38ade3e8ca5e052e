"""Windows: the text is tokenised as the tokenizer does it, and cut where the seed says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import tiny
from prunekit.calibration.text import Document
from prunekit.calibration.windows import calibration_windows, evaluation_windows, token_hash, tokenise
from prunekit.errors import InputError
from prunekit.model.stream import Windows

TOKENIZER = tiny.make_tokenizer()
HASH = "700a4498438a801b5781533040bce85a20ae4bfe08866f7552ff33e172923b0a"  # of 0 to 11 as little-endian int64


def text_documents(*texts: str) -> list[Document]:
    return [Document(f"text {number}", partial(str, text)) for number, text in enumerate(texts)]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def random_windows(texts: list[Document], seed: int, samples: int = 4, length: int = 16) -> torch.Tensor:
    found = calibration_windows(texts, TOKENIZER, samples=samples, length=length, seed=seed, sampling="random")
    assert found.keep is None
    assert found.ids.shape == (samples, length)
    return found.ids


def test_one_document_is_tokenised_as_the_tokenizer_does() -> None:
    text = "Grüße!  Two  spaces,\n\ta tab.\n"
    assert tokenise(text_documents(text), TOKENIZER).tolist() == ids_of(text)


def test_a_blank_line_stands_between_documents_only() -> None:
    texts = ["one", "two", "three"] * 30  # more than are tokenised in one call
    assert tokenise(text_documents(*texts), TOKENIZER).tolist() == ids_of("\n\n".join(texts))


def test_empty_documents_leave_no_trace() -> None:
    assert tokenise(text_documents("", "one", " \n", "two", ""), TOKENIZER).tolist() == ids_of("one\n\ntwo")
    assert len(tokenise(text_documents("", "  "), TOKENIZER)) == 0


def test_special_tokens_open_every_document() -> None:
    tokenizer = tiny.make_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begin)]
    )
    expected = [begin, *ids_of("one\n\n"), begin, *ids_of("two")]
    assert tokenise(text_documents("one", "two"), tokenizer).tolist() == expected


def test_tokenising_stops_once_there_are_enough() -> None:
    def never() -> str:
        raise AssertionError("this text was not needed")

    texts = text_documents(*["some words"] * 200)
    stream = tokenise([*texts, Document("unread", never)], TOKENIZER, enough=100)
    assert 100 <= len(stream) < len(ids_of("some words\n\n")) * 200
    with pytest.raises(AssertionError, match="not needed"):
        tokenise([*texts, Document("unread", never)], TOKENIZER)


def test_random_windows_come_back_by_seed_and_differ_by_seed() -> None:
    texts = text_documents(tiny.make_text(400, seed=1), tiny.make_text(400, seed=2))
    assert torch.equal(random_windows(texts, 0), random_windows(texts, 0))
    assert not torch.equal(random_windows(texts, 0), random_windows(texts, 1))


def test_random_windows_are_distinct_pieces_of_the_text() -> None:
    text = tiny.make_text(400)
    found = random_windows(text_documents(text), 0, samples=20)
    pieces = [TOKENIZER.decode(row) for row in found]
    assert all(piece in text for piece in pieces)
    assert len({text.index(piece) for piece in pieces}) == 20
    # shuffled, so that any few windows in a row come from all over the text
    assert [text.index(piece) for piece in pieces] != sorted(text.index(piece) for piece in pieces)


def test_random_windows_draw_the_documents_too() -> None:
    # far more text than is tokenised: a seed that only moved windows would always see the first documents
    texts = text_documents(*[letter * 50 for letter in "abcdefghijklmnopqrstuvwxyz" for _ in range(40)])
    seen = {TOKENIZER.decode(random_windows(texts, seed)[0])[0] for seed in range(12)}
    assert len(seen) > 4


def test_first_windows_are_a_contiguous_prefix() -> None:
    text = tiny.make_text(100)
    found = calibration_windows(text_documents(text), TOKENIZER, samples=5, length=16, seed=3, sampling="first")
    assert found.ids.flatten().tolist() == ids_of(text)[: 5 * 16]


def test_exactly_enough_text_is_enough() -> None:
    texts = text_documents("x" * 64)
    assert random_windows(texts, 0, samples=4, length=16).shape == (4, 16)
    assert len(calibration_windows(texts, TOKENIZER, samples=4, length=16, seed=0, sampling="first")) == 4
    assert len(evaluation_windows(texts, TOKENIZER, length=64)) == 1


@pytest.mark.parametrize("sampling", ["random", "first"])
def test_too_little_text_is_refused_with_what_there_is(sampling: str) -> None:
    texts = text_documents("x" * 63)
    for samples, length, words in (
        (4, 16, "63 tokens, enough for 3"),
        (1, 64, "63 tokens, less than one window of 64"),
    ):
        with pytest.raises(InputError, match=words):
            calibration_windows(texts, TOKENIZER, samples=samples, length=length, seed=0, sampling=sampling)


def test_evaluation_windows_drop_the_tail() -> None:
    text = tiny.make_text(100)
    ids = ids_of(text)
    assert len(ids) % 16  # else there is no tail
    found = evaluation_windows(text_documents(text), TOKENIZER, length=16)
    assert len(found) == len(ids) // 16
    assert found.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]


def test_evaluation_samples_are_the_first_windows() -> None:
    texts = text_documents(tiny.make_text(100))
    every = evaluation_windows(texts, TOKENIZER, length=16)
    assert torch.equal(evaluation_windows(texts, TOKENIZER, length=16, samples=3).ids, every.ids[:3])
    with pytest.raises(InputError, match="1000 windows"):
        evaluation_windows(texts, TOKENIZER, length=16, samples=1000)


def test_the_token_hash_is_of_the_tokens_alone() -> None:
    ids = torch.arange(12).reshape(3, 4)
    # fixed: manifests of other releases and machines must stay comparable
    assert token_hash(Windows(ids)) == HASH
    assert token_hash(Windows(torch.arange(24).reshape(3, 8)[:, ::2] // 2)) == HASH  # whatever the memory layout
    assert token_hash(Windows(ids.flip(0))) != HASH
    keep = torch.ones(3, 4, dtype=torch.bool)
    masked = token_hash(Windows(ids, keep))
    assert masked != HASH
    keep[0, 0] = False
    assert token_hash(Windows(ids, keep)) != masked
