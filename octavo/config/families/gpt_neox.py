"""GPT-NeoX-20B (arXiv 2204.06745) and Pythia (arXiv 2304.01373)."""

from dataclasses import replace

from octavo.config.families.gpt2 import activation, plain_heads
from octavo.config.families.llama import max_positions, num_layers
from octavo.config.model import LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, MAX_VOCAB_SIZE, Reader

PART_THAT_TURNS = 0.25  # of a head, where the config does not say


def read_gpt_neox(read: Reader) -> ModelConfig:
    """`GPTNeoXForCausalLM`."""
    read.refuse_what_nobody_reads(read={"hidden_act", "partial_rotary_factor"})
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    bias = read.boolean("attention_bias", True)
    attention = plain_heads(read, hidden_size, "num_attention_heads", bias=bias)
    rope = read.rope(
        attention.head_dim,
        fraction="rotary_pct",
        default_fraction=PART_THAT_TURNS,
        theta="rotary_emb_base",
    )
    inner_size = read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE)
    layer = LayerConfig(
        replace(attention, rope=rope),
        MLPConfig(inner_size, True, activation(read, "hidden_act", "gelu"), False),
        parallel=read.boolean("use_parallel_residual", True),
    )
    layers = (layer,) * num_layers(read)
    vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    return ModelConfig(
        architecture="gpt_neox",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        norm_eps=read.number("layer_norm_eps", 0.0, 1.0, default=1e-5),
        max_position_embeddings=max_positions(read, layers),
        tie_word_embeddings=read.boolean("tie_word_embeddings", False),
        dtype=read.dtype(),
        bos_token_id=next(iter(read.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=read.eos_token_ids(vocab_size),
        norm="layer",
    )
