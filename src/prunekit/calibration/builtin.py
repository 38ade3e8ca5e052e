"""English technical prose that every Python carries: the language reference's topics and the standard library's docstrings.

It makes prunekit work offline on a fresh machine. Whole topics and whole modules are held out for evaluation (`builtin:eval`), so
that no sentence is in both parts. The text belongs to the Python that runs: figures measured on it compare within one version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from functools import partial
from pathlib import Path

from .document import Document

_HELD_OUT = 8  # one topic or module in so many is for evaluation
_LEAST = 120  # characters below which a docstring is no prose
_SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
}


def builtin_documents(*, evaluation: bool) -> list[Document]:
    """Topics and modules of one part, in name order; modules are parsed, never imported, and only when their text is asked for."""
    from pydoc_data.topics import topics

    found = [Document(f"topic {name}", partial(str, text)) for name, text in topics.items()]
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                name = f"module {path.relative_to(library).as_posix()}"
                found.append(Document(name, partial(module_prose, path)))
    found.sort(key=lambda document: document.name)
    return [document for document in found if is_held_out(document.name) == evaluation]


def is_held_out(name: str) -> bool:
    """Whether a topic or module belongs to the evaluation part; decided by its name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT == 0


def module_prose(path: Path) -> str:
    """The docstrings of a module file, in order, blank lines between; empty where it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""  # the standard library ships a few files that are wrong on purpose
    found: list[str] = []
    _collect(tree, found)
    return "\n\n".join(found)


def _collect(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, found: list[str]) -> None:
    text = ast.get_docstring(node)
    if text and len(text) >= _LEAST:
        found.append(text)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            _collect(child, found)
