"""Log-likelihoods of continuations, for many groups of sequences that begin alike.

The choices of a question share its text, so the shared tokens go through the model once, and the rest of every choice behind a copy
of their keys and values. Groups whose shared part is equally long go together: nothing is padded on the left, so no family needs a
mask or positions of its own. To have more of them equally long, up to `_STEP` − 1 shared tokens are computed with every choice.
Behind them the choices of all groups go by length, so that little is padded on the right. The head sees only the positions that
are scored.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .perplexity import chunk_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STEP = 4
_PADDING = 64  # tokens: about what one more pass through the model costs on a processor
_ROWS_OF_LOGITS = 4  # times what perplexity holds at a time: batches of some size matter more here


@dataclass(frozen=True)
class Continuation:
    """Tokens, the last `scored` of which are scored, each given all before it."""

    tokens: tuple[int, ...]
    scored: int

    @classmethod
    def cut(cls, tokens: Sequence[int], scored: int, longest: int) -> Continuation:
        """The last `longest` + 1 tokens: what a model that reads `longest` can score."""
        kept = tuple(tokens[-(longest + 1) :])
        return cls(kept, min(scored, len(kept) - 1))

    @property
    def context(self) -> int:
        """Number of tokens the first scored one is given."""
        return len(self.tokens) - self.scored


@dataclass(frozen=True)
class _Row:
    """A sequence whose first tokens are row `owner` of the keys and values; its score goes to `place` of group `number`."""

    sequence: Continuation
    owner: int
    number: int
    place: int


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Continuation]],
    *,
    share: bool = True,
    step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Log-likelihood of the scored tokens of every sequence of every group, in nats.

    Args:
        model: in memory, on its device, in its dtype; logits are made float32 before anything is summed.
        groups: the sequences of a group may share their beginning.
        share: compute what they share once; otherwise every sequence on its own (the same up to rounding).
        step: called once per sequence.

    Raises:
        InputError: the model's logits are not finite, or it keeps no keys and values.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, sequences in enumerate(groups):
        by_length[_shared(sequences) if share else 0].append(number)
    found = [[0.0] * len(sequences) for sequences in groups]
    with _Head(model) as head:
        for shared, numbers in sorted(by_length.items(), reverse=True):
            size = max(1, head.budget // shared) if shared else len(numbers)
            for start in range(0, len(numbers), size):
                together = numbers[start : start + size]
                keys = (
                    _keys(model, head, [groups[number][0].tokens[:shared] for number in together]) if shared else None
                )
                rows = [
                    _Row(sequence, owner, number, place)
                    for owner, number in enumerate(together)
                    for place, sequence in enumerate(groups[number])
                ]
                for batch in _batches(rows, shared, head.budget):
                    for row, score in zip(batch, _score(model, head, batch, shared, keys), strict=True):
                        found[row.number][row.place] = score
                        step()
    return found


def _shared(sequences: Sequence[Continuation]) -> int:
    """How many tokens all sequences begin with and none scores, in whole steps."""
    limit = min(sequence.context for sequence in sequences) - 1  # the last one predicts a scored token
    first = sequences[0].tokens
    same = next(
        (place for place in range(limit) if any(sequence.tokens[place] != first[place] for sequence in sequences)),
        limit,
    )
    return same // _STEP * _STEP


def _batches(rows: Sequence[_Row], shared: int, budget: int) -> Iterator[list[_Row]]:
    """Rows of like length together: at most `budget` tokens and `_PADDING` of padding at a time, but one row at least."""
    batch: list[_Row] = []
    longest = padding = 0
    for row in sorted(rows, key=lambda row: -len(row.sequence.tokens)):
        length = len(row.sequence.tokens) - 1 - shared
        padding += longest - length
        if batch and (padding > _PADDING or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        if not batch:
            longest, padding = length, 0
        batch.append(row)
    if batch:
        yield batch


def _keys(model: PreTrainedModel, head: _Head, prefixes: Sequence[tuple[int, ...]]) -> Any:
    """What the model keeps of equally long beginnings."""
    head.wanted = None
    keys = model(input_ids=torch.tensor(prefixes, device=model.device), use_cache=True).past_key_values
    if not hasattr(keys, "batch_select_indices"):
        raise InputError(f"{type(model).__name__} keeps no keys and values that choices could share")
    return keys


def _score(model: PreTrainedModel, head: _Head, rows: Sequence[_Row], shared: int, keys: Any) -> list[float]:
    """Log-likelihoods of some rows behind the keys and values of their first `shared` tokens, or None where that is 0."""
    device = model.device
    if keys is not None:
        keys = copy.deepcopy(keys)  # the model adds to them
        keys.batch_select_indices(torch.tensor([row.owner for row in rows], device=device))
    width = len(rows[0].sequence.tokens) - 1 - shared
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    wanted = torch.zeros(len(rows), width, dtype=torch.bool)
    targets: list[int] = []
    for number, row in enumerate(rows):
        read = row.sequence.tokens[shared:-1]
        ids[number, : len(read)] = torch.tensor(read)
        wanted[number, len(read) - row.sequence.scored : len(read)] = True
        targets += row.sequence.tokens[-row.sequence.scored :]
    head.wanted = wanted.to(device)
    output = model(input_ids=ids.to(device), past_key_values=keys, use_cache=keys is not None)
    logits = output.logits[0].float()  # [scored positions of all rows, vocabulary]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(targets, device=device), reduction="none").double()
    if not bool(losses.isfinite().all()):
        raise InputError(f"the model's logits are NaN or infinite in {model.dtype}: try --dtype float32")
    return [-float(part.sum()) for part in torch.split(losses.cpu(), [row.sequence.scored for row in rows])]


class _Head:
    """While open, the model's output head sees only what is `wanted` of [rows, tokens, hidden], as one row; None: nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._module = model.get_output_embeddings()
        self.budget = _ROWS_OF_LOGITS * chunk_tokens(self._module.weight.shape[0])
        self.wanted: Tensor | None = None

    def __enter__(self) -> _Head:
        self._handle = self._module.register_forward_pre_hook(self._cut)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _cut(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return ((hidden[:, :0] if self.wanted is None else hidden[self.wanted][None]),)
