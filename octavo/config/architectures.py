"""The one table of architectures: whose configs are read, how, and which model runs them.

Another package adds its own by an entry point (`octavo.config.plugins`). Nothing of a checkpoint is
ever executed: `auto_map` (code from the checkpoint) is ignored for architectures that we have and
is no way in for others. Knows no tensors.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from octavo.config.checkpoint import Checkpoint
from octavo.config.families.bert import (
    read_bert,
    read_bert_classifier,
    read_bert_masked_lm,
    read_roberta,
    read_roberta_classifier,
    read_xlm_roberta,
    read_xlm_roberta_classifier,
)
from octavo.config.families.blip2 import read_blip2
from octavo.config.families.deepseek import read_deepseek_v2
from octavo.config.families.gemma import read_gemma2, read_gemma3
from octavo.config.families.gpt2 import read_gpt2
from octavo.config.families.gpt_neox import read_gpt_neox
from octavo.config.families.llama import read_llama
from octavo.config.families.llava import read_llava, read_llava_next
from octavo.config.families.mistral import read_mistral
from octavo.config.families.mixtral import read_mixtral
from octavo.config.families.opt import read_opt
from octavo.config.families.phi3 import read_phi3
from octavo.config.families.qwen2 import read_qwen2
from octavo.config.families.qwen2_5_vl import read_qwen2_5_vl
from octavo.config.families.qwen3 import read_qwen3
from octavo.config.families.qwen3_moe import read_qwen3_moe
from octavo.config.families.smollm3 import read_smollm3
from octavo.config.families.transformers_bridge import REMEDY, is_installed, knows, read_bridged
from octavo.config.families.vision_pixels import with_pixels
from octavo.config.model import ModelConfig
from octavo.config.plugins import OURS, Architecture, load_plugin, plugin_names
from octavo.config.reading import Reader, short
from octavo.config.sentence_transformers import with_sentence_transformers
from octavo.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    OctavoError,
    UnsupportedModelError,
)

VECTORS = "encoder: vectors of texts, nothing generated"
SCORES = "encoder: scores of pairs of texts, nothing generated"
ENCODERS = tuple(
    Architecture(
        name,
        hf_name,
        "xlm-roberta" if name.startswith("xlm") else name.split("_")[0],
        read,
        "octavo.models.bert:Bert" if name.startswith("bert") else "octavo.models.roberta:Roberta",
        family=family,
        features=features,
        parity="tests/models/test_encoders.py",
    )
    for name, hf_name, read, family, features in (
        ("bert", "BertModel", read_bert, "BERT, MiniLM, BGE, E5, GTE", VECTORS),
        ("bert_masked_lm", "BertForMaskedLM", read_bert_masked_lm, "BERT, pretrained", VECTORS),
        (
            "bert_classifier",
            "BertForSequenceClassification",
            read_bert_classifier,
            "BERT cross-encoders",
            SCORES,
        ),
        ("roberta", "RobertaModel", read_roberta, "RoBERTa", VECTORS),
        (
            "roberta_classifier",
            "RobertaForSequenceClassification",
            read_roberta_classifier,
            "RoBERTa cross-encoders",
            SCORES,
        ),
        ("xlm_roberta", "XLMRobertaModel", read_xlm_roberta, "XLM-RoBERTa, BGE-M3", VECTORS),
        (
            "xlm_roberta_classifier",
            "XLMRobertaForSequenceClassification",
            read_xlm_roberta_classifier,
            "XLM-RoBERTa cross-encoders, BGE rerankers",
            SCORES,
        ),
    )
)

BUILT_IN = (
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "llama",
        read_llama,
        "octavo.models.llama:Llama",
        gguf_names=("llama",),
        family="Llama 2 and 3.x, SmolLM2, TinyLlama",
        features="grouped queries, `linear`, `llama3`, `yarn` and `longrope` scaling, biases",
    ),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        read_qwen3,
        "octavo.models.qwen3:Qwen3",
        gguf_names=("qwen3",),
        family="Qwen3, dense",
        features="QK-norm, wide heads, biases",
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        "mixtral",
        read_mixtral,
        "octavo.models.mixtral:Mixtral",
        family="Mixtral",
        features="mixture of experts",
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        read_qwen3_moe,
        "octavo.models.qwen3:Qwen3",
        family="Qwen3-MoE",
        features="mixture of experts, dense layers among them, QK-norm",
    ),
    Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        read_qwen2,
        "octavo.models.llama:Llama",
        gguf_names=("qwen2",),
        family="Qwen2, Qwen2.5",
        features="biases of queries, keys and values, `yarn`",
    ),
    Architecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        read_smollm3,
        "octavo.models.llama:Llama",
        family="SmolLM3",
        features="layers without positions",
    ),
    Architecture(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        read_phi3,
        "octavo.models.phi3:Phi3",
        family="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        features="fused tensors, `longrope`, part of a head turns, a window",
    ),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        read_gpt2,
        "octavo.models.gpt2:GPT2",
        family="GPT-2, DistilGPT-2",
        features="learned positions, layer norms, plain MLP, transposed tensors",
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        read_gpt_neox,
        "octavo.models.gpt_neox:GPTNeoX",
        family="GPT-NeoX, Pythia",
        features="attention and MLP in parallel, part of a head turns, layer norms, plain MLP",
    ),
    Architecture(
        "opt",
        "OPTForCausalLM",
        "opt",
        read_opt,
        "octavo.models.opt:OPT",
        family="OPT, but for 350M",
        features="learned positions, layer norms, plain MLP",
    ),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        read_mistral,
        "octavo.models.llama:Llama",
        family="Mistral",
        features="sliding windows",
    ),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        read_gemma2,
        "octavo.models.gemma2:Gemma2",
        gguf_names=("gemma2",),
        family="Gemma 2",
        features="sliding windows in every second layer, soft caps, norms before and after, GeGLU",
    ),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        read_gemma3,
        "octavo.models.gemma3:Gemma3",
        gguf_names=("gemma3",),
        family="Gemma 3, text",
        features="sliding windows with their own positions, QK-norm, norms before and after, GeGLU",
    ),
    Architecture(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        read_deepseek_v2,
        "octavo.models.deepseek_v2:DeepseekV2",
        family="DeepSeek-V2-Lite",
        features="multi-head latent attention, mixture of experts with shared ones and groups",
    ),
    Architecture(
        "llava",
        "LlavaForConditionalGeneration",
        "llava",
        read_llava,
        "octavo.models.llava:Llava",
        family="LLaVA 1.5",
        features="images: CLIP's tower, an MLP",
    ),
    Architecture(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "llava_next",
        read_llava_next,
        "octavo.models.llava:Llava",
        family="LLaVA-NeXT (1.6)",
        features="images of any shape: tiles through CLIP's tower",
    ),
    Architecture(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        read_qwen2_5_vl,
        "octavo.models.qwen2_5_vl:Qwen25VL",
        family="Qwen2.5-VL",
        features="images of any size: windows, 2D rotation, M-RoPE",
    ),
    Architecture(
        "blip2",
        "Blip2ForConditionalGeneration",
        "blip-2",
        read_blip2,
        "octavo.models.blip2:create_blip2",
        family="BLIP-2 with OPT, or with Llama as MiniGPT-4 has it",
        features="images: EVA's tower, a Q-Former",
    ),
    *ENCODERS,
)


# Of whatever transformers knows and we have no file for: its own modules, with our attention.
BRIDGE = Architecture(
    "transformers",
    "",
    "",
    read_bridged,
    "octavo.models.transformers_bridge:TransformersBridge",
)


def architectures() -> dict[str, Architecture]:
    """{our name: architecture}, those of other packages included, as far as they can be used."""
    return dict(_table()[0])


def broken_plugins() -> tuple[str, ...]:
    """Why packages that are installed bring nothing that can be used."""
    return _table()[1]


@cache
def _table() -> tuple[dict[str, Architecture], tuple[str, ...]]:
    table = {architecture.name: architecture for architecture in BUILT_IN}
    broken = []
    for hf_name in plugin_names():
        try:
            found = _load(hf_name)
            if found.name in table:
                raise _clash(found, table[found.name])
        except ConfigError as error:
            broken.append(str(error))
        else:
            table[found.name] = found
    return table, tuple(broken)


def _load(hf_name: str) -> Architecture:
    found = load_plugin(hf_name)
    for ours in BUILT_IN:
        if hf_name == ours.hf_name:
            raise ConfigError(
                f"the package {found.package} brings {hf_name}, which Octavo has itself: "
                "uninstall it, or give its class another name"
            )
    return found


def _clash(found: Architecture, other: Architecture) -> ConfigError:
    return ConfigError(
        f"the package {found.package} calls {found.hf_name} {found.name!r}, which is what "
        f"{other.hf_name} of {other.package} is called: give it another name, or uninstall one"
    )


def read_model_config(checkpoint: Checkpoint, model_impl: str = "auto") -> ModelConfig:
    """The config of a located checkpoint. Raises as `model_config_from_hf` does.

    Args:
        checkpoint: as `locate` found it.
        model_impl: `ModelOptions.model_impl`: whose code is to run the model.
    """
    written, generation_config = checkpoint.config(), checkpoint.generation_config()
    try:
        architecture = _choose(written, model_impl, is_gguf=checkpoint.kind == "gguf")
        config = read_with(architecture, Reader(written, generation_config))
        config = with_pixels(with_sentence_transformers(config, checkpoint), checkpoint)
    except ModelError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from error
    if checkpoint.kind == "gguf":
        refuse_unknown_names(checkpoint, architecture)
    return config


def read_with(architecture: Architecture, read: Reader) -> ModelConfig:
    """What an architecture makes of a config. Raises as `model_config_from_hf` does.

    Raises:
        ConfigError: another package's reader does not work; names the package.
    """
    if architecture.package == OURS:
        return architecture.read(read)
    what = f"the package {architecture.package} cannot read a config of {architecture.hf_name}"
    try:
        config = architecture.read(read)
    except OctavoError:
        raise
    except Exception as error:  # a stranger's function, which may fail in any way
        raise ConfigError(f"{what}: {type(error).__name__}: {error}; fix its reader") from error
    named = config.architecture if isinstance(config, ModelConfig) else type(config).__name__
    if named != architecture.name:
        raise ConfigError(
            f"{what}: its reader makes {short(named)} of it, but it must make a ModelConfig whose "
            f"architecture is {architecture.name!r}"
        )
    return config


def _choose(written: Mapping[str, Any], model_impl: str, *, is_gguf: bool) -> Architecture:
    """Ours, where there is one and nothing else is asked for; else transformers', if it can be."""
    if model_impl == "transformers" and is_gguf:
        raise UnsupportedModelError(
            "model_impl transformers reads safetensors, not GGUF; take the model's safetensors"
        )
    if model_impl == "transformers":
        return BRIDGE
    try:
        return architecture_of(written)
    except UnsupportedModelError as error:
        if model_impl == "octavo" or is_gguf:
            raise
        if not is_installed():
            raise UnsupportedModelError(f"{error}; transformers may run it: {REMEDY}") from error
        if not knows(written):
            raise
        return BRIDGE


