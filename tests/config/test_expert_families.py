"""Configs of mixtures of experts: as they were published, and what is refused by name."""

import json
import math
from pathlib import Path

import pytest

from octavo.config import LatentAttentionConfig, MLPConfig, MoEConfig, model_config_from_hf
from octavo.errors import CheckpointError, UnsupportedModelError

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
QWEN3_30B_A3B = json.loads((SHAPES / "qwen3-30b-a3b" / "config.json").read_text())
MIXTRAL_8X7B = {  # as it was published, with transformers 4.36
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
DEEPSEEK_V2_LITE = {  # as it was published, with transformers 4.33
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def num_parameters(config):
    """Of a model whose head is not its embedding."""
    hidden = config.hidden_size
    blocks = sum(
        count * (sum(map(math.prod, part.matrices(hidden))) + part.num_vector_values(hidden))
        for layer, count in config.kinds_of_layers.items()
        for part in (layer.attention, layer.mlp)
    )
    return blocks + config.num_norm_values + 2 * config.vocab_size * hidden


@pytest.mark.parametrize(
    ("written", "published"),
    [
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B_A3B, 30_532_122_624),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
    ],
    ids=["Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"],
)
def test_as_many_parameters_as_were_published(written, published):
    assert num_parameters(model_config_from_hf(written)) == published


def test_mixtral():
    config = model_config_from_hf(MIXTRAL_8X7B)
    [layer] = config.kinds_of_layers
    assert layer.mlp == MoEConfig(8, 2, 14336, norm_topk_prob=True)
    assert (layer.attention.head_dim, layer.attention.rope.theta) == (128, 1e6)
    absent = {k: v for k, v in MIXTRAL_8X7B.items() if k not in ("rope_theta", "rms_norm_eps")}
    defaults = model_config_from_hf(absent)
    assert defaults.layers[0].attention.rope.theta == 1e6 and defaults.norm_eps == 1e-5


def test_qwen3_moe_says_which_layers_are_dense():
    experts = MoEConfig(128, 8, 768, norm_topk_prob=True)
    assert set(model_config_from_hf(QWEN3_30B_A3B).kinds_of_layers.values()) == {48}

    def mlps(**changes):
        changes |= {"num_hidden_layers": 5}
        return [layer.mlp for layer in model_config_from_hf(QWEN3_30B_A3B | changes).layers]

    dense = MLPConfig(6144)
    assert mlps() == [experts] * 5
    assert mlps(decoder_sparse_step=2) == [dense, experts, dense, experts, dense]
    assert mlps(mlp_only_layers=[0, 3]) == [dense, experts, experts, dense, experts]
    written_by_5 = {"num_local_experts": 64, "num_experts": None}
    assert mlps(**written_by_5)[0].num_experts == 64


def test_deepseek_v2_lite():
    config = model_config_from_hf(DEEPSEEK_V2_LITE)
    dense, sparse = config.kinds_of_layers
    assert list(config.kinds_of_layers.values()) == [1, 26]
    assert dense.mlp == MLPConfig(10944)
    assert sparse.mlp == MoEConfig(64, 6, 1408, norm_topk_prob=False, shared=MLPConfig(2816))
    attention = sparse.attention
    assert isinstance(attention, LatentAttentionConfig)
    assert attention.num_cached_values == 576 and config.num_cached_values == 27 * 576
    stretch = 0.1 * 0.707 * math.log(40) + 1
    assert attention.scale == pytest.approx(192**-0.5 * stretch**2)
    assert attention.rope.scaling.attention_factor == 1.0
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    grouped = model_config_from_hf(DEEPSEEK_V2_LITE | groups).layers[1].mlp
    assert (grouped.num_groups, grouped.num_groups_per_token) == (8, 3)


@pytest.mark.parametrize(
    ("base", "name", "value", "error"),
    [
        (MIXTRAL_8X7B, "sliding_window", 4096, UnsupportedModelError),
        (MIXTRAL_8X7B, "hidden_act", "gelu", UnsupportedModelError),
        (MIXTRAL_8X7B, "num_local_experts", 0, CheckpointError),
        (MIXTRAL_8X7B, "num_experts_per_tok", 9, CheckpointError),
        (QWEN3_30B_A3B, "mlp_only_layers", [48], CheckpointError),
        (QWEN3_30B_A3B, "mlp_only_layers", 3, CheckpointError),
        (QWEN3_30B_A3B, "decoder_sparse_step", 0, CheckpointError),
        (DEEPSEEK_V2_LITE, "q_lora_rank", 1536, UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "norm_topk_prob", True, UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "scoring_func", "sigmoid", UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "topk_method", "noaux_tc", UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "moe_layer_freq", 2, UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "num_key_value_heads", 8, UnsupportedModelError),
        (DEEPSEEK_V2_LITE, "qk_rope_head_dim", 63, CheckpointError),
    ],
    ids=str,
)
def test_what_is_wrong_or_unsupported_is_named(base, name, value, error):
    with pytest.raises(error, match="63 numbers" if value == 63 else name):
        model_config_from_hf(base | {name: value})


def test_experts_that_cannot_be_grouped_are_refused():
    groups = {"topk_method": "group_limited_greedy", "n_group": 7, "topk_group": 2}
    with pytest.raises(CheckpointError, match="n_group=7"):
        model_config_from_hf(DEEPSEEK_V2_LITE | groups)
    groups = {"topk_method": "group_limited_greedy", "n_group": 32, "topk_group": 2}
    with pytest.raises(CheckpointError, match="num_experts_per_tok=6"):  # of 4 in two groups
        model_config_from_hf(DEEPSEEK_V2_LITE | groups)
