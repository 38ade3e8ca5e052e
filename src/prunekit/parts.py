"""The registry of parts: one decorated function is a part, and its signature is its documentation.

A part's keyword-only parameters are its options: they appear in `prunekit methods`, are set with `--set kind.option=value`, and
their annotations and defaults are checked once, here. A new criterion is therefore one file with one function; nothing else
changes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import InputError, nearest

Function = TypeVar("Function", bound=Callable[..., Any])

FOLLOWED = "followed"  # of a part that tunes: it needs the dense model's hidden states beside ours

_HOMES = {
    "score": "prunekit.sparsify.scores",
    "budget": "prunekit.sparsify.budget",
    "refine": "prunekit.sparsify.refine",
    "reconstruct": "prunekit.sparsify.reconstruct",
    "tune": "prunekit.sparsify.tune",
    "unit-score": "prunekit.shrink.scores",
    "unit-budget": "prunekit.shrink.budget",
    "compensate": "prunekit.shrink.compensate",
    "depth": "prunekit.shrink.depth",
    "width": "prunekit.shrink.width",
    "search": "prunekit.shrink.search",
}
_REGISTERED: dict[str, dict[str, Part]] = {kind: {} for kind in _HOMES}


@dataclass(frozen=True)
class Limits:
    """Which numbers an option takes, said in its annotation: `beta: Annotated[float, Limits(above=0, at_most=1)]`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def allow(self, value: float) -> bool:
        """Whether `value` is one of them; NaN never is where anything is asked."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        said = (("of at least", self.at_least), ("above", self.above), ("at most", self.at_most))
        return " and ".join(f"{words} {bound}" for words, bound in said if bound is not None)


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a part."""

    name: str
    annotation: Any
    default: Any


