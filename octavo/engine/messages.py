"""What passes between front-end process and engine process: typed, msgpack, never pickle."""

import msgspec

from octavo.core import (
    Adapter,
    EngineStats,
    ModelTasks,
    Request,
    RequestEvent,
    RequestStatus,
    SleepReport,
)


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    """Queue the answers to one prompt."""

    requests: list[Request]


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """End these requests now."""

    request_ids: list[str]


class Explain(msgspec.Struct, frozen=True, tag=True):
    """Tell the story of a request: of all engine requests whose ids begin with this."""

    number: int  # of the question; the answer has the same
    request_id: str


class ListRequests(msgspec.Struct, frozen=True, tag=True):
    """Tell which requests are alive."""

    number: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Forget all content that could be found again."""

    number: int


class ListExpertTokens(msgspec.Struct, frozen=True, tag=True):
    """Tell how many tokens each expert of each layer got."""

    number: int


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read an adapter, as a client of the server asks for it."""

    number: int
    name: str
    path: str
    replace: bool


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Let no further request name it."""

    number: int
    name: str


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Give up memory, as `EngineCore.sleep` does."""

    number: int
    level: int


class WakeUp(msgspec.Struct, frozen=True, tag=True):
    """Take it back."""

    number: int


class PhaseDone(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start-up is over."""

    phase: str
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests. What the front end needs to check them."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    stats: EngineStats
    settings: list[tuple[str, str, str, str]]  # name, value, source, why
    tasks: ModelTasks
    adapters: tuple[Adapter, ...] = ()


class News(msgspec.Struct, frozen=True, tag=True):
    """What a step brought, or the messages that came before it."""

    events: list[RequestEvent]
    stats: EngineStats
    num_read: int  # messages, since the start


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request was not taken, nor were its siblings; `kind` is the name of the exception."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    retry_after_s: float = 1.0


class Explanation(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Explain`: for each engine request, a sentence for each phase."""

    number: int
    content: dict[str, list[str]]


class RequestList(msgspec.Struct, frozen=True, tag=True):
    """The answer to `ListRequests`."""

    number: int
    content: list[RequestStatus]


class WasReset(msgspec.Struct, frozen=True, tag=True):
    """The answer to `ResetPrefixCache`."""

    number: int
    content: None = None


class ExpertTokens(msgspec.Struct, frozen=True, tag=True):
    """The answer to `ListExpertTokens`: for each layer, a number for each expert."""

    number: int
    content: dict[str, list[int]]


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """The answer to `LoadAdapter`."""

    number: int
    content: Adapter


class AdapterUnloaded(msgspec.Struct, frozen=True, tag=True):
    """The answer to `UnloadAdapter`."""

    number: int
    content: None = None


class Slept(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Sleep`."""

    number: int
    content: SleepReport


class WokenUp(msgspec.Struct, frozen=True, tag=True):
    """The answer to `WakeUp`."""

    number: int
    content: None = None


class Unable(msgspec.Struct, frozen=True, tag=True):
    """The answer to what could not be done: nothing has changed; `message` is for the log.

    Where the question was wrong, `kind` is the name of the exception, and clients may see it.
    """

    number: int
    message: str
    kind: str = "OctavoError"
    param: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine's last words; `kind` is the name of the exception."""

    kind: str
    message: str


Question = (
    Explain
    | ListRequests
    | ListExpertTokens
    | ResetPrefixCache
    | LoadAdapter
    | UnloadAdapter
    | Sleep
    | WakeUp
)
Told = (
    Explanation
    | RequestList
    | ExpertTokens
    | WasReset
    | AdapterLoaded
    | AdapterUnloaded
    | Slept
    | WokenUp
)
ToEngine = AddRequests | AbortRequests | Question
FromEngine = PhaseDone | Ready | News | Refused | Told | Unable | Fatal

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
