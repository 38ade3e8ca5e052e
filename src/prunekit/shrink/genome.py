"""What evolution changes: which blocks go, how many units of each structure stay in the others, and a little of which ones.

A genome is plain data, an entry a block: null where it goes, or for each structure [units that stay, noise]. Which units stay follows
from their scores; noise, a number that is not 0, draws some of them anew. The parameters of a genome are counted in whole numbers
before anything is computed, and all that is proposed removes what was asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import InputError
from .budget import Demand, Scores, global_cost, top_units, uniform
from .plan import Plan, Structures
from .units import ATTENTION, MLP, Structure

Gene = tuple[int, int]  # units that stay, noise
Genome = tuple[tuple[Gene, ...] | None, ...]
_ROUNDS = 64


def genome_of(candidate: Any) -> Genome:
    """A genome from plain data."""
    return tuple(
        None if block is None else tuple((int(kept), int(noise)) for kept, noise in block) for block in candidate
    )


@dataclass(frozen=True)
class Rates:
    """How likely a change is, per gene: of a width, of the noise of a mask, of a whole block."""

    width: float
    mask: float
    depth: float


@dataclass(frozen=True)
class Widths:
    """Genomes of a model that remove `target` parameters from its blocks, give or take `window`.

    Attributes:
        parameters: of every block.
        scores: of the units, by block and structure; larger is kept.
        attention: whether groups of heads may go; else channels only, and whole blocks.
        least: the share of a structure's units that stays at least.
        step: a width that is drawn is a multiple of so many units; all are multiples of `align`.
        dropped: how many whole blocks may go at most.
        overlap: the share of the best units that noise leaves in place.
        reach: how far a width moves when it is changed, as a share of its structure's units; 1 is anywhere.
        rates, strong: of changes, and of those of mutants that come from far away.
        skipped: blocks that stay whole.
    """

    structures: Structures
    parameters: Sequence[int]
    scores: Scores
    target: int
    window: int
    attention: bool
    least: float
    step: int
    align: int
    dropped: int
    overlap: float
    reach: float
    rates: Rates
    strong: Rates
    skipped: frozenset[int] = frozenset()
    seed: int = 0

    def refuse(self) -> None:
        """Raise `InputError` where no genome can remove what is asked for."""
        for each in (each for block in self.structures for each in block):
            if each.kind == MLP and each.count % self.align:
                raise InputError(
                    f"a search takes channels in steps of --align, and {self.align} does not divide the {each.count} of '{each.name}' "
                    f"of block {each.block}: leave it out, or take one that does"
                )
        free = [each for block in self.structures for each in block if self._may_lose(each)]
        if not free and not self.dropped:
            raise InputError("no structure of this model can be given a width of its own: there is nothing to search")
        most = sum(each.cost * (each.count - self._least(each)) for each in free)
        if self.dropped:
            free_blocks = [count for index, count in enumerate(self.parameters) if index not in self.skipped]
            most += sum(sorted(free_blocks)[-self.dropped :])
        if most < self.target - self.window:
            raise InputError(
                f"the search is to remove {self.target:,} parameters and its widths leave at most {most:,} to go: ask for a smaller "
                f"--ratio, or for more room, like --set search.least={max(0.0, self.least / 2):g}"
            )
        unit = min((each.cost * self._unit(each) for each in free if each.kind == MLP), default=None)
        if unit is not None and unit > 2 * self.window:
            least = math.ceil(1e5 * -(-unit // 2) / sum(self.parameters)) / 1e5
            raise InputError(
                f"search.window allows {self.window:,} parameters more or less than asked for, and a step of a width has {unit:,}: "
                f"no search would ever meet it; ask for --set search.window={least:g} or more"
            )

    def removed(self, genome: Genome) -> int:
        """How many parameters go, exactly."""
        total = 0
        for block, parameters, genes in zip(self.structures, self.parameters, genome, strict=True):
            if genes is None:
                total += parameters
            else:
                total += sum(each.cost * (each.count - kept) for each, (kept, _) in zip(block, genes, strict=True))
        return total

    def allows(self, genome: Genome) -> bool:
        """Whether a genome removes as much as is asked for, within the window, and no more blocks than may go."""
        gone = sum(genes is None for genes in genome)
        return gone <= self.dropped and gone < len(genome) and abs(self.removed(genome) - self.target) <= self.window

    def plan(self, genome: Genome) -> Plan:
        """Which units stay."""
        return Plan(
            tuple(
                None
                if genes is None
                else {each.name: self.units(each, *gene) for each, gene in zip(block, genes, strict=True)}
                for block, genes in zip(self.structures, genome, strict=True)
            )
        )

    def units(self, structure: Structure, kept: int, noise: int) -> tuple[int, ...]:
        """The `kept` units with the best scores; with noise a share of `overlap` of them, and others in the place of the rest.

        As the paper's mutation of masks, but made instead of drawn until one fits: no two random sets of thousands share so much.
        """
        best = top_units(self.scores[structure.block][structure.name], kept)
        if not noise or kept == structure.count:
            return best
        draw = random.Random(f"{self.seed} mask {structure.block} {structure.name} {noise}")
        others = sorted(set(range(structure.count)) - set(best))
        changed = min(len(others), kept - int(self.overlap * kept))
        return tuple(sorted([*draw.sample(best, kept - changed), *draw.sample(others, changed)]))

    def whole(self) -> Genome:
        """The genome that removes nothing."""
        return tuple(tuple((each.count, 0) for each in block) for block in self.structures)

    def first(self) -> list[Any]:
        """The same share of every block; and what the scores say when they are compared over the whole model."""
        given = [tuple(each for each in block if self._may_lose(each)) for block in self.structures]
        demand = Demand(given, self.parameters, self.target, {ATTENTION: 1, MLP: self.align}, self.scores)
        asked = [uniform(demand), *(global_cost(demand, normalise=how) for how in ("none", "sum", "zscore"))]
        found: list[Genome] = []
        for counts in asked:
            genome = self._fitted(self._of_counts(counts), random.Random(self.seed))
            if genome is not None and genome not in found:
                found.append(genome)
        if not found and self.dropped:
            found = [genome for genome in (self._without(count) for count in range(1, self.dropped + 1)) if genome]
        if not found:
            raise InputError(
                f"no widths of this model remove {self.target:,} parameters, give or take {self.window:,}: allow more with "
                "--set search.window=..., a finer --align, or another --ratio"
            )
        return list(found)

    def mutant(self, parent: Any, draw: random.Random, *, strong: bool) -> Genome | None:
        """Some genes changed, widths then moved until as much goes as is asked for; None where that cannot be."""
        rates, genome = (self.strong if strong else self.rates), list(genome_of(parent))
        for index, block in enumerate(self.structures):
            if self.dropped and index not in self.skipped and draw.random() < rates.depth:
                genome[index] = tuple((each.count, 0) for each in block) if genome[index] is None else None
            genes = genome[index]
            if genes is not None:
                genome[index] = tuple(
                    self._changed(each, gene, rates, draw) for each, gene in zip(block, genes, strict=True)
                )
        return self._fitted(tuple(genome), draw)

    def crossover(self, one: Any, other: Any, draw: random.Random) -> Genome | None:
        """Each gene from either parent, widths then moved likewise; a block that goes is a gene."""
        genome: list[tuple[Gene, ...] | None] = []
        for ours, theirs in zip(genome_of(one), genome_of(other), strict=True):
            if ours is None or theirs is None:
                genome.append(draw.choice((ours, theirs)))
            else:
                genome.append(tuple(draw.choice(pair) for pair in zip(ours, theirs, strict=True)))
        return self._fitted(tuple(genome), draw)

    def _changed(self, structure: Structure, gene: Gene, rates: Rates, draw: random.Random) -> Gene:
        kept, noise = gene
        if not self._may_lose(structure):
            return gene
        if draw.random() < rates.width:
            kept = self._drawn(structure, kept, draw)
        if draw.random() < rates.mask:
            noise = draw.randrange(1, 2**31)
        return kept, noise

    def _drawn(self, structure: Structure, kept: int, draw: random.Random) -> int:
        """A width within reach of the present one."""
        least, step = self._least(structure), 1 if structure.kind == ATTENTION else self.step
        far = max(step, round(self.reach * structure.count))
        choices = [width for width in range(structure.count, least - 1, -step) if abs(width - kept) <= far]
        return draw.choice(choices or [kept])

    def _fitted(self, genome: Genome, draw: random.Random) -> Genome | None:
        """Channels taken from all blocks alike, or given back, until as much goes as is asked for; None where that cannot be."""
        places = [
            (index, number)
            for index, genes in enumerate(genome)
            if genes is not None
            for number, each in enumerate(self.structures[index])
            if each.kind == MLP and self._may_lose(each)
        ]
        draw.shuffle(places)
        counts = {place: genome[place[0]][place[1]][0] for place in places}  # type: ignore[index]
        short = self.target - self.removed(genome)
        for _ in range(_ROUNDS):
            free = [place for place in places if self._room(place, counts[place], short)]
            if not free or abs(short) * 2 <= min(self._cost(place) for place in free):
                break
            share = abs(short) / len(free)
            for place in free:
                cost, room = self._cost(place), self._room(place, counts[place], short)
                moved = min(room, max(1, round(share / cost)), round(abs(short) / cost))
                sign = 1 if short > 0 else -1
                counts[place] -= sign * moved * self._unit(self.structures[place[0]][place[1]])
                short -= sign * moved * cost
                if abs(short) * 2 <= cost:
                    break
        made = [None if genes is None else list(genes) for genes in genome]
        for (index, number), count in counts.items():
            genes = made[index]
            assert genes is not None
            genes[number] = (count, genes[number][1])
        fitted = tuple(None if genes is None else tuple(genes) for genes in made)
        return fitted if self.allows(fitted) else None

    def _room(self, place: tuple[int, int], kept: int, short: int) -> int:
        """By how many steps a width can shrink, where parameters are short of going, or grow."""
        structure = self.structures[place[0]][place[1]]
        room = kept - self._least(structure) if short > 0 else structure.count - kept
        return room // self._unit(structure)

    def _cost(self, place: tuple[int, int]) -> int:
        structure = self.structures[place[0]][place[1]]
        return structure.cost * self._unit(structure)

    def _of_counts(self, counts: Sequence[Mapping[str, int]]) -> Genome:
        return tuple(
            tuple((self._whole_steps(each, found.get(each.name, each.count)), 0) for each in block)
            for found, block in zip(counts, self.structures, strict=True)
        )

    def _whole_steps(self, structure: Structure, kept: int) -> int:
        """The width a fitted genome may have that is nearest below."""
        unit = self._unit(structure)
        return max(self._least(structure), structure.count - -(-(structure.count - kept) // unit) * unit)

    def _without(self, count: int) -> Genome | None:
        """The last blocks gone but the very last, and those that stay whole, where that alone comes to what is asked for."""
        free = [index for index in range(len(self.structures) - 1) if index not in self.skipped]
        gone = set(free[-count:])
        genome = tuple(None if index in gone else genes for index, genes in enumerate(self.whole()))
        return self._fitted(genome, random.Random(self.seed))

    def _may_lose(self, structure: Structure) -> bool:
        kinds = (ATTENTION, MLP) if self.attention else (MLP,)
        if structure.block in self.skipped:
            return False
        return structure.kind in kinds and structure.resizes == "alone" and structure.count > self._least(structure)

    def _unit(self, structure: Structure) -> int:
        return self.align if structure.kind == MLP else 1

    def _least(self, structure: Structure) -> int:
        """At least a unit, and so many that what goes is whole steps."""
        unit = self._unit(structure)
        least = max(unit, math.ceil(Fraction(str(self.least)) * structure.count))
        return structure.count - (structure.count - min(least, structure.count)) // unit * unit
