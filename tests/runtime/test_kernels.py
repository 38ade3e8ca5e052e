"""Every kernel that runs here against float64, over random shapes, densities and layouts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.runtime import kernels
from prunekit.runtime.kernels import add_gram, available, kernels_called, linear, unpacked
from prunekit.runtime.packed import Packed

KERNELS = available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# sums are float32; what is left is the rounding of the result
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 70)),
        "columns": draw(st.one_of(st.integers(1, 200), st.sampled_from([31, 32, 33, 63, 64, 65, 128, 576, 1000]))),
        "batch": draw(st.integers(1, 40)),
        "density": draw(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0])),
        "empty": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def weight_of(rows: int, columns: int, density: float, empty: bool, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
    if empty:
        weight[torch.rand(rows) < 0.3] = 0
    return weight.to(dtype) + 0  # + 0: no -0


def close(found: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    limit = TOLERANCE[x.dtype] * exact.abs() + 2e-6 * size + 1e-7
    assert bool(((found.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_products_are_those_of_float64(name: str, dtype: torch.dtype, problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    weight = weight_of(problem["rows"], problem["columns"], problem["density"], problem["empty"], dtype)
    x = torch.randn(problem["batch"], problem["columns"]).to(dtype)
    bias = torch.randn(problem["rows"]).to(dtype) if problem["bias"] else None
    packed, kernels = Packed.of(weight), kernels_called(name)
    assert torch.equal(unpacked(packed, kernels), weight)
    close(kernels.few_rows(packed, x, bias), weight, x, bias)
    close(linear(packed, x, bias, kernels), weight, x, bias)
    close(linear(packed, x.float(), None if bias is None else bias.float(), kernels), weight, x.float(), bias)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 1100), width=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_gram_matrices_are_those_of_float64(tokens: int, width: int, seed: int) -> None:
    if "avx512-bf16" not in KERNELS:
        pytest.skip("this processor has no products of bfloat16 with float32 sums")
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    gram = torch.zeros(width, width)
    assert add_gram(gram, x)
    exact = x.double().T @ x.double()
    size = x.double().abs().T @ x.double().abs()
    assert bool(((gram.double() - exact).abs().tril() <= 1e-5 * size).all())
    again = torch.zeros(width, width)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert add_gram(again, x)
    torch.set_num_threads(threads)
    assert torch.equal(again.tril(), gram.tril()), "sums do not depend on the number of threads"


def test_gram_matrices_of_other_inputs_or_with_other_kernels_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = torch.zeros(3, 3)
    assert not add_gram(gram, torch.ones(2, 3))
    monkeypatch.setattr(kernels, "chosen", kernels.TorchKernels)
    assert not add_gram(gram, torch.ones(2, 3).bfloat16())
    assert not gram.any()


def test_the_kernel_of_gram_matrices_is_named_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single, processor = torch.bfloat16, torch.float32, torch.device("cpu")
    for name in KERNELS:
        monkeypatch.setattr(kernels, "chosen", lambda name=name: kernels_called(name))
        assert kernels.gram_kernel(half, processor) == (name if name == "avx512-bf16" else "torch")
        assert {kernels.gram_kernel(single, processor), kernels.gram_kernel(half, torch.device("cuda"))} == {"torch"}


@pytest.mark.parametrize("name", KERNELS)
def test_large_weights_go_in_parts_and_tiles(name: str) -> None:
    torch.manual_seed(0)
    weight = weight_of(1100, 2100, 0.5, True, torch.bfloat16)
    packed, kernels = Packed.of(weight), kernels_called(name)
    for rows in (1, 11, 60):
        x = torch.randn(rows, 2100).bfloat16()
        bias = torch.randn(1100).bfloat16()
        close(linear(packed, x, bias, kernels), weight, x, bias)


def test_several_callers_at_a_time() -> None:
    """As in a server: every one of them has tiles of its own."""
    torch.manual_seed(0)
    problems = [(weight_of(90, 130, 0.5, False, torch.float32), torch.randn(200, 130)) for _ in range(4)]
    packed = [Packed.of(weight) for weight, _ in problems]

    def solve(number: int) -> None:
        place = number % len(problems)
        weight, x = problems[place]
        close(linear(packed[place], x, None), weight, x, None)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(solve, range(80)))
