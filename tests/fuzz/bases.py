"""The sound checkpoints that are damaged: small, and written by the libraries of real ones."""

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from checkpoint_files import (
    BYTE_TOKENS,
    CHATML,
    GGUF_METADATA,
    HF_CONFIG,
    byte_level_metadata,
    gguf_tensors,
    hf_tensors,
    write_directory,
    write_gguf,
)
from safetensors.torch import save

CONFIG = HF_CONFIG | {"vocab_size": 280, "intermediate_size": 32, "num_hidden_layers": 1}
METADATA = GGUF_METADATA | {"llama.feed_forward_length": 32, "llama.block_count": 1}
GGUF_FILE = "model.gguf"
INDEX = "model.safetensors.index.json"

Files = Mapping[str, bytes]


@functools.cache
def bases() -> dict[str, Files]:
    """{name: the files of a sound checkpoint}"""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        single = write_directory(root / "single", config=CONFIG, tensors=hf_tensors(CONFIG))
        _finish_directory(single)
        gguf_folder = root / "gguf"
        gguf_folder.mkdir()
        files = {"directory": _files(single)}
        for name, metadata in (("gguf", byte_level_metadata()), ("spm", spm_metadata())):
            write_gguf(gguf_folder / GGUF_FILE, METADATA | metadata, _gguf_tensors())
            files[name] = _files(gguf_folder)
    return files | {"shards": _sharded(files["directory"])}


def _finish_directory(folder: Path) -> None:
    """The template goes into the JSON, where most checkpoints have it."""
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": CHATML, "model_max_length": 128}
    path.write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _gguf_tensors() -> dict[str, object]:
    """As a quantized file has them: norms plain, one matrix in blocks, one in half precision."""
    tensors: dict[str, object] = dict(gguf_tensors(hf_tensors(CONFIG), CONFIG))
    kind = gguf.GGMLQuantizationType.Q8_0
    down = "blk.0.ffn_down.weight"
    tensors[down] = gguf.quants.quantize(tensors[down], kind), kind
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)
    # A head that llama.cpp stretches: Llama 3's factors for 4 pairs.
    tensors["rope_freqs.weight"] = np.ones((4,), np.float32)
    return tensors


def spm_metadata(*more: str) -> dict[str, object]:
    """Metadata of a SentencePiece vocabulary."""
    pieces = [*more, "▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "cc", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHATML,
    }


def _sharded(directory: Files) -> dict[str, bytes]:
    tensors = hf_tensors(CONFIG)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    files = {name: data for name, data in directory.items() if name != "model.safetensors"}
    for file, members in parts.items():
        files[file] = save({name: tensors[name] for name in members})
    index = {name: file for file, members in parts.items() for name in members}
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": index}).encode()
    return files


assert len(BYTE_TOKENS) <= CONFIG["vocab_size"]
