"""How whatever has a recipe begins: its model is found and opened, and its tokenizer loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .calibration.windows import load_tokenizer
from .checkpoint.locate import locate
from .model.source import StreamedModel
from .progress import Progress
from .recipe import Recipe


def find_model(recipe: Recipe, progress: Progress) -> Path:
    """The folder of a recipe's model, downloaded or converted where it has to be. Raises `InputError`."""
    return locate(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, progress=progress)


def open_model(recipe: Recipe, folder: Path) -> StreamedModel:
    """The model in a folder, to be computed with as a recipe says. Raises `InputError`."""
    return StreamedModel.open(
        folder, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )


def open_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """The tokenizer in a folder, whose code is run where the recipe trusts it. Raises `InputError`."""
    return load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
