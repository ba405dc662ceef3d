"""What the fuzzer found, each as the smallest damage that shows it, and what is said of it now."""

import json
import os
import re
import struct

import numpy as np
import pytest
from checkpoint_files import BYTE_TOKENS, CHATML, byte_level_metadata, write_gguf
from fuzz.bases import GGUF_FILE, INDEX, METADATA, bases, spm_metadata
from fuzz.cases import Case
from fuzz.mutations import gguf_fields, safetensors_parts
from fuzz.play import peak_bytes, play
from fuzz.templates import ATTACKS

from octavo.config.gguf_header import read_gguf_header
from octavo.engine import build
from octavo.errors import CheckpointError
from octavo.text import template_budget
from octavo.text.chat_template import ChatTemplate


def edited(file, **changes):
    """A JSON file of the sound directory with some entries replaced."""
    return {file: json.dumps(json.loads(bases()["directory"][file]) | changes).encode()}


def tokenizer(**changes):
    return Case("tokenizer", "directory", edited("tokenizer.json", **changes), stages=("text",))


def config(**changes):
    return Case("config", "directory", edited("config.json", **changes))


def template(source):
    changes = {"chat_template.jinja": source.encode("utf-8", "surrogatepass")}
    return Case("template", "directory", changes, stages=("text",))


def gguf(tensors=None, **metadata):
    changes = METADATA | byte_level_metadata() | metadata
    return lambda folder: Case(
        "gguf",
        "gguf",
        {GGUF_FILE: write_gguf(folder / "written.gguf", changes, tensors or {}).read_bytes()},
        stages=("load", "text") if tensors else ("text",),
    )


def renamed_tensor(old, new):
    header, data = safetensors_parts(bases()["directory"]["model.safetensors"])
    header[new] = header.pop(old)
    text = json.dumps(header).encode()
    changes = {"model.safetensors": struct.pack("<Q", len(text)) + text + data}
    return Case("tensor", "directory", changes, stages=("load",))


