"""Several answers to one prompt: shared blocks, copies on write, beams that decide together."""

import random

import pytest
from helpers import (
    VOCAB_SIZE,
    create_core,
    create_executor,
    create_request,
    create_scheduler,
    run_to_end,
    tokens_of,
)

from octavo.core import FinishReason
from octavo.errors import RequestError
from octavo.scheduler.beam import BeamSearch
from octavo.sim.fake_executor import oracle_candidates, oracle_tokens

PROMPT = list(range(100, 114))  # three blocks and a half


def siblings(count, *, prompt=PROMPT, max_tokens=9, name="r", **sampling):
    return [
        create_request(prompt=prompt, max_tokens=max_tokens, request_id=f"{name}#{i}", **sampling)
        for i in range(count)
    ]


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared(prefix_caching, asynchronous):
    scheduler = create_scheduler(prefix_caching=prefix_caching)
    core = create_core(scheduler, asynchronous=asynchronous)
    core.add(*siblings(4))
    events = run_to_end(core)
    for index in range(4):
        assert tokens_of(events, f"r#{index}") == oracle_tokens(PROMPT, 9, VOCAB_SIZE)
    # The others compute the last token of the prompt again, for its logits.
    assert scheduler.stats().num_prompt_tokens == len(PROMPT) + 3


def test_shared_blocks_take_memory_once():
    scheduler = create_scheduler(block_size=4, max_num_batched_tokens=64)
    core = create_core(scheduler)
    core.add(*siblings(4))
    core.step()
    core.step()
    stats = scheduler.stats()
    assert stats.num_running == 4
    # Three full blocks for all, and for each a fourth of its own.
    assert stats.num_blocks - stats.num_free_blocks == 3 + 4


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_when_the_first_answer_is_aborted_the_next_one_computes_the_prompt(prefix_caching):
    scheduler = create_scheduler(prefix_caching=prefix_caching, max_num_batched_tokens=4)
    core = create_core(scheduler)
    core.add(*siblings(3))
    core.step()
    assert [e.finish_reason for e in core.abort(["r#0"])] == [FinishReason.ABORT]
    events = run_to_end(core)
    for name in ("r#1", "r#2"):
        assert tokens_of(events, name) == oracle_tokens(PROMPT, 9, VOCAB_SIZE)


def test_the_story_says_what_an_answer_waits_for():
    scheduler = create_scheduler()
    scheduler.add(*siblings(2))
    assert scheduler.decisions.why("r#1")["r#1"][-1] == "waiting 0 ms: prompt (r#0 computes it)"
    assert scheduler.stats().waiting_by_reason == {"queued": 1, "prompt": 1}


def test_all_answers_are_taken_or_none():
    scheduler = create_scheduler()
    good, bad = create_request(5, 4), create_request(5, 4000)
    with pytest.raises(RequestError):
        scheduler.add(good, bad)
    assert not scheduler.has_work


def naive_beam_search(prompt, *, beam_width, max_tokens, stop_ids=frozenset(), **options):
    """The search over whole token lists, without an engine."""
    search = BeamSearch(beam_width=beam_width, max_tokens=max_tokens, stop_ids=stop_ids, **options)
    beams = [list(prompt)]
    while beams:
        found = [oracle_candidates(beam, search.num_candidates, VOCAB_SIZE) for beam in beams]
        beams = [[*beams[c.parent], c.token_id] for c in search.advance(found)]
    return [(list(h.token_ids), h.finish_reason) for h in search.hypotheses]


