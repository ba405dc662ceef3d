"""What a server needs from an engine, as text goes: the seam between `server` and `engine`.

`AsyncEngine` (a real engine in its own process) and the fakes of `octavo.testing` both satisfy it.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from octavo.core import (
    NO_IMAGES,
    Adapter,
    EngineStats,
    FailureCode,
    FinishReason,
    ModelTasks,
    PoolingParams,
    RequestOptions,
    RequestStatus,
    SamplingParams,
    SeenImages,
    TokenLogprobs,
)
from octavo.engine.rest import Rest
from octavo.text import NoTokenizer, Tokenizer
from octavo.vision.prompts import ImageReader

DEFAULT_OPTIONS = RequestOptions()
DEFAULT_TASKS = ModelTasks()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind an engine, as clients see it."""

    name: str  # what clients put in the field `model`
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int
    tokenizer: Tokenizer
    tasks: ModelTasks = DEFAULT_TASKS
    images: ImageReader | None = None  # None: it sees none

    @property
    def has_text(self) -> bool:
        """Whether token ids can be read as text here."""
        return not isinstance(self.tokenizer, NoTokenizer)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of one answer. Concatenated, the pieces are the answer; the last has the reason.

    `text` never holds half a character and never a part of a stop string. `token_ids` are the ids
    that arrived with this piece; text may lag behind them by a few ids.
    """

    index: int  # which of the request's `n` answers
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each of `token_ids`
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended the answer
    error: str | None = None  # with finish_reason "error": a sentence for the client
    error_code: FailureCode = FailureCode.GENERATION_FAILED  # of `error`, where there is one
    # With the first token, or the end where there is none, as in `RequestEvent`:
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # told by the first of `n` answers
    vector: bytes = b""
    num_cached_tokens: int = 0
    queue_time_s: float = 0.0
    prefill_time_s: float = 0.0


class Pulse(NamedTuple):
    """A look at the engine's process from outside."""

    doing: str  # the end of a sentence, for the log
    cpu_s: float = 0.0  # used since its start; where the model is on a GPU, that tells nothing: 0


class EngineOperations(Protocol):
    """What operators ask of a running engine; `OverloadedError` where a step hangs."""

    async def why(self, request_id: str) -> dict[str, list[str]]:
        """What happened to live and recently finished requests whose ids begin with this."""
        ...

    async def requests(self) -> list[RequestStatus]:
        """All live requests, as the engine knows them: one for each answer."""
        ...

    async def expert_tokens(self) -> dict[str, list[int]]:
        """How many tokens each expert got: {layer: one number an expert}; empty if uncounted.

        Asleep, too, for then nothing is counted.
        """
        ...

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Those that requests may name, by name."""
        ...

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> Adapter:
        """Read a LoRA adapter, below the engine's `lora_dir`; requests may name it from now on.

        replace: the name may be taken; requests of the one before finish with that.

        Raises:
            RequestError: it cannot be read, does not fit, or there is no room for it.
        """
        ...

    async def unload_adapter(self, name: str) -> Adapter:
        """Let no further request name it; raises `UnknownModelError` where nobody could.

        Those that were sent before finish with it.
        """
        ...

    async def reset_prefix_cache(self) -> None:
        """Let no content that is cached now be found again, on disk neither; what runs goes on."""
        ...


class ServingEngine(Protocol):
    """An engine that serves one model to many concurrent callers of one event loop."""

    model: ServedModel
    rest: Rest

    @property
    def operations(self) -> EngineOperations:
        """What operators ask of it."""
        ...

    @property
    def live(self) -> Collection[str]:
        """The ids of all requests that the engine has taken and not ended."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether the engine has something to do, or should have: also who left may be in it."""
        ...

    def examine(self) -> Pulse:
        """What the engine's process does now."""
        ...

    def abandon(self, reason: str) -> None:
        """Count the engine as dead from now on: every stream ends with `EngineDeadError`."""
        ...

    def check_room(self, num_sequences: int = 1) -> None:
        """Raise `OverloadedError` where so many more cannot be taken, whatever they are."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
        *,
        pooling: PoolingParams | None = None,
        images: SeenImages = NO_IMAGES,
    ) -> AsyncIterator[TextDelta]:
        """Stream the `n` answers to one prompt, interleaved, one final delta for each index.

        With `pooling` there is one delta, with the prompt's vector; `sampling` is `NO_TOKENS` then.

        Validation happens before the first delta: `RequestError` (the request is wrong),
        `OverloadedError` (queue full, or asleep) or `EngineDeadError`. Closing the iterator aborts
        the request and frees what it holds.
        """
        ...

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        """The resolved configuration: (name, value, where it came from, why)."""
        ...

    def stats(self) -> EngineStats:
        """The latest gauges."""
        ...

    def check_health(self) -> None:
        """Raise `EngineDeadError` where the engine cannot answer any more."""
        ...
