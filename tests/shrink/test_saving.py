"""A shrunk folder computes what masking computes, wherever it is loaded; where it cannot, it is not loaded at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import prunekit
import tiny
from helpers import near
from prunekit.model.anatomy import read_anatomy
from prunekit.model.resizing import SHAPES, resized
from prunekit.model.source import StreamedModel
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan, Structures
from prunekit.shrink.saving import FormChooser, choose_form
from prunekit.shrink.units import ATTENTION, MLP, find_structures
from prunekit.shrink.writing import write_shrunk

IDS = torch.arange(40).reshape(2, 20) * 5 % 250

# what fewer heads of these cannot be told their classes, which divide the hidden size by the heads
FREE_HEADS = {"gpt2", "gpt_neox", "opt", "stablelm"}


pytestmark = pytest.mark.usefixtures("own_module_cache")


def opened(folder: Path) -> tuple[StreamedModel, list[Any]]:
    source = StreamedModel.open(folder, dtype="float32", device="cpu")
    return source, find_structures(source.module, source.anatomy)


def some_plan(
    structures: Structures, *, free: bool = False, kinds: tuple[str, ...] = (ATTENTION, MLP), drop: tuple[int, ...] = ()
) -> Plan:
    """Keeps random units of those that can go, about 60 %; in `free` plans fewer in later blocks."""
    draw = torch.Generator().manual_seed(1)
    blocks: list[dict[str, tuple[int, ...]] | None] = []
    for index, block in enumerate(structures):
        kept = {}
        for each in block:
            if each.resizes == "never" or each.kind not in kinds:
                continue
            count = max(1, int(each.count * (0.6 - 0.15 * index * (free and each.resizes == "alone"))))
            kept[each.name] = tuple(sorted(torch.randperm(each.count, generator=draw)[:count].tolist()))
        blocks.append(None if index in drop else kept)
    return Plan(tuple(blocks))


def shrunk(folder: Path, out: Path, **options: Any) -> tuple[Any, Plan]:
    source, structures = opened(folder)
    plan = some_plan(structures, **options)
    out.mkdir()
    return write_shrunk(source, structures, plan, out), plan


@torch.no_grad()
def outputs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what is generated with a cache."""
    return model(IDS).logits, model.generate(IDS[:1], max_new_tokens=8, do_sample=False)


@torch.no_grad()
def masked_outputs(model: PreTrainedModel, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    anatomy = read_anatomy(model)
    with masked(model, anatomy, find_structures(model, anatomy), plan):
        return outputs(model)


def load_anywhere(folder: Path, *, trusted: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=trusted).eval()


@pytest.mark.parametrize(("free", "drop"), [(False, (1,)), (True, ())], ids=["uniform-block-dropped", "free"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_shrunk_folder_computes_what_masking_does(
    family: str, free: bool, drop: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny.save_model(tmp_path / "base", family, dtype=torch.float64)
    form, plan = shrunk(tmp_path / "base", tmp_path / "out", free=free, drop=drop)
    assert form.stock == (not free and family not in {*FREE_HEADS, "bloom"})
    loaded = load_anywhere(tmp_path / "out", trusted=not form.stock)
    logits, generated = outputs(loaded)
    expected, written = masked_outputs(model, plan)
    torch.testing.assert_close(logits, expected, **near(family))
    assert torch.equal(generated, written)
    assert type(loaded).__name__ == type(model).__name__
    assert (
        loaded.num_parameters() == StreamedModel.open(tmp_path / "out", dtype="float32", device="cpu").parameter_count
    )
    ours = prunekit.load(tmp_path / "out", dtype="float32", device="cpu")
    assert torch.equal(outputs(ours)[0], outputs(loaded.float())[0])


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"bloom"}))
def test_fewer_channels_in_every_block_are_a_stock_config(family: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", family)
    source, structures = opened(tmp_path / "base")
    form = choose_form(source, structures, some_plan(structures, kinds=(MLP,)))
    assert form.stock
    assert not form.files
    assert (
        len(form.config.keys() - source.reader.config.keys()) <= 1
    )  # n_inner, ffn_hidden_size, where there was a default


def three_heads(structures: Structures) -> Plan:
    return Plan(tuple({block[0].name: (0, 2, 3)} for block in structures))


@pytest.mark.parametrize("old", [False, True])
def test_heads_that_a_config_refuses_are_computed_by_its_twin(old: bool, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    model = tiny.save_model(
        tmp_path / "base", "llama", num_key_value_heads=4, rms_norm_eps=0.01, rope_parameters=rope, dtype=torch.float64
    )
    if old:  # as releases before transformers 5 wrote it
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["rope_theta"] = config["rope_parameters"].pop("rope_theta")
        config["rope_scaling"] = config.pop("rope_parameters")
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    source, structures = opened(tmp_path / "base")
    plan = three_heads(structures)
    (tmp_path / "out").mkdir()
    form = write_shrunk(source, structures, plan, tmp_path / "out")
    assert (form.stock, form.kind, form.config["model_type"]) == (True, "MistralForCausalLM", "mistral")
    assert (form.config["sliding_window"], form.config["dtype"]) == (None, "float64")
    assert ("rope_theta" in form.config, "rope_parameters" in form.config) == (old, not old)
    logits, generated = outputs(load_anywhere(tmp_path / "out", trusted=False))
    expected, written = masked_outputs(model, plan)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(generated, written)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"model_type": "gemma2"}], ids=str)
