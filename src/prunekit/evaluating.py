"""`evaluate`: what a model does on texts and tasks, and what it did before it was pruned.

Perplexity is streamed, a block in memory at a time; two models go one after the other over the same windows and meet at their heads.
Tasks need a whole model in memory, one at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import machine
from .calibration.text import documents
from .calibration.windows import check_vocabulary, evaluation_windows, load_tokenizer, window_length
from .checkpoint.locate import locate
from .checkpoint.storage import write_json
from .checkpoint.writer import EVALUATION_NAME
from .errors import InputError
from .evaluation.interval import difference_interval, ratio_interval
from .evaluation.perplexity import paired_losses, perplexity_of, walked, window_losses
from .evaluation.record import EvaluationRecord, TaskFigures, TextFigures
from .evaluation.tasks import Item, Scored, file_tasks, read_task, score_items
from .loading import DENSE, load_model
from .model.modules import evaluating
from .model.source import ResidentModel, StreamedModel
from .model.stream import Walk, Windows
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_TEXT = "none"


@dataclass(frozen=True)
class Opened:
    """A model to evaluate, and what it takes to open it again."""

    name: str
    source: StreamedModel | ResidentModel
    tokenizer: Any

    @classmethod
    def folder_of(
        cls,
        name: str,
        *,
        dtype: str,
        device: str,
        revision: str | None,
        trust_remote_code: bool,
        progress: Progress,
        runtime: str = DENSE,
    ) -> Opened:
        """A folder, a hub id, or `smollm2-135m`. Raises `InputError`."""
        folder = locate(name, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
        source: StreamedModel | ResidentModel
        if runtime == DENSE:
            source = StreamedModel.open(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        else:
            model = load_model(folder, dtype=dtype, device=device, runtime=runtime, trust_remote_code=trust_remote_code)
            source = ResidentModel(model, packed=True)
        return cls(name, source, load_tokenizer(folder, trust_remote_code=trust_remote_code))

    def whole(self, trust_remote_code: bool) -> PreTrainedModel:
        """The model itself, all of it in memory. Raises `InputError` where it does not fit."""
        if isinstance(self.source, ResidentModel):
            return self.source.module
        dtype, device = str(self.source.dtype).removeprefix("torch."), str(self.source.device)
        return load_model(self.source.reader.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. `seconds` is that of the perplexities, `peak_rss_bytes` of everything."""

    model: str
    against: str | None
    texts: tuple[TextFigures, ...]
    tasks: tuple[TaskFigures, ...]
    seconds: float
    peak_rss_bytes: int

    @property
    def perplexity(self) -> float:
        """Of the first text; NaN where there was none."""
        return self.texts[0].perplexity if self.texts else math.nan

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints; those of the first text stand by themselves, too."""
        first = self.texts[0] if self.texts else None
        tasks: dict[str, dict[str, Any]] = {}
        for row in self.tasks:
            shown = tasks.setdefault(row.task, {"n": row.n, "metrics": {}})
            shown["metrics"][row.metric] = row.model_dump(exclude={"task", "metric", "n"})
            if row.metric == "acc":
                shown |= {"accuracy": row.value, "stderr": row.stderr}
        tokens = sum(row.tokens for row in self.texts)
        return {
            "model": self.model,
            "against": self.against,
            "perplexity": None if first is None else first.perplexity,
            "windows": None if first is None else first.windows,
            "length": None if first is None else first.length,
            "tokens": tokens,
            "predictions": sum(row.predictions for row in self.texts),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "tokens_per_second": tokens / self.seconds if tokens else None,
            "texts": [row.model_dump() for row in self.texts],
            "tasks": tasks,
        }

    def save(self, folder: Path) -> Path:
        """Keep the figures as `evaluation.json` in a model's folder, where its page and card find them."""
        path = folder / EVALUATION_NAME
        record = EvaluationRecord(model=self.model, against=self.against, texts=self.texts, tasks=self.tasks)
        write_json(path, {**record.model_dump(), "versions": machine.versions()})
        return path


@torch.inference_mode()
def on_texts(
    model: Opened,
    against: Opened | None,
    texts: Sequence[str],
    *,
    length: int | None,
    samples: int | None,
    progress: Progress,
) -> list[TextFigures]:
    """Perplexity on every text, all of them in one walk over each model. Raises `InputError`."""
    if samples is not None and samples < 1:
        raise InputError(f"samples {samples} is no number of windows: give 1 or more")
    width = window_length(model.source.module.config, length, progress)
    cut = [_windows(text, model, against, width, samples) for text in texts]
    windows = Windows(torch.cat([part.ids for part in cut]))
    walks = [Walk(one.source, windows) for one in (model, against) if one is not None]
    machine.return_memory()
    progress.start("perplexity", sum(len(walk.source.anatomy.blocks) for walk in walks) + 1)
    with ExitStack() as stack:
        behind = []
        for walk in walks:
            stack.enter_context(evaluating(walk.source.module))
            behind.append(stack.enter_context(walked(walk, progress.step)))
        counts = [len(part) for part in cut]
        if against is None:
            losses = window_losses(walks[0], behind[0])
            found = [_alone(text, part, width) for text, part in zip(texts, torch.split(losses, counts), strict=True)]
        else:
            sums = paired_losses(walks[0], behind[0], walks[1], behind[1])
            parts = torch.split(torch.stack([sums.losses, sums.before, sums.divergence, sums.changed]), counts, dim=1)
            found = [_paired(text, part, width) for text, part in zip(texts, parts, strict=True)]
    progress.step()
    progress.stop()
    return found


