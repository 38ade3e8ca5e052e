"""A model that lies in memory, read a block at a time as if it were a folder, for walks that change shapes.

They work on copies: until a walk is over, the model is as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bits import row_chunks
from ..checkpoint.reader import Entry, Reader
from ..errors import InputError
from . import resizing
from .source import StreamedModel, persistent_buffers

_NAME = "the model in memory"


class MemoryReader(Reader):
    """Reads copies of a model's own tensors, by the names of its parameters; there is no folder."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.folder = Path(_NAME)
        self.config = json.loads(model.config.to_json_string())
        self.files = []
        self.tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self.tensors |= {name: tensor.detach() for name, tensor in persistent_buffers(model)}
        nowhere = next((name for name, tensor in self.tensors.items() if tensor.is_meta), None)
        if nowhere is not None:
            raise InputError(f"'{nowhere}' of {_NAME} has no values (it is on the meta device): load all of the model")
        self.entries = {name: Entry("", tuple(tensor.shape), tensor.dtype, 0) for name, tensor in self.tensors.items()}

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Copies of the named tensors, on the device they are on; none has to be `pinned`."""
        return {name: self.tensors[name].clone() for name in names}

    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor a few rows at a time: (first row, [rows, ...])."""
        tensor = self.tensors[name]
        for part in row_chunks(len(tensor), tensor[0].numel()):
            yield part.start, tensor[part].cpu()

    def unchanged(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is what the model has under a name."""
        own = self.tensors.get(name)
        return own is not None and own.shape == tensor.shape and torch.equal(own, tensor)


class MemoryModel(StreamedModel):
    """A copy of a model in memory, its blocks there between `load_block` and `free_block`, all else only while it is needed."""

    reader: MemoryReader

    def __init__(self, model: PreTrainedModel) -> None:
        first = next(model.parameters())
        skeleton: Any = bare_copy(model)
        if (
            type(model).__module__ == resizing.__name__
        ):  # loaded from a folder whose config notes shapes, which it has now
            skeleton.__class__ = type(model).__bases__[0]
        super().__init__(MemoryReader(model), first.dtype, first.device, skeleton=skeleton.eval())

    def _match_names(self) -> tuple[dict[str, str], list[str]]:
        """Everything is stored under the parameter's own name."""
        return {name: name for name in self.reader.entries}, []


def bare_copy(module: nn.Module) -> Any:
    """A copy of a module with none of its weights: its parameters are on the meta device."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False) for tensor in module.parameters()
    }
    return copy.deepcopy(module, memo)
