"""`tune`: search for the recipe whose zeros cost least.

    OUT/tune.json       what was asked for, and what was found
    OUT/study.log       every trial, as Optuna's journal: what a killed search goes on from, and what several processes share
    OUT/recipe.toml     the best recipe, for `prunekit prune --recipe`
    OUT/trials.jsonl    a line a trial
    OUT/tune.md, history.svg, front.svg

A trial prunes the model block by block and sends windows of two other texts through the blocks as they are pruned, so no model is
written. By the perplexity on one of them, recipes are chosen; that on the other is looked at when the search is over. Neither shares a
passage with the calibration.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import machine
from .bits import count_zeros
from .calibration.text import documents
from .calibration.windows import check_vocabulary, recipe_windows, token_hash, window_length
from .checkpoint.lock import locked
from .checkpoint.output import usable
from .checkpoint.storage import make_folder, write_json, write_text
from .distributed import Ranks, among_several
from .errors import HistoryError, InputError, PrunekitError, StorageError
from .evaluation.perplexity import perplexity_of, window_losses
from .jobs import check_options, job_of
from .model.source import StreamedModel
from .model.stream import Walk, Windows
from .opening import find_model, open_model, open_tokenizer
from .progress import Progress, Silent
from .recipe import Recipe
from .report.plots import check_drawable, draw_front, draw_search
from .report.tuned import as_markdown
from .search.recipes import RecipeSpace, values_of
from .search.texts import windows_apart
from .search.tpe import (
    START,
    ask,
    complete,
    give_up,
    importances,
    line_up,
    noted,
    open_study,
    require_optuna,
    under_way,
)

if TYPE_CHECKING:
    import optuna

STUDY_NAME, SETTINGS_NAME, RECIPE_NAME = "study.log", "tune.json", "recipe.toml"
TRIALS_NAME, PAGE_NAME, HISTORY_NAME, FRONT_NAME = "trials.jsonl", "tune.md", "history.svg", "front.svg"
_WORST = 700.0  # the value of what cannot be pruned, as a loss


@dataclass(frozen=True)
class Tuning:
    """What is searched.

    Attributes:
        base: a recipe's values that no trial changes: model, target, calibration, seed, dtype, device.
        space: names of a recipe and what each may be; see `search/recipes.py`.
        trials: how many recipes are tried.
        presets: methods of the catalogue that are tried as they are before anything is drawn.
        text, samples: what recipes are chosen by, and how many windows of it; empty for the calibration text.
        test, test_samples: what the best and the presets are compared on in the end.
    """

    base: dict[str, Any]
    space: dict[str, Any]
    trials: int
    presets: tuple[str, ...]
    text: str
    samples: int
    test: str
    test_samples: int

    @property
    def recipe(self) -> Recipe:
        """A recipe of the base."""
        return Recipe.build({"method": "wanda", **self.base})

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a search to go on; there may be more trials, and another path to the same model."""
        plain = asdict(self)
        del plain["trials"], plain["base"]["model"]
        return {**json.loads(json.dumps(plain)), "versions": machine.versions()}


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried. `refused` says why it has no figures, where that is so.

    Attributes:
        loss, test: mean negative log-likelihood on the text that recipes are chosen by, and on the other one.
        seconds: of pruning; `sparsity` is what came of it.
    """

    number: int
    point: dict[str, Any]
    preset: str | None
    recipe: dict[str, Any]
    loss: float
    test: float
    seconds: float
    sparsity: float
    refused: str | None

    @property
    def perplexity(self) -> float:
        """On the text that recipes are chosen by."""
        return perplexity_of(torch.tensor([self.loss]), 1)

    @property
    def test_perplexity(self) -> float:
        """On the text that nobody looked at."""
        return perplexity_of(torch.tensor([self.test]), 1)

    def line(self) -> dict[str, Any]:
        """As `trials.jsonl` has it; JSON has no word for infinity."""
        figures = {"perplexity": self.perplexity, "test_perplexity": self.test_perplexity}
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        kept = {name: value for name, value in asdict(self).items() if name not in ("loss", "test")}
        return {**kept, **plain}


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        best: the trial with the least perplexity on the text that recipes are chosen by.
        front: trials that no other beats both in that perplexity and in time, fastest first.
        presets: the trials of methods as they are.
        importance: the share each name of a recipe has in how trials differ; empty where too few were tried.
        dense: perplexity of the model as it is, on both texts.
    """

    out: Path
    tuning: Tuning
    trials: list[Trial]
    best: Trial
    front: list[Trial]
    importance: dict[str, float]
    dense: tuple[float, float]
    tokens: dict[str, str]
    seconds: float

    @property
    def presets(self) -> list[Trial]:
        """Methods as they stand in the catalogue."""
        return [trial for trial in self.trials if trial.preset is not None]

    @property
    def course(self) -> list[tuple[int, float]]:
        """Perplexity of every trial that has one, by its place."""
        return [(place, trial.perplexity) for place, trial in enumerate(self.trials, 1) if trial.refused is None]

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints and `tune.json` holds."""
        return {
            "out": str(self.out),
            "model": self.tuning.base["model"],
            "target": self.tuning.recipe.asked,
            "trials": len(self.trials),
            "refused": sum(trial.refused is not None for trial in self.trials),
            "best": self.best.line(),
            "presets": [trial.line() for trial in self.presets],
            "front": [trial.line() for trial in self.front],
            "importance": self.importance,
            "dense": dict(zip(("perplexity", "test_perplexity"), self.dense, strict=True)),
            "text": self.tuning.text or self.tuning.recipe.calibration.source,
            "test": self.tuning.test,
            "tokens_sha256": self.tokens,
            "recipe": str(self.out / RECIPE_NAME),
            "seconds": self.seconds,
        }


@dataclass
class Bench:
    """A model and three texts, ready to try recipes on."""

    source: StreamedModel
    calibration: Windows
    judged: Windows
    test: Windows
    _texts: Windows = field(init=False)

    def __post_init__(self) -> None:
        self._texts = Windows(torch.cat([self.judged.ids, self.test.ids]))

    @classmethod
    def of(cls, tuning: Tuning, progress: Progress) -> Bench:
        """Raises `InputError` for what is wrong with model or texts."""
        recipe = tuning.recipe
        folder = find_model(recipe, progress)
        source = open_model(recipe, folder)
        tokenizer = open_tokenizer(recipe, folder)
        length = window_length(source.module.config, recipe.calibration.length, progress)
        windows = recipe_windows(recipe, tokenizer, length=length)
        draw = partial(windows_apart, tokenizer=tokenizer, length=length, seed=recipe.seed)
        judged = draw(
            documents(tuning.text or recipe.calibration.source, "calibration"),
            samples=tuning.samples,
            apart_from=[windows],
            what="what recipes are chosen by",
            advice="give another --text, or fewer --text-samples",
        )
        test = draw(
            documents(tuning.test, "evaluation"),
            samples=tuning.test_samples,
            apart_from=[windows, judged],
            what="what the best is tested on",
            advice="give another --test, or fewer --test-samples",
        )
        for some in (windows, judged, test):
            check_vocabulary(some, source.module)
        machine.return_memory()
        return cls(source, windows, judged, test)

    @property
    def tokens(self) -> dict[str, str]:
        """sha256 of the tokens of each text."""
        return {name: token_hash(getattr(self, name)) for name in ("calibration", "judged", "test")}

    @torch.inference_mode()
    def dense(self) -> tuple[float, float]:
        """Mean loss of the model as it is, on the text that recipes are chosen by and on the other."""
        walk = Walk(self.source, self._texts)
        walk.prepare()
        with walk.room() as hidden:
            walk.start(hidden)
            walk.run_all()
            return self._means(walk, hidden)

    def try_recipe(self, recipe: Recipe) -> tuple[float, float, float, float]:
        """The same of the model a recipe makes, the seconds that pruning takes, and the share of zeros.

        Raises `InputError` for what the recipe cannot do with this model.
        """
        job = job_of(recipe, self.source)
        walk = Walk(self.source, self.calibration, recipe.calibration.batch)
        work = job.work(walk, dense=recipe.calibration.mode == "dense", ranks=Ranks(), first=0, total=None)
        spent, zeros, weights = 0.0, 0, 0
        begun = time.perf_counter()
        work.prepare()
        if work.looks_ahead:
            work.look_ahead(None, self.source.stored_of, Silent().step)
        work.start()
        spent += time.perf_counter() - begun
        evaluation = Walk(self.source, self._texts)
        with torch.inference_mode(), ExitStack() as stack:
            evaluation.prepare()
            hidden = stack.enter_context(evaluation.room())
            evaluation.start(hidden)
            for block in self.source.anatomy.blocks:
                module = self.source.load_block(block.index)
                self.source.prefetch(block.index + 1)
                begun = time.perf_counter()
                work.prune_block(block, module, self.source.stored_of)
                work.pass_on(block.index, module)
                spent += time.perf_counter() - begun
                for linear in block.linears:
                    zeros += count_zeros(self.source.stored_of(linear)[0])
                    weights += linear.count
                evaluation.run(block.index, module)
                self.source.free_block(block.index)
                machine.return_memory()
            work.release()
            loss, test = self._means(evaluation, hidden)
        return loss, test, spent, zeros / weights

    def _means(self, walk: Walk, hidden: Any) -> tuple[float, float]:
        losses = window_losses(walk, hidden) / (walk.windows.length - 1)
        chosen_by = len(self.judged)
        return float(losses[:chosen_by].mean()), float(losses[chosen_by:].mean())


def tune_recipes(
    tuning: Tuning,
    out: Path,
    *,
    workers: int = 1,
    run_elsewhere: Callable[[Callable[[], bool]], None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search, or go on with what was begun in `out`, and write what was found.

    Args:
        tuning: what to search.
        out: the folder of the search.
        workers: processes on this machine, which share the study.
        run_elsewhere: carries the trials out on other machines until `done()`, which it is given, says so; see `on_ray.py`.
        progress: told what is going on.

    With one process, equal seeds make equal trials, wherever a kill came between.

    Raises:
        InputError: something in the input is wrong; nothing was written.
        HistoryError: `out` holds another search, or one that is damaged; nothing was changed.
        StorageError: a result could not be written.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    require_optuna()
    check_drawable(out / HISTORY_NAME)
    _refuse(tuning, workers)
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"output '{out}' is a file: choose another --out")
    _refuse_other(out)
    bench = Bench.of(tuning, progress)
    with _taken(out):
        inputs = bench.source.reader.sha256()
        study = open_study(out / STUDY_NAME, {**tuning.identity, "tokens": bench.tokens, "inputs": inputs})
        for trial in complete(study):
            _trial(trial)
        _line_up_presets(study, tuning)
        write_json(out / SETTINGS_NAME, {"asked": asdict(tuning)})
        dense = _dense(study, bench)
        done = len(complete(study))
        if done:
            progress.say(f"resuming: {done} of {tuning.trials} trials are done")
        progress.start("tune", max(0, tuning.trials - done))
        told = _Told(progress, done)
        try:
            if run_elsewhere is not None:
                run_elsewhere(lambda: told.up_to(complete(study)) >= tuning.trials)
            else:
                with _helpers(out, workers - 1, progress):
                    work_on(study, tuning, bench, told=told)
        except (KeyboardInterrupt, StorageError):
            progress.stop()
            progress.say(
                f"stopped: {len(complete(study))} of {tuning.trials} trials in '{out}' are done; the same command goes on"
            )
            raise
        _line_up_presets(study, tuning)  # what a helper that died left undone
        work_on(study, tuning, bench, told=told)
        progress.stop()
        return _found(tuning, out, study, bench, dense, time.perf_counter() - begun)


def work_on(study: optuna.Study, tuning: Tuning, bench: Bench, *, told: _Told | None = None) -> None:
    """Try recipes until there are as many trials as were asked for."""
    space = RecipeSpace.of(tuning.space)
    who = f"{socket.gethostname()} {os.getpid()}"
    while True:
        done = complete(study)
        if told is not None:
            told.up_to(done)
        place = len(done) + len(under_way(study))
        if place >= tuning.trials:
            return
        trial = ask(study, tuning.recipe.seed, place)
        preset = trial.user_attrs.get(START)
        if (
            preset is None
            and sum(other.number < trial.number for other in [*complete(study), *under_way(study)]) != place
        ):
            give_up(study, trial.number)  # another process has just taken the place, and would draw the same
            continue
        trial.set_user_attr("worker", who)
        point = space.drawn(trial, settled=preset is not None)
        _tell(study, trial, _tried(point, tuning, bench), point)


@dataclass
class _Told:
    """How many trials the progress was told of."""

    progress: Progress
    count: int = 0

    def up_to(self, done: Sequence[optuna.trial.FrozenTrial]) -> int:
        """Tell it of those that are new; returns how many there are."""
        values = [trial.value for trial in done if trial.value is not None]
        for _ in range(len(done) - self.count):
            self.progress.step(f"best {math.exp(min(values)):.2f}" if values and min(values) < _WORST else "")
        self.count = max(self.count, len(done))
        return len(done)


def _refuse(tuning: Tuning, workers: int) -> None:
    if tuning.trials < 1 or workers < 1:
        raise InputError(f"{tuning.trials} trials in {workers} processes are no search: give 1 or more of each")
    if tuning.samples < 1 or tuning.test_samples < 1:
        raise InputError(
            f"{tuning.samples} --text-samples and {tuning.test_samples} --test-samples judge nothing: give 1 or more of each"
        )
    if among_several():
        raise InputError("trials are shared out by --workers or --ray, not by torchrun: start tune without it")
    space = RecipeSpace.of(tuning.space)
    if tuning.recipe.removes:
        raise InputError("tune searches recipes that zero weights: for structures there are search-llm and adapruner")
    if not space.methods:
        raise InputError('the space names no methods: give it a list of them, like method = ["wanda", "ria"]')
    for preset in tuning.presets:
        if preset not in space.methods:
            raise InputError(
                f"preset '{preset}' is no method of the space, which has {', '.join(space.methods)}: leave it out of --presets"
            )
        check_options(Recipe.build(values_of(space.settled(preset), tuning.base)))


def _refuse_other(out: Path) -> None:
    if (
        (out / STUDY_NAME).exists()
        or not out.is_dir()
        or not any(path.name != ".prunekit-lock" for path in out.iterdir())
    ):
        return
    if not (out / SETTINGS_NAME).exists():
        raise InputError(f"output folder '{out}' holds other things: choose another --out")


@contextmanager
def _taken(out: Path) -> Iterator[None]:
    """Make the folder and lock it meanwhile."""
    with ExitStack() as held:
        with usable(out):
            make_folder(out)
            held.enter_context(locked(out))
        yield


def _dense(study: optuna.Study, bench: Bench) -> tuple[float, float]:
    """Perplexity of the dense model, measured once."""
    known = study.user_attrs.get("dense")
    if known is None:
        known = list(bench.dense())
        study.set_user_attr("dense", known)
    return math.exp(known[0]), math.exp(known[1])


def _line_up_presets(study: optuna.Study, tuning: Tuning) -> None:
    """Have the methods that have not been tried as they are tried next."""
    space = RecipeSpace.of(tuning.space)
    tried = {trial.user_attrs.get(START) for trial in complete(study)}
    line_up(study, {preset: space.settled(preset) for preset in tuning.presets if preset not in tried})


def _tried(point: Mapping[str, Any], tuning: Tuning, bench: Bench) -> dict[str, Any]:
    """What came of a point, as plain data."""
    try:
        recipe = Recipe.build(values_of(point, tuning.base))
        check_options(recipe)
    except InputError as problem:
        return {"refused": str(problem)}
    shown = {"recipe": recipe.model_dump(mode="json", exclude_unset=True)}
    try:
        loss, test, seconds, sparsity = bench.try_recipe(recipe)
    except StorageError:
        raise
    except PrunekitError as problem:
        for block in bench.source.anatomy.blocks:
            bench.source.free_block(block.index)
        return {**shown, "refused": str(problem)}
    if not (math.isfinite(loss) and math.isfinite(test)):
        return {**shown, "refused": "what it leaves of the model has losses that are not finite: try --dtype float32"}
    return {**shown, "loss": loss, "test": test, "seconds": seconds, "sparsity": sparsity}


def _tell(study: optuna.Study, trial: optuna.Trial, figures: Mapping[str, Any], point: Any) -> None:
    for name, value in {**figures, "point": point}.items():
        trial.set_user_attr(name, value)
    study.tell(trial, _value(figures))


def _value(figures: Mapping[str, Any]) -> float:
    """What the search minimises."""
    return float(min(figures.get("loss", _WORST), _WORST))


@contextmanager
def _helpers(out: Path, count: int, progress: Progress) -> Iterator[None]:
    """Other processes that work on the same study; they end when it does."""
    context = get_context("spawn")  # a process with threads must not be copied
    helpers = [context.Process(target=_help, args=(out,), daemon=True) for _ in range(count)]
    for helper in helpers:
        helper.start()
    try:
        yield
        for helper in helpers:
            helper.join()
            if helper.exitcode:
                progress.say("a process of the search ended early: what it left undone is done here")
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(out: Path) -> None:
    """Work on the study as the helper of another process, and never longer than that lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; who started this one ends it
    main = parent_process()
    assert main is not None

    def leave_with_main() -> None:
        main.join()
        os._exit(1)  # from a thread there is no other way out

    threading.Thread(target=leave_with_main, daemon=True).start()
    try:
        help_with(out)
    except PrunekitError as problem:
        sys.exit(str(problem))


