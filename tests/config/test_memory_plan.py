"""The memory plan against sums done by hand and against published sizes."""

import subprocess

import pytest
from checkpoint_files import HF_CONFIG

from octavo.config import (
    DeviceFacts,
    EngineOptions,
    model_config_from_hf,
    planned_steps,
    resolve,
)
from octavo.config.capacity import LengthClass, Pool, mix_capacity, parse_lengths
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import (
    CUDA_CONTEXT_BYTES,
    KNOWN_GPUS,
    LOADED_KERNELS_BYTES,
    device_budget,
    planned_device,
)
from octavo.config.planned_steps import COMPILED_OPS, expected_ops, num_scored_at_once
from octavo.errors import ConfigError
from octavo.kernels import (
    ENCODER_ATTENTION,
    GELU_TANH_MUL,
    KV_WRITE,
    LATENT_ATTENTION,
    LAYER_NORM,
    LINEAR,
    MOE_EXPERTS,
    MOE_ROUTE,
    PAGED_ATTENTION,
    QK_NORM_ROTARY_KV_WRITE,
    RMS_NORM,
    ROTARY_KV_WRITE,
    SAMPLE_TOKENS,
    SILU_MUL,
)
from octavo.kernels.gated_linear import is_worth_one_kernel

triton_decode_attention = pytest.importorskip("octavo.kernels.triton_decode_attention")

GIB, MIB = 2**30, 2**20
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def resolved(model, device="cpu-64gib", memory_gib=None, **options):
    facts, major = planned_device(device, memory_gib)
    config = resolve(EngineOptions.from_flat("model", options), model_config_from_hf(model), facts)
    return config, facts, major


def plan_of(model, device="cpu-64gib", memory_gib=None, compiled=None, **options):
    config, facts, major = resolved(model, device, memory_gib, **options)
    budget = device_budget(facts, major=major, utilization=config.gpu_memory_utilization)
    return plan_memory(config, budget, compiled=compiled)


def bytes_by_kind(plan):
    return {group.kind: group.num_bytes for group in plan.weights}


def test_every_byte_of_a_tiny_model():
    # hidden 32, inner 64, 4 heads of 8 on 2 key/value heads, 2 layers, 64 ids, 128 positions; fp32.
    plan = plan_of(HF_CONFIG, max_num_batched_tokens=20, max_num_seqs=5)
    assert bytes_by_kind(plan) == {
        "embedding": 64 * 32 * 4,
        "output head": 64 * 32 * 4,
        "attention": 2 * (64 * 32 + 32 * 32) * 4,  # q, k, v: 32 + 16 + 16 rows
        "MLP": 2 * (128 * 32 + 32 * 64) * 4,
        "norms": 5 * 32 * 4,
        "table of rotary angles": 128 * 8 * 4,
    }
    assert plan.num_parameters == 2 * 2048 + 2 * 3072 + 2 * 6144 + 160
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, key and value, heads, dim, fp32
    [layers] = plan.kv_layers
    assert (layers.kind, layers.num_layers) == ("full attention", 2)
    found = {moment.name: moment.num_bytes for moment in plan.moments}
    assert found == {
        "attention": 20 * 4 * (2 * 32 + 32 + 64 + 32 + 32),
        "MLP": 20 * 4 * (2 * 32 + 32 + 128 + 64),
        "draw": 5 * 4 * 32 + 5 * 64 * (4 + 4 + 8 + 8),
    }
    assert plan.peak.name == "MLP" and plan.activation_bytes == 20 * 4 * 288


def test_packed_weights_are_padded_and_biases_are_counted():
    odd = HF_CONFIG | {"vocab_size": 70, "hidden_size": 40, "head_dim": 8, "attention_bias": True}
    odd |= {"tie_word_embeddings": True, "mlp_bias": True, "intermediate_size": 50}
    packed = bytes_by_kind(plan_of(odd, dtype="bfloat16"))
    # Rows go up to a multiple of 16, columns of bfloat16 to one of 32: 70 x 40 -> 80 x 64.
    assert packed["embedding, also the output head"] == 80 * 64 * 2
    assert "output head" not in packed
    assert packed["attention"] == 2 * 2 * (64 * 64 + 64 + 48 * 32 + 40)
    assert packed["MLP"] == 2 * 2 * (112 * 64 + 100 + 48 * 64 + 40)
    plain = bytes_by_kind(plan_of(odd, "h100-80gb", dtype="bfloat16"))
    assert plain["embedding, also the output head"] == 70 * 40 * 2
    assert plain["attention"] == 2 * 2 * (64 * 40 + 64 + 40 * 32 + 40)
    assert plain["MLP"] == 2 * 2 * (100 * 40 + 100 + 40 * 50 + 40)


