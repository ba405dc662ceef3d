"""The shape of a model: what each of its layers is made of, in our own words.

A config of any family is read into these (`octavo.config.families`), with every value checked; from
here on nobody sees a checkpoint's quirks. Knows no tensors and no names of checkpoints' fields.
"""

from collections import Counter
from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    "linear" divides every frequency by `factor`. "llama3" divides those with a wavelength above
    `original_max_position_embeddings / low_freq_factor`, leaves those below `... /
    high_freq_factor` alone, and interpolates between; the last three fields are its own.
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of queries and keys (arXiv 2104.09864)."""

    theta: float
    rotary_dim: int  # the first numbers of a head are rotated, so many of them: an even number
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # what scores are multiplied by, mostly 1 / sqrt(head_dim)
    rope: Rope | None  # None: the positions come from elsewhere, or not at all
    bias: bool = False  # of the projections to queries, keys and values
    output_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each query and key head, before the rotation

    @property
    def num_query_values(self) -> int:
        """Numbers in all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def num_key_values(self) -> int:
        """Numbers in all key heads of a token, and as many in its value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_cached_values(self) -> int:
        """Numbers that the KV cache keeps of a token."""
        return 2 * self.num_key_values

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        rows = self.num_query_values + 2 * self.num_key_values
        return (rows, hidden_size), (hidden_size, self.num_query_values)

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases."""
        biases = (self.num_query_values + 2 * self.num_key_values) * self.bias
        return biases + hidden_size * self.output_bias

    @property
    def num_norm_values(self) -> int:
        """Numbers in norms of heads."""
        return 2 * self.head_dim * self.qk_norm


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """The gated feed-forward block of one layer."""

    intermediate_size: int
    bias: bool = False

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        return (2 * self.intermediate_size, hidden_size), (hidden_size, self.intermediate_size)

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases."""
        return (2 * self.intermediate_size + hidden_size) * self.bias


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One block of the model. Layers that are alike are equal."""

    attention: AttentionConfig
    mlp: MLPConfig
    num_norms: int = 2  # of the residual stream

    def num_norm_values(self, hidden_size: int) -> int:
        """Numbers in all norms."""
        return self.num_norms * hidden_size + self.attention.num_norm_values


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a transformer. Every field was checked when it was read."""

    architecture: str  # the name of one of `octavo.config.architectures`
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: one of DTYPES
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Blocks, one after the other."""
        return len(self.layers)

    @property
    def kinds_of_layers(self) -> dict[LayerConfig, int]:
        """The layers that differ, in the order of their first one, and how many there are."""
        return dict(Counter(self.layers))

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary positions that differ, each one a table of angles."""
        ropes = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    @property
    def num_cached_values(self) -> int:
        """Numbers that the KV cache keeps of a token, over all layers."""
        return sum(layer.attention.num_cached_values for layer in self.layers)
