"""The shape of a model: what each of its layers is made of, in our own words.

A config of any family is read into these (`octavo.config.families`), with every value checked; from
here on nobody sees a checkpoint's quirks. Knows no tensors and no names of checkpoints' fields.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.config.families.vision_shapes import PixelSettings, VideoSettings, VisionConfig

DTYPES = ("bfloat16", "float16", "float32")
# arXiv 1702.03118; arXiv 1606.08415, section 2, as it is, with tanh and with a sigmoid;
# arXiv 1803.08375
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")
NORMS = ("rms", "layer")  # arXiv 1910.07467; arXiv 1607.06450, with a bias


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    "linear" divides every frequency by `factor`. "llama3" divides those with a wavelength above
    `original_max_position_embeddings / low_freq_factor`, leaves those below `... /
    high_freq_factor` alone, and interpolates between.
    "yarn" (arXiv 2309.00071, section 3.2) leaves those alone that turn more than `beta_fast` times
    in the original context, divides those that turn less than `beta_slow` times, and has a ramp
    between them, from and to whole dimensions where `truncate` says so.
    "longrope" (arXiv 2402.13753) divides each frequency by a number of its own: those of
    `short_factors` in an engine whose contexts are no longer than the original, else those of
    `long_factors`. An engine keeps to one of them, for keys in its cache are rotated already.
    """

    kind: str  # "linear", "llama3", "yarn" or "longrope"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # what cosines and sines are multiplied by
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # one for each pair of numbers that turn together
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of queries and keys (arXiv 2104.09864)."""

    theta: float
    rotary_dim: int  # the first numbers of a head are rotated, so many of them: an even number
    scaling: RopeScaling | None = None
    # Pairs that turn by the positions in time, down and across, one after the other (M-RoPE, arXiv
    # 2409.12191, section 2.1); empty: all of them by the one position.
    sections: tuple[int, ...] = ()


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
    # Tokens that a query sees, its own the last of them (arXiv 2310.06825, section 2); None: all.
    window: int | None = None
    logit_softcap: float | None = None  # scores become cap * tanh(score / cap); arXiv 2408.00118
    # False: tokens see those after them, too, so all of a prompt runs in one step and nothing of it
    # is kept (arXiv 1810.04805, section 3).
    causal: bool = True

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
        return 2 * self.num_key_values * self.causal

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig(AttentionConfig):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), as its cache sees it.

    There all query heads share one key of `head_dim` numbers: the compressed latent and, behind it,
    the part that is rotated. Its value is the latent.
    """

    kv_lora_rank: int  # numbers of the latent
    nope_head_dim: int  # of a query head, and of the key that the latent stands for: not rotated
    value_head_dim: int  # of the value that it stands for

    @property
    def rope_head_dim(self) -> int:
        """Numbers of a query head that are rotated, and of the one key."""
        return self.head_dim - self.kv_lora_rank

    @property
    def num_projected_values(self) -> int:
        """Numbers in all query heads of a token before they meet the latent."""
        return self.num_heads * (self.nope_head_dim + self.rope_head_dim)

    @property
    def num_cached_values(self) -> int:
        """Numbers that the KV cache keeps of a token."""
        return self.head_dim

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        num_values = self.num_heads * self.value_head_dim
        return (
            (self.num_projected_values, hidden_size),
            (self.head_dim, hidden_size),
            (hidden_size, num_values),
        )

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases, and in each head's ways into the latent and out of it, kept plain."""
        each_head = (self.nope_head_dim + self.value_head_dim) * self.kv_lora_rank
        biases = self.head_dim * self.bias + hidden_size * self.output_bias
        return biases + self.num_heads * each_head

    @property
    def num_norm_values(self) -> int:
        """Numbers in the norm of the latent."""
        return self.kv_lora_rank


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """The feed-forward block of one layer."""

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"  # one of ACTIVATIONS
    gated: bool = True  # activation(gate(x)) * up(x), not activation(up(x))

    @property
    def num_inner_rows(self) -> int:
        """Rows of the first product: those of up, and of the gate."""
        return (1 + self.gated) * self.intermediate_size

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        return (self.num_inner_rows, hidden_size), (hidden_size, self.intermediate_size)

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases."""
        return (self.num_inner_rows + hidden_size) * self.bias


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A feed-forward block of experts, of which a router gives each token a few (arXiv 1701.06538).

    Each expert is a gated block, and what the chosen ones make is added up with the router's
    weights: the softmax over all experts. `shared` is a gated block that every token goes through
    beside them (arXiv 2401.06066, section 3.2).
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # the weights of a token's experts are divided by their sum
    scaling_factor: float = 1.0  # what the weights are multiplied by, after that
    # Experts are chosen among those of a token's best groups only, where a group is as good as its
    # best expert (arXiv 2405.04434, section 2.2.2).
    num_groups: int = 1
    num_groups_per_token: int = 1
    shared: MLPConfig | None = None

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        size = self.intermediate_size
        expert = (2 * size, hidden_size), (hidden_size, size)
        router = (self.num_experts, hidden_size)
        shared = () if self.shared is None else self.shared.matrices(hidden_size)
        return (router, *expert * self.num_experts, *shared)

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases."""
        return 0 if self.shared is None else self.shared.num_vector_values(hidden_size)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One block of the model. Layers that are alike are equal."""

    attention: AttentionConfig
    mlp: MLPConfig | MoEConfig
    num_norms: int = 2  # of the residual stream
    parallel: bool = False  # attention and MLP read the same stream, and are added to it together

    def num_norm_values(self, norm_size: int) -> int:
        """Numbers in all norms, where one of the residual stream has `norm_size`."""
        return self.num_norms * norm_size + self.attention.num_norm_values


@dataclass(frozen=True, slots=True)
class ClassHead:
    """What makes scores of a vector: a product, tanh, a product (arXiv 1810.04805, section 4.1)."""

    num_classes: int
    sigmoid: bool  # of what comes out, so that it is within 0..1

    def matrices(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each weight that a product reads."""
        return (hidden_size, hidden_size), (self.num_classes, hidden_size)

    def num_vector_values(self, hidden_size: int) -> int:
        """Numbers in biases."""
        return hidden_size + self.num_classes


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
    zero_centered_norms: bool = False  # RMS norms multiply by 1 + weight, in fp32
    norm: str = "rms"  # of the residual stream: one of NORMS
    num_learned_positions: int = 0  # rows of a table of positions that tokens are added to
    embedding_scale: float = 1.0  # what embeddings are multiplied by, rounded to their dtype
    final_logit_softcap: float | None = None  # logits become cap * tanh(logit / cap)
    num_token_types: int = 0  # rows of a table of types that tokens are added to
    class_head: ClassHead | None = None
    pooling: str = "last"  # how a prompt becomes one vector where a request does not say
    normalizes: bool = True  # and whether that has a length of 1 then
    # JSON of a config of transformers', whose own modules run the model that it describes. Of the
    # fields above, those of weights and norms are estimates then. None: our layers run it.
    transformers_config: str | None = None
    # What looks at images, and the token that stands where the rows that it makes of them go.
    vision: "VisionConfig | None" = None
    image_token_id: int | None = None
    pixels: "PixelSettings | None" = None  # how it wants them prepared
    video_token_id: int | None = None  # where rows of a video go; None: it takes none
    videos: "VideoSettings | None" = None

    @property
    def is_bridged(self) -> bool:
        """Whether transformers' own modules run it."""
        return self.transformers_config is not None

    @property
    def is_encoder(self) -> bool:
        """Whether it reads whole prompts and writes nothing: no token follows from it."""
        return not all(layer.attention.causal for layer in self.layers)

    @property
    def num_layers(self) -> int:
        """Blocks, one after the other."""
        return len(self.layers)

    @property
    def num_norm_values(self) -> int:
        """Numbers in all norms: their weights and, of layer norms, biases."""
        norm_size = self.hidden_size * (2 if self.norm == "layer" else 1)
        return norm_size + sum(layer.num_norm_values(norm_size) for layer in self.layers)

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
