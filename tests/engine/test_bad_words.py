"""Words that must not be generated: their last token is not drawn where it would complete them."""

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import RequestError
from octavo.testing.byte_tokenizer import ByteTokenizer
from octavo.testing.tiny_llama import write_tiny_llama
from octavo.text.bad_words import banned_sequences

PROMPTS = ["One", "Two of them", "Three"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "m")
    llm = LLM(str(model), dtype="float32", kv_cache_memory_bytes=2**24, check_integrity=True)
    yield llm
    llm.close()


def ids_of(llm, prompts=PROMPTS, **fields):
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **fields)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def has(ids, sequence):
    return any(ids[i : i + len(sequence)] == sequence for i in range(len(ids)))


def test_a_word_is_banned_alone_and_behind_a_space():
    byte = ByteTokenizer()
    assert set(banned_sequences(["ab", " ab", "c"], byte)) == {
        (97, 98), (32, 97, 98), (99,), (32, 99),
    }  # fmt: skip


def test_banned_words_do_not_come(llm):
    tokenizer = llm.get_tokenizer()
    before = ids_of(llm)
    plain = [ids for ids in before[0] if 32 < ids < 127 or ids < 94]
    pairs = [before[0][i : i + 2] for i in range(58)]
    # A word of one token, and a pair that was written, where both are letters.
    letters = [i for i in plain if tokenizer.decode([i]).isalnum()]
    words = [tokenizer.decode([letters[0]])]
    pair = next(p for p in pairs if tokenizer.decode(p).isalnum() and letters[0] not in p)
    words.append(tokenizer.decode(pair))
    after = ids_of(llm, bad_words=words)
    for ids in after:
        assert not has(ids, [letters[0]]) and not has(ids, pair)
    assert after != before
    alone = [ids_of(llm, [prompt], bad_words=words)[0] for prompt in PROMPTS]
    assert alone == after, "whoever is beside it"
    assert ids_of(llm, bad_words=[]) == before


@pytest.mark.parametrize(
    "wrong",
    ["ab", [""], [" "], [3], ["a" * 2000], ["a"] * 2000, [["a"]]],
    ids=lambda w: str(w)[:20],
)
def test_wrong_words_are_refused(wrong):
    with pytest.raises(RequestError, match="bad") as caught:
        SamplingParams(bad_words=wrong)
    assert caught.value.param == "bad_words"
