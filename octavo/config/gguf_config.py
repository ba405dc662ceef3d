"""What a GGUF file's metadata says about the model, in the words of Hugging Face's `config.json`.

Owns the translation of key names and of the frequency factors that llama.cpp stores as a tensor.
Judges nothing: `model_config_from_hf` refuses what is wrong or not supported.
"""

import math
import struct
from pathlib import Path
from typing import Any

from octavo.config.gguf_header import GgufHeader, GgufTensor, MetaValue
from octavo.errors import CheckpointError, UnsupportedModelError

F32 = 0  # ggml's id of the type
ROPE_FACTORS = "rope_freqs.weight"
# `general.file_type` of the files that are not quantized; quantized ones are read as bfloat16.
DTYPES = {0: "float32", 1: "float16"}
# {ours: llama.cpp's}, the latter without the architecture's prefix.
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# {llama.cpp's name: transformers' `model_type`}, where they differ.
MODEL_TYPES = {"gemma3": "gemma3_text"}
# Gemma's scores are scaled by the size of a head, but in the largest models, which are known by
# their number of layers, by hidden size over heads. The file does not say; llama.cpp knows it, too.
SCALED_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}
# Llama 3.1's constants; only `factor` differs between its descendants.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def config_from_gguf(header: GgufHeader, path: Path) -> dict[str, Any]:
    """The metadata of the GGUF file at `path`, as a `config.json` would have it.

    Keys that the file lacks are absent.

    Raises:
        CheckpointError: no architecture, or frequency factors that cannot be read.
        UnsupportedModelError: the file is one part of several, or its frequency factors follow no
            rule that we know.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: the GGUF metadata lacks 'general.architecture'")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path}: one part of a split GGUF file; join them with 'llama-gguf-split --merge'"
        )

    def get(key: str) -> MetaValue | None:
        return metadata.get(f"{architecture}.{key}")

    config: dict[str, Any] = {ours: get(theirs) for ours, theirs in KEYS.items()}
    model_type = MODEL_TYPES.get(architecture, architecture)
    config["model_type"] = "mixtral" if get("expert_count") else model_type
    config["vocab_size"] = _vocab_size(header)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    config["dtype"] = DTYPES.get(_as_int(metadata.get("general.file_type")), "bfloat16")
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = [
        metadata[key]
        for key in (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
        if key in metadata
    ]
    if architecture in SCALED_BY_HIDDEN_SIZE:
        is_largest = get("block_count") == SCALED_BY_HIDDEN_SIZE[architecture]
        by_hidden_size = _quotient(get("embedding_length"), get("attention.head_count"))
        config["query_pre_attn_scalar"] = by_hidden_size if is_largest else config["head_dim"]
    config |= _rope(header, path, architecture)
    return {key: value for key, value in config.items() if value is not None}


def _vocab_size(header: GgufHeader) -> int | None:
    """Rows of the embedding: some files announce another number, and this one must be right."""
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else None


def _rope(header: GgufHeader, path: Path, architecture: str) -> dict[str, Any]:
    metadata = header.metadata
    theta = metadata.get(f"{architecture}.rope.freq_base")
    rope: dict[str, Any] = {"rope_theta": theta}
    num_rotated = metadata.get(f"{architecture}.rope.dimension_count")
    head_dim = metadata.get(f"{architecture}.attention.key_length") or _quotient(
        metadata.get(f"{architecture}.embedding_length"),
        metadata.get(f"{architecture}.attention.head_count"),
    )
    if isinstance(num_rotated, int) and isinstance(head_dim, int) and head_dim > 0:
        rope["partial_rotary_factor"] = num_rotated / head_dim
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if ROPE_FACTORS in header.tensors:
        rope["rope_scaling"] = _llama3_scaling(
            header.tensors[ROPE_FACTORS], path, 10000.0 if theta is None else theta
        )
    elif kind != "none":
        rope["rope_scaling"] = {
            "rope_type": kind,
            "factor": metadata.get(f"{architecture}.rope.scaling.factor"),
        }
    return rope


def _llama3_scaling(tensor: GgufTensor, path: Path, theta: MetaValue) -> dict[str, Any]:
    """The rule behind the stored divisors of the rotary frequencies, which must be Llama 3's."""
    if tensor.ggml_type != F32 or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise CheckpointError(f"{path}: tensor {ROPE_FACTORS!r} is no vector of float32")
    count = tensor.shape[0]
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(4 * count)
    if len(data) < 4 * count:
        raise CheckpointError(f"{path}: truncated in tensor {ROPE_FACTORS!r}")
    stored = struct.unpack(f"<{count}f", data)
    factor = max(stored)
    if not isinstance(theta, float) or not theta > 1 or not 1 <= factor < math.inf:
        raise CheckpointError(f"{path}: tensor {ROPE_FACTORS!r} does not fit 'rope.freq_base'")
    for index, value in enumerate(stored):
        wavelength = 2 * math.pi * theta ** (index / count)
        smooth = (LLAMA3_CONTEXT / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
        smooth = min(1.0, max(0.0, smooth))
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not math.isclose(value, expected, rel_tol=1e-3):
            raise UnsupportedModelError(
                f"{path}: the rotary factors in {ROPE_FACTORS!r} are not those of Llama 3.1"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _as_int(value: MetaValue | None) -> int:
    return value if isinstance(value, int) else -1


def _quotient(dividend: MetaValue | None, divisor: MetaValue | None) -> int | None:
    if isinstance(dividend, int) and isinstance(divisor, int) and divisor > 0:
        return dividend // divisor
    return None
