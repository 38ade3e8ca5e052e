"""A grid of recipes: what they share, the axes they differ along, and the product of the axes.

A grid file is a recipe file with a section more, or two:

    model = "smollm2-135m"             # what every recipe holds

    [calibration]
    samples = 64

    [grid]                             # axes: dotted recipe names -> values; the last one varies fastest
    method = ["magnitude", "wanda"]
    pattern = [0.5, "2:4"]             # fractions and K:G on one axis
    seed = [0, 1]
    "calibration.source" = ["c4", "wikitext2"]

    [evaluate]                         # optional: measure each result's perplexity
    text = "wikitext2"

Where the points of an axis differ in more than one name, or need a name of their own, they are cases: a `label` and what it sets.

    [[grid.variant]]                   # `variant` is any word that is no name of a recipe
    label = "Wanda"
    method = "wanda"

    [[grid.variant]]
    label = "R²-DSnoT, pruning reweighted"
    method = "r2-dsnot"
    parts.refine.relative = "prune"

An axis takes the place of the value beside it, and `pattern` also that of `sparsity`. A combination that is no valid recipe, or the
same recipe as another, is refused before anything runs. A section [study] is for `prunekit study`, and no concern of the grid.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from .errors import InputError, nearest
from .jobs import check_options
from .recipe import Recipe
from .report.table import COLUMNS
from .settings import Section

_OVERRIDES = "parts.budget.overrides."  # a glob follows, which may hold dots
_LONGEST_NAME = 100


class EvaluationOptions(Section):
    """How every result of a grid is evaluated; the same names and defaults as `prunekit eval`."""

    text: str = Field("builtin:eval", description="file, folder, preset or hf:ID[:split[:field]]")
    length: int | None = Field(None, ge=2, description="tokens per window; default as for calibration")
    samples: int | None = Field(None, ge=1, description="use only the first so many windows")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the forward passes")


@dataclass(frozen=True)
class Combination:
    """One recipe of a grid.

    Attributes:
        name: of its folder: readable, safe on any file system, unique within the grid.
        axes: name of the axis -> the value it has here, of a case its label, in the file's order.
    """

    name: str
    axes: dict[str, Any]
    recipe: Recipe


class Grid(Section):
    """Recipes that differ along some axes.

    Attributes:
        base: unvalidated values that all recipes share.
        axes: dotted recipe name -> the values it takes; or any name -> cases, mappings with a `label` and recipe names.
        evaluate: how to evaluate what comes out; None = not at all.
    """

    holder: ClassVar[str] = "a grid"

    base: dict[str, Any]
    axes: dict[str, list[Any]]
    evaluate: EvaluationOptions | None = None

    @classmethod
    def read(cls, path: Path) -> Grid:
        """The grid in a `.toml`, `.yaml`, `.yml` or `.json` file. Raises `InputError`."""
        return cls.build(Recipe.read(path))

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Grid:
        """A grid from the values of a file. Raises `InputError` with the first thing that is wrong."""
        base = {name: value for name, value in values.items() if name not in ("grid", "evaluate", "study")}
        section = values.get("grid")
        axes = dict(_flat(section)) if isinstance(section, Mapping) else {}
        if not axes:
            raise InputError(
                'the grid has no axes: name them in a section [grid], like `method = ["magnitude", "wanda"]` below `[grid]`'
            )
        for name, given in axes.items():
            _check_axis(name, given)
        if "sparsity" in axes and "pattern" in axes:
            raise InputError(
                'axes sparsity and pattern exclude each other: write both kinds as one axis, like pattern = [0.5, "2:4"]'
            )
        if "model" not in base and "model" not in axes:
            raise InputError("the grid names no model: write `model = ...` at its top, or an axis `model = [...]`")
        return super().build({"base": base, "axes": axes, "evaluate": values.get("evaluate")})

    def combinations(self) -> list[Combination]:
        """The product of the axes in the file's order, the last axis varying fastest.

        Raises `InputError`, naming the combination, if one is no valid recipe or says the same as another.
        """
        found: list[tuple[dict[str, Any], dict[str, Any], Recipe]] = []
        known: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*self.axes.values()):
            axes = dict(zip(self.axes, values, strict=True))
            labels = {name: label_of(value) if is_case(value) else value for name, value in axes.items()}
            try:
                recipe = self._recipe(axes)
            except InputError as problem:
                raise InputError(f"combination {_spelt(labels)}: {problem}") from None
            twin = known.setdefault(recipe_hash(recipe), labels)
            if twin is not labels:
                raise InputError(
                    f"combinations {_spelt(twin)} and {_spelt(labels)} are the same recipe: take one of them out of the grid"
                )
            found.append((axes, labels, recipe))
        names = [_name(recipe, axes) for axes, _, recipe in found]
        times = Counter(name.casefold() for name in names)  # some file systems do not tell A from a
        return [
            Combination(
                name if times[name.casefold()] == 1 else f"{name}_{recipe_hash(recipe)[:8]}", axes=labels, recipe=recipe
            )
            for name, (_, labels, recipe) in zip(names, found, strict=True)
        ]

    def _recipe(self, axes: dict[str, Any]) -> Recipe:
        values = copy.deepcopy(self.base)
        values.setdefault("method", "wanda")
        for name, value in (setting for axis in axes for setting in _settings(axis, axes[axis]).items()):
            if name in ("sparsity", "pattern"):  # one of them as an axis replaces either in the base
                values.pop("sparsity", None)
                values.pop("pattern", None)
            *path, last = _steps(name)
            section = values
            for step in path:
                section = section.setdefault(step, {})
                if not isinstance(section, dict):
                    raise InputError(
                        f"'{step}' is {section!r} in the grid file, not a section that could hold '{name}'"
                    )
            section[last] = copy.deepcopy(value)
        recipe = Recipe.build(values)
        check_options(recipe)
        return _plain(recipe)


def is_case(value: Any) -> bool:
    """Whether a value of an axis is a case: a label, and what it sets."""
    return isinstance(value, Mapping) and "label" in value


def label_of(value: Any) -> str:
    """How a table names a value of an axis."""
    if is_case(value):
        value = value["label"]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of what a recipe says, without the defaults that a run fills in."""
    return hashlib.sha256(_json(recipe.model_dump(mode="json")).encode()).hexdigest()


