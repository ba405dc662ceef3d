"""Loading tokenizers from directories and GGUF files, and refusing what is no tokenizer."""

import json

import numpy as np
import pytest
import tokenizers
from checkpoint_files import (
    BYTE_TOKENS,
    GGUF_METADATA,
    MERGES,
    SPECIALS,
    byte_level_metadata,
    byte_level_tokenizer,
    write_directory,
    write_gguf,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from octavo.config import Checkpoint, locate
from octavo.errors import CheckpointError, ModelError, UnsupportedModelError
from octavo.text import load_tokenizer

EMBEDDING = {"token_embd.weight": np.zeros((4, 32), np.float32)}
HI = [{"role": "user", "content": "hello"}]
SAMPLES = ["hello world", "  12 345", "It's 你好🙂\n\n\tx  ", "", " ", "HELLO'LL", "a  b"]


def from_gguf(folder, metadata):
    path = write_gguf(folder / "tokenizer.gguf", GGUF_METADATA | metadata, EMBEDDING)
    return load_tokenizer(Checkpoint("x", path, "gguf"))


# --- directories ----------------------------------------------------------------------------------


def test_directory(tmp_path):
    folder = write_directory(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    tokenizer = load_tokenizer(locate(str(folder)))
    assert tokenizer.vocab_size == len(BYTE_TOKENS)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (7, 2)  # of generation_config and of tokenizer_config
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert not tokenizer.strips_leading_space
    for text in SAMPLES:
        assert tokenizer.encode(text) == byte_level_tokenizer().encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template(HI) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_truncation_and_padding_of_training_are_off(tmp_path):
    folder = write_directory(tmp_path / "model")
    library = byte_level_tokenizer()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(locate(str(folder)))
    assert len(tokenizer.encode("abcdefghijkl")) == 12
    assert len(tokenizer.encode("ab")) == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_file(tmp_path, content):
    folder = write_directory(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(locate(str(folder)))


def test_other_kinds_are_refused_by_name(tmp_path):
    folder = write_directory(tmp_path / "model")
    library = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        load_tokenizer(locate(str(folder)))
    library = byte_level_tokenizer()
    library.decoder = decoders.Metaspace()
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="decoder"):
        load_tokenizer(locate(str(folder)))


def test_broken_template_stops_the_start(tmp_path):
    folder = write_directory(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat template"):
        load_tokenizer(locate(str(folder)))


# --- GGUF, byte-level -----------------------------------------------------------------------------


def test_byte_level(tmp_path):
    tokenizer = from_gguf(tmp_path, byte_level_metadata())
    reference = byte_level_tokenizer()
    for text in SAMPLES:
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.encode_chat(HI).count(1) == 2


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "  12", ["Ġ", "Ġ", "1", "2"]),
        ("gpt-2", "  12", ["Ġ", "Ġ", "1", "2"]),
        # Digits are cut off first, so both spaces stay together.
        ("smollm", "  12", ["ĠĠ", "1", "2"]),
        ("llama-bpe", "hello world", ["hello", "Ġwo", "r", "l", "d"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # NFC
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_pre_tokenizers(tmp_path, pre, text, pieces):
    metadata = byte_level_metadata(**{"ggml.pre": pre, "ggml.add_bos_token": False})
    ids = from_gguf(tmp_path, metadata).encode(text)
    assert [BYTE_TOKENS[i] for i in ids] == pieces


def test_llama3_takes_whole_pieces_that_are_tokens(tmp_path):
    tokens = [*BYTE_TOKENS, "cat"]  # no merges lead there
    changes = {"ggml.tokens": tokens, "ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3)}
    llama3 = from_gguf(tmp_path, byte_level_metadata(**changes, **{"ggml.pre": "llama-bpe"}))
    assert llama3.encode("cat") == [1, len(tokens) - 1]  # and begins with BOS unless told not to
    assert llama3.encode("cat", add_special_tokens=False) == [len(tokens) - 1]
    smollm = from_gguf(tmp_path, byte_level_metadata(**changes))
    assert len(smollm.encode("cat")) == 3


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_begin_and_end_tokens(tmp_path, bos, eos):
    flags = {"ggml.add_bos_token": bos, "ggml.add_eos_token": eos}
    tokenizer = from_gguf(tmp_path, byte_level_metadata(**flags))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1] * bool(bos) + plain + [2] * bool(eos)
    # The template writes its own: no second BOS.
    assert tokenizer.encode_chat(HI)[:1] == [1]
    assert tokenizer.encode_chat(HI)[1] != 1


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    tokens = [*BYTE_TOKENS, "<think>"]
    kinds = [3, 3, 3] + [1] * (len(BYTE_TOKENS) - 3) + [4]
    changes = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    tokenizer = from_gguf(tmp_path, byte_level_metadata(**changes))
    assert tokenizer.encode("<think>") == [len(tokens) - 1]
    assert tokenizer.decode([len(tokens) - 1]) == "<think>"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ggml.model": "bert"}, UnsupportedModelError, "'bert'.*supported: gpt2, llama"),
        ({"ggml.model": None}, UnsupportedModelError, "''"),
        ({"ggml.model": 1}, CheckpointError, "ggml.model.*a string"),
        ({"ggml.pre": "tekken"}, UnsupportedModelError, "'tekken'.*supported: default, gpt-2"),
        ({"ggml.tokens": None}, CheckpointError, "ggml.tokens"),
        ({"ggml.tokens": [1, 2]}, CheckpointError, "ggml.tokens"),
        ({"ggml.tokens": ["a", "a"]}, CheckpointError, "ggml.token"),
        ({"ggml.token_type": [1, 2]}, CheckpointError, "a list of .* numbers"),
        ({"ggml.merges": None}, CheckpointError, "ggml.merges"),
        ({"ggml.merges": ["h"]}, CheckpointError, "damaged vocabulary"),
        ({"ggml.merges": ["nope nope"]}, CheckpointError, "damaged vocabulary"),
        ({"ggml.add_bos_token": 1}, CheckpointError, "true or false"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": 10**6}, CheckpointError, "bos_token_id"),
        ({"chat_template": 5}, CheckpointError, "no string"),
    ],
)
def test_damaged_vocabularies(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        from_gguf(tmp_path, byte_level_metadata(**changes))


def test_duplicate_tokens(tmp_path):
    tokens = [*BYTE_TOKENS[:-1], BYTE_TOKENS[0]]
    with pytest.raises(ModelError, match="duplicates"):
        from_gguf(tmp_path, byte_level_metadata(**{"ggml.tokens": tokens}))


def test_vocabulary_without_types_has_no_special_tokens(tmp_path):
    tokenizer = from_gguf(tmp_path, byte_level_metadata(**{"ggml.token_type": None}))
    assert tokenizer.special_token_ids == frozenset()
    assert len(MERGES) + 256 + len(SPECIALS) == tokenizer.vocab_size


# --- GGUF, SentencePiece --------------------------------------------------------------------------

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "cc", "▁▁", "<0x41>x"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SCORES = [0.0] * 259 + [-9.0, -9.5, -9.6, -9.7, -1.0, -3.0, -2.0, -4.0, -5.0, -6.0, -7.0, -8.0]


def spm_metadata(**changes):
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM_TOKENS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spm_reference(text, prefix="▁"):
    """SentencePiece's own rule: join the neighbours with the best score until none can be."""
    symbols = list((prefix + text).replace(" ", "▁"))
    scores = {piece: SCORES[i] for i, piece in enumerate(SPM_TOKENS) if i >= 259}
    while True:
        joins = [
            (scores[a + b], -i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in scores
        ]
        if not joins:
            break
        i = -max(joins)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        if symbol in scores:
            ids.append(SPM_TOKENS.index(symbol))
        else:
            ids += [3 + byte for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return from_gguf(tmp_path_factory.mktemp("spm"), spm_metadata())


@given(text=st.text(alphabet="abc d\u00e9🙂", min_size=1, max_size=15))
def test_sentencepiece_encodes_by_score(spm, text):
    assert spm.encode(text) == [1, *spm_reference(text)]
    assert spm.decode(spm.encode(text)) == text


def test_sentencepiece_properties(spm):
    assert spm.strips_leading_space
    assert spm.special_token_ids == {0, 1, 2}
    assert spm.token_bytes(SPM_TOKENS.index("▁ab")) == b" ab"
    assert spm.token_bytes(3 + 0x41) == b"A"
    assert spm.token_bytes(SPM_TOKENS.index("<0x41>x")) == b"<0x41>x"


def test_sentencepiece_text_that_spells_control_tokens(spm):
    ids = spm.encode("a </s><s> b")
    assert ids.count(1) == 1
    assert 2 not in ids
    assert spm.decode(ids) == "a </s><s> b"


def test_sentencepiece_without_the_first_space(tmp_path):
    tokenizer = from_gguf(tmp_path, spm_metadata(add_space_prefix=False, add_bos_token=False))
    assert not tokenizer.strips_leading_space
    for text in ("abc", " abc", "a  b"):
        assert tokenizer.encode(text) == spm_reference(text, prefix="")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_scores(tmp_path):
    with pytest.raises(CheckpointError, match="scores"):
        from_gguf(tmp_path, spm_metadata(scores=None))


def test_unigram_as_xlm_roberta_has_it(tmp_path):
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁a", -1.0), ("▁b", -1.5), ("c", -2.0), ("▁", -3.0), ("<", -4.0), ("s", -4.5)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    folder = write_directory(tmp_path / "model")
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(locate(str(folder)))
    assert tokenizer.encode("ac b") == [0, 4, 6, 5, 2]
    assert tokenizer.decode([0, 4, 6, 5, 2]) == "ac b"
    assert 0 not in tokenizer.encode("<s>")[1:]  # a text that spells a control token has none
    pair = tokenizer.encode_pair("ac", "b")
    assert pair.token_ids == [0, 4, 6, 2, 2, 5, 2]
    assert set(pair.type_ids) == {0}
    assert pair.with_types(1000, 1) == pair.token_ids
    assert list(pair.cut_to(6).token_ids) == [0, 4, 2, 2, 5, 2]
