"""`compare`: several methods on one model, the dense model measured once for all of them.

One walk in dense mode gathers what any of the methods reads. Behind each block's measuring pass every method prunes the block in turn,
sends its own copy of the evaluation windows through it, and the block is put back. So N methods cost one measuring pass, N times
choosing, and N evaluations; no model is written, and memory is that of one block and N times the evaluation's hidden states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import machine
from .binding import bind
from .blockwalk import LinearReport
from .calibration.text import documents
from .calibration.windows import check_vocabulary, evaluation_windows, recipe_windows, window_length
from .catalogue import find_method
from .checkpoint.output import usable
from .checkpoint.storage import make_folder, write_json, write_text
from .errors import InputError
from .evaluation.perplexity import perplexity_behind
from .model.anatomy import Block
from .model.hidden import HiddenStates
from .model.source import StreamedModel
from .model.stream import Walk, Windows
from .opening import find_model, open_model, open_tokenizer
from .progress import Progress, Silent
from .recipe import Recipe
from .report.comparison import as_markdown
from .report.plots import check_drawable, draw_comparison
from .sparsify.walk import Sparsification, SparsifyWalk

RESULT_NAME, TABLE_NAME, FIGURE_NAME = "compare.json", "compare.md", "compare.svg"


@dataclass(frozen=True)
class Compared:
    """One method's line. `output_error` is the mean over linears; `seconds` is choosing and refitting, `evaluation` its own pass."""

    method: str
    sparsity: float
    zeros: int
    perplexity: float
    output_error: float
    seconds: float
    evaluation: float


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        dense: perplexity of the model as it is.
        rows: one per method, in the order asked for.
        overlap: for every two methods, the weights both remove divided by those either removes; None where methods put channels into
            orders of their own, which leaves nothing to compare place by place.
        seconds: `measure` (once for all), `prune` and `evaluate` (over all methods), `total`.
    """

    model: str
    pattern: str
    windows: int
    length: int
    calibration: str
    text: str
    predictions: int
    dense: float
    rows: list[Compared]
    overlap: list[list[float]] | None
    seconds: dict[str, float]
    peak_rss_bytes: int

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints and `compare.json` holds."""
        return asdict(self)


