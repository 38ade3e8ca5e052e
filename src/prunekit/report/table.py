"""The table of a sweep: one flat row per run, the same columns in all, as JSON lines and as parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..blockwalk import Seconds
from ..checkpoint.storage import replace_file, write_text

_HEAD = {"name": str, "status": str, "model": str, "method": str, "target": str, "seed": int}
_PRUNED: dict[str, type] = {
    "sparsity": float,
    "ratio": float,
    "zeros": int,
    "weights": int,
    "parameters.before": int,
    "parameters.after": int,
    "blocks": int,
    "windows": int,
    "tokens": int,
    **{f"seconds.{field.name}": float for field in fields(Seconds)},
    "peak_rss_bytes": int,
}
_EVALUATED: dict[str, type] = {
    "perplexity": float,
    "evaluation.text": str,
    "evaluation.windows": int,
    "evaluation.length": int,
    "evaluation.predictions": int,
    "evaluation.seconds": float,
    "evaluation.peak_rss_bytes": int,
}
_ASKED = ("sparsity", "pattern", "ratio")  # axes that are in `target`
_TAIL = {"peak_rss_reset": bool, "error_kind": str, "error": str, "out": str, "recipe_sha256": str}
COLUMNS = frozenset({*_HEAD, *_PRUNED, *_EVALUATED, *_TAIL, *_ASKED})


class Table:
    """The columns of a sweep's table, with one type each.

    Beside the figures there is a column for every axis, under its dotted recipe name; of cases it holds the label. `target` is what was
    asked for (`0.5`, `2:4`), `sparsity` and `ratio` what came out. An axis whose values are of several kinds is text throughout.
    """

    def __init__(self, axes: Mapping[str, list[Any]], *, evaluated: bool) -> None:
        own = {name: _type_of(values) for name, values in axes.items() if name not in {*_HEAD, *_ASKED}}
        self.columns: dict[str, type] = {**_HEAD, **own, **_PRUNED, **(_EVALUATED if evaluated else {}), **_TAIL}

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row with every column; None where `values`, whose sections count as dotted names, has nothing."""
        return {name: _as(type_, _at(values, name)) for name, type_ in self.columns.items()}

    def write_lines(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace `path` atomically with one JSON object a row. Raises `StorageError`."""
        write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))

    def write_parquet(self, path: Path, rows: list[dict[str, Any]]) -> bool:
        """Replace `path` atomically with the same as parquet; False where pyarrow is not installed. Raises `StorageError`."""
        if find_spec("pyarrow") is None:
            return False
        import pyarrow as arrow
        from pyarrow import parquet

        types = {str: arrow.string(), int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
        table = arrow.Table.from_pylist(rows, schema=arrow.schema([(n, types[t]) for n, t in self.columns.items()]))
        replace_file(path, lambda temporary: parquet.write_table(table, temporary))
        return True


def _type_of(values: list[Any]) -> type:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return float
    return kinds.pop() if len(kinds) == 1 and kinds <= {str, int, float, bool} else str


def _as(type_: type, value: Any) -> Any:
    if value is None:
        return None
    if type_ is str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if type_ is float:
        return (
            float(value) if math.isfinite(value) else None
        )  # a perplexity beyond all numbers; JSON has no word for it
    return value


def _at(values: Any, name: str) -> Any:
    if name in values:
        return values[name]
    for step in name.split("."):
        values = values.get(step) if isinstance(values, Mapping) else None
    return values
