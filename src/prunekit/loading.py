"""`load`: the transformers model of a folder, plain or packed; on CUDA with 2:4 weights in the form sparse tensor cores multiply."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import machine
from .errors import InputError, PrunekitWarning
from .inspection import pattern_holds
from .model.anatomy import read_anatomy
from .model.resizing import SHAPES, resized
from .model.source import StreamedModel
from .progress import no_bar
from .recipe import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TWO_FOUR = "2:4"


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    accelerate: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A folder's model as transformers loads it, in eval mode.

    Args:
        folder: a model folder, plain or packed.
        dtype: of the weights in memory and of the computation, as for `prune`.
        device: where to.
        accelerate: `"2:4"`, or nothing.
        trust_remote_code: passed on to transformers.

    Raises:
        InputError: the folder is no model, does not fit into memory, or cannot be accelerated as asked.
    """
    place = machine.resolve_device(device)
    _check_accelerate(accelerate, place)
    # everything that is wrong with a folder is refused here in a sentence; transformers would make up weights that are missing
    source = StreamedModel.open(folder, dtype=dtype, device=str(place), trust_remote_code=trust_remote_code)
    _refuse_memory(folder, source)
    kind, config, reader = type(source.module), source.module.config, source.reader
    if SHAPES in reader.config:
        kind = resized(kind)
    with no_bar():
        # plain folders too: transformers would map their files, whose pages the system may drop and read again while one measures
        model = kind.from_pretrained(None, config=config, dtype=source.dtype, state_dict=reader.read(reader.entries))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to(place).eval()
    machine.return_memory()
    if accelerate is not None:
        accelerate_linears(model)
    assert isinstance(model, nn.Module)
    return model


def accelerate_linears(model: PreTrainedModel) -> int:
    """Put every 2:4 linear of the blocks into torch's semi-structured form, in place; returns how many there were.

    Linears that are not 2:4 stay dense, with a warning. Raises `InputError` where none is, or where torch cannot convert one.
    """
    linears = [(linear.full_name, model.get_submodule(linear.full_name)) for linear in read_anatomy(model).linears()]
    fitting = [(name, module) for name, module in linears if _is_two_four(module)]
    if not fitting:
        raise InputError(
            f"accelerate='{TWO_FOUR}' needs weights with two zeros in every four inputs, and no linear of this model has them: "
            "prune it with --pattern 2:4, or load it without accelerate"
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


def _check_accelerate(accelerate: str | None, device: torch.device) -> None:
    if accelerate is None:
        return
    if accelerate != TWO_FOUR:
        raise InputError(f"accelerate '{accelerate}' is unknown: it is '{TWO_FOUR}' or nothing")
    if device.type != "cuda":
        raise InputError(
            f"accelerate='{TWO_FOUR}' is for the sparse tensor cores of NVIDIA GPUs, and the device is {device}: load without it"
        )


def _is_two_four(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and pattern_holds(module.weight, Pattern.parse(TWO_FOUR), "row")


def _semi_structured(name: str, weight: Tensor) -> Tensor:
    try:
        return torch.sparse.to_sparse_semi_structured(weight.detach())
    except RuntimeError as problem:  # torch knows which devices, dtypes and shapes its kernels take
        reason = str(problem).strip().splitlines()[0]
        raise InputError(
            f"accelerate='{TWO_FOUR}': torch cannot convert '{name}' ({weight.dtype}, {list(weight.shape)}): {reason}; load without it"
        ) from None


def _refuse_memory(folder: Path, source: StreamedModel) -> None:
    needed, free = source.parameter_count * source.dtype.itemsize, machine.available_memory_bytes()
    if source.device.type == "cpu" and needed > free:
        raise InputError(
            f"'{folder}' takes {needed / 1e9:.2f} GB as {source.dtype} and {free / 1e9:.2f} GB are free: take a machine with more "
            "memory, or a dtype of fewer bytes"
        )
