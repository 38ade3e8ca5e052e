"""A constant in the place of what is gone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...parts import compensate
from ...statistics import Statistics


@compensate(needs={"input_sum"}, paper="https://arxiv.org/abs/2312.11983", shifts=True)
def bias(weight: Tensor, keep: Tensor, stats: Statistics) -> tuple[Tensor, Tensor | None]:
    """Kept columns stay as they are, and the mean of what the removed ones gave is added to the output.

    Shapes: weight [out, in], keep [kept] -> [out, kept], [out]. Exact where removed inputs are constant.
    Source: An et al. 2023 (FLAP), equation 6.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[keep] = False
    mean = stats.input_mean.to(weight)
    return weight[:, keep], weight[:, gone] @ mean[gone]
