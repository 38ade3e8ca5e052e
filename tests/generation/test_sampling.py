"""The next token: likeliest, or drawn as transformers draws it; limits of what may be asked."""

from __future__ import annotations

import pytest
import torch

import prunekit
from prunekit.generation.sampling import Chooser, Sampling

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.0, 3.0, 2.9, -torch.inf])


def drawn(count: int = 400, **values: object) -> list[int]:
    choose = Chooser(Sampling.build(values), CPU)
    return [choose(LOGITS) for _ in range(count)]


def test_without_temperature_the_likeliest_comes_every_time() -> None:
    assert set(drawn()) == set(drawn(temperature=1e-300)) == {1}
    assert Chooser(Sampling(), CPU)(torch.tensor([1.0, 1.0]).bfloat16()) == 0


def test_probabilities_are_those_of_the_softmax_divided_by_temperature() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(0)
        found = torch.bincount(torch.tensor(drawn(4000, temperature=temperature, seed=0)), minlength=4) / 4000
        assert torch.allclose(found, expected, atol=0.03)
        assert found[3] == 0


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    assert set(drawn(temperature=1, top_p=0.5, seed=0)) == {1}
    assert set(drawn(temperature=1, top_p=0.9, seed=0)) == {1, 2}
    assert set(drawn(temperature=2, top_p=1.0, seed=0)) == {0, 1, 2}


def test_a_seed_draws_the_same_again_and_none_does_not() -> None:
    assert drawn(temperature=1, seed=7) == drawn(temperature=1, seed=7) != drawn(temperature=1, seed=8)
    assert drawn(temperature=1) != drawn(temperature=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    choose = Chooser(Sampling.build({"temperature": temperature}), CPU)
    with pytest.raises(prunekit.PrunekitError, match="logits are not finite"):
        choose(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens cannot be 0"),
        ({"temperature": -0.1}, "temperature cannot be -0.1"),
        ({"temperature": float("nan")}, "temperature cannot be NaN"),
        ({"temperature": 2.1}, "temperature cannot be 2.1"),
        ({"top_p": 0}, "top_p cannot be 0"),
        ({"top_p": 1.1}, "top_p cannot be 1.1"),
        ({"seed": 2**63}, "seed cannot be"),
        ({"stop": ("",)}, 'stop.0 cannot be ""'),
        ({"stop": ("a",) * 17}, "stop cannot be"),
        ({"top_k": 5}, "'top_k' is not a name a generation has at that place: did you mean 'top_p'"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(prunekit.InputError, match=words):
        Sampling.build(values)
