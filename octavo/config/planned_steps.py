"""The largest step that the limits allow: which tensors are alive at the moments that need most.

Owns the arithmetic of activations as our layers and kernels lay them out. Knows no torch.
"""

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass

from octavo.config.lora import LORA_ROWS, LoRAConfig, adapted_products, num_splits
from octavo.config.model import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from octavo.config.planned_weights import PACKED_DEPTH_STEP
from octavo.config.resolve import DTYPE_BYTES, ResolvedConfig

FP32, FP64, INT64 = 4, 8, 8  # bytes

_WRITE_OPS = {"kv_write", "rotary_kv_write", "qk_norm_rotary_kv_write"}
_NORM_OPS = {"rms": "rms_norm", "layer": "layer_norm"}  # by `ModelConfig.norm`
_MOE_OPS = {"moe_route", "moe_experts"}
_GATE_OPS = {"silu": "silu_mul", "gelu_tanh": "gelu_tanh_mul"}
_SMALL_OPS = {"rms_norm", *_GATE_OPS.values(), *_WRITE_OPS}
# Ops that have a compiled version, by device (`Op.names` knows them, but needs torch). A compiled
# op allocates its result and nothing else; a reference in plain torch also holds the intermediate
# values that its moments below list.
COMPILED_OPS: dict[str, frozenset[str]] = {
    "cpu": frozenset({"linear", "paged_attention", "moe_experts", *_SMALL_OPS}),
    "cuda": frozenset(
        {
            "linear",
            "paged_attention",
            "sample_tokens",
            "layer_norm",
            "encoder_attention",
            "latent_attention",
            *_MOE_OPS,
            *_SMALL_OPS,
        }
    ),
}

