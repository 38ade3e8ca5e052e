"""Kept columns refitted so that they give what all of them gave."""

from __future__ import annotations

import warnings
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...errors import InputError, PrunekitWarning
from ...parts import Limits, compensate
from ...statistics import Statistics

_RETRIES = 3


_TRIED = (0.03, 0.1, 0.3, 1.0)


def _reads(damping: float | str) -> set[str]:
    return {"gram", "half_gram"} if damping == "auto" else {"gram"}


@compensate(needs={"gram", "half_gram"}, paper="https://arxiv.org/abs/2412.12441", reads=_reads)
def least_squares(
    weight: Tensor,
    keep: Tensor,
    stats: Statistics,
    *,
    damping: Annotated[float, Limits(at_least=0)] | Literal["auto"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """V = W_K + W_P G_PK (G_KK + λI)⁻¹, which minimises ‖X Wᵀ − X_K Vᵀ‖² + λ‖V − W_K‖².

    The damping shrinks the update, not the weights: with nothing removed V is W, and the error on the calibration tokens is never above
    that of leaving columns out, whatever λ. λ is `damping` times the mean of G_KK's diagonal; where that is not enough, ten times more
    is tried in float64, with a warning. Papers take 0.01, which fits the calibration tokens too closely where they are not many times
    as many as the inputs. `auto` fits the first halves of the windows with 0.03 to 1 and takes what loses least on the second halves.

    Shapes: weight [out, in], keep [kept], stats.gram and stats.half_gram [in, in] -> [out, kept], None.
    Source: theorem 3 of Numerical Pruning (2024), and the fixed point of the reformation of Search for Efficient LLMs (2024); `auto`
    is ours.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[keep] = False
    if not bool(gone.any()):
        return weight, None
    wanted = damping if not isinstance(damping, str) else _chosen(weight, keep, gone, stats)
    update = _update(weight, keep, gone, stats.gram, wanted)
    return weight[:, keep] + update.to(weight), None


def _update(weight: Tensor, keep: Tensor, gone: Tensor, gram: Tensor, damping: float) -> Tensor:
    """What refitting adds to the kept columns, [out, kept] float64."""
    rows = gram[keep].double()
    return _solved(rows[:, keep], rows[:, gone] @ weight[:, gone].double().t(), damping).t()


def _chosen(weight: Tensor, keep: Tensor, gone: Tensor, stats: Statistics) -> float:
    """The damping whose fit to the first halves of the windows loses least of the output on the second halves."""
    first = stats.half_gram
    second = (stats.gram.double() - first.double()).to(weight)
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    lost = {}
    for damping in _TRIED:
        change[:, keep] = _update(weight, keep, gone, first, damping).to(weight)
        lost[damping] = float(((change @ second) * change).sum(dtype=torch.float64))
    return min(lost, key=lost.__getitem__)


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """(G + λI)⁻¹ R. Shapes: gram [kept, kept], right [kept, out]."""
    mean = float(gram.diagonal().mean())
    tried = damping
    for attempt in range(_RETRIES + 1):
        matrix = gram.clone()
        diagonal = matrix.diagonal()
        dead = diagonal == 0
        diagonal += tried * mean
        diagonal[dead] += 1.0
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            if attempt:
                warnings.warn(
                    f"gram matrix of kept inputs is not positive definite with damping {damping:g}: took {tried:g}",
                    PrunekitWarning,
                    stacklevel=2,
                )
            return torch.cholesky_solve(right, lower)
        tried = tried * 10 if tried > 0 else 1e-4
    raise InputError(
        "the gram matrix of a linear's kept inputs is not positive definite: its inputs hold NaN or huge values; try --dtype float32, "
        f"or more damping than --set compensate.damping={damping:g}"
    )
