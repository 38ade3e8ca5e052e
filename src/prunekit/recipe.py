"""The Recipe: everything that decides what comes out, in one schema for the command line, recipe files and Python.

A recipe file is TOML or YAML with the same names:

    model = "smollm2-135m"
    method = "wanda"
    pattern = "2:4"            # or: sparsity = 0.5

    [calibration]
    source = "builtin"
    samples = 128

    [parts.budget.overrides]   # what `--set budget.overrides.GLOB=VALUE` says
    "*.down_proj" = 0.6

Unknown names are errors. The resolved recipe (every default filled in) is kept in the output's manifest and can be run again.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from .catalogue import GIVEN_BUDGETS, METHODS, Method, find_method
from .errors import InputError, nearest
from .settings import Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_LENGTH = 2048
# the parts a method may have, by what it does
KINDS = {
    "sparsify": ("score", "pattern", "refine", "reconstruct", "tune", "budget"),
    "shrink": ("score", "budget", "compensate", "tune", "depth", "width", "search"),
}
DEFAULT_RATIO = 0.2
# options of budgets that the command line has names of their own for
SHAPES = ("shape", "align")


class _Yaml(yaml.SafeLoader):
    """YAML in which `2:4` is text; in YAML 1.1 it is a number to the base of sixty."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Pattern:
    """How much is removed, and where: a fraction of zeros, or keep `keep` of every `group` consecutive inputs.

    The fraction is kept as the decimal the user wrote: 0.29 of 100 inputs is 29, not the 28 that binary rounding gives.
    """

    fraction: Fraction
    keep: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str | float) -> Pattern:
        """`0.5`, `"0.5"` or `"2:4"`. Raises `ValueError` with a sentence."""
        words = str(text).strip()
        if ":" in words:
            left, _, right = words.partition(":")
            if not (left.isdecimal() and right.isdecimal() and 0 < int(left) < int(right)):
                raise ValueError(f"pattern '{words}' is not K:G with 0 < K < G (keep K of every G inputs, like 2:4)")
            keep, group = int(left), int(right)
            return cls(1 - Fraction(keep, group), keep, group)
        try:
            fraction = Fraction(words)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"pattern '{words}' is neither a fraction of zeros like 0.5 nor K:G like 2:4") from None
        if not 0 <= fraction < 1:
            raise ValueError(f"sparsity {words} is outside [0, 1): give the fraction of weights to remove, like 0.5")
        return cls(fraction)

    def zeros(self, count: int) -> int:
        """Exact number of zeros among `count` weights that are compared with each other: `floor(count · s)`."""
        return int(count * self.fraction)

    def __str__(self) -> str:
        if self.group:
            return f"{self.keep}:{self.group}"
        decimal = repr(float(self.fraction)).removesuffix(".0")
        return decimal if Fraction(decimal) == self.fraction else str(self.fraction)  # 1/3 has no decimal form


class Calibration(Section):
    """The text the statistics are measured on."""

    source: str = Field("builtin", description="file, folder, preset or hf:ID[:split[:field]]")
    samples: int = Field(128, ge=1, description="number of windows")
    length: int | None = Field(
        None,
        ge=2,
        description=f"tokens per window; default {DEFAULT_LENGTH}, or the model's maximum where that is less",
    )
    sampling: Literal["random", "first"] = Field(
        "random", description="windows at random positions, or the first non-overlapping ones"
    )
    mode: Literal["sequential", "dense"] = Field(
        "sequential", description="statistics behind the already pruned blocks, or of the dense model throughout"
    )
    batch: int | None = Field(None, ge=1, description="windows per forward pass; default: as many as hold 2048 tokens")
    choices: int = Field(
        1,
        ge=1,
        description="of so many calibrations, take the one whose plan moves predictions least (gradient scores)",
    )


