"""Who gets which pattern: the budget part first, then overrides in order, then ignores."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit.errors import InputError
from prunekit.model.anatomy import Anatomy, Block, Linear
from prunekit.recipe import Pattern
from prunekit.sparsify.budget import allot

HALF = Pattern.parse(0.5)
NAMES = ("attn.q", "attn.o", "mlp.up", "mlp.down")


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
