"""Who gets which pattern: the budget part first, then overrides in order, then ignores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.catalogue import find_method
from prunekit.errors import InputError
from prunekit.model.anatomy import Anatomy, Block, Linear
from prunekit.recipe import Pattern
from prunekit.sparsify.budget import Budget, outlier_share
from prunekit.statistics import Statistics

HALF = Pattern.parse(0.5)
NAMES = ("attn.q", "attn.o", "mlp.up", "mlp.down")


def allot(
    anatomy: Anatomy,
    pattern: Pattern,
    *,
    part: str = "uniform",
    options: dict[str, Any] | None = None,
    profile: list[float] | None = None,
) -> dict[str, Pattern | None]:
    budget = Budget.of(replace(find_method("wanda"), budget=part), options)
    return budget.allot(anatomy, pattern, profile or [])


def anatomy(inputs: int = 12, odd: str = "", odd_inputs: int = 0) -> Anatomy:
    """Twelve blocks, so that `layers.1` and `layers.1?` can be told apart; the linear called `odd` has other inputs."""
    blocks = []
    for index in range(12):
        name = f"model.layers.{index}"
        linears = tuple(Linear(n, name, index, 8, odd_inputs if n == odd else inputs, False) for n in NAMES)
        blocks.append(Block(index, name, linears))
    return Anatomy("model.layers", tuple(blocks))


def allotted(**options: Any) -> dict[str, str | None]:
    found = allot(anatomy(), HALF, options=options)
    assert list(found) == [linear.full_name for linear in anatomy().linears()], "every linear, in the model's order"
    return {name: None if pattern is None else str(pattern) for name, pattern in found.items()}


def others(found: dict[str, str | None], *but: str) -> set[str | None]:
    return {pattern for name, pattern in found.items() if name not in but}


def test_uniform_gives_everyone_the_same() -> None:
    assert others(allotted()) == {"0.5"}
    assert set(allot(anatomy(), Pattern.parse("2:4")).values()) == {Pattern.parse("2:4")}


def test_a_glob_is_matched_against_full_name_name_and_block() -> None:
    found = allotted(overrides={"model.layers.3.mlp.up": 0.1, "attn.q": 0.2, "model.layers.11": "2:4"})
    assert found["model.layers.3.mlp.up"] == "0.1"
    assert found["model.layers.2.mlp.up"] == "0.5"
    assert found["model.layers.0.attn.q"] == "0.2"
    assert all(found[f"model.layers.11.{name}"] == "2:4" for name in NAMES)
    assert found["model.layers.1.attn.o"] == "0.5", "layers.1 is not layers.11"
    assert sum(pattern == "0.2" for pattern in found.values()) == 11


def test_stars_and_brackets() -> None:
    found = allotted(overrides={"*.down": 0.6, "model.layers.[01].attn.*": 0})
    assert sum(pattern == "0.6" for pattern in found.values()) == 12
    assert {name for name, pattern in found.items() if pattern == "0"} == {
        f"model.layers.{i}.attn.{n}" for i in (0, 1) for n in "qo"
    }


def test_the_last_override_that_matches_wins() -> None:
    assert others(allotted(overrides={"*.up": 0.1, "*": 0.2})) == {"0.2"}
    found = allotted(overrides={"*": 0.2, "*.up": 0.1})
    assert {pattern for name, pattern in found.items() if name.endswith(".up")} == {"0.1"}
    assert {pattern for name, pattern in found.items() if not name.endswith(".up")} == {"0.2"}


@pytest.mark.parametrize("ignore", [["*.up", "model.layers.0"], "*.up,model.layers.0", " *.up , model.layers.0 "])
def test_ignore_wins_over_every_override(ignore: Any) -> None:
    found = allotted(overrides={"model.layers.0.mlp.up": 0.9, "*": 0.1}, ignore=ignore)
    dense = {name for name, pattern in found.items() if pattern is None}
    assert dense == {f"model.layers.{i}.mlp.up" for i in range(12)} | {f"model.layers.0.{name}" for name in NAMES}
    assert others(found, *dense) == {"0.1"}


@pytest.mark.parametrize("options", [{"overrides": {"*.up": 0.1, "*.gate": 0.2}}, {"ignore": ["*.up", "*.gate"]}])
def test_a_glob_that_matches_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"glob '\*\.gate' matches no linear: .*'model\.layers\.0\.attn\.q'.*mlp\.down"
    ):
        allotted(**options)


def test_globs_are_case_sensitive() -> None:
    with pytest.raises(InputError, match="matches no linear"):
        allotted(ignore=["*.UP"])


def test_a_group_that_does_not_divide_names_the_linear() -> None:
    strange = anatomy(odd="mlp.down", odd_inputs=10)
    with pytest.raises(InputError, match=r"groups of 4 do not divide the 10 inputs of 'model\.layers\.0\.mlp\.down'"):
        allot(strange, Pattern.parse("2:4"))
    # left dense, or given something that fits, it is nobody's concern
    assert allot(strange, Pattern.parse("2:4"), options={"ignore": "*.down"})["model.layers.0.mlp.down"] is None
    fitting = allot(strange, Pattern.parse("2:4"), options={"overrides": {"*.down": "1:5"}})
    assert str(fitting["model.layers.0.mlp.down"]) == "1:5"
    with pytest.raises(InputError, match=r"groups of 5 do not divide the 12 inputs of 'model\.layers\.0\.attn\.q'"):
        allot(strange, HALF, options={"overrides": {"attn.q": "1:5"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"*": 1.5}}, r"budget\.overrides: sparsity 1\.5 is outside"),
        ({"overrides": {"*": "4:2"}}, r"budget\.overrides: pattern '4:2' is not K:G"),
        ({"overrides": ["*"]}, r"budget\.overrides must map globs to patterns"),
        ({"ignore": 3}, r"budget\.ignore must be globs"),
        ({"ignore": [3]}, r"budget\.ignore must be globs"),
        ({"share": 0.1}, r"'budget\.share' is not an option of budget 'uniform'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        allotted(**options)


def test_the_options_given_are_not_changed() -> None:
    options: dict[str, Any] = {"overrides": {"*": 0.1}, "ignore": ["*.up"]}
    allot(anatomy(), HALF, options=options)
    assert options == {"overrides": {"*": 0.1}, "ignore": ["*.up"]}


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(InputError, match="budget 'unifrom' is unknown: did you mean 'uniform'"):
        allot(anatomy(), HALF, part="unifrom")


def shares(found: dict[str, Pattern | None]) -> list[float]:
    """Mean sparsity of each block; all linears of `anatomy()` have as many weights."""
    values = [float(pattern.fraction) for pattern in found.values() if pattern is not None]
    return [sum(values[start : start + 4]) / 4 for start in range(0, len(values), 4)]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 50), min_size=12, max_size=12),
    st.sampled_from(["0.2", "0.5", "0.6", "0.97"]),
    st.sampled_from([0.02, 0.08, 0.2]),
)
def test_owl_prunes_as_much_in_all_as_asked(profile: list[float], sparsity: str, spread: float) -> None:
    pattern = Pattern.parse(sparsity)
    whole = anatomy(inputs=240)
    found = allot(whole, pattern, part="owl", options={"spread": spread}, profile=profile)
    zeros = sum(linear.out_features * found[linear.full_name].zeros(240) for linear in whole.linears())  # type: ignore[union-attr]
    asked = float(pattern.fraction) * sum(linear.count for linear in whole.linears())
    assert abs(zeros - asked) <= 8, "half a row count of one linear, and the rounding of each row"


def test_owl_leaves_more_where_there_are_more_outliers() -> None:
    profile = [float(index) for index in range(12)]
    found = shares(allot(anatomy(inputs=2400), Pattern.parse(0.6), part="owl", profile=profile))
    # by hand: 0.16·index/11 is taken from 0.6 plus its mean, 0.08
    expected = [0.6 - (0.16 * index / 11 - 0.08) for index in range(12)]
    assert found == pytest.approx(expected, abs=1e-3)


def test_owl_of_blocks_that_are_alike_is_uniform() -> None:
    found = allot(anatomy(), HALF, part="owl", profile=[3.0] * 12)
    assert shares(found) == pytest.approx([0.5] * 12)


def test_owl_varies_how_many_of_a_group_are_kept() -> None:
    profile = [float(index) for index in range(12)]
    options = {"spread": 0.25, "outlier": 6.0}
    found = allot(anatomy(inputs=16), Pattern.parse("4:8"), part="owl", profile=profile, options=options)
    keeps = [pattern.keep for pattern in found.values() if pattern is not None]
    assert keeps[0] == 2
    assert keeps[-1] == 6
    assert sum(keep for keep in keeps if keep) == 4 * len(keeps)
    assert keeps == sorted(keeps)  # type: ignore[type-var]


def test_owl_before_it_has_measured_is_uniform_and_overrides_hold_all_the_same() -> None:
    before = allot(anatomy(), HALF, part="owl", options={"ignore": ["attn.q"]})
    assert {str(pattern) for pattern in before.values()} == {"0.5", "None"}
    after = allot(
        anatomy(),
        HALF,
        part="owl",
        options={"ignore": ["attn.q"], "overrides": {"mlp.up": 0.25}},
        profile=[1.0] * 6 + [2.0] * 6,
    )
    assert {str(after[f"model.layers.{index}.mlp.up"]) for index in range(12)} == {"0.25"}
    assert after["model.layers.0.attn.q"] is None
    assert after["model.layers.0.attn.o"] != after["model.layers.11.attn.o"]


def test_the_share_of_outliers_is_counted_over_all_linears_of_a_block() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 8, generator=generator), torch.randn(3, 5, generator=generator)]
    stats = [Statistics(9, {"input_square": torch.rand(w.shape[1], generator=generator).double()}) for w in weights]
    values = [
        abs(w[i, j].item()) * s.input_square[j].sqrt().item()
        for w, s in zip(weights, stats, strict=True)
        for i in range(w.shape[0])
        for j in range(w.shape[1])
    ]
    mean = sum(values) / len(values)
    expected = 100 * sum(value > 2 * mean for value in values) / len(values)
    assert 0 < expected < 100
    assert outlier_share(weights, stats, outlier=2.0, spread=0.08) == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"spread": -0.1}, {"outlier": 0.0}])
def test_owl_refuses_what_makes_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="spread is 0 or more, outlier above 0"):
        allot(anatomy(), HALF, part="owl", options=options, profile=[1.0, 2.0] * 6)
