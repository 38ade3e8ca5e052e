"""Tuning a block as a whole: what it descends, what it must not touch, and what it is good for."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunekit
import tiny
from prunekit import InputError
from prunekit.parts import find_part
from prunekit.sparsify.tune.blockwise import blockwise


def block() -> tuple[nn.Module, nn.Module, dict[str, Tensor], list[Tensor]]:
    """A dense block of two linears and a bend, the same with half of its weights gone, the masks, and batches of inputs."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8, bias=False))
    pruned = copy.deepcopy(dense)
    keeps = {}
    for name in ("0", "2"):
        weight = pruned.get_submodule(name).weight
        keeps[name] = weight.abs() >= weight.abs().median()
        with torch.no_grad():
            weight.mul_(keeps[name])
    return dense, pruned, keeps, [torch.randn(4, 6, 8) for _ in range(8)]


def tune(dense: nn.Module, pruned: nn.Module, keeps: dict[str, Tensor], inputs: list[Tensor], **options: Any) -> Any:
    def batches() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for values in inputs:
            with torch.no_grad():
                wanted = values + dense(values)
            yield values, values + pruned(values), wanted

    weights = {name: (pruned.get_submodule(name).weight, keep) for name, keep in keeps.items()}
    return blockwise(weights, batches, len(inputs), lambda tensors: None, **options)


def error(dense: nn.Module, pruned: nn.Module) -> float:
    held_out = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((pruned(held_out) - dense(held_out)).norm() / dense(held_out).norm())


def test_the_block_comes_nearer_to_the_dense_one_and_its_mask_holds() -> None:
    dense, pruned, keeps, inputs = block()
    before = error(dense, pruned)
    first, last = tune(dense, pruned, keeps, inputs, epochs=20)
    assert last < 0.6 * first
    assert error(dense, pruned) < 0.8 * before
    for name, keep in keeps.items():
        weight = pruned.get_submodule(name).weight
        assert not weight[~keep].any()
        assert weight.grad is None


def test_a_step_is_adam_with_a_rate_that_rises_and_falls() -> None:
    dense, pruned, keeps, inputs = block()
    mine = copy.deepcopy(pruned)
    scales = {
        name: float(mine.get_submodule(name).weight.detach()[keep].square().mean().sqrt())
        for name, keep in keeps.items()
    }
    tune(dense, pruned, keeps, inputs, rate=0.02, warmup=0.25)
    groups = [{"params": [mine.get_submodule(name).weight], "lr": 0.02 * scale} for name, scale in scales.items()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    for number, values in enumerate(inputs):
        wanted = (values + dense(values)).detach()
        loss = (values + mine(values) - wanted).square().sum() / (wanted - values).square().sum()
        adam.zero_grad()
        loss.backward()
        share = min((number + 1) / 2, 1) * (1 - number / 8)  # two of the eight steps warm up
        for group, scale in zip(adam.param_groups, scales.values(), strict=True):
            group["lr"] = 0.02 * scale * share
            group["params"][0].grad.mul_(keeps["0"] if scale == scales["0"] else keeps["2"])
        adam.step()
    for name in keeps:
        torch.testing.assert_close(
            pruned.get_submodule(name).weight, mine.get_submodule(name).weight, rtol=1e-4, atol=1e-5
        )


def test_processes_add_up_their_gradients() -> None:
    seen: list[int] = []
    dense, pruned, keeps, inputs = block()
    weights = {name: (pruned.get_submodule(name).weight, keep) for name, keep in keeps.items()}
    wanted = [(values + dense(values)).detach() for values in inputs]
    blockwise(
        weights,
        lambda: ((x, x + pruned(x), y) for x, y in zip(inputs, wanted, strict=True)),
        len(inputs),
        lambda tensors: seen.append(len(tensors)),
    )
    assert seen == [2] * 8


def test_a_share_is_the_first_of_the_batches_and_nothing_else() -> None:
    dense, pruned, keeps, inputs = block()
    few = copy.deepcopy(pruned)
    tune(dense, pruned, keeps, inputs, epochs=2, share=0.4)
    tune(dense, few, keeps, inputs[:4], epochs=2)  # 3.2 of 8 are 4
    for name in keeps:
        assert torch.equal(pruned.get_submodule(name).weight, few.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("rate", 0.0), ("warmup", 1.5), ("share", 0.0), ("share", 1.1)]
)
def test_options_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"'tune.{name}' cannot be {value}"):
        find_part("tune", "blockwise").bind({name: value})


