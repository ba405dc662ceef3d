"""A scheduler from its settings: the one place that knows which constraints every engine has.

What serves, what is replayed and what the swarm plays with are all put together here.
"""

from dataclasses import dataclass

from octavo.core import Clock, Grammars, SystemClock
from octavo.kvcache import Allocator
from octavo.scheduler.adapters import AdapterSlots
from octavo.scheduler.admission import PrefillSpeed, QueueBounds
from octavo.scheduler.batching import create_batching
from octavo.scheduler.constraints import (
    Blocks,
    GrammarReadiness,
    SequenceSlots,
    TokenBudget,
    WholePrompt,
)
from octavo.scheduler.images import ImageBudget, ImageCache
from octavo.scheduler.preemption import Preemption, TransferSpeed
from octavo.scheduler.queues import create_queue
from octavo.scheduler.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    """What a scheduler is made of, besides its allocator.

    policy, batching, preemption_mode: names known to this package.
    whole_prompts: a prompt runs in one step, as encoders need it; then `max_num_batched_tokens` is
        at least `max_model_len`.
    copy_block_s: seconds that moving a KV block to or from the host takes, where that is known.
    num_cached_image_tokens, max_num_encoder_tokens: bounds of images; none are seen with 0.
    max_loras: adapters that one step may hold; none are served with 0.
    max_num_queued_reqs, max_num_queued_tokens, target_ttft_ms: bounds of the queue; None is none.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    policy: str = "fcfs"
    batching: str = "chunked"
    preemption_mode: str = "recompute"
    whole_prompts: bool = False
    copy_block_s: float | None = None
    num_cached_image_tokens: int = 0
    max_num_encoder_tokens: int = 0
    max_loras: int = 0
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    target_ttft_ms: int | None = None


def create_scheduler(
    allocator: Allocator,
    settings: SchedulerSettings,
    *,
    clock: Clock | None = None,
    grammars: Grammars | None = None,
) -> Scheduler:
    """The scheduler with the constraints that every engine has.

    grammars: what compiles the shapes of answers, where a model has text at all.
    """
    clock = clock or SystemClock()
    speed = PrefillSpeed()
    return Scheduler(
        allocator,
        [
            TokenBudget(settings.max_num_batched_tokens),
            SequenceSlots(settings.max_num_seqs),
            *([] if grammars is None else [GrammarReadiness(grammars)]),
            *([AdapterSlots(settings.max_loras)] if settings.max_loras else []),
            *([WholePrompt()] if settings.whole_prompts else []),
            *_image_budget(settings),
            Blocks(allocator),
        ],
        max_model_len=settings.max_model_len,
        queue=create_queue(settings.policy),
        batching=create_batching(settings.batching, clock, max_num_seqs=settings.max_num_seqs),
        bounds=QueueBounds(
            speed,
            max_num_reqs=settings.max_num_queued_reqs,
            max_num_tokens=settings.max_num_queued_tokens,
            target_ttft_ms=settings.target_ttft_ms,
        ),
        preemption=Preemption(
            settings.preemption_mode, transfers=TransferSpeed(settings.copy_block_s), prefills=speed
        ),
        clock=clock,
    )


def _image_budget(settings: SchedulerSettings) -> list[ImageBudget]:
    """The constraint of models that see images; the others do not even ask."""
    if not settings.num_cached_image_tokens:
        return []
    cache = ImageCache(settings.num_cached_image_tokens)
    return [ImageBudget(cache, settings.max_num_encoder_tokens)]
