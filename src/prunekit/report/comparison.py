"""What `compare` found, as Markdown."""

from __future__ import annotations

from typing import Any

MOVED = "Channels were put into an order of each method's own, so masks are not compared place by place."


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
    if found["overlap"] is None:
        return "\n".join([*lines, "", MOVED]) + "\n"
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
