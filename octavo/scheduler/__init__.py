"""Which sequences run in a step, and how many of their tokens. Pure Python, no torch."""

from octavo.scheduler.constraints import Blocks, Constraint, SequenceSlots, TokenBudget
from octavo.scheduler.scheduler import Scheduler

__all__ = ["Blocks", "Constraint", "Scheduler", "SequenceSlots", "TokenBudget"]
