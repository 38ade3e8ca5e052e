"""Any task of lm-evaluation-harness by name, or by its own task file: the loaded model is handed over, the figures are theirs."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, first_line
from .tasks import Figure, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 8
_SUFFIXES = (".yaml", ".yml")


def check_known(names: Sequence[str]) -> None:
    """Raise `InputError` where there is no harness, or it has no such task."""
    if find_spec("lm_eval") is None:
        raise InputError(
            f"task '{names[0]}' is no .jsonl file, and tasks by name are those of lm-evaluation-harness: "
            "pip install 'prunekit[eval]'"
        )
    known = _manager().all_tasks
    for name in names:
        if Path(name).suffix in _SUFFIXES:
            if not Path(name).is_file():
                raise InputError(f"task file '{name}' does not exist")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise InputError(f"task '{name}' is unknown to lm-evaluation-harness: {hint}`lm-eval ls tasks` lists them")


def score_tasks(
    model: PreTrainedModel, tokenizer: Any, names: Sequence[str], *, limit: int | None = None
) -> dict[str, Scored]:
    """The harness's own figures for each task, group members by themselves.

    Args:
        model: in memory, on its device.
        tokenizer: the model's.
        names: of tasks, groups or tags; or task files (`.yaml`); `check_known` has seen them.
        limit: only the first so many questions of each.

    Raises:
        InputError: a task's data cannot be had, or its file is wrong.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's, about itself
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
                tasks=list(names),
                limit=limit,
                task_manager=_manager(),
            )
        except (OSError, ValueError, KeyError) as problem:  # data that cannot be had, task files that are wrong
            raise InputError(f"lm-evaluation-harness cannot score {', '.join(names)}: {first_line(problem)}") from None
    return {task: _scored(task, results, found) for task, results in found["results"].items()}


@cache
def _manager() -> Any:
    """The harness's list of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _scored(task: str, results: Mapping[str, Any], found: Mapping[str, Any]) -> Scored:
    """The harness names a figure `metric,filter`, its error `metric_stderr,filter`."""
    samples = found.get("samples", {}).get(task, [])
    metrics = {}
    for key, value in results.items():
        metric, _, variant = key.partition(",")
        if not variant or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{variant}")
        values = [sample.get(metric) for sample in samples if sample.get("filter", variant) == variant]
        paired = len(values) > 1 and all(isinstance(one, (int, float)) for one in values)
        # only a plain mean over questions can be drawn again question by question
        means = paired and bool(np.isclose(np.mean(values), value))
        metrics[metric if variant == "none" else f"{metric} ({variant})"] = Figure(
            float(value),
            float(error) if isinstance(error, (int, float)) else None,
            np.asarray(values, dtype=np.float64) if means else None,
        )
    return Scored(task, len(samples), metrics)
