"""Genomes: exact sizes, operators that never leave the window, masks that are what they say."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel
from prunekit.shrink.genome import Genome, Rates, Widths, genome_of
from prunekit.shrink.plan import Plan, Structures
from prunekit.shrink.slicing import Slicer
from prunekit.shrink.units import ATTENTION, find_structures


@cache
def shapes(family: str) -> tuple[Structures, list[int]]:
    """The structures of a tiny model, and how many parameters every block has."""
    model = tiny.make_model(family, num_hidden_layers=6) if family == "llama" else tiny.make_model(family)
    blocks = ResidentModel(model).anatomy.blocks
    parameters = [sum(p.numel() for p in model.get_submodule(block.name).parameters()) for block in blocks]
    return find_structures(model, ResidentModel(model).anatomy), parameters


def space(family: str = "llama", ratio: float = 0.2, **changes: Any) -> Widths:
    structures, parameters = shapes(family)
    draw = torch.Generator().manual_seed(3)
    scores = [{each.name: torch.rand(each.count, generator=draw) for each in block} for block in structures]
    made = Widths(
        structures,
        parameters,
        scores,
        target=round(ratio * sum(parameters)),
        window=round(0.01 * sum(parameters)),
        attention=False,
        least=0.25,
        step=4,
        align=1,
        dropped=0,
        overlap=0.8,
        reach=1.0,
        rates=Rates(0.3, 0.3, 0.2),
        strong=Rates(0.9, 0.6, 0.0),
    )
    return replace(made, **changes)


def numel(plan: Plan, made: Widths, family: str) -> int:
    """Parameters of the blocks of a model that was really cut."""
    model = tiny.make_model(family, num_hidden_layers=6) if family == "llama" else tiny.make_model(family)
    total = 0
    for block, kept in zip(ResidentModel(model).anatomy.blocks, plan.blocks, strict=True):
        if kept is None:
            continue
        module = model.get_submodule(block.name)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        slicer = Slicer(made.structures[block.index], plan, shapes)
        total += sum(slicer(name, tensor.detach()).numel() for name, tensor in module.named_parameters())
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2"])
def test_what_a_genome_removes_is_what_the_cut_model_lacks(family: str) -> None:
    made = space(family, attention=True, dropped=1, window=10**6)
    draw = random.Random(0)
    genome: Genome = genome_of(made.first()[0])
    dropped = 0
    for _ in range(12):
        genome = made.mutant(genome, draw, strong=True) or genome
        genome = made.mutant(genome, draw, strong=False) or genome
        dropped += None in genome
        assert numel(made.plan(genome), made, family) == sum(made.parameters) - made.removed(genome)
    assert dropped, "a block went at least once"


def test_every_child_is_inside_the_window_and_valid() -> None:
    made = space(attention=True, dropped=2)
    made.refuse()
    draw = random.Random(1)
    population = [genome_of(each) for each in made.first()]
    assert len(population) > 1
    children = []
    for _ in range(300):
        children.append(made.mutant(draw.choice(population), draw, strong=draw.random() < 0.5))
        children.append(made.crossover(*draw.choices(population, k=2), draw))
        population += [child for child in children[-2:] if child is not None]
    legal = [child for child in children if child is not None]
    assert len(legal) > 300
    for child in legal:
        assert abs(made.removed(child) - made.target) <= made.window
        assert sum(genes is None for genes in child) <= 2
        for genes, block in zip(child, made.structures, strict=True):
            for (kept, _), each in zip(genes or (), block, strict=False):
                assert max(1, each.count // 4) <= kept <= each.count
        assert Plan.from_json(made.plan(child).to_json(made.structures), made.structures) == made.plan(child)
    assert any(None in child for child in legal)
    assert len(set(legal)) > 200


SIZES = {
    "ratio": st.floats(0.01, 0.7),
    "window": st.integers(0, 2000),
    "attention": st.booleans(),
    "least": st.floats(0, 1),
    "step": st.integers(1, 8),
    "align": st.sampled_from([1, 2, 4, 5, 8, 12, 48]),
    "dropped": st.integers(0, 3),
    "overlap": st.floats(0, 1),
    "reach": st.floats(0.01, 1),
    "skipped": st.frozensets(st.integers(0, 5), max_size=3),
    "seed": st.integers(0, 5),
}
RATES = st.builds(Rates, *[st.floats(0, 1)] * 3)


def check(made: Widths, genome: Genome) -> None:
    """All that must hold of whatever is proposed."""
    assert abs(made.removed(genome) - made.target) <= made.window
    assert sum(genes is None for genes in genome) <= made.dropped
    for index, (genes, block) in enumerate(zip(genome, made.structures, strict=True)):
        assert genes is not None or index not in made.skipped
        for (kept, _), each in zip(genes or (), block, strict=False):
            if index in made.skipped or (each.kind == ATTENTION and not made.attention):
                assert kept == each.count
            assert max(1, made.least * each.count - 1e-9) <= kept <= each.count
            assert each.kind == ATTENTION or kept % made.align == 0
    plan = made.plan(genome)
    assert plan.removed(made.structures, made.parameters) == made.removed(genome)
    for kept, genes, block in zip(plan.blocks, genome, made.structures, strict=True):
        for each, (count, _) in zip(block, genes or (), strict=False):
            assert kept is not None
            assert len(kept[each.name]) == len(set(kept[each.name])) == count


@settings(max_examples=40, deadline=None, database=None)
@given(
    family=st.sampled_from(["gpt2", "llama"]),
    sizes=st.fixed_dictionaries(SIZES),
    rates=RATES,
    strong=RATES,
    seed=st.integers(),
)
def test_whatever_is_asked_for_is_met_by_every_genome_or_refused(
    family: str, sizes: dict[str, Any], rates: Rates, strong: Rates, seed: int
) -> None:
    sizes["step"] *= sizes["align"]
    made = space(family, **sizes, rates=rates, strong=strong)
    try:
        made.refuse()
        population = [genome_of(each) for each in made.first()]
    except InputError:  # what it says is tested below
        return
    draw = random.Random(seed)
    for genome in population:
        check(made, genome)
    for _ in range(12):
        child = (
            made.crossover(draw.choice(population), draw.choice(population), draw)
            if draw.random() < 0.4
            else made.mutant(draw.choice(population), draw, strong=draw.random() < 0.5)
        )
        if child is not None:
            check(made, child)
            population.append(child)


def test_a_child_of_two_takes_every_noise_from_one_of_them() -> None:
    made = space(rates=Rates(0.0, 1.0, 0.0))
    draw = random.Random(2)
    start = made.first()[0]
    one, other = (made.mutant(start, draw, strong=False) for _ in range(2))
    child = made.crossover(one, other, draw)
    assert one is not None
    assert other is not None
    assert child is not None
    taken = {True: 0, False: 0}
    for index, genes in enumerate(child):
        for number, (_, noise) in enumerate(genes or ()):
            ours, theirs = (parent[index][number][1] for parent in (one, other))  # type: ignore[index]
            assert noise in (ours, theirs)
            if ours != theirs:
                taken[noise == ours] += 1
    assert min(taken.values()) > 0


def test_attention_stays_whole_unless_it_is_asked_for() -> None:
    made, draw = space(), random.Random(0)
    genome = genome_of(made.first()[0])
    for _ in range(30):
        genome = made.mutant(genome, draw, strong=True) or genome
        assert all(genes is not None and genes[0] == (2, 0) for genes in genome)


@pytest.mark.parametrize("kept", [1, 10, 40, 47])
def test_noise_leaves_the_share_of_the_best_that_it_should(kept: int) -> None:
    made = space(overlap=0.8)
    structure = made.structures[2][1]
    best = set(made.units(structure, kept, 0))
    assert len(best) == kept
    scores = made.scores[2][structure.name]
    assert min(scores[sorted(best)]) >= max(scores[[unit for unit in range(48) if unit not in best]])
    for noise in (5, 6):
        units = made.units(structure, kept, noise)
        assert list(units) == sorted(set(units))
        assert len(units) == kept
        assert len(best & set(units)) == kept - min(48 - kept, kept - int(0.8 * kept))
        assert units == made.units(structure, kept, noise)
    if kept in (10, 40):
        assert made.units(structure, kept, 5) != made.units(structure, kept, 6)
    assert made.units(structure, 48, 9) == tuple(range(48))


def test_widths_are_multiples_of_the_alignment() -> None:
    made, draw = space(align=8, step=8, window=4000), random.Random(0)
    genome = genome_of(made.first()[0])
    for _ in range(40):
        genome = made.mutant(genome, draw, strong=True) or genome
        assert all(kept % 8 == 0 for genes in genome if genes for kept, _ in genes[1:])
    with pytest.raises(InputError, match="5 does not divide the 48"):
        space(align=5).refuse()


def test_blocks_that_are_skipped_stay_whole() -> None:
    made, draw = space(skipped=frozenset({0, 5}), dropped=1), random.Random(0)
    genome = genome_of(made.first()[0])
    for _ in range(40):
        genome = made.mutant(genome, draw, strong=False) or genome
        assert genome[0] == genome[5] == ((2, 0), (48, 0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ratio": 0.6}, "is to remove .* parameters and its widths leave at most"),
        (
            {"window": 10},
            "search.window allows 10 parameters more or less than asked for, and a step of a width has 96",
        ),
        ({"skipped": frozenset(range(6))}, "nothing to search"),
    ],
)
def test_an_impossible_window_is_refused_before_anything_is_tried(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        space(**changes).refuse()
