"""What `compare` found, as a Markdown table and as a figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..checkpoint.storage import write_text
from ..errors import InputError


def require_matplotlib() -> None:
    """Raise `InputError` where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("figures need matplotlib, which is not installed: pip install 'prunekit[plots]'") from None


def as_markdown(found: dict[str, Any]) -> str:
    """A table of the methods, best perplexity first, and one of how far their masks agree."""
    rows = sorted(found["rows"], key=lambda row: row["perplexity"])
    lines = [
        f"# {found['model']}, {found['pattern']}",
        "",
        f"{found['windows']} windows of {found['length']} tokens of `{found['calibration']}`, statistics of the dense model; "
        f"perplexity over {found['predictions']:,} predictions of `{found['text']}`. Dense: {found['dense']:.4f}.",
        "",
        "| method | perplexity | zeros | sparsity | output error | prune s | evaluate s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['method']} | {row['perplexity']:.4f} | {row['zeros']:,} | {row['sparsity']:.4f} | {row['output_error']:.4f} "
        f"| {row['seconds']:.1f} | {row['evaluation']:.1f} |"
        for row in rows
    ]
    names = [row["method"] for row in found["rows"]]
    lines += [
        "",
        "Weights both methods remove, divided by those either removes:",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
        for name, values in zip(names, found["overlap"], strict=True)
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexities as bars, and the overlap of the masks as a matrix, into an SVG file."""
    from matplotlib.figure import Figure

    rows = sorted(found["rows"], key=lambda row: -row["perplexity"])
    names = [row["method"] for row in found["rows"]]
    figure = Figure(figsize=(5.5 + 0.45 * len(names), 1.6 + 0.4 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = left.barh([row["method"] for row in rows], [row["perplexity"] for row in rows], color="#4472a8")
    left.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=8)
    left.axvline(found["dense"], color="#888888", linestyle="--", linewidth=1)
    left.set_xscale("log")
    left.set_xlabel(f"perplexity (dense {found['dense']:.1f}, dashed)", fontsize=9)
    left.margins(x=0.25)
    image = right.imshow(found["overlap"], vmin=0, vmax=1, cmap="viridis")
    right.set_xticks(range(len(names)), names, rotation=45, ha="right")
    right.set_yticks(range(len(names)), names)
    for row, values in enumerate(found["overlap"]):
        for column, value in enumerate(values):
            color = "white" if value < 0.6 else "black"
            right.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    right.set_title("removed by both / by either", fontsize=9)
    figure.colorbar(image, ax=right, shrink=0.8)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{found['model']} at {found['pattern']}", fontsize=10)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(path, buffer.getvalue())
