"""Where a walk takes its blocks from: a checkpoint folder, one block at a time, or a model that is already in memory.

Both give the same few calls, so that everything above them is written once:
`load_outer` / `free_outer` (embeddings, final norm, head), `prefetch(i)`, `load_block(i)` / `free_block(i)`.

An embedding and a head of a large vocabulary may be larger than a block. Of the embedding only the rows of the tokens at hand are
kept; the head is not read where nobody asks for logits, and is multiplied a few rows at a time where few tokens are asked for.

A checkpoint's model is built on the meta device from its config: parameters have shapes and no memory until they are read.
Non-persistent buffers (rotary frequencies, embedding scales) are in no checkpoint; they are made real and initialised the way
transformers' own `from_pretrained` does it.
"""

from __future__ import annotations

import inspect
import mmap
import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..bits import all_finite
from ..checkpoint.reader import Reader
from ..checkpoint.writer import refuse_unfinished
from ..errors import InputError
from ..machine import resolve_device, resolve_dtype
from . import resizing
from .anatomy import Anatomy, Linear, read_anatomy, tensors_of, tied_names
from .hidden import Scratch
from .resizing import REMOVED, SHAPES, SHORTCUTS, resize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# buffers that older releases stored and no model reads any more
_OBSOLETE = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")


# what is wanted of the output head: nothing, logits of a few tokens, or logits of many
Head = Literal["none", "chunked", "whole"]


class Source(Protocol):
    """What a walk needs of a model. `module` is the whole causal language model, its blocks loaded or not."""

    module: PreTrainedModel
    anatomy: Anatomy
    device: torch.device
    dtype: torch.dtype
    scratch: Scratch

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied head counts once."""

    def load_outer(self, ids: Tensor, head: Head = "none") -> None:
        """Make what lies outside the blocks usable for the tokens `ids` (of any shape) and no others."""

    def free_outer(self) -> None:
        """Give that memory back where it can be read again."""

    def prefetch(self, index: int) -> None:
        """Begin to read a block in the background, where there is one; `load_block` will take it."""

    def load_block(self, index: int) -> nn.Module:
        """Make a block usable and return it."""

    def stored_of(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear as they are stored, which scores see; its block is loaded."""

    def free_block(self, index: int) -> None:
        """Give a block's memory back where it can be read again."""


