"""A seed's case: which sound checkpoint, which of its files, and what is done to them."""

import functools
import json
import random
from dataclasses import dataclass, field
from typing import Any

from fuzz.bases import GGUF_FILE, INDEX, Files, bases
from fuzz.mutations import (
    ODD_VALUES,
    Field,
    gguf_fields,
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_safetensors,
)
from fuzz.templates import hostile_template

TARGETS = (
    "gguf", "gguf", "spm", "safetensors", "safetensors", "shards", "config", "config", "tokenizer",
    "tokenizer", "tokenizer config", "template", "template",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A sound checkpoint and its damage. `None` takes a file away."""

    name: str
    base: str
    changes: dict[str, bytes | None]
    note: str = ""
    # Damage to a tokenizer is not looked for in the weights, which take most of the time.
    stages: tuple[str, ...] = field(default=("load", "text"))

    @property
    def files(self) -> Files:
        """All files of the damaged checkpoint."""
        files = dict(bases()[self.base]) | self.changes
        return {name: data for name, data in files.items() if data is not None}


def draw_case(seed: int) -> Case:
    """Everything that a seed decides."""
    rng = random.Random(seed)
    target = rng.choice(TARGETS)
    make = {
        "gguf": _gguf,
        "spm": _gguf,
        "safetensors": _safetensors,
        "shards": _shards,
        "config": _config,
        "tokenizer": _tokenizer,
        "tokenizer config": _tokenizer_config,
        "template": _template,
    }[target]
    return make(rng, f"seed {seed}", target)


def _gguf(rng: random.Random, name: str, base: str) -> Case:
    data = bases()[base][GGUF_FILE]
    if rng.random() < 0.7:
        data, note = mutate_gguf(rng, data, _fields_of(base))
    else:
        data, note = mutate_bytes(rng, data)
    if rng.random() < 0.1:
        data, more = mutate_bytes(rng, data)
        note += f"; {more}"
    return Case(name, base, {GGUF_FILE: data}, note)


@functools.cache
def _fields_of(base: str) -> list[Field]:
    return gguf_fields(bases()[base][GGUF_FILE])


def _safetensors(rng: random.Random, name: str, target: str) -> Case:
    base = "directory"
    file = "model.safetensors"
    data = bases()[base][file]
    mutate = mutate_safetensors if rng.random() < 0.8 else mutate_bytes
    data, note = mutate(rng, data)
    return Case(name, base, {file: data}, note, ("load",))


def _shards(rng: random.Random, name: str, base: str) -> Case:
    files = bases()[base]
    if rng.random() < 0.6:
        data, note = mutate_json(rng, json.loads(files[INDEX]))
        return Case(name, base, {INDEX: data}, note, ("load",))
    file = rng.choice(("model-1.safetensors", "model-2.safetensors"))
    if rng.random() < 0.3:
        return Case(name, base, {file: None}, f"no {file}", ("load",))
    data, note = mutate_safetensors(rng, files[file])
    return Case(name, base, {file: data}, f"{file}: {note}", ("load",))


MORE_CONFIG: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
    ("architectures", ["EvilForCausalLM"]),
    ("head_dim", 8),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 1024),
    ("hidden_size", 2**18),
    ("vocab_size", 2**22),
    ("max_position_embeddings", 2**28),
    ("num_attention_heads", 2**12),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    ("layer_types", ["full_attention"]),
    ("quantization_config", {"quant_method": "gptq"}),
    ("eos_token_id", [1, [2]]),
    ("tie_word_embeddings", True),
    ("attention_bias", True),
    ("dtype", "float16"),
    ("dtype", "bfloat16"),
)  # fmt: skip


def _config(rng: random.Random, name: str, target: str) -> Case:
    file = "config.json" if rng.random() < 0.9 else "generation_config.json"
    config = json.loads(bases()["directory"][file])
    notes = []
    for key, value in rng.sample(MORE_CONFIG, rng.choice((0, 1, 1, 2))):
        config[key] = value
        notes.append(f"{key} is {str(value)[:40]}")
    data = json.dumps(config).encode()
    if rng.random() < 0.75:
        data, note = mutate_json(rng, config)
        notes.append(note)
    return Case(name, "directory", {file: data}, "; ".join(notes))


PARTS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        {"type": "NFC"},
        {"type": "Lowercase"},
        {"type": "Prepend", "prepend": "x" * 1000},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
        {"type": "Sequence",
         "normalizers": [{"type": "Replace", "pattern": {"String": "h"}, "content": "hh"}] * 40},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": ""},
    ),
    "pre_tokenizer": (
        None,
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated",
         "invert": False},
        {"type": "Split", "pattern": {"Regex": "(?:(?:x*)*)*y"}, "behavior": "Removed",
         "invert": True},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "xx", "prepend_scheme": "always", "split": True},
        {"type": "FixedLength", "length": 0},
        {"type": "CharDelimiterSplit", "delimiter": "é"},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999,
         "pair": [{"Sequence": {"id": "B", "type_id": 2**31}}], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["[SEP]", 2**31], "cls": ["[CLS]", 10**6]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Sequence", "processors": []},
    ),
    "decoder": (
        None,
        {"type": "Sequence", "decoders": []},
        {"type": "Strip", "content": " ", "start": 2**63, "stop": 2**63},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
        {"type": "ByteFallback"},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    ),
    "model": (
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
        {"type": "Unigram", "unk_id": None, "vocab": []},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "nope"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True, "fuse_unk": True},
        {"type": "BPE", "vocab": {"h": 0}, "merges": [], "dropout": 1.0},
        {"type": "BPE", "vocab": {"h": 0}, "merges": [], "continuing_subword_prefix": "é" * 99},
    ),
    "truncation": (
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
        {"direction": "Left", "max_length": 2**63, "strategy": "OnlySecond", "stride": 2**63},
    ),
    "padding": (
        {"strategy": {"Fixed": 2**50}, "direction": "Right", "pad_to_multiple_of": 0,
         "pad_id": 0, "pad_type_id": 0, "pad_token": ""},
    ),
    "added_tokens": (
        [],
        [{"id": 2**32 - 1, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": True}],
        [{"id": 5, "content": "", "single_word": False, "lstrip": True, "rstrip": True,
          "normalized": True, "special": True}] * 3,
        [{"id": 0, "content": "h", "single_word": True, "lstrip": True, "rstrip": True,
          "normalized": True, "special": True}],
    ),
}  # fmt: skip


def _tokenizer(rng: random.Random, name: str, target: str) -> Case:
    file = "tokenizer.json"
    data = bases()["directory"][file]
    if rng.random() < 0.1:
        data, note = mutate_bytes(rng, data)
        return Case(name, "directory", {file: data}, note, ("text",))
    spec, notes = json.loads(data), []
    for part in rng.sample(sorted(PARTS), rng.choice((0, 1, 1, 2))):
        spec[part] = rng.choice(PARTS[part])
        notes.append(f"{part} is {str(spec[part])[:60]}")
    if notes and rng.random() < 0.5:
        return Case(
            name, "directory", {file: json.dumps(spec).encode()}, "; ".join(notes), ("text",)
        )
    # The vocabulary has most of the leaves; half of the damage goes elsewhere.
    vocabulary = spec["model"].pop("vocab", None) if rng.random() < 0.5 else None
    data, note = mutate_json(rng, spec)
    if vocabulary is not None:
        data = data.replace(
            b'"model": {', b'"model": {"vocab": %s, ' % json.dumps(vocabulary).encode()
        )
    return Case(name, "directory", {file: data}, "; ".join([*notes, note]), ("text",))


def _tokenizer_config(rng: random.Random, name: str, target: str) -> Case:
    file = "tokenizer_config.json"
    config = json.loads(bases()["directory"][file])
    config |= {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        "pad_token": rng.choice(ODD_VALUES),
    }
    if rng.random() < 0.3:
        config["chat_template"] = [
            {"name": "default", "template": config["chat_template"]},
            rng.choice(ODD_VALUES),
        ]
    data, note = mutate_json(rng, config)
    return Case(name, "directory", {file: data}, note, ("text",))


def _template(rng: random.Random, name: str, target: str) -> Case:
    source = hostile_template(rng)
    file = "chat_template.jinja"
    data = source.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data, _ = mutate_bytes(rng, data)
    return Case(name, "directory", {file: data}, f"template {source[:200]!r}", ("text",))