def test_without_a_twin_the_reason_is_said(changes: dict[str, Any], tmp_path: Path) -> None:
    family = changes.pop("model_type", "llama")
    model = tiny.save_model(tmp_path / "base", family, num_key_value_heads=4, **changes)
    source, structures = opened(tmp_path / "base")
    form = choose_form(source, structures, three_heads(structures))
    assert (form.stock, form.kind) == (False, type(model).__name__)
    assert form.reason is not None
    assert form.reason.startswith(f"{form.kind} has no config for these widths (")
    assert "is not a multiple of the number of attention heads (3)" in form.reason


def test_a_plan_that_removes_nothing_changes_no_config(llama_folder: Path) -> None:
    source, structures = opened(llama_folder)
    form = choose_form(source, structures, Plan.whole(structures))
    assert (form.stock, form.config) == (True, source.reader.config)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            {"max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("gemma3_text", {}, {"layer_types": ["sliding_attention", "sliding_attention"]}),
        ("gpt2", {}, {"n_layer": 2}),
    ],
)
def test_what_a_config_says_of_every_block_follows(
    family: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "base", family, **changes)
    source, structures = opened(tmp_path / "base")
    form = choose_form(source, structures, some_plan(structures, kinds=(), drop=(1,)))
    assert {name: form.config[name] for name in expected} == expected
    assert form.renamed == {0: 0, 2: 1}


# Free folders


@pytest.fixture
def free_folder(tmp_path: Path, llama_folder: Path) -> Path:
    shrunk(llama_folder, tmp_path / "free", free=True)
    return tmp_path / "free"


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom"])
def test_transformers_alone_refuses_a_free_folder(family: str, tmp_path: Path) -> None:
    # it must not take what fits and make up the rest
    tiny.save_model(tmp_path / "base", family)
    shrunk(tmp_path / "base", tmp_path / "free", free=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "free")


def test_the_code_in_a_free_folder_needs_no_prunekit(free_folder: Path) -> None:
    code = (free_folder / "modeling_prunekit.py").read_text()
    imports = [line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert {name.split(".")[0] for name in imports} == {
        "__future__",
        "collections",
        "functools",
        "typing",
        "torch",
        "transformers",
    }
    assert len(code.splitlines()) < 180


def test_a_free_model_that_transformers_saves_again_is_the_same(free_folder: Path, tmp_path: Path) -> None:
    model = load_anywhere(free_folder, trusted=True)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load_anywhere(tmp_path / "again", trusted=True))[0], outputs(model)[0])


