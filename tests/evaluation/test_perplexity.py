"""Perplexity by its definition: the whole model in one go, in float64, summed in plain Python."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import prunekit
import tiny
from helpers import draw_ids, streamed
from prunekit.errors import InputError
from prunekit.evaluation import perplexity as module
from prunekit.evaluation.perplexity import chunk_tokens, negative_log_likelihood, perplexity
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Windows

IDS = draw_ids(3, 20, seed=2)


def slow_perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """exp of the mean of −log p(next token), p being a softmax written out."""
    with torch.inference_mode():
        logits = copy.deepcopy(model).double()(ids, use_cache=False).logits
    losses = []
    for window, scores in zip(ids.tolist(), logits.tolist(), strict=True):
        for position in range(len(window) - 1):
            highest = max(scores[position])
            total = math.fsum(math.exp(score - highest) for score in scores[position])
            losses.append(highest + math.log(total) - scores[position][window[position + 1]])
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_perplexity_is_the_plain_definition(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, family)
    source = streamed(tmp_path)
    found, predictions = perplexity(source, Windows(IDS), batch=2)
    assert predictions == 3 * 19
    assert found == pytest.approx(slow_perplexity(model, IDS), rel=1e-5)
    assert all(parameter.device.type == "meta" for parameter in source.module.parameters())


def test_soft_capping_is_part_of_the_model() -> None:
    # Logits far beyond the cap, so that leaving it out would show.
    model = tiny.make_model("gemma2", final_logit_softcapping=0.5)
    found, _ = perplexity(ResidentModel(model), Windows(IDS))
    assert found == pytest.approx(slow_perplexity(model, IDS), rel=1e-5)
    # with logits within ±0.5 no token can be e times more likely than another
    assert 288 / math.e < found < 288 * math.e
    uncapped, _ = perplexity(ResidentModel(tiny.make_model("gemma2", final_logit_softcapping=None)), Windows(IDS))
    assert abs(uncapped - found) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("tokens", [1, 7, 19, 1000])
def test_how_the_head_is_chunked_does_not_matter(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ResidentModel(tiny.make_model(family))
    expected, predictions = perplexity(source, Windows(IDS))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 288 * tokens)
    assert chunk_tokens(288) == tokens
    sizes = []
    original = module.negative_log_likelihood

    def watched(logits: torch.Tensor, targets: torch.Tensor) -> float:
        sizes.append(len(logits))
        return original(logits, targets)

    monkeypatch.setattr(module, "negative_log_likelihood", watched)
    found, counted = perplexity(source, Windows(IDS))
    assert max(sizes) == min(tokens, 19)
    assert counted == sum(sizes) == predictions
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_vocabulary_larger_than_a_chunk_still_takes_one_token_at_a_time() -> None:
    assert chunk_tokens(10**12) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, None])
def test_how_windows_are_batched_does_not_matter(batch: int | None) -> None:
    model = tiny.make_model("llama")
    found, _ = perplexity(ResidentModel(model), Windows(IDS), batch=batch)
    assert found == pytest.approx(slow_perplexity(model, IDS), rel=1e-5)


def test_windows_of_two_tokens_are_the_shortest_that_predict() -> None:
    model = tiny.make_model("llama")
    found, predictions = perplexity(ResidentModel(model), Windows(draw_ids(4, 2)))
    assert predictions == 4
    assert found == pytest.approx(slow_perplexity(model, draw_ids(4, 2)), rel=1e-5)


def test_negative_log_likelihood_of_half_precision_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [50.0, 0.0]], dtype=torch.float32)
    found = negative_log_likelihood(logits, torch.tensor([1, 1]))
    assert found == pytest.approx(math.log(4 / 3) + 50, rel=1e-6)
    rounded = logits.bfloat16()
    exact = negative_log_likelihood(rounded.double().float(), torch.tensor([1, 1]))
    assert negative_log_likelihood(rounded, torch.tensor([1, 1])) == exact, "only the logits are rounded, not the sums"


def test_padded_windows_are_refused() -> None:
    keep = torch.ones(3, 20, dtype=torch.bool)
    with pytest.raises(InputError, match="give windows without padding"):
        perplexity(ResidentModel(tiny.make_model("llama")), Windows(IDS, keep))


def test_a_step_a_block_and_one_for_the_head() -> None:
    steps: list[None] = []
    perplexity(ResidentModel(tiny.make_model("llama")), Windows(IDS), step=lambda: steps.append(None))
    assert len(steps) == 4


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match=r"logits are NaN or infinite in torch\.float32"):
        perplexity(ResidentModel(model), Windows(IDS))


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)  # certain of the wrong token: exp of the mean is beyond float64
    found, _ = perplexity(ResidentModel(model), Windows(IDS))
    assert found == math.inf


class Counting:
    """A tokenizer that remembers what it was given."""

    def __init__(self) -> None:
        self.inner = tiny.make_tokenizer()
        self.texts: list[str] = []

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self.inner(texts, **options)


def test_a_text_is_tokenised_once_cut_and_its_tail_dropped(tmp_path: Path) -> None:
    text = tiny.make_text(words=12)[:71]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    model = tiny.make_model("llama")
    tokenizer = Counting()
    found = prunekit.evaluate(model, text=str(path), tokenizer=tokenizer, length=16)
    assert tokenizer.texts == [text], "once, and as a whole"
    # one token a byte: four windows of 16, and 7 tokens are left over
    ids = torch.tensor(tokenizer.inner(text)["input_ids"])
    assert len(ids) == 71
    (row,) = found.texts
    assert (row.windows, row.length, row.tokens, row.predictions) == (4, 16, 64, 60)
    assert found.perplexity == pytest.approx(slow_perplexity(model, ids[:64].reshape(4, 16)), rel=1e-5)

    part = prunekit.evaluate(model, text=str(path), tokenizer=tokenizer, length=16, samples=3)
    assert (part.texts[0].windows, part.texts[0].predictions) == (3, 45)
    assert part.perplexity == pytest.approx(slow_perplexity(model, ids[:48].reshape(3, 16)), rel=1e-5)


def test_a_folder_and_the_model_in_memory_agree(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "gpt2")
    (tmp_path / "text.txt").write_text(tiny.make_text(words=60), encoding="utf-8")
    options: dict[str, Any] = {"text": str(tmp_path / "text.txt"), "length": 32, "samples": 5}
    folder = prunekit.evaluate(tmp_path / "model", dtype="float32", device="cpu", **options)
    memory = prunekit.evaluate(model, tokenizer=tiny.make_tokenizer(), **options)
    assert folder.perplexity == pytest.approx(memory.perplexity, rel=1e-6)
    assert folder.texts[0].predictions == memory.texts[0].predictions == 5 * 31


def test_a_text_or_a_request_too_short_or_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 40, encoding="utf-8")
    model = tiny.make_model("llama")
    tokenizer = tiny.make_tokenizer()
    for options, message in (
        ({"length": 64}, "the text has 40 tokens, less than one window of 64"),
        (
            {"length": 16, "samples": 3},
            "3 windows of 16 tokens are asked for, but the text has 40 tokens, enough for 2",
        ),
        ({"length": 1}, "length 1 is too short"),
        ({"length": -3}, "length -3 is too short"),
        ({"length": 16, "samples": 0}, "samples 0 is no number of windows"),
        ({"length": 129}, "length 129 is more than the 128 positions the model knows"),
    ):
        with pytest.raises(InputError, match=message):
            prunekit.evaluate(model, text=str(path), tokenizer=tokenizer, **options)
    with pytest.raises(InputError, match="tokenizer="):
        prunekit.evaluate(model, text=str(path), length=16)


def test_dropout_is_off_while_a_model_in_memory_is_evaluated_and_on_again_after(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(100), encoding="utf-8")
    options: dict[str, Any] = {"text": str(path), "tokenizer": tiny.make_tokenizer(), "length": 32}
    model = tiny.make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = prunekit.evaluate(model, **options).perplexity
    model.train()
    assert prunekit.evaluate(model, **options).perplexity == expected
    assert {module.training for module in model.modules()} == {True}