def compare(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    text: str = "builtin:eval",
    samples: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare recipes that differ in their method alone.

    Args:
        recipes: at least one; all on the same model and calibration. Statistics are those of the dense model, whatever they say.
        out: folder for `compare.json`, `compare.md` and `compare.svg`.
        text: what perplexity is measured on.
        samples: use only the first so many windows of it.
        progress: told what is going on.

    Raises:
        InputError: the input is wrong; nothing was written.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    recipes = [_dense(recipe) for recipe in recipes]
    out = out.expanduser()
    _refuse(recipes, out)
    ground = _Ground.of(recipes, text, samples, progress)
    pruners = _pruners(recipes, ground, progress)
    evaluation = Walk(ground.source, ground.held_out)
    with ExitStack() as stack:
        evaluation.prepare()
        with usable(out):
            make_folder(out)
        streams = _streams(evaluation, 1 + len(recipes), stack)
        outcomes, both = _walk(ground.source, pruners, evaluation, streams, progress)
        dense, predictions = perplexity_behind(evaluation, streams[0])
        for outcome, stream in zip(outcomes, streams[1:], strict=True):
            outcome.score(evaluation, stream)
    progress.stop()
    rows = [
        _row(recipe.method, outcome, pruner.seconds.prune)
        for recipe, outcome, pruner in zip(recipes, outcomes, pruners, strict=True)
    ]
    own = both.diagonal()
    either = own[:, None] + own[None, :] - both
    moved = any(line.permuted for outcome in outcomes for line in outcome.linears)
    comparison = Comparison(
        model=recipes[0].model,
        pattern=str(recipes[0].target),
        windows=len(ground.windows),
        length=ground.windows.length,
        calibration=recipes[0].calibration.source,
        text=text,
        predictions=predictions,
        dense=dense,
        rows=rows,
        overlap=None if moved else torch.where(either > 0, both / either, 1.0).tolist(),
        seconds={
            "measure": sum(pruner.seconds.forward for pruner in pruners),
            "prune": sum(row.seconds for row in rows),
            "evaluate": sum(outcome.seconds for outcome in outcomes),
            "total": time.perf_counter() - begun,
        },
        peak_rss_bytes=machine.peak_rss_bytes(),
    )
    write_json(out / RESULT_NAME, comparison.summary())
    write_text(out / TABLE_NAME, as_markdown(comparison.summary()))
    draw_comparison(comparison.summary(), out / FIGURE_NAME)
    return comparison


def _refuse(recipes: Sequence[Recipe], out: Path) -> None:
    """Raise `InputError` for what can be seen to be wrong before anything is read."""
    names = [recipe.method for recipe in recipes]
    removing = next((recipe.method for recipe in recipes if recipe.removes), None)
    if removing is not None:
        raise InputError(
            f"'{removing}' removes structures, and compare puts every block back as it was: use a sweep with [evaluate]"
        )
    tuning = next((recipe.method for recipe in recipes if bind("tune", find_method(recipe.method), recipe.parts)), None)
    if tuning is not None:
        raise InputError(
            f"'{tuning}' tunes each block behind those that are pruned, and compare measures the dense model once: use a sweep with "
            "[evaluate]"
        )
    if len(set(names)) < len(names):
        raise InputError(f"method '{max(names, key=names.count)}' is named twice: name each once")
    check_drawable(out / FIGURE_NAME)
    with usable(out):
        if out.exists() and not out.is_dir():
            raise InputError(f"output '{out}' is a file: choose another --out")


@dataclass(frozen=True)
class _Ground:
    """What all methods have in common: the model, what it is measured on, and what perplexity is measured on."""

    source: StreamedModel
    jobs: list[Sparsification]
    windows: Windows
    held_out: Windows

    @classmethod
    def of(cls, recipes: Sequence[Recipe], text: str, samples: int | None, progress: Progress) -> _Ground:
        first = recipes[0]
        folder = find_model(first, progress)
        source = open_model(first, folder)
        tokenizer = open_tokenizer(first, folder)
        length = window_length(source.module.config, first.calibration.length, progress)
        jobs = [Sparsification.of(recipe, source.anatomy) for recipe in recipes]
        windows = recipe_windows(first, tokenizer, length=length)
        held_out = evaluation_windows(documents(text, "evaluation"), tokenizer, length=length, samples=samples)
        for tokens in (windows, held_out):
            check_vocabulary(tokens, source.module)
        machine.return_memory()
        return cls(source, jobs, windows, held_out)


@dataclass
class _Outcome:
    """What comes of one method; `seconds` are those of its evaluation."""

    linears: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
    perplexity: float = math.nan

    def pass_on(self, walk: Walk, hidden: HiddenStates, block: Block, module: nn.Module) -> None:
        """Send the texts through a block that the method has pruned."""
        begun = time.perf_counter()
        _pass_on(walk, hidden, block, module)
        self.seconds += time.perf_counter() - begun

    def score(self, walk: Walk, hidden: HiddenStates) -> None:
        """Take the perplexity behind the last block."""
        begun = time.perf_counter()
        self.perplexity, _ = perplexity_behind(walk, hidden)
        self.seconds += time.perf_counter() - begun


def _pruners(recipes: Sequence[Recipe], ground: _Ground, progress: Progress) -> list[SparsifyWalk]:
    """Every method, ready for the first block; all stand on one walk."""
    walk = Walk(ground.source, ground.windows, recipes[0].calibration.batch)
    walk.prepare()
    pruners = [job.work(walk, dense=True) for job in ground.jobs]
    for recipe, pruner in zip(recipes, pruners, strict=True):
        if pruner.looks_ahead:
            progress.start(f"{recipe.method}: {pruner.looks_ahead}", pruner.steps_ahead)
            pruner.look_ahead(None, ground.source.stored_of, progress.step)
    pruners[0].start()
    return pruners


def _walk(
    source: StreamedModel,
    pruners: Sequence[SparsifyWalk],
    evaluation: Walk,
    streams: Sequence[HiddenStates],
    progress: Progress,
) -> tuple[list[_Outcome], Tensor]:
    """Prune every block by every method, each from the dense block, and send the texts on: the first stream dense, then one a method.

    Returns what came of each method, and how many weights every two remove both, [methods, methods].
    """
    needs = frozenset().union(*(pruner.sparsifier.needs for pruner in pruners))
    outcomes = [_Outcome() for _ in pruners]
    both = torch.zeros(len(pruners), len(pruners), dtype=torch.float64)
    evaluation.start(streams[0])
    for stream in streams[1:]:
        for batch in evaluation.batches:
            stream[batch] = streams[0][batch]
        stream.turn()
    progress.start(f"comparing {len(pruners)} methods", len(source.anatomy.blocks))
    for block in source.anatomy.blocks:
        module = source.load_block(block.index)
        source.prefetch(block.index + 1)
        measured = pruners[0].measure(block, module, needs)
        _pass_on(evaluation, streams[0], block, module)
        zeros = []
        for pruner, outcome, stream in zip(pruners, outcomes, streams[1:], strict=True):
            with _as_it_was(source, block, module):
                outcome.linears += pruner.prune_measured(block, module, source.stored_of, measured)
                zeros.append(_zeros(source, block))
                outcome.pass_on(evaluation, stream, block, module)
        both += _common(zeros)
        source.free_block(block.index)
        machine.return_memory()
        progress.step(f"block {block.index}")
    return outcomes, both


def _dense(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"mode": "dense"})})


