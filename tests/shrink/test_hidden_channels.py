"""Channels left out of the residual stream: the folder is the dense model cut by hand, whatever else goes from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import prunekit
import tiny
from helpers import shards, stop_at, streamed
from prunekit import InputError
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, load_tokenizer
from prunekit.checkpoint.writer import HIDDEN_PREFIX, PLAN_NAME, Journal, Writer
from prunekit.model.anatomy import read_anatomy
from prunekit.model.stream import Walk, Windows
from prunekit.recipe import Recipe
from prunekit.shrink.job import Shrinking
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


def test_channels_are_aligned_and_units_chosen_in_the_dense_model(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base")
    aligned = cut(tmp_path / "base", tmp_path / "aligned", text, widths={"hidden": 21, "align": 8})
    assert aligned.channels == (32, 24)
    cut(tmp_path / "base", tmp_path / "both", text, widths={"hidden": 24, "mlp": 30})
    dense = {"calibration": {"source": str(text), "samples": WINDOWS, "length": LENGTH, "mode": "dense"}}
    cut(tmp_path / "base", tmp_path / "units", text, widths={"mlp": 30}, **dense)
    both, units = plan_in(tmp_path / "both"), plan_in(tmp_path / "units")
    kept = [
        [{name: each["kept"] for name, each in block.items()} for block in plan["blocks"]] for plan in (both, units)
    ]
    assert kept[0] == kept[1]
    with pytest.raises(
        InputError,
        match=r"leaves channels of the residual stream out, which is not carried out from a file: say --method",
    ):
        prunekit.prune(tmp_path / "base", out=tmp_path / "again", plan=tmp_path / "both" / "prune_plan.json")
    assert (both["format"], units["format"]) == (2, 1)
    assert both["hidden"] == plan_in(tmp_path / "aligned")["hidden"]
    cut(tmp_path / "base", tmp_path / "dense", text, widths={"hidden": 24, "mlp": 30}, **dense)
    assert plan_in(tmp_path / "dense") == both


def test_all_channels_are_a_stream_that_stays_whole(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base")
    result = cut(tmp_path / "base", tmp_path / "out", text, widths={"hidden": 32, "mlp": 30})
    assert result.channels is None
    assert loaded(tmp_path / "out").config.hidden_size == 32
    assert "hidden" not in plan_in(tmp_path / "out")


def test_what_was_foretold_and_is_told(tmp_path: Path, text: Path) -> None:
    model = tiny.save_model(tmp_path / "base")
    widths = {"budget": {"name": "widths", "hidden": 24, "mlp": 30, "attention": 1}}
    calibration = {"source": str(text), "samples": WINDOWS, "length": LENGTH}
    asked = {"model": str(tmp_path / "base"), "method": "minitron", "parts": widths, "calibration": calibration}
    made = prunekit.plan(Recipe.build(asked))
    result = cut(tmp_path / "base", tmp_path / "out", text, widths=widths["budget"])
    assert made.removed == result.removed
    assert made.ratio == pytest.approx(result.ratio)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    kept = 4 * (result.parameters - result.removed)
    assert kept <= written < made.disk["weights"] < 4 * result.parameters
    assert result.summary()["channels"] == {"before": 32, "after": 24}
    own = dict(loaded(tmp_path / "out").named_parameters())
    for linear in result.linears:
        weight = own[f"{linear.name}.weight"]
        assert linear.shape == tuple(weight.shape)
        assert linear.removed == model.get_parameter(f"{linear.name}.weight").numel() - weight.numel()
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    assert manifest["run"]["dropped_blocks"] == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| channels of the residual stream | 24 of 32 |" in card
    assert "output head have the same channels of the residual stream left; what is kept is bit-identical" in card
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Given widths, every block as wide as the next; 24 of 32 channels of the residual stream stay" in page


def test_a_narrower_folder_is_a_folder_like_any_other(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", shard="40KB")
    cut(tmp_path / "base", tmp_path / "out", text, widths={"hidden": 18})
    calibration = {"source": str(text), "samples": 4, "length": 32}
    assert loaded(tmp_path / "out").config.model_type == "mistral", "18 channels are no multiple of 4 heads"
    again = cut(tmp_path / "out", tmp_path / "again", text, widths={"hidden": 12, "attention": 1})
    assert again.channels == (18, 12)
    assert loaded(tmp_path / "again").config.head_dim == 8
    kept = [plan_in(tmp_path / name)["hidden"]["kept"] for name in ("out", "again")]
    embedding = loaded(tmp_path / "base").get_input_embeddings().weight
    wanted = embedding[:, kept[0]][:, kept[1]]
    assert torch.equal(loaded(tmp_path / "again").get_input_embeddings().weight, wanted)
    shrunk = prunekit.prune(tmp_path / "out", out=tmp_path / "sp", method="wanda-sp", calibration=calibration)
    sparse = prunekit.prune(tmp_path / "out", out=tmp_path / "zeros", method="wanda", calibration=calibration)
    assert shrunk.verification is not None
    assert sparse.sparsity == pytest.approx(0.5, abs=0.01)
    prunekit.export(tmp_path / "zeros", out=tmp_path / "packed")
    packed = cut(tmp_path / "packed", tmp_path / "unpacked", text, widths={"hidden": 12})
    plain = cut(tmp_path / "zeros", tmp_path / "plain", text, widths={"hidden": 12})
    assert packed.channels == plain.channels == (18, 12)
    assert shards(tmp_path / "unpacked") == shards(tmp_path / "plain")


def test_a_folder_written_from_its_plan_alone_holds_the_same(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", tie_word_embeddings=True)
    cut(tmp_path / "base", tmp_path / "out", text, widths={"hidden": 18, "mlp": 30, "attention": 1})
    source = streamed(tmp_path / "base")
    structures = find_structures(source.module, source.anatomy)
    plan = Plan.read(tmp_path / "out" / PLAN_NAME, structures)
    assert plan.hidden is not None
    assert plan.to_json(structures) == plan_in(tmp_path / "out")
    (tmp_path / "again").mkdir()
    form = write_shrunk(source, structures, plan, tmp_path / "again")
    assert form.stock
    assert shards(tmp_path / "again") == shards(tmp_path / "out")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "whole").mkdir()
    write_shrunk(source, structures, Plan(plan.blocks, Channels(32, tuple(range(32)))), tmp_path / "whole")
    assert loaded(tmp_path / "whole").config.hidden_size == 32
    with pytest.raises(InputError, match="for a residual stream of 40 channels, this one has 32"):
        write_shrunk(source, structures, Plan(plan.blocks, Channels(40, plan.hidden.kept)), tmp_path / "again")


def test_parameters_of_a_large_model_are_counted_exactly(tmp_path: Path) -> None:
    # LLaMA 7B in the shapes of Minitron 4B: no byte of its weights is there to be read
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    narrow = AutoConfig.for_model("llama", hidden_size=3072, intermediate_size=9216, head_dim=128, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        wanted = AutoModelForCausalLM.from_config(narrow, dtype=torch.bfloat16)
    config.save_pretrained(tmp_path)
    table, end = {}, 0
    for name, tensor in model.state_dict().items():
        table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    header = json.dumps(table).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    source = streamed(tmp_path, torch.bfloat16)
    widths = {"budget": {"name": "widths", "hidden": 3072, "mlp": 9216}}
    job = Shrinking.of(Recipe.build({"model": str(tmp_path), "method": "minitron", "parts": widths}), source)
    found = job.work(Walk(source, Windows(torch.zeros(1, 8, dtype=torch.int64))), dense=False).rehearse()
    assert found.removed + found.outside == model.num_parameters() - wanted.num_parameters()
    before, after = (sum(each.numel() for each in one.model.layers.parameters()) for one in (model, wanted))
    assert found.removed == before - after
    assert job.form is not None
    assert job.form.config["hidden_size"] == 3072
    assert job.narrowing is not None
    mlp_alone = 32 * 3 * 3072 * (11008 - 9216)
    assert job.narrowing.removed == found.removed + found.outside - mlp_alone


# Resuming


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a model and the output of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.save_model(folder / "base", tie_word_embeddings=True)
    cut(folder / "base", folder / "out", text, widths={"hidden": 18, "mlp": 30})
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "call", "lost"),
    [
        (Writer, "write_shard", 0, False),
        (Writer, "write_shard", 2, True),
        (Writer, "write_index", 0, True),
        (Journal, "note_hidden", 1, False),
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(
    owner: Any, name: str, call: int, lost: bool, whole: Path, text: Path, tmp_path: Path
) -> None:
    widths = {"hidden": 18, "mlp": 30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            cut(whole / "base", tmp_path / "out", text, widths=widths)
    if lost:
        for path in (tmp_path / "out").glob(f"{HIDDEN_PREFIX}*"):
            path.unlink()
    result = cut(whole / "base", tmp_path / "out", text, widths=widths, resume=True)
    assert shards(tmp_path / "out") == shards(whole / "out")
    assert plan_in(tmp_path / "out") == plan_in(whole / "out")
    assert result.removed == result.parameters - loaded(tmp_path / "out").num_parameters()
    done = cut(whole / "base", tmp_path / "out", text, widths=widths, resume=True)
    assert done.channels == (32, 18)


def test_in_files_and_streamed_it_is_the_same(whole: Path, text: Path, tmp_path: Path) -> None:
    result = cut(whole / "base", tmp_path / "out", text, widths={"hidden": 18, "mlp": 30}, memory_budget=1)
    assert result.verification is not None
    assert result.verification.through == "streamed"
    assert shards(tmp_path / "out") == shards(whole / "out")


# What is refused


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "'inv_norm_factor' of 'transformer.h.0.self_attention' would change"),
        ("falcon", "'beta' of 'transformer.h.0.self_attention' would change"),
        ("gemma2", "'scalar_embed_scale' of 'model.embed_tokens' would change from 5.6"),
        ("gemma3_text", "'scalar_embed_scale' of 'model.embed_tokens' would change from 5.6"),
        ("gpt2", "'scaling' of 'transformer.h.0.attn' would change"),
        ("gpt_neox", "'rotary_ndims' of 'gpt_neox.layers.0.attention' would change"),
        ("opt", "'scaling' of 'model.decoder.layers.0.self_attn' would change"),
        ("stablelm", "'rotary_ndims' of 'model.layers.0.self_attn' would change"),
    ],
)
def test_other_families_are_refused_in_a_sentence(family: str, why: str, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", family)
    with pytest.raises(InputError, match=f"cannot have 24 channels with everything else as it is: {why}"):
        cut(tmp_path / "base", tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_there_is_a_reason_for_every_family() -> None:
    cases = test_other_families_are_refused_in_a_sentence.pytestmark[0].args[1]
    assert {family for family, _ in cases} | set(NARROWED) == set(tiny.FAMILIES)


def louder(module: Any, value: Tensor) -> Tensor:
    return module.down_proj(module.up_proj(value)) * value.shape[-1] ** 0.5


def rolled(module: Any, value: Tensor) -> Tensor:
    return module.down_proj(module.up_proj(value)).roll(1, -1)


def strict(module: Any, value: Tensor) -> Tensor:
    if value.shape[-1] == 48:
        raise ValueError("no such width")
    return module.down_proj(module.up_proj(value))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (louder, "what it computes depends on how many there are in other places than its norms"),
        (rolled, "what it computes depends on how many there are in other places than its norms"),
        (strict, "cannot be tried: no such width"),
        (None, None),
    ],
)
def test_that_nothing_else_depends_on_the_channels_is_tried(
    forward: Any, why: str | None, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = streamed(llama_folder)
    if forward is not None:
        monkeypatch.setattr(LlamaMLP, "forward", forward)
    if why is None:
        assert Narrowing.of(source, 24).channels == 32
    else:
        with pytest.raises(InputError, match=why):
            Narrowing.of(source, 24)


def test_what_config_or_code_say_more_of_is_refused(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base")
    prunekit.prune(
        tmp_path / "base",
        out=tmp_path / "free",
        method="wanda-sp",
        ratio=0.2,
        parts={"budget": {"name": "global-cost", "shape": "free"}},
        calibration={"source": str(text), "samples": 4, "length": 32},
    )
    with pytest.raises(InputError, match="shapes that its config notes beside the class's own"):
        cut(tmp_path / "free", tmp_path / "out", text)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"widths": {"hidden": 0}}, "'budget.hidden' cannot be 0: the residual stream has 32 channels"),
        ({"widths": {"hidden": 33}}, "'budget.hidden' cannot be 33: the residual stream has 32 channels"),
        ({"widths": {"hidden": 24, "align": 40}}, "'budget.align' cannot be 40: the residual stream has only 32"),
        ({"widths": {"hidden": 2.5}}, "'budget.hidden' cannot be 2.5: it takes a whole number"),
        ({"widths": {"hidden": 24, "mlp": 49}}, "'budget.mlp' cannot be 49"),
        ({"widths": {}}, "say --set budget.mlp=N, --set budget.attention=N, --set budget.hidden=N"),
        ({"method": "wanda-sp"}, "the score of 'wanda-sp' does not rank channels of the residual stream"),
        ({"method": "llm-pruner"}, "the score of 'llm-pruner' does not rank channels of the residual stream"),
        ({"method": "minitron+least-squares"}, "compensate 'least-squares' aims at what the whole model computes"),
        ({"method": "minitron+blockwise"}, "tune 'blockwise' aims at what the whole model computes"),
        ({"ratio": 0.2}, "both say how much goes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: dict[str, Any], why: str, llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        cut(llama_folder, tmp_path / "out", text, **more)
    assert not (tmp_path / "out").exists()


def test_a_plan_for_the_stream_is_checked_and_not_masked() -> None:
    model = tiny.make_model("llama")
    anatomy = read_anatomy(model)
    structures = find_structures(model, anatomy)
    content = replace(Plan.whole(structures), hidden=Channels(32, (1, 4, 9))).to_json(structures)
    plan = Plan.from_json(content, structures)
    assert plan.hidden == Channels(32, (1, 4, 9))
    with pytest.raises(InputError, match="zeros are not the same as none"), masked(model, anatomy, structures, plan):
        pass
    for entry, why in (
        (None, "how many channels there are"),
        ({"channels": 32, "kept": []}, "at least one that is kept"),
        ({"channels": 32, "kept": [1, 32]}, "ascending numbers below 32"),
        ({"channels": 32, "kept": [4, 1]}, "ascending numbers below 32"),
    ):
        with pytest.raises(InputError, match=why):
            Plan.from_json({**content, "hidden": entry}, structures)
    for wrong in ({**content, "format": 1}, {"format": 2, "blocks": content["blocks"]}):
        with pytest.raises(InputError, match="this is no plan of prunekit"):
            Plan.from_json(wrong, structures)
    older = Plan.whole(structures).to_json(structures)
    assert older["format"] == 1
    assert Plan.from_json(older, structures).hidden is None
