"""SmolLM3: Llama's config, and layers without positions among the others (arXiv 2501.18795)."""

from dataclasses import replace

from octavo.config.families.llama import decoder, gated_mlp, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, MAX_LAYERS, Reader

THETA = 2_000_000.0  # transformers' constant, where the config does not say


def read_smollm3(read: Reader) -> ModelConfig:
    """`SmolLM3ForCausalLM`. A `sliding_window` counts only where `use_sliding_window` is true."""
    read.refuse_what_nobody_reads(read={"sliding_window"})
    read.refuse_mixed_layers()
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size)
    bias = read.boolean("attention_bias", False)
    turned = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read.rope(head_dim, default_theta=THETA),
        bias=bias,
        output_bias=bias,
    )
    mlp = gated_mlp(read)
    with_rope, without = (LayerConfig(a, mlp) for a in (turned, replace(turned, rope=None)))
    layers = tuple(with_rope if has_rope else without for has_rope in _have_rope(read))
    config = decoder(read, "smollm3", layers=layers)
    return replace(config, tie_word_embeddings=read.boolean("tie_word_embeddings", True))


def _have_rope(read: Reader) -> list[bool]:
    """Of each layer: `no_rope_layers` has a 1 for those that have it, in spite of its name."""
    count = num_layers(read)
    if not read.has("no_rope_layers"):
        interval = read.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=4)
        return [(index + 1) % interval != 0 for index in range(count)]
    given = read.raw("no_rope_layers")
    if not isinstance(given, list) or len(given) < count or not {0, 1}.issuperset(given):
        raise read.wrong("no_rope_layers", given, f"a list of 0 and 1 for each of {count} layers")
    return [bool(has_rope) for has_rope in given[:count]]
