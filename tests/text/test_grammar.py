"""Shapes of answers: what random draws within them make, what is refused, what it may cost."""

import ctypes
import json
import random
import re
import time

import jsonschema
import pytest
from text.schemas import random_schemas

from octavo.core import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.testing.byte_tokenizer import EOS, ByteTokenizer
from octavo.text.grammar import MAX_KEPT, TokenGrammars, check_grammar

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
VOCAB_SIZE = 300  # more than the tokenizer has, as of padded embeddings


class Thinker(ByteTokenizer):
    """Has a token that no text spells."""

    vocab_size = 259
    special_token_ids = frozenset({*ByteTokenizer.special_token_ids, 258})

    def token_bytes(self, token_id):
        return b"</think>" if token_id == 258 else super().token_bytes(token_id)


@pytest.fixture
def grammars():
    made = TokenGrammars(ByteTokenizer, eos_token_ids=[EOS, 256], vocab_size=VOCAB_SIZE)
    yield made
    made.close()


def allowed(matcher):
    mask = (ctypes.c_uint8 * 40)()
    matcher.write_mask(ctypes.addressof(mask), 40)
    return [i for i in range(320) if mask[i // 8] >> i % 8 & 1]


def drawn(matcher, rng, most=4000):
    """A random answer: any token that may follow, ends first where there is a choice of one."""
    data = bytearray()
    for _ in range(most):
        assert not matcher.error
        ids = allowed(matcher)
        assert ids and max(ids) < 258, "beyond the tokenizer's ids nothing may follow"
        if EOS in ids and rng.random() < 0.5:
            matcher.accept([EOS])
            return data.decode()
        plain = [i for i in ids if i < 256]
        if not plain:
            return data.decode()
        data.append(rng.choice(plain))
        matcher.accept(data[-1:])
    raise AssertionError(f"no end: {bytes(data)[:200]!r}")


def test_random_answers_satisfy_two_hundred_schemas(grammars):
    rng = random.Random(0)
    for schema in random_schemas(200):
        params = StructuredOutputsParams(json=schema, disable_any_whitespace=rng.random() < 0.5)
        check_grammar(params)
        answer = json.loads(drawn(grammars.matcher(params), rng))
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.FormatChecker()
        )
        validator.validate(answer)


def test_other_shapes(grammars):
    rng = random.Random(1)

    def several(**shape):
        params = StructuredOutputsParams(**shape)
        check_grammar(params)
        return {drawn(grammars.matcher(params), rng) for _ in range(30)}

    assert several(choice=["a", 'b "c"\n', "é"]) == {"a", 'b "c"\n', "é"}
    for text in several(regex=r"\d{2,4}/(x|y+)\n?"):
        assert re.fullmatch(r"[0-9]{2,4}/(x|y+)\n?", text)
    for text in several(regex="a\nb?"):
        assert text in ("a\n", "a\nb")
    for text in several(grammar='start: "(" start? ")"'):
        assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2)
    gbnf = 'root ::= "yes" | "no" " " root'
    assert all(re.fullmatch("(no )*yes", text) for text in several(grammar=gbnf))
    tight = several(json={"enum": [[1, 2]]}, disable_any_whitespace=True)
    assert tight == {"[1,2]"}
    empty = {"type": "object", "maxProperties": 0}
    assert all(json.loads(text) == {} for text in several(json=json.dumps(empty)))
    matcher = grammars.matcher(StructuredOutputsParams(json_object=True))
    assert set(map(chr, allowed(matcher))) <= set("{ \n\t\r")


def test_any_end_of_sequence_ends_an_answer_that_is_whole(grammars):
    matcher = grammars.matcher(StructuredOutputsParams(regex="ab?"))
    assert allowed(matcher) == [ord("a")]
    matcher.accept(b"a")
    copy = matcher.copy()
    assert allowed(matcher) == [ord("b"), 256, EOS]
    copy.accept(b"b")
    assert allowed(copy) == [256, EOS]
    assert allowed(matcher) == [ord("b"), 256, EOS], "a copy goes its own way"
    copy.accept(b"c")
    assert "cannot go on" in copy.error and not matcher.error


