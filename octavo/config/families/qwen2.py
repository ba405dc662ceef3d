"""Qwen2 and Qwen2.5's dense models (arXiv 2407.10671, 2412.15115)."""

from octavo.config.families.llama import decoder, gated_mlp, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader


def read_qwen2(read: Reader) -> ModelConfig:
    """`Qwen2ForCausalLM`. A `sliding_window` counts only where `use_sliding_window` is true."""
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
        bias=True,  # no option: transformers always has it, and never on the output
    )
    layers = (LayerConfig(attention, gated_mlp(read)),) * num_layers(read)
    return decoder(read, "qwen2", layers=layers)
