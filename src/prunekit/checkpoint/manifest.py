"""`prunekit.json`: exactly what was done, to what, with what, and what came out.

It lies in every output folder and is enough to repeat the run: the resolved recipe, versions, the hash of every input and output
file and of the calibration tokens, and a line per linear.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reader import sha256_file
from .writer import MANIFEST_NAME

FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an output folder, or None where there is none. Raises `InputError` if it is damaged or too new."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format_ = manifest["format"]
        if format_ == FORMAT:
            _ = [manifest[name] for name in ("recipe", "inputs", "outputs", "linears", "run", "verification")]
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise InputError(f"'{path}' cannot be read: {problem}") from None
    if format_ != FORMAT:
        raise InputError(f"'{path}' has format {format_}, this prunekit reads {FORMAT}: use the version that wrote it")
    assert isinstance(manifest, dict)
    return manifest


def unchanged_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, where there is one; raises `InputError` where it no longer tells of what lies in the folder."""
    manifest = read_manifest(folder)
    if manifest is not None and (changed := changed_files(folder, manifest)):
        raise InputError(
            f"'{folder}' is not what was written: {', '.join(changed)} changed since; prune or export again"
        )
    return manifest


def changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Output files that are missing or whose sha256 is not the recorded one."""
    return [
        name
        for name, digest in manifest["outputs"].items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]
