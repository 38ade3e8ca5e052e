"""What the benchmarks share: their common options, the windows everyone is given, prunekit in a process of its own, kept figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunekit import machine
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, load_tokenizer
from prunekit.model.stream import Windows


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write the figures to this JSON file")
    return parser


def draw_windows(folder: Path, samples: int, length: int) -> Windows:
    """The windows `prunekit prune` draws from `builtin` by default."""
    return calibration_windows(
        documents("builtin", "calibration"),
        load_tokenizer(folder, trust_remote_code=False),
        samples=samples,
        length=length,
        seed=0,
        sampling="random",
    )


def options(**values: object) -> list[str]:
    """`samples=16` -> `--samples 16`."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def prunekit_command(*arguments: str | Path) -> list[str]:
    """The command of a prunekit verb whose last line on stdout is JSON."""
    return [sys.executable, "-m", "prunekit", *map(str, arguments), "--json"]


def run_prunekit(*arguments: str | Path) -> dict[str, Any]:
    """Run a verb of prunekit in a process of its own and return what it says with `--json`."""
    done = subprocess.run(prunekit_command(*arguments), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"prunekit {arguments[0]} ended with exit code {done.returncode}:\n{done.stderr}")
    return last_json(done.stdout)


def last_json(stdout: str) -> dict[str, Any]:
    """The object on the last line."""
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


def keep(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON, and what they were measured on."""
    figures = {**figures, "machine": machine.describe(), "versions": machine.versions()}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
