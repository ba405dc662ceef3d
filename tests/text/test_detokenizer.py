"""The incremental detokenizer: pieces add up to the whole, and are whole characters."""

import time
from dataclasses import dataclass, field

import pytest
from checkpoint_files import BYTE_TOKENS, byte_level_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders

from octavo.text import IncrementalDetokenizer
from octavo.text.tokenizer import LibraryTokenizer

LIBRARY = byte_level_tokenizer()
TOKENIZER = LibraryTokenizer(LIBRARY, source="test")
any_ids = st.lists(st.integers(0, len(BYTE_TOKENS) + 3), max_size=40)


@dataclass
class Pieces:
    """A tokenizer whose tokens are given as bytes; the last id is special."""

    tokens: list[bytes]
    strips_leading_space: bool = False
    special_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self):
        self.special_token_ids = frozenset({len(self.tokens) - 1})

    def token_bytes(self, token_id):
        return self.tokens[token_id]


def push_each(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [detokenizer.push([i]) for i in ids] + [detokenizer.flush()]


@given(ids=any_ids, cuts=st.lists(st.integers(0, 40), max_size=5), skip=st.booleans())
def test_pieces_add_up_to_decode(ids, cuts, skip):
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip)
    bounds = [0, *sorted(cuts), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + detokenizer.flush() == whole


@given(ids=any_ids, skip=st.booleans())
def test_decode_is_the_librarys(ids, skip):
    known = [i for i in ids if i < len(BYTE_TOKENS)]
    theirs = LIBRARY.decode(known, skip_special_tokens=skip)
    assert TOKENIZER.decode(known, skip_special_tokens=skip) == theirs


@given(text=st.text(max_size=30))
@example("e\u0301 🤦🏽‍♂️ 👩‍👩‍👧‍👦 🇩🇪 你好 ด้ \ufffd")
def test_no_piece_holds_half_a_character(text):
    pieces = push_each(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte():
    ids = TOKENIZER.encode("é🙂")
    assert push_each(TOKENIZER, ids) == ["", "é", "", "", "", "🙂", ""]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([b"\xff", b"a"], ["\ufffd", "a", ""]),  # can never be completed: shown at once
        ([b"\xf0\x9f", b"a"], ["", "\ufffda", ""]),  # broken off by the next token
        ([b"\xf0\x9f"], ["", "\ufffd"]),  # broken off by the end
        ([b"\x80\x80"], ["\ufffd\ufffd", ""]),
        ([b"a\xe4", b"\xbd", b"\xa0b"], ["a", "", "你b", ""]),
    ],
)
def test_bytes_that_are_not_utf8(tokens, pieces):
    assert push_each(Pieces([*tokens, b""]), range(len(tokens))) == pieces


def test_special_tokens_are_left_out_on_request():
    tokenizer = Pieces([b"a", b"<eos>"])
    assert push_each(tokenizer, [0, 1, 0]) == ["a", "", "a", ""]
    assert push_each(tokenizer, [0, 1], skip_special_tokens=False) == ["a", "<eos>", ""]


def test_the_first_space_of_sentencepiece_is_dropped_once():
    tokenizer = Pieces([b" Hello", b" ", b"world", b""], strips_leading_space=True)
    assert push_each(tokenizer, [3, 0, 1, 2]) == ["", "Hello", " ", "world", ""]
    assert push_each(tokenizer, [1, 0]) == ["", " Hello", ""]
    assert push_each(tokenizer, [2, 0]) == ["world", " Hello", ""]


@given(parts=st.lists(st.binary(max_size=6), max_size=8))
def test_broken_text_is_read_as_the_library_reads_it(parts):
    """Both replace each maximal broken stretch by one U+FFFD, however the tokens cut it."""
    alphabet = {byte: char for char, byte in alphabet_of_gpt2().items()}
    tokens = ["".join(alphabet[byte] for byte in part) for part in parts]
    pieces = push_each(Pieces([*parts, b""]), range(len(parts)))
    assert "".join(pieces) == decoders.ByteLevel().decode(tokens)


def alphabet_of_gpt2():
    return {token: TOKENIZER.token_bytes(i)[0] for i, token in enumerate(BYTE_TOKENS[3:259], 3)}


def test_the_cost_of_a_token_does_not_grow():
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    ids = TOKENIZER.encode("hello world, 你好 " * 4000)
    start = time.perf_counter()
    for token_id in ids:
        detokenizer.push((token_id,))
    assert (time.perf_counter() - start) / len(ids) < 20e-6
