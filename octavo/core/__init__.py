"""The nouns of Octavo. Pure data and arithmetic: no torch, no HTTP, no files."""

from octavo.core.adapters import Adapter
from octavo.core.events import EngineStats, RequestEvent, RequestStatus, SleepReport
from octavo.core.failure import FailureCode
from octavo.core.images import NO_IMAGES, ImageInput, Picture, SeenImages
from octavo.core.kv_groups import KVGroups, first_seen_block
from octavo.core.plan import (
    NewSequence,
    Reading,
    SampledTokens,
    ScheduledTokens,
    StepPlan,
    StepResult,
    Tier,
    TokenLogprobs,
    Transfer,
)
from octavo.core.pooling import POOLING_TYPES, SCORE, PoolingParams, PoolingType
from octavo.core.protocols import (
    CacheFile,
    Clock,
    Executor,
    Launch,
    PendingResult,
    Sleeper,
    SystemClock,
)
from octavo.core.request import (
    NO_TOKENS,
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
from octavo.core.tasks import ModelTasks

__all__ = [
    "FINISHED",
    "NO_IMAGES",
    "NO_TOKENS",
    "POOLING_TYPES",
    "RUNNING",
    "SCORE",
    "WAITING",
    "Adapter",
    "CacheFile",
    "Clock",
    "EngineStats",
    "Executor",
    "FailureCode",
    "FinishReason",
    "Fork",
    "Grammars",
    "ImageInput",
    "KVGroups",
    "Launch",
    "Matcher",
    "ModelTasks",
    "NewSequence",
    "PendingResult",
    "Picture",
    "PoolingParams",
    "PoolingType",
    "Reading",
    "Request",
    "RequestEvent",
    "RequestOptions",
    "RequestStatus",
    "SampledTokens",
    "SamplingParams",
    "ScheduledTokens",
    "SeenImages",
    "Sequence",
    "SequenceStatus",
    "SleepReport",
    "Sleeper",
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
    "first_seen_block",
    "resolve_max_tokens",
]
