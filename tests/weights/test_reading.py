"""Tensors out of files: GGUF and safetensors agree, and damaged files are refused at once."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import (
    GGUF_METADATA,
    HF_CONFIG,
    gguf_tensors,
    hf_tensors,
    write_directory,
    write_gguf,
)
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from octavo.config import Checkpoint, locate, model_config_from_hf
from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.weights.reading import open_tensors as read_tensors

CONFIG = model_config_from_hf(HF_CONFIG)
TENSORS = hf_tensors()
F32 = torch.float32


def write(folder, tensors, **metadata):
    path = write_gguf(folder / "tiny.gguf", GGUF_METADATA | metadata, tensors)
    return Checkpoint("x", path, "gguf")


def equal(actual, expected):
    actual = dict(actual)
    assert set(actual) == set(expected)
    return all(torch.equal(actual[name], expected[name]) for name in expected)


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gguf_tensors_get_their_names_and_order_back(tmp_path, dtype):
    stream = read_tensors(write(tmp_path, gguf_tensors(TENSORS)), CONFIG, dtype=dtype)
    assert stream.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    expected = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    assert equal(stream, expected)
    assert equal(stream, expected)  # a second time too


def test_gguf_biases(tmp_path):
    biases = {
        "model.layers.1.self_attn.q_proj.bias": torch.arange(32.0),
        "model.layers.1.self_attn.k_proj.bias": torch.arange(16.0),
        "model.layers.1.self_attn.v_proj.bias": torch.arange(16.0),
        "model.layers.1.mlp.up_proj.bias": torch.arange(64.0),
    }
    checkpoint = write(tmp_path, gguf_tensors(biases))
    assert equal(read_tensors(checkpoint, CONFIG, dtype=F32), biases)


def test_gguf_quantized(tmp_path):
    named = {name: TENSORS[name] for name in list(TENSORS)[:1]}
    named["model.layers.0.self_attn.q_proj.weight"] = torch.randn(32, 32)
    stored, expected = {}, {}
    for (name, data), original in zip(gguf_tensors(named).items(), named, strict=True):
        kind = GGMLQuantizationType.Q8_0
        quantized = gguf.quants.quantize(data, kind)
        stored[name] = (quantized, kind)
        rounded = torch.from_numpy(gguf.quants.dequantize(quantized, kind))
        if original.endswith("q_proj.weight"):
            rounded = rounded.view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
        expected[original] = rounded
    assert equal(read_tensors(write(tmp_path, stored), CONFIG, dtype=F32), expected)


def test_gguf_unknown_names_are_left_for_the_model_to_refuse(tmp_path):
    names = ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q.scale", "something", "v.blk.0.x.weight"]
    ones = np.ones((4,), np.float32)
    checkpoint = write(tmp_path, dict.fromkeys(names, ones))
    assert set(read_tensors(checkpoint, CONFIG, dtype=F32).shapes) == set(names)


def test_gguf_rotary_factors_are_no_weights(tmp_path):
    checkpoint = write(tmp_path, {"rope_freqs.weight": np.ones((4,), np.float32)})
    assert dict(read_tensors(checkpoint, CONFIG, dtype=F32)) == {}


def test_gguf_rows_that_do_not_fit_the_heads(tmp_path):
    checkpoint = write(tmp_path, {"blk.0.attn_q.weight": np.ones((30, 32), np.float32)})
    with pytest.raises(CheckpointError, match="'blk.0.attn_q.weight' has 30 rows.*4 heads of 8"):
        read_tensors(checkpoint, CONFIG, dtype=F32)


def test_gguf_truncated_anywhere_in_its_data(tmp_path):
    checkpoint = write(tmp_path, gguf_tensors(TENSORS))
    data = checkpoint.path.read_bytes()
    starts = [tensor.offset for tensor in checkpoint.gguf.tensors.values()]
    for size in (len(data) - 40, (min(starts) + max(starts)) // 2, min(starts) + 1):
        checkpoint.path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read_tensors(Checkpoint("x", checkpoint.path, "gguf"), CONFIG, dtype=F32)


def patched_info(folder, *, shape=None, ggml_type=None, offset=None):
    """A file whose second tensor's table entry says something else."""
    tensors = {"token_embd.weight": np.ones((8, 32), np.float32), "z": np.ones((64,), np.float32)}
    checkpoint = write(folder, tensors)
    data = bytearray(checkpoint.path.read_bytes())
    at = data.index(struct.pack("<Q", 1) + b"z") + 9 + 4  # behind name and number of dimensions
    for value, position, code in (
        (shape, at, "<Q"),
        (ggml_type, at + 8, "<I"),
        (offset, at + 12, "<Q"),
    ):
        if value is not None:
            struct.pack_into(code, data, position, value)
    checkpoint.path.write_bytes(data)
    return Checkpoint("x", checkpoint.path, "gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": 2**39}, "truncated"),
        ({"shape": 2**41}, "impossible shape"),
        ({"shape": 0}, "impossible shape"),
        ({"offset": 2**50}, "truncated"),
        ({"offset": 0}, "overlap"),
        ({"ggml_type": 8, "shape": 33}, "blocks of 32"),
    ],
)
def test_gguf_table_that_lies(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_tensors(patched_info(tmp_path, **changes), CONFIG, dtype=F32)


def test_gguf_number_formats_that_are_none(tmp_path):
    for ggml_type in (26, 77):
        with pytest.raises(UnsupportedModelError, match="tensor 'z'"):
            read_tensors(patched_info(tmp_path, ggml_type=ggml_type), CONFIG, dtype=F32)


# --- safetensors ----------------------------------------------------------------------------------


def open_folder(folder, dtype=F32):
    return read_tensors(Checkpoint("x", folder, "directory"), CONFIG, dtype=dtype)


def write_shards(folder, weight_map=None):
    folder.mkdir()
    names = sorted(TENSORS)
    parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, members in parts.items():
        save_file({name: TENSORS[name] for name in members}, folder / file)
    index = {name: file for file, members in parts.items() for name in members}
    index |= weight_map or {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_single_file(tmp_path):
    folder = write_directory(tmp_path / "model")
    stream = read_tensors(locate(str(folder)), CONFIG, dtype=F32)
    assert stream.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert equal(stream, TENSORS)
    half = read_tensors(locate(str(folder)), CONFIG, dtype=torch.bfloat16)
    assert equal(half, {name: tensor.bfloat16() for name, tensor in TENSORS.items()})


def test_shards(tmp_path):
    assert equal(open_folder(write_shards(tmp_path / "model")), TENSORS)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "../x.safetensors"}, "no file of ours"),
        ({"model.norm.weight": "/etc/x.safetensors"}, "no file of ours"),
        ({"model.norm.weight": "x.bin"}, "no file of ours"),
        ({"model.norm.weight": 5}, "no file of ours"),
        ({"absent.weight": "model-1.safetensors"}, "'absent.weight' is not in"),
        ({"model.norm.weight": "model-1.safetensors"}, "'model.norm.weight' is not in"),
        ({"absent.weight": "model-3.safetensors"}, "model-3.safetensors is missing"),
    ],
)
def test_index_that_lies(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        open_folder(write_shards(tmp_path / "model", weight_map))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_index_that_is_none(tmp_path, content):
    folder = write_shards(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_folder(folder)


def test_tensor_in_two_shards(tmp_path):
    folder = write_shards(tmp_path / "model")
    save_file(TENSORS, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="is also in model-1"):
        open_folder(folder)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModelError, match="pytorch_model.bin is a pickle"):
        open_folder(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        open_folder(tmp_path)


def test_quantized_tensors_are_refused_by_name(tmp_path):
    save_file({"x.weight": torch.zeros(4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="'x.weight' has the type I32"):
        open_folder(tmp_path)


def header_of(entries):
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header_of({"x": entry([2**40], 0, 2**42)}),
        header_of({"x": entry([4], 0, 16)}) + bytes(15),
        header_of({"x": entry([4], 0, 16)}) + bytes(17),
        header_of({"x": entry([4], 0, 12)}) + bytes(12),
        header_of({"x": entry([4], 8, 24)}) + bytes(24),
        header_of({"x": entry([4], 0, 16), "y": entry([4], 8, 24)}) + bytes(24),
        header_of({"x": entry([4], 16, 0)}) + bytes(16),
        header_of({"x": entry([2**32, 2**32], 0, 16)}) + bytes(16),
        header_of({"x": entry([4], 0, 16, "F33")}) + bytes(16),
        header_of({"x": entry([-4], 0, 16)}) + bytes(16),
    ],
)
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        open_folder(tmp_path)
