"""What a search of plans stands on: a dense model, texts that share no passage, and a place for what it has found so far.

Candidates are plans, or lead to one. They are tried as they are, without compensation, on windows that are in no calibration; the best
and the first one are at last compared on windows that no decision was made by.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blockwalk import block_parameters
from ..calibration.text import documents
from ..calibration.windows import check_vocabulary, token_hash, window_length
from ..checkpoint.writer import SEARCH_PREFIX
from ..errors import InputError
from ..model.source import Source
from ..model.stream import Windows
from ..progress import Silent, Step
from ..recipe import DEFAULT_LENGTH, Recipe
from ..search.history import History
from ..search.loop import Found, Judge, Proposals, rungs_of, search
from ..search.texts import windows_apart
from .budget import Scores, UnitBudget
from .plan import Plan, Structures
from .trying import plan_losses
from .view import Gradients

HISTORY_NAME = f"{SEARCH_PREFIX}history.jsonl"
STUDY_NAME = f"{SEARCH_PREFIX}study.log"
_TOGETHER = 8  # candidates that go through a block in turn; a kill costs what these had computed
_HIDDEN_BYTES = 512 * 1024**2  # of their hidden states


@dataclass(frozen=True)
class Texts:
    """Windows to judge candidates by, windows nobody looks at before the end, and whatever calibrations there are to choose from.

    None of the first two shares a passage with any other.
    """

    judged: Windows
    held_out: Windows
    pool: Mapping[str, Windows]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the tokens of each."""
        return {name: token_hash(windows) for name, windows in self.named.items()}

    @property
    def named(self) -> dict[str, Windows]:
        """All of them by name."""
        return {"judged": self.judged, "held_out": self.held_out, **self.pool}


@dataclass(frozen=True)
class Drawing:
    """What texts are drawn with. `calibration` are the windows of the recipe, `length` how long they are."""

    recipe: Recipe
    source: Source
    tokenizer: Any
    calibration: Windows

    @property
    def longest(self) -> int:
        """Tokens of the longest window the model knows positions for."""
        return longest_window(self.source)

    def texts(self, text: str, samples: int, length: int | None, pool: Mapping[str, Windows] | None = None) -> Texts:
        """Windows of `text`, or of the calibration text where it is empty. Raises `InputError`."""
        if samples < 1:
            raise InputError(f"search.samples={samples} is no number of windows: give 1 or more")
        pool = pool or {}
        if length is not None:
            window_length(self.source.module.config, length, Silent(), option="search.length")
        advice = "give another text with --set search.text=..., or fewer --set search.samples or --samples"
        cut: list[Windows] = []
        for what in ("what candidates are judged by", "what the best is checked on"):
            windows = windows_apart(
                documents(text or self.recipe.calibration.source, "calibration"),
                self.tokenizer,
                samples=samples,
                length=length or self.calibration.length,
                seed=self.recipe.seed,
                apart_from=[self.calibration, *pool.values(), *cut],
                what=what,
                advice=advice,
            )
            check_vocabulary(windows, self.source.module)
            cut.append(windows)
        return Texts(cut[0], cut[1], pool)


@dataclass(frozen=True)
class Answer:
    """What a search came to: a plan, and what the manifest says of the search."""

    plan: Plan
    summary: dict[str, Any]


