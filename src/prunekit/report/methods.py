"""The catalogue as a page: what each method is made of, its options, its paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# what methods that remove structures take out, by what they compare
REMOVED = {
    "unit": "groups of heads and channels",
    "block": "whole blocks",
    "sublayer": "whole attention modules and multilayer perceptrons",
    "plan": "the units, sublayers and blocks that the plan leaves out",
    "channel": "channels of the residual stream",
}


def measured(row: Mapping[str, Any], quote: str = "") -> str:
    """What a method reads of the model it is given."""
    if row["depth"]:
        return f"what {row['group']}s are fed and return"
    return ", ".join(f"{quote}{need}{quote}" for need in row["needs"]) or "nothing"


def as_markdown(rows: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> str:
    """A section per method, and a table of the parts that can be added to one by name."""
    lines = [
        "# Methods",
        "",
        "Made by `prunekit methods --markdown`. A method is a combination of parts: a **score** ranks weights, a pattern picks what",
        "stays, **refine** moves that mask, **reconstruct** changes the kept weights of a linear and **tune** those of a whole block;",
        "a **budget** says how much goes from where. Any option is set with `--set part.option=value`, a part is exchanged with",
        "`--set part.name=other`, and the parts of the last table are added to any method by name: `--method ria+dsnot+least-squares`.",
        "A method that removes structures has a score for units, a budget, and perhaps **compensate**, which refits what lost inputs;",
        "or a **depth**, which says which whole blocks or sublayers go. [Shrink](shrink.md) is about those.",
        "",
    ]
    for row in rows:
        lines += [f"## {row['name']}", "", row["summary"], ""]
        lines += [f"- {kind}: `{row[kind]}`. {formula}" for kind, formula in row["formulas"].items()]
        lines += [f"- note: {note}" for note in row["notes"]]
        if row["kind"] == "shrink":
            lines.append(f"- removes {REMOVED[row['group']]}")
        else:
            lines.append(f"- compares weights of the same {row['group']}; a K:G pattern those of the same group of G")
        if row["budget"] not in (None, "uniform"):
            lines.append(f"- budget: `{row['budget']}`")
        lines.append(f"- measures {measured(row, '`')}")
        if row["options"]:
            lines.append(f"- options: {', '.join(f'`{name}={value}`' for name, value in row['options'].items())}")
        if row["calibration"]:
            drawn = ", ".join(f"`{name}={value}`" for name, value in row["calibration"].items())
            lines.append(f"- calibration, unless something else is said: {drawn}")
        lines += [f"- paper: {row['paper']}", ""] if row["paper"] else [""]
    lines += [
        "## Parts that can be added",
        "",
        "| part | kind | of methods that | what it does | paper |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{part['name']}` | {part['kind']} | {part['to']} | {part['summary']} | {part['paper']} |" for part in parts
    ]
    return "\n".join(lines) + "\n"
