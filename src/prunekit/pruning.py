"""`prune`: from a recipe to a finished folder, in the order that loses nothing.

Everything that can be refused is refused before the output folder exists. Then one shard is written per block, with a journal; index
and config come last; what was written is loaded again and compared; the manifest is the mark of a finished run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import machine
from .blockwalk import BlockWalk, LinearReport, Seconds, block_parameters
from .calibration.windows import check_vocabulary, recipe_windows, token_hash, window_length
from .checkpoint.lock import LOCK_NAME, locked
from .checkpoint.manifest import FORMAT, changed_files, read_manifest
from .checkpoint.output import check_output, orderly_end, refuse_no_room, refuse_other, take_output
from .checkpoint.reader import INDEX_NAME, read_file, sha256_file
from .checkpoint.shard import Piece
from .checkpoint.storage import remove
from .checkpoint.writer import (
    Journal,
    Writer,
    clear,
    drop_leftovers,
    is_leftover,
    leftovers,
    model_files,
)
from .distributed import Ranks, find_ranks
from .errors import InputError, PrunekitError, StorageError, VerificationError
from .estimate import Needs, hidden_room, needs_of, refuse_memory
from .jobs import job_of, source_of
from .keeper import Keeper, saved_blocks
from .model.hidden import HiddenStates, InFiles, Place, Scratch
from .model.modules import evaluating
from .model.source import StreamedModel
from .model.stream import Walk, Windows, batch_size
from .opening import find_model, open_model, open_tokenizer
from .progress import Progress, Silent
from .recipe import Recipe
from .report.card import model_card
from .report.page import run_page
from .runtime.kernels import gram_kernel
from .verify import Verification, compared_tokens, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATHS = {"model", "plan"}  # of a recipe; what lies there is known by its hashes


@dataclass(frozen=True)
class Result:
    """What a run did. `linears` has one report per linear, in the model's order; `out` is None for a model pruned in memory.

    `parameters` are those of the dense model, `block_parameters` those of its blocks; of them `removed` and `block_removed` are gone.
    `channels` is how many the residual stream had and has, where it became narrower.

    `memory` is the process's peak in bytes up to the end of each phase, as `Plan.memory` predicts it.
    """

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
    memory: dict[str, int] | None = None
    removed: int = 0
    block_parameters: int = 0
    block_removed: int = 0
    channels: tuple[int, int] | None = None

    @property
    def ratio(self) -> float:
        """Parameters removed from the blocks divided by theirs."""
        return self.block_removed / self.block_parameters if self.block_parameters else 0.0

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

    @property
    def permuted(self) -> int | None:
        """How many linears have their inputs in a new order; None where that was not asked for."""
        asked = [linear.permuted for linear in self.linears if linear.permuted is not None]
        return sum(asked) if asked else None

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints. `after` counts the parameters still stored: zeroing removes none."""
        return {
            "out": None if self.out is None else str(self.out),
            "method": self.method,
            "sparsity": self.sparsity,
            "weights": self.weights,
            "zeros": self.zeros,
            "permuted": self.permuted,
            "parameters": {"before": self.parameters, "after": self.parameters - self.removed},
            "ratio": self.ratio,
            "channels": None if self.channels is None else dict(zip(("before", "after"), self.channels, strict=True)),
            "blocks": self.blocks,
            "windows": self.windows,
            "tokens": self.tokens,
            "seconds": asdict(self.seconds),
            "peak_rss_bytes": self.peak_rss_bytes,
            "memory": self.memory,
            "verification": None if self.verification is None else asdict(self.verification),
        }


