"""Spaces of recipes: dotted names and what each may be, some only where another has a certain value.

A space is plain data, and a file may hold one:

    [space]
    method = ["wanda", "ria", "sparsegpt"]
    "parts.score.alpha" = { low = 0.1, high = 1.0, when = { method = ["ria"] } }
    "parts.refine.name" = { of = ["none", "swaps"], when = { method = ["wanda", "ria"] } }

"none" in a list stands for leaving the name as the method has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, nearest
from ..recipe import Recipe

if TYPE_CHECKING:
    import optuna

NOTHING = "none"  # the name is not set
_SCORED = ["wanda", "ria", "lp-ria", "stade", "symwanda"]
_RELATIVE = ["ria", "lp-ria", "stochastic-ria"]
_PLAIN = (str, int, float)  # and bool, which is an int
_KINDS = {"low", "high", "log", "of", "when"}

SPACES: dict[str, dict[str, Any]] = {
    "scores": {
        "method": ["wanda", "magnitude", "ria", "lp-ria", "stochastic-ria", "stade", "symwanda", "owl"],
        "parts.score.alpha": {"low": 0.0, "high": 1.0, "when": {"method": _RELATIVE}},
        "parts.score.p": {"low": 0.5, "high": 4.0, "when": {"method": ["lp-ria"]}},
        "parts.score.beta": {"low": 0.05, "high": 1.0, "when": {"method": ["stochastic-ria"]}},
        "parts.pattern.group": [NOTHING, "row", "layer"],
        "parts.budget.spread": {"low": 0.02, "high": 0.2, "when": {"method": ["owl"]}},
    },
    "full": {
        "method": [*_SCORED, "stochastic-ria", "sparsegpt", "alps", "auto"],
        "parts.score.alpha": {"low": 0.0, "high": 1.0, "when": {"method": _RELATIVE}},
        "parts.score.p": {"low": 0.5, "high": 4.0, "when": {"method": ["lp-ria"]}},
        "parts.score.beta": {"low": 0.05, "high": 1.0, "when": {"method": ["stochastic-ria"]}},
        "parts.pattern.group": {"of": [NOTHING, "row", "layer"], "when": {"method": _SCORED}},
        "parts.budget.name": [NOTHING, "owl"],
        "parts.budget.spread": {"low": 0.02, "high": 0.2, "when": {"parts.budget.name": ["owl"]}},
        "parts.refine.name": {"of": [NOTHING, "dsnot", "r2-dsnot", "swaps"], "when": {"method": _SCORED}},
        "parts.reconstruct.name": {
            "of": [NOTHING, "least-squares", "sparsegpt"],
            "when": {"method": [*_SCORED, "stochastic-ria"]},
        },
        "parts.reconstruct.rho": {"low": 0.05, "high": 1.0, "log": True, "when": {"method": ["alps", "auto"]}},
        "parts.tune.name": {"of": [NOTHING, "blockwise"], "when": {"method": [*_SCORED, "sparsegpt", "alps"]}},
        "parts.tune.rate": {"low": 0.003, "high": 0.05, "log": True, "when": {"method": ["auto"]}},
    },
}


@dataclass(frozen=True)
class Gene:
    """One name of a recipe: the values it may have, or the numbers between which it lies, and where it is asked for at all."""

    name: str
    of: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def asked(self, point: Mapping[str, Any]) -> bool:
        """Whether it matters, given what the genes before it are."""
        return all(point.get(name) in values for name, values in self.when.items())

    def drawn(self, trial: optuna.Trial) -> Any:
        """What a trial suggests."""
        if self.of:
            return trial.suggest_categorical(self.name, list(self.of))
        return float(f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.3g}")


@dataclass(frozen=True)
class RecipeSpace:
    """What recipes a search chooses among."""

    genes: tuple[Gene, ...]

    @classmethod
    def of(cls, space: str | Mapping[str, Any]) -> RecipeSpace:
        """A space by its name, in a file with a section [space], or as that section. Raises `InputError`."""
        genes: list[Gene] = []
        for name, said in section_of(space).items():
            genes.append(_gene(name, said, [gene.name for gene in genes]))
        return cls(tuple(genes))

    def drawn(self, trial: optuna.Trial, *, settled: bool = False) -> dict[str, Any]:
        """A point: the names that matter and what they are; of one that is `settled`, no numbers, which then are the method's own."""
        point: dict[str, Any] = {}
        for gene in self.genes:
            if gene.asked(point) and (gene.of or not settled):
                point[gene.name] = gene.drawn(trial)
        return point

    def settled(self, method: str) -> dict[str, Any]:
        """What is to be suggested for a method as it stands in the catalogue; where a name cannot be left alone, its first value."""
        point: dict[str, Any] = {"method": method}
        for gene in self.genes:
            if gene.name != "method" and gene.of and gene.asked(point):
                point[gene.name] = NOTHING if NOTHING in gene.of else gene.of[0]
        return point

    @property
    def methods(self) -> list[str]:
        """The methods there are to choose among."""
        return next((list(gene.of) for gene in self.genes if gene.name == "method"), [])


