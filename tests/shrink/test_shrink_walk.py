"""Shrinking from end to end: what is written is what a slow float64 oracle over the whole model keeps and refits."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit import InputError
from prunekit.catalogue import METHODS
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.errors import PrunekitWarning
from prunekit.model.anatomy import read_anatomy
from prunekit.model.stream import Walk
from prunekit.progress import Silent
from prunekit.shrink.masking import masked
from prunekit.shrink.plan import Plan
from prunekit.shrink.units import find_structures

UNITS = [row for row in METHODS.values() if row.kind == "shrink" and row.width is None]
SHRINK = [row.name for row in UNITS if row.search is None and not row.planned]
LENGTH = 32
WIDE = {"shape": "free", "skip_first": 0, "skip_last": 0, "align": 1}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.make_text(600), encoding="utf-8")
    return path


def shrink(folder: Path, out: Path, text: Path, method: str, ratio: float = 0.3, **more: Any) -> prunekit.Result:
    calibration = {"source": str(text), "samples": 6, "length": LENGTH} | more.pop("calibration", {})
    return prunekit.prune(folder, out=out, method=method, ratio=ratio, calibration=calibration, dtype="float32", **more)


def read_plan(folder: Path, out: Path) -> tuple[PreTrainedModel, Any, Any, Plan]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    anatomy = read_anatomy(model)
    structures = find_structures(model, anatomy)
    return model, anatomy, structures, Plan.read(out / PLAN_NAME, structures)


@pytest.mark.parametrize("method", SHRINK)
@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_every_method_leaves_a_model_that_is_really_smaller(
    method: str, shape: str, tmp_path: Path, text: Path
) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=7)
    parts = {} if METHODS[method].depth else {"budget": {**WIDE, "shape": shape}}
    result = shrink(tmp_path / "model", tmp_path / "out", text, method, parts=parts)
    model = prunekit.load(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters - result.removed
    assert result.ratio == pytest.approx(0.3, abs=0.045 if METHODS[method].group == "sublayer" else 0.03)
    assert result.verification is not None
    assert result.verification.difference <= 1e-5
    assert result.summary()["parameters"] == {
        "before": result.parameters,
        "after": result.parameters - result.removed,
    }
    found = prunekit.inspect(tmp_path / "out")
    assert found.sound
    ids = torch.randint(0, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        behind = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(behind, model(ids).logits[:, 9:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3", "gemma2", "opt"])
@pytest.mark.filterwarnings("ignore:.*no config for these widths.*")
def test_without_compensation_it_is_the_masked_model(family: str, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", family)
    shrink(tmp_path / "model", tmp_path / "out", text, "wanda-sp", 0.45)
    model, anatomy, structures, plan = read_plan(tmp_path / "model", tmp_path / "out")
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    smaller = prunekit.load(tmp_path / "out", dtype="float32")
    with torch.no_grad(), masked(model, anatomy, structures, plan):
        torch.testing.assert_close(smaller(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def inputs_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("target", ["own", "dense"])
def test_sequential_wanda_with_least_squares_is_the_oracles(target: str, tmp_path: Path, text: Path) -> None:
    # block by block over the whole model: score on what the pruned predecessors give, keep the best, refit, go on
    tiny.save_model(tmp_path / "model", "llama")
    parts = {"compensate": {"damping": 0.01, "target": target}}
    shrink(tmp_path / "model", tmp_path / "out", text, "wanda-sp+least-squares", 0.45, parts=parts)
    model, anatomy, structures, plan = read_plan(tmp_path / "model", tmp_path / "out")
    windows = json.loads((tmp_path / "out" / "prunekit.json").read_text())["calibration_tokens"]
    ids = tiny_windows(tmp_path / "model", text)
    assert windows == ids[1]
    oracle, dense = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    written = {
        name: tensor for path in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for block, found in zip(anatomy.blocks, structures, strict=True):
        # what all of a block's consumers are fed is measured before any of them is changed
        fed = {each.name: inputs_of(oracle, each.consumer.full_name, ids[0]) for each in found}
        for each in found:
            x = fed[each.name]
            weight = oracle.get_submodule(each.consumer.full_name).weight.data
            channels = weight.abs().mean(0) * x.square().mean(0).sqrt()
            scores = torch.stack([part.sum() for part in channels.split(each.size)])
            count = len(plan.kept(each))
            best = sorted(sorted(range(each.count), key=lambda unit: -float(scores[unit]))[:count])
            assert plan.kept(each).tolist() == best, block.index
            if count == each.count:
                continue
            keep = torch.tensor([unit * each.size + part for unit in best for part in range(each.size)])
            gram = x.t() @ x
            damped = gram[keep][:, keep] + 0.01 * gram[keep][:, keep].diagonal().mean() * torch.eye(len(keep))
            aim = x if target == "own" else inputs_of(dense, each.consumer.full_name, ids[0])
            wanted = aim @ weight.t()
            update = torch.linalg.solve(damped, x[:, keep].t() @ (wanted - x[:, keep] @ weight[:, keep].t()))
            new = weight[:, keep] + update.t()
            name = f"{each.consumer.full_name}.weight"
            torch.testing.assert_close(written[name].double(), new, rtol=1e-3, atol=1e-5)
            weight.zero_()
            weight[:, keep] = new


def test_tuned_towards_the_dense_model_whole_blocks_make_up_for_what_went_before_them(
    tmp_path: Path, text: Path
) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=5)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids, _ = tiny_windows(tmp_path / "model", text)
    budget = {"shape": "free", "skip_first": 1, "skip_last": 2}
    moved, far = {}, {}
    for target in ("own", "dense"):
        parts = {"budget": budget, "tune": {"target": target, "rate": 0.02, "epochs": 4}}
        asked: dict[str, Any] = {"parts": parts, "calibration": {"batch": 1}}
        shrink(tmp_path / "model", tmp_path / target, text, "wanda-sp+least-squares+blockwise", 0.3, **asked)
        found = prunekit.load(tmp_path / target, dtype="float32")
        moved[target] = [
            any(
                new.shape != old.shape or not torch.equal(new, old)
                for new, old in zip(ours.parameters(), dense.parameters(), strict=True)
            )
            for ours, dense in zip(found.model.layers, before.model.layers, strict=True)
        ]
        with torch.no_grad():
            far[target] = float((found.model(ids).last_hidden_state - before.model(ids).last_hidden_state).norm())
    assert moved == {"own": [False, True, True, False, False], "dense": [False, True, True, True, True]}
    assert far["dense"] < 0.95 * far["own"]


@pytest.mark.parametrize("method", ["magnitude-sp", "planned"])
@pytest.mark.parametrize("budget", [None, 1])
def test_the_dense_model_is_followed_where_nothing_is_measured(
    method: str, budget: int | None, tmp_path: Path, text: Path
) -> None:
    # a plan that no block's statistics have a say in, and a block that loses nothing but a whole sublayer
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    model, _, structures, plan = read_plan(
        tmp_path / "model", shrink(tmp_path / "model", tmp_path / "cut", text, "magnitude-sp").out
    )
    content = plan.to_json(structures)
    content["blocks"][0] = {"self_attn.o_proj": {**content["blocks"][0]["self_attn.o_proj"], "kept": []}}
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    asked: dict[str, Any] = {"plan": tmp_path / "plan.json", "ratio": None} if method == "planned" else {}
    ids, _ = tiny_windows(tmp_path / "model", text)
    far: dict[str, list[float]] = {}
    for name, added, tune in [("cut", "", {}), *((each, "+blockwise", {"target": each}) for each in ("own", "dense"))]:
        parts = {"tune": {**tune, "rate": 0.02, "epochs": 4}} if added else {}
        more = {**asked, "parts": parts, "calibration": {"batch": 1}, "memory_budget": budget}
        shrink(tmp_path / "model", tmp_path / name, text, method + added, overwrite=True, **more)
        found = prunekit.load(tmp_path / name, dtype="float32")
        with torch.no_grad():
            ours, whole = (each(ids, output_hidden_states=True).hidden_states for each in (found, model))
        far[name] = [float((mine - dense).norm()) for mine, dense in zip(ours, whole, strict=True)]
    assert far["dense"][-1] < 0.95 * min(far["own"][-1], far["cut"][-1])
    assert far["dense"][1] < 0.95 * far["cut"][1], "the first block makes up for what it lost itself"


def tiny_windows(folder: Path, text: Path) -> tuple[Tensor, str]:
    from prunekit.calibration.text import documents
    from prunekit.calibration.windows import calibration_windows, load_tokenizer, token_hash

    windows = calibration_windows(
        documents(str(text), "calibration"),
        load_tokenizer(folder, trust_remote_code=False),
        samples=6,
        length=LENGTH,
        seed=0,
        sampling="random",
    )
    return windows.ids, token_hash(windows)


def test_flaps_bias_is_in_the_model_that_stock_code_loads(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    shrink(tmp_path / "model", tmp_path / "out", text, "flap", 0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float(model.model.layers[1].mlp.down_proj.bias.detach().abs().max()) > 0
    assert float(model.model.layers[1].mlp.up_proj.bias.detach().abs().max()) == 0


def test_a_block_that_computes_nothing_is_the_first_to_go(tmp_path: Path, text: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=5)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=5)
    model.save_pretrained(tmp_path / "model")
    for choose in ("once", "greedy", "contiguous"):
        out = tmp_path / choose
        shrink(tmp_path / "model", out, text, "shortgpt", 0.2, parts={"depth": {"choose": choose}})
        _, _, _, plan = read_plan(tmp_path / "model", out)
        assert plan.kept_blocks == [0, 1, 2, 4], choose
        ids = torch.randint(0, 250, (1, 16), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            smaller = AutoModelForCausalLM.from_pretrained(out)
            torch.testing.assert_close(smaller(ids).logits, model(ids).logits)
            smaller.generate(ids, max_new_tokens=3, pad_token_id=0)


def test_the_bfloat16_checkpoint_stays_bfloat16(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    shrink(tmp_path / "model", tmp_path / "out", text, "obs")
    tensors = [tensor for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_a_shrunk_model_can_be_shrunk_and_sparsified_again(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    first = shrink(tmp_path / "model", tmp_path / "first", text, "numerical", 0.3, parts={"budget": {"shape": "free"}})
    again = shrink(tmp_path / "first", tmp_path / "second", text, "wanda-sp", 0.2, parts={"budget": {"shape": "free"}})
    assert again.parameters == first.parameters - first.removed
    sparse = prunekit.prune(
        tmp_path / "second",
        out=tmp_path / "third",
        sparsity=0.5,
        calibration={"source": str(text), "samples": 4, "length": LENGTH},
    )
    assert sparse.sparsity == pytest.approx(0.5, abs=0.03)
    assert prunekit.inspect(tmp_path / "third").sound
    assert not (tmp_path / "third" / PLAN_NAME).exists(), "a plan says nothing of a model that was made from its result"


def test_a_form_that_stock_configs_cannot_say_is_said_so(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "gpt2")
    with pytest.warns(PrunekitWarning, match="GPT2LMHeadModel has no config for these widths"):
        shrink(tmp_path / "model", tmp_path / "out", text, "wanda-sp", 0.45)
    assert (tmp_path / "out" / "modeling_prunekit.py").is_file()


@pytest.mark.parametrize(
    ("method", "ratio", "more", "message"),
    [
        ("wanda-sp", 0.99, {}, "ratio 0.99 asks for"),
        ("wanda-sp", 1.5, {}, r"ratio 1.5 is outside \[0, 1\)"),
        ("wanda-sp", 0.2, {"align": 100}, "'budget.align' cannot be 100"),
        ("llm-pruner", 0.2, {"shape": "uniform"}, "leave some blocks wider than others"),
        ("llm-pruner", 0.2, {}, "skip all of the model's 3 blocks"),
        ("shortgpt", 0.9, None, "would remove all 3 blocks"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    method: str, ratio: float, more: dict[str, Any] | None, message: str, tmp_path: Path, text: Path
) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    parts = {} if more is None else {"budget": more}
    with pytest.raises(InputError, match=message):
        shrink(tmp_path / "model", tmp_path / "out", text, method, ratio, parts=parts)
    assert not (tmp_path / "out").exists()


def test_what_is_for_zeroing_is_refused_and_the_other_way_round(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    with pytest.raises(
        InputError, match=r"sparsity 0\.5 is for methods that zero single weights; 'flap' removes structures"
    ):
        prunekit.prune(tmp_path / "model", out=tmp_path / "out", method="flap", sparsity=0.5)
    with pytest.raises(
        InputError, match=r"ratio 0.2 is for methods that remove structures; 'wanda' zeroes single weights"
    ):
        prunekit.prune(tmp_path / "model", out=tmp_path / "out", method="wanda", ratio=0.2)
    with pytest.raises(InputError, match="'refine' is no part of 'flap'"):
        prunekit.prune(tmp_path / "model", out=tmp_path / "out", method="flap", parts={"refine": {"name": "dsnot"}})


def test_of_several_calibrations_the_best_is_taken(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    asked: dict[str, Any] = {"parts": {"budget": {"align": 1, "shape": "free"}}}
    plans = {}
    for choices in (1, 3):
        out = tmp_path / f"out-{choices}"
        calibration = {"samples": 8, "choices": choices}
        shrink(tmp_path / "model", out, text, "nirvana", 0.4, calibration=calibration, **asked)
        plans[choices] = (out / PLAN_NAME).read_text()
    assert plans[1] != plans[3]
    with pytest.raises(InputError, match="choices=3 is for scores that read gradients: 'obs' has none"):
        shrink(tmp_path / "model", tmp_path / "no", text, "obs", calibration={"choices": 3})
    with pytest.raises(InputError, match="choices=6 shares out the windows"):
        shrink(tmp_path / "model", tmp_path / "no", text, "nirvana", calibration={"choices": 6}, **asked)
    with pytest.raises(InputError, match="choices=2 is for scores that read gradients: 'wanda' has none"):
        prunekit.prune(tmp_path / "model", out=tmp_path / "no", calibration={"choices": 2})


def test_a_model_whose_attention_cannot_go_loses_channels_only(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "model", "olmo2")
    shrink(tmp_path / "model", tmp_path / "out", text, "wanda-sp", 0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 4
    assert config["intermediate_size"] < 48


class Counted(Silent):
    """Notes how far every bar came, and of how much."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    def start(self, title: str, steps: int) -> None:
        self.bars.append([title, 0, steps])

    def step(self, note: str = "") -> None:
        self.bars[-1][1] += 1


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("wanda-sp", {}),
        ("numerical", {}),
        ("llm-pruner", {"budget": WIDE}),
        *(("shortgpt", {"depth": {"choose": choose}}) for choose in ("once", "greedy", "contiguous")),
    ],
)
def test_bars_end_full_and_seconds_say_where_the_time_went(
    method: str, parts: dict[str, Any], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    calls, run_batch = [], Walk.run_batch

    def slow(self: Walk, *arguments: Any) -> Tensor:
        calls.append(1)
        time.sleep(0.005)
        return run_batch(self, *arguments)

    monkeypatch.setattr(Walk, "run_batch", slow)
    progress = Counted()
    result = shrink(tmp_path / "model", tmp_path / "out", text, method, 0.5, parts=parts, progress=progress)
    assert all(done == steps for _, done, steps in progress.bars), progress.bars
    assert progress.bars[-1] == [method, result.blocks, result.blocks]
    seconds = result.seconds
    phases = [seconds.forward, seconds.prune, seconds.tune, seconds.write, seconds.read, seconds.verify, seconds.start]
    assert sum(phases) <= seconds.total
    assert seconds.forward + seconds.verify >= 0.005 * len(calls)
