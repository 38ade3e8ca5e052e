"""prunekit: post-training pruning of large language models. Hugging Face folder in, Hugging Face folder out.

The names below are the public API. They are imported when first used, so that `import prunekit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        Inspection,
        Plan,
        compare,
        draw_weight,
        evaluate,
        inspect,
        methods,
        plan,
        prune,
        prune_,
        study,
        sweep,
    )
    from .comparing import Comparison
    from .errors import InputError, PrunekitError, StorageError, VerificationError
    from .evaluating import Evaluation
    from .model.stream import Windows
    from .pruning import Result
    from .recipe import Recipe
    from .studying import Findings
    from .sweeping import Sweep

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "comparing",
    "Evaluation": "evaluating",
    "Findings": "studying",
    "InputError": "errors",
    "Inspection": "api",
    "Plan": "api",
    "PrunekitError": "errors",
    "Recipe": "recipe",
    "Result": "pruning",
    "StorageError": "errors",
    "Sweep": "sweeping",
    "VerificationError": "errors",
    "Windows": "model.stream",
    "compare": "api",
    "draw_weight": "api",
    "evaluate": "api",
    "inspect": "api",
    "methods": "api",
    "plan": "api",
    "prune": "api",
    "prune_": "api",
    "study": "api",
    "sweep": "api",
}

__all__ = [
    "Comparison",
    "Evaluation",
    "Findings",
    "InputError",
    "Inspection",
    "Plan",
    "PrunekitError",
    "Recipe",
    "Result",
    "StorageError",
    "Sweep",
    "VerificationError",
    "Windows",
    "compare",
    "draw_weight",
    "evaluate",
    "inspect",
    "methods",
    "plan",
    "prune",
    "prune_",
    "study",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunekit' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
