"""Structures removed from SmolLM2-135M: three groups of three heads a block, a tied head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.checkpoint.reader import Reader
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.model.source import StreamedModel
from prunekit.shrink.plan import Plan
from prunekit.shrink.units import find_structures

CALIBRATION = {"samples": 4, "length": 256}
BLOCK_PARAMETERS = 30 * 3_540_096  # 576·(576 + 2·192 + 576) + 3·576·1536, and two norms


@pytest.fixture(scope="module")
def runs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fifth of the block parameters removed, from what one pass measures, in three ways."""
    folder = tmp_path_factory.mktemp("smollm2-shrunk")
    asked: dict[str, dict[str, Any]] = {
        "random": {"method": "random"},
        "wanda-sp": {"method": "wanda-sp"},
        "refitted": {"method": "wanda-sp+least-squares"},
        "half": {"method": "wanda-sp", "ratio": 0.5},
    }
    found = {}
    for name, settings in asked.items():
        result = prunekit.prune(
            smollm2, out=folder / name, calibration=CALIBRATION, dtype="bfloat16", **{"ratio": 0.2, **settings}
        )
        text = prunekit.evaluate(folder / name, text="builtin:eval", length=256, samples=8)
        found[name] = (result, text.perplexity)
    return found


def test_a_fifth_is_a_fifth_and_loads_as_a_stock_llama(runs: dict[str, Any]) -> None:
    result, _ = runs["refitted"]
    assert result.block_parameters == BLOCK_PARAMETERS
    assert abs(result.removed - 0.2 * BLOCK_PARAMETERS) <= 30 * 3 * 576 / 2
    config = json.loads((result.out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == 1126
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    model = AutoModelForCausalLM.from_pretrained(result.out)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008 - result.removed


def test_heads_go_where_a_half_goes(runs: dict[str, Any]) -> None:
    result, _ = runs["half"]
    config = json.loads((result.out / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert config["num_attention_heads"] == 6
    assert config["head_dim"] == 64
    assert result.ratio == pytest.approx(0.5, abs=1e-3)
    assert result.verification.difference <= result.verification.tolerance / 3


def test_what_is_measured_beats_chance_and_refitting_loses_less_of_what_it_saw(runs: dict[str, Any]) -> None:
    # a thousand tokens are too few to refit a thousand channels: on other text that may be worse than leaving out
    chance, wanda, refitted = (runs[name][1] for name in ("random", "wanda-sp", "refitted"))
    assert max(wanda, refitted) < chance
    errors = [
        [linear.output_error for linear in runs[name][0].linears if linear.output_error is not None]
        for name in ("refitted", "wanda-sp")
    ]
    # the first block sees the same inputs in both
    assert errors[0][0] < errors[1][0]


def test_the_plan_says_what_the_weights_are(smollm2: Path, runs: dict[str, Any]) -> None:
    result, _ = runs["wanda-sp"]
    source = StreamedModel(Reader(smollm2), torch.float32, torch.device("cpu"))
    structures = find_structures(source.module, source.anatomy)
    assert [(each.kind, each.count, each.size) for each in structures[0]] == [("attention", 3, 192), ("mlp", 1536, 1)]
    plan = Plan.read(result.out / PLAN_NAME, structures)
    dense, smaller = Reader(smollm2), Reader(result.out)
    for block in (0, 29):
        kept = plan.kept(structures[block][1])
        for name, axis in (("up_proj", 0), ("gate_proj", 0), ("down_proj", 1)):
            key = f"model.layers.{block}.mlp.{name}.weight"
            assert torch.equal(dense.read([key])[key].index_select(axis, kept), smaller.read([key])[key])
