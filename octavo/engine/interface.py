"""What a server needs from an engine, as text goes: the seam between `server` and `engine`.

`AsyncEngine` (a real engine in its own process) and the fakes of `octavo.testing` both satisfy it.
"""

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from octavo.core import (
    EngineStats,
    FinishReason,
    RequestOptions,
    RequestStatus,
    SamplingParams,
    TokenLogprobs,
)
from octavo.text import NoTokenizer, Tokenizer

DEFAULT_OPTIONS = RequestOptions()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind an engine, as clients see it."""

    name: str  # what clients put in the field `model`
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int
    tokenizer: Tokenizer

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
    # With the first token, as in `RequestEvent`:
    num_cached_tokens: int = 0
    queue_time_s: float = 0.0
    prefill_time_s: float = 0.0


class Pulse(NamedTuple):
    """A look at the engine's process from outside."""

    doing: str  # the end of a sentence, for the log
    cpu_s: float = 0.0  # used since its start; where the model is on a GPU, that tells nothing: 0


class ServingEngine(Protocol):
    """An engine that serves one model to many concurrent callers of one event loop."""

    model: ServedModel

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

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> AsyncIterator[TextDelta]:
        """Stream the `n` answers to one prompt, interleaved, one final delta for each index.

        Validation happens before the first delta: `RequestError` (the request is wrong),
        `OverloadedError` (queue full) or `EngineDeadError`. Closing the iterator aborts the request
        and frees what it holds.
        """
        ...

    async def why(self, request_id: str) -> dict[str, list[str]]:
        """What happened to live and recently finished requests whose ids begin with this."""
        ...

    async def requests(self) -> list[RequestStatus]:
        """All live requests, as the engine knows them: one for each answer."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Let no content that is in memory now be found again; what runs is not touched."""
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
