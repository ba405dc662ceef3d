"""Mistral, Gemma 2 and Gemma 3 with each of their options, against transformers."""

import json

import parity
import pytest
from parity import (
    answers_of,
    check_answers,
    check_planned_memory,
    greedy,
    ids_of,
    needs_native,
    prompts_of,
)

from octavo import SamplingParams
from octavo.config import model_config_from_hf
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.kernels import reference_only
from octavo.testing.tiny_models import write_tiny_model

GREEDY = greedy(12, logprobs=1)
PROMPTS = prompts_of(1, 21, 22, 110)

VARIANTS = {
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral, wide heads, all kv heads": ("mistral", {"head_dim": 32, "num_key_value_heads": 4}),
    "mistral, narrow heads, one kv head": ("mistral", {"head_dim": 8, "num_key_value_heads": 1}),
    "mistral, window of a token": ("mistral", {"sliding_window": 1}),
    "mistral, window of two blocks": ("mistral", {"sliding_window": 32}),
    "mistral, tied, another eps": ("mistral", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    "mistral, another theta": ("mistral", {"rope_parameters": {"rope_theta": 1e6}}),
    "gemma2 biased": ("gemma2", {"attention_bias": True}),
    "gemma2 without softcaps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2 with low softcaps": (
        "gemma2",
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2, all kv heads, another scale": (
        "gemma2",
        {"num_key_value_heads": 4, "query_pre_attn_scalar": 3},
    ),
    "gemma2, windows at the end": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True, "seed": 2}),
    "gemma3 biased": ("gemma3", {"attention_bias": True, "rms_norm_eps": 0.1}),
    "gemma3 with a final softcap": ("gemma3", {"final_logit_softcapping": 2.0}),
    "gemma3, one kv head, tied": (
        "gemma3",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "seed": 2},
    ),
    "gemma3, thetas that differ": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
            }
        },
    ),
}


def create_llm(model, **options):
    return parity.create_llm(model, **({"dtype": "float32"} | options))


def tokens(llm):
    return ids_of(llm, PROMPTS, GREEDY)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_every_option_is_applied_as_transformers_does(tmp_path, architecture, changes):
    reference = write_tiny_model(tmp_path / "tiny", architecture, **changes)
    answers = answers_of(create_llm(tmp_path / "tiny"), PROMPTS, GREEDY)
    check_answers(reference, PROMPTS, answers, min_distinct=1)


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    write_tiny_model(directory, request.param)
    return directory


def test_pieces_of_a_prompt_may_end_anywhere_in_a_window(model):
    whole = tokens(create_llm(model))
    # The window is 21: shorter, as long, longer by one, and at the edges of blocks.
    for options in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"max_num_batched_tokens": 21, "async_scheduling": True},
        {"max_num_batched_tokens": 22},
        {"max_num_batched_tokens": 32, "block_size": 32},
    ):
        assert tokens(create_llm(model, **options)) == whole, options


def test_the_references_give_the_same_text(model):
    with reference_only():
        references = create_llm(model)
    assert tokens(references) == tokens(create_llm(model))


def test_what_is_outside_of_a_window_changes_nothing_and_what_is_inside_does(tmp_path):
    """One layer with a window of 21: the last token sees the 20 before it."""
    write_tiny_model(tmp_path / "tiny", "mistral", num_hidden_layers=1)
    llm = create_llm(tmp_path / "tiny")

    def likelihood(changed):
        ids = [(31 * i) % 301 for i in range(100)]
        if changed is not None:
            ids[changed] = 7
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
        [output] = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return output.outputs[0].logprobs[0].logprob

    unchanged = likelihood(None)
    for position in (0, 40, 78):
        assert likelihood(position) == unchanged
    for position in (79, 90, 98):
        assert likelihood(position) != unchanged


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "moment"),
    [({"intermediate_size": 16}, "norm in plain torch"), ({"intermediate_size": 600}, "MLP")],
)
def test_memory_is_as_planned_where_nothing_is_compiled(tmp_path, dtype, changes, moment):
    """Norms with weights in fp32 hold more there, and gelu has a tensor of its own."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 258}
    write_tiny_model(tmp_path / "tiny", "gemma2", **sizes, **changes)
    check_planned_memory(
        tmp_path / "tiny", moment=moment, compiled=False, dtype=dtype, max_num_seqs=64
    )


PUBLISHED_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
}


def test_both_styles_of_gemma3s_rotary_positions():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
    }
    config = model_config_from_hf(PUBLISHED_GEMMA3 | old)
    assert config == model_config_from_hf(PUBLISHED_GEMMA3 | new)
    assert [rope.theta for rope in config.ropes] == [1e4, 1e6]
    assert [layer.attention.window for layer in config.layers] == [512, 512, None] * 2 + [512]


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_what_a_config_leaves_out_is_what_transformers_takes(architecture):
    """Fields that published configs lack; of Gemma 2 a softcap that is null is none."""
    import transformers

    sizes = {k: v for k, v in PUBLISHED_GEMMA3.items() if k not in ("architectures",)}
    del sizes["sliding_window"]
    classes = {"mistral": "Mistral", "gemma2": "Gemma2", "gemma3": "Gemma3"}
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    written = theirs.to_dict() | {"architectures": [f"{classes[architecture]}ForCausalLM"]}
    sparse = sizes | {"architectures": written["architectures"]}
    sparse |= {"eos_token_id": written["eos_token_id"], "bos_token_id": written["bos_token_id"]}
    assert model_config_from_hf(sparse) == model_config_from_hf(written)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("Gemma3", {"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ("Gemma3", {"layer_types": ["full_attention"]}, "one for each of 7 layers"),
        ("Gemma3", {"sliding_window": None}, "sliding_window"),
        ("Gemma3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic"),
        ("Mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("Mistral", {"layer_types": ["sliding_attention"] * 7}, "layer_types"),
        ("Llama", {"sliding_window": 100}, "sliding_window=100"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(architecture, changes, reason):
    config = PUBLISHED_GEMMA3 | {"architectures": [f"{architecture}ForCausalLM"]} | changes
    with pytest.raises((UnsupportedModelError, CheckpointError), match="config") as caught:
        model_config_from_hf(json.loads(json.dumps(config)))
    assert reason in str(caught.value)