def _plain(recipe: Recipe) -> Recipe:
    """The same recipe with its target said in one way: nothing, `sparsity = 0.5`, `pattern = "0.50"` are one recipe."""
    text = str(recipe.target)
    if recipe.sized:
        return recipe
    if recipe.removes:
        return recipe.model_copy(update={"ratio": float(recipe.target.fraction)})
    is_decimal = ":" not in text and "/" not in text
    return recipe.model_copy(
        update={"sparsity": float(text) if is_decimal else None, "pattern": None if is_decimal else text}
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Axes by dotted name; TOML makes nested sections of `calibration.samples = [...]` without quotes."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _steps(name: str) -> list[str]:
    if name.startswith(_OVERRIDES):
        return [*_OVERRIDES.rstrip(".").split("."), name.removeprefix(_OVERRIDES)]
    return name.split(".")


def _settings(axis: str, value: Any) -> dict[str, Any]:
    """What a value of an axis sets: dotted recipe name -> value."""
    if not is_case(value):
        return {axis: value}
    return dict(_flat({name: setting for name, setting in value.items() if name != "label"}))


def _check_axis(name: str, given: Any) -> None:
    if isinstance(given, list) and given and all(is_case(value) for value in given):
        if name in COLUMNS:
            raise InputError(f"axis '{name}' of cases has the name of a column of every table: call it something else")
        for case in given:
            if not isinstance(case["label"], str) or not case["label"].strip():
                raise InputError(f"a case of axis '{name}' is labelled {case['label']!r}: a label is text")
            for setting in _settings(name, case):
                _check_name(setting, f"'{setting}' of case '{case['label']}'")
        twins = [label for label, times in Counter(case["label"] for case in given).items() if times > 1]
        if twins:
            raise InputError(f"axis '{name}' has more than one case labelled '{twins[0]}': labels tell cases apart")
        return
    _check_name(name, f"axis '{name}'")
    if not isinstance(given, list):
        raise InputError(f"axis '{name}' is {given!r}, not a list: write [{given!r}], or put it above [grid]")
    if not given:
        raise InputError(f"axis '{name}' is an empty list: give it at least one value, or take it out")


def _check_name(name: str, what: str) -> None:
    known = Recipe.names()
    steps = _steps(name)
    if name in known or (steps[0] == "parts" and len(steps) > 2 and all(steps)):
        return
    hint = "it is written parts.PART.OPTION" if steps[0] == "parts" else nearest(name, known)
    raise InputError(f"{what} is not a name of a recipe: {hint}")


def _spelt(axes: dict[str, Any]) -> str:
    return "(" + ", ".join(f"{name}={value}" for name, value in axes.items()) + ")"


def _name(recipe: Recipe, axes: dict[str, Any]) -> str:
    """Model, method, target, what else varies, seed: nothing that another value on an axis would change."""
    model = Path(recipe.model).name or Path(recipe.model).resolve().name
    words = [model, recipe.method, recipe.asked]
    for axis, value in axes.items():
        if axis not in ("model", "method", "sparsity", "pattern", "ratio", "seed"):
            # of what a case sets, not of its label, which may be reworded without running anything again
            words.append(_word(_steps(axis)[-1], _settings(axis, value) if is_case(value) else value))
    name = "_".join(_slug(word) for word in [*words, f"seed{recipe.seed}"])
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{recipe_hash(recipe)[:8]}"
    return name


def _word(option: str, value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{option}-{hashlib.sha256(_json(value).encode()).hexdigest()[:6]}"
    if isinstance(value, str):
        return f"{option}-{Path(value).name if '/' in value else value}"
    return f"{option}{value}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-._") or "x"
