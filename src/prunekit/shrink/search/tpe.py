"""AdaPruner: which text LLM-Pruner's importance is measured on, and how it is computed, searched for together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from ...calibration.text import documents
from ...calibration.windows import calibration_windows, check_vocabulary, window_length
from ...errors import InputError, nearest
from ...parts import Limits, search
from ...progress import Silent
from ...search.tpe import open_study, require_optuna
from ...search.tpe import tpe as proposals_of
from ..budget import normalised, plan_of
from ..plan import Plan, Structures
from ..scores.taylor import taylor, taylor_reads
from ..searching import STUDY_NAME, Answer, Drawing, Ground, Texts
from ..units import Structure
from ..view import BlockView, Gradients

if TYPE_CHECKING:
    import optuna

_ORDERS = ("first", "second", "mix")
_GRANULARITIES = ("element", "vector")
_REDUCTIONS = ("sum", "mean", "max", "prod", "first", "last")
_BLENDED = {
    "first": {"order": "first", "granularity": "element"},
    "second": {"order": "second", "granularity": "element"},
    "vector": {"order": "first", "granularity": "vector"},
}
_Count = Annotated[int, Limits(at_least=1)]


@dataclass(frozen=True)
class Space:
    """What is chosen among, an entry a gene; one that has one entry is settled."""

    sources: tuple[str, ...]
    lengths: tuple[int, ...]
    subsets: int
    counts: tuple[int, ...]
    order: tuple[str, ...]
    granularity: tuple[str, ...]
    reduction: tuple[str, ...]
    blend: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], source: str, length: int, longest: int) -> Space:
        """The space that options describe; `longest` is the model's longest window. Raises `InputError` for what is in none."""
        named = {
            name: _words(name, options[name], known)
            for name, known in (("order", _ORDERS), ("granularity", _GRANULARITIES), ("reduction", _REDUCTIONS))
        }
        counts = _numbers("counts", options["counts"])
        if max(counts) > options["subsets"]:
            raise InputError(
                f"search.counts={options['counts']} joins up to {max(counts)} subsets of the calibration, and search.subsets is "
                f"{options['subsets']}: give no more"
            )
        sources = _listed(options["sources"]) if options["sources"] else (source,)
        if not all(sources):
            raise InputError(
                f"search.sources={options['sources']} names a text that is empty: write it like builtin,my-text.jsonl"
            )
        lengths = _doubled(length, longest) if options["lengths"] == "" else _numbers("lengths", options["lengths"])
        return cls(sources, lengths, options["subsets"], counts, **named, blend=options["blend"])

    def drawn(self, trial: optuna.Trial) -> dict[str, Any]:
        """A point of it."""

        def choose(name: str, among: Sequence[Any]) -> Any:
            return among[0] if len(among) == 1 else trial.suggest_categorical(name, list(among))

        point = {
            "source": choose("source", self.sources),
            "length": choose("length", self.lengths),
            "subset": choose("subset", range(self.subsets)),
            "count": choose("count", self.counts),
            "reduction": choose("reduction", self.reduction),
        }
        if self.blend and choose("blend", (False, True)):
            shares = {name: round(trial.suggest_float(name, 0.0, 1.0), 3) for name in _BLENDED}
            return point | {"blend": shares}
        return point | {"order": choose("order", self.order), "granularity": choose("granularity", self.granularity)}

    @property
    def start(self) -> dict[str, Any]:
        """What is suggested first: the first entry of every gene."""
        genes = {"source": self.sources, "length": self.lengths, "count": self.counts, "reduction": self.reduction}
        genes |= {"order": self.order, "granularity": self.granularity}
        return {name: among[0] for name, among in genes.items()} | {"subset": 0, "blend": False}

    def pool(self) -> list[tuple[str, int, int]]:
        """Source, length and number of every subset that a point can name."""
        return [
            (source, length, subset)
            for source in self.sources
            for length in self.lengths
            for subset in range(self.subsets)
        ]


def _doubled(length: int, longest: int) -> tuple[int, ...]:
    """A length and twice that, where the model knows so many positions."""
    return (length, 2 * length) if 2 * length <= longest else (length,)


def _listed(said: str) -> tuple[str, ...]:
    """Words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in said.split(",")))


def _words(name: str, said: str, known: Sequence[str]) -> tuple[str, ...]:
    words = _listed(said)
    for word in words:
        if word not in known:
            raise InputError(f"search.{name}={said} names '{word}', which is unknown: {nearest(word, known)}")
    return words


def _numbers(name: str, said: str | int) -> tuple[int, ...]:
    words = _listed(str(said))
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"search.{name}={said} is no list of numbers of 1 or more: write it like 64,128")
    return tuple(map(int, words))


def _name(source: str, length: int, subset: int) -> str:
    return f"{source} {length} {subset}"


def _draws(drawing: Drawing, **options: Any) -> Texts:
    """Every subset of the calibration that may be chosen, the recipe's own windows among them, and the windows to judge by."""
    require_optuna()
    recipe, calibration = drawing.recipe, drawing.recipe.calibration
    length = drawing.calibration.length
    space = Space.of(options, calibration.source, length, drawing.longest)
    if calibration.sampling == "first" and space.subsets > 1:
        raise InputError(
            "calibration.sampling=first always takes the same windows, and a search over subsets wants several: leave it out, or "
            "say --set search.subsets=1"
        )
    pool = {}
    for source, tokens, subset in space.pool():
        window_length(drawing.source.module.config, tokens, Silent(), option="search.lengths")
        windows = calibration_windows(
            documents(source, "calibration"),
            drawing.tokenizer,
            samples=calibration.samples,
            length=tokens,
            seed=recipe.seed + subset,
            sampling=calibration.sampling,
        )
        check_vocabulary(windows, drawing.source.module)
        pool[_name(source, tokens, subset)] = windows
    judged = options["length"] or _doubled(length, drawing.longest)[-1]
    return drawing.texts(options["text"], options["samples"], judged, pool)


