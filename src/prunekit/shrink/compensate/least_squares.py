"""Kept columns refitted so that they give what all of them gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...normal import factor
from ...parts import Limits, compensate
from ...statistics import Statistics

_TRIED = (0.03, 0.1, 0.3, 1.0)


Target = Literal["own", "dense"]


def _reads(damping: float | str, target: Target) -> set[str]:
    whole = {"gram", "target"} if target == "dense" else {"gram"}
    return whole | {f"half_{name}" for name in whole} if damping == "auto" else whole


@compensate(
    needs={"gram", "half_gram", "target", "half_target"}, paper="https://arxiv.org/abs/2412.12441", reads=_reads
)
def least_squares(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    *,
    damping: Annotated[float, Limits(at_least=0)] | Literal["auto"] = "auto",
    target: Target = "own",
) -> tuple[Tensor, Tensor | None]:
    """V = W_K + W_P G_PK (G_KK + λI)⁻¹, which minimises ‖X Wᵀ − X_K Vᵀ‖² + λ‖V − W_K‖².

    The damping shrinks the update, not the weights: with nothing removed V is W, and the error on the calibration tokens is never above
    that of leaving columns out, whatever λ. λ is `damping` times the mean of G_KK's diagonal; where that is not enough, ten times more
    is tried in float64, with a warning. Papers take 0.01, which fits the calibration tokens too closely where they are not many times
    as many as the inputs. `auto` fits the first halves of the windows with 0.03 to 1 and takes what loses least on the second halves.

    With `target` dense, what is aimed at is not X Wᵀ but what the linear gives in the dense model, so that it also makes up for what
    was removed before it: V = W_K + (T_K − W_K G_KK)(G_KK + λI)⁻¹ with T = Σ y xᵀ. The dense model's hidden states go along: one more
    pass, and as many bytes again.

    Shapes: weight [out, in], keep [kept], gram and half_gram [in, in], target and half_target [out, in] -> [out, kept], None.
    Source: theorem 3 of Numerical Pruning (2024), and the fixed point of the reformation of Search for Efficient LLMs (2024); `auto`
    is ours.
    """
    if len(keep) == weight.shape[1]:
        return weight, None
    whole = _System.of(weight, keep, stats.gram, stats.target if target == "dense" else None)
    wanted = damping if not isinstance(damping, str) else _chosen(weight, keep, stats, target, whole)
    return weight[:, keep] + whole.update(wanted).to(weight), None


@dataclass(frozen=True)
class _System:
    """What refitting minimises over updates U: tr(U G_KK Uᵀ) − 2 tr(U Rᵀ), R = (T − W_K G_K)_K. Shapes: [kept, kept], [out, kept]."""

    gram: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, gram: Tensor, target: Tensor | None) -> _System:
        """With what a linear gives on the same tokens as target where no other is given."""
        rows = gram[keep].double()
        if target is None:
            gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            gone[keep] = False
            return cls(rows[:, keep], weight[:, gone].double() @ rows[:, gone].t())
        return cls(rows[:, keep], target[:, keep].double() - weight[:, keep].double() @ rows[:, keep])

    def update(self, damping: float) -> Tensor:
        """What is added to the kept columns, [out, kept] float64."""
        return torch.cholesky_solve(self.right.t(), factor(self.gram, damping, "compensate.damping")).t()

    def loss(self, update: Tensor) -> float:
        """How much the squared error changes with an update."""
        return float(((update @ self.gram - 2 * self.right) * update).sum())


def _chosen(weight: Tensor, keep: Tensor, stats: Statistics, target: Target, whole: _System) -> float:
    """The damping whose fit to the first halves of the windows loses least of the output on the second halves."""
    first = _System.of(weight, keep, stats.half_gram, stats.half_target if target == "dense" else None)
    second = _System(whole.gram - first.gram, whole.right - first.right)
    lost = {damping: second.loss(first.update(damping)) for damping in _TRIED}
    return min(lost, key=lost.__getitem__)