@dataclass
class _Run:
    """A validated run that has not touched the output yet.

    `windows` are those of all processes; `room` is what hidden states, and later the reload check, may take in memory, in bytes.
    `blocks` says of every block that was walked when it was done, how long it took, and what was resident then, itself included.
    """

    recipe: Recipe
    source: StreamedModel
    work: BlockWalk
    windows: Windows
    identity: dict[str, Any]
    needs: Needs
    room: int
    progress: Progress
    ranks: Ranks
    memory: dict[str, int] = field(default_factory=dict)
    blocks: list[dict[str, float]] = field(default_factory=list)

    @property
    def walked(self) -> StreamedModel:
        """The model that is walked: the source, or that with channels of its residual stream left out."""
        source = self.work.walk.source
        assert isinstance(source, StreamedModel)
        return source


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
        memory_budget: bytes the hidden states may take in memory, those that a method keeps besides as many again, and later the whole
            model for the reload check; beyond, the ones go to files in `out` and the other is streamed. Default: half of what is free.
        progress: told what is going on.

    Under torchrun, every process calls this with the same arguments and is given the same result.

    Raises:
        InputError: the input is wrong; nothing of this run is left in `out`.
        StorageError: the disk refused; what is finished can be resumed.
        VerificationError: the written folder does not compute what was pruned.
    """
    begun = time.perf_counter()
    ranks = find_ranks(recipe.device)
    progress = progress if progress is not None and ranks.first else Silent()
    out = out.expanduser()
    with ExitStack() as held:
        find = partial(find_model, recipe, progress)
        folder = ranks.share(find)  # one process downloads or converts; on other machines each finds its own
        folder = folder if ranks.first else find()
        ranks.share(lambda: check_output(folder, out, resume=resume, overwrite=overwrite))
        prepared = _prepare(recipe, folder, memory_budget, progress, ranks)
        finished = ranks.share(lambda: _finished(out, prepared.identity) if resume else None)
        if finished is not None:
            progress.say(f"{out} is finished already")
            return finished
        with ranks.together():
            prepared.work.prepare()
        machine.return_memory()
        ranks.share(lambda: take_output(folder, out, held, resume=resume, overwrite=overwrite))
        journal = ranks.share(lambda: _journal(out, prepared, resume=resume, overwrite=overwrite))
        if not out.is_dir():
            raise InputError(f"output folder '{out}' is not there for process {ranks.rank}: all need the same folder")
        for source in (prepared.source, prepared.walked):
            source.scratch = Scratch(prepared.room, out)
        machine.adopt_threads(journal.identity["machine"]["threads"], progress)
        writer = Writer(out, len(prepared.source.anatomy.blocks) + 1)
        done, settle = partial(_finished_blocks, journal, prepared), partial(_settle, ranks)
        with (
            orderly_end(out, progress, done, settle=settle, ours=ranks.first),
            Keeper(writer, journal, ranks) as keeper,
        ):
            prepared.work.seconds.start = time.perf_counter() - begun
            _look_ahead(prepared, journal)
            writer.shards = len(prepared.work.blocks) + 1
            reference = _walk(prepared, keeper, writer, journal, begun)
            result = ranks.share(lambda: _finish(prepared, writer, journal, reference, begun))
        progress.stop()
        return result


def prune_in_memory(
    model: PreTrainedModel, recipe: Recipe, windows: Windows, progress: Progress | None = None
) -> Result:
    """Prune a model that lies in memory, in place, on windows of tokens. Raises `InputError`."""
    begun = time.perf_counter()
    progress = progress or Silent()
    with evaluating(model):
        source = source_of(model, recipe)
        check_vocabulary(windows, model)
        window_length(model.config, windows.length, progress)
        job = job_of(recipe, source)
        asked = len(windows)
        windows = windows[0 if job.looks_at_data else asked - 1 :]
        walk = Walk(source, windows, recipe.calibration.batch)
        work = job.work(walk, dense=recipe.calibration.mode == "dense", ranks=Ranks(), first=0, total=None)
        if work.looks_ahead:
            walk.prepare()
            progress.start(f"{work.looks_ahead} looks ahead", work.steps_ahead)
            work.look_ahead(None, source.stored_of, progress.step)
        work.start()
        reports: list[LinearReport] = []
        progress.start(recipe.method, len(work.blocks))
        for block in work.blocks:
            module = source.load_block(block.index)
            reports += work.prune_block(block, module, source.stored_of)
            work.keep(block)
            work.pass_on(block.index, module)
            source.free_block(block.index)
            progress.step()
        work.install(model)
        progress.stop()
    work.seconds.total = time.perf_counter() - begun
    return Result(
        out=None,
        method=recipe.method,
        linears=reports,
        parameters=source.parameter_count,
        blocks=len(work.blocks),
        windows=len(windows),
        tokens=windows.tokens,
        seconds=work.seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
        removed=work.removed,
        block_parameters=sum(block_parameters(source)),
        block_removed=work.block_removed,
    )


def _prepare(recipe: Recipe, folder: Path, memory_budget: int | None, progress: Progress, ranks: Ranks) -> _Run:
    source = open_model(recipe, folder)
    room = hidden_room(memory_budget, ranks.here)
    source.scratch = Scratch(room)
    job = job_of(recipe, source)
    calibration = recipe.calibration
    length = window_length(source.module.config, calibration.length, progress)

    def read() -> tuple[Windows, dict[str, str]]:
        tokenizer = open_tokenizer(recipe, folder)
        samples = max(ranks.size, calibration.samples if job.looks_at_data else 1)
        windows = recipe_windows(recipe, tokenizer, length=length, samples=samples)
        check_vocabulary(windows, source.module)
        plan = {} if recipe.plan is None else {"plan": sha256_file(Path(recipe.plan))}
        return windows, source.reader.sha256() | plan

    if ranks.size > calibration.samples:
        raise InputError(
            f"{ranks.size} processes cannot share {calibration.samples} calibration windows: start fewer, or ask for more --samples"
        )
    windows, inputs = ranks.share(read)
    resolved = recipe.model_copy(
        update={
            **_said(recipe),
            "dtype": str(source.dtype).removeprefix("torch."),
            "device": str(source.device),
            "calibration": calibration.model_copy(update={"length": length}),
            "parts": job.resolved,
        }
    )
    machine.return_memory()  # what tokenising took
    identity = {
        "recipe": resolved.model_dump(exclude=_PATHS),  # the same files may be called by other paths
        "inputs": inputs,
        "calibration_tokens": token_hash(windows),
        "versions": machine.versions(),
        # sums are taken in another order on another processor, with another number of threads or other kernels
        "machine": machine.describe(),
        "gram_kernel": gram_kernel(source.dtype, source.device),
    }
    # whole batches are shared out, so that each is computed as a single process would
    batch = min(calibration.batch or batch_size(length), len(windows) // ranks.size)
    mine = ranks.share_of(-(-len(windows) // batch))
    walk = Walk(source, windows[mine.start * batch : mine.stop * batch], batch)
    work = job.work(walk, dense=calibration.mode == "dense", ranks=ranks, first=mine.start * batch, total=len(windows))
    base = machine.rss_bytes()
    needs = needs_of(
        source,
        job,
        windows=len(walk.windows),
        all_windows=len(windows),
        length=length,
        batch=batch,
        budget=room,
        base=base,
    )
    ranks.share(lambda: refuse_memory(needs, base=base, processes=ranks.here))
    return _Run(resolved, source, work, windows, identity, needs, room, progress, ranks)


def _said(recipe: Recipe) -> dict[str, float | None]:
    """What is to be removed, said in one way."""
    fraction = float(recipe.target.fraction)
    if recipe.removes:
        return {"ratio": None if recipe.sized else fraction}
    return {"sparsity": None if recipe.pattern is not None else fraction}


def _journal(out: Path, run_: _Run, *, resume: bool, overwrite: bool) -> Journal:
    """The journal of a run that begins or goes on, its torn shards forgotten."""
    journal = Journal.read(out) if resume else None
    begun = journal is not None
    if journal is None:
        journal = Journal.fresh(out, run_.identity)
    else:
        refuse_other(out, journal.identity, run_.identity)
        journal.shards = journal.whole_shards()
    finished = sum(shard["bytes"] for shard in journal.shards)
    kept = {shard["file"] for shard in journal.shards}
    written_over = [path for path in model_files(out) if path.suffix == ".safetensors" or is_leftover(path)]
    replaced = sum(path.stat().st_size for path in written_over if path.name not in kept)
    disk = run_.needs.disk
    refuse_no_room(out, disk["peak"] - finished, hidden=disk["hidden"], replaced=replaced)
    journal.save()  # before anything is removed or written, so that a run killed at any moment is known for what it is
    if not journal.shards:  # also where an earlier --overwrite was killed before all of the old was gone
        clear(out, keep=journal.path, keep_search=begun)
    return journal


def _finished(out: Path, identity: dict[str, Any]) -> Result | None:
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        return None
    for verb, key in (("recover", "recovery"), ("export", "export")):
        if manifest.get(key) is not None:
            raise InputError(f"'{out}' is what {verb} wrote, not prune: choose another --out")
    recipe = {name: value for name, value in manifest["recipe"].items() if name not in _PATHS}
    refuse_other(out, {**{name: manifest.get(name) for name in identity}, "recipe": recipe}, identity)
    changed = changed_files(out, manifest)
    if changed:
        raise InputError(
            f"'{out}' was finished, but {', '.join(changed)} changed since: use --overwrite to prune again"
        )
    _tidy(out)
    return result_of(out, manifest)


def _tidy(out: Path) -> None:
    """Remove what a run that was killed behind its manifest left. Where that cannot be done, it does no harm."""
    if leftovers(out) or (out / LOCK_NAME).exists():
        with suppress(OSError, StorageError), locked(out):
            drop_leftovers(out)


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
        memory=run_["memory"],
        # manifests have these since structures can be removed
        removed=run_.get("removed", 0),
        block_parameters=run_.get("block_parameters", 0),
        block_removed=run_.get("block_removed", 0),
        channels=None if run_.get("channels") is None else (run_["channels"]["before"], run_["channels"]["after"]),
    )


def _finished_blocks(journal: Journal, run_: _Run) -> str:
    done = sum(shard["position"] > 0 for shard in journal.shards)
    return f"{done} of {len(run_.work.blocks)} blocks are finished"


def _settle(ranks: Ranks) -> None:
    """Wait until the other processes' keepers have come to rest too, so that nothing is written behind our back."""
    with suppress(PrunekitError):
        ranks.gather(None)


