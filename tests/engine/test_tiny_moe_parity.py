"""Random mixtures of experts from safetensors against transformers, and the ways to run them."""

import json

import parity
import pytest
import torch
from helpers import create_request, run_to_end, tokens_of
from parity import (
    answers_of,
    check_answers,
    check_planned_memory,
    greedy,
    ids_of,
    load_reference,
    needs_native,
    prompts_of,
)

from octavo import SamplingParams
from octavo.config import EngineOptions
from octavo.engine import build_engine
from octavo.kernels import reference_only

NUM_TOKENS = 40
GREEDY = greedy(NUM_TOKENS)
PROMPTS = prompts_of(1, 2, 15, 16, 17, 33, 100, 256)
COMMON = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
MIXTRAL = COMMON | {"model_type": "mixtral", "num_local_experts": 5}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
DEEPSEEK_V2 = {name: value for name, value in COMMON.items() if name != "head_dim"} | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 6,
    "kv_lora_rank": 40,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # layers, keys and values, heads, dim, fp32, tokens

VARIANTS = {
    "Mixtral": MIXTRAL,
    "Mixtral, tied, one expert a token": MIXTRAL
    | {"tie_word_embeddings": True, "num_experts_per_tok": 1},
    "Mixtral, all experts": MIXTRAL | {"num_local_experts": 2},
    "Mixtral, one kv head, another head_dim, another eps": MIXTRAL
    | {"num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 0.5},
    "Qwen3-MoE": QWEN3_MOE,
    "Qwen3-MoE, weights as they are": QWEN3_MOE | {"norm_topk_prob": False},
    "Qwen3-MoE, biased, a dense layer": QWEN3_MOE
    | {"attention_bias": True, "mlp_only_layers": [0], "seed": 1},
    "Qwen3-MoE, experts in every second layer": QWEN3_MOE
    | {"decoder_sparse_step": 2, "num_hidden_layers": 3},
    "DeepSeek-V2": DEEPSEEK_V2,
    "DeepSeek-V2, experts of groups, scaled": DEEPSEEK_V2
    | GROUPS
    | {"routed_scaling_factor": 2.5, "first_k_dense_replace": 0, "n_shared_experts": 1},
    "DeepSeek-V2, YaRN": DEEPSEEK_V2 | {"rope_parameters": YARN},
    "DeepSeek-V2, biased, tied": DEEPSEEK_V2
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}


def write_tiny(directory, *, config, tied_experts=False):
    """A checkpoint as transformers saves it, with weights so large that answers vary.

    A variant's `seed` is one with which its answers do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(config)
    generator = torch.Generator().manual_seed(given.pop("seed", 0))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.1 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise * (0.5 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5))
            if tied_experts and name.endswith("mlp.gate.weight"):
                weight.zero_()  # all experts are as good as each other
    model.save_pretrained(directory)
    return directory


def tokens(llm, prompts=PROMPTS, sampling=GREEDY):
    return ids_of(llm, prompts, sampling)


def create_llm(model, **options):
    return parity.create_llm(model, **({"skip_tokenizer_init": True, "dtype": "float32"} | options))


def check_against_transformers(model):
    answers = answers_of(create_llm(model), PROMPTS, GREEDY)
    check_answers(load_reference(model), PROMPTS, answers)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, config):
    check_against_transformers(write_tiny(tmp_path / "tiny", config=config))


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE], ids=["Mixtral", "Qwen3-MoE"])
def test_experts_that_are_equally_likely_are_chosen_as_transformers_does(tmp_path, config):
    check_against_transformers(write_tiny(tmp_path / "tiny", config=config, tied_experts=True))


@pytest.fixture(
    scope="module", params=["Mixtral", "Qwen3-MoE, biased, a dense layer", "DeepSeek-V2"]
)
def model(request, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", config=VARIANTS[request.param])


@pytest.fixture(scope="module")
def expected(model):
    return tokens(create_llm(model))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"block_size": 4, "async_scheduling": True},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, expected, options):
    assert tokens(create_llm(model, **options)) == expected


def test_preemption_does_not_change_the_text(model, expected):
    tight = create_llm(model, kv_cache_memory_bytes=20 * BLOCK_BYTES, max_model_len=300)
    assert tokens(tight) == expected
    assert tight.stats().num_preemptions > 0


def test_a_prefix_that_was_cached_does_not_change_the_text(model, expected):
    llm = create_llm(model)
    assert tokens(llm) == expected
    before = llm.stats().num_prefix_hits
    assert tokens(llm) == expected
    assert llm.stats().num_prefix_hits > before


def test_the_references_give_the_same_text(model, expected):
    with reference_only():
        references = create_llm(model)
    assert tokens(references) == expected
    found = {str(report.choice) for report in references.engine.kernels}
    assert any(choice.startswith("moe_experts: reference") for choice in found)


def test_a_config_alone_is_enough_for_random_weights(tmp_path):
    config = QWEN3_MOE | {"architectures": ["Qwen3MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    defaults = {"device": "cpu", "kv_cache_memory_bytes": 2**24, "load_format": "dummy"}
    engine = build_engine(EngineOptions.from_flat(str(tmp_path), defaults))
    engine.core.add(create_request(20, 5, request_id="one"))
    assert len(tokens_of(run_to_end(engine.core), "one")) == 5


# The first block's input is the residual, and the last one has few rows: a third has all of both.
THREE_BLOCKS = {"num_hidden_layers": 3}
# What is alive at the peak depends on which of an expert's two sizes is the larger.
MOMENTS = [
    (True, QWEN3_MOE | {"moe_intermediate_size": 16}, "experts' sums"),
    (
        True,
        QWEN3_MOE | {"moe_intermediate_size": 92, "num_experts_per_tok": 6},
        "experts' first products",
    ),
    (True, QWEN3_MOE | {"moe_intermediate_size": 160}, "experts' gates"),
    (
        False,
        QWEN3_MOE | {"moe_intermediate_size": 300, "num_experts": 3},
        "experts in plain torch",
    ),
    (True, DEEPSEEK_V2 | {"v_head_dim": 300, "kv_lora_rank": 16}, "values of latents"),
    (True, DEEPSEEK_V2 | {"n_shared_experts": 50, "moe_intermediate_size": 8}, "MLP"),
]


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("compiled", "config", "moment"), MOMENTS)
def test_memory_is_as_planned(tmp_path, dtype, compiled, config, moment):
    model = write_tiny(tmp_path / "tiny", config=config | THREE_BLOCKS)
    if (moment, dtype) == ("values of latents", "float32"):
        moment = "attention"  # without the copies that products in 16 bits want, the next is larger
    options = {"dtype": dtype, "max_num_seqs": 64, "skip_tokenizer_init": True}
    engine = check_planned_memory(model, moment=moment, compiled=compiled, **options)
    if compiled:
        weights = engine.memory.lines[0]
        assert weights.planned_bytes == weights.measured_bytes


@torch.inference_mode()
def test_tokens_of_each_expert_are_counted_as_transformers_routes_them(tmp_path):
    from transformers import AutoModelForCausalLM

    model = write_tiny(
        tmp_path / "tiny", config=QWEN3_MOE | THREE_BLOCKS | {"mlp_only_layers": [1]}
    )
    llm = create_llm(model, count_expert_tokens=True)
    assert llm.expert_tokens() == {"blocks.0.mlp": [0] * 7, "blocks.2.mlp": [0] * 7}
    tokens(llm, [PROMPTS[-1]], SamplingParams(temperature=0, max_tokens=1))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen = []
    for layer in (0, 2):
        router = reference.model.layers[layer].mlp.gate
        router.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    reference(torch.tensor([PROMPTS[-1]["prompt_token_ids"]]))
    # The last block computes only tokens that something is drawn after.
    expected = [chosen[0].flatten(), chosen[1][-1]]
    found = list(llm.expert_tokens().values())
    assert found == [torch.bincount(experts, minlength=7).tolist() for experts in expected]
    assert create_llm(model).expert_tokens() == {}


@pytest.mark.parametrize("level", [1, 2])
def test_nothing_is_counted_asleep_and_it_begins_at_0_awake(tmp_path, level):
    model = write_tiny(tmp_path / "tiny", config=QWEN3_MOE)
    llm = create_llm(model, count_expert_tokens=True)
    fresh = llm.expert_tokens()
    tokens(llm, [PROMPTS[-1]], SamplingParams(temperature=0, max_tokens=1))
    assert fresh and llm.expert_tokens() != fresh
    llm.sleep(level)
    assert llm.expert_tokens() == {}
    llm.wake_up()
    assert llm.expert_tokens() == fresh
