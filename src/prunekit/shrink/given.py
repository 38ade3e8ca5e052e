"""A plan that is given: the file an earlier run has left, or one written by hand, for the model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.anatomy import Anatomy
from .plan import Plan, Structures, read_content
from .sublayers import find_sublayers
from .units import find_structures


def given_plan(model: Any, anatomy: Anatomy, given: Path | Mapping[str, Any]) -> tuple[Plan, Structures]:
    """A plan, and the structures of the model's blocks it is about.

    Args:
        model: a causal language model, which may lie on the meta device.
        anatomy: its blocks.
        given: a JSON file, or what one holds.

    Raises:
        InputError: it cannot be read, is no plan, or is the plan of another model.
    """
    content = read_content(given) if isinstance(given, Path) else given
    structures: Structures = find_structures(model, anatomy)
    if _names_sublayers(content, structures):
        structures = find_sublayers(model, anatomy, structures)
    if isinstance(given, Path):
        return Plan.read(given, structures), structures
    return Plan.from_json(content, structures), structures


def _names_sublayers(content: Any, structures: Structures) -> bool:
    """Whether a plan leaves out a sublayer, or names one that has no units of its own."""
    blocks = content.get("blocks") if isinstance(content, Mapping) else None
    if not isinstance(blocks, list) or len(blocks) != len(structures):
        return False
    for entry, block in zip(blocks, structures, strict=True):
        known = {each.name: each.count for each in block}
        for name, said in entry.items() if isinstance(entry, dict) else ():
            if isinstance(said, dict) and (said.get("kept") == [] or (name not in known and said.get("units") == 1)):
                return True
    return False
