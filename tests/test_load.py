"""`load` gives the model transformers would, plain or packed; 2:4 weights are compressed where they can be, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit.errors import PrunekitWarning
from prunekit.loading import compress_linears

IDS = torch.arange(20)[None]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_and_packed_are_the_model_of_transformers(family: str, tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "plain", family)
    found = prunekit.export(tmp_path / "plain", out=tmp_path / "packed", format="bitmask")
    assert found.packed
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    for folder in (tmp_path / "plain", tmp_path / "packed"):
        model = prunekit.load(folder, dtype="float32", device="cpu")
        assert type(model) is type(expected)
        assert not model.training
        assert torch.equal(logits(model), logits(expected))
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_a_tied_head_is_tied_and_dtype_is_as_asked(tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "plain", "llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    prunekit.export(tmp_path / "plain", out=tmp_path / "packed", format="bitmask")
    for dtype in ("float32", "bfloat16"):
        model = prunekit.load(tmp_path / "packed", dtype=dtype, device="cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_a_tensor_that_is_missing_is_no_random_weight(llama_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(prunekit.InputError, match=r"lacks 1 tensors .*model\.norm\.weight"):
        prunekit.load(llama_folder)


def test_what_does_not_fit_is_refused(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.machine.available_memory_bytes", lambda: 1000)
    with pytest.raises(prunekit.InputError, match=r"0\.00 GB are free"):
        prunekit.load(llama_folder, dtype="float32", device="cpu")


# 2:4


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were handed to torch, which would convert them on a GPU."""
    found: list[tuple[int, ...]] = []

    def convert(weight: torch.Tensor) -> torch.Tensor:
        found.append(tuple(weight.shape))
        return weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    return found


def test_every_2_4_linear_is_converted(converted: list[tuple[int, ...]]) -> None:
    model = tiny.two_four(tiny.make_model("llama"))
    before = logits(model)
    assert compress_linears(model) == len(converted) == 21
    assert converted[:3] == [(32, 32), (16, 32), (16, 32)]
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].self_attn.parameters())


def test_linears_that_are_not_2_4_stay_dense_with_a_warning(converted: list[tuple[int, ...]]) -> None:
    model = tiny.two_four(tiny.make_model("llama"), skip="down_proj")
    with pytest.warns(PrunekitWarning, match="3 of 21 linears are not 2:4 and stay dense"):
        assert compress_linears(model) == len(converted) == 18


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_2_4_is_refused(family: str, converted: list[tuple[int, ...]]) -> None:
    model = tiny.make_model(family)
    with pytest.raises(prunekit.InputError, match=r"no linear of this model has them: prune it with --pattern 2:4"):
        compress_linears(model)
    assert converted == []


def test_what_torch_cannot_convert_is_refused() -> None:
    # torch itself, without a GPU: device and shape are its to judge
    with pytest.raises(prunekit.InputError, match=r"torch cannot convert 'model\.layers\.0\.self_attn\.q_proj'"):
        compress_linears(tiny.two_four(tiny.make_model("llama")))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("2:4", "is for the sparse tensor cores of NVIDIA GPUs, and the device is cpu"),
        ("4:8", r"runtime '4:8' is unknown: .*Known: 2:4, dense, sparse"),
    ],
)
def test_a_device_or_a_pattern_without_kernels_is_refused(asked: str, message: str, llama_folder: Path) -> None:
    with pytest.raises(prunekit.InputError, match=message):
        prunekit.load(llama_folder, device="cpu", runtime=asked)


def test_load_hands_a_cuda_model_to_the_converter(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "prunekit.loading.resolve_place", lambda device, asked: seen.append(asked) or torch.device("cpu")
    )
    monkeypatch.setattr("prunekit.loading.compress_linears", seen.append)
    model = prunekit.load(llama_folder, device="cpu", runtime="2:4")
    assert seen == ["2:4", model]
