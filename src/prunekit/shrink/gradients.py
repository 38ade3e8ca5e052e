"""Gradients of an objective with respect to every weight of the blocks, one block in memory at a time, reduced as they appear.

The windows go forward block by block and leave each block's inputs behind. The objective's derivative enters behind the last block
and goes back block by block: each is run once more, with gradients, from the inputs it left. Hooks on its linears see what each was
fed and the derivative of what it returned, whose product is the gradient of its weight; that is multiplied with the weight and
summed over rows or columns at once, a million entries at a time. Where all windows make one batch, gradients take no more memory than
those; else one block's are carried from batch to batch.

With W a weight, G_j the gradient of window j's objective, G their mean over N windows and A the mean of G_j², the sums are over
    gradient_abs     |W∘G|
    gradient_signed  W∘G
    gradient_second  W∘A∘W
    gradient_mixed   |W∘G − ½ W∘A∘W|
and taken over the rows of a linear that produces units and the columns of one that consumes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..bits import all_finite, row_chunks
from ..blockwalk import activation_bytes, block_parameters
from ..errors import InputError
from ..evaluation.perplexity import chunk_tokens
from ..machine import return_memory
from ..model.anatomy import Block, Linear
from ..model.hidden import HiddenStates
from ..model.source import Source
from ..model.stream import Walk, Windows
from .plan import Structures
from .units import Structure
from .view import Gradients

ABS, SIGNED, SECOND, MIXED = "gradient_abs", "gradient_signed", "gradient_second", "gradient_mixed"
GRADIENTS = frozenset({ABS, SIGNED, SECOND, MIXED})
LOSS, OUTPUT = "loss", "output"

BATCH_TOKENS = 1024  # that go through a block with gradients together: what it computes on the way is kept for them
_KEPT = 3  # times the activations a block holds at a time are kept for its gradients
_HEAD_COPIES = 2  # logits and the derivative at them are held at a time


def measure_gradients(
    source: Source,
    windows: Windows,
    structures: Structures,
    needs: frozenset[str],
    objective: str,
    stored: Callable[[Linear], Tensor],
    *,
    batch: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[dict[str, Gradients]]:
    """Per block, the sums that `needs` names, of every linear that a structure slices, by its name in the block.

    Args:
        source: the dense model, in eval mode. Its blocks and what lies outside them are freed at the end.
        windows: the objective is the mean over them.
        structures: of every block.
        needs: some of `GRADIENTS`.
        objective: `loss`, the mean negative log-likelihood of a window's predictions; `output`, the mean over the vocabulary of the
            largest logit in a window.
        stored: a linear's weight as the checkpoint holds it, asked for while its block is loaded.
        batch: windows that go through a block together.
        step: called after each block, both ways.

    Passes run in the source's dtype; products with weights and sums in float32 or better. Raises `InputError` where activations or
    gradients are not finite.
    """
    if not needs or needs - GRADIENTS or objective not in (LOSS, OUTPUT):
        raise ValueError(f"cannot measure {sorted(needs)} of objective '{objective}'")
    # gradients need tensors that were not made in inference mode, and a caller may be in it
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        windows = Windows(windows.ids.clone(), windows.keep)
        walk = Walk(source, windows, batch or max(1, BATCH_TOKENS // windows.length))
        walk.prepare()
        count, blocks = len(windows), source.anatomy.blocks
        # the inputs of all blocks, one block's windows behind another's
        shape = (len(blocks) * count, *walk.shape[1:])
        inputs = stack.enter_context(source.scratch.room_for(shape, walk.dtype, source.device, weight_bytes(source)))
        walk.start(stack.enter_context(walk.room()))
        source.free_block(0)  # read in inference mode to be tried
        for block in blocks:
            module = source.load_block(block.index)
            source.prefetch(block.index + 1)
            for part in walk.batches:
                inputs[_behind(part, block.index * count)] = walk.hidden[part]
            walk.run(block.index, module)
            if block.index < len(blocks) - 1:  # the last one is the first on the way back
                source.free_block(block.index)
            return_memory()
            step()
        inputs.turn()
        shares = _derive(walk, walk.hidden, objective)
        found = []
        for block in reversed(blocks):
            module = source.load_block(block.index)
            if block.index:
                source.prefetch(block.index - 1)
            sums = _sums_of(block, structures[block.index], needs, stored, count, source.device)
            _go_back(walk, block.index, module, inputs, walk.hidden, shares, sums)
            found.append({name: each.gradients() for name, each in sums.items()})
            source.free_block(block.index)
            return_memory()
            step()
        walk.release()
    return found[::-1]


def gradient_bytes(source: Source, windows: int, length: int, needs: frozenset[str]) -> int:
    """Memory `measure_gradients` takes at most, from shapes: what all blocks were fed, and then the head, or a block with gradients."""
    config = source.module.config.get_text_config()
    size, width = source.dtype.itemsize, int(config.hidden_size)
    held = sum(part for part, room in _buffers(source, windows, length) if part <= room)  # or they lie in files
    rows, columns = map(int, source.module.get_output_embeddings().weight.shape)
    head = rows * columns * size + _HEAD_COPIES * chunk_tokens(rows) * rows * 4
    widest = max(max(linear.out_features, linear.in_features) for linear in source.anatomy.linears())
    activations = activation_bytes(max(length, BATCH_TOKENS), widest, width, source.dtype)
    weights = max(sum(linear.count for linear in block.linears) for block in source.anatomy.blocks)
    carried = (2 if MIXED in needs else 1) * weights * 4
    return held + max(head, 2 * max(block_parameters(source)) * size + carried + _KEPT * activations)


def gradient_files(source: Source, windows: int, length: int) -> int:
    """Disk `measure_gradients` takes meanwhile: what all blocks were fed once, what goes from block to block twice."""
    (fed, most), (passing, room) = _buffers(source, windows, length)
    return (fed if fed > most else 0) + (2 * passing if passing > room else 0)


def _buffers(source: Source, windows: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of what all blocks were fed and of what goes from block to block, each with what it may take in memory."""
    fed = windows * length * int(source.module.config.get_text_config().hidden_size) * source.dtype.itemsize
    scratch = source.scratch
    return (
        (len(source.anatomy.blocks) * fed, scratch.bytes_for(weight_bytes(source))),
        (fed, scratch.bytes_for()),
    )


