"""What a search over recipes found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..search.recipes import NOTHING
from .numbers import spelt


def as_markdown(found: Mapping[str, Any]) -> str:
    """A page: the best recipe next to the presets, the front of quality and time, and what mattered."""
    best = found["best"]
    lines = [
        f"# {found['model']} at {found['target']}: the best of {found['trials']} recipes",
        "",
        f"Chosen by perplexity on `{found['text']}`, tested on `{found['test']}`; neither shares a passage with the other or with the "
        "calibration.",
        f"Dense: {spelt(found['dense']['perplexity'])} and {spelt(found['dense']['test_perplexity'])}.",
        "",
        "| recipe | perplexity | on the test text | seconds to prune | zeros |",
        "|---|---:|---:|---:|---:|",
        _row("**best**", best),
        *(_row(f"`{trial['preset']}`", trial) for trial in found["presets"]),
        "",
        "The best is " + _said(best) + ": `prunekit prune --recipe recipe.toml --out DIR`.",
        "",
        "![perplexity by trial](history.svg)",
        "",
        "## Quality and time",
        "",
        "Of all that were tried no recipe is both better and faster than one of these.",
        "",
        "| recipe | perplexity | on the test text | seconds to prune | zeros |",
        "|---|---:|---:|---:|---:|",
        *(_row(_said(trial), trial) for trial in found["front"]),
        "",
        "![perplexity and seconds](front.svg)",
    ]
    lines += ["", "## What mattered", ""]
    if found["importance"]:
        lines += [
            "The share of each choice in what sets the better trials apart (PED-ANOVA).",
            "",
            "| choice | share |",
            "|---|---:|",
            *(f"| `{name}` | {100 * share:.1f} % |" for name, share in found["importance"].items()),
        ]
    else:
        lines += ["Too few trials, or too equal ones, to say which choice sets the better ones apart."]
    if found["refused"]:
        lines += [
            "",
            f"{found['refused']} of the {found['trials']} were refused, because their parts do not go together or with this model.",
        ]
    return "\n".join(lines) + "\n"


def _row(name: str, trial: Mapping[str, Any]) -> str:
    if trial["refused"] is not None:
        return f"| {name} | refused | | | |"
    values = (trial["perplexity"], trial["test_perplexity"])
    return f"| {name} | {spelt(values[0])} | {spelt(values[1])} | {trial['seconds']:.1f} | {trial['sparsity']:.4f} |"


def _said(trial: Mapping[str, Any]) -> str:
    return ", ".join(f"`{word}`" for word in chosen(trial["point"]))


def chosen(point: Mapping[str, Any]) -> list[str]:
    """What a point of a space sets, as `name=value`."""
    return [f"{name}={value}" for name, value in point.items() if value != NOTHING]
