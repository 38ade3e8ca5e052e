"""Texts that share no passage: what candidates are made of, what they are judged by, and what nobody has looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..calibration.document import Document
from ..calibration.windows import tokenise
from ..errors import InputError
from ..model.stream import Windows

RUN = 48  # as many tokens in a row are a passage
_PLENTY = 4  # windows are drawn among so many times those that are asked for
_BASE = np.uint64(0x9E3779B97F4A7C15)


def passages(windows: Windows, run: int = RUN) -> NDArray[np.uint64]:
    """A hash of every `run` tokens in a row of every window: [windows, length − run + 1]."""
    ids = windows.ids.numpy().astype(np.uint64) + np.uint64(1)
    found = np.zeros((ids.shape[0], ids.shape[1] - run + 1), dtype=np.uint64)
    for place in range(run):  # a polynomial in the tokens, modulo 2⁶⁴
        found = found * _BASE + ids[:, place : place + found.shape[1]]
    return found


def sharing(windows: Windows, others: Sequence[Windows]) -> list[int]:
    """The windows that have a passage in common with any of the `others`."""
    run = min([RUN, windows.length, *(other.length for other in others)])
    if not others:
        return []
    known = np.unique(np.concatenate([passages(other, run).ravel() for other in others]))
    shared = np.isin(passages(windows, run), known).any(axis=1)
    return [int(number) for number in shared.nonzero()[0]]


def windows_apart(
    documents: Sequence[Document],
    tokenizer: object,
    *,
    samples: int,
    length: int,
    seed: int,
    apart_from: Sequence[Windows],
    what: str,
    advice: str,
) -> Windows:
    """`samples` windows of `length` tokens, none of which has a passage in common with any of `apart_from`.

    Documents come in an order drawn by `seed` and `what` the windows are for, are cut into windows that do not overlap, and windows
    are drawn among those. Raises `InputError`, with `advice`, where there are too few.
    """
    draw = random.Random(f"{seed} {what}")
    order = list(documents)
    draw.shuffle(order)
    needed = samples * length * _PLENTY + sum(other.ids.numel() for other in apart_from)
    stream = tokenise(order, tokenizer, needed)
    there = len(stream) // length
    windows = Windows(stream[: there * length].reshape(there, length))
    shared = set(sharing(windows, apart_from)) if there else set()
    free = [number for number in range(there) if number not in shared]
    if len(free) < samples:
        raise InputError(
            f"{what} takes {samples} windows of {length} tokens, and of the {there} the text has {len(free)} share no {RUN} tokens "
            f"in a row with the other texts: {advice}"
        )
    return Windows(windows.ids[sorted(draw.sample(free, samples))].clone())