def test_the_published_sizes_of_llama_3_1_8b():
    plan = plan_of(LLAMA_8B, "h100-80gb")
    assert plan.num_parameters == 8_030_261_248
    assert plan.kv_bytes_per_token == 131_072
    assert plan.weight_bytes == 2 * 8_030_261_248 + 131_072 * 128 * 4
    [draw] = [moment for moment in plan.moments if moment.name == "draw"]
    assert draw.num_bytes == 512 * 2 * (4096 + 128256)  # the draw itself is one kernel
    # 8,192 tokens in bfloat16: the stream four times, and what one kernel makes of gate and up.
    assert plan.peak.name == "MLP"
    assert plan.peak.num_bytes == 8192 * 2 * (4 * 4096 + 14336)
    assert plan.activation_bytes == plan.peak.num_bytes + 32 * MIB


def test_attention_on_a_gpu_keeps_sums_of_parts_up_to_a_bound():
    def parts(**options):
        moments = plan_of(QWEN3_0_6B, "h100-80gb", **options).moments
        [moment] = [moment for moment in moments if moment.name == "attention in parts"]
        return moment.tensors[-1].num_bytes

    assert parts() == 32 * MIB == triton_decode_attention.PART_BYTES
    splits, rows = triton_decode_attention.MAX_SPLITS, triton_decode_attention.ROWS
    assert parts(max_num_seqs=4) == 4 * 8 * splits * rows * (128 + 2) * 4


def test_gate_and_up_are_held_where_no_one_kernel_takes_them():
    apart = 8192 * 2 * (3 * 4096 + 3 * 14336)
    assert plan_of(LLAMA_8B, "a100-80gb").peak.num_bytes == apart
    invariant = plan_of(LLAMA_8B, "h100-80gb", determinism="batch-invariant")
    assert invariant.peak.num_bytes == apart
    few = plan_of(LLAMA_8B, "h100-80gb", max_num_batched_tokens=1024)
    moments = {moment.name: moment.num_bytes for moment in few.moments}
    assert moments["MLP"] == 1024 * 2 * (3 * 4096 + 3 * 14336)
    for rows, outputs in ((1024, 14336), (1025, 14336), (1025, 3072), (1366, 3072), (8192, 511)):
        planned = (
            rows > planned_steps.MOST_ROWS_APART and rows * outputs >= planned_steps.LEAST_RESULTS
        )
        assert planned == is_worth_one_kernel(rows, outputs)


def test_the_published_sizes_of_qwen3_0_6b():
    plan = plan_of(QWEN3_0_6B, "h100-80gb")
    assert plan.num_parameters == 596_049_920
    assert plan.num_parameters - 151_936 * 1024 == 440_467_456  # without the embedding
    assert bytes_by_kind(plan)["norms"] == 2 * (57 * 1024 + 28 * 2 * 128)
    assert plan.kv_bytes_per_token == 112 * 1024
    assert "norm of the heads" not in {moment.name for moment in plan.moments}
    on_cpu = {moment.name: moment for moment in plan_of(QWEN3_0_6B).moments}
    held = 2 * 1024 + 1024 + (16 + 8 + 8) * 128  # residual and input, normed, qkv
    assert on_cpu["norm of the heads"].num_bytes == 1024 * 2 * (held + 2 * 16 * 128)


@pytest.mark.parametrize("device", ["cpu-64gib", "h100-80gb"])
def test_a_model_is_expected_to_run_its_own_ops_only(device):
    llama, _, _ = resolved(LLAMA_8B, device)
    qwen3, _, _ = resolved(QWEN3_0_6B, device)
    assert expected_ops(llama) ^ expected_ops(qwen3) == {
        "rotary_kv_write",
        "qk_norm_rotary_kv_write",
    }
    assert "rotary_kv_write" in expected_ops(llama)


@pytest.mark.parametrize("device", ["cpu-64gib", "h100-80gb"])
def test_gpt2_has_none_of_llamas_small_ops(device):
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024}
    gpt2 |= {"n_embd": 768, "n_layer": 12, "n_head": 12}
    config, _, _ = resolved(gpt2, device)
    llama, _, _ = resolved(HF_CONFIG, device)
    norms = {"layer_norm"} if device == "h100-80gb" else set()
    others = {"rms_norm", "silu_mul", "rotary_kv_write", "kv_write"}
    assert expected_ops(config) ^ expected_ops(llama) == others | norms
    assert expected_ops(config) >= {"kv_write"} | norms
    plan = plan_of(gpt2, device)
    assert plan.num_parameters == 124_439_808  # as OpenAI published it, "124M"
    assert bytes_by_kind(plan)["learned positions"] == 1024 * 768 * 4
    assert {moment.name for moment in plan.moments} >= {"attention", "MLP", "draw"}


