"""Token windows: a text is tokenised once, document by document, and cut into pieces of equal length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..model.anatomy import longest_context
from ..model.stream import Windows
from ..progress import Progress
from ..recipe import DEFAULT_LENGTH, Recipe
from .document import Document
from .text import documents as documents_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLENTY = 4  # random windows are drawn from so many times the tokens they need, or from all there are
_MOST_TRAINED = 25_600  # windows of a recovery where nothing is said: two passes over them are 800 steps of 64
_MOST_HELD_OUT = 32
_SEPARATOR = "\n\n"
_GROUP = 32  # documents tokenised in one call


def window_length(config: Any, asked: int | None, progress: Progress, *, option: str = "--length") -> int:
    """Tokens per window: as asked, or the default cut to the model's maximum. Raises `InputError` beyond that maximum.

    `option` is where it was asked for.
    """
    if asked is not None and asked < 2:
        raise InputError(f"length {asked} is too short: a window needs 2 tokens or more")
    longest = longest_context(config)
    if asked is None:
        if longest is not None and longest < DEFAULT_LENGTH:
            progress.say(f"window length is {longest}, the model's maximum")
            return longest
        return DEFAULT_LENGTH
    if longest is not None and asked > longest:
        raise InputError(
            f"length {asked} is more than the {longest} positions the model knows: give {option} {longest} or less"
        )
    return asked


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The folder's tokenizer. Raises `InputError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers raises a dozen kinds here, all of them about these files
        files = [path for kind in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(kind)]
        reason = (
            first_line(problem)
            if files
            else "it holds none of a tokenizer's files; copy the model's tokenizer.json there"
        )
        raise InputError(f"'{folder}' has no tokenizer that transformers can load: {reason}") from None


def check_vocabulary(windows: Windows, model: PreTrainedModel) -> None:
    """Raise `InputError` where a token has no row in the embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    for token in (int(windows.ids.min()), int(windows.ids.max())):
        if not 0 <= token < rows:
            raise InputError(
                f"token {token} is not one of the {rows} the model's embedding has: model and tokenizer do not belong together"
            )


def tokenise(documents: Iterable[Document], tokenizer: Any, enough: int | None = None) -> Tensor:
    """All documents as one stream of token ids, a blank line between them; stops once there are `enough`.

    Special tokens are added as the tokenizer does for any text, so a beginning-of-text token opens every document and windows cut
    from the middle have none.
    """
    stream: list[int] = []
    texts = (text for text in (document.read() for document in documents) if text.strip())
    waiting = next(texts, None)  # the last text has no separator behind it, so each waits for the next one
    while waiting is not None and (enough is None or len(stream) < enough):
        group: list[str] = []
        while waiting is not None and len(group) < _GROUP:
            following = next(texts, None)
            group.append(waiting if following is None else waiting + _SEPARATOR)
            waiting = following
        for ids in tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]:
            stream.extend(ids)
    return torch.tensor(stream, dtype=torch.long)


def calibration_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    sampling: Literal["random", "first"],
) -> Windows:
    """`samples` windows of `length` tokens.

    `random`: documents in an order drawn by `seed`, windows at positions drawn by `seed`. `first`: the first non-overlapping ones.
    Raises `InputError` where the text holds fewer than `samples` non-overlapping windows.
    """
    needed = samples * length
    if sampling == "first":
        stream = tokenise(documents, tokenizer, needed)
        _check_enough(stream, samples, length)
        return Windows(stream[:needed].reshape(samples, length).clone())
    draw = random.Random(seed)
    order = list(documents)
    draw.shuffle(order)
    stream = tokenise(order, tokenizer, needed * _PLENTY)
    _check_enough(stream, samples, length)
    starts = sorted(draw.sample(range(len(stream) - length + 1), samples))
    draw.shuffle(starts)
    return Windows(torch.stack([stream[start : start + length] for start in starts]))


def recipe_windows(recipe: Recipe, tokenizer: Any, *, length: int, samples: int | None = None) -> Windows:
    """The calibration windows a recipe asks for, of `length` tokens; so many of them as it says, or `samples`.

    Raises `InputError` for a text that cannot be read or holds fewer.
    """
    calibration = recipe.calibration
    return calibration_windows(
        documents_of(calibration.source, "calibration"),
        tokenizer,
        samples=calibration.samples if samples is None else samples,
        length=length,
        seed=recipe.seed,
        sampling=calibration.sampling,
    )


def evaluation_windows(
    documents: Sequence[Document], tokenizer: Any, *, length: int, samples: int | None = None
) -> Windows:
    """The text in non-overlapping windows of `length` tokens, the tail dropped; the first `samples` of them, or all."""
    stream = tokenise(documents, tokenizer, None if samples is None else samples * length)
    _check_enough(stream, samples or 1, length)
    count = min(samples or len(stream), len(stream) // length)
    return Windows(stream[: count * length].reshape(count, length).clone())


def recovery_windows(
    documents: Sequence[Document], tokenizer: Any, *, samples: int | None, length: int, seed: int
) -> tuple[Windows, Windows]:
    """Windows to train on and windows to measure on, which share no token, of documents in an order drawn by `seed`.

    `samples` is how many to train on, by default all the text holds within limits. Of those that are there a tenth is held out, at
    most 32. Raises `InputError` where the text holds fewer.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    stream = tokenise(order, tokenizer, ((samples or _MOST_TRAINED) + _MOST_HELD_OUT) * length)
    there = len(stream) // length
    held = min(_MOST_HELD_OUT, max(1, there // 10))
    _check_enough(stream, held + (samples or 1), length)
    count = held + min(samples or _MOST_TRAINED, there - held)
    ids = stream[: count * length].reshape(count, length)
    return Windows(ids[held:].clone()), Windows(ids[:held].clone())


def token_hash(windows: Windows) -> str:
    """sha256 of the window's token ids (int64, row by row) and, where there is one, of the mask."""
    digest = hashlib.sha256(windows.ids.contiguous().numpy().tobytes())
    if windows.keep is not None:
        digest.update(windows.keep.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_enough(stream: Tensor, samples: int, length: int) -> None:
    there = len(stream) // length
    if there == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, less than one window of {length}: give more text or a smaller --length"
        )
    if samples > there:
        raise InputError(
            f"{samples} windows of {length} tokens are asked for, but the text has {len(stream)} tokens, enough for {there}: "
            "give more text, fewer --samples or a smaller --length"
        )
