"""The output folder: one shard per block as soon as it is pruned, index and config last.

Until the index stands, nothing loads the folder; until the manifest stands, prunekit takes it for unfinished. The shards are also
what a resumed run starts from; `Journal` says which of them are whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, StorageError
from .bitmask import INDEX_NAME as PACKED_INDEX_NAME
from .lock import LOCK_NAME
from .reader import INDEX_NAME, sha256_file
from .shard import Piece, write_shard
from .storage import is_temporary, remove, replace_file, write_json, write_text

JOURNAL_NAME = ".prunekit-journal.json"
MANIFEST_NAME = "prunekit.json"
CARD_NAME = "README.md"
PAGE_NAME = "report.html"
EVALUATION_NAME = "evaluation.json"
MODELING_NAME = "modeling_prunekit.py"
HIDDEN_PREFIX = ".prunekit-hidden-"
PLAN_NAME = "prune_plan.json"
STATE_PREFIX = ".prunekit-recovery-"
SEARCH_PREFIX = ".prunekit-search-"
PAGES = (
    CARD_NAME,
    PAGE_NAME,
    EVALUATION_NAME,
)  # what says something of one folder's weights, and is wrong of any other's

_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_TEMPLATES = "additional_chat_templates"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    MODELING_NAME,
)
# what a training run leaves beside a model: true of the original, not of the result
_LEFT_BEHIND = ("trainer_state", "training_args", "optimizer", "scheduler", "adapter_", "all_results", "train_results")
_CARRIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")


@dataclass
class Journal:
    """Which shards of an unfinished output are whole, and what run they belong to.

    Attributes:
        identity: what must be equal for a resume: recipe, input hashes, calibration tokens, versions.
        shards: one record per finished shard, by position: `position`, `file`, `sha256`, `tensors`, `bytes`, and the reports of
            its `linears`, and what else was `noted` of its block.
        hidden: which blocks' inputs are saved, at most the latest two: `block` and `parts` (`start`, `stop`, `sha256`).
        profile: what was found of the whole model before its first block was changed, as JSON; None where nothing was.
    """

    path: Path
    identity: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    hidden: list[dict[str, Any]] = field(default_factory=list)
    profile: Any = None

    @classmethod
    def fresh(cls, folder: Path, identity: dict[str, Any]) -> Journal:
        """The journal of a run that begins."""
        return cls(folder / JOURNAL_NAME, identity)

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal left in `folder`, or None. Raises `InputError` if it cannot be understood."""
        path = folder / JOURNAL_NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            identity, shards = content["identity"], content["shards"]
            hidden = content["hidden"]
            described = all(
                shard["file"] and shard["sha256"] and shard["position"] >= 0 and "noted" in shard for shard in shards
            )
            if not (isinstance(identity, dict) and described and all(note["parts"] for note in hidden)):
                raise TypeError("not a journal")
            return cls(path, identity, shards, hidden, content["profile"])
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise InputError(f"'{path}' cannot be read ({problem}): start afresh with --overwrite") from None

    def add(self, shard: dict[str, Any], linears: list[dict[str, Any]], noted: Mapping[str, Any] | None = None) -> None:
        """Note a shard that is durable, with the reports of its linears and what else a resume must know, and make that durable."""
        others = [record for record in self.shards if record["position"] != shard["position"]]
        self.shards = sorted(
            [*others, {**shard, "linears": linears, "noted": noted or {}}], key=lambda record: record["position"]
        )
        self.save()

    def note_hidden(self, block: int, parts: list[dict[str, Any]]) -> None:
        """Note that the inputs of `block` are durable. Those of the block before are kept, older ones are written over."""
        kept = [note for note in self.hidden if note["block"] == block - 1]
        self.hidden = [*kept, {"block": block, "parts": parts}]
        self.save()

    def save(self) -> None:
        """Make the present state durable."""
        content = {
            "identity": self.identity,
            "shards": self.shards,
            "hidden": self.hidden,
            "profile": self.profile,
        }
        write_json(self.path, content, indent=None)

    def whole_shards(self) -> list[dict[str, Any]]:
        """The records whose files are there and have the recorded hash; a torn shard is written again."""
        folder = self.path.parent
        return [
            record
            for record in self.shards
            if (folder / record["file"]).is_file() and sha256_file(folder / record["file"]) == record["sha256"]
        ]