def architecture_named(name: str) -> Architecture:
    """The one of a `ModelConfig.architecture`."""
    for ours in (BRIDGE, *BUILT_IN):
        if name == ours.name:
            return ours
    return architectures()[name]


def refuse_unknown_names(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse a GGUF file of an architecture whose tensors we know by other names only."""
    written_as = checkpoint.gguf.metadata.get("general.architecture")
    if written_as not in architecture.gguf_names:
        known = (name for one in architectures().values() for name in one.gguf_names)
        raise UnsupportedModelError(
            f"{checkpoint.path}: GGUF files of {short(written_as)} are not supported, only of "
            f"{', '.join(known)}; take the model's safetensors"
        )


def model_config_from_hf(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read a `config.json` in the style of transformers 4 or 5.

    Args:
        config: the parsed file.
        generation_config: the parsed `generation_config.json`; its end-of-sequence ids are added
            to those of the config.

    Raises:
        UnsupportedModelError: a sound value that is not supported; the message names it and what
            is supported.
        CheckpointError: a value that is missing, of the wrong type or absurd.
    """
    return read_with(architecture_of(config), Reader(config, generation_config))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a `config.json` names. Raises as `model_config_from_hf` does.

    Raises:
        ConfigError: another package brings it and does not work, or is not alone.
    """
    hf_name = hf_name_of(config)
    if hf_name in plugin_names():
        found = _load(hf_name)
        known = architectures().get(found.name, found)
        if known.hf_name != hf_name:
            raise _clash(found, known)
        return found
    by_name = {one.hf_name: one for one in BUILT_IN}
    if hf_name not in by_name:
        remote = " (it would need code from the checkpoint, which is never run)"
        raise UnsupportedModelError(
            f"the architecture {short(hf_name)} is not supported"
            f"{remote if 'auto_map' in config else ''}; "
            f"supported: {', '.join((*by_name, *plugin_names()))}"
        )
    return by_name[hf_name]


def hf_name_of(config: Mapping[str, Any]) -> str:
    """The class that a config names, by itself or by its `model_type`."""
    names = config.get("architectures")
    if names is None:
        model_type = config.get("model_type")
        # Of several, the first: an encoder without a head.
        known = {one.model_type: one.hf_name for one in reversed(BUILT_IN)}
        if isinstance(model_type, str) and model_type not in known:
            known |= {one.model_type: one.hf_name for one in architectures().values()}
        names = [known.get(model_type, model_type) if isinstance(model_type, str) else None]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config: neither 'architectures' nor 'model_type' names the model")
    return names[0]
