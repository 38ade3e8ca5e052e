"""Attention modules and perceptrons that go as a whole: masked, cut and reloaded models are the same, wherever they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from helpers import near
from prunekit import InputError
from prunekit.blockwalk import Seconds
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.distributed import Ranks
from prunekit.model.anatomy import read_anatomy
from prunekit.model.resizing import REMOVED, SHAPES
from prunekit.model.source import StreamedModel
from prunekit.model.stream import Walk, Windows
from prunekit.shrink.influence import Influence
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


def test_transformers_alone_refuses_such_a_folder(tmp_path: Path, llama_folder: Path) -> None:
    # it must not make up what is missing
    source, structures = opened(llama_folder)
    (tmp_path / "out").mkdir()
    form = write_shrunk(source, structures, without(structures, (1, ATTENTION)), tmp_path / "out")
    assert set(form.config[SHAPES][REMOVED]) == {"model.layers.1.self_attn", "model.layers.1.input_layernorm"}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="has blocks without attention or perceptron, which no width makes stock"):
        prunekit.export(tmp_path / "out", out=tmp_path / "padded", pad=True)
    pytest.importorskip("gguf")
    with pytest.raises(
        InputError, match="has blocks without attention or perceptron, which a GGUF file has no place for"
    ):
        prunekit.export(tmp_path / "out", out=tmp_path / "model.gguf", format="gguf")


# What is measured


def cosine(before: Tensor, after: Tensor) -> float:
    return 1 - float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_sublayer_scores_how_far_it_turns_the_stream(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "base", family)
    source, structures = opened(tmp_path / "base")
    walk = Walk(source, Windows(IDS), 1)
    walk.prepare()
    found = Influence(walk, Ranks(), Seconds(), lambda: None).turned_by_sublayers(structures)
    # the stream of a plain transformers model, read where its own code reads it
    seen: dict[str, Tensor] = {}
    added = {
        "llama": ("self_attn", "mlp"),
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gpt_neox": ("attention", "mlp"),
    }[family]
    for block in read_anatomy(model).blocks:
        module = model.get_submodule(block.name)
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=block.name: seen.update(
                {name: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for part in added:
            module.get_submodule(part).register_forward_hook(
                lambda module, args, output, name=f"{block.name}.{part}": seen.update(
                    {name: output[0] if isinstance(output, tuple) else output}
                )
            )
    with torch.no_grad():
        model(IDS)
    for block, own in zip(read_anatomy(model).blocks, structures, strict=True):
        x = seen[block.name]
        attention, mlp = (seen[f"{block.name}.{part}"] for part in added)
        between = x if family == "gpt_neox" else x + attention
        expected = [cosine(x, x + attention), cosine(between, between + mlp)]
        assert [found[block.index, each.name] for each in own] == pytest.approx(expected, rel=1e-4, abs=1e-6)


# From end to end


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(300), encoding="utf-8")
    return path


def drop(folder: Path, out: Path, text: Path, ratio: float = 0.3, **more: Any) -> prunekit.Result:
    calibration = {"source": str(text), "samples": 4, "length": 32}
    method = more.pop("method", "drop")
    return prunekit.prune(folder, out=out, method=method, ratio=ratio, calibration=calibration, dtype="float32", **more)


@pytest.mark.parametrize(("what", "ratio"), [("both", 0.5), ("attention", 0.2), ("mlp", 0.2)])
def test_the_least_important_go_until_the_ratio_is_met(what: str, ratio: float, tmp_path: Path, text: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=4)
    with torch.no_grad():  # what adds nothing goes first
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    parts = {"depth": {"what": what}}
    result = drop(tmp_path / "model", tmp_path / "out", text, ratio, parts=parts)
    assert result.verification is not None
    assert result.ratio == pytest.approx(ratio, abs=0.1)
    anatomy, structures = sublayers_of(model)
    plan = Plan.read(tmp_path / "out" / PLAN_NAME, structures)
    gone = [each for block in structures for each in block if not len(plan.kept(each))]
    assert all(what in ("both", each.kind) for each in gone)
    first = {"attention": (1, ATTENTION), "mlp": (2, MLP)}
    assert {(each.block, each.kind) for each in gone} >= {
        place for kind, place in first.items() if what in ("both", kind)
    }
    smaller = prunekit.load(tmp_path / "out", dtype="float32", device="cpu")
    with masked(model, anatomy, structures, plan):
        expected, written = outputs(model)
    logits, generated = outputs(smaller)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(generated, written)
    assert smaller.num_parameters() == result.parameters - result.removed
    assert prunekit.inspect(tmp_path / "out").sound
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "in whole sublayers" in page
    assert "removed, as a whole" in page


def test_a_model_without_some_sublayers_is_shrunk_and_zeroed_again(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    drop(tmp_path / "model", tmp_path / "first", text, 0.3)
    drop(tmp_path / "first", tmp_path / "second", text, 0.3)
    drop(tmp_path / "second", tmp_path / "third", text, 0.2, method="wanda-sp", parts={"budget": {"shape": "free"}})
    calibration = {"source": str(text), "samples": 2, "length": 32}
    prunekit.prune(tmp_path / "third", out=tmp_path / "zeroed", sparsity=0.5, calibration=calibration)
    assert prunekit.inspect(tmp_path / "zeroed").sound
    prunekit.export(tmp_path / "zeroed", out=tmp_path / "packed", format="bitmask")
    ours = prunekit.load(tmp_path / "packed", dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "zeroed", dtype=torch.float32, trust_remote_code=True)
    assert torch.equal(outputs(ours)[0], outputs(theirs.eval())[0])
    removed = json.loads((tmp_path / "zeroed" / "config.json").read_text())[SHAPES][REMOVED]
    assert any(name.endswith(("self_attn", "mlp")) for name in removed)


@pytest.mark.parametrize(
    ("ratio", "more", "message"),
    [
        (0.05, {}, "less than half of a sublayer of"),
        (0.99, {}, "while one of 6 sublayers stays: ask for at most"),
        (0.9, {"parts": {"depth": {"what": "mlp"}}}, "while one of 3 sublayers stays"),
        (0.3, {"method": "drop+bias"}, "'drop.bias' removes whole sublayers: leave it out"),
        (0.3, {"parts": {"budget": {"align": 8}}}, "'drop' removes whole sublayers: leave it out"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    ratio: float, more: dict[str, Any], message: str, tmp_path: Path, llama_folder: Path, text: Path
) -> None:
    with pytest.raises(InputError, match=message):
        drop(llama_folder, tmp_path / "out", text, ratio, **more)
    assert not (tmp_path / "out").exists()


def test_a_stream_that_is_normalised_itself_is_refused() -> None:
    model = tiny.make_model("opt", do_layer_norm_before=False)
    with pytest.raises(
        InputError, match="OPTForCausalLM cannot lose single sublayers: block 0 does something to its stream"
    ):
        sublayers_of(model)


def test_plans_with_nothing_left_of_a_block_say_so(llama_folder: Path) -> None:
    _, structures = opened(llama_folder)
    content = without(structures, (0, ATTENTION), (0, MLP), (1, MLP)).to_json(structures)
    with pytest.raises(InputError, match="block 0 would be left empty: write null in its place"):
        Plan.from_json(content, structures)
    content["blocks"][0] = None
    plan = Plan.from_json(content, structures)
    assert plan.kept_blocks == [1, 2]
    assert plan.leaves_out(structures[1][1])