@dataclass
class Ground:
    """What a search is given.

    Attributes:
        parameters: of every block.
        budget: what says how many units stay where the search does not.
        length: tokens of a calibration window.
        scores: gives the scores of all units of the dense model, by block and structure.
        gradients: gives the sums of gradients of the dense model on some windows, by block and linear.
        scratch: the folder for what has been found so far; None where nothing is kept.
        identity: what else must be equal for a history to be this search's.
        step: told of every candidate.
    """

    recipe: Recipe
    source: Source
    structures: Structures
    parameters: Sequence[int]
    budget: UnitBudget
    length: int
    texts: Texts
    scores: Callable[[], Scores]
    gradients: Callable[[Windows], list[dict[str, Gradients]]]
    scratch: Path | None
    identity: Mapping[str, Any]
    step: Step

    @property
    def longest(self) -> int:
        """Tokens of the longest window the model knows positions for."""
        return longest_window(self.source)

    @property
    def target(self) -> int:
        """How many parameters should go."""
        return round(self.recipe.target.fraction * sum(self.parameters))

    def path(self, name: str) -> Path | None:
        """Where something is kept until the run is done."""
        return None if self.scratch is None else self.scratch / name

    def run(
        self,
        proposals: Proposals,
        plan: Callable[[Any], Plan],
        *,
        first: int,
        share: float,
        least: int = 1,
        counts: Callable[[], Mapping[str, int]] = dict,
    ) -> Answer:
        """Try what is proposed, `plan` saying what a candidate leads to.

        All are tried on the `first` windows, a `share` of them on twice as many, and so on to all; 0 tries each on all.
        `counts` says at the end what the proposer has to tell.
        """
        begun = time.perf_counter()
        judged, held_out = self.texts.judged, self.texts.held_out
        history = History(self.path(HISTORY_NAME), {**self.identity, "texts": self.texts.hashes})

        def objective(candidates: Sequence[Any], windows: slice) -> Iterator[list[float]]:
            some = judged[windows]
            size = self._together(some)
            for start in range(0, len(candidates), size):
                plans = [plan(candidate) for candidate in candidates[start : start + size]]
                yield from plan_losses(self.source, self.structures, plans, some)

        judge = Judge(objective, history, rungs_of(len(judged), first), share=share, least=least)
        found = search(proposals, judge, lambda best: self.step(f"best {_perplexity(best):.2f}"))
        if found.best is None:
            raise InputError("no candidate of the search gave finite losses: try --dtype float32")
        best = plan(found.best)
        ends = [plan(found.first), best]
        losses = plan_losses(self.source, self.structures, ends, held_out)
        checked = [_plain(sum(each) / len(each)) for each in losses]
        return Answer(
            best,
            {
                **_summary(found, judge),
                **counts(),
                **self._texts(),
                "held_out": checked,
                "seconds": time.perf_counter() - begun,
            },
        )

    def _texts(self) -> dict[str, Any]:
        return {
            "windows": len(self.texts.judged),
            "length": self.texts.judged.length,
            "tokens_sha256": {name: self.texts.hashes[name] for name in ("judged", "held_out")},
        }

    def _together(self, windows: Windows) -> int:
        """How many candidates go through the blocks together on some windows."""
        width = int(self.source.module.config.get_text_config().hidden_size)
        size = windows.ids.numel() * width * self.source.dtype.itemsize
        return max(1, min(_TOGETHER, _HIDDEN_BYTES // size))


def longest_window(source: Source) -> int:
    """How many positions a model knows."""
    config = source.module.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH)


def trial_bytes(source: Source, samples: int, length: int) -> int:
    """Memory that trying candidates takes at most, from shapes: their hidden states, and the head, or two blocks."""
    width = int(source.module.config.get_text_config().hidden_size)
    hidden = samples * length * width * source.dtype.itemsize
    head = int(source.module.get_output_embeddings().weight.numel()) * source.dtype.itemsize
    return max(hidden, min(_TOGETHER * hidden, _HIDDEN_BYTES)) + max(
        head, 2 * max(block_parameters(source)) * source.dtype.itemsize
    )


def _summary(found: Found, judge: Judge) -> dict[str, Any]:
    """What the manifest says of a search; values are perplexities."""
    return {
        "best": _perplexity(found.value),
        "first": _plain(found.first_value),
        "candidate": found.best,
        "proposed": found.proposed,
        "measured": len(found.course),
        "given_up": judge.given_up,
        "known": judge.known,
        "windows_measured": judge.windows,
        "course": [[number, _perplexity(value)] for number, value in found.course],
    }


def _plain(loss: float) -> float | None:
    """A perplexity for JSON, which has no word for infinity."""
    value = _perplexity(loss)
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