def _streams(walk: Walk, count: int, stack: ExitStack) -> list[HiddenStates]:
    return [stack.enter_context(walk.room()) for _ in range(count)]


@torch.inference_mode()
def _pass_on(walk: Walk, hidden: HiddenStates, block: Block, module: nn.Module) -> None:
    for position, batch in enumerate(walk.batches):
        hidden[batch] = walk.run_batch(block.index, module, position, hidden[batch])
    hidden.turn()


@contextmanager
def _as_it_was(source: StreamedModel, block: Block, module: nn.Module) -> Iterator[None]:
    """Put a block's tensors, in the module and as the checkpoint holds them, back to what they were."""
    places = [*module.parameters(), *source.stored[block.index].values()]
    tensors = {tensor.data_ptr(): tensor.detach() for tensor in places}
    before = {place: tensor.clone() for place, tensor in tensors.items()}
    try:
        yield
    finally:
        with torch.inference_mode():
            for place, tensor in tensors.items():
                tensor.copy_(before[place])


def _zeros(source: StreamedModel, block: Block) -> list[Tensor]:
    """Where a block's linears, as they would be written, hold zeros: flat, one per linear."""
    return [linear.matrix(source.stored_of(linear)[0]).eq(0).flatten() for linear in block.linears]


def _common(zeros: list[list[Tensor]]) -> Tensor:
    """How many weights every two methods both remove, over the linears of a block: [methods, methods]."""
    total = torch.zeros(len(zeros), len(zeros), dtype=torch.float64)
    for of_linear in zip(*zeros, strict=True):
        for left, mine in enumerate(of_linear):
            for right in range(left + 1):
                total[left, right] += int((mine & of_linear[right]).sum())
    return torch.maximum(total, total.t())


def _row(name: str, outcome: _Outcome, seconds: float) -> Compared:
    lines = outcome.linears
    errors = [line.output_error for line in lines if line.output_error is not None]
    zeros, weights = sum(line.zeros for line in lines), sum(line.weights for line in lines)
    error = sum(errors) / max(1, len(errors))
    return Compared(name, zeros / weights, zeros, outcome.perplexity, error, seconds, outcome.seconds)
