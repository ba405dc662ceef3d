"""The benchmarks' requests are those that the peers were measured with, to the last token."""

import hashlib
import json
import math

import pytest

from octavo.bench.draws import Draws, served_work, uniform_work
from octavo.bench.serve import ServeSetup, arrival_gaps_s
from octavo.bench.suite import peer_workloads

VOCAB_SIZE = 151_936
# Of the requests as the peers' scripts draw them, from a run of those scripts on a stub.
PEERS_DIGESTS = {
    "offline256": "dcfae6eb55f9cb78",
    "decode bs1": "f4df2cffa1268aa8",
    "decode bs32": "1c1c86839404f5bd",
    "decode bs128": "bd444d590b1d7bc4",
    "prefill 8x8192": "1bd930d4b44a0f7b",
    "prefill 64x1024": "e3c76214c392f280",
    "1024/128 x512": "d2aa22828405846d",
}
PEERS_SERVED_DIGEST = "98df36ae24c4135a"  # of the 80 prompts at 4 a second


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_offline_work_is_drawn_as_for_the_peers():
    warm_up, workloads = peer_workloads(VOCAB_SIZE)
    assert len(warm_up.prompts[0]) == 64 and warm_up.num_output_tokens == [16]
    found = {
        w.name: digest([[work.prompts, work.num_output_tokens] for work in w.works])
        for w in workloads
    }
    assert list(found) == [*PEERS_DIGESTS, "decode bs64"]  # ours comes last, and moves no draw
    assert {name: found[name] for name in PEERS_DIGESTS} == PEERS_DIGESTS
    assert {w.name: w.num_decoded for w in workloads if w.num_decoded} == {
        "decode bs1": 512,
        "decode bs32": 256,
        "decode bs128": 256,
        "decode bs64": 256,
    }
    greedy = {w.name for w in workloads if w.works[0].temperature == 0}
    assert greedy == {"decode bs1"}


def test_the_uniform_workload_has_the_published_number_of_tokens():
    work = uniform_work(VOCAB_SIZE)
    assert (work.sum_prompt_tokens, work.sum_output_tokens) == (142_827, 133_966)


def test_served_prompts_and_arrivals_are_those_of_the_peers():
    work = served_work(80, 512, 128, last_id=30_000, seed=1)
    assert digest(work.prompts) == PEERS_SERVED_DIGEST
    assert set(work.num_output_tokens) == {128}
    assert arrival_gaps_s(80, 4.0, seed=1)[:2] == [0.2682572565931347, 0.07711328603132109]
    assert arrival_gaps_s(3, math.inf, seed=1) == [0.0] * 3


def test_as_many_requests_come_as_the_rate_says():
    setup = ServeSetup()
    assert [setup.num_requests(rate) for rate in (4.0, 24.0, math.inf)] == [80, 480, 512]
    assert ServeSetup(num_prompts=7).num_requests(4.0) == 7


@pytest.mark.parametrize("vocab_size", [2, 300])
def test_a_small_vocabulary_bounds_the_ids(vocab_size):
    prompts = Draws(vocab_size).work(4, 50, 1).prompts + uniform_work(vocab_size).prompts
    assert max(map(max, prompts)) == vocab_size - 1
