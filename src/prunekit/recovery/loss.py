"""The loss of tokens and its gradient, a few tokens at a time: in float32 a large vocabulary's logits are larger than a block.

A token's loss is the cross-entropy to what follows, mixed with the divergence from the dense model's prediction:
(1 − share)·(−log p(target)) + share·KL(q ‖ p). Its gradient in the logits is p − ((1 − share)·[target] + share·q), so no graph over
the vocabulary is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..evaluation.perplexity import chunk_tokens, negative_log_likelihood


@torch.no_grad()
def loss_and_gradient(
    logits: Tensor, ids: Tensor, dense: Tensor | None = None, *, share: float = 0.0, scale: float = 1.0
) -> tuple[float, Tensor]:
    """Sum of the losses of all predictions, and `scale` times its gradient in the logits.

    Args:
        logits: [windows, length, vocabulary], in any float dtype; those of a window's last position predict nothing.
        ids: [windows, length], the tokens.
        dense: logits of the dense model, of the same shape; needed where `share` is not 0.
        share: what the divergence counts for.
        scale: multiplies the gradient, in float32.
    """
    gradient = torch.zeros_like(logits)
    total = 0.0
    for window, part in _parts(logits):
        likely = torch.log_softmax(logits[window, part].float(), -1)
        following = ids[window, part.start + 1 : part.stop + 1, None]
        losses = likely.gather(1, following)[:, 0].mul_(share - 1)
        slope = likely.exp()
        slope.scatter_add_(1, following, torch.full_like(following, share - 1, dtype=slope.dtype))
        if dense is not None:
            wanted = torch.log_softmax(dense[window, part].float(), -1)
            divergence = torch.nn.functional.kl_div(likely, wanted, log_target=True, reduction="none").sum(-1)
            losses.add_(divergence, alpha=share)
            slope.sub_(wanted.exp_(), alpha=share)
        gradient[window, part] = slope.mul_(scale)
        total += float(losses.double().sum())
    return total, gradient


def cross_entropy(logits: Tensor, ids: Tensor) -> float:
    """Sum of −log p over all predictions. Shapes as above."""
    return sum(
        negative_log_likelihood(logits[window, part], ids[window, part.start + 1 : part.stop + 1])
        for window, part in _parts(logits)
    )


def _parts(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Number of a window and which of its predictions are looked at together."""
    windows, length, vocabulary = logits.shape
    size = chunk_tokens(vocabulary)
    for window in range(windows):
        for start in range(0, length - 1, size):
            yield window, slice(start, min(start + size, length - 1))