def _look_ahead(run_: _Run, journal: Journal) -> None:
    """Where the method wants it, walk through the dense model first; a run that goes on finds what came of it in the journal."""
    work = run_.work
    if not work.looks_ahead:
        return
    known = run_.ranks.share(lambda: journal.profile)
    if known is None:
        run_.progress.start(f"{work.looks_ahead} looks ahead", work.steps_ahead)
    work.scratch = journal.path.parent
    found = work.look_ahead(known, run_.source.stored_of, run_.progress.step)
    if known is None:
        journal.profile = found
        run_.ranks.share(journal.save)


def _walk(run_: _Run, keeper: Keeper, writer: Writer, journal: Journal, begun: float) -> Tensor:
    """Prune and write every block that is not finished; returns the final hidden states the reload is compared with.

    Blocks are numbered as they are written: those that go are not walked.
    """
    source, work, progress = run_.walked, run_.work, run_.progress
    seconds = work.seconds
    blocks = work.blocks
    whole = run_.ranks.share(lambda: {shard["position"]: shard["noted"] for shard in journal.shards})
    if 0 not in whole:
        with seconds.timed("write"):
            keeper.shard(0, work.outer(), [], {})
            keeper.settle()
    begin = _start(run_, writer.folder, journal, whole)
    progress.start(run_.recipe.method, len(blocks))
    for _ in range(begin):
        progress.step("finished before")
    for number, block in enumerate(blocks[begin:], begin):
        entered = time.perf_counter()
        if work.measures_in_place:
            with seconds.timed("write"):
                keeper.settle()
        done = number + 1 in whole
        if done:
            module = _finished_block(run_, writer, number, whole[number + 1])
        else:
            with seconds.timed("read"):
                module = source.load_block(block.index)
            if number + 2 not in whole and number + 1 < len(blocks):
                source.prefetch(blocks[number + 1].index)
            reports = work.prune_block(block, module, source.stored_of)
        with seconds.timed("write"):
            keeper.settle()
            if not done:
                tensors = work.shard(block, source.stored[block.index])
                keeper.shard(
                    number + 1,
                    [Piece.of(name, tensor) for name, tensor in tensors.items()],
                    [asdict(report) for report in reports],
                    work.noted(block),
                )
                del tensors
        work.pass_on(block.index, module)
        with seconds.timed("write"):
            keeper.settle()
            if number + 1 < len(blocks):
                keeper.hidden(number + 1, work.states(writer.folder))
        left = time.perf_counter()
        when = {"seconds": left - begun, "took": left - entered}
        run_.blocks.append({"block": block.index, **when, "rss_bytes": machine.rss_bytes()})
        source.free_block(block.index)
        machine.return_memory()
        progress.step(f"block {block.index}")
    run_.memory["walk"] = machine.peak_rss_bytes()
    check = work.check
    tokens = compared_tokens(run_.windows)
    last = torch.empty((tokens, work.walk.shape[-1]), dtype=work.walk.dtype) if check is None else check[:][-1]
    return run_.ranks.from_last(last[-tokens:].clone())