def weight_bytes(source: Source) -> int:
    """The model's weights as it computes with them: what all blocks were fed may take as much memory, and goes to files beyond it."""
    return source.parameter_count * source.dtype.itemsize


def _behind(part: slice, offset: int) -> slice:
    return slice(part.start + offset, part.stop + offset)


def _sums_of(
    block: Block,
    structures: Sequence[Structure],
    needs: frozenset[str],
    stored: Callable[[Linear], Tensor],
    windows: int,
    device: torch.device,
) -> dict[str, _Sums]:
    """Empty sums of every linear of a block of which units own rows or columns."""
    found = {}
    for linear in block.linears:
        weight = f"{linear.name}.weight"
        rows = any(part.tensor == weight for structure in structures for part in structure.slices[1:])
        columns = any(structure.name == linear.name for structure in structures)
        if rows or columns:
            found[linear.name] = _Sums(
                linear.matrix(stored(linear)), needs, windows, device, rows=rows, columns=columns
            )
    return found


def _go_back(
    walk: Walk,
    index: int,
    module: nn.Module,
    inputs: HiddenStates,
    derivatives: HiddenStates,
    shares: Tensor,
    sums: dict[str, _Sums],
) -> None:
    """Turn the derivatives of a block's outputs into those of its inputs, summing up what its weights' gradients are on the way."""
    device = walk.source.device
    for position, part in enumerate(walk.batches):
        hidden = inputs[_behind(part, index * len(walk.windows))].to(device)
        behind = derivatives[part].to(device)
        with _watched(module, sums, shares[part].to(device), last=position == len(walk.batches) - 1):
            back = _pull_back(partial(walk.replay, index, module, position), hidden, behind)
        _refuse_not_finite(back, walk, f"in front of block {index} ('{walk.source.anatomy.blocks[index].name}')")
        derivatives[part] = back
    derivatives.turn()


@torch.enable_grad()
def _pull_back(function: Callable[[Tensor], Tensor], value: Tensor, derivative: Tensor) -> Tensor:
    """The derivative at `value`, given the one at `function(value)`."""
    leaf = value.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf, derivative)
    return found