def test_a_free_folder_can_be_pruned_evaluated_and_packed(free_folder: Path, tmp_path: Path, text_file: Path) -> None:
    setup: dict[str, Any] = {"calibration": {"source": str(text_file), "samples": 2, "length": 32}, "dtype": "float32"}
    prunekit.prune(free_folder, out=tmp_path / "sparse", method="wanda", **setup)
    prunekit.export(tmp_path / "sparse", out=tmp_path / "packed", format="bitmask")
    found = [
        prunekit.evaluate(folder, text=str(text_file), length=32, samples=3, dtype="float32").perplexity
        for folder in (tmp_path / "sparse", tmp_path / "packed")
    ]
    assert found[0] == found[1]
    ours = prunekit.load(tmp_path / "packed", dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32, trust_remote_code=True)
    assert torch.equal(outputs(ours)[0], outputs(theirs.eval())[0])
    assert prunekit.inspect(tmp_path / "sparse").sound


def test_a_free_folder_can_be_shrunk_again(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "base", "opt", dtype=torch.float64)
    source, structures = opened(tmp_path / "base")
    first = Plan(
        tuple(
            {each.name: tuple(range(each.count - 1 - index % 2)) for each in block}
            for index, block in enumerate(structures)
        )
    )
    (tmp_path / "once").mkdir()
    write_shrunk(source, structures, first, tmp_path / "once")
    source, structures = opened(tmp_path / "once")
    second = Plan((*({each.name: (0, 1) for each in block} for block in structures[:2]), None))
    (tmp_path / "twice").mkdir()
    form = write_shrunk(source, structures, second, tmp_path / "twice")
    assert form.config[SHAPES]["attributes"] == {
        f"model.decoder.layers.{index}.self_attn.num_heads": 2 for index in range(2)
    }
    expected, _ = masked_outputs(model, second)
    torch.testing.assert_close(outputs(load_anywhere(tmp_path / "twice", trusted=True))[0], expected)


def test_a_free_folder_whose_blocks_become_alike_is_stock_again(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "base", "llama", num_key_value_heads=4, dtype=torch.float64)
    source, structures = opened(tmp_path / "base")
    first = Plan(
        tuple(
            {each.name: tuple(range(each.count - index % 2)) for each in block}
            for index, block in enumerate(structures)
        )
    )
    (tmp_path / "once").mkdir()
    assert not write_shrunk(source, structures, first, tmp_path / "once").stock
    source, structures = opened(tmp_path / "once")
    second = Plan(tuple({each.name: (0, 2) for each in block} for block in structures))
    (tmp_path / "twice").mkdir()
    form = write_shrunk(source, structures, second, tmp_path / "twice")
    assert form.stock
    assert not (tmp_path / "twice" / "modeling_prunekit.py").exists()
    assert not form.config.keys() & {SHAPES, "auto_map"}
    assert (form.config["num_attention_heads"], form.config["intermediate_size"]) == (2, 2)
    expected, _ = masked_outputs(model, second)
    torch.testing.assert_close(outputs(load_anywhere(tmp_path / "twice", trusted=False))[0], expected)


