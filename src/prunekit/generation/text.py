"""Tokens become text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder puts where bytes are no character, or not yet one.
_UNFINISHED = "\ufffd"
# Tokens of the prompt that are decoded along: a word's first token has its space only behind another token.
_CONTEXT = 6


class Detokenizer:
    """The text of tokens that come one by one.

    A token may end within a character, and a decoder may write a token differently behind another one. So the last tokens are decoded
    once without the new ones and once with them; the difference is new text as soon as it ends with a whole character.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._read = len(self._ids)  # text is out up to here

    def push(self, token: int) -> str:
        """What a token adds; nothing while it ends within a character."""
        self._ids.append(token)
        new = self.flush()
        if not new or new.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return new

    def flush(self) -> str:
        """What is held back, with a mark where bytes are no character."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of all text so far that no later text can make part of a stop string, less what was passed on before."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        kept = max((self._begun(stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return passed

    def flush(self) -> str:
        """What was held back: the text has ended, and it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """Characters at the end of what is held with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((length for length in range(longest, 0, -1) if self._held.endswith(stop[:length])), 0)
