"""A step of the real runner that finds no memory: the others get the text they would have got."""

import pytest
import torch
from helpers import create_request, run_to_end, tokens_of

from octavo import LLM
from octavo.core import FailureCode
from octavo.errors import EngineDeadError
from octavo.layers import GatedMLP
from octavo.runner.lack_of_memory import memory_errors
from octavo.testing.tiny_llama import write_tiny_llama

PROMPTS = [[(31 * i + 7 * n) % 301 for i in range(n)] for n in (3, 16, 40, 90)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def play(llm):
    """All events, and the requests in order of their arrival."""
    requests = [create_request(prompt=p, max_tokens=12, temperature=0.0) for p in PROMPTS]
    for request in requests:
        llm.engine.core.add(request)
    events = run_to_end(llm.engine.core)
    return events, requests


def failing_calls(monkeypatch, calls):
    """Let a layer in the middle of the model raise at these calls of all its layers together."""
    forward, num_calls = GatedMLP.forward, 0

    def forward_or_fail(self, x):
        nonlocal num_calls
        num_calls += 1
        if num_calls in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x)

    monkeypatch.setattr(GatedMLP, "forward", forward_or_fail)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("call", [2, 9])  # in the prompts' step, and in a later one
def test_the_youngest_gives_way_and_the_others_lose_nothing(model, monkeypatch, asynchronous, call):
    options = {"kv_cache_memory_bytes": 2**24, "async_scheduling": asynchronous}
    events, requests = play(LLM(str(model), **options))
    expected = [tokens_of(events, request.request_id) for request in requests]
    llm = LLM(str(model), check_integrity=True, **options)
    failing_calls(monkeypatch, {call})
    events, requests = play(llm)
    (failure,) = [event for event in events if event.error is not None]
    assert failure.error_code is FailureCode.OUT_OF_MEMORY
    assert failure.request_id == requests[-1].request_id
    found = [tokens_of(events, request.request_id) for request in requests]
    assert found[:-1] == expected[:-1]
    stats = llm.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_two_steps_in_a_row_end_the_engine_and_say_why(model, monkeypatch):
    llm = LLM(str(model), kv_cache_memory_bytes=2**24)
    failing_calls(monkeypatch, range(1, 100))
    with pytest.raises(EngineDeadError, match="MemoryError: CUDA out of memory"):
        play(llm)


def test_a_host_without_memory_is_told_from_other_errors():
    with pytest.raises(MemoryError, match="out of memory"), memory_errors():
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        torch.empty(2).view(3)
