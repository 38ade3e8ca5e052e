"""A model in memory becomes the smaller one: its own modules are given what is left, and nothing else of them changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.anatomy import Anatomy
from ..model.resizing import SHAPES, Removed
from .saving import Form


def install(model: PreTrainedModel, anatomy: Anatomy, form: Form, tensors: Mapping[str, Tensor]) -> None:
    """Make a model in memory what a form says, in place. Whatever can fail has failed before.

    Args:
        model: the whole model.
        anatomy: of it.
        form: of the smaller model, made of this model's config.
        tensors: name in the smaller model -> value, of every parameter of its blocks that is not as it was.
    """
    with torch.inference_mode(False):
        values = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in tensors.items()}
        _drop_blocks(model.get_submodule(anatomy.blocks_name), form)
        _adopt_sizes(model, anatomy, form)
        for name, value in values.items():
            _place(model, name, value)
        _adopt_config(model, form)


def _drop_blocks(blocks: nn.Module, form: Form) -> None:
    stay = {str(new): blocks.get_submodule(str(old)) for old, new in form.renamed.items()}
    blocks._modules.clear()
    blocks._modules.update(stay)


def _adopt_sizes(model: PreTrainedModel, anatomy: Anatomy, form: Form) -> None:
    """Stubs for what is gone, classes, and whole numbers that modules keep: of features, of heads, of their place in the model."""
    twin = form.kind != type(model).__name__
    for name, built in form.built.named_modules():
        module: Any = model.get_submodule(name)
        if isinstance(built, Removed) and not isinstance(module, Removed):
            model.set_submodule(name, copy.deepcopy(built).train(module.training))
            continue
        if twin and type(module) is not type(built):
            module.__class__ = type(built)
        if name.startswith(f"{anatomy.blocks_name}.") or isinstance(built, PreTrainedModel):
            numbers = {key: value for key, value in vars(built).items() if type(value) is int and key[0] != "_"}
            vars(module).update(numbers)


def _place(model: PreTrainedModel, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    before = owner._parameters.get(leaf)
    like = owner.get_parameter("weight") if before is None else before  # of a bias that the linear did not have
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=like.requires_grad))


def _adopt_config(model: PreTrainedModel, form: Form) -> None:
    """A config of the model's own, with what the old one says of how to compute."""
    old, new = model.config, copy.deepcopy(form.built.config)
    renewed = {id(old): new, id(old.get_text_config()): new.get_text_config()}
    for before in (old, old.get_text_config()):
        own = {name: value for name, value in vars(before).items() if name.startswith("_")}
        vars(renewed[id(before)]).update(own)
    if not form.stock:
        setattr(new, SHAPES, form.config[SHAPES])
    for module in model.modules():
        vars(module).update({name: renewed[id(value)] for name, value in vars(module).items() if id(value) in renewed})
