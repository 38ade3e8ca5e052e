"""A free folder filled up with zeros to one width, so that its class alone builds it.

What is added computes nothing: the rows that make a unit's values are zero, and so are the columns that would use them. Every unit
there is stays in its place, in the order it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint.packing import Sheet
from ..checkpoint.reader import Reader, bytes_of
from ..checkpoint.shard import Piece
from ..errors import InputError
from ..model.anatomy import read_anatomy
from ..model.resizing import SHAPES
from ..model.source import StreamedModel, build_skeleton, refuse_left_out, refuse_sliced
from .plan import Plan, Structures
from .saving import Form, FormChooser
from .slicing import Slicer
from .units import ATTENTION, MLP, find_structures


@dataclass(frozen=True)
class _Filled:
    """A stored tensor's bytes with zeros between: along each axis of `places`, how long it becomes and where what is there goes."""

    reader: Reader
    name: str
    places: dict[int, tuple[int, Tensor]]

    def __iter__(self) -> Iterator[memoryview]:
        tensor = self.reader.read([self.name])[self.name]
        for axis, (length, place) in self.places.items():
            wide = tensor.new_zeros([*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]])
            tensor = wide.index_copy_(axis, place, tensor)
        yield bytes_of(tensor)


def padded(source: StreamedModel) -> tuple[Form, list[Sheet]]:
    """How a free folder is written with blocks of one width: its form, and its files.

    The width is that of the widest block; where a class cannot have fewer heads, or no other width at all, it is the one the class
    has by itself. Raises `InputError` where the folder has one width already, or biases that its class has no place for.
    """
    reader = source.reader
    refuse_sliced(source, "no stock class has a place for them, however wide")
    if SHAPES not in reader.config:
        raise InputError(
            f"'{reader.folder}' has no blocks of different widths: transformers loads it as it is, without --pad"
        )
    refuse_left_out(source, "which no width makes stock: load it with prunekit.load or trust_remote_code=True")
    base = build_skeleton(reader, source.dtype, source.device, noted=False)
    anatomy = read_anatomy(base)
    structures = find_structures(base, anatomy)
    inputs = {linear.full_name: linear.in_features for linear in source.anatomy.linears()}
    there = Plan(
        tuple(
            {each.name: tuple(range(inputs[each.consumer.full_name] // each.size)) for each in block}
            for block in structures
        )
    )
    own = dict(base.named_parameters())
    biased = [name.removesuffix(".bias") for name in reader.config[SHAPES]["tensors"] if name not in own]
    for kinds in ((ATTENTION, MLP), (MLP,), ()):
        plan = _widest(structures, there, kinds)
        chooser = FormChooser(base, anatomy, reader.config, source.key_of, structures, plan, biased=biased)
        form = chooser.stock()
        if form is not None:
            return form, _sheets(source, base, structures, there, plan, form)
    raise InputError(
        f"'{reader.folder}' cannot be padded: its linears have biases, like '{biased[0]}.bias', for which {type(base).__name__} has no "
        "place; shrink again without a compensation that adds them"
    )


def _widest(structures: Structures, there: Plan, kinds: Collection[str]) -> Plan:
    """The plan that keeps of every structure of some kinds as many units as any block has, and all units of the others."""
    widest: dict[str, int] = {}
    for each in (each for block in structures for each in block):
        widest[each.name] = max(widest.get(each.name, 0), len(there.kept(each)))
    return Plan(
        tuple(
            {each.name: tuple(range(widest[each.name] if each.kind in kinds else each.count)) for each in block}
            for block in structures
        )
    )


def _sheets(
    source: StreamedModel, base: nn.Module, structures: Structures, there: Plan, plan: Plan, form: Form
) -> list[Sheet]:
    """The source's files with their tensors filled up; biases that the class wants besides lie with the weights of their linears."""
    reader = source.reader
    pieces = {name: Piece.stored(name, reader) for name in reader.entries}
    files = {name: entry.file for name, entry in reader.entries.items()}
    for block in source.anatomy.blocks:
        shapes = {name: tuple(part.shape) for name, part in base.get_submodule(block.name).named_parameters()}
        narrow, wide = (Slicer(structures[block.index], kept, shapes) for kept in (there, plan))
        for name, axes in narrow.index.items():
            key = source.key_of[f"{block.name}.{name}"]
            kept = {axis: wide.index.get(name, {}).get(axis, torch.arange(shapes[name][axis])) for axis in axes}
            places = {axis: (len(kept[axis]), torch.searchsorted(kept[axis], axes[axis])) for axis in axes}
            dtype = reader.entries[key].dtype
            pieces[key] = Piece(key, wide.shape(name, shapes[name]), dtype, _Filled(reader, key, places))
        for key, shape in form.zeros.get(block.index, {}).items():
            weight = reader.entries[f"{key.removesuffix('bias')}weight"]
            pieces[key] = Piece.of(key, torch.zeros(shape, dtype=weight.dtype))
            files[key] = weight.file
    by_file = [sorted(name for name in pieces if files[name] == file) for file in reader.files]
    return [Sheet(names, [pieces[name] for name in names], {}) for names in by_file]
