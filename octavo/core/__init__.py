"""The nouns of Octavo. Pure data and arithmetic: no torch, no HTTP, no files."""

from octavo.core.events import EngineStats, RequestEvent
from octavo.core.plan import (
    NewSequence,
    SampledToken,
    ScheduledTokens,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from octavo.core.protocols import Clock, Executor, SystemClock
from octavo.core.request import (
    FinishReason,
    Request,
    RequestOptions,
    check_prompt,
    check_sampling_ids,
    resolve_max_tokens,
)
from octavo.core.sampling import SamplingParams
from octavo.core.sequence import Sequence, SequenceStatus

__all__ = [
    "Clock",
    "EngineStats",
    "Executor",
    "FinishReason",
    "NewSequence",
    "Request",
    "RequestEvent",
    "RequestOptions",
    "SampledToken",
    "SamplingParams",
    "ScheduledTokens",
    "Sequence",
    "SequenceStatus",
    "StepPlan",
    "StepResult",
    "SystemClock",
    "TokenLogprobs",
    "check_prompt",
    "check_sampling_ids",
    "resolve_max_tokens",
]
