"""`skip_tokenizer_init`: ids in, ids out, from a directory that holds nothing but config.json."""

import json

import pytest

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions
from octavo.engine import AsyncEngine, EngineProcess
from octavo.errors import CheckpointError, RequestError
from octavo.testing.tiny_llama import TINY_CONFIG
from octavo.text import NoTokenizer

OPTIONS = {"load_format": "dummy", "kv_cache_memory_bytes": 2**22, "device": "cpu"}
OUTPUT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, skip_tokenizer_init=True, **OPTIONS)


def test_without_the_option_a_tokenizer_is_missed(model):
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        LLM(model, **OPTIONS)


@pytest.mark.parametrize("prompt", [PROMPT, {"prompt_token_ids": PROMPT}])
def test_answers_have_ids_and_no_text(llm, prompt):
    answer = llm.generate(prompt, OUTPUT, use_tqdm=False)[0].outputs[0]
    assert len(answer.token_ids) == 5 and answer.text == ""
    assert answer.finish_reason == "length"


def test_a_stream_has_a_piece_for_each_token(llm):
    deltas = list(llm.stream(PROMPT, OUTPUT))
    assert [len(delta.token_ids) for delta in deltas] == [1] * 5


@pytest.mark.parametrize("prompt", ["text", {"prompt": "text"}, ["text", "more"]])
def test_a_text_prompt_is_refused(llm, prompt):
    with pytest.raises(RequestError, match="prompt must be given as token ids") as refusal:
        llm.generate(prompt, OUTPUT, use_tqdm=False)
    assert refusal.value.param == "prompt"


def test_a_conversation_is_refused(llm):
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hello"}], OUTPUT, use_tqdm=False)


def test_stop_strings_are_refused_and_stop_ids_are_not(llm):
    with pytest.raises(RequestError, match="stop strings need a tokenizer") as refusal:
        llm.generate(PROMPT, SamplingParams(stop="x"), use_tqdm=False)
    assert refusal.value.param == "stop"
    ids = llm.generate(PROMPT, OUTPUT, use_tqdm=False)[0].outputs[0].token_ids
    stopping = SamplingParams(temperature=0, max_tokens=5, stop_token_ids=[ids[2]])
    answer = llm.generate(PROMPT, stopping, use_tqdm=False)[0].outputs[0]
    assert answer.stop_reason == ids[2]


def test_logprobs_are_by_id(llm):
    sampling = SamplingParams(temperature=0, max_tokens=2, logprobs=1, ignore_eos=True)
    answer = llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs[0]
    assert len(answer.logprobs) == 2


@pytest.mark.server
async def test_the_asynchronous_engine_needs_no_tokenizer_either(model):
    options = EngineOptions.from_flat(model, OPTIONS | {"skip_tokenizer_init": True})
    engine = AsyncEngine(EngineProcess(options), NoTokenizer(), model_name="x")
    await engine.start()
    try:
        assert not engine.model.has_text
        deltas = [delta async for delta in engine.generate("a", PROMPT, OUTPUT)]
        assert [(delta.text, len(delta.token_ids)) for delta in deltas] == [("", 1)] * 5
        with pytest.raises(RequestError, match="stop strings"):
            await anext(engine.generate("b", PROMPT, SamplingParams(stop="x")))
    finally:
        await engine.stop()
