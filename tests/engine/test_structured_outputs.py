"""Answers in a shape, by a model that knows nothing: valid whatever it would like to say."""

import json
import re

import jsonschema
import pytest
from text.schemas import random_schemas

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.errors import RequestError
from octavo.testing.tiny_llama import write_tiny_llama

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def in_shape(seed=0, temperature=1.0, max_tokens=1500, **shape):
    params = StructuredOutputsParams(**shape)
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=params
    )


def create(directory, **options):
    defaults = {"max_model_len": 2000, "kv_cache_memory_bytes": 2**24}
    defaults |= {"check_integrity": True}
    return LLM(str(directory), dtype="float32", **defaults | options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "m", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def llm(model):
    llm = create(model)
    yield llm
    llm.close()


def answers(llm, prompts, sampling):
    return [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]


def test_two_hundred_schemas_in_one_batch_with_preemptions(model):
    schemas = random_schemas(200, seed=1)
    sampling = [
        in_shape(seed=i, json=schema, disable_any_whitespace=bool(i % 2))
        for i, schema in enumerate(schemas)
    ]
    llm = create(model, kv_cache_memory_bytes=3 * 2**19, max_num_seqs=100, check_integrity=False)
    found = answers(llm, [f"Document {i}:" for i in range(200)], sampling)
    for schema, answer in zip(schemas, found, strict=True):
        assert answer.finish_reason == "stop", answer.text[:300]
        jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(
            json.loads(answer.text)
        )
    assert llm.stats().num_preemptions > 0
    llm.close()


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_text_does_not_depend_on_its_company_or_on_the_loop(model, llm, is_ahead):
    sampling = [
        in_shape(seed=i, json=PERSON)
        if i % 2
        else SamplingParams(seed=i, max_tokens=40, logprobs=2)
        for i in range(8)
    ]
    prompts = [f"Person {i}: " for i in range(8)]
    other = create(model, async_scheduling=is_ahead)
    together = [answer.token_ids for answer in answers(other, prompts, sampling)]
    other.close()
    for i in range(8):
        [alone] = answers(llm, [prompts[i]], sampling[i])
        assert alone.token_ids == together[i]
        if i % 2:
            jsonschema.validate(json.loads(alone.text), PERSON)


def test_other_shapes_and_several_answers(llm):
    shape = StructuredOutputsParams(regex=r"\d{3}-[a-f]{2,9}!")
    [output] = llm.generate(
        ["Code: "], SamplingParams(n=3, seed=1, structured_outputs=shape), use_tqdm=False
    )
    texts = {answer.text for answer in output.outputs}
    assert len(texts) > 1 and all(re.fullmatch(r"\d{3}-[a-f]{2,9}!", text) for text in texts)
    [thought] = answers(llm, ["Think."], in_shape(choice=["Paris", "Rome"], after="x"))
    assert re.fullmatch(r"(?s)[^x]*x[ \n]*(Paris|Rome)", thought.text)
    [penalised] = answers(
        llm,
        ["List: "],
        SamplingParams(
            seed=3,
            max_tokens=400,
            frequency_penalty=1.5,
            logit_bias={ord("b"): 5},
            structured_outputs=StructuredOutputsParams(regex="[a-c]{30}"),
        ),
    )
    assert re.fullmatch("[a-c]{30}", penalised.text)


def test_an_answer_that_is_cut_says_so(llm):
    [answer] = answers(llm, ["x"], in_shape(json={"enum": ["a" * 100]}, max_tokens=7))
    assert answer.finish_reason == "length" and answer.text.lstrip().startswith('"aa')


def test_what_contradicts_a_shape_is_refused(llm):
    for wrong in ({"ignore_eos": True}, {"min_tokens": 3}, {"allowed_token_ids": [1]}):
        with pytest.raises(RequestError, match="structured_outputs"):
            SamplingParams(structured_outputs=StructuredOutputsParams(json=PERSON), **wrong)
    with pytest.raises(RequestError, match="invalid"):
        answers(llm, ["a"], in_shape(json={"type": "nope"}))


def test_shapes_need_a_tokenizer_and_an_end(model, tmp_path):
    llm = create(model, skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        answers(llm, [{"prompt_token_ids": [1]}], in_shape(json=PERSON))
    llm.close()
    endless = create(write_tiny_llama(tmp_path / "m", eos_token_id=None), max_model_len=512)
    with pytest.raises(RequestError, match="end-of-sequence"):
        answers(endless, ["a"], in_shape(json=PERSON, max_tokens=100))
    endless.close()
