"""SmolLM2-135M pruned by half, in the other forms: as small as promised, and the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.checkpoint.reader import Reader, sha256_file


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Magnitude at 50 %; it measures nothing."""
    out = tmp_path_factory.mktemp("smollm2") / "magnitude"
    prunekit.prune(smollm2, method="magnitude", sparsity=0.5, out=out, calibration={"samples": 1, "length": 64})
    return out


def test_packed_by_half_and_back(pruned: Path, tmp_path: Path) -> None:
    found = prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    assert found.packed == 210
    assert found.packed_after <= 0.57 * found.packed_before
    assert found.after <= 0.66 * found.dense  # the embedding is a fifth of the model and keeps its weights
    stored = sum(path.stat().st_size for path in found.out.glob("*.safetensors"))
    assert stored == found.after
    back = prunekit.export(found.out, out=tmp_path / "plain").out
    for file in Reader(pruned).files:
        assert sha256_file(back / file) == sha256_file(pruned / file)
    ids = torch.arange(1000, 1024)[None]
    with torch.inference_mode():
        ours = prunekit.load(found.out, dtype="bfloat16", device="cpu")(ids).logits
        assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)(ids).logits)


def test_gguf_is_the_same_model(pruned: Path, tmp_path: Path) -> None:
    prunekit.export(pruned, out=tmp_path / "it.gguf", format="gguf")
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "it.gguf"}
    ids = torch.arange(1000, 1024)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)(ids).logits
        ours = prunekit.load(pruned, dtype="float32", device="cpu")(ids).logits
    assert torch.equal(theirs, ours)


def test_the_sparse_runtime_is_as_near_to_exact_as_the_dense_one(pruned: Path) -> None:
    ids = torch.randint(49152, (1, 60), generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16"):
            for runtime in ("dense", "sparse"):
                model = prunekit.load(pruned, dtype=dtype, device="cpu", runtime=runtime)
                few = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:6]).logits], 1)  # other kernels than many
                logits[dtype, runtime] = torch.cat([model(ids).logits, few], 1)[0].double()
    exact = logits["float32", "dense"]
    gaps = {way: float((found - exact).norm() / exact.norm()) for way, found in logits.items()}
    assert gaps["float32", "sparse"] < 1e-5
    assert gaps["bfloat16", "sparse"] < 1.25 * gaps["bfloat16", "dense"]
