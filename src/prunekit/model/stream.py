"""The walk: hidden states go through the model one block at a time, computed exactly as the model itself would.

What a block is called with (masks, rotary embeddings, sliding windows, positional arguments) is decided by the model around it, and
differs by family and release. So it is not written down anywhere here: the model's own forward is run once with every block
replaced by a `Recorder`, which notes its arguments and returns the hidden states unchanged. Those notes are replayed later, when
the real blocks are in memory one by one. The same trick, with the last block returning given hidden states, yields the model's
exact logits, whatever its final norm, projections, scaling or soft-capping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import all_finite
from ..errors import InputError
from ..machine import return_memory
from .hidden import HiddenStates, InMemory
from .source import Source

BATCH_TOKENS = 2048
_PROBE_TOKENS = 8


def batch_size(length: int) -> int:
    """Windows of `length` tokens that go through a block together unless something else is asked for."""
    return max(1, BATCH_TOKENS // length)


@dataclass(frozen=True)
class Windows:
    """Token windows and, where they are padded, which positions count.

    Shapes: ids [windows, length] int64; keep the same, bool (True = a real token), or None where all are.
    """

    ids: Tensor
    keep: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that count, over all windows."""
        return self.ids.numel() if self.keep is None else int(self.keep.sum())

    def __getitem__(self, part: slice) -> Windows:
        return Windows(self.ids[part], None if self.keep is None else self.keep[part])


