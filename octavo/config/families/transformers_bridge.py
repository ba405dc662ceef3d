"""Any decoder that transformers knows, for its own modules to run.

Read are transformers' words for a config, with its defaults, as far as the KV cache and the memory
plan need them. How attention scales its scores and which tokens it sees, the modules themselves say
when they are built. Nothing of a checkpoint is executed, and what could name code is left out.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config.families.llama import decoder, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader, short
from octavo.errors import CheckpointError, ConfigError, UnsupportedModelError

REMEDY = "pip install 'octavo[transformers]'"
# Of a checkpoint's config; transformers would look some of them up on the hub, or import them.
LEFT_OUT = {"auto_map", "trust_remote_code", "attn_implementation", "experts_implementation"}
LEFT_OUT |= {"dtype", "torch_dtype", "use_kernels", "kernel_config", "custom_pipelines"}
# Of transformers' config: what our cache, or a step of many sequences in one row, would get wrong.
REFUSED = {
    "is_encoder_decoder": "an encoder's states are not in our KV cache",
    "kv_lora_rank": "latent attention (MLA) caches neither keys nor values",
    "attention_chunk_size": "attention in chunks is not in our kernels",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
MOVING_ROPES = ("dynamic", "longrope")
# What is read of transformers' config, by its own words for it.
NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling"),
    *("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def is_installed() -> bool:
    """Whether transformers is there. It is not imported, which takes seconds."""
    return importlib.util.find_spec("transformers") is not None


def knows(config: Mapping[str, Any]) -> bool:
    """Whether transformers, which is installed, has a decoder for a `config.json`."""
    name, names = class_of(config), config.get("architectures")
    return name is not None and (not isinstance(names, list) or names[:1] in ([], [name]))


def class_of(config: Mapping[str, Any]) -> str | None:
    """The name of transformers' class that decodes with a config of this type, if there is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = known.get(model_type) if isinstance(model_type, str) else None
    return name if isinstance(name, str) else None


def read_bridged(read: Reader) -> ModelConfig:
    """Any config that transformers reads and that its modules and our cache can run together.

    Raises:
        ConfigError: transformers is not installed.
        UnsupportedModelError: it has no such decoder, or one that cannot be run here; says why.
        CheckpointError: a value is missing, of the wrong type or absurd.
    """
    if not is_installed():
        raise ConfigError(f"model_impl transformers needs that package: {REMEDY}")
    written = read.everything()
    read.refuse_unless_neutral("quantization_config")
    if not knows(written):
        raise UnsupportedModelError(
            f"transformers has no decoder {short(written.get('architectures'))} for the model_type "
            f"{short(written.get('model_type'))}"
        )
    plain = {k: v for k, v in written.items() if k not in LEFT_OUT and not k.startswith("_")}
    theirs = _as_transformers_reads(plain)
    values = {name: getattr(theirs, name, None) for name in (*NAMES, *REFUSED)}
    words = read.over(values | {"dtype": written.get("dtype") or written.get("torch_dtype")})
    _refuse(words, str(plain["model_type"]), is_composite=bool(theirs.sub_configs))
    hidden_size = words.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = words.heads(hidden_size)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=None,  # the modules rotate
    )
    # Whether it is gated, the config does not say; most are.
    largest = 8 * MAX_HIDDEN_SIZE
    mlp = MLPConfig(words.integer("intermediate_size", 1, largest, default=4 * hidden_size))
    layers = (LayerConfig(attention, mlp),) * num_layers(words)
    config = decoder(words, "transformers", layers=layers)
    return replace(config, transformers_config=json.dumps(plain, sort_keys=True))


def _as_transformers_reads(config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # each of its families has its own ways to fail
        raise CheckpointError(f"config: transformers cannot read it: {short(error)}") from error


def _refuse(words: Reader, model_type: str, *, is_composite: bool) -> None:
    """Refuse, by its name, what transformers has and cannot be run over our KV cache."""
    from transformers import conversion_mapping

    conversions: Any = conversion_mapping  # untyped
    for name, why in REFUSED.items():
        if words.raw(name):
            raise words.unsupported(name, words.raw(name), why)
    if is_composite:
        raise words.unsupported("model_type", model_type, "it has more than a text model in it")
    if words.raw("num_attention_heads") is None:
        why = "without attention, what it keeps of a context is no KV cache"
        raise words.unsupported("model_type", model_type, why)
    if conversions.get_checkpoint_conversion_mapping(model_type):
        why = "transformers renames or stacks its tensors (of experts, mostly) as it loads them"
        raise words.unsupported("model_type", model_type, why)
    for kind in words.raw("layer_types") or ():
        if kind not in LAYER_TYPES:
            raise words.unsupported("layer_types", kind, f"supported: {', '.join(LAYER_TYPES)}")
    rope = words.raw("rope_parameters") or words.raw("rope_scaling") or {}
    for section in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        kind = section.get("rope_type") or section.get("type")
        if kind in MOVING_ROPES:
            why = "its angles change with the longest context of a step, and cached keys would not"
            raise words.unsupported("rope_type", kind, why)
