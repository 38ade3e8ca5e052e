"""`prune`: from a recipe to a finished folder, in the order that loses nothing.

Everything that can be refused is refused before the output folder exists. Then one shard is written per block, with a journal; index
and config come last; what was written is loaded again and compared; the manifest is the mark of a finished run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import machine
from .calibration.text import documents
from .calibration.windows import (
    calibration_windows,
    check_vocabulary,
    load_tokenizer,
    token_hash,
    window_length,
)
from .checkpoint.locate import locate
from .checkpoint.manifest import FORMAT, changed_files, read_manifest
from .checkpoint.reader import INDEX_NAME, read_file, sha256_file
from .checkpoint.storage import is_temporary
from .checkpoint.writer import Journal, Writer, clear, difference, holds_model, model_files
from .errors import InputError, PrunekitError, VerificationError
from .model.anatomy import Block, Linear, weight_of
from .model.source import ResidentModel, StreamedModel, evaluating
from .model.stream import Walk, Windows
from .progress import Progress, Silent
from .recipe import Recipe
from .report.card import model_card
from .sparsify.walk import LinearReport, Seconds, SparsifyWalk, parts_of
from .verify import Verification, compared_tokens, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """What a run did. `linears` has one report per linear, in the model's order; `out` is None for a model pruned in memory."""

    out: Path | None
    method: str
    linears: list[LinearReport]
    parameters: int
    blocks: int
    windows: int
    tokens: int
    seconds: Seconds
    peak_rss_bytes: int
    verification: Verification | None = None

    @property
    def weights(self) -> int:
        """Weights of all block linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def zeros(self) -> int:
        """Zeros among them."""
        return sum(linear.zeros for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Zeros divided by weights, over the block linears."""
        return self.zeros / self.weights

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints. Zeroing weights removes no parameters: `after` counts those still stored."""
        return {
            "out": None if self.out is None else str(self.out),
            "method": self.method,
            "sparsity": self.sparsity,
            "weights": self.weights,
            "zeros": self.zeros,
            "parameters": {"before": self.parameters, "after": self.parameters},
            "blocks": self.blocks,
            "windows": self.windows,
            "tokens": self.tokens,
            "seconds": asdict(self.seconds),
            "peak_rss_bytes": self.peak_rss_bytes,
            "verification": None if self.verification is None else asdict(self.verification),
        }


@dataclass
class _Run:
    """A validated run that has not touched the output yet."""

    recipe: Recipe
    source: StreamedModel
    sparsify: SparsifyWalk
    windows: Windows
    identity: dict[str, Any]
    progress: Progress


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune as the recipe says and leave a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        recipe: what to do.
        out: the folder to write.
        resume: continue what was begun in `out`; start where there is nothing; return the result where it is finished.
        overwrite: replace a model folder that stands in `out`. Files that do not belong to one are left alone.
        memory_budget: bytes the reload check may use; it streams where the whole model would not fit. Default: half of what is free.
        progress: told what is going on.

    Raises:
        InputError: the input is wrong; nothing of this run is left in `out`.
        StorageError: the disk refused; what is finished can be resumed.
        VerificationError: the written folder does not compute what was pruned.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    out = out.expanduser()
    folder = locate(
        recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, progress=progress
    )
    try:
        _check_output(folder, out, resume=resume, overwrite=overwrite)
    except (OSError, ValueError) as problem:  # no permission, a null byte, ...
        raise InputError(f"output folder {str(out)!r} cannot be used: {problem}") from None
    prepared = _prepare(recipe, folder, progress)
    if resume and (finished := _finished(out, prepared.identity)) is not None:
        progress.say(f"{out} is finished already")
        return finished
    prepared.sparsify.start()
    machine.return_memory()
    journal = _journal(out, prepared.identity, resume=resume)
    _check_disk(out, prepared.source, journal, overwrite=overwrite)
    if overwrite and not resume:
        clear(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"output folder '{out}' cannot be made: {problem.strerror}") from None
    journal.save()  # before any shard, so that a run killed at any moment is known for what it is
    writer = Writer(out, len(prepared.source.anatomy.blocks) + 1)
    with _orderly_end(out, journal, len(prepared.source.anatomy.blocks), progress):
        reference = _walk(prepared, writer, journal)
        result = _finish(prepared, writer, journal, reference, memory_budget, begun)
    progress.stop()
    return result


def prune_in_memory(
    model: PreTrainedModel, recipe: Recipe, windows: Windows, progress: Progress | None = None
) -> Result:
    """Prune a model that lies in memory, in place, on windows of tokens. Raises `InputError`."""
    begun = time.perf_counter()
    progress = progress or Silent()
    with evaluating(model):
        source = ResidentModel(model)
        check_vocabulary(windows, model)
        window_length(model.config, windows.length, progress)
        sparsifier, patterns = parts_of(recipe, source.anatomy)
        windows = windows[len(windows) - sparsifier.windows_needed(len(windows)) :]
        walk = Walk(source, windows, recipe.calibration.batch)
        sparsify = SparsifyWalk(walk, sparsifier, patterns, dense=recipe.calibration.mode == "dense")
        sparsify.start()
        reports: list[LinearReport] = []
        progress.start(recipe.method, len(source.anatomy.blocks))
        for block in source.anatomy.blocks:
            module = source.load_block(block.index)
            reports += sparsify.prune_block(block, module, partial(_resident_weight, module))
            progress.step()
        progress.stop()
    sparsify.seconds.total = time.perf_counter() - begun
    return Result(
        out=None,
        method=recipe.method,
        linears=reports,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=len(source.anatomy.blocks),
        windows=len(windows),
        tokens=windows.tokens,
        seconds=sparsify.seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
    )


def _prepare(recipe: Recipe, folder: Path, progress: Progress) -> _Run:
    source = StreamedModel.open(
        folder, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    sparsifier, patterns = parts_of(recipe, source.anatomy)
    calibration = recipe.calibration
    length = window_length(source.module.config, calibration.length, progress)
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
    windows = calibration_windows(
        documents(calibration.source, "calibration"),
        tokenizer,
        samples=sparsifier.windows_needed(calibration.samples),
        length=length,
        seed=recipe.seed,
        sampling=calibration.sampling,
    )
    check_vocabulary(windows, source.module)
    resolved = recipe.model_copy(
        update={
            "sparsity": None if recipe.pattern is not None else float(recipe.target.fraction),
            "dtype": str(source.dtype).removeprefix("torch."),
            "device": str(source.device),
            "calibration": calibration.model_copy(update={"length": length}),
            "parts": sparsifier.resolved(recipe.parts),
        }
    )
    machine.return_memory()  # what tokenising took
    identity = {
        "recipe": resolved.model_dump(exclude={"model"}),  # the same model may be called by another path
        "inputs": source.reader.sha256(),
        "calibration_tokens": token_hash(windows),
        "versions": machine.versions(),
        "machine": machine.describe(),  # sums are taken in another order on another processor or number of threads
    }
    walk = Walk(source, windows, calibration.batch)
    sparsify = SparsifyWalk(walk, sparsifier, patterns, dense=calibration.mode == "dense")
    return _Run(resolved, source, sparsify, windows, identity, progress)


def _check_output(folder: Path, out: Path, *, resume: bool, overwrite: bool) -> None:
    target, model = out.resolve(), folder.resolve()
    if target == model or model in target.parents:
        raise InputError(f"output folder '{out}' is the model's own folder or lies inside it: choose another --out")
    if target in model.parents:
        raise InputError(f"output folder '{out}' contains the model's folder: choose another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"output '{out}' is a file: choose another --out")
    if resume and overwrite:
        raise InputError("--resume and --overwrite are both given: continue what is there, or replace it")
    if overwrite and out.is_dir() and not holds_model(out) and (mine := model_files(out)):
        raise InputError(
            f"output folder '{out}' holds no model, but '{mine[0].name}', which would be replaced: choose another --out"
        )
    if out.is_dir() and not overwrite and any(not is_temporary(path) for path in out.iterdir()):
        known = Journal.read(out) is not None or read_manifest(out) is not None
        if not (resume and known):
            hint = (
                "it holds no run of prunekit"
                if resume
                else "--overwrite replaces it, --resume continues an interrupted run"
            )
            raise InputError(f"output folder '{out}' is not empty: {hint}")


def _journal(out: Path, identity: dict[str, Any], *, resume: bool) -> Journal:
    found = Journal.read(out) if resume else None
    if found is not None:
        _refuse_other(out, found.identity, identity)
        found.shards = found.whole_shards()
        return found
    return Journal.fresh(out, identity)


def _refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = difference(found, wanted)
    if differing:
        raise InputError(
            f"'{out}' belongs to another run: {'; '.join(differing)}. Resume with what it was begun with, or use --overwrite"
        )


def _finished(out: Path, identity: dict[str, Any]) -> Result | None:
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        return None
    recipe = {name: value for name, value in manifest["recipe"].items() if name != "model"}
    _refuse_other(out, {**{name: manifest[name] for name in identity}, "recipe": recipe}, identity)
    changed = changed_files(out, manifest)
    if changed:
        raise InputError(
            f"'{out}' was finished, but {', '.join(changed)} changed since: use --overwrite to prune again"
        )
    return result_of(out, manifest)


def result_of(out: Path, manifest: dict[str, Any]) -> Result:
    """The `Result` a manifest was written from."""
    linears = [LinearReport.of(line) for line in manifest["linears"]]
    run_ = manifest["run"]
    return Result(
        out=out,
        method=manifest["recipe"]["method"],
        linears=linears,
        parameters=run_["parameters"],
        blocks=run_["blocks"],
        windows=run_["windows"],
        tokens=run_["tokens"],
        seconds=Seconds(**run_["seconds"]),
        peak_rss_bytes=run_["peak_rss_bytes"],
        verification=Verification(**manifest["verification"]),
    )


def _check_disk(out: Path, source: StreamedModel, journal: Journal, *, overwrite: bool) -> None:
    needed = sum(entry.bytes for entry in source.reader.entries.values()) - sum(
        shard["bytes"] for shard in journal.shards
    )
    free = machine.free_disk_bytes(out)
    if overwrite and out.is_dir():
        free += sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if needed * 1.02 > free:
        raise InputError(
            f"'{out}' needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: make room or choose another --out"
        )


@contextmanager
def _orderly_end(out: Path, journal: Journal, blocks: int, progress: Progress) -> Iterator[None]:
    """Leave nothing of an input that turned out wrong on the way; after anything else say what can be resumed."""
    try:
        yield
    except InputError:  # NaN weights or overflowing activations would only be met again
        clear(out)
        raise
    except VerificationError:
        raise
    except BaseException:
        progress.stop()
        done = max(0, len(journal.shards) - 1)
        progress.say(
            f"stopped: {done} of {blocks} blocks are finished in '{out}'; the same command with --resume continues"
        )
        raise


def _walk(run_: _Run, writer: Writer, journal: Journal) -> Tensor:
    """Prune and write every block; returns the logits the reload is compared with."""
    source, sparsify, progress = run_.source, run_.sparsify, run_.progress
    seconds = sparsify.seconds
    blocks = source.anatomy.blocks
    if not journal.shards:
        with seconds.timed("read"):
            outer = source.reader.read(source.outer_keys())
        with seconds.timed("write"):
            journal.add(writer.write_shard(0, outer), [])
        del outer
    done = len(journal.shards) - 1
    if done:
        progress.say(f"resuming behind block {done} of {len(blocks)}")
    progress.start(run_.recipe.method, len(blocks))
    for block in blocks:
        if block.index < done:
            _replay(run_, writer.folder, journal.shards[block.index + 1], block)
        else:
            with seconds.timed("read"):
                module = source.load_block(block.index)
            reports = sparsify.prune_block(block, module, partial(_stored_weight, source))
            with seconds.timed("write"):
                journal.add(
                    writer.write_shard(block.index + 1, source.stored[block.index]), [asdict(r) for r in reports]
                )
        source.free_block(block.index)
        machine.return_memory()
        progress.step(f"block {block.index}")
    machine.return_memory()
    with seconds.timed("verify"):
        source.load_outer()
        tokens = compared_tokens(run_.windows)
        logits = sparsify.walk.logits(sparsify.check[-1, -tokens:], run_.windows.ids[-1, -tokens:])
        source.free_outer()
    return logits


def _replay(run_: _Run, out: Path, record: dict[str, Any], block: Block) -> None:
    """Send the windows through a block that an earlier run has finished."""
    source, sparsify = run_.source, run_.sparsify
    if sparsify.dense:
        sparsify.pass_on_dense(block.index, source.load_block(block.index))
        source.free_block(block.index)
    with sparsify.seconds.timed("read"):
        module = source.load_block(block.index, read_file(out / record["file"]))
    sparsify.pass_on(block.index, module)


def _stored_weight(source: StreamedModel, linear: Linear) -> Tensor:
    return source.stored[linear.index][source.key_of[f"{linear.full_name}.weight"]]


def _resident_weight(module: nn.Module, linear: Linear) -> Tensor:
    return weight_of(module.get_submodule(linear.name))


def _finish(
    run_: _Run, writer: Writer, journal: Journal, reference: Tensor, memory_budget: int | None, begun: float
) -> Result:
    """Index, config and tokenizer; then the reload check; then the manifest."""
    source, seconds, out = run_.source, run_.sparsify.seconds, writer.folder
    with seconds.timed("write"):
        writer.write_index(journal.shards)
        carried = writer.carry_over(source.reader.folder, with_code=run_.recipe.trust_remote_code)
    batch = run_.windows[run_.sparsify.walk.batches[-1]]
    dtype, device = source.dtype, source.device
    parameters, blocks = source.parameter_count, len(source.anatomy.blocks)
    run_.progress.say("loading what was written and comparing its logits")
    run_.sparsify.release()
    machine.return_memory()
    budget = machine.available_memory_bytes() // 2 if memory_budget is None else memory_budget
    with seconds.timed("verify"):
        try:
            verification = verify(
                out,
                batch,
                reference,
                dtype=dtype,
                device=device,
                whole=parameters * dtype.itemsize <= budget,
                trust_remote_code=run_.recipe.trust_remote_code,
            )
        except BaseException as problem:
            writer.withdraw_index()  # what nobody has checked must not be taken for finished
            if isinstance(problem, VerificationError):
                # the shards are wrong: a resume that took them would agree with itself
                journal.path.unlink(missing_ok=True)
            elif isinstance(problem, Exception):
                raise PrunekitError(
                    f"'{out}' was written, but its reload check could not be made: {problem}"
                ) from problem
            raise
    linears = [LinearReport.of(line) for shard in journal.shards for line in shard["linears"]]
    seconds.total = time.perf_counter() - begun
    result = Result(
        out=out,
        method=run_.recipe.method,
        linears=linears,
        parameters=parameters,
        blocks=blocks,
        windows=len(run_.windows),
        tokens=run_.windows.tokens,
        seconds=seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
        verification=verification,
    )
    manifest = {
        "format": FORMAT,
        **run_.identity,
        "recipe": run_.recipe.model_dump(),
        "run": {
            name: value for name, value in result.summary().items() if name not in ("out", "method", "verification")
        }
        | {"parameters": parameters},
        "verification": asdict(verification),
        "outputs": {name: sha256_file(out / name) for name in (INDEX_NAME, *carried)}
        | {shard["file"]: shard["sha256"] for shard in journal.shards},
        "linears": [asdict(linear) for linear in linears],
    }
    writer.write_manifest(manifest, model_card(manifest, source.reader.folder))
    return result