def _steps(blocks: int, *, trials: int, **_: Any) -> int:
    return trials


def _reads(*, order: str, granularity: str, blend: bool, **_: Any) -> set[str]:
    orders, granularities = _words("order", order, _ORDERS), _words("granularity", granularity, _GRANULARITIES)
    wanted = [taylor_reads(one, other, "sum") for one in orders for other in granularities]
    wanted += [taylor_reads(**each, reduction="sum") for each in _BLENDED.values()] if blend else []
    return set().union(*wanted)


@search(
    paper="https://arxiv.org/abs/2503.06184",
    draws=_draws,
    steps=_steps,
    needs={"gradient_abs", "gradient_signed", "gradient_second", "gradient_mixed"},
    reads=_reads,
    varies=taylor,
)
def tpe(
    ground: Ground,
    *,
    trials: _Count = 50,
    sources: str = "",
    lengths: str | int = "",
    subsets: _Count = 4,
    counts: str | int = "1,2",
    order: str = "first,second,mix",
    granularity: str = "element,vector",
    reduction: str = "sum,mean,max,prod,first,last",
    blend: bool = True,
    text: str = "",
    samples: _Count = 20,
    length: int | None = None,
) -> Answer:
    """Choose calibration and measure of importance together, by what the plan they lead to does to perplexity.

    A point is a text of `sources`, a window length of `lengths` (by default the recipe's and twice that), `counts` of its `subsets` of
    as many windows as the recipe draws, and an `order`, a `granularity` and a `reduction` of `taylor`; or in the place of order and
    granularity a `blend`, importance of the first and second order and of vectors, standardised in each structure and added up with
    shares from 0 to 1. Lists are written with commas. The first point is `llm-pruner`, and so is all of a space of one point; then
    Optuna's tree-structured Parzen estimator proposes. Gradients are measured once a subset; sums over several subsets are means of
    theirs, so a trial is arithmetic and a pass of `samples` windows of `length` tokens (by default twice the recipe's) through the
    model with the plan tried.
    Source: AdaPruner (2025) as far as its abstract says; the space in detail is ours.
    """
    space = Space.of(
        {
            "sources": sources,
            "lengths": lengths,
            "subsets": subsets,
            "counts": counts,
            "order": order,
            "granularity": granularity,
            "reduction": reduction,
            "blend": blend,
        },
        ground.recipe.calibration.source,
        ground.length,
        ground.longest,
    )
    measured: dict[str, list[dict[str, Gradients]]] = {}

    def gradients(point: Mapping[str, Any]) -> list[dict[str, Gradients]]:
        names = [
            _name(point["source"], point["length"], (point["subset"] + more) % space.subsets)
            for more in range(point["count"])
        ]
        for name in names:
            if name not in measured:
                measured[name] = ground.gradients(ground.texts.pool[name])
        return mean_gradients([measured[name] for name in names])

    def plan(point: Mapping[str, Any]) -> Plan:
        scores = scores_at(point, gradients(point), ground.structures)
        fraction = ground.recipe.target.fraction
        counts = ground.budget.counts(ground.structures, ground.parameters, fraction, scores)
        return plan_of(ground.structures, counts, scores)

    path = ground.path(STUDY_NAME)
    study = open_study(path, {**ground.identity, "texts": ground.texts.hashes})
    proposals = proposals_of(study, space.drawn, trials=trials, seed=ground.recipe.seed, start=space.start)
    return ground.run(proposals, plan, first=0, share=1.0)


def mean_gradients(subsets: Sequence[list[dict[str, Gradients]]]) -> list[dict[str, Gradients]]:
    """Sums of gradients averaged over subsets of as many windows; of one subset they are what they are."""
    if len(subsets) == 1:
        return subsets[0]

    def mean(sides: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([side[name] for side in sides]).mean(0) for name in sides[0]}

    return [
        {
            name: Gradients(mean([each[name].rows for each in blocks]), mean([each[name].columns for each in blocks]))
            for name in blocks[0]
        }
        for blocks in zip(*subsets, strict=True)
    ]


def scores_at(
    point: Mapping[str, Any], gradients: Sequence[Mapping[str, Gradients]], structures: Structures
) -> list[dict[str, Tensor]]:
    """Importance of all units as a point has it computed, [units] by block and structure."""
    found = []
    for block, measured in zip(structures, gradients, strict=True):
        view = BlockView({}, gradients=measured, structures=tuple(block))
        found.append({each.name: _importance(point, view, each) for each in block})
    return found


def _importance(point: Mapping[str, Any], view: BlockView, structure: Structure) -> Tensor:
    reduction = point["reduction"]
    if "blend" not in point:
        return taylor(view, structure, order=point["order"], granularity=point["granularity"], reduction=reduction)
    parts = [
        share * normalised(taylor(view, structure, **_BLENDED[name], reduction=reduction), "zscore")  # type: ignore[arg-type]
        for name, share in point["blend"].items()
    ]
    return torch.stack(parts).sum(0)
