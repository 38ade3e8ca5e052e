"""Every method as a row: the parts it is made of, the group it compares in, where it was published.

Rows are plain data and import nothing, so that a misspelt method is refused before PyTorch is loaded. A row names parts by the
name of their function (see `parts.py`); a recipe may override any of a part's options with `--set part.option=value`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError, nearest


@dataclass(frozen=True)
class Method:
    """One published method, as a combination of parts.

    `group` is what weights are compared with when a fraction is asked for: those of the same output `row`, or of the whole
    `layer` (the linear). A `K:G` pattern compares within its groups of G, whatever the method.
    """

    name: str
    summary: str
    score: str
    group: str
    paper: str
    kind: str = "sparsify"
    budget: str = "uniform"


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
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
    )
}


def find_method(name: str) -> Method:
    """The row called `name`. Raises `InputError` with the nearest known name otherwise."""
    if name not in METHODS:
        raise InputError(f"method '{name}' is unknown: {nearest(name, METHODS)}")
    return METHODS[name]
