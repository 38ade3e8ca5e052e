"""Channels left out of the residual stream: the folder is the dense model cut by hand, whatever else goes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit import InputError
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, load_tokenizer
from prunekit.checkpoint.writer import PLAN_NAME, Journal, Writer
from prunekit.model.source import StreamedModel
from prunekit.shrink.masking import masked
from prunekit.shrink.narrowing import Narrowing
from prunekit.shrink.plan import Channels, Plan
from prunekit.shrink.units import find_structures
from prunekit.shrink.writing import write_shrunk

IDS = torch.arange(40).reshape(2, 20) * 5 % 250
WINDOWS, LENGTH = 6, 32
NARROWED = ["llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2"]
ATTENTION, MLP = ["self_attn.o_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.make_text(600), encoding="utf-8")
    return path


def cut(folder: Path, out: Path, text: Path, *, widths: dict[str, Any] | None = None, **more: Any) -> prunekit.Result:
    return prunekit.prune(
        folder,
        out=out,
        **{
            "method": "minitron",
            "parts": {"budget": {"name": "widths", **({"hidden": 24} if widths is None else widths)}},
            "calibration": {"source": str(text), "samples": WINDOWS, "length": LENGTH},
            "dtype": "float32",
            **more,
        },
    )


def windows_of(folder: Path, text: Path) -> Tensor:
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    drawn = documents(str(text), "calibration")
    return calibration_windows(drawn, tokenizer, samples=WINDOWS, length=LENGTH, seed=0, sampling="random").ids


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def loaded(folder: Path, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **more}).eval()


def plan_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PLAN_NAME).read_text())


# By hand


@torch.no_grad()
def importance(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of a Llama: over all norms of all layers, the root of the squares over windows of the mean |output| over tokens."""
    seen: list[Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(ids)
    assert len(seen) == 2 * len(model.model.layers)
    return sum(each.abs().mean(1).square().sum(0).sqrt() for each in seen)


def by_hand(model: PreTrainedModel, kept: list[int], units: dict[str, list[list[int]]]) -> PreTrainedModel:
    """A Llama of the stock class, narrower, with what is left of another one's tensors.

    `units` are the groups of heads and the channels that each block keeps.
    """
    config = AutoConfig.for_model(**model.config.to_dict())
    size, queries = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    groups, channels = units[ATTENTION], units[MLP]
    config.hidden_size, config.intermediate_size = len(kept), len(channels[0])
    config.num_key_value_heads, config.num_attention_heads = len(groups[0]), len(groups[0]) * queries
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(config.num_hidden_layers):
        heads = [group * queries + head for group in groups[index] for head in range(queries)]
        q_rows = [head * size + row for head in heads for row in range(size)]
        kv_rows = [group * size + row for group in groups[index] for row in range(size)]
        layer = f"model.layers.{index}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            state[layer + name] = state[layer + name][kept]
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            state[f"{layer}self_attn.{name}_proj.weight"] = state[f"{layer}self_attn.{name}_proj.weight"][rows][:, kept]
        state[layer + "self_attn.o_proj.weight"] = state[layer + "self_attn.o_proj.weight"][kept][:, q_rows]
        for name in ("gate", "up"):
            weight = state[f"{layer}mlp.{name}_proj.weight"]
            state[f"{layer}mlp.{name}_proj.weight"] = weight[channels[index]][:, kept]
        state[layer + "mlp.down_proj.weight"] = state[layer + "mlp.down_proj.weight"][kept][:, channels[index]]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:, kept]
    state["model.norm.weight"] = state["model.norm.weight"][kept]
    narrow = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    narrow.load_state_dict(state)
    return narrow


WIDTHS = {
    "hidden": {"hidden": 24},
    "all": {"hidden": 24, "mlp": 30, "attention": 1},
}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("which", sorted(WIDTHS))
def test_the_folder_is_the_dense_model_cut_by_hand(which: str, tied: bool, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", tie_word_embeddings=tied, dtype=torch.float64)
    result = cut(tmp_path / "base", tmp_path / "out", text, widths=WIDTHS[which])
    dense = loaded(tmp_path / "base", dtype=torch.float64)
    plan = plan_in(tmp_path / "out")
    found = importance(dense, windows_of(tmp_path / "base", text))
    assert plan["hidden"]["kept"] == sorted(found.topk(24).indices.tolist())
    assert plan["hidden"]["channels"] == 32
    dense = loaded(tmp_path / "base", dtype=torch.float64)
    units = {name: [block[name]["kept"] for block in plan["blocks"]] for name in (ATTENTION, MLP)}
    assert len(units[MLP][0]) == (30 if which == "all" else 48)
    narrow, own = by_hand(dense, plan["hidden"]["kept"], units), loaded(tmp_path / "out", dtype=torch.float64)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, narrow.state_dict()[name]), name
    torch.testing.assert_close(logits(own), logits(narrow), rtol=1e-9, atol=1e-9)
    assert own.config.tie_word_embeddings == tied
    generated = [model.generate(IDS[:1], max_new_tokens=8, do_sample=False) for model in (own, narrow)]
    assert torch.equal(*generated)
    after = sum(parameter.numel() for parameter in narrow.parameters())
    assert result.parameters - result.removed == after
    blocks = sum(parameter.numel() for parameter in narrow.model.layers.parameters())
    assert result.block_parameters - result.block_removed == blocks
    assert result.channels == (32, 24)
    assert float((logits(dense) - logits(own)).norm() / logits(dense).norm()) > 0.1, "much is left out"


@pytest.mark.parametrize("family", NARROWED)
def test_every_family_that_can_is_cut(family: str, tmp_path: Path, text: Path) -> None:
    model = tiny.save_model(tmp_path / "base", family)
    result = cut(tmp_path / "base", tmp_path / "out", text, widths={"hidden": 18, "mlp": 30})
    assert result.verification is not None
    assert result.verification.through == "from_pretrained"
    own, kept = loaded(tmp_path / "out"), plan_in(tmp_path / "out")["hidden"]["kept"]
    assert (own.config.hidden_size, own.config.intermediate_size) == (18, 30)
    assert torch.equal(own.get_input_embeddings().weight, model.get_input_embeddings().weight[:, kept])
    assert torch.equal(own.model.norm.weight, model.model.norm.weight[kept])
    torch.testing.assert_close(logits(prunekit.load(tmp_path / "out", dtype="float32", device="cpu")), logits(own))
    inspection = prunekit.inspect(tmp_path / "out")
    assert inspection.sound
    assert inspection.removed == result.removed == result.parameters - own.num_parameters()
