"""Triton's norms, gates, rotations and cache writes: in its interpreter, or on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

pytest.importorskip("triton")

from octavo.kernels import (
    KV_WRITE,
    LAYER_NORM,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    ROTARY_KV_WRITE,
    Case,
)
from octavo.kernels.triton_gated_activations import triton_gelu_tanh_mul, triton_silu_mul
from octavo.kernels.triton_layer_norm import triton_layer_norm
from octavo.kernels.triton_rms_norm import triton_rms_norm
from octavo.kernels.triton_rotary_kv_write import (
    triton_kv_write,
    triton_qk_norm_rotary_kv_write,
    triton_rotary_kv_write,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bf16 off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 3e-2}
SHAPES = [(0, 16), (1, 1), (3, 100), (1, 4097)]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(poisoned, dtype, shape, with_residual):
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    residual = normal(*shape, dtype=dtype) if with_residual else None
    expected = RMS_NORM.reference(x, weight, 1e-5, residual)
    normed, hidden = triton_rms_norm(x, weight, 1e-5, residual)
    close(normed, expected[0])
    if dtype is torch.float32 or DEVICE == "cuda":
        assert torch.equal(hidden, expected[1])  # the sum is rounded once, in both
    close(hidden, expected[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(poisoned, dtype, shape, with_residual):
    x, weight, bias = (normal(*size, dtype=dtype) for size in (shape, shape[1:], shape[1:]))
    residual = normal(*shape, dtype=dtype) if with_residual else None
    copy = None if residual is None else residual.clone()
    expected = LAYER_NORM.reference(x, weight, bias, 1e-5, copy)
    normed, hidden = triton_layer_norm(x, weight, bias, 1e-5, residual)
    if dtype is torch.float32 or DEVICE == "cuda":
        torch.testing.assert_close(normed, expected[0], rtol=4e-3, atol=1e-5)
        assert torch.equal(hidden, expected[1])  # the sum is rounded once, in both
    close(hidden, expected[1])


def test_layer_norm_of_numbers_far_from_0(dtype):
    x, weight = normal(3, 100, dtype=torch.float32) + 1000, normal(100, dtype=torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    ours, _ = triton_layer_norm(x[:, 10:60], weight[10:60], weight[20:70], 1e-6)
    expected, _ = LAYER_NORM.reference(x[:, 10:60], weight[10:60], weight[20:70], 1e-6)
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_layer_norm_refuses_what_it_would_misread():
    x, weight = normal(4, 8, dtype=torch.float32), normal(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="dense rows"):
        triton_layer_norm(x.t(), weight[:4], weight[:4], 1e-5)
    with pytest.raises(ValueError, match="weight and bias"):
        triton_layer_norm(x, weight, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="one dtype"):
        triton_layer_norm(x, weight, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        triton_layer_norm(x, weight, weight, 1e-5, x[:, :7])


def test_rms_norm_reads_strided_rows(dtype):
    wide, weight = normal(5, 300, dtype=dtype), normal(100, dtype=dtype)
    ours, _ = triton_rms_norm(wide[:, 100:200], weight, 1e-6)
    close(ours, RMS_NORM.reference(wide[:, 100:200], weight, 1e-6)[0])


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_with_a_wide_weight(poisoned, with_residual):
    x, weight = normal(3, 100, dtype=torch.bfloat16), normal(100, dtype=torch.float32)
    residual = normal(3, 100, dtype=torch.bfloat16) if with_residual else None
    expected, _ = RMS_NORM.reference(x, weight, 1e-5, residual)
    close(triton_rms_norm(x, weight, 1e-5, residual)[0], expected)


def test_rms_norm_refuses_what_it_would_misread():
    x, weight = normal(4, 8, dtype=torch.float32), normal(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="dense rows"):
        triton_rms_norm(x.t(), weight[:4], 1e-5)
    with pytest.raises(ValueError, match="one dtype"):
        triton_rms_norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        triton_rms_norm(x, weight, 1e-5, x[:, :7])


GATES = [
    (triton_silu_mul, functional.silu),
    (triton_gelu_tanh_mul, partial(functional.gelu, approximate="tanh")),
]
gates = pytest.mark.parametrize(("gated", "activation"), GATES, ids=["silu", "gelu"])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # as below
@gates
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(poisoned, dtype, shape, gated, activation):
    x = 3 * normal(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = x.float().chunk(2, dim=1)
    close(gated(x), (activation(gate) * up).to(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # as it should, on its way to 0
@gates
def test_gates_saturate_without_nan(dtype, gated, activation):
    gate = torch.tensor([[-1e30, -200.0, -1.0, 0.0, 1.0, 200.0, 1e30]]).to(DEVICE, dtype)
    close(gated(torch.cat((gate, torch.ones_like(gate)), dim=1)), activation(gate))


@gates
def test_gates_refuse_an_odd_width(gated, activation):
    with pytest.raises(ValueError, match="2I"):
        gated(normal(2, 7, dtype=torch.float32))


class Step:
    """One fused qkv tensor, its three strided views, and a cache full of NaN."""

    def __init__(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        rotary_dim: int | None = None,
    ):
        self.sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.dim = dim
        self.qkv = normal(tokens, sum(self.sizes), dtype=dtype)
        self.angles = (
            torch.randint(0, 3000, (tokens,)).to(DEVICE),
            normal(3000, rotary_dim or dim, dtype=torch.float32).clamp(-1, 1),
        )
        self.slots = torch.randperm(5 * 16)[:tokens].to(DEVICE)
        shape = (2, 5, kv_heads, 16, dim)
        self.cache = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)

    def run(self, op, *more) -> tuple[Tensor, Tensor]:
        """What the op makes of copies of qkv (but for the keys there) and the cache."""
        qkv, cache = self.qkv.clone(), self.cache.clone()
        views = [part.unflatten(1, (-1, self.dim)) for part in qkv.split(self.sizes, dim=1)]
        if op in (KV_WRITE.reference, triton_kv_write):
            op(*views[1:], cache, self.slots)
        else:
            op(*views, *self.angles, cache, self.slots, *more)
        views[1].zero_()
        return qkv, cache

    def check(self, op, reference, *more) -> None:
        qkv, cache = self.run(op, *more)
        expected_qkv, expected_cache = self.run(reference, *more)
        close(qkv, expected_qkv)
        assert torch.equal(cache.isnan(), expected_cache.isnan())  # its slots and no other
        close(cache.nan_to_num(), expected_cache.nan_to_num())


HEADS = [(9, 3, 64), (4, 4, 80), (17, 1, 2)]


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rotation_and_cache_write(dtype, tokens, heads, kv_heads, dim):
    step = Step(tokens, heads, kv_heads, dim, dtype)
    step.check(triton_rotary_kv_write, ROTARY_KV_WRITE.reference)
    step.check(triton_kv_write, KV_WRITE.reference)


@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 2), (80, 20), (96, 72), (80, 78)])
def test_a_part_of_each_head_turns(dtype, dim, rotary_dim):
    step = Step(5, 9, 3, dim, dtype, rotary_dim=rotary_dim)
    step.check(triton_rotary_kv_write, ROTARY_KV_WRITE.reference)
    weights = normal(2, dim, dtype=dtype)
    with pytest.raises(ValueError, match="turns as a whole"):
        step.run(triton_qk_norm_rotary_kv_write, *weights, 1e-6)
    sizes = {"head_dim": dim, "rotary_dim": rotary_dim}
    passed_over = dict(QK_NORM_ROTARY_KV_WRITE.select(Case("cuda", dtype, sizes)).passed_over)
    assert f"{rotary_dim} of {dim} numbers" in passed_over["triton"]


@pytest.mark.parametrize("wide", [False, True], ids=["heads' dtype", "fp32"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_qk_norm(dtype, heads, kv_heads, dim, wide):
    weights = normal(2, dim, dtype=torch.float32 if wide else dtype)
    step = Step(5, heads, kv_heads, dim, dtype)
    step.check(triton_qk_norm_rotary_kv_write, QK_NORM_ROTARY_KV_WRITE.reference, *weights, 1e-6)


def test_the_writes_refuse_what_they_would_misread():
    step = Step(4, 4, 2, 32, torch.float32)
    query, key, value = (part.view(4, -1, 32) for part in step.qkv.split(step.sizes, dim=1))
    positions, cos_sin = step.angles
    given = {
        "one dtype": (query, key.bfloat16(), value, positions, cos_sin, step.cache, step.slots),
        "positions": (query, key, value, positions.int(), cos_sin, step.cache, step.slots),
        "fp32": (query, key, value, positions, cos_sin.double(), step.cache, step.slots),
        "slots": (query, key, value, positions, cos_sin, step.cache, step.slots[:3]),
        "kv_cache": (query, key, value, positions, cos_sin, step.cache[:, :, :1], step.slots),
    }
    for rule, arguments in given.items():
        with pytest.raises(ValueError, match=rule):
            triton_rotary_kv_write(*arguments)
    weight = torch.ones(31, device=DEVICE)
    right = (query, key, value, positions, cos_sin, step.cache, step.slots)
    with pytest.raises(ValueError, match="weights"):
        triton_qk_norm_rotary_kv_write(*right, weight, weight, 1e-6)
