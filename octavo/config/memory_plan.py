"""Where an engine's memory goes, computed from shapes before anything is loaded.

Owns the arithmetic of weights, KV cache and activations as our layers and kernels lay them out.
Knows no torch and no devices' names; `octavo.engine.memory_report` holds its numbers to measured
ones, and `octavo.config.capacity` turns a KV cache into sequences.
"""

import math
from collections.abc import Set
from dataclasses import dataclass

from octavo.config.capacity import Pool
from octavo.config.resolve import DTYPE_BYTES, ResolvedConfig
from octavo.config.step_sizes import decode_sizes, mixed_sizes

FP32, FP64 = 4, 8  # bytes
INT32, INT64 = 4, 8
GRAPH_BYTES_PER_LAYER = 240 * 2**10  # measured: 218 and 259 KiB on an H100, 8B and 0.6B
NEW_BLOCKS_WORDS = 2**16  # of the runner's packets, for blocks that sequences were given

_SMALL_OPS = {"rms_norm", "rotary_kv_write", "qk_norm_rotary_kv_write", "silu_mul"}
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

# The packed layout of `octavo.kernels.linear`: rows of a weight are padded to whole panels, and
# its columns to this many.
PANEL_ROWS = 16
PACKED_DEPTH_STEP = {"bfloat16": 32, "float32": 1}


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """All weights of one kind, over all layers."""

    kind: str
    num_parameters: int
    num_bytes: int
    layout: str  # how they are stored


@dataclass(frozen=True, slots=True)
class KVLayers:
    """The layers that keep the same things of a token."""

    kind: str
    num_layers: int
    bytes_per_token_and_layer: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over these layers."""
        return self.num_layers * self.bytes_per_token_and_layer


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


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """What a device has, and what is gone before the engine allocates anything."""

    name: str
    total_bytes: int
    usable_bytes: int  # what engine and others may fill together
    others_bytes: int  # CUDA context, other processes
    workspace_bytes: int = 0  # what cuBLAS takes from torch's allocator at the first product
    major: int = 0  # compute capability


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The whole plan. Everything is in bytes or tokens."""

    budget: DeviceBudget
    weights: tuple[WeightGroup, ...]
    kv_layers: tuple[KVLayers, ...]
    moments: tuple[Moment, ...]
    row_bytes: int  # the runner's tables of rows, and the packets of steps
    graph_overhead_bytes: int  # 0 where there are no graphs
    kv_cache_bytes: int  # negative where nothing is left: what is missing
    block_size: int
    kv_allocator: str  # `CacheOptions.kv_allocator`
    max_num_seqs: int
    max_model_len: int  # the context that was asked for, or the checkpoint's

    @property
    def num_parameters(self) -> int:
        """Numbers that were learned."""
        return sum(group.num_parameters for group in self.weights)

    @property
    def weight_bytes(self) -> int:
        """All weights and tables, as they are stored."""
        return sum(group.num_bytes for group in self.weights)

    @property
    def peak(self) -> Moment:
        """The moment of the largest step that needs most."""
        return max(self.moments, key=lambda moment: moment.num_bytes)

    @property
    def activation_bytes(self) -> int:
        """What the largest step needs at its peak, the workspace of cuBLAS included."""
        return self.peak.num_bytes + self.budget.workspace_bytes

    @property
    def graph_bytes(self) -> int:
        """What CUDA graphs keep: the largest step's memory, which all share, and themselves."""
        return self.peak.num_bytes + self.graph_overhead_bytes if self.graph_overhead_bytes else 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return sum(layers.bytes_per_token for layers in self.kv_layers)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache; 0 where it has no room."""
        return max(self.kv_cache_bytes, 0) // (self.kv_bytes_per_token * self.block_size)

    @property
    def kv_pool_bytes(self) -> int:
        """Bytes of the whole blocks that are allocated."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def largest_context(self) -> int:
        """The longest sequence that can run alone."""
        run = self.num_blocks
        if self.kv_allocator == "contiguous-buddy":
            run = 1 << run.bit_length() >> 1  # one run of a power of two
        return min(run * self.block_size, self.max_model_len)

    @property
    def pool(self) -> Pool:
        """The KV cache as sequences see it."""
        return Pool(self.num_blocks, self.block_size, self.kv_allocator, self.largest_context)

    @property
    def unused_bytes(self) -> int:
        """What is left of the device when all is allocated."""
        used = self.weight_bytes + self.activation_bytes + self.row_bytes + self.graph_bytes
        used += max(self.kv_cache_bytes, 0)
        return self.budget.total_bytes - self.budget.others_bytes - used

    @property
    def missing_bytes(self) -> int:
        """What the device lacks for the plan; 0 where it fits."""
        return max(-self.kv_cache_bytes, -self.unused_bytes, 0)


