"""Where text comes from: files, folders, presets, data sets of the hub, or what Python itself carries.

A source becomes a list of documents. The text of `.txt` files and of `builtin` is read when it is asked for; the rows of `.jsonl`,
`.parquet` and hub data are known at once, but only as many are tokenised as are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from .builtin import builtin_documents
from .document import Document

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class _Preset:
    """A data set of the hub that papers use. Rows are joined to one text where the papers do so."""

    path: str
    config: str | None
    field: str
    splits: dict[Purpose, str]
    joined: bool
    revision: str | None = None
    files: dict[Purpose, str] | None = None


_PRESETS = {
    "wikitext2": _Preset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text", {"calibration": "train", "evaluation": "test"}, joined=True
    ),
    "c4": _Preset(
        "allenai/c4",
        None,
        "text",
        {"calibration": "train", "evaluation": "validation"},
        joined=False,
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "ptb": _Preset(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "sentence",
        {"calibration": "train", "evaluation": "test"},
        joined=True,
        revision="refs/convert/parquet",  # the data set itself is a script, which `datasets` no longer runs
    ),
}
_SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(source: str, purpose: Purpose) -> list[Document]:
    """The documents of a source.

    Args:
        source: a `.txt`, `.jsonl` (field `text`) or `.parquet` (column `text`) file, a folder of them, a preset (`wikitext2`, `c4`,
            `ptb`, `builtin`, `builtin:eval`), or `hf:ID[:split[:field]]`.
        purpose: presets have a part for calibration and another for evaluation.

    Raises:
        InputError: the source is unknown, unreadable, or cannot be reached from here.
    """
    if source in ("builtin", "builtin:eval"):
        return builtin_documents(evaluation=source == "builtin:eval")
    if source in _PRESETS:
        return _preset(source, purpose)
    if source.startswith("hf:"):
        return _hub(source)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.suffix in _SUFFIXES and child.is_file())
        if not files:
            raise InputError(f"text folder '{source}' holds no {', '.join(_SUFFIXES)} file")
        return [document for file in files for document in _file(file)]
    if path.is_file():
        return _file(path)
    raise InputError(
        f"text '{source}' is neither a file, a folder, nor a preset: the presets are builtin, builtin:eval, "
        f"{', '.join(_PRESETS)}, and hub data sets are written hf:ID[:split[:field]]"
    )


def is_source(source: str) -> bool:
    """Whether `documents` would know where to look; nothing is read."""
    known = source in ("builtin", "builtin:eval", *_PRESETS) or source.startswith("hf:")
    return known or Path(source).expanduser().exists()


def _file(path: Path) -> list[Document]:
    if path.suffix == ".txt":
        return [Document(str(path), lambda: _read_text(path))]
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    raise InputError(f"text file '{path}' must end in {', '.join(_SUFFIXES)}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise InputError(f"text file '{path}' cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise InputError(f"text file '{path}' is not UTF-8 (byte {problem.start}): convert it first") from None


def _json_lines(path: Path) -> list[Document]:
    found = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except ValueError as problem:
            raise InputError(f"'{path}' line {number} is not JSON: {problem}") from None
        except (KeyError, TypeError):
            raise InputError(f"'{path}' line {number} has no field 'text'") from None
        found.append(_known(f"{path}:{number}", text))
    return found


def _parquet(path: Path) -> list[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"'{path}' needs pyarrow to be read: pip install 'prunekit[parquet]'") from None
    try:
        column = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as problem:
        raise InputError(f"'{path}' cannot be read as parquet with a column 'text': {problem}") from None
    return [_known(f"{path}:{number}", text) for number, text in enumerate(column, 1)]


def _known(name: str, text: Any) -> Document:
    if not isinstance(text, str):
        raise InputError(f"{name}: field 'text' holds {type(text).__name__}, not text")
    return Document(name, lambda: text)


def _preset(name: str, purpose: Purpose) -> list[Document]:
    preset = _PRESETS[name]
    arguments: dict[str, Any] = {"path": preset.path, "split": preset.splits[purpose], "revision": preset.revision}
    if preset.files is not None:
        arguments["data_files"] = {preset.splits[purpose]: preset.files[purpose]}
    else:
        arguments["name"] = preset.config
    rows = [row[preset.field] for row in _load_dataset(name, arguments)]
    if preset.joined:
        return [Document(name, lambda: "\n\n".join(rows))]
    return [_known(f"{name}:{number}", text) for number, text in enumerate(rows, 1)]


def _hub(source: str) -> list[Document]:
    _, identifier, *rest = source.split(":")
    split, field = (*rest, *["train", "text"][len(rest) :])[:2]
    if not identifier or len(rest) > 2:
        raise InputError(f"text '{source}' is not hf:ID[:split[:field]]")
    found = []
    for number, row in enumerate(_load_dataset(source, {"path": identifier, "split": split}), 1):
        if field not in row:
            raise InputError(f"data set '{identifier}' has no field '{field}': it has {', '.join(row)}")
        found.append(_known(f"{source}:{number}", row[field]))
    return found


def _load_dataset(name: str, arguments: dict[str, Any]) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"text '{name}' needs the datasets library: pip install 'prunekit[datasets]'") from None
    try:
        loaded: Iterable[dict[str, Any]] = datasets.load_dataset(**arguments)
    except Exception as problem:  # offline, renamed, gated, no such split: the library has its own class for each
        reason = " ".join([f"{type(problem).__name__}:", *str(problem).strip().splitlines()[:1]]).rstrip(":")
        raise InputError(
            f"text '{name}' could not be had from the hub ({reason}): "
            "check the name and the connection, or give a local .txt, .jsonl or .parquet file, or builtin"
        ) from None
    return loaded
