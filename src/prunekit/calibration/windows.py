"""Token windows: a text is tokenised once, document by document, and cut into pieces of equal length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..model.stream import Windows
from .text import Document

_PLENTY = 4  # random windows are drawn from so many times the tokens they need, or from all there are
_SEPARATOR = "\n\n"
_GROUP = 32  # documents tokenised in one call


def tokenise(documents: Iterable[Document], tokenizer: Any, enough: int | None = None) -> Tensor:
    """All documents as one stream of token ids, a blank line between them; stops once there are `enough`.

    Special tokens are added as the tokenizer does for any text, so a beginning-of-text token opens every document and windows cut
    from the middle have none.
    """
    stream: list[int] = []
    texts = (text for text in (document.read() for document in documents) if text.strip())
    waiting = next(texts, None)  # the last text has no separator behind it, so each waits for the next one
    while waiting is not None and (enough is None or len(stream) < enough):
        group: list[str] = []
        while waiting is not None and len(group) < _GROUP:
            following = next(texts, None)
            group.append(waiting if following is None else waiting + _SEPARATOR)
            waiting = following
        for ids in tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]:
            stream.extend(ids)
    return torch.tensor(stream, dtype=torch.long)


def calibration_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    sampling: Literal["random", "first"],
) -> Windows:
    """`samples` windows of `length` tokens.

    `random`: documents in an order drawn by `seed`, windows at positions drawn by `seed`. `first`: the first non-overlapping ones.
    Raises `InputError` where the text holds fewer than `samples` non-overlapping windows.
    """
    needed = samples * length
    if sampling == "first":
        stream = tokenise(documents, tokenizer, needed)
        _check_enough(stream, samples, length)
        return Windows(stream[:needed].reshape(samples, length).clone())
    draw = random.Random(seed)
    order = list(documents)
    draw.shuffle(order)
    stream = tokenise(order, tokenizer, needed * _PLENTY)
    _check_enough(stream, samples, length)
    starts = sorted(draw.sample(range(len(stream) - length + 1), samples))
    draw.shuffle(starts)
    return Windows(torch.stack([stream[start : start + length] for start in starts]))


def evaluation_windows(
    documents: Sequence[Document], tokenizer: Any, *, length: int, samples: int | None = None
) -> Windows:
    """The text in non-overlapping windows of `length` tokens, the tail dropped; the first `samples` of them, or all."""
    stream = tokenise(documents, tokenizer, None if samples is None else samples * length)
    _check_enough(stream, samples or 1, length)
    count = min(samples or len(stream), len(stream) // length)
    return Windows(stream[: count * length].reshape(count, length).clone())


def token_hash(windows: Windows) -> str:
    """sha256 of the window's token ids (int64, row by row) and, where there is one, of the mask."""
    digest = hashlib.sha256(windows.ids.contiguous().numpy().tobytes())
    if windows.keep is not None:
        digest.update(windows.keep.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_enough(stream: Tensor, samples: int, length: int) -> None:
    there = len(stream) // length
    if there == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, less than one window of {length}: give more text or a smaller --length"
        )
    if samples > there:
        raise InputError(
            f"{samples} windows of {length} tokens are asked for, but the text has {len(stream)} tokens, enough for {there}: "
            "give more text, fewer --samples or a smaller --length"
        )
