"""`ModelConfig.from_hf`: both styles of transformers, and refusals by name."""

import pytest
from checkpoint_files import GGUF_METADATA, HF_CONFIG, write_gguf
from checkpoint_files import hf_tensors as tensors_of

from octavo.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    Rope,
    RopeScaling,
    architectures,
    locate,
    model_config_from_hf,
    read_model_config,
)
from octavo.errors import CheckpointError, UnsupportedModelError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(**changes):
    return model_config_from_hf(HF_CONFIG | changes)


def rope_of(config):
    [rope] = config.ropes
    return rope


def test_all_fields():
    attention = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, scale=8**-0.5, rope=Rope(10000.0, 8)
    )
    assert read(bos_token_id=1, eos_token_id=2) == ModelConfig(
        architecture="llama",
        vocab_size=64,
        hidden_size=32,
        layers=(LayerConfig(attention, MLPConfig(64)),) * 2,
        norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    "scaling", [{}, {"rope_type": "llama3"} | LLAMA3, {"rope_type": "linear", "factor": 2.0}]
)
def test_style_of_transformers_5(scaling):
    absent = ("rope_theta", "torch_dtype")
    written = {key: value for key, value in HF_CONFIG.items() if key not in absent} | {
        "dtype": "bfloat16",
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"} | scaling,
        "transformers_version": "5.23.0",
    }
    config = model_config_from_hf(written)
    rope = rope_of(config)
    assert (rope.theta, rope.rotary_dim, config.dtype) == (5000.0, 16, "bfloat16")
    assert (rope.scaling.kind if rope.scaling else None) == scaling.get("rope_type")


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaling_in_the_style_of_transformers_4(key):
    linear = read(rope_scaling={key: "linear", "factor": 4})
    assert rope_of(linear).scaling == RopeScaling("linear", 4)
    llama3 = read(rope_theta=7.0, rope_scaling={key: "llama3"} | LLAMA3)
    assert rope_of(llama3) == Rope(7.0, 8, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    assert rope_of(read(rope_scaling={key: "default"})).scaling is None
    assert rope_of(read(rope_scaling=None)).scaling is None


def test_defaults():
    absent = ("num_key_value_heads", "torch_dtype", "rms_norm_eps", "rope_theta", "architectures")
    config = model_config_from_hf({k: v for k, v in HF_CONFIG.items() if k not in absent})
    num_kv_heads = config.layers[0].attention.num_kv_heads
    assert (num_kv_heads, config.dtype, config.norm_eps) == (4, "float32", 1e-6)
    assert (rope_of(config).theta, config.eos_token_ids, config.bos_token_id) == (10000.0, (), None)


def test_eos_ids_of_both_configs():
    config = HF_CONFIG | {"eos_token_id": [2, 3]}
    assert model_config_from_hf(config, {"eos_token_id": [3, 5]}).eos_token_ids == (2, 3, 5)
    assert model_config_from_hf(config, {"eos_token_id": 7}).eos_token_ids == (2, 3, 7)
    with pytest.raises(CheckpointError, match="generation_config: eos_token_id"):
        model_config_from_hf(config, {"eos_token_id": 64})


QWEN3_0_6B = {  # as it was published, with transformers 4.51
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def test_qwen3_as_it_was_published():
    attention = AttentionConfig(
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        scale=128**-0.5,
        rope=Rope(1e6, 128),
        qk_norm=True,
    )
    assert model_config_from_hf(QWEN3_0_6B, QWEN3_GENERATION) == ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        layers=(LayerConfig(attention, MLPConfig(3072)),) * 28,
        norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    )


def test_qwen3_as_transformers_writes_and_reads_it(tmp_path):
    from transformers import AutoConfig

    published = AutoConfig.for_model(**QWEN3_0_6B)
    published.save_pretrained(tmp_path)
    written = read_model_config(locate(str(tmp_path)))
    assert written == model_config_from_hf(QWEN3_0_6B)
    # A config that leaves head_dim out means what transformers takes for it.
    sparse = {key: QWEN3_0_6B[key] for key in QWEN3_0_6B if key != "head_dim"}
    head_dim = model_config_from_hf(sparse).layers[0].attention.head_dim
    assert head_dim == AutoConfig.for_model(**sparse).head_dim == 128


def test_windows_of_qwen3_count_only_where_they_are_switched_on():
    model_config_from_hf(QWEN3_0_6B | {"sliding_window": 4096})
    model_config_from_hf(QWEN3_0_6B | {"layer_types": ["full_attention"] * 28})
    for changes, message in (
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 14}, "layer_types=.*only 'full"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention'"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            model_config_from_hf(QWEN3_0_6B | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["JambaForCausalLM"]}, "JambaForCausalLM.*supported: LlamaFor"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "jamba"}, "jamba"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, "'ntk'.*supported: default, linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope_type"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8.*supported: bfloat16"),
        ({"hidden_act": "x" * 10_000}, r"xxx\.\.\."),
    ],
)
def test_unsupported_values_are_named(changes, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read(**changes)
    # What a checkpoint says is cut; the list of architectures is as long as it is.
    all_names = ", ".join(one.hf_name for one in architectures().values())
    assert len(str(caught.value).replace(all_names, "")) < 300


def test_remote_code_is_never_a_way_in():
    auto_map = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    with pytest.raises(UnsupportedModelError, match="never run"):
        read(architectures=["EvilForCausalLM"], auto_map=auto_map)
    assert read(auto_map=auto_map).architecture == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000.*1\.\.1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 7}, "head_dim=7 cannot be rotated"),
        ({"hidden_size": 33}, "no multiple"),
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"torch_dtype": 16}, "dtype=16"),
        ({"architectures": []}, "names the model"),
        ({"architectures": None, "model_type": None}, "names the model"),
        ({"architectures": None, "model_type": ["llama"]}, "names the model"),
        ({"eos_token_id": 64}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4.0}}, "not above"),
    ],
)
def test_damaged_values_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_gguf_config_reads_as_the_same_model(tmp_path):
    embedding = {"token_embd.weight": tensors_of()["model.embed_tokens.weight"].numpy()}
    path = write_gguf(tmp_path / "tiny.gguf", GGUF_METADATA, embedding)
    config = read_model_config(locate(str(path)))
    expected = read(tie_word_embeddings=True, rms_norm_eps=config.norm_eps)
    assert config == expected
    assert config.norm_eps == pytest.approx(1e-5)


def test_gguf_of_another_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", {}, {}, architecture="jamba")
    with pytest.raises(UnsupportedModelError, match="jamba"):
        read_model_config(locate(str(path)))


@pytest.mark.model
def test_default_model_reads_as_transformers_reads_it():
    from transformers import LlamaConfig  # slow to import

    checkpoint = locate("smollm2-135m-instruct")
    reference = LlamaConfig.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name
    ).to_dict()
    ours = read_model_config(checkpoint)
    theirs = model_config_from_hf(reference | {"dtype": "bfloat16"})
    assert ours == theirs
