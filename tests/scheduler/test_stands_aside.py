"""Who waits for a grammar lets those behind pass, and is admitted in turn once it is there."""

from octavo.core import Request, SamplingParams, StructuredOutputsParams
from octavo.kvcache import create_allocator
from octavo.scheduler import SchedulerSettings, create_scheduler


class Grammars:
    """Says that a shape is ready when it is told so."""

    def __init__(self):
        self.ready = set()
        self.asked = []

    def is_ready(self, params):
        self.asked.append(params.regex)
        return params.regex in self.ready

    def matcher(self, params):
        raise AssertionError("the runner's to ask")


def request(name, regex=None):
    shape = None if regex is None else StructuredOutputsParams(regex=regex)
    sampling = SamplingParams(max_tokens=4, structured_outputs=shape)
    return Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, seed=0)


def create(grammars, **settings):
    defaults = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 64}
    return create_scheduler(
        create_allocator("paged", 32, 16, max_model_len=64),
        SchedulerSettings(**defaults | settings),
        grammars=grammars,
    )


def scheduled(scheduler):
    return [share.sequence_id for share in scheduler.schedule().scheduled]


def test_those_behind_pass_and_the_order_is_kept():
    for policy in ("fcfs", "priority", "fair", "deadline"):
        grammars = Grammars()
        scheduler = create(grammars, policy=policy)
        scheduler.add(request("a", "x"))
        scheduler.add(request("b", "y"))
        scheduler.add(request("c"))
        assert scheduled(scheduler) == ["c"]
        assert grammars.asked == ["x", "y"]
        assert scheduler.stats().waiting_by_reason == {"grammar": 2}
        assert "being compiled" in " ".join(scheduler.decisions.why("a")["a"])
        scheduler.check_integrity()
        scheduler.add(request("d"))
        assert scheduled(scheduler) == ["c", "d"]
        grammars.ready |= {"x", "y"}
        assert scheduled(scheduler) == ["c", "d", "a", "b"]
        scheduler.check_integrity()


def test_alone_it_neither_runs_nor_is_it_lost():
    grammars = Grammars()
    scheduler = create(grammars)
    scheduler.add(request("a", "x"))
    for _ in range(5):
        assert scheduled(scheduler) == [] and scheduler.has_work
    [event] = scheduler.abort(["a"])
    assert event.finish_reason == "abort" and not scheduler.has_work
    scheduler.check_integrity()
    scheduler.add(request("b", "x"))
    grammars.ready.add("x")
    assert scheduled(scheduler) == ["b"]
