"""Structures are found in every family; a plan says which of their units stay, and masking them is removing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from prunekit.errors import InputError
from prunekit.model.anatomy import Anatomy, read_anatomy
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan, Structures
from prunekit.shrink.slicing import Slicer
from prunekit.shrink.units import ATTENTION, MLP, Structure, find_structures

IDS = torch.arange(24).reshape(2, 12) * 7 % 250

_HEADS = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "starcoder2"], ("self_attn.o_proj", 2, 16, "alone")
    ),
    "qwen3": ("self_attn.o_proj", 2, 32, "alone"),
    "phi3": ("self_attn.o_proj", 2, 16, "together"),
    "opt": ("self_attn.out_proj", 4, 8, "alone"),
    "gpt2": ("attn.c_proj", 4, 8, "alone"),
    "gpt_neox": ("attention.dense", 4, 8, "alone"),
    "bloom": ("self_attention.dense", 4, 8, "never"),
    "stablelm": ("self_attn.o_proj", 2, 16, "alone"),
}  # not olmo2, whose norms go over all heads, and not falcon, whose heads share one key and value
_CHANNELS = {
    **dict.fromkeys(tiny.FAMILIES, ("mlp.down_proj", 48)),
    "opt": ("fc2", 48),
    "gpt2": ("mlp.c_proj", 128),
    "gpt_neox": ("mlp.dense_4h_to_h", 48),
    "falcon": ("mlp.dense_4h_to_h", 128),
    "bloom": ("mlp.dense_4h_to_h", 128),
    "starcoder2": ("mlp.c_proj", 48),
}


def structures_of(model: nn.Module) -> tuple[Anatomy, list[tuple[Structure, ...]]]:
    anatomy = read_anatomy(model)
    return anatomy, find_structures(model, anatomy)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Anatomy, Structures]:
    model = tiny.make_model("llama", dtype=torch.float64)
    return model, *structures_of(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_block_has_the_structures_of_its_family(family: str) -> None:
    heads = [(ATTENTION, *_HEADS[family])] if family in _HEADS else []
    name, count = _CHANNELS[family]
    _, structures = structures_of(tiny.make_model(family))
    for index, block in enumerate(structures):
        assert {each.block for each in block} == {index}
        found = [(each.kind, each.name, each.count, each.size, each.resizes) for each in block]
        assert found == [*heads, (MLP, name, count, 1, "alone")]


def test_nothing_of_the_model_is_changed_by_looking() -> None:
    model = tiny.make_model("stablelm").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        structures_of(model)
    assert model.training
    assert model.model.layers[0].self_attn.num_heads == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_meta_device_shows_the_same() -> None:
    for family in ("llama", "phi3", "gpt2"):
        real = tiny.make_model(family)
        with torch.device("meta"):
            hollow = type(real)(real.config)
        found = [
            [
                (each.name, each.count, each.cost, each.resizes, each.scaled)
                for block in structures_of(model)[1]
                for each in block
            ]
            for model in (real, hollow)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_unit_of_attention_is_a_key_head_with_its_queries(heads: int) -> None:
    _, structures = structures_of(tiny.make_model("llama", num_key_value_heads=heads))
    kinds = [each.kind for each in structures[0]]
    assert kinds == ([MLP] if heads == 1 else [ATTENTION, MLP])  # a single one cannot go
    if heads > 1:
        attention = structures[0][0]
        slices = {part.tensor: part for part in attention.slices}
        assert attention.count == heads
        width = 32 // heads
        assert slices["self_attn.q_proj.weight"].entries.tolist() == torch.arange(32).reshape(heads, width).tolist()
        assert slices["self_attn.v_proj.weight"].entries.tolist() == torch.arange(8 * heads).reshape(heads, 8).tolist()
        assert attention.cost == 2 * 8 * 32 * (1 + 4 // heads)


def test_a_fused_projection_gives_a_channel_two_rows() -> None:
    _, structures = structures_of(tiny.make_model("phi3"))
    slices = {part.tensor: part for part in structures[0][1].slices}
    assert slices["mlp.gate_up_proj.weight"].entries[3].tolist() == [3, 51]
    assert structures[0][1].cost == 3 * 32


def test_costs_are_what_the_papers_count() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    _, structures = structures_of(model)
    assert [(each.count, each.cost) for each in structures[0]] == [(32, 4 * 128 * 4096), (11008, 3 * 4096)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_masking_is_what_removing_leaves(family: str) -> None:
    """Every tensor of removed units is made up anew: none of them may matter any more."""
    model = tiny.make_model(family, dtype=torch.float64)
    anatomy, structures = structures_of(model)
    draw = torch.Generator().manual_seed(3)
    plan = Plan(
        tuple(
            {
                each.name: tuple(sorted(torch.randperm(each.count, generator=draw)[: each.count // 2].tolist()))
                for each in block
            }
            for block in structures
        )
    )
    with torch.no_grad(), masked(model, anatomy, structures, plan):
        expected = model(IDS).logits
        for block in anatomy.blocks:
            module = model.get_submodule(block.name)
            parameters = dict(module.named_parameters())
            slicer = Slicer(
                structures[block.index], plan, {name: tuple(part.shape) for name, part in parameters.items()}
            )
            assert slicer.index
            for name, axes in slicer.index.items():
                for axis, kept in axes.items():
                    gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                    gone[kept] = False
                    places = gone.nonzero().flatten()
                    other = torch.randn(parameters[name].index_select(axis, places).shape, generator=draw).double()
                    parameters[name].index_copy_(axis, places, other)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(IDS).logits, expected)  # and without the mask they do


def test_a_slicer_keeps_what_is_no_units(llama: tuple[Any, Anatomy, Structures]) -> None:
    model, _, structures = llama
    block = model.model.layers[0]
    shapes = {name: tuple(part.shape) for name, part in block.named_parameters()}
    slicer = Slicer(structures[0], Plan(({"mlp.down_proj": (2, 40)}, {}, {})), shapes)
    weight = block.mlp.down_proj.weight.detach()
    assert torch.equal(slicer("mlp.down_proj.weight", weight), weight[:, [2, 40]])
    assert slicer.shape("mlp.up_proj.weight", (48, 32)) == (2, 32)
    norm = block.input_layernorm.weight
    assert slicer("input_layernorm.weight", norm) is norm


def test_what_is_removed_is_counted(llama: tuple[Any, Anatomy, Structures]) -> None:
    model, _, structures = llama
    block = sum(part.numel() for part in model.model.layers[0].parameters())
    plan = Plan(({"self_attn.o_proj": (1,), "mlp.down_proj": tuple(range(40))}, None, {}))
    assert plan.removed(structures, [block] * 3) == 2 * 8 * 32 * 3 + 8 * 3 * 32 + block
    assert plan.kept_blocks == [0, 2]
    assert not plan.uniform(structures)
    assert Plan(({}, None, {})).uniform(structures)


# Plans as JSON


def test_a_plan_is_read_as_it_was_written(tmp_path: Path, llama: tuple[Any, Anatomy, Structures]) -> None:
    _, _, structures = llama
    plan = Plan(({"self_attn.o_proj": (1,), "mlp.down_proj": (0, 5)}, None, {}))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json(structures)))
    read = Plan.read(tmp_path / "plan.json", structures)
    assert read.to_json(structures) == plan.to_json(structures)
    assert read.blocks[0] == plan.blocks[0]
    assert read.blocks[2] == Plan.whole(structures).blocks[2]


def _block(**changes: Any) -> dict[str, Any]:
    return {"mlp.down_proj": {"units": 48, "kept": [0, 1], **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "this is no plan of prunekit"),
        ({"format": 9, "blocks": []}, "must hold format 1"),
        ({"format": 1, "blocks": [{}, {}]}, "for a model of 2 blocks, this one has 3"),
        ({"format": 1, "blocks": [None, None, None]}, "keeps no block"),
        ({"format": 1, "blocks": [3, {}, {}]}, "block 0 has no structure 3"),
        (
            {"format": 1, "blocks": [{}, {"mlp.up": {}}, {}]},
            r"block 1 has no structure mlp\.up: it has mlp\.down_proj, self",
        ),
        ({"format": 1, "blocks": [_block(units=64), {}, {}]}, "has 48 units, the plan was made for"),
        ({"format": 1, "blocks": [_block(kept=[1, 0]), {}, {}]}, "must be ascending numbers below 48"),
        ({"format": 1, "blocks": [_block(kept=[0, 48]), {}, {}]}, "must be ascending numbers below 48"),
        ({"format": 1, "blocks": [_block(kept=[True]), {}, {}]}, "must be ascending numbers below 48"),
        ({"format": 1, "blocks": [_block(kept=[]), {}, {}]}, "would be left empty: keep at least one"),
    ],
)
def test_what_is_no_plan_for_a_model_is_refused(
    content: Any, message: str, tmp_path: Path, llama: tuple[Any, Anatomy, Structures]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"plan '.*': .*{message}"):
        Plan.read(tmp_path / "plan.json", llama[2])


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Plan.read(tmp_path / "none.json", [])
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        Plan.read(tmp_path / "plan.json", [])
