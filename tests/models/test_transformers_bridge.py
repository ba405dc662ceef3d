"""What transformers knows and we have no file for: its own modules over our KV cache.

Held to the same modules as transformers runs them, with its own attention, in every mode.
"""

import json
import logging
import re
import signal
import subprocess
import sys

import openai
import parity
import pytest
import torch
from parity import answers_of, check_answers, greedy, ids_of, prompts_of
from safetensors.torch import load_file, save_file

from octavo import SamplingParams
from octavo.cli import main
from octavo.config import (
    DeviceFacts,
    EngineOptions,
    architectures,
    locate,
    read_model_config,
    resolve,
)
from octavo.config.families import transformers_bridge
from octavo.errors import CheckpointError, ConfigError, ModelError, UnsupportedModelError
from octavo.layers import Build
from octavo.models import create_model
from octavo.testing.tiny_llama import TINY_CONFIG, byte_tokenizer
from octavo.testing.tiny_models import randomize
from octavo.weights import load_weights, read_tensors

NUM_TOKENS = 24
GREEDY = greedy(NUM_TOKENS, logprobs=1)
PROMPTS = prompts_of(1, 16, 17, 100)
SIZES = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# What is unlike in them: a parallel residual and a scale of logits; multipliers everywhere, one of
# scores among them; half a head rotated in pairs, four norms, wider heads, biases; norms after, and
# over all heads; layer norms, no gate, biases everywhere, a window, one matrix at both ends.
MODELS = {
    "cohere": SIZES | {"logit_scale": 0.5, "use_qk_norm": True},
    "granite": SIZES
    | {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.4,
    },
    "glm4": SIZES | {"head_dim": 32, "attention_bias": True},
    "olmo2": SIZES,
    "starcoder2": SIZES | {"sliding_window": 21, "tie_word_embeddings": True},
}


def write(directory, model_type, seed=5, **changes):
    """A random checkpoint as transformers saves it; returns transformers' model."""
    import transformers

    fields = MODELS.get(model_type, SIZES) | changes
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return model


def create_llm(model, **options):
    defaults = {"dtype": "float32", "model_impl": "transformers"}
    defaults |= {"num_threads": 1}  # nothing here is large enough for two
    return parity.create_llm(model, **(defaults | options))


def tokens(llm):
    return ids_of(llm, PROMPTS, GREEDY)


def read(model, model_impl="transformers"):
    return read_model_config(locate(str(model)), model_impl)


def write_config(directory, **config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def refusal(model, model_impl="transformers"):
    """Why a directory is refused, with nothing in it but a config."""
    with pytest.raises(UnsupportedModelError) as caught:
        config = read(model, model_impl)
        create_model(config, Build("meta", torch.float32), max_positions=1)
    return str(caught.value)


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / request.param
    return directory, write(directory, request.param)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
def answers(model):
    return answers_of(create_llm(model), PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def expected(answers):
    return [answer.token_ids for answer in answers]


def test_tokens_and_likelihoods_are_those_of_transformers(tiny, answers):
    check_answers(tiny[1], PROMPTS, answers, min_distinct=1)
    # Models that repeat themselves would prove little.
    assert len({token for answer in answers for token in answer.token_ids}) > 12


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "async_scheduling": True},
        {"block_size": 4, "max_num_batched_tokens": 50},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, expected, options):
    assert tokens(create_llm(model, **options)) == expected


