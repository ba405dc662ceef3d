"""DeepSeek-V2-Lite and its like (arXiv 2405.04434)."""

import math
from collections.abc import Mapping

from octavo.config.families.experts import mixture
from octavo.config.families.llama import decoder, gated_mlp, num_layers
from octavo.config.model import LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from octavo.config.reading import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_SIZE, MAX_LAYERS, Reader

MAX_RANK = 2**14
METHODS = ("greedy", "group_limited_greedy")


def read_deepseek_v2(read: Reader) -> ModelConfig:
    """`DeepseekV2ForCausalLM` with queries that are not compressed."""
    read.refuse_what_nobody_reads()
    read.refuse_mixed_layers()
    only = {
        "q_lora_rank": None,  # the larger models compress queries, too
        "norm_topk_prob": False,  # transformers' model does not look at it
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    }
    for name, value in only.items():
        if read.has(name) and read.raw(name) != value:
            raise read.unsupported(name, read.raw(name), f"only {value!r}")
    count = num_layers(read)
    num_dense = read.integer("first_k_dense_replace", 0, MAX_LAYERS, default=0)
    attention, experts = _attention(read), _experts(read)
    dense = LayerConfig(attention, gated_mlp(read))
    layers = tuple(
        dense if index < num_dense else LayerConfig(attention, experts) for index in range(count)
    )
    return decoder(read, "deepseek_v2", layers=layers)


def _attention(read: Reader) -> LatentAttentionConfig:
    num_heads = read.integer("num_attention_heads", 1, MAX_HEADS)
    if read.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads) != num_heads:
        supported = f"only num_attention_heads={num_heads}"
        raise read.unsupported("num_key_value_heads", read.raw("num_key_value_heads"), supported)
    kept = read.integer("qk_nope_head_dim", 1, MAX_HEAD_DIM)
    turned = read.integer("qk_rope_head_dim", 2, MAX_HEAD_DIM)
    rank = read.integer("kv_lora_rank", 1, MAX_RANK)
    bias = read.boolean("attention_bias", False)
    return LatentAttentionConfig(
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=rank + turned,
        scale=_scale(read, kept + turned),
        rope=read.rope(turned),
        bias=bias,
        output_bias=bias,
        kv_lora_rank=rank,
        nope_head_dim=kept,
        value_head_dim=read.integer("v_head_dim", 1, MAX_HEAD_DIM),
    )


def _scale(read: Reader, head_dim: int) -> float:
    """1 / sqrt(head_dim), and YaRN's factor for scores where the config has `mscale_all_dim`."""
    section: dict[str, object] = {}
    for name in ("rope_scaling", "rope_parameters"):
        written = read.raw(name)
        section |= written if isinstance(written, Mapping) else {}
    rope = Reader(section, where="config: rope")
    stretch = rope.number("mscale_all_dim", 0.0, 1e3, default=0.0)
    kind = rope.raw("rope_type") or rope.raw("type") or "default"
    if kind == "default" or not stretch:
        return float(head_dim**-0.5)
    factor = rope.number("factor", 1.0, 1e6)
    return float(head_dim**-0.5) * (0.1 * stretch * math.log(factor) + 1.0) ** 2


def _experts(read: Reader) -> MoEConfig:
    method = read.raw("topk_method") or METHODS[0]
    if method not in METHODS:
        raise read.unsupported("topk_method", method, f"supported: {', '.join(METHODS)}")
    groups = (1, 1)
    if method == "group_limited_greedy":
        num_groups = read.integer("n_group", 1, MAX_HIDDEN_SIZE)
        groups = num_groups, read.integer("topk_group", 1, num_groups)
    return mixture(
        read,
        count="n_routed_experts",
        size="moe_intermediate_size",
        norm_topk_prob=False,
        scaling_factor=read.number("routed_scaling_factor", 0.0, 1e6, default=1.0),
        groups=groups,
        num_shared=read.integer("n_shared_experts", 1, MAX_LAYERS),
    )
