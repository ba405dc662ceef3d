"""Tiny checkpoints for tests, written by the libraries whose files Octavo reads."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from octavo.text.tokenizer import BYTE_OF_CHAR

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ Ġ", "Ġ hello"]
BYTE_TOKENS = SPECIALS + sorted(BYTE_OF_CHAR) + [merge.replace(" ", "") for merge in MERGES]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}

GGUF_METADATA = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "general.file_type": 0,
}


def byte_level_metadata(**changes):
    """Metadata of a byte-level tokenizer with three special tokens."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": BYTE_TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(BYTE_TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    return metadata | {f"tokenizer.{key}": value for key, value in changes.items()}


def write_gguf(path: Path, metadata: dict, tensors: dict, architecture: str = "llama") -> Path:
    """A GGUF file. A value of None leaves a key out; a tensor may be (bytes, ggml type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_tensors(config: dict = HF_CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights for a Llama config, by their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv_size = config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    shapes["lm_head"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(tensors: dict[str, torch.Tensor], config: dict = HF_CONFIG) -> dict:
    """Weights by llama.cpp's names and in its order of rotary rows."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    renamed = {}
    for name, tensor in tensors.items():
        data = tensor.numpy()
        stem, _, leaf = name.rpartition(".")
        num_heads = heads.get(stem.rpartition(".")[2])
        if num_heads:
            halves = data.reshape(num_heads, 2, data.shape[0] // num_heads // 2, *data.shape[1:])
            data = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            prefix = f"blk.{index}."
        renamed[f"{prefix}{GGUF_NAMES[stem]}.{leaf}"] = data
    return renamed


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer of `byte_level_metadata`, as the `tokenizers` library would be used."""
    vocabulary = {token: i for i, token in enumerate(BYTE_TOKENS)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    return tokenizer


def write_directory(folder: Path, *, config: dict = HF_CONFIG, tensors: dict | None = None) -> Path:
    """A Hugging Face model directory with weights and a byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    save_file(hf_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder
