"""The engine in a process of its own: streams, aborts, stop strings, and its death."""

import asyncio
import os
import signal

import numpy as np
import pytest

from octavo import LLM
from octavo.config import EngineOptions, locate
from octavo.core import NO_TOKENS, FinishReason, PoolingParams, SamplingParams
from octavo.engine import AsyncEngine, EngineProcess, Phase
from octavo.errors import (
    ContextLengthError,
    EngineDeadError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
)
from octavo.testing.tiny_llama import write_tiny_llama
from octavo.text import load_tokenizer

pytestmark = pytest.mark.server

PROMPT = [(31 * i) % 256 for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
async def engine(model):
    engine = create_engine(model)
    await engine.start()
    yield engine
    await engine.stop()


def create_engine(model, **limits):
    options = EngineOptions.from_flat(
        model, {"kv_cache_memory_bytes": 2**23, "device": "cpu", "num_threads": 1}
    )
    tokenizer = load_tokenizer(locate(model))
    return AsyncEngine(EngineProcess(options), tokenizer, model_name="tiny", **limits)


async def collect(engine, request_id, prompt=PROMPT, **sampling):
    params = SamplingParams(**({"temperature": 0, "ignore_eos": True} | sampling))
    return [delta async for delta in engine.generate(request_id, prompt, params)]


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_streams_carry_the_tokens_and_text_of_the_offline_engine(engine, model):
    prompts = [PROMPT[: 3 + i] for i in range(12)]
    streams = await asyncio.gather(
        *(collect(engine, f"r{i}", p, max_tokens=20) for i, p in enumerate(prompts))
    )
    llm = LLM(model, kv_cache_memory_bytes=2**23, device="cpu")
    expected = llm.generate(
        prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=20), use_tqdm=False
    )
    for deltas, output in zip(streams, expected, strict=True):
        assert [t for d in deltas for t in d.token_ids] == output.outputs[0].token_ids
        assert "".join(d.text for d in deltas) == output.outputs[0].text
        assert [d.finish_reason for d in deltas if d.finish_reason] == [FinishReason.LENGTH]
    await until(lambda: engine.stats().num_free_blocks == engine.stats().num_blocks)


async def test_scores_and_vectors_are_those_of_the_offline_engine(engine, model):
    llm = LLM(model, kv_cache_memory_bytes=2**23, device="cpu")
    [embedded] = llm.embed(PROMPT, "mean", use_tqdm=False)
    pooling = PoolingParams(pooling="mean")
    stream = engine.generate("e", PROMPT, NO_TOKENS, pooling=pooling)
    [delta] = [delta async for delta in stream]
    assert (delta.finish_reason, delta.token_ids) == (FinishReason.STOP, ())
    vector = np.frombuffer(delta.vector, np.float32)
    np.testing.assert_allclose(vector, embedded.outputs.embedding, rtol=0, atol=1e-6)
    scored = SamplingParams(temperature=0, max_tokens=2, n=2, seed=1, prompt_logprobs=1)
    [output] = llm.generate(PROMPT, scored, use_tqdm=False)
    deltas = [delta async for delta in engine.generate("s", PROMPT, scored)]
    [scores] = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    expected = [score.logprob for score in output.prompt_logprobs[1:]]
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-5)


async def test_the_first_delta_says_how_the_request_came_there(engine):
    first, *others = await collect(engine, "r", max_tokens=3)
    assert 0 <= first.queue_time_s < 5 and 0 < first.prefill_time_s < 5
    assert [(d.queue_time_s, d.prefill_time_s) for d in others] == [(0, 0)] * 2


async def test_n_answers_come_interleaved_each_with_its_own_end(engine):
    deltas = await collect(engine, "n", temperature=1.0, seed=3, n=3, max_tokens=8)
    ends = [d.index for d in deltas if d.finish_reason is not None]
    assert sorted(ends) == [0, 1, 2]
    texts = {i: tuple(t for d in deltas if d.index == i for t in d.token_ids) for i in range(3)}
    assert len(set(texts.values())) == 3


async def test_a_stop_string_ends_the_answer_and_frees_the_engine(engine):
    full = "".join(d.text for d in await collect(engine, "full", max_tokens=200))
    stop = full[60:63]
    deltas = await collect(engine, "stopped", max_tokens=200, stop=[stop])
    assert "".join(d.text for d in deltas) == full[: full.index(stop)]
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].stop_reason == stop
    await until(lambda: engine.stats().num_free_blocks == engine.stats().num_blocks)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize("num_read", [0, 1, 5])
async def test_closing_a_stream_early_frees_its_blocks(engine, num_read):
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=400, n=2)
    stream = engine.generate("closed", PROMPT, params)
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for _ in range(num_read):
        await task
        task = asyncio.ensure_future(anext(stream))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stream.aclose()
    done = await collect(engine, "after", max_tokens=3)
    assert sum(len(d.token_ids) for d in done) == 3
    await until(lambda: engine.stats().num_running == 0)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


