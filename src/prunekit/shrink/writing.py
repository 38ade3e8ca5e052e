"""A shrunk folder written from a plan alone: what stays is copied, nothing is measured and no weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.shard import Piece
from ..checkpoint.writer import Writer
from ..model.source import StreamedModel
from .narrowing import narrowed
from .plan import Plan, Structures
from .saving import Form, choose_form
from .slicing import Slicer


def outer_pieces(source: StreamedModel, form: Form) -> list[Piece]:
    """What lies outside the blocks and the model reads, as it is stored, under the names it is written under."""
    names = [name for name in source.outer_parameters() if name in source.key_of]
    return [replace(Piece.stored(source.key_of[name], source.reader), name=form.names[name]) for name in names]


def block_tensors(
    source: StreamedModel, slicer: Slicer, form: Form, index: int, stored: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A block's tensors as they are written: stored name in the shrunk model -> what is left, in its stored dtype.

    Args:
        source: the model before.
        slicer: of this block.
        form: how the model is saved; the biases that its class wants besides are among the result, as zeros.
        index: number of the block in the source model.
        stored: its tensors by the names they are stored under; read one by one where they are not given.
    """
    block = source.anatomy.blocks[index]
    found, dtypes = {}, {}
    for name in source.block_parameters(index):
        local, key = name.removeprefix(f"{block.name}."), source.key_of[name]
        if local in slicer.gone:
            continue
        tensor = source.reader.read([key])[key] if stored is None else stored[key]
        found[form.names[name]] = slicer(local, tensor)
        dtypes[form.names[name]] = tensor.dtype
    for name, shape in form.zeros.get(index, {}).items():
        found[name] = torch.zeros(shape, dtype=dtypes[f"{name.removesuffix('bias')}weight"])
    return found


def block_slicer(source: StreamedModel, structures: Structures, plan: Plan, index: int) -> Slicer:
    """What cuts the tensors of a block."""
    module = source.module.get_submodule(source.anatomy.blocks[index].name)
    return Slicer(structures[index], plan, {name: tuple(tensor.shape) for name, tensor in module.named_parameters()})


def write_shrunk(
    source: StreamedModel,
    structures: Structures,
    plan: Plan,
    out: Path,
    *,
    biases: Mapping[str, Tensor] | None = None,
) -> Form:
    """Write a whole folder, a block in memory at a time: weights, index, config, and what the source's folder brings.

    Args:
        source: the model before.
        structures: of its blocks.
        plan: what is kept.
        out: an existing folder.
        biases: name of a linear in the source model -> the bias [out] it gets.

    Raises:
        InputError: the model cannot be saved in that shape; nothing was written.
        StorageError: the disk refused.
    """
    biases = biases or {}
    if plan.hidden is not None:
        source = narrowed(source, plan.hidden)
    form = choose_form(source, structures, plan, biased=biases)
    writer = Writer(out, 1 + len(form.renamed))
    records = [writer.write_shard(0, outer_pieces(source, form))]
    for index, number in form.renamed.items():
        tensors = block_tensors(source, block_slicer(source, structures, plan, index), form, index)
        block = source.anatomy.blocks[index].name
        for name, bias in biases.items():
            if name.startswith(f"{block}."):
                tensors[form.names[f"{name}.bias"]] = bias
        records.append(writer.write_shard(number + 1, [Piece.of(name, tensor) for name, tensor in tensors.items()]))
    writer.write_index(records)
    writer.carry_over(source.reader.folder, with_code=False, written=form.texts)
    return form
