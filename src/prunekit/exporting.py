"""`export`: the same weights in another form, bit for bit: packed by their zeros, plain again, or filled up with zeros to one width.

A file of the source becomes a file of the output, read and written a few rows at a time. Then everything that was written is read
again and compared with the source; the index, without which nothing loads the folder, is written before, and taken away again with
all the rest if anything goes wrong.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from . import machine
from .checkpoint.bitmask import VERSION
from .checkpoint.manifest import unchanged_manifest
from .checkpoint.output import check_output, refuse_no_room, take_output
from .checkpoint.packing import Sheet, packed_sheets, plain_sheets
from .checkpoint.reader import Reader, sha256_file
from .checkpoint.shard import Piece
from .checkpoint.storage import write_json, write_text
from .checkpoint.writer import (
    CARD_NAME,
    EVALUATION_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    Journal,
    Writer,
    clear,
    drop_leftovers,
    refuse_unfinished,
)
from .errors import StorageError, VerificationError
from .evaluation.record import read_record
from .model.source import StreamedModel
from .progress import Progress, Silent
from .report.card import padded_card
from .report.page import run_page
from .shrink.padding import padded

FORMATS = ("bitmask", "gguf", "zip-free")

Form = Literal["zip-free", "bitmask", "padded"]

_NOTES: dict[Form, str] = {
    "zip-free": "",
    "bitmask": "\n## Packed\n\nThe weights of this folder are packed: for every entry a bit, then the entries that are not zero. "
    "`prunekit.load(folder)` loads it, and `prunekit export FOLDER --format zip-free --out PLAIN` makes of it, bit for bit, the "
    "folder that transformers loads.\n",
    "padded": "\n## Padded\n\nThe blocks of this folder are filled up with zeros to one width, so that transformers loads it as it is. "
    "It computes what the folder it was made from does, which is smaller and faster and loads with `prunekit.load(folder)` or "
    "`trust_remote_code=True`.\n",
}


@dataclass(frozen=True)
class Export:
    """What an export wrote. Bytes are those of the weight files; `packed_before` and `packed_after` those of the packed weights alone.

    `dense` is what all tensors take unpacked.
    """

    model: str
    out: Path
    format: str
    tensors: int
    packed: int
    dense: int
    before: int
    after: int
    packed_before: int
    packed_after: int
    seconds: float
    peak_rss_bytes: int

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {
            **asdict(self),
            "out": str(self.out),
            "ratio": self.after / self.dense,
            "packed_ratio": self.packed_after / self.packed_before if self.packed else None,
        }


def export_folder(
    folder: Path, out: Path, *, form: Form, overwrite: bool = False, progress: Progress | None = None
) -> Export:
    """Write a model folder in another form.

    Args:
        folder: a model folder, plain or packed.
        out: the folder to write.
        form: `bitmask` packs what has enough zeros, `zip-free` is plain, `padded` gives blocks of different widths one.
        overwrite: replace a model folder that stands in `out`. Files that do not belong to one are left alone.
        progress: told what is going on.

    Raises:
        InputError: the input is wrong; nothing was written.
        StorageError: the disk refused; what was written is removed.
        VerificationError: what was written does not hold the source's bits; it is removed.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    out = out.expanduser()
    refuse_unfinished(folder)
    reader = Reader(folder)
    manifest = unchanged_manifest(folder)
    check_output(folder, out, resume=None, overwrite=overwrite)
    sheets, wanted, texts = _laid_out(reader, form)
    after = sum(sheet.bytes for sheet in sheets)
    refuse_no_room(out, after)
    with ExitStack() as held:
        take_output(folder, out, held, resume=None, overwrite=overwrite)
        journal = Journal.fresh(out, {"export": form})
        try:
            journal.save()  # a killed export is known for what it is
            clear(out, keep=journal.path)
            writer = Writer(out, len(sheets), packed=form == "bitmask")
            outputs = write_sheets(reader, writer, sheets, progress, texts)
            _compare(wanted, out, folder, progress)
            _finish(reader, writer, form, manifest, outputs)
        except BaseException:
            with suppress(StorageError):
                clear(out)
            raise
        finally:
            progress.stop()
    names = {name for sheet in sheets for name in sheet.packed}
    return Export(
        model=str(folder),
        out=out,
        format=form,
        tensors=len(wanted),
        packed=len(names),
        dense=sum(piece.bytes for piece in wanted),
        before=sum((folder / file).stat().st_size for file in reader.files),
        after=after,
        packed_before=sum(reader.entries[name].bytes for name in names),
        packed_after=sum(
            piece.bytes
            for sheet in sheets
            if sheet.packed
            for piece in sheet.pieces
            if piece.name not in reader.entries
        ),
        seconds=time.perf_counter() - begun,
        peak_rss_bytes=machine.peak_rss_bytes(),
    )


