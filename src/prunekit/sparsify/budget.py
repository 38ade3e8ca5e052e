"""How much of each linear goes: a budget part decides per block, then the recipe's overrides and ignores have the last word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..bits import row_chunks
from ..catalogue import Method
from ..errors import InputError
from ..model.anatomy import Anatomy, Block
from ..parts import Part, budget, find_part
from ..recipe import Pattern
from ..statistics import Statistics
from .patterns import check_fits


def outlier_share(weights: list[Tensor], stats: list[Statistics], *, outlier: float, spread: float) -> float:
    """Percentage of a block's |W|·‖x‖ that are more than `outlier` times their mean, over all its linears.

    Source: Yin et al. 2024 (OWL), equation 1.
    """
    total, count = 0.0, 0
    for weight, of in zip(weights, stats, strict=True):
        for rows in row_chunks(*weight.shape):
            total += float((weight[rows].to(of.device).abs() * of.input_norm).sum(dtype=torch.float64))
        count += weight.numel()
    limit = outlier * total / count
    above = 0
    for weight, of in zip(weights, stats, strict=True):
        for rows in row_chunks(*weight.shape):
            above += int((weight[rows].to(of.device).abs() * of.input_norm > limit).sum())
    return 100 * above / count


@budget()
def uniform(pattern: Pattern, blocks: Sequence[Block], profile: Sequence[float]) -> list[Pattern]:
    """The same pattern for every block."""
    return [pattern] * len(blocks)


@budget(needs={"input_square"}, paper="https://arxiv.org/abs/2310.05175", measure=outlier_share)
def owl(
    pattern: Pattern, blocks: Sequence[Block], profile: Sequence[float], *, spread: float = 0.08, outlier: float = 5.0
) -> list[Pattern]:
    """More is left in blocks with more outliers, at most about `spread` (λ) more or less than on average.

    Shares of outliers are scaled to [0, 2·spread] and taken from the sparsity, so that the mean over all weights stays what was asked.
    Blocks that are all alike get the same. A K:G pattern keeps G and varies K, the mean being met as nearly as whole numbers allow.
    Source: Yin et al. 2024, section 3.2; λ and M (`outlier`) as in its code: 0.08 and 5. For K:G its code takes λ = 2/G and M = 6,
    which are to be said: `--set budget.spread=0.5 --set budget.outlier=6` for 2:4.
    """
    if spread < 0 or outlier <= 0:
        raise InputError(f"budget.spread={spread} and budget.outlier={outlier}: spread is 0 or more, outlier above 0")
    low, high = min(profile), max(profile)
    sizes = [sum(linear.count for linear in block.linears) for block in blocks]
    scaled = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in profile]
    wanted = _centred([-value for value in scaled], sizes, float(pattern.fraction))
    if pattern.keep is None or pattern.group is None:
        return [Pattern(Fraction(value)) for value in wanted]
    exact = [(1 - value) * pattern.group for value in wanted]
    kept = [min(max(int(value), 1), pattern.group - 1) for value in exact]
    missing = pattern.keep * sum(sizes) - sum(keep * size for keep, size in zip(kept, sizes, strict=True))
    for index in sorted(range(len(blocks)), key=lambda index: kept[index] - exact[index]):  # largest remainder first
        if missing >= sizes[index] and kept[index] < pattern.group - 1:
            kept[index] += 1
            missing -= sizes[index]
    return [Pattern(1 - Fraction(keep, pattern.group), keep, pattern.group) for keep in kept]


def _centred(shifts: list[float], sizes: list[int], mean: float) -> list[float]:
    """`shifts` plus the constant that brings their weighted mean to `mean` after all are cut to [0, 0.99]."""
    low, high = -1.0, 2.0
    for _ in range(60):  # bisection: the cut mean rises with the constant
        middle = (low + high) / 2
        cut = [min(max(shift + middle, 0.0), 0.99) for shift in shifts]
        if sum(value * size for value, size in zip(cut, sizes, strict=True)) < mean * sum(sizes):
            low = middle
        else:
            high = middle
    return cut


@dataclass(frozen=True)
class Budget:
    """A budget part with its options, and the overrides and ignores of a recipe, which have the last word."""

    part: Part
    options: dict[str, Any]
    overrides: dict[str, Pattern]
    ignore: list[str]

    @classmethod
    def of(cls, method: Method, options: Mapping[str, Any] | None = None) -> Budget:
        """The method's budget with a recipe's options. Besides the part's own, they may hold `name`, `overrides` and `ignore`."""
        own = dict(options or {})
        name = own.pop("name", method.budget)
        overrides = _patterns(own.pop("overrides", {}))
        ignore = _globs(own.pop("ignore", []))
        part = find_part("budget", name)
        defaults = method.options.get("budget", {}) if name == method.budget else {}
        return cls(part, part.bind({**defaults, **own}), overrides, ignore)

    @property
    def resolved(self) -> dict[str, Any]:
        """Its name and options with the defaults that hold today."""
        return {"name": self.part.name, **self.options}

    def measure(self, weights: list[Tensor], stats: list[Statistics]) -> float:
        """What the part wants to know of a dense block. Shapes: weights [out, in] each, with the statistics of each."""
        assert self.part.measure is not None
        return self.part.measure(weights, stats, **self.options)

    def allot(self, anatomy: Anatomy, pattern: Pattern, profile: Sequence[float] = ()) -> dict[str, Pattern | None]:
        """Pattern of every linear by full name; None = left dense.

        A glob of an override or ignore is matched against the linear's full name, its name in the block, and the block's name. The
        last override that matches wins, and `ignore` wins over all. Fractions that differ by block are rounded to whole zeros per
        row so that the zeros of all linears come out as asked, to half a row count of one linear. Until a part that measures has its
        `profile`, every block has the same.
        Raises `InputError` for a glob that matches nothing and for groups that do not divide a linear's inputs.
        """
        blocks = anatomy.blocks
        measured = self.part.measure is None or len(profile) == len(blocks)
        per_block = (
            self.part.function(pattern, blocks, profile, **self.options) if measured else [pattern] * len(blocks)
        )
        vary = any(each != per_block[0] for each in per_block)
        unused = {*self.overrides, *self.ignore}
        allotted: dict[str, Pattern | None] = {}
        carried = Fraction(0)
        for block, block_pattern in zip(blocks, per_block, strict=True):
            for linear in block.linears:
                wanted: Pattern | None = block_pattern
                for glob, override in self.overrides.items():
                    if linear.matches(glob):
                        wanted = override
                        unused.discard(glob)
                for glob in self.ignore:
                    if linear.matches(glob):
                        wanted = None
                        unused.discard(glob)
                if wanted is block_pattern and vary and wanted.group is None:
                    zeros = wanted.fraction * linear.count + carried
                    in_row = min(max(round(zeros / linear.out_features), 0), linear.in_features - 1)
                    carried = zeros - in_row * linear.out_features
                    wanted = Pattern(Fraction(in_row, linear.in_features))
                if wanted is not None:
                    check_fits(linear.full_name, linear.in_features, wanted.group)
                allotted[linear.full_name] = wanted
        if unused:
            names = ", ".join(sorted({linear.name for linear in anatomy.linears()}))
            raise InputError(
                f"budget glob '{min(unused)}' matches no linear: they are named like "
                f"'{next(anatomy.linears()).full_name}', with in each block {names}"
            )
        return allotted


def _patterns(overrides: Any) -> dict[str, Pattern]:
    if not isinstance(overrides, dict):
        raise InputError(
            f"budget.overrides must map globs to patterns, not {overrides!r}: --set budget.overrides.GLOB=0.3"
        )
    try:
        return {str(glob): Pattern.parse(value) for glob, value in overrides.items()}
    except ValueError as problem:
        raise InputError(f"budget.overrides: {problem}") from None


def _globs(ignore: Any) -> list[str]:
    names = ignore.split(",") if isinstance(ignore, str) else ignore
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"budget.ignore must be globs, not {ignore!r}: --set budget.ignore='*.o_proj,*.down_proj'")
    return [name.strip() for name in names]
