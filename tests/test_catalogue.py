"""The catalogue: every row works, parts join by name, and its page is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from prunekit import InputError
from prunekit.api import addable
from prunekit.catalogue import GIVEN_BUDGETS, METHODS, PARTS, UNIT_PARTS, find_method
from prunekit.parts import find_part, parts
from prunekit.recipe import Recipe
from prunekit.report.methods import as_markdown
from prunekit.shrink.shrinker import Shrinker
from prunekit.shrink.slicewalk import bound_width
from prunekit.sparsify.linear import Sparsifier

KINDS = ("refine", "reconstruct", "tune")
SPARSIFY = [row for row in METHODS.values() if row.kind == "sparsify"]
SHRINK = [row for row in METHODS.values() if row.kind == "shrink" and row.width is None]
SLICE = [row for row in METHODS.values() if row.width is not None]


def ids(windows: int = 6) -> torch.Tensor:
    return torch.randint(0, tiny.VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
@pytest.mark.parametrize(
    "name",
    [*(row.name for row in SPARSIFY), "ria+r2-dsnot+least-squares+blockwise+owl", "magnitude+swaps", "stade+alps"],
)
def test_every_method_gives_exact_counts_and_is_repeatable(name: str, pattern: str) -> None:
    results = []
    for _ in range(2):
        model = tiny.make_model("llama")
        result = prunekit.prune_(model, ids(), method=name, pattern=pattern)
        results.append({key: value.clone() for key, value in model.state_dict().items()})
        for linear in result.linears:
            rows, columns = linear.shape
            weight = model.get_submodule(linear.name).weight
            if pattern == "2:4" and "owl" not in name:
                groups = (weight == 0).reshape(rows, -1, 4).sum(-1)
                assert (groups == 2).all()
            elif find_method(name).budget == "uniform":
                by_row = find_method(name).group == "row"
                wanted = rows * int(columns * 0.6) if by_row else int(rows * columns * 0.6)
                assert linear.zeros == wanted
        assert result.sparsity == pytest.approx(0.5 if pattern == "2:4" else 0.6, abs=0.02)
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_every_registered_part_is_used_or_can_be_added() -> None:
    for kind in KINDS:
        assert set(parts(kind)) == {name for name, its in PARTS.items() if its == kind}
    assert set(parts("budget")) == {"uniform", *(name for name, its in PARTS.items() if its == "budget")}
    assert set(parts("score")) == {row.score for row in SPARSIFY if row.score is not None}
    assert set(parts("compensate")) == {name for name, its in UNIT_PARTS.items() if its == "compensate"}
    assert {name for name, part in parts("unit-budget").items() if part.given} == GIVEN_BUDGETS
    assert set(parts("unit-score")) == {row.score for row in SHRINK if row.score is not None}
    assert set(parts("search")) == {row.search for row in SHRINK if row.search is not None}
    assert set(parts("depth")) == {row.depth for row in SHRINK if row.depth is not None}
    for row in SPARSIFY:
        sparsifier = Sparsifier.of(row, {})
        assert [bound.part.kind for bound in sparsifier.parts] == [
            kind for kind in ("score", *KINDS) if getattr(row, kind) is not None
        ]
        assert find_part("budget", row.budget)
    for row in SHRINK:
        shrinker = Shrinker.of(row, {})
        assert [bound.part.word for bound in shrinker.parts] == [
            kind for kind in ("score", "compensate", "depth", "search") if getattr(row, kind) is not None
        ]
        assert shrinker.budget.part is find_part("unit-budget", row.budget)
    for row in SLICE:
        assert bound_width(row, {}).part is find_part("width", str(row.width))
    for row in METHODS.values():
        assert row.summary.endswith(".")
        assert "http" in row.paper or row.name in ("random", "planned")


def test_parts_join_by_name_and_a_recipe_may_exchange_them() -> None:
    joined = Sparsifier.of(find_method("ria+r2-dsnot+least-squares"), {"refine": {"steps": 7}})
    assert [bound.part.name for bound in joined.parts] == ["ria", "r2-dsnot", "least-squares"]
    assert joined.refine is not None
    assert joined.refine.options["steps"] == 7
    assert joined.group == "layer"
    named = Sparsifier.of(find_method("wanda"), {"score": {"name": "lp-ria", "p": 3.0}, "refine": {"name": "swaps"}})
    assert [bound.part.name for bound in named.parts] == ["lp-ria", "swaps"]
    assert find_method("owl+sparsegpt").budget == "owl"
    resolved = named.resolved({})
    again = Sparsifier.of(find_method("wanda"), resolved)
    assert again == named, "what a manifest holds makes the same method"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("wanda", {"refine": {"steps": 3}}, r"'refine\.steps' is an option of a refine and method 'wanda' has none"),
        ("wanda", {"refine": {"name": "dsnt"}}, "refine 'dsnt' is unknown: did you mean 'dsnot'"),
        ("sparsegpt", {"refine": {"name": "dsnot"}}, "'sparsegpt' makes its own while it solves"),
        ("sparsegpt", {"reconstruct": {"name": "least-squares"}}, "nothing that chooses what to keep"),
        ("wanda", {"pattern": {"permute": "yes"}}, r"'pattern\.permute' cannot be 'yes'"),
    ],
)
def test_what_does_not_go_together_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sparsifier.of(find_method(method), options)


@pytest.mark.parametrize("name", [3, 0.5, True, None, ["wanda"], {"a": 1}])
@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("wanda", "score"),
        ("wanda", "budget"),
        ("sparsegpt", "tune"),
        ("flap", "budget"),
        ("flap", "width"),
        ("drop", "depth"),
    ],
)
def test_a_part_named_by_anything_but_text_is_refused(method: str, part: str, name: Any) -> None:
    with pytest.raises(InputError, match=rf"'{part}\.name' cannot be .*: it is the name of a {part}, or none"):
        Recipe.build({"model": "m", "method": method, "parts": {part: {"name": name}}})


def test_an_unknown_part_behind_a_plus_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"'dsno' of method 'wanda\+dsno' is no part that can be added: did you mean 'dsnot'"
    ):
        find_method("wanda+dsno")


def test_the_page_of_methods_is_the_catalogue() -> None:
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == as_markdown(prunekit.methods(), addable()), (
        "make it anew: prunekit methods --markdown > docs/methods.md"
    )


def test_random_scores_follow_the_seed_and_nothing_else(text_file: Path) -> None:
    def zeros(seed: int) -> dict[str, torch.Tensor]:
        model = tiny.make_model("llama")
        prunekit.prune_(model, ids(), method="stochastic-ria", seed=seed)
        return {name: value == 0 for name, value in model.state_dict().items()}

    first, again, other = zeros(0), zeros(0), zeros(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_permuted_channels_keep_more_and_the_model_is_really_the_pattern(text_file: Path, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    asked: dict[str, Any] = {
        "method": "ria",
        "pattern": "2:4",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "dtype": "float32",
    }
    plain = prunekit.prune(tmp_path / "model", out=tmp_path / "plain", **asked)
    moved = prunekit.prune(tmp_path / "model", out=tmp_path / "moved", parts={"pattern": {"permute": True}}, **asked)
    assert {linear.permuted for linear in plain.linears} == {None}
    order = {linear.name.rsplit(".", 1)[1]: linear.permuted for linear in moved.linears}
    assert {name for name, new in order.items() if new} == {"o_proj", "down_proj"}
    assert {name for name, new in order.items() if new is False} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    }
    found = prunekit.inspect(tmp_path / "moved")
    assert found.sound
    assert found.zeros * 2 == found.weights
    error = {
        run: sum(line.output_error or 0 for line in result.linears if line.name.endswith(("o_proj", "down_proj")))
        for run, result in (("plain", plain), ("moved", moved))
    }
    assert error["moved"] < error["plain"]
