"""The sums over calibration tokens, against loops over tokens and channels in Python's own float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.statistics import INPUT_SUMS, OUTPUT_SUMS, Collector, Statistics

ALL = INPUT_SUMS | OUTPUT_SUMS


pytestmark = pytest.mark.usefixtures("seeded")


def slow_sums(inputs: Tensor, outputs: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
    """Every sum by its definition: one token after the other, one channel after the other."""
    xs = [x for x, real in flat(inputs, keep) if real]
    ys = [y for y, real in flat(outputs, keep) if real]
    width = inputs.shape[-1]
    sums = {
        "input_sum": [math.fsum(x[j] for x in xs) for j in range(width)],
        "input_square": [math.fsum(x[j] ** 2 for x in xs) for j in range(width)],
        "input_abs": [math.fsum(abs(x[j]) for x in xs) for j in range(width)],
        "output_square": [math.fsum(y[i] ** 2 for y in ys) for i in range(outputs.shape[-1])],
        "gram": [[math.fsum(x[i] * x[j] for x in xs) for j in range(width)] for i in range(width)],
    }
    windows = inputs if inputs.ndim == 3 else inputs[None]
    kept = [None] * len(windows) if keep is None else list(keep)
    of_window = [
        [x for x, real in flat(window, real_ones) if real] for window, real_ones in zip(windows, kept, strict=True)
    ]
    sums["window_abs"] = [
        math.fsum((math.fsum(abs(x[j]) for x in window) / len(window)) ** 2 for window in of_window if window)
        for j in range(width)
    ]
    middle = windows.shape[1] // 2
    firsts = [
        [x for x, real in flat(window[:middle], None if some_real is None else some_real[:middle]) if real]
        for window, some_real in zip(windows, kept, strict=True)
    ]
    sums["half_gram"] = [
        [math.fsum(x[i] * x[j] for window in firsts for x in window) for j in range(width)] for i in range(width)
    ]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}


def flat(values: Tensor, keep: Tensor | None) -> list[tuple[list[float], bool]]:
    real = torch.ones(values.shape[:-1], dtype=torch.bool) if keep is None else keep
    return list(zip(values.double().flatten(0, -2).tolist(), real.flatten().tolist(), strict=True))


def assert_sums(found: Statistics, inputs: Tensor, outputs: Tensor, keep: Tensor | None, rtol: float = 2e-6) -> None:
    expected = slow_sums(inputs, outputs, keep)
    # Where signs cancel, rounding is relative to what was added up, not to what is left.
    largest = expected["input_abs"].max().item()
    for name, value in expected.items():
        square = rtol * expected["input_square"].max().item()
        atol = {"input_sum": rtol * largest, "gram": square, "half_gram": square}.get(name, 1e-30)
        torch.testing.assert_close(
            getattr(found, name).double(), value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert found.count == (math.prod(inputs.shape[:-1]) if keep is None else int(keep.sum()))


def measure(
    module: nn.Module, inputs: Tensor, keep: Tensor | None = None, batch: int = 1000, needs: frozenset[str] = ALL
) -> Statistics:
    with Collector({"linear": module}, needs) as collector, torch.inference_mode():
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            collector.keep = None if keep is None else keep[part]
            module(inputs[part])
            collector.end_batch()
    return collector.statistics()["linear"]


@settings(deadline=None, max_examples=40, database=None)
@given(
    windows=st.integers(1, 3),
    length=st.integers(1, 5),
    width=st.integers(1, 5),
    out=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    padded=st.booleans(),
    double=st.booleans(),
)
def test_every_sum_is_its_definition(
    windows: int, length: int, width: int, out: int, batch: int, seed: int, padded: bool, double: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    inputs = torch.randn(windows, length, width, generator=draw).to(dtype)
    keep = torch.rand(windows, length, generator=draw) < 0.6 if padded else None
    module = nn.Linear(width, out, dtype=dtype)  # its bias belongs to the output
    outputs = module(inputs).detach()
    found = measure(module, inputs, keep, batch)
    assert_sums(found, inputs, outputs, keep, 1e-12 if double else 2e-6)


@settings(deadline=None, max_examples=40, database=None)
@given(
    windows=st.integers(1, 3),
    length=st.integers(1, 5),
    width=st.integers(1, 5),
    out=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    padded=st.booleans(),
)
def test_targets_are_what_the_linear_gave_before(
    windows: int, length: int, width: int, out: int, batch: int, seed: int, padded: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    dense, ours = (torch.randn(windows, length, width, generator=draw) for _ in range(2))
    keep = torch.rand(windows, length, generator=draw) < 0.6 if padded else None
    module = nn.Linear(width, out)  # its bias does not belong to the target
    needs = frozenset({"gram", "target", "half_gram", "half_target"})
    with Collector({"linear": module}, needs) as collector, torch.inference_mode():
        for start in range(0, windows, batch):
            part = slice(start, start + batch)
            collector.keep = None if keep is None else keep[part]
            collector.windows = len(ours[part])
            with collector.following():
                module(dense[part])
            module(ours[part])
            collector.end_batch()
    found = collector.statistics()["linear"]
    sums, halves = torch.zeros(2, out, width, dtype=torch.float64)
    for window in range(windows):
        for token in range(length):
            if keep is None or keep[window, token]:
                wanted = module.weight.detach().double() @ dense[window, token].double()
                product = torch.outer(wanted, ours[window, token].double())
                sums += product
                halves += product if token < length // 2 else 0
    torch.testing.assert_close(found.target.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.half_target.double(), halves, rtol=1e-5, atol=1e-5)
    assert found.count == (windows * length if keep is None else int(keep.sum()))


def test_long_streams_batch_size_and_order_do_not_matter_beyond_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(9, 150, 6, generator=draw)  # 1,350 tokens, several times what is summed at a time
    keep = torch.rand(9, 150, generator=draw) < 0.8
    module = nn.Linear(6, 4)
    whole = measure(module, inputs, keep)
    assert_sums(whole, inputs, module(inputs).detach(), keep)
    order = torch.randperm(9, generator=draw)
    for batch in (1, 2, 9):
        other = measure(module, inputs[order], keep[order], batch)
        assert other.count == whole.count
        for name in sorted(ALL):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=2e-6, atol=1e-3)


def test_padding_does_not_count_whatever_stands_there() -> None:
    inputs = torch.randn(2, 4, 3)
    keep = torch.tensor([[True, True, False, False], [False, True, True, True]])
    module = nn.Linear(3, 2)
    clean = measure(module, inputs, keep)
    poisoned = inputs.clone()
    poisoned[~keep] = float("nan")
    dirty = measure(module, poisoned, keep)
    assert clean.count == dirty.count == 5
    assert all(torch.equal(getattr(clean, name), getattr(dirty, name)) for name in ALL)


def test_vectors_are_float64_and_the_norm_is_the_root() -> None:
    inputs = torch.tensor([[[3.0, 0.0], [4.0, 2.0]]])
    found = measure(nn.Linear(2, 2, bias=False), inputs)
    assert found.input_norm.tolist() == [5.0, 2.0]
    for name in ALL - {"gram", "half_gram"}:
        assert getattr(found, name).dtype == torch.float64
    assert found.gram.dtype == found.half_gram.dtype == torch.float32
    narrow = found.to(torch.float32)
    assert narrow.input_square.dtype == torch.float32
    assert narrow.count == found.count == 2


def test_bias_is_part_of_the_output() -> None:
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(10.0)
    assert measure(module, torch.tensor([[[1.0], [3.0]]])).output_square.tolist() == [12.0**2 + 16.0**2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_added_up_precisely(dtype: torch.dtype) -> None:
    # 20,000 tokens around 1: summed in bfloat16 the sum would stick at 256.
    inputs = (1 + 0.3 * torch.randn(10, 2000, 2, generator=torch.Generator().manual_seed(0))).to(dtype)
    module = nn.Linear(2, 2, dtype=dtype)
    found = measure(module, inputs, batch=2)
    assert_sums(found, inputs, module(inputs).detach(), None, rtol=1e-6)


@pytest.mark.parametrize("width", [100, 600])
def test_wide_gram_matrices_of_half_precision_are_whole(width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = (1 + torch.randn(5, 30, width, generator=draw)).bfloat16()
    keep = torch.rand(5, 30, generator=draw) < 0.8
    found = measure(nn.Linear(width, 1, dtype=torch.bfloat16), inputs, keep, batch=2)
    for name, length in (("gram", 30), ("half_gram", 15)):
        real = inputs[:, :length][keep[:, :length]].double()
        gram = getattr(found, name)
        torch.testing.assert_close(gram.double(), real.t() @ real, rtol=1e-5, atol=1e-4)
        assert torch.equal(gram, gram.t())


class Block(nn.Module):
    """A decoder layer as far as sharing goes: q, k and v see one tensor; gate and up another; o and down their own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down", "unused"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.o(self.q(hidden) * self.k(hidden) + self.v(hidden))
        hidden = hidden.tanh()
        result: Tensor = self.down(self.gate(hidden) * self.up(hidden))
        return result


