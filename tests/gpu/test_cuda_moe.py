"""Mixtures of experts through the whole engine on an NVIDIA GPU, and their kernels one by one."""

import json

import pytest
import torch
from helpers import create_request, run_to_end, tokens_of

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions
from octavo.engine import build_engine
from octavo.kernels import MOE_EXPERTS, MOE_ROUTE, Routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "num_experts": 21,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
DEEPSEEK_V2 = {name: value for name, value in CONFIG.items() if name != "head_dim"} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 6,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 21,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 7, 16, 17, 150)
]


@pytest.fixture(params=[CONFIG, DEEPSEEK_V2], ids=["Qwen3-MoE", "DeepSeek-V2"])
def model(request, tmp_path):
    """A checkpoint of fp32 weights, large enough that answers vary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(request.param)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    reference = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_fp32_tokens_on_the_gpu_are_those_of_the_cpu(model, enforce_eager):
    def answers(device, **options):
        llm = LLM(
            str(model),
            device=device,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=2**24,
            check_integrity=True,
            **options,
        )
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert answers("cuda", enforce_eager=enforce_eager) == answers("cpu")


def test_random_weights_in_bf16_run_and_no_small_op_is_a_reference(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    values = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy"}
    engine = build_engine(
        EngineOptions.from_flat(str(tmp_path), values | {"kv_cache_memory_bytes": 2**24})
    )
    for report in engine.kernels:
        assert report.choice.op == "linear" or report.choice.name != "reference", str(report)
    engine.core.add(create_request(20, 5, request_id="one"))
    assert len(tokens_of(run_to_end(engine.core), "one")) == 5


@pytest.mark.parametrize("tokens", [1, 4, 64, 333, 3000])
@pytest.mark.parametrize("sizes", [(128, 2048, 768, 8), (8, 1024, 3584, 2)])
def test_large_experts_in_bf16_and_a_row_has_the_same_bits_in_any_batch(tokens, sizes):
    from octavo.kernels.triton_moe_experts import EXPERTS

    num_experts, width, size, num_ranks = sizes
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    gate_up = torch.randn(num_experts, 2 * size, width, **bf16) * width**-0.5
    down = torch.randn(num_experts, width, size, **bf16) * size**-0.5
    x = torch.randn(tokens, width, **bf16)
    logits = torch.randn(tokens, num_experts, device="cuda")
    weights, experts = MOE_ROUTE.reference(logits, Routing(num_ranks, norm_topk_prob=True))
    made = EXPERTS.apply(x, EXPERTS.prepare(gate_up, down), weights, experts)
    reference = MOE_EXPERTS.reference
    expected = reference.apply(x, reference.prepare(gate_up, down), weights, experts)
    torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-2)
    for row in range(0, tokens, 1 + tokens // 5):
        one = slice(row, row + 1)
        alone = EXPERTS.apply(x[one], EXPERTS.prepare(gate_up, down), weights[one], experts[one])
        assert torch.equal(alone, made[one])
