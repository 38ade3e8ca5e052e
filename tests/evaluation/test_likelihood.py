"""Log-likelihoods against one sequence at a time, whole, in float64."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from prunekit import InputError
from prunekit.evaluation import likelihood
from prunekit.evaluation.likelihood import Continuation, log_likelihoods


def slow(model: PreTrainedModel, sequence: Continuation) -> float:
    """Sum of log p over the scored tokens, a softmax written out."""
    with torch.inference_mode():
        logits = copy.deepcopy(model).double()(torch.tensor([sequence.tokens]), use_cache=False).logits[0].tolist()
    total = 0.0
    for place in range(len(sequence.tokens) - sequence.scored, len(sequence.tokens)):
        scores = logits[place - 1]
        highest = max(scores)
        total += scores[sequence.tokens[place]] - highest - math.log(math.fsum(math.exp(s - highest) for s in scores))
    return total


def draw_groups(seed: int = 0) -> list[list[Continuation]]:
    """Questions with 1 to 4 choices behind a text of 1 to 40 tokens, and some with different beginnings."""
    draw = random.Random(seed)
    groups = []
    for number in range(14):
        text = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
        choices = []
        for _ in range(draw.randint(1, 4)):
            ending = [draw.randrange(256) for _ in range(draw.randint(1, 12))]
            own = text if number % 5 else [*text[:-1], draw.randrange(256)]
            choices.append(Continuation((*own, *ending), len(ending)))
        groups.append(choices)
    return groups


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shared_beginnings_change_nothing(family: str) -> None:
    model = tiny.make_model(family)
    groups = draw_groups()
    expected = [[slow(model, sequence) for sequence in group] for group in groups]
    for share in (True, False):
        found = log_likelihoods(model, groups, share=share)
        for scores, wanted in zip(found, expected, strict=True):
            assert scores == pytest.approx(wanted, rel=2e-5, abs=1e-4)


def test_shared_tokens_are_computed_once_and_the_head_sees_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    seen: list[tuple[int, int]] = []
    heads: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].numel() // 32))
    text = tuple(range(21))
    group = [Continuation((*text, 30 + choice, 40), 2) for choice in range(4)]
    log_likelihoods(model, [group, group])
    # 21 tokens of text, of which the last predicts the first scored one: 20 are shared, 1 + 1 go in with every choice
    assert seen == [(2, 20), (8, 2)]
    assert heads == [0, 2 * 4 * 2]


def test_batches_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    groups = draw_groups(1)
    expected = log_likelihoods(model, groups)
    monkeypatch.setattr(likelihood, "chunk_tokens", lambda _: 16)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1]))
    steps: list[None] = []
    found = log_likelihoods(model, groups, step=lambda: steps.append(None))
    assert len(steps) == sum(map(len, groups))
    assert max(sizes) <= 64
    for scores, wanted in zip(found, expected, strict=True):
        assert scores == pytest.approx(wanted, rel=1e-5)


def test_what_is_too_long_loses_its_beginning() -> None:
    cut = Continuation.cut(range(10), 3, longest=5)
    assert (cut.tokens, cut.scored) == ((4, 5, 6, 7, 8, 9), 3)
    assert Continuation.cut(range(10), 8, longest=5).scored == 5, "the first token that is left has nothing before it"
    assert Continuation.cut(range(4), 3, longest=5).tokens == (0, 1, 2, 3)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(InputError, match="NaN or infinite in torch"):
        log_likelihoods(model, draw_groups())
    assert not model.lm_head._forward_pre_hooks, "the head is as it was"
