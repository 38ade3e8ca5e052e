"""A transformers model whose tensors have the shapes that its config notes as `prunekit_shapes`: blocks of different widths.

prunekit writes this file, and two lines behind it that name the model's class, into folders that no stock config describes:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then loads them without prunekit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SHAPES = "prunekit_shapes"


def resized(kind: Any) -> Any:
    """The transformers class `kind`, under its own name, with the shapes that the config of each model notes."""

    class Resized(kind):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            resize(self, getattr(config, SHAPES))

    Resized.__name__ = Resized.__qualname__ = kind.__name__
    return Resized


def resize(model: nn.Module, shapes: dict[str, dict[str, Any]]) -> None:
    """Give a model other shapes, in place.

    Args:
        model: as its class builds it; the meta device will do.
        shapes: `tensors`, name -> shape of every parameter that is to be smaller, or of a linear's bias that is to be there; and
            `attributes`, name -> value of what a module keeps beside its tensors and must fit them, like its number of heads.
    """
    for name, shape in shapes["tensors"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        before = getattr(module, leaf)
        if before is None:
            value = module.get_parameter("weight").new_zeros(shape)
        else:
            value = before.detach()[tuple(slice(size) for size in shape)].clone()
        module.register_parameter(leaf, nn.Parameter(value))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = shape
        elif hasattr(module, "nf") and leaf == "weight":  # GPT-2's own kind of linear
            module.nx, module.nf = shape
    for name, value in shapes["attributes"].items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)