def test_output_errors_are_those_of_the_order_that_channels_were_put_into() -> None:
    ids = torch.randint(0, tiny.VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    errors = {}
    for permute in (False, True):
        found = prunekit.prune_(
            tiny.make_model("llama"),
            ids,
            method="wanda+blockwise",
            pattern="2:4",
            parts={"pattern": {"permute": permute}, "tune": {"rate": 1e-6}},
        )
        assert found.permuted is None or found.permuted > 0
        errors[permute] = [linear.output_error for linear in found.linears]
    for plain, permuted in zip(errors[False], errors[True], strict=True):
        assert permuted == pytest.approx(plain, rel=0.25)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_a_model_in_memory_comes_nearer_to_the_dense_one(family: str) -> None:
    ids = torch.randint(0, tiny.VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    dense = tiny.make_model(family)
    far = {}
    for method in ("wanda+least-squares", "wanda+least-squares+blockwise"):
        model = tiny.make_model(family)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        result = prunekit.prune_(model, ids[:8], method=method, pattern="2:4", calibration={"batch": 1})
        assert result.sparsity == pytest.approx(0.5)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        with torch.no_grad():
            far[method] = float((model(ids[8:]).logits - dense(ids[8:]).logits).norm())
    assert far["wanda+least-squares+blockwise"] < far["wanda+least-squares"]


def test_a_folder_is_tuned_to_the_bits_of_the_model_in_memory(tmp_path: Path, text_file: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama")
    asked: dict[str, Any] = {
        "method": "wanda+blockwise",
        "sparsity": 0.5,
        "calibration": {"source": str(text_file), "samples": 4, "length": 32, "batch": 2},
    }
    result = prunekit.prune(tmp_path / "model", out=tmp_path / "out", dtype="float32", **asked)
    assert result.verification is not None
    assert result.seconds.tune > 0
    model = tiny.make_model("llama")
    again = prunekit.prune_(model, tiny.make_tokenizer(), **asked)
    written: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name], parameter), name
    assert [line.zeros for line in again.linears] == [line.zeros for line in result.linears]
    assert [line.output_error for line in again.linears] == [line.output_error for line in result.linears]
    assert prunekit.inspect(tmp_path / "out").sound


@pytest.mark.parametrize("method", ["wanda", "magnitude"])  # which reads nothing itself
@pytest.mark.parametrize("target", ["own", "dense"])
def test_what_is_wanted_is_the_whole_blocks_output_here_or_the_dense_models(target: str, method: str) -> None:
    # by hand: every block of a pruned copy descends towards what the dense block gives, fed by the pruned or by the dense ones
    ids = torch.randint(0, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    model, dense, mine = tiny.make_model("llama"), tiny.make_model("llama"), tiny.make_model("llama")
    asked: dict[str, Any] = {"method": f"{method}+blockwise", "sparsity": 0.5, "calibration": {"batch": 2}}
    result = prunekit.prune_(model, ids, parts={"tune": {"rate": 0.05, "target": target}}, **asked)

    assert result.windows == 4

    def fed(whose: nn.Module, index: int) -> list[tuple[Tensor, dict[str, Any]]]:
        found: list[tuple[Tensor, dict[str, Any]]] = []
        handle = whose.get_submodule(f"model.layers.{index}").register_forward_pre_hook(
            lambda module, given, more: found.append((given[0].detach(), more)), with_kwargs=True
        )
        with torch.no_grad():
            for batch in ids.split(2):
                whose(batch, use_cache=False)
        handle.remove()
        return found

    for index in range(len(mine.model.layers)):
        ours, layer, whole = (one.model.layers[index] for one in (model, mine, dense))
        inputs = fed(mine, index)
        aims = inputs if target == "own" else fed(dense, index)
        weights: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for (name, weight), kept in zip(layer.named_parameters(), ours.parameters(), strict=True):
            weight.requires_grad_(weight.ndim == 2)
            if weight.ndim == 2:
                weights[name] = weight, kept.detach() != 0
                with torch.no_grad():
                    weight.mul_(weights[name][1])
        with torch.no_grad():
            wanted = [whole(values, **more) for values, more in aims]
        batches = [(x, more, y) for (x, more), y in zip(inputs, wanted, strict=True)]
        blockwise(
            weights,
            lambda batches=batches, layer=layer: ((x, layer(x, **more), y) for x, more, y in batches),
            len(batches),
            lambda tensors: None,
            rate=0.05,
            target=target,
        )
        for name, tuned in layer.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), tuned, rtol=1e-3, atol=1e-5, msg=f"{index} {name}")


@pytest.mark.parametrize("target", ["own", "dense"])
def test_a_block_that_is_left_dense_stays_as_it_is(target: str) -> None:
    model, before = tiny.make_model("llama"), tiny.make_model("llama")
    ids = torch.randint(0, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    parts = {"budget": {"ignore": ["model.layers.1.*"]}, "tune": {"target": target}}
    prunekit.prune_(model, ids, method="wanda+blockwise", parts=parts)
    moved = {
        int(name.split(".")[2])
        for (name, new), old in zip(model.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(new, old[1])
    }
    assert moved == set(range(len(model.model.layers))) - {1}


def test_what_is_left_dense_is_not_tuned() -> None:
    model, before = tiny.make_model("llama"), tiny.make_model("llama")
    ids = torch.randint(0, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    parts = {"budget": {"ignore": ["*.down_proj"]}}
    prunekit.prune_(model, ids, method="wanda+blockwise", parts=parts)
    moved = {
        name.rsplit(".", 2)[-2]
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_dense_statistics_are_refused() -> None:
    with pytest.raises(InputError, match="tune 'blockwise' goes from block to pruned block"):
        prunekit.prune_(
            tiny.make_model("llama"),
            torch.zeros(2, 8, dtype=torch.long),
            method="wanda+blockwise",
            calibration={"mode": "dense"},
        )
