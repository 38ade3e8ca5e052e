"""A method's parts with a recipe's options laid over their defaults."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .catalogue import METHODS, PARTS, UNIT_PARTS, Method
from .errors import InputError
from .parts import Part, find_part


@dataclass(frozen=True)
class Bound:
    """A part with its options filled in."""

    part: Part
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return self.part.needed(self.options)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        """What the part's function returns."""
        return self.part.function(*arguments, **self.options, **more)


def bind(kind: str, method: Method, options: Mapping[str, Mapping[str, Any]]) -> Bound | None:
    """The part of that kind: the recipe's `name` wins over the method's, whose own options then do not apply.

    `options` are a recipe's, by the word recipes have for a kind. Raises `InputError`.
    """
    word = kind.removeprefix("unit-")
    given = dict(options.get(word, {}))
    own = getattr(method, word)
    name = given.pop("name", own)
    if name is None or name == "none":
        if given:
            known = ", ".join({part: its for part, its in [*PARTS.items(), *UNIT_PARTS.items()] if its == kind})
            others = ", ".join(
                other for other, row in METHODS.items() if getattr(row, word) and row.kind == method.kind
            )
            raise InputError(
                f"'{word}.{next(iter(given))}' is an option of a {word} and method '{method.name}' has none: "
                + (
                    f"name one with --set {word}.name=... ({known})"
                    if known
                    else f"use a method that has one ({others})"
                )
            )
        return None
    defaults = method.options.get(word, {}) if name == own else {}
    part = find_part(kind, name)
    return Bound(part, part.bind({**defaults, **given}))


def named_generator(seed: int, name: str) -> torch.Generator:
    """What is drawn for a linear: decided by seed and name, so that neither order nor number of processes matters.

    It draws on the processor: an accelerator's generator gives other numbers.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
