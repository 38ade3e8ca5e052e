"""Whether a folder may be written: refused before anything is touched, then made and locked, and left in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import HistoryError, InputError, StorageError, VerificationError
from ..progress import Progress
from .lock import locked, refuse_locked
from .manifest import read_manifest
from .storage import make_folder
from .writer import Journal, clear, difference, holds_model, is_leftover, model_files


@contextmanager
def usable(out: Path) -> Iterator[None]:
    """Raise `InputError` where the system refuses what is done to an output folder."""
    try:
        yield
    except (OSError, ValueError) as problem:  # no permission, a null byte, ...
        raise InputError(
            f"output folder {str(out)!r} cannot be used: {getattr(problem, 'strerror', None) or problem}"
        ) from None


def check_output(folder: Path, out: Path, *, resume: bool | None, overwrite: bool, ours: bool = False) -> None:
    """Refuse an output folder that cannot be what the user means.

    `resume` is None where the verb has nothing to resume; `ours` says that we hold the folder's lock.
    """
    with usable(out):
        _check_place(folder, out, resume=resume, overwrite=overwrite)
        if not ours:
            refuse_locked(out)


def _check_place(folder: Path, out: Path, *, resume: bool | None, overwrite: bool) -> None:
    target, model = out.resolve(), folder.resolve()
    if target == model or model in target.parents:
        raise InputError(f"output folder '{out}' is the model's own folder or lies inside it: choose another --out")
    if target in model.parents:
        raise InputError(f"output folder '{out}' contains the model's folder: choose another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"output '{out}' is a file: choose another --out")
    if resume and overwrite:
        raise InputError("--resume and --overwrite are both given: continue what is there, or replace it")
    if (
        overwrite
        and out.is_dir()
        and not holds_model(out)
        and (mine := [path for path in model_files(out) if not is_leftover(path)])
    ):
        raise InputError(
            f"output folder '{out}' holds no model, but '{mine[0].name}', which would be replaced: choose another --out"
        )
    if out.is_dir() and not overwrite and any(not is_leftover(path) for path in out.iterdir()):
        known = Journal.read(out) is not None or read_manifest(out) is not None
        if not (resume and known):
            hint = "it holds no run of prunekit" if resume else "--overwrite replaces it"
            hint += ", --resume continues an interrupted run" if resume is False else ""
            raise InputError(f"output folder '{out}' is not empty: {hint}")


def take_output(folder: Path, out: Path, held: ExitStack, *, resume: bool | None, overwrite: bool) -> None:
    """Make the output folder and lock it until `held` is left; another run may have come first since it was looked at."""
    with usable(out):
        if not out.exists():
            held.callback(_leave_no_empty, out)
        make_folder(out)
        held.enter_context(locked(out))
    check_output(folder, out, resume=resume, overwrite=overwrite, ours=True)


def refuse_no_room(out: Path, needed: int, *, hidden: int = 0, replaced: int | None = None) -> None:
    """Raise `InputError` where the disk of `out` cannot hold `needed` bytes, `hidden` of them hidden states while a run lasts.

    `replaced` of those it holds are given back: by default what the model files in `out` take.
    """
    if replaced is None:
        replaced = sum(path.stat().st_size for path in model_files(out) if path.is_file()) if out.is_dir() else 0
    free = machine.free_disk_bytes(out) + replaced
    if needed * 1.02 > free:
        kept = f" ({hidden / 1e9:.2f} of them for hidden states while it runs)" if hidden else ""
        fewer = ", or take fewer --samples" if hidden else ""
        raise InputError(
            f"'{out}' needs {needed / 1e9:.2f} GB{kept}, but its disk has {free / 1e9:.2f} GB free: "
            f"make room, or choose another --out{fewer}"
        )


def refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `InputError` where what lies in `out` is of a run with another identity. Another number of threads can be adopted."""
    differing = [line for line in difference(found, wanted) if not line.startswith("machine.threads ")]
    if differing:
        raise InputError(
            f"'{out}' belongs to another run: {'; '.join(differing)}. Resume with what it was begun with, or use --overwrite"
        )


def _leave_no_empty(out: Path) -> None:
    """Remove the folder we made where a refused run left nothing in it."""
    with suppress(OSError):
        out.rmdir()


@contextmanager
def orderly_end(
    out: Path,
    progress: Progress,
    done: Callable[[], str],
    *,
    settle: Callable[[], object] | None = None,
    ours: bool = True,
) -> Iterator[None]:
    """Leave nothing of an input that turned out wrong on the way; after anything else say what can be resumed.

    `done()` says what is finished by then. `settle` is called before anything is removed, and only where the folder is `ours` is it.
    """
    try:
        yield
    except HistoryError:
        progress.stop()
        raise
    except InputError:  # weights, activations or losses that are not finite would only be met again
        progress.stop()
        if settle is not None:
            settle()
        if ours:
            with suppress(StorageError):
                clear(out)
        raise
    except VerificationError:
        raise
    except BaseException:
        progress.stop()
        progress.say(f"stopped: {done()} in '{out}'; the same command with --resume continues")
        raise
