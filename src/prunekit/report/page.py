"""`report.html`: a run as one file that needs no network, for light and dark, for a desk and a phone.

Tables and heat maps are HTML, line pictures SVG (charts.py). Everything is there without JavaScript; with it, tables can be sorted and
pictures pointed at. Equal manifests give equal pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..catalogue import find_method
from ..evaluation.record import EvaluationRecord
from ..model.anatomy import place_of
from ..recipe import Recipe
from ..recovery.options import RecoveryOptions
from .charts import Chart, Error, Moment, error_chart, memory_chart, recovery_chart, search_chart
from .numbers import spelt

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")
_PHASES = {
    "start": "start",
    "read": "wait for weights",
    "forward": "forward passes",
    "prune": "score and mask",
    "tune": "tune",
    "write": "wait for the disk",
    "verify": "reload check",
}


@dataclass(frozen=True)
class Headline:
    """A figure at the top of a page, and what it is made of."""

    name: str
    value: str
    note: str = ""


def run_page(manifest: Mapping[str, Any], evaluation: EvaluationRecord | None = None) -> str:
    """The page of a finished run.

    Args:
        manifest: what `prunekit.json` holds.
        evaluation: what `evaluation.json` holds, where there is one.
    """
    recipe = Recipe.build(manifest["recipe"])
    method = find_method(recipe.method)
    run, linears = manifest["run"], manifest["linears"]
    errors, moments = _errors(linears), _moments(manifest)
    return render(
        "run.html.jinja",
        title=f"{short(recipe.model)}, pruned with {method.name}",
        recipe=recipe,
        method=method,
        asked=_asked(recipe, manifest),
        removed=bool(run.get("removed")),
        headlines=_headlines(manifest, evaluation),
        evaluation=evaluation,
        recovery=_recovered(manifest),
        search=_searched(manifest),
        heat=_heat(manifest),
        shortcuts=sum(manifest.get("shortcuts", ())),
        errors=errors,
        error_chart=error_chart(errors) if errors else None,
        moments=moments,
        memory_chart=_memory_chart(run, moments),
        unrecorded=run["blocks"] - len(moments),
        phases=_phases(run["seconds"], removes=recipe.removes),
        run=run,
        command=recipe.command("OUT"),
        recipe_json=json.dumps(manifest["recipe"], indent=2, ensure_ascii=False),
        manifest=manifest,
    )


def _asked(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    """What was to go, in words."""
    target, parts = recipe.target, manifest["recipe"]["parts"]
    if recipe.removes:
        channels = manifest["run"]["channels"]
        left = f"; {channels['after']} of {channels['before']} channels of the residual stream stay" if channels else ""
        if "width" in parts:
            of = "block parameters, shortcuts counted" if parts["width"]["name"] == "parameters" else "channels"
            return f"{100 * float(target.fraction):g} % of the {of}{left}"
        if recipe.plan is not None:
            return "What the given plan leaves out"
        gone = f"{100 * float(target.fraction):g} % of the block parameters"
        if "depth" in parts:
            return f"{gone}, in whole {'sublayers' if 'what' in parts['depth'] else 'blocks'}"
        gone = "Given widths" if recipe.sized else gone
        widths = (
            "every block as wide as the next" if parts["budget"]["shape"] == "uniform" else "blocks of their own widths"
        )
        return f"{gone}, {widths}{left}"
    if target.group is None:
        return f"{target} of the weights, compared within the {parts['pattern']['group']}"
    return f"{target}: {target.keep} of every {target.group} consecutive inputs are kept"


@dataclass(frozen=True)
class _Recovered:
    options: RecoveryOptions
    result: Mapping[str, Any]
    curve: dict[int, float]
    chart: Chart
    command: str


def _recovered(manifest: Mapping[str, Any]) -> _Recovered | None:
    recovery = manifest.get("recovery")
    if recovery is None:
        return None
    options, result = RecoveryOptions.of(recovery), recovery["result"]
    curve = dict(result["curve"])
    chart = recovery_chart(result["losses"], curve)
    return _Recovered(options, result, curve, chart, options.command("OUT", "RECOVERED"))


@dataclass(frozen=True)
class _Searched:
    result: Mapping[str, Any]
    course: list[tuple[int, float]]
    chart: Chart


def _searched(manifest: Mapping[str, Any]) -> _Searched | None:
    search = manifest.get("search")
    if search is None:
        return None
    course = [(place, value) for place, value in search["course"]]
    return _Searched(search, course, search_chart(course))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "perplexity": spelt,
        "change": change,
        "minus": minus,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }
    return made


def render(template: str, **values: Any) -> str:
    """A page from the template of that name in `templates/`."""
    return _environment().get_template(template).render(**values)


def short(model: str) -> str:
    """What a model is called where there is no room for its path."""
    return Path(model).name or model


def change(interval: tuple[float, float], form: str = "{:.3f}", scale: float = 1.0) -> str:
    """An interval, for people; its ends are multiplied by `scale`."""
    low, high = (form.format(scale * end) for end in interval)
    return minus(f"{low} … {high}")


def minus(figure: str) -> str:
    """A figure with the sign that is as wide as a plus."""
    return figure.replace("-", "−")


def _headlines(manifest: Mapping[str, Any], evaluation: EvaluationRecord | None) -> list[Headline]:
    run, difference, found = manifest["run"], manifest["verification"]["difference"], []
    if evaluation is not None and evaluation.texts:
        first = evaluation.texts[0]
        before = f"{spelt(first.before)} before, {first.ratio:.3f} ×, on" if first.before is not None else "on"
        found.append(Headline("perplexity", spelt(first.perplexity), f"{before} {first.text}"))
    if run.get("removed"):
        note = f"of the block parameters: {run['block_removed']:,} of {run['block_parameters']:,}"
        gone = Headline("removed", f"{100 * run['ratio']:.2f} %", note)
    else:
        note = f"{run['zeros']:,} of {run['weights']:,} block weights"
        gone = Headline("zeros", f"{100 * run['sparsity']:.2f} %", note)
    errors = [line["output_error"] for line in manifest["linears"] if line["output_error"] is not None]
    if errors:
        note = f"median of {len(errors)} linears, most {max(errors):.3f}"
        found.append(Headline("output error", f"{median(errors):.3f}", note))
    check = f"logits through {manifest['verification']['through']}" + (
        ", difference to their norm" if difference else ""
    )
    return [
        gone,
        *found,
        Headline("time", duration(run["seconds"]["total"]), f"{run['blocks']} blocks, {run['tokens']:,} tokens"),
        Headline("memory", f"{run['peak_rss_bytes'] / 1e9:.2f} GB", "most that was resident"),
        Headline("reload check", f"{difference:.1e}" if difference else "exact", check),
    ]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


@dataclass(frozen=True)
class _HeatCell:
    share: float
    tip: str


def _heat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros, or what was removed, of every linear: a row a block, a column a linear, and of every block in a last column.

    Of blocks that were removed as a whole there is that column alone. What shortcuts add to a block is taken off there, too: it is
    negative where the block has grown.
    """
    linears, removed = manifest["linears"], bool(manifest["run"].get("removed"))
    shortcuts = dict(enumerate(manifest.get("shortcuts", ())))
    blocks: dict[int, dict[str, Mapping[str, Any]]] = {}
    for line in linears:
        block, name = place_of(line["name"])
        blocks.setdefault(block, {})[name] = line
    names = list(dict.fromkeys(name for own in blocks.values() for name in own))
    last = [name.rsplit(".", 1)[-1] for name in names]
    heads = [short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)]
    rows = []
    for block, own in blocks.items():
        gone, weights = (sum(counts) for counts in zip(*(_gone(line, removed) for line in own.values()), strict=True))
        added = shortcuts.get(block, 0)
        back = f" went, {added:,} came with shortcuts" if added else ""
        total = _HeatCell((gone - added) / weights, f"block {block}: {gone:,} of {weights:,} weights{back}")
        rows.append((block, [_heat_cell(own[name], removed) if name in own else None for name in names], total))
    for block in manifest["run"].get("dropped_blocks", ()):
        rows.append((block, [None] * len(names), _HeatCell(1.0, f"block {block}: removed as a whole")))
    rows.sort(key=lambda row: row[0])
    return {"heads": list(zip(heads, names, strict=True)), "rows": rows}