def difference(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Names under which two identities differ, with both values, for the sentence of a refused resume."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        left, right = found.get(name), wanted.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += difference(left, right, f"{prefix}{name}.")
        elif left != right:
            lines.append(f"{prefix}{name} is {json.dumps(left)} there and {json.dumps(right)} here")
    return lines


class Writer:
    """Fills one output folder.

    `shards` is the number of weight files it will hold: of a pruned model one per block and one for the rest. Files of `packed`
    weights have names of their own, so that no loader takes them for plain ones.
    """

    def __init__(self, folder: Path, shards: int, *, packed: bool = False) -> None:
        self.folder = folder
        self.shards = shards
        self.index = PACKED_INDEX_NAME if packed else INDEX_NAME
        self._stem = "bitmask" if packed else "model"

    def shard_name(self, position: int) -> str:
        """File name of a shard; of plain ones the form every Hugging Face loader knows."""
        return f"{self._stem}-{position + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(
        self, position: int, pieces: Iterable[Piece], metadata: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Write one shard durably, `metadata` in its header, and return its journal record. Raises `StorageError`."""
        listed = list(pieces)
        path = self.folder / self.shard_name(position)
        return {
            "position": position,
            "file": path.name,
            "sha256": write_shard(path, listed, metadata),
            "tensors": sorted(piece.name for piece in listed),
            "bytes": sum(piece.bytes for piece in listed),
        }

    def write_index(self, records: list[dict[str, Any]]) -> None:
        """Write the index: from here on the folder loads."""
        weight_map = {name: record["file"] for record in records for name in record["tensors"]}
        total = sum(record["bytes"] for record in records)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / self.index, index)

    def withdraw_index(self) -> None:
        """Take the index away: nothing loads the folder any more."""
        remove(self.folder / self.index)

    def carry_over(self, source: Path, with_code: bool, written: Mapping[str, str] | None = None) -> list[str]:
        """Copy config, tokenizer, chat template, generation and licence files as they are; config.json comes last.

        `written` holds the texts of files that are written in the place of the source's: of a model in another shape its config.json,
        and the code that loads it if it needs any.
        """
        carried = []
        texts = dict(written or {})
        config = texts.pop("config.json", None)
        for name, text in sorted(texts.items()):
            write_text(self.folder / name, text)
            carried.append(name)
        for path in sorted(source.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            if written is not None and path.name in (*written, MODELING_NAME):
                continue
            if path.is_dir() and path.name == _TEMPLATES:
                try:
                    (self.folder / _TEMPLATES).mkdir(exist_ok=True)
                except OSError as problem:
                    raise StorageError(f"cannot make '{self.folder / _TEMPLATES}': {problem.strerror}") from problem
                for template in sorted(path.glob("*.jinja")):
                    replace_file(self.folder / _TEMPLATES / template.name, partial(_copy, template))
                    carried.append(f"{_TEMPLATES}/{template.name}")
            elif path.is_file() and _is_carried(path, with_code):
                replace_file(self.folder / path.name, partial(_copy, path))
                carried.append(path.name)
        if config is not None:
            write_text(self.folder / "config.json", config)
            carried.append("config.json")
        return carried

    def write_manifest(self, manifest: dict[str, Any], card: str, page: str) -> None:
        """Write the page, the model card, then the manifest, which marks a finished run; then drop what only resuming needs."""
        write_text(self.folder / PAGE_NAME, page)
        write_text(self.folder / CARD_NAME, card)
        write_json(self.folder / MANIFEST_NAME, manifest)
        drop_leftovers(self.folder)


def refuse_unfinished(folder: Path) -> None:
    """Raise `InputError` for the output of a run that was interrupted: it may be loadable, but nobody has checked it."""
    journal = None if (folder / MANIFEST_NAME).is_file() else Journal.read(folder)
    if journal is None:
        return
    if "export" in journal.identity:
        raise InputError(f"'{folder}' is the output of an export that was interrupted: run it again with --overwrite")
    if "options" in journal.identity:
        raise InputError(
            f"'{folder}' is the output of a recovery that was interrupted: finish it with the same command and --resume"
        )
    raise InputError(
        f"'{folder}' is the output of a run that was interrupted after {len(journal.shards)} shards: "
        "finish it with the same command and --resume"
    )


def leftovers(folder: Path) -> list[Path]:
    """What in `folder` nobody needs behind a manifest: the journal, hidden states, half-written files."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name == JOURNAL_NAME or (is_leftover(path) and path.name != LOCK_NAME)
    ]


def drop_leftovers(folder: Path) -> None:
    """Remove them. Raises `StorageError`."""
    for path in leftovers(folder):
        remove(path)


def clear(folder: Path, *, keep: Path | None = None, keep_search: bool = False) -> None:
    """Remove from `folder` what a model folder consists of, save `keep` and what a search has found; other files stay.

    Raises `StorageError`.

    The manifest goes first, so that half a folder is never taken for a finished run; the journal goes last, so that it is known
    for ours as long as anything is left.
    """
    if not folder.is_dir():
        return
    last = {MANIFEST_NAME: 0, JOURNAL_NAME: 2}
    for path in sorted(model_files(folder), key=lambda path: last.get(path.name, 1)):
        if path != keep and not (keep_search and path.name.startswith(SEARCH_PREFIX)):
            remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def model_files(folder: Path) -> list[Path]:
    """What in `folder` belongs to a model or to a run of prunekit, by name; not its lock, which whoever holds it removes."""
    ours = {
        JOURNAL_NAME,
        MANIFEST_NAME,
        PLAN_NAME,
        *PAGES,
        INDEX_NAME,
        PACKED_INDEX_NAME,
        *_MODEL_FILES,
        *_written_before(folder),
    }
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name != LOCK_NAME
        and (
            (path.is_dir() and (path.name == _TEMPLATES or path.name.startswith(HIDDEN_PREFIX)))
            or (path.is_file() and (path.name in ours or path.suffix == ".safetensors" or is_leftover(path)))
        )
    ]


def is_leftover(path: Path) -> bool:
    """Whether this is what a run keeps only while it runs: a half-written file, hidden states, adapters, a search, its lock."""
    return (
        is_temporary(path)
        or path.name.startswith((HIDDEN_PREFIX, STATE_PREFIX, SEARCH_PREFIX))
        or path.name == LOCK_NAME
    )


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model or what a run of prunekit left, finished or not."""
    if (folder / MANIFEST_NAME).is_file() or (folder / JOURNAL_NAME).is_file():
        return True
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _written_before(folder: Path) -> set[str]:
    """File names a finished run's manifest lists; none where there is no readable manifest."""
    try:
        outputs = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["outputs"]
        return {name for name in outputs if "/" not in name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _is_carried(path: Path, with_code: bool) -> bool:
    if path.name in (MANIFEST_NAME, JOURNAL_NAME, PLAN_NAME, *PAGES) or path.name.endswith(".index.json"):
        return False
    if path.name.startswith(_LEFT_BEHIND):
        return False
    if path.suffix == ".py":
        return with_code
    return path.suffix in _CARRIED_SUFFIXES or path.name.startswith(_CARRIED_STEMS)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
