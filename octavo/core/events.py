"""What the engine tells the world about requests and about itself. Plain data, sent as msgpack."""

import msgspec

from octavo.core.failure import FailureCode
from octavo.core.plan import TokenLogprobs
from octavo.core.request import FinishReason


class RequestEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """News of one request. Exactly one event has a `finish_reason`, and it is the last."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each of `token_ids` when asked for
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error"
    error_code: FailureCode = FailureCode.GENERATION_FAILED  # of `error`, where there is one
    # With the first token, or the end where there is none:
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of all prompt tokens but the first
    vector: bytes = b""  # the pooled prompt, float32
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_time_s: float = 0.0  # from arrival to the first step that the request was in
    prefill_time_s: float = 0.0  # from that step to this event


class RequestStatus(msgspec.Struct, frozen=True):
    """A live request, as of now."""

    request_id: str
    status: str  # "waiting" or "running"
    reason: str  # what binds it, as in `octavo why`
    age_s: float  # since it arrived
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    num_preemptions: int
    priority: int
    tenant: str


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's gauges after a step."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int  # since start
    num_steps: int  # since start
    num_prompt_tokens: int  # computed since start
    num_generation_tokens: int  # sampled since start
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache since start
    num_prefix_hits: int = 0  # and those found there
    num_transfers: dict[str, int] = {}  # KV blocks copied since start, by "source_to_target" tier
    waiting_by_reason: dict[str, int] = {}  # who waits, by the constraint that binds them
    adapters: dict[str, tuple[int, int]] = {}  # (running, waiting) requests, by adapter's name
    max_loras: int = 0  # adapters that one step may hold; 0: none are served


class SleepReport(msgspec.Struct, frozen=True):
    """What an engine gave up when it fell asleep. Bytes by its own books, but for `freed_bytes`."""

    level: int
    kv_cache_bytes: int  # of all KV blocks, on the device and on the host
    weight_bytes: int  # that left the device
    host_weight_bytes: int  # that they take on the host meanwhile
    freed_bytes: int  # as measured: of torch's memory on a GPU, of resident memory on a CPU
    seconds: float
    note: str = ""  # what stayed, and why
