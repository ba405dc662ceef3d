"""PEFT's files: what is read, and what is refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.config.adapter_files import digest_of
from octavo.errors import CheckpointError, ModelError, UnsupportedModelError
from octavo.testing.tiny_adapters import write_adapter
from octavo.weights import read_adapter

MODULE = "model.layers.0.self_attn.q_proj"
SHAPES = {MODULE: (12, 8), "model.layers.0.mlp.up_proj": (20, 8)}


def read(directory, **options):
    defaults = {"max_rank": 16, "dtype": torch.float32}
    return read_adapter(directory, SHAPES, **defaults | options)


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("rslora", [False, True])
def test_matrices_come_with_their_scale(tmp_path, rslora):
    write_adapter(tmp_path, SHAPES, rank=4, lora_alpha=12, use_rslora=rslora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    adapter = read(tmp_path)
    assert adapter.rank == 4
    assert set(adapter.modules) == set(SHAPES)
    a, b = adapter.modules[MODULE]
    assert torch.equal(a, tensors[f"base_model.model.{MODULE}.lora_A.weight"])
    expected = (6 if rslora else 3) * tensors[f"base_model.model.{MODULE}.lora_B.weight"]
    torch.testing.assert_close(b, expected)
    assert read(tmp_path, dtype=torch.bfloat16).modules[MODULE][1].dtype is torch.bfloat16


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "scales by layer": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
    "new tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "layers twice": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "too large": ({"r": 17}, "r=17 is not supported, at most 16; raise max_lora_rank"),
}
DAMAGED = {
    "no rank": ({"r": None}, "'r' is missing"),
    "no whole rank": ({"r": 4.5}, "r=4.5"),
    "a rank of nothing": ({"r": 0}, "r=0"),
    "a scale that is none": ({"lora_alpha": "16"}, "lora_alpha='16'"),
    "a scale without end": ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
    "a switch that is none": ({"use_rslora": 1}, "use_rslora=1"),
    "another rank than the tensors'": ({"r": 5}, "has the shape"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_arithmetic_is_refused(tmp_path, case):
    changes, message = case
    write_adapter(tmp_path, SHAPES, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        read(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("case", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_refused(tmp_path, case):
    changes, message = case
    write_adapter(tmp_path, SHAPES, **changes)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert message in str(caught.value)


def test_defaults_of_peft_are_taken(tmp_path):
    changes = {"lora_dropout": 0.1, "fan_in_fan_out": False, "init_lora_weights": True}
    write_adapter(tmp_path, SHAPES, **changes, alpha_pattern={}, target_modules="all-linear")
    assert read(tmp_path).rank == 4


def drop_b(tensors):
    del tensors[f"base_model.model.{MODULE}.lora_B.weight"]


def add_magnitude(tensors):
    tensors[f"base_model.model.{MODULE}.lora_magnitude_vector"] = torch.ones(12)


def add_embedding(tensors):
    tensors["base_model.model.model.embed_tokens.lora_A.weight"] = torch.ones(4, 8)


def spoil(tensors):
    tensors[f"base_model.model.{MODULE}.lora_A.weight"][0, 0] = float("nan")


def widen(tensors):
    tensors[f"base_model.model.{MODULE}.lora_A.weight"] = torch.ones(4, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_b, f"{MODULE} has no lora_B.weight"),
        (add_magnitude, "lora_magnitude_vector"),
        (add_embedding, "model.embed_tokens"),
        (spoil, "NaN or infinity"),
        (widen, r"has the shape \(4, 9\), but the model and the config ask for \(4, 8\)"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    write_adapter(tmp_path, SHAPES)
    change_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_missing_or_cut_are_refused(tmp_path, name):
    path = write_adapter(tmp_path, SHAPES) / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"no JSON|damaged safetensors"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        digest_of(tmp_path)


def test_a_config_is_an_object(tmp_path):
    path = write_adapter(tmp_path, SHAPES) / "adapter_config.json"
    path.write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="no JSON object"):
        read(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no JSON"):
        read(tmp_path)


def test_the_digest_is_of_contents_alone(tmp_path):
    first, second = (write_adapter(tmp_path / name, SHAPES, seed=1) for name in "ab")
    assert digest_of(first) == digest_of(second)
    assert digest_of(write_adapter(tmp_path / "c", SHAPES, seed=2)) != digest_of(first)
    assert digest_of(write_adapter(tmp_path / "d", SHAPES, seed=1, lora_alpha=9)) != digest_of(
        first
    )
