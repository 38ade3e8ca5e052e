"""`evaluation.json`: what was measured of an output folder, beside the model it was measured before and after.

    {"model": "pruned", "against": "smollm2-135m",
     "texts": [{"text": "wikitext2", "length": 1024, "windows": 64, "perplexity": 29.0,
                "before": 15.9, "ratio_interval": [1.79, 1.85], "kl": 0.61, "top1_changed": 0.31}],
     "tasks": [{"task": "arc_easy", "metric": "acc_norm", "n": 2376, "value": 0.51, "stderr": 0.01,
                "before": 0.55, "difference_interval": [-0.06, -0.03]}]}

Whoever evaluates writes it; the page, the model card and comparisons read it. Names that are not listed here are passed over.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..checkpoint.writer import EVALUATION_NAME
from ..errors import InputError


class TextFigures(BaseModel):
    """A text's figures. All that needs a model to compare with is None where there was none.

    Attributes:
        perplexity: exp of the mean over `predictions` = windows × (length − 1).
        before: perplexity of the model that was pruned.
        ratio_interval: 95 % interval of perplexity / before.
        kl: mean Kullback-Leibler divergence of the predictions from those before, in nats.
        top1_changed: fraction of predictions whose likeliest token is another one.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    length: int
    windows: int
    perplexity: float
    before: float | None = None
    ratio_interval: tuple[float, float] | None = None
    kl: float | None = None
    top1_changed: float | None = None

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows * self.length

    @property
    def predictions(self) -> int:
        """What perplexity is the mean over."""
        return self.windows * (self.length - 1)

    @property
    def ratio(self) -> float | None:
        """How many times the perplexity of before; None where that is not known."""
        return None if self.before is None else self.perplexity / self.before


class TaskFigures(BaseModel):
    """One metric of a task.

    Attributes:
        n: questions.
        value, before: fractions of the questions.
        stderr: standard error of `value`; None where there is one question, or the task's harness gives none.
        difference_interval: 95 % interval of value − before; None where they are no means over questions.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    n: int
    value: float
    stderr: float | None = None
    before: float | None = None
    difference_interval: tuple[float, float] | None = None


class EvaluationRecord(BaseModel):
    """All that was measured of a model, and what it was held against."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    against: str | None = None

    texts: tuple[TextFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()


def read_record(folder: Path) -> EvaluationRecord | None:
    """The record of an output folder, or None where there is none. Raises `InputError` where it cannot be understood."""
    path = folder / EVALUATION_NAME
    if not path.is_file():
        return None
    try:
        return EvaluationRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"'{path}' cannot be read: {place}: {first['msg']}. Evaluate again, or remove it") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"'{path}' cannot be read: {problem}. Evaluate again, or remove it") from None