def help_with(out: Path, threads: int | None = None) -> None:
    """Work on the study in a folder, in a process of its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    tuning = _asked(out)
    bench = Bench.of(tuning, Silent())
    study = open_study(out / STUDY_NAME, {**tuning.identity, "tokens": bench.tokens}, alone=False)
    work_on(study, tuning, bench)


def _asked(out: Path) -> Tuning:
    try:
        asked = json.loads((out / SETTINGS_NAME).read_text(encoding="utf-8"))["asked"]
        return Tuning(**{**asked, "presets": tuple(asked["presets"])})
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise HistoryError(f"'{out / SETTINGS_NAME}' cannot be read as a search that was begun ({problem})") from None


def _found(
    tuning: Tuning, out: Path, study: optuna.Study, bench: Bench, dense: tuple[float, float], seconds: float
) -> Tuned:
    trials = [_trial(frozen) for frozen in complete(study)][: tuning.trials]
    good = [trial for trial in trials if trial.refused is None]
    if not good:
        raise InputError(f"none of {len(trials)} recipes could be tried; the first said: {trials[0].refused}")
    best = min(good, key=lambda trial: (trial.loss, trial.number))
    front = [
        trial
        for trial in sorted(good, key=lambda trial: (trial.seconds, trial.loss))
        if not any(
            other.loss <= trial.loss
            and other.seconds <= trial.seconds
            and (other.loss, other.seconds) != (trial.loss, trial.seconds)
            for other in good
        )
    ]
    shares = importances(study, [trial.number for trial in good])
    found = Tuned(out, tuning, trials, best, front, shares, dense, bench.tokens, seconds)
    write_text(out / TRIALS_NAME, "".join(json.dumps(trial.line(), ensure_ascii=False) + "\n" for trial in trials))
    write_text(out / RECIPE_NAME, Recipe.build(best.recipe).to_toml())
    title = f"{tuning.base['model']} at {tuning.recipe.asked}"
    draw_search(found.course, dense[0], out / HISTORY_NAME, title=title)
    draw_front([(t.seconds, t.perplexity, t in front) for t in good], dense[0], out / FRONT_NAME, title=title)
    write_text(out / PAGE_NAME, as_markdown(found.summary()))
    write_json(out / SETTINGS_NAME, {"asked": asdict(tuning), "found": found.summary()})
    return found


def _trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    """A trial as it was noted. Raises `HistoryError` where it was not as it is."""
    told = frozen.user_attrs
    if frozen.value != _value(told):
        raise HistoryError(
            f"trial {frozen.number} of the study has the value {frozen.value}, and what was noted of it does not come to that: the "
            "file was damaged and left as it is; begin again elsewhere"
        )
    return Trial(
        number=frozen.number,
        point=noted(frozen, "point"),
        preset=told.get(START),
        recipe=told.get("recipe", {}),
        loss=told.get("loss", math.inf),
        test=told.get("test", math.inf),
        seconds=told.get("seconds", 0.0),
        sparsity=told.get("sparsity", 0.0),
        refused=told.get("refused"),
    )