@dataclass(frozen=True)
class Part:
    """A pure function on tensors, with what it declares about itself.

    Attributes:
        kind: `score`, `refine`, `reconstruct`, `tune` or `budget`; of methods that remove structures `unit-score`, `unit-budget`,
            `compensate`, `depth`, `width` or `search`.
        needs: names of the `Statistics` sums it reads; nothing else is measured.
        rowwise: the result for some rows depends on those rows alone (and on `Statistics`, which know the norms of the whole weight's
            columns), so they may be computed in chunks.
        random: it draws at random, from a generator it is given as the keyword `generator`.
        chooses: a reconstruction that finds the keep-mask itself where it is given none.
        measure: what a budget wants to know of every dense block before the first is pruned.
        note: what to know before it is used, such as a group within which a score says no more than a simpler one.
        objective: of what the gradients are that it reads; empty where it reads none.
        reads: which of `needs` it reads with the options at hand, where that depends on them.
        steps: of one that measures on walks of its own, through how many blocks these go, of how many there are and remove how many.
        coupled: of a score of units: it reads statistics of the linears that produce them, too.
        draws: of a search: the texts it wants.
        shifts: of a compensation, that it adds to the linear's output, which needs a bias for that.
        candidates: of a depth that removes sublayers, which of them may go.
        given: of a budget of units, that its options say how many stay, and no ratio does.
        channels: of a score of units, what ranks the channels of the residual stream, where it does that too.
        even: of a budget of units, that it asks the same of every block.
        sizes: of a search, that it says itself how many units of each block stay.
        varies: of a search, the score of units whose options it chooses.
        options: its keyword-only parameters.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    needs: frozenset[str]
    paper: str
    rowwise: bool
    options: dict[str, Option]
    random: bool = False
    chooses: bool = False
    measure: Callable[..., float] | None = None
    note: str = ""
    objective: str = ""
    reads: Callable[..., set[str]] | None = None
    steps: Callable[..., int] | None = None
    coupled: bool = False
    draws: Callable[..., Any] | None = None
    shifts: bool = False
    given: bool = False
    candidates: Callable[..., Sequence[Any]] | None = None
    channels: Callable[..., Any] | None = None
    even: bool = False
    sizes: bool = False
    varies: Callable[..., Any] | None = None

    @property
    def word(self) -> str:
        """What its kind is called in recipes: a method has one kind of score and of budget."""
        return self.kind.removeprefix("unit-")

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def bind(self, values: dict[str, Any]) -> dict[str, Any]:
        """The options with their defaults, `values` laid over them and checked. Raises `InputError`."""
        for name, value in values.items():
            if name not in self.options:
                known = nearest(name, self.options) if self.options else f"{self.word} '{self.name}' has no options"
                raise InputError(f"'{self.word}.{name}' is not an option of {self.word} '{self.name}': {known}")
            wanted = self.options[name].annotation
            if not _fits(value, wanted):
                raise InputError(f"'{self.word}.{name}' cannot be {value!r}: it takes {_spell(wanted)}")
        return {name: values.get(name, option.default) for name, option in self.options.items()}

    def needed(self, options: dict[str, Any]) -> frozenset[str]:
        """What it reads of `needs` with these options, all of them bound."""
        return self.needs if self.reads is None else frozenset(self.reads(**options))


def score(
    *, needs: set[str], paper: str, rowwise: bool = False, random: bool = False, note: str = ""
) -> Callable[[Function], Function]:
    """Register `function(weight, stats, *, options...) -> importance`, all of shape `[out, in]`; larger is kept."""
    return _register("score", needs, paper, rowwise=rowwise, random=random, note=note)


def refine(*, needs: set[str], paper: str, rowwise: bool = False) -> Callable[[Function], Function]:
    """Register `function(weight, keep, stats, groups, *, options...) -> keep-mask`.

    It moves a mask: as many weights stay in every row, and where `groups` is `(K, G)`, K of every G consecutive inputs.
    """
    return _register("refine", needs, paper, rowwise=rowwise)


def reconstruct(
    *, needs: set[str], paper: str, rowwise: bool = False, chooses: bool = False
) -> Callable[[Function], Function]:
    """Register `function(weight, keep, stats, selection, *, options...) -> (weight, keep-mask)`.

    It changes the kept weights. `keep` is the mask to respect; one that `chooses` may be given None and then finds a mask that
    `selection` (see `sparsify/patterns.py`) would allow.
    """
    return _register("reconstruct", needs, paper, rowwise=rowwise, chooses=chooses)


def tune(
    *, paper: str, needs: set[str] | None = None, reads: Callable[..., set[str]] | None = None
) -> Callable[[Function], Function]:
    """Register `function(weights, batches, steps_an_epoch, sum_up, *, options...) -> (first loss, last loss)`.

    It changes the kept weights of a pruned block's linears all together, in place; see `sparsify/tune/blockwise.py`. What it `needs`
    can only be `FOLLOWED`: that the dense model's hidden states go along, to be what the batches are to give.
    """
    return _register("tune", needs or set(), paper, reads=reads)


def budget(
    *, needs: set[str] | None = None, paper: str = "", measure: Callable[..., float] | None = None
) -> Callable[[Function], Function]:
    """Register `function(pattern, blocks, profile, *, options...) -> one pattern per block`.

    One with a `measure(weights, statistics, **options)`, given what its `needs` name for all linears of a dense block, has what that
    returned for each block as its `profile`; for others it is empty.
    """
    return _register("budget", needs or set(), paper, measure=measure)


def unit_score(
    *,
    needs: set[str],
    paper: str,
    objective: str = "",
    random: bool = False,
    reads: Callable[..., set[str]] | None = None,
    note: str = "",
    coupled: bool = False,
    channels: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    """Register `function(view, structure, *, options...) -> importance` of the units of a structure, [units]; larger is kept.

        `view` shows the structure's block, see `shrink/view.py`. `needs` may name sums of gradients (`gradient_abs`, ...; see
    `shrink/gradients.py`) of an `objective`, and the `gate` and the `norm` of the block's perceptron (see `shrink/perceptron.py`);
    `reads(**options)` say which of all these the options at hand ask for. One that is `coupled` reads statistics of the linears that
    produce units as well as of the one that consumes them. `channels(norms)`, where it is given, ranks the channels of the residual
    stream [channels] by what it `needs` of the outputs of all the blocks' norms.
    """
    return _register(
        "unit-score",
        needs,
        paper,
        objective=objective,
        random=random,
        reads=reads,
        note=note,
        coupled=coupled,
        channels=channels,
    )


def unit_budget(
    *, paper: str = "", scored: bool = False, given: bool = False, even: bool = False
) -> Callable[[Function], Function]:
    """Register `function(demand, *, options...) -> how many units of each structure stay`; see `shrink/budget.py`.

    One that is `scored` wants the scores of all blocks first; one that is `given` has the numbers among its options; one that is
    `even` asks the same of every block, so that a search may ask something else without contradicting it.
    """
    return _register("unit-budget", {"scores"} if scored else set(), paper, given=given, even=even)


def depth(
    *, paper: str, steps: Callable[..., int], candidates: Callable[..., Sequence[Any]] | None = None
) -> Callable[[Function], Function]:
    """Register `function(influence, count, *, options...) -> the numbers of the blocks that go`; see `shrink/influence.py`.

    `steps(blocks, count, **options)` says through how many blocks its measurements go. One with
    `candidates(structures, **options)`, the sublayers that may go, is given the structures in the place of a count and returns
    the candidates in the order in which they go.
    """
    return _register("depth", set(), paper, steps=steps, candidates=candidates)


def width(*, paper: str = "") -> Callable[[Function], Function]:
    """Register `function(stream, *, options...) -> how many channels the residual stream keeps`; see `shrink/width.py`.

    Which ones they are is read off the stream's gram matrix.
    """
    return _register("width", {"gram"}, paper)


def search(
    *,
    paper: str,
    draws: Callable[..., Any],
    steps: Callable[..., int],
    needs: set[str] | None = None,
    reads: Callable[..., set[str]] | None = None,
    sizes: bool = False,
    varies: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    """Register `function(ground, *, options...) -> Answer`, which makes a plan by trying many; see `shrink/searching.py`.

    `draws(drawing, **options)` gives its texts, and `steps(blocks, **options)` how often it says that a step is done. `needs` are sums
    of gradients it looks at, `reads(**options)` those that the options at hand ask for. It has options called `trials`, `samples`,
    `length` and `text`. One that `sizes` says itself how many units stay, and takes no other budget than an even one; one that `varies`
    a score computes it with options of its own choice, and takes no other score and none of its options.
    """
    return _register("search", needs or set(), paper, reads=reads, steps=steps, draws=draws, sizes=sizes, varies=varies)


def compensate(
    *, needs: set[str], paper: str, reads: Callable[..., set[str]] | None = None, shifts: bool = False
) -> Callable[[Function], Function]:
    """Register `function(weight, keep, stats, *, options...) -> (weight, bias or None)` of a linear that loses inputs.

    Shapes: weight [out, in] float32 or float64, keep [kept] int64 -> [out, kept], and of one that `shifts`, what is added to the
    linear's output, [out].
    """
    return _register("compensate", needs, paper, reads=reads, shifts=shifts)


def _register(
    kind: str,
    needs: set[str],
    paper: str,
    *,
    rowwise: bool = False,
    random: bool = False,
    chooses: bool = False,
    measure: Callable[..., float] | None = None,
    note: str = "",
    objective: str = "",
    reads: Callable[..., set[str]] | None = None,
    steps: Callable[..., int] | None = None,
    coupled: bool = False,
    draws: Callable[..., Any] | None = None,
    shifts: bool = False,
    given: bool = False,
    candidates: Callable[..., Sequence[Any]] | None = None,
    channels: Callable[..., Any] | None = None,
    even: bool = False,
    sizes: bool = False,
    varies: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        name = function.__name__.replace("_", "-")
        hints = typing.get_type_hints(function, include_extras=True)
        options = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not (random and parameter.name == "generator"):
                if parameter.default is inspect.Parameter.empty or parameter.name not in hints:
                    raise TypeError(f"option '{parameter.name}' of {kind} '{name}' needs an annotation and a default")
                options[parameter.name] = Option(parameter.name, hints[parameter.name], parameter.default)
        _REGISTERED[kind][name] = Part(
            kind=kind,
            name=name,
            function=function,
            needs=frozenset(needs),
            paper=paper,
            rowwise=rowwise,
            options=options,
            random=random,
            chooses=chooses,
            measure=measure,
            note=note,
            objective=objective,
            reads=reads,
            steps=steps,
            coupled=coupled,
            draws=draws,
            shifts=shifts,
            given=given,
            candidates=candidates,
            channels=channels,
            even=even,
            sizes=sizes,
            varies=varies,
        )
        return function

    return register


def parts(kind: str) -> dict[str, Part]:
    """All parts of a kind by name; imports the modules they live in."""
    home = importlib.import_module(_HOMES[kind])
    for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
        importlib.import_module(f"{home.__name__}.{module.name}")
    return _REGISTERED[kind]


def find_part(kind: str, name: str) -> Part:
    """The part of that kind and name. Raises `InputError` with the nearest known name otherwise."""
    known = parts(kind)
    if name not in known:
        raise InputError(f"{kind.removeprefix('unit-')} '{name}' is unknown: {nearest(name, known)}")
    return known[name]


def _fits(value: Any, wanted: Any) -> bool:
    if typing.get_origin(wanted) is typing.Annotated:
        base, limits = typing.get_args(wanted)
        return _fits(value, base) and limits.allow(value)
    if typing.get_origin(wanted) is typing.Literal:
        return not isinstance(value, bool) and value in typing.get_args(wanted)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(wanted))
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _spell(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Annotated:
        base, limits = typing.get_args(wanted)
        return f"{_spell(base)} {limits}"
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(map(_spell, typing.get_args(wanted)))
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}.get(
        wanted, str(wanted)
    )
