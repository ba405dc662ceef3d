"""Mixtral (arXiv 2401.04088)."""

from dataclasses import replace

from octavo.config.families.experts import mixture
from octavo.config.families.llama import decoder, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader

ROPE_THETA = 1e6  # where the config does not say: transformers' constant


def read_mixtral(read: Reader) -> ModelConfig:
    """`MixtralForCausalLM`."""
    read.refuse_what_nobody_reads()
    read.refuse_mixed_layers()
    num_heads, num_kv_heads, head_dim = read.heads(read.integer("hidden_size", 1, MAX_HIDDEN_SIZE))
    rope = read.rope(head_dim)
    if not read.has("rope_theta") and not read.has("rope_parameters"):
        rope = replace(rope, theta=ROPE_THETA)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
    )
    experts = mixture(
        read, count="num_local_experts", size="intermediate_size", norm_topk_prob=True
    )
    layers = (LayerConfig(attention, experts),) * num_layers(read)
    return replace(
        decoder(read, "mixtral", layers=layers),
        norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-5),
    )
