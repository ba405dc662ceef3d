"""`octavo inspect` on configs alone, on checkpoints and on damaged ones."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.cli import main
from octavo.config import locate, model_config_from_hf
from octavo.config.architectures import architecture_named
from octavo.config.inspection import inspect_config, read_all, weight_groups
from octavo.config.stored_tensors import stored_tensors
from octavo.testing.tiny_llama import TINY_CONFIG, write_tiny_llama
from octavo.weights.safetensors_files import open_safetensors

GRANITE = TINY_CONFIG | {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "use_cache": True,
}


def write(directory, config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def shown(capsys, *arguments, status=0):
    assert main(["inspect", *map(str, arguments)]) == status
    return capsys.readouterr().out


def found(capsys, *arguments, status=0):
    return json.loads(shown(capsys, *arguments, "--json", status=status))


def test_a_supported_model_says_what_it_is_made_of(tmp_path, capsys):
    text = shown(capsys, write_tiny_llama(tmp_path / "tiny", num_hidden_layers=12))
    assert text.startswith("tiny: LlamaForCausalLM (model_type llama)")
    assert "run by octavo.models.llama:Llama of the package octavo" in text
    assert "layers 0..11" in text and "6 heads over 2 of keys and values, 16 numbers" in text
    assert "gated silu of 136" in text and "rope 10000 over 16 numbers" in text
    [line] = [line for line in text.splitlines() if "mlp.down_proj" in line]
    assert line.split()[2:] == ["model.layers.0..11.mlp.down_proj.weight", "12", "x"] + [
        "[96", "x", "136]", "F32"
    ]  # fmt: skip
    assert "tokens: 260" in text and "chat template: " in text
    assert "not supported" not in text.lower()


def test_every_tensor_is_shown_where_it_is_asked_for(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny")
    assert "model.layers.0..1.mlp" in shown(capsys, model)
    text = shown(capsys, model, "--tensors")
    assert "model.layers.0.mlp.down_proj.weight  [96 x 136] F32" in text
    assert "model.layers.1.mlp.down_proj.weight" in text


def test_parameters_and_bytes_are_those_of_the_files(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny", attention_bias=True)
    facts = found(capsys, model)
    count = sum(group["num_parameters"] for group in facts["weights"])
    stored = facts["tensors"]
    assert sum(tensor["num_bytes"] for tensor in stored) == 4 * count
    # float32, as the config says.
    assert sum(group["num_bytes"] for group in facts["weights"]) == 4 * count
    assert facts["config"]["layers"][0]["attention"]["bias"] is True


@pytest.mark.model
def test_the_tensors_of_a_gguf_file_are_those_that_are_loaded(capsys):
    checkpoint = locate("smollm2-135m-instruct")
    facts = found(capsys, "smollm2-135m-instruct")
    tensors = {one["name"]: one for one in facts["tensors"]}
    assert tensors.keys() == checkpoint.gguf.tensors.keys()
    assert tensors["blk.0.ffn_up.weight"]["dtype"] == "Q4_1"
    # Each begins where the last one ends, up to its alignment.
    places = sorted(checkpoint.gguf.tensors.values(), key=lambda one: one.offset)
    ends = [one.offset for one in places[1:]] + [checkpoint.gguf.num_file_bytes]
    for place, end in zip(places, ends, strict=True):
        assert 0 <= end - place.offset - tensors[place.name]["num_bytes"] < 32


def test_all_that_is_refused_is_said_at_once(tmp_path, capsys):
    odd = {"hidden_act": "gelu", "sliding_window": 3, "num_key_value_heads": "two"}
    odd["rope_scaling"] = {"rope_type": "dynamic", "factor": 2}
    odd["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    facts = found(capsys, write(tmp_path, TINY_CONFIG | odd), status=1)
    for name in ("hidden_act", "sliding_window", "quantization_config", "rope_type"):
        assert any(f"{name}=" in problem for problem in facts["problems"]), name
    assert "num_key_value_heads='two', but it must be" in " ".join(facts["problems"])
    assert len(facts["problems"]) == 5 and not facts["is_supported"]
    assert facts["quantization"] == odd["quantization_config"]
    # Without these it is a model.
    assert facts["config"]["hidden_size"] == TINY_CONFIG["hidden_size"]


def test_of_an_unknown_architecture_the_nearest_of_ours_is_named(tmp_path, capsys):
    text = shown(capsys, write(tmp_path, GRANITE), status=1)
    assert "the architecture 'GraniteForCausalLM' is not supported" in text
    assert "nearest of ours: llama; octavo new-model NAME --like llama" in text
    assert "not read: attention_multiplier, residual_multiplier\n" in text + "\n"


def test_whether_transformers_would_take_it_is_said(tmp_path, capsys):
    pytest.importorskip("transformers")
    text = shown(capsys, write(tmp_path, GRANITE), status=1)
    assert "--model-impl transformers takes its config" in text
    mamba = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64}
    text = shown(capsys, write(tmp_path, mamba), status=1)
    assert "nor by --model-impl transformers: " in text and "no KV cache" in text


def test_code_from_the_checkpoint_is_not_run(tmp_path, capsys):
    config = {"architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    assert "never run" in shown(capsys, write(tmp_path, config), status=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "model.safetensors is missing"),
        (b"", "no header"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes"),
        (b"\x05" + b"\0" * 7 + b"[1,2]", "damaged safetensors file"),
        (b"\x0d" + b"\0" * 7 + b'{"a": {"b":1}', "damaged safetensors file"),
    ],
)
def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path, capsys, data, message):
    model = write_tiny_llama(tmp_path / "tiny")
    (model / "model.safetensors").unlink()
    if data is not None:
        (model / "model.safetensors").write_bytes(data)
    facts = found(capsys, model)
    [problem] = facts["tensor_problems"]
    assert message in problem and "model.safetensors" in problem
    assert facts["config"]["vocab_size"] == 301 and facts["tokenizer"]["tokens"] == 260


def test_tensors_that_are_not_loaded_are_a_problem(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny")
    packed = {f"model.layers.{i}.mlp.up_proj.qweight": torch.zeros(2, 3).int() for i in range(2)}
    save_file(packed, model / "model.safetensors")
    facts = found(capsys, model)
    assert facts["tensor_problems"] == [
        "2 tensors have the type I32; supported: BF16, F16, F32, F64"
    ]
    assert facts["tensors"][0]["num_bytes"] == 24 and facts["tensors"][0]["shape"] == [2, 3]


def test_what_has_no_place_in_a_model_is_said_in_patterns(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny")
    assert "each tensor has its place" in shown(capsys, model, "--fit")
    tensors = load_file(model / "model.safetensors")
    for layer in range(2):
        block = f"model.layers.{layer}.self_attn"
        del tensors[f"{block}.k_proj.weight"]
        tensors[f"{block}.q_norm.weight"] = torch.zeros(16)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, model / "model.safetensors")
    facts = found(capsys, model, "--fit", status=1)
    assert facts["fit_problems"] == [
        "llama waits for model.layers.0..1.self_attn.k_proj.weight [32 x 96]",
        "llama has no place for model.layers.0..1.self_attn.q_norm.weight [16]",
        "model.norm.weight is [3], and llama waits for [96]",
    ]


def test_without_tensors_nothing_can_be_held_to_a_model(tmp_path, capsys):
    assert main(["inspect", str(write(tmp_path, TINY_CONFIG)), "--fit"]) == 1
    assert "there are none" in capsys.readouterr().err


def test_what_is_read_in_a_familys_own_way_counts_as_read(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig().to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    assert "rope_parameters" in config
    assert "rope_parameters" not in found(capsys, write(tmp_path, config))["unread"]


def test_a_terminal_is_not_steered_by_a_strangers_names(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny", model_type="llama\x1b[2J")
    save_file({"model.\x1b]0;name": torch.zeros(1)}, model / "model.safetensors")
    text = shown(capsys, model)
    assert "\x1b" not in text
    assert "llama\\x1b[2J" in text and "model.\\x1b]0;name" in text


def test_who_reads_the_beginning_alone_sees_no_traceback(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    tensors = {f"model.layers.{i}.some.weight": torch.zeros(i % 7 + 1) for i in range(3000)}
    save_file(tensors, model / "model.safetensors")
    command = [sys.executable, "-m", "octavo.cli", "inspect", str(model), "--tensors"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait(60) == 0
    run.stderr.close()


def test_what_lies_beside_the_config_may_be_refused_too(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny")
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    facts = found(capsys, model, status=1)
    [problem] = facts["problems"]
    assert "modules.json has 'Dense'" in problem and facts["architecture"] == "llama"


def test_a_tokenizer_that_cannot_be_used_is_a_problem_that_is_shown(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "tiny")
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in found(capsys, model)["tokenizer"]["problem"]


def test_a_config_that_names_nothing_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(write(tmp_path, {}))]) == 1
    error = capsys.readouterr().err
    assert "names the model" in error and error.count("\n") == 1


def test_what_the_library_loads_is_what_is_shown(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    checkpoint = locate(str(model))
    tensors, problems = stored_tensors(checkpoint)
    loaded = open_safetensors(checkpoint, torch.float32).shapes
    assert problems == ()
    assert {one.name: one.shape for one in tensors} == loaded


def test_a_reading_that_ends_early_has_no_config():
    reading = read_all(architecture_named("llama"), {"hidden_size": 64})
    assert reading.config is None and len(reading.refused) == 1


def test_weights_are_counted_without_torch(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    code = (
        "import sys; from octavo.cli import main; status = main(['inspect', sys.argv[1]]);"
        "print(status, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, model], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.splitlines()[-1] == "0 []", run.stderr
    config = model_config_from_hf(TINY_CONFIG)
    assert sum(group.num_parameters for group in weight_groups(config)) > 100_000
    assert inspect_config(locate(str(model))).problems == ()