def beams_of(events, name, beam_width):
    ends = {e.request_id: e for e in events if e.finish_reason is not None}
    found = [ends[f"{name}#{i}"] for i in range(beam_width)]
    return [(list(e.token_ids), e.finish_reason) for e in found]


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("beam_width", [1, 2, 5])
def test_beams_share_blocks_and_find_what_whole_sequences_find(beam_width, prefix_caching):
    scheduler = create_scheduler(prefix_caching=prefix_caching)
    core = create_core(scheduler)
    core.add(*siblings(beam_width, use_beam_search=True, beam_width=beam_width))
    events = run_to_end(core)
    expected = naive_beam_search(PROMPT, beam_width=beam_width, max_tokens=9)
    assert beams_of(events, "r", beam_width) == expected
    assert all(e.finish_reason is not None for e in events)  # beams say nothing before the end
    assert scheduler.stats().num_prompt_tokens < len(PROMPT) + beam_width


@pytest.mark.parametrize("seed", range(40))
def test_searches_that_fight_for_memory_and_places_find_the_same(seed):
    """Groups, single requests, preemption in the middle of a decision, too few places."""
    rng = random.Random(seed)
    scheduler = create_scheduler(
        prefix_caching=rng.random() < 0.5,
        num_blocks=rng.randint(8, 24),
        max_num_batched_tokens=rng.choice((3, 16, 64)),
        max_num_seqs=rng.choice((1, 2, 4, 8)),
        batching=rng.choice(("static", "continuous", "chunked")),
        policy=rng.choice(("fcfs", "priority", "fair")),
    )
    core = create_core(scheduler, asynchronous=rng.random() < 0.5)
    wanted, events = {}, []
    for number in range(3):
        width, max_tokens = rng.randint(1, 4), rng.randint(1, 9)
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 14))]
        options = {
            "length_penalty": rng.choice((0.0, 1.0, 2.0)),
            "early_stopping": rng.choice((True, False, "never")),
        }
        stops = tuple(rng.sample(range(VOCAB_SIZE), 200))
        core.add(
            *siblings(
                width,
                prompt=prompt,
                max_tokens=max_tokens,
                name=f"b{number}",
                use_beam_search=True,
                beam_width=width,
                stop_token_ids=stops,
                **options,
            )
        )
        wanted[f"b{number}"] = (width, prompt, max_tokens, frozenset(stops), options)
        core.add(create_request(prompt=prompt, max_tokens=9, request_id=f"single{number}"))
        events += core.step()
    events += run_to_end(core)
    for name, (width, prompt, max_tokens, stop_ids, options) in wanted.items():
        expected = naive_beam_search(
            prompt, beam_width=width, max_tokens=max_tokens, stop_ids=stop_ids, **options
        )
        assert beams_of(events, name, width)[: len(expected)] == expected
        single = tokens_of(events, f"single{name[1:]}")
        assert single == oracle_tokens(prompt, 9, VOCAB_SIZE)
    stats = scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_the_fights_are_real():
    """The test above would prove little if nobody were ever pushed out."""
    scheduler = create_scheduler(num_blocks=8, max_num_seqs=2)
    core = create_core(scheduler)
    core.add(*siblings(4, use_beam_search=True, beam_width=4))
    run_to_end(core)
    assert scheduler.stats().num_preemptions > 5


def test_a_beam_that_fails_ends_its_search_and_nobody_elses():
    scheduler = create_scheduler()
    executor = create_executor(scheduler)
    core = create_core(scheduler, executor)
    core.add(*siblings(3, use_beam_search=True, beam_width=3))
    core.add(create_request(prompt=[1, 2, 3], max_tokens=9, request_id="other"))
    events = core.step() + core.step()
    for name in ("r#0", "r#1", "r#2"):  # whoever goes on from whom, one of them reads this
        executor.poison(name, 5)
    events += run_to_end(core)
    ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
    assert [ends[f"r#{i}"] for i in range(3)] == [FinishReason.ERROR] * 3
    assert tokens_of(events, "other") == oracle_tokens([1, 2, 3], 9, VOCAB_SIZE)


def test_aborting_one_beam_ends_the_search():
    core = create_core(create_scheduler())
    core.add(*siblings(3, use_beam_search=True, beam_width=3))
    core.step()
    events = core.abort(["r#2"])
    assert sorted(e.request_id for e in events) == ["r#0", "r#1", "r#2"]
    assert not core.has_work