def test_a_damaged_note_of_shapes_is_refused(free_folder: Path) -> None:
    config = json.loads((free_folder / "config.json").read_text())
    config[SHAPES]["tensors"]["model.layers.0.mlp.up_proj.weight"] = [1, 32]
    (free_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(prunekit.InputError, match="config and weights do not belong together"):
        prunekit.load(free_folder)
    config[SHAPES] = {"tensors": {"model.layers.9.weight": [1]}}
    (free_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(prunekit.InputError, match="does not describe a causal language model"):
        prunekit.load(free_folder)


def test_what_replaces_a_free_folder_leaves_none_of_its_code(free_folder: Path, llama_folder: Path) -> None:
    prunekit.export(llama_folder, out=free_folder, overwrite=True)
    assert not (free_folder / "modeling_prunekit.py").exists()


def test_gguf_has_no_place_for_different_widths(free_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(prunekit.InputError, match=r"blocks of different widths.*--pad --out PADDED"):
        prunekit.export(free_folder, out=tmp_path / "model.gguf", format="gguf")
    assert not (tmp_path / "model.gguf").exists()


# Biases that compensation adds


@pytest.mark.parametrize(("family", "stock"), [("llama", True), ("mistral", False), ("falcon", True), ("phi3", False)])
def test_biases_have_a_place(family: str, stock: bool, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", family, dtype=torch.float64)
    source, structures = opened(tmp_path / "base")
    plan = some_plan(structures, drop=(0,))
    draw = torch.Generator().manual_seed(2)
    consumers = [each.consumer for block in structures[1:] for each in block]
    biases = {linear.full_name: torch.randn(linear.out_features, generator=draw).double() for linear in consumers}
    (tmp_path / "out").mkdir()
    form = write_shrunk(source, structures, plan, tmp_path / "out", biases=biases)
    assert form.stock == stock
    loaded = load_anywhere(tmp_path / "out", trusted=not stock)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    for name, bias in biases.items():
        model.get_submodule(name).bias = torch.nn.Parameter(bias)
    expected, _ = masked_outputs(model, plan)
    torch.testing.assert_close(outputs(loaded)[0], expected)
    for other, tensor in loaded.named_parameters():  # the biases nobody asked for
        if other.endswith("_proj.bias") and not other.endswith(("o_proj.bias", "down_proj.bias")):
            assert not tensor.any()


def test_biases_that_transformers_would_not_notice_are_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", "mistral")
    source, structures = opened(tmp_path / "base")
    with pytest.raises(prunekit.InputError, match="MistralForCausalLM has no biases where compensation adds them"):
        choose_form(source, structures, Plan.whole(structures), biased={"model.layers.0.mlp.down_proj"})


# What cannot be saved is refused


def test_heads_whose_number_means_something_stay(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", "bloom")
    source, structures = opened(tmp_path / "base")
    plan = Plan(tuple({block[0].name: (0, 1)} for block in structures))
    with pytest.raises(
        prunekit.InputError,
        match=r"'self_attention\.dense' of block 0: Bloom.* 4 attention units, which can only stay whole",
    ):
        choose_form(source, structures, plan)


def test_heads_that_a_class_counts_once_go_from_all_blocks_alike(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", "phi3")
    source, structures = opened(tmp_path / "base")
    plan = Plan(({structures[0][0].name: (0,)}, {}, {}))
    with pytest.raises(
        prunekit.InputError, match=r"every block must keep as many units, not 1 to 2: use --shape uniform"
    ):
        choose_form(source, structures, plan)


class Own(LlamaForCausalLM):
    """Stands for a class that a folder brings."""


def chooser_of(model: PreTrainedModel, config: dict[str, Any], **options: Any) -> FormChooser:
    anatomy = read_anatomy(model)
    structures = find_structures(model, anatomy)
    key_of = {name: name for name, _ in model.named_parameters()}
    return FormChooser(model, anatomy, config, key_of, structures, some_plan(structures, **options))


def test_code_that_a_folder_brings_is_saved_only_as_it_is() -> None:
    config = tiny.make_config("llama")
    form = chooser_of(Own(config), config.to_dict()).stock()
    assert form is not None
    assert form.config["intermediate_size"] == 28
    chooser = chooser_of(Own(config), config.to_dict(), free=True)
    assert chooser.stock() is None
    with pytest.raises(
        prunekit.InputError, match="Own is code that the folder brings, and its blocks have different widths"
    ):
        chooser.free()


def test_a_part_of_a_larger_model_is_said_in_its_part_of_the_config() -> None:
    model = tiny.make_model("gemma3_text")
    config = {"model_type": "gemma3", "text_config": model.config.to_dict(), "vision_config": {}}
    form = chooser_of(model, config).stock()
    assert form is not None
    assert form.config["text_config"]["intermediate_size"] == 28
    assert "intermediate_size" not in form.config
    chooser = chooser_of(model, config, free=True)
    assert chooser.stock() is None
    with pytest.raises(prunekit.InputError, match="is a part of a larger model"):
        chooser.free()


def test_blocks_that_compute_by_their_place_stay(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", "gpt2", scale_attn_by_inverse_layer_idx=True)
    source, structures = opened(tmp_path / "base")
    with pytest.raises(prunekit.InputError, match=r"GPT2LMHeadModel: .*keep all blocks"):
        choose_form(source, structures, some_plan(structures, drop=(0,)))


# Padding


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_padded_folder_is_stock_and_computes_the_same(family: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", family, dtype=torch.float64)
    shrunk(tmp_path / "base", tmp_path / "free", free=True, drop=(1,))
    found = prunekit.export(tmp_path / "free", out=tmp_path / "padded", pad=True)
    assert (found.format, found.packed) == ("padded", 0)
    names = {path.name for path in (tmp_path / "padded").iterdir()}
    assert names == {path.name for path in (tmp_path / "free").iterdir()} - {"modeling_prunekit.py"}
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert not config.keys() & {SHAPES, "auto_map"}
    expected, written = outputs(load_anywhere(tmp_path / "free", trusted=True))
    logits, generated = outputs(load_anywhere(tmp_path / "padded", trusted=False))
    torch.testing.assert_close(logits, expected, **near(family))
    assert torch.equal(generated, written)
    with pytest.raises(prunekit.InputError, match="no blocks of different widths"):
        prunekit.export(tmp_path / "padded", out=tmp_path / "again", pad=True)


def test_padding_is_to_the_widest_block(free_folder: Path, tmp_path: Path) -> None:
    prunekit.export(free_folder, out=tmp_path / "padded", pad=True)
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (28, 1)


def test_added_biases_are_padded_where_the_class_has_them(tmp_path: Path) -> None:
    for family, message in (("llama", None), ("qwen2", r"'model\.layers\.0\.mlp\.down_proj\.bias'.* has no place")):
        tiny.save_model(tmp_path / family, family, dtype=torch.float64)
        source, structures = opened(tmp_path / family)
        free = tmp_path / f"{family}-free"
        free.mkdir()
        biases = {"model.layers.0.mlp.down_proj": torch.ones(32, dtype=torch.float64)}
        write_shrunk(source, structures, some_plan(structures, free=True), free, biases=biases)
        out = tmp_path / f"{family}-padded"
        if message is None:
            prunekit.export(free, out=out, pad=True)
            expected = outputs(load_anywhere(free, trusted=True))[0]
            torch.testing.assert_close(outputs(load_anywhere(out, trusted=False))[0], expected)
        else:
            with pytest.raises(prunekit.InputError, match=message):
                prunekit.export(free, out=out, pad=True)
            assert not out.exists()


def test_pad_writes_plain_folders_only(free_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(prunekit.InputError, match="--pad writes a plain folder: leave out --format bitmask"):
        prunekit.export(free_folder, out=tmp_path / "out", format="bitmask", pad=True)


# Known figures


@pytest.mark.parametrize(
    ("shape", "groups", "channels", "parameters"),
    [
        ({"intermediate_size": 11008, "vocab_size": 32000}, 24, 8256, 5_422_977_024),
        (
            {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0},
            6,
            10752,
            6_612_586_496,
        ),
    ],
    ids=["llama-7b", "llama-3-8b"],
)
def test_papers_count_as_many_parameters(shape: dict[str, Any], groups: int, channels: int, parameters: int) -> None:
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    anatomy = read_anatomy(model)
    structures = find_structures(model, anatomy)
    kept = {ATTENTION: tuple(range(groups)), MLP: tuple(range(channels))}
    plan = Plan(
        tuple(
            {each.name: kept[each.kind] for each in block} if 4 <= index < 30 else {}
            for index, block in enumerate(structures)
        )
    )
    key_of = {name: name for name, _ in model.named_parameters()}
    chooser = FormChooser(model, anatomy, config.to_dict(), key_of, structures, plan)
    assert chooser.stock() is None
    with torch.device("meta"):
        small = resized(LlamaForCausalLM)(LlamaConfig.from_dict(chooser.free().config))
    assert sum(parameter.numel() for parameter in small.parameters()) == parameters
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert whole - plan.removed(structures, [0] * 32) == parameters
