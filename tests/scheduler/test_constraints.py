"""A new limit is a name and two answers; the step binds by it and tells who asks why."""

import importlib
import pkgutil
import re
from pathlib import Path

from helpers import create_core, create_executor, create_request, run_to_end, tokens_of

import octavo.scheduler
from octavo.kvcache import PagedAllocator
from octavo.scheduler import Blocks, Constraint, Scheduler, SequenceSlots, TokenBudget
from octavo.sim import VirtualClock

TABLE = Path(__file__).parents[2] / "docs" / "scheduling.md"


class Gate(Constraint):
    """Lets so many tokens of a sequence through in a step, and none while it is shut."""

    name = "gate"

    def __init__(self, width):
        self.width = width

    def allow(self, sequence, num_tokens):
        return min(num_tokens, self.width)

    def explain(self, sequence):
        return f"{self.width} tokens pass"


def scheduler_behind(gate):
    allocator = PagedAllocator(64, 4)
    limits = [TokenBudget(16), SequenceSlots(8), gate, Blocks(allocator)]
    return Scheduler(allocator, limits, max_model_len=64, clock=VirtualClock())


def test_a_limit_of_two_answers_binds_and_is_the_reason():
    gate = Gate(width=0)
    scheduler = scheduler_behind(gate)
    scheduler.add(create_request(10, request_id="a"))
    scheduler.schedule()
    [story] = scheduler.decisions.why("a").values()
    assert any("gate" in line and "0 tokens pass" in line for line in story)
    gate.width = 3
    assert [share.num_tokens for share in scheduler.schedule().scheduled] == [3]


def test_requests_behind_it_get_the_tokens_that_they_get_without_it():
    prompts = {"a": 10, "b": 3, "c": 17}
    answers = []
    for width in (3, 16):
        scheduler = scheduler_behind(Gate(width))
        core = create_core(scheduler, create_executor(scheduler))
        for name, length in prompts.items():
            core.add(create_request(length, 5, request_id=name))
        events = run_to_end(core)
        answers.append({name: tokens_of(events, name) for name in prompts})
    assert answers[0] == answers[1]
    assert all(len(tokens) == 5 for tokens in answers[0].values())


def test_the_page_about_scheduling_has_a_row_for_every_limit():
    for module in pkgutil.iter_modules(octavo.scheduler.__path__, "octavo.scheduler."):
        importlib.import_module(module.name)
    ours = [c for c in Constraint.__subclasses__() if c.__module__.startswith("octavo.scheduler.")]
    rows = set(re.findall(r"^\| `([a-z ]+)` \|", TABLE.read_text(), re.M))
    assert len(ours) >= 6
    assert {one.name for one in ours} <= rows