def _start(run_: _Run, out: Path, journal: Journal, whole: Mapping[int, Any]) -> int:
    """Take up the hidden states where it costs least; returns the number of the block they are the inputs of."""
    work, walk = run_.work, run_.work.walk
    blocks = len(work.blocks)
    window = torch.Size(walk.shape[1:]).numel() * walk.dtype.itemsize
    wanted = next((number for number in range(blocks) if number + 1 not in whole), blocks - 1)
    saved = run_.ranks.share(lambda: [block for block in saved_blocks(journal, window) if block <= wanted])
    begin = max(saved, default=0)
    hidden: HiddenStates | None = None
    if work.hidden_bytes > run_.room:
        run_.progress.say(
            f"hidden states ({work.hidden_bytes / 1e9:.2f} GB) go to files: the memory budget is {run_.room / 1e9:.2f} GB"
        )
        hidden = InFiles(walk.shape, walk.dtype, Place(out, work.first))
    work.start(hidden, keep=begin == 0)
    run_.memory["start"] = machine.peak_rss_bytes()
    if begin:
        for states, place in work.states(out):
            states.load(place, begin)
    for number in range(begin):
        work.skip(work.blocks[number], whole[number + 1])
    if len(whole) > 1:
        run_.progress.say(
            f"resuming: {len(whole) - 1} of {blocks} blocks are finished, hidden states are those behind block {begin}"
        )
    return begin


