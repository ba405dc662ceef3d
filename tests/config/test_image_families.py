"""Configs of models that see: what published files leave out, both styles, and what is refused."""

import pytest

from octavo.config import model_config_from_hf
from octavo.errors import CheckpointError, UnsupportedModelError

CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
# As llava-hf/llava-1.5-7b-hf has it: nearly all of the language model's fields are defaults.
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
# As llava-hf/llava-v1.6-mistral-7b-hf has it.
MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
# As Qwen/Qwen2.5-VL-7B-Instruct has it, in the style of transformers 4.
QWEN_TEXT = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN = QWEN_TEXT | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


# As Salesforce/blip2-opt-2.7b has it.
BLIP2 = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_token_index": 50265,
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "qformer_config": {"model_type": "blip_2_qformer"},
    "text_config": {
        "architectures": ["OPTForCausalLM"],
        "eos_token_id": 50118,
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "model_type": "opt",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "torch_dtype": "float16",
        "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "torch_dtype": "float16",
    "use_decoder_only_language_model": True,
    "vision_config": {"model_type": "blip_2_vision_model"},
}
T5 = {"model_type": "t5", "d_model": 2048}


def test_llavas_missing_fields_are_those_of_transformers():
    from transformers import LlavaConfig

    config = model_config_from_hf(LLAVA)
    text = LlavaConfig(**LLAVA).text_config
    attention, mlp = config.layers[0].attention, config.layers[0].mlp
    assert (config.hidden_size, config.num_layers) == (text.hidden_size, text.num_hidden_layers)
    assert attention.num_heads == text.num_attention_heads
    assert attention.num_kv_heads == text.num_key_value_heads
    assert mlp.intermediate_size == text.intermediate_size
    assert config.max_position_embeddings == text.max_position_embeddings == 4096
    assert config.eos_token_ids == (text.eos_token_id,)
    assert (config.image_token_id, config.vocab_size, config.dtype) == (32000, 32064, "float16")
    assert not config.tie_word_embeddings


def test_mistrals_missing_fields_are_those_of_transformers():
    from transformers import LlavaNextConfig

    written = LLAVA | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "text_config": MISTRAL,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
    }
    config = model_config_from_hf(written)
    text = LlavaNextConfig(**written).text_config
    attention = config.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads) == (32, text.num_key_value_heads)
    assert attention.window is None and attention.rope.theta == 1e6
    assert config.hidden_size == text.hidden_size
    without = written | {"text_config": {k: v for k, v in MISTRAL.items() if "sliding" not in k}}
    [window] = {layer.attention.window for layer in model_config_from_hf(without).layers}
    assert window == LlavaNextConfig(**without).text_config.sliding_window


def test_qwens_config_is_read_in_both_styles():
    flat = model_config_from_hf(QWEN)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {k: v for k, v in QWEN_TEXT.items() if not k.startswith("rope")}
    around = {k: v for k, v in QWEN.items() if k not in QWEN_TEXT}
    nested = around | {"text_config": text | {"rope_parameters": rope}}
    assert model_config_from_hf(nested) == flat
    attention = flat.layers[0].attention
    assert attention.rope.sections == (16, 24, 24) and attention.rope.scaling is None
    assert attention.bias and not attention.output_bias
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (28, 4, 128)
    assert (flat.image_token_id, flat.eos_token_ids) == (151655, (151645,))


def test_blip2s_missing_fields_are_those_of_transformers():
    from transformers import Blip2Config

    config = model_config_from_hf(BLIP2)
    text = Blip2Config(**BLIP2).text_config
    assert config.architecture == "blip2"
    assert config.max_position_embeddings == text.max_position_embeddings == 2048
    assert (config.bos_token_id, config.eos_token_ids) == (text.bos_token_id, (50118,))
    assert config.tie_word_embeddings == text.tie_word_embeddings
    assert (config.image_token_id, config.vocab_size, config.dtype) == (50265, 50304, "float16")
    assert config.vision.out_hidden_size == config.hidden_size == 2560
    small = model_config_from_hf(BLIP2 | {"text_config": {"model_type": "opt"}})
    text = Blip2Config(**BLIP2 | {"text_config": {"model_type": "opt"}}).text_config
    assert (small.hidden_size, small.num_layers) == (text.hidden_size, text.num_hidden_layers)
    assert small.layers[0].mlp.intermediate_size == text.ffn_dim
    assert small.layers[0].attention.num_heads == text.num_attention_heads
    assert small.vocab_size == text.vocab_size


def scaling(kind, sections):
    return {"rope_scaling": {"type": kind, "mrope_section": sections}}


@pytest.mark.parametrize(
    ("base", "changes", "error", "named"),
    [
        (LLAVA, {"image_token_index": None}, CheckpointError, "image_token_id"),
        (LLAVA, {"image_token_index": 32064}, CheckpointError, "image_token_index"),
        (LLAVA, {"text_config": {"model_type": "gemma"}}, CheckpointError, "hidden_size"),
        (
            LLAVA,
            {"text_config": {"model_type": "gemma", "hidden_size": 64}},
            UnsupportedModelError,
            "text_config: model_type='gemma'",
        ),
        (LLAVA, {"text_config": None}, CheckpointError, "text_config"),
        (LLAVA, {"quantization_config": {}}, UnsupportedModelError, "quantization_config"),
        (QWEN, {"quantization_config": {}}, UnsupportedModelError, "quantization_config"),
        (QWEN, {"video_token_id": 152064}, CheckpointError, "video_token_id"),
        (BLIP2, {"text_config": T5}, UnsupportedModelError, "model_type='t5'.*: opt, llama"),
        (BLIP2, {"image_token_index": None}, CheckpointError, "image_token_id"),
        (QWEN, {"use_sliding_window": True}, UnsupportedModelError, "use_sliding_window"),
        (QWEN, {"rope_scaling": None}, CheckpointError, "mrope_section"),
        (QWEN, scaling("mrope", [16, 24]), CheckpointError, "mrope_section"),
        (QWEN, scaling("mrope", [64, "0", 0]), CheckpointError, "mrope_section"),
        (QWEN, scaling("dynamic", [16, 24, 24]), UnsupportedModelError, "dynamic"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(base, changes, error, named):
    with pytest.raises(error, match=named):
        model_config_from_hf(base | changes)
