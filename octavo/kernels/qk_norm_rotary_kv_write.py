"""QK-norm before the rotation and the cache write: what Qwen3 does to each query and key head.

Owns the op. What it adds to `rotary_kv_write` is an RMS norm over each head; the rest is there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.kernels.dispatch import Case, Op
from octavo.kernels.native.support import unsupported
from octavo.kernels.rms_norm import native_rms_norm, reference_rms_norm
from octavo.kernels.rotary_kv_write import native_rotary_kv_write, reference_rotary_kv_write
from octavo.kernels.triton_support import unsupported as unsupported_by_triton


class QkNormRotaryKvWrite(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        eps: float,
    ) -> None:
        """As RotaryKvWrite, after each head of query and key went through `RmsNorm`.

        query_weight and key_weight [D] are both in the heads' dtype, or both in fp32.
        """
        ...


def reference_qk_norm_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
) -> None:
    query.copy_(reference_rms_norm(query, query_weight, eps)[0])
    key.copy_(reference_rms_norm(key, key_weight, eps)[0])
    reference_rotary_kv_write(query, key, value, positions, cos_sin, kv_cache, slots)


def native_qk_norm_rotary_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
) -> None:
    """As QkNormRotaryKvWrite, by the two compiled ops that it is made of."""
    for heads, weight in ((query, query_weight), (key, key_weight)):
        rows = heads.reshape(-1, heads.shape[2])
        heads.copy_(native_rms_norm(rows, weight, eps)[0].view(heads.shape))
    native_rotary_kv_write(query, key, value, positions, cos_sin, kv_cache, slots)


def _unsupported_by_triton(case: Case) -> str | None:
    rotary_dim, head_dim = (case.sizes.get(name) for name in ("rotary_dim", "head_dim"))
    if rotary_dim != head_dim and rotary_dim is not None:
        return f"made for heads that turn as a whole, not {rotary_dim} of {head_dim} numbers"
    return unsupported_by_triton(case)


QK_NORM_ROTARY_KV_WRITE: Op[QkNormRotaryKvWrite] = Op(
    "qk_norm_rotary_kv_write", reference_qk_norm_rotary_kv_write
)
QK_NORM_ROTARY_KV_WRITE.register("native", native_qk_norm_rotary_kv_write, unsupported)
QK_NORM_ROTARY_KV_WRITE.register_module(
    "triton",
    "octavo.kernels.triton_rotary_kv_write:triton_qk_norm_rotary_kv_write",
    _unsupported_by_triton,
)
