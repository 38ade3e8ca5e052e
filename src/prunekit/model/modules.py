"""Modules that behave otherwise for the time being: in evaluation mode, with other tensors, with another `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .anatomy import Linear


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like for the time being; each module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def exchanged(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other parameters and buffers for the time being."""
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _set(module, tensors)
    try:
        yield
    finally:
        _set(module, before)


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for the time being. A `forward` of its own, as accelerate gives it one, comes back."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def hollow(module: nn.Module, linears: Iterable[Linear], answer: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let a block's linears return `answer(name, inputs)` for the time being, whatever their weights."""
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(answering(module.get_submodule(linear.name), partial(answer, linear.name)))
        yield


def _set(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for path, tensor in tensors.items():
        home, _, name = path.rpartition(".")
        setattr(module.get_submodule(home), name, tensor)
