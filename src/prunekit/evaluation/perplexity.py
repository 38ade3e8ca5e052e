"""Perplexity, streamed: blocks one at a time, the head in chunks of tokens.

Defined as the field does (Wanda, SparseGPT, GPTQ): the text tokenised once, cut into non-overlapping windows of `length`, the tail
dropped, mean negative log-likelihood of the `length − 1` predictions of every window, exponentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..model.hidden import HiddenStates, room_for
from ..model.source import Source
from ..model.stream import Walk, Windows

_CHUNK_BYTES = 64 * 1024**2  # of float32 logits at a time, whatever the vocabulary


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens' logits are held at a time."""
    return max(1, _CHUNK_BYTES // (4 * vocabulary))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over tokens of −log p(target), in float64. Shapes: logits [tokens, vocabulary], targets [tokens]."""
    losses = torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return float(losses.double().sum())


@torch.inference_mode()
def perplexity(
    source: Source, windows: Windows, *, batch: int | None = None, step: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Perplexity of a model on windows, and the number of predictions it is the mean of.

    `step` is called after each block and once more after the head. Windows must not be padded.
    Raises `InputError` where activations are not finite.
    """
    if windows.keep is not None:
        raise InputError("perplexity is defined over whole windows: give windows without padding")
    walk = Walk(source, windows, batch)
    walk.prepare()
    with room_for(walk.shape, walk.dtype, source.device) as hidden:
        walk.start(hidden)
        walk.run_all(step)
        found = perplexity_behind(walk, hidden)
    step()
    return found


@torch.inference_mode()
def perplexity_behind(walk: Walk, hidden: HiddenStates) -> tuple[float, int]:
    """The same from hidden states behind the last block, [windows, length, hidden]. Raises `InputError`."""
    source = walk.source
    total, predictions = _through_the_head(walk, hidden)
    if not math.isfinite(total):
        raise InputError(f"the model's logits are NaN or infinite in {source.dtype}: try --dtype float32")
    mean = total / predictions
    return (math.exp(mean) if mean < 700 else math.inf), predictions


def _through_the_head(walk: Walk, states: HiddenStates) -> tuple[float, int]:
    """Sum of the negative log-likelihoods, and the number of predictions."""
    source, windows = walk.source, walk.windows
    source.load_outer(windows.ids, "whole")
    head = source.module.get_output_embeddings()
    size = chunk_tokens(head.weight.shape[0])
    total, predictions = 0.0, 0
    for number, ids in enumerate(windows.ids):
        hidden = states[number : number + 1][0]
        for start in range(0, windows.length - 1, size):
            end = min(start + size, windows.length - 1)
            logits = walk.logits(hidden[start:end], ids[start:end])
            total += negative_log_likelihood(logits, ids[start + 1 : end + 1])
            predictions += end - start
    source.free_outer()
    return total, predictions
