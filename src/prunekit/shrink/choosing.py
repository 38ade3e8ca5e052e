"""How far plans move a model's predictions, without carrying any out; of calibrations, the one whose plan moves them least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..evaluation.perplexity import paired_losses
from ..model.source import Source
from ..model.stream import Windows
from ..search.history import History
from ..search.loop import Judge, fixed, search
from .plan import Plan, Structures
from .trying import tried


@dataclass(frozen=True)
class Choice:
    """Which calibration was best: its number and plan, and the divergence of every one's plan in nats per prediction."""

    number: int
    plan: Plan
    divergences: dict[int, float]

    @property
    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return {"chosen": self.number, "divergences": list(self.divergences.values())}


def choose_calibration(
    source: Source,
    structures: Structures,
    calibrations: Sequence[Windows],
    plan: Callable[[Windows], Plan],
    held_out: Windows,
    history: History,
    *,
    step: Callable[[], None] = lambda: None,
) -> Choice:
    """Of some calibrations, the one whose plan changes the predictions on `held_out` least; the first of equals.

    Source: NIRVANA (arXiv 2509.14230): the mean over tokens of KL(dense ‖ pruned) on text the calibration has not seen.
    Args:
        plan: what a calibration leads to: scores, budget and all.
        held_out: unpadded windows.
        history: keeps what each calibration's plan came to, so that none is measured twice.
        step: called after every calibration, and after every block of the walk that evaluates its plan.
    """
    plans: dict[int, Plan] = {}

    def planned(number: int) -> Plan:
        if number not in plans:
            plans[number] = plan(calibrations[number])
        return plans[number]

    def objective(candidates: Sequence[int], windows: slice) -> Iterator[list[float]]:
        for number in candidates:
            yield from divergences(source, structures, [planned(number)], held_out[windows], step=step)

    judge = Judge(objective, history, [len(held_out)])
    found = search(fixed(range(len(calibrations))), judge, lambda least: step())
    return Choice(found.best, planned(found.best), {number - 1: value for number, value in found.course})


def refuse_few_windows(choices: int, windows: int) -> None:
    """Raise `InputError` where so many calibrations, and a share to judge them by, cannot be made of so many windows."""
    if windows <= choices:
        raise InputError(
            f"calibration.choices={choices} shares out the windows, with a last share to judge by: {windows} are too few"
        )


@torch.inference_mode()
def divergences(
    source: Source,
    structures: Structures,
    plans: Sequence[Plan],
    windows: Windows,
    *,
    step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """KL(dense ‖ pruned) of each plan on each of some unpadded windows, in nats, the mean over predictions: one walk for all plans.

    `step` is called after each block. Raises `InputError` where activations are not finite.
    """
    with tried(source, structures, [Plan.whole(structures), *plans], windows, step=step) as (walk, (dense, *pruned)):
        found = [paired_losses(walk, states, walk, dense).divergence for states in pruned]
        return [(divergence / (windows.length - 1)).tolist() for divergence in found]
