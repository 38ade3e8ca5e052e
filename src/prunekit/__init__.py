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
        bench,
        compare,
        draw_weight,
        evaluate,
        export,
        generate,
        inspect,
        load,
        masked,
        methods,
        plan,
        prune,
        prune_,
        push,
        recover,
        serve,
        study,
        sweep,
        tune,
        write_report,
    )
    from .benching import Bench
    from .comparing import Comparison
    from .errors import HistoryError, InputError, PrunekitError, StorageError, VerificationError
    from .evaluating import Evaluation
    from .exporting import Export
    from .generation.engine import Generation
    from .model.stream import Windows
    from .pruning import Result
    from .recipe import Recipe
    from .recovering import Recovery
    from .reporting import Report
    from .studying import Findings
    from .sweeping import Sweep
    from .tuning import Tuned

__version__ = "0.1.0"

_HOMES = {
    "Bench": "benching",
    "Comparison": "comparing",
    "Evaluation": "evaluating",
    "Export": "exporting",
    "Findings": "studying",
    "Generation": "generation.engine",
    "HistoryError": "errors",
    "InputError": "errors",
    "Inspection": "api",
    "Plan": "api",
    "PrunekitError": "errors",
    "Recipe": "recipe",
    "Recovery": "recovering",
    "Report": "reporting",
    "Result": "pruning",
    "StorageError": "errors",
    "Sweep": "sweeping",
    "Tuned": "tuning",
    "VerificationError": "errors",
    "Windows": "model.stream",
    "bench": "api",
    "compare": "api",
    "draw_weight": "api",
    "evaluate": "api",
    "export": "api",
    "generate": "api",
    "inspect": "api",
    "load": "api",
    "masked": "api",
    "methods": "api",
    "plan": "api",
    "prune": "api",
    "prune_": "api",
    "push": "api",
    "recover": "api",
    "serve": "api",
    "study": "api",
    "sweep": "api",
    "tune": "api",
    "write_report": "api",
}

__all__ = [
    "Bench",
    "Comparison",
    "Evaluation",
    "Export",
    "Findings",
    "Generation",
    "HistoryError",
    "InputError",
    "Inspection",
    "Plan",
    "PrunekitError",
    "Recipe",
    "Recovery",
    "Report",
    "Result",
    "StorageError",
    "Sweep",
    "Tuned",
    "VerificationError",
    "Windows",
    "bench",
    "compare",
    "draw_weight",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "masked",
    "methods",
    "plan",
    "prune",
    "prune_",
    "push",
    "recover",
    "serve",
    "study",
    "sweep",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunekit' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
