"""The nouns of Octavo. Pure data and arithmetic: no torch, no HTTP, no files."""

from octavo.core.events import EngineStats, RequestEvent, RequestStatus
from octavo.core.plan import (
    NewSequence,
    SampledTokens,
    ScheduledTokens,
    StepPlan,
    StepResult,
    Tier,
    TokenLogprobs,
    Transfer,
)
from octavo.core.protocols import Clock, Executor, Launch, PendingResult, SystemClock
from octavo.core.request import (
    FinishReason,
    Request,
    RequestOptions,
    check_prompt,
    check_sampling_ids,
    resolve_max_tokens,
)
from octavo.core.sampling import SamplingParams
from octavo.core.sequence import (
    FINISHED,
    RUNNING,
    WAITING,
    Fork,
    Sequence,
    SequenceStatus,
    Swapped,
)
from octavo.core.structured import Grammars, Matcher, StructuredOutputsParams

__all__ = [
    "FINISHED",
    "RUNNING",
    "WAITING",
    "Clock",
    "EngineStats",
    "Executor",
    "FinishReason",
    "Fork",
    "Grammars",
    "Launch",
    "Matcher",
    "NewSequence",
    "PendingResult",
    "Request",
    "RequestEvent",
    "RequestOptions",
    "RequestStatus",
    "SampledTokens",
    "SamplingParams",
    "ScheduledTokens",
    "Sequence",
    "SequenceStatus",
    "StepPlan",
    "StepResult",
    "StructuredOutputsParams",
    "Swapped",
    "SystemClock",
    "Tier",
    "TokenLogprobs",
    "Transfer",
    "check_prompt",
    "check_sampling_ids",
    "resolve_max_tokens",
]
