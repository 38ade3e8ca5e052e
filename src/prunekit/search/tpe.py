"""Tree-structured Parzen estimators, by Optuna (the extra `search`), which is imported here and nowhere else.

Optuna keeps its trials in a journal that several processes may share. A sampler's own state is in no storage, so for every trial there
is a new one, seeded by how many trials are complete: what a killed search would have drawn next is what it draws when it goes on.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.storage import append_text
from ..errors import HistoryError, InputError, StorageError, first_line
from .history import cut_torn_line, refuse_another
from .loop import Proposals

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal import JournalFileBackend

_NAME = "prunekit"
_IDENTITY = "identity"
_CANDIDATE = "candidate"
START = "start"
_STARTUP = 10  # trials that are drawn uniformly before any estimate is made


def require_optuna() -> None:
    """Raise `InputError` where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise InputError("this search needs Optuna, which is not installed: pip install 'prunekit[search]'")


def open_study(path: Path | None, identity: Mapping[str, Any], *, alone: bool = True) -> optuna.Study:
    """The study in a journal file, or a new one; in memory without a path.

    `alone` says that no other process uses the file now: what a killed one left half done is then put right. Otherwise names that
    `identity` lacks are not compared.
    Raises `HistoryError` for a file that is damaged or another study's, and leaves it as it is.
    """
    require_optuna()
    import optuna
    from optuna.storages import JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if path is None:
        return optuna.create_study(study_name=_NAME)
    plain = {**json.loads(json.dumps(identity)), "optuna": metadata.version("optuna")}  # which decides what is drawn
    try:
        storage = JournalStorage(_journal(path))
        if storage.get_all_studies():
            study = optuna.load_study(storage=storage, study_name=_NAME)
            begun = bool(study.get_trials(deepcopy=False))
        elif b"\n" in path.read_bytes():
            raise ValueError("it does not begin with one")
        else:
            study, begun = None, False
    except Exception as problem:  # whatever Optuna stumbles over in a file that is not as it wrote it
        raise HistoryError(
            f"'{path}' cannot be read as a study of Optuna ({first_line(problem)}): it was left as it is; "
            "begin again elsewhere, or remove it"
        ) from None
    if study is not None and (begun or _IDENTITY in study.user_attrs):
        theirs = study.user_attrs.get(_IDENTITY, {})
        refuse_another(path, theirs if alone else {name: theirs.get(name) for name in plain}, plain)
    if alone:
        cut_torn_line(path)
        for lock in path.parent.glob(f"{path.name}.lock*"):
            lock.unlink(missing_ok=True)  # of a process that was killed while it wrote
    if study is None:
        study = optuna.create_study(storage=storage, study_name=_NAME)
    if _IDENTITY not in study.user_attrs:
        study.set_user_attr(_IDENTITY, plain)
    return study


def _journal(path: Path) -> JournalFileBackend:
    """Optuna's file, which a full disk leaves as it was: behind half a line other processes would write on."""
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))

    class Journal(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                lock.acquire()
            except OSError as problem:
                raise StorageError(f"cannot lock '{path}': {problem.strerror or problem}") from problem
            try:
                append_text(path, "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs))
            finally:
                lock.release()

    return Journal(str(path), lock)


def complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to a value, in the order of their numbers."""
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def noted(trial: optuna.trial.FrozenTrial, name: str) -> Any:
    """What was noted with a trial that came to a value. Raises `HistoryError` where somebody took it out of the file."""
    if name not in trial.user_attrs:
        raise HistoryError(
            f"trial {trial.number} of the study lacks its '{name}': the file was damaged and left as it is; begin again elsewhere"
        )
    return trial.user_attrs[name]


def under_way(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that a process works on, or worked on when it was killed."""
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))


def waiting(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were lined up: `ask` gives these first, in the order of their numbers."""
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))


def give_up(study: optuna.Study, number: int) -> None:
    """End a trial without a value."""
    from optuna.trial import TrialState

    study.tell(number, state=TrialState.FAIL)


def line_up(study: optuna.Study, starts: Mapping[str, Mapping[str, Any]]) -> None:
    """Have these suggested next, in this order; a trial's attribute `START` then says which it is.

    No other process may use the study meanwhile: trials that are under way are given up, as what a kill left, and so is what waits
    from before, unless it is the same.
    """
    for trial in under_way(study):
        give_up(study, trial.number)
    if [trial.user_attrs.get(START) for trial in waiting(study)] == list(starts):
        return
    while waiting(study):
        give_up(study, study.ask().number)
    for name, suggestions in starts.items():
        study.enqueue_trial(dict(suggestions), user_attrs={START: name})


def ask(study: optuna.Study, seed: int, drawn: int) -> optuna.Trial:
    """A new trial, drawn as the one behind `drawn` others."""
    from optuna.samplers import TPESampler

    study.sampler = TPESampler(seed=(seed * 1_000_003 + drawn) % 2**32, n_startup_trials=_STARTUP)
    return study.ask()


def importances(study: optuna.Study, numbers: Collection[int]) -> dict[str, float]:
    """The share each suggestion has in what sets the better trials of these numbers apart, largest first; none where they are few.

    By PED-ANOVA, which knows what to make of suggestions that only some trials have.
    """
    import optuna

    good = [trial for trial in complete(study) if trial.number in numbers]
    if len(good) < _STARTUP or len({trial.value for trial in good}) < 2:
        return {}
    some = optuna.create_study()
    some.add_trials(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that few trials say little is known
        found = optuna.importance.get_param_importances(some, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def tpe(
    study: optuna.Study,
    define: Callable[[optuna.Trial], Any],
    *,
    trials: int,
    seed: int,
    start: Mapping[str, Any] | None = None,
) -> Proposals:
    """Propose what `define` makes of a trial's suggestions, one candidate at a time; trials of before come first, as they were.

    `start` says what is suggested for the first trial.
    """
    from optuna.trial import TrialState

    before = [noted(trial, _CANDIDATE) for trial in complete(study)][:trials]
    line_up(study, {"first": start} if start and not before else {})
    for candidate in before:
        yield [candidate]
    for number in range(len(before), trials):
        trial = ask(study, seed, number)
        candidate = define(trial)
        trial.set_user_attr(_CANDIDATE, candidate)
        (value,) = yield [candidate]
        # what has no value is told as the worst there can be: as failed it would be drawn again for ever
        study.tell(trial, min(value, 1e9) if not math.isnan(value) else 1e9, state=TrialState.COMPLETE)