@dataclass(frozen=True)
class Call:
    """What a block was called with, besides its hidden states."""

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None

    def replay(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call `block` as the model did, with `hidden` as its hidden states."""
        if self.hidden_name is not None:
            return block(*self.before, *self.after, **{**self.named, self.hidden_name: hidden})
        return block(*self.before, hidden, *self.after, **self.named)


class Recorder(nn.Module):
    """Stands in a block's place and returns hidden states unchanged, in the form the block returns them.

    Attributes:
        call: what it was called with last.
        hidden: the hidden states of that call.
        answer: hidden states to return instead of those it is given.
    """

    def __init__(self, block: nn.Module, forms: dict[type, int | None]) -> None:
        super().__init__()
        object.__setattr__(
            self, "block", block
        )  # no submodule: the block must not be moved or listed with the recorder
        self._forms = forms
        self.call: Call | None = None
        self.hidden: Tensor | None = None
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their blocks, such as attention_type
            return getattr(self.__dict__["block"], name)

    def learn(self, output: Any) -> None:
        """Note for all blocks of this one's class whether they return a tensor or a tuple (and how long)."""
        self._forms[type(self.block)] = len(output) - 1 if isinstance(output, tuple) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments; return the hidden states, alone or first in a tuple, as the block would."""
        self.hidden, self.call = split_call(args, kwargs)
        result = self.hidden if self.answer is None else self.answer
        extra = self._forms[type(self.block)]
        return result if extra is None else (result, *[None] * extra)


class _Probe(Recorder):
    """Runs the real block, and learns from it what blocks of its class return."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and pass on what it returns."""
        block = self.__dict__["block"]
        output = block(*args, **kwargs)
        self.learn(output)
        return output


def _note(called: set[str], name: str, module: nn.Module, inputs: Any) -> None:
    """Forward pre-hook: this module was called."""
    called.add(name)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Tell the hidden states from a block's other arguments: the first floating-point `[batch, length, hidden]` tensor."""
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            return value, Call(args[:position], args[position + 1 :], dict(kwargs), None)
    for name in ("hidden_states", *kwargs):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            rest = {other: kept for other, kept in kwargs.items() if other != name}
            return value, Call(args, (), rest, name)
    raise InputError(
        "a block is called without hidden states [batch, length, hidden]: this kind of model is not supported yet"
    )


class _Interner:
    """Keeps one copy of tensors that recur call after call (masks, rotary tables)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._seen.setdefault((value.shape, value.dtype), [])
            for tensor in known[-4:]:  # a recurring one is among the latest; the bound keeps padded runs linear
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value)
            return value
        if isinstance(value, tuple):
            return tuple(self(item) for item in value)
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        return value

    def call(self, call: Call) -> Call:
        """The same call with shared tensors."""
        return Call(self(call.before), self(call.after), self(call.named), call.hidden_name)


@dataclass
class Walk:
    """Windows on their way through a model.

    After `start`, `hidden` holds the first block's inputs; `run(i)` sends them through block i. `prepare` may be called before, to
    have everything refused that a model's kind can be refused for.

    Attributes:
        hidden: [windows, length, hidden], the one large buffer.
        batches: which windows go through a block together.
        shape, dtype: of the hidden states; known after `prepare`.
    """

    source: Source
    windows: Windows
    batch: int | None = None
    hidden: HiddenStates = field(init=False)
    batches: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        size = self.batch or batch_size(self.windows.length)
        count = len(self.windows)
        self.batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        self._calls: list[list[Call]] = []
        self._probe_calls: list[Call] = []
        self._forms: dict[type, int | None] = {}
        self.shape: tuple[int, ...] = ()
        self.dtype = self.source.dtype

    @property
    def hidden_bytes(self) -> int:
        """Size of the hidden states; known after `prepare`."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def room(self) -> AbstractContextManager[HiddenStates]:
        """Hidden states beside those of a run, of the same shape and for the time being; known after `prepare`."""
        return self.source.scratch.room_for(self.shape, self.dtype, self.source.device)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Load what lies outside the blocks and try it on a few tokens. Raises `InputError`."""
        self.source.load_outer(self.windows.ids)
        self._probe()
        with self._recorders() as recorders:
            self._forward_base(Windows(self.windows.ids[:1, :_PROBE_TOKENS]))
        first = recorders[0].hidden
        if first is None or any(recorder.call is None for recorder in recorders):
            raise InputError(
                "the model's forward does not call every block once: this kind of model is not supported yet"
            )
        self._probe_calls = [recorder.call for recorder in recorders if recorder.call is not None]
        self._probe_shape = first.shape
        self.shape = (len(self.windows), self.windows.length, first.shape[-1])
        self.dtype = first.dtype

    @torch.no_grad()  # not inference mode: what is recorded here must serve where gradients are wanted
    def start(
        self,
        hidden: HiddenStates | None = None,
        *,
        keep: bool = True,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Run the model around its blocks: note what each block is called with, and the first hidden states.

        `hidden` is where those go, by default into memory, as `enter` makes them; without `keep` they are not wanted, because later
        ones will be loaded.
        """
        if not self.shape:
            self.prepare()
        self.hidden = InMemory(self.shape, self.dtype, self.source.device) if hidden is None else hidden
        interner = _Interner()
        for batch in self.batches:
            with self._recorders() as recorders:
                self._forward_base(self.windows[batch])
            self._calls.append([interner.call(recorder.call) for recorder in recorders if recorder.call is not None])
            first = recorders[0].hidden
            assert first is not None
            if keep:
                self.hidden[batch] = first if enter is None else enter(first)
        if keep:
            self.hidden.turn()
        self.source.free_outer()

    def run_batch(self, index: int, block: nn.Module, position: int, hidden: Tensor) -> Tensor:
        """Send one batch of hidden states through a block; `position` is its place in `batches`.

        Must be called in inference mode. Raises `InputError` where the result is not finite.
        """
        result = self.replay(index, block, position, hidden)
        if not all_finite(result):
            raise InputError(
                f"activations behind block {index} ('{self.source.anatomy.blocks[index].name}') hold NaN or infinite values "
                f"in {self.source.dtype}: try --dtype float32; if that fails too, the checkpoint is damaged"
            )
        return result

    def replay(self, index: int, block: nn.Module, position: int, hidden: Tensor) -> Tensor:
        """The same in whatever mode of gradients holds, its result not looked at."""
        output = self._calls[position][index].replay(block, hidden.to(self.source.device, non_blocking=True))
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def move_to(self, source: Source) -> None:
        """Go through another model from here on, before `start`; `prepare` is called where it was for the one before."""
        self.source.free_outer()
        self.source.free_block(0)  # which `prepare` leaves in memory
        self.source, self.dtype = source, source.dtype
        if self.shape:
            self.prepare()

    @torch.inference_mode()
    def run_probe(self, index: int, block: nn.Module) -> Tensor:
        """What a block makes of one window of a few random hidden states, always the same ones: [1, at most 8, hidden]."""
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(self._probe_shape, generator=draw).to(device=self.source.device, dtype=self.dtype)
        output = self._probe_calls[index].replay(block, hidden)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    @torch.inference_mode()
    def run(self, index: int, block: nn.Module) -> None:
        """Send all hidden states through a block."""
        for position, batch in enumerate(self.batches):
            self.hidden[batch] = self.run_batch(index, block, position, self.hidden[batch])
        self.hidden.turn()

    def release(self) -> None:
        """Give the hidden states and recorded arguments back; the walk is over."""
        self.hidden.close()
        self._calls.clear()
        self._probe_calls.clear()

    def run_all(self, step: Callable[[], None] = lambda: None) -> None:
        """Send all hidden states through every block as it is, one block in memory at a time."""
        for block in self.source.anatomy.blocks:
            module = self.source.load_block(block.index)
            self.source.prefetch(block.index + 1)
            self.run(block.index, module)
            self.source.free_block(block.index)
            return_memory()
            step()

    @torch.inference_mode()
    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The model's logits for final hidden states.

        Shapes: hidden [tokens, hidden], ids [tokens] (any valid tokens) -> [tokens, vocabulary]. The outer part must be loaded.
        What follows the blocks works position by position, so tokens may be cut into chunks at will.
        """
        return self.head(hidden, ids)

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The same in whatever mode of gradients holds."""
        with self._recorders() as recorders:
            recorders[-1].answer = hidden.to(self.source.device)[None]
            output = self.source.module(input_ids=ids.to(self.source.device)[None], use_cache=False)
        logits = output.logits[0]
        assert isinstance(logits, Tensor)
        return logits

    def _forward_base(self, windows: Windows) -> None:
        # the base model ends before the head, whose product with the vocabulary nobody needs here
        base = getattr(self.source.module, "base_model", self.source.module)
        device = self.source.device
        mask = None if windows.keep is None else windows.keep.to(device=device, dtype=torch.long)
        base(input_ids=windows.ids.to(device), attention_mask=mask, use_cache=False)

    def _probe(self) -> None:
        """Learn in what form each class of block returns its result, by running one of each on a few tokens."""
        container = self._container()
        first_of: dict[type, int] = {}
        for index, block in enumerate(container):
            first_of.setdefault(type(block), index)
        probes = {index: _Probe(self.source.load_block(index), self._forms) for index in first_of.values()}
        linears = [linear for index in probes for linear in self.source.anatomy.blocks[index].linears]
        called: set[str] = set()
        handles = []
        for linear in linears:
            note = partial(_note, called, linear.full_name)
            handles.append(self.source.module.get_submodule(linear.full_name).register_forward_pre_hook(note))
        with self._recorders():
            for index, probe in probes.items():
                container[index] = probe
            self._forward_base(Windows(self.windows.ids[:1, :_PROBE_TOKENS]))
        for handle in handles:
            handle.remove()
        idle = [linear.full_name for linear in linears if linear.full_name not in called]
        if idle:
            raise InputError(
                f"{type(self.source.module).__name__} does not use {', '.join(map(repr, idle))} when it reads text "
                "(cross-attention, or computed past the module): such models are not supported yet"
            )
        for index in probes:
            if index:  # the walk takes block 0 next
                self.source.free_block(index)

    @contextmanager
    def _recorders(self) -> Iterator[list[Recorder]]:
        """Put recorders in the blocks' places for the time being."""
        container = self._container()
        originals = list(container)
        recorders = [Recorder(block, self._forms) for block in originals]
        try:
            for index, recorder in enumerate(recorders):
                container[index] = recorder
            yield recorders
        finally:
            for index, block in enumerate(originals):
                container[index] = block

    def _container(self) -> nn.ModuleList:
        container = self.source.module.get_submodule(self.source.anatomy.blocks_name)
        assert isinstance(container, nn.ModuleList)
        return container
