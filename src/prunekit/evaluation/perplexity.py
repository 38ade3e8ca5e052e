"""Perplexity, streamed: blocks one at a time, the head in chunks of tokens.

Defined as the field does (Wanda, SparseGPT, GPTQ): the text tokenised once, cut into non-overlapping windows of `length`, the tail
dropped, mean negative log-likelihood of the `length − 1` predictions of every window, exponentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..model.hidden import HiddenStates
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
    with walked(walk, step) as hidden:
        found = perplexity_behind(walk, hidden)
    step()
    return found


@contextmanager
def walked(walk: Walk, step: Callable[[], None] = lambda: None) -> Iterator[HiddenStates]:
    """The hidden states behind the last block; `step` is called after each block."""
    walk.prepare()
    with walk.room() as hidden:
        walk.start(hidden)
        walk.run_all(step)
        yield hidden


@torch.inference_mode()
def perplexity_behind(walk: Walk, hidden: HiddenStates) -> tuple[float, int]:
    """The same from hidden states behind the last block, [windows, length, hidden]. Raises `InputError`."""
    losses = window_losses(walk, hidden)
    predictions = len(losses) * (walk.windows.length - 1)
    return perplexity_of(losses, predictions), predictions


def perplexity_of(losses: Tensor, predictions: int) -> float:
    """exp of the mean loss; infinite where float64 cannot hold it."""
    mean = float(losses.sum()) / predictions
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def window_losses(walk: Walk, hidden: HiddenStates) -> Tensor:
    """Sum of the negative log-likelihoods of each window, in float64: [windows]. Raises `InputError` where one is not finite."""
    (losses,) = losses_behind(walk, [hidden])
    _refuse_not_finite(losses, walk)
    return losses


@torch.inference_mode()
def losses_behind(walk: Walk, states: Sequence[HiddenStates]) -> list[Tensor]:
    """The same of several hidden states behind the last block, whatever the losses are; the head is read once."""
    walk.source.load_outer(walk.windows.ids, "whole")
    found = []
    for hidden in states:
        losses = torch.zeros(len(walk.windows), dtype=torch.float64)
        for number, chunk in _chunks(walk):
            losses[number] += negative_log_likelihood(*_predicted(walk, hidden, number, chunk))
        found.append(losses)
    walk.source.free_outer()
    return found


@dataclass(frozen=True)
class Paired:
    """Two models on the same windows, summed over the predictions of each window; all float64 [windows].

    Attributes:
        losses, before: negative log-likelihoods of the model and of the one it is held against.
        divergence: KL(before ‖ model) in nats.
        changed: predictions whose likeliest token is another one.
    """

    losses: Tensor
    before: Tensor
    divergence: Tensor
    changed: Tensor


@torch.inference_mode()
def paired_losses(walk: Walk, hidden: HiddenStates, base: Walk, before: HiddenStates) -> Paired:
    """A model next to the one it was made from, from the hidden states of both behind their last blocks.

    Both walks must be over the same windows. Raises `InputError` where the vocabularies differ or a loss is not finite.
    """
    windows = walk.windows
    walk.source.load_outer(windows.ids, "whole")
    base.source.load_outer(windows.ids, "whole")
    sums = torch.zeros(4, len(windows), dtype=torch.float64)
    for number, chunk in _chunks(walk):
        logits, targets = _predicted(walk, hidden, number, chunk)
        reference, _ = _predicted(base, before, number, chunk)
        if logits.shape != reference.shape:
            raise InputError(
                f"the models have {logits.shape[-1]} and {reference.shape[-1]} tokens: only models with the same vocabulary can be "
                "held against each other"
            )
        logits, reference = logits.float(), reference.to(logits.device).float()
        sums[0, number] += negative_log_likelihood(logits, targets)
        sums[1, number] += negative_log_likelihood(reference, targets)
        sums[3, number] += int((logits.argmax(-1) != reference.argmax(-1)).sum())
        logits, reference = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
        sums[2, number] += float(
            torch.nn.functional.kl_div(logits, reference, log_target=True, reduction="sum").double()
        )
    walk.source.free_outer()
    base.source.free_outer()
    _refuse_not_finite(sums[0], walk)
    _refuse_not_finite(sums[1], base)
    return Paired(*sums)


def _chunks(walk: Walk) -> Iterator[tuple[int, slice]]:
    """Number of a window and which of its predictions go through the head together."""
    size = chunk_tokens(walk.source.module.get_output_embeddings().weight.shape[0])
    for number in range(len(walk.windows)):
        for start in range(0, walk.windows.length - 1, size):
            yield number, slice(start, min(start + size, walk.windows.length - 1))


def _predicted(walk: Walk, hidden: HiddenStates, number: int, chunk: slice) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] behind some positions of a window, and the tokens [tokens] that really follow."""
    ids = walk.windows.ids[number]
    return walk.logits(hidden[number : number + 1][0, chunk], ids[chunk]), ids[chunk.start + 1 : chunk.stop + 1]


def _refuse_not_finite(losses: Tensor, walk: Walk) -> None:
    if not bool(losses.isfinite().all()):
        raise InputError(f"the model's logits are NaN or infinite in {walk.source.dtype}: try --dtype float32")
