"""Every part that can be added to a method that removes structures is either carried out or refused, never left unheard."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit.catalogue import METHODS, UNIT_PARTS, find_method
from prunekit.errors import InputError
from prunekit.jobs import check_options
from prunekit.recipe import Recipe
from prunekit.shrink.shrinker import Shrinker

ROWS = [row for row in METHODS.values() if row.kind == "shrink" and not row.planned]


def check(method: str, parts: dict[str, Any] | None = None) -> None:
    check_options(Recipe.build({"model": "m", "method": method, "parts": parts or {}}))


@pytest.mark.parametrize("part", sorted(UNIT_PARTS))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_added_part_acts_or_is_refused(row: Any, part: str) -> None:
    kind, name = UNIT_PARTS[part], f"{row.name}+{part}"
    if getattr(row, kind) not in (None, "uniform"):
        with pytest.raises(InputError, match="has two parts of the kind"):
            find_method(name)
        return
    if row.score is None:  # no unit of a block goes
        with pytest.raises(
            InputError, match=rf"{kind} '{part}' is about .*'{row.name}.{part}' removes .*: leave it out"
        ):
            check(name)
        return
    check(name)
    plain, more = Shrinker.of(row, {}), Shrinker.of(find_method(name), {})
    assert more.score == plain.score
    if kind == "budget":
        assert plain.budget.part.name == "uniform"
        assert more.budget.part.name == part
        assert more.plans_first
    else:
        assert getattr(plain, kind) is None
        assert getattr(more, kind).part.name == part
        assert len(more.parts) == len(plain.parts) + 1


@pytest.mark.parametrize(
    ("method", "part", "name"),
    [("shortgpt", "compensate", "bias"), ("drop", "tune", "blockwise"), ("shortgpt", "search", "evolution")],
)
def test_a_part_that_is_named_as_an_option_is_refused_too(method: str, part: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{part} '{name}' is about blocks that lose some of their units"):
        check(method, {part: {"name": name}})


@pytest.mark.parametrize("method", ["slicegpt", "shortgpt", "drop"])
def test_without_added_parts_they_are_fine(method: str) -> None:
    check(method)
    assert not METHODS[method].of_units


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("flap", {"width": {"align": 4}}, r"'width\.align' .* 'flap' has none: use a method that has one \(slicegpt\)"),
        ("shortgpt", {"width": {"name": "channels"}}, "width 'channels' is about .* which 'shortgpt' does not turn"),
        ("flap", {"depth": {"choose": "once"}}, r"'flap' has none: use a method that has one \(shortgpt, drop\)"),
        ("flap", {"tune": {"rate": 0.1}}, r"'flap' has none: name one with --set tune\.name=\.\.\. \(blockwise\)"),
    ],
)
def test_options_of_parts_that_a_method_cannot_have_are_refused(
    method: str, options: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check(method, options)
