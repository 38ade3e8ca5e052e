"""A plan: which units of which blocks stay, by their numbers in the original model. Plain JSON, so that it can be read and repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .units import Structure

FORMAT = 1
_WITH_CHANNELS = 2  # which a release that knows of format 1 alone must not take for a plan that leaves the stream whole

Structures = Sequence[Sequence[Structure]]


@dataclass(frozen=True)
class Channels:
    """Channels of the residual stream: how many there are, and which of them stay, ascending."""

    count: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is kept of every block of the original model, in its order, and of the residual stream between them.

    `blocks[i]` says for each structure of block i (by its consumer's name, like `mlp.down_proj`) which units stay, ascending; it is
    None where the whole block goes. A structure that is not named stays whole; of one without units its sublayer goes. Where
    `hidden` is None the stream stays whole.
    """

    blocks: tuple[Mapping[str, tuple[int, ...]] | None, ...]
    hidden: Channels | None = None

    @classmethod
    def whole(cls, structures: Structures) -> Plan:
        """The plan that removes nothing."""
        return cls(tuple({each.name: tuple(range(each.count)) for each in block} for block in structures))

    @property
    def kept_blocks(self) -> list[int]:
        """Numbers of the blocks that stay."""
        return [index for index, block in enumerate(self.blocks) if block is not None]

    def kept(self, structure: Structure) -> Tensor:
        """The units of a structure that stay, ascending, [kept] int64; none where its block goes."""
        block = self.blocks[structure.block]
        if block is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor(block.get(structure.name, range(structure.count)), dtype=torch.int64)

    def leaves_out(self, structure: Structure) -> bool:
        """Whether a structure's sublayer goes and its block stays."""
        return self.blocks[structure.block] is not None and not len(self.kept(structure))

    def removed(self, structures: Structures, block_parameters: Sequence[int]) -> int:
        """How many parameters go with units and blocks, `block_parameters` being those of every block."""
        total = 0
        for block, parameters in zip(structures, block_parameters, strict=True):
            for structure in block:
                if self.leaves_out(structure):
                    assert structure.sublayer is not None
                    total += structure.sublayer.parameters
                elif self.blocks[structure.block] is not None:
                    total += structure.cost * (structure.count - len(self.kept(structure)))
            if block and self.blocks[block[0].block] is None:
                total += parameters
        return total

    def uniform(self, structures: Structures) -> bool:
        """Whether every block that stays keeps as many units of each structure."""
        counts = [
            {structure.name: len(self.kept(structure)) for structure in structures[index]} for index in self.kept_blocks
        ]
        return all(each == counts[0] for each in counts)

    def to_json(self, structures: Structures) -> dict[str, Any]:
        """The plan as plain data.

        `units` says of how many, and `parameters` what goes with each, so that it is not taken for another model's.
        """
        blocks = [
            None if kept is None else {each.name: self._entry(each) for each in block}
            for kept, block in zip(self.blocks, structures, strict=True)
        ]
        if self.hidden is None:
            return {"format": FORMAT, "blocks": blocks}
        hidden = {"channels": self.hidden.count, "kept": list(self.hidden.kept)}
        return {"format": _WITH_CHANNELS, "hidden": hidden, "blocks": blocks}

    def _entry(self, structure: Structure) -> dict[str, Any]:
        # beside channels that go a unit has fewer parameters than in the original
        cost = {} if self.hidden is not None else {"parameters": structure.cost}
        return {"units": structure.count, **cost, "kept": self.kept(structure).tolist()}

    @classmethod
    def from_json(cls, content: Any, structures: Structures) -> Plan:
        """A plan for the model whose `structures` these are. Raises `InputError` where it was made for another or is no plan."""
        blocks = content.get("blocks") if isinstance(content, dict) else None
        formats = (FORMAT, _WITH_CHANNELS)
        if (
            not isinstance(blocks, list)
            or content.get("format") not in formats
            or ("hidden" in content) != (content["format"] == _WITH_CHANNELS)
        ):
            raise InputError(
                f"this is no plan of prunekit: it must hold format {FORMAT} and a list of blocks, or format {_WITH_CHANNELS} and "
                "hidden channels besides"
            )
        if len(blocks) != len(structures):
            raise InputError(f"the plan is for a model of {len(blocks)} blocks, this one has {len(structures)}")
        found: list[Mapping[str, tuple[int, ...]] | None] = []
        for index, (entry, block) in enumerate(zip(blocks, structures, strict=True)):
            found.append(None if entry is None else _block(index, entry, block))
        if not any(block is not None for block in found):
            raise InputError("the plan keeps no block: nothing would be left of the model")
        return cls(tuple(found), _channels(content["hidden"]) if content["format"] == _WITH_CHANNELS else None)

    @classmethod
    def read(cls, path: Path, structures: Structures) -> Plan:
        """The plan in a file. Raises `InputError`."""
        content = read_content(path)
        try:
            return cls.from_json(content, structures)
        except InputError as problem:
            raise InputError(f"plan '{path}': {problem}") from None


def _channels(entry: Any) -> Channels:
    count = entry.get("channels") if isinstance(entry, dict) else None
    if type(count) is not int or not isinstance(entry.get("kept"), list) or not entry["kept"]:
        raise InputError("'hidden' must say how many channels there are, and list at least one that is kept")
    _refuse_unordered("hidden channels", entry["kept"], count)
    return Channels(count, tuple(entry["kept"]))


def _refuse_unordered(what: str, kept: list[Any], count: int) -> None:
    if not all(type(unit) is int and 0 <= unit < count for unit in kept) or sorted(set(kept)) != kept:
        raise InputError(f"{what}: what is kept must be ascending numbers below {count}, each once")


def read_content(path: Path) -> Any:
    """What a file holds that should be a plan. Raises `InputError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"plan '{path}' cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise InputError(f"plan '{path}' is not valid JSON: {problem}") from None


def _block(index: int, entry: Any, structures: Sequence[Structure]) -> dict[str, tuple[int, ...]]:
    known = {structure.name: structure for structure in structures}
    if not isinstance(entry, dict) or set(entry) - set(known):
        names = ", ".join(map(str, sorted(set(entry) - set(known)))) if isinstance(entry, dict) else repr(entry)
        raise InputError(f"block {index} has no structure {names}: it has {', '.join(sorted(known))}")
    found = {
        name: _kept(each, entry[name]) if name in entry else tuple(range(each.count)) for name, each in known.items()
    }
    if known and not any(found.values()):
        raise InputError(f"block {index} would be left empty: write null in its place, or keep at least one unit")
    return found


def _kept(structure: Structure, said: Any) -> tuple[int, ...]:
    where, count, cost = f"'{structure.name}' of block {structure.block}", structure.count, structure.cost
    kept = said.get("kept") if isinstance(said, dict) else None
    if not isinstance(kept, list):
        raise InputError(f'{where} is to be written like {{"units": {count}, "kept": [0]}}, with the units that stay')
    if said.get("units") != count:
        raise InputError(f"{where} has {count} units, the plan was made for {said.get('units')}")
    if said.get("parameters", cost) != cost:
        raise InputError(
            f"a unit of {where} has {cost:,} parameters, the plan was made for {said['parameters']}: it belongs to another model"
        )
    _refuse_unordered(where, kept, count)
    if not kept and structure.sublayer is None:
        raise InputError(f"{where} would be left empty: keep at least one unit")
    return tuple(kept)
