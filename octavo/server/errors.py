"""From an exception to what the client sees: status, OpenAI error object, headers. The one table.

    the request, its route, its size    400 404 405 408 413 431   invalid_request_error
    missing or wrong key                401                       authentication_error
    a key without the route's scope     403                       permission_error
    a key that used too much            429                       rate_limit_error
    overload, drain, sleep, dead engine,
    an answer that memory ran out for   503                       server_error
    a deadline that passed in the queue 504                       server_error
    anything else                       500                       server_error, text withheld

Only the texts of `RequestError` and of this package reach clients: others may hold paths.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import FailureCode
from octavo.errors import (
    EngineDeadError,
    OverloadedError,
    RequestError,
    SleepingError,
    UnknownModelError,
)
from octavo.server.allowance import AllowanceError

logger = logging.getLogger(__name__)

_MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True)
class ErrorReply:
    """An error as a client sees it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, **beside: str) -> bytes:
        """The JSON of OpenAI's error object, and what else stands beside it."""
        error = {
            "message": _shortened(self.message),
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error} | beside)

    def response(self) -> Response:
        """The whole HTTP response."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def _shortened(message: str) -> str:
    """Clients' own words may be in it, and they may be of any length."""
    return message if len(message) <= _MAX_MESSAGE_CHARS else f"{message[:_MAX_MESSAGE_CHARS]}..."


class HttpError(Exception):
    """The HTTP layer refuses a request, or an answer failed; carries the reply."""

    def __init__(self, reply: ErrorReply):
        super().__init__(reply.message)
        self.reply = reply


class ClientDisconnected(Exception):
    """Nobody is left to answer."""


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> HttpError:
    """A 400 that the server itself decides on."""
    return HttpError(ErrorReply(400, message, "invalid_request_error", param, code))


def unavailable(message: str, code: str, *, retry_after_s: float | None = None) -> ErrorReply:
    """A 503; clients retry after the given time."""
    headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}
    return ErrorReply(503, message, "server_error", None, code, headers)


def failed(message: str, code: FailureCode) -> ErrorReply:
    """An answer that the engine ended with an error."""
    if code is FailureCode.OUT_OF_MEMORY:
        return unavailable(f"{message}; try again later", code.value, retry_after_s=1.0)
    status = 504 if code is FailureCode.DEADLINE_EXCEEDED else 500
    return ErrorReply(status, message, "server_error", None, code.value)


def reply_to(error: Exception) -> ErrorReply:
    """What the client is told of an exception."""
    match error:
        case HttpError():
            return error.reply
        case RequestError():
            status = 404 if isinstance(error, UnknownModelError) else 400
            kind = "invalid_request_error"
            return ErrorReply(status, str(error), kind, error.param, error.code)
        case SleepingError():
            return unavailable(str(error), "sleeping", retry_after_s=error.retry_after_s)
        case OverloadedError():
            return unavailable(
                f"the server is overloaded: {error}; try again later",
                "overloaded",
                retry_after_s=max(1.0, error.retry_after_s),
            )
        case AllowanceError():
            return _too_much(error)
        case EngineDeadError():
            return unavailable("the engine is not running", "engine_dead")
        case ClientDisconnected():
            return ErrorReply(499, "the client closed the connection", "invalid_request_error")
        case HTTPException():
            return _routing_reply(error)
        case _:
            message = "internal error; the server's log has the details"
            return ErrorReply(500, message, "server_error", None, "internal_error")


def _too_much(error: AllowanceError) -> ErrorReply:
    """OpenAI's two kinds of 429: wait, or get more."""
    wait_s = error.retry_after_s
    code = "insufficient_quota" if wait_s is None else "rate_limit_exceeded"
    headers = {} if wait_s is None else {"retry-after": str(math.ceil(wait_s))}
    return ErrorReply(429, str(error), "rate_limit_error", None, code, headers)


def _routing_reply(error: HTTPException) -> ErrorReply:
    messages = {404: "no such route", 405: "this route does not take that method"}
    message = messages.get(error.status_code, "the request was refused")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return ErrorReply(error.status_code, message, kind, headers=dict(error.headers or {}))


def log_failure(error: Exception, request_id: str) -> None:
    """Tell the operator of failures that are not the client's; the client's are only counted."""
    if isinstance(error, ClientDisconnected):
        logger.info("request %s: 499, the client closed the connection", request_id)
    elif isinstance(error, EngineDeadError):
        logger.error("request %s: the engine is dead: %s", request_id, error)
    elif isinstance(error, (OverloadedError, AllowanceError)):
        logger.warning("request %s: refused, %s", request_id, error)
    elif isinstance(error, HttpError):
        if error.reply.status >= 500:
            logger.error("request %s: %s", request_id, error)
    elif not isinstance(error, (RequestError, HTTPException)):
        logger.error("request %s failed", request_id, exc_info=error)


def name_fields(request: Request, names: Mapping[str, str]) -> None:
    """Let what is refused from now on name fields as the client did; `names` are by core's own."""
    request.scope["octavo.field_names"] = names


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for all that is raised before a response has started."""
    log_failure(error, request.scope["octavo.request_id"])
    names: Mapping[str, str] = request.scope.get("octavo.field_names", {})
    return _renamed(reply_to(error), names).response()


def _renamed(reply: ErrorReply, names: Mapping[str, str]) -> ErrorReply:
    if reply.param is None or reply.param not in names:
        return reply
    param, message = names[reply.param], reply.message
    if message.startswith(reply.param):
        message = param + message.removeprefix(reply.param)
    return replace(reply, message=message, param=param)
