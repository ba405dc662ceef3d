"""GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), and DistilGPT-2."""

from dataclasses import replace

from octavo.config.model import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    Reader,
)

# Of transformers' names for `activation_function` and `hidden_act`, those that we have.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def read_gpt2(read: Reader) -> ModelConfig:
    """`GPT2LMHeadModel`. `reorder_and_upcast_attn` is about rounding: our scores are fp32."""
    read.refuse_what_nobody_reads()
    if read.boolean("add_cross_attention", False):
        raise read.unsupported("add_cross_attention", True, "only False")
    hidden_size = read.integer("n_embd", 1, MAX_HIDDEN_SIZE)
    num_layers = read.integer("n_layer", 1, MAX_LAYERS)
    inner_size = read.integer("n_inner", 1, 8 * MAX_HIDDEN_SIZE, default=4 * hidden_size)
    mlp = MLPConfig(inner_size, True, activation(read, "activation_function", "gelu_new"), False)
    attention = plain_heads(read, hidden_size, "n_head")
    vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    num_positions = read.integer("n_positions", 1, MAX_POSITIONS)
    return ModelConfig(
        architecture="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(LayerConfig(one, mlp) for one in _scaled(read, attention, num_layers)),
        norm_eps=read.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5),
        max_position_embeddings=num_positions,
        tie_word_embeddings=read.boolean("tie_word_embeddings", True),
        dtype=read.dtype(),
        bos_token_id=next(iter(read.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=read.eos_token_ids(vocab_size),
        norm="layer",
        num_learned_positions=num_positions,
    )


def plain_heads(read: Reader, hidden_size: int, name: str, *, bias: bool = True) -> AttentionConfig:
    """Heads that share `hidden_size` evenly, each with its own keys and values; no rotation."""
    num_heads = read.integer(name, 1, MAX_HEADS)
    if hidden_size % num_heads:
        raise read.wrong(name, num_heads, f"a divisor of the hidden size {hidden_size}")
    head_dim = hidden_size // num_heads
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=None,
        bias=bias,
        output_bias=bias,
    )


def activation(read: Reader, name: str, default: str) -> str:
    """Ours, of transformers' name for it."""
    given = read.raw(name) or default
    if not isinstance(given, str) or given not in ACTIVATION_NAMES:
        raise read.unsupported(name, given, f"supported: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[given]


def _scaled(read: Reader, attention: AttentionConfig, num_layers: int) -> list[AttentionConfig]:
    """Of each layer: scores may be left as they are, or divided by the layer's number, too."""
    scale = attention.scale if read.boolean("scale_attn_weights", True) else 1.0
    by_layer = read.boolean("scale_attn_by_inverse_layer_idx", False)
    scales = (scale / (index + 1 if by_layer else 1) for index in range(num_layers))
    return [replace(attention, scale=each) for each in scales]
