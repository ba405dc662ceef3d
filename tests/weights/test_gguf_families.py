"""GGUF files of each family: llama.cpp's own names; weights and config as in safetensors.

`gguf`, llama.cpp's package, says what a tensor is called in a file of each architecture; what its
converter does to the numbers (norms that hold one more, rows in another order) is written here.
"""

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import byte_level_metadata, write_gguf

from octavo.config import architectures, locate, model_config_from_hf, read_model_config
from octavo.errors import UnsupportedModelError
from octavo.weights import read_tensors
from octavo.weights.gguf_layouts import LAYOUTS

SIZES = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# {llama.cpp's name: (its enumeration, transformers' config)}
FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, {"model_type": "llama", "head_dim": 16}),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, {"model_type": "qwen2"}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, {"model_type": "qwen3", "head_dim": 32}),
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    ),
    "gemma3": (
        gguf.MODEL_ARCH.GEMMA3,
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "num_hidden_layers": 7,
        },
    ),
}
NORMS_PLUS_ONE = ("gemma2", "gemma3")
REORDERED = {"llama": ("q_proj", "k_proj")}


def hf_config(family, **changes):
    from transformers import AutoConfig

    _, config = FAMILIES[family]
    return AutoConfig.for_model(**(SIZES | config | changes)).to_dict()


def metadata_of(family, config):
    """As llama.cpp's converter writes it."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config.get("head_dim", config["hidden_size"] // heads),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 10000.0,
    }
    for key in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if family.startswith("gemma") and config[key] is not None:
            keys[f"attention.{key}" if key == "sliding_window" else key] = config[key]
    return {f"{family}.{key}": value for key, value in keys.items()} | {"general.file_type": 0}


def write(path, family, config, *, seed=0):
    """Random weights by transformers' names, and a GGUF file of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    names = gguf.get_tensor_name_map(FAMILIES[family][0], config["num_hidden_layers"])
    tensors = {}
    for name, tensor in weights.items():
        data = tensor.numpy()
        if family in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            data = data + np.float32(1)
        part = name.split(".")[-2]
        if part in REORDERED.get(family, ()):
            heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
            halves = data.reshape(heads, 2, data.shape[0] // heads // 2, -1)
            data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = data
    metadata = metadata_of(family, config) | byte_level_metadata()
    return weights, write_gguf(path, metadata, tensors, architecture=family)


@pytest.mark.parametrize(
    ("family", "tied"),
    # Gemma has no head of its own, and llama.cpp no name for it.
    [(name, tied) for name in FAMILIES for tied in (False, True) if tied or "gemma" not in name],
)
def test_weights_and_config_are_those_of_the_model_that_was_written(tmp_path, family, tied):
    config = hf_config(family, tie_word_embeddings=tied)
    weights, path = write(tmp_path / "tiny.gguf", family, config)
    checkpoint = locate(str(path))
    ours = read_model_config(checkpoint)
    theirs = model_config_from_hf(config)
    assert ours.layers == theirs.layers
    assert ours.tie_word_embeddings == tied
    assert ours.norm_eps == pytest.approx(theirs.norm_eps)
    stream = read_tensors(checkpoint, ours, dtype=torch.float32)
    assert set(stream.shapes) == set(weights)
    exact = family not in NORMS_PLUS_ONE  # (1 + w) - 1 is not always w
    for name, tensor in stream:
        rtol, atol = (0, 0) if exact or "norm" not in name else (0, 3e-7)
        torch.testing.assert_close(tensor, weights[name], rtol=rtol, atol=atol)


def test_every_architecture_that_says_so_has_a_layout_and_a_test():
    named = {name for one in architectures().values() for name in one.gguf_names}
    assert named == set(LAYOUTS) == set(FAMILIES)


def test_a_file_by_another_name_than_its_architecture_is_refused(tmp_path):
    config = hf_config("llama", tie_word_embeddings=True)
    metadata = {
        key.replace("llama.", "mistral."): value
        for key, value in metadata_of("llama", config).items()
    }
    embedding = {"token_embd.weight": np.zeros((301, 64), np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", metadata, embedding, architecture="mistral")
    with pytest.raises(UnsupportedModelError, match="mistral"):
        read_model_config(locate(str(path)))