def _finished_block(run_: _Run, writer: Writer, number: int, noted: Mapping[str, Any]) -> nn.Module:
    """A block that an earlier run has finished, as it wrote it."""
    source, work = run_.walked, run_.work
    block = work.blocks[number]
    if work.dense:
        work.pass_on_dense(block.index, source.load_block(block.index))
        source.free_block(block.index)
    path = writer.folder / writer.shard_name(number + 1)
    with work.seconds.timed("read"):
        try:
            tensors = read_file(path)
        except InputError as problem:  # it was whole when we began; as wrong input it would have everything removed
            raise StorageError(f"'{path}' cannot be read again: {problem}") from problem
        return work.take_up(block, tensors, noted)


def _finish(run_: _Run, writer: Writer, journal: Journal, final: Tensor, begun: float) -> Result:
    """Index, config and tokenizer; then the reload check; then the manifest. `final` is [tokens, hidden], behind the last block."""
    work, source, out = run_.work, run_.source, writer.folder
    with work.seconds.timed("verify"):
        ids = run_.windows.ids[-1, -len(final) :]
        run_.walked.load_outer(ids, "chunked")
        reference = work.walk.logits(final, ids)
        run_.walked.free_outer()
    with work.seconds.timed("write"):
        writer.write_index(journal.shards)
        carried = writer.carry_over(source.reader.folder, with_code=run_.recipe.trust_remote_code, written=work.files())
    verification = _verify(run_, writer, journal, reference)
    work.seconds.total = time.perf_counter() - begun
    result = Result(
        out=out,
        method=run_.recipe.method,
        linears=[LinearReport.of(line) for shard in journal.shards for line in shard["linears"]],
        parameters=source.parameter_count,
        blocks=len(work.blocks),
        windows=len(run_.windows),
        tokens=run_.windows.tokens,
        seconds=work.seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
        verification=verification,
        memory={**run_.memory, "verify": machine.peak_rss_bytes()},
        removed=work.removed,
        block_parameters=sum(block_parameters(source)),
        block_removed=work.block_removed,
        channels=work.channels,
    )
    outputs = {name: sha256_file(out / name) for name in (INDEX_NAME, *carried)}
    manifest = _manifest(run_, result, outputs | {shard["file"]: shard["sha256"] for shard in journal.shards})
    writer.write_manifest(manifest, model_card(manifest, source.reader.folder), run_page(manifest))
    return result


