"""Blocks and linears are found from the model itself; what prunekit does not understand is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from prunekit.errors import InputError
from prunekit.model.anatomy import Anatomy, read_anatomy, tied_names, weight_of

# Written down by hand, so that the search is compared with something that did not search.
BLOCKS_NAMES = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
}


pytestmark = pytest.mark.usefixtures("seeded")


def found(family: str) -> tuple[nn.Module, Anatomy]:
    model = tiny.make_model(family)
    return model, read_anatomy(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_linears_are_exactly_the_blocks_two_dimensional_weights(family: str) -> None:
    model, anatomy = found(family)
    name = BLOCKS_NAMES.get(family, "model.layers")
    assert anatomy.blocks_name == name
    assert [(block.index, block.name) for block in anatomy.blocks] == [(i, f"{name}.{i}") for i in range(3)]
    matrices = [
        path for path, tensor in model.named_parameters() if path.startswith(name + ".") and tensor.ndim == 2
    ]  # in definition order
    assert [linear.full_name + ".weight" for linear in anatomy.linears()] == matrices
    assert len(matrices) >= 3 * 4
    for block in anatomy.blocks:
        assert all(linear.block == block.name for linear in block.linears)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sizes_and_matrix_are_out_by_in(family: str) -> None:
    model, anatomy = found(family)
    for linear in anatomy.linears():
        module = model.get_submodule(linear.full_name)
        matrix = linear.matrix(weight_of(module))
        assert linear.transposed == (family == "gpt2")
        assert matrix.shape == (linear.out_features, linear.in_features)
        assert linear.count == module.weight.numel()
        # What the module computes without its bias is x Wᵀ: the only meaning of [out, in] that counts.
        inputs = torch.randn(3, linear.in_features)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(inputs) - bias, inputs @ matrix.t(), rtol=1e-4, atol=1e-4)
        assert matrix.data_ptr() == module.weight.data_ptr(), "a view, so that zeroing it zeroes the module"
        assert not matrix.requires_grad


def test_gpt2_sizes_are_the_transposed_of_what_is_stored() -> None:
    model, anatomy = found("gpt2")
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in anatomy.blocks[0].linears}
    assert sizes == {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    assert isinstance(model.get_submodule("transformer.h.0.mlp.c_fc"), Conv1D)
    assert model.get_submodule("transformer.h.0.mlp.c_fc").weight.shape == (32, 128)


def test_embeddings_heads_and_projections_outside_the_blocks_are_not_linears() -> None:
    model, anatomy = found("opt")
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out", "model.decoder.embed_tokens"}
    assert outside <= {name for name, _ in model.named_modules()}
    assert not outside & {linear.full_name for linear in anatomy.linears()}
    assert all(linear.full_name.startswith("model.decoder.layers.") for linear in anatomy.linears())


def test_the_same_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.make_config("gpt2"))
    assert read_anatomy(model) == found("gpt2")[1]


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_mixture_of_experts_is_refused_by_name(family: str) -> None:
    with pytest.raises(InputError, match="mixture-of-experts models are not yet supported") as caught:
        read_anatomy(tiny.make_model(family))
    message = str(caught.value)
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in message
    assert "'model.layers.0.mlp.experts.down_proj'" in message
    assert "'model.layers.0.mlp.gate.weight'" in message  # the router
    assert "model.layers.1" not in message, "one block says it all"


def test_state_space_model_is_refused() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=97)
    with pytest.raises(InputError, match=r"block is not yet supported: .*'backbone\.layers\.0\.mixer"):
        read_anatomy(AutoModelForCausalLM.from_config(config))


class Toy(nn.Module):
    """A stack of blocks of one linear each, and whatever else is hung on it."""

    def __init__(self, blocks: list[nn.Module], **others: nn.Module) -> None:
        super().__init__()
        for name, module in others.items():
            self.add_module(name, module)
        self.layers = nn.ModuleList(blocks)


def block(width: int = 8) -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(width, width), "norm": nn.LayerNorm(width)})


def test_the_list_with_most_weights_wins_not_the_longest_nor_the_first() -> None:
    towers = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    anatomy = read_anatomy(Toy([block(), block()], vision=towers))
    assert anatomy.blocks_name == "layers"
    assert [linear.full_name for linear in anatomy.linears()] == ["layers.0.proj", "layers.1.proj"]


def test_a_list_inside_a_block_is_not_taken_for_the_blocks() -> None:
    experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])}) for _ in range(2)]
    with pytest.raises(InputError, match=r"mixture-of-experts .*'layers\.0\.experts' \(Linear\)"):
        read_anatomy(Toy(experts))


def test_only_the_first_strange_block_is_spelt_out() -> None:
    strange = [nn.ModuleDict({"proj": nn.Linear(8, 8), "relative": nn.Embedding(4, 8)}) for _ in range(2)]
    with pytest.raises(InputError, match=re.escape("in block 1: 'layers.1.relative.weight' (Embedding)")):
        read_anatomy(Toy([block(), *strange]))


def test_a_model_without_blocks_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(4, 4)), Toy([nn.LayerNorm(4)]), Toy([])):
        with pytest.raises(InputError, match="has no list of decoder blocks"):
            read_anatomy(model)


def test_shared_block_weights_are_refused() -> None:
    between_blocks = tiny.make_model("llama")
    layers = between_blocks.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' and 'model\.layers\.2\.mlp"):
        read_anatomy(between_blocks)

    within_one = tiny.make_model("llama")
    within_one.model.layers[1].mlp.gate_proj.weight = within_one.model.layers[1].mlp.up_proj.weight
    with pytest.raises(InputError, match="one tensor"):
        read_anatomy(within_one)

    one = block()
    with pytest.raises(InputError, match=r"'layers\.0\.proj\.weight' and 'layers\.1\.proj\.weight'"):
        read_anatomy(Toy([one, one]))

    with_the_outside = Toy([block(), block()], head=nn.Linear(8, 8))
    with_the_outside.head.weight = with_the_outside.layers[1].proj.weight
    with pytest.raises(InputError, match="one tensor"):
        read_anatomy(with_the_outside)


def test_a_tied_head_is_no_shared_block_weight() -> None:
    model = tiny.make_model("llama", tie_word_embeddings=True)
    assert len(read_anatomy(model).blocks) == 3
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert tied_names(model) == dict.fromkeys(names, names)
    assert tied_names(tiny.make_model("llama", tie_word_embeddings=False)) == {}


def test_packed_weights_are_refused() -> None:
    model = tiny.make_model("llama")
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj' \(Linear\) holds torch\.int8"):
        read_anatomy(model)


def test_a_larger_vision_tower_is_not_taken_for_the_text() -> None:
    class Seeing(nn.Module):
        """Text blocks, and a tower of wider ones that text never reaches."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Module()
            self.tower.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(4))
            self.text = nn.Module()
            self.text.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

        def get_decoder(self) -> nn.Module:
            return self.text

    assert read_anatomy(Seeing()).blocks_name == "text.layers"
