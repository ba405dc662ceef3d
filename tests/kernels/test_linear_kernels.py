"""linear and linear_silu_mul: compiled against fp32 products, and the packed layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from octavo.kernels import LINEAR, LINEAR_SILU_MUL, SILU_MUL, Case

BF16 = torch.bfloat16
SIZES = [(1, 1), (16, 32), (17, 33), (100, 77), (130, 576), (576, 1536), (64, 2080), (40, 4100)]
ROWS = [0, 1, 2, 6, 7, 15, 16, 17, 33, 100, 129]


def compiled(op):
    choice = op.select(Case("cpu", BF16))
    assert choice.name == "native"
    return choice.function


def close(ours, expected):
    """Sums of many bf16 products: an error of some bf16 steps of the largest result."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=4e-3 * scale)


@pytest.mark.parametrize(("outputs", "width"), SIZES)
def test_linear_equals_the_fp32_product(isa, outputs, width):
    linear = compiled(LINEAR)
    weight, bias = torch.randn(outputs, width).to(BF16), torch.randn(outputs).to(BF16)
    prepared = linear.prepare(weight)
    assert (prepared.out_features, prepared.in_features) == (outputs, width)
    for rows in ROWS:
        x = torch.randn(rows, width).to(BF16)
        close(linear.apply(x, prepared, None), functional.linear(x.float(), weight.float()))
        with_bias = functional.linear(x.float(), weight.float(), bias.float())
        close(linear.apply(x, prepared, bias), with_bias)


def test_linear_of_a_long_prefill(isa):
    linear = compiled(LINEAR)
    x, weight = torch.randn(1025, 576).to(BF16), torch.randn(200, 576).to(BF16)
    expected = functional.linear(x.float(), weight.float())
    close(linear.apply(x, linear.prepare(weight), None), expected)


def test_a_row_does_not_depend_on_its_batch_beyond_rounding(isa):
    linear = compiled(LINEAR)
    prepared = linear.prepare(torch.randn(96, 320).to(BF16))
    x = torch.randn(40, 320).to(BF16)
    together = linear.apply(x, prepared, None).float()
    alone = torch.cat([linear.apply(x[i : i + 1], prepared, None) for i in range(40)]).float()
    torch.testing.assert_close(together, alone, rtol=8e-3, atol=2e-2)


@pytest.mark.parametrize("width", [64, 50])
def test_linear_reads_strided_rows_and_nothing_beside_them(isa, width):
    linear = compiled(LINEAR)
    wide = torch.full((9, 200), float("nan")).to(BF16)
    wide[:, 10 : 10 + width] = torch.randn(9, width).to(BF16)
    x, weight = wide[:, 10 : 10 + width], torch.randn(48, width).to(BF16)
    expected = functional.linear(x.float(), weight.float())
    close(linear.apply(x, linear.prepare(weight), None), expected)


@pytest.mark.parametrize(("outputs", "width"), SIZES)
def test_the_packed_weight_gives_back_the_plain_one(outputs, width):
    linear = compiled(LINEAR)
    weight = torch.randn(outputs, width).to(BF16)
    ids = torch.randint(0, outputs, (7,))
    for implementation in (linear, LINEAR.reference):
        prepared = implementation.prepare(weight)
        assert torch.equal(implementation.unpack(prepared), weight)
        assert torch.equal(implementation.gather_rows(prepared, ids), weight[ids])


def test_a_weight_that_is_a_view_is_packed_right(isa):
    linear = compiled(LINEAR)
    weight = torch.randn(64, 96).to(BF16).t()
    assert torch.equal(linear.unpack(linear.prepare(weight)), weight)


@pytest.mark.parametrize(("inner", "width"), [(16, 32), (20, 50), (33, 576), (160, 2100)])
def test_linear_silu_mul_equals_the_two_ops(isa, inner, width):
    fused = compiled(LINEAR_SILU_MUL)
    weight = torch.randn(2 * inner, width).to(BF16) / width**0.5
    prepared = fused.prepare(weight)
    assert (prepared.out_features, prepared.in_features) == (inner, width)
    for rows in (0, 1, 5, 17, 130):
        x = torch.randn(rows, width).to(BF16)
        expected = SILU_MUL.reference(functional.linear(x.float(), weight.float()))
        ours = fused.apply(x, prepared)
        torch.testing.assert_close(ours.float(), expected, rtol=3e-2, atol=2e-2)


def test_linear_silu_mul_reference_is_the_two_references():
    reference = LINEAR_SILU_MUL.reference
    x, weight = torch.randn(3, 8), torch.randn(10, 8)
    expected = SILU_MUL.reference(functional.linear(x, weight))
    assert torch.equal(reference.apply(x, reference.prepare(weight)), expected)


def test_linear_refuses_what_it_would_misread(isa):
    linear, fused = compiled(LINEAR), compiled(LINEAR_SILU_MUL)
    prepared = linear.prepare(torch.randn(16, 32).to(BF16))
    with pytest.raises(ValueError, match="32"):
        linear.apply(torch.randn(2, 31).to(BF16), prepared, None)
    with pytest.raises(ValueError, match="bf16"):
        linear.apply(torch.randn(2, 32), prepared, None)
    with pytest.raises(ValueError, match="dense rows"):
        linear.apply(torch.randn(32, 2).to(BF16).t(), prepared, None)
    with pytest.raises(ValueError, match="bias"):
        linear.apply(torch.randn(2, 32).to(BF16), prepared, torch.randn(15).to(BF16))
    with pytest.raises(ValueError, match="bf16"):
        linear.prepare(torch.randn(16, 32))
    with pytest.raises(ValueError, match="2I"):
        fused.prepare(torch.randn(15, 32).to(BF16))
    with pytest.raises(ValueError, match="dense rows"):
        fused.apply(torch.randn(2, 33).to(BF16), fused.prepare(torch.randn(32, 32).to(BF16)))
