"""/sleep, /wake_up, /is_sleeping, as vLLM names them: an engine's memory is given up for a while.

Knows what may be asked and what is answered; the way between awake and asleep is the engine's.
"""

import logging
from typing import Annotated, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import SleepReport
from octavo.engine import Phase, ServingEngine
from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.server.body import decode_query
from octavo.server.errors import ErrorReply, HttpError, unavailable
from octavo.server.keys import Scope
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0


class SleepQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to fall asleep.

    level: 1 keeps the weights in host memory, 2 discards them.
    mode: whether accepted requests may end by themselves, or are ended at once.
    timeout_s: how long they may take; by default, as long as after SIGTERM (--drain-timeout-s).
    """

    level: Annotated[int, msgspec.Meta(ge=1, le=2)] = 1
    mode: Literal["wait", "abort"] = "wait"
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] | None = None


class WakeUpQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing: an engine wakes up as a whole."""


class SleepRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        return [
            Route("POST", "/sleep", self.sleep, Scope.ADMIN, query=SleepQuery),
            Route("POST", "/wake_up", self.wake_up, Scope.ADMIN, query=WakeUpQuery),
            Route("GET", "/is_sleeping", self.is_sleeping, Scope.METRICS),
        ]

    async def sleep(self, request: Request) -> Response:
        """Give up the memory of the KV cache and the weights once accepted requests have ended.

        New ones get a 503 with the code `sleeping` from now on. Asleep already, it only goes
        deeper, if `level` is.
        """
        query = decode_query(request, SleepQuery)
        self._state.engine.check_health()
        timeout_s = query.timeout_s
        if timeout_s is None:
            timeout_s = self._state.config.drain_timeout_s
        rest = self._state.engine.rest
        try:
            report = await rest.sleep(query.level, timeout_s=timeout_s, abort=query.mode == "abort")
        except OverloadedError as error:
            reply = unavailable(str(error), "busy", retry_after_s=_RETRY_AFTER_S)
            raise HttpError(reply) from None
        except EngineDeadError:
            raise
        except OctavoError as error:
            message = "could not fall asleep, and is what it was"
            raise _unable(message, "sleep_failed", error) from None
        return json_response(_facts(Phase.ASLEEP, report))

    async def wake_up(self, request: Request) -> Response:
        """Take the memory back. Awake, nothing happens."""
        decode_query(request, WakeUpQuery)
        self._state.engine.check_health()
        try:
            await self._state.engine.rest.wake_up()
        except EngineDeadError:
            raise
        except OctavoError as error:
            message = "could not wake up, and sleeps on; it may be asked again"
            raise _unable(message, "wake_up_failed", error) from None
        return json_response(_facts(Phase.AWAKE, None))

    async def is_sleeping(self, request: Request) -> Response:
        """Whether the memory is given up, and what that brought."""
        return json_response(sleep_facts(self._state.engine))


def sleep_facts(engine: ServingEngine) -> dict[str, object]:
    """What is told of an engine's sleep: the phase, and while it sleeps, what it gave up."""
    return _facts(engine.rest.phase, engine.rest.report)


def _facts(phase: Phase, report: SleepReport | None) -> dict[str, object]:
    return {
        "is_sleeping": phase is Phase.ASLEEP,
        "phase": phase,
        "report": None if report is None else msgspec.structs.asdict(report),
    }


def _unable(what: str, code: str, error: OctavoError) -> HttpError:
    """The cause may name files: it is for the log."""
    logger.error("%s", error)
    message = f"the engine {what}; the server's log has the cause"
    return HttpError(ErrorReply(500, message, "server_error", None, code))
