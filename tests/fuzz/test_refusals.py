"""Rows F46 and F47 of the fault table, at the command line: how bad checkpoints end a start."""

import json
import struct
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_files import hf_tensors
from fuzz.bases import CONFIG, GGUF_FILE, bases
from safetensors.torch import save

from octavo.cli import main
from octavo.engine import build

MAX_REFUSAL_S = 5.0
WEIGHTS = "model.safetensors"
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def tensors(**changes):
    """The weights' file with some tensors replaced, or taken away by None."""
    changed = hf_tensors(CONFIG) | {name.replace("__", "."): t for name, t in changes.items()}
    return {WEIGHTS: save({name: t for name, t in changed.items() if t is not None})}


def header(edit):
    data = bases()["directory"][WEIGHTS]
    (size,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + size])
    edit(entries)
    text = json.dumps(entries).encode()
    return {WEIGHTS: struct.pack("<Q", len(text)) + text + data[8 + size :]}


def config(**changes):
    return {"config.json": json.dumps(CONFIG | changes).encode()}


def nan(shape):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = float("nan")
    return tensor


EVIL = b"raise SystemExit('code of the checkpoint ran')"
PICKLE = b"cposix\n_exit\n(I7\ntR."  # ends the process if it is ever loaded

# {what is wrong: (files, words that the error must have)}
DIRECTORIES = {
    "truncated": ({WEIGHTS: bases()["directory"][WEIGHTS][:-100]}, [WEIGHTS]),
    "cut in its header": ({WEIGHTS: bases()["directory"][WEIGHTS][:100]}, [WEIGHTS]),
    "a header that lies about a shape": (
        header(lambda entries: entries[NORM].update(shape=[2**40, 2**20])),
        [WEIGHTS, NORM],
    ),
    "a shape of another model": (tensors(model__norm__weight=torch.ones(64)), [NORM, "(64,)"]),
    "a type that is no weight's": (
        tensors(model__norm__weight=torch.ones(32, dtype=torch.int8)),
        [WEIGHTS, NORM, "I8"],
    ),
    "a type that nobody has": (
        header(lambda entries: entries[NORM].update(dtype="X")),
        [WEIGHTS, NORM, "X"],
    ),
    "two tensors in one place": (
        header(lambda entries: entries[NORM].update(data_offsets=[0, 128])),
        [WEIGHTS, "tensor"],
    ),
    "a missing tensor": (tensors(model__norm__weight=None), ["missing", NORM]),
    "an extra tensor": (tensors(model__extra=torch.ones(2)), ["unexpected", "model.extra"]),
    "NaN": (tensors(model__norm__weight=nan(32)), [NORM, "NaN"]),
    "NaN in a matrix": (
        tensors(model__layers__0__mlp__down_proj__weight=nan((32, 32))),
        ["NaN", "down_proj"],
    ),
    "a pickle": (
        {WEIGHTS: None, "pytorch_model.bin": PICKLE},
        ["pytorch_model.bin", "pickle", "safetensors"],
    ),
    "a pickle of another name": ({WEIGHTS: None, "model.ckpt": PICKLE}, ["model.ckpt", "pickle"]),
    "no weights": ({WEIGHTS: None}, [WEIGHTS, "missing"]),
    "code for its architecture": (
        config(architectures=["EvilForCausalLM"], auto_map={"AutoModel": "evil.Evil"})
        | {"evil.py": EVIL, "modeling_evil.py": EVIL},
        ["EvilForCausalLM", "never run"],
    ),
    "a billion layers": (config(num_hidden_layers=10**9), ["num_hidden_layers=1000000000"]),
    "heads of nothing": (config(head_dim=0), ["head_dim=0"]),
    "a vocabulary of the world": (config(vocab_size=10**12), ["vocab_size=1000000000000"]),
    "more layers than weights": (config(num_hidden_layers=1000), ["missing", "model.layers.1."]),
    "the weights of a model that fits nowhere": (
        config(hidden_size=2**18, intermediate_size=2**20, num_hidden_layers=1024),
        [],  # whether memory or the file is asked first
    ),
}


def refused(model, capsys):
    """The one line on stderr with which a command ends, soon and with status 1."""
    start = time.perf_counter()
    status = main(["generate", str(model), "--prompt", "x", "--device", "cpu"])
    assert time.perf_counter() - start < MAX_REFUSAL_S
    assert status == 1
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


@pytest.mark.parametrize("what", DIRECTORIES)
def test_directories(what, tmp_path, monkeypatch, capsys):
    changes, words = DIRECTORIES[what]
    if "NaN" not in what:  # which only whoever reads the numbers can see
        monkeypatch.setattr(build, "create_model", None)
    for name, data in (dict(bases()["directory"]) | changes).items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    line = refused(tmp_path, capsys)
    missing = [word for word in words if word not in line]
    assert not missing and (not words or str(tmp_path) in line), line


@pytest.mark.parametrize("size", [30, 3_000, 90_000])
def test_truncated_gguf_files(size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "create_model", None)
    (tmp_path / GGUF_FILE).write_bytes(bases()["gguf"][GGUF_FILE][:size])
    assert str(tmp_path / GGUF_FILE) in refused(tmp_path / GGUF_FILE, capsys)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "m.pkl"])
def test_pickles_by_name(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(PICKLE)
    line = refused(tmp_path / name, capsys)
    assert name in line and "never read" in line and "safetensors" in line


def test_code_beside_an_architecture_of_ours_is_not_run(tmp_path):
    """`auto_map` is for other loaders: the model itself is one that we have."""
    files = dict(bases()["directory"]) | config(auto_map={"AutoModelForCausalLM": "evil.Evil"})
    for name, data in (files | {"evil.py": EVIL}).items():
        (tmp_path / name).write_bytes(data)
    command = ["generate", str(tmp_path), "--prompt", "x", "--max-tokens", "2", "--device", "cpu"]
    assert main(command) == 0


@pytest.mark.server
def test_a_server_with_a_bad_checkpoint_ends(tmp_path):
    """The model is loaded in a process of its own: the server must end with it."""
    for name, data in (dict(bases()["directory"]) | tensors(model__norm__weight=nan(32))).items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-m", "octavo.cli", "serve", str(tmp_path), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert NORM in ended.stderr and str(tmp_path) in ended.stderr
