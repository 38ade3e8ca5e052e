"""How many units of each structure stay: a budget part says, then shape and alignment are seen to in whole parameters.

Ratios are of the blocks' parameters. Groups of heads are few and large, channels many and small: where numbers have to be whole, the
channels make up for what the groups leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..catalogue import Method
from ..errors import InputError
from ..parts import Limits, Part, find_part, unit_budget
from .plan import Plan, Structures
from .units import ATTENTION, MLP, Structure

Shape = Literal["uniform", "free"]
Only = Literal["all", "attention", "mlp"]
_BETWEEN = ("gamma", "attention_scale")  # options that weigh groups of heads against channels
Counts = list[dict[str, int]]
Scores = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Demand:
    """What a budget part is asked.

    Attributes:
        structures: by block; none of a block that is skipped.
        parameters: of every block, skipped ones included.
        target: how many parameters should go.
        least: how many units of a kind must stay; more are a multiple of that.
        share: the share of a structure's units that must stay.
        scores: by block and structure, [units] float; larger is kept. Empty for a part that does not want them.
    """

    structures: Structures
    parameters: Sequence[int]
    target: int
    least: Mapping[str, int]
    scores: Scores = ()
    share: Fraction = Fraction(0)

    def each(self) -> list[Structure]:
        """Every structure."""
        return [structure for block in self.structures for structure in block]

    def least_of(self, structure: Structure) -> int:
        """How many of its units must stay."""
        least = self.least.get(structure.kind, 1)
        return min(structure.count, max(1, math.ceil(self.share * structure.count / least)) * least)


@unit_budget(even=True)
def uniform(demand: Demand) -> Counts:
    """The same share of every block: whole groups of heads as far as the ratio goes, and channels for the rest.

    Without channels, what whole groups leave of a block or take too much is the next one's.
    """
    counts: Counts = [{} for _ in demand.structures]
    open_blocks = [block for block in demand.structures if block]
    left = Fraction(0)
    share = Fraction(demand.target, max(1, sum(demand.parameters[block[0].block] for block in open_blocks)))
    for block in open_blocks:
        wanted = share * demand.parameters[block[0].block]
        if any(each.kind == MLP for each in block):
            counts[block[0].block] = _filled(block, demand, wanted, {})
            continue
        left += wanted
        for each in block:
            most = each.count - demand.least_of(each)
            gone = min(max(round(left / each.cost), 0), most)
            counts[each.block][each.name] = each.count - gone
            left -= gone * each.cost
    return counts


def _filled(block: Sequence[Structure], demand: Demand, wanted: Fraction, kept: Mapping[str, int]) -> dict[str, int]:
    """Counts of one block with channels that remove `wanted` parameters as nearly as whole units can.

    Of groups `kept` stay, or fewer where channels alone cannot do it.
    """
    found = dict(kept)
    share = wanted / demand.parameters[block[0].block]
    for structure in block:
        if structure.kind == ATTENTION and structure.name not in found:
            found[structure.name] = max(structure.count - int(share * structure.count), demand.least_of(structure))
    while True:
        left = wanted - sum(
            each.cost * (each.count - found[each.name])
            for each in block
            if each.name in found and each.kind == ATTENTION
        )
        channels = [each for each in block if each.kind == MLP]
        removable = sum(each.cost * (each.count - demand.least_of(each)) for each in channels)
        spare = [each for each in block if each.kind == ATTENTION and found[each.name] > demand.least_of(each)]
        if left <= removable or not spare:
            break
        found[spare[0].name] -= 1
    whole = sum(each.cost * each.count for each in channels)
    for each in channels:
        part = max(Fraction(0), left) * each.cost * each.count / whole
        found[each.name] = min(max(each.count - round(part / each.cost), demand.least_of(each)), each.count)
    return found


@unit_budget(scored=True)
def global_cost(
    demand: Demand,
    *,
    attention_scale: Annotated[float, Limits(above=0)] = 1.0,
    normalise: Literal["none", "sum", "zscore"] = "none",
) -> Counts:
    """The least important units of the whole model go, one after the other, until their parameters add up.

    `attention_scale` multiplies the scores of attention. Scores that are not comparable from block to block are divided by their sum
    over a structure (`sum`) or made to have mean 0 and deviation 1 there (`zscore`).
    Source: the cost-aware cut of FLAP (AL-AM) and Numerical Pruning, in whole parameters.
    """
    scores = [
        {each.name: normalised(demand.scores[each.block][each.name], normalise) for each in block}
        for block in demand.structures
    ]
    for block, found in zip(demand.structures, scores, strict=True):
        for each in block:
            if each.kind == ATTENTION:
                found[each.name] = found[each.name] * attention_scale
    return _cut(demand, scores, demand.each(), demand.target)


@unit_budget(scored=True, paper="https://arxiv.org/abs/2509.14230")
def global_types(demand: Demand, *, gamma: Annotated[float, Limits(above=0)] | None = None) -> Counts:
    """A threshold for all groups of heads and another for all channels; the share of channels that go is γ times that of groups.

    Without `gamma` it is the size of the multilayer perceptrons over that of attention, which the paper's own values are near.
    Source: NIRVANA, section 3 (the split) and its code.
    """
    groups = [each for each in demand.each() if each.kind == ATTENTION]
    channels = [each for each in demand.each() if each.kind == MLP]
    of_groups, of_channels = (sum(each.cost * each.count for each in some) for some in (groups, channels))
    if gamma is None:
        gamma = of_channels / of_groups if of_groups else 1.0
    fraction = demand.target / (of_groups + gamma * of_channels)
    kept = _cut(demand, demand.scores, groups, round(fraction * of_groups))
    others = _cut(demand, demand.scores, channels, demand.target - _gone(groups, kept))
    # groups make up for channels that must stay; elsewhere less than one channel is left to remove, and no group is so small
    kept = _cut(demand, demand.scores, groups, demand.target - _gone(channels, others))
    return [{**some, **more} for some, more in zip(kept, others, strict=True)]


@unit_budget(given=True)
def widths(
    demand: Demand, *, attention: int | None = None, mlp: int | None = None, hidden: int | None = None
) -> Counts:
    """Given numbers: `attention` groups of heads and `mlp` channels in every block, `hidden` channels of the residual stream.

    What is not given stays whole.
    """
    given = {ATTENTION: attention, MLP: mlp}
    # channels of the stream are no units of a block: see `UnitBudget.hidden`
    if attention is None and mlp is None and hidden is None:
        raise InputError(
            "budget 'widths' is given the numbers that stay: say --set budget.mlp=N, --set budget.attention=N, --set budget.hidden=N, "
            "or several of them"
        )
    for each in demand.each():
        wanted = given[each.kind]
        if wanted is not None and not 1 <= wanted <= each.count:
            raise InputError(
                f"'budget.{each.kind}' cannot be {wanted}: '{each.name}' of block {each.block} has {each.count} units, "
                "and at least one must stay"
            )
    return [{each.name: given[each.kind] or each.count for each in block} for block in demand.structures]


def normalised(scores: Tensor, how: str) -> Tensor:
    """Scores of a structure divided by their `sum`, or as `zscore`; shapes: [units] -> [units] float64."""
    scores = scores.double()
    if how == "sum":
        total = float(scores.sum())
        return scores / total if total else scores
    if how == "zscore":
        spread = float(scores.std(correction=0))
        return (scores - scores.mean()) / spread if spread else scores - scores.mean()
    return scores


def _gone(some: Sequence[Structure], counts: Counts) -> int:
    """Parameters of some structures that counts remove."""
    return sum(each.cost * (each.count - counts[each.block][each.name]) for each in some)


def _cut(demand: Demand, scores: Scores, some: Sequence[Structure], target: int) -> Counts:
    """Counts after the least important units of some structures went until `target` parameters are gone, least ones spared."""
    counts: Counts = [{} for _ in demand.structures]
    values, costs, owners = [], [], []
    for number, each in enumerate(some):
        counts[each.block][each.name] = each.count
        ranked = scores[each.block][each.name].double().cpu().sort(stable=True).values
        free = ranked[: each.count - demand.least_of(each)]
        values.append(free)
        costs.append(torch.full((len(free),), each.cost))
        owners.append(torch.full((len(free),), number))
    if not some:
        return counts
    order = torch.cat(values).argsort(stable=True)
    spent = torch.cat(costs)[order].cumsum(0)
    gone = torch.cat(owners)[order][: int(torch.searchsorted(spent, target, right=True))]
    for number, lost in enumerate(gone.bincount(minlength=len(some)).tolist()):
        counts[some[number].block][some[number].name] -= lost
    return counts


def blocks_to_remove(ratio: Fraction, blocks: int) -> int:
    """How many of some blocks a ratio comes to. Raises `InputError` where none would go, or none be left."""
    count = round(ratio * blocks)
    if count >= blocks:
        raise InputError(f"ratio {float(ratio):g} would remove all {blocks} blocks: ask for less")
    if ratio and not count:
        raise InputError(
            f"ratio {float(ratio):g} of {blocks} blocks is less than half of one: ask for {math.ceil(1000 / blocks) / 1000:g} or more"
        )
    return count


@dataclass(frozen=True)
class UnitBudget:
    """A budget part with its options, and what holds for all of them.

    Attributes:
        shape: `uniform` gives every block the same widths, so that stock configs describe the model; `free` leaves them as they come.
        align: channels that stay, also those of the residual stream, are a multiple of this.
        skip_first, skip_last: blocks at either end that stay whole.
        least: the share of the groups of heads, and of the channels, that stays at least in every block.
        only: `attention` or `mlp` where units of the other kind stay whole; `all` takes from both.
    """

    part: Part
    options: dict[str, Any]
    shape: Shape
    align: int
    skip_first: int
    skip_last: int
    least: float
    only: Only

    @classmethod
    def of(cls, method: Method, options: Mapping[str, Any] | None = None) -> UnitBudget:
        """The method's budget with a recipe's options. Raises `InputError`."""
        own = dict(options or {})
        name = own.pop("name", method.budget)
        part = find_part("unit-budget", name)
        defaults = dict(method.options.get("budget", {}))
        common = {"shape": "uniform", "align": 1, "skip_first": 0, "skip_last": 0, "least": 0.0, "only": "all"}
        given = {key: own.pop(key, defaults.pop(key, value)) for key, value in common.items()}
        if given["shape"] not in ("uniform", "free"):
            raise InputError(f"'budget.shape' cannot be {given['shape']!r}: it is uniform or free")
        for key, least in (("align", 1), ("skip_first", 0), ("skip_last", 0)):
            if type(given[key]) is not int or given[key] < least:
                raise InputError(f"'budget.{key}' cannot be {given[key]!r}: it is a whole number of at least {least}")
        share = given["least"]
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(
                f"'budget.least' cannot be {share!r}: it is the share of units that stays in every block, of at least 0 and below 1"
            )
        if share and part.given:
            raise InputError(
                f"'budget.least' is {share:g}, and budget '{name}' is given what stays: leave out one of them"
            )
        if given["only"] not in get_args(Only):
            raise InputError(f"'budget.only' cannot be {given['only']!r}: it is {ATTENTION}, {MLP}, or all for both")
        if given["only"] != "all" and part.given:
            raise InputError(
                f"'budget.only' is {given['only']}, and budget '{name}' is given what stays of each kind: leave out one of them"
            )
        if given["shape"] == "uniform" and (given["skip_first"] or given["skip_last"]):
            raise InputError(
                "'budget.skip_first' and 'budget.skip_last' leave some blocks wider than others: add --shape free, or set both to 0"
            )
        bound = part.bind({**(defaults if name == method.budget else {}), **own})
        if given["only"] != "all":
            for key, usual in part.bind({}).items():
                if key in _BETWEEN and bound[key] != usual:
                    raise InputError(
                        f"'budget.{key}' weighs groups of heads against channels, and with 'budget.only={given['only']}' those of one "
                        "kind alone go: leave out one of them"
                    )
        if given["only"] == ATTENTION:
            if (options or {}).get("align", 1) != 1:
                raise InputError(
                    f"'budget.align' is {given['align']}, and with 'budget.only={ATTENTION}' channels stay as they are: leave out "
                    "one of them"
                )
            given["align"] = 1  # whatever the method's default is
        return cls(part, bound, **cast(Any, given))

    @property
    def scored(self) -> bool:
        """Whether it wants the scores of all blocks before the first is cut."""
        return bool(self.part.needs)

    @property
    def resolved(self) -> dict[str, Any]:
        """Its name and options with the defaults that hold today."""
        common = {name: getattr(self, name) for name in ("shape", "align", "skip_first", "skip_last", "least", "only")}
        return {"name": self.part.name, **self.options, **common}

    @property
    def narrows(self) -> bool:
        """Whether it says how many channels of the residual stream stay."""
        return self.options.get("hidden") is not None

    def hidden(self, channels: int) -> int:
        """How many channels of the residual stream stay, of so many. Raises `InputError`."""
        wanted = self.options.get("hidden")
        if wanted is None:
            return channels
        if not 1 <= wanted <= channels:
            raise InputError(
                f"'budget.hidden' cannot be {wanted}: the residual stream has {channels} channels, and at least one must stay"
            )
        if self.align > channels:
            raise InputError(f"'budget.align' cannot be {self.align}: the residual stream has only {channels} channels")
        return self._nearest(wanted, channels)

    def counts(self, structures: Structures, parameters: Sequence[int], ratio: Fraction, scores: Scores = ()) -> Counts:
        """How many units of each structure stay.

        Raises `InputError` where the ratio cannot be met with a unit of every structure left, or the alignment cannot.
        """
        last = len(structures) - self.skip_last
        removable = [
            tuple(each for each in block if self._may_lose(each)) if self.skip_first <= index < last else ()
            for index, block in enumerate(structures)
        ]
        target = round(ratio * sum(parameters))
        share = Fraction(str(self.least))
        demand = Demand(removable, parameters, target, {ATTENTION: 1, MLP: self.align}, scores, share)
        self._refuse(demand, ratio)
        counts = self.part.function(demand, **self.options)
        if self.part.given:
            self._refuse_unaligned(demand, counts)
        else:
            counts = self._level(demand, counts) if self.shape == "uniform" else self._aligned(demand, counts)
        counts = [
            {each.name: found.get(each.name, each.count) for each in block}
            for found, block in zip(counts, structures, strict=True)
        ]
        gone = any(
            found[each.name] < each.count for found, block in zip(counts, structures, strict=True) for each in block
        )
        if target and not gone and not self.part.given:
            least = min(each.cost for each in demand.each())
            even = " and goes from every block alike" if self.shape == "uniform" else ""
            raise InputError(
                f"ratio {float(ratio):g} asks for {target:,} parameters of {len(structures)} blocks, and a unit has {least:,} or "
                f"more{even}: with align {self.align} none goes; ask for more"
                + (", or add --shape free" if even else "")
            )
        return counts

    def _may_lose(self, structure: Structure) -> bool:
        return (
            structure.count > 1
            and self.only in ("all", structure.kind)
            and (structure.resizes == "alone" or (structure.resizes == "together" and self.shape == "uniform"))
        )

    def _refuse(self, demand: Demand, ratio: Fraction) -> None:
        each = demand.each()
        if self.skip_first + self.skip_last >= len(demand.structures):
            raise InputError(
                f"'budget.skip_first={self.skip_first}' and 'budget.skip_last={self.skip_last}' skip all of the model's "
                f"{len(demand.structures)} blocks: set them to less, like --set budget.skip_first=1 --set budget.skip_last=1"
            )
        if not each:
            asked = "" if self.only == "all" else f" with 'budget.only={self.only}'"
            raise InputError(
                f"no block of this model has units that can be taken out{asked}: shrinking cannot do anything here"
            )
        for structure in each:
            if structure.kind == MLP and self.align > structure.count:
                raise InputError(
                    f"'budget.align' cannot be {self.align}: '{structure.name}' of block {structure.block} has only "
                    f"{structure.count} channels"
                )
        most = sum(structure.cost * (structure.count - demand.least_of(structure)) for structure in each)
        if not self.part.given and demand.target > most:
            stays = f"the {self.least:g} of budget.least" if self.least else "a unit"
            raise InputError(
                f"ratio {float(ratio):g} asks for {demand.target:,} parameters and at most {most:,} can go while {stays} of every "
                f"structure stays: ask for at most {math.floor(1000 * most / sum(demand.parameters)) / 1000:g}, "
                + ("skip fewer blocks, " if self.skip_first or self.skip_last else "")
                + ("take from both kinds with --set budget.only=all, " if self.only != "all" else "")
                + "or remove whole blocks"
            )

    def _refuse_unaligned(self, demand: Demand, counts: Counts) -> None:
        for each in demand.each():
            kept = counts[each.block][each.name]
            if each.kind == MLP and kept < each.count and kept % self.align:
                near = max(kept // self.align, 1) * self.align
                raise InputError(
                    f"'budget.{each.kind}' cannot be {kept}: with align {self.align} the channels that stay are a multiple of that, "
                    f"like {near}; or say --align 1"
                )

    def _level(self, demand: Demand, counts: Counts) -> Counts:
        """The same counts in every block: groups of heads as on average, channels so that the target is met."""
        blocks = [block for block in demand.structures if block]
        if len({tuple((each.name, each.count, each.cost) for each in block) for block in blocks}) > 1:
            raise InputError(
                "the blocks of this model differ in their widths, so none can be the same in all: add --shape free"
            )
        first = blocks[0]
        share = Fraction(demand.target, len(blocks))
        kept = {
            each.name: max(
                round(Fraction(sum(counts[block[0].block][each.name] for block in blocks), len(blocks))),
                demand.least_of(each),
            )
            for each in first
            if each.kind == ATTENTION
        }
        if any(each.kind == MLP for each in first):
            kept = _filled(first, demand, share, kept)
        return self._aligned(demand, [dict(kept) if block else {} for block in demand.structures])

    def _aligned(self, demand: Demand, counts: Counts) -> Counts:
        aligned = [dict(found) for found in counts]
        for each in demand.each():
            if each.kind == MLP:
                aligned[each.block][each.name] = self._nearest(aligned[each.block][each.name], each.count)
        return aligned

    def _nearest(self, kept: int, count: int) -> int:
        """The multiple of the alignment that is nearest to how many of `count` channels stay; all of them are always one."""
        if kept == count:
            return count
        return min(max(round(Fraction(kept, self.align)) * self.align, self.align), count // self.align * self.align)


def no_scores(structures: Structures) -> Scores:
    """Scores that tell no unit from another, for what has to be known before any is measured."""
    return [{each.name: torch.zeros(each.count) for each in block} for block in structures]


def top_units(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` units with the largest scores, ascending; among equals the first. Shapes: scores [units]."""
    order = scores.double().cpu().sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def plan_of(structures: Structures, counts: Counts, scores: Scores) -> Plan:
    """The plan that keeps the best units of every structure."""
    return Plan(
        tuple(
            {each.name: top_units(scores[each.block][each.name], found[each.name]) for each in block}
            for block, found in zip(structures, counts, strict=True)
        )
    )
