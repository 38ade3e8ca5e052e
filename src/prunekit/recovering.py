"""`recover`: train a pruned model with low-rank adapters, and merge them into a folder whose zeros are those of the source.

Everything that can be refused is refused before the output folder exists. While it trains, the folder holds a journal and the state
behind the last step that was saved; two files take turns, so that a kill at any moment leaves one of them whole. Then the tensors are
written file by file as an export writes them, the tuned ones merged as their turn comes; zeros are compared, logits are compared, and
the manifest, which says what the source's said and what was done here, is the mark of a finished run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import machine
from .bits import count_zeros
from .calibration.text import documents
from .calibration.windows import check_vocabulary, load_tokenizer, recovery_windows, token_hash, window_length
from .checkpoint.locate import locate
from .checkpoint.manifest import changed_files, read_manifest, unchanged_manifest
from .checkpoint.output import check_output, orderly_end, refuse_no_room, refuse_other, take_output
from .checkpoint.packing import Sheet, plain_sheets
from .checkpoint.reader import Reader, bytes_of, read_file
from .checkpoint.shard import Piece, write_shard
from .checkpoint.storage import remove
from .checkpoint.writer import STATE_PREFIX, Journal, Writer, clear, drop_leftovers
from .errors import InputError, VerificationError
from .exporting import write_sheets
from .loading import load_model
from .model.anatomy import Linear
from .model.source import StreamedModel
from .model.stream import Windows
from .progress import Progress
from .recovery.options import RecoveryOptions
from .recovery.training import Training, held_out_perplexity
from .report.card import model_card
from .report.page import run_page
from .verify import Verification, compared_tokens, tail_logits, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recovery.adapters import Adapters, Tuned

_SAVE_SECONDS = 60.0  # between two saves of the state; a step that takes longer is saved at once
_FEW = 0.01  # zeros that a dense weight may hold by chance; fewer are not kept where no pruning recorded them
_FLOAT32 = 4


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        linears: how many were tuned; `masked` of them kept their zeros.
        trained: parameters of the adapters.
        windows, length, steps, tokens: what was trained on; windows may have been seen several times, `tokens` counts that.
        before, after: perplexity on `held_out` windows of the same text that were not trained on.
        curve: step -> that perplexity on the way; losses: of every step.
        weights, zeros: of the linears of all blocks, in the folder that was written.
        seconds: of everything; of a run that was resumed, of its last part.
    """

    out: Path
    linears: int
    masked: int
    trained: int
    windows: int
    held_out: int
    length: int
    steps: int
    tokens: int
    before: float
    after: float
    losses: list[float]
    curve: dict[int, float]
    weights: int
    zeros: int
    seconds: float
    peak_rss_bytes: int
    verification: Verification

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        kept = asdict(self)
        kept.pop("out")
        return kept | {"curve": [*self.curve.items()]}

    @classmethod
    def of(cls, out: Path, record: Mapping[str, Any]) -> Recovery:
        """The recovery that a manifest's record was written from."""
        curve, verification = dict(record["curve"]), Verification(**record["verification"])
        return cls(out=out, **{**record, "curve": curve, "verification": verification})

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {"out": str(self.out), **self.record()}


@dataclass(frozen=True)
class _Job:
    """A validated recovery that has not touched the output yet.

    `linears` are the tuned ones; `masked` names those of them whose zeros stay.
    """

    folder: Path
    dense: Path | None
    options: RecoveryOptions
    source: StreamedModel
    manifest: dict[str, Any] | None
    linears: list[Linear]
    masked: set[str]
    windows: Windows
    held: Windows
    identity: dict[str, Any]
    progress: Progress

    @property
    def reader(self) -> Reader:
        """The source's tensors."""
        return self.source.reader

    @property
    def trained(self) -> int:
        """Parameters of the adapters."""
        return sum(self.options.rank * (linear.out_features + linear.in_features) for linear in self.linears)

    def key(self, linear: Linear) -> str:
        """The name its weight is stored under."""
        return self.source.key_of[f"{linear.full_name}.weight"]

    def load(self, folder: Path) -> PreTrainedModel:
        """A model in the dtype and on the device of the passes."""
        options = self.options
        trusted = options.trust_remote_code
        return load_model(folder, dtype=options.dtype, device=options.device, trust_remote_code=trusted)