def section_of(space: str | Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a space, not yet looked at. Raises `InputError`."""
    if not isinstance(space, str):
        return dict(space)
    if space in SPACES:
        return dict(SPACES[space])
    if Path(space).suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise InputError(
            f"space '{space}' is unknown: {nearest(space, SPACES)}; or a file with a section [space], as .toml, .yaml or .json"
        )
    section = Recipe.read(Path(space)).get("space")
    if not isinstance(section, Mapping) or not section:
        raise InputError(f"'{space}' has no section [space] with names of a recipe in it")
    return dict(section)


def values_of(point: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe at a point; what is "none" is left as the method has it."""
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    parts: dict[str, dict[str, Any]] = {name: dict(own) for name, own in dict(values.get("parts", {})).items()}
    for name, value in point.items():
        if value == NOTHING:
            continue
        if name.startswith("parts."):
            _, part, option = name.split(".")
            parts.setdefault(part, {})[option] = value
        else:
            values[name] = value
    return {**values, "parts": parts}


def _gene(name: str, said: Any, before: Sequence[str]) -> Gene:
    steps = name.split(".")
    if name not in ("method", "seed") and not (steps[0] == "parts" and len(steps) == 3):
        raise InputError(
            f"'{name}' of the space is not a name that can be searched: it is method, seed or parts.PART.OPTION"
        )
    said = {"of": said} if isinstance(said, list) else said
    if not isinstance(said, Mapping) or set(said) - _KINDS or ("of" in said) == ("low" in said or "high" in said):
        raise InputError(
            f"'{name}' of the space is {said!r}: give a list of values, or {{ low = ..., high = ... }}, perhaps with `when`"
        )
    when = said.get("when", {})
    if not isinstance(when, Mapping) or not all(isinstance(values, list) for values in when.values()):
        raise InputError(
            f"`when` of '{name}' of the space is {when!r}: give other names with lists of values, like {{ method = [\"ria\"] }}"
        )
    for other in when:
        if other not in before:
            raise InputError(f"'{name}' of the space depends on '{other}', which is not in front of it")
    if "of" in said:
        values = said["of"]
        if not isinstance(values, list) or not values or not all(isinstance(value, _PLAIN) for value in values):
            raise InputError(
                f"'{name}' of the space has {values!r} for values: give a list of words, numbers, true or false"
            )
        return Gene(name, of=tuple(dict.fromkeys(values)), when=when)
    ends = [said.get("low"), said.get("high")]
    low, high = (
        float(end) if isinstance(end, (int, float)) and not isinstance(end, bool) else math.nan for end in ends
    )
    log = said.get("log", False)
    if not low < high or math.isinf(low) or math.isinf(high):
        raise InputError(
            f"'{name}' of the space lies between {ends[0]!r} and {ends[1]!r}: give two numbers, the lower one first"
        )
    if not isinstance(log, bool) or (log and low <= 0):
        raise InputError(
            f"'{name}' of the space from {low:g} on cannot have log = {log!r}: it is true or false, and true only above 0"
        )
    return Gene(name, low=low, high=high, log=log, when=when)