# Of `octavo.kernels.gated_linear`: steps with more rows and as many results make no [T, 2I].
MOST_ROWS_APART, LEAST_RESULTS = 1024, 1 << 22
HOPPER = 9  # major compute capability
# Of `octavo.kernels.triton_decode_attention`: a context is cut into so many, each with sums of so
# many rows, until all of a step would be more than this.
SPLITS, SPLIT_ROWS, MOST_PART_SUMS = 32, 16, (32 << 20) // FP32


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that is alive at some moment of a step."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Its storage."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of the step where memory may be highest, and what is alive there."""

    name: str
    tensors: tuple[LiveTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Sum over the tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def expected_ops(config: ResolvedConfig, *, major: int = 0) -> frozenset[str]:
    """The model's ops that should run compiled: by device and dtype, for shapes they support.

    Args:
        config: as `resolve` made it.
        major: the compute capability of a GPU.
    """
    if config.device == "cpu" and config.dtype not in PACKED_DEPTH_STEP:
        return frozenset()
    if config.model.is_bridged:
        return COMPILED_OPS[config.device] & {"paged_attention", "sample_tokens"}
    if config.model.is_encoder:
        return COMPILED_OPS[config.device] & {"linear", "layer_norm", "encoder_attention"}
    layers = config.model.layers
    of_others = _WRITE_OPS - {_write_op(layer.attention) for layer in layers}
    mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MoEConfig)]
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, MLPConfig)]
    dense += [mixture.shared for mixture in mixtures if mixture.shared is not None]
    of_others |= set() if mixtures else _MOE_OPS
    latent = {isinstance(layer.attention, LatentAttentionConfig) for layer in layers}
    of_others |= set() if config.model.vision is not None else {"encoder_attention"}
    of_others |= set() if True in latent else {"latent_attention"}
    of_others |= set() if False in latent else {"paged_attention"}
    gated = [mlp for mlp in dense if mlp.gated]
    gates = {_GATE_OPS[mlp.activation] for mlp in gated}
    of_others |= set(_GATE_OPS.values()) - gates
    of_others |= set(_NORM_OPS.values()) - {_NORM_OPS[config.model.norm]}
    ops = COMPILED_OPS[config.device] - of_others
    has_bias = any(mlp.bias for mlp in gated)
    is_other = has_bias or gates != {"silu_mul"}
    is_other |= config.lora is not None  # adapters add to the product before its gate
    apart = config.batch_invariant or is_other or config.dtype == "float32"
    return ops if major != HOPPER or apart else ops | {"gated_linear"}


def _write_op(attention: AttentionConfig) -> str:
    """The op that rotates queries and keys and writes the KV cache."""
    if isinstance(attention, LatentAttentionConfig):
        return "latent_kv_write"
    if attention.rope is None:
        return "kv_write"
    return "qk_norm_rotary_kv_write" if attention.qk_norm else "rotary_kv_write"


def largest_step(config: ResolvedConfig) -> tuple[int, int]:
    """(tokens, sequences) of the largest step that the limits allow."""
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    return min(config.max_num_batched_tokens, num_seqs * config.max_model_len), num_seqs


def plan_moments(config: ResolvedConfig, compiled: Set[str]) -> tuple[Moment, ...]:
    """The moments of the largest step where memory may be highest.

    Each sequence has an equal share of the tokens and draws its next one at a temperature. That is
    the step which a GPU engine runs before it sizes its KV cache. Left out are a few numbers for
    each token (ids, positions, slots), what kernels allocate past torch, and what `logprobs` and
    filters of the distribution add to a draw.
    """
    if config.model.is_encoder:
        return _encoder_moments(config, compiled)
    num_tokens, num_rows = largest_step(config)
    size = DTYPE_BYTES[config.dtype]
    stream = (num_tokens, config.model.hidden_size)
    # The decoder's loop holds the block's arguments while the block runs. A norm adds to the
    # residual in place, all but the RMS norm in plain torch, which makes a new one.
    held = [LiveTensor("block's input", stream, size), LiveTensor("residual", stream, size)]
    in_plain_torch = config.model.norm == "rms" and "rms_norm" not in compiled
    if in_plain_torch:
        held.append(LiveTensor("residual before the norm", stream, size))
    for rope in config.model.ropes:
        if rope.sections:
            held.append(LiveTensor("angles of each token", (num_tokens, rope.rotary_dim), FP32))
    chunk = -(-num_tokens // num_rows)
    is_wide = config.model.zero_centered_norms  # their weights are in fp32
    moments = [_reference_norm(stream, size, held, is_wide)] if in_plain_torch else []
    for layer in config.model.kinds_of_layers:
        if isinstance(layer.attention, LatentAttentionConfig):
            moments += _latent_moments(config, layer.attention, held, chunk, compiled)
        else:
            moments += _attention_moments(config, layer.attention, held, chunk, compiled)
        if isinstance(layer.mlp, MoEConfig):
            moments += _experts_moments(config, layer.mlp, held, compiled)
        else:
            beside = [LiveTensor("attention's output", stream, size)] if layer.parallel else []
            moments.append(_mlp_moment(config, layer.mlp, held + beside, compiled))
        if config.lora is not None:
            moments += _adapter_moments(config, config.lora, layer, held)
    return (*moments, _draw_moment(config, num_rows, compiled))


def _encoder_moments(config: ResolvedConfig, compiled: Set[str]) -> tuple[Moment, ...]:
    """As `plan_moments`, where each sequence has an equal share of the tokens and becomes a vector.

    Norms come behind, and write over the stream that they add to.
    """
    (num_tokens, num_rows), size = largest_step(config), DTYPE_BYTES[config.dtype]
    stream = (num_tokens, config.model.hidden_size)
    held = [
        LiveTensor("block's input", stream, size),
        LiveTensor("ids, positions, slots", (3, num_tokens), INT64),
    ]
    moments = []
    for layer in config.model.kinds_of_layers:
        heads = layer.attention.num_heads * layer.attention.head_dim
        tensors = [
            LiveTensor("queries, keys, values", (3, num_tokens, heads), size),
            LiveTensor("attended values", (num_tokens, heads), size),
        ]
        if "encoder_attention" not in compiled:
            one = (-(-num_tokens // num_rows), heads)
            tensors.append(LiveTensor("those of one sequence", one, size))
        moments.append(Moment("attention", (*held, *tensors)))
        if isinstance(layer.mlp, MLPConfig):
            moments.append(_mlp_moment(config, layer.mlp, held, frozenset()))
    return tuple(moments)


def num_scored_at_once(config: ResolvedConfig) -> int:
    """Prompt tokens whose log-probabilities can be found at once in what is planned anyway.

    When they are scored, the tensors of the step's blocks are gone, and the peak of the largest
    step is free but for the hidden states.
    """
    num_tokens, _ = largest_step(config)
    size = DTYPE_BYTES[config.dtype]
    moments = plan_moments(config, expected_ops(config, major=HOPPER))
    room = max(moment.num_bytes for moment in moments)
    room -= num_tokens * config.model.hidden_size * size
    # Logits, the same in fp32 where they are not, their log-softmax, and which are likelier.
    each = config.model.vocab_size * (size + FP32 * (size != FP32) + FP32 + 1)
    return min(max(room // each, 1), num_tokens)


def _reference_norm(
    stream: tuple[int, int], size: int, held: list[LiveTensor], is_wide: bool
) -> Moment:
    # In fp32 there is nothing to convert: the wide copy and the rounded one are views.
    copies = 1 if size == FP32 else 2
    after = LiveTensor("rounded, and times the weight", (copies, *stream), size)
    if is_wide and size != FP32:
        after = LiveTensor("times the weight in fp32, and rounded", stream, FP32 + size)
    tensors = [
        LiveTensor("attention's output", stream, size),
        LiveTensor("residual after attention", stream, size),
        LiveTensor("wide and normed in fp32", (copies, *stream), FP32),
        after,
    ]
    return Moment("norm in plain torch", (*held, *tensors))


def _attention_moments(
    config: ResolvedConfig,
    attention: AttentionConfig,
    held: list[LiveTensor],
    chunk: int,
    compiled: Set[str],
) -> tuple[Moment, ...]:
    """`chunk` tokens of each sequence, which have no context before them."""
    size, (num_tokens, hidden_size) = DTYPE_BYTES[config.dtype], held[0].shape
    dim, num_heads, num_kv_heads = attention.head_dim, attention.num_heads, attention.num_kv_heads
    num_qkv_heads = num_heads + 2 * num_kv_heads
    before = (
        *held,
        LiveTensor("normed input", (num_tokens, hidden_size), size),
        LiveTensor("queries, keys, values", (num_tokens, num_qkv_heads, dim), size),
    )
    queries = (num_tokens, num_heads, dim)
    attended = LiveTensor("attended values", queries, size)
    output = LiveTensor("attention's output", (num_tokens, hidden_size), size)
    moments = [Moment("attention", (*before, attended, output))]
    if config.device == "cuda" and "paged_attention" in compiled:
        most = -(-num_tokens // chunk) * num_kv_heads * SPLITS * SPLIT_ROWS * (dim + 2)
        parts = LiveTensor("sums over parts of contexts", (min(most, MOST_PART_SUMS),), FP32)
        moments.append(Moment("attention in parts", (*before, attended, parts)))
    if attention.rope is not None and _write_op(attention) not in compiled:
        # The fp32 copy (a view where the dtype is fp32), and one half's two products, their sum
        # and the finished other half. A norm of the heads before that holds as much.
        copies = 1 if size == FP32 else 2
        turned = LiveTensor("rotated queries in fp32", (copies + 1, *queries), FP32)
        moments.append(Moment("rotation in plain torch", (*before, turned)))
    elif attention.qk_norm and config.device == "cpu":
        # There the compiled op is made of two; between them the normed heads are a tensor.
        normed = LiveTensor("queries in a row, and normed", (2, *queries), size)
        moments.append(Moment("norm of the heads", (*before, normed)))
    if "paged_attention" not in compiled:
        # One sequence at a time, at the product of its probabilities with its values. Queries are
        # a view where the dtype is fp32.
        copies = 2 if size == FP32 else 3
        moments.append(
            Moment(
                "attention in plain torch",
                (
                    *before,
                    attended,
                    LiveTensor("keys and values in fp32", (2, num_kv_heads, chunk, dim), FP32),
                    LiveTensor(
                        "each head's queries, values and result in fp32",
                        (copies, num_heads, chunk, dim),
                        FP32,
                    ),
                    LiveTensor("scores, probabilities", (2, num_heads, chunk, chunk), FP32),
                ),
            )
        )
    return tuple(moments)


def _latent_moments(
    config: ResolvedConfig,
    attention: LatentAttentionConfig,
    held: list[LiveTensor],
    chunk: int,
    compiled: Set[str],
) -> tuple[Moment, ...]:
    """As `_attention_moments`, with the projections around it."""
    size, (num_tokens, hidden_size) = DTYPE_BYTES[config.dtype], held[0].shape
    num_heads, rank, dim = attention.num_heads, attention.kv_lora_rank, attention.head_dim
    before = (
        *held,
        LiveTensor("normed input", (num_tokens, hidden_size), size),
        LiveTensor("latents, and normed", (num_tokens, dim + rank), size),
    )
    projected = LiveTensor("queries", (num_tokens, attention.num_projected_values), size)
    absorbed = LiveTensor("queries of latents", (num_tokens, num_heads, dim), size)
    mixed = LiveTensor("attended latents", (num_tokens, num_heads, rank), size)
    part = LiveTensor("the part of them that is not rotated", (num_tokens, num_heads, rank), size)
    of_heads = LiveTensor("values", (2, num_tokens, num_heads, attention.value_head_dim), size)
    output = LiveTensor("attention's output", (num_tokens, hidden_size), size)
    values = [of_heads]
    if config.device == "cpu" and size != FP32:
        # There torch's product in 16 bits wants each head's rows one after the other.
        values.append(LiveTensor("attended latents by head", (num_tokens, num_heads, rank), size))
    moments = [
        Moment("queries of latents", (*before, projected, part, absorbed)),
        Moment("values of latents", (*before, absorbed, mixed, *values)),
        Moment("attention", (*before, absorbed, mixed, of_heads, output)),
    ]
    if "latent_attention" not in compiled:
        one = (
            LiveTensor("latents in fp32", (chunk, dim), FP32),
            LiveTensor("scores, probabilities", (2, num_heads, chunk, chunk), FP32),
            LiveTensor("each head's result", (num_heads, chunk, rank), FP32),
        )
        moments.append(Moment("attention in plain torch", (*before, absorbed, mixed, *one)))
    return tuple(moments)


def _mlp_moment(
    config: ResolvedConfig, mlp: MLPConfig, held: list[LiveTensor], compiled: Set[str]
) -> Moment:
    size, (num_tokens, hidden_size) = DTYPE_BYTES[config.dtype], held[0].shape
    inner = (num_tokens, mlp.intermediate_size)
    normed = LiveTensor("normed input", (num_tokens, hidden_size), size)
    if not mlp.gated:
        return Moment("MLP", (*held, normed, LiveTensor("up, and activated", (2, *inner), size)))
    tensors = [normed, LiveTensor(f"{mlp.activation}(gate) * up", inner, size)]
    many = num_tokens > MOST_ROWS_APART and math.prod(inner) >= LEAST_RESULTS
    if many and "gated_linear" in compiled:
        tensors.append(LiveTensor("down's output", held[0].shape, size))
    else:
        tensors.append(LiveTensor("gate and up", (2, *inner), size))
    if _GATE_OPS[mlp.activation] not in compiled:
        tensors.append(LiveTensor(f"{mlp.activation}(gate)", inner, size))
    return Moment("MLP", (*held, *tensors))


def _adapter_moments(
    config: ResolvedConfig, lora: LoRAConfig, layer: LayerConfig, held: list[LiveTensor]
) -> Iterator[Moment]:
    """While adapters add to a product's output: also its input, and what is between A and B."""
    size, (num_tokens, hidden_size) = DTYPE_BYTES[config.dtype], held[0].shape
    normed = LiveTensor("normed input", (num_tokens, hidden_size), size)
    for product in adapted_products(layer, hidden_size):
        rows, rank = sum(product.parts), len(product.parts) * lora.max_lora_rank
        tensors = [normed, LiveTensor("output", (num_tokens, rows), size)]
        if len(product.parts) == 1:  # it reads what the one before it made
            tensors.append(LiveTensor("input", (num_tokens, product.columns), size))
        if config.device == "cuda":
            splits = num_splits(num_tokens, product.columns, invariant=config.batch_invariant)
            tensors.append(LiveTensor("between A and B", (splits, num_tokens, rank), FP32))
        else:
            at_once = min(num_tokens, LORA_ROWS), product.columns + rank + 2 * rows
            tensors.append(LiveTensor("one piece of them through A and B", at_once, size))
        yield Moment("adapters", (*held, *tensors))


