"""linear: compiled against plain products, and the packed layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from octavo.kernels import LINEAR, Case

SIZES = [(1, 1), (16, 32), (17, 33), (100, 77), (130, 576), (576, 1536), (64, 2080), (40, 4100)]
ROWS = [0, 1, 2, 6, 7, 15, 16, 17, 33, 100, 129]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


def compiled(dtype):
    choice = LINEAR.select(Case("cpu", dtype))
    assert choice.name == "native"
    return choice.function


def close(ours, x, weight, bias=None):
    """To the product of the same numbers in fp64. Errors are relative to the largest result."""
    bias = None if bias is None else bias.double()
    expected = functional.linear(x.double(), weight.double(), bias)
    tolerance = TOLERANCE[ours.dtype]
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance / 2 * scale)


@pytest.mark.parametrize(("outputs", "width"), SIZES)
def test_linear_equals_the_product(isa, dtype, outputs, width):
    linear = compiled(dtype)
    weight, bias = torch.randn(outputs, width, dtype=dtype), torch.randn(outputs, dtype=dtype)
    prepared = linear.prepare(weight)
    assert (prepared.out_features, prepared.in_features) == (outputs, width)
    for rows in ROWS:
        x = torch.randn(rows, width, dtype=dtype)
        close(linear.apply(x, prepared, None), x, weight)
        close(linear.apply(x, prepared, bias), x, weight, bias)


def test_linear_of_a_long_prefill(isa, dtype):
    linear = compiled(dtype)
    x, weight = torch.randn(1025, 576, dtype=dtype), torch.randn(200, 576, dtype=dtype)
    close(linear.apply(x, linear.prepare(weight), None), x, weight)


@pytest.mark.parametrize("width", [64, 50])
def test_linear_reads_strided_rows_and_nothing_beside_them(isa, dtype, width):
    linear = compiled(dtype)
    wide = torch.full((9, 200), float("nan"), dtype=dtype)
    wide[:, 10 : 10 + width] = torch.randn(9, width, dtype=dtype)
    x, weight = wide[:, 10 : 10 + width], torch.randn(48, width, dtype=dtype)
    close(linear.apply(x, linear.prepare(weight), None), x, weight)


@pytest.mark.parametrize(("outputs", "width"), SIZES)
def test_the_packed_weight_gives_back_the_plain_one(dtype, outputs, width):
    weight = torch.randn(outputs, width, dtype=dtype)
    ids = torch.randint(0, outputs, (7,))
    for implementation in (compiled(dtype), LINEAR.reference):
        prepared = implementation.prepare(weight)
        assert torch.equal(implementation.unpack(prepared), weight)
        assert torch.equal(implementation.gather_rows(prepared, ids), weight[ids])


def test_a_weight_that_is_a_view_is_packed_right(isa, dtype):
    linear = compiled(dtype)
    weight = torch.randn(64, 96, dtype=dtype).t()
    assert torch.equal(linear.unpack(linear.prepare(weight)), weight)


def test_linear_refuses_what_it_would_misread(isa, dtype):
    linear = compiled(dtype)
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    prepared = linear.prepare(torch.randn(16, 32, dtype=dtype))
    with pytest.raises(ValueError, match="32"):
        linear.apply(torch.randn(2, 31, dtype=dtype), prepared, None)
    with pytest.raises(ValueError, match=f"{dtype}"):
        linear.apply(torch.randn(2, 32, dtype=other), prepared, None)
    with pytest.raises(ValueError, match="dense rows"):
        linear.apply(torch.randn(32, 2, dtype=dtype).t(), prepared, None)
    with pytest.raises(ValueError, match="bias"):
        linear.apply(torch.randn(2, 32, dtype=dtype), prepared, torch.randn(15, dtype=dtype))
    with pytest.raises(ValueError, match="bias"):
        linear.apply(torch.randn(2, 32, dtype=dtype), prepared, torch.randn(16, dtype=other))
    with pytest.raises(ValueError, match="bf16 or fp32"):
        linear.prepare(torch.randn(16, 32).half())
