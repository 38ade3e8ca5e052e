"""How far plans move a model's predictions, without carrying any out; of calibrations, the one whose plan moves them least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..evaluation.perplexity import paired_losses
from ..machine import return_memory
from ..model.hidden import room_for
from ..model.source import Source
from ..model.stream import Walk, Windows
from .masking import masked_inputs
from .plan import Plan, Structures


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
    """KL(dense ‖ masked) of each plan, in nats, the mean over the predictions of unpadded windows: one walk for all plans.

    `step` is called after each block. Raises `InputError` where activations are not finite.
    """
    walk = Walk(source, windows)
    walk.prepare()
    with ExitStack() as stack:
        dense = stack.enter_context(room_for(walk.shape, walk.dtype, source.device))
        pruned = [stack.enter_context(room_for(walk.shape, walk.dtype, source.device)) for _ in plans]
        walk.start(dense)
        for states in pruned:
            for batch in walk.batches:
                states[batch] = dense[batch]
            states.turn()
        for block in source.anatomy.blocks:
            module = source.load_block(block.index)
            source.prefetch(block.index + 1)
            for plan, states in zip(plans, pruned, strict=True):
                if plan.blocks[block.index] is None:
                    continue
                with ExitStack() as masks:
                    for structure in structures[block.index]:
                        masks.enter_context(masked_inputs(module, structure, plan.kept(structure)))
                    for position, batch in enumerate(walk.batches):
                        states[batch] = walk.run_batch(block.index, module, position, states[batch])
                states.turn()
            walk.run(block.index, module)
            source.free_block(block.index)
            return_memory()
            step()
        predictions = len(windows) * (windows.length - 1)
        return [float(paired_losses(walk, states, walk, dense).divergence.sum()) / predictions for states in pruned]
