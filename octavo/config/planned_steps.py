"""The largest step that the limits allow: which tensors are alive at the moments that need most.

Owns the arithmetic of activations as our layers and kernels lay them out. Knows no torch.
"""

import math
from collections.abc import Set
from dataclasses import dataclass

from octavo.config.model import AttentionConfig, MLPConfig
from octavo.config.planned_weights import PACKED_DEPTH_STEP
from octavo.config.resolve import DTYPE_BYTES, ResolvedConfig

FP32, FP64 = 4, 8  # bytes

_WRITE_OPS = {"rotary_kv_write", "qk_norm_rotary_kv_write"}
_SMALL_OPS = {"rms_norm", "silu_mul", *_WRITE_OPS}
# Ops that have a compiled version, by device (`Op.names` knows them, but needs torch). A compiled
# op allocates its result and nothing else; a reference in plain torch also holds the intermediate
# values that its moments below list.
COMPILED_OPS: dict[str, frozenset[str]] = {
    "cpu": frozenset({"linear", "paged_attention", *_SMALL_OPS}),
    "cuda": frozenset({"linear", "paged_attention", "sample_tokens", *_SMALL_OPS}),
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
    layers = config.model.layers
    of_others = _WRITE_OPS - {_write_op(layer.attention) for layer in layers}
    ops = COMPILED_OPS[config.device] - of_others
    has_bias = any(layer.mlp.bias for layer in layers)
    apart = config.batch_invariant or has_bias or config.dtype == "float32"
    return ops if major != HOPPER or apart else ops | {"gated_linear"}


def _write_op(attention: AttentionConfig) -> str:
    """The op that rotates queries and keys and writes the KV cache."""
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
    num_tokens, num_rows = largest_step(config)
    size = DTYPE_BYTES[config.dtype]
    stream = (num_tokens, config.model.hidden_size)
    # The decoder's loop holds the block's arguments while the block runs. A compiled norm adds to
    # the residual in place; the reference makes a new one.
    held = [LiveTensor("block's input", stream, size), LiveTensor("residual", stream, size)]
    if "rms_norm" not in compiled:
        held.append(LiveTensor("residual before the norm", stream, size))
    chunk = -(-num_tokens // num_rows)
    moments = [*_reference_norm(stream, size, held, compiled)]
    for layer in config.model.kinds_of_layers:
        moments += _attention_moments(config, layer.attention, held, chunk, compiled)
        moments.append(_mlp_moment(config, layer.mlp, held, compiled))
    return (*moments, _draw_moment(config, num_rows, compiled))


def _reference_norm(
    stream: tuple[int, int], size: int, held: list[LiveTensor], compiled: Set[str]
) -> tuple[Moment, ...]:
    if "rms_norm" in compiled:
        return ()
    # In fp32 there is nothing to convert: the wide copy and the rounded one are views.
    copies = 1 if size == FP32 else 2
    tensors = [
        LiveTensor("attention's output", stream, size),
        LiveTensor("residual after attention", stream, size),
        LiveTensor("wide and normed in fp32", (copies, *stream), FP32),
        LiveTensor("rounded, and times the weight", (copies, *stream), size),
    ]
    return (Moment("norm in plain torch", (*held, *tensors)),)


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
    if _write_op(attention) not in compiled:
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


def _mlp_moment(
    config: ResolvedConfig, mlp: MLPConfig, held: list[LiveTensor], compiled: Set[str]
) -> Moment:
    size, (num_tokens, hidden_size) = DTYPE_BYTES[config.dtype], held[0].shape
    inner = (num_tokens, mlp.intermediate_size)
    tensors = [
        LiveTensor("normed input", (num_tokens, hidden_size), size),
        LiveTensor("silu(gate) * up", inner, size),
    ]
    many = num_tokens > MOST_ROWS_APART and math.prod(inner) >= LEAST_RESULTS
    if many and "gated_linear" in compiled:
        tensors.append(LiveTensor("down's output", held[0].shape, size))
    else:
        tensors.append(LiveTensor("gate and up", (2, *inner), size))
    if "silu_mul" not in compiled:
        tensors.append(LiveTensor("silu(gate)", inner, size))
    return Moment("MLP", (*held, *tensors))


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
