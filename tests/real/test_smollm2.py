"""prunekit on SmolLM2-135M: grouped-query attention, a tied head, thirty blocks, a real tokenizer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, load_tokenizer

CALIBRATION = {"samples": 2, "length": 128}


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wanda at 50 %, forward passes in float32."""
    out = tmp_path_factory.mktemp("smollm2") / "wanda"
    prunekit.prune(smollm2, method="wanda", sparsity=0.5, out=out, calibration=CALIBRATION, dtype="float32")
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def oracle_masks(folder: Path, ids: torch.Tensor, pruned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sequential Wanda in float64, block by block through transformers' own layers, by full sort.

    Every block is judged behind the blocks that prunekit pruned. Left to itself the oracle agrees too, until somewhere one pair of
    weights lies closer together than float32 can tell; on a few hundred tokens that one bit then changes thousands downstream.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    calls: list[Any] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    keep: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        model.model(ids, use_cache=False)
        handle.remove()
        (hidden, *_), named = calls[0]
        for number, layer in enumerate(model.model.layers):
            squares: dict[str, torch.Tensor] = {}

            def measure(name: str, squares: dict[str, torch.Tensor] = squares) -> Any:
                def hook(module: torch.nn.Module, inputs: Any) -> None:
                    squares[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).square().sum(0)

                return hook

            linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
            handles = [module.register_forward_pre_hook(measure(name)) for name, module in linears.items()]
            layer(hidden, **named)
            for handle in handles:
                handle.remove()
            for name, module in linears.items():
                scores = module.weight.abs() * squares[name].sqrt()
                smallest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
                mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, smallest, False)
                full_name = f"model.layers.{number}.{name}.weight"
                keep[full_name] = mask
                module.weight.mul_(pruned[full_name] != 0)
            hidden = layer(hidden, **named)
    return keep


def test_masks_agree_with_a_float64_oracle(smollm2: Path, pruned: Path) -> None:
    windows = calibration_windows(
        documents("builtin", "calibration"),
        load_tokenizer(smollm2, trust_remote_code=False),
        samples=CALIBRATION["samples"],
        length=CALIBRATION["length"],
        seed=0,
        sampling="random",
    )
    dense, sparse = tensors(smollm2), tensors(pruned)
    equal = total = 0
    for name, keep in oracle_masks(smollm2, windows.ids, sparse).items():
        # a weight that was zero already says nothing about the mask
        said = dense[name] != 0
        equal += int(((sparse[name] != 0) == keep)[said].sum())
        total += int(said.sum())
    assert total > 100_000_000
    assert equal / total >= 0.999


def test_tied_head_stays_tied_and_untouched(smollm2: Path, pruned: Path) -> None:
    dense, sparse = tensors(smollm2), tensors(pruned)
    assert dense.keys() == sparse.keys()
    assert "lm_head.weight" not in sparse
    assert torch.equal(dense["model.embed_tokens.weight"], sparse["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_kept_weights_are_bit_identical_and_rows_exactly_half_zero(smollm2: Path, pruned: Path) -> None:
    dense, sparse = tensors(smollm2), tensors(pruned)
    for name, weight in sparse.items():
        if name.endswith("_proj.weight"):
            kept = weight != 0
            assert torch.equal(weight[kept], dense[name][kept])
            zeros = (weight == 0).sum(1)
            # rows that held zeros before may hold a few more than were asked for
            assert bool((zeros >= weight.shape[1] // 2).all())
            assert bool((zeros <= weight.shape[1] // 2 + (dense[name] == 0).sum(1)).all())
        else:
            assert torch.equal(weight, dense[name])


def test_what_was_written_is_sound(pruned: Path) -> None:
    found = prunekit.inspect(pruned)
    assert found.sound
    assert len(found.linears) == 210
    assert found.zeros / found.weights == pytest.approx(0.5, abs=1e-4)


def test_perplexity_rises_moderately(smollm2: Path, pruned: Path) -> None:
    setup = {"length": 512, "samples": 4}
    before = prunekit.evaluate(smollm2, **setup).perplexity
    after = prunekit.evaluate(pruned, **setup).perplexity
    assert 8 < before < 30
    assert before < after < 5 * before


def test_perplexity_equals_the_whole_models(smollm2: Path, data: Path) -> None:
    text = data / "text" / "wikitext2-test.txt"
    found = prunekit.evaluate(smollm2, text=str(text), length=256, samples=3, dtype="float32")
    tokenizer = load_tokenizer(smollm2, trust_remote_code=False)
    stream = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    ids = stream[: 3 * 256].reshape(3, 256)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_command_line_run_stays_small(smollm2: Path, tmp_path: Path) -> None:
    """Peak memory of a bfloat16 run, reload check included; an integer promise, unlike seconds.

    What importing takes is left out: it depends on what else is installed (transformers imports scipy where it is).
    """
    command = [sys.executable, "-m", "prunekit", "prune", str(smollm2), "--pattern", "2:4", "--dtype", "bfloat16"]
    command += ["--samples", "4", "--length", "1024", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert result["verification"]["difference"] <= result["verification"]["tolerance"]
    script = (
        "from transformers.models.llama import modeling_llama; from prunekit import machine; print(machine.rss_bytes())"
    )
    imports = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result["peak_rss_bytes"] - int(imports.stdout) <= 450e6
