"""What all routes of one server share. Knows nothing of any single request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import Adapter
from octavo.engine import ServingEngine
from octavo.errors import UnknownModelError
from octavo.server.config import ServerConfig
from octavo.server.keys import ApiKey, KeyRing, Scope
from octavo.server.limits import Limits
from octavo.server.metrics import ServerMetrics
from octavo.server.openai_logprobs import LogprobShaper
from octavo.server.responses_background import Background
from octavo.server.watchdog import Condition, State, Watchdog


@dataclass
class ServerState:
    """The engine, its bounds and its books. Only `draining` and `startup_error` change, once."""

    engine: ServingEngine
    config: ServerConfig
    limits: Limits
    metrics: ServerMetrics
    keys: KeyRing
    draining: bool = False
    startup_error: Exception | None = None  # what came out of the lifespan instead of a start
    background: Background = field(default_factory=Background)  # responses without a reader
    watchdog: Watchdog = field(init=False)

    def __post_init__(self) -> None:
        timeout_s, action = self.config.watchdog_timeout_s, self.config.watchdog_action
        self.watchdog = Watchdog(self.engine, timeout_s=timeout_s, exits=action == "exit")
        self.metrics.show_state(lambda: self.condition().state)

    def condition(self) -> Condition:
        """How it stands now. What is worse than to drain or to sleep is told meanwhile, too."""
        found = self.watchdog.look()
        if self.draining and found.state not in (State.STUCK, State.DEAD):
            return Condition(State.DRAINING, "the server is shutting down")
        if not self.engine.rest.is_awake and found.state not in (State.STUCK, State.DEAD):
            return Condition(State.SLEEPING, self.engine.rest.why)
        return found

    @cached_property
    def logprob_shaper(self) -> LogprobShaper:
        """Made at the first request: only then is the engine sure to know its tokenizer."""
        return LogprobShaper(self.engine.model.tokenizer)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that clients may use; the first is the model's own."""
        return (*self.base_names, *self.engine.operations.adapters)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Those of the model without an adapter."""
        return (self.engine.model.name, *self.config.served_model_name)

    def adapter_of(self, name: str) -> Adapter | None:
        """The adapter behind a name that was checked; it may have been unloaded since."""
        adapter = self.engine.operations.adapters.get(name)
        if adapter is None and name not in self.base_names:
            raise UnknownModelError("the adapter was unloaded; see /v1/models", param="model")
        return adapter

    def check_model(self, name: str | None) -> str:
        """The name to answer under: the one asked for, or the model's own where none is."""
        if name is None:
            return self.engine.model.name
        if name not in self.model_names:
            raise UnknownModelError("the model does not exist here; see /v1/models", param="model")
        return name


Handler = Callable[[Request], Awaitable[Response]]

JSON = "application/json"
EVENTS = "text/event-stream"


class Route(NamedTuple):
    """One line of the route table."""

    method: str
    path: str
    handler: Handler
    scope: Scope  # what a key must be good for
    body: type[msgspec.Struct] | None = None  # what it reads, as JSON
    media: tuple[str, ...] = (JSON,)  # what it answers with
    query: type[msgspec.Struct] | None = None  # what it takes behind the path
    queues: bool = True  # what is posted waits for the engine: not read while its queue is full


def key_of(request: Request) -> ApiKey | None:
    """The key that came with a request; None where the server is open to all."""
    key: ApiKey | None = request.scope.get("octavo.key")
    return key
