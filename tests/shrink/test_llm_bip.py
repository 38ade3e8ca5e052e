"""LLM-BIP's options for a gate and a norm: what is found in blocks, the formulas as loops in float64, and what they bound."""

from __future__ import annotations

import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from test_shrink_walk import shrink, tiny_windows
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import prunekit
import tiny
from prunekit import InputError
from prunekit.errors import PrunekitError
from prunekit.model.source import ResidentModel
from prunekit.parts import find_part
from prunekit.shrink import job
from prunekit.shrink.perceptron import GATE, NORM, find_perceptrons, steepest
from prunekit.shrink.shrinker import Shrinker
from prunekit.shrink.units import find_structures
from prunekit.shrink.view import BlockView
from prunekit.statistics import Collector, Statistics
from test_cli import call

GATED = ["gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "stablelm"]
UNGATED = sorted(set(tiny.FAMILIES) - set(GATED))
NORMED = sorted(set(GATED) - {"olmo2", "stablelm"})  # no norm in front of the perceptron; a LayerNorm
SILU, GELU = 1.09984, 1.12899
BOTH = ["--set", "score.gated=true", "--set", "score.norm=true"]


class Setting:
    """The first block of a tiny model in float64 and what is seen of it on a few tokens, some of them padding."""

    def __init__(self, family: str, wanted: set[str], **changes: Any) -> None:
        self.model = tiny.make_model(family, dtype=torch.float64, **changes)
        source = ResidentModel(self.model)
        structures = find_structures(self.model, source.anatomy)
        self.attention, self.mlp = structures[0][0], structures[0][-1]  # OLMo 2 has the second alone
        found = find_perceptrons(self.model, source.anatomy, structures, wanted)[0]
        assert found is not None
        self.perceptron = found
        self.module = source.load_block(0)
        ids = torch.randint(0, 250, (4, 10), generator=torch.Generator().manual_seed(1))
        keep = torch.ones(4, 10, dtype=torch.bool)
        keep[1, 6:] = False
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [child.register_forward_hook(self._see(name)) for name, child in self.module.named_modules()]
        consumers = {each.name: self.module.get_submodule(each.name) for each in structures[0]}
        collector = Collector(consumers, ["input_abs"], watched=found.watched(self.module))
        with torch.no_grad(), collector:
            for part in (slice(0, 3), slice(3, 4)):
                collector.keep, collector.windows = keep[part], part.stop - part.start
                self.model(ids[part])
                collector.end_batch()
        for handle in handles:
            handle.remove()
        self.tokens = int(keep.sum())
        self.seen = {name: (given[keep], gave[keep]) for name, (given, gave) in self.seen.items()}
        weights = {each.name: each.matrix(self.weight(each.name)) for each in source.anatomy.blocks[0].linears}
        gains = None if found.norm is None else found.norm.gains(self.module)
        self.view = BlockView(weights, collector.statistics(), {}, structures[0], found, gains)

    def _see(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(output, Tensor) and inputs[0].ndim == output.ndim == 3:
                before = self.seen.get(name, (inputs[0][:0], output[:0]))
                self.seen[name] = torch.cat([before[0], inputs[0]]), torch.cat([before[1], output])

        return hook

    def weight(self, name: str) -> Tensor:
        return self.module.get_parameter(f"{name}.weight").detach()


def score(view: BlockView, structure: Any, **options: bool) -> Tensor:
    part = find_part("unit-score", "llm-bip")
    scores = part.function(view, structure, **part.bind(options))
    assert isinstance(scores, Tensor)
    return scores


@pytest.mark.parametrize("options", [{"gated": True}, {"norm": True}, {"gated": True, "norm": True}])
@pytest.mark.parametrize("family", ["gemma2", "llama", "phi3"])
def test_options_are_their_formulas(family: str, options: dict[str, bool]) -> None:
    setting = Setting(family, {{"gated": GATE, "norm": NORM}[name] for name in options})
    fused, gemma = family == "phi3", family == "gemma2"
    if fused:
        gate, up = setting.weight("mlp.gate_up_proj").chunk(2)
    else:
        gate, up = setting.weight("mlp.gate_proj"), setting.weight("mlp.up_proj")
    down, out = setting.weight("mlp.down_proj"), setting.weight("self_attn.o_proj")
    fed = setting.seen["mlp.gate_up_proj" if fused else "mlp.gate_proj"][0]
    g, u = fed @ gate.t(), fed @ up.t()
    active = functional.gelu(g, approximate="tanh") if gemma else functional.silu(g)
    slope = GELU if gemma else SILU
    norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    stream, gains = setting.seen[norm][0], setting.weight(norm) + (1 if gemma else 0)
    tokens, width = stream.shape
    assert tokens == setting.tokens
    inverse = sum(1 / math.sqrt(sum(float(v) ** 2 for v in row) / width) for row in stream) / tokens
    passed = []
    for i in range(width):
        through = 0.0
        for k in range(len(gate)):
            leaving = sum(abs(float(w)) for w in down[:, k])
            mean_up, mean_active = float(u[:, k].abs().mean()), float(active[:, k].abs().mean())
            if options.get("gated"):
                both = abs(float(gate[k, i])) * slope * mean_up + abs(float(up[k, i])) * mean_active
            else:
                both = abs(float(up[k, i]))
            through += both * leaving
        passed.append(1 + through * (abs(float(gains[i])) * inverse if options.get("norm") else 1))
    x = setting.seen["self_attn.o_proj"][0]
    channels = [
        float(x[:, j].abs().sum()) * sum(abs(float(out[i, j])) * passed[i] for i in range(width))
        for j in range(out.shape[1])
    ]
    size = setting.attention.size
    assert setting.attention.count == 2  # key-value heads; four query heads
    wanted = [sum(channels[k * size : (k + 1) * size]) for k in range(2)]
    found = score(setting.view, setting.attention, **options)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=0)
    # nothing lies behind the perceptron
    assert torch.equal(score(setting.view, setting.mlp, **options), score(setting.view, setting.mlp))


def test_off_they_need_nothing_more_than_the_paper() -> None:
    setting = Setting("llama", {GATE, NORM})
    plain = BlockView(
        setting.view.weights,
        {
            each.name: Statistics(1, {"input_abs": setting.view.statistics[each.name].input_abs})
            for each in setting.view.structures
        },
        structures=setting.view.structures,
    )
    for each in setting.view.structures:
        assert torch.equal(score(plain, each), score(setting.view, each, gated=False, norm=False))
    part = find_part("unit-score", "llm-bip")
    assert part.needed(part.bind({})) == {"input_abs"}
    for option in ("gated", "norm"):
        with pytest.raises(PrunekitError, match="must declare it"):
            score(plain, setting.attention, **{option: True})


def test_by_default_no_block_is_searched_for_gates(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    monkeypatch.setattr(job, "find_perceptrons", None)
    prune(tmp_path / "model", tmp_path / "out", text)
    with pytest.raises(TypeError, match="not callable"):  # a default that is on would have called it
        prune(tmp_path / "model", tmp_path / "gated", text, gated=True)


class Bound:
    """One token at the end of a tiny Llama's block, by hand: what an input of the attention's last linear does to the outputs."""

    def __init__(self, scale: float, *, normed: bool) -> None:
        wanted = {GATE, NORM} if normed else {GATE}
        self.setting = Setting("llama", wanted)
        draw = torch.Generator().manual_seed(2)
        self.out, self.gate, self.up, self.down = (
            self.setting.weight(name) for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        )
        size = self.out.shape[0]
        self.x = scale * torch.randn(self.out.shape[1], generator=draw, dtype=torch.float64)
        self.before = 300 * torch.randn(size, generator=draw, dtype=torch.float64)
        self.h = self.before + self.out @ self.x
        self.inverse = float(self.h.square().mean().rsqrt())
        gains = self.setting.weight("post_attention_layernorm")
        # the norm as it is for this token, its division held as it was: what it projects away is not in the formula
        self.factor = gains * self.inverse if normed else torch.ones(size, dtype=torch.float64)
        self.options = {"gated": True, "norm": normed}

    def inside(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate @ (self.factor * h), self.up @ (self.factor * h)

    def block(self, h: Tensor) -> Tensor:
        g, u = self.inside(h)
        return h + self.down @ (functional.silu(g) * u)

    def channel(self, j: int, **options: bool) -> float:
        """The score of one input alone: the others are fed nothing."""
        setting, (g, u) = self.setting, self.inside(self.h)
        alone = torch.zeros_like(self.x)
        alone[j] = self.x[j].abs()
        statistics = {
            "self_attn.o_proj": Statistics(1, {"input_abs": alone}),
            "mlp.up_proj": Statistics(1, {"output_abs": u.abs()}),
            "mlp.act_fn": Statistics(1, {"output_abs": functional.silu(g).abs()}),
            "post_attention_layernorm": Statistics(1, {"inverse_rms": torch.tensor(self.inverse, dtype=torch.float64)}),
        }
        view = BlockView(
            setting.view.weights, statistics, {}, setting.view.structures, setting.perceptron, setting.view.gains
        )
        return float(score(view, setting.attention, **options).sum())

    def moved(self, j: int) -> tuple[float, float]:
        """How far the block's output moves in ℓ1 without an input, and the most that |δg| |δu|, which is of second order, adds."""
        h = self.h - self.out[:, j] * self.x[j]
        (g, u), (g0, u0) = self.inside(h), self.inside(self.h)
        second = SILU * ((g - g0).abs() * (u - u0).abs()) @ self.down.abs().sum(0)
        return float((self.block(h) - self.block(self.h)).abs().sum()), float(second)


@pytest.mark.parametrize("normed", [False, True])
def test_of_one_token_the_gated_score_bounds_what_every_channel_moves(normed: bool) -> None:
    bound = Bound(1.0, normed=normed)
    for j in range(len(bound.x)):
        moved, second = bound.moved(j)
        assert moved <= (bound.channel(j, **bound.options) + second) * (1 + 1e-5)
    small = Bound(1e-5, normed=normed)
    exceeded = 0
    for j in range(len(small.x)):
        moved, second = small.moved(j)
        found = small.channel(j, **small.options)
        assert second <= 1e-3 * found  # of first order alone
        assert moved <= found * (1 + 1e-3)
        exceeded += moved > small.channel(j, gated=False, norm=normed)
    if not normed:  # the paper's formula knows nothing of what the gate multiplies by
        assert exceeded > 0


@pytest.mark.parametrize(
    ("name", "slope"), [("relu", 1.0), ("silu", SILU), ("gelu_pytorch_tanh", GELU), ("gelu", 1.12890), ("relu2", None)]
)
def test_slopes_of_activations(name: str, slope: float | None) -> None:
    found = steepest(ACT2FN[name])
    assert found == (None if slope is None else pytest.approx(slope, rel=1e-5))


@pytest.mark.parametrize("family", GATED)
def test_gates_are_found(family: str) -> None:
    gate = Setting(family, {GATE}).perceptron.gate
    assert gate is not None
    names, rows = (gate.gate.linear, gate.up.linear), (int(gate.gate.rows[0]), int(gate.up.rows[0]))
    if family == "phi3":
        assert (names, rows) == (("mlp.gate_up_proj", "mlp.gate_up_proj"), (0, 48))
    else:
        assert (names, rows) == (("mlp.gate_proj", "mlp.up_proj"), (0, 0))
    assert gate.slope == pytest.approx(GELU if "gemma" in family else SILU, rel=1e-5)


@pytest.mark.parametrize("family", NORMED)
def test_gains_are_those_of_the_norm_in_front(family: str) -> None:
    setting = Setting(family, {NORM})
    assert setting.perceptron.gate is None
    name = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
    stream, normed = setting.seen[name]
    unit = stream * stream.square().mean(-1, keepdim=True).rsqrt()
    assert setting.view.gains is not None
    torch.testing.assert_close(setting.view.gains.double() * unit.abs(), normed.abs(), rtol=5e-3, atol=1e-6)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(600), encoding="utf-8")
    return path


def prune(folder: Path, out: Path, text: Path, ratio: float = 0.45, **options: bool) -> prunekit.Result:
    calibration = {"source": str(text), "samples": 4, "length": 16}
    parts = {"score": options}
    return prunekit.prune(
        folder, out=out, method="llm-bip", ratio=ratio, calibration=calibration, dtype="float32", parts=parts
    )


@pytest.mark.parametrize("family", GATED)
@pytest.mark.filterwarnings("ignore:.*no config for these widths.*")
def test_every_gated_family_runs(family: str, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", family, **({} if family == "gemma3_text" else {"num_hidden_layers": 1}))
    result = prune(tmp_path / "model", tmp_path / "out", text, gated=True, norm=family in NORMED)
    assert result.ratio == pytest.approx(0.45, abs=0.03)


@pytest.mark.parametrize("family", UNGATED)
def test_families_without_a_gate_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"with a gate, and there is none in front of '.*': leave it out"):
        Setting(family, {GATE})


@pytest.mark.parametrize("family", ["gpt2", "olmo2", "stablelm"])
def test_families_without_an_rms_norm_in_front_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"an RMS norm right in front .* none in front of '.*': leave it out"):
        Setting(family, {NORM})


def test_activations_that_cannot_be_bounded_or_measured_are_refused() -> None:
    with pytest.raises(InputError, match=r"a largest slope, and that of 'model.layers.0.mlp.down_proj' has none"):
        Setting("llama", {GATE}, hidden_act="relu2")
    model = tiny.make_model("llama")

    def forward(self: Any, x: Tensor) -> Tensor:
        found = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        assert isinstance(found, Tensor)
        return found

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)
    source = ResidentModel(model)
    with pytest.raises(InputError, match=r"no module in front of 'model.layers.0.mlp.down_proj' computes it"):
        find_perceptrons(model, source.anatomy, find_structures(model, source.anatomy), {GATE})


