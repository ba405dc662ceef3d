"""Ops over tensors and scalars: one file each, with a readable reference and faster versions.

Knows neither models nor requests. A layer calls `OP.select(case)` once and keeps the function.
"""

from octavo.kernels.dispatch import Case, Choice, Op, reference_only
from octavo.kernels.kv_write import KV_WRITE
from octavo.kernels.linear import LINEAR, PreparedWeight
from octavo.kernels.linear_silu_mul import LINEAR_SILU_MUL
from octavo.kernels.paged_attention import PAGED_ATTENTION, AttentionBatch
from octavo.kernels.rms_norm import RMS_NORM
from octavo.kernels.rotary import ROTARY
from octavo.kernels.rotary_kv_write import ROTARY_KV_WRITE
from octavo.kernels.silu_mul import SILU_MUL

__all__ = [
    "KV_WRITE",
    "LINEAR",
    "LINEAR_SILU_MUL",
    "PAGED_ATTENTION",
    "RMS_NORM",
    "ROTARY",
    "ROTARY_KV_WRITE",
    "SILU_MUL",
    "AttentionBatch",
    "Case",
    "Choice",
    "Op",
    "PreparedWeight",
    "reference_only",
]
