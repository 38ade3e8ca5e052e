"""Plans tried on windows: one walk through the dense model's blocks for all plans, and nothing is computed of what a plan removes.

A block in memory computes for each plan in turn with what is left of its tensors, which takes less than the whole of it would; a
block that goes is passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..evaluation.perplexity import losses_behind
from ..machine import return_memory
from ..model.anatomy import Block
from ..model.hidden import HiddenStates
from ..model.source import Source
from ..model.stream import Walk, Windows
from .masking import masked_inputs
from .plan import Plan, Structures
from .slicing import Slicer, cut


@contextmanager
def tried(
    source: Source,
    structures: Structures,
    plans: Sequence[Plan],
    windows: Windows,
    *,
    step: Callable[[], None] = lambda: None,
    strict: bool = True,
) -> Iterator[tuple[Walk, list[HiddenStates]]]:
    """The hidden states each plan leads to behind the last block, [windows, length, hidden], and the walk they come from.

    `step` is called behind each block. Where activations are not finite `strict` raises `InputError`; otherwise they are passed on.
    """
    walk = Walk(source, windows)
    walk.prepare()
    with ExitStack() as stack:
        found = [stack.enter_context(walk.room()) for _ in plans]
        walk.start(found[0])
        for states in found[1:]:
            for batch in walk.batches:
                states[batch] = found[0][batch]
            states.turn()
        send = walk.run_batch if strict else walk.replay
        for block in source.anatomy.blocks:
            module = source.load_block(block.index)
            source.prefetch(block.index + 1)
            for plan, states in zip(plans, found, strict=True):
                if plan.blocks[block.index] is None:
                    continue
                with reduced(source, module, block, structures, plan):
                    for position, batch in enumerate(walk.batches):
                        states[batch] = send(block.index, module, position, states[batch])
                states.turn()
            source.free_block(block.index)
            return_memory()
            step()
        yield walk, found


@contextmanager
def reduced(source: Source, module: nn.Module, block: Block, structures: Structures, plan: Plan) -> Iterator[None]:
    """Let a block compute with what a plan leaves of it; units that cannot be taken out have their outputs zeroed instead."""
    config = source.module.config.get_text_config()
    takes = [each for each in structures[block.index] if each.resizes != "never"]
    slicer = Slicer(takes, plan, {name: tuple(tensor.shape) for name, tensor in module.named_parameters()})
    with ExitStack() as stack:
        for each in structures[block.index]:
            if each.resizes == "never":
                stack.enter_context(masked_inputs(module, each, plan.kept(each)))
        if slicer.index:
            stack.enter_context(cut(module, config, takes, plan, slicer))
        yield


@torch.inference_mode()
def plan_losses(
    source: Source,
    structures: Structures,
    plans: Sequence[Plan],
    windows: Windows,
    *,
    step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Of each plan the mean negative log-likelihood of every window's predictions, in nats; infinite where it cannot be computed."""
    with tried(source, structures, plans, windows, step=step, strict=False) as (walk, found):
        losses = losses_behind(walk, found)
    means = torch.stack(losses) / (windows.length - 1)
    return torch.where(means.isfinite(), means, torch.inf).tolist()
