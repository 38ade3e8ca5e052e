"""`adapruner`: a space of one point is `llm-pruner`; sums of subsets; what is in no space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from helpers import shards
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Windows
from prunekit.shrink import searching
from prunekit.shrink.gradients import measure_gradients
from prunekit.shrink.search.tpe import mean_gradients, scores_at
from prunekit.shrink.units import find_structures
from searches import killed_after, search_in
from whole import draw_windows, weight_in

POINT = {
    "lengths": 16,
    "subsets": 1,
    "counts": 1,
    "order": "first",
    "granularity": "element",
    "reduction": "sum",
    "blend": False,
}
SEARCH = {"trials": 7, "samples": 4, "length": 32}


@pytest.fixture
def asked(tmp_path: Path, text_file: Path) -> dict[str, Any]:
    tiny.save_model(tmp_path / "model", "llama")
    return {
        "model": tmp_path / "model",
        "ratio": 0.2,
        "calibration": {"source": str(text_file), "samples": 4, "length": 16},
        "dtype": "float32",
        "method": "adapruner",
    }


def parts(**search: Any) -> dict[str, Any]:
    return {"budget": {"skip_first": 1, "skip_last": 0}, "search": {**SEARCH, **search}}


def test_a_space_of_one_point_is_llm_pruner_bit_for_bit(asked: dict[str, Any], tmp_path: Path) -> None:
    prunekit.prune(**asked, parts=parts(**POINT, trials=3), out=tmp_path / "one")
    plain = {**asked, "method": "llm-pruner", "parts": {"budget": {"skip_first": 1, "skip_last": 0}}}
    prunekit.prune(**plain, out=tmp_path / "plain")
    search = search_in(tmp_path / "one")
    assert shards(tmp_path / "one") == shards(tmp_path / "plain")
    assert (search["proposed"], search["known"]) == (3, 2), "a point that is known is not measured again"
    assert search["best"] == search["first"]


def test_the_search_begins_with_llm_pruner_and_never_ends_worse(asked: dict[str, Any], tmp_path: Path) -> None:
    prunekit.prune(**asked, parts=parts(), out=tmp_path / "out")
    search = search_in(tmp_path / "out")
    assert search["course"][0] == [1, search["first"]]
    assert search["best"] == min(value for _, value in search["course"]) <= search["first"]
    assert search["proposed"] == 7


def test_a_row_that_says_no_length_searches_with_the_models(asked: dict[str, Any], tmp_path: Path) -> None:
    calibration = {"source": asked["calibration"]["source"], "samples": 2}
    more = {"score": {"name": "taylor"}, "budget": {"shape": "free"}}
    few = {"name": "tpe", "trials": 1, "subsets": 1, "counts": 1, "samples": 2}
    values = {**asked, "method": "magnitude-sp", "calibration": calibration, "parts": {**more, "search": few}}
    prunekit.prune(**values, out=tmp_path / "out")
    assert search_in(tmp_path / "out")["candidate"]["length"] == 128


def test_a_killed_search_goes_on_to_the_same_folder(asked: dict[str, Any], tmp_path: Path) -> None:
    prunekit.prune(**asked, parts=parts(), out=tmp_path / "whole")
    with killed_after(3, searching, "plan_losses"):
        prunekit.prune(**asked, parts=parts(), out=tmp_path / "killed")
    assert (tmp_path / "killed" / searching.STUDY_NAME).is_file()
    prunekit.prune(**asked, parts=parts(), out=tmp_path / "killed", resume=True)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert search_in(tmp_path / "killed")["course"] == search_in(tmp_path / "whole")["course"]
    assert not [path for path in (tmp_path / "killed").iterdir() if "search" in path.name]


def test_sums_of_several_subsets_are_those_of_all_their_windows() -> None:
    model = tiny.make_model("llama")
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    windows = draw_windows(6, 16)
    needs = frozenset({"gradient_signed", "gradient_second"})

    def measured(some: Windows) -> Any:
        return measure_gradients(source, some, structures, needs, "loss", lambda linear: weight_in(model, linear))

    joined = mean_gradients([measured(windows[0:3]), measured(windows[3:6])])
    whole = measured(windows)
    for ours, theirs in zip(joined, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradients in ours.items():
            for side in ("rows", "columns"):
                mine, all_ = getattr(gradients, side), getattr(theirs[name], side)
                assert mine.keys() == all_.keys()
                for each in mine:
                    # float32 gradients of signed sums cancel
                    scale = float(all_[each].abs().max())
                    assert torch.allclose(mine[each], all_[each], rtol=1e-4, atol=1e-4 * scale)


def test_a_blend_of_one_share_ranks_as_that_measure_does() -> None:
    model = tiny.make_model("llama")
    source = ResidentModel(model)
    structures = find_structures(model, source.anatomy)
    needs = frozenset({"gradient_abs", "gradient_signed", "gradient_second"})
    gradients = measure_gradients(
        source, draw_windows(3, 16), structures, needs, "loss", lambda linear: weight_in(model, linear)
    )
    plain = {"reduction": "sum", "order": "second", "granularity": "element"}
    blend = {"reduction": "sum", "blend": {"first": 0.0, "second": 0.5, "vector": 0.0}}
    both = {"reduction": "sum", "blend": {"first": 0.5, "second": 0.5, "vector": 0.0}}
    for wanted, alone, mixed in zip(
        *(scores_at(point, gradients, structures) for point in (plain, blend, both)), strict=True
    ):
        for name, values in wanted.items():
            assert torch.equal(values.argsort(), alone[name].argsort())
        assert not torch.equal(wanted["mlp.down_proj"].argsort(), mixed["mlp.down_proj"].argsort())


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"order": "frist"}, "search.order=frist names 'frist', which is unknown: did you mean 'first'"),
        ({"reduction": "sum,median"}, "names 'median'"),
        ({"lengths": "16,long"}, "search.lengths=16,long is no list of numbers"),
        ({"counts": "1,9"}, "joins up to 9 subsets"),
        ({"lengths": "500"}, "length 500 is more than the 128 positions"),
        ({"sources": "nowhere.txt"}, "text 'nowhere.txt' is neither a file"),
    ],
)
def test_what_is_in_no_space_is_refused_and_leaves_nothing(
    asked: dict[str, Any], tmp_path: Path, search: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        prunekit.prune(**asked, parts=parts(**search), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_the_search_would_overrule_are_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out the options of the score"):
        prunekit.prune(**asked, parts={**parts(), "score": {"order": "second"}}, out=tmp_path / "out")
    with pytest.raises(InputError, match="chooses how 'taylor' computes importance"):
        prunekit.prune(**asked, parts={**parts(), "score": {"name": "magnitude"}}, out=tmp_path / "out")
    first = {**asked["calibration"], "sampling": "first"}
    with pytest.raises(InputError, match=r"say --set search\.subsets=1"):
        prunekit.prune(**{**asked, "calibration": first}, parts=parts(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