def test_on_the_command_line(tmp_path: Path, text: Path) -> None:
    few = ["--calibration", text, "--samples", "4", "--length", "16", "--dtype", "float32", "--ratio", "0.5"]
    # of eight heads in four groups two groups go
    tiny.save_model(tmp_path / "model", "llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1)
    done = call("prune", tmp_path / "model", "--method", "llm-bip", *BOTH, *few, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    tiny.save_model(tmp_path / "plain", "gpt2")
    done = call("prune", tmp_path / "plain", "--method", "llm-bip", *BOTH, *few, "--out", tmp_path / "none")
    assert done.code == 2
    assert "score.gated=true is for multilayer perceptrons with a gate" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("budget", ["uniform", "global-cost"])
def test_a_walk_measures_what_blocks_see(
    budget: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as blocks are cut, and of all of them before the first is
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    views: list[BlockView] = []
    scores = Shrinker.scores
    monkeypatch.setattr(Shrinker, "scores", lambda self, view: views.append(view) or scores(self, view))
    parts: dict[str, Any] = {"score": {"gated": True, "norm": True}, "budget": {"name": budget, "shape": "free"}}
    shrink(tmp_path / "model", tmp_path / "out", text, "llm-bip", 0.3, parts=parts)
    (view,) = views
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layer, ids = model.model.layers[0], tiny_windows(tmp_path / "model", text)[0]
    for name, child in layer.named_modules():
        child.register_forward_hook(lambda module, given, gave, name=name: seen.update({name: (*given[:1], gave)}))
    with torch.no_grad():
        model(ids)
    tokens = ids.numel()
    for name in ("mlp.up_proj", "mlp.act_fn"):
        wanted = seen[name][1].abs().sum((0, 1))
        assert view.statistics[name].count == tokens
        torch.testing.assert_close(view.statistics[name].output_abs, wanted, rtol=1e-4, atol=1e-6)
    norm = layer.post_attention_layernorm
    wanted = seen["post_attention_layernorm"][0].square().mean(-1).rsqrt().sum()
    torch.testing.assert_close(view.statistics["post_attention_layernorm"].inverse_rms, wanted, rtol=1e-4, atol=0)
    assert view.gains is not None
    torch.testing.assert_close(view.gains.double(), norm.weight.detach().abs(), rtol=1e-4, atol=0)
