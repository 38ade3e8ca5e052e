"""The module and the operator behind it: layouts, gradients, torch.compile, torch.export."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import prunekit
from prunekit.runtime.kernels import available, kernels_called, linear
from prunekit.runtime.linear import PackedLinear, packed_linear
from prunekit.runtime.packed import Packed


def pair(rows: int = 40, columns: int = 70, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    dense.weight *= torch.rand(rows, columns) < 0.5
    dense.weight += 0  # no -0
    return dense, PackedLinear(Packed.of(dense.weight), dense.bias)


def test_the_module_is_nn_linear() -> None:
    dense, packed = pair()
    for shape in ((70,), (1, 70), (2, 5, 70), (3, 2, 30, 70), (0, 70)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), dense(x))
    assert torch.equal(packed.unpacked(), dense.weight)
    assert repr(packed) == "PackedLinear(in_features=70, out_features=40, bias=True)"


@pytest.mark.parametrize("name", available())
def test_inputs_of_any_layout(name: str) -> None:
    dense, packed = pair()
    base = torch.randn(9, 141)
    for x in (base[:, 1:71], base[1::2, 1::2], base[:3, :70].t().contiguous().t(), base.flatten()[3:73]):
        torch.testing.assert_close(linear(packed.packed, x, dense.bias, kernels_called(name)), dense(x))


@pytest.mark.parametrize("name", available())
def test_weights_anywhere_in_memory(name: str) -> None:
    """As they lie in a file that is mapped: nothing is aligned to more than one entry."""
    dense, module = pair(dtype=torch.bfloat16)
    mask, values, offsets, columns = module.packed
    mask = torch.cat([mask.new_zeros(1), mask.flatten()])[1:].view(mask.shape)
    values = torch.cat([values[:1], values])[1:]
    x = torch.randn(3, columns).bfloat16()
    found = linear(Packed(mask, values, offsets, columns), x, dense.bias, kernels_called(name))
    torch.testing.assert_close(found, dense(x), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", available())
def test_what_is_not_finite_stays_so(name: str) -> None:
    weight = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])
    found = kernels_called(name).few_rows(Packed.of(weight), x, None)
    assert found[0, 1].isnan()
    assert found[1, 1].isinf()


def test_wrong_inputs_are_refused() -> None:
    _, packed = pair(dtype=torch.bfloat16)
    packed(torch.randn(1, 70))  # float32 is exact
    for x in (torch.randn(1, 71), torch.randn(1, 70).half()):
        with pytest.raises(prunekit.InputError, match=r"do not fit a packed weight of 70 columns of torch\.bfloat16"):
            packed(x)


def test_gradients_are_refused() -> None:
    _, packed = pair()
    x = torch.randn(1, 70, requires_grad=True)
    with pytest.raises(prunekit.InputError, match="packed weights have no gradients"):
        packed(x)
    with torch.no_grad():
        packed(x)


def test_copies_and_other_dtypes() -> None:
    dense, packed = pair()
    x = torch.randn(2, 70)
    again = copy.deepcopy(packed)
    packed.values.zero_()
    torch.testing.assert_close(again(x), dense(x))
    narrow = again.to(torch.bfloat16)
    torch.testing.assert_close(narrow(x.bfloat16()), dense.bfloat16()(x.bfloat16()), atol=0.05, rtol=0.02)


# the operator


def operands(module: PackedLinear) -> tuple[Any, ...]:
    return module.mask, module.values, module.offsets, module.bias


def test_the_operator_keeps_torchs_rules() -> None:
    _, packed = pair()
    for x in (torch.randn(2, 70), torch.randn(2, 3, 70)):
        torch.library.opcheck(packed_linear, (x, *operands(packed)))


def test_compiled_and_exported_it_is_one_operator() -> None:
    dense, packed = pair()
    x = torch.randn(2, 70)
    with torch.no_grad():
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), dense(x))
    program = torch.export.export(packed, (x,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.prunekit.linear.default]
    torch.testing.assert_close(program.module()(x), dense(x))


def test_the_operator_refuses_tensors_that_are_no_packed_weight() -> None:
    _, packed = pair()
    mask, values, offsets, bias = operands(packed)
    x = torch.randn(1, 70)
    for wrong in (
        (mask[:-1], values, offsets),
        (mask, values[:-1], offsets),
        (mask, values, offsets[:-1]),
        (mask.int(), values, offsets),
        (mask.t().contiguous().t(), values, offsets),
    ):
        with pytest.raises(prunekit.InputError, match="is damaged"):
            packed_linear(x, *wrong, bias)