def plan_memory(
    config: ResolvedConfig, budget: DeviceBudget, *, compiled: Set[str] | None = None
) -> MemoryPlan:
    """The plan of an engine that has not allocated anything yet.

    Args:
        config: as `resolve` made it. Without `kv_cache_bytes`, the KV cache gets what is left.
        budget: the device.
        compiled: the ops that run compiled; default: `expected_ops`.
    """
    compiled = expected_ops(config, major=budget.major) if compiled is None else compiled
    weights = plan_weights(config, packed="linear" in compiled and config.device == "cpu")
    moments = plan_moments(config, compiled)
    row_bytes = plan_rows(config)
    has_graphs = config.device == "cuda" and not config.enforce_eager
    overhead = graph_overhead_bytes(config) if has_graphs else 0
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        taken = sum(group.num_bytes for group in weights) + budget.workspace_bytes
        taken += max(moment.num_bytes for moment in moments) * (1 + has_graphs) + overhead
        kv_cache_bytes = budget.usable_bytes - taken - budget.others_bytes - row_bytes
    return MemoryPlan(
        budget=budget,
        weights=weights,
        kv_layers=plan_kv_layers(config),
        moments=moments,
        row_bytes=row_bytes,
        graph_overhead_bytes=overhead,
        kv_cache_bytes=kv_cache_bytes,
        block_size=config.block_size,
        kv_allocator=config.kv_allocator,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )


def graph_overhead_bytes(config: ResolvedConfig) -> int:
    """Bytes of all CUDA graphs of the model's pass themselves: nodes and their arguments."""
    sizes = decode_sizes(config.max_num_seqs), mixed_sizes(config.max_num_batched_tokens)
    return sum(map(len, sizes)) * config.model.num_layers * GRAPH_BYTES_PER_LAYER


