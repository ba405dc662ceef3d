"""Ops over tensors and scalars: one file each, with a readable reference and faster versions.

Knows neither models nor requests. A layer calls `OP.select(case)` once and keeps the function.

Every compiled CPU op gives a row (a token) the same bits whatever other rows are in the call,
however many there are, and on however many threads. In attention a token's result depends on its
query and on the keys and values that it sees, and on nothing else: neither on other sequences nor
on how a prompt was cut into chunks. Other machines may round otherwise; references promise nothing.
The Triton ops on a GPU promise the same for other rows and sequences. Of attention they promise it
for cuts too, as long as no piece is so short that it goes to the kernel for decodes. Linears there
take what is fastest for the number of rows, and so do not, unless `batch_invariant` is asked for.
"""

from octavo.kernels.activations import ACTIVATIONS
from octavo.kernels.dispatch import Case, Choice, Op, reference_only
from octavo.kernels.encoder_attention import ENCODER_ATTENTION, Segments
from octavo.kernels.gated_activations import GELU_TANH_MUL, SILU_MUL
from octavo.kernels.gated_linear import GATED_LINEAR
from octavo.kernels.kv_write import KV_WRITE
from octavo.kernels.latent_attention import LATENT_ATTENTION, LATENT_KV_WRITE
from octavo.kernels.layer_norm import LAYER_NORM
from octavo.kernels.linear import LINEAR, PreparedWeight
from octavo.kernels.lora import LORA, LoRAShape
from octavo.kernels.moe_experts import MOE_EXPERTS
from octavo.kernels.moe_route import MOE_ROUTE, Routing
from octavo.kernels.paged_attention import PAGED_ATTENTION, PLAIN, AttentionBatch, AttentionKind
from octavo.kernels.prepare_inputs import (
    KNOWN_TO_THE_DEVICE,
    PREPARE_INPUTS,
    DeviceRows,
    PreparedInputs,
    StepShares,
)
from octavo.kernels.qk_norm_rotary_kv_write import QK_NORM_ROTARY_KV_WRITE
from octavo.kernels.record_draws import NO_SUCH_ID, NOT_FINITE, RECORD_DRAWS
from octavo.kernels.rms_norm import RMS_NORM
from octavo.kernels.rotary_kv_write import ROTARY_KV_WRITE
from octavo.kernels.sample_tokens import SAMPLE_TOKENS, DrawOptions

__all__ = [
    "ACTIVATIONS",
    "ENCODER_ATTENTION",
    "GATED_LINEAR",
    "GELU_TANH_MUL",
    "KNOWN_TO_THE_DEVICE",
    "KV_WRITE",
    "LAYER_NORM",
    "LATENT_ATTENTION",
    "LATENT_KV_WRITE",
    "LINEAR",
    "LORA",
    "MOE_EXPERTS",
    "MOE_ROUTE",
    "NOT_FINITE",
    "NO_SUCH_ID",
    "PAGED_ATTENTION",
    "PLAIN",
    "PREPARE_INPUTS",
    "QK_NORM_ROTARY_KV_WRITE",
    "RECORD_DRAWS",
    "RMS_NORM",
    "ROTARY_KV_WRITE",
    "SAMPLE_TOKENS",
    "SILU_MUL",
    "AttentionBatch",
    "AttentionKind",
    "Case",
    "Choice",
    "DeviceRows",
    "DrawOptions",
    "LoRAShape",
    "Op",
    "PreparedInputs",
    "PreparedWeight",
    "Routing",
    "Segments",
    "StepShares",
    "reference_only",
]
