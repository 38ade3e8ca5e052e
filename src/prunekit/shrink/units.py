"""What can go from a block: groups of attention heads and channels of the multilayer perceptron, found by trying.

No family is known by name here. A block is run on a few tokens while its linears are stubs that return made-up outputs, so no weight
is read and a model on the meta device will do. Gradients then say which outputs, and which entries of norms, each input of a linear
depends on. A unit is the smallest stretch of a linear's inputs whose producers feed nothing else: a single channel behind an
activation, a key-value head with all of its query heads in attention. Whether a block still computes the same without a unit is
tried as well, because some models keep numbers of heads in attributes that have to follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.anatomy import Anatomy, Block, Linear
from ..model.modules import evaluating, exchanged, hollow
from ..model.source import untouched
from ..model.stream import Call, Recorder

TOKENS = 8
_SAME = 1e-4  # how far, relative to the largest, inputs may move when a unit they do not depend on is taken out

HEADS = ("num_attention_heads", "num_key_value_heads")

ATTENTION, MLP = "attention", "mlp"

# what a stub returns: always the same, or something made of what it is fed
Answer = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Slices:
    """Entries of one of a block's tensors that go with its units.

    Attributes:
        tensor: name in the block, like `mlp.up_proj.weight`.
        dim: the axis of the stored tensor they lie on.
        entries: [units, entries of each] int64, ascending for each unit.
        cost: parameters in one entry.
    """

    tensor: str
    dim: int
    entries: Tensor
    cost: int

    def kept(self, units: Tensor, length: int) -> Tensor:
        """The entries that stay where `units` stay, in their old order; those of no unit stay too. [kept] int64."""
        gone = torch.ones(len(self.entries), dtype=torch.bool)
        gone[units] = False
        keep = torch.ones(length, dtype=torch.bool)
        keep[self.entries[gone].flatten()] = False
        return keep.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A structure as a whole, and what goes with it when none of its units stays: see `sublayers.py`.

    Attributes:
        modules: name in the block of every module that is gone -> how `resizing.Removed` answers in its place.
        tensors: names in the block of the parameters that are gone; of the consumer's weight an empty tensor stays.
        parameters: how many these are.
        reads: names of the block's other structures that have added to the stream before this one reads it.
    """

    modules: Mapping[str, Mapping[str, Any]]
    tensors: frozenset[str]
    parameters: int
    reads: frozenset[str]


@dataclass(frozen=True, eq=False)
class Structure:
    """Units of one kind in one block.

    A unit is a stretch of `size` neighbouring inputs of `consumer`, unit k beginning at input `k · size`, with all that produces them.

    Attributes:
        kind: `attention` where a unit's inputs mix tokens, else `mlp`.
        consumer: the linear whose columns go, like `mlp.down_proj`.
        count: how many units there are.
        slices: of the consumer's weight, its producers' weights and biases, and whatever else belongs to single units.
        resizes: whether units can be taken out of this block `alone`, only of all blocks `together` (its code reads the model's
            config), or `never` (masking is all that can be done, as where head numbers mean something).
        scaled: attributes of the block's modules, like `self_attn.num_heads`, that count units and must follow.
        sublayer: what goes where no unit stays; None where that was not looked for.
    """

    block: int
    kind: str
    consumer: Linear
    count: int
    slices: tuple[Slices, ...]
    resizes: Literal["alone", "together", "never"] = "never"
    scaled: tuple[str, ...] = ()
    sublayer: Sublayer | None = None

    @property
    def name(self) -> str:
        """What it is called in a plan: its consumer's name in the block."""
        return self.consumer.name

    @property
    def size(self) -> int:
        """Inputs of the consumer in a unit."""
        return self.consumer.in_features // self.count

    @property
    def cost(self) -> int:
        """Parameters that go with a unit."""
        return sum(part.entries.shape[1] * part.cost for part in self.slices)

    def inputs(self, units: Tensor) -> Tensor:
        """The consumer's inputs in some units, [units · size] int64."""
        return (units[:, None] * self.size + torch.arange(self.size)).flatten()

    def by_unit(self, values: Tensor) -> Tensor:
        """Values of the consumer's inputs [..., in], summed over each unit: [..., units]."""
        return values.reshape(*values.shape[:-1], self.count, self.size).sum(-1)


