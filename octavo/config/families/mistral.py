"""Mistral's dense models (arXiv 2310.06825)."""

from octavo.config.families.llama import decoder, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader
from octavo.config.windows import sliding_window

WINDOW = 4096  # where the config does not say; a null is no window


def read_mistral(read: Reader) -> ModelConfig:
    """`MistralForCausalLM`. The window is of every layer, and there are no biases."""
    read.refuse_what_nobody_reads(read={"sliding_window"})
    read.refuse_mixed_layers()
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(head_dim),
        window=sliding_window(read, WINDOW),
    )
    mlp = MLPConfig(read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE))
    return decoder(read, "mistral", layers=(LayerConfig(attention, mlp),) * num_layers(read))
