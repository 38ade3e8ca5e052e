"""The loss of tokens and its gradient, a few tokens at a time: in float32 a large vocabulary's logits are larger than a block.

A token's loss is the cross-entropy to what follows, mixed with the divergence from the dense model's prediction:
(1 − share)·(−log p(target)) + share·KL(q ‖ p). Its gradient in the logits is p − ((1 − share)·[target] + share·q), so no graph over
the vocabulary is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation.perplexity import chunk_tokens


@torch.no_grad()
def loss_and_gradient(
    logits: Tensor, targets: Tensor, dense: Tensor | None = None, *, share: float = 0.0, scale: float = 1.0
) -> tuple[float, Tensor]:
    """Sum of the tokens' losses, and `scale` times its gradient in the logits.

    Args:
        logits: [tokens, vocabulary], in any float dtype.
        targets: [tokens], the tokens that follow.
        dense: logits of the dense model at the same positions; needed where `share` is not 0.
        share: what the divergence counts for.
        scale: multiplies the gradient, in float32.
    """
    gradient = torch.empty_like(logits)
    total = 0.0
    for start in range(0, len(logits), chunk_tokens(logits.shape[1])):
        part = slice(start, start + chunk_tokens(logits.shape[1]))
        likely = torch.log_softmax(logits[part].float(), -1)
        following = targets[part, None].to(logits.device)
        losses = likely.gather(1, following)[:, 0].mul_(share - 1)
        slope = likely.exp()
        slope.scatter_add_(1, following, torch.full_like(following, share - 1, dtype=slope.dtype))
        if dense is not None:
            wanted = torch.log_softmax(dense[part].float(), -1)
            divergence = torch.nn.functional.kl_div(likely, wanted, log_target=True, reduction="none").sum(-1)
            losses.add_(divergence, alpha=share)
            slope.sub_(wanted.exp_(), alpha=share)
        gradient[part] = slope.mul_(scale)
        total += float(losses.double().sum())
    return total, gradient
