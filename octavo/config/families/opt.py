"""OPT (arXiv 2205.01068)."""

from octavo.config.families.gpt2 import activation, plain_heads
from octavo.config.families.llama import num_layers
from octavo.config.model import LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, MAX_POSITIONS, MAX_VOCAB_SIZE, Reader

POSITION_OFFSET = 2  # rows of its table of positions that come before that of position 0
NORM_EPS = 1e-5  # no option: torch's


def read_opt(read: Reader) -> ModelConfig:
    """`OPTForCausalLM`, but for the 350m's: norms after the blocks, and narrower embeddings."""
    read.refuse_what_nobody_reads()
    for name, neutral in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ):
        if read.boolean(name, neutral) != neutral:
            raise read.unsupported(name, not neutral, f"only {neutral}")
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    if read.integer("word_embed_proj_dim", 1, MAX_HIDDEN_SIZE, default=hidden_size) != hidden_size:
        value = read.raw("word_embed_proj_dim")
        raise read.unsupported("word_embed_proj_dim", value, f"only hidden_size={hidden_size}")
    bias = read.boolean("enable_bias", True)
    attention = plain_heads(read, hidden_size, "num_attention_heads", bias=bias)
    inner_size = read.integer("ffn_dim", 1, 8 * MAX_HIDDEN_SIZE)
    mlp = MLPConfig(inner_size, bias, activation(read, "activation_function", "relu"), False)
    vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    num_positions = read.integer("max_position_embeddings", 1, MAX_POSITIONS)
    return ModelConfig(
        architecture="opt",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(LayerConfig(attention, mlp),) * num_layers(read),
        norm_eps=NORM_EPS,
        max_position_embeddings=num_positions,
        tie_word_embeddings=read.boolean("tie_word_embeddings", True),
        dtype=read.dtype(),
        bos_token_id=next(iter(read.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=read.eos_token_ids(vocab_size),
        norm="layer",
        num_learned_positions=num_positions + POSITION_OFFSET,
    )