def _gone(line: Mapping[str, Any], removed: bool) -> tuple[int, int]:
    """How many of a linear's weights are zero, or were removed, and how many it had."""
    fewer = line.get("removed", 0)
    return fewer if removed else line["zeros"], line["weights"] + fewer


def _heat_cell(line: Mapping[str, Any], removed: bool) -> _HeatCell:
    error = "" if line["output_error"] is None else f", output error {line['output_error']:.3f}"
    gone, weights = _gone(line, removed)
    if removed:
        left = f"{line['shape'][0]} x {line['shape'][1]} left" if line["weights"] else "as a whole"
        said = f"{gone:,} of {weights:,} weights removed, {left}"
    else:
        asked = "left dense" if line["pattern"] is None else f"asked for {line['pattern']}"
        said = f"{gone:,} zeros of {weights:,} weights, {asked}"
    return _HeatCell(gone / weights, f"{line['name']}: {said}{error}")


def _errors(linears: Sequence[Mapping[str, Any]]) -> list[Error]:
    blocks: dict[int, dict[str, float]] = {}
    for line in linears:
        if line["output_error"] is not None:
            block, name = place_of(line["name"])
            blocks.setdefault(block, {})[name] = line["output_error"]
    return [Error(block, values) for block, values in blocks.items()]


def _moments(manifest: Mapping[str, Any]) -> list[Moment]:
    return [Moment(**line) for line in manifest.get("blocks", [])]  # manifests have it since there are pages


def _memory_chart(run: Mapping[str, Any], moments: Sequence[Moment]) -> Chart | None:
    if not moments:
        return None
    return memory_chart(moments, total=run["seconds"]["total"], peak=run["peak_rss_bytes"])


@dataclass(frozen=True)
class _Phase:
    name: str
    seconds: float
    share: float
    of_longest: float


def _phases(seconds: Mapping[str, float], *, removes: bool) -> list[_Phase]:
    """Every phase that took any time, and what is in none of them."""
    # cut blocks are compared with whole ones on the way
    names = _PHASES | ({"prune": "score and cut", "verify": "checks"} if removes else {})
    found = {words: seconds[name] for name, words in names.items()}
    found["everything else"] = max(0.0, seconds["total"] - sum(found.values()))
    longest = max(found.values())
    return [_Phase(n, s, s / seconds["total"], s / longest) for n, s in found.items() if s >= 0.0005]
