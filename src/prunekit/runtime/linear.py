"""The linear module that stands in a model for one whose weight is packed, and the operators that torch.compile and export see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .kernels import linear, unpacked
from .packed import Packed, words_of


@torch.library.custom_op(
    "prunekit::linear",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor? bias) -> Tensor",
)
def packed_linear(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] times a packed weight, plus bias: [..., rows]. See `Packed` for the weight's tensors."""
    packed = Packed(mask, values, offsets, x.shape[-1])
    packed.check()
    return linear(packed, x, bias)


@packed_linear.register_fake
def _(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    if mask.shape[1] != 8 * words_of(x.shape[-1]):
        raise InputError(f"inputs {list(x.shape)} do not fit a packed weight whose mask is {list(mask.shape)}")
    return x.new_empty((*x.shape[:-1], offsets.shape[0] - 1))


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed weight; for computing, not for training.

    Shapes: [..., in_features] -> [..., out_features].
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features = packed.columns
        self.out_features = packed.rows
        self.register_buffer("mask", packed.mask)
        self.register_buffer("values", packed.values)
        self.register_buffer("offsets", packed.offsets)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> Packed:
        """The weight."""
        buffers: dict[str, Any] = (
            self._buffers
        )  # attribute by attribute takes a microsecond more, and a small product takes ten
        return Packed(buffers["mask"], buffers["values"], buffers["offsets"], self.in_features)

    def unpacked(self) -> Tensor:
        """The weight, dense: [out_features, in_features]."""
        return unpacked(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] times the weight, plus bias."""
        # the operator's way through torch's dispatcher takes longer than a small product
        if type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling():
            if x.requires_grad and torch.is_grad_enabled():
                raise InputError(
                    "packed weights have no gradients: load the model without runtime='sparse' to train it"
                )
            return linear(self.packed, x, self.bias)
        result: Tensor = packed_linear(x, self.mask, self.values, self.offsets, self.bias)
        return result

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