def _windows(text: str, model: Opened, against: Opened | None, length: int, samples: int | None) -> Windows:
    read = documents(text, "evaluation")
    windows = evaluation_windows(read, model.tokenizer, length=length, samples=samples)
    check_vocabulary(windows, model.source.module)
    if against is not None:
        theirs = evaluation_windows(read, against.tokenizer, length=length, samples=samples)
        if not torch.equal(windows.ids, theirs.ids):
            raise InputError(
                f"'{model.name}' and '{against.name}' cut '{text}' into different tokens: perplexities per token can be compared "
                "only between models with the same tokenizer"
            )
        check_vocabulary(windows, against.source.module)
    return windows


def _alone(text: str, losses: torch.Tensor, length: int) -> TextFigures:
    windows = len(losses)
    perplexity = perplexity_of(losses, windows * (length - 1))
    return TextFigures(text=text, length=length, windows=windows, perplexity=perplexity)


def _paired(text: str, sums: torch.Tensor, length: int) -> TextFigures:
    losses, before, divergence, changed = sums
    alone = _alone(text, losses, length)
    paired = {
        "before": perplexity_of(before, alone.predictions),
        "ratio_interval": ratio_interval(losses.numpy(), before.numpy(), length - 1),
        "kl": float(divergence.sum()) / alone.predictions,
        "top1_changed": float(changed.sum()) / alone.predictions,
    }
    return alone.model_copy(update=paired)


def check_tasks(tasks: Sequence[str], limit: int | None) -> tuple[dict[str, list[Item]], list[str]]:
    """The questions of the tasks that are files, by name, and the harness's tasks, as named.

    Raises `InputError` for what can be told without a model.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is no number of questions: give 1 or more")
    files, others = file_tasks(tasks)
    if others:
        from .evaluation.harness import check_known

        check_known(others)
    return {name: read_task(path, limit) for name, path in files.items()}, others


def on_tasks(
    model: Opened,
    against: Opened | None,
    files: Mapping[str, Sequence[Item]],
    others: Sequence[str],
    *,
    limit: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> list[TaskFigures]:
    """Every metric of every task: files by our own scoring, `others` by lm-evaluation-harness. Raises `InputError`."""
    sides = []
    for one in (model, against):
        if one is not None:
            sides.append(_score_all(one, files, others, limit, trust_remote_code, progress))
            machine.let_go()  # the next model is refused where two of them would not fit
    before = sides[1] if against is not None else {}
    return [row for name, scored in sides[0].items() for row in _task_rows(scored, before.get(name))]


def _score_all(
    opened: Opened,
    files: Mapping[str, Sequence[Item]],
    others: Sequence[str],
    limit: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Scored]:
    model = opened.whole(trust_remote_code)
    found = {}
    with evaluating(model):
        for name, items in files.items():
            found[name] = score_items(name, items, model, opened.tokenizer, progress=progress)
        if others:
            from .evaluation.harness import score_tasks

            progress.say(f"{', '.join(others)}: by lm-evaluation-harness, on {opened.name}")
            found |= score_tasks(model, opened.tokenizer, others, limit=limit)
    return found


def _task_rows(after: Scored, before: Scored | None) -> list[TaskFigures]:
    rows = []
    for metric, figure in after.metrics.items():
        row = TaskFigures(task=after.task, metric=metric, n=after.n, value=figure.value, stderr=figure.stderr)
        if before is not None:
            other = before.metrics[metric]
            interval = None
            if figure.values is not None and other.values is not None:
                interval = difference_interval(figure.values, other.values)
            row = row.model_copy(update={"before": other.value, "difference_interval": interval})
        rows.append(row)
    return rows


def evaluate(
    model: Opened,
    against: Opened | None,
    *,
    texts: Sequence[str],
    tasks: Sequence[str],
    length: int | None,
    samples: int | None,
    limit: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Evaluation:
    """Texts, then tasks. Raises `InputError`."""
    texts = [text for text in texts if text != NO_TEXT]
    if not texts and not tasks:
        raise InputError("there is nothing to evaluate: give --text, --tasks or both")
    files, others = check_tasks(tasks, limit)
    begun = time.perf_counter()
    on = on_texts(model, against, texts, length=length, samples=samples, progress=progress) if texts else []
    seconds = time.perf_counter() - begun
    scored = []
    if tasks:
        scored = on_tasks(
            model, against, files, others, limit=limit, trust_remote_code=trust_remote_code, progress=progress
        )
    name = None if against is None else against.name
    return Evaluation(model.name, name, tuple(on), tuple(scored), seconds, machine.peak_rss_bytes())
