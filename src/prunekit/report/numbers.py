"""How numbers are written where people read them."""

from __future__ import annotations

import math


def spelt(value: float | None) -> str:
    """A perplexity for people: four figures, and never more digits than a table can hold."""
    if value is None:
        return "failed"
    if not math.isfinite(value):
        return "∞"
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