def plan_rows(config: ResolvedConfig) -> int:
    """Bytes of the block tables of all rows, and of the memory through which steps reach them."""
    num_rows, num_blocks = config.max_num_seqs + 1, -(-config.max_model_len // config.block_size)
    tables = num_rows * (num_blocks * INT32 + INT64)
    # As `octavo.runner.packet` lays a step out in which every token is drawn after.
    packet = 11 * config.max_num_batched_tokens + 3 * config.max_num_seqs + NEW_BLOCKS_WORDS
    return tables + packet * INT32


def expected_ops(config: ResolvedConfig, *, major: int = 0) -> frozenset[str]:
    """The model's ops that should run compiled: by device and dtype, for shapes they support.

    Args:
        config: as `resolve` made it.
        major: the compute capability of a GPU.
    """
    if config.device == "cpu" and config.dtype not in PACKED_DEPTH_STEP:
        return frozenset()
    of_others = {"rotary_kv_write", "qk_norm_rotary_kv_write"} - {_write_op(config)}
    ops = COMPILED_OPS[config.device] - of_others
    apart = config.batch_invariant or config.model.mlp_bias or config.dtype == "float32"
    return ops if major != HOPPER or apart else ops | {"gated_linear"}


def _write_op(config: ResolvedConfig) -> str:
    """The op that rotates queries and keys and writes the KV cache."""
    return "qk_norm_rotary_kv_write" if config.model.qk_norm else "rotary_kv_write"


def plan_weights(config: ResolvedConfig, *, packed: bool) -> tuple[WeightGroup, ...]:
    """Weights by kind. A packed weight replaces the plain one; a tied matrix is stored once."""
    model, itemsize = config.model, DTYPE_BYTES[config.dtype]
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_layers
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layout = f"{config.dtype}, packed for the CPU" if packed else f"{config.dtype}, plain"

    def group(
        kind: str, *matrices: tuple[int, int], biases: int = 0, copies: int = 1
    ) -> WeightGroup:
        num_stored = sum(_stored(*m, config.dtype) if packed else math.prod(m) for m in matrices)
        num_parameters = sum(map(math.prod, matrices)) + biases
        return WeightGroup(
            kind, copies * num_parameters, copies * (num_stored + biases) * itemsize, layout
        )

    vocabulary = (model.vocab_size, hidden)
    num_embedded = math.prod(vocabulary)
    plain = f"{config.dtype}, plain"
    outer = [group("embedding, also the output head", vocabulary)]
    if not model.tie_word_embeddings:
        embedding = WeightGroup("embedding", num_embedded, num_embedded * itemsize, plain)
        outer = [embedding, group("output head", vocabulary)]
    num_norms = (2 * layers + 1) * hidden + 2 * layers * model.head_dim * model.qk_norm
    table_bytes = config.max_model_len * model.head_dim * FP32
    return (
        *outer,
        group(
            "attention",
            (query + 2 * key, hidden),
            (hidden, query),
            biases=(query + 2 * key + hidden) * model.attention_bias,
            copies=layers,
        ),
        group(
            "MLP",
            (2 * inner, hidden),
            (hidden, inner),
            biases=(2 * inner + hidden) * model.mlp_bias,
            copies=layers,
        ),
        WeightGroup("norms", num_norms, num_norms * itemsize, plain),
        WeightGroup("table of rotary angles", 0, table_bytes, "float32, one for all layers"),
    )


def _stored(rows: int, columns: int, dtype: str) -> int:
    """Numbers in the packed layout of a weight, padding included."""
    step = PACKED_DEPTH_STEP[dtype]
    return -(-rows // PANEL_ROWS) * PANEL_ROWS * (-(-columns // step) * step)


def plan_kv_layers(config: ResolvedConfig) -> tuple[KVLayers, ...]:
    """What layers keep of each token: here a key and a value for every key/value head."""
    model = config.model
    num_values = 2 * model.num_kv_heads * model.head_dim
    num_bytes = num_values * DTYPE_BYTES[config.dtype]
    return (KVLayers("full attention", model.num_layers, num_bytes),)


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
    return (
        *_reference_norm(stream, size, held, compiled),
        *_attention_moments(config, held, -(-num_tokens // num_rows), compiled),
        _mlp_moment(config, held, compiled),
        _draw_moment(config, num_rows, compiled),
    )


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
    config: ResolvedConfig, held: list[LiveTensor], chunk: int, compiled: Set[str]
) -> tuple[Moment, ...]:
    """`chunk` tokens of each sequence, which have no context before them."""
    model, size = config.model, DTYPE_BYTES[config.dtype]
    num_tokens, dim = held[0].shape[0], model.head_dim
    num_qkv_heads = model.num_heads + 2 * model.num_kv_heads
    before = (
        *held,
        LiveTensor("normed input", (num_tokens, model.hidden_size), size),
        LiveTensor("queries, keys, values", (num_tokens, num_qkv_heads, dim), size),
    )
    queries = (num_tokens, model.num_heads, dim)
    attended = LiveTensor("attended values", queries, size)
    output = LiveTensor("attention's output", (num_tokens, model.hidden_size), size)
    moments = [Moment("attention", (*before, attended, output))]
    if config.device == "cuda" and "paged_attention" in compiled:
        most = -(-num_tokens // chunk) * model.num_kv_heads * SPLITS * SPLIT_ROWS * (dim + 2)
        parts = LiveTensor("sums over parts of contexts", (min(most, MOST_PART_SUMS),), FP32)
        moments.append(Moment("attention in parts", (*before, attended, parts)))
    if _write_op(config) not in compiled:
        # The fp32 copy (a view where the dtype is fp32), and one half's two products, their sum
        # and the finished other half. A norm of the heads before that holds as much.
        copies = 1 if size == FP32 else 2
        turned = LiveTensor("rotated queries in fp32", (copies + 1, *queries), FP32)
        moments.append(Moment("rotation in plain torch", (*before, turned)))
    elif model.qk_norm and config.device == "cpu":
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
                    LiveTensor(
                        "keys and values in fp32", (2, model.num_kv_heads, chunk, dim), FP32
                    ),
                    LiveTensor(
                        "each head's queries, values and result in fp32",
                        (copies, model.num_heads, chunk, dim),
                        FP32,
                    ),
                    LiveTensor("scores, probabilities", (2, model.num_heads, chunk, chunk), FP32),
                ),
            )
        )
    return tuple(moments)


def _mlp_moment(config: ResolvedConfig, held: list[LiveTensor], compiled: Set[str]) -> Moment:
    size, num_tokens = DTYPE_BYTES[config.dtype], held[0].shape[0]
    inner = (num_tokens, config.model.intermediate_size)
    tensors = [
        LiveTensor("normed input", (num_tokens, config.model.hidden_size), size),
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
