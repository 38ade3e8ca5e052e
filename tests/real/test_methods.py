"""The methods on the real model, few tokens: better solvers lose less, and K:G with channels permuted is still the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit

CALIBRATION = {"samples": 6, "length": 256, "batch": 1}
MORE = {"samples": 8, "length": 512, "batch": 1}  # what is tuned on too few tokens learns them by heart
MEASURED = {"length": 256, "samples": 8}


def perplexity(model: Path, tmp_path: Path, method: str, **options: Any) -> float:
    out = tmp_path / method
    result = prunekit.prune(model, out=out, method=method, calibration=MORE, **options)
    assert result.verification is not None
    found = prunekit.inspect(out)
    assert found.sound
    return prunekit.evaluate(out, **MEASURED).perplexity


def test_what_takes_more_into_account_is_better(smollm2: Path, tmp_path: Path) -> None:
    short = {"auto": {"reconstruct": {"steps": 3, "polish": 4}}}  # of twelve and ten, which take minutes
    methods = ("magnitude", "wanda", "sparsegpt", "auto")
    found = [perplexity(smollm2, tmp_path, method, sparsity=0.6, parts=short.get(method, {})) for method in methods]
    assert found == sorted(found, reverse=True), dict(zip(methods, found, strict=True))


def test_permuted_channels_serve_a_group_pattern(smollm2: Path, tmp_path: Path) -> None:
    errors = []
    for permute in (False, True):
        out = tmp_path / f"permute-{permute}"
        parts = {"pattern": {"permute": permute}}
        result = prunekit.prune(smollm2, out=out, method="wanda", pattern="2:4", calibration=CALIBRATION, parts=parts)
        assert prunekit.inspect(out).sound
        assert result.permuted == (60 if permute else None), "down_proj and o_proj of all blocks"
        moved = [line.output_error or 0 for line in result.linears if line.name.endswith(("down_proj", "o_proj"))]
        errors.append(sum(moved) / len(moved))
    assert errors[1] < errors[0]


def test_dead_and_scarce_inputs_do_not_hurt(smollm2: Path, tmp_path: Path) -> None:
    few = {"samples": 1, "length": 16}  # a gram matrix of rank 16
    for method in ("sparsegpt", "wanda+least-squares"):
        result = prunekit.prune(smollm2, out=tmp_path / method, method=method, sparsity=0.5, calibration=few)
        assert result.sparsity == pytest.approx(0.5, abs=1e-4)
        assert all(torch.isfinite(torch.tensor(linear.output_error)) for linear in result.linears)
