"""Every score against its formula written as loops in float64, and what the formulas promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel
from prunekit.parts import find_part, parts
from prunekit.shrink.scores import ziplm
from prunekit.shrink.units import ATTENTION, Structure, find_structures
from prunekit.shrink.view import BlockView
from prunekit.statistics import Collector, Statistics

FORWARD = ["magnitude", "wanda-sp", "flap", "llm-bip", "minitron", "numerical", "obs", "ziplm"]
NEEDS = ["input_sum", "input_square", "input_abs", "window_abs", "gram"]


class Setting:
    """The first block of a tiny model in float64, what its consumers were fed, and what scores say."""

    def __init__(self, family: str, *, spoil: Any = None) -> None:
        self.model = tiny.make_model(family, dtype=torch.float64)
        source = ResidentModel(self.model)
        self.structures = find_structures(self.model, source.anatomy)[0]
        self.block = source.anatomy.blocks[0]
        self.module = source.load_block(0)
        if spoil is not None:
            spoil(self)
        ids = torch.randint(0, 250, (6, 20), generator=torch.Generator().manual_seed(1))
        self.inputs: dict[str, Tensor] = {}
        for each in self.structures:
            self.module.get_submodule(each.name).register_forward_pre_hook(self._keep(each.name))
        consumers = {each.name: self.module.get_submodule(each.name) for each in self.structures}
        with torch.no_grad(), Collector(consumers, NEEDS) as collector:
            collector.windows = len(ids)
            self.model(ids)
        self.statistics = collector.statistics()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.inputs[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return hook

    def matrix(self, name: str) -> Tensor:
        linear = next(linear for linear in self.block.linears if linear.name == name)
        weight = self.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return linear.matrix(weight.detach())

    def view(self, statistics: dict[str, Statistics] | None = None) -> BlockView:
        weights = {linear.name: self.matrix(linear.name) for linear in self.block.linears}
        found = self.statistics if statistics is None else statistics
        return BlockView(weights, found, structures=tuple(self.structures))

    def score(self, name: str, structure: Structure, **options: Any) -> Tensor:
        part = find_part("unit-score", name)
        scores = part.function(self.view(), structure, **part.bind(options))
        assert isinstance(scores, Tensor)
        return scores


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "phi3"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def units_of(structure: Structure, channels: list[float], mean: bool = False) -> list[float]:
    size = structure.size
    found = [sum(channels[k * size : (k + 1) * size]) for k in range(structure.count)]
    return [value / size for value in found] if mean else found


def close(found: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-5, atol=1e-9)


def test_magnitude(setting: Setting) -> None:
    for each in setting.structures:
        wanted = [0.0] * each.count
        for part in each.slices:
            if part.tensor.endswith(".weight"):
                tensor = setting.module.get_parameter(part.tensor).detach()
                for unit in range(each.count):
                    wanted[unit] += float(tensor.index_select(part.dim, part.entries[unit]).square().sum())
        close(setting.score("magnitude", each), wanted)
        alone = setting.matrix(each.name).square().sum(0).tolist()
        close(setting.score("magnitude", each, coupled=False), units_of(each, alone))


@pytest.mark.parametrize("p", [0, -1.0, float("nan")])
def test_a_power_that_ranks_nothing_is_refused(p: float) -> None:
    with pytest.raises(InputError, match=r"'score\.p' cannot be .*: it takes a number above 0"):
        find_part("unit-score", "magnitude").bind({"p": p})


def test_wanda_sp(setting: Setting) -> None:
    for each in setting.structures:
        x, w = setting.inputs[each.name], setting.matrix(each.name)
        channels = [
            sum(abs(float(w[i, j])) for i in range(len(w))) / len(w) * float(x[:, j].square().mean()) ** 0.5
            for j in range(w.shape[1])
        ]
        close(setting.score("wanda-sp", each), units_of(each, channels))


def test_flap(setting: Setting) -> None:
    for each in setting.structures:
        x, w = setting.inputs[each.name], setting.matrix(each.name)
        values = [float(x[:, j].var(correction=0)) * float(w[:, j].square().sum()) for j in range(w.shape[1])]
        values = [value**2 for value in values] if each.kind == ATTENTION else values
        of = torch.tensor(values, dtype=torch.float64)
        standard = ((of - of.mean()) / of.std()).tolist()
        close(setting.score("flap", each), units_of(each, standard, mean=True))
        constant = setting.score("flap", each, metric="ifv")
        assert constant.shape == (each.count,)


def test_llm_bip_equals_the_naive_products(setting: Setting) -> None:
    attention, mlp = setting.structures
    x_down, down = setting.inputs[mlp.name], setting.matrix(mlp.name)
    close(setting.score("llm-bip", mlp), units_of(mlp, (x_down.abs().sum(0) * down.abs().sum(0)).tolist()))
    # |x_j| |W_O^j| (I + |W_U| |W_D|) in the paper's convention, with the whole D x D product
    up = [part for part in mlp.slices[1:] if part.tensor.endswith(".weight")][-1]
    rows = setting.matrix(up.tensor.removesuffix(".weight"))[up.entries[:, -1]]
    through = torch.eye(len(down), dtype=torch.float64) + rows.abs().t() @ down.abs().t()
    x, out = setting.inputs[attention.name], setting.matrix(attention.name)
    channels = [float(x[:, j].abs().sum() * (out[:, j].abs() @ through).sum()) for j in range(out.shape[1])]
    close(setting.score("llm-bip", attention), units_of(attention, channels))


def test_minitron(setting: Setting) -> None:
    for each in setting.structures:
        x = setting.inputs[each.name].reshape(6, 20, -1)
        if each.kind == ATTENTION:
            wanted = [float(part.square().sum().sqrt()) for part in x.split(each.size, dim=-1)]
        else:
            wanted = [sum(float(x[b, :, j].abs().mean()) ** 2 for b in range(6)) ** 0.5 for j in range(x.shape[-1])]
        close(setting.score("minitron", each), wanted)


def test_numerical_is_where_newton_ends(setting: Setting) -> None:
    for each in setting.structures:
        x, w = setting.inputs[each.name], setting.matrix(each.name)
        matrix = (w.t() @ w) * (x.t() @ x)
        damped = matrix + 1e-3 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        size, rho, lam = len(matrix), 0.3, 7.0
        one = torch.ones(size, dtype=torch.float64)
        z = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for _ in range(50):
            gradient = damped @ (z - 1) + lam * (z.sum() - (1 - rho) * size) * one
            z = z - torch.linalg.solve(damped + lam * torch.outer(one, one), gradient)
        # -u·D/Σu, from z = 1 − λρD/(1+λs)·u
        s = float(torch.linalg.solve(damped, one).sum())
        u = (1 - z) * (1 + lam * s) / (lam * rho * size)
        close(setting.score("numerical", each), units_of(each, (-u * size / u.sum()).tolist(), mean=True))


def test_obs_is_the_loss_behind_a_refit(setting: Setting) -> None:
    for each in setting.structures:
        x, w = setting.inputs[each.name], setting.matrix(each.name)
        gram = x.t() @ x
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        channels = []
        for j in range(w.shape[1]):
            rest = [k for k in range(w.shape[1]) if k != j]
            # removing j and refitting the others in the damped problem
            solved = torch.linalg.solve(damped[rest][:, rest], damped[rest][:, [j]])[:, 0]
            left = float(damped[j, j] - damped[[j]][:, rest][0] @ solved)
            channels.append(float(w[:, j].square().sum()) * left)
        close(setting.score("obs", each), units_of(each, channels))


def behind_a_refit(structure: Structure, weight: Tensor, gram: Tensor, kept: list[int]) -> float:
    """The squared output error when only some units of a structure are kept, and their columns refitted."""
    whole = float(((weight @ gram) * weight).sum())
    if not kept:
        return whole
    channels = structure.inputs(torch.tensor(kept))
    right = gram[channels] @ weight.t()
    return whole - float((right * torch.linalg.solve(gram[channels][:, channels], right)).sum())


def test_ziplm_removes_the_cheapest_unit_behind_a_refit_each_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ziplm, "_LAZY", 5)
    for each in setting.structures:
        x, w = setting.inputs[each.name], setting.matrix(each.name)
        gram = x.t() @ x
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        units, order, costs = list(range(each.count)), [], []
        while units:
            now = behind_a_refit(each, w, damped, units)
            cost = {
                unit: behind_a_refit(each, w, damped, [other for other in units if other != unit]) - now
                for unit in units
            }
            cheapest = min(cost, key=cost.__getitem__)
            order.append(cheapest)
            costs.append(cost[cheapest])
            units.remove(cheapest)
        scores = setting.score("ziplm", each)
        assert scores.argsort().tolist() == order
        rising = torch.tensor(costs, dtype=torch.float64).cummax(0).values
        torch.testing.assert_close(scores[order], rising, rtol=1e-6, atol=1e-9 * max(costs))


def test_ziplm_keeps_one_of_two_that_are_the_same() -> None:
    # to obs they are both for nothing: each can be made up for by the other
    def spoil(setting: Setting) -> None:
        mlp = setting.structures[1]
        for part in mlp.slices[1:]:
            rows = setting.module.get_parameter(part.tensor).data
            rows[part.entries[5]] = rows[part.entries[2]]
        setting.matrix(mlp.name)[:, [2, 5]] *= 10

    setting = Setting("llama", spoil=spoil)
    mlp = setting.structures[1]
    of_obs, of_ziplm = (setting.score(name, mlp, damping=1e-6) for name in ("obs", "ziplm"))
    assert set(of_obs.argsort()[:2].tolist()) == {2, 5}
    assert int(of_ziplm.argmin()) in (2, 5)
    assert max(of_ziplm[2], of_ziplm[5]) > of_ziplm.median()


@pytest.mark.parametrize("name", ["wanda-sp", "llm-bip", "obs", "ziplm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_whose_columns_are_zero_score_nothing(name: str, family: str) -> None:
    def spoil(setting: Setting) -> None:
        for each in setting.structures:
            setting.matrix(each.name)[:, each.inputs(torch.tensor([1]))] = 0

    setting = Setting(family, spoil=spoil)
    for each in setting.structures:
        scores = setting.score(name, each)
        assert float(scores[1]) == 0
        assert int(scores.argmin()) == 1


@pytest.mark.parametrize("name", ["numerical", "obs", "ziplm"])
def test_inputs_that_were_never_fed_come_last(name: str) -> None:
    def spoil(setting: Setting) -> None:
        mlp = setting.structures[1]
        for part in mlp.slices[1:]:
            setting.module.get_parameter(part.tensor).data[part.entries[5]] = 0

    setting = Setting("llama", spoil=spoil)
    scores = setting.score(name, setting.structures[1])
    assert int(scores.argmin()) == 5
    assert bool(torch.isfinite(scores).all())


def test_numerical_ranking_ignores_the_scale_of_inputs() -> None:
    setting = Setting("llama")
    each = setting.structures[1]
    part = find_part("unit-score", "numerical")
    stats = setting.statistics[each.name]
    scaled = {each.name: Statistics(stats.count, {"gram": stats.gram * 9})}
    first = part.function(setting.view(), each)
    second = part.function(setting.view(scaled), each)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


def test_llm_bip_bounds_what_a_relu_block_loses() -> None:
    # ReLU, no gate, no norm: the setting in which the paper's bound is one
    draw = torch.Generator().manual_seed(0)
    size, width, tokens = 6, 10, 30
    o, up, down = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in [(size, 8), (width, size), (size, width)]
    )
    x = torch.randn(tokens, 8, generator=draw, dtype=torch.float64)
    h = torch.randn(tokens, size, generator=draw, dtype=torch.float64)

    def block(inputs: Tensor) -> Tensor:
        after = h + inputs @ o.t()
        return after + (after @ up.t()).relu() @ down.t()

    whole = block(x)
    through = 1 + up.abs().t() @ down.abs().sum(0)
    bound = x.abs().sum(0) * (o.abs().t() @ through)
    for j in range(8):
        without = x.clone()
        without[:, j] = 0
        assert float((block(without) - whole).abs().sum()) <= float(bound[j]) * (1 + 1e-12)


def test_every_forward_score_is_tested_here() -> None:
    gradients = {name for name, part in parts("unit-score").items() if part.objective}
    coupled = {name for name, part in parts("unit-score").items() if part.coupled}  # tests/search has them
    assert set(parts("unit-score")) - gradients - coupled == {*FORWARD, "random"}
