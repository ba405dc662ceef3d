"""Llama 2 and 3.x, and what copied their config: SmolLM2, TinyLlama."""

from octavo.config.model import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import (
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    Reader,
)


def read_llama(read: Reader) -> ModelConfig:
    """`LlamaForCausalLM`."""
    read.refuse_what_nobody_reads()
    read.refuse_mixed_layers()
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size)
    bias = read.boolean("attention_bias", False)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(head_dim),
        bias=bias,
        output_bias=bias,
    )
    layers = (LayerConfig(attention, gated_mlp(read)),) * num_layers(read)
    return decoder(read, "llama", layers=layers)


def num_layers(read: Reader) -> int:
    """How many blocks there are."""
    return read.integer("num_hidden_layers", 1, MAX_LAYERS)


def gated_mlp(read: Reader) -> MLPConfig:
    """The feed-forward block under its usual names."""
    size = read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE)
    return MLPConfig(size, bias=read.boolean("mlp_bias", False))


def max_positions(read: Reader, layers: tuple[LayerConfig, ...]) -> int:
    """The longest context. YaRN is written beside that of pretraining, which it multiplies."""
    longest = read.integer("max_position_embeddings", 1, MAX_POSITIONS)
    for layer in layers:
        scaling = layer.attention.rope and layer.attention.rope.scaling
        if scaling and scaling.kind == "yarn":
            stretched = int(scaling.original_max_position_embeddings * scaling.factor)
            longest = max(longest, stretched)
    return longest


def decoder(read: Reader, architecture: str, *, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    """What is around the blocks, under its usual names."""
    vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=read.integer("hidden_size", 1, MAX_HIDDEN_SIZE),
        layers=layers,
        norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        max_position_embeddings=max_positions(read, layers),
        tie_word_embeddings=read.boolean("tie_word_embeddings", False),
        dtype=read.dtype(),
        bos_token_id=next(iter(read.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=read.eos_token_ids(vocab_size),
    )