class Recipe(Section):
    """What to prune, how, and on which text. Two equal recipes on equal inputs give equal bytes."""

    holder: ClassVar[str] = "a recipe"

    model: str = Field(description="folder, hub id, or smollm2-135m")
    method: str = Field(description="a row of `prunekit methods`")
    sparsity: float | None = Field(None, description="fraction of zeros in every linear")
    pattern: str | None = Field(None, description="fraction of zeros, or K:G = keep K of every G consecutive inputs")
    ratio: float | None = Field(None, description="fraction of the block parameters to remove (shrink methods)")
    plan: str | None = Field(None, description="JSON file that says what stays (method planned)")
    calibration: Calibration = Calibration()
    seed: int = Field(0, ge=0, description="seed of everything drawn at random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the forward passes")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    revision: str | None = Field(None, description="revision of a hub model")
    trust_remote_code: bool = Field(False, description="run code that the model folder brings")
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options of the method's parts")

    @field_validator("pattern", mode="before")
    @classmethod
    def _fraction_as_text(cls, pattern: Any) -> Any:
        return str(pattern) if isinstance(pattern, (int, float)) and not isinstance(pattern, bool) else pattern

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_draws(cls, values: Any) -> Any:
        """Fill in what the method's paper draws where nothing is said of it."""
        if not (isinstance(values, dict) and isinstance(values.get("method"), str)):
            return values
        given = values.get("calibration", {})
        own = find_method(values["method"]).calibration
        return {**values, "calibration": {**own, **given}} if own and isinstance(given, dict) else values

    @model_validator(mode="after")
    def _one_target(self) -> Recipe:
        method = find_method(self.method)
        for part, options in self.parts.items():
            if part not in KINDS[method.kind]:
                raise ValueError(
                    f"'{part}' is no part of '{method.name}': the parts are {', '.join(KINDS[method.kind])}"
                )
            if not isinstance(options.get("name", ""), str):
                raise ValueError(f"'{part}.name' cannot be {options['name']!r}: it is the name of a {part}, or none")
        self._refuse_plan(method)
        if method.kind == "shrink":
            said = "sparsity" if self.sparsity is not None else "pattern" if self.pattern is not None else None
            if said is not None:
                raise ValueError(
                    f"{said} {getattr(self, said)} is for methods that zero single weights; '{method.name}' removes structures: "
                    "use --ratio"
                )
            if self.ratio is not None and self.sized:
                raise ValueError(
                    f"ratio {self.ratio} and budget '{self.parts['budget']['name']}' both say how much goes: leave out --ratio, or the "
                    "budget"
                )
        elif self.ratio is not None:
            raise ValueError(
                f"ratio {self.ratio} is for methods that remove structures; '{method.name}' zeroes single weights: "
                f"use --sparsity or --pattern, or one of the others ({_removing()})"
            )
        for name in SHAPES:
            if method.kind == "sparsify" and name in self.parts.get("budget", {}):
                raise ValueError(
                    f"'budget.{name}' is for methods that remove structures ({_removing()}); '{method.name}' zeroes single weights"
                )
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(f"sparsity {self.sparsity} and pattern {self.pattern} are both given: give one of them")
        _ = self.target
        return self

    def _refuse_plan(self, method: Method) -> None:
        """Raise `ValueError` where a plan is missing, or the method or a ratio says something else."""
        if method.planned and self.plan is None:
            raise ValueError(
                f"'{method.name}' is told what stays: give it a plan with --plan, like the prune_plan.json of an earlier run"
            )
        if self.plan is not None and not method.planned:
            raise ValueError(
                f"plan '{self.plan}' says what stays, and '{method.name}' would choose that itself: leave out the plan, or take "
                "--method planned, with a compensation if you like: planned+least-squares"
            )
        if self.plan is not None and self.ratio is not None:
            raise ValueError(f"ratio {self.ratio} and plan '{self.plan}' both say how much goes: leave out one of them")

    @property
    def removes(self) -> bool:
        """Whether structures are removed, and not weights zeroed."""
        return find_method(self.method).kind == "shrink"

    @property
    def sized(self) -> bool:
        """Whether numbers of units, or a plan, are given in the place of a ratio."""
        return self.plan is not None or (self.removes and self.parts.get("budget", {}).get("name") in GIVEN_BUDGETS)

    @property
    def asked(self) -> str:
        """How much was asked for, in a word: `0.5`, `2:4`, or `widths` or `plan` where those are given."""
        return "plan" if self.plan is not None else "widths" if self.sized else str(self.target)

    @property
    def target(self) -> Pattern:
        """The pattern asked for, half of the weights where nothing was said; of a method that removes structures the ratio, a fifth."""
        if self.removes:
            ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            if not 0 <= ratio < 1:
                raise ValueError(
                    f"ratio {ratio} is outside [0, 1): give the fraction of the block parameters to remove, like 0.2"
                )
            return Pattern.parse(ratio)
        if self.pattern is not None:
            return Pattern.parse(self.pattern)
        return Pattern.parse(0.5 if self.sparsity is None else self.sparsity)

    def command(self, out: str) -> str:
        """The command line that repeats this recipe."""
        words = ["prunekit", "prune", self.model, "--method", self.method]
        said = "--ratio" if self.removes else "--sparsity" if self.pattern is None else "--pattern"
        words += [] if self.sized else [said, str(self.target)]
        words += [] if self.plan is None else ["--plan", self.plan]
        calibration = self.calibration
        words += ["--calibration", calibration.source, "--samples", str(calibration.samples)]
        words += [] if calibration.length is None else ["--length", str(calibration.length)]
        words += ["--seed", str(self.seed), "--dtype", self.dtype, "--device", self.device]
        words += [] if self.revision is None else ["--revision", self.revision]
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        for name in ("sampling", "mode", "batch", "choices"):
            value = getattr(calibration, name)
            if value != Calibration.model_fields[name].default:
                words += ["--set", f"calibration.{name}={value}"]
        for part, options in self.parts.items():
            for name, value in options.items():
                if name == "overrides":
                    words += [f for glob, wanted in value.items() for f in ("--set", f"{part}.{name}.{glob}={wanted}")]
                else:
                    words += ["--set", f"{part}.{name}={_said(value)}"]
        return shlex.join([*words, "--out", out])

    def to_toml(self) -> str:
        """The recipe as a file for `--recipe`: what was said, without the defaults."""
        values = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        sections = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in sections]
        for name, section in _tables(sections):
            lines += ["", f"[{name}]", *(f"{_quoted(key)} = {_toml(value)}" for key, value in section.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def names(cls) -> list[str]:
        """The names a recipe has, those of `Calibration` with their section."""
        own = [name for name in cls.model_fields if name not in ("calibration", "parts")]
        return [*own, *(f"calibration.{name}" for name in Calibration.model_fields), "parts.PART.OPTION"]

    @classmethod
    def home(cls, name: str) -> str:
        """What to write in the place of a name that no recipe has at its top."""
        if name in Calibration.model_fields:
            return f"write it under calibration, like calibration.{name}"
        if name in SHAPES:
            return f"write it under parts, like parts.budget.{name}"
        return nearest(name, cls.names())

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The values of a `.toml`, `.yaml`, `.yml` or `.json` recipe file, not yet validated."""
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".toml":
                values = tomllib.loads(text)
            elif path.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML
                values = yaml.load(text, _Yaml)
            else:
                raise InputError(f"recipe '{path}' must end in .toml, .yaml, .yml or .json")
        except OSError as problem:
            raise InputError(f"recipe '{path}' cannot be read: {problem.strerror}") from None
        except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as problem:
            raise InputError(
                f"recipe '{path}' is not valid {path.suffix[1:]}: {' '.join(str(problem).split())}"
            ) from None
        if not isinstance(values, dict):
            raise InputError(f"recipe '{path}' must hold names and values, like `method = \"wanda\"`")
        return values


def _tables(sections: dict[str, Any], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Dotted names of nested sections, and what each holds besides further ones."""
    found = []
    for name, section in sections.items():
        inner = {key: value for key, value in section.items() if isinstance(value, dict)}
        plain = {key: value for key, value in section.items() if key not in inner}
        path = f"{prefix}{_quoted(name)}"
        found += ([(path, plain)] if plain else []) + _tables(inner, f"{path}.")
    return found


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # texts, numbers and truth are written alike in both


def _said(value: Any) -> str:
    """An option's value as `assign` reads it."""
    if isinstance(value, list):
        return ",".join(value) or "[]"
    return "null" if value is None else "''" if value == "" else str(value)


def refuse_choices(recipe: Recipe) -> None:
    """Raise `InputError` where several calibrations are asked for; called for methods that cannot compare them."""
    choices = recipe.calibration.choices
    if choices > 1:
        raise InputError(f"calibration.choices={choices} is for scores that read gradients: '{recipe.method}' has none")


def _removing() -> str:
    return ", ".join(name for name, method in METHODS.items() if method.kind == "shrink")


def assign(values: dict[str, Any], setting: str) -> None:
    """Lay one `part.option=value` of `--set` into unvalidated recipe `values`, in place.

    The value is read as YAML (`0.7`, `true`, `[a, b]`, plain text). What follows `budget.overrides.` is a glob and may hold dots.
    """
    key, separator, text = setting.partition("=")
    part, _, option = key.strip().partition(".")
    if not separator or not option:
        raise InputError(f"--set '{setting}' is not part.option=value, like calibration.sampling=first")
    try:
        # `*.o_proj` is plain text to a person, but an alias to YAML
        value = text if text.startswith("*") else yaml.load(text, _Yaml)
    except yaml.YAMLError:
        value = text
    path = [part] if part == "calibration" else ["parts", part]
    if part == "budget" and option.startswith("overrides."):
        path, option = [*path, "overrides"], option.removeprefix("overrides.")
    section = values
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise InputError(
                f"--set '{setting}' does not fit the recipe file, where '{name}' is {section!r}, not a section"
            )
    section[option] = value