@contextmanager
def _watched(module: nn.Module, sums: dict[str, _Sums], shares: Tensor, *, last: bool) -> Iterator[None]:
    """Let every linear's sums see one batch of windows; `shares` [windows] is what the derivatives of each are multiplied with."""
    seen: set[str] = set()
    handles = [
        module.get_submodule(name).register_forward_hook(partial(_watch, seen, name, each, shares, last))
        for name, each in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    seen: set[str],
    name: str,
    sums: _Sums,
    shares: Tensor,
    last: bool,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    """Forward hook of a linear."""
    if name in seen:
        raise InputError(f"'{name}' is used more than once in a block: gradients of such models are not supported yet")
    seen.add(name)
    fed = inputs[0].detach().reshape(len(shares), -1, inputs[0].shape[-1])

    def take(derivative: Tensor) -> None:
        sums.add(fed, derivative.reshape(len(shares), -1, derivative.shape[-1]), shares, last)

    output.register_hook(take)  # type: ignore[no-untyped-call]


class _Sums:
    """The sums over rows and columns of one weight [out, in]."""

    def __init__(
        self, weight: Tensor, needs: frozenset[str], windows: int, device: torch.device, *, rows: bool, columns: bool
    ) -> None:
        self._weight = weight
        self._needs = needs
        self._windows = windows
        # of the batches so far: the sum of gradients and of their squares, by the first of some rows
        self._carried: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        empty = partial(torch.zeros, dtype=torch.float64, device=device)
        self._rows = {name: empty(weight.shape[0]) for name in sorted(needs)} if rows else {}
        self._columns = {name: empty(weight.shape[1]) for name in sorted(needs)} if columns else {}

    @torch.no_grad()
    def add(self, inputs: Tensor, derivatives: Tensor, shares: Tensor, last: bool) -> None:
        """Take in one batch; with the `last` one the gradients are reduced and gone.

        Shapes: inputs [windows, tokens, in], derivatives [windows, tokens, out], shares [windows].
        """
        exact = torch.promote_types(inputs.dtype, torch.float32)
        factor = inputs.dtype if inputs.dtype == torch.bfloat16 else exact  # float16 could not hold every sum
        inputs = inputs.to(factor)
        derivatives = (derivatives.to(exact) * shares.to(exact)[:, None, None]).to(factor)
        if not self._needs & {SECOND, MIXED}:
            inputs, derivatives = inputs.flatten(0, 1)[None], derivatives.flatten(0, 1)[None]
        for part in row_chunks(*self._weight.shape):
            weight = self._weight[part].to(inputs.device, exact)
            total, square = self._carried.pop(part.start, (None, None))
            for fed, derivative in zip(inputs, derivatives, strict=True):
                gradient = derivative[:, part].t() @ fed
                if SECOND in self._needs:
                    self._sum(SECOND, part, (weight * gradient).square_())
                if self._needs == {SECOND}:
                    continue
                gradient = gradient.to(exact)
                if MIXED in self._needs:
                    square = gradient.square() if square is None else square.addcmul_(gradient, gradient)
                total = gradient if total is None else total.add_(gradient)
            if not last:
                self._carried[part.start] = total, square
            elif total is not None:
                self._reduce(part, weight, total, square)

    def gradients(self) -> Gradients:
        """What was summed up, on the processor."""
        rows, columns = ({name: sums.cpu() for name, sums in side.items()} for side in (self._rows, self._columns))
        return Gradients(rows, columns)

    def _reduce(self, part: slice, weight: Tensor, total: Tensor, square: Tensor | None) -> None:
        product = total.mul_(weight)
        if SIGNED in self._needs:
            self._sum(SIGNED, part, product)
        if square is not None:
            self._sum(MIXED, part, torch.addcmul(product, square.mul_(weight), weight, value=-0.5).abs_())
        if ABS in self._needs:
            self._sum(ABS, part, product.abs_())

    def _sum(self, name: str, part: slice, values: Tensor) -> None:
        """Add what some rows give to the sums called `name`; every one of them is a mean over the windows."""
        if self._rows:
            self._rows[name][part] += values.sum(1).double() / self._windows
        if self._columns:
            self._columns[name] += values.sum(0).double() / self._windows


def _derive(walk: Walk, hidden: HiddenStates, objective: str) -> Tensor:
    """Put the derivatives of an objective in the place of the hidden states behind the last block.

    They are those of each window's sum over predictions or the vocabulary, because means of many would be too small for 16 bits; what
    makes a mean of the sum is returned, float64 [windows].
    """
    source, windows = walk.source, walk.windows
    source.load_outer(windows.ids, "whole")
    size = max(1, chunk_tokens(source.module.get_output_embeddings().weight.shape[0]) // _HEAD_COPIES)
    shares = torch.zeros(len(windows), dtype=torch.float64)
    derive = _derive_loss if objective == LOSS else _derive_output
    for number in range(len(windows)):
        state = hidden[number : number + 1][0].to(source.device)
        keep = torch.ones(windows.length, dtype=torch.bool) if windows.keep is None else windows.keep[number]
        derivative, shares[number] = derive(walk, state, windows.ids[number], keep, size)
        _refuse_not_finite(derivative, walk, "behind the last block")
        hidden[number : number + 1] = derivative[None]
    hidden.turn()
    source.free_outer()
    return shares


def _derive_loss(walk: Walk, state: Tensor, ids: Tensor, keep: Tensor, size: int) -> tuple[Tensor, float]:
    """Of the negative log-likelihoods of a window's predictions; `state` [length, hidden], `ids` and `keep` [length]."""
    derivative = torch.zeros_like(state)
    predicts = (keep[:-1] & keep[1:]).to(state.device)
    targets = ids[1:].to(state.device)
    for piece in _pieces(len(ids) - 1, size):
        slope = partial(_loss_slope, targets[piece], predicts[piece])
        derivative[piece] = _through_head(walk, state[piece], ids[piece], slope)
    predictions = int(predicts.sum())
    return derivative, 1 / predictions if predictions else 0.0


def _loss_slope(targets: Tensor, predicts: Tensor, logits: Tensor) -> Tensor:
    """Softmax less the token that follows. Shapes: targets and predicts [tokens], logits [tokens, vocabulary], as what is returned."""
    slope = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1
    return slope.mul_(predicts[:, None])


def _derive_output(walk: Walk, state: Tensor, ids: Tensor, keep: Tensor, size: int) -> tuple[Tensor, float]:
    """Of the largest logit of every token of the vocabulary over a window's positions."""
    share = 1 / walk.source.module.get_output_embeddings().weight.shape[0]
    pieces = list(_pieces(len(ids), size))
    if len(pieces) == 1:
        return _through_head(walk, state, ids, partial(_peak_slope, keep)), share
    found = [_peaks(walk.head(state[piece], ids[piece]), keep[piece]) for piece in pieces]
    highest = torch.stack([values for values, _ in found]).argmax(0, keepdim=True)
    places = torch.stack([places + piece.start for piece, (_, places) in zip(pieces, found, strict=True)])
    peaks = places.gather(0, highest)[0]
    derivative = torch.zeros_like(state)
    for piece in pieces:
        slope = partial(_output_slope, peaks - piece.start)
        derivative[piece] = _through_head(walk, state[piece], ids[piece], slope)
    return derivative, share


def _peaks(logits: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of every column of logits [tokens, vocabulary] where `keep` [tokens] holds, and where it is: [vocabulary] each."""
    values, places = logits.masked_fill(~keep[:, None].to(logits.device), -torch.inf).max(0)
    return values, places


def _peak_slope(keep: Tensor, logits: Tensor) -> Tensor:
    return _output_slope(_peaks(logits, keep)[1], logits)


def _output_slope(peaks: Tensor, logits: Tensor) -> Tensor:
    """One where a logit is the largest of its column. Shapes: peaks [vocabulary], logits [tokens, vocabulary]."""
    return peaks == torch.arange(len(logits), device=peaks.device)[:, None]


def _through_head(walk: Walk, state: Tensor, ids: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Derivative at final hidden states [tokens, hidden], given `slope(logits)`, the one at the logits [tokens, vocabulary]."""
    leaf = state.clone().requires_grad_()
    with torch.enable_grad():
        logits = walk.head(leaf, ids)
    (derivative,) = torch.autograd.grad(logits, leaf, slope(logits.detach()).to(logits))
    return derivative


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _refuse_not_finite(derivatives: Tensor, walk: Walk, where: str) -> None:
    if not all_finite(derivatives):
        raise InputError(
            f"gradients {where} hold NaN or infinite values in {walk.source.dtype}: try --dtype float32; if that fails too, "
            "the checkpoint is damaged"
        )
