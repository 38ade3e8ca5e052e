"""What is timed is what a user waits for: one prefill, then tokens one by one from the cache; models in turn, ratios by repetition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tiny
from prunekit.errors import InputError
from prunekit.evaluation import speed
from prunekit.evaluation.speed import Round, Spread, draw_prompt, measure, one_round, prompt_length


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every look at the clock is a power of two later than the one before."""
    ticks = iter(2.0**number for number in range(100))
    monkeypatch.setattr(speed, "_now", lambda device: next(ticks))
    return None


def inputs_of(model: Any) -> list[dict[str, Any]]:
    """What the model's forward will be called with."""
    found: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: found.append(kwargs), with_kwargs=True)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_round_decodes_what_generate_would(family: str) -> None:
    model = tiny.make_model(family)
    prompt = draw_prompt(tiny.VOCABULARY, 11)
    expected = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 11:]
    calls = inputs_of(model)
    one_round(model, prompt, 6)
    assert [tuple(call["input_ids"].shape) for call in calls] == [(1, 11)] + [(1, 1)] * 6
    assert all(call["use_cache"] for call in calls)
    # the sixth token is fed too, and what comes behind it is not asked for
    assert torch.cat([call["input_ids"][0] for call in calls[1:]]).tolist() == expected.tolist()
    assert calls[0].get("logits_to_keep") == 1


@pytest.mark.usefixtures("clock")
def test_seconds_become_tokens_per_second() -> None:
    taken = one_round(tiny.make_model("llama"), draw_prompt(9, 8), 16)
    # looks at 1, 2 (prefilled), 4 (chosen), 8 (decoded)
    assert taken == Round(prefill=8 / 1, first_token=3.0, decode=16 / 4)


def test_models_take_turns_and_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fake(model: str, prompt: torch.Tensor, tokens: int) -> Round:
        order.append(model)
        return Round(len(order), 1.0, tokens)

    monkeypatch.setattr(speed, "one_round", fake)
    steps: list[None] = []
    models: Any = ["a", "b"]
    found = measure(models, draw_prompt(9, 4), tokens=5, repetitions=3, warmup=1, step=lambda: steps.append(None))
    assert "".join(order) == "abbaabba"
    assert len(steps) == 8
    assert [[taken.prefill for taken in rounds] for rounds in found] == [[4, 5, 8], [3, 6, 7]]


@pytest.mark.parametrize(("repetitions", "warmup"), [(0, 1), (1, -1)])
def test_no_repetitions_are_refused(repetitions: int, warmup: int) -> None:
    with pytest.raises(InputError, match="measure nothing"):
        measure([], draw_prompt(9, 4), tokens=1, repetitions=repetitions, warmup=warmup)


def test_the_prompt_fits_the_models_positions() -> None:
    config = tiny.make_config("llama")  # 128 positions
    assert prompt_length(config, None, 28) == 100
    assert prompt_length(config, 64, 64) == 64
    assert prompt_length(tiny.make_config("llama", max_position_embeddings=4096), None, 64) == 512
    assert prompt_length(tiny.make_config("bloom"), None, 64) == 512  # no limit
    for asked, tokens in ((65, 64), (0, 1), (None, 128)):
        with pytest.raises(InputError, match="do not fit the model's 128 positions"):
            prompt_length(config, asked, tokens)
    with pytest.raises(InputError, match="tokens 0 is no number"):
        prompt_length(config, None, 0)


def test_the_prompt_is_the_same_every_time() -> None:
    assert torch.equal(draw_prompt(100, 50), draw_prompt(100, 50))
    assert int(draw_prompt(7, 500).max()) == 6


def test_a_spread_is_median_and_range() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)