def spelled(**changes):
    """An added token of a `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 0, "special": True} | flags | changes


REPLACE = {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}
EMBEDDING = {"token_embd.weight": np.zeros((280, 32), np.float32)}
FACTORS = np.array([1.0, 1.0, 3.5551, np.inf], np.float32)  # Llama 3's, but for the last

FOUND = {
    # PanicException is no Exception, and went past every handler.
    "a character map that cannot be parsed": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json is no tokenizer",
    ),
    "a template around texts with an unknown token": (
        tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer",
    ),
    "a regular expression that gives up": (
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a|aa)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "worked, but RequestError: the model's tokenizer fails on this text",
    ),
    # Doubled 40 times: the library asked for more memory than there is, and aborted the process.
    "a chain of replacements": (
        tokenizer(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40}),
        "more than 256 times longer",
    ),
    # The library runs it on the names of added tokens while it reads the file.
    "a chain of replacements for an added token": (
        tokenizer(
            normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40},
            added_tokens=[spelled(content="l", normalized=True)],
        ),
        "more than 256 times longer",
    ),
    "a decoder that is such a chain": (
        tokenizer(decoder={"type": "Sequence", "decoders": [REPLACE | {"content": "aa"}] * 40}),
        "times longer",
    ),
    "a special token that merges are made of": (
        tokenizer(added_tokens=[spelled(content="h")]),
        "worked, but RequestError: .*cannot take the names of its special tokens for text",
    ),
    "half a character for the name of a token": (
        Case("", "directory", edited("tokenizer_config.json", bos_token="\ud800")),
        "tokenizer_config.json holds half a character",
    ),
    "an error that quotes the file": (
        tokenizer(added_tokens="x" * 100_000),
        "no tokenizer: .*x[.]{3}",
    ),
    # Errors of the config did not say whose config.
    "too many layers": (config(num_hidden_layers=10**9), "case: config: num_hidden_layers=1000000"),
    "code in the checkpoint": (
        config(architectures=["Evil"], auto_map={"AutoConfig": "evil.Evil"}),
        "case: the architecture 'Evil' is not supported .*code from the checkpoint.*never run",
    ),
    "a tensor with a long name": (
        renamed_tensor("lm_head.weight", "x" * 10_000),
        "model.safetensors: a tensor's name has 10000 characters",
    ),
    "a shard with a long name": (
        Case("", "shards", {INDEX: json.dumps({"weight_map": {"x": "x" * 10_000}}).encode()}),
        r"index.json: tensor 'x' is in 'xxx.*\.\.\., no file of ours",
    ),
    "a template of blocks nested too deeply": (
        template("{% for i in messages %}" * 25 + "{% endfor %}" * 25),
        "case: the chat template is no valid Jinja: too many statically nested blocks",
    ),
    "a template with a number that Python refuses": (
        template("{{ " + "1" * 5000 + " }}"),
        "no valid Jinja: Exceeds the limit",
    ),
    "two names of one tensor": (
        gguf(EMBEDDING | {"model.embed_tokens.weight": EMBEDDING["token_embd.weight"]}),
        "'model.embed_tokens.weight' occurs twice",
    ),
    "an infinite rotary factor": (
        gguf(EMBEDDING | {"rope_freqs.weight": FACTORS}, **{"llama.rope.freq_base": 5e5}),
        "'rope_freqs.weight' does not fit",
    ),
    "a piece that is cut in too many places": (
        gguf(**spm_metadata("a" * 1_000_000)),
        "'tokenizer.ggml.tokens' must be at most 256 long",
    ),
    "a key with a long name": (gguf(**{"x" * 1000: 1}), "name in its header has 1000 characters"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name, tmp_path):
    case, message = FOUND[name]
    case = case if isinstance(case, Case) else case(tmp_path)
    assert_matches(message, play(case, tmp_path / "case"))


def test_a_token_id_below_zero(tmp_path):
    """It was looked up from the end of the vocabulary, or past its beginning."""
    data = bytearray(bases()["gguf"][GGUF_FILE])
    name = "tokenizer.ggml.eos_token_id"
    (place,) = [field for field in gguf_fields(data) if field.name == name]
    struct.pack_into("<Ii", data, place.offset - 4, 5, -len(BYTE_TOKENS) - 1)  # 5: int32
    outcome = play(Case("", "gguf", {GGUF_FILE: bytes(data)}, stages=("text",)), tmp_path / "case")
    assert_matches("eos_token_id is not made of token ids", outcome)


def test_arrays_that_are_mostly_air(tmp_path):
    """A sparse file holds as many values as it says, and each took 16 bytes."""
    path = tmp_path / "sparse.gguf"
    count = 100_000_000
    path.write_bytes(struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"x", 9, 0, count))
    os.truncate(path, path.stat().st_size + count)
    before = peak_bytes()
    with pytest.raises(CheckpointError, match="'x' its arrays have 100000000 values"):
        read_gguf_header(path)
    assert peak_bytes() - before < 2**27


def test_a_template_that_writes_much(tmp_path):
    """A token takes 200 bytes in the library: 16 million of them ended the process."""
    source = "{% for i in range(4000) %}{{ 'x' * 4000 }}{% endfor %}"
    assert_matches("rendered conversation is too long", play(template(source), tmp_path / "case"))


@pytest.mark.parametrize("source", ATTACKS, ids=range(len(ATTACKS)))
def test_hostile_templates_cost_little(source, tmp_path, monkeypatch):
    """Many of these ran for ever, or took all memory: while compiling, while rendering, or both."""
    monkeypatch.setattr(template_budget, "MAX_CPU_S", 0.2)
    assert_matches("RequestError|CheckpointError|worked", play(template(source), tmp_path / "case"))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 900}, {"vocab_size": 2**21}, {"hidden_size": 2**12}],
    ids=str,
)
def test_nothing_is_allocated_for_a_config_that_the_weights_do_not_bear_out(
    changes, tmp_path, monkeypatch
):
    """The model was made first, with all its memory, and only then held against the file."""
    monkeypatch.setattr(build, "create_model", None)
    outcome = play(Case("", "directory", edited("config.json", **changes)), tmp_path / "case")
    assert_matches("CheckpointError: .*case: (missing tensors|tensor '.*' has shape)", outcome)


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_deep_json(depth, tmp_path):
    """The limit is ours, whatever is left of the stack of whoever reads or shows the value."""
    deep = json.loads("[" * depth + "]" * depth)
    assert_matches("config.json is nested more than 64", play(config(x=deep), tmp_path / "case"))


def test_sound_templates_pay_little():
    messages = [{"role": "user", "content": "x" * 1000}] * 4000
    text = ChatTemplate(CHATML, {}).render(
        messages, add_generation_prompt=True, template_arguments={}
    )
    assert text.count("x") == 4_000_000


def assert_matches(pattern, outcome):
    assert re.search(pattern, outcome), outcome
