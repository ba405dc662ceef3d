"""Norms, gates, kv_write and rotary_kv_write: compiled against reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels import (
    ACTIVATIONS,
    GELU_TANH_MUL,
    KV_WRITE,
    LAYER_NORM,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SILU_MUL,
    Case,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SHAPES = [(0, 16), (1, 1), (1, 576), (15, 100), (16, 64), (17, 4097), (1000, 576)]


def chosen(op, dtype):
    choice = op.select(Case("cpu", dtype))
    assert choice.name == "native"
    return choice.function


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_equals_its_reference(isa, dtype, shape, with_residual):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    residual = torch.randn(shape, dtype=dtype) if with_residual else None
    expected = RMS_NORM.reference(x, weight, 1e-5, residual)
    ours = chosen(RMS_NORM, dtype)(x, weight, 1e-5, residual)
    close(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])  # the sum is rounded once, in both


def test_rms_norm_reads_strided_rows(isa, dtype):
    wide = torch.randn(5, 300, dtype=dtype)
    weight = torch.randn(100, dtype=dtype)
    ours, _ = chosen(RMS_NORM, dtype)(wide[:, 100:200], weight, 1e-6)
    close(ours, RMS_NORM.reference(wide[:, 100:200], weight, 1e-6)[0])


def test_rms_norm_rounds_before_the_weight_as_transformers_does():
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(RMS_NORM.reference(x, weight, 1e-5)[0], weight * unit.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_with_a_wide_weight_equals_its_reference(isa, shape, with_residual):
    x, weight = torch.randn(shape).bfloat16(), torch.randn(shape[1])
    residual = torch.randn(shape).bfloat16() if with_residual else None
    expected = RMS_NORM.reference(x, weight, 1e-5, residual)
    ours = chosen(RMS_NORM, torch.bfloat16)(x, weight, 1e-5, residual)
    close(ours[0], expected[0])
    # Rounded once: nothing but the last bit of a few may differ, for the order of the sum.
    assert (ours[0] != expected[0]).sum() <= 0.01 * x.numel()
    assert torch.equal(ours[1], expected[1])


def test_rms_norm_with_a_wide_weight_rounds_after_it_as_transformers_does():
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    norm = modeling.Gemma2RMSNorm(576, eps=1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 576).bfloat16()
    ours, _ = RMS_NORM.reference(x, 1 + norm.weight.detach().float(), 1e-6)
    assert torch.equal(ours, norm(x))
    rounded, _ = RMS_NORM.reference(x, (1 + norm.weight.detach().float()).bfloat16(), 1e-6)
    assert not torch.equal(rounded, norm(x))


def test_rms_norm_refuses_what_it_would_misread(isa):
    norm = chosen(RMS_NORM, torch.float32)
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match="dense rows"):
        norm(x.t(), torch.randn(4), 1e-5)
    with pytest.raises(ValueError, match="weight"):
        norm(x, torch.randn(7), 1e-5)
    with pytest.raises(ValueError, match="one dtype"):
        norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        norm(x, weight, 1e-5, torch.randn(4, 9))
    with pytest.raises(TypeError, match="no compiled kernel"):
        norm(x.half(), weight.half(), 1e-5)


GATES = [(SILU_MUL, functional.silu), (GELU_TANH_MUL, partial(functional.gelu, approximate="tanh"))]
gates = pytest.mark.parametrize(("op", "activation"), GATES, ids=["silu", "gelu"])


@gates
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_equal_their_references(isa, dtype, shape, op, activation):
    x = 3 * torch.randn(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = x.float().chunk(2, dim=1)
    close(chosen(op, dtype)(x), (activation(gate) * up).to(dtype))
    close(op.reference(x.float()), activation(gate) * up)


@gates
def test_gates_saturate_without_nan(isa, dtype, op, activation):
    gate = torch.tensor([[-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30]], dtype=dtype)
    ours = chosen(op, dtype)(torch.cat((gate, torch.ones_like(gate)), dim=1))
    close(ours, activation(gate))


@gates
def test_gates_refuse_an_odd_width(isa, op, activation):
    with pytest.raises(ValueError, match=f"{op.name}.*2I"):
        chosen(op, torch.float32)(torch.randn(2, 7))


def fused_qkv(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype):
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    views = [part.view(tokens, -1, dim) for part in qkv.split(sizes, dim=1)]
    return qkv, views


@pytest.mark.parametrize("tokens", [1, 17, 600])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 2)])
def test_rotary_and_cache_write_equal_their_references(isa, dtype, tokens, heads, kv_heads, dim):
    qkv, views = fused_qkv(tokens, heads, kv_heads, dim, dtype)
    expected_qkv = qkv.clone()
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    expected_views = [part.view(tokens, -1, dim) for part in expected_qkv.split(sizes, dim=1)]
    angles = torch.randint(0, 3000, (tokens,)), torch.randn(3000, dim).clamp(-1, 1)
    slots = torch.randperm(50 * 16)[:tokens]
    cache = torch.full((2, 50, kv_heads, 16, dim), float("nan"), dtype=dtype)
    expected_cache, written = cache.clone(), cache.clone()

    ROTARY_KV_WRITE.reference(*expected_views, *angles, expected_cache, slots)
    chosen(ROTARY_KV_WRITE, dtype)(*views, *angles, cache, slots)
    close(qkv, expected_qkv)
    assert torch.equal(cache.isnan(), expected_cache.isnan())  # wrote its slots and no other
    close(cache.nan_to_num(), expected_cache.nan_to_num())

    chosen(KV_WRITE, dtype)(*views[1:], written, slots)  # of the keys as they are now: rotated
    torch.testing.assert_close(cache, written, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rotary_dim", [2, 20, 62])
def test_a_part_of_each_head_turns(isa, dtype, rotary_dim):
    qkv, cache = torch.randn(17, 8 * 64, dtype=dtype), torch.zeros(2, 3, 2, 16, 64, dtype=dtype)
    angles, slots = (torch.arange(17), torch.randn(64, rotary_dim)), torch.randperm(48)[:17]
    results = []
    for op in (chosen(ROTARY_KV_WRITE, dtype), ROTARY_KV_WRITE.reference):
        fused, written = qkv.clone(), cache.clone()
        views = [part.unflatten(1, (-1, 64)) for part in fused.split([256, 128, 128], dim=1)]
        op(*views, *angles, written, slots)
        results.append((views[0], written))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    before = qkv.unflatten(1, (-1, 64))
    ours, written = results[0]
    assert torch.equal(ours[..., rotary_dim:], before[:, :4, rotary_dim:])
    assert torch.equal(
        written[0, slots // 16, :, slots % 16][..., rotary_dim:], before[:, 4:6, rotary_dim:]
    )
    assert not torch.equal(ours[..., :rotary_dim], before[:, :4, :rotary_dim])


@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm_is_torchs_and_adds_over_the_residual(dtype, with_residual):
    norm = torch.nn.LayerNorm(100, eps=1e-3, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, residual = torch.randn(2, 7, 100, dtype=dtype)
    hidden = x + residual if with_residual else x.clone()
    given = residual if with_residual else None
    normed, stream = LAYER_NORM.reference(x, norm.weight, norm.bias, 1e-3, given)
    assert torch.equal(normed, norm(hidden)) and torch.equal(stream, hidden)
    assert stream.data_ptr() == (residual if with_residual else x).data_ptr()


def test_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 1001)
    for name, theirs in (("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")):
        torch.testing.assert_close(
            ACTIVATIONS[name].reference(x), ACT2FN[theirs](x), rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("wide", [False, True], ids=["heads' dtype", "fp32"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_qk_norm_equals_its_reference(isa, dtype, tokens, wide):
    qkv = torch.randn(tokens, 8 * 64, dtype=dtype)
    weights = torch.rand(2, 64).to(torch.float32 if wide else dtype)
    positions, cos_sin, slots = torch.arange(tokens), torch.rand(64, 64), torch.randperm(48)
    results = []
    for op in (chosen(QK_NORM_ROTARY_KV_WRITE, dtype), QK_NORM_ROTARY_KV_WRITE.reference):
        fused, cache = qkv.clone(), torch.zeros(2, 3, 2, 16, 64, dtype=dtype)
        views = [part.unflatten(1, (-1, 64)) for part in fused.split([256, 128, 128], dim=1)]
        op(*views, positions, cos_sin, cache, slots[:tokens], *weights, 1e-6)
        results.append((fused, cache))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_qk_norm_norms_each_head_and_then_turns_it():
    """Two pairs of equal numbers have a norm of 1 each; then a turn by 90 degrees."""
    query, key = torch.tensor([[[3.0, 3.0], [-5.0, 5.0]]]), torch.tensor([[[2.0, 2.0]]])
    cache = torch.zeros(2, 1, 1, 16, 2)
    QK_NORM_ROTARY_KV_WRITE.reference(
        query,
        key,
        key.clone(),
        torch.tensor([1]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        cache,
        torch.tensor([5]),
        torch.tensor([1.0, 10.0]),
        torch.tensor([1.0, 1.0]),
        0.0,
    )
    assert query.tolist() == [[[-10.0, 1.0], [-10.0, -1.0]]]
    assert key.tolist() == [[[-1.0, 1.0]]]
    assert cache[:, 0, 0, 5].tolist() == [[-1.0, 1.0], [2.0, 2.0]]


def test_kv_write_reference_puts_each_token_into_its_slot():
    key, value = torch.randn(2, 3, 2, 4)
    cache = torch.zeros(2, 2, 2, 16, 4)
    KV_WRITE.reference(key, value, cache, torch.tensor([17, 0, 31]))
    assert torch.equal(cache[0, 1, :, 1], key[0])
    assert torch.equal(cache[1, 1, :, 15], value[2])
    assert torch.count_nonzero(cache.sum(-1)) == 3 * 2 * 2


def test_rotary_turns_by_the_angle_of_the_position():
    """A head of one pair, turned by 90 degrees: (x, y) becomes (-y, x)."""
    query, key = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    cache = torch.zeros(2, 1, 1, 16, 2)
    angles = torch.tensor([1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    ROTARY_KV_WRITE.reference(query, key, key.clone(), *angles, cache, torch.tensor([5]))
    assert query.tolist() == [[[-2.0, 1.0]]]
    assert key.tolist() == [[[-4.0, 3.0]]]
    assert cache[:, 0, 0, 5].tolist() == [[-4.0, 3.0], [3.0, 4.0]]


def test_rotary_kv_write_refuses_what_it_would_misread(isa):
    op = chosen(ROTARY_KV_WRITE, torch.float32)
    _, (query, key, value) = fused_qkv(4, 4, 2, 32, torch.float32)
    positions, cos_sin, slots = torch.arange(4), torch.randn(10, 32), torch.arange(4)
    cache = torch.zeros(2, 2, 2, 16, 32)
    with pytest.raises(ValueError, match="one dtype"):
        op(query, key.bfloat16(), value, positions, cos_sin, cache, slots)
    with pytest.raises(ValueError, match="positions"):
        op(query, key, value, positions.int(), cos_sin, cache, slots)
    with pytest.raises(ValueError, match="fp32"):
        op(query, key, value, positions, cos_sin.double(), cache, slots)
    with pytest.raises(ValueError, match="slots"):
        op(query, key, value, positions, cos_sin, cache, slots[:3])
    with pytest.raises(ValueError, match="kv_cache"):
        op(query, key, value, positions, cos_sin, cache[:, :, :1], slots)
