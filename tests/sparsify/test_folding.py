"""Spaces: found in every family, folded without changing what the model computes, and not found where there are none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from helpers import draw_ids
from prunekit.errors import PrunekitError
from prunekit.model.anatomy import Block, Linear, in_module
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Walk, Windows
from prunekit.sparsify import folding
from prunekit.sparsify.folding import Space, find_spaces, fold, permute_statistics
from prunekit.sparsify.patterns import keep_groups
from prunekit.sparsify.permutation import retained_score
from prunekit.statistics import Collector

# family -> (consumer, {producer: first output row of every part}, slots, repeats, width) of its attention and its perceptron
GATED = ("mlp.down_proj", {"mlp.gate_proj": [0], "mlp.up_proj": [0]}, 48, 1, 48)
VALUES = ("self_attn.o_proj", {"self_attn.v_proj": [0]}, 16, 2, 8)
EXPECTED: dict[str, list[tuple[str, dict[str, list[int]], int, int, int]]] = {
    "llama": [VALUES, GATED],
    "mistral": [VALUES, GATED],
    "qwen2": [VALUES, GATED],
    "qwen3": [("self_attn.o_proj", {"self_attn.v_proj": [0]}, 32, 2, 16), GATED],
    "gemma2": [VALUES, GATED],
    "gemma3_text": [VALUES, GATED],
    "phi3": [
        ("self_attn.o_proj", {"self_attn.qkv_proj": [48]}, 16, 2, 8),
        ("mlp.down_proj", {"mlp.gate_up_proj": [0, 48]}, 48, 1, 48),
    ],
    "olmo2": [VALUES, GATED],
    "opt": [("self_attn.out_proj", {"self_attn.v_proj": [0]}, 32, 1, 8), ("fc2", {"fc1": [0]}, 48, 1, 48)],
    "gpt2": [
        ("attn.c_proj", {"attn.c_attn": [64]}, 32, 1, 8),
        ("mlp.c_proj", {"mlp.c_fc": [0]}, 128, 1, 128),
    ],
    "gpt_neox": [
        ("attention.dense", {"attention.query_key_value": [16]}, 32, 1, 8),
        ("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": [0]}, 48, 1, 48),
    ],
    "falcon": [
        ("self_attention.dense", {"self_attention.query_key_value": [40]}, 8, 4, 8),
        ("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": [0]}, 128, 1, 128),
    ],
    "bloom": [
        ("self_attention.dense", {"self_attention.query_key_value": [16]}, 32, 1, 8),
        ("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": [0]}, 128, 1, 128),
    ],
    "starcoder2": [VALUES, ("mlp.c_proj", {"mlp.c_fc": [0]}, 48, 1, 48)],
    "stablelm": [VALUES, GATED],
}


def prepared(model: PreTrainedModel) -> Walk:
    walk = Walk(ResidentModel(model), Windows(draw_ids(2, 12, seed=3)))
    walk.prepare()
    return walk


def spaces_of(walk: Walk, index: int) -> tuple[Block, nn.Module, list[Space]]:
    block = walk.source.anatomy.blocks[index]
    module = walk.source.load_block(index)
    return block, module, find_spaces(block, module, lambda module: walk.run_probe(index, module))


def shuffled(space: Space, seed: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    windows = torch.arange(len(space.channels)).reshape(-1, space.width)
    return torch.cat([window[torch.randperm(space.width, generator=draw)] for window in windows])


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(draw_ids(2, 12, seed=9)).logits


def described(space: Space) -> tuple[str, dict[str, list[int]], int, int, int]:
    producers = {producer.name: rows[0].tolist() for producer, rows in space.producers}
    return space.consumer.name, producers, *space.channels.shape, space.width


def test_every_family_is_expected_something() -> None:
    assert EXPECTED.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_spaces_of_every_family(family: str, dtype: torch.dtype) -> None:
    model = tiny.make_model(family, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    walk = prepared(model)
    for index in range(3):
        _, _, spaces = spaces_of(walk, index)
        assert [described(space) for space in spaces] == EXPECTED[family]
        assert all(space.fits(4) and space.fits(8) and not space.fits(5) for space in spaces)
    for name, value in model.state_dict().items():  # bit for bit
        assert torch.equal(value, before[name])
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folding_every_block_leaves_the_model_what_it_computes(family: str) -> None:
    model = tiny.make_model(family)
    dense, before = logits(model), copy.deepcopy(model.state_dict())
    walk = prepared(model)
    for index in range(3):
        block, module, spaces = spaces_of(walk, index)
        for space in spaces:
            order = shuffled(space)
            place = in_module(module)
            consumed = space.consumer.matrix(place(space.consumer)[0]).clone()
            produced = {linear: linear.matrix(place(linear)[0]).clone() for linear, _ in space.producers}
            biases = {linear: place(linear)[1] for linear, _ in space.producers}
            biases = {linear: None if bias is None else bias.clone() for linear, bias in biases.items()}
            fold(space, order, place)
            inputs = space.input_order(order)
            assert torch.equal(space.consumer.matrix(place(space.consumer)[0]), consumed[:, inputs])
            assert not torch.equal(consumed[:, inputs], consumed)
            for linear, old in produced.items():
                rows = space.output_order(linear, order)
                weight, bias = place(linear)
                assert torch.equal(linear.matrix(weight), old[rows])
                assert not torch.equal(old[rows], old)
                old_bias = biases[linear]
                assert (bias is None) == (old_bias is None)
                if bias is not None and old_bias is not None:
                    assert torch.equal(bias, old_bias[rows])
        moved = {linear.full_name for space in spaces for linear in (space.consumer, *(p for p, _ in space.producers))}
        for linear in block.linears:
            same = torch.equal(before[f"{linear.full_name}.weight"], model.state_dict()[f"{linear.full_name}.weight"])
            assert same == (linear.full_name not in moved)
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


def test_a_grouped_head_keeps_its_heads_together() -> None:
    walk = prepared(tiny.make_model("llama"))
    _, _, (values, _) = spaces_of(walk, 0)
    assert values.channels.tolist() == [[slot, slot + 8] for slot in [*range(8), *range(16, 24)]]
    inputs = values.input_order(shuffled(values)).reshape(4, 8)
    assert torch.equal(inputs // 8, torch.arange(4)[:, None].expand(4, 8))  # nobody leaves their head
    assert torch.equal(inputs[0], inputs[1] - 8)  # the query heads of one value head are in one order
    assert torch.equal(inputs[2], inputs[3] - 8)


def test_the_order_retains_more_and_is_within_windows() -> None:
    walk = prepared(tiny.make_model("llama"))
    _, module, spaces = spaces_of(walk, 0)
    for space in spaces:
        scores = in_module(module)(space.consumer)[0].abs() * torch.rand(space.consumer.in_features).mul(3).exp()
        order = space.order(scores, 2, 4)
        windows = torch.arange(len(order)) // space.width
        assert torch.equal(windows[order], windows)
        moved = scores[:, space.input_order(order)]
        assert retained_score(moved, 2, 4) > retained_score(scores, 2, 4)
        assert torch.equal(order, space.order(scores, 2, 4))


def test_groups_that_straddle_heads_keep_their_order() -> None:
    walk = prepared(tiny.make_model("qwen3", head_dim=12))
    _, module, (values, perceptron) = spaces_of(walk, 0)
    assert values.width == 12
    assert [values.fits(4), values.fits(8), perceptron.fits(8)] == [True, False, True]
    scores = in_module(module)(values.consumer)[0].abs()
    assert torch.equal(values.order(scores, 4, 8), torch.arange(24))


def test_a_norm_before_the_last_product_leaves_nothing_to_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "bitnet", tiny.FAMILIES["llama"])
    model = tiny.make_model("bitnet")
    _, _, spaces = spaces_of(prepared(model), 0)
    assert spaces == []


def test_statistics_move_with_the_channels() -> None:
    model = tiny.make_model("gpt2")
    walk = prepared(model)
    block, module, spaces = spaces_of(walk, 0)
    linears = {linear.name: module.get_submodule(linear.name) for linear in block.linears}

    def measured() -> Any:
        with Collector(linears, {"input_square", "gram", "output_square"}) as collector:
            walk.run_probe(0, module)
        return collector.statistics()

    expected = measured()
    for space in spaces:
        order = shuffled(space)
        fold(space, order, in_module(module))
        permute_statistics(space, order, expected)
    found = measured()
    for linear in block.linears:
        for name in ("input_square", "output_square", "gram"):
            wanted = getattr(expected[linear.name], name)
            torch.testing.assert_close(getattr(found[linear.name], name), wanted, rtol=1e-4, atol=1e-4)


def test_memory_two_places_share_is_permuted_once() -> None:
    walk = prepared(tiny.make_model("qwen2"))
    _, module, (space, _) = spaces_of(walk, 0)
    (producer, _), live = space.producers[0], in_module(module)
    weight, bias = (tensor.clone() for tensor in live(producer) if tensor is not None)
    stored_bias = bias.double()

    def stored(linear: Linear) -> tuple[Tensor, Tensor | None]:
        return live(linear)[0], stored_bias if linear == producer else None

    order = shuffled(space)
    fold(space, order, live, stored)
    rows = space.output_order(producer, order)
    assert torch.equal(live(producer)[0], weight[rows])
    assert torch.equal(stored_bias, bias.double()[rows])


def test_pruned_rows_and_columns_stay_in_their_pattern() -> None:
    walk = prepared(tiny.make_model("llama"))
    _, module, spaces = spaces_of(walk, 0)
    for space in spaces:
        order = space.order(in_module(module)(space.consumer)[0].abs(), 2, 4)
        fold(space, order, in_module(module))
        weight = in_module(module)(space.consumer)[0]
        weight *= keep_groups(weight.abs(), 2, 4)
        assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all())


class Toy(nn.Module):
    """Residual stream of 8 channels; `middle` says what stands between `up` and `down`."""

    def __init__(self, middle: Callable[[Tensor], Tensor], up: int = 16, down: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, up)
        self.down = nn.Linear(down, 8)
        self.middle = middle

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.middle(self.up(hidden)))


def toy_spaces(toy: nn.Module) -> list[Space]:
    linears = [
        Linear(name, "toy", 0, child.out_features, child.in_features, False)
        for name, child in toy.named_modules()
        if isinstance(child, nn.Linear)
    ]
    hidden = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    return find_spaces(Block(0, "toy", tuple(linears)), toy, lambda module: module(hidden))


@pytest.mark.parametrize(
    "middle",
    [torch.relu, torch.sigmoid, torch.square, lambda x: torch.tanh(x / 30) * 30],
    ids=["relu", "sigmoid", "square", "capped"],
)
def test_maps_that_act_on_all_channels_alike(middle: Callable[[Tensor], Tensor]) -> None:
    (space,) = toy_spaces(Toy(middle))
    assert described(space) == ("down", {"up": [0]}, 16, 1, 16)


GAIN = torch.linspace(0.9, 1.1, 16)


@pytest.mark.parametrize(
    "middle",
    [lambda x: torch.softmax(x, -1), lambda x: x * GAIN, lambda x: x + 0.1 * GAIN, lambda x: x.cumsum(-1)],
    ids=["mixed", "gains", "offsets", "sums"],
)
def test_maps_that_tell_channels_apart(middle: Callable[[Tensor], Tensor]) -> None:
    assert toy_spaces(Toy(middle)) == []


def test_channels_in_another_order_and_the_halves_of_a_fused_gate() -> None:
    (flipped,) = toy_spaces(Toy(lambda x: x.flip(-1)))
    assert flipped.channels.flatten().tolist() == list(range(16))
    assert flipped.producers[0][1].flatten().tolist() == list(range(15, -1, -1))
    (fused,) = toy_spaces(Toy(lambda x: torch.relu(x[..., :16]) * x[..., 16:], up=32))
    assert fused.producers[0][1].tolist() == [[slot, slot + 16] for slot in range(16)]
    assert (
        toy_spaces(Toy(lambda x: x.reshape(*x.shape[:-1], 16, 2).sum(-1), up=32)) == []
    )  # interleaved: not looked for


def test_rows_that_someone_else_reads_are_refused_by_the_proof() -> None:
    class Tapped(Toy):
        def forward(self, hidden: Tensor) -> Tensor:
            inner = self.up(hidden)
            return hidden + self.down(torch.relu(inner)) + inner[..., :8]

    assert toy_spaces(Tapped(torch.relu)) == []


def test_a_gate_a_head_wide_beside_shared_values() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.value, self.gate, self.down = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            value = self.value(hidden)
            return hidden + self.down(torch.cat([value, value], -1) * torch.sigmoid(self.gate(hidden)))

    (space,) = toy_spaces(Gated())
    assert space.channels.tolist() == [[slot, slot + 4] for slot in range(4)]
    rows = {producer.name: rows.tolist() for producer, rows in space.producers}
    assert rows == {"value": [[slot] for slot in range(4)], "gate": [[slot, slot + 4] for slot in range(4)]}


@pytest.mark.parametrize("first", [True, False])
def test_a_linear_that_is_fed_other_than_tokens(first: bool) -> None:
    class Pooled(Toy):
        def forward(self, hidden: Tensor) -> Tensor:
            scale = torch.sigmoid(self.pool(hidden.mean(1)))[:, None] if first else None
            inner = self.up(hidden)
            scale = torch.sigmoid(self.pool(hidden.mean(1)))[:, None] if scale is None else scale
            return hidden + self.down(inner * scale)

    toy = Pooled(torch.relu)
    toy.pool = nn.Linear(8, 16)
    assert toy_spaces(toy) == []


def test_a_block_that_fails_is_left_as_it_was() -> None:
    toy = Toy(torch.relu)
    own = toy.up.forward
    toy.up.forward = own  # type: ignore[method-assign]
    before = copy.deepcopy(toy.state_dict())
    fails_at = -1
    calls = 0

    def run(module: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise PrunekitError("stop")
        result = module(torch.ones(1, 8, 8).cumsum(1))
        assert isinstance(result, Tensor)
        return result

    block = Block(0, "toy", (Linear("up", "toy", 0, 16, 8, False), Linear("down", "toy", 0, 8, 16, False)))
    assert len(find_spaces(block, toy, run)) == 1
    for place in (1, 2, calls // 2, calls - 1, calls):
        fails_at, calls = place, 0
        with pytest.raises(PrunekitError, match="stop"):
            find_spaces(block, toy, run)
        assert toy.up.forward is own
        assert "forward" not in toy.down.__dict__
        assert not toy.up._forward_hooks
        assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())


def test_finding_is_cheap_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = prepared(tiny.make_model("llama", intermediate_size=512))
    recorded = []
    monkeypatch.setattr(folding, "_record", lambda *given, plain=folding._record: recorded.append(1) or plain(*given))
    _, _, first = spaces_of(walk, 1)
    assert len(recorded) == 3  # the real block, and once a space
    torch.rand(3)  # the global generator is nobody's business
    _, _, second = spaces_of(walk, 1)
    assert [described(space) for space in first] == [described(space) for space in second]
