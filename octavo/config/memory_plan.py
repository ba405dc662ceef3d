"""Where an engine's memory goes, computed from shapes before anything is loaded.

Puts together what stays (`planned_weights`) and what a step needs (`planned_steps`). Knows no torch
and no devices' names; `octavo.engine.memory_report` holds its numbers to measured
ones, and `octavo.config.capacity` turns a KV cache into sequences.
"""

from collections.abc import Set
from dataclasses import dataclass

from octavo.config.capacity import Pool
from octavo.config.planned_steps import Moment, expected_ops, plan_moments
from octavo.config.planned_weights import KVLayers, WeightGroup, plan_kv_layers, plan_weights
from octavo.config.resolve import DTYPE_BYTES, ResolvedConfig
from octavo.config.step_sizes import decode_sizes, mixed_sizes
from octavo.core import KVGroups

INT32, INT64 = 4, 8  # bytes
# Of CUDA graphs, measured on an H100 with four models of 16 to 48 layers: what the first one makes
# the driver take, what each takes for a layer, and what their pool takes of the largest step's
# memory, being cut into pieces of which some are too small for what comes later.
FIRST_GRAPH_BYTES, GRAPH_BYTES_PER_LAYER, POOL_SHARE = 86 * 2**20, 27 * 2**10, 1.3
NEW_BLOCKS_WORDS = 2**16  # of the runner's packets, for blocks that sequences were given


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
    graph_bytes: int  # the most that CUDA graphs keep; 0 where there are none
    kv_cache_bytes: int  # negative where nothing is left: what is missing
    kv_block_bytes: int  # of one block, which serves one of the groups below
    block_size: int
    kv_groups: KVGroups
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
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token over all layers, while all of them see it."""
        return sum(layers.bytes_per_token for layers in self.kv_layers)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache; 0 where it has no room."""
        return max(self.kv_cache_bytes, 0) // self.kv_block_bytes if self.kv_block_bytes else 0

    @property
    def kv_pool_bytes(self) -> int:
        """Bytes of the whole blocks that are allocated."""
        return self.num_blocks * self.kv_block_bytes

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds, in sequences of the largest context."""
        longest = self.largest_context
        if self.kv_groups.keep_all or not longest:
            return self.num_blocks * self.block_size
        held = self.kv_groups.num_blocks_at_rest(longest, self.block_size)
        return self.num_blocks * longest // held

    @property
    def largest_context(self) -> int:
        """The longest sequence that can run alone."""
        if not self.kv_bytes_per_token:
            return self.max_model_len
        run = self.num_blocks
        if self.kv_allocator == "contiguous-buddy":
            run = 1 << run.bit_length() >> 1  # one run of a power of two
        return min(
            self.kv_groups.longest_in(run, self.block_size, self.max_model_len), self.max_model_len
        )

    @property
    def pool(self) -> Pool:
        """The KV cache as sequences see it."""
        return Pool(
            self.num_blocks,
            self.block_size,
            self.kv_allocator,
            self.largest_context,
            self.kv_groups,
        )

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
    activation_bytes = max(moment.num_bytes for moment in moments) + budget.workspace_bytes
    has_graphs = config.device == "cuda" and not config.enforce_eager
    graph_bytes = most_graph_bytes(config, activation_bytes) if has_graphs else 0
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        taken = sum(group.num_bytes for group in weights) + activation_bytes + graph_bytes
        kv_cache_bytes = budget.usable_bytes - taken - budget.others_bytes - row_bytes
    return MemoryPlan(
        budget=budget,
        weights=weights,
        kv_layers=plan_kv_layers(config),
        moments=moments,
        row_bytes=row_bytes,
        graph_bytes=graph_bytes,
        kv_cache_bytes=kv_cache_bytes,
        kv_block_bytes=config.kv_block_bytes,
        block_size=config.block_size,
        kv_groups=config.kv_groups,
        kv_allocator=config.kv_allocator,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )


def most_graph_bytes(config: ResolvedConfig, activation_bytes: int) -> int:
    """Bytes that CUDA graphs keep at most: their shared memory, and nodes with their arguments.

    Args:
        config: as `resolve` made it.
        activation_bytes: of the largest step at its peak, the workspace of cuBLAS included, of
            which the stream that they are captured on has its own.
    """
    logits = config.max_num_seqs * config.model.vocab_size * DTYPE_BYTES[config.dtype]
    sizes = decode_sizes(config.max_num_seqs), mixed_sizes(config.max_num_batched_tokens)
    nodes = sum(map(len, sizes)) * config.model.num_layers * GRAPH_BYTES_PER_LAYER
    return int(activation_bytes * POOL_SHARE) + logits + nodes + FIRST_GRAPH_BYTES


def plan_rows(config: ResolvedConfig) -> int:
    """Bytes of the block tables of all rows, and of the memory through which steps reach them."""
    num_rows, num_blocks = config.max_num_seqs + 1, -(-config.max_model_len // config.block_size)
    num_blocks *= config.kv_groups.num_groups
    tables = num_rows * (num_blocks * INT32 + INT64)
    # As `octavo.runner.packet` lays a step out in which every token is drawn after.
    packet = 11 * config.max_num_batched_tokens + 3 * config.max_num_seqs + NEW_BLOCKS_WORDS
    return tables + packet * INT32
