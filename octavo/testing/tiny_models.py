"""Small random checkpoints of every architecture, written by transformers' own classes, for tests.

One config an architecture: each with fewer key/value heads than heads where the family allows it,
a vocabulary that is no round number, and the options that published checkpoints use. Of three
blocks the middle one is neither first nor last: both do less than the others.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.config import architectures
from octavo.testing.tiny_llama import byte_tokenizer

_DECODER: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Windows are much shorter than what tests ask, and so that they begin within blocks.
_GEMMA: dict[str, Any] = _DECODER | {
    "num_hidden_layers": 3,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 21,
}
_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
# The files of image processors beside them.
_SQUARE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_GRIDS = [[28, 56], [56, 28], [56, 56]]
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "llava": _SQUARE,
    "llava_next": _SQUARE | {"image_grid_pinpoints": _GRIDS},
    "blip2": {"size": {"height": 28, "width": 28}},
    "qwen2_5_vl": {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 1600},
    },
}
_OPT: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "ffn_dim": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
# Fields of transformers' config class, by our names of the architectures.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 32},
    "smollm3": _DECODER | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "phi3": _DECODER
    | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        },
        "original_max_position_embeddings": 256,
    },
    "gpt2": {
        "vocab_size": 301,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 256,
        "eos_token_id": 257,
    },
    "mistral": _DECODER | {"sliding_window": 21},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA
    | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mixtral": _DECODER | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": _DECODER
    | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 32},
    "deepseek_v2": _DECODER
    | {
        "num_key_value_heads": 4,
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
    },
    "gpt_neox": _DECODER | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "opt": _OPT,
    "llava": {
        "text_config": _DECODER | {"model_type": "llama", "vocab_size": 303},
        "vision_config": _CLIP,
        "image_token_index": 302,
    },
    "llava_next": {
        "text_config": _DECODER
        | {"model_type": "mistral", "vocab_size": 303, "max_position_embeddings": 512},
        "vision_config": _CLIP,
        "image_grid_pinpoints": _GRIDS,
        "image_token_index": 302,
    },
    "blip2": {
        "text_config": _OPT | {"model_type": "opt", "vocab_size": 303, "word_embed_proj_dim": 64},
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 7,
        },
        "qformer_config": {
            "hidden_size": 20,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "encoder_hidden_size": 24,
        },
        "num_query_tokens": 18,
        "image_token_index": 302,
    },
    "qwen2_5_vl": {
        "text_config": _DECODER
        | {
            "vocab_size": 303,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 44,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": 302,
        "video_token_id": 301,
    },
}

_ENCODER: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
# Those that generate nothing.
TINY_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "bert_masked_lm": _ENCODER,
    "bert_classifier": _ENCODER | {"num_labels": 1},
    "roberta": _ENCODER | {"type_vocab_size": 1},
    "roberta_classifier": _ENCODER | {"type_vocab_size": 1, "num_labels": 3},
    "xlm_roberta": _ENCODER | {"type_vocab_size": 1, "hidden_act": "gelu_new"},
    "xlm_roberta_classifier": _ENCODER | {"type_vocab_size": 1, "num_labels": 1},
}


def write_tiny_model(
    directory: Path, architecture: str, *, seed: int = 0, **changes: Any
) -> nn.Module:
    """Write config, random fp32 weights and a byte-level tokenizer; return transformers' model.

    `changes` replace fields of the architecture's entry in `TINY_MODELS` or `TINY_ENCODERS`.
    """
    import transformers

    known = architectures()[architecture]
    fields = (TINY_MODELS | TINY_ENCODERS)[architecture] | changes
    config = transformers.AutoConfig.for_model(known.model_type, **fields)
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, known.hf_name)(config).float().eval()
    randomize(model, seed)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)  # type: ignore[operator]
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    if architecture in PREPROCESSORS:
        text = json.dumps(PREPROCESSORS[architecture])
        (directory / "preprocessor_config.json").write_text(text)
    return model


def reference_logits(model: nn.Module, token_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [N, T, vocab_size] of transformers' model for ids [N, T], and perhaps for images.

    Of a text alone BLIP-2's class would still want an image; there its language model answers.
    """
    if not inputs and type(model).__name__ == "Blip2ForConditionalGeneration":
        model = model.get_submodule("language_model")
    logits: torch.Tensor = model(input_ids=token_ids, **inputs).logits
    return logits


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Random values large enough that greedy answers vary, around those that norms start with."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                # Conv1D is the one module whose weight is [in, out].
                is_transposed = type(module).__name__ == "Conv1D" and name == "weight"
                fan_in = parameter.shape[0 if is_transposed else -1]
                parameter.copy_(1.5 * fan_in**-0.5 * noise)
