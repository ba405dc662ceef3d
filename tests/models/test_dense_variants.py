"""Options of the dense decoders, each as transformers applies it, and those that are refused."""

import json

import parity
import pytest
import torch
from parity import check_answers, greedy, ids_of, prompts_of
from safetensors.torch import load_file, save_file

from octavo.config import locate, model_config_from_hf, read_model_config
from octavo.errors import CheckpointError, ModelError, UnsupportedModelError
from octavo.testing.tiny_models import TINY_MODELS, write_tiny_model

GREEDY = greedy(24)
PROMPTS = prompts_of(1, 17, 100, 150)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
LONGROPE = TINY_MODELS["phi3"]["rope_parameters"]
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 16}

VARIANTS = {
    "Qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "seed": 4}),
    "Qwen2, one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "Qwen2, all kv heads, another eps": (
        "qwen2",
        {"num_key_value_heads": 4, "rms_norm_eps": 0.5},
    ),
    "Qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "Qwen2, YaRN with options": (
        "qwen2",
        {
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}
        },
    ),
    "Llama, YaRN with scales": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "SmolLM3, its own pattern, biased": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": False},
    ),
    "SmolLM3, every second layer": ("smollm3", {"no_rope_layer_interval": 2, "seed": 2}),
    "Phi-3, plain": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "Phi-3, tied, all kv heads": ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "Phi-3, a window": ("phi3", {"sliding_window": 21}),
    "Phi-3, long contexts": ("phi3", LONG),
    "GPT-2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "GPT-2, exact gelu, another size and eps": (
        "gpt2",
        {"activation_function": "gelu", "n_inner": 72, "layer_norm_epsilon": 0.1, "seed": 1},
    ),
    "GPT-2, scores as they are": ("gpt2", {"scale_attn_weights": False}),
    "GPT-2, scores by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "GPT-NeoX, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "GPT-NeoX, no bias, tied": (
        "gpt_neox",
        {"attention_bias": False, "tie_word_embeddings": True, "seed": 1},
    ),
    "GPT-NeoX, all of a head turns, relu": (
        "gpt_neox",
        {
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0},
            "hidden_act": "relu",
            "layer_norm_eps": 0.5,
        },
    ),
    "OPT, no bias, gelu, untied": (
        "opt",
        {"enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
}


def create_llm(model, **options):
    return parity.create_llm(model, **({"dtype": "float32", "num_threads": 1} | options))


def answers_of(llm, prompts=PROMPTS):
    return parity.answers_of(llm, prompts, GREEDY)


def tokens(llm, prompts=PROMPTS):
    return ids_of(llm, prompts, GREEDY)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, architecture, changes):
    reference = write_tiny_model(tmp_path, architecture, **changes)
    # Of "longrope", transformers turns a whole sequence by the long factors once it is long.
    prompts = PROMPTS[1:] if changes is LONG else PROMPTS
    check_answers(reference, prompts, answers_of(create_llm(tmp_path), prompts))


def test_an_engine_for_short_contexts_keeps_to_the_short_factors(tmp_path):
    """Up to the original context both of transformers' choices and ours are the same."""
    reference = write_tiny_model(
        tmp_path, "phi3", **(LONG | {"original_max_position_embeddings": 64})
    )
    prompts = PROMPTS[:2]
    short = answers_of(create_llm(tmp_path, max_model_len=64), prompts)
    check_answers(reference, prompts, short)
    longer = tokens(create_llm(tmp_path, max_model_len=65), prompts)
    assert longer != [answer.token_ids for answer in short]


def test_yarn_reaches_as_far_as_it_stretches():
    config = {"architectures": ["Qwen2ForCausalLM"], **TINY_MODELS["qwen2"]}
    config |= {"rope_scaling": {"type": "yarn", "factor": 8.0}}
    config |= {"max_position_embeddings": 128}
    assert model_config_from_hf(config).max_position_embeddings == 1024
    config["rope_scaling"]["original_max_position_embeddings"] = 8
    assert model_config_from_hf(config).max_position_embeddings == 128


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox"])
def test_checkpoints_as_they_were_first_published(tmp_path, architecture):
    """Without the prefix, with causal masks, and with an old name of the output head."""
    untied = {"tie_word_embeddings": False}
    reference = write_tiny_model(tmp_path, architecture, **untied)
    answers = answers_of(create_llm(tmp_path))
    check_answers(reference, PROMPTS, answers)
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        short = name.removeprefix("transformer.").removeprefix("model.")
        tensors[
            "embed_out.weight"
            if short == "lm_head.weight" and architecture == "gpt_neox"
            else short
        ] = tensor
    if architecture == "gpt2":
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    if architecture == "gpt_neox":
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 256, 256).tril().bool()
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, file)
    assert tokens(create_llm(tmp_path)) == [answer.token_ids for answer in answers]


def test_a_tensor_with_and_without_its_prefix_is_refused(tmp_path):
    write_tiny_model(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'transformer.ln_f.bias' occurs twice"):
        create_llm(tmp_path)


REFUSALS = {
    "qwen2": [
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*supported: default"),
        ({"rope_scaling": {"type": "yarn", "factor": -1.0}}, "factor=-1.0"),
        ({"rope_scaling": YARN | {"beta_fast": 1}}, "beta_fast is not above beta_slow"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
    "smollm3": [
        ({"no_rope_layers": [1, 1]}, r"no_rope_layers=\[1, 1\].*each of 4 layers"),
        ({"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers.*0 and 1"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
    "phi3": [
        ({"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, "short_factor.*6 numbers"),
        ({"rope_parameters": LONGROPE | {"long_factor": [0.0] * 6}}, "long_factor.*numbers in"),
        ({"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.7}}, "11 numbers of heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'short_factor' is missing"),
    ],
    "gpt2": [
        ({"activation_function": "swish"}, "activation_function='swish'.*supported: gelu"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_head": 5}, "n_head=5.*a divisor of the hidden size 64"),
    ],
    "gpt_neox": [({"hidden_act": "silu"}, "hidden_act='silu'")],
    "opt": [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim=32.*only hidden_size=64"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ],
}


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [(name, *refusal) for name, refusals in REFUSALS.items() for refusal in refusals],
)
def test_what_the_layers_would_get_wrong_is_refused_by_name(architecture, changes, message):
    from octavo.config import architectures

    config = {"architectures": [architectures()[architecture].hf_name]}
    with pytest.raises(ModelError, match=message) as caught:
        model_config_from_hf(config | TINY_MODELS[architecture] | changes)
    assert isinstance(caught.value, (UnsupportedModelError, CheckpointError))


def test_the_configs_that_are_written_are_those_that_are_read(tmp_path):
    """A window as long as the context is none, and `su` is what longrope was called first."""
    write_tiny_model(tmp_path, "phi3", sliding_window=256)
    written = json.loads((tmp_path / "config.json").read_text())
    config = read_model_config(locate(str(tmp_path)))
    [layer] = config.kinds_of_layers
    assert layer.attention.window is None and layer.attention.rope.rotary_dim == 12
    old = {key: value for key, value in LONGROPE.items() if key.endswith("_factor")}
    written.pop("rope_parameters")
    written |= {"rope_theta": 10000.0, "rope_scaling": {"type": "su", **old}}
    assert model_config_from_hf(written) == config