def _experts_moments(
    config: ResolvedConfig, experts: MoEConfig, held: list[LiveTensor], compiled: Set[str]
) -> tuple[Moment, ...]:
    """A row here is a pair of a token and one of its experts. In plain torch all get as many."""
    size, stream = DTYPE_BYTES[config.dtype], held[0].shape
    (num_tokens, hidden_size), inner_size = stream, experts.intermediate_size
    num_pairs = num_tokens * experts.num_experts_per_token
    before = (
        *held,
        LiveTensor("normed input", stream, size),
        LiveTensor("weights and experts", (2, num_pairs), FP32),
    )
    rows = LiveTensor("each expert's rows", (num_pairs, hidden_size), size)
    both = LiveTensor("gate and up", (2, num_pairs, inner_size), size)
    inner = LiveTensor("silu(gate) * up", (num_pairs, inner_size), size)
    made = LiveTensor("what experts make", (num_pairs, hidden_size), size)
    output = LiveTensor("experts' output", stream, size)
    if "moe_experts" not in compiled:
        share = -(-num_pairs // experts.num_experts)
        one = [
            LiveTensor("sums in fp32", stream, FP32),
            LiveTensor("the last expert's rows", (share, inner_size + hidden_size), size),
            LiveTensor("this one's rows, gate and up", (share, 2 * inner_size), size),
            LiveTensor("silu(gate), and times up", (share, 2 * inner_size), size),
        ]
        moments = [Moment("experts in plain torch", (*before, *one))]
    elif config.device == "cuda":
        moments = [Moment("experts", (*before, inner, made, output))]
    else:
        order = LiveTensor("order of the rows", (2, num_pairs), INT64)
        copies = [
            LiveTensor("sums in fp32", stream, FP32),
            LiveTensor("one expert's of each token", stream, size),
        ]
        if size != FP32:
            copies.append(LiveTensor("the same in fp32", stream, FP32))
        moments = [
            Moment("experts' first products", (*before, order, rows, both)),
            Moment("experts' gates", (*before, order, both, inner)),
            Moment("experts' sums", (*before, order, inner, made, *copies)),
        ]
    if experts.shared is not None:
        moments.append(_mlp_moment(config, experts.shared, [*held, output], compiled))
    return tuple(moments)


def _draw_moment(config: ResolvedConfig, num_rows: int, compiled: Set[str]) -> Moment:
    size, shape = DTYPE_BYTES[config.dtype], (num_rows, config.model.vocab_size)
    tensors = [
        LiveTensor("last hidden states", (num_rows, config.model.hidden_size), size),
        LiveTensor("logits", shape, size),
    ]
    if "sample_tokens" not in compiled:
        if size != FP32:
            tensors.append(LiveTensor("logits in fp32", shape, FP32))
        tensors += [
            LiveTensor("logits over temperature", shape, FP32),
            LiveTensor("the same in fp64", shape, FP64),
            LiveTensor("probabilities in fp64", shape, FP64),
        ]
    return Moment("draw", tuple(tensors))
