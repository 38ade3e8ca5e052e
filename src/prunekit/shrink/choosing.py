"""How far plans move a model's predictions, without carrying any out; of calibrations, the one whose plan moves them least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..evaluation.perplexity import paired_losses
from ..model.source import Source
from ..model.stream import Windows
from .plan import Plan, Structures
from .trying import tried


@dataclass(frozen=True)
class Choice:
    """Which calibration was best: its seed, windows and plan, and the divergence of every seed's plan in nats per prediction."""

    seed: int
    windows: Windows
    plan: Plan
    divergences: dict[int, float]


def choose_calibration(
    source: Source,
    structures: Structures,
    seeds: Sequence[int],
    draw: Callable[[int], Windows],
    plan: Callable[[Windows], Plan],
    held_out: Windows,
    *,
    step: Callable[[], None] = lambda: None,
) -> Choice:
    """Of the calibrations `draw(seed)`, the one whose plan changes the predictions on `held_out` least; the first of equals.

    Source: NIRVANA (arXiv 2509.14230): the mean over tokens of KL(dense ‖ pruned) on text the calibration has not seen.
    Args:
        plan: what a calibration leads to: scores, budget and all.
        held_out: unpadded windows.
        step: called after every plan, and after every block of the one walk that evaluates them all.
    """
    drawn = [draw(seed) for seed in seeds]
    plans = []
    for windows in drawn:
        plans.append(plan(windows))
        step()
    found = divergences(source, structures, plans, held_out, step=step)
    best = min(range(len(plans)), key=found.__getitem__)
    return Choice(seeds[best], drawn[best], plans[best], dict(zip(seeds, found, strict=True)))


@torch.inference_mode()
def divergences(
    source: Source,
    structures: Structures,
    plans: Sequence[Plan],
    windows: Windows,
    *,
    step: Callable[[], None] = lambda: None,
) -> list[float]:
    """KL(dense ‖ pruned) of each plan, in nats, the mean over the predictions of unpadded windows: one walk for all plans.

    `step` is called after each block. Raises `InputError` where activations are not finite.
    """
    with tried(source, structures, [Plan.whole(structures), *plans], windows, step=step) as (walk, (dense, *pruned)):
        predictions = len(windows) * (windows.length - 1)
        return [float(paired_losses(walk, states, walk, dense).divergence.sum()) / predictions for states in pruned]