def test_a_shape_may_begin_behind_a_marker():
    shape = StructuredOutputsParams(json={"enum": [{"a": 1}]}, after="</think>")
    check_grammar(shape)
    for tokenizer, marker in ((ByteTokenizer, list(b"</think>")), (Thinker, [258])):
        grammars = TokenGrammars(tokenizer, eos_token_ids=[EOS], vocab_size=VOCAB_SIZE)
        matcher = grammars.matcher(shape)
        matcher.accept(b'Hm. {"a": 2}? </thin')
        assert len(allowed(matcher)) > 100 and EOS not in allowed(matcher)
        matcher.accept([*b" ", *marker, *b"\n\n"])
        assert set(map(chr, allowed(matcher))) <= set("{ \n")
        matcher.accept(b'{"a":1}')
        assert EOS in allowed(matcher)
        grammars.close()


def deep(count):
    schema = {"type": "string"}
    for _ in range(count):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"regex": "["}, "invalid"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "(" * 60_000 + ")" * 60_000}, "too complex"),
        ({"json": {"type": "nope"}}, "nope"),
        ({"json": {"$ref": "#/nope"}}, "/nope"),
        ({"json": {"$ref": "#"}}, "no text satisfies it"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "number"}]}}, "Unsatisfiable"),
        ({"json": {"type": "string", "pattern": "["}}, "invalid"),
        ({"json": "{"}, "invalid"),
        ({"json": deep(300)}, "too complex"),
        ({"grammar": "start: nope"}, "nope"),
        ({"grammar": "x"}, "invalid"),
        ({"grammar": "start: start start"}, "no text satisfies it"),
        ({"json": {"not": {}}}, "not"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused(shape, reason):
    with pytest.raises(RequestError, match="the shape of the answer is") as caught:
        check_grammar(StructuredOutputsParams(**shape))
    assert reason in str(caught.value) and caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400
    is_complex = "too complex" in str(caught.value)
    assert caught.value.code == ("grammar_too_complex" if is_complex else "invalid_grammar")


@pytest.mark.parametrize(
    "regex", ["(a+)+$", ".{1,99999}", "(x+x+)+y", "(?:a?){30}a{30}", "(.*){1,300}x.{1,200}"]
)
def test_backtracking_costs_nothing(grammars, regex):
    """Evil for engines that try one way after the other (CWE-1333)."""
    params = StructuredOutputsParams(regex=regex)
    check_grammar(params)
    matcher = grammars.matcher(params)
    matcher.accept(b"a" * 30 if regex[0] != "(" or "a" in regex else b"x" * 30)
    assert not matcher.error and allowed(matcher)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"regex": 3}, "regex must be a string"),
        ({"json": [1]}, "JSON schema"),
        ({"json": {"a": object()}}, "not JSON"),
        ({"choice": []}, "1 to"),
        ({"choice": "ab"}, "list of strings"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": ["a"], "after": ""}, "after"),
        ({"regex": "a" * 300_000}, "at most"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_parameters(fields, words):
    with pytest.raises(RequestError, match=words):
        StructuredOutputsParams(**fields)


def test_what_is_kept_is_bounded_and_compiled_in_other_threads(grammars):
    shapes = [StructuredOutputsParams(choice=[str(i)]) for i in range(MAX_KEPT + 9)]
    for shape in shapes:
        grammars.matcher(shape)
    assert len(grammars._compiled) == MAX_KEPT
    made = grammars._compiled[shapes[-1].key].future
    grammars.matcher(shapes[-1])
    assert grammars._compiled[shapes[-1].key].future is made


def test_more_may_wait_than_are_kept(grammars):
    """Or each that is asked for would push out another one, which then is asked for."""
    shapes = [StructuredOutputsParams(choice=[str(i)]) for i in range(3 * MAX_KEPT)]
    waiting = list(shapes)
    for _ in range(2000):
        waiting = [shape for shape in waiting if not grammars.is_ready(shape)]
        if not waiting:
            break
        time.sleep(0.005)
    assert not waiting
    for shape in shapes:
        assert allowed(grammars.matcher(shape))
    grammars.is_ready(StructuredOutputsParams(choice=["last"]))
    assert len(grammars._compiled) == MAX_KEPT
