"""What a folder really holds: zeros counted from the stored weights, not taken from what the manifest says."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bits import count_zeros
from .checkpoint.manifest import changed_files, read_manifest
from .checkpoint.reader import Reader
from .checkpoint.writer import refuse_unfinished
from .errors import InputError
from .model.anatomy import Linear
from .model.source import StreamedModel
from .recipe import Pattern


@dataclass(frozen=True)
class LinearZeros:
    """Zeros of one linear. `holds` says whether the pattern it was pruned to is there; None where none is recorded."""

    name: str
    shape: tuple[int, int]
    weights: int
    zeros: int
    pattern: str | None
    holds: bool | None


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Attributes:
        manifest: `prunekit.json`, or None for a folder prunekit did not write.
        linears: one entry per block linear, in the model's order.
        changed: files whose sha256 is not the recorded one.
    """

    folder: Path
    manifest: dict[str, Any] | None
    linears: list[LinearZeros]
    changed: list[str]
    parameters: int

    @property
    def zeros(self) -> int:
        """Zeros of all block linears."""
        return sum(linear.zeros for linear in self.linears)

    @property
    def weights(self) -> int:
        """Weights of all block linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def removed(self) -> int:
        """How many parameters fewer the model has than before structures were removed; 0 where none were, or nothing says so."""
        before = (
            0 if self.manifest is None or not self.manifest["run"]["removed"] else self.manifest["run"]["parameters"]
        )
        return max(0, int(before) - self.parameters)

    @property
    def broken(self) -> list[str]:
        """Linears that do not have the pattern they were pruned to."""
        return [linear.name for linear in self.linears if linear.holds is False]

    @property
    def sound(self) -> bool:
        """Whether every recorded pattern and hash is right."""
        return not self.broken and not self.changed

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {
            "folder": str(self.folder),
            "recipe": None if self.manifest is None else self.manifest["recipe"],
            "sparsity": self.zeros / self.weights,
            "weights": self.weights,
            "zeros": self.zeros,
            "parameters": self.parameters,
            "removed": self.removed,
            "sound": self.sound,
            "broken": self.broken,
            "changed": self.changed,
            "linears": [asdict(linear) for linear in self.linears],
        }


def inspect_folder(folder: Path) -> Inspection:
    """Count zeros and check patterns and hashes, a block in memory at a time. Raises `InputError`."""
    manifest = read_manifest(folder)
    refuse_unfinished(folder)
    source = _opened(folder, manifest)
    recorded = {line["name"]: line["pattern"] for line in manifest["linears"]} if manifest else {}
    group = _group(manifest)
    linears = []
    for block in source.anatomy.blocks:
        keys = {linear.name: source.key_of[f"{linear.full_name}.weight"] for linear in block.linears}
        tensors = source.reader.read(keys.values())
        for linear in block.linears:
            weight = linear.matrix(tensors[keys[linear.name]])
            pattern = recorded.get(linear.full_name)
            linears.append(_count(linear, weight, pattern, group))
    changed = changed_files(folder, manifest) if manifest else []
    return Inspection(folder, manifest, linears, changed, source.parameter_count)


def _opened(folder: Path, manifest: dict[str, Any] | None) -> StreamedModel:
    """The model; code that the folder brings is run if the manifest says that it was allowed to."""
    trusted = bool(manifest and manifest["recipe"]["trust_remote_code"])
    return StreamedModel(Reader(folder), torch.float32, torch.device("cpu"), trust_remote_code=trusted)


def read_weight(folder: Path, name: str) -> Tensor:
    """The stored weight [out, in] of the block linear called `name`, with or without `.weight`. Raises `InputError`."""
    source = _opened(folder, read_manifest(folder))
    linears = {linear.full_name: linear for linear in source.anatomy.linears()}
    wanted = name.removesuffix(".weight")
    if wanted not in linears:
        close = difflib.get_close_matches(wanted, linears, n=1, cutoff=0.0)  # a model has hundreds: the nearest will do
        raise InputError(f"'{folder}' has no linear '{name}' in its blocks: did you mean '{close[0]}'?")
    key = source.key_of[f"{wanted}.weight"]
    return linears[wanted].matrix(source.reader.read([key])[key])


def pattern_holds(weight: Tensor, pattern: Pattern, group: str) -> bool:
    """Whether a weight [out, in] has at least the zeros a pattern asks for, in every row, group, or the layer."""
    rows, columns = weight.shape
    zero = weight == 0
    if pattern.group is not None and pattern.keep is not None:
        if columns % pattern.group:
            return False
        return bool((zero.reshape(rows, -1, pattern.group).sum(-1) >= pattern.group - pattern.keep).all())
    if group == "row":
        return bool((zero.sum(1) >= pattern.zeros(columns)).all())
    return int(zero.sum()) >= pattern.zeros(rows * columns)


def _count(linear: Linear, weight: Tensor, pattern: str | None, group: str) -> LinearZeros:
    holds = None if pattern is None else pattern_holds(weight, Pattern.parse(pattern), group)
    shape = (linear.out_features, linear.in_features)
    return LinearZeros(linear.full_name, shape, linear.count, count_zeros(weight), pattern, holds)


def _group(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "row"
    return str(
        manifest["recipe"]["parts"].get("pattern", {"group": "row"})["group"]
    )  # no pattern where structures went
