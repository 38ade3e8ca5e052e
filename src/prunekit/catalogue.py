"""Every method as a row: the parts it is made of, the group it compares in, where it was published.

Rows are plain data and import nothing, so that a misspelt method is refused before PyTorch is loaded. A row names parts by the
name of their function (see `parts.py`); a recipe may override any of a part's options with `--set part.option=value`, and the part
itself with `--set part.name=other`. Parts may also be added to a row by name: `wanda+dsnot`, `ria+r2-dsnot+least-squares+owl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import InputError, nearest

# Parts that can be added to a method by name, and their kind.
PARTS: dict[str, str] = {
    "dsnot": "refine",
    "r2-dsnot": "refine",
    "swaps": "refine",
    "sparsegpt": "reconstruct",
    "alps": "reconstruct",
    "least-squares": "reconstruct",
    "blockwise": "tune",
    "owl": "budget",
}
# The same for methods that remove structures.
UNIT_PARTS: dict[str, str] = {
    "bias": "compensate",
    "least-squares": "compensate",
    "admm": "compensate",
    "global-cost": "budget",
    "global-types": "budget",
    "blockwise": "tune",
    "evolution": "search",
}
# Budgets of those methods whose options say how many units stay, in the place of a ratio.
GIVEN_BUDGETS = frozenset({"widths"})


@dataclass(frozen=True)
class Method:
    """One method, as a combination of parts.

    `group` is what weights are compared with when a fraction is asked for: those of the same output `row`, or of the whole
    `layer` (the linear). A `K:G` pattern compares within its groups of G, whatever the method. `score` is None where the
    reconstruction chooses what to keep while it solves. `options` are defaults that differ from the parts' own.
    Of the `kind` shrink, a method removes structures: its score ranks units, its `budget` says how many stay, `compensate` refits the
    linears that lose inputs, `tune` the whole block; or `depth` says which whole blocks or sublayers go, or `width` how narrow the
    residual stream becomes. A `search` tries many plans and takes the best. One that is `planned` chooses nothing: a plan is given.
    `calibration` is what the paper draws, where that is another order of magnitude than our default.
    """

    name: str
    summary: str
    score: str | None
    group: str
    paper: str
    kind: str = "sparsify"
    budget: str = "uniform"
    refine: str | None = None
    reconstruct: str | None = None
    tune: str | None = None
    compensate: str | None = None
    depth: str | None = None
    width: str | None = None
    search: str | None = None
    planned: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_units(self) -> dict[str, str]:
        """Its parts that are about units of blocks, by kind: those that can be added to methods that remove structures."""
        kinds = dict.fromkeys(UNIT_PARTS.values())
        return {kind: name for kind in kinds if (name := getattr(self, kind)) not in (None, "uniform")}


_SYMMETRIC = "Yi & Richtárik 2025, https://arxiv.org/abs/2501.18980"

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="auto",
            summary="What served best here: mask and weights by a short ADMM, then each block tuned as a whole.",
            score=None,
            group="layer",
            reconstruct="alps",
            tune="blockwise",
            paper="parts of https://arxiv.org/abs/2406.07831 and https://arxiv.org/abs/2402.12419; figures in the README",
            options={"reconstruct": {"steps": 12, "rho": 0.3}, "tune": {"rate": 0.015}},
        ),
        Method(
            name="magnitude",
            summary="Remove the smallest weights of each linear; looks at no data.",
            score="magnitude",
            group="layer",
            paper="Han et al. 2015, https://arxiv.org/abs/1506.02626",
        ),
        Method(
            name="wanda",
            summary="Remove, in each output row, the weights whose magnitude times input norm is smallest.",
            score="wanda",
            group="row",
            paper="Sun et al. 2023, https://arxiv.org/abs/2306.11695",
        ),
        Method(
            name="owanda",
            summary="Wanda seen from the outputs: magnitude times output norm, over the layer.",
            score="owanda",
            group="layer",
            paper=f"{_SYMMETRIC}, corollary 3.3",
        ),
        Method(
            name="symwanda",
            summary="Magnitude times the sum of input and output norm, over the layer.",
            score="symwanda",
            group="layer",
            paper=f"{_SYMMETRIC}, lemma 3.1",
        ),
        Method(
            name="symmetric",
            summary="Magnitude times the sum of its column's and its row's norm in the weight itself; looks at no data.",
            score="symmetric",
            group="layer",
            paper=f"{_SYMMETRIC}, corollary 3.4",
        ),
        Method(
            name="ri",
            summary="Relative importance: the share of a weight in its row plus its share in its column; looks at no data.",
            score="ri",
            group="layer",
            paper="Zhang et al. 2024 (RIA), equation 3; theorem 3.5 of https://arxiv.org/abs/2501.18980",
        ),
        Method(
            name="ria",
            summary="Relative importance times the square root of the input norm.",
            score="ria",
            group="layer",
            paper="Zhang et al. 2024, https://openreview.net/forum?id=Tr0lPx9woF",
        ),
        Method(
            name="lp-ria",
            summary="RIA with ℓp norms of rows and columns; p=1 is RIA.",
            score="lp-ria",
            group="layer",
            paper=f"{_SYMMETRIC}, lemma 3.8",
            options={"score": {"p": 2.0}},
        ),
        Method(
            name="stochastic-ri",
            summary="Relative importance with sums over a random tenth of each row and column; looks at no data.",
            score="stochastic-ri",
            group="layer",
            paper=f"{_SYMMETRIC}, lemma 3.10",
        ),
        Method(
            name="stochastic-ria",
            summary="RIA with sums over a random tenth of each row and column.",
            score="stochastic-ria",
            group="layer",
            paper=f"{_SYMMETRIC}, lemma 3.10",
        ),
        Method(
            name="stade",
            summary="Squared weight times the variance of its input channel.",
            score="stade",
            group="row",
            paper="Mecke et al. 2025, https://arxiv.org/abs/2503.22451",
        ),
        Method(
            name="dsnot",
            summary="Wanda, then swap kept and removed weights to cancel each row's mean output error.",
            score="wanda",
            group="row",
            refine="dsnot",
            paper="Zhang et al. 2024, https://arxiv.org/abs/2310.08915",
        ),
        Method(
            name="r2-dsnot",
            summary="Wanda, then swaps by relative importance with a regularised decision.",
            score="wanda",
            group="row",
            refine="r2-dsnot",
            paper=f"{_SYMMETRIC}, section 4",
        ),
        Method(
            name="swaps",
            summary="Wanda, then exact swaps: each the one that lowers a row's output error most.",
            score="wanda",
            group="row",
            refine="swaps",
            paper="Zimmer et al. 2025, https://arxiv.org/abs/2512.10922",
        ),
        Method(
            name="sparsegpt",
            summary="Remove weights column by column and let the remaining ones make up for each.",
            score=None,
            group="layer",
            reconstruct="sparsegpt",
            paper="Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774",
        ),
        Method(
            name="alps",
            summary="Find mask and weights together by ADMM, then polish the weights by conjugate gradients.",
            score=None,
            group="layer",
            reconstruct="alps",
            paper="Meng et al. 2024, https://arxiv.org/abs/2406.07831",
        ),
        Method(
            name="owl",
            summary="Wanda with more left in blocks that have more outliers.",
            score="wanda",
            group="row",
            budget="owl",
            paper="Yin et al. 2024, https://arxiv.org/abs/2310.05175",
        ),
        Method(
            name="random",
            kind="shrink",
            summary="Remove units at random; what every criterion has to beat.",
            score="random",
            group="unit",
            paper="",
        ),
        Method(
            name="magnitude-sp",
            kind="shrink",
            summary="Remove the units with the smallest weights, all coupled matrices counted; looks at no data.",
            score="magnitude",
            group="unit",
            paper="An et al. 2023, https://arxiv.org/abs/2312.11983",
        ),
        Method(
            name="wanda-sp",
            kind="shrink",
            summary="Wanda for units: mean magnitude of a column times the norm of its input.",
            score="wanda-sp",
            group="unit",
            paper="An et al. 2023, https://arxiv.org/abs/2312.11983",
        ),
        Method(
            name="flap",
            kind="shrink",
            summary="Remove what fluctuates least, over the whole model, and put its mean into a bias.",
            score="flap",
            group="unit",
            budget="global-cost",
            compensate="bias",
            paper="An et al. 2023, https://arxiv.org/abs/2312.11983",
        ),
        Method(
            name="llm-bip",
            kind="shrink",
            summary="Remove the units whose absence can move the block's output least.",
            score="llm-bip",
            group="unit",
            paper="Wu 2024, https://arxiv.org/abs/2412.06419",
        ),
        Method(
            name="numerical",
            kind="shrink",
            summary="Newton's method on a relaxed mask, a cut over the whole model, kept columns refitted by least squares.",
            score="numerical",
            group="unit",
            budget="global-cost",
            compensate="least-squares",
            paper="Shen et al. 2024, https://arxiv.org/abs/2412.12441",
        ),
        Method(
            name="obs",
            kind="shrink",
            summary="Remove the units that the others can best make up for, and let them.",
            score="obs",
            group="unit",
            compensate="least-squares",
            paper="equations 1 to 3 of https://arxiv.org/abs/2409.17372",
        ),
        Method(
            name="ziplm",
            kind="shrink",
            summary="Remove the unit that costs least, let the others make up for it, and begin again; then refit by least squares.",
            score="ziplm",
            group="unit",
            compensate="least-squares",
            paper="Kurtic et al. 2023, https://arxiv.org/abs/2302.04089",
        ),
        Method(
            name="minitron",
            kind="shrink",
            summary="Remove the units that are least active; of given widths (--set budget.name=widths) channels of the stream, too.",
            score="minitron",
            group="unit",
            paper="Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679",
        ),
        Method(
            name="llm-pruner",
            kind="shrink",
            summary="Remove the units whose weights the loss would miss least, by its gradient, in all but the outer blocks.",
            score="taylor",
            group="unit",
            options={"budget": {"shape": "free", "skip_first": 4, "skip_last": 2}},
            calibration={"samples": 10, "length": 64},
            paper="Ma et al. 2023, https://arxiv.org/abs/2305.11627",
        ),
        Method(
            name="nirvana",
            kind="shrink",
            summary="Remove the units that the model's output, not its loss, depends on least; channels γ times as much as heads.",
            score="nirvana",
            group="unit",
            budget="global-types",
            options={"budget": {"align": 8}},
            calibration={"samples": 32, "length": 128},
            paper="Ai et al. 2025, https://arxiv.org/abs/2509.14230",
        ),
        Method(
            name="search-llm",
            kind="shrink",
            summary="Let evolution find how wide every block stays, try plans on text, then refit what stays with what is left out.",
            score="obs-coupled",
            group="unit",
            compensate="least-squares",
            search="evolution",
            options={"budget": {"shape": "free"}},
            paper="Shen et al. 2024, https://arxiv.org/abs/2409.17372",
        ),
        Method(
            name="adapruner",
            kind="shrink",
            summary="LLM-Pruner whose calibration and measure of importance are searched for together.",
            score="taylor",
            group="unit",
            search="tpe",
            options={"budget": {"shape": "free", "skip_first": 4, "skip_last": 2}},
            calibration={"samples": 10, "length": 64},
            paper="AdaPruner, 2025, https://arxiv.org/abs/2503.06184",
        ),
        Method(
            name="shortgpt",
            kind="shrink",
            summary="Remove whole blocks, those that turn the hidden states least.",
            score=None,
            group="block",
            depth="shortgpt",
            paper="Men et al. 2024, https://arxiv.org/abs/2403.03853",
        ),
        Method(
            name="drop",
            kind="shrink",
            summary="Remove single attention modules and perceptrons, those that turn the residual stream least.",
            score=None,
            group="sublayer",
            depth="drop",
            options={"budget": {"shape": "free"}},
            paper="He et al. 2024, https://arxiv.org/abs/2406.15786",
        ),
        Method(
            name="planned",
            kind="shrink",
            summary="Remove what a plan given with --plan leaves out: the file of an earlier run, as it is or edited.",
            score=None,
            group="plan",
            planned=True,
            options={"budget": {"shape": "free"}},
            paper="",
        ),
        Method(
            name="slicegpt",
            kind="shrink",
            summary="Turn the residual stream into its principal components at every place, and keep the first of them.",
            score=None,
            group="channel",
            width="parameters",
            paper="Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024",
        ),
    )
}


def find_method(name: str) -> Method:
    """The row called `name`, parts behind `+` added to it. Raises `InputError` with the nearest known name otherwise."""
    base, *added = name.split("+")
    if base not in METHODS:
        raise InputError(f"method '{base}' is unknown: {nearest(base, METHODS)}")
    method = METHODS[base]
    known = PARTS if method.kind == "sparsify" else UNIT_PARTS
    for part in added:
        if part not in known:
            raise InputError(f"'{part}' of method '{name}' is no part that can be added: {nearest(part, known)}")
        kind = known[part]
        if getattr(method, kind) not in (None, "uniform"):
            raise InputError(
                f"method '{name}' has two parts of the kind {kind}: '{getattr(method, kind)}' and '{part}'"
            )
        named: dict[str, Any] = {kind: part}
        method = replace(method, **named)
    return replace(method, name=name)
