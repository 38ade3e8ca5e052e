"""A plan tried without changing a weight: removed units are zeroed on their way into the linear that consumes them.

That is where masking equals removing: a sliced linear only leaves out products with those zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.anatomy import Anatomy
from ..model.modules import answering
from ..model.stream import split_call
from .plan import Plan, Structures
from .units import Structure


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, structures: Structures, plan: Plan) -> Iterator[None]:
    """Let a model compute as if the plan had been carried out, generation with a cache included. No weight is touched.

    Raises `InputError` for a plan that leaves out channels of the residual stream.
    """
    if plan.hidden is not None:
        raise InputError(
            f"the plan keeps {len(plan.hidden.kept)} of {plan.hidden.count} channels of the residual stream, and zeros are not the "
            "same as none: norms take the mean over all that are there; write the folder and load it"
        )
    with ExitStack() as stack:
        for block, found, kept in zip(anatomy.blocks, structures, plan.blocks, strict=True):
            module = model.get_submodule(block.name)
            if kept is None:
                stack.enter_context(answering(module, partial(_pass_on, module.forward)))
                continue
            for structure in found:
                if plan.leaves_out(structure):
                    stack.enter_context(_silent(module.get_submodule(structure.name)))
                    continue
                stack.enter_context(masked_inputs(module, structure, plan.kept(structure)))
        yield


@contextmanager
def masked_inputs(module: nn.Module, structure: Structure, kept: Tensor) -> Iterator[None]:
    """Zero what a block's consumer is fed by all units of a structure but `kept` [units] int64."""
    if len(kept) == structure.count:
        yield
        return
    consumer = module.get_submodule(structure.name)
    mask = torch.zeros(structure.consumer.in_features, dtype=torch.bool)
    mask[structure.inputs(kept)] = True
    handle = consumer.register_forward_pre_hook(partial(_mask, {}, mask))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _silent(consumer: nn.Module) -> Iterator[None]:
    """Let a linear return zeros; its inputs are computed, so that a cache is filled."""
    handle = consumer.register_forward_hook(_zeros)
    try:
        yield
    finally:
        handle.remove()


def _zeros(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _mask(there: dict[torch.device, Tensor], mask: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    value = inputs[0]
    if value.device not in there:
        there[value.device] = mask.to(value.device)
    # not a product: what a removed unit computes may be infinite
    return (torch.where(there[value.device], value, 0), *inputs[1:])


def _pass_on(real: Any, *args: Any, **kwargs: Any) -> Any:
    hidden, _ = split_call(args, kwargs)
    # the block is run for the form of its output, and so that a cache has as many layers as it is asked for
    output = real(*args, **kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
