"""Low-rank adapters by peft, and one of ours that leaves zeros zero.

A linear without zeros gets peft's own layer, W·x + s·B·A·x. Where W has zeros that would compute something no sparse weight can, so it
computes (W + s·BA∘[W ≠ 0])·x: what is trained is what is merged. The product has the size of W; it is made anew in the backward pass,
so that nothing of that size is kept between the two, and the mask is read off W itself. Only this module imports peft, and only a
recovery imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.anatomy import Linear
from .options import RecoveryOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"


def tuned_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, masked: bool) -> Tensor:
    """W + s·BA in float32, where `masked` with 0 wherever W is 0.

    Shapes: weight [out, in], a [rank, in] float32, b [out, rank] float32 -> [out, in].
    """
    found = torch.addmm(weight.float(), b, a, alpha=scale)
    return found.mul_(weight != 0) if masked else found


class _MaskedProduct(torch.autograd.Function):
    """x·(W + s·BA∘[W ≠ 0])ᵀ, with gradients for x, A and B. Shapes: x [..., in] -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The product, in the dtype of x."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return x @ tuned_weight(weight, a, b, scale, masked=True).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of x in its dtype, of A and B in float32."""
        x, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ tuned_weight(weight, a, b, ctx.scale, masked=True).to(x.dtype)
        of_weight = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).float().mul_(weight != 0).mul_(ctx.scale)
        return of_x, None, b.t() @ of_weight, of_weight @ a.t(), None


class MaskedLinear(LoraLinear):  # type: ignore[misc]  # peft is not typed
    """A peft layer of one adapter whose product is masked by its weight's zeros.

    Dropout leaves out inputs of the adapter, the same ones for all tokens of a pass: one draw per token would need a second product
    of the weight's size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] -> [..., out]."""
        base = self.get_base_layer()
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        kept = self.lora_dropout[ADAPTER](torch.ones_like(a[0]))
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        result: Tensor = _MaskedProduct.apply(x, weight, a * kept, b, self.scaling[ADAPTER])  # type: ignore[no-untyped-call]
        return result if base.bias is None else result + base.bias


@dataclass(frozen=True)
class Tuned:
    """A linear with its adapter. `masked` says that its zeros stay."""

    linear: Linear
    layer: LoraLinear
    masked: bool

    @torch.no_grad()
    def merged(self, stored: Tensor) -> Tensor:
        """The stored weight with the adapter in it, in the stored dtype and shape. Where it is masked, zeros are what they were."""
        weight = self.linear.matrix(stored)
        a, b = (part[ADAPTER].weight.detach().cpu() for part in (self.layer.lora_A, self.layer.lora_B))
        found = tuned_weight(weight, a, b, self.layer.scaling[ADAPTER], masked=self.masked).to(stored.dtype)
        if self.masked:
            kept = weight != 0
            limits = torch.finfo(stored.dtype)
            found.masked_fill_(
                kept & (found == 0), limits.tiny * limits.eps
            )  # the least there is; 0 would be another mask
            found = torch.where(kept, found, weight)  # a removed -0 stays one
        return self.linear.matrix(found).contiguous()

    def place(self, merged: Tensor) -> None:
        """Put a merged weight into the model."""
        self.layer.get_base_layer().weight.data.copy_(merged)


class Adapters:
    """A model with adapters on some of its linears, in train mode; `detach` takes them off again.

    Attributes:
        tuned: the linears, in the model's order.
    """

    def __init__(
        self, model: PreTrainedModel, linears: Sequence[Linear], masked: set[str], options: RecoveryOptions
    ) -> None:
        def layer_of(target: nn.Module, adapter: str, *, config: Any, target_name: str, **more: Any) -> Any:
            if target_name in masked:
                return MaskedLinear(target, adapter, config=config, target_name=target_name, **more)
            return None  # peft's own

        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=[linear.full_name for linear in linears],
            fan_in_fan_out=any(linear.transposed for linear in linears),
            task_type="CAUSAL_LM",
        )
        config._register_custom_module({nn.Linear: layer_of, Conv1D: layer_of})
        self._lora = LoraModel(model, config, ADAPTER)
        self.tuned = [
            Tuned(linear, model.get_submodule(linear.full_name), linear.full_name in masked) for linear in linears
        ]
        for tuned in self.tuned:
            tuned.layer.lora_A.float()  # peft makes them in the dtype of the weight, where small steps would be lost
            tuned.layer.lora_B.float()
        if options.checkpointing:
            model.activation_checkpointing_enable()
        model.train()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; float32."""
        return {name: tensor for name, tensor in self._lora.model.named_parameters() if tensor.requires_grad}

    def detach(self) -> PreTrainedModel:
        """The model without adapters, in eval mode, its weights as they are."""
        model: Any = self._lora.unload()
        return model.eval()