SHARED = [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]


def test_linears_that_are_fed_the_same_tensor_share_its_sums() -> None:
    block = Block()
    linears = {name: module for name, module in block.named_children() if name != "unused"}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen[name].append(args[0]))
    with Collector(linears, ALL) as collector, torch.inference_mode():
        for batch in torch.randn(3, 2, 5, 4):
            block(batch)
            collector.end_batch()
    found = collector.statistics()
    for group in SHARED:
        for name in group:
            inputs = torch.cat(seen[name])
            assert_sums(found[name], inputs, linears[name](inputs).detach(), None)
            for other in linears:
                shared = found[name].input_square is found[other].input_square
                assert shared == (other in group), f"{name} and {other}"
            assert found[name].count == 3 * 2 * 5, "shared, not counted once for each"


def test_an_equal_copy_is_not_the_same_tensor() -> None:
    linears = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    inputs = torch.randn(1, 4, 3)
    with Collector(linears, {"input_square"}) as collector, torch.inference_mode():
        linears["a"](inputs)
        linears["b"](inputs.clone())
    found = collector.statistics()
    assert found["a"].input_square is not found["b"].input_square
    assert torch.equal(found["a"].input_square, found["b"].input_square)


def test_batches_do_not_mix_though_memory_is_used_again() -> None:
    # `a` and `b` never see the same tensor, but without `end_batch` a recycled object would look like one.
    linears = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    with Collector(linears, {"input_sum"}) as collector, torch.inference_mode():
        for number in range(20):
            linears["a"](torch.full((1, 1, 3), 1.0 + number))
            linears["b"](torch.full((1, 1, 3), -1.0 - number))
            collector.end_batch()
    found = collector.statistics()
    assert found["a"].input_sum.tolist() == [210.0] * 3
    assert found["b"].input_sum.tolist() == [-210.0] * 3


