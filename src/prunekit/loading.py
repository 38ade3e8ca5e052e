"""`load`: the transformers model of a folder, plain or packed, for the runtime that is asked for.

`dense` is transformers as it is. `sparse` keeps the weights of the blocks packed and multiplies them so, on a processor. `2:4` gives
2:4 weights on CUDA the form that sparse tensor cores multiply.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import machine
from .checkpoint.bitmask import packed_bytes
from .errors import InputError, PrunekitWarning, first_line, nearest
from .inspection import pattern_holds
from .model.anatomy import Block, Linear, read_anatomy
from .model.resizing import SHAPES, resized
from .model.source import StreamedModel, refuse_not_finite
from .progress import no_bar
from .recipe import Pattern
from .runtime.kernels import warn_without_library
from .runtime.linear import PackedLinear
from .runtime.packed import Packed, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
SPARSE = "sparse"
TWO_FOUR = "2:4"
RUNTIMES = (DENSE, SPARSE, TWO_FOUR)


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    runtime: str = DENSE,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A folder's model as transformers loads it, in eval mode.

    Args:
        folder: a model folder, plain or packed.
        dtype: of the weights in memory and of the computation, as for `prune`.
        device: where to.
        runtime: `dense`, `sparse` or `2:4`.
        trust_remote_code: passed on to transformers.

    Raises:
        InputError: the folder is no model, does not fit into memory, or is not for the runtime.
    """
    place = resolve_place(device, runtime)
    # everything that is wrong with a folder is refused here in a sentence; transformers would make up weights that are missing
    source = StreamedModel.open(folder, dtype=dtype, device=str(place), trust_remote_code=trust_remote_code)
    model = _packed_model(folder, source) if runtime == SPARSE else _dense_model(folder, source)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    machine.return_memory()
    if runtime == TWO_FOUR:
        compress_linears(model)
    assert isinstance(model, nn.Module)
    return model


def resolve_place(device: str, runtime: str) -> torch.device:
    """The device a runtime computes on. Raises `InputError` where it cannot compute on that."""
    if runtime not in RUNTIMES:
        raise InputError(f"runtime '{runtime}' is unknown: {nearest(runtime, RUNTIMES)}")
    if runtime == SPARSE and device == "auto":
        return torch.device("cpu")
    place = machine.resolve_device(device)
    if runtime == SPARSE and place.type != "cpu":
        raise InputError(f"runtime '{SPARSE}' is for processors, and the device is {place}: take --device cpu")
    if runtime == TWO_FOUR and place.type != "cuda":
        raise InputError(
            f"runtime '{TWO_FOUR}' is for the sparse tensor cores of NVIDIA GPUs, and the device is {place}: take another runtime"
        )
    return place


def _dense_model(folder: Path, source: StreamedModel) -> PreTrainedModel:
    _refuse_memory(f"'{folder}'", source.parameter_count * source.dtype.itemsize, source)
    kind, config, reader = type(source.module), source.module.config, source.reader
    tensors = reader.read(reader.entries)
    if SHAPES in reader.config:
        kind = resized(kind)
        # for a class it does not know, transformers does not look up names of older releases, which `save_pretrained` still writes
        tensors = {name: tensors[key] for name, key in source.key_of.items()}
    with no_bar():
        # plain folders too: transformers would map their files, whose pages the system may drop and read again while one measures
        model = kind.from_pretrained(None, config=config, dtype=source.dtype, state_dict=tensors)
    return model.to(source.device).eval()


def _packed_model(folder: Path, source: StreamedModel) -> PreTrainedModel:
    """The model with its blocks' weights packed; they are never dense together, only one after the other."""
    warn_without_library()
    model = source.module
    total = dense = 0
    for block in source.anatomy.blocks:
        dense += _pack_block(folder, source, block)
        total += len(block.linears)
        machine.return_memory()  # what packing took lies between what stays
    if dense == total:
        raise InputError(
            f"runtime '{SPARSE}' needs weights with zeros, and '{folder}' has so few that packed it would be larger: load it without"
        )
    if dense:
        warnings.warn(
            f"{dense} of {total} linears have so few zeros that packed they would be larger, and stay dense",
            PrunekitWarning,
            stacklevel=4,
        )
    source.load_outer(torch.arange(model.get_input_embeddings().weight.shape[0]), "whole")
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    model.save_pretrained = _refuse_saving
    return model