def _laid_out(reader: Reader, form: Form) -> tuple[list[Sheet], list[Piece], dict[str, str] | None]:
    """The files to write, the tensors they stand for, and the texts that go with them."""
    if form == "padded":
        layout, sheets = padded(StreamedModel.open(reader.folder, dtype="float32", device="cpu"))
        return sheets, [piece for sheet in sheets for piece in sheet.pieces], layout.texts
    sheets = packed_sheets(reader) if form == "bitmask" else plain_sheets(reader)
    return sheets, [Piece.stored(name, reader) for name in reader.entries], None


def write_sheets(
    reader: Reader, writer: Writer, sheets: list[Sheet], progress: Progress, texts: dict[str, str] | None = None
) -> dict[str, str]:
    """Write weights, index, config and tokenizer; returns file name -> sha256."""
    progress.start("writing", len(sheets))
    records = []
    for position, sheet in enumerate(sheets):
        record = writer.write_shard(position, sheet.pieces, sheet.metadata)
        records.append({**record, "tensors": sheet.names})
        progress.step(record["file"])
    progress.stop()
    carried = writer.carry_over(reader.folder, with_code=True, written=texts)
    writer.write_index(records)
    hashes = {name: sha256_file(writer.folder / name) for name in (writer.index, *carried)}
    return hashes | {record["file"]: record["sha256"] for record in records}


def _compare(wanted: list[Piece], out: Path, folder: Path, progress: Progress) -> None:
    """Raise `VerificationError` where a tensor of the written folder has other bits than what `folder` gives."""
    written = Reader(out)
    progress.start("comparing", len(wanted))
    for piece in wanted:
        there = written.entries.get(piece.name)
        if (
            there is None
            or (there.shape, there.dtype) != (piece.shape, piece.dtype)
            or _digest(written.chunks(piece.name)) != _digest(piece.chunks)
        ):
            raise VerificationError(
                f"'{piece.name}' in '{out}' is not what '{folder}' holds: the output was removed; please report this"
            )
        progress.step()
    progress.stop()


def _digest(chunks: Iterable[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def _finish(
    reader: Reader, writer: Writer, form: Form, manifest: dict[str, Any] | None, outputs: dict[str, str]
) -> None:
    """Card, evaluation, page and manifest with the new hashes, where the source has them; then nothing marks it as unfinished."""
    card = reader.folder / CARD_NAME
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace").removesuffix(_NOTES["bitmask"])
        text = padded_card(text) if form == "padded" else text
        write_text(writer.folder / CARD_NAME, text + _NOTES[form])
    evaluation = reader.folder / EVALUATION_NAME
    if evaluation.is_file():  # the same weights: what was measured of them still holds
        write_text(writer.folder / EVALUATION_NAME, evaluation.read_text(encoding="utf-8"))
    if manifest is not None:
        export = {"zip-free": None, "bitmask": {"format": form, "version": VERSION}, "padded": {"format": form}}[form]
        manifest = {**manifest, "outputs": outputs, "export": export}
        write_text(writer.folder / PAGE_NAME, run_page(manifest, read_record(reader.folder)))
        write_json(writer.folder / MANIFEST_NAME, manifest)
    drop_leftovers(writer.folder)
