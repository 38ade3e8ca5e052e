"""Compile the kernels: `python -m prunekit.runtime.build`. The package's own build does the same where there is a C compiler.

Standard library only, and nothing of ours: the build runs this file by its path, before prunekit is installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
LIBRARY = Path(__file__).parent / "libprunekit.so"
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra")


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `CC`, or the first of cc, gcc and clang that is there."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def compile_library(out: Path, compiler: Sequence[str]) -> None:
    """Compile the shared library to `out`, which is there as a whole or not at all.

    Raises `OSError` where the compiler cannot be started and `subprocess.CalledProcessError`, with its messages in `stderr`, where
    it fails.
    """
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    command = [*compiler, *FLAGS, "-fPIC", "-shared", "-pthread", "-o", str(draft), *sources]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def main() -> None:
    """Compile next to this file."""
    compiler = find_compiler()
    if compiler is None:
        sys.exit("there is no C compiler: install one, or name it in CC")
    try:
        compile_library(LIBRARY, compiler)
    except OSError as problem:
        sys.exit(f"{shlex.join(compiler)} cannot be started: {problem}")
    except subprocess.CalledProcessError as problem:
        sys.exit(f"{shlex.join(compiler)} failed:\n{problem.stderr}")


if __name__ == "__main__":
    main()