class ResidentModel:
    """A model that lies in memory as a whole; nothing is loaded or freed. `packed`: its weights may be, because nobody reads them."""

    def __init__(self, module: PreTrainedModel, *, packed: bool = False) -> None:
        self.module = module
        self.anatomy = read_anatomy(module, packed=packed)
        first = next(module.parameters())
        self.device = first.device
        self.dtype = first.dtype
        self.scratch = Scratch()

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def load_outer(self, ids: Tensor, head: Head = "none") -> None:
        """Nothing to do."""

    def free_outer(self) -> None:
        """Nothing to do."""

    def prefetch(self, index: int) -> None:
        """Nothing to do."""

    def stored_of(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """A linear's weight and bias."""
        return tensors_of(self.module.get_submodule(linear.full_name))

    def load_block(self, index: int) -> nn.Module:
        """The block as it is."""
        block: nn.Module = self.module.get_submodule(self.anatomy.blocks[index].name)
        return block

    def free_block(self, index: int) -> None:
        """Nothing to do."""


class StreamedModel:
    """A checkpoint's model whose parameters are in memory only between `load_*` and `free_*`.

    Attributes:
        stored: for the blocks loaded now, checkpoint tensor name -> tensor in its stored dtype. Pruning changes these in place,
            and the writer writes them, so that kept weights stay bit-identical whatever the dtype of the forward passes.
        key_of: parameter name -> the name it is stored under.
        scratch: where hidden states go that nobody resumes from; whoever opens the model may say so.
    """

    def __init__(
        self,
        reader: Reader,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        config: Any = None,
        skeleton: PreTrainedModel | None = None,
    ) -> None:
        self.reader = reader
        self.dtype = dtype
        self.device = device
        self.scratch = Scratch()
        if skeleton is None:
            skeleton = build_skeleton(reader, dtype, device, trust_remote_code=trust_remote_code, config=config)
        self.module = skeleton
        self.anatomy = read_anatomy(self.module)
        self._ties = tied_names(self.module)
        self._shapes = {
            name: tuple(tensor.shape)
            for name, tensor in [
                *self.module.named_parameters(remove_duplicate=False),
                *persistent_buffers(self.module),
            ]
        }
        self.key_of, self.leftover = self._match_names()
        self.stored: dict[int, dict[str, Tensor]] = {}
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunekit-read")

    @classmethod
    def open(cls, folder: Path, *, dtype: str, device: str, trust_remote_code: bool = False) -> StreamedModel:
        """A folder's model, dtype and device as the user names them (`auto`, ...). Raises `InputError`."""
        refuse_unfinished(folder)
        place = resolve_device(device)
        return cls(Reader(folder), resolve_dtype(dtype, place), place, trust_remote_code=trust_remote_code)

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def block_parameters(self, index: int) -> list[str]:
        """Names of the parameters and persistent buffers of a block."""
        prefix = self.anatomy.blocks[index].name + "."
        return [name for name in self._shapes if name.startswith(prefix)]

    def outer_parameters(self) -> list[str]:
        """Names of the parameters and persistent buffers outside the blocks."""
        prefix = self.anatomy.blocks_name + "."
        return [name for name in self._shapes if not name.startswith(prefix)]

    def stored_of(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear, whose block is loaded, as the checkpoint holds them."""
        tensors = self.stored[linear.index]
        bias = self.key_of.get(f"{linear.full_name}.bias")
        return tensors[self.key_of[f"{linear.full_name}.weight"]], None if bias is None else tensors[bias]

    def block_keys(self, index: int) -> list[str]:
        """Stored names of a block's tensors."""
        return [self.key_of[name] for name in self.block_parameters(index)]

    def outer_keys(self) -> list[str]:
        """Stored names of every tensor outside the blocks, those no model reads any more included."""
        return sorted(
            {self.key_of[name] for name in self.outer_parameters() if name in self.key_of} | set(self.leftover)
        )

    def outer_bytes(self, tokens: int) -> int:
        """Memory that `load_outer` takes for so many tokens without a head, every one of them another row at worst."""
        embedding, output = self._embedding_names(), self._head_names()
        total = 0
        for name in self.outer_parameters():
            shape = self._shapes[name]
            if name in embedding:
                rows, width = min(shape[0], tokens), shape[1] * self.dtype.itemsize
                pages = min(rows * -(-width // mmap.PAGESIZE) * mmap.PAGESIZE, shape[0] * width)
                total += pages if name in self.key_of else 0
            elif name in self.key_of and name not in output:
                total += torch.Size(shape).numel() * self.dtype.itemsize
        return total

    def load_outer(self, ids: Tensor, head: Head = "none") -> None:
        """Read what lies outside the blocks: of the embedding the rows of `ids`, of the head what `head` says."""
        self.free_outer()
        embedding = self._embedding_names()
        output = self._head_names()
        if head == "whole":
            embedding -= output  # tied: the whole of it is needed
        for name in self.outer_parameters():
            if name not in self.key_of:
                continue
            key = self.key_of[name]
            if name in embedding:
                self._place(name, self._rows(key, self._shapes[name], ids))
            elif name in output and head != "whole":
                if head == "chunked":
                    self._place_nothing(name)
            else:
                tensor = self.reader.read([key])[key]
                refuse_not_finite(tensor, key, "outside the blocks")
                self._place(name, tensor)
        if head == "chunked" and output:
            key = next(self.key_of[name] for name in output if name in self.key_of)
            linear = self.module.get_output_embeddings()
            linear.forward = _ChunkedHead(self.reader, key, linear)

    def free_outer(self) -> None:
        """Put everything outside the blocks back on the meta device."""
        head = self.module.get_output_embeddings()
        if head is not None:
            head.__dict__.pop("forward", None)
        self._free(self.outer_parameters())

    def _embedding_names(self) -> set[str]:
        """Names of the input embedding's weight, those tied to it included; none where it is no plain lookup."""
        module = self.module.get_input_embeddings()
        return self._names_of(module.weight) if isinstance(module, nn.Embedding) else set()

    def _head_names(self) -> set[str]:
        """Names of the head's weight, likewise; none where it is not one plain product."""
        module = self.module.get_output_embeddings()
        return self._names_of(module.weight) if type(module) is nn.Linear else set()

    def _names_of(self, wanted: Tensor) -> set[str]:
        named = self.module.named_parameters(remove_duplicate=False)
        return {alias for name, tensor in named if tensor is wanted for alias in self._ties.get(name, [name])}

    def _rows(self, key: str, shape: tuple[int, ...], ids: Tensor) -> Tensor:
        """A stored matrix of which only the rows `ids` are real; the others are memory nobody has touched, which takes no room."""
        used = torch.zeros(shape[0], dtype=torch.bool)
        used[ids.reshape(-1).cpu()] = True
        matrix = untouched(shape, self.dtype)
        for start, rows in self.reader.rows(key):
            refuse_not_finite(rows, key, "outside the blocks")
            mine = used[start : start + len(rows)].nonzero().flatten()
            matrix[start + mine] = rows[mine].to(self.dtype)
        return matrix

    def load_parameter(self, name: str, index: int) -> None:
        """Read one parameter or buffer of a block. Raises `InputError` where it is not finite."""
        key = self.key_of[name]
        tensor = self.reader.read([key])[key]
        refuse_not_finite(tensor, key, f"block {index}")
        self._place(name, tensor)

    def load_block(self, index: int, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """Read a block where it is not in memory yet, or take `tensors` (stored name -> tensor) for it, and return its module."""
        if tensors is not None or index not in self.stored:
            stored = self._taken(index) if tensors is None else tensors
            for name in self.block_parameters(index):
                refuse_not_finite(stored[self.key_of[name]], self.key_of[name], f"block {index}")
                self._place(name, stored[self.key_of[name]])
            self.stored[index] = stored
        block: nn.Module = self.module.get_submodule(self.anatomy.blocks[index].name)
        return block

    def prefetch(self, index: int) -> None:
        """Begin to read a block in the background; at most one is on its way at a time."""
        if index < len(self.anatomy.blocks) and index not in self.stored and index not in self._ahead:
            self._ahead.clear()
            self._ahead[index] = self._thread.submit(self._read_block, index)

    def _taken(self, index: int) -> dict[str, Tensor]:
        ahead = self._ahead.pop(index, None)
        return self._read_block(index) if ahead is None else ahead.result()

    def _read_block(self, index: int) -> dict[str, Tensor]:
        return self.reader.read(self.block_keys(index), pinned=self.device.type == "cuda")

    def free_block(self, index: int) -> None:
        """Put a block back on the meta device."""
        self.stored.pop(index, None)
        self._free(self.block_parameters(index))

    def _place(self, name: str, tensor: Tensor) -> None:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(self.device, non_blocking=tensor.is_pinned()).to(dtype)
        owner, leaf = self._owner(name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            self._set_parameter(name, nn.Parameter(value, requires_grad=False))

    def _place_nothing(self, name: str) -> None:
        """Give a parameter its device and dtype but no values, for code that asks it for those."""
        nothing = untouched(self._shapes[name], self.dtype).to(self.device)
        self._set_parameter(name, nn.Parameter(nothing, requires_grad=False))

    def _set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter under its name and under every name tied to it."""
        for alias in self._ties.get(name, [name]):
            owner, leaf = self._owner(alias)
            owner._parameters[leaf] = parameter

    def _free(self, names: list[str]) -> None:
        for name in names:
            owner, leaf = self._owner(name)
            home: dict[str, Any] = owner._buffers if leaf in owner._buffers else owner._parameters
            if home[leaf].device.type != "meta":
                empty = torch.empty_like(home[leaf], device="meta")
                if home is owner._buffers:
                    owner._buffers[leaf] = empty
                else:
                    self._set_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf

    def _match_names(self) -> tuple[dict[str, str], list[str]]:
        """Pair the model's parameters with stored tensors: name of the parameter -> stored name, and what is left over.

        Checkpoints keep names of older releases, or of the base model without its head; transformers knows how each is read.
        """
        entries = self.reader.entries
        transforms = get_model_conversion_mapping(self.module)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        prefix = self.module.base_model_prefix
        key_of: dict[str, str] = {}
        for key, entry in entries.items():
            name, converter = rename_source_key(key, renamings, converters, prefix, self._shapes)
            if converter is not None:
                raise InputError(
                    f"tensor '{key}' is stored in a form that is converted when {type(self.module).__name__} is loaded: "
                    "not supported yet; save the model again with transformers' save_pretrained"
                )
            if name not in self._shapes:
                continue
            if name in key_of:
                raise InputError(
                    f"tensors '{key_of[name]}' and '{key}' both stand for '{name}': the checkpoint is ambiguous"
                )
            if entry.shape != self._shapes[name]:
                raise InputError(
                    f"tensor '{key}' has shape {list(entry.shape)} in '{self.reader.folder}', but its config.json asks for "
                    f"{list(self._shapes[name])}: config and weights do not belong together"
                )
            key_of[name] = key
        supplied = {name for name, aliases in self._ties.items() if any(alias in key_of for alias in aliases)}
        missing = [name for name in self._shapes if name not in key_of and name not in supplied]
        if missing:
            raise InputError(
                f"'{self.reader.folder}' lacks {len(missing)} tensors its config.json asks for: {_some(missing)}"
            )
        ignored = [*(getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or []), _OBSOLETE]
        leftover = sorted(set(entries) - set(key_of.values()))
        unexpected = [key for key in leftover if not any(re.search(pattern, key) for pattern in ignored)]
        if unexpected:
            raise InputError(
                f"'{self.reader.folder}' holds {len(unexpected)} tensors that {type(self.module).__name__} does not know: "
                f"{_some(unexpected)}; they would be lost"
            )
        return key_of, leftover


class _ChunkedHead:
    """Stands in for a head's forward: the product with its stored weight, a few rows of it in memory at a time.

    Shapes: [..., hidden] -> [..., vocabulary].
    """

    def __init__(self, reader: Reader, key: str, linear: nn.Linear) -> None:
        self._reader = reader
        self._key = key
        self._linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        output = hidden.new_empty((*hidden.shape[:-1], self._linear.out_features))
        for start, rows in self._reader.rows(self._key):
            refuse_not_finite(rows, self._key, "outside the blocks")
            part = rows.to(hidden.device).to(hidden.dtype)
            output[..., start : start + len(part)] = nn.functional.linear(hidden, part)
        return output if self._linear.bias is None else output + self._linear.bias


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: pages of an anonymous map, not joined into huge ones."""
    size = max(1, torch.Size(shape).numel() * dtype.itemsize)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def build_skeleton(
    reader: Reader,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    noted: bool = True,
    config: Any = None,
) -> PreTrainedModel:
    """The folder's causal language model on the meta device, ready to be given parameters. Raises `InputError`.

    Where its config notes shapes that its class does not build, the model has those, or the class's own if not `noted`. `config` is
    another than the folder's, where the model is built of one.
    """
    folder = reader.folder
    shapes = reader.config.get(SHAPES)
    trust_remote_code = trust_remote_code and shapes is None  # the code in such a folder does what `resize` does here
    if config is None:
        config = load_config(folder, reader.config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about generation settings of the folder are not about us
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            if shapes is not None and noted:
                resize(model, shapes)
    except Exception as problem:  # whatever a wrong config makes a model's own code stumble over
        raise InputError(
            f"'{folder}/config.json' does not describe a causal language model: {_reason(problem)}"
        ) from None
    theirs = reader.config.get("architectures") or []
    if any(name.endswith("ForMaskedLM") for name in theirs) and type(model).__name__ not in theirs:
        raise InputError(
            f"'{folder}' holds a {theirs[0]}, which reads text both ways: prunekit prunes causal language models, "
            "which read it forwards"
        )
    model.requires_grad_(False)
    model.eval()
    make_buffers(model, device)
    return model


def make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make the buffers real that are in no checkpoint; the rest stays on the meta device. Raises `InputError`."""
    for name, buffer in model.named_buffers():
        owner_path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        if leaf in owner._non_persistent_buffers_set:
            unset = torch.nan if buffer.is_floating_point() else 0
            owner._buffers[leaf] = torch.full_like(buffer, unset, device=device)
    model.initialize_weights()  # fills those buffers; parameters are still on the meta device, where this costs nothing
    for name, buffer in model.named_buffers():
        if buffer.device.type != "meta" and not all_finite(buffer):
            raise InputError(
                f"{type(model).__name__} does not say how its buffer '{name}' is made without loading the whole model: "
                "not supported yet"
            )


def refuse_sliced(source: StreamedModel, advice: str) -> None:
    """Raise `InputError` for a model whose residual stream was sliced."""
    if SHORTCUTS in source.reader.config.get(SHAPES, {}):
        raise InputError(
            f"the residual stream of '{source.reader.folder}' was sliced, and shortcuts are in its blocks: {advice}"
        )


def refuse_left_out(source: StreamedModel, why: str) -> None:
    """Raise `InputError` for a model some of whose blocks have lost a sublayer."""
    if REMOVED in source.reader.config.get(SHAPES, {}):
        raise InputError(f"'{source.reader.folder}' has blocks without attention or perceptron, {why}")


def resizing_code(model: nn.Module) -> str:
    """The file that lies in a folder whose config notes shapes, for transformers without prunekit; `model` is of its class."""
    name = type(model).__name__
    return f"{inspect.getsource(resizing)}\n\nfrom transformers import {name} as _{name}\n\n{name} = resized(_{name})\n"


def load_config(folder: Path, raw: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """The folder's config object. Raises `InputError`, also where it needs code of the folder's own."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers raises a dozen kinds here, all of them about this file
        if "auto_map" in raw and SHAPES not in raw and not trust_remote_code:
            raise InputError(
                f"'{folder}' brings its own model code, which would run on this machine: read it, then say --trust-remote-code"
            ) from None
        raise InputError(f"'{folder}/config.json' is not a config transformers knows: {_reason(problem)}") from None


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of the buffers that checkpoints hold."""
    found = []
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(path)._non_persistent_buffers_set:
            found.append((name, buffer))
    return found


def refuse_not_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raise `InputError` where a tensor of a checkpoint holds NaN or infinite values."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"tensor '{name}' ({where}) holds {bad} NaN or infinite values: the checkpoint is damaged")


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split()[:40])}"
