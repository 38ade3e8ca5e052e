"""End to end in memory: the zeros `prune_` leaves are those of a slow float64 pruner that knows nothing of prunekit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

import prunekit
import tiny
from helpers import draw_ids
from prunekit.errors import InputError
from prunekit.model.anatomy import in_module
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Walk, Windows
from prunekit.progress import Silent
from prunekit.recipe import Pattern, Recipe
from prunekit.sparsify.walk import Sparsification

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "mistral": "model.layers",
    "phi3": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
}
IDS = draw_ids(4, 16, seed=3)


def padding(count: int = 4, length: int = 16, side: str = "right") -> Tensor:
    keep = torch.ones(count, length, dtype=torch.bool)
    keep[1, 9:] = False
    keep[-1, 12:] = False
    return keep if side == "right" else keep.flip(1)


class Oracle:
    """Wanda on the whole model in float64: hooks, loops, sorting. `errors` is ‖X(W̃−W)‖/‖XW‖ over the last window."""

    def __init__(self, model: PreTrainedModel, family: str, ids: Tensor, keep: Tensor | None = None) -> None:
        # transformers' own Bloom overflows to NaN in float64 where a window begins with padding; there float32 must do.
        self.model = copy.deepcopy(model).to(torch.float32 if family == "bloom" else torch.float64).eval()
        self.blocks = self.model.get_submodule(BLOCKS[family])
        self.prefix = BLOCKS[family]
        self.ids = ids
        self.keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        self.mask = None if keep is None else keep.long()
        self.errors: dict[str, float] = {}

    def names(self, blocks: Iterable[int]) -> list[str]:
        heads = tuple(f"{self.prefix}.{index}." for index in blocks)
        found = [n for n, p in self.model.named_parameters() if n.startswith(heads) and p.ndim == 2]
        return [name.removesuffix(".weight") for name in found]

    def matrix(self, name: str) -> Tensor:
        module = self.model.get_submodule(name)
        weight = module.weight.detach()
        return weight if isinstance(module, nn.Linear) else weight.t()  # a Conv1D stores it the other way round

    def inputs(self, names: list[str]) -> dict[str, Tensor]:
        """What each linear is fed while the whole model runs over all windows: [windows, length, in]."""
        seen: dict[str, Tensor] = {}
        handles = []
        for name in names:
            hook = lambda _, args, name=name: seen.update({name: args[0].clone()})  # noqa: E731
            handles.append(self.model.get_submodule(name).register_forward_pre_hook(hook))
        with torch.no_grad():
            self.model(self.ids, attention_mask=self.mask, use_cache=False)
        for handle in handles:
            handle.remove()
        return {name: value.reshape(*self.ids.shape, -1) for name, value in seen.items()}

    def prune(self, spare: dict[str, str | float | None], default: str | float, *, dense: bool = False) -> Oracle:
        count = len(self.blocks)
        for step in [range(count)] if dense else [range(index, index + 1) for index in range(count)]:
            names = self.names(step)
            inputs = self.inputs(names)
            for name in names:
                pattern = spare.get(name, default)
                if pattern is not None:
                    self._prune_linear(name, inputs[name], pattern)
        return self

    def _prune_linear(self, name: str, inputs: Tensor, pattern: str | float) -> None:
        width = inputs.shape[-1]
        squares = [0.0] * width
        for window, real in zip(inputs.tolist(), self.keep.tolist(), strict=True):
            for token, counts in zip(window, real, strict=True):
                if counts:
                    for j in range(width):
                        squares[j] += token[j] ** 2
        matrix = self.matrix(name)
        before = matrix.clone()
        for i, row in enumerate(matrix.tolist()):
            scores = [abs(w) * math.sqrt(s) for w, s in zip(row, squares, strict=True)]
            for j in dropped(scores, pattern):
                matrix[i, j] = 0
        tokens = inputs[-1][self.keep[-1]]
        lost, whole = tokens @ (before - matrix).t(), tokens @ before.t()
        self.errors[name] = float(lost.norm() / whole.norm())

    def zeros(self) -> dict[str, Tensor]:
        return {name: self.matrix(name) == 0 for name in self.names(range(len(self.blocks)))}


def dropped(scores: list[float], pattern: str | float) -> list[int]:
    """Indices that go from one row, by rank, the lower index first."""
    if isinstance(pattern, str):
        keep, group = map(int, pattern.split(":"))
        return [
            start + j
            for start in range(0, len(scores), group)
            for j in lowest(scores[start : start + group], group - keep)
        ]
    return lowest(scores, int(Fraction(str(pattern)) * len(scores)))


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count]


def zeros_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight.detach()
        found[name] = (weight if isinstance(module, nn.Linear) else weight.t()) == 0
    return found


def assert_same_zeros(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = zeros_of(model, expected)
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, f"other zeros in {wrong}"


@pytest.mark.parametrize("family", BLOCKS)
def test_sequential_wanda(family: str) -> None:
    model = tiny.make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    oracle = Oracle(model, family, IDS).prune({}, 0.5)
    result = prunekit.prune_(model, IDS, sparsity=0.5)
    assert_same_zeros(model, oracle.zeros())

    linears = {f"{name}.weight" for name in oracle.zeros()}
    for name, tensor in model.state_dict().items():
        if name in linears:
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0]), f"{name}: kept weights are untouched"
        else:
            assert torch.equal(tensor, before[name]), f"{name} is never pruned"

    zeros = {name: int(mask.sum()) for name, mask in oracle.zeros().items()}
    assert [linear.name for linear in result.linears] == list(zeros)
    assert {linear.name: linear.zeros for linear in result.linears} == zeros
    assert {linear.name: linear.shape for linear in result.linears} == {
        n: tuple(m.shape) for n, m in oracle.zeros().items()
    }
    assert result.zeros == sum(zeros.values())
    assert result.weights == sum(mask.numel() for mask in oracle.zeros().values())
    assert result.sparsity == 0.5
    assert (result.blocks, result.windows, result.tokens) == (3, 4, 64)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_dense_wanda_measures_the_dense_model_throughout(family: str) -> None:
    model = tiny.make_model(family)
    sequential = Oracle(model, family, IDS).prune({}, 0.5)
    dense = Oracle(model, family, IDS).prune({}, 0.5, dense=True)
    prunekit.prune_(model, IDS, sparsity=0.5, calibration={"mode": "dense", "batch": 3})
    assert_same_zeros(model, dense.zeros())
    assert any(not torch.equal(a, b) for a, b in zip(sequential.zeros().values(), dense.zeros().values(), strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:4"])
def test_groups(pattern: str) -> None:
    model = tiny.make_model("qwen2")
    oracle = Oracle(model, "qwen2", IDS).prune({}, pattern)
    result = prunekit.prune_(model, IDS, pattern=pattern)
    assert_same_zeros(model, oracle.zeros())
    assert {linear.pattern for linear in result.linears} == {pattern}
    assert result.sparsity == float(Pattern.parse(pattern).fraction)


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_the_batch_does_not_change_the_masks(batch: int) -> None:
    model = tiny.make_model("llama")
    oracle = Oracle(model, "llama", draw_ids(5, 16, seed=3)).prune({}, 0.6)
    prunekit.prune_(model, draw_ids(5, 16, seed=3), sparsity=0.6, calibration={"batch": batch})
    assert_same_zeros(model, oracle.zeros())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text", "mistral", "opt"])
def test_padding_is_not_measured(family: str, side: str) -> None:
    model = tiny.make_model(family)
    keep = padding(side=side)
    oracle = Oracle(model, family, IDS, keep).prune({}, 0.5)
    careless = Oracle(model, family, IDS).prune({}, 0.5)
    result = prunekit.prune_(model, Windows(IDS, keep), sparsity=0.5)
    assert_same_zeros(model, oracle.zeros())
    assert result.tokens == int(keep.sum())
    assert any(not torch.equal(a, b) for a, b in zip(oracle.zeros().values(), careless.zeros().values(), strict=True))


def test_overrides_and_ignores() -> None:
    model = tiny.make_model("llama")
    before = copy.deepcopy(model.state_dict())
    named: dict[str, str | float | None] = {}
    for index in range(3):
        block = f"model.layers.{index}"
        named |= {f"{block}.mlp.down_proj": 0.25, f"{block}.self_attn.o_proj": None, f"{block}.self_attn.q_proj": "1:4"}
    named |= dict.fromkeys(Oracle(model, "llama", IDS).names([1]))
    oracle = Oracle(model, "llama", IDS).prune(named, 0.5)
    budget = {
        "overrides": {"*.down_proj": 0.25, "self_attn.q_proj": "1:4"},
        "ignore": ["*.o_proj", "model.layers.1"],
    }
    result = prunekit.prune_(model, IDS, sparsity=0.5, parts={"budget": budget})
    assert_same_zeros(model, oracle.zeros())
    for linear in result.linears:
        pattern = named.get(linear.name, 0.5)
        assert linear.pattern == (None if pattern is None else str(pattern))
        if pattern is None:
            assert (linear.zeros, linear.output_error) == (0, None)
            assert torch.equal(model.state_dict()[f"{linear.name}.weight"], before[f"{linear.name}.weight"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_magnitude_goes_by_layer(family: str) -> None:
    model = tiny.make_model(family)
    names = Oracle(model, family, IDS).names(range(3))
    expected = {}
    for name in names:
        matrix = Oracle(model, family, IDS).matrix(name)
        flat = [abs(value) for row in matrix.tolist() for value in row]
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[lowest(flat, int(len(flat) * Fraction(3, 10)))] = True
        expected[name] = mask.reshape(matrix.shape)
    result = prunekit.prune_(model, IDS, method="magnitude", sparsity=0.3)
    assert_same_zeros(model, expected)
    assert result.windows == 1, "no data is looked at, but for the output errors"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "bloom", "opt"])
@pytest.mark.parametrize("padded", [False, True])
def test_output_error_is_the_relative_change_of_the_products(family: str, padded: bool) -> None:
    model = tiny.make_model(family)
    keep = padding() if padded else None
    oracle = Oracle(model, family, IDS, keep).prune({}, 0.5)
    result = prunekit.prune_(model, Windows(IDS, keep), sparsity=0.5, calibration={"batch": 3})
    for linear in result.linears:
        assert linear.output_error == pytest.approx(oracle.errors[linear.name], rel=1e-4), linear.name
        assert linear.output_error > 0.01


def test_output_error_of_nothing_removed_and_of_nothing_to_lose_is_zero() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    result = prunekit.prune_(model, IDS, sparsity=0)
    assert {linear.output_error for linear in result.linears} == {0.0}
    result = prunekit.prune_(model, IDS, sparsity=0.5)
    errors = {linear.name: linear.output_error for linear in result.linears}
    assert errors["model.layers.1.mlp.down_proj"] == 0.0
    assert errors["model.layers.2.mlp.down_proj"] > 0


def test_pruning_again_with_the_same_target_changes_nothing_by_magnitude() -> None:
    model = tiny.make_model("llama")
    prunekit.prune_(model, IDS, method="magnitude", sparsity=0.4)
    before = copy.deepcopy(model.state_dict())
    prunekit.prune_(model, IDS, method="magnitude", sparsity=0.4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dense", [False, True])
def test_check_is_what_the_pruned_model_computes(dense: bool) -> None:
    # `check` is what a reload is compared with, so it must be the last batch's hidden states behind all pruned blocks.
    model = tiny.make_model("llama")
    source = ResidentModel(model)
    walk = Walk(source, Windows(draw_ids(5, 16, seed=3)), 2)
    recipe = Recipe(model="", method="wanda", sparsity=0.5)
    sparsify = Sparsification.of(recipe, source.anatomy).work(walk, dense=dense)
    sparsify.start()
    for block in source.anatomy.blocks:
        module = source.load_block(block.index)
        sparsify.prune_block(block, module, in_module(module))
        sparsify.pass_on(block.index, module)
    assert sparsify.check is not None
    with torch.no_grad():
        expected = model(draw_ids(5, 16, seed=3)[4:]).logits
    torch.testing.assert_close(
        walk.logits(sparsify.check[:][0], draw_ids(5, 16, seed=3)[4]), expected[0], rtol=1e-4, atol=1e-4
    )


def pruned_by(tokens: Any, **options: Any) -> tuple[dict[str, Tensor], prunekit.Result]:
    model = tiny.make_model("llama")
    result = prunekit.prune_(model, tokens, sparsity=0.5, **options)
    return model.state_dict(), result


def test_every_form_of_tokens_means_the_same() -> None:
    ids, keep = IDS, padding()
    plain, _ = pruned_by(ids)
    full = torch.ones_like(ids)
    for tokens in (
        ids.int(),
        Windows(ids),
        {"input_ids": ids},
        {"input_ids": ids.tolist()},
        BatchEncoding({"input_ids": ids, "attention_mask": full}),
        Windows(ids, full.bool()),
    ):
        found, result = pruned_by(tokens)
        assert result.tokens == 64
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    padded, _ = pruned_by(Windows(ids, keep))
    assert any(not torch.equal(padded[name], plain[name]) for name in plain)
    for tokens in (
        BatchEncoding({"input_ids": ids, "attention_mask": keep.long()}),
        {"input_ids": ids.tolist(), "attention_mask": keep.int().tolist()},
    ):
        found, result = pruned_by(tokens)
        assert result.tokens == int(keep.sum())
        assert all(torch.equal(found[name], padded[name]) for name in plain)


def test_a_tokenizer_draws_windows_from_the_calibration_text(text_file: Path) -> None:
    calibration = {"source": str(text_file), "samples": 3, "length": 20, "sampling": "first"}
    found, result = pruned_by(tiny.make_tokenizer(), calibration=calibration)
    assert (result.windows, result.tokens) == (3, 60)
    ids = torch.tensor(tiny.make_tokenizer()(text_file.read_text())["input_ids"][:60]).reshape(3, 20)
    expected, _ = pruned_by(ids)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    drawn = {**calibration, "sampling": "random"}
    first, second, other = (pruned_by(tiny.make_tokenizer(), calibration=drawn, seed=seed)[0] for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.rand(2, 8), r"whole numbers \[windows, length\], not torch\.float32 \[2, 8\]"),
        (torch.ones(2, 8, dtype=torch.bool), r"whole numbers .* torch\.bool"),
        (torch.arange(8), r"not torch\.int64 \[8\]"),
        (torch.zeros(1, 2, 8).long(), r"not torch\.int64 \[1, 2, 8\]"),
        (torch.zeros(0, 8).long(), r"not torch\.int64 \[0, 8\]"),
        (None, "cannot be NoneType: give a tokenizer, token ids or a batch"),
        ([[1, 2], [3, 4]], "cannot be list"),
        ({"ids": torch.zeros(2, 8).long()}, "calibration tokens cannot be dict"),
        ({"input_ids": torch.zeros(2, 8).long(), "attention_mask": torch.zeros(2, 7)}, "shape of the token ids"),
        ({"input_ids": torch.zeros(2, 8).long(), "attention_mask": torch.eye(2, 8)[:1]}, "shape of the token ids"),
        ({"input_ids": [[1, 2], [3]]}, "tables of whole numbers"),
        (torch.full((2, 8), tiny.VOCABULARY), f"token {tiny.VOCABULARY} is not one of the {tiny.VOCABULARY}"),
        (torch.full((2, 8), -1), "token -1 is not one of"),
        (torch.zeros(1, 129).long(), "length 129 is more than the 128 positions"),
        (Windows(torch.zeros(2, 8).long(), torch.tensor([[True] * 8, [False] * 8])), "leave a token in every window"),
    ],
)
def test_tokens_that_make_no_sense_are_refused_before_anything_changes(tokens: Any, message: str) -> None:
    model = tiny.make_model("llama").train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prunekit.prune_(model, tokens)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_restored_whatever_happens(training: bool) -> None:
    # Dropout would make the walk random: with it on, masks would not be the oracle's.
    model = tiny.make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train(training)
    oracle = Oracle(model, "gpt2", IDS).prune({}, 0.5)
    prunekit.prune_(model, IDS, sparsity=0.5)
    assert_same_zeros(model, oracle.zeros())
    assert {module.training for module in model.modules()} == {training}

    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(math.nan)
    with pytest.raises(InputError, match="block 1"):
        prunekit.prune_(model, IDS, sparsity=0.5)
    assert {module.training for module in model.modules()} == {training}


def test_training_mode_of_parts_is_restored() -> None:
    model = tiny.make_model("llama").train()
    model.model.layers[0].eval()
    prunekit.prune_(model, IDS)
    assert model.training
    assert not model.model.layers[0].training


def test_a_mask_of_whole_numbers_is_a_mask() -> None:
    # an integer tensor would index rows instead of choosing them
    mask = torch.ones(IDS.shape, dtype=torch.long)
    mask[:, -3:] = 0
    models = [tiny.make_model("llama") for _ in range(2)]
    for model, keep in zip(models, (mask, mask.bool()), strict=True):
        prunekit.prune_(model, Windows(IDS, keep))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_blocks_that_flatten_their_tokens_may_be_wider_than_the_error_sample() -> None:
    result = prunekit.prune_(
        tiny.make_model("opt", hidden_size=288, ffn_dim=300, word_embed_proj_dim=288), IDS, sparsity=0.5
    )
    assert all(linear.output_error is not None and 0 < linear.output_error < 1 for linear in result.linears)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_keep_their_identity_and_gradients_and_can_be_trained(family: str) -> None:
    model = tiny.make_model(family)
    parameters = dict(model.named_parameters())
    frozen = set(list(parameters)[::3])
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    prunekit.prune_(model, IDS, sparsity=0.5)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == (name not in frozen)
        assert not parameter.is_inference()
        before = gradients[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Nothing that inference mode made may be left in the model: training would fail on it.
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_keep_exactly_the_asked_number(dtype: torch.dtype) -> None:
    model = tiny.make_model("llama", dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    result = prunekit.prune_(model, IDS, sparsity=0.5)
    assert result.sparsity == 0.5
    for linear in result.linears:
        weight = model.state_dict()[f"{linear.name}.weight"]
        assert weight.dtype == dtype
        assert ((weight == 0).sum(1) == linear.shape[1] // 2).all()
        assert torch.equal(weight[weight != 0], before[f"{linear.name}.weight"][weight != 0])
        assert linear.output_error is not None
        assert 0 < linear.output_error < 1


def test_a_tied_head_stays_tied_and_untouched() -> None:
    model = tiny.make_model("llama", tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    prunekit.prune_(model, IDS, sparsity=0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


def test_progress_is_told_of_every_block() -> None:
    told: list[str] = []

    class Listening(Silent):
        def start(self, *args: Any, **kwargs: Any) -> None:
            told.append("start")

        def step(self, *args: Any, **kwargs: Any) -> None:
            told.append("step")

        def stop(self, *args: Any, **kwargs: Any) -> None:
            told.append("stop")

    prunekit.prune_(tiny.make_model("llama"), IDS, progress=Listening())
    assert told == ["start", "step", "step", "step", "stop"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"outside \[0, 1\)"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "both given"),
        ({"pattern": "5:4"}, "is not K:G"),
        ({"pattern": "1:5"}, "groups of 5 do not divide the 32 inputs of 'model.layers.0.self_attn.q_proj'"),
        ({"method": "wonda"}, "did you mean 'wanda'"),
        ({"parts": {"budget": {"ignore": "*.nothing"}}}, "matches no linear"),
        ({"calibration": {"mode": "both"}}, "calibration.mode cannot be"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny.make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prunekit.prune_(model, IDS, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