def recover_folder(
    folder: Path, out: Path, options: RecoveryOptions, *, resume: bool, overwrite: bool, progress: Progress
) -> Recovery:
    """Train adapters on a folder's model and write the folder with them merged.

    Args:
        folder: a model folder, plain or packed; the output is plain.
        out: the folder to write.
        options: how to train.
        resume: continue what was begun in `out`; start where there is nothing; return the result where it is finished.
        overwrite: replace a model folder that stands in `out`. Files that do not belong to one are left alone.
        progress: told what is going on.

    Raises:
        InputError: the input is wrong; nothing of this run is left in `out`.
        StorageError: the disk refused; the last state that was saved can be resumed.
        VerificationError: what was written is not what was trained, or has other zeros.
    """
    begun = time.perf_counter()
    if find_spec("peft") is None:
        raise InputError("recover trains peft's adapters, which are not installed: pip install 'prunekit[recover]'")
    out = out.expanduser()
    check_output(folder, out, resume=resume, overwrite=overwrite)
    job = _prepare(folder, options, progress)
    finished = _finished(out, job.identity) if resume else None
    if finished is not None:
        progress.say(f"{out} is finished already")
        return finished
    refuse_no_room(out, sum(entry.bytes for entry in job.reader.entries.values()) + 6 * _FLOAT32 * job.trained)
    with ExitStack() as held, torch.random.fork_rng([job.source.device] if job.source.device.type == "cuda" else []):
        model = job.load(folder)
        dense = None if job.dense is None else _load_dense(job, job.dense)
        take_output(folder, out, held, resume=resume, overwrite=overwrite)
        journal = _journal(out, job.identity, resume=resume)
        machine.adopt_threads(journal.identity["machine"]["threads"], progress)
        with orderly_end(out, job.progress, lambda: _saved_steps(journal, job)):
            adapters, training = _training(job, model, dense)
            _train(job, training, journal)
            return _finish(job, journal, adapters, training, begun)


