"""Traces: what is written is read back, what is wrong is refused by line, ids follow hashes."""

import math
import statistics

import pytest

from octavo.errors import ConfigError
from octavo.sim.workload import (
    RECIPES,
    TraceHeader,
    TraceRecipe,
    TraceRequest,
    TraceSize,
    Workload,
    make_workload,
    prompt_token_ids,
    read_trace,
    write_trace,
)

HEADER = '{"octavo_trace":1,"block_size":4}'
REQUEST = '{"arrival_s":0.5,"num_prompt_tokens":9,"num_output_tokens":3,"prefix":[1,2]}'


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_made_trace_is_read_back_as_it_was_written(tmp_path, recipe):
    made = make_workload(
        RECIPES[recipe], TraceSize(num_requests=50, rate=3.0, scale=0.5), made_by="a test"
    )
    write_trace(tmp_path / "trace.jsonl", made)
    assert read_trace(tmp_path / "trace.jsonl") == made


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], "is empty"),
        ([HEADER], "holds no requests"),
        (["no json", REQUEST], "line 1, is not a header"),
        ([REQUEST, REQUEST], "line 1, is not a header"),
        (['{"octavo_trace":2,"block_size":4}', REQUEST], "version 2"),
        (['{"octavo_trace":1,"block_size":0}', REQUEST], "line 1, is not a header"),
        ([HEADER, REQUEST, "{"], "line 3, is not a request"),
        ([HEADER, "", REQUEST], "line 2, is not a request"),
        ([HEADER, REQUEST.replace("arrival_s", "arrives")], "line 2, is not a request"),
        ([HEADER, REQUEST.replace("0.5", "-1")], "line 2, is not a request"),
        ([HEADER, REQUEST.replace("0.5", '"0.5"')], "line 2, is not a request"),
        ([HEADER, REQUEST.replace(":9", ":0")], "line 2, is not a request"),
        ([HEADER, REQUEST.replace(":3", ":2.5")], "line 2, is not a request"),
        ([HEADER, REQUEST.replace("[1,2]", "[1,-2]")], "line 2, is not a request"),
        ([HEADER, REQUEST.replace("[1,2]", "[1,2,3]")], "line 2: the prefix has 3 blocks"),
        ([HEADER, REQUEST, REQUEST.replace("0.5", "0.4")], "line 3: arrival_s goes back"),
    ],
)
def test_a_malformed_trace_is_refused_with_line_and_cause(tmp_path, lines, cause):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert cause in str(error.value)
    assert str(path) in str(error.value)


def test_a_trace_that_is_not_there_or_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(tmp_path / "none" / "trace.jsonl", make_workload(RECIPES["alpaca"], SMALL))


SMALL = TraceSize(num_requests=3)


def test_a_seed_gives_one_trace_and_another_seed_another():
    size = TraceSize(num_requests=20, rate=1.0, seed=3)
    recipe = RECIPES["chat"]
    assert make_workload(recipe, size) == make_workload(recipe, size)
    assert make_workload(recipe, size) != make_workload(
        recipe, TraceSize(num_requests=20, rate=1.0)
    )


def test_lengths_have_the_recipes_means_and_arrivals_the_rate():
    recipe = TraceRecipe(mean_prompt_tokens=50.0, mean_output_tokens=100.0)
    requests = make_workload(
        recipe, TraceSize(num_requests=20_000, rate=8.0, max_model_len=10**6, spread=0.7)
    ).requests
    assert statistics.mean(r.num_prompt_tokens for r in requests) == pytest.approx(50.0, rel=0.03)
    assert statistics.mean(r.num_output_tokens for r in requests) == pytest.approx(100.0, rel=0.03)
    logs = [math.log(r.num_output_tokens) for r in requests]
    assert statistics.stdev(logs) == pytest.approx(0.7, rel=0.03)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(requests, requests[1:], strict=False)]
    # Gaps of a Poisson process are exponential: their deviation is their mean.
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 0.01])
def test_a_context_is_never_overrun_whatever_the_scale(scale):
    size = TraceSize(num_requests=2000, scale=scale, max_model_len=256)
    workload = make_workload(RECIPES["chat"], size)
    assert workload.max_num_tokens <= max(2, 256 * scale)
    assert all(r.num_output_tokens >= 1 <= r.num_prompt_tokens for r in workload.requests)


def test_without_a_rate_everybody_comes_at_once():
    assert {r.arrival_s for r in make_workload(RECIPES["alpaca"], SMALL).requests} == {0.0}


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (TraceSize(num_requests=0), "at least one request"),
        (TraceSize(rate=0.0), "rate"),
        (TraceSize(rate=math.inf), "rate"),
        (TraceSize(scale=1.5), "scale"),
        (TraceSize(max_model_len=514), None),
        (TraceSize(max_model_len=513), "no room"),
    ],
)
def test_impossible_sizes_are_refused(size, cause):
    if cause is None:
        assert make_workload(RECIPES["shared-prefix"], size).max_num_tokens == 514
        return
    with pytest.raises(ConfigError, match=cause):
        make_workload(RECIPES["shared-prefix"], size)


def ids(request, index, vocab_size=1000):
    return prompt_token_ids(request, index, block_size=4, vocab_size=vocab_size)


def test_equal_prefixes_give_equal_ids_and_nothing_else_does():
    def request(prefix, length=11):
        return TraceRequest(
            arrival_s=0, num_prompt_tokens=length, num_output_tokens=1, prefix=prefix
        )

    same, other, shorter = ids(request((7, 8)), 0), ids(request((7, 8)), 1), ids(request((7,)), 2)
    assert same[:8] == other[:8]
    assert same[8:] != other[8:]
    assert shorter[:4] == same[:4]
    assert shorter[4:8] != same[4:8]
    assert ids(request((8, 7)), 3)[:8] == same[4:8] + same[:4]
    assert ids(request((7, 8)), 0) == same
    assert len(same) == 11
    assert all(0 <= token_id < 5 for token_id in ids(request((), 500), 0, vocab_size=5))
    assert len(set(ids(request((), 500), 0, vocab_size=5))) == 5


def test_sums_and_longest_are_over_all_requests():
    requests = tuple(
        TraceRequest(arrival_s=0, num_prompt_tokens=n, num_output_tokens=10 - n) for n in (3, 9, 4)
    )
    workload = Workload(TraceHeader(octavo_trace=1, block_size=4), requests)
    assert workload.num_output_tokens == 7 + 1 + 6
    assert workload.max_num_tokens == 10
