"""Two factories for tests of the core: an engine on a fake executor, and requests."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from octavo.core import Clock, Executor, Request, RequestEvent, RequestOptions, SamplingParams
from octavo.engine import EngineCore
from octavo.kvcache import PagedAllocator, PrefixAllocator
from octavo.scheduler import (
    Blocks,
    QueueBounds,
    Scheduler,
    SequenceSlots,
    TokenBudget,
    create_batching,
    create_queue,
)
from octavo.sim import FakeExecutor, VirtualClock
from octavo.sim.step_time import Recorded

VOCAB_SIZE = 1000
_ids = itertools.count()


def create_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_batched_tokens: int = 16,
    max_num_seqs: int = 8,
    max_model_len: int = 256,
    prefix_caching: bool = False,
    policy: str = "fcfs",
    batching: str = "chunked",
    clock: Clock | None = None,
    bounds: QueueBounds | None = None,
) -> Scheduler:
    clock = clock or VirtualClock()
    kind = PrefixAllocator if prefix_caching else PagedAllocator
    allocator = kind(num_blocks, block_size)
    constraints = [
        TokenBudget(max_num_batched_tokens),
        SequenceSlots(max_num_seqs),
        Blocks(allocator),
    ]
    return Scheduler(
        allocator,
        constraints,
        max_model_len=max_model_len,
        queue=create_queue(policy),
        batching=create_batching(batching, clock, max_num_seqs=max_num_seqs),
        bounds=bounds,
        clock=clock,
    )


def create_executor(scheduler: Scheduler) -> FakeExecutor:
    allocator = scheduler.allocator
    return FakeExecutor(
        num_blocks=allocator.num_blocks, block_size=allocator.block_size, vocab_size=VOCAB_SIZE
    )


def create_core(
    scheduler: Scheduler, executor: Executor | None = None, *, asynchronous: bool = False
) -> EngineCore:
    executor = executor or create_executor(scheduler)
    thread = partial(ThreadPoolExecutor(1).submit, executor.execute)
    return EngineCore(
        scheduler, executor, launch=thread if asynchronous else None, check_integrity=True
    )


def create_request(
    num_prompt_tokens: int = 5,
    max_tokens: int = 4,
    *,
    request_id: str | None = None,
    prompt: list[int] | None = None,
    options: RequestOptions | None = None,
    **sampling,
) -> Request:
    if prompt is None:
        prompt = [(7 * i + num_prompt_tokens) % VOCAB_SIZE for i in range(num_prompt_tokens)]
    return Request(
        request_id=request_id or f"request-{next(_ids)}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        seed=0,
        options=options or RequestOptions(),
    )


def run_to_end(core: EngineCore, *, max_steps: int = 10_000) -> list[RequestEvent]:
    """All events until no request is left."""
    events: list[RequestEvent] = []
    for _ in range(max_steps):
        if not core.has_work:
            return events
        events += core.step()
    raise AssertionError(f"requests are still alive after {max_steps} steps")


def tokens_of(events: list[RequestEvent], request_id: str) -> list[int]:
    return [t for event in events if event.request_id == request_id for t in event.token_ids]


def create_recorded(**changes) -> Recorded:
    """What made-up step times are said to have been recorded on."""
    facts = {
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "machine": "a test",
        "num_threads": 1,
        "versions": {},
        "vocab_size": 100,
        "kv_token_bytes": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return Recorded(**facts | changes)
