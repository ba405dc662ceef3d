"""Small random Qwen3 checkpoints in Hugging Face's layout, for tests."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from octavo.testing.tiny_llama import TINY_CONFIG, write_tiny_llama

# As a tiny Llama, but heads are wider than hidden_size over their number, as in most of Qwen3.
TINY_QWEN3_CONFIG: dict[str, Any] = TINY_CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 32,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}


def write_tiny_qwen3(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write config, random fp32 weights and a byte-level tokenizer; return the directory.

    `changes` replace entries of `TINY_QWEN3_CONFIG`.
    """
    config = TINY_QWEN3_CONFIG | changes
    write_tiny_llama(directory, seed=seed, **config)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in range(config["num_hidden_layers"]):
        for norm in ("q_norm", "k_norm"):
            # Far enough from 1 that a norm left out, or the other one's weight, shows.
            noise = torch.randn(config["head_dim"], generator=generator)
            tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = 1.0 + 0.3 * noise
    save_file(tensors, path)
    return directory