def _prepare(folder: Path, options: RecoveryOptions, progress: Progress) -> _Job:
    source = StreamedModel.open(
        folder, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    if source.dtype == torch.float16:
        raise InputError("gradients do not fit into float16: train with --dtype bfloat16 or float32")
    if options.checkpointing and not source.module.supports_gradient_checkpointing:
        raise InputError(f"{type(source.module).__name__} cannot checkpoint its blocks: leave --checkpointing out")
    manifest = unchanged_manifest(folder)
    linears = _targets(source, options.targets)
    length = window_length(source.module.config, options.length, progress)
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    read = documents(options.data, "calibration")
    windows, held = recovery_windows(read, tokenizer, samples=options.samples, length=length, seed=options.seed)
    check_vocabulary(windows, source.module)
    check_vocabulary(held, source.module)
    dense = None
    if options.distill is not None:
        dense = locate(options.distill, trust_remote_code=options.trust_remote_code, progress=progress)
        _check_dense(options.distill, dense, source, tokenizer, options)
    dtype, device = str(source.dtype).removeprefix("torch."), str(source.device)
    resolved = options.resolved(windows=len(windows), dtype=dtype, device=device)
    masked = _masked(source, linears, manifest)
    identity = {
        # the same model may be called by another path
        "options": resolved.model_dump(mode="json", exclude={"distill"}),
        "inputs": source.reader.sha256(),
        "dense": None if dense is None else Reader(dense).sha256(),
        "tokens": {"trained": token_hash(windows), "held out": token_hash(held)},
        "versions": machine.versions() | {"peft": metadata.version("peft")},
        "machine": machine.describe(),
    }
    return _Job(folder, dense, resolved, source, manifest, linears, masked, windows, held, identity, progress)


def _targets(source: StreamedModel, globs: tuple[str, ...]) -> list[Linear]:
    """The linears that any glob means; all where there is none."""
    linears = list(source.anatomy.linears())
    for glob in globs:
        if not any(linear.matches(glob) for linear in linears):
            known = ", ".join(linear.name for linear in source.anatomy.blocks[0].linears)
            raise InputError(f"target '{glob}' matches no linear of the blocks: they are called {known}")
    return [linear for linear in linears if not globs or any(linear.matches(glob) for glob in globs)]


def _masked(source: StreamedModel, linears: list[Linear], manifest: dict[str, Any] | None) -> set[str]:
    """Names of the linears whose zeros must stay."""
    pruned = {line["name"] for line in manifest["linears"] if line["pattern"] is not None} if manifest else set()
    found = set()
    for linear in linears:
        key = source.key_of[f"{linear.full_name}.weight"]
        if linear.full_name in pruned or count_zeros(source.reader.read([key])[key]) > _FEW * linear.count:
            found.add(linear.full_name)
    return found


def _check_dense(name: str, folder: Path, source: StreamedModel, tokenizer: Any, options: RecoveryOptions) -> None:
    """Raise `InputError` where its predictions are not about the same tokens."""
    trusted = options.trust_remote_code
    opened = StreamedModel.open(folder, dtype=options.dtype, device=options.device, trust_remote_code=trusted)
    ours, theirs = (model.module.get_output_embeddings().weight.shape[0] for model in (source, opened))
    if ours != theirs or tokenizer.get_vocab() != load_tokenizer(folder, trust_remote_code=trusted).get_vocab():
        raise InputError(
            f"'{name}' has another vocabulary ({theirs} tokens, not {ours}, or others): distill from the model this one was made from"
        )


def _load_dense(job: _Job, folder: Path) -> PreTrainedModel:
    model = job.load(folder)
    model.requires_grad_(False)
    return model


def _finished(out: Path, identity: dict[str, Any]) -> Recovery | None:
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None:
        return None
    if manifest.get("recovery") is None:
        raise InputError(f"'{out}' is what prune wrote, not recover: choose another --out")
    refuse_other(out, manifest["recovery"]["identity"], identity)
    changed = changed_files(out, manifest)
    if changed:
        raise InputError(
            f"'{out}' was finished, but {', '.join(changed)} changed since: use --overwrite to recover again"
        )
    return Recovery.of(out, manifest["recovery"]["result"])


def _journal(out: Path, identity: dict[str, Any], *, resume: bool) -> Journal:
    """The journal of a run that begins or goes on; its records are those of the states that are whole."""
    journal = Journal.read(out) if resume else None
    if journal is None:
        journal = Journal.fresh(out, identity)
    elif "options" not in journal.identity:
        raise InputError(f"'{out}' is what an interrupted run of prune left, not recover: choose another --out")
    else:
        refuse_other(out, journal.identity, identity)
        journal.shards = journal.whole_shards()
    journal.save()  # before anything is removed or written, so that a run killed at any moment is known for what it is
    if not journal.shards:
        clear(out, keep=journal.path)
    return journal


def _latest(journal: Journal) -> dict[str, Any] | None:
    return max(journal.shards, key=lambda record: int(record["step"]), default=None)


def _saved_steps(journal: Journal, job: _Job) -> str:
    latest = _latest(journal)
    return f"{0 if latest is None else latest['step']} of {job.options.steps} steps are saved"


def _training(job: _Job, model: PreTrainedModel, dense: PreTrainedModel | None) -> tuple[Adapters, Training]:
    from .recovery.adapters import Adapters  # imports peft

    torch.manual_seed(job.options.seed)  # what peft draws its first matrices with
    adapters = Adapters(model, job.linears, job.masked, job.options)
    return adapters, Training(model, adapters.parameters, job.windows, job.held, job.options, dense)


def _train(job: _Job, training: Training, journal: Journal) -> None:
    """All steps that are not done yet, saving the state on the way."""
    steps, progress = job.options.steps, job.progress
    assert steps is not None
    latest = _latest(journal)
    if latest is not None:
        training.restore(read_file(journal.path.parent / latest["file"]))
        progress.say(f"resuming behind step {training.step} of {steps}")
    progress.start("recovering", steps - training.step)
    saved = time.monotonic()
    if training.due:
        progress.say(f"step 0: held-out perplexity {training.look():.3f}")
    while training.step < steps:
        loss = training.advance()
        if training.due:
            progress.say(f"step {training.step}: held-out perplexity {training.look():.3f}")
        if time.monotonic() - saved >= _SAVE_SECONDS or training.step == steps:
            _save(training, journal)
            saved = time.monotonic()
        progress.step(f"loss {loss:.3f}")
    progress.stop()


def _save(training: Training, journal: Journal) -> None:
    """Write the state beside the one before, then note it: what is killed in between leaves that one whole."""
    latest = _latest(journal)
    position = 0 if latest is None else 1 - latest["position"]
    path = journal.path.parent / f"{STATE_PREFIX}{position}.safetensors"
    digest = write_shard(path, [Piece.of(name, tensor) for name, tensor in training.tensors().items()])
    journal.add({"position": position, "file": path.name, "sha256": digest, "step": training.step}, [])


@dataclass(frozen=True)
class _Merged:
    """The bytes of a tuned weight, merged when its turn comes."""

    reader: Reader
    key: str
    tuned: Tuned

    def tensor(self) -> torch.Tensor:
        """The weight, in its stored dtype and shape."""
        return self.tuned.merged(self.reader.read([self.key])[self.key])

    def __iter__(self) -> Iterator[memoryview]:
        yield bytes_of(self.tensor())


def _finish(job: _Job, journal: Journal, adapters: Adapters, training: Training, begun: float) -> Recovery:
    """Merge, write, compare zeros, then logits; then the manifest."""
    out = journal.path.parent
    merged = {job.key(tuned.linear): _Merged(job.reader, job.key(tuned.linear), tuned) for tuned in adapters.tuned}
    for weight in merged.values():
        weight.tuned.place(weight.tensor())
    model = adapters.detach()
    after = held_out_perplexity(model, job.held)
    window = job.held[-1:]
    expected = tail_logits(model, window, compared_tokens(window))
    sheets = [_with_merged(sheet, merged) for sheet in plain_sheets(job.reader)]
    writer = Writer(out, len(sheets))
    try:
        outputs = write_sheets(job.reader, writer, sheets, job.progress)
        zeros = _compare_zeros(job, out)
        job.progress.say("loading what was written and comparing its logits")
        verification = verify(
            out,
            window,
            expected,
            dtype=job.source.dtype,
            device=job.source.device,
            whole=job.source.parameter_count * job.source.dtype.itemsize <= machine.available_memory_bytes(),
            trust_remote_code=job.options.trust_remote_code,
        )
    except BaseException as problem:
        writer.withdraw_index()  # what nobody has checked must not be taken for finished
        if isinstance(problem, VerificationError):
            remove(journal.path)  # a resume would only write the same again
        raise
    options = job.options
    assert options.steps is not None
    result = Recovery(
        out=out,
        linears=len(job.linears),
        masked=len(job.masked),
        trained=job.trained,
        windows=len(job.windows),
        held_out=len(job.held),
        length=job.windows.length,
        steps=options.steps,
        tokens=options.steps * options.batch * job.windows.length,
        before=training.curve[0],
        after=after,
        losses=training.losses,
        curve=training.curve,
        weights=sum(linear.count for linear in job.source.anatomy.linears()),
        zeros=zeros,
        seconds=time.perf_counter() - begun,
        peak_rss_bytes=machine.peak_rss_bytes(),
        verification=verification,
    )
    if job.manifest is None:
        job.progress.say(f"'{job.folder}' has no prunekit.json, so neither has '{out}'")
        drop_leftovers(out)
        return result
    manifest = {
        **job.manifest,
        "outputs": outputs,
        "verification": asdict(verification),
        "export": None,
        "recovery": {
            "identity": job.identity,
            "distill": options.distill,
            "result": result.record(),
            "earlier": job.manifest.get("recovery"),
        },
    }
    writer.write_manifest(manifest, model_card(manifest, job.folder), run_page(manifest))
    return result


def _with_merged(sheet: Sheet, merged: Mapping[str, _Merged]) -> Sheet:
    pieces = [
        Piece(piece.name, piece.shape, piece.dtype, merged.get(piece.name, piece.chunks)) for piece in sheet.pieces
    ]
    return Sheet(sheet.names, pieces, {})


def _compare_zeros(job: _Job, out: Path) -> int:
    """Count the zeros of all linears as they were written.

    Raises `VerificationError` where one whose zeros must stay has others than its source.
    """
    written = Reader(out)
    total = 0
    for linear in job.source.anatomy.linears():
        key = job.key(linear)
        weight = written.read([key])[key]
        total += count_zeros(weight)
        if linear.full_name in job.masked and not torch.equal(weight == 0, job.reader.read([key])[key] == 0):
            raise VerificationError(
                f"'{key}' in '{out}' has other zeros than in '{job.folder}'. The index was removed so that nothing loads the folder; "
                "please report this"
            )
    return total