def test_the_kv_cache_of_a_gpu_is_what_is_left_of_its_share():
    plan = plan_of(LLAMA_8B, "h100-80gb", gpu_memory_utilization=0.5)
    others = CUDA_CONTEXT_BYTES + LOADED_KERNELS_BYTES
    left = KNOWN_GPUS["h100-80gb"].total_bytes // 2 - others
    taken = plan.weight_bytes + plan.activation_bytes + plan.row_bytes + plan.graph_bytes
    assert plan.kv_cache_bytes == left - taken and plan.graph_bytes > plan.peak.num_bytes
    eager = plan_of(LLAMA_8B, "h100-80gb", gpu_memory_utilization=0.5, enforce_eager=True)
    assert eager.kv_cache_bytes == plan.kv_cache_bytes + plan.graph_bytes
    assert plan.num_blocks == plan.kv_cache_bytes // (16 * 131_072)
    assert plan.largest_context == 131_072 < plan.num_kv_tokens
    assert plan.missing_bytes == 0
    small = plan_of(LLAMA_8B, "cuda", memory_gib=20)
    assert small.largest_context == small.num_kv_tokens < 131_072
    given = plan_of(LLAMA_8B, "h100-80gb", kv_cache_memory_bytes=2**30)
    assert given.kv_cache_bytes == 2**30 and given.num_kv_tokens == 8192


def test_what_is_missing_is_said():
    on_gpu = plan_of(LLAMA_8B, "cuda", memory_gib=16)
    taken = on_gpu.weight_bytes + on_gpu.activation_bytes + on_gpu.budget.others_bytes
    taken += on_gpu.row_bytes + on_gpu.graph_bytes
    assert on_gpu.missing_bytes == taken - int(0.9 * 16 * GIB)
    assert (on_gpu.num_blocks, on_gpu.largest_context) == (0, 0)
    on_cpu = plan_of(LLAMA_8B, "cpu-16gib")
    taken = on_cpu.weight_bytes + on_cpu.activation_bytes + on_cpu.row_bytes + 2**30
    assert on_cpu.missing_bytes == taken - 16 * GIB


def test_a_step_has_no_more_tokens_than_its_sequences_may_have():
    plan = plan_of(HF_CONFIG, max_num_batched_tokens=1000, max_num_seqs=3)
    [stream, *_] = plan.peak.tensors
    assert stream.shape == (3 * 128, 32)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 512}], ids=str)
def test_prompts_are_scored_in_what_the_peak_of_a_step_leaves(options):
    config, _, _ = resolved(QWEN3_0_6B, "h100-80gb", **options)
    count = num_scored_at_once(config)
    # bf16 logits, fp32 logits and log-softmax, and a comparison, beside all hidden states.
    each = 151936 * (2 + 4 + 4 + 1)
    hidden = config.max_num_batched_tokens * 1024 * 2
    peak = plan_of(QWEN3_0_6B, "h100-80gb", **options).peak.num_bytes
    assert count > 1
    assert peak - each < hidden + count * each <= peak
    tiny, _, _ = resolved(HF_CONFIG, max_num_batched_tokens=16, max_num_seqs=4)
    assert num_scored_at_once(tiny) == 16  # never more than there are


def test_references_hold_more_than_compiled_ops():
    compiled = plan_of(HF_CONFIG)
    references = plan_of(HF_CONFIG, compiled=frozenset())
    names = {moment.name for moment in references.moments}
    assert names - {moment.name for moment in compiled.moments} == {
        "norm in plain torch",
        "rotation in plain torch",
        "attention in plain torch",
    }
    assert references.peak.num_bytes > compiled.peak.num_bytes
    half = plan_of(HF_CONFIG, dtype="float16")  # no compiled op on a CPU takes it
    assert {moment.name for moment in half.moments} == names


def test_the_table_of_compiled_ops_is_what_the_kernels_register():
    writes = (KV_WRITE, ROTARY_KV_WRITE, QK_NORM_ROTARY_KV_WRITE)
    in_layers = (LINEAR, PAGED_ATTENTION, RMS_NORM, LAYER_NORM, *writes)
    ops = (
        *in_layers,
        SILU_MUL,
        GELU_TANH_MUL,
        MOE_ROUTE,
        MOE_EXPERTS,
        LATENT_ATTENTION,
        ENCODER_ATTENTION,
        SAMPLE_TOKENS,
    )
    for device, implementation in (("cpu", "native"), ("cuda", "triton")):
        registered = {op.name for op in ops if implementation in op.names()}
        assert COMPILED_OPS[device] == registered


def pool(num_blocks=100, allocator="paged", longest=256):
    return Pool(num_blocks, 16, allocator, longest)