def test_only_what_is_needed_is_measured() -> None:
    found = measure(nn.Linear(3, 2), torch.randn(1, 4, 3), needs=frozenset({"input_abs"}))
    assert found.count == 4
    assert found.input_abs.shape == (3,)
    for name in ALL - {"input_abs"}:
        with pytest.raises(PrunekitError, match=f"'{name}' was not measured: .*needs={{'{name}'}}"):
            getattr(found, name)
    with pytest.raises(PrunekitError, match="'input_square' was not measured"):
        _ = found.input_norm
    nothing = measure(nn.Linear(3, 2), torch.randn(1, 4, 3), needs=frozenset())
    with pytest.raises(PrunekitError, match="not measured"):
        _ = nothing.input_abs


def test_an_unknown_need_is_refused() -> None:
    with pytest.raises(PrunekitError, match=r"unknown statistics \['input_cube'\]: known are .*'input_square'"):
        Collector({}, {"input_square", "input_cube"})


def test_a_linear_that_is_never_called_is_refused() -> None:
    block = Block()
    with Collector(dict(block.named_children()), {"input_square"}) as collector, torch.inference_mode():
        block(torch.randn(1, 2, 4))
    with pytest.raises(PrunekitError, match="linear 'unused' was never called"):
        collector.statistics()


def test_hooks_are_gone_afterwards_even_after_an_exception() -> None:
    module = nn.Linear(3, 2)
    collector = Collector({"linear": module}, ALL)

    def fail_inside() -> None:
        with collector:
            module(torch.randn(1, 2, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    module(torch.randn(1, 2, 3))
    assert collector.statistics()["linear"].count == 2


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("padded", [False, True])
def test_samples_are_the_last_real_inputs_of_the_last_window(kind: str, padded: bool) -> None:
    module = Conv1D(4, 3) if kind == "conv1d" else nn.Linear(3, 4, bias=kind == "linear")
    inputs = torch.randn(3, 7, 3)
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[2, 5:] = False
    keep[2, 2] = False
    with Collector({"linear": module}, set()) as collector, torch.inference_mode():
        for part, tokens in ((slice(0, 2), 0), (slice(2, 3), 4)):  # asked for in the last batch only
            collector.keep = keep[part] if padded else None
            collector.sample_tokens, collector.windows = tokens, len(inputs[part])
            module(inputs[part])
            collector.end_batch()
    chosen = [0, 1, 3, 4] if padded else [3, 4, 5, 6]
    assert torch.equal(collector.sample("linear"), inputs[2, chosen])


def test_samples_of_inputs_flattened_to_one_axis() -> None:
    # what an OPT block feeds its fc1: [windows * length, width]
    module, inputs = nn.Linear(3, 2), torch.randn(2, 5, 3)
    with Collector({"linear": module}, set()) as collector, torch.inference_mode():
        collector.sample_tokens, collector.windows = 256, 2
        module(inputs.reshape(-1, 3))
    assert torch.equal(collector.sample("linear"), inputs[1])


def test_a_sample_larger_than_the_window_is_the_window_and_sharers_share_it() -> None:
    linears = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    inputs = torch.randn(2, 5, 3)
    with Collector(linears, set()) as collector, torch.inference_mode():
        collector.sample_tokens, collector.windows = 256, 2
        for module in linears.values():
            module(inputs)
    assert torch.equal(collector.sample("a"), inputs[1])
    assert collector.sample("b") is collector.sample("a")
