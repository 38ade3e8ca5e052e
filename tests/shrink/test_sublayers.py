"""Attention modules and perceptrons that go as a whole: masked, cut and reloaded models are the same, wherever they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit import InputError
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.model.anatomy import read_anatomy
from prunekit.model.resizing import REMOVED, SHAPES
from prunekit.model.source import StreamedModel
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan, Structures
from prunekit.shrink.sublayers import find_sublayers
from prunekit.shrink.units import ATTENTION, MLP, find_structures
from prunekit.shrink.writing import write_shrunk

IDS = torch.arange(40).reshape(2, 20) * 5 % 250

pytestmark = pytest.mark.usefixtures("own_module_cache")


def sublayers_of(model: PreTrainedModel) -> tuple[Any, Structures]:
    anatomy = read_anatomy(model)
    return anatomy, find_sublayers(model, anatomy, find_structures(model, anatomy))


def opened(folder: Path) -> tuple[StreamedModel, Structures]:
    source = StreamedModel.open(folder, dtype="float32", device="cpu")
    return source, find_sublayers(source.module, source.anatomy, find_structures(source.module, source.anatomy))


def without(structures: Structures, *gone: tuple[int, str] | int) -> Plan:
    """The plan that leaves out some sublayers, by block and kind, and some blocks."""
    return Plan(
        tuple(
            None if index in gone else {each.name: () for each in block if (index, each.kind) in gone}
            for index, block in enumerate(structures)
        )
    )


@torch.no_grad()
def outputs(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits, and what is generated with a cache."""
    return model(IDS).logits, model.generate(IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=-1)


def near(family: str) -> dict[str, float]:
    # Gemma's norms are float32 whatever the model is
    return {"rtol": 1e-4, "atol": 1e-5} if family.startswith("gemma") else {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(
    "gone",
    [
        ((0, ATTENTION), (1, MLP)),
        ((0, MLP), (1, ATTENTION), (2, ATTENTION)),
        ((0, ATTENTION), 1, (2, MLP)),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_without_sublayers_computes_what_masking_does(family: str, gone: Any, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "base", family, dtype=torch.float64)
    source, structures = opened(tmp_path / "base")
    plan = without(structures, *gone)
    (tmp_path / "out").mkdir()
    form = write_shrunk(source, structures, plan, tmp_path / "out")
    assert form.reason == "some of its blocks have no attention or no perceptron"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64, trust_remote_code=True).eval()
    anatomy, found = sublayers_of(model)
    with masked(model, anatomy, found, plan):
        expected, written = outputs(model)
    logits, generated = outputs(loaded)
    torch.testing.assert_close(logits, expected, **near(family))
    assert torch.equal(generated, written)
    parameters = [sum(part.numel() for part in model.get_submodule(each.name).parameters()) for each in anatomy.blocks]
    assert loaded.num_parameters() == model.num_parameters() - plan.removed(structures, parameters)
    ours = prunekit.load(tmp_path / "out", dtype="float32", device="cpu")
    assert torch.equal(outputs(ours)[0], outputs(loaded.float())[0])
