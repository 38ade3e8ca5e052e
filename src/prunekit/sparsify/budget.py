"""How much of each linear goes: a budget part decides per block, then the recipe's overrides and ignores have the last word."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear
from ..parts import budget, find_part
from ..recipe import Pattern
from .patterns import check_fits


@budget()
def uniform(pattern: Pattern, blocks: Sequence[Block]) -> list[Pattern]:
    """The same pattern for every block."""
    return [pattern] * len(blocks)


def allot(
    anatomy: Anatomy, pattern: Pattern, *, part: str = "uniform", options: dict[str, Any] | None = None
) -> dict[str, Pattern | None]:
    """Pattern of every linear by full name; None = left dense.

    Besides the budget part's own options, `options` may hold `overrides` (glob -> pattern) and `ignore` (globs). A glob is matched
    against the linear's full name, its name in the block, and the block's name. The last override that matches wins, and `ignore`
    wins over all. Raises `InputError` for a glob that matches nothing and for groups that do not divide a linear's inputs.
    """
    own = dict(options or {})
    overrides = _patterns(own.pop("overrides", {}))
    ignore = _globs(own.pop("ignore", []))
    chosen = find_part("budget", part)
    per_block = chosen.function(pattern, anatomy.blocks, **chosen.bind(own))
    unused = {*overrides, *ignore}
    allotted: dict[str, Pattern | None] = {}
    for block, block_pattern in zip(anatomy.blocks, per_block, strict=True):
        for linear in block.linears:
            wanted: Pattern | None = block_pattern
            for glob, override in overrides.items():
                if _matches(glob, linear):
                    wanted = override
                    unused.discard(glob)
            for glob in ignore:
                if _matches(glob, linear):
                    wanted = None
                    unused.discard(glob)
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


def _matches(glob: str, linear: Linear) -> bool:
    return any(fnmatchcase(name, glob) for name in (linear.full_name, linear.name, linear.block))


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