def find_structures(model: Any, anatomy: Anatomy) -> list[tuple[Structure, ...]]:
    """The structures of every block of a causal language model, which may lie on the meta device; attention before mlp.

    Raises `InputError` where the model's forward cannot be followed.
    """
    known: dict[Any, tuple[Structure, ...]] = {}
    found = []
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        tracer = Tracer(model, anatomy)
        for block in anatomy.blocks:
            module = model.get_submodule(block.name)
            alike = likeness(block, module)
            if alike not in known:
                known[alike] = tuple(tracer.structures(block))
            linears = {linear.name: linear for linear in block.linears}
            found.append(
                tuple(
                    replace(structure, block=block.index, consumer=linears[structure.consumer.name])
                    for structure in known[alike]
                )
            )
    return found


def likeness(block: Block, module: nn.Module) -> tuple[Any, ...]:
    """What two blocks have in common that compute in the same way."""
    return (
        type(module),
        tuple((linear.name, linear.out_features, linear.in_features) for linear in block.linears),
        tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters()),
    )


class Tracer:
    """Runs a model's blocks with stubs for their linears.

    Attributes:
        calls: what every block is called with on a few tokens.
        width: of the hidden states.
        direct: whether the first block is given what the embedding returns, nothing done to it.
    """

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._model = model
        self._anatomy = anatomy
        self._config = model.config.get_text_config()
        self.device = next((buffer.device for buffer in model.buffers() if buffer.device.type != "meta"), None)
        self.device = self.device or torch.device("cpu")
        self._draw = torch.Generator().manual_seed(0)
        self.calls, self.width, self.direct = self._record()

    def structures(self, block: Block) -> Iterator[Structure]:
        """The structures of one block."""
        module = self._model.get_submodule(block.name)
        outputs, rest = self.made_up(block, module)
        traced = self._run(block, module, outputs, rest)
        found = []
        for consumer in block.linears:
            if consumer.name in traced:
                dependence = _Dependence(traced[consumer.name], {**outputs, **rest}, set(outputs), self._draw)
                if dependence.linears:
                    found.append(self._structure(block, module, consumer, dependence, outputs, rest, traced))
        yield from sorted(filter(None, found), key=lambda structure: structure.kind != ATTENTION)

    def made_up(self, block: Block, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs of a block's linears and values of its other parameters, positive and with gradients, by name."""
        outputs = {linear.name: self.random(1, TOKENS, linear.out_features) for linear in block.linears}
        rest: dict[str, Tensor] = {
            name: nn.Parameter(self.random(*shape).detach()) for name, shape in other_parameters(block, module).items()
        }
        return outputs, rest

    def _structure(
        self,
        block: Block,
        module: nn.Module,
        consumer: Linear,
        dependence: _Dependence,
        outputs: dict[str, Tensor],
        rest: dict[str, Tensor],
        traced: dict[str, Tensor],
    ) -> Structure | None:
        """The units among a linear's inputs; None where there are none smaller than all of it."""
        entries = None
        for size in range(1, consumer.in_features // 2 + 1):
            if consumer.in_features % size == 0 and dependence.apart(size):
                entries = dependence.entries(size)
                if entries is not None:
                    break
        if entries is None:
            return None
        linears = {linear.name: linear for linear in block.linears}
        biased = dict(module.named_parameters())
        columns = torch.arange(consumer.in_features).reshape(-1, size)
        slices = [Slices(f"{consumer.name}.weight", 0 if consumer.transposed else 1, columns, consumer.out_features)]
        for name, rows in entries.items():
            if name not in linears:
                slices.append(Slices(name, 0, rows, 1))
                continue
            producer = linears[name]
            slices.append(Slices(f"{name}.weight", 1 if producer.transposed else 0, rows, producer.in_features))
            if f"{name}.bias" in biased:
                slices.append(Slices(f"{name}.bias", 0, rows, 1))
        kind = ATTENTION if dependence.mixes_tokens() else MLP
        structure = Structure(block.index, kind, consumer, len(columns), tuple(slices))
        producers = {name: rows for name, rows in entries.items() if name in linears}
        return self._resizing(block, module, structure, producers, outputs, rest, traced[consumer.name])

    def _resizing(
        self,
        block: Block,
        module: nn.Module,
        structure: Structure,
        producers: Mapping[str, Tensor],
        outputs: dict[str, Tensor],
        rest: dict[str, Tensor],
        whole: Tensor,
    ) -> Structure:
        """The structure with how its units can be taken out: by the fewest attributes that have to follow for one to be missed."""
        count = structure.count
        keep = torch.tensor([unit for unit in range(count) if unit != count // 2])
        slices = {part.tensor.removesuffix(".weight"): part for part in structure.slices}
        cut = {
            name: value[..., slices[name].kept(keep, value.shape[-1])] if name in producers else value
            for name, value in outputs.items()
        }
        cut_rest = {
            name: nn.Parameter(value.detach()[slices[name].kept(keep, len(value))]) if name in slices else value
            for name, value in rest.items()
        }
        wanted = whole.detach().reshape(-1, whole.shape[-1])[:, structure.inputs(keep)]
        path = shared_path([structure.consumer.name, *producers])
        owner = module.get_submodule(path)
        heads = getattr(self._config, "num_attention_heads", count)
        widths = {name: linear.out_features for name, linear in _by_name(block).items() if name in producers}
        countable = {count, heads, structure.consumer.in_features, *widths.values()}
        names = [
            name
            for name, value in vars(owner).items()
            if type(value) is int and value in countable and value % count == 0
        ]
        subsets = list(chain.from_iterable(combinations(names, taken) for taken in range(len(names) + 1)))
        told = told_heads(self._config, count)
        ways: list[tuple[Literal["alone", "together"], dict[str, int]]] = [("alone", {}), ("together", told)]
        for resizes, config in ways:
            for some in subsets:
                scaled = {name: getattr(owner, name) for name in some}
                with (
                    scaled_numbers(owner, scaled, count, len(keep)),
                    scaled_numbers(self._config, config, count, len(keep)),
                ):
                    try:
                        found = self._run(block, module, cut, cut_rest)[structure.consumer.name]
                    except (
                        Exception
                    ):  # whatever a family's own code stumbles over where shapes are not what it was told
                        continue
                found = found.detach().reshape(-1, found.shape[-1])
                if found.shape == wanted.shape and near(found, wanted):
                    attributes = tuple(f"{path}.{name}" if path else name for name in some)
                    return replace(structure, resizes=resizes, scaled=attributes)
        return structure

    def _run(
        self, block: Block, module: nn.Module, outputs: Mapping[str, Tensor], rest: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What every linear is fed while the linears return `outputs` [1, tokens, out] and other parameters are `rest`."""
        call = self.calls[block.index]
        hidden = torch.randn(1, TOKENS, self.width, generator=self._draw).to(self.device)
        with self.stubs(block, module, outputs, rest) as inputs, torch.enable_grad():
            call.replay(module, hidden)
        return inputs

    @contextmanager
    def stubs(
        self, block: Block, module: nn.Module, outputs: Mapping[str, Answer], rest: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """Let the linears return `outputs`, and other parameters be `rest`; yields what every linear is fed."""
        inputs: dict[str, Tensor] = {}
        buffers = {
            name: torch.zeros_like(buffer, device=self.device)
            for name, buffer in module.named_buffers()
            if buffer.device.type == "meta"
        }
        answer = partial(_answer, inputs, outputs)
        with hollow(module, block.linears, answer), exchanged(module, {**rest, **buffers}):
            yield inputs

    def random(self, *shape: int) -> Tensor:
        """Made-up values with gradients."""
        # positive, where no activation is flat
        value = torch.rand(*shape, generator=self._draw) + 0.5
        return value.to(self.device).requires_grad_()

    @torch.no_grad()
    def _record(self) -> tuple[list[Call], int, bool]:
        """What every block is called with on a few tokens, the width of the hidden states, and whether they are what went in."""
        model, anatomy = self._model, self._anatomy
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise InputError(f"{type(model).__name__} embeds tokens in a way that is not supported yet for shrinking")
        inside = anatomy.blocks_name + "."
        parameters = dict(model.named_parameters())
        outer = {
            name: untouched(tuple(tensor.shape), torch.float32).to(self.device)
            for name, tensor in chain(model.named_parameters(), model.named_buffers())
            if not name.startswith(inside)
            and tensor is not embedding.weight
            and (isinstance(tensor, nn.Parameter) or tensor.device.type == "meta")
        }
        outer = {name: nn.Parameter(value) if name in parameters else value for name, value in outer.items()}
        container = model.get_submodule(anatomy.blocks_name)
        blocks = list(container)
        forms: dict[type, int | None] = {}
        recorders = []
        for block in anatomy.blocks:
            module = blocks[block.index]
            outputs = {linear.name: torch.zeros(1, TOKENS, linear.out_features) for linear in block.linears}
            rest = {
                name: nn.Parameter(torch.ones(shape, device=self.device))
                for name, shape in other_parameters(block, module).items()
            }
            stubs = partial(self.stubs, block, module, outputs, rest)
            recorders.append(_Recorder(module, forms, stubs))
        embedded = self.random(1, TOKENS, embedding.embedding_dim)
        base = getattr(model, "base_model", model)
        try:
            for index, recorder in enumerate(recorders):
                container[index] = recorder
            with exchanged(model, outer):
                base(inputs_embeds=embedded, use_cache=False)
        finally:
            for index, module in enumerate(blocks):
                container[index] = module
        calls = [recorder.call for recorder in recorders if recorder.call is not None]
        hidden = recorders[0].hidden
        if len(calls) < len(blocks) or hidden is None:
            raise InputError("the model's forward does not call every block once: it cannot be shrunk yet")
        return calls, hidden.shape[-1], torch.equal(hidden, embedded)


class _Recorder(Recorder):
    """A recorder that runs its block, hollow, where the form of what its class returns is not known yet."""

    def __init__(self, block: nn.Module, forms: dict[type, int | None], stubs: Callable[[], Any]) -> None:
        super().__init__(block, forms)
        self._stubs = stubs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments; return the hidden states in the block's form."""
        block = self.__dict__["block"]
        if type(block) not in self._forms:
            with self._stubs():
                output = block(*args, **kwargs)
            self.learn(output)
        return super().forward(*args, **kwargs)


class _Dependence:
    """On which made-up values each input of a linear depends.

    Attributes:
        linears: names of the linears whose outputs reach it.
    """

    def __init__(self, inputs: Tensor, leaves: dict[str, Tensor], outputs: set[str], draw: torch.Generator) -> None:
        self._inputs = inputs.reshape(-1, inputs.shape[-1])
        self._leaves = leaves
        self._weights = (torch.rand(self._inputs.shape, generator=draw) + 0.5).to(inputs.device)
        felt = self._felt(torch.ones(self._inputs.shape[-1])) if inputs.requires_grad else {}
        self._reaching = [name for name in leaves if name in felt and bool(felt[name].any())]
        self.linears = {name for name in self._reaching if name in outputs}

    def _felt(self, chosen: Tensor) -> dict[str, Tensor]:
        """Which entries of every value the `chosen` inputs [in] depend on: bool by name."""
        weighted = (self._inputs * self._weights * chosen.to(self._weights)).sum()
        return {
            name: (gradient.reshape(-1, gradient.shape[-1]) != 0).any(0).cpu()
            for name, gradient in gradients_of(weighted, self._leaves).items()
        }

    def _split(self, chosen: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Of every value that reaches the linear, the entries that chosen inputs feel and those that the others feel."""
        felt, felt_by_others = self._felt(chosen), self._felt(~chosen)
        nothing = {name: torch.zeros(self._leaves[name].shape[-1], dtype=torch.bool) for name in self._reaching}
        return [
            (name, felt.get(name, nothing[name]), felt_by_others.get(name, nothing[name])) for name in self._reaching
        ]

    def apart(self, size: int) -> bool:
        """Whether the first `size` inputs share no linear's output with the others."""
        chosen = torch.arange(self._inputs.shape[-1]) < size
        return not any(
            bool((ours & theirs).any()) for name, ours, theirs in self._split(chosen) if name in self.linears
        )

    def entries(self, size: int) -> dict[str, Tensor] | None:
        """The entries of every value that belong to each stretch of `size` inputs, [units, entries] by name.

        None where an output reaches several stretches, or not every one is reached by as many. Values that are not outputs may reach
        all of them (a norm that the heads share); those belong to none.
        """
        unit = torch.arange(self._inputs.shape[-1]) // size
        count = int(unit[-1]) + 1
        number = {name: torch.zeros(self._leaves[name].shape[-1], dtype=torch.int64) for name in self._reaching}
        reached = {name: torch.zeros(len(value), dtype=torch.bool) for name, value in number.items()}
        shared = {name: torch.zeros(len(value), dtype=torch.bool) for name, value in number.items()}
        for bit in range(max(1, (count - 1).bit_length())):
            for name, ours, theirs in self._split((unit >> bit) & 1 == 1):
                number[name] += ours.long() << bit
                reached[name] |= ours | theirs
                shared[name] |= ours & theirs
        found = {}
        for name in self._reaching:
            if name not in self.linears and bool(shared[name][reached[name]].all()):
                continue
            places = reached[name].nonzero().flatten()
            of = number[name][places]
            if bool(shared[name].any()) or not torch.equal(
                of.bincount(minlength=count) * count, torch.full((count,), len(of))
            ):
                return None
            found[name] = places[of.argsort(stable=True)].reshape(count, -1)
        return found

    def mixes_tokens(self) -> bool:
        """Whether the last token's inputs depend on what the linears return for tokens before it."""
        outputs = {name: self._leaves[name] for name in self.linears}
        return feels_earlier_tokens((self._inputs[-1] * self._weights[-1]).sum(), outputs)


def gradients_of(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a scalar for what it is made of, by name; those of `leaves` that are no part of it are missing."""
    gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def feels_earlier_tokens(value: Tensor, outputs: Mapping[str, Tensor]) -> bool:
    """Whether a scalar made of the last token depends on what linears return for tokens before it, [1, tokens, out] by name."""
    return any(bool((gradient[0, :-1] != 0).any()) for gradient in gradients_of(value, outputs).values())


def _answer(inputs: dict[str, Tensor], outputs: Mapping[str, Answer], name: str, value: Tensor) -> Tensor:
    inputs[name] = value
    output = outputs[name]
    if not isinstance(output, Tensor):
        return output(value)
    return output.to(value.device).reshape(*value.shape[:-1], -1).clone()  # some blocks add to it in place


def other_parameters(block: Block, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's parameters that are no linear's."""
    linears = {linear.name for linear in block.linears}
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.named_parameters()
        if name.rpartition(".")[0] not in linears
    }


def _by_name(block: Block) -> dict[str, Linear]:
    return {linear.name: linear for linear in block.linears}


def shared_path(names: Sequence[str]) -> str:
    """The module that all of these are in: `self_attn.q_proj`, `self_attn.o_proj` -> `self_attn`."""
    shared = []
    for steps in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def told_heads(config: Any, count: int) -> dict[str, int]:
    """What a text model's config says of numbers of heads that `count` units divide."""
    return {name: value for name in HEADS if (value := getattr(config, name, None)) and value % count == 0}


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether values are the same to rounding."""
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max()) <= _SAME * float(wanted.abs().max())


@contextmanager
def scaled_numbers(holder: Any, values: Mapping[str, int], count: int, kept: int) -> Iterator[None]:
    """Let an object's numbers be those of `kept` units out of `count` for the time being."""
    for name, value in values.items():
        setattr(holder, name, value // count * kept)
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(holder, name, value)