def _in_one_piece(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The head is fed a slice of the hidden states; to multiply that, torch copies a whole weight where it wants no gradients."""
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def _pack_block(folder: Path, source: StreamedModel, block: Block) -> int:
    """Read a block, its linears packed where that is smaller; returns how many stay dense."""
    weights = {f"{linear.full_name}.weight": linear for linear in block.linears}
    names = source.block_parameters(block.index)
    size = sum(source.reader.entries[source.key_of[name]].bytes for name in names)
    _refuse_memory(f"block {block.index} of '{folder}'", size, source)
    for name in names:
        if name not in weights:
            source.load_parameter(name, block.index)
    dense = 0
    for name, linear in weights.items():
        packed = _pack(source, source.key_of[name], linear)
        if packed is None:
            source.load_parameter(name, block.index)
            dense += 1
        else:
            bias = source.module.get_submodule(linear.full_name).bias
            source.module.set_submodule(linear.full_name, PackedLinear(packed, bias))
    return dense


def _pack(source: StreamedModel, key: str, linear: Linear) -> Packed | None:
    """A stored weight in the form the kernels take; None where that would be larger than the weight."""
    entry = source.reader.entries[key]
    stored = None if linear.transposed else source.reader.read_packed(key)
    if stored is not None:
        mask, values = stored
    else:
        mask, values = pack(linear.matrix(source.reader.read([key])[key]))
        if packed_bytes(linear.out_features, linear.in_features, len(values), entry.dtype.itemsize) >= entry.bytes:
            return None
    refuse_not_finite(values, key, f"block {linear.index}")
    # values of 16 bits serve a computation in float32 as they are: widened, they would only take more memory
    exact = source.dtype == torch.float32 and entry.dtype in (torch.float16, torch.bfloat16)
    return Packed.of_parts(mask, values if exact else values.to(source.dtype), linear.in_features, key)


def _refuse_saving(*_: object, **__: object) -> NoReturn:
    raise InputError(
        f"a model with runtime '{SPARSE}' is for computing: the folder it was loaded from is the model, and `prunekit export` "
        "writes it in other forms"
    )


def compress_linears(model: PreTrainedModel) -> int:
    """Put every 2:4 linear of the blocks into torch's semi-structured form, in place; returns how many there were.

    Linears that are not 2:4 stay dense, with a warning. Raises `InputError` where none is, or where torch cannot convert one.
    """
    linears = [(linear.full_name, model.get_submodule(linear.full_name)) for linear in read_anatomy(model).linears()]
    fitting = [(name, module) for name, module in linears if _is_two_four(module)]
    if not fitting:
        raise InputError(
            f"runtime '{TWO_FOUR}' needs weights with two zeros in every four inputs, and no linear of this model has them: "
            "prune it with --pattern 2:4, or take another runtime"
        )
    for name, module in fitting:
        module.weight = nn.Parameter(_semi_structured(name, module.weight), requires_grad=False)
    if len(fitting) < len(linears):
        warnings.warn(
            f"{len(linears) - len(fitting)} of {len(linears)} linears are not 2:4 and stay dense",
            PrunekitWarning,
            stacklevel=3,
        )
    return len(fitting)


def _is_two_four(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and pattern_holds(module.weight, Pattern.parse(TWO_FOUR), "row")


def _semi_structured(name: str, weight: Tensor) -> Tensor:
    try:
        return torch.sparse.to_sparse_semi_structured(weight.detach())
    except RuntimeError as problem:  # torch knows which devices, dtypes and shapes its kernels take
        raise InputError(
            f"'{TWO_FOUR}': torch cannot convert '{name}' ({weight.dtype}, {list(weight.shape)}): {first_line(problem)}; "
            "take another runtime"
        ) from None


def _refuse_memory(what: str, needed: int, source: StreamedModel) -> None:
    free = machine.available_memory_bytes()
    if source.device.type == "cpu" and needed > free:
        raise InputError(
            f"{what} takes {needed / 1e9:.2f} GB as {source.dtype} and {free / 1e9:.2f} GB are free: take a machine with more "
            "memory, or a dtype of fewer bytes"
        )
