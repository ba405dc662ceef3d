"""Phi-3, Phi-3.5 and Phi-4-mini (arXiv 2404.14219, 2503.01743), and Phi-4, which has its config."""

from octavo.config.families.llama import decoder, gated_mlp, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, MAX_POSITIONS, Reader

OLD_NAMES = {"su": "longrope", "yarn": "longrope"}  # of its first checkpoints


def read_phi3(read: Reader) -> ModelConfig:
    """`Phi3ForCausalLM`. A `sliding_window` as long as the longest context is none."""
    read.refuse_what_nobody_reads(read={"sliding_window", "partial_rotary_factor"})
    read.refuse_mixed_layers()
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size)
    window = None
    if read.has("sliding_window"):
        window = read.integer("sliding_window", 1, MAX_POSITIONS)
        if window >= read.integer("max_position_embeddings", 1, MAX_POSITIONS):
            window = None
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(head_dim, fraction="partial_rotary_factor", old_names=OLD_NAMES),
        window=window,
    )
    layers = (LayerConfig(attention, gated_mlp(read)),) * num_layers(read)
    return decoder(read, "phi3", layers=layers)