def _verify(run_: _Run, writer: Writer, journal: Journal, reference: Tensor) -> Verification:
    """Load what was written and compare its logits with `reference`, [tokens, vocabulary], of the last window."""
    source, recipe = run_.source, run_.recipe
    width = run_.work.walk.batches[0].stop  # the last batch of all, as it was computed
    run_.progress.say("loading what was written and comparing its logits")
    run_.work.release()
    machine.return_memory()
    with run_.work.seconds.timed("verify"):
        try:
            return verify(
                writer.folder,
                run_.windows[(len(run_.windows) - 1) // width * width :],
                reference,
                dtype=source.dtype,
                device=source.device,
                whole=source.parameter_count * source.dtype.itemsize <= run_.room,
                trust_remote_code=recipe.trust_remote_code,
            )
        except BaseException as problem:
            writer.withdraw_index()  # what nobody has checked must not be taken for finished
            if isinstance(problem, VerificationError):
                # the shards are wrong: a resume that took them would agree with itself
                remove(journal.path)
            elif isinstance(problem, Exception):
                raise PrunekitError(
                    f"'{writer.folder}' was written, but its reload check could not be made: {problem}"
                ) from problem
            raise


def _manifest(run_: _Run, result: Result, outputs: Mapping[str, str]) -> dict[str, Any]:
    """What `prunekit.json` says; `outputs` are the hashes of the files."""
    assert result.verification is not None
    return {
        "format": FORMAT,
        **run_.identity,
        "recipe": run_.recipe.model_dump(),
        "run": {
            name: value for name, value in result.summary().items() if name not in ("out", "method", "verification")
        }
        | {
            "parameters": result.parameters,
            "removed": result.removed,
            "block_parameters": result.block_parameters,
            "block_removed": result.block_removed,
            "dropped_blocks": sorted(
                {each.index for each in run_.source.anatomy.blocks} - {each.index for each in run_.work.blocks}
            ),
            "processes": run_.ranks.size,
        },
        "verification": asdict(result.verification),
        "outputs": outputs,
        "linears": [asdict(linear) for linear in result.linears],
        "blocks": run_.blocks,
        **run_.work.told,
    }
