"""How many units stay: exact totals, nothing left empty, one width for all where that is asked."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

import tiny
from prunekit.blockwalk import block_parameters
from prunekit.catalogue import find_method
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel
from prunekit.shrink.budget import Counts, UnitBudget, plan_of, top_units
from prunekit.shrink.plan import Structures
from prunekit.shrink.units import find_structures


@pytest.fixture(scope="module")
def parts() -> tuple[Structures, list[int]]:
    source = ResidentModel(tiny.make_model("llama", num_attention_heads=8, num_key_value_heads=4))
    return find_structures(source.module, source.anatomy), block_parameters(source)


def draw_scores(structures: Structures, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{each.name: torch.rand(each.count, generator=draw) for each in block} for block in structures]


def counted(structures: Structures, counts: Counts) -> int:
    return sum(
        each.cost * (each.count - counts[index][each.name]) for index, block in enumerate(structures) for each in block
    )


# so little that no unit would go is refused
RATIOS = some.just(Fraction(0)) | some.fractions(Fraction(1, 20), Fraction(85, 100))


def make(method: str = "random", **options: Any) -> UnitBudget:
    return UnitBudget.of(find_method(method), options)


@settings(max_examples=60, deadline=None)
@given(ratio=RATIOS, name=some.sampled_from(["uniform", "global-cost", "global-types"]))
def test_the_ratio_is_met_within_a_channel_of_every_block(
    parts: tuple[Structures, list[int]], ratio: Fraction, name: str
) -> None:
    structures, parameters = parts
    counts = make(name=name).counts(structures, parameters, ratio, draw_scores(structures))
    channel = structures[0][1].cost
    assert abs(counted(structures, counts) - ratio * sum(parameters)) <= len(structures) * channel
    assert all(count >= 1 for block in counts for count in block.values())
    assert all(block == counts[0] for block in counts)


@settings(max_examples=60, deadline=None)
@given(ratio=RATIOS, seed=some.integers(0, 5))
def test_free_global_cut_is_the_cheapest_first_oracle(
    parts: tuple[Structures, list[int]], ratio: Fraction, seed: int
) -> None:
    structures, parameters = parts
    scores = draw_scores(structures, seed)
    counts = make(name="global-cost", shape="free").counts(structures, parameters, ratio, scores)
    target = round(ratio * sum(parameters))
    units = []
    for block in structures:
        for each in block:
            ranked = sorted(range(each.count), key=lambda unit: (scores[each.block][each.name][unit], unit))
            units += [(float(scores[each.block][each.name][unit]), each) for unit in ranked[:-1]]  # the best is spared
    gone = 0
    wanted = [{each.name: each.count for each in block} for block in structures]
    for _, each in sorted(units, key=lambda pair: pair[0]):
        if gone + each.cost > target:
            break
        gone += each.cost
        wanted[each.block][each.name] -= 1
    assert counts == wanted


def test_larger_ratios_keep_subsets(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    scores = draw_scores(structures)
    budget = make(name="global-cost", shape="free")
    plans = [
        plan_of(structures, budget.counts(structures, parameters, Fraction(ratio, 20), scores), scores)
        for ratio in range(16)
    ]
    for less, more in itertools.pairwise(plans):
        for before, after in zip(less.blocks, more.blocks, strict=True):
            assert before is not None
            assert after is not None
            assert all(set(after[name]) <= set(before[name]) for name in before)


def test_types_remove_gamma_times_as_large_a_share_of_channels(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    scores = draw_scores(structures)
    for gamma in (1.0, 2.0, 3.36):
        budget = make(name="global-types", gamma=gamma, shape="free")
        counts = budget.counts(structures, parameters, Fraction(3, 10), scores)
        lost = {"attention": 0, "mlp": 0}
        whole = {"attention": 0, "mlp": 0}
        for index, block in enumerate(structures):
            for each in block:
                lost[each.kind] += each.count - counts[index][each.name]
                whole[each.kind] += each.count
        of_groups = lost["attention"] / whole["attention"]
        assert lost["mlp"] / whole["mlp"] == pytest.approx(gamma * of_groups, abs=gamma / whole["attention"] + 0.02)


def test_heads_give_what_channels_at_their_least_cannot(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    ratio = Fraction(8, 10)
    counts = make(name="global-types", gamma=50.0, shape="free").counts(
        structures, parameters, ratio, draw_scores(structures)
    )
    group = max(each.cost for block in structures for each in block)
    assert 0 <= ratio * sum(parameters) - counted(structures, counts) < group


def test_alignment_and_skipped_blocks(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    counts = make(align=8).counts(structures, parameters, Fraction(3, 10))
    assert all(block["mlp.down_proj"] % 8 == 0 for block in counts)
    free = make(shape="free", skip_first=1, skip_last=1).counts(structures, parameters, Fraction(1, 10))
    assert free[0] == free[2] == {each.name: each.count for each in structures[0]}
    assert counted(structures, free) == pytest.approx(sum(parameters) / 10, abs=structures[0][1].cost)


def test_given_widths_are_taken_as_they_are(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    counts = make(name="widths", attention=3, mlp=20).counts(structures, parameters, Fraction(0))
    assert counts == [{"self_attn.o_proj": 3, "mlp.down_proj": 20}] * 3
    # all of a structure may stay, whatever the alignment
    counts = make(name="widths", attention=3, mlp=48, align=32).counts(structures, parameters, Fraction(0))
    assert counts == [{"self_attn.o_proj": 3, "mlp.down_proj": 48}] * 3


@settings(max_examples=60, deadline=None)
@given(
    ratio=some.fractions(Fraction(1, 10), Fraction(45, 100)),
    name=some.sampled_from(["uniform", "global-cost", "global-types"]),
    align=some.sampled_from([1, 8]),
    seed=some.integers(0, 5),
)
def test_a_least_share_stays_in_every_block(
    parts: tuple[Structures, list[int]], ratio: Fraction, name: str, align: int, seed: int
) -> None:
    structures, parameters = parts
    scores = draw_scores(structures, seed)
    for name_, scale in (("self_attn.o_proj", 10), ("mlp.down_proj", 100)):  # one block would lose nearly everything
        scores[1][name_] = scores[1][name_] / scale
    budget = make(name=name, shape="free", align=align, least=0.4)
    counts = budget.counts(structures, parameters, ratio, scores)
    assert all(block["self_attn.o_proj"] >= 2 and block["mlp.down_proj"] >= 20 for block in counts)
    assert all(block["mlp.down_proj"] % align == 0 for block in counts)
    gone, group, channel = counted(structures, counts), structures[0][0].cost, structures[0][1].cost
    assert abs(gone - ratio * sum(parameters)) <= group + len(structures) * align * channel


def test_heads_make_up_for_channels_that_must_stay(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    budget = make(name="global-types", gamma=20.0, shape="free", least=0.5)
    counts = budget.counts(structures, parameters, Fraction(4, 10), draw_scores(structures))
    assert all(block["mlp.down_proj"] == 24 for block in counts)
    assert counted(structures, counts) == pytest.approx(0.4 * sum(parameters), abs=structures[0][0].cost)


@settings(max_examples=60, deadline=None)
@given(
    ratio=some.fractions(Fraction(1, 20), Fraction(15, 100)),
    name=some.sampled_from(["uniform", "global-cost", "global-types"]),
    shape=some.sampled_from(["uniform", "free"]),
    only=some.sampled_from(["attention", "mlp"]),
)
def test_units_of_one_kind_alone_can_go(
    parts: tuple[Structures, list[int]], ratio: Fraction, name: str, shape: str, only: str
) -> None:
    assume(shape == "free" or ratio >= Fraction(1, 10))  # of less no block could lose a group, where all lose as many
    structures, parameters = parts
    budget = make(name=name, shape=shape, only=only)
    counts = budget.counts(structures, parameters, ratio, draw_scores(structures))
    for block, found in zip(structures, counts, strict=True):
        assert all(found[each.name] == each.count for each in block if each.kind != only)
    unit = max(each.cost for block in structures for each in block if each.kind == only)
    once = shape == "free" and (name != "uniform" or only == "attention")
    rounded = Fraction(1 if once else len(structures), 2)  # to half a unit, in every block or over them all
    cut = 0 if name == "uniform" else 1  # which ends before the target
    assert abs(counted(structures, counts) - ratio * sum(parameters)) <= (rounded + cut) * unit


def test_without_a_least_share_a_block_may_lose_nearly_everything(parts: tuple[Structures, list[int]]) -> None:
    structures, parameters = parts
    scores = draw_scores(structures)
    scores[1]["mlp.down_proj"] = scores[1]["mlp.down_proj"] / 1000
    for least, left in ((0.0, 1), (0.25, 12), (0.26, 13)):
        budget = make(name="global-cost", shape="free", least=least)
        counts = budget.counts(structures, parameters, Fraction(3, 10), scores)
        assert counts[1]["mlp.down_proj"] == left


@pytest.mark.parametrize(
    ("options", "ratio", "message"),
    [
        ({}, Fraction(99, 100), "ratio 0.99 asks for .* and at most .* can go while a unit of every structure stays"),
        ({"align": 64}, Fraction(1, 5), "'budget.align' cannot be 64: 'mlp.down_proj' of block 0 has only 48 channels"),
        ({"name": "widths", "mlp": 0}, Fraction(0), "'budget.mlp' cannot be 0"),
        (
            {"least": 0.8},
            Fraction(3, 10),
            "while the 0.8 of budget.least of every structure stays: ask for at most 0.1",
        ),
        (
            {"only": "attention"},
            Fraction(1, 2),
            "at most .* can go .*: ask for at most 0.2.*, take from both kinds with --set budget.only=all, or",
        ),
        ({"name": "widths", "attention": 9}, Fraction(0), "'budget.attention' cannot be 9"),
        (
            {"name": "widths", "mlp": 20, "align": 8},
            Fraction(0),
            "'budget.mlp' cannot be 20: with align 8 .* like 16; or",
        ),
        ({"name": "widths", "mlp": 5, "align": 8, "shape": "free"}, Fraction(0), "a multiple of that, like 8"),
    ],
)
def test_what_would_leave_nothing_is_refused(
    parts: tuple[Structures, list[int]], options: dict[str, Any], ratio: Fraction, message: str
) -> None:
    structures, parameters = parts
    with pytest.raises(InputError, match=message):
        make(**options).counts(structures, parameters, ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "round"}, "'budget.shape' cannot be 'round': it is uniform or free"),
        ({"align": 0}, "'budget.align' cannot be 0: it is a whole number of at least 1"),
        ({"skip_first": 2}, "leave some blocks wider than others: add --shape free"),
        ({"least": 1}, "'budget.least' cannot be 1: it is the share of units that stays in every block"),
        ({"least": True}, "'budget.least' cannot be True"),
        ({"least": 0.5, "name": "widths", "mlp": 8}, "'budget.least' is 0.5, and budget 'widths' is given what stays"),
        ({"only": "heads"}, "'budget.only' cannot be 'heads': it is attention, mlp, or all for both"),
        ({"only": "mlp", "name": "widths", "mlp": 8}, "'budget.only' is mlp, and budget 'widths' is given what stays"),
        (
            {"only": "mlp", "name": "global-types", "gamma": 2.0},
            "'budget.gamma' weighs groups of heads against channels",
        ),
        (
            {"only": "mlp", "name": "global-cost", "attention_scale": 2.0},
            "'budget.attention_scale' weighs .* with 'budget.only=mlp'",
        ),
        ({"only": "attention", "align": 8}, "'budget.align' is 8, and with 'budget.only=attention' channels stay"),
        ({"gama": 2}, "'budget.gama' is not an option of budget 'uniform'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


def test_ties_are_kept_by_lowest_number() -> None:
    assert top_units(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == (0, 1, 3)
