"""How wide a sliced residual stream is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from ..parts import Limits, width

_Whole = Annotated[int, Limits(at_least=1)]


@dataclass(frozen=True)
class Stream:
    """What a width part is asked.

    Attributes:
        channels: how many the stream has.
        ratio: what was asked for.
        parameters: of the blocks as they are.
        left: how many parameters the blocks have behind a stream of so many channels, shortcuts included.
    """

    channels: int
    ratio: Fraction
    parameters: int
    left: Callable[[int], int]


@width()
def parameters(stream: Stream, *, align: _Whole = 8) -> int:
    """As many channels, a multiple of `align`, as leave the ratio of the block parameters out, shortcuts counted with what stays.

    0 where there is none.
    """
    sizes = range(align, stream.channels + 1, align)
    fitting = bisect_right(sizes, int((1 - stream.ratio) * stream.parameters), key=stream.left)
    return sizes[fitting - 1] if fitting else 0


@width(paper="https://arxiv.org/abs/2401.15024")
def channels(stream: Stream, *, align: _Whole = 8) -> int:
    """The ratio is of the channels, as in the paper: ⌊(1 − ratio) · channels⌋, rounded down to a multiple of `align`.

    Of the block parameters it takes less, because of the shortcuts; of a small model nothing at all.
    """
    return int((1 - stream.ratio) * stream.channels) // align * align
