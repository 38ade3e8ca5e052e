"""Search for Efficient LLMs: evolution over the width of every block, and over which blocks stay."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ...parts import Limits, search
from ...search.evolution import Evolution, check_evolution
from ..budget import Scores
from ..genome import Rates, Widths, genome_of
from ..searching import Answer, Drawing, Ground, Texts
from ..units import MLP

_Share = Annotated[float, Limits(at_least=0, at_most=1)]
_Count = Annotated[int, Limits(at_least=1)]


def _draws(drawing: Drawing, *, text: str, samples: int, length: int | None, **_: Any) -> Texts:
    return drawing.texts(text, samples, length)


def _steps(blocks: int, *, trials: int, **_: Any) -> int:
    return blocks + trials


@search(paper="https://arxiv.org/abs/2409.17372", draws=_draws, steps=_steps, sizes=True)
def evolution(
    ground: Ground,
    *,
    trials: _Count = 120,
    population: Annotated[int, Limits(at_least=2)] = 20,
    parents: _Count = 4,
    attention: Literal["none", "kv_group"] = "none",
    dropped: Annotated[int, Limits(at_least=0)] = 0,
    least: _Share = 0.4,
    step: Annotated[float, Limits(above=0, at_most=1)] = 0.05,
    window: _Share | None = None,
    width_rate: _Share = 0.1,
    mask_rate: _Share = 0.0,
    depth_rate: _Share = 0.1,
    overlap: _Share = 0.8,
    reach: Annotated[float, Limits(above=0, at_most=1)] = 1.0,
    text: str = "",
    samples: _Count = 8,
    length: int | None = None,
    first: Annotated[int, Limits(at_least=0)] = 2,
    share: Annotated[float, Limits(above=0, at_most=1)] = 0.5,
) -> Answer:
    """Mutate and cross the widths of all blocks, keep what has the least perplexity, and never leave the size that was asked for.

    Units are ranked by the method's score; a candidate says how many stay in each block, which of at most `dropped` blocks go, and with
    `mask_rate` which of the best units give way to others (an `overlap` stays). `trials` candidates are proposed, `population` a
    generation, from `parents`: half mutants, three tenths crossovers, the rest mutants with three times the rates. A width is drawn
    within `reach` of the present one in steps of `step`, is at least `least`, and then all widths move alike until what goes is what
    was asked for, give or take `window` of the block parameters (by default a thousandth, or half a channel where that is more).
    Perplexity is that of `samples` windows of `text`, by default of parts of the calibration text that no calibration window touches:
    all are tried on `first` of them, a `share` of those on twice as many, and so on.
    Source: Shen et al. 2024 (Search for Efficient LLMs), with masks made instead of drawn until they fit, and widths moved to the size
    instead of refused; the first generation's plans over the whole model and the early ends are ours.
    """
    check_evolution(trials, population, parents)
    channels = max((each.count for block in ground.structures for each in block if each.kind == MLP), default=1)
    total = sum(ground.parameters)
    steps = [each.cost * ground.budget.align for block in ground.structures for each in block if each.kind == MLP]
    allowed = max(total // 1000, -(-max(steps, default=0) // 2)) if window is None else round(window * total)
    align, last = ground.budget.align, len(ground.structures) - ground.budget.skip_last
    skipped = frozenset(
        index for index in range(len(ground.structures)) if not ground.budget.skip_first <= index < last
    )

    def space_of(scores: Scores) -> Widths:
        return Widths(
            ground.structures,
            ground.parameters,
            scores,
            target=ground.target,
            window=allowed,
            attention=attention == "kv_group",
            least=least,
            step=max(1, round(step * channels / align)) * align,
            align=align,
            dropped=dropped,
            overlap=overlap,
            reach=reach,
            rates=Rates(width_rate, mask_rate, depth_rate),
            strong=Rates(min(1.0, 3 * width_rate), min(1.0, 2 * mask_rate), 0.0),
            skipped=skipped,
            seed=ground.recipe.seed,
        )

    space_of(()).refuse()
    space = space_of(ground.scores())
    made = Evolution(space, trials=trials, population=population, parents=parents, seed=ground.recipe.seed)
    return ground.run(
        made.proposals(),
        lambda candidate: space.plan(genome_of(candidate)),
        first=first,
        share=share,
        least=parents,
        counts=lambda: {"rejected": made.rejected, "repeated": made.repeated},
    )
