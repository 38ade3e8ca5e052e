"""What test files of several rooms share: folders as bytes, drawn tokens, calls that fail on purpose."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from prunekit.checkpoint.reader import Reader
from prunekit.model.source import StreamedModel
from prunekit.progress import Silent

# Folders


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    """The bytes of the files of weights, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Reader(folder), dtype, torch.device("cpu"))


# Tensors


def draw_ids(count: int, length: int, seed: int = 1) -> Tensor:
    """Windows of random byte tokens, [count, length]."""
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def near(family: str) -> dict[str, float]:
    """How far the outputs of two float64 models may be apart."""
    # Gemma's norms are float32 whatever the model is
    return {"rtol": 1e-4, "atol": 1e-5} if family.startswith("gemma") else {"rtol": 1e-10, "atol": 1e-10}


# Stand-ins


def ctrl_c(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


def read_only(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def stop_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, interrupted when it is called for that time (from 0)."""
    calls = iter(range(1000))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    return wrapped


class Says(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
