"""`prune_` with methods that remove structures: the model in memory becomes what `prune` writes of the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit import InputError
from prunekit.model.resizing import SHAPES
from prunekit.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore:.*the folder brings code that loads it.*")
CALIBRATION = {"samples": 4, "length": 24}
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(400), encoding="utf-8")
    return {"source": str(path), **CALIBRATION}


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model in memory has the bits and the logits of the one in a folder, which is returned."""
    other = prunekit.load(folder, dtype="float32")
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)
    assert len(model.config.to_dict().get("layer_types") or [0]) in (1, model.config.num_hidden_layers)
    return other


def assert_generates(model: PreTrainedModel) -> None:
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(IDS[:1], use_cache=True, **told)
    assert torch.equal(with_cache, model.generate(IDS[:1], use_cache=False, **told))
    with torch.no_grad():
        cache = model(IDS[:, :13], use_cache=True).past_key_values
        behind = model(IDS[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(behind, logits(model)[:, 13:], rtol=1e-3, atol=1e-4)


def assert_sizes_are_said(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_it_is_what_the_folder_holds(family: str, tmp_path: Path, calibration: dict[str, Any]) -> None:
    tiny.save_model(tmp_path / "model", family)
    asked: dict[str, Any] = {"method": "wanda-sp", "ratio": 0.4, "calibration": calibration}
    there = prunekit.prune(tmp_path / "model", out=tmp_path / "out", dtype="float32", **asked)
    model = loaded(tmp_path / "model")
    modules = {name: id(module) for name, module in model.named_modules()}
    result = prunekit.prune_(model, tiny.make_tokenizer(), **asked)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    other = assert_same_model(model, tmp_path / "out")
    assert (result.removed, result.block_removed) == (there.removed, there.block_removed)
    assert result.parameters - result.removed == sum(parameter.numel() for parameter in model.parameters())
    assert result.removed > 0
    assert type(model).__name__ == type(other).__name__
    assert_sizes_are_said(model)
    assert_generates(model)
    model.save_pretrained(tmp_path / "saved")
    if not hasattr(model.config, SHAPES):
        torch.testing.assert_close(logits(loaded(tmp_path / "saved")), logits(model), rtol=0, atol=0)
    again = prunekit.load(tmp_path / "saved", dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


FREE = {"budget": {"shape": "free", "align": 1, "skip_first": 0, "skip_last": 0}}


@pytest.mark.parametrize(
    ("family", "method", "parts"),
    [
        ("gemma3_text", "shortgpt", {}),
        ("gpt2", "shortgpt", {}),
        ("llama", "drop", {}),
        ("opt", "drop", {}),
        ("llama", "flap", FREE),
        ("qwen2", "flap", {}),
        ("gemma2", "wanda-sp+least-squares", FREE),
        ("gpt2", "wanda-sp+least-squares", {}),
        ("llama", "llm-pruner", FREE),
        ("stablelm", "nirvana", {}),
        ("mistral", "wanda-sp+blockwise", {"tune": {"epochs": 2}}),
    ],
)
def test_every_kind_of_method(
    family: str, method: str, parts: dict[str, Any], tmp_path: Path, calibration: dict[str, Any]
) -> None:
    tiny.save_model(tmp_path / "model", family)
    asked: dict[str, Any] = {"method": method, "ratio": 0.35, "parts": parts, "calibration": calibration}
    prunekit.prune(tmp_path / "model", out=tmp_path / "out", dtype="float32", **asked)
    model = loaded(tmp_path / "model")
    result = prunekit.prune_(model, tiny.make_tokenizer(), **asked)
    assert_same_model(model, tmp_path / "out")
    assert_generates(model)
    assert result.removed > 0
    # it can be trained, shrunk again and saved
    model(IDS, labels=IDS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None and parameter.numel()] == []
    again_asked = {"method": "magnitude-sp", "ratio": 0.2, "parts": FREE if hasattr(model.config, SHAPES) else {}}
    prunekit.prune_(model, tiny.make_tokenizer(), calibration=calibration, **again_asked)
    assert_generates(model)
    model.save_pretrained(tmp_path / "saved")
    again = prunekit.load(tmp_path / "saved", dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def snapshot(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, model.config.to_dict(), [repr(type(module)) for module in model.modules()]


def assert_untouched(model: PreTrainedModel, before: tuple[dict[str, Tensor], dict[str, Any], list[str]]) -> None:
    values, config, modules = snapshot(model)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[name], before[0][name]) for name in values)
    assert (config, modules) == before[1:]


class _EndsAt(Silent):
    """Stops a run behind one of its blocks, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, note: str = "") -> None:
        self.steps -= 1
        if not self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_interrupted_run_leaves_the_model_as_it_was(steps: int) -> None:
    model = tiny.make_model("llama").train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune_(model, IDS, method="wanda-sp+least-squares", ratio=0.3, progress=_EndsAt(steps))
    assert_untouched(model, before)
    assert all(module.training for module in model.modules())


def test_a_refused_run_leaves_the_model_as_it_was() -> None:
    model = tiny.make_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = torch.inf
    before = snapshot(model)
    with pytest.raises(
        InputError, match=r"'model\.layers\.2\.mlp\.down_proj\.weight' \(block 2\) holds 1 NaN or infinite"
    ):
        prunekit.prune_(model, IDS, method="wanda-sp", ratio=0.3)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("slicegpt", "gives the residual stream another basis"),
        ("search-llm", "judges its candidates on texts of its own"),
    ],
)
def test_what_needs_a_folder_is_refused(method: str, reason: str) -> None:
    model = tiny.make_model("llama")
    with pytest.raises(
        InputError, match=f"'{method}' {reason}, which needs a folder: save the model, and give prunekit"
    ):
        prunekit.prune_(model, IDS, method=method, ratio=0.2)


def test_another_width_of_the_stream_needs_a_folder() -> None:
    model = tiny.make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"budget\.hidden=16 cuts embedding and head, too, which needs a folder"):
        prunekit.prune_(model, IDS, method="minitron", parts={"budget": {"name": "widths", "hidden": 16}})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.make_config("llama"))
    with pytest.raises(InputError, match="of the model in memory has no values"):
        prunekit.prune_(model, IDS, method="magnitude-sp", ratio=0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_not_pruned_stays_what_it_is(tied: bool) -> None:
    model = tiny.make_model("llama", num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager")
    model.train().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    config, head, norm = model.config, model.lm_head.weight, model.model.layers[1].input_layernorm.weight
    said = config.to_dict()
    prunekit.prune_(model, IDS, method="flap", ratio=0.3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight is head
    assert model.model.layers[1].input_layernorm.weight is norm
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features  # groups of query heads go together
    assert config.to_dict() == said  # of another model it may be the config, too
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    assert model.config._attn_implementation == "eager"
    assert all(module.training for module in model.modules())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trained} == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in sorted(trained)], lr=0.1)
    first = model(IDS, labels=IDS).loss
    first.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first


def test_a_folder_of_different_widths_is_shrunk_again(tmp_path: Path, calibration: dict[str, Any]) -> None:
    tiny.save_model(tmp_path / "model")
    asked: dict[str, Any] = {"parts": FREE, "calibration": calibration, "ratio": 0.2}
    prunekit.prune(tmp_path / "model", out=tmp_path / "once", method="flap", dtype="float32", **asked)
    prunekit.prune(tmp_path / "once", out=tmp_path / "twice", method="wanda-sp", dtype="float32", **asked)
    model = prunekit.load(tmp_path / "once", dtype="float32")
    prunekit.prune_(model, tiny.make_tokenizer(), method="wanda-sp", **asked)
    assert_same_model(model, tmp_path / "twice")


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "wanda-sp", "ratio": 0.3},
        {"method": "obs+blockwise", "ratio": 0.3},
        {"method": "wanda-sp+blockwise", "ratio": 0.3, "parts": {"tune": {"target": "dense"}}},
        {"method": "wanda+blockwise", "sparsity": 0.5},
    ],
    ids=lambda asked: asked["method"],
)
def test_masked_tokens_count_for_nothing(asked: dict[str, Any]) -> None:
    padded = torch.cat([torch.full((2, 4), 7), IDS], dim=1)
    keep = torch.ones_like(padded)
    keep[:, :4] = 0
    found = []
    for filler in (7, 9):
        model = tiny.make_model("llama")
        padded[:, :4] = filler
        prunekit.prune_(model, {"input_ids": padded, "attention_mask": keep}, **asked)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("padded", "choices", "message"),
    [
        (False, 2, "choices=2 shares out the windows, .*: 2 are too few"),
        (True, 2, "choices=2 .* cannot do with padded ones"),
    ],
)
def test_calibrations_that_cannot_be_chosen_among_are_refused(padded: bool, choices: int, message: str) -> None:
    model = tiny.make_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    ids = IDS.repeat(2, 1) if padded else IDS
    keep = torch.ones_like(ids)
    keep[:, 8:] = not padded
    with pytest.raises(InputError, match=message):
        prunekit.prune_(
            model,
            {"input_ids": ids, "attention_mask": keep},
            method="nirvana",
            ratio=0.2,
            calibration={"choices": choices},
            parts={"budget": {"align": 1}},
        )
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
