"""What all values that a person writes have in common: unknown names are errors, and what is wrong is told in one sentence."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError, nearest

if TYPE_CHECKING:
    from typing_extensions import Self


class Section(BaseModel):
    """Named values, checked and then fixed; `holder` is what a message calls the whole that they are written in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    holder: ClassVar[str]

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Validate `values`. Raises `InputError` with the first thing that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as problem:
            raise InputError(cls._first_sentence(problem)) from None

    @classmethod
    def home(cls, name: str) -> str:
        """What to write in the place of a name that is unknown here."""
        return nearest(name, cls.model_fields)

    @classmethod
    def _first_sentence(cls, problem: ValidationError) -> str:
        error = problem.errors()[0]
        where = ".".join(str(step) for step in error["loc"])
        if error["type"] == "value_error":
            return str(error["ctx"]["error"]) if "ctx" in error else str(error["msg"])
        if error["type"] == "extra_forbidden":
            section: type[Section] = cls
            for step in error["loc"][:-1]:
                if isinstance(step, str):  # a number is a place in a list of sections
                    section = _held(section.model_fields[step].annotation)
            home = section.home(str(error["loc"][-1]))
            return f"'{where}' is not a name {cls.holder} has at that place: {home}"
        if error["type"] == "missing":
            return f"'{where}' is missing: name it on the command line or in the recipe file"
        value = json.dumps(error["input"], default=str)
        return f"{where} cannot be {value}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _held(annotation: Any) -> type[Section]:
    """The section that a field holds, which it may also leave out."""
    return next(
        kind
        for kind in (annotation, *typing.get_args(annotation))
        if isinstance(kind, type) and issubclass(kind, Section)
    )
