"""Qwen3's dense models (arXiv 2505.09388)."""

from octavo.config.families.llama import decoder, gated_mlp, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader

HEAD_DIM = 128  # where the config does not say: transformers' constant, not hidden size over heads


def read_qwen3(read: Reader) -> ModelConfig:
    """`Qwen3ForCausalLM`. A `sliding_window` counts only where `use_sliding_window` is true."""
    read.refuse_what_nobody_reads(read={"sliding_window"})
    read.refuse_mixed_layers()
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size, default_dim=HEAD_DIM)
    bias = read.boolean("attention_bias", False)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(head_dim),
        bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    layers = (LayerConfig(attention, gated_mlp(read)),) * num_layers(read)
    return decoder(read, "qwen3", layers=layers)
