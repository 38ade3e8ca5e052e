"""Multiple-choice tasks from files: a JSON object a line, scored as lm-evaluation-harness scores its own.

A line holds `{"context", "choices", "label"}`, or `{"contexts", "continuation", "label"}` for tasks that complete one ending behind
several beginnings (WinoGrande's partial scoring). Choice i scores log p(" " + choice | context); `acc` is how often the right one
scores highest, `acc_norm` how often it does per character. Pairs are cut into tokens by lm-evaluation-harness' rules, so that
figures agree with its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..model.anatomy import longest_context
from ..progress import Progress
from ..recipe import DEFAULT_LENGTH
from .interval import Values, standard_error
from .likelihood import Continuation, log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) of each choice, the length of each in characters, and which is right."""

    pairs: tuple[tuple[str, str], ...]
    characters: tuple[int, ...]
    label: int


def read_task(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` questions of a file, or all. Raises `InputError` naming the line that is wrong."""
    items: list[Item] = []
    for number, line in _lines(path):
        if limit is not None and len(items) == limit:
            break
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, KeyError, TypeError) as problem:
            reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
            raise InputError(
                f"line {number} of '{path}' is no question: {reason}. It must be a JSON object with context, choices and label, or "
                "contexts, continuation and label"
            ) from None
    if not items:
        raise InputError(f"'{path}' holds no questions: give a .jsonl file with one JSON object a line")
    return items


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"task file '{path}' cannot be read: {problem}") from None


def _item(line: Any) -> Item:
    if not isinstance(line, dict):
        raise TypeError("it is not an object")
    label = line["label"]
    if "contexts" in line:
        contexts, endings = line["contexts"], [line["continuation"]] * len(line["contexts"])
    else:
        endings = line["choices"]
        contexts = [line["context"]] * len(endings)
    if not all(isinstance(text, str) for text in (*contexts, *endings)):
        raise TypeError("contexts and choices must be text")
    if not all(endings):
        raise ValueError("a choice is empty")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(endings):
        raise ValueError(f"label {label!r} is not the number of one of its {len(endings)} choices, from 0")
    pairs = tuple((context, " " + ending) for context, ending in zip(contexts, endings, strict=True))
    return Item(pairs, tuple(len(ending) for ending in endings), label)


def encode(item: Item, tokenizer: Any, longest: int) -> list[Continuation]:
    """The item's choices as tokens; what is longer than `longest` + 1 loses its beginning."""
    return [_encode_pair(context, ending, tokenizer, longest) for context, ending in item.pairs]


def _encode_pair(context: str, ending: str, tokenizer: Any, longest: int) -> Continuation:
    if not context:  # conditioned on the token a text begins with
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise InputError(
                "the tokenizer has no token a text begins or ends with: give questions that have a context"
            )
        tokens = tokenizer.encode(ending, add_special_tokens=False)
        tokens = tokens if tokens[0] == first else [first, *tokens]
        return Continuation.cut(tokens, len(tokens) - 1, longest)
    bare = context.rstrip()
    ending = context[len(bare) :] + ending  # tokens begin with their space, they do not end with it
    plain = {"add_special_tokens": False} if tokenizer.bos_token and bare.startswith(tokenizer.bos_token) else {}
    tokens = tokenizer.encode(bare + ending, **plain)
    scored = len(tokens) - len(tokenizer.encode(bare, **plain))
    if scored < 1:
        raise InputError(f"the tokenizer leaves no token of {ending!r} behind {bare[-40:]!r}")
    return Continuation.cut(tokens, scored, longest)


@dataclass(frozen=True)
class Figure:
    """A metric: its value, its standard error, and what it is the mean of, [items], where it is a mean over questions."""

    value: float
    stderr: float | None
    values: Values | None

    @classmethod
    def mean(cls, values: Values) -> Figure:
        """Of one value a question."""
        return cls(float(values.mean()), standard_error(values), values)


@dataclass(frozen=True)
class Scored:
    """A model on a task of `n` questions: metric -> figure."""

    task: str
    n: int
    metrics: dict[str, Figure]


def file_tasks(tasks: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Which tasks are files: name -> path, a folder standing for all its `.jsonl` files; and the others, as named.

    Raises `InputError` where a file does not exist or two tasks have one name.
    """
    files: dict[str, Path] = {}
    others: list[str] = []
    for task in tasks:
        path = Path(task).expanduser()
        if path.is_dir():
            paths = sorted(path.glob("*.jsonl"))
            if not paths:
                raise InputError(f"task folder '{task}' holds no .jsonl files")
        elif path.suffix == ".jsonl":
            paths = [path]
        else:
            others.append(task)
            continue
        for one in paths:
            if one.stem in files or one.stem in others:
                raise InputError(f"two tasks are called '{one.stem}': name one of them otherwise")
            files[one.stem] = one
    return files, others


def score_items(
    name: str, items: Sequence[Item], model: PreTrainedModel, tokenizer: Any, *, progress: Progress
) -> Scored:
    """`acc` and `acc_norm` of a model on the questions of a task. Raises `InputError`."""
    longest = longest_context(model.config) or DEFAULT_LENGTH
    encoded = [encode(item, tokenizer, longest) for item in items]
    progress.start(name, sum(len(item.pairs) for item in items))
    scores = log_likelihoods(model, encoded, step=progress.step)
    progress.stop()
    acc, acc_norm = judge(items, scores)
    return Scored(name, len(items), {"acc": Figure.mean(acc), "acc_norm": Figure.mean(acc_norm)})


def judge(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> tuple[Values, Values]:
    """Whether each question was answered rightly (1 or 0) by the log-likelihood of its choices, and by that per character.

    Of equal ones the first counts.
    """
    plain, per_character = [], []
    for item, values in zip(items, scores, strict=True):
        plain.append(int(np.argmax(values)) == item.label)
        per_character.append(int(np.argmax(np.asarray(values) / item.characters)) == item.label)
    return np.asarray(plain, dtype=np.float64), np.asarray(per_character, dtype=np.float64)