def test_a_prefix_hit_does_not_change_the_text(model, expected):
    llm = create_llm(model)
    tokens(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert outputs[-1].num_cached_tokens == 96


def test_preemption_does_not_change_the_text(model, expected):
    block_bytes = create_llm(model).engine.config.kv_block_bytes
    tight = create_llm(model, kv_cache_memory_bytes=14 * block_bytes, max_model_len=130)
    assert tokens(tight) == expected
    assert tight.stats().num_preemptions > 0


def test_half_precision_has_weights_and_tables_as_transformers_loads_them(model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config, dtype = read(model), torch.bfloat16
    ours = create_model(config, Build("cpu", dtype), max_positions=1)
    load_weights(ours.slots(), read_tensors(locate(str(model)), config, dtype=dtype))
    wanted = dict(theirs.base_model.named_parameters()) | dict(theirs.base_model.named_buffers())
    found = dict(ours.decoder.named_parameters()) | dict(ours.decoder.named_buffers())
    assert found.keys() == wanted.keys() and any("inv_freq" in name for name in found)
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(ours.head.lm_head.weight, theirs.lm_head.weight)
    answers = tokens(create_llm(model, dtype="bfloat16"))
    assert [len(answer) for answer in answers] == [NUM_TOKENS] * len(PROMPTS)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "has shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_tensors_name(model, tmp_path, damage):
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if ".0." in name and tensors[name].dim() == 2)
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors[name := f"{name}.extra"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=damage) as caught:
        create_llm(tmp_path, skip_tokenizer_init=True)
    assert re.search(re.escape(name), str(caught.value))


def test_the_kv_cache_is_as_planned_and_the_rest_is_said_to_be_an_estimate(model, caplog, capsys):
    with caplog.at_level(logging.INFO):
        report = create_llm(model).engine.memory
    [kv] = [line for line in report.lines if line.what == "KV cache"]
    assert kv.planned_bytes == kv.measured_bytes
    lines = [record for record in caplog.records if "memory, estimated" in record.message]
    assert [line.levelname for line in lines] == ["INFO"]
    flags = ["--model-impl", "transformers", "--device", "cpu-64gib"]
    assert main(["plan", str(model), *flags]) == 0
    assert "weights and steps are estimates" in capsys.readouterr().out


def test_a_checkpoint_without_its_head_lacks_a_prefix(tmp_path):
    write(tmp_path, "olmo2", tie_word_embeddings=True)
    expected = tokens(create_llm(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors")
    assert tokens(create_llm(tmp_path)) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_weights_and_tables_are_there_again_after_sleep(model, expected, level):
    llm = create_llm(model)
    llm.sleep(level)
    llm.wake_up()
    assert tokens(llm) == expected


# ---- whose code


def test_auto_takes_transformers_for_what_we_lack_and_says_so(tmp_path, caplog, capsys):
    assert "HeliumForCausalLM" not in {one.hf_name for one in architectures().values()}
    reference = write(tmp_path, "helium", head_dim=16)
    # Code of a checkpoint is not looked at: transformers' own runs.
    evil = tmp_path / "modeling_evil.py"
    evil.write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "x.Evil"}
    write_config(tmp_path, **config)
    llm = create_llm(tmp_path, model_impl="auto")
    [output] = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    ids = torch.tensor([PROMPTS[1]["prompt_token_ids"] + output.outputs[0].token_ids])
    with torch.inference_mode():
        logits = reference(ids).logits[0, -NUM_TOKENS - 1 : -1]
    assert logits.argmax(-1).tolist() == output.outputs[0].token_ids
    assert not (tmp_path / "it_ran").exists()
    assert any("transformers' own modules run" in record.message for record in caplog.records)
    assert main(["explain", str(tmp_path), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"model_impl +transformers +rule +octavo has no code of its own", table)
    assert re.search(r"enforce_eager +True +rule +transformers' code may wait", table)
    assert main(["explain", "--kernels", str(tmp_path), "--device", "cpu"]) == 0
    assert re.search(r"layers\.0\.\.2\.self_attn.* +paged_attention", capsys.readouterr().out)


def test_auto_takes_ours_where_there_is_one_and_octavo_nothing_else(tmp_path):
    write_config(tmp_path, **TINY_CONFIG)
    assert read(tmp_path, "auto").architecture == "llama"
    assert read(tmp_path).architecture == "transformers"
    write_config(tmp_path, **TINY_CONFIG | {"architectures": ["HeliumForCausalLM"]})
    assert "HeliumForCausalLM" in refusal(tmp_path, "octavo")


def test_without_transformers_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_bridge.importlib.util, "find_spec", lambda name: None)
    write_config(tmp_path, architectures=["HeliumForCausalLM"], model_type="helium")
    remedy = re.escape("pip install 'octavo[transformers]'")
    for model_impl in ("auto", "transformers"):
        with pytest.raises((UnsupportedModelError, ConfigError), match=remedy):
            read(tmp_path, model_impl)


def test_batch_invariance_is_not_promised_for_code_of_others(tmp_path):
    config = read(write_config(tmp_path, **TINY_CONFIG))
    options = {"determinism": "batch-invariant", "model_impl": "transformers"}
    with pytest.raises(ConfigError, match="batch-invariant.*take determinism seeded"):
        resolve(
            EngineOptions.from_flat(str(tmp_path), options),
            config,
            DeviceFacts("cpu", "a CPU", 1, 2**34, 2**34),
        )


# ---- what cannot be run over our KV cache

REFUSED = {
    "an encoder": ("bart", {}, "is_encoder_decoder=True.*encoder's states"),
    "a recurrent model": ("mamba", {}, "'mamba'.*no KV cache"),
    "recurrent layers": ("bamba", {}, "layer_types='linear_attention'"),
    "a latent cache": ("deepseek_v3", {}, "kv_lora_rank=512.*latent attention"),
    "another latent cache": ("minicpm3", {"head_dim": 96}, "latent attention"),
    "experts": ("mixtral", {}, "'mixtral'.*stacks its tensors"),
    "several models in one": ("gemma3", {}, "more than a text model"),
    "ropes that move": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type='dynamic'.*cached keys",
    ),
    "quantized weights": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "chunks": (
        "llama",
        {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
        "chunked_attention",
    ),
    "later tokens": ("bert", {}, "tokens that come later"),
    "sinks": ("gpt_oss", {"num_hidden_layers": 1}, "cannot be run by Octavo"),
    "no way in": ("falcon", {}, "cannot be run by Octavo"),
    "blocks that keep to themselves": ("nemotron", SIZES, "do not hand on to attention"),
    "another shape": (
        "persimmon",
        {"num_key_value_heads": 2},
        "layer 0 has 64 and 64 heads.*config says 64 and 2",
    ),
    "a window of nothing": ("cohere2", {"sliding_window": -1}, "a window is of one token"),
    "an unknown activation": ("llama", {"hidden_act": "no-such"}, "no-such"),
}


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_our_cache_would_get_wrong_is_refused_by_name(tmp_path, model_type, changes, message):
    assert re.search(message, refusal(write_config(tmp_path, model_type=model_type, **changes)))


def test_what_transformers_cannot_run_either_is_refused(tmp_path):
    write_config(tmp_path, architectures=["LlamaForSequenceClassification"], model_type="llama")
    assert "no decoder ['LlamaForSequenceClassification']" in refusal(tmp_path)
    for wrong in ("no-such", ["llama"], None):
        assert "no decoder" in refusal(write_config(tmp_path, model_type=wrong))
    for absurd in ({"num_hidden_layers": 10**9}, {"hidden_size": "x"}, {"rope_scaling": 7}):
        with pytest.raises(ModelError):
            read(write_config(tmp_path, model_type="olmo2", **absurd))


@pytest.mark.server
def test_it_answers_over_http(tmp_path):
    write(tmp_path, "granite")
    prompt = {"prompt": PROMPTS[2]["prompt_token_ids"], "max_tokens": 12, "temperature": 0}
    [expected] = create_llm(tmp_path).generate(
        PROMPTS[2], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    flags = ["--port", "0", "--kv-cache-memory-bytes", str(2**22), "--model-impl", "transformers"]
    server = subprocess.Popen(
        [sys.executable, "-m", "octavo.cli", "serve", str(tmp_path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(server.stdout.readline, "")
        found = (re.search(r"Listening on (http://127\.0\.0\.1:\d+)", line) for line in lines)
        url = next(match[1] for match in found if match)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        extra = {"ignore_eos": True, "return_token_ids": True}
        stream = client.completions.create(model=name, stream=True, extra_body=extra, **prompt)
        streamed = [i for chunk in stream for choice in chunk.choices for i in choice.token_ids]
        assert streamed == expected.outputs[0].token_ids
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.stdout.close()