async def test_questions_are_answered_while_requests_run(engine):
    running = asyncio.create_task(collect(engine, "long", max_tokens=200))
    await until(lambda: engine.stats().num_running == 1)
    stories, [status], *more = await asyncio.gather(
        engine.operations.why("long"),
        engine.operations.requests(),
        engine.operations.why("long"),
        engine.operations.why("nobody"),
    )
    assert list(stories) == ["long#0"] and stories["long#0"][-1].startswith("running")
    assert [list(answer) for answer in more] == [["long#0"], []]
    assert (status.request_id, status.status) == ("long#0", "running")
    assert status.num_prompt_tokens == 20 and 0 < status.age_s < 5
    await running
    assert await engine.operations.requests() == []
    assert ("max_num_seqs" in [name for name, *_ in engine.settings]) and engine.settings


async def test_what_was_cached_is_not_found_after_a_reset(engine):
    for expected in (0, 16, 16):
        first, *_ = await collect(engine, "r", max_tokens=3)
        assert first.num_cached_tokens == expected
    running = asyncio.create_task(collect(engine, "long", max_tokens=100))
    await until(lambda: engine.stats().num_running == 1)
    await engine.operations.reset_prefix_cache()
    first, *_ = await collect(engine, "r", max_tokens=3)
    assert first.num_cached_tokens == 0
    deltas = await running
    assert sum(len(delta.token_ids) for delta in deltas) == 100


async def test_wrong_requests_are_refused_before_they_reach_the_engine(engine):
    with pytest.raises(ContextLengthError, match=r"500.*512"):
        await collect(engine, "long", [1] * 500, max_tokens=100)
    with pytest.raises(RequestError, match="vocabulary"):
        await collect(engine, "strange", [301])
    with pytest.raises(RequestError, match="empty"):
        await collect(engine, "empty", [])
    with pytest.raises(RequestError, match="logit_bias"):
        await collect(engine, "bias", logit_bias={301: 1.0})


async def test_beyond_the_queue_requests_are_refused_and_the_others_finish(model):
    engine = create_engine(model, max_num_queued_reqs=1)
    await engine.start()
    try:
        running = [asyncio.create_task(collect(engine, f"r{i}", max_tokens=5)) for i in range(129)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="129"):
            await collect(engine, "too many", max_tokens=5)
        assert all(len(deltas) == 5 for deltas in await asyncio.gather(*running))
    finally:
        await engine.stop()


async def test_a_killed_engine_ends_every_stream_with_an_error_and_shows_as_dead(engine):
    tasks = [asyncio.create_task(collect(engine, f"r{i}", max_tokens=480)) for i in range(4)]
    await until(lambda: engine.stats().num_running == 4)
    os.kill(engine._process.child.pid, signal.SIGKILL)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, EngineDeadError) for r in results), results
    with pytest.raises(EngineDeadError, match=r"signal 9 \(SIGKILL\) in step"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, "late")


async def test_an_engine_that_does_not_answer_is_seen_from_outside(engine, monkeypatch):
    monkeypatch.setattr("octavo.engine.questions.ANSWER_TIMEOUT_S", 0.2)
    assert not engine.is_busy
    child = engine._process.child
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(OverloadedError, match="has not answered yet"):
        await engine.operations.requests()
    with pytest.raises(TimeoutError):  # nobody waits any more, and yet there is something to do
        await asyncio.wait_for(collect(engine, "r", max_tokens=5), 0.2)
    assert engine.is_busy and not engine.live
    assert "was stopped" in engine.examine().doing
    child.send_signal(signal.SIGCONT)
    await until(lambda: not engine.is_busy)
    assert engine.examine().cpu_s > 0.1
    assert len(await collect(engine, "r", max_tokens=5)) == 5


async def test_who_is_given_up_gets_an_error_at_once(engine):
    running = asyncio.create_task(collect(engine, "r", max_tokens=400))
    await until(lambda: engine.live)
    engine.abandon("it took too long")
    with pytest.raises(EngineDeadError, match="given up: it took too long"):
        await running
    with pytest.raises(EngineDeadError):
        engine.check_health()


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path, model):
    engine = create_engine(model)
    await engine.stop()
    options = EngineOptions.from_flat(str(tmp_path / "nothing"), {})
    engine = AsyncEngine(EngineProcess(options), load_tokenizer(locate(model)), model_name="x")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        await engine.start()
    await engine.stop()


async def test_the_engine_goes_when_its_front_end_goes(engine):
    child = engine._process.child
    child.stdin.close()
    await until(lambda: child.poll() is not None)


async def test_an_engine_that_dies_while_it_falls_asleep_is_dead(engine):
    engine._process.child.send_signal(signal.SIGSTOP)
    falling = asyncio.create_task(engine.rest.sleep(1, timeout_s=5))
    await until(lambda: engine.rest.phase is Phase.FALLING_ASLEEP)
    assert not engine.is_busy  # it computes nothing for anybody, so it cannot be late
    os.kill(engine._process.child.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"SIGKILL\) while it fell asleep, after step"):
        await falling
    with pytest.raises(EngineDeadError):
        await engine.rest.sleep(1)


async def test_a_model_without_experts_has_no_tokens_of_experts(engine):
    assert await engine.operations.expert_tokens() == {}