def test_mean_blocks_is_the_average_over_the_output():
    for total, output in ((1, 1), (16, 16), (17, 16), (33, 5), (400, 123)):
        lengths = range(total - output + 1, total + 1)
        expected = sum(-(-length // 16) for length in lengths) / output
        assert pool().mean_blocks(total, output) == pytest.approx(expected)


def test_a_mix_at_its_ends_and_on_average():
    # 75% of 16+16 tokens, 25% of 32+48: weighted by output tokens both are met equally often.
    mix = parse_lengths("16+16:3, 32+48:1")
    assert mix == (LengthClass(32, 16, 0.75), LengthClass(80, 48, 0.25))
    found = mix_capacity(mix, pool(), max_num_seqs=1000)
    assert found.blocks_at_ends == pytest.approx((2 + 5) / 2)
    assert found.blocks_on_average == pytest.approx((2 + 4) / 2)
    assert (found.num_at_ends, found.num_on_average) == (28, 33)
    assert mix_capacity(mix, pool(), max_num_seqs=30).num_on_average == 30


def test_a_mix_of_whole_lengths_has_no_average():
    found = mix_capacity(parse_lengths("16:0.5,48:0.5"), pool(), max_num_seqs=1000)
    assert found.blocks_at_ends == 2 and found.num_at_ends == 50
    assert found.num_on_average is None


def test_sequences_in_one_run_hold_more_blocks():
    assert pool().num_sequences(33) == 33
    assert pool(allocator="contiguous").num_sequences(33) == 100 // 16
    assert pool(allocator="contiguous-buddy").num_sequences(33) == 100 // 4
    assert pool(allocator="contiguous-buddy").mean_blocks(33, 32) == 4
    plan = plan_of(
        HF_CONFIG | {"max_position_embeddings": 4096},
        "h100-80gb",
        kv_allocator="contiguous-buddy",
        kv_cache_memory_bytes=256 * 16 * 100,
    )
    assert plan.num_blocks == 100 and plan.largest_context == 64 * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("512", "cannot be read"),
        ("512:x", "cannot be read"),
        ("512:0.5,", "cannot be read"),
        ("-512:1", "cannot be read"),
        ("512:0", "must not all be 0"),
        ("0:1", "must be positive"),
        ("5+0:1", "must be positive"),
        ("512:0.5,100+5:0.5", "for every entry or for none"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_lengths(text)


def test_devices_by_name():
    facts, major = planned_device("cpu-96gib")
    assert (facts.kind, facts.total_memory_bytes, major) == ("cpu", 96 * GIB, 0)
    facts, major = planned_device("h200-141gb")
    assert (facts.kind, major) == ("cuda", 9) and facts.total_memory_bytes > 139 * GIB
    facts, _ = planned_device("l40s-48gb", memory_gib=40)
    assert facts.free_memory_bytes == 40 * GIB
    for name, memory_gib, message in (
        ("h100", None, "h100-80gb"),
        ("cpu", -1, "must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            planned_device(name, memory_gib)


def test_this_machine_is_asked_through_nvidia_smi(monkeypatch):
    line = "NVIDIA H100 80GB HBM3, 81559, 480, 80000, 9.0\nsecond, 1, 1, 1, 8.0\n"
    asked = []

    def answer(command, **kwargs):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=line)

    monkeypatch.setattr(subprocess, "run", answer)
    facts, major = planned_device("auto")
    assert asked[0][0] == "nvidia-smi"
    assert (facts.kind, facts.name, major) == ("cuda", "NVIDIA H100 80GB HBM3", 9)
    assert facts.total_memory_bytes == 81079 * MIB and facts.free_memory_bytes == 80000 * MIB
    budget = device_budget(facts, major=major, utilization=0.9)
    assert budget.others_bytes == 1079 * MIB + CUDA_CONTEXT_BYTES + LOADED_KERNELS_BYTES
    assert planned_device("cpu")[0].kind == "cpu" and len(asked) == 1


def test_a_machine_without_a_gpu_plans_for_its_cpu(monkeypatch):
    def missing(command, **kwargs):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    facts, major = planned_device("auto")
    assert (facts.kind, major) == ("cpu", 0)
    assert 0 < facts.free_memory_bytes <= facts.total_memory_bytes
    with pytest.raises(ConfigError, match="nvidia-smi shows no GPU"):
        planned_device("cuda")


def test_a_cpu_counts_what_others_use():
    facts = DeviceFacts("cpu", "a CPU", 2, 3 * GIB, 8 * GIB)
    budget = device_budget(facts, major=0, utilization=0.9)
    assert (budget.total_bytes, budget.usable_bytes, budget.others_bytes) == (
        8 * GIB,
        8 * GIB,
        5 * GIB,
    )
