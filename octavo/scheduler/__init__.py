"""Which sequences run in a step, and how many of their tokens. Pure Python, no torch."""

from octavo.scheduler.admission import PrefillSpeed, QueueBounds
from octavo.scheduler.batching import BATCHINGS, Batching, create_batching
from octavo.scheduler.build import SchedulerSettings, create_scheduler
from octavo.scheduler.constraints import Blocks, Constraint, SequenceSlots, TokenBudget
from octavo.scheduler.decisions import DecisionLog, Phase, Story
from octavo.scheduler.preemption import PREEMPTION_MODES, Preemption, TransferSpeed
from octavo.scheduler.queues import POLICIES, QueuePolicy, create_queue
from octavo.scheduler.scheduler import Scheduler, adapters_in_use

__all__ = [
    "BATCHINGS",
    "POLICIES",
    "PREEMPTION_MODES",
    "Batching",
    "Blocks",
    "Constraint",
    "DecisionLog",
    "Phase",
    "Preemption",
    "PrefillSpeed",
    "QueueBounds",
    "QueuePolicy",
    "Scheduler",
    "SchedulerSettings",
    "SequenceSlots",
    "Story",
    "TokenBudget",
    "TransferSpeed",
    "adapters_in_use",
    "create_batching",
    "create_queue",
    "create_scheduler",
]
