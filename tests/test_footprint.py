"""Sizes are counted, not estimated: against files, the safetensors library and transformers' own model."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import prunekit
import tiny
from prunekit.footprint import Footprint, measure_footprint, runtime_advice
from prunekit.model.source import StreamedModel


def footprint(folder: Path) -> Footprint:
    return measure_footprint(StreamedModel.open(folder, dtype="float32", device="cpu"))


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("opt", {})]
)
def test_figures_are_those_of_the_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "model", family, **changes)
    packed = prunekit.export(tmp_path / "model", out=tmp_path / "packed", format="bitmask")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    products = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    raw = load_file(tmp_path / "model" / "model.safetensors").values()
    for folder in (tmp_path / "model", tmp_path / "packed"):
        found = footprint(folder)
        assert found.files == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert found.dense == sum(tensor.nbytes for tensor in raw)
        assert found.bitmask == packed.after
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.nonzero == sum(int((parameter != 0).sum()) for parameter in model.parameters())
        assert found.flops == 2 * sum(weight.numel() for weight in products)
        assert found.nonzero_flops == 2 * sum(int((weight != 0).sum()) for weight in products)
        assert found.sparsity == pytest.approx(0.5, abs=0.02)
        assert found.pattern == "unstructured"


def test_what_is_left_of_a_dropped_sublayer_weighs_nothing(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"source": str(text_file), "samples": 4, "length": 32}
    what = {"depth": {"what": "attention"}}
    out = tmp_path / "dropped"
    result = prunekit.prune(llama_folder, out=out, method="drop", ratio=0.1, calibration=calibration, parts=what)
    assert result.removed > 0
    found, whole = footprint(out), footprint(llama_folder)
    assert found.parameters == whole.parameters - result.removed
    assert found.nonzero == whole.nonzero - result.removed
    assert found.flops < whole.flops


def test_compression_is_that_of_zlib(llama_folder: Path) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    whole = b"".join(tensors[name].numpy().tobytes() for name in tensors)
    assert footprint(llama_folder).zlib == pytest.approx(len(zlib.compress(whole, 1)), rel=0.01)


def test_the_strictest_pattern_that_holds_is_named(tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    model.save_pretrained(tmp_path / "dense")
    tiny.two_four(model, skip="down_proj").save_pretrained(tmp_path / "some")  # what was not pruned says nothing
    tiny.two_four(model).save_pretrained(tmp_path / "all")
    assert footprint(tmp_path / "dense").pattern == "dense"
    assert footprint(tmp_path / "some").pattern == footprint(tmp_path / "all").pattern == "2:4"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::4] = 1
            layer.mlp.down_proj.weight[:, 1::4] = 1
            layer.mlp.down_proj.weight[:, 2::8] = 1
            layer.mlp.down_proj.weight[:, 6::8] = 0
            layer.mlp.down_proj.weight[:, 3::4] = 0
            layer.mlp.down_proj.weight[:, 5::8] = 0
    model.save_pretrained(tmp_path / "eight")
    assert footprint(tmp_path / "eight").pattern == "4:8"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("dense", "hardly any zeros"),
        (
            "unstructured",
            "50 % zeros, at places that follow no rule: a dense runtime .* is not faster; .* --runtime sparse.* --format bitmask",
        ),
        ("4:8", r"four in every eight inputs: .* prunekit\.load\(\.\.\., runtime='sparse'\)"),
        ("2:4", r"two or more in every four inputs: .* sparse tensor cores .* runtime='2:4'"),
        ("1:4", "two or more in every four inputs"),
    ],
)
def test_each_pattern_has_its_advice(pattern: str, words: str) -> None:
    found = Footprint(1, 1, 1, 1, 1, 1, 1, 1, weights=100, zeros=50, pattern=pattern)
    assert re.search(words, runtime_advice(found))
